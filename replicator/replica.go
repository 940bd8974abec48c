package replicator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"portolan/replicator/events"
	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/store"
	"portolan/topology"
)

// replica is one replica as this process works for it: it hears its events, and, while it holds the lease, baselines and
// scans it, and writes to it.
type replica struct {
	of     *registry
	config *topology.Replica
	queue  *queue
	log    *zap.Logger
	// budget is how many requests a second scans may make.
	budget *rate.Limiter
	// look asks for a scan before its time.
	look chan struct{}
	// lease is how long this process may still write to the replica; nil: it may not.
	lease atomic.Pointer[store.Grant]
	// remote speaks to the registry; nil until what it needs (a CA, a client certificate) could be read. opened is closed then.
	remote atomic.Pointer[remote]
	opened chan struct{}

	// saving is held while the state is changed and stored.
	saving sync.Mutex

	mu       sync.Mutex
	state    topology.Replication
	revision uint64          // of the state in the store; zero: it is not there
	former   version.Replica // what stood at the endpoint before, as long as others may believe that it still does
	reading  trouble
	writing  trouble
	doubted  time.Time              // since when the guard would hold the replica; zero: it would not
	accepted bool                   // the operator accepts what the guard holds, or the baseline's plan
	leaving  string                 // what a delete waits for
	unheard  map[ledger.Key]misread // what events told of and cannot be looked at
	unread   map[ledger.Key]misread // what the last look at it could not read
	worked   time.Time              // when something was last brought to it
	restart  context.CancelCauseFunc
}

// misread is why a tag, or a manifest, cannot be looked at, and since when.
type misread struct {
	since time.Time
	err   error
}

// maxUnheard bounds how many of these are kept for people to see.
const maxUnheard = 1000

// trouble is why a replica cannot be used at the moment, and since when.
type trouble struct {
	reason string // empty: it can
	since  time.Time
}

func (t *trouble) note(err error) {
	if t.reason == "" {
		t.since = time.Now()
	}
	t.reason = err.Error()
}

// lasting reports whether it has lasted so long that the status should say so.
func (t trouble) lasting() bool { return t.reason != "" && time.Since(t.since) > troubleTime }

var (
	errResync  = errors.New("a new baseline was asked for")
	errRenewed = errors.New("the replica's state was replaced")
	errRemoved = errors.New("the replica's state was removed")
	errGone    = errors.New("the replica was deleted")

	errUndecided = errors.New("the baseline, or an operator, comes first")
)

// removedTime is how long a replica whose state was removed is left alone: it goes with the replica, or with its registry, of
// which the topology tells within seconds. A state that was made anew by then would be taken for that of the next registry of
// the name.
const removedTime = 30 * time.Second

// troubleTime is how long a replica may be unusable before its status says so: shorter standstills are retries.
const troubleTime = 5 * time.Second

func newReplica(of *registry, config *topology.Replica, known stored) *replica {
	return &replica{of: of, state: known.Replication, revision: known.revision, config: config, queue: newQueue(time.Now), log: of.log.With(zap.String("region", config.Region)),
		look: make(chan struct{}, 1), opened: make(chan struct{}),
		budget: rate.NewLimiter(rate.Limit(of.options.RequestsPerSecond), max(1, int(of.options.RequestsPerSecond)))}
}

func (r *replica) current() topology.Replication {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// succeeded returns the incarnation before this one, while others may not know yet that it is gone.
func (r *replica) succeeded() (version.Replica, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.former, r.former.Incarnation != ""
}

// last returns the state with its revision.
func (r *replica) last() stored {
	r.mu.Lock()
	defer r.mu.Unlock()
	return stored{r.state, r.revision}
}

// describes reports whether a state is about the ledger as it is, and about what stands at the replica's endpoint.
func (r *replica) describes(s topology.Replication) bool {
	return r.of.knows(s) && s.Endpoint == r.config.Endpoint.String() && s.Prefix == r.config.Access.Prefix
}

// decided reports whether what the replica holds is in the ledger, so that observations there mean something.
func decided(s topology.Replication) bool {
	return s.Phase == topology.PhaseSeeding || s.Phase == topology.PhaseBaselined
}

// mayOwe reports whether pushes may have been accepted at the replica that no other has.
func mayOwe(s topology.Replication) bool { return decided(s) || s.Former }

// member returns the replica as the fleet has it, or nil while it has no incarnation.
func (r *replica) member() *member { return r.of.fleet().member(r.current().Incarnation) }

// remaining is how long the lease certainly lasts.
func (r *replica) remaining() time.Duration {
	if g := r.lease.Load(); g != nil {
		return g.Remaining()
	}
	return 0
}

// run works for the replica until ctx is done.
func (r *replica) run(ctx context.Context) error {
	defer func() {
		if remote := r.remote.Load(); remote != nil {
			remote.close()
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.open(ctx) })
	lease := store.NewLease(r.of.options.Store, topology.LeaseKey(r.of.name, r.config.Region), r.of.options.Holder, store.LeaseOptions{
		Failed: func(err error) {
			r.log.Warn("the lease for writes to the replica cannot be had; trying again", zap.Error(err))
		},
	})
	g.Go(func() error {
		return lease.Run(ctx, func(ctx context.Context, grant store.Grant) {
			r.lease.Store(&grant)
			defer r.lease.Store(nil)
			// Whoever has the lease next tells of the replica.
			defer r.of.metrics.forgetState(r.of.name, r.config.Region)
			for ctx.Err() == nil {
				err := r.lead(ctx)
				switch {
				case errors.Is(err, errGone):
					<-ctx.Done() // the topology will tell
				case errors.Is(err, errRemoved):
					sleep(ctx, removedTime)
				}
				if ctx.Err() == nil && !errors.Is(err, errResync) {
					r.log.Warn("working for the replica failed; trying again", zap.Error(err))
					sleep(ctx, time.Second)
				}
			}
		})
	})
	if r.of.options.Spool != nil && r.of.config.Policy.Replication {
		g.Go(func() error { return r.hear(ctx) })
	}
	return g.Wait()
}

// openAgain is the time between two attempts to read what connections to the replica need.
const openAgain = 5 * time.Second

// open makes the replica's remote. What it needs may lie in files that come, or become right, later.
func (r *replica) open(ctx context.Context) error {
	for {
		remote, err := newRemote(r.config, r.of.options.UserAgent, newID, r.log)
		if err == nil {
			r.remote.Store(remote)
			r.of.muster()
			close(r.opened)
			return nil
		}
		r.log.Error("the replica cannot be used", zap.Error(err))
		r.fault(&r.reading, err)
		if !sleep(ctx, openAgain) {
			return ctx.Err()
		}
	}
}

// lead does what only the holder of the lease may do, until ctx is done or something has to begin anew.
func (r *replica) lead(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.mu.Lock()
	r.restart = cancel
	r.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.obey(ctx) })
	if r.of.config.Policy.Replication {
		if err := r.identify(ctx); err != nil {
			cancel(err)
			return errors.Join(err, g.Wait())
		}
		for range r.of.options.Copies {
			g.Go(func() error { return r.work(ctx) })
		}
		g.Go(func() error { return r.keep(ctx) })
		g.Go(func() error { return r.report(ctx) })
	}
	err := g.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// identify loads what is known of the replica, or gives it an incarnation if what stands at the endpoint is new.
