package router

import (
	"net/netip"
	"slices"

	"portolan/router/ranges"
	"portolan/topology"
)

// Router is a snapshot on its charts under the conditions of one moment. It is immutable and safe for concurrent use.
type Router struct {
	registries []Registry // as in the snapshot
	byName     map[string]int
}

// Registry decides for the clients of one registry. It is immutable and safe for concurrent use; With makes new ones,
// so that a handle must be taken anew from every new Router.
type Registry struct {
	*berth
	// conditions are those of the replicas, by index.
	conditions []condition
	// verdicts are what the routes of the chart come to under these conditions, by index.
	verdicts []verdict
	// unplaced is what clients come to of whom nothing at all is known.
	unplaced verdict
}

// condition is what a decision needs of a ReplicaCondition.
type condition struct {
	health                                  Health
	settled, seeded, held, leaving, lagging bool
}

// berth is a registry on its chart: what does not change with conditions.
type berth struct {
	topology *topology.Registry
	chart    *chart
	systems  *ranges.Compiled[system] // nil: no database of autonomous systems is loaded
	// places and digest, that of all sources, are for explanations.
	places Locator
	digest string

	replicas []harbour
	// harbours are the replicas of the chart's regions, as indexes into replicas; -1 for a region that the registry has no
	// longer.
	harbours []int
	// home is the home's index in chart.regions; -1 while its replica is incomplete.
	home int
	// orders are the orders of the chart's routes, those of clients without a place filled in; lost is that of clients of
	// whom nothing is known.
	orders [][]uint16
	lost   []uint16
}

// harbour is a replica as the decision sees it.
type harbour struct {
	region  string
	weight  int
	routing bool
	// ramping is whether the weight changes over time.
	ramping bool
	// tail is what follows the cell in the text that is hashed into the bucket.
	tail string
}

// New puts a snapshot on charts that were made of it, or of one before it: a registry whose chart is not there yet keeps
// to its former one, without the regions that are not on it; one that has none takes all clients for such without a place.
// Nil charts are none. Nobody's condition is known yet: all replicas are Unknown, settled and not seeded; With says more.
func New(s *topology.Snapshot, charts *Charts) *Router {
	r := &Router{registries: make([]Registry, len(s.Registries)), byName: make(map[string]int, len(s.Registries))}
	if charts == nil {
		charts = &Charts{}
	}
	for i, t := range s.Registries {
		c := charts.charts[chartKey(t)]
		if c == nil {
			c = charts.latest[t.Name]
		}
		r.registries[i].berth = newBerth(t, s.Ramps, c, charts)
		r.byName[t.Name] = i
	}
	return r.With(nil)
}

func newBerth(t *topology.Registry, ramps []topology.Ramp, c *chart, charts *Charts) *berth {
	if c == nil {
		d := newDraft(t, Sources{})
		c = &chart{regions: d.regions, rules: d.rules, table: new(ranges.Compiled[uint32]), routes: []route{{}}}
	}
	b := &berth{topology: t, chart: c, systems: charts.systems, places: charts.sources.Places, digest: charts.sources.Digest, home: -1}
	for _, p := range t.Replicas {
		b.replicas = append(b.replicas, harbour{
			region: p.Region, weight: p.Weight, routing: p.Routing, ramping: topology.RampOf(ramps, t.Name, p.Region) != nil, tail: bucketTail(t.Name, p.Region),
		})
	}
	for i, r := range c.regions {
		b.harbours = append(b.harbours, slices.IndexFunc(b.replicas, func(h harbour) bool { return h.region == r.name }))
		if r.name == t.Home && b.harbours[i] >= 0 {
			b.home = i
		}
	}
	b.orders = make([][]uint16, len(c.routes))
	for i, r := range c.routes {
		b.orders[i] = r.order
		if !r.placed {
			b.orders[i] = b.homeward(r.choice)
		}
	}
	b.lost = b.homeward(choice{})
	return b
}

// homeward is the order of clients without a place.
func (b *berth) homeward(ch choice) []uint16 {
	var from *vector
	if b.home >= 0 {
		from = &b.chart.regions[b.home].at
	}
	return order(nil, b.chart.regions, b.chart.rules, ch, from, nil, b.home)
}

// With returns the router of the same geography under the conditions c. It costs a look at every order of regions that
// there is; c is not kept.
func (r *Router) With(c Conditions) *Router {
	with := &Router{registries: make([]Registry, len(r.registries)), byName: r.byName}
	for i := range r.registries {
		with.registries[i] = r.registries[i].berth.with(c)
	}
	return with
}

