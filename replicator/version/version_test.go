package version

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	"portolan/replicator/ledger"
)

var (
	start = time.Date(2026, 5, 1, 12, 0, 0, 0, time.UTC)
	east  = Replica{Region: "eastus", Incarnation: "e", Baselined: true}
	west  = Replica{Region: "westus", Incarnation: "w", Baselined: true}
	north = Replica{Region: "northeurope", Incarnation: "n", Baselined: true}
	fresh = Replica{Region: "northeurope", Incarnation: "f"}
	all   = Fleet{east, west, north}
)

func at(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }

// record has the versions A (1) and B (2, pushed in eastus at second 10); westus still has A.
func record() ledger.Record {
	return ledger.Record{
		Head:    ledger.Version{Digest: "B", Sequence: 2, Origin: "eastus", Time: at(10)},
		History: []ledger.Past{{Digest: "A", Sequence: 1}},
		Applied: map[string]uint64{"w": 1},
	}
}

func with(change func(*ledger.Record)) ledger.Record {
	r := record()
	change(&r)
	return r
}

// The observation table of the design, line by line.
func TestObserve(t *testing.T) {
	t.Parallel()
	intent := ledger.Intent{Incarnation: "w", Digest: "I", Sequence: 2, WriteID: "id", Since: at(20)}
	tests := []struct {
		name    string
		before  ledger.Record
		replica Replica
		policy  Policy
		o       Observation
		verdict Verdict
		head    string
		origin  string
		lost    string
		// due are the incarnations that lag afterwards.
		due string
	}{
		{"1: the head", record(), west, Policy{}, Observation{Digest: "B"}, Applied, "B", "eastus", "", ""},
		{"1: nothing, of what was never seen", ledger.Record{}, west, Policy{}, Observation{}, Applied, "", "", "", ""},
		{"1: the absence that is the head", with(func(r *ledger.Record) { r.Head.Digest = "" }), west, Policy{}, Observation{Confirmed: true}, Applied, "", "eastus", "", ""},
		{"2: the absence that is the head, seen once", with(func(r *ledger.Record) { r.Head.Digest = "" }), west, Policy{}, Observation{}, Unchanged, "", "eastus", "", "w"},
		{"2: what it had", record(), west, Policy{}, Observation{Digest: "A"}, Unchanged, "B", "eastus", "", "w"},
		{"3: an intent", with(func(r *ledger.Record) { r.Intents = []ledger.Intent{intent} }), west, Policy{},
			Observation{Digest: "I", Now: at(30)}, Ours, "B", "eastus", "", "w"},
		{"3: an intent's digest, pushed by somebody else since", with(func(r *ledger.Record) { r.Intents = []ledger.Intent{intent} }), west, Policy{},
			Observation{Digest: "I", Now: at(30), Time: at(25), ByOther: true}, ConcurrentWon, "I", "westus", "B", "en"},
		{"3: an intent that is too old to matter", with(func(r *ledger.Record) { r.Intents = []ledger.Intent{intent} }), west, Policy{},
			Observation{Digest: "I", Now: at(20).Add(IntentLifetime), Time: at(99)}, ConcurrentWon, "I", "westus", "B", "en"},
		{"3: another replica's intent", with(func(r *ledger.Record) { r.Intents = []ledger.Intent{intent} }), north, Policy{},
			Observation{Digest: "I", Now: at(30), Time: at(30)}, Successor, "I", "northeurope", "", "ew"},
		{"3: an event with our write id", record(), east, Policy{}, Observation{Digest: "A", WriteID: "id", Now: at(30)}, Ours, "B", "eastus", "", "ew"},
		{"4: a push on top of the head", record(), north, Policy{}, Observation{Digest: "C", Time: at(20)}, Successor, "C", "northeurope", "", "ew"},
		{"4: back to an older version, on top of the head", record(), north, Policy{}, Observation{Digest: "A", Time: at(20)}, Successor, "A", "northeurope", "", "ew"},
		{"4: the first push", ledger.Record{}, west, Policy{}, Observation{Digest: "A", Time: at(1)}, Successor, "A", "westus", "", "en"},
		{"4: a later push beside the head", record(), west, Policy{}, Observation{Digest: "C", Time: at(20)}, ConcurrentWon, "C", "westus", "B", "en"},
		{"4: an earlier push beside the head", record(), west, Policy{}, Observation{Digest: "C", Time: at(5)}, ConcurrentLost, "B", "eastus", "C", "w"},
		{"4: on equal times the greater region", record(), west, Policy{}, Observation{Digest: "C", Time: at(10)}, ConcurrentWon, "C", "westus", "B", "en"},
		{"4: a push beside a delete", with(func(r *ledger.Record) { r.Head.Digest = "" }), west, Policy{}, Observation{Digest: "C", Time: at(5)}, ConcurrentWon, "C", "westus", "", "en"},
		{"4: a push where an earlier push of the same region is the head, and a copy overwrote that", with(func(r *ledger.Record) { r.Applied["e"] = 1 }), east, Policy{},
			Observation{Digest: "C", Time: at(5)}, Successor, "C", "eastus", "", "wn"},
		{"4: a push at a baselined replica of which nothing is known", with(func(r *ledger.Record) { r.Applied["w"] = ledger.UnknownSequence }), west, Policy{},
			Observation{Digest: "C", Time: at(20)}, ConcurrentWon, "C", "westus", "B", "en"},
		{"an older version at a baselined replica of which nothing is known", with(func(r *ledger.Record) { r.Applied["w"] = ledger.UnknownSequence }), west, Policy{},
			Observation{Digest: "A", Time: at(20)}, Known, "B", "eastus", "", "w"},
		{"3: our own delete took the head", record(), east, Policy{}, Observation{WriteID: "id", Confirmed: true}, Ours, "B", "eastus", "", "ew"},
		{"a delete on top of the head", record(), east, Policy{}, Observation{Time: at(20), Confirmed: true}, Successor, "", "eastus", "", "wn"},
		{"an absence that is not confirmed", record(), east, Policy{}, Observation{Time: at(20)}, Suspect, "B", "eastus", "", "w"},
		{"a delete beside a push", record(), west, Policy{}, Observation{Time: at(20), Confirmed: true}, Restored, "B", "eastus", "", "w"},
		{"a delete that the policy ignores", record(), east, Policy{IgnoreDeletes: true}, Observation{Time: at(20), Confirmed: true}, Ignored, "B", "eastus", "", "w"},
		{"a delete of a manifest that was never recorded", ledger.Record{}, east, Policy{}, Observation{Time: at(20), Confirmed: true, Deleted: "D"}, Successor, "", "eastus", "", "wn"},
		{"a delete of a manifest that a copy had brought there", with(func(r *ledger.Record) { r.Applied["w"] = 0 }), west, Policy{},
			Observation{Time: at(20), Confirmed: true, Deleted: "B"}, Successor, "", "westus", "", "en"},
		{"a delete of a manifest where nobody knew whether it is", with(func(r *ledger.Record) { r.Applied["w"] = ledger.UnknownSequence }), west, Policy{},
			Observation{Time: at(20), Confirmed: true, Deleted: "B"}, Successor, "", "westus", "", "en"},
		{"a delete of a manifest from before it was pushed", with(func(r *ledger.Record) { r.Applied["w"] = 0 }), west, Policy{},
			Observation{Time: at(5), Confirmed: true, Deleted: "B"}, Unchanged, "B", "eastus", "", "w"},
		{"a deleted manifest that a copy brought", with(func(r *ledger.Record) { r.Head.Digest = ""; r.Applied["w"] = 0 }), west, Policy{},
			Observation{Digest: "A", Time: at(20), Held: true}, Known, "", "eastus", "", "w"},
		{"a deleted manifest that a copy brought once it had been deleted there", with(func(r *ledger.Record) { r.Head.Digest = "" }), north, Policy{},
			Observation{Digest: "A", Time: at(20), Held: true}, Known, "", "eastus", "", "wn"},
		{"a manifest that came with something else", ledger.Record{}, east, Policy{}, Observation{Digest: "D", Time: at(20), Held: true}, Late, "", "", "", ""},
		{"our copy of a manifest that is no version of its own", ledger.Record{}, east, Policy{}, Observation{Digest: "D", WriteID: "id"}, Late, "", "", "", ""},
		{"baseline: only there", ledger.Record{}, fresh, Policy{}, Observation{Digest: "X", Time: at(20)}, Successor, "X", "northeurope", "", "ew"},
		{"baseline: the same", record(), fresh, Policy{}, Observation{Digest: "B"}, Applied, "B", "eastus", "", "w"},
		{"baseline: not there", record(), fresh, Policy{}, Observation{}, Unchanged, "B", "eastus", "", "wf"},
		{"baseline: an older version", record(), fresh, Policy{}, Observation{Digest: "A"}, Known, "B", "eastus", "", "wf"},
		{"while it is seeded: a push that an event dates", record(), fresh, Policy{}, Observation{Digest: "X", Time: at(99)}, ConcurrentWon, "X", "northeurope", "B", "ew"},
		{"while it is seeded: an older push that an event dates", record(), fresh, Policy{}, Observation{Digest: "X", Time: at(5)}, ConcurrentLost, "B", "eastus", "X", "wf"},
		{"baseline: another one, however new", record(), fresh, Policy{}, Observation{Digest: "X", Time: at(99), Undated: true}, ConcurrentLost, "B", "eastus", "X", "wf"},
		{"baseline: a stranger beside a delete", with(func(r *ledger.Record) { r.Head.Digest = "" }), fresh, Policy{}, Observation{Digest: "X", Undated: true}, ConcurrentWon, "X", "northeurope", "", "ew"},
		{"baseline: what was deleted", with(func(r *ledger.Record) { r.Head.Digest = "" }), fresh, Policy{}, Observation{Digest: "A"}, Known, "", "eastus", "", "wf"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			fleet := all
			if test.replica == fresh {
				fleet = Fleet{east, west, fresh}
			}
			before := test.before.Clone()
			out := Observe(test.before, fleet, test.replica, test.policy, test.o)
			if !reflect.DeepEqual(before, test.before) {
				t.Errorf("the record was changed in place")
			}
			if out.Verdict != test.verdict {
				t.Errorf("the verdict is %s, want %s", out.Verdict, test.verdict)
			}
			if out.Record.Head.Digest != test.head || out.Record.Head.Origin != test.origin {
				t.Errorf("the head is %q of %q, want %q of %q", out.Record.Head.Digest, out.Record.Head.Origin, test.head, test.origin)
			}
			lost := ""
			if out.Lost != nil {
				lost = out.Lost.Digest
			}
			if lost != test.lost {
				t.Errorf("lost is %q, want %q", lost, test.lost)
			}
			due := ""
			for _, r := range fleet {
				if Due(out.Record, r) {
					due += r.Incarnation
				}
			}
			if due != test.due {
				t.Errorf("due are %q, want %q", due, test.due)
			}
			if out.Changed != !reflect.DeepEqual(out.Record, normalise(before, fleet)) {
				t.Errorf("Changed is %t: %+v, then %+v", out.Changed, before, out.Record)
			}
		})
	}
}

