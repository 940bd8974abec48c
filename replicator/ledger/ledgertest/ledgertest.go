// Package ledgertest is the conformance suite of ledger.Ledger: what every implementation is held to.
package ledgertest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"portolan/replicator/ledger"
)

// patience bounds every wait of the suite. It is no measure of speed: what takes that long is broken.
const patience = 5 * time.Minute

// Raw overwrites, or makes, the stored form of a record behind the ledger's back, keeping its revision if the engine lets it.
type Raw func(key ledger.Key, value []byte)

// Run holds the ledgers that open returns to the contract. Each call of open returns an empty ledger of its own, closed
// by open's own clean-up, and one that remembers fewer than maxFeed changes.
func Run(t *testing.T, maxFeed int, open func(t *testing.T) (ledger.Ledger, Raw)) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, ledger.Ledger)
	}{
		{"CompareAndSet", testCompareAndSet},
		{"Generations", testGenerations},
		{"MixedGenerations", testMixedGenerations},
		{"RecordsRoundTrip", testRoundTrip},
		{"Refusals", testRefusals},
		{"PageOrder", testPageOrder},
		{"PageBoundaries", testPageBoundaries},
		{"Contention", testContention},
		{"Feed", testFeed},
		{"FeedWakes", testFeedWakes},
		{"FeedIsComplete", testFeedIsComplete},
		{"FeedGap", func(t *testing.T, l ledger.Ledger) { testFeedGap(t, l, maxFeed) }},
		{"Withdrawn", testWithdrawn},
		{"Closed", testClosed},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l, _ := open(t)
			test.run(t, l)
		})
	}
	for _, test := range []struct {
		name string
		run  func(*testing.T, ledger.Ledger, Raw)
	}{
		{"Damage", testDamage},
		{"Schema", testSchema},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			l, raw := open(t)
			test.run(t, l, raw)
		})
	}
}

// Tag is a key for tests.
func Tag(repository, tag string) ledger.Key {
	return ledger.Key{Registry: "contoso", Repository: repository, Kind: ledger.Tag, Reference: tag}
}

// Digest is the nth of a row of digests.
func Digest(n int) string { return fmt.Sprintf("sha256:%064x", n) }

func manifest(repository string, n int) ledger.Key {
	return ledger.Key{Registry: "contoso", Repository: repository, Kind: ledger.Manifest, Reference: Digest(n)}
}

func record(n int) *ledger.Record {
	return &ledger.Record{Head: ledger.Version{Digest: Digest(n), Sequence: uint64(n), Origin: "westus", Time: time.Unix(1_700_000_000, int64(n)).UTC()}}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func set(t *testing.T, l ledger.Ledger, key ledger.Key, r *ledger.Record, revision uint64) uint64 {
	t.Helper()
	next, err := l.CompareAndSet(deadline(t), 0, key, r, revision)
	if err != nil {
		t.Fatalf("setting %s: %v", key, err)
	}
	return next
}

func testCompareAndSet(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	for _, key := range []ledger.Key{Tag("team/app", "1.2"), manifest("team/app", 1)} {
		if _, err := l.Get(ctx, key); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("a key never written: %v", err)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, record(1), 12345); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("a revision of a key that is not there: %v", err)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, nil, 12345); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("deleting a revision of a key that is not there: %v", err)
		}
		r1 := set(t, l, key, record(1), 0)
		if _, err := l.CompareAndSet(ctx, 0, key, record(2), 0); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("creating what is there: %v", err)
		}
		r2 := set(t, l, key, record(2), r1)
		r3 := set(t, l, key, record(2), r2) // the same content again is a write too
		if r1 == 0 || r2 <= r1 || r3 <= r2 {
			t.Errorf("revisions %d, %d, %d do not grow", r1, r2, r3)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, record(9), r2); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("a stale revision: %v", err)
		}
		row, err := l.Get(ctx, key)
		if err != nil || row.Revision != r3 || row.Key != key || !reflect.DeepEqual(row.Record, *record(2)) {
			t.Errorf("read %+v, %v", row, err)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, nil, r2); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("deleting a stale revision: %v", err)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, nil, r3); err != nil {
			t.Errorf("deleting: %v", err)
		}
		if _, err := l.Get(ctx, key); !errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("a deleted key: %v", err)
		}
		if _, err := l.CompareAndSet(ctx, 0, key, record(3), r3); !errors.Is(err, ledger.ErrConflict) {
			t.Errorf("a revision from before the deletion: %v", err)
		}
		if r4 := set(t, l, key, record(3), 0); r4 <= r3 {
			t.Errorf("revision %d after a deletion, %d before it", r4, r3)
		}
	}
}

