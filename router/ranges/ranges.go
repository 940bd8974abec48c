// Package ranges keeps one value for every IP address, as sorted disjoint ranges. A Table is what they are built, combined and walked
// through in; Compiled is what is looked up for every query.
//
// Both answer two questions at once: which value an address has, and how wide the largest aligned prefix around it is
// whose addresses all have that value. The second is what the scope of an EDNS Client Subnet answer is made of
// (RFC 7871, section 7.2.1). IPv4 and IPv6 are two separate lines: an IPv4-mapped IPv6 address is an IPv6 address here.
//
// The package knows neither places nor registries, and does no I/O.
package ranges

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"iter"
	"math/bits"
	"net/netip"
	"slices"
)

// Entry gives the addresses of Prefix a value.
type Entry[V comparable] struct {
	Prefix netip.Prefix
	Value  V
}

// Table is immutable and safe for concurrent use. The zero Table has the zero value everywhere.
type Table[V comparable] struct {
	// Range i of a family goes from low[i] to the address before low[i+1], the last one to the family's end. low[0] is
	// the family's first address. Neighbours differ in value.
	low4   []uint32
	value4 []V
	low6   []key
	value6 []V
}

// key is an IPv6 address as a number.
type key struct{ hi, lo uint64 }

func (k key) compare(o key) int {
	if c := cmp.Compare(k.hi, o.hi); c != 0 {
		return c
	}
	return cmp.Compare(k.lo, o.lo)
}

// common counts the leading bits that k and o share.
func (k key) common(o key) int {
	if x := k.hi ^ o.hi; x != 0 {
		return bits.LeadingZeros64(x)
	}
	return 64 + bits.LeadingZeros64(k.lo^o.lo)
}

func key6(a netip.Addr) key {
	b := a.As16()
	return key{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:])}
}

func (k key) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.AddrFrom16(b)
}

func key4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func addr4(k uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(k >> 24), byte(k >> 16), byte(k >> 8), byte(k)})
}

// New compiles entries. An address has the value of the longest prefix that holds it, and the zero value where none
// does; of two entries of the same prefix the later one counts. Invalid prefixes are ignored.
func New[V comparable](entries []Entry[V]) *Table[V] {
	sorted := make([]Entry[V], 0, len(entries))
	for _, e := range entries {
		if e.Prefix.IsValid() {
			sorted = append(sorted, Entry[V]{e.Prefix.Masked(), e.Value})
		}
	}
	// By family, then by first address, the wider one first: every prefix comes after those that hold it.
	slices.SortStableFunc(sorted, func(a, b Entry[V]) int {
		if c := cmp.Compare(a.Prefix.Addr().BitLen(), b.Prefix.Addr().BitLen()); c != 0 {
			return c
		}
		if c := a.Prefix.Addr().Compare(b.Prefix.Addr()); c != 0 {
			return c
		}
		return cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits())
	})
	var b Builder[V]
	for _, is6 := range []bool{false, true} {
		b.flatten(sorted, is6)
	}
	return b.Table()
}

// FromRanges makes a table of ranges as Ranges yields them: the first address of each and its value, IPv4 before IPv6,
// ascending, starting with each family's first address. It fails if they are not.
func FromRanges[V comparable](all iter.Seq2[netip.Addr, V]) (*Table[V], error) {
	var b Builder[V]
	var last netip.Addr
	for a, v := range all {
		switch {
		case !a.IsValid():
			return nil, fmt.Errorf("range after %v starts with no address", last)
		case !last.IsValid() || last.BitLen() < a.BitLen():
			if a != first(a.Is6()) {
				return nil, fmt.Errorf("first range of the family starts with %v, want %v", a, first(a.Is6()))
			}
		case last.BitLen() > a.BitLen() || last.Compare(a) >= 0:
			return nil, fmt.Errorf("range that starts with %v comes after the one that starts with %v", a, last)
		}
		last = a
		b.Add(a, v)
	}
	return b.Table(), nil
}

// Join makes a table that has the IPv4 ranges of v4 and the IPv6 ranges of v6.
func Join[V comparable](v4, v6 *Table[V]) *Table[V] {
	return &Table[V]{low4: v4.low4, value4: v4.value4, low6: v6.low6, value6: v6.value6}
}

