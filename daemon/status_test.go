package daemon

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"portolan/api"
	"portolan/health"
	"portolan/router"
	"portolan/topology"
)

// Each name of a replica is warned of once, for the address where its certificate ends first.
func TestCertificateWarnings(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 3, 1, 0, 0, 0, 0, time.UTC)
	address := func(at string, days map[string]int) health.Address {
		a := health.Address{Address: netip.MustParseAddr(at), Last: health.Result{Time: now}}
		for name, d := range days {
			a.Last.Certificates = append(a.Last.Certificates, health.Certificate{Name: name, Expiry: now.AddDate(0, 0, d)})
		}
		return a
	}
	v := &health.Verdicts{Time: now, Replicas: map[router.ReplicaKey]health.Verdict{
		{Registry: "contoso", Region: "westus"}: {Addresses: []health.Address{
			address("192.0.2.1", map[string]int{"a.example": 5, "b.example": 90}), address("192.0.2.2", map[string]int{"a.example": 4}),
		}},
		{Registry: "contoso", Region: "westeurope"}:  {Addresses: []health.Address{address("192.0.2.3", map[string]int{"a.example": -1})}},
		{Registry: "contoso", Region: "northeurope"}: {Addresses: []health.Address{address("192.0.2.4", map[string]int{"a.example": 14})}},
	}}
	want := []string{
		"the certificate of contoso/westeurope for a.example at 192.0.2.3 ended on 2026-02-28 00:00:00 UTC: renew it there",
		"the certificate of contoso/westus for a.example at 192.0.2.2 ends on 2026-03-05 00:00:00 UTC: renew it there",
	}
	if got := certificateWarnings(v, 14*24*time.Hour); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if got := certificateWarnings(v, 0); !slices.Equal(got, want[:1]) {
		t.Errorf("with the warning off: %q", got)
	}
}

func TestSharedWarnings(t *testing.T) {
	t.Parallel()
	replica := func(endpoint, prefix string) *topology.Replica {
		u, err := url.Parse(endpoint)
		if err != nil {
			t.Fatal(err)
		}
		return &topology.Replica{Region: "westus", Endpoint: u, Access: topology.Access{Prefix: prefix}}
	}
	for _, c := range []struct {
		name     string
		one, two *topology.Replica
		off      bool
		shared   bool
	}{
		{"two servers", replica("https://a", ""), replica("https://b", ""), false, false},
		{"one of them only leads clients", replica("https://a", ""), replica("https://a", ""), true, false},
		{"one server", replica("https://a", ""), replica("https://a:443", ""), false, true},
		{"a prefix each", replica("https://a", "team"), replica("https://a", "team2"), false, false},
		{"one prefix", replica("https://a", "team"), replica("https://a", "team"), false, true},
		{"a prefix within the other", replica("https://a", "team"), replica("https://a", "team/x"), false, true},
		{"one without", replica("https://a", "team"), replica("https://a", ""), false, true},
	} {
		s := &topology.Snapshot{Registries: []*topology.Registry{
			{Name: "contoso", Policy: topology.Policy{Replication: true}, Replicas: []*topology.Replica{c.one}},
			{Name: "fabrikam", Policy: topology.Policy{Replication: !c.off}, Replicas: []*topology.Replica{c.two}},
		}}
		got := sharedWarnings(&api.View{Snapshot: s})
		if shared := len(got) == 1 && strings.Contains(got[0], "contoso/westus and fabrikam/westus have one endpoint"); shared != c.shared {
			t.Errorf("%s: %q", c.name, got)
		}
	}
}

func TestUnreplicatedWarnings(t *testing.T) {
	t.Parallel()
	v := &api.View{Replication: map[router.ReplicaKey]topology.Replication{
		{Registry: "contoso", Region: "westus"}: {NotReplicable: 2}, {Registry: "contoso", Region: "eastus"}: {},
	}}
	got := unreplicatedWarnings(v)
	if len(got) != 1 || !strings.Contains(got[0], "replica contoso/westus: 2; ") || !strings.Contains(got[0], "storage.delete.enabled: true") {
		t.Errorf("%q", got)
	}
}

func TestUnreadableWarnings(t *testing.T) {
	t.Parallel()
	v := &api.View{Replication: map[router.ReplicaKey]topology.Replication{
		{Registry: "contoso", Region: "westus"}: {Unreadable: 2}, {Registry: "contoso", Region: "eastus"}: {},
	}}
	got := unreadableWarnings(v)
	if len(got) != 1 || !strings.Contains(got[0], "replica contoso/westus cannot give") || !strings.Contains(got[0], "cannot be read: 2; portolan replica show contoso/westus") {
		t.Errorf("%q", got)
	}
}

func TestStaying(t *testing.T) {
	t.Parallel()
	change := func(key string) topology.Change {
		return topology.Change{Op: topology.Removed, Key: "registries/contoso/" + key}
	}
	requests := map[router.ReplicaKey][]string{{Registry: "contoso", Region: "west"}: {topology.RequestDelete}, {Registry: "contoso", Region: "east"}: {topology.RequestResync}}
	got := staying([]topology.Change{change("replicas/west/routing"), change("replicas/westus/routing"), change("replicas/east/weight"), change("home")}, requests)
	if want := []topology.Change{change("replicas/westus/routing"), change("replicas/east/weight"), change("home")}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// A fence that leaves its clients no replica is warned of by its name; where nobody gets an address, that is said once.
func TestStrandedWarnings(t *testing.T) {
	t.Parallel()
	values := topology.Values{"registries/contoso/home": "westus", "registries/contoso/fences/continent/AF": "westeurope", "registries/contoso/fences/continent/EU": "westeurope,westus"}
	for region, address := range map[string]string{"westus": "192.0.2.1", "westeurope": "192.0.2.2"} {
		values[topology.ReplicaPrefix("contoso", region)+"endpoint"] = "http://" + address
		values[topology.ReplicaPrefix("contoso", region)+"addresses"] = address
	}
	seeded := router.Conditions{{Registry: "contoso", Region: "westeurope"}: {Seeded: true}}
	for i, want := range []string{"", "clients of registry contoso behind the fence continent/AF get no address: ", "clients of registry contoso get no address: "} {
		s, _ := topology.Parse(values, nil, nil)
		got := strandedWarnings(&api.View{Snapshot: s, Conditions: seeded})
		if (want == "") != (len(got) == 0) || want != "" && (len(got) != 1 || !strings.HasPrefix(got[0], want)) {
			t.Errorf("%q: want %q", got, want)
		}
		values[topology.ReplicaPrefix("contoso", []string{"westeurope", "westus", ""}[i])+"routing"] = "disabled"
	}
}