// Rules 5 and 6: events whose digest is no longer under the tag.
// A push that no event dates came at some time up to when it was seen, and the record says so; one that an event dates did not.
func TestWhenAPushCameIsKnownOrNot(t *testing.T) {
	t.Parallel()
	for _, before := range []ledger.Record{record(), {}} {
		found := Observe(before, all, north, Policy{}, Observation{Digest: "C", Time: at(20), Now: at(50), Undated: true})
		if h := found.Record.Head; h.Digest != "C" || !h.Time.Equal(at(20)) || !h.Latest().Equal(at(50)) {
			t.Errorf("found by a scan: %+v", h)
		}
		told := Observe(before, all, north, Policy{}, Observation{Digest: "C", Time: at(20), Now: at(50)})
		if h := told.Record.Head; h.Digest != "C" || !h.Latest().Equal(at(20)) {
			t.Errorf("told by an event: %+v", h)
		}
	}
	lost := Observe(record(), all, west, Policy{}, Observation{Digest: "C", Time: at(5), Now: at(50), Undated: true})
	if h := lost.Record.Head; h.Digest != "B" || !h.Latest().Equal(at(10)) {
		t.Errorf("what won keeps its time: %+v", h)
	}
}

func TestObserveOverwritten(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name              string
		event             Event
		by                Overwriter
		readable          bool
		verdict           Verdict
		head, lost, joins string
	}{
		{"6: the head's own event", Event{Digest: "B", Time: at(10)}, Copy, true, Late, "B", "", ""},
		{"6: an old version's event", Event{Digest: "A", Time: at(99)}, Copy, true, Late, "B", "", ""},
		{"ours", Event{Digest: "X", Time: at(99), WriteID: "id"}, Copy, true, Late, "B", "", ""},
		{"5: superseded by a push of the same region", Event{Digest: "X", Time: at(99)}, Users, true, Superseded, "B", "", "X"},
		{"5: superseded, and gone", Event{Digest: "X", Time: at(99)}, Users, false, Superseded, "B", "", ""},
		{"5: overwritten by a copy, later than the head", Event{Digest: "X", Time: at(99)}, Copy, true, ConcurrentWon, "X", "B", ""},
		{"5: overwritten by a copy, earlier than the head", Event{Digest: "X", Time: at(1)}, Copy, true, ConcurrentLost, "B", "X", ""},
		{"5: overwritten by nobody knows whom", Event{Digest: "X", Time: at(99)}, Unsure, true, ConcurrentLost, "B", "X", ""},
		{"5: overwritten by a copy, and gone", Event{Digest: "X", Time: at(99)}, Copy, false, Superseded, "B", "", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			out := ObserveOverwritten(record(), all, west, test.event, test.by, test.readable)
			lost := ""
			if out.Lost != nil {
				lost = out.Lost.Digest
			}
			if out.Verdict != test.verdict || out.Record.Head.Digest != test.head || lost != test.lost || out.Joins != test.joins {
				t.Errorf("%s, head %q, lost %q, joins %q", out.Verdict, out.Record.Head.Digest, lost, out.Joins)
			}
			if out.Verdict == ConcurrentWon && !Due(out.Record, west) {
				t.Error("the replica shows the copy that overwrote it, and is not due")
			}
		})
	}
}

