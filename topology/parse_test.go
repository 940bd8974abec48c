package topology

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"portolan/store"

	"pgregory.net/rapid"
)

// three is a registry of three replicas.
func three() Values {
	v := Values{
		"registries/contoso/home":                "westus",
		"registries/contoso/names":               "registry.contoso.com",
		"registries/contoso/fences/continent/EU": "westeurope",
		"registries/contoso/orders/country/DE":   "westeurope,eastus",
		"registries/contoso/policy/all_down":     "none",
	}
	for i, region := range []string{"westus", "eastus", "westeurope"} {
		v["registries/contoso/replicas/"+region+"/endpoint"] = fmt.Sprintf("https://r%d.example.net", i)
		v["registries/contoso/replicas/"+region+"/addresses"] = fmt.Sprintf("192.0.2.%d", i+1)
	}
	return v
}

func with(v Values, pairs ...string) Values {
	v = maps.Clone(v)
	for i := 0; i < len(pairs); i += 2 {
		k := "registries/contoso/" + pairs[i]
		if pairs[i+1] == "-" {
			maps.DeleteFunc(v, func(name, _ string) bool { return name == k || strings.HasSuffix(k, "/") && strings.HasPrefix(name, k) })
		} else {
			v[k] = pairs[i+1]
		}
	}
	return v
}

func TestParseKeepsTheLastGoodValue(t *testing.T) {
	t.Parallel()
	base := three()
	const r = "replicas/eastus/"
	for name, c := range map[string]struct {
		before, after Values
		key           string // of the problem
		reason        string
		effect        string
		same          bool   // as before
		out           string // a replica that is left out
	}{
		"a bad weight, none before": {base, with(base, r+"weight", "101"), r + "weight", "not a weight", "the default 100 holds", true, ""},
		"a bad weight, one before":  {with(base, r+"weight", "7"), with(base, r+"weight", "5O"), r + "weight", "not a weight", "the last good value 7 is kept", true, ""},
		"a bad address":             {base, with(base, r+"addresses", "0.0.0.0"), r + "addresses", "no address that a client", "192.0.2.2 is kept", true, ""},
		"a bad endpoint":            {base, with(base, r+"endpoint", "https://a.example.net/x"), r + "endpoint", "has a path", "https://r1.example.net is kept", true, ""},
		"a password":                {base, with(base, r+"endpoint", "https://u:hunter2@a.example.net"), r + "endpoint", "holds a user", "https://r1.example.net is kept", true, ""},
		"an endpoint twice":         {base, with(base, r+"endpoint", "https://r0.example.net:443"), r + "endpoint", "is the endpoint of replica westus too", "is kept", true, ""},
		"a hostname beside":         {base, with(base, r+"hostname", "a.example.net"), r + "hostname", "both set", "ignored", true, ""},
		"a hostname instead":        {base, with(base, r+"addresses", "-", r+"hostname", "a.example.net"), r + "hostname", "all of a registry's replicas", "ignored", true, ""},
		"home elsewhere":            {base, with(base, "home", "uksouth"), "home", "no complete replica", "westus is kept", true, ""},
		"home removed":              {base, with(base, "home", "-"), "home", "cannot be without", "westus is kept", true, ""},
		"home's replica removed":    {base, with(base, "replicas/westus/", "-"), "replicas/westus/endpoint", "cannot be removed", "are kept", true, ""},
		"home's endpoint removed":   {base, with(base, "replicas/westus/endpoint", "-"), "replicas/westus/endpoint", "cannot be removed", "are kept", true, ""},
		"home's addresses removed":  {base, with(base, "replicas/westus/addresses", "-"), "replicas/westus/addresses", "cannot be without addresses", "are kept", true, ""},
		"no scheme":                 {base, with(base, r+"endpoint", "127.0.0.1:5000"), r + "endpoint", `"127.0.0.1:5000" has neither http:// nor https:// before it: write http://127.0.0.1:5000 or https://127.0.0.1:5000`, "is kept", true, ""},
		"a host without scheme":     {base, with(base, r+"endpoint", "a.example.net:5000"), r + "endpoint", "write http://a.example.net:5000 or https://", "is kept", true, ""},
		"a password, no scheme":     {base, with(base, r+"endpoint", "u:hunter2@a.example.net"), r + "endpoint", "has neither http:// nor https:// before it: an endpoint is", "is kept", true, ""},
		"another scheme":            {base, with(base, r+"endpoint", "ftp://a.example.net"), r + "endpoint", "has neither http:// nor https:// before it: an endpoint is", "is kept", true, ""},
		"a bad order":               {base, with(base, "orders/country/DE", "westeurpe"), "orders/country/DE", "did you mean westeurope?", "westeurope,eastus is kept", true, ""},
		"a new bad order":           {base, with(base, "orders/country/FR", "uksouth"), "orders/country/FR", "names uksouth", "this rule is left out", true, ""},
		"an unknown key":            {base, with(base, r+"wieght", "3"), r + "wieght", `did you mean "weight"?`, "ignored", true, ""},
		"an unknown policy":         {base, with(base, "policy/al_down", "none"), "policy/al_down", `did you mean "policy/all_down"?`, "ignored", true, ""},
		"a bad policy":              {base, with(base, "policy/merge", "hmoe"), "policy/merge", `did you mean "home"?`, "the default ask holds", true, ""},
		"a lower-case country":      {base, with(base, "orders/country/de", "westus"), "orders/country/de", "write DE", "ignored", true, ""},
		"a new replica, bad weight": {base, with(base, "replicas/uksouth/endpoint", "http://x", "replicas/uksouth/addresses", "192.0.2.9", "replicas/uksouth/weight", "x"), "replicas/uksouth/weight", "not a weight", "replica uksouth is not served", false, "uksouth"},
		"a new replica, half":       {base, with(base, "replicas/uksouth/endpoint", "http://x"), "replicas/uksouth/addresses", "is missing", "replica uksouth is not served", false, "uksouth"},
		"a new region, nowhere":     {base, with(base, "replicas/ukouth/endpoint", "http://x", "replicas/ukouth/addresses", "192.0.2.9"), "replicas/ukouth/location", "did you mean uksouth?", "replica ukouth is not served", false, "ukouth"},
		"an endpoint removed":       {base, with(base, r+"endpoint", "-"), r + "endpoint", "is missing", "replica eastus is not served", false, "eastus"},
		"a secret as a reference":   {base, with(base, r+"credentials", "hunter2"), r + "credentials", "is no reference", "ignored", true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, good := Parse(c.before, nil, nil)
			if len(old.Problems) != 0 {
				t.Fatalf("before: %+v", old.Problems)
			}
			s, next := Parse(c.after, good, nil)
			if len(s.Problems) != 1 {
				t.Fatalf("problems: %+v", s.Problems)
			}
			p := s.Problems[0]
			if p.Key != "registries/contoso/"+c.key || !strings.Contains(p.Reason, c.reason) || !strings.Contains(p.Effect, c.effect) {
				t.Errorf("got %+v", p)
			}
			if strings.Contains(fmt.Sprint(p), "hunter2") {
				t.Errorf("a secret is shown: %+v", p)
			}
			if c.same != (s.Digest == old.Digest) {
				t.Errorf("the same meaning as before: %t, want %t", s.Digest == old.Digest, c.same)
			}
			if c.out != "" && (!slices.Contains(s.Registry("contoso").Incomplete, c.out) || s.Registry("contoso").Replica(c.out) != nil) {
				t.Errorf("%s is served", c.out)
			}
			again, _ := Parse(c.after, next, nil)
			if !reflect.DeepEqual(again, s) {
				t.Errorf("parsing again gives another snapshot:\n%+v\n%+v", again.Problems, s.Problems)
			}
		})
	}
}

