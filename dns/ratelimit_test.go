package dns

import (
	"bytes"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"pgregory.net/rapid"
)

var limitEpoch = time.Unix(1_800_000_000, 0)

func TestRateLimitSettings(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		limit RateLimit
		good  bool
	}{
		{RateLimit{}, true},
		{RateLimit{ResponsesPerSecond: 10_000, Slip: 10, Exempt: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}, true},
		{RateLimit{ResponsesPerSecond: 10_001}, false},
		{RateLimit{ResponsesPerSecond: -1}, false},
		{RateLimit{Slip: 11}, false},
		{RateLimit{Slip: -1}, false},
		{RateLimit{Exempt: []netip.Prefix{{}}}, false},
	} {
		if err := c.limit.check(); (err == nil) != c.good {
			t.Errorf("%+v: %v", c.limit, err)
		}
	}
	if newLimiter(RateLimit{Slip: 2}, limitEpoch) != nil {
		t.Error("there is a limiter without a limit")
	}
}

// Whose responses are counted together, and whose are not at all.
func TestRateLimitNetworks(t *testing.T) {
	t.Parallel()
	exempt := []netip.Prefix{netip.MustParsePrefix("198.51.100.64/26"), netip.MustParsePrefix("2001:db8:7::/48"), netip.MustParsePrefix("::ffff:203.0.113.0/120")}
	for _, c := range []struct {
		first, second string
		kind          responseKind // of the second; the first is an answer
		want          verdict      // of the second, where the first took all
	}{
		{"192.0.2.1", "192.0.2.1", kindAnswer, limitDrop},
		{"192.0.2.1", "192.0.2.254", kindAnswer, limitDrop},
		{"192.0.2.1", "192.0.3.1", kindAnswer, limitSend},
		{"192.0.2.1", "192.0.2.1", kindEmpty, limitSend},
		{"192.0.2.1", "192.0.2.1", kindNoName, limitSend},
		{"192.0.2.1", "192.0.2.1", kindError, limitSend},
		{"2001:db8:1:2ff::1", "2001:db8:1:200:ffff::2", kindAnswer, limitDrop},
		{"2001:db8:1:2ff::1", "2001:db8:1:300::1", kindAnswer, limitSend},
		// The same bytes, but of another family.
		{"32.1.13.1", "2001:d00::1", kindAnswer, limitSend},
		{"127.0.0.1", "127.0.0.1", kindAnswer, limitSend},
		{"127.1.2.3", "127.1.2.3", kindAnswer, limitSend},
		{"::1", "::1", kindAnswer, limitSend},
		{"198.51.100.65", "198.51.100.65", kindAnswer, limitSend},
		{"198.51.100.63", "198.51.100.63", kindAnswer, limitDrop},
		// An exempt neighbour takes nothing from the others.
		{"198.51.100.65", "198.51.100.63", kindAnswer, limitSend},
		{"2001:db8:7:1::1", "2001:db8:7:1::1", kindAnswer, limitSend},
		{"203.0.113.7", "203.0.113.7", kindAnswer, limitSend},
	} {
		l := newLimiter(RateLimit{ResponsesPerSecond: 1, Exempt: exempt}, limitEpoch)
		if v := l.judge(netip.MustParseAddr(c.first), kindAnswer, limitEpoch); v != limitSend {
			t.Errorf("%s: the first is %d", c.first, v)
		}
		if v := l.judge(netip.MustParseAddr(c.second), c.kind, limitEpoch); v != c.want {
			t.Errorf("%s after %s, kind %d: got %d, want %d", c.second, c.first, c.kind, v, c.want)
		}
	}
}

// The limiter agrees with a model that keeps a number for each network and kind, whatever the rate, and whenever the clock of
// the accounts wraps.
func TestRateLimitModel(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		rate := rapid.IntRange(1, 200).Draw(t, "rate")
		l := newLimiter(RateLimit{ResponsesPerSecond: rate}, limitEpoch)
		now := limitEpoch.Add(time.Duration(rapid.SampledFrom([]uint64{0, timeMask - 1_000_000, timeMask, 5*timeMask - 17}).Draw(t, "start")) * time.Microsecond)
		interval := time.Second / time.Microsecond / time.Duration(rate) * time.Microsecond
		used := make(map[string]time.Time) // until when
		for range rapid.IntRange(1, 300).Draw(t, "steps") {
			now = now.Add(time.Duration(rapid.SampledFrom([]int{0, 0, 0, 1, 1000, 5000, 50_000, 1_000_000, 3_000_000}).Draw(t, "pause")) * time.Microsecond)
			client := netip.AddrFrom4([4]byte{192, 0, byte(rapid.IntRange(0, 3).Draw(t, "network")), byte(rapid.IntRange(0, 255).Draw(t, "host"))})
			kind := responseKind(rapid.IntRange(0, 3).Draw(t, "kind"))
			key := fmt.Sprint(netip.PrefixFrom(client, 24).Masked(), kind)
			until := used[key]
			if until.Before(now) {
				until = now
			}
			want := limitDrop
			if until = until.Add(interval); until.Sub(now) <= time.Second {
				want, used[key] = limitSend, until
			}
			if got := l.judge(client, kind, now); got != want {
				t.Fatalf("%s at %v: got %d, want %d", key, now.Sub(limitEpoch), got, want)
			}
		}
	})
}

