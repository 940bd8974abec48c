package dns

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"

	"portolan/router"
	"portolan/router/ranges"
	"portolan/topology"
)

// places is a small world: 8/8 and 2600::/16 are in America, 80/8 and 2a00::/16 in Europe, the rest nowhere.
type places struct{}

func (places) Locate(a netip.Addr) router.Place {
	for _, p := range world {
		if p.Network.Contains(a) {
			return p
		}
	}
	return router.Place{Network: netip.PrefixFrom(a, a.BitLen())}
}

func (places) Borders(is6 bool, visit func(netip.Addr, int, *router.Place) bool) error {
	from, number := netip.IPv4Unspecified(), 0
	if is6 {
		from = netip.IPv6Unspecified()
	}
	visit(from, router.NoPlace, nil)
	for _, p := range world {
		if p.Network.Addr().Is6() != is6 {
			continue
		}
		place := p
		visit(p.Network.Addr(), number, &place)
		visit(ranges.Last(p.Network).Next(), router.NoPlace, nil)
		number++
	}
	return nil
}

// routerOf is the router of a snapshot in that world.
func routerOf(s *topology.Snapshot) *router.Router {
	charts, err := router.Chart(context.Background(), s, router.Sources{Places: places{}, Digest: "ba98765432100"}, nil)
	if err != nil {
		panic(err) // the world is in memory
	}
	return router.New(s, charts)
}

var world = []router.Place{
	{Located: true, Coordinates: topology.Coordinates{Latitude: 37, Longitude: -122}, Country: "US", Continent: "NA", Network: netip.MustParsePrefix("8.0.0.0/8"), Source: "test"},
	{Located: true, Coordinates: topology.Coordinates{Latitude: 37, Longitude: -122}, Country: "US", Continent: "NA", Network: netip.MustParsePrefix("2600::/16"), Source: "test"},
	{Located: true, Coordinates: topology.Coordinates{Latitude: 52, Longitude: 5}, Country: "NL", Continent: "EU", Network: netip.MustParsePrefix("80.0.0.0/8"), Source: "test"},
	{Located: true, Coordinates: topology.Coordinates{Latitude: 52, Longitude: 5}, Country: "NL", Continent: "EU", Network: netip.MustParsePrefix("2a00::/16"), Source: "test"},
}

var (
	west   = topology.Coordinates{Latitude: 37.78, Longitude: -122.42}
	europe = topology.Coordinates{Latitude: 52.37, Longitude: 4.90}
)

func replica(region string, at topology.Coordinates, addresses ...string) *topology.Replica {
	r := &topology.Replica{Region: region, Endpoint: &url.URL{Scheme: "https", Host: region + ".internal"}, Location: at, Weight: 100, Routing: true}
	for _, a := range addresses {
		if addr, err := netip.ParseAddr(a); err == nil {
			r.Addresses = append(r.Addresses, addr)
		} else {
			r.Hostname = a
		}
	}
	return r
}

// testSnapshot has one registry of each kind.
func testSnapshot() *topology.Snapshot {
	return &topology.Snapshot{Digest: "0123456789abcdef", Changed: time.Unix(1_800_000_000, 0), Registries: []*topology.Registry{
		{Name: "adatum", Home: "westus", Policy: topology.Policy{AllDown: topology.AllDown{Mode: topology.AllDownCNAME, Target: "sorry.example.org."}},
			Replicas: []*topology.Replica{replica("westus", west, "192.0.2.31")}},
		{Name: "contoso", Home: "westus", Replicas: []*topology.Replica{
			replica("westeurope", europe, "198.51.100.1"),
			replica("westus", west, "192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2"),
		}},
		{Name: "empty", Home: "westus"},
		{Name: "fabrikam", Home: "westus", Replicas: []*topology.Replica{
			replica("westeurope", europe, "registry.eu.fabrikam.example."),
			replica("westus", west, "registry.us.fabrikam.example."),
		}},
		{Name: "ns1", Home: "westus", Replicas: []*topology.Replica{replica("westus", west, "192.0.2.99")}},
		{Name: "tailwind", Home: "westus", Policy: topology.Policy{AllDown: topology.AllDown{Mode: topology.AllDownNone}},
			Replicas: []*topology.Replica{replica("westus", west, "192.0.2.41")}},
	}}
}

func key(registry, region string) router.ReplicaKey {
	return router.ReplicaKey{Registry: registry, Region: region}
}

// testConditions: all well, but adatum and tailwind are down, one address of contoso's westus is dead, and contoso's
// westeurope is not settled.
func testConditions() router.Conditions {
	return router.Conditions{
		key("adatum", "westus"):      {Health: router.Unhealthy, Settled: true},
		key("contoso", "westus"):     {Health: router.Healthy, Settled: true, Down: []netip.Addr{netip.MustParseAddr("192.0.2.3")}},
		key("contoso", "westeurope"): {Health: router.Healthy, Settled: false},
		key("fabrikam", "westus"):    {Health: router.Healthy, Settled: true},
		key("tailwind", "westus"):    {Health: router.Unhealthy, Settled: true},
	}
}

