// Package storetest is the conformance suite of store.Store: what every implementation is held to.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"portolan/store"
)

// patience bounds every wait of the suite. It is no measure of speed: what takes that long is broken.
const patience = 5 * time.Minute

// Run holds the stores that open returns to the contract. Each call of open returns an empty store of its own, which
// is closed by open's own clean-up.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, store.Store)
	}{
		{"Conditions", testConditions},
		{"Revisions", testRevisions},
		{"Transactions", testTransactions},
		{"Refusals", testRefusals},
		{"List", testList},
		{"Model", testModel},
		{"ConcurrentIncrements", testConcurrentIncrements},
		{"ConcurrentTransfers", testConcurrentTransfers},
		{"Watch", testWatch},
		{"WatchFinalValue", testWatchFinalValue},
		{"WatchEnds", testWatchEnds},
		{"LeaseTakesTurns", testLeaseTakesTurns},
		{"Withdrawn", testWithdrawn},
		{"Closed", testClosed},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			test.run(t, open(t))
		})
	}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func commit(t *testing.T, s store.Store, ops ...store.Op) uint64 {
	t.Helper()
	revision, err := s.Commit(deadline(t), ops...)
	if err != nil {
		t.Fatalf("commit of %v: %v", ops, err)
	}
	return revision
}

func get(t *testing.T, s store.Store, key string) (store.Entry, bool) {
	t.Helper()
	entry, err := s.Get(deadline(t), key)
	if errors.Is(err, store.ErrNotFound) {
		return store.Entry{}, false
	}
	if err != nil {
		t.Fatalf("get %q: %v", key, err)
	}
	return entry, true
}

func testConditions(t *testing.T, s store.Store) {
	const absent, right, wrong = "absent", "right", "wrong"
	for _, test := range []struct {
		name     string
		exists   bool
		op       func(key string, revision uint64) store.Op
		revision string
		conflict bool
		want     string // the value afterwards; "" if the key is to be absent
	}{
		{"put new", false, func(k string, r uint64) store.Op { return store.Put(k, "new") }, right, false, "new"},
		{"put over", true, func(k string, r uint64) store.Op { return store.Put(k, "new") }, right, false, "new"},
		{"put-if creates", false, func(k string, r uint64) store.Op { return store.PutIf(k, "new", r) }, absent, false, "new"},
		{"put-if does not create over", true, func(k string, r uint64) store.Op { return store.PutIf(k, "new", r) }, absent, true, "old"},
		{"put-if replaces", true, func(k string, r uint64) store.Op { return store.PutIf(k, "new", r) }, right, false, "new"},
		{"put-if stale", true, func(k string, r uint64) store.Op { return store.PutIf(k, "new", r) }, wrong, true, "old"},
		{"put-if of nothing", false, func(k string, r uint64) store.Op { return store.PutIf(k, "new", r) }, wrong, true, ""},
		{"delete", true, func(k string, r uint64) store.Op { return store.Delete(k) }, right, false, ""},
		{"delete nothing", false, func(k string, r uint64) store.Op { return store.Delete(k) }, right, false, ""},
		{"delete-if", true, func(k string, r uint64) store.Op { return store.DeleteIf(k, r) }, right, false, ""},
		{"delete-if stale", true, func(k string, r uint64) store.Op { return store.DeleteIf(k, r) }, wrong, true, "old"},
		{"delete-if of nothing", false, func(k string, r uint64) store.Op { return store.DeleteIf(k, r) }, wrong, true, ""},
		{"delete-if absent", false, func(k string, r uint64) store.Op { return store.DeleteIf(k, r) }, absent, false, ""},
		{"delete-if absent but there", true, func(k string, r uint64) store.Op { return store.DeleteIf(k, r) }, absent, true, "old"},
		{"check", true, func(k string, r uint64) store.Op { return store.Check(k, r) }, right, false, "old"},
		{"check stale", true, func(k string, r uint64) store.Op { return store.Check(k, r) }, wrong, true, "old"},
		{"check absent", false, func(k string, r uint64) store.Op { return store.Check(k, r) }, absent, false, ""},
		{"check absent but there", true, func(k string, r uint64) store.Op { return store.Check(k, r) }, absent, true, "old"},
		{"check of nothing", false, func(k string, r uint64) store.Op { return store.Check(k, r) }, wrong, true, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			key := "conditions/" + strings.ReplaceAll(test.name, " ", "-")
			stale := commit(t, s, store.Put(key, "older"))
			revision := commit(t, s, store.Put(key, "old"))
			if !test.exists {
				commit(t, s, store.Delete(key))
			}
			switch test.revision {
			case absent:
				revision = 0
			case wrong:
				revision = stale
			}
			// A second operation shows whether a conflict leaves the whole transaction undone.
			witness := key + "-witness"
			_, err := s.Commit(deadline(t), store.Put(witness, "x"), test.op(key, revision))
			if got := errors.Is(err, store.ErrConflict); got != test.conflict || (err != nil && !got) {
				t.Errorf("commit: %v, want conflict: %v", err, test.conflict)
			}
			entry, _ := get(t, s, key)
			if entry.Value != test.want {
				t.Errorf("the value is %q, want %q", entry.Value, test.want)
			}
			if _, there := get(t, s, witness); there == test.conflict {
				t.Errorf("the other operation of the transaction was applied: %v, want %v", there, !test.conflict)
			}
		})
	}
}

