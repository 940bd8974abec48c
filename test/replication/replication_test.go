package replication

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"portolan/test/bed"
	"portolan/topology"
)

func replication(t testing.TB, value string) topology.Replication {
	t.Helper()
	var r topology.Replication
	if err := json.Unmarshal([]byte(value), &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func digestOf(t testing.TB, what interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := what.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func asTransport(err error, target **transport.Error) bool { return errors.As(err, target) }

var v3 = bed.RegistryConfig{Cache: true}
var v2 = bed.RegistryConfig{Server: bed.DistributionV2, Cache: true}

// A push in any region arrives in all others: images, nested indexes, tags moved, tags deleted.
func TestPushesReachEveryRegion(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3}, site{region: "eastasia", config: v2})
	w.declare("eastasia", "northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope", "eastasia")
	all := []string{"westus", "northeurope", "eastasia"}
	for _, region := range all {
		digest := w.push(region, "team/"+region+":1")
		w.arrives("team/"+region+":1", digest, all...)
	}
	index := multiArch(t)
	w.put("eastasia", "team/multi:1", index)
	w.arrives("team/multi:1", digestOf(t, index), all...)

	// A tag that moves in another region than it came from.
	moved := w.push("northeurope", "team/westus:1")
	w.arrives("team/westus:1", moved, all...)

	// A tag deleted where tags can be deleted alone, and one where they cannot; a sibling tag of the same digest stays.
	sibling, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	w.put("westus", "team/siblings:a", sibling)
	w.put("westus", "team/siblings:b", sibling)
	w.arrives("team/siblings:a", digestOf(t, sibling), all...)
	w.arrives("team/siblings:b", digestOf(t, sibling), all...)
	w.remove("westus", "team/siblings:a")
	w.arrives("team/siblings:a", "", all[1:]...)
	w.arrives("team/siblings:b", digestOf(t, sibling), all...)

	// A delete by digest takes the rest with it everywhere.
	w.remove("northeurope", "team/siblings@"+digestOf(t, sibling))
	w.arrives("team/siblings:b", "", all...)
	for _, region := range all {
		w.deleted(region, "team/siblings", digestOf(t, sibling))
	}
	w.ready(all...)
	for _, region := range all {
		if s := w.state(region); s.Conflicts != 0 || s.NotReplicable != 0 {
			t.Errorf("%s: %+v", region, s)
		}
	}
}

// The baseline of registries that differ: nothing is done before the operator accepted the conflict, nothing is lost after.
func TestBaselineOfDifferingRegistries(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3}, site{region: "eastasia", config: v3})
	same, err := random.Image(1024, 1)
	if err != nil {
		t.Fatal(err)
	}
	w.put("westus", "app:same", same)
	w.put("northeurope", "app:same", same)
	home, other := w.push("westus", "app:differs"), w.push("northeurope", "app:differs")
	onlyHome, onlyOther := w.push("westus", "app:home"), w.push("northeurope", "tool:other")
	w.declare("eastasia", "northeurope", "westus")
	w.start()
	w.until("northeurope to have a plan", func() bool { return w.state("northeurope").Phase == topology.PhasePlanned })
	w.ready("westus", "eastasia")
	plan := w.state("northeurope").Plan
	differs := topology.PlannedConflict{Repository: "app", Tag: "differs", Winner: home, WinnerRegion: "westus", Loser: other, LoserRegion: "northeurope",
		KeptAs: "differs.conflict-northeurope-1"}
	if plan.Same != 1 || plan.Adopt != 1 || plan.Copy != 2 || plan.Spread != 2 || plan.Conflicts != 1 || plan.Bytes < 2000 || !slices.Equal(plan.Conflicting, []topology.PlannedConflict{differs}) {
		t.Errorf("the plan is %+v", plan)
	}
	if d := w.digest("northeurope", "app:home"); d != "" {
		t.Errorf("something was copied before the plan was accepted")
	}
	if !strings.Contains(w.state("northeurope").Reason, "accept") {
		t.Errorf("the status does not say what to do: %q", w.state("northeurope").Reason)
	}
	w.ask("northeurope", topology.RequestAccept)
	all := []string{"westus", "northeurope", "eastasia"}
	w.arrives("app:differs", home, all...)
	w.arrives("app:differs.conflict-northeurope-1", other, all...)
	w.arrives("app:home", onlyHome, all...)
	w.arrives("tool:other", onlyOther, all...)
	w.ready(all...)
}

// A replica that was away catches up with everything, in both directions, also with no event.
func TestReplicaThatWasAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3})
	w.options.ScanInterval = 500e6
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	w.registries["northeurope"].Kill()
	digest := w.push("westus", "app:1")
	w.until("northeurope to be Degraded", func() bool { return w.state("northeurope").Status == topology.Degraded })
	// While Portolan is away, somebody pushes there: its event is lost.
	if err := w.registries["northeurope"].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.arrives("app:1", digest, "northeurope")
	w.ready("northeurope")
	addr := w.listener.Addr().String()
	w.stop()
	silent := w.push("northeurope", "app:2")
	w.listener = listen(t, addr)
	w.start()
	w.arrives("app:2", silent, "westus")
}

