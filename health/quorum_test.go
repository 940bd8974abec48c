package health

import (
	"encoding/json"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// votesOf makes votes of letters: + up, - down.
func votesOf(letters string) []Vote {
	var votes []Vote
	for _, l := range letters {
		votes = append(votes, Vote{Health: map[rune]router.Health{'+': router.Healthy, '-': router.Unhealthy}[l]})
	}
	return votes
}

func TestAgree(t *testing.T) {
	t.Parallel()
	const up, down, unknown = router.Healthy, router.Unhealthy, router.Unknown
	for _, c := range []struct {
		name    string
		own     router.Health
		votes   string
		servers int
		want    router.Health
	}{
		{"alone", down, "-", 1, down},
		{"two that differ", down, "-+", 2, down},
		{"two alike against this one, which does not know", unknown, "--", 2, unknown},
		{"three alike", up, "+++", 3, up},
		{"outvoted", down, "-++", 3, up},
		{"in the majority", down, "--+", 3, down},
		{"this one abstains, the others agree", down, "++", 3, up},
		{"this one abstains, the others do not agree", down, "+-", 3, down},
		{"two abstain: one vote is no majority", down, "+", 3, down},
		{"all abstain", down, "", 3, down},
		{"a tie of four", up, "++--", 4, up},
		{"a tie of four, seen from below", down, "++--", 4, down},
		{"not known here", unknown, "--", 3, down},
		{"one of five can reach it", unknown, "-", 5, unknown},
		{"one of five can reach it: it does", up, "+", 5, up},
		{"five", up, "++---", 5, down},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if got := agree(c.own, votesOf(c.votes), c.servers); got != c.want {
				t.Errorf("got %v, want %v", got, c.want)
			}
		})
	}
}

// What the promises of a majority come to, whatever the votes.
func TestAgreeProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		own := rapid.SampledFrom([]router.Health{router.Unknown, router.Healthy, router.Unhealthy}).Draw(t, "own")
		letters := []byte(rapid.StringMatching(`[+-]{0,9}`).Draw(t, "votes"))
		servers := len(letters) + rapid.IntRange(0, 3).Draw(t, "abstaining")
		got := agree(own, votesOf(string(letters)), servers)

		shuffled := slices.Clone(letters)
		rand.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again := agree(own, votesOf(string(shuffled)), servers); again != got {
			t.Fatalf("the order matters: %v, %v", got, again)
		}
		if got != own {
			word := map[router.Health]string{router.Healthy: "+", router.Unhealthy: "-"}[got]
			n := strings.Count(string(letters), word)
			if servers < 3 || n < 2 || 2*n <= len(letters) {
				t.Fatalf("%q of %d servers overrule %v", letters, servers, own)
			}
		}
		// One more vote for up never takes it down, and the other way round.
		for i, l := range letters {
			if l == '-' {
				better := slices.Clone(letters)
				better[i] = '+'
				if then := agree(own, votesOf(string(better)), servers); got == router.Healthy && then == router.Unhealthy {
					t.Fatalf("%q is %v, and %q is %v", letters, got, better, then)
				}
			}
		}
		// Servers that hear the same, and differ only in what they found, agree unless nobody is in the majority.
		if up, down := strings.Count(string(letters), "+"), strings.Count(string(letters), "-"); servers >= 3 && up != down && max(up, down) >= 2 {
			for _, other := range []router.Health{router.Unknown, router.Healthy, router.Unhealthy} {
				if agree(other, votesOf(string(letters)), servers) != got {
					t.Fatalf("%q comes to different things", letters)
				}
			}
		}
	})
}