func testRevisions(t *testing.T, s store.Store) {
	seen := map[uint64]string{0: "no revision"}
	for i, op := range []store.Op{
		store.Put("r/k", "a"), store.Put("r/k", "b"), store.Put("r/k", "b"), store.Put("r/k", "a"),
		store.Delete("r/k"), store.Put("r/k", "a"), store.Delete("r/k"), store.PutIf("r/k", "a", 0),
	} {
		revision := commit(t, s, op)
		if op.Verb == store.VerbDelete {
			continue
		}
		if before, again := seen[revision]; again {
			t.Errorf("write %d got revision %d, which was that of %s", i, revision, before)
		}
		seen[revision] = fmt.Sprintf("write %d", i)
		if entry, _ := get(t, s, "r/k"); entry.Revision != revision || entry.Value != op.Value || entry.Key != "r/k" {
			t.Errorf("after write %d with revision %d: %+v", i, revision, entry)
		}
	}
}

func testTransactions(t *testing.T, s store.Store) {
	r := commit(t, s, store.Put("t/a", "1"), store.Put("t/b", "2"), store.Put("t/c", "3"))
	for _, key := range []string{"t/a", "t/b", "t/c"} {
		if entry, _ := get(t, s, key); entry.Revision != r {
			t.Errorf("%s has revision %d, the transaction returned %d", key, entry.Revision, r)
		}
	}
	if next := commit(t, s, store.Check("t/a", r), store.PutIf("t/b", "20", r), store.DeleteIf("t/c", r)); next == r {
		t.Error("a transaction that wrote has the revision of the one before")
	}
	if _, err := s.Commit(deadline(t), store.PutIf("t/a", "x", r), store.PutIf("t/b", "x", r)); !errors.Is(err, store.ErrConflict) {
		t.Errorf("a stale second condition: %v, want ErrConflict", err)
	}
	if entry, _ := get(t, s, "t/a"); entry.Value != "1" {
		t.Errorf("the first half of a failed transaction was applied: %+v", entry)
	}
	// In order: the last write of a key stands, and a condition sees what came before it.
	commit(t, s, store.Put("t/d", "1"), store.Put("t/d", "2"), store.Delete("t/a"), store.PutIf("t/a", "again", 0))
	if d, _ := get(t, s, "t/d"); d.Value != "2" {
		t.Errorf("t/d is %q, want the second value", d.Value)
	}
	if a, _ := get(t, s, "t/a"); a.Value != "again" {
		t.Errorf("t/a is %q, want what was put after its deletion", a.Value)
	}
	full := make([]store.Op, store.MaxOps)
	for i := range full {
		full[i] = store.Put(fmt.Sprintf("t/full/%03d", i), strings.Repeat("v", 2048))
	}
	r = commit(t, s, full...)
	for i := range full {
		full[i] = store.DeleteIf(full[i].Key, r)
	}
	commit(t, s, full...)
	if tree, err := s.List(deadline(t), "t/full/"); err != nil || len(tree.Entries) != 0 {
		t.Errorf("after a full transaction of deletions: %v, %v", tree, err)
	}
}

