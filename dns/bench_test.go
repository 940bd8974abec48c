package dns

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/topology"
)

// queries packs queries for contoso from n different /24s.
func queries(b *testing.B, n int) [][]byte {
	b.Helper()
	list := make([][]byte, n)
	for i := range list {
		m := ecs(question("contoso.geo.example.net.", mdns.TypeA), fmt.Sprintf("%d.%d.%d.0/24", 8+72*(i&1), i>>8&0xff, i&0xff))
		m.Id = uint16(i)
		raw, err := m.Pack()
		if err != nil {
			b.Fatal(err)
		}
		list[i] = raw
	}
	return list
}

func BenchmarkRespond(b *testing.B) {
	list := queries(b, 65536)
	w, out := newServer(b, nil).responder.worker(udp, 0), make([]byte, 0, ednsSize)
	from := netip.MustParseAddrPort("192.0.2.200:4444")
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if len(w.respond(out, list[i&0xffff], from)) == 0 {
			b.Fatal("no answer")
		}
	}
}

// BenchmarkUpdate compiles the zone of 1,000 registries of 8 replicas: what a verdict that changes costs at that size.
func BenchmarkUpdate(b *testing.B) {
	s := newServer(b, nil)
	snapshot := &topology.Snapshot{Changed: time.Unix(1_800_000_000, 0)}
	for i := range 1000 {
		r := &topology.Registry{Name: fmt.Sprintf("registry%04d", i), Home: "region0"}
		for k := range 8 {
			r.Replicas = append(r.Replicas, replica(fmt.Sprintf("region%d", k), west, fmt.Sprintf("10.%d.%d.%d", k, i>>8, i&0xff), fmt.Sprintf("2001:db8:%d::%x", k, i)))
		}
		snapshot.Registries = append(snapshot.Registries, r)
	}
	compiled := routerOf(snapshot)
	b.ReportAllocs()
	for b.Loop() {
		s.Update(snapshot, compiled, nil)
	}
}

// BenchmarkUpdateBesideStatic compiles a small zone beside 200,000 static records, which no verdict changes.
func BenchmarkUpdateBesideStatic(b *testing.B) {
	var static strings.Builder
	for i := range 200_000 {
		fmt.Fprintf(&static, "host%d A 10.%d.%d.%d\n", i, i>>16, i>>8&0xff, i&0xff)
	}
	s := newServer(b, func(o *Options) { o.StaticFile = writeFile(b, static.String()) })
	snapshot, conditions := testSnapshot(), testConditions()
	compiled := routerOf(snapshot).With(conditions)
	b.ReportAllocs()
	for b.Loop() {
		s.Update(snapshot, compiled, conditions)
	}
}

// BenchmarkUDP asks over loopback, with up to 16 queries under way on each of four sockets: few enough for any receive buffer.
func BenchmarkUDP(b *testing.B) {
	const sockets, window = 4, 16
	list := queries(b, 65536)
	at := serve(b, newServer(b, nil))
	var lost, left atomic.Int64
	left.Store(int64(b.N))
	b.ResetTimer()
	var clients sync.WaitGroup
	for k := range sockets {
		conn, err := net.Dial("udp", at.String())
		if err != nil {
			b.Fatal(err)
		}
		defer conn.Close()
		clients.Go(func() {
			buffer := make([]byte, 4096)
			query := make([]byte, 512)
			under := 0
			for n := k; ; n++ {
				more := left.Add(-1) >= 0
				if more {
					q := append(query[:0], list[n&0xffff]...)
					binary.BigEndian.PutUint16(q, uint16(n))
					if _, err := conn.Write(q); err != nil {
						b.Error(err)
						return
					}
					under++
				}
				for under >= window || !more && under > 0 {
					if under%window == 0 || !more {
						if err := conn.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
							b.Error(err)
							return
						}
					}
					if _, err := conn.Read(buffer); err != nil {
						lost.Add(int64(under))
						under = 0
						break
					}
					under--
				}
				if !more {
					return
				}
			}
		})
	}
	clients.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "answers/s")
	b.ReportMetric(float64(lost.Load()), "lost")
}
