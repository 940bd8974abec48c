package replicator

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	ledgerbolt "portolan/replicator/ledger/bolt"
	ledgerconsul "portolan/replicator/ledger/consul"
	"portolan/store"
	storebolt "portolan/store/bolt"
	storeconsul "portolan/store/consul"
	"portolan/test/bed"
	"portolan/topology"
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
			if _, err := l.CompareAndSet(t.Context(), 0, key, &ledger.Record{}, 0); err != nil {
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
	if agree(t, a) != first || a.memory.last().Position != 3 {
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
	if b.memory.last().Position != 3 {
		t.Errorf("what was seen of the old ledger is held against the new one: %+v", b.memory.mark)
	}
}

// A backup that is older than an epoch brings back the one before, with all that was believed in it. It is no epoch of another process
// that could be joined.
func TestFormerEpochIsNotJoined(t *testing.T) {
	t.Parallel()
	all, _ := rememberers(t, 2)
	a, b := all[0], all[1]
	first := agree(t, a)
	agree(t, b)
	if err := a.memory.saw(100); err != nil {
		t.Fatal(err)
	}
	second := agree(t, a)
	if second == first || agree(t, b) != second {
		t.Fatal("they do not agree on the second epoch")
	}
	if _, err := a.options.Store.Commit(t.Context(), store.Put(epochKey, first)); err != nil {
		t.Fatal(err)
	}
	third := agree(t, remade(t, b))
	if third == first || third == second {
		t.Error("the states and the ledger of a former epoch are believed")
	}
	if agree(t, a) != third || agree(t, b) != third {
		t.Error("each begins an epoch of its own")
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
	if m, err = recall(path); err != nil || !reflect.DeepEqual(m.mark, mark{Epoch: "e", Position: 9}) {
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

// remade is a process of the same name that starts: what it knows is in its file.
func remade(t *testing.T, r *Replicator) *Replicator {
	t.Helper()
	m, err := recall(r.memory.path)
	if err != nil {
		t.Fatal(err)
	}
	return &Replicator{memory: m, options: r.options}
}

// The witness goes back with the store, and nobody but its process writes it: so it tells of a rollback whatever was
// written since.
func TestWitness(t *testing.T) {
	t.Parallel()
	all, grow := rememberers(t, 2)
	a, b := all[0], all[1]
	kept := a.options.Store
	attest := func(r *Replicator) {
		t.Helper()
		if err := r.attest(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	saw := func(position uint64) {
		t.Helper()
		grow(1)
		if err := a.memory.saw(position); err != nil {
			t.Fatal(err)
		}
		attest(a)
	}
	witness := func() store.Entry {
		t.Helper()
		entry, err := kept.Get(t.Context(), witnesses+a.memory.last().Name)
		if err != nil {
			t.Fatal(err)
		}
		return entry
	}
	first := agree(t, a)
	attest(a)
	agree(t, b)
	attest(b)
	saw(1)
	older := witness()
	attest(a)
	if witness() != older {
		t.Error("it is written though nothing has changed")
	}
	saw(2)
	if witness() == older {
		t.Fatal("it is not renewed")
	}
	if a = remade(t, a); agree(t, a) != first {
		t.Error("a restart begins an epoch")
	}
	attest(a)
	// The store goes back, and the ledger is written to by somebody else.
	grow(3)
	for _, restored := range []store.Op{store.Put(older.Key, older.Value), store.Delete(older.Key), store.Put(older.Key, "?")} {
		before := a.memory.epoch()
		if _, err := kept.Commit(t.Context(), restored); err != nil {
			t.Fatal(err)
		}
		if err := a.attest(t.Context()); !errors.Is(err, errRolledBack) {
			t.Errorf("%+v: %v", restored, err)
		}
		a = remade(t, a)
		if agree(t, a) == before {
			t.Errorf("%+v went unnoticed", restored)
		}
		if err := b.attest(t.Context()); !errors.Is(err, errRolledBack) {
			t.Errorf("the other does not hear of the new epoch: %v", err)
		}
		if agree(t, b) != a.memory.epoch() {
			t.Error("each begins an epoch of its own")
		}
		attest(a)
		attest(b)
	}
	// A clock that was set back is not a rollback; nor are witnesses that nobody renews kept for ever.
	ahead := time.Now().UTC().Add(time.Hour).Truncate(time.Millisecond)
	stale := witnesses + "stale"
	if _, err := kept.Commit(t.Context(), store.Put(older.Key, ahead.Format(time.RFC3339Nano)),
		store.Put(stale, time.Now().UTC().Add(-witnessLife-time.Hour).Format(time.RFC3339Nano))); err != nil {
		t.Fatal(err)
	}
	saw(100)
	if at, err := time.Parse(time.RFC3339Nano, witness().Value); err != nil || !at.After(ahead) {
		t.Errorf("it went back to %v, %v", at, err)
	}
	attest(a)
	if _, err := kept.Get(t.Context(), stale); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a stale witness: %v", err)
	}
	if _, err := kept.Get(t.Context(), witnesses+b.memory.last().Name); err != nil {
		t.Errorf("the other's: %v", err)
	}
}

// A real Consul is restored from a snapshot while a replicator is away, and another, which knew nothing of the ledger, writes
// to it until it stands behind what the first one saw.
func TestConsulRestoredAndOvertaken(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("needs a Consul server; runs without -short")
	}
	server := bed.NewConsul(t, bed.ConsulConfig{})
	admin, err := server.Client()
	if err != nil {
		t.Fatal(err)
	}
	client, err := storeconsul.Dial(storeconsul.Config{Address: server.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	l, s := ledgerconsul.New(client), storeconsul.New(client)
	t.Cleanup(func() { _, _ = l.Close(), s.Close() })
	dir := t.TempDir()
	process := func(name string) *Replicator {
		t.Helper()
		m, err := recall(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return &Replicator{memory: m, options: Options{Store: s, Ledger: l, Log: zap.NewNop()}}
	}
	written := 0
	grow := func(n int) {
		t.Helper()
		for range n {
			written++
			key := ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Tag, Reference: fmt.Sprint("t", written)}
			if _, err := l.CompareAndSet(t.Context(), 0, key, &ledger.Record{}, 0); err != nil {
				t.Fatal(err)
			}
		}
	}
	see := func(r *Replicator) {
		t.Helper()
		head, err := l.Head(t.Context())
		if err == nil {
			err = r.memory.saw(head.Position)
		}
		if err = errors.Join(err, r.attest(t.Context()), r.memory.flush()); err != nil {
			t.Fatal(err)
		}
	}
	a := process("a")
	first := agree(t, a)
	grow(3)
	see(a)
	if a = process("a"); agree(t, a) != first {
		t.Fatal("a restart begins an epoch")
	}
	snapshot, _, err := admin.Snapshot().Save(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer snapshot.Close()
	grow(3)
	see(a)
	if err := admin.Snapshot().Restore(nil, snapshot); err != nil {
		t.Fatal(err)
	}
	if head, err := l.Head(t.Context()); err != nil || head.Position >= a.memory.last().Position {
		t.Fatalf("the snapshot was not restored: %v, %v", head, err)
	}
	running := a // one that was running all the time, and has not looked yet
	b := process("b")
	if agree(t, b) != first {
		t.Fatal("one that remembers nothing began an epoch")
	}
	grow(10)
	see(b)
	if head, err := l.Head(t.Context()); err != nil || head.Position <= a.memory.last().Position {
		t.Fatalf("it is not overtaken: %v, %v", head, err)
	}
	if err := running.attest(t.Context()); !errors.Is(err, errRolledBack) {
		t.Errorf("the one that runs: %v", err)
	}
	if a = process("a"); agree(t, a) == first {
		t.Error("the restore went unnoticed by the one that was away")
	}
	if err := b.attest(t.Context()); !errors.Is(err, errRolledBack) || agree(t, b) != a.memory.epoch() {
		t.Errorf("the other did not join the new epoch: %v", err)
	}
}

// A process that ends leaves a witness of all that it saw.
func TestLastWitness(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	pushed := time.Now().Truncate(time.Millisecond)
	f.arrives("app:1", f.push("home", "app:1"), "other")
	f.stop()
	var witness time.Time
	f.before = func() {
		tree, err := f.store.List(t.Context(), agreements)
		if err != nil {
			t.Error(err)
		}
		witness = witnessAt(tree, f.replicator.memory.last().Name)
	}
	f.start()
	if witness.Before(pushed) {
		t.Errorf("the last witness is of %v, before the push at %v", witness, pushed)
	}
}

// A process that runs joins the epoch that another begins.
func TestEpochIsJoined(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.push("other", "app:1")
	f.start()
	f.arrives("app:1", digest, "home")
	f.ready("home", "other")
	if _, err := f.store.Commit(t.Context(), store.Put(epochKey, "another")); err != nil {
		t.Fatal(err)
	}
	for _, region := range []string{"home", "other"} {
		f.until(region+" to be known in the new epoch", func() bool { s := f.state(region); return s.Epoch == "another" && s.Status == topology.Ready })
	}
	f.arrives("app:2", f.push("home", "app:2"), "other")
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
	if m.last().Position != 6 {
		t.Errorf("who agrees on the epoch next knows of the position %d only, and takes the ledger for the same", m.last().Position)
	}
}
