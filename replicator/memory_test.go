package replicator

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	ledgerbolt "portolan/replicator/ledger/bolt"
	storebolt "portolan/store/bolt"
)

// rememberers is several replicators over one ledger, each with a memory of its own.
func rememberers(t *testing.T, n int) (all []*Replicator, grow func(n int)) {
	t.Helper()
	dir := t.TempDir()
	db, err := storebolt.OpenDB(filepath.Join(dir, "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	l, err := ledgerbolt.New(db)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		m, err := recall(filepath.Join(dir, string(rune('a'+i))))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, &Replicator{memory: m, options: Options{Store: storebolt.New(db), Ledger: l, Log: zap.NewNop()}})
	}
	written := 0
	return all, func(n int) {
		for range n {
			written++
			key := ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Tag, Reference: "t" + string(rune('a'+written))}
			if _, err := l.CompareAndSet(t.Context(), key, &ledger.Record{}, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func agree(t *testing.T, r *Replicator) string {
	t.Helper()
	if err := r.agree(t.Context()); err != nil {
		t.Fatal(err)
	}
	return r.memory.epoch()
}

func TestEpochs(t *testing.T) {
	t.Parallel()
	all, grow := rememberers(t, 3)
	a, b, c := all[0], all[1], all[2]
	first := agree(t, a)
	if first == "" || agree(t, b) != first || agree(t, a) != first {
		t.Fatal("they do not agree on the first epoch")
	}
	grow(3)
	if agree(t, a) != first || a.memory.position() != 3 {
		t.Errorf("a ledger that grows is another one: %+v", a.memory.mark)
	}
	// Both have seen more than there is. One begins an epoch, and the other joins it: what it remembers is of the one before.
	for _, r := range []*Replicator{a, b} {
		if err := r.memory.saw(100); err != nil {
			t.Fatal(err)
		}
	}
	second := agree(t, a)
	if second == first {
		t.Fatal("an older ledger went unnoticed")
	}
	if agree(t, b) != second || agree(t, a) != second || agree(t, c) != second {
		t.Error("each begins an epoch of its own")
	}
	if b.memory.position() != 3 {
		t.Errorf("what was seen of the old ledger is held against the new one: %+v", b.memory.mark)
	}
}

func TestMemoryOutlivesTheProcess(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seen.json")
	m, err := recall(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.set(mark{Epoch: "e", Position: 7}); err != nil {
		t.Fatal(err)
	}
	for _, position := range []uint64{9, 8} {
		if err := m.saw(position); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.flush(); err != nil {
		t.Fatal(err)
	}
	if m, err = recall(path); err != nil || m.mark != (mark{Epoch: "e", Position: 9}) {
		t.Errorf("%+v, %v", m, err)
	}
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(files) != 1 {
		t.Errorf("%v, %v", files, err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := recall(path); err == nil {
		t.Error("half a file is taken for a memory")
	}
}

// shrunk is a ledger that was restored from a backup while it was followed.
type shrunk struct{ ledger.Ledger }

func (shrunk) Changes(_ context.Context, after ledger.Cursor) ([]ledger.Key, ledger.Cursor, error) {
	return nil, after, ledger.ErrGap
}

func (shrunk) Head(context.Context) (ledger.Cursor, error) { return ledger.Cursor{Position: 5}, nil }

func TestRollbackWhileRunning(t *testing.T) {
	t.Parallel()
	m := new(memory)
	r := &registry{options: &Options{Ledger: shrunk{}}, memory: m, log: zap.NewNop()}
	if err := r.follow(t.Context(), ledger.Cursor{Position: 6}); !errors.Is(err, errRolledBack) {
		t.Error(err)
	}
}
