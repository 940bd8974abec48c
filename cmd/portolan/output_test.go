package main

import (
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"portolan/api"
	"portolan/topology"
)

func TestFold(t *testing.T) {
	t.Parallel()
	half := strings.Repeat("x", widest/2)
	for text, want := range map[string][]string{
		"":                                 {""},
		"a b":                              {"a b"},
		half + " " + half[1:]:              {half + " " + half[1:]},
		half + " " + half:                  {half, half},
		half + half + half:                 {half + half + half},
		half + half + half + " b c":        {half + half + half, "b c"},
		"one\ntwo " + half + " " + half:    {"one", "two " + half, half},
		strings.Repeat("ä", widest) + " b": {strings.Repeat("ä", widest), "b"},
		"  " + half + " " + half:           {"  " + half, half},
	} {
		if got := fold(text); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row(w, "NAME", "REASON", "N")
	row(w, "a", half+" "+half, 1)
	w.Flush()
	if want := "NAME  REASON" + strings.Repeat(" ", widest/2-4) + "N\na     " + half + "  1\n      " + half + "  \n"; b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

func TestAgo(t *testing.T) {
	t.Parallel()
	now := time.Unix(1000, 0)
	for want, at := range map[string]time.Time{"never": {}, "1m30s ago": now.Add(-90 * time.Second), "0s ago": now.Add(3 * time.Second)} {
		if got := ago(at, now); got != want {
			t.Errorf("%v: %s, want %s", at, got, want)
		}
	}
}

func TestSummaryOf(t *testing.T) {
	t.Parallel()
	for want, r := range map[string]api.ReplicaSummary{
		"3 of 3 healthy":                    {Total: 3, Healthy: 3},
		"1 of 3 healthy, 2 not probed here": {Total: 3, Healthy: 1},
		"0 of 3 healthy, 2 not probed here": {Total: 3, Unhealthy: 1},
		"3, not probed here":                {Total: 3},
		"1 of 3 healthy; westeurope is Unhealthy: refused; southeastasia is Degraded": {Total: 3, Healthy: 1, Unhealthy: 2, Troubled: []api.TroubledReplica{
			{Region: "westeurope", State: "Unhealthy", Reason: "refused"}, {Region: "southeastasia", State: "Degraded"}}},
	} {
		if got := summaryOf(r); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

// A replica that only the file has may have been deleted; pruning is for those that only the store has.
func TestShowDrift(t *testing.T) {
	t.Parallel()
	change := func(op topology.ChangeOp, key string) topology.Change {
		return topology.Change{Op: op, Key: "registries/contoso/replicas/" + key, Old: "x", New: "x"}
	}
	for want, drift := range map[string][]topology.Change{
		"portolan apply -f t.yaml would":         {change(topology.Removed, "westus/weight")},
		"portolan apply --prune -f t.yaml would": {change(topology.Removed, "westus/endpoint")},
		"The file still names contoso/westus, ":  {change(topology.Added, "westus/addresses"), change(topology.Added, "westus/endpoint")},
	} {
		var b strings.Builder
		showDrift(&b, "t.yaml", drift)
		if !strings.Contains(b.String(), want) || strings.Contains(b.String(), "still names") != strings.Contains(want, "still names") {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestOneDay(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	showReplica(&b, api.Replica{Probes: []api.Probe{{Target: "192.0.2.1", CertificateExpiry: time.Now().Add(36 * time.Hour)}}})
	if !strings.Contains(b.String(), ", 1 day\t") {
		t.Error(b.String())
	}
}
