package daemon

import (
	"context"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"portolan/dns"
	"portolan/health"
	"portolan/router"
	"portolan/router/geo"
	"portolan/store"
	"portolan/store/bolt"
	"portolan/topology"
)

// What no probe has told of yet is not settled, unless none will.
func TestConditionsOf(t *testing.T) {
	t.Parallel()
	replica := func(region string, mode topology.ProbeMode) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}, Probe: topology.Probe{Mode: mode}}
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Replicas: []*topology.Replica{
		replica("probed", topology.ProbeHTTPS), replica("new", topology.ProbeHTTPS), replica("never", topology.ProbeNone),
	}}}}
	key := func(region string) router.ReplicaKey { return router.ReplicaKey{Registry: "contoso", Region: region} }
	state := &states{State: &topology.State{Requests: map[router.ReplicaKey][]string{key("never"): {topology.RequestAccept, topology.RequestDelete}, key("new"): {topology.RequestResync}}}, seeded: map[router.ReplicaKey]content{key("probed"): {Endpoint: "https://probed"}, key("new"): {Endpoint: "https://elsewhere"}}}
	verdicts := &health.Verdicts{Replicas: map[router.ReplicaKey]health.Verdict{key("probed"): {Health: router.Unhealthy, Settled: true}}}

	c := conditionsOf(s, state, verdicts, nil, time.Now())
	if p := c[key("probed")]; p.Health != router.Unhealthy || !p.Settled || !p.Seeded {
		t.Errorf("probed: %+v", p)
	}
	if p := c[key("new")]; p.Health != router.Unknown || p.Settled || p.Seeded {
		t.Errorf("new, and seeded at another endpoint: %+v", p)
	}
	if p := c[key("never")]; !p.Settled || !p.Leaving || c[key("new")].Leaving {
		t.Errorf("never probed, and about to be deleted: %+v", p)
	}
	if p := conditionsOf(s, state, nil, nil, time.Now())[key("new")]; !p.Settled {
		t.Errorf("where nothing is probed: %+v", p)
	}
}

// Of what cannot be read again the former stays, and only that.
func TestDatabasesAreReadApart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	g := Geo{Prefixes: write("prefixes", "192.0.2.0/24 westus\n"), Latencies: write("latencies", "country/DE westus 140\n")}
	former, err := openDatabases(g, nil)
	if err != nil || len(former.all()) != 3 {
		t.Fatalf("%+v, %v", former, err)
	}
	write("prefixes", "192.0.2.0/24\n")
	write("latencies", "country/DE westus 140\ncountry/FR westus 130\n")
	now, err := openDatabases(g, former)
	if err == nil || !strings.Contains(err.Error(), "geo.prefixes: "+g.Prefixes+":1") {
		t.Errorf("%v", err)
	}
	if now.Prefixes != former.Prefixes || now.Latencies == former.Latencies || now.all()[1].Lines != 1 || now.all()[2].Lines != 2 || former.all()[2].Lines != 1 {
		t.Errorf("%+v\n%+v", former.all(), now.all())
	}
	again, err := openDatabases(Geo{Latencies: g.Latencies}, nil)
	alone, none := openDatabases(Geo{}, nil)
	if err != nil || none != nil || now.Digest == former.Digest || again.Digest == alone.Digest || alone.Digest == "" {
		t.Errorf("digests: %q, %q, %q, %q", former.Digest, now.Digest, again.Digest, alone.Digest)
	}
	if _, err := openDatabases(g, nil); err == nil {
		t.Error("a start without what cannot be read")
	}
}

