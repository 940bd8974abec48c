package router

import (
	"net/netip"
	"slices"

	"portolan/router/ranges"
	"portolan/topology"
)

// Router is a compiled snapshot under the conditions of one moment. It is immutable and safe for concurrent use.
type Router struct {
	registries []Registry // as in the snapshot
	byName     map[string]int
}

// Registry decides for the clients of one registry. It is immutable and safe for concurrent use; With makes new ones,
// so that a handle must be taken anew from every new Router.
type Registry struct {
	*chart
	// conditions are those of the chart's replicas, by index.
	conditions []condition
}

// condition is what Decide needs of a ReplicaCondition.
type condition struct {
	health          Health
	settled, seeded bool
}

// chart is what of a registry does not change with conditions.
type chart struct {
	topology *topology.Registry
	places   Locator
	networks ASNLocator // nil: none loaded

	replicas []harbour
	home     int // index; -1 while the home's replica is incomplete
	// weighted is whether any replica has a weight between 0 and 100: only then cells matter.
	weighted bool

	rules []rule
	// operator maps addresses to the rules of the longest of the operator's prefixes that hold them.
	operator *ranges.Table[choice]
	// The other matches, for which a missing key means no rule.
	asns       map[uint32]choice
	countries  map[string]choice
	continents map[string]choice
	// asnOrders and asnFences are whether any order or fence is by ASN: only then the ASN is consulted.
	asnOrders, asnFences bool
}

// harbour is a replica as the decision sees it.
type harbour struct {
	region  string
	at      vector
	weight  int
	routing bool
	// rank is the place of the region's name among the registry's, by which ties are broken.
	rank int
	// tail is what follows the cell in the text that is hashed into the bucket.
	tail string
}

// rule is an order or a fence: per replica its place in the list, or absent.
type rule struct {
	topology topology.Rule
	place    []uint16
}

// absent is the place of a replica that a rule does not name: behind all that it names.
const absent = 1<<16 - 1

// choice is the order and the fence for some clients: indexes into rules, plus one; 0 for none.
type choice struct{ order, fence uint32 }

// or fills in from o what c has not.
func (c choice) or(o choice) choice {
	if c.order == 0 {
		c.order = o.order
	}
	if c.fence == 0 {
		c.fence = o.fence
	}
	return c
}

// New compiles a snapshot. Nobody's condition is known yet: all replicas are Unknown, settled and not seeded; With says
// more. networks may be nil if no database of autonomous systems is loaded.
func New(s *topology.Snapshot, places Locator, networks ASNLocator) *Router {
	r := &Router{registries: make([]Registry, len(s.Registries)), byName: make(map[string]int, len(s.Registries))}
	for i, t := range s.Registries {
		r.registries[i].chart = newChart(t, places, networks)
		r.byName[t.Name] = i
	}
	return r.With(nil)
}

// With returns the router of the same geography under the conditions c. It costs one look into c per replica; c is not
// kept.
func (r *Router) With(c Conditions) *Router {
	with := &Router{registries: make([]Registry, len(r.registries)), byName: r.byName}
	for i := range r.registries {
		chart := r.registries[i].chart
		conditions := make([]condition, len(chart.replicas))
		for j := range conditions {
			conditions[j] = condition{settled: true}
			if known, ok := c[ReplicaKey{Registry: chart.topology.Name, Region: chart.replicas[j].region}]; ok {
				conditions[j] = condition{health: known.Health, settled: known.Settled, seeded: known.Seeded}
			}
		}
		with.registries[i] = Registry{chart, conditions}
	}
	return with
}

// Registry returns the registry of that name, and whether there is one.
func (r *Router) Registry(name string) (*Registry, bool) {
	i, ok := r.byName[name]
	if !ok {
		return nil, false
	}
	return &r.registries[i], true
}

// At returns the registry with that index in the snapshot's Registries.
func (r *Router) At(i int) *Registry { return &r.registries[i] }

// Topology returns the registry as it was compiled: Decision.Replica is an index into its Replicas.
func (r *Registry) Topology() *topology.Registry { return r.topology }

