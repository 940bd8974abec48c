package events

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
	"go.uber.org/goleak"
	"pgregory.net/rapid"
)

// crashFile, in the environment, makes the test binary a writer that is to be killed: see TestKilled.
const crashFile = "PORTOLAN_TEST_SPOOL"

func TestMain(m *testing.M) {
	if path := os.Getenv(crashFile); path != "" {
		writeForever(path)
	}
	goleak.VerifyTestMain(m)
}

func open(t testing.TB, path string, limits Limits) *Spool {
	t.Helper()
	s, err := Open(path, limits)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newSpool(t testing.TB, limits Limits) *Spool {
	return open(t, filepath.Join(t.TempDir(), "spool.db"), limits)
}

func push(id, repository, tag, digest string) Event {
	return Event{ID: id, Action: Push, Repository: repository, Tag: tag, Digest: digest, Time: received, Received: received}
}

func digestOf(n int) string { return fmt.Sprintf("sha256:%064x", n) }

func add(t testing.TB, s *Spool, events ...Event) {
	t.Helper()
	if err := s.Add(t.Context(), "contoso", "westus", events); err != nil {
		t.Fatal(err)
	}
}

// take takes what is there; it fails if that is nothing.
func take(t testing.TB, s *Spool, limit int) []Item {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	items, err := s.Take(ctx, "contoso", "westus", limit)
	if err != nil {
		t.Fatal(err)
	}
	return items
}

func done(t testing.TB, s *Spool, items ...Item) {
	t.Helper()
	if err := s.Done(t.Context(), items...); err != nil {
		t.Fatal(err)
	}
}

// idle fails if something can be taken.
func idle(t testing.TB, s *Spool) {
	t.Helper()
	items, _, _, err := s.take("contoso/westus", 100, time.Now())
	if err != nil || len(items) > 0 {
		t.Fatalf("got %+v, %v, want nothing", items, err)
	}
}

func TestSpoolFolds(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{})
	first := push("1", "team/app", "1.2", digestA)
	second := push("2", "team/app", "1.2", digestB)
	second.Time = received.Add(-time.Minute) // happened before, told later
	again := push("3", "team/app", "1.2", digestA)
	again.Time = received.Add(time.Minute)
	ours := push("4", "team/app", "1.2", digestA)
	ours.WriteID, ours.Time = "w", received.Add(time.Second)
	add(t, s, first, second, push("5", "other", "x", digestA))
	add(t, s, again, ours)
	if n := s.Pending("contoso", "westus"); n != 2 {
		t.Errorf("%d items pending, want 2", n)
	}
	items := take(t, s, 10)
	if len(items) != 2 || items[0].Repository != "team/app" || items[1].Repository != "other" {
		t.Fatalf("got %+v, want team/app and then other", items)
	}
	var ids []string
	for _, e := range items[0].Evidence {
		ids = append(ids, e.ID)
	}
	if want := []string{"2", "4", "3"}; !slices.Equal(ids, want) {
		t.Errorf("got the evidence of events %v, want %v", ids, want)
	}
	if e, ok := items[0].Newest(); !ok || e.ID != "3" || e.Repository != "team/app" || !items[0].Marked.IsZero() || !items[0].Since.Equal(received) {
		t.Errorf("got %+v", items[0])
	}
	idle(t, s)
	done(t, s, items...)
	idle(t, s)
	if n := s.Pending("contoso", "westus"); n != 0 {
		t.Errorf("%d items pending, want 0", n)
	}
}

func TestSpoolForgetsReplays(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	s := open(t, path, Limits{Remembered: 2})
	e := push("1", "team/app", "1.2", digestA)
	add(t, s, e, e)
	done(t, s, take(t, s, 1)...)
	add(t, s, e)
	idle(t, s)
	s.Close()
	s = open(t, path, Limits{Remembered: 2})
	add(t, s, e)
	idle(t, s)
	// The same id with other content is another event.
	add(t, s, push("1", "team/app", "1.2", digestB))
	done(t, s, take(t, s, 1)...)
	// After two others it is no longer remembered.
	add(t, s, push("2", "team/app", "1.2", digestB), push("3", "team/app", "1.2", digestB))
	done(t, s, take(t, s, 1)...)
	add(t, s, e)
	if items := take(t, s, 1); items[0].Evidence[0].Digest != digestA {
		t.Errorf("got %+v", items)
	}
	// Events without an id are folded, never dropped.
	anonymous := push("", "team/x", "1.2", digestA)
	add(t, s, anonymous)
	done(t, s, take(t, s, 1)...)
	add(t, s, anonymous)
	take(t, s, 1)
}

