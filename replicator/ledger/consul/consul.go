// Package consul keeps the ledger in the KV store of a Consul datacenter, for installations of several machines.
//
// It lies in a folder beside the store's, so that rights can be given to either alone:
//
//	<prefix>-ledger/records/<registry>/<repository>,<kind>,<reference>   a record
//	<prefix>-ledger/generations/<registry>                               its revision is the registry's generation
//	<prefix>-ledger/feed/head                                            the newest position
//	<prefix>-ledger/feed/000 ... 255                                     the keys that changed at a position
//
// A comma sorts below every byte of a repository's name, so Consul's order is ledger.Compare's, and one question with
// the comma as separator names the repositories of a registry without their records.
//
// A write is one transaction: the record and the head by check-and-set, the slot of the next position, and the check of the
// generation. Writers of one process that wait for each other share a transaction and a position; those of several processes contend
// for the head, and the loser tries again.
//
// Limits. A Consul server holds every record in memory, 3 to 7 KB each with what it keeps around it: beyond some
// 100,000 records another engine is wanted. Page reads the names of a whole repository for each page of it, and lets the
// server walk the names of a registry to find the repository after it. A follower that falls more than 256 positions
// behind pages.
package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/replicator/ledger"
	"portolan/store"
	consulstore "portolan/store/consul"
)

var _ ledger.Ledger = (*Ledger)(nil)

const (
	// Feed is how many positions the feed remembers: one key each.
	Feed = 256
	// maxWrites is how many changes share a transaction: with the head and the slot, two operations for a deletion and one for
	// the generation, below Consul's limit; and few enough that one takes a server some milliseconds only.
	maxWrites = (consulstore.MaxTxn - 2) / 3
	// maxBytes bounds their keys and values, as store.MaxCommit does.
	maxBytes = store.MaxCommit
	// maxAttempts bounds the attempts to win the head against other processes. Each attempt that fails is one that
	// succeeded elsewhere.
	maxAttempts = 50
	// maxContention bounds the random wait between them.
	maxContention = 50 * time.Millisecond
)

// Ledger is a ledger.Ledger in Consul.
type Ledger struct {
	client      *consulstore.Client
	records     string // the folders, slash included
	generations string
	feed        string

	closed context.Context
	close  context.CancelFunc

	mu    sync.Mutex
	queue []*write
	// turn is held by the caller that writes the queue; head belongs to it.
	turn chan struct{}
	head *position
}

// write is a CompareAndSet that waits for its transaction.
type write struct {
	key      ledger.Key
	by       ledger.Generation
	name     string
	value    []byte // nil deletes
	revision uint64
	done     chan outcome
}

type outcome struct {
	revision uint64
	err      error
}

// position is what the head key says.
type position struct {
	number   uint64
	revision uint64 // of the head key
}

// slot is the stored form of what changed at a position.
type slot struct {
	Position uint64   `json:"p"`
	Keys     []string `json:"k"`
}

// New returns the ledger beside the prefix of client, which stays the caller's to close. It does not contact Consul.
func New(client *consulstore.Client) *Ledger {
	closed, cancel := context.WithCancel(context.Background())
	root := client.Prefix() + "-ledger/"
	return &Ledger{
		client: client, records: root + "records/", generations: root + "generations/", feed: root + "feed/",
		closed: closed, close: cancel, turn: make(chan struct{}, 1),
	}
}

// scope returns a context that ends with ctx or with the ledger.
func (l *Ledger) scope(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(l.closed, cancel)
	return ctx, func() { stop(); cancel() }
}

// Get implements ledger.Ledger.
func (l *Ledger) Get(ctx context.Context, key ledger.Key) (ledger.Row, error) {
	if err := key.Check(); err != nil {
		return ledger.Row{}, err
	}
	ctx, cancel := l.scope(ctx)
	defer cancel()
	reading, err := l.client.Get(ctx, l.name(key), 0)
	if err == nil && len(reading.Pairs) == 0 {
		err = ledger.ErrNotFound
	}
	var row ledger.Row
	if err == nil {
		row, err = ledger.NewRow(key, reading.Pairs[0].Value, reading.Pairs[0].Revision)
	}
	if err != nil {
		return ledger.Row{}, fmt.Errorf("reading %s: %w", key, unavailable(err))
	}
	return row, nil
}

