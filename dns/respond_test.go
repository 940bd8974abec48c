package dns

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/router"
	"portolan/topology"
)

func writeFile(t testing.TB, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "zone.db")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// brief writes the answer's records in one line, sorted: "A 192.0.2.1 ttl=60; ...".
func brief(records []mdns.RR) string {
	var list []string
	for _, rr := range records {
		h := rr.Header()
		list = append(list, fmt.Sprintf("%s %s ttl=%d", mdns.Type(h.Rrtype), strings.TrimPrefix(rr.String(), h.String()), h.Ttl))
	}
	slices.Sort(list)
	return strings.Join(list, "; ")
}

const testSOA = "SOA ns.example.org. host\\.master.example.net. 1800000000 86400 7200 3600000 5 ttl=5"

// Every rule of what is answered at which name, over both transports.
func TestAnswers(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	american, european := "8.8.8.0/24", "80.1.2.0/24"
	for _, c := range []struct {
		name   string
		qtype  uint16
		subnet string // none if empty
		rcode  int
		answer string // "" : NODATA or NXDOMAIN, with the SOA
		scope  int
	}{
		// The one name.
		{"contoso", mdns.TypeA, american, 0, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60", 8},
		{"contoso", mdns.TypeAAAA, american, 0, "AAAA 2001:db8::1 ttl=60; AAAA 2001:db8::2 ttl=60", 8},
		{"contoso", mdns.TypeA, european, 0, "A 198.51.100.1 ttl=5", 8},
		{"contoso", mdns.TypeA, "2a00:1234::/48", 0, "A 198.51.100.1 ttl=5", 16},
		{"contoso", mdns.TypeA, "0.0.0.0/0", 0, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60", 0},
		{"contoso", mdns.TypeA, "10.1.2.0/24", 0, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60", 8},
		{"contoso", mdns.TypeA, "", 0, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60", 0},
		{"contoso", mdns.TypeHTTPS, american, 0, "", 0},
		{"contoso", mdns.TypeTXT, american, 0, "", 0},
		{"contoso", mdns.TypeCAA, american, 0, `CAA 0 issue "ca.example" ttl=300`, 0},
		{"contoso", mdns.TypeANY, american, 0, `HINFO "RFC8482" "" ttl=60`, 0},
		// Europe has no AAAA, but America has: this is no answer for all.
		{"contoso", mdns.TypeAAAA, european, 0, "", 8},
		// Nobody has AAAA: the same for all.
		{"tailwind", mdns.TypeAAAA, american, 0, "", 0},
		// None: NODATA, never NXDOMAIN. It depends on who asks, as far as the decision did.
		{"tailwind", mdns.TypeA, american, 0, "", 8},
		{"empty", mdns.TypeA, american, 0, "", 0},
		// A fallback name answers every type.
		{"adatum", mdns.TypeA, american, 0, "CNAME sorry.example.org. ttl=5", 8},
		{"adatum", mdns.TypeTXT, american, 0, "CNAME sorry.example.org. ttl=5", 8},
		// Host names answer every type.
		{"fabrikam", mdns.TypeA, american, 0, "CNAME registry.us.fabrikam.example. ttl=60", 8},
		{"fabrikam", mdns.TypeAAAA, european, 0, "CNAME registry.eu.fabrikam.example. ttl=60", 8},
		{"fabrikam", mdns.TypeHTTPS, european, 0, "CNAME registry.eu.fabrikam.example. ttl=60", 8},
		{"fabrikam", mdns.TypeCNAME, european, 0, "CNAME registry.eu.fabrikam.example. ttl=60", 8},
		{"fabrikam", mdns.TypeANY, european, 0, "CNAME registry.eu.fabrikam.example. ttl=60", 8},
		// Pinned regions heed no health: the dead address is there.
		{"westus.contoso", mdns.TypeA, european, 0, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60; A 192.0.2.3 ttl=60", 0},
		{"westus.tailwind", mdns.TypeA, american, 0, "A 192.0.2.41 ttl=60", 0},
		{"westeurope.contoso", mdns.TypeAAAA, american, 0, "", 0},
		{"westeurope.fabrikam", mdns.TypeTXT, american, 0, "CNAME registry.eu.fabrikam.example. ttl=60", 0},
		{"nowhere.contoso", mdns.TypeA, american, mdns.RcodeNameError, "", 0},
		{"x.westus.contoso", mdns.TypeA, american, mdns.RcodeNameError, "", 0},
		// The apex and its name servers.
		{"", mdns.TypeSOA, american, 0, testSOA, 0},
		{"", mdns.TypeNS, "", 0, "NS ns.example.org. ttl=60; NS ns1.geo.example.net. ttl=60", 0},
		{"", mdns.TypeTXT, "", 0, `TXT "v=spf1 -all" ttl=300`, 0},
		{"", mdns.TypeA, "", 0, "", 0},
		{"", mdns.TypeANY, "", 0, `HINFO "RFC8482" "" ttl=60`, 0},
		{"ns1", mdns.TypeA, american, 0, "A 192.0.2.53 ttl=60", 0},
		{"ns1", mdns.TypeAAAA, "", 0, "AAAA 2001:db8::53 ttl=60", 0},
		// Static records; a set has one TTL.
		{"www", mdns.TypeA, american, 0, "A 192.0.2.80 ttl=300; A 192.0.2.81 ttl=300; A 192.0.2.82 ttl=300", 0},
		{"www", mdns.TypeAAAA, american, 0, "", 0},
		{"alias", mdns.TypeA, "", 0, "CNAME www.geo.example.net. ttl=300", 0},
		{"alias", mdns.TypeANY, "", 0, "CNAME www.geo.example.net. ttl=300", 0},
		{"mail", mdns.TypeMX, "", 0, "MX 10 mx.example.org. ttl=300", 0},
		{"_x._tcp.srv", mdns.TypeSRV, "", 0, "SRV 0 5 443 www.geo.example.net. ttl=300", 0},
		// Empty non-terminals.
		{"srv", mdns.TypeA, "", 0, "", 0},
		{"_tcp.srv", mdns.TypeSRV, "", 0, "", 0},
		{"_tcp.srv", mdns.TypeANY, "", 0, "", 0},
		{"sub.wild", mdns.TypeTXT, "", 0, "", 0},
		// Wildcards: below the closest encloser alone (RFC 4592, section 2.2.1).
		{"a.wild", mdns.TypeTXT, american, 0, `TXT "wild" ttl=300`, 0},
		{"a.b.c.wild", mdns.TypeA, "", 0, "A 192.0.2.90 ttl=300", 0},
		{"a.wild", mdns.TypeMX, "", 0, "", 0},
		{"*.wild", mdns.TypeTXT, "", 0, `TXT "wild" ttl=300`, 0},
		{"x.*.wild", mdns.TypeTXT, "", mdns.RcodeNameError, "", 0},
		{"host.wild", mdns.TypeA, "", 0, "", 0},
		{"x.host.wild", mdns.TypeTXT, "", mdns.RcodeNameError, "", 0},
		{"x.sub.wild", mdns.TypeTXT, "", mdns.RcodeNameError, "", 0},
		{"wild", mdns.TypeTXT, "", 0, "", 0},
		{"z.cwild", mdns.TypeAAAA, "", 0, "CNAME www.geo.example.net. ttl=300", 0},
		// Nothing.
		{"nothing", mdns.TypeA, american, mdns.RcodeNameError, "", 0},
		{"a.b.c.d.e.f.g.h.i.j.k.nothing", mdns.TypeA, american, mdns.RcodeNameError, "", 0},
		{"contosox", mdns.TypeA, "", mdns.RcodeNameError, "", 0},
	} {
		for _, network := range []string{"udp", "tcp"} {
			t.Run(fmt.Sprintf("%s/%s/%s/%s", network, c.name, mdns.Type(c.qtype), c.subnet), func(t *testing.T) {
				t.Parallel()
				name := strings.TrimPrefix(c.name+".geo.example.net.", ".")
				m := question(name, c.qtype)
				if c.subnet != "" {
					ecs(m, c.subnet)
				}
				a := ask(t, network, at, m)
				if a.Rcode != c.rcode || !a.Authoritative || a.Truncated || a.RecursionAvailable || brief(a.Answer) != c.answer {
					t.Errorf("got %s, aa=%v, tc=%v, answer %q; want %s, %q", mdns.RcodeToString[a.Rcode], a.Authoritative, a.Truncated, brief(a.Answer), mdns.RcodeToString[c.rcode], c.answer)
				}
				for _, rr := range a.Answer {
					if rr.Header().Name != name {
						t.Errorf("an owner is %s", rr.Header().Name)
					}
				}
				if c.answer == "" {
					want := testSOA
					if c.scope > 0 { // others get an answer: no cache may keep this
						want = strings.Replace(testSOA, "ttl=5", "ttl=0", 1)
					}
					if brief(a.Ns) != want || a.Ns[0].Header().Name != "geo.example.net." {
						t.Errorf("authority %v", a.Ns)
					}
				} else if len(a.Ns) > 0 {
					t.Errorf("authority %v", a.Ns)
				}
				checkECS(t, m, a, c.scope)
			})
		}
	}
}

// The zone of RFC 4592, section 2.2.1, and what that section says of each query; its delegations cannot be served here. Further
// what sections 2.2.2, 2.2.3 and 3.3.1 say of names that are not in that zone.
func TestWildcards(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, func(o *Options) {
		o.Zone, o.Contact = "example", ""
		o.Nameservers = map[string][]netip.Addr{"ns.example.com.": nil, "ns.example.net.": nil}
		o.StaticFile = writeFile(t, `
$TTL 3600
*                TXT   "this is a wildcard"
*                MX    10 host1.example.
sub.*            TXT   "this is not a wildcard"
host1            A     192.0.2.1
_ssh._tcp.host1  SRV   0 0 22 host1
_ssh._tcp.host2  SRV   0 0 22 host2
x.*.ent          TXT   "below an asterisk without records"
*.alias          CNAME host1
`)
	}))
	const nxdomain = mdns.RcodeNameError
	for _, c := range []struct {
		name   string
		qtype  uint16
		rcode  int
		answer string
	}{
		{"host3.example.", mdns.TypeMX, 0, "MX 10 host1.example. ttl=3600"},
		{"host3.example.", mdns.TypeA, 0, ""},
		{"foo.bar.example.", mdns.TypeTXT, 0, `TXT "this is a wildcard" ttl=3600`},
		{"host1.example.", mdns.TypeMX, 0, ""},
		{"sub.*.example.", mdns.TypeMX, 0, ""},
		{"sub.*.example.", mdns.TypeTXT, 0, `TXT "this is not a wildcard" ttl=3600`},
		{"_telnet._tcp.host1.example.", mdns.TypeSRV, nxdomain, ""},
		{"ghost.*.example.", mdns.TypeMX, nxdomain, ""},
		{"*.example.", mdns.TypeMX, 0, "MX 10 host1.example. ttl=3600"},
		// Empty non-terminals exist (2.2.2), also an asterisk that is one (2.2.3): synthesis from it finds nothing, and that is
		// no name error.
		{"host2.example.", mdns.TypeTXT, 0, ""},
		{"_tcp.host2.example.", mdns.TypeMX, 0, ""},
		{"*.ent.example.", mdns.TypeTXT, 0, ""},
		{"any.ent.example.", mdns.TypeTXT, 0, ""},
		{"x.any.ent.example.", mdns.TypeTXT, 0, ""},
		{"x.*.ent.example.", mdns.TypeTXT, 0, `TXT "below an asterisk without records" ttl=3600`},
		{"y.*.ent.example.", mdns.TypeTXT, nxdomain, ""},
		// Registries' names exist, and what is not below them is not made up.
		{"nowhere.contoso.example.", mdns.TypeTXT, nxdomain, ""},
		{"a.b.alias.example.", mdns.TypeAAAA, 0, "CNAME host1.example. ttl=3600"},
		{"alias.example.", mdns.TypeA, 0, ""},
	} {
		a := ask(t, "udp", at, question(c.name, c.qtype))
		if a.Rcode != c.rcode || !a.Authoritative || brief(a.Answer) != c.answer || (len(a.Ns) == 1) != (c.answer == "") {
			t.Errorf("%s %s: got %v, want %s, %q", c.name, mdns.Type(c.qtype), a, mdns.RcodeToString[c.rcode], c.answer)
		}
		for _, rr := range a.Answer {
			if rr.Header().Name != c.name {
				t.Errorf("%s: an owner is %s", c.name, rr.Header().Name)
			}
		}
	}
}

// checkECS checks that a has the option of m with scope, and none if m had none.
func checkECS(t *testing.T, m, a *mdns.Msg, scope int) {
	t.Helper()
	asked, got := subnetOf(m), subnetOf(a)
	if (m.IsEdns0() == nil) != (a.IsEdns0() == nil) {
		t.Errorf("OPT: asked %v, got %v", m.IsEdns0(), a.IsEdns0())
	}
	switch {
	case asked == nil && got == nil:
	case asked == nil || got == nil:
		t.Errorf("ECS: asked %v, got %v", asked, got)
	case asked.Family != got.Family || asked.SourceNetmask != got.SourceNetmask || !asked.Address.Equal(got.Address) || int(got.SourceScope) != scope:
		t.Errorf("ECS: asked %v, got %v, want scope %d", asked, got, scope)
	}
}

func subnetOf(m *mdns.Msg) *mdns.EDNS0_SUBNET {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if s, ok := option.(*mdns.EDNS0_SUBNET); ok {
				return s
			}
		}
	}
	return nil
}

func extendedError(m *mdns.Msg) int {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if e, ok := option.(*mdns.EDNS0_EDE); ok {
				return int(e.InfoCode)
			}
		}
	}
	return -1
}

