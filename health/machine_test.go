package health

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"portolan/router"
	"portolan/topology"
)

func TestMachine(t *testing.T) {
	t.Parallel()
	r := rules{rise: 2, fall: 3, round: 2 * time.Second}
	unables := strings.Repeat("?", 10) // for a second each, as many as a state outlives
	// Results: + passed, - failed, ? unable. States: H, U, . (unknown); lower case while not settled.
	for _, c := range []struct{ name, results, states string }{
		{"first success decides", "+", "H"},
		{"first failure decides", "-", "U"},
		{"unable decides nothing", "??+", "..H"},
		{"falls after three", "+---", "HhhU"},
		{"a success clears failures", "+--+--", "HhhHhh"},
		{"rises after two", "-++", "UuH"},
		{"a failure clears successes", "-+-+", "UuUu"},
		{"unable neither clears nor counts", "+-?-?-", "HhhhhU"},
		{"down, up, down", "+---++---", "HhhUuHhhU"},
		{"a relapse needs twice as many", "+---++---++++", "HhhUuHhhUuuuH"},
		{"and so on", "+---++---++++---++++++++", "HhhUuHhhUuuuHhhUuuuuuuuH"},
		{"failing soon after the start is none", "+---++", "HhhUuH"},
		{"unable for long forgets", "+" + unables + "?-", "H" + strings.Repeat("H", len(unables)) + ".U"},
		{"one failure at last is forgotten, too", "+-" + unables + "?+", "Hh" + strings.Repeat("h", len(unables)) + ".H"},
		{"but not how it flapped", "-++" + unables + "?+---++++", "UuH" + strings.Repeat("H", len(unables)) + ".HhhUuuuH"},
		{"nor that it was down", "-" + unables + "?++", "U" + strings.Repeat("U", len(unables)) + "UuH"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			var m machine
			for i, letter := range c.results {
				o := map[rune]Outcome{'+': Passed, '-': Failed, '?': Unable}[letter]
				m = m.observe(o, r, time.Unix(int64(i), 0))
				if got := letterOf(m); got != rune(c.states[i]) {
					t.Fatalf("after %q: state %c, want %c", c.results[:i+1], got, c.states[i])
				}
			}
		})
	}
}

func letterOf(m machine) rune {
	l := map[router.Health]rune{router.Unknown: '.', router.Healthy: 'H', router.Unhealthy: 'U'}[m.health]
	if !m.settled() && m.health != router.Unknown {
		l += 'a' - 'A'
	}
	return l
}

// A state changes only by the full count of results in a row, whatever came before; the count that raises is bounded.
func TestMachineNeedsCounts(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rise, fall := rapid.IntRange(1, 5).Draw(t, "rise"), rapid.IntRange(1, 5).Draw(t, "fall")
		r := rules{rise: rise, fall: fall, round: time.Minute}
		var m machine
		run, last := 0, Unable
		now := time.Unix(1_000_000, 0)
		told := now
		for _, o := range rapid.SliceOf(rapid.SampledFrom([]Outcome{Unable, Failed, Passed})).Draw(t, "outcomes") {
			now = now.Add(time.Duration(rapid.IntRange(0, 200).Draw(t, "seconds")) * time.Second)
			before := m
			m = m.observe(o, r, now)
			if o == Unable {
				if forgotten := before.health == router.Healthy && now.Sub(told) > r.memory(); forgotten {
					if m.health != router.Unknown {
						t.Fatalf("%v after it was told of is remembered: %+v", now.Sub(told), m)
					}
				} else if m != before {
					t.Fatalf("unable moved %v to %v", before, m)
				}
				continue
			}
			told = now
			if o == last {
				run++
			} else {
				run, last = 1, o
			}
			if before.health == router.Unknown {
				continue
			}
			needed, to := fall, router.Unhealthy
			if o == Passed {
				needed, to = before.rise(rise), router.Healthy
			}
			if needed > max(fall, 16*rise) {
				t.Fatalf("%d results are needed", needed)
			}
			if want := run >= needed || before.health == to; (m.health == to) != want {
				t.Fatalf("after %d %v in a row (rise %d, fall %d, %+v): %v", run, o, rise, fall, before, m.health)
			}
		}
	})
}

// Relapses add up to a bound, and are forgotten by standing.
func TestMachineRelapses(t *testing.T) {
	t.Parallel()
	now, r := time.Unix(1_000_000, 0), rules{rise: 1, fall: 1, round: time.Second}
	m := machine{}.observe(Failed, r, now)
	flap := func(stands time.Duration) int {
		for i := 0; m.health != router.Healthy; i++ {
			if i > 100 {
				t.Fatal("it never comes back")
			}
			m = m.observe(Passed, r, now)
		}
		now = now.Add(stands)
		m = m.observe(Failed, r, now)
		return m.rise(1)
	}
	for i, step := range []struct {
		stands time.Duration
		rise   int
	}{{0, 2}, {time.Minute, 4}, {4 * time.Minute, 8}, {0, 16}, {0, 16}, {5 * time.Minute, 8}, {11 * time.Minute, 2}, {0, 4}, {time.Hour, 1}, {time.Hour, 1}, {0, 2}} {
		if got := flap(step.stands); got != step.rise {
			t.Fatalf("step %d: after it stood for %v it needs %d, want %d", i, step.stands, got, step.rise)
		}
	}
}

