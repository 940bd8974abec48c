package api

import (
	"fmt"
	"net/url"
	"slices"
	"strings"

	"portolan/router"
	"portolan/topology"
	"portolan/topology/regions"
)

// describe puts together what is declared of a registry and what is known of it.
func (s *server) describe(v *View, declared topology.RegistryDocument) Registry {
	r := Registry{Name: declared.Name, Home: declared.Home, ClientNames: declared.Names, Document: declared, Replicas: []Replica{}}
	if s.Zone != "" {
		r.FQDN = strings.TrimSuffix(declared.Name+"."+s.Zone, ".")
	}
	for _, h := range v.Held {
		if h.Registry == declared.Name {
			r.Held = &h
		}
	}
	var served *topology.Registry
	if v.Snapshot != nil {
		served = v.Snapshot.Registry(declared.Name)
	}
	for _, d := range declared.Replicas {
		r.Replicas = append(r.Replicas, describeReplica(v, declared, served, d))
	}
	return r
}

func describeReplica(v *View, declared topology.RegistryDocument, served *topology.Registry, d topology.ReplicaDocument) Replica {
	key := router.ReplicaKey{Registry: declared.Name, Region: d.Region}
	r := Replica{
		Registry: declared.Name, Region: d.Region, Home: d.Region == declared.Home, Endpoint: d.Endpoint, Addresses: d.Addresses,
		Hostname: d.Hostname, Routing: RoutingEnabled, Weight: 100, Status: topology.Creating, Health: router.Unknown.String(),
		Requests: v.Requests[key], SharedWith: sharedWith(v, declared, d), Rules: declared.Naming(d.Region),
	}
	if d.Routing != "" {
		r.Routing = d.Routing
	}
	if d.Weight != nil {
		r.Weight = *d.Weight
	}
	if r.Ramp = topology.RampOf(v.Ramps, declared.Name, d.Region); r.Ramp != nil {
		r.Weight = r.Ramp.From
	}
	region, catalogued := regions.Lookup(d.Region)
	if len(d.Location) == 2 {
		r.Coordinates = &topology.Coordinates{Latitude: d.Location[0], Longitude: d.Location[1]}
	} else if catalogued {
		r.Coordinates = &topology.Coordinates{Latitude: region.Latitude, Longitude: region.Longitude}
	}
	if r.Coordinates != nil {
		r.Location = r.Coordinates.String()
		if catalogued && *r.Coordinates == (topology.Coordinates{Latitude: region.Latitude, Longitude: region.Longitude}) {
			r.Location = region.City
		}
	}
	var reasons []string
	if served == nil || served.Replica(d.Region) == nil {
		why := problemOf(v, topology.ReplicaPrefix(declared.Name, d.Region))
		if why == "" && served == nil {
			why = problemOf(v, topology.RegistriesPrefix+declared.Name+"/")
		}
		if why == "" {
			reasons = append(reasons, "not served yet: this server is about to take up the topology that names it")
		} else {
			reasons = append(reasons, "not served: "+why)
		}
	} else {
		p := served.Replica(d.Region)
		r.Probe = p.Probe.String()
		// A bad value in the store is not in the document, and keeps the last good one in force. A good one is in force in a moment.
		if d.Weight == nil && r.Ramp == nil {
			r.Weight = p.Weight
		}
		if d.Routing == "" && !p.Routing {
			r.Routing = RoutingDisabled
		}
		reasons = append(reasons, r.replication(v, key, served, p)...)
	}
	if slices.Contains(r.Requests, topology.RequestDelete) {
		if r.Status != topology.Deleting {
			if r.Replication != nil { // what it reported matters no more
				reasons = nil
			}
			reasons = append(reasons, "no more clients are sent there; a replicator is to take it out")
		}
		// Of which a raw edit of the store cannot say otherwise.
		r.Status, r.Routing = topology.Deleting, RoutingDisabled
	} else if r.Status == topology.Ready && slices.Contains(r.Requests, topology.RequestResync) {
		// Whoever asks for a new baseline and waits for Ready means the one after it.
		r.Status, reasons = topology.Creating, append(reasons, "a new baseline was asked for")
	}
	if v.Conditions[key].Held {
		reasons = append(reasons, "clients are sent elsewhere until then")
	}
	if v.Conditions[key].Lagging {
		reasons = append(reasons, "its clients are sent elsewhere while a healthy replica lags less (policy.max_lag)")
	}
	reasons = append(reasons, r.health(v, key)...)
	r.Reason = strings.Join(reasons, "; ")
	return r
}