func TestParseAcceptsWhatIsWholeAgain(t *testing.T) {
	t.Parallel()
	_, good := Parse(three(), nil, nil)
	e0, e1 := "replicas/westus/endpoint", "replicas/eastus/endpoint"
	step := with(three(), e0, "https://r1.example.net")
	s, good := Parse(step, good, nil)
	if len(s.Problems) != 1 {
		t.Fatalf("half of a swap: %+v", s.Problems)
	}
	s, _ = Parse(with(step, e1, "https://r0.example.net"), good, nil)
	if len(s.Problems) != 0 || s.Registry("contoso").Replica("westus").Endpoint.Host != "r1.example.net" {
		t.Fatalf("a whole swap: %+v", s.Problems)
	}
	// One replica after the other goes from addresses to host names; the last one turns the registry.
	v := three()
	for i, region := range []string{"eastus", "westeurope", "westus"} {
		v = with(v, "replicas/"+region+"/addresses", "-", "replicas/"+region+"/hostname", region+".example.net")
		s, good = Parse(v, good, nil)
		if i < 2 && (len(s.Problems) != i+1 || s.Registry("contoso").Replica("eastus").Hostname != "") {
			t.Fatalf("step %d: %+v", i, s.Problems)
		}
	}
	if len(s.Problems) != 0 || s.Registry("contoso").Replica("eastus").Hostname != "eastus.example.net." {
		t.Fatalf("all host names: %+v", s.Problems)
	}
}

