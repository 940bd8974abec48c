package topology

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

const goodYAML = `# two regions
registries:
  - name: contoso
    home: westus
    names: [registry.contoso.com]
    policy: {all_down: "cname:fallback.contoso.com", merge: home}
    orders:
      country: {DE: [westeurope, westus], NO: [westeurope]}
      prefix: {"203.0.113.0/24": [westus], "2001:db8::/32": [westeurope]}
      asn: {64500: [westus]}
    fences:
      continent:
        EU: [westeurope]
    replicas:
      - {region: westus, endpoint: "http://127.0.1.1:5000", addresses: [127.0.1.1], weight: 100}
      - region: westeurope
        endpoint: "http://127.0.2.1:5000"
        addresses: [127.0.2.1, "2001:db8::2"]
        location: [52.37, 4.90]
        weight: 0
        routing: disabled
        health: {probe: "consul:registry", canary: "team/canary:1"}
        credentials: env:WEST
        ca: file:/etc/ca.pem
        prefix: mirror/a
        realms: "auth.contoso.com,127.0.0.1:8443"
`

func parseGood(t testing.TB, text string) *Document {
	t.Helper()
	d, err := ParseYAML("topology.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestParseYAML(t *testing.T) {
	t.Parallel()
	d := parseGood(t, goodYAML)
	v := d.Values()
	for k, want := range map[string]string{
		"registries/contoso/home":                              "westus",
		"registries/contoso/names":                             "registry.contoso.com",
		"registries/contoso/policy/all_down":                   "cname:fallback.contoso.com",
		"registries/contoso/policy/merge":                      "home",
		"registries/contoso/orders/country/DE":                 "westeurope,westus",
		"registries/contoso/orders/country/NO":                 "westeurope",
		"registries/contoso/orders/prefix/203.0.113.0_24":      "westus",
		"registries/contoso/orders/prefix/2001:db8::_32":       "westeurope",
		"registries/contoso/orders/asn/64500":                  "westus",
		"registries/contoso/fences/continent/EU":               "westeurope",
		"registries/contoso/replicas/westus/weight":            "100",
		"registries/contoso/replicas/westus/addresses":         "127.0.1.1",
		"registries/contoso/replicas/westeurope/location":      "52.37,4.9",
		"registries/contoso/replicas/westeurope/addresses":     "127.0.2.1,2001:db8::2",
		"registries/contoso/replicas/westeurope/weight":        "0",
		"registries/contoso/replicas/westeurope/routing":       "disabled",
		"registries/contoso/replicas/westeurope/health/probe":  "consul:registry",
		"registries/contoso/replicas/westeurope/health/canary": "team/canary:1",
		"registries/contoso/replicas/westeurope/credentials":   "env:WEST",
		"registries/contoso/replicas/westeurope/ca":            "file:/etc/ca.pem",
		"registries/contoso/replicas/westeurope/prefix":        "mirror/a",
		"registries/contoso/replicas/westeurope/realms":        "auth.contoso.com,127.0.0.1:8443",
		"registries/contoso/replicas/westeurope/endpoint":      "http://127.0.2.1:5000",
		"registries/contoso/replicas/westus/endpoint":          "http://127.0.1.1:5000",
	} {
		if v[k] != want {
			t.Errorf("%s = %q, want %q", k, v[k], want)
		}
		delete(v, k)
	}
	if len(v) > 0 {
		t.Errorf("more keys than expected: %v", v)
	}
	s, _ := Parse(d.Values(), nil, nil)
	if len(s.Problems) > 0 {
		t.Fatalf("problems: %+v", s.Problems)
	}
}

// Every fault is named with its place, and all of them at once.
func TestYAMLFaults(t *testing.T) {
	t.Parallel()
	head := "registries:\n  - name: contoso\n    home: westus\n    replicas:\n"
	one := "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1]}\n"
	for name, c := range map[string]struct {
		text string
		want []string // each "line:column: path: part of the reason"
	}{
		"unknown key":        {head + "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], wieght: 3}\n", []string{`5:85: registries[0].replicas[0].wieght: "wieght" is not known here; did you mean "weight"?`}},
		"unknown at the top": {"registeries: []\n", []string{`1:1: registeries: "registeries" is not known here; did you mean "registries"?`}},
		"weight":             {head + "      - region: westus\n        endpoint: http://127.0.1.1:5000\n        addresses: [127.0.1.1]\n        weight: 101\n", []string{`8:17: registries[0].replicas[0].weight: "101" is not a weight`}},
		"two weights": {head + "      - {region: westus, weight: -1}\n      - {region: eastus, weight: 1.5}\n", []string{`5:34: registries[0].replicas[0].weight: "-1"`, `6:34: registries[0].replicas[1].weight: "1.5"`,
			`5:9: registries[0].replicas[0].endpoint: is missing`, `5:9: registries[0].replicas[0].addresses: is missing`, `6:9: registries[0].replicas[1].endpoint: is missing`, `6:9: registries[0].replicas[1].addresses: is missing`}},
		"two registries": {head + one + "  - name: contoso\n    home: westus\n    replicas:\n" + one, []string{`6:11: registries[1].name: registry contoso stands there twice`}},
		"region twice, and more": {head + one + "      - {region: westus, endpoint: \"ftp://127.0.1.2:5000\", addresses: [1.2.3], weight: 101}\n", []string{`6:18: registries[0].replicas[1].region: region westus stands there twice`,
			`6:36: registries[0].replicas[1].endpoint: has neither`, `6:71: registries[0].replicas[1].addresses: "1.2.3" is not an IP address`, `6:88: registries[0].replicas[1].weight: "101" is not a weight`}},
		"registry twice, and more": {head + one + "  - name: contoso\n    home: westus\n    replicas:\n      - {region: westus, endpoint: \"http://127.0.1.2:5000\", addresses: [1.2.3]}\n", []string{`6:11: registries[1].name: registry contoso stands there twice`,
			`9:72: registries[1].replicas[0].addresses: "1.2.3" is not an IP address`}},
		"region twice":       {head + one + "      - {region: westus, endpoint: \"http://127.0.1.2:5000\", addresses: [127.0.1.2]}\n", []string{`6:18: registries[0].replicas[1].region: region westus stands there twice`}},
		"address":            {head + "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1, 1.2.3]}\n", []string{`5:72: registries[0].replicas[0].addresses: "1.2.3" is not an IP address`}},
		"endpoint missing":   {head + "      - {region: westus, addresses: [127.0.1.1]}\n", []string{`5:9: registries[0].replicas[0].endpoint: is missing`}},
		"nothing but a name": {head + "      - {region: westus}\n", []string{`5:9: registries[0].replicas[0].endpoint: is missing`, `5:9: registries[0].replicas[0].addresses: is missing`}},
		"only a registry":    {"registries:\n  - name: contoso\n    replicas: []\n", []string{`2:5: registries[0].home: is missing`, `3:15: registries[0].replicas: is missing`}},
		"home missing":       {"registries:\n  - name: contoso\n    replicas:\n" + one, []string{`2:5: registries[0].home: is missing`}},
		"home elsewhere":     {"registries:\n  - name: contoso\n    home: eastus\n    replicas:\n" + one, []string{`3:11: registries[0].home: the home region has no replica`}},
		"region unknown":     {head + one + "      - {region: westeurpe, endpoint: \"http://127.0.1.2:5000\", addresses: [127.0.1.2]}\n", []string{`6:9: registries[0].replicas[1].location: is missing: westeurpe is no public region`}},
		"order unknown":      {"registries:\n  - name: contoso\n    home: westus\n    orders: {country: {DE: [eastus]}}\n    replicas:\n" + one, []string{`4:28: registries[0].orders.country.DE: names eastus`}},
		"country":            {"registries:\n  - name: contoso\n    home: westus\n    orders: {country: {UK: [westus]}}\n    replicas:\n" + one, []string{`4:28: registries[0].orders.country.UK: "UK" is not a country's ISO 3166-1 code, two upper-case letters such as DE; the United Kingdom is GB`}},
		"realms":             {"registries:\n  - name: contoso\n    home: westus\n    replicas:\n      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], realms: \"https://auth.contoso.com\"}\n", []string{`5:93: registries[0].replicas[0].realms: "https://auth.contoso.com" is not the host of a token server: want host or host:port, comma-separated, such as auth.contoso.com`}},
		"realms as a list":   {"registries:\n  - name: contoso\n    home: westus\n    replicas:\n      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], realms: [a, b]}\n", []string{`5:93: registries[0].replicas[0].realms: is a list: a single value is needed, such as auth.contoso.com,token.contoso.com`}},
		"prefix":             {"registries:\n  - name: contoso\n    home: westus\n    orders: {prefix: {10.0.0.1/8: [westus]}}\n    replicas:\n" + one, []string{`4:35: registries[0].orders.prefix.10.0.0.1/8: "10.0.0.1/8" has bits beyond its length: write 10.0.0.0/8`}},
		"6to4 prefix":        {"registries:\n  - name: contoso\n    home: westus\n    orders: {prefix: {\"2002:1e01::/32\": [westus]}}\n    replicas:\n" + one, []string{`write the IPv4 prefix`}},
		"endpoint twice":     {head + one + "      - {region: eastus, endpoint: \"http://127.0.1.1:5000/\", addresses: [127.0.1.2]}\n", []string{`registries[0].replicas[`}},
		"mixed":              {head + one + "      - {region: eastus, endpoint: \"http://127.0.1.2:5000\", hostname: a.example.com}\n", []string{`6:71: registries[0].replicas[1].hostname: replica eastus has a hostname while others have addresses`}},
		"location":           {head + "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], location: [91, 0]}\n", []string{`registries[0].replicas[0].location: 91 is outside`}},
		"location of one":    {head + "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], location: [1]}\n", []string{`registries[0].replicas[0].location: "1": a location is`}},
		"key twice":          {"registries: []\nregistries: []\n", []string{`2:1: mapping key "registries" already defined`}},
		"syntax":             {"registries: [\n", []string{`1:13: sequence end token`}},
		"list wanted":        {"registries: {name: x}\n", []string{`1:13: registries: is a set of keys: a list is needed`}},
		"word wanted":        {"registries:\n  - name: [a]\n    home: westus\n    replicas:\n" + one, []string{`2:11: registries[0].name: is a list: a single value is needed`}},
		"alias":              {"registries: &a [*a]\n", []string{`registries: is an anchor or alias`}},
		"two documents":      {"registries: []\n---\nregistries: []\n", []string{`3:1: a second document`}},
		"empty":              {"", []string{`is empty`}},
		"nothing in it":      {"registries:\n", []string{`registries: is empty: a list is needed`}},
		"comma":              {head + "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [\"127.0.1.1,127.0.1.2\"]}\n", []string{`holds a comma`}},
		"upper case":         {"registries:\n  - name: Contoso\n    home: westus\n    replicas:\n" + one, []string{`2:11: registries[0].name: "Contoso" has upper-case letters: write "contoso"`}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d, err := ParseYAML("t.yaml", []byte(c.text))
			var invalid *InvalidError
			undecided := name == "order unknown" // a store may have it so
			if !errors.As(err, &invalid) || !errors.Is(err, ErrInvalid) || (d != nil) != undecided {
				t.Fatalf("ParseYAML = %v, %v; want an InvalidError", d, err)
			}
			if len(invalid.Faults) != len(c.want) {
				t.Errorf("%d faults, want %d:\n%v", len(invalid.Faults), len(c.want), err)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in:\n%v", want, err)
				}
			}
		})
	}
}

