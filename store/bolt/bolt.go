// Package bolt keeps the store in one file of the embedded database bbolt: the default on one machine.
//
// A write that was acknowledged is on disk (fsync). Only one process can have the file open. The file also holds the
// ledger (replicator/ledger/bolt), hence DB: both are opened over one.
package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"sync"

	"go.etcd.io/bbolt"

	"portolan/store"
)

var (
	_ store.Store     = (*Store)(nil)
	_ store.Exclusive = (*Store)(nil)
)

// storeBucket maps a key to its revision (8 bytes, big endian) and value; the bucket's own sequence is the newest
// revision. The name stands in files: never change it.
var storeBucket = []byte("store")

// Store is a store.Store in a DB. There must be one only for a DB, since watchers learn of its own commits alone.
type Store struct {
	db *DB

	mu       sync.Mutex
	watchers map[*watcher]struct{}
}

type watcher struct {
	prefix  string
	changed chan struct{} // holds one token while there is something to read
}

// New returns the store in db.
func New(db *DB) *Store {
	return &Store{db: db, watchers: make(map[*watcher]struct{})}
}

// OpenedAt implements store.Exclusive.
func (s *Store) OpenedAt() uint64 { return s.db.openedAt }

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string) (store.Entry, error) {
	if err := store.CheckKey(key); err != nil {
		return store.Entry{}, err
	}
	if err := ctx.Err(); err != nil {
		return store.Entry{}, err
	}
	var entry store.Entry
	err := s.db.View(func(tx *bbolt.Tx) error {
		v := tx.Bucket(storeBucket).Get([]byte(key))
		if v == nil {
			return store.ErrNotFound
		}
		entry = decode([]byte(key), v)
		return nil
	})
	if err != nil {
		return store.Entry{}, fmt.Errorf("reading %q: %w", key, err)
	}
	return entry, nil
}

// List implements store.Store.
func (s *Store) List(ctx context.Context, prefix string) (store.Tree, error) {
	if err := store.CheckPrefix(prefix); err != nil {
		return store.Tree{}, err
	}
	if err := ctx.Err(); err != nil {
		return store.Tree{}, err
	}
	var tree store.Tree
	err := s.db.View(func(tx *bbolt.Tx) error {
		b := tx.Bucket(storeBucket)
		tree.Revision = b.Sequence()
		c := b.Cursor()
		for k, v := c.Seek([]byte(prefix)); k != nil && bytes.HasPrefix(k, []byte(prefix)); k, v = c.Next() {
			tree.Entries = append(tree.Entries, decode(k, v))
		}
		return nil
	})
	if err != nil {
		return store.Tree{}, fmt.Errorf("listing %q: %w", prefix, err)
	}
	return tree, nil
}

// Commit implements store.Store. Its effect is on disk when it returns; it shares an fsync with others under way.
func (s *Store) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if err := store.CheckOps(ops); err != nil {
		return 0, err
	}
	var revision uint64
	var written []string
	err := s.db.Update(ctx, func(tx *bbolt.Tx) error {
		b := tx.Bucket(storeBucket)
		revision = b.Sequence() + 1
		if err := check(b, ops, revision); err != nil {
			return err
		}
		for _, op := range ops {
			var err error
			switch op.Verb {
			case store.VerbPut, store.VerbPutIf:
				err = b.Put([]byte(op.Key), encode(revision, op.Value))
			case store.VerbDelete, store.VerbDeleteIf:
				if b.Get([]byte(op.Key)) == nil {
					continue
				}
				err = b.Delete([]byte(op.Key))
			default:
				continue
			}
			if err != nil {
				return err
			}
			written = append(written, op.Key)
		}
		if len(written) == 0 {
			revision = b.Sequence()
			return nil
		}
		return b.SetSequence(revision)
	})
	if err != nil {
		return 0, fmt.Errorf("writing %q: %w", ops[0].Key, err)
	}
	s.notify(written)
	return revision, nil
}

// check evaluates the conditions in order, each seeing what the operations before it would have written at revision.
func check(b *bbolt.Bucket, ops []store.Op, revision uint64) error {
	pending := make(map[string]uint64, len(ops))
	for _, op := range ops {
		current, ok := pending[op.Key]
		if !ok {
			if v := b.Get([]byte(op.Key)); v != nil {
				current = binary.BigEndian.Uint64(v)
			}
		}
		switch op.Verb {
		case store.VerbPutIf, store.VerbDeleteIf, store.VerbCheck:
			if current != op.Revision {
				return fmt.Errorf("%q: %w", op.Key, store.ErrConflict)
			}
		}
		switch op.Verb {
		case store.VerbPut, store.VerbPutIf:
			current = revision
		case store.VerbDelete, store.VerbDeleteIf:
			current = 0
		}
		pending[op.Key] = current
	}
	return nil
}

// Watch implements store.Store. It is told of commits by the Store itself, without polling.
func (s *Store) Watch(ctx context.Context, prefix string, deliver func(store.Update)) error {
	w := &watcher{prefix: prefix, changed: make(chan struct{}, 1)}
	s.mu.Lock()
	s.watchers[w] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watchers, w)
		s.mu.Unlock()
	}()
	for {
		tree, err := s.List(ctx, prefix)
		if err != nil {
			return fmt.Errorf("watching: %w", err)
		}
		deliver(store.Update{Tree: tree})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.db.closed:
			return fmt.Errorf("watching %q: %w: the file is closed", prefix, store.ErrUnavailable)
		case <-w.changed:
		}
	}
}

func (s *Store) notify(written []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for w := range s.watchers {
		for _, key := range written {
			if !strings.HasPrefix(key, w.prefix) {
				continue
			}
			select {
			case w.changed <- struct{}{}:
			default: // it has yet to read for an earlier change, and will see this one too
			}
			break
		}
	}
}

// Close implements store.Store. It closes the DB, and so whatever else is kept in the file; a DB may be closed again.
func (s *Store) Close() error { return s.db.Close() }

func encode(revision uint64, value string) []byte {
	b := make([]byte, 8, 8+len(value))
	binary.BigEndian.PutUint64(b, revision)
	return append(b, value...)
}

func decode(k, v []byte) store.Entry {
	return store.Entry{Key: string(k), Value: string(v[8:]), Revision: binary.BigEndian.Uint64(v)}
}
