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

// Locator finds the place of an address. Implementations are immutable and safe for concurrent use; they do not
// allocate where they can help it. An address that is in no entry has a Place that is not Located, whose Network is the
// largest one around it that is not in the database (or the address itself).
type Locator interface {
	Locate(netip.Addr) Place
}

// ASNLocator finds the autonomous system of an address: 0 if unknown, with the network of that entry.
type ASNLocator interface {
	ASN(netip.Addr) (asn uint32, network netip.Prefix)
}