// A push that a later one of the same region followed is superseded, whatever stands there by now.
func TestOvertaken(t *testing.T) {
	t.Parallel()
	r := record()
	lost := Observe(r, all, west, Policy{}, Observation{Digest: "C", Time: at(4), Now: at(5), Undated: true})
	if lost.Verdict != ConcurrentLost {
		t.Fatal(lost.Verdict)
	}
	for _, c := range []struct {
		region string
		when   int
		want   bool
	}{{"westus", 3, true}, {"westus", 5, true}, {"westus", 6, false}, {"eastus", 10, true}, {"eastus", 11, false}, {"northeurope", 1, false}} {
		if got := Overtaken(lost.Record, c.region, at(c.when)); got != c.want {
			t.Errorf("a push in %s at second %d: %t", c.region, c.when, got)
		}
	}
	for digest, want := range map[string]struct {
		region string
		latest time.Time
	}{"C": {"westus", at(5)}, "B": {"eastus", at(10)}, "X": {}} {
		if region, latest := Origin(lost.Record, digest); region != want.region || !latest.Equal(want.latest) {
			t.Errorf("%s is of %q at %s: %+v", digest, region, latest, lost.Record)
		}
	}
	if Has(lost.Record, west) != "C" || Has(lost.Record, north) != "B" || Has(lost.Record, fresh) != "" {
		t.Error("what the replicas have is not known")
	}
}

