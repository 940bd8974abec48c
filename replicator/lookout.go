package replicator

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/topology"
)

// misread is why a tag, or a manifest, cannot be looked at, and since when.
type misread struct {
	since time.Time
	err   error
}

// wait is a scan's pace: the request budget of the replica, after a rest.
func (r *replica) wait(ctx context.Context, rest time.Duration) error {
	if rest > 0 && !sleep(ctx, rest) {
		return ctx.Err()
	}
	return r.budget.Wait(ctx)
}

// scans scans the replica again and again.
func (r *replica) scans(ctx context.Context) error {
	for {
		again := r.of.options.ScanInterval
		if !r.scan(ctx) {
			again = min(again, 10*time.Second) // sooner than a whole interval, but not at once
		}
		timer := time.NewTimer(jitter(again))
		select {
		case <-timer.C:
		case <-r.look:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// parkTime is how long what cannot be applied rests before a scan has it tried once more. What the registry does not support for the
// time being, deletes that are switched off above all, does not rest: a probe with each scan finds that it does now.
const parkTime = time.Hour

// scan scans the replica once, and reports whether that went well.
func (r *replica) scan(ctx context.Context) bool {
	m := r.member()
	if m == nil {
		return false
	}
	began := time.Now().UTC()
	r.mu.Lock()
	held := r.state.Held
	since := r.state.LastScan
	r.scanning = began
	r.mu.Unlock()
	sure := held != "" && r.isAccepted()
	if since.IsZero() {
		since = began
	}
	s, err := r.of.engine.scan(ctx, m, since, r.wait, sure)
	if ctx.Err() != nil {
		return false
	}
	r.of.metrics.scans.WithLabelValues(r.of.name, r.config.Region, result(err)).Observe(time.Since(began).Seconds())
	if err != nil {
		r.faultOf(err)
		r.log.Warn("the scan was interrupted", zap.Error(err))
		sleep(ctx, retryAfter(err)) // nothing would be sent before
		return false
	}
	r.fine(&r.reading)
	r.missed(s.unread)
	if r.doubts(s, began) {
		r.log.Warn("much of the replica is gone or old at once; it is looked at again, because events may tell of it yet", zap.Int("tags", s.tags), zap.Int("regressions", s.regressions))
		return false
	}
	held = ""
	if s.guarded {
		held = s.accident()
		r.log.Error("the guard holds the replica: too much of it is gone or old at once", zap.Int("tags", s.tags), zap.Int("regressions", s.regressions))
	}
	err = r.saveOf(ctx, m.Incarnation, func(state *topology.Replication) {
		if state.Held = held; held == "" {
			state.LastScan = began
		}
	})
	if err != nil {
		if outage(err) {
			r.fault(&r.storing, err)
		}
		r.log.Warn("the scan's outcome could not be stored", zap.Error(err))
		return false
	}
	r.fine(&r.storing)
	r.queue.unpark()
	if held == "" {
		r.rewrite(ctx, m)
	}
	r.settleAcceptance(ctx)
	return true
}

// accident is what the guard holds a replica for, and what to do.
func (s survey) accident() string {
	share := fmt.Sprintf("%d of %s", s.regressions, counted(s.tags, "tag", "tags"))
	if s.regressions == s.tags {
		share = "all " + counted(s.tags, "tag", "tags")
	}
	return share + " vanished or went back to older versions since the last scan, with no event telling of it: " +
		"'portolan replica resync' if it was restored or wiped, 'portolan replica accept' if this is right"
}

const (
	// doubtTime is how long what the guard found is doubted at least: the events of a clean-up may be on their way still, or
	// come again after this process was away; registries repeat what got no answer within seconds.
	doubtTime = 5 * time.Second
	// maxDoubt ends the doubt also while events wait: some that can never be accounted for must not keep the guard open.
	maxDoubt = 2 * time.Minute
)

// missed keeps what the last look at the replica could not read.
func (r *replica) missed(unread []unread) {
	if len(unread) > 0 {
		r.log.Warn("some of the replica cannot be read; what is pushed there goes nowhere", zap.Int("tags", len(unread)), zap.Error(unread[0].err))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	before := r.unread
	r.unread = make(map[ledger.Key]misread, len(unread))
	for _, u := range unread {
		since := time.Now()
		if f, known := before[u.key]; known {
			since = f.since
		}
		r.unread[u.key] = misread{since, u.err}
	}
}

// rewrite writes again what scans have failed to read for long.
func (r *replica) rewrite(ctx context.Context, m *member) {
	r.mu.Lock()
	unread := maps.Clone(r.unread)
	r.mu.Unlock()
	for key, u := range unread {
		if time.Since(u.since) < unreadableTime {
			continue
		}
		if err := r.of.engine.rewrite(ctx, m, key, u.err); err != nil {
			r.log.Debug("what cannot be read is not written again", zap.String("image", key.String()), zap.Error(err))
			continue
		}
		r.log.Warn("the replica failed to read a tag that was being written there; it was written again", zap.String("image", key.String()), zap.NamedError("reading", u.err))
		r.mu.Lock()
		delete(r.unread, key)
		r.mu.Unlock()
	}
}

// unreadable lists what cannot be read at the replica, by image: whatever is pushed there goes nowhere. The caller holds mu.
func (r *replica) unreadable() []PendingItem {
	all := make(map[ledger.Key]misread)
	maps.Copy(all, r.unread)
	add := func(key ledger.Key, f misread) {
		if known, ok := all[key]; !ok {
			all[key] = f
		} else if f.since.Before(known.since) {
			all[key] = misread{f.since, known.err}
		}
	}
	for key, f := range r.unheard {
		add(key, f)
	}
	if !decided(r.state) || r.state.Held != "" || r.reading.lasting() {
		// The others wait for it: see mend.
		for key, f := range r.of.damage.all() {
			add(key, misread{f.since, fmt.Errorf("the ledger's record of %s is damaged, and cannot be decided anew before %s is asked what it holds: %w", key, r.config.Region, f.err)})
		}
	}
	list := make([]PendingItem, 0, len(all))
	for key, f := range all {
		list = append(list, PendingItem{Image: key.String(), Since: f.since.UTC(), Error: f.err.Error(), Unreadable: true})
	}
	slices.SortFunc(list, func(a, b PendingItem) int { return strings.Compare(a.Image, b.Image) })
	return list
}

// doubts reports whether what the guard would hold the replica for has to be looked at again first. Nothing is made of it
// meanwhile.
func (r *replica) doubts(s survey, now time.Time) bool {
	waiting := 0
	if r.of.options.Spool != nil {
		waiting = r.of.options.Spool.Pending(r.of.name, r.config.Region)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !s.guarded {
		r.doubted = time.Time{}
	}
	if !s.guarded || r.state.Held != "" || r.of.options.Spool == nil {
		return false
	}
	if r.doubted.IsZero() {
		r.doubted = now
	}
	least := min(doubtTime, r.of.options.ScanInterval)
	if waiting > 0 {
		least = maxDoubt
	}
	return now.Sub(r.doubted) < least
}

// lookNow wakes whoever waits for the next scan or for an operator.
func (r *replica) lookNow() {
	select {
	case r.look <- struct{}{}:
	default:
	}
}
