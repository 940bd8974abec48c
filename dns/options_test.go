package dns

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

func TestOptions(t *testing.T) {
	t.Parallel()
	one := []netip.Addr{netip.MustParseAddr("192.0.2.53")}
	for _, c := range []struct {
		name   string
		change func(*Options)
		error  string // none if empty
	}{
		{"as they are", func(*Options) {}, ""},
		{"upper case and a final dot", func(o *Options) { o.Zone = "GEO.example.net." }, ""},
		{"no contact", func(o *Options) { o.Contact = "" }, ""},
		{"no TTLs", func(o *Options) { o.TTLMin, o.TTLMax = 0, 0 }, ""},
		{"no zone", func(o *Options) { o.Zone = "" }, "dns.zone"},
		{"the root", func(o *Options) { o.Zone = "." }, "dns.zone"},
		{"a space in the zone", func(o *Options) { o.Zone = "geo example.net" }, "letters, digits"},
		{"an empty label", func(o *Options) { o.Zone = "geo..example.net" }, "1 to 63"},
		{"a long label", func(o *Options) { o.Zone = strings.Repeat("a", 64) + ".net" }, "1 to 63"},
		{"a long zone", func(o *Options) { o.Zone = strings.Repeat("abcdefg.", 32) + "net" }, "253"},
		{"no name server", func(o *Options) { o.Nameservers = nil }, "at least one"},
		{"a name server inside without addresses", func(o *Options) { o.Nameservers = map[string][]netip.Addr{"ns1": nil} }, "needs its addresses"},
		{"a name server inside by its full name", func(o *Options) { o.Nameservers = map[string][]netip.Addr{"ns1.geo.example.net.": one} }, ""},
		{"a name server outside with addresses", func(o *Options) { o.Nameservers = map[string][]netip.Addr{"ns.example.org.": one} }, "outside the zone"},
		{"a name server twice", func(o *Options) {
			o.Nameservers = map[string][]netip.Addr{"ns1": one, "ns1.geo.example.net.": one}
		}, "named twice"},
		{"the wildcard as a name server's address", func(o *Options) {
			o.Nameservers = map[string][]netip.Addr{"ns1": {netip.IPv4Unspecified()}}
		}, "not an address"},
		{"a contact without @", func(o *Options) { o.Contact = "hostmaster.example.net" }, "dns.contact"},
		{"a TTL of no second", func(o *Options) { o.TTLMin = time.Millisecond }, "dns.ttl.min"},
		{"a TTL of half a second more", func(o *Options) { o.TTLMax = 90500 * time.Millisecond }, "dns.ttl.max"},
		{"a TTL of a week", func(o *Options) { o.TTLMax = 7 * 24 * time.Hour }, "dns.ttl.max"},
		{"min above max", func(o *Options) { o.TTLMin, o.TTLMax = time.Minute, time.Second }, "above"},
		{"whoami", func(o *Options) { o.Whoami = "all" }, "dns.whoami"},
		{"nowhere to listen", func(o *Options) { o.Listen = nil }, "dns.listen"},
		{"an identity of 64", func(o *Options) { o.NSID, o.Version = strings.Repeat("n", 64), strings.Repeat("v", 64) }, ""},
		{"an NSID of 65", func(o *Options) { o.NSID = strings.Repeat("n", 65) }, "dns.nsid: 65 characters"},
		{"an NSID beyond ASCII", func(o *Options) { o.NSID = "zürich" }, "dns.nsid"},
		{"a version of two lines", func(o *Options) { o.Version = "a\nb" }, "dns.version"},
		{"no such file of keys", func(o *Options) { o.CookieSecret = "/does/not/exist" }, "dns.cookies.secret"},
		{"no such file", func(o *Options) { o.StaticFile = "/does/not/exist" }, "static"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			o := testOptions()
			c.change(&o)
			_, err := New(o)
			if (err == nil) != (c.error == "") || err != nil && !strings.Contains(err.Error(), c.error) {
				t.Errorf("got %v, want %q", err, c.error)
			}
		})
	}
}

func TestMailbox(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]string{
		"hostmaster@example.net": "hostmaster.example.net.",
		"a.b.c@Example.NET":      `a\.b\.c.example.net.`,
	} {
		if got, err := mailbox(address); err != nil || got != want {
			t.Errorf("%s: got %q, %v; want %q", address, got, err, want)
		}
	}
}