// What is wrong in the shadow of something else is told with it, and nothing is that is wrong only for that.
func TestFaultsInEachOthersShadow(t *testing.T) {
	t.Parallel()
	const good = "endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1]"
	for name, c := range map[string]struct {
		home, replicas string
		want           []string // the paths, and what reasons begin with
	}{
		"all that is missing": {"westus", "      - {region: westus, " + good + "}\n      - {region: attic, weight: 3}\n",
			[]string{"replicas[1].endpoint: is missing", "replicas[1].addresses: is missing", "replicas[1].location: is missing"}},
		"bad, and another's": {"westus", "      - {region: westus, " + good + "}\n      - {region: eastus, endpoint: \"http://127.0.1.1:5000\", addresses: [x], weight: 100}\n",
			[]string{`replicas[1].addresses: "x" is not an IP address`, "replicas[1].endpoint: is the endpoint of replica westus too"}},
		"beside a bad home": {"nowhere", "      - {region: westus, " + good + "}\n      - {region: eastus, endpoint: \"http://127.0.1.1:5000\", hostname: a.example.com}\n",
			[]string{"home: the home region has no replica", "replicas[0].addresses: replica westus has addresses", "is the endpoint of replica"}},
		"a bad home replica": {"westus", "      - {region: westus, endpoint: \"ftp://x\", addresses: [127.0.1.1]}\n      - {region: eastus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1], hostname: a.example.com}\n",
			[]string{"replicas[0].endpoint: has neither http:// nor https://", "replicas[1].addresses: addresses and hostname are both set"}},
		"beside a misspelt key": {"nowhere", "      - {region: westus, " + good + ", wieght: 3}\n      - {region: eastus, endpoint: \"http://127.0.1.2:5000\", addresses: [x]}\n",
			[]string{"home: the home region has no replica", `replicas[0].wieght: "wieght" is not known`, `replicas[1].addresses: "x" is not`}},
		"a misspelt region": {"westus", "      - {regoin: westus, " + good + "}\n", []string{`replicas[0].regoin: "regoin" is not known`}},
		"bad, beside a misspelt key": {"westus", "      - {region: westus, endpoint: \"ftp://x\", adresses: [127.0.1.1]}\n",
			[]string{`replicas[0].adresses: "adresses" is not known`, "replicas[0].endpoint: has neither http:// nor https://"}},
		"a misspelt need": {"westus", "      - {region: westus, endpiont: \"http://127.0.1.1:5000\"}\n",
			[]string{`replicas[0].endpiont: "endpiont" is not known`, "replicas[0].addresses: is missing"}},
		"a misspelt host name": {"westus", "      - {region: westus, endpoint: \"http://127.0.1.1:5000\", hotsname: a.example}\n", []string{`replicas[0].hotsname: "hotsname" is not known`}},
		"beside a misspelt region": {"westus", "      - {regoin: westus, endpoint: \"ftp://x\", addresses: [x], weight: 3}\n    orders: {country: {DE: [westus], UK: [westus]}}\n    names: [a_b]\n",
			[]string{`replicas[0].regoin: "regoin" is not known`, "replicas[0].endpoint: has neither", `replicas[0].addresses: "x" is not`, `orders.country.UK: "UK" is not`, "names: "}},
		"beside a bad region": {"west_us", "      - {region: west_us, " + good + "}\n      - {region: eastus, weight: 3}\n",
			[]string{`replicas[0].region: "west_us" has a character`, `home: "west_us" has a character`, "replicas[1].endpoint: is missing", "replicas[1].addresses: is missing"}},
		"replicas that are misspelt": {"westus", "    replcias: []\n    orders: {country: {DE: [westus]}}\n    policy: {merge: both}\n",
			[]string{`replcias: "replcias" is not known`, `policy.merge: "both" is not`}},
		"reserved": {"ns1", "      - {region: ns1, location: [0, 0], " + good + "}\n      - {region: eastus, weight: 3}\n", []string{"replicas[0]: the name \"ns1\" is reserved", "replicas[1].endpoint: is missing", "replicas[1].addresses: is missing"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			text := "registries:\n  - name: contoso\n    home: " + c.home + "\n"
			if strings.HasPrefix(c.replicas, "      -") {
				text += "    replicas:\n"
			}
			text += c.replicas
			_, err := ParseYAML("t.yaml", []byte(text), "ns1")
			var invalid *InvalidError
			if !errors.As(err, &invalid) || len(invalid.Faults) != len(c.want) {
				t.Fatalf("got\n%v\nwant %q", err, c.want)
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in:\n%v", want, err)
				}
			}
		})
	}
}

