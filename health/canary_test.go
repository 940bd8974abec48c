package health

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"portolan/replicator/distribution"
	"portolan/router"
	"portolan/topology"
)

// storage is a registry that answers from a map of paths.
type storage map[string]string

func (s storage) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, ok := s[r.URL.Path]
	switch {
	case strings.HasPrefix(body, "code "):
		var code int
		fmt.Sscanf(body, "code %d", &code)
		w.WriteHeader(code)
	case !ok:
		w.WriteHeader(http.StatusNotFound)
	case strings.Contains(r.URL.Path, "/manifests/"):
		media := "application/vnd.oci.image.manifest.v1+json"
		if strings.Contains(body, `"manifests"`) {
			media = "application/vnd.oci.image.index.v1+json"
		}
		w.Header().Set("Content-Type", media)
		fallthrough
	default:
		fmt.Fprint(w, body)
	}
}

func TestCanary(t *testing.T) {
	t.Parallel()
	const layer, config = "a layer that is larger than the configuration", "a configuration"
	descriptor := func(content string, size int) string {
		return fmt.Sprintf(`{"mediaType":"application/octet-stream","digest":%q,"size":%d}`, distribution.Digest([]byte(content)), size)
	}
	image := fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[%s]}`, descriptor(config, len(config)), descriptor(layer, len(layer)))
	child := fmt.Sprintf(`{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":%q,"size":%d}`, distribution.Digest([]byte(image)), len(image))
	const tagPath = "/v2/mirror/team/canary/manifests/1"
	blob := "/v2/mirror/team/canary/blobs/" + distribution.Digest([]byte(config))
	whole := func(changes storage) storage {
		s := storage{tagPath: image, blob: config, "/v2/mirror/team/canary/manifests/" + distribution.Digest([]byte(image)): image}
		for k, v := range changes {
			s[k] = v
		}
		return s
	}
	for _, c := range []struct {
		name    string
		storage storage
		outcome Outcome
		error   string
	}{
		{"an image", whole(nil), Passed, ""},
		{"an index", whole(storage{tagPath: fmt.Sprintf(`{"schemaVersion":2,"manifests":[%s]}`, child)}), Passed, ""},
		{"an image of an index is gone", storage{tagPath: fmt.Sprintf(`{"schemaVersion":2,"manifests":[%s]}`, child)}, Failed, "not found"},
		{"no such tag", storage{}, Failed, "reading the canary team/canary:1: "},
		{"the blob is gone", whole(storage{blob: "code 404"}), Failed, "not found"},
		{"the blob is empty", whole(storage{blob: ""}), Failed, ""},
		{"the blob is another", whole(storage{blob: strings.ToUpper(config)}), Failed, "does not match its digest"},
		{"the storage is gone", whole(storage{blob: "code 500"}), Failed, "unavailable"},
		{"credentials are refused", storage{tagPath: "code 403"}, Unable, "not authorized"},
		{"a limit on requests", storage{tagPath: "code 429"}, Unable, "429"},
		{"no blob is small", storage{tagPath: fmt.Sprintf(`{"schemaVersion":2,"config":%s,"layers":[]}`, descriptor(config, maxCanary+1))}, Unable, "smaller image"},
		{"a manifest without end", storage{tagPath: image + strings.Repeat(" ", maxCanary)}, Failed, "manifest"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			server := httptest.NewServer(c.storage)
			defer server.Close()
			endpoint, err := url.Parse(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			r := ask(t, &prober{}, &target{key: key{canary: true}, image: topology.Canary{Repository: "team/canary", Tag: "1"}, endpoint: endpoint, access: topology.Access{Prefix: "mirror"}})
			if r.Outcome != c.outcome || !strings.Contains(r.Error, c.error) {
				t.Errorf("got %v %q, want %v with %q", r.Outcome, r.Error, c.outcome, c.error)
			}
		})
	}
}

// storeless is a net where addresses answer and canaries do not.
type storeless struct {
	field
	gone bool
}

func (s *storeless) probe(ctx context.Context, t *target) Result {
	if !t.canary {
		return s.field.probe(ctx, t)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked["canary"] = append(s.asked["canary"], time.Now())
	if s.gone {
		return Result{Time: time.Now(), Outcome: Failed, Error: "gone"}
	}
	return Result{Time: time.Now(), Outcome: Passed}
}

// A canary is read at its own pace, and takes the replica down and up again.
func TestMonitorCanary(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := snapshot(map[string][]string{"a": {"192.0.2.1"}})
		s.Registries[0].Replicas[0].Canary = topology.Canary{Repository: "team/canary", Tag: "1"}
		f := &storeless{field: field{asked: map[string][]time.Time{}}}
		m, source, stop := start(t, Options{}, f)
		defer stop()
		source.Store(s)
		time.Sleep(10 * time.Minute)
		if n := len(f.times("canary")); n < 9 || n > 12 {
			t.Errorf("read %d times in ten minutes", n)
		}
		if v := m.of("a"); v.Health != router.Healthy || v.Canary == nil || !v.Settled {
			t.Errorf("got %+v", v)
		}
		f.mu.Lock()
		f.gone = true
		f.mu.Unlock()
		time.Sleep(2 * time.Minute)
		if v := m.of("a"); v.Health != router.Unhealthy || v.Reason != "gone" {
			t.Errorf("with a dead canary: %+v", v)
		}
		f.mu.Lock()
		f.gone = false
		f.mu.Unlock()
		time.Sleep(3 * time.Minute)
		if v := m.of("a"); v.Health != router.Healthy {
			t.Errorf("with a canary that came back: %+v", v)
		}
	})
}