func newChart(t *topology.Registry, places Locator, networks ASNLocator) *chart {
	c := &chart{topology: t, places: places, networks: networks, home: -1}
	names := make([]string, len(t.Replicas))
	for i, p := range t.Replicas {
		names[i] = p.Region
	}
	slices.Sort(names)
	for i, p := range t.Replicas {
		rank, _ := slices.BinarySearch(names, p.Region)
		c.replicas = append(c.replicas, harbour{
			region: p.Region, at: unit(p.Location), weight: p.Weight, routing: p.Routing,
			rank: rank, tail: bucketTail(t.Name, p.Region),
		})
		if p.Region == t.Home {
			c.home = i
		}
		c.weighted = c.weighted || p.Weight > 0 && p.Weight < 100
	}

	prefixes := make(map[netip.Prefix]choice)
	c.asns, c.countries, c.continents = make(map[uint32]choice), make(map[string]choice), make(map[string]choice)
	compile := func(rules []topology.Rule, set func(choice, uint32) choice) {
		for _, rl := range rules {
			c.rules = append(c.rules, rule{rl, c.listed(rl)})
			n := uint32(len(c.rules))
			switch m := rl.Match; {
			case m.Prefix.IsValid():
				p := operatorPrefix(m.Prefix)
				prefixes[p] = set(prefixes[p], n)
			case m.ASN != 0:
				c.asns[m.ASN] = set(c.asns[m.ASN], n)
			case m.Country != "":
				c.countries[m.Country] = set(c.countries[m.Country], n)
			case m.Continent != "":
				c.continents[m.Continent] = set(c.continents[m.Continent], n)
			}
		}
	}
	compile(t.Orders, func(c choice, n uint32) choice { c.order = n; return c })
	compile(t.Fences, func(c choice, n uint32) choice { c.fence = n; return c })
	for _, ch := range c.asns {
		c.asnOrders = c.asnOrders || ch.order != 0
		c.asnFences = c.asnFences || ch.fence != 0
	}
	c.operator = operatorTable(prefixes)
	return c
}

// listed is the place of every replica in rl's list.
func (c *chart) listed(rl topology.Rule) []uint16 {
	place := make([]uint16, len(c.replicas))
	for i, h := range c.replicas {
		place[i] = absent
		if n := slices.Index(rl.Regions, h.region); n >= 0 {
			place[i] = uint16(n)
		}
	}
	return place
}

// operatorPrefix is p as clients are looked up: a part of the IPv4-mapped, NAT64 or 6to4 addresses is a prefix of IPv4. All
// of them together are not all of IPv4: a rule for 2002::/16 is meant for the few who use 6to4, and must not take in the
// rest of the world. As nobody is looked up there, it holds for nobody.
func operatorPrefix(p netip.Prefix) netip.Prefix {
	p = p.Masked()
	if inner, offset := unembed(p.Addr()); offset > 0 && p.Bits() > offset {
		return netip.PrefixFrom(inner, min(p.Bits()-offset, 32)).Masked()
	}
	return p
}

// operatorTable compiles prefixes such that the longest with an order and the longest with a fence count, each for
// itself: a prefix inherits from those around it what it does not say.
func operatorTable(prefixes map[netip.Prefix]choice) *ranges.Table[choice] {
	entries := make([]ranges.Entry[choice], 0, len(prefixes))
	for p, ch := range prefixes {
		for n := p.Bits() - 1; n >= 0 && (ch.order == 0 || ch.fence == 0); n-- {
			around, _ := p.Addr().Prefix(n)
			ch = ch.or(prefixes[around])
		}
		entries = append(entries, ranges.Entry[choice]{Prefix: p, Value: ch})
	}
	return ranges.New(entries)
}

// Outcome says how a decision came to its replica.
type Outcome uint8

// The outcomes of a decision.
const (
	// NoCandidate: no replica may be given to this client. Decision.Replica is -1.
	NoCandidate Outcome = iota
	// Kept: the replica is the first healthy one of the client's order that keeps its cell.
	Kept
	// Fallback: no healthy candidate kept the cell; the replica has the highest weight of them.
	Fallback
	// AllDownNearest: no candidate is healthy; the replica is the first of the client's order.
	AllDownNearest
	// AllDownNone: no candidate is healthy and the policy is to answer with no address. Decision.Replica is -1.
	AllDownNone
	// AllDownCNAME: no candidate is healthy and the policy names a fallback. Decision.Replica is -1.
	AllDownCNAME
)

