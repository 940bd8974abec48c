package replicator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
)

// calm is a simulated world in which nothing fails and nothing happens but what the test does.
func calm(t *testing.T) (s *simulation, east, north, west *simRegistry) {
	t.Helper()
	s = newSimulation(t, 1, false)
	s.calm = true
	return s, s.regions[0], s.regions[1], s.regions[2]
}

func (s *simulation) region(r *simRegistry) *member {
	for _, m := range s.fleets[0].members {
		if m.Region == r.region {
			return m
		}
	}
	return nil
}

// look scans a region after some minutes.
func (s *simulation) look(t *testing.T, r *simRegistry) survey {
	t.Helper()
	s.clock = s.clock.Add(6 * time.Minute)
	found, err := s.engines[0].scan(t.Context(), s.region(r), s.clock.Add(-6*time.Minute), noPace, false)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// converge carries everything everywhere.
func (s *simulation) converge(t *testing.T) {
	t.Helper()
	for _, r := range s.regions {
		s.look(t, r)
	}
	for range 3 {
		for _, r := range s.regions {
			m := s.region(r)
			for _, key := range s.due(m) {
				if _, err := s.engines[0].apply(t.Context(), m, key, s.clock, false); err != nil && !errors.Is(err, errAgain) {
					t.Fatalf("applying %s to %s: %v", key, r.region, err)
				}
			}
		}
	}
	for _, r := range s.regions {
		r.events = nil
	}
}

func (s *simulation) head(tag string) string { return s.ledger.rows[s.key(tag)].Record.Head.Digest }

// seeded is a world in which three tags are everywhere.
func seeded(t *testing.T) (s *simulation, east, north, west *simRegistry) {
	t.Helper()
	s, east, north, west = calm(t)
	for _, tag := range []string{"a", "b", "c"} {
		s.push(east, tag)
	}
	s.converge(t)
	for _, r := range s.regions {
		if len(r.tags) != 3 {
			t.Fatalf("%s has %v", r.region, r.tags)
		}
	}
	return s, east, north, west
}

func TestDeleteByScanTakesTwoLooks(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	before := s.head("a")
	delete(north.tags, "a")
	s.look(t, north)
	s.look(t, north) // after 6 minutes
	if s.head("a") != before {
		t.Fatal("deleted too early")
	}
	// It was there in between: the count begins anew.
	north.tags["a"] = before
	s.look(t, north)
	delete(north.tags, "a")
	s.look(t, north)
	if s.head("a") != before {
		t.Fatal("a tag that came and went was deleted")
	}
	s.look(t, north)
	if s.look(t, north); s.head("a") != ledger.Absent {
		t.Error("an absence of 12 minutes is no delete")
	}
}

// The count of an absence belongs to the version that was missing.
func TestAnotherVersionIsAnotherAbsence(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	delete(north.tags, "a")
	s.look(t, north)
	s.push(east, "a")
	s.look(t, east)
	m := s.region(north)
	if _, err := s.engines[0].apply(t.Context(), m, s.key("a"), s.clock, false); err != nil {
		t.Fatal(err)
	}
	delete(north.tags, "a")
	s.clock = s.clock.Add(time.Hour)
	if s.look(t, north); s.head("a") == ledger.Absent {
		t.Error("one look at the new version deleted it")
	}
}

// The answers to an event, and to Inspect, are no scans: they confirm nothing.
func TestOnlyScansConfirmAnAbsence(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	delete(north.tags, "a")
	s.look(t, north)
	s.clock = s.clock.Add(time.Hour)
	for _, ev := range []evidence{{}, {pushes: []push{{Event: version.Event{Digest: "sha256:9999", Time: s.clock}, heard: s.clock}}}} {
		verdict, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), ev)
		if err != nil && !errors.Is(err, errAgain) || s.head("a") == ledger.Absent {
			t.Errorf("%+v: %s, %v", ev, verdict, err)
		}
	}
}

// Deletes that are remembered are no tags: neither the guard's share nor its words count them.
func TestGuardCountsLiveTags(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	for range 4 {
		delete(north.tags, "a")
		s.look(t, north)
		s.clock = s.clock.Add(10 * time.Minute)
	}
	if s.head("a") != ledger.Absent {
		t.Fatal("it was not deleted")
	}
	for range 2 {
		s.look(t, north)
	}
	asked := 0
	s.engines[0].rules.guard = func(tags, _ int) bool { asked = tags; return true }
	delete(north.tags, "b")
	if found := s.look(t, north); asked != 2 || !strings.HasPrefix(found.accident(), "1 of 2 tags vanished") {
		t.Errorf("%d, %s", asked, found.accident())
	}
	clear(north.tags)
	if found := s.look(t, north); !strings.HasPrefix(found.accident(), "all 2 tags vanished") {
		t.Error(found.accident())
	}
}

func TestHiddenRepositoryDeletesNothing(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	s.engines[0].rules.guard = func(int, int) bool { return false }
	north.hidden = true
	clear(north.tags)
	found := s.look(t, north)
	if !found.guarded {
		t.Error("nothing can be read there, and the guard is quiet")
	}
	// With something readable elsewhere the guard may be quiet; the repository is still not shown.
	l := look{engine: s.engines[0], member: s.region(north), since: s.clock, wait: noPace, readable: true, shown: map[string]bool{}}
	for range 4 {
		l.regressed = nil
		if err := l.repository(t.Context(), simRepository); err != nil {
			t.Fatal(err)
		}
		if err := l.decide(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		s.clock = s.clock.Add(20 * time.Minute)
	}
	if s.head("a") == ledger.Absent {
		t.Error("rights that were lost deleted tags")
	}
}

// One that pushes to a tag all the time does not keep what was overwritten there from being judged.
func TestEachPushWaitsForItself(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	s.clock = s.clock.Add(time.Minute)
	old := push{Event: version.Event{Digest: "sha256:0077", Time: s.clock.Add(-time.Minute)}, heard: s.clock.Add(-time.Minute)}
	north.manifests[old.Digest] = true
	fresh := push{Event: version.Event{Digest: north.tags["a"], Time: s.clock}, heard: s.clock}
	if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), evidence{pushes: []push{old, fresh}}); err != nil {
		t.Error(err)
	}
	old.heard = s.clock
	if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("b"), evidence{pushes: []push{old}}); !errors.Is(err, errAgain) {
		t.Errorf("what was heard of this moment may come yet: %v", err)
	}
}

// A manifest that no tag leads to, and that a registry which answers cannot give, is not asked for for ever.
func TestUnreadableManifestOfAPush(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	lost := "sha256:0077"
	north.refuse = func(_, reference string) error {
		if reference == lost {
			return errors.New("500")
		}
		return nil
	}
	for heard, fails := range map[time.Duration]bool{time.Minute: true, unreadableTime + time.Minute: false} {
		p := push{Event: version.Event{Digest: lost, Time: s.clock.Add(-heard)}, heard: s.clock.Add(-heard)}
		if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), evidence{pushes: []push{p}}); (err != nil) != fails {
			t.Errorf("heard of %v ago: %v", heard, err)
		}
	}
}

