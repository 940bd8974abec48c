// Package consul keeps the store in the KV store of a Consul datacenter, for installations of several machines.
//
// Reads are consistent; watches are blocking queries; transactions are Consul's own. People may edit the same keys with
// Consul's UI and CLI. A server that has lost its leader, or its data, is never mistaken for one without keys.
package consul

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/store"
)

var _ store.Store = (*Store)(nil)

const (
	// minBackoff and maxBackoff bound the wait before a failed watch asks again. An edit must reach watchers soon after
	// Consul is back, and a few dozen daemons that ask every two seconds do not hurt a server that starts.
	minBackoff = 50 * time.Millisecond
	maxBackoff = 2 * time.Second
	// pace is the shortest time between two readings of a watch, so that a burst of writes to a tree is not read as
	// often as it has writes.
	pace = 20 * time.Millisecond
)

// Store is a store.Store in Consul.
type Store struct {
	client *Client
	root   string // what every key begins with, slash included

	closed context.Context
	close  context.CancelFunc
}

// New returns the store below the prefix of client, which stays the caller's to close.
func New(client *Client) *Store {
	closed, cancel := context.WithCancel(context.Background())
	return &Store{client: client, root: client.Prefix() + "/", closed: closed, close: cancel}
}

// scope returns a context that ends with ctx or with the store.
func (s *Store) scope(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.closed, cancel)
	return ctx, func() { stop(); cancel() }
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Entry, error) {
	if err := store.CheckKey(key); err != nil {
		return store.Entry{}, err
	}
	ctx, cancel := s.scope(ctx)
	defer cancel()
	reading, err := s.client.Get(ctx, s.root+key, 0)
	if err == nil && len(reading.Pairs) == 0 {
		err = store.ErrNotFound
	}
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q: %w", key, err)
	}
	return s.entry(reading.Pairs[0]), nil
}

// List implements store.Store.
func (s *Store) List(ctx context.Context, prefix string) (store.Tree, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return store.Tree{}, err
	}
	ctx, cancel := s.scope(ctx)
	defer cancel()
	reading, err := s.client.List(ctx, s.root+prefix, 0)
	if err != nil {
		return store.Tree{}, fmt.Errorf("listing %q: %w", prefix, err)
	}
	return s.tree(reading), nil
}

func (s *Store) entry(p Pair) store.Entry {
	return store.Entry{Key: strings.TrimPrefix(p.Key, s.root), Value: string(p.Value), Revision: p.Revision}
}

// tree leaves out keys that are none of the contract's, above all the empty "folders" that Consul's UI makes.
func (s *Store) tree(r Reading) store.Tree {
	tree := store.Tree{Revision: r.Index, Entries: make([]store.Entry, 0, len(r.Pairs))}
	for _, p := range r.Pairs {
		if e := s.entry(p); store.CheckKey(e.Key) == nil {
			tree.Entries = append(tree.Entries, e)
		}
	}
	// Consul lists in the order of bytes already; the contract does not rest on that.
	slices.SortFunc(tree.Entries, func(a, b store.Entry) int { return strings.Compare(a.Key, b.Key) })
	return tree
}

// Commit implements store.Store.
func (s *Store) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if err := store.CheckOps(ops); err != nil {
		return 0, err
	}
	kv := make([]*api.KVTxnOp, 0, 2*len(ops))
	for _, op := range ops {
		kv = s.translate(kv, op)
	}
	ctx, cancel := s.scope(ctx)
	defer cancel()
	revision, err := s.client.Txn(ctx, kv)
	if err != nil {
		return 0, fmt.Errorf("writing %q: %w", ops[0].Key, err)
	}
	return revision, nil
}

func (s *Store) translate(kv []*api.KVTxnOp, op store.Op) []*api.KVTxnOp {
	key := s.root + op.Key
	check := &api.KVTxnOp{Verb: api.KVCheckIndex, Key: key, Index: op.Revision}
	if op.Revision == 0 {
		check = &api.KVTxnOp{Verb: api.KVCheckNotExists, Key: key}
	}
	switch op.Verb {
	case store.VerbPut:
		return append(kv, &api.KVTxnOp{Verb: api.KVSet, Key: key, Value: []byte(op.Value)})
	case store.VerbPutIf: // an index of zero creates only
		return append(kv, &api.KVTxnOp{Verb: api.KVCAS, Key: key, Value: []byte(op.Value), Index: op.Revision})
	case store.VerbDelete:
		return append(kv, &api.KVTxnOp{Verb: api.KVDelete, Key: key})
	case store.VerbDeleteIf:
		if op.Revision == 0 {
			return append(kv, check)
		}
		// Consul's own delete-cas succeeds when the key is gone already.
		return append(kv, check, &api.KVTxnOp{Verb: api.KVDelete, Key: key})
	default:
		return append(kv, check)
	}
}

