package router

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"portolan/router/ranges"
	"portolan/topology"
)

// spaces are small parts of the address space, looked at whole: every prefix between the two lengths is asked for. They
// lie where things meet: cells, special-purpose blocks and their borders, embedded addresses, the ends of the families.
var spaces = []struct {
	base netip.Prefix
	leaf int
}{
	{netip.MustParsePrefix("20.0.0.0/20"), 28},
	{netip.MustParsePrefix("192.0.0.0/20"), 28},
	{netip.MustParsePrefix("203.0.112.0/22"), 28},
	{netip.MustParsePrefix("8.0.0.0/6"), 14},
	{netip.MustParsePrefix("172.0.0.0/8"), 16},
	{netip.MustParsePrefix("0.0.0.0/0"), 8},
	{netip.MustParsePrefix("10.1.0.0/20"), 28},
	{netip.MustParsePrefix("2a00::/44"), 52},
	{netip.MustParsePrefix("2001::/16"), 24},
	{netip.MustParsePrefix("2001:db0::/28"), 36},
	{netip.MustParsePrefix("2002:1400::/36"), 44},
	{netip.MustParsePrefix("2002:800::/21"), 29},
	{netip.MustParsePrefix("2000::/12"), 20},
	{netip.MustParsePrefix("64:ff9b::1400:0/116"), 124},
	{netip.MustParsePrefix("64:ff9b::/92"), 100},
	{netip.MustParsePrefix("::ffff:20.0.0.0/116"), 124},
	{netip.MustParsePrefix("::/0"), 8},
	{netip.MustParsePrefix("::/120"), 128},
}

var (
	countryCodes = []string{"DE", "NL", "US", "SG"}
	continents   = []string{"EU", "EU", "NA", "AS"}
	spots        = []topology.Coordinates{berlin, amsterdam, newYork, singapore}
	regions      = []struct {
		name string
		at   topology.Coordinates
	}{{"a", frankfurt}, {"b", sf}, {"c", singapore}, {"d", dublin}, {"e", frankfurt}, {"f", newYork}}
	weights = []int{100, 100, 100, 0, 1, 10, 50, 90, 99}
)

// trial is a random topology, database and set of conditions around one of the spaces.
type trial struct {
	registry *topology.Registry
	places   *atlas
	networks *systems
	// prefixes and latencies are those of files.
	prefixes               map[netip.Prefix][]string
	countryMS, continentMS map[string]map[string]int
	conditions             Conditions
	ramps                  []topology.Ramp
	resolver               netip.Addr
	subnets                []netip.Prefix
}