func TestRefusals(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	for _, c := range []struct {
		name   string
		change func(*mdns.Msg)
		rcode  int
		ede    int
	}{
		{"off-zone", func(m *mdns.Msg) { m.Question[0].Name = "example.com." }, mdns.RcodeRefused, 20},
		{"the parent", func(m *mdns.Msg) { m.Question[0].Name = "example.net." }, mdns.RcodeRefused, 20},
		{"the root", func(m *mdns.Msg) { m.Question[0].Name = "." }, mdns.RcodeRefused, 20},
		{"ends like the zone", func(m *mdns.Msg) { m.Question[0].Name = "xgeo.example.net." }, mdns.RcodeRefused, 20},
		{"version.bind", func(m *mdns.Msg) {
			m.Question[0] = mdns.Question{Name: "version.bind.", Qtype: mdns.TypeTXT, Qclass: mdns.ClassCHAOS}
		}, mdns.RcodeRefused, 20},
		{"class CH in the zone", func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS }, mdns.RcodeRefused, 20},
		{"AXFR", func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAXFR }, mdns.RcodeRefused, 18},
		{"IXFR", func(m *mdns.Msg) {
			m.Question[0].Qtype = mdns.TypeIXFR
			m.Ns = []mdns.RR{&mdns.SOA{Hdr: header("geo.example.net.", mdns.TypeSOA, 0), Ns: ".", Mbox: "."}}
		}, mdns.RcodeRefused, 18},
		{"TKEY", func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeTKEY }, mdns.RcodeNotImplemented, -1},
		{"UPDATE", func(m *mdns.Msg) { m.Opcode = mdns.OpcodeUpdate }, mdns.RcodeNotImplemented, -1},
		{"NOTIFY", func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify }, mdns.RcodeNotImplemented, -1},
		{"opcode 15", func(m *mdns.Msg) { m.Opcode = 15 }, mdns.RcodeNotImplemented, -1},
		{"two questions", func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) }, mdns.RcodeFormatError, -1},
		{"no question", func(m *mdns.Msg) { m.Question = nil }, mdns.RcodeFormatError, -1},
		{"EDNS version 1", func(m *mdns.Msg) { m.IsEdns0().SetVersion(1) }, mdns.RcodeBadVers, -1},
		{"NOTIFY with EDNS version 1", func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify; m.IsEdns0().SetVersion(1) }, mdns.RcodeNotImplemented, -1},
		{"UPDATE without a zone", func(m *mdns.Msg) { m.Opcode, m.Question = mdns.OpcodeUpdate, nil }, mdns.RcodeNotImplemented, -1},
		{"two OPTs", func(m *mdns.Msg) { m.Extra = append(m.Extra, mdns.Copy(m.Extra[0])) }, mdns.RcodeFormatError, -1},
		{"OPT of a name", func(m *mdns.Msg) { m.Extra[0].Header().Name = "x." }, mdns.RcodeFormatError, -1},
		{"an unknown option", func(m *mdns.Msg) {
			m.IsEdns0().Option = append(m.IsEdns0().Option, &mdns.EDNS0_LOCAL{Code: 65001, Data: []byte{1, 2, 3}})
		}, 0, -1},
		{"an unknown type", func(m *mdns.Msg) { m.Question[0].Qtype = 65280 }, 0, -1},
		{"flags", func(m *mdns.Msg) {
			m.RecursionDesired, m.CheckingDisabled, m.AuthenticatedData, m.Zero = true, true, true, true
		}, 0, -1},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := question("contoso.geo.example.net.", mdns.TypeA)
			m.SetEdns0(1232, true)
			c.change(m)
			raw, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			a := new(mdns.Msg)
			if err := a.Unpack(exchange(t, at, raw)); err != nil {
				t.Fatal(err)
			}
			if a.Id != m.Id || !a.Response || a.Opcode != m.Opcode || a.Rcode != c.rcode || extendedError(a) != c.ede {
				t.Errorf("got %v, extended error %d", a, extendedError(a))
			}
			if a.Authoritative != (c.rcode == 0) {
				t.Errorf("aa=%v", a.Authoritative)
			}
			if a.RecursionDesired != m.RecursionDesired || a.CheckingDisabled != m.CheckingDisabled || a.AuthenticatedData || a.Zero {
				t.Errorf("flags %v", a)
			}
			if o := a.IsEdns0(); o == nil || o.Version() != 0 || !o.Do() || o.UDPSize() != 1232 {
				t.Errorf("OPT %v", o)
			}
			if len(m.Question) == 1 && !slices.Equal(a.Question, m.Question) {
				t.Errorf("asked %v, got %v back", m.Question, a.Question)
			}
			if c.rcode == mdns.RcodeBadVers && len(a.Answer) > 0 {
				t.Error("BADVERS with an answer")
			}
		})
	}
}

