package daemon

import (
	"context"
	"net/url"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"portolan/health"
	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// What no probe has told of yet is not settled, unless none will.
func TestConditionsOf(t *testing.T) {
	t.Parallel()
	replica := func(region string, mode topology.ProbeMode) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}, Probe: topology.Probe{Mode: mode}}
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Replicas: []*topology.Replica{
		replica("probed", topology.ProbeHTTPS), replica("new", topology.ProbeHTTPS), replica("never", topology.ProbeNone),
	}}}}
	key := func(region string) router.ReplicaKey { return router.ReplicaKey{Registry: "contoso", Region: region} }
	state := &states{State: &topology.State{Requests: map[router.ReplicaKey][]string{key("never"): {topology.RequestAccept, topology.RequestDelete}, key("new"): {topology.RequestResync}}}, seeded: map[router.ReplicaKey]string{key("probed"): "https://probed", key("new"): "https://elsewhere"}}
	verdicts := &health.Verdicts{Replicas: map[router.ReplicaKey]health.Verdict{key("probed"): {Health: router.Unhealthy, Settled: true}}}

	c := conditionsOf(s, state, verdicts, nil, time.Now())
	if p := c[key("probed")]; p.Health != router.Unhealthy || !p.Settled || !p.Seeded {
		t.Errorf("probed: %+v", p)
	}
	if p := c[key("new")]; p.Health != router.Unknown || p.Settled || p.Seeded {
		t.Errorf("new, and seeded at another endpoint: %+v", p)
	}
	if p := c[key("never")]; !p.Settled || !p.Leaving || c[key("new")].Leaving {
		t.Errorf("never probed, and about to be deleted: %+v", p)
	}
	if p := conditionsOf(s, state, nil, nil, time.Now())[key("new")]; !p.Settled {
		t.Errorf("where nothing is probed: %+v", p)
	}
}

// A replica leaves beyond the limit and comes back within half of it; the home never leaves.
func TestLagging(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1_000_000, 0)
	replica := func(region string) *topology.Replica {
		return &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region}}
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Home: "home", Policy: topology.Policy{MaxLag: 10 * time.Minute},
		Replicas: []*topology.Replica{replica("home"), replica("other")}}}}
	home, other := router.ReplicaKey{Registry: "contoso", Region: "home"}, router.ReplicaKey{Registry: "contoso", Region: "other"}
	var former router.Conditions
	for i, step := range []struct {
		behind time.Duration // none if zero
		want   bool
	}{{0, false}, {10 * time.Minute, false}, {11 * time.Minute, true}, {6 * time.Minute, true}, {5 * time.Minute, false}, {6 * time.Minute, false}, {time.Hour, true}, {0, false}} {
		now := begin.Add(time.Duration(i) * time.Hour)
		report := topology.Replication{}
		if step.behind > 0 {
			report = topology.Replication{Pending: 1, OldestPending: now.Add(-step.behind)}
		}
		state := &states{State: &topology.State{Replications: map[topology.ReplicaName]topology.Replication{home: report, other: report}}}
		former = conditionsOf(s, state, nil, former, now)
		if former[other].Lagging != step.want || former[home].Lagging {
			t.Errorf("step %d: %v behind: %v, and the home %v", i, step.behind, former[other].Lagging, former[home].Lagging)
		}
	}
	s.Registries[0].Policy.MaxLag = 0
	state := &states{State: &topology.State{Replications: map[topology.ReplicaName]topology.Replication{other: {Pending: 1, OldestPending: begin}}}}
	if conditionsOf(s, state, nil, former, begin.Add(time.Hour))[other].Lagging {
		t.Error("one lags without a limit")
	}
}

// told is a store that tells a watcher what comes through the channel.
type told struct {
	store.Store
	updates chan store.Update
}

func (s told) Watch(ctx context.Context, _ string, deliver func(store.Update)) error {
	for {
		select {
		case u := <-s.updates:
			deliver(u)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// A start waits until it is known who is seeded: from the store, else from disk, else not for ever.
func TestStateWatcherWait(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "seeded.json")
	synctest.Test(t, func(t *testing.T) {
		s := told{updates: make(chan store.Update)}
		w := newStateWatcher(s, path, zap.NewNop())
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.run(ctx) }()
		takes := func(what string, w *stateWatcher, want time.Duration) {
			t.Helper()
			begun := time.Now()
			if err := w.wait(ctx, time.Minute); err != nil || time.Since(begun) != want {
				t.Errorf("%s: it took %v, want %v: %v", what, time.Since(begun), want, err)
			}
		}
		s.updates <- store.Update{Err: store.ErrUnavailable}
		takes("the store is away", w, time.Minute)
		go func() {
			time.Sleep(time.Second)
			s.updates <- store.Update{Tree: store.Tree{Entries: []store.Entry{{
				Key:   topology.ReplicationKey("contoso", "westus"),
				Value: `{"seeded":true,"endpoint":"https://westus"}`,
			}}}}
		}()
		takes("the store comes", w, time.Second)
		synctest.Wait()
		takes("a second start", newStateWatcher(s, path, zap.NewNop()), 0)
		cancel()
		<-ended
		if err := newStateWatcher(s, path+".missing", zap.NewNop()).wait(ctx, time.Minute); err == nil {
			t.Error("it waits after the end")
		}
	})
}
