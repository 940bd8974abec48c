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
	// maxGone is how often content is looked for in vain before a tag is given up for the time being, maxGoneManifest before
	// a manifest's membership is forgotten: over a quarter of an hour, in which a referrer's subject may still come.
	maxGone, maxGoneManifest = 8, 12
	// maxRefused is how often a registry may refuse the same before it is taken at its word.
	maxRefused = 5
	// maxFailed is how often the same may fail while the replica takes everything else, before it rests for parkTime: for minutes.
	maxFailed = 9
)

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
	var unavailable *UnavailableError
	switch {
	case err == nil:
		r.queue.done(i)
		r.fine(&r.writing)
		r.mu.Lock()
		r.worked = time.Now()
		r.mu.Unlock()
	case errors.As(err, &never):
		r.log.Warn("not replicable", zap.String("image", i.key.String()), zap.String("reason", never.Reason))
		r.park(ctx, m, i, never.Reason, parkTime)
	case errors.As(err, &unavailable) && !r.stuck(i):
		r.fault(&r.writing, err)
		wait := max(unavailable.RetryAfter, backoff(i.attempts, time.Second, 30*time.Second))
		r.queue.block(time.Now().Add(wait), unavailable.RetryAfter > 0)
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
	case errors.Is(err, ErrUnsupported):
		// Said with every scan, and in the status.
		r.log.Debug("not replicable before the registry supports it", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), 0)
	case errors.Is(err, ErrRefused) && i.attempts >= maxRefused:
		r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), parkTime)
	case errors.Is(err, ErrGone) && i.key.Kind == ledger.Manifest && i.attempts >= maxGoneManifest:
		r.log.Warn("a manifest is in no replica any more; it is no longer looked for", zap.String("image", i.key.String()))
		if err := r.of.engine.forgetGone(ctx, i.key); err != nil {
			r.queue.retry(i, time.Second, err)
			return
		}
		r.queue.done(i)
	case errors.Is(err, errUnreadable) && i.attempts >= maxGone, errors.Is(err, ErrGone) && i.key.Kind == ledger.Tag && i.attempts >= maxGone:
		r.log.Warn("no replica gives the content any more", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), parkTime)
	case unavailable != nil && i.attempts >= maxFailed:
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
