package replicator

import (
	"cmp"
	"container/heap"
	"context"
	"slices"
	"sync"
	"time"

	"portolan/replicator/ledger"
)

// queue is what one replica has still to be brought to. It is derived, not stored: whoever starts pages through the ledger
// and fills it anew. Fresh pushes come before seeding, and repositories take turns, so that nobody waits behind a large
// neighbour.
type queue struct {
	now func() time.Time

	mu      sync.Mutex
	items   map[ledger.Key]*item
	lanes   [2]lane // fresh, seeding
	delayed delayed
	// parked are the keys that cannot be applied here.
	parked map[ledger.Key]parked
	// blocked is until when the replica as a whole wants to be left alone.
	blocked time.Time
	// asked is until when it asked for that itself.
	asked   time.Time
	changed chan struct{} // closed and replaced whenever take may find something new
}

// item is one key of the queue.
type item struct {
	key     ledger.Key
	seeding bool
	since   time.Time
	// sequence is the newest version that is known to be due, begun the one that is being worked on.
	sequence, begun uint64
	tries
	state     itemState
	notBefore time.Time
	// again says that the key changed while it was being worked on.
	again bool
	// probe says that it is tried for all that are parked like it: see unpark.
	probe bool
}

// tries is what came of the tries to apply the version of an item that is due.
type tries struct {
	// failed counts those that failed, since failing; lastError says how the last one did.
	failed    int
	failing   time.Time
	lastError string
	// why is the cause of the last failure, streak how often in a row it was that.
	why    cause
	streak int
	// races counts how often it has to be looked at again, with nothing wrong.
	races int
}

// before is how often in a row the cause was that until now.
func (t *tries) before(why cause) int {
	if t.why != why {
		return 0
	}
	return t.streak
}

// parked is what will not succeed by being tried again soon.
type parked struct {
	reason   string
	sequence uint64
	since    time.Time
	rest     time.Duration // how long it is left alone at least; zero: it waits for a probe
}

type itemState uint8

const (
	waiting itemState = iota
	working
	delaying
)

// lane lets repositories take turns.
type lane struct {
	order []string
	lists map[string][]*item
}

func (l *lane) push(i *item) {
	if l.lists == nil {
		l.lists = make(map[string][]*item)
	}
	list, ok := l.lists[i.key.Repository]
	if !ok {
		l.order = append(l.order, i.key.Repository)
	}
	l.lists[i.key.Repository] = append(list, i)
}

func (l *lane) pop() *item {
	if len(l.order) == 0 {
		return nil
	}
	repository := l.order[0]
	l.order = l.order[1:]
	list := l.lists[repository]
	if len(list) > 1 {
		l.lists[repository] = list[1:]
		l.order = append(l.order, repository)
	} else {
		delete(l.lists, repository)
	}
	return list[0]
}

// delayed is a heap of items by the time before which they are not tried again.
type delayed []delay

// delay is a place in the heap. It counts while the item still is to wait until then.
type delay struct {
	*item
	until time.Time
}

func (d delayed) Len() int           { return len(d) }
func (d delayed) Less(i, j int) bool { return d[i].until.Before(d[j].until) }
func (d delayed) Swap(i, j int)      { d[i], d[j] = d[j], d[i] }
func (d *delayed) Push(x any)        { *d = append(*d, x.(delay)) }
func (d *delayed) Pop() any {
	old := *d
	i := old[len(old)-1]
	*d = old[:len(old)-1]
	return i
}

func newQueue(now func() time.Time) *queue {
	return &queue{now: now, items: make(map[ledger.Key]*item), parked: make(map[ledger.Key]parked), changed: make(chan struct{})}
}

// wake tells take that there may be something new. The caller holds mu.
func (q *queue) wake() {
	close(q.changed)
	q.changed = make(chan struct{})
}

// add puts a key in the queue, or notes that it changed if it is there. A new version has its turn at once, whatever became of the
// one before: what was parked or waits after failures gets another chance, and what waits to be seeded overtakes. A
// change of the record that is no new version (an intent of our own, above all) earns none of that.
func (q *queue) add(key ledger.Key, sequence uint64, seeding bool, since time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if p, ok := q.parked[key]; ok && sequence <= p.sequence {
		return
	}
	delete(q.parked, key)
	i, ok := q.items[key]
	if !ok {
		i := &item{key: key, sequence: sequence, seeding: seeding, since: since}
		q.items[key] = i
		q.push(i)
		return
	}
	newer := sequence > i.sequence
	i.sequence = max(i.sequence, sequence)
	switch {
	case i.state == working:
		i.again = true
	case newer && (i.state == delaying || i.seeding && !seeding):
		// Its former place in the heap or the other lane is passed over when its turn comes.
		i.seeding = i.seeding && seeding
		q.push(i)
	}
}

