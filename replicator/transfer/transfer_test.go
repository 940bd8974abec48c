package transfer

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"

	"portolan/replicator/distribution"
)

const (
	imageType = "application/vnd.oci.image.manifest.v1+json"
	indexType = "application/vnd.oci.image.index.v1+json"
)

// replica is an in-process registry whose requests are counted and can be tampered with.
type replica struct {
	*httptest.Server
	client *distribution.Client
	// tamper, if not nil, sees a request first and reports whether it has answered it.
	tamper atomic.Pointer[func(http.ResponseWriter, *http.Request, http.Handler) bool]

	mu    sync.Mutex
	calls map[string]int
}

// faked registry: go-containerregistry's, which keeps blobs for all repositories in common. repositories makes it keep to the rule that a blob
// is only where it was pushed or mounted.
func newReplica(t testing.TB) *replica {
	t.Helper()
	inner := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true))
	r := &replica{calls: map[string]int{}}
	scoped := &repositories{inner: inner, has: map[string]bool{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		kind := req.Method
		switch {
		case strings.Contains(req.URL.Path, "/blobs/uploads/") && req.URL.Query().Has("mount"):
			kind += " mount"
		case strings.Contains(req.URL.Path, "/blobs/uploads/"):
			kind += " upload"
		case strings.Contains(req.URL.Path, "/blobs/"):
			kind += " blob"
		case strings.Contains(req.URL.Path, "/manifests/"):
			kind += " manifest"
		}
		r.mu.Lock()
		r.calls[kind]++
		r.mu.Unlock()
		if f := r.tamper.Load(); f != nil && (*f)(w, req, scoped) {
			return
		}
		scoped.ServeHTTP(w, req)
	}))
	t.Cleanup(r.Close)
	r.client = dial(t, r.URL)
	return r
}

func dial(t testing.TB, address string) *distribution.Client {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	c, err := distribution.New(distribution.Options{Endpoint: u})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func (r *replica) meddle(f func(http.ResponseWriter, *http.Request, http.Handler) bool) {
	r.tamper.Store(&f)
}

func (r *replica) count(kind string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls[kind]
}

type repositories struct {
	inner http.Handler
	mu    sync.Mutex
	has   map[string]bool // repository and digest
}

func (h *repositories) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	repo, rest, found := strings.Cut(strings.TrimPrefix(r.URL.Path, "/v2/"), "/blobs/")
	if !found {
		h.inner.ServeHTTP(w, r)
		return
	}
	key := func(repo, digest string) string { return repo + "@" + digest }
	q := r.URL.Query()
	switch {
	case q.Has("mount"):
		h.mu.Lock()
		there := h.has[key(q.Get("from"), q.Get("mount"))]
		if there {
			h.has[key(repo, q.Get("mount"))] = true
		}
		h.mu.Unlock()
		if there {
			w.WriteHeader(http.StatusCreated)
			return
		}
	case strings.HasPrefix(rest, "uploads/"):
		rec := &status{ResponseWriter: w}
		h.inner.ServeHTTP(rec, r)
		if r.Method == http.MethodPut && rec.code == http.StatusCreated {
			h.mu.Lock()
			h.has[key(repo, q.Get("digest"))] = true
			h.mu.Unlock()
		}
		return
	default:
		h.mu.Lock()
		there := h.has[key(repo, rest)]
		h.mu.Unlock()
		if !there {
			http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, http.StatusNotFound)
			return
		}
	}
	h.inner.ServeHTTP(w, r)
}

type status struct {
	http.ResponseWriter
	code int
}

func (s *status) WriteHeader(code int) { s.code = code; s.ResponseWriter.WriteHeader(code) }

func random(seed uint64, n int) []byte {
	b := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	r.Read(b)
	return b
}

func pushBlob(t testing.TB, c *distribution.Client, repo string, b []byte) distribution.Descriptor {
	t.Helper()
	up, err := c.StartUpload(t.Context(), repo)
	if err != nil {
		t.Fatal(err)
	}
	d := distribution.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: distribution.Digest(b), Size: int64(len(b))}
	if err := up.Commit(t.Context(), d.Digest, b); err != nil {
		t.Fatal(err)
	}
	return d
}

func push(t testing.TB, c *distribution.Client, repo, media string, doc map[string]any) distribution.Descriptor {
	t.Helper()
	doc["schemaVersion"], doc["mediaType"] = 2, media
	body, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	d := distribution.Descriptor{MediaType: media, Digest: distribution.Digest(body), Size: int64(len(body))}
	if err := c.PutManifest(t.Context(), repo, d.Digest, media, body, ""); err != nil {
		t.Fatal(err)
	}
	return d
}

func pushImage(t testing.TB, c *distribution.Client, repo string, layers ...[]byte) distribution.Descriptor {
	t.Helper()
	var ds []distribution.Descriptor
	for _, l := range layers {
		ds = append(ds, pushBlob(t, c, repo, l))
	}
	config := fmt.Appendf(nil, `{"n":%d,"first":%q}`, len(layers), distribution.Digest(bytes.Join(layers, nil)))
	return push(t, c, repo, imageType, map[string]any{"config": pushBlob(t, c, repo, config), "layers": ds})
}

