package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/time/rate"

	"portolan/router"
	"portolan/test/bed"
)

func TestBusyPort(t *testing.T) {
	t.Parallel()
	// On addresses of their own: no connection of another test can hold the chosen port for the other transport.
	for _, network := range []string{"udp", "tcp"} {
		var busy netip.AddrPort
		if network == "udp" {
			c, err := net.ListenPacket("udp", "127.0.7.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			busy = c.LocalAddr().(*net.UDPAddr).AddrPort()
		} else {
			l, err := net.Listen("tcp", "127.0.7.2:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			busy = l.Addr().(*net.TCPAddr).AddrPort()
		}
		s := newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{netip.MustParseAddrPort("127.0.7.3:0"), busy} })
		err := s.Listen()
		if err == nil {
			t.Fatalf("%s: bound a busy port", network)
		}
		for _, want := range []string{busy.String(), strings.ToUpper(network), "another program has it", "ss -l"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %q is not in %q", network, want, err)
			}
		}
		if len(s.Addresses()) != 0 {
			t.Errorf("%s: bound %v all the same", network, s.Addresses())
		}
		if err := s.Serve(t.Context()); err == nil {
			t.Error("Serve without Listen")
		}
	}
}

// Two servers cannot share a port unnoticed.
func TestSecondServer(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, nil))
	if err := newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{at} }).Listen(); err == nil {
		t.Error("the second server bound the same port")
	}
}

func TestNoSuchAddress(t *testing.T) {
	t.Parallel()
	err := newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:0")} }).Listen()
	if err == nil || !strings.Contains(err.Error(), "no such address") {
		t.Errorf("got %v", err)
	}
}

// On wildcard sockets, of both families side by side, answers leave from the address that was asked: a connected socket
// takes no others.
func TestWildcardAnswersFromTheAddressAsked(t *testing.T) {
	t.Parallel()
	// A port that is free for both families.
	four := netip.MustParseAddrPort(bed.NewAddress(t, "0.0.0.0"))
	port := four.Port()
	serve(t, newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{four} }))
	six := newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{netip.AddrPortFrom(netip.IPv6Unspecified(), port)} })
	asked := []string{"127.0.0.1", "127.0.0.2", "127.9.8.7"}
	if loopback6(t) {
		serve(t, six)
		asked = append(asked, "::1")
	}
	for _, a := range asked {
		at := netip.AddrPortFrom(netip.MustParseAddr(a), port)
		for _, network := range []string{"udp", "tcp"} {
			if answer := ask(t, network, at, question("www.geo.example.net.", mdns.TypeA)); len(answer.Answer) != 3 {
				t.Errorf("%s over %s: %v", a, network, answer)
			}
		}
	}
}

// An IPv4 wildcard in its IPv6 form is one as well.
func TestWildcardMapped(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{netip.MustParseAddrPort("[::ffff:0.0.0.0]:0")} }))
	asked := netip.AddrPortFrom(netip.MustParseAddr("127.9.8.7"), at.Port())
	if answer := ask(t, "udp", asked, question("www.geo.example.net.", mdns.TypeA)); len(answer.Answer) != 3 {
		t.Errorf("got %v", answer)
	}
}

func loopback6(t *testing.T) bool {
	c, err := net.ListenPacket("udp6", "[::1]:0")
	if err != nil {
		t.Logf("IPv6 is left out: %v", err)
		return false
	}
	c.Close()
	return true
}

// frame puts messages into one TCP stream.
func frame(t testing.TB, messages ...*mdns.Msg) []byte {
	t.Helper()
	var stream []byte
	for _, m := range messages {
		raw, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		stream = binary.BigEndian.AppendUint16(stream, uint16(len(raw)))
		stream = append(stream, raw...)
	}
	return stream
}

func dial(t testing.TB, at netip.AddrPort) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}

func readFramed(conn net.Conn) (*mdns.Msg, error) {
	raw, err := readFrame(conn)
	if err != nil {
		return nil, err
	}
	m := new(mdns.Msg)
	return m, m.Unpack(raw)
}

func readFrame(conn net.Conn) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	raw := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(conn, raw)
	return raw, err
}

