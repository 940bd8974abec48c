package dns

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"
)

// expectation is what RFC 8906 wants of a response, in the terms of its section 8. Flags that are neither wanted nor named by
// the test must be clear: the responses to what has no meaning yet say nothing.
type expectation struct {
	rcode   int
	opcode  int
	soa     bool // in the answer section; else that is empty
	aa      bool
	rd, cd  bool
	opt     bool // an OPT record of version 0; else none
	do      bool
	options []uint16 // those allowed in it
}

// Each query of RFC 8906, section 8, asked of the real server over UDP and TCP, and the response checked as that section says.
// The names of the tests are its numbers and the options of dig there. Section 8.3 is for servers without EDNS.
func TestRFC8906(t *testing.T) {
	t.Parallel()
	named := serve(t, newServer(t, func(o *Options) { o.NSID = "fra1-a" }))
	plain := serve(t, newServer(t, nil))
	soa := func(edit ...func(*mdns.Msg)) *mdns.Msg {
		m := question("geo.example.net.", mdns.TypeSOA)
		for _, e := range edit {
			e(m)
		}
		return m
	}
	edns := func(version uint8, options ...mdns.EDNS0) func(*mdns.Msg) {
		return func(m *mdns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().SetVersion(version)
			m.IsEdns0().Option = options
		}
	}
	do := func(m *mdns.Msg) { m.IsEdns0().SetDo() }
	flag := func(m *mdns.Msg) { m.IsEdns0().Hdr.Ttl |= 0x40 }
	unknown := &mdns.EDNS0_LOCAL{Code: 100}
	good := expectation{soa: true, aa: true}
	goodEDNS := expectation{soa: true, aa: true, opt: true}
	badVersion := expectation{rcode: mdns.RcodeBadVers, opt: true}
	with := func(e expectation, edit func(*expectation)) expectation {
		edit(&e)
		return e
	}
	for _, c := range []struct {
		name string
		m    *mdns.Msg
		want expectation
	}{
		{"8.1.1 +noedns +noad +norec soa", soa(), good},
		{"8.1.2 +noedns +noad +norec type1000", question("geo.example.net.", 1000), expectation{aa: true}},
		{"8.1.3.1 +noedns +noad +norec +cd soa", soa(func(m *mdns.Msg) { m.CheckingDisabled = true }), with(good, func(e *expectation) { e.cd = true })},
		{"8.1.3.2 +noedns +norec +ad soa", soa(func(m *mdns.Msg) { m.AuthenticatedData = true }), good},
		{"8.1.3.3 +noedns +noad +norec +zflag soa", soa(func(m *mdns.Msg) { m.Zero = true }), good},
		{"8.1.3.4 +noedns +noad +rec soa", soa(func(m *mdns.Msg) { m.RecursionDesired = true }), with(good, func(e *expectation) { e.rd = true })},
		{"8.1.4 +noedns +noad +opcode=15 +norec +header-only", &mdns.Msg{MsgHdr: mdns.MsgHdr{Id: 4711, Opcode: 15}},
			expectation{rcode: mdns.RcodeNotImplemented, opcode: 15}},
		// 8.1.5 is 8.1.1 over TCP.
		{"8.2.1 +nocookie +edns=0 +noad +norec soa", soa(edns(0)), goodEDNS},
		{"8.2.2 +nocookie +edns=1 +noednsneg +noad +norec soa", soa(edns(1)), badVersion},
		{"8.2.3 +nocookie +edns=0 +noad +norec +ednsopt=100 soa", soa(edns(0, unknown)), goodEDNS},
		{"8.2.4 +nocookie +edns=0 +noad +norec +ednsflags=0x40 soa", soa(edns(0), flag), goodEDNS},
		{"8.2.5 +nocookie +edns=1 +noednsneg +noad +norec +ednsflags=0x40 soa", soa(edns(1), flag), badVersion},
		{"8.2.6 +nocookie +edns=1 +noednsneg +noad +norec +ednsopt=100 soa", soa(edns(1, unknown)), badVersion},
		{"8.2.7 +norec +dnssec +bufsize=512 +ignore dnskey", func() *mdns.Msg {
			m := question("geo.example.net.", mdns.TypeDNSKEY)
			m.SetEdns0(512, true)
			return m
		}(), expectation{aa: true, opt: true, do: true}},
		{"8.2.8 +nocookie +edns=0 +noad +norec +dnssec soa", soa(edns(0), do), with(goodEDNS, func(e *expectation) { e.do = true })},
		{"8.2.9 +nocookie +edns=1 +noednsneg +noad +norec +dnssec soa", soa(edns(1), do), with(badVersion, func(e *expectation) { e.do = true })},
		{"8.2.10 +edns=0 +noad +norec +cookie +nsid +expire +subnet=0.0.0.0/0 soa",
			soa(edns(0, &mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: testClientCookie}, &mdns.EDNS0_NSID{Code: mdns.EDNS0NSID},
				&mdns.EDNS0_EXPIRE{Code: mdns.EDNS0EXPIRE, Empty: true}), func(m *mdns.Msg) { ecs(m, "0.0.0.0/0") }),
			with(goodEDNS, func(e *expectation) { e.options = []uint16{mdns.EDNS0COOKIE, mdns.EDNS0NSID, mdns.EDNS0SUBNET} })},
	} {
		for _, network := range []string{"udp", "tcp"} {
			for server, at := range map[string]netip.AddrPort{"plain": plain, "named": named} {
				t.Run(fmt.Sprintf("%s/%s/%s", strings.ReplaceAll(c.name, "/", ":"), network, server), func(t *testing.T) {
					t.Parallel()
					m := c.m.Copy()
					m.Id = mdns.Id()
					var raw []byte
					if network == "udp" {
						packed, err := m.Pack()
						if err != nil {
							t.Fatal(err)
						}
						raw = exchange(t, at, packed)
					} else {
						conn := dial(t, at)
						if _, err := conn.Write(frame(t, m)); err != nil {
							t.Fatal(err)
						}
						var err error
						if raw, err = readFrame(conn); err != nil {
							t.Fatal(err)
						}
					}
					checkResponse(t, m, raw, c.want)
				})
			}
		}
	}
}

