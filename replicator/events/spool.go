package events

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

var (
	// ErrClosed says that the spool was closed.
	ErrClosed = errors.New("spool is closed")
	// ErrInUse says that another process holds the spool's file.
	ErrInUse = errors.New("spool is in use by another process")
)

// Limits bound the spool. They hold for each replica by itself, so that a flood in one region costs no other. The zero
// value of a field is its default.
type Limits struct {
	// References is how many tags and digests may wait; beyond it the repository is marked instead. Default 10,000:
	// with the usual one or two events each that is some 5 MB on disk, and more than a scan of marked repositories
	// would be slower for.
	References int
	// Repositories is how many marked repositories may wait; beyond it the replica is marked instead. Default 1,000.
	Repositories int
	// Evidence is how many different things may be known of one reference; beyond it the oldest are dropped and the
	// reference is marked. Default 16: a tag pushed more often than that between two looks is a moving target. What was
	// pushed is not dropped with its push: it waits under its digest.
	Evidence int
	// Remembered is how many events are recognised when they come again after they were dealt with. Default 4,096: a
	// registry repeats what it got no answer for, which is the newest few.
	Remembered int
}

func (l Limits) withDefaults() Limits {
	l.References = cmp.Or(l.References, 10_000)
	l.Repositories = cmp.Or(l.Repositories, 1_000)
	l.Evidence = cmp.Or(l.Evidence, 16)
	l.Remembered = cmp.Or(l.Remembered, 4_096)
	return l
}

// Item is what is to be looked at. It is handed out until Done.
type Item struct {
	Registry, Region string
	// Repository is empty if the whole replica is to be scanned.
	Repository string
	// Reference is a tag or a digest (a digest has a colon); empty if the whole repository is to be scanned.
	Reference string
	// Evidence is what events told, the oldest first by the registry's clock. Of events that say the same (action,
	// digest and write id) only the newest is kept.
	Evidence []Event
	// Marked is when there was last more than Evidence tells, which was not kept; zero: there was not.
	Marked time.Time
	// Since is when the oldest of it was received.
	Since time.Time

	version uint64 // the newest sequence that it may hold
	hold    uint64
}

// Newest returns the last of the evidence; false if there is only a mark.
func (i Item) Newest() (Event, bool) {
	if len(i.Evidence) == 0 {
		return Event{}, false
	}
	return i.Evidence[len(i.Evidence)-1], true
}

// Spool is the queue between the replicas' events and the replicator: durable, bounded, and folded by reference.
//
// What Add acknowledged is handed out by Take, again and again (also after a restart), until Done. Items come in the
// order in which they first arrived. An item that is being worked on is handed to nobody else; what arrives for it
// meanwhile stays, by itself, when it is Done.
//
// One goroutine writes. It puts all that waits into one transaction, so that many replicas share an fsync and a
// single event waits for nobody.
//
// A file that is damaged is put aside: what it held is lost, so every replica that items are taken of is marked to be scanned.
//
// The file is a bolt database of one bucket "v1", with one bucket per replica ("registry/region") that holds four:
// items (repository, zero byte, reference -> record), order (sequence -> item), seen (fingerprint of an event ->
// nothing) and ring (sequence -> fingerprint, the oldest first).
type Spool struct {
	db     *bbolt.DB
	limits Limits
	// damage is what was wrong with the file that was put aside, aside where that is; nil and empty: nothing.
	damage error
	aside  string

	jobs    chan *job
	quit    chan struct{}
	stopped chan struct{}
	closing sync.Once

	mu     sync.Mutex
	told   func(error)       // see Tell
	counts map[string]counts // by replica
	leases map[lease]hold
	holds  uint64                   // counts what was handed out
	wake   map[string]chan struct{} // by replica; closed when there may be something new
	marked map[string]bool          // the replicas that were marked for the sake of the damage
}

type counts struct{ references, repositories, replica int }

func (c counts) all() int { return c.references + c.repositories + c.replica }

type lease struct{ replica, item string }

