package router

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"net/netip"
	"testing"

	"portolan/topology"
)

// splitWorld is a small world: a west with two regions, an east with one, and a private network with an order of its own.
func splitWorld(t *testing.T, weight int, orders ...topology.Rule) *Registry {
	t.Helper()
	replica := func(region string, longitude float64, weight int) *topology.Replica {
		return &topology.Replica{Region: region, Location: topology.Coordinates{Longitude: longitude}, Weight: weight, Routing: true}
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{{
		Name: "r", Home: "west",
		Orders:   append(orders, topology.Rule{Match: topology.Match{Prefix: netip.MustParsePrefix("10.1.0.0/16")}, Regions: []string{"east"}}),
		Replicas: []*topology.Replica{replica("west", -10, weight), replica("mid", 0, 100), replica("east", 40, 100)},
	}}}
	places := newAtlas(map[string]Place{
		"20.0.0.0/16":       {Coordinates: topology.Coordinates{Longitude: -10}},
		"20.0.3.128/25":     {Coordinates: topology.Coordinates{Longitude: 40}}, // within a cell that begins elsewhere
		"20.1.0.0/17":       {Coordinates: topology.Coordinates{Longitude: 40}},
		"255.255.0.0/16":    {Coordinates: topology.Coordinates{Longitude: 40}}, // reserved: nobody's
		"2a00::/32":         {Coordinates: topology.Coordinates{Longitude: 40}},
		"223.255.255.0/24":  {Coordinates: topology.Coordinates{Longitude: 40}},
		"198.51.100.128/25": {Coordinates: topology.Coordinates{Longitude: 40}}, // documentation: nobody's
	})
	return routerOf(s, places, nil).At(0)
}

// What is counted over ranges is what Decide says of every cell.
func TestMoveCells(t *testing.T) {
	t.Parallel()
	inCell := topology.Rule{Match: topology.Match{Prefix: netip.MustParsePrefix("20.0.5.192/26")}, Regions: []string{"east"}}
	before, after := splitWorld(t, 100, inCell), splitWorld(t, 30, inCell)
	got, err := MoveCells(t.Context(), before, after)
	if err != nil {
		t.Fatal(err)
	}
	want := map[Move]uint64{}
	for _, p := range []string{"10.1.0.0/16", "20.0.0.0/16", "20.1.0.0/17", "223.255.255.0/24"} {
		for a := netip.MustParsePrefix(p).Addr(); netip.MustParsePrefix(p).Contains(a); {
			c := Client{Subnet: netip.PrefixFrom(a, 24)}
			region := func(r *Registry) string { return r.Topology().Replicas[r.Decide(c).Replica].Region }
			want[Move{From: region(before), To: region(after)}]++
			b := a.As4()
			a = address4(uint64(binary.BigEndian.Uint32(b[:])) + 256)
		}
	}
	counted := map[Move]uint64{}
	for _, m := range got {
		counted[Move{From: m.From, To: m.To}] = m.Count
	}
	if !maps.Equal(counted, want) {
		t.Errorf("counted %v, want %v", counted, want)
	}
	if n := want[Move{From: "west", To: "mid"}]; n < 150 || n > 210 { // 70 % of 256
		t.Errorf("%d of 256 cells leave a weight of 30", n)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := MoveCells(ctx, before, after); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits any more, and the error is %v", err)
	}
}

// No decision depends on what Coarse leaves out, and what is left names no single host.
func TestCoarse(t *testing.T) {
	t.Parallel()
	r := splitWorld(t, 50)
	random := rand.New(rand.NewPCG(1, 2))
	nets := []string{"20.0.0.0/16", "20.1.0.0/16", "10.1.0.0/16", "10.2.0.0/16", "2a00::/32", "2002:1400::/24", "::ffff:20.0.0.0/112", "64:ff9b::1400:0/112", "2002:a01::/32"}
	pick := func() netip.Addr {
		p := netip.MustParsePrefix(nets[random.IntN(len(nets))])
		b := p.Addr().AsSlice()
		for i := p.Bits() / 8; i < len(b); i++ {
			b[i] = byte(random.Uint32())
		}
		a, _ := netip.AddrFromSlice(b)
		return a
	}
	for range 20000 {
		c := Client{Resolver: pick().Unmap()}
		if random.IntN(3) > 0 {
			a := pick()
			c.Subnet, _ = a.Prefix(a.BitLen() - random.IntN(9))
		}
		coarse := r.Coarse(c)
		was, is := r.Decide(c), r.Decide(coarse)
		if was.Replica != is.Replica || was.Outcome != is.Outcome {
			t.Fatalf("%v is sent to %v, but %v to %v", c, was, coarse, is)
		}
		p := coarse.Subnet
		if !p.IsValid() {
			if at, _ := coarse.Resolver.Prefix(cellBits(coarse.Resolver)); at.Addr() != coarse.Resolver {
				t.Fatalf("%v names a host: %v", c, coarse)
			}
			continue
		}
		if p.Bits() > cellBits(p.Addr()) || p.Masked() != p || coarse.Resolver.IsValid() {
			t.Fatalf("%v names more than a cell: %v", c, coarse)
		}
	}
}
