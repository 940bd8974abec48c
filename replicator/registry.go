package replicator

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/latest"
	"portolan/replicator/ledger"
	"portolan/replicator/transfer"
	"portolan/replicator/version"
	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// registry is one registry as this process works for it. Its home and its policies stay what they are for its lifetime;
// replicas come and go.
type registry struct {
	name    string
	config  *topology.Registry
	options *Options
	// epoch is the ledger's (see memory): states of another one are not believed.
	epoch   string
	memory  *memory
	uploads *transfer.Journal // nil: nothing is remembered
	engine  *engine
	damage  *examined // what engine sees of the ledger's damage
	metrics *metrics
	log     *zap.Logger

	members latest.Value[fleet]
	// newest is the newest topology.
	newest atomic.Pointer[topology.Registry]

	mu       sync.Mutex
	replicas map[string]*running
	// stored are the states in the store, by region: also those of replicas that are not configured, or not complete, for a
	// while. What is decided meanwhile is due there too.
	stored map[string]stored
	// generation is that of the ledger of which all states are in stored.
	generation ledger.Generation
	// kept are the conflict tags that are alive.
	kept map[ledger.Key]bool
}

// stored is a state in the store.
type stored struct {
	topology.Replication
	revision uint64
}

// running is a replica with what ends it.
type running struct {
	*replica
	settings string
	// begin works for it until end is called, which waits for that.
	begin, end func()
}

func newRegistry(config *topology.Registry, options *Options, memory *memory, uploads *transfer.Journal, metrics *metrics) *registry {
	r := &registry{name: config.Name, config: config, options: options, epoch: memory.epoch(), memory: memory, uploads: uploads, metrics: metrics, log: options.Log.With(zap.String("registry", config.Name)),
		replicas: make(map[string]*running), stored: make(map[string]stored), kept: make(map[ledger.Key]bool)}
	r.members.Store(newFleet(0, nil))
	r.damage = examine(options.Ledger, r.log, metrics.damaged.WithLabelValues(config.Name))
	r.engine = &engine{
		registry: config.Name, ledger: r.damage, fleet: r.fleet, learn: r.readStates, writeID: newID, log: r.log, suspects: make(map[string]map[ledger.Key]suspect),
		now: func() time.Time { return time.Now().UTC().Truncate(time.Millisecond) },
		decided: func(region string, key ledger.Key, v version.Verdict) {
			metrics.decisions.WithLabelValues(config.Name, region, v.String()).Inc()
			r.log.Debug("observed", zap.String("image", key.String()), zap.String("region", region), zap.Stringer("verdict", v))
		},
		rules: rules{
			Policy:             version.Policy{IgnoreDeletes: config.Policy.Deletes == topology.DeletesIgnore},
			guard:              version.Guard,
			keepConflicts:      config.Policy.Conflicts != topology.ConflictsLog,
			untagged:           config.Policy.Untagged != topology.UntaggedTagsOnly,
			listing:            options.ScanInterval,
			deleteConfirmation: options.DeleteConfirmation,
		},
	}
	if options.Spool != nil {
		r.engine.rules.patience = early
	}
	return r
}

// newID is a random name that is never used again: 128 bits in base 32.
func newID() string { return strings.ToLower(rand.Text()) }

func (r *registry) fleet() *fleet { return r.members.Load() }

