package health

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"portolan/latest"
	"portolan/router"
	"portolan/store"
	"portolan/store/bolt"
	"portolan/topology"
)

// shared is a store that can be away for one server, and counts what that writes.
type shared struct {
	store.Store
	mu      sync.Mutex
	away    bool
	writes  int
	changed chan struct{} // closed when away changes
}

func (s *shared) set(away bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = away
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *shared) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	s.mu.Lock()
	away := s.away
	s.writes++
	s.mu.Unlock()
	if away {
		return 0, store.ErrUnavailable
	}
	return s.Store.Commit(ctx, ops...)
}

func (s *shared) Watch(ctx context.Context, prefix string, deliver func(store.Update)) error {
	for ctx.Err() == nil {
		s.mu.Lock()
		away, changed := s.away, s.changed
		s.mu.Unlock()
		own, cancel := context.WithCancel(ctx)
		go func() {
			select {
			case <-changed:
				cancel()
			case <-own.Done():
			}
		}()
		if away {
			deliver(store.Update{Err: errors.New("away")})
			<-own.Done()
		} else {
			_ = s.Store.Watch(own, prefix, deliver)
		}
		cancel()
	}
	return ctx.Err()
}

// server is one of several that vote.
type server struct {
	*Monitor
	field
	store  *shared
	source *latest.Value[topology.Snapshot]
	stop   func()
}

// vote starts servers over one store, each with a net of its own.
func vote(t *testing.T, names ...string) (map[string]*server, store.Store) {
	t.Helper()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "votes.db"))
	if err != nil {
		t.Fatal(err)
	}
	base := bolt.New(db)
	servers := map[string]*server{}
	for _, name := range names {
		s := &server{store: &shared{Store: base, changed: make(chan struct{})}}
		s.Monitor, s.source, s.stop = start(t, Options{Votes: s.store, Voter: name}, &s.field)
		s.source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}))
		servers[name] = s
	}
	t.Cleanup(func() {
		if err := base.Close(); err != nil {
			t.Error(err)
		}
	})
	time.Sleep(heartbeat)
	return servers, base
}