func newTrial(random *rand.Rand) *trial {
	space := spaces[random.IntN(len(spaces))]
	if space.base != space.base.Masked() {
		panic("space " + space.base.String() + " has bits beyond its length")
	}
	w := &trial{conditions: Conditions{}}
	for n := space.base.Bits(); n <= space.leaf; n++ {
		if n == 0 {
			continue
		}
		for i := range 1 << (n - space.base.Bits()) {
			w.subnets = append(w.subnets, nth(space.base, n, i))
		}
	}
	// prefix is a random prefix of the space as databases and operators have it, some longer than the leaves.
	prefix := func() netip.Prefix {
		n := space.base.Bits() + random.IntN(space.leaf-space.base.Bits()+1)
		p := nth(space.base, n, random.IntN(1<<(n-space.base.Bits())))
		if random.IntN(3) == 0 {
			p, _ = p.Addr().Prefix(min(p.Bits()+random.IntN(6), p.Addr().BitLen()))
		}
		return LookupPrefix(p)
	}

	w.places = &atlas{places: make([]Place, 1)}
	for i := range countryCodes {
		w.places.places = append(w.places.places, Place{Located: true, Coordinates: spots[i], Country: countryCodes[i], Continent: continents[i], Source: "test"})
	}
	// Places without coordinates, of which the country is known.
	w.places.places = append(w.places.places, Place{Country: "DE", Continent: "EU", Source: "test"})
	var placeEntries []ranges.Entry[int]
	for range random.IntN(20) {
		placeEntries = append(placeEntries, ranges.Entry[int]{Prefix: prefix(), Value: random.IntN(len(w.places.places))})
	}
	w.places.table = ranges.New(placeEntries)
	var asnEntries []ranges.Entry[uint32]
	for range random.IntN(10) {
		asnEntries = append(asnEntries, ranges.Entry[uint32]{Prefix: prefix(), Value: uint32(random.IntN(3))})
	}
	w.networks = &systems{ranges.New(asnEntries)}

	w.registry = &topology.Registry{Name: "r", Home: regions[random.IntN(len(regions))].name}
	w.registry.Policy.Replication = random.IntN(3) == 0
	w.registry.Policy.AllDown.Mode = topology.AllDownMode(random.IntN(3))
	for _, p := range regions {
		if random.IntN(3) == 0 {
			continue
		}
		w.registry.Replicas = append(w.registry.Replicas, &topology.Replica{
			Region: p.name, Location: p.at, Weight: weights[random.IntN(len(weights))], Routing: random.IntN(6) > 0,
		})
		w.conditions[ReplicaKey{Registry: "r", Region: p.name}] = ReplicaCondition{
			Health: Health(random.IntN(3)), Settled: random.IntN(2) == 0, Seeded: random.IntN(3) > 0,
		}
		if random.IntN(6) == 0 {
			w.ramps = append(w.ramps, topology.Ramp{Registry: "r", Region: p.name})
		}
	}
	names := func() []string {
		var names []string
		for _, i := range random.Perm(len(regions))[:1+random.IntN(3)] {
			names = append(names, regions[i].name)
		}
		return names
	}
	matches := func() (all []topology.Rule) {
		seen := map[topology.Match]bool{}
		for range random.IntN(8) {
			var m topology.Match
			switch random.IntN(6) {
			case 0:
				m.ASN = uint32(1 + random.IntN(2))
			case 1:
				m.Country = countryCodes[random.IntN(len(countryCodes))]
			case 2:
				m.Continent = continents[random.IntN(len(continents))]
			default:
				m.Prefix = prefix()
			}
			if !seen[m] {
				seen[m] = true
				all = append(all, topology.Rule{Match: m, Regions: names()})
			}
		}
		return all
	}
	if random.IntN(3) > 0 {
		w.registry.Orders = matches()
	}
	if random.IntN(3) > 0 {
		w.registry.Fences = matches()
	}
	w.prefixes = make(map[netip.Prefix][]string)
	for range max(0, random.IntN(12)-6) {
		w.prefixes[prefix().Masked()] = names()
	}
	latencies := func(codes []string) map[string]map[string]int {
		all := make(map[string]map[string]int)
		for range random.IntN(3) {
			of := make(map[string]int)
			for _, region := range names() {
				of[region] = 1 + random.IntN(200)
			}
			all[codes[random.IntN(len(codes))]] = of
		}
		return all
	}
	w.countryMS, w.continentMS = latencies(countryCodes), latencies(continents)
	w.resolver = w.subnets[random.IntN(len(w.subnets))].Addr()
	return w
}