// whole fails unless everything below a manifest is in the repository, byte for byte.
func whole(t testing.TB, c *distribution.Client, repo, digest string) {
	t.Helper()
	body, media, _, err := c.Manifest(t.Context(), repo, digest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := distribution.ParseManifest(media, body)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range m.Children {
		whole(t, c, repo, d.Digest)
	}
	for _, d := range m.Blobs {
		rc, err := c.OpenBlob(t.Context(), repo, d, 0)
		if err != nil {
			t.Fatal(err)
		}
		h, err := distribution.NewHash(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(h, rc)
		rc.Close()
		if err != nil || distribution.DigestOf(h) != d.Digest {
			t.Fatalf("blob %s: %v, %s", d.Digest, err, distribution.DigestOf(h))
		}
	}
}

func from(rs ...*replica) []Source {
	var out []Source
	for i, r := range rs {
		out = append(out, Source{Name: fmt.Sprintf("region%d", i), Client: r.client})
	}
	return out
}

func TestCopyIndexAndAgain(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	base := random(1, 300_000)
	one := pushImage(t, a.client, "team/app", base, random(2, 3<<20))
	two := pushImage(t, a.client, "team/app", base, random(3, 10))
	inner := push(t, a.client, "team/app", indexType, map[string]any{"manifests": []any{two}})
	index := push(t, a.client, "team/app", indexType, map[string]any{"manifests": []any{one, inner}})
	target := NewTarget(b.client, Limits{}, nil)
	got, err := target.Copy(t.Context(), Request{Repository: "team/app", Manifest: index, Sources: from(a)})
	if err != nil {
		t.Fatal(err)
	}
	whole(t, b.client, "team/app", index.Digest)
	if got.Uploaded != 5 || got.Manifests != 4 || got.Mounted != 0 || got.Read != got.Sent || got.Sent < 3<<20 {
		t.Fatalf("got %+v", got)
	}
	// Nothing to do, and yet proved.
	proofs := b.count("GET blob")
	got, err = target.Copy(t.Context(), Request{Repository: "team/app", Manifest: index, Sources: from(a)})
	if err != nil || got.Sent != 0 || got.Manifests != 0 || got.Present != 5 {
		t.Fatalf("again: %+v, %v", got, err)
	}
	if n := b.count("GET blob") - proofs; n != 5 {
		t.Fatalf("%d proofs of 5 blobs", n)
	}
	// A replicator that starts anew has no hints.
	got, err = NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "team/app", Manifest: index, Sources: from(a)})
	if err != nil || got.Sent != 0 || got.Present != 5 {
		t.Fatalf("without hints: %+v, %v", got, err)
	}
}

func TestBlobEntersOnce(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	base := random(1, 2<<20)
	const n = 8
	images := make([]distribution.Descriptor, n)
	for i := range images {
		images[i] = pushImage(t, a.client, fmt.Sprintf("r%d", i), base, random(uint64(10+i), 1000))
	}
	target := NewTarget(b.client, Limits{Blobs: 3}, nil)
	var wg sync.WaitGroup
	var sent, mounted atomic.Int64
	for i := range images {
		wg.Go(func() {
			s, err := target.Copy(t.Context(), Request{Repository: fmt.Sprintf("r%d", i), Manifest: images[i], Sources: from(a)})
			if err != nil {
				t.Error(err)
			}
			sent.Add(s.Sent)
			mounted.Add(int64(s.Mounted))
		})
	}
	wg.Wait()
	for i := range images {
		whole(t, b.client, fmt.Sprintf("r%d", i), images[i].Digest)
	}
	if sent.Load() >= 2*(2<<20) || mounted.Load() != n-1 {
		t.Fatalf("%d bytes sent, %d mounted: the base layer entered more than once", sent.Load(), mounted.Load())
	}
	if len(target.flights) != 0 {
		t.Fatalf("flights left: %v", target.flights)
	}
}

// The second image of one repository needs the base layer proved, not sent, not mounted.
func TestSameRepositoryProves(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	base := random(1, 5000)
	one, two := pushImage(t, a.client, "r", base, random(2, 10)), pushImage(t, a.client, "r", base, random(3, 10))
	target := NewTarget(b.client, Limits{}, nil)
	for _, d := range []distribution.Descriptor{one, two} {
		if _, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: d, Sources: from(a)}); err != nil {
			t.Fatal(err)
		}
	}
	if b.count("POST mount") != 0 {
		t.Fatal("mounted within one repository")
	}
	if b.count("PUT upload") != 5 {
		t.Fatalf("%d uploads, want 5", b.count("PUT upload"))
	}
}

