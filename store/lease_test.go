package store_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"portolan/store"
)

// memory is as much of a store as a lease needs.
type memory struct {
	store.Store

	mu       sync.Mutex
	revision uint64
	entries  map[string]store.Entry
	openedAt uint64
}

func newMemory() *memory { return &memory{entries: map[string]store.Entry{}} }

func (m *memory) OpenedAt() uint64 { return m.openedAt }

func (m *memory) Get(ctx context.Context, key string) (store.Entry, error) {
	if ctx.Err() != nil {
		return store.Entry{}, ctx.Err()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	entry, ok := m.entries[key]
	if !ok {
		return store.Entry{}, store.ErrNotFound
	}
	return entry, nil
}

func (m *memory) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	op := ops[0]
	if m.entries[op.Key].Revision != op.Revision {
		return 0, store.ErrConflict
	}
	m.revision++
	if op.Verb == store.VerbDeleteIf {
		delete(m.entries, op.Key)
	} else {
		m.entries[op.Key] = store.Entry{Key: op.Key, Value: op.Value, Revision: m.revision}
	}
	return m.revision, nil
}

// seenBy gives one process its own, perhaps faulty, way to the same store: a call may take long, fail before it had an
// effect, or fail after it.
type seenBy struct {
	*memory
	fault func(ctx context.Context, write bool, apply func() error) error
}

func (s seenBy) Get(ctx context.Context, key string) (store.Entry, error) {
	var entry outcome[store.Entry]
	err := s.fault(ctx, false, func() error { return entry.of(s.memory.Get(ctx, key)) })
	return entry.get(), err
}

func (s seenBy) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	var revision outcome[uint64]
	// Once sent, a call may be carried out whatever becomes of its caller.
	sent := ctx
	if ctx.Err() == nil {
		sent = context.WithoutCancel(ctx)
	}
	err := s.fault(ctx, true, func() error { return revision.of(s.memory.Commit(sent, ops...)) })
	return revision.get(), err
}

// outcome is the result of a call that may come when its caller has given up.
type outcome[T any] struct {
	mu    sync.Mutex
	value T
}

func (o *outcome[T]) of(value T, err error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.value = value
	return err
}

func (o *outcome[T]) get() T {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.value
}

func TestLeaseReleasedIsTakenAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		first, stop := context.WithCancel(t.Context())
		var order []string
		var group sync.WaitGroup
		group.Go(func() {
			_ = store.NewLease(m, "k", "first", store.LeaseOptions{}).Run(first, func(ctx context.Context, g store.Grant) {
				order = append(order, "first")
				<-ctx.Done()
				// Finishing takes longer than TTL: the lease is kept until it is done.
				time.Sleep(time.Minute)
				if g.Remaining() <= 0 {
					t.Error("the lease ran out while work was finishing")
				}
				order = append(order, "first done")
			})
		})
		time.Sleep(time.Minute)
		second, stopSecond := context.WithCancel(t.Context())
		var began time.Time
		group.Go(func() {
			_ = store.NewLease(m, "k", "second", store.LeaseOptions{}).Run(second, func(ctx context.Context, g store.Grant) {
				order = append(order, "second")
				began = time.Now()
				<-ctx.Done()
			})
		})
		time.Sleep(time.Minute)
		stop()
		released := time.Now().Add(time.Minute)
		time.Sleep(2 * time.Minute)
		stopSecond()
		group.Wait()
		if got := strings.Join(order, ", "); got != "first, first done, second" {
			t.Errorf("the order was %s", got)
		}
		if delay := began.Sub(released); delay < 0 || delay > time.Second {
			t.Errorf("taken over %v after the release", delay)
		}
		if len(m.entries) != 0 {
			t.Errorf("left behind: %v", m.entries)
		}
	})
}

