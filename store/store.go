// Package store is the small, watched tree of keys that people edit and that daemons agree through.
//
// A store holds scalars below slash-separated keys: the topology that operators edit, the state that
// daemons report, and leases. Two implementations keep the same contract, proved by one conformance
// suite (store/storetest): store/bolt, embedded and durable, the default on one machine; and
// store/consul, for several machines.
//
// The package knows nothing of what the keys mean: that belongs to topology and to those who write state.
// It is no place for bulk data either: everything below a watched prefix is delivered whole, so the
// versions of tags have a contract of their own (replicator/ledger).
package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
)

var (
	// ErrNotFound says that the key does not exist.
	ErrNotFound = errors.New("key not found")
	// ErrConflict says that a condition of a transaction did not hold; nothing of it was applied.
	ErrConflict = errors.New("changed by someone else meanwhile")
	// ErrUnavailable says that the store cannot be asked at the moment (no connection, no leader, closed).
	// The outcome of a Commit that ends with it is unknown: it may have been applied.
	ErrUnavailable = errors.New("store unavailable")
	// ErrLost says that the store answers, but has lost its keys: it was emptied, or restored from nothing. It matches ErrUnavailable
	// as well, since what was read before stands. Writes are taken, and end that state.
	ErrLost = fmt.Errorf("%w: its keys are lost", ErrUnavailable)
)

// MaxOps is the largest number of operations in one Commit. Consul's own limit for a transaction is 128, and a
// conditional deletion takes two of them there.
const MaxOps = 64

// Entry is one key with its value.
type Entry struct {
	// Key is the full key below the store's own prefix: no leading slash, "/" between its segments.
	Key   string
	Value string
	// Revision changes with every write of the key and is never used again for it, also not after a
	// deletion. Zero is no revision: as a condition it means "the key does not exist".
	Revision uint64
}

// Tree is everything below one prefix at one moment. It is immutable once delivered.
type Tree struct {
	// Entries are sorted by key.
	Entries []Entry
	// Revision grows whenever something below the prefix may have changed.
	Revision uint64
}

// Get returns the entry of key in t.
func (t Tree) Get(key string) (Entry, bool) {
	i, found := slices.BinarySearchFunc(t.Entries, key, func(e Entry, k string) int { return strings.Compare(e.Key, k) })
	if !found {
		return Entry{}, false
	}
	return t.Entries[i], true
}

// Op is one step of a transaction. Make it with Put, PutIf, Delete, DeleteIf or Check.
type Op struct {
	Verb  Verb
	Key   string
	Value string
	// Revision is the condition of PutIf, DeleteIf and Check.
	Revision uint64
}

// Verb says what an Op does.
type Verb uint8

// The verbs of a transaction.
const (
	VerbPut Verb = iota + 1
	VerbPutIf
	VerbDelete
	VerbDeleteIf
	VerbCheck
)

// Put writes key whatever it was.
func Put(key, value string) Op { return Op{Verb: VerbPut, Key: key, Value: value} }

// PutIf writes key if its revision still is revision; zero: if it does not exist.
func PutIf(key, value string, revision uint64) Op {
	return Op{Verb: VerbPutIf, Key: key, Value: value, Revision: revision}
}

// Delete removes key; it is no error if it does not exist.
func Delete(key string) Op { return Op{Verb: VerbDelete, Key: key} }

// DeleteIf removes key if its revision still is revision.
func DeleteIf(key string, revision uint64) Op {
	return Op{Verb: VerbDeleteIf, Key: key, Revision: revision}
}

// Check changes nothing and holds if the revision of key still is revision; zero: if it does not exist.
func Check(key string, revision uint64) Op {
	return Op{Verb: VerbCheck, Key: key, Revision: revision}
}

// Update is what a watcher is told.
type Update struct {
	// Tree is the last tree that was read in full; before the first one it has no entries and Err is set.
	Tree Tree
	// Err is not nil while the store cannot be read; Tree then is the last good one.
	Err error
}

// Store is the contract. Every method may be called from several goroutines. All reads are consistent:
// they see every write that was acknowledged before they began.
type Store interface {
	// Get reads one key: ErrNotFound if there is none.
	Get(ctx context.Context, key string) (Entry, error)

	// List reads everything whose key begins with prefix, which is empty or ends with a slash.
	List(ctx context.Context, prefix string) (Tree, error)

	// Commit applies up to MaxOps operations as one transaction, in order, or none of them. ErrConflict says that a
	// condition did not hold. The result is the revision that every key written here now has.
	Commit(ctx context.Context, ops ...Op) (revision uint64, err error)

	// Watch calls deliver, from the calling goroutine and never twice at once, with the tree below prefix: at
	// once, after every change, and with Err set while the store cannot be read. Changes that come while deliver
	// runs are delivered as one; the final value is always delivered. A tree is never delivered empty merely
	// because a server had nothing to say (no leader, a restart). Watch returns when ctx is done, with its error.
	Watch(ctx context.Context, prefix string, deliver func(Update)) error

	// Close releases the store; calls under way end with ErrUnavailable.
	Close() error
}

// Exclusive is what a Store adds when no second process can have it open, as with a locked file.
type Exclusive interface {
	// OpenedAt is the revision that the store had when this process opened it. Whoever wrote a key at or below it
	// has let go of the store since, so a lease found there is nobody's.
	OpenedAt() uint64
}