func TestDropped(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	at := serve(t, s)
	m := question("contoso.geo.example.net.", mdns.TypeA)
	m.Response = true
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	dropped(t, s, at, raw, dropResponse)
	for _, n := range []int{0, 1, 11} {
		dropped(t, s, at, make([]byte, n), dropShort)
	}
}

// Client subnets as they come on the wire: echoed byte by byte, or FORMERR.
func TestECSWire(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	const formerr = -1
	for _, c := range []struct {
		name, data string
		scope      int
	}{
		{"IPv4 /24", "0001 18 00 080808", 8},
		{"IPv4 /32", "0001 20 00 08080808", 8},
		{"IPv4 /8", "0001 08 00 08", 8},
		{"IPv4 /5: a longer scope than source", "0001 05 00 08", 8},
		{"IPv4 /0", "0001 00 00", 0},
		{"IPv6 /48", "0002 30 00 2a0000000001", 16},
		{"IPv6 /56", "0002 38 00 2a000000000100", 16},
		{"IPv6 /128", "0002 80 00 2a000000000000000000000000000001", 16},
		{"IPv6 /0", "0002 00 00", 0},
		{"private", "0001 18 00 0a0102", 8},
		{"loopback", "0001 18 00 7f0000", 8},
		{"link local", "0001 18 00 a9fe01", 16},
		{"a scope in a query", "0001 18 08 080808", formerr},
		{"too few bytes of address", "0001 18 00 0808", formerr},
		{"too many bytes of address", "0001 18 00 08080800", formerr},
		{"a bit beyond the source", "0001 17 00 080809", formerr},
		{"the last bit beyond the source", "0001 19 00 08080801", formerr},
		{"IPv4 /33", "0001 21 00 0808080800", formerr},
		{"IPv6 /129", "0002 81 00 2a00000000000000000000000000000100", formerr},
		{"family 3", "0003 00 00", formerr},
		{"family 0", "0000 00 00", formerr},
		{"family 0 with bits", "0000 08 00 08", formerr},
		{"no data", "", formerr},
		{"three bytes", "000118", formerr},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			data, err := hex.DecodeString(strings.ReplaceAll(c.data, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{"contoso.geo.example.net.", "nothing.geo.example.net.", "example.com."} {
				m := question(name, mdns.TypeA)
				m.SetEdns0(1232, false)
				m.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_LOCAL{Code: optionECS, Data: data}}
				raw, err := m.Pack()
				if err != nil {
					t.Fatal(err)
				}
				raw = exchange(t, at, raw)
				a := new(mdns.Msg)
				if err := a.Unpack(raw); err != nil {
					t.Fatal(err)
				}
				echo := slices.Clone(data)
				if c.scope == formerr {
					if a.Rcode != mdns.RcodeFormatError || a.IsEdns0() == nil || len(a.IsEdns0().Option) > 0 {
						t.Errorf("%s: got %v, want FORMERR with a bare OPT", name, a)
					}
					continue
				}
				if a.Rcode == mdns.RcodeFormatError {
					t.Errorf("%s: FORMERR", name)
				}
				if name == "contoso.geo.example.net." {
					echo[3] = byte(c.scope)
				}
				echo = append([]byte{0, optionECS, 0, byte(len(echo))}, echo...)
				if !strings.Contains(string(raw), string(echo)) {
					t.Errorf("%s: the answer %x does not hold the option %x", name, raw, echo)
				}
			}
		})
	}
	t.Run("twice", func(t *testing.T) {
		t.Parallel()
		m := ecs(ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24"), "80.1.2.0/24")
		if a := ask(t, "udp", at, m); a.Rcode != mdns.RcodeFormatError {
			t.Errorf("got %v", a)
		}
	})
}

