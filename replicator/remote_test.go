package replicator

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/transfer"
	"portolan/topology"
)

// shelf serves manifests by digest, and counts how often it is asked for one.
type shelf struct {
	manifests map[string][2]string // media type, body
	asked     atomic.Int64
}

func (s *shelf) add(mediaType, body string) (descriptor string) {
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(body)))
	s.manifests[digest] = [2]string{mediaType, body}
	return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, digest, len(body))
}

func (s *shelf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m, ok := s.manifests[path.Base(r.URL.Path)]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	s.asked.Add(1)
	w.Header().Set("Content-Type", m[0])
	w.Header().Set("Docker-Content-Digest", path.Base(r.URL.Path))
	fmt.Fprint(w, m[1])
}

func digestIn(descriptor string) string {
	_, rest, _ := strings.Cut(descriptor, `"digest":"`)
	digest, _, _ := strings.Cut(rest, `"`)
	return digest
}

func remoteOf(t *testing.T, h http.Handler) *remote {
	t.Helper()
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	r, err := newRemote(&topology.Replica{Region: "westus", Endpoint: u}, "portolan/test", newID, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

// Indexes that name each other over and over cost a request a manifest, not one a path.
func TestNestedIndexesAreReadOnce(t *testing.T) {
	t.Parallel()
	const image, index = "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"
	s := &shelf{manifests: make(map[string][2]string)}
	config, layer := "sha256:"+strings.Repeat("c", 64), "sha256:"+strings.Repeat("d", 64)
	subject := s.add(index, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[]}`, index))
	leaf := s.add(image, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"x","digest":%q,"size":3},"layers":[{"mediaType":"x","digest":%q,"size":4}],"subject":%s}`, image, config, layer, subject))
	all := []string{digestIn(leaf)}
	top := leaf
	for range maxNesting {
		top = s.add(index, fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"manifests":[%s,%s,%s],"subject":%s}`, index, top, top, top, subject))
		all = append(all, digestIn(top))
	}
	want := append(slices.Clone(all[:len(all)-1]), digestIn(subject))
	r := remoteOf(t, s)
	names, err := r.Names(t.Context(), "app", digestIn(top))
	slices.Sort(want)
	if err != nil || !slices.Equal(names, want) || s.asked.Load() > int64(len(all)) {
		t.Errorf("%d requests: %v, %v", s.asked.Load(), names, err)
	}
	s.asked.Store(0)
	sizes, err := r.Blobs(t.Context(), "app", digestIn(top))
	if err != nil || !maps.Equal(sizes, map[string]int64{config: 3, layer: 4}) || s.asked.Load() > int64(len(all)) {
		t.Errorf("%d requests: %v, %v", s.asked.Load(), sizes, err)
	}
	if names, err := r.Names(t.Context(), "app", "sha256:"+strings.Repeat("0", 64)); err != nil || len(names) != 0 {
		t.Errorf("what is not there names %v, %v", names, err)
	}
}

// What is kept between a copy and its tag is bounded by number and by size.
func TestManifestsKeptAreBounded(t *testing.T) {
	t.Parallel()
	for _, size := range []int{10, 4 << 20} {
		r := remoteOf(t, http.NotFoundHandler())
		for n := range 3 * maxRead {
			r.keep("app", fmt.Sprint(n), manifest{"x", make([]byte, size)})
			r.keep("app", fmt.Sprint(n), manifest{"x", make([]byte, size)}) // by another copy
			total := 0
			for _, m := range r.read {
				total += len(m.body)
			}
			if len(r.read) > maxRead || total > maxReadBytes || total != r.size {
				t.Fatalf("%d manifests of %d bytes, counted as %d", len(r.read), total, r.size)
			}
		}
		last := fmt.Sprint(3*maxRead - 1)
		if m, err := r.take(t.Context(), "app", last); err != nil || len(m.body) != size || len(r.read)*size != r.size {
			t.Errorf("%v, %d left of %d bytes", err, len(r.read), r.size)
		}
	}
}

// Some registries answer "not found" to whoever may not delete.
func TestUntagSeesThatTheTagIsThere(t *testing.T) {
	t.Parallel()
	digest := "sha256:" + strings.Repeat("a", 64)
	for name, there := range map[string]bool{"gone": false, "hidden": true} {
		r := remoteOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodHead && there {
				w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
				w.Header().Set("Docker-Content-Digest", digest)
				w.Header().Set("Content-Length", "400")
				return
			}
			w.WriteHeader(http.StatusNotFound)
		}))
		err := r.Untag(t.Context(), "app", "1", "w", func(string) error { return errors.New("something would be put there") })
		if there != errors.Is(err, ErrRefused) || !there && err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// What is damaged where it lies is not gone: nobody may forget it.
func TestErrorsOfSources(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err  transfer.SourceError
		want error
	}{
		"nowhere":           {transfer.SourceError{Missing: true, Lasting: true}, ErrGone},
		"damaged":           {transfer.SourceError{Lasting: true}, errUnreadable},
		"away for a moment": {transfer.SourceError{}, nil},
		"to be left alone":  {transfer.SourceError{RetryAt: time.Now().Add(time.Minute)}, nil},
	} {
		err := translate(&c.err)
		var rest *SourcesRestError
		if errors.As(err, &rest) == c.err.RetryAt.IsZero() || rest != nil && (rest.RetryAfter <= 30*time.Second || rest.RetryAfter > time.Minute) {
			t.Errorf("%s: to be asked again after %+v", name, rest)
		}
		for _, kind := range []error{ErrGone, errUnreadable, ErrRefused} {
			if errors.Is(err, kind) != (kind == c.want) {
				t.Errorf("%s is %v", name, err)
			}
		}
	}
}
