package router

import (
	"net/netip"
	"testing"
)

// TestBlocks pins which addresses can be clients, one on each side of every border.
func TestBlocks(t *testing.T) {
	t.Parallel()
	tests := []struct {
		addr    string
		clients bool
	}{
		{"0.255.255.255", false}, {"1.0.0.0", true},
		{"9.255.255.255", true}, {"10.0.0.0", false}, {"10.255.255.255", false}, {"11.0.0.0", true},
		{"100.63.255.255", true}, {"100.64.0.0", false}, {"100.127.255.255", false}, {"100.128.0.0", true},
		{"126.255.255.255", true}, {"127.0.0.0", false}, {"127.255.255.255", false}, {"128.0.0.0", true},
		{"169.253.255.255", true}, {"169.254.0.0", false}, {"169.254.255.255", false}, {"169.255.0.0", true},
		{"172.15.255.255", true}, {"172.16.0.0", false}, {"172.31.255.255", false}, {"172.32.0.0", true},
		{"191.255.255.255", true}, {"192.0.0.0", false}, {"192.0.0.255", false}, {"192.0.1.0", true},
		{"192.0.1.255", true}, {"192.0.2.0", false}, {"192.0.2.255", false}, {"192.0.3.0", true},
		{"192.88.98.255", true}, {"192.88.99.0", false}, {"192.88.99.255", false}, {"192.88.100.0", true},
		{"192.167.255.255", true}, {"192.168.0.0", false}, {"192.168.255.255", false}, {"192.169.0.0", true},
		{"198.17.255.255", true}, {"198.18.0.0", false}, {"198.19.255.255", false}, {"198.20.0.0", true},
		{"198.51.99.255", true}, {"198.51.100.0", false}, {"198.51.100.255", false}, {"198.51.101.0", true},
		{"203.0.112.255", true}, {"203.0.113.0", false}, {"203.0.113.255", false}, {"203.0.114.0", true},
		{"223.255.255.255", true}, {"224.0.0.0", false}, {"239.255.255.255", false}, {"240.0.0.0", false}, {"255.255.255.255", false},
		// Anycast services that are announced like ordinary networks.
		{"192.31.196.1", true}, {"192.52.193.1", true}, {"192.175.48.1", true}, {"2620:4f:8000::1", true},

		{"::", false}, {"::1", false}, {"::2", false}, {"64:ff9b:1::", false}, {"100::", false}, {"1fff:ffff::", false},
		{"2000::", true}, {"2000:ffff:ffff:ffff:ffff:ffff:ffff:ffff", true}, {"2001::", false}, {"2001:1ff:ffff::", false}, {"2001:200::", true},
		{"2001:db7:ffff::", true}, {"2001:db8::", false}, {"2001:db8:ffff:ffff::", false}, {"2001:db9::", true},
		{"3ffe:ffff::", true}, {"3fff::", false}, {"3fff:fff:ffff::", false}, {"3fff:1000::", true}, {"3fff:ffff::", true},
		{"4000::", false}, {"5f00::", false}, {"8000::", false}, {"fbff::", false}, {"fc00::", false}, {"fdff::", false}, {"fe80::", false}, {"fec0::", false}, {"ff02::1", false},

		{"::ffff:8.8.8.8", true}, {"::ffff:10.0.0.1", false}, {"64:ff9b::808:808", true}, {"64:ff9b::a00:1", false}, {"2002:808:808::1", true}, {"2002:a00:1::1", false},
	}
	for _, tt := range tests {
		a, _ := unembed(netip.MustParseAddr(tt.addr))
		b, _ := blockOf(a)
		if clients := b.ordinary || b == &blocks[0]; clients != tt.clients {
			t.Errorf("%s: clients %v (%s), want %v", tt.addr, clients, b.name, tt.clients)
		}
	}
	for _, b := range blocks[1:] {
		if b.prefix != b.prefix.Masked() || b.name == "" {
			t.Errorf("block %v (%s)", b.prefix, b.name)
		}
		global := netip.MustParsePrefix("2000::/3").Contains(b.prefix.Addr())
		if b.prefix.Addr().Is4() && b.prefix.Bits() > subnetCell4 || global && b.prefix.Bits() > subnetCell6 {
			t.Errorf("block %v is longer than a cell", b.prefix)
		}
	}
}