// run works for the registry until ctx is done. updates holds its newest topology. errRolledBack: the ledger is not the one
// that the states are about any more.
func (r *registry) run(ctx context.Context, updates *latest.Value[topology.Registry]) error {
	reading := complaint{log: r.log}
	cursor, err := r.options.Ledger.Head(ctx)
	for err != nil {
		reading.of("the ledger cannot be read; trying again", err)
		if !sleep(ctx, time.Second) {
			return ctx.Err()
		}
		cursor, err = r.options.Ledger.Head(ctx)
	}
	// Nothing may be decided before all are known that it is due to.
	for err := r.readStates(ctx); err != nil; err = r.readStates(ctx) {
		reading.of("the states of the replicas cannot be read; trying again", err)
		if !sleep(ctx, time.Second) {
			return ctx.Err()
		}
	}
	reading.over("the ledger and the states of the replicas can be read")
	defer r.metrics.damaged.DeleteLabelValues(r.name)
	defer r.stop()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return updates.Watch(ctx, func(config *topology.Registry) { r.reconcile(ctx, config) })
	})
	g.Go(func() error { return r.watchStates(ctx) })
	if r.config.Policy.Replication {
		g.Go(func() error { return r.follow(ctx, cursor) })
		g.Go(func() error { return r.tidy(ctx) })
	}
	return g.Wait()
}

// stop ends every replica and waits for them.
func (r *registry) stop() {
	r.mu.Lock()
	all := r.replicas
	r.replicas = make(map[string]*running)
	r.mu.Unlock()
	endAll(slices.Collect(maps.Values(all)))
}

// endAll ends replicas, all at once, and waits for them.
func endAll(all []*running) {
	var wg sync.WaitGroup
	for _, one := range all {
		wg.Go(one.end)
	}
	wg.Wait()
}

// reconcile starts the replicas that are new or changed, and ends those that are gone.
func (r *registry) reconcile(ctx context.Context, config *topology.Registry) {
	r.newest.Store(config)
	wanted := make(map[string]*topology.Replica)
	for _, c := range config.Replicas {
		wanted[c.Region] = c
	}
	r.mu.Lock()
	var ended []*running
	var gone []string
	for region, one := range r.replicas {
		c := wanted[region]
		switch {
		case c != nil && settings(c) == one.settings:
			delete(wanted, region)
			continue
		case c == nil:
			gone = append(gone, region)
		}
		ended = append(ended, one)
	}
	r.mu.Unlock()
	endAll(ended)
	r.mu.Lock()
	for _, one := range ended {
		r.remember(one.config.Region, one.last())
		delete(r.replicas, one.config.Region)
	}
	r.mu.Unlock()
	for _, region := range gone {
		r.forget(ctx, region)
	}
	// All are known before any of them starts: the others wait for the home.
	var started []*running
	r.mu.Lock()
	for region, c := range wanted {
		live, cancel := context.WithCancel(ctx)
		done := make(chan struct{})
		one := &running{replica: newReplica(r, c, r.stored[region]), settings: settings(c), end: func() { cancel(); <-done }}
		one.begin = func() {
			defer close(done)
			if err := one.run(live); err != nil && live.Err() == nil {
				one.log.Error("working for the replica ended", zap.Error(err))
			}
		}
		r.replicas[region] = one
		started = append(started, one)
	}
	r.mu.Unlock()
	r.muster()
	for _, one := range started {
		go one.begin()
	}
}

// forget drops what is kept of a replica that is gone. Its events, and its state as it was when the work for it ended, are kept while
// its state is: a replica that is only not complete for a while, by an edit of hand, has not been deleted.
func (r *registry) forget(ctx context.Context, region string) {
	r.metrics.forget(r.name, region)
	r.mu.Lock()
	before := r.stored[region].revision
	r.mu.Unlock()
	_, err := r.options.Store.Get(ctx, topology.ReplicationKey(r.name, region))
	if errors.Is(err, store.ErrNotFound) {
		r.mu.Lock()
		if r.stored[region].revision == before { // else it was made again meanwhile
			delete(r.stored, region)
		}
		r.mu.Unlock()
		err = nil
		if r.options.Spool != nil {
			err = r.options.Spool.Forget(ctx, r.name, region)
		}
	}
	if err != nil && ctx.Err() == nil {
		r.log.Warn("the events of a replica that is gone could not be dropped", zap.String("region", region), zap.Error(err))
	}
}