func TestMountThatLies(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	base := random(1, 5000)
	img := pushImage(t, a.client, "second", base)
	// HEAD 200 and mount 201 for a blob that is not there, and then a body of 0 bytes: distribution after garbage collection.
	var uploaded atomic.Bool
	b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		switch {
		case r.URL.Query().Get("mount") == distribution.Digest(base):
			w.WriteHeader(http.StatusCreated)
			return true
		case r.Method == http.MethodPut && r.URL.Query().Get("digest") == distribution.Digest(base):
			uploaded.Store(true)
		case r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, "/blobs/"+distribution.Digest(base)) && !uploaded.Load():
			w.Header().Set("Content-Range", "bytes 4999-4999/5000")
			w.Header().Set("Content-Length", "1")
			w.WriteHeader(http.StatusPartialContent)
			return true
		}
		return false
	})
	target := NewTarget(b.client, Limits{}, nil)
	target.hints.add(distribution.Digest(base), "first")
	s, err := target.Copy(t.Context(), Request{Repository: "second", Manifest: img, Sources: from(a)})
	if err != nil || s.Mounted != 0 || s.Uploaded != 2 {
		t.Fatalf("%+v, %v", s, err)
	}
	whole(t, b.client, "second", img.Digest)
}

func TestMountRefusedUsesItsSession(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	img := pushImage(t, a.client, "second", random(1, 2<<20))
	target := NewTarget(b.client, Limits{}, nil)
	target.hints.add(distribution.Digest(random(1, 2<<20)), "first")
	if _, err := target.Copy(t.Context(), Request{Repository: "second", Manifest: img, Sources: from(a)}); err != nil {
		t.Fatal(err)
	}
	whole(t, b.client, "second", img.Digest)
	if m, p := b.count("POST mount"), b.count("POST upload"); m != 1 || p != 1 {
		t.Fatalf("%d mounts and %d new sessions, want 1 (for the layer) and 1 (for the config)", m, p)
	}
}

// cutter cuts the body of the first so many blob answers that are longer than n bytes there.
func cutter(times int32, n int) func(http.ResponseWriter, *http.Request, http.Handler) bool {
	var left atomic.Int32
	left.Store(times)
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != http.MethodGet || !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		rec := httptest.NewRecorder()
		next.ServeHTTP(rec, r)
		if rec.Body.Len() <= n || left.Add(-1) < 0 {
			for k, v := range rec.Header() {
				w.Header()[k] = v
			}
			w.WriteHeader(rec.Code)
			w.Write(rec.Body.Bytes())
			return true
		}
		for k, v := range rec.Header() {
			w.Header()[k] = v
		}
		w.WriteHeader(rec.Code)
		w.Write(rec.Body.Bytes()[:min(n, rec.Body.Len())])
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
}

func TestSourceCutMidBlob(t *testing.T) {
	t.Parallel()
	for _, times := range []int32{1, 2, 5} {
		t.Run(fmt.Sprint(times), func(t *testing.T) {
			t.Parallel()
			near, far, b := newReplica(t), newReplica(t), newReplica(t)
			layer := random(1, 8<<20)
			img := pushImage(t, near.client, "r", layer)
			pushImage(t, far.client, "r", layer)
			near.meddle(cutter(times, 3<<20))
			s, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(near, far)})
			if err != nil {
				t.Fatal(err)
			}
			whole(t, b.client, "r", img.Digest)
			if over := s.Read - s.Sent; over != 0 {
				t.Fatalf("%d bytes were read twice: the takeover is not at the byte where it was cut", over)
			}
			if b.count("PATCH upload") != 1 {
				t.Fatal("a source's trouble reached the target")
			}
			if far.count("GET blob") == 0 {
				t.Fatal("no other source took over")
			}
		})
	}
}

// limiter answers the first so many requests for what has the word in its path with 429 and the time to stay away.
func limiter(word, seconds string, times int32) func(http.ResponseWriter, *http.Request, http.Handler) bool {
	var left atomic.Int32
	left.Store(times)
	return func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.Contains(r.URL.Path, word) || left.Add(-1) < 0 {
			return false
		}
		w.Header().Set("Retry-After", seconds)
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
}

// A source that names a time is asked for nothing before it. Another takes over at once; where there is none, the copy ends at once and tells the time.
func TestSourceThatWantsToBeLeftAlone(t *testing.T) {
	t.Parallel()
	for _, word := range []string{"/manifests/", "/blobs/"} {
		t.Run(word, func(t *testing.T) {
			t.Parallel()
			near, far, b := newReplica(t), newReplica(t), newReplica(t)
			layers := []distribution.Descriptor{pushBlob(t, near.client, "r", random(1, 3<<20))}
			pushBlob(t, far.client, "r", random(1, 3<<20))
			image := map[string]any{"config": layers[0], "layers": layers} // one blob, so that there is one request for it
			img := push(t, near.client, "r", imageType, image)
			push(t, far.client, "r", imageType, image)
			near.meddle(limiter(word, "60", 1000))
			asked := func() int { return near.count("GET manifest") + near.count("GET blob") }
			before := asked()
			_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(near)})
			var source *SourceError
			if !errors.As(err, &source) || source.Missing || source.Lasting {
				t.Fatal(err)
			}
			if rest := time.Until(source.RetryAt); rest <= 30*time.Second || rest > time.Minute {
				t.Fatalf("%v, to be asked again in %v", err, rest)
			}
			want := before + map[string]int{"/manifests/": 1, "/blobs/": 2}[word]
			if asked() != want {
				t.Errorf("%d requests, want %d", asked()-before, want-before)
			}
			if _, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(near, far)}); err != nil {
				t.Fatal(err)
			}
			whole(t, b.client, "r", img.Digest)
			if asked() != want {
				t.Errorf("%d requests before the time", asked()-want)
			}
		})
	}
	t.Run("in mid-blob", func(t *testing.T) {
		t.Parallel()
		near, far, b := newReplica(t), newReplica(t), newReplica(t)
		img := pushImage(t, near.client, "r", random(1, 8<<20))
		pushImage(t, far.client, "r", random(1, 8<<20))
		cut, limit := cutter(1, 3<<20), limiter("/blobs/", "60", 1000)
		var large atomic.Int32
		near.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if large.Load() > 0 && limit(w, r, next) {
				return true
			}
			if r.Header.Get("Range") == "" && strings.HasSuffix(r.URL.Path, distribution.Digest(random(1, 8<<20))) {
				large.Add(1)
			}
			return cut(w, r, next)
		})
		far.meddle(cutter(1, 1<<20)) // so that the near one would be next
		s, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(near, far)})
		if err != nil {
			t.Fatal(err)
		}
		whole(t, b.client, "r", img.Digest)
		if s.Read != s.Sent || b.count("PATCH upload") != 1 {
			t.Errorf("%d bytes read for %d, in %d requests", s.Read, s.Sent, b.count("PATCH upload"))
		}
	})
	for _, word := range []string{"/manifests/", "/blobs/"} {
		t.Run("for a moment, "+word, func(t *testing.T) {
			t.Parallel()
			a, b := newReplica(t), newReplica(t)
			img := pushImage(t, a.client, "r", random(1, 3<<20))
			a.meddle(limiter(word, "1", 1))
			if _, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)}); err != nil {
				t.Fatal(err)
			}
			whole(t, b.client, "r", img.Digest)
		})
	}
}

