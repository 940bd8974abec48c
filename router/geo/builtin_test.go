package geo

import (
	"bytes"
	"maps"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"portolan/router"
	"portolan/router/ranges"
)

// TestBuiltinKnownAddresses holds the built-in table to addresses whose countries have stood still for decades.
func TestBuiltinKnownAddresses(t *testing.T) {
	t.Parallel()
	tests := []struct{ addr, country string }{
		{"8.8.8.8", "US"},
		{"193.0.0.1", "NL"},
		{"2001:4860:4860::8888", "US"},
		{"2001:67c:2e8::1", "NL"},
		{"130.149.0.1", "DE"},
		{"133.11.0.1", "JP"},
		{"200.160.2.3", "BR"},
		// What only the second source has right.
		{"2001:200::1", "JP"},
		{"2001:268::1", "JP"},
		{"2001:da8::1", "CN"},
		{"2001:388::1", "AU"},
		{"2001:44b8::1", "AU"},
		{"10.0.0.1", ""},
		{"127.0.0.1", ""},
		{"240.0.0.1", ""},
		{"fd00::1", ""},
		{"::1", ""},
	}
	for _, tt := range tests {
		place := Builtin().Locate(netip.MustParseAddr(tt.addr))
		if place.Country != tt.country || place.Located != (tt.country != "") {
			t.Errorf("%s is in %q (located %v), want %q", tt.addr, place.Country, place.Located, tt.country)
		}
		if !place.Network.Contains(netip.MustParseAddr(tt.addr)) || place.Network != place.Network.Masked() {
			t.Errorf("%s has the network %v", tt.addr, place.Network)
		}
	}
}

func TestBuiltinInvariants(t *testing.T) {
	t.Parallel()
	c := Builtin()
	if built := c.Info().Built; built.Before(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("built %v", built)
	}
	var last netip.Addr
	var value uint8
	n := 0
	for a, v := range c.table.Ranges() {
		if last.IsValid() && last.BitLen() == a.BitLen() {
			if !last.Less(a) {
				t.Fatalf("range at %v comes after %v", a, last)
			}
			if value == v {
				t.Fatalf("ranges at %v and %v have the same country", last, a)
			}
		}
		if a != router.NextCell(a) {
			t.Fatalf("range at %v starts within a cell", a)
		}
		last, value = a, v
		n++
	}
	if n < 300_000 {
		t.Errorf("%d ranges, want some hundred thousand", n)
	}
	for _, code := range c.codes[1:] {
		if country(code) == nil {
			t.Errorf("country %q is not known", code)
		}
	}
	// The same table makes the same bytes, and is read back as it was.
	var packed bytes.Buffer
	if _, err := c.WriteTo(&packed); err != nil {
		t.Fatal(err)
	}
	back, err := ReadCountries(&packed)
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(maps.Collect(back.table.Ranges()), maps.Collect(c.table.Ranges())) {
		t.Error("what was read back has other ranges")
	}
	if back.info.Built != c.info.Built || back.info.Type != c.info.Type {
		t.Errorf("read back %+v, want %+v", back.info, c.info)
	}
}

func TestBuiltinLicence(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("builtin.LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"creativecommons.org/publicdomain/zero/1.0", "creativecommons.org/licenses/by/4.0", "opendatacommons.org/licenses/pddl/1.0", "Number Resource"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("builtin.LICENSE does not mention %q", want)
		}
	}
}

func TestCountriesTable(t *testing.T) {
	t.Parallel()
	n := 0
	all, err := countries()
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range all {
		if c.Code == "" {
			continue
		}
		n++
		if letters(c.Code) != i || continent(c.Continent) == "" || c.Near == "" {
			t.Errorf("bad entry %+v", c)
		}
		if p := c.Point; p.Latitude < -90 || p.Latitude > 90 || p.Longitude < -180 || p.Longitude > 180 || p.Latitude == 0 && p.Longitude == 0 {
			t.Errorf("%s has the point %+v", c.Code, p)
		}
	}
	if n != 249+2 {
		t.Errorf("%d countries, want the 249 of ISO 3166-1, XK and AN", n)
	}
	for _, code := range []string{"", "A", "aa", "ZZ", "USA", "É"} {
		if c := country(code); c != nil {
			t.Errorf("country(%q) = %+v", code, c)
		}
	}
}