// nth is the i-th prefix of length n in base.
func nth(base netip.Prefix, n, i int) netip.Prefix {
	b := base.Addr().AsSlice()
	for bit := range n - base.Bits() {
		if i>>(n-base.Bits()-1-bit)&1 == 1 {
			at := base.Bits() + bit
			b[at/8] |= 0x80 >> (at % 8)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, n)
}

func (w *trial) router() *Registry {
	return w.routerOf(w.registry)
}

func (w *trial) routerOf(registry *topology.Registry) *Registry {
	s := snapshot(registry)
	s.Ramps = w.ramps
	return routerFrom(s, w.sources()).With(w.conditions).At(0)
}

func (w *trial) sources() Sources {
	return Sources{Places: w.places, Networks: w.networks, Prefixes: NewPrefixes(w.prefixes), Latencies: NewLatencies(w.countryMS, w.continentMS)}
}

func (w *trial) String() string {
	s := fmt.Sprintf("home %s, policy %+v, resolver %v\n", w.registry.Home, w.registry.Policy, w.resolver)
	for _, p := range w.registry.Replicas {
		s += fmt.Sprintf("  %s weight %d routing %v %+v\n", p.Region, p.Weight, p.Routing, w.conditions[ReplicaKey{Registry: "r", Region: p.Region}])
	}
	return s + fmt.Sprintf("  orders %v\n  fences %v\n  prefixes %v\n  latencies %v %v", w.registry.Orders, w.registry.Fences, w.prefixes, w.countryMS, w.continentMS)
}

// trials runs f on n random worlds, the same ones every time.
func trials(t *testing.T, n int, f func(t *testing.T, w *trial, random *rand.Rand)) {
	t.Helper()
	for seed := range uint64(n) {
		random := rand.New(rand.NewPCG(seed, 7))
		f(t, newTrial(random), random)
		if t.Failed() {
			t.Fatalf("in the trial of seed %d", seed)
		}
	}
}

// TestScopeSound: every subnet inside of an answer's scope gets that same answer.
func TestScopeSound(t *testing.T) {
	t.Parallel()
	trials(t, 250, func(t *testing.T, w *trial, _ *rand.Rand) {
		r := w.router()
		decisions := make([]Decision, len(w.subnets))
		for i, p := range w.subnets {
			decisions[i] = r.Decide(Client{w.resolver, p})
		}
		for i, p := range w.subnets {
			d := decisions[i]
			if d.Scope < 0 || d.Scope > p.Addr().BitLen() {
				t.Errorf("%v has scope %d\n%v", p, d.Scope, w)
				return
			}
			block, _ := p.Addr().Prefix(d.Scope)
			for j, q := range w.subnets {
				if q.Bits() < d.Scope || !block.Contains(q.Addr()) {
					continue
				}
				if o := decisions[j]; o.Replica != d.Replica || o.Outcome != d.Outcome || o.Settled != d.Settled {
					t.Errorf("%v gets %+v, but %v in its scope %+v\n%v", p, d, q, o, w)
					return
				}
			}
		}
	})
}

// TestScopeHidesNothing: within a scope no address can be asked for alone that gets another answer, down to single
// addresses at random, also where they are longer than what was enumerated.
func TestScopeHidesNothing(t *testing.T) {
	t.Parallel()
	trials(t, 1000, func(t *testing.T, w *trial, random *rand.Rand) {
		r := w.router()
		for range 50 {
			p := w.subnets[random.IntN(len(w.subnets))]
			d := r.Decide(Client{w.resolver, p})
			b := p.Addr().AsSlice()
			for i := d.Scope; i < 8*len(b); i++ {
				b[i/8] ^= byte(random.IntN(2)) * (0x80 >> (i % 8))
			}
			a, _ := netip.AddrFromSlice(b)
			q, _ := a.Prefix(d.Scope + random.IntN(a.BitLen()-d.Scope+1))
			if q.Bits() == 0 {
				continue
			}
			if o := r.Decide(Client{w.resolver, q}); o.Replica != d.Replica || o.Outcome != d.Outcome {
				t.Errorf("%v gets %+v, but %v in its scope %+v\n%v", p, d, q, o, w)
				return
			}
		}
	})
}

// TestRules holds decisions to a plain reading of the rules.
func TestRules(t *testing.T) {
	t.Parallel()
	trials(t, 500, func(t *testing.T, w *trial, random *rand.Rand) {
		r := w.router()
		for range 30 {
			c := Client{Resolver: w.resolver}
			if random.IntN(3) > 0 {
				c.Subnet = w.subnets[random.IntN(len(w.subnets))]
			}
			d := r.Decide(c)
			e := r.Explain(c)
			if e.Decision != d {
				t.Errorf("%v: decided %+v, explained %+v", c, d, e.Decision)
			}
			want, outcome, settled := w.plain(e)
			if region(r, d) != want || d.Outcome != outcome || d.Settled != settled {
				t.Errorf("%v gets %q %+v, want %q %v settled %v\n%v\n%+v", c, region(r, d), d, want, outcome, settled, w, e)
				return
			}
		}
	})
}

// ruled are the regions that the most precise of the rules, and of the prefixes of a file, names for the client of e; nil for none.
func (w *trial) ruled(e Explanation, rules []topology.Rule, file map[netip.Prefix][]string) []string {
	best, score := []string(nil), -1
	for prefix, names := range file {
		known := slices.ContainsFunc(w.registry.Replicas, func(p *topology.Replica) bool { return slices.Contains(names, p.Region) })
		if known && prefix.Contains(e.Address) && 1000+prefix.Bits() > score {
			best, score = names, 1000+prefix.Bits()
		}
	}
	for _, rl := range rules {
		s := -1
		switch m := rl.Match; {
		case m.Prefix.IsValid() && m.Prefix.Contains(e.Address):
			s = 1000 + m.Prefix.Bits()
		case m.ASN != 0 && m.ASN == e.ASN:
			s = 3
		case m.Country != "" && m.Country == e.Country:
			s = 2
		case m.Continent != "" && m.Continent == e.Continent:
			s = 1
		}
		if s > score || s == score && s >= 1000 {
			best, score = rl.Regions, s
		}
	}
	return best
}

// plain decides anew, by sorting names, from the place and the cell that e tells.
func (w *trial) plain(e Explanation) (want string, outcome Outcome, settled bool) {
	order, fence := w.ruled(e, w.registry.Orders, w.prefixes), w.ruled(e, w.registry.Fences, nil)
	var from *topology.Coordinates
	if e.Located {
		from = &topology.Coordinates{Latitude: *e.Latitude, Longitude: *e.Longitude}
	} else if home := w.registry.Replica(w.registry.Home); home != nil {
		from = &home.Location
	}
	type candidate struct {
		*topology.Replica
		ReplicaCondition
		place, notHome, distance int
	}
	var all []candidate
	for _, p := range w.registry.Replicas {
		c := candidate{Replica: p, ReplicaCondition: w.conditions[ReplicaKey{Registry: "r", Region: p.Region}], place: slices.Index(order, p.Region)}
		if !p.Routing || p.Weight == 0 && !w.ramping(p) || fence != nil && !slices.Contains(fence, p.Region) ||
			w.registry.Policy.Replication && p.Weight > 0 && !c.Seeded && p.Region != w.registry.Home {
			continue
		}
		if c.place < 0 {
			c.place = 1000
		}
		if !e.Located && p.Region != w.registry.Home {
			c.notHome = 1
		}
		if from != nil {
			c.distance = Distance(*from, p.Location)
		}
		if ms := cmp.Or(w.countryMS[e.Country][p.Region], w.continentMS[e.Continent][p.Region]); e.Located && ms > 0 {
			c.distance = 50 * ms
		}
		all = append(all, c)
	}
	slices.SortFunc(all, func(a, b candidate) int {
		for _, d := range []int{a.place - b.place, a.notHome - b.notHome, a.distance - b.distance} {
			if d != 0 {
				return d
			}
		}
		if a.Region < b.Region {
			return -1
		}
		return 1
	})
	var cell Cell
	var country string
	if _, err := fmt.Sscanf(e.Cell, "AS%d/%s", &cell.ASN, &country); err != nil && cell.ASN == 0 && e.Cell != "" {
		cell.Prefix = netip.MustParsePrefix(e.Cell)
	}
	copy(cell.Country[:], country)
	settled = true
	var nearest, highest *candidate
	for i, c := range all {
		settled = settled && (c.Settled || c.Weight == 0) && !w.ramping(c.Replica)
		if c.Weight == 0 { // only on its way to another weight
			continue
		}
		if nearest == nil {
			nearest = &all[i]
		}
		if c.Health == Unhealthy {
			continue
		}
		if highest == nil || c.Weight > highest.Weight {
			highest = &all[i]
		}
		if bucket(cell, "r\x00"+c.Region+"\x00") < c.Weight {
			return c.Region, Kept, settled
		}
	}
	switch {
	case nearest == nil:
		return "", NoCandidate, settled
	case highest != nil:
		return highest.Region, Fallback, settled
	case w.registry.Policy.AllDown.Mode == topology.AllDownNone:
		return "", AllDownNone, false
	case w.registry.Policy.AllDown.Mode == topology.AllDownCNAME:
		return "", AllDownCNAME, false
	}
	return nearest.Region, AllDownNearest, false
}

// ramping is whether the weight of p changes over time.
func (w *trial) ramping(p *topology.Replica) bool {
	return slices.ContainsFunc(w.ramps, func(r topology.Ramp) bool { return r.Region == p.Region })
}

// TestWeightMovesOnlyItsOwn: a changed weight moves cells only to or from its replica.
func TestWeightMovesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	moved := 0
	trials(t, 1000, func(t *testing.T, w *trial, random *rand.Rand) {
		if len(w.registry.Replicas) == 0 {
			return
		}
		before := w.router()
		changed := w.registry.Replicas[random.IntN(len(w.registry.Replicas))]
		old := changed.Weight
		changed.Weight = random.IntN(101)
		after := w.router()
		for range 50 {
			c := Client{w.resolver, w.subnets[random.IntN(len(w.subnets))]}
			a, b := before.Decide(c), after.Decide(c)
			if region(before, a) != region(after, b) {
				moved++
				if region(before, a) != changed.Region && region(after, b) != changed.Region {
					t.Errorf("weight of %s from %d to %d moves %v from %+v to %+v\n%v", changed.Region, old, changed.Weight, c, a, b, w)
					return
				}
			}
			if old < changed.Weight && old > 0 && region(before, a) == changed.Region && a.Outcome == Kept && region(after, b) != changed.Region {
				t.Errorf("weight of %s from %d to %d takes %v away from it\n%v", changed.Region, old, changed.Weight, c, w)
				return
			}
		}
	})
	if moved == 0 {
		t.Error("nothing ever moved")
	}
}

