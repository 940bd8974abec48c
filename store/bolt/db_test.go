package bolt

import (
	"errors"
	"fmt"
	"path/filepath"
	"syscall"
	"testing"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"portolan/store"
)

// What a write transaction ends with, in the forms in which bbolt gives it.
func TestOutcomesAreUnavailable(t *testing.T) {
	t.Parallel()
	for _, err := range []error{
		syscall.EIO, // an fsync
		fmt.Errorf("file sync error: %s", syscall.EIO),
		fmt.Errorf("file resize error: %s", syscall.ENOSPC),
		bolterrors.ErrDatabaseNotOpen,
	} {
		if got := outcome(err); !errors.Is(got, store.ErrUnavailable) {
			t.Errorf("%v became %v, want ErrUnavailable", err, got)
		}
	}
	if err := outcome(nil); err != nil {
		t.Errorf("success became %v", err)
	}
}

// What is told is whether the disk took it, not what a caller made of what it read.
func TestTell(t *testing.T) {
	t.Parallel()
	db, err := OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	var told []error
	db.Tell(func(err error) { told = append(told, err) })
	refuse := func(*bbolt.Tx) error { return store.ErrConflict }
	if err := db.Update(t.Context(), refuse); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a refused write: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if err := db.Update(t.Context(), refuse); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("a write that the file did not take: %v", err)
	}
	if len(told) != 2 || told[0] != nil || !errors.Is(told[1], store.ErrUnavailable) {
		t.Errorf("told: %v", told)
	}
}
