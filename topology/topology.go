// Package topology holds what operators declare: registries, their replicas, regions and policies, as immutable
// snapshots.
//
// It parses and validates the keys of the store and topology.yaml, keeps the last good value of what turned bad,
// guards against raw edits that would take most of a registry away, and watches. It decides nothing about clients
// (router), does not look at replicas (health, replicator) and knows no wire format.
package topology

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Spreading is how long an edit is on its way into the answers of all servers at most, and into the second that a TTL is told in: with
// the longest TTL added, after it no client comes to a replica that the edit sends nobody to.
const Spreading = 2 * time.Second

// Snapshot is the whole topology at one moment. It is immutable.
type Snapshot struct {
	// Registries are sorted by name.
	Registries []*Registry
	// Problems names every value that was refused, kept or left out, sorted by key.
	Problems []Problem
	// Challenges are those of ACME that have not expired, sorted by name and token.
	Challenges []Challenge
	// Ramps are the weights that change over time, sorted by registry and region: a replica's Weight is the one of the moment.
	Ramps []Ramp
	// overtaken are ramps that an edit of the weight or of routing has ended, and that wait to be taken away.
	overtaken []Ramp
	// good are the values that the registries were made of.
	good Values
	// Changed is the time of the newest committed change; the DNS serial is made of it. It is kept in the store, so that all
	// servers have the same.
	Changed time.Time
	// Digest is a hash of what the snapshot means (not of its problems): equal on servers that will answer alike.
	Digest string
}

// Registry returns the registry of that name, or nil.
func (s *Snapshot) Registry(name string) *Registry {
	i, found := slices.BinarySearchFunc(s.Registries, name, func(r *Registry, n string) int { return strings.Compare(r.Name, n) })
	if !found {
		return nil
	}
	return s.Registries[i]
}

// Problem is a value that could not be used, and what was done instead.
type Problem struct {
	// Key is the store's key, below its prefix, or the path in a YAML document.
	Key   string `json:"key"`
	Value string `json:"value"`
	// Reason says what is wrong and what would be right.
	Reason string `json:"reason"`
	// Effect says what holds meanwhile: "the last good value 100 is kept", "replica westus is not served".
	Effect string `json:"effect"`
}

// Registry is one registry: the one name, and everything behind it.
type Registry struct {
	Name string
	// Home is the region in which the registry was created; its replica cannot be deleted while the registry exists.
	Home string
	// ClientNames are the names that clients use, whose certificates every replica serves: lower case, no trailing dot.
	ClientNames []string
	Policy      Policy
	// Orders name the replicas that come first for some clients; Fences the only ones. Sorted by their match.
	Orders []Rule
	Fences []Rule
	// Replicas are the complete ones, sorted by region: those that can be served and replicated.
	Replicas []*Replica
	// Incomplete names the regions that miss an endpoint or addresses; each has a Problem.
	Incomplete []string
}

// Replica returns the replica in region, or nil.
func (r *Registry) Replica(region string) *Replica {
	i, found := slices.BinarySearchFunc(r.Replicas, region, func(p *Replica, n string) int { return strings.Compare(p.Region, n) })
	if !found {
		return nil
	}
	return r.Replicas[i]
}

// Policy is how a registry behaves.
type Policy struct {
	AllDown AllDown
	// Replication is false for a front door alone: registries that something else keeps equal.
	Replication bool
	// MaxLag is how old the oldest version that is still to be applied to a replica may be before it is drained; 0: never.
	MaxLag time.Duration
	// Merge says what a baseline does with a tag that differs between regions.
	Merge Merge
	// Conflicts says what becomes of the version that lost against a concurrent one.
	Conflicts Conflicts
	// Untagged says which manifests are replicated.
	Untagged Untagged
	// Deletes says whether a delete in one region is one in all.
	Deletes Deletes
}

// AllDownMode is what the front door answers when no candidate is healthy.
type AllDownMode uint8

// The modes of AllDown.
const (
	// AllDownNearest answers with the nearest candidate: the default.
	AllDownNearest AllDownMode = iota
	// AllDownNone answers with no address.
	AllDownNone
	// AllDownCNAME answers with a fallback name.
	AllDownCNAME
)

// AllDown is the policy for "no healthy candidate".
type AllDown struct {
	Mode AllDownMode
	// Target is the fallback name of AllDownCNAME: fully qualified, lower case, with its final dot.
	Target string
}

// Merge is the policy of a baseline for differing tags.
type Merge string

// The policies of Merge.
const (
	// MergeAsk waits for the operator's --accept when there are conflicts: the default.
	MergeAsk Merge = "ask"
	// MergeHome goes on at once: the known version, else the home's, wins.
	MergeHome Merge = "home"
)

// Conflicts is the policy for versions that lost.
type Conflicts string

