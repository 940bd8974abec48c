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
			r.queue.postpone(i, time.Second)
			continue
		}
		began := time.Now()
		// Where events come, the event of a push that is met on the way dates it better than the meeting does.
		cost, err := r.of.engine.apply(ctx, m, i.key, state.LastScan, i.failed == 0 && r.of.options.Spool != nil)
		if ctx.Err() != nil {
			r.queue.postpone(i, 0)
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

// cause is why a try came to nothing. To give something up takes many of one cause in a row: what failed while the replicas or the ledger
// were away says nothing of it.
type cause uint8

const (
	causeNone cause = iota
	causeOutage
	causeImpossible
	causeAway
	causeStuck
	causePush
	causeRegressed
	causeLease
	causeRace
	causeSourcesRest
	causeNotAllAsked
	causeUnsupported
	causeRefused
	causeGone
	causeUnreadable
	causeOther
)

// causeOf tells the causes apart; stuck says whose trouble it is if the replica seems to be unavailable: the item's.
func causeOf(err error, stuck bool) cause {
	var never *NotReplicableError
	var unavailable *UnavailableError
	var rest *SourcesRestError
	switch {
	case err == nil:
		return causeNone
	case outage(err): // whatever else went wrong, what became of it could not be stored
		return causeOutage
	case errors.As(err, &never):
		return causeImpossible
	case errors.As(err, &unavailable) && stuck:
		return causeStuck
	case errors.As(err, &unavailable):
		return causeAway
	case errors.Is(err, errPush):
		return causePush
	case errors.Is(err, errRegressed):
		return causeRegressed
	case errors.Is(err, errLease):
		return causeLease
	case errors.Is(err, errAgain):
		return causeRace
	case errors.As(err, &rest):
		return causeSourcesRest
	case errors.Is(err, errNotAllAsked):
		return causeNotAllAsked
	case errors.Is(err, ErrUnsupported):
		return causeUnsupported
	case errors.Is(err, ErrRefused):
		return causeRefused
	case errors.Is(err, ErrGone):
		return causeGone
	case errors.Is(err, errUnreadable):
		return causeUnreadable
	}
	return causeOther
}

// stuck reports whether the trouble is the item's, whatever it looks like: the replica took something else since it began to fail,
// or the last look at the replica could read others but not that.
func (r *replica) stuck(i *item) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, unread := r.unread[i.key]
	return i.failed > 0 && r.worked.After(i.failing) || unread
}

// settle gives an item back to the queue as its outcome demands.
func (r *replica) settle(ctx context.Context, m *member, i *item, err error) {
	why := causeOf(err, r.stuck(i))
	before := i.before(why)
	retry := func(after time.Duration) { r.queue.retry(i, after, why, err) }
	switch why {
	case causeNone:
		r.queue.done(i)
		r.fine(&r.writing)
		r.fine(&r.storing)
		r.mu.Lock()
		r.worked = time.Now()
		r.mu.Unlock()
	case causeOutage:
		// Nothing can be done without the ledger, and nothing is wrong with the item.
		r.fault(&r.storing, err)
		r.queue.block(time.Now().Add(time.Second), false)
		r.queue.postpone(i, time.Second)
	case causeLease:
		r.queue.postpone(i, time.Second)
	case causeRace:
		// Somebody else was quicker. Where that does not end, something is wrong.
		retry(backoff(i.races, 20*time.Millisecond, 10*time.Second))
	case causePush:
		retry(2 * time.Second)
	case causeRegressed:
		r.lookNow()
		retry(backoff(i.failed, 5*time.Second, time.Minute))
	case causeAway:
		r.fault(&r.writing, err)
		wait := max(retryAfter(err), backoff(i.failed, time.Second, 30*time.Second))
		r.queue.block(time.Now().Add(wait), retryAfter(err) > 0)
		retry(wait)
	case causeSourcesRest:
		var rest *SourcesRestError
		errors.As(err, &rest)
		retry(max(rest.RetryAfter, backoff(i.failed, time.Second, 30*time.Second)))
	case causeNotAllAsked:
		retry(backoff(i.failed, time.Second, 30*time.Second))
	case causeImpossible:
		var never *NotReplicableError
		errors.As(err, &never)
		r.giveUp(ctx, m, i, never.Reason)
	case causeUnsupported:
		// Said with every scan, and in the status.
		r.log.Debug("not replicable before the registry supports it", zap.String("image", i.key.String()), zap.Error(err))
		r.park(ctx, m, i, err.Error(), 0)
	default:
		limit := tolerated(why, i.key.Kind)
		switch {
		case limit == 0 || before < limit:
			r.log.Debug("a copy failed", zap.String("image", i.key.String()), zap.Int("attempt", i.failed+1), zap.Error(err))
			retry(max(retryAfter(err), backoff(i.failed, 500*time.Millisecond, 5*time.Minute)))
		case why == causeGone && i.key.Kind == ledger.Manifest:
			r.forgetGone(ctx, m, i, err)
		case why == causeStuck:
			r.giveUp(ctx, m, i, fmt.Sprintf("failed %d times: %v", i.failed+1, err))
		default:
			r.giveUp(ctx, m, i, err.Error())
		}
	}
}

// tolerated is how many failures of a cause in a row are put up with before a tag or manifest is given up; zero: any number.
func tolerated(why cause, kind ledger.Kind) int {
	switch {
	case why == causeStuck:
		return maxFailed
	case why == causeRefused:
		return maxRefused
	case why == causeGone && kind == ledger.Manifest:
		return maxGoneManifest
	case why == causeGone, why == causeUnreadable:
		return maxGone
	}
	return 0
}

// forgetGone ends the membership of a manifest that was looked for in vain long enough, if really nobody has it.
func (r *replica) forgetGone(ctx context.Context, m *member, i *item, err error) {
	switch forgotten, failed := r.of.engine.forgetGone(ctx, i.key, i.begun); {
	case failed != nil:
		r.queue.retry(i, backoff(i.failed, time.Second, time.Minute), causeGone, failed)
	case forgotten:
		r.log.Warn("a manifest is in no replica any more; it is no longer looked for", zap.String("image", i.key.String()))
		r.queue.done(i)
	default: // somebody has it, but not all that it needs
		r.giveUp(ctx, m, i, err.Error())
	}
}

// giveUp parks an item for an hour.
func (r *replica) giveUp(ctx context.Context, m *member, i *item, reason string) {
	r.log.Warn("not replicable at present", zap.String("image", i.key.String()), zap.String("reason", reason))
	r.park(ctx, m, i, reason, parkTime)
}

// park gives up on an item until a scan after rest, or, with none, until a probe succeeds, once the record says why.
func (r *replica) park(ctx context.Context, m *member, i *item, reason string, rest time.Duration) {
	if err := r.of.engine.refuse(ctx, m, i.key, i.begun, reason); err != nil {
		r.queue.postpone(i, time.Second)
		return
	}
	r.queue.park(i, reason, rest)
}
