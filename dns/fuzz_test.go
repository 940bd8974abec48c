package dns

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"
)

// FuzzRespond: whatever comes in, nothing panics, a response is never answered, and what is answered can be unpacked by
// another implementation to its last byte, bears the query's id, is a response, keeps the limits, echoes the question, and
// has an OPT record exactly if that implementation finds one in the query.
func FuzzRespond(f *testing.F) {
	for _, name := range []string{"contoso", "fabrikam", "adatum", "tailwind", "westus.contoso", "whoami.contoso", "a.wild", "alias", "nothing", "srv"} {
		for _, qtype := range []uint16{mdns.TypeA, mdns.TypeAAAA, mdns.TypeTXT, mdns.TypeANY, mdns.TypeHTTPS, mdns.TypeAXFR} {
			m := ecs(question(name+".geo.example.net.", qtype), "8.8.8.0/24")
			raw, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(raw, true)
		}
	}
	two := question("geo.example.net.", mdns.TypeSOA)
	two.SetEdns0(4096, true)
	two.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_NSID{Code: mdns.EDNS0NSID}, &mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: "0123456789abcdef"}}
	raw, err := two.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw, false)
	none := question("geo.example.net.", mdns.TypeSOA)
	none.Question = nil
	none.SetEdns0(1232, false)
	none.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: "0123456789abcdef010000006553f100aabbccddeeff0011"}}
	if raw, err = none.Pack(); err != nil {
		f.Fatal(err)
	}
	f.Add(raw, true)
	if raw, err = chaos("version.bind.", mdns.TypeTXT).Pack(); err != nil {
		f.Fatal(err)
	}
	f.Add(raw, true)
	s := newServer(f, func(o *Options) {
		o.Whoami, o.NSID, o.Version = WhoamiFull, strings.Repeat("n", MaxIdentity), strings.Repeat("v", MaxIdentity)
	})
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	slipped := limited(f, 1, from)
	f.Fuzz(func(t *testing.T, raw []byte, datagram bool) {
		via := tcp
		if datagram {
			via = udp
		}
		input := bytes.Clone(raw)
		out := s.responder.worker(via, 0).respond([]byte("kept"), raw, from)
		if !bytes.Equal(raw, input) {
			t.Fatal("the query was modified")
		}
		if !bytes.HasPrefix(out, []byte("kept")) {
			t.Fatal("what stood in the buffer was modified")
		}
		out = out[4:]
		if len(raw) < headerSize || raw[2]&0x80 != 0 {
			if len(out) > 0 {
				t.Fatalf("answered %x", out)
			}
			return
		}
		if len(out) < headerSize {
			t.Fatalf("no answer to %x", raw)
		}
		if datagram && len(out) > ednsSize {
			t.Fatalf("%d bytes over UDP", len(out))
		}
		m := new(mdns.Msg)
		if err := m.Unpack(out); err != nil {
			t.Fatalf("%v: %x", err, out)
		}
		if m.Id != binary.BigEndian.Uint16(raw) || !m.Response {
			t.Fatalf("got %v", m)
		}
		if end := measure(t, m, out); end != len(out) {
			t.Fatalf("%d bytes after the records of %x", len(out)-end, out)
		}
		if datagram && m.Rcode != mdns.RcodeBadCookie {
			// Beyond the rate limit the same is sent, but for the records, unless the query has a good cookie.
			cut := new(mdns.Msg)
			if err := cut.Unpack(slipped.responder.worker(udp, 0).respond(nil, raw, from)); err != nil {
				t.Fatal(err)
			}
			if cut.Id != m.Id || len(cut.Question) != len(m.Question) || len(cut.Answer)+len(cut.Ns) > 0 || (cut.IsEdns0() == nil) != (m.IsEdns0() == nil) {
				t.Fatalf("beyond the limit: %v, else %v", cut, m)
			}
		}
		if asked := new(mdns.Msg); asked.Unpack(raw) == nil && canonical(asked, raw) && (asked.IsEdns0() == nil) != (m.IsEdns0() == nil) {
			t.Fatalf("OPT: asked %v, got %v", asked, m)
		}
		if datagram && m.IsEdns0() == nil && len(out) > plainSize {
			t.Fatalf("%d bytes to a client without EDNS", len(out))
		}
		if len(m.Question) == 1 {
			end := headerSize
			for out[end] != 0 {
				end += 1 + int(out[end])
			}
			if end += 5; !bytes.Equal(out[headerSize:end], raw[headerSize:end]) {
				t.Fatalf("the question came back as %x", out[headerSize:end])
			}
		}
	})
}

