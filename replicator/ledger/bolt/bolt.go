// Package bolt keeps the ledger in the installation's bbolt file, beside the store: the default on one machine.
//
// A version that was acknowledged is on disk. Concurrent writers share transactions (see store/bolt.DB), so the rate
// of CompareAndSet grows with their number. The feed remembers the last Feed changes, across restarts.
package bolt

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"

	"go.etcd.io/bbolt"

	"portolan/replicator/ledger"
	"portolan/store"
	boltstore "portolan/store/bolt"
)

var _ ledger.Ledger = (*Ledger)(nil)

// Feed is how many changes the feed remembers: several minutes of the fastest seeding, at about 100 bytes each.
const Feed = 8192

// The buckets' names stand in files: never change them.
var (
	// recordBucket maps a key (see encodeKey) to its revision (8 bytes, big endian) and stored record.
	recordBucket = []byte("ledger")
	// feedBucket maps a position (8 bytes, big endian) to a key. Its sequence is the newest position, which is also the
	// revision of the record written there: both count the writes of the ledger.
	feedBucket = []byte("ledger-feed")
	// generationBucket maps a registry to its generation (8 bytes, big endian).
	generationBucket = []byte("ledger-generations")
)

// Ledger is a ledger.Ledger in a store/bolt.DB. There must be one only for a DB, since followers learn of its own
// writes alone.
type Ledger struct {
	db *boltstore.DB

	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, after every write
	closed  chan struct{}
	close   sync.Once
}

