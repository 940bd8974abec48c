package daemon

import (
	"context"
	"fmt"
	"reflect"
	"sync"

	"golang.org/x/sync/errgroup"

	"portolan/api"
	"portolan/dns"
	"portolan/health"
	"portolan/latest"
	"portolan/router"
	"portolan/router/geo"
	"portolan/topology"
)

// databases are where clients are looked up. Immutable.
type databases struct {
	places   router.Locator
	networks router.ASNLocator // nil: none
	infos    []geo.Info
}

// openDatabases opens what g names; an error names the setting and the file.
func openDatabases(g Geo) (*databases, error) {
	d := &databases{}
	if g.Database == "" {
		table := geo.Builtin()
		d.places, d.infos = table, append(d.infos, table.Info())
	} else {
		database, err := geo.Open(g.Database)
		if err != nil {
			return nil, fmt.Errorf("geo.database: %w", err)
		}
		d.places, d.infos = database, append(d.infos, database.Info())
	}
	if g.ASN != "" {
		asns, err := geo.OpenASN(g.ASN)
		if err != nil {
			return nil, fmt.Errorf("geo.asn: %w", err)
		}
		d.networks, d.infos = asns, append(d.infos, asns.Info())
	}
	return d, nil
}

// frontdoor puts topology, state, verdicts and databases together into what clients are answered from, whenever one of them
// changes.
type frontdoor struct {
	keeper  *topology.Keeper
	states  *stateWatcher
	monitor *health.Monitor // nil without the role dns
	server  *dns.Server     // nil without the role dns
	geo     latest.Value[databases]
	wake    chan struct{} // holds one token while something changed

	mu   sync.Mutex
	view *api.View
	from inputs // what view was made of
}

// inputs are what a router is made of.
type inputs struct {
	snapshot   *topology.Snapshot
	databases  *databases
	charted    *router.Router // of snapshot and databases
	conditions router.Conditions
}

func newFrontdoor(keeper *topology.Keeper, states *stateWatcher, monitor *health.Monitor, server *dns.Server, d *databases) *frontdoor {
	f := &frontdoor{keeper: keeper, states: states, monitor: monitor, server: server, wake: make(chan struct{}, 1), view: &api.View{}}
	f.geo.Store(d)
	return f
}

// run follows what the view is made of until ctx is done, and returns its error.
func (f *frontdoor) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	wake := func() {
		select {
		case f.wake <- struct{}{}:
		default:
		}
	}
	g.Go(func() error { return f.keeper.Watch(ctx, func(*topology.Snapshot) { wake() }) })
	g.Go(func() error { return f.states.latest.Watch(ctx, func(*states) { wake() }) })
	g.Go(func() error { return f.geo.Watch(ctx, func(*databases) { wake() }) })
	if f.monitor != nil {
		g.Go(func() error { return f.monitor.Watch(ctx, func(*health.Verdicts) { wake() }) })
	}
	g.Go(func() error {
		for {
			select {
			case <-f.wake:
				f.update()
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	return g.Wait()
}

// update makes the view anew of what is newest, and the DNS server answer from it.
func (f *frontdoor) update() {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := inputs{snapshot: f.keeper.Snapshot(), databases: f.geo.Load()}
	if now.snapshot == nil {
		return
	}
	state := f.states.latest.Load()
	var verdicts *health.Verdicts
	if f.monitor != nil {
		verdicts = f.monitor.Verdicts()
	}
	now.conditions = conditionsOf(now.snapshot, state, verdicts)
	now.charted = f.from.charted
	charted := now.snapshot == f.from.snapshot && now.databases == f.from.databases
	if !charted {
		now.charted = router.New(now.snapshot, now.databases.places, now.databases.networks)
	}
	view := &api.View{Snapshot: now.snapshot, Verdicts: verdicts, Replication: state.Replications, Requests: state.Requests}
	if charted && reflect.DeepEqual(now.conditions, f.from.conditions) {
		// The replicator's figures changed: that is no reason to pack every answer again.
		view.Router, view.Conditions = f.view.Router, f.view.Conditions
		f.view = view
		return
	}
	view.Router, view.Conditions = now.charted.With(now.conditions), now.conditions
	if f.server != nil {
		f.server.Update(now.snapshot, view.Router, now.conditions)
	}
	f.view, f.from = view, now
}

// current is the newest view, with what probes and the guard say at this moment.
func (f *frontdoor) current() *api.View {
	f.mu.Lock()
	view := *f.view
	f.mu.Unlock()
	status := f.keeper.Status()
	view.Held, view.StoreDown = status.Pending, !status.StoreUp
	if f.monitor != nil {
		view.Verdicts = f.monitor.Verdicts()
	}
	return &view
}

// conditionsOf puts together what probes found and what replicators report.
func conditionsOf(s *topology.Snapshot, state *states, verdicts *health.Verdicts) router.Conditions {
	conditions := router.Conditions{}
	if verdicts != nil {
		for k, c := range verdicts.Conditions() {
			conditions[k] = c
		}
	}
	for _, r := range s.Registries {
		for _, p := range r.Replicas {
			k := router.ReplicaKey{Registry: r.Name, Region: p.Region}
			c, known := conditions[k]
			if !known {
				// Either nobody here probes it, or the first probe of it is about to begin.
				c.Settled = verdicts == nil || p.Probe.Mode == topology.ProbeNone
			}
			c.Seeded = state.seeded[k] == p.Endpoint.String()
			conditions[k] = c
		}
	}
	return conditions
}