func TestSpoolWhileWorkedOn(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{})
	add(t, s, push("1", "team/app", "1.2", digestA))
	work := take(t, s, 1)
	add(t, s, push("2", "team/app", "1.2", digestB))
	idle(t, s) // held
	if err := s.Mark(t.Context(), "contoso", "westus", "team/app"); err != nil {
		t.Fatal(err)
	}
	done(t, s, work...)
	items := take(t, s, 10)
	if len(items) != 2 || len(items[0].Evidence) != 1 || items[0].Evidence[0].Digest != digestB {
		t.Fatalf("got %+v, want what is new alone", items)
	}
	if m := items[1]; m.Reference != "" || m.Marked.IsZero() || m.Repository != "team/app" {
		t.Errorf("got %+v, want the mark", m)
	}
	// What is said again while the item is worked on may have happened after the look: it comes again.
	add(t, s, push("2b", "team/app", "1.2", digestB))
	// A mark that is set again while the repository is scanned stays.
	if err := s.Mark(t.Context(), "contoso", "westus", "team/app"); err != nil {
		t.Fatal(err)
	}
	done(t, s, items...)
	again := take(t, s, 10)
	if len(again) != 2 || len(again[0].Evidence) != 1 || again[0].Evidence[0].ID != "2b" || again[1].Marked.IsZero() {
		t.Fatalf("got %+v, want the event and the mark again", again)
	}
	done(t, s, again[0])
	// Done twice takes nothing more, and nothing from who has it now.
	add(t, s, push("3", "team/app", "1.2", digestA))
	done(t, s, items...)
	done(t, s, again[0])
	if got := s.Pending("contoso", "westus"); got != 2 {
		t.Errorf("%d items pending, want 2", got)
	}
	if items := take(t, s, 1); items[0].Evidence[0].ID != "3" {
		t.Errorf("got %+v", items)
	}
}

func TestSpoolLimits(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{References: 2, Repositories: 1})
	add(t, s, push("a", "a", "t", digestA))
	add(t, s, push("b", "a", "u", digestA))
	// Full: the first other repository is marked, the next marks the replica. Known references still take evidence.
	add(t, s, push("c", "b", "t", digestA), push("d", "b", "u", digestA), push("e", "c", "t", digestA), push("f", "a", "u", digestB))
	// Another replica has its own place.
	if err := s.Add(t.Context(), "contoso", "westeurope", []Event{push("c", "b", "t", digestA)}); err != nil {
		t.Fatal(err)
	}
	items := take(t, s, 10)
	var got []string
	for _, i := range items {
		got = append(got, fmt.Sprintf("%s:%s %d %v", i.Repository, i.Reference, len(i.Evidence), !i.Marked.IsZero()))
	}
	want := []string{"a:t 1 false", "a:u 2 false", "b: 0 true", ": 0 true"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if n := s.Pending("contoso", "westeurope"); n != 1 {
		t.Errorf("%d items pending in the other region, want 1", n)
	}
	done(t, s, items...)
	add(t, s, push("g", "d", "t", digestA))
	if items := take(t, s, 10); len(items) != 1 || items[0].Repository != "d" || !items[0].Marked.IsZero() {
		t.Errorf("got %+v, want an item again after there was place", items)
	}
}

