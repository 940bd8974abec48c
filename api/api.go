// Package api is the HTTP API of operators: its JSON types, the server and the client.
//
// The server reads what the daemon knows and hands edits and requests on; it decides nothing and stores nothing itself. The
// command line speaks to it through Client. Everything is below /v1, JSON both ways; docs/cli.md and
// docs/configuration.md are for its users.
package api

import (
	"time"

	"portolan/health"
	"portolan/replicator"
	"portolan/router"
	"portolan/router/geo"
	"portolan/topology"
)

// The values of Replica.Routing.
const (
	RoutingEnabled  = "enabled"
	RoutingDisabled = "disabled"
)

// Registry is a registry with what is known of it.
type Registry struct {
	Name string `json:"name"`
	// FQDN is the one name, in the zone of the server's front door; empty without one.
	FQDN string `json:"fqdn,omitempty"`
	Home string `json:"home"`
	// ClientNames are the names that clients use for it.
	ClientNames []string `json:"names,omitempty"`
	// Document is what operators declared.
	Document topology.RegistryDocument `json:"document"`
	// Held is a raw edit that the guard holds until it is confirmed.
	Held     *topology.Pending `json:"held,omitempty"`
	Replicas []Replica         `json:"replicas"`
}

// Replica is a replica with what is known of it.
type Replica struct {
	Registry string `json:"registry"`
	Region   string `json:"region"`
	Home     bool   `json:"home"`
	Endpoint string `json:"endpoint,omitempty"`
	// Addresses are what answers hand out; Hostname instead where it is a CNAME.
	Addresses []string `json:"addresses,omitempty"`
	Hostname  string   `json:"hostname,omitempty"`
	// Location is the city, where the catalogue of regions has it, and else the coordinates.
	Location    string                `json:"location,omitempty"`
	Coordinates *topology.Coordinates `json:"coordinates,omitempty"`
	Status      topology.Status       `json:"status"`
	// Health is Healthy, Unhealthy or Unknown.
	Health  string `json:"health"`
	Routing string `json:"routing"`
	Weight  int    `json:"weight"`
	// Ramp is how Weight, which is that of the moment, goes on to another; absent where it stays.
	Ramp  *topology.Ramp `json:"ramp,omitempty"`
	Probe string         `json:"probe"`
	// Pending counts the versions still to be applied there.
	Pending int `json:"pending"`
	// Reason says in a sentence what keeps the replica from being Ready and Healthy; empty if nothing does.
	Reason string `json:"reason,omitempty"`
	// SharedWith are the replicas of other registries, as registry/region, that are the same server with repositories in common: what is
	// pushed there is replicated by both registries.
	SharedWith []string `json:"shared_with,omitempty"`
	// Rules are the orders and fences that name its region, as orders/country/BR. They lose it when the replica is deleted; an order that
	// names nothing else goes with it.
	Rules []string `json:"rules,omitempty"`
	// Requests are what operators asked for and the replicator has not finished: delete, resync, accept.
	Requests []string `json:"requests,omitempty"`
	// Replication is what the replicator reports; absent before it looked.
	Replication *topology.Replication `json:"replication,omitempty"`
	// Probes are the last results of each address, on a server that probes.
	Probes []Probe `json:"probes,omitempty"`
}

// Probe is the last result of one address.
type Probe struct {
	// Target is the address, or the host name, or "canary" and the image.
	Target string `json:"target"`
	// Health is what counts; Own what the probes of the server that was asked found, since Since.
	Health string    `json:"health"`
	Own    string    `json:"own"`
	Since  time.Time `json:"since,omitzero"`
	// Rise is how many probes in a row must pass for Own to be Healthy again: more than usual after relapses. 0 unless it is down.
	Rise int `json:"rise,omitempty"`
	// Votes are what servers say, that one first; absent while no other is heard.
	Votes []health.Vote `json:"votes,omitempty"`
	// Last is when it was probed; zero before the first time.
	Last time.Time `json:"last,omitzero"`
	// LatencyMS is how long that took, in milliseconds.
	LatencyMS float64 `json:"latency_ms"`
	// Outcome is passed, failed or unable.
	Outcome string `json:"outcome"`
	Error   string `json:"error,omitempty"`
	// CertificateExpiry is the earliest end of validity of what the client names got; absent without TLS.
	CertificateExpiry time.Time `json:"certificate_expiry,omitzero"`
	// Certificates are what each of them got.
	Certificates []health.Certificate `json:"certificates,omitempty"`
}