// TestRampMovesOnlyItsOwn: while a weight is raised little by little cells only come to its replica, and while it is lowered they only
// leave it.
func TestRampMovesOnlyItsOwn(t *testing.T) {
	t.Parallel()
	came, left := 0, 0
	trials(t, 150, func(t *testing.T, w *trial, random *rand.Rand) {
		if len(w.registry.Replicas) == 0 {
			return
		}
		charts, err := Chart(t.Context(), snapshot(w.registry), w.sources(), nil)
		if err != nil {
			t.Error(err)
			return
		}
		changed := w.registry.Replicas[random.IntN(len(w.registry.Replicas))]
		start := time.Date(2026, 11, 25, 8, 30, 0, 0, time.UTC)
		ramp := topology.Ramp{From: random.IntN(101), To: random.IntN(101), Start: start, End: start.Add(30 * time.Minute)}
		var clients []Client
		for range 50 {
			clients = append(clients, Client{w.resolver, w.subnets[random.IntN(len(w.subnets))]})
		}
		where := func() (list []string) {
			changed.Weight = ramp.From
			r := New(snapshot(w.registry), charts).With(w.conditions).At(0)
			for _, c := range clients {
				list = append(list, region(r, r.Decide(c)))
			}
			return list
		}
		raised, before := ramp.To > ramp.From, where()
		for now := start; ramp.From != ramp.To; now = now.Add(time.Duration(1+random.IntN(300)) * time.Second) {
			ramp = ramp.Step(now)
			after := where()
			for i, c := range clients {
				switch {
				case before[i] == after[i]:
				case raised && after[i] == changed.Region:
					came++
				case !raised && before[i] == changed.Region:
					left++
				default:
					t.Errorf("on the way of %s to %d, at %d, %v moves from %q to %q\n%v", changed.Region, ramp.To, ramp.From, c, before[i], after[i], w)
					return
				}
			}
			before = after
		}
	})
	if came == 0 || left == 0 {
		t.Errorf("%d came, %d left", came, left)
	}
}

