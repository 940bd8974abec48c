package topology

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"pgregory.net/rapid"

	"portolan/store"
)

var half8 = time.Date(2026, 11, 25, 8, 30, 0, 0, time.UTC)

// halfHour is a ramp from half past eight to nine.
func halfHour(from, to int) Ramp {
	return Ramp{From: from, To: to, Start: half8, End: half8.Add(30 * time.Minute)}
}

func TestRampValues(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]Ramp{
		"0->100 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":           halfHour(0, 100),
		"100->0 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":           halfHour(100, 0),
		"7->8 2026-11-25T09:30:00+01:00/2026-11-25T09:00:00Z":        halfHour(7, 8),
		"50->60 2026-11-25T08:30:00.120Z/2026-11-25T08:30:00.5Z":     {From: 50, To: 60, Start: half8.Add(120 * time.Millisecond), End: half8.Add(500 * time.Millisecond)},
		"50->60 2026-11-25T08:30:00.0009999Z/2026-11-25T08:30:00.5Z": {From: 50, To: 60, Start: half8, End: half8.Add(500 * time.Millisecond)},
	} {
		got, err := parseRamp(text)
		if err != nil || got != want {
			t.Errorf("%s is %v, %v", text, got, err)
		}
		if again, err := parseRamp(got.String()); err != nil || again != got {
			t.Errorf("%v is written as %s, which is %v, %v", want, got, again, err)
		}
	}
	if text := halfHour(0, 100).Step(half8.Add(27 * time.Second)).String(); text != "1->100 2026-11-25T08:30:18Z/2026-11-25T09:00:00Z" {
		t.Errorf("after a step it is %s", text)
	}
	for text, reason := range map[string]string{
		"100":                         "want FROM->TO START/END",
		"0->100 2026-11-25T08:30:00Z": "want FROM->TO START/END",
		"0-100 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":  "want FROM->TO START/END",
		"0->101 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z": "is not a weight",
		"-1->9 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":  "is not a weight",
		"0-> 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":    "is not a weight",
		"9->9 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z":   "leads from the weight 9 to the same",
		"0->9 2026-11-25T08:30:00Z/2026-11-25T08:30:00Z":   "ends before it begins",
		"0->9 2026-11-25T09:00:00Z/2026-11-25T08:30:00Z":   "ends before it begins",
		"0->9 2026-11-25T09:00:00Z/2026-12-25T09:00:00Z":   "at most 168h",
		"0->9 2026-11-25 09:00/2026-11-25T09:00:00Z":       "is not a time",
		"0->9 2026-11-25T09:00:00Z/PT30M":                  "is not a time",
		"0->9 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z x": "is not a time",
	} {
		if got, err := parseRamp(text); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q is %v, %v; want an error with %q", text, got, err, reason)
		}
	}
}

func TestRampAt(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		from, to int
		at       time.Duration
		want     int
	}{
		{0, 100, -time.Hour, 0}, {0, 100, 0, 0}, {0, 100, 17 * time.Second, 0}, {0, 100, 18 * time.Second, 1}, {0, 100, 35 * time.Second, 1},
		{0, 100, 15 * time.Minute, 50}, {0, 100, 30*time.Minute - time.Millisecond, 99}, {0, 100, 30 * time.Minute, 100}, {0, 100, time.Hour, 100},
		{100, 0, 17 * time.Second, 100}, {100, 0, 18 * time.Second, 99}, {100, 0, 30*time.Minute - time.Millisecond, 1}, {100, 0, 30 * time.Minute, 0},
		{40, 41, 29 * time.Minute, 40}, {40, 41, 30 * time.Minute, 41}, {80, 20, 10 * time.Minute, 60},
	} {
		if got := halfHour(c.from, c.to).At(half8.Add(c.at)); got != c.want {
			t.Errorf("from %d to %d after %v: %d, want %d", c.from, c.to, c.at, got, c.want)
		}
	}
}

