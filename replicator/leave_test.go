package replicator

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/store"
	"portolan/topology"
)

// refusing answers some requests with 503, and hands the others on.
type refusing struct {
	http.Handler
	refuses func(*http.Request) bool
}

func (h refusing) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if h.refuses(r) {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	h.Handler.ServeHTTP(w, r)
}

func writes(r *http.Request) bool { return r.Method != http.MethodGet && r.Method != http.MethodHead }

// ours tells Portolan's requests from those of users.
func ours(r *http.Request) bool { return strings.HasPrefix(r.UserAgent(), "portolan/") }

func (f *fleetOfServers) handler(region string) http.Handler { return *f.handlers[region].Load() }

// deleting reports whether a replica waits to be deleted, for a reason in which a text stands.
func (f *fleetOfServers) deleting(region, why string) func() bool {
	return func() bool {
		s := f.state(region)
		return s.Status == topology.Deleting && strings.Contains(s.Reason, why)
	}
}

// A replica that is compared anew may hold what no other has, as it might before: it is not let go until that is known, unless
// by force.
func TestDeleteAfterResync(t *testing.T) {
	t.Parallel()
	for _, forced := range []bool{false, true} {
		name := "patient"
		if forced {
			name = "forced"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := newServers(t, "home", "other")
			f.start()
			f.ready("home", "other")
			home := f.handler("home")
			f.replace("home", refusing{home, writes})
			digest := f.push("other", "app:only")
			f.until("the push to be due", func() bool { return f.state("home").Pending > 0 })
			other := f.handler("other")
			f.replace("other", refusing{other, ours})
			before := f.state("other").Incarnation
			f.ask("other", topology.RequestResync)
			f.until("the resync", func() bool { return f.state("other").Incarnation != before })
			f.ask("other", topology.RequestDelete)
			f.until("the delete to wait", f.deleting("other", "cannot be told"))
			if forced {
				f.force("other")
				f.until("the delete by force", func() bool { return f.state("other").Incarnation == "" })
				return
			}
			f.replace("other", other)
			f.until("the delete to name what is only there", f.deleting("other", "contoso/app:only"))
			f.replace("home", home)
			f.arrives("app:only", digest, "home")
			f.until("the delete", func() bool { return f.state("other").Incarnation == "" })
		})
	}
}

// force asks for a delete by force.
func (f *fleetOfServers) force(region string) {
	f.t.Helper()
	if _, err := f.store.Commit(f.t.Context(), store.Put(topology.RequestKey("contoso", region, topology.RequestDelete), `{"time":"`+time.Now().UTC().Format(time.RFC3339)+`","force":true}`)); err != nil {
		f.t.Fatal(err)
	}
}

// Where conflicts wait for an operator after a resync, the delete says so, and the accept is heard.
func TestDeleteWaitsForThePlan(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.settle()
	other := f.handler("other")
	f.replace("other", refusing{other, ours})
	before := f.state("other").Incarnation
	f.ask("other", topology.RequestResync)
	f.until("the resync", func() bool { return f.state("other").Incarnation != before })
	f.push("other", "app:1")
	f.replace("other", other)
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	f.ask("other", topology.RequestDelete)
	f.until("the delete to wait for the plan", f.deleting("other", "portolan replica accept contoso/other"))
	f.ask("other", topology.RequestAccept)
	f.until("the delete", func() bool { return f.state("other").Incarnation == "" })
}

// A replica that cannot be taken out of the topology, because that was edited meanwhile, says so, and is worked for until it can.
func TestDeleteThatIsRefused(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	core, logged := observer.New(zap.WarnLevel)
	f.options.Log, f.options.leaveAgain = zap.New(core), 100*time.Millisecond
	var refused atomic.Bool
	refused.Store(true)
	f.options.Remove = func(ctx context.Context, registry, region string) error {
		if refused.Load() {
			return errors.New("a fence names it alone")
		}
		_, err := f.store.Commit(ctx, store.Delete(topology.ReplicationKey(registry, region)), store.Delete(topology.RequestKey(registry, region, topology.RequestDelete)))
		return err
	}
	f.settle()
	f.ask("other", topology.RequestDelete)
	f.until("the delete to say what it waits for", f.deleting("other", "a fence names it alone"))
	f.arrives("app:2", f.push("home", "app:2"), "other")
	if n := logged.FilterMessageSnippet("working for the replica failed").Len(); n > 0 {
		t.Errorf("all work for it was begun anew %d times", n)
	}
	refused.Store(false)
	f.until("the delete", func() bool { return f.state("other").Incarnation == "" })
}