func (r *replica) identify(ctx context.Context) error {
	state, revision, err := r.load(ctx)
	if err != nil {
		return err
	}
	known := r.describes(state)
	if !known {
		state = r.unknown(state, "nothing is known of its content yet")
	}
	if !decided(state) && r.config.Region == r.of.config.Home {
		// Where no replica's content is in the ledger, what stands there is of an earlier registry of that name, or of
		// another life of the ledger. It says nothing about this one, its deletes least of all.
		others, err := r.of.anyDecided(ctx)
		if err == nil && !others {
			err = r.of.engine.purge(ctx)
		}
		if err != nil {
			return err
		}
	}
	r.adopt(state, revision)
	if !decided(state) {
		r.queue.clear() // of a former incarnation
	}
	if known {
		return nil
	}
	return r.save(ctx, func(*topology.Replication) {})
}

// unknown is the state of a replica of which nothing is known: a new incarnation after that of the state before.
func (r *replica) unknown(before topology.Replication, reason string) topology.Replication {
	next := topology.Replication{Status: topology.Creating, Reason: reason, Incarnation: newID(), Endpoint: r.config.Endpoint.String(),
		Prefix: r.config.Access.Prefix, Epoch: r.of.epoch, Phase: topology.PhaseUnknown}
	next.Served = before.Seeded || before.Served
	// At another endpoint stands other content.
	next.Former = mayOwe(before) && before.Endpoint == next.Endpoint && before.Prefix == next.Prefix
	return next
}

// load reads the state and its revision; the zero state at revision zero if there is none.
func (r *replica) load(ctx context.Context) (topology.Replication, uint64, error) {
	var state topology.Replication
	entry, err := r.of.options.Store.Get(ctx, topology.ReplicationKey(r.of.name, r.config.Region))
	if errors.Is(err, store.ErrNotFound) {
		return state, 0, nil
	}
	if err == nil {
		err = json.Unmarshal([]byte(entry.Value), &state)
	}
	if err != nil {
		return state, 0, fmt.Errorf("reading the state of %s/%s: %w", r.of.name, r.config.Region, err)
	}
	return state, entry.Revision, nil
}

// save changes the replica's state and stores it. Only the holder of the lease calls it. A state that somebody removed
// meanwhile (with its replica, or its registry) is not brought back: then the work for the replica begins anew.
func (r *replica) save(ctx context.Context, change func(*topology.Replication)) error {
	return r.saveOf(ctx, "", change)
}

// saveOf is save for what was found out about an incarnation: of another one it says nothing, and is errRenewed.
func (r *replica) saveOf(ctx context.Context, incarnation string, change func(*topology.Replication)) error {
	r.saving.Lock()
	defer r.saving.Unlock()
	for range attempts {
		r.mu.Lock()
		old, revision := r.state, r.revision
		r.mu.Unlock()
		if incarnation != "" && incarnation != old.Incarnation {
			return errRenewed
		}
		next := old
		change(&next)
		next.Updated = time.Now().UTC().Truncate(time.Millisecond)
		value, err := json.Marshal(next)
		if err != nil {
			return err
		}
		committed, err := r.of.options.Store.Commit(ctx, store.PutIf(topology.ReplicationKey(r.of.name, r.config.Region), string(value), revision))
		if err == nil {
			r.adopt(next, committed)
			return nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("storing the state of %s/%s: %w", r.of.name, r.config.Region, err)
		}
		stored, revision, err := r.load(ctx)
		if err != nil {
			return err
		}
		if revision == 0 {
			r.startOver(errRemoved)
			return errRemoved
		}
		if stored.Incarnation != old.Incarnation && stored.Incarnation != next.Incarnation {
			r.startOver(errRenewed)
			return errRenewed
		}
		r.adopt(stored, revision) // an own write whose outcome was not seen
	}
	return fmt.Errorf("storing the state of %s/%s: %w", r.of.name, r.config.Region, errAgain)
}

// startOver ends what is done under the lease; lead begins anew.
func (r *replica) startOver(why error) {
	r.mu.Lock()
	restart := r.restart
	r.mu.Unlock()
	restart(why)
}

