package topology

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"portolan/store"
)

// rampTick is the time between two looks at ramps, and so the least between two steps of one: a step is an edit of the topology, of
// which every DNS server makes its answers anew.
const rampTick = time.Second

// RamperOptions are the settings of a Ramper.
type RamperOptions struct {
	// Holder names this process in the lease: unique among all, new at every start.
	Holder string
	// Logger may be nil.
	Logger *zap.Logger
	// Lease are the intervals of the lease, the same for all processes; zero for the usual ones.
	Lease store.LeaseOptions
}

// Ramper carries out the ramps of weights, in one process of all that run one: the one with the lease, which there is only while there
// are ramps. To the others a step is an edit like any other. Which weight it is the time for, the owner's clock says, held against what
// is stored; so an owner that takes over goes on where the line is by then, and never back: Ramp.Step takes no account of a time before
// the last step. Nor would two that both take themselves for the owner do harm, since steps are made by check-and-set.
type Ramper struct {
	store   store.Store
	keeper  *Keeper
	editor  *Editor
	options RamperOptions
	log     *zap.Logger
}

// NewRamper makes a Ramper of the store that keeper and editor are of, which must be the same. Run starts it.
func NewRamper(s store.Store, keeper *Keeper, editor *Editor, o RamperOptions) *Ramper {
	r := &Ramper{store: s, keeper: keeper, editor: editor, options: o, log: o.Logger}
	if r.log == nil {
		r.log = zap.NewNop()
	}
	return r
}

// Run carries out ramps, whenever there are any and the lease is had, until ctx is done, and returns its error.
func (r *Ramper) Run(ctx context.Context) error {
	lease := r.options.Lease
	lease.Failed = func(err error) {
		r.log.Warn("the lease for ramps of weights cannot be had; trying again", zap.Error(err))
	}
	var contending sync.WaitGroup
	var stop context.CancelFunc // nil while there is nothing to contend for
	rest := func() {
		if stop != nil {
			stop()
			contending.Wait()
			stop = nil
		}
	}
	defer rest()
	return r.keeper.Watch(ctx, func(s *Snapshot) {
		switch {
		case len(s.Ramps)+len(s.overtaken) == 0:
			rest()
		case stop == nil:
			var working context.Context
			working, stop = context.WithCancel(ctx)
			contending.Go(func() {
				_ = store.NewLease(r.store, rampsLease, r.options.Holder, lease).Run(working, r.own) // its error is that of working
			})
		}
	})
}

// own makes the steps while the lease is held.
func (r *Ramper) own(ctx context.Context, _ store.Grant) {
	r.log.Info("the ramps of weights are carried out here")
	tick := time.NewTicker(rampTick)
	defer tick.Stop()
	for {
		if s := r.keeper.Snapshot(); s.rampsDue(r.editor.options.Now()) {
			r.step(ctx)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// rampsDue is whether there is something to do about ramps.
func (s *Snapshot) rampsDue(now time.Time) bool {
	for _, r := range s.Ramps {
		if r.At(now) != r.From {
			return true
		}
	}
	return len(s.overtaken) > 0
}

func (r *Ramper) step(ctx context.Context) {
	bounded, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	done, overtaken, err := r.editor.stepRamps(bounded)
	if err != nil {
		if ctx.Err() == nil {
			r.log.Warn("ramps of weights stand still; trying again", zap.Error(err))
		}
		return
	}
	for _, ramp := range done {
		r.log.Info("a ramp came to its end", zap.String("registry", ramp.Registry), zap.String("region", ramp.Region), zap.Int("weight", ramp.To))
	}
	for _, ramp := range overtaken {
		r.log.Info("a ramp was ended by an edit of the weight or of routing", zap.String("registry", ramp.Registry), zap.String("region", ramp.Region), zap.Stringer("ramp", ramp))
	}
}
