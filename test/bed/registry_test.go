package bed_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"portolan/test/bed"
)

// both runs a test against both generations of the server.
func both(t *testing.T, test func(*testing.T, bed.Distribution)) {
	for _, server := range []bed.Distribution{bed.DistributionV2, bed.DistributionV3} {
		t.Run(string(server), func(t *testing.T) {
			t.Parallel()
			test(t, server)
		})
	}
}

func ref(t *testing.T, r *bed.Registry, repository string) name.Reference {
	t.Helper()
	ref, err := name.ParseReference(r.Addr()+"/"+repository, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	return ref
}

func push(t *testing.T, ref name.Reference, options ...remote.Option) v1.Hash {
	t.Helper()
	image, err := random.Image(2048, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, append(options, remote.WithContext(t.Context()))...); err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return digest
}

// pull reads the image with all its bytes and returns its digest.
func pull(ctx context.Context, ref name.Reference, options ...remote.Option) (v1.Hash, error) {
	image, err := remote.Image(ref, append(options, remote.WithContext(ctx))...)
	if err != nil {
		return v1.Hash{}, err
	}
	layers, err := image.Layers()
	if err != nil {
		return v1.Hash{}, err
	}
	for _, layer := range layers {
		body, err := layer.Compressed()
		if err != nil {
			return v1.Hash{}, err
		}
		_, err = io.Copy(io.Discard, body)
		if err := body.Close(); err != nil {
			return v1.Hash{}, err
		}
		if err != nil {
			return v1.Hash{}, err
		}
	}
	return image.Digest()
}

func TestRegistryKeepsItsContent(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
		image := ref(t, r, "team/app:1")
		want := push(t, image)

		check := func(after string) {
			t.Helper()
			got, err := pull(t.Context(), image)
			if err != nil || got != want {
				t.Fatalf("after %s: pulled %v, %v, want %v", after, got, err, want)
			}
		}
		check("the push")
		before, first := r.Addr(), r.PID()
		r.Kill()
		if r.Running() {
			t.Fatal("it runs after Kill")
		}
		if _, err := pull(t.Context(), image); err == nil {
			t.Fatal("something answers after Kill")
		}
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		check("kill and start")
		if err := r.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		check("restart")
		if r.Addr() != before || r.PID() == first {
			t.Fatalf("address %s then %s, process %d then %d", before, r.Addr(), first, r.PID())
		}
		if !strings.Contains(r.LogTail(), "listening on") && !strings.Contains(r.LogTail(), "GET") {
			t.Errorf("the log holds nothing of the server: %s", r.LogTail())
		}
	})
}

func TestRegistryModes(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, NoDelete: true})
		image := ref(t, r, "app:1")
		digest := push(t, image)
		manifest := image.Context().Digest(digest.String())
		if err := remote.Delete(manifest); !hasStatus(err, 405) {
			t.Errorf("with deletes off, a delete gives %v, want 405", err)
		}
		if err := r.Reconfigure(t.Context(), func(c *bed.RegistryConfig) { c.ReadOnly = true }); err != nil {
			t.Fatal(err)
		}
		blank, err := random.Image(64, 1)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref(t, r, "app:2"), blank); !hasStatus(err, 405) {
			t.Errorf("read-only, a push gives %v, want 405", err)
		}
		if err := r.Reconfigure(t.Context(), func(c *bed.RegistryConfig) { c.ReadOnly, c.NoDelete = false, false }); err != nil {
			t.Fatal(err)
		}
		if err := remote.Delete(manifest); err != nil {
			t.Errorf("with deletes on: %v", err)
		}
	})
}

func hasStatus(err error, status int) bool {
	return err != nil && (strings.Contains(err.Error(), fmt.Sprint(status)) || strings.Contains(err.Error(), "UNSUPPORTED"))
}

func TestRegistryGarbageCollects(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Cache: true})
		gone, kept := ref(t, r, "gone:1"), ref(t, r, "kept:1")
		digest := push(t, gone)
		push(t, kept)
		image, err := remote.Image(gone)
		if err != nil {
			t.Fatal(err)
		}
		layers, err := image.Layers()
		if err != nil {
			t.Fatal(err)
		}
		layer, err := layers[0].Digest()
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Delete(gone.Context().Digest(digest.String())); err != nil {
			t.Fatal(err)
		}
		out, err := r.GarbageCollect(t.Context(), false)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out, layer.Hex) {
			t.Errorf("the collector does not speak of layer %s:\n%s", layer, out)
		}
		blob := filepath.Join(r.Storage(), "docker/registry/v2/blobs/sha256", layer.Hex[:2], layer.Hex, "data")
		if _, err := os.Stat(blob); !os.IsNotExist(err) {
			t.Errorf("the layer's file is still there: %v", err)
		}
		if _, err := pull(t.Context(), kept); err != nil {
			t.Errorf("the image that is still named: %v", err)
		}
	})
}