func TestTCPPipelining(t *testing.T) {
	t.Parallel()
	conn := dial(t, serve(t, newServer(t, nil)))
	var queries []*mdns.Msg
	for i := range 300 {
		m := question("www.geo.example.net.", mdns.TypeA)
		m.Id = uint16(i)
		queries = append(queries, m)
	}
	stream := frame(t, queries...)
	done := make(chan error, 1)
	go func() {
		// In pieces that heed no boundary.
		for piece := range slices.Chunk(stream, 1000) {
			if _, err := conn.Write(piece); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	for i := range queries {
		m, err := readFramed(conn)
		if err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if int(m.Id) != i || len(m.Answer) != 3 {
			t.Fatalf("answer %d: %v", i, m)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A query is answered though only a part of the next one has come, be it half of its length.
func TestTCPAnswersBeforeHalfAQuery(t *testing.T) {
	t.Parallel()
	at := serve(t, newServer(t, func(o *Options) { o.IdleTimeout = time.Hour }))
	query := frame(t, question("www.geo.example.net.", mdns.TypeA))
	for _, part := range []int{1, 2, 3, len(query) - 5} {
		conn := dial(t, at)
		stream := slices.Concat(query, query)
		if _, err := conn.Write(stream[:len(query)+part]); err != nil {
			t.Fatal(err)
		}
		if _, err := readFramed(conn); err != nil {
			t.Fatalf("behind which %d bytes came: %v", part, err)
		}
		if _, err := conn.Write(stream[len(query)+part:]); err != nil {
			t.Fatal(err)
		}
		if _, err := readFramed(conn); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTCPEndsWhatIsNoClient(t *testing.T) {
	t.Parallel()
	response := question("www.geo.example.net.", mdns.TypeA)
	response.Response = true
	for _, c := range []struct {
		name string
		idle time.Duration // far away where it is not what ends the connection
		send []byte
	}{
		{"silent", 50 * time.Millisecond, nil},
		{"half a query", 50 * time.Millisecond, []byte{0, 50, 1, 2, 3}},
		{"empty", time.Hour, []byte{0, 0}},
		{"a response", time.Hour, frame(t, response)},
	} {
		conn := dial(t, serve(t, newServer(t, func(o *Options) { o.IdleTimeout = c.idle })))
		if _, err := conn.Write(c.send); err != nil {
			t.Fatal(err)
		}
		if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: read %d bytes, %v; want the end", c.name, n, err)
		}
	}
}

// Beyond the limit the connection goes that has been idle for the longest, and none that is in the middle of a query.
func TestTCPLimit(t *testing.T) {
	t.Parallel()
	for name, limit := range map[string]func(*Options){
		"in all":      func(o *Options) { o.MaxConnections, o.MaxPerClient, o.IdleTimeout = 2, 8, time.Hour },
		"of a client": func(o *Options) { o.MaxConnections, o.MaxPerClient, o.IdleTimeout = 8, 2, time.Hour },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t, limit)
			server, at := acceptTCP(t, s)
			// settled waits until so many connections are open, and so many of them idle.
			settled := func(open, idle int) {
				t.Helper()
				until(t, fmt.Sprintf("%d connections are open and %d idle", open, idle), func() bool {
					server.mu.Lock()
					defer server.mu.Unlock()
					waiting := 0
					for _, since := range server.open {
						if !since.IsZero() {
							waiting++
						}
					}
					return len(server.open) == open && waiting == idle
				})
			}
			query := frame(t, question("www.geo.example.net.", mdns.TypeA))
			send := func(conn net.Conn, raw []byte) {
				t.Helper()
				if _, err := conn.Write(raw); err != nil {
					t.Fatal(err)
				}
			}
			answered := func(conn net.Conn) {
				t.Helper()
				if a, err := readFramed(conn); err != nil || len(a.Answer) != 3 {
					t.Fatalf("got %v, %v", a, err)
				}
			}
			closed := func(conn net.Conn) {
				t.Helper()
				if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Fatalf("the connection is not closed: %v", err)
				}
			}
			first, second := dial(t, at), dial(t, at)
			for _, conn := range []net.Conn{second, first} { // so that the second is idle for longer
				send(conn, query)
				answered(conn)
				settled(2, 2)
			}
			third := dial(t, at)
			send(third, query)
			answered(third)
			closed(second)
			settled(2, 2)
			// A whole query and half of another: once the first is answered, the other is under way.
			for _, conn := range []net.Conn{first, third} {
				send(conn, append(slices.Clone(query), query[:len(query)/2]...))
				answered(conn)
			}
			settled(2, 0)
			closed(dial(t, at))
			for _, conn := range []net.Conn{first, third} {
				send(conn, query[len(query)/2:])
				answered(conn)
			}
			// A place that is free again is given again.
			first.Close()
			settled(1, 1)
			fourth := dial(t, at)
			for _, conn := range []net.Conn{fourth, third} {
				send(conn, query)
				answered(conn)
			}
			if m := s.responder.metrics; m.evicted.Load() != 1 || m.refused.Load() != 1 {
				t.Errorf("%d evicted, %d refused, want one each", m.evicted.Load(), m.refused.Load())
			}
		})
	}
}

// A client that has too many connections loses one of its own, however long those of others have been idle.
func TestTCPLimitOfAClientTouchesNoOther(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) { o.MaxConnections, o.MaxPerClient, o.IdleTimeout = 8, 1, time.Hour })
	server, at := acceptTCP(t, s)
	from := func(local string) net.Conn {
		t.Helper()
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.MustParseAddrPort(local + ":0"))}
		conn, err := d.DialContext(t.Context(), "tcp", at.String())
		if err != nil {
			t.Skipf("this machine has one loopback address: %v", err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	open := func(n int) func() bool {
		return func() bool {
			server.mu.Lock()
			defer server.mu.Unlock()
			return len(server.open) == n
		}
	}
	other := from("127.0.0.2")
	until(t, "it is taken", open(1))
	old := from("127.0.0.1")
	until(t, "it is taken", open(2))
	if _, err := from("127.0.0.1").Write(frame(t, question("www.geo.example.net.", mdns.TypeA))); err != nil {
		t.Fatal(err)
	}
	if _, err := old.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the client's former connection: %v, want the end", err)
	}
	if _, err := other.Write(frame(t, question("www.geo.example.net.", mdns.TypeA))); err != nil {
		t.Fatal(err)
	}
	if a, err := readFramed(other); err != nil || len(a.Answer) != 3 {
		t.Errorf("the other client's: %v, %v", a, err)
	}
}

