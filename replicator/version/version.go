// Package version decides what an observation of a replica means: which version a tag has, and what each replica still
// has to apply.
//
// Everything here is a pure function of a record, the fleet of replicas and what was seen; there is no clock, no
// randomness and no I/O, so that the same code runs in production and, millions of times over, in simulations. Whoever
// calls it stores the resulting record by compare-and-set against the revision that was read BEFORE the replica was
// asked; that order is what keeps a slow answer from being taken for a push.
//
// The model is a multi-value register decided once: causality first (what a replica had applied when it was pushed to),
// time only between concurrent pushes. Sequence numbers totally order the versions of a key.
package version

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"portolan/replicator/ledger"
)

// IntentLifetime is how long an intent whose outcome was never seen is remembered. A request that registries, proxies
// and sockets still carry after a day is beyond what is known of any of them.
const IntentLifetime = 24 * time.Hour

// Replica is what a decision needs to know of one replica.
type Replica struct {
	Region      string
	Incarnation string
	// Baselined replicas have applied whatever a record does not say they lack.
	Baselined bool
}

// Fleet is all the replicas of a registry.
type Fleet []Replica

// Policy is how a registry wants deletes to be treated.
type Policy struct {
	// IgnoreDeletes lets a delete stand in its region alone.
	IgnoreDeletes bool
}

// Event is the evidence of a registry's notification.
type Event struct {
	// Digest is what was pushed.
	Digest string
	// Time is the event's own, corrected by the registry's clock offset and capped by its receipt.
	Time time.Time
	// WriteID is that of our own write, if the User-Agent bore one.
	WriteID string
}

// Observation is what was seen at a replica under a key.
type Observation struct {
	// Digest is what HEAD gave; ledger.Absent if there was nothing.
	Digest string
	// Now is when the replica was asked; intents that are older than IntentLifetime by then count no more.
	Now time.Time
	// Time dates a push that is found: the event's time, or, for a scan, the time of the scan before it.
	Time time.Time
	// Undated says that no event told of it: a push that is found came between Time and Now.
	Undated bool
	// WriteID is that of the event whose digest this is, if there was one and it was ours.
	WriteID string
	// ByOther says that an event tells of a writer that was not Portolan; Time is when.
	ByOther bool
	// Held says that the key is that of a manifest of which no event tells that it was pushed: it may be there by a copy of ours,
	// with a tag or an index, and that it is there is no evidence of a push.
	Held bool
	// Deleted is the digest of the manifest whose delete an event told of, if the key is that of a manifest. It needs no
	// record to be carried on.
	Deleted string
	// Confirmed says that an absence is more than one failed look: a delete event told of it, or two scans far enough
	// apart, with a credential that still reads another tag there.
	Confirmed bool
}

// latest is the latest time at which what is seen may have come to be.
func (o Observation) latest() time.Time {
	if o.Undated && o.Now.After(o.Time) {
		return o.Now
	}
	return o.Time
}

// told is the write of ours that has been carried out, as its event tells: empty if something else can have put there what is
// seen. CNCF distribution tells of a write before it sets the tag, and may take long to do so.
func (o Observation) told(record ledger.Record, at Replica) string {
	another := slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool {
		return i.Incarnation == at.Incarnation && i.Digest == o.Digest && i.WriteID != o.WriteID
	})
	if another || Has(record, at) == o.Digest {
		return ""
	}
	return o.WriteID
}

// Verdict names what an observation means. The numbers are those of the design's observation table.
type Verdict uint8