// A topology that comes when DNS listens already is not answered from before it is known who is healthy and seeded.
func TestFrontdoorOpens(t *testing.T) {
	t.Parallel()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	stored := bolt.New(db)
	document, err := topology.ParseYAML("t.yaml", []byte(twoRegions("127.0.1.1:5000", "127.0.2.1:5000")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := topology.NewEditor(stored, topology.EditorOptions{}).Apply(t.Context(), *document, false, false); err != nil {
		t.Fatal(err)
	}
	keeper := topology.NewKeeper(stored, topology.KeeperOptions{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- keeper.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	if _, err := keeper.Wait(ctx); err != nil {
		t.Fatal(err)
	}
	metrics := prometheus.NewRegistry()
	server, err := dns.New(dns.Options{Zone: "geo.example.net", Nameservers: map[string][]netip.Addr{"ns.example.org.": nil},
		Listen: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")}, Registerer: metrics})
	if err != nil {
		t.Fatal(err)
	}
	databases, err := openDatabases(Geo{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	states := newStateWatcher(stored, filepath.Join(t.TempDir(), "seeded.json"), func(error) {}, zap.NewNop())
	f := newFrontdoor(keeper, states, nil, server, databases, func(string) {}, zap.NewNop())
	if err := f.chart(ctx); err != nil {
		t.Fatal(err)
	}
	served := func() bool {
		t.Helper()
		families, err := metrics.Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, family := range families {
			if family.GetName() == "portolan_dns_zone_serial" {
				return family.GetMetric()[0].GetGauge().GetValue() > 0
			}
		}
		t.Fatal("there is no serial")
		return false
	}
	f.update()
	if served() || f.current().Router == nil {
		t.Errorf("before it is opened: served %t, router %v", served(), f.current().Router)
	}
	f.open()
	if !served() {
		t.Error("it is open, and nothing is served")
	}
}

// A table that is well-formed and names what is not there is told of.
func TestDoubtsOfTables(t *testing.T) {
	t.Parallel()
	d := &databases{infos: map[string][]geo.Info{"geo.prefixes": {{Path: "p", Lines: 3}}, "geo.latencies": {{Path: "l"}}}}
	d.Prefixes = router.NewPrefixes(map[netip.Prefix][]string{netip.MustParsePrefix("192.0.2.0/24"): {"westuss", "eastus"},
		netip.MustParsePrefix("198.51.100.0/24"): {"westuss"}, netip.MustParsePrefix("203.0.113.0/24"): {"mars"}})
	s := &topology.Snapshot{Registries: []*topology.Registry{{Replicas: []*topology.Replica{{Region: "westus"}, {Region: "eastus"}}}}}
	want := []string{"geo.latencies: l has no line", "geo.prefixes: no registry has a replica in mars (lines that name it: 1)",
		"geo.prefixes: no registry has a replica in westuss (lines that name it: 2); did you mean westus?"}
	if got := d.doubts(s); !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	d.Latencies = router.NewLatencies(map[string]map[string]int{"DE": {"eastus": 1}}, map[string]map[string]int{"EU": {"easteu": 1}})
	d.infos["geo.latencies"][0].Lines, d.Prefixes = 2, nil
	if got := d.doubts(s); len(got) != 1 || !strings.HasPrefix(got[0], "geo.latencies: no registry has a replica in easteu (lines that name it: 1)") {
		t.Errorf("%q", got)
	}
}

// A replica leaves beyond the limit and comes back within half of it; the home never leaves.
func TestLagging(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1_000_000, 0)
	replica := func(region string) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}}
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Home: "home", Policy: topology.Policy{MaxLag: 10 * time.Minute},
		Replicas: []*topology.Replica{replica("home"), replica("other")}}}}
	home, other := router.ReplicaKey{Registry: "contoso", Region: "home"}, router.ReplicaKey{Registry: "contoso", Region: "other"}
	var former router.Conditions
	for i, step := range []struct {
		behind time.Duration // none if zero
		want   bool
	}{{0, false}, {10 * time.Minute, false}, {11 * time.Minute, true}, {6 * time.Minute, true}, {5 * time.Minute, false}, {6 * time.Minute, false}, {time.Hour, true}, {0, false}} {
		now := begin.Add(time.Duration(i) * time.Hour)
		report := topology.Replication{}
		if step.behind > 0 {
			report = topology.Replication{Pending: 1, OldestPending: now.Add(-step.behind)}
		}
		state := &states{State: &topology.State{Replications: map[topology.ReplicaName]topology.Replication{home: report, other: report}}}
		former = conditionsOf(s, state, nil, former, now)
		if former[other].Lagging != step.want || former[home].Lagging {
			t.Errorf("step %d: %v behind: %v, and the home %v", i, step.behind, former[other].Lagging, former[home].Lagging)
		}
	}
	s.Registries[0].Policy.MaxLag = 0
	state := &states{State: &topology.State{Replications: map[topology.ReplicaName]topology.Replication{other: {Pending: 1, OldestPending: begin}}}}
	if conditionsOf(s, state, nil, former, begin.Add(time.Hour))[other].Lagging {
		t.Error("one lags without a limit")
	}
}

// What the guard holds gets no clients, unless nobody else could have them; the home has its own always.
func TestHeld(t *testing.T) {
	t.Parallel()
	replica := func(region string) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}, Routing: true, Weight: 100}
	}
	home, other := replica("home"), replica("other")
	registry := &topology.Registry{Name: "contoso", Home: "home", Policy: topology.Policy{Replication: true}, Replicas: []*topology.Replica{home, other}}
	s := &topology.Snapshot{Registries: []*topology.Registry{registry}}
	at := func(region string) router.ReplicaKey { return router.ReplicaKey{Registry: "contoso", Region: region} }
	state := &states{State: &topology.State{}, seeded: map[router.ReplicaKey]content{at("home"): {"https://home", true}, at("other"): {"https://other", true}}}
	for _, c := range []struct {
		name string
		edit func()
		want bool
	}{
		{"beside the home", func() {}, true},
		{"with nobody else", func() { home.Routing = false }, false},
		{"of another endpoint", func() { home.Routing, other.Endpoint.Host = true, "new" }, false},
		{"not replicated", func() { other.Endpoint.Host, registry.Policy.Replication = "other", false }, false},
	} {
		c.edit()
		if got := conditionsOf(s, state, nil, nil, time.Now()); got[at("other")].Held != c.want || got[at("home")].Held {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}

// told is a store that tells a watcher what comes through the channel.
type told struct {
	store.Store
	updates chan store.Update
}

func (s told) Watch(ctx context.Context, _ string, deliver func(store.Update)) error {
	for {
		select {
		case u := <-s.updates:
			deliver(u)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A start waits until it is known who is seeded: from the store, else from disk, else not for ever.
func TestStateWatcherWait(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seeded.json")
	synctest.Test(t, func(t *testing.T) {
		s := told{updates: make(chan store.Update)}
		w := newStateWatcher(s, path, func(error) {}, zap.NewNop())
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.run(ctx) }()
		takes := func(what string, w *stateWatcher, want time.Duration) {
			t.Helper()
			begun := time.Now()
			if err := w.wait(ctx, time.Minute); err != nil || time.Since(begun) != want {
				t.Errorf("%s: it took %v, want %v: %v", what, time.Since(begun), want, err)
			}
		}
		s.updates <- store.Update{Err: store.ErrUnavailable}
		takes("the store is away", w, time.Minute)
		go func() {
			time.Sleep(time.Second)
			s.updates <- store.Update{Tree: store.Tree{Entries: []store.Entry{{
				Key:   topology.ReplicationKey("contoso", "westus"),
				Value: `{"seeded":true,"endpoint":"https://westus"}`,
			}}}}
		}()
		takes("the store comes", w, time.Second)
		synctest.Wait()
		takes("a second start", newStateWatcher(s, path, func(error) {}, zap.NewNop()), 0)
		cancel()
		<-ended
		if err := newStateWatcher(s, path+".missing", func(error) {}, zap.NewNop()).wait(ctx, time.Minute); err == nil {
			t.Error("it waits after the end")
		}
	})
}

// A start without the store knows who is held, as it knows who is seeded; and no longer, once an operator has decided.
func TestHeldIsKnownWithoutTheStore(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seeded.json")
	replica := func(region string) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}, Routing: true, Weight: 100}
	}
	snapshot := &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Home: "home", Policy: topology.Policy{Replication: true},
		Replicas: []*topology.Replica{replica("home"), replica("other")}}}}
	other := router.ReplicaKey{Registry: "contoso", Region: "other"}
	synctest.Test(t, func(t *testing.T) {
		s := told{updates: make(chan store.Update)}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		w := newStateWatcher(s, path, func(error) {}, zap.NewNop())
		go func() { ended <- w.run(ctx) }()
		for _, held := range []string{"", "much is gone", ""} {
			s.updates <- store.Update{Tree: store.Tree{Entries: []store.Entry{{
				Key:   topology.ReplicationKey("contoso", "other"),
				Value: `{"seeded":true,"endpoint":"https://other","held":"` + held + `"}`,
			}}}}
			synctest.Wait()
			again := newStateWatcher(s, path, func(error) {}, zap.NewNop()).latest.Load()
			if c := conditionsOf(snapshot, again, nil, nil, time.Now())[other]; !c.Seeded || c.Held != (held != "") {
				t.Errorf("held for %q: %+v", held, c)
			}
		}
		cancel()
		<-ended
	})
}
