package geo

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"portolan/router"
	"portolan/topology"
)

func table(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "table")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// three is a registry in three regions.
func three() *topology.Snapshot {
	replica := func(region string, latitude, longitude float64) *topology.Replica {
		return &topology.Replica{Region: region, Location: topology.Coordinates{Latitude: latitude, Longitude: longitude}, Weight: 100, Routing: true}
	}
	return &topology.Snapshot{Registries: []*topology.Registry{{Name: "contoso", Home: "westus", Replicas: []*topology.Replica{
		replica("westus", 37.8, -122.4), replica("westeurope", 52.4, 4.9), replica("southeastasia", 1.3, 103.8)}}}}
}

// goes is where a client is sent to.
func goes(t *testing.T, sources router.Sources, subnets ...netip.Prefix) []string {
	t.Helper()
	sources.Places = Builtin()
	s := three()
	charts, err := router.Chart(t.Context(), s, sources, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := router.New(s, charts).At(0)
	regions := make([]string, len(subnets))
	for i, p := range subnets {
		regions[i] = s.Registries[0].Replicas[r.Decide(router.Client{Subnet: p}).Replica].Region
	}
	return regions
}

// A table out of BGP has a hundred thousand lines. The longest prefix holds, and where none does, the place.
func TestPrefixesByTheHundredThousand(t *testing.T) {
	t.Parallel()
	random := rand.New(rand.NewPCG(1, 2))
	regions := []string{"westus", "westeurope", "southeastasia"}
	orders := make(map[netip.Prefix]string)
	var b strings.Builder
	b.WriteString("# made by a test\n\n")
	for len(orders) < 100_000 {
		p, _ := netip.AddrFrom4([4]byte{byte(20 + random.IntN(20)), byte(random.IntN(256)), byte(random.IntN(256)), 0}).Prefix(12 + random.IntN(13))
		if _, twice := orders[p]; !twice {
			orders[p] = regions[random.IntN(3)]
			fmt.Fprintf(&b, "%v\t%s # %d\n", p, orders[p], len(orders))
		}
	}
	prefixes, info, err := ReadPrefixes(table(t, b.String()))
	if err != nil || len(info.Digest) != 64 || info.Type != "prefixes" || info.Built.IsZero() {
		t.Fatalf("%+v, %v", info, err)
	}
	var asked []netip.Prefix
	var want []string
	for range 5000 {
		p, _ := netip.AddrFrom4([4]byte{byte(20 + random.IntN(20)), byte(random.IntN(256)), byte(random.IntN(256)), 0}).Prefix(24)
		for n := 24; n >= 12; n-- {
			around, _ := p.Addr().Prefix(n)
			if region, ok := orders[around]; ok {
				asked, want = append(asked, p), append(want, region)
				break
			}
		}
	}
	for i, region := range goes(t, router.Sources{Prefixes: prefixes}, asked...) {
		if region != want[i] {
			t.Fatalf("%v goes to %s, want %s", asked[i], region, want[i])
		}
	}
	if len(asked) < 1000 {
		t.Errorf("only %d addresses lie in a prefix of the table", len(asked))
	}
}

func TestLatencies(t *testing.T) {
	t.Parallel()
	// Germany, by the built-in table, and Brazil.
	german, brazilian := netip.MustParsePrefix("84.128.0.0/24"), netip.MustParsePrefix("200.160.0.0/24")
	if got := goes(t, router.Sources{}, german, brazilian); got[0] != "westeurope" || got[1] == "southeastasia" {
		t.Fatalf("without a table: %v", got)
	}
	for _, c := range []struct{ text, german, brazilian string }{
		{"country/DE westus 1", "westus", "westus"},
		{"country/DE westus 80", "westeurope", "westus"},                        // nearer than it looks, and still not as near as the other is
		{"continent/EU westus 1\ncountry/DE westus 80", "westeurope", "westus"}, // the country's own figure counts
		{"continent/EU southeastasia 1", "southeastasia", "westus"},
		{"continent/SA southeastasia 1", "westeurope", "southeastasia"},
		{"country/DE nowhere 1", "westeurope", "westus"},
	} {
		latencies, _, err := ReadLatencies(table(t, c.text+"\ncountry/BR westeurope 300\n"))
		if err != nil {
			t.Fatal(err)
		}
		if got := goes(t, router.Sources{Latencies: latencies}, german, brazilian); got[0] != c.german || got[1] != c.brazilian {
			t.Errorf("%q: %v, want %s and %s", c.text, got, c.german, c.brazilian)
		}
	}
}

func TestTablesWithFaults(t *testing.T) {
	t.Parallel()
	prefixes := func(path string) error { _, _, err := ReadPrefixes(path); return err }
	latencies := func(path string) error { _, _, err := ReadLatencies(path); return err }
	for _, c := range []struct {
		read func(string) error
		text string
		want []string // of the error
	}{
		{prefixes, "203.0.113.0/24 westus\n\nnonsense westus\n198.51.100.0 westus", []string{":3: \"nonsense\" is no prefix", ":4: \"198.51.100.0\" is no prefix"}},
		{prefixes, "203.0.113.7/24 westus", []string{":1: 203.0.113.7/24 has bits beyond its length: 203.0.113.0/24?"}},
		{prefixes, "203.0.113.0/24", []string{":1: want a prefix and regions"}},
		{prefixes, "203.0.113.0/24 westus, eastus", []string{":1: want a prefix and regions"}},
		{prefixes, "203.0.113.0/24 west_us", []string{":1: region"}},
		{prefixes, "203.0.113.0/24 westus,westus", []string{"twice"}},
		{prefixes, "203.0.113.0/24 westus\n203.0.113.0/24 eastus", []string{":2: 203.0.113.0/24 has a line already"}},
		{prefixes, "203.0.114.0/24 westus\n::ffff:203.0.114.0/120 eastus\n2002:cb00:7200::/40 eastus", []string{
			":2: ::ffff:203.0.114.0/120 holds the clients of 203.0.114.0/24, which has a line already", ":3: 2002:cb00:7200::/40 holds"}},
		{prefixes, "64:ff9b::203.0.114.0/120 westus\n203.0.114.0/24 eastus", []string{":2: 203.0.114.0/24 has a line already"}},
		{latencies, "country/DE westus", []string{":1: want a country or a continent, a region and milliseconds"}},
		{latencies, "country/ZZ westus 1\ncontinent/DE westus 1\nDE westus 1", []string{":1: \"ZZ\" is no country", ":2: \"DE\" is no continent", ":3: \"DE\": want country/DE"}},
		{latencies, "country/DE westus 0\ncountry/DE westus 1.5\ncountry/DE westus 10001", []string{":1: \"0\": want whole milliseconds", ":2:", ":3:"}},
		{latencies, "country/DE westus,eastus 7", []string{"want one region a line"}},
		{latencies, "country/DE westus 7\ncountry/DE westus 8", []string{":2: country/DE to westus has a line already"}},
		{latencies, strings.Repeat("x\n", 100), []string{":10: "}},
		{latencies, strings.Repeat("x", 100_000), []string{"too long"}},
	} {
		err := c.read(table(t, c.text))
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%.40q: %v, want %q", c.text, err, want)
			}
		}
		if err != nil && strings.Count(err.Error(), "\n") >= maxFaults {
			t.Errorf("%.40q: more than %d faults are told", c.text, maxFaults)
		}
	}
	if err := prefixes(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a table that is not there is read")
	}
}
