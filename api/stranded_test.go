package api

import (
	"testing"

	"portolan/topology"
)

// Whose fence changes is told by the fences alone: clients come behind another where theirs goes, or where a more precise one comes.
func TestLost(t *testing.T) {
	t.Parallel()
	const live, dead = "westus", "westeurope" // of which the latter gets no clients
	type fences map[string]string
	for name, c := range map[string]struct {
		before, after fences
		lost          string // empty: nobody
	}{
		"nothing changes":            {fences{"continent/AF": dead}, fences{"continent/AF": dead}, ""},
		"another region":             {fences{"continent/AF": live}, fences{"continent/AF": dead}, "continent/AF"},
		"a region more":              {fences{"continent/AF": live}, fences{"continent/AF": live + "," + dead}, ""},
		"a new fence":                {fences{}, fences{"asn/64500": dead}, "asn/64500"},
		"a new one in a dead one":    {fences{"prefix/10.0.0.0_8": dead}, fences{"prefix/10.0.0.0_8": dead, "prefix/10.1.0.0_16": dead}, ""},
		"a new one around a dead":    {fences{"prefix/10.1.0.0_16": dead}, fences{"prefix/10.0.0.0_8": dead, "prefix/10.1.0.0_16": dead}, "prefix/10.0.0.0_8"},
		"a live one in it goes":      {fences{"prefix/10.0.0.0_8": dead, "prefix/10.1.0.0_16": live}, fences{"prefix/10.0.0.0_8": dead}, "prefix/10.0.0.0_8"},
		"a live one in another goes": {fences{"prefix/10.0.0.0_8": dead, "prefix/172.16.0.0_16": live}, fences{"prefix/10.0.0.0_8": dead}, ""},
		"one between holds":          {fences{"continent/AF": dead, "prefix/10.0.0.0_8": live, "prefix/10.1.0.0_16": live}, fences{"continent/AF": dead, "prefix/10.0.0.0_8": live}, ""},
		"an ASN's goes":              {fences{"country/DE": dead, "asn/64500": live}, fences{"country/DE": dead}, "country/DE"},
		"a country is not another":   {fences{"country/DE": dead, "country/FR": live}, fences{"country/DE": dead}, ""},
		"a dead one goes":            {fences{"country/DE": dead}, fences{}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			parsed := func(f fences) *topology.Snapshot {
				values := topology.Values{"registries/contoso/home": live}
				for i, region := range []string{live, dead} {
					prefix := topology.ReplicaPrefix("contoso", region)
					values[prefix+"endpoint"] = "http://" + region + ".example.net"
					values[prefix+"addresses"] = []string{"192.0.2.1", "192.0.2.2"}[i]
				}
				values[topology.ReplicaPrefix("contoso", dead)+"weight"] = "0"
				for match, regions := range f {
					values["registries/contoso/fences/"+match] = regions
				}
				snapshot, _ := topology.Parse(values, nil, nil)
				if len(snapshot.Problems) > 0 {
					t.Fatal(snapshot.Problems)
				}
				return snapshot
			}
			fence, found := lost(sound(parsed(c.before), nil).At(0), sound(parsed(c.after), nil).At(0))
			if found != (c.lost != "") || found && fence.String() != c.lost {
				t.Errorf("%v, %t: want %q", fence, found, c.lost)
			}
		})
	}
}