// New returns the ledger in db, which stays the caller's to close.
func New(db *boltstore.DB) (*Ledger, error) {
	err := db.Update(context.Background(), func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{recordBucket, feedBucket, generationBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("preparing the ledger in %s: %w", db.Path(), unavailable(err))
	}
	return &Ledger{db: db, changed: make(chan struct{}), closed: make(chan struct{})}, nil
}

// Get implements ledger.Ledger.
func (l *Ledger) Get(ctx context.Context, key ledger.Key) (ledger.Row, error) {
	if err := errors.Join(key.Check(), ctx.Err()); err != nil {
		return ledger.Row{}, err
	}
	var row ledger.Row
	err := l.view(func(tx *bbolt.Tx) (err error) {
		v := tx.Bucket(recordBucket).Get(encodeKey(key))
		if v == nil {
			return ledger.ErrNotFound
		}
		row, err = decodeRow(key, v)
		return err
	})
	if err != nil {
		return ledger.Row{}, fmt.Errorf("reading %s: %w", key, err)
	}
	return row, nil
}

// Generation implements ledger.Ledger.
func (l *Ledger) Generation(ctx context.Context, registry string) (ledger.Generation, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	var g ledger.Generation
	err := l.view(func(tx *bbolt.Tx) error {
		g = generation(tx, registry)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("reading the generation of %s: %w", registry, err)
	}
	return g, nil
}

// Advance implements ledger.Ledger.
func (l *Ledger) Advance(ctx context.Context, registry string) error {
	if l.isClosed() {
		return fmt.Errorf("beginning a generation of %s: %w: it is closed", registry, ledger.ErrUnavailable)
	}
	err := l.db.Update(ctx, func(tx *bbolt.Tx) error {
		next := binary.BigEndian.AppendUint64(nil, uint64(generation(tx, registry))+1)
		return tx.Bucket(generationBucket).Put([]byte(registry), next)
	})
	if err != nil {
		return fmt.Errorf("beginning a generation of %s: %w", registry, unavailable(err))
	}
	return nil
}

// generation reads a registry's generation.
func generation(tx *bbolt.Tx, registry string) ledger.Generation {
	v := tx.Bucket(generationBucket).Get([]byte(registry))
	if len(v) != 8 {
		return 0
	}
	return ledger.Generation(binary.BigEndian.Uint64(v))
}

// CompareAndSet implements ledger.Ledger.
func (l *Ledger) CompareAndSet(ctx context.Context, by ledger.Generation, key ledger.Key, record *ledger.Record, revision uint64) (uint64, error) {
	if err := key.Check(); err != nil {
		return 0, err
	}
	var value []byte
	if record != nil {
		b, err := ledger.Encode(*record)
		if err != nil {
			return 0, fmt.Errorf("writing %s: %w", key, err)
		}
		value = append(make([]byte, 8, 8+len(b)), b...)
	}
	if l.isClosed() {
		return 0, fmt.Errorf("writing %s: %w: it is closed", key, ledger.ErrUnavailable)
	}
	k := encodeKey(key)
	var next uint64
	err := l.db.Update(ctx, func(tx *bbolt.Tx) error {
		records, feed := tx.Bucket(recordBucket), tx.Bucket(feedBucket)
		var current uint64
		if v := records.Get(k); v != nil {
			current, _ = split(v)
		}
		if current != revision {
			return ledger.ErrConflict
		}
		if record == nil && current == 0 {
			return nil // nothing to delete, nothing changed
		}
		if generation(tx, key.Registry) != by {
			return ledger.ErrGeneration
		}
		next = feed.Sequence() + 1
		if record == nil {
			if err := records.Delete(k); err != nil {
				return err
			}
		} else {
			binary.BigEndian.PutUint64(value, next)
			if err := records.Put(k, value); err != nil {
				return err
			}
		}
		if err := feed.Put(position(next), k); err != nil {
			return err
		}
		if next > Feed {
			if err := feed.Delete(position(next - Feed)); err != nil {
				return err
			}
		}
		return feed.SetSequence(next)
	})
	if err != nil {
		return 0, fmt.Errorf("writing %s: %w", key, unavailable(err))
	}
	if next != 0 {
		l.notify()
	}
	return next, nil
}

// Page implements ledger.Ledger.
func (l *Ledger) Page(ctx context.Context, registry, repository string, after ledger.Key, limit int) ([]ledger.Row, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	prefix := registry + "\x00"
	if repository != "" {
		prefix += repository + "\x00"
	}
	start := []byte(prefix)
	if after != (ledger.Key{}) {
		// The least key above after; it may lie below the prefix.
		if next := append(encodeKey(after), 0); bytes.Compare(next, start) > 0 {
			start = next
		}
	}
	var rows []ledger.Row
	err := l.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(recordBucket).Cursor()
		for k, v := c.Seek(start); k != nil && len(rows) < limit && strings.HasPrefix(string(k), prefix); k, v = c.Next() {
			key, err := decodeKey(k)
			if err != nil {
				return err
			}
			row, err := decodeRow(key, v)
			if err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
			rows = append(rows, row)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("paging through %s: %w", strings.TrimSuffix(registry+"/"+repository, "/"), err)
	}
	return rows, nil
}

// Head implements ledger.Ledger.
func (l *Ledger) Head(ctx context.Context) (ledger.Cursor, error) {
	if err := ctx.Err(); err != nil {
		return ledger.Cursor{}, err
	}
	var head ledger.Cursor
	err := l.view(func(tx *bbolt.Tx) error {
		head.Position = tx.Bucket(feedBucket).Sequence()
		return nil
	})
	if err != nil {
		return ledger.Cursor{}, fmt.Errorf("reading the head of the feed: %w", err)
	}
	return head, nil
}

// Changes implements ledger.Ledger. It is woken by the writes themselves.
func (l *Ledger) Changes(ctx context.Context, after ledger.Cursor) ([]ledger.Key, ledger.Cursor, error) {
	for {
		l.mu.Lock()
		changed := l.changed // taken before the read, so that no write falls between the two
		l.mu.Unlock()
		keys, head, err := l.changes(after)
		if err != nil {
			return nil, after, fmt.Errorf("following the feed: %w", err)
		}
		if len(keys) > 0 {
			return keys, head, nil
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return nil, after, nil
			}
			return nil, after, ctx.Err()
		case <-l.closed:
		case <-l.db.Closed():
		case <-changed:
		}
	}
}

func (l *Ledger) changes(after ledger.Cursor) (keys []ledger.Key, head ledger.Cursor, err error) {
	err = l.view(func(tx *bbolt.Tx) error {
		b := tx.Bucket(feedBucket)
		head.Position = b.Sequence()
		oldest := uint64(1) // the oldest position still held
		if head.Position > Feed {
			oldest = head.Position - Feed + 1
		}
		// A cursor beyond the head comes from a ledger that was lost or restored.
		if after.Position > head.Position || after.Position+1 < oldest {
			return ledger.ErrGap
		}
		seen := make(map[string]bool)
		c := b.Cursor()
		for p, k := c.Seek(position(after.Position + 1)); p != nil; p, k = c.Next() {
			if seen[string(k)] {
				continue
			}
			seen[string(k)] = true
			key, err := decodeKey(k)
			if err != nil {
				return err
			}
			keys = append(keys, key)
		}
		return nil
	})
	return keys, head, err
}

// Close implements ledger.Ledger. The file stays open: it is not the ledger's.
func (l *Ledger) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

func (l *Ledger) isClosed() bool {
	select {
	case <-l.closed:
		return true
	default:
		return false
	}
}

func (l *Ledger) view(read func(*bbolt.Tx) error) error {
	if l.isClosed() {
		return fmt.Errorf("%w: it is closed", ledger.ErrUnavailable)
	}
	return unavailable(l.db.View(read))
}

func (l *Ledger) notify() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
}

// unavailable gives the store's word for it the ledger's name.
func unavailable(err error) error {
	if errors.Is(err, store.ErrUnavailable) {
		return fmt.Errorf("%w: %w", ledger.ErrUnavailable, err)
	}
	return err
}

func position(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }

// encodeKey joins the parts with NUL, which is below every byte of theirs: so bytes sort as ledger.Compare does.
func encodeKey(k ledger.Key) []byte {
	return []byte(strings.Join([]string{k.Registry, k.Repository, string(k.Kind), k.Reference}, "\x00"))
}

func decodeKey(b []byte) (ledger.Key, error) {
	parts := strings.Split(string(b), "\x00")
	if len(parts) != 4 {
		return ledger.Key{}, fmt.Errorf("the stored key %q is damaged", b)
	}
	return ledger.Key{Registry: parts[0], Repository: parts[1], Kind: ledger.Kind(parts[2]), Reference: parts[3]}, nil
}

// split returns the revision and the stored record of a value. One that is too short to hold them is damaged, and is at
// revision 1: it is there, and can be replaced.
func split(v []byte) (revision uint64, record []byte) {
	if len(v) < 8 {
		return 1, nil
	}
	return binary.BigEndian.Uint64(v), v[8:]
}

func decodeRow(key ledger.Key, v []byte) (ledger.Row, error) {
	revision, record := split(v)
	return ledger.NewRow(key, record, revision)
}
