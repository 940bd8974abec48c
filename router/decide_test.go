package router

import (
	"context"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"strings"
	"testing"
	"weak"

	"portolan/router/ranges"
	"portolan/topology"
)

// atlas is a Locator over a table of ranges.
type atlas struct {
	places []Place
	table  *ranges.Table[int]
}

func newAtlas(places map[string]Place) *atlas {
	a := &atlas{places: make([]Place, 1)}
	var entries []ranges.Entry[int]
	for p, place := range places {
		place.Located, place.Source = true, "test"
		entries = append(entries, ranges.Entry[int]{Prefix: netip.MustParsePrefix(p), Value: len(a.places)})
		a.places = append(a.places, place)
	}
	a.table = ranges.New(entries)
	return a
}

func (a *atlas) Locate(addr netip.Addr) Place {
	i, n := a.table.Lookup(addr)
	place := a.places[i]
	place.Network, _ = addr.Prefix(n)
	return place
}

// Borders implements Locator.
func (a *atlas) Borders(is6 bool, visit func(netip.Addr, int, *Place) bool) error {
	seen := map[int]int{}
	for from, i := range borders(a.table, is6) {
		number, place := NoPlace, (*Place)(nil)
		if i != 0 {
			var known bool
			if number, known = seen[i]; !known {
				number, place = len(seen), &a.places[i]
				seen[i] = number
			}
		}
		if !visit(from, number, place) {
			return nil
		}
	}
	return nil
}

// borders yields the ranges of one family.
func borders[V comparable](t *ranges.Table[V], is6 bool) func(func(netip.Addr, V) bool) {
	return func(yield func(netip.Addr, V) bool) {
		for from, v := range t.Ranges() {
			if from.Is6() == is6 && !yield(from, v) {
				return
			}
		}
	}
}

// routerOf charts a snapshot and puts it on its charts.
func routerOf(s *topology.Snapshot, places Locator, networks ASNLocator) *Router {
	return routerFrom(s, Sources{Places: places, Networks: networks})
}

func routerFrom(s *topology.Snapshot, sources Sources) *Router {
	charts, err := Chart(context.Background(), s, sources, nil)
	if err != nil {
		panic(err) // the databases of these tests are in memory
	}
	return New(s, charts)
}

// systems is an ASNLocator over a table of ranges.
type systems struct{ table *ranges.Table[uint32] }

func newSystems(of map[string]uint32) *systems {
	var entries []ranges.Entry[uint32]
	for p, asn := range of {
		entries = append(entries, ranges.Entry[uint32]{Prefix: netip.MustParsePrefix(p), Value: asn})
	}
	return &systems{ranges.New(entries)}
}

// Borders implements ASNLocator.
func (s *systems) Borders(is6 bool, visit func(netip.Addr, uint32) bool) error {
	for from, asn := range borders(s.table, is6) {
		if !visit(from, asn) {
			return nil
		}
	}
	return nil
}

var (
	amsterdam = topology.Coordinates{Latitude: 52.37, Longitude: 4.9}
	frankfurt = topology.Coordinates{Latitude: 50.11, Longitude: 8.68}
	berlin    = topology.Coordinates{Latitude: 52.52, Longitude: 13.4}
	dublin    = topology.Coordinates{Latitude: 53.35, Longitude: -6.26}
	sf        = topology.Coordinates{Latitude: 37.78, Longitude: -122.42}
	singapore = topology.Coordinates{Latitude: 1.35, Longitude: 103.82}
	newYork   = topology.Coordinates{Latitude: 40.71, Longitude: -74.01}
)

// world has a registry in three regions, and clients in four.
func world() (*topology.Registry, *atlas, *systems) {
	registry := &topology.Registry{
		Name: "contoso",
		Home: "westus",
		Replicas: []*topology.Replica{
			{Region: "southeastasia", Location: singapore, Weight: 100, Routing: true},
			{Region: "westeurope", Location: amsterdam, Weight: 100, Routing: true},
			{Region: "westus", Location: sf, Weight: 100, Routing: true},
		},
	}
	places := newAtlas(map[string]Place{
		"20.0.0.0/8":         {Coordinates: sf, Country: "US", Continent: "NA"},
		"20.16.0.0/12":       {Coordinates: newYork, Country: "US", Continent: "NA"},
		"30.0.0.0/8":         {Coordinates: berlin, Country: "DE", Continent: "EU"},
		"40.0.0.0/8":         {Coordinates: singapore, Country: "SG", Continent: "AS"},
		"50.1.2.128/25":      {Coordinates: berlin, Country: "DE", Continent: "EU"},
		"2a00::/16":          {Coordinates: berlin, Country: "DE", Continent: "EU"},
		"2a00:1:2:8000::/49": {Coordinates: singapore, Country: "SG", Continent: "AS"},
	})
	networks := newSystems(map[string]uint32{"30.1.0.0/16": 64500, "2a00:1::/32": 64500, "20.1.0.0/16": 64501})
	return registry, places, networks
}