// What a packet of any kind of damage gets: an answer with its id, or none, never a crash.
func TestMalformed(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	good, err := ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24").Pack()
	if err != nil {
		t.Fatal(err)
	}
	edit := func(f func([]byte) []byte) []byte { return f(slices.Clone(good)) }
	for _, c := range []struct {
		name     string
		raw      []byte
		question bool // whether it could be read
	}{
		{"a pointer in the question", edit(func(b []byte) []byte { b[12], b[13] = 0xc0, 12; return b }), false},
		{"a long label", edit(func(b []byte) []byte { b[12] = 64; return b }), false},
		{"a cut question", good[:20], false},
		{"no type", good[:38], false},
		{"a name of 256 bytes", append(append(slices.Clone(good[:12]), strings.Repeat("\x01a", 127)+"\x01a\x00"...), 0, 1, 0, 1), false},
		{"a missing OPT", edit(func(b []byte) []byte { return b[:41] }), true},
		{"a cut OPT", good[:len(good)-2], true},
		{"an option longer than its record", edit(func(b []byte) []byte { b[len(b)-8] = 200; return b }), true},
		{"bytes behind the message", append(slices.Clone(good), 0), true},
		{"an answer that is not there", edit(func(b []byte) []byte { b[7] = 1; return b }), true},
		{"65535 records", edit(func(b []byte) []byte { b[10], b[11] = 0xff, 0xff; return b }), true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := new(mdns.Msg)
			if err := a.Unpack(exchange(t, at, c.raw)); err != nil {
				t.Fatal(err)
			}
			if a.Rcode != mdns.RcodeFormatError || a.Id != binary.BigEndian.Uint16(c.raw) || (len(a.Question) == 1) != c.question {
				t.Errorf("got %v", a)
			}
		})
	}
}