// TestSpoolMovingTag holds that what was pushed is told of, however often its tag moved on before somebody looked.
func TestSpoolMovingTag(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{Evidence: 3})
	gone := push("gone", "a", "t", "")
	gone.Action = Delete
	add(t, s, gone)
	for i := range 6 {
		e := push(fmt.Sprint(i), "a", "t", digestOf(i))
		if i == 1 {
			e.WriteID = "w"
		}
		add(t, s, e)
	}
	items := take(t, s, 10)
	var got []string
	for _, i := range items {
		for _, e := range i.Evidence {
			got = append(got, fmt.Sprintf("%s %s%s %s %v", e.ID, e.Repository, e.Tag, e.WriteID, !i.Marked.IsZero()))
		}
	}
	if want := []string{"3 at  true", "4 at  true", "5 at  true", "0 a  false", "1 a w false", "2 a  false"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for n, i := range items[1:] {
		if i.Reference != digestOf(n) {
			t.Errorf("got the reference %s, want %s", i.Reference, digestOf(n))
		}
	}
	// Under its own name a manifest has one digest: nothing of it can be lost but who wrote it.
	for i := range 6 {
		e := push(fmt.Sprint("m", i), "a", "", digestA)
		e.WriteID = fmt.Sprint(i)
		add(t, s, e)
	}
	if items := take(t, s, 10); len(items) != 1 || len(items[0].Evidence) != 3 {
		t.Errorf("got %+v", items)
	}
}

func TestSpoolWaits(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	synctest.Test(t, func(t *testing.T) {
		s, err := Open(path, Limits{})
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		taken := make(chan []Item)
		go func() { taken <- take(t, s, 10) }()
		synctest.Wait()
		add(t, s, push("1", "a", "t", digestA))
		items := <-taken
		// Released with a delay, it comes after that, and no sooner.
		start := time.Now()
		s.Release(3*time.Second, items...)
		idle(t, s)
		items = take(t, s, 10)
		if waited := time.Since(start); waited != 3*time.Second {
			t.Errorf("waited %v, want 3s", waited)
		}
		// Released without one, at once.
		go func() { taken <- take(t, s, 10) }()
		synctest.Wait()
		s.Release(0, items...)
		<-taken
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := s.Take(ctx, "contoso", "westus", 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the context's error", err)
		}
		ended := make(chan error)
		go func() {
			_, err := s.Take(t.Context(), "contoso", "westus", 1)
			ended <- err
		}()
		synctest.Wait()
		s.Close()
		if err := <-ended; !errors.Is(err, ErrClosed) {
			t.Errorf("got %v, want %v", err, ErrClosed)
		}
		if err := s.Add(t.Context(), "contoso", "westus", []Event{push("2", "a", "t", digestA)}); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v, want %v", err, ErrClosed)
		}
		if _, err := s.Oldest("contoso", "westus"); !errors.Is(err, ErrClosed) {
			t.Errorf("got %v, want %v", err, ErrClosed)
		}
	})
}

func TestSpoolForget(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{})
	add(t, s, push("1", "a", "t", digestA))
	items := take(t, s, 1)
	if oldest, err := s.Oldest("contoso", "westus"); err != nil || !oldest.Equal(received) {
		t.Errorf("got %v, %v, want %v", oldest, err, received)
	}
	if err := s.Forget(t.Context(), "contoso", "westus"); err != nil {
		t.Fatal(err)
	}
	done(t, s, items...)
	idle(t, s)
	if oldest, err := s.Oldest("contoso", "westus"); err != nil || !oldest.IsZero() {
		t.Errorf("got %v, %v, want none", oldest, err)
	}
	add(t, s, push("1", "a", "t", digestA))
	take(t, s, 1)
}

func TestSpoolRefuses(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{})
	if err := s.Add(t.Context(), "contoso", "westus", []Event{push("1", "a/../b", "t", digestA)}); err == nil {
		t.Error("an invalid event was kept")
	}
	if err := s.Add(t.Context(), "con/toso", "westus", []Event{push("1", "a", "t", digestA)}); err == nil {
		t.Error("an event of an impossible replica was kept")
	}
	if _, err := Open(s.db.Path(), Limits{}); !errors.Is(err, ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	other := filepath.Join(t.TempDir(), "store.db")
	db, err := bbolt.Open(other, 0o600, nil)
	if err == nil {
		err = db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("store")); return err })
	}
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err := Open(other, Limits{}); err == nil {
		s.Close()
		t.Error("opened another program's file")
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("another program's file was put aside: %v", err)
	}
	if s, err := Open(filepath.Join(t.TempDir(), "none", "spool.db"), Limits{}); err == nil {
		s.Close()
		t.Error("opened a spool in a folder that does not exist")
	}
}

