package router

import (
	"context"
	"encoding/binary"
	"iter"
	"math"
	"net/netip"
	"slices"
	"strings"

	"portolan/router/ranges"
)

// Move is a number of clients by where they are sent before a change and after it. Those with the same region twice stay.
type Move struct {
	// From and To are regions; the fallback name where the policy's CNAME is the answer, and empty where there is none.
	From  string `json:"from"`
	To    string `json:"to"`
	Count uint64 `json:"count"`
}

// MoveClients decides for every client before and after, and counts. The clients come with how often each counts. The moves
// are sorted by From and To, in every pair that occurs.
func MoveClients(before, after *Registry, clients iter.Seq2[Client, uint64]) []Move {
	t := newTally(before, after)
	for c, n := range clients {
		t.add(before.Decide(c), after.Decide(c), n)
	}
	return t.moves()
}

// MoveCells is MoveClients for every cell of IPv4 (a /24 of ECS) whose place the database knows or that a rule of the operator
// names, each counted once. IPv6 is left out: nearly all of its cells are empty, so that their number tells of no clients. It
// walks the charts and asks single cells only where weights divide them, which is some ten million lots at most; it fails if
// ctx is done.
func MoveCells(ctx context.Context, before, after *Registry) ([]Move, error) {
	type routes struct{ before, after uint32 }
	both := ranges.Combine(before.chart.table.Table(), after.chart.table.Table(), func(b, a uint32) routes { return routes{b, a} })
	t := newTally(before, after)
	move := func(n routes, from, end uint64) error {
		b, a := &before.chart.routes[n.before], &after.chart.routes[n.after]
		if !b.subnets() || !a.subnets() || !b.known() && !a.known() {
			return nil
		}
		const size = 1 << (32 - subnetCell4)
		first, last := (from+size-1)/size, (end+size-1)/size // a cell is where its first address is
		alike := len(before.verdicts[n.before].steps) == 0 && len(after.verdicts[n.after].steps) == 0
		for cell := first; cell < last; cell++ {
			if cell&0xffff == 0 && ctx.Err() != nil {
				return ctx.Err()
			}
			count := uint64(1)
			if alike {
				count = last - cell
			}
			v := view{addr: address4(cell * size), ecs: true, subnet: true, route: int(n.before)}
			from := before.decide(&v)
			v.route = int(n.after)
			t.add(from, after.decide(&v), count)
			if alike {
				break
			}
		}
		return nil
	}
	var here routes
	from, begun := uint64(0), false
	for at, n := range both.Ranges() {
		if at.Is6() {
			break
		}
		low := at.As4()
		next := uint64(binary.BigEndian.Uint32(low[:]))
		if begun {
			if err := move(here, from, next); err != nil {
				return nil, err
			}
		}
		here, from, begun = n, next, true
	}
	if err := move(here, from, math.MaxUint32+1); err != nil {
		return nil, err
	}
	return t.moves(), nil
}

func address4(n uint64) netip.Addr {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	return netip.AddrFrom4(b)
}

// known is whether something is known of the clients: their place, or what the operator says of them.
func (r *route) known() bool { return r.placed || r.choice != choice{} }

// tally counts pairs of decisions.
type tally struct {
	before, after *Registry
	counts        []uint64 // by the slot before, then by the one after
}

// The slots of decisions without a replica; those of replicas follow.
const (
	slotNone = iota
	slotFallback
	slotReplicas
)

func newTally(before, after *Registry) *tally {
	return &tally{before, after, make([]uint64, (len(before.replicas)+slotReplicas)*(len(after.replicas)+slotReplicas))}
}

func (t *tally) add(before, after Decision, n uint64) {
	t.counts[slot(before)*(len(t.after.replicas)+slotReplicas)+slot(after)] += n
}

func slot(d Decision) int {
	switch {
	case d.Replica >= 0:
		return slotReplicas + d.Replica
	case d.Outcome == AllDownCNAME:
		return slotFallback
	}
	return slotNone
}

// destination is where the decisions of a slot lead.
func (r *Registry) destination(slot int) string {
	switch slot {
	case slotNone:
		return ""
	case slotFallback:
		return r.topology.Policy.AllDown.Target
	}
	return r.replicas[slot-slotReplicas].region
}

func (t *tally) moves() []Move {
	moves := []Move{}
	width := len(t.after.replicas) + slotReplicas
	for i, n := range t.counts {
		if n > 0 {
			moves = append(moves, Move{t.before.destination(i / width), t.after.destination(i % width), n})
		}
	}
	slices.SortFunc(moves, func(a, b Move) int {
		return strings.Compare(a.From+"\x00"+a.To, b.From+"\x00"+b.To)
	})
	return moves
}

// Coarse is c without what no decision but one by an operator's own prefixes depends on: the client that stands for c, its
// subnet no longer than a cell, or the first address of the cell of a subnet around its resolver. It names no single host.
func (r *Registry) Coarse(c Client) Client {
	v := r.look(c)
	if !v.addr.IsValid() {
		return Client{}
	}
	bits := cellBits(v.addr)
	if !v.subnet {
		p, _ := v.addr.Prefix(bits)
		return Client{Resolver: p.Addr()}
	}
	// Of an embedded address only the part behind the offset is the client's; a shorter subnet tells nothing of it.
	if short := c.Subnet.Bits() - v.offset; short > 0 {
		bits = min(bits, short)
	}
	p, _ := v.addr.Prefix(bits)
	return Client{Subnet: p}
}