// The time that is told is the one at which the first may give the content; none, if one may do so before any time that was named.
func TestWhenSourcesCanBeAskedAgain(t *testing.T) {
	t.Parallel()
	fails := func(kind error, rest time.Duration) *source {
		err := &distribution.Error{Kind: kind}
		if rest > 0 {
			err.RetryAt = time.Now().Add(rest)
		}
		return &source{err: err}
	}
	long, short := fails(distribution.ErrUnavailable, time.Hour), fails(distribution.ErrUnavailable, time.Minute)
	cut, past := fails(distribution.ErrUnavailable, 0), fails(distribution.ErrUnavailable, time.Nanosecond)
	denied, lacking, damaged := fails(distribution.ErrUnauthorized, 0), fails(distribution.ErrNotFound, 0), fails(distribution.ErrCorrupt, 0)
	for name, c := range map[string]struct {
		all  []*source
		want *source
	}{
		"one":                                {[]*source{long}, long},
		"the first of two":                   {[]*source{long, short}, short},
		"others do not have it":              {[]*source{lacking, long, damaged}, long},
		"one that was cut off may be sooner": {[]*source{long, cut}, nil},
		"one that refuses may be sooner":     {[]*source{denied, long}, nil},
		"one whose time has come":            {[]*source{long, past}, nil},
		"nobody asked for it":                {[]*source{cut, lacking}, nil},
	} {
		t.Run(name, func(t *testing.T) { // not parallel: the times would come while it waits for its turn
			e := (&sources{all: c.all}).exhausted()
			if c.want == nil {
				if !e.RetryAt.IsZero() {
					t.Errorf("in %v", time.Until(e.RetryAt))
				}
				return
			}
			if early := distribution.RetryAfter(c.want.err) - time.Until(e.RetryAt); e.RetryAt.IsZero() || early.Abs() > 10*time.Second {
				t.Errorf("in %v", time.Until(e.RetryAt))
			}
		})
	}
}

// What a registry tells somebody else meanwhile throws no upload away that is under way: its commit goes through.
func TestUploadOutlivesARest(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	layer := pushBlob(t, a.client, "r", random(1, 3<<20))
	img := push(t, a.client, "r", imageType, map[string]any{"config": layer, "layers": []any{layer}})
	b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method != http.MethodPatch {
			return limiter("/manifests/limited", "30", 1)(w, r, next)
		}
		next.ServeHTTP(w, r)
		if _, err := b.client.Head(t.Context(), "r", "limited"); distribution.RetryAfter(err) == 0 {
			t.Errorf("a scan is answered %v", err)
		}
		return true
	})
	_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
	if distribution.RetryAfter(err) == 0 {
		t.Errorf("what comes after it: %v", err)
	}
	if err := dial(t, b.URL).ProveBlob(t.Context(), "r", layer); err != nil || b.count("DELETE upload") != 0 {
		t.Errorf("%v, %d uploads cancelled", err, b.count("DELETE upload"))
	}
}