func TestParseWithoutLastGood(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		values Values
		gone   bool
		out    []string
	}{
		"one bad replica":          {with(three(), "replicas/eastus/routing", "maybe"), false, []string{"eastus"}},
		"mixed: the home says":     {with(three(), "replicas/westus/addresses", "-", "replicas/westus/hostname", "h.example.net"), false, []string{"eastus", "westeurope"}},
		"one endpoint: home first": {with(three(), "replicas/westus/endpoint", "https://r1.example.net"), false, []string{"eastus"}},
		"no home":                  {with(three(), "home", "-"), true, nil},
		"home without replica":     {with(three(), "home", "uksouth"), true, nil},
		"home not complete":        {with(three(), "replicas/westus/addresses", "-"), false, []string{"westus"}},
	} {
		s, good := Parse(c.values, nil, nil)
		r := s.Registry("contoso")
		if (r == nil) != c.gone || r != nil && !slices.Equal(r.Incomplete, c.out) {
			t.Errorf("%s: %+v; %+v", name, r, s.Problems)
		}
		if again, _ := Parse(c.values, good, nil); !reflect.DeepEqual(again, s) {
			t.Errorf("%s: parsing again gives\n%+v\nafter\n%+v", name, again.Problems, s.Problems)
		}
	}
}

// A replica made by separate puts, in whatever order, is left out and named until it is complete, and the others stay as they
// are; taken away by separate deletions it is named until the last, and nothing of it comes back.
func TestReplicaMadeAndUnmadeByKeys(t *testing.T) {
	t.Parallel()
	keys := map[string]string{"endpoint": "https://mine.example.net", "addresses": "192.0.2.9", "location": "5,6", "weight": "10"}
	var orders func(done, rest []string)
	orders = func(done, rest []string) {
		for i, k := range rest {
			orders(slices.Concat(done, []string{k}), slices.Concat(rest[:i], rest[i+1:]))
		}
		if len(rest) > 0 {
			return
		}
		old, good := Parse(three(), nil, nil)
		values, complete := three(), false
		step := func(f, value string, have []string) {
			t.Helper()
			var s *Snapshot
			values = with(values, "replicas/mine/"+f, value)
			s, good = Parse(values, good, nil)
			r, has := s.Registry("contoso"), func(f string) bool { return slices.Contains(have, f) }
			// A location that is taken away from a complete replica is kept.
			complete = has("endpoint") && has("addresses") && (has("location") || complete)
			if sound := complete && has("location") || len(have) == 0; complete != (r.Replica("mine") != nil) || sound != (len(s.Problems) == 0) {
				t.Errorf("%v, %s=%s: %+v; %+v", done, f, value, r.Replica("mine"), s.Problems)
			}
			r.Replicas = slices.DeleteFunc(slices.Clone(r.Replicas), func(p *Replica) bool { return p.Region == "mine" })
			if r.Incomplete = nil; !reflect.DeepEqual(r, old.Registries[0]) {
				t.Errorf("%v, %s=%s: the others changed: %+v", done, f, value, r)
			}
		}
		for i, f := range done {
			step(f, keys[f], done[:i+1])
		}
		for i, f := range done {
			step(f, "-", done[i+1:])
		}
	}
	orders(nil, []string{"addresses", "endpoint", "location", "weight"})
}

func TestFenceOfRegionsThatLeftStillBinds(t *testing.T) {
	t.Parallel()
	_, good := Parse(three(), nil, nil)
	s, _ := Parse(with(three(), "replicas/westeurope/", "-"), good, nil)
	r := s.Registry("contoso")
	if len(r.Fences) != 1 || len(r.Fences[0].Regions) != 0 {
		t.Errorf("fences: %+v", r.Fences)
	}
	if len(r.Orders) != 1 || !slices.Equal(r.Orders[0].Regions, []string{"eastus"}) {
		t.Errorf("orders: %+v", r.Orders)
	}
}

func TestReservedAndBadNames(t *testing.T) {
	t.Parallel()
	v := three()
	for k, value := range three() {
		v[strings.Replace(k, "contoso", "ns1", 1)] = value
		v[strings.Replace(k, "contoso", "Fabrikam", 1)] = value
	}
	v["registries/contoso/replicas/whoami/endpoint"] = "http://x"
	s, _ := Parse(v, nil, []string{"whoami", "ns1"})
	if len(s.Registries) != 1 || len(s.Registries[0].Replicas) != 3 {
		t.Fatalf("registries: %+v", s.Registries)
	}
	var reserved []string
	for _, p := range s.Problems {
		if strings.Contains(p.Reason, "reserved") {
			reserved = append(reserved, p.Key)
		}
	}
	slices.Sort(reserved)
	if !slices.Equal(reserved, []string{"registries/contoso/replicas/whoami/", "registries/ns1/"}) { // each once, not for every key
		t.Errorf("reserved: %v", reserved)
	}
}