// snapshot is a snapshot of one registry.
func snapshot(r *topology.Registry) *topology.Snapshot {
	return &topology.Snapshot{Registries: []*topology.Registry{r}}
}

func addr(s string) netip.Addr {
	if s == "" {
		return netip.Addr{}
	}
	return netip.MustParseAddr(s)
}

func subnet(s string) netip.Prefix {
	if s == "" {
		return netip.Prefix{}
	}
	return netip.MustParsePrefix(s)
}

func region(r *Registry, d Decision) string {
	if d.Replica < 0 {
		return ""
	}
	return r.Topology().Replicas[d.Replica].Region
}

func rules(match topology.Match, regions string) []topology.Rule {
	return []topology.Rule{{Match: match, Regions: strings.Split(regions, ",")}}
}

func TestDecide(t *testing.T) {
	t.Parallel()
	unhealthy := func(regions ...string) Conditions {
		c := Conditions{}
		for _, r := range regions {
			c[ReplicaKey{Registry: "contoso", Region: r}] = ReplicaCondition{Health: Unhealthy, Settled: true, Seeded: true}
		}
		return c
	}
	tests := []struct {
		name       string
		edit       func(*topology.Registry)
		conditions Conditions
		resolver   string
		subnet     string
		region     string
		outcome    Outcome
		scope      int
		unsettled  bool
	}{
		{name: "subnet", resolver: "20.0.0.1", subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "resolver", resolver: "40.0.0.1", region: "southeastasia", outcome: Kept},
		{name: "resolver with a zone", resolver: "2a00::1%eth0", region: "westeurope", outcome: Kept},
		{name: "source zero", resolver: "40.0.0.1", subnet: "0.0.0.0/0", region: "southeastasia", outcome: Kept},
		{name: "source zero of IPv6", resolver: "40.0.0.1", subnet: "::/0", region: "southeastasia", outcome: Kept},
		{name: "private subnet", resolver: "40.0.0.1", subnet: "10.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 8},
		{name: "loopback subnet", resolver: "40.0.0.1", subnet: "127.0.0.0/24", region: "southeastasia", outcome: Kept, scope: 8},
		{name: "multicast subnet", resolver: "40.0.0.1", subnet: "230.0.0.0/24", region: "southeastasia", outcome: Kept, scope: 4},
		{name: "unique local subnet", resolver: "40.0.0.1", subnet: "fd00:1::/48", region: "southeastasia", outcome: Kept, scope: 7},
		{name: "loopback of IPv6", resolver: "40.0.0.1", subnet: "::1/128", region: "southeastasia", outcome: Kept, scope: 128},
		{name: "mapped", resolver: "20.0.0.1", subnet: "::ffff:30.1.2.0/120", region: "westeurope", outcome: Kept, scope: 104},
		{name: "mapped, private", resolver: "40.0.0.1", subnet: "::ffff:192.168.2.0/120", region: "southeastasia", outcome: Kept, scope: 112},
		{name: "6to4", resolver: "20.0.0.1", subnet: "2002:1e01:0200::/40", region: "westeurope", outcome: Kept, scope: 24},
		{name: "NAT64", resolver: "20.0.0.1", subnet: "64:ff9b::1e01:200/120", region: "westeurope", outcome: Kept, scope: 104},
		{name: "mapped resolver", resolver: "::ffff:30.0.0.1", region: "westeurope", outcome: Kept},
		{name: "subnet in no entry: home", resolver: "40.0.0.1", subnet: "60.1.2.0/24", region: "westus", outcome: Kept, scope: 4},
		{name: "private resolver: home", resolver: "192.168.1.1", region: "westus", outcome: Kept},
		{name: "no resolver: home", region: "westus", outcome: Kept},
		{name: "home is down: what is near to it", resolver: "192.168.1.1", conditions: unhealthy("westus"), region: "westeurope", outcome: Kept},
		{name: "unlocated: home first, though another stands there", resolver: "192.168.1.1", edit: func(r *topology.Registry) {
			r.Replicas[0].Location = sf
		}, region: "westus", outcome: Kept},
		{name: "entries longer than the cell do not tear it apart", resolver: "40.0.0.1", subnet: "50.1.2.192/26", region: "westus", outcome: Kept, scope: 4},
		{name: "nor in IPv6", resolver: "40.0.0.1", subnet: "2a00:1:2:8000::/56", region: "westeurope", outcome: Kept, scope: 16},
		{name: "a source shorter than the entry", resolver: "40.0.0.1", subnet: "20.16.0.0/10", region: "westus", outcome: Kept, scope: 8},

		{name: "next nearest", conditions: unhealthy("westeurope"), subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "all down: nearest", conditions: unhealthy("westeurope", "westus", "southeastasia"), subnet: "30.1.2.0/24", region: "westeurope", outcome: AllDownNearest, scope: 8, unsettled: true},
		{name: "all down: none", conditions: unhealthy("westeurope", "westus", "southeastasia"), edit: func(r *topology.Registry) {
			r.Policy.AllDown.Mode = topology.AllDownNone
		}, subnet: "30.1.2.0/24", outcome: AllDownNone, scope: 8, unsettled: true},
		{name: "all down: a name", conditions: unhealthy("westeurope", "westus", "southeastasia"), edit: func(r *topology.Registry) {
			r.Policy.AllDown = topology.AllDown{Mode: topology.AllDownCNAME, Target: "other.example."}
		}, subnet: "30.1.2.0/24", outcome: AllDownCNAME, scope: 8, unsettled: true},
		{name: "routing disabled", edit: func(r *topology.Registry) { r.Replica("westeurope").Routing = false }, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "leaving, whatever its routing says", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Healthy, Settled: true, Seeded: true, Leaving: true}},
			subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "leaving, and all others are down", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Leaving: true, Settled: true},
			{Registry: "contoso", Region: "westus"}: {Health: Unhealthy, Settled: true}, {Registry: "contoso", Region: "southeastasia"}: {Health: Unhealthy, Settled: true}},
			subnet: "30.1.2.0/24", region: "westus", outcome: AllDownNearest, scope: 8, unsettled: true},
		{name: "lagging", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Healthy, Settled: true, Lagging: true}},
			subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "lagging, and all others are down", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Healthy, Settled: true, Lagging: true},
			{Registry: "contoso", Region: "westus"}: {Health: Unhealthy, Settled: true}, {Registry: "contoso", Region: "southeastasia"}: {Health: Unhealthy, Settled: true}},
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "all lag", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Settled: true, Lagging: true},
			{Registry: "contoso", Region: "westus"}: {Settled: true, Lagging: true}, {Registry: "contoso", Region: "southeastasia"}: {Settled: true, Lagging: true}},
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "weight zero", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 0 }, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "weight zero when all others are down", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 0 },
			conditions: unhealthy("westus", "southeastasia"), subnet: "30.1.2.0/24", region: "westus", outcome: AllDownNearest, scope: 8, unsettled: true},
		{name: "no candidate", edit: func(r *topology.Registry) {
			for _, p := range r.Replicas {
				p.Routing = false
			}
		}, subnet: "30.1.2.0/24", outcome: NoCandidate, scope: 8},
		{name: "not seeded: home only", edit: func(r *topology.Registry) { r.Policy.Replication = true }, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "seeded", edit: func(r *topology.Registry) { r.Policy.Replication = true },
			conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Healthy, Settled: true, Seeded: true}}, subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "weight narrows the scope to the cell", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 99 },
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 24},
		{name: "weight that was not consulted", edit: func(r *topology.Registry) { r.Replica("westus").Weight = 99 },
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "weight narrows to the cell also a short source", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 99 },
			subnet: "30.0.0.0/8", region: "westeurope", outcome: Kept, scope: 24},
		{name: "weight and 6to4", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 99 },
			subnet: "2002:1e01:0200::/40", region: "westeurope", outcome: Kept, scope: 40},
		{name: "unsettled", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Healthy}}, subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8, unsettled: true},
		{name: "unsettled behind the chosen", conditions: Conditions{{Registry: "contoso", Region: "westus"}: {Health: Healthy}}, subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "unsettled before the chosen", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Unhealthy}}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8, unsettled: true},

		{name: "order by country", edit: func(r *topology.Registry) { r.Orders = rules(topology.Match{Country: "DE"}, "southeastasia") },
			subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 8},
		{name: "order by country of others", edit: func(r *topology.Registry) { r.Orders = rules(topology.Match{Country: "FR"}, "southeastasia") },
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "behind the order by distance", edit: func(r *topology.Registry) { r.Orders = rules(topology.Match{Country: "DE"}, "southeastasia") },
			conditions: unhealthy("southeastasia"), subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "country before continent", edit: func(r *topology.Registry) {
			r.Orders = append(rules(topology.Match{Continent: "EU"}, "westus"), rules(topology.Match{Country: "DE"}, "southeastasia")...)
		}, subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 8},
		{name: "ASN before country", edit: func(r *topology.Registry) {
			r.Orders = append(rules(topology.Match{Country: "DE"}, "southeastasia"), rules(topology.Match{ASN: 64500}, "westus")...)
		}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 16},
		{name: "ASN of others narrows too", edit: func(r *topology.Registry) { r.Orders = rules(topology.Match{ASN: 64500}, "westus") },
			subnet: "30.2.2.0/24", region: "westeurope", outcome: Kept, scope: 15},
		{name: "prefix before ASN", edit: func(r *topology.Registry) {
			r.Orders = append(rules(topology.Match{ASN: 64500}, "westus"), rules(topology.Match{Prefix: subnet("30.1.0.0/20")}, "southeastasia")...)
		}, subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 20},
		{name: "the longest prefix", edit: func(r *topology.Registry) {
			r.Orders = append(rules(topology.Match{Prefix: subnet("30.1.2.128/25")}, "westus"), rules(topology.Match{Prefix: subnet("30.1.0.0/20")}, "southeastasia")...)
		}, subnet: "30.1.2.128/26", region: "westus", outcome: Kept, scope: 25},
		{name: "beside a longer prefix", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("30.1.2.128/25")}, "westus")
		},
			subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 25},
		{name: "a private prefix of the operator", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("10.1.0.0/16")}, "southeastasia")
		}, resolver: "30.0.0.1", subnet: "10.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 16},
		{name: "beside a private prefix of the operator", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("10.1.0.0/16")}, "southeastasia")
		}, resolver: "30.0.0.1", subnet: "10.2.2.0/24", region: "westeurope", outcome: Kept, scope: 15},
		{name: "a private resolver in a prefix of the operator", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("10.1.0.0/16")}, "southeastasia")
		}, resolver: "10.1.0.1", region: "southeastasia", outcome: Kept},
		{name: "a mapped prefix of the operator", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("::ffff:30.1.0.0/112")}, "southeastasia")
		}, subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 16},
		{name: "a 6to4 prefix of the operator", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("2002:1e01::/32")}, "southeastasia")
		}, subnet: "2002:1e01:0200::/40", region: "southeastasia", outcome: Kept, scope: 32},
		{name: "all of 6to4 is not all of IPv4", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("2002::/16")}, "southeastasia")
		}, subnet: "30.1.2.0/24", region: "westeurope", outcome: Kept, scope: 8},
		{name: "nor is all of NAT64", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Prefix: subnet("64:ff9b::/96")}, "southeastasia")
		}, subnet: "64:ff9b::1e01:200/120", region: "westeurope", outcome: Kept, scope: 104},

		{name: "an order by prefix, a fence by ASN", edit: func(r *topology.Registry) {
			r.Orders = rules(topology.Match{Prefix: subnet("30.1.0.0/16")}, "southeastasia")
			r.Fences = rules(topology.Match{ASN: 64500}, "westus")
		}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 16},
		{name: "a fence by prefix, an order by ASN", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Prefix: subnet("30.1.0.0/16")}, "southeastasia,westus")
			r.Orders = rules(topology.Match{ASN: 64500}, "westus")
		}, resolver: "30.1.0.1", region: "westus", outcome: Kept},

		{name: "fence", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Continent: "EU"}, "westus,southeastasia")
		}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 8},
		{name: "fence stops an order", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Continent: "EU"}, "westus")
			r.Orders = rules(topology.Match{Prefix: subnet("30.1.0.0/16")}, "southeastasia")
		}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 16},
		{name: "fence binds when all in it are down", edit: func(r *topology.Registry) { r.Fences = rules(topology.Match{Continent: "EU"}, "westus") },
			conditions: unhealthy("westus"), subnet: "30.1.2.0/24", region: "westus", outcome: AllDownNearest, scope: 8, unsettled: true},
		{name: "fence around nothing", edit: func(r *topology.Registry) { r.Fences = rules(topology.Match{Continent: "EU"}, "eastus") },
			subnet: "30.1.2.0/24", outcome: NoCandidate, scope: 8},
		{name: "the inner fence", edit: func(r *topology.Registry) {
			r.Fences = append(rules(topology.Match{Continent: "EU"}, "westus"), rules(topology.Match{Country: "DE"}, "southeastasia")...)
		}, subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 8},
		{name: "an order's prefix within a fence's", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Prefix: subnet("30.0.0.0/12")}, "westus,southeastasia")
			r.Orders = rules(topology.Match{Prefix: subnet("30.1.0.0/16")}, "southeastasia")
		}, subnet: "30.1.2.0/24", region: "southeastasia", outcome: Kept, scope: 16},
		{name: "a fence's prefix around an order's", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Prefix: subnet("30.0.0.0/12")}, "westus")
			r.Orders = rules(topology.Match{Prefix: subnet("30.1.0.0/16")}, "southeastasia")
		}, subnet: "30.1.2.0/24", region: "westus", outcome: Kept, scope: 16},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			registry, places, networks := world()
			if tt.edit != nil {
				tt.edit(registry)
			}
			r, ok := routerOf(snapshot(registry), places, networks).With(tt.conditions).Registry("contoso")
			if !ok {
				t.Fatal("no registry contoso")
			}
			c := Client{Resolver: addr(tt.resolver), Subnet: subnet(tt.subnet)}
			d := r.Decide(c)
			if region(r, d) != tt.region || d.Outcome != tt.outcome || d.Scope != tt.scope || d.Settled == tt.unsettled {
				t.Errorf("got %q %v scope %d settled %v, want %q %v scope %d settled %v",
					region(r, d), d.Outcome, d.Scope, d.Settled, tt.region, tt.outcome, tt.scope, !tt.unsettled)
			}
			e := r.Explain(c)
			if e.Decision != d || e.Region != tt.region || e.Sentence == "" || len(e.Candidates) != len(registry.Replicas) {
				t.Errorf("the explanation differs: %+v", e)
			}
		})
	}
}