// TestSpoolDamaged damages the file of a spool in many ways. What could not be read is put aside, whole, and every replica is
// marked instead; what is opened as it is has all its items.
func TestSpoolDamaged(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	s := open(t, path, Limits{})
	const items = 200
	var events []Event
	for i := range items {
		events = append(events, push(fmt.Sprint(i), "a", fmt.Sprint("t", i), digestOf(i)))
	}
	add(t, s, events...)
	s.Close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	damages := map[string][]byte{
		"not a database":        []byte(strings.Repeat("no database ", 10000)),
		"never written":         make([]byte, 4*page),
		"cut within a page":     whole[:100],
		"cut after a page":      whole[:page],
		"cut after two":         whole[:2*page],
		"cut in the middle":     whole[:len(whole)/2],
		"a record of other use": bytes.Replace(bytes.Clone(whole), []byte(`{"o":7,`), []byte(`[[[[[[[`), 1),
		"an item out of place":  bytes.Replace(bytes.Clone(whole), []byte(`{"o":7,`), []byte(`{"o":8,`), 1),
	}
	surely := len(damages)
	for n := 2; n < len(whole)/page; n++ {
		damaged := bytes.Clone(whole)
		clear(damaged[n*page : (n+1)*page])
		damages[fmt.Sprint("zero page ", n)] = damaged
	}
	put := 0
	for name, content := range damages {
		file := filepath.Join(t.TempDir(), "spool.db")
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := Open(file, Limits{})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := take(t, s, items+1)
		aside, err := os.ReadFile(file + ".damaged")
		switch {
		case err == nil && bytes.Equal(aside, content):
			put++
			if len(got) != 1 || got[0].Repository != "" || got[0].Marked.IsZero() {
				t.Errorf("%s: got %+v, want the replica marked", name, got)
			}
			done(t, s, got...)
			idle(t, s)
			add(t, s, events[0])
			if got := take(t, s, items); len(got) != 1 || got[0].Reference != "t0" {
				t.Errorf("%s: afterwards got %+v", name, got)
			}
		case !errors.Is(err, os.ErrNotExist) || len(got) != items:
			t.Errorf("%s: %d items, put aside: %v", name, len(got), err)
		}
		s.Close()
	}
	// Most pages are the records'.
	if put < surely+5 {
		t.Errorf("%d of %d damaged files were put aside", put, len(damages))
	}
}

