package api

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"portolan/router"
	"portolan/sample"
	"portolan/topology"
)

// Simulate asks what an Apply would make of the clients.
type Simulate struct {
	Document topology.Document `json:"document"`
	// Prune is that of Apply.
	Prune bool `json:"prune,omitempty"`
	// Queries are recorded clients as package sample writes them. Empty: every cell of IPv4 counts once.
	Queries string `json:"queries,omitempty"`
}

// The values of Simulation.Unit.
const (
	UnitCells   = "cells"
	UnitQueries = "queries"
)

// Simulation tells where clients would be sent.
type Simulation struct {
	// Unit is what is counted: cells, or queries as they were recorded.
	Unit string `json:"unit"`
	// Registries are those that are served now and would be afterwards, of those that the document names.
	Registries []RegistrySimulation `json:"registries"`
	// Added are named by the document and not served now; Lost are served now and would not be any more; Untouched are
	// served and not named, so that they stay as they are.
	Added     []string `json:"added,omitempty"`
	Lost      []string `json:"lost,omitempty"`
	Untouched []string `json:"untouched,omitempty"`
	// Assumed are sentences for people that say under which conditions this holds.
	Assumed []string `json:"assumed"`
	// Topology is the digest of the snapshot that is served now.
	Topology string `json:"topology"`
}

// RegistrySimulation is what would become of the clients of one registry.
type RegistrySimulation struct {
	Registry string `json:"registry"`
	// Total is how many were counted, Moved how many of them would be sent elsewhere than now.
	Total uint64 `json:"total"`
	Moved uint64 `json:"moved"`
	// Moves are all pairs that occur, those that stay included.
	Moves []router.Move `json:"moves"`
	// Replicas are the sums for each destination, by name; an empty region is an answer with no address.
	Replicas []SimulatedShare `json:"replicas"`
}

// SimulatedShare is how much of the total one destination has.
type SimulatedShare struct {
	Region string `json:"region"`
	Before uint64 `json:"before"`
	After  uint64 `json:"after"`
}

// Simulate tells what applying a document would make of the clients, without applying it.
func (c *Client) Simulate(ctx context.Context, q Simulate) (r Simulation, err error) {
	return r, c.do(ctx, http.MethodPost, path("simulate"), nil, q, &r)
}

// maxSimulation bounds what a simulation may hold: a topology file, and sample.MaxClients.
const maxSimulation = 16 << 20

func (s *server) simulate(r *http.Request) (any, error) {
	var q Simulate
	if err := decodeStrict(r, &q); err != nil {
		return nil, err
	}
	if s.Zone == "" || s.Chart == nil {
		return nil, failf(CodeRefused, "this server has not the role dns, so it decides nothing: ask one that has")
	}
	clients, err := sample.Read("queries", strings.NewReader(q.Queries))
	if err != nil {
		return nil, failf(CodeInvalid, "%v", err)
	}
	if len(clients) == 0 && q.Queries != "" {
		return nil, failf(CodeInvalid, "no client is recorded in queries")
	}
	v := s.View()
	if v.Router == nil {
		return nil, failf(CodeUnavailable, "the topology was not read yet: try again in a moment")
	}
	declared, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	changes, err := s.Editor.Apply(r.Context(), q.Document, q.Prune, true)
	if err != nil {
		return nil, err
	}
	after, _ := topology.Parse(intended(declared, q.Document, changes), nil, s.Reserved)
	// One after the other: a chart that is being made takes ten times its memory.
	select {
	case s.charting <- struct{}{}:
		defer func() { <-s.charting }()
	case <-r.Context().Done():
		return nil, r.Context().Err()
	}
	charts, err := s.Chart(r.Context(), after)
	if err != nil {
		return nil, fmt.Errorf("charting the topology that is to be simulated: %w", err)
	}
	named := map[string]bool{}
	for _, d := range q.Document.Registries {
		named[d.Name] = true
	}
	conditions, notes := assumed(v, after, named)
	decides := router.New(after, charts).With(conditions)
	for _, ramp := range v.Ramps {
		if r := after.Registry(ramp.Registry); r != nil && named[ramp.Registry] && r.Replica(ramp.Region) != nil && r.Replica(ramp.Region).Weight == ramp.To {
			notes = append(notes, fmt.Sprintf("the weight of replica %s/%s, which is on its way, is taken to be %d already", ramp.Registry, ramp.Region, ramp.To))
		}
	}

	result := Simulation{Unit: UnitCells, Registries: []RegistrySimulation{}, Topology: v.Snapshot.Digest}
	if len(clients) > 0 {
		result.Unit = UnitQueries
	}
	for _, d := range q.Document.Registries {
		was, served := v.Router.Registry(d.Name)
		is, serves := decides.Registry(d.Name)
		switch {
		case !served:
			result.Added = append(result.Added, d.Name)
			continue
		case !serves:
			result.Lost = append(result.Lost, d.Name)
			continue
		}
		var moves []router.Move
		if len(clients) > 0 {
			moves = router.MoveClients(was, is, clients.All())
		} else if moves, err = router.MoveCells(r.Context(), was, is); err != nil {
			return nil, fmt.Errorf("deciding for every cell: %w", err)
		}
		result.Registries = append(result.Registries, summed(was.Topology(), is.Topology(), moves))
	}
	for _, known := range v.Snapshot.Registries {
		if !named[known.Name] {
			result.Untouched = append(result.Untouched, known.Name)
		}
	}
	if len(clients) == 0 {
		notes = append(notes, "every /24 of IPv4 whose place is known counts once, however many clients are in it; those of IPv6 are not counted")
	}
	result.Assumed = notes
	return result, nil
}

