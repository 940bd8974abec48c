package topology

import (
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"portolan/store"
)

// The store's rooms: what operators edit, and what the daemons write. Each has a watch of its own.
const (
	RegistriesPrefix = "registries/"
	StatePrefix      = "state/"
	// ReplicaStatesPrefix is where the state of replicas stands.
	ReplicaStatesPrefix = StatePrefix + "registries/"
)

// Status is the state of a replica's content.
type Status string

// The values of Status.
const (
	// Creating: declared, not yet looked at.
	Creating Status = "Creating"
	// Syncing: content that was decided before is still on its way.
	Syncing Status = "Syncing"
	// Ready: every version decided before a scan began is applied, or listed as not replicable.
	Ready Status = "Ready"
	// Degraded: something needs an operator or a repair; the reason says what.
	Degraded Status = "Degraded"
	// Deleting: drained and about to leave.
	Deleting Status = "Deleting"
)

// Phase is how much is known of what a replica holds.
type Phase string

// The phases of an incarnation.
const (
	// PhaseUnknown: nothing is known; a baseline must scan it.
	PhaseUnknown Phase = "unknown"
	// PhasePlanned: the baseline's plan has conflicts and waits for the operator's accept.
	PhasePlanned Phase = "planned"
	// PhaseSeeding: the baseline is decided, and what the replica lacks is being written down.
	PhaseSeeding Phase = "seeding"
	// PhaseBaselined: what is not recorded as lagging is applied.
	PhaseBaselined Phase = "baselined"
)

// Replication is what the replicator reports of a replica. It is stored as one JSON value at ReplicationKey, written
// only by the holder of the replica's lease.
type Replication struct {
	Status Status `json:"status"`
	// Reason says why the status is not Ready, in a sentence for people.
	Reason string `json:"reason,omitempty"`
	// Seeded is whether this incarnation has been Ready once: only then it gets clients.
	Seeded bool `json:"seeded"`
	// Incarnation is the random id of what stands at Endpoint; applied state belongs to it, never to the region's name.
	Incarnation string `json:"incarnation"`
	Endpoint    string `json:"endpoint"`
	// Prefix is that of repository names at Endpoint: another prefix is other content.
	Prefix string `json:"prefix,omitempty"`
	// Epoch names the ledger's life to which the incarnation belongs: a ledger that was lost or rolled back begins another.
	Epoch string `json:"epoch,omitempty"`
	Phase Phase  `json:"phase"`
	// Former says that the content was decided before, under an earlier incarnation: pushes may have been accepted there that no
	// other replica has.
	Former bool `json:"former,omitempty"`
	// Served says that an earlier incarnation was seeded, wherever its endpoint was: clients may have been sent to the replica.
	Served bool `json:"served,omitempty"`
	// Held is why the guard holds back what is observed at the replica, until an operator decides; empty if it does not.
	Held string `json:"held,omitempty"`
	// Pending counts the versions still to be applied.
	Pending int `json:"pending"`
	// OldestPending is when the oldest of them was decided; zero if there is none. The lag is the time since.
	OldestPending time.Time `json:"oldest_pending,omitzero"`
	// NotReplicable counts what can never go there; Conflicts what was kept aside.
	NotReplicable int `json:"not_replicable"`
	// Unreadable counts the tags and manifests that cannot be read there: whatever is pushed to them goes nowhere.
	Unreadable int `json:"unreadable,omitempty"`
	Conflicts  int `json:"conflicts"`
	// Plan is that of the newest baseline, also after it was carried out.
	Plan      *Plan     `json:"plan,omitempty"`
	LastScan  time.Time `json:"last_scan,omitzero"`
	LastError string    `json:"last_error,omitempty"`
	Updated   time.Time `json:"updated"`
}

// Plan counts what a baseline would do.
type Plan struct {
	// Repositories and Tags are what the replica holds. Of those tags, Same are equal already, Adopt are found only here and go
	// everywhere else, Conflicts differ from a version that wins; the others have an older version, or one that was deleted.
	Repositories int `json:"repositories"`
	Tags         int `json:"tags"`
	Same         int `json:"same"`
	Adopt        int `json:"adopt"`
	Conflicts    int `json:"conflicts"`
	// Copy are the tags to be copied to this replica, whether it holds others under their names or not: the winners of conflicts too.
	Copy int `json:"copy"`
	// Spread are the tags to be copied from this replica to the others: what only it has, and what is kept of its conflicts.
	Spread int `json:"spread"`
	// Bytes is the size of the unique blobs to be copied as far as manifests tell; blobs that are mounted count too.
	Bytes int64 `json:"bytes"`
	// Conflicting are up to ten of the Conflicts.
	Conflicting []PlannedConflict `json:"conflicting,omitempty"`
}

