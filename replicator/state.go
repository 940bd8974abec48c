package replicator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"portolan/replicator/version"
	"portolan/store"
	"portolan/topology"
)

var (
	errResync  = errors.New("a new baseline was asked for")
	errRenewed = errors.New("the replica's state was replaced")
	errRemoved = errors.New("the replica's state was removed")
	errGone    = errors.New("the replica was deleted")

	errUndecided = errors.New("the baseline, a scan, or an operator comes first")
)

// removedTime is how long a replica whose state was removed is left alone: it goes with the replica, or with its registry, of
// which the topology tells within seconds. A state that was made anew by then would be taken for that of the next registry of
// the name.
const removedTime = 30 * time.Second

func (r *replica) current() topology.Replication {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state
}

// succeeded returns the incarnation before this one, while others may not know yet that it is gone.
func (r *replica) succeeded() (version.Replica, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.former, r.former.Incarnation != ""
}

// last returns the state with its revision.
func (r *replica) last() stored {
	r.mu.Lock()
	defer r.mu.Unlock()
	return stored{r.state, r.revision}
}

// describes reports whether a state is about the ledger as it is, and about what stands at the replica's endpoint.
func (r *replica) describes(s topology.Replication) bool {
	return r.of.knows(s) && s.Endpoint == r.config.Endpoint.String() && s.Prefix == r.config.Access.Prefix
}

// decided reports whether what the replica holds is in the ledger, so that observations there mean something.
func decided(s topology.Replication) bool {
	return s.Phase == topology.PhaseSeeding || s.Phase == topology.PhaseBaselined
}

// mayOwe reports whether pushes may have been accepted at the replica that no other has.
func mayOwe(s topology.Replication) bool { return decided(s) || s.Former }

// identify loads what is known of the replica, or gives it an incarnation if what stands at the endpoint is new.
func (r *replica) identify(ctx context.Context) error {
	state, revision, err := r.load(ctx)
	if err != nil {
		return err
	}
	if revision == 0 && r.last().revision != 0 {
		// Another process may have removed the replica, of which this one has not heard.
		return errRemoved
	}
	known := r.describes(state)
	if !known {
		state = r.unknown(state, "nothing is known of its content yet")
	}
	if !decided(state) && r.config.Region == r.of.config.Home {
		// Where no replica's content is in the ledger, what stands there is of an earlier registry of that name, or of
		// another life of the ledger. It says nothing about this one, its deletes least of all.
		others, err := r.of.anyDecided(ctx)
		if err == nil && !others {
			err = r.of.engine.purge(ctx)
		}
		if err != nil {
			return err
		}
	}
	r.adopt(state, revision)
	if !decided(state) {
		r.queue.clear() // of a former incarnation
	}
	if known {
		return nil
	}
	return r.save(ctx, func(*topology.Replication) {})
}

// unknown is the state of a replica of which nothing is known: a new incarnation after that of the state before.
func (r *replica) unknown(before topology.Replication, reason string) topology.Replication {
	next := topology.Replication{Status: topology.Creating, Reason: reason, Incarnation: newID(), Endpoint: r.config.Endpoint.String(),
		Prefix: r.config.Access.Prefix, Epoch: r.of.epoch, Phase: topology.PhaseUnknown}
	next.Served = before.Seeded || before.Served
	// At another endpoint stands other content.
	next.Former = mayOwe(before) && before.Endpoint == next.Endpoint && before.Prefix == next.Prefix
	return next
}

// load reads the state and its revision; the zero state at revision zero if there is none.
func (r *replica) load(ctx context.Context) (topology.Replication, uint64, error) {
	var state topology.Replication
	entry, err := r.of.options.Store.Get(ctx, topology.ReplicationKey(r.of.name, r.config.Region))
	if errors.Is(err, store.ErrNotFound) {
		return state, 0, nil
	}
	if err == nil {
		err = json.Unmarshal([]byte(entry.Value), &state)
	}
	if err != nil {
		return state, 0, fmt.Errorf("reading the state of %s/%s: %w", r.of.name, r.config.Region, err)
	}
	return state, entry.Revision, nil
}

// save changes the replica's state and stores it. Only the holder of the lease calls it. A state that somebody removed
// meanwhile (with its replica, or its registry) is not brought back: then the work for the replica begins anew.
func (r *replica) save(ctx context.Context, change func(*topology.Replication)) error {
	return r.saveOf(ctx, "", change)
}

// saveOf is save for what was found out about an incarnation: of another one it says nothing, and is errRenewed.
func (r *replica) saveOf(ctx context.Context, incarnation string, change func(*topology.Replication)) error {
	r.saving.Lock()
	defer r.saving.Unlock()
	for range attempts {
		r.mu.Lock()
		old, revision := r.state, r.revision
		r.mu.Unlock()
		if incarnation != "" && incarnation != old.Incarnation {
			return errRenewed
		}
		next := old
		change(&next)
		next.Updated = time.Now().UTC().Truncate(time.Millisecond)
		value, err := json.Marshal(next)
		if err != nil {
			return err
		}
		committed, err := r.of.options.Store.Commit(ctx, store.PutIf(topology.ReplicationKey(r.of.name, r.config.Region), string(value), revision))
		if err == nil {
			r.adopt(next, committed)
			return nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("storing the state of %s/%s: %w", r.of.name, r.config.Region, err)
		}
		stored, revision, err := r.load(ctx)
		if err != nil {
			return err
		}
		if revision == 0 {
			r.startOver(errRemoved)
			return errRemoved
		}
		if stored.Incarnation != old.Incarnation && stored.Incarnation != next.Incarnation {
			r.startOver(errRenewed)
			return errRenewed
		}
		r.adopt(stored, revision) // an own write whose outcome was not seen
	}
	return fmt.Errorf("storing the state of %s/%s: %w", r.of.name, r.config.Region, errAgain)
}

// awaitEnd waits for the end of a replica whose state was removed. One that is still there after a while was made again, and begins anew:
// then there is no state to be missed.
func (r *replica) awaitEnd(ctx context.Context) {
	if !sleep(ctx, r.of.options.removedTime) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.revision = 0
}

// startOver ends what is done under the lease; lead begins anew.
func (r *replica) startOver(why error) {
	r.mu.Lock()
	restart := r.restart
	r.mu.Unlock()
	restart(why)
}

// adopt takes over a state that is stored, and tells the fleet if it concerns it.
func (r *replica) adopt(next topology.Replication, revision uint64) {
	r.mu.Lock()
	old := r.state
	r.state, r.revision = next, revision
	switch {
	case decided(next):
		r.former = version.Replica{} // whoever decides knows of this one: see ledger.Generation
	case old.Incarnation != next.Incarnation && r.of.knows(old):
		r.former = identity(r.config.Region, old)
	}
	r.mu.Unlock()
	if old.Incarnation != next.Incarnation || old.Phase != next.Phase {
		r.of.muster()
	}
}

// learn takes over a state that another process stored.
func (r *replica) learn(next topology.Replication, revision uint64) {
	r.saving.Lock()
	defer r.saving.Unlock()
	if r.lease.Load() == nil && revision >= r.last().revision {
		r.adopt(next, revision)
	}
}
