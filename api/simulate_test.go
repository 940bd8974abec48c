package api

import (
	"context"
	"fmt"
	"net/netip"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"testing"

	"portolan/router"
	"portolan/router/geo"
	"portolan/sample"
	"portolan/topology"
)

// newSimulator is a rig that can chart what is only thought of.
func newSimulator(t *testing.T) (r *rig) {
	r = newRig(t, func(o *Options) {
		o.Chart = func(ctx context.Context, s *topology.Snapshot) (*router.Charts, error) {
			r.charting.Lock()
			former := r.charts
			r.charting.Unlock()
			return router.Chart(ctx, s, router.Sources{Places: geo.Builtin()}, former)
		}
	})
	return r
}

func parse(t *testing.T, text string) topology.Document {
	t.Helper()
	d, err := topology.ParseYAML("t.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return *d
}

const contosoAndEast = document + `      - {region: eastasia, endpoint: "http://127.0.3.1:5000", addresses: [127.0.3.1]}
  - name: fabrikam
    home: westus
    replicas:
      - {region: westus, endpoint: "http://127.0.4.1:5000", addresses: [127.0.4.1]}
`

func TestSimulateCells(t *testing.T) {
	t.Parallel()
	r := newSimulator(t)
	s, err := r.client.Simulate(t.Context(), Simulate{Document: parse(t, contosoAndEast)})
	if err != nil {
		t.Fatal(err)
	}
	if s.Unit != UnitCells || !slices.Equal(s.Added, []string{"fabrikam"}) || len(s.Registries) != 1 || len(s.Untouched)+len(s.Lost) > 0 {
		t.Fatalf("simulated %+v", s)
	}
	c := s.Registries[0]
	var total, moved uint64
	for _, m := range c.Moves {
		total += m.Count
		if m.From != m.To {
			moved += m.Count
			if m.To != "eastasia" {
				t.Errorf("a new replica sends clients from %s to %s", m.From, m.To)
			}
		}
	}
	if total != c.Total || moved != c.Moved || moved == 0 || total < 10_000_000 { // the built-in table places 3.6 billion addresses
		t.Errorf("%d of %d move; the moves say %d of %d", c.Moved, c.Total, moved, total)
	}
	i := slices.IndexFunc(c.Replicas, func(s SimulatedShare) bool { return s.Region == "eastasia" })
	if i < 0 || c.Replicas[i].Before != 0 || c.Replicas[i].After != moved {
		t.Errorf("the shares of the replicas are %+v", c.Replicas)
	}
	if text := strings.Join(s.Assumed, "\n"); !strings.Contains(text, "contoso/eastasia is new and gets no clients before it is seeded") {
		t.Errorf("assumed:\n%s", text)
	}
	if d, err := r.client.Export(t.Context()); err != nil || len(d.Registries) != 1 || len(d.Registries[0].Replicas) != 2 {
		t.Errorf("a simulation changed the topology to %+v, %v", d, err)
	}
}

func TestSimulateQueries(t *testing.T) {
	t.Parallel()
	r := newSimulator(t)
	drained := parse(t, strings.Replace(document, "addresses: [127.0.2.1]", "addresses: [127.0.2.1], routing: disabled", 1))
	// Two in the Netherlands, one by its resolver, and one in the United States.
	q := Simulate{Document: drained, Queries: "193.0.6.0/24 7\n193.0.7.1 2\n8.8.8.0/24\n"}
	s, err := r.client.Simulate(t.Context(), q)
	if err != nil {
		t.Fatal(err)
	}
	want := []router.Move{{From: "westeurope", To: "westus", Count: 9}, {From: "westus", To: "westus", Count: 1}}
	if s.Unit != UnitQueries || len(s.Registries) != 1 || !slices.Equal(s.Registries[0].Moves, want) || s.Registries[0].Moved != 9 {
		t.Errorf("simulated %+v, want the moves %v", s, want)
	}
}

// What is pruned is gone, and what is not named stays.
func TestSimulatePrune(t *testing.T) {
	t.Parallel()
	r := newSimulator(t)
	if _, err := r.client.Apply(t.Context(), Apply{Document: parse(t, contosoAndEast)}); err != nil {
		t.Fatal(err)
	}
	moved := func(prune bool) uint64 {
		s, err := r.client.Simulate(t.Context(), Simulate{Document: parse(t, document), Prune: prune})
		if err != nil {
			t.Fatal(err)
		}
		if !slices.Equal(s.Untouched, []string{"fabrikam"}) {
			t.Errorf("untouched: %v", s.Untouched)
		}
		return s.Registries[0].Moved
	}
	if n := moved(false); n != 0 {
		t.Errorf("%d cells move by a file that takes nothing away", n)
	}
	if moved(true) == 0 {
		t.Error("a replica is deleted and no cell moves")
	}
}

// What is known of a replica holds on, but for what another place makes unknown; and what is not well is said.
func TestAssume(t *testing.T) {
	t.Parallel()
	at := func(host, address string) *topology.Replica {
		return &topology.Replica{Region: "eastus", Endpoint: &url.URL{Scheme: "https", Host: host}, Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	}
	r := &topology.Registry{Name: "contoso", Home: "westus", Policy: topology.Policy{Replication: true}}
	was := at("a", "192.0.2.1")
	sick := router.ReplicaCondition{Health: router.Unhealthy, Seeded: true, Leaving: true, Lagging: true}
	for name, c := range map[string]struct {
		condition router.ReplicaCondition
		was, p    *topology.Replica
		want      router.ReplicaCondition
		note      string
	}{
		"new":            {router.ReplicaCondition{}, nil, was, router.ReplicaCondition{Settled: true, Seeded: true}, "is new and gets no clients before it is seeded: it is taken for seeded and healthy"},
		"same":           {router.ReplicaCondition{Settled: true, Seeded: true}, was, was, router.ReplicaCondition{Settled: true, Seeded: true}, ""},
		"not seeded":     {router.ReplicaCondition{Settled: true}, was, was, router.ReplicaCondition{Settled: true}, "is not seeded yet and gets no clients, as now"},
		"unhealthy":      {router.ReplicaCondition{Health: router.Unhealthy, Seeded: true}, was, was, router.ReplicaCondition{Health: router.Unhealthy, Seeded: true}, "is unhealthy, as now"},
		"held":           {router.ReplicaCondition{Seeded: true, Held: true}, was, was, router.ReplicaCondition{Seeded: true, Held: true}, "is held by the guard and gets no clients, as now"},
		"lagging":        {router.ReplicaCondition{Seeded: true, Lagging: true}, was, was, router.ReplicaCondition{Seeded: true, Lagging: true}, "is too far behind, as now"},
		"leaving":        {sick, was, was, sick, "is being deleted and gets no clients, as now"},
		"other address":  {sick, was, at("a", "192.0.2.2"), router.ReplicaCondition{Settled: true, Seeded: true, Leaving: true, Lagging: true}, "gets other addresses: they are taken for healthy"},
		"other endpoint": {sick, was, at("b", "192.0.2.1"), router.ReplicaCondition{Settled: true, Seeded: true, Leaving: true}, "gets another endpoint and gets no clients before it is seeded: it is taken for seeded and healthy"},
	} {
		got, note := assume(c.condition, c.was, c.p, r)
		if !reflect.DeepEqual(got, c.want) || note != c.note {
			t.Errorf("%s: %+v, %q; want %+v, %q", name, got, note, c.want, c.note)
		}
	}
}

func TestSimulateRefusals(t *testing.T) {
	t.Parallel()
	r := newSimulator(t)
	_, err := r.client.Simulate(t.Context(), Simulate{Document: parse(t, document), Queries: "1.2.3.4\nx\n"})
	if !IsCode(err, CodeInvalid) || !strings.Contains(err.Error(), "queries:2:") {
		t.Errorf("bad queries: %v", err)
	}
	_, err = r.client.Simulate(t.Context(), Simulate{Document: parse(t, document), Queries: "# nothing\n"})
	if !IsCode(err, CodeInvalid) {
		t.Errorf("no queries: %v", err)
	}
	homeless := parse(t, document)
	homeless.Registries[0].Home = "mars"
	_, err = r.client.Simulate(t.Context(), Simulate{Document: homeless})
	if !IsCode(err, CodeInvalid) {
		t.Errorf("a home without a replica: %v", err)
	}
	var most strings.Builder // as much as a record may hold
	for i := range sample.MaxClients {
		fmt.Fprintf(&most, "2001:db8:%x:%x::/64 1000000000\n", i>>8, i&0xff|0x8000)
	}
	if _, err = r.client.Simulate(t.Context(), Simulate{Document: parse(t, document), Queries: most.String()}); err != nil {
		t.Errorf("%d clients: %v", sample.MaxClients, err)
	}
	blind := newRig(t, func(o *Options) { o.Zone = "" })
	if _, err = blind.client.Simulate(t.Context(), Simulate{Document: parse(t, document)}); !IsCode(err, CodeRefused) {
		t.Errorf("a server that decides nothing: %v", err)
	}
}