func generation(t *testing.T, l ledger.Ledger, registry string) ledger.Generation {
	t.Helper()
	g, err := l.Generation(deadline(t), registry)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func advance(t *testing.T, l ledger.Ledger, registry string) ledger.Generation {
	t.Helper()
	if err := l.Advance(deadline(t), registry); err != nil {
		t.Fatal(err)
	}
	return generation(t, l, registry)
}

// testGenerations refuses writers of any generation but the present one of the key's registry.
func testGenerations(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	key, elsewhere := Tag("team/app", "1.2"), Tag("team/app", "1.2")
	elsewhere.Registry = "fabrikam"
	if g := generation(t, l, "contoso"); g != 0 {
		t.Errorf("the generation before the first is %d", g)
	}
	revision := set(t, l, key, record(1), 0)
	former := []ledger.Generation{0}
	for n := range 3 {
		present := advance(t, l, "contoso")
		if last := former[len(former)-1]; present <= last {
			t.Errorf("generation %d follows %d", present, last)
		}
		head, err := l.Head(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, g := range append(former, present+1) {
			if _, err := l.CompareAndSet(ctx, g, key, record(9), revision); !errors.Is(err, ledger.ErrGeneration) {
				t.Errorf("a write by %d in %d: %v", g, present, err)
			}
			if _, err := l.CompareAndSet(ctx, g, key, nil, revision); !errors.Is(err, ledger.ErrGeneration) {
				t.Errorf("a delete by %d in %d: %v", g, present, err)
			}
			if _, err := l.CompareAndSet(ctx, g, Tag("team/app", "new"), record(9), 0); !errors.Is(err, ledger.ErrGeneration) {
				t.Errorf("a new record by %d in %d: %v", g, present, err)
			}
		}
		if row, err := l.Get(ctx, key); err != nil || row.Revision != revision {
			t.Errorf("what was refused was written: %+v, %v", row, err)
		}
		if after, err := l.Head(ctx); err != nil || after != head {
			t.Errorf("what was refused is in the feed: %v, %v", after, err)
		}
		if revision, err = l.CompareAndSet(ctx, present, key, record(n+2), revision); err != nil {
			t.Errorf("a write by the present generation: %v", err)
		}
		former = append(former, present)
	}
	if generation(t, l, "fabrikam") != 0 {
		t.Error("another registry has its generation")
	}
	set(t, l, elsewhere, record(1), 0)
}

// testMixedGenerations lets writers of several generations and registries write at once: none takes another with it.
func testMixedGenerations(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	registries := []string{"contoso", "fabrikam", "tailspin"}
	present := make(map[string]ledger.Generation)
	for _, r := range registries {
		advance(t, l, r)
		present[r] = advance(t, l, r)
	}
	var wg sync.WaitGroup
	for n := range 90 {
		key := Tag("app", fmt.Sprint("t", n))
		key.Registry = registries[n%len(registries)]
		by, want := present[key.Registry], error(nil)
		if n%7 == 0 {
			by, want = by-1, ledger.ErrGeneration
		}
		wg.Go(func() {
			if _, err := l.CompareAndSet(ctx, by, key, record(1), 0); !errors.Is(err, want) {
				t.Errorf("writing %s by %d in %d: %v", key, by, present[key.Registry], err)
			}
			if _, err := l.Get(ctx, key); errors.Is(err, ledger.ErrNotFound) != (want != nil) {
				t.Errorf("then reading %s: %v", key, err)
			}
		})
	}
	wg.Wait()
}

func testRoundTrip(t *testing.T, l ledger.Ledger) {
	at := time.Date(2026, 2, 3, 4, 5, 6, 789_000_001, time.UTC)
	for i, r := range []ledger.Record{
		{},
		{Head: ledger.Version{Digest: ledger.Absent, Sequence: 3, Origin: "westus", Time: at}},
		{
			Head:    ledger.Version{Digest: Digest(9), Sequence: 9, Origin: "eu-west-1", Time: at},
			History: []ledger.Past{{Digest: Digest(8), Sequence: 8}, {Sequence: 7}},
			Applied: map[string]uint64{"7f3c9a": 7, "zero": 0},
			Intents: []ledger.Intent{{Incarnation: "7f3c9a", Digest: Digest(9), Sequence: 9, WriteID: "w"}, {Incarnation: "x", Sequence: 10, WriteID: "y"}},
			Refused: map[string]string{"7f3c9a": "it is \"too large\""},
		},
		{Head: ledger.Version{Digest: Digest(1), Sequence: 1, Origin: "o", Time: at}, ConflictOf: "latest"},
	} {
		key := Tag("round", fmt.Sprint("trip-", i))
		before := r.Clone()
		set(t, l, key, &r, 0)
		row, err := l.Get(deadline(t), key)
		if err != nil || !reflect.DeepEqual(row.Record, before) {
			t.Errorf("wrote %+v, read %+v, %v", before, row.Record, err)
		}
	}
}

func testRefusals(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	for _, key := range []ledger.Key{
		{}, Tag("", "t"), Tag("Team", "t"), Tag("a//b", "t"), Tag("../a", "t"), Tag("a,b", "t"), Tag("a", ""), Tag("a", "x/y"), Tag("a", ".x"),
		Tag("a", strings.Repeat("t", 129)), Tag(strings.Repeat("r", 256), "t"),
		{Registry: "contoso", Repository: "a", Kind: ledger.Manifest, Reference: "latest"},
		{Registry: "contoso", Repository: "a", Kind: "x", Reference: "latest"},
		{Registry: "a/b", Repository: "a", Kind: ledger.Tag, Reference: "latest"},
	} {
		if _, err := l.CompareAndSet(ctx, 0, key, record(1), 0); err == nil || errors.Is(err, ledger.ErrUnavailable) {
			t.Errorf("the key %q: %v, want a refusal", key, err)
		}
		if _, err := l.Get(ctx, key); err == nil || errors.Is(err, ledger.ErrNotFound) {
			t.Errorf("get of %q: %v, want a refusal", key, err)
		}
	}
	huge := record(1)
	huge.Intents = []ledger.Intent{{WriteID: strings.Repeat("w", ledger.MaxRecord)}}
	if _, err := l.CompareAndSet(ctx, 0, Tag("a", "huge"), huge, 0); err == nil {
		t.Error("a record of any size was taken")
	}
	if head, err := l.Head(ctx); err != nil || head.Position != 0 {
		t.Errorf("the head after refusals only: %v, %v", head, err)
	}
}

// fill writes a registry whose names sort differently by other rules than Compare, and returns its keys in order.
func fill(t *testing.T, l ledger.Ledger) (keys []ledger.Key) {
	t.Helper()
	for _, repository := range []string{"a", "a-b", "a.b", "a/b", "a/b/c", "a/bc", "a0", "a_b", "aa", "b"} {
		for i, tag := range []string{"1", "1.0", "1-0", "10", "A", "_x", "latest", "v1.2.3_4"} {
			keys = append(keys, Tag(repository, tag))
			if i < 3 {
				keys = append(keys, manifest(repository, i))
			}
		}
	}
	keys = append(keys, ledger.Key{Registry: "contoso", Repository: "b", Kind: ledger.Manifest, Reference: "sha512:" + strings.Repeat("a", 128)})
	// Neighbours that must never be seen.
	others := []ledger.Key{
		{Registry: "contos", Repository: "a", Kind: ledger.Tag, Reference: "1"},
		{Registry: "contoso-x", Repository: "a", Kind: ledger.Tag, Reference: "1"},
		{Registry: "contosox", Repository: "a", Kind: ledger.Tag, Reference: "1"},
	}
	shuffled := append(slices.Clone(keys), others...)
	rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
	var group sync.WaitGroup
	for _, key := range shuffled {
		group.Go(func() {
			if _, err := l.CompareAndSet(t.Context(), 0, key, record(1), 0); err != nil {
				t.Errorf("setting %s: %v", key, err)
			}
		})
	}
	group.Wait()
	slices.SortFunc(keys, ledger.Compare)
	return keys
}

func page(t *testing.T, l ledger.Ledger, repository string, after ledger.Key, limit int) (keys []ledger.Key) {
	t.Helper()
	rows, err := l.Page(deadline(t), "contoso", repository, after, limit)
	if err != nil {
		t.Fatalf("paging after %s: %v", after, err)
	}
	for _, row := range rows {
		if !reflect.DeepEqual(row.Record, *record(1)) || row.Revision == 0 {
			t.Errorf("paged %+v", row)
		}
		keys = append(keys, row.Key)
	}
	return keys
}

func testPageOrder(t *testing.T, l ledger.Ledger) {
	want := fill(t, l)
	for _, limit := range []int{1, 3, 7, len(want) - 1, len(want), len(want) + 1, 10000} {
		var got []ledger.Key
		var after ledger.Key
		for {
			keys := page(t, l, "", after, limit)
			got = append(got, keys...)
			if len(keys) < limit {
				break
			}
			after = keys[len(keys)-1]
		}
		if !slices.Equal(got, want) {
			t.Fatalf("by pages of %d: %v, want %v", limit, got, want)
		}
	}
}

func testPageBoundaries(t *testing.T, l ledger.Ledger) {
	want := fill(t, l)
	cut := func(repository string, after ledger.Key, limit int) (keys []ledger.Key) {
		for _, key := range want {
			if (repository == "" || key.Repository == repository) && (after == ledger.Key{} || ledger.Compare(key, after) > 0) && len(keys) < limit {
				keys = append(keys, key)
			}
		}
		return keys
	}
	afters := append([]ledger.Key{
		{}, Tag("a", "0"), Tag("a", "1.0.0"), Tag("a/a", "x"), Tag("0", "x"), Tag("z", "x"), Tag("a/b/c/d", "x"), manifest("a", 99), manifest("b", 0),
	}, want...)
	random := rand.New(rand.NewPCG(1, 2))
	for _, repository := range []string{"", "a", "a/b", "b", "none"} {
		for _, after := range afters {
			limit := random.IntN(20)
			if got := page(t, l, repository, after, limit); !slices.Equal(got, cut(repository, after, limit)) {
				t.Errorf("%d of %q after %s: %v, want %v", limit, repository, after, got, cut(repository, after, limit))
			}
		}
	}
	if rows, err := l.Page(deadline(t), "fabrikam", "", ledger.Key{}, 10); err != nil || len(rows) != 0 {
		t.Errorf("a registry without records: %v, %v", rows, err)
	}
}

// testContention counts in records that many writers share, some by several at once.
func testContention(t *testing.T, l ledger.Ledger) {
	const writers, each, keys = 16, 12, 4
	ctx := deadline(t)
	var group sync.WaitGroup
	for w := range writers {
		group.Go(func() {
			key := Tag("contended", fmt.Sprint("t", w%keys))
			for done := 0; done < each; {
				row, err := l.Get(ctx, key)
				if err != nil && !errors.Is(err, ledger.ErrNotFound) {
					t.Error(err)
					return
				}
				_, err = l.CompareAndSet(ctx, 0, key, record(int(row.Record.Head.Sequence)+1), row.Revision)
				switch {
				case err == nil:
					done++
				case !errors.Is(err, ledger.ErrConflict):
					t.Error(err)
					return
				}
			}
		})
	}
	group.Wait()
	for k := range keys {
		row, err := l.Get(ctx, Tag("contended", fmt.Sprint("t", k)))
		if want := uint64(each * writers / keys); err != nil || row.Record.Head.Sequence != want {
			t.Errorf("key %d counts %d, want %d (%v)", k, row.Record.Head.Sequence, want, err)
		}
	}
}

func testFeed(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	start, err := l.Head(ctx)
	if err != nil || start.Position != 0 {
		t.Fatalf("the head of an empty ledger: %v, %v", start, err)
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if keys, cursor, err := l.Changes(short, start); err != nil || len(keys) != 0 || cursor != start {
		t.Errorf("a wait that timed out: %v, %v, %v", keys, cursor, err)
	}
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if keys, cursor, err := l.Changes(gone, start); !errors.Is(err, context.Canceled) || len(keys) != 0 || cursor != start {
		t.Errorf("a wait that was cancelled: %v, %v, %v", keys, cursor, err)
	}
	type answer struct {
		keys   []ledger.Key
		cursor ledger.Cursor
		err    error
	}
	waiting := make(chan answer)
	go func() {
		keys, cursor, err := l.Changes(ctx, start)
		waiting <- answer{keys, cursor, err}
	}()
	a, b := Tag("feed", "a"), manifest("feed/b", 1)
	r := set(t, l, a, record(1), 0)
	first := <-waiting
	if first.err != nil || !slices.Equal(first.keys, []ledger.Key{a}) || first.cursor.Position <= start.Position {
		t.Errorf("the first change: %+v", first)
	}
	r = set(t, l, a, record(2), r)
	set(t, l, b, record(1), 0)
	set(t, l, a, nil, r) // a deletion is a change too
	keys, cursor, err := l.Changes(ctx, first.cursor)
	slices.SortFunc(keys, ledger.Compare)
	if err != nil || !slices.Equal(keys, []ledger.Key{a, b}) {
		t.Errorf("three changes of two keys: %v, %v", keys, err)
	}
	if head, err := l.Head(ctx); err != nil || head != cursor {
		t.Errorf("the head is %v, %v; the cursor after all changes %v", head, err, cursor)
	}
	if _, err := l.CompareAndSet(ctx, 0, b, record(2), 1<<40); !errors.Is(err, ledger.ErrConflict) {
		t.Error(err)
	}
	if head, _ := l.Head(ctx); head != cursor {
		t.Errorf("a conflict moved the head from %v to %v", cursor, head)
	}
	if _, _, err := l.Changes(ctx, ledger.Cursor{Position: cursor.Position + 1000}); !errors.Is(err, ledger.ErrGap) {
		t.Errorf("a cursor of another ledger: %v, want ErrGap", err)
	}
}

// testFeedWakes changes a record each time a follower has seen the change before, and begins to wait for the next.
func testFeedWakes(t *testing.T, l ledger.Ledger) {
	const rounds = 50
	ctx := deadline(t)
	seen := make(chan struct{})
	go func() {
		defer close(seen)
		var cursor ledger.Cursor
		for range rounds {
			keys, next, err := l.Changes(ctx, cursor)
			if err != nil || len(keys) != 1 {
				t.Errorf("waiting for a change after %v: %v, %v", cursor, keys, err)
				return
			}
			cursor = next
			seen <- struct{}{}
		}
	}()
	var revision uint64
	for i := range rounds {
		revision = set(t, l, Tag("feed", "t"), record(i+1), revision)
		if _, ok := <-seen; !ok {
			return
		}
	}
}

// testFeedIsComplete follows the feed while many write. Whoever follows and reads must come to know every record as it
// is in the end, and each acknowledged change must be in the feed once its cursor is reached.
func testFeedIsComplete(t *testing.T, l ledger.Ledger) {
	const writers, each = 8, 30 // fewer changes than any feed remembers: no follower is slow enough for a gap
	ctx := deadline(t)
	var mu sync.Mutex
	acknowledged := map[ledger.Key]uint64{}
	var group, followers sync.WaitGroup
	finished := make(chan struct{})
	for range 2 {
		followers.Go(func() {
			known := map[ledger.Key]uint64{}
			var cursor ledger.Cursor
			over := false
			for {
				var target ledger.Cursor
				if over {
					var err error
					if target, err = l.Head(ctx); err != nil {
						t.Error(err)
						return
					}
					if cursor == target {
						break
					}
				}
				wait, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
				keys, next, err := l.Changes(wait, cursor)
				cancel()
				if errors.Is(err, ledger.ErrGap) {
					t.Error("a gap in a feed that remembers everything")
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				if next.Position < cursor.Position {
					t.Errorf("the cursor went from %v to %v", cursor, next)
				}
				seen := map[ledger.Key]bool{}
				for _, key := range keys {
					if seen[key] {
						t.Errorf("%s twice in one answer", key)
					}
					seen[key] = true
					row, err := l.Get(ctx, key)
					if err != nil {
						t.Errorf("reading the changed %s: %v", key, err)
						return
					}
					known[key] = row.Revision
				}
				cursor = next
				select {
				case <-finished:
					over = true
				default:
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if !reflect.DeepEqual(known, acknowledged) {
				for key, revision := range acknowledged {
					if known[key] != revision {
						t.Errorf("%s was acknowledged at %d, the follower knows %d", key, revision, known[key])
					}
				}
				t.Errorf("the follower knows %d keys, %d were written", len(known), len(acknowledged))
			}
		})
	}
	for w := range writers {
		group.Go(func() {
			revisions := map[ledger.Key]uint64{}
			for i := range each {
				key := Tag(fmt.Sprint("feed/", w), fmt.Sprint("t", i%10))
				r, err := l.CompareAndSet(ctx, 0, key, record(i+1), revisions[key])
				if err != nil {
					t.Errorf("setting %s: %v", key, err)
					return
				}
				revisions[key] = r
			}
			mu.Lock()
			defer mu.Unlock()
			for key, r := range revisions {
				acknowledged[key] = r
			}
		})
	}
	group.Wait()
	close(finished)
	followers.Wait()
}

func testFeedGap(t *testing.T, l ledger.Ledger, maxFeed int) {
	ctx := deadline(t)
	// By several, since each waits for its disk; until the feed is long, since several changes may be one step of it.
	var group sync.WaitGroup
	for w := range 16 {
		group.Go(func() {
			for i := 1; ; i++ {
				key := Tag("gap", fmt.Sprintf("%d-%d", w, i))
				if _, err := l.CompareAndSet(ctx, 0, key, record(i), 0); err != nil {
					t.Errorf("setting %s: %v", key, err)
					return
				}
				if head, err := l.Head(ctx); err != nil || head.Position >= uint64(maxFeed) {
					return
				}
			}
		})
	}
	group.Wait()
	if _, _, err := l.Changes(ctx, ledger.Cursor{}); !errors.Is(err, ledger.ErrGap) {
		t.Errorf("the beginning of a long feed: %v, want ErrGap", err)
	}
	// As ErrGap says: take the head, page, go on from there.
	head, err := l.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	key := Tag("gap", "t")
	set(t, l, key, record(1), 0)
	keys, next, err := l.Changes(ctx, head)
	if err != nil || !slices.Equal(keys, []ledger.Key{key}) || next.Position != head.Position+1 {
		t.Errorf("after the head: %v, %v, %v", keys, next, err)
	}
	// The oldest cursor that still works, and the one before it.
	low, high := uint64(0), head.Position
	changes := 0
	for low+1 < high {
		middle := (low + high) / 2
		keys, _, err := l.Changes(ctx, ledger.Cursor{Position: middle})
		if errors.Is(err, ledger.ErrGap) {
			low = middle
		} else if err != nil {
			t.Fatal(err)
		} else {
			high, changes = middle, len(keys)
		}
	}
	remembered := next.Position - high
	if remembered < 200 || remembered >= uint64(maxFeed) {
		t.Errorf("the feed remembers %d positions, want at least 200 and fewer than %d", remembered, maxFeed)
	}
	// Each position is the creation of a record at least.
	if uint64(changes) < remembered {
		t.Errorf("%d changes at %d positions: some are missing", changes, remembered)
	}
}

// testDamage damages records of both kinds among sound ones. Those are read as before, and the damaged ones can be replaced.
func testDamage(t *testing.T, l ledger.Ledger, raw Raw) {
	ctx := deadline(t)
	keys := []ledger.Key{manifest("a", 1), Tag("a", "1"), Tag("a", "2"), Tag("b", "1"), Tag("b", "2")}
	for _, key := range keys {
		set(t, l, key, record(1), 0)
	}
	cursor, err := l.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	damaged := map[ledger.Key]string{keys[0]: `{"v":1,"h":`, keys[2]: "", keys[4]: `{"h":{"s":1}}`}
	for key, value := range damaged {
		raw(key, []byte(value))
	}
	var rows []ledger.Row
	for len(rows) < len(keys) {
		var after ledger.Key
		if len(rows) > 0 {
			after = rows[len(rows)-1].Key
		}
		page, err := l.Page(ctx, "contoso", "", after, 2)
		if err != nil || len(page) == 0 {
			t.Fatalf("paging after %s: %d rows, %v", after, len(page), err)
		}
		rows = append(rows, page...)
	}
	for i, key := range keys {
		row, err := l.Get(ctx, key)
		_, bad := damaged[key]
		if err != nil || row.Key != key || row.Revision == 0 || (row.Damage != nil) != bad || bad != reflect.DeepEqual(row.Record, ledger.Record{}) {
			t.Errorf("get of %s: %+v, %v; damaged: %v", key, row, err, bad)
		}
		paged := rows[i]
		if paged.Key != key || paged.Revision != row.Revision || (paged.Damage != nil) != bad || !reflect.DeepEqual(paged.Record, row.Record) {
			t.Errorf("paged %+v, got %+v", paged, row)
		}
	}
	for key := range damaged {
		row, err := l.Get(ctx, key)
		if err != nil {
			t.Fatal(err)
		}
		for _, stale := range []uint64{0, row.Revision + 1} {
			if _, err := l.CompareAndSet(ctx, 0, key, record(2), stale); !errors.Is(err, ledger.ErrConflict) {
				t.Errorf("replacing %s at revision %d, not %d: %v", key, stale, row.Revision, err)
			}
		}
		if key == keys[4] {
			set(t, l, key, nil, row.Revision)
			if _, err := l.Get(ctx, key); !errors.Is(err, ledger.ErrNotFound) {
				t.Errorf("%s was deleted: %v", key, err)
			}
			continue
		}
		set(t, l, key, record(2), row.Revision)
		if row, err := l.Get(ctx, key); err != nil || row.Damage != nil || !reflect.DeepEqual(row.Record, *record(2)) {
			t.Errorf("%s was replaced, and reads as %+v, %v", key, row, err)
		}
	}
	changed, _, err := l.Changes(ctx, cursor)
	if err != nil || len(changed) != len(damaged) {
		t.Errorf("%d damaged records were replaced; the feed tells of %v, %v", len(damaged), changed, err)
	}
}

// testSchema reads a record of another schema: that one can be read by another Portolan, so it is no damage.
func testSchema(t *testing.T, l ledger.Ledger, raw Raw) {
	ctx := deadline(t)
	key := Tag("team/app", "1.2")
	set(t, l, key, record(1), 0)
	for _, other := range []int{ledger.Schema + 1, ledger.Schema - 2} {
		raw(key, fmt.Appendf(nil, `{"v":%d,"h":"another type"}`, other))
		if _, err := l.Get(ctx, key); !errors.Is(err, ledger.ErrSchema) {
			t.Errorf("get of schema %d: %v, want ErrSchema", other, err)
		}
		if _, err := l.Page(ctx, "contoso", "", ledger.Key{}, 1); !errors.Is(err, ledger.ErrSchema) || !strings.Contains(err.Error(), key.String()) {
			t.Errorf("paging through schema %d: %v, want ErrSchema and the key", other, err)
		}
	}
}

// testWithdrawn writes with a context that has ended. Not once may such a write be applied.
func testWithdrawn(t *testing.T, l ledger.Ledger) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	key := Tag("withdrawn", "t")
	for range 20 {
		if _, err := l.CompareAndSet(ctx, 0, key, record(1), 0); !errors.Is(err, context.Canceled) {
			t.Errorf("compare-and-set with a context that had ended: %v", err)
		}
	}
	if row, err := l.Get(deadline(t), key); !errors.Is(err, ledger.ErrNotFound) {
		t.Errorf("it was applied: %+v, %v", row, err)
	}
}

func testClosed(t *testing.T, l ledger.Ledger) {
	ctx := deadline(t)
	key := Tag("closed", "t")
	waiting := make(chan error)
	go func() {
		_, _, err := l.Changes(ctx, ledger.Cursor{})
		waiting <- err
	}()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; !errors.Is(err, ledger.ErrUnavailable) {
		t.Errorf("the wait under way ended with %v", err)
	}
	_, getErr := l.Get(ctx, key)
	_, setErr := l.CompareAndSet(ctx, 0, key, record(1), 0)
	_, pageErr := l.Page(ctx, "contoso", "", ledger.Key{}, 1)
	_, headErr := l.Head(ctx)
	_, generationErr := l.Generation(ctx, "contoso")
	for what, err := range map[string]error{"get": getErr, "compare-and-set": setErr, "page": pageErr, "head": headErr,
		"generation": generationErr, "advance": l.Advance(ctx, "contoso")} {
		if !errors.Is(err, ledger.ErrUnavailable) {
			t.Errorf("%s on a closed ledger: %v", what, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Errorf("a second close: %v", err)
	}
}
