package api

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"portolan/health"
	"portolan/router"
	"portolan/topology"
)

// What needs somebody's attention is in the summary, with the reason; what is well, or on its way, is only counted.
func TestSummarize(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	v := r.view(t)
	served := v.Snapshot.Registry("contoso")
	key := func(i int) router.ReplicaKey {
		return router.ReplicaKey{Registry: "contoso", Region: served.Replicas[i].Region}
	}
	one, two := served.Replicas[0], served.Replicas[1]
	v.Verdicts = &health.Verdicts{Replicas: map[router.ReplicaKey]health.Verdict{key(0): {Health: router.Healthy}, key(1): {Health: router.Healthy}}}
	says := func(h router.Health, reason string, report topology.Replication) []ReplicaSummary {
		v.Verdicts.Replicas[key(1)] = health.Verdict{Health: h, Reason: reason}
		report.Endpoint = two.Endpoint.String()
		v.Replication[key(1)] = report
		return Summarize(v)
	}
	summary := func(healthy, unhealthy int, troubled ...TroubledReplica) []ReplicaSummary {
		return []ReplicaSummary{{Registry: "contoso", Total: len(served.Replicas), Healthy: healthy, Unhealthy: unhealthy, Troubled: troubled}}
	}
	trouble := func(state, reason string) TroubledReplica {
		return TroubledReplica{Region: two.Region, State: state, Reason: reason}
	}
	for name, c := range map[string]struct{ got, want []ReplicaSummary }{
		"well":      {says(router.Healthy, "", topology.Replication{Status: topology.Ready}), summary(2, 0)},
		"syncing":   {says(router.Healthy, "", topology.Replication{Status: topology.Syncing, Reason: "1 pending"}), summary(2, 0)},
		"unknown":   {says(router.Unknown, "", topology.Replication{Status: topology.Ready}), summary(1, 0)},
		"unhealthy": {says(router.Unhealthy, "refused", topology.Replication{Status: topology.Ready}), summary(1, 1, trouble("Unhealthy", "refused"))},
		"degraded":  {says(router.Healthy, "", topology.Replication{Status: topology.Degraded, Reason: "held"}), summary(2, 0, trouble("Degraded", "held"))},
		"both":      {says(router.Unhealthy, "refused", topology.Replication{Status: topology.Degraded, Reason: "held"}), summary(1, 1, trouble("Unhealthy and Degraded", "held; refused"))},
		"planned": {says(router.Healthy, "", topology.Replication{Status: topology.Creating, Phase: topology.PhasePlanned, Reason: "1 in conflict"}),
			summary(2, 0, trouble("waiting for an operator", "1 in conflict"))},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s: got %+v, want %+v; the other is %s", name, c.got, c.want, one.Region)
		}
	}
	v.Requests = map[router.ReplicaKey][]string{key(1): {topology.RequestAccept}}
	if got := says(router.Healthy, "", topology.Replication{Status: topology.Creating, Phase: topology.PhasePlanned, Reason: "1 in conflict"}); !reflect.DeepEqual(got, summary(2, 0)) {
		t.Errorf("once it is accepted: %+v", got)
	}
	if got := Summarize(&View{}); got != nil {
		t.Errorf("before the first topology: %+v", got)
	}
}

// Every edit is logged with the address of who asked for it.
func TestEditsHaveAnActor(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	weight := 42
	if _, err := r.client.UpdateReplica(t.Context(), "contoso", "westus", ReplicaPatch{Weight: &weight}, false); err != nil {
		t.Fatal(err)
	}
	edits := r.logs.FilterMessage("the topology was edited").All()
	if len(edits) != 1 || !strings.HasPrefix(fmt.Sprint(edits[0].ContextMap()["by"]), "127.0.0.1:") || !strings.Contains(fmt.Sprint(edits[0].ContextMap()["changes"]), "contoso/replicas/westus/weight: ") {
		t.Errorf("%v", edits)
	}
}
