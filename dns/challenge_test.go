package dns

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/topology"
)

func TestChallenges(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) {
		o.StaticFile = writeFile(t, testStatic+"_acme-challenge.www IN TXT \"static\"\n_acme-challenge.alias IN CNAME www\n")
	})
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	texts := func(name string, qtype uint16) (list []string, rcode int) {
		m := answerOf(t, s, question(name, qtype), from)
		for _, rr := range m.Answer {
			if txt, ok := rr.(*mdns.TXT); ok {
				list = append(list, txt.Txt...)
				if txt.Hdr.Ttl != 5 {
					t.Errorf("%s may be kept for %d s", name, txt.Hdr.Ttl)
				}
			}
		}
		slices.Sort(list)
		return list, m.Rcode
	}
	serial := func() uint32 {
		return answerOf(t, s, question("geo.example.net.", mdns.TypeSOA), from).Answer[0].(*mdns.SOA).Serial
	}
	before := serial()
	snapshot := testSnapshot()
	snapshot.Changed = snapshot.Changed.Add(time.Second)
	for _, c := range [][2]string{
		{"contoso.geo.example.net", "one"}, {"contoso.geo.example.net", "two"}, {"fabrikam.geo.example.net", "hostname"},
		{"www.geo.example.net", "added"}, {"alias.geo.example.net", "in vain"}, {"x.wild.geo.example.net", "below"},
		{"geo.example.net", "apex"}, {"example.net", "outside"}, {"westus.contoso.geo.example.net", "region"},
	} {
		snapshot.Challenges = append(snapshot.Challenges, topology.Challenge{Name: c[0], Token: c[1]})
	}
	s.Update(snapshot, routerOf(snapshot).With(testConditions()), testConditions())
	if serial() != before+1 {
		t.Errorf("the serial was %d and is %d", before, serial())
	}
	for name, want := range map[string][]string{
		"_acme-challenge.contoso.geo.example.net.":        {"one", "two"},
		"_ACME-challenge.Contoso.geo.example.net.":        {"one", "two"},
		"_acme-challenge.fabrikam.geo.example.net.":       {"hostname"},
		"_acme-challenge.geo.example.net.":                {"apex"},
		"_acme-challenge.westus.contoso.geo.example.net.": {"region"},
		"_acme-challenge.x.wild.geo.example.net.":         {"below"},
		"_acme-challenge.www.geo.example.net.":            {"added", "static"},
	} {
		if got, rcode := texts(name, mdns.TypeTXT); !slices.Equal(got, want) || rcode != mdns.RcodeSuccess {
			t.Errorf("%s: %q, %d; want %q", name, got, rcode, want)
		}
	}
	// Other types and names without an answer of their own: NODATA where something stands below, else NXDOMAIN.
	for name, want := range map[string]int{
		"_acme-challenge.contoso.geo.example.net.":  mdns.RcodeSuccess,
		"x.wild.geo.example.net.":                   mdns.RcodeSuccess, // no longer made up by *.wild (RFC 4592, section 2.2.2)
		"_acme-challenge.tailwind.geo.example.net.": mdns.RcodeNameError,
	} {
		if m := answerOf(t, s, question(name, mdns.TypeA), from); m.Rcode != want || len(m.Answer) > 0 || len(m.Ns) != 1 {
			t.Errorf("%s A: %v", name, m)
		}
	}
	problem := topology.Problem{
		Key: "state/topology/acme/alias.geo.example.net/in vain", Value: "_acme-challenge.alias.geo.example.net.",
		Reason: "a static CNAME stands alone at that name", Effect: "the challenge is not answered",
	}
	if !slices.Contains(s.Problems(), problem) {
		t.Errorf("problems: %+v", s.Problems())
	}
	snapshot = testSnapshot()
	s.Update(snapshot, routerOf(snapshot).With(testConditions()), testConditions())
	if got, rcode := texts("_acme-challenge.contoso.geo.example.net.", mdns.TypeTXT); len(got) > 0 || rcode != mdns.RcodeNameError {
		t.Errorf("what was cleared is %q, %d", got, rcode)
	}
}
