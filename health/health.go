// Package health finds out which replicas can serve, by probing what clients use.
//
// What is probed is every address that answers hand out, on the endpoint's port, with each client name as SNI and Host,
// certificate verified; and, where one is named, an image that is really read, the canary. Results move small state machines (machine): down after Fall failures that are asked for in quick
// succession, up after Rise successes at the ordinary pace, or more of them after relapses, so that a dead replica is left soon
// and a flapping one is not believed too early. The machines are pure; the prober does the I/O; the Monitor owns the goroutines between them and
// publishes immutable Verdicts.
//
// Several servers are several vantage points: each writes what it found into the store (ballot), and where three or more are
// heard the majority decides (agree). The package decides nothing about clients (router), and its votes are all that it writes
// to the store.
package health

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"time"

	"portolan/router"
	"portolan/topology"
)

// Source delivers the topology: the newest snapshot at once, and after each change.
type Source interface {
	Watch(ctx context.Context, deliver func(*topology.Snapshot)) error
}

// Outcome is what one probe says.
type Outcome uint8

// The outcomes of a probe.
const (
	// Unable: the probe could not be made for a reason that lies here (no route from this machine, an unreadable CA file, no
	// Consul). It says nothing about the replica, so it moves nothing; but that an address stood is forgotten when nothing else is
	// heard of it for long.
	Unable Outcome = iota
	// Failed: the replica did not answer as it should.
	Failed
	// Passed: it did.
	Passed
)

// String is the outcome's word in metrics and logs.
func (o Outcome) String() string {
	switch o {
	case Passed:
		return "passed"
	case Failed:
		return "failed"
	}
	return "unable"
}

// MarshalText writes the outcome's word.
func (o Outcome) MarshalText() ([]byte, error) { return []byte(o.String()), nil }

// Result is what the last probe of an address found.
type Result struct {
	// Time is when the probe began; zero if there was none yet.
	Time time.Time `json:"time,omitzero"`
	// Latency is how long it took, over all client names.
	Latency time.Duration `json:"latency_ns"`
	Outcome Outcome       `json:"outcome"`
	// Error says why it did not pass.
	Error string `json:"error,omitempty"`
	// Certificates are what the client names got, in their order; none without TLS.
	Certificates []Certificate `json:"certificates,omitempty"`
}

// Certificate is what one client name got.
type Certificate struct {
	Name string `json:"name"`
	// Expiry is when it stops being accepted: the end of validity of it or of what leads to its root.
	Expiry time.Time `json:"expiry"`
}

// Ending are the certificates that, when they were seen, had less than left to live.
func (r *Result) Ending(left time.Duration) (ending []Certificate) {
	for _, c := range r.Certificates {
		if c.Expiry.Sub(r.Time) < left {
			ending = append(ending, c)
		}
	}
	return ending
}

// CertificateExpiry is the earliest end of validity among the certificates; zero without any.
func (r *Result) CertificateExpiry() (first time.Time) {
	for _, c := range r.Certificates {
		if first.IsZero() || c.Expiry.Before(first) {
			first = c.Expiry
		}
	}
	return first
}

// Address is the state of one address of a replica.
type Address struct {
	// Address is what answers hand out; the zero Addr for a replica with a host name.
	Address netip.Addr `json:"address,omitzero"`
	// Hostname is set instead for a replica with a host name, which has one such entry.
	Hostname string `json:"hostname,omitempty"`
	// Canary is set instead for what is no address but an image of the replica that is really read.
	Canary string `json:"canary,omitempty"`
	// Health is what counts: what the votes come to, and without them what Own is.
	Health router.Health `json:"-"`
	// Own is what the probes of this server found; Since is when that began.
	Own   router.Health `json:"-"`
	Since time.Time     `json:"since,omitzero"`
	// Settled is false before the first result, while probes speak against Own, and for a moment when votes speak against it.
	Settled bool   `json:"settled"`
	Last    Result `json:"last"`
	// Rise is how many probes in a row must pass for Own to be Healthy again: more than usual after relapses. 0 unless it is down.
	Rise int `json:"rise,omitempty"`
	// Votes are what servers say that do not abstain, this one first; empty while no other is heard.
	Votes []Vote `json:"votes,omitempty"`
}

// String is the address, or the host name without its final dot, or "canary" and its name.
func (a Address) String() string {
	if a.Canary != "" {
		return "canary " + a.Canary
	}
	if a.Address.IsValid() {
		return a.Address.String()
	}
	return strings.TrimSuffix(a.Hostname, ".")
}

