// Package latest holds the newest value of something that changes, and lets others follow it.
//
// It is how one part of the house hears of another: the writer stores immutable snapshots, readers load the newest
// without a lock, watchers are called with the newest whenever it changed and never fall behind by more than one call.
package latest

import (
	"context"
	"sync"
	"sync/atomic"
)

// Value holds the newest T. The zero Value is empty and ready to use. A stored value must not be modified.
type Value[T any] struct {
	current atomic.Pointer[T]
	mu      sync.Mutex
	changed chan struct{} // closed at the next Store; made when somebody waits
}

// Load returns the newest value, or nil if none was stored yet.
func (v *Value[T]) Load() *T { return v.current.Load() }

// Store makes t the newest value and wakes the watchers.
func (v *Value[T]) Store(t *T) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.current.Store(t)
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

// Wait returns the newest value that is not seen, waiting for one if need be, or the error of ctx.
func (v *Value[T]) Wait(ctx context.Context, seen *T) (*T, error) {
	for {
		v.mu.Lock()
		t := v.current.Load()
		if t != nil && t != seen {
			v.mu.Unlock()
			return t, nil
		}
		if v.changed == nil {
			v.changed = make(chan struct{})
		}
		changed := v.changed
		v.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// Watch calls deliver, from the calling goroutine, with the newest value: at once if there is one, and after every
// change; changes that come while deliver runs are delivered as one. It returns when ctx is done, with its error.
func (v *Value[T]) Watch(ctx context.Context, deliver func(*T)) error {
	var seen *T
	for {
		t, err := v.Wait(ctx, seen)
		if err != nil {
			return err
		}
		seen = t
		deliver(t)
	}
}
