package daemon

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/api"
	"portolan/health"
	"portolan/router"
	"portolan/topology"
)

// oldDatabase is when the age of a location database is worth a warning: networks move between countries by the month.
const oldDatabase = 90 * 24 * time.Hour

// status is the state of this process.
func (d *daemon) status() api.Status {
	keeper := d.keeper.Status()
	s := api.Status{
		Version: d.version, Started: d.started.UTC(), Roles: d.roles(),
		Store:    api.StoreStatus{Name: d.config.Store.String(), Error: keeper.StoreError},
		Topology: api.TopologyState{Digest: keeper.Digest, Changed: keeper.Changed, Problems: keeper.Problems, Held: keeper.Pending},
		Geo:      d.front.databases().all(),
	}
	if snapshot := d.keeper.Snapshot(); snapshot != nil {
		s.Topology.Registries, s.Topology.Ramps = len(snapshot.Registries), snapshot.Ramps
	}
	view := d.front.current()
	d.mu.Lock()
	if d.declared != nil {
		s.Topology.File, s.Topology.Drift = d.config.Topology, staying(d.drift, view.Requests)
	}
	for _, what := range slices.Sorted(maps.Keys(d.notices)) {
		s.Warnings = append(s.Warnings, d.notices[what])
	}
	d.mu.Unlock()

	if !keeper.Loaded {
		s.NotReady = append(s.NotReady, fmt.Sprintf("there is no topology yet: the store %s cannot be read: %s", s.Store.Name, keeper.StoreError))
	} else if d.server != nil && !d.answering.Load() {
		s.NotReady = append(s.NotReady, "DNS answers once every replica has been probed")
	}
	if d.stopping.Load() {
		s.NotReady = append(s.NotReady, "the server is ending")
	}
	s.Ready = len(s.NotReady) == 0

	if keeper.Loaded && !keeper.StoreUp {
		warning := fmt.Sprintf("the store cannot be read since %s; the last good topology is served: %s", keeper.Since.UTC().Format(time.RFC3339), keeper.StoreError)
		if keeper.StoreLost {
			warning += "; " + api.GiveBack
		}
		s.Warnings = append(s.Warnings, warning)
	}
	s.Warnings = append(s.Warnings, d.disk.warnings()...)
	for _, h := range keeper.Pending {
		s.Warnings = append(s.Warnings, fmt.Sprintf("an edit of registry %s took away %s and is held: %s", h.Registry, strings.Join(h.Missing, ", "), h.Way()))
	}
	if n := len(keeper.Problems); n > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("values of the topology that cannot be used: %d; portolan status lists them", n))
	}
	if n := len(s.Topology.Drift); n > 0 {
		s.Warnings = append(s.Warnings, fmt.Sprintf("the store differs from %s, and holds; keys that differ: %d", s.Topology.File, n))
	}
	for _, g := range s.Geo {
		if age := g.Age(time.Now()); g.Path != "" && age > oldDatabase {
			s.Warnings = append(s.Warnings, fmt.Sprintf("the database %s is %d days old", g.Path, int(age/(24*time.Hour))))
		}
	}
	if d.monitor != nil {
		v := d.monitor.Verdicts()
		s.Voters = v.Voters
		s.Health = &api.HealthStatus{CertificateWarning: int(d.config.Health.CertificateWarning / time.Second)}
		s.Warnings = append(s.Warnings, certificateWarnings(v, d.config.Health.CertificateWarning)...)
		if v.Rival {
			s.Warnings = append(s.Warnings, fmt.Sprintf("another server votes as %s, too, so that the votes of neither count as they should: give each its own health.voter", v.Voters[0].Name))
		}
		for _, voter := range v.Voters {
			if !voter.Fresh {
				s.Warnings = append(s.Warnings, fmt.Sprintf("server %s does not vote: last heard %s", voter.Name, voter.Heard.UTC().Format(time.RFC3339)))
			}
		}
	}
	if d.server != nil {
		s.Warnings = append(s.Warnings, strandedWarnings(view)...)
	}
	s.Warnings = append(s.Warnings, sharedWarnings(view)...)
	s.Replicas = api.Summarize(view)
	s.Warnings = append(s.Warnings, unreadableWarnings(view)...)
	s.Warnings = append(s.Warnings, unreplicatedWarnings(view)...)
	if d.config.API.Listen.Addr().IsLoopback() || d.apiPair != nil {
		// Nobody on the way reads the token.
	} else {
		s.Warnings = append(s.Warnings, "the API is not on loopback and has no TLS (api.tls): its token is sent in the clear")
	}
	if d.server != nil {
		s.DNS = d.dnsStatus()
	}
	if d.handler != nil {
		s.Events = d.eventsStatus()
	}
	return s
}

// staying are the changes but those of replicas that are being deleted: no edit is called for there, and none would be taken.
func staying(changes []topology.Change, requests map[router.ReplicaKey][]string) []topology.Change {
	return slices.DeleteFunc(slices.Clone(changes), func(c topology.Change) bool {
		for replica, asked := range requests {
			prefix := topology.ReplicaPrefix(replica.Registry, replica.Region)
			if slices.Contains(asked, topology.RequestDelete) && strings.HasPrefix(c.Key, prefix) {
				return true
			}
		}
		return false
	})
}

