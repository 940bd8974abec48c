package events

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// errDamaged says that a spool's file is not what was written: the machine lost its power on a disk that acknowledges what
// it has not written, say, or the file is half a copy.
var errDamaged = errors.New("the file is damaged")

// inspect reads the file of a spool to its last record, and changes nothing. bolt answers damage with panics, when it opens a
// file for writing also in goroutines of its own, where nobody could recover them; and pages that the file lacks are faults.
func inspect(path string) (err error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && info.Size() == 0 {
		return nil // bolt makes it
	}
	if err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", errDamaged, r)
		}
	}()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return ErrInUse
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), err != nil && info.Size() < int64(4*os.Getpagesize()):
		// The last: a new file has four pages.
		return fmt.Errorf("%w: %w", errDamaged, err)
	case err != nil:
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		root := tx.Bucket(rootBucket)
		if root == nil {
			return nil
		}
		return root.ForEachBucket(func(replica []byte) error {
			if err := inspectReplica(root.Bucket(replica)); err != nil {
				return fmt.Errorf("%w: %q: %w", errDamaged, replica, err)
			}
			return nil
		})
	})
}

// inspectReplica reads all of one replica: every item has its place in the queue, and every place its item.
func inspectReplica(b *bbolt.Bucket) error {
	items, order := b.Bucket(itemsBucket), b.Bucket(orderBucket)
	for _, name := range [][]byte{itemsBucket, orderBucket, seenBucket, ringBucket} {
		part := b.Bucket(name)
		if part == nil {
			return fmt.Errorf("it has no %s", name)
		}
		if err := part.ForEach(func(_, _ []byte) error { return nil }); err != nil {
			return err
		}
	}
	n := 0
	err := items.ForEach(func(key, _ []byte) error {
		rec, err := readRecord(items, key)
		if err != nil {
			return err
		}
		if !bytes.Equal(order.Get(sequenceKey(rec.Order)), key) {
			return fmt.Errorf("item %q is not in the queue", key)
		}
		n++
		return nil
	})
	if err != nil {
		return err
	}
	return order.ForEach(func(_, _ []byte) error {
		if n--; n < 0 {
			return errors.New("the queue holds what is no item")
		}
		return nil
	})
}