// The verdicts.
const (
	// Applied (1): the replica has the head.
	Applied Verdict = iota + 1
	// Unchanged (2): it still has what it had, and lags.
	Unchanged
	// Ours (3): an earlier write of our own is there, not the head; the head is applied again.
	Ours
	// Successor (4): a push or delete on top of the head.
	Successor
	// ConcurrentWon (4): a push beside the head, decided for it.
	ConcurrentWon
	// ConcurrentLost (4): a push beside the head, decided against it.
	ConcurrentLost
	// Late (6): an event of something long accounted for.
	Late
	// Superseded (5): a push that the same region overwrote before it was looked at.
	Superseded
	// Known: an older version that we know, at a replica that is not baselined; or a manifest that was deleted elsewhere.
	Known
	// Suspect: an absence that is not confirmed.
	Suspect
	// Restored: a delete beside a push; the push stays and is applied there again.
	Restored
	// Ignored: a delete that the policy leaves where it was made.
	Ignored
)

var verdictNames = [...]string{Applied: "applied", Unchanged: "unchanged", Ours: "ours", Successor: "successor",
	ConcurrentWon: "concurrent-won", ConcurrentLost: "concurrent-lost", Late: "late", Superseded: "superseded",
	Known: "known", Suspect: "suspect", Restored: "restored", Ignored: "ignored"}

// String is the verdict's name in logs and metrics.
func (v Verdict) String() string {
	if int(v) < len(verdictNames) && verdictNames[v] != "" {
		return verdictNames[v]
	}
	return "verdict(" + strconv.Itoa(int(v)) + ")"
}

// Lost is a version that a concurrent one took the place of. It is kept as a conflict before the record is stored.
type Lost struct {
	Digest string
	Region string
	Time   time.Time
}

// Outcome is what an observation makes of a record.
type Outcome struct {
	Verdict Verdict
	// Record is the new record; the old one if Changed is false.
	Record  ledger.Record
	Changed bool
	// Lost is the version that must be kept as a conflict before Record is stored; nil if none was lost.
	Lost *Lost
	// Joins is a digest that has to be a member of the repository's set of manifests from now on, because a push of it
	// was seen and no tag leads to it any more; empty if there is none.
	Joins string
}

// Sequence returns the sequence that the replica has applied of the record, and whether that is known.
func Sequence(record ledger.Record, r Replica) (uint64, bool) {
	if s, ok := record.Applied[r.Incarnation]; ok {
		return s, s != ledger.UnknownSequence
	}
	return record.Head.Sequence, r.Baselined
}

// Has returns the digest that the replica has applied; Absent if that is none, or not known.
func Has(record ledger.Record, r Replica) string {
	s, known := Sequence(record, r)
	if !known {
		return ledger.Absent
	}
	d, _ := digestAt(record, s)
	return d
}

// Due reports whether the replica may lack the record's head, so that it has to be looked at and, if need be, written.
func Due(record ledger.Record, r Replica) bool {
	if record.Head.Sequence == 0 {
		return false // no version, nothing to apply
	}
	s, known := Sequence(record, r)
	return !known || s != record.Head.Sequence
}

// digestAt returns the digest of a sequence. Sequence zero is the absence before the first version.
func digestAt(record ledger.Record, sequence uint64) (string, bool) {
	if sequence == record.Head.Sequence {
		return record.Head.Digest, true
	}
	if sequence == 0 {
		return ledger.Absent, true
	}
	for _, p := range record.History {
		if p.Sequence == sequence {
			return p.Digest, true
		}
	}
	return "", false
}

// past returns the newest earlier version with that digest.
func past(record ledger.Record, digest string) (ledger.Past, bool) {
	for _, p := range record.History {
		if p.Digest == digest {
			return p, true
		}
	}
	return ledger.Past{}, false
}

// Observe decides what it means that the replica at showed o under the key of record. It is the observation table of
// the design, rules 1 to 4.
func Observe(record ledger.Record, fleet Fleet, at Replica, policy Policy, o Observation) Outcome {
	out := observe(record, fleet, at, policy, o)
	if o.Undated && (out.Verdict == Successor || out.Verdict == ConcurrentWon) {
		out.Record.Head.Seen = o.Now
	}
	return out
}

