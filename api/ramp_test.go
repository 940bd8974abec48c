package api

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"portolan/topology"
)

func TestRamps(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	on, off, none, some, all := RoutingEnabled, RoutingDisabled, 0, 50, 100
	edit := func(p ReplicaPatch) Applied {
		t.Helper()
		applied, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", p, false)
		if err != nil {
			t.Fatal(err)
		}
		return applied
	}
	changes := func(a Applied) (list []string) {
		for _, c := range a.Changes {
			line := strings.ReplaceAll(c.String(), "registries/contoso/replicas/westeurope/", "")
			weights, _, _ := strings.Cut(line, " 20") // without the times of a ramp
			list = append(list, weights)
		}
		return list
	}
	for _, p := range []ReplicaPatch{
		{Over: "30m"}, {Over: "30m", Hostname: &on}, {Over: "30m", Routing: &off}, {Over: "30m", Routing: &off, Weight: &some},
		{Over: "1s", Weight: &some}, {Over: "0s", Weight: &some}, {Over: "200h", Weight: &some}, {Over: "soon", Weight: &some},
	} {
		if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", p, false); !IsCode(err, CodeInvalid) || !strings.Contains(err.Error(), "over") {
			t.Errorf("%+v: %v", p, err)
		}
	}

	// Down to nothing: what is told is the end of it.
	a := edit(ReplicaPatch{Weight: &none, Over: "30m"})
	if got := fmt.Sprint(changes(a)); got != "[+ weight: 0 + ramp: 100->0]" && got != "[+ ramp: 100->0 ~ weight: 100 -> 0]" {
		t.Errorf("changes %s", got)
	}
	if len(a.Ramps) != 1 || a.Ramps[0].From != 100 || a.Ramps[0].To != 0 || a.Ramps[0].End.Sub(a.Ramps[0].Start) != 30*time.Minute {
		t.Fatalf("ramps %+v", a.Ramps)
	}
	if len(a.Drains) != 1 || a.Drains[0].Until.Sub(a.Ramps[0].End) != time.Minute+topology.Spreading {
		t.Errorf("drains %+v", a.Drains)
	}
	if near := a.Shares[0].Splits[0]; near.Nearest != "westeurope" || len(near.Shares) != 1 || near.Shares[0].Region != "westus" {
		t.Errorf("shares %+v", near)
	}
	shown, err := r.client.Replica(ctx, "contoso", "westeurope")
	if err != nil || shown.Weight != 100 || shown.Ramp == nil || shown.Ramp.To != 0 {
		t.Errorf("%+v, %v", shown, err)
	}
	registry, err := r.client.Registry(ctx, "contoso")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range registry.Document.Replicas {
		if p.Region == "westeurope" && *p.Weight != 0 {
			t.Errorf("%d is declared", *p.Weight)
		}
	}
	// It leaves the last one that clients may be sent to.
	if _, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Routing: &off}, false); !IsCode(err, CodeRefused) {
		t.Errorf("the only replica at the end of a ramp is taken away: %v", err)
	}
	// What leaves it alone does not speak of it.
	credentials := "env:X"
	if got := fmt.Sprint(changes(edit(ReplicaPatch{Credentials: &credentials}))); got != "[+ credentials: env:X]" {
		t.Errorf("changes %s", got)
	}
	a = edit(ReplicaPatch{Weight: &all})
	if got := fmt.Sprint(changes(a)); got != "[- ramp: 100->0]" || len(a.Ramps)+len(a.Drains) > 0 {
		t.Errorf("changes %s, %+v", got, a)
	}

	// Up from nothing: until the first step there is nothing.
	edit(ReplicaPatch{Routing: &off})
	a = edit(ReplicaPatch{Routing: &on, Over: "1h"})
	if got := fmt.Sprint(changes(a)); got != "[~ routing: disabled -> enabled + ramp: 0->100]" || len(a.Ramps) != 1 || len(a.Drains) > 0 {
		t.Errorf("changes %s, %+v", got, a)
	}
	if _, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Routing: &off}, false); !IsCode(err, CodeRefused) {
		t.Errorf("the only replica with a weight at the moment is taken away: %v", err)
	}
	d, err := topology.ParseYAML("t.yaml", []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	if diff, err := r.client.Diff(ctx, *d); err != nil || len(diff) != 1 {
		t.Errorf("the file differs by %v, %v", diff, err)
	}
	// One that is made anew is said so; the end at once is a change of the weight that there is.
	if got := fmt.Sprint(changes(edit(ReplicaPatch{Weight: &some, Over: "2h"}))); got != "[~ ramp: 0->100 ~ weight: 0 -> 50]" {
		t.Errorf("changes %s", got)
	}
	a = edit(ReplicaPatch{Weight: &some})
	if got := fmt.Sprint(changes(a)); got != "[- ramp: 0->50 ~ weight: 0 -> 50]" || len(a.Ramps) > 0 {
		t.Errorf("changes %s", got)
	}
}

func TestSimulateTellsOfRamps(t *testing.T) {
	t.Parallel()
	r := newSimulator(t)
	none := 0
	if _, err := r.client.UpdateReplica(t.Context(), "contoso", "westeurope", ReplicaPatch{Weight: &none, Over: "30m"}, false); err != nil {
		t.Fatal(err)
	}
	d, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s, err := r.client.Simulate(t.Context(), Simulate{Document: d, Queries: "193.0.6.0/24\n"})
	if err != nil || !strings.Contains(strings.Join(s.Assumed, "\n"), "the weight of replica contoso/westeurope, which is on its way, is taken to be 0 already") {
		t.Errorf("%+v, %v", s, err)
	}
}
