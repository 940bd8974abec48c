package replicator

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	containers "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	client "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/bbolt"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/latest"
	"portolan/replicator/events"
	"portolan/replicator/ledger"
	ledgerbolt "portolan/replicator/ledger/bolt"
	"portolan/replicator/version"
	"portolan/store"
	storebolt "portolan/store/bolt"
	"portolan/topology"
)

// fleetOfServers is some registries in this process, with a replicator over a bolt file before them.
type fleetOfServers struct {
	t        *testing.T
	dir      string
	servers  map[string]*httptest.Server
	handlers map[string]*atomic.Pointer[http.Handler]
	config   *topology.Registry
	topology latest.Value[topology.Snapshot]
	options  Options
	writable func(ledger.Ledger) ledger.Ledger // what the replicator has in place of the ledger; nil: the ledger
	wrap     func(store.Store) store.Store     // what the replicator has in place of the store; nil: the store
	before   func()                            // runs once, when the store is open and nothing else runs

	db         *storebolt.DB
	store      *storebolt.Store
	ledger     *ledgerbolt.Ledger
	spool      *events.Spool
	metrics    *prometheus.Registry
	replicator *Replicator
	stop       func()
}

// newServers starts a registry in each region; the first is home.
func newServers(t *testing.T, regions ...string) *fleetOfServers {
	t.Helper()
	f := &fleetOfServers{t: t, dir: t.TempDir(), servers: make(map[string]*httptest.Server), handlers: make(map[string]*atomic.Pointer[http.Handler]), stop: func() {},
		options: Options{ScanInterval: 100 * time.Millisecond, DeleteConfirmation: 200 * time.Millisecond, Drain: time.Millisecond}}
	f.config = &topology.Registry{Name: "contoso", Home: regions[0], Policy: topology.Policy{Replication: true, Merge: topology.MergeAsk}}
	for _, region := range regions {
		f.serve(region, emptyRegistry())
	}
	return f
}

func emptyRegistry() http.Handler {
	return containers.New(containers.Logger(log.New(io.Discard, "", 0)))
}

// replace puts another handler at the address of a region, and returns the one before.
func (f *fleetOfServers) replace(region string, h http.Handler) http.Handler {
	return *f.handlers[region].Swap(&h)
}

// serve puts a handler in a region, at an address of its own.
func (f *fleetOfServers) serve(region string, h http.Handler) {
	handler := new(atomic.Pointer[http.Handler])
	handler.Store(&h)
	f.handlers[region] = handler
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*handler.Load()).ServeHTTP(w, r) }))
	f.t.Cleanup(s.Close)
	f.servers[region] = s
	u, err := url.Parse(s.URL)
	if err != nil {
		f.t.Fatal(err)
	}
	config := *f.config
	config.Replicas = nil
	for _, r := range f.config.Replicas {
		if r.Region != region {
			config.Replicas = append(config.Replicas, r)
		}
	}
	config.Replicas = append(config.Replicas, &topology.Replica{Region: region, Endpoint: u})
	f.config = &config
}

func (f *fleetOfServers) declare() {
	f.topology.Store(&topology.Snapshot{Registries: []*topology.Registry{f.config}})
}

// change edits the declared replica of a region.
func (f *fleetOfServers) change(region string, change func(*topology.Replica)) {
	config := *f.config
	config.Replicas = nil
	for _, r := range f.config.Replicas {
		if r.Region == region {
			edited := *r
			change(&edited)
			r = &edited
		}
		config.Replicas = append(config.Replicas, r)
	}
	f.config = &config
	f.declare()
}