// acceptTCP serves TCP alone, until the test ends.
func acceptTCP(t *testing.T, s *Server) (*tcpServer, netip.AddrPort) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	server, ended := newTCPServer(s), make(chan struct{})
	go func() {
		defer close(ended)
		server.accept(context.Background(), l)
	}()
	t.Cleanup(func() {
		l.Close()
		server.drain()
		<-ended
		server.wait()
	})
	return server, l.Addr().(*net.TCPAddr).AddrPort()
}

// rounds is a context that ends when it was looked at for the n-th time.
type rounds struct {
	context.Context
	end  func()
	left int
}

func (r *rounds) Done() <-chan struct{} {
	if r.left--; r.left == 0 {
		r.end()
	}
	return r.Context.Done()
}

// What cannot be accepted, usually for want of descriptors, does not fill the log.
func TestTCPAcceptFails(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.WarnLevel)
	s := newServer(t, func(o *Options) { o.Logger = zap.New(core) })
	s.troubles = rate.Sometimes{First: 1}
	logs.TakeAll() // of what the zone cannot serve
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.SetDeadline(time.Unix(1, 0)); err != nil { // it fails at once, every time
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	newTCPServer(s).accept(&rounds{ctx, cancel, 3}, l)
	if n := logs.Len(); n != 1 {
		t.Errorf("%d entries in the log, want 1", n)
	}
}

// Shutdown ends idle connections at once, returns, and frees the ports.
func TestShutdown(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort(bed.NewAddress(t, "127.0.0.1"))
	s := newServer(t, func(o *Options) { o.Listen, o.IdleTimeout = []netip.AddrPort{at}, time.Hour })
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	conn := dial(t, at)
	if _, err := conn.Write(frame(t, question("www.geo.example.net.", mdns.TypeA))); err != nil {
		t.Fatal(err)
	}
	if _, err := readFramed(conn); err != nil {
		t.Fatal(err)
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("Serve did not return while a connection was idle")
	}
	if left := s.Addresses(); len(left) > 0 {
		t.Errorf("still bound: %v", left)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the connection is still open: %v", err)
	}
	// Not at the first try, perhaps: a process that another test starts has a copy of the sockets until it runs its program.
	next := newServer(t, func(o *Options) { o.Listen = []netip.AddrPort{at} })
	until(t, "the ports are free", func() bool { return next.Listen() == nil })
	run(t, next)
	if answer := ask(t, "udp", at, question("www.geo.example.net.", mdns.TypeA)); len(answer.Answer) != 3 {
		t.Errorf("the next server: %v", answer)
	}
}

// A client that asks and does not read holds nothing up.
func TestShutdownDespiteASlowReader(t *testing.T) {
	t.Parallel()
	s := newServer(t, func(o *Options) { o.IdleTimeout = time.Hour })
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	conn := dial(t, s.Addresses()[0])
	queries := bytes.Repeat(frame(t, question("www.geo.example.net.", mdns.TypeA)), 1000)
	for { // until no more is taken, because no more is read there
		if err := conn.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(queries); errors.Is(err, os.ErrDeadlineExceeded) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(patience):
		t.Fatal("Serve did not return while a client did not read")
	}
}