// Referrers travel with and after their image, by tag here since distribution has no API for them.
func TestReferrersAndUntagged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v2})
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	digest := w.push("westus", "app:1")
	referrer := w.refer("westus", "app:1")
	fallback := strings.Replace(digest, ":", "-", 1)
	w.until("the referrer in northeurope", func() bool {
		return w.digest("northeurope", "app:"+fallback) != "" && w.digest("northeurope", "app:"+fallback) == w.digest("westus", "app:"+fallback)
	})
	w.whole("northeurope", "app@"+referrer)
	index, err := remote.Referrers(w.ref("northeurope", "app@"+digest).(name.Digest))
	if err != nil {
		t.Fatal(err)
	}
	listed, err := index.IndexManifest()
	if err != nil || len(listed.Manifests) != 1 || listed.Manifests[0].Digest.String() != referrer {
		t.Errorf("northeurope lists the referrers %+v, %v", listed, err)
	}

	// A manifest that no tag leads to.
	lone, err := random.Image(256, 1)
	if err != nil {
		t.Fatal(err)
	}
	w.put("northeurope", "app@"+digestOf(t, lone), lone)
	w.until("the untagged manifest in westus", func() bool { return w.digest("westus", "app@"+digestOf(t, lone)) != "" })
}

// Referrers that a registry lists by its API arrive where they can only hang on a tag.
func TestReferrersByAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", referrers: true}, site{region: "northeurope", config: v3})
	digest := w.push("westus", "app:1")
	referrer := w.refer("westus", "app:1")
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	w.arrives("app:1", digest, "northeurope")
	w.until("the referrer in northeurope", func() bool { return w.digest("northeurope", "app@"+referrer) != "" })
	w.whole("northeurope", "app@"+referrer)
}

// A registry that lost everything never takes the others with it.
func TestWipedReplicaIsHeld(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3})
	w.options.ScanInterval, w.options.DeleteConfirmation = 300e6, 600e6
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	digests := map[string]string{}
	for _, tag := range []string{"app:1", "app:2", "lib:1"} {
		digests[tag] = w.push("westus", tag)
		w.arrives(tag, digests[tag], "northeurope")
	}
	w.ready("northeurope")
	r := w.registries["northeurope"]
	r.Stop()
	wipe(t, r)
	if err := r.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.until("the guard", func() bool {
		s := w.state("northeurope")
		return s.Status == topology.Degraded && strings.Contains(s.Reason, "resync")
	})
	for tag, digest := range digests {
		if w.digest("westus", tag) != digest {
			t.Errorf("westus lost %s", tag)
		}
	}
	w.ask("northeurope", topology.RequestResync)
	for tag, digest := range digests {
		w.arrives(tag, digest, "northeurope", "westus")
	}
	w.ready("northeurope")
}

// A single delete that no event told of is carried on, after two scans.
func TestDeleteFoundByScan(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3})
	w.options.ScanInterval, w.options.DeleteConfirmation = 200e6, 400e6
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	w.arrives("app:stays", w.push("westus", "app:stays"), "northeurope")
	w.arrives("app:goes", w.push("westus", "app:goes"), "northeurope")
	addr := w.listener.Addr().String()
	w.stop()
	w.remove("northeurope", "app:goes")
	w.registries["northeurope"].Kill() // its event with it
	if err := w.registries["northeurope"].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.listener = listen(t, addr)
	w.start()
	w.arrives("app:goes", "", "westus")
	if w.digest("westus", "app:stays") == "" {
		t.Error("the other tag went too")
	}
}

// A replica that leaves takes nothing with it that is nowhere else.
func TestReplicaLeaves(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3})
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	w.registries["westus"].Kill()
	digest := w.push("northeurope", "app:last")
	w.ask("northeurope", topology.RequestDelete)
	w.until("the delete to wait for westus", func() bool {
		s := w.state("northeurope")
		return s.Status == topology.Deleting && strings.Contains(s.Reason, "app:last")
	})
	select {
	case <-w.removed:
		t.Fatal("the replica was removed with a push that only it had")
	default:
	}
	if err := w.registries["westus"].Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if region := <-w.removed; region != "northeurope" {
		t.Errorf("removed %s", region)
	}
	w.arrives("app:last", digest, "westus", "northeurope")
}

// Both regions push to one tag while they cannot see each other: one wins everywhere, the other is kept everywhere.
func TestConcurrentPushes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, site{region: "westus", config: v3}, site{region: "northeurope", config: v3})
	w.declare("northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope")
	w.arrives("app:1", w.push("westus", "app:1"), "northeurope")
	addr := w.listener.Addr().String()
	w.stop()
	first := w.push("westus", "app:1")
	second := w.push("northeurope", "app:1")
	w.listener = listen(t, addr)
	w.start()
	w.until("one version everywhere", func() bool {
		d := w.digest("westus", "app:1")
		return d != "" && d == w.digest("northeurope", "app:1")
	})
	lost, region := first, "westus"
	if w.digest("westus", "app:1") == first {
		lost, region = second, "northeurope"
	}
	w.arrives("app:1.conflict-"+region+"-1", lost, "westus", "northeurope")
}
