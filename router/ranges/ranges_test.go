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
			if !slices.Equal(back.low4, table.low4) || !slices.Equal(back.low6, table.low6) {
				t.Fatalf("%v: read back %v, want %v", entries, back, table)
			}
			compiled := table.compile(0)
			for i := range 256 {
				b := space.Addr().AsSlice()
				b[len(b)-1] = byte(i)
				a, _ := netip.AddrFromSlice(b)
				value, bits := table.Lookup(a)
				if v, n := compiled.Lookup(a); v != value || n != bits {
					t.Fatalf("%v: Lookup(%v) = %d /%d compiled, otherwise %d /%d", entries, a, v, n, value, bits)
				}
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
	compiled := table.Compile()
	for _, a := range []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("2a00::1")} {
		if n := testing.AllocsPerRun(100, func() { table.Lookup(a); compiled.Lookup(a) }); n != 0 {
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
	table := New(entries).Compile()
	for i := uint32(0); b.Loop(); i += 0x9e3779b1 {
		table.Lookup(addr4(i))
	}
}

// TestCompiled: a large table finds the same in both forms, everywhere where something changes and in many places between.
func TestCompiled(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(5, 6))
	var b Builder[int]
	for _, is6 := range []bool{false, true} {
		size := 16
		if is6 {
			size = index6Bits
		}
		for a, n := first(is6), 0; a.IsValid() && n < 3*fewRanges; n++ {
			b.Add(a, n%5)
			// Steps of all sizes: blocks with many ranges, blocks that begin with one, blocks without any.
			bits := a.BitLen() - random.IntN(a.BitLen()-size-2)
			if random.IntN(8) == 0 {
				bits = size
			}
			p, _ := a.Prefix(bits)
			a = Last(p).Next()
		}
	}
	table := b.Table()
	compiled := table.Compile()
	if compiled.blocks == nil || compiled.index6 == nil {
		t.Fatalf("%d ranges of IPv4 or %d of IPv6 are few", len(table.low4), len(table.low6))
	}
	if back := compiled.Table(); !slices.Equal(back.low4, table.low4) || !slices.Equal(back.value4, table.value4) || !slices.Equal(back.low6, table.low6) {
		t.Error("made a table again, it is another one")
	}
	check := func(a netip.Addr) {
		value, bits := compiled.Lookup(a)
		if v, n := table.Lookup(a); v != value || n != bits {
			t.Fatalf("Lookup(%v) = %d /%d compiled, otherwise %d /%d", a, value, bits, v, n)
		}
	}
	for a := range table.Ranges() {
		check(a)
		if before := a.Prev(); before.IsValid() {
			check(before)
		}
	}
	for range 100_000 {
		var a16 [16]byte
		for i := range a16 {
			a16[i] = byte(random.Uint32())
		}
		check(netip.AddrFrom16(a16))
		check(netip.AddrFrom4([4]byte(a16[:4])))
	}
	check(netip.Addr{})
	check(netip.AddrFrom4([4]byte{255, 255, 255, 255}))
}

// A compiled table without ranges of a family has the zero value in it, like the zero one.
func TestCompiledEmpty(t *testing.T) {
	t.Parallel()
	four := New([]Entry[int]{{netip.MustParsePrefix("192.0.2.0/24"), 1}})
	for _, c := range []*Compiled[int]{new(Compiled[int]), new(Table[int]).Compile(), Join(four, new(Table[int])).Compile()} {
		if value, bits := c.Lookup(netip.MustParseAddr("2001:db8::1")); value != 0 || bits != 0 {
			t.Errorf("%d /%d", value, bits)
		}
	}
	if value, bits := new(Compiled[int]).Lookup(netip.MustParseAddr("192.0.2.1")); value != 0 || bits != 0 {
		t.Errorf("%d /%d", value, bits)
	}
}