// Whoever makes the steps, by clocks that differ and stand still: the weight goes one way only, is on the line by each clock or ahead of
// it, and comes to the end.
func TestRampGoesOneWay(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		weights := rapid.IntRange(0, 100)
		whole := Ramp{From: weights.Draw(t, "from"), Start: half8}
		whole.To = weights.Filter(func(w int) bool { return w != whole.From }).Draw(t, "to")
		whole.End = half8.Add(time.Duration(rapid.Int64Range(1, int64(maxRamp/time.Millisecond)).Draw(t, "ms")) * time.Millisecond)
		span := whole.End.Sub(half8)
		up := 1
		if whole.To < whole.From {
			up = -1
		}
		r, newest := whole, half8
		for r.From != r.To {
			clock := half8.Add(time.Duration(rapid.Int64Range(-int64(span)/10, int64(span)*11/10).Draw(t, "clock")))
			next := r.Step(clock)
			if next.From != next.To {
				if stored, err := parseRamp(next.String()); err != nil || stored != next {
					t.Fatalf("%v is read as %v, %v", next, stored, err)
				}
			}
			if clock.After(newest) {
				newest = clock
			}
			if (next.From-r.From)*up < 0 || (whole.To-next.From)*up < 0 {
				t.Fatalf("%v at %v goes to %d", r, clock, next.From)
			}
			// Every step is rounded down to a millisecond, so that a percent may come as much earlier, once for each step before.
			if ideal := whole.At(newest); (ideal-next.From)*up > 0 || (next.From-whole.At(newest.Add(200*time.Millisecond)))*up > 0 {
				t.Fatalf("%v of %v at %v is %d, the line has %d", r, whole, newest, next.From, ideal)
			}
			if !clock.Before(whole.End) && next.From != whole.To {
				t.Fatalf("%v at its end is %d", r, next.From)
			}
			r = next
		}
	})
}

// ramping is a store with a replica eastus, and an editor by a clock of the test's.
type ramping struct {
	*testing.T
	*Editor
	store *away
	mu    sync.Mutex
	clock time.Time
}

func newRamping(t *testing.T) *ramping {
	r := &ramping{T: t, store: open(t), clock: half8}
	put(t, r.store, three())
	r.Editor = r.editor(r.store)
	return r
}

func (r *ramping) editor(s store.Store) *Editor {
	return NewEditor(s, EditorOptions{Now: func() time.Time {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.clock
	}})
}

func (r *ramping) at(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock = half8.Add(d)
}

const east = "registries/contoso/replicas/eastus/"

// has compares weight, routing and ramp of eastus, as they are stored.
func (r *ramping) has(weight, routing, ramp string) {
	r.Helper()
	tree, err := r.store.List(r.Context(), east)
	if err != nil {
		r.Fatal(err)
	}
	v := ValuesOf(tree)
	if v[east+"weight"] != weight || v[east+"routing"] != routing || v[east+"ramp"] != ramp {
		r.Errorf("the weight is %q, routing %q, the ramp %q; want %q, %q, %q", v[east+"weight"], v[east+"routing"], v[east+"ramp"], weight, routing, ramp)
	}
}

func (r *ramping) ok(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *ramping) step(done, overtaken int) {
	r.Helper()
	d, o, err := r.stepRamps(r.Context())
	if err != nil || len(d) != done || len(o) != overtaken {
		r.Errorf("the step ended %v, gave up %v: %v", d, o, err)
	}
	if noted, err := r.store.Get(r.Context(), digestKey); len(d)+len(o) > 0 && (err != nil || noted.Value != snapshotOf(r.T, r.store).Digest) {
		r.Errorf("what the step changed to is noted as %v, %v", noted, err)
	}
}

func (r *ramping) ramp(weight int, over time.Duration) error {
	return r.RampReplica(r.Context(), "contoso", "eastus", over, func(d *ReplicaDocument) { d.Weight = &weight })
}

func (r *ramping) route(routing string, over time.Duration) error {
	change := func(d *ReplicaDocument) { d.Routing = routing }
	if over == 0 {
		return r.UpdateReplica(r.Context(), "contoso", "eastus", change)
	}
	return r.RampReplica(r.Context(), "contoso", "eastus", over, change)
}

