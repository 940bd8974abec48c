package dns

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"testing"

	mdns "github.com/miekg/dns"
)

func chaos(name string, qtype uint16) *mdns.Msg {
	m := question(name, qtype)
	m.Question[0].Qclass = mdns.ClassCHAOS
	return m
}

// option returns the option of that code in m's OPT record; nil if there is none.
func option(m *mdns.Msg, code uint16) mdns.EDNS0 {
	if o := m.IsEdns0(); o != nil {
		for _, option := range o.Option {
			if option.Option() == code {
				return option
			}
		}
	}
	return nil
}

// Who asks for the name of the server gets it with any answer, and nobody else does.
func TestNSID(t *testing.T) {
	t.Parallel()
	named := serve(t, newServer(t, func(o *Options) { o.NSID = "fra1-a" }))
	nameless := serve(t, newServer(t, nil))
	ask := func(m *mdns.Msg, data string) *mdns.Msg {
		m.SetEdns0(1232, false)
		raw, err := hex.DecodeString(data)
		if err != nil {
			t.Fatal(err)
		}
		m.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_LOCAL{Code: optionNSID, Data: raw}}
		return ask(t, "udp", named, m)
	}
	for _, c := range []struct {
		name  string
		m     *mdns.Msg
		rcode int
	}{
		{"an answer", question("contoso.geo.example.net.", mdns.TypeA), 0},
		{"a negative one", question("nothing.geo.example.net.", mdns.TypeA), mdns.RcodeNameError},
		{"a refusal", question("example.com.", mdns.TypeA), mdns.RcodeRefused},
		{"class CH", chaos("id.server.", mdns.TypeTXT), 0},
	} {
		for _, data := range []string{"", "0102"} { // what comes with it does not matter
			a := ask(c.m.Copy(), data)
			id, ok := option(a, mdns.EDNS0NSID).(*mdns.EDNS0_NSID)
			if !ok || id.Nsid != hex.EncodeToString([]byte("fra1-a")) || a.Rcode != c.rcode {
				t.Errorf("%s with %q: got %v", c.name, data, a)
			}
		}
	}
	plain := question("contoso.geo.example.net.", mdns.TypeA)
	plain.SetEdns0(1232, false)
	if a := exchangeMsg(t, named, plain); option(a, mdns.EDNS0NSID) != nil {
		t.Errorf("nobody asked: %v", a)
	}
	plain.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_NSID{Code: mdns.EDNS0NSID}}
	if a := exchangeMsg(t, nameless, plain); a.IsEdns0() == nil || option(a, mdns.EDNS0NSID) != nil {
		t.Errorf("the server has no name: %v", a)
	}
}

// exchangeMsg is exchange for messages.
func exchangeMsg(t testing.TB, at netip.AddrPort, m *mdns.Msg) *mdns.Msg {
	t.Helper()
	raw, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	a := new(mdns.Msg)
	if err := a.Unpack(exchange(t, at, raw)); err != nil {
		t.Fatal(err)
	}
	return a
}

// The server's own names in class CH: what is set is told, all else refused, also before there is a zone.
func TestChaos(t *testing.T) {
	t.Parallel()
	full := testOptions()
	full.NSID, full.Version = "fra1-a", "portolan 1"
	s, err := New(full) // no Update
	if err != nil {
		t.Fatal(err)
	}
	set := serve(t, s)
	unset := serve(t, newServer(t, nil))
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string // refused if empty
	}{
		{"version.bind.", mdns.TypeTXT, "portolan 1"},
		{"VERSION.bind.", mdns.TypeTXT, "portolan 1"},
		{"version.server.", mdns.TypeTXT, "portolan 1"},
		{"id.server.", mdns.TypeTXT, "fra1-a"},
		{"hostname.bind.", mdns.TypeTXT, "fra1-a"},
		{"id.server.", mdns.TypeANY, "fra1-a"},
		{"id.server.", mdns.TypeA, ""},
		{"x.id.server.", mdns.TypeTXT, ""},
		{"server.", mdns.TypeTXT, ""},
		{"authors.bind.", mdns.TypeTXT, ""},
		{"geo.example.net.", mdns.TypeSOA, ""},
		{".", mdns.TypeTXT, ""},
	} {
		for _, network := range []string{"udp", "tcp"} {
			a := ask(t, network, set, chaos(c.name, c.qtype))
			if c.want == "" {
				if a.Rcode != mdns.RcodeRefused || a.Authoritative || len(a.Answer)+len(a.Ns) > 0 {
					t.Errorf("%s %s: got %v, want REFUSED", c.name, mdns.Type(c.qtype), a)
				}
				continue
			}
			got := ""
			if len(a.Answer) == 1 {
				h := a.Answer[0].Header()
				got = fmt.Sprint(h.Name, h.Class, h.Ttl, a.Answer[0].(*mdns.TXT).Txt)
			}
			if want := fmt.Sprint(c.name, mdns.ClassCHAOS, 0, []string{c.want}); a.Rcode != 0 || !a.Authoritative || got != want {
				t.Errorf("%s %s: got %v, want %s", c.name, mdns.Type(c.qtype), a, want)
			}
		}
		if a := ask(t, "udp", unset, chaos(c.name, c.qtype)); a.Rcode != mdns.RcodeRefused || len(a.Answer) > 0 {
			t.Errorf("%s where nothing is set: got %v", c.name, a)
		}
	}
	// In another class these are names like any other.
	if a := ask(t, "udp", set, question("version.bind.", mdns.TypeTXT)); a.Rcode == 0 {
		t.Errorf("class IN: got %v", a)
	}
}
