package router

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"portolan/topology"
)

// counted counts how often a database is read, and may fail.
type counted struct {
	*atlas
	read int
	err  error
}

func (c *counted) Borders(is6 bool, visit func(netip.Addr, int, *Place) bool) error {
	if !is6 {
		c.read++
	}
	if c.err != nil {
		return c.err
	}
	return c.atlas.Borders(is6, visit)
}

// TestChartsAreShared: registries with the same regions and rules have one chart, whatever else tells them apart, and what
// was charted is not charted again.
func TestChartsAreShared(t *testing.T) {
	t.Parallel()
	contoso, places, _ := world()
	fabrikam, _, _ := world()
	fabrikam.Name, fabrikam.Home = "fabrikam", "southeastasia"
	fabrikam.Replicas[1].Routing, fabrikam.Replicas[2].Weight = false, 10
	s := &topology.Snapshot{Registries: []*topology.Registry{contoso, fabrikam}}
	database := &counted{atlas: places}
	charts, err := Chart(t.Context(), s, Sources{Places: database}, nil)
	if err != nil || len(charts.charts) != 1 || database.read != 1 {
		t.Fatalf("%d charts, read %d times, %v", len(charts.charts), database.read, err)
	}
	// Of clients without a place, each has its own home.
	r := New(s, charts)
	for i, want := range []string{"westus", "southeastasia"} {
		one := r.At(i)
		if got := region(one, one.Decide(Client{})); got != want {
			t.Errorf("%s: a client without a place goes to %s, want %s", one.Topology().Name, got, want)
		}
	}

	contoso.Replicas[2].Weight = 50
	if !charts.Current(s, Sources{Places: database}) {
		t.Error("a weight needs a new chart")
	}
	again, err := Chart(t.Context(), s, Sources{Places: database}, charts)
	if err != nil || database.read != 1 {
		t.Errorf("read %d times, %v", database.read, err)
	}
	contoso.Orders = rules(topology.Match{Country: "DE"}, "westus")
	if again.Current(s, Sources{Places: database}) {
		t.Error("an order needs no new chart")
	}
	if again.Current(s, Sources{Places: &counted{atlas: places}}) {
		t.Error("another database needs no new chart")
	}
	if again.Current(s, Sources{Places: database, Latencies: NewLatencies(nil, nil)}) {
		t.Error("another table of latencies needs no new chart")
	}
	both, err := Chart(t.Context(), s, Sources{Places: database}, again)
	if err != nil || len(both.charts) != 2 || database.read != 2 {
		t.Errorf("%d charts, read %d times, %v", len(both.charts), database.read, err)
	}
}

// TestFormerChart: while a new topology is being charted, a registry keeps to the regions that its former chart has; one
// without a chart sends everybody home.
func TestFormerChart(t *testing.T) {
	t.Parallel()
	registry, places, _ := world()
	charts, err := Chart(t.Context(), snapshot(registry), Sources{Places: places}, nil)
	if err != nil {
		t.Fatal(err)
	}
	changed := *registry
	changed.Replicas = []*topology.Replica{
		{Region: "germanywest", Location: frankfurt, Weight: 100, Routing: true},
		{Region: "southeastasia", Location: singapore, Weight: 100, Routing: true},
		{Region: "westeurope", Location: amsterdam, Weight: 100, Routing: true},
	}
	changed.Home = "southeastasia"
	c := Client{Subnet: subnet("30.1.2.0/24")}
	r := New(snapshot(&changed), charts).At(0)
	if got := region(r, r.Decide(c)); got != "westeurope" {
		t.Errorf("on the former chart %s, want westeurope", got)
	}
	e := r.Explain(c)
	if e.Region != "westeurope" || !strings.Contains(e.Candidates[len(e.Candidates)-1].Reason, "still being made") {
		t.Errorf("%+v", e)
	}
	if got := region(r, r.Decide(Client{Subnet: subnet("20.1.2.0/24")})); got != "westeurope" {
		t.Errorf("the region that is gone is answered with, or %s, want westeurope", got)
	}
	r = New(snapshot(&changed), nil).At(0)
	if got := region(r, r.Decide(c)); got != "southeastasia" {
		t.Errorf("without a chart %s, want the home", got)
	}
	r = routerOf(snapshot(&changed), places, nil).At(0)
	if got := region(r, r.Decide(c)); got != "germanywest" {
		t.Errorf("on its chart %s, want germanywest", got)
	}
}

// TestChartFails: a database that cannot be read to its end makes no chart, and neither does one whose reading was ended.
func TestChartFails(t *testing.T) {
	t.Parallel()
	registry, places, networks := world()
	broken := errors.New("broken")
	if _, err := Chart(t.Context(), snapshot(registry), Sources{Places: &counted{atlas: places, err: broken}, Networks: networks}, nil); !errors.Is(err, broken) {
		t.Errorf("%v, want %v", err, broken)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Chart(ctx, snapshot(registry), Sources{Places: places, Networks: networks}, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}
