package health

import (
	"net"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"portolan/router"
	"portolan/topology"
)

// key names one thing that is probed: an address of a replica, or the replica's host name (the zero Addr).
type key struct {
	router.ReplicaKey
	address netip.Addr
	canary  bool // the replica's canary, which has no address
}

// target is one thing to probe, and how.
type target struct {
	key
	mode       topology.ProbeMode
	hostname   string // instead of an address
	port       string
	names      []string // SNI and Host of each request
	ca         string   // reference to roots besides the system's, empty for none
	clientCert string   // reference, empty for none
	service    string   // of topology.ProbeConsul
	// Of a canary, where it is read.
	image    topology.Canary
	endpoint *url.URL
	access   topology.Access
}

// place names what is connected to: a verdict is about that, whatever is asked there.
func (t *target) place() string {
	host := strings.TrimSuffix(t.hostname, ".")
	if t.address.IsValid() {
		host = t.address.String()
	}
	if t.canary {
		return t.image.String() + " at " + t.endpoint.String()
	}
	if t.mode == topology.ProbeConsul {
		return "consul:" + t.service + " " + host
	}
	return net.JoinHostPort(host, t.port)
}

// name is what votes call t.
func (t *target) name() string { return t.Registry + "/" + t.Region + "/" + t.label() }

func (t *target) equal(o *target) bool {
	if t.canary {
		return t.key == o.key && t.place() == o.place() && t.access == o.access
	}
	return t.key == o.key && t.mode == o.mode && t.hostname == o.hostname && t.port == o.port &&
		slices.Equal(t.names, o.names) && t.ca == o.ca && t.clientCert == o.clientCert && t.service == o.service
}

// targets lists what is to be probed for s.
func targets(s *topology.Snapshot) []*target {
	var list []*target
	for _, registry := range s.Registries {
		for _, replica := range registry.Replicas {
			if replica.Probe.Mode == topology.ProbeNone {
				continue
			}
			if replica.Canary != (topology.Canary{}) {
				list = append(list, &target{
					key:   key{ReplicaKey: router.ReplicaKey{Registry: registry.Name, Region: replica.Region}, canary: true},
					image: replica.Canary, endpoint: replica.Endpoint, access: replica.Access,
				})
			}
			names := registry.ClientNames
			if len(names) == 0 {
				names = []string{replica.Endpoint.Hostname()}
			}
			base := target{
				key:        key{ReplicaKey: router.ReplicaKey{Registry: registry.Name, Region: replica.Region}},
				mode:       replica.Probe.Mode,
				port:       port(replica),
				names:      names,
				ca:         replica.Access.CA,
				clientCert: replica.Access.ClientCert,
				service:    replica.Probe.Service,
			}
			if replica.Hostname != "" {
				base.hostname = replica.Hostname
				list = append(list, &base)
				continue
			}
			for _, a := range replica.Addresses {
				t := base
				t.address = a
				list = append(list, &t)
			}
		}
	}
	return list
}

// port is the endpoint's port: its own, else the usual one of the probe's protocol, else of the endpoint's.
func port(r *topology.Replica) string {
	if p := r.Endpoint.Port(); p != "" {
		return p
	}
	if r.Probe.Mode == topology.ProbeHTTPS || r.Probe.Mode != topology.ProbeHTTP && r.Endpoint.Scheme == "https" {
		return "443"
	}
	return "80"
}