// push gives an item a place in its lane, and a fresh start. The caller holds mu.
func (q *queue) push(i *item) {
	i.state, i.again, i.probe, i.tries = waiting, false, false, tries{}
	q.lane(i).push(i)
	q.wake()
}

func (q *queue) lane(i *item) *lane {
	if i.seeding {
		return &q.lanes[1]
	}
	return &q.lanes[0]
}

// remove forgets a key that is no longer due. One that is being worked on is forgotten when the work is done.
func (q *queue) remove(key ledger.Key) {
	q.mu.Lock()
	defer q.mu.Unlock()
	delete(q.parked, key)
	if i, ok := q.items[key]; ok && i.state != working {
		// Its place in a lane or in the heap is passed over when its turn comes.
		delete(q.items, key)
	}
}

// take hands out the next item and waits while there is none. The item must be given back with done, retry or park.
func (q *queue) take(ctx context.Context) (*item, error) {
	for {
		q.mu.Lock()
		now := q.now()
		for len(q.delayed) > 0 && !q.delayed[0].until.After(now) {
			d := heap.Pop(&q.delayed).(delay)
			if i := d.item; q.items[i.key] == i && i.state == delaying && i.notBefore.Equal(d.until) {
				i.state = waiting
				q.lane(i).push(i)
			}
		}
		var next *item
		if !q.blocked.After(now) {
			for l := range q.lanes {
				for next == nil {
					i := q.lanes[l].pop()
					if i == nil {
						break
					}
					if q.items[i.key] == i && i.state == waiting {
						next = i
					}
				}
			}
		}
		if next != nil {
			next.state, next.begun = working, next.sequence
			q.mu.Unlock()
			return next, nil
		}
		changed := q.changed
		var timer <-chan time.Time
		if at := q.nextChange(now); !at.IsZero() {
			timer = time.After(at.Sub(now))
		}
		q.mu.Unlock()
		select {
		case <-changed:
		case <-timer:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// nextChange is when time alone gives take something to do; zero: never.
func (q *queue) nextChange(now time.Time) time.Time {
	if q.blocked.After(now) {
		return q.blocked // whatever waits in the lanes can be taken then
	}
	if len(q.delayed) > 0 {
		return q.delayed[0].until
	}
	return time.Time{}
}

// done gives an item back that needs no more work, unless it changed meanwhile. What waits for it as their probe gets another chance.
func (q *queue) done(i *item) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i.probe {
		for key, p := range q.parked {
			if p.rest == 0 && key.Kind == i.key.Kind {
				q.resume(key)
			}
		}
	}
	if i.again {
		q.push(i)
		return
	}
	delete(q.items, i.key)
	q.wake()
}

// retry gives an item back that has to be tried again after a while, and counts that.
func (q *queue) retry(i *item, after time.Duration, why cause, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if why == causeRace {
		i.races++
	} else {
		if i.failed == 0 {
			i.failing = q.now()
		}
		i.failed, i.lastError, i.why, i.streak = i.failed+1, err.Error(), why, i.before(why)+1
	}
	q.delay(i, after)
}

// postpone gives an item back for a while of which nothing was found out.
func (q *queue) postpone(i *item, after time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.delay(i, after)
}

// delay puts an item into the heap; or in its lane, if a new version came meanwhile. The caller holds mu.
func (q *queue) delay(i *item, after time.Duration) {
	if i.sequence > i.begun {
		q.push(i)
		return
	}
	i.again, i.state, i.notBefore = false, delaying, q.now().Add(after)
	heap.Push(&q.delayed, delay{i, i.notBefore})
	q.wake()
}

// park gives an item back that cannot be applied here, unless a new version came meanwhile. It rests at least that long; with a rest of
// zero, for what the registry does not support, until another of its kind, the probe, could be applied.
func (q *queue) park(i *item, reason string, rest time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i.sequence > i.begun {
		q.push(i)
		return
	}
	delete(q.items, i.key)
	q.parked[i.key] = parked{reason, i.sequence, q.now(), rest}
	q.wake()
}

// unpark gives what has rested another chance: a quota may have been raised since. Of what the registry does not support it takes one tag
// and one manifest as probes, by turns: deletion may have been switched on since, of one or the other, but thousands of requests need
// not find each time that it has not.
func (q *queue) unpark() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.now()
	probes := make(map[ledger.Kind]ledger.Key)
	for key, p := range q.parked {
		if p.rest > 0 {
			if now.Sub(p.since) >= p.rest {
				q.resume(key)
			}
			continue
		}
		if other, ok := probes[key.Kind]; !ok || p.since.Before(q.parked[other].since) {
			probes[key.Kind] = key
		}
	}
	for _, key := range probes {
		q.resume(key).probe = true
	}
}

// resume takes a key out of what is parked, and gives it a place in its lane. The caller holds mu.
func (q *queue) resume(key ledger.Key) *item {
	i := &item{key: key, sequence: q.parked[key].sequence, since: q.now()}
	delete(q.parked, key)
	q.items[key] = i
	q.push(i)
	return i
}

// block leaves the replica alone until then; asked says that it asked for that, so that unblock does not shorten it.
func (q *queue) block(until time.Time, asked bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if until.After(q.blocked) {
		q.blocked = until
	}
	if asked && until.After(q.asked) {
		q.asked = until
	}
}

// unblock ends a block: the replica was heard of.
func (q *queue) unblock() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.blocked.After(q.asked) {
		q.blocked = q.asked
		q.wake()
	}
}