const nine = "/2026-11-25T09:00:00Z"

func TestRampReplica(t *testing.T) {
	t.Parallel()
	r := newRamping(t)
	r.ok(r.ramp(0, 0))
	r.has("0", "", "")

	// Up.
	r.ok(r.ramp(100, 30*time.Minute))
	r.has("0", "", "0->100 2026-11-25T08:30:00Z"+nine)
	r.step(0, 0)
	r.at(10*time.Minute + 40*time.Second)
	r.step(0, 0)
	r.has("35", "", "35->100 2026-11-25T08:40:30Z"+nine)
	r.at(5 * time.Minute) // the clock of another owner
	r.step(0, 0)
	r.has("35", "", "35->100 2026-11-25T08:40:30Z"+nine)
	r.at(31 * time.Minute)
	r.step(1, 0)
	r.has("100", "", "")
	r.step(0, 0)

	// Down, and up again from where it is, slower.
	r.at(0)
	r.ok(r.ramp(50, 10*time.Minute))
	r.at(5 * time.Minute)
	r.step(0, 0)
	r.has("75", "", "75->50 2026-11-25T08:35:00Z/2026-11-25T08:40:00Z")
	r.ok(r.ramp(90, 25*time.Minute))
	r.has("75", "", "75->90 2026-11-25T08:35:00Z"+nine)
	r.ok(r.ramp(75, time.Hour))
	r.has("75", "", "")

	// Routing begins at nothing; one that was enabled stays where it is.
	r.ok(r.route("enabled", time.Hour))
	r.has("75", "enabled", "")
	r.ok(r.route("disabled", 0))
	if err := r.ramp(80, time.Hour); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "enable it in the same edit") {
		t.Errorf("a ramp where no clients are sent: %v", err)
	}
	r.ok(r.route("enabled", 25*time.Minute))
	r.has("0", "enabled", "0->75 2026-11-25T08:35:00Z"+nine)
	r.ok(r.route("enabled", 0))
	r.has("0", "enabled", "0->75 2026-11-25T08:35:00Z"+nine)
	r.at(10 * time.Minute)
	r.step(0, 0)
	r.has("15", "enabled", "15->75 2026-11-25T08:40:00Z"+nine)

	for _, over := range []time.Duration{time.Second, -time.Hour, maxRamp + 1} {
		if err := r.ramp(10, over); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "10s to 168h") {
			t.Errorf("over %v: %v", over, err)
		}
	}
	put(t, r.store, Values{east + "weight": "many", east + "ramp": "-"})
	if err := r.route("", time.Hour); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "is not a weight") {
		t.Errorf("from a weight that is none: %v", err)
	}
	r.ok(r.ramp(10, 0))
	r.has("10", "enabled", "")
}