func testRefusals(t *testing.T, s store.Store) {
	ctx := deadline(t)
	for _, key := range []string{"", "/a", "a/", "a//b", "a/../b", ".", "a\x00b", "a\nb", "\xff", strings.Repeat("k", store.MaxKey+1)} {
		if _, err := s.Commit(ctx, store.Put(key, "v")); err == nil {
			t.Errorf("the key %.20q was taken", key)
		}
		if _, err := s.Get(ctx, key); err == nil || errors.Is(err, store.ErrNotFound) {
			t.Errorf("get of the key %.20q: %v, want a refusal", key, err)
		}
	}
	for _, prefix := range []string{"a", "/", "/a/", "a//"} {
		if _, err := s.List(ctx, prefix); err == nil {
			t.Errorf("the prefix %q was taken", prefix)
		}
	}
	if _, err := s.Commit(ctx); err == nil {
		t.Error("an empty transaction was taken")
	}
	if _, err := s.Commit(ctx, slices.Repeat([]store.Op{store.Put("a", "b")}, store.MaxOps+1)...); err == nil {
		t.Error("a transaction of too many operations was taken")
	}
	if _, err := s.Commit(ctx, store.Put("a", strings.Repeat("v", store.MaxCommit+1))); err == nil {
		t.Error("a transaction of too many bytes was taken")
	}
	if tree, err := s.List(ctx, ""); err != nil || len(tree.Entries) != 0 {
		t.Errorf("after refusals only: %v, %v", tree, err)
	}
	// What a person or a daemon may well write.
	for key, value := range map[string]string{
		"orders/prefix/203.0.113.0_24": "westus", "a b/c%2F?x=1&y#z": "é\n", "ünï/código": "", "bytes": "\x00\xff\xfe",
		"big": strings.Repeat("v", store.MaxCommit-3), strings.Repeat("k", store.MaxKey): "long",
	} {
		commit(t, s, store.Put(key, value))
		if entry, there := get(t, s, key); !there || entry.Value != value || entry.Key != key {
			t.Errorf("%.30q came back as %.30q, %v", key, entry.Key, there)
		}
	}
}

func testList(t *testing.T, s store.Store) {
	keys := []string{"l/a", "l/a-b", "l/a.b/c", "l/a/b", "l/a/c/d", "l/ab", "l/b", "m", "l"}
	for _, key := range keys {
		commit(t, s, store.Put(key, "v:"+key))
	}
	slices.Sort(keys)
	for _, prefix := range []string{"", "l/", "l/a/", "l/a.b/", "l/none/"} {
		var want []string
		for _, key := range keys {
			if strings.HasPrefix(key, prefix) {
				want = append(want, key)
			}
		}
		tree, err := s.List(deadline(t), prefix)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, entry := range tree.Entries {
			got = append(got, entry.Key)
			if single, _ := get(t, s, entry.Key); single != entry {
				t.Errorf("listed as %+v, read as %+v", entry, single)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("below %q: %q, want %q", prefix, got, want)
		}
	}
	before, _ := s.List(deadline(t), "l/")
	for _, op := range []store.Op{store.Put("l/new", "1"), store.Put("l/new", "2"), store.Delete("l/new")} {
		commit(t, s, op)
		after, err := s.List(deadline(t), "l/")
		if err != nil || after.Revision <= before.Revision {
			t.Errorf("after %v the tree's revision went from %d to %d, %v", op, before.Revision, after.Revision, err)
		}
		before = after
	}
}

// testModel compares random transactions with a map.
func testModel(t *testing.T, s store.Store) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	model := map[string]store.Entry{}
	revisions := []uint64{0}
	for step := range 150 {
		var ops []store.Op
		for range 1 + random.IntN(4) {
			key := "m/" + string(rune('a'+random.IntN(4)))
			revision := model[key].Revision
			if random.IntN(3) == 0 {
				revision = revisions[random.IntN(len(revisions))]
			}
			ops = append(ops, store.Op{Verb: store.Verb(1 + random.IntN(int(store.VerbCheck))), Key: key, Value: strconv.Itoa(random.IntN(3)), Revision: revision})
		}
		// What the transaction should do; written marks what only its outcome can tell.
		const written = ^uint64(0)
		next, conflict := maps.Clone(model), false
		for _, op := range ops {
			if op.Verb != store.VerbPut && op.Verb != store.VerbDelete && next[op.Key].Revision != op.Revision {
				conflict = true
			}
			switch op.Verb {
			case store.VerbPut, store.VerbPutIf:
				next[op.Key] = store.Entry{Key: op.Key, Value: op.Value, Revision: written}
			case store.VerbDelete, store.VerbDeleteIf:
				delete(next, op.Key)
			}
		}
		revision, err := s.Commit(deadline(t), ops...)
		if got := errors.Is(err, store.ErrConflict); got != conflict || (err != nil && !got) {
			t.Fatalf("step %d, %v on %v: %v, want conflict: %v", step, ops, model, err, conflict)
		}
		if err == nil {
			for key, entry := range next {
				if entry.Revision == written {
					entry.Revision = revision
					next[key] = entry
					revisions = append(revisions, revision)
				}
			}
			model = next
		}
		tree, err := s.List(deadline(t), "m/")
		if err != nil {
			t.Fatal(err)
		}
		want := slices.SortedFunc(maps.Values(model), func(a, b store.Entry) int { return strings.Compare(a.Key, b.Key) })
		if !slices.Equal(tree.Entries, want) {
			t.Fatalf("step %d, after %v: %v, want %v", step, ops, tree.Entries, want)
		}
	}
}

