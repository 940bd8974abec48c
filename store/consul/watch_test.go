package consul

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"portolan/store"
)

// TestWatchJudges goes through readings that a Consul gives, in good times and in bad.
func TestWatchJudges(t *testing.T) {
	t.Parallel()
	away := errors.New("away")
	type answer struct {
		keys  int // how many keys there are, each with the index as revision
		index uint64
		err   error
	}
	keys := func(n int, index uint64) answer { return answer{n, index, nil} }
	type step struct {
		asked  uint64   // the index that is waited beyond
		gives  []answer // the second one is for the confirmation of emptiness
		keys   int      // of the tree that is delivered
		silent bool     // nothing is delivered
		failed bool
	}
	for name, steps := range map[string][]step{
		"changes": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(2, 11)}, keys: 2},
			{asked: 11, gives: []answer{keys(2, 11)}, silent: true}, // the wait was over
			{asked: 11, gives: []answer{keys(1, 12)}, keys: 1},
		},
		"an error keeps the tree": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{{err: away}}, keys: 1, failed: true},
			{asked: 0, gives: []answer{{err: away}}, silent: true, failed: true},
			{asked: 0, gives: []answer{{err: fmt.Errorf("another way: %w", away)}}, keys: 1, failed: true},
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(3, 20)}, keys: 3},
		},
		"an error at first": {
			{asked: 0, gives: []answer{{err: away}}, keys: 0, failed: true},
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
		},
		"nothing at first": {
			{asked: 0, gives: []answer{keys(0, 5), keys(0, 5)}, keys: 0},
			{asked: 5, gives: []answer{keys(0, 6)}, silent: true},
			{asked: 6, gives: []answer{keys(1, 7)}, keys: 1},
		},
		"nothing at first, unconfirmed": {
			{asked: 0, gives: []answer{keys(0, 5), {err: away}}, keys: 0, failed: true},
			{asked: 0, gives: []answer{keys(0, 5), keys(1, 6)}, keys: 1},
		},
		"deleted": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(0, 11), keys(0, 11)}, keys: 0},
			{asked: 11, gives: []answer{keys(0, 12)}, silent: true},
		},
		"emptiness that the second reading denies": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(0, 11), keys(1, 10)}, silent: true},
		},
		"emptiness that cannot be confirmed": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(0, 11), {err: away}}, keys: 1, failed: true},
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
		},
		"the index goes back with keys": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(2, 3)}, keys: 2},
			{asked: 3, gives: []answer{keys(0, 4), keys(0, 4)}, keys: 0},
		},
		"the index goes back without keys": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{keys(0, 3), keys(0, 3)}, keys: 1, failed: true},
			{asked: 0, gives: []answer{keys(0, 4), keys(0, 4)}, silent: true, failed: true},
			{asked: 0, gives: []answer{keys(0, 99), keys(0, 99)}, silent: true, failed: true}, // time does not make it true
			{asked: 0, gives: []answer{keys(1, 100)}, keys: 1},
			{asked: 100, gives: []answer{keys(0, 101), keys(0, 101)}, keys: 0},
		},
		"lost while away": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{{err: away}}, keys: 1, failed: true},
			{asked: 0, gives: []answer{keys(0, 3), keys(0, 3)}, keys: 1, failed: true},
		},
		"deleted while away": {
			{asked: 0, gives: []answer{keys(1, 10)}, keys: 1},
			{asked: 10, gives: []answer{{err: away}}, keys: 1, failed: true},
			{asked: 0, gives: []answer{keys(0, 30), keys(0, 30)}, keys: 0},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := New(&Client{prefix: "p"})
			var now step
			var asked []uint64
			w := watch{tree: s.tree, read: func(_ context.Context, index uint64) (Reading, error) {
				asked = append(asked, index)
				a := now.gives[len(asked)-1]
				r := Reading{Index: a.index}
				for i := range a.keys {
					r.Pairs = append(r.Pairs, Pair{Key: fmt.Sprintf("p/k%d", i), Revision: a.index})
				}
				return r, a.err
			}}
			var last store.Update
			for i, step := range steps {
				now, asked = step, nil
				update, changed, err := w.next(t.Context())
				if len(asked) != len(step.gives) || asked[0] != step.asked || (len(asked) > 1 && asked[1] != 0) {
					t.Errorf("step %d asked beyond %v, want %d", i, asked, step.asked)
				}
				if (err != nil) != step.failed || (update.Err != nil) != step.failed {
					t.Errorf("step %d: %v, want an error: %v", i, err, step.failed)
				}
				if changed == step.silent {
					t.Errorf("step %d delivers: %v, want %v", i, changed, !step.silent)
				}
				if changed && len(update.Tree.Entries) != step.keys {
					t.Errorf("step %d delivers %d keys, want %d", i, len(update.Tree.Entries), step.keys)
				}
				if update.Tree.Revision < last.Tree.Revision {
					t.Errorf("step %d: revision %d after %d", i, update.Tree.Revision, last.Tree.Revision)
				}
				last = update
			}
		})
	}
}