// The question comes back letter by letter (draft-vixie-dnsext-dns0x20), also below wildcards and in negative answers.
func TestCaseIsKept(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	for _, name := range []string{"CoNtOsO.gEo.ExAmPlE.nEt.", "A.wIlD.GEO.example.NET.", "NOTHING.geo.EXAMPLE.net."} {
		a := ask(t, "udp", at, question(name, mdns.TypeA))
		if a.Question[0].Name != name {
			t.Errorf("asked %s, got %s back", name, a.Question[0].Name)
		}
		for _, rr := range a.Answer {
			if rr.Header().Name != name {
				t.Errorf("asked %s, an owner is %s", name, rr.Header().Name)
			}
		}
		if len(a.Answer) == 0 && !strings.HasSuffix(name, a.Ns[0].Header().Name) {
			t.Errorf("asked %s, the SOA's owner is %s", name, a.Ns[0].Header().Name)
		}
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	var static strings.Builder
	for i := range 60 {
		fmt.Fprintf(&static, "many IN A 192.0.2.%d\n", i)
	}
	for i := range 200 {
		fmt.Fprintf(&static, "lots IN A 198.51.100.%d\n", i)
	}
	at := serve(t, newServer(t, func(o *Options) { o.StaticFile = writeFile(t, static.String()) }))
	for _, c := range []struct {
		name, network string
		size          uint16 // 0: no EDNS
		records       int    // -1: truncated
	}{
		{"many", "udp", 0, -1},
		{"many", "udp", 512, -1},
		{"many", "udp", 100, -1},
		{"many", "udp", 1008, -1}, // 12 + 26 + 60*16 + 11 = 1009
		{"many", "udp", 1009, 60},
		{"many", "udp", 4096, 60},
		{"lots", "udp", 4096, -1},
		{"lots", "tcp", 0, 200},
		{"lots", "tcp", 512, 200},
	} {
		m := question(c.name+".geo.example.net.", mdns.TypeA)
		if c.size > 0 {
			m.SetEdns0(c.size, false)
		}
		a := ask(t, c.network, at, m)
		if a.Truncated != (c.records < 0) || len(a.Answer) != max(0, c.records) || a.Rcode != 0 {
			t.Errorf("%s over %s with size %d: tc=%v, %d records", c.name, c.network, c.size, a.Truncated, len(a.Answer))
		}
	}
}

// Static records beside a registry that has no answer of its own for their type are truncated like all others, not denied.
func TestStaticBesideARegistryIsTruncated(t *testing.T) {
	t.Parallel()
	var static strings.Builder
	for _, registry := range []string{"adatum", "contoso"} { // with the all-down policy of a CNAME, and without
		for i := range 20 {
			fmt.Fprintf(&static, "%s IN TXT \"%d%s\"\n", registry, i, strings.Repeat("x", 100))
		}
	}
	s := newServer(t, func(o *Options) { o.StaticFile = writeFile(t, static.String()) })
	snapshot := testSnapshot()
	s.Update(snapshot, routerOf(snapshot), nil)
	at := serve(t, s)
	for _, registry := range []string{"adatum", "contoso"} {
		m := question(registry+".geo.example.net.", mdns.TypeTXT)
		if a := ask(t, "udp", at, m); !a.Truncated || len(a.Answer)+len(a.Ns) > 0 {
			t.Errorf("%s over UDP: %v", registry, a)
		}
		if a := ask(t, "tcp", at, m); a.Truncated || len(a.Answer) != 20 || len(a.Ns) > 0 {
			t.Errorf("%s over TCP: %v", registry, a)
		}
	}
}

// A negative answer without its SOA is none: where that does not fit, it is truncated.
func TestNegativeAnswerIsTruncated(t *testing.T) {
	t.Parallel()
	zone := strings.Repeat(strings.Repeat("a", 49)+".", 3) + "net"
	at := serve(t, newServer(t, func(o *Options) {
		o.Zone, o.Contact, o.StaticFile = zone, "", ""
		delete(o.Nameservers, "ns.example.org.")
	}))
	m := question("nothing."+zone+".", mdns.TypeA)
	if a := ask(t, "udp", at, m); !a.Truncated || a.Rcode != mdns.RcodeNameError || len(a.Ns) != 0 {
		t.Errorf("over UDP: %v", a)
	}
	if a := ask(t, "tcp", at, m); a.Truncated || a.Rcode != mdns.RcodeNameError || len(a.Ns) != 1 {
		t.Errorf("over TCP: %v", a)
	}
}

// The name servers come with their addresses, as far as these lie in the zone and there is room.
func TestGlue(t *testing.T) {
	t.Parallel()
	many := make([]netip.Addr, 60)
	for i := range many {
		many[i] = netip.AddrFrom4([4]byte{192, 0, 2, byte(i + 1)})
	}
	at := serve(t, newServer(t, nil))
	crowded := serve(t, newServer(t, func(o *Options) { o.Nameservers = map[string][]netip.Addr{"ns1": many} }))
	for _, c := range []struct {
		at      netip.AddrPort
		network string
		edns    bool
		want    string
	}{
		{at, "udp", true, "A 192.0.2.53 ttl=60; AAAA 2001:db8::53 ttl=60"},
		{at, "udp", false, "A 192.0.2.53 ttl=60; AAAA 2001:db8::53 ttl=60"},
		{crowded, "udp", true, ""},
		{crowded, "tcp", false, "60"},
	} {
		m := question("geo.example.net.", mdns.TypeNS)
		if c.edns {
			m.SetEdns0(1232, false)
		}
		a := ask(t, c.network, c.at, m)
		if a.Truncated || len(a.Answer) == 0 || (a.IsEdns0() != nil) != c.edns {
			t.Errorf("got %v", a)
		}
		glue := slices.DeleteFunc(a.Extra, func(rr mdns.RR) bool { return rr.Header().Rrtype == mdns.TypeOPT })
		got := brief(glue)
		if len(glue) > 2 {
			got = fmt.Sprint(len(glue))
		}
		if got != c.want {
			t.Errorf("over %s: additional %q, want %q", c.network, got, c.want)
		}
		for _, rr := range glue {
			if rr.Header().Name != "ns1.geo.example.net." {
				t.Errorf("an owner is %s", rr.Header().Name)
			}
		}
	}
}

// Each address of a region comes first for some.
func TestRotation(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	first := make(map[string]int)
	conn := dial(t, at) // of one port: only the ids differ
	for i := range 16 {
		m := question("contoso.geo.example.net.", mdns.TypeA)
		m.Id = uint16(i)
		if _, err := conn.Write(frame(t, m)); err != nil {
			t.Fatal(err)
		}
		a, err := readFramed(conn)
		if err != nil || len(a.Answer) != 2 {
			t.Fatalf("got %v, %v", a, err)
		}
		first[a.Answer[0].(*mdns.A).A.String()]++
	}
	if first["192.0.2.1"] == 0 || first["192.0.2.2"] == 0 {
		t.Errorf("first were %v", first)
	}
}

func TestWhoami(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		whoami  Whoami
		records int
	}{{WhoamiSeen, 1}, {WhoamiFull, 4}, {WhoamiOff, 0}} {
		at := serve(t, newServer(t, func(o *Options) { o.Whoami = c.whoami }))
		m := ecs(question("whoami.contoso.geo.example.net.", mdns.TypeTXT), "80.1.2.0/24")
		a := ask(t, "udp", at, m)
		if len(a.Answer) != c.records || a.Rcode != 0 {
			t.Fatalf("%s: got %v", c.whoami, a)
		}
		if c.records == 0 {
			continue
		}
		text := a.Answer[0].(*mdns.TXT)
		for _, want := range []string{"registry=contoso", "resolver=127.0.0.1", "transport=udp", "subnet=80.1.2.0/24", "region=westeurope", "scope=8", "ttl=5", "serial=1800000000", "topology=0123456789ab", "databases=ba9876543210"} {
			if !slices.Contains(text.Txt, want) {
				t.Errorf("%s: %q is not in %q", c.whoami, want, text.Txt)
			}
		}
		if text.Hdr.Ttl != 0 {
			t.Errorf("TTL %d", text.Hdr.Ttl)
		}
		checkECS(t, m, a, 24)
		if a := ask(t, "udp", at, question("whoami.contoso.geo.example.net.", mdns.TypeA)); a.Rcode != 0 || len(a.Answer) > 0 {
			t.Errorf("A: got %v", a)
		}
	}
}