func TestScanThatFails(t *testing.T) {
	t.Parallel()
	unavailable := &UnavailableError{Err: errors.New("503")}
	for name, c := range map[string]struct {
		refuse func(request, reference string) error
		// What of it keeps a scan, and a baseline, from coming to an end.
		scan, baseline bool
	}{
		"not a registry": {func(request, _ string) error {
			if request == "ping" {
				return errors.New("not a registry")
			}
			return nil
		}, true, true},
		"the listing fails": {func(request, _ string) error {
			if request == "tags" {
				return unavailable
			}
			return nil
		}, false, true},
		"one tag fails": {func(_, reference string) error {
			if reference == "b" {
				return unavailable
			}
			return nil
		}, false, false},
		"it asks to be left alone for long": {func(request, _ string) error {
			if request == "tags" {
				return &UnavailableError{Err: errors.New("429"), RetryAfter: time.Hour}
			}
			return nil
		}, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _, north, _ := seeded(t)
			before := s.head("b")
			north.refuse = c.refuse
			s.push(north, "c")
			if name == "one tag fails" {
				delete(north.tags, "a") // where something cannot be read, absence proves little
				before = s.head("a")
			} else {
				delete(north.tags, "b")
			}
			for range 4 {
				s.clock = s.clock.Add(6 * time.Minute)
				found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false)
				if (err != nil) != c.scan || err == nil && len(found.unread) != 1 {
					t.Fatalf("%v, unread %v", err, found.unread)
				}
			}
			if s.head("a") != before && s.head("b") != before {
				t.Error("a scan with failures deleted a tag")
			}
			if !c.scan && s.head("c") != north.tags["c"] {
				t.Error("what fails hides the push of another tag")
			}
			b, err := s.engines[0].compare(t.Context(), s.region(north), noPace)
			if (err != nil) != c.baseline {
				t.Errorf("baseline: %v", err)
			}
			unknown := due{s.key("b"), s.ledger.rows[s.key("b")].Record.Head.Sequence, ledger.UnknownSequence}
			if err == nil && !slices.Contains(b.due, unknown) {
				t.Errorf("of a tag that cannot be read, something is known: %v", b.due)
			}
		})
	}
}

// A request that fails once is made again, not the whole scan.
func TestScanAsksAgain(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	failures := 0
	north.refuse = func(request, reference string) error {
		if failures++; failures%2 == 1 && request != "ping" {
			return &UnavailableError{Err: errors.New("429"), RetryAfter: 7 * time.Second}
		}
		return nil
	}
	var rested time.Duration
	pace := func(_ context.Context, rest time.Duration) error { rested = max(rested, rest); return nil }
	found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, pace, false)
	if err != nil || len(found.unread) != 0 || found.tags != 3 {
		t.Errorf("%v, %+v", err, found)
	}
	if rested < 7*time.Second {
		t.Errorf("it was asked again after %v", rested)
	}
	if _, err := s.engines[0].compare(t.Context(), s.region(north), pace); err != nil {
		t.Error(err)
	}
}

// What others are told meanwhile, so that a scan's requests are not sent, is waited for, and nothing is called unreadable for it.
func TestScanWaitsWhileTheRegistryRests(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	resting := 0
	north.refuse = func(string, string) error {
		if resting++; resting%(2*maxTries) != 0 {
			return &UnavailableError{Err: errors.New("it asked to be left alone"), RetryAfter: 7 * time.Second, Unsent: true}
		}
		return nil
	}
	rested := 0
	pace := func(_ context.Context, rest time.Duration) error {
		if rest >= 7*time.Second {
			rested++
		}
		return nil
	}
	found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, pace, false)
	if err != nil || len(found.unread) != 0 || found.tags != 3 {
		t.Errorf("%v, %+v", err, found)
	}
	if b, err := s.engines[0].compare(t.Context(), s.region(north), pace); err != nil || len(b.unread) != 0 {
		t.Errorf("baseline: %v, unread %v", err, b.unread)
	}
	if waited := resting - resting/(2*maxTries); rested != waited {
		t.Errorf("it waited %d times of %d", rested, waited)
	}
}

// A dead address is told of at the first request, and one that never stops asking for rest ends a scan, too.
func TestScanEndsWithItsRegistry(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	for name, c := range map[string]struct {
		err  error
		asks int
	}{
		"dead":    {&UnavailableError{Err: errors.New("no route")}, 1},
		"resting": {&UnavailableError{Err: errors.New("later"), RetryAfter: time.Second, Unsent: true}, maxRests},
	} {
		asked := 0
		north.refuse = func(string, string) error { asked++; return c.err }
		if _, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false); !errors.Is(err, c.err) || asked != c.asks {
			t.Errorf("%s: asked %d times, %v", name, asked, err)
		}
	}
}

func TestScanGivesUpOnARegistryThatIsAway(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	asked := 0
	north.refuse = func(request, _ string) error {
		if request == "head" {
			asked++
			return errors.New("no route")
		}
		return nil
	}
	for n := range 50 {
		north.tags[fmt.Sprint("t", n)] = "sha256:0001"
	}
	if _, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false); err == nil || asked != maxBlind*maxTries {
		t.Errorf("asked %d times: %v", asked, err)
	}
}

// One damaged manifest may be that of many tags, which are neighbours then.
func TestScanPassesOverNeighbours(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	for _, tag := range []string{"b1", "b2", "b3", "b4", "d"} {
		s.push(east, tag)
	}
	s.converge(t)
	bad := func(_, reference string) error {
		if strings.HasPrefix(reference, "b") {
			return &UnavailableError{Err: errors.New("500")}
		}
		return nil
	}
	north.refuse = bad
	s.clock = s.clock.Add(time.Minute)
	s.push(north, "d")
	found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false)
	if err != nil || len(found.unread) != 5 || s.head("d") != north.tags["d"] {
		t.Errorf("%v, unread %v, the head of d is %q", err, found.unread, s.head("d"))
	}
	if b, err := s.engines[0].compare(t.Context(), s.region(north), noPace); err != nil || len(b.unread) != 5 {
		t.Errorf("baseline: %v, unread %v", err, b.unread)
	}
	// Gone for good in the middle, it is not asked for all the rest.
	asked := 0
	north.refuse = func(_, reference string) error {
		if reference == "a" && asked == 0 {
			return nil
		}
		if len(reference) > 0 {
			asked++
			return errors.New("no route")
		}
		return nil
	}
	if _, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false); err == nil || asked > maxFailures*maxTries+1 {
		t.Errorf("asked %d times: %v", asked, err)
	}
	north.refuse = func(_, reference string) error {
		if len(reference) > 0 {
			return errors.New("no disk")
		}
		return nil
	}
	if _, err := s.engines[0].compare(t.Context(), s.region(north), noPace); err == nil {
		t.Error("a registry of which nothing can be read has a baseline")
	}
}