// Combine makes a table whose value at every address is f of the values of a and b there. f is called once for each pair
// of ranges that overlap.
func Combine[A, B, V comparable](a *Table[A], b *Table[B], f func(A, B) V) *Table[V] {
	var c Builder[V]
	for _, is6 := range []bool{false, true} {
		as, bs := a.family(is6), b.family(is6)
		var valueA A
		var valueB B
		i, j := 0, 0
		for i < as.len() || j < bs.len() || i+j == 0 {
			// The next address at which a value changes. A table without ranges of this family has the zero value in all of it.
			var at netip.Addr
			switch {
			case i+j == 0 && as.len()+bs.len() == 0:
				at = first(is6)
			case i < as.len() && (j >= bs.len() || as.low(i).Compare(bs.low(j)) <= 0):
				at = as.low(i)
			default:
				at = bs.low(j)
			}
			if i < as.len() && as.low(i) == at {
				valueA = as.value(i)
				i++
			}
			if j < bs.len() && bs.low(j) == at {
				valueB = bs.value(j)
				j++
			}
			c.Add(at, f(valueA, valueB))
			if as.len()+bs.len() == 0 {
				break
			}
		}
	}
	return c.Table()
}

// family is one line of a table.
type family[V comparable] struct {
	*Table[V]
	is6 bool
}

func (t *Table[V]) family(is6 bool) family[V] { return family[V]{t, is6} }

func (f family[V]) len() int {
	if f.is6 {
		return len(f.low6)
	}
	return len(f.low4)
}

func (f family[V]) low(i int) netip.Addr {
	if f.is6 {
		return f.low6[i].addr()
	}
	return addr4(f.low4[i])
}

func (f family[V]) value(i int) V {
	if f.is6 {
		return f.value6[i]
	}
	return f.value4[i]
}

// Ranges yields the first address of every range and its value, IPv4 before IPv6, ascending.
func (t *Table[V]) Ranges() iter.Seq2[netip.Addr, V] {
	return func(yield func(netip.Addr, V) bool) {
		for i, low := range t.low4 {
			if !yield(addr4(low), t.value4[i]) {
				return
			}
		}
		for i, low := range t.low6 {
			if !yield(low.addr(), t.value6[i]) {
				return
			}
		}
	}
}

// Lookup returns the value of a and the length of the largest aligned prefix around a whose addresses all have it.
// An invalid address has the zero value. It does not allocate.
func (t *Table[V]) Lookup(a netip.Addr) (value V, prefixLen int) {
	switch {
	case a.Is4():
		if len(t.low4) == 0 {
			return value, 0
		}
		k := key4(a)
		n, starts := slices.BinarySearch(t.low4, k) // how many start before k: at least one starts with it or before, as low4[0] is 0
		if starts {
			n++
		}
		return t.value4[n-1], t.around4(k, n)
	case !a.IsValid() || len(t.low6) == 0:
		return value, 0
	}
	return t.lookup6(key6(a), 1, len(t.low6))
}

// around4 is the length of the largest aligned prefix around k in the n-th range, counted from one: it must not reach the last address
// before the range, nor the first one after it.
func (t *Table[V]) around4(k uint32, n int) (prefixLen int) {
	if n > 1 {
		prefixLen = bits.LeadingZeros32(k^(t.low4[n-1]-1)) + 1
	}
	if n < len(t.low4) {
		prefixLen = max(prefixLen, bits.LeadingZeros32(k^t.low4[n])+1)
	}
	return prefixLen
}

// lookup6 looks for k where the number of ranges that start at or before it is at least lo and at most hi.
func (t *Table[V]) lookup6(k key, lo, hi int) (value V, prefixLen int) {
	for lo < hi {
		if m := int(uint(lo+hi) >> 1); t.low6[m].compare(k) <= 0 {
			lo = m + 1
		} else {
			hi = m
		}
	}
	if lo > 1 {
		low := t.low6[lo-1]
		l, borrow := bits.Sub64(low.lo, 1, 0)
		prefixLen = k.common(key{low.hi - borrow, l}) + 1
	}
	if lo < len(t.low6) {
		prefixLen = max(prefixLen, k.common(t.low6[lo])+1)
	}
	return t.value6[lo-1], prefixLen
}

