package router

import (
	"net/netip"

	"portolan/router/ranges"
)

// embedding says that addresses of a block carry an IPv4 address that says more of the client than the IPv6 one does;
// 0 for those that carry none.
type embedding uint8

const (
	// embedsBehind96 holds the IPv4 address in bits 96 to 127.
	embedsBehind96 embedding = 1 + iota
	// embedsBehind16 holds it in bits 16 to 47.
	embedsBehind16
)

// block is a part of the address space that the registries set aside: no ordinary client has an address of it.
type block struct {
	prefix netip.Prefix
	name   string
	embeds embedding
	// ordinary marks the part of IPv6 that clients live in.
	ordinary bool
}

// blocks are the IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890; as of 2025), without the anycast
// services in them that are globally reachable and announced like ordinary networks (192.31.196.0/24, 192.52.193.0/24,
// 192.175.48.0/24, 2620:4f:8000::/48), and with what else cannot be a client: multicast, and IPv6 outside of the global
// unicast space (RFC 4291, section 2.4). Single assignments inside 192.0.0.0/24, 2001::/23 and 240.0.0.0/4 are not told
// apart: none of them is a client's. No IPv4 block is longer than /24 and no block inside 2000::/3 longer than /48, so
// that a cell is never partly special.
var blocks = [...]block{
	0:  {}, // ordinary IPv4
	1:  {prefix: netip.MustParsePrefix("0.0.0.0/8"), name: `"this network" (RFC 791)`},
	2:  {prefix: netip.MustParsePrefix("10.0.0.0/8"), name: "private use (RFC 1918)"},
	3:  {prefix: netip.MustParsePrefix("100.64.0.0/10"), name: "shared address space (RFC 6598)"},
	4:  {prefix: netip.MustParsePrefix("127.0.0.0/8"), name: "loopback (RFC 1122)"},
	5:  {prefix: netip.MustParsePrefix("169.254.0.0/16"), name: "link local (RFC 3927)"},
	6:  {prefix: netip.MustParsePrefix("172.16.0.0/12"), name: "private use (RFC 1918)"},
	7:  {prefix: netip.MustParsePrefix("192.0.0.0/24"), name: "IETF protocol assignments (RFC 6890)"},
	8:  {prefix: netip.MustParsePrefix("192.0.2.0/24"), name: "documentation (RFC 5737)"},
	9:  {prefix: netip.MustParsePrefix("192.88.99.0/24"), name: "6to4 relay anycast (RFC 7526)"},
	10: {prefix: netip.MustParsePrefix("192.168.0.0/16"), name: "private use (RFC 1918)"},
	11: {prefix: netip.MustParsePrefix("198.18.0.0/15"), name: "benchmarking (RFC 2544)"},
	12: {prefix: netip.MustParsePrefix("198.51.100.0/24"), name: "documentation (RFC 5737)"},
	13: {prefix: netip.MustParsePrefix("203.0.113.0/24"), name: "documentation (RFC 5737)"},
	14: {prefix: netip.MustParsePrefix("224.0.0.0/4"), name: "multicast (RFC 5771)"},
	15: {prefix: netip.MustParsePrefix("240.0.0.0/4"), name: "reserved (RFC 1112)"},

	16: {prefix: netip.MustParsePrefix("::/3"), name: "not global unicast (RFC 4291)"},
	17: {prefix: netip.MustParsePrefix("2000::/3"), name: "global unicast (RFC 4291)", ordinary: true},
	18: {prefix: netip.MustParsePrefix("4000::/2"), name: "not allocated (RFC 4291)"},
	19: {prefix: netip.MustParsePrefix("8000::/1"), name: "not allocated (RFC 4291)"},
	20: {prefix: netip.MustParsePrefix("::/128"), name: "unspecified (RFC 4291)"},
	21: {prefix: netip.MustParsePrefix("::1/128"), name: "loopback (RFC 4291)"},
	22: {prefix: netip.MustParsePrefix("::ffff:0:0/96"), name: "IPv4-mapped (RFC 4291)", embeds: embedsBehind96},
	23: {prefix: netip.MustParsePrefix("64:ff9b::/96"), name: "NAT64 (RFC 6052)", embeds: embedsBehind96},
	24: {prefix: netip.MustParsePrefix("64:ff9b:1::/48"), name: "local-use translation (RFC 8215)"},
	25: {prefix: netip.MustParsePrefix("100::/64"), name: "discard only (RFC 6666)"},
	26: {prefix: netip.MustParsePrefix("100:0:0:1::/64"), name: "dummy prefix (RFC 9780)"},
	27: {prefix: netip.MustParsePrefix("2001::/23"), name: "IETF protocol assignments (RFC 2928)"},
	28: {prefix: netip.MustParsePrefix("2001:db8::/32"), name: "documentation (RFC 3849)"},
	29: {prefix: netip.MustParsePrefix("2002::/16"), name: "6to4 (RFC 3056)", embeds: embedsBehind16},
	30: {prefix: netip.MustParsePrefix("3fff::/20"), name: "documentation (RFC 9637)"},
	31: {prefix: netip.MustParsePrefix("5f00::/16"), name: "segment routing (RFC 9602)"},
	32: {prefix: netip.MustParsePrefix("fc00::/7"), name: "unique local (RFC 4193)"},
	33: {prefix: netip.MustParsePrefix("fe80::/10"), name: "link local (RFC 4291)"},
	34: {prefix: netip.MustParsePrefix("ff00::/8"), name: "multicast (RFC 4291)"},
}

// special maps every address to its block. It is never changed after the program started.
var special = func() *ranges.Table[uint8] {
	var entries []ranges.Entry[uint8]
	for i, b := range blocks[1:] {
		entries = append(entries, ranges.Entry[uint8]{Prefix: b.prefix, Value: uint8(i + 1)})
	}
	return ranges.New(entries)
}()

// blockOf is the block of a, already unembedded, and the length of the largest prefix around a that lies in it and in no
// block within it.
func blockOf(a netip.Addr) (b *block, prefixLen int) {
	i, prefixLen := special.Lookup(a)
	return &blocks[i], prefixLen
}

// unembed takes an IPv4 address out of an IPv4-mapped, NAT64 or 6to4 one. An IPv4 prefix of length n is one of length
// offset+n in a's own family. Other addresses, and IPv4 ones, are returned as they are, without their zone.
func unembed(a netip.Addr) (inner netip.Addr, offset int) {
	if !a.Is6() {
		return a, 0
	}
	a = a.WithZone("")
	i, _ := special.Lookup(a)
	b := a.As16()
	switch blocks[i].embeds {
	case embedsBehind96:
		return netip.AddrFrom4([4]byte(b[12:16])), 96
	case embedsBehind16:
		return netip.AddrFrom4([4]byte(b[2:6])), 16
	}
	return a, 0
}
