package bolt

import (
	"errors"
	"fmt"
	"syscall"
	"testing"

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