// ReplicaPatch changes a replica; what is nil stays as it is. An empty string or list removes the key, so that its default holds.
type ReplicaPatch struct {
	Endpoint  *string    `json:"endpoint,omitempty"`
	Addresses *[]string  `json:"addresses,omitempty"`
	Hostname  *string    `json:"hostname,omitempty"`
	Location  *[]float64 `json:"location,omitempty"`
	Weight    *int       `json:"weight,omitempty"`
	// Over is the time, such as 30m, over which Weight comes about little by little, or, where Routing is enabled, the weight there is.
	// Without it a weight holds at once; with either a ramp under way ends.
	Over        string  `json:"over,omitempty"`
	Routing     *string `json:"routing,omitempty"`
	Probe       *string `json:"probe,omitempty"`
	Canary      *string `json:"canary,omitempty"`
	Credentials *string `json:"credentials,omitempty"`
	CA          *string `json:"ca,omitempty"`
	ClientCert  *string `json:"client_cert,omitempty"`
	Prefix      *string `json:"prefix,omitempty"`
	Realms      *string `json:"realms,omitempty"`
}

// RegistryPatch changes a registry itself; what is nil stays as it is. An empty string or list removes the key, so that its default holds.
type RegistryPatch struct {
	// Home is the region of one of its replicas; it cannot be empty.
	Home        *string   `json:"home,omitempty"`
	Names       *[]string `json:"names,omitempty"`
	AllDown     *string   `json:"all_down,omitempty"`
	Replication *string   `json:"replication,omitempty"`
	MaxLag      *string   `json:"max_lag,omitempty"`
	Merge       *string   `json:"merge,omitempty"`
}

// Apply makes a document the topology of the registries that it names.
type Apply struct {
	Document topology.Document `json:"document"`
	// DryRun only tells what would change.
	DryRun bool `json:"dry_run,omitempty"`
	// Prune begins the deletion of replicas that the document does not name.
	Prune bool `json:"prune,omitempty"`
	// Force applies it although clients that get an address now would get none, or what answers at a new endpoint is no registry.
	Force bool `json:"force,omitempty"`
}

// Applied is what an Apply, or an edit of one registry or replica, changed, and what becomes of the clients.
type Applied struct {
	Changes []topology.Change `json:"changes"`
	// Shares tells, for the registries that changed, where the clients nearest to each region go.
	Shares []RegistryShares `json:"shares,omitempty"`
	// Ramps are the weights that change over time by what was changed. The shares are those at their end.
	Ramps []topology.Ramp `json:"ramps,omitempty"`
	// Drains are the replicas to which no clients are sent any more by what was changed, at once or at the end of a ramp.
	Drains []Drain `json:"drains,omitempty"`
	// Restored says that the store had lost its keys, and has the document's now: Changes are then those of what is served.
	Restored bool `json:"restored,omitempty"`
	// Refusal is, of a dry run, why it would be refused without Force; empty if it would not.
	Refusal string `json:"refusal,omitempty"`
}

// Pruned names the replicas whose deletion the edit begins, as registry/region.
func (a Applied) Pruned() []string {
	var names []string
	for _, c := range a.Changes {
		if registry, region, field, ok := partsOf(c.Key); ok && field == "" && c.Op == topology.Removed {
			names = append(names, registry+"/"+region)
		}
	}
	return names
}

// Drain is a replica that clients leave.
type Drain struct {
	// Replica is registry/region.
	Replica string `json:"replica"`
	// Until is when the last answer that names it expires. Resolvers that keep answers longer than they should may send clients
	// there even then.
	Until time.Time `json:"until"`
}

// RegistryShares are the shares of one registry.
type RegistryShares struct {
	Registry string         `json:"registry"`
	Splits   []router.Split `json:"splits"`
}

// Explanation is a decision with its reasons, as the server's front door makes it.
type Explanation struct {
	router.Explanation
	// TTL is how long the answer may be kept, in seconds.
	TTL int `json:"ttl"`
	// Topology is the digest of the snapshot that it was made of.
	Topology string `json:"topology"`
}