// discard drops the records of a registry that was deleted: with it went the states of its replicas. One that is only missing from the
// topology, by an edit of hand, has these still, and keeps its records. What is left of them, should the process end first, goes when
// a registry of that name is made again.
func (r *registry) discard(ctx context.Context) {
	// A registry that is made again meanwhile begins generations of its own, in which nothing of this one is written: the present
	// one was read before it was known that there is no state.
	err := r.readStates(ctx)
	if err == nil {
		r.mu.Lock()
		there := len(r.stored) > 0
		r.mu.Unlock()
		if there {
			return
		}
		err = r.engine.purge(ctx)
	}
	switch {
	case err == nil:
		r.log.Info("the records of a registry that was deleted were dropped")
	case errors.Is(err, errAgain): // another process does it, or the registry was made again
	case ctx.Err() == nil:
		r.log.Warn("not all records of a registry that was deleted could be dropped", zap.Error(err))
	}
}

// settings is what of a replica's configuration its work depends on.
func settings(c *topology.Replica) string {
	text, _ := json.Marshal(struct {
		Endpoint string
		Access   topology.Access
		Location topology.Coordinates
	}{c.Endpoint.String(), c.Access, c.Location}) // plain data
	return string(text)
}

// all returns the replicas that run.
func (r *registry) all() []*running {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]*running, 0, len(r.replicas))
	for _, one := range r.replicas {
		all = append(all, one)
	}
	return all
}

// regions returns the regions of the newest topology.
func (r *registry) regions() []string {
	var regions []string
	if newest := r.newest.Load(); newest != nil {
		for _, c := range newest.Replicas {
			regions = append(regions, c.Region)
		}
	}
	return regions
}

// replica returns the replica of a region, or nil.
func (r *registry) replica(region string) *replica {
	r.mu.Lock()
	defer r.mu.Unlock()
	if one := r.replicas[region]; one != nil {
		return one.replica
	}
	return nil
}

// muster makes the fleet anew from the states of the replicas. Those that nothing can be asked of at the moment belong to it
// too: if a decision passed over them, their silence would be taken for consent when they come back.
func (r *registry) muster() {
	r.mu.Lock()
	defer r.mu.Unlock()
	var members []*member
	var absent []version.Replica
	places := make(map[string]topology.Coordinates)
	for region, one := range r.replicas {
		places[region] = one.config.Location
		state, remote := one.current(), one.remote.Load()
		if former, ok := one.succeeded(); ok {
			absent = append(absent, former)
		}
		switch {
		case !r.knows(state):
		case remote == nil || !one.describes(state):
			absent = append(absent, identity(region, state))
		default:
			members = append(members, &member{Replica: identity(region, state), Remote: remote, remaining: one.remaining})
		}
	}
	for region, s := range r.stored {
		one := r.replicas[region]
		// Of one that runs here, another process may have stored more: whoever loses a lease learns of that a little later.
		newer := one == nil || one.last().revision < s.revision && one.current().Incarnation != s.Incarnation
		if newer && r.knows(s.Replication) {
			absent = append(absent, identity(region, s.Replication))
		}
	}
	for _, m := range members {
		m.sources = sourcesOf(m, members, func(a, b string) int { return router.Distance(places[a], places[b]) })
	}
	r.members.Store(newFleet(r.generation, members, absent...))
}

// identity is a replica as decisions see it.
func identity(region string, s topology.Replication) version.Replica {
	return version.Replica{Region: region, Incarnation: s.Incarnation, Baselined: s.Phase == topology.PhaseBaselined}
}

// knows reports whether a state is about the ledger as it is.
func (r *registry) knows(s topology.Replication) bool {
	return s.Incarnation != "" && s.Epoch == r.epoch
}

// watchStates learns the states of the replicas that this process does not work for.
func (r *registry) watchStates(ctx context.Context) error {
	return r.options.Store.Watch(ctx, r.statesPrefix(), func(u store.Update) {
		if u.Err == nil {
			r.learn(u.Tree)
		}
	})
}

