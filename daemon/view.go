package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/api"
	"portolan/dns"
	"portolan/health"
	"portolan/latest"
	"portolan/router"
	"portolan/router/geo"
	"portolan/strict/nearmiss"
	"portolan/topology"
)

// lagTick is how often it is looked whether replicas lag too far behind: policy.max_lag is 10 s at least.
const lagTick = 2 * time.Second

// databases are where clients are looked up, and what the operator's files say of them. Immutable.
type databases struct {
	router.Sources
	// infos are of the files, by the setting that names them.
	infos map[string][]geo.Info
}

// openDatabases opens what g names. Of what cannot be used, former's stays, which is nil at the start; the error tells of all of that, by
// setting and file.
func openDatabases(g Geo, former *databases) (*databases, error) {
	d := new(databases)
	if former != nil {
		d.Sources, d.infos = former.Sources, maps.Clone(former.infos)
	}
	places := func() ([]geo.Info, error) {
		if len(g.Database) == 0 {
			table := geo.Builtin()
			d.Places = table
			return []geo.Info{table.Info()}, nil
		}
		database, err := geo.Open(g.Database...)
		if err != nil {
			return nil, err
		}
		d.Places = database
		return database.Infos(), nil
	}
	networks := func() ([]geo.Info, error) {
		if len(g.ASN) == 0 {
			return nil, nil
		}
		asns, err := geo.OpenASN(g.ASN...)
		if err != nil {
			return nil, err
		}
		d.Networks = asns
		return asns.Infos(), nil
	}
	err := errors.Join(d.open("geo.database", places), d.open("geo.asn", networks), d.openTables(g))
	hash := sha256.New()
	for _, info := range d.all() {
		fmt.Fprintln(hash, info.Digest)
	}
	d.Digest = hex.EncodeToString(hash.Sum(nil))
	return d, err
}

// openTables reads the operator's tables; the error tells of the faults of all.
func (d *databases) openTables(g Geo) error {
	prefixes := func() ([]geo.Info, error) {
		if g.Prefixes == "" {
			return nil, nil
		}
		prefixes, info, err := geo.ReadPrefixes(g.Prefixes)
		if err != nil {
			return nil, err
		}
		d.Prefixes = prefixes
		return []geo.Info{info}, nil
	}
	latencies := func() ([]geo.Info, error) {
		if g.Latencies == "" {
			return nil, nil
		}
		latencies, info, err := geo.ReadLatencies(g.Latencies)
		if err != nil {
			return nil, err
		}
		d.Latencies = latencies
		return []geo.Info{info}, nil
	}
	return errors.Join(d.open("geo.prefixes", prefixes), d.open("geo.latencies", latencies))
}

// open keeps what open tells of the files of a setting.
func (d *databases) open(setting string, open func() ([]geo.Info, error)) error {
	infos, err := open()
	if err != nil {
		return fmt.Errorf("%s: %w", setting, err)
	}
	if d.infos == nil {
		d.infos = make(map[string][]geo.Info)
	}
	d.infos[setting] = infos
	return nil
}

// all are the infos of all files.
func (d *databases) all() []geo.Info {
	return slices.Concat(d.infos["geo.database"], d.infos["geo.asn"], d.infos["geo.prefixes"], d.infos["geo.latencies"])
}

// doubts are what is well-formed in the operator's tables and yet will not be what was meant: no line, or regions in which no registry
// of s has a replica.
func (d *databases) doubts(s *topology.Snapshot) []string {
	var regions []string
	for _, r := range s.Registries {
		for _, p := range r.Replicas {
			regions = append(regions, p.Region)
		}
	}
	var doubts []string
	for setting, named := range map[string]map[string]int{"geo.prefixes": d.Prefixes.Regions(), "geo.latencies": d.Latencies.Regions()} {
		for _, info := range d.infos[setting] {
			if info.Lines == 0 {
				doubts = append(doubts, fmt.Sprintf("%s: %s has no line", setting, info.Path))
			}
		}
		for region, lines := range named {
			if slices.Contains(regions, region) {
				continue
			}
			doubt := fmt.Sprintf("%s: no registry has a replica in %s (lines that name it: %d)", setting, region, lines)
			if near, ok := nearmiss.Of(region, regions); ok {
				doubt += fmt.Sprintf("; did you mean %s?", near)
			}
			doubts = append(doubts, doubt)
		}
	}
	slices.Sort(doubts)
	return doubts
}