// A manifest that is to be deleted, and is gone already, needs no delete: where that is switched off it would be refused.
func TestDeleteOfAnAbsentManifest(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	digest := s.head("a")
	key := s.key(digest)
	key.Kind = ledger.Manifest
	west := s.region(s.regions[2])
	s.clock = s.clock.Add(time.Second)
	s.eraseByUser(north, "a")
	for _, e := range north.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(north), e); err != nil {
			t.Fatal(err)
		}
	}
	s.regions[2].erase(digest, "by something else")
	target := *west
	target.Remote = undeletable{s.regions[2]}
	if _, err := s.engines[0].apply(t.Context(), &target, key, s.clock, false); err != nil || version.Due(s.ledger.rows[key].Record, west.Replica) {
		t.Errorf("%v, %+v", err, s.ledger.rows[key].Record)
	}
}

// undeletable is a registry that deletes nothing.
type undeletable struct{ *simRegistry }

func (undeletable) Delete(context.Context, string, string, string) error { return ErrUnsupported }

// A look at all tags may take long. Pushes that no event told of are found meanwhile.
func TestScanListsAnewWhenItTakesLong(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	pushed := false
	pace := func(context.Context, time.Duration) error {
		s.clock = s.clock.Add(3 * time.Minute)
		return nil
	}
	north.refuse = func(request, reference string) error {
		if request == "head" && !pushed {
			pushed = true
			s.push(north, "new")
		}
		return nil
	}
	heads := 0
	s.engines[0].decided = func(_ string, key ledger.Key, _ version.Verdict) {
		if heads++; key.Reference != "new" {
			t.Errorf("%s was decided", key)
		}
	}
	if _, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, pace, false); err != nil {
		t.Fatal(err)
	}
	if heads == 0 || s.head("new") != north.tags["new"] {
		t.Error("what was pushed during the scan was not found by it")
	}
}

// Where listing takes longer than the time between two listings, the look at all tags goes on nevertheless.
func TestScanThatListsForLongEnds(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	for n := range 20 {
		s.push(north, fmt.Sprint("t", n))
	}
	s.converge(t)
	listings := 0
	north.refuse = func(request, _ string) error {
		switch request {
		case "tags":
			listings++
			s.clock = s.clock.Add(6 * time.Minute)
		case "head":
			s.clock = s.clock.Add(time.Second)
		}
		return nil
	}
	if found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false); err != nil || found.tags != 23 || listings != 1 {
		t.Errorf("%v: %d listings for %d tags", err, listings, found.tags)
	}
}

// An old version where nothing was known to be is met in each listing of a scan, and is one regression for the guard.
func TestRegressionIsCountedOnce(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.push(east, "d")
	s.look(t, east)
	old := s.head("d")
	s.push(east, "d")
	s.look(t, east)
	north.tags["d"], north.manifests[old] = old, true
	heads := 0
	north.refuse = func(request, reference string) error {
		if request == "head" {
			s.clock = s.clock.Add(6 * time.Minute)
			if reference == "d" {
				heads++
			}
		}
		return nil
	}
	found, err := s.engines[0].scan(t.Context(), s.region(north), s.clock, noPace, false)
	if err != nil || heads < 2 || found.regressions != 1 {
		t.Errorf("%v: met %d times, and counted %d times", err, heads, found.regressions)
	}
}

// An event dates a push better than a scan that meets it first.
func TestScanLeavesAPushToItsEvent(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	s.clock = s.clock.Add(time.Hour)
	s.push(north, "a")
	pushed := s.clock
	rested := time.Duration(0)
	pace := func(_ context.Context, rest time.Duration) error {
		if rest > 0 { // the scan waits, and the event comes
			rested = rest
			s.clock = s.clock.Add(rest)
			for _, e := range north.events {
				if err := s.hear(t.Context(), s.engines[0], s.region(north), e); err != nil {
					t.Error(err)
				}
			}
		}
		return nil
	}
	if _, err := s.engines[0].scan(t.Context(), s.region(north), s.clock.Add(-time.Hour), pace, false); err != nil {
		t.Fatal(err)
	}
	if rested == 0 || !s.ledger.rows[s.key("a")].Record.Head.Time.Equal(pushed.Add(north.skew)) {
		t.Errorf("after %v it is dated %v, and was pushed at %v", rested, s.ledger.rows[s.key("a")].Record.Head.Time, pushed)
	}
}

// A delete event that is older than the copy of the head says nothing about it, whatever a replica that lies once shows.
func TestDeleteEventFromBeforeTheCopy(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.clock = s.clock.Add(time.Second)
	s.push(east, "a")
	head := east.tags["a"]
	s.clock = s.clock.Add(time.Second)
	deleted := s.clock
	s.clock = s.clock.Add(time.Second)
	s.converge(t)
	delete(north.tags, "a") // for once
	if err := s.hear(t.Context(), s.engines[0], s.region(north), simEvent{tag: "a", delete: true, at: deleted}); err != nil {
		t.Fatal(err)
	}
	if s.head("a") != head {
		t.Errorf("the head is %q", s.head("a"))
	}
	// One that came after it does.
	s.clock = s.clock.Add(time.Second)
	if err := s.hear(t.Context(), s.engines[0], s.region(north), simEvent{tag: "a", delete: true, at: s.clock}); err != nil {
		t.Fatal(err)
	}
	if s.head("a") != ledger.Absent {
		t.Errorf("the head is %q", s.head("a"))
	}
}

// Restored from a backup, a replica shows what it had before. Nothing but a scan, past the guard, may take that for its users' will.
func TestRestoredReplicaRollsNothingBack(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	old := north.tags["a"]
	oldEvent := push{Event: version.Event{Digest: old, Time: s.clock.Add(-time.Hour)}, byOther: true}
	s.push(east, "a")
	s.converge(t)
	head := s.head("a")
	north.tags["a"] = old
	m := s.region(north)
	for name, ev := range map[string]evidence{"no event": {}, "the event of another push": {pushes: []push{{Event: version.Event{Digest: head, Time: s.clock}}}},
		"the event of its own push": {pushes: []push{oldEvent}}} {
		if verdict, err := s.engines[0].observe(t.Context(), m, s.key("a"), ev); err != nil || verdict != version.Suspect || s.head("a") != head {
			t.Errorf("%s: %s, %v", name, verdict, err)
		}
	}
	// While it lags, what is copied there must not take it for a push either.
	s.push(east, "a")
	s.look(t, east)
	head = s.head("a")
	north.tags["a"] = "sha256:0001"
	for _, patient := range []bool{true, false} {
		if _, err := s.engines[0].apply(t.Context(), m, s.key("a"), s.clock, patient); !errors.Is(err, errRegressed) || s.head("a") != head {
			t.Errorf("applying: %v", err)
		}
	}
	// A user who puts the tag back, with an event, is believed.
	north.tags["a"] = old
	back := evidence{pushes: []push{{Event: version.Event{Digest: old, Time: s.clock.Add(time.Second)}, byOther: true}}}
	s.clock = s.clock.Add(2 * time.Second)
	if verdict, err := s.engines[0].observe(t.Context(), m, s.key("a"), back); err != nil || s.head("a") != old {
		t.Errorf("a user's act is %s, %v", verdict, err)
	}
}