func (b *berth) with(c Conditions) Registry {
	r := Registry{berth: b, conditions: make([]condition, len(b.replicas)), verdicts: make([]verdict, len(b.orders))}
	for i := range r.conditions {
		r.conditions[i] = condition{settled: true}
		if known, ok := c[ReplicaKey{Registry: b.topology.Name, Region: b.replicas[i].region}]; ok {
			r.conditions[i] = condition{health: known.Health, settled: known.Settled, seeded: known.Seeded, held: known.Held, leaving: known.Leaving, lagging: known.Lagging}
		}
		r.conditions[i].settled = r.conditions[i].settled && !b.replicas[i].ramping
	}
	for i, order := range b.orders {
		r.verdicts[i] = r.verdict(order)
	}
	r.unplaced = r.verdict(b.lost)
	return r
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

// Databases is the digest of all that clients are looked up in: servers with another may decide otherwise. Empty if there is none.
func (r *Registry) Databases() string { return r.digest }

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
	// Settled is whether nothing is about to change: no probe speaks against the state of any replica up to the chosen one, of
	// all candidates where none kept the cell, none of these has a weight that changes over time, and one of them is healthy.
	Settled bool
}

// exclusion says why a replica is no candidate.
type exclusion uint8

const (
	included exclusion = iota
	leaving
	routingDisabled
	weightZero
	notSeeded
	held
	fencedOff
	notCharted
)

// excluded says why replica i is no candidate, the fences left aside.
func (r *Registry) excluded(i int) exclusion {
	h := &r.replicas[i]
	switch {
	case r.conditions[i].leaving:
		return leaving
	case !h.routing:
		return routingDisabled
	case h.weight <= 0:
		return weightZero
	case !r.topology.Policy.Replication || h.region == r.topology.Home:
		return included
	case !r.conditions[i].seeded:
		return notSeeded
	case r.conditions[i].held:
		return held
	}
	return included
}

// candidates yields the replicas of an order that clients may be sent to, by their index.
func (r *Registry) candidates(order []uint16) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for _, region := range order {
			if i := r.harbours[region]; i >= 0 && r.excluded(i) == included && !yield(i) {
				return
			}
		}
	}
}

// verdict is what an order comes to under the conditions of the moment: what is left of it to be asked of a cell.
type verdict struct {
	// steps are the healthy candidates with a weight below 100, up to the first that keeps everything: each is asked in turn
	// whether it keeps the cell.
	steps []step
	// end is what holds for a cell that none of the steps keeps. Without steps it holds for all.
	end Decision
}

// step is a candidate that keeps some cells only.
type step struct {
	replica, weight int
	settled         bool
}

// drains is whether candidates of an order that lag are passed over: while a healthy one does not lag.
func (r *Registry) drains(order []uint16) bool {
	for i := range r.candidates(order) {
		if c := &r.conditions[i]; c.health != Unhealthy && !c.lagging {
			return true
		}
	}
	return false
}

func (r *Registry) verdict(order []uint16) verdict {
	v := verdict{end: Decision{Replica: -1, Settled: true}}
	nearest, highest := -1, -1
	drains := r.drains(order)
	for _, region := range order {
		i := r.harbours[region]
		if i < 0 {
			continue
		}
		switch r.excluded(i) {
		case included:
		case weightZero: // where a ramp begins, which will take clients from those behind
			v.end.Settled = v.end.Settled && !r.replicas[i].ramping
			continue
		default:
			continue
		}
		if nearest < 0 {
			nearest = i
		}
		v.end.Settled = v.end.Settled && r.conditions[i].settled
		if r.conditions[i].health == Unhealthy || drains && r.conditions[i].lagging {
			continue
		}
		weight := r.replicas[i].weight
		if weight >= 100 {
			v.end.Replica, v.end.Outcome = i, Kept
			return v
		}
		v.steps = append(v.steps, step{i, weight, v.end.Settled})
		if highest < 0 || weight > r.replicas[highest].weight {
			highest = i
		}
	}
	switch {
	case highest >= 0:
		v.end.Replica, v.end.Outcome = highest, Fallback
	case nearest < 0:
		v.end.Outcome = NoCandidate
	default:
		// The first that comes back is a better answer.
		v.end.Settled = false
		switch r.topology.Policy.AllDown.Mode {
		case topology.AllDownNone:
			v.end.Outcome = AllDownNone
		case topology.AllDownCNAME:
			v.end.Outcome = AllDownCNAME
		default:
			v.end.Replica, v.end.Outcome = nearest, AllDownNearest
		}
	}
	return v
}

