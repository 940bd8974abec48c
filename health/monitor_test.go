package health

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/latest"
	"portolan/router"
	"portolan/topology"
)

// snapshot makes a topology of one registry with one replica a region, each with the addresses given.
func snapshot(replicas map[string][]string, names ...string) *topology.Snapshot {
	r := &topology.Registry{Name: "contoso", ClientNames: names}
	for _, region := range []string{"a", "b", "c", "d"} {
		addresses, ok := replicas[region]
		if !ok {
			continue
		}
		p := &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region + ".internal"}}
		for _, a := range addresses {
			p.Addresses = append(p.Addresses, netip.MustParseAddr(a))
		}
		r.Replicas = append(r.Replicas, p)
	}
	return &topology.Snapshot{Registries: []*topology.Registry{r}}
}

// field is a set of addresses that are dead, and a record of who was asked when.
type field struct {
	mu    sync.Mutex
	dead  map[string]bool
	asked map[string][]time.Time
	takes time.Duration
}

func (f *field) set(address string, dead bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.dead == nil {
		f.dead = make(map[string]bool)
	}
	f.dead[address] = dead
}

func (f *field) times(address string) []time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.asked[address]
}

func (f *field) probe(ctx context.Context, t *target) Result {
	r := Result{Time: time.Now(), Outcome: Passed}
	f.mu.Lock()
	if f.asked == nil {
		f.asked = make(map[string][]time.Time)
	}
	f.asked[t.address.String()] = append(f.asked[t.address.String()], r.Time)
	dead := f.dead[t.address.String()]
	f.mu.Unlock()
	select {
	case <-time.After(f.takes):
	case <-ctx.Done():
		dead = true
	}
	if dead {
		r.Outcome, r.Error = Failed, "dead"
	}
	r.Latency = time.Since(r.Time)
	return r
}

// start runs a monitor in a synctest bubble; the returned function ends it and waits.
func start(t *testing.T, o Options, f interface {
	probe(context.Context, *target) Result
}) (*Monitor, *latest.Value[topology.Snapshot], func()) {
	t.Helper()
	m := NewMonitor(o)
	m.probe = f.probe
	source := new(latest.Value[topology.Snapshot])
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx, source) }()
	return m, source, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func (m *Monitor) of(region string) Verdict {
	return m.published.Load().Replicas[router.ReplicaKey{Registry: "contoso", Region: region}]
}

func TestMonitorTiming(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		m, source, stop := start(t, Options{}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1", "192.0.2.2"}, "b": {"192.0.2.3"}}))
		synctest.Wait()
		for _, region := range []string{"a", "b"} {
			if v := m.of(region); v.Health != router.Healthy || !v.Settled {
				t.Fatalf("first result did not decide: %s is %+v", region, v)
			}
		}

		// One of two addresses dies: unsettled at the next probe, out after two more in quick succession.
		f.set("192.0.2.1", true)
		died := time.Now()
		for m.of("a").Settled {
			time.Sleep(10 * time.Millisecond)
		}
		if wait := time.Since(died); wait > 5500*time.Millisecond {
			t.Errorf("the first failure was seen after %v, not within an interval and its jitter", wait)
		}
		failed := time.Now()
		for len(m.of("a").Down) == 0 {
			time.Sleep(10 * time.Millisecond)
		}
		if wait := time.Since(failed); wait < 1700*time.Millisecond || wait > 2300*time.Millisecond {
			t.Errorf("down %v after the first failure, want two fifths of the interval", wait)
		}
		if v := m.of("a"); v.Health != router.Healthy || v.Down[0] != netip.MustParseAddr("192.0.2.1") || !v.Settled {
			t.Errorf("with one of two dead: %+v", v)
		}

		// The other dies as well.
		f.set("192.0.2.2", true)
		time.Sleep(10 * time.Second)
		if v := m.of("a"); v.Health != router.Unhealthy || len(v.Down) != 0 || v.Reason != "dead" {
			t.Errorf("with both dead: %+v", v)
		}
		if v := m.of("b"); v.Health != router.Healthy {
			t.Errorf("the other replica: %+v", v)
		}

		// Up slowly: two probes at the ordinary pace.
		f.set("192.0.2.2", false)
		for m.of("a").Settled {
			time.Sleep(10 * time.Millisecond)
		}
		passed := time.Now()
		for m.of("a").Health != router.Healthy {
			time.Sleep(10 * time.Millisecond)
		}
		if wait := time.Since(passed); wait < 4400*time.Millisecond || wait > 5600*time.Millisecond {
			t.Errorf("up %v after the first success, want one interval", wait)
		}
	})
}