// Prefetch takes whatever Lookup takes, allocates nothing, and Lookup finds the same afterwards. What it gains is for bench-dns to tell.
func TestPrefetch(t *testing.T) { // not parallel: it counts allocations
	random := rand.New(rand.NewPCG(7, 8))
	var entries []Entry[int]
	for i := range 200 {
		p4, _ := addr4(random.Uint32()).Prefix(8 + random.IntN(25))
		p6, _ := key{random.Uint64(), random.Uint64()}.addr().Prefix(8 + random.IntN(121))
		entries = append(entries, Entry[int]{p4, i}, Entry[int]{p6, i})
	}
	table := New(entries)
	for _, c := range []*Compiled[int]{new(Compiled[int]), table.Compile(), table.compile(0)} {
		var places []Place[int]
		for _, e := range entries {
			places = append(places, Place[int]{Table: c, Addr: e.Prefix.Addr()})
		}
		for _, a := range []string{"0.0.0.0", "255.255.255.255", "::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
			places = append(places, Place[int]{Table: c, Addr: netip.MustParseAddr(a)})
		}
		places = append(places, Place[int]{Table: c})
		if n := testing.AllocsPerRun(10, func() { Prefetch(places) }); n != 0 {
			t.Errorf("it allocates %v times", n)
		}
		plain := c.Table()
		for _, p := range places {
			value, bits := c.Lookup(p.Addr)
			if v, n := plain.Lookup(p.Addr); v != value || n != bits {
				t.Errorf("%v: %d /%d, and %d /%d before", p.Addr, value, bits, v, n)
			}
		}
	}
}

// TestCombine: at every address the value is that of the two tables together.
func TestCombine(t *testing.T) {
	t.Parallel()
	space := netip.MustParsePrefix("10.0.0.0/24")
	random := rand.New(rand.NewPCG(7, 8))
	table := func() *Table[int] {
		var entries []Entry[int]
		for range random.IntN(10) {
			p, _ := netip.AddrFrom4([4]byte{10, 0, 0, byte(random.IntN(256))}).Prefix(24 + random.IntN(9))
			entries = append(entries, Entry[int]{p, random.IntN(4)})
		}
		return New(entries)
	}
	for range 200 {
		a, b := table(), table()
		c := Combine(a, b, func(x, y int) [2]int { return [2]int{x, y} })
		for at := space.Addr().Prev(); at.Compare(Last(space).Next()) <= 0; at = at.Next() {
			x, _ := a.Lookup(at)
			y, _ := b.Lookup(at)
			if got, _ := c.Lookup(at); got != [2]int{x, y} {
				t.Fatalf("at %v: %v, want %d and %d", at, got, x, y)
			}
		}
		six := netip.MustParseAddr("2a00::1")
		if got, bits := c.Lookup(six); got != [2]int{} || bits != 0 {
			t.Fatalf("at %v: %v /%d", six, got, bits)
		}
	}
}

// TestJoin: each family is that of its table.
func TestJoin(t *testing.T) {
	t.Parallel()
	one := New([]Entry[int]{{netip.MustParsePrefix("10.0.0.0/8"), 1}, {netip.MustParsePrefix("2a00::/16"), 2}})
	two := New([]Entry[int]{{netip.MustParsePrefix("10.0.0.0/8"), 3}, {netip.MustParsePrefix("2a00::/16"), 4}})
	joined := Join(one, two)
	if v, _ := joined.Lookup(netip.MustParseAddr("10.1.2.3")); v != 1 {
		t.Errorf("IPv4: %d, want 1", v)
	}
	if v, _ := joined.Lookup(netip.MustParseAddr("2a00::1")); v != 4 {
		t.Errorf("IPv6: %d, want 4", v)
	}
}

// What is added comes out, also where ranges are replaced, or merged again, at the ends of pieces.
func TestBuilderPieces(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(5, 6))
	for _, is6 := range []bool{false, true} {
		address := func(n uint32) netip.Addr {
			if is6 {
				return key{hi: uint64(n)}.addr()
			}
			return addr4(n)
		}
		var b Builder[int]
		var lows []uint32
		var values []int
		add := func(k uint32, v int) {
			b.Add(address(k), v)
			if n := len(lows) - 1; n >= 0 && lows[n] == k {
				lows, values = lows[:n], values[:n]
			}
			if n := len(values) - 1; n < 0 || values[n] != v {
				lows, values = append(lows, k), append(values, v)
			}
		}
		for k := uint32(0); len(lows) < 3*piece+7; k++ {
			add(k, random.IntN(3))
			for near := len(lows) % piece; near < 2 && random.IntN(4) > 0; near = len(lows) % piece {
				add(k, random.IntN(3))
			}
		}
		n := 0
		for a, v := range b.Table().Ranges() {
			if n >= len(lows) || a != address(lows[n]) || v != values[n] {
				t.Fatalf("range %d starts at %v with %d", n, a, v)
			}
			n++
		}
		if n != len(lows) {
			t.Errorf("%d ranges, want %d", n, len(lows))
		}
	}
}