func (f *fleetOfServers) start() {
	t := f.t
	t.Helper()
	db, err := storebolt.OpenDB(filepath.Join(f.dir, "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	f.db, f.store = db, storebolt.New(db)
	if f.ledger, err = ledgerbolt.New(db); err != nil {
		t.Fatal(err)
	}
	if f.spool, err = events.Open(filepath.Join(f.dir, "spool.db"), events.Limits{}); err != nil {
		t.Fatal(err)
	}
	f.metrics = prometheus.NewRegistry()
	o := f.options
	o.Store, o.Ledger, o.Topology, o.Spool, o.Metrics, o.Log = f.store, f.ledger, &f.topology, f.spool, f.metrics, cmp.Or(f.options.Log, zap.NewNop())
	o.Memory, o.Holder, o.UserAgent = filepath.Join(f.dir, "seen.json"), newID(), "portolan/test"
	if o.Remove == nil {
		o.Remove = func(ctx context.Context, registry, region string) error {
			_, err := f.store.Commit(ctx, store.Delete(topology.ReplicationKey(registry, region)), store.Delete(topology.RequestKey(registry, region, topology.RequestDelete)))
			return err
		}
	}
	if f.writable != nil {
		o.Ledger = f.writable(f.ledger)
	}
	if f.wrap != nil {
		o.Store = f.wrap(f.store)
	}
	if f.replicator, err = New(o); err != nil {
		t.Fatal(err)
	}
	f.declare()
	if f.before != nil {
		f.before()
		f.before = nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f.replicator.Run(ctx) }()
	f.stop = func() {
		cancel()
		<-ended
		_ = f.spool.Close()
		_ = db.Close()
		f.stop = func() {}
	}
	t.Cleanup(func() { f.stop() })
}

// settle starts with a home and another region, and returns the digest of the image app:1 that it pushed at home, once it is everywhere.
func (f *fleetOfServers) settle() string {
	f.t.Helper()
	f.start()
	f.ready("home", "other")
	digest := f.push("home", "app:1")
	f.arrives("app:1", digest, "other")
	f.ready("home", "other")
	return digest
}

// forgetStates removes the states of the replicas, as Editor.DeleteRegistry does in the transaction that ends the registry.
func (f *fleetOfServers) forgetStates() {
	f.t.Helper()
	var ops []store.Op
	for region := range f.servers {
		ops = append(ops, store.Delete(topology.ReplicationKey("contoso", region)))
	}
	if _, err := f.store.Commit(f.t.Context(), ops...); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleetOfServers) until(what string, condition func() bool) {
	f.t.Helper()
	deadline := time.Now().Add(3 * time.Minute) // a replica that was away for long is tried again after 30 s at most
	for !condition() {
		if time.Now().After(deadline) {
			var b strings.Builder
			for region := range f.servers {
				fmt.Fprintf(&b, "%s: %+v\n", region, f.state(region))
			}
			f.t.Fatalf("waited in vain for %s\n%s", what, b.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (f *fleetOfServers) state(region string) topology.Replication {
	var state topology.Replication
	entry, err := f.store.Get(context.Background(), topology.ReplicationKey("contoso", region))
	if err == nil {
		err = json.Unmarshal([]byte(entry.Value), &state)
	}
	if err != nil {
		return topology.Replication{}
	}
	return state
}

func (f *fleetOfServers) ready(regions ...string) {
	f.t.Helper()
	for _, region := range regions {
		f.until(region+" to be Ready", func() bool { return f.state(region).Status == topology.Ready })
	}
}

func (f *fleetOfServers) ask(region, verb string) {
	f.t.Helper()
	if _, err := f.store.Commit(f.t.Context(), store.Put(topology.RequestKey("contoso", region, verb), `{"time":"`+time.Now().UTC().Format(time.RFC3339)+`"}`)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fleetOfServers) ref(region, image string) name.Reference {
	f.t.Helper()
	ref, err := name.ParseReference(strings.TrimPrefix(f.servers[region].URL, "http://")+"/"+image, name.Insecure)
	if err != nil {
		f.t.Fatal(err)
	}
	return ref
}

func (f *fleetOfServers) push(region, image string) string {
	f.t.Helper()
	img, err := random.Image(256, 1)
	if err == nil {
		err = client.Write(f.ref(region, image), img)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	d, err := img.Digest()
	if err != nil {
		f.t.Fatal(err)
	}
	return d.String()
}

func (f *fleetOfServers) digest(region, image string) string {
	d, err := client.Head(f.ref(region, image))
	if err != nil {
		return ""
	}
	return d.Digest.String()
}

func (f *fleetOfServers) arrives(image, digest string, regions ...string) {
	f.t.Helper()
	for _, region := range regions {
		f.until(fmt.Sprintf("%s to be %.15s in %s", image, digest, region), func() bool { return f.digest(region, image) == digest })
	}
}

// A ledger that was restored from a backup knows nothing of what came since. It rolls nothing back.
func TestLedgerRolledBack(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.push("home", "app:1")
	f.start()
	f.ready("home", "other")
	f.arrives("app:1", f.push("other", "app:1"), "home")
	f.ready("home", "other")
	before := f.state("other").Incarnation
	f.stop()
	backup, err := os.ReadFile(filepath.Join(f.dir, "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	f.start()
	f.ready("home", "other")
	if f.state("other").Incarnation != before {
		t.Error("a mere restart is a new baseline")
	}
	newest := f.push("home", "app:1")
	f.arrives("app:1", newest, "other")
	fresh := f.push("other", "app:2")
	f.arrives("app:2", fresh, "home")
	f.ready("home", "other")
	f.stop()
	if err := os.WriteFile(filepath.Join(f.dir, "portolan.db"), backup, 0o600); err != nil {
		t.Fatal(err)
	}
	f.start()
	f.until("a new baseline", func() bool { s := f.state("other"); return s.Incarnation != before && s.Status == topology.Ready })
	f.ready("home")
	for _, region := range []string{"home", "other"} {
		f.arrives("app:1", newest, region)
		f.arrives("app:2", fresh, region)
		if s := f.state(region); s.Conflicts != 0 {
			t.Errorf("%s has conflicts with itself: %+v", region, s)
		}
	}
}

// A ledger that is lost altogether is a first start.
func TestLedgerLost(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	digest := f.push("other", "app:1")
	f.arrives("app:1", digest, "home")
	f.stop()
	if err := os.Remove(filepath.Join(f.dir, "portolan.db")); err != nil {
		t.Fatal(err)
	}
	f.start()
	f.ready("home", "other")
	f.arrives("app:1", digest, "home", "other")
}

// That the state of a replica was removed is noticed though nothing happens there. (What comes then is TestRegistryMadeAgain's.)
func TestNoticesThatItsStateIsGone(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	core, logged := observer.New(zap.WarnLevel)
	f.options.ScanInterval, f.options.Log = time.Hour, zap.New(core)
	f.start()
	f.ready("home", "other")
	f.forgetStates()
	f.until("both to be noticed", func() bool { return logged.FilterMessageSnippet("state was removed").Len() == 2 })
	if f.state("home").Incarnation != "" || f.state("other").Incarnation != "" {
		t.Error("a state was brought back")
	}
}

// stateless is a store in which the states of replicas cannot be written for a while.
type stateless struct {
	store.Store
	fails atomic.Int32
}

func (s *stateless) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if strings.HasSuffix(ops[0].Key, "/replication") && s.fails.Add(-1) >= 0 {
		return 0, store.ErrUnavailable
	}
	return s.Store.Commit(ctx, ops...)
}

// That is noticed also if the store is away just when it is to be found out.
func TestNoticesThatItsStateIsGoneAfterAnOutage(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	core, logged := observer.New(zap.WarnLevel)
	f.options.ScanInterval, f.options.Log = time.Hour, zap.New(core)
	away := new(stateless)
	f.wrap = func(s store.Store) store.Store { away.Store = s; return away }
	f.start()
	f.ready("home", "other")
	away.fails.Store(2)
	f.forgetStates()
	f.until("both to be noticed", func() bool { return logged.FilterMessageSnippet("state was removed").Len() == 2 })
}

// Of a registry that is deleted and made again under its name, nothing old is believed: neither its states nor its deletes.
func TestRegistryMadeAgain(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.push("home", "app:1")
	f.push("home", "app:2")
	f.start()
	f.ready("home", "other")
	f.arrives("app:1", digest, "other")
	img, err := client.Image(f.ref("home", "app:1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Delete(f.ref("home", "app:1")); err != nil {
		t.Fatal(err)
	}
	f.until("the delete in the other region", func() bool { return f.digest("other", "app:1") == "" })
	f.forgetStates() // while work for it goes on
	for range 30 {   // some scans, each of which stores its time
		if f.state("other").Incarnation != "" || f.state("home").Incarnation != "" {
			t.Fatal("a state that was removed came back")
		}
		time.Sleep(20 * time.Millisecond)
	}
	f.topology.Store(&topology.Snapshot{})
	f.until("the work to end", func() bool { return len(f.replicator.all()) == 0 })
	if err := client.Write(f.ref("other", "app:1"), img); err != nil {
		t.Fatal(err)
	}
	f.declare()
	f.ready("home", "other")
	f.arrives("app:1", digest, "home", "other")
}

// An acceptance given before there was a plan is about that plan: it does not open the guard for a wipe that comes later.
// What the guard holds stays held over a restart, and nothing is written there.
func TestAcceptanceIsOfThePlan(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.before = func() { f.ask("other", topology.RequestAccept) }
	f.start()
	digest := f.push("home", "app:1")
	f.ready("home", "other")
	f.arrives("app:1", digest, "other")
	f.ready("other")
	f.replace("other", emptyRegistry())
	held := func() bool { s := f.state("other"); return s.Status == topology.Degraded && s.Held != "" }
	f.until("the guard", held)
	f.stop()
	f.start()
	later := f.push("home", "app:later")
	for range 2 {
		since := time.Now()
		f.until("a scan of the home", func() bool { return f.state("home").LastScan.After(since) })
	}
	for range 20 {
		if !held() {
			t.Fatalf("it is no longer held: %+v", f.state("other"))
		}
		time.Sleep(20 * time.Millisecond)
	}
	if f.digest("home", "app:1") != digest || f.digest("other", "app:later") != "" {
		t.Error("the wipe was believed, or the wiped one written to")
	}
	f.ask("other", topology.RequestResync)
	f.arrives("app:1", digest, "other", "home")
	f.arrives("app:later", later, "other")
	f.ready("other")
}

// Where deletion is switched off, each scan tries one of the deletes, whatever their number; once it is switched on, all are made up for.
func TestDeletionSwitchedOn(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	images := []string{"app:1", "app:2", "app:3", "app:4", "app:5"}
	for _, image := range append(images, "app:stays") {
		f.push("home", image)
	}
	f.start()
	f.ready("home", "other")
	registry := f.handler("other")
	var on atomic.Bool
	var lists, tried atomic.Int32
	f.replace("other", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		byTag := !strings.Contains(r.URL.Path, "sha256:") // the other way to remove a tag stays closed: this registry would leave it there
		switch {
		case strings.HasSuffix(r.URL.Path, "/tags/list"):
			lists.Add(1)
		case r.Method == http.MethodDelete && byTag:
			tried.Add(1)
		}
		if r.Method == http.MethodDelete && !(byTag && on.Load()) {
			http.Error(w, `{"errors":[{"code":"UNSUPPORTED"}]}`, http.StatusMethodNotAllowed)
			return
		}
		registry.ServeHTTP(w, r)
	}))
	for _, image := range images {
		if err := client.Delete(f.ref("home", image)); err != nil {
			t.Fatal(err)
		}
	}
	f.until("the deletes to be listed", func() bool { return f.state("other").NotReplicable == len(images) })
	before, scanned := tried.Load(), lists.Load()
	f.until("some scans", func() bool { return lists.Load() >= scanned+6 })
	scans := lists.Load() - scanned
	if n := tried.Load() - before; n == 0 || n > scans+1 {
		t.Errorf("%d deletes were tried in %d scans", n, scans)
	}
	on.Store(true)
	f.until("the deletes", func() bool {
		return !slices.ContainsFunc(images, func(image string) bool { return f.digest("other", image) != "" }) && f.state("other").NotReplicable == 0
	})
}

// An operator who says that it is right is believed, also after a restart.
func TestGuardAccepted(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.settle()
	f.replace("other", emptyRegistry())
	f.until("the guard", func() bool { return f.state("other").Held != "" })
	f.stop()
	f.start()
	f.ask("other", topology.RequestAccept)
	f.until("the delete at home", func() bool { return f.digest("home", "app:1") == "" })
	f.ready("other")
}

// Registries that something else keeps equal are left alone, and their replicas can be deleted all the same.
func TestReplicationSwitchedOff(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.config.Policy.Replication = false
	removed := make(chan string, 1)
	f.options.Remove = func(_ context.Context, _, region string) error { removed <- region; return nil }
	f.push("home", "app:1")
	f.start()
	f.ask("other", topology.RequestDelete)
	if region := <-removed; region != "other" {
		t.Errorf("removed %s", region)
	}
	if f.digest("other", "app:1") != "" || f.state("home").Incarnation != "" {
		t.Error("it was replicated")
	}
}

// One replica that is no registry, or cannot be reached, keeps nobody else back, and says what is wrong.
func TestReplicaThatIsNoRegistry(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.serve("web", http.NotFoundHandler())
	// Not a closed port: another test's server may get it.
	f.serve("away", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	digest := f.push("home", "app:1")
	f.start()
	f.arrives("app:1", digest, "other")
	f.ready("home", "other")
	f.until("web to say that it is none", func() bool {
		s := f.state("web")
		return s.Status == topology.Creating && strings.Contains(s.Reason, "not a registry")
	})
	f.until("away to say so", func() bool { s := f.state("away"); return s.Status == topology.Creating && s.Reason != "" })
	if s := f.state("web"); s.Phase != topology.PhaseUnknown {
		t.Errorf("an error page was compared: %+v", s)
	}
}

// While the home cannot be reached at the first start, its content is waited for: it is what the others are compared with.
func TestHomeAwayAtTheFirstStart(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	down := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) })
	homes, others := f.push("home", "app:1"), f.push("other", "app:1")
	registry := f.replace("home", down)
	f.start()
	f.until("the other to wait for it", func() bool { return strings.Contains(f.state("other").Reason, "home replica comes first") })
	f.replace("home", registry)
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	f.ask("other", topology.RequestAccept)
	f.arrives("app:1", homes, "home", "other")
	f.arrives("app:1.conflict-other-1", others, "home", "other")
}

// What was accepted stays so when the replica cannot be read just then.
func TestAcceptedWhileAway(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	homes, others := f.push("home", "app:1"), f.push("other", "app:1")
	f.start()
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	down := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) })
	registry := f.replace("other", down)
	f.ask("other", topology.RequestAccept)
	f.until("it to be found away", func() bool { return strings.Contains(f.state("other").Reason, "403") })
	f.replace("other", registry)
	f.arrives("app:1", homes, "home", "other")
	f.arrives("app:1.conflict-other-1", others, "home", "other")
}

// The home is waited for also while it is not known yet what it needs.
func TestFilesThatComeLater(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	ca := filepath.Join(f.dir, "ca.pem")
	f.config.Replicas[0].Access.CA = "file:" + ca
	f.push("home", "app:1")
	f.push("other", "app:1")
	f.start()
	f.until("the home to say what is missing", func() bool { return strings.Contains(f.state("home").Reason, "ca.pem") })
	if s := f.state("other"); s.Phase != topology.PhaseUnknown {
		t.Errorf("the other went first: %+v", s)
	}
	f.change("home", func(r *topology.Replica) { r.Access.CA = "" })
	f.ready("home")
}

// Another prefix is other content: what was applied below the first says nothing about it.
func TestPrefixChanged(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.settle()
	before := f.state("other").Incarnation
	f.change("other", func(r *topology.Replica) { r.Access.Prefix = "mirror" })
	f.until("a new baseline", func() bool { s := f.state("other"); return s.Incarnation != before && s.Status == topology.Ready })
	f.arrives("mirror/app:1", digest, "other")
	f.arrives("app:1", digest, "home")
}

// With a replica go its events and its metrics.
func TestReplicaGone(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.settle()
	series := func() int {
		families, err := f.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, family := range families {
			for _, m := range family.Metric {
				if bytes.Contains([]byte(m.String()), []byte(`"other"`)) {
					n++
				}
			}
		}
		return n
	}
	if series() == 0 {
		t.Fatal("it has no metrics")
	}
	f.ask("other", topology.RequestDelete)
	f.until("its state to go", func() bool { return f.state("other").Incarnation == "" })
	if err := f.spool.Add(t.Context(), "contoso", "other", []events.Event{{ID: "1", Action: events.Push, Repository: "app", Tag: "2", Digest: f.digest("home", "app:1"), Received: time.Now()}}); err != nil {
		t.Fatal(err)
	}
	home := *f.config
	home.Replicas = home.Replicas[:1]
	f.config = &home
	f.declare()
	f.until("its events to be dropped", func() bool { return f.spool.Pending("contoso", "other") == 0 })
	f.until("its metrics to be dropped", func() bool { return series() == 0 })
	if f.state("other").Incarnation != "" {
		t.Error("its state came back")
	}
}

// A replica that was deleted and is made again before the topology told that it was gone begins anew.
func TestReplicaMadeAgainUnnoticed(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.removedTime = 200 * time.Millisecond
	f.settle()
	before := f.state("other").Incarnation
	f.ask("other", topology.RequestDelete)
	f.until("its state to go", func() bool { return f.state("other").Incarnation != before })
	f.ready("other")
	f.arrives("app:2", f.push("home", "app:2"), "other")
}

// A process that has yet to hear that a replica was deleted, and gets the lease that the one has let go that heard of it, does not bring
// back the state: nobody would remove it any more.
func TestReplicaGoneElsewhere(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.settle()
	late := f.options
	var topologyOfLate latest.Value[topology.Snapshot]
	topologyOfLate.Store(f.topology.Load())
	core, logged := observer.New(zap.WarnLevel)
	late.Store, late.Ledger, late.Topology, late.Metrics, late.Log = f.store, f.ledger, &topologyOfLate, prometheus.NewRegistry(), zap.New(core)
	late.Memory, late.Holder, late.Remove = filepath.Join(f.dir, "seen.late.json"), newID(), f.replicator.options.Remove
	r, err := New(late)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	f.until("the other process to know the replica", func() bool {
		one, err := r.registry("contoso")
		return err == nil && len(one.fleet().members) == 2
	})
	f.ask("other", topology.RequestDelete)
	f.until("its state to go", func() bool { return f.state("other").Incarnation == "" })
	home := *f.config
	home.Replicas = home.Replicas[:1]
	f.config = &home
	f.declare()
	one, err := r.registry("contoso")
	if err != nil {
		t.Fatal(err)
	}
	f.until("the lease to be taken over", func() bool { return one.replica("other").lease.Load() != nil })
	f.until("that to be noticed", func() bool {
		return logged.FilterMessageSnippet("state was removed").Len() > 0 || f.state("other").Incarnation != ""
	})
	if f.state("other").Incarnation != "" {
		t.Error("its state came back")
	}
}

// Of a replica that is gone nothing is remembered that others would have to wait for.
func TestGoneReplicaIsForgotten(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.ScanInterval = time.Hour
	f.start()
	f.ready("home", "other")
	f.ask("other", topology.RequestDelete)
	f.until("its state to go", func() bool { return f.state("other").Incarnation == "" })
	one, err := f.replicator.registry("contoso")
	if err != nil {
		t.Fatal(err)
	}
	f.until("that to be known", func() bool {
		one.mu.Lock()
		defer one.mu.Unlock()
		_, there := one.stored["other"]
		return !there
	})
	home := *f.config
	home.Replicas = home.Replicas[:1]
	f.config = &home
	f.declare()
	f.until("the work for it to end", func() bool { return one.replica("other") == nil && len(one.fleet().members) == 1 })
	f.until("the fleet to be whole without it", func() bool { return len(one.fleet().replicas) == 1 && len(one.fleet().unasked) == 0 })
}

// forgetful is a store in which the first removals of requests fail, as when Consul elects a leader.
type forgetful struct {
	store.Store
	fails atomic.Int32
}

func (s *forgetful) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if ops[0].Verb == store.VerbDelete && strings.Contains(ops[0].Key, "/request/") && s.fails.Add(-1) >= 0 {
		return 0, store.ErrUnavailable
	}
	return s.Store.Commit(ctx, ops...)
}

// A request that was carried out does not stay because the store was away when it was to be removed: it would be carried out again one
// day, and let a wipe pass the guard.
func TestRequestIsRetracted(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	failing := new(forgetful)
	f.wrap = func(s store.Store) store.Store { failing.Store = s; return failing }
	f.start()
	f.ready("home", "other")
	for _, verb := range []string{topology.RequestAccept, topology.RequestResync} {
		failing.fails.Store(1)
		before := f.state("other").Incarnation
		f.ask("other", verb)
		f.until(verb+" to be retracted", func() bool {
			_, err := f.store.Get(t.Context(), topology.RequestKey("contoso", "other", verb))
			return errors.Is(err, store.ErrNotFound) && (verb == topology.RequestAccept || f.state("other").Incarnation != before)
		})
		after := f.state("other").Incarnation
		f.ready("other")
		if f.state("other").Incarnation != after {
			t.Errorf("%s was carried out twice", verb)
		}
	}
}

// With a registry that is deleted go its records; one that is only missing from the topology for a while keeps them.
func TestRegistryDeleted(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	records := func() []ledger.Row {
		rows, err := f.ledger.Page(t.Context(), "contoso", "", ledger.Key{}, 10)
		if err != nil {
			t.Fatal(err)
		}
		return rows
	}
	digest := f.push("home", "app:1")
	f.start()
	f.ready("home", "other")
	f.arrives("app:1", digest, "other")
	f.topology.Store(&topology.Snapshot{})
	f.until("the work to end", func() bool { return len(f.replicator.all()) == 0 })
	before := records()
	f.declare()
	f.arrives("app:2", f.push("other", "app:2"), "home")
	if after := records(); len(before) == 0 || len(after) < 2 || after[0].Revision != before[0].Revision {
		t.Errorf("what was missing for a while begins anew:\n%+v\n%+v", before, after)
	}
	f.forgetStates()
	f.topology.Store(&topology.Snapshot{})
	f.until("the records to go", func() bool { return len(records()) == 0 })
}

// That nothing was written since the start does not keep the records of a registry that is deleted.
func TestIdleRegistryDeleted(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.push("home", "app:1")
	f.start()
	f.ready("home", "other")
	f.arrives("app:1", digest, "other")
	f.stop()
	f.start()
	f.ready("home", "other")
	started := time.Now()
	f.until("scans", func() bool {
		return f.state("home").LastScan.After(started) && f.state("other").LastScan.After(started)
	})
	f.forgetStates()
	f.topology.Store(&topology.Snapshot{})
	f.until("the records to go", func() bool {
		rows, err := f.ledger.Page(t.Context(), "contoso", "", ledger.Key{}, 10)
		return err == nil && len(rows) == 0
	})
}

// An acceptance that comes when a scan has already found nothing more to hold is over with that scan. It is not kept for the next wipe.
func TestAcceptanceEndsWithItsMatter(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.settle()
	whole := f.replace("other", emptyRegistry())
	f.until("the guard", func() bool { return f.state("other").Held != "" })
	scanning, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.replace("other", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/_catalog") {
			once.Do(func() { close(scanning) })
			<-goOn
		}
		whole.ServeHTTP(w, r)
	}))
	<-scanning
	f.ask("other", topology.RequestAccept)
	f.until("the acceptance", f.replicator.all()[0].replica("other").isAccepted)
	close(goOn)
	f.until("the end of the hold", func() bool { return f.state("other").Held == "" })
	f.until("the request to go", func() bool {
		_, err := f.store.Get(t.Context(), topology.RequestKey("contoso", "other", topology.RequestAccept))
		return errors.Is(err, store.ErrNotFound)
	})
	var scans atomic.Int32
	wiped := emptyRegistry()
	f.replace("other", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/_catalog") {
			scans.Add(1)
		}
		wiped.ServeHTTP(w, r)
	}))
	f.until("the guard again", func() bool { return f.state("other").Held != "" })
	held := scans.Load()
	f.until("more scans", func() bool { return scans.Load() > held+3 })
	if f.digest("home", "app:1") != digest || f.state("other").Held == "" {
		t.Error("the second wipe was believed")
	}
}