// String is a word for o, as in metrics and explanations.
func (o Outcome) String() string {
	switch o {
	case NoCandidate:
		return "no-candidate"
	case Kept:
		return "kept"
	case Fallback:
		return "fallback"
	case AllDownNearest:
		return "all-down-nearest"
	case AllDownNone:
		return "all-down-none"
	case AllDownCNAME:
		return "all-down-cname"
	}
	return "invalid"
}

// Decision is where a client is sent.
type Decision struct {
	// Replica is an index into topology.Registry.Replicas, or -1 for none.
	Replica int
	Outcome Outcome
	// Scope is the SCOPE PREFIX-LENGTH of the answer (RFC 7871, section 7.2.1), in bits of the family that was asked: every
	// subnet at least that long which shares these bits gets the same decision, under the same conditions and, where the
	// subnet is private or bogus, for the same resolver. It exceeds the source length where that was too short to tell.
	// 0 without a subnet, and for one of length 0.
	Scope int
	// Settled is whether no probe speaks against the state of any replica up to the chosen one, of all candidates where
	// none kept the cell.
	Settled bool
}

// maxOnStack is how many replicas a decision takes without allocating.
const maxOnStack = 64

// Decide says where c is sent. It does not allocate for registries of up to 64 replicas, apart from what the locators do.
//
// A subnet is usable if it lies in one of the operator's prefixes, or is no private or bogus one; the client is then
// looked up by it, otherwise by its resolver. The place of a usable subnet is that of the first address of its cell,
// so that a cell is never torn apart by a database that knows more than /24 or /48; only an operator's prefix can do
// that. A subnet shorter than a cell counts as the first cell in it, and the scope says that more bits were needed. A
// private subnet in one of the operator's prefixes has no place: after what the operator's order names come the home
// and what is near to it, whatever the resolver, so that caches may share the answer.
//
// Of orders and of fences, the one with the most precise match holds, each kind for itself; an order never leads out of
// a fence.
func (r *Registry) Decide(c Client) Decision { return r.decide(c, nil) }

// view is what a decision knows of its client.
type view struct {
	// addr is the address that stands for the client, unembedded; invalid if there is none.
	addr netip.Addr
	// subnet is whether addr is the client's subnet's, else the resolver's.
	subnet bool
	place  Place
	asn    uint32
	cell   Cell
	choice choice
}

func (r *Registry) decide(c Client, t *trace) Decision {
	v, scope, cellBits := r.look(c, t)

	var stack [maxOnStack]uint64
	order := r.order(&v, stack[:0], t)

	d := Decision{Replica: -1, Settled: true}
	fallback, weighed := -1, false
	for _, k := range order {
		i := int(k & 0xffff)
		h, condition := &r.replicas[i], r.conditions[i]
		d.Settled = d.Settled && condition.settled
		if condition.health == Unhealthy {
			continue
		}
		if fallback < 0 || h.weight > r.replicas[fallback].weight {
			fallback = i
		}
		keeps := h.weight >= 100
		if !keeps {
			weighed = true
			keeps = bucket(v.cell, h.tail) < h.weight
		}
		if keeps {
			d.Replica, d.Outcome = i, Kept
			break
		}
	}
	switch {
	case d.Replica >= 0 || len(order) == 0:
	case fallback >= 0:
		d.Replica, d.Outcome = fallback, Fallback
	default:
		switch r.topology.Policy.AllDown.Mode {
		case topology.AllDownNone:
			d.Outcome = AllDownNone
		case topology.AllDownCNAME:
			d.Outcome = AllDownCNAME
		default:
			d.Replica, d.Outcome = int(order[0]&0xffff), AllDownNearest
		}
	}
	if c.Subnet.IsValid() && c.Subnet.Bits() > 0 {
		if v.subnet && weighed {
			scope = max(scope, cellBits)
		}
		d.Scope = scope
	}
	t.decided(r, &v, order, d)
	return d
}

