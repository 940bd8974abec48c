package bolt_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"portolan/store"
	"portolan/store/bolt"
	"portolan/store/storetest"
)

// open opens the store in a file; whoever needs the file again closes it before.
func open(t testing.TB, path string) *bolt.Store {
	t.Helper()
	db, err := bolt.OpenDB(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return bolt.New(db)
}

func TestConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, filepath.Join(t.TempDir(), "portolan.db")) })
}

func TestReopen(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "portolan.db")
	s := open(t, path)
	revision, err := s.Commit(t.Context(), store.Put("a", "1"))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v; want mode 0600", info.Mode(), err)
	}
	s = open(t, path)
	if entry, err := s.Get(t.Context(), "a"); err != nil || entry.Value != "1" || entry.Revision != revision {
		t.Errorf("after reopening: %+v, %v", entry, err)
	}
	if s.OpenedAt() != revision {
		t.Errorf("opened at %d, want %d", s.OpenedAt(), revision)
	}
	if next, err := s.Commit(t.Context(), store.Put("b", "2")); err != nil || next <= revision {
		t.Errorf("the revision after reopening: %d, %v; want more than %d", next, err, revision)
	}
}

// A process that died holding a lease, and comes back, waits for nobody: the file's lock says that there is nobody.
func TestLeaseAfterACrash(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "portolan.db")
	options := store.LeaseOptions{Renew: time.Minute, TTL: time.Hour}
	for life := range 3 {
		s := open(t, path)
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		held := false
		_ = store.NewLease(s, "leases/k", fmt.Sprintf("life-%d", life), options).Run(ctx, func(context.Context, store.Grant) {
			held = true
			_ = s.Close() // nothing is released
			cancel()
		})
		cancel()
		if !held {
			t.Fatalf("life %d waited for one that was over", life)
		}
	}
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	garbage := filepath.Join(dir, "garbage")
	if err := os.WriteFile(garbage, []byte(strings.Repeat("no database ", 2000)), 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		garbage:                         "not a bolt file",
		filepath.Join(dir, "none", "f"): "its directory does not exist",
		dir:                             "is a directory",
	} {
		if _, err := bolt.OpenDB(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("opening %s: %v, want %q", path, err, want)
		}
	}
}

// A file of which the end, or a page in the middle, is lost must be refused with words, not with a panic or a fault.
func TestOpenDamaged(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole")
	s := open(t, whole)
	for i := range 8 {
		var ops []store.Op
		for j := range 50 {
			ops = append(ops, store.Put(fmt.Sprintf("k/%d-%d", i, j), strings.Repeat("v", 3000)))
		}
		if _, err := s.Commit(t.Context(), ops...); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	metas := 2 * os.Getpagesize()
	damaged := map[string][]byte{"overwritten": append(b[:metas:metas], bytes.Repeat([]byte{0xff}, len(b)-metas)...)}
	for _, cut := range []int{metas, 3 * metas, len(b) / 4, len(b) / 2, len(b) * 3 / 4} {
		damaged[fmt.Sprintf("cut-at-%d-of-%d", cut, len(b))] = b[:cut]
	}
	for name, content := range damaged {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		db, err := bolt.OpenDB(path)
		if err == nil {
			_ = db.Close()
		}
		if err == nil || !strings.Contains(err.Error(), path+": not a bolt file, or a damaged one") {
			t.Errorf("%s: %v, want it named as damaged", name, err)
		}
	}
}

// TestInUse needs a second process, since a process may lock the same file twice on some systems.
func TestInUse(t *testing.T) {
	t.Parallel()
	if path := os.Getenv("BOLT_TEST_OPEN"); path != "" {
		_, err := bolt.OpenDB(path)
		fmt.Println(err)
		return
	}
	path := filepath.Join(t.TempDir(), "portolan.db")
	open(t, path)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestInUse$")
	cmd.Env = append(os.Environ(), "BOLT_TEST_OPEN="+path)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), path+": the file is in use by another process (`fuser -v "+path) {
		t.Errorf("the second process said %q, %v", out, err)
	}
}

func TestUpdateKeepsCallersApart(t *testing.T) {
	t.Parallel()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	bucket := []byte("test")
	if err := db.Update(t.Context(), func(tx *bbolt.Tx) error { _, err := tx.CreateBucket(bucket); return err }); err != nil {
		t.Fatal(err)
	}
	refused := errors.New("refused")
	var group sync.WaitGroup
	for i := range 200 {
		group.Go(func() {
			err := db.Update(t.Context(), func(tx *bbolt.Tx) error {
				if i%3 == 0 {
					return refused
				}
				return tx.Bucket(bucket).Put(fmt.Append(nil, i), []byte("x"))
			})
			if got := errors.Is(err, refused); got != (i%3 == 0) || (err != nil && !got) {
				t.Errorf("caller %d got %v", i, err)
			}
		})
	}
	group.Wait()
	_ = db.View(func(tx *bbolt.Tx) error {
		for i := range 200 {
			if there := tx.Bucket(bucket).Get(fmt.Append(nil, i)) != nil; there != (i%3 != 0) {
				t.Errorf("the write of caller %d is there: %v", i, there)
			}
		}
		return nil
	})
}

func TestUpdateWithdrawn(t *testing.T) {
	t.Parallel()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	inside, leave := make(chan struct{}), make(chan struct{})
	first := make(chan error)
	go func() {
		first <- db.Update(context.Background(), func(*bbolt.Tx) error { close(inside); <-leave; return nil })
	}()
	<-inside
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = db.Update(ctx, func(*bbolt.Tx) error { t.Error("a withdrawn write was applied"); return nil })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a withdrawn write returned %v", err)
	}
	close(leave)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func BenchmarkCommit(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			s := open(b, filepath.Join(b.TempDir(), "portolan.db"))
			var group sync.WaitGroup
			for w := range writers {
				group.Go(func() {
					for i := w; i < b.N; i += writers {
						if _, err := s.Commit(b.Context(), store.Put(fmt.Sprintf("k/%d", i%1000), "v")); err != nil {
							b.Error(err)
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
		})
	}
}