// TestSpoolConcurrent has many write, take, and finish at once: all that was added is handed out, nothing twice at once.
func TestSpoolConcurrent(t *testing.T) {
	t.Parallel()
	s := newSpool(t, Limits{})
	const writers, each = 8, 40
	var writing, reading sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for i := range each {
				e := push(fmt.Sprintf("%d-%d", w, i), "a", fmt.Sprint("t", i%10), digestOf(w*each+i))
				if err := s.Add(t.Context(), "contoso", "westus", []Event{e}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	seen, byTag, held := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for range 4 {
		reading.Go(func() {
			for {
				items, err := s.Take(ctx, "contoso", "westus", 3)
				if err != nil {
					return
				}
				mu.Lock()
				for _, i := range items {
					if held[i.Reference] {
						t.Errorf("%s was handed out twice at once", i.Reference)
					}
					held[i.Reference] = true
					for _, e := range i.Evidence {
						if e.Tag != "" && byTag[e.Digest] {
							t.Errorf("%s was handed out again after it was done", e.Digest)
						}
						byTag[e.Digest] = byTag[e.Digest] || e.Tag != ""
						seen[e.Digest] = true
					}
				}
				mu.Unlock()
				mu.Lock()
				for _, i := range items {
					held[i.Reference] = false
				}
				mu.Unlock()
				if err := s.Done(t.Context(), items...); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writing.Wait()
	for s.Pending("contoso", "westus") > 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	reading.Wait()
	if len(seen) != writers*each {
		t.Errorf("%d of %d were handed out", len(seen), writers*each)
	}
}

// TestSpoolProperty drives a spool with small limits through random additions, work, failures and crashes, and holds
// that what was handed out and done is exactly what was added, or covered by a mark that was set after it was.
func TestSpoolProperty(t *testing.T) {
	t.Parallel()
	type key struct{ repository, reference, action, digest, writeID string }
	keyOf := func(e Event) key {
		return key{e.Repository, e.Reference(), string(e.Action), e.Digest, e.WriteID}
	}
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp("", "spool")
		if err != nil {
			rt.Fatal(err)
		}
		defer os.RemoveAll(dir)
		limits := Limits{
			References:   rapid.IntRange(1, 6).Draw(rt, "references"),
			Repositories: rapid.IntRange(1, 3).Draw(rt, "repositories"),
			Evidence:     rapid.IntRange(1, 4).Draw(rt, "evidence"),
		}
		generation := 0
		file := func() string { return filepath.Join(dir, fmt.Sprint(generation)) }
		s, err := Open(file(), limits)
		if err != nil {
			rt.Fatal(err)
		}
		defer func() { s.Close() }()

		open := map[key]bool{}  // added, and not done or covered since
		added := map[key]bool{} // ever
		var work []Item
		ids := 0
		finish := func(items []Item, sure map[string]map[key]bool) {
			for _, i := range items {
				at := sure[itemKey(i.Repository, i.Reference)]
				for k := range at {
					covered := !i.Marked.IsZero() && (i.Repository == "" || i.Repository == k.repository && (i.Reference == "" || i.Reference == k.reference))
					if covered {
						delete(open, k)
					}
				}
				for _, e := range i.Evidence {
					if at[keyOf(e)] {
						delete(open, keyOf(e))
					}
				}
			}
		}
		// What was open when an item was taken; only that may be settled by it. A key that was added again since must come
		// again.
		taken := map[string]map[key]bool{}
		takeAll := func(limit int) []Item {
			items, _, _, err := s.take("contoso/westus", limit, time.Now())
			if err != nil {
				rt.Fatal(err)
			}
			for _, i := range items {
				snapshot := map[key]bool{}
				for k := range open {
					snapshot[k] = true
				}
				taken[itemKey(i.Repository, i.Reference)] = snapshot
				if len(i.Evidence) > limits.Evidence {
					rt.Fatalf("%d pieces of evidence, limit %d", len(i.Evidence), limits.Evidence)
				}
				if len(i.Evidence) == 0 && i.Marked.IsZero() {
					rt.Fatalf("an empty item: %+v", i)
				}
				for _, e := range i.Evidence {
					if !added[keyOf(e)] || e.Repository != i.Repository || e.Reference() != i.Reference {
						rt.Fatalf("handed out %+v, which nobody added", e)
					}
				}
			}
			return items
		}
		rt.Repeat(map[string]func(*rapid.T){
			"add": func(rt *rapid.T) {
				var events []Event
				for range rapid.IntRange(1, 4).Draw(rt, "n") {
					e := push("", rapid.SampledFrom([]string{"a", "b", "c/d"}).Draw(rt, "repository"),
						rapid.SampledFrom([]string{"", "t", "u"}).Draw(rt, "tag"), digestOf(rapid.IntRange(0, 2).Draw(rt, "digest")))
					e.WriteID = rapid.SampledFrom([]string{"", "", "w"}).Draw(rt, "write")
					if e.Tag != "" && rapid.Bool().Draw(rt, "delete") {
						e.Action, e.Digest = Delete, ""
					}
					e.Time = received.Add(time.Duration(rapid.IntRange(-5, 5).Draw(rt, "time")) * time.Second)
					ids++
					e.ID = fmt.Sprint(ids)
					events = append(events, e)
				}
				if rapid.Bool().Draw(rt, "doubled") {
					events = append(events, events[0])
				}
				if err := s.Add(context.Background(), "contoso", "westus", events); err != nil {
					rt.Fatal(err)
				}
				for _, e := range events {
					open[keyOf(e)], added[keyOf(e)] = true, true
					if e.Action == Push {
						// Where there is too much of its tag it waits under its digest.
						other := e
						other.Tag = ""
						added[keyOf(other)] = true
					}
					for _, snapshot := range taken {
						delete(snapshot, keyOf(e))
					}
				}
			},
			"take": func(rt *rapid.T) { work = append(work, takeAll(rapid.IntRange(1, 3).Draw(rt, "limit"))...) },
			"done": func(rt *rapid.T) {
				if len(work) == 0 {
					rt.Skip()
				}
				n := rapid.IntRange(0, len(work)-1).Draw(rt, "item")
				finish(work[n:n+1], taken)
				if err := s.Done(context.Background(), work[n]); err != nil {
					rt.Fatal(err)
				}
				work = slices.Delete(work, n, n+1)
			},
			"release": func(rt *rapid.T) {
				s.Release(0, work...)
				work = nil
			},
			"crash": func(rt *rapid.T) {
				// What is on disk at this moment is what is left.
				before := file()
				generation++
				copyFile(rt, before, file())
				s.Close()
				if s, err = Open(file(), limits); err != nil {
					rt.Fatal(err)
				}
				work, taken = nil, map[string]map[key]bool{}
			},
			"": func(rt *rapid.T) {
				if n := s.Pending("contoso", "westus"); n > limits.References+limits.Repositories+1 {
					rt.Fatalf("%d items pending", n)
				}
				if len(open) > 0 && s.Pending("contoso", "westus") == 0 {
					rt.Fatalf("nothing pending, but not settled: %v", open)
				}
			},
		})
		s.Release(0, work...)
		for range 2 { // the second finds nothing
			items := takeAll(1000)
			finish(items, taken)
			if err := s.Done(context.Background(), items...); err != nil {
				rt.Fatal(err)
			}
		}
		if len(open) > 0 || s.Pending("contoso", "westus") != 0 {
			rt.Fatalf("lost: %v; pending: %d", open, s.Pending("contoso", "westus"))
		}
	})
}

type fataler interface{ Fatal(...any) }

func copyFile(t fataler, from, to string) {
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// writeForever adds events from several goroutines and prints each that was acknowledged, until it is killed.
func writeForever(path string) {
	s, err := Open(path, Limits{})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := 0; ; i++ {
				e := push(fmt.Sprintf("%d-%d", w, i), "a", fmt.Sprintf("t%d-%d", w, i), digestA)
				if err := s.Add(context.Background(), "contoso", "westus", []Event{e}); err != nil {
					fmt.Fprintln(os.Stderr, err)
					os.Exit(1)
				}
				// One write each, so that lines do not mix.
				fmt.Printf("%s\n", e.Tag)
			}
		})
	}
	all.Wait()
}

// TestKilled kills a process in the middle of its writes, some times, and finds all that it acknowledged.
func TestKilled(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	acknowledged := map[string]bool{}
	for round := range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, os.Args[0])
		cmd.Env = append(os.Environ(), crashFile+"="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(out)
		for n := 0; ; n++ {
			if n == 40+30*round {
				cmd.Process.Kill()
			}
			line, err := lines.ReadString('\n')
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Error(err)
				}
				break
			}
			acknowledged[strings.TrimSpace(line)] = true
		}
		cmd.Wait()
	}
	if len(acknowledged) < 40 {
		t.Fatalf("only %d were acknowledged", len(acknowledged))
	}
	s := open(t, path, Limits{})
	items := take(t, s, 1_000_000)
	if len(items) != s.Pending("contoso", "westus") {
		t.Errorf("%d items, but %d pending", len(items), s.Pending("contoso", "westus"))
	}
	for _, i := range items {
		delete(acknowledged, i.Reference)
	}
	if len(acknowledged) > 0 {
		t.Errorf("lost after they were acknowledged: %v", acknowledged)
	}
}