// Bad static records are refused with the line they stand in.
func TestStaticErrors(t *testing.T) {
	t.Parallel()
	o := testOptions()
	b, err := newBase(&o)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, text, error string }{
		{"a delegation", "\n\nsub IN NS ns.example.org.\n", "zone.db:3: sub.geo.example.net.: NS: a delegation below the zone"},
		{"a delegation by wildcard", "*.sub IN NS ns.example.org.\n", "zone.db:1: *.sub.geo.example.net.: NS: a delegation"},
		{"a signed delegation", "a A 192.0.2.1\nsub DS 1 13 2 " + strings.Repeat("00", 32), "zone.db:2: sub.geo.example.net.: DS: a delegation"},
		{"a delegation of a registry", "contoso NS ns.example.org.\n", "zone.db:1: contoso.geo.example.net.: NS: a delegation"},
		{"name servers", "@ NS ns.example.org.\n", "zone.db:1: geo.example.net.: NS: the zone's own name servers come from dns.nameservers"},
		{"DNAME", "a A 192.0.2.1\nsub DNAME example.org.\n", "zone.db:2: sub.geo.example.net.: DNAME is not served"},
		{"DNAME at the apex", "@ DNAME example.org.\n", "zone.db:1: geo.example.net.: DNAME is not served"},
		{"SOA", "@ SOA a. b. 1 2 3 4 5", "zone.db:1: geo.example.net.: SOA: the zone's own"},
		{"in parentheses", "a TXT ( \"x\"\n \"y\" )\nb PTR a\n", "zone.db:3: b.geo.example.net.: PTR"},
		{"after comments", "; one\n\n; three\nb PTR a ; four\nc A 192.0.2.1\n", "zone.db:4:"},
		{"the last line without its end", "a A 192.0.2.1\nb PTR a", "zone.db:2:"},
		{"outside", "a A 192.0.2.1\nwww.example.org. A 192.0.2.1\n", "zone.db:2: www.example.org. lies outside"},
		{"class CH", "a CH TXT x\n", "zone.db:1: a.geo.example.net.: class CH"},
		{"CNAME after others", "a A 192.0.2.1\na CNAME b\n", "zone.db:2: a.geo.example.net.: a CNAME stands alone"},
		{"others after CNAME", "a CNAME b\n\nA TXT x\n", "zone.db:3: a.geo.example.net.: a CNAME stands alone"},
		{"others after CNAME, escaped", "aa CNAME b\n\\097\\A TXT x\n", "zone.db:2: aa.geo.example.net.: a CNAME stands alone"},
		{"two CNAMEs", "a CNAME b\na CNAME c\n", "zone.db:2:"},
		{"CNAME at the apex", "@ CNAME b\n", "zone.db:1: the zone's own name"},
		{"a name server", "ns1 A 192.0.2.1\n", "zone.db:1: ns1.geo.example.net. is a name server"},
		{"no address", "a A 192.0.2\n", "line: 1"},
		{"no file inclusion", "$INCLUDE other.db\n", "line: 1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			_, err := parseStatic(strings.NewReader(c.text), "zone.db", b)
			if err == nil || !strings.Contains(err.Error(), c.error) {
				t.Errorf("got %v, want %q", err, c.error)
			}
		})
	}
}

// However a name is written, with capital letters or escapes (RFC 1035, section 5.1), it is found.
func TestStaticNamesAreCompared(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) {
		o.StaticFile = writeFile(t, "\\065bc A 192.0.2.1\nABC A 192.0.2.2\n\\a\\098\\C A 192.0.2.3\nwith\\.dot A 192.0.2.4\nwith\\046dot A 192.0.2.5\n")
	})
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for name, want := range map[string]int{"abc": 3, "aBC": 3, `with\.DOT`: 2, "with.dot": 0} {
		if a := answerOf(t, s, question(name+".geo.example.net.", mdns.TypeA), from); len(a.Answer) != want {
			t.Errorf("%s: got %v, want %d records", name, a, want)
		}
	}
}

func TestReload(t *testing.T) {
	t.Parallel()
	path := writeFile(t, "a A 192.0.2.1\n")
	s := newServer(t, func(o *Options) { o.StaticFile = path })
	at := serve(t, s)
	check := func(name, want string) {
		t.Helper()
		if got := brief(ask(t, "udp", at, question(name+".geo.example.net.", mdns.TypeA)).Answer); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	check("a", "A 192.0.2.1 ttl=60")
	for _, step := range []struct {
		text string
		good bool
		want string
	}{
		{"a A 192.0.2.2\na A 192.0.2.2\n", true, "A 192.0.2.2 ttl=60"},
		{"a A 192.0.2.3\nb NS c\n", false, "A 192.0.2.2 ttl=60"},
		{"$TTL 1h\na A 192.0.2.4\n", true, "A 192.0.2.4 ttl=3600"},
	} {
		if err := os.WriteFile(path, []byte(step.text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.Reload(); (err == nil) != step.good {
			t.Errorf("%q: %v", step.text, err)
		}
		check("a", step.want)
	}
	check("contoso", "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60")
}

func FuzzStatic(f *testing.F) {
	f.Add(testStatic)
	f.Add("a TXT ( \"x\"\n \"y\" )\nb PTR a\n")
	f.Add("$GENERATE 1-3 a$ A 192.0.2.$\n")
	o := testOptions()
	b, err := newBase(&o)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		if strings.Contains(strings.ToUpper(text), "$GENERATE") && len(text) > 100 {
			t.Skip("up to 65,536 records a line: nothing new, only slow")
		}
		records, err := parseStatic(strings.NewReader(text), "zone.db", b)
		if err != nil {
			return
		}
		newStatic(records, b)
	})
}