// Verdict is what is known of one replica.
type Verdict struct {
	// Health is Healthy when an address is known to stand, Unhealthy when all that can be asked from here are down, or all IPv4
	// addresses whatever else stands.
	Health router.Health
	// Down are the dead addresses while another one stands; empty when Health is Unhealthy.
	Down []netip.Addr
	// Settled is whether every address is.
	Settled bool
	// Reason says why Health is not Healthy, in words for people.
	Reason    string
	Addresses []Address
	// Canary is the state of the replica's canary; nil if it has none. While that is Unhealthy the replica is.
	Canary *Address
}

// Outvoted is whether what counts is not what the probes of this server found.
func (a Address) Outvoted() bool { return a.Health != a.Own }

// Verdicts are the verdicts on all replicas at one moment. Immutable: nobody may modify what it holds.
type Verdicts struct {
	Time     time.Time
	Replicas map[router.ReplicaKey]Verdict
	// Voters are the servers whose ballots are known, this one first; nil where there are no votes.
	Voters []Voter
	// Rival is whether another server votes under this one's name, which makes both of no use.
	Rival bool
}

// Conditions gives the verdicts in the router's terms. Seeded is not health's to know: the caller fills it in.
func (v *Verdicts) Conditions() router.Conditions {
	c := make(router.Conditions, len(v.Replicas))
	for key, r := range v.Replicas {
		c[key] = router.ReplicaCondition{Health: r.Health, Down: r.Down, Settled: r.Settled}
	}
	return c
}

// sameConditions is whether a and b lead to the same decisions, whatever the last results say.
func sameConditions(a, b *Verdicts) bool {
	return maps.EqualFunc(a.Replicas, b.Replicas, func(x, y Verdict) bool {
		if x.Health != y.Health || x.Settled != y.Settled || len(x.Down) != len(y.Down) {
			return false
		}
		for i := range x.Down {
			if x.Down[i] != y.Down[i] {
				return false
			}
		}
		return true
	})
}

// verdict folds the addresses of one replica.
func verdict(mode topology.ProbeMode, addresses []Address, canary *Address) Verdict {
	v := Verdict{Settled: true, Addresses: addresses, Canary: canary}
	if mode == topology.ProbeNone {
		v.Reason = "not probed"
		return v
	}
	var standing, down, mute, ipv4 int
	var ipv4Down []Address
	for _, a := range addresses {
		if a.Address.Is4() {
			ipv4++
			if a.Health == router.Unhealthy {
				ipv4Down = append(ipv4Down, a)
			}
		}
		if !a.Settled {
			v.Settled = false
		}
		switch a.Health {
		case router.Healthy:
			standing++
		case router.Unhealthy:
			down++
			if a.Address.IsValid() {
				v.Down = append(v.Down, a.Address)
			}
		default:
			if !a.Last.Time.IsZero() {
				mute++
			}
		}
	}
	withoutIPv4 := ipv4 > 0 && len(ipv4Down) == ipv4
	switch {
	case withoutIPv4:
		// Most clients have IPv4 alone: they would be led here and get no address, while those that have IPv6 mostly have IPv4
		// too, and can be led elsewhere.
		v.Health, v.Down = router.Unhealthy, nil
	case standing > 0:
		v.Health = router.Healthy
	case down > 0 && down+mute == len(addresses):
		// An address that cannot be asked from here is no hope: else no replica with both families would ever be down for a
		// machine without IPv6.
		v.Health, v.Down = router.Unhealthy, nil
	}
	switch {
	case withoutIPv4 && standing > 0:
		v.Reason = "no IPv4 address stands: " + reason(ipv4Down)
	case v.Health != router.Healthy || down > 0:
		v.Reason = reason(addresses)
	}
	if canary != nil {
		v.Settled = v.Settled && canary.Settled
		if canary.Health == router.Unhealthy && v.Health != router.Unhealthy {
			v.Health, v.Down, v.Reason = router.Unhealthy, nil, reason([]Address{*canary})
		}
	}
	return v
}

// reason is the first error of an address that is down, else of one that cannot be asked.
func reason(addresses []Address) string {
	for _, health := range []router.Health{router.Unhealthy, router.Unknown} {
		for _, a := range addresses {
			if a.Health == health && a.Last.Error != "" {
				return a.Last.Error
			}
		}
		for _, a := range addresses {
			if a.Health == health && a.Outvoted() {
				return a.against()
			}
		}
	}
	return "no result yet"
}

// against says who finds a down that this server does not.
func (a Address) against() string {
	var names []string
	for _, v := range a.Votes {
		if v.Health == router.Unhealthy {
			names = append(names, v.Voter)
		}
	}
	return fmt.Sprintf("%s is down as %s find it", a, strings.Join(names, ", "))
}