// What a flood gets: a second's worth at once, and the rate from then on; of the rest, one in slip.
func TestRateLimitFlood(t *testing.T) {
	t.Parallel()
	const rate, each, seconds = 20, 1000, 10
	client := netip.MustParseAddr("192.0.2.1")
	for slip, most := range map[int][2]int{0: {0, 0}, 1: {9781, 9781}, 2: {4390, 5390}, 10: {678, 1278}} { // five standard deviations and more
		l := newLimiter(RateLimit{ResponsesPerSecond: rate, Slip: slip}, limitEpoch)
		var count [limitVerdicts]int
		for i := range each * seconds {
			count[l.judge(client, kindAnswer, limitEpoch.Add(time.Duration(i)*time.Second/each))]++
		}
		// The last of the intervals, 50 ms, has not passed at the end.
		if want := rate + rate*seconds - 1; count[limitSend] != want {
			t.Errorf("slip %d: %d were sent, want %d", slip, count[limitSend], want)
		}
		if count[limitSlip] < most[0] || count[limitSlip] > most[1] {
			t.Errorf("slip %d: %d slipped, want %v", slip, count[limitSlip], most)
		}
	}
}

// Floods in the name of many networks do not stop those from getting their first responses, nor others.
func TestRateLimitManyNetworks(t *testing.T) {
	t.Parallel()
	l := newLimiter(RateLimit{ResponsesPerSecond: 1}, limitEpoch)
	refused := 0
	for i := range 1 << 20 { // four times the accounts
		if l.judge(netip.AddrFrom4([4]byte{byte(10 + i>>16), byte(i >> 8), byte(i), 1}), kindAnswer, limitEpoch) != limitSend {
			refused++
		}
	}
	// One lookup in two million takes another's account for its own.
	if refused > 20 {
		t.Errorf("%d were refused", refused)
	}
}

// Processors that count the same network at the same time lose little. Run with the race detector.
func TestRateLimitConcurrently(t *testing.T) {
	t.Parallel()
	const rate, goroutines = 1000, 8
	l := newLimiter(RateLimit{ResponsesPerSecond: rate}, limitEpoch)
	client := netip.MustParseAddr("2001:db8::1")
	var sent atomic.Int64
	var all sync.WaitGroup
	for range goroutines {
		all.Go(func() {
			for range rate {
				if l.judge(client, kindAnswer, limitEpoch) == limitSend {
					sent.Add(1)
				}
			}
		})
	}
	all.Wait()
	// All may begin at once, each with an account of its own before it sees the others'.
	if n := sent.Load(); n < rate || n > 2*rate {
		t.Errorf("%d were sent, want %d", n, rate)
	}
}

// limited is a server with a limit of one response a second that has been used up by from's network, for every kind. Its clock
// stands still.
func limited(t testing.TB, slip int, from netip.AddrPort) *Server {
	t.Helper()
	s := newServer(t, func(o *Options) { o.RateLimit = RateLimit{ResponsesPerSecond: 1, Slip: slip} })
	s.responder.now = func() time.Time { return limitEpoch }
	s.responder.limiter.start = limitEpoch
	for kind := kindAnswer; kind <= kindError; kind++ {
		if s.responder.limiter.judge(from.Addr(), kind, limitEpoch) != limitSend {
			t.Fatal("the first was refused")
		}
	}
	return s
}

