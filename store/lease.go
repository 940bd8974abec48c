package store

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"strings"
	"sync/atomic"
	"time"
)

// LeaseOptions are the intervals of a lease. Everybody who contends for one key must use the same TTL.
type LeaseOptions struct {
	// Renew is how often the holder writes the key. Default a quarter of TTL, 2 s: three may fail before the lease is in danger.
	Renew time.Duration
	// TTL is how long the key must stand still, on an observer's own clock, before it is taken over. Default 8 s:
	// shorter than Consul's sessions can be (10 s and more), longer than an election of a new Consul leader.
	TTL time.Duration
	// Margin is how long before the end the holder gives up, for clocks that run at different rates and for the time it
	// takes to stop. Default an eighth of TTL, 500 ms at most.
	Margin time.Duration
	// Poll is how often a contender looks at the key. Default a quarter of Renew.
	Poll time.Duration
	// Failed is told, from Run's goroutine, why a contender can neither read nor have the key, whenever the reason is
	// another one than before. Default: nobody is told.
	Failed func(error)
}

func (o LeaseOptions) withDefaults() LeaseOptions {
	if o.Renew <= 0 && o.TTL <= 0 {
		o.Renew = 2 * time.Second
	}
	if o.TTL <= 0 {
		o.TTL = 4 * o.Renew
	}
	if o.Renew <= 0 {
		o.Renew = o.TTL / 4
	}
	if o.Margin <= 0 {
		o.Margin = min(o.TTL/8, 500*time.Millisecond)
	}
	if o.Poll <= 0 {
		o.Poll = o.Renew / 4
	}
	return o
}

// Lease is one contender for a key that at most one may hold. Its correctness rests on check-and-set and on durations
// measured by each side's own clock, never on clocks that agree:
//
//   - The holder counts its TTL from before it sent the last renewal that succeeded.
//   - A contender counts the same TTL from after it first read the key's revision, then replaces exactly that revision.
//     It read what the renewal had written, so it begins to count later than the holder did; and had the holder renewed
//     since, the revision would be another and the replacement would fail.
//
// A process that was frozen may wake and still act for a moment on a lease it lost; where that matters, the Token
// fences what it does.
type Lease struct {
	store  Store
	key    string
	holder string
	opts   LeaseOptions

	// mark makes the values written by this contender its own, also beside another with the same holder.
	mark  string
	count uint64
}

// NewLease returns a contender for key, which is stored with the name holder for people to read. A Lease is used by one
// Run at a time.
func NewLease(s Store, key, holder string, opts LeaseOptions) *Lease {
	return &Lease{store: s, key: key, holder: holder, opts: opts.withDefaults(), mark: rand.Text()}
}

// Grant is the lease while it is held.
type Grant struct{ held *held }

// Token grows with every change of the holder: a fencing token. It stays the same while the lease is held.
func (g Grant) Token() uint64 { return g.held.token }

// Remaining is how long nobody else can have the lease, counted from before its last renewal was sent and less the
// margin; zero or less when it can no longer be assumed. A write with a deadline may begin while the deadline is
// shorter. It also falls by what the wall clock jumped ahead, since the monotonic clock may stand while a machine
// sleeps.
func (g Grant) Remaining() time.Duration {
	return g.held.span - elapsed(*g.held.since.Load())
}

// held is the state of a held lease, shared by the renewing loop and the Grant.
type held struct {
	token uint64
	span  time.Duration // TTL less margin
	since atomic.Pointer[time.Time]

	// Of the renewing loop alone.
	revision uint64
	// pending is when the first renewal was sent whose outcome is unknown, since the last that is known.
	pending time.Time
}

func elapsed(since time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(since), now.Round(0).Sub(since.Round(0)))
}

// Run contends for the lease until ctx is done and calls work each time it is got. The context of work ends when the
// lease is lost, when it can no longer be assumed (no renewal succeeded for TTL less margin), or with ctx. Run waits
// for work to return; an end by ctx, or by work itself, releases the lease, so that another takes over at once. After
// work returned of itself, Run contends again after a renewal interval. Run returns the error of ctx.
//
// Errors of the store are part of Run's business: it tries again.
func (l *Lease) Run(ctx context.Context, work func(ctx context.Context, g Grant)) error {
	for {
		h, err := l.acquire(ctx)
		if err != nil {
			return err
		}
		l.hold(ctx, h, work)
		if err := sleep(ctx, l.opts.Renew); err != nil {
			return err
		}
	}
}

