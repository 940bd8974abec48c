package replicator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"portolan/replicator/ledger"
)

func queueKey(repository, tag string) ledger.Key {
	return ledger.Key{Registry: "contoso", Repository: repository, Kind: ledger.Tag, Reference: tag}
}

// next takes an item, or nothing if there is none to be had without time passing.
func next(t *testing.T, q *queue) *item {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var got *item
	go func() { got, _ = q.take(ctx) }()
	synctest.Wait()
	cancel()
	synctest.Wait()
	return got
}

func expect(t *testing.T, q *queue, want string) *item {
	t.Helper()
	got := next(t, q)
	name := ""
	if got != nil {
		name = got.key.Repository + ":" + got.key.Reference
	}
	if name != want {
		t.Fatalf("the next item is %q, want %q", name, want)
	}
	return got
}

func TestQueueOrder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		for _, tag := range []string{"1", "2", "3"} {
			q.add(queueKey("large", tag), 1, true, time.Now())
		}
		q.add(queueKey("small", "1"), 1, true, time.Now())
		q.add(queueKey("large", "fresh"), 1, false, time.Now())
		// Fresh before seeding; repositories take turns.
		for _, want := range []string{"large:fresh", "large:1", "small:1", "large:2"} {
			q.done(expect(t, q, want))
		}
		// A push of what waits to be seeded overtakes.
		q.add(queueKey("large", "4"), 1, true, time.Now())
		q.add(queueKey("large", "4"), 2, false, time.Now())
		q.done(expect(t, q, "large:4"))
		q.done(expect(t, q, "large:3"))
		expect(t, q, "")
		if b := q.backlog(); b.pending != 0 {
			t.Errorf("%d items are left", b.pending)
		}
	})
}

func TestQueueKeepsWhatChangedMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		key := queueKey("app", "1")
		q.add(key, 1, false, time.Now())
		i := expect(t, q, "app:1")
		q.add(key, 1, false, time.Now())
		expect(t, q, "") // nobody else gets it while it is being worked on
		q.remove(key)    // nor does it go away under the worker
		q.done(i)
		i = expect(t, q, "app:1")
		q.add(key, 2, false, time.Now())
		q.retry(i, time.Hour, causeOther, errors.New("of the old version"))
		i = expect(t, q, "app:1")
		if i.failed != 0 || i.lastError != "" {
			t.Errorf("the new version begins with %d failures", i.failed)
		}
		q.add(key, 3, false, time.Now())
		q.park(i, "the old version was too large", time.Hour)
		q.done(expect(t, q, "app:1"))
		if q.backlog().parked != 0 {
			t.Error("the new version is parked for what the old one was")
		}
		expect(t, q, "")
	})
}

func TestQueueDelays(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		failing, other := queueKey("app", "failing"), queueKey("app", "other")
		q.add(failing, 1, false, time.Now())
		q.retry(expect(t, q, "app:failing"), time.Minute, causeOther, errors.New("no"))
		q.add(other, 1, false, time.Now())
		q.postpone(expect(t, q, "app:other"), time.Second)
		expect(t, q, "")
		q.add(failing, 1, false, time.Now()) // no new version: it waits
		expect(t, q, "")
		time.Sleep(time.Second)
		q.done(expect(t, q, "app:other"))
		q.add(failing, 2, false, time.Now()) // a new version has its turn at once
		q.retry(expect(t, q, "app:failing"), time.Hour, causeOther, errors.New("no"))
		time.Sleep(59 * time.Second) // its former place in the heap comes up
		expect(t, q, "")
		time.Sleep(time.Hour)
		i := expect(t, q, "app:failing")
		if i.failed != 1 {
			t.Errorf("%d attempts are counted", i.failed)
		}
		q.postpone(i, time.Second)
		q.remove(failing)
		time.Sleep(time.Second)
		expect(t, q, "")
	})
}

func TestQueueParks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		key := queueKey("app", "1")
		q.add(key, 7, false, time.Now())
		q.park(expect(t, q, "app:1"), "schema 1", time.Hour)
		if b := q.backlog(); b.parked != 1 || b.pending != 0 {
			t.Errorf("%+v", b)
		}
		// The record changes by what the attempt itself left there. That must not wake it.
		q.add(key, 7, false, time.Now())
		expect(t, q, "")
		if list := q.list(10); len(list) != 1 || list[0].NotReplicable != "schema 1" || list[0].Image != "contoso/app:1" {
			t.Errorf("%+v", list)
		}
		time.Sleep(time.Hour - time.Second)
		q.unpark()
		expect(t, q, "")
		time.Sleep(time.Second)
		q.unpark()
		q.park(expect(t, q, "app:1"), "deletes are off", 0)
		expect(t, q, "")
		q.unpark()
		q.park(expect(t, q, "app:1"), "schema 1", time.Hour)
		q.add(key, 8, false, time.Now())
		q.done(expect(t, q, "app:1"))
		if q.backlog().parked != 0 {
			t.Error("it is parked still")
		}
	})
}