// readStates reads the ledger's generation, and the states of all replicas that it knows. Their order matters: a new incarnation is
// stored first.
func (r *registry) readStates(ctx context.Context) error {
	generation, err := r.options.Ledger.Generation(ctx, r.name)
	if err != nil {
		return err
	}
	tree, err := r.options.Store.List(ctx, r.statesPrefix())
	if err != nil {
		return fmt.Errorf("reading the states of the replicas of %s: %w", r.name, err)
	}
	r.learn(tree)
	r.mu.Lock()
	r.generation = generation
	r.mu.Unlock()
	r.muster()
	return nil
}

func (r *registry) learn(tree store.Tree) {
	told := topology.ParseState(tree)
	for _, p := range told.Problems {
		r.log.Warn("the state of a replica is not understood", zap.String("key", p.Key), zap.String("reason", p.Reason))
	}
	states := make(map[string]stored)
	for name, state := range told.Replications {
		entry, _ := tree.Get(topology.ReplicationKey(r.name, name.Region))
		states[name.Region] = stored{state, entry.Revision}
	}
	r.mu.Lock()
	for region, s := range r.stored {
		// A tree that comes late may be older than what was read meanwhile.
		if _, there := tree.Get(topology.ReplicationKey(r.name, region)); !there && s.revision <= tree.Revision {
			delete(r.stored, region)
		}
	}
	for region, s := range states {
		r.remember(region, s)
	}
	r.mu.Unlock()
	for _, one := range r.all() {
		s, ok := states[one.config.Region]
		switch {
		case one.lease.Load() != nil:
			one.missing.Store(!ok)
		case ok:
			one.learn(s.Replication, s.revision)
		}
	}
	r.muster()
}

// remember keeps a state, unless a newer one is kept. The caller holds mu.
func (r *registry) remember(region string, s stored) {
	if s.revision > r.stored[region].revision {
		r.stored[region] = s
	}
}

func (r *registry) statesPrefix() string {
	return topology.StatePrefix + "registries/" + r.name + "/replicas/"
}

// anyDecided reports whether the content of any replica is in the ledger, as the store has it.
func (r *registry) anyDecided(ctx context.Context) (bool, error) {
	tree, err := r.options.Store.List(ctx, r.statesPrefix())
	if err != nil {
		return false, fmt.Errorf("reading the states of the replicas of %s: %w", r.name, err)
	}
	for _, e := range tree.Entries {
		region := strings.TrimPrefix(strings.TrimSuffix(e.Key, "/replication"), r.statesPrefix())
		if e.Key != topology.ReplicationKey(r.name, region) {
			continue
		}
		var state topology.Replication
		if err := json.Unmarshal([]byte(e.Value), &state); err != nil {
			return false, fmt.Errorf("reading %s: %w", e.Key, err)
		}
		if r.knows(state) && decided(state) {
			return true, nil
		}
	}
	return false, nil
}

// homeDecided reports whether the home's content is in the ledger.
func (r *registry) homeDecided() bool {
	if newest := r.newest.Load(); newest != nil && newest.Replica(r.config.Home) == nil {
		return true // the home is not complete: there is nothing to wait for
	}
	home := r.replica(r.config.Home)
	if home == nil {
		return false
	}
	state := home.current()
	return home.describes(state) && decided(state)
}

// homeFirst waits until the baseline of the home is decided: its content is what others are compared with.
func (r *registry) homeFirst(ctx context.Context, one *replica) error {
	var seen *fleet
	for one.config.Region != r.config.Home && !r.homeDecided() {
		f, err := r.members.Wait(ctx, seen)
		if err != nil {
			return err
		}
		seen = f
	}
	return nil
}