// A delete by digest, our own, takes a tag with it that came to point there meanwhile, or is carried out late.
func TestOwnDeleteIsNoUsers(t *testing.T) {
	t.Parallel()
	for _, late := range []bool{false, true} {
		t.Run(fmt.Sprintf("late %t", late), func(t *testing.T) {
			t.Parallel()
			s, east, north, _ := seeded(t)
			digest := s.head("a")
			manifest := ledger.Key{Registry: "contoso", Repository: simRepository, Kind: ledger.Manifest, Reference: digest}
			s.eraseByUser(east, "a")
			for _, e := range east.events {
				if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
					t.Fatal(err)
				}
			}
			east.events = nil
			m := s.region(north)
			row := s.ledger.rows[manifest]
			if !row.Record.Head.Tombstone() || !version.Due(row.Record, m.Replica) {
				t.Fatalf("%+v", row)
			}
			// Between the look for what names it and the delete, a user has the tag point there again.
			again := func() {
				north.manifests[digest], north.tags["b"] = true, digest
				if _, err := s.engines[0].observe(t.Context(), m, s.key("b"), evidence{}); err != nil {
					t.Fatal(err)
				}
			}
			remote := &interposed{simRegistry: north}
			var request func()
			remote.onDelete = func(writeID string) error {
				again()
				request = func() { north.erase(digest, writeID) }
				if late {
					return context.DeadlineExceeded
				}
				request()
				return nil
			}
			target := *m
			target.Remote = remote
			_, err := s.engines[0].apply(t.Context(), &target, manifest, s.clock, false)
			if late != (err != nil) {
				t.Fatal(err)
			}
			if late {
				request()
			}
			north.events = nil // not even an event tells
			for range 4 {
				s.look(t, north)
			}
			if s.head("b") != digest {
				t.Fatalf("the tag that a user just pushed was deleted by our own delete: %q", s.head("b"))
			}
			east.manifests[digest] = true // whoever has it
			s.converge(t)
			if north.tags["b"] != digest {
				t.Error("it was not brought back")
			}
		})
	}
}

// interposed is a registry whose deletes, or copies, somebody comes between.
type interposed struct {
	*simRegistry
	onDelete func(writeID string) error
	onBring  func()
}

func (r *interposed) Delete(_ context.Context, _, _, writeID string) error {
	return r.onDelete(writeID)
}

func (r *interposed) Bring(ctx context.Context, repository, digest string, sources []Remote) (Transfer, error) {
	r.onBring()
	return r.simRegistry.Bring(ctx, repository, digest, sources)
}

// A copy takes minutes; who pushes meanwhile, or deletes, is not overwritten. No event need tell.
func TestTagIsReadAgainBeforeItIsPut(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(s *simulation, north *simRegistry){
		"a push":   func(s *simulation, north *simRegistry) { s.push(north, "a") },
		"a delete": func(s *simulation, north *simRegistry) { s.remove(north, "a") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, east, north, west := seeded(t)
			s.push(east, "a")
			s.look(t, east)
			target := *s.region(north)
			var meant string
			target.Remote = &interposed{simRegistry: north, onBring: func() { act(s, north); meant = north.tags["a"] }}
			if _, err := s.engines[0].apply(t.Context(), &target, s.key("a"), s.clock, false); !errors.Is(err, errAgain) || north.tags["a"] != meant {
				t.Fatalf("%v, and the tag is %q", err, north.tags["a"])
			}
			if r := s.ledger.rows[s.key("a")].Record; len(r.Intents) != 0 {
				t.Errorf("an intent of nothing: %+v", r.Intents)
			}
			north.events = nil
			s.converge(t)
			s.converge(t)
			if meant != "" && (north.tags["a"] != meant || west.tags["a"] != meant) {
				t.Errorf("the push is lost: %v, %v", north.tags, west.tags)
			}
		})
	}
}

// Something else copies a tag as well: it is held, where going on would go on for ever.
func TestFlippingTagIsHeld(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	digests := []string{"sha256:0001", "sha256:0002"}
	var never *NotReplicableError
	for n := range 20 {
		r := []*simRegistry{east, north}[n%2]
		r.manifests[digests[n%2]], r.tags["a"] = true, digests[n%2]
		s.clock = s.clock.Add(time.Minute)
		if _, err := s.engines[0].scan(t.Context(), s.region(r), s.clock.Add(-time.Minute), noPace, true); err != nil {
			t.Fatal(err)
		}
		for _, other := range []*simRegistry{north, east} {
			if _, err := s.engines[0].apply(t.Context(), s.region(other), s.key("a"), s.clock, false); errors.As(err, &never) {
				if n < 6 {
					t.Fatalf("held after %d", n)
				}
			} else if err != nil {
				t.Fatal(err)
			}
		}
	}
	if never == nil || east.tags["a"] == north.tags["a"] {
		t.Fatalf("%v: %v, %v", never, east.tags, north.tags)
	}
	// Something new ends it.
	s.push(west, "a")
	s.converge(t)
	if want := west.tags["a"]; east.tags["a"] != want || north.tags["a"] != want {
		t.Errorf("%v, %v", east.tags, north.tags)
	}
}

// contested is a ledger in which another process is quicker, for some time, to change the record of a key.
type contested struct {
	*simLedger
	key   ledger.Key
	races int
}

func (l *contested) CompareAndSet(ctx context.Context, by ledger.Generation, key ledger.Key, record *ledger.Record, revision uint64) (uint64, error) {
	if key == l.key && l.races > 0 {
		l.races--
		row := l.rows[key]
		l.next++
		row.Revision = l.next
		l.rows[key] = row
	}
	return l.simLedger.CompareAndSet(ctx, by, key, record, revision)
}

// A conflict is told of once, however often it had to be decided, and whatever is found of it later.
func TestConflictIsLoggedOnce(t *testing.T) {
	t.Parallel()
	for _, keeps := range []bool{true, false} {
		t.Run(fmt.Sprintf("kept %v", keeps), func(t *testing.T) {
			t.Parallel()
			s, east, north, _ := seeded(t)
			core, logs := observer.New(zap.WarnLevel)
			l := &contested{simLedger: s.ledger, key: s.key("a")}
			e := s.engines[0]
			e.log, e.ledger, e.rules.keepConflicts = zap.New(core), l, keeps
			s.push(east, "a")
			s.push(north, "a")
			lost, events := east.tags["a"], slices.Concat(east.events, north.events)
			s.look(t, east)
			l.races = 3
			if s.look(t, north); l.races > 0 {
				t.Fatal("the record was not contested")
			}
			for i, event := range events {
				if err := s.hear(t.Context(), e, s.region([]*simRegistry{east, north}[i]), event); err != nil {
					t.Fatal(err)
				}
			}
			s.converge(t)
			told := logs.All()
			if len(told) != 1 {
				t.Fatalf("told of %d times: %v", len(told), told)
			}
			if c := told[0].ContextMap(); c["image"] != "contoso/app:a" || c["region"] != east.region || c["digest"] != lost || c["kept"] != keeps {
				t.Errorf("%v", c)
			}
		})
	}
}