// What ends a ramp, and what does not.
func TestRampEnds(t *testing.T) {
	t.Parallel()
	const ramp = "35->100 2026-11-25T08:40:30Z" + nine
	for name, c := range map[string]struct {
		edit                  func(r *ramping)
		weight, routing, ramp string
		overtaken             int
	}{
		"a weight":                 {func(r *ramping) { r.ok(r.ramp(50, 0)) }, "50", "", "", 0},
		"the weight that it has":   {func(r *ramping) { r.ok(r.ramp(35, 0)) }, "35", "", "", 0},
		"the weight of its end":    {func(r *ramping) { r.ok(r.ramp(100, 0)) }, "100", "", "", 0},
		"no routing":               {func(r *ramping) { r.ok(r.route("disabled", 0)) }, "100", "disabled", "", 0},
		"a deletion":               {func(r *ramping) { r.ok(r.DeleteReplica(r.Context(), "contoso", "eastus", Request{})) }, "100", "disabled", "", 0},
		"a raw weight":             {func(r *ramping) { put(r.T, r.store, Values{east + "weight": "10"}) }, "10", "", "", 1},
		"a raw weight that is bad": {func(r *ramping) { put(r.T, r.store, Values{east + "weight": "x"}) }, "x", "", "", 1},
		"no raw weight any more":   {func(r *ramping) { put(r.T, r.store, Values{east + "weight": "-"}) }, "", "", "", 1},
		"raw routing":              {func(r *ramping) { put(r.T, r.store, Values{east + "routing": "disabled"}) }, "100", "disabled", "", 1},
		"taken away":               {func(r *ramping) { put(r.T, r.store, Values{east + "ramp": "-"}) }, "35", "", "", 0},

		"something else of the replica": {func(r *ramping) {
			r.ok(r.UpdateReplica(r.Context(), "contoso", "eastus", func(d *ReplicaDocument) { d.Credentials = "env:EAST" }))
		}, "36", "", "36->100 2026-11-25T08:40:48Z" + nine, 0},
		"the routing that it has": {func(r *ramping) { r.ok(r.route("enabled", 0)) }, "36", "enabled", "36->100 2026-11-25T08:40:48Z" + nine, 0},
		"a value that is none":    {func(r *ramping) { put(r.T, r.store, Values{east + "ramp": "faster"}) }, "35", "", "faster", 0},
		"another end": {func(r *ramping) {
			put(r.T, r.store, Values{east + "ramp": "35->80 2026-11-25T08:40:00Z/2026-11-25T08:41:00Z"})
		}, "71", "", "71->80 2026-11-25T08:40:48Z/2026-11-25T08:41:00Z", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRamping(t)
			put(t, r.store, Values{east + "weight": "35", east + "ramp": ramp})
			r.at(10*time.Minute + 48*time.Second)
			c.edit(r)
			r.step(0, c.overtaken)
			r.has(c.weight, c.routing, c.ramp)
		})
	}
}

// changing makes a raw edit before the first transaction.
type changing struct {
	store.Store
	once sync.Once
	edit func()
}

func (c *changing) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	c.once.Do(c.edit)
	return c.Store.Commit(ctx, ops...)
}

// An edit in the middle of a step is not written over, nor is anybody sent where routing ends.
func TestRampMeetsEdits(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before, edit          Values
		weight, routing, ramp string
	}{
		"the weight":      {Values{}, Values{east + "weight": "10"}, "10", "", ""},
		"routing ends":    {Values{}, Values{east + "routing": "disabled"}, "100", "disabled", ""},
		"routing returns": {Values{east + "routing": "disabled"}, Values{east + "routing": "-"}, "36", "", "36->100 2026-11-25T08:40:48Z" + nine},
		"the ramp ends":   {Values{}, Values{east + "ramp": "-"}, "35", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRamping(t)
			v := Values{east + "weight": "35", east + "ramp": "35->100 2026-11-25T08:40:30Z" + nine}
			maps.Copy(v, c.before)
			put(t, r.store, v)
			r.at(10*time.Minute + 48*time.Second)
			e := r.editor(&changing{Store: r.store, edit: func() { put(t, r.store, c.edit) }})
			if _, _, err := e.stepRamps(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.has(c.weight, c.routing, c.ramp)
		})
	}
}

// A ramp is no part of what is declared: that is the weight it leads to.
func TestRampIsNotDeclared(t *testing.T) {
	t.Parallel()
	const ramp = "35->80 2026-11-25T08:40:30Z" + nine
	r := newRamping(t)
	put(t, r.store, Values{east + "weight": "35", east + "ramp": ramp})
	d, err := r.Export(t.Context())
	r.ok(err)
	for _, p := range d.Registries[0].Replicas {
		if p.Region == "eastus" && *p.Weight != 80 {
			t.Errorf("the declared weight is %d", *p.Weight)
		}
	}
	if ramps, err := r.Ramps(t.Context()); err != nil || len(ramps) != 1 || ramps[0].From != 35 || ramps[0].Region != "eastus" {
		t.Errorf("the ramps are %v, %v", ramps, err)
	}
	apply := func(want int, change func(p *ReplicaDocument)) {
		t.Helper()
		for i := range d.Registries[0].Replicas {
			if p := &d.Registries[0].Replicas[i]; p.Region == "eastus" {
				change(p)
			}
		}
		dry, err := r.Apply(t.Context(), d, false, true)
		r.ok(err)
		changes, err := r.Apply(t.Context(), d, false, false)
		if err != nil || len(changes) != want || len(dry) != want {
			t.Errorf("%v, %v, %v", changes, dry, err)
		}
	}
	apply(0, func(*ReplicaDocument) {})
	r.has("35", "", ramp)
	apply(1, func(p *ReplicaDocument) { p.Credentials = "env:EAST" })
	r.has("35", "", ramp)
	apply(2, func(p *ReplicaDocument) { p.Routing = "disabled" })
	r.has("80", "disabled", "")

	apply(1, func(p *ReplicaDocument) { p.Routing = "" })
	put(t, r.store, Values{east + "weight": "35", east + "ramp": ramp})
	apply(2, func(p *ReplicaDocument) { thirtyFive := 35; p.Weight = &thirtyFive })
	r.has("35", "", "")
	put(t, r.store, Values{east + "ramp": ramp})
	apply(2, func(p *ReplicaDocument) { p.Weight = nil })
	r.has("", "", "")
}

