package replicator

import (
	"slices"
	"testing"

	"portolan/topology"
)

// The plan of a baseline says which version wins and what becomes of the other, and so it comes: what is kept is listed.
func TestPlannedConflictsAreKept(t *testing.T) {
	t.Parallel()
	for _, policy := range []topology.Conflicts{topology.ConflictsKeep, topology.ConflictsLog} {
		t.Run(string(policy), func(t *testing.T) {
			t.Parallel()
			f := newServers(t, "home", "other")
			f.config.Policy.Conflicts = policy
			winner, loser := f.push("home", "app:1"), f.push("other", "app:1")
			f.start()
			f.until("the plan", func() bool { return f.state("other").Phase == topology.PhasePlanned })
			plan := f.state("other").Plan
			want := topology.PlannedConflict{Repository: "app", Tag: "1", Winner: winner, WinnerRegion: "home", Loser: loser, LoserRegion: "other"}
			spread := 0
			if policy == topology.ConflictsKeep {
				want.KeptAs, spread = "1.conflict-other-1", 1
			}
			if !slices.Equal(plan.Conflicting, []topology.PlannedConflict{want}) || plan.Copy != 1 || plan.Spread != spread {
				t.Errorf("the plan is %+v", plan)
			}
			f.ask("other", topology.RequestAccept)
			f.ready("home", "other")
			f.arrives("app:1", winner, "home", "other")
			kept, err := f.replicator.Conflicts(t.Context(), "contoso", 10)
			if err != nil {
				t.Fatal(err)
			}
			if policy == topology.ConflictsLog {
				if len(kept) != 0 {
					t.Errorf("kept against the policy: %+v", kept)
				}
				return
			}
			if len(kept) != 1 || kept[0].Repository != "app" || kept[0].Tag != "1" || kept[0].Region != "other" || kept[0].Digest != loser || kept[0].Current != winner ||
				kept[0].Since.IsZero() || kept[0].Until.Sub(kept[0].Since) != retention {
				t.Fatalf("%+v", kept)
			}
			f.arrives("app:"+kept[0].KeptAs, loser, "home", "other")
			if kept, err := f.replicator.Conflicts(t.Context(), "contoso", 0); err != nil || len(kept) != 0 {
				t.Errorf("beyond the limit: %+v, %v", kept, err)
			}
		})
	}
}
