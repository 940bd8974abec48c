package topology

import (
	"errors"
	"strings"
	"testing"
)

func TestSuggestedLabels(t *testing.T) {
	t.Parallel()
	for given, want := range map[string]string{"Foo_Bar": `write "foo-bar"`, "foo_bar": `write "foo-bar"`, "Foo": `write "foo"`, "_Foo": `write "foo"`, "_": "only a-z, 0-9 and hyphens"} {
		if err := checkLabel(given); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("%s: %v, want %s", given, err, want)
		}
	}
}

// The replica that is new is to blame for an endpoint that there is already, whatever the order of the regions.
func TestTheNewEndpointIsToBlame(t *testing.T) {
	t.Parallel()
	e := NewEditor(open(t), EditorOptions{})
	r := contoso()
	if err := e.CreateRegistry(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	for _, region := range []string{"australiaeast", "westus3"} {
		p := replica(region, 9)
		p.Endpoint = r.Replicas[0].Endpoint
		var invalid *InvalidError
		if err := e.CreateReplica(t.Context(), r.Name, p); !errors.As(err, &invalid) || len(invalid.Faults) != 1 || invalid.Faults[0].Path != "endpoint" || !strings.Contains(err.Error(), "endpoint of replica "+r.Replicas[0].Region+" too") {
			t.Errorf("%s: %v", region, err)
		}
	}
}

// The refusal to delete the home's replica tells a way that leads there.
func TestAnotherHome(t *testing.T) {
	t.Parallel()
	e := NewEditor(open(t), EditorOptions{})
	if err := e.CreateRegistry(t.Context(), contoso()); err != nil {
		t.Fatal(err)
	}
	home := contoso().Home
	if err := e.DeleteReplica(t.Context(), "contoso", home, Request{}); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "portolan registry update contoso --home") {
		t.Fatal(err)
	}
	other := contoso().Replicas[1].Region
	if err := e.UpdateRegistry(t.Context(), "contoso", func(r *RegistryDocument) { r.Home = other }); err != nil {
		t.Fatal(err)
	}
	if err := e.DeleteReplica(t.Context(), "contoso", home, Request{}); err != nil {
		t.Error(err)
	}
}