// Addresses may be asked for while the server starts and stops.
func TestAddressesMeanwhile(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	var asking sync.WaitGroup
	var stop atomic.Bool
	asking.Go(func() {
		for !stop.Load() {
			s.Addresses()
		}
	})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Serve(ctx); err != nil {
		t.Fatal(err)
	}
	stop.Store(true)
	asking.Wait()
}

// A fault that a query finds costs that query its answer, and the others nothing.
func TestSurvives(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	at := serve(t, s)
	z := *s.responder.zone.Load()
	z.nodes = maps.Clone(z.nodes)
	z.nodes["\x06broken"] = &node{dynamic: &dynamic{varies: [3]bool{true, true, true}}} // without a registry
	s.responder.zone.Store(&z)
	broken := question("broken.geo.example.net.", mdns.TypeA)
	raw, err := broken.Pack()
	if err != nil {
		t.Fatal(err)
	}
	faults := &s.responder.metrics.dropped
	for i := range 2 * runtime.GOMAXPROCS(0) { // more than there are to answer
		if _, err := dialUDP(t, at).Write(raw); err != nil {
			t.Fatal(err)
		}
		until(t, "the fault is found", func() bool { return faults[udp][dropInternal].sum() == float64(i+1) })
	}
	conn := dial(t, at)
	if _, err := conn.Write(frame(t, broken)); err != nil {
		t.Fatal(err)
	}
	if _, err := readFramed(conn); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("over TCP: %v, want the end", err)
	}
	for _, network := range []string{"udp", "tcp"} {
		if answer := ask(t, network, at, question("www.geo.example.net.", mdns.TypeA)); len(answer.Answer) != 3 {
			t.Errorf("afterwards over %s: %v", network, answer)
		}
	}
}

