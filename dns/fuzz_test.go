package dns

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	mdns "github.com/miekg/dns"
)

// FuzzRespond: whatever comes in, nothing panics, a response is never answered, and what is answered can be unpacked by
// another implementation, bears the query's id, is a response, keeps the limits and echoes the question.
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
	s := newServer(f, func(o *Options) { o.Whoami = WhoamiFull })
	from := netip.MustParseAddrPort("192.0.2.200:4444")
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