// frontdoor puts topology, state, verdicts and databases together into what clients are answered from, whenever one of them
// changes.
type frontdoor struct {
	keeper  *topology.Keeper
	states  *stateWatcher
	monitor *health.Monitor // nil without the role dns
	server  *dns.Server     // nil without the role dns; it answers from the views once open was called
	// notice tells the operator what became of databases that were offered; an empty text that all is well.
	notice func(text string)
	log    *zap.Logger
	// offered are the databases that should be used, geography those that are, with what was charted of them.
	offered   latest.Value[databases]
	geography latest.Value[geography]
	wake      chan struct{} // holds one token while something changed

	mu     sync.Mutex
	view   *api.View
	from   inputs // what view was made of
	opened bool   // server answers from view
}

// geography is what was charted, and of which databases. Immutable.
type geography struct {
	*databases
	charts *router.Charts
}

// inputs are what a router is made of.
type inputs struct {
	snapshot   *topology.Snapshot
	geography  *geography
	charted    *router.Router // of snapshot and geography
	conditions router.Conditions
}

func newFrontdoor(keeper *topology.Keeper, states *stateWatcher, monitor *health.Monitor, server *dns.Server, d *databases, notice func(string), log *zap.Logger) *frontdoor {
	f := &frontdoor{keeper: keeper, states: states, monitor: monitor, server: server, notice: notice, log: log, wake: make(chan struct{}, 1), view: &api.View{}}
	f.offered.Store(d)
	return f
}

