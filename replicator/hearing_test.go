package replicator

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/events"
	"portolan/topology"
)

// What events tell of a registry that wants to be left alone is looked at when it may be, and not called unreadable before.
func TestEventsOfAReplicaThatRests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s, _, north, _ := seeded(t)
		m := s.region(north)
		spool, err := events.Open(filepath.Join(t.TempDir(), "spool.db"), events.Limits{})
		if err != nil {
			t.Fatal(err)
		}
		defer spool.Close()
		r := &replica{of: &registry{name: "contoso", engine: s.engines[0], options: &Options{Spool: spool}}, config: &topology.Replica{Region: m.Region}, log: zap.NewNop(),
			state: topology.Replication{Incarnation: m.Incarnation, Phase: topology.PhaseBaselined}}
		r.of.members.Store(s.fleets[0])
		event := events.Event{ID: "1", Action: events.Delete, Repository: simRepository, Tag: "a", Time: time.Now(), Received: time.Now()}
		if err := spool.Add(t.Context(), "contoso", m.Region, []events.Event{event}); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			err        UnavailableError
			rests      time.Duration
			unreadable bool
		}{
			{UnavailableError{Err: errors.New("429"), RetryAfter: 4 * time.Minute}, 4 * time.Minute, false},
			{UnavailableError{Err: errors.New("502")}, 0, true},
		} {
			north.refuse = func(string, string) error { return &c.err }
			items, err := spool.Take(t.Context(), "contoso", m.Region, 1)
			if err != nil || len(items) != 1 {
				t.Fatalf("%v, %v", items, err)
			}
			r.listen(t.Context(), items[0])
			if (len(r.unheard) > 0) != c.unreadable {
				t.Errorf("after %v it is said of %v", c.err.Err, r.unheard)
			}
			resting, cancel := context.WithTimeout(t.Context(), c.rests-time.Second)
			if items, err := spool.Take(resting, "contoso", m.Region, 1); c.rests > 0 && err == nil {
				t.Errorf("%v is looked at before its time", items)
			}
			cancel()
		}
	})
}