// settles waits, in the time of the bubble, until all servers have that verdict.
func settles(t *testing.T, what, region string, want router.Health, within time.Duration, servers ...*server) {
	t.Helper()
	begin := time.Now()
	for _, s := range servers {
		for s.of(region).Health != want {
			if time.Since(begin) > within {
				t.Fatalf("%s: %s finds %s %v after %v: %+v", what, s.options.Voter, region, s.of(region).Health, within, s.of(region))
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

func TestVotes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		servers, base := vote(t, "x", "y", "z")
		x, y, z := servers["x"], servers["y"], servers["z"]

		// One that cannot reach a replica is outvoted, and shows it.
		x.set("192.0.2.1", true)
		time.Sleep(time.Minute)
		settles(t, "one of three", "a", router.Healthy, 0, x, y, z)
		a := x.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}].Addresses[0]
		if a.Own != router.Unhealthy || !a.Outvoted() || !a.Settled || len(a.Votes) != 3 || a.Votes[0].Voter != "x" || a.Votes[0].Says != "Unhealthy" || a.Votes[1].Says != "Healthy" {
			t.Errorf("what it shows: %+v", a)
		}
		if v := y.Verdicts().Voters; len(v) != 3 || v[0].Name != "y" || !v[0].Self || v[1].Name != "x" || v[1].Down != 1 || !v[1].Fresh {
			t.Errorf("who votes: %+v", v)
		}

		// The majority takes it down, also for the one that reaches it, and brings it back.
		y.set("192.0.2.1", true)
		settles(t, "two of three", "a", router.Unhealthy, 20*time.Second, x, y, z)
		if r := z.of("a").Reason; !strings.Contains(r, "x, y find it") {
			t.Errorf("the reason: %q", r)
		}
		x.set("192.0.2.1", false)
		settles(t, "one of three again", "a", router.Healthy, 20*time.Second, x, y, z)
		y.set("192.0.2.1", false)
		time.Sleep(20 * time.Second)

		// One that sees everything down abstains and takes what the others find.
		x.set("192.0.2.1", true)
		x.set("192.0.2.2", true)
		time.Sleep(time.Minute)
		settles(t, "one is cut off", "a", router.Healthy, 0, x, y, z)
		if v := y.Verdicts().Voters[1]; !v.Abstains {
			t.Errorf("it does not abstain: %+v", v)
		}

		// What it finds does not count: one of the two others is no majority.
		y.set("192.0.2.1", true)
		time.Sleep(time.Minute)
		settles(t, "one abstains, two differ", "a", router.Unhealthy, 0, y)
		settles(t, "one abstains, two differ", "a", router.Healthy, 0, z)
		y.set("192.0.2.1", false)
		settles(t, "one abstains, two agree", "a", router.Healthy, time.Minute, x, y, z)

		// Without the store it is alone; the others are two, and decide each alone as well.
		x.store.set(true)
		settles(t, "cut off from the store", "a", router.Unhealthy, time.Second, x)
		y.set("192.0.2.2", true)
		time.Sleep(time.Minute)
		settles(t, "two are left", "b", router.Unhealthy, 0, y)
		settles(t, "two are left", "b", router.Healthy, 0, z)
		x.store.set(false)
		x.set("192.0.2.1", false)
		x.set("192.0.2.2", false)
		settles(t, "together again", "b", router.Healthy, time.Minute, x, y, z)

		// One that ends in order takes its votes with it at once; one that dies is believed for 15 seconds.
		x.stop()
		synctest.Wait()
		if v := z.Verdicts().Voters; len(v) != 2 {
			t.Errorf("after an orderly end: %+v", v)
		}
		if tree, err := base.List(t.Context(), topology.VotesPrefix); err != nil || len(tree.Entries) != 2 {
			t.Errorf("after an orderly end: %v, %v", tree, err)
		}
		y.store.set(true)
		time.Sleep(voteLife + heartbeat)
		if v := z.Verdicts().Voters; len(v) != 2 || v[1].Fresh {
			t.Errorf("after a death: %+v", v)
		}
		y.stop()
		z.stop()
	})
}

// However much happens, a server writes once a second at most, and a heartbeat otherwise.
func TestVotesAreFew(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		servers, _ := vote(t, "x")
		x := servers["x"]
		count := func() int {
			x.store.mu.Lock()
			defer x.store.mu.Unlock()
			n := x.store.writes
			x.store.writes = 0
			return n
		}
		count()
		time.Sleep(time.Minute)
		if n := count(); n < 10 || n > 14 {
			t.Errorf("%d writes in a minute in which nothing happened", n)
		}
		for range 600 {
			x.Monitor.mu.Lock()
			for _, w := range x.watched {
				w.machine.health = router.Healthy + router.Unhealthy - w.machine.health
			}
			x.Monitor.mu.Unlock()
			signal(x.changed)
			time.Sleep(100 * time.Millisecond)
		}
		if n := count(); n < 30 || n > 61 {
			t.Errorf("%d writes in a minute in which much happened", n)
		}
		x.stop()
	})
}

// Two servers under one name are told so.
func TestVotesRival(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		servers, base := vote(t, "x")
		x := servers["x"]
		twin := &server{store: &shared{Store: base, changed: make(chan struct{})}}
		twin.Monitor, twin.source, twin.stop = start(t, Options{Votes: twin.store, Voter: "x"}, &twin.field)
		twin.source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		time.Sleep(2 * heartbeat)
		if !x.Verdicts().Rival || !twin.Verdicts().Rival {
			t.Error("they do not notice each other")
		}
		twin.stop()
		time.Sleep(voteLife + heartbeat)
		if x.Verdicts().Rival {
			t.Error("it is told of still, though it is gone")
		}
		x.stop()
	})
}