// A delete that waits ends with its request: what has the name then was made again.
func TestDeleteEndsWithItsRequest(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.Drain = time.Second
	f.config.Policy.Replication = false
	var removed atomic.Bool
	f.options.Remove = func(context.Context, string, string) error { removed.Store(true); return nil }
	f.start()
	f.ask("other", topology.RequestDelete)
	one, err := f.replicator.registry("contoso")
	for err != nil {
		one, err = f.replicator.registry("contoso")
	}
	leaving := func() bool {
		other := one.replica("other")
		if other == nil {
			return false
		}
		other.mu.Lock()
		defer other.mu.Unlock()
		return other.leaving != ""
	}
	f.until("the drain", leaving)
	if _, err := f.store.Commit(t.Context(), store.Delete(topology.RequestKey("contoso", "other", topology.RequestDelete))); err != nil {
		t.Fatal(err)
	}
	f.until("the end of it", func() bool { return removed.Load() || !leaving() })
	if removed.Load() {
		t.Error("it was removed all the same")
	}
}

// From a replica that was never compared nothing was accepted, and no client was sent there: it may go at once, whether or not it
// answers.
func TestDeleteBeforeTheBaseline(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other", "away")
	f.options.Drain = time.Hour
	f.push("home", "app:1")
	f.push("other", "app:1")
	f.replace("away", refusing{f.handler("away"), ours})
	f.start()
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	for _, region := range []string{"other", "away"} {
		f.ask(region, topology.RequestDelete)
		f.until(region+" to go", func() bool { return f.state(region).Incarnation == "" })
	}
}

// What would stay in one region alone, if the registry ended now.
func TestUnreplicated(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	told := func() string {
		found, err := f.replicator.Unreplicated(t.Context(), "contoso")
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, u := range found {
			b.WriteString(u.Region + ": " + u.Reason + "\n")
		}
		return b.String()
	}
	f.arrives("app:1", f.push("other", "app:1"), "home")
	f.until("nothing to be left", func() bool { return told() == "" })
	home := f.handler("home")
	f.replace("home", refusing{home, writes})
	f.push("other", "app:2")
	f.until("the push to be told of", func() bool {
		s := told()
		return strings.HasPrefix(s, "other: ") && strings.Contains(s, "in no other replica yet") && strings.Contains(s, "contoso/app:2")
	})
	// After a resync nobody knows what only it has.
	other := f.handler("other")
	f.replace("other", refusing{other, ours})
	f.ask("other", topology.RequestResync)
	f.until("that it is not known", func() bool { s := told(); return s != "" && !strings.Contains(s, "app:2") })
	f.replace("home", home)
	f.replace("other", other)
	f.until("nothing to be left", func() bool { return f.state("other").Status == topology.Ready && told() == "" })
}

// Clients that were sent to a replica may come for as long as answers are kept, also when it was given another endpoint since.
func TestDeleteDrainsWhoeverWasServed(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.Drain = time.Hour
	f.start()
	f.ready("home", "other")
	f.serve("other", refusing{emptyRegistry(), ours})
	f.declare()
	f.until("the new endpoint to be noticed", func() bool { s := f.state("other"); return s.Phase == topology.PhaseUnknown && s.Served && !s.Former })
	f.ask("other", topology.RequestDelete)
	f.until("the drain", f.deleting("other", "draining"))
}

// flaky is a store in which the first writes of a plan fail, as when Consul elects a leader.
type flaky struct {
	store.Store
	fails atomic.Int32
}

func (s *flaky) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if strings.Contains(ops[0].Value, `"phase":"planned"`) && s.fails.Add(-1) >= 0 {
		return 0, store.ErrUnavailable
	}
	return s.Store.Commit(ctx, ops...)
}

// A plan that could not be stored at first is shown, and no outage that is over, as long as it waits to be accepted.
func TestPlanAfterAnOutage(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	failing := new(flaky)
	failing.fails.Store(1)
	f.wrap = func(s store.Store) store.Store { failing.Store = s; return failing }
	f.push("home", "app:1")
	f.push("other", "app:1")
	f.start()
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	time.Sleep(troubleTime + time.Second)
	if s := f.state("other"); s.Status != topology.Creating || !strings.Contains(s.Reason, "look at the plan") {
		t.Errorf("%s: %s", s.Status, s.Reason)
	}
}
