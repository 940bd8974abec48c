package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"portolan/router"
	"portolan/test/bed"
)

// A DNS server that is asked says what the API says, or the difference is told.
func TestExplainServer(t *testing.T) {
	t.Parallel()
	w, other := newWorld(t), newWorld(t)
	at := w.addresses.DNS[0].String()
	out, _ := w.must(t, exitDone, "explain", "contoso", "--ecs", "193.0.6.0/24", "--server", at)
	contains(t, "explain --server", out, at+" answers for contoso.geo.example.net with the subnet 193.0.6.0/24",
		"127.0.0.1, TTL 1 s, scope /", "NOERROR, no record", "registry=contoso", "that is what the API says:", "SHARE", "100%")
	if strings.Contains(out, "difference:") {
		t.Errorf("one server differs from itself:\n%s", out)
	}
	out, _ = w.must(t, exitDone, "explain", "contoso.geo.example.net", "--resolver", "193.0.7.35", "--server", at, "-o", "json")
	contains(t, "explain --resolver --server", out, `"subnet": "193.0.7.0/24"`, `"differences": []`, `"decision"`)

	other.must(t, exitDone, "replica", "wait", "contoso/westeurope", "--timeout", "30s") // clients need another to go to
	other.must(t, exitDone, "replica", "update", "contoso/westus", "--routing", "disabled")
	err := bed.Until(t.Context(), patience, func(context.Context) error {
		out, _ = other.must(t, exitDone, "explain", "contoso", "--ecs", "8.8.8.0/24", "--server", at)
		if !strings.Contains(out, "difference: the server sends the client to westus, the decision to westeurope\n") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	// Without an API the server alone is asked, by the full name.
	none := &world{api: "http://127.0.0.1:1"}
	out, _ = none.must(t, exitDone, "explain", "contoso.geo.example.net", "--ecs", "8.8.8.8", "--server", at)
	contains(t, "explain without an API", out, "registry=contoso", "the API was not asked: nobody listens")
	_, errout := none.must(t, exitFailed, "explain", "contoso", "--ecs", "8.8.8.8", "--server", at)
	contains(t, "explain without an API or a full name", errout, "nobody listens")
	_, errout = w.must(t, exitFailed, "explain", "contoso", "--ecs", "8.8.8.8", "--server", "127.0.0.1:1")
	contains(t, "explain of no server", errout, "asking 127.0.0.1:1 for contoso.geo.example.net A")
	w.must(t, exitUsage, "explain", "contoso", "--ecs", "everywhere", "--server", at)
}

func TestAway(t *testing.T) {
	t.Parallel()
	for want, c := range map[string]router.Candidate{"3 km": {Distance: 3}, "14 ms": {Distance: 3, Latency: 14}, "-": {Distance: -1}} {
		if got := away(c); got != want {
			t.Errorf("%+v: %s, want %s", c, got, want)
		}
	}
}