func TestCountriesCutToCells(t *testing.T) {
	t.Parallel()
	entries := []ranges.Entry[string]{
		{Prefix: netip.MustParsePrefix("0.0.0.0/25"), Value: "DE"},
		{Prefix: netip.MustParsePrefix("20.0.0.128/25"), Value: "FR"},
		{Prefix: netip.MustParsePrefix("20.0.1.0/24"), Value: "FR"},
		{Prefix: netip.MustParsePrefix("20.0.2.0/26"), Value: "NL"},
		{Prefix: netip.MustParsePrefix("255.255.255.128/25"), Value: "US"},
		{Prefix: netip.MustParsePrefix("2a00::/49"), Value: "DE"},
		{Prefix: netip.MustParsePrefix("2a00:0:1:8000::/49"), Value: "FR"},
		{Prefix: netip.MustParsePrefix("ffff:ffff:ffff:8000::/49"), Value: "US"},
	}
	c, err := NewCountries("test", time.Unix(1, 0), entries)
	if err != nil {
		t.Fatal(err)
	}
	fine := ranges.New(entries)
	for _, s := range []string{
		"0.0.0.0", "0.0.0.200", "0.0.1.0", "20.0.0.0", "20.0.0.200", "20.0.1.0", "20.0.1.255", "20.0.2.0", "20.0.2.255", "20.0.3.0", "255.255.255.255",
		"::", "2a00::1", "2a00:0:0:ffff::", "2a00:0:1::", "2a00:0:1:ffff::", "2a00:0:2::", "ffff:ffff:ffff:ffff::",
	} {
		a := netip.MustParseAddr(s)
		bits := cell4
		if a.Is6() {
			bits = cell6
		}
		cell, _ := a.Prefix(bits)
		want, _ := fine.Lookup(cell.Addr())
		if got := c.Country(a); got != want {
			t.Errorf("%v is in %q, want %q as the first address of %v", a, got, want, cell)
		}
	}
	if _, err := NewCountries("test", time.Unix(1, 0), []ranges.Entry[string]{{Prefix: netip.MustParsePrefix("20.0.0.0/8"), Value: "ZZ"}}); err == nil {
		t.Error("country ZZ was accepted")
	}
}

func FuzzReadCountries(f *testing.F) {
	c, err := NewCountries("test", time.Unix(1, 0), []ranges.Entry[string]{
		{Prefix: netip.MustParsePrefix("20.0.0.0/8"), Value: "DE"}, {Prefix: netip.MustParsePrefix("2a00::/16"), Value: "FR"},
	})
	if err != nil {
		f.Fatal(err)
	}
	var packed bytes.Buffer
	if _, err := c.WriteTo(&packed); err != nil {
		f.Fatal(err)
	}
	f.Add(packed.Bytes())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := ReadCountries(bytes.NewReader(b))
		if err != nil {
			return
		}
		c.Locate(netip.MustParseAddr("20.1.2.3"))
		c.Locate(netip.MustParseAddr("2a00::1"))
	})
}

func FuzzLocate(f *testing.F) {
	f.Add([]byte{8, 8, 8, 8})
	f.Add(netip.MustParseAddr("2a00::1").AsSlice())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, _ := netip.AddrFromSlice(b)
		place := Builtin().Locate(a)
		if !a.IsValid() {
			if place.Located {
				t.Errorf("no address is at %+v", place)
			}
			return
		}
		if !place.Network.Contains(a) {
			t.Fatalf("%v has the network %v", a, place.Network)
		}
		// The network is one country's.
		for _, other := range []netip.Addr{place.Network.Addr(), last(place.Network)} {
			if got := Builtin().Locate(other); got != place {
				t.Errorf("%v has %+v, %v in its network %+v", a, place, other, got)
			}
		}
	})
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

func TestLocateDoesNotAllocate(t *testing.T) {
	for _, s := range []string{"8.8.8.8", "2001:4860:4860::8888", "10.0.0.1"} {
		a := netip.MustParseAddr(s)
		if n := testing.AllocsPerRun(100, func() { Builtin().Locate(a) }); n != 0 {
			t.Errorf("locating %v allocates %v times", a, n)
		}
	}
}

func BenchmarkReadBuiltin(b *testing.B) {
	for b.Loop() {
		if _, err := ReadCountries(bytes.NewReader(builtin)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkLocateBuiltin(b *testing.B) {
	c := Builtin()
	for i := 0; b.Loop(); i++ {
		c.Locate(netip.AddrFrom4([4]byte{byte(i), byte(i >> 3), byte(i >> 7), 1}))
	}
}
