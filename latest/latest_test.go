package latest

import (
	"context"
	"testing"
	"testing/synctest"
)

func TestWatchDeliversTheFinalValue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var v Value[int]
		ctx, cancel := context.WithCancel(t.Context())
		last, calls := 0, 0
		done := make(chan error)
		go func() { done <- v.Watch(ctx, func(n *int) { last = *n; calls++ }) }()
		synctest.Wait()
		if calls != 0 {
			t.Fatalf("delivered %d times before anything was stored", calls)
		}
		for i := range 1000 {
			v.Store(&i)
		}
		synctest.Wait()
		if last != 999 {
			t.Fatalf("the watcher saw %d last, want 999", last)
		}
		if got := *v.Load(); got != 999 {
			t.Fatalf("Load gives %d, want 999", got)
		}
		cancel()
		if err := <-done; err != context.Canceled {
			t.Fatalf("Watch ended with %v, want context.Canceled", err)
		}
	})
}

func TestWaitReturnsAtOnceForAnUnseenValue(t *testing.T) {
	var v Value[string]
	s := "x"
	v.Store(&s)
	got, err := v.Wait(t.Context(), nil)
	if err != nil || got != &s {
		t.Fatalf("Wait = %v, %v", got, err)
	}
}
