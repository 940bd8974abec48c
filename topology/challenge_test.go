package topology

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
)

const token = "gfj9Xq_Rg85nMgfj9Xq-Rg85nMgfj9XqRg85nMgfj9X"

func TestChallenges(t *testing.T) {
	t.Parallel()
	s := open(t)
	now := time.Date(2026, 11, 25, 1, 0, 0, 0, time.UTC)
	e := NewEditor(s, EditorOptions{Now: func() time.Time { return now }})
	end := now.Add(time.Hour)
	challenge := func(name, token string) Challenge { return Challenge{Name: name, Token: token, Expires: end} }
	want := []Challenge{challenge("a.example.net", token), challenge("a.example.net", token+"2"), challenge("b.example.net", token)}
	for _, c := range want {
		if err := e.SetChallenge(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	list := func() []Challenge {
		t.Helper()
		all, err := e.Challenges(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	if got := list(); !slices.Equal(got, want) {
		t.Errorf("there are %v, want %v", got, want)
	}
	changed := func() time.Time {
		t.Helper()
		tree, err := s.List(t.Context(), topologyPrefix)
		if err != nil {
			t.Fatal(err)
		}
		return changedAt(tree, now)
	}
	before := changed()
	if err := e.ClearChallenge(t.Context(), "a.example.net", token); err != nil {
		t.Error(err)
	}
	if after := changed(); !after.After(before) {
		t.Errorf("the time of the change was %v and is %v", before, after)
	}
	if err := e.ClearChallenge(t.Context(), "a.example.net", token); !errors.Is(err, ErrNotFound) {
		t.Errorf("cleared twice: %v", err)
	}
	// Set again, it has another end.
	end = end.Add(time.Hour)
	if err := e.SetChallenge(t.Context(), challenge("b.example.net", token)); err != nil {
		t.Error(err)
	}
	if got := list(); len(got) != 2 || !got[1].Expires.Equal(end) {
		t.Errorf("set again, there are %v", got)
	}
	// One expires, which is a change of its own; the next edit sweeps it out of the store, and the time does not go back.
	now = now.Add(time.Hour)
	if got := list(); len(got) != 1 || got[0].Name != "b.example.net" {
		t.Errorf("after an hour there are %v", got)
	}
	before = changed()
	if !before.Equal(now) {
		t.Errorf("one expired at %v, and the time of the change is %v", now, before)
	}
	if err := e.SetChallenge(t.Context(), challenge("c.example.net", token)); err != nil {
		t.Error(err)
	}
	tree, err := s.List(t.Context(), challengesPrefix)
	if err != nil || len(tree.Entries) != 2 {
		t.Errorf("the store keeps %v, %v", tree.Entries, err)
	}
	if after := changed(); !after.After(before) {
		t.Errorf("the time of the change was %v and is %v", before, after)
	}
}

func TestChallengeLimits(t *testing.T) {
	t.Parallel()
	e := NewEditor(open(t), EditorOptions{})
	end := time.Now().Add(time.Hour)
	for _, c := range []Challenge{
		{"a.example.net", "", end}, {"a.example.net", "a b", end}, {"a.example.net", "a/b", end}, {"a.example.net", strings.Repeat("a", 129), end},
		{"", token, end}, {"a..net", token, end}, {"A.net", token, end}, {"a/b.net", token, end}, {strings.Repeat("a", 64) + ".net", token, end},
		{strings.Repeat("abc.", 60) + "net", token, end}, {"a.net", token, time.Now()}, {"a.net", token, end.Add(maxLifetime)},
	} {
		if err := e.SetChallenge(t.Context(), c); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v: %v", c, err)
		}
	}
	for i := range maxNameChallenges {
		if err := e.SetChallenge(t.Context(), Challenge{"a.net", fmt.Sprint(i), end}); err != nil {
			t.Fatal(err)
		}
	}
	if err := e.SetChallenge(t.Context(), Challenge{"a.net", "more", end}); !errors.Is(err, ErrRefused) {
		t.Errorf("one more: %v", err)
	}
	if err := e.SetChallenge(t.Context(), Challenge{"a.net", "0", end}); err != nil {
		t.Errorf("one of them again: %v", err)
	}
}

// A keeper has challenges in its snapshots, from the edit until they expire, each time with a later time of change.
func TestKeeperHasChallenges(t *testing.T) {
	t.Parallel()
	s := open(t)
	e := NewEditor(s, EditorOptions{})
	if err := e.CreateRegistry(t.Context(), contoso()); err != nil {
		t.Fatal(err)
	}
	k := NewKeeper(s, KeeperOptions{Logger: zaptest.NewLogger(t)})
	run(t, k)
	none := until(t, k, "a registry", func(s *Snapshot) bool { return len(s.Registries) == 1 })
	// It ends, in whole seconds, after the keeper's patience at the start, which would look anew as well.
	if err := e.SetChallenge(t.Context(), Challenge{"a.net", token, time.Now().Add(startPatience + time.Second)}); err != nil {
		t.Fatal(err)
	}
	one := until(t, k, "a challenge", func(s *Snapshot) bool { return len(s.Challenges) == 1 })
	if !one.Changed.After(none.Changed) || one.Digest != none.Digest {
		t.Errorf("changed at %v, then at %v", none.Changed, one.Changed)
	}
	gone := until(t, k, "its end", func(s *Snapshot) bool { return len(s.Challenges) == 0 && s.Changed.After(one.Changed) })
	if !gone.Changed.Equal(one.Challenges[0].Expires) {
		t.Errorf("it expired at %v, which is a change at %v", one.Challenges[0].Expires, gone.Changed)
	}
	// Whoever edits the store by hand is heard as well.
	put(t, s, Values{challengesPrefix + "b.net/" + token: time.Now().Add(time.Hour).Format(time.RFC3339), challengesPrefix + "c.net/" + token: "tomorrow"})
	until(t, k, "a challenge set by hand", func(s *Snapshot) bool { return len(s.Challenges) == 1 && s.Challenges[0].Name == "b.net" })
}