// TestAllDownHolds: where no replica is healthy the policy of the registry holds, and within it the weight 0, disabled routing, fences
// and what is not seeded.
func TestAllDownHolds(t *testing.T) {
	t.Parallel()
	outcomes := map[Outcome]int{}
	trials(t, 300, func(t *testing.T, w *trial, random *rand.Rand) {
		for key, c := range w.conditions {
			c.Health = Unhealthy
			w.conditions[key] = c
		}
		r := w.router()
		for range 30 {
			c := Client{w.resolver, w.subnets[random.IntN(len(w.subnets))]}
			d := r.Decide(c)
			outcomes[d.Outcome]++
			fence := w.ruled(r.Explain(c), w.registry.Fences, nil)
			candidates := map[string]bool{}
			for _, p := range w.registry.Replicas {
				seeded := !w.registry.Policy.Replication || p.Region == w.registry.Home || w.conditions[ReplicaKey{Registry: "r", Region: p.Region}].Seeded
				candidates[p.Region] = p.Weight > 0 && p.Routing && seeded && (fence == nil || slices.Contains(fence, p.Region))
			}
			want := map[topology.AllDownMode]Outcome{topology.AllDownNearest: AllDownNearest, topology.AllDownNone: AllDownNone, topology.AllDownCNAME: AllDownCNAME}[w.registry.Policy.AllDown.Mode]
			if !slices.Contains(slices.Collect(maps.Values(candidates)), true) {
				want = NoCandidate
			}
			if d.Outcome != want || (d.Replica >= 0) != (want == AllDownNearest) || d.Replica >= 0 && !candidates[region(r, d)] {
				t.Errorf("%v gets %q %+v, want %v of %v\n%v", c, region(r, d), d, want, candidates, w)
				return
			}
		}
	})
	for _, o := range []Outcome{NoCandidate, AllDownNearest, AllDownNone, AllDownCNAME} {
		if outcomes[o] == 0 {
			t.Errorf("nobody got %v", o)
		}
	}
}