// backlog is the state of a queue in figures.
type backlog struct {
	pending, parked int
	oldest          time.Time
	lastError       string
}

func (q *queue) backlog() backlog {
	q.mu.Lock()
	defer q.mu.Unlock()
	b := backlog{pending: len(q.items), parked: len(q.parked)}
	for _, i := range q.items {
		if b.oldest.IsZero() || i.since.Before(b.oldest) {
			b.oldest = i.since
		}
		if i.lastError != "" {
			b.lastError = i.key.String() + ": " + i.lastError
		}
	}
	return b
}

// PendingItem is something that a replica has still to be brought to, or never will be, or that cannot be read there.
type PendingItem struct {
	// Image is the tag or manifest, as registry/repository:tag or registry/repository@digest.
	Image string `json:"image"`
	// Since is when the version was decided, or when it was first found unreadable.
	Since    time.Time `json:"since,omitzero"`
	Attempts int       `json:"attempts"`
	// Error is what went wrong the last time; empty if nothing did.
	Error string `json:"error,omitempty"`
	// NotReplicable is why it can never be applied there; empty if it can.
	NotReplicable string `json:"not_replicable,omitempty"`
	// Unreadable says that the replica itself cannot give it, for Error: whatever was pushed there goes nowhere.
	Unreadable bool `json:"unreadable,omitempty"`
}

// failure is how the last attempt at a key failed; empty if it did not, or is not owed.
func (q *queue) failure(key ledger.Key) string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := q.items[key]; i != nil {
		return i.lastError
	}
	return ""
}

// list returns up to limit items, what failed first, then the oldest.
func (q *queue) list(limit int) []PendingItem {
	q.mu.Lock()
	var all []PendingItem
	for key, p := range q.parked {
		all = append(all, PendingItem{Image: key.String(), NotReplicable: p.reason})
	}
	for _, i := range q.items {
		all = append(all, PendingItem{Image: i.key.String(), Since: i.since, Attempts: i.failed, Error: i.lastError})
	}
	q.mu.Unlock()
	slices.SortFunc(all, func(a, b PendingItem) int {
		return cmp.Or(-cmp.Compare(a.NotReplicable, b.NotReplicable), -cmp.Compare(a.Attempts, b.Attempts), a.Since.Compare(b.Since), cmp.Compare(a.Image, b.Image))
	})
	return all[:min(limit, len(all))]
}

// drainedPause is the least time between two looks of drained at the whole queue, which may be long.
const drainedPause = 50 * time.Millisecond

// drained waits until nothing is left of what was decided before that time.
func (q *queue) drained(ctx context.Context, before time.Time) error {
	for {
		q.mu.Lock()
		left := false
		for _, i := range q.items {
			if left = !i.since.After(before); left {
				break
			}
		}
		changed := q.changed
		q.mu.Unlock()
		if !left {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
		if !sleep(ctx, drainedPause) {
			return ctx.Err()
		}
	}
}

// clear forgets everything.
func (q *queue) clear() {
	q.mu.Lock()
	defer q.mu.Unlock()
	clear(q.items)
	clear(q.parked)
	q.lanes, q.delayed, q.blocked, q.asked = [2]lane{}, nil, time.Time{}, time.Time{}
	q.wake()
}
