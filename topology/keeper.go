package topology

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/latest"
	"portolan/store"
)

const (
	// startPatience is how long a start waits for the store before the topology on disk is served: a store that is there
	// answers in milliseconds, and serving an old topology for a moment would be worse than waiting.
	startPatience = 2 * time.Second
	// callTimeout bounds one call to the store.
	callTimeout = 3 * time.Second
	// stampRetry is the pause after a failed attempt to note the time of a change: a store that is away is asked gently.
	stampRetry = time.Second
	// saveRetry is the pause after a failed attempt to write the last good topology to disk.
	saveRetry = 10 * time.Second
)

// KeeperOptions are the settings of a Keeper.
type KeeperOptions struct {
	// LastGoodPath is the file for the last good topology; empty: none is kept.
	LastGoodPath string
	// Saved is told the outcome of each attempt to write it: nil if it is on disk. It may be nil.
	Saved func(error)
	// Reserved are labels that neither a registry nor a region may have: whoami and those of the name servers.
	Reserved []string
	// Logger and Registerer may be nil.
	Logger     *zap.Logger
	Registerer prometheus.Registerer
}

// Keeper follows the topology in a store and holds the newest snapshot. A store cannot hurt it: what is invalid, too large a
// deletion, or away, leaves the last good values in place.
//
// A change is parsed and published on the goroutine that hears of it; there is no delay to gather changes, since a
// watcher delivers those that come meanwhile as one. All methods may be called from several goroutines.
type Keeper struct {
	store   store.Store
	options KeeperOptions
	log     *zap.Logger
	metrics keeperMetrics

	snapshot latest.Value[Snapshot]
	status   latest.Value[KeeperStatus]
	wake     chan struct{} // one token: something new was heard
	stamps   chan string   // one digest: a change whose time is to be noted

	mu         sync.Mutex // guards heard
	registries heard
	state      heard

	// What follows belongs to the goroutine of evaluate.
	good     Values
	used     map[string]uint64
	pending  []Pending
	started  bool // something was published
	expiry   *time.Timer
	retry    *time.Timer // when save is due again after a failure
	unsaved  bool        // the last attempt failed
	fromDisk *lastGood
	saved    lastGood
	problems []Problem // as logged
	upSince  time.Time
	up       bool
}

// heard is the newest update of a watch.
type heard struct {
	update store.Update
	any    bool // an update came
	tree   bool // a tree was read
}

// KeeperStatus is what a Keeper knows of itself and the store.
type KeeperStatus struct {
	// StoreUp is whether the store can be read; StoreError is why not; Since when.
	StoreUp    bool   `json:"store_up"`
	StoreError string `json:"store_error,omitempty"`
	// StoreLost is whether that is because it has lost its keys: it can be written to.
	StoreLost bool      `json:"store_lost,omitempty"`
	Since     time.Time `json:"since"`
	// Loaded is whether there is a topology; FromDisk whether it is the one on local disk because the store was not read yet.
	Loaded   bool `json:"loaded"`
	FromDisk bool `json:"from_disk"`
	// Revision is the store's revision of the topology; Changed and Digest are the snapshot's.
	Revision uint64    `json:"revision"`
	Changed  time.Time `json:"changed,omitzero"`
	Digest   string    `json:"digest"`
	Problems []Problem `json:"problems"`
	// Pending are the raw edits that wait for a confirmation.
	Pending []Pending `json:"pending"`
}

type keeperMetrics struct {
	problems, pending, ramps, revision, up prometheus.Gauge
}