func observe(record ledger.Record, fleet Fleet, at Replica, policy Policy, o Observation) Outcome {
	sequence, known := Sequence(record, at)
	if known && sequence != record.Head.Sequence {
		// What it had applied is no longer in the history only if the record was cut by hand; then nothing is known.
		if _, ok := digestAt(record, sequence); !ok {
			known = false
		}
	}

	if o.Deleted != "" && o.Deleted == record.Head.Digest && o.Digest == ledger.Absent && (!known || sequence == 0) && !o.Time.Before(record.Head.Time) {
		// Only what is there is deleted: a copy of ours, with a tag perhaps, had brought it, and the record did not say so yet.
		sequence, known = record.Head.Sequence, true
	}

	if o.Digest == record.Head.Digest { // 1
		if record.Head.Sequence == 0 { // never seen, and not there
			if o.Deleted != "" && !policy.IgnoreDeletes {
				// It came with a tag, so everybody has it, or will.
				had := ledger.Record{Head: ledger.Version{Digest: o.Deleted, Sequence: 1, Origin: at.Region, Time: o.Time}}
				return outcome(Successor, record, advance(had, fleet, at, ledger.Absent, o.Time), fleet)
			}
			return Outcome{Verdict: Applied, Record: record}
		}
		if had := Has(record, at); record.Head.Tombstone() && had != ledger.Absent && !o.Confirmed && o.WriteID == "" {
			// One look does not tell that what it had is gone. Deleting what is gone does no harm.
			return Outcome{Verdict: Unchanged, Record: record}
		}
		return outcome(Applied, record, arrived(landed(record, o.told(record, at)), at, o.Now), fleet)
	}
	if known {
		if had, _ := digestAt(record, sequence); had == o.Digest { // 2
			return Outcome{Verdict: Unchanged, Record: record}
		}
	}
	if slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool { // 3
		return i.Incarnation == at.Incarnation && i.Digest == o.Digest && o.Now.Sub(i.Since) < IntentLifetime &&
			!(o.ByOther && o.Time.After(i.Since))
	}) {
		next := landed(record, o.told(record, at))
		if p, ok := past(record, o.Digest); ok {
			next = withApplied(next, at, p.Sequence)
		} else {
			// A write that is no version, the throw-away manifest of a tag's deletion: only the intent tells.
			next = withApplied(next, at, ledger.UnknownSequence)
		}
		return outcome(Ours, record, next, fleet)
	}
	if o.Digest == ledger.Absent && o.WriteID != "" { // 3, for a delete that took more with it than it should
		return outcome(Ours, record, withApplied(landed(record, o.WriteID), at, 0), fleet)
	}
	if o.Digest == ledger.Absent {
		return observeAbsence(record, fleet, at, policy, o, sequence, known)
	}
	if record.Head.Sequence == 0 && (o.WriteID != "" || o.Held) {
		return Outcome{Verdict: Late, Record: record} // content that came with something else
	}
	if o.WriteID != "" { // 3, where the intent is gone already
		if p, ok := past(record, o.Digest); ok {
			return outcome(Ours, record, withApplied(record.Clone(), at, p.Sequence), fleet)
		}
		next := record.Clone()
		next.Intents = append(next.Intents, ledger.Intent{Incarnation: at.Incarnation, Digest: o.Digest, Sequence: record.Head.Sequence, WriteID: o.WriteID, Since: o.Now})
		return outcome(Ours, record, withApplied(next, at, ledger.UnknownSequence), fleet)
	}

	if !known && (o.Undated || record.Head.Sequence == 0) {
		return observeUnknown(record, fleet, at, o)
	}
	p, old := past(record, o.Digest)
	if old && (!known || o.Held) {
		return outcome(Known, record, withApplied(record.Clone(), at, p.Sequence), fleet)
	}
	// A head that was pushed in this very region, and is not there any more, was before what is there.
	sameRegister := record.Head.Origin == at.Region && !old
	// A push from before the head was copied there did not know of it.
	knew := known && sequence == record.Head.Sequence && (o.Undated || !Copied(record, at, o.Time))
	if knew || sameRegister { // 4
		out := outcome(Successor, record, advance(record, fleet, at, o.Digest, o.Time), fleet)
		out.Joins = record.Head.Digest
		return out
	}
	return concurrent(record, fleet, at, o.Digest, o.Time, o.latest(), true)
}