const testStatic = `
$TTL 300
@            IN TXT  "v=spf1 -all"
@            IN CAA  0 issue "ca.example"
www          IN A    192.0.2.80
www          IN A    192.0.2.81
www      600 IN A    192.0.2.82
alias        IN CNAME www
mail         IN MX   10 mx.example.org.
_x._tcp.srv  IN SRV  0 5 443 www
*.wild       IN TXT  "wild"
*.wild       IN A    192.0.2.90
host.wild    IN TXT  "host"
deep.sub.wild IN TXT "deep"
*.cwild      IN CNAME www
contoso      IN CAA  0 issue "ca.example"
contoso      IN A    203.0.113.1
fabrikam     IN CAA  0 issue "ca.example"
`

func testOptions() Options {
	return Options{
		Zone:        "geo.example.net",
		Nameservers: map[string][]netip.Addr{"ns1": {netip.MustParseAddr("192.0.2.53"), netip.MustParseAddr("2001:db8::53")}, "ns.example.org.": nil},
		Contact:     "host.master@example.net",
		Listen:      []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:0")},
		Registerer:  prometheus.NewRegistry(),
	}
}

// newServer makes a server of the test's zone that is not bound.
func newServer(t testing.TB, change func(*Options)) *Server {
	t.Helper()
	o := testOptions()
	o.StaticFile = writeFile(t, testStatic)
	if change != nil {
		change(&o)
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	snapshot, conditions := testSnapshot(), testConditions()
	s.Update(snapshot, routerOf(snapshot).With(conditions), conditions)
	return s
}

// serve binds and runs s until the test ends.
func serve(t testing.TB, s *Server) netip.AddrPort {
	t.Helper()
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	return run(t, s)
}

// run runs s, which is bound, until the test ends.
func run(t testing.TB, s *Server) netip.AddrPort {
	t.Helper()
	at := s.Addresses()[0]
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return at
}

// patience is how long tests wait for what must happen, however busy the machine is.
const patience = 2 * time.Minute

// ask sends m over a real socket and returns the answer, decoded.
func ask(t testing.TB, network string, at netip.AddrPort, m *mdns.Msg) *mdns.Msg {
	t.Helper()
	c := mdns.Client{Net: network, Timeout: patience}
	if o := m.IsEdns0(); o != nil {
		c.UDPSize = max(o.UDPSize(), 512)
	}
	answer, _, err := c.Exchange(m, at.String())
	if err != nil {
		t.Fatalf("asking %v over %s: %v", m.Question, network, err)
	}
	return answer
}

// exchange sends raw bytes over UDP and returns the answer.
func exchange(t testing.TB, at netip.AddrPort, raw []byte) []byte {
	t.Helper()
	conn := dialUDP(t, at)
	if _, err := conn.Write(raw); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 65535)
	n, err := conn.Read(buffer)
	if err != nil {
		t.Fatalf("no answer to %x: %v", raw, err)
	}
	return buffer[:n]
}

// dropped sends raw bytes over UDP, waits until s has dropped them for that reason, and checks that no answer to them comes
// before the one to a query that follows.
func dropped(t testing.TB, s *Server, at netip.AddrPort, raw []byte, reason int) {
	t.Helper()
	if answer := s.responder.worker(udp, 0).respond(nil, raw, at); len(answer) > 0 {
		t.Errorf("%x was answered: %x", raw, answer)
	}
	count := &s.responder.metrics.dropped[udp][reason]
	before := count.sum()
	conn := dialUDP(t, at)
	if _, err := conn.Write(raw); err != nil {
		t.Fatal(err)
	}
	until(t, "the packet is dropped", func() bool { return count.sum() > before })
	m := question("geo.example.net.", mdns.TypeSOA)
	next, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(next); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 65535)
	n, err := conn.Read(buffer)
	if err != nil {
		t.Fatal(err)
	}
	a := new(mdns.Msg)
	if err := a.Unpack(buffer[:n]); err != nil || a.Id != m.Id || len(a.Answer) != 1 {
		t.Errorf("%x was answered: %x", raw, buffer[:n])
	}
}

func dialUDP(t testing.TB, at netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := net.Dial("udp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

// until waits for something to come true.
func until(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func question(name string, qtype uint16) *mdns.Msg {
	m := new(mdns.Msg)
	m.SetQuestion(name, qtype)
	m.RecursionDesired = false
	return m
}

// ecs adds the option to m.
func ecs(m *mdns.Msg, subnet string) *mdns.Msg {
	p := netip.MustParsePrefix(subnet)
	o := m.IsEdns0()
	if o == nil {
		m.SetEdns0(1232, false)
		o = m.IsEdns0()
	}
	family := uint16(1)
	if p.Addr().Is6() {
		family = 2
	}
	o.Option = append(o.Option, &mdns.EDNS0_SUBNET{Code: mdns.EDNS0SUBNET, Family: family, SourceNetmask: uint8(p.Bits()), Address: p.Addr().AsSlice()})
	return m
}