// The policies of Conflicts.
const (
	// ConflictsKeep keeps the loser pullable as <tag>.conflict-<region>-<n> for 30 days: the default.
	ConflictsKeep Conflicts = "keep"
	// ConflictsLog only writes it to the conflict log.
	ConflictsLog Conflicts = "log"
)

// Untagged is the policy for manifests without a tag.
type Untagged string

// The policies of Untagged.
const (
	// UntaggedKeep copies every pushed manifest, tagged or not: the default.
	UntaggedKeep Untagged = "keep"
	// UntaggedTagsOnly copies what tags lead to.
	UntaggedTagsOnly Untagged = "tags-only"
)

// Deletes is the policy for deletes.
type Deletes string

// The policies of Deletes.
const (
	// DeletesPropagate carries a delete to every replica: the default.
	DeletesPropagate Deletes = "propagate"
	// DeletesIgnore lets a delete stand in its region alone and brings nothing back there.
	DeletesIgnore Deletes = "ignore"
)

// Replica is one region's registry behind the name.
type Replica struct {
	Region string
	// Endpoint is the base URL of the registry's API: scheme and host, no path, no user.
	Endpoint *url.URL
	// Addresses are what answers hand out, as the operator ordered them; none if Hostname is set.
	Addresses []netip.Addr
	// Hostname is what answers point to by CNAME: lower case with its final dot; empty if Addresses are set.
	Hostname string
	// Location is where the region is.
	Location Coordinates
	// Weight, 0 to 100, is the share of its nearest clients that the replica keeps.
	Weight int
	// Routing is whether the front door may send clients to it. Replication goes on either way.
	Routing bool
	Probe   Probe
	// Canary is an image that health checks really read; the zero one for none.
	Canary Canary
	Access Access
}

// Coordinates are a place on Earth in decimal degrees.
type Coordinates struct {
	Latitude  float64 `json:"latitude"`
	Longitude float64 `json:"longitude"`
}

// ProbeMode is how a replica's health is known.
type ProbeMode uint8

// The probe modes.
const (
	// ProbeHTTPS asks /v2/ over TLS, certificate verified.
	ProbeHTTPS ProbeMode = iota
	// ProbeHTTP asks /v2/ in the clear.
	ProbeHTTP
	// ProbeTCP connects.
	ProbeTCP
	// ProbeConsul takes the checks of a Consul service.
	ProbeConsul
	// ProbeNone does not probe: the health stays Unknown.
	ProbeNone
)

// Probe is the health check of a replica. Its default follows the endpoint's scheme.
type Probe struct {
	Mode ProbeMode
	// Service is the Consul service of ProbeConsul.
	Service string
}

// Canary names an image of a replica.
type Canary struct{ Repository, Tag string }

// String is repository:tag; empty for none.
func (c Canary) String() string {
	if c == (Canary{}) {
		return ""
	}
	return c.Repository + ":" + c.Tag
}

// Access is how Portolan itself reaches a replica's API. The fields hold references, never secrets.
type Access struct {
	// Credentials is a reference: docker-config, env:NAME, file:PATH, helper:NAME; empty for none.
	Credentials string
	// CA and ClientCert are references to PEM files: file:PATH; empty for the system's and none.
	CA, ClientCert string
	// Prefix stands before every repository name at this replica.
	Prefix string
	// Realms are the hosts (host or host:port, comma-separated) of token servers that may be sent the credentials,
	// besides the endpoint's own host.
	Realms string
}

// overlaps reports whether two replicas are one server and have repositories in common, since neither's prefix sets them apart.
func (r *Replica) overlaps(other *Replica) bool {
	if hostPort(r.Endpoint) != hostPort(other.Endpoint) {
		return false
	}
	within := func(inner, outer string) bool { return outer == "" || strings.HasPrefix(inner+"/", outer+"/") }
	return within(r.Access.Prefix, other.Access.Prefix) || within(other.Access.Prefix, r.Access.Prefix)
}

// Sharers names the replicas, as registry/region, of other registries than that of p that are its server with repositories in common, and
// that are replicated: what is pushed there is replicated by both registries, if that of p is too.
func (s *Snapshot) Sharers(registry string, p *Replica) []string {
	var names []string
	for _, other := range s.Registries {
		if other.Name == registry || !other.Policy.Replication {
			continue
		}
		for _, q := range other.Replicas {
			if p.overlaps(q) {
				names = append(names, other.Name+"/"+q.Region)
			}
		}
	}
	return names
}

// Match says which clients a rule is for. Exactly one field is set.
type Match struct {
	Prefix    netip.Prefix
	ASN       uint32
	Country   string // ISO 3166-1 alpha-2, upper case
	Continent string // AF AN AS EU NA OC SA
}

// Rule names regions for the clients of a match.
type Rule struct {
	Match   Match
	Regions []string
}
