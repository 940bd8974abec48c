package replication

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"portolan/test/bed"
	"portolan/topology"
)

// A tag that moves quickly ends everywhere as it was pushed last, without a conflict, and every version of it is everywhere by its digest.
func TestLatestMovesQuickly(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v2})
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	for _, from := range []string{"westus", "northeurope"} {
		var all []string
		for range 20 {
			all = append(all, w.push(from, from+":latest"))
		}
		w.arrives(from+":latest", all[len(all)-1], "westus", "northeurope")
		for _, region := range []string{"westus", "northeurope"} {
			for _, digest := range all {
				w.until("an overtaken version in "+region, func() bool { return w.digest(region, from+"@"+digest) == digest })
			}
		}
	}
	w.ready("westus", "northeurope")
	for _, region := range []string{"westus", "northeurope"} {
		if s := w.state(region); s.Conflicts != 0 {
			t.Errorf("%s has conflicts with itself: %+v", region, s)
		}
	}
}

// A registry that answers 503 for a while is a state of the replica: it delays nobody, loses nothing, and catches up by itself.
func TestRegistryUnavailableForAWhile(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3}, site{region: "eastasia", config: v3})
	w.options.ScanInterval = time.Second
	origin, err := url.Parse("http://" + w.addresses["northeurope"])
	if err != nil {
		t.Fatal(err)
	}
	var down atomic.Bool
	through := httputil.NewSingleHostReverseProxy(origin)
	front := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if down.Load() {
			rw.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		r.Host = origin.Host
		through.ServeHTTP(rw, r)
	}))
	t.Cleanup(front.Close)
	w.addresses["northeurope"] = strings.TrimPrefix(front.URL, "http://")
	w.declare("eastasia", "northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope", "eastasia")
	kept := w.push("westus", "app:kept")
	w.arrives("app:kept", kept, "northeurope", "eastasia")
	down.Store(true)
	first := w.push("westus", "app:1")
	w.arrives("app:1", first, "eastasia")
	w.until("northeurope to be Degraded", func() bool { return w.state("northeurope").Status == topology.Degraded })
	if w.digest("westus", "app:kept") != kept {
		t.Error("its silence was taken for deletes")
	}
	down.Store(false)
	w.arrives("app:1", first, "northeurope")
	w.ready("northeurope")
}

// Where deletion is switched off a tombstone waits, listed with its reason, and keeps nobody from being Ready.
func TestDeletionSwitchedOff(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]bed.RegistryConfig{"3": v3, "2.8": v2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config.NoDelete = true
			w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: config})
			w.declare("northeurope", "westus")
			w.start()
			w.ready("westus", "northeurope")
			digest := w.push("westus", "app:1")
			w.arrives("app:1", digest, "northeurope")
			w.remove("westus", "app:1")
			w.until("the tombstone to be listed", func() bool {
				p := w.replicator.Pending("contoso", "northeurope", 10)
				return len(p) == 1 && strings.HasSuffix(p[0].Image, "app:1") && p[0].NotReplicable != ""
			})
			w.until("northeurope to be Ready with it", func() bool {
				s := w.state("northeurope")
				return s.Status == topology.Ready && s.NotReplicable == 1 && s.Pending == 0
			})
			if w.digest("northeurope", "app:1") != digest || w.digest("westus", "app:1") != "" {
				t.Error("the tag came back, or went where it cannot")
			}
			// A push of the tag ends the matter.
			again := w.push("westus", "app:1")
			w.arrives("app:1", again, "northeurope")
			w.until("nothing to be listed", func() bool { return w.state("northeurope").NotReplicable == 0 })
		})
	}
}

// What can never go anywhere is listed with its reason, told to who asks, and keeps nobody from being Ready.
func TestNotReplicable(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", referrers: true}, site{region: "northeurope", config: v3})
	w.options.ScanInterval = 500 * time.Millisecond
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	before := w.push("westus", "app:odd")
	w.arrives("app:odd", before, "northeurope")
	odd := odd("application/vnd.example.unheard-of.v1+json")
	if err := remote.Put(w.ref("westus", "app:odd"), odd); err != nil {
		t.Fatal(err)
	}
	fine := w.push("westus", "app:fine")
	w.arrives("app:fine", fine, "northeurope")
	w.until("it to be listed", func() bool {
		p := w.replicator.Pending("contoso", "northeurope", 10)
		return len(p) == 1 && strings.HasSuffix(p[0].Image, "app:odd") && p[0].NotReplicable != ""
	})
	w.until("northeurope to be Ready with it", func() bool {
		s := w.state("northeurope")
		return s.Status == topology.Ready && s.NotReplicable == 1
	})
	found, err := w.replicator.Inspect(t.Context(), "contoso", "app", "odd")
	if err != nil || len(found.Replicas) != 2 || found.Replicas[0].NotReplicable == "" || found.Replicas[0].Applied || !found.Replicas[1].Applied {
		t.Errorf("%+v, %v", found, err)
	}
	// What northeurope shows is what it had before, and nobody's new push.
	if behind := found.Replicas[0]; !behind.Behind || behind.Digest != before || found.Replicas[1].Behind {
		t.Errorf("%+v, want northeurope behind with %s", found, before)
	}
}

// odd is a manifest of a type that nobody knows.
type odd types.MediaType

func (o odd) RawManifest() ([]byte, error)        { return []byte(`{"schemaVersion":2,"what":"ever"}`), nil }
func (o odd) MediaType() (types.MediaType, error) { return types.MediaType(o), nil }

// Content that garbage collection took away behind a registry's cache is not believed to be there.
func TestGarbageCollectedBehindTheCache(t *testing.T) {
	t.Parallel()
	for name, config := range map[string]bed.RegistryConfig{"3": v3, "2.8": v2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: config})
			w.declare("northeurope", "westus")
			w.start()
			w.ready("westus", "northeurope")
			img, err := random.Image(4096, 3)
			if err != nil {
				t.Fatal(err)
			}
			w.put("westus", "app:1", img)
			digest := digestOf(t, img)
			w.arrives("app:1", digest, "northeurope")
			w.remove("westus", "app@"+digest)
			w.arrives("app:1", "", "northeurope")
			w.deleted("northeurope", "app", digest)
			// The server goes on running, with what it remembers.
			// The throw-away manifest of a tag's deletion may be on its way out still, and 2.8's collector stumbles over it.
			w.until("the garbage to be collected", func() bool {
				out, err := w.registries["northeurope"].GarbageCollect(t.Context(), false)
				if err != nil {
					t.Logf("%v\n%s", err, out)
				}
				return err == nil
			})
			w.put("westus", "app:again", img)
			w.put("westus", "other:1", img) // by a mount, if one believes the registry
			w.arrives("app:again", digest, "northeurope")
			w.arrives("other:1", digest, "northeurope")
			w.ready("northeurope")
		})
	}
}