// A home that is replaced by another server is compared with what the others have: the ledger stands, its deletes too.
func TestHomeReplaced(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.settle()
	f.arrives("app:2", f.push("home", "app:2"), "other")
	f.ready("other")
	img, err := client.Image(f.ref("home", "app:2"))
	if err != nil {
		t.Fatal(err)
	}
	if err := client.Delete(f.ref("home", "app:2")); err != nil {
		t.Fatal(err)
	}
	f.arrives("app:2", "", "other")
	f.ready("home", "other")
	before := f.state("home").Incarnation
	f.serve("home", emptyRegistry())
	if err := client.Write(f.ref("home", "app:2"), img); err != nil {
		t.Fatal(err)
	}
	f.declare()
	f.until("a new baseline", func() bool { s := f.state("home"); return s.Incarnation != before && s.Status == topology.Ready })
	f.arrives("app:1", f.digest("other", "app:1"), "home")
	f.arrives("app:2", "", "home", "other")
}

// What is decided while a replica has no connection, or is not configured, is due there when it comes back: its silence is no
// consent, and what it shows then is no push.
func TestReplicaThatComesBack(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"a file that was missing", "a configuration that was incomplete"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newServers(t, "home", "other")
			ca := filepath.Join(f.dir, "ca.pem")
			certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: anyCertificate(t)})
			write := func() {
				if err := os.WriteFile(ca, certificate, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			write()
			f.config.Replicas[1].Access.CA = "file:" + ca
			f.start()
			f.ready("home", "other")
			f.arrives("app:1", f.push("home", "app:1"), "other")
			f.ready("home", "other")
			complete := f.config
			comeBack := write
			if name == "a file that was missing" {
				f.stop()
				if err := os.Remove(ca); err != nil {
					t.Fatal(err)
				}
				f.start()
			} else {
				home := *f.config
				home.Replicas = home.Replicas[:1]
				f.config = &home
				f.declare()
				f.until("the work for it to end", func() bool {
					r, err := f.replicator.registry("contoso")
					return err == nil && r.replica("other") == nil
				})
				comeBack = func() { f.config = complete; f.declare() }
			}
			newer, fresh := f.push("home", "app:1"), f.push("home", "app:2")
			pushed := time.Now()
			f.until("scans of the home", func() bool { return f.state("home").LastScan.After(pushed) })
			comeBack()
			f.arrives("app:1", newer, "other")
			f.arrives("app:2", fresh, "other")
			f.ready("home", "other")
			if f.digest("home", "app:1") != newer || f.digest("home", "app:2") != fresh {
				t.Error("what it had not heard of was taken for a rollback")
			}
		})
	}
}

