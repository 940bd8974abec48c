package replicator

import (
	"context"
	"encoding/json"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/store"
	"portolan/topology"
)

// retract removes a request that was carried out, and tries until it can: one that stands is carried out again by whoever works for the
// replica next, and what was accepted once would let pass what the guard holds then.
func (r *replica) retract(ctx context.Context, verb string) {
	removing := complaint{log: r.log.With(zap.String("request", verb))}
	for {
		_, err := r.of.options.Store.Commit(ctx, store.Delete(topology.RequestKey(r.of.name, r.config.Region, verb)))
		if err == nil || ctx.Err() != nil {
			return
		}
		removing.of("a request that was carried out could not be removed; trying again", err)
		sleep(ctx, time.Second)
	}
}

// obey carries out what operators ask.
func (r *replica) obey(ctx context.Context) error {
	requests := make(chan map[string]topology.Request, 1)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return r.of.options.Store.Watch(ctx, r.requestsPrefix(), func(u store.Update) {
			if u.Err != nil {
				return
			}
			select {
			case <-requests:
			default:
			}
			requests <- r.requests(u.Tree)
		})
	})
	g.Go(func() error {
		for {
			select {
			case asked := <-requests:
				if err := r.carryOut(ctx, asked); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	return g.Wait()
}

func (r *replica) requestsPrefix() string {
	return strings.TrimSuffix(topology.RequestKey(r.of.name, r.config.Region, "x"), "x")
}

// requests reads what operators ask of the replica, by the verb.
func (r *replica) requests(tree store.Tree) map[string]topology.Request {
	asked := make(map[string]topology.Request)
	for _, e := range tree.Entries {
		var request topology.Request
		if err := json.Unmarshal([]byte(e.Value), &request); err != nil {
			r.log.Warn("a request is not understood", zap.String("key", e.Key), zap.Error(err))
			continue
		}
		asked[strings.TrimPrefix(e.Key, r.requestsPrefix())] = request
	}
	return asked
}

func (r *replica) carryOut(ctx context.Context, asked map[string]topology.Request) error {
	if request, ok := asked[topology.RequestDelete]; ok {
		return r.leave(ctx, request)
	}
	r.mu.Lock()
	r.leaving = "" // what that was asked of was another replica of the name
	r.mu.Unlock()
	return r.compareOrAccept(ctx, asked)
}

// compareOrAccept carries out what operators ask about the replica's content. A new baseline ends the work under way: errResync.
func (r *replica) compareOrAccept(ctx context.Context, asked map[string]topology.Request) error {
	if request, ok := asked[topology.RequestResync]; ok {
		r.log.Info("a new baseline was asked for", zap.String("by", request.Actor))
		if !r.of.config.Policy.Replication {
			r.retract(ctx, topology.RequestResync)
			return nil
		}
		if remote := r.remote.Load(); remote != nil {
			remote.target.Forget()
		}
		if err := r.save(ctx, func(s *topology.Replication) { *s = r.unknown(*s, "a new baseline was asked for") }); err != nil {
			return err
		}
		r.mu.Lock()
		r.accepted = ""
		r.mu.Unlock()
		r.startOver(errResync) // and then the request is retracted: nothing may be made of what was found before
		return errResync
	}
	if request, ok := asked[topology.RequestAccept]; ok {
		r.mu.Lock()
		before := r.accepted
		r.accepted = r.matter()
		accepted := r.accepted
		r.mu.Unlock()
		if accepted == "" || !r.of.config.Policy.Replication {
			r.retract(ctx, topology.RequestAccept) // there is nothing to accept
			return nil
		}
		if before != accepted {
			r.log.Info("accepted", zap.String("by", request.Actor))
			r.lookNow()
		}
	}
	return nil
}

// matter is what an operator can accept at the moment: what the guard holds, or the baseline's plan (before it is there, too, as 'replica
// create --accept' asks); empty if there is nothing. The caller holds mu.
func (r *replica) matter() string {
	switch {
	case r.state.Held != "":
		return r.state.Incarnation + ": " + r.state.Held
	case !decided(r.state):
		return "the plan"
	}
	return ""
}

// isAccepted reports whether an operator accepted what waits for that now.
func (r *replica) isAccepted() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.accepted != "" && r.accepted == r.matter()
}

// settleAcceptance ends an acceptance of what does not wait any more: it was carried out, or something else happened. Left standing, it
// would let the next wipe pass the guard.
func (r *replica) settleAcceptance(ctx context.Context) {
	r.mu.Lock()
	matter := r.matter()
	over := r.accepted != "" && r.accepted != matter
	if over {
		r.accepted = ""
	}
	r.mu.Unlock()
	if !over {
		return
	}
	if matter != "" {
		r.log.Warn("what was accepted is not what waits by now: that is to be accepted anew")
	}
	r.retract(ctx, topology.RequestAccept)
}
