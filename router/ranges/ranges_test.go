package ranges

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

// naive is the value of the longest prefix that holds a.
func naive(entries []Entry[int], a netip.Addr) int {
	value, bits := 0, -1
	for _, e := range entries {
		if e.Prefix.Contains(a) && e.Prefix.Bits() >= bits {
			value, bits = e.Value, e.Prefix.Bits()
		}
	}
	return value
}

// last is the last address of p.
func last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// TestLookupWhole builds small tables in the corners of both families and looks at every address of them.
func TestLookupWhole(t *testing.T) {
	t.Parallel()
	for _, corner := range []string{"0.0.0.0/24", "10.0.0.0/24", "255.255.255.0/24", "::/120", "2a00::/120", "2a00:0:0:0:ffff:ffff:ffff:ff00/120", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ff00/120"} {
		space := netip.MustParsePrefix(corner)
		for seed := range uint64(30) {
			random := rand.New(rand.NewPCG(seed, 1))
			var entries []Entry[int]
			for range random.IntN(12) {
				b := space.Addr().AsSlice()
				b[len(b)-1] = byte(random.IntN(256))
				a, _ := netip.AddrFromSlice(b)
				p, _ := a.Prefix(space.Bits() + random.IntN(9))
				entries = append(entries, Entry[int]{p, random.IntN(3)})
			}
			table := New(entries)
			back, err := FromRanges(table.Ranges())
			if err != nil {
				t.Fatal(err)
			}
			if !slices.Equal(back.low4, table.low4) || !slices.Equal(back.low6, table.low6) || back.Len() != table.Len() {
				t.Fatalf("%v: read back %v, want %v", entries, back, table)
			}
			for i := range 256 {
				b := space.Addr().AsSlice()
				b[len(b)-1] = byte(i)
				a, _ := netip.AddrFromSlice(b)
				value, bits := table.Lookup(a)
				if want := naive(entries, a); value != want {
					t.Fatalf("%v: Lookup(%v) = %d, want %d", entries, a, value, want)
				}
				block, _ := a.Prefix(bits)
				if !same(entries, space, block, value) {
					t.Fatalf("%v: Lookup(%v) gives %v, where not all have %d", entries, a, block, value)
				}
				if bits == 0 {
					continue
				}
				if wider, _ := a.Prefix(bits - 1); same(entries, space, wider, value) {
					t.Fatalf("%v: Lookup(%v) gives %v, but all of %v have %d", entries, a, block, wider, value)
				}
			}
		}
	}
}

// same is whether all addresses of block have value. Outside of space there are no entries.
func same(entries []Entry[int], space, block netip.Prefix, value int) bool {
	from, to := block.Addr(), last(block)
	if !space.Contains(from) || !space.Contains(to) {
		if value != 0 {
			return false
		}
		from, to = space.Addr(), last(space)
	}
	for a := from; a.IsValid() && a.Compare(to) <= 0; a = a.Next() {
		if naive(entries, a) != value {
			return false
		}
	}
	return true
}

func TestLookupEdges(t *testing.T) {
	t.Parallel()
	var zero Table[int]
	if v, n := zero.Lookup(netip.MustParseAddr("10.0.0.1")); v != 0 || n != 0 {
		t.Errorf("zero table: %d, /%d", v, n)
	}
	if v, n := zero.Lookup(netip.MustParseAddr("::1")); v != 0 || n != 0 {
		t.Errorf("zero table: %d, /%d", v, n)
	}
	all := New([]Entry[int]{{netip.MustParsePrefix("0.0.0.0/0"), 1}, {netip.MustParsePrefix("::/0"), 2}, {netip.Prefix{}, 3}})
	if v, n := all.Lookup(netip.MustParseAddr("255.255.255.255")); v != 1 || n != 0 {
		t.Errorf("default entry: %d, /%d", v, n)
	}
	if v, n := all.Lookup(netip.MustParseAddr("::ffff:10.0.0.1")); v != 2 || n != 0 {
		t.Errorf("mapped address: %d, /%d", v, n)
	}
	if v, n := all.Lookup(netip.Addr{}); v != 0 || n != 0 {
		t.Errorf("no address: %d, /%d", v, n)
	}
	later := New([]Entry[int]{{netip.MustParsePrefix("10.0.0.0/8"), 1}, {netip.MustParsePrefix("10.9.9.9/8"), 2}})
	if v, n := later.Lookup(netip.MustParseAddr("10.0.0.1")); v != 2 || n != 8 {
		t.Errorf("two entries of a prefix: %d, /%d", v, n)
	}
}

func TestLookupDoesNotAllocate(t *testing.T) {
	table := New([]Entry[int]{{netip.MustParsePrefix("10.0.0.0/8"), 1}, {netip.MustParsePrefix("2a00::/16"), 2}})
	for _, a := range []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2a00::1")} {
		if n := testing.AllocsPerRun(100, func() { table.Lookup(a) }); n != 0 {
			t.Errorf("looking up %v allocates %v times", a, n)
		}
	}
}

func TestFromRangesErrors(t *testing.T) {
	t.Parallel()
	for _, starts := range [][]string{
		{"10.0.0.0"},
		{"0.0.0.0", "10.0.0.0", "10.0.0.0"},
		{"0.0.0.0", "10.0.0.0", "9.0.0.0"},
		{"0.0.0.0", "2a00::"},
		{"::", "0.0.0.0"},
		{"0.0.0.0", ""},
	} {
		_, err := FromRanges(func(yield func(netip.Addr, int) bool) {
			for i, s := range starts {
				var a netip.Addr
				if s != "" {
					a = netip.MustParseAddr(s)
				}
				if !yield(a, i) {
					return
				}
			}
		})
		if err == nil {
			t.Errorf("ranges %q were accepted", starts)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	random := rand.New(rand.NewPCG(1, 2))
	var entries []Entry[int]
	for range 200_000 {
		k := random.Uint32()
		p, _ := addr4(k).Prefix(8 + random.IntN(17))
		entries = append(entries, Entry[int]{p, random.IntN(100)})
	}
	table := New(entries)
	for i := uint32(0); b.Loop(); i += 0x9e3779b1 {
		table.Lookup(addr4(i))
	}
}
