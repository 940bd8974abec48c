package distribution

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
)

const (
	imageType = "application/vnd.oci.image.manifest.v1+json"
	indexType = "application/vnd.oci.image.index.v1+json"
)

// serve runs an in-process registry behind wrap (nil: none) and returns a client of it.
func serve(t *testing.T, wrap func(http.Handler) http.Handler, change ...func(*Options)) (*Client, *httptest.Server) {
	t.Helper()
	h := registry.New(registry.Logger(log.New(io.Discard, "", 0)), registry.WithReferrersSupport(true))
	if wrap != nil {
		h = wrap(h)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return dial(t, s, change...), s
}

func dial(t *testing.T, s *httptest.Server, change ...func(*Options)) *Client {
	t.Helper()
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Endpoint: u}
	for _, f := range change {
		f(&o)
	}
	c, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func pushBlob(t *testing.T, c *Client, repo string, b []byte) Descriptor {
	t.Helper()
	up, err := c.StartUpload(t.Context(), repo)
	if err != nil {
		t.Fatal(err)
	}
	d := Descriptor{MediaType: "application/octet-stream", Digest: Digest(b), Size: int64(len(b))}
	if err := up.Commit(t.Context(), d.Digest, b); err != nil {
		t.Fatal(err)
	}
	return d
}

// image makes a manifest of the given layers, all of which it pushes.
func pushImage(t *testing.T, c *Client, repo, tag string, subject *Descriptor, layers ...[]byte) Descriptor {
	t.Helper()
	m := map[string]any{"schemaVersion": 2, "mediaType": imageType, "config": pushBlob(t, c, repo, []byte("{}"))}
	var ds []Descriptor
	for _, l := range layers {
		ds = append(ds, pushBlob(t, c, repo, l))
	}
	m["layers"] = ds
	if subject != nil {
		m["subject"] = subject
	}
	body, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	d := Descriptor{MediaType: imageType, Digest: Digest(body), Size: int64(len(body))}
	ref := tag
	if ref == "" {
		ref = d.Digest
	}
	if err := c.PutManifest(t.Context(), repo, ref, imageType, body, "w1"); err != nil {
		t.Fatal(err)
	}
	return d
}

func collect(seq func(func(string, error) bool)) ([]string, error) {
	var out []string
	for name, err := range seq {
		if err != nil {
			return out, err
		}
		out = append(out, name)
	}
	return out, nil
}

func TestManifestsTagsAndReferrers(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := serve(t, nil)
	if err := c.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	d := pushImage(t, c, "team/app", "1.0", nil, []byte("layer"))
	for _, ref := range []string{"1.0", d.Digest} {
		got, err := c.Head(ctx, "team/app", ref)
		if err != nil || got.Digest != d.Digest || got.Size != d.Size || got.MediaType != imageType {
			t.Fatalf("Head(%s) = %+v, %v; want %+v", ref, got, err, d)
		}
		body, media, digest, err := c.Manifest(ctx, "team/app", ref)
		if err != nil || media != imageType || digest != d.Digest || Digest(body) != d.Digest {
			t.Fatalf("Manifest(%s) = %s, %s, %v", ref, media, digest, err)
		}
	}
	if _, err := c.Head(ctx, "team/app", "2.0"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("Head of an absent tag: %v", err)
	}
	tags, err := collect(c.Tags(ctx, "team/app"))
	if err != nil || !slices.Equal(tags, []string{"1.0"}) {
		t.Fatalf("Tags = %v, %v", tags, err)
	}
	repos, err := collect(c.Repositories(ctx))
	if err != nil || !slices.Equal(repos, []string{"team/app"}) {
		t.Fatalf("Repositories = %v, %v", repos, err)
	}
	r := pushImage(t, c, "team/app", "", &d, []byte("signature"))
	refs, found, err := c.ReferrersByAPI(ctx, "team/app", d.Digest)
	if err != nil || !found || len(refs) != 1 || refs[0].Digest != r.Digest {
		t.Fatalf("ReferrersByAPI = %+v, %t, %v", refs, found, err)
	}
	if err := c.DeleteTag(ctx, "team/app", "1.0", ""); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Head(ctx, "team/app", d.Digest); err != nil {
		t.Fatalf("the manifest went with its tag: %v", err)
	}
	if _, _, known := c.ClockOffset(); !known {
		t.Fatal("no clock offset after all these answers")
	}
}

func TestBlobs(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	c, _ := serve(t, nil)
	content := bytes.Repeat([]byte("0123456789"), 1000)
	d := pushBlob(t, c, "a", content)
	empty := pushBlob(t, c, "a", nil)
	for _, offset := range []int64{0, 1, 9998} {
		rc, err := c.OpenBlob(ctx, "a", d, offset)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(rc)
		rc.Close()
		if err != nil || !bytes.Equal(got, content[offset:]) {
			t.Fatalf("from %d: %d bytes, %v", offset, len(got), err)
		}
	}
	if err := c.ProveBlob(ctx, "a", d); err != nil {
		t.Fatal(err)
	}
	if err := c.ProveBlob(ctx, "a", empty); err != nil {
		t.Fatal(err)
	}
	wrong := d
	wrong.Size++
	if err := c.ProveBlob(ctx, "a", wrong); !errors.Is(err, ErrNotFound) {
		t.Fatalf("a blob of another size was proved: %v", err)
	}
	absent := Descriptor{Digest: Digest([]byte("absent")), Size: 6}
	if err := c.ProveBlob(ctx, "a", absent); !errors.Is(err, ErrNotFound) {
		t.Fatalf("an absent blob: %v", err)
	}
	if rc, err := c.OpenBlob(ctx, "a", wrong, 0); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a blob of another size was opened: %v, %v", rc, err)
	}
	if size, err := c.HasBlob(ctx, "a", d.Digest); err != nil || size != d.Size {
		t.Fatalf("HasBlob = %d, %v", size, err)
	}

	up, err := c.StartUpload(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(content); i += 4000 {
		n := min(4000, len(content)-i)
		if err := up.Append(ctx, bytes.NewReader(content[i:]), int64(n)); err != nil {
			t.Fatal(err)
		}
	}
	if up.Offset() != d.Size {
		t.Fatalf("offset %d, want %d", up.Offset(), d.Size)
	}
	if err := up.Commit(ctx, d.Digest, nil); err != nil {
		t.Fatal(err)
	}
	if err := c.ProveBlob(ctx, "b", d); err != nil {
		t.Fatal(err)
	}
}

// hollow answers as CNCF distribution does after a garbage collection with its descriptor cache on.
func TestProveBlobOfLiars(t *testing.T) {
	t.Parallel()
	d := Descriptor{Digest: Digest([]byte("gone")), Size: 1000}
	for name, h := range map[string]http.HandlerFunc{
		"206 without a byte": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 999-999/1000")
			w.Header().Set("Content-Length", "1")
			w.WriteHeader(http.StatusPartialContent)
			if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
				conn.Close()
			}
		},
		"200 of 0 bytes": func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusOK) },
		"416": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		},
		"206 of another size": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", "bytes 999-999/2000")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "x")
		},
		"200 of another size": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", "3")
			io.WriteString(w, "xyz")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := httptest.NewServer(h)
			defer s.Close()
			if err := dial(t, s).ProveBlob(t.Context(), "a", d); !errors.Is(err, ErrNotFound) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func TestOpenHollowBlob(t *testing.T) {
	t.Parallel()
	d := Descriptor{Digest: Digest([]byte("gone")), Size: 1000}
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "1000") // and not a byte of it
	}))
	defer s.Close()
	rc, err := dial(t, s).OpenBlob(t.Context(), "a", d, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if n, err := rc.Read(make([]byte, 10)); n != 0 || !errors.Is(err, ErrNotFound) {
		t.Fatalf("%d bytes, %v", n, err)
	}
}

