package replicator

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
)

// work takes what is due and applies it.
func (r *replica) work(ctx context.Context) error {
	for {
		i, err := r.queue.take(ctx)
		if err != nil {
			return err
		}
		m, state := r.member(), r.current()
		if m == nil || !decided(state) || state.Held != "" {
			// A new baseline, or an operator, comes first.
			r.queue.retry(i, time.Second, nil)
			continue
		}
		began := time.Now()
		// Where events come, the event of a push that is met on the way dates it better than the meeting does.
		cost, err := r.of.engine.apply(ctx, m, i.key, state.LastScan, i.attempts == 0 && r.of.options.Spool != nil)
		if ctx.Err() != nil {
			r.queue.retry(i, 0, nil)
			return ctx.Err()
		}
		r.of.metrics.copied(r.of.name, r.config.Region, cost, err, began)
		r.settle(ctx, m, i, err)
	}
}

const (
	// maxGone is how often in a row content is looked for in vain before a tag is given up for the time being, maxGoneManifest before
	// a manifest's membership is forgotten: over a quarter of an hour, in which a referrer's subject may still come.
	maxGone, maxGoneManifest = 8, 12
	// maxRefused is how often in a row a registry may refuse the same before it is taken at its word.
	maxRefused = 5
	// maxFailed is how often in a row the same may fail while the replica takes everything else, before it rests for parkTime: for minutes.
	maxFailed = 9
)

// failure is a way to fail. To give something up takes failures of one way in a row: what failed while the replicas or the ledger were away
// says nothing of it.
type failure uint8

const (
	otherwise failure = iota
	gone
	unreadableEverywhere
	refused
	unavailable
)

func failureOf(err error) failure {
	var away *UnavailableError
	switch {
	case errors.Is(err, ErrGone):
		return gone
	case errors.Is(err, errUnreadable):
		return unreadableEverywhere
	case errors.Is(err, ErrRefused):
		return refused
	case errors.As(err, &away):
		return unavailable
	}
	return otherwise
}

// stuck reports whether the trouble is the item's, whatever it looks like: the replica took something else since it began to fail,
// or the last look at the replica could read others but not that.
func (r *replica) stuck(i *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, unread := r.unread[i.key]
	return i.attempts > 0 && r.worked.After(i.failing) || unread
}

// settle gives an item back to the queue as its outcome demands.
func (r *replica) settle(ctx context.Context, m *member, i *item, err error) {
	var never *NotReplicableError
	var away *UnavailableError
	var rest *SourcesRestError
	before := i.before(failureOf(err))
	switch {
	case err == nil:
		r.queue.done(i)
		r.fine(&r.writing)
		r.mu.Lock()
		r.worked = time.Now()
		r.mu.Unlock()
	case errors.Is(err, ledger.ErrUnavailable):
		// Nothing can be done without the ledger, and nothing is wrong with the item.
		r.queue.block(time.Now().Add(time.Second), false)
		r.queue.retry(i, time.Second, nil)
	case errors.As(err, &never):
		r.log.Warn("not replicable", zap.String("image", i.key.String()), zap.String("reason", never.Reason))
		r.park(ctx, m, i, never.Reason, parkTime)
	case errors.As(err, &away) && (away.RetryAfter > 0 || !r.stuck(i)):
		r.fault(&r.writing, err)
		wait := max(away.RetryAfter, backoff(i.attempts, time.Second, 30*time.Second))
		r.queue.block(time.Now().Add(wait), away.RetryAfter > 0)
		r.queue.retry(i, wait, err)
	case errors.Is(err, errPush):
		r.queue.retry(i, 2*time.Second, err)
	case errors.Is(err, errRegressed):
		r.lookNow()
		r.queue.retry(i, backoff(i.attempts, 5*time.Second, time.Minute), err)
	case errors.Is(err, errLease):
		r.queue.retry(i, time.Second, nil)
	case errors.Is(err, errAgain):
		// Somebody else was quicker. Where that does not end, something is wrong.
		r.queue.retry(i, backoff(i.races, 20*time.Millisecond, 10*time.Second), nil)
	case errors.As(err, &rest):
		r.queue.retry(i, max(rest.RetryAfter, time.Second), err)
	case errors.Is(err, errElsewhere):
		r.queue.retry(i, backoff(i.attempts, time.Second, 30*time.Second), err)
	case errors.Is(err, ErrUnsupported):
		// Said with every scan, and in the status.
		r.log.Debug("not replicable before the registry supports it", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), 0)
	case errors.Is(err, ErrRefused) && before >= maxRefused:
		r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), parkTime)
	case errors.Is(err, ErrGone) && i.key.Kind == ledger.Manifest && before >= maxGoneManifest:
		forgotten, failed := r.of.engine.forgetGone(ctx, i.key, i.begun)
		switch {
		case failed != nil:
			r.queue.retry(i, backoff(i.attempts, time.Second, time.Minute), errors.Join(err, failed))
		case forgotten:
			r.log.Warn("a manifest is in no replica any more; it is no longer looked for", zap.String("image", i.key.String()))
			r.queue.done(i)
		default:
			r.log.Warn("no replica gives all that a manifest needs", zap.String("image", i.key.String()), zap.Error(err))
			r.park(ctx, m, i, err.Error(), parkTime)
		}
	case errors.Is(err, errUnreadable) && before >= maxGone, errors.Is(err, ErrGone) && i.key.Kind == ledger.Tag && before >= maxGone:
		r.log.Warn("no replica gives the content any more", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), parkTime)
	case away != nil && before >= maxFailed:
		r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, fmt.Sprintf("failed %d times: %v", i.attempts+1, err), parkTime)
	default:
		r.log.Debug("a copy failed", zap.String("image", i.key.String()), zap.Int("attempt", i.attempts+1), zap.Error(err))
		r.queue.retry(i, backoff(i.attempts, 500*time.Millisecond, 5*time.Minute), err)
	}
}

// park gives up on an item until a scan after rest, or, with none, until a probe succeeds, once the record says why.
func (r *replica) park(ctx context.Context, m *member, i *item, reason string, rest time.Duration) {
	if err := r.of.engine.refuse(ctx, m, i.key, i.begun, reason); err != nil {
		r.queue.retry(i, time.Second, err)
		return
	}
	r.queue.park(i, reason, rest)
}
