// Package ranges keeps one value for every IP address, as sorted disjoint ranges searched by halving.
//
// It answers two questions at once: which value an address has, and how wide the largest aligned prefix around it is
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
	var b builder[V]
	for _, is6 := range []bool{false, true} {
		b.flatten(sorted, is6)
	}
	return &b.Table
}

// FromRanges makes a table of ranges as Ranges yields them: the first address of each and its value, IPv4 before IPv6,
// ascending, starting with each family's first address. It fails if they are not.
func FromRanges[V comparable](all iter.Seq2[netip.Addr, V]) (*Table[V], error) {
	var b builder[V]
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
		b.add(a, v)
	}
	return &b.Table, nil
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

// Len counts the ranges of both families.
func (t *Table[V]) Len() int { return len(t.low4) + len(t.low6) }

// Lookup returns the value of a and the length of the largest aligned prefix around a whose addresses all have it.
// An invalid address has the zero value. It does not allocate.
func (t *Table[V]) Lookup(a netip.Addr) (value V, prefixLen int) {
	if a.Is4() {
		if len(t.low4) == 0 {
			return value, 0
		}
		k := key4(a)
		// The first range that starts beyond k; the one before it holds k, and there is one because low4[0] is 0.
		lo, hi := 1, len(t.low4)
		for lo < hi {
			if m := int(uint(lo+hi) >> 1); t.low4[m] <= k {
				lo = m + 1
			} else {
				hi = m
			}
		}
		// The prefix must not reach the last address before the range, nor the first one after it.
		if lo > 1 {
			prefixLen = bits.LeadingZeros32(k^(t.low4[lo-1]-1)) + 1
		}
		if lo < len(t.low4) {
			prefixLen = max(prefixLen, bits.LeadingZeros32(k^t.low4[lo])+1)
		}
		return t.value4[lo-1], prefixLen
	}
	if !a.IsValid() || len(t.low6) == 0 {
		return value, 0
	}
	k := key6(a)
	lo, hi := 1, len(t.low6)
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

// builder appends ranges in ascending order and merges neighbours of one value.
type builder[V comparable] struct{ Table[V] }

func first(is6 bool) netip.Addr {
	if is6 {
		return netip.IPv6Unspecified()
	}
	return netip.IPv4Unspecified()
}

// lastOf is the last address of p.
func lastOf(p netip.Prefix) netip.Addr {
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
func (b *builder[V]) flatten(sorted []Entry[V], is6 bool) {
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
			b.add(after, value)
		}
	}
	for _, e := range sorted {
		if e.Prefix.Addr().Is6() != is6 {
			continue
		}
		if b.empty(is6) {
			b.add(first(is6), none)
		}
		closeUntil(e.Prefix.Addr())
		b.add(e.Prefix.Addr(), e.Value)
		stack = append(stack, open{lastOf(e.Prefix), e.Value})
	}
	closeUntil(netip.Addr{})
}

func (b *builder[V]) empty(is6 bool) bool {
	if is6 {
		return len(b.low6) == 0
	}
	return len(b.low4) == 0
}

// add starts a range at a. One that started at a already is replaced.
func (b *builder[V]) add(a netip.Addr, v V) {
	if a.Is4() {
		b.low4, b.value4 = appendRange(b.low4, b.value4, key4(a), v)
	} else {
		b.low6, b.value6 = appendRange(b.low6, b.value6, key6(a), v)
	}
}

func appendRange[K, V comparable](low []K, values []V, k K, v V) ([]K, []V) {
	if n := len(low); n > 0 && low[n-1] == k {
		low, values = low[:n-1], values[:n-1]
	}
	if n := len(values); n > 0 && values[n-1] == v {
		return low, values
	}
	return append(low, k), append(values, v)
}