// A tag that something is at war over for weeks is decided nevertheless, when no more of what lost can be kept.
func TestConflictsKeptAreBounded(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	core, logs := observer.New(zap.WarnLevel)
	e := s.engines[0]
	e.log = zap.New(core)
	for n := range maxConflicts {
		key := s.key(version.ConflictTag("a", east.region, n+1))
		record := version.Keep(s.fleets[0].replicas, version.Lost{Region: east.region, Digest: fmt.Sprint("sha256:lost", n)}, "a", s.clock)
		s.ledger.rows[key] = ledger.Row{Key: key, Record: record, Revision: 1}
	}
	s.push(east, "a")
	s.push(north, "a")
	lost, won := east.tags["a"], north.tags["a"]
	s.look(t, east)
	s.look(t, north)
	if s.head("a") != won {
		t.Errorf("the head is %s, want %s", s.head("a"), won)
	}
	if told := logs.All(); len(told) != 1 || told[0].ContextMap()["digest"] != lost || told[0].ContextMap()["kept"] != false {
		t.Errorf("%v", told)
	}
}

// What was the head, and is not yet everywhere, gets there all the same when a push takes its place.
func TestSupersededHeadJoins(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	s.push(east, "a")
	s.look(t, east)
	first := s.head("a")
	s.push(east, "a")
	s.look(t, east)
	key := ledger.Key{Registry: "contoso", Repository: simRepository, Kind: ledger.Manifest, Reference: first}
	row := s.ledger.rows[key]
	if version.Due(row.Record, s.region(east).Replica) || !version.Due(row.Record, s.region(north).Replica) {
		t.Errorf("who has it is not known: %+v", row.Record)
	}
	s.converge(t)
	if s.head("a") == first || !north.manifests[first] || !west.manifests[first] {
		t.Errorf("%v, %v", north.manifests, west.manifests)
	}
}

// What a record says by its silence, it says of those who were there when it was read: a replica that came, and was compared,
// while the step was under way may have nothing of it.
func TestSupersededHeadJoinsForThoseWhoWereThere(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	e, row, then := s.engines[0], s.ledger.rows[s.key("a")], s.fleets[0]
	s.push(east, "a")
	out := version.Observe(row.Record, then.replicas, s.region(east).Replica, version.Policy{}, version.Observation{Digest: east.tags["a"], Time: s.clock, Now: s.clock})
	north.manifests = map[string]bool{}
	s.states[1].Incarnation = "another"
	s.muster(0, s.ledger.generation)
	if _, err := e.store(t.Context(), then, row, out); err != nil {
		t.Fatal(err)
	}
	if joined := s.ledger.rows[s.manifestKey(row.Record.Head.Digest)].Record; !version.Due(joined, s.region(north).Replica) || version.Due(joined, s.region(east).Replica) {
		t.Errorf("%+v", joined)
	}
}

// The event of our own delete, by a frozen process perhaps, is no user's.
func TestEventOfOwnDelete(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	head := s.head("a")
	delete(north.tags, "a")
	if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), evidence{erased: "w"}); err != nil {
		t.Fatal(err)
	}
	if s.head("a") != head || !version.Due(s.ledger.rows[s.key("a")].Record, s.region(north).Replica) {
		t.Errorf("%+v", s.ledger.rows[s.key("a")].Record)
	}
}

// A delete that was accounted for long ago does not delete what came since.
func TestLateDeleteEvent(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	// By the clock of the registry that it was pushed to, seconds tell.
	pushed := s.ledger.rows[s.key("b")].Record.Head.Latest()
	kept := east.tags["b"]
	for _, after := range []time.Duration{-5 * time.Second, 5 * time.Second} {
		delete(east.tags, "b")
		if _, err := s.engines[0].observe(t.Context(), s.region(east), s.key("b"), evidence{deletedAt: pushed.Add(after)}); err != nil || (s.head("b") == kept) != (after < 0) {
			t.Errorf("%v after the push: %q, %v", after, s.head("b"), err)
		}
	}
	head := s.head("a")
	delete(north.tags, "a")
	if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), evidence{deletedAt: s.clock.Add(-time.Hour)}); err != nil || s.head("a") != head {
		t.Errorf("%q, %v", s.head("a"), err)
	}
	if _, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), evidence{deletedAt: s.clock}); err != nil || s.head("a") != ledger.Absent {
		t.Errorf("%q, %v", s.head("a"), err)
	}
}

// No write begins on a lease that may end before it.
func TestLeaseIsAskedBeforeWrites(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.push(east, "a")
	s.look(t, east)
	s.eraseByUser(east, "b")
	for _, e := range east.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
			t.Fatal(err)
		}
	}
	for _, granted := range []int{0, 1} { // how many looks at the lease still find it long enough
		for _, key := range s.due(s.region(north)) {
			looks := granted
			m := *s.region(north)
			m.remaining = func() time.Duration {
				if looks--; looks < 0 {
					return writeTime - 1
				}
				return time.Hour
			}
			tags, manifests := len(north.tags), north.manifests["sha256:0002"]
			a := north.tags["a"]
			_, err := s.engines[0].apply(t.Context(), &m, key, s.clock, false)
			if key.Kind == ledger.Manifest && key.Reference != "sha256:0002" {
				continue // brought, and no tag
			}
			if !errors.Is(err, errLease) || north.tags["a"] != a || len(north.tags) != tags || north.manifests["sha256:0002"] != manifests {
				t.Errorf("%s with %d: %v", key, granted, err)
			}
			if r := s.ledger.rows[key].Record; len(r.Intents) != 0 {
				t.Errorf("%s: an intent of nothing: %+v", key, r.Intents)
			}
		}
	}
}

// Our own write comes back as an event: nothing has to be asked.
func TestEchoAsksNothing(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	asked := 0
	north.refuse = func(string, string) error { asked++; return nil }
	m, head := s.region(north), s.head("a")
	ours := evidence{pushes: []push{{Event: version.Event{Digest: head, Time: s.clock, WriteID: "w"}}}}
	if verdict, err := s.engines[0].observe(t.Context(), m, s.key("a"), ours); err != nil || verdict != version.Applied || asked != 0 {
		t.Errorf("%s, %v, %d requests", verdict, err, asked)
	}
	for name, ev := range map[string]evidence{
		"somebody else's":        {pushes: []push{{Event: version.Event{Digest: head, Time: s.clock}}}},
		"of another digest":      {pushes: []push{{Event: version.Event{Digest: "sha256:9999", Time: s.clock, WriteID: "w"}}}},
		"beside somebody else's": {pushes: []push{ours.pushes[0], {Event: version.Event{Digest: "sha256:9999", Time: s.clock}}}},
		"beside a delete":        {pushes: ours.pushes, deletedAt: s.clock},
	} {
		asked = 0
		if _, err := s.engines[0].observe(t.Context(), m, s.key("a"), ev); err != nil && !errors.Is(err, errAgain) || asked == 0 {
			t.Errorf("%s: %v, %d requests", name, err, asked)
		}
	}
	// While it lags, or the write's intent stands, there is something to account for.
	s.push(east, "a")
	s.look(t, east)
	asked = 0
	if _, err := s.engines[0].observe(t.Context(), m, s.key("a"), ours); err != nil || asked == 0 {
		t.Errorf("%v, %d requests", err, asked)
	}
	asked = 0
	newer := evidence{pushes: []push{{Event: version.Event{Digest: s.head("a"), Time: s.clock, WriteID: "w"}}}}
	if _, err := s.engines[0].observe(t.Context(), m, s.key("a"), newer); err != nil || asked == 0 {
		t.Errorf("the write of the head that it lags behind: %v, %d requests", err, asked)
	}
}