func TestClientNamesAreOfOneRegistry(t *testing.T) {
	t.Parallel()
	v := three()
	for k, value := range three() {
		v[strings.Replace(k, "contoso", "aaa", 1)] = value
	}
	v["registries/aaa/names"] = "aaa.example.com"
	s, good := Parse(v, nil, nil)
	if len(s.Problems) > 0 {
		t.Fatal(s.Problems)
	}
	v = maps.Clone(v)
	v["registries/aaa/names"] = "registry.contoso.com"
	s, _ = Parse(v, good, nil)
	if len(s.Problems) != 1 || s.Registry("aaa").ClientNames[0] != "aaa.example.com" || len(s.Registry("contoso").ClientNames) != 1 {
		t.Errorf("the older right does not hold: %+v", s.Problems)
	}
}

func TestEndpointsAndAddresses(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"https://A.Example.net/": "https://a.example.net", "http://[::ffff:192.0.2.1]:5000": "http://192.0.2.1:5000", "http://my_registry:5000": "http://my_registry:5000",
		"ftp://a": "", "a.example.net": "", "https://a?x": "", "https://a?": "", "https://a#": "", "https://": "", "https://a:0": "", "https://a:70000": "",
		"https://a:": "", "https://[fe80::1%25eth0]": "", "https://0.0.0.0": "", "https://a b": "", "https://-a": "", "http:a": "", "https://a/v2/": "", "": "",
	} {
		u, err := parseEndpoint(text)
		if want == "" && err == nil || want != "" && (err != nil || u.String() != want) {
			t.Errorf("parseEndpoint(%q) = %v, %v; want %q", text, u, err, want)
		}
	}
	for text, want := range map[string]string{
		"192.0.2.1,2001:db8::1": "[192.0.2.1 2001:db8::1]", "::ffff:192.0.2.1": "[192.0.2.1]", " 192.0.2.1 , 192.0.2.2": "[192.0.2.1 192.0.2.2]",
		"": "", "::": "", "0.0.0.0": "", "224.0.0.1": "", "ff02::1": "", "255.255.255.255": "", "fe80::1%eth0": "", "192.0.2.1,::ffff:192.0.2.1": "", "192.0.2.1,": "", "a.example.net": "",
	} {
		a, err := parseAddresses(text)
		if want == "" && err == nil || want != "" && (err != nil || fmt.Sprint(a) != want) {
			t.Errorf("parseAddresses(%q) = %v, %v; want %q", text, a, err, want)
		}
	}
	for text, ok := range map[string]bool{"registry.contoso.com": true, "registry.contoso.com.": true, "registry": false, "192.0.2.1": false, "a..b": false, "*.a.com": false, "a.123": false, "A.com": false, ".": false} {
		if _, err := parseName(text); (err == nil) != ok {
			t.Errorf("parseName(%q): %v", text, err)
		}
	}
	for text, ok := range map[string]bool{"52.37,4.90": true, "-90,180": true, "90.1,0": false, "0,181": false, "1": false, "1,2,3": false, "NaN,0": false, "0x1,0": false, "1e1,0": false, "a,b": false} {
		if _, err := parseLocation(text); (err == nil) != ok {
			t.Errorf("parseLocation(%q): %v", text, err)
		}
	}
	for text, want := range map[string]string{"auth.contoso.com, auth.example.net:8443": "auth.contoso.com,auth.example.net:8443", "auth": "auth", "a,": "", "a b": "", "me@a": ""} {
		err := checkRealms(text)
		s, _ := Parse(with(three(), "replicas/eastus/realms", text), nil, nil)
		if want == "" && err == nil || want != "" && (err != nil || s.Registry("contoso").Replica("eastus").Access.Realms != want) {
			t.Errorf("realms %q: %v; %+v", text, err, s.Problems)
		}
	}
	for text, same := range map[string]string{"https://a.example.net.": "https://a.example.net:443", "http://A.example.net.:80/": "http://a.example.net"} {
		a, err := parseEndpoint(text)
		b, err2 := parseEndpoint(same)
		if err != nil || err2 != nil || hostPort(a) != hostPort(b) {
			t.Errorf("%s (%v) and %s (%v) are not one server", text, err, same, err2)
		}
	}
	for text, ok := range map[string]bool{"a/b": true, "a__b": true, "a--b": true, "a..b": false, "A": false, "/a": false, "a/": false, "a_-b": false} {
		if err := checkRepositoryPrefix(text); (err == nil) != ok {
			t.Errorf("checkRepositoryPrefix(%q): %v", text, err)
		}
	}
}

