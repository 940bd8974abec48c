package bolt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"portolan/store"
)

// lockTimeout is how long OpenDB waits for another process to let go of the file: longer than an orderly shutdown
// takes to close it, shorter than a person waits before wondering.
const lockTimeout = time.Second

// DB is the one file of an installation. The store and the ledger share it, each in buckets of its own, and share
// its fsyncs: writes that come while a transaction is being written to disk go into the next one together.
type DB struct {
	bolt     *bbolt.DB
	openedAt uint64
	closed   chan struct{}
	close    sync.Once

	mu    sync.Mutex
	queue []*write
	told  func(error) // see Tell
	// turn is held by the caller that writes the queue.
	turn chan struct{}
}

type write struct {
	apply func(*bbolt.Tx) error
	err   error
	done  chan error
}

// OpenDB opens the file at path, made with mode 0600 if it is not there. Its directory must exist. A file that another
// process has open is an error that says so.
func OpenDB(path string) (*DB, error) {
	db, err := open(path)
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("opening %s: the file is in use by another process (`fuser -v %s` shows which)", path, path)
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrVersionMismatch), errors.Is(err, bolterrors.ErrChecksum):
		return nil, fmt.Errorf("opening %s: not a bolt file, or a damaged one: %w", path, err)
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("opening %s: its directory does not exist: %w", path, err)
	case err != nil:
		return nil, fmt.Errorf("opening %s: %w", path, err)
	}
	d := &DB{bolt: db, closed: make(chan struct{}), turn: make(chan struct{}, 1), told: func(error) {}}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(storeBucket)
		if err != nil {
			return err
		}
		d.openedAt = b.Sequence()
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("preparing %s: %w", path, err), db.Close())
	}
	return d, nil
}

// open makes errors of what bbolt answers with a panic or a fault: a file of which pages are damaged, or cut off by a
// copy that was not finished.
func open(path string) (db *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page beyond the end of the file
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", bolterrors.ErrInvalid, r)
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout, FreelistType: bbolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	err = db.View(func(tx *bbolt.Tx) error {
		info, err := os.Stat(path)
		if err == nil && info.Size() < tx.Size() {
			err = fmt.Errorf("%w: %d bytes of at least %d", bolterrors.ErrInvalid, info.Size(), tx.Size())
		}
		return err
	})
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return db, nil
}

// Path is the file's.
func (d *DB) Path() string { return d.bolt.Path() }

// Tell has the outcome of each transaction that writes told from now on: nil if it is on disk. wrote is never called twice at once, and
// writing waits for it.
func (d *DB) Tell(wrote func(error)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.told = wrote
}

// Closed is closed when the DB is.
func (d *DB) Closed() <-chan struct{} { return d.closed }

// View reads at one moment. It ends with store.ErrUnavailable on a closed DB.
func (d *DB) View(read func(*bbolt.Tx) error) error { return closed(d.bolt.View(read)) }

// Update runs apply, once, in a transaction that it may share with other callers, and returns when that is on disk.
// An error of apply is returned to its caller alone and does not undo the transaction, so apply must decide before it
// writes. If ctx ends before apply has begun, it never does.
func (d *DB) Update(ctx context.Context, apply func(*bbolt.Tx) error) error {
	w := &write{apply: apply, done: make(chan error, 1)}
	d.mu.Lock()
	d.queue = append(d.queue, w)
	d.mu.Unlock()
	select {
	case err := <-w.done:
		return err
	case <-ctx.Done():
		if d.withdraw(w) {
			return ctx.Err()
		}
		return <-w.done
	case d.turn <- struct{}{}:
	}
	if ctx.Err() != nil && d.withdraw(w) {
		<-d.turn
		return ctx.Err()
	}
	// Between joining the queue and getting the turn, another caller may have written this one's part: then the queue
	// holds only later ones, which are written just the same.
	d.mu.Lock()
	batch := d.queue
	d.queue = nil
	d.mu.Unlock()
	if len(batch) > 0 {
		d.write(batch)
	}
	<-d.turn
	return <-w.done
}

func (d *DB) write(batch []*write) {
	err := outcome(d.bolt.Update(func(tx *bbolt.Tx) error {
		for _, w := range batch {
			w.err = w.apply(tx)
		}
		return nil
	}))
	d.mu.Lock()
	told := d.told
	d.mu.Unlock()
	told(err)
	for _, w := range batch {
		if err != nil {
			w.err = err
		}
		w.done <- w.err
	}
}

func (d *DB) withdraw(w *write) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.queue {
		if d.queue[i] == w {
			d.queue = append(d.queue[:i:i], d.queue[i+1:]...)
			return true
		}
	}
	return false
}

// Close waits for transactions under way and releases the file.
func (d *DB) Close() error {
	d.close.Do(func() { close(d.closed) })
	return d.bolt.Close()
}

// outcome names the errors of a write transaction. Those of what it applies are not among them, so they are a disk's (full,
// read-only, broken). They leave the transaction undone, but for a failed fsync, after which nothing is known: all are
// ErrUnavailable.
func outcome(err error) error {
	if err = closed(err); err == nil || errors.Is(err, store.ErrUnavailable) {
		return err
	}
	return fmt.Errorf("%w: %w", store.ErrUnavailable, err)
}

// closed names the error of a file that is closed.
func closed(err error) error {
	if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
		return fmt.Errorf("%w: the file is closed", store.ErrUnavailable)
	}
	return err
}