// Where no line of a file shows it, the value is told with the fault, but for secrets.
func TestFaultsHaveTheirValue(t *testing.T) {
	t.Parallel()
	d := Document{Registries: []RegistryDocument{{Name: "contoso", Home: "westus", Replicas: []ReplicaDocument{
		{Region: "westus", Endpoint: "ftp://127.0.1.1", Addresses: []string{"127.0.1.1"}},
		{Region: "eastus", Endpoint: "http://me:hunter2@127.0.1.2", Addresses: []string{"127.0.1"}}}}}}
	err := d.Validate()
	for _, want := range []string{"(given: ftp://127.0.1.1)", "(given: (not shown", `"127.0.1" is not an IP address`} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
	if err != nil && (strings.Contains(err.Error(), "hunter2") || strings.Contains(err.Error(), "given: 127.0.1)")) {
		t.Errorf("%v", err)
	}
}

func TestYAMLErrorShowsTheLineButNoSecret(t *testing.T) {
	t.Parallel()
	_, err := ParseYAML("t.yaml", []byte("registries:\n  - {nmae: contoso, policy: {merge: both}}\n"))
	if want := "registries[0].home: is missing"; err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), `policy.merge: "both" is`) {
		t.Errorf("got\n%v\nwant %s, too", err, want)
	}
	_, err = ParseYAML("t.yaml", []byte("registries:\n  - name: contoso\n    nmae: 2\n    home: westus\n    replicas:\n      - {region: westus, endpoint: \"http://127.0.1.1:5000\", addresses: [127.0.1.1]}\n"))
	if want := "t.yaml:3:5: registries[0].nmae: \"nmae\" is not known here; did you mean \"name\"?\n       3 |     nmae: 2"; err == nil || err.Error() != want {
		t.Errorf("got\n%v\nwant\n%s", err, want)
	}
	_, err = ParseYAML("t.yaml", []byte("registries:\n  - name: contoso\n    home: westus\n    replicas:\n      - region: westus\n        addresses: [127.0.0.1]\n        endpoint: https://me:hunter2@host\n        credentials: hunter2\n"))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error is missing or repeats a secret: %v", err)
	}
	// A secret beside what the fault is about.
	for _, line := range []string{
		`{region: westus, endpoint: "https://me:hunter2@host", addresses: [127.0.0.1], wieght: 3}`,
		`{region: westus, credentials: hunter2, wieght: 3}`,
		`{region: westus, credential: "hunter2"}`,
		`{region: westus, credentials: env:A, credential: hunter2}`,
		`{region: westus, credentials: hunter2`,
	} {
		_, err := ParseYAML("t.yaml", []byte("registries:\n  - name: contoso\n    home: westus\n    replicas:\n      - "+line+"\n"))
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error is missing or repeats a secret: %v", line, err)
		}
	}
	if line := `{region: westus, credentials: env:WESTUS, wieght: 3}`; secretIn(line) {
		t.Errorf("%s: a reference counts as a secret", line)
	}
}