// A bad ramp is a problem, and does not count; nor does the last good one, which the weight has left behind. A good one is no part of
// what the topology means.
func TestRampInSnapshots(t *testing.T) {
	t.Parallel()
	plain, good := Parse(three(), nil, nil)
	v := three()
	v[east+"ramp"] = "100->0 2026-11-25T08:30:00Z" + nine
	s, good := Parse(v, good, nil)
	if len(s.Problems) > 0 || s.Digest != plain.Digest || good[east+"ramp"] != "" {
		t.Errorf("%+v, %v", s.Problems, good)
	}
	v[east+"ramp"] = "down"
	s, _ = Parse(v, good, nil)
	if len(s.Problems) != 1 || s.Problems[0].Key != east+"ramp" || s.Problems[0].Effect != "it is ignored" || s.Registry("contoso").Replica("eastus") == nil {
		t.Errorf("%+v", s.Problems)
	}
	v[east+"ramps"] = "x"
	if s, _ = Parse(v, good, nil); len(s.Problems) != 2 {
		t.Errorf("%+v", s.Problems)
	}
}

// Of two processes one carries out a ramp; when its store is away for good, as when it is killed, the other goes on where the line is by
// then, and takes the ramp away that was overtaken at the end.
func TestRampersTakeOver(t *testing.T) {
	t.Parallel()
	r := newRamping(t)
	watcher := NewKeeper(r.store, KeeperOptions{})
	run(t, watcher)
	lease := store.LeaseOptions{Renew: 500 * time.Millisecond, TTL: 2 * time.Second}
	stores := map[string]*away{}
	for _, name := range []string{"a", "b"} {
		s := &away{Store: r.store, flip: make(chan struct{})}
		k := NewKeeper(s, KeeperOptions{})
		run(t, k)
		run(t, NewRamper(s, k, r.editor(s), RamperOptions{Holder: name, Logger: zaptest.NewLogger(t).Named(name), Lease: lease}))
		stores[name] = s
	}
	// holder waits for one that is not that name, "" for none.
	holder := func(not string) (name string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), deadline)
		defer cancel()
		name = not
		_ = r.store.Watch(ctx, StatePrefix+"leases/", func(u store.Update) {
			e, _ := u.Tree.Get(rampsLease)
			if name, _, _ = strings.Cut(e.Value, " "); name != not {
				cancel()
			}
		})
		if name == not {
			t.Fatalf("the lease is still held by %q", name)
		}
		return name
	}
	r.ok(r.ramp(0, 30*time.Minute))
	r.at(time.Minute)
	until(t, watcher, "the first steps", weight("eastus", 97))
	first := holder("")
	stores[first].set(true)
	r.at(15 * time.Minute)
	until(t, watcher, "the other to go on", weight("eastus", 50))
	second := holder(first)
	put(t, r.store, Values{east + "weight": "60"})
	until(t, watcher, "the ramp to be taken away", func(s *Snapshot) bool { return len(s.Ramps)+len(s.overtaken) == 0 })
	r.has("60", "", "")
	holder(second) // without a ramp there is no lease either
}