// Status is the state of the server that was asked.
type Status struct {
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Roles   []string  `json:"roles"`
	Ready   bool      `json:"ready"`
	// NotReady says why it is not ready.
	NotReady []string `json:"not_ready,omitempty"`
	// Warnings are what an operator should look at.
	Warnings []string      `json:"warnings,omitempty"`
	Store    StoreStatus   `json:"store"`
	Topology TopologyState `json:"topology"`
	DNS      *DNSStatus    `json:"dns,omitempty"`
	Geo      []geo.Info    `json:"geo,omitempty"`
	Events   *EventsStatus `json:"events,omitempty"`
	// Health is absent on a server that does not probe.
	Health *HealthStatus `json:"health,omitempty"`
	// Voters are the servers that vote on the health of replicas, the one that was asked first; absent where there are no votes.
	Voters []health.Voter `json:"voters,omitempty"`
	// Replicas is how those of each registry are.
	Replicas []ReplicaSummary `json:"replicas,omitempty"`
}

// ReplicaSummary is how the replicas of one registry are, of those that are served.
type ReplicaSummary struct {
	Registry string `json:"registry"`
	Total    int    `json:"total"`
	// Healthy and Unhealthy are by the probes; of the others nothing is known here.
	Healthy   int `json:"healthy"`
	Unhealthy int `json:"unhealthy"`
	// Troubled are the replicas that need somebody's attention.
	Troubled []TroubledReplica `json:"troubled,omitempty"`
}

// TroubledReplica is what is wrong with a replica.
type TroubledReplica struct {
	Region string `json:"region"`
	// State is Unhealthy, Degraded, both, or what the replica waits for.
	State  string `json:"state"`
	Reason string `json:"reason,omitempty"`
}

// StoreStatus is the state of the store.
type StoreStatus struct {
	// Name is the store as it is configured.
	Name string `json:"name"`
	// Error says why it cannot be read; what is served then is the last good topology.
	Error string `json:"error,omitempty"`
}

// TopologyState is what topology the server answers from.
type TopologyState struct {
	// Digest is equal on servers that answer alike.
	Digest string `json:"digest"`
	// Changed is the time of the newest committed change.
	Changed    time.Time `json:"changed,omitzero"`
	Registries int       `json:"registries"`
	// Ramps are the weights that change over time.
	Ramps    []topology.Ramp    `json:"ramps,omitempty"`
	Problems []topology.Problem `json:"problems,omitempty"`
	Held     []topology.Pending `json:"held,omitempty"`
	// File is the topology file of the configuration; Drift what the store has otherwise.
	File  string            `json:"file,omitempty"`
	Drift []topology.Change `json:"drift,omitempty"`
}

// DNSStatus is the state of the DNS server.
type DNSStatus struct {
	// Zone is fully qualified.
	Zone   string   `json:"zone"`
	Listen []string `json:"listen"`
	// Nameservers are the zone's, fully qualified, with the addresses of those inside it.
	Nameservers map[string][]string `json:"nameservers"`
	TTLMin      int                 `json:"ttl_min"`
	TTLMax      int                 `json:"ttl_max"`
	Problems    []topology.Problem  `json:"problems,omitempty"`
}

// HealthStatus is how the server probes.
type HealthStatus struct {
	// CertificateWarning is how long before its end a certificate is warned of, in seconds; 0: only when it is over.
	CertificateWarning int `json:"certificate_warning"`
}

// EventsStatus is the state of the events listener.
type EventsStatus struct {
	URL string `json:"url"`
	// Received counts, by registry/region, the events since the start, those of no interest included.
	Received map[string]uint64 `json:"received,omitempty"`
	// Ignored counts those of no interest among them: pulls, mounts, blobs, and what is outside of the replica's prefix.
	Ignored map[string]uint64 `json:"ignored,omitempty"`
}

// EventsToken is what a replica needs to send its notifications.
type EventsToken struct {
	URL   string `json:"url"`
	Token string `json:"token"`
}

// Inspection is what is known of a reference in every replica.
type Inspection = replicator.Inspection

// ReplicaInspection is what is known of it in one replica.
type ReplicaInspection = replicator.ReplicaInspection

// PendingItem is something that is still to be applied to a replica, or never will be.
type PendingItem = replicator.PendingItem

// Unreplicated is what would stay in one replica alone if its registry were deleted.
type Unreplicated = replicator.Unreplicated

// Conflict is a version that lost against a concurrent one and is kept under a tag of its own.
type Conflict = replicator.Conflict