// Cloud registries have upload sessions at paths of their own making.
func TestUploadSessionElsewhere(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Method {
		case http.MethodPost:
			w.Header().Set("Location", "/artifacts-uploads/1")
			w.WriteHeader(http.StatusAccepted)
		case http.MethodPatch:
			w.WriteHeader(http.StatusRequestedRangeNotSatisfiable)
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	defer s.Close()
	up, err := dial(t, s).StartUpload(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := up.Append(t.Context(), strings.NewReader("layer"), 5); !errors.Is(err, ErrOffset) {
		t.Fatalf("out of step: %v", err)
	}
	if err := up.Commit(t.Context(), Digest([]byte("layer")), nil); !errors.Is(err, ErrUploadLost) {
		t.Fatalf("a lost session: %v", err)
	}
}

func TestFailedReplacementCancelsItsUpload(t *testing.T) {
	t.Parallel()
	var cancelled atomic.Bool
	c, _ := serve(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			upload := strings.Contains(r.URL.Path, "/blobs/uploads/")
			switch {
			case upload && r.Method == http.MethodPut:
				w.WriteHeader(http.StatusServiceUnavailable)
				return
			case upload && r.Method == http.MethodDelete:
				cancelled.Store(true)
			}
			h.ServeHTTP(w, r)
		})
	})
	err := c.DeleteTagByReplacement(t.Context(), "a", "t", "w", func(string) error { t.Error("declared"); return nil })
	if !errors.Is(err, ErrUnavailable) || !cancelled.Load() {
		t.Fatalf("%v, cancelled: %v", err, cancelled.Load())
	}
}