// observeUnknown merges without clocks what a replica shows of which nothing is known: the design's baseline.
func observeUnknown(record ledger.Record, fleet Fleet, at Replica, o Observation) Outcome {
	if record.Head.Sequence == 0 {
		return outcome(Successor, record, advance(record, fleet, at, o.Digest, o.Time), fleet)
	}
	if p, ok := past(record, o.Digest); ok {
		return outcome(Known, record, withApplied(record.Clone(), at, p.Sequence), fleet)
	}
	if record.Head.Tombstone() {
		// Nobody deleted this version: a tag wins over a delete it knew nothing of.
		return outcome(ConcurrentWon, record, advance(record, fleet, at, o.Digest, o.Time), fleet)
	}
	return lost(record, fleet, at, o.Digest, o.Time, o.latest(), true)
}

func observeAbsence(record ledger.Record, fleet Fleet, at Replica, policy Policy, o Observation, sequence uint64, known bool) Outcome {
	switch {
	case !known:
		// Not there, and never known to have been: it just has to be copied. That it is absent is known now.
		return outcome(Unchanged, record, withApplied(record.Clone(), at, 0), fleet)
	case policy.IgnoreDeletes:
		return Outcome{Verdict: Ignored, Record: record}
	case !o.Confirmed:
		return Outcome{Verdict: Suspect, Record: record}
	case sequence == record.Head.Sequence:
		return outcome(Successor, record, advance(record, fleet, at, ledger.Absent, o.Time), fleet)
	default:
		return outcome(Restored, record, withApplied(record.Clone(), at, 0), fleet)
	}
}

// Overwriter is who put what stands where a push was.
type Overwriter uint8

const (
	// Users of the same registry, who saw what they replaced.
	Users Overwriter = iota
	// Unsure: a copy of ours or users, as near as clocks can tell.
	Unsure
	// Copy: a write of ours.
	Copy
)

// ObserveOverwritten decides what an event means whose digest is no longer under the tag: rules 5 and 6. It is called
// after Observe has accounted for what is under the tag now. by says who put that there, readable that the digest can still be
// read at the replica.
func ObserveOverwritten(record ledger.Record, fleet Fleet, at Replica, e Event, by Overwriter, readable bool) Outcome {
	if e.WriteID != "" {
		// Something has taken its place since; or it is still to come: a registry may tell of a push before it sets the tag. So its
		// intent stays, until the replica has answered.
		return Outcome{Verdict: Late, Record: record}
	}
	if e.Digest == record.Head.Digest {
		return Outcome{Verdict: Late, Record: record}
	}
	if _, ok := past(record, e.Digest); ok {
		return Outcome{Verdict: Late, Record: record}
	}
	if by == Users || !readable {
		// Overwritten by a push of the same region, which knew of it: only its content is owed. Or it is gone already.
		out := Outcome{Verdict: Superseded, Record: record}
		if readable {
			out.Joins = e.Digest
		}
		return out
	}
	if by == Unsure {
		// If users replaced it, it must not come back.
		return lost(record, fleet, at, e.Digest, e.Time, e.Time, false)
	}
	return concurrent(record, fleet, at, e.Digest, e.Time, e.Time, false)
}

// Overtaken reports whether a later version than a push in that region at that time, of the same region's users, is
// accounted for already, whatever became of it.
func Overtaken(record ledger.Record, region string, when time.Time) bool {
	if record.Head.Origin == region && !when.After(record.Head.Latest()) {
		return true
	}
	return slices.ContainsFunc(record.History, func(p ledger.Past) bool {
		return p.Origin == region && p.Latest >= when.UnixMilli()
	})
}

