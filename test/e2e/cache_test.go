package e2e

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	miekg "github.com/miekg/dns"

	"portolan/test/bed"
)

// worldwide is a registry that answers in every way that caches may mix up: whole countries of one answer, cells of a weight, a region
// without IPv6, and clients that get nothing.
const worldwide = `registries:
  - name: contoso
    home: westus
    policy: {replication: disabled}
    fences: {continent: {AF: [draining]}}
    orders: {country: {BR: [westeurope]}}
    replicas:
      - {region: westus, endpoint: "http://192.0.2.1", addresses: [192.0.2.1, "2001:db8::1"], health: {probe: none}}
      - {region: westeurope, endpoint: "http://192.0.2.2", addresses: [192.0.2.2], weight: 50, health: {probe: none}}
      - {region: southeastasia, endpoint: "http://192.0.2.3", addresses: [192.0.2.3, "2001:db8::3"], health: {probe: none}}
      - {region: draining, location: [0, 0], endpoint: "http://192.0.2.4", addresses: [192.0.2.4], routing: disabled, health: {probe: none}}
`

// TestCaches: clients behind the caches that are in use never get the answer that is meant for others, and are served from the cache.
func TestCaches(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	s.api, s.dns = bed.NewAddress(t, "127.0.0.1"), bed.NewAddress(t, "127.0.0.1")
	bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("portolan"), API: s.api, Config: fmt.Sprintf(`store: bolt:portolan.db
dns: {listen: ["%s"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}, contact: hostmaster@example.net, ttl: {min: 60s, max: 60s}}
api: {listen: "%s"}
topology: %s
`, s.dns, s.api, s.write("topology.yaml", worldwide))})

	random := rand.New(rand.NewPCG(11, 12))
	type client struct {
		subnet netip.Prefix
		kind   uint16
	}
	var clients []client
	for len(clients) < 400 {
		a := netip.AddrFrom4([4]byte{byte(1 + random.IntN(222)), byte(random.IntN(256)), byte(random.IntN(256)), 0})
		bits := 24
		if len(clients)%4 == 0 {
			a, bits = netip.AddrFrom16([16]byte{0x20 | byte(random.IntN(12)), byte(random.IntN(256)), byte(random.IntN(8)), byte(random.IntN(256)), 0, byte(random.IntN(256))}), 48
		}
		p, err := a.Prefix(bits)
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, client{p, []uint16{miekg.TypeA, miekg.TypeA, miekg.TypeAAAA}[random.IntN(3)]})
	}
	want := make(map[client]string)
	kinds := make(map[string]int)
	for _, c := range clients {
		got, err := addresses(t, s.dns, c.subnet, c.kind)
		if err != nil {
			t.Fatal(err)
		}
		want[c] = got
		kinds[got]++
	}
	if len(kinds) != 6 {
		t.Errorf("the clients get %v: want three regions over IPv4, two over IPv6, and nothing", kinds)
	}
	for _, kind := range []bed.CacheKind{bed.Unbound, bed.PowerDNSRecursor} {
		t.Run(string(kind), func(t *testing.T) {
			cache := bed.NewCache(t, bed.CacheConfig{Kind: kind, Zone: "geo.example.net", Server: s.dns})
			var before, first int
			for round := range 2 {
				before = s.queries()
				random.Shuffle(len(clients), func(i, j int) { clients[i], clients[j] = clients[j], clients[i] })
				// Those who get nothing come last: the recursor of PowerDNS keeps a negative answer for all its clients, and for a
				// second even one that is not to be kept.
				slices.SortStableFunc(clients, func(a, b client) int { return cmp.Compare(some(want[b]), some(want[a])) })
				for _, c := range clients {
					got, err := addresses(t, cache.Addr(), c.subnet, c.kind)
					for begin := time.Now(); err == nil && got == nothing && want[c] != nothing && kind == bed.PowerDNSRecursor && time.Since(begin) < 10*time.Second; {
						time.Sleep(50 * time.Millisecond)
						got, err = addresses(t, cache.Addr(), c.subnet, c.kind)
					}
					if err != nil {
						t.Fatal(err)
					}
					if got != want[c] {
						t.Fatalf("round %d: %v asks for %s and gets %s, want %s", round, c.subnet, miekg.TypeToString[c.kind], got, want[c])
					}
				}
				if round == 0 {
					first = s.queries() - before
				}
			}
			again := s.queries() - before
			t.Logf("%d clients made %d queries in the first round, %d in the second", len(clients), first, again)
			// Who gets nothing asks each time.
			if again*2 > first {
				t.Errorf("%d clients made %d queries in the first round and %d in the second: the answers are not kept", len(clients), first, again)
			}
		})
	}
}

// nothing is what stands for NODATA.
const nothing = "nothing"

func some(answer string) int {
	if answer == nothing {
		return 0
	}
	return 1
}

// addresses are what a client is told, in order.
func addresses(t *testing.T, server string, subnet netip.Prefix, kind uint16) (string, error) {
	t.Helper()
	q := new(miekg.Msg).SetQuestion(oneName+".", kind)
	q.SetEdns0(1232, false)
	option := &miekg.EDNS0_SUBNET{Code: miekg.EDNS0SUBNET, Family: 1, SourceNetmask: uint8(subnet.Bits()), Address: net.IP(subnet.Addr().AsSlice())}
	if subnet.Addr().Is6() {
		option.Family = 2
	}
	q.IsEdns0().Option = append(q.IsEdns0().Option, option)
	a, _, err := (&miekg.Client{Timeout: 5 * time.Second}).ExchangeContext(t.Context(), q, server)
	if err != nil {
		return "", err
	}
	if a.Rcode != miekg.RcodeSuccess {
		return "", fmt.Errorf("%v gets\n%v", subnet, a)
	}
	var list []string
	for _, rr := range a.Answer {
		switch rr := rr.(type) {
		case *miekg.A:
			list = append(list, rr.A.String())
		case *miekg.AAAA:
			list = append(list, rr.AAAA.String())
		}
	}
	if len(list) == 0 {
		return nothing, nil
	}
	slices.Sort(list)
	return strings.Join(list, " "), nil
}

// queries is how many queries the DNS server has had.
func (s *scene) queries() int {
	s.t.Helper()
	sum := 0
	for name, value := range s.scrape() {
		if strings.HasPrefix(name, "portolan_dns_queries_total{") {
			n, err := strconv.ParseFloat(value, 64)
			if err != nil {
				s.t.Fatalf("%s: %v", name, err)
			}
			sum += int(n)
		}
	}
	return sum
}
