//go:build linux

package main

import (
	"net"
	"net/netip"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

func TestQueries(t *testing.T) {
	t.Parallel()
	list := queries(t)
	seen := make(map[string]bool)
	for i, raw := range list {
		m := new(mdns.Msg)
		if err := m.Unpack(raw); err != nil {
			t.Fatal(err)
		}
		subnet := m.IsEdns0().Option[0].(*mdns.EDNS0_SUBNET)
		if int(m.Id) != i || m.Question[0].Name != oneName || subnet.SourceNetmask != 24 || seen[subnet.Address.String()] {
			t.Fatalf("query %d is %v", i, m)
		}
		seen[subnet.Address.String()] = true
	}
	if len(seen) != subnets {
		t.Errorf("%d different subnets, want %d", len(seen), subnets)
	}
}

// TestGenerator loads a server that answers well, drops every tenth query for the first time, or gives answers that are none.
func TestGenerator(t *testing.T) {
	t.Parallel()
	none := func(m *mdns.Msg) { m.Answer = nil }
	tests := []struct {
		name        string
		spoil       func(*mdns.Msg)
		drop        bool
		wrong, lost bool
	}{
		{name: "good"},
		{name: "drops", drop: true, lost: true},
		{name: "no record", spoil: none, wrong: true},
		{name: "another region", spoil: func(m *mdns.Msg) { m.Answer[0].(*mdns.A).A = net.IPv4(192, 0, 2, 99) }, wrong: true},
		{name: "refused", spoil: func(m *mdns.Msg) { m.Rcode = mdns.RcodeRefused }, wrong: true},
	}
	list := queries(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			g, err := newGenerator(serve(t, test.spoil, test.drop), list, true)
			if err != nil {
				t.Fatal(err)
			}
			defer g.close()
			for _, load := range []func() (result, error){
				func() (result, error) { return g.closed(300*time.Millisecond, 32) },
				func() (result, error) { return g.open(300*time.Millisecond, 2000, nil) },
			} {
				r, err := load()
				if err != nil {
					t.Fatal(err)
				}
				if r.answers == 0 || (r.wrong == r.answers) != test.wrong || r.wrong > 0 != test.wrong || test.lost && r.lost == 0 {
					t.Errorf("%d answers, %d of them wrong, %d lost; want wrong %v, lost %v", r.answers, r.wrong, r.lost, test.wrong, test.lost)
				}
				if g.flying != 0 {
					t.Errorf("%d queries are under way after the end", g.flying)
				}
			}
		})
	}
}

// Of a flood half is no query, and the other half asks for names that nobody asked for before.
func TestJunk(t *testing.T) {
	t.Parallel()
	list, err := makeJunk()
	if err != nil {
		t.Fatal(err)
	}
	questions, good := map[string]bool{}, 0
	for _, raw := range list {
		m := new(mdns.Msg)
		switch err := m.Unpack(raw); {
		case err != nil || m.Response || len(m.Question) != 1:
		case m.Question[0].Name == oneName:
			good++
		default:
			questions[m.Question[0].Name] = true
		}
	}
	if len(questions) < junk*9/20 || len(questions) > junk*11/20 || good > junk/20 {
		t.Errorf("of %d packets %d ask for names of their own, and %d are good queries", len(list), len(questions), good)
	}
}

func TestFigures(t *testing.T) {
	t.Parallel()
	if m := median([]float64{5, 1, 3}); m != 3 {
		t.Errorf("the median of 1, 3, 5 is %v", m)
	}
	if m := median([]float64{4, 1, 2, 3}); m != 2.5 {
		t.Errorf("the median of 1 to 4 is %v", m)
	}
	list := []int64{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}
	if p50, p99 := quantile(list, 0.5), quantile(list, 0.99); p50 != 6 || p99 != 10 {
		t.Errorf("p50 %d, p99 %d; want 6 and 10", p50, p99)
	}
}

func queries(t *testing.T) [][]byte {
	t.Helper()
	list, err := makeQueries(oneName)
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// serve answers as Portolan does, until the test ends.
func serve(t *testing.T, spoil func(*mdns.Msg), drop bool) netip.AddrPort {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { conn.Close(); <-done })
	go func() {
		defer close(done)
		buffer := make([]byte, 4096)
		for n := 1; ; n++ {
			length, from, err := conn.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			if drop && n%10 == 0 {
				continue
			}
			m := new(mdns.Msg)
			if err := m.Unpack(buffer[:length]); err != nil {
				t.Error(err)
				return
			}
			m.Response, m.Compress = true, true
			m.Answer = []mdns.RR{&mdns.A{Hdr: mdns.RR_Header{Name: oneName, Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, 3)}}
			if spoil != nil {
				spoil(m)
			}
			raw, err := m.Pack()
			if err != nil {
				t.Error(err)
				return
			}
			if _, err := conn.WriteToUDPAddrPort(raw, from); err != nil {
				return
			}
		}
	}()
	return conn.LocalAddr().(*net.UDPAddr).AddrPort()
}