// Origin returns the region in which a version was pushed or deleted, and the latest time at which that may have been; an
// empty region if digest is no version.
func Origin(record ledger.Record, digest string) (region string, latest time.Time) {
	if record.Head.Sequence > 0 && digest == record.Head.Digest {
		return record.Head.Origin, record.Head.Latest()
	}
	p, ok := past(record, digest)
	if !ok {
		return "", time.Time{}
	}
	return p.Origin, time.UnixMilli(p.Latest)
}

// Knows reports whether a digest is, or was, a version of the record.
func Knows(record ledger.Record, digest string) bool {
	_, ok := past(record, digest)
	return ok || record.Head.Sequence > 0 && record.Head.Digest == digest
}

// concurrent decides between the head and a push that did not know of it. shown is whether the replica shows that push.
func concurrent(record ledger.Record, fleet Fleet, at Replica, digest string, when, latest time.Time, shown bool) Outcome {
	head := record.Head
	// Later wins; on equal times the greater region, then the greater digest: any total order will do that every
	// decider would choose alike.
	wins := head.Tombstone() || cmp.Or(when.Compare(head.Time), strings.Compare(at.Region, head.Origin), strings.Compare(digest, head.Digest)) > 0
	if wins {
		next := advance(record, fleet, at, digest, when)
		if !shown {
			// It shows what Observe found there.
			s, known := Sequence(record, at)
			if !known {
				s = ledger.UnknownSequence
			}
			next = withApplied(next, at, s)
		}
		out := outcome(ConcurrentWon, record, next, fleet)
		if !head.Tombstone() {
			out.Lost = &Lost{Digest: head.Digest, Region: head.Origin, Time: head.Time}
		}
		return out
	}
	return lost(record, fleet, at, digest, when, latest, shown)
}

// lost decides against a push.
func lost(record ledger.Record, fleet Fleet, at Replica, digest string, when, latest time.Time, shown bool) Outcome {
	out := outcome(ConcurrentLost, record, lose(record, at, digest, latest, shown), fleet)
	out.Lost = &Lost{Digest: digest, Region: at.Region, Time: when}
	return out
}

// advance returns the record with a new head that was pushed at the replica at. Everyone else lags from now on, and the
// record says so explicitly, whatever the phase: a reader that believes a replica to be baselined must never take
// silence for "applied".
func advance(record ledger.Record, fleet Fleet, at Replica, digest string, when time.Time) ledger.Record {
	next := record.Clone()
	if record.Head.Sequence > 0 {
		next.History = slices.Insert(next.History, 0, ledger.Past{Digest: record.Head.Digest, Sequence: record.Head.Sequence, Origin: record.Head.Origin, Latest: record.Head.Latest().UnixMilli()})
	}
	next.Head = ledger.Version{Digest: digest, Sequence: record.Head.Sequence + 1, Origin: at.Region, Time: when}
	next.Refused = nil // what is said of the former head says nothing of this one
	for _, r := range fleet {
		if r.Incarnation == at.Incarnation {
			continue
		}
		s, known := Sequence(record, r)
		if !known {
			s = ledger.UnknownSequence
		}
		next = withApplied(next, r, s)
	}
	return withApplied(next, at, next.Head.Sequence)
}

// lose returns the record in which a push at the replica at was decided against: it takes its place in the order just
// before the head, whose version keeps its digest and gets the next sequence. Who had the head has it still.
func lose(record ledger.Record, at Replica, digest string, latest time.Time, shown bool) ledger.Record {
	next := record.Clone()
	place := record.Head.Sequence + 1
	next.Head.Sequence = place + 1
	next.History = slices.Insert(next.History, 0, ledger.Past{Digest: digest, Sequence: place, Origin: at.Region, Latest: latest.UnixMilli()})
	for incarnation, s := range record.Applied {
		if s == record.Head.Sequence {
			next.Applied[incarnation] = next.Head.Sequence
		}
	}
	for i := range next.Intents {
		if next.Intents[i].Sequence == record.Head.Sequence {
			next.Intents[i].Sequence = next.Head.Sequence
		}
	}
	if shown {
		next = withApplied(next, at, place)
	}
	return next
}

