package replicator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/events"
	"portolan/replicator/ledger"
	"portolan/replicator/version"
)

// maxUnheard bounds how many of these are kept for people to see.
const maxUnheard = 1000

// hearings is how many events of one replica are looked at at a time.
const hearings = 8

// hear observes what the replica's events tell.
func (r *replica) hear(ctx context.Context) error {
	var hearing sync.WaitGroup
	defer hearing.Wait()
	free := make(chan struct{}, hearings)
	for {
		if m, state := r.member(), r.current(); m == nil || !decided(state) || state.Held != "" {
			// The baseline, or an operator, comes first.
			if !sleep(ctx, 100*time.Millisecond) {
				return ctx.Err()
			}
			continue
		}
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return ctx.Err()
		}
		items, err := r.of.options.Spool.Take(ctx, r.of.name, r.config.Region, 1)
		if err != nil {
			<-free
			if ctx.Err() != nil || errors.Is(err, events.ErrClosed) {
				return err
			}
			// Scans and copies go on without events.
			r.log.Error("the spooled events cannot be read; trying again", zap.Error(err))
			if !sleep(ctx, time.Second) {
				return ctx.Err()
			}
			continue
		}
		hearing.Go(func() {
			defer func() { <-free }()
			for _, i := range items {
				r.listen(ctx, i)
			}
		})
	}
}

// listen looks at what an item of the spool is about, and gives it back to the spool as the outcome demands.
func (r *replica) listen(ctx context.Context, i events.Item) {
	err := r.observe(ctx, i)
	if err == nil {
		err = r.of.options.Spool.Done(ctx, i)
	}
	r.heed(ctx, i, err)
	if err == nil {
		return
	}
	// The longer it takes, the longer it is likely to take: what changed meanwhile within milliseconds most often.
	last := i.Marked
	if newest, told := i.Newest(); told {
		last = newest.Received
	}
	wait := time.Since(last) / 2
	if errors.Is(err, errAgain) {
		wait = min(max(wait, 10*time.Millisecond), time.Second)
	} else {
		wait = jitter(min(max(wait, time.Second), maxWait))
	}
	r.of.options.Spool.Release(max(wait, retryAfter(err)), i)
}

// maxWait is the longest time between two looks at what an event told of and cannot be looked at.
const maxWait = 5 * time.Minute

// heed keeps why what an event told of cannot be looked at, or that it could. Of a registry that wants to be left alone it is not known.
func (r *replica) heed(ctx context.Context, i events.Item, err error) {
	key := keyOf(r.of.name, i.Repository, i.Reference)
	r.mu.Lock()
	defer r.mu.Unlock()
	_, known := r.unheard[key]
	switch {
	case err == nil || errors.Is(err, errAgain):
		delete(r.unheard, key)
		if err == nil {
			r.storing = trouble{}
		}
	case outage(err): // which says nothing of the tag, and a scan or a copy may not come by for long
		if r.storing.reason == "" {
			r.log.Warn("what an event told of cannot be written down; trying again", zap.String("image", key.String()), zap.Error(err))
		}
		r.storing.note(err)
	case ctx.Err() != nil || i.Reference == "" || errors.Is(err, errUndecided) || retryAfter(err) > 0:
	case known || len(r.unheard) < maxUnheard:
		if !known {
			r.log.Warn("what an event told of cannot be looked at; trying again", zap.String("image", key.String()), zap.Error(err))
		}
		if r.unheard == nil {
			r.unheard = make(map[ledger.Key]misread)
		}
		r.unheard[key] = misread{i.Since, fmt.Errorf("looking at %s in %s: %w", key, r.config.Region, err)}
	}
}

// observe looks at what an item of the spool is about.
func (r *replica) observe(ctx context.Context, i events.Item) error {
	m, state := r.member(), r.current()
	if m == nil || !decided(state) || state.Held != "" {
		return errUndecided
	}
	if i.Repository == "" || i.Reference == "" {
		return r.scanned(i.Marked, state.LastScan)
	}
	key := keyOf(r.of.name, i.Repository, i.Reference)
	ev := r.evidence(i, state.LastScan)
	if key.Kind == ledger.Manifest {
		return r.of.engine.observeManifest(ctx, m, key, ev)
	}
	_, err := r.of.engine.observe(ctx, m, key, ev)
	if err == nil && len(i.Evidence) > 0 {
		r.of.metrics.heard.WithLabelValues(r.of.name, r.config.Region).Observe(time.Since(i.Since).Seconds())
	}
	return err
}

// scanned is nil if the last scan, whoever made it, began after that time. Otherwise it asks for one, unless one that did is under way,
// or has failed and will be repeated.
func (r *replica) scanned(after, last time.Time) error {
	if last.After(after) {
		return nil
	}
	r.mu.Lock()
	begun := r.scanning.After(after)
	r.mu.Unlock()
	if !begun {
		r.lookNow()
	}
	if after.After(time.Now()) {
		return nil // the clock was set back: it tells nothing any more
	}
	return errUndecided
}

// evidence is what an item's events tell.
func (r *replica) evidence(i events.Item, since time.Time) evidence {
	ev := evidence{since: since}
	for _, e := range i.Evidence {
		// The registry's clock, corrected by what is known of it; nothing has happened after it was heard of.
		at := e.Received
		if remote := r.remote.Load(); remote != nil && !e.Time.IsZero() {
			if t := remote.serverTime(e.Time); t.Before(at) {
				at = t
			}
		}
		at = at.UTC().Truncate(time.Millisecond)
		switch {
		case e.Action == events.Push:
			ev.pushes = append(ev.pushes, push{
				Event:   version.Event{Digest: e.Digest, Time: at, WriteID: e.WriteID},
				heard:   e.Received,
				byOther: e.UserAgent != "" && e.WriteID == "",
			})
		case e.WriteID != "":
			ev.erased = e.WriteID
		default:
			ev.deletedAt, ev.deleteHeard = at, e.Received
		}
	}
	return ev
}
