package router_test

import (
	"context"
	"net/netip"
	"testing"

	"portolan/router"
	"portolan/router/geo"
	"portolan/topology"
)

// eight is a registry in eight regions, four with a weight.
func eight() *topology.Registry {
	r := &topology.Registry{Name: "contoso", Home: "westus"}
	for _, p := range []struct {
		region string
		lat    float64
		lon    float64
		weight int
	}{
		{"australiaeast", -33.86, 151.2, 100}, {"brazilsouth", -23.55, -46.63, 90}, {"eastus", 37.37, -79.82, 90}, {"japaneast", 35.68, 139.77, 100},
		{"northeurope", 53.35, -6.26, 90}, {"southafricanorth", -25.73, 28.22, 100}, {"westeurope", 52.37, 4.9, 90}, {"westus", 37.78, -122.42, 100},
	} {
		r.Replicas = append(r.Replicas, &topology.Replica{
			Region: p.region, Location: topology.Coordinates{Latitude: p.lat, Longitude: p.lon}, Weight: p.weight, Routing: true,
		})
	}
	r.Orders = []topology.Rule{{Match: topology.Match{Country: "DE"}, Regions: []string{"westeurope", "northeurope"}}}
	r.Fences = []topology.Rule{{Match: topology.Match{Prefix: netip.MustParsePrefix("203.0.113.0/24")}, Regions: []string{"eastus"}}}
	return r
}

// charted is the router of a registry.
func charted(registry *topology.Registry, places router.Locator) *router.Router {
	s := &topology.Snapshot{Registries: []*topology.Registry{registry}}
	charts, err := router.Chart(context.Background(), s, router.Sources{Places: places}, nil)
	if err != nil {
		panic(err) // the built-in table is in memory
	}
	return router.New(s, charts)
}

func chartedEight() *router.Router { return charted(eight(), geo.Builtin()) }

func TestDecideDoesNotAllocate(t *testing.T) {
	r := chartedEight().At(0)
	for _, c := range []router.Client{
		{Resolver: netip.MustParseAddr("8.8.8.8")},
		{Resolver: netip.MustParseAddr("2001:4860:4860::8888")},
		{Resolver: netip.MustParseAddr("8.8.8.8"), Subnet: netip.MustParsePrefix("130.149.7.0/24")},
		{Resolver: netip.MustParseAddr("8.8.8.8"), Subnet: netip.MustParsePrefix("2a02:2e0:3fe::/48")},
		{Resolver: netip.MustParseAddr("8.8.8.8"), Subnet: netip.MustParsePrefix("2002:808:800::/40")},
		{Resolver: netip.MustParseAddr("8.8.8.8"), Subnet: netip.MustParsePrefix("203.0.113.0/24")},
		{Resolver: netip.MustParseAddr("8.8.8.8"), Subnet: netip.MustParsePrefix("10.0.0.0/24")},
	} {
		if n := testing.AllocsPerRun(200, func() { r.Decide(c) }); n != 0 {
			t.Errorf("deciding for %+v allocates %v times", c, n)
		}
	}
}

// TestBuiltinWorld asks with the built-in table as clients of four continents.
func TestBuiltinWorld(t *testing.T) {
	t.Parallel()
	r := chartedEight().At(0)
	for subnet, want := range map[string]string{
		"133.11.0.0/24":     "japaneast",        // University of Tokyo
		"130.149.7.0/24":    "westeurope",       // Technical University of Berlin
		"200.160.2.0/24":    "brazilsouth",      // NIC.br
		"196.10.52.0/24":    "southafricanorth", // South Africa
		"139.130.4.0/24":    "australiaeast",    // Telstra
		"2400:2410::/48":    "japaneast",        // SoftBank
		"2001:200::/48":     "japaneast",        // WIDE
		"2001:67c:2e8::/48": "westeurope",       // RIPE NCC
	} {
		c := router.Client{Resolver: netip.MustParseAddr("127.0.0.1"), Subnet: netip.MustParsePrefix(subnet)}
		e := r.Explain(c)
		// The nearest one; that it may hand on some of its cells is tested elsewhere.
		if got := e.Candidates[0].Region; got != want {
			t.Errorf("%s: first choice %s, want %s: %+v", subnet, got, want, e)
		}
	}
}