// sound holds every promise that a snapshot makes to those who use it.
func sound(s *Snapshot) error {
	names := map[string]bool{}
	previous := ""
	for _, r := range s.Registries {
		if r.Name <= previous {
			return fmt.Errorf("registry %s is not in order", r.Name)
		}
		previous = r.Name
		if r.Replica(r.Home) == nil && !slices.Contains(r.Incomplete, r.Home) {
			return fmt.Errorf("registry %s: the home %s has no replica", r.Name, r.Home)
		}
		for _, n := range r.ClientNames {
			if names[n] {
				return fmt.Errorf("client name %s twice", n)
			}
			names[n] = true
		}
		endpoints, before := map[string]bool{}, ""
		for _, p := range r.Replicas {
			if p.Region <= before || slices.Contains(r.Incomplete, p.Region) {
				return fmt.Errorf("replica %s is not in order, or incomplete", p.Region)
			}
			before = p.Region
			if endpoints[hostPort(p.Endpoint)] {
				return fmt.Errorf("endpoint %s twice", p.Endpoint)
			}
			endpoints[hostPort(p.Endpoint)] = true
			if (p.Hostname == "") == (len(p.Addresses) == 0) || (p.Hostname == "") != (r.Replicas[0].Hostname == "") {
				return fmt.Errorf("replica %s: %q and %v", p.Region, p.Hostname, p.Addresses)
			}
			if p.Weight < 0 || p.Weight > 100 || p.Location == (Coordinates{}) {
				return fmt.Errorf("replica %s: weight %d, location %v", p.Region, p.Weight, p.Location)
			}
		}
		for _, rule := range slices.Concat(r.Orders, r.Fences) {
			for _, region := range rule.Regions {
				if r.Replica(region) == nil && !slices.Contains(r.Incomplete, region) {
					return fmt.Errorf("rule %v names %s", rule.Match, region)
				}
			}
		}
	}
	return nil
}

// edits draws an edit of a few keys with a few values, good and bad, so that they meet often.
func edits(t *rapid.T, v Values) Values {
	v = maps.Clone(v)
	registry := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "registry")
	region := rapid.SampledFrom([]string{"westus", "eastus", "mine", "uksouth"}).Draw(t, "region")
	values := map[string][]string{
		"home": {"westus", "eastus", "mine", "Bad", ""}, "names": {"one.example.com", "two.example.com", "one.example.com,two.example.com", "bad", ""},
		"policy/all_down": {"nearest", "none", "cname:x.example.com", "bad"}, "orders/country/DE": {"westus", "eastus,mine", "nowhere", ""},
		"fences/continent/EU": {"westus", "mine", "nowhere,eastus"}, "unknown": {"x"},
	}
	for k, vs := range map[string][]string{
		"endpoint": {"https://one", "https://two", "https://three:443", "https://three", "bad"}, "addresses": {"192.0.2.1", "192.0.2.1,2001:db8::1", "bad"},
		"hostname": {"a.example.com", "b.example.com", "bad"}, "location": {"1,2", "3,4", "x"}, "weight": {"0", "50", "100", "101"},
		"ramp": {"50->100 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z", "x"}, "routing": {"enabled", "disabled", "x"}, "health/probe": {"tcp", "none", "x"}, "wieght": {"1"},
	} {
		values["replicas/"+region+"/"+k] = vs
	}
	k := rapid.SampledFrom(slices.Sorted(maps.Keys(values))).Draw(t, "key")
	name := "registries/" + registry + "/" + k
	switch rapid.IntRange(0, 9).Draw(t, "what") {
	case 0:
		delete(v, name)
	case 1:
		maps.DeleteFunc(v, func(n, _ string) bool { return strings.HasPrefix(n, "registries/"+registry+"/replicas/"+region+"/") })
	case 2, 3: // a whole replica at once
		v["registries/"+registry+"/replicas/"+region+"/endpoint"] = "https://" + region + ".example.net"
		v["registries/"+registry+"/replicas/"+region+"/addresses"] = "192.0.2.7"
		v["registries/"+registry+"/replicas/"+region+"/location"] = "5,6"
		if _, ok := v["registries/"+registry+"/home"]; !ok {
			v["registries/"+registry+"/home"] = region
		}
	default:
		v[name] = rapid.SampledFrom(values[k]).Draw(t, "value")
	}
	return v
}