// Generation implements ledger.Ledger.
func (l *Ledger) Generation(ctx context.Context, registry string) (ledger.Generation, error) {
	ctx, cancel := l.scope(ctx)
	defer cancel()
	reading, err := l.client.Get(ctx, l.generations+registry, 0)
	if err != nil {
		return 0, fmt.Errorf("reading the generation of %s: %w", registry, unavailable(err))
	}
	if len(reading.Pairs) == 0 {
		return 0, nil
	}
	return ledger.Generation(reading.Pairs[0].Revision), nil
}

// Advance implements ledger.Ledger.
func (l *Ledger) Advance(ctx context.Context, registry string) error {
	ctx, cancel := l.scope(ctx)
	defer cancel()
	// Only the revision counts. The value is for people who look at the key.
	since := time.Now().UTC().AppendFormat(nil, time.RFC3339)
	if _, err := l.client.Txn(ctx, []*api.KVTxnOp{{Verb: api.KVSet, Key: l.generations + registry, Value: since}}); err != nil {
		return fmt.Errorf("beginning a generation of %s: %w", registry, unavailable(err))
	}
	return nil
}

// CompareAndSet implements ledger.Ledger.
func (l *Ledger) CompareAndSet(ctx context.Context, by ledger.Generation, key ledger.Key, record *ledger.Record, revision uint64) (uint64, error) {
	if err := key.Check(); err != nil {
		return 0, err
	}
	if record == nil && revision == 0 {
		// Nothing would change, so it has no place in the feed.
		switch _, err := l.Get(ctx, key); {
		case errors.Is(err, ledger.ErrNotFound):
			return 0, nil
		case err != nil && !errors.Is(err, ledger.ErrSchema):
			return 0, err
		}
		return 0, fmt.Errorf("deleting %s: %w", key, ledger.ErrConflict)
	}
	w := &write{key: key, by: by, name: l.name(key), revision: revision, done: make(chan outcome, 1)}
	if record != nil {
		var err error
		if w.value, err = ledger.Encode(*record); err != nil {
			return 0, fmt.Errorf("writing %s: %w", key, err)
		}
	}
	o := l.enqueue(ctx, w)
	if o.err != nil {
		return 0, fmt.Errorf("writing %s: %w", key, unavailable(o.err))
	}
	return o.revision, nil
}

// enqueue waits for w to be written, by this caller or by another one.
func (l *Ledger) enqueue(ctx context.Context, w *write) outcome {
	l.mu.Lock()
	l.queue = append(l.queue, w)
	l.mu.Unlock()
	for {
		select {
		case o := <-w.done:
			return o
		case <-ctx.Done():
			if l.withdraw(w) {
				return outcome{err: ctx.Err()}
			}
			return <-w.done
		case l.turn <- struct{}{}:
		}
		if ctx.Err() != nil && l.withdraw(w) {
			<-l.turn
			return outcome{err: ctx.Err()}
		}
		if batch := l.take(); len(batch) > 0 {
			l.write(batch)
		}
		<-l.turn
	}
}

func (l *Ledger) withdraw(w *write) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	i := slices.Index(l.queue, w)
	if i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
	}
	return i >= 0
}

// take removes from the queue what fits into one transaction, the oldest first. A second write of a key waits, since it
// would be refused for the first.
func (l *Ledger) take() (batch []*write) {
	l.mu.Lock()
	defer l.mu.Unlock()
	size, names := 0, make(map[string]bool)
	var rest []*write
	for _, w := range l.queue {
		cost := 2*len(w.name) + len(w.value) // the name stands in the slot as well
		if len(batch) == maxWrites || names[w.name] || (len(batch) > 0 && size+cost > maxBytes) {
			rest = append(rest, w)
			names[w.name] = true // keep the order of a key's writes
			continue
		}
		names[w.name] = true
		size += cost
		batch = append(batch, w)
	}
	l.queue = rest
	return batch
}