// Nor does what one child of an index, or its source, is told: the others' uploads come to their end, and nothing more is begun.
func TestChildrenOutliveARestOfOne(t *testing.T) {
	t.Parallel()
	for _, who := range []string{"target", "source"} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			a, b := newReplica(t), newReplica(t)
			var images []any
			for seed := range uint64(3) {
				layer := pushBlob(t, a.client, "r", random(seed, 3<<20))
				images = append(images, push(t, a.client, "r", imageType, map[string]any{"config": layer, "layers": []any{layer}}))
			}
			index := push(t, a.client, "r", indexType, map[string]any{"manifests": images})
			sending, told := make(chan struct{}), make(chan struct{})
			limit := limiter("/", "60", 1000)
			var second atomic.Bool
			a.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if !strings.HasSuffix(r.URL.Path, images[1].(distribution.Descriptor).Digest) {
					return false
				}
				<-sending
				if who == "source" {
					defer close(told)
					return limit(w, r, next)
				}
				second.Store(true)
				return false
			})
			b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				switch {
				case r.Method == http.MethodPost && second.CompareAndSwap(true, false):
					defer close(told)
					return limit(w, r, next)
				case r.Method == http.MethodPatch:
					close(sending)
					<-told
					select { // time for the upload to be cut off, which it should not be
					case <-r.Context().Done():
					case <-time.After(300 * time.Millisecond):
					}
				}
				return false
			})
			_, err := NewTarget(b.client, Limits{Manifests: 2}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: index, Sources: from(a)})
			if !rests(err) || errors.Is(err, ErrSource) != (who == "source") {
				t.Errorf("got %v", err)
			}
			if begun, ended, cancelled := b.count("PATCH upload"), b.count("PUT upload"), b.count("DELETE upload"); begun != 1 || ended != 1 || cancelled != 0 {
				t.Errorf("%d uploads begun, %d ended, %d cancelled", begun, ended, cancelled)
			}
		})
	}
}

func TestNothingIsBegunAfterARest(t *testing.T) {
	t.Parallel()
	begun, rest := 0, &distribution.Error{Kind: distribution.ErrUnavailable, RetryAt: time.Now().Add(time.Minute)}
	err := each(t.Context(), 1, make([]distribution.Descriptor, 3), func(context.Context, distribution.Descriptor) error {
		begun++
		return rest
	})
	if begun != 1 || err != rest {
		t.Errorf("%d begun, %v", begun, err)
	}
}

// sessions makes a target tell where its upload stands, which it keeps when it is cut off.
func sessions() func(http.ResponseWriter, *http.Request, http.Handler) bool {
	var mu sync.Mutex // held while it is being sent
	var stored int64
	return func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if !strings.Contains(r.URL.Path, "/blobs/uploads/") {
			return false
		}
		mu.Lock()
		defer mu.Unlock()
		switch r.Method {
		case http.MethodPatch:
			body, _ := io.ReadAll(r.Body)
			stored += int64(len(body))
			r.Body = io.NopCloser(bytes.NewReader(body))
		case http.MethodGet:
			w.Header().Set("Range", fmt.Sprintf("0-%d", stored-1))
			w.WriteHeader(http.StatusNoContent)
			return true
		}
		return false
	}
}

// Who wants to be left alone in the middle of an upload ends the copy, and not the upload: the next copy goes on with it, if it can.
func TestRestKeepsTheUpload(t *testing.T) {
	t.Parallel()
	const size = 10 << 20
	blob := random(1, size)
	for name, c := range map[string]struct {
		target     string // the method that it answers so
		remembered bool
	}{
		"of the only source":          {"", true},
		"of the target at the commit": {http.MethodPut, true},
		"and nobody would know of it": {http.MethodPut, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newReplica(t), newReplica(t)
			layer := pushBlob(t, a.client, "r", blob)
			img := push(t, a.client, "r", imageType, map[string]any{"config": layer, "layers": []any{layer}})
			cut, limit, keep := cutter(1, 6<<20), limiter("/blobs/", "60", 1), sessions()
			a.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				return c.target == "" && (r.Header.Get("Range") != "" && limit(w, r, next) || cut(w, r, next))
			})
			b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				return r.Method == c.target && limit(w, r, next) || keep(w, r, next)
			})
			j := open(t, filepath.Join(t.TempDir(), "uploads.json"))
			run := func() (Stats, error) {
				target := NewTarget(dial(t, b.URL), Limits{}, nil)
				if c.remembered {
					target.Remember(j, "b")
				}
				return target.Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: []Source{{Name: "a", Client: dial(t, a.URL)}}})
			}
			if _, err := run(); !rests(err) {
				t.Fatalf("got %v", err)
			}
			if cancelled := b.count("DELETE upload"); (cancelled == 0) != c.remembered {
				t.Errorf("%d uploads cancelled", cancelled)
			}
			if !c.remembered {
				return
			}
			s, err := run()
			if err != nil {
				t.Fatal(err)
			}
			whole(t, b.client, "r", img.Digest)
			if s.Read > size-checkpointSpacing || b.count("DELETE upload") != 0 || len(j.uploads) != 0 {
				t.Errorf("%d bytes read again of %d, %d uploads cancelled, %d remembered", s.Read, size, b.count("DELETE upload"), len(j.uploads))
			}
		})
	}
}