// strandedWarnings names the registries of which clients get no address, all or those behind a fence, by the will of their operators or not.
func strandedWarnings(v *api.View) []string {
	if v.Snapshot == nil {
		return nil
	}
	var warnings []string
	stranded := api.Stranded(v.Snapshot, v.Conditions)
	for _, r := range v.Snapshot.Registries {
		for _, fence := range stranded[r.Name] {
			warnings = append(warnings, fmt.Sprintf("%s get no address: no replica that they may be sent to has routing enabled, a weight above 0 and the content: portolan replica list %s", api.ClientsBehind(r.Name, fence), r.Name))
		}
	}
	return warnings
}

// sharedWarnings names the replicas of different registries that are one: what is pushed to one registry is then replicated by the other
// too.
func sharedWarnings(v *api.View) []string {
	if v.Snapshot == nil {
		return nil
	}
	var warnings []string
	for _, r := range v.Snapshot.Registries {
		if !r.Policy.Replication {
			continue
		}
		for _, p := range r.Replicas {
			own := r.Name + "/" + p.Region
			for _, other := range v.Snapshot.Sharers(r.Name, p) {
				if own < other { // else it was, or will be, told of the other
					warnings = append(warnings, fmt.Sprintf("replicas %s and %s have one endpoint, %s, and repositories in common: what is pushed there is replicated by both registries; give each an access prefix of its own",
						own, other, p.Endpoint))
				}
			}
		}
	}
	return warnings
}

// unreplicatedWarnings names the replicas that do not take all that the others have, or had.
func unreplicatedWarnings(v *api.View) []string {
	return warningsOf(v, func(name string, r topology.Replication) string {
		if r.NotReplicable == 0 {
			return ""
		}
		return fmt.Sprintf("what cannot be replicated to replica %s: %d; portolan replica show %[1]s lists it; if deletes are refused there, set storage.delete.enabled: true in the registry's configuration", name, r.NotReplicable)
	})
}

// unreadableWarnings names the replicas that cannot give all of their content.
func unreadableWarnings(v *api.View) []string {
	return warningsOf(v, func(name string, r topology.Replication) string {
		if r.Unreadable == 0 {
			return ""
		}
		return fmt.Sprintf("replica %s cannot give all of its content, and what is pushed there under the same tags goes nowhere; tags and manifests that cannot be read: %d; portolan replica show %[1]s lists them", name, r.Unreadable)
	})
}

// warningsOf are what is to be said of what the replicator reports of replicas, which are named as the CLI does, in order.
func warningsOf(v *api.View, say func(name string, r topology.Replication) string) []string {
	var warnings []string
	for key, r := range v.Replication {
		if warning := say(key.Registry+"/"+key.Region, r); warning != "" {
			warnings = append(warnings, warning)
		}
	}
	slices.Sort(warnings)
	return warnings
}

// certificateWarnings says which certificates end within that time: one line for each name of a replica, since its addresses
// mostly serve the same, with the address where the end comes first.
func certificateWarnings(v *health.Verdicts, within time.Duration) []string {
	type first struct {
		end     time.Time
		address string
	}
	var warnings []string
	for key, verdict := range v.Replicas {
		ending := map[string]first{}
		for _, a := range verdict.Addresses {
			for _, c := range a.Last.Ending(within) {
				if f, there := ending[c.Name]; !there || c.Expiry.Before(f.end) {
					ending[c.Name] = first{c.Expiry, a.String()}
				}
			}
		}
		for name, f := range ending {
			word := "ends"
			if f.end.Before(v.Time) {
				word = "ended"
			}
			warnings = append(warnings, fmt.Sprintf("the certificate of %s/%s for %s at %s %s on %s: renew it there", key.Registry, key.Region, name, f.address, word, f.end.UTC().Format(time.DateTime+" MST")))
		}
	}
	slices.Sort(warnings)
	return warnings
}

func (d *daemon) dnsStatus() *api.DNSStatus {
	c := d.config.DNS
	s := &api.DNSStatus{
		Zone: mdns.CanonicalName(c.Zone), TTLMin: int(c.TTL.Min / time.Second), TTLMax: int(c.TTL.Max / time.Second),
		Nameservers: map[string][]string{}, Listen: []string{}, Problems: d.server.Problems(),
	}
	for _, a := range d.server.Addresses() {
		s.Listen = append(s.Listen, a.String())
	}
	for name, addresses := range c.Nameservers {
		if !strings.HasSuffix(name, ".") {
			name += "." + s.Zone
		}
		list := []string{}
		for _, a := range addresses {
			list = append(list, a.String())
		}
		s.Nameservers[mdns.CanonicalName(name)] = list
	}
	return s
}

// eventsStatus counts the events of each replica since the start, as the handler's own metric has them.
func (d *daemon) eventsStatus() *api.EventsStatus {
	s := &api.EventsStatus{URL: d.eventsURL(), Received: map[string]uint64{}, Ignored: map[string]uint64{}}
	families, err := d.eventMetrics.Gather()
	if err != nil {
		return s
	}
	for _, f := range families {
		if f.GetName() != "portolan_events_received_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			var registry, region, kind string
			for _, l := range m.GetLabel() {
				switch l.GetName() {
				case "registry":
					registry = l.GetValue()
				case "region":
					region = l.GetValue()
				case "kind":
					kind = l.GetValue()
				}
			}
			n := uint64(m.GetCounter().GetValue())
			s.Received[registry+"/"+region] += n
			if kind == "ignored" {
				s.Ignored[registry+"/"+region] += n
			}
		}
	}
	return s
}