func TestLeaseOfACrashedHolderIsTakenAfterTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.revision = 1
		m.entries["k"] = store.Entry{Key: "k", Value: "crashed 1 X", Revision: 1}
		start := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		_ = store.NewLease(m, "k", "heir", store.LeaseOptions{}).Run(ctx, func(context.Context, store.Grant) { stop() })
		if waited := time.Since(start); waited < 8*time.Second || waited > 9*time.Second {
			t.Errorf("taken over after %v, want 8 s", waited)
		}
	})
}

// Also when the reading comes and goes while a contender counts.
func TestLeaseContenderCountsThroughFailedReadings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.revision = 1
		m.entries["k"] = store.Entry{Key: "k", Value: "crashed 1 X", Revision: 1}
		calls := 0
		flaky := seenBy{m, func(_ context.Context, write bool, apply func() error) error {
			if calls++; !write && calls%2 == 0 {
				return store.ErrUnavailable
			}
			return apply()
		}}
		start := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		_ = store.NewLease(flaky, "k", "heir", store.LeaseOptions{}).Run(ctx, func(context.Context, store.Grant) { stop() })
		if waited := time.Since(start); waited < 8*time.Second || waited > 10*time.Second {
			t.Errorf("taken over after %v, want 8 s", waited)
		}
	})
}

func TestLeaseFromBeforeAnExclusiveOpenIsNobodys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		m.revision, m.openedAt = 7, 7
		m.entries["k"] = store.Entry{Key: "k", Value: "my last life 1 X", Revision: 7}
		start := time.Now()
		ctx, stop := context.WithCancel(t.Context())
		_ = store.NewLease(m, "k", "me", store.LeaseOptions{}).Run(ctx, func(context.Context, store.Grant) { stop() })
		if waited := time.Since(start); waited != 0 {
			t.Errorf("waited %v for a process that is gone", waited)
		}
	})
}

func TestLeaseEndsWithoutTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		var away atomic.Bool
		s := seenBy{m, func(ctx context.Context, _ bool, apply func() error) error {
			if away.Load() {
				<-ctx.Done() // packets go nowhere
				return store.ErrUnavailable
			}
			return apply()
		}}
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		times := make(chan time.Duration, 1)
		var group sync.WaitGroup
		var grants atomic.Int32
		group.Go(func() {
			_ = store.NewLease(s, "k", "holder", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
				if grants.Add(1) > 1 {
					<-ctx.Done()
					return
				}
				time.Sleep(time.Minute)
				away.Store(true)
				left := g.Remaining()
				start := time.Now()
				<-ctx.Done()
				times <- time.Since(start) - left
			})
		})
		if off := <-times; off < 0 || off > time.Millisecond {
			t.Errorf("the context ended %v after what Remaining had said", off)
		}
		away.Store(false)
		time.Sleep(time.Minute)
		if grants.Load() != 2 {
			t.Errorf("%d grants, want a second one when the store is back", grants.Load())
		}
		stop()
		group.Wait()
	})
}

func TestLeaseSurvivesAnAnswerThatWasLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		writes := 0
		s := seenBy{m, func(ctx context.Context, write bool, apply func() error) error {
			err := apply()
			if write {
				if writes++; writes%2 == 0 { // applied, but the answer is lost
					<-ctx.Done()
					return ctx.Err()
				}
			}
			return err
		}}
		ctx, stop := context.WithTimeout(t.Context(), 10*time.Minute)
		defer stop()
		grants := 0
		_ = store.NewLease(s, "k", "holder", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
			grants++
			<-ctx.Done()
		})
		if grants != 1 {
			t.Errorf("the lease was granted %d times, want it kept throughout", grants)
		}
	})
}

