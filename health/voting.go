package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"

	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

const (
	// voteGap is the least time between two ballots of one server, however much happens: no storms.
	voteGap = time.Second
	// voteTimeout bounds one write of a ballot.
	voteTimeout = 3 * time.Second
)

// hearVotes follows the ballots in the store until ctx is done.
func (m *Monitor) hearVotes(ctx context.Context) {
	err := m.options.Votes.Watch(ctx, topology.VotesPrefix, func(u store.Update) {
		m.mu.Lock()
		m.electorate.hear(u, time.Now())
		m.mu.Unlock()
		m.touch()
	})
	if ctx.Err() == nil {
		// Nothing is heard any more, and so the votes grow old: this server decides alone.
		m.log.Error("the votes of other servers are not followed any more", zap.Error(err))
	}
}

// vote writes this server's ballot whenever it says something new, and as a heartbeat, until ctx is done; then it takes it back.
func (m *Monitor) vote(ctx context.Context) {
	var last ballot
	failed := false
	wait := time.NewTimer(0)
	defer wait.Stop()
	for {
		beat := false
		select {
		case <-wait.C:
			beat = true
		case <-m.changed:
		case <-ctx.Done():
			m.withdraw()
			return
		}
		m.mu.Lock()
		now := m.ballot(time.Now())
		m.mu.Unlock()
		if !beat && now.same(&last) {
			continue
		}
		err := m.cast(ctx, now)
		if ctx.Err() == nil && err != nil != failed {
			if failed = err != nil; failed {
				m.log.Warn("the votes of this server cannot be written: other servers, if there are any, decide without it", zap.Error(err))
			} else {
				m.log.Info("the votes of this server are written again")
			}
		}
		last = now
		if err != nil {
			last = ballot{}
		}
		select {
		case <-time.After(voteGap):
		case <-ctx.Done():
		}
		wait.Reset(heartbeat - voteGap + time.Duration((rand.Float64()*0.2-0.1)*float64(heartbeat)))
	}
}

// ballot is this server's at the moment. The caller holds mu.
func (m *Monitor) ballot(now time.Time) ballot {
	own := make(map[string]router.Health, len(m.watched))
	for _, w := range m.watched {
		if !w.machine.stale(m.rules(w.target), now) {
			own[w.target.name()] = w.machine.health
		}
	}
	return cast(m.instance, now, own)
}

// cast writes b, and removes the ballots of servers that are gone.
func (m *Monitor) cast(ctx context.Context, b ballot) error {
	ctx, cancel := context.WithTimeout(ctx, voteTimeout)
	defer cancel()
	text, err := json.Marshal(b)
	if err != nil {
		return fmt.Errorf("writing the votes: %w", err)
	}
	revision, err := m.options.Votes.Commit(ctx, store.Put(topology.VoteKey(m.options.Voter), string(text)))
	if err != nil {
		return fmt.Errorf("writing the votes: %w", err)
	}
	m.mu.Lock()
	m.electorate.written = revision
	silent := m.electorate.silent(time.Now())
	m.mu.Unlock()
	if len(silent) > 0 {
		// Somebody else may do the same: then there is nothing left to do.
		if _, err := m.options.Votes.Commit(ctx, silent...); err != nil && !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("removing the votes of servers that are gone: %w", err)
		}
	}
	return nil
}

// withdraw takes this server's ballot back, so that what it said last does not count any more.
func (m *Monitor) withdraw() {
	m.mu.Lock()
	written := m.electorate.written
	m.mu.Unlock()
	if written == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), voteTimeout)
	defer cancel()
	if _, err := m.options.Votes.Commit(ctx, store.DeleteIf(topology.VoteKey(m.options.Voter), written)); err != nil && !errors.Is(err, store.ErrConflict) {
		m.log.Warn("the votes of this server stand until they are old", zap.Error(err))
	}
}
