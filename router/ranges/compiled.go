package ranges

import (
	"math/bits"
	"net/netip"
	"runtime"
)

// Compiled is a Table in the form in which an address is found fastest. What that costs is waiting for memory: a table of a million
// ranges is in none of the nearer caches, least of all in those of a server that the kernel shares for its packets. So a look at an
// IPv4 address goes to one place for its block of 65,536, half of which have one value in all of them, and else to one more.
// Immutable and safe for concurrent use. The zero Compiled has the zero value everywhere.
type Compiled[V comparable] struct {
	// table has what is found by halving: IPv6, and IPv4 if there are no blocks.
	table Table[V]
	// blocks are the /16s of IPv4; nil if it has few ranges.
	blocks []block[V]
	// spans are the ranges that start within blocks, behind their first addresses, block after block.
	spans []span[V]
	// index6[i] counts the ranges of IPv6 that start at or before the first address whose leading index6Bits bits are i; nil for few.
	index6 []uint32
}

// block is what is known of a /16.
type block[V comparable] struct {
	value V // of its first address
	// first is the place of the first range that starts within it, and count how many do.
	first uint32
	count uint16
	// length is, if none does, that of the largest prefix around it which has one value.
	length uint8
}

// span is a range that starts within a block: with the last 16 bits of its first address. The value is beside them, since what is in
// another page of memory costs as much again.
type span[V comparable] struct {
	start uint16
	value V
}

const (
	// index6Bits are the leading bits by which IPv6 is entered. The allocations of the registries are /20s and longer, and the space
	// is mostly empty: 20 bits cost 4 MB and leave some hundred ranges to the fullest blocks.
	index6Bits = 20
	// fewRanges is for how many halving alone is as fast.
	fewRanges = 1 << 14
)

// Compile makes the form of t that is to be looked up. They share what stays as it is.
func (t *Table[V]) Compile() *Compiled[V] { return t.compile(fewRanges) }

// compile is Compile, where fewer ranges than few stay as they are.
func (t *Table[V]) compile(few int) *Compiled[V] {
	c := &Compiled[V]{table: *t}
	if len(t.low4) > 0 && len(t.low4) >= few {
		c.compile4(t)
		c.table.low4, c.table.value4 = nil, nil
	}
	if len(t.low6) > 0 && len(t.low6) >= few {
		c.compile6(t)
	}
	return c
}

func (c *Compiled[V]) compile4(t *Table[V]) {
	c.blocks = make([]block[V], 1<<16)
	c.spans = make([]span[V], 0, len(t.low4))
	n := 0 // ranges that start before the block or with it
	for i := range c.blocks {
		base := uint32(i) << 16
		if n < len(t.low4) && t.low4[n] == base {
			n++
		}
		b := &c.blocks[i]
		b.value, b.first = t.value4[n-1], uint32(len(c.spans))
		for ; n < len(t.low4) && t.low4[n]>>16 == uint32(i); n++ {
			c.spans = append(c.spans, span[V]{uint16(t.low4[n]), t.value4[n]})
			b.count++
		}
		if b.count == 0 {
			b.length = uint8(t.around4(base, n))
		}
	}
}

func (c *Compiled[V]) compile6(t *Table[V]) {
	c.index6 = make([]uint32, 0, 1<<index6Bits+1)
	n := 0
	for i := range uint64(1 << index6Bits) {
		for n < len(t.low6) && t.low6[n].compare(key{hi: i << (64 - index6Bits)}) <= 0 {
			n++
		}
		c.index6 = append(c.index6, uint32(n))
	}
	c.index6 = append(c.index6, uint32(len(t.low6)))
}

// Lookup returns the value of a and the length of the largest aligned prefix around a whose addresses all have it.
// An invalid address has the zero value. It does not allocate.
func (c *Compiled[V]) Lookup(a netip.Addr) (value V, prefixLen int) {
	switch {
	case a.Is4() && c.blocks != nil:
		return c.lookup4(key4(a))
	case a.Is6() && c.index6 != nil:
		k := key6(a)
		i := k.hi >> (64 - index6Bits)
		return c.table.lookup6(k, int(c.index6[i]), int(c.index6[i+1]))
	}
	return c.table.Lookup(a)
}

func (c *Compiled[V]) lookup4(k uint32) (value V, prefixLen int) {
	b := &c.blocks[k>>16]
	if b.count == 0 {
		return b.value, int(b.length)
	}
	spans, at := c.spans[b.first:b.first+uint32(b.count)], uint16(k)
	lo, hi := 0, len(spans) // the first that starts beyond k
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); spans[m].start <= at {
			lo = m + 1
		} else {
			hi = m
		}
	}
	// The prefix must not reach the last address before the range, nor the first one after it. One of them is in the block, and
	// matters more than any beyond it.
	value = b.value
	if lo > 0 {
		value = spans[lo-1].value
		prefixLen = 16 + bits.LeadingZeros16(at^(spans[lo-1].start-1)) + 1
	}
	if lo < len(spans) {
		prefixLen = max(prefixLen, 16+bits.LeadingZeros16(at^spans[lo].start)+1)
	}
	return value, prefixLen
}

// Place is an address that is going to be looked up in a table.
type Place[V comparable] struct {
	Table *Compiled[V]
	Addr  netip.Addr
	// next is where the second look into memory goes, if there is one.
	next uint32
	more bool
}

// Prefetch brings into the processor's caches what Lookup of the places is going to look at. A lookup waits for memory wherever it
// comes to; of many that do not depend on each other, a processor makes the waits at the same time (group prefetching: Chen, Ailamaki,
// Gibbons, Mowry, "Improving Hash Join Performance through Prefetching", ICDE 2004).
func Prefetch[V comparable](places []Place[V]) {
	var seen uint64 // what is read must be of use, or the compiler does not read it
	for i := range places {
		p := &places[i]
		p.more = false
		switch c := p.Table; {
		case p.Addr.Is4() && c.blocks != nil:
			k := key4(p.Addr)
			b := &c.blocks[k>>16]
			p.next, p.more = b.first+uint32(b.count)/2, b.count > 0
		case p.Addr.Is6() && c.index6 != nil:
			at := key6(p.Addr).hi >> (64 - index6Bits)
			lo, hi := c.index6[at], c.index6[at+1]
			p.next, p.more = (lo+hi)/2, lo < hi
		}
	}
	for i := range places {
		if p := &places[i]; p.more && p.Addr.Is4() {
			seen += uint64(p.Table.spans[p.next].start)
		} else if p.more {
			seen += p.Table.table.low6[p.next].hi
		}
	}
	runtime.KeepAlive(seen)
}

// Table is the table of which c was made, or one that is equal: for what walks through ranges. It may take a while.
func (c *Compiled[V]) Table() *Table[V] {
	t := c.table
	if c.blocks != nil {
		var b Builder[V]
		for i := range c.blocks {
			p := &c.blocks[i]
			base := uint32(i) << 16
			b.line4.add(base, p.value)
			for _, s := range c.spans[p.first : p.first+uint32(p.count)] {
				b.line4.add(base|uint32(s.start), s.value)
			}
		}
		t.low4, t.value4 = b.line4.all()
	}
	return &t
}