// write applies a batch and answers each of its writes. Writes whose condition does not hold are answered and left out,
// then the others are tried again; so is all of it while other processes win the head.
//
// It does not end with the context of the caller whose turn it is, since it acts for others too, but each of its
// requests has a deadline.
func (l *Ledger) write(batch []*write) {
	fail := func(err error) {
		for _, w := range batch {
			w.done <- outcome{err: err}
		}
	}
	for attempt := 0; len(batch) > 0; attempt++ {
		if attempt == maxAttempts+maxWrites {
			fail(fmt.Errorf("%w: other replicators wrote %d times meanwhile; nothing was written", ledger.ErrUnavailable, attempt))
			return
		}
		if l.head == nil {
			reading, err := l.client.Get(l.closed, l.feed+"head", 0)
			if err == nil {
				l.head, err = parseHead(reading)
			}
			if err != nil {
				fail(err)
				return
			}
		}
		next := l.head.number + 1
		ops, failed, err := l.transaction(batch, next)
		if err != nil {
			fail(err)
			return
		}
		revision, err := l.client.Txn(l.closed, ops)
		refused, ok := errors.AsType[*consulstore.Refused](err)
		switch {
		case err == nil:
			l.head = &position{number: next, revision: revision}
			for _, w := range batch {
				w.done <- outcome{revision: revision}
			}
			return
		case !ok:
			l.head = nil // whether it was written is unknown
			fail(err)
			return
		}
		lost := false
		for _, op := range refused.Ops {
			if failed[op] == nil {
				lost = true
				continue
			}
			batch = slices.DeleteFunc(batch, func(w *write) bool {
				err := failed[op](w)
				if err != nil {
					w.done <- outcome{err: err}
				}
				return err != nil
			})
		}
		if lost {
			l.head = nil
			pause := time.NewTimer(rand.N(min(time.Millisecond<<min(attempt, 10), maxContention)))
			select {
			case <-pause.C:
			case <-l.closed.Done():
				pause.Stop()
			}
		}
	}
}

// transaction returns the operations that write batch at position next, and, for each, what it means for a write that its
// condition does not hold: nil if nothing. The failure of the head's concerns nobody.
func (l *Ledger) transaction(batch []*write, next uint64) (ops []*api.KVTxnOp, failed []func(*write) error, err error) {
	changed := slot{Position: next}
	for _, w := range batch {
		changed.Keys = append(changed.Keys, strings.TrimPrefix(w.name, l.records))
	}
	text, err := json.Marshal(changed)
	if err != nil {
		return nil, nil, fmt.Errorf("encoding the feed: %w", err)
	}
	add := func(fails func(*write) error, op *api.KVTxnOp) {
		ops, failed = append(ops, op), append(failed, fails)
	}
	add(nil, &api.KVTxnOp{Verb: api.KVCAS, Key: l.feed + "head", Value: strconv.AppendUint(nil, next, 10), Index: l.head.revision})
	add(nil, &api.KVTxnOp{Verb: api.KVSet, Key: l.slot(next), Value: text})
	type knowledge struct {
		registry string
		by       ledger.Generation
	}
	of := func(w *write) knowledge { return knowledge{w.key.Registry, w.by} }
	checked := make(map[knowledge]bool)
	for _, w := range batch {
		if k := of(w); !checked[k] {
			checked[k] = true
			check := &api.KVTxnOp{Verb: api.KVCheckIndex, Key: l.generations + k.registry, Index: uint64(k.by)}
			if k.by == 0 {
				check = &api.KVTxnOp{Verb: api.KVCheckNotExists, Key: check.Key}
			}
			add(func(other *write) error {
				if of(other) == k {
					return ledger.ErrGeneration
				}
				return nil
			}, check)
		}
		conflict := func(other *write) error {
			if other == w {
				return ledger.ErrConflict
			}
			return nil
		}
		if w.value != nil {
			add(conflict, &api.KVTxnOp{Verb: api.KVCAS, Key: w.name, Value: w.value, Index: w.revision})
			continue
		}
		add(conflict, &api.KVTxnOp{Verb: api.KVCheckIndex, Key: w.name, Index: w.revision})
		add(conflict, &api.KVTxnOp{Verb: api.KVDelete, Key: w.name})
	}
	return ops, failed, nil
}