// maxIntents bounds the intents of one replica in a record. Only writes whose outcome nobody saw pile up, one a retry; of
// so many of them, the oldest is not worth remembering beside the others.
const maxIntents = 8

// Begin returns the record with the intent to put digest (the head's, or a throw-away manifest's) at the replica. Intents
// whose outcome was not seen stay beside it: their requests may still be carried out.
func Begin(record ledger.Record, fleet Fleet, at Replica, digest, writeID string, now time.Time) (ledger.Record, ledger.Intent) {
	next := record.Clone()
	next.Intents = slices.DeleteFunc(next.Intents, func(i ledger.Intent) bool { return now.Sub(i.Since) >= IntentLifetime })
	mine := func(i ledger.Intent) bool { return i.Incarnation == at.Incarnation }
	count := 0
	for _, i := range next.Intents {
		if mine(i) {
			count++
		}
	}
	if count >= maxIntents {
		i := slices.IndexFunc(next.Intents, mine)
		next.Intents = slices.Delete(next.Intents, i, i+1)
	}
	intent := ledger.Intent{Incarnation: at.Incarnation, Digest: digest, Sequence: record.Head.Sequence, WriteID: writeID, Since: now}
	next.Intents = append(next.Intents, intent)
	return normalise(next, fleet), intent
}

// Settle returns the record after the write of an intent was acknowledged by the replica, at now. The head may have moved on
// meanwhile.
func Settle(record ledger.Record, fleet Fleet, at Replica, intent ledger.Intent, now time.Time) ledger.Record {
	i := slices.IndexFunc(record.Intents, func(i ledger.Intent) bool { return i.WriteID == intent.WriteID })
	if i < 0 {
		return record // an event told of it already, and the replica was looked at then
	}
	next := landed(record, intent.WriteID)
	sequence := record.Intents[i].Sequence // a version that lost meanwhile may have moved it
	later, known := Sequence(record, at)
	switch d, ok := digestAt(next, sequence); {
	case !ok || d != intent.Digest, known && later > sequence:
		// Or a later version was applied meanwhile, by a process that took this one for dead: which of the two writes the replica
		// carried out last is for the next look to tell.
		next = withApplied(next, at, ledger.UnknownSequence)
	case sequence == next.Head.Sequence:
		next = arrived(next, at, now)
	default:
		next = withApplied(next, at, sequence)
	}
	return normalise(next, fleet)
}

// Abandon returns the record without an intent whose request was certainly not carried out.
func Abandon(record ledger.Record, fleet Fleet, intent ledger.Intent) ledger.Record {
	return normalise(landed(record, intent.WriteID), fleet)
}

// Refuse returns the record that says why its head can never be applied to a replica.
func Refuse(record ledger.Record, fleet Fleet, at Replica, reason string) ledger.Record {
	next := record.Clone()
	if next.Refused == nil {
		next.Refused = make(map[string]string, 1)
	}
	next.Refused[at.Incarnation] = reason
	return normalise(next, fleet)
}

// Owe returns the record that says in words what the replica at has of it, the sequence applied, which a comparison of its
// content found: from the moment at which the replica is baselined, silence means that it has the head. A record that speaks of
// the replica already knows better, and is unchanged.
func Owe(record ledger.Record, fleet Fleet, at Replica, applied uint64) (ledger.Record, bool) {
	if _, told := record.Applied[at.Incarnation]; told || record.Head.Sequence == 0 {
		return record, false
	}
	return normalise(withApplied(record.Clone(), at, applied), fleet), true
}

