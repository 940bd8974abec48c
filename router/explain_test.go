package router

import (
	"encoding/json"
	"strings"
	"testing"

	"portolan/topology"
)

func TestExplain(t *testing.T) {
	t.Parallel()
	down := Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Unhealthy, Settled: true}}
	tests := []struct {
		name       string
		edit       func(*topology.Registry)
		conditions Conditions
		client     Client
		// want are parts of the JSON text.
		want []string
	}{
		{name: "nearest", client: Client{addr("20.0.0.1"), subnet("30.1.2.0/24")}, want: []string{
			`"source":"ecs"`, `"address":"30.1.2.0"`, `"database":"test"`, `"network":"30.0.0.0/8"`, `"country":"DE"`, `"cell":"30.1.2.0/24"`,
			`"position":1,"region":"westeurope","distance_km":576`, `"chosen: the first healthy one that keeps this cell"`, `"not asked: an earlier one keeps this cell"`,
			`"sentence":"westeurope: first choice, 576 km away"`, `"scope":8`, `"settled":true`, `"outcome":"kept"`, `"region":"westeurope"`}},
		{name: "next", conditions: down, client: Client{addr("20.0.0.1"), subnet("30.1.2.0/24")}, want: []string{
			`"passed over: unhealthy"`, `"sentence":"westus: choice 2, 9105 km away; not westeurope (unhealthy)"`}},
		{name: "private", client: Client{addr("40.0.0.1"), subnet("10.1.0.0/16")}, want: []string{
			`"source":"resolver"`, `"why":"the subnet 10.1.0.0/16 lies in 10.0.0.0/8, private use (RFC 1918): the resolver stands for the client"`, `"scope":8`}},
		{name: "private alone", client: Client{Subnet: subnet("10.1.0.0/16")}, want: []string{
			`"source":"none"`, `private use (RFC 1918): a resolver would stand for the client, and there is none"`}},
		{name: "one, down", edit: func(r *topology.Registry) { r.Replicas = r.Replicas[1:2] }, conditions: down, client: Client{Subnet: subnet("30.1.2.0/24")},
			want: []string{`the only candidate is unhealthy, and the policy is`}},
		{name: "zero", client: Client{addr("40.0.0.1"), subnet("0.0.0.0/0")}, want: []string{`"source":"resolver"`, `length 0`, `"scope":0`}},
		{name: "nothing", want: []string{`"source":"none"`, `"sentence":"westus: first choice, the home region, since the client's place is not known"`}},
		{name: "weight", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 1 }, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`is not below its weight 1"`, `"scope":24`, `"region":"westus"`, `choice 2, 9105 km away; not westeurope (bucket `}},
		{name: "rules", edit: func(r *topology.Registry) {
			r.Orders, r.Fences = rules(topology.Match{ASN: 64500}, "westus"), rules(topology.Match{Continent: "EU"}, "southeastasia,westus")
		}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`"asn":64500`, `"order":"asn 64500: westus"`, `"fence":"continent EU: southeastasia,westus"`, `"excluded: outside of the fence"`, `"position":0,"region":"westeurope"`, `9105 km away; not westeurope (outside of the fence)"`}},
		{name: "lagging", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Lagging: true}}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{`"passed over: it lags behind"`, `; not westeurope (it lags behind)"`}},
		{name: "held", edit: func(r *topology.Registry) { r.Home, r.Policy.Replication = "westus", true },
			conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Seeded: true, Held: true}}, client: Client{Subnet: subnet("30.1.2.0/24")},
			want: []string{`"excluded: the guard holds its content, which may be gone or old"`, `"region":"westus","outcome":"kept"`,
				`"sentence":"westus: first choice, 9105 km away; not westeurope (the guard holds its content, which may be gone or old)"`}},
		{name: "leaving", conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Leaving: true}}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{`"excluded: its deletion has begun"`, `; not westeurope (its deletion has begun)"`}},
		{name: "weight 0", edit: func(r *topology.Registry) { r.Replica("westeurope").Weight = 0 }, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`"sentence":"westus: first choice, 9105 km away; not westeurope (its weight is 0)"`}},
		{name: "farther", edit: func(r *topology.Registry) { r.Replica("westus").Routing = false }, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`"sentence":"westeurope: first choice, 576 km away"`}},
		{name: "fenced off and farther", edit: func(r *topology.Registry) {
			r.Fences = rules(topology.Match{Continent: "EU"}, "westeurope,westus")
		}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{`"sentence":"westeurope: first choice, 576 km away"`}},
		{name: "named and excluded", edit: func(r *topology.Registry) {
			r.Orders, r.Replica("southeastasia").Routing = rules(topology.Match{Country: "DE"}, "southeastasia"), false
		}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{`"sentence":"westeurope: first choice, 576 km away; not southeastasia (routing is disabled)"`}},
		{name: "down, policy none, and excluded", edit: func(r *topology.Registry) {
			r.Replica("westus").Routing, r.Policy.AllDown.Mode = false, topology.AllDownNone
		}, conditions: Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Unhealthy}, {Registry: "contoso", Region: "southeastasia"}: {Health: Unhealthy}},
			client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
				`all 2 candidates are unhealthy, and the policy is to answer with none; not westus (routing is disabled)"`}},
		{name: "down and excluded", edit: func(r *topology.Registry) {
			r.Replica("westus").Routing, r.Replica("southeastasia").Weight = false, 0
		}, conditions: down, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`the policy is to answer with the nearest, 576 km away; not southeastasia (its weight is 0), westus (routing is disabled)"`}},
		{name: "nobody", edit: func(r *topology.Registry) {
			r.Replicas[0].Routing, r.Replicas[1].Weight = false, 0
			r.Home, r.Policy.Replication = "westeurope", true
		}, client: Client{Subnet: subnet("30.1.2.0/24")}, want: []string{
			`"excluded: routing is disabled"`, `"excluded: its weight is 0"`, `"excluded: not seeded yet: it has never been Ready"`, `"region":"","outcome":"no-candidate"`,
			`"sentence":"none: no replica may be given to this client; not `}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			registry, places, networks := world()
			if tt.edit != nil {
				tt.edit(registry)
			}
			e := routerOf(snapshot(registry), places, networks).With(tt.conditions).At(0).Explain(tt.client)
			text, err := json.Marshal(e)
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range tt.want {
				if !strings.Contains(string(text), want) {
					t.Errorf("no %s in\n%s", want, text)
				}
			}
		})
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	tests := []struct {
		a, b topology.Coordinates
		km   int
	}{
		{berlin, berlin, 0},
		{amsterdam, sf, 8773},
		{newYork, sf, 4129},
		{topology.Coordinates{Latitude: 90}, topology.Coordinates{Latitude: -90}, 20015},
		{topology.Coordinates{Longitude: 179.9}, topology.Coordinates{Longitude: -179.9}, 22},
		{topology.Coordinates{Latitude: 0.001}, topology.Coordinates{Latitude: 0.010}, 1},
	}
	for _, tt := range tests {
		if got := Distance(tt.a, tt.b); got != tt.km || Distance(tt.b, tt.a) != tt.km {
			t.Errorf("from %v to %v: %d km, want %d", tt.a, tt.b, got, tt.km)
		}
	}
}

func TestRegistries(t *testing.T) {
	t.Parallel()
	registry, places, networks := world()
	r := routerOf(snapshot(registry), places, networks)
	if got, ok := r.Registry("contoso"); !ok || got != r.At(0) || got.Topology() != registry {
		t.Errorf("Registry(contoso) = %v, %v", got, ok)
	}
	if _, ok := r.Registry("fabrikam"); ok {
		t.Error("there is a registry fabrikam")
	}
	c := Client{Resolver: addr("30.0.0.1")}
	down := r.With(Conditions{{Registry: "contoso", Region: "westeurope"}: {Health: Unhealthy}})
	if a, b := r.At(0).Decide(c), down.At(0).Decide(c); region(r.At(0), a) != "westeurope" || region(down.At(0), b) != "westus" {
		t.Errorf("before %+v, with conditions %+v", a, b)
	}
}