// A write is told from a push whatever becomes of it.
func TestWriteIsKnownAsOurs(t *testing.T) {
	t.Parallel()
	r, first := Begin(record(), all, west, "B", "w1", at(20))
	r, second := Begin(r, all, west, "B", "w2", at(21))
	// The second attempt succeeds; the first is still on its way.
	r = Settle(r, all, west, second, at(22))
	if Due(r, west) {
		t.Fatal("westus is due after its write was acknowledged")
	}
	// Somebody pushes elsewhere, westus applies it, and then the first write lands.
	r = Observe(r, all, east, Policy{}, Observation{Digest: "C", Time: at(30), Now: at(30)}).Record
	r, third := Begin(r, all, west, "C", "w3", at(31))
	r = Settle(r, all, west, third, at(32))
	out := Observe(r, all, west, Policy{}, Observation{Digest: first.Digest, Now: at(40), Time: at(40)})
	if out.Verdict != Ours || out.Record.Head.Digest != "C" || !Due(out.Record, west) {
		t.Fatalf("a late write is %s, the head %q", out.Verdict, out.Record.Head.Digest)
	}
}

// A version that loses takes a place before the head; a write of the head that is on its way is one of the head still.
func TestSettleAfterALoss(t *testing.T) {
	t.Parallel()
	r, intent := Begin(record(), all, west, "B", "w1", at(20))
	r = Observe(r, all, west, Policy{}, Observation{Digest: "C", Time: at(5), Now: at(21)}).Record
	if r = Settle(r, all, west, intent, at(60)); Due(r, west) || Has(r, west) != "B" {
		t.Errorf("%+v", r)
	}
}