// While zones are swapped under load, every query gets the answer of one or the other.
func TestSwapUnderLoad(t *testing.T) {
	t.Parallel()
	s := newServer(t, nil)
	at := serve(t, s)
	snapshot := testSnapshot()
	swap := func(health router.Health) {
		conditions := router.Conditions{key("contoso", "westus"): {Health: health, Settled: true}}
		s.Update(snapshot, routerOf(snapshot).With(conditions), conditions)
	}
	swap(router.Healthy)
	var stop atomic.Bool
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for !stop.Load() {
			swap(router.Unhealthy)
			swap(router.Healthy)
		}
	})
	seen := make(map[string]int)
	for n := 0; n < 200 || len(seen) < 2 && n < 20000; n++ {
		seen[brief(ask(t, "udp", at, ecs(question("contoso.geo.example.net.", mdns.TypeA), "8.8.8.0/24")).Answer)]++
	}
	stop.Store(true)
	swapping.Wait()
	for answer := range seen {
		if answer != "A 198.51.100.1 ttl=60" && answer != "A 192.0.2.1 ttl=60; A 192.0.2.2 ttl=60; A 192.0.2.3 ttl=60" {
			t.Errorf("a mixed answer: %q", answer)
		}
	}
	if len(seen) != 2 {
		t.Errorf("seen %v", seen)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	s := newServer(t, func(o *Options) { o.Registerer = registry })
	at := serve(t, s)
	for range 3 {
		ask(t, "udp", at, ecs(question("contoso.geo.example.net.", mdns.TypeA), "80.1.2.0/24"))
	}
	ask(t, "tcp", at, question("nothing.geo.example.net.", mdns.TypeAAAA))
	ask(t, "udp", at, question("tailwind.geo.example.net.", mdns.TypeA))
	old := question("contoso.geo.example.net.", mdns.TypeA)
	old.SetEdns0(1232, false)
	old.IsEdns0().SetVersion(1)
	ask(t, "udp", at, old)
	if _, err := dialUDP(t, at).Write([]byte("short")); err != nil {
		t.Fatal(err)
	}
	until(t, "it is dropped", func() bool { return s.responder.metrics.dropped[udp][dropShort].sum() == 1 })
	// A counter does not go back when a zone is compiled anew.
	snapshot := testSnapshot()
	s.Update(snapshot, routerOf(snapshot), nil)
	want := `
# HELP portolan_dns_decisions_total Answers at registries' names by the region they lead to; an empty region is an answer without one.
# TYPE portolan_dns_decisions_total counter
portolan_dns_decisions_total{region="",registry="adatum"} 0
portolan_dns_decisions_total{region="",registry="contoso"} 0
portolan_dns_decisions_total{region="",registry="empty"} 0
portolan_dns_decisions_total{region="",registry="fabrikam"} 0
portolan_dns_decisions_total{region="",registry="tailwind"} 1
portolan_dns_decisions_total{region="westeurope",registry="contoso"} 3
portolan_dns_decisions_total{region="westeurope",registry="fabrikam"} 0
portolan_dns_decisions_total{region="westus",registry="adatum"} 0
portolan_dns_decisions_total{region="westus",registry="contoso"} 0
portolan_dns_decisions_total{region="westus",registry="fabrikam"} 0
portolan_dns_decisions_total{region="westus",registry="tailwind"} 0
# HELP portolan_dns_dropped_total Packets that got no answer.
# TYPE portolan_dns_dropped_total counter
portolan_dns_dropped_total{reason="internal",transport="tcp"} 0
portolan_dns_dropped_total{reason="internal",transport="udp"} 0
portolan_dns_dropped_total{reason="response",transport="tcp"} 0
portolan_dns_dropped_total{reason="response",transport="udp"} 0
portolan_dns_dropped_total{reason="short",transport="tcp"} 0
portolan_dns_dropped_total{reason="short",transport="udp"} 1
# HELP portolan_dns_queries_total Queries answered.
# TYPE portolan_dns_queries_total counter
portolan_dns_queries_total{rcode="BADVERS",transport="udp",type="A"} 1
portolan_dns_queries_total{rcode="NOERROR",transport="udp",type="A"} 4
portolan_dns_queries_total{rcode="NXDOMAIN",transport="tcp",type="AAAA"} 1
# HELP portolan_dns_zone_serial Serial of the zone that is served; 0 before the first.
# TYPE portolan_dns_zone_serial gauge
portolan_dns_zone_serial 1.8e+09
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want),
		"portolan_dns_decisions_total", "portolan_dns_dropped_total", "portolan_dns_queries_total", "portolan_dns_zone_serial"); err != nil {
		t.Error(err)
	}
}

// dig is the client that operators use.
func TestDig(t *testing.T) {
	t.Parallel()
	dig, err := exec.LookPath("dig")
	if err != nil {
		t.Fatal("dig is not installed: \"make system\" installs it")
	}
	at := serve(t, newServer(t, nil))
	for _, c := range []struct {
		arguments string
		want      []string
	}{
		{"+subnet=80.1.2.3/24 contoso.geo.example.net A", []string{"status: NOERROR", "flags: qr aa", "198.51.100.1", "CLIENT-SUBNET: 80.1.2.0/24/8"}},
		{"+subnet=0 contoso.geo.example.net AAAA", []string{"status: NOERROR", "2001:db8::2", "CLIENT-SUBNET: 0.0.0.0/0/0"}},
		{"+subnet=2a00:1::/56 contoso.geo.example.net A", []string{"198.51.100.1", "CLIENT-SUBNET: 2a00:1::/56/16"}},
		{"+tcp fabrikam.geo.example.net HTTPS", []string{"CNAME", "registry.us.fabrikam.example."}},
		{"+cookie +nsid whoami.contoso.geo.example.net TXT", []string{"resolver=127.0.0.1", "transport=udp", "region=westus"}},
		{"+noedns nothing.geo.example.net", []string{"status: NXDOMAIN", `host\.master.example.net.`}},
		{"example.org", []string{"status: REFUSED", "EDE: 20"}},
		{"+edns=1 +noednsneg geo.example.net SOA", []string{"status: BADVERS"}},
		{"+opcode=15 +header-only +noedns", []string{"status: NOTIMP"}},
		{"AXFR geo.example.net", []string{"Transfer failed"}},
		{"geo.example.net ANY", []string{"RFC8482"}},
	} {
		t.Run(c.arguments, func(t *testing.T) {
			t.Parallel()
			arguments := append([]string{"@" + at.Addr().String(), "-p", fmt.Sprint(at.Port()), "+norecurse", "+time=30", "+tries=1"}, strings.Fields(c.arguments)...)
			out, err := exec.CommandContext(t.Context(), dig, arguments...).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for _, want := range c.want {
				if !bytes.Contains(out, []byte(want)) {
					t.Errorf("%q is not in\n%s", want, out)
				}
			}
			if bytes.Contains(out, []byte("WARNING")) || bytes.Contains(out, []byte("malformed")) {
				t.Errorf("dig complains:\n%s", out)
			}
		})
	}
}