func TestTidy(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	// A conflict, and a delete that westus has not heard of.
	s.push(east, "a")
	s.push(north, "a")
	s.converge(t)
	s.remove(east, "b")
	for _, e := range east.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.engines[0].apply(t.Context(), s.region(north), s.key("b"), s.clock, false); err != nil {
		t.Fatal(err)
	}
	kept := ""
	for key, row := range s.ledger.rows {
		if row.Record.ConflictOf == "a" {
			kept = key.Reference
		}
	}
	if kept == "" {
		t.Fatal("no conflict was kept")
	}
	tidy := func() {
		t.Helper()
		if err := s.engines[0].tidy(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if tidy(); s.head(kept) == ledger.Absent {
		t.Error("a conflict was ended at once")
	}
	s.clock = s.clock.Add(retention + time.Hour)
	if tidy(); s.head(kept) != ledger.Absent {
		t.Error("a conflict stays for ever")
	}
	if _, ok := s.ledger.rows[s.key("b")]; !ok {
		t.Error("a tombstone was forgotten that westus has not applied")
	}
	if west.tags["b"] == "" {
		t.Fatal("westus applied it")
	}
	s.converge(t)
	s.clock = s.clock.Add(retention + time.Hour)
	tidy()
	if _, ok := s.ledger.rows[s.key("b")]; ok {
		t.Error("a tombstone that everybody applied stays for ever")
	}
	if _, ok := s.ledger.rows[s.key("c")]; !ok || west.tags["b"] != "" {
		t.Error("what is alive was forgotten")
	}
}

// What is read is forgotten only as it was read.
func TestForgetIsCompared(t *testing.T) {
	t.Parallel()
	s, east, _, _ := seeded(t)
	row := s.ledger.rows[s.key("a")]
	s.push(east, "a")
	s.look(t, east)
	if err := s.engines[0].forget(t.Context(), s.fleets[0], row); !errors.Is(err, errAgain) || s.head("a") != east.tags["a"] {
		t.Errorf("%v", err)
	}
}

func TestOnlyAt(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	s.push(north, "a")
	s.look(t, north)
	for r, want := range map[*simRegistry]int{east: 0, north: 1, west: 0} {
		only, err := s.engines[0].onlyAt(t.Context(), s.region(r))
		if err != nil || len(only) != want {
			t.Errorf("only in %s: %v, %v", r.region, only, err)
		}
	}
}

// Every pushed manifest is copied, also one that was superseded before anybody looked.
func TestSupersededPushJoins(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	s.push(east, "a")
	overtaken := east.tags["a"]
	s.push(east, "a")
	events := east.events
	east.events = nil
	for i := len(events) - 1; i >= 0; i-- { // in the wrong order
		if err := s.hear(t.Context(), s.engines[0], s.region(east), events[i]); err != nil {
			t.Fatal(err)
		}
	}
	s.converge(t)
	for _, r := range []*simRegistry{north, west} {
		if !r.manifests[overtaken] || r.tags["a"] != east.tags["a"] || len(r.tags) != 3 {
			t.Errorf("%s has %v, %v", r.region, r.tags, r.manifests)
		}
	}
}

// What stands where a push was: a copy of ours, or what the same registry's users did later?
func TestOverwriter(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1_800_000_000, 0).UTC()
	at := func(seconds int) time.Time { return begin.Add(time.Duration(seconds) * time.Second) }
	west := version.Replica{Region: "westus", Incarnation: "w", Baselined: true}
	record := ledger.Record{
		Head: ledger.Version{Digest: "H", Sequence: 4, Origin: "eastus", Time: at(40)},
		History: []ledger.Past{{Digest: "F", Sequence: 3, Origin: "northeurope", Latest: at(30).UnixMilli()}, {Digest: "O", Sequence: 2, Origin: "westus", Latest: at(20).UnixMilli()},
			{Digest: "", Sequence: 1, Origin: "westus", Latest: at(10).UnixMilli()}},
		Applied: map[string]uint64{"w": 2},
		Intents: []ledger.Intent{{Incarnation: "w", Digest: "T", Sequence: 4, WriteID: "id", Since: at(45)}, {Incarnation: "e", Digest: "U", Sequence: 4, WriteID: "ie", Since: at(45)}},
	}
	own := record.Clone()
	own.Head.Origin = "westus"
	elsewhere := record.Clone()
	elsewhere.Applied["w"] = 3
	for _, c := range []struct {
		name   string
		record ledger.Record
		shown  string
		pushed int
		want   version.Overwriter
	}{
		{"another region's head", record, "H", 35, version.Copy},
		{"this region's head", own, "H", 39, version.Users},
		{"this region's head, at almost the same time", own, "H", 41, version.Unsure},
		{"this region's head, brought back over a later push", own, "H", 42, version.Copy},
		{"another region's older version", record, "F", 35, version.Copy},
		{"this region's older version", record, "O", 15, version.Users},
		{"this region's older version, brought back over a later push", record, "O", 25, version.Copy},
		{"a throw-away manifest of ours", record, "T", 35, version.Copy},
		{"one that was for another replica", record, "U", 35, version.Users},
		{"what is no version", record, "X", 35, version.Users},
		{"nothing, where this region's version was", record, "", 35, version.Unsure},
		{"nothing, where a copy was", elsewhere, "", 35, version.Copy},
	} {
		if got := overwriter(c.record, west, c.shown, push{Event: version.Event{Digest: "P", Time: at(c.pushed)}}); got != c.want {
			t.Errorf("%s: %d", c.name, got)
		}
	}
}

// Whether a push was overwritten by a copy is judged by what stood there then. A later push of the same users, found by another
// process before that is stored, is not taken back for it.
func TestOverwrittenIsJudgedByWhatWasSeen(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.remove(east, "a")
	for _, e := range east.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
			t.Fatal(err)
		}
	}
	s.converge(t)
	s.clock = s.clock.Add(time.Minute)
	s.push(north, "a")
	event := north.events[0]
	s.clock = s.clock.Add(5 * time.Second)
	delete(north.tags, "a") // its event comes later
	s.clock = s.clock.Add(time.Second)
	north.refuse = func(_, reference string) error {
		if reference == event.digest {
			north.refuse = nil
			s.push(north, "a")
			if v, err := s.engines[1].observe(t.Context(), s.region(north), s.key("a"), evidence{since: s.clock.Add(-5 * time.Minute)}); err != nil || v != version.Successor {
				t.Fatalf("%s, %v", v, err)
			}
		}
		return nil
	}
	for n := 0; ; n++ {
		err := s.hear(t.Context(), s.engines[0], s.region(north), event)
		if err == nil {
			break
		}
		if !errors.Is(err, errAgain) || n > 3 {
			t.Fatal(err)
		}
	}
	if s.head("a") != north.tags["a"] || s.head("a") == event.digest || north.refuse != nil {
		t.Errorf("the head is %q, and its users pushed %q last", s.head("a"), north.tags["a"])
	}
}

