package dns

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"testing"

	mdns "github.com/miekg/dns"

	"portolan/router"
	"portolan/topology"
)

// oneSystem is an autonomous system that has all addresses.
type oneSystem uint32

func (o oneSystem) Borders(is6 bool, visit func(netip.Addr, uint32) bool) error {
	if is6 {
		visit(netip.IPv6Unspecified(), uint32(o))
	} else {
		visit(netip.IPv4Unspecified(), uint32(o))
	}
	return nil
}

// The resolvers of one operator ask from many addresses, of both families, for A and AAAA, and tell nothing of their clients. Whatever the
// weights, all are led to one region: the layers of a push and its manifest, each looked up anew, go to one registry.
func TestResolverFarmGetsOneRegion(t *testing.T) {
	t.Parallel()
	const seed = 1
	random := rand.New(rand.NewPCG(seed, 0))
	regions := map[string]string{}
	pair := func(region string, at topology.Coordinates, four, six string) *topology.Replica {
		regions[four], regions[six] = region, region
		return replica(region, at, four, six)
	}
	registry := &topology.Registry{Name: "contoso", Home: "westus", Replicas: []*topology.Replica{
		pair("northeurope", topology.Coordinates{Latitude: 53.3, Longitude: -6.3}, "198.51.100.2", "2001:db8::2"),
		pair("westeurope", europe, "198.51.100.1", "2001:db8::1"),
		pair("westus", west, "192.0.2.1", "2001:db8::3"),
	}}
	conditions := router.Conditions{}
	for _, p := range registry.Replicas {
		conditions[key("contoso", p.Region)] = router.ReplicaCondition{Health: router.Healthy, Settled: true, Seeded: true}
	}
	egress := make([]netip.AddrPort, 64)
	for i := range egress {
		var a16 [16]byte
		binary.BigEndian.PutUint64(a16[:], 0x2a00<<48|random.Uint64()>>16)
		binary.BigEndian.PutUint64(a16[8:], random.Uint64())
		a := netip.AddrFrom16(a16)
		if i%2 == 0 {
			a = netip.AddrFrom4([4]byte{80, byte(random.Uint32()), byte(random.Uint32()), byte(random.Uint32())})
		}
		egress[i] = netip.AddrPortFrom(a, 53053)
	}
	s := newServer(t, nil)
	led := map[string]int{}
	for range 100 {
		for _, p := range registry.Replicas {
			p.Weight = random.IntN(101)
		}
		snapshot := &topology.Snapshot{Digest: "0123456789abcdef", Registries: []*topology.Registry{registry}}
		charts, err := router.Chart(context.Background(), snapshot, router.Sources{Places: places{}, Networks: oneSystem(64500 + random.IntN(1000)), Digest: "ba98765432100"}, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.Update(snapshot, router.New(snapshot, charts).With(conditions), conditions)
		first := ""
		for _, from := range egress {
			for _, qtype := range []uint16{mdns.TypeA, mdns.TypeAAAA} {
				a := answerOf(t, s, question("contoso.geo.example.net.", qtype), from)
				if len(a.Answer) != 1 {
					t.Fatalf("%s asks from %s: %v", mdns.TypeToString[qtype], from, a)
				}
				var region string
				switch rr := a.Answer[0].(type) {
				case *mdns.A:
					region = regions[rr.A.String()]
				case *mdns.AAAA:
					region = regions[rr.AAAA.String()]
				}
				if first == "" {
					first = region
				}
				if region == "" || region != first {
					t.Fatalf("%s from %s is led to %q, others to %s", mdns.TypeToString[qtype], from, region, first)
				}
			}
		}
		led[first]++
	}
	if len(led) != 3 {
		t.Errorf("the weights made no difference: %v", led)
	}
}
