package dns

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"
	"go.uber.org/zap"
)

// sampled is a server that records to the file returned.
func sampled(t *testing.T, rate float64) (*Server, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "clients.txt")
	return newServer(t, func(o *Options) { o.Sample = Sample{File: file, Rate: rate} }), file
}

// record writes down what is in the queue.
func record(t *testing.T, s *Server) {
	t.Helper()
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	s.responder.sampler.run(ended)
}

func TestSample(t *testing.T) {
	t.Parallel()
	s, file := sampled(t, 1)
	w := s.responder.worker(udp, 0)
	ask := func(m *mdns.Msg, from string) {
		raw, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		w.respond(nil, raw, netip.MustParseAddrPort(from))
	}
	a := func() *mdns.Msg { return question("contoso.geo.example.net.", mdns.TypeA) }
	ask(a(), "80.1.2.3:53")
	ask(a(), "[::ffff:80.1.2.200]:53")
	ask(ecs(a(), "80.7.8.9/32"), "8.8.8.8:53")
	ask(ecs(a(), "80.7.8.0/24"), "8.8.8.8:53")
	ask(ecs(a(), "80.64.0.0/10"), "8.8.8.8:53")
	ask(ecs(a(), "10.1.2.0/24"), "8.8.8.8:53") // private: the resolver stands for it
	ask(ecs(question("contoso.geo.example.net.", mdns.TypeAAAA), "2a00:1:2:3::/64"), "8.8.8.8:53")
	ask(question("westus.contoso.geo.example.net.", mdns.TypeA), "80.9.9.9:53") // decides nothing
	ask(question("contoso.geo.example.net.", mdns.TypeMX), "80.9.9.9:53")
	ask(question("nothing.geo.example.net.", mdns.TypeA), "80.9.9.9:53")
	record(t, s)
	want := "80.7.8.0/24 2\n80.64.0.0/10 1\n2a00:1:2::/48 1\n8.8.8.0 1\n80.1.2.0 2\n"
	text, err := os.ReadFile(file)
	if err != nil || string(text) != want {
		t.Fatalf("recorded %q, %v; want %q", text, err, want)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v", info.Mode(), err)
	}
	// A new process counts on.
	again := newServer(t, func(o *Options) { o.Sample = Sample{File: file, Rate: 1} })
	w = again.responder.worker(udp, 0)
	ask(a(), "80.1.2.3:53")
	record(t, again)
	text, _ = os.ReadFile(file)
	if want := strings.Replace(want, "80.1.2.0 2", "80.1.2.0 3", 1); string(text) != want {
		t.Errorf("counted on: %q, want %q", text, want)
	}
	if left, _ := filepath.Glob(file + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Serve owns the goroutine that writes.
func TestSampleServed(t *testing.T) {
	t.Parallel()
	s, file := sampled(t, 1)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	at := s.Addresses()[0].String()
	go func() { ended <- s.Serve(ctx) }()
	if _, _, err := new(mdns.Client).Exchange(ecs(question("contoso.geo.example.net.", mdns.TypeA), "80.7.8.0/24"), at); err != nil {
		t.Error(err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "80.7.8.0/24 1\n" {
		t.Errorf("recorded %q, %v", text, err)
	}
}

// At rate 1 a full queue loses clients; nothing waits.
func TestSampleLoses(t *testing.T) {
	t.Parallel()
	s, _ := sampled(t, 1)
	w, from := s.responder.worker(udp, 0), netip.MustParseAddrPort("192.0.2.200:4444")
	raw, err := question("contoso.geo.example.net.", mdns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	for range sampleQueue + 10 {
		w.respond(nil, raw, from)
	}
	if n := s.responder.sampler.lost.Load(); n != 10 {
		t.Errorf("%d were lost, want 10", n)
	}
}

// Not parallel: allocations are counted.
func TestSampleRate(t *testing.T) {
	s, _ := sampled(t, 0.1)
	w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
	raw, err := question("contoso.geo.example.net.", mdns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	const n = 20000
	for range n {
		w.respond(out, raw, netip.MustParseAddrPort("192.0.2.200:4444"))
	}
	if got := len(s.responder.sampler.queue); got < n/10-300 || got > n/10+300 { // seven standard deviations
		t.Errorf("%d of %d were recorded at a rate of a tenth", got, n)
	}
	if allocations := testing.AllocsPerRun(1000, func() { w.respond(out, raw, netip.MustParseAddrPort("192.0.2.200:4444")) }); allocations > 0 {
		t.Errorf("a query costs %v allocations", allocations)
	}
}

func TestSampleSettings(t *testing.T) {
	t.Parallel()
	for _, o := range []Sample{{File: filepath.Join(t.TempDir(), "f"), Rate: 1.5}, {File: filepath.Join(t.TempDir(), "f")}, {File: "/nowhere/at/all/f", Rate: 1}} {
		if _, err := newSampler(o, zap.NewNop()); err == nil {
			t.Errorf("%v was taken", o)
		}
	}
	if s, err := newSampler(Sample{Rate: 0.01}, zap.NewNop()); s != nil || err != nil {
		t.Errorf("without a file there is %v, %v", s, err)
	}
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("something else\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := newSampler(Sample{File: file, Rate: 1}, zap.NewNop()); err == nil || !strings.Contains(err.Error(), "f:1:") {
		t.Errorf("something else would be overwritten: %v", err)
	}
}

// BenchmarkRespondSampled is BenchmarkRespond with one query of a hundred recorded.
func BenchmarkRespondSampled(b *testing.B) {
	list := queries(b, 65536)
	s := newServer(b, func(o *Options) { o.Sample = Sample{File: filepath.Join(b.TempDir(), "f"), Rate: 0.01} })
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); s.responder.sampler.run(ctx) }()
	w, out := s.responder.worker(udp, 0), make([]byte, 0, ednsSize)
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if len(w.respond(out, list[i&0xffff], from)) == 0 {
			b.Fatal("no answer")
		}
	}
	stop()
	<-ended
}