func TestMonitorTopologyChange(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		registry := prometheus.NewRegistry()
		m, source, stop := start(t, Options{Registerer: registry}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}))
		synctest.Wait()
		time.Sleep(time.Second)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "c": {"192.0.2.3"}}))
		synctest.Wait()
		if n := len(f.times("192.0.2.1")); n != 1 {
			t.Errorf("the unchanged address was asked %d times: disturbed", n)
		}
		if v := m.of("c"); v.Health != router.Healthy {
			t.Errorf("the new replica: %+v", v)
		}
		if _, still := m.published.Load().Replicas[router.ReplicaKey{Registry: "contoso", Region: "b"}]; still {
			t.Error("the removed replica still has a verdict")
		}
		time.Sleep(time.Minute)
		if n := len(f.times("192.0.2.2")); n != 1 {
			t.Errorf("the removed address was asked %d times", n)
		}
		if n := testutil.CollectAndCount(m.metrics.up); n != 2 {
			t.Errorf("%d series of health_up, want 2", n)
		}

		// A new client name asks anew at once but keeps what is known; a new port knows nothing.
		f.set("192.0.2.1", true)
		before := len(f.times("192.0.2.1"))
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}, "registry.contoso.com"))
		synctest.Wait()
		if v := m.of("a"); v.Health != router.Healthy || v.Settled {
			t.Errorf("after a changed client name and one failure: %+v", v)
		}
		if n := len(f.times("192.0.2.1")); n != before+1 {
			t.Errorf("asked %d times after the change, want 1", n-before)
		}
		moved := snapshot(map[string][]string{"a": {"192.0.2.1"}}, "registry.contoso.com")
		moved.Registries[0].Replicas[0].Endpoint = &url.URL{Scheme: "https", Host: "a.internal:5443"}
		source.Store(moved)
		synctest.Wait()
		if v := m.of("a"); v.Health != router.Unhealthy {
			t.Errorf("after a changed port and one failure: %+v", v)
		}
	})
}

// Verdicts that lead to the same decisions are not delivered again.
func TestMonitorWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		m, source, stop := start(t, Options{}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		synctest.Wait()
		var deliveries atomic.Int32
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := m.Watch(ctx, func(*Verdicts) { deliveries.Add(1) }); !errors.Is(err, context.Canceled) {
				t.Errorf("Watch: %v", err)
			}
		}()
		time.Sleep(time.Minute)
		if n := deliveries.Load(); n != 1 {
			t.Errorf("%d deliveries while nothing changed, want 1", n)
		}
		if last := m.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}].Addresses[0].Last.Time; time.Since(last) > 6*time.Second {
			t.Errorf("the last result is of %v ago", time.Since(last))
		}
		f.set("192.0.2.1", true)
		time.Sleep(time.Minute)
		// Unsettled (both failures before the fall are one state), then down.
		if n := deliveries.Load(); n != 3 {
			t.Errorf("%d deliveries after the fall, want 3", n)
		}
		cancel()
		<-done
	})
}

func TestMonitorBoundsProbes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := counted{field: field{takes: time.Second}}
		_, source, stop := start(t, Options{Concurrent: 2}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1", "192.0.2.2", "192.0.2.3", "192.0.2.4", "192.0.2.5"}}))
		time.Sleep(20 * time.Second)
		f.mu.Lock()
		most := f.most
		f.mu.Unlock()
		if most != 2 {
			t.Errorf("%d probes at once, want 2", most)
		}
		for i := range 5 {
			if a := fmt.Sprintf("192.0.2.%d", i+1); len(f.times(a)) < 2 {
				t.Errorf("%s starved", a)
			}
		}
	})
}

