package topology

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/store"
)

func TestLogged(t *testing.T) {
	t.Parallel()
	var changes []Change
	for i := range maxLogged + 3 {
		changes = append(changes, Change{Op: Changed, Key: "registries/contoso/replicas/westus/weight", Old: "1", New: strconv.Itoa(i)})
	}
	if got := logged(changes[:1]); !slices.Equal(got, []string{"~ registries/contoso/replicas/westus/weight: 1 -> 0"}) {
		t.Errorf("%q", got)
	}
	if got := logged(changes); len(got) != maxLogged+1 || got[maxLogged] != "and 3 more" {
		t.Errorf("%q", got)
	}
	if got := logged([]Change{{Op: Added, Key: "registries/contoso/password", New: "hunter2"}})[0]; strings.Contains(got, "hunter2") || !strings.Contains(got, "contoso/password") {
		t.Errorf("of a key that is none: %q", got)
	}
}

// An edit is logged with who made it; what becomes of it, and of one that somebody made past the Editor, with what changed. No secret is.
func TestEditsAreLogged(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zap.InfoLevel)
	s := open(t)
	k := NewKeeper(s, KeeperOptions{Logger: zap.New(core)})
	run(t, k)
	e := NewEditor(s, EditorOptions{Logger: zap.New(core)})
	if err := e.CreateRegistry(t.Context(), contoso()); err != nil {
		t.Fatal(err)
	}
	until(t, k, "the registry", func(s *Snapshot) bool { return s.Registry("contoso") != nil })
	told := func(message, part string) (found []observer.LoggedEntry) {
		for _, l := range logs.FilterMessage(message).All() {
			if strings.Contains(fmt.Sprint(l.ContextMap()["changes"]), part) {
				found = append(found, l)
			}
		}
		return found
	}
	if got := told("the topology was edited", ""); len(got) != 0 {
		t.Errorf("without an actor: %v", got)
	}
	ctx := WithActor(t.Context(), "192.0.2.1:5000")
	weigh := func(r *ReplicaDocument) { w := 42; r.Weight = &w }
	if err := e.UpdateReplica(ctx, "contoso", "westus", weigh); err != nil {
		t.Fatal(err)
	}
	if err := e.UpdateReplica(ctx, "contoso", "westus", weigh); err != nil { // which changes nothing
		t.Fatal(err)
	}
	got := told("the topology was edited", "westus/weight: ")
	if len(got) != 1 || got[0].ContextMap()["by"] != "192.0.2.1:5000" {
		t.Errorf("%v", got)
	}
	await := func(part string) {
		t.Helper()
		for end := time.Now().Add(deadline); len(told("topology", part)) == 0; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("no new topology is logged with %q: %v", part, logs.All())
			}
		}
	}
	await("westus/weight: ")
	if _, err := s.Commit(t.Context(), store.Put("registries/contoso/replicas/westus/credentials", "hunter2"), store.Put("registries/contoso/replicas/westus/weight", "43")); err != nil {
		t.Fatal(err)
	}
	await("westus/weight: 42 -> 43")
	if got := told("topology", "hunter2"); len(got) != 0 {
		t.Errorf("a secret is logged: %v", got)
	}
}