// Whatever is edited, the snapshot is sound, means exactly its good values, and parsing again changes nothing of that. Which
// of two keys that contradict each other a problem names may change, since the parse before it is known then.
func TestAnyEditsLeaveASoundSnapshot(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		values, good := Values{}, Values(nil)
		for range rapid.IntRange(1, 40).Draw(t, "edits") {
			values = edits(t, values)
			s, next := Parse(values, good, nil)
			if err := sound(s); err != nil {
				t.Fatalf("%v\n%v\n%+v", err, values, s.Problems)
			}
			if again, same := Parse(values, next, nil); !reflect.DeepEqual(again.Registries, s.Registries) || !maps.Equal(same, next) || (len(again.Problems) == 0) != (len(s.Problems) == 0) {
				t.Fatalf("parsing again:\n%+v\n%+v\n%v", s.Problems, again.Problems, values)
			}
			if own, _ := Parse(next, next, nil); own.Digest != s.Digest && len(own.Registries) > 0 && len(s.Registries[0].Incomplete) == 0 {
				incomplete := 0
				for _, r := range s.Registries {
					incomplete += len(r.Incomplete)
				}
				if incomplete == 0 {
					t.Fatalf("the good values mean something else:\n%v\n%+v", next, own.Problems)
				}
			}
			good = next
		}
	})
}

// A key that contradicts no other has its newest valid value, whatever was written to it.
func TestNewestValidValueHolds(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		values, want := three(), map[string]string{"weight": "100", "routing": "enabled", "location": "38.9,-77", "health/probe": "https", "health/canary": ""}
		values["registries/contoso/replicas/eastus/location"] = want["location"]
		_, good := Parse(values, nil, nil)
		choices := map[string][]string{"weight": {"0", "1", "100", "101", "-1", "x"}, "routing": {"enabled", "disabled", "x"},
			"location": {"1,2", "3,4", "91,0", "x"}, "health/probe": {"tcp", "none", "https", "x", "consul:"},
			"health/canary": {"team/a:1", "b:latest", "b", "b:", ":1"}}
		for range rapid.IntRange(1, 30).Draw(t, "edits") {
			f := rapid.SampledFrom(slices.Sorted(maps.Keys(choices))).Draw(t, "field")
			value := rapid.SampledFrom(choices[f]).Draw(t, "value")
			k := key{registry: "contoso", region: "eastus", field: f}
			values = with(values, "replicas/eastus/"+f, value)
			if k.check(value) == nil {
				want[f] = value
			}
			var s *Snapshot
			s, good = Parse(values, good, nil)
			p := s.Registry("contoso").Replica("eastus")
			if p == nil {
				t.Fatalf("eastus is not served: %+v", s.Problems)
			}
			routing := "disabled"
			if p.Routing {
				routing = "enabled"
			}
			got := map[string]string{"weight": fmt.Sprint(p.Weight), "routing": routing, "location": p.Location.String(), "health/probe": p.Probe.String(), "health/canary": p.Canary.String()}
			if !maps.Equal(got, want) {
				t.Fatalf("after %s=%q: %v, want %v", f, value, got, want)
			}
		}
	})
}

func TestDocumentsAndKeysAreOne(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		values := Values{}
		for range rapid.IntRange(1, 40).Draw(t, "edits") {
			values = edits(t, values)
		}
		_, good := Parse(values, nil, nil)
		d := documentOf(good)
		if back := documentOf(d.Values()); !reflect.DeepEqual(back, d) {
			t.Fatalf("%+v\n%+v", back, d)
		}
		a, _ := Parse(good, nil, nil)
		b, _ := Parse(d.Values(), nil, nil)
		if a.Digest != b.Digest {
			t.Fatalf("the document means something else than its keys: %+v", d)
		}
		if c := a.Document(); len(a.Problems) == 0 {
			if s, _ := Parse(c.Values(), nil, nil); s.Digest != a.Digest {
				t.Fatalf("the document of a snapshot means something else: %+v", c)
			}
		}
	})
}