// However many addresses swallow what they are sent, one that dies beside them is down as soon as ever.
func TestMonitorDeadDelayNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		silent := probeFunc(func(ctx context.Context, target *target) Result {
			if target.Region == "b" {
				<-ctx.Done()
				return Result{Time: time.Now(), Outcome: Failed, Error: "silent"}
			}
			return f.probe(ctx, target)
		})
		m, source, stop := start(t, Options{}, silent)
		defer stop()
		var dead []string
		for i := range 400 {
			dead = append(dead, fmt.Sprintf("198.51.%d.%d", 100+i/200, i%200))
		}
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": dead}))
		for synctest.Wait(); m.of("a").Health != router.Healthy; {
			time.Sleep(100 * time.Millisecond)
		}
		f.set("192.0.2.1", true)
		time.Sleep(8 * time.Second) // an interval, two fifths of it, and their jitter
		if v := m.of("a"); v.Health != router.Unhealthy {
			t.Errorf("after 8 s: %+v", v)
		}
		if v := m.of("b"); v.Health != router.Unhealthy {
			t.Errorf("those that are silent: %v", v.Health)
		}
	})
}

type probeFunc func(context.Context, *target) Result

func (f probeFunc) probe(ctx context.Context, t *target) Result { return f(ctx, t) }

// counted is a field that counts the probes at one time.
type counted struct {
	field
	now, most int // guarded by field.mu
}

func (c *counted) probe(ctx context.Context, t *target) Result {
	c.mu.Lock()
	c.now++
	c.most = max(c.most, c.now)
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		c.now--
		c.mu.Unlock()
	}()
	return c.field.probe(ctx, t)
}

func TestMonitorWarm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := field{takes: 500 * time.Millisecond}
		m, source, stop := start(t, Options{}, &f)
		defer stop()
		begun := time.Now()
		go func() {
			time.Sleep(time.Second)
			source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}))
		}()
		if err := m.Warm(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begun); d != 1500*time.Millisecond {
			t.Errorf("warm after %v, want 1.5 s: the topology and one result each", d)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		f := field{takes: time.Hour}
		m, source, stop := start(t, Options{Timeout: 2 * time.Second, Concurrent: 1}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}))
		begun := time.Now()
		if err := m.Warm(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(begun); d != 2*time.Second {
			t.Errorf("warm after %v, want one timeout", d)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		m := NewMonitor(Options{})
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := m.Warm(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without a topology: %v", err)
		}
	})
}

func TestMonitorWarmStart(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "verdicts.json")
	two := snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}})
	synctest.Test(t, func(t *testing.T) {
		var f field
		f.set("192.0.2.1", true)
		_, source, stop := start(t, Options{StatePath: path}, &f)
		source.Store(two)
		synctest.Wait()
		time.Sleep(time.Minute)
		stop()

		// A restart believes what was saved: down until it rises.
		time.Sleep(30 * time.Second)
		slow := field{takes: time.Second}
		m, source, stop := start(t, Options{StatePath: path}, &slow)
		source.Store(two)
		begun := time.Now()
		if err := m.Warm(t.Context()); err != nil {
			t.Fatal(err)
		}
		if time.Since(begun) != 0 {
			t.Errorf("a warm start took %v", time.Since(begun))
		}
		synctest.Wait()
		if a, b := m.of("a"), m.of("b"); a.Health != router.Unhealthy || b.Health != router.Healthy {
			t.Errorf("after a warm start: %v, %v", a.Health, b.Health)
		}
		time.Sleep(1500 * time.Millisecond)
		if a := m.of("a"); a.Health != router.Unhealthy || a.Settled {
			t.Errorf("one success must not raise a saved verdict: %+v", a)
		}
		stop()

		// Too old, and a file that is none: cold starts.
		time.Sleep(2 * time.Minute)
		m, source, stop = start(t, Options{StatePath: path}, &slow)
		source.Store(two)
		synctest.Wait()
		if a := m.of("a"); a.Health != router.Unknown {
			t.Errorf("an old verdict was believed: %+v", a)
		}
		stop()
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		m, source, stop = start(t, Options{StatePath: path}, &slow)
		source.Store(two)
		synctest.Wait()
		if a := m.of("a"); a.Health != router.Unknown {
			t.Errorf("from a broken file: %+v", a)
		}
		stop()
	})
	if left, _ := filepath.Glob(path + ".*"); len(left) > 0 {
		t.Errorf("temporary files were left: %v", left)
	}
}