// summed adds moves up for each replica that there is before or after.
func summed(before, after *topology.Registry, moves []router.Move) RegistrySimulation {
	sum := RegistrySimulation{Registry: after.Name, Moves: moves}
	index := map[string]int{}
	at := func(region string) *SimulatedShare {
		i, known := index[region]
		if !known {
			i = len(sum.Replicas)
			index[region] = i
			sum.Replicas = append(sum.Replicas, SimulatedShare{Region: region})
		}
		return &sum.Replicas[i]
	}
	for _, t := range []*topology.Registry{after, before} {
		for _, p := range t.Replicas {
			at(p.Region)
		}
	}
	for _, m := range moves {
		sum.Total += m.Count
		if m.From != m.To {
			sum.Moved += m.Count
		}
		at(m.From).Before += m.Count
		at(m.To).After += m.Count
	}
	return sum
}

// assumed are the conditions of now for snapshot, and, for the registries named, what else was taken for granted: a replica of
// which nothing is known yet is taken as it will be once it is seeded.
func assumed(v *View, snapshot *topology.Snapshot, named map[string]bool) (router.Conditions, []string) {
	conditions := router.Conditions{}
	notes := []string{"the health of replicas is taken as this server has it now"}
	for _, r := range snapshot.Registries {
		for _, p := range r.Replicas {
			key := router.ReplicaKey{Registry: r.Name, Region: p.Region}
			c, note := assume(v.Conditions[key], v.replica(key), p, r)
			conditions[key] = c
			if note != "" && named[r.Name] {
				notes = append(notes, fmt.Sprintf("replica %s/%s %s", r.Name, p.Region, note))
			}
		}
	}
	return conditions, notes
}

// assume is the condition of replica p of r, which stands in place of was, nil for none, whose condition is c; and what is to be
// said about it.
func assume(c router.ReplicaCondition, was, p *topology.Replica, r *topology.Registry) (router.ReplicaCondition, string) {
	waits := r.Policy.Replication && p.Region != r.Home // until it is seeded
	change := ""
	switch {
	case was == nil:
		change = "is new"
	case was.Endpoint.String() != p.Endpoint.String():
		change = "gets another endpoint"
	case !slices.Equal(was.Addresses, p.Addresses) || was.Hostname != p.Hostname:
		c.Health, c.Down, c.Settled = router.Unknown, nil, true
		return c, "gets other addresses: they are taken for healthy"
	case c.Leaving:
		return c, "is being deleted and gets no clients, as now"
	case waits && !c.Seeded:
		return c, "is not seeded yet and gets no clients, as now"
	case waits && c.Held:
		return c, "is held by the guard and gets no clients, as now"
	case c.Lagging:
		return c, "is too far behind, as now"
	case c.Health == router.Unhealthy:
		return c, "is unhealthy, as now"
	default:
		return c, ""
	}
	if waits {
		change += " and gets no clients before it is seeded: it is taken for seeded and healthy"
	} else {
		change += ": it is taken for healthy"
	}
	return router.ReplicaCondition{Settled: true, Seeded: true, Leaving: c.Leaving}, change
}

// replica is the one that is served now; nil for none.
func (v *View) replica(key router.ReplicaKey) *topology.Replica {
	if v.Snapshot == nil {
		return nil
	}
	if r := v.Snapshot.Registry(key.Registry); r != nil {
		return r.Replica(key.Region)
	}
	return nil
}