func anyCertificate(t *testing.T) []byte {
	t.Helper()
	s := httptest.NewTLSServer(http.NotFoundHandler())
	defer s.Close()
	return s.Certificate().Raw
}

// All that a decision is due to is known before the first is made: whoever holds the leases, configured or not.
func TestFleetIsWholeFromTheStart(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.before = func() {
		for region, phase := range map[string]topology.Phase{"home": topology.PhaseBaselined, "other": topology.PhaseSeeding, "elsewhere": topology.PhaseBaselined} {
			state := topology.Replication{Incarnation: "of " + region, Phase: phase, Epoch: "now"}
			if s := f.servers[region]; s != nil {
				state.Endpoint = s.URL
			}
			value, err := json.Marshal(state)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.store.Commit(t.Context(), store.Put(topology.ReplicationKey("contoso", region), string(value))); err != nil {
				t.Fatal(err)
			}
		}
		r := newRegistry(f.config, &Options{Store: f.store, Ledger: f.ledger, Log: zap.NewNop()}, &memory{mark: mark{Epoch: "now"}}, nil, f.replicator.metrics)
		if err := r.readStates(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, c := range f.config.Replicas {
			r.replicas[c.Region] = &running{replica: newReplica(r, c, r.stored[c.Region])}
		}
		r.muster()
		got := make(map[version.Replica]bool)
		for _, one := range r.fleet().replicas {
			got[one] = true
		}
		want := map[version.Replica]bool{{Region: "home", Incarnation: "of home", Baselined: true}: true, {Region: "other", Incarnation: "of other"}: true,
			{Region: "elsewhere", Incarnation: "of elsewhere", Baselined: true}: true}
		if !maps.Equal(got, want) || !r.homeDecided() {
			t.Errorf("%+v", got)
		}
		// What stands at another endpoint is not what the state is about: nothing there is observed, and the state is owed.
		moved := *f.config.Replicas[0]
		moved.Access.Prefix = "elsewhere"
		r.replicas["home"] = &running{replica: newReplica(r, &moved, r.stored["home"])}
		r.replicas["home"].remote.Store(new(remote))
		if r.muster(); r.fleet().member("of home") != nil || len(r.fleet().replicas) != 3 || r.homeDecided() {
			t.Errorf("%+v", r.fleet().replicas)
		}
		// A state that is removed ends what is due.
		if _, err := f.store.Commit(t.Context(), store.Delete(topology.ReplicationKey("contoso", "elsewhere"))); err != nil {
			t.Fatal(err)
		}
		if err := r.readStates(t.Context()); err != nil || len(r.fleet().replicas) != 2 {
			t.Errorf("%+v, %v", r.fleet().replicas, err)
		}
	}
	f.start()
}

// A process that news reaches slowly decides nothing that keeps silent about a replica that was compared meanwhile, and none that it knew
// is forgotten because a tree that was read before comes late.
func TestLearnsWhatItMissed(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.before = func() {
		appear := func(region string) {
			state, err := json.Marshal(topology.Replication{Incarnation: "of " + region, Phase: topology.PhaseSeeding, Epoch: "now"})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.store.Commit(t.Context(), store.Put(topology.ReplicationKey("contoso", region), string(state))); err != nil {
				t.Fatal(err)
			}
		}
		appear("home")
		r := newRegistry(f.config, &Options{Store: f.store, Ledger: f.ledger, Log: zap.NewNop()}, &memory{mark: mark{Epoch: "now"}}, nil, f.replicator.metrics)
		if err := r.readStates(t.Context()); err != nil {
			t.Fatal(err)
		}
		late, err := f.store.List(t.Context(), r.statesPrefix())
		if err != nil {
			t.Fatal(err)
		}
		appear("other")
		if err := f.ledger.Advance(t.Context(), "contoso"); err != nil {
			t.Fatal(err)
		}
		key := ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Tag, Reference: "1"}
		var told []int
		err = r.engine.update(t.Context(), key, func(f version.Fleet, record ledger.Record) (ledger.Record, bool) {
			told = append(told, len(f))
			out := version.Observe(record, f, version.Replica{Region: "home", Incarnation: "of home"}, version.Policy{}, version.Observation{Digest: "sha256:1"})
			return out.Record, true
		})
		row, getting := f.ledger.Get(t.Context(), key)
		if _, explicit := row.Record.Applied["of other"]; err != nil || getting != nil || !explicit || !slices.Equal(told, []int{1, 2}) {
			t.Errorf("%v, %v: decided for %d replicas: %+v", err, getting, told, row.Record)
		}
		r.learn(late)
		if len(r.fleet().replicas) != 2 {
			t.Errorf("%+v", r.fleet().replicas)
		}
	}
	f.start()
}