func TestRegistryNotifies(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, server bed.Distribution) {
		type event struct{ Action, auth, repository, tag string }
		events := make(chan event, 64)
		listener := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
			var envelope struct {
				Events []struct {
					Action string
					Target struct{ Repository, Tag string }
				}
			}
			if err := json.NewDecoder(io.LimitReader(request.Body, 1<<20)).Decode(&envelope); err != nil {
				t.Error(err)
			}
			for _, e := range envelope.Events {
				events <- event{e.Action, request.Header.Get("Authorization"), e.Target.Repository, e.Target.Tag}
			}
		}))
		defer listener.Close()
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Notify: []bed.Notification{{
			URL: listener.URL, Token: "sesame", Timeout: 2 * time.Second, Threshold: 3, Backoff: 100 * time.Millisecond,
		}}})
		image := ref(t, r, "team/app:1")
		push(t, image)
		if _, err := pull(t.Context(), image); err != nil {
			t.Fatal(err)
		}
		push(t, ref(t, r, "team/app:2"))
		// The queue is in order of arrival here, so the pull would stand before the second tag.
		for {
			select {
			case e := <-events:
				if e.auth != "Bearer sesame" {
					t.Fatalf("the event came with Authorization %q", e.auth)
				}
				if e.Action != "push" || e.tag == "" {
					t.Fatalf("it told of %+v, which is to be ignored", e)
				}
				if e == (event{"push", "Bearer sesame", "team/app", "2"}) {
					return
				}
			case <-time.After(30 * time.Second):
				t.Fatal("the push of the second tag was not told of")
			}
		}
	})
}

func TestRegistryAuthenticates(t *testing.T) {
	t.Parallel()
	both(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Users: map[string]string{"ann": "secret"}})
		image := ref(t, r, "app:1")
		push(t, image, remote.WithAuth(&authn.Basic{Username: "ann", Password: "secret"}))
		if _, err := pull(t.Context(), image); !hasStatus(err, 401) && !strings.Contains(fmt.Sprint(err), "UNAUTHORIZED") {
			t.Errorf("without credentials: %v, want 401", err)
		}
	})
}

func TestRegistryServesTLS(t *testing.T) {
	t.Parallel()
	ca, err := bed.NewAuthority(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("registry.example.test", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	both(t, func(t *testing.T, server bed.Distribution) {
		r := bed.NewRegistry(t, bed.RegistryConfig{Server: server, Cert: cert, Key: key, CA: ca.File()})
		if !strings.HasPrefix(r.URL(), "https://127.0.0.1:") {
			t.Fatalf("URL is %s", r.URL())
		}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: ca.ClientTLS("registry.example.test")}}
		defer client.CloseIdleConnections()
		response, err := client.Get(r.URL() + "/v2/")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Errorf("status %d", response.StatusCode)
		}
	})
}

func TestRegistryFailsClearly(t *testing.T) {
	t.Parallel()
	busy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	_, err = bed.StartRegistry(t.Context(), bed.RegistryConfig{Dir: t.TempDir(), Listen: busy.Addr().String()})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("on a busy address: %v", err)
	}
	_, err = bed.StartRegistry(t.Context(), bed.RegistryConfig{Dir: t.TempDir(), Adjust: func(tree map[string]any) {
		tree["version"] = "7.7"
	}})
	if err == nil || !strings.Contains(err.Error(), "ended") || !strings.Contains(err.Error(), "end of ") {
		t.Errorf("with a configuration of version 7.7: %v", err)
	}
}

// TestServersDieWithTheirOwner runs this test binary once more as the owner of a registry
// and kills it.
func TestServersDieWithTheirOwner(t *testing.T) {
	t.Parallel()
	owner := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestMain$")
	owner.Env = append(os.Environ(), "BED_OWNER_OF="+t.TempDir())
	out, err := owner.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := owner.Start(); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 256)
	n, err := out.Read(buffer)
	if err != nil {
		t.Fatalf("the owner said nothing: %v", err)
	}
	address := string(bytes.TrimSpace(buffer[:n]))
	if conn, err := net.DialTimeout("tcp", address, 5*time.Second); err != nil {
		t.Fatalf("its registry %q does not answer: %v", address, err)
	} else {
		conn.Close()
	}
	if err := owner.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = owner.Wait() // it says that it was killed
	err = bed.Until(t.Context(), 30*time.Second, func(context.Context) error {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			conn.Close()
			return fmt.Errorf("%s still answers", address)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv("BED_OWNER_OF"); dir != "" {
		r, err := bed.StartRegistry(context.Background(), bed.RegistryConfig{Dir: dir})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(r.Addr())
		<-r.Exited() // killed before that
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestUntilTellsWhy(t *testing.T) {
	t.Parallel()
	err := bed.Until(t.Context(), 50*time.Millisecond, func(context.Context) error { return io.ErrNoProgress })
	if err == nil || !strings.Contains(err.Error(), io.ErrNoProgress.Error()) {
		t.Errorf("got %v", err)
	}
}

func TestToolSaysWhatToRun(t *testing.T) {
	t.Parallel()
	_, err := bed.Tool("no-such-program-anywhere")
	if err == nil || !strings.Contains(err.Error(), "make system") {
		t.Errorf("got %v", err)
	}
	for _, tool := range []string{"crane", "registry", "consul", "skopeo", "dig", "docker-registry"} {
		if _, err := bed.Tool(tool); err != nil {
			t.Error(err)
		}
	}
}

func TestAddressesAreDistinct(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for range 50 {
		address := bed.NewAddress(t, "127.0.0.1")
		if seen[address] {
			t.Fatalf("%s twice", address)
		}
		seen[address] = true
	}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}