func TestWrongBytesAreNeverCommitted(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"small": 2000, "large": 5 << 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			liar, honest, b := newReplica(t), newReplica(t), newReplica(t)
			layer := random(1, size)
			img := pushImage(t, liar.client, "r", layer)
			pushImage(t, honest.client, "r", layer)
			liar.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, distribution.Digest(layer)) {
					return false
				}
				wrong := bytes.Clone(layer)
				wrong[size/2] ^= 1
				w.Header().Set("Content-Length", fmt.Sprint(size))
				w.Write(wrong)
				return true
			})
			var commits atomic.Int32
			b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Method == http.MethodPut && r.URL.Query().Get("digest") == distribution.Digest(layer) {
					commits.Add(1)
				}
				return false
			})
			target := NewTarget(b.client, Limits{}, nil)
			if _, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(liar)}); !errors.Is(err, ErrIncomplete) {
				t.Fatalf("a liar alone: %v", err)
			}
			if commits.Load() != 0 {
				t.Fatal("wrong bytes were committed")
			}
			if _, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(liar, honest)}); err != nil {
				t.Fatal(err)
			}
			whole(t, b.client, "r", img.Digest)
		})
	}
}

// What only damaged or hollow copies are left of is missing: it must not be asked for in vain for ever.
func TestDamagedAtEverySource(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(http.ResponseWriter, []byte){
		"another size": func(w http.ResponseWriter, layer []byte) { w.Write(layer[1:]) },
		"wrong bytes":  func(w http.ResponseWriter, layer []byte) { w.Write(random(9, len(layer))) },
		"hollow":       func(w http.ResponseWriter, layer []byte) { w.Header().Set("Content-Length", fmt.Sprint(len(layer))) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			damaged, without, b := newReplica(t), newReplica(t), newReplica(t)
			layer := random(1, 2<<20)
			img := pushImage(t, damaged.client, "r", layer)
			damaged.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, distribution.Digest(layer)) {
					return false
				}
				answer(w, layer)
				return true
			})
			_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(damaged, without)})
			var source *SourceError
			if !errors.Is(err, ErrIncomplete) || !errors.As(err, &source) || name == "wrong bytes" && source.Missing || !source.Lasting {
				t.Fatalf("got %v", err)
			}
		})
	}
	t.Run("empty by the manifest alone", func(t *testing.T) {
		t.Parallel()
		a, b := newReplica(t), newReplica(t)
		layer := pushBlob(t, a.client, "r", []byte("layer"))
		layer.Size = 0
		img := push(t, a.client, "r", imageType, map[string]any{"config": layer, "layers": []any{}})
		_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
		var never *NotReplicableError
		if !errors.As(err, &never) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestTargetCutMidUpload(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	img := pushImage(t, a.client, "r", random(1, 6<<20))
	var cuts atomic.Int32
	b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodPatch && cuts.Add(1) <= 2 {
			io.CopyN(io.Discard, r.Body, 2<<20)
			panic(http.ErrAbortHandler)
		}
		return false
	})
	s, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
	if err != nil {
		t.Fatal(err)
	}
	whole(t, b.client, "r", img.Digest)
	if s.Uploaded != 2 || cuts.Load() != 3 {
		t.Fatalf("%+v after %d patches", s, cuts.Load())
	}
}

func TestCommitWhoseAnswerIsLost(t *testing.T) {
	t.Parallel()
	for name, size := range map[string]int{"small": 2000, "large": 3 << 20} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := newReplica(t), newReplica(t)
			layer := random(1, size)
			img := pushImage(t, a.client, "r", layer)
			var lost atomic.Int32
			b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Method == http.MethodPut && r.URL.Query().Get("digest") == distribution.Digest(layer) && lost.Add(1) == 1 {
					next.ServeHTTP(httptest.NewRecorder(), r)
					panic(http.ErrAbortHandler)
				}
				return false
			})
			s, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
			if err != nil || lost.Load() != 1 {
				t.Fatalf("%+v, %v after %d commits", s, err, lost.Load())
			}
			whole(t, b.client, "r", img.Digest)
		})
	}
}

func TestStatesOfTheTarget(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name   string
		method string
		code   int
		body   string
		after  string
		want   error
	}{
		{"read-only", http.MethodPost, 405, "", "", distribution.ErrReadOnly},
		{"full", http.MethodPut, 507, "", "", distribution.ErrFull},
		{"busy for long", http.MethodPost, 503, "", "600", distribution.ErrUnavailable},
		{"denied", http.MethodPost, 403, "", "", distribution.ErrUnauthorized},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			a, b := newReplica(t), newReplica(t)
			img := pushImage(t, a.client, "r", random(1, 1000))
			b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
				if r.Method != tc.method {
					return false
				}
				if tc.after != "" {
					w.Header().Set("Retry-After", tc.after)
				}
				w.WriteHeader(tc.code)
				return true
			})
			_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
			if !errors.Is(err, tc.want) || errors.Is(err, ErrSource) {
				t.Fatalf("got %v", err)
			}
			// By another client: the one that was told to wait does.
			if _, err := dial(t, b.URL).Head(t.Context(), "r", img.Digest); !errors.Is(err, distribution.ErrNotFound) {
				t.Fatalf("the manifest was put: %v", err)
			}
		})
	}
	t.Run("busy for a moment", func(t *testing.T) {
		t.Parallel()
		a, b := newReplica(t), newReplica(t)
		img := pushImage(t, a.client, "r", random(1, 3<<20))
		var n atomic.Int32
		b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
			if n.Add(1)%5 != 0 {
				return false
			}
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			return true
		})
		if _, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)}); err != nil {
			t.Fatal(err)
		}
		b.meddle(func(http.ResponseWriter, *http.Request, http.Handler) bool { return false })
		whole(t, b.client, "r", img.Digest)
	})
	t.Run("a source that is away is no state of the target", func(t *testing.T) {
		t.Parallel()
		a, b := newReplica(t), newReplica(t)
		img := pushImage(t, a.client, "r", random(1, 1000))
		a.Close()
		_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
		if !errors.Is(err, ErrSource) || errors.Is(err, ErrIncomplete) || distribution.StateOfReplica(err) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestManifestBlobUnknownStartsOnceAgain(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	layer := random(1, 1000)
	img := pushImage(t, a.client, "r", layer)
	target := NewTarget(b.client, Limits{}, nil)
	var puts atomic.Int32
	times := int32(1)
	refuse := func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") && puts.Add(1) <= times {
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, `{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry"}]}`)
			return true
		}
		return false
	}
	b.meddle(refuse)
	if _, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)}); err != nil || puts.Load() != 2 {
		t.Fatalf("%v after %d puts", err, puts.Load())
	}
	puts.Store(0)
	times = 10
	c := newReplica(t)
	c.meddle(refuse)
	if _, err := NewTarget(c.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)}); !errors.Is(err, distribution.ErrBlobUnknown) || puts.Load() != 2 {
		t.Fatalf("%v after %d puts, want 2", err, puts.Load())
	}
}

