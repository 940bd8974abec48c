// Package router is the decision: which replica a client is sent to, and why.
//
// Decide is one pure function for the DNS server, the CLI and the API, so that an explanation can never differ from
// an answer. It never looks at the query type, does no I/O, reads no clock and draws no random number: the choice is a
// function of (the client's place, its cell, topology, health), the same on every server.
//
// Locating clients is router/geo's business; what is healthy is health's; what is on the wire is dns's.
package router

import (
	"net/netip"
	"portolan/topology"
)

// Health is what is known of a replica's ability to serve.
type Health uint8

// The values of Health.
const (
	// Unknown is the health of a replica that is not probed; it counts as healthy.
	Unknown Health = iota
	Healthy
	Unhealthy
)

// String is the design's word for h.
func (h Health) String() string {
	switch h {
	case Healthy:
		return "Healthy"
	case Unhealthy:
		return "Unhealthy"
	}
	return "Unknown"
}

// ReplicaCondition is the condition of one replica.
type ReplicaCondition struct {
	Health Health
	// Down holds those of the replica's addresses that are dead while others of it stand; answers leave them out.
	Down []netip.Addr
	// Settled is false while a probe speaks against the state that Health has: answers are then kept for a short time only.
	Settled bool
	// Seeded is whether the replica has been Ready once.
	Seeded bool
	// Held is whether the guard holds its content, which may be gone or old: such a replica is no candidate either. The home is one
	// all the same.
	Held bool
	// Leaving is whether its deletion has begun: no client is sent there any more, whatever its routing says.
	Leaving bool
	// Lagging is whether it is too far behind to be given clients while another healthy candidate is not.
	Lagging bool
}

// ReplicaKey names a replica, as topology does.
type ReplicaKey = topology.ReplicaName

// Conditions are the conditions of all replicas at one moment. Immutable. A replica that is not in it is Unknown,
// settled and not seeded.
type Conditions map[ReplicaKey]ReplicaCondition

// Client is who asks: what a query tells of it.
type Client struct {
	// Resolver is the address that the query came from.
	Resolver netip.Addr
	// Subnet is the EDNS Client Subnet, masked to its source length; the zero Prefix if there is none.
	Subnet netip.Prefix
}

// Place is where an address is, as a location database tells.
type Place struct {
	Located     bool
	Coordinates topology.Coordinates
	Country     string // ISO 3166-1 alpha-2; empty: unknown
	Continent   string // AF AN AS EU NA OC SA; empty: unknown
	// Network is the entry of the database that the address lies in: every address of it has this place.
	Network netip.Prefix
	// Source names the database.
	Source string
}

// Locator is a location database. Implementations are immutable and safe for concurrent use.
type Locator interface {
	// Borders visits the addresses of one family from which on the place may be another, in ascending order, from the
	// family's first address on. number is the place's, from 0 in the order in which they are first met; NoPlace for what is in no
	// entry. place is given at the first visit of a number only, and is not kept beyond it. visit returns false to end; an
	// error says that the database could not be read to its end.
	Borders(is6 bool, visit func(from netip.Addr, number int, place *Place) bool) error
	// Locate finds the place of one address, for explanations. An address that is in no entry has a Place that is not
	// Located, whose Network is the largest one around it that is not in the database (or the address itself).
	Locate(netip.Addr) Place
}

// NoPlace is the number of what is in no entry of a Locator.
const NoPlace = -1

// ASNLocator is a database of autonomous systems. Implementations are immutable and safe for concurrent use.
type ASNLocator interface {
	// Borders visits where autonomous systems begin, as Locator's does, with their numbers, 0 if unknown.
	Borders(is6 bool, visit func(from netip.Addr, asn uint32) bool) error
}
