package replicator

import (
	"slices"
	"strings"
	"testing"
	"time"

	client "github.com/google/go-containerregistry/pkg/v1/remote"

	"portolan/topology"
)

// Whoever waits for an image is told of what will not come by itself: of a plan that an operator is to accept, and of a deletion, also
// before it is confirmed.
func TestInspectTellsWhatDoesNotCome(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.options.DeleteConfirmation = time.Second
	homes := f.push("home", "app:1")
	f.push("other", "app:1")
	f.start()
	inspect := func() Inspection {
		i, err := f.replicator.Inspect(t.Context(), "contoso", "app", "1")
		if err != nil || len(i.Replicas) != 2 {
			t.Fatalf("%+v, %v", i, err)
		}
		return i
	}
	f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
	f.until("it to be told", func() bool {
		return strings.Contains(inspect().Replicas[1].Awaits, "portolan replica accept contoso/other")
	})
	f.ask("other", topology.RequestAccept)
	f.arrives("app:1", homes, "other")
	f.until("nothing to be awaited", func() bool {
		return inspect().Replicas[1] == ReplicaInspection{Region: "other", Applied: true, Digest: homes}
	})
	if err := client.Delete(f.ref("home", "app:1")); err != nil {
		t.Fatal(err)
	}
	f.until("it to be gone", func() bool {
		i := inspect()
		return i.Digest == homes && i.Deleted.IsZero() && i.Replicas[0].Gone && !i.Replicas[1].Gone
	})
	f.until("it to be deleted", func() bool {
		i := inspect()
		return i.Digest == "" && time.Since(i.Deleted) < time.Hour && !i.Replicas[0].Gone && slices.Contains(i.Earlier, homes)
	})
}