// Those who clean up with events are not taken for a wipe because a scan comes before the events.
func TestGuardWaitsForEvents(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.ScanInterval, f.options.DeleteConfirmation = time.Hour, time.Hour
	f.push("home", "app:1")
	f.start()
	f.ready("home", "other")
	r, err := f.replicator.registry("contoso")
	if err != nil {
		t.Fatal(err)
	}
	other := r.replica("other")
	f.until("the scan that follows the baseline", func() bool {
		families, err := f.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			for _, m := range family.Metric {
				if family.GetName() == "portolan_replicator_scan_duration_seconds" && strings.Contains(m.String(), `"other"`) {
					return true
				}
			}
		}
		return false
	})
	if err := client.Delete(f.ref("other", "app:1")); err != nil {
		t.Fatal(err)
	}
	if other.scan(t.Context()) || other.current().Held != "" || f.digest("home", "app:1") == "" {
		t.Fatal("what an event may tell of yet was believed, or held")
	}
	if err := f.spool.Add(t.Context(), "contoso", "other", []events.Event{{ID: "1", Action: events.Delete, Repository: "app", Tag: "1", Time: time.Now(), Received: time.Now()}}); err != nil {
		t.Fatal(err)
	}
	f.arrives("app:1", "", "home")
	if !other.scan(t.Context()) || other.current().Held != "" {
		t.Errorf("%+v", other.current())
	}
}

