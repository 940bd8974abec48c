package router_test

import (
	"math/rand/v2"
	"net/netip"
	"testing"

	"portolan/router"
)

// TestScopeOnTheRealTable: also on the table of the whole world that comes with the program, every subnet inside of an answer's scope
// gets that same answer. Samples are taken all over both families, and close by the ends of scopes, where a fault would be.
func TestScopeOnTheRealTable(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(3, 4))
	r := chartedEight().With(router.Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: router.Unhealthy}}).At(0)
	// inside is the prefix of that length in scope whose further bits are random, or all ones or zeros.
	inside := func(scope netip.Prefix, bits int) netip.Prefix {
		b := scope.Addr().AsSlice()
		fill := random.IntN(3)
		for i := scope.Bits(); i < bits; i++ {
			if fill == 0 || fill == 1 && random.IntN(2) == 0 {
				b[i/8] |= 0x80 >> (i % 8)
			}
		}
		a, _ := netip.AddrFromSlice(b)
		return netip.PrefixFrom(a, bits)
	}
	scopes := make(map[int]bool)
	for n := range 20_000 {
		world, bits := netip.MustParsePrefix("0.0.0.0/0"), 24
		if n%4 == 0 {
			world, bits = netip.MustParsePrefix("2000::/3"), 48
		}
		client := inside(world, bits-random.IntN(9))
		d := r.Decide(router.Client{Subnet: client})
		scopes[d.Scope] = true
		if d.Scope == 0 || d.Scope > client.Addr().BitLen() {
			t.Fatalf("%v has scope %d", client, d.Scope)
		}
		scope, err := client.Addr().Prefix(d.Scope)
		if err != nil {
			t.Fatal(err)
		}
		for range 10 {
			other := inside(scope, max(d.Scope, bits)+random.IntN(client.Addr().BitLen()-max(d.Scope, bits)+1))
			if o := r.Decide(router.Client{Subnet: other}); o.Replica != d.Replica || o.Outcome != d.Outcome || o.Settled != d.Settled {
				t.Fatalf("%v gets %+v, but %v in its scope %+v", client, d, other, o)
			}
		}
	}
	if len(scopes) < 10 {
		t.Errorf("only %d lengths of scopes were seen", len(scopes))
	}
}
