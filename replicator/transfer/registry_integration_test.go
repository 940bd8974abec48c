package transfer

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"portolan/replicator/distribution"
	"portolan/test/bed"
)

func servers(t *testing.T, f func(t *testing.T, server bed.Distribution)) {
	for name, server := range map[string]bed.Distribution{"distribution 3": bed.DistributionV3, "distribution 2.8": bed.DistributionV2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f(t, server)
		})
	}
}

// meter tells how many bytes of bodies have been read through it, all in all.
type meter struct {
	http.RoundTripper
	read atomic.Int64
	tell func(read int64)
}

func (m *meter) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := m.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = &meteredBody{resp.Body, m}
	}
	return resp, err
}

type meteredBody struct {
	io.ReadCloser
	meter *meter
}

func (b *meteredBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.meter.tell(b.meter.read.Add(int64(n)))
	return n, err
}

// dialMetered makes a client of which tell hears after every read how many bytes came by it, from several goroutines.
func dialMetered(t testing.TB, address string, tell func(read int64)) *distribution.Client {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	t.Cleanup(transport.CloseIdleConnections)
	c, err := distribution.New(distribution.Options{Endpoint: u, Transport: &meter{RoundTripper: transport, tell: tell}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestRealCopy(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		a := dial(t, bed.NewRegistry(t, bed.RegistryConfig{}).URL())
		b := dial(t, bed.NewRegistry(t, bed.RegistryConfig{Server: server}).URL())
		base := random(1, 4<<20)
		one, two := pushImage(t, a, "team/app", base, random(2, 3000)), pushImage(t, a, "team/app", base, random(3, 2<<20))
		index := push(t, a, "team/app", indexType, map[string]any{"manifests": []any{one, two}})
		other := pushImage(t, a, "team/other", base, random(4, 3000))
		target := NewTarget(b, Limits{}, nil)
		sources := []Source{{Name: "a", Client: a}}
		if _, err := target.Copy(t.Context(), Request{Repository: "team/app", Manifest: index, Sources: sources}); err != nil {
			t.Fatal(err)
		}
		whole(t, b, "team/app", index.Digest)
		s, err := target.Copy(t.Context(), Request{Repository: "team/other", Manifest: other, Sources: sources})
		if err != nil || s.Mounted != 1 || s.Sent > 4000 {
			t.Fatalf("the base layer was not mounted: %+v, %v", s, err)
		}
		whole(t, b, "team/other", other.Digest)
	})
}

// Both ends are cut again and again in the middle of a blob. No connection lives long enough for all of it: that version 3 gets
// there shows that uploads are resumed. How much is read again depends on what the buffers on the way held when they were cut.
func TestRealCopyOverBrokenLinks(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ra, rb := bed.NewRegistry(t, bed.RegistryConfig{}), bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		pa, pb := bed.NewProxy(t, ra.Addr()), bed.NewProxy(t, rb.Addr())
		img := pushImage(t, dial(t, ra.URL()), "a", random(1, 24<<20))
		var once atomic.Bool
		a, b := dialMetered(t, "http://"+pa.Addr(), func(read int64) {
			// 2.8 has to begin anew after each cut, and would never be done with this one.
			if server == bed.DistributionV2 && read > 20<<20 && once.CompareAndSwap(false, true) {
				if err := pb.Set(bed.Conditions{}); err != nil {
					t.Error(err)
				}
			}
		}), dial(t, "http://"+pb.Addr())
		if err := pa.Set(bed.Conditions{CutDown: 5 << 20}); err != nil {
			t.Fatal(err)
		}
		if err := pb.Set(bed.Conditions{CutUp: 9 << 20}); err != nil {
			t.Fatal(err)
		}
		s, err := NewTarget(b, Limits{}, nil).Copy(t.Context(), Request{Repository: "a", Manifest: img, Sources: []Source{{Name: "a", Client: a}}})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%+v", s)
		whole(t, dial(t, rb.URL()), "a", img.Digest)
	})
}