// What becomes of a response beyond the limit, of each kind.
func TestRateLimitedResponses(t *testing.T) {
	t.Parallel()
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for _, c := range []struct {
		name  string
		m     *mdns.Msg
		rcode int
		cut   bool
	}{
		{"an answer", question("contoso.geo.example.net.", mdns.TypeA), 0, true},
		{"an empty answer", question("www.geo.example.net.", mdns.TypeAAAA), 0, true},
		{"no such name", question("nothing.geo.example.net.", mdns.TypeA), mdns.RcodeNameError, true},
		{"a refusal", question("example.com.", mdns.TypeA), mdns.RcodeRefused, false},
		{"two questions", func() *mdns.Msg {
			m := question("geo.example.net.", mdns.TypeA)
			m.Question = append(m.Question, m.Question[0])
			return m
		}(), mdns.RcodeFormatError, false},
	} {
		m := withCookie(t, c.m, testClientCookie)
		s := limited(t, 0, from)
		if a := answerOf(t, s, m, from); a != nil {
			t.Errorf("%s: got %v, want none", c.name, a)
		}
		s = limited(t, 1, from)
		a := answerOf(t, s, m, from)
		if a == nil || a.Rcode != c.rcode || a.Truncated != c.cut || len(a.Answer)+len(a.Ns) > 0 || len(a.Extra) != 1 {
			t.Errorf("%s: got %v", c.name, a)
			continue
		}
		// The cookie that came with it is as good as a connection.
		good := c.m.Copy()
		good.Extra = nil
		withCookie(t, good, cookieOf(a))
		for range 3 {
			if a := answerOf(t, s, good, from); a == nil || a.Rcode != c.rcode || a.Truncated || c.cut && len(a.Answer)+len(a.Ns) == 0 {
				t.Errorf("%s with a good cookie: got %v", c.name, a)
			}
		}
		// For others it is worth nothing.
		other := netip.MustParseAddrPort("192.0.2.201:4444")
		if a := answerOf(t, s, good, other); a == nil || a.Truncated != c.cut {
			t.Errorf("%s with the cookie of another: got %v", c.name, a)
		}
	}
}

// Nothing but UDP is limited, and loopback is not, asked of the real server.
func TestRateLimitSpares(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) { o.RateLimit = RateLimit{ResponsesPerSecond: 1} })
	at := serve(t, s)
	for range 50 {
		for _, network := range []string{"udp", "tcp"} {
			if a := ask(t, network, at, question("contoso.geo.example.net.", mdns.TypeA)); len(a.Answer) != 2 {
				t.Errorf("got %v", a)
			}
		}
	}
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	raw, err := question("contoso.geo.example.net.", mdns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	w := limited(t, 0, from).responder.worker(tcp, 0)
	for range 50 {
		if len(w.respond(nil, raw, from)) == 0 {
			t.Fatal("no answer over TCP")
		}
	}
}

// What is dropped is no answer in any count, and is in its own.
func TestRateLimitMetrics(t *testing.T) {
	t.Parallel()
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	for slip, name := range []string{"dropped", "slipped"} {
		s := limited(t, slip, from)
		m := s.responder.metrics
		decided := func() (n float64) {
			for _, region := range []string{"", "westus", "westeurope"} {
				n += m.decision("contoso", region).sum()
			}
			return n
		}
		for range 5 {
			answerOf(t, s, question("contoso.geo.example.net.", mdns.TypeA), from)
		}
		want := float64(5 * slip)
		if q, d := m.queries[udp][typeIndex(mdns.TypeA)][0].sum(), decided(); q != want || d != want {
			t.Errorf("%s: %v answered, %v decided, want %v", name, q, d, want)
		}
		expect := bytes.NewBufferString(fmt.Sprintf(`# HELP portolan_dns_rate_limited_total UDP responses beyond the rate limit by what became of them.
# TYPE portolan_dns_rate_limited_total counter
portolan_dns_rate_limited_total{action="dropped"} %d
portolan_dns_rate_limited_total{action="slipped"} %d
`, 5-5*slip, 5*slip))
		if err := testutil.CollectAndCompare(m, expect, "portolan_dns_rate_limited_total"); err != nil {
			t.Error(err)
		}
	}
}

// BenchmarkRespondLimited is BenchmarkRespond with a rate limit that lets all through, and with one that lets nothing.
func BenchmarkRespondLimited(b *testing.B) {
	list := queries(b, 65536)
	for name, rate := range map[string]int{"under": 10_000, "over": 1} {
		b.Run(name, func(b *testing.B) {
			s := newServer(b, func(o *Options) { o.RateLimit = RateLimit{ResponsesPerSecond: rate} })
			w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				from := netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, byte(i >> 8), byte(i), 1}), 4444)
				if rate == 1 {
					from = netip.MustParseAddrPort("192.0.2.200:4444")
				}
				w.respond(out, list[i&0xffff], from)
			}
		})
	}
}

// BenchmarkRespondCookie is BenchmarkRespond with cookies: the client's alone, and one of this server.
func BenchmarkRespondCookie(b *testing.B) {
	s := newServer(b, nil)
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	contoso := func() *mdns.Msg { return ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24") }
	good := cookieOf(answerOf(b, s, withCookie(b, contoso(), testClientCookie), from))
	for name, cookie := range map[string]string{"new": testClientCookie, "known": good} {
		raw, err := withCookie(b, contoso(), cookie).Pack()
		if err != nil {
			b.Fatal(err)
		}
		b.Run(name, func(b *testing.B) {
			w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
			b.ReportAllocs()
			for b.Loop() {
				w.respond(out, raw, from)
			}
		})
	}
}