// run follows what the view is made of until ctx is done, and returns its error.
func (f *frontdoor) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	knock := func(door chan struct{}) {
		select {
		case door <- struct{}{}:
		default:
		}
	}
	wake := func() { knock(f.wake) }
	chart := make(chan struct{}, 1)
	g.Go(func() error {
		return f.keeper.Watch(ctx, func(*topology.Snapshot) { wake(); knock(chart) })
	})
	g.Go(func() error { return f.states.latest.Watch(ctx, func(*states) { wake() }) })
	g.Go(func() error { return f.offered.Watch(ctx, func(*databases) { knock(chart) }) })
	g.Go(func() error { return f.geography.Watch(ctx, func(*geography) { wake() }) })
	if f.monitor != nil {
		g.Go(func() error { return f.monitor.Watch(ctx, func(*health.Verdicts) { wake() }) })
	}
	g.Go(func() error { // lag grows while nothing is reported
		tick := time.NewTicker(lagTick)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				wake()
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	// What takes a second or two is done beside what must not wait for it.
	for _, work := range []struct {
		door chan struct{}
		do   func() error
	}{{f.wake, func() error { f.update(); return nil }}, {chart, func() error { return f.chart(ctx) }}} {
		g.Go(func() error {
			for {
				select {
				case <-work.door:
					if err := work.do(); err != nil {
						return err
					}
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		})
	}
	return g.Wait()
}

// databases are those in use; before anything was charted those that will be.
func (f *frontdoor) databases() *databases {
	if used := f.geography.Load(); used != nil {
		return used.databases
	}
	return f.offered.Load()
}

// chart compiles the geography of the newest topology, if that is not what there is already. Databases that cannot be read
// are given up for those that are in use; where none are, at the start, it fails.
func (f *frontdoor) chart(ctx context.Context) error {
	snapshot, offered, used := f.keeper.Snapshot(), f.offered.Load(), f.geography.Load()
	if snapshot == nil {
		return nil
	}
	var former *router.Charts
	if used != nil {
		former = used.charts
	}
	if former.Current(snapshot, offered.Sources) {
		return nil
	}
	began := time.Now()
	charts, err := router.Chart(ctx, snapshot, offered.Sources, former)
	switch {
	case ctx.Err() != nil:
	case err != nil && used == nil:
		return fmt.Errorf("geo: %w", err)
	case err != nil && used.databases != offered:
		f.notice(fmt.Sprintf("the new databases cannot be used, and the former ones are kept: %v", err))
		f.offered.Store(used.databases)
	case err != nil:
		f.notice(fmt.Sprintf("the databases cannot be read, and what was charted before is kept: %v", err))
	default:
		f.notice(strings.Join(offered.doubts(snapshot), "\n"))
		f.geography.Store(&geography{offered, charts})
		f.log.Info("charted where clients are", zap.Duration("took", time.Since(began)), zap.Int("registries", len(snapshot.Registries)))
		// Charting takes ten times the memory of the chart, and is done again in weeks.
		debug.FreeOSMemory()
	}
	return nil
}

// simulate charts a topology that is only thought of, on the databases in use. It is for after the first chart was made, when
// there is a view.
func (f *frontdoor) simulate(ctx context.Context, s *topology.Snapshot) (*router.Charts, error) {
	used := f.geography.Load()
	if !used.charts.Current(s, used.Sources) {
		defer debug.FreeOSMemory() // as in chart
	}
	return router.Chart(ctx, s, used.Sources, used.charts)
}

// ready waits until there is a topology, and a chart of one.
func (f *frontdoor) ready(ctx context.Context) error {
	_, err := f.geography.Wait(ctx, nil)
	return err
}

// update makes the view anew of what is newest, and the DNS server answer from it. While the chart of a new topology is
// still being made, its registries keep to their former ones.
func (f *frontdoor) update() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renew()
}

// open makes the view anew, and lets the DNS server answer from it and its successors. Before, it has no zone. It is for after ready.
func (f *frontdoor) open() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.renew()
	f.opened = true
	f.server.Update(f.from.snapshot, f.view.Router, f.from.conditions)
}

// renew does what update does. The caller holds mu.
func (f *frontdoor) renew() {
	now := inputs{snapshot: f.keeper.Snapshot(), geography: f.geography.Load()}
	if now.snapshot == nil || now.geography == nil {
		return
	}
	state := f.states.latest.Load()
	var verdicts *health.Verdicts
	if f.monitor != nil {
		verdicts = f.monitor.Verdicts()
	}
	now.conditions = conditionsOf(now.snapshot, state, verdicts, f.from.conditions, time.Now())
	now.charted = f.from.charted
	charted := now.snapshot == f.from.snapshot && now.geography == f.from.geography
	if !charted {
		now.charted = router.New(now.snapshot, now.geography.charts)
	}
	view := &api.View{Snapshot: now.snapshot, Ramps: now.snapshot.Ramps, Verdicts: verdicts, Replication: state.Replications, Requests: state.Requests}
	if charted && reflect.DeepEqual(now.conditions, f.from.conditions) {
		// The replicator's figures changed: that is no reason to pack every answer again.
		view.Router, view.Conditions = f.view.Router, f.view.Conditions
		f.view = view
		return
	}
	view.Router, view.Conditions = now.charted.With(now.conditions), now.conditions
	if f.opened {
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
	view.Held, view.StoreDown, view.StoreLost = status.Pending, !status.StoreUp, status.StoreLost
	if f.monitor != nil {
		view.Verdicts = f.monitor.Verdicts()
	}
	return &view
}

// lags is whether a replica is too far behind for clients: beyond most, and once it was, until it is within half of that, lest
// it come and go with every version. The report's own age counts, since none comes while nothing moves.
func lags(r topology.Replication, most time.Duration, already bool, now time.Time) bool {
	if most == 0 || r.Pending == 0 || r.OldestPending.IsZero() {
		return false
	}
	if already {
		most /= 2
	}
	return now.Sub(r.OldestPending) > most
}

// conditionsOf puts together what probes found and what replicators report. former are the conditions before: a replica that is
// drained for its lag comes back later than it left.
func conditionsOf(s *topology.Snapshot, state *states, verdicts *health.Verdicts, former router.Conditions, now time.Time) router.Conditions {
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
			c.Seeded = state.seeded[k].Endpoint == p.Endpoint.String()
			// The home is where the content is the registry's own, and where everybody goes for whom there is nothing better.
			c.Lagging = p.Region != r.Home && lags(state.Replications[k], r.Policy.MaxLag, former[k].Lagging, now)
			c.Leaving = slices.Contains(state.Requests[k], topology.RequestDelete)
			conditions[k] = c
		}
		hold(r, state, conditions)
	}
	return conditions
}

// hold marks the replicas of a registry whose content the guard holds: where it is gone, pulls fail. As long as there is nobody else
// for clients, they go there all the same. The home counts as whole always.
func hold(r *topology.Registry, state *states, conditions router.Conditions) {
	if !r.Policy.Replication {
		return
	}
	var held []router.ReplicaKey
	others := false
	for _, p := range r.Replicas {
		k := router.ReplicaKey{Registry: r.Name, Region: p.Region}
		c := conditions[k]
		switch {
		case p.Region != r.Home && c.Seeded && state.seeded[k].Held:
			held = append(held, k)
		case p.Routing && p.Weight > 0 && !c.Leaving && (c.Seeded || p.Region == r.Home):
			others = true
		}
	}
	if !others {
		return
	}
	for _, k := range held {
		c := conditions[k]
		c.Held = true
		conditions[k] = c
	}
}