// Copied reports whether the head may have come to the replica, from another region, after that time: what happened to the tag
// there by then happened to an earlier version.
func Copied(record ledger.Record, at Replica, when time.Time) bool {
	s, known := Sequence(record, at)
	return record.Head.Origin != at.Region && known && s == record.Head.Sequence && when.Before(record.Head.Copied)
}

// Keep returns the record of a conflict tag that keeps a lost version: a tag like any other, pushed in the region in
// which the version was lost, due everywhere, there as well (where only its content is known to be).
func Keep(fleet Fleet, lost Lost, tag string, now time.Time) ledger.Record {
	at := Replica{Region: lost.Region}
	for _, r := range fleet {
		if r.Region == lost.Region {
			at = r
		}
	}
	next := advance(ledger.Record{ConflictOf: tag}, fleet, at, lost.Digest, now)
	return normalise(withApplied(next, at, 0), fleet)
}

// Join returns the record of a manifest that is a member of its repository's set from now on, because pushed, a version of a tag
// with that digest, was seen; has tells which replicas are known to hold it. A record that says so already is unchanged, and one
// that says that the manifest was deleted later than pushed.
func Join(record ledger.Record, fleet Fleet, pushed ledger.Version, has func(Replica) bool) (ledger.Record, bool) {
	if record.Head.Digest == pushed.Digest || record.Head.Sequence > 0 && !pushed.Latest().After(record.Head.Time) {
		return record, false
	}
	next := advance(record, fleet, Replica{Region: pushed.Origin}, pushed.Digest, pushed.Time)
	next.Head.Seen = pushed.Seen
	for _, r := range fleet {
		if has(r) {
			next = withApplied(next, r, next.Head.Sequence)
		}
	}
	return normalise(next, fleet), true
}

// Regress reports whether what a replica shows is what a restored backup or a wiped disk would show: nothing, or an
// older known version, where a newer one or a delete was applied. Single ones are deletes and rollbacks; many are for the guard.
func Regress(record ledger.Record, at Replica, digest string, now time.Time) bool {
	s, known := Sequence(record, at)
	if !known || digest == record.Head.Digest {
		return false
	}
	had, ok := digestAt(record, s)
	if !ok || had == digest {
		return false
	}
	if slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool {
		return i.Incarnation == at.Incarnation && i.Digest == digest && now.Sub(i.Since) < IntentLifetime
	}) {
		return false
	}
	p, old := past(record, digest)
	return digest == ledger.Absent || old && (had == ledger.Absent || p.Sequence < s)
}

// Guard reports whether so many regressions in one scan must be an accident of the replica, not its users' will: more
// than max(20, 1 %) of its tags. Twenty is what a clean-up by hand may reach in a small registry.
func Guard(tags, regressions int) bool { return regressions > max(20, tags/100) }

const (
	// maxFlips is how often within flipTime a tag may go back and forth between two regions. People who roll a release back
	// and forth do it less often; a forgotten copier does it for ever.
	maxFlips = 5
	flipTime = time.Hour
)

// Flips reports whether a tag goes back and forth between two digests, each pushed in a region of its own, so often that
// something else must be copying it: then applying the head only makes the other side push again.
func Flips(record ledger.Record, now time.Time) bool {
	versions := make([]ledger.Past, 0, maxFlips+2)
	versions = append(versions, ledger.Past{Digest: record.Head.Digest, Origin: record.Head.Origin, Latest: record.Head.Latest().UnixMilli()})
	versions = append(versions, record.History[:min(len(record.History), maxFlips+1)]...)
	if len(versions) < maxFlips+2 || versions[maxFlips].Latest < now.Add(-flipTime).UnixMilli() {
		return false
	}
	for i, v := range versions {
		if other := versions[(i+1)%2]; v.Digest == ledger.Absent || v.Digest != versions[i%2].Digest || v.Origin != versions[i%2].Origin ||
			v.Digest == other.Digest || v.Origin == other.Origin {
			return false
		}
	}
	return true
}

