package geo

import (
	"bytes"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
	"github.com/oschwald/geoip2-golang/v2"
	"go4.org/netipx"

	"portolan/router"
	"portolan/topology"
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
		kind    string
		country string
		at      topology.Coordinates
		fails   bool
	}{
		{name: "GeoLite2-City", entry: city("EU", "BG", 42.15, 24.75), kind: "city", country: "BG", at: plovdiv},
		{name: "GeoLite2-Country", entry: mmdbtype.Map{
			"continent": mmdbtype.Map{"code": mmdbtype.String("EU")}, "country": mmdbtype.Map{"iso_code": mmdbtype.String("BG")},
		}, kind: "country", country: "BG", at: sofia},
		{name: "flat city", entry: mmdbtype.Map{
			"city": mmdbtype.String("Plovdiv"), "country_code": mmdbtype.String("BG"), "latitude": mmdbtype.Float64(42.15), "longitude": mmdbtype.Float64(24.75),
		}, kind: "city", country: "BG", at: plovdiv},
		{name: "flat city with short floats", entry: mmdbtype.Map{
			"country_code": mmdbtype.String("BG"), "latitude": mmdbtype.Float32(42.25), "longitude": mmdbtype.Float32(24.75),
		}, kind: "city", country: "BG", at: topology.Coordinates{Latitude: 42.25, Longitude: 24.75}},
		{name: "flat country", entry: mmdbtype.Map{"country_code": mmdbtype.String("BG")}, kind: "country", country: "BG", at: sofia},
		{name: "country with names beside", entry: mmdbtype.Map{
			"country": mmdbtype.String("Bulgaria"), "country_code": mmdbtype.String("BG"), "continent": mmdbtype.String("Europe"), "continent_code": mmdbtype.String("EU"),
		}, kind: "country", country: "BG", at: sofia},
		{name: "coordinates off the Earth", entry: city("EU", "BG", 142, 24), kind: "country", country: "BG", at: sofia},
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
			if d.Kind() != tt.kind || d.Info().Type != tt.name || !d.Info().Built.Equal(time.Unix(1_700_000_000, 0)) || len(d.Info().Digest) != 64 {
				t.Errorf("kind %q, %+v", d.Kind(), d.Info())
			}
			if age := d.Info().Age(time.Unix(1_700_000_060, 0)); age != time.Minute {
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
		if asn, network := s.ASN(netip.MustParseAddr("20.1.2.3")); asn != 64500 || network.String() != "20.1.0.0/16" {
			t.Errorf("AS%d in %v", asn, network)
		}
		if asn, network := s.ASN(netip.MustParseAddr("20.0.2.3")); asn != 0 || network.String() != "20.0.0.0/16" {
			t.Errorf("AS%d in %v", asn, network)
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
		empty:                         "MaxMind DB format",
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
		known, _ := Lookup(codes[random.IntN(len(codes))])
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

// TestReplacedFile: an opened database does not notice what becomes of its file.
func TestReplacedFile(t *testing.T) {
	t.Parallel()
	path := write(t, mmdbwriter.Options{DatabaseType: "x"}, map[string]mmdbtype.DataType{"20.0.0.0/8": city("EU", "BG", 1, 2)})
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	if p := d.Locate(netip.MustParseAddr("20.1.2.3")); p.Country != "BG" {
		t.Errorf("%+v", p)
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
	r := router.New(&topology.Snapshot{Registries: []*topology.Registry{registry}}, d, nil).At(0)
	b.ReportAllocs()
	for i := uint32(0); b.Loop(); i++ {
		a := netip.AddrFrom4([4]byte{20, byte(i >> 8), byte(i), 0})
		r.Decide(router.Client{Subnet: netip.PrefixFrom(a, 24)})
	}
}
