package router

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"portolan/topology"
)

// Explanation is a decision with its reasons, written down by the very code that decides.
type Explanation struct {
	Registry string       `json:"registry"`
	Resolver netip.Addr   `json:"resolver"`
	Subnet   netip.Prefix `json:"subnet,omitzero"`

	// Source is what stood for the client: "ecs", "resolver", or "none" if neither was known.
	Source string `json:"source"`
	// Why says what became of the subnet, where there was one that did not stand for the client.
	Why string `json:"why,omitempty"`
	// Address is the address that was looked up, with an embedded IPv4 address taken out.
	Address netip.Addr `json:"address,omitzero"`
	// Database names what knew the place; empty for an address that is in none.
	Database  string   `json:"database,omitempty"`
	Located   bool     `json:"located"`
	Country   string   `json:"country,omitempty"`
	Continent string   `json:"continent,omitempty"`
	Latitude  *float64 `json:"latitude,omitempty"`
	Longitude *float64 `json:"longitude,omitempty"`
	// Network is the database's entry.
	Network netip.Prefix `json:"network,omitzero"`
	ASN     uint32       `json:"asn,omitempty"`
	// Cell is the unit of clients that weights divide.
	Cell string `json:"cell,omitempty"`
	// Order and Fence are the operator's rules that held: "country DE: westeurope,northeurope".
	Order string `json:"order,omitempty"`
	Fence string `json:"fence,omitempty"`

	// Candidates are all replicas: first the candidates in the client's order, then the others by region.
	Candidates []Candidate `json:"candidates"`

	// Region is the chosen one; empty for none.
	Region  string `json:"region"`
	Outcome string `json:"outcome"`
	// Sentence says the outcome in words.
	Sentence string `json:"sentence"`
	Scope    int    `json:"scope"`
	Settled  bool   `json:"settled"`
	// Databases is the digest of all that clients are looked up in: servers with another may decide otherwise.
	Databases string   `json:"databases,omitempty"`
	Decision  Decision `json:"-"`
}

// Candidate is one replica as the decision saw it.
type Candidate struct {
	// Position is its place in the client's order, from 1; 0 if it is excluded.
	Position int    `json:"position"`
	Region   string `json:"region"`
	// Distance is in kilometres from the client, or from the home where the client has no place; -1 where neither has one.
	Distance int `json:"distance_km"`
	// Latency is the figure of the operator's table for clients there, in milliseconds; 0 if it has none. Then it stands in
	// the distance's place.
	Latency int    `json:"latency_ms,omitempty"`
	Health  string `json:"health"`
	Healthy bool   `json:"healthy"`
	Routing bool   `json:"routing"`
	Weight  int    `json:"weight"`
	// Share is how many of a hundred cells with this client's order it gets, as weights and health are at this moment.
	Share float64 `json:"share"`
	// Bucket is the cell's lot here, 0 to 99: the replica keeps the cell if it is below the weight.
	Bucket  int  `json:"bucket"`
	Seeded  bool `json:"seeded"`
	Settled bool `json:"settled"`
	Chosen  bool `json:"chosen"`
	// Reason says why it was excluded, passed over, chosen or not asked.
	Reason string `json:"reason"`
}

// Explain decides for c as Decide does and tells why.
func (r *Registry) Explain(c Client) Explanation {
	v := r.look(c)
	e := Explanation{Registry: r.topology.Name, Resolver: c.Resolver, Subnet: c.Subnet, Databases: r.digest, Decision: r.decide(&v)}
	e.Outcome, e.Scope, e.Settled = e.Decision.Outcome.String(), e.Decision.Scope, e.Decision.Settled
	e.whence(c, &v)
	rt := r.routeOf(&v)
	place := r.place(&v)
	e.where(r, &v, rt, place)
	order := r.lost
	if v.route >= 0 {
		order = r.orders[v.route]
	}
	e.candidates(r, order, rt.choice, r.cell(&v), place)
	if e.Decision.Replica >= 0 {
		e.Region = r.replicas[e.Decision.Replica].region
	}
	e.Sentence = e.sentence(r)
	if not := e.bypassed(r, order); len(not) > 0 {
		e.Sentence += "; not " + strings.Join(not, ", ")
	}
	return e
}

// routeOf is the route of v; that of clients of whom nothing is known if there is none.
func (r *Registry) routeOf(v *view) route {
	if v.route < 0 {
		return route{}
	}
	return r.chart.routes[v.route]
}

// place asks the database about v, as it was asked when the chart was made: for the first address of the cell around it.
func (r *Registry) place(v *view) Place {
	if v.route < 0 || r.chart.routes[v.route].block != 0 || r.places == nil {
		return Place{}
	}
	at, _ := v.addr.Prefix(cellBits(v.addr))
	return r.places.Locate(at.Addr())
}