// checkResponse holds raw, the response to m, to want.
func checkResponse(t *testing.T, m *mdns.Msg, raw []byte, want expectation) {
	t.Helper()
	a := new(mdns.Msg)
	if err := a.Unpack(raw); err != nil {
		t.Fatalf("%v: %x", err, raw)
	}
	if a.Id != m.Id || !a.Response || a.Rcode != want.rcode || a.Opcode != want.opcode {
		t.Errorf("want rcode %d, opcode %d", want.rcode, want.opcode)
	}
	if a.Authoritative != want.aa || a.RecursionDesired != want.rd || a.CheckingDisabled != want.cd ||
		a.Truncated || a.RecursionAvailable || a.AuthenticatedData || a.Zero {
		t.Errorf("want the flags aa=%v, rd=%v, cd=%v and no other", want.aa, want.rd, want.cd)
	}
	if len(a.Question) != len(m.Question) || len(m.Question) == 1 && a.Question[0] != m.Question[0] {
		t.Errorf("want the question %v", m.Question)
	}
	switch {
	case want.soa && (len(a.Answer) != 1 || brief(a.Answer) != testSOA):
		t.Error("want the SOA in the answer section")
	case !want.soa && len(a.Answer) > 0:
		t.Error("want an empty answer section")
	case want.aa && !want.soa && brief(a.Ns) != testSOA:
		t.Error("want the SOA in the authority section")
	case !want.aa && len(a.Ns) > 0:
		t.Error("want an empty authority section")
	}
	o := a.IsEdns0()
	if (o != nil) != want.opt {
		t.Errorf("OPT %v, want one: %v", o, want.opt)
	}
	if o != nil {
		// The flags but DO must be zero (RFC 6891, section 6.1.4), whatever was sent.
		if o.Version() != 0 || o.Do() != want.do || o.Hdr.Ttl&0x7fff != 0 {
			t.Errorf("want version 0, do=%v and no other flag", want.do)
		}
		for _, option := range o.Option {
			allowed := false
			for _, code := range want.options {
				allowed = allowed || option.Option() == code
			}
			if !allowed {
				t.Errorf("want no option %d", option.Option())
			}
		}
	}
	if t.Failed() {
		t.Logf("got %v", a)
	}
}

// Section 8.2.7 is about responses that do not fit: what is cut short still has its OPT record, and TC.
func TestRFC8906Truncated(t *testing.T) {
	t.Parallel()
	var static strings.Builder
	for i := range 60 {
		fmt.Fprintf(&static, "many IN A 192.0.2.%d\n", i)
	}
	at := serve(t, newServer(t, func(o *Options) { o.StaticFile = writeFile(t, static.String()) }))
	m := question("many.geo.example.net.", mdns.TypeA)
	m.SetEdns0(512, true)
	a := exchangeMsg(t, at, m)
	if o := a.IsEdns0(); a.Rcode != 0 || !a.Truncated || !a.Authoritative || o == nil || o.Version() != 0 {
		t.Errorf("got %v", a)
	}
}