// acquire returns when the lease is got, or with the error of ctx.
func (l *Lease) acquire(ctx context.Context) (*held, error) {
	var (
		seen   uint64    // the revision that is watched, zero if none
		still  time.Time // since when it is known to stand still
		failed string    // what Failed was told last
	)
	tell := func(err error) {
		if l.opts.Failed != nil && ctx.Err() == nil && err.Error() != failed {
			failed = err.Error()
			l.opts.Failed(err)
		}
	}
	for {
		entry, err := l.read(ctx)
		if err != nil {
			tell(err)
		}
		now := time.Now()
		free := false
		switch {
		case err != nil:
			// Not a reading. The count goes on: if the holder renewed meanwhile, the revision will have changed.
		case entry.Revision == 0, l.dead(entry), strings.HasSuffix(entry.Value, l.mark):
			// Nobody's; or an own write whose success was not seen, or whose end was not waited for.
			free = true
		case entry.Revision != seen:
			seen, still = entry.Revision, now
		default:
			free = now.Sub(still) >= l.opts.TTL
		}
		if free {
			start := time.Now()
			revision, err := l.write(ctx, entry.Revision)
			if err == nil {
				h := &held{token: revision, revision: revision, span: l.opts.TTL - l.opts.Margin}
				h.since.Store(&start)
				return h, nil
			}
			// Conflict, or an unknown outcome: the next reading tells.
			if !errors.Is(err, ErrConflict) {
				tell(err)
			}
		}
		if err := sleep(ctx, l.opts.Poll); err != nil {
			return nil, err
		}
	}
}

// dead reports whether the entry was written by a process that no longer has the store open.
func (l *Lease) dead(entry Entry) bool {
	x, ok := l.store.(Exclusive)
	return ok && entry.Revision <= x.OpenedAt()
}

// hold runs work and renews until work has returned, or the lease is lost; then it still waits for work.
func (l *Lease) hold(ctx context.Context, h *held, work func(context.Context, Grant)) {
	working, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		work(working, Grant{h})
	}()
	// Renewals go on while work finishes after ctx has ended: until it has, nobody else may start.
	renewing := context.WithoutCancel(ctx)
	grant := Grant{h}
	expiry := time.NewTimer(grant.Remaining())
	defer expiry.Stop()
	next := time.NewTimer(l.opts.Renew)
	defer next.Stop()
	renewed := make(chan bool, 1) // holds the outcome of the one renewal under way: still ours or not
	var under bool
	lost := false
	for !lost {
		select {
		case <-done:
			if under {
				lost = !<-renewed
			}
			if !lost {
				l.release(renewing, h)
			}
			return
		case <-expiry.C:
			if left := grant.Remaining(); left > 0 {
				expiry.Reset(left) // it was renewed meanwhile
				continue
			}
			lost = true
		case <-next.C:
			under = true
			go func() { renewed <- l.renew(renewing, h) }()
		case ours := <-renewed:
			under = false
			if !ours {
				lost = true
				continue
			}
			pause := l.opts.Renew
			if !h.pending.IsZero() {
				pause = l.opts.Poll // the outcome is unknown: look again soon
			}
			next.Reset(pause)
		}
	}
	stop()
	<-done
	if under {
		<-renewed
	}
}

// renew writes the key again. It reports whether the lease may still be assumed; h.since says until when.
func (l *Lease) renew(ctx context.Context, h *held) bool {
	if !h.pending.IsZero() {
		// Learn first what became of the renewals before.
		entry, err := l.read(ctx)
		switch {
		case err != nil:
			return true // nothing is known; the span runs out if it stays so
		case entry.Revision == h.revision:
			// None was applied so far.
		case strings.HasSuffix(entry.Value, l.mark):
			// One was: which one cannot be told, so it counts from the first.
			h.revision = entry.Revision
			since := h.pending
			h.since.Store(&since)
			h.pending = time.Time{}
		default:
			return false
		}
	}
	start := time.Now()
	revision, err := l.write(ctx, h.revision)
	switch {
	case err == nil:
		h.revision = revision
		h.since.Store(&start)
		h.pending = time.Time{}
	case errors.Is(err, ErrConflict) && h.pending.IsZero():
		return false
	default:
		// A conflict after an unknown outcome may be with an own, late renewal.
		if h.pending.IsZero() {
			h.pending = start
		}
	}
	return true
}

// release gives the key up, if it still is ours, so that others need not wait. If that fails they wait for TTL.
func (l *Lease) release(ctx context.Context, h *held) {
	ctx, cancel := context.WithTimeout(ctx, l.opts.Renew)
	defer cancel()
	_, _ = l.store.Commit(ctx, DeleteIf(l.key, h.revision))
}

// read returns the zero Entry if there is none.
func (l *Lease) read(ctx context.Context) (Entry, error) {
	ctx, cancel := context.WithTimeout(ctx, l.opts.Renew)
	defer cancel()
	entry, err := l.store.Get(ctx, l.key)
	if errors.Is(err, ErrNotFound) {
		return Entry{}, nil
	}
	return entry, err
}

func (l *Lease) write(ctx context.Context, revision uint64) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, l.opts.Renew)
	defer cancel()
	l.count++
	return l.store.Commit(ctx, PutIf(l.key, fmt.Sprintf("%s %d %s", l.holder, l.count, l.mark), revision))
}

// sleep waits for d, give or take a tenth so that contenders do not march in step, or for the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d*9/10 + mathrand.N(d/5+1))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return ctx.Err()
	}
}
