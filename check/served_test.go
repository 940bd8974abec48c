package check

import (
	"net/netip"
	"slices"
	"testing"

	"portolan/api"
	"portolan/router"
)

func TestDifferences(t *testing.T) {
	t.Parallel()
	e := api.Explanation{Explanation: router.Explanation{Region: "westus", Subnet: netip.MustParsePrefix("203.0.113.0/24"), Scope: 20}, TTL: 60}
	replicas := []api.Replica{{Region: "westeurope", Addresses: []string{"192.0.2.2"}}, {Region: "westus", Addresses: []string{"192.0.2.1", "2001:db8::1"}}}
	a := func(data ...string) Answer {
		return Answer{Type: "A", Rcode: "NOERROR", Records: data, TTL: 60, Scope: 20}
	}
	whoami := func(region string) [][]string { return [][]string{{"registry=contoso", "region=" + region}} }
	late, wide, deaf, refused := a("192.0.2.1"), a("192.0.2.1"), a("192.0.2.1"), a()
	late.TTL, wide.Scope, deaf.Scope, refused.Rcode = 5, 16, -1, "REFUSED"
	for name, c := range map[string]struct {
		served Served
		want   []string
	}{
		"none":    {Served{Answers: []Answer{a("192.0.2.1"), a()}, Whoami: whoami("westus")}, nil},
		"off":     {Served{Answers: []Answer{a("192.0.2.1")}}, nil},
		"region":  {Served{Answers: []Answer{a("192.0.2.2")}, Whoami: whoami("westeurope")}, []string{"the server sends the client to westeurope, the decision to westus", "the server's A 192.0.2.2 does not belong to westus"}},
		"TTL":     {Served{Answers: []Answer{late}}, []string{"the server's A may be kept for 5 s, by the decision for 60 s"}},
		"scope":   {Served{Answers: []Answer{wide}}, []string{"the server's A has the scope /16, the decision /20"}},
		"no ECS":  {Served{Answers: []Answer{deaf}}, []string{"the server's A has no scope, the decision /20"}},
		"empty":   {Served{Answers: []Answer{a(), a()}}, []string{"the server answers without an address, the decision is westus"}},
		"refused": {Served{Answers: []Answer{refused}}, []string{"the server answers A with REFUSED"}},
	} {
		if got := c.served.Differences(e, replicas); !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}