// adopt takes over a state that is stored, and tells the fleet if it concerns it.
func (r *replica) adopt(next topology.Replication, revision uint64) {
	r.mu.Lock()
	old := r.state
	r.state, r.revision = next, revision
	switch {
	case decided(next):
		r.former = version.Replica{} // whoever decides knows of this one: see ledger.Generation
	case old.Incarnation != next.Incarnation && r.of.knows(old):
		r.former = identity(r.config.Region, old)
	}
	r.mu.Unlock()
	if old.Incarnation != next.Incarnation || old.Phase != next.Phase {
		r.of.muster()
	}
}

// learn takes over a state that another process stored.
func (r *replica) learn(next topology.Replication, revision uint64) {
	r.saving.Lock()
	defer r.saving.Unlock()
	if r.lease.Load() == nil && revision >= r.last().revision {
		r.adopt(next, revision)
	}
}

// wait is a scan's pace: the request budget of the replica, after a rest.
func (r *replica) wait(ctx context.Context, rest time.Duration) error {
	if rest > 0 && !sleep(ctx, rest) {
		return ctx.Err()
	}
	return r.budget.Wait(ctx)
}

// keep brings the replica from unknown to baselined, and from then on scans it.
func (r *replica) keep(ctx context.Context) error {
	select {
	case <-r.opened:
	case <-ctx.Done():
		return ctx.Err()
	}
	for attempt := 0; r.current().Phase != topology.PhaseBaselined; attempt++ {
		err := r.baseline(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			r.fault(&r.reading, err)
			r.log.Warn("the baseline was interrupted", zap.Error(err))
			sleep(ctx, max(retryAfter(err), backoff(attempt, 2*time.Second, 30*time.Second)))
		}
	}
	for {
		// Whoever believes that the replica is not baselined would take a delete there for something that never was there.
		err := r.of.options.Ledger.Advance(ctx, r.of.name)
		if err == nil {
			err = r.of.fill(ctx, r)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			break
		}
		r.log.Warn("what the replica lacks cannot be read; trying again", zap.Error(err))
		sleep(ctx, time.Second)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.seed(ctx) })
	g.Go(func() error { return r.scans(ctx) })
	return g.Wait()
}

// seed waits until the replica has had all that it lacked when it was baselined, and says so: from then on it gets clients.
func (r *replica) seed(ctx context.Context) error {
	state := r.current()
	if state.Seeded {
		return nil
	}
	if err := r.queue.drained(ctx, time.Now()); err != nil {
		return err
	}
	for {
		err := r.saveOf(ctx, state.Incarnation, func(s *topology.Replication) { s.Seeded = true })
		if err == nil || ctx.Err() != nil || errors.Is(err, errRenewed) || errors.Is(err, errRemoved) {
			return ctx.Err()
		}
		r.log.Warn("that the replica is seeded could not be stored; trying again", zap.Error(err))
		sleep(ctx, time.Second)
	}
}