// Page implements ledger.Ledger.
func (l *Ledger) Page(ctx context.Context, registry, repository string, after ledger.Key, limit int) ([]ledger.Row, error) {
	ctx, cancel := l.scope(ctx)
	defer cancel()
	rows, err := l.page(ctx, registry, repository, after, limit)
	if err != nil {
		return nil, fmt.Errorf("paging through %s: %w", strings.TrimSuffix(registry+"/"+repository, "/"), unavailable(err))
	}
	return rows, nil
}

func (l *Ledger) page(ctx context.Context, registry, repository string, after ledger.Key, limit int) (rows []ledger.Row, err error) {
	if l.closed.Err() != nil {
		return nil, fmt.Errorf("%w: it is closed", ledger.ErrUnavailable)
	}
	if repository != "" {
		return l.pageRepository(ctx, registry, repository, after, limit)
	}
	// First what is left of the repository that the page before ended in: most pages need no more.
	if after.Registry == registry {
		if rows, err = l.pageRepository(ctx, registry, after.Repository, after, limit); err != nil {
			return nil, err
		}
	}
	if len(rows) >= limit {
		return rows, nil
	}
	folder := l.records + registry + "/"
	names, err := l.client.Keys(ctx, folder, ",")
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	for _, name := range names {
		next := strings.TrimSuffix(strings.TrimPrefix(name, folder), ",")
		if after.Registry == registry && next <= after.Repository {
			continue
		}
		more, err := l.pageRepository(ctx, registry, next, after, limit-len(rows))
		if err != nil {
			return nil, err
		}
		if rows = append(rows, more...); len(rows) >= limit {
			break
		}
	}
	return rows, nil
}

func (l *Ledger) pageRepository(ctx context.Context, registry, repository string, after ledger.Key, limit int) (rows []ledger.Row, err error) {
	names, err := l.client.Keys(ctx, l.records+registry+"/"+repository+",", "")
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	names = slices.DeleteFunc(names, func(name string) bool {
		key, ok := l.parse(name) // not ok: somebody else put it here
		return !ok || ledger.Compare(key, after) <= 0
	})
	// A record may go between the two questions; then the next one fills its place.
	for len(names) > 0 && len(rows) < limit {
		n := min(limit-len(rows), len(names), consulstore.MaxTxn)
		pairs, err := l.client.GetAll(ctx, names[:n])
		if err != nil {
			return nil, err
		}
		names = names[n:]
		for _, p := range pairs {
			key, ok := l.parse(p.Key)
			if !ok || p.Revision == 0 {
				continue
			}
			row, err := ledger.NewRow(key, p.Value, p.Revision)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", key, err)
			}
			rows = append(rows, row)
		}
	}
	return rows, nil
}

// Head implements ledger.Ledger.
func (l *Ledger) Head(ctx context.Context) (ledger.Cursor, error) {
	ctx, cancel := l.scope(ctx)
	defer cancel()
	reading, err := l.client.Get(ctx, l.feed+"head", 0)
	if err != nil {
		return ledger.Cursor{}, fmt.Errorf("reading the head of the feed: %w", unavailable(err))
	}
	head, err := parseHead(reading)
	if err != nil {
		return ledger.Cursor{}, err
	}
	return ledger.Cursor{Position: head.number}, nil
}

