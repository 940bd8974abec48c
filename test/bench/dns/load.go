//go:build linux

package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"time"
	"unsafe"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

const (
	// subnets is how many different /24s ask: one for each DNS message id, which so tells what an answer belongs to.
	subnets = 1 << 16
	// ring holds what is sent before the timeout of the oldest, at a million queries a second.
	ring = 1 << 18
	// batchSize is how many packets one system call reads or writes.
	batchSize = 32
	// grown is by how much an answer is longer than its query: an A record with a compressed name.
	grown = 16
	// timeout is when a query counts as lost. A server that is kept from its processor for less is not blamed for it.
	timeout = 250 * time.Millisecond
	// stall is the pause in the generator's own loop beyond which the schedule of the open loop waits for it: the queries of
	// a generator that was kept from its processor would otherwise come in one burst that nobody meant.
	stall = 200 * time.Microsecond
)

// message is struct mmsghdr (recvmmsg(2)).
type message struct {
	unix.Msghdr
	length uint32
}

// generator asks one server. It is for one goroutine, on a thread and a processor of its own: it never waits, but looks for
// answers again and again, so that no server pays for waking it.
type generator struct {
	made     time.Time
	fd       int
	dns      bool // answers are to be looked at
	queries  [][]byte
	answered []byte // the last byte of the address that each query got

	pending [subnets]bool
	since   [subnets]int64 // when a pending query was sent, or should have been
	order   [ring]uint16   // the ids in the order they were sent
	head    uint32
	tail    uint32
	retry   []uint16
	next    uint16
	flying  int

	in, out       [batchSize]message
	inVec, outVec [batchSize]unix.Iovec
	buffers       [batchSize][1024]byte
}

// makeQueries makes a query for name, type A, from each of the subnets: /24s that are spread over all of IPv4 that clients
// live in, neighbours far from each other.
func makeQueries(name string) ([][]byte, error) {
	list := make([][]byte, 0, subnets)
	for n := uint32(1); len(list) < subnets; n++ {
		// An odd factor makes this a permutation of all /24s (2^32 divided by the golden ratio, as in Knuth's hash).
		at := n * 2654435769 &^ 0xff
		a := netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, at)))
		if at>>24 == 0 || at>>24 == 100 || at>>24 == 192 || at>>24 == 198 || at>>24 == 203 || !a.IsGlobalUnicast() || a.IsPrivate() || at>>24 >= 224 {
			continue // where the special-purpose blocks lie
		}
		m := new(mdns.Msg)
		m.SetQuestion(name, mdns.TypeA)
		m.Id, m.RecursionDesired = uint16(len(list)), false
		m.SetEdns0(1232, false)
		m.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_SUBNET{Code: mdns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: a.AsSlice()}}
		raw, err := m.Pack()
		if err != nil {
			return nil, fmt.Errorf("packing a query: %w", err)
		}
		list = append(list, raw)
	}
	return list, nil
}

func newGenerator(at netip.AddrPort, queries [][]byte, dns bool) (*generator, error) {
	fd, err := dial(at)
	if err != nil {
		return nil, err
	}
	g := &generator{made: time.Now(), fd: fd, dns: dns, queries: queries, answered: make([]byte, subnets), retry: make([]uint16, 0, subnets)}
	for i := range batchSize {
		g.inVec[i].Base = &g.buffers[i][0]
		g.inVec[i].SetLen(len(g.buffers[i]))
		for _, m := range []struct {
			message *message
			vec     *unix.Iovec
		}{{&g.in[i], &g.inVec[i]}, {&g.out[i], &g.outVec[i]}} {
			m.message.Iov = m.vec
			m.message.SetIovlen(1)
		}
	}
	return g, nil
}

func (g *generator) close() error { return unix.Close(g.fd) }

// result is what a phase of load came to.
type result struct {
	answers, lost int
	wrong         int // of the answers: not what was to be answered
	stalls        int
	elapsed       time.Duration
	latencies     []int64 // nanoseconds; of the open loop only
}

// closed keeps window queries under way for as long as d, and asks again what is lost.
func (g *generator) closed(d time.Duration, window int) (r result, err error) {
	began := g.now()
	end := began + int64(d)
	for t := began; t < end; t = g.now() {
		g.expire(&r, t, true)
		if room := window - g.flying; room >= batchSize/2 || g.flying == 0 {
			if err := g.send(min(room, batchSize), func(int) int64 { return t }); err != nil {
				return r, err
			}
		}
		if err := g.receive(&r); err != nil {
			return r, err
		}
	}
	r.elapsed = time.Duration(g.now() - began)
	return r, g.drain(&r)
}