// of is the decision for one cell.
func (v *verdict) of(r *Registry, c Cell) Decision {
	for i := range v.steps {
		s := &v.steps[i]
		if bucket(c, r.replicas[s.replica].tail) < s.weight {
			return Decision{Replica: s.replica, Outcome: Kept, Settled: s.settled}
		}
	}
	return v.end
}

// Decide says where c is sent. It does not allocate.
//
// A subnet is usable if it lies in one of the operator's prefixes, or is no private or bogus one; the client is then
// looked up by it, otherwise by its resolver. The place of a client is that of the first address of the /24 or /48 around
// it, so that a cell is never torn apart by a database that knows more; only an operator's prefix can do that. A subnet
// shorter than a cell counts as the first cell in it, and the scope says that more bits were needed. A private subnet in
// one of the operator's prefixes has no place: after what the operator's order names come the home and what is near to it,
// whatever the resolver, so that caches may share the answer.
//
// Of orders and of fences, the one with the most precise match holds, each kind for itself; an order never leads out of
// a fence.
func (r *Registry) Decide(c Client) Decision {
	v := r.look(c)
	return r.decide(&v)
}

// Prefetch is a list of clients whose decisions are to come, one by one: made ready together they come faster. It is not for concurrent
// use, and may be used again and again.
type Prefetch struct{ places []ranges.Place[uint32] }

// Add puts a client at a registry on the list.
func (p *Prefetch) Add(r *Registry, c Client) {
	a := c.Resolver
	if c.Subnet.IsValid() && c.Subnet.Bits() > 0 {
		a = c.Subnet.Masked().Addr()
	}
	a, _ = unembed(a)
	p.places = append(p.places, ranges.Place[uint32]{Table: r.chart.table, Addr: a})
}

// Run brings what the decisions need into the processor's caches, and empties the list. The decisions are the same without it.
func (p *Prefetch) Run() {
	defer func() {
		clear(p.places) // a table that is replaced must not be kept by them
		p.places = p.places[:0]
	}()
	ranges.Prefetch(p.places)
}

// view is what a decision knows of its client.
type view struct {
	// addr is the address that stands for the client, unembedded; invalid if there is none.
	addr netip.Addr
	// ecs is whether there is a subnet, of a length other than 0; subnet is whether addr is of it, else the resolver's.
	ecs, subnet bool
	// route is an index into chart.routes; -1 if there is no address.
	route int
	// scope is the length, in bits of the subnet's own family, of the part of the address space around the subnet in which
	// the route is the same; offset is where an embedded IPv4 address starts in it.
	scope, offset int
}

// look finds the client on the chart.
func (r *Registry) look(c Client) (v view) {
	if c.Subnet.IsValid() && c.Subnet.Bits() > 0 {
		v.ecs = true
		v.addr, v.offset = unembed(c.Subnet.Masked().Addr())
		n, length := r.chart.table.Lookup(v.addr)
		v.scope = v.offset + length
		if r.chart.routes[n].subnets() {
			v.subnet, v.route = true, int(n)
			return v
		}
	}
	v.addr, _ = unembed(c.Resolver)
	v.route = -1
	if v.addr.IsValid() {
		n, _ := r.chart.table.Lookup(v.addr)
		v.route = int(n)
	}
	return v
}

func (r *Registry) decide(v *view) Decision {
	d := &r.unplaced
	if v.route >= 0 {
		d = &r.verdicts[v.route]
	}
	decision := d.end
	if len(d.steps) > 0 {
		decision = d.of(r, r.cell(v))
	}
	if v.ecs {
		decision.Scope = v.scope
		if v.subnet && len(d.steps) > 0 {
			decision.Scope = max(v.scope, v.offset+cellBits(v.addr))
		}
	}
	return decision
}

// cellBits is the length of the cell of a subnet's address.
func cellBits(a netip.Addr) int {
	if a.Is6() {
		return subnetCell6
	}
	return subnetCell4
}

// cell is the unit of clients that v is of.
func (r *Registry) cell(v *view) (c Cell) {
	switch {
	case v.subnet:
		c.Prefix, _ = v.addr.Prefix(cellBits(v.addr))
	case !v.addr.IsValid():
	default:
		if r.systems != nil {
			if s, _ := r.systems.Lookup(v.addr); s.asn != 0 && r.chart.routes[v.route].block == 0 {
				return Cell{ASN: s.asn, Country: s.country}
			}
		}
		bits := resolverCell4
		if v.addr.Is6() {
			bits = resolverCell6
		}
		c.Prefix, _ = v.addr.Prefix(bits)
	}
	return c
}