// scans scans the replica again and again.
func (r *replica) scans(ctx context.Context) error {
	for {
		again := r.of.options.ScanInterval
		if !r.scan(ctx) {
			again = min(again, 10*time.Second) // sooner than a whole interval, but not at once
		}
		timer := time.NewTimer(jitter(again))
		select {
		case <-timer.C:
		case <-r.look:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// parkTime is how long what cannot be applied rests before it is tried once more.
const parkTime = time.Hour

// scan scans the replica once, and reports whether that went well.
func (r *replica) scan(ctx context.Context) bool {
	m := r.member()
	if m == nil {
		return false
	}
	r.mu.Lock()
	sure := r.accepted && r.state.Held != ""
	since := r.state.LastScan
	r.mu.Unlock()
	began := time.Now().UTC()
	if since.IsZero() {
		since = began
	}
	s, err := r.of.engine.scan(ctx, m, since, r.wait, sure)
	if ctx.Err() != nil {
		return false
	}
	r.of.metrics.scans.WithLabelValues(r.of.name, r.config.Region, result(err)).Observe(time.Since(began).Seconds())
	if err != nil {
		r.fault(&r.reading, err)
		r.log.Warn("the scan was interrupted", zap.Error(err))
		return false
	}
	r.fine(&r.reading)
	r.missed(s.unread)
	if r.doubts(s, began) {
		r.log.Warn("much of the replica is gone or old at once; it is looked at again, because events may tell of it yet", zap.Int("tags", s.tags), zap.Int("regressions", s.regressions))
		return false
	}
	held := ""
	if s.guarded {
		held = fmt.Sprintf("%d of %d tags vanished or went back to older versions since the last scan, with no event telling of it: "+
			"'portolan replica resync' if it was restored or wiped, 'portolan replica accept' if this is right", s.regressions, s.tags)
		r.log.Error("the guard holds the replica: too much of it is gone or old at once", zap.Int("tags", s.tags), zap.Int("regressions", s.regressions))
	}
	err = r.saveOf(ctx, m.Incarnation, func(state *topology.Replication) {
		if state.Held = held; held == "" {
			state.LastScan = began
		}
	})
	if err != nil {
		r.log.Warn("the scan's outcome could not be stored", zap.Error(err))
		return false
	}
	r.queue.unpark(time.Now().Add(-parkTime))
	if sure {
		r.mu.Lock()
		r.accepted = false
		r.mu.Unlock()
		r.retract(ctx, topology.RequestAccept)
	}
	return true
}

const (
	// doubtTime is how long what the guard found is doubted at least: the events of a clean-up may be on their way still, or
	// come again after this process was away; registries repeat what got no answer within seconds.
	doubtTime = 5 * time.Second
	// maxDoubt ends the doubt also while events wait: some that can never be accounted for must not keep the guard open.
	maxDoubt = 2 * time.Minute
)

// missed keeps what the last look at the replica could not read.
func (r *replica) missed(unread []unread) {
	if len(unread) > 0 {
		r.log.Warn("some of the replica cannot be read; what is pushed there goes nowhere", zap.Int("tags", len(unread)), zap.Error(unread[0].err))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.unread
	r.unread = make(map[ledger.Key]misread, len(unread))
	for _, u := range unread {
		since := time.Now()
		if f, known := before[u.key]; known {
			since = f.since
		}
		r.unread[u.key] = misread{since, u.err}
	}
}

// unreadable lists what cannot be read at the replica, by image: whatever is pushed there goes nowhere. The caller holds mu.
func (r *replica) unreadable() []PendingItem {
	all := maps.Clone(r.unread)
	for key, f := range r.unheard {
		if known, ok := all[key]; !ok {
			if all == nil {
				all = make(map[ledger.Key]misread)
			}
			all[key] = f
		} else if f.since.Before(known.since) {
			all[key] = misread{f.since, known.err}
		}
	}
	list := make([]PendingItem, 0, len(all))
	for key, f := range all {
		list = append(list, PendingItem{Image: key.String(), Since: f.since.UTC(), Error: f.err.Error(), Unreadable: true})
	}
	slices.SortFunc(list, func(a, b PendingItem) int { return strings.Compare(a.Image, b.Image) })
	return list
}

// doubts reports whether what the guard would hold the replica for has to be looked at again first. Nothing is made of it
// meanwhile.
func (r *replica) doubts(s survey, now time.Time) bool {
	waiting := 0
	if r.of.options.Spool != nil {
		waiting = r.of.options.Spool.Pending(r.of.name, r.config.Region)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !s.guarded {
		r.doubted = time.Time{}
	}
	if !s.guarded || r.state.Held != "" || r.of.options.Spool == nil {
		return false
	}
	if r.doubted.IsZero() {
		r.doubted = now
	}
	least := min(doubtTime, r.of.options.ScanInterval)
	if waiting > 0 {
		least = maxDoubt
	}
	return now.Sub(r.doubted) < least
}

// retract removes a request that was carried out.
func (r *replica) retract(ctx context.Context, verb string) {
	if _, err := r.of.options.Store.Commit(ctx, store.Delete(topology.RequestKey(r.of.name, r.config.Region, verb))); err != nil && ctx.Err() == nil {
		r.log.Warn("a request that was carried out could not be removed", zap.String("request", verb), zap.Error(err))
	}
}

// owings is how many records a baseline writes at a time; ledgers write many in one transaction.
const owings = 16

// baseline learns what the replica holds, merges it, and writes down what it lacks.
func (r *replica) baseline(ctx context.Context) error {
	began := time.Now().UTC()
	if err := r.of.homeFirst(ctx, r); err != nil {
		return err
	}
	m := r.member()
	if m == nil {
		return errAgain
	}
	b, err := r.of.engine.compare(ctx, m, r.wait)
	if err != nil {
		return err
	}
	r.fine(&r.reading)
	if r.current().Phase != topology.PhaseSeeding {
		r.log.Info("the baseline's plan", zap.Int("tags", b.plan.Tags), zap.Int("same", b.plan.Same), zap.Int("copy", b.plan.Copy),
			zap.Int("adopt", b.plan.Adopt), zap.Int("conflicts", b.plan.Conflicts), zap.Int64("bytes", b.plan.Bytes))
		if b.plan.Conflicts > 0 && r.of.config.Policy.Merge == topology.MergeAsk {
			if err := r.ask(ctx, m, b.plan); err != nil {
				return err
			}
			// Time has passed: look again, and go on with what is there now.
			if b, err = r.of.engine.compare(ctx, m, r.wait); err != nil {
				return err
			}
		}
	}
	if err := r.of.engine.adopt(ctx, m, b, r.wait); err != nil {
		return err
	}
	if err := r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		if s.Phase != topology.PhaseSeeding {
			s.Plan = &b.plan
		}
		s.Phase, s.Status, s.Reason = topology.PhaseSeeding, topology.Syncing, ""
	}); err != nil {
		return err
	}
	// What was accepted is this plan. Left standing, it would let the next wipe pass the guard.
	r.mu.Lock()
	r.accepted = false
	r.mu.Unlock()
	r.retract(ctx, topology.RequestAccept)
	r.missed(b.unread)
	for _, d := range b.due {
		r.queue.add(d.key, d.sequence, true, began) // it need not wait for the last of them
	}
	g, writing := errgroup.WithContext(ctx)
	g.SetLimit(owings)
	for _, d := range b.due {
		g.Go(func() error { return r.of.engine.owe(writing, m, d) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("writing down what %s lacks: %w", m.Region, err)
	}
	return r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		s.Phase, s.LastScan = topology.PhaseBaselined, began
	})
}

// ask shows the plan and waits for the operator to accept it.
func (r *replica) ask(ctx context.Context, m *member, plan topology.Plan) error {
	err := r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		s.Phase, s.Plan = topology.PhasePlanned, &plan
		*s = r.assess(*s)
	})
	if err != nil {
		return err
	}
	for {
		r.mu.Lock()
		accepted := r.accepted
		r.accepted = false
		r.mu.Unlock()
		if accepted {
			return nil
		}
		select {
		case <-r.look:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// lookNow wakes whoever waits for the next scan or for an operator.
func (r *replica) lookNow() {
	select {
	case r.look <- struct{}{}:
	default:
	}
}

// work takes what is due and applies it.
func (r *replica) work(ctx context.Context) error {
	for {
		i, err := r.queue.take(ctx)
		if err != nil {
			return err
		}
		m, state := r.member(), r.current()
		if m == nil || !decided(state) || state.Held != "" {
			// A new baseline, or an operator, comes first.
			r.queue.retry(i, time.Second, nil)
			continue
		}
		began := time.Now()
		// Where events come, the event of a push that is met on the way dates it better than the meeting does.
		cost, err := r.of.engine.apply(ctx, m, i.key, state.LastScan, i.attempts == 0 && r.of.options.Spool != nil)
		if ctx.Err() != nil {
			r.queue.retry(i, 0, nil)
			return ctx.Err()
		}
		r.of.metrics.copied(r.of.name, r.config.Region, cost, err, began)
		r.settle(ctx, m, i, err)
	}
}

const (
	// maxGone is how often content is looked for in vain before a tag is given up for the time being, maxGoneManifest before
	// a manifest's membership is forgotten: over a quarter of an hour, in which a referrer's subject may still come.
	maxGone, maxGoneManifest = 8, 12
	// maxRefused is how often a registry may refuse the same before it is taken at its word.
	maxRefused = 5
	// maxFailed is how often the same may fail while the replica takes everything else, before it rests for parkTime: for minutes.
	maxFailed = 9
)

// stuck reports whether the trouble is the item's, whatever it looks like: the replica took something else since it began to fail,
// or the last look at the replica could read others but not that.
func (r *replica) stuck(i *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, unread := r.unread[i.key]
	return i.attempts > 0 && r.worked.After(i.failing) || unread
}

// settle gives an item back to the queue as its outcome demands.
func (r *replica) settle(ctx context.Context, m *member, i *item, err error) {
	var never *NotReplicableError
	var unavailable *UnavailableError
	switch {
	case err == nil:
		r.queue.done(i)
		r.fine(&r.writing)
		r.mu.Lock()
		r.worked = time.Now()
		r.mu.Unlock()
	case errors.As(err, &never):
		r.log.Warn("not replicable", zap.String("image", i.key.String()), zap.String("reason", never.Reason))
		r.park(ctx, m, i, never.Reason)
	case errors.As(err, &unavailable) && !r.stuck(i):
		r.fault(&r.writing, err)
		wait := max(unavailable.RetryAfter, backoff(i.attempts, time.Second, 30*time.Second))
		r.queue.block(time.Now().Add(wait), unavailable.RetryAfter > 0)
		r.queue.retry(i, wait, err)
	case errors.Is(err, errPush):
		r.queue.retry(i, 2*time.Second, err)
	case errors.Is(err, errRegressed):
		r.lookNow()
		r.queue.retry(i, backoff(i.attempts, 5*time.Second, time.Minute), err)
	case errors.Is(err, errLease):
		r.queue.retry(i, time.Second, nil)
	case errors.Is(err, errAgain):
		// Somebody else was quicker. Where that does not end, something is wrong.
		r.queue.retry(i, backoff(i.races, 20*time.Millisecond, 10*time.Second), nil)
	case errors.Is(err, ErrUnsupported), errors.Is(err, ErrRefused) && i.attempts >= maxRefused:
		r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error())
	case errors.Is(err, ErrGone) && i.key.Kind == ledger.Manifest && i.attempts >= maxGoneManifest:
		r.log.Warn("a manifest is in no replica any more; it is no longer looked for", zap.String("image", i.key.String()))
		if err := r.of.engine.forgetGone(ctx, i.key); err != nil {
			r.queue.retry(i, time.Second, err)
			return
		}
		r.queue.done(i)
	case errors.Is(err, errUnreadable) && i.attempts >= maxGone, errors.Is(err, ErrGone) && i.key.Kind == ledger.Tag && i.attempts >= maxGone:
		r.log.Warn("no replica gives the content any more", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error())
	case unavailable != nil && i.attempts >= maxFailed:
		r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, fmt.Sprintf("failed %d times: %v", i.attempts+1, err))
	default:
		r.log.Debug("a copy failed", zap.String("image", i.key.String()), zap.Int("attempt", i.attempts+1), zap.Error(err))
		r.queue.retry(i, backoff(i.attempts, 500*time.Millisecond, 5*time.Minute), err)
	}
}

// park gives up on an item for the time being, once the record says why.
func (r *replica) park(ctx context.Context, m *member, i *item, reason string) {
	if err := r.of.engine.refuse(ctx, m, i.key, i.begun, reason); err != nil {
		r.queue.retry(i, time.Second, err)
		return
	}
	r.queue.park(i, reason)
}

// hearings is how many events of one replica are looked at at a time.
const hearings = 8

// hear observes what the replica's events tell.
func (r *replica) hear(ctx context.Context) error {
	var hearing sync.WaitGroup
	defer hearing.Wait()
	free := make(chan struct{}, hearings)
	for {
		if m, state := r.member(), r.current(); m == nil || !decided(state) || state.Held != "" {
			// The baseline, or an operator, comes first.
			if !sleep(ctx, 100*time.Millisecond) {
				return ctx.Err()
			}
			continue
		}
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		items, err := r.of.options.Spool.Take(ctx, r.of.name, r.config.Region, 1)
		if err != nil {
			<-free
			if ctx.Err() != nil || errors.Is(err, events.ErrClosed) {
				return err
			}
			// Scans and copies go on without events.
			r.log.Error("the spooled events cannot be read; trying again", zap.Error(err))
			if !sleep(ctx, time.Second) {
				return ctx.Err()
			}
			continue
		}
		hearing.Go(func() {
			defer func() { <-free }()
			for _, i := range items {
				r.listen(ctx, i)
			}
		})
	}
}

// listen looks at what an item of the spool is about, and gives it back to the spool as the outcome demands.
func (r *replica) listen(ctx context.Context, i events.Item) {
	err := r.observe(ctx, i)
	if err == nil {
		err = r.of.options.Spool.Done(ctx, i)
	}
	r.heed(ctx, i, err)
	if err == nil {
		return
	}
	// The longer it takes, the longer it is likely to take: what changed meanwhile within milliseconds most often.
	newest, _ := i.Newest()
	wait := time.Since(newest.Received) / 2
	if errors.Is(err, errAgain) {
		wait = min(max(wait, 10*time.Millisecond), time.Second)
	} else {
		wait = jitter(min(max(wait, time.Second), maxWait))
	}
	r.of.options.Spool.Release(wait, i)
}

// maxWait is the longest time between two looks at what an event told of and cannot be looked at.
const maxWait = 5 * time.Minute

// heed keeps why what an event told of cannot be looked at, or that it could.
func (r *replica) heed(ctx context.Context, i events.Item, err error) {
	key := keyOf(r.of.name, i.Repository, i.Reference)
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.unheard[key]
	switch {
	case err == nil || errors.Is(err, errAgain):
		delete(r.unheard, key)
	case ctx.Err() != nil || i.Reference == "" || errors.Is(err, errUndecided):
	case known || len(r.unheard) < maxUnheard:
		if !known {
			r.log.Warn("what an event told of cannot be looked at; trying again", zap.String("image", key.String()), zap.Error(err))
		}
		if r.unheard == nil {
			r.unheard = make(map[ledger.Key]misread)
		}
		r.unheard[key] = misread{i.Since, fmt.Errorf("looking at %s in %s: %w", key, r.config.Region, err)}
	}
}

// observe looks at what an item of the spool is about.
func (r *replica) observe(ctx context.Context, i events.Item) error {
	m, state := r.member(), r.current()
	if m == nil || !decided(state) || state.Held != "" {
		return errUndecided
	}
	if i.Repository == "" || i.Reference == "" {
		r.lookNow()
		return nil
	}
	key := keyOf(r.of.name, i.Repository, i.Reference)
	ev := r.evidence(i, state.LastScan)
	if key.Kind == ledger.Manifest {
		return r.of.engine.observeManifest(ctx, m, key, ev)
	}
	_, err := r.of.engine.observe(ctx, m, key, ev)
	if err == nil && len(i.Evidence) > 0 {
		r.of.metrics.heard.WithLabelValues(r.of.name, r.config.Region).Observe(time.Since(i.Since).Seconds())
	}
	return err
}

// evidence is what an item's events tell.
func (r *replica) evidence(i events.Item, since time.Time) evidence {
	ev := evidence{since: since}
	for _, e := range i.Evidence {
		// The registry's clock, corrected by what is known of it; nothing has happened after it was heard of.
		at := e.Received
		if remote := r.remote.Load(); remote != nil && !e.Time.IsZero() {
			if t := remote.serverTime(e.Time); t.Before(at) {
				at = t
			}
		}
		at = at.UTC().Truncate(time.Millisecond)
		switch {
		case e.Action == events.Push:
			ev.pushes = append(ev.pushes, push{
				Event:   version.Event{Digest: e.Digest, Time: at, WriteID: e.WriteID},
				heard:   e.Received,
				byOther: e.UserAgent != "" && e.WriteID == "",
			})
		case e.WriteID != "":
			ev.erased = e.WriteID
		default:
			ev.deletedAt, ev.deleteHeard = at, e.Received
		}
	}
	return ev
}

// obey carries out what operators ask.
func (r *replica) obey(ctx context.Context) error {
	requests := make(chan map[string]topology.Request, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return r.of.options.Store.Watch(ctx, r.requestsPrefix(), func(u store.Update) {
			if u.Err != nil {
				return
			}
			select {
			case <-requests:
			default:
			}
			requests <- r.requests(u.Tree)
		})
	})
	g.Go(func() error {
		for {
			select {
			case asked := <-requests:
				if err := r.carryOut(ctx, asked); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	return g.Wait()
}

func (r *replica) requestsPrefix() string {
	return strings.TrimSuffix(topology.RequestKey(r.of.name, r.config.Region, "x"), "x")
}

// requests reads what operators ask of the replica, by the verb.
func (r *replica) requests(tree store.Tree) map[string]topology.Request {
	asked := make(map[string]topology.Request)
	for _, e := range tree.Entries {
		var request topology.Request
		if err := json.Unmarshal([]byte(e.Value), &request); err != nil {
			r.log.Warn("a request is not understood", zap.String("key", e.Key), zap.Error(err))
			continue
		}
		asked[strings.TrimPrefix(e.Key, r.requestsPrefix())] = request
	}
	return asked
}

func (r *replica) carryOut(ctx context.Context, asked map[string]topology.Request) error {
	if request, ok := asked[topology.RequestDelete]; ok {
		return r.leave(ctx, request)
	}
	return r.compareOrAccept(ctx, asked)
}

// compareOrAccept carries out what operators ask about the replica's content. A new baseline ends the work under way: errResync.
func (r *replica) compareOrAccept(ctx context.Context, asked map[string]topology.Request) error {
	if request, ok := asked[topology.RequestResync]; ok {
		r.log.Info("a new baseline was asked for", zap.String("by", request.Actor))
		if !r.of.config.Policy.Replication {
			r.retract(ctx, topology.RequestResync)
			return nil
		}
		if remote := r.remote.Load(); remote != nil {
			remote.target.Forget()
		}
		if err := r.save(ctx, func(s *topology.Replication) { *s = r.unknown(*s, "a new baseline was asked for") }); err != nil {
			return err
		}
		r.mu.Lock()
		r.accepted = false
		r.mu.Unlock()
		r.retract(ctx, topology.RequestResync)
		r.startOver(errResync)
		return errResync
	}
	if request, ok := asked[topology.RequestAccept]; ok {
		r.mu.Lock()
		// Before the plan is there, as 'replica create --accept' asks, it is accepted beforehand.
		before := r.accepted
		r.accepted = r.state.Held != "" || !decided(r.state)
		accepted := r.accepted
		r.mu.Unlock()
		if !accepted || !r.of.config.Policy.Replication {
			r.retract(ctx, topology.RequestAccept) // there is nothing to accept
			return nil
		}
		if !before {
			r.log.Info("accepted", zap.String("by", request.Actor))
			r.lookNow()
		}
	}
	return nil
}

// maxNamed bounds how many pushes that would be lost are named.
const maxNamed = 20

// leave ends the replica: clients have been sent elsewhere when the last answer has expired, and every push that only it
// has must have reached another replica. Its content stays.
func (r *replica) leave(ctx context.Context, request topology.Request) error {
	status := func(reason string) {
		r.mu.Lock()
		r.leaving = reason
		r.mu.Unlock()
	}
	if wait := time.Until(request.Time.Add(r.of.options.Drain)); wait > 0 && r.mayBeAsked(ctx) {
		status("draining: the last answer that names it expires at " + request.Time.Add(r.of.options.Drain).UTC().Format(time.RFC3339))
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
	}
	for r.of.config.Policy.Replication && mayOwe(r.current()) {
		waits, err := r.owes(ctx)
		if err != nil {
			waits = "whether its pushes are elsewhere cannot be told: " + err.Error()
		}
		if waits == "" {
			break
		}
		status(waits)
		// What it waits for may take an operator, and force may be asked for later.
		asked := map[string]topology.Request{topology.RequestDelete: request}
		if tree, err := r.of.options.Store.List(ctx, r.requestsPrefix()); err == nil {
			asked = r.requests(tree)
		}
		if request.Force || asked[topology.RequestDelete].Force {
			r.log.Warn("the replica is deleted by force", zap.String("lost", waits))
			// Whoever asked follows the status, which ends with the replica: what is lost has to stand there for a while.
			err := r.save(ctx, func(s *topology.Replication) { s.Status, s.Reason = topology.Deleting, waits })
			if err != nil {
				return fmt.Errorf("saying what is lost with replica %s/%s: %w", r.of.name, r.config.Region, err)
			}
			if !sleep(ctx, lastWords) {
				return ctx.Err()
			}
			break
		}
		if err := r.compareOrAccept(ctx, asked); err != nil {
			return err
		}
		if !sleep(ctx, 500*time.Millisecond) {
			return ctx.Err()
		}
	}
	if err := r.of.options.Remove(ctx, r.of.name, r.config.Region); err != nil {
		return fmt.Errorf("removing replica %s/%s: %w", r.of.name, r.config.Region, err)
	}
	r.log.Info("the replica was deleted; its content was left as it is")
	return errGone
}

// mayBeAsked reports whether answers that name the replica may be kept somewhere: it gets clients once it was seeded, or always
// where nothing is replicated.
func (r *replica) mayBeAsked(ctx context.Context) bool {
	if !r.of.config.Policy.Replication {
		return true
	}
	state, _, err := r.load(ctx) // as whoever worked for it before stored it
	return err != nil || mayOwe(state) || state.Served
}

// lastWords is how long a replica that is deleted by force says what is lost: commands look twice a second, and may be slow.
const lastWords = 5 * time.Second

// owes says what would be lost with the replica; empty if nothing would.
func (r *replica) owes(ctx context.Context) (string, error) {
	m := r.member()
	if m == nil {
		return "", errors.New("nothing can be asked of it yet")
	}
	state := r.current()
	if !decided(state) {
		return r.undecided(state)
	}
	if state.Held != "" {
		return heldBack(state), nil
	}
	// One last look: pushes of the final minutes whose events were lost.
	if s, err := r.of.engine.scan(ctx, m, state.LastScan, r.wait, false); err != nil || s.guarded {
		if err == nil {
			err = errors.New("too much of it is gone or old at once")
		}
		return "", err
	}
	// What it holds under damaged records is known when it was decided anew.
	if err := r.of.engine.mend(ctx, []*member{m}); err != nil {
		return "", err
	}
	return r.alone(ctx, m)
}

// alone says what is known to be at the replica only, or is not looked at yet; empty if there is nothing.
func (r *replica) alone(ctx context.Context, m *member) (string, error) {
	if r.of.options.Spool != nil {
		if n := r.of.options.Spool.Pending(r.of.name, r.config.Region); n > 0 {
			return counted(n, "tag or manifest", "tags and manifests") + " that events told of: to be looked at first", nil
		}
	}
	only, err := r.of.engine.onlyAt(ctx, m)
	if err != nil || len(only) == 0 {
		return "", err
	}
	return counted(len(only), "push is", "pushes are") + " in no other replica yet: " + strings.Join(only[:min(len(only), maxNamed)], ", "), nil
}

// unreplicated says, without a look at the replica, what would stay there alone if replication ended now, or why that is not
// known; empty if nothing would.
func (r *replica) unreplicated(ctx context.Context) (string, error) {
	state, m := r.current(), r.member()
	switch {
	case !mayOwe(state):
		return "", nil
	case m == nil:
		return "nothing can be asked of it yet", nil
	case !decided(state):
		why, err := r.undecided(state)
		if err != nil { // why it cannot be compared
			why = err.Error()
		}
		return why, nil
	case state.Held != "":
		return heldBack(state), nil
	}
	return r.alone(ctx, m)
}

func heldBack(state topology.Replication) string {
	return "the guard holds what was observed there: " + state.Held
}

// undecided says what has to come to pass before it is known what only the replica has.
func (r *replica) undecided(state topology.Replication) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.reading.reason != "":
		return "", errors.New(r.reading.reason)
	case state.Phase == topology.PhasePlanned:
		return fmt.Sprintf("what only it has is decided when its plan is accepted: 'portolan replica accept %s/%s'", r.of.name, r.config.Region), nil
	}
	return "what only it has is known when its content was compared", nil
}

// fault notes that the replica as a whole cannot be read, or written.
func (r *replica) fault(t *trouble, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t.note(err)
}

// fine notes that it can. A replica that can be read again is worth a try.
func (r *replica) fine(t *trouble) {
	r.mu.Lock()
	recovered := t.reason != ""
	t.reason = ""
	r.mu.Unlock()
	if recovered {
		r.queue.unblock()
	}
}

// report keeps the stored state true: at most once a second, and only what changed.
func (r *replica) report(ctx context.Context) error {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	var last time.Time
	for {
		old := r.current()
		next := r.assess(old)
		r.of.metrics.state(r.of.name, r.config.Region, next)
		urgent := next.Status != old.Status || next.Pending == 0 && old.Pending != 0
		next.Updated = old.Updated
		if !same(next, old) && (urgent || time.Since(last) > time.Second) {
			last = time.Now()
			err := r.save(ctx, func(s *topology.Replication) {
				s.Status, s.Reason, s.Pending, s.OldestPending = next.Status, next.Reason, next.Pending, next.OldestPending
				s.NotReplicable, s.Unreadable, s.Conflicts, s.LastError = next.NotReplicable, next.Unreadable, next.Conflicts, next.LastError
			})
			if err != nil && ctx.Err() == nil {
				r.log.Warn("the replica's state could not be stored", zap.Error(err))
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func same(a, b topology.Replication) bool {
	return a.Status == b.Status && a.Reason == b.Reason && a.Pending == b.Pending && a.OldestPending.Equal(b.OldestPending) &&
		a.NotReplicable == b.NotReplicable && a.Unreadable == b.Unreadable && a.Conflicts == b.Conflicts && a.LastError == b.LastError
}

// assess says in which state the replica is.
func (r *replica) assess(s topology.Replication) topology.Replication {
	b := r.queue.backlog()
	s.Pending, s.NotReplicable, s.OldestPending, s.LastError = b.pending, b.parked, b.oldest.UTC(), b.lastError
	if b.oldest.IsZero() {
		s.OldestPending = time.Time{}
	}
	s.Conflicts = r.of.conflicts()
	homeFirst := r.config.Region != r.of.config.Home && !r.of.homeDecided()
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.pending == 0 {
		r.writing = trouble{} // nothing is left that could show it
	}
	unreadable := r.unreadable()
	if s.Unreadable = len(unreadable); s.Unreadable > 0 && s.LastError == "" {
		s.LastError = fmt.Sprintf("%s cannot be read there; the first: %s", counted(s.Unreadable, "tag", "tags"), unreadable[0].Error)
	}
	s.Status, s.Reason = topology.Ready, ""
	switch {
	case r.leaving != "":
		s.Status, s.Reason = topology.Deleting, r.leaving
	case s.Held != "":
		s.Status, s.Reason = topology.Degraded, s.Held
	case r.reading.lasting():
		s.Status, s.Reason = topology.Degraded, r.reading.reason
		if s.Phase == topology.PhaseUnknown {
			s.Status = topology.Creating
		}
	case r.writing.lasting():
		s.Status, s.Reason = topology.Degraded, r.writing.reason
	case s.Phase == topology.PhaseUnknown:
		s.Status, s.Reason = topology.Creating, "its content is being compared"
		if homeFirst {
			s.Reason = "the baseline of the home replica comes first"
		}
	case s.Phase == topology.PhasePlanned && s.Plan != nil:
		s.Status, s.Reason = topology.Creating, fmt.Sprintf("%s from the other replicas: look at the plan, then 'portolan replica accept %s/%s'",
			counted(s.Plan.Conflicts, "tag differs", "tags differ"), r.of.name, r.config.Region)
	case !s.Seeded:
		s.Status, s.Reason = topology.Syncing, "being seeded"
		if s.LastError != "" {
			s.Reason += "; " + s.LastError
		}
	case s.Pending > 0 && s.OldestPending.Before(s.LastScan):
		s.Status, s.Reason = topology.Syncing, "versions that were decided before the last scan are on their way"
	}
	return s
}

// sourcesOf orders the other members by their distance from m.
func sourcesOf(m *member, all []*member, distance func(a, b string) int) []*member {
	var sources []*member
	for _, s := range all {
		if s != m {
			sources = append(sources, s)
		}
	}
	slices.SortFunc(sources, func(a, b *member) int {
		if d := distance(m.Region, a.Region) - distance(m.Region, b.Region); d != 0 {
			return d
		}
		return strings.Compare(a.Region, b.Region)
	})
	return sources
}

// backoff doubles from first with every attempt, up to limit, with jitter.
func backoff(attempt int, first, limit time.Duration) time.Duration {
	return jitter(min(limit, first<<min(attempt, 20)))
}

// jitter spreads d over its upper half, so that what failed together does not come back together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// sleep waits, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// counted is a number with its noun.
func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func compareRegions(a, b *replica) int { return strings.Compare(a.config.Region, b.config.Region) }

// keyOf is the key of a tag, or of a digest.
func keyOf(registry, repository, reference string) ledger.Key {
	key := ledger.Key{Registry: registry, Repository: repository, Kind: ledger.Tag, Reference: reference}
	if digestLike(reference) {
		key.Kind = ledger.Manifest
	}
	return key
}

// digestLike reports whether a reference is a digest: tags have no colon.
func digestLike(reference string) bool { return strings.Contains(reference, ":") }