// Changes implements ledger.Ledger. It waits by a blocking query for the head key alone.
func (l *Ledger) Changes(ctx context.Context, after ledger.Cursor) ([]ledger.Key, ledger.Cursor, error) {
	scope, cancel := l.scope(ctx)
	defer cancel()
	keys, next, err := l.changes(scope, after)
	if err != nil {
		switch {
		case l.closed.Err() != nil:
		case errors.Is(ctx.Err(), context.DeadlineExceeded):
			return nil, after, nil
		case ctx.Err() != nil:
			err = ctx.Err()
		}
		return nil, after, fmt.Errorf("following the feed: %w", unavailable(err))
	}
	return keys, next, nil
}

func (l *Ledger) changes(ctx context.Context, after ledger.Cursor) ([]ledger.Key, ledger.Cursor, error) {
	var index uint64
	for {
		reading, err := l.client.Get(ctx, l.feed+"head", index)
		if err != nil {
			return nil, after, err
		}
		head, err := parseHead(reading)
		switch {
		case err != nil:
			return nil, after, err
		case head.number == after.Position:
			if index = reading.Index; ctx.Err() != nil {
				return nil, after, ctx.Err()
			}
		case head.number < after.Position, head.number-after.Position > Feed:
			// Below the cursor: this is not the ledger that gave it, or an older copy.
			return nil, after, ledger.ErrGap
		default:
			keys, err := l.slots(ctx, after.Position+1, head.number)
			return keys, ledger.Cursor{Position: head.number}, err
		}
	}
}

// slots returns the keys that changed at the positions first to last, each once.
func (l *Ledger) slots(ctx context.Context, first, last uint64) (keys []ledger.Key, err error) {
	seen := make(map[string]bool)
	for first <= last {
		n := min(last-first+1, consulstore.MaxTxn)
		names := make([]string, n)
		for i := range names {
			names[i] = l.slot(first + uint64(i))
		}
		pairs, err := l.client.GetAll(ctx, names)
		if err != nil {
			return nil, err
		}
		for i, p := range pairs {
			var s slot
			if err := json.Unmarshal(p.Value, &s); err != nil || s.Position != first+uint64(i) {
				return nil, ledger.ErrGap // overwritten by a later one since the head was read
			}
			for _, name := range s.Keys {
				if seen[name] {
					continue
				}
				seen[name] = true
				key, ok := l.parse(l.records + name)
				if !ok {
					return nil, fmt.Errorf("the feed names %q, which is no record", name)
				}
				keys = append(keys, key)
			}
		}
		first += n
	}
	return keys, nil
}

// Close implements ledger.Ledger.
func (l *Ledger) Close() error {
	l.close()
	return nil
}

func parseHead(r consulstore.Reading) (*position, error) {
	if len(r.Pairs) == 0 {
		return &position{}, nil
	}
	n, err := strconv.ParseUint(string(r.Pairs[0].Value), 10, 64)
	if err != nil {
		return nil, fmt.Errorf("the head of the feed, %q, is %.20q: somebody else wrote it", r.Pairs[0].Key, r.Pairs[0].Value)
	}
	return &position{number: n, revision: r.Pairs[0].Revision}, nil
}

func (l *Ledger) slot(position uint64) string {
	return fmt.Sprintf("%s%03d", l.feed, position%Feed)
}

func (l *Ledger) name(k ledger.Key) string {
	return l.records + k.Registry + "/" + k.Repository + "," + string(k.Kind) + "," + k.Reference
}

func (l *Ledger) parse(name string) (ledger.Key, bool) {
	name, ok := strings.CutPrefix(name, l.records)
	registry, rest, slash := strings.Cut(name, "/")
	parts := strings.SplitN(rest, ",", 3)
	if !ok || !slash || len(parts) != 3 {
		return ledger.Key{}, false
	}
	k := ledger.Key{Registry: registry, Repository: parts[0], Kind: ledger.Kind(parts[1]), Reference: parts[2]}
	return k, k.Check() == nil
}

// unavailable gives the store's words the ledger's names.
func unavailable(err error) error {
	if errors.Is(err, store.ErrUnavailable) {
		return fmt.Errorf("%w: %w", ledger.ErrUnavailable, err)
	}
	return err
}