// What was mounted, or was there, may be hollow after a garbage collection: it is sent then.
func TestRealCopyAfterGarbageCollection(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		a := dial(t, bed.NewRegistry(t, bed.RegistryConfig{}).URL())
		rb := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Cache: true})
		b := dial(t, rb.URL())
		base := random(1, 40_000)
		one, two := pushImage(t, a, "one", base), pushImage(t, a, "two", base, random(2, 100))
		target := NewTarget(b, Limits{}, nil)
		sources := []Source{{Name: "a", Client: a}}
		if _, err := target.Copy(ctx, Request{Repository: "one", Manifest: one, Sources: sources}); err != nil {
			t.Fatal(err)
		}
		if err := b.DeleteManifest(ctx, "one", one.Digest, ""); err != nil {
			t.Fatal(err)
		}
		if out, err := rb.GarbageCollect(ctx, false); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for repository, d := range map[string]distribution.Descriptor{"two": two, "one": one} {
			if _, err := target.Copy(ctx, Request{Repository: repository, Manifest: d, Sources: sources}); err != nil {
				t.Fatal(err)
			}
			// Seen by a fresh process, without cache.
			if err := rb.Restart(ctx); err != nil {
				t.Fatal(err)
			}
			whole(t, b, repository, d.Digest)
		}
	})
}

// A registry that is killed amid a write leaves the links empty that it was writing, and answers 500 to whatever leads there. They are
// written again, and nothing is sent that was whole.
func TestRealCopyMendsEmptyLinks(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		a := dial(t, bed.NewRegistry(t, bed.RegistryConfig{}).URL())
		rb := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		b := dial(t, rb.URL())
		base, top := random(1, 50_000), random(2, 3000)
		one, two := pushImage(t, a, "one", base, top), pushImage(t, a, "two", base)
		index := push(t, a, "one", indexType, map[string]any{"manifests": []any{one}})
		sources := []Source{{Name: "a", Client: a}}
		if _, err := NewTarget(b, Limits{}, nil).Copy(t.Context(), Request{Repository: "one", Manifest: index, Sources: sources}); err != nil {
			t.Fatal(err)
		}
		empty := func(kind, digest string) {
			t.Helper()
			link := filepath.Join(rb.Storage(), "docker/registry/v2/repositories/one", kind, "sha256", strings.TrimPrefix(digest, "sha256:"), "link")
			if err := os.Truncate(link, 0); err != nil {
				t.Fatal(err)
			}
		}
		empty("_manifests/revisions", one.Digest)
		empty("_manifests/revisions", index.Digest)
		empty("_layers", distribution.Digest(base))
		if _, _, _, err := b.Manifest(t.Context(), "one", index.Digest); !distribution.Faulty(err) {
			t.Fatalf("an empty link is answered with %v", err)
		}
		target := NewTarget(b, Limits{Attempts: 1}, nil)
		target.hints.add(distribution.Digest(base), "one") // from where it cannot be mounted
		if _, err := target.Copy(t.Context(), Request{Repository: "two", Manifest: two, Sources: sources}); err != nil {
			t.Fatal(err)
		}
		whole(t, b, "two", two.Digest)
		empty("_layers", distribution.Digest(top))
		s, err := NewTarget(b, Limits{Attempts: 1}, nil).Copy(t.Context(), Request{Repository: "one", Manifest: index, Sources: sources})
		if err != nil {
			t.Fatal(err)
		}
		whole(t, b, "one", index.Digest)
		if s.Manifests != 2 || s.Uploaded != 2 || s.Present != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestRealReadOnlyTarget(t *testing.T) {
	t.Parallel()
	a := dial(t, bed.NewRegistry(t, bed.RegistryConfig{}).URL())
	b := dial(t, bed.NewRegistry(t, bed.RegistryConfig{ReadOnly: true}).URL())
	img := pushImage(t, a, "a", random(1, 100))
	if _, err := NewTarget(b, Limits{}, nil).Copy(t.Context(), Request{Repository: "a", Manifest: img, Sources: []Source{{Name: "a", Client: a}}}); !errors.Is(err, distribution.ErrReadOnly) {
		t.Fatalf("got %v", err)
	}
}

// The memory of a copy does not depend on the size of its blobs. Not parallel: it measures the heap of the process.
func TestRealMemory(t *testing.T) {
	const size = 256 << 20
	ra, rb := bed.NewRegistry(t, bed.RegistryConfig{}), bed.NewRegistry(t, bed.RegistryConfig{})
	a, b := dial(t, ra.URL()), dial(t, rb.URL())
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	// Pseudo-random bytes, made twice rather than held: once for the digest, once for the upload.
	stream := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{9}), size) }
	h, err := distribution.NewHash(distribution.Digest(nil))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(h, stream()); err != nil {
		t.Fatal(err)
	}
	layer := distribution.Descriptor{MediaType: "application/vnd.oci.image.layer.v1.tar", Digest: distribution.DigestOf(h), Size: size}
	up, err := a.StartUpload(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	if err := up.Append(ctx, stream(), size); err != nil {
		t.Fatal(err)
	}
	if err := up.Commit(ctx, layer.Digest, nil); err != nil {
		t.Fatal(err)
	}
	img := push(t, a, "a", imageType, map[string]any{"config": pushBlob(t, a, "a", []byte("{}")), "layers": []any{layer}})

	var mu sync.Mutex
	var before, after runtime.MemStats
	var peak uint64
	var last, samples int64
	source := dialMetered(t, ra.URL(), func(read int64) {
		mu.Lock()
		defer mu.Unlock()
		if read-last < 8<<20 {
			return
		}
		last, samples = read, samples+1
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc)
	})
	runtime.GC()
	runtime.ReadMemStats(&before)
	s, err := NewTarget(b, Limits{}, nil).Copy(ctx, Request{Repository: "a", Manifest: img, Sources: []Source{{Name: "a", Client: source}}})
	if err != nil || s.Sent < size || samples < size>>23-1 {
		t.Fatalf("%+v, %v, %d samples", s, err, samples)
	}
	runtime.ReadMemStats(&after)
	t.Logf("heap %d KiB before, %d KiB at most, %d KiB allocated in all", before.HeapAlloc>>10, peak>>10, (after.TotalAlloc-before.TotalAlloc)>>10)
	if grown := int64(peak) - int64(before.HeapAlloc); grown > 16<<20 {
		t.Fatalf("the heap grew by %d bytes", grown)
	}
	if err := b.ProveBlob(ctx, "a", layer); err != nil {
		t.Fatal(err)
	}
}

