// Package replicator carries whatever is pushed in any region to every other region: eventually consistent,
// multi-master, nothing lost.
//
// It goes one way: something is observed at a replica (an event from the spool, or a scan), package version decides what
// that means, the ledger keeps the decision, and each replica's queue, derived from the ledger, is worked off by copies
// (package transfer) and writes of tags. Nothing is asked of a replica but the OCI distribution API.
//
// The files: engine.go and scan.go are the steps, each of which may be cut off at any request (the simulation does just
// that); queue.go orders the work of a replica; replica.go is the life of one replica, registry.go of one registry;
// remote.go speaks to registries. The package knows nothing of clients, DNS or health.
package replicator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"portolan/latest"
	"portolan/replicator/events"
	"portolan/replicator/ledger"
	"portolan/replicator/transfer"
	"portolan/replicator/version"
	"portolan/store"
	"portolan/topology"
)

// Options say what a Replicator works with.
type Options struct {
	Store  store.Store
	Ledger ledger.Ledger
	// Topology tells of every new snapshot: a topology.Keeper.
	Topology interface {
		Watch(ctx context.Context, deliver func(*topology.Snapshot)) error
	}
	// Spool holds the replicas' events; nil: scans alone.
	Spool *events.Spool
	// Remove takes a replica out of the topology when its delete is complete: topology.Editor's.
	Remove func(ctx context.Context, registry, region string) error
	// Memory is the file in which the newest that was seen of the ledger is remembered; its folder must exist, and not be restored
	// from a backup together with the ledger, nor be another process's. Empty: a ledger that is lost or rolled back while the process does not
	// run goes unnoticed.
	Memory string
	// Uploads is the file in which is remembered where the uploads of large blobs stand, so that they are gone on with after a kill; its
	// folder must exist, and be no other process's. Empty: they begin anew.
	Uploads string
	// Holder names this process in leases: unique among all, new at every start.
	Holder string
	// ScanInterval is the time between two scans of a replica. Default 5 minutes.
	ScanInterval time.Duration
	// DeleteConfirmation is how far two scans must be apart that find a tag missing, for that to be a delete. Default 10 minutes.
	DeleteConfirmation time.Duration
	// Drain is how long clients may still come to a replica after routing to it ended: topology.Spreading and the longest TTL of an
	// answer. Default 62 s.
	Drain time.Duration
	// Copies is how many tags or manifests are brought to one replica at a time. Default 4.
	Copies int
	// RequestsPerSecond is the budget of scans for one replica. Default 50.
	RequestsPerSecond float64
	// UserAgent is the first part of the User-Agent: "portolan/1.2".
	UserAgent string
	Log       *zap.Logger
	Metrics   prometheus.Registerer

	removedTime, leaveAgain time.Duration // those of the names, but in tests
}

// Replicator works for every registry of the topology. Of those whose policy wants no replication it only carries out the
// deletes of replicas.
type Replicator struct {
	options Options
	memory  *memory
	uploads *transfer.Journal // nil: nothing is remembered
	metrics *metrics

	mu         sync.Mutex
	registries map[string]*active
}

// active is a registry that runs.
type active struct {
	*registry
	updates *latest.Value[topology.Registry]
	end     func()
}

// New makes a Replicator. The error is that of registering the metrics, or of reading the memory.
func New(o Options) (*Replicator, error) {
	setDefault(&o.ScanInterval, 5*time.Minute)
	setDefault(&o.DeleteConfirmation, 10*time.Minute)
	setDefault(&o.Drain, time.Minute+topology.Spreading)
	setDefault(&o.Copies, 4)
	setDefault(&o.RequestsPerSecond, 50)
	setDefault(&o.removedTime, removedTime)
	setDefault(&o.leaveAgain, leaveAgain)
	memory, err := recall(o.Memory)
	if err != nil {
		return nil, err
	}
	var uploads *transfer.Journal
	if o.Uploads != "" {
		if uploads, err = transfer.OpenJournal(o.Uploads); err != nil {
			o.Log.Warn("uploads that were under way begin anew", zap.Error(err))
		}
	}
	m, err := newMetrics(o.Metrics)
	if err != nil {
		return nil, fmt.Errorf("registering the replicator's metrics: %w", err)
	}
	return &Replicator{options: o, memory: memory, uploads: uploads, metrics: m, registries: make(map[string]*active)}, nil
}