// A process that was taken for dead acknowledges its write after another one has written a later version: what is there now is for the
// next look to tell.
func TestSettleAfterALaterWrite(t *testing.T) {
	t.Parallel()
	r, first := Begin(record(), all, west, "B", "w1", at(20))
	r = Observe(r, all, north, Policy{}, Observation{Digest: "C", Time: at(30), Now: at(30)}).Record
	r, second := Begin(r, all, west, "C", "w2", at(40))
	r = Settle(r, all, west, second, at(41))
	r = Settle(r, all, west, first, at(42))
	if _, known := Sequence(r, west); known || !Due(r, west) || len(r.Intents) != 0 {
		t.Errorf("%+v", r)
	}
}

// An acknowledgement tells nothing after an event has told of the write: what was seen at the replica since stands.
func TestSettleAfterItsEvent(t *testing.T) {
	t.Parallel()
	r, intent := Begin(record(), all, west, "B", "w1", at(20))
	r = Observe(r, all, west, Policy{}, Observation{Digest: "B", WriteID: "w1", Now: at(21)}).Record
	r = Observe(r, all, north, Policy{}, Observation{Digest: "C", Time: at(5), Now: at(22)}).Record
	if after := Settle(r, all, west, intent, at(60)); !equal(r, after) {
		t.Errorf("%+v\n%+v", r, after)
	}
}

// A registry may tell of a write before it sets the tag: until it has answered, what appears there may be ours.
func TestToldBeforeTheTagIsSet(t *testing.T) {
	t.Parallel()
	r, intent := Begin(record(), all, west, "B", "w1", at(20))
	early := ObserveOverwritten(r, all, west, Event{Digest: "B", Time: at(20), WriteID: "w1"}, Copy, true)
	r = Observe(early.Record, all, east, Policy{}, Observation{Digest: "C", Time: at(21), Now: at(21)}).Record
	shown := Observe(r, all, west, Policy{}, Observation{Digest: "B", Time: at(10), Now: at(22), Undated: true})
	if shown.Verdict != Ours || Has(shown.Record, west) != "B" {
		t.Errorf("%s: %+v", shown.Verdict, shown.Record)
	}
	if r = Settle(r, all, west, intent, at(23)); Has(r, west) != "B" || len(r.Intents) != 0 {
		t.Errorf("%+v", r)
	}
}

// What a write left is known only if it is a version.
func TestSettleOfNoVersion(t *testing.T) {
	t.Parallel()
	r, intent := Begin(record(), all, west, "throw-away", "w1", at(20))
	r = Settle(r, all, west, intent, at(60))
	if _, known := Sequence(r, west); known || !Due(r, west) {
		t.Errorf("%+v", r)
	}
}

// A write that was certainly not carried out is forgotten.
func TestAbandon(t *testing.T) {
	t.Parallel()
	r, first := Begin(record(), all, west, "B", "w1", at(20))
	r, _ = Begin(r, all, west, "B", "w2", at(21))
	if r = Abandon(r, all, first); len(r.Intents) != 1 || r.Intents[0].WriteID != "w2" || !Due(r, west) {
		t.Errorf("%+v", r)
	}
}

func TestIntentsAreBounded(t *testing.T) {
	t.Parallel()
	r := record()
	for i := range 100 {
		r, _ = Begin(r, all, west, "B", fmt.Sprint("w", i), at(20+i))
	}
	if len(r.Intents) != maxIntents || r.Intents[maxIntents-1].WriteID != "w99" {
		t.Errorf("%d intents", len(r.Intents))
	}
	if r, _ = Begin(r, all, west, "B", "later", at(119).Add(IntentLifetime)); len(r.Intents) != 1 {
		t.Errorf("%d intents after all but one have expired", len(r.Intents))
	}
}

// What a lagging replica has is remembered for as long as it lags, however many versions come in between.
func TestHistoryKeepsWhatIsReferredTo(t *testing.T) {
	t.Parallel()
	r := record()
	for i := range 30 {
		r = Observe(r, all, east, Policy{}, Observation{Digest: fmt.Sprint("C", i), Time: at(20 + i)}).Record
	}
	if out := Observe(r, all, west, Policy{}, Observation{Digest: "A"}); out.Verdict != Unchanged {
		t.Errorf("what westus always had is %s", out.Verdict)
	}
	if len(r.History) > ledger.MaxHistory+2 {
		t.Errorf("%d versions are remembered", len(r.History))
	}
}