// open asks rate times a second for as long as d, whatever is answered, and sends as much of beside, if that is not nil. Latencies count
// from when a query was due, not from when it was sent.
func (g *generator) open(d time.Duration, rate float64, beside *flood) (r result, err error) {
	interval := 1e9 / rate
	r.latencies = make([]int64, 0, int(d.Seconds()*rate)+batchSize)
	began := g.now()
	last, sent := began, 0
	for total := int(d.Seconds() * rate); sent < total; {
		t := g.now()
		if t-last > int64(stall) {
			began += t - last
			r.stalls++
		}
		last = t
		g.expire(&r, t, false)
		due := min(int(float64(t-began)/interval)+1, total) - sent
		if due > 0 {
			n := min(due, batchSize)
			if err := g.send(n, func(i int) int64 { return began + int64(float64(sent+i)*interval) }); err != nil {
				return r, err
			}
			sent += n
			if beside != nil {
				if err := beside.send(n); err != nil {
					return r, err
				}
			}
		}
		if err := g.receive(&r); err != nil {
			return r, err
		}
	}
	r.elapsed = time.Duration(g.now() - began)
	return r, g.drain(&r)
}

// drain waits for what is still under way.
func (g *generator) drain(r *result) error {
	for g.flying > 0 {
		if err := g.receive(r); err != nil {
			return err
		}
		g.expire(r, g.now(), false)
	}
	g.retry = g.retry[:0]
	return nil
}

// expire gives up on what was sent too long ago.
func (g *generator) expire(r *result, t int64, again bool) {
	for ; g.head != g.tail; g.head++ {
		id := g.order[g.head%ring]
		if g.pending[id] {
			if t-g.since[id] < int64(timeout) {
				return
			}
			g.pending[id] = false
			g.flying--
			r.lost++
			if again {
				g.retry = append(g.retry, id)
			}
		}
	}
}

// send sends n queries; since is when the i-th of them was due.
func (g *generator) send(n int, since func(i int) int64) error {
	for i := range n {
		var id uint16
		if last := len(g.retry) - 1; last >= 0 {
			id, g.retry = g.retry[last], g.retry[:last]
		} else {
			for g.pending[g.next] {
				g.next++
			}
			id = g.next
			g.next++
		}
		g.pending[id], g.since[id] = true, since(i)
		g.order[g.tail%ring] = id
		g.tail++
		g.flying++
		g.outVec[i].Base = unsafe.SliceData(g.queries[id])
		g.outVec[i].SetLen(len(g.queries[id]))
	}
	return sendAll(g.fd, g.out[:n])
}

// receive takes the answers that are there, at most a batch.
func (g *generator) receive(r *result) error {
	n, err := receiveSome(g.fd, &g.in)
	if err != nil {
		return err
	}
	t := g.now()
	for i := range n {
		answer := g.buffers[i][:g.in[i].length]
		id := binary.BigEndian.Uint16(answer)
		if len(answer) < 12 || !g.pending[id] {
			continue // later than the timeout
		}
		g.pending[id] = false
		g.flying--
		r.answers++
		if r.latencies != nil {
			r.latencies = append(r.latencies, t-g.since[id])
		}
		region, ok := g.check(answer, g.queries[id])
		if !ok {
			r.wrong++
		}
		g.answered[id] = region
	}
	return nil
}

// check is whether answer is what it should be: the size that all of them have and, where it is DNS, the question with no
// error and one A record of a region, whose number is returned.
func (g *generator) check(answer, query []byte) (region byte, ok bool) {
	if len(answer) != len(query)+grown {
		return 0, false
	}
	if !g.dns {
		return 0, true
	}
	at := 12
	for query[at] != 0 {
		at += 1 + int(query[at])
	}
	at += 1 + 4 // the root's label, type and class
	record := answer[at:]
	ok = answer[2]&0x80 != 0 && answer[2]&0x02 == 0 && answer[3]&0x0f == 0 && // a response, not truncated, NOERROR
		string(answer[4:8]) == "\x00\x01\x00\x01" && string(answer[12:at]) == string(query[12:at]) &&
		string(record[:6]) == "\xc0\x0c\x00\x01\x00\x01" && string(record[10:15]) == "\x00\x04\xc0\x00\x02" // 192.0.2.
	return record[15], ok && record[15] >= 1 && int(record[15]) <= len(places)
}

// quantile is the value below which the part q of the sorted list lies.
func quantile(sorted []int64, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return time.Duration(sorted[min(int(float64(len(sorted))*q), len(sorted)-1)])
}

// median is the middle of list.
func median(list []float64) float64 {
	if len(list) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(list))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

// now is a time in nanoseconds that only goes on.
func (g *generator) now() int64 { return int64(time.Since(g.made)) }