// Scans look at no manifests: a replica that holds a deleted one, by a copy that was never finished say, does not wait for one.
func TestDeletedManifestWaitsForNoScan(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.push(east, "d")
	s.look(t, east)
	digest := s.head("d")
	north.manifests[digest] = true // it was brought, and not tagged yet
	s.push(east, "d")
	s.look(t, east)
	key, m := s.manifestKey(digest), s.region(north)
	s.clock = s.clock.Add(time.Minute)
	delete(east.manifests, digest)
	if err := s.engines[0].observeManifest(t.Context(), s.region(east), key, evidence{deletedAt: s.clock, deleteHeard: s.clock}); err != nil {
		t.Fatal(err)
	}
	if r := s.ledger.rows[key].Record; !r.Head.Tombstone() || !version.Due(r, m.Replica) {
		t.Fatalf("%+v", r)
	}
	if _, err := s.engines[0].apply(t.Context(), m, key, s.clock, true); !errors.Is(err, errPush) {
		t.Errorf("the event of a push there may come yet: %v", err)
	}
	if _, err := s.engines[0].apply(t.Context(), m, key, s.clock, false); err != nil {
		t.Error(err)
	}
	if r := s.ledger.rows[key].Record; !r.Head.Tombstone() || version.Due(r, m.Replica) || north.manifests[digest] {
		t.Errorf("what a copy of ours had brought there was taken for a push: %+v", r)
	}
}

// That something is there when the delete of it is heard is no push. The event of a push is.
func TestHeldManifestIsNoPush(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	key := s.manifestKey(s.head("a"))
	s.clock = s.clock.Add(time.Minute)
	if err := s.engines[0].observeManifest(t.Context(), s.region(north), key, evidence{deletedAt: s.clock}); err != nil {
		t.Fatal(err)
	}
	if row, there := s.ledger.rows[key]; there {
		t.Errorf("%+v", row)
	}
	pushed := evidence{pushes: []push{{Event: version.Event{Digest: key.Reference, Time: s.clock}, byOther: true}}}
	if err := s.engines[0].observeManifest(t.Context(), s.region(north), key, pushed); err != nil {
		t.Fatal(err)
	}
	if r := s.ledger.rows[key].Record; r.Head.Digest != key.Reference || r.Head.Origin != north.region {
		t.Errorf("a push is %+v", r)
	}
}

// What a user deletes by digest goes everywhere, whatever the record says of how it came to where it was deleted.
func TestDeleteByDigestIsBelieved(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		// brought says that west has the superseded manifest by a copy of ours, with a tag that it never got.
		brought bool
		where   string
		// meanwhile happens between the delete and its event.
		meanwhile func(s *simulation, key ledger.Key)
	}{
		"where a copy of ours had brought it": {brought: true, where: "westus"},
		"before the push that replaced it is seen": {where: "eastus", meanwhile: func(s *simulation, _ ledger.Key) {
			s.clock = s.clock.Add(time.Minute)
			s.look(s.t, s.regions[0])
		}},
		"while a copy of it comes to another replica": {where: "northeurope", meanwhile: func(s *simulation, key ledger.Key) {
			s.clock = s.clock.Add(time.Minute)
			if _, err := s.engines[0].apply(s.t.Context(), s.region(s.regions[2]), key, s.clock, false); err != nil {
				s.t.Error(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, east, north, west := seeded(t)
			s.t = t
			s.push(east, "d")
			s.look(t, east)
			digest := s.head("d")
			key := s.manifestKey(digest)
			if !c.brought {
				if _, err := s.engines[0].apply(t.Context(), s.region(north), s.key("d"), s.clock, false); err != nil {
					t.Fatal(err)
				}
			}
			s.push(east, "d")
			if c.where != east.region {
				s.look(t, east)
			}
			at := s.registry(c.where)
			at.manifests[digest] = true
			s.clock = s.clock.Add(time.Second)
			at.events = nil
			at.erase(digest, "")
			events := at.events
			if c.meanwhile != nil {
				c.meanwhile(s, key)
			}
			for _, e := range events {
				if err := s.hear(t.Context(), s.engines[0], s.region(at), e); err != nil {
					t.Fatal(err)
				}
			}
			s.converge(t)
			for _, r := range []*simRegistry{east, north, west} {
				if r.manifests[digest] || r.tags["d"] != east.tags["d"] {
					t.Errorf("%s holds it still or again: %+v", r.region, s.ledger.rows[key].Record)
				}
			}
		})
	}
}

// A replica that has not deleted a referrer yet lists it still, which brings it back nowhere.
func TestDeletedReferrerIsListedStill(t *testing.T) {
	t.Parallel()
	s, east, _, west := seeded(t)
	subject, referrer := s.head("a"), s.manifestKey("sha256:sbom")
	east.manifests[referrer.Reference], east.referrers = true, map[string][]string{subject: {referrer.Reference}}
	list := func() {
		t.Helper()
		s.clock = s.clock.Add(time.Minute)
		if err := s.engines[0].joinReferrers(t.Context(), s.region(west), s.key("a"), s.ledger.rows[s.key("a")].Record); err != nil {
			t.Fatal(err)
		}
	}
	list()
	if s.converge(t); !west.manifests[referrer.Reference] {
		t.Fatal("it was not copied")
	}
	s.clock = s.clock.Add(time.Minute)
	delete(west.manifests, referrer.Reference)
	if err := s.engines[0].observeManifest(t.Context(), s.region(west), referrer, evidence{deletedAt: s.clock}); err != nil {
		t.Fatal(err)
	}
	list()
	if s.converge(t); east.manifests[referrer.Reference] || west.manifests[referrer.Reference] {
		t.Errorf("it came back: %+v", s.ledger.rows[referrer].Record)
	}
}

// A replica that is compared anew, after a restore say, may have what was deleted meanwhile.
func TestBaselineAsksForDeletedManifests(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	digest := s.head("a")
	s.clock = s.clock.Add(time.Second)
	s.eraseByUser(east, "a")
	for _, e := range east.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
			t.Fatal(err)
		}
	}
	s.converge(t)
	if north.manifests[digest] {
		t.Fatal("it was not deleted")
	}
	north.manifests[digest] = true
	if err := s.operateOn(north); err != nil {
		t.Fatal(err)
	}
	if s.converge(t); north.manifests[digest] || s.head("a") != ledger.Absent {
		t.Errorf("it is there again: %+v", s.ledger.rows[s.manifestKey(digest)].Record)
	}
}

// operateOn gives a registry that was restored a new baseline.
func (s *simulation) operateOn(r *simRegistry) error {
	i := slices.Index(s.regions, r)
	r.restored = true
	if err := s.operate(s.t.Context(), s.engines[0], i); err != nil {
		return err
	}
	if err := s.baseline(s.t.Context(), s.engines[0], i); err != nil {
		return err
	}
	s.states[i].Baselined = true
	s.muster(0, s.ledger.generation)
	return nil
}