// TestRampUnsettles: as long as the weight of a replica changes, those answers are short-lived that a step may change: those that
// name it or pass it over, from the start at 0.
func TestRampUnsettles(t *testing.T) {
	t.Parallel()
	for region, settled := range map[string]bool{"westeurope": false, "southeastasia": true} {
		for _, weight := range []int{0, 99} {
			registry, places, networks := world()
			registry.Replica(region).Weight = weight
			s := snapshot(registry)
			s.Ramps = []topology.Ramp{{Registry: "contoso", Region: region, From: weight, To: 100}, {Registry: "adatum", Region: "southeastasia"}}
			r := routerOf(s, places, networks).At(0)
			c := Client{Subnet: subnet("30.1.2.0/24")} // near to westeurope
			if d := r.Decide(c); d.Settled != settled {
				t.Errorf("%s at %d: %+v, want settled %v", region, weight, d, settled)
			}
			if e := r.Explain(c); e.Settled != settled {
				t.Errorf("%s at %d: explained as %+v", region, weight, e)
			}
		}
	}
}

// TestManyRules: there may be more rules than 16 bits count.
func TestManyRules(t *testing.T) {
	t.Parallel()
	registry, places, networks := world()
	for i := range 1<<16 + 10 {
		registry.Orders = append(registry.Orders, topology.Rule{Match: topology.Match{ASN: uint32(100_000 + i)}, Regions: []string{"westus"}})
	}
	registry.Orders = append(registry.Orders, topology.Rule{Match: topology.Match{Country: "DE"}, Regions: []string{"southeastasia"}})
	r := routerOf(snapshot(registry), places, networks).At(0)
	if d := r.Decide(Client{Subnet: subnet("30.1.2.0/24")}); region(r, d) != "southeastasia" {
		t.Errorf("got %q %+v, want southeastasia, which the last rule names", region(r, d), d)
	}
}

// TestPrefetchKeepsNothing: the table that was made ready is not kept when it is replaced.
func TestPrefetchKeepsNothing(t *testing.T) {
	t.Parallel()
	var p Prefetch
	client := Client{Resolver: netip.MustParseAddr("8.8.8.8")}
	r := newTrial(rand.New(rand.NewPCG(1, 2))).router()
	for range 32 {
		p.Add(r, client)
	}
	p.Run()
	former := weak.Make(r.chart.table)
	r = newTrial(rand.New(rand.NewPCG(3, 4))).router()
	p.Add(r, client)
	p.Run()
	runtime.GC()
	if former.Value() != nil {
		t.Error("the former table is still there")
	}
	runtime.KeepAlive(&p)
}