func TestReferrersPages(t *testing.T) {
	t.Parallel()
	list := func(next string, subjects ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			var all []Descriptor
			for _, s := range subjects {
				all = append(all, Descriptor{MediaType: imageType, Digest: Digest([]byte(s)), Size: 1})
			}
			w.Header().Set("Content-Type", indexType)
			if next != "" {
				w.Header().Set("Link", fmt.Sprintf(`<%s?page=%s>; rel="next"`, r.URL.Path, next))
			}
			json.NewEncoder(w).Encode(map[string]any{"manifests": all})
		}
	}
	for name, tc := range map[string]struct {
		pages map[string]http.HandlerFunc
		want  int // below zero: an error
	}{
		"two":        {map[string]http.HandlerFunc{"": list("2", "a", "b"), "2": list("", "b", "c")}, 3},
		"empty page": {map[string]http.HandlerFunc{"": list("2"), "2": list("", "a")}, 1},
		"circle":     {map[string]http.HandlerFunc{"": list("2", "a"), "2": list("3", "b"), "3": list("2", "b")}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if requests.Add(1) > 50 {
					t.Error("the listing goes on for ever")
					w.WriteHeader(http.StatusTeapot)
					return
				}
				tc.pages[r.URL.Query().Get("page")](w, r)
			}))
			defer s.Close()
			got, found, err := dial(t, s).ReferrersByAPI(t.Context(), "a", Digest([]byte("subject")))
			if tc.want < 0 && !errors.Is(err, ErrInvalid) || tc.want >= 0 && (err != nil || !found || len(got) != tc.want) {
				t.Fatalf("%+v, %v, %v", got, found, err)
			}
		})
	}
}