// from is where distances are measured from; nil for nowhere.
func (r *Registry) from(place Place) *vector {
	switch {
	case place.Located:
		at := unit(place.Coordinates)
		return &at
	case r.home >= 0:
		return &r.chart.regions[r.home].at
	}
	return nil
}

// whence notes what stood for the client.
func (e *Explanation) whence(c Client, v *view) {
	switch {
	case v.subnet:
		e.Source = "ecs"
	case v.addr.IsValid():
		e.Source = "resolver"
	default:
		e.Source = "none"
	}
	instead := "the resolver stands for the client"
	if e.Source == "none" {
		instead = "a resolver would stand for the client, and there is none"
	}
	switch {
	case v.ecs && !v.subnet:
		a, _ := unembed(c.Subnet.Masked().Addr())
		b, _ := blockOf(a)
		e.Why = fmt.Sprintf("the subnet %v lies in %v, %s: %s", c.Subnet, b.prefix, b.name, instead)
	case !v.ecs && c.Subnet.IsValid():
		e.Why = "the subnet has length 0, which asks to be told nothing of the client: " + instead
	}
}

// where notes the client's place.
func (e *Explanation) where(r *Registry, v *view, rt route, place Place) {
	e.Address = v.addr
	e.Database, e.Located, e.Network = place.Source, place.Located, place.Network
	e.Country, e.Continent = place.Country, place.Continent
	if place.Located {
		latitude, longitude := place.Coordinates.Latitude, place.Coordinates.Longitude
		e.Latitude, e.Longitude = &latitude, &longitude
	}
	if v.route >= 0 && rt.block == 0 && r.systems != nil {
		s, _ := r.systems.Lookup(v.addr)
		e.ASN = s.asn
	}
	e.Cell = r.cell(v).String()
	if rt.choice.order != 0 {
		e.Order = describe(r.chart.rules[rt.choice.order-1].topology)
	}
	if rt.choice.fence != 0 {
		e.Fence = describe(r.chart.rules[rt.choice.fence-1].topology)
	}
}

// candidates notes all replicas: those of the order that may be chosen, and the others with why not.
func (e *Explanation) candidates(r *Registry, order []uint16, ch choice, cell Cell, place Place) {
	d := e.Decision
	from := r.from(place)
	var figures []int
	if place.Located {
		figures = r.chart.figures.of(letters(place.Country), letters(place.Continent))
	}
	all := make([]Candidate, len(r.replicas))
	why := make([]exclusion, len(r.replicas))
	for i := range all {
		h, condition := &r.replicas[i], r.conditions[i]
		all[i] = Candidate{
			Region: h.region, Distance: -1, Routing: h.routing, Weight: h.weight, Health: condition.health.String(), Healthy: condition.health != Unhealthy,
			Seeded: condition.seeded || h.region == r.topology.Home, Settled: condition.settled, Bucket: bucket(cell, h.tail),
		}
		if why[i] = r.excluded(i); why[i] == included {
			why[i] = notCharted
		}
	}
	for n, i := range r.harbours {
		if i < 0 {
			continue
		}
		if from != nil {
			all[i].Distance = from.kilometres(r.chart.regions[n].at)
		}
		if len(figures) > 0 {
			all[i].Latency = figures[n]
		}
		if why[i] == notCharted {
			why[i] = included
		}
		if why[i] == included && ch.fence != 0 && r.chart.rules[ch.fence-1].place[n] == absent {
			why[i] = fencedOff
		}
	}
	for _, s := range r.split(order) {
		for i := range all {
			if all[i].Region == s.Region {
				all[i].Share = s.Percent
			}
		}
	}
	asked, drains := true, r.drains(order)
	for i := range r.candidates(order) {
		c := &all[i]
		c.Position, c.Chosen = len(e.Candidates)+1, i == d.Replica
		switch {
		case c.Chosen && d.Outcome == Kept && c.Weight >= 100:
			c.Reason = "chosen: the first healthy one that keeps this cell"
		case c.Chosen && d.Outcome == Kept:
			c.Reason = fmt.Sprintf("chosen: bucket %d is below its weight %d", c.Bucket, c.Weight)
		case c.Chosen && d.Outcome == Fallback:
			c.Reason = "chosen: nobody kept this cell, and no healthy one has a higher weight"
		case c.Chosen:
			c.Reason = "chosen: the nearest, though unhealthy as all are"
		case !asked:
			c.Reason = "not asked: an earlier one keeps this cell"
		case !c.Healthy:
			c.Reason = "passed over: unhealthy"
		case drains && r.conditions[i].lagging:
			c.Reason = "passed over: it lags behind"
		default:
			c.Reason = fmt.Sprintf("passed over: bucket %d is not below its weight %d", c.Bucket, c.Weight)
		}
		asked = asked && !(c.Chosen && d.Outcome == Kept)
		e.Candidates = append(e.Candidates, *c)
	}
	candidates := len(e.Candidates)
	for i := range all {
		if all[i].Position == 0 {
			all[i].Reason = why[i].String()
			e.Candidates = append(e.Candidates, all[i])
		}
	}
	slices.SortFunc(e.Candidates[candidates:], func(a, b Candidate) int { return strings.Compare(a.Region, b.Region) })
}