func TestNotReplicableAndIncomplete(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	raw := []byte(`{"schemaVersion":1,"name":"r","fsLayers":[]}`)
	if err := a.client.PutManifest(t.Context(), "r", "old", "application/vnd.docker.distribution.manifest.v1+prettyjws", raw, ""); err != nil {
		t.Fatal(err)
	}
	target := NewTarget(b.client, Limits{}, nil)
	_, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: distribution.Descriptor{Digest: distribution.Digest(raw)}, Sources: from(a)})
	var not *NotReplicableError
	if !errors.As(err, &not) || not.Reason == "" {
		t.Fatalf("schema 1: %v", err)
	}

	// A platform that is not there (yet): the others are copied, the index waits.
	one := pushImage(t, a.client, "r", random(1, 1000))
	gone := distribution.Descriptor{MediaType: imageType, Digest: distribution.Digest([]byte("gone")), Size: 4}
	body, _ := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": indexType, "manifests": []any{gone, one}})
	a.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodGet && strings.HasSuffix(r.URL.Path, distribution.Digest(body)) {
			w.Header().Set("Content-Type", indexType)
			w.Write(body)
			return true
		}
		return false
	})
	_, err = target.Copy(t.Context(), Request{Repository: "r", Manifest: distribution.Descriptor{Digest: distribution.Digest(body)}, Sources: from(a)})
	if !errors.Is(err, ErrIncomplete) || errors.As(err, &not) {
		t.Fatalf("a missing child: %v", err)
	}
	whole(t, b.client, "r", one.Digest)

	// What the target refuses for ever.
	two := pushImage(t, a.client, "r", random(2, 1000))
	b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodPut && strings.Contains(r.URL.Path, "/manifests/") {
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, `{"errors":[{"code":"MANIFEST_INVALID","message":"media type not allowed"}]}`)
			return true
		}
		return false
	})
	_, err = target.Copy(t.Context(), Request{Repository: "r", Manifest: two, Sources: from(a)})
	if !errors.As(err, &not) || !strings.Contains(not.Reason, "media type not allowed") {
		t.Fatalf("a refused manifest: %v", err)
	}
}

// What many indexes name is read and written once, there or not.
func TestSharedManifestsAreCopiedOnce(t *testing.T) {
	t.Parallel()
	a := newReplica(t)
	level := []any{pushImage(t, a.client, "r", random(1, 10)), pushImage(t, a.client, "r", random(2, 10))}
	all := len(level)
	var top distribution.Descriptor
	for n := range maxDepth {
		var next []any
		for i := range 3 {
			top = push(t, a.client, "r", indexType, map[string]any{"manifests": level, "annotations": map[string]string{"n": fmt.Sprint(n, i)}})
			next = append(next, top)
		}
		level, all = next, all+len(next)
	}
	all -= 2 // only one of the last three is copied
	for _, atATime := range []int{1, 3} {
		b, before := newReplica(t), a.count("GET manifest")
		s, err := NewTarget(b.client, Limits{Manifests: atATime}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: top, Sources: from(a)})
		if err != nil || s.Manifests != all {
			t.Fatalf("%+v, %v; want %d manifests", s, err, all)
		}
		if read, looked := a.count("GET manifest")-before, b.count("GET manifest"); read != all || looked != 2*all || b.count("PUT manifest") != all {
			t.Errorf("%d reads, %d looks, %d writes for %d manifests", read, looked, b.count("PUT manifest"), all)
		}
	}

	gone := level[0].(distribution.Descriptor).Digest
	level = []any{push(t, a.client, "r", indexType, map[string]any{"manifests": level[:1], "annotations": map[string]string{"a": "1"}}),
		push(t, a.client, "r", indexType, map[string]any{"manifests": level[:1], "annotations": map[string]string{"a": "2"}})}
	top = push(t, a.client, "r", indexType, map[string]any{"manifests": level})
	var asked atomic.Int32
	a.meddle(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.HasSuffix(r.URL.Path, gone) {
			return false
		}
		asked.Add(1)
		http.NotFound(w, r)
		return true
	})
	if _, err := NewTarget(newReplica(t).client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: top, Sources: from(a)}); !errors.Is(err, ErrIncomplete) || asked.Load() != 1 {
		t.Errorf("what is missing was asked for %d times: %v", asked.Load(), err)
	}
}

