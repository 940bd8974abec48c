package health

import (
	"cmp"
	"context"
	crand "crypto/rand"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	consul "github.com/hashicorp/consul/api"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"portolan/latest"
	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// Options are the settings of a Monitor. Zero fields take the defaults named.
type Options struct {
	// Interval is the time between two probes of an address, give or take a tenth; 5 s. A healthy address that failed is
	// asked again after a fifth of it.
	Interval time.Duration
	// Timeout is the time one probe of one address may take, over all client names; 2 s.
	Timeout time.Duration
	// CanaryInterval is the time between two readings of a replica's canary; 1 min.
	CanaryInterval time.Duration
	// Rise and Fall are how many results in a row change a state; 2 and 3. An address that fails again within 5 minutes after it
	// came back needs twice as many as Rise the next time, up to sixteen times; each 5 minutes for which it stands halve that.
	Rise, Fall int
	// CertificateWarning is how long before its end a certificate is warned of in the log; only when it is over if zero.
	CertificateWarning time.Duration
	// Concurrent bounds the probes at one time; 512.
	Concurrent int
	// StatePath is the file that keeps the verdicts for a warm start; empty for none.
	StatePath string
	// Fresh is how old a saved verdict may be to be believed; 60 s: a restart, but not an outage of this machine.
	Fresh time.Duration
	// Resolve looks up the addresses of host-name replicas; the system's resolver.
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	// Consul answers probes of the kind consul:<service>; nil: those stay Unknown.
	Consul *consul.Client
	// Votes is the store through which several servers vote; nil: this server's probes alone decide.
	Votes store.Store
	// Voter is what this server calls itself among them: no other may. It is needed with Votes.
	Voter      string
	Logger     *zap.Logger
	Registerer prometheus.Registerer
}

// maxProbes is how many probes there are at one time by default. A target has one at most: up to as many targets none waits for
// another. Where there are more, those that swallow what they are sent take 2 s in 7, and delay the others when 1792 do. It is
// for file descriptors that there is a bound.
const maxProbes = 512

func (o Options) withDefaults() Options {
	o.Interval = cmp.Or(o.Interval, 5*time.Second)
	o.Timeout = cmp.Or(o.Timeout, 2*time.Second)
	o.CanaryInterval = cmp.Or(o.CanaryInterval, time.Minute)
	o.Rise = cmp.Or(o.Rise, 2)
	o.Fall = cmp.Or(o.Fall, 3)
	o.Concurrent = cmp.Or(o.Concurrent, maxProbes)
	o.Fresh = cmp.Or(o.Fresh, time.Minute)
	if o.Resolve == nil {
		o.Resolve = func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		}
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	return o
}

// Monitor probes the replicas of a topology. Its methods may be called from any goroutine; Run only once.
type Monitor struct {
	options   Options
	log       *zap.Logger
	metrics   *metrics
	probe     func(context.Context, *target) Result
	write     func(path string, list []saved) error
	slots     chan struct{}
	published latest.Value[Verdicts]
	dirty     chan struct{}  // holds one token while something is to be published
	unsaved   chan struct{}  // holds one token while something is to be saved
	changed   chan struct{}  // holds one token while there may be something new to vote
	begun     chan struct{}  // closed when the first topology is being probed
	instance  string         // tells this process from others that vote under its name
	probing   sync.WaitGroup // the probes under way, those that were given up among them

	mu       sync.Mutex
	snapshot *topology.Snapshot
	watched  map[key]*watched
	saved    map[savedKey]machine // at the start only
	waiting  chan struct{}        // closed at the next result; made when somebody waits
	// electorate is nil without votes.
	electorate *electorate
}

// watched is one target with its state. All but target is guarded by Monitor.mu.
type watched struct {
	target  *target
	machine machine
	last    Result
	stop    context.CancelFunc
	running chan struct{} // holds a token for each probe that has not ended; set once
}

// settled is whether w was asked and nothing speaks against its state. One that cannot be asked from here has none, and would
// otherwise keep the answers of its region short-lived for good: on a machine without IPv6, say.
func (w *watched) settled() bool {
	return w.machine.settled() || w.machine.health == router.Unknown && !w.last.Time.IsZero()
}

// NewMonitor makes a Monitor; Run starts it.
func NewMonitor(o Options) *Monitor {
	o = o.withDefaults()
	p := &prober{resolve: o.Resolve, consul: o.Consul}
	m := &Monitor{
		options: o,
		log:     o.Logger,
		metrics: newMetrics(o.Registerer),
		probe:   p.probe,
		write:   writeSaved,
		slots:   make(chan struct{}, o.Concurrent),
		dirty:   make(chan struct{}, 1),
		unsaved: make(chan struct{}, 1),
		changed: make(chan struct{}, 1),
		begun:   make(chan struct{}),
		watched: make(map[key]*watched),
	}
	if o.Votes != nil {
		m.instance = crand.Text()
		m.electorate = &electorate{name: o.Voter, instance: m.instance}
	}
	return m
}

// Verdicts returns what is known now, with the last results. Before the first topology it is empty.
func (m *Monitor) Verdicts() *Verdicts {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.verdicts()
}

// Watch calls deliver with the verdicts, at once if there are any and whenever they lead to other decisions; results that
// change nothing are not delivered. It returns when ctx is done, with its error.
func (m *Monitor) Watch(ctx context.Context, deliver func(*Verdicts)) error {
	return m.published.Watch(ctx, deliver)
}

// Warm waits until every replica has one result or a saved verdict that is fresh, at most one probe timeout after the first
// topology came. It fails only when ctx is done before.
func (m *Monitor) Warm(ctx context.Context) error {
	select {
	case <-m.begun:
	case <-ctx.Done():
		return fmt.Errorf("waiting for the first topology: %w", ctx.Err())
	}
	limit := time.NewTimer(m.options.Timeout)
	defer limit.Stop()
	for {
		m.mu.Lock()
		warm := m.warm()
		if m.waiting == nil {
			m.waiting = make(chan struct{})
		}
		waiting := m.waiting
		m.mu.Unlock()
		if warm {
			return nil
		}
		select {
		case <-waiting:
		case <-limit.C:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for the first probes: %w", ctx.Err())
		}
	}
}

// warm is whether every replica that is probed has a state or a result. The caller holds mu.
func (m *Monitor) warm() bool {
	known := make(map[router.ReplicaKey]bool, len(m.watched))
	for k, w := range m.watched {
		known[k.ReplicaKey] = known[k.ReplicaKey] || w.machine.health != router.Unknown || !w.last.Time.IsZero()
	}
	for _, k := range known {
		if !k {
			return false
		}
	}
	return true
}

// Run probes what source delivers until ctx is done, and returns when every probe has ended, or a second later if one heeds no
// deadline: nil after an orderly end.
func (m *Monitor) Run(ctx context.Context, source Source) error {
	if m.options.StatePath != "" {
		machines, err := readSaved(m.options.StatePath, m.options.Fresh, time.Now())
		if err != nil {
			// A bad file costs a cold start, nothing more.
			m.log.Warn("starting without saved verdicts", zap.Error(err))
		}
		m.saved = machines
	}
	own, cancel := context.WithCancel(ctx)
	var probes, others sync.WaitGroup
	others.Go(func() { m.publish(own) })
	others.Go(func() { m.keep(own) })
	if m.options.Votes != nil {
		others.Go(func() { m.hearVotes(own) })
		others.Go(func() { m.vote(own) })
	}
	err := source.Watch(ctx, func(s *topology.Snapshot) { m.apply(own, s, &probes) })
	cancel()
	probes.Wait()
	others.Wait()
	m.save()
	m.drain()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("watching the topology: %w", err)
}

// drain waits for the probes under way, grace at most: what waits for a file system that is gone cannot be ended.
func (m *Monitor) drain() {
	ended := make(chan struct{})
	go func() {
		m.probing.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(grace):
	}
}

// apply starts and stops probes so that s is what is probed. What is unchanged goes on undisturbed.
func (m *Monitor) apply(ctx context.Context, s *topology.Snapshot, probes *sync.WaitGroup) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.snapshot = s
	wanted := make(map[key]*target)
	replicas := make(map[router.ReplicaKey]bool)
	for _, t := range targets(s) {
		wanted[t.key] = t
		replicas[t.ReplicaKey] = true
	}
	for k, w := range m.watched {
		t, still := wanted[k]
		if still && t.equal(w.target) {
			delete(wanted, k)
			continue
		}
		w.stop()
		if still && t.mode == w.target.mode && t.place() == w.target.place() {
			// Asked otherwise, but the same place: what is known of it stands until new results speak against it.
			m.metrics.forgetNames(w.target, t.names)
			m.begin(ctx, t, w.machine, w.last, probes)
			delete(wanted, k)
			continue
		}
		delete(m.watched, k)
		m.metrics.forget(w.target)
		if !replicas[k.ReplicaKey] {
			m.metrics.forgetReplica(k.ReplicaKey)
		}
	}
	for _, t := range wanted {
		m.begin(ctx, t, m.saved[savedKey{t.Registry, t.Region, t.place()}], Result{}, probes)
	}
	m.saved = nil
	select {
	case <-m.begun:
	default:
		close(m.begun)
	}
	signal(m.changed)
	m.touch()
}