// hold says why an item is not handed out: somebody works on it, or until a time.
type hold struct {
	// id tells one handing out from another, so that giving back twice does not take from the next.
	id    uint64
	until time.Time // zero: until it is given back
}

// record is the stored form of an item.
type record struct {
	// Order is its place in the queue. It stays while the item waits, however often it is added to.
	Order  uint64     `json:"o"`
	Since  time.Time  `json:"t"`
	Events []evidence `json:"e,omitempty"`
	// Marked is the sequence of the newest mark; zero: none.
	Marked uint64 `json:"m,omitempty"`
	// MarkedAt is when it was set.
	MarkedAt time.Time `json:"ma,omitzero"`
}

type evidence struct {
	Sequence uint64 `json:"s"`
	Event
}

var (
	rootBucket  = []byte("v1")
	itemsBucket = []byte("items")
	orderBucket = []byte("order")
	seenBucket  = []byte("seen")
	ringBucket  = []byte("ring")
)

// lockTimeout is how long Open waits for the file's lock: a former process may still be ending.
const lockTimeout = time.Second

// Open opens or creates the spool in the file path, whose folder must exist. ErrInUse: another process has it open. A damaged file
// is renamed to path and ".damaged", in place of an older one there, and an empty spool begun.
func Open(path string, limits Limits) (*Spool, error) {
	damage, aside := inspect(path), ""
	if errors.Is(damage, errDamaged) {
		aside = path + ".damaged"
		if err := os.Rename(path, aside); err != nil {
			return nil, fmt.Errorf("opening event spool %q: %w: putting it aside: %w", path, damage, err)
		}
	} else if damage != nil {
		return nil, fmt.Errorf("opening event spool %q: %w", path, damage)
	}
	_, statErr := os.Stat(path)
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout: lockTimeout,
		// The free list is rebuilt at Open from at most a few thousand pages; written, it would be part of every commit.
		NoFreelistSync: true,
		FreelistType:   bbolt.FreelistMapType,
	})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, fmt.Errorf("opening event spool %q: %w", path, ErrInUse)
	}
	if err != nil {
		return nil, fmt.Errorf("opening event spool %q: %w", path, err)
	}
	s := &Spool{
		db: db, limits: limits.withDefaults(), damage: damage, aside: aside,
		jobs: make(chan *job), quit: make(chan struct{}), stopped: make(chan struct{}),
		told: func(error) {}, counts: map[string]counts{}, leases: map[lease]hold{}, wake: map[string]chan struct{}{}, marked: map[string]bool{},
	}
	if err := s.load(); err != nil {
		db.Close()
		return nil, fmt.Errorf("opening event spool %q: %w", path, err)
	}
	if errors.Is(statErr, os.ErrNotExist) {
		// bolt syncs the file, not the folder that names it.
		if err := syncFolder(filepath.Dir(path)); err != nil {
			db.Close()
			return nil, fmt.Errorf("opening event spool %q: %w", path, err)
		}
	}
	go s.run()
	return s, nil
}

func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// load counts what is there.
func (s *Spool) load() error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error {
			if !bytes.Equal(name, rootBucket) {
				return fmt.Errorf("it holds %q, which this version does not know: it was written by a newer one, or is no event spool", clip(string(name), 32))
			}
			return nil
		})
		if err != nil {
			return err
		}
		root, err := tx.CreateBucketIfNotExists(rootBucket)
		if err != nil {
			return err
		}
		return root.ForEachBucket(func(replica []byte) error {
			var c counts
			err := root.Bucket(replica).Bucket(itemsBucket).ForEach(func(key, _ []byte) error {
				c.add(string(key), 1)
				return nil
			})
			s.counts[string(replica)] = c
			return err
		})
	})
}

func (c *counts) add(item string, n int) {
	switch repository, reference := splitItem(item); {
	case reference != "":
		c.references += n
	case repository != "":
		c.repositories += n
	default:
		c.replica += n
	}
}