func TestErrorKinds(t *testing.T) {
	t.Parallel()
	body := func(code, message string) string {
		return fmt.Sprintf(`{"errors":[{"code":%q,"message":%q,"detail":{"a":1}}]}`, code, message)
	}
	put := func(c *Client) error {
		return c.PutManifest(context.Background(), "a/b", "t", imageType, []byte("{}"), "")
	}
	get := func(c *Client) error { _, _, _, err := c.Manifest(context.Background(), "a/b", "t"); return err }
	del := func(c *Client) error {
		return c.DeleteManifest(context.Background(), "a/b", Digest([]byte("x")), "")
	}
	tag := func(c *Client) error { return c.DeleteTag(context.Background(), "a/b", "t", "") }
	catalog := func(c *Client) error { _, err := collect(c.Repositories(context.Background())); return err }
	for _, tc := range []struct {
		name   string
		call   func(*Client) error
		status int
		body   string
		want   error
		state  bool
	}{
		{"no manifest", get, 404, body("MANIFEST_UNKNOWN", "x"), ErrNotFound, false},
		{"blob missing", put, 400, body("MANIFEST_BLOB_UNKNOWN", "x"), ErrBlobUnknown, false},
		{"blob missing, and what follows from it", put, 400, `{"errors":[{"code":"DIGEST_INVALID"},{"code":"MANIFEST_BLOB_UNKNOWN","detail":"sha256:1"}]}`, ErrBlobUnknown, false},
		{"no manifest at all", put, 400, `{"errors":[{"code":"DIGEST_INVALID"},{"code":"MANIFEST_BLOB_UNKNOWN","detail":""}]}`, ErrInvalid, false},
		{"child missing", put, 404, body("MANIFEST_UNKNOWN", "x"), ErrBlobUnknown, false},
		{"bad manifest", put, 400, body("MANIFEST_INVALID", "x"), ErrInvalid, false},
		{"read-only", put, 405, "", ErrReadOnly, true},
		{"read-only delete", del, 405, "", ErrReadOnly, true},
		{"deletes off", del, 405, body("UNSUPPORTED", "x"), ErrUnsupported, false},
		{"tag deletes unknown", tag, 400, body("DIGEST_INVALID", "x"), ErrUnsupported, false},
		{"rate", get, 429, body("TOOMANYREQUESTS", "quota of requests"), ErrUnavailable, true},
		{"down", get, 503, "<html>", ErrUnavailable, true},
		{"disk", put, 507, "", ErrFull, true},
		{"a name with the word quota", get, 404, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"team/quota:1 not found","detail":{"name":"team/quota"}}]}`, ErrNotFound, false},
		{"a detail with the word quota", put, 400, `{"errors":[{"code":"MANIFEST_INVALID","message":"invalid","detail":{"name":"team/quota"}}]}`, ErrInvalid, false},
		{"quota", put, 403, body("DENIED", "adding 10 MiB exceeds quota"), ErrFull, true},
		{"denied", put, 403, body("DENIED", "no"), ErrUnauthorized, true},
		{"no credentials", get, 401, body("UNAUTHORIZED", "no"), ErrUnauthorized, true},
		{"no catalog", catalog, 404, "", ErrUnsupported, false},
		{"catalog off", catalog, 405, "", ErrUnsupported, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Retry-After", "7")
				w.WriteHeader(tc.status)
				io.WriteString(w, tc.body)
			}))
			defer s.Close()
			err := tc.call(dial(t, s))
			if !errors.Is(err, tc.want) || StateOfReplica(err) != tc.state {
				t.Fatalf("got %v (state %v)", err, StateOfReplica(err))
			}
			var e *Error
			if !errors.As(err, &e) || e.Status != tc.status || e.Path == "" || e.Method == "" {
				t.Fatalf("incomplete error %#v", e)
			}
			if after, rests := RetryAfter(err), tc.status == 429 || tc.status == 503; (after > 0) != rests || after > 7*time.Second {
				t.Fatalf("Retry-After %v", after)
			}
		})
	}
	t.Run("nobody there", func(t *testing.T) {
		t.Parallel()
		s := httptest.NewServer(http.NotFoundHandler())
		c := dial(t, s)
		if err := c.Ping(t.Context()); err == nil || !strings.Contains(err.Error(), "is not a registry") {
			t.Fatalf("ping of a web server: %v", err)
		}
		s.Close()
		if err := get(c); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("nobody answers the connection", func(t *testing.T) {
		t.Parallel()
		s := httptest.NewServer(http.NotFoundHandler())
		defer s.Close()
		// The error of a dialer that ran out of time matches context.DeadlineExceeded.
		c := dial(t, s, func(o *Options) { o.Limits.Dial = time.Nanosecond })
		if err := get(c); !errors.Is(err, ErrUnavailable) || !StateOfReplica(err) {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("a web page for a listing", func(t *testing.T) {
		t.Parallel()
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			io.WriteString(w, "<html>It works!</html>")
		}))
		defer s.Close()
		if err := catalog(dial(t, s)); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "not a registry's: want a JSON object, not text/html") {
			t.Fatalf("got %v", err)
		}
	})
	t.Run("cancelled is no state of the replica", func(t *testing.T) {
		t.Parallel()
		c, _ := serve(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := c.Head(ctx, "a", "b")
		if !errors.Is(err, context.Canceled) || StateOfReplica(err) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestWriteID(t *testing.T) {
	t.Parallel()
	for agent, want := range map[string]string{
		"portolan/1.2 (write abc-1)":          "abc-1",
		"portolan/dev (write a.b:c_d)":        "a.b:c_d",
		"portolan/1.2":                        "",
		"curl/8 (write abc)":                  "",
		"portolan/1 (write )":                 "",
		"portolan/1 (write a b)":              "",
		"portolan/1 (write abc":               "",
		userAgent("portolan/9", "01HX-3"):     "01HX-3",
		userAgent("portolan/9", "bad\r\nid)"): "",
	} {
		if got := WriteID(agent); got != want {
			t.Errorf("WriteID(%q) = %q, want %q", agent, got, want)
		}
	}
	var mu sync.Mutex
	seen := map[string]string{}
	c, _ := serve(t, func(h http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			mu.Lock()
			seen[r.Method+" "+r.URL.Path] = WriteID(r.UserAgent())
			mu.Unlock()
			h.ServeHTTP(w, r)
		})
	}, func(o *Options) { o.UserAgent = "portolan/7" })
	pushImage(t, c, "a", "t", nil)
	if seen["PUT /v2/a/manifests/t"] != "w1" {
		t.Fatalf("the write id did not ride along: %v", seen)
	}
}

func TestDigests(t *testing.T) {
	t.Parallel()
	sum := sha512.Sum512([]byte("x"))
	d512 := "sha512:" + hex.EncodeToString(sum[:])
	if err := verify([]byte("x"), d512); err != nil {
		t.Fatal(err)
	}
	if err := verify([]byte("y"), d512); !errors.Is(err, ErrCorrupt) {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "sha256", "sha256:", "md5:00", "sha256:" + strings.Repeat("G", 64), "sha256:" + strings.Repeat("a", 63), "../x"} {
		if _, err := NewHash(bad); !errors.Is(err, ErrInvalid) {
			t.Errorf("NewHash(%q): %v", bad, err)
		}
	}
}

// A HEAD that meets a fault of the registry is told with the registry's own words, for which it is asked once by a GET.
func TestHeadIsExplained(t *testing.T) {
	t.Parallel()
	const words = `{"errors":[{"code":"UNKNOWN","message":"unknown error","detail":"link file is empty"}]}`
	for name, c := range map[string]struct {
		head, get int
		says      string
		want      string // in the error
		asked     string
	}{
		"a fault":            {500, 500, words, "HEAD /v2/app/manifests/1: registry is unavailable (status 500): UNKNOWN: unknown error \"link file is empty\"", "HEAD GET"},
		"a fault, no words":  {500, 500, "<html>", "(status 500)", "HEAD GET"},
		"the GET succeeds":   {500, 200, words, "(status 500)", "HEAD GET"},
		"the GET is missing": {500, 404, words, "(status 500)", "HEAD GET"},
		"away":               {503, 503, words, "(status 503)", "HEAD"},
		"nothing":            {404, 404, words, "(status 404)", "HEAD"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked []string
			client, _ := serve(t, func(http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					asked = append(asked, r.Method)
					status := c.head
					if r.Method == http.MethodGet {
						status = c.get
					}
					w.WriteHeader(status)
					io.WriteString(w, c.says)
				})
			})
			_, err := client.Head(t.Context(), "app", "1")
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "UNKNOWN") != strings.Contains(c.want, "UNKNOWN") {
				t.Errorf("%v, want %s", err, c.want)
			}
			if got := strings.Join(asked, " "); got != c.asked {
				t.Errorf("asked %s, want %s", got, c.asked)
			}
		})
	}
}

// Whoever asks a server for plain HTTP that speaks TLS is told what to write.
func TestPingHintsAtTLS(t *testing.T) {
	t.Parallel()
	s := httptest.NewTLSServer(http.NotFoundHandler())
	t.Cleanup(s.Close)
	c, err := New(Options{Endpoint: &url.URL{Scheme: "http", Host: s.Listener.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	if err := c.Ping(t.Context()); !errors.Is(err, ErrNotRegistry) || !strings.Contains(err.Error(), "https://") {
		t.Errorf("%v", err)
	}
}