// Watch implements store.Store.
func (s *Store) Watch(ctx context.Context, prefix string, deliver func(store.Update)) error {
	if err := store.CheckPrefix(prefix); err != nil {
		return err
	}
	ctx, cancel := s.scope(ctx)
	defer cancel()
	w := watch{read: func(ctx context.Context, index uint64) (Reading, error) {
		return s.client.List(ctx, s.root+prefix, index)
	}, tree: s.tree}
	backoff := minBackoff
	for {
		began := time.Now()
		update, changed, err := w.next(ctx)
		if ctx.Err() != nil {
			if s.closed.Err() != nil {
				return fmt.Errorf("watching %q: %w: it is closed", prefix, store.ErrUnavailable)
			}
			return ctx.Err()
		}
		if changed {
			deliver(update)
		}
		pause := pace - time.Since(began)
		if err == nil {
			backoff = minBackoff
		} else {
			pause = backoff/2 + rand.N(backoff)
			backoff = min(2*backoff, maxBackoff)
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
		case <-timer.C:
		}
	}
}

// watch is the state of a Watch: what was read and what it means.
type watch struct {
	read func(ctx context.Context, index uint64) (Reading, error)
	tree func(Reading) store.Tree

	index uint64 // to wait beyond; zero: read at once
	last  store.Tree
	seen  uint64 // Consul's index when last was read, at the latest
	some  bool   // there is a last tree
	// failure is the error of the last update; one that differs is delivered too, since it may tell more.
	failure string
	// lost says that Consul forgot its keys, as far as one can tell; an empty tree is not believed then.
	lost bool
}

var errLost = fmt.Errorf("%w: consul was emptied, or restored from nothing: its index went back, and there are none; the last ones are kept until there are some again", store.ErrLost)

// next reads once. It returns what to deliver, if that differs from what was delivered last, and the error of the
// reading.
func (w *watch) next(ctx context.Context) (update store.Update, changed bool, err error) {
	reading, err := w.judge(ctx)
	if err != nil {
		w.index = 0
		changed = w.failure != err.Error()
		w.failure = err.Error()
		return store.Update{Tree: w.last, Err: err}, changed, err
	}
	// Also after it went back: a tree that was read whole is as good as any, and its index the one to wait beyond.
	w.index, w.seen = reading.Index, reading.Index
	tree := w.tree(reading)
	if w.some && slices.Equal(tree.Entries, w.last.Entries) {
		changed = w.failure != ""
	} else {
		changed = true
		// Consul's index goes back when it forgets deletions, or was restored; a tree's revision does not.
		if w.some {
			tree.Revision = max(tree.Revision, w.last.Revision+1)
		}
		w.last, w.some = tree, true
	}
	w.failure = ""
	return store.Update{Tree: w.last}, changed, nil
}

// judge returns a reading that may be believed.
func (w *watch) judge(ctx context.Context) (Reading, error) {
	reading, err := w.read(ctx, w.index)
	if err != nil {
		return Reading{}, err
	}
	if len(reading.Pairs) > 0 {
		w.lost = false
		return reading, nil
	}
	if w.some && len(w.last.Entries) == 0 {
		return reading, nil
	}
	// Empty where there were keys, or where nothing is known: believed only if a second reading says the same.
	again, err := w.read(ctx, 0)
	switch {
	case err != nil:
		return Reading{}, fmt.Errorf("confirming that there are no keys: %w", err)
	case len(again.Pairs) > 0:
		w.lost = false
		return again, nil
	case w.some && (w.lost || min(reading.Index, again.Index) < w.seen):
		// A deletion has a higher index than the keys had. So these were not deleted: they are lost.
		w.lost = true
		return Reading{}, errLost
	case again.Index < reading.Index:
		return Reading{}, errors.Join(store.ErrUnavailable, errors.New("two readings without keys disagree about the index"))
	}
	return again, nil
}

// Close implements store.Store. The client stays open.
func (s *Store) Close() error {
	s.close()
	return nil
}
