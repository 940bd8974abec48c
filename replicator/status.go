package replicator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/store"
	"portolan/topology"
)

// trouble is why a replica cannot be used at the moment, and since when.
type trouble struct {
	reason string // empty: it can
	since  time.Time
}

func (t *trouble) note(err error) {
	if t.reason == "" {
		t.since = time.Now()
	}
	t.reason = err.Error()
}

// lasting reports whether it has lasted so long that the status should say so.
func (t trouble) lasting() bool { return t.reason != "" && time.Since(t.since) > troubleTime }

// troubleTime is how long a replica may be unusable before its status says so: shorter standstills are retries.
const troubleTime = 5 * time.Second

// fault notes that the replica as a whole cannot be read, or written.
func (r *replica) fault(t *trouble, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	t.note(err)
}

// faultOf notes why something could not be done: because of the replica, unless the ledger or the store was away.
func (r *replica) faultOf(err error) {
	if outage(err) {
		r.fault(&r.storing, err)
	} else {
		r.fault(&r.reading, err)
	}
}

// outage reports whether something failed for want of the ledger, or of the store.
func outage(err error) bool {
	return errors.Is(err, ledger.ErrUnavailable) || errors.Is(err, store.ErrUnavailable)
}

// fine notes that it can. A replica that can be read again is worth a try.
func (r *replica) fine(t *trouble) {
	r.mu.Lock()
	recovered := t.reason != ""
	t.reason = ""
	r.mu.Unlock()
	if recovered {
		r.queue.unblock()
	}
}

// report keeps the stored state true: at most once a second, and only what changed.
func (r *replica) report(ctx context.Context) error {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	var last time.Time
	for {
		old := r.current()
		next := r.assess(old)
		r.of.metrics.state(r.of.name, r.config.Region, next)
		urgent := next.Status != old.Status || next.Pending == 0 && old.Pending != 0
		next.Updated = old.Updated
		// That it was removed is found out by storing it, and nothing else might be for minutes.
		if (!same(next, old) || r.missing.Load()) && (urgent || time.Since(last) > time.Second) {
			last = time.Now()
			missing := r.missing.Swap(false)
			err := r.save(ctx, func(s *topology.Replication) {
				s.Status, s.Reason, s.Pending, s.OldestPending = next.Status, next.Reason, next.Pending, next.OldestPending
				s.NotReplicable, s.Unreadable, s.Conflicts, s.LastError = next.NotReplicable, next.Unreadable, next.Conflicts, next.LastError
			})
			if err != nil && ctx.Err() == nil {
				r.log.Warn("the replica's state could not be stored", zap.Error(err))
				if missing {
					r.missing.Store(true) // it was not found out
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func same(a, b topology.Replication) bool {
	return a.Status == b.Status && a.Reason == b.Reason && a.Pending == b.Pending && a.OldestPending.Equal(b.OldestPending) &&
		a.NotReplicable == b.NotReplicable && a.Unreadable == b.Unreadable && a.Conflicts == b.Conflicts && a.LastError == b.LastError
}

// assess says in which state the replica is.
func (r *replica) assess(s topology.Replication) topology.Replication {
	b := r.queue.backlog()
	s.Pending, s.NotReplicable, s.OldestPending, s.LastError = b.pending, b.parked, b.oldest.UTC(), b.lastError
	if b.oldest.IsZero() {
		s.OldestPending = time.Time{}
	}
	s.Conflicts = r.of.conflicts()
	homeFirst := r.config.Region != r.of.config.Home && !r.of.homeDecided()
	r.mu.Lock()
	defer r.mu.Unlock()
	if b.pending == 0 {
		r.writing = trouble{} // nothing is left that could show it
	}
	unreadable := r.unreadable()
	if s.Unreadable = len(unreadable); s.Unreadable > 0 && s.LastError == "" {
		s.LastError = fmt.Sprintf("%s cannot be read there; the first: %s", counted(s.Unreadable, "tag", "tags"), unreadable[0].Error)
	}
	s.Status, s.Reason = topology.Ready, ""
	switch {
	case r.leaving != "":
		s.Status, s.Reason = topology.Deleting, r.leaving
	case s.Held != "":
		s.Status, s.Reason = topology.Degraded, s.Held
	case r.reading.reason != "" && s.Phase == topology.PhaseUnknown: // whoever created it waits for just that
		s.Status, s.Reason = topology.Creating, r.reading.reason
	case r.storing.reason != "" && s.Phase == topology.PhaseUnknown:
		s.Status, s.Reason = topology.Creating, r.storing.reason
	case r.reading.lasting():
		s.Status, s.Reason = topology.Degraded, r.reading.reason
	case r.writing.lasting():
		s.Status, s.Reason = topology.Degraded, r.writing.reason
	case r.storing.lasting():
		s.Status, s.Reason = topology.Degraded, r.storing.reason
	case s.Phase == topology.PhaseUnknown:
		s.Status, s.Reason = topology.Creating, "its content is being compared"
		if homeFirst {
			s.Reason = "the baseline of the home replica comes first"
		}
	case s.Phase == topology.PhasePlanned && s.Plan != nil:
		s.Status, s.Reason = topology.Creating, fmt.Sprintf("%s from the other replicas: look at the plan, then 'portolan replica accept %s/%s'",
			counted(s.Plan.Conflicts, "tag differs", "tags differ"), r.of.name, r.config.Region)
	case !s.Seeded:
		s.Status, s.Reason = topology.Syncing, "being seeded"
		if s.LastError != "" {
			s.Reason += "; " + s.LastError
		}
	case s.Pending > 0 && s.OldestPending.Before(s.LastScan):
		s.Status, s.Reason = topology.Syncing, "versions that were decided before the last scan are on their way"
		if s.LastError != "" {
			s.Reason += "; " + s.LastError
		}
	}
	return s
}