// A manifest that was deleted in one region, and came to the others with a tag, goes there as well.
func TestDeleteOfAManifestThatCameWithATag(t *testing.T) {
	t.Parallel()
	fleet := Fleet{east, west, fresh}
	r := Observe(ledger.Record{}, fleet, east, Policy{}, Observation{Time: at(20), Confirmed: true, Deleted: "D"}).Record
	for _, m := range []Replica{west, fresh} {
		if out := Observe(r, fleet, m, Policy{}, Observation{Digest: "D", Time: at(30)}); out.Record.Head.Digest != "" || !Due(out.Record, m) {
			t.Errorf("in %s the manifest is %s, the head %q", m.Region, out.Verdict, out.Record.Head.Digest)
		}
	}
}

// What was pushed joins as of then, or of the latest that may have been: a later delete stands, and an earlier one does not.
func TestJoin(t *testing.T) {
	t.Parallel()
	fleet := Fleet{east, west}
	pushed := ledger.Version{Digest: "D", Sequence: 7, Origin: "eastus", Time: at(10), Seen: at(15)}
	r, joined := Join(ledger.Record{}, fleet, pushed, func(r Replica) bool { return r == east })
	if want := (ledger.Version{Digest: "D", Sequence: 1, Origin: "eastus", Time: at(10), Seen: at(15)}); !joined || r.Head != want || Due(r, east) || !Due(r, west) {
		t.Errorf("%+v", r)
	}
	if _, joined := Join(r, fleet, pushed, func(Replica) bool { return true }); joined {
		t.Error("it joined twice")
	}
	for deleted, want := range map[int]bool{5: true, 12: true, 20: false} {
		gone := ledger.Record{Head: ledger.Version{Sequence: 2, Origin: "westus", Time: at(deleted)}, History: []ledger.Past{{Digest: "D", Sequence: 1}}}
		if r, joined := Join(gone, fleet, pushed, func(Replica) bool { return false }); joined != want || r.Head.Tombstone() == want {
			t.Errorf("deleted at %d: %+v", deleted, r)
		}
	}
}

// A version that lost takes a place in the order without making anybody else lag.
func TestLosingMakesNobodyLag(t *testing.T) {
	t.Parallel()
	out := Observe(record(), all, west, Policy{}, Observation{Digest: "C", Time: at(5)})
	if Due(out.Record, east) || Due(out.Record, north) || !Due(out.Record, west) {
		t.Errorf("%+v", out.Record)
	}
	if again := Observe(out.Record, all, west, Policy{}, Observation{Digest: "C", Time: at(50)}); again.Verdict != Unchanged {
		t.Errorf("looked at again, what lost is %s", again.Verdict)
	}
}

// Why a head can never be applied stands in its record for as long as that is the head, and not applied after all.
func TestRefuse(t *testing.T) {
	t.Parallel()
	before := record()
	refused := Refuse(before, all, west, "schema 1")
	if len(before.Refused) != 0 || refused.Refused["w"] != "schema 1" {
		t.Fatalf("%v became %v", before.Refused, refused.Refused)
	}
	lost := Observe(refused, all, west, Policy{}, Observation{Digest: "C", Time: at(5)})
	applied := Observe(refused, all, west, Policy{}, Observation{Digest: "B", Now: at(30)})
	next := Observe(refused, all, east, Policy{}, Observation{Digest: "C", Time: at(20)})
	for what, test := range map[string]struct {
		Outcome
		verdict Verdict
		reasons int
	}{"a push that is decided against": {lost, ConcurrentLost, 1}, "the head, applied": {applied, Applied, 0}, "a new head": {next, Successor, 0}} {
		if test.Verdict != test.verdict || !test.Changed || len(test.Record.Refused) != test.reasons {
			t.Errorf("%s is %v, and leaves %v", what, test.Verdict, test.Record.Refused)
		}
	}
	if left := Refuse(refused, Fleet{east, north}, north, "x").Refused; len(left) != 0 {
		t.Errorf("of replicas that are gone, or have the head, it says %v", left)
	}
}

func TestConflictTag(t *testing.T) {
	t.Parallel()
	if got := ConflictTag("1.2", "westus", 3); got != "1.2.conflict-westus-3" {
		t.Error(got)
	}
	long := ConflictTag(string(make([]byte, 128)), "westus", 1)
	if len(long) != maxTag {
		t.Errorf("a tag of %d characters", len(long))
	}
}

func TestGuard(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		tags, regressions int
		want              bool
	}{{10, 10, false}, {100, 20, false}, {100, 21, true}, {10000, 100, false}, {10000, 101, true}} {
		if Guard(c.tags, c.regressions) != c.want {
			t.Errorf("%d of %d: want %t", c.regressions, c.tags, c.want)
		}
	}
}