func TestCast(t *testing.T) {
	t.Parallel()
	b := cast("i", time.Unix(1, 0), map[string]router.Health{"r/a/2": router.Unhealthy, "r/a/1": router.Unhealthy, "r/b/1": router.Healthy, "r/c/1": router.Unknown})
	if b.Abstains || !slices.Equal(b.Up, []string{"r/b/1"}) || !slices.Equal(b.Down, []string{"r/a/1", "r/a/2"}) {
		t.Errorf("got %+v", b)
	}
	for place, want := range map[string]router.Health{"r/b/1": router.Healthy, "r/a/2": router.Unhealthy, "r/c/1": router.Unknown, "r/d/1": router.Unknown} {
		if got := b.says(place); got != want {
			t.Errorf("it says %v of %s", got, place)
		}
	}
	if b := cast("i", time.Unix(1, 0), map[string]router.Health{"r/a/1": router.Unhealthy, "r/b/1": router.Unknown}); !b.Abstains {
		t.Error("one that sees everything down votes")
	}
	if b := cast("i", time.Unix(1, 0), nil); b.Abstains {
		t.Error("one that knows nothing abstains")
	}
}

// A ballot counts by when it was seen to be written here, and by its own clock only when it is met for the first time.
func TestElectorate(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1_000_000, 0)
	e := &electorate{name: "own", instance: "x"}
	tree := func(entries ...store.Entry) store.Update { return store.Update{Tree: store.Tree{Entries: entries}} }
	entry := func(name string, revision uint64, b ballot) store.Entry {
		text, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		return store.Entry{Key: topology.VoteKey(name), Value: string(text), Revision: revision}
	}
	expect := func(what string, at time.Time, want ...string) {
		t.Helper()
		if got := e.present(at); !slices.Equal(got, want) {
			t.Errorf("%s: %q are heard, want %q", what, got, want)
		}
	}
	dead := ballot{Instance: "d", Time: begin.Add(-time.Minute)}
	ahead := ballot{Instance: "a", Time: begin.Add(time.Hour)} // by its clock
	e.hear(tree(entry("ahead", 5, ahead), entry("dead", 4, dead), store.Entry{Key: topology.VoteKey("odd"), Value: "?", Revision: 6}), begin)
	expect("at first sight", begin, "ahead")
	expect("a clock that is ahead makes nobody live longer", begin.Add(voteLife), []string(nil)...)

	e.hear(tree(entry("ahead", 7, ahead), entry("dead", 4, dead)), begin.Add(10*time.Second))
	expect("after another heartbeat", begin.Add(voteLife), "ahead")
	e.hear(tree(entry("ahead", 7, ahead), entry("dead", 8, dead)), begin.Add(12*time.Second))
	expect("whose clock is behind, and writes", begin.Add(voteLife), "ahead", "dead")

	e.hear(store.Update{Err: errors.New("away")}, begin.Add(13*time.Second))
	expect("the store is away", begin.Add(13*time.Second), []string(nil)...)
	e.hear(tree(entry("ahead", 7, ahead), entry("dead", 8, dead)), begin.Add(20*time.Second))
	expect("the store is back with what it had", begin.Add(20*time.Second), "ahead", "dead")
	e.hear(tree(entry("dead", 8, dead)), begin.Add(21*time.Second))
	expect("a ballot was taken back", begin.Add(21*time.Second), "dead")

	if ops := e.silent(begin.Add(time.Minute)); len(ops) != 0 {
		t.Errorf("removed too early: %v", ops)
	}
	if ops := e.silent(begin.Add(2 * time.Hour)); len(ops) != 1 || ops[0] != store.DeleteIf("state/votes/dead", 8) {
		t.Errorf("what nobody writes is removed: %v", ops)
	}

	// Another process under the same name is one that writes after this one did.
	e.hear(tree(entry("own", 9, ballot{Instance: "before the restart"})), begin)
	if !e.rival.IsZero() {
		t.Error("the own ballot of before a restart is taken for a rival's")
	}
	e.written = 10
	e.hear(tree(entry("own", 11, ballot{Instance: "y"})), begin)
	if !e.rival.Equal(begin) {
		t.Error("a rival goes unnoticed")
	}
}
