package router

import (
	"fmt"
	"net/netip"
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
	Sentence string   `json:"sentence"`
	Scope    int      `json:"scope"`
	Settled  bool     `json:"settled"`
	Decision Decision `json:"-"`
}

// Candidate is one replica as the decision saw it.
type Candidate struct {
	// Position is its place in the client's order, from 1; 0 if it is excluded.
	Position int    `json:"position"`
	Region   string `json:"region"`
	// Distance is in kilometres from the client, or from the home where the client has no place; -1 where neither has one.
	Distance int    `json:"distance_km"`
	Health   string `json:"health"`
	Healthy  bool   `json:"healthy"`
	Routing  bool   `json:"routing"`
	Weight   int    `json:"weight"`
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
	t := trace{all: make([]Candidate, len(r.replicas))}
	t.Registry, t.Resolver, t.Subnet = r.topology.Name, c.Resolver, c.Subnet
	r.decide(c, &t)
	return t.Explanation
}

// trace takes notes of a decision. The methods of a nil one do nothing.
type trace struct {
	Explanation
	all []Candidate // by replica
}

// subnet notes whether the client's subnet is usable.
func (t *trace) subnet(p netip.Prefix, b *block, usable bool) {
	if t != nil && !usable {
		t.Why = fmt.Sprintf("the subnet %v lies in %v, %s: the resolver stands for the client", p, b.prefix, b.name)
	}
}

// candidate notes what order found of replica i.
func (t *trace) candidate(i, distance int, why exclusion) {
	if t == nil {
		return
	}
	t.all[i].Distance = distance
	switch why {
	case routingDisabled:
		t.all[i].Reason = "excluded: routing is disabled"
	case weightZero:
		t.all[i].Reason = "excluded: its weight is 0"
	case notSeeded:
		t.all[i].Reason = "excluded: not seeded yet"
	case fencedOff:
		t.all[i].Reason = "excluded: outside of the fence"
	}
}

// decided completes the explanation.
func (t *trace) decided(r *Registry, v *view, order []uint64, d Decision) {
	if t == nil {
		return
	}
	t.Decision = d
	t.Outcome, t.Scope, t.Settled = d.Outcome.String(), d.Scope, d.Settled
	t.where(r, v)

	for i := range t.all {
		h, condition := &r.replicas[i], r.conditions[i]
		c := &t.all[i]
		if !v.place.Located && r.home < 0 {
			c.Distance = -1
		}
		c.Region, c.Routing, c.Weight = h.region, h.routing, h.weight
		c.Health, c.Healthy = condition.health.String(), condition.health != Unhealthy
		c.Seeded, c.Settled = condition.seeded || i == r.home, condition.settled
		c.Bucket = bucket(v.cell, h.tail)
	}
	asked := true
	for n, k := range order {
		i := int(k & 0xffff)
		c := &t.all[i]
		c.Position, c.Chosen = n+1, i == d.Replica
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
		default:
			c.Reason = fmt.Sprintf("passed over: bucket %d is not below its weight %d", c.Bucket, c.Weight)
		}
		asked = asked && !(c.Chosen && d.Outcome == Kept)
		t.Candidates = append(t.Candidates, *c)
	}
	excluded := make([]Candidate, 0, len(t.all)-len(order))
	for rank := range t.all {
		for i := range t.all {
			if r.replicas[i].rank == rank && t.all[i].Position == 0 {
				excluded = append(excluded, t.all[i])
			}
		}
	}
	t.Candidates = append(t.Candidates, excluded...)
	if d.Replica >= 0 {
		t.Region = r.replicas[d.Replica].region
	}
	t.Sentence = r.sentence(v, t.Candidates, len(order), d)
}

// where notes the client's place.
func (t *trace) where(r *Registry, v *view) {
	switch {
	case v.subnet:
		t.Source = "ecs"
	case v.addr.IsValid():
		t.Source = "resolver"
	default:
		t.Source = "none"
	}
	if v.subnet || t.Why != "" {
		// said already
	} else if t.Subnet.IsValid() && t.Subnet.Bits() == 0 {
		t.Why = "the subnet has length 0, which asks to be told nothing of the client: the resolver stands for it"
	}
	t.Address = v.addr
	t.Database, t.Located, t.Network = v.place.Source, v.place.Located, v.place.Network
	t.Country, t.Continent, t.ASN = v.place.Country, v.place.Continent, v.asn
	if v.place.Located {
		latitude, longitude := v.place.Coordinates.Latitude, v.place.Coordinates.Longitude
		t.Latitude, t.Longitude = &latitude, &longitude
	}
	t.Cell = v.cell.String()
	if v.choice.order != 0 {
		t.Order = describe(r.rules[v.choice.order-1].topology)
	}
	if v.choice.fence != 0 {
		t.Fence = describe(r.rules[v.choice.fence-1].topology)
	}
}

// describe is rl as the store's keys say it: "country DE: westeurope,northeurope".
func describe(rl topology.Rule) string {
	var match string
	switch m := rl.Match; {
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

// sentence says d in words. candidates come first among all, the first choice first.
func (r *Registry) sentence(v *view, all []Candidate, candidates int, d Decision) string {
	distance := func(c Candidate) string {
		switch {
		case v.place.Located:
			return fmt.Sprintf("%d km away", c.Distance)
		case c.Region == r.topology.Home:
			return "the home region, since the client's place is not known"
		case c.Distance < 0:
			return "the client's place is not known"
		}
		return fmt.Sprintf("%d km from the home region, since the client's place is not known", c.Distance)
	}
	var chosen Candidate
	for _, c := range all {
		if c.Chosen {
			chosen = c
		}
	}
	switch d.Outcome {
	case Kept:
		if chosen.Position == 1 {
			return fmt.Sprintf("%s: first choice, %s", chosen.Region, distance(chosen))
		}
		return fmt.Sprintf("%s: choice %d, %s; those before it are unhealthy or did not keep this cell", chosen.Region, chosen.Position, distance(chosen))
	case Fallback:
		return fmt.Sprintf("%s: no healthy replica kept this cell, and it has the highest weight of them, %d", chosen.Region, chosen.Weight)
	case AllDownNearest:
		return fmt.Sprintf("%s: all %d candidates are unhealthy, and the policy is to answer with the nearest, %s", chosen.Region, candidates, distance(chosen))
	case AllDownNone:
		return fmt.Sprintf("none: all %d candidates are unhealthy, and the policy is to answer with none", candidates)
	case AllDownCNAME:
		return fmt.Sprintf("%s: all %d candidates are unhealthy, and this is the fallback name", r.topology.Policy.AllDown.Target, candidates)
	}
	return "none: no replica may be given to this client"
}