// Builder makes a table of ranges that are added in ascending order, and merges neighbours of one value. It is not for
// concurrent use.
type Builder[V comparable] struct {
	line4 line[uint32, V]
	line6 line[key, V]
}

// Table is what was built.
func (b *Builder[V]) Table() *Table[V] {
	t := new(Table[V])
	t.low4, t.value4 = b.line4.all()
	t.low6, t.value6 = b.line6.all()
	return t
}

// line is one family that is being built: in pieces, since a slice of a million ranges that grows is mostly copied, and leaves
// behind several times what it holds.
type line[K, V comparable] struct {
	lows   [][]K
	values [][]V
}

// piece is how many ranges a piece of a line has.
const piece = 1 << 15

// add starts a range; one that starts there already is replaced.
func (l *line[K, V]) add(k K, v V) {
	last := len(l.lows) - 1
	if last >= 0 && l.lows[last][len(l.lows[last])-1] == k {
		n := len(l.lows[last]) - 1
		l.lows[last], l.values[last] = l.lows[last][:n], l.values[last][:n]
		if n == 0 {
			l.lows, l.values, last = l.lows[:last], l.values[:last], last-1
		}
	}
	switch {
	case last >= 0 && l.values[last][len(l.values[last])-1] == v:
		return
	case last < 0: // most lines are short
		l.lows, l.values, last = append(l.lows, nil), append(l.values, nil), 0
	case len(l.lows[last]) == piece:
		l.lows, l.values, last = append(l.lows, make([]K, 0, piece)), append(l.values, make([]V, 0, piece)), last+1
	}
	l.lows[last], l.values[last] = append(l.lows[last], k), append(l.values[last], v)
}

// all are the ranges in one piece.
func (l *line[K, V]) all() ([]K, []V) { return slices.Concat(l.lows...), slices.Concat(l.values...) }

func first(is6 bool) netip.Addr {
	if is6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// Last is the last address of p.
func Last(p netip.Prefix) netip.Addr {
	if p.Addr().Is4() {
		return addr4(key4(p.Addr()) | uint32(uint64(1)<<(32-p.Bits())-1))
	}
	k, n := key6(p.Addr()), p.Bits()
	if n <= 64 {
		k.lo = ^uint64(0)
		if n < 64 {
			k.hi |= 1<<(64-n) - 1
		}
	} else if n < 128 {
		k.lo |= 1<<(128-n) - 1
	}
	return k.addr()
}

// flatten adds the entries of one family, sorted so that holders come before what they hold.
func (b *Builder[V]) flatten(sorted []Entry[V], is6 bool) {
	type open struct {
		last  netip.Addr
		value V
	}
	var stack []open
	var none V
	// closeUntil ends the prefixes that end before a; an invalid a ends them all.
	closeUntil := func(a netip.Addr) {
		for len(stack) > 0 {
			top := stack[len(stack)-1]
			if a.IsValid() && top.last.Compare(a) >= 0 {
				return
			}
			stack = stack[:len(stack)-1]
			after := top.last.Next() // invalid behind the family's last address
			if !after.IsValid() {
				continue
			}
			value := none
			if len(stack) > 0 {
				value = stack[len(stack)-1].value
			}
			b.Add(after, value)
		}
	}
	for _, e := range sorted {
		if e.Prefix.Addr().Is6() != is6 {
			continue
		}
		if b.empty(is6) {
			b.Add(first(is6), none)
		}
		closeUntil(e.Prefix.Addr())
		b.Add(e.Prefix.Addr(), e.Value)
		stack = append(stack, open{Last(e.Prefix), e.Value})
	}
	closeUntil(netip.Addr{})
}

func (b *Builder[V]) empty(is6 bool) bool {
	if is6 {
		return len(b.line6.lows) == 0
	}
	return len(b.line4.lows) == 0
}

// Add starts a range at a, which must not lie before the one that was added last; one that started at a already is replaced.
// The first of each family starts with its first address.
func (b *Builder[V]) Add(a netip.Addr, v V) {
	if a.Is4() {
		b.line4.add(key4(a), v)
	} else {
		b.line6.add(key6(a), v)
	}
}