// NewKeeper makes a Keeper of s. Run starts it.
func NewKeeper(s store.Store, o KeeperOptions) *Keeper {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "portolan", Subsystem: "topology", Name: name, Help: help})
	}
	k := &Keeper{
		store: s, options: o, log: o.Logger, wake: make(chan struct{}, 1), stamps: make(chan string, 1),
		used: map[string]uint64{}, upSince: time.Now(), expiry: time.NewTimer(math.MaxInt64), retry: time.NewTimer(math.MaxInt64),
		metrics: keeperMetrics{
			problems: gauge("problems", "Values of the topology that were refused, kept or left out."),
			pending:  gauge("guard_pending", "Registries with a raw deletion that waits for a confirmation."),
			ramps:    gauge("ramps", "Replicas whose weight is on its way to another."),
			revision: gauge("revision", "Revision of the store that the topology was read at."),
			up:       gauge("store_up", "Whether the store can be read: 1 or 0."),
		},
	}
	if k.log == nil {
		k.log = zap.NewNop()
	}
	if o.Registerer != nil {
		o.Registerer.MustRegister(k.metrics.problems, k.metrics.pending, k.metrics.ramps, k.metrics.revision, k.metrics.up)
	}
	k.status.Store(&KeeperStatus{Since: k.upSince, StoreError: "not read yet", Problems: []Problem{}, Pending: []Pending{}})
	return k
}

// Snapshot returns the newest snapshot, or nil before the first one.
func (k *Keeper) Snapshot() *Snapshot { return k.snapshot.Load() }

// Watch calls deliver with the newest snapshot, at once if there is one and after every change, until ctx is done. A
// snapshot whose meaning is the one before's (equal Digest) differs in its problems or its time.
func (k *Keeper) Watch(ctx context.Context, deliver func(*Snapshot)) error {
	return k.snapshot.Watch(ctx, deliver)
}

// Wait returns the newest snapshot, waiting for the first one if need be.
func (k *Keeper) Wait(ctx context.Context) (*Snapshot, error) { return k.snapshot.Wait(ctx, nil) }

// Status returns what is known now.
func (k *Keeper) Status() KeeperStatus { return *k.status.Load() }