func testConcurrentIncrements(t *testing.T, s store.Store) {
	const writers, each = 8, 20
	ctx := deadline(t)
	var group sync.WaitGroup
	for range writers {
		group.Go(func() {
			for done := 0; done < each; {
				entry, err := s.Get(ctx, "counter")
				if err != nil && !errors.Is(err, store.ErrNotFound) {
					t.Error(err)
					return
				}
				n, _ := strconv.Atoi(entry.Value)
				_, err = s.Commit(ctx, store.PutIf("counter", strconv.Itoa(n+1), entry.Revision))
				switch {
				case err == nil:
					done++
				case !errors.Is(err, store.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	if entry, _ := get(t, s, "counter"); entry.Value != strconv.Itoa(writers*each) {
		t.Errorf("the counter is %s after %d increments", entry.Value, writers*each)
	}
}

// testConcurrentTransfers moves amounts between accounts; every tree, listed or watched, must add up.
func testConcurrentTransfers(t *testing.T, s store.Store) {
	const accounts, start = 4, 100
	account := func(i int) string { return fmt.Sprintf("accounts/%d", i) }
	var opening []store.Op
	for i := range accounts {
		opening = append(opening, store.Put(account(i), strconv.Itoa(start)))
	}
	commit(t, s, opening...)
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	total := func(tree store.Tree) (sum int) {
		for _, entry := range tree.Entries {
			n, _ := strconv.Atoi(entry.Value)
			sum += n
		}
		return sum
	}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		_ = s.Watch(ctx, "accounts/", func(u store.Update) {
			if sum := total(u.Tree); u.Err == nil && sum != accounts*start {
				t.Errorf("watched a tree that adds up to %d: %v", sum, u.Tree)
			}
		})
	}()
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			for done := 0; done < 15; {
				tree, err := s.List(ctx, "accounts/")
				if err != nil {
					t.Error(err)
					return
				}
				if sum := total(tree); sum != accounts*start {
					t.Errorf("listed a tree that adds up to %d: %v", sum, tree)
				}
				i := random.IntN(accounts)
				from, to := tree.Entries[i], tree.Entries[(i+1+random.IntN(accounts-1))%accounts]
				a, _ := strconv.Atoi(from.Value)
				b, _ := strconv.Atoi(to.Value)
				_, err = s.Commit(ctx, store.PutIf(from.Key, strconv.Itoa(a-1), from.Revision), store.PutIf(to.Key, strconv.Itoa(b+1), to.Revision))
				switch {
				case err == nil:
					done++
				case !errors.Is(err, store.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	cancel()
	<-watched
}

// Follow watches prefix until the test ends and returns a function that waits for a tree that holds.
// It fails the test if deliver is ever called twice at once, or with a revision lower than one before.
func Follow(t *testing.T, s store.Store, prefix string) (await func(what string, holds func(store.Update) bool)) {
	t.Helper()
	var (
		mu      sync.Mutex
		last    store.Update
		some    bool
		changed = make(chan struct{}, 1)
		busy    sync.Mutex
	)
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = s.Watch(ctx, prefix, func(u store.Update) {
			if !busy.TryLock() {
				t.Error("deliver was called twice at once")
				return
			}
			defer busy.Unlock()
			mu.Lock()
			defer mu.Unlock()
			if some && u.Tree.Revision < last.Tree.Revision {
				t.Errorf("watched revision %d after %d", u.Tree.Revision, last.Tree.Revision)
			}
			last, some = u, true
			select {
			case changed <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() { cancel(); <-ended })
	return func(what string, holds func(store.Update) bool) {
		t.Helper()
		timeout := time.NewTimer(patience)
		defer timeout.Stop()
		for {
			mu.Lock()
			u, ok := last, some
			mu.Unlock()
			if ok && holds(u) {
				return
			}
			select {
			case <-changed:
			case <-timeout.C:
				t.Fatalf("never watched %s; last: %+v", what, u)
			}
		}
	}
}

// Value is a condition for Follow: the store can be read, and key has that value.
func Value(key, value string) func(store.Update) bool {
	return func(u store.Update) bool {
		entry, ok := u.Tree.Get(key)
		return u.Err == nil && ok && entry.Value == value
	}
}

func testWatch(t *testing.T, s store.Store) {
	await := Follow(t, s, "w/")
	all := Follow(t, s, "")
	await("the empty tree at once", func(u store.Update) bool { return u.Err == nil && len(u.Tree.Entries) == 0 })
	commit(t, s, store.Put("w/a", "1"), store.Put("x/a", "other"))
	await("the first value", func(u store.Update) bool { return Value("w/a", "1")(u) && len(u.Tree.Entries) == 1 })
	all("everything", func(u store.Update) bool { return Value("w/a", "1")(u) && Value("x/a", "other")(u) })
	commit(t, s, store.Put("w/a", "2"), store.Put("w/b", "3"))
	await("both values", func(u store.Update) bool { return Value("w/a", "2")(u) && Value("w/b", "3")(u) })
	commit(t, s, store.Delete("w/a"))
	await("the deletion", func(u store.Update) bool { return u.Err == nil && len(u.Tree.Entries) == 1 && Value("w/b", "3")(u) })
	commit(t, s, store.Delete("w/b"))
	await("the last deletion", func(u store.Update) bool { return u.Err == nil && len(u.Tree.Entries) == 0 })
	commit(t, s, store.Put("w/c", "4"))
	await("a value after emptiness", Value("w/c", "4"))
}

func testWatchFinalValue(t *testing.T, s store.Store) {
	const watchers, writes = 4, 100
	ctx := deadline(t)
	var group sync.WaitGroup
	for i := range watchers {
		watch, cancel := context.WithCancel(ctx)
		group.Go(func() {
			defer cancel()
			delivered := 0
			err := s.Watch(watch, "w/", func(u store.Update) {
				delivered++
				if i == 0 && delivered%3 == 0 {
					time.Sleep(5 * time.Millisecond) // a slow one: changes come meanwhile
				}
				if Value("w/k", strconv.Itoa(writes))(u) {
					cancel()
				}
			})
			if ctx.Err() != nil || !errors.Is(err, context.Canceled) {
				t.Errorf("watcher %d never saw the final value: %v", i, err)
			}
		})
	}
	for n := 1; n <= writes; n++ {
		commit(t, s, store.Put("w/k", strconv.Itoa(n)))
	}
	group.Wait()
}

func testWatchEnds(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(deadline(t))
	err := s.Watch(ctx, "w/", func(store.Update) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("a cancelled watch returned %v", err)
	}
	if err := s.Watch(ctx, "w/", func(store.Update) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("a watch with a context that had ended returned %v", err)
	}
	if err := s.Watch(deadline(t), "no-slash", func(store.Update) {}); err == nil {
		t.Error("a watch of no prefix was taken")
	}
}

// testWithdrawn writes with a context that has ended. Not once may such a write be applied.
func testWithdrawn(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 20 {
		if _, err := s.Commit(ctx, store.Put("k", "v")); !errors.Is(err, context.Canceled) {
			t.Errorf("commit with a context that had ended: %v", err)
		}
	}
	if entry, there := get(t, s, "k"); there {
		t.Errorf("it was applied: %+v", entry)
	}
}

func testClosed(t *testing.T, s store.Store) {
	ctx := deadline(t)
	ready, ended := make(chan struct{}), make(chan error)
	go func() {
		var once sync.Once
		ended <- s.Watch(ctx, "w/", func(store.Update) { once.Do(func() { close(ready) }) })
	}()
	<-ready
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("the watch under way ended with %v", err)
	}
	if _, err := s.Get(ctx, "k"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("get on a closed store: %v", err)
	}
	if _, err := s.List(ctx, "k/"); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("list on a closed store: %v", err)
	}
	if _, err := s.Commit(ctx, store.Put("k", "v")); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("commit on a closed store: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("a second close: %v", err)
	}
}