// mute is a field of which one address cannot be asked from here, after the first so many times.
type mute struct {
	field
	unable string
	after  int
}

func (m *mute) probe(ctx context.Context, t *target) Result {
	if t.address.String() == m.unable && len(m.times(m.unable)) >= m.after {
		return Result{Time: time.Now(), Outcome: Unable, Error: "no route"}
	}
	return m.field.probe(ctx, t)
}

// On a machine without IPv6 a replica with addresses of both families settles, and the operator is told once.
func TestMonitorUnableSettles(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := mute{unable: "2001:db8::1"}
		core, logs := observer.New(zap.WarnLevel)
		m, source, stop := start(t, Options{Logger: zap.New(core)}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1", "2001:db8::1"}, "b": {"2001:db8::1"}}))
		synctest.Wait()
		if v := m.of("a"); v.Health != router.Healthy || !v.Settled || len(v.Down) != 0 {
			t.Errorf("one address passes, one cannot be asked: %+v", v)
		}
		if v := m.of("b"); v.Health != router.Unknown || !v.Settled || v.Reason != "no route" {
			t.Errorf("the only address cannot be asked: %+v", v)
		}
		time.Sleep(time.Minute)
		if n := logs.FilterFieldKey("reason").Len(); n != 2 {
			t.Errorf("%d warnings of two addresses, want one each", n)
		}
		f.set("192.0.2.1", true)
		time.Sleep(10 * time.Second)
		if v := m.of("a"); v.Health != router.Unhealthy || v.Reason != "dead" {
			t.Errorf("all that can be asked are dead: %+v", v)
		}
	})
}

// What is known of an address is forgotten when for long it could not be asked: it is neither up nor down.
func TestMonitorForgets(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := mute{unable: "192.0.2.1", after: 1}
		core, logs := observer.New(zap.WarnLevel)
		m, source, stop := start(t, Options{Logger: zap.New(core)}, &f)
		defer stop()
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1", "2001:db8::1"}}))
		time.Sleep(30 * time.Second)
		if a := m.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}].Addresses[0]; a.Last.Outcome != Unable || a.Own != router.Healthy {
			t.Errorf("after five times that it could not be asked: %+v", a)
		}
		time.Sleep(15 * time.Second)
		v := m.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}]
		if a := v.Addresses[0]; v.Health != router.Healthy || !v.Settled || a.Own != router.Unknown || time.Since(a.Since) > 15*time.Second {
			t.Errorf("the address is remembered: %+v", v)
		}
		m.mu.Lock()
		b := m.ballot(time.Now())
		m.mu.Unlock()
		if len(b.Up) != 1 || len(b.Down) != 0 {
			t.Errorf("it votes on what it does not know: %+v", b)
		}
		if n := testutil.CollectAndCount(m.metrics.up); n != 1 {
			t.Errorf("%d series of health_up, want 1", n)
		}
		if n := logs.FilterMessageSnippet("not known any more").Len(); n != 1 {
			t.Errorf("it is told %d times, want once", n)
		}
		f.set("2001:db8::1", true)
		time.Sleep(10 * time.Second)
		if v := m.of("a"); v.Health != router.Unhealthy {
			t.Errorf("all that can be asked are dead: %+v", v)
		}
	})
}

// That an address was down is remembered for this server's own answers, but it does not vote on what it could not ask for long.
func TestMonitorVotesOnWhatItSees(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		m, source, stop := start(t, Options{}, &f)
		defer stop()
		f.set("192.0.2.1", true)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		time.Sleep(15 * time.Second)
		down := func(now time.Time) int {
			m.mu.Lock()
			defer m.mu.Unlock()
			return len(m.ballot(now).Down)
		}
		if got := down(time.Now()); got != 1 {
			t.Errorf("it votes %d addresses down", got)
		}
		if got := down(time.Now().Add(time.Minute)); got != 0 || m.of("a").Health != router.Unhealthy {
			t.Errorf("a minute after the last probe it votes %d addresses down, and takes it for %v", got, m.of("a").Health)
		}
	})
}