// sharedWith names the replicas of other registries that are the server of d, with repositories in common. It may not be served yet.
func sharedWith(v *View, declared topology.RegistryDocument, d topology.ReplicaDocument) []string {
	endpoint, err := url.Parse(d.Endpoint)
	if err != nil || d.Endpoint == "" || v.Snapshot == nil || declared.Policy.Replication == "disabled" {
		return nil
	}
	return v.Snapshot.Sharers(declared.Name, &topology.Replica{Endpoint: endpoint, Access: topology.Access{Prefix: d.Prefix}})
}

// replication fills in the status, and says what keeps it from being Ready.
func (r *Replica) replication(v *View, key router.ReplicaKey, served *topology.Registry, p *topology.Replica) []string {
	if !served.Policy.Replication {
		r.Status = topology.Ready
		return nil
	}
	report, ok := v.Replication[key]
	switch {
	case !ok && v.StoreDown:
		return []string{"what the replicator reported of it cannot be read while the store is away"}
	case !ok:
		return []string{"no replicator has looked at it yet"}
	case report.Endpoint != p.Endpoint.String():
		return []string{"its endpoint changed, and no replicator has looked at the new one yet"}
	}
	r.Replication, r.Status, r.Pending = &report, report.Status, report.Pending
	var reasons []string
	switch {
	case slices.Contains(r.Requests, topology.RequestAccept) && (report.Phase == topology.PhasePlanned || report.Held != ""):
		reasons = append(reasons, "it was accepted, and goes on by itself") // what was reported asks for just that
	case report.Reason != "":
		reasons = append(reasons, report.Reason)
	case report.NotReplicable > 0:
		reasons = append(reasons, fmt.Sprintf("%d not replicable", report.NotReplicable))
	}
	if report.Unreadable > 0 {
		reasons = append(reasons, fmt.Sprintf("%d unreadable there, whose pushes go nowhere", report.Unreadable))
	}
	return reasons
}

// health fills in what probes found, and says what is wrong.
func (r *Replica) health(v *View, key router.ReplicaKey) []string {
	if v.Verdicts == nil {
		return nil
	}
	verdict, ok := v.Verdicts.Replicas[key]
	if !ok {
		return nil
	}
	r.Health = verdict.Health.String()
	probed := verdict.Addresses
	if verdict.Canary != nil {
		probed = append(slices.Clone(probed), *verdict.Canary)
	}
	for _, a := range probed {
		p := Probe{
			Target: a.String(), Health: a.Health.String(), Own: a.Own.String(), Since: a.Since, Rise: a.Rise, Votes: a.Votes, Last: a.Last.Time, Outcome: a.Last.Outcome.String(), Error: a.Last.Error,
			LatencyMS: float64(a.Last.Latency.Microseconds()) / 1000, CertificateExpiry: a.Last.CertificateExpiry(), Certificates: a.Last.Certificates,
		}
		r.Probes = append(r.Probes, p)
	}
	switch {
	case verdict.Health != router.Healthy && verdict.Reason != "":
		return []string{verdict.Reason}
	case len(verdict.Down) > 0:
		down := make([]string, len(verdict.Down))
		for i, a := range verdict.Down {
			down[i] = a.String()
		}
		return []string{"left out of answers: " + strings.Join(down, ", ")}
	}
	return nil
}

// Summarize says of each registry how its replicas are.
func Summarize(v *View) []ReplicaSummary {
	if v.Snapshot == nil {
		return nil
	}
	var summaries []ReplicaSummary
	for _, served := range v.Snapshot.Registries {
		sum := ReplicaSummary{Registry: served.Name, Total: len(served.Replicas)}
		for _, p := range served.Replicas {
			r := describeReplica(v, topology.RegistryDocument{Name: served.Name, Home: served.Home}, served, topology.ReplicaDocument{Region: p.Region})
			var states []string
			switch r.Health {
			case router.Healthy.String():
				sum.Healthy++
			case router.Unhealthy.String():
				sum.Unhealthy++
				states = append(states, r.Health)
			}
			switch {
			case r.Status == topology.Degraded:
				states = append(states, string(r.Status))
			case r.Status != topology.Deleting && r.Replication != nil && r.Replication.Phase == topology.PhasePlanned && !slices.Contains(r.Requests, topology.RequestAccept):
				states = append(states, "waiting for an operator")
			}
			if len(states) > 0 {
				sum.Troubled = append(sum.Troubled, TroubledReplica{Region: p.Region, State: strings.Join(states, " and "), Reason: r.Reason})
			}
		}
		summaries = append(summaries, sum)
	}
	return summaries
}
