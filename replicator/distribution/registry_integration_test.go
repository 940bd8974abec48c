package distribution

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

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

func connect(t *testing.T, address string, change ...func(*Options)) *Client {
	t.Helper()
	u, err := url.Parse(address)
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

func bytesOf(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestRealRegistry(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		c := connect(t, r.URL(), func(o *Options) { o.Prefix = "mirror" })
		if err := c.Ping(ctx); err != nil {
			t.Fatal(err)
		}
		img := pushImage(t, c, "team/app", "1.0", nil, bytesOf(100_000))
		pushImage(t, c, "team/app", "latest", nil, bytesOf(100_000))
		other := pushImage(t, c, "other", "1", nil, []byte("x"))
		if got, err := c.Head(ctx, "team/app", "1.0"); err != nil || got.Digest != img.Digest || got.Size != img.Size || got.MediaType != imageType {
			t.Fatalf("Head = %+v, %v", got, err)
		}
		repos, err := collect(c.Repositories(ctx))
		if err != nil || !slices.Equal(repos, []string{"other", "team/app"}) {
			t.Fatalf("Repositories = %v, %v", repos, err)
		}
		if all, err := collect(connect(t, r.URL()).Repositories(ctx)); err != nil || !slices.Equal(all, []string{"mirror/other", "mirror/team/app"}) {
			t.Fatalf("without the prefix: %v, %v", all, err)
		}
		if _, err := collect(c.Tags(ctx, "none")); !errors.Is(err, ErrNotFound) {
			t.Fatalf("tags of no repository: %v", err)
		}

		// Referrers: neither server has the API.
		if refs, found, err := c.ReferrersByAPI(ctx, "other", other.Digest); err != nil || found || len(refs) != 0 {
			t.Fatalf("ReferrersByAPI = %+v, %t, %v", refs, found, err)
		}

		// A manifest whose blob is missing, and one that will never be taken.
		missing := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"a/b","digest":%q,"size":3},"layers":[]}`, imageType, Digest([]byte("nil")))
		if err := c.PutManifest(ctx, "other", "bad", imageType, missing, ""); !errors.Is(err, ErrBlobUnknown) {
			t.Fatalf("a missing blob: %v", err)
		}
		if err := c.PutManifest(ctx, "other", "bad", imageType, []byte(`{"schemaVersion":2}`), ""); !errors.Is(err, ErrInvalid) {
			t.Fatalf("no manifest: %v", err)
		}
		offset, within, known := c.ClockOffset()
		if !known || offset.Abs() > within+50*time.Millisecond {
			t.Fatalf("the clock of this very machine is off by %v +- %v (%v)", offset, within, known)
		}

		// Mounts.
		layer := Descriptor{Digest: Digest(bytesOf(100_000)), Size: 100_000}
		if mounted, _, err := c.Mount(ctx, "third", layer.Digest, "team/app"); err != nil || !mounted {
			t.Fatalf("mount: %v, %v", mounted, err)
		}
		if err := c.ProveBlob(ctx, "third", layer); err != nil {
			t.Fatal(err)
		}
		mounted, up, err := c.Mount(ctx, "third", Digest([]byte("new")), "team/app")
		if err != nil || mounted || up == nil {
			t.Fatalf("mount of nothing: %v, %v, %v", mounted, up, err)
		}
		if err := up.Commit(ctx, Digest([]byte("new")), []byte("new")); err != nil {
			t.Fatal(err)
		}
		up, err = c.StartUpload(ctx, "third")
		if err != nil {
			t.Fatal(err)
		}
		if err := up.Append(ctx, bytes.NewReader(bytesOf(10)), 10); err != nil {
			t.Fatal(err)
		}
		if err := up.Cancel(ctx); err != nil {
			t.Fatal(err)
		}
		if err := up.Sync(ctx); !errors.Is(err, ErrUploadLost) {
			t.Fatalf("after Cancel: %v", err)
		}
	})
}

func TestRealDeletes(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		c := connect(t, r.URL())
		img := pushImage(t, c, "a", "1", nil, []byte("layer"))
		pushImage(t, c, "a", "2", nil, []byte("layer"))
		pushImage(t, c, "a", "3", nil, []byte("layer"))
		err := c.DeleteTag(ctx, "a", "1", "w")
		if server == bed.DistributionV2 {
			if !errors.Is(err, ErrUnsupported) {
				t.Fatalf("2.8 deletes a tag alone? %v", err)
			}
			if got, err := c.Head(ctx, "a", "1"); err != nil || got.Digest != img.Digest {
				t.Fatalf("the refused delete did harm: %v, %v", got, err)
			}
		} else if err != nil {
			t.Fatal(err)
		}
		declared := ""
		err = c.DeleteTagByReplacement(ctx, "a", "2", "w", func(digest string) error {
			if got, err := c.Head(ctx, "a", "2"); err != nil || got.Digest != img.Digest {
				t.Errorf("written before it was declared: %v, %v", got, err)
			}
			declared = digest
			return nil
		})
		if err != nil || declared == "" {
			t.Fatalf("declared %q, %v", declared, err)
		}
		if _, err := c.Head(ctx, "a", declared); !errors.Is(err, ErrNotFound) {
			t.Fatalf("the throw-away manifest stayed: %v", err)
		}
		refused := errors.New("no intent")
		if err := c.DeleteTagByReplacement(ctx, "a", "3", "w", func(string) error { return refused }); !errors.Is(err, refused) {
			t.Fatal(err)
		}
		if _, err := c.Head(ctx, "a", "2"); !errors.Is(err, ErrNotFound) {
			t.Fatalf("the tag is still there: %v", err)
		}
		if got, err := c.Head(ctx, "a", "3"); err != nil || got.Digest != img.Digest {
			t.Fatalf("the sibling tag suffered: %v, %v", got, err)
		}
		if err := c.DeleteManifest(ctx, "a", img.Digest, ""); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Head(ctx, "a", "3"); !errors.Is(err, ErrNotFound) {
			t.Fatalf("deleted, but %v", err)
		}

		off := bed.NewRegistry(t, bed.RegistryConfig{Server: server, NoDelete: true})
		c = connect(t, off.URL())
		img = pushImage(t, c, "a", "1", nil, []byte("layer"))
		for name, err := range map[string]error{
			"manifest":    c.DeleteManifest(ctx, "a", img.Digest, ""),
			"tag":         c.DeleteTag(ctx, "a", "1", ""),
			"replacement": c.DeleteTagByReplacement(ctx, "a", "1", "w", func(string) error { return nil }),
		} {
			if !errors.Is(err, ErrUnsupported) {
				t.Errorf("%s where deletes are off: %v", name, err)
			}
		}
		if got, err := c.Head(ctx, "a", "1"); err != nil || got.Digest != img.Digest {
			t.Fatalf("the tag was replaced though it cannot be deleted: %v, %v", got, err)
		}

		if err := off.Reconfigure(ctx, func(rc *bed.RegistryConfig) { rc.ReadOnly = true }); err != nil {
			t.Fatal(err)
		}
		if _, err := c.StartUpload(ctx, "a"); !errors.Is(err, ErrReadOnly) {
			t.Fatalf("a read-only registry: %v", err)
		}
	})
}

func TestRealUsers(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Users: map[string]string{"robot": "pass:word"}})
		if err := connect(t, r.URL()).Ping(ctx); !errors.Is(err, ErrUnauthorized) {
			t.Fatalf("without credentials: %v", err)
		}
		file := t.TempDir() + "/secret"
		write(t, file, "robot:wrong\n")
		c := connect(t, r.URL(), func(o *Options) { o.Credentials = "file:" + file })
		if err := c.Ping(ctx); !errors.Is(err, ErrUnauthorized) {
			t.Fatalf("with wrong credentials: %v", err)
		}
		// A changed secret is found after a 401, not after a restart.
		write(t, file, "robot:pass:word\n")
		if err := c.Ping(ctx); err != nil {
			t.Fatal(err)
		}
		pushImage(t, c, "a", "t", nil, []byte("layer"))
	})
}

func TestRealPages(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		c := connect(t, bed.NewRegistry(t, bed.RegistryConfig{Server: server}).URL(), func(o *Options) { o.Limits.Page = 50 })
		img := pushImage(t, c, "a", "t0", nil, []byte("layer"))
		body, media, _, err := c.Manifest(ctx, "a", img.Digest)
		if err != nil {
			t.Fatal(err)
		}
		want := []string{"t0"}
		for i := 1; i < 123; i++ {
			tag := fmt.Sprintf("t%d", i)
			want = append(want, tag)
			if err := c.PutManifest(ctx, "a", tag, media, body, ""); err != nil {
				t.Fatal(err)
			}
		}
		got, err := collect(c.Tags(ctx, "a"))
		slices.Sort(got)
		slices.Sort(want)
		if err != nil || !slices.Equal(got, want) {
			t.Fatalf("%d tags, want %d, %v", len(got), len(want), err)
		}
	})
}

// An upload cut inside a request: version 3 resumes to the byte, 2.8 has lost it.
func TestRealUploadCut(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		proxy := bed.NewProxy(t, r.Addr())
		c := connect(t, "http://"+proxy.Addr())
		content := bytesOf(8 << 20)
		up, err := c.StartUpload(ctx, "a")
		if err != nil {
			t.Fatal(err)
		}
		if err := up.Append(ctx, bytes.NewReader(content), 1<<20); err != nil {
			t.Fatal(err)
		}
		c.Close()
		proxy.Set(bed.Conditions{CutUp: 3 << 20})
		if err := up.Append(ctx, bytes.NewReader(content[1<<20:]), 7<<20); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("cut: %v", err)
		}
		proxy.Set(bed.Conditions{})
		if server == bed.DistributionV2 {
			if err := up.Sync(ctx); err == nil {
				err = up.Append(ctx, bytes.NewReader(content[up.Offset():]), int64(len(content))-up.Offset())
				if !errors.Is(err, ErrUploadLost) && !errors.Is(err, ErrOffset) && !errors.Is(err, ErrUnavailable) {
					t.Fatalf("2.8 went on after a cut: %v", err)
				}
			} else if !errors.Is(err, ErrUploadLost) {
				t.Fatalf("2.8 after a cut: %v", err)
			}
			return
		}
		// The server may still be busy with what it got.
		err = bed.Until(ctx, 20*time.Second, func(ctx context.Context) error {
			last := up.Offset()
			if err := up.Sync(ctx); err != nil {
				return err
			}
			if up.Offset() <= 1<<20 || up.Offset() != last {
				return fmt.Errorf("offset %d after %d", up.Offset(), last)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		at := up.Offset()
		if at >= 8<<20 {
			t.Fatalf("nothing was cut: offset %d", at)
		}
		again, err := c.ResumeUpload("a", up.Location())
		if err != nil {
			t.Fatal(err)
		}
		if err := again.Sync(ctx); err != nil || again.Offset() != at {
			t.Fatalf("%v, offset %d, want %d", err, again.Offset(), at)
		}
		if err := again.Append(ctx, bytes.NewReader(content[at:]), int64(len(content))-at); err != nil {
			t.Fatal(err)
		}
		d := Descriptor{Digest: Digest(content), Size: int64(len(content))}
		if err := again.Commit(ctx, d.Digest, nil); err != nil {
			t.Fatal(err)
		}
		rc, err := c.OpenBlob(ctx, "a", d, 5<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer rc.Close()
		if got, err := io.ReadAll(rc); err != nil || !bytes.Equal(got, content[5<<20:]) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	})
}

// An upload is given up in the middle of a request: version 3 cancels it, and 2.8 has lost it.
func TestRealUploadGivenUp(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		c := connect(t, r.URL())
		up, err := c.StartUpload(t.Context(), "a")
		if err != nil {
			t.Fatal(err)
		}
		ctx, giveUp := context.WithCancel(t.Context())
		sent := io.MultiReader(bytes.NewReader(bytesOf(3<<20)), readerFunc(func([]byte) (int, error) {
			defer giveUp()
			// Not before some of it is stored: until then the session stands where it began, and 2.8 has lost nothing.
			if err := bed.Until(t.Context(), time.Minute, func(context.Context) error { return storesUpload(r, "a") }); err != nil {
				t.Error(err)
			}
			return 0, context.Canceled
		}))
		if err := up.Append(ctx, sent, 4<<20); err == nil {
			t.Fatal("it was not cut off")
		}
		err = up.Cancel(ctx)
		if server == bed.DistributionV3 && err != nil || server == bed.DistributionV2 && !errors.Is(err, ErrUploadLost) {
			t.Errorf("it was cancelled with %v", err)
		}
		if err := up.Sync(t.Context()); !errors.Is(err, ErrUploadLost) {
			t.Errorf("it stands still: %v", err)
		}
	})
}

// storesUpload is an error until a registry has stored something of an upload into a repository.
func storesUpload(r *bed.Registry, repository string) error {
	files, err := filepath.Glob(filepath.Join(r.Storage(), "docker/registry/v2/repositories", repository, "_uploads/*/data"))
	for _, file := range files {
		if info, err := os.Stat(file); err == nil && info.Size() > 0 {
			return nil
		}
	}
	return cmp.Or(err, errors.New("nothing of the upload is stored"))
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// After a garbage collection with the descriptor cache on, a registry says that it has what it has not: only reading a byte tells.
func TestRealHollowBlob(t *testing.T) {
	t.Parallel()
	servers(t, func(t *testing.T, server bed.Distribution) {
		ctx := t.Context()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Cache: true})
		c := connect(t, r.URL())
		layer := bytesOf(50_000)
		img := pushImage(t, c, "a", "1", nil, layer)
		d := Descriptor{Digest: Digest(layer), Size: int64(len(layer))}
		if err := c.ProveBlob(ctx, "a", d); err != nil {
			t.Fatal(err)
		}
		if err := c.DeleteManifest(ctx, "a", img.Digest, ""); err != nil {
			t.Fatal(err)
		}
		if out, err := r.GarbageCollect(ctx, false); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if _, err := c.HasBlob(ctx, "a", d.Digest); err != nil {
			t.Logf("this server does not lie (HEAD: %v)", err)
		}
		if err := c.ProveBlob(ctx, "a", d); !errors.Is(err, ErrNotFound) {
			t.Fatalf("proved what is not there: %v", err)
		}
	})
}