// Close ends the spool; calls that wait end with ErrClosed. What was acknowledged is on disk.
func (s *Spool) Close() error {
	var err error
	s.closing.Do(func() {
		close(s.quit)
		<-s.stopped
		err = s.db.Close()
	})
	return err
}

// Tell has the outcome of each transaction told from now on: nil if it is on disk, else what is wrong with the file or its disk. wrote
// is never called twice at once, and writing waits for it.
func (s *Spool) Tell(wrote func(error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.told = wrote
}

// Add keeps the events of a replica. When it returns nil they are on disk, folded or as a mark; an event that was added
// before, with the same id and content, is not kept again. After any error, one of ctx included, they may or may not be
// kept; adding them again does no harm.
func (s *Spool) Add(ctx context.Context, registry, region string, events []Event) error {
	replica, err := replicaKey(registry, region)
	if err != nil {
		return fmt.Errorf("spooling events: %w", err)
	}
	for _, e := range events {
		if err := e.Validate(); err != nil {
			return fmt.Errorf("spooling events of %s: %w", replica, err)
		}
	}
	if len(events) == 0 {
		return nil
	}
	if err := s.submit(ctx, func(c *change) error { return c.add(replica, events) }); err != nil {
		return fmt.Errorf("spooling events of %s: %w", replica, err)
	}
	return nil
}

// Mark keeps that a repository, or with an empty name the whole replica, is to be scanned. Errors are as with Add.
func (s *Spool) Mark(ctx context.Context, registry, region, repository string) error {
	replica, err := replicaKey(registry, region)
	if err == nil && repository != "" {
		err = checkRepository(repository)
	}
	if err == nil {
		err = s.submit(ctx, func(c *change) error {
			b, err := c.replica(replica)
			if err != nil {
				return err
			}
			return b.mark(repository, time.Now())
		})
	}
	if err != nil {
		return fmt.Errorf("marking %s/%s in the event spool: %w", registry, region, err)
	}
	return nil
}

// Take hands out up to limit items of a replica, the oldest first, and waits while there are none. It ends with the error of
// ctx, or ErrClosed. Every item must be given back with Done or Release.
func (s *Spool) Take(ctx context.Context, registry, region string, limit int) ([]Item, error) {
	replica, err := replicaKey(registry, region)
	if err != nil {
		return nil, fmt.Errorf("taking events: %w", err)
	}
	if err := s.markDamage(ctx, registry, region); err != nil {
		return nil, err
	}
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		items, wake, until, err := s.take(replica, limit, time.Now())
		if err != nil {
			return nil, fmt.Errorf("taking events of %s: %w", replica, err)
		}
		if len(items) > 0 {
			return items, nil
		}
		if err := wait(ctx, wake, s.quit, until); err != nil {
			return nil, err
		}
	}
}

// markDamage marks a replica once if a damaged file was put aside, which may have held events of it.
func (s *Spool) markDamage(ctx context.Context, registry, region string) error {
	s.mu.Lock()
	due := s.damage != nil && !s.marked[registry+"/"+region]
	s.mu.Unlock()
	if !due {
		return nil
	}
	if err := s.Mark(ctx, registry, region, ""); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.marked[registry+"/"+region] = true
	return nil
}