func TestLargeRegistry(t *testing.T) {
	t.Parallel()
	registry := &topology.Registry{Name: "r", Home: "r000"}
	for i := range 200 {
		registry.Replicas = append(registry.Replicas, &topology.Replica{
			Region: "r" + string([]byte{byte('0' + i/100), byte('0' + i/10%10), byte('0' + i%10)}), Weight: 100, Routing: true,
			Location: topology.Coordinates{Latitude: float64(i%90) - 45, Longitude: float64(i)*1.7 - 170},
		})
	}
	r := charted(registry, geo.Builtin()).At(0)
	e := r.Explain(router.Client{Resolver: netip.MustParseAddr("8.8.8.8")})
	// The nearest eight by their distance; the others, by their distance from the first, are all farther than those.
	const nearest = 8
	for i := 1; i < len(e.Candidates); i++ {
		if before := e.Candidates[min(i, nearest)-1]; e.Candidates[i].Distance < before.Distance {
			t.Fatalf("%+v before %+v", before, e.Candidates[i])
		}
	}
	if len(e.Candidates) != 200 || e.Region != e.Candidates[0].Region {
		t.Errorf("%d candidates, chosen %s", len(e.Candidates), e.Region)
	}
}

func FuzzDecide(f *testing.F) {
	r := chartedEight().At(0)
	f.Add([]byte{8, 8, 8, 8}, []byte{130, 149, 7, 0}, 24)
	f.Add([]byte{}, []byte{}, 0)
	f.Add([]byte{10, 0, 0, 1}, netip.MustParseAddr("2002:808::").AsSlice(), 40)
	f.Add([]byte{10, 0, 0, 1}, netip.MustParseAddr("::ffff:8.8.8.8").AsSlice(), 97)
	f.Fuzz(func(t *testing.T, resolver, subnet []byte, bits int) {
		var c router.Client
		c.Resolver, _ = netip.AddrFromSlice(resolver)
		a, _ := netip.AddrFromSlice(subnet)
		c.Subnet = netip.PrefixFrom(a, bits)
		d := r.Decide(c)
		if e := r.Explain(c); e.Decision != d {
			t.Fatalf("%v: decided %+v, explained %+v", c, d, e.Decision)
		}
		if !c.Subnet.IsValid() || bits == 0 {
			if d.Scope != 0 {
				t.Fatalf("%v: scope %d", c, d.Scope)
			}
			return
		}
		if d.Scope <= 0 || d.Scope > a.BitLen() {
			t.Fatalf("%v: scope %d", c, d.Scope)
		}
		block, err := c.Subnet.Addr().Prefix(min(bits, d.Scope))
		if err != nil {
			t.Fatal(err)
		}
		if d.Scope > bits {
			return
		}
		if o := r.Decide(router.Client{Resolver: c.Resolver, Subnet: block}); o != d {
			t.Fatalf("%v gets %+v, its scope %v %+v", c, d, block, o)
		}
	})
}

func BenchmarkDecideBuiltin(b *testing.B) {
	r := chartedEight().At(0)
	b.ReportAllocs()
	for i := uint32(0); b.Loop(); i += 0x9e3779b1 {
		a := netip.AddrFrom4([4]byte{byte(i >> 24), byte(i >> 16), byte(i >> 8), 0})
		r.Decide(router.Client{Subnet: netip.PrefixFrom(a, 24)})
	}
}

func BenchmarkWith(b *testing.B) {
	r := chartedEight()
	c := router.Conditions{{Registry: "contoso", Region: "westus"}: {Health: router.Unhealthy}}
	b.ReportAllocs()
	for b.Loop() {
		r.With(c)
	}
}