// TestConstructionOrder: the order in which replicas and rules stand in the snapshot does not matter.
func TestConstructionOrder(t *testing.T) {
	t.Parallel()
	trials(t, 500, func(t *testing.T, w *trial, random *rand.Rand) {
		r := w.router()
		other := *w.registry
		other.Replicas, other.Orders, other.Fences = slices.Clone(other.Replicas), slices.Clone(other.Orders), slices.Clone(other.Fences)
		random.Shuffle(len(other.Replicas), func(i, j int) {
			other.Replicas[i], other.Replicas[j] = other.Replicas[j], other.Replicas[i]
		})
		slices.Reverse(other.Orders)
		slices.Reverse(other.Fences)
		s := w.routerOf(&other)
		for range 30 {
			c := Client{w.resolver, w.subnets[random.IntN(len(w.subnets))]}
			a, b := r.Decide(c), s.Decide(c)
			if region(r, a) != region(s, b) || a.Outcome != b.Outcome || a.Scope != b.Scope || a.Settled != b.Settled {
				t.Errorf("%v gets %q %+v and %q %+v\n%v", c, region(r, a), a, region(s, b), b, w)
				return
			}
		}
	})
}

// TestEqualPrefixesDecideAlike: in which order a map yields the prefixes of a file does not matter, also where several come to the same
// as clients are looked up.
func TestEqualPrefixesDecideAlike(t *testing.T) {
	t.Parallel()
	trials(t, 200, func(t *testing.T, w *trial, random *rand.Rand) {
		names := []string{"a", "b", "c", "d", "e", "f"}
		for _, p := range w.subnets[:min(len(w.subnets), 8)] {
			if p.Addr().Is4() {
				w.prefixes[p] = names[:1]
				w.prefixes[netip.PrefixFrom(netip.AddrFrom16(p.Addr().As16()), 96+p.Bits())] = names[1+random.IntN(5):]
			}
		}
		first := w.router()
		for range 4 {
			w.prefixes = maps.Clone(w.prefixes)
			other := w.router()
			for _, subnet := range w.subnets[:min(len(w.subnets), 64)] {
				c := Client{w.resolver, subnet}
				if a, b := first.Decide(c), other.Decide(c); a != b {
					t.Errorf("%v gets %+v and %+v\n%v", c, a, b, w)
					return
				}
			}
		}
	})
}

// TestCellStaysWhole: all of a cell goes to one region, unless an operator's prefix tears it apart.
func TestCellStaysWhole(t *testing.T) {
	t.Parallel()
	trials(t, 500, func(t *testing.T, w *trial, random *rand.Rand) {
		prefixes := slices.Collect(maps.Keys(w.prefixes))
		for _, rl := range append(slices.Clone(w.registry.Orders), w.registry.Fences...) {
			prefixes = append(prefixes, rl.Match.Prefix)
		}
		for _, p := range prefixes {
			if p.IsValid() && (p.Bits() > subnetCell4 && p.Addr().Is4() || p.Bits() > subnetCell6) {
				return
			}
		}
		r := w.router()
		first := map[string]Decision{}
		for _, p := range w.subnets {
			c := Client{w.resolver, p}
			e := r.Explain(c)
			if e.Source != "ecs" {
				continue
			}
			// Special blocks are shorter than cells in IPv4 and in the global unicast space alone.
			if a := e.Address; a.Is6() && !netip.MustParsePrefix("2000::/3").Contains(a) {
				continue
			}
			if d, seen := first[e.Cell]; seen && (d.Replica != e.Decision.Replica || d.Outcome != e.Decision.Outcome) {
				t.Errorf("cell %s gets %+v and %+v\n%v", e.Cell, d, e.Decision, w)
				return
			}
			first[e.Cell] = e.Decision
		}
	})
}