func TestVerdict(t *testing.T) {
	t.Parallel()
	a, a2, b, b2 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	up := func(a netip.Addr) Address {
		return Address{Address: a, Health: router.Healthy, Own: router.Healthy, Settled: true}
	}
	down := func(a netip.Addr) Address {
		return Address{Address: a, Health: router.Unhealthy, Own: router.Unhealthy, Settled: true, Last: Result{Error: "refused"}}
	}
	unasked := func(a netip.Addr) Address {
		return Address{Address: a, Settled: true, Last: Result{Time: time.Unix(1, 0), Error: "no route"}}
	}
	mute := unasked(b)
	for _, c := range []struct {
		name      string
		mode      topology.ProbeMode
		addresses []Address
		canary    *Address
		health    router.Health
		down      int
		settled   bool
		reason    string
	}{
		{"all up", topology.ProbeHTTPS, []Address{up(a), up(b)}, nil, router.Healthy, 0, true, ""},
		{"IPv6 down", topology.ProbeHTTPS, []Address{up(a), down(b)}, nil, router.Healthy, 1, true, "refused"},
		{"one IPv4 address of two down", topology.ProbeHTTPS, []Address{down(a), up(a2), up(b)}, nil, router.Healthy, 1, true, "refused"},
		{"all IPv4 addresses down, IPv6 stands", topology.ProbeHTTPS, []Address{up(b), down(a), down(a2)}, nil, router.Unhealthy, 0, true, "no IPv4 address stands: refused"},
		{"IPv4 cannot be asked, IPv6 stands", topology.ProbeHTTPS, []Address{unasked(a), up(b)}, nil, router.Healthy, 0, true, ""},
		{"one IPv4 address down, one cannot be asked, IPv6 stands", topology.ProbeHTTPS, []Address{down(a), unasked(a2), up(b)}, nil, router.Healthy, 1, true, "refused"},
		{"IPv4 cannot be asked, IPv6 down", topology.ProbeHTTPS, []Address{unasked(a), down(b)}, nil, router.Unhealthy, 0, true, "refused"},
		{"IPv6 only, one down", topology.ProbeHTTPS, []Address{up(b), down(b2)}, nil, router.Healthy, 1, true, "refused"},
		{"IPv6 only, all down", topology.ProbeHTTPS, []Address{down(b), down(b2)}, nil, router.Unhealthy, 0, true, "refused"},
		{"all down", topology.ProbeHTTPS, []Address{down(a), down(b)}, nil, router.Unhealthy, 0, true, "refused"},
		{"no result", topology.ProbeHTTPS, []Address{{Address: a}}, nil, router.Unknown, 0, false, "no result yet"},
		{"one down, one unknown", topology.ProbeHTTPS, []Address{down(a), {Address: a2}}, nil, router.Unknown, 1, false, "refused"},
		{"IPv4 down, IPv6 unknown", topology.ProbeHTTPS, []Address{down(a), {Address: b}}, nil, router.Unhealthy, 0, false, "refused"},
		{"one down, one cannot be asked", topology.ProbeHTTPS, []Address{mute, down(a)}, nil, router.Unhealthy, 0, true, "refused"},
		{"one up, one cannot be asked", topology.ProbeHTTPS, []Address{mute, up(a)}, nil, router.Healthy, 0, true, ""},
		{"none can be asked", topology.ProbeHTTPS, []Address{mute}, nil, router.Unknown, 0, true, "no route"},
		{"not probed", topology.ProbeNone, []Address{{Address: a}}, nil, router.Unknown, 0, true, "not probed"},
		{"host name down", topology.ProbeHTTPS, []Address{{Hostname: "r.example.", Health: router.Unhealthy, Own: router.Unhealthy, Settled: true}}, nil, router.Unhealthy, 0, true, "no result yet"},
		{"canary alive", topology.ProbeHTTPS, []Address{up(a)}, &Address{Health: router.Healthy, Own: router.Healthy, Settled: true}, router.Healthy, 0, true, ""},
		{"canary dead", topology.ProbeHTTPS, []Address{up(a), down(b)}, &Address{Health: router.Unhealthy, Own: router.Unhealthy, Settled: true, Last: Result{Error: "gone"}}, router.Unhealthy, 0, true, "gone"},
		{"canary not read yet", topology.ProbeHTTPS, []Address{up(a)}, &Address{}, router.Healthy, 0, false, ""},
		{"canary alive, no address", topology.ProbeHTTPS, []Address{down(a)}, &Address{Health: router.Healthy, Own: router.Healthy, Settled: true}, router.Unhealthy, 0, true, "refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			v := verdict(c.mode, c.addresses, c.canary)
			if v.Health != c.health || len(v.Down) != c.down || v.Settled != c.settled || v.Reason != c.reason {
				t.Errorf("got %+v", v)
			}
		})
	}
}