// A disk that stalls keeps no verdict from the answers.
func TestMonitorStalledDisk(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var f field
		m := NewMonitor(Options{StatePath: filepath.Join(t.TempDir(), "verdicts.json")})
		stalled := make(chan struct{})
		m.probe, m.write = f.probe, func(string, []saved) error { <-stalled; return nil }
		source := new(latest.Value[topology.Snapshot])
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- m.Run(ctx, source) }()
		time.Sleep(time.Minute)
		f.set("192.0.2.1", true)
		time.Sleep(10 * time.Second)
		if v := m.of("a"); v.Health != router.Unhealthy {
			t.Errorf("with a stalled disk: %+v", v)
		}
		cancel()
		close(stalled)
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

type brokenSource struct{}

func (brokenSource) Watch(context.Context, func(*topology.Snapshot)) error {
	return errors.New("closed")
}

func TestMonitorSourceEnds(t *testing.T) {
	t.Parallel()
	if err := NewMonitor(Options{}).Run(t.Context(), brokenSource{}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("Run: %v", err)
	}
}

// leaf serves a certificate for each name that ends at its time.
type leaf struct{ end time.Time }

func (l *leaf) probe(_ context.Context, t *target) Result {
	r := Result{Time: time.Now(), Outcome: Passed}
	for _, name := range t.names {
		r.Certificates = append(r.Certificates, Certificate{name, l.end})
	}
	return r
}

// The end of a certificate is told in the log once, and its time in the metric.
func TestMonitorCertificates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.WarnLevel)
		l := &leaf{time.Now().Add(time.Hour + 30*time.Second)}
		m, source, stop := start(t, Options{CertificateWarning: time.Hour, Logger: zap.New(core)}, l)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}, "registry.contoso.com"))
		time.Sleep(20 * time.Second)
		if n := logs.Len(); n != 0 {
			t.Errorf("warned %d times too early", n)
		}
		time.Sleep(time.Minute)
		if n := logs.FilterMessage("certificate is about to end").Len(); n != 1 {
			t.Errorf("warned %d times, want once", n)
		}
		if v := testutil.ToFloat64(m.metrics.expiry.WithLabelValues("contoso", "a", "192.0.2.1", "registry.contoso.com")); v != float64(l.end.Unix()) {
			t.Errorf("the metric says %v, want %v", v, l.end.Unix())
		}
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}, "registry.contoso.com", "old.contoso.com"))
		synctest.Wait()
		if n := testutil.CollectAndCount(m.metrics.expiry); n != 2 {
			t.Errorf("%d series of two names", n)
		}
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}, "registry.contoso.com"))
		synctest.Wait()
		if n := testutil.CollectAndCount(m.metrics.expiry); n != 1 {
			t.Errorf("%d series when one name is left", n)
		}
		source.Store(snapshot(nil))
		synctest.Wait()
		if n := testutil.CollectAndCount(m.metrics.expiry); n != 0 {
			t.Errorf("%d series are left of what is gone", n)
		}
		stop()
	})
}

// What is known of an address's flapping outlives a restart, within its bounds.
func TestMonitorSavesRelapses(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "verdicts.json")
	synctest.Test(t, func(t *testing.T) {
		var f field
		m, source, stop := start(t, Options{StatePath: path}, &f)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		synctest.Wait()
		for range 2 { // down, up, and down again
			f.set("192.0.2.1", true)
			time.Sleep(20 * time.Second)
			f.set("192.0.2.1", false)
			time.Sleep(12 * time.Second)
		}
		if a := m.of("a").Addresses[0]; a.Own != router.Unhealthy || m.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}].Addresses[0].Rise != 4 {
			t.Errorf("after a relapse: %+v", a)
		}
		f.set("192.0.2.1", true)
		stop()
		m, source, stop = start(t, Options{StatePath: path}, &f)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		synctest.Wait()
		if a := m.of("a").Addresses[0]; a.Rise != 4 {
			t.Errorf("after a restart: %+v", a)
		}
		stop()
	})
}

// stuck is a field where some probes panic and some heed no deadline.
type stuck struct {
	field
	faults map[int]string // by the number of the probe
	until  chan struct{}
}

func (s *stuck) probe(ctx context.Context, t *target) Result {
	r := s.field.probe(ctx, t)
	switch s.faults[len(s.times(t.address.String()))] {
	case "panic":
		panic("out of order")
	case "hang":
		<-s.until
	}
	return r
}