// Expire returns the record of a conflict tag that has been kept long enough: a tombstone, due everywhere.
func Expire(record ledger.Record, fleet Fleet, now time.Time) ledger.Record {
	next := advance(record, fleet, Replica{}, ledger.Absent, now)
	return normalise(next, fleet)
}

func withApplied(record ledger.Record, at Replica, sequence uint64) ledger.Record {
	if at.Incarnation == "" {
		return record
	}
	if record.Applied == nil {
		record.Applied = make(map[string]uint64, 1)
	}
	record.Applied[at.Incarnation] = sequence
	return record
}

// arrived returns the record with its head applied at the replica.
func arrived(record ledger.Record, at Replica, now time.Time) ledger.Record {
	if s, known := Sequence(record, at); at.Region != record.Head.Origin && (!known || s != record.Head.Sequence) {
		record.Head.Copied = now
	}
	return withApplied(record, at, record.Head.Sequence)
}

// landed returns the record without the intent of a write that is known to have been carried out.
func landed(record ledger.Record, writeID string) ledger.Record {
	next := record.Clone()
	if writeID != "" {
		next.Intents = slices.DeleteFunc(next.Intents, func(i ledger.Intent) bool { return i.WriteID == writeID })
	}
	return next
}

func outcome(v Verdict, before, after ledger.Record, fleet Fleet) Outcome {
	after = normalise(after, fleet)
	return Outcome{Verdict: v, Record: after, Changed: !equal(before, after)}
}

// normalise drops what a record need not say: entries of replicas that are no more, entries that say what the phase
// says anyway, refusals of what was applied after all, and history that nobody refers to.
func normalise(record ledger.Record, fleet Fleet) ledger.Record {
	member := func(incarnation string) (Replica, bool) {
		for _, r := range fleet {
			if r.Incarnation == incarnation {
				return r, true
			}
		}
		return Replica{}, false
	}
	for incarnation, s := range record.Applied {
		r, ok := member(incarnation)
		if !ok || r.Baselined && s == record.Head.Sequence {
			delete(record.Applied, incarnation)
		}
	}
	record.Intents = slices.DeleteFunc(record.Intents, func(i ledger.Intent) bool { _, ok := member(i.Incarnation); return !ok })
	for incarnation := range record.Refused {
		if r, ok := member(incarnation); !ok || !Due(record, r) {
			delete(record.Refused, incarnation)
		}
	}
	if len(record.Applied) == 0 {
		record.Applied = nil
	}
	if len(record.Refused) == 0 {
		record.Refused = nil
	}
	if len(record.Intents) == 0 {
		record.Intents = nil
	}
	if len(record.History) > ledger.MaxHistory {
		kept := slices.Clone(record.History[:ledger.MaxHistory])
		for _, p := range record.History[ledger.MaxHistory:] {
			needed := slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool { return i.Sequence == p.Sequence })
			for _, s := range record.Applied {
				needed = needed || s == p.Sequence
			}
			if needed {
				kept = append(kept, p)
			}
		}
		record.History = kept
	}
	return record
}

func equal(a, b ledger.Record) bool {
	if a.Head != b.Head || a.ConflictOf != b.ConflictOf || len(a.Applied) != len(b.Applied) {
		return false
	}
	for k, v := range a.Applied {
		if w, ok := b.Applied[k]; !ok || w != v {
			return false
		}
	}
	return slices.Equal(a.History, b.History) && slices.Equal(a.Intents, b.Intents) && maps.Equal(a.Refused, b.Refused)
}

// maxTag is the longest tag that the OCI distribution specification allows.
const maxTag = 128

// ConflictTag is the n-th name under which a version of tag that was lost in region is kept.
func ConflictTag(tag, region string, n int) string {
	suffix := ".conflict-" + region + "-" + strconv.Itoa(n)
	if room := maxTag - len(suffix); len(tag) > room {
		tag = tag[:max(room, 0)]
	}
	return tag + suffix
}