// The TTL that whoami tells is that of the answer to A.
func TestWhoamiTTL(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for _, registry := range []string{"adatum", "contoso", "empty", "fabrikam", "tailwind"} {
		for _, subnet := range []string{"8.8.8.0/24", "80.1.2.0/24"} {
			a := answerOf(t, s, ecs(question(registry+".geo.example.net.", mdns.TypeA), subnet), from)
			want := fmt.Sprintf("ttl=%d", append(a.Answer, a.Ns...)[0].Header().Ttl)
			told := answerOf(t, s, ecs(question("whoami."+registry+".geo.example.net.", mdns.TypeTXT), subnet), from).Answer[0].(*mdns.TXT).Txt
			if !slices.Contains(told, want) {
				t.Errorf("%s for %s: %q, want %s", registry, subnet, told, want)
			}
		}
	}
}

// consulted is the test's world, which counts how often it is looked into for a place.
type consulted struct {
	places
	times atomic.Int64
}

func (c *consulted) Locate(a netip.Addr) router.Place {
	c.times.Add(1)
	return c.places.Locate(a)
}

// A place is a walk through a file, which no number of queries may make of a server: none is looked up for what tells none or is
// not sent, and few in all.
func TestWhoamiLooksFewPlacesUp(t *testing.T) {
	t.Parallel()
	const asked = 10 * explanationsPerSecond
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for name, c := range map[string]struct {
		whoami Whoami
		server func() *Server
		sent   int // of those asked
		places int64
	}{
		"seen":    {WhoamiSeen, func() *Server { return newServer(t, nil) }, asked, 0},
		"full":    {WhoamiFull, func() *Server { return newServer(t, nil) }, asked, explanationsPerSecond},
		"dropped": {WhoamiFull, func() *Server { return limited(t, 0, from) }, 0, 0},
		"slipped": {WhoamiFull, func() *Server { return limited(t, 1, from) }, asked, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, snapshot, world := c.server(), testSnapshot(), new(consulted)
			charts, err := router.Chart(t.Context(), snapshot, router.Sources{Places: world}, nil)
			if err != nil {
				t.Fatal(err)
			}
			s.base.whoami = c.whoami
			s.Update(snapshot, router.New(snapshot, charts), nil)
			now := limitEpoch
			s.responder.now = func() time.Time { return now }
			sent := 0
			ask := func() {
				m := question("whoami.contoso.geo.example.net.", mdns.TypeTXT)
				a := answerOf(t, s, ecs(m, fmt.Sprintf("80.1.%d.0/24", sent%256)), from)
				if a == nil {
					return
				}
				sent++
				if txt := a.Answer; len(txt) > 0 && !slices.Contains(txt[0].(*mdns.TXT).Txt, "region=westeurope") || len(txt) == 0 && !a.Truncated {
					t.Fatalf("got %v", a)
				}
			}
			for range asked {
				ask()
			}
			if sent != c.sent || world.times.Load() != c.places {
				t.Errorf("%d answers with %d places, want %d with %d", sent, world.times.Load(), c.sent, c.places)
			}
			if now = now.Add(time.Second); c.places > 0 {
				if ask(); world.times.Load() != c.places+1 {
					t.Errorf("a second later %d places were looked up, want one more", world.times.Load())
				}
			}
		})
	}
}