// A probe that panics or hangs says nothing of the replica, and the next ones are made in their turn: as many as may hang.
func TestMonitorFaultyProbes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &stuck{faults: map[int]string{2: "panic", 3: "hang", 5: "hang", 7: "hang"}, until: make(chan struct{})}
		m, source, stop := start(t, Options{}, s)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		time.Sleep(10 * time.Minute)
		if n := len(s.times("192.0.2.1")); n != 7 {
			t.Errorf("%d probes were made, with three that hang: want 7", n)
		}
		a := m.Verdicts().Replicas[router.ReplicaKey{Registry: "contoso", Region: "a"}].Addresses[0]
		if a.Health != router.Unknown || a.Last.Outcome != Unable || !strings.Contains(a.Last.Error, "3 earlier probes have not ended") {
			t.Errorf("got %+v", a)
		}
		if n := testutil.ToFloat64(m.metrics.faults.WithLabelValues("contoso", "a", "panic")); n != 1 {
			t.Errorf("%v panics are counted", n)
		}
		// Those that hang end after all: probing goes on.
		close(s.until)
		s.set("192.0.2.1", true)
		time.Sleep(30 * time.Second)
		if v := m.of("a"); v.Health != router.Unhealthy {
			t.Errorf("after the hang: %+v", v)
		}
		stop()
	})
}

// A probe that hangs does not keep the monitor from ending.
func TestMonitorEndsAmidAHang(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &stuck{faults: map[int]string{1: "hang"}, until: make(chan struct{})}
		_, source, stop := start(t, Options{}, s)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		synctest.Wait()
		begun := time.Now()
		stop()
		if took := time.Since(begun); took > 2*grace {
			t.Errorf("it took %v to end", took)
		}
		close(s.until)
	})
}

// late is a field whose probes go on for some time after they were to end.
type late struct {
	field
	by     time.Duration
	panics bool
	ended  atomic.Int32
}

func (l *late) probe(ctx context.Context, t *target) Result {
	r := l.field.probe(ctx, t)
	if ctx.Err() != nil {
		time.Sleep(l.by)
	}
	l.ended.Add(1)
	if l.panics {
		panic("out of order")
	}
	return r
}

// A probe whose target is withdrawn ends in silence unless it panics, however late, and brings back no series of it.
func TestMonitorWithdrawnProbe(t *testing.T) {
	t.Parallel()
	for _, panics := range []bool{false, true} {
		t.Run(fmt.Sprintf("panics %v", panics), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) { withdrawnProbe(t, panics) })
		})
	}
}

func withdrawnProbe(t *testing.T, panics bool) {
	l := &late{field: field{takes: time.Minute}, by: 10 * time.Second, panics: panics}
	core, logs := observer.New(zap.DebugLevel)
	m, source, stop := start(t, Options{Logger: zap.New(core)}, l)
	source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
	time.Sleep(time.Second)
	source.Store(snapshot(nil))
	time.Sleep(time.Minute)
	if l.ended.Load() != 1 {
		t.Fatal("the probe has not ended")
	}
	if n := logs.Len(); n != 0 != panics {
		t.Errorf("%d lines are logged: %v", n, logs.All())
	}
	if n := testutil.CollectAndCount(m.metrics.faults) + testutil.CollectAndCount(m.metrics.results) + testutil.CollectAndCount(m.metrics.latency); n != 0 {
		t.Errorf("%d series of what is gone", n)
	}
	stop()
}

// At the end the monitor waits for its probes, those that were given up too, and tells of none.
func TestMonitorWaitsForProbes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := &late{field: field{takes: time.Minute}, by: grace / 2}
		core, logs := observer.New(zap.DebugLevel)
		_, source, stop := start(t, Options{Logger: zap.New(core)}, l)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}, "b": {"192.0.2.2"}}))
		time.Sleep(time.Second)
		source.Store(snapshot(map[string][]string{"a": {"192.0.2.1"}}))
		synctest.Wait()
		stop()
		if n := l.ended.Load(); n != 2 {
			t.Errorf("Run returned when %d of 2 probes had ended", n)
		}
		if n := logs.Len(); n != 0 {
			t.Errorf("%d lines are logged: %v", n, logs.All())
		}
	})
}