// begin starts the probes of t. The caller holds mu.
func (m *Monitor) begin(ctx context.Context, t *target, state machine, last Result, probes *sync.WaitGroup) {
	own, stop := context.WithCancel(ctx)
	w := &watched{target: t, machine: state, last: last, stop: stop, running: make(chan struct{}, maxRunning)}
	m.watched[t.key] = w
	m.metrics.state(t, state)
	probes.Go(func() {
		defer stop()
		m.follow(own, w)
	})
}

// follow probes one target again and again.
func (m *Monitor) follow(ctx context.Context, w *watched) {
	for {
		select {
		case m.slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		result := m.attempt(ctx, w)
		<-m.slots
		if ctx.Err() != nil {
			return // what was found when the target was withdrawn in mid-probe means nothing
		}
		pause := m.fold(w, result)
		// A tenth either way keeps probes of many addresses, and of many servers, from marching in step.
		pause += time.Duration((rand.Float64()*0.2 - 0.1) * float64(pause))
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

const (
	// grace is how long a probe may go on after its time, or the monitor's, is over before it is given up.
	grace = time.Second
	// maxRunning bounds the probes of one target that were given up and have not ended, with the one that is made now.
	maxRunning = 3
)

// attempt makes one probe. One that panics, or heeds no deadline (a certificate on a file system that is gone), is noticed, and
// neither ends nor holds up the loop: the next is made in its turn. What such a probe says of the replica is nothing. When ctx is
// done, since the target was withdrawn, nobody waits for what the probe finds, and no fault of it is told but a panic.
func (m *Monitor) attempt(ctx context.Context, w *watched) Result {
	began := time.Now()
	fault := func(kind, reason string, fields ...zap.Field) Result {
		// Under the lock: a target that was withdrawn must not come back as a series.
		m.mu.Lock()
		wanted := ctx.Err() == nil
		if wanted {
			m.metrics.fault(w.target, kind)
		}
		m.mu.Unlock()
		if wanted || kind == "panic" {
			m.log.Error("a probe failed on this side", append(fields, zap.String("registry", w.target.Registry), zap.String("region", w.target.Region),
				zap.String("address", w.target.label()), zap.String("reason", reason))...)
		}
		return Result{Time: began, Latency: time.Since(began), Outcome: Unable, Error: reason}
	}
	select {
	case w.running <- struct{}{}:
	default:
		return fault("hung", fmt.Sprintf("%d earlier probes have not ended", maxRunning))
	}
	one, cancel := context.WithTimeout(ctx, m.timeout(w.target))
	defer cancel()
	done := make(chan Result, 1)
	m.probing.Go(func() {
		defer func() { <-w.running }()
		defer func() {
			if p := recover(); p != nil {
				done <- fault("panic", fmt.Sprintf("a fault of the program: %v", p), zap.ByteString("stack", debug.Stack()))
			}
		}()
		done <- m.probe(one, w.target)
	})
	select {
	case r := <-done:
		return r
	case <-one.Done():
	}
	select {
	case r := <-done:
		return r
	case <-ctx.Done():
		return Result{}
	case <-time.After(grace):
		return fault("hung", "the probe did not end in its time")
	}
}

// fold takes one result in and returns the pause before the next probe.
func (m *Monitor) fold(w *watched, r Result) time.Duration {
	m.mu.Lock()
	before, last := w.machine, w.last
	w.machine = before.observe(r.Outcome, m.rules(w.target), time.Now())
	w.last = r
	after := w.machine
	if m.waiting != nil {
		close(m.waiting)
		m.waiting = nil
	}
	// Under the lock: a target that was withdrawn must not come back as a series.
	if m.watched[w.target.key] == w {
		m.metrics.record(w.target, r, after)
	}
	m.touch()
	m.mu.Unlock()
	fields := []zap.Field{
		zap.String("registry", w.target.Registry), zap.String("region", w.target.Region),
		zap.String("address", w.target.label()), zap.Duration("latency", r.Latency),
	}
	if r.Outcome == Unable && (last.Time.IsZero() || last.Outcome != Unable) {
		m.log.Warn("address cannot be probed from here: its health stays as it was, for a while", append(fields, zap.String("reason", r.Error))...)
	}
	for _, c := range endingSince(last, r, m.options.CertificateWarning) {
		m.log.Warn("certificate is about to end", append(fields, zap.String("name", c.Name), zap.Time("end", c.Expiry))...)
	}
	if before.health != after.health {
		signal(m.changed)
		switch after.health {
		case router.Healthy:
			m.log.Info("address is healthy", fields...)
		case router.Unhealthy:
			m.log.Warn("address is unhealthy", append(fields, zap.String("reason", r.Error), zap.Int("successes_needed", after.rise(m.options.Rise)))...)
		default:
			m.log.Warn("address could not be probed from here for too long: its health is not known any more",
				append(fields, zap.String("reason", r.Error), zap.Time("last", after.seen))...)
		}
	}
	return after.pause(m.interval(w.target))
}

// rules are what the state of t changes by.
func (m *Monitor) rules(t *target) rules {
	return rules{rise: m.options.Rise, fall: m.options.Fall, round: m.interval(t) + m.timeout(t)}
}

// interval is the time between two probes of t.
func (m *Monitor) interval(t *target) time.Duration {
	if t.canary {
		return m.options.CanaryInterval
	}
	return m.options.Interval
}

// timeout is how long one probe of t may take.
func (m *Monitor) timeout(t *target) time.Duration {
	if t.canary {
		return canaryTimeout
	}
	return m.options.Timeout
}

// endingSince are the certificates in r that end within warning and of which that could not be said when last was found.
func endingSince(last, r Result, warning time.Duration) []Certificate {
	return slices.DeleteFunc(r.Ending(warning), func(c Certificate) bool { return slices.Contains(last.Ending(warning), c) })
}

// touch asks for a publication.
func (m *Monitor) touch() { signal(m.dirty) }

// signal leaves a token in c unless one is there.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// publish stores new verdicts when they lead to other decisions.
func (m *Monitor) publish(ctx context.Context) {
	var aging <-chan time.Time // votes grow old without a sign
	if m.electorate != nil {
		ticker := time.NewTicker(voteLife / 15)
		defer ticker.Stop()
		aging = ticker.C
	}
	for {
		select {
		case <-m.dirty:
		case <-aging:
		case <-ctx.Done():
			return
		}
		m.mu.Lock()
		now := m.verdicts()
		m.metrics.votes(now)
		m.mu.Unlock()
		if old := m.published.Load(); old == nil || !sameConditions(old, now) {
			m.published.Store(now)
			signal(m.unsaved)
		}
	}
}

// keep saves verdicts that were published, and now and again so that the file stays fresh. Apart from publish, lest a disk
// that stalls keep a verdict from the answers.
func (m *Monitor) keep(ctx context.Context) {
	heartbeat := time.NewTicker(m.options.Fresh / 4)
	defer heartbeat.Stop()
	for {
		select {
		case <-m.unsaved:
		case <-heartbeat.C:
		case <-ctx.Done():
			return
		}
		m.save()
	}
}

// verdicts folds the states. The caller holds mu.
func (m *Monitor) verdicts() *Verdicts {
	v := &Verdicts{Time: time.Now(), Replicas: make(map[router.ReplicaKey]Verdict)}
	if m.snapshot == nil {
		return v
	}
	own, present := ballot{}, m.electorate.present(v.Time)
	if m.electorate != nil {
		own = m.ballot(v.Time)
		v.Voters, v.Rival = m.electorate.voters(v.Time, &own), v.Time.Sub(m.electorate.rival) < voteLife
	}
	for _, registry := range m.snapshot.Registries {
		for _, replica := range registry.Replicas {
			rk := router.ReplicaKey{Registry: registry.Name, Region: replica.Region}
			addresses := replica.Addresses
			if replica.Hostname != "" {
				addresses = []netip.Addr{{}}
			}
			list := make([]Address, 0, len(addresses))
			for _, a := range addresses {
				list = append(list, m.address(key{ReplicaKey: rk, address: a}, Address{Address: a, Hostname: replica.Hostname}, v.Time, present, &own))
			}
			var canary *Address
			if replica.Canary != (topology.Canary{}) && replica.Probe.Mode != topology.ProbeNone {
				c := m.address(key{ReplicaKey: rk, canary: true}, Address{Canary: replica.Canary.String()}, v.Time, present, &own)
				canary = &c
			}
			v.Replicas[rk] = verdict(replica.Probe.Mode, list, canary)
		}
	}
	return v
}

// address fills in what is known of what k names: of own probes, and by the votes of those present. The caller holds mu.
func (m *Monitor) address(k key, a Address, now time.Time, present []string, own *ballot) Address {
	w := m.watched[k]
	if w == nil {
		return a
	}
	a.Own, a.Since, a.Settled, a.Last = w.machine.health, w.machine.since, w.settled(), w.last
	if a.Own == router.Unhealthy {
		a.Rise = w.machine.rise(m.options.Rise)
	}
	a.Votes = m.electorate.votes(w.target.name(), present, own)
	a.Health = agree(a.Own, a.Votes, len(present)+1)
	if a.Outvoted() && now.Sub(a.Since) < heartbeat {
		a.Settled = false // the others may be about to find the same
	}
	return a
}

func (m *Monitor) save() {
	if m.options.StatePath == "" {
		return
	}
	m.mu.Lock()
	list := make([]saved, 0, len(m.watched))
	for _, w := range m.watched {
		if w.machine.health != router.Unknown {
			list = append(list, saved{
				Registry: w.target.Registry, Region: w.target.Region, Place: w.target.place(),
				Healthy: w.machine.health == router.Healthy, Since: w.machine.since, Seen: w.machine.seen,
				Returned: w.machine.returned, Relapses: w.machine.relapses,
			})
		}
	}
	m.mu.Unlock()
	slices.SortFunc(list, func(a, b saved) int {
		return cmp.Or(cmp.Compare(a.Registry, b.Registry), cmp.Compare(a.Region, b.Region), cmp.Compare(a.Place, b.Place))
	})
	if err := m.write(m.options.StatePath, list); err != nil {
		m.log.Warn("verdicts are not saved: the next start will be a cold one", zap.Error(err))
	}
}
