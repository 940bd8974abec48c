// Package replication tests the replicator against real registries: CNCF distribution 3 and Debian's 2.8, with real
// events, a real bolt file, and real clients.
package replication

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"portolan/latest"
	"portolan/replicator"
	"portolan/replicator/events"
	ledgerbolt "portolan/replicator/ledger/bolt"
	"portolan/store"
	storebolt "portolan/store/bolt"
	"portolan/test/bed"
	"portolan/topology"
)

// patience is how long a condition may take to come true. It is a bound for hung tests, no expectation.
const patience = 60 * time.Second

// world is some registries with a replicator before them.
type world struct {
	t          testing.TB
	dir        string
	log        *zap.Logger
	registries map[string]*bed.Registry
	addresses  map[string]string
	topology   latest.Value[topology.Snapshot]
	policy     topology.Policy
	home       string
	removed    chan string

	db         *storebolt.DB
	store      *storebolt.Store
	spool      *events.Spool
	replicator *replicator.Replicator
	options    replicator.Options
	listener   net.Listener
	stop       func()
}

type site struct {
	region string
	config bed.RegistryConfig
	// referrers takes go-containerregistry's server instead.
	referrers bool
}

// newWorld starts the registries, the first of which is home. Nothing replicates yet: see start.
func newWorld(t testing.TB, sites ...site) *world {
	t.Helper()
	w := &world{t: t, dir: t.TempDir(), registries: make(map[string]*bed.Registry), addresses: make(map[string]string), removed: make(chan string, 8), home: sites[0].region,
		log: zaptest.NewLogger(t, zaptest.Level(zap.DebugLevel)), policy: topology.Policy{Replication: true, Merge: topology.MergeAsk}}
	// Reserved: it is to be had again after Portolan was away.
	w.listener = listen(t, bed.NewAddress(t, "127.0.0.1"))
	key, err := events.LoadKey(filepath.Join(w.dir, "events.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range sites {
		s.config.Dir = filepath.Join(w.dir, s.region)
		s.config.Notify = []bed.Notification{{URL: fmt.Sprintf("http://%s/events/contoso/%s", w.listener.Addr(), s.region), Token: key.Token("contoso", s.region)}}
		if s.referrers {
			// The only server at hand with the referrers API; it sends no events.
			r := httptest.NewServer(registry.New(registry.WithReferrersSupport(true), registry.Logger(log.New(io.Discard, "", 0))))
			t.Cleanup(r.Close)
			w.addresses[s.region] = r.Listener.Addr().String()
			continue
		}
		w.registries[s.region] = bed.NewRegistry(t, s.config)
		w.addresses[s.region] = w.registries[s.region].Addr()
	}
	return w
}

// declare makes the registries of these regions the topology.
func (w *world) declare(regions ...string) {
	w.t.Helper()
	r := &topology.Registry{Name: "contoso", Home: w.home, Policy: w.policy}
	for i, region := range regions {
		u, err := url.Parse("http://" + w.addresses[region])
		if err != nil {
			w.t.Fatal(err)
		}
		r.Replicas = append(r.Replicas, &topology.Replica{Region: region, Endpoint: u, Addresses: []netip.Addr{netip.MustParseAddr("127.0.0.1")},
			Location: topology.Coordinates{Latitude: float64(10 * i)}, Weight: 100, Routing: true})
	}
	w.topology.Store(&topology.Snapshot{Registries: []*topology.Registry{r}})
}

// start starts the replicator over the world's bolt file; stop, if set, ends it.
func (w *world) start() {
	t := w.t
	t.Helper()
	var err error
	if w.db, err = storebolt.OpenDB(filepath.Join(w.dir, "portolan.db")); err != nil {
		t.Fatal(err)
	}
	w.store = storebolt.New(w.db)
	ledger, err := ledgerbolt.New(w.db)
	if err != nil {
		t.Fatal(err)
	}
	if w.spool, err = events.Open(filepath.Join(w.dir, "spool.db"), events.Limits{}); err != nil {
		t.Fatal(err)
	}
	key, err := events.LoadKey(filepath.Join(w.dir, "events.key"))
	if err != nil {
		t.Fatal(err)
	}
	handler, err := events.NewHandler(w.spool, events.Config{Tokens: key.Tokens(func(string, string) bool { return true }), Log: w.log, Metrics: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	o := w.options
	o.Store, o.Ledger, o.Topology, o.Spool, o.Log, o.Metrics = w.store, ledger, &w.topology, w.spool, w.log, prometheus.NewRegistry()
	o.Holder, o.UserAgent = fmt.Sprint("test-", time.Now().UnixNano()), "portolan/test"
	if o.Drain == 0 {
		o.Drain = 10 * time.Millisecond
	}
	o.Remove = func(_ context.Context, _, region string) error { w.removed <- region; return nil }
	if w.replicator, err = replicator.New(o); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{}, 2)
	if w.listener == nil {
		t.Fatal("the listener was given away")
	}
	listener := w.listener
	go func() { _ = w.replicator.Run(ctx); ended <- struct{}{} }()
	go func() { _ = events.Serve(ctx, listener, handler, nil); ended <- struct{}{} }()
	w.stop = func() {
		cancel()
		<-ended
		<-ended
		_ = w.spool.Close()
		_ = w.db.Close()
		w.stop = func() {}
		w.listener = nil
	}
	t.Cleanup(func() { w.stop() })
}

func (w *world) until(what string, condition func() bool) {
	w.t.Helper()
	deadline := time.Now().Add(patience)
	for !condition() {
		if time.Now().After(deadline) {
			w.t.Fatalf("waited in vain for %s\n%s", what, w.describe())
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (w *world) describe() string {
	var b strings.Builder
	for region := range w.addresses {
		fmt.Fprintf(&b, "%s: %+v\n", region, w.state(region))
		for _, p := range w.replicator.Pending("contoso", region, 10) {
			fmt.Fprintf(&b, "  %+v\n", p)
		}
	}
	return b.String()
}

func (w *world) state(region string) topology.Replication {
	w.t.Helper()
	entry, err := w.store.Get(w.t.Context(), topology.ReplicationKey("contoso", region))
	if err != nil {
		return topology.Replication{}
	}
	return replication(w.t, entry.Value)
}

func (w *world) ready(regions ...string) {
	w.t.Helper()
	for _, region := range regions {
		w.until(region+" to be Ready", func() bool { return w.state(region).Status == topology.Ready })
	}
}

func (w *world) ask(region, verb string) {
	w.t.Helper()
	if _, err := w.store.Commit(w.t.Context(), store.Put(topology.RequestKey("contoso", region, verb), `{"time":"`+time.Now().UTC().Format(time.RFC3339)+`"}`)); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) ref(region, image string) name.Reference {
	w.t.Helper()
	ref, err := name.ParseReference(w.addresses[region]+"/"+image, name.Insecure)
	if err != nil {
		w.t.Fatal(err)
	}
	return ref
}

// push puts a fresh image of some layers there and returns its digest.
func (w *world) push(region, image string) string {
	w.t.Helper()
	img, err := random.Image(2048, 2)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(region, image, img)
	return digestOf(w.t, img)
}

// refer puts an image there, without a tag, that has image as its subject, and returns its digest.
func (w *world) refer(region, image string) string {
	w.t.Helper()
	subject, err := remote.Head(w.ref(region, image))
	if err != nil {
		w.t.Fatal(err)
	}
	sbom, err := random.Image(128, 1)
	if err != nil {
		w.t.Fatal(err)
	}
	referrer := mutate.Subject(mutate.MediaType(sbom, "application/vnd.oci.image.manifest.v1+json"), *subject).(v1.Image)
	repository, _, _ := strings.Cut(image, ":")
	digest := digestOf(w.t, referrer)
	w.put(region, repository+"@"+digest, referrer)
	return digest
}

func (w *world) put(region, image string, what remote.Taggable) {
	w.t.Helper()
	var err error
	switch what := what.(type) {
	case v1.Image:
		err = remote.Write(w.ref(region, image), what)
	case v1.ImageIndex:
		err = remote.WriteIndex(w.ref(region, image), what)
	}
	if err != nil {
		w.t.Fatalf("pushing %s to %s: %v", image, region, err)
	}
}

func (w *world) remove(region, reference string) {
	w.t.Helper()
	if err := remote.Delete(w.ref(region, reference)); err != nil {
		w.t.Fatalf("deleting %s in %s: %v", reference, region, err)
	}
}

// digest is what a tag shows in a region; empty if nothing.
func (w *world) digest(region, image string) string {
	w.t.Helper()
	d, err := remote.Head(w.ref(region, image))
	if err != nil {
		var missing *transport.Error
		if asTransport(err, &missing) && missing.StatusCode == 404 {
			return ""
		}
		return "error: " + err.Error()
	}
	return d.Digest.String()
}

// deleted waits until a manifest is gone from a region's storage. The registry is not asked: distribution clears its descriptor
// cache before it deletes, so a HEAD in between puts the descriptor back, and what is deleted is served for as long as the
// server runs.
func (w *world) deleted(region, repository, digest string) {
	w.t.Helper()
	link := filepath.Join(w.registries[region].Storage(), "docker/registry/v2/repositories", repository, "_manifests/revisions/sha256",
		strings.TrimPrefix(digest, "sha256:"), "link")
	if _, err := os.Stat(filepath.Dir(filepath.Dir(link))); err != nil {
		w.t.Fatalf("the storage of %s is not laid out as expected: %v", region, err)
	}
	w.until(fmt.Sprintf("%s@%.15s to be gone in %s", repository, digest, region), func() bool {
		_, err := os.Stat(link)
		return errors.Is(err, fs.ErrNotExist)
	})
}

// arrives waits until the tag shows the digest in all of these regions, and can be pulled there to the last byte.
func (w *world) arrives(image, digest string, regions ...string) {
	w.t.Helper()
	for _, region := range regions {
		w.until(fmt.Sprintf("%s to be %.15s in %s (it is %.15s)", image, digest, region, w.digest(region, image)), func() bool { return w.digest(region, image) == digest })
		if digest != "" {
			w.whole(region, image)
		}
	}
}

// whole reads everything that an image or index leads to; its digests are verified on the way.
func (w *world) whole(region, image string) {
	w.t.Helper()
	d, err := remote.Get(w.ref(region, image))
	if err != nil {
		w.t.Fatalf("pulling %s from %s: %v", image, region, err)
	}
	if err := bed.ReadWhole(d); err != nil {
		w.t.Fatalf("pulling %s from %s: %v", image, region, err)
	}
}

// multiArch is an index of images, one of them in an index of its own.
func multiArch(t testing.TB) v1.ImageIndex {
	t.Helper()
	index, err := random.Index(1024, 2, 2)
	if err != nil {
		t.Fatal(err)
	}
	nested, err := random.Index(512, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	return mutate.AppendManifests(index, mutate.IndexAddendum{Add: nested})
}