// A change of conditions is in the next answer, and the serial stands still.
func TestUpdate(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	at := serve(t, s)
	m := ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24")
	snapshot := testSnapshot()
	for _, c := range []struct {
		health router.Health
		want   string
	}{
		{router.Unhealthy, "A 198.51.100.1 ttl=60"},
		{router.Healthy, "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60; A 192.0.2.3 ttl=60"},
	} {
		conditions := router.Conditions{key("contoso", "westus"): {Health: c.health, Settled: true}}
		s.Update(snapshot, routerOf(snapshot).With(conditions), conditions)
		if got := brief(ask(t, "udp", at, m).Answer); got != c.want {
			t.Errorf("%v: got %q, want %q", c.health, got, c.want)
		}
		if got := brief(ask(t, "udp", at, question("geo.example.net.", mdns.TypeSOA)).Answer); got != testSOA {
			t.Errorf("SOA %s", got)
		}
	}
}

func TestBeforeTheFirstUpdate(t *testing.T) {
	t.Parallel()
	s, err := New(testOptions())
	if err != nil {
		t.Fatal(err)
	}
	at := serve(t, s)
	m := question("contoso.geo.example.net.", mdns.TypeA)
	m.SetEdns0(1232, false)
	if a := ask(t, "udp", at, m); a.Rcode != mdns.RcodeServerFailure || extendedError(a) != edeNotReady {
		t.Errorf("got %v", a)
	}
}

func TestProblems(t *testing.T) {
	t.Parallel()
	var got []string
	for _, p := range newServer(t, nil).Problems() {
		got = append(got, p.Key+": "+p.Value)
	}
	want := []string{"registries/ns1: ns1", "dns.static: contoso.geo.example.net. A", "dns.static: fabrikam.geo.example.net. CAA"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What is too long for a name or for a message is left out and named.
func TestProblemsOfLength(t *testing.T) {
	t.Parallel()
	label := strings.Repeat("a", 59)
	zone := strings.Join([]string{label, label, label, label[1:]}, ".") // of 238 bytes
	var static strings.Builder
	// Records of 266 bytes: 245 would fit, but not with the longest question and an OPT record.
	for i := range 245 {
		fmt.Fprintf(&static, "huge IN TXT \"%03d%s\"\n", i, strings.Repeat("x", 250))
	}
	for i := range 244 {
		fmt.Fprintf(&static, "big IN TXT \"%03d%s\"\n", i, strings.Repeat("x", 250))
	}
	s := newServer(t, func(o *Options) { o.Zone, o.StaticFile = zone, writeFile(t, static.String()) })
	var got []string
	for _, p := range s.Problems() {
		got = append(got, strings.ReplaceAll(p.Key+": "+p.Value, zone, "ZONE"))
	}
	slices.Sort(got)
	want := []string{
		"dns.static: huge.ZONE. TXT",
		"registries/contoso/replicas/westeurope: westeurope.contoso.ZONE.", // 257 bytes; whoami.contoso.ZONE has 253
		"registries/fabrikam: fabrikam",
		"registries/ns1: ns1",
		"registries/tailwind: tailwind",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if a := ask(t, "tcp", serve(t, s), question("big."+zone+".", mdns.TypeTXT)); len(a.Answer) != 244 || a.Truncated {
		t.Errorf("got %d records, tc=%v", len(a.Answer), a.Truncated)
	}
}

// answerOf is what s answers over UDP to m from a client; nil if nothing.
func answerOf(t testing.TB, s *Server, m *mdns.Msg, from netip.AddrPort) *mdns.Msg {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	out := s.responder.worker(udp, 0).respond(nil, raw, from)
	if len(out) == 0 {
		return nil
	}
	a := new(mdns.Msg)
	if err := a.Unpack(out); err != nil {
		t.Fatal(err)
	}
	return a
}

// A verdict that changes packs no static record again.
func TestUpdateLeavesStaticAlone(t *testing.T) { // not parallel: it counts allocations
	var static strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&static, "host%d.sub%d TXT x%d\n", i, i%7, i)
	}
	snapshot, conditions := testSnapshot(), testConditions()
	compiled := routerOf(snapshot).With(conditions)
	update := func(text string) float64 {
		s := newServer(t, func(o *Options) { o.StaticFile = writeFile(t, text) })
		return testing.AllocsPerRun(10, func() { s.Update(snapshot, compiled, conditions) })
	}
	if none, many := update(""), update(static.String()); many > none+100 {
		t.Errorf("an update makes %v allocations beside 2000 static records, %v beside none", many, none)
	}
}

// Static records at the names that registries have, around them and below them.
func TestStaticAmongRegistries(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) {
		o.StaticFile = writeFile(t, `
* TXT apex
*.contoso TXT below
westus.contoso TXT region
westus.contoso A 203.0.113.1
westus.fabrikam TXT hostname
a.b.whoami.contoso TXT deep
_acme-challenge.contoso TXT static
`)
	})
	snapshot := testSnapshot()
	snapshot.Challenges = []topology.Challenge{{Name: "other.contoso.geo.example.net", Token: "challenge"}, {Name: "contoso.geo.example.net", Token: "static"}}
	s.Update(snapshot, routerOf(snapshot), nil)
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for name, want := range map[string]string{
		"nothing":                       "apex",
		"x.y.nothing":                   "apex",
		"x.contoso":                     "below",
		"x.tailwind":                    "NXDOMAIN", // there is tailwind, and no wildcard in it
		"westus.contoso":                "region",
		"x.westus.contoso":              "NXDOMAIN",
		"westus.fabrikam":               "CNAME",
		"b.whoami.contoso":              "NODATA",
		"a.b.whoami.contoso":            "deep",
		"x.whoami.contoso":              "NXDOMAIN",
		"other.contoso":                 "NODATA", // the challenge below makes it exist
		"_acme-challenge.other.contoso": "challenge",
		"_acme-challenge.contoso":       "static", // once
	} {
		a := answerOf(t, s, question(name+".geo.example.net.", mdns.TypeTXT), from)
		got := "NODATA"
		switch {
		case a.Rcode == mdns.RcodeNameError:
			got = "NXDOMAIN"
		case len(a.Answer) > 1:
			got = brief(a.Answer)
		case len(a.Answer) == 1 && a.Answer[0].Header().Rrtype == mdns.TypeCNAME:
			got = "CNAME"
		case len(a.Answer) == 1:
			got = a.Answer[0].(*mdns.TXT).Txt[0]
		}
		if got != want {
			t.Errorf("%s: got %s, want %s", name, got, want)
		}
	}
	var problems []string
	for _, p := range s.Problems() {
		problems = append(problems, p.Key+": "+p.Value)
	}
	if want := []string{"registries/ns1: ns1", "dns.static: westus.contoso.geo.example.net. A", "dns.static: westus.fabrikam.geo.example.net. TXT"}; !slices.Equal(problems, want) {
		t.Errorf("problems %q, want %q", problems, want)
	}
}

