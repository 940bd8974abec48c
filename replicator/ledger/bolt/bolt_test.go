package bolt_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"go.etcd.io/bbolt"

	"portolan/replicator/ledger"
	"portolan/replicator/ledger/bolt"
	"portolan/replicator/ledger/ledgertest"
	"portolan/store"
	boltstore "portolan/store/bolt"
)

func open(t testing.TB, path string) (*bolt.Ledger, *boltstore.DB) {
	t.Helper()
	db, err := boltstore.OpenDB(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	l, err := bolt.New(db)
	if err != nil {
		t.Fatal(err)
	}
	return l, db
}

func TestConformance(t *testing.T) {
	t.Parallel()
	ledgertest.Run(t, bolt.Feed+100, func(t *testing.T) (ledger.Ledger, ledgertest.Raw) {
		l, db := open(t, filepath.Join(t.TempDir(), "portolan.db"))
		return l, func(key ledger.Key, value []byte) {
			err := db.Update(t.Context(), func(tx *bbolt.Tx) error {
				b := tx.Bucket([]byte("ledger"))
				k := []byte(strings.Join([]string{key.Registry, key.Repository, string(key.Kind), key.Reference}, "\x00"))
				return b.Put(k, append(b.Get(k)[:8:8], value...))
			})
			if err != nil {
				t.Error(err)
			}
		}
	})
}

func TestReopen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "portolan.db")
	l, db := open(t, path)
	key := ledgertest.Tag("team/app", "1")
	revision, err := l.CompareAndSet(t.Context(), 0, key, &ledger.Record{ConflictOf: "x"}, 0)
	if err != nil {
		t.Fatal(err)
	}
	// The store lives in the same file and does not see the ledger.
	s := boltstore.New(db)
	if _, err := s.Commit(t.Context(), store.Put("a", "1")); err != nil {
		t.Fatal(err)
	}
	if tree, err := s.List(t.Context(), ""); err != nil || len(tree.Entries) != 1 {
		t.Errorf("the store beside a ledger: %v, %v", tree, err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Get(t.Context(), key); !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("a ledger whose file was closed: %v", err)
	}
	l, _ = open(t, path)
	if row, err := l.Get(t.Context(), key); err != nil || row.Revision != revision || row.Record.ConflictOf != "x" {
		t.Errorf("after reopening: %+v, %v", row, err)
	}
	if keys, _, err := l.Changes(t.Context(), ledger.Cursor{}); err != nil || len(keys) != 1 || keys[0] != key {
		t.Errorf("the feed after reopening: %v, %v", keys, err)
	}
}

// A value that is too short for a revision is damage as well, and is replaced like any other.
func TestShortValue(t *testing.T) {
	t.Parallel()
	l, db := open(t, filepath.Join(t.TempDir(), "portolan.db"))
	key := ledgertest.Tag("team/app", "1")
	if _, err := l.CompareAndSet(t.Context(), 0, key, &ledger.Record{}, 0); err != nil {
		t.Fatal(err)
	}
	err := db.Update(t.Context(), func(tx *bbolt.Tx) error {
		b := tx.Bucket([]byte("ledger"))
		k, _ := b.Cursor().First()
		return b.Put(k, []byte("short"))
	})
	if err != nil {
		t.Fatal(err)
	}
	row, err := l.Get(t.Context(), key)
	if err != nil || row.Damage == nil || row.Revision == 0 {
		t.Fatalf("it reads as %+v, %v", row, err)
	}
	if _, err := l.CompareAndSet(t.Context(), 0, key, &ledger.Record{ConflictOf: "x"}, row.Revision); err != nil {
		t.Fatal(err)
	}
	if row, err := l.Get(t.Context(), key); err != nil || row.Damage != nil || row.Record.ConflictOf != "x" {
		t.Errorf("it was replaced, and reads as %+v, %v", row, err)
	}
}

func BenchmarkCompareAndSet(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			l, _ := open(b, filepath.Join(b.TempDir(), "portolan.db"))
			var next atomic.Int64
			var group sync.WaitGroup
			for range writers {
				group.Go(func() {
					for {
						i := int(next.Add(1))
						if i > b.N {
							return
						}
						r := ledger.Record{Head: ledger.Version{Digest: ledgertest.Digest(i), Sequence: 1, Origin: "westeurope"}}
						if _, err := l.CompareAndSet(context.Background(), 0, ledgertest.Tag("team/app", fmt.Sprint("t", i)), &r, 0); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sets/s")
		})
	}
}
