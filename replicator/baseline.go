package replicator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/topology"
)

// keep brings the replica from unknown to baselined, and from then on scans it.
func (r *replica) keep(ctx context.Context) error {
	select {
	case <-r.opened:
	case <-ctx.Done():
		return ctx.Err()
	}
	for attempt := 0; r.current().Phase != topology.PhaseBaselined; attempt++ {
		err := r.baseline(ctx)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			r.faultOf(err)
			r.log.Warn("the baseline was interrupted", zap.Error(err))
			sleep(ctx, max(retryAfter(err), backoff(attempt, 2*time.Second, 30*time.Second)))
		}
	}
	for {
		// Whoever believes that the replica is not baselined would take a delete there for something that never was there.
		err := r.of.options.Ledger.Advance(ctx, r.of.name)
		if err == nil {
			err = r.of.fill(ctx, r)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err == nil {
			r.fine(&r.storing)
			break
		}
		r.fault(&r.storing, err)
		r.log.Warn("what the replica lacks cannot be read; trying again", zap.Error(err))
		sleep(ctx, time.Second)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.seed(ctx) })
	g.Go(func() error { return r.scans(ctx) })
	return g.Wait()
}

// seed waits until the replica has had all that it lacked when it was baselined, and says so: from then on it gets clients.
func (r *replica) seed(ctx context.Context) error {
	state := r.current()
	if state.Seeded {
		return nil
	}
	if err := r.queue.drained(ctx, time.Now()); err != nil {
		return err
	}
	for {
		err := r.saveOf(ctx, state.Incarnation, func(s *topology.Replication) { s.Seeded = true })
		if err == nil || ctx.Err() != nil || errors.Is(err, errRenewed) || errors.Is(err, errRemoved) {
			return ctx.Err()
		}
		r.log.Warn("that the replica is seeded could not be stored; trying again", zap.Error(err))
		sleep(ctx, time.Second)
	}
}

// owings is how many records a baseline writes at a time; ledgers write many in one transaction.
const owings = 16

// baseline learns what the replica holds, merges it, and writes down what it lacks.
func (r *replica) baseline(ctx context.Context) error {
	began := time.Now().UTC()
	if err := r.of.homeFirst(ctx, r); err != nil {
		return err
	}
	m := r.member()
	if m == nil {
		return errAgain
	}
	b, err := r.of.engine.compare(ctx, m, r.wait)
	if err != nil {
		return err
	}
	r.fine(&r.reading)
	if r.current().Phase != topology.PhaseSeeding {
		r.log.Info("the baseline's plan", zap.Int("tags", b.plan.Tags), zap.Int("same", b.plan.Same), zap.Int("copy", b.plan.Copy),
			zap.Int("adopt", b.plan.Adopt), zap.Int("conflicts", b.plan.Conflicts), zap.Int64("bytes", b.plan.Bytes))
		if b.plan.Conflicts > 0 && r.of.config.Policy.Merge == topology.MergeAsk {
			if err := r.ask(ctx, m, b.plan); err != nil {
				return err
			}
			// Time has passed: look again, and go on with what is there now.
			if b, err = r.of.engine.compare(ctx, m, r.wait); err != nil {
				return err
			}
		}
	}
	if err := r.of.engine.adopt(ctx, m, b, r.wait); err != nil {
		return err
	}
	if err := r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		if s.Phase != topology.PhaseSeeding {
			s.Plan = &b.plan
		}
		s.Phase, s.Status, s.Reason = topology.PhaseSeeding, topology.Syncing, ""
	}); err != nil {
		return err
	}
	r.settleAcceptance(ctx)
	r.missed(b.unread)
	for _, d := range b.due {
		r.queue.add(d.key, d.sequence, true, began) // it need not wait for the last of them
	}
	g, writing := errgroup.WithContext(ctx)
	g.SetLimit(owings)
	for _, d := range b.due {
		g.Go(func() error { return r.of.engine.owe(writing, m, d) })
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("writing down what %s lacks: %w", m.Region, err)
	}
	return r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		s.Phase, s.LastScan = topology.PhaseBaselined, began
	})
}

// ask shows the plan and waits for the operator to accept it.
func (r *replica) ask(ctx context.Context, m *member, plan topology.Plan) error {
	err := r.saveOf(ctx, m.Incarnation, func(s *topology.Replication) {
		s.Phase, s.Plan = topology.PhasePlanned, &plan
		*s = r.assess(*s)
	})
	if err != nil {
		return err
	}
	r.fine(&r.storing)    // nothing else would say so before it is accepted
	for !r.isAccepted() { // which it stays until the baseline is made: the next attempt need not ask again
		select {
		case <-r.look:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}