func TestRespondDoesNotAllocate(t *testing.T) {
	s := newServer(t, func(o *Options) { o.NSID, o.Version = "fra1-a", "portolan" })
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	slipped, dropped := limited(t, 1, from), limited(t, 0, from)
	contoso := func() *mdns.Msg { return ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24") }
	named, bare := contoso(), withCookie(t, question(".", mdns.TypeA), testClientCookie)
	named.IsEdns0().Option = append(named.IsEdns0().Option, &mdns.EDNS0_NSID{Code: mdns.EDNS0NSID})
	bare.Question = nil
	old := testClientCookie + "01000000000000000000000000000000"
	good := cookieOf(answerOf(t, s, withCookie(t, contoso(), testClientCookie), from))
	for name, m := range map[string]*mdns.Msg{
		"NSID": named, "version.bind": chaos("version.bind.", mdns.TypeTXT), "no question": bare,
		"a new cookie": withCookie(t, contoso(), testClientCookie), "a known cookie": withCookie(t, contoso(), good),
		"an expired cookie": withCookie(t, contoso(), old), "a bad cookie": withCookie(t, contoso(), good[:46]+"00"),
		"no cookie": withCookie(t, contoso(), "00"),
	} {
		raw, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
		if n := testing.AllocsPerRun(1000, func() { w.respond(out, raw, from) }); n != 0 {
			t.Errorf("%s: %v allocations", name, n)
		}
	}
	for _, c := range []struct {
		name, subnet string
		qtype        uint16
	}{
		{"contoso", "8.8.8.0/24", mdns.TypeA},
		{"contoso", "2a00:1::/48", mdns.TypeAAAA},
		{"fabrikam", "80.1.2.0/24", mdns.TypeHTTPS},
		{"adatum", "80.1.2.0/24", mdns.TypeA},
		{"westus.contoso", "80.1.2.0/24", mdns.TypeA},
		{"a.b.wild", "80.1.2.0/24", mdns.TypeTXT},
		{"a.b.c.d.e.nothing", "80.1.2.0/24", mdns.TypeA},
		{"contoso", "80.1.2.0/24", mdns.TypeANY},
	} {
		raw, err := ecs(question(c.name+".geo.example.net.", c.qtype), c.subnet).Pack()
		if err != nil {
			t.Fatal(err)
		}
		w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
		if n := testing.AllocsPerRun(1000, func() { w.respond(out, raw, from) }); n != 0 {
			t.Errorf("%s %s: %v allocations", c.name, mdns.Type(c.qtype), n)
		}
		batched := func() {
			w.single.parse(raw)
			w.prepare(&w.single, from)
			w.ready.Run()
			w.reply(out, &w.single, from)
		}
		if n := testing.AllocsPerRun(1000, batched); n != 0 {
			t.Errorf("%s %s, in a batch: %v allocations", c.name, mdns.Type(c.qtype), n)
		}
		for name, l := range map[string]*Server{"slipped": slipped, "dropped": dropped} {
			w := l.responder.worker(udp, 0)
			if n := testing.AllocsPerRun(1000, func() { w.respond(out, raw, from) }); n != 0 {
				t.Errorf("%s %s, %s: %v allocations", c.name, mdns.Type(c.qtype), name, n)
			}
		}
		raw = raw[:len(raw)-1]
		if answer := w.respond(out, raw, from); answer[3]&0xf != mdns.RcodeFormatError {
			t.Errorf("cut short: %x", answer)
		}
		if n := testing.AllocsPerRun(1000, func() { w.respond(out, raw, from) }); n != 0 {
			t.Errorf("FORMERR: %v allocations", n)
		}
	}
	// What whoami tells is put together only if it is sent.
	raw, err := question("whoami.contoso.geo.example.net.", mdns.TypeTXT).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for name, l := range map[string]*Server{"slipped": slipped, "dropped": dropped} {
		w, out := l.responder.worker(udp, 0), make([]byte, 0, ednsSize)
		if n := testing.AllocsPerRun(1000, func() { w.respond(out, raw, from) }); n != 0 {
			t.Errorf("whoami, %s: %v allocations", name, n)
		}
	}
}
