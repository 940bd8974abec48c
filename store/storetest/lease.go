package storetest

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"portolan/store"
)

// testLeaseTakesTurns lets several contenders hold a lease again and again: never two at once, every one in the end,
// with tokens that grow.
func testLeaseTakesTurns(t *testing.T, s store.Store) {
	const contenders = 3
	ctx, cancel := context.WithCancel(deadline(t))
	defer cancel()
	var (
		holding atomic.Int32
		mu      sync.Mutex
		turns   = map[int]int{}
		last    uint64
	)
	var group sync.WaitGroup
	for i := range contenders {
		// The renewal interval is also the deadline of each call and the pause after a turn: long enough for a slow machine.
		// Looking often makes short turns all the same.
		lease := store.NewLease(s, "leases/turns", fmt.Sprintf("contender-%d", i), store.LeaseOptions{
			Renew: 2 * time.Second, TTL: 10 * time.Second, Poll: 50 * time.Millisecond,
		})
		group.Go(func() {
			_ = lease.Run(ctx, func(ctx context.Context, g store.Grant) {
				if n := holding.Add(1); n != 1 {
					t.Errorf("%d hold the lease at once", n)
				}
				defer holding.Add(-1)
				if g.Remaining() <= 0 {
					t.Error("a lease just granted has no time left")
				}
				mu.Lock()
				defer mu.Unlock()
				if g.Token() <= last {
					t.Errorf("token %d after token %d", g.Token(), last)
				}
				last = g.Token()
				turns[i]++
				if len(turns) == contenders && turns[i] > 1 {
					cancel()
				}
			})
		})
	}
	group.Wait()
	if len(turns) != contenders {
		t.Errorf("turns by contender: %v, want each of %d", turns, contenders)
	}
}
