package router

import (
	"encoding/hex"
	"testing"
)

// TestBucketGolden holds the encoding and the hash to figures of another implementation of XXH64. They must never be
// changed: whoever changes them moves clients in the middle of their pushes.
func TestBucketGolden(t *testing.T) {
	t.Parallel()
	tests := []struct {
		cell     Cell
		encoding string
		// The buckets at contoso's westus and westeurope, and at fabrikam's eu-west-1.
		buckets [3]int
	}{
		{Cell{Prefix: subnet("192.0.2.0/24")}, "04c000020018", [3]int{65, 75, 58}},
		{Cell{Prefix: subnet("8.8.8.0/24")}, "040808080018", [3]int{42, 27, 78}},
		{Cell{Prefix: subnet("8.8.0.0/16")}, "040808000010", [3]int{57, 99, 8}},
		{Cell{Prefix: subnet("2001:db8::/48")}, "0620010db800000000000000000000000030", [3]int{1, 22, 7}},
		{Cell{Prefix: subnet("2a00:1450::/32")}, "062a00145000000000000000000000000020", [3]int{0, 61, 52}},
		{Cell{ASN: 64500, Country: [2]byte{'N', 'L'}}, "0a0000fbf44e4c", [3]int{93, 75, 75}},
		{Cell{ASN: 4200000000}, "0afa56ea000000", [3]int{96, 72, 0}},
		{Cell{}, "00", [3]int{3, 2, 37}},
	}
	for _, tt := range tests {
		if got := hex.EncodeToString(tt.cell.append(nil)); got != tt.encoding {
			t.Errorf("cell %v is encoded as %s, want %s", tt.cell, got, tt.encoding)
		}
		got := [3]int{
			bucket(tt.cell, bucketTail("contoso", "westus")),
			bucket(tt.cell, bucketTail("contoso", "westeurope")),
			bucket(tt.cell, bucketTail("fabrikam", "eu-west-1")),
		}
		if got != tt.buckets {
			t.Errorf("cell %v has buckets %v, want %v", tt.cell, got, tt.buckets)
		}
	}
}

// TestCells pins which cell a client belongs to.
func TestCells(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name, resolver, subnet string
		noNetworks             bool
		want                   string
	}{
		{name: "subnet", resolver: "20.0.0.1", subnet: "30.1.2.0/24", want: "30.1.2.0/24"},
		{name: "longer subnet", resolver: "20.0.0.1", subnet: "30.1.2.77/32", want: "30.1.2.0/24"},
		{name: "shorter subnet", resolver: "20.0.0.1", subnet: "30.1.0.0/16", want: "30.1.0.0/24"},
		{name: "subnet of IPv6", resolver: "20.0.0.1", subnet: "2a00:1:2:3400::/56", want: "2a00:1:2::/48"},
		{name: "6to4 subnet", resolver: "20.0.0.1", subnet: "2002:1e01:0200::/48", want: "30.1.2.0/24"},
		{name: "private subnet", resolver: "20.1.2.3", subnet: "10.0.0.0/24", want: "AS64501/US"},
		{name: "resolver", resolver: "30.1.2.3", want: "AS64500/DE"},
		{name: "resolver over IPv6", resolver: "2a00:1::53", want: "AS64500/DE"},
		{name: "resolver of no known system", resolver: "30.2.2.3", want: "30.2.0.0/16"},
		{name: "no database of systems", resolver: "30.1.2.3", noNetworks: true, want: "30.1.0.0/16"},
		{name: "no database of systems, IPv6", resolver: "2a00:1:2::53", noNetworks: true, want: "2a00:1::/32"},
		{name: "private resolver", resolver: "10.1.2.3", want: "10.1.0.0/16"},
		{name: "nothing known", want: ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			registry, places, networks := world()
			router := routerOf(snapshot(registry), places, networks)
			if tt.noNetworks {
				router = routerOf(snapshot(registry), places, nil)
			}
			r := router.At(0)
			if got := r.Explain(Client{addr(tt.resolver), subnet(tt.subnet)}).Cell; got != tt.want {
				t.Errorf("cell %q, want %q", got, tt.want)
			}
		})
	}
}