// wait returns when something may have changed, or at until if that is a time.
func wait(ctx context.Context, wake, quit <-chan struct{}, until time.Time) error {
	var due <-chan time.Time
	if !until.IsZero() {
		timer := time.NewTimer(time.Until(until))
		defer timer.Stop()
		due = timer.C
	}
	select {
	case <-wake:
	case <-due:
	case <-quit:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

// take returns the items that can be handed out now, or else what to wait for: a channel, and the time at which the first
// released item may be handed out again.
func (s *Spool) take(replica string, limit int, now time.Time) (items []Item, wake <-chan struct{}, until time.Time, err error) {
	registry, region, _ := strings.Cut(replica, "/")
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wake[replica] == nil {
		s.wake[replica] = make(chan struct{})
	}
	wake = s.wake[replica]
	if s.counts[replica].all() == 0 {
		return nil, wake, until, s.closed()
	}
	err = s.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(rootBucket).Bucket([]byte(replica))
		if b == nil {
			return nil
		}
		order := b.Bucket(orderBucket).Cursor()
		for k, key := order.First(); k != nil && len(items) < limit; k, key = order.Next() {
			l := lease{replica, string(key)}
			if h, held := s.leases[l]; held {
				if h.until.IsZero() {
					continue
				}
				if h.until.After(now) {
					if until.IsZero() || h.until.Before(until) {
						until = h.until
					}
					continue
				}
			}
			rec, err := readRecord(b.Bucket(itemsBucket), key)
			if err != nil {
				return err
			}
			if rec == nil {
				return fmt.Errorf("item %q is missing", key)
			}
			items = append(items, rec.item(registry, region, string(key), b.Sequence()))
		}
		return nil
	})
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		err = ErrClosed
	}
	if err != nil {
		return nil, nil, until, err
	}
	for n := range items {
		i := &items[n]
		s.holds++
		i.hold = s.holds
		s.leases[lease{replica, itemKey(i.Repository, i.Reference)}] = hold{id: i.hold}
	}
	return items, wake, until, nil
}

func (s *Spool) closed() error {
	select {
	case <-s.quit:
		return ErrClosed
	default:
		return nil
	}
}

// Done takes out what the items held when they were taken. What arrived for them since is handed out later. After an error
// they are handed out again.
func (s *Spool) Done(ctx context.Context, items ...Item) error {
	if len(items) == 0 {
		return nil
	}
	err := s.submit(ctx, func(c *change) error {
		for _, i := range items {
			if err := c.done(i); err != nil {
				return err
			}
		}
		return nil
	})
	s.release(time.Time{}, items)
	if err != nil {
		return fmt.Errorf("taking %d items out of the event spool: %w", len(items), err)
	}
	return nil
}

// Release gives back items that were not dealt with: they keep their place, and are not handed out again before delay has
// passed. After a restart the delay is forgotten.
func (s *Spool) Release(delay time.Duration, items ...Item) {
	var until time.Time
	if delay > 0 {
		until = time.Now().Add(delay)
	}
	s.release(until, items)
}

func (s *Spool) release(until time.Time, items []Item) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, i := range items {
		replica := i.Registry + "/" + i.Region
		l := lease{replica, itemKey(i.Repository, i.Reference)}
		if h, held := s.leases[l]; !held || h.id != i.hold || !h.until.IsZero() {
			continue // given back already, or forgotten with its replica
		}
		if until.IsZero() {
			delete(s.leases, l)
		} else {
			s.leases[l] = hold{id: i.hold, until: until}
		}
		s.wakeLocked(replica)
	}
}

func (s *Spool) wakeLocked(replica string) {
	if c := s.wake[replica]; c != nil {
		close(c)
		delete(s.wake, replica)
	}
}

// Pending is how many items of a replica wait or are being worked on.
func (s *Spool) Pending(registry, region string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.counts[registry+"/"+region].all()
}

// Oldest is when the first item in the queue of a replica was received; the zero time if there is none.
func (s *Spool) Oldest(registry, region string) (time.Time, error) {
	var oldest time.Time
	err := s.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(rootBucket).Bucket([]byte(registry + "/" + region))
		if b == nil {
			return nil
		}
		_, key := b.Bucket(orderBucket).Cursor().First()
		if key == nil {
			return nil
		}
		rec, err := readRecord(b.Bucket(itemsBucket), key)
		if err == nil && rec != nil {
			oldest = rec.Since
		}
		return err
	})
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		err = ErrClosed
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("reading the oldest event of %s/%s: %w", registry, region, err)
	}
	return oldest, nil
}