// A renewal that was given up takes effect just before the next one arrives, which then meets a revision that is its own.
func TestLeaseSurvivesItsOwnLateRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		writes := 0
		var late func() error
		s := seenBy{m, func(ctx context.Context, write bool, apply func() error) error {
			if !write {
				return apply()
			}
			switch writes++; writes {
			case 2:
				late = apply
				<-ctx.Done()
				return ctx.Err()
			case 3:
				if err := late(); err != nil {
					t.Errorf("the late renewal: %v", err)
				}
			}
			return apply()
		}}
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		defer stop()
		grants := 0
		_ = store.NewLease(s, "k", "holder", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
			grants++
			<-ctx.Done()
		})
		if grants != 1 || writes < 10 {
			t.Errorf("the lease was granted %d times with %d writes, want it kept throughout", grants, writes)
		}
	})
}

func TestLeaseIsLostToWhoeverWroteTheKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		ctx, stop := context.WithCancel(t.Context())
		_ = store.NewLease(m, "k", "holder", store.LeaseOptions{}).Run(ctx, func(working context.Context, g store.Grant) {
			m.mu.Lock()
			m.revision++
			m.entries["k"] = store.Entry{Key: "k", Value: "usurper", Revision: m.revision}
			m.mu.Unlock()
			start := time.Now()
			<-working.Done()
			if took := time.Since(start); took > 3*time.Second {
				t.Errorf("noticed after %v, want the next renewal", took)
			}
			stop()
		})
		if m.entries["k"].Value != "usurper" {
			t.Errorf("the end of a lost lease touched another's key: %v", m.entries["k"])
		}
	})
}

// A process whose calls all stop for a while and then go on (SIGSTOP, a paused machine) must not believe in a lease
// that another took meanwhile, and a call that it had sent must not take it back.
func TestLeaseFrozenHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		var frozen atomic.Bool
		thaw := make(chan struct{})
		s := seenBy{m, func(_ context.Context, _ bool, apply func() error) error {
			if frozen.Load() {
				<-thaw
			}
			return apply()
		}}
		ctx, stop := context.WithCancel(t.Context())
		var group sync.WaitGroup
		var grant atomic.Pointer[store.Grant]
		var held atomic.Int32
		group.Go(func() {
			_ = store.NewLease(s, "k", "frozen", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
				held.Add(1)
				grant.CompareAndSwap(nil, &g)
				<-ctx.Done()
			})
		})
		time.Sleep(time.Minute)
		frozen.Store(true)
		var heir atomic.Pointer[store.Grant]
		group.Go(func() {
			_ = store.NewLease(m, "k", "heir", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
				if left := grant.Load().Remaining(); left > 0 {
					t.Errorf("taken over while the holder had %v left", left)
				}
				heir.Store(&g)
				<-ctx.Done()
			})
		})
		time.Sleep(time.Minute)
		close(thaw)
		frozen.Store(false)
		time.Sleep(time.Minute)
		if held.Load() != 1 || heir.Load() == nil || heir.Load().Remaining() <= 0 {
			t.Errorf("after the thaw: held %d times by the frozen one; the heir: %v", held.Load(), heir.Load())
		}
		if heir.Load().Token() <= grant.Load().Token() {
			t.Errorf("the heir's token %d is not above %d", heir.Load().Token(), grant.Load().Token())
		}
		stop()
		group.Wait()
	})
}