// A delete by digest takes the tags with it, also if no event tells of those.
func TestDeleteOfAManifestIsThatOfItsTags(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	digest := s.head("a")
	s.clock = s.clock.Add(time.Second) // since it was copied there
	s.eraseByUser(north, "a")
	heard := false
	for _, e := range north.events {
		if e.tag == digest {
			heard = true
			if err := s.hear(t.Context(), s.engines[0], s.region(north), e); err != nil {
				t.Fatal(err)
			}
		}
	}
	if !heard || s.head("a") != ledger.Absent || s.head("b") == ledger.Absent {
		t.Errorf("heard %t: a is %q, b is %q", heard, s.head("a"), s.head("b"))
	}
}

// What a failed write would have left may be what a user pushes later: an event that names somebody else tells.
func TestPushOfWhatAnIntentNames(t *testing.T) {
	t.Parallel()
	for _, byOther := range []bool{false, true} {
		t.Run(fmt.Sprint(byOther), func(t *testing.T) {
			t.Parallel()
			s, east, north, _ := seeded(t)
			s.push(east, "a")
			s.look(t, east)
			back := s.head("a")
			row := s.ledger.rows[s.key("a")]
			row.Record, _ = version.Begin(row.Record, s.fleets[0].replicas, s.region(north).Replica, back, "unanswered", s.clock)
			s.ledger.rows[s.key("a")] = row
			s.converge(t)
			s.push(east, "a")
			s.converge(t)
			head := s.head("a")
			s.clock = s.clock.Add(time.Minute)
			north.tags["a"] = back
			ev := evidence{pushes: []push{{Event: version.Event{Digest: back, Time: s.clock}, byOther: byOther}}}
			want, wanted := head, version.Ours
			if byOther {
				want, wanted = back, version.Successor
			}
			if v, err := s.engines[0].observe(t.Context(), s.region(north), s.key("a"), ev); err != nil || v != wanted || s.head("a") != want {
				t.Errorf("%s, %v; the head is %.15s", v, err, s.head("a"))
			}
		})
	}
}

// throwing is a registry that deletes a tag by way of a throw-away manifest, and may be cut off in the middle.
type throwing struct {
	*simRegistry
	cutOff bool
}

const throwaway = "sha256:throwaway"

func (r *throwing) Untag(_ context.Context, _, tag, _ string, declare func(string) error) error {
	if err := declare(throwaway); err != nil {
		return err
	}
	r.manifests[throwaway], r.tags[tag] = true, throwaway
	if r.cutOff {
		return context.DeadlineExceeded
	}
	delete(r.manifests, throwaway)
	delete(r.tags, tag)
	return nil
}

// A throw-away manifest that stays under a tag is ours, and nobody's push.
func TestThrowAwayManifestIsNoPush(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	s.remove(east, "a")
	for _, e := range east.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(east), e); err != nil {
			t.Fatal(err)
		}
	}
	target := *s.region(north)
	remote := &throwing{simRegistry: north, cutOff: true}
	target.Remote = remote
	if _, err := s.engines[0].apply(t.Context(), &target, s.key("a"), s.clock, false); !errors.Is(err, context.DeadlineExceeded) || north.tags["a"] != throwaway {
		t.Fatalf("%v, %v", err, north.tags)
	}
	for range 3 {
		s.look(t, north)
	}
	if s.head("a") != ledger.Absent || !version.Due(s.ledger.rows[s.key("a")].Record, target.Replica) {
		t.Fatalf("%+v", s.ledger.rows[s.key("a")].Record)
	}
	remote.cutOff = false
	if _, err := s.engines[0].apply(t.Context(), &target, s.key("a"), s.clock, false); err != nil || north.tags["a"] != "" || west.tags["a"] == throwaway {
		t.Errorf("%v, %v", err, north.tags)
	}
	// Of the attempt that ended well nothing is left; of the other one, what may be carried out yet.
	if r := s.ledger.rows[s.key("a")].Record; len(r.Intents) != 2 || version.Due(r, target.Replica) {
		t.Errorf("%+v", r)
	}
}

// The event of a push that a later one of the same region followed comes when a third region's is the head: it is superseded.
func TestEventOfAnOvertakenPush(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.push(north, "a")
	late := north.events[0]
	north.events = nil
	s.clock = s.clock.Add(5 * time.Second)
	s.push(north, "a")
	s.converge(t)
	s.push(east, "a")
	s.converge(t)
	head := s.head("a")
	if err := s.hear(t.Context(), s.engines[0], s.region(north), late); err != nil {
		t.Fatal(err)
	}
	s.converge(t)
	if s.head("a") != head || len(north.tags) != 3 || !east.manifests[late.digest] {
		t.Errorf("the head is %s: %v, %v", s.head("a"), north.tags, east.manifests)
	}
}

// What a copy that failed has learnt of a replica stays known.
func TestFailedCopyTellsWhatIsThere(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	row := s.ledger.rows[s.key("a")]
	row.Record.Applied = map[string]uint64{s.region(north).Incarnation: ledger.UnknownSequence}
	s.ledger.rows[s.key("a")] = row
	delete(north.tags, "a")
	for _, r := range s.regions {
		delete(r.manifests, row.Record.Head.Digest)
	}
	if _, err := s.engines[0].apply(t.Context(), s.region(north), s.key("a"), s.clock, false); !errors.Is(err, ErrGone) {
		t.Fatal(err)
	}
	if sequence, known := version.Sequence(s.ledger.rows[s.key("a")].Record, s.region(north).Replica); !known || sequence != 0 {
		t.Errorf("%+v", s.ledger.rows[s.key("a")].Record)
	}
}

// The event of an older push may come when a head that nothing dates has been seen in the same registry.
func TestLateEvent(t *testing.T) {
	t.Parallel()
	begin := time.Unix(1_800_000_000, 0).UTC()
	at := func(seconds int) time.Time { return begin.Add(time.Duration(seconds) * time.Second) }
	record := ledger.Record{
		Head:    ledger.Version{Digest: "H", Sequence: 2, Origin: "northeurope", Time: at(0), Seen: at(60)},
		History: []ledger.Past{{Digest: "O", Sequence: 1, Origin: "westus"}},
	}
	north, west := version.Replica{Region: "northeurope"}, version.Replica{Region: "westus"}
	for _, c := range []struct {
		name   string
		at     version.Replica
		digest string
		pushed int
		want   bool
	}{
		{"before the head was seen there", north, "O", 30, true},
		{"after the head was seen there", north, "O", 61, false},
		{"elsewhere, when the head may have been pushed or not", west, "O", 30, false},
		{"elsewhere, before the head", west, "O", -1, true},
		{"the head", north, "H", 30, false},
		{"what is no version", north, "X", 30, false},
	} {
		if got := (push{Event: version.Event{Digest: c.digest, Time: at(c.pushed)}}).late(record, c.at); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}