// Run follows the store until ctx is done, and returns its error; its goroutines have ended then. It may be called once.
func (k *Keeper) Run(ctx context.Context) error {
	if k.options.LastGoodPath != "" {
		g, err := readLastGood(k.options.LastGoodPath)
		if err != nil {
			k.log.Error("the last good topology cannot be used", zap.Error(err))
		}
		if g != nil {
			k.fromDisk, k.saved = g, *g
			_, k.good = Parse(g.Values, nil, k.options.Reserved)
			maps.Copy(k.used, g.Used)
		}
	}
	group, ctx := errgroup.WithContext(ctx)
	follow := func(prefix string, into *heard) func() error {
		return func() error {
			err := k.store.Watch(ctx, prefix, func(u store.Update) {
				k.mu.Lock()
				into.update, into.any, into.tree = u, true, into.tree || u.Err == nil
				k.mu.Unlock()
				select {
				case k.wake <- struct{}{}:
				default:
				}
			})
			if ctx.Err() == nil {
				return fmt.Errorf("watching %s: %w", prefix, err)
			}
			return ctx.Err()
		}
	}
	group.Go(follow(RegistriesPrefix, &k.registries))
	group.Go(follow(topologyPrefix, &k.state))
	group.Go(func() error { return k.stamper(ctx) })
	group.Go(func() error {
		patience := time.NewTimer(startPatience)
		defer patience.Stop()
		defer k.expiry.Stop()
		defer k.retry.Stop()
		for {
			select {
			case <-k.wake:
				k.evaluate(ctx, false)
			case <-patience.C:
				k.evaluate(ctx, true)
			case <-k.expiry.C:
				k.evaluate(ctx, false)
			case <-k.retry.C:
				k.save()
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	return group.Wait()
}

// evaluate makes a snapshot of what was heard and publishes it. waited: the store had its chance at the start.
func (k *Keeper) evaluate(ctx context.Context, waited bool) {
	k.mu.Lock()
	registries, state := k.registries, k.state
	k.mu.Unlock()
	if registries.any {
		k.noteStore(registries.update.Err)
	}
	stored := state.update.Tree
	switch {
	case registries.tree && !(state.any || waited || k.started):
		return // the other watch is about to say what is confirmed and when things changed
	case registries.tree:
	case !k.started && k.fromDisk != nil && (registries.any || waited):
		s, _ := Parse(k.fromDisk.Values, k.good, k.options.Reserved)
		s.Changed = k.fromDisk.Changed
		k.log.Warn("the store cannot be read: serving the last good topology from disk", zap.Int("registries", len(s.Registries)), zap.Time("changed", s.Changed))
		k.publish(s, 0, true, nil)
		return
	default:
		k.publishStatus(k.Snapshot())
		return
	}
	values := ValuesOf(registries.update.Tree)
	kept, held := guard(values, k.good, confirmations{stored, k.used})
	if len(held) > 0 && !slices.EqualFunc(held, k.pending, func(a, b Pending) bool { return reflect.DeepEqual(a, b) }) {
		// An edit that confirms itself does so in the same transaction, but its two halves are watched apart.
		if fresh, err := k.list(ctx, topologyPrefix); err == nil {
			stored = fresh
			kept, held = guard(values, k.good, confirmations{stored, k.used})
		}
	}
	s, good := Parse(kept, k.good, k.options.Reserved)
	for _, p := range held {
		s.Problems = append(s.Problems, Problem{
			Key: registryPrefix(p.Registry), Value: joinList(p.Remaining),
			Reason: fmt.Sprintf("an edit takes away %s and leaves less than half of the registry's replicas: %s", strings.Join(p.Missing, ", "), p.Way()),
			Effect: "what was taken away is still served",
		})
	}
	slices.SortStableFunc(s.Problems, func(a, b Problem) int { return strings.Compare(a.Key, b.Key) })
	k.logGuard(held)
	k.use(values, stored)
	first := !k.started
	before := k.Snapshot()
	now := time.Now()
	s.Changed = changedAt(stored, now)
	s.Challenges, _ = current(challenges(stored), now)
	k.expect(s.Challenges, now)
	s.Ramps, s.overtaken = values.underway()
	if before != nil && before.Changed.After(s.Changed) {
		s.Changed = before.Changed // it never goes backwards, whatever somebody writes
	}
	var changes []Change
	if before != nil && before.Digest != s.Digest {
		changes = diffValues(k.good, good)
	}
	k.good, k.pending = good, held
	k.publish(s, registries.update.Tree.Revision, false, changes)
	k.save()
	// A store that is empty at the start has no change to note; one that was emptied has.
	news := first && len(registries.update.Tree.Entries) > 0 || !first && before.Digest != s.Digest
	if news && storedDigest(stored) != s.Digest {
		select {
		case <-k.stamps: // an older digest nobody took yet
		default:
		}
		k.stamps <- s.Digest
	}
}

func (k *Keeper) list(ctx context.Context, prefix string) (store.Tree, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return k.store.List(ctx, prefix)
}

// confirmations are the consents in the store. Each lets an edit pass once: used are the revisions of those that did.
type confirmations struct {
	stored store.Tree
	used   map[string]uint64
}

func (c confirmations) regions(registry string) []string {
	e, ok := c.stored.Get(ConfirmedKey(registry))
	if value := strings.TrimSpace(e.Value); ok && value != confirmedGone {
		return splitList(value)
	}
	return nil
}

func (c confirmations) cover(registry string, regions []string) bool {
	e, ok := c.stored.Get(ConfirmedKey(registry))
	return ok && e.Revision != c.used[registry] && confirms(e.Value, regions)
}

// use notes which confirmations have come true: each lets an edit pass once, so that an old one cannot let pass, much
// later, a deletion that happens to leave the same regions.
func (k *Keeper) use(values Values, stored store.Tree) {
	now := present(values)
	for _, e := range stored.Entries {
		if registry, ok := strings.CutPrefix(e.Key, confirmedPrefix); ok && confirms(e.Value, now[registry]) {
			k.used[registry] = e.Revision
		}
	}
}

// expect has the snapshot made anew when the first of these challenges expires.
func (k *Keeper) expect(live []Challenge, now time.Time) {
	k.expiry.Stop()
	if len(live) > 0 {
		first := slices.MinFunc(live, func(a, b Challenge) int { return a.Expires.Compare(b.Expires) })
		k.expiry.Reset(first.Expires.Sub(now))
	}
}

// changedAt is the time of the newest change: an edit, or a challenge that expired before now.
func changedAt(stored store.Tree, now time.Time) time.Time {
	changed := storedTime(stored)
	if _, expired := current(challenges(stored), now); expired.After(changed) {
		return expired
	}
	return changed
}

func storedTime(stored store.Tree) time.Time {
	e, _ := stored.Get(changedKey)
	t, err := time.Parse(time.RFC3339, strings.TrimSpace(e.Value))
	if err != nil {
		return time.Time{}
	}
	return t.UTC()
}

func storedDigest(stored store.Tree) string {
	e, _ := stored.Get(digestKey)
	return e.Value
}

// publish makes s the newest snapshot unless it says nothing new. changes are those since the one before, for the log: also of edits that
// no Editor made.
func (k *Keeper) publish(s *Snapshot, revision uint64, fromDisk bool, changes []Change) {
	if !slices.Equal(s.Problems, k.problems) {
		for _, p := range s.Problems {
			if !slices.Contains(k.problems, p) {
				k.log.Warn("a value of the topology cannot be used", zap.String("key", p.Key), zap.String("value", p.Value), zap.String("reason", p.Reason), zap.String("effect", p.Effect))
			}
		}
		k.problems = s.Problems
	}
	old := k.Snapshot()
	news := old == nil || old.Digest != s.Digest || !old.Changed.Equal(s.Changed) || !slices.Equal(old.Problems, s.Problems) || !slices.Equal(old.Challenges, s.Challenges) ||
		!slices.Equal(old.Ramps, s.Ramps) || !slices.Equal(old.overtaken, s.overtaken)
	if !news {
		s = old
	} else {
		if old == nil || old.Digest != s.Digest {
			k.log.Info("topology", zap.Int("registries", len(s.Registries)), zap.Uint64("revision", revision), zap.String("digest", s.Digest[:12]), zap.Bool("from_disk", fromDisk), zap.Strings("changes", logged(changes)))
		}
	}
	k.started = true
	if !fromDisk {
		k.fromDisk = nil
	}
	k.metrics.problems.Set(float64(len(s.Problems)))
	k.metrics.pending.Set(float64(len(k.pending)))
	k.metrics.ramps.Set(float64(len(s.Ramps)))
	k.metrics.revision.Set(float64(revision))
	// The status first: whoever is woken by the snapshot finds one that knows of it.
	k.publishStatus(s)
	if news {
		k.snapshot.Store(s)
	}
}

// publishStatus says how things stand with s as the newest snapshot; nil: there is none yet.
func (k *Keeper) publishStatus(s *Snapshot) {
	k.mu.Lock()
	u := k.registries.update
	k.mu.Unlock()
	status := KeeperStatus{StoreUp: k.up, Since: k.upSince, Revision: u.Tree.Revision, Problems: []Problem{}, Pending: []Pending{}}
	if !k.up {
		status.StoreError = "not read yet"
		if u.Err != nil {
			status.StoreError, status.StoreLost = u.Err.Error(), errors.Is(u.Err, store.ErrLost)
		}
	}
	if s != nil {
		status.Loaded, status.FromDisk = true, k.fromDisk != nil
		status.Changed, status.Digest = s.Changed, s.Digest
		status.Problems = append(status.Problems, s.Problems...)
		status.Pending = append(status.Pending, k.pending...)
	}
	k.status.Store(&status)
}

// noteStore notes whether the store can be read, and says so when it changes.
func (k *Keeper) noteStore(err error) {
	up := err == nil
	if up != k.up {
		k.up, k.upSince = up, time.Now()
		if up {
			k.log.Info("the store can be read")
		} else {
			k.log.Error("the store cannot be read: the topology stays as it is", zap.Error(err))
		}
	}
	k.metrics.up.Set(0)
	if up {
		k.metrics.up.Set(1)
	}
}

func (k *Keeper) logGuard(held []Pending) {
	for _, p := range held {
		if !slices.ContainsFunc(k.pending, func(q Pending) bool { return reflect.DeepEqual(p, q) }) {
			k.log.Error("an edit that takes most of a registry away is held until it is confirmed", zap.String("registry", p.Registry), zap.Strings("missing", p.Missing), zap.Strings("remaining", p.Remaining))
		}
	}
	for _, q := range k.pending {
		if !slices.ContainsFunc(held, func(p Pending) bool { return p.Registry == q.Registry }) {
			k.log.Info("the held edit was confirmed or taken back", zap.String("registry", q.Registry))
		}
	}
}

// save writes the good values to disk if they are not what is there, and has it tried again if that fails: nothing else may change
// for days.
func (k *Keeper) save() {
	if k.options.LastGoodPath == "" {
		return
	}
	g := lastGood{Version: lastGoodVersion, Values: k.good, Changed: k.Snapshot().Changed, Used: maps.Clone(k.used)}
	if maps.Equal(g.Values, k.saved.Values) && g.Changed.Equal(k.saved.Changed) && maps.Equal(g.Used, k.saved.Used) && k.saved.Version == lastGoodVersion {
		return
	}
	err := g.write(k.options.LastGoodPath)
	if k.options.Saved != nil {
		k.options.Saved(err)
	}
	if err != nil {
		if !k.unsaved {
			k.log.Error("a start without the store will find an old topology, or none; trying again", zap.Error(err))
		}
		k.unsaved = true
		k.retry.Reset(saveRetry)
		return
	}
	k.saved, k.unsaved = g, false
}

// stamper notes in the store when the topology came to mean what it means, for edits that nobody noted: all servers take the
// time from there, and so have one DNS serial. The first server to write wins; the others see its digest and are content.
// A server stamps only when its own snapshot changed: two that mean different things do not fight. It does not stamp what it
// has left behind meanwhile: that would be one more change of the serial, after the change that came later.
func (k *Keeper) stamper(ctx context.Context) error {
	for {
		var digest string
		select {
		case digest = <-k.stamps:
		case <-ctx.Done():
			return ctx.Err()
		}
		for {
			err := k.stamp(ctx, digest)
			if err == nil {
				break
			}
			if !errors.Is(err, store.ErrConflict) {
				k.log.Warn("the time of a change cannot be noted in the store; trying again", zap.Error(err))
				select {
				case <-time.After(stampRetry):
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			select {
			case digest = <-k.stamps:
			default:
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
	}
}

func (k *Keeper) stamp(ctx context.Context, digest string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stored, err := k.store.List(ctx, topologyPrefix)
	if err != nil {
		return fmt.Errorf("reading %s: %w", topologyPrefix, err)
	}
	if storedDigest(stored) == digest || k.Snapshot().Digest != digest {
		return nil
	}
	_, err = k.store.Commit(ctx, stampOps(stored, digest, time.Now())...)
	if err != nil {
		return fmt.Errorf("writing %s: %w", changedKey, err)
	}
	return nil
}

// stampOps write the time of a change, later than any before, on condition that nobody else did meanwhile.
func stampOps(stored store.Tree, digest string, now time.Time) []store.Op {
	changed, _ := stored.Get(changedKey)
	was, _ := stored.Get(digestKey)
	t := now.UTC().Truncate(time.Second)
	if before := changedAt(stored, now); !t.After(before) {
		t = before.Add(time.Second)
	}
	return []store.Op{
		store.PutIf(changedKey, t.Format(time.RFC3339), changed.Revision),
		store.PutIf(digestKey, digest, was.Revision),
	}
}