// A registry that wants to be left alone for longer than a scan waits ends the scan once, and the next one begins after that time.
func TestScansHonourRetryAfter(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	scans := func(region, result string) (n uint64) {
		families, err := f.metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			for _, m := range family.Metric {
				if text := m.String(); family.GetName() == "portolan_replicator_scan_duration_seconds" && strings.Contains(text, `"`+region+`"`) && strings.Contains(text, result) {
					n += m.GetHistogram().GetSampleCount()
				}
			}
		}
		return n
	}
	f.replace("other", http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "300")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	f.until("a scan to be ended", func() bool { return scans("other", "") > scans("other", `"done"`) })
	before := scans("home", "")
	f.until("the other region to be scanned", func() bool { return scans("home", "") >= before+20 })
	if failed := scans("other", "") - scans("other", `"done"`); failed != 1 {
		t.Errorf("%d scans were ended", failed)
	}
}

func TestDoubtEnds(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home")
	f.before = func() {
		r := &replica{of: &registry{name: "contoso", options: &Options{Spool: f.spool, ScanInterval: time.Minute}}, config: f.config.Replicas[0]}
		wiped, begin := survey{guarded: true}, time.Now()
		ask := func(s survey, after time.Duration, want bool) {
			t.Helper()
			if got := r.doubts(s, begin.Add(after)); got != want {
				t.Errorf("after %v: %t", after, got)
			}
		}
		ask(wiped, 0, true)
		ask(wiped, doubtTime-1, true)
		ask(wiped, doubtTime, false)
		ask(survey{}, doubtTime, false)
		ask(wiped, time.Hour, true) // another matter
		if err := f.spool.Mark(t.Context(), "contoso", "home", "app"); err != nil {
			t.Fatal(err)
		}
		ask(wiped, time.Hour+doubtTime, true) // an event waits
		ask(wiped, time.Hour+maxDoubt, false)
		ask(survey{}, 2*time.Hour, false)
		r.state.Held = "by the guard"
		ask(wiped, 2*time.Hour, false)
		r.state.Held, r.of.options.Spool = "", nil
		ask(wiped, 3*time.Hour, false)
	}
	f.start()
}