// TestLeaseNeverTwice runs contenders on a store that is slow, loses calls and answers, and lets calls arrive after
// their callers gave up. At no instant may two believe in the lease, and it must not stay without a holder.
func TestLeaseNeverTwice(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			m := newMemory()
			ctx, stop := context.WithCancel(t.Context())
			var (
				mu      sync.Mutex
				holders = map[string]store.Grant{}
				last    uint64
				turns   int
			)
			random := rand.New(rand.NewPCG(seed, 7))
			var randomly sync.Mutex
			roll := func(n int) int {
				randomly.Lock()
				defer randomly.Unlock()
				return random.IntN(n)
			}
			var group, late sync.WaitGroup
			for i := range 3 {
				name := fmt.Sprintf("holder-%d", i)
				s := seenBy{m, func(ctx context.Context, write bool, apply func() error) error {
					delay := time.Duration(roll(300)) * time.Millisecond
					if roll(5) == 0 {
						delay *= 3
					}
					switch roll(10) {
					case 0: // the call is lost
						<-ctx.Done()
						return store.ErrUnavailable
					case 1: // it takes effect, perhaps long after its caller gave up
						long := delay * 40
						late.Go(func() { time.Sleep(long); _ = apply() })
						<-ctx.Done()
						return store.ErrUnavailable
					case 2:
						return store.ErrUnavailable
					}
					time.Sleep(delay)
					err := apply()
					time.Sleep(delay)
					return err
				}}
				group.Go(func() {
					// Hardly a margin: all clocks run alike here, so that the reasoning must hold without one.
					lease := store.NewLease(s, "k", name, store.LeaseOptions{Margin: time.Millisecond})
					for ctx.Err() == nil {
						// Orderly ends and crashes take turns: a crash is a contender that is never heard of again.
						work, end := context.WithTimeout(ctx, time.Duration(10+roll(60))*time.Second)
						_ = lease.Run(work, func(ctx context.Context, g store.Grant) {
							mu.Lock()
							turns++
							if _, twice := holders[name]; twice {
								t.Errorf("seed %d: %s works twice at once", seed, name)
							}
							if g.Token() <= last {
								t.Errorf("seed %d: token %d after %d", seed, g.Token(), last)
							}
							last = g.Token()
							for other, grant := range holders {
								if grant.Remaining() > 0 {
									t.Errorf("seed %d: %s holds beside %s, which has %v left", seed, name, other, grant.Remaining())
								}
							}
							holders[name] = g
							mu.Unlock()
							<-ctx.Done()
							time.Sleep(time.Duration(roll(5000)) * time.Millisecond)
							mu.Lock()
							delete(holders, name)
							mu.Unlock()
						})
						end()
					}
				})
			}
			time.Sleep(10 * time.Minute)
			stop()
			group.Wait()
			late.Wait()
			if turns < 10 {
				t.Errorf("seed %d: only %d turns in ten minutes", seed, turns)
			}
		})
	}
}

func TestLeaseCountsFromBeforeTheRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := newMemory()
		s := seenBy{m, func(_ context.Context, write bool, apply func() error) error {
			if write {
				time.Sleep(time.Second)
			}
			return apply()
		}}
		ctx, stop := context.WithCancel(t.Context())
		_ = store.NewLease(s, "k", "slow", store.LeaseOptions{}).Run(ctx, func(ctx context.Context, g store.Grant) {
			if got, want := g.Remaining(), 8*time.Second-500*time.Millisecond-time.Second; got != want {
				t.Errorf("Remaining is %v, want %v", got, want)
			}
			for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
				if got, most := g.Remaining(), 8*time.Second-500*time.Millisecond-time.Second; got > most || got <= 0 {
					t.Errorf("Remaining is %v among renewals, want above 0 and at most %v", got, most)
					break
				}
			}
			stop()
		})
	})
}

// TestLeaseTellsWhy: a contender that cannot read or write the key says so, once for each reason, and goes on trying.
func TestLeaseTellsWhy(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var told []string
		denied, away := errors.New("permission denied"), errors.New("no route to the store")
		began := time.Now()
		s := seenBy{newMemory(), func(_ context.Context, write bool, apply func() error) error {
			switch passed := time.Since(began); {
			case passed < 10*time.Second && write:
				return denied
			case passed >= 10*time.Second && passed < 20*time.Second:
				return away
			}
			return apply()
		}}
		lease := store.NewLease(s, "lease", "one", store.LeaseOptions{Failed: func(err error) { told = append(told, err.Error()) }})
		ctx, cancel := context.WithCancel(t.Context())
		held := false
		_ = lease.Run(ctx, func(context.Context, store.Grant) { held = true; cancel() }) // it returns ctx's error
		if !held || len(told) != 2 || !strings.Contains(told[0], denied.Error()) || !strings.Contains(told[1], away.Error()) {
			t.Errorf("held %v, told %q", held, told)
		}
	})
}