// The document of a snapshot is what was declared, not what came of it: nothing is filled in, no default left out, no form changed.
func TestDocumentOfASnapshotIsAsDeclared(t *testing.T) {
	t.Parallel()
	values := with(three(), "replicas/westus/health/probe", "https", "replicas/westus/location", "37.780,-122.420", "replicas/westeurope/location", "-",
		"replicas/westeurope/weight", "100", "policy/max_lag", "600s", "fences/continent/EU", "westeurope, westus")
	s, _ := Parse(values, nil, nil)
	if len(s.Problems) > 0 {
		t.Fatal(s.Problems)
	}
	if got := s.Document(); !reflect.DeepEqual(got, documentOf(values)) {
		t.Errorf("%+v\nis not %+v", got, documentOf(values))
	}
	// What turned bad is as it was last; a ramp is the weight that it leads to.
	ramp := Ramp{Registry: "contoso", Region: "westus", From: 10, To: 60, Start: time.Unix(0, 0).UTC(), End: time.Unix(3600, 0).UTC()}
	values = with(values, "replicas/westeurope/weight", "250", "replicas/westus/weight", "10", "replicas/westus/ramp", ramp.String())
	s, _ = Parse(values, s.good, nil)
	s.Ramps, s.overtaken = values.underway()
	want := with(values, "replicas/westeurope/weight", "100", "replicas/westus/weight", "60", "replicas/westus/ramp", "-")
	if got := s.Document(); !reflect.DeepEqual(got, documentOf(want)) {
		t.Errorf("%+v\nis not %+v", got, documentOf(want))
	}
	// What is not served is left out, so that a store that has lost its keys can be given the rest again.
	values = with(values, "replicas/westeurope/", "-", "replicas/eastus/endpoint", "-", "replicas/westus/ramp", "-")
	s, _ = Parse(values, s.good, nil)
	d := s.Document()
	if err := d.Validate(); err != nil || len(d.Registries[0].Replicas) != 1 || len(d.Registries[0].Orders.Country) > 0 || !slices.Equal(d.Registries[0].Fences.Continent["EU"], []string{"westus"}) {
		t.Errorf("%+v, %v", d, err)
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	no := consent(nil)
	_, good := Parse(three(), nil, nil)
	two := with(three(), "replicas/eastus/", "-", "replicas/westeurope/", "-")
	for name, c := range map[string]struct {
		values  Values
		missing []string
	}{
		"nothing":        {three(), nil},
		"one of three":   {with(three(), "replicas/eastus/", "-"), nil},
		"two of three":   {two, []string{"eastus", "westeurope"}},
		"two endpoints":  {with(three(), "replicas/eastus/endpoint", "-", "replicas/westeurope/addresses", "-"), []string{"eastus", "westeurope"}},
		"the replicas":   {with(three(), "replicas/", "-"), []string{"eastus", "westeurope", "westus"}},
		"all":            {Values{}, []string{"eastus", "westeurope", "westus"}},
		"bad, not gone":  {with(three(), "replicas/eastus/endpoint", "x", "replicas/westeurope/endpoint", "x"), nil},
		"to a host name": {with(three(), "replicas/eastus/addresses", "-", "replicas/eastus/hostname", "a.example.com"), nil},
	} {
		kept, held := guard(c.values, good, no)
		if len(c.missing) == 0 {
			if len(held) > 0 || !maps.Equal(kept, c.values) {
				t.Errorf("%s: held %v", name, held)
			}
			continue
		}
		if len(held) != 1 || !slices.Equal(held[0].Missing, c.missing) {
			t.Errorf("%s: held %+v, want %v", name, held, c.missing)
			continue
		}
		s, _ := Parse(kept, good, nil)
		if len(s.Registries) != 1 || len(s.Registries[0].Replicas) != 3 {
			t.Errorf("%s: not kept: %+v", name, s.Problems)
		}
	}
	// The rest of the same edit is applied.
	kept, _ := guard(with(two, "replicas/westus/weight", "3", "policy/all_down", "-"), good, no)
	s, _ := Parse(kept, good, nil)
	if r := s.Registry("contoso"); r.Replica("westus").Weight != 3 || r.Policy.AllDown.Mode != AllDownNearest {
		t.Errorf("the rest of the edit: %+v", r)
	}
	// What is confirmed passes, and nothing else.
	for _, c := range []struct {
		confirmed []string
		held      int
	}{{[]string{"westus"}, 0}, {nil, 1}, {[]string{"eastus", "westus"}, 1}} {
		if _, held := guard(two, good, consent(c.confirmed)); len(held) != c.held {
			t.Errorf("confirmed %v: held %v", c.confirmed, held)
		}
	}
}

// consent is that those regions are all of any registry's; nil is none.
type consent []string

func (c consent) regions(string) []string { return c }

func (c consent) cover(_ string, regions []string) bool { return c != nil && slices.Equal(regions, c) }

// A removal of one replica after another adds up to what it comes to, counted from what was confirmed last, by whatever steps.
func TestGuardAddsUp(t *testing.T) {
	t.Parallel()
	all := Values{}
	for i, region := range []string{"eastus", "northeurope", "uksouth", "westeurope", "westus"} {
		maps.Copy(all, Values{
			"registries/contoso/home":                              "westus",
			"registries/contoso/replicas/" + region + "/endpoint":  "https://" + region + ".example.com",
			"registries/contoso/replicas/" + region + "/addresses": fmt.Sprintf("192.0.2.%d", i+1),
		})
	}
	without := func(regions ...string) Values {
		v := maps.Clone(all)
		for _, r := range regions {
			v = with(v, "replicas/"+r+"/", "-")
		}
		return v
	}
	for name, c := range map[string]struct {
		last, now Values
		confirmed []string
		missing   []string
	}{
		"the second of five":               {without("eastus"), without("eastus", "uksouth"), []string{"eastus", "northeurope", "uksouth", "westeurope", "westus"}, nil},
		"the third":                        {without("eastus", "uksouth"), without("eastus", "uksouth", "westeurope"), []string{"eastus", "northeurope", "uksouth", "westeurope", "westus"}, []string{"westeurope"}},
		"the third, of what was confirmed": {without("eastus", "uksouth"), without("eastus", "uksouth", "westeurope"), []string{"northeurope", "westeurope", "westus"}, nil},
		"the third, never confirmed":       {without("eastus", "uksouth"), without("eastus", "uksouth", "westeurope"), nil, nil},
		"replaced":                         {without("eastus"), without("eastus", "uksouth"), []string{"brazilsouth", "centralindia", "eastus"}, nil},
		"others came since":                {all, without("eastus"), []string{"brazilsouth", "eastus", "westus"}, nil},
		"nothing more":                     {without("eastus", "uksouth", "westeurope"), without("eastus", "uksouth", "westeurope"), []string{"eastus", "northeurope", "uksouth", "westeurope", "westus"}, nil},
	} {
		_, good := Parse(c.last, nil, nil)
		kept, held := guard(c.now, good, consent(c.confirmed))
		if len(c.missing) == 0 && len(held) == 0 {
			continue
		}
		if len(held) != 1 || !slices.Equal(held[0].Missing, c.missing) || !maps.Equal(kept, c.last) {
			t.Errorf("%s: held %+v, want %v", name, held, c.missing)
		}
	}
}

// A confirmation is of one state: a registry without replicas is not one that is gone.
func TestConfirmations(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		value   string
		regions []string
		want    bool
	}{
		{"-", nil, true}, {" -\n", nil, true}, {"", nil, false}, {"westus", nil, false},
		{"-", []string{}, false}, {"", []string{}, true},
		{"eastus,westus", []string{"eastus", "westus"}, true}, {" westus, eastus\n", []string{"eastus", "westus"}, true},
		{"eastus", []string{"eastus", "westus"}, false}, {"-", []string{"eastus"}, false},
	} {
		if got := confirms(c.value, c.regions); got != c.want {
			t.Errorf("confirms(%q, %v) = %v", c.value, c.regions, got)
		}
	}
	for _, regions := range [][]string{nil, {}, {"eastus", "westus"}} {
		if !confirms(confirmation(regions), regions) {
			t.Errorf("%v is not what it confirms", regions)
		}
	}
}

func FuzzTree(f *testing.F) {
	for k, v := range three() {
		f.Add(k, v, "registries/contoso/home", "westus")
	}
	f.Add("registries/contoso/", "", "registries/x/replicas/y/endpoint", "http://[::1]:5")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2 string) {
		values := three()
		_, good := Parse(values, nil, nil)
		for k, v := range ValuesOf(store.Tree{Entries: []store.Entry{{Key: k1, Value: v1}, {Key: k2, Value: v2}}}) {
			values[k] = v
		}
		s, next := Parse(values, good, nil)
		if err := sound(s); err != nil {
			t.Fatal(err, values)
		}
		if again, _ := Parse(values, next, nil); !reflect.DeepEqual(again.Registries, s.Registries) {
			t.Fatalf("parsing again:\n%+v\n%+v", s.Problems, again.Problems)
		}
		d := documentOf(next)
		text, err := d.YAML()
		if err != nil {
			t.Fatal(err)
		}
		back, err := ParseYAML("again", text)
		if err != nil {
			return // a rule may name a region that left
		}
		if diff := Diff(d, *back); len(diff) > 0 {
			t.Fatalf("the round trip changed %v\n%s", diff, text)
		}
	})
}
