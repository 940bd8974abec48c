package geo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
	"github.com/oschwald/geoip2-golang/v2"
	"go4.org/netipx"

	"portolan/router"
	"portolan/router/ranges"
	"portolan/topology"
	"portolan/topology/regions"
)

// write makes an mmdb file of entries and returns its path.
func write(t testing.TB, options mmdbwriter.Options, entries map[string]mmdbtype.DataType) string {
	t.Helper()
	options.IncludeReservedNetworks = true
	tree, err := mmdbwriter.New(options)
	if err != nil {
		t.Fatal(err)
	}
	for p, value := range entries {
		if err := tree.Insert(netipx.PrefixIPNet(netip.MustParsePrefix(p)), value); err != nil {
			t.Fatal(err)
		}
	}
	var b bytes.Buffer
	if _, err := tree.WriteTo(&b); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "test.mmdb")
	if err := os.WriteFile(path, b.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// city is an entry of GeoLite2-City.
func city(continent, country string, latitude, longitude float64) mmdbtype.Map {
	return mmdbtype.Map{
		"city":               mmdbtype.Map{"geoname_id": mmdbtype.Uint32(1), "names": mmdbtype.Map{"en": mmdbtype.String("Town")}},
		"continent":          mmdbtype.Map{"code": mmdbtype.String(continent), "names": mmdbtype.Map{"en": mmdbtype.String("Land")}},
		"country":            mmdbtype.Map{"iso_code": mmdbtype.String(country), "geoname_id": mmdbtype.Uint32(2)},
		"location":           mmdbtype.Map{"accuracy_radius": mmdbtype.Uint16(5), "latitude": mmdbtype.Float64(latitude), "longitude": mmdbtype.Float64(longitude), "time_zone": mmdbtype.String("UTC")},
		"registered_country": mmdbtype.Map{"iso_code": mmdbtype.String("US")},
		"subdivisions":       mmdbtype.Slice{mmdbtype.Map{"iso_code": mmdbtype.String("XX")}},
	}
}

func TestSchemas(t *testing.T) {
	t.Parallel()
	sofia := topology.Coordinates{Latitude: 42.7, Longitude: 23.3}
	plovdiv := topology.Coordinates{Latitude: 42.15, Longitude: 24.75}
	tests := []struct {
		name    string
		entry   mmdbtype.Map
		country string
		at      topology.Coordinates
		fails   bool
	}{
		{name: "GeoLite2-City", entry: city("EU", "BG", 42.15, 24.75), country: "BG", at: plovdiv},
		{name: "GeoLite2-Country", entry: mmdbtype.Map{
			"continent": mmdbtype.Map{"code": mmdbtype.String("EU")}, "country": mmdbtype.Map{"iso_code": mmdbtype.String("BG")},
		}, country: "BG", at: sofia},
		{name: "flat city", entry: mmdbtype.Map{
			"city": mmdbtype.String("Plovdiv"), "country_code": mmdbtype.String("BG"), "latitude": mmdbtype.Float64(42.15), "longitude": mmdbtype.Float64(24.75),
		}, country: "BG", at: plovdiv},
		{name: "flat city with short floats", entry: mmdbtype.Map{
			"country_code": mmdbtype.String("BG"), "latitude": mmdbtype.Float32(42.25), "longitude": mmdbtype.Float32(24.75),
		}, country: "BG", at: topology.Coordinates{Latitude: 42.25, Longitude: 24.75}},
		{name: "flat country", entry: mmdbtype.Map{"country_code": mmdbtype.String("BG")}, country: "BG", at: sofia},
		{name: "country with names beside", entry: mmdbtype.Map{
			"country": mmdbtype.String("Bulgaria"), "country_code": mmdbtype.String("BG"), "continent": mmdbtype.String("Europe"), "continent_code": mmdbtype.String("EU"),
		}, country: "BG", at: sofia},
		{name: "coordinates off the Earth", entry: city("EU", "BG", 142, 24), country: "BG", at: sofia},
		{name: "unknown country", entry: mmdbtype.Map{"country_code": mmdbtype.String("ZZ")}, fails: true},
		{name: "systems", entry: mmdbtype.Map{"autonomous_system_number": mmdbtype.Uint32(64500)}, fails: true},
		{name: "something else", entry: mmdbtype.Map{"isp": mmdbtype.String("x")}, fails: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := write(t, mmdbwriter.Options{DatabaseType: tt.name, BuildEpoch: 1_700_000_000}, map[string]mmdbtype.DataType{
				"20.0.0.0/8": tt.entry, "2a00::/16": tt.entry,
			})
			d, err := Open(path)
			if tt.fails {
				if err == nil {
					t.Fatal("opened")
				}
				for _, want := range []string{path, tt.name, "want"} {
					if !strings.Contains(err.Error(), want) {
						t.Errorf("the error %q does not say %q", err, want)
					}
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d.Infos()[0].Type != tt.name || !d.Infos()[0].Built.Equal(time.Unix(1_700_000_000, 0)) || len(d.Infos()[0].Digest) != 64 {
				t.Errorf("%+v", d.Infos()[0])
			}
			if age := d.Infos()[0].Age(time.Unix(1_700_000_060, 0)); age != time.Minute {
				t.Errorf("age %v, want 1m", age)
			}
			for a, network := range map[string]string{"20.1.2.3": "20.0.0.0/8", "2a00::1": "2a00::/16"} {
				p := d.Locate(netip.MustParseAddr(a))
				if !p.Located || p.Country != tt.country || p.Continent != "EU" || p.Source != tt.name || p.Network.String() != network {
					t.Errorf("%s: %+v", a, p)
				}
				if p.Coordinates != tt.at {
					t.Errorf("%s at %v, want %v", a, p.Coordinates, tt.at)
				}
			}
			for a, network := range map[string]string{"21.1.2.3": "21.0.0.0/8", "128.0.0.1": "128.0.0.0/1", "2a01::1": "2a01::/16", "8000::": "8000::/1"} {
				if p := d.Locate(netip.MustParseAddr(a)); p.Located || p.Network.String() != network {
					t.Errorf("%s: %+v, want no place in %s", a, p, network)
				}
			}
		})
	}
}

// TestContinentOfDatabase: where the database says another continent than the table of countries, it counts.
func TestContinentOfDatabase(t *testing.T) {
	t.Parallel()
	d, err := Open(write(t, mmdbwriter.Options{DatabaseType: "x"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("AS", "BG", 1, 2)}))
	if err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(netip.MustParseAddr("20.1.2.3")); p.Country != "BG" || p.Continent != "AS" {
		t.Errorf("%+v, want BG in AS", p)
	}
}

func TestOpenASN(t *testing.T) {
	t.Parallel()
	for _, n := range []mmdbtype.DataType{mmdbtype.Uint32(64500), mmdbtype.Uint16(64500), mmdbtype.Uint64(64500)} {
		path := write(t, mmdbwriter.Options{DatabaseType: "GeoLite2-ASN"}, map[string]mmdbtype.DataType{
			"20.1.0.0/16": mmdbtype.Map{"autonomous_system_number": n, "autonomous_system_organization": mmdbtype.String("Contoso")},
		})
		s, err := OpenASN(path)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, is6 := range []bool{false, true} {
			err := s.Borders(is6, func(from netip.Addr, asn uint32) bool {
				got = append(got, fmt.Sprintf("%v AS%d", from, asn))
				return true
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if want := []string{"0.0.0.0 AS0", "20.1.0.0 AS64500", "20.2.0.0 AS0", ":: AS0", "2000:: AS0"}; !slices.Equal(got, want) {
			t.Errorf("borders %q, want %q", got, want)
		}
	}
	path := write(t, mmdbwriter.Options{DatabaseType: "GeoLite2-City"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("EU", "BG", 1, 2)})
	if _, err := OpenASN(path); err == nil || !strings.Contains(err.Error(), "geo.database") {
		t.Errorf("opening places as systems: %v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	text := filepath.Join(dir, "text")
	if err := os.WriteFile(text, []byte("not an mmdb"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "missing"): "no such file",
		text:                          "MaxMind DB format",
		empty:                         "is empty",
		dir:                           "not a file",
		write(t, mmdbwriter.Options{DatabaseType: "None"}, nil): "empty",
	} {
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("opening %s: %v, want %q", path, err, want)
		}
	}
	whole, err := os.ReadFile(write(t, mmdbwriter.Options{DatabaseType: "GeoLite2-City"}, map[string]mmdbtype.DataType{
		"20.0.0.0/8": city("EU", "BG", 1, 2), "30.0.0.0/8": city("EU", "DE", 3, 4),
	}))
	if err != nil {
		t.Fatal(err)
	}
	// A download that broke off: what tells of the file stands at its end.
	for n := len(whole) - 1; n > 0; n -= 41 {
		path := filepath.Join(dir, "short")
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(path); err == nil || !strings.Contains(err.Error(), "MaxMind DB format") || !strings.Contains(err.Error(), path) {
			t.Fatalf("opening the first %d of %d bytes: %v", n, len(whole), err)
		}
	}
	// A file whose beginning is missing or that is damaged never panics, and is either refused or answers.
	random := rand.New(rand.NewPCG(1, 2))
	for i := range 300 {
		damaged := bytes.Clone(whole)
		if i%2 == 0 {
			damaged = damaged[random.IntN(len(damaged)):]
		}
		damaged[random.IntN(len(damaged))] ^= byte(1 + random.IntN(255))
		path := filepath.Join(dir, "damaged")
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		if d, err := Open(path); err == nil {
			d.Locate(netip.MustParseAddr("20.1.2.3"))
			d.Locate(netip.MustParseAddr("2a00::1"))
		}
	}
}

// TestLikeGeoIP2 compares with the public reader of the same files.
func TestLikeGeoIP2(t *testing.T) {
	t.Parallel()
	entries := map[string]mmdbtype.DataType{}
	random := rand.New(rand.NewPCG(3, 4))
	codes := []string{"DE", "FR", "US", "BR", "JP"}
	for range 300 {
		p, _ := netip.AddrFrom4([4]byte{20, byte(random.IntN(8)), byte(random.IntN(256)), 0}).Prefix(12 + random.IntN(13))
		known := country(codes[random.IntN(len(codes))])
		entries[p.String()] = city(known.Continent, known.Code, float64(random.IntN(180)-90), float64(random.IntN(360)-180))
	}
	path := write(t, mmdbwriter.Options{DatabaseType: "GeoLite2-City"}, entries)
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	reader, err := geoip2.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	for range 5000 {
		a := netip.AddrFrom4([4]byte{20, byte(random.IntN(16)), byte(random.IntN(256)), byte(random.IntN(256))})
		want, err := reader.City(a)
		if err != nil {
			t.Fatal(err)
		}
		got := d.Locate(a)
		if !want.HasData() {
			if got.Located {
				t.Fatalf("%v is at %+v, want nowhere", a, got)
			}
			continue
		}
		if got.Country != want.Country.ISOCode || got.Continent != want.Continent.Code || got.Network != want.Traits.Network ||
			got.Coordinates != (topology.Coordinates{Latitude: *want.Location.Latitude, Longitude: *want.Location.Longitude}) {
			t.Fatalf("%v: %+v, want %+v", a, got, want)
		}
	}
}

// TestIPv4Only: a tree of IPv4 alone knows no IPv6 address, and says so of all of them at once.
func TestIPv4Only(t *testing.T) {
	t.Parallel()
	d, err := Open(write(t, mmdbwriter.Options{DatabaseType: "v4", IPVersion: 4}, map[string]mmdbtype.DataType{
		"20.0.0.0/8": mmdbtype.Map{"country_code": mmdbtype.String("DE")},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(netip.MustParseAddr("20.1.2.3")); p.Country != "DE" || p.Network.String() != "20.0.0.0/8" {
		t.Errorf("%+v", p)
	}
	a := netip.MustParseAddr("2a00::1")
	if p := d.Locate(a); p.Located || p.Network.String() != "::/0" {
		t.Errorf("%+v", p)
	}
	if p := d.Locate(netip.Addr{}); p.Located || p.Network.IsValid() {
		t.Errorf("%+v", p)
	}
}

// TestWideEntry: where all of IPv4 lies in one entry that is wider than it, the network is all of IPv4.
func TestWideEntry(t *testing.T) {
	t.Parallel()
	d, err := Open(write(t, mmdbwriter.Options{DatabaseType: "wide", DisableIPv4Aliasing: true}, map[string]mmdbtype.DataType{
		"::/8": mmdbtype.Map{"country_code": mmdbtype.String("DE")},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(netip.MustParseAddr("20.1.2.3")); p.Country != "DE" || p.Network.String() != "0.0.0.0/0" {
		t.Errorf("%+v", p)
	}
}

// TestReplacedFile: a file that another one is renamed over is still read; one that is written to, or cut short, even while it
// is being read, is an error and not the end of the process.
func TestReplacedFile(t *testing.T) {
	t.Parallel()
	entries := map[string]mmdbtype.DataType{}
	for i := range 1 << 14 {
		entries[netip.PrefixFrom(netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0}), 24).String()] = city("EU", "BG", 1, float64(i)/100)
	}
	open := func() (*Database, string) {
		path := write(t, mmdbwriter.Options{DatabaseType: "x"}, entries)
		d, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		return d, path
	}
	a := netip.MustParseAddr("20.1.2.3")

	d, path := open()
	if err := os.Rename(write(t, mmdbwriter.Options{DatabaseType: "y"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("EU", "DE", 1, 2)}), path); err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(a); p.Country != "BG" {
		t.Errorf("after a new file was renamed over it: %+v", p)
	}

	d, path = open()
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(a); p.Located || !strings.Contains(p.Source, "renaming") {
		t.Errorf("after the file was emptied: %+v", p)
	}

	d, path = open()
	visited := 0
	err := d.Borders(false, func(netip.Addr, int, *router.Place) bool {
		if visited++; visited == 100 {
			if err := os.Truncate(path, 1<<12); err != nil {
				t.Error(err)
			}
		}
		return true
	})
	if !errors.Is(err, errOverwritten) {
		t.Errorf("the file was cut short while it was read: %v", err)
	}
}

// TestBorders: what is visited is what Locate finds, all of it, whatever the file has.
func TestBorders(t *testing.T) {
	t.Parallel()
	known := mmdbtype.Map{"country_code": mmdbtype.String("DE")}
	for name, tt := range map[string]struct {
		options mmdbwriter.Options
		entries []map[string]mmdbtype.DataType
	}{
		"both":        {entries: []map[string]mmdbtype.DataType{{"20.0.0.0/8": known, "20.1.2.128/25": city("EU", "BG", 1, 2), "2a00::/16": known, "2a00::1:0/112": city("EU", "BG", 1, 2)}}},
		"IPv4":        {options: mmdbwriter.Options{IPVersion: 4}, entries: []map[string]mmdbtype.DataType{{"0.0.0.0/1": known}}},
		"IPv6":        {entries: []map[string]mmdbtype.DataType{{"2a00::/16": known, "2c00::/16": city("AF", "ZA", 1, 2)}}},
		"a file each": {entries: []map[string]mmdbtype.DataType{{"2a00::/16": known}, {"20.0.0.0/8": city("EU", "BG", 1, 2)}}},
		"wide":        {options: mmdbwriter.Options{DisableIPv4Aliasing: true}, entries: []map[string]mmdbtype.DataType{{"::/8": known}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var paths []string
			for _, entries := range tt.entries {
				tt.options.DatabaseType = "x"
				paths = append(paths, write(t, tt.options, entries))
			}
			d, err := Open(paths...)
			if err != nil {
				t.Fatal(err)
			}
			for _, is6 := range []bool{false, true} {
				borders := map[netip.Addr]netip.Prefix{}
				var last netip.Addr
				var places []router.Place
				err := d.Borders(is6, func(from netip.Addr, number int, place *router.Place) bool {
					if !last.IsValid() && from != netip.IPv4Unspecified() && from != netip.IPv6Unspecified() || last.IsValid() && !last.Less(from) {
						t.Fatalf("%v comes after %v", from, last)
					}
					last = from
					if place != nil {
						if number != len(places) {
							t.Fatalf("place %d after %d others", number, len(places))
						}
						places = append(places, *place)
					}
					var visited router.Place
					if number != router.NoPlace {
						visited = places[number]
					}
					if is6 && !all6.Contains(from) {
						return true // nobody's
					}
					located := d.Locate(from)
					if visited.Located != located.Located || visited.Country != located.Country || visited.Coordinates != located.Coordinates {
						t.Errorf("%v: visited %+v, located %+v", from, visited, located)
					}
					// Behind the network as the file has it, another place may begin, and no sooner.
					borders[from] = located.Network
					return true
				})
				if err != nil {
					t.Fatal(err)
				}
				for from, network := range borders {
					next := ranges.Last(network).Next()
					if _, visited := borders[next]; next.IsValid() && !visited && from.Is6() == is6 && (!is6 || all6.Contains(next)) && d.Locate(next).Located {
						t.Errorf("%v, the end of %v, was not visited", next, network)
					}
				}
			}
		})
	}
	one := write(t, mmdbwriter.Options{DatabaseType: "x"}, map[string]mmdbtype.DataType{"20.0.0.0/8": known})
	if _, err := Open(one, one); err == nil || !strings.Contains(err.Error(), "IPv4") {
		t.Errorf("two files of one family: %v", err)
	}
}

func BenchmarkLocateCity(b *testing.B) {
	d, err := Open(write(b, mmdbwriter.Options{DatabaseType: "GeoLite2-City"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("EU", "BG", 1, 2)}))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	a := netip.MustParseAddr("20.1.2.3")
	for b.Loop() {
		d.Locate(a)
	}
}

func BenchmarkDecideCity(b *testing.B) {
	d, err := Open(write(b, mmdbwriter.Options{DatabaseType: "GeoLite2-City"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("EU", "BG", 1, 2)}))
	if err != nil {
		b.Fatal(err)
	}
	registry := &topology.Registry{Name: "contoso", Home: "a", Replicas: []*topology.Replica{
		{Region: "a", Weight: 90, Routing: true, Location: topology.Coordinates{Latitude: 50, Longitude: 8}},
		{Region: "b", Weight: 100, Routing: true, Location: topology.Coordinates{Latitude: 37, Longitude: -122}},
	}}
	s := &topology.Snapshot{Registries: []*topology.Registry{registry}}
	charts, err := router.Chart(context.Background(), s, router.Sources{Places: d}, nil)
	if err != nil {
		b.Fatal(err)
	}
	r := router.New(s, charts).At(0)
	b.ReportAllocs()
	for i := uint32(0); b.Loop(); i++ {
		a := netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0})
		r.Decide(router.Client{Subnet: netip.PrefixFrom(a, 24)})
	}
}

// BenchmarkChartCity is the greater part of a start: the City database (make city) charted for eight regions all over the world.
func BenchmarkChartCity(b *testing.B) {
	var paths []string
	for _, family := range []string{"ipv4", "ipv6"} {
		path := filepath.Join("..", "..", "bin", "city", "dbip-city-"+family+".mmdb")
		if _, err := os.Stat(path); err != nil {
			b.Skip("there is no City database: make city")
		}
		paths = append(paths, path)
	}
	registry := &topology.Registry{Name: "contoso", Home: "westus"}
	for _, name := range []string{"westus", "eastus", "brazilsouth", "westeurope", "southafricanorth", "centralindia", "southeastasia", "australiaeast"} {
		region, ok := regions.Lookup(name)
		if !ok {
			b.Fatal(name)
		}
		registry.Replicas = append(registry.Replicas, &topology.Replica{Region: name, Weight: 100, Routing: true,
			Location: topology.Coordinates{Latitude: region.Latitude, Longitude: region.Longitude}})
	}
	s := &topology.Snapshot{Registries: []*topology.Registry{registry}}
	b.ReportAllocs()
	for b.Loop() {
		d, err := Open(paths...)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := router.Chart(context.Background(), s, router.Sources{Places: d}, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// Offsets get the numbers that a map would give them, also those whose places in the table collide.
func TestNumbering(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	var n numbering
	want := make(map[uint32]int)
	for range 200_000 {
		offset := random.Uint32N(60_000)
		if offset%3 == 0 {
			offset <<= 16
		}
		number, met := n.of(offset)
		known, was := want[offset]
		if !was {
			known = len(want)
			want[offset] = known
		}
		if number != known || met != was {
			t.Fatalf("%d is number %d, %v; want %d, %v", offset, number, met, known, was)
		}
	}
}