func setDefault[T comparable](v *T, otherwise T) {
	var zero T
	if *v == zero {
		*v = otherwise
	}
}

// complaint logs what fails again and again, once as long as it fails in the same way.
type complaint struct {
	log  *zap.Logger
	last string
}

func (c *complaint) of(what string, err error) {
	if text := err.Error(); text != c.last {
		c.last = text
		c.log.Warn(what, zap.Error(err))
	}
}

// over ends the complaint, if there was one.
func (c *complaint) over(what string) {
	if c.last != "" {
		c.last = ""
		c.log.Info(what)
	}
}

// Run works until ctx is done, and returns when every copy is finished or parked. What was under way is found again at the
// next start: nothing that has to be remembered is kept in memory alone.
func (r *Replicator) Run(ctx context.Context) error {
	reading := complaint{log: r.options.Log}
	for {
		if err := r.agree(ctx); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			reading.of("the ledger cannot be read; trying again", err)
			sleep(ctx, time.Second)
			continue
		}
		reading.over("the ledger can be read")
		if err := r.work(ctx); !errors.Is(err, errRolledBack) {
			return err
		}
	}
}

// work works for the registries until ctx is done, or the ledger's epoch ends: errRolledBack.
func (r *Replicator) work(ctx context.Context) error {
	working, stop := context.WithCancelCause(ctx)
	var discarding sync.WaitGroup
	attested := make(chan struct{})
	go func() {
		defer close(attested)
		r.attestAll(working, stop)
	}()
	defer func() {
		stop(nil)
		for _, one := range r.all() {
			r.finish(one)
		}
		discarding.Wait()
		<-attested
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), attestTime)
		defer cancel()
		err := r.attest(last)
		if errors.Is(err, errRolledBack) {
			err = nil // whoever comes next will find it
		}
		if err = errors.Join(err, r.memory.flush()); err != nil {
			r.options.Log.Warn("should the ledger be lost, that may go unnoticed", zap.Error(err))
		}
	}()
	err := r.options.Topology.Watch(working, func(s *topology.Snapshot) {
		for _, one := range r.all() {
			if s.Registry(one.name) == nil {
				regions := one.regions()
				r.finish(one)
				for _, region := range regions {
					one.forget(working, region)
				}
				discarding.Go(func() { one.discard(working) })
			}
		}
		for _, config := range s.Registries {
			r.mu.Lock()
			one := r.registries[config.Name]
			r.mu.Unlock()
			if one != nil && (one.config.Home != config.Home || one.config.Policy != config.Policy) {
				r.finish(one)
				one = nil
			}
			if one == nil {
				one = r.begin(working, config, stop)
			}
			one.updates.Store(config)
		}
	})
	if cause := context.Cause(working); errors.Is(cause, errRolledBack) && ctx.Err() == nil {
		return errRolledBack
	}
	return err
}

func (r *Replicator) begin(ctx context.Context, config *topology.Registry, fail context.CancelCauseFunc) *active {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	one := &active{registry: newRegistry(config, &r.options, r.memory, r.uploads, r.metrics), updates: new(latest.Value[topology.Registry])}
	one.end = func() { cancel(); <-done }
	r.mu.Lock()
	r.registries[config.Name] = one
	r.mu.Unlock()
	go func() {
		defer close(done)
		err := one.run(ctx, one.updates)
		switch {
		case errors.Is(err, errRolledBack):
			fail(err)
		case err != nil && ctx.Err() == nil:
			one.log.Error("working for the registry ended", zap.Error(err))
		}
	}()
	return one
}

func (r *Replicator) finish(one *active) {
	one.end()
	r.mu.Lock()
	delete(r.registries, one.name)
	r.mu.Unlock()
}

func (r *Replicator) all() []*active {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Collect(maps.Values(r.registries))
}