// PlannedConflict is a tag of which a replica has another version than the others, which wins.
type PlannedConflict struct {
	Repository string `json:"repository"`
	Tag        string `json:"tag"`
	// Winner is the digest that stays, WinnerRegion where it was pushed.
	Winner       string `json:"winner"`
	WinnerRegion string `json:"winner_region"`
	// Loser is the digest at the replica.
	Loser       string `json:"loser"`
	LoserRegion string `json:"loser_region"`
	// KeptAs is the tag that Loser gets, in all regions; empty if conflicts are only logged.
	KeptAs string `json:"kept_as,omitempty"`
}

// Request is what an operator asked of a replica through the API; the replicator carries it out and removes it.
type Request struct {
	Time time.Time `json:"time"`
	// Force lets a delete go on although pushes would be lost.
	Force bool `json:"force,omitempty"`
	// Actor says who asked, as far as known.
	Actor string `json:"actor,omitempty"`
}

// The verbs of requests.
const (
	RequestDelete = "delete"
	RequestResync = "resync"
	RequestAccept = "accept"
)

// ReplicationKey is where the replicator reports of a replica.
func ReplicationKey(registry, region string) string {
	return ReplicaStatesPrefix + registry + "/replicas/" + region + "/replication"
}

// RequestKey is where the API leaves a request for the replicator.
func RequestKey(registry, region, verb string) string {
	return ReplicaStatesPrefix + registry + "/replicas/" + region + "/request/" + verb
}

// VotesPrefix is where servers vote on the health of replicas. Votes are written every few seconds, so they stand apart, too.
const VotesPrefix = StatePrefix + "votes/"

// VoteKey is where the server that calls itself voter does.
func VoteKey(voter string) string { return VotesPrefix + voter }

// LeaseKey is the lease for writes to one replica. Leases are renewed every other second, so they stand apart from what is
// watched.
func LeaseKey(registry, region string) string {
	return StatePrefix + "leases/" + registry + "/" + region
}

// rampsLease is the lease of the one process that carries out the ramps of weights. No replica has such a key.
const rampsLease = StatePrefix + "leases/ramps"

// ConfirmedKey holds the regions, comma-separated and sorted, that an operator confirmed as all of a registry's, or "-" if it
// is gone: the guard against huge raw deletions lets that set pass once.
func ConfirmedKey(registry string) string { return confirmedPrefix + registry }

// What the topology itself keeps in the store's state has a room of its own, for it must be watched, and the replicas'
// state changes all the time.
const (
	topologyPrefix  = StatePrefix + "topology/"
	confirmedPrefix = topologyPrefix + "confirmed/"
	// changedKey holds the time of the newest committed change (RFC 3339, whole seconds, UTC); digestKey what it changed to.
	changedKey = topologyPrefix + "changed"
	digestKey  = topologyPrefix + "digest"
)

// ReplicaName names a replica.
type ReplicaName struct{ Registry, Region string }

// State is what the daemons report, and operators asked, of replicas. It is immutable.
type State struct {
	Replications map[ReplicaName]Replication
	// Requests are the verbs of those that the replicator has not finished, sorted.
	Requests map[ReplicaName][]string
	// Problems are values that could not be read; they count as absent.
	Problems []Problem
}

// ParseState reads the state of replicas out of what stands below ReplicaStatesPrefix. Other keys are not
// looked at.
func ParseState(t store.Tree) *State {
	s := &State{Replications: map[ReplicaName]Replication{}, Requests: map[ReplicaName][]string{}}
	for _, e := range t.Entries {
		rest, ok := strings.CutPrefix(e.Key, ReplicaStatesPrefix)
		parts := strings.Split(rest, "/")
		if !ok || len(parts) < 4 || parts[1] != "replicas" {
			continue
		}
		name := ReplicaName{parts[0], parts[2]}
		var err error
		switch {
		case len(parts) == 4 && parts[3] == "replication":
			var r Replication
			if err = json.Unmarshal([]byte(e.Value), &r); err == nil {
				s.Replications[name] = r
			}
		case len(parts) == 5 && parts[3] == "request":
			if err = json.Unmarshal([]byte(e.Value), &Request{}); err == nil {
				s.Requests[name] = append(s.Requests[name], parts[4]) // in the order of keys
			}
		}
		if err != nil {
			s.Problems = append(s.Problems, Problem{Key: e.Key, Value: clip(e.Value), Reason: fmt.Sprintf("is not the JSON that a daemon writes: %v", err), Effect: "it counts as absent"})
		}
	}
	return s
}