// A spool with a record that cannot be read costs the events, not the replication.
func TestDamagedSpool(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	db, err := bbolt.Open(filepath.Join(f.dir, "spool.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		root, err := tx.CreateBucket([]byte("v1"))
		if err != nil {
			return err
		}
		b, err := root.CreateBucket([]byte("contoso/other"))
		if err != nil {
			return err
		}
		for bucket, pair := range map[string][2]string{"items": {"app\x001", "{"}, "order": {"\x00\x00\x00\x00\x00\x00\x00\x01", "app\x001"}, "seen": {}, "ring": {}} {
			in, err := b.CreateBucket([]byte(bucket))
			if err == nil && pair[0] != "" {
				err = in.Put([]byte(pair[0]), []byte(pair[1]))
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	f.settle()
	f.arrives("app:2", f.push("other", "app:2"), "home")
}

// Where events were dropped, a scan is made at once, and the mark stays until one that began later has ended; in a process that is not the
// replica's writer, too.
func TestMarkWaitsForAScan(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.ScanInterval = time.Hour
	f.start()
	f.ready("home", "other")
	digest := f.push("home", "app:1") // no event
	if err := f.spool.Mark(t.Context(), "contoso", "home", ""); err != nil {
		t.Fatal(err)
	}
	f.arrives("app:1", digest, "other")
	f.until("the mark to go", func() bool { return f.spool.Pending("contoso", "home") == 0 })

	marked := time.Now()
	of := &registry{name: "contoso"}
	standby := &replica{of: of, look: make(chan struct{}, 1), state: topology.Replication{Incarnation: "i", Phase: topology.PhaseBaselined, LastScan: marked.Add(-time.Second)}}
	of.members.Store(newFleet(0, []*member{{Replica: version.Replica{Incarnation: "i"}}}))
	item := events.Item{Registry: "contoso", Region: "home", Marked: marked}
	if err := standby.observe(t.Context(), item); !errors.Is(err, errUndecided) || len(standby.look) != 1 {
		t.Errorf("before the scan: %v, asked for: %d", err, len(standby.look))
	}
	<-standby.look
	standby.scanning = marked.Add(time.Second)
	if err := standby.observe(t.Context(), item); !errors.Is(err, errUndecided) || len(standby.look) != 0 {
		t.Errorf("during the scan: %v, asked for another: %d", err, len(standby.look))
	}
	standby.state.LastScan = marked.Add(time.Second)
	if err := standby.observe(t.Context(), item); err != nil {
		t.Errorf("after it: %v", err)
	}
	item.Marked = marked.Add(time.Hour)
	if err := standby.observe(t.Context(), item); err != nil || len(standby.look) != 1 {
		t.Errorf("of a time that is still to come: %v, asked for: %d", err, len(standby.look))
	}
}

// failing answers 500 to whatever concerns a reference, whoever asks.
func failing(next http.Handler, reference string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/"+reference) {
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A tag that a registry cannot read hides nothing else of it, and is named.
func TestUnreadableTag(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.push("home", "app:bad")
	good := f.push("home", "app:good")
	whole := *f.handlers["home"].Load()
	f.replace("home", failing(whole, "bad"))
	f.start()
	f.ready("home", "other")
	f.arrives("app:good", good, "other")
	f.arrives("app:later", f.push("home", "app:later"), "other") // no event: a scan finds it
	f.until("the tag to be named", func() bool {
		pending := f.replicator.Pending("contoso", "home", 10)
		return len(pending) == 1 && pending[0].Image == "contoso/app:bad" && pending[0].Error != "" && pending[0].Unreadable && !pending[0].Since.IsZero() &&
			strings.HasPrefix(f.state("home").LastError, "1 tag cannot be read there; the first: looking at contoso/app:bad in home: ") && f.state("home").Unreadable == 1
	})
	f.replace("home", whole)
	bad := f.digest("home", "app:bad")
	f.arrives("app:bad", bad, "other")
	f.until("nothing to be named", func() bool {
		return len(f.replicator.Pending("contoso", "home", 10)) == 0 && f.state("home").LastError == "" && f.state("home").Unreadable == 0
	})
}

// An image that cannot be read where it is to be brought to is listed once, since when it was first found so.
func TestUnreadableTagIsListedOnce(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.push("home", "app:bad")
	f.push("home", "app:good")
	f.replace("home", failing(f.handler("home"), "bad"))
	f.start()
	f.ready("home", "other")
	var first time.Time
	f.until("the tag to be named", func() bool {
		pending := f.replicator.Pending("contoso", "home", 10)
		if len(pending) == 1 {
			first = pending[0].Since
		}
		return len(pending) == 1
	})
	f.push("other", "app:bad")
	f.until("the push to be tried there", func() bool {
		pending := f.replicator.Pending("contoso", "home", 10)
		if len(pending) != 1 || !pending[0].Unreadable || !pending[0].Since.Equal(first) {
			t.Fatalf("%+v, first %v", pending, first)
		}
		return pending[0].Attempts > 1
	})
}

// A replica is seeded, although a tag cannot be read there, also where there is nothing else that it could take meanwhile.
func TestUnreadableTagIsGivenUp(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	of := &registry{name: "contoso", log: zap.NewNop(), options: &Options{RequestsPerSecond: 1}, engine: s.engines[0]}
	r := newReplica(of, &topology.Replica{Region: "northeurope"}, stored{})
	r.missed([]unread{{s.key("b"), errors.New("500")}})
	for key, want := range map[ledger.Key]bool{s.key("a"): false, s.key("b"): true} {
		i := &item{key: key, sequence: 1, begun: 1}
		for range maxFailed + 1 {
			r.settle(t.Context(), s.region(north), i, &UnavailableError{Err: errors.New("500")})
		}
		if _, parked := r.queue.parked[key]; parked != want {
			t.Errorf("%s is given up: %t", key, parked)
		}
	}
	if r.writing.reason == "" {
		t.Error("what could be read the last time does not tell of the replica")
	}
}

// While a plan waits for the operator, nothing is written, whatever is left in the queue.
func TestNothingIsWrittenBeforeThePlanIsAccepted(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.push("home", "app:1")
	f.push("other", "app:1")
	f.push("home", "app:2")
	f.start()
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	reg, err := f.replicator.registry("contoso")
	if err != nil {
		t.Fatal(err)
	}
	key, q := ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Tag, Reference: "2"}, reg.replica("other").queue
	q.add(key, 1, true, time.Now())
	f.until("its turn", func() bool {
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.items[key] == nil || q.items[key].state == delaying
	})
	if f.digest("other", "app:2") != "" {
		t.Error("it was written")
	}
}

// What a registry cannot take is not the registry's trouble as long as it takes everything else: nothing waits behind it.
func TestUnwritableTag(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	whole := *f.handlers["other"].Load()
	f.replace("other", failing(whole, "bad"))
	bad := f.push("home", "app:bad")
	f.until("the trouble", func() bool { return f.state("other").LastError != "" })
	f.arrives("app:good", f.push("home", "app:good"), "other")
	f.until("no trouble of the whole", func() bool {
		s := f.state("other")
		return s.Pending == 1 && s.Status != topology.Degraded
	})
	f.replace("other", whole)
	f.arrives("app:bad", bad, "other")
	f.ready("other")
}

// While a replica lacks content that is nowhere to be had, what is pushed there is seen nevertheless, with no event telling of it.
func TestPushBeforeTheReplicaIsSeeded(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.push("home", "app:1")
	whole := *f.handlers["home"].Load()
	f.replace("home", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") { // its disk, say
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		whole.ServeHTTP(w, r)
	}))
	f.start()
	f.until("the baseline", func() bool { return f.state("other").Phase == topology.PhaseBaselined })
	pushed := f.push("other", "app:2")
	f.until("the push to be seen", func() bool { return f.state("home").Pending > 0 || f.digest("home", "app:2") == pushed })
	if s := f.state("other"); s.Seeded || s.Status != topology.Syncing {
		t.Errorf("%+v", s)
	}
	f.replace("home", whole)
	f.ready("home", "other")
	f.arrives("app:1", digest, "other")
	f.arrives("app:2", pushed, "home")
	if !f.state("other").Seeded {
		t.Error("not seeded")
	}
}

// A push that an event told of and that cannot be looked at is shown, until it can.
func TestUnreadablePush(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.ScanInterval = time.Hour
	f.start()
	f.ready("home", "other")
	bad := f.push("home", "app:bad")
	whole := *f.handlers["home"].Load()
	f.replace("home", failing(whole, "bad"))
	now := time.Now()
	if err := f.spool.Add(t.Context(), "contoso", "home", []events.Event{{ID: "1", Action: events.Push, Repository: "app", Tag: "bad", Digest: bad, Time: now, Received: now}}); err != nil {
		t.Fatal(err)
	}
	f.until("the push to be named", func() bool {
		pending := f.replicator.Pending("contoso", "home", 10)
		return len(pending) == 1 && pending[0].Image == "contoso/app:bad" && pending[0].Error != "" && strings.Contains(f.state("home").LastError, "app:bad")
	})
	f.replace("home", whole)
	f.arrives("app:bad", bad, "other")
	f.until("nothing to be named", func() bool {
		return len(f.replicator.Pending("contoso", "home", 10)) == 0 && f.state("home").LastError == ""
	})
}

// full is a ledger that can be read and not written while it is told so, as on a disk that is full.
type full struct {
	ledger.Ledger
	told atomic.Bool
}

func (l *full) CompareAndSet(ctx context.Context, by ledger.Generation, key ledger.Key, record *ledger.Record, revision uint64) (uint64, error) {
	if l.told.Load() {
		return 0, fmt.Errorf("writing %s: %w: no space left on device", key, ledger.ErrUnavailable)
	}
	return l.Ledger.CompareAndSet(ctx, by, key, record, revision)
}

// What waits for a ledger that cannot be written says so: a baseline, what an event told of, and a copy.
func TestLedgerCannotBeWritten(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.ScanInterval = time.Hour
	disk := &full{}
	disk.told.Store(true)
	f.writable = func(l ledger.Ledger) ledger.Ledger { disk.Ledger = l; return disk }
	f.push("home", "app:1")
	f.start()
	f.until("the baseline to tell", func() bool {
		s := f.state("home")
		return s.Status == topology.Creating && strings.Contains(s.Reason, "no space left on device")
	})
	disk.told.Store(false)
	f.ready("home", "other")

	disk.told.Store(true)
	pushed := f.push("home", "app:2")
	now := time.Now()
	if err := f.spool.Add(t.Context(), "contoso", "home", []events.Event{{ID: "1", Action: events.Push, Repository: "app", Tag: "2", Digest: pushed, Time: now, Received: now}}); err != nil {
		t.Fatal(err)
	}
	reg, err := f.replicator.registry("contoso")
	if err != nil {
		t.Fatal(err)
	}
	home := reg.replica("home")
	f.until("it to have lasted", func() bool {
		home.mu.Lock()
		defer home.mu.Unlock()
		home.storing.since = now.Add(-time.Minute)
		return home.storing.lasting()
	})
	f.until("the event to tell", func() bool {
		s := f.state("home")
		return s.Status == topology.Degraded && strings.Contains(s.Reason, "no space left on device") && s.Unreadable == 0
	})
	disk.told.Store(false)
	f.arrives("app:2", pushed, "other")
	f.ready("home", "other")
}

// Nobody waits for a replica to which no clients are sent; the home they always wait for.
func TestExcuse(t *testing.T) {
	t.Parallel()
	of := &registry{config: &topology.Registry{Home: "home"}}
	for _, c := range []struct {
		region string
		state  topology.Replication
		want   bool
	}{
		{"home", topology.Replication{Status: topology.Creating}, false},
		{"other", topology.Replication{Status: topology.Syncing}, true},
		{"other", topology.Replication{Status: topology.Syncing, Seeded: true}, false},
		{"other", topology.Replication{Status: topology.Deleting, Seeded: true}, true},
		{"other", topology.Replication{Status: topology.Degraded, Seeded: true}, false},
	} {
		r := &replica{of: of, config: &topology.Replica{Region: c.region}, state: c.state}
		if got := r.excuse(); (got != "") != c.want {
			t.Errorf("%s, %+v: %q", c.region, c.state, got)
		}
	}
}