// Of what the registry does not support one is tried for all others of its kind, another one each time.
func TestQueueProbes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		off := func(items ...*item) {
			for _, i := range items {
				time.Sleep(time.Second)
				q.park(i, "deletes are off", 0)
			}
		}
		// probes are what the next scan gives a chance: the tag first.
		probes := func(tag string) []*item {
			t.Helper()
			q.unpark()
			var tried []*item
			for i := next(t, q); i != nil; i = next(t, q) {
				tried = append(tried, i)
			}
			slices.SortFunc(tried, func(a, b *item) int { return strings.Compare(a.key.Reference, b.key.Reference) })
			if len(tried) != 2 || tried[0].key.Reference != tag || tried[1].key.Kind != ledger.Manifest {
				t.Fatalf("%d are tried, want %s and the manifest", len(tried), tag)
			}
			return tried
		}
		manifest := queueKey("app", "sha256:1")
		manifest.Kind = ledger.Manifest
		keys := []ledger.Key{queueKey("app", "1"), queueKey("app", "2"), queueKey("app", "3"), manifest}
		for _, key := range keys {
			q.add(key, 7, false, time.Now())
			off(next(t, q))
		}
		for _, tag := range []string{"1", "2", "3", "1"} {
			off(probes(tag)...)
		}
		// A new version of the probe is a matter of its own.
		tried := probes("2")
		q.add(tried[0].key, 8, false, time.Now())
		off(tried...)
		q.done(expect(t, q, "app:2"))
		if b := q.backlog(); b.parked != 3 || b.pending != 0 {
			t.Errorf("%+v", b)
		}
		// Once one has gone through, the others follow; those of the other kind do not.
		tried = probes("3")
		off(tried[1])
		q.done(tried[0])
		q.done(expect(t, q, "app:1"))
		expect(t, q, "")
		if b := q.backlog(); b.parked != 1 || b.pending != 0 {
			t.Errorf("%+v", b)
		}
	})
}

func TestQueueBlocks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		q.add(queueKey("app", "1"), 1, false, time.Now())
		q.block(time.Now().Add(time.Minute), false)
		expect(t, q, "")
		q.unblock()
		q.postpone(expect(t, q, "app:1"), 0)
		// What the registry asked for itself holds.
		q.block(time.Now().Add(time.Minute), true)
		q.block(time.Now().Add(time.Hour), false)
		q.unblock()
		time.Sleep(59 * time.Second)
		expect(t, q, "")
		time.Sleep(time.Second)
		q.retry(expect(t, q, "app:1"), 5*time.Minute, causeOther, errors.New("no"))
		// What waits for its time alone does not make what can be taken at the end of the block wait for that time, too.
		q.add(queueKey("app", "2"), 1, false, time.Now())
		q.block(time.Now().Add(time.Minute), true)
		began := time.Now()
		if i, err := q.take(t.Context()); err != nil || i.key.Reference != "2" || time.Since(began) != time.Minute {
			t.Errorf("%v after %v, %v", i, time.Since(began), err)
		}
	})
}

func TestQueueDrained(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQueue(time.Now)
		for n := range 3 {
			q.add(queueKey("app", fmt.Sprint(n)), 1, true, time.Now())
		}
		asked := time.Now()
		time.Sleep(time.Second)
		q.add(queueKey("app", "later"), 1, true, time.Now())
		drained := make(chan error, 1)
		go func() { drained <- q.drained(t.Context(), asked) }()
		for range 3 {
			select {
			case <-drained:
				t.Fatal("there was something left")
			default:
			}
			i := next(t, q)
			if i.key.Reference == "1" {
				q.park(i, "never", time.Hour) // listed, not waited for
			} else {
				q.done(i)
			}
			time.Sleep(time.Second)
		}
		synctest.Wait()
		select {
		case err := <-drained:
			if err != nil {
				t.Error(err)
			}
		default:
			t.Error("what was decided later is waited for")
		}
		ctx, cancel := context.WithCancel(t.Context())
		go func() { drained <- q.drained(ctx, time.Now()) }()
		synctest.Wait()
		cancel()
		if err := <-drained; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
}