func (r *Replicator) registry(name string) (*registry, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if one := r.registries[name]; one != nil {
		return one.registry, nil
	}
	return nil, fmt.Errorf("registry %s is not known here", name)
}

// Inspection is what is known of one tag or manifest in every replica.
type Inspection struct {
	// Digest is the head of the tag; empty if there is none anywhere.
	Digest string `json:"digest"`
	// Earlier are the digests that the tag had before, the newest first: of the last ledger.MaxHistory versions at least.
	Earlier []string `json:"earlier,omitempty"`
	// Deleted is when it was deleted, at the latest, if there was one before.
	Deleted  time.Time           `json:"deleted,omitzero"`
	Replicas []ReplicaInspection `json:"replicas"`
}

// ReplicaInspection is what is known of it in one replica.
type ReplicaInspection struct {
	Region string `json:"region"`
	// Applied says that the replica serves the digest of the Inspection.
	Applied bool `json:"applied"`
	// Digest is what the replica shows; empty if nothing.
	Digest string `json:"digest,omitempty"`
	// Behind says that Digest is an earlier version, which the replica had before and has still: no push that is yet to be
	// noticed.
	Behind bool `json:"behind,omitempty"`
	// Gone says that it showed the digest of the Inspection and shows nothing now: a deletion that is yet to be confirmed.
	Gone bool `json:"gone,omitempty"`
	// Awaits is what an operator has to decide before anything is brought there or taken from there.
	Awaits string `json:"awaits,omitempty"`
	// Failed is how the last attempt failed to bring it there, as far as the process that was asked knows; it is tried again.
	Failed string `json:"failed,omitempty"`
	// Error is why it could not be looked at.
	Error string `json:"error,omitempty"`
	// NotReplicable is why it will never be applied there.
	NotReplicable string `json:"not_replicable,omitempty"`
	// Excused is why nobody need wait for the replica: no clients are sent there.
	Excused string `json:"excused,omitempty"`
}

// Inspect looks at a tag, or at a digest, in every replica of a registry now, and accounts for what it sees as a scan would.
func (r *Replicator) Inspect(ctx context.Context, registry, repository, reference string) (Inspection, error) {
	reg, err := r.registry(registry)
	if err != nil {
		return Inspection{}, err
	}
	key := keyOf(registry, repository, reference)
	var out Inspection
	replicas := reg.all()
	slices.SortFunc(replicas, func(a, b *running) int { return compareRegions(a.replica, b.replica) })
	shown := make([]ReplicaInspection, len(replicas))
	var wg sync.WaitGroup
	for n, one := range replicas {
		wg.Go(func() { shown[n] = one.inspect(ctx, key) })
	}
	wg.Wait()
	row, err := reg.engine.get(ctx, key)
	if err != nil {
		return out, err
	}
	out.Digest, out.Replicas = row.Record.Head.Digest, shown
	if key.Kind == ledger.Manifest && row.Revision == 0 {
		out.Digest = reference // known by its tag alone, or not at all: what the replicas show tells
	}
	for _, p := range row.Record.History {
		if p.Digest != ledger.Absent && !slices.Contains(out.Earlier, p.Digest) {
			out.Earlier = append(out.Earlier, p.Digest)
		}
	}
	if head := row.Record.Head; head.Sequence > 0 && head.Tombstone() {
		out.Deleted = head.Latest().UTC()
	}
	everywhere := true
	for n := range shown {
		shown[n].Applied = shown[n].Error == "" && shown[n].Digest == out.Digest && out.Digest != ledger.Absent
		everywhere = everywhere && shown[n].Applied
	}
	if everywhere {
		return out, nil
	}
	refused, err := reg.engine.refusals(ctx, row)
	for n := range shown {
		if !shown[n].Applied {
			shown[n].NotReplicable = refused[replicas[n].current().Incarnation]
		}
	}
	return out, err
}

// excuse is why no clients are sent to the replica; empty if they may be.
func (r *replica) excuse() string {
	switch state := r.current(); {
	case state.Status == topology.Deleting:
		return "it is being deleted"
	case !state.Seeded && r.config.Region != r.of.config.Home:
		return "it has not been seeded yet"
	}
	return ""
}