func TestManifestsOfACopyAreBounded(t *testing.T) {
	t.Parallel()
	a := newReplica(t)
	nested := func(d distribution.Descriptor, levels int) distribution.Descriptor {
		for range levels {
			d = push(t, a.client, "r", indexType, map[string]any{"manifests": []any{d}})
		}
		return d
	}
	image := pushImage(t, a.client, "r", random(1, 10))
	inner := nested(image, 4)
	both := func(levels int) distribution.Descriptor {
		return push(t, a.client, "r", indexType, map[string]any{"manifests": []any{inner, nested(push(t, a.client, "r", indexType, map[string]any{"manifests": []any{inner, image}}), levels)}})
	}
	var many []any
	for n := range maxManifests + 1 {
		many = append(many, distribution.Descriptor{MediaType: imageType, Digest: distribution.Digest(fmt.Append(nil, n)), Size: 1})
	}
	body, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": indexType, "manifests": many})
	if err != nil {
		t.Fatal(err)
	}
	a.meddle(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
		if !strings.HasSuffix(r.URL.Path, distribution.Digest(body)) {
			return false
		}
		w.Header().Set("Content-Type", indexType)
		w.Write(body)
		return true
	})
	for name, tc := range map[string]struct {
		top  distribution.Descriptor
		want string
	}{
		"as deep as it may be":    {nested(image, maxDepth), ""},
		"deeper":                  {nested(image, maxDepth+1), "deeper than 8"},
		"as deep, by one way":     {both(maxDepth - 6), ""},
		"deeper, by one way only": {both(maxDepth - 5), "deeper than 8"},
		"too many":                {distribution.Descriptor{Digest: distribution.Digest(body)}, "more than 16384 manifests"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newReplica(t)
			_, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: tc.top, Sources: from(a)})
			var never *NotReplicableError
			if tc.want == "" && err != nil || tc.want != "" && (!errors.As(err, &never) || !strings.Contains(never.Reason, tc.want)) {
				t.Errorf("got %v", err)
			}
			if n := b.count("GET manifest"); n > 50 {
				t.Errorf("%d manifests were looked for", n)
			}
		})
	}
}

func TestForeignLayersAreLeftAlone(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	foreign := distribution.Descriptor{MediaType: "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", Digest: distribution.Digest([]byte("windows")), Size: 7, URLs: []string{"https://example.com/windows"}}
	img := push(t, a.client, "r", imageType, map[string]any{"config": pushBlob(t, a.client, "r", []byte("{}")), "layers": []any{foreign, pushBlob(t, a.client, "r", []byte("layer"))}})
	s, err := NewTarget(b.client, Limits{}, nil).Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
	if err != nil || s.Foreign != 1 || s.Uploaded != 2 {
		t.Fatalf("%+v, %v", s, err)
	}
}

func TestCancelledCopyCancelsItsUpload(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	img := pushImage(t, a.client, "r", random(1, 6<<20))
	ctx, cancel := context.WithCancel(t.Context())
	b.meddle(func(w http.ResponseWriter, r *http.Request, next http.Handler) bool {
		if r.Method == http.MethodPatch {
			io.CopyN(io.Discard, r.Body, 1<<20)
			cancel()
			io.Copy(io.Discard, r.Body) // until the client goes away
			return true
		}
		return false
	})
	target := NewTarget(b.client, Limits{}, nil)
	if _, err := target.Copy(ctx, Request{Repository: "r", Manifest: img, Sources: from(a)}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if b.count("DELETE upload") == 0 {
		t.Fatal("the upload was abandoned without a word")
	}
	if len(target.flights) != 0 || !target.slots.TryAcquire(int64(target.limits.Blobs)) {
		t.Fatal("a slot or flight was kept")
	}
}

func TestHints(t *testing.T) {
	t.Parallel()
	h := newHints(2)
	h.add("a", "r1")
	h.add("a", "r2")
	h.add("a", "r1")
	if got := h.get("a"); !slices.Equal(got, []string{"r2", "r1"}) {
		t.Fatal(got)
	}
	h.add("b", "r1")
	h.get("a")
	h.add("c", "r1")
	if h.get("b") != nil || h.get("a") == nil || h.get("c") == nil {
		t.Fatal("not the least recently used was dropped")
	}
	h.remove("a", "r2")
	if got := h.get("a"); !slices.Equal(got, []string{"r1"}) {
		t.Fatal(got)
	}
	for i := range 20 {
		h.add("a", fmt.Sprint(i))
	}
	if n := len(h.get("a")); n != hintRepositories {
		t.Fatal(n)
	}
	h.drop("a")
	h.clear()
	if h.get("a") != nil || h.get("c") != nil || h.order.Len() != 0 {
		t.Fatal("not dropped")
	}
}