// maxBypassed bounds how many replicas a sentence names.
const maxBypassed = 3

// bypassed names the replicas that a client would expect the answer to be, each with why it is not: those before the chosen one in the
// order of the client, or nearer and outside of its fence. Where no candidate is healthy they are those that are none.
func (e *Explanation) bypassed(r *Registry, order []uint16) (not []string) {
	rank := func(c Candidate) int {
		return slices.IndexFunc(order, func(region uint16) bool { return r.chart.regions[region].name == c.Region })
	}
	expected := func(c Candidate) bool { return c.Position == 0 }
	if e.Decision.Outcome == Kept || e.Decision.Outcome == Fallback {
		chosen := e.Candidates[slices.IndexFunc(e.Candidates, func(c Candidate) bool { return c.Chosen })]
		expected = func(c Candidate) bool {
			if at := rank(c); at >= 0 {
				return at < rank(chosen)
			}
			return c.away() <= chosen.away()
		}
	}
	more := 0
	for _, c := range e.Candidates {
		switch {
		case c.Chosen || !expected(c):
		case len(not) == maxBypassed:
			more++
		default:
			_, why, _ := strings.Cut(c.Reason, ": ")
			not = append(not, fmt.Sprintf("%s (%s)", c.Region, why))
		}
	}
	if more > 0 {
		not[len(not)-1] += fmt.Sprintf(" and %d more", more)
	}
	return not
}

// away is how far the replica counts as, in kilometres.
func (c Candidate) away() int {
	if c.Latency > 0 {
		return c.Latency * kilometresPerMillisecond
	}
	return c.Distance
}

// String is the exclusion in words.
func (x exclusion) String() string {
	switch x {
	case leaving:
		return "excluded: its deletion has begun"
	case routingDisabled:
		return "excluded: routing is disabled"
	case weightZero:
		return "excluded: its weight is 0"
	case notSeeded:
		return "excluded: not seeded yet: it has never been Ready"
	case held:
		return "excluded: the guard holds its content, which may be gone or old"
	case fencedOff:
		return "excluded: outside of the fence"
	case notCharted:
		return "excluded: the table of its distances is still being made"
	}
	return ""
}

// describe is rl as the store's keys say it: "country DE: westeurope,northeurope".
func describe(rl topology.Rule) string {
	var match string
	switch m := rl.Match; {
	case m == topology.Match{}:
		match = "file of prefixes"
	case m.Prefix.IsValid():
		match = "prefix " + m.Prefix.String()
	case m.ASN != 0:
		match = "asn " + strconv.FormatUint(uint64(m.ASN), 10)
	case m.Country != "":
		match = "country " + m.Country
	default:
		match = "continent " + m.Continent
	}
	return match + ": " + strings.Join(rl.Regions, ",")
}

// sentence says the outcome in words.
func (e *Explanation) sentence(r *Registry) string {
	distance := func(c Candidate) string {
		switch {
		case e.Located && c.Latency > 0:
			return fmt.Sprintf("%d ms away by the table of latencies", c.Latency)
		case e.Located:
			return fmt.Sprintf("%d km away", c.Distance)
		case c.Region == r.topology.Home:
			return "the home region, since the client's place is not known"
		case c.Distance < 0:
			return "the client's place is not known"
		}
		return fmt.Sprintf("%d km from the home region, since the client's place is not known", c.Distance)
	}
	var chosen Candidate
	candidates := 0
	for _, c := range e.Candidates {
		if c.Position > 0 {
			candidates++
		}
		if c.Chosen {
			chosen = c
		}
	}
	unhealthy := fmt.Sprintf("all %d candidates are unhealthy", candidates)
	if candidates == 1 {
		unhealthy = "the only candidate is unhealthy"
	}
	switch e.Decision.Outcome {
	case Kept:
		if chosen.Position == 1 {
			return fmt.Sprintf("%s: first choice, %s", chosen.Region, distance(chosen))
		}
		return fmt.Sprintf("%s: choice %d, %s", chosen.Region, chosen.Position, distance(chosen))
	case Fallback:
		return fmt.Sprintf("%s: no healthy replica kept this cell, and it has the highest weight of them, %d", chosen.Region, chosen.Weight)
	case AllDownNearest:
		return fmt.Sprintf("%s: %s, and the policy is to answer with the nearest, %s", chosen.Region, unhealthy, distance(chosen))
	case AllDownNone:
		return fmt.Sprintf("none: %s, and the policy is to answer with none", unhealthy)
	case AllDownCNAME:
		return fmt.Sprintf("%s: %s, and this is the fallback name", r.topology.Policy.AllDown.Target, unhealthy)
	}
	return "none: no replica may be given to this client"
}