// The target goes away in the middle of a blob, and hears no farewell. The next copy, of another process, goes on where version 3
// stands; 2.8 has lost the upload, and gets it anew.
func TestRealCopyGoesOn(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		const size = 64 << 20
		ra, rb := bed.NewRegistry(t, bed.RegistryConfig{}), bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		link := bed.NewProxy(t, rb.Addr())
		a, b := dial(t, ra.URL()), dial(t, "http://"+link.Addr())
		img := pushImage(t, a, "a", random(1, size))
		path := filepath.Join(t.TempDir(), "uploads.json")
		run := func(limits Limits, source *distribution.Client) (Stats, error) {
			j, err := OpenJournal(path)
			if err != nil {
				t.Fatal(err)
			}
			target := NewTarget(b, limits, nil)
			target.Remember(j, "b")
			return target.Copy(t.Context(), Request{Repository: "a", Manifest: img, Sources: []Source{{Name: "a", Client: source}}})
		}
		var once atomic.Bool
		cut, err := run(Limits{Attempts: 1}, dialMetered(t, ra.URL(), func(read int64) {
			if read > size*3/4 && once.CompareAndSwap(false, true) {
				if err := link.Set(bed.Conditions{Refuse: true}); err != nil {
					t.Error(err)
				}
			}
		}))
		if err == nil {
			t.Fatal("it was not cut off")
		}
		if err := link.Set(bed.Conditions{}); err != nil {
			t.Fatal(err)
		}
		// The registry may still be busy with what came before the cut, so that the upload moves on for a moment.
		next, err := run(Limits{}, a)
		if err != nil {
			t.Fatal(err)
		}
		whole(t, b, "a", img.Digest)
		t.Logf("%d bytes were read before the cut, %d after it, of %d", cut.Read, next.Read, size)
		// How much had been read and had not arrived depends on what the buffers on the way held.
		if server == bed.DistributionV3 && next.Read > size*3/4 {
			t.Errorf("%d bytes were read again of a blob of %d", next.Read, size)
		}
		if left, err := os.ReadFile(path); err != nil || string(left) != "[]" {
			t.Errorf("the journal has %s, %v", left, err)
		}
	})
}