// Forget takes out everything of a replica that is no more.
func (s *Spool) Forget(ctx context.Context, registry, region string) error {
	replica, err := replicaKey(registry, region)
	if err == nil {
		err = s.submit(ctx, func(c *change) error { return c.forget(replica) })
	}
	if err != nil {
		return fmt.Errorf("forgetting the events of %s/%s: %w", registry, region, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.leases {
		if l.replica == replica {
			delete(s.leases, l)
		}
	}
	return nil
}

// Keys and records.

func replicaKey(registry, region string) (string, error) {
	if registry == "" || region == "" || strings.ContainsAny(registry+region, "/\x00") {
		return "", fmt.Errorf("%q and %q name no replica", clip(registry, 63), clip(region, 63))
	}
	return registry + "/" + region, nil
}

func itemKey(repository, reference string) string { return repository + "\x00" + reference }

func splitItem(key string) (repository, reference string) {
	repository, reference, _ = strings.Cut(key, "\x00")
	return repository, reference
}

func sequenceKey(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

func readRecord(items *bbolt.Bucket, key []byte) (*record, error) {
	v := items.Get(key)
	if v == nil {
		return nil, nil
	}
	var r record
	if err := json.Unmarshal(v, &r); err != nil {
		return nil, fmt.Errorf("reading item %q: %w", key, err)
	}
	return &r, nil
}

// item makes what is handed out; version is the newest sequence that it can hold.
func (r *record) item(registry, region, key string, version uint64) Item {
	i := Item{Registry: registry, Region: region, Marked: r.MarkedAt, Since: r.Since, version: version}
	i.Repository, i.Reference = splitItem(key)
	for _, e := range r.Events {
		e.Event.Repository = i.Repository
		i.Evidence = append(i.Evidence, e.Event)
	}
	// The sort is stable: without times, and among equal ones, arrival is the order.
	slices.SortStableFunc(i.Evidence, func(a, b Event) int { return a.when().Compare(b.when()) })
	return i
}

// when is the registry's time, or the receipt for want of one.
func (e Event) when() time.Time {
	if e.Time.IsZero() {
		return e.Received
	}
	return e.Time
}

// fold adds an event, and marks the record when there are more than limit different ones. It returns those that it then drops.
func (r *record) fold(e Event, sequence uint64, limit int) (dropped []evidence) {
	e.Received = e.Received.UTC().Round(0)
	if r.Since.IsZero() || e.Received.Before(r.Since) {
		r.Since = e.Received
	}
	for i, o := range r.Events {
		// The write id belongs to what is said: somebody's push of the same digest is not ours.
		if o.Action == e.Action && o.Digest == e.Digest && o.WriteID == e.WriteID {
			if e.when().Before(o.when()) {
				// Older than what is known: the newer stands, but what is said was said again.
				e = o.Event
			}
			r.Events = append(slices.Delete(r.Events, i, i+1), evidence{sequence, e})
			return nil
		}
	}
	r.Events = append(r.Events, evidence{sequence, e})
	if n := len(r.Events) - limit; n > 0 {
		dropped = slices.Clone(r.Events[:n])
		r.Events = slices.Delete(r.Events, 0, n)
		r.Marked, r.MarkedAt = sequence, e.Received
	}
	return dropped
}

// without returns what came after version; nil if nothing did.
func (r *record) without(version uint64) *record {
	left := &record{}
	for _, e := range r.Events {
		if e.Sequence > version {
			left.Events = append(left.Events, e)
			left.keepFirst(e.Sequence, e.Received)
		}
	}
	if r.Marked > version {
		left.Marked, left.MarkedAt = r.Marked, r.MarkedAt
		left.keepFirst(r.Marked, r.MarkedAt)
	}
	if left.Order == 0 {
		return nil
	}
	return left
}

func (r *record) keepFirst(sequence uint64, t time.Time) {
	if r.Order == 0 || sequence < r.Order {
		r.Order = sequence
	}
	if r.Since.IsZero() || t.Before(r.Since) {
		r.Since = t
	}
}

// fingerprint tells an event that came again. It covers the content, so that a wrong or reused id hides nothing.
func fingerprint(e Event) []byte {
	h := sha256.New()
	for _, s := range []string{e.ID, string(e.Action), e.Repository, e.Tag, e.Digest, e.WriteID} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		h.Write([]byte(s))
	}
	return h.Sum(nil)[:16]
}