// fill puts in a replica's queue what the ledger says that it lacks. Before it is baselined, only explicit words count.
func (r *registry) fill(ctx context.Context, one *replica) error {
	state := one.current()
	at := version.Replica{Region: one.config.Region, Incarnation: state.Incarnation, Baselined: state.Phase == topology.PhaseBaselined}
	return r.engine.rows(ctx, "", func(row ledger.Row) bool {
		r.note(row.Key, row.Record)
		if _, explicit := row.Record.Applied[at.Incarnation]; explicit && version.Due(row.Record, at) {
			one.queue.add(row.Key, row.Record.Head.Sequence, true, row.Record.Head.Time)
		}
		return true
	})
}

// follow turns the ledger's changes into work for the replicas that this process writes to.
func (r *registry) follow(ctx context.Context, cursor ledger.Cursor) error {
	following := complaint{log: r.log}
	for {
		keys, next, err := r.options.Ledger.Changes(ctx, cursor)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, ledger.ErrGap):
			if next, err = r.options.Ledger.Head(ctx); err == nil && next.Position < cursor.Position {
				if err := r.memory.saw(cursor.Position); err != nil { // what it is older than, for agree
					r.log.Warn("should the ledger be lost, that may go unnoticed", zap.Error(err))
				}
				return errRolledBack
			}
			if err == nil {
				r.log.Info("the ledger's feed was left behind; reading all of it")
				err = r.refill(ctx)
			}
		case err == nil:
			err = r.changed(ctx, keys)
		}
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			following.of("the ledger cannot be followed; trying again", err)
			sleep(ctx, time.Second)
			continue
		}
		following.over("the ledger can be followed")
		cursor = next
		if err := r.memory.saw(cursor.Position); err != nil {
			r.log.Warn("should the ledger be lost, that may go unnoticed", zap.Error(err))
		}
	}
}

func (r *registry) refill(ctx context.Context) error {
	for _, one := range r.all() {
		if err := r.fill(ctx, one.replica); err != nil {
			return err
		}
	}
	return nil
}

func (r *registry) changed(ctx context.Context, keys []ledger.Key) error {
	for _, key := range keys {
		if key.Registry != r.name {
			continue
		}
		row, err := r.engine.get(ctx, key)
		if err != nil {
			return err
		}
		r.note(key, row.Record)
		f := r.fleet()
		for _, one := range r.all() {
			state := one.current()
			m := f.member(state.Incarnation)
			switch {
			case m == nil || one.lease.Load() == nil:
			case row.Revision != 0 && version.Due(row.Record, m.Replica):
				if decided(state) {
					one.queue.add(key, row.Record.Head.Sequence, false, time.Now())
				}
			default:
				one.queue.remove(key)
			}
		}
	}
	return nil
}

// note keeps count of the conflict tags that are alive.
func (r *registry) note(key ledger.Key, record ledger.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if record.ConflictOf != "" && !record.Head.Tombstone() {
		r.kept[key] = true
	} else {
		delete(r.kept, key)
	}
}

func (r *registry) conflicts() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.kept)
}

// tidy keeps the ledger free of what nobody needs any more. Whoever writes to the home does it.
func (r *registry) tidy(ctx context.Context) error {
	for wait := 10 * time.Minute; sleep(ctx, jitter(wait)); wait = time.Hour {
		if home := r.replica(r.config.Home); home == nil || home.lease.Load() == nil {
			continue
		}
		if err := r.engine.mend(ctx, r.telling()); err != nil && ctx.Err() == nil {
			r.log.Warn("not every replica could be asked what a damaged record stood for", zap.Error(err))
		}
		if err := r.engine.tidy(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("tidying the ledger was interrupted", zap.Error(err))
		}
	}
	return ctx.Err()
}

// telling returns the members at which observations mean something at the moment.
func (r *registry) telling() []*member {
	var members []*member
	for _, one := range r.all() {
		if m, state := one.member(), one.current(); m != nil && decided(state) && state.Held == "" {
			members = append(members, m)
		}
	}
	return members
}