// TestShares: what Shares computes is what the cells of a client in the region get, within the statistical error.
func TestShares(t *testing.T) {
	t.Parallel()
	const cells = 20_000
	for seed := range uint64(20) {
		random := rand.New(rand.NewPCG(seed, 9))
		w := newTrial(random)
		w.registry.Orders, w.registry.Fences = nil, nil
		if len(w.registry.Replicas) == 0 {
			continue
		}
		from := random.IntN(len(w.registry.Replicas))
		w.places = newAtlas(map[string]Place{"20.0.0.0/8": {Coordinates: w.registry.Replicas[from].Location}})
		r := w.router()
		counts := map[string]int{}
		for i := range cells {
			p := netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0}), 24)
			counts[region(r, r.Decide(Client{Subnet: p}))]++
		}
		split := r.Shares()[from]
		if split.Nearest != w.registry.Replicas[from].Region {
			t.Fatalf("split of %s, want %s", split.Nearest, w.registry.Replicas[from].Region)
		}
		sum := 0.0
		for _, s := range split.Shares {
			p := s.Percent / 100
			if got := float64(counts[s.Region]) / cells; math.Abs(got-p) > 5*math.Sqrt(p*(1-p)/cells)+1e-4 {
				t.Errorf("seed %d: %s gets %.4f of the cells, want %.4f\n%v", seed, s.Region, got, p, w)
			}
			sum += s.Percent
			delete(counts, s.Region)
		}
		if len(split.Shares) > 0 && math.Abs(sum-100) > 1e-9 {
			t.Errorf("seed %d: the shares are %v percent together", seed, sum)
		}
		delete(counts, "")
		if len(counts) > 0 {
			t.Errorf("seed %d: %v get cells without a share", seed, counts)
		}
	}
}

// TestSharesExact: a weight of 90 hands exactly a tenth to the next.
func TestSharesExact(t *testing.T) {
	t.Parallel()
	registry, places, networks := world()
	registry.Replica("westeurope").Weight = 90
	split := routerOf(snapshot(registry), places, networks).At(0).Shares()[1]
	want := []Share{{"westeurope", 90}, {"westus", 10}}
	if split.Nearest != "westeurope" || !slices.Equal(split.Shares, want) {
		t.Errorf("%+v, want %+v", split, want)
	}
}

func TestPercentages(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ parts, want []float64 }{
		{nil, []float64{}},
		{[]float64{0, 0}, []float64{0, 0}},
		{[]float64{7}, []float64{100}},
		{[]float64{1, 1, 1}, []float64{33.34, 33.33, 33.33}},
		{[]float64{0.3, 0.7}, []float64{30, 70}},
		{[]float64{0.33, 0.2211, 0.148137, 0.300763}, []float64{33, 22.11, 14.81, 30.08}},
		{[]float64{0, 99999, 1}, []float64{0, 100, 0}},
		{[]float64{1, 1, 1, 1, 1, 1, 0}, []float64{16.67, 16.67, 16.67, 16.67, 16.66, 16.66, 0}},
	} {
		if got := Percentages(c.parts); !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, want %v", c.parts, got, c.want)
		}
	}
}

// TestSharesTie: of equal weights the nearest is the fallback, as in Decide.
func TestSharesTie(t *testing.T) {
	t.Parallel()
	registry, places, networks := world()
	for _, p := range registry.Replicas {
		p.Weight = 50
	}
	split := routerOf(snapshot(registry), places, networks).At(0).Shares()[1]
	want := []Share{{"westeurope", 62.5}, {"westus", 25}, {"southeastasia", 12.5}}
	if split.Nearest != "westeurope" || !slices.Equal(split.Shares, want) {
		t.Errorf("%+v, want %+v", split, want)
	}
}