// awaits is what an operator has to decide before anything is done for the replica; empty if nothing.
func (r *replica) awaits() string {
	name := r.of.name + "/" + r.config.Region
	switch state := r.current(); {
	case r.isAccepted():
		return ""
	case state.Held != "":
		return "the guard holds it: see portolan replica show " + name
	case state.Phase == topology.PhasePlanned:
		return "its plan has conflicts and waits for portolan replica accept " + name
	}
	return ""
}

func (r *replica) inspect(ctx context.Context, key ledger.Key) ReplicaInspection {
	out := ReplicaInspection{Region: r.config.Region, Awaits: r.awaits(), Failed: r.queue.failure(key), Excused: r.excuse()}
	remote := r.remote.Load()
	if remote == nil {
		r.mu.Lock()
		out.Error = r.reading.reason
		r.mu.Unlock()
		return out
	}
	digest, err := remote.Head(ctx, key.Repository, key.Reference)
	if err != nil {
		out.Error = err.Error()
		return out
	}
	out.Digest = digest
	m, state := r.member(), r.current()
	if m == nil || !decided(state) || state.Held != "" || key.Kind == ledger.Manifest {
		return out
	}
	row, err := r.of.engine.get(ctx, key)
	if err == nil {
		shows := version.Observation{Digest: digest, Now: r.of.engine.now()}
		switch version.Observe(row.Record, r.of.fleet().replicas, m.Replica, r.of.engine.rules.Policy, shows).Verdict {
		case version.Successor:
			// A push that no event told of yet: a pipeline that waits for it need not wait for a scan.
			_, err = r.of.engine.observe(ctx, m, key, evidence{since: state.LastScan})
		case version.Unchanged:
			out.Behind = digest != ledger.Absent
		case version.Suspect:
			out.Gone = true
		}
	}
	if err != nil && !errors.Is(err, errAgain) {
		out.Error = err.Error()
	}
	return out
}

// Pending lists up to limit of what cannot be read at a replica, and of what it has still to be brought to, or never will be: each
// image once, what this process knows, if it works for the replica.
func (r *Replicator) Pending(registry, region string, limit int) []PendingItem {
	reg, err := r.registry(registry)
	if err != nil {
		return nil
	}
	one := reg.replica(region)
	if one == nil {
		return nil
	}
	one.mu.Lock()
	items := one.unreadable()
	one.mu.Unlock()
	var pending []PendingItem
	for _, waits := range one.queue.list(limit + len(items)) {
		n, found := slices.BinarySearchFunc(items, waits.Image, func(i PendingItem, image string) int { return strings.Compare(i.Image, image) })
		if found { // what is to be brought there fails for the same reason
			items[n].Attempts, items[n].NotReplicable = waits.Attempts, waits.NotReplicable
			continue
		}
		pending = append(pending, waits)
	}
	items = append(items, pending...)
	return items[:min(limit, len(items))]
}

// Unreplicated is what would stay in one replica alone if replication of its registry ended now.
type Unreplicated struct {
	Region string `json:"region"`
	// Reason names the pushes, or says why it is not known whether there are any: a sentence for people.
	Reason string `json:"reason"`
}

// Unreplicated tells of which replicas of a registry pushes are in no other yet, as far as events and scans have told; none of a
// registry with a single replica.
func (r *Replicator) Unreplicated(ctx context.Context, registry string) ([]Unreplicated, error) {
	reg, err := r.registry(registry)
	if err != nil {
		return nil, err
	}
	all := reg.all()
	if len(all) < 2 {
		return nil, nil
	}
	slices.SortFunc(all, func(a, b *running) int { return compareRegions(a.replica, b.replica) })
	var found []Unreplicated
	for _, one := range all {
		reason, err := one.unreplicated(ctx)
		if err != nil {
			return nil, fmt.Errorf("looking for what only %s/%s has: %w", registry, one.config.Region, err)
		}
		if reason != "" {
			found = append(found, Unreplicated{one.config.Region, reason})
		}
	}
	return found, nil
}