func TestYAMLRoundTrip(t *testing.T) {
	t.Parallel()
	d := documentOf(parseGood(t, goodYAML).Values())
	text, err := d.YAML()
	if err != nil {
		t.Fatal(err)
	}
	back := parseGood(t, string(text))
	if !reflect.DeepEqual(*back, d) {
		t.Errorf("not the same after a round trip:\n%s\n%+v\n%+v", text, *back, d)
	}
	again, _ := back.YAML()
	if string(again) != string(text) {
		t.Errorf("not the same bytes:\n%s\n%s", text, again)
	}
	j, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	var fromJSON Document
	if err := json.Unmarshal(j, &fromJSON); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(fromJSON, d) {
		t.Errorf("not the same after JSON:\n%s", j)
	}
}

func TestDiff(t *testing.T) {
	t.Parallel()
	a := parseGood(t, goodYAML)
	b := parseGood(t, strings.NewReplacer("weight: 100", "routing: enabled", "weight: 0", "weight: 7", "4.90", "4.900", "NO: [westeurope]", "SE: [westeurope]",
		"health: {probe: \"consul:registry\", canary: \"team/canary:1\"}", "").Replace(goodYAML))
	got := fmt.Sprint(Diff(*a, *b))
	want := "[- registries/contoso/orders/country/NO: westeurope + registries/contoso/orders/country/SE: westeurope " +
		"- registries/contoso/replicas/westeurope/health/canary: team/canary:1 - registries/contoso/replicas/westeurope/health/probe: consul:registry ~ registries/contoso/replicas/westeurope/weight: 0 -> 7]"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if d := Diff(*a, *a); len(d) != 0 {
		t.Errorf("a document differs from itself: %v", d)
	}
}

func FuzzParseYAML(f *testing.F) {
	f.Add(goodYAML)
	f.Add("registries: []")
	f.Add("registries: &a [*a]\n")
	f.Add("registries:\n  - {name: a, home: b, orders: {asn: {1: [b]}}}\n")
	f.Fuzz(func(t *testing.T, text string) {
		d, err := ParseYAML("f", []byte(text))
		if err != nil {
			_ = err.Error()
			return
		}
		normal := documentOf(d.Values())
		first, err := normal.YAML()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseYAML("again", first)
		if err != nil {
			t.Fatalf("what was written is not read: %v\n%s", err, first)
		}
		if diff := Diff(*d, *back); len(diff) > 0 {
			t.Fatalf("the round trip changed %v\n%s", diff, first)
		}
		second, _ := back.YAML()
		if string(first) != string(second) {
			t.Fatalf("not stable:\n%s\n%s", first, second)
		}
	})
}