// measure returns where the records of out end, which was unpacked into m.
func measure(t *testing.T, m *mdns.Msg, out []byte) (end int) {
	t.Helper()
	at, err := headerSize, error(nil)
	for range m.Question {
		if _, at, err = mdns.UnpackDomainName(out, at); err != nil {
			t.Fatal(err)
		}
		at += 4
	}
	for range len(m.Answer) + len(m.Ns) + len(m.Extra) {
		if _, at, err = mdns.UnpackRR(out, at); err != nil {
			t.Fatal(err)
		}
	}
	return at
}

// canonical is whether m, which was unpacked from raw, says all that raw does: the library passes over bytes behind the
// message, counts that are too high, and subnets of a wrong length.
func canonical(m *mdns.Msg, raw []byte) bool {
	m.Compress = false
	again, err := m.Pack()
	return err == nil && bytes.Equal(again, raw)
}

// FuzzParse: whatever another implementation reads in a query is read here too, and what is wrong with it is found.
func FuzzParse(f *testing.F) {
	add := func(change func(*mdns.Msg)) {
		m := ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24")
		change(m)
		raw, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	add(func(*mdns.Msg) {})
	add(func(m *mdns.Msg) { m.Extra = nil })
	add(func(m *mdns.Msg) { m.IsEdns0().SetDo() })
	add(func(m *mdns.Msg) { m.IsEdns0().SetVersion(1) })
	add(func(m *mdns.Msg) { m.IsEdns0().Option = nil; ecs(m, "2a00:1::/48") })
	add(func(m *mdns.Msg) { m.IsEdns0().Option = nil; ecs(m, "0.0.0.0/0") })
	add(func(m *mdns.Msg) { ecs(m, "80.0.0.0/8") })
	add(func(m *mdns.Msg) { m.IsEdns0().Option[0].(*mdns.EDNS0_SUBNET).SourceScope = 8 })
	add(func(m *mdns.Msg) {
		m.IsEdns0().Option = append(m.IsEdns0().Option, &mdns.EDNS0_PADDING{Padding: make([]byte, 9)})
	})
	add(func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) })
	add(func(m *mdns.Msg) { m.Question = nil })
	for _, cookie := range []string{"0011223344556677", "00112233445566", "001122334455667788", strings.Repeat("ab", 24), strings.Repeat("ab", 40), strings.Repeat("ab", 41)} {
		option := &mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: cookie}
		add(func(m *mdns.Msg) { m.IsEdns0().Option = append(m.IsEdns0().Option, option) })
		add(func(m *mdns.Msg) { m.Question, m.IsEdns0().Option = nil, []mdns.EDNS0{option, option} })
	}
	add(func(m *mdns.Msg) {
		m.IsEdns0().Option = append(m.IsEdns0().Option, &mdns.EDNS0_NSID{Code: mdns.EDNS0NSID, Nsid: "01"})
	})
	add(func(m *mdns.Msg) { m.Question[0].Name = `CoNtOsO\000\.x.geo.example.net.` })
	add(func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify })
	add(func(m *mdns.Msg) { m.Extra = append(m.Extra, mdns.Copy(m.Extra[0])) })
	add(func(m *mdns.Msg) {
		m.Ns = []mdns.RR{&mdns.SOA{Hdr: header("geo.example.net.", mdns.TypeSOA, 0), Ns: "ns.", Mbox: "me."}}
	})
	f.Fuzz(func(t *testing.T, raw []byte) {
		m, q := new(mdns.Msg), new(query)
		q.parse(raw)
		rcode, answer := q.rcode, q.answered
		if m.Unpack(raw) != nil || !canonical(m, raw) {
			return
		}
		if answer == m.Response {
			t.Fatalf("answer %v to %v", answer, m)
		}
		if !answer {
			return
		}
		var opts []*mdns.OPT
		var subnets []*mdns.EDNS0_SUBNET
		bad, cookie, nsid := false, "", false
		for _, rr := range m.Extra {
			if o, ok := rr.(*mdns.OPT); ok {
				bad = bad || o.Hdr.Name != "."
				opts = append(opts, o)
			}
		}
		if bad = bad || len(opts) > 1; !bad && len(opts) == 1 && opts[0].Version() == 0 {
			for _, option := range opts[0].Option {
				switch s := option.(type) {
				case *mdns.EDNS0_SUBNET:
					bad = bad || s.SourceScope != 0 || s.Family != 1 && s.Family != 2
					subnets = append(subnets, s)
				case *mdns.EDNS0_COOKIE:
					if cookie == "" {
						cookie = s.Cookie
						bad = bad || len(cookie) != 2*8 && (len(cookie) < 2*16 || len(cookie) > 2*40)
					}
				case *mdns.EDNS0_NSID:
					nsid = true
				}
			}
			bad = bad || len(subnets) > 1
		}
		bad = bad || len(m.Question) > 1 || len(m.Question) == 0 && cookie == ""
		want := mdns.RcodeSuccess
		switch {
		case m.Opcode != mdns.OpcodeQuery:
			want = mdns.RcodeNotImplemented
		case bad:
			want = mdns.RcodeFormatError
		case len(opts) == 1 && opts[0].Version() != 0:
			want = mdns.RcodeBadVers
		}
		if rcode != want {
			t.Fatalf("rcode %d, want %d, for %v", rcode, want, m)
		}
		if len(m.Question) == 1 {
			name, err := packName(mdns.CanonicalName(m.Question[0].Name))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(q.name[:q.nameLen], name) || q.qtype != m.Question[0].Qtype || q.qclass != m.Question[0].Qclass || q.depth != mdns.CountLabel(m.Question[0].Name) {
				t.Fatalf("read %q, %d, %d, %d labels; want %v", q.name[:q.nameLen], q.qtype, q.qclass, q.depth, m.Question[0])
			}
		}
		if q.edns != (len(opts) > 0) {
			t.Fatalf("EDNS %v, want %v", q.edns, opts)
		}
		if bad || len(opts) == 0 {
			return
		}
		if hex.EncodeToString(q.cookie) != strings.ToLower(cookie) || q.nsid != nsid {
			t.Fatalf("cookie %x, NSID %v; want %q, %v", q.cookie, q.nsid, cookie, nsid)
		}
		if q.size != opts[0].Hdr.Class || q.version != opts[0].Version() || q.do != opts[0].Do() {
			t.Fatalf("size %d, version %d, DO %v; want %v", q.size, q.version, q.do, opts[0])
		}
		if q.subnet.IsValid() != (len(subnets) == 1) {
			t.Fatalf("subnet %v, want %v", q.subnet, subnets)
		}
		if len(subnets) == 1 {
			address, _ := netip.AddrFromSlice(subnets[0].Address)
			if subnets[0].Family == 1 {
				address = address.Unmap()
			}
			if q.subnet != netip.PrefixFrom(address, int(subnets[0].SourceNetmask)) {
				t.Fatalf("subnet %v, want %v", q.subnet, subnets[0])
			}
		}
	})
}
