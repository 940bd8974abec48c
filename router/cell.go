package router

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math"
	"math/bits"
	"net/netip"

	"github.com/cespare/xxhash/v2"
)

// The lengths of cells. With ECS: the prefixes that RFC 7871, section 11.1 recommends resolvers to send (/24; its /56
// is more than routing tables tell apart, and many resolvers send /48). Without: what one operator's resolvers lie in.
const (
	subnetCell4   = 24
	subnetCell6   = 48
	resolverCell4 = 16
	resolverCell6 = 32
)

// Cell is the unit of clients that weights divide: all of a cell draw the same lots. The clients of a subnet's cell have one
// place, too, and are all sent to one region; resolvers of one cell are each sent by their own place. Exactly one of its two
// forms is used. The zero Cell is the one of clients of which nothing is known.
type Cell struct {
	// Prefix is the /24 or /48 of the client's address, or the /16 or /32 of its resolver's.
	Prefix netip.Prefix
	// ASN and Country are those of the resolver, where its autonomous system is known.
	ASN     uint32
	Country [2]byte // ISO 3166-1 alpha-2; zero: unknown
}

// String is the prefix, or "AS64500/NL".
func (c Cell) String() string {
	switch {
	case c.Prefix.IsValid():
		return c.Prefix.String()
	case c.ASN != 0:
		return fmt.Sprintf("AS%d/%s", c.ASN, bytes.TrimRight(c.Country[:], "\x00"))
	}
	return ""
}

// cellSize is the longest encoding of a cell.
const cellSize = 18

// append writes the fixed encoding of c behind b:
//
//	IPv4 prefix   0x04, four bytes of address, length
//	IPv6 prefix   0x06, sixteen bytes of address, length
//	ASN, country  0x0a, four bytes of ASN, big-endian, two letters (0 0 if unknown)
//	nothing       0x00
func (c Cell) append(b []byte) []byte {
	switch {
	case c.Prefix.IsValid() && c.Prefix.Addr().Is4():
		a := c.Prefix.Addr().As4()
		b = append(append(b, 0x04), a[:]...)
		return append(b, byte(c.Prefix.Bits()))
	case c.Prefix.IsValid():
		a := c.Prefix.Addr().As16()
		b = append(append(b, 0x06), a[:]...)
		return append(b, byte(c.Prefix.Bits()))
	case c.ASN != 0:
		b = binary.BigEndian.AppendUint32(append(b, 0x0a), c.ASN)
		return append(b, c.Country[:]...)
	}
	return append(b, 0x00)
}

// NextCell is a if it is the first address of a subnet's cell, else the first of the next one; invalid if there is none. A
// cell has the place of its first address, so that it is never torn apart by a database that knows more than /24 or /48.
func NextCell(a netip.Addr) netip.Addr {
	if a.Is4() {
		b := a.As4()
		const size = 1 << (32 - subnetCell4)
		k := uint64(binary.BigEndian.Uint32(b[:]))
		if k%size == 0 {
			return a
		}
		if k = (k/size + 1) * size; k > math.MaxUint32 {
			return netip.Addr{}
		}
		binary.BigEndian.PutUint32(b[:], uint32(k))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	const size = 1 << (64 - subnetCell6)
	k := binary.BigEndian.Uint64(b[:8])
	if k%size == 0 && binary.BigEndian.Uint64(b[8:]) == 0 {
		return a
	}
	if k = (k/size + 1) * size; k == 0 {
		return netip.Addr{}
	}
	binary.BigEndian.PutUint64(b[:8], k)
	binary.BigEndian.PutUint64(b[8:], 0)
	return netip.AddrFrom16(b)
}

// bucketTail is what follows the cell in the hashed text: the names, each with a zero byte behind it.
func bucketTail(registry, region string) string { return registry + "\x00" + region + "\x00" }

// bucket is the cell's lot at one replica, 0 to 99: the replica keeps the cell if it is below its weight. It is the XXH64
// hash (seed 0) of the encoded cell followed by tail, scaled down by a multiplication: floor(hash * 100 / 2^64). It must
// never change: pushes in flight and all servers rely on it.
func bucket(c Cell, tail string) int {
	// Two labels of at most 63 bytes and their zero bytes; longer ones merely allocate.
	var text [cellSize + 2*64]byte
	high, _ := bits.Mul64(xxhash.Sum64(append(c.append(text[:0]), tail...)), 100)
	return int(high)
}