// look finds out what is known of c. scope and cellBits are the lengths, in bits of the subnet's own family, of the part
// of the address space around the subnet in which view is the same, the cell left aside, and of its cell.
func (r *Registry) look(c Client, t *trace) (v view, scope, cellBits int) {
	var offset, prefixLen, operatorLen int
	var b *block
	if c.Subnet.IsValid() && c.Subnet.Bits() > 0 {
		v.addr, offset = unembed(c.Subnet.Masked().Addr())
		b, prefixLen = blockOf(v.addr)
		v.choice, operatorLen = r.operator.Lookup(v.addr)
		scope = offset + max(prefixLen, operatorLen)
		v.subnet = b.clients() || v.choice != choice{}
		t.subnet(c.Subnet, b, v.subnet)
	}
	if !v.subnet {
		v.addr, _ = unembed(c.Resolver)
		if !v.addr.IsValid() {
			return v, scope, 0
		}
		b, _ = blockOf(v.addr)
		v.choice, _ = r.operator.Lookup(v.addr)
	}

	at, bits := v.addr, 0
	if v.subnet {
		bits = subnetCell4
		if at.Is6() {
			bits = subnetCell6
		}
		v.cell.Prefix, _ = at.Prefix(bits)
		at = v.cell.Prefix.Addr()
		cellBits = offset + bits
	}
	if b.clients() {
		v.place = r.places.Locate(at)
		if v.subnet {
			scope = max(scope, offset+within(v.place.Network, at, bits))
		}
	}

	// The ASN is looked up where it may matter: for a rule of a kind that no operator's prefix has settled, and for the
	// cell of a resolver.
	ruled := r.asnOrders && v.choice.order == 0 || r.asnFences && v.choice.fence == 0
	if r.networks != nil && b.clients() && (ruled || !v.subnet && (r.weighted || t != nil)) {
		var network netip.Prefix
		v.asn, network = r.networks.ASN(at)
		if v.subnet {
			scope = max(scope, offset+within(network, at, bits))
		}
		if v.asn != 0 {
			v.choice = v.choice.or(r.asns[v.asn])
		}
	}
	if v.place.Country != "" && len(r.countries) > 0 {
		v.choice = v.choice.or(r.countries[v.place.Country])
	}
	if v.place.Continent != "" && len(r.continents) > 0 {
		v.choice = v.choice.or(r.continents[v.place.Continent])
	}

	if !v.subnet {
		if v.asn != 0 {
			v.cell = Cell{ASN: v.asn, Country: v.place.Country}
		} else {
			bits := resolverCell4
			if v.addr.Is6() {
				bits = resolverCell6
			}
			v.cell.Prefix, _ = v.addr.Prefix(bits)
		}
	}
	return v, scope, cellBits
}

// within is the length of network, which holds a, but not more than bits: what lies deeper is in one cell anyway. A
// network that does not hold a tells nothing, and then the cell stands alone.
func within(network netip.Prefix, a netip.Addr, bits int) int {
	if !network.Contains(a) {
		return bits
	}
	return min(network.Bits(), bits)
}

// order appends the candidates to keys, the first choice first. A key is, from its highest bits: the place in the order
// that the operator gave, the distance in kilometres, the rank of the region's name; and the index of the replica.
func (r *Registry) order(v *view, keys []uint64, t *trace) []uint64 {
	if len(r.replicas) > cap(keys) {
		keys = make([]uint64, 0, len(r.replicas))
	}
	var from vector
	homeward := !v.place.Located
	switch {
	case !homeward:
		from = unit(v.place.Coordinates)
	case r.home >= 0:
		from = r.replicas[r.home].at
	}
	for i := range r.replicas {
		h := &r.replicas[i]
		distance := 0
		if !homeward || r.home >= 0 {
			distance = from.kilometres(h.at)
		}
		var why exclusion
		switch {
		case !h.routing:
			why = routingDisabled
		case h.weight <= 0:
			why = weightZero
		case r.topology.Policy.Replication && !r.conditions[i].seeded && i != r.home:
			why = notSeeded
		case v.choice.fence != 0 && r.rules[v.choice.fence-1].place[i] == absent:
			why = fencedOff
		}
		t.candidate(i, distance, why)
		if why != included {
			continue
		}
		place := uint64(absent)
		if v.choice.order != 0 {
			place = uint64(r.rules[v.choice.order-1].place[i])
		}
		// The home of a client without a place comes first, also before a region that stands on the same spot.
		if homeward && i != r.home {
			distance++
		}
		keys = append(keys, place<<48|uint64(distance)<<32|uint64(h.rank)<<16|uint64(i))
	}
	slices.Sort(keys)
	return keys
}

// exclusion says why a replica is no candidate.
type exclusion uint8

const (
	included exclusion = iota
	routingDisabled
	weightZero
	notSeeded
	fencedOff
)
