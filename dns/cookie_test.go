package dns

import (
	"encoding/hex"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

func unhex(t testing.TB, text string) []byte {
	t.Helper()
	b, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The vectors of the reference implementation: the key 00 01 ... 0f, and messages 00 01 02 ... of each length.
func TestSipHash(t *testing.T) {
	t.Parallel()
	var key [16]byte
	message := make([]byte, 64)
	for i := range message {
		message[i] = byte(i)
	}
	copy(key[:], message)
	for length, want := range map[int]uint64{
		0: 0x726fdb47dd0e0e31, 1: 0x74f839c593dc67fd, 8: 0x93f5f5799a932462, 15: 0xa129ca6149be45e5, 63: 0x958a324ceb064572,
	} {
		if got := sipHash(&key, message[:length]); got != want {
			t.Errorf("%d bytes: %016x, want %016x", length, got, want)
		}
	}
}

// The examples of RFC 9018, appendix A, and what changes the worth of their cookies.
func TestCookieVectors(t *testing.T) {
	t.Parallel()
	const (
		secret = "e5e973e5a6b2a43f48e7dc849e37bfcf"
		old    = "dd3bdf9344b678b185a6f5cb60fca715"
		next   = "445536bcd2513298075a5d379663c962"
		v4     = "198.51.100.100"
		other  = "203.0.113.203"
		v6     = "2001:db8:220:1:59de:d0f4:8769:82b8"
		first  = "2464c4abcf10c957010000005cf79f111f8130c3eee29480"
		third  = "fc93fc62807ddb8601abcdef5cf78f71a314227b6679ebf5"
		sixth  = "22681ab97d52c298010000005cf7c57926556bd0934c72f8"
	)
	for _, c := range []struct {
		name    string
		secrets string
		client  string
		now     int64
		asked   string
		known   bool
		answer  string // not looked at if empty
	}{
		{"A.1: a new one", secret, v4, 1559731985, "2464c4abcf10c957", false, first},
		{"A.2: a renewed one", secret, v4, 1559734385, first, true, "2464c4abcf10c957010000005cf7a871d4a564a1442aca77"},
		{"A.3: reserved bytes", secret, other, 1559727985, third, true, ""},
		{"A.3: after its time", secret, other, 1559734700, third, false, "fc93fc62807ddb86010000005cf7a9acf73a7810aca2381e"},
		{"A.4: a new secret", next + "\n" + old, v6, 1559741961, sixth, true, "22681ab97d52c298010000005cf7c609a6bb79d16625507a"},
		{"the new secret alone", next, v6, 1559741961, sixth, false, "22681ab97d52c298010000005cf7c609a6bb79d16625507a"},
		{"before the new secret is used", old + "\n" + next, v6, 1559741961, sixth, true, sixth},
		{"fresh: the same back", secret, v4, 1559731985 + 1800, first, true, first},
		{"over half an hour: another", secret, v4, 1559731985 + 1801, first, true, ""},
		{"an hour", secret, v4, 1559731985 + 3600, first, true, ""},
		{"over an hour", secret, v4, 1559731985 + 3601, first, false, ""},
		{"five minutes ahead", secret, v4, 1559731985 - 300, first, true, first},
		{"further ahead", secret, v4, 1559731985 - 301, first, false, ""},
		{"after the wrap of 2106", secret, v4, 1559731985 + 1<<32, first, true, first},
		{"from another address", secret, "198.51.100.101", 1559731985, first, false, ""},
		{"with another client cookie", secret, v4, 1559731985, "0" + first[1:], false, ""},
		{"of another version", secret, v4, 1559731985, strings.Replace(first, "95701", "95702", 1), false, ""},
		{"with other reserved bytes", secret, v4, 1559731985, strings.Replace(first, "9570100", "9570101", 1), false, ""},
		{"of another time", secret, v4, 1559731985, strings.Replace(first, "9f11", "9f12", 1), false, ""},
		{"with another hash", secret, v4, 1559731985, first[:47] + "1", false, ""},
		{"of another server's length", secret, v4, 1559731985, first + "00", false, ""},
	} {
		s, err := parseSecrets(strings.NewReader(c.secrets))
		if err != nil {
			t.Fatal(err)
		}
		var got [cookieSize]byte
		known := s.answer(&got, unhex(t, c.asked), netip.MustParseAddr(c.client), time.Unix(c.now, 0))
		if known != c.known || c.answer != "" && hex.EncodeToString(got[:]) != c.answer {
			t.Errorf("%s: got %x, %v; want %s, %v", c.name, got, known, c.answer, c.known)
		}
		if string(got[:]) == string(unhex(t, c.asked)) && c.answer != c.asked {
			t.Errorf("%s: the same came back", c.name)
		}
		// Whatever came, the answer is good the next time.
		if !s.answer(new([cookieSize]byte), got[:], netip.MustParseAddr(c.client), time.Unix(c.now, 0)) {
			t.Errorf("%s: %x is not known again", c.name, got)
		}
	}
}

func TestSecrets(t *testing.T) {
	t.Parallel()
	const key = "000102030405060708090a0b0c0d0e0f"
	for _, c := range []struct{ name, text, error string }{
		{"one", key, ""},
		{"two, with comments", "# made in May\n\n" + key + "\n  " + strings.ToUpper(key) + "\r\n", ""},
		{"none", "# nothing\n", "holds no key"},
		{"empty", "", "holds no key"},
		{"three", key + "\n" + key + "\n" + key, "line 3: a third"},
		{"too short", "\n" + key[2:], "line 2: want a key of 32"},
		{"too long", key + "00", "line 1: want"},
		{"not hexadecimal", key[1:] + "g", "line 1: want"},
	} {
		s, err := parseSecrets(strings.NewReader(c.text))
		if (err == nil) != (c.error == "") || err != nil && !strings.Contains(err.Error(), c.error) {
			t.Errorf("%s: got %v, want %q", c.name, err, c.error)
		}
		if err != nil && strings.Contains(err.Error(), key[4:20]) {
			t.Errorf("%s: the key is in %q", c.name, err)
		}
		if err == nil && hex.EncodeToString(s.keys[s.count-1][:]) != key {
			t.Errorf("%s: got %x", c.name, s.keys)
		}
	}
}

// withCookie adds the option to m with that data.
func withCookie(t testing.TB, m *mdns.Msg, data string) *mdns.Msg {
	t.Helper()
	if m.IsEdns0() == nil {
		m.SetEdns0(1232, false)
	}
	o := m.IsEdns0()
	o.Option = append(o.Option, &mdns.EDNS0_LOCAL{Code: optionCookie, Data: unhex(t, data)})
	return m
}

// cookieOf is the data of m's cookie option; empty if there is none.
func cookieOf(m *mdns.Msg) string {
	if o, ok := option(m, mdns.EDNS0COOKIE).(*mdns.EDNS0_COOKIE); ok {
		return o.Cookie
	}
	return ""
}

const testClientCookie = "0011223344556677"

// Every query with a cookie gets one back, whatever else comes of it; who sends none gets none.
func TestCookies(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	at := serve(t, s)
	count := func(state cookieState) float64 { return s.responder.metrics.cookies[state].sum() }
	for _, m := range []*mdns.Msg{
		question("contoso.geo.example.net.", mdns.TypeA),
		question("nothing.geo.example.net.", mdns.TypeA),
		question("example.com.", mdns.TypeA),
		chaos("version.bind.", mdns.TypeTXT),
	} {
		for _, network := range []string{"udp", "tcp"} {
			before := [...]float64{count(cookieNew), count(cookieKnown), count(cookieUnknown)}
			plain := m.Copy()
			plain.SetEdns0(1232, false)
			want := ask(t, network, at, plain)
			if cookieOf(want) != "" {
				t.Errorf("nobody sent a cookie: %v", want)
			}
			a := ask(t, network, at, withCookie(t, m.Copy(), testClientCookie))
			cookie := cookieOf(a)
			if !strings.HasPrefix(cookie, testClientCookie+"01000000") || len(cookie) != 2*cookieSize || a.Rcode != want.Rcode || brief(a.Answer) != brief(want.Answer) {
				t.Errorf("a new cookie: got %v", a)
			}
			if a := ask(t, network, at, withCookie(t, m.Copy(), cookie)); cookieOf(a) != cookie || a.Rcode != want.Rcode || brief(a.Answer) != brief(want.Answer) {
				t.Errorf("the cookie came back: got %v", a)
			}
			// No policy of this server demands a good one.
			if a := ask(t, network, at, withCookie(t, m.Copy(), testClientCookie+strings.Repeat("ab", 32))); len(cookieOf(a)) != 2*cookieSize || a.Rcode != want.Rcode {
				t.Errorf("another server's: got %v", a)
			}
			if after := [...]float64{count(cookieNew), count(cookieKnown), count(cookieUnknown)}; after != [...]float64{before[0] + 1, before[1] + 1, before[2] + 1} {
				t.Errorf("counted %v, then %v", before, after)
			}
		}
	}
}

func TestCookieWire(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	for length := range 45 {
		m := question("contoso.geo.example.net.", mdns.TypeA)
		a := exchangeMsg(t, at, withCookie(t, m, strings.Repeat("ab", length)))
		if length == 8 || length >= 16 && length <= 40 {
			if a.Rcode != 0 || len(a.Answer) == 0 || len(cookieOf(a)) != 2*cookieSize {
				t.Errorf("%d bytes: got %v", length, a)
			}
		} else if a.Rcode != mdns.RcodeFormatError || a.IsEdns0() == nil || len(a.IsEdns0().Option) > 0 {
			t.Errorf("%d bytes: got %v, want FORMERR with a bare OPT", length, a)
		}
	}
	// The first of several counts, also if the others are malformed.
	m := withCookie(t, withCookie(t, question("contoso.geo.example.net.", mdns.TypeA), testClientCookie), "00")
	if a := exchangeMsg(t, at, m); a.Rcode != 0 || !strings.HasPrefix(cookieOf(a), testClientCookie) {
		t.Errorf("two cookies: got %v", a)
	}
}

// A query without a question fetches a cookie, or asks whether the one at hand is good (RFC 7873, section 5.4).
func TestCookieWithoutQuestion(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	fetch := func(cookie string) *mdns.Msg {
		m := question(".", mdns.TypeA)
		m.Question = nil
		return exchangeMsg(t, at, withCookie(t, m, cookie))
	}
	a := fetch(testClientCookie)
	if a.Rcode != 0 || a.Authoritative || len(a.Question)+len(a.Answer)+len(a.Ns) > 0 || len(cookieOf(a)) != 2*cookieSize {
		t.Errorf("got %v", a)
	}
	if a := fetch(cookieOf(a)); a.Rcode != 0 || len(cookieOf(a)) != 2*cookieSize {
		t.Errorf("a good one: got %v", a)
	}
	if a := fetch(testClientCookie + strings.Repeat("ab", 16)); a.Rcode != mdns.RcodeBadCookie || len(cookieOf(a)) != 2*cookieSize {
		t.Errorf("a bad one: got %v", a)
	}
}

// Two servers with one secret know each other's cookies, also while a secret is replaced by the three steps of RFC 9018,
// section 5; one with a secret of its own does not.
func TestSecretRollover(t *testing.T) {
	t.Parallel()
	const a, b = "000102030405060708090a0b0c0d0e0f\n", "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff\n"
	path := [2]string{writeFile(t, a), writeFile(t, a)}
	var servers [2]*Server
	var at [2]netip.AddrPort
	for i := range servers {
		servers[i] = newServer(t, func(o *Options) { o.CookieSecret = path[i] })
		at[i] = serve(t, servers[i])
	}
	good := func(at netip.AddrPort, cookie string) bool {
		m := withCookie(t, question(".", mdns.TypeA), cookie)
		m.Question = nil
		return exchangeMsg(t, at, m).Rcode == 0
	}
	give := func(at netip.AddrPort) string {
		return cookieOf(exchangeMsg(t, at, withCookie(t, question("geo.example.net.", mdns.TypeSOA), testClientCookie)))
	}
	check := func(step string) {
		t.Helper()
		for i := range at {
			if !good(at[1-i], give(at[i])) {
				t.Errorf("%s: server %d does not know the cookies of %d", step, 1-i, i)
			}
		}
	}
	check("at first")
	early := give(at[0])
	for _, text := range []string{a + b, b + a, b} {
		for i := range servers {
			if err := os.WriteFile(path[i], []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := servers[i].Reload(); err != nil {
				t.Fatal(err)
			}
			check(text)
		}
		if want := text != b; good(at[0], early) != want {
			t.Errorf("%q: the cookie from before is good: %v, want %v", text, !want, want)
		}
	}
	if good(serve(t, newServer(t, nil)), give(at[0])) {
		t.Error("a server with a secret of its own knows the cookie")
	}
	// What cannot be used changes nothing.
	if err := os.WriteFile(path[0], []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := servers[0].Reload(); err == nil || !strings.Contains(err.Error(), "dns.cookies.secret") {
		t.Errorf("got %v", err)
	}
	check("after a bad file")
}

func FuzzSecrets(f *testing.F) {
	f.Add("# one\n000102030405060708090a0b0c0d0e0f\n")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseSecrets(strings.NewReader(text))
		if err == nil && (s.count < 1 || s.count > 2) {
			t.Fatalf("%d keys", s.count)
		}
	})
}
