package replicator

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/store"
	"portolan/topology"
)

// replica is one replica as this process works for it: it hears its events, and, while it holds the lease, baselines and
// scans it, and writes to it.
type replica struct {
	of     *registry
	config *topology.Replica
	queue  *queue
	log    *zap.Logger
	// budget is how many requests a second scans may make.
	budget *rate.Limiter
	// look asks for a scan before its time.
	look chan struct{}
	// lease is how long this process may still write to the replica; nil: it may not.
	lease atomic.Pointer[store.Grant]
	// missing is whether the state was not in the store when its states were last read, which may be no news.
	missing atomic.Bool
	// remote speaks to the registry; nil until what it needs (a CA, a client certificate) could be read. opened is closed then.
	remote atomic.Pointer[remote]
	opened chan struct{}

	// saving is held while the state is changed and stored.
	saving sync.Mutex

	mu       sync.Mutex
	state    topology.Replication
	revision uint64          // of the state in the store; zero: it is not there
	former   version.Replica // what stood at the endpoint before, as long as others may believe that it still does
	reading  trouble
	writing  trouble
	storing  trouble                // of the ledger, or the store: what is found out, or done, cannot be written down
	doubted  time.Time              // since when the guard would hold the replica; zero: it would not
	accepted string                 // what an operator accepts, as matter has it; empty: nothing
	scanning time.Time              // when the newest scan began
	leaving  string                 // what a delete waits for
	unheard  map[ledger.Key]misread // what events told of and cannot be looked at
	unread   map[ledger.Key]misread // what the last look at it could not read
	worked   time.Time              // when something was last brought to it
	restart  context.CancelCauseFunc
}

func newReplica(of *registry, config *topology.Replica, known stored) *replica {
	return &replica{of: of, state: known.Replication, revision: known.revision, config: config, queue: newQueue(time.Now), log: of.log.With(zap.String("region", config.Region)),
		look: make(chan struct{}, 1), opened: make(chan struct{}),
		budget: rate.NewLimiter(rate.Limit(of.options.RequestsPerSecond), max(1, int(of.options.RequestsPerSecond)))}
}

// member returns the replica as the fleet has it, or nil while it has no incarnation.
func (r *replica) member() *member { return r.of.fleet().member(r.current().Incarnation) }

// remaining is how long the lease certainly lasts.
func (r *replica) remaining() time.Duration {
	if g := r.lease.Load(); g != nil {
		return g.Remaining()
	}
	return 0
}

// run works for the replica until ctx is done.
func (r *replica) run(ctx context.Context) error {
	defer func() {
		if remote := r.remote.Load(); remote != nil {
			remote.close()
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.open(ctx) })
	lease := store.NewLease(r.of.options.Store, topology.LeaseKey(r.of.name, r.config.Region), r.of.options.Holder, store.LeaseOptions{
		Failed: func(err error) {
			r.log.Warn("the lease for writes to the replica cannot be had; trying again", zap.Error(err))
		},
	})
	g.Go(func() error {
		return lease.Run(ctx, func(ctx context.Context, grant store.Grant) {
			r.lease.Store(&grant)
			defer r.lease.Store(nil)
			// Whoever has the lease next tells of the replica.
			defer r.of.metrics.forgetState(r.of.name, r.config.Region)
			for ctx.Err() == nil {
				err := r.lead(ctx)
				switch {
				case ctx.Err() != nil:
				case errors.Is(err, errResync):
					r.retract(ctx, topology.RequestResync)
				case errors.Is(err, errGone):
					r.awaitEnd(ctx) // the topology will tell; unless it was made again before anybody told
				case errors.Is(err, errRemoved):
					r.log.Warn("the replica's state was removed: unless the replica goes too, it is compared anew", zap.Duration("in", r.of.options.removedTime))
					r.awaitEnd(ctx)
				default:
					r.log.Warn("working for the replica failed; trying again", zap.Error(err))
					sleep(ctx, time.Second)
				}
			}
		})
	})
	if r.of.options.Spool != nil && r.of.config.Policy.Replication {
		g.Go(func() error { return r.hear(ctx) })
	}
	return g.Wait()
}

// openAgain is the time between two attempts to read what connections to the replica need.
const openAgain = 5 * time.Second

// open makes the replica's remote. What it needs may lie in files that come, or become right, later.
func (r *replica) open(ctx context.Context) error {
	for {
		remote, err := newRemote(r.config, r.of.options.UserAgent, newID, r.log)
		if err == nil {
			remote.target.Remember(r.of.uploads, strings.Join([]string{r.of.name, r.config.Region, r.config.Endpoint.String(), r.config.Access.Prefix}, " "))
			r.remote.Store(remote)
			r.of.muster()
			close(r.opened)
			return nil
		}
		r.log.Error("the replica cannot be used", zap.Error(err))
		r.fault(&r.reading, err)
		if !sleep(ctx, openAgain) {
			return ctx.Err()
		}
	}
}

// lead does what only the holder of the lease may do, until ctx is done or something has to begin anew.
func (r *replica) lead(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	r.mu.Lock()
	r.restart = cancel
	r.accepted = "" // the request stands in the store, unless another process carried it out
	r.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.obey(ctx) })
	if r.of.config.Policy.Replication {
		if err := r.identify(ctx); err != nil {
			cancel(err)
			return errors.Join(err, g.Wait())
		}
		for range r.of.options.Copies {
			g.Go(func() error { return r.work(ctx) })
		}
		g.Go(func() error { return r.keep(ctx) })
		g.Go(func() error { return r.report(ctx) })
	}
	err := g.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// sourcesOf orders the other members by their distance from m.
func sourcesOf(m *member, all []*member, distance func(a, b string) int) []*member {
	var sources []*member
	for _, s := range all {
		if s != m {
			sources = append(sources, s)
		}
	}
	slices.SortFunc(sources, func(a, b *member) int {
		if d := distance(m.Region, a.Region) - distance(m.Region, b.Region); d != 0 {
			return d
		}
		return strings.Compare(a.Region, b.Region)
	})
	return sources
}

// backoff doubles from first with every attempt, up to limit, with jitter.
func backoff(attempt int, first, limit time.Duration) time.Duration {
	return jitter(min(limit, first<<min(attempt, 20)))
}

// jitter spreads d over its upper half, so that what failed together does not come back together.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// sleep waits, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// counted is a number with its noun.
func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

func compareRegions(a, b *replica) int { return strings.Compare(a.config.Region, b.config.Region) }

// keyOf is the key of a tag, or of a digest.
func keyOf(registry, repository, reference string) ledger.Key {
	key := ledger.Key{Registry: registry, Repository: repository, Kind: ledger.Tag, Reference: reference}
	if digestLike(reference) {
		key.Kind = ledger.Manifest
	}
	return key
}

// CheckImage says what is wrong with the name of an image as Inspect takes it; nil if nothing is.
func CheckImage(registry, repository, reference string) error {
	return keyOf(registry, repository, reference).Check()
}

// digestLike reports whether a reference is a digest: tags have no colon.
func digestLike(reference string) bool { return strings.Contains(reference, ":") }
