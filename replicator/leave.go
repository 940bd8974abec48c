package replicator

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"portolan/topology"
)

// leaveAgain is the time between two attempts to take a replica out of the topology.
const leaveAgain = 5 * time.Second

// maxNamed bounds how many pushes that would be lost are named.
const maxNamed = 20

// leave ends the replica: clients have been sent elsewhere when the last answer has expired, and every push that only it
// has must have reached another replica. Its content stays.
func (r *replica) leave(ctx context.Context, request topology.Request) error {
	removing := complaint{log: r.log}
	status := func(reason string) {
		r.mu.Lock()
		r.leaving = reason
		r.mu.Unlock()
	}
	if wait := time.Until(request.Time.Add(r.of.options.Drain)); wait > 0 && r.mayBeAsked(ctx) {
		status("draining: the last answer that names it expires at " + request.Time.Add(r.of.options.Drain).UTC().Format(time.RFC3339))
		if !sleep(ctx, wait) {
			return ctx.Err()
		}
	}
	for {
		if err := r.handOver(ctx, request, status); err != nil {
			return err
		}
		if tree, err := r.of.options.Store.List(ctx, r.requestsPrefix()); err == nil {
			if _, stands := r.requests(tree)[topology.RequestDelete]; !stands {
				// It went with the replica, or with the registry. What stands there now was made again, and is not to go.
				status("")
				return nil
			}
		}
		err := r.of.options.Remove(ctx, r.of.name, r.config.Region)
		switch {
		case err == nil:
			r.log.Info("the replica was deleted; its content was left as it is")
			return errGone
		case ctx.Err() != nil:
			return ctx.Err()
		}
		// The topology was edited meanwhile, or cannot be: until it is taken out, the replica is worked for, and pushes to it are not lost.
		removing.of("the replica cannot be taken out of the topology; trying again", err)
		status("it cannot be taken out of the topology: " + err.Error())
		if !sleep(ctx, r.of.options.leaveAgain) {
			return ctx.Err()
		}
	}
}

// handOver waits until every push that only the replica has reached another, or force is asked for.
func (r *replica) handOver(ctx context.Context, request topology.Request, status func(string)) error {
	for r.of.config.Policy.Replication && mayOwe(r.current()) {
		waits, err := r.owes(ctx)
		if err != nil {
			waits = "whether its pushes are elsewhere cannot be told: " + err.Error()
			if known, err := r.unreplicated(ctx); err == nil && known != "" {
				waits += "; as far as is known, " + known
			}
		}
		if waits == "" {
			break
		}
		status(waits)
		// What it waits for may take an operator, and force may be asked for later.
		asked := map[string]topology.Request{topology.RequestDelete: request}
		if tree, err := r.of.options.Store.List(ctx, r.requestsPrefix()); err == nil {
			asked = r.requests(tree)
		}
		if request.Force || asked[topology.RequestDelete].Force {
			r.log.Warn("the replica is deleted by force", zap.String("lost", waits))
			// Whoever asked follows the status, which ends with the replica: what is lost has to stand there for a while.
			err := r.save(ctx, func(s *topology.Replication) { s.Status, s.Reason = topology.Deleting, waits })
			if err != nil {
				return fmt.Errorf("saying what is lost with replica %s/%s: %w", r.of.name, r.config.Region, err)
			}
			if !sleep(ctx, lastWords) {
				return ctx.Err()
			}
			break
		}
		if err := r.compareOrAccept(ctx, asked); err != nil {
			return err
		}
		if !sleep(ctx, 500*time.Millisecond) {
			return ctx.Err()
		}
	}
	return nil
}

// mayBeAsked reports whether answers that name the replica may be kept somewhere: it gets clients once it was seeded, or always
// where nothing is replicated.
func (r *replica) mayBeAsked(ctx context.Context) bool {
	if !r.of.config.Policy.Replication {
		return true
	}
	state, _, err := r.load(ctx) // as whoever worked for it before stored it
	return err != nil || mayOwe(state) || state.Served
}

// lastWords is how long a replica that is deleted by force says what is lost: commands look twice a second, and may be slow.
const lastWords = 5 * time.Second

// owes says what would be lost with the replica; empty if nothing would.
func (r *replica) owes(ctx context.Context) (string, error) {
	m := r.member()
	if m == nil {
		return "", errors.New("nothing can be asked of it yet")
	}
	state := r.current()
	if !decided(state) {
		return r.undecided(state)
	}
	if state.Held != "" {
		return heldBack(state), nil
	}
	// One last look: pushes of the final minutes whose events were lost.
	if s, err := r.of.engine.scan(ctx, m, state.LastScan, r.wait, false); err != nil || s.guarded {
		if err == nil {
			err = errors.New("too much of it is gone or old at once")
		}
		return "", err
	}
	// What it holds under damaged records is known when it was decided anew.
	if err := r.of.engine.mend(ctx, []*member{m}); err != nil {
		return "", err
	}
	return r.alone(ctx, m)
}

// alone says what is known to be at the replica only, or is not looked at yet; empty if there is nothing.
func (r *replica) alone(ctx context.Context, m *member) (string, error) {
	if r.of.options.Spool != nil {
		if n := r.of.options.Spool.Pending(r.of.name, r.config.Region); n > 0 {
			return counted(n, "tag or manifest", "tags and manifests") + " that events told of: to be looked at first", nil
		}
	}
	only, err := r.of.engine.onlyAt(ctx, m)
	if err != nil || len(only) == 0 {
		return "", err
	}
	return counted(len(only), "push is", "pushes are") + " in no other replica yet: " + strings.Join(only[:min(len(only), maxNamed)], ", "), nil
}

// unreplicated says, without a look at the replica, what would stay there alone if replication ended now, or why that is not
// known; empty if nothing would.
func (r *replica) unreplicated(ctx context.Context) (string, error) {
	state, m := r.current(), r.member()
	switch {
	case !mayOwe(state):
		return "", nil
	case m == nil:
		return "nothing can be asked of it yet", nil
	case !decided(state):
		why, err := r.undecided(state)
		if err != nil { // why it cannot be compared
			why = err.Error()
		}
		return why, nil
	case state.Held != "":
		return heldBack(state), nil
	}
	return r.alone(ctx, m)
}

func heldBack(state topology.Replication) string {
	return "the guard holds what was observed there: " + state.Held
}

// undecided says what has to come to pass before it is known what only the replica has.
func (r *replica) undecided(state topology.Replication) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.reading.reason != "":
		return "", errors.New(r.reading.reason)
	case r.storing.reason != "":
		return "", errors.New(r.storing.reason)
	case state.Phase == topology.PhasePlanned:
		return fmt.Sprintf("what only it has is decided when its plan is accepted: 'portolan replica accept %s/%s'", r.of.name, r.config.Region), nil
	}
	return "what only it has is known when its content was compared", nil
}