// A tag that two regions push in turn flips; what people do does not.
func TestFlips(t *testing.T) {
	t.Parallel()
	// play has the regions push in turn, a minute apart, each on top of what the other pushed.
	play := func(n int, push func(i int) (Replica, string)) ledger.Record {
		r := ledger.Record{}
		for i := range n {
			m, digest := push(i)
			r = Observe(r, all, m, Policy{}, Observation{Digest: digest, Time: at(60 * i), Now: at(60 * i), Confirmed: true}).Record
			for _, other := range all {
				var intent ledger.Intent
				r, intent = Begin(r, all, other, digest, fmt.Sprint(i, other.Region), at(60*i))
				r = Settle(r, all, other, intent, at(60))
			}
		}
		return r
	}
	inTurn := func(i int) (Replica, string) { return []Replica{east, west}[i%2], []string{"A", "B"}[i%2] }
	for n, want := range map[int]bool{0: false, 1: false, maxFlips + 1: false, maxFlips + 2: true, 30: true} {
		if r := play(n, inTurn); Flips(r, at(60*n)) != want {
			t.Errorf("%d pushes: %+v", n, r)
		}
	}
	r := play(30, inTurn)
	if now := at(29 * 60).Add(flipTime - maxFlips*time.Minute); !Flips(r, now) || Flips(r, now.Add(time.Millisecond)) {
		t.Error("the hour is not that of the last flips")
	}
	for name, push := range map[string]func(i int) (Replica, string){
		"one region":  func(i int) (Replica, string) { return east, []string{"A", "B"}[i%2] },
		"new content": func(i int) (Replica, string) { return []Replica{east, west}[i%2], fmt.Sprint("C", i) },
		"new in one": func(i int) (Replica, string) {
			return []Replica{east, west}[i%2], []string{"A", fmt.Sprint("C", i)}[i%2]
		},
		"with deletes":  func(i int) (Replica, string) { return []Replica{east, west}[i%2], []string{"A", ""}[i%2] },
		"three regions": func(i int) (Replica, string) { return all[i%3], []string{"A", "B"}[i%2] },
	} {
		if r := play(30, push); Flips(r, at(60*30)) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// Random observations and writes: sequences only grow, the head changes with its sequence, what Due says is right about
// the origin, and a record does not grow without bound.
func TestProperties(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	digests := []string{"", "A", "B", "C", "D"}
	for range 2000 {
		r := ledger.Record{}
		for step := range 60 {
			m := all[rng.IntN(len(all))]
			before := r
			switch rng.IntN(3) {
			case 0:
				r, _ = Begin(r, all, m, r.Head.Digest, fmt.Sprint(step), at(step))
			case 1:
				if len(r.Intents) > 0 {
					i := r.Intents[rng.IntN(len(r.Intents))]
					for _, target := range all {
						if target.Incarnation == i.Incarnation {
							r = Settle(r, all, target, i, at(60))
						}
					}
				}
			default:
				out := Observe(r, all, m, Policy{}, Observation{Digest: digests[rng.IntN(len(digests))], Now: at(step), Time: at(rng.IntN(60)), Confirmed: true})
				r = out.Record
				if (out.Verdict == Applied || out.Verdict == Successor || out.Verdict == ConcurrentWon) && Due(r, m) {
					t.Fatalf("%s, and due: %+v", out.Verdict, r)
				}
				if out.Verdict == ConcurrentWon && before.Head.Digest != "" && out.Lost == nil {
					t.Fatal("the head was replaced beside a push, and not kept")
				}
			}
			if r.Head.Sequence < before.Head.Sequence || r.Head.Digest != before.Head.Digest && r.Head.Sequence == before.Head.Sequence {
				t.Fatalf("the head went from %+v to %+v", before.Head, r.Head)
			}
			seen := map[uint64]bool{r.Head.Sequence: true}
			for _, p := range r.History {
				if seen[p.Sequence] || p.Sequence >= r.Head.Sequence {
					t.Fatalf("sequence %d stands twice: %+v", p.Sequence, r)
				}
				seen[p.Sequence] = true
			}
			if len(r.History) > ledger.MaxHistory+len(all)*(maxIntents+1) || len(r.Intents) > len(all)*maxIntents {
				t.Fatalf("the record grows: %+v", r)
			}
		}
	}
}

// A decision says of everybody that he lacks it, also of one that is being compared: once that is done, silence means consent.
func TestDecisionsAreDueToThoseBeingCompared(t *testing.T) {
	t.Parallel()
	fleet := Fleet{east, west, fresh}
	known := fresh
	known.Baselined = true
	for _, digest := range []string{"C", ""} {
		out := Observe(record(), fleet, east, Policy{}, Observation{Digest: digest, Time: at(20), Confirmed: true})
		if out.Verdict != Successor || !Due(out.Record, known) {
			t.Errorf("%q: %s, %+v", digest, out.Verdict, out.Record)
		}
	}
}

func TestRegress(t *testing.T) {
	t.Parallel()
	has := func(sequence uint64) ledger.Record {
		return ledger.Record{Head: ledger.Version{Digest: "C", Sequence: 4, Origin: "eastus"},
			History: []ledger.Past{{Digest: "", Sequence: 3, Origin: "eastus"}, {Digest: "B", Sequence: 2, Origin: "eastus"}, {Digest: "A", Sequence: 1, Origin: "eastus"}},
			Applied: map[string]uint64{west.Incarnation: sequence},
			Intents: []ledger.Intent{{Incarnation: west.Incarnation, Digest: "I", Since: at(20)}}}
	}
	ours := has(4)
	ours.Intents[0].Digest = "A"
	for _, c := range []struct {
		name   string
		record ledger.Record
		shows  string
		want   bool
	}{
		{"what it had", has(2), "B", false},
		{"the head", has(2), "C", false},
		{"something new", has(4), "X", false},
		{"nothing", has(4), "", true},
		{"nothing, where nothing was", has(0), "", false},
		{"an older version", has(4), "B", true},
		{"an older version of what lags", has(2), "A", true},
		{"a newer version than what it had", has(1), "B", false},
		{"a version that was deleted there", has(3), "B", true},
		{"a version, where nothing was", has(0), "A", true},
		{"an older version, by a write of ours", ours, "A", false},
		{"whatever it shows of which nothing is known", has(ledger.UnknownSequence), "A", false},
	} {
		if got := Regress(c.record, west, c.shows, at(30)); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
}

// What happened to a tag before the head was copied there happened to an earlier version, and did not know of the head.
func TestCopied(t *testing.T) {
	t.Parallel()
	r, intent := Begin(record(), all, west, "B", "w1", at(20))
	r = Settle(r, all, west, intent, at(25))
	if !Copied(r, west, at(24)) || Copied(r, west, at(26)) {
		t.Errorf("copied at %v", r.Head.Copied)
	}
	if Copied(r, east, at(1)) {
		t.Error("the head was copied to where it was pushed")
	}
	if out := Observe(r, all, west, Policy{}, Observation{Digest: "X", Time: at(24), Now: at(30)}); out.Verdict != ConcurrentWon || out.Lost == nil {
		t.Errorf("a push of before the copy is %s", out.Verdict)
	}
	if out := Observe(r, all, west, Policy{}, Observation{Digest: "X", Time: at(26), Now: at(30)}); out.Verdict != Successor || out.Lost != nil {
		t.Errorf("a push of after the copy is %s", out.Verdict)
	}
	if out := Observe(r, all, west, Policy{}, Observation{Digest: "X", Time: at(24), Now: at(30), Undated: true}); out.Verdict != Successor {
		t.Errorf("a push that nothing dates is %s", out.Verdict)
	}
}

// A replica is baselined when its lag is in the records. What speaks of it already is newer than the comparison.
func TestOwe(t *testing.T) {
	t.Parallel()
	seeding := Replica{Region: "northeurope", Incarnation: "n"}
	fleet := append(Fleet{seeding}, all...)
	r := ledger.Record{Head: ledger.Version{Digest: "B", Sequence: 2, Origin: "eastus"}, History: []ledger.Past{{Digest: "A", Sequence: 1}}}
	owed, changed := Owe(r, fleet, seeding, 1)
	seeding.Baselined = true
	if !changed || !Due(owed, seeding) || Has(owed, seeding) != "A" {
		t.Errorf("%+v", owed)
	}
	if again, changed := Owe(owed, fleet, seeding, 0); changed || Has(again, seeding) != "A" {
		t.Errorf("%+v", again)
	}
	if never, changed := Owe(ledger.Record{}, fleet, seeding, 0); changed {
		t.Errorf("%+v", never)
	}
}
