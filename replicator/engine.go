package replicator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
)

// Remote is what the engine asks of one replica: the OCI distribution API, cut down to what replication needs. A digest
// that is ledger.Absent says that there is nothing. Implementations are safe for concurrent use.
type Remote interface {
	// Ping fails unless there is a registry at the endpoint that these credentials may use: what it says is absent is.
	Ping(ctx context.Context) error
	// Head returns what is under a tag, or the digest itself if that manifest is there.
	Head(ctx context.Context, repository, reference string) (digest string, err error)
	// Repositories lists what the registry is willing to list; ErrUnsupported if it has no catalog.
	Repositories(ctx context.Context) ([]string, error)
	// Tags lists the tags of a repository, and reports whether the registry shows that repository at all: one that it does
	// not show may be gone, or hidden from these credentials.
	Tags(ctx context.Context, repository string) (tags []string, shown bool, err error)
	// Bring makes the manifest and everything that it needs present, from the first of the sources that has it, without
	// touching a tag. ErrGone: none of the sources has it. *SourcesRestError: all that may have it want to be left alone.
	Bring(ctx context.Context, repository, digest string, sources []Remote) (Transfer, error)
	// Tag points a tag at a manifest that is there already.
	Tag(ctx context.Context, repository, tag, digest, writeID string) error
	// Untag removes a tag and nothing else. Where that takes a throw-away manifest under the tag, declare is called with
	// its digest before it is put there, and its error ends Untag.
	Untag(ctx context.Context, repository, tag, writeID string, declare func(digest string) error) error
	// Delete removes a manifest, and the tags that point to it.
	Delete(ctx context.Context, repository, digest, writeID string) error
	// Names returns the digests that a manifest names: the children of an index, those of indexes in it, and its subject.
	Names(ctx context.Context, repository, digest string) ([]string, error)
	// Blobs returns the sizes in bytes of the blobs that a manifest leads to, its children's included.
	Blobs(ctx context.Context, repository, digest string) (map[string]int64, error)
	// Referrers returns the digests of the manifests whose subject is digest, as far as the registry has an API for it.
	Referrers(ctx context.Context, repository, digest string) ([]string, error)
}

// Transfer counts what a copy cost.
type Transfer struct {
	// BytesRead were read from sources, BytesWritten were sent to the target.
	BytesRead, BytesWritten int64
	// Uploaded, Mounted and Present count blobs by the way they came to be there.
	Uploaded, Mounted, Present int
}

var (
	// ErrUnsupported says that the registry does not have that part of the API, or has it switched off.
	ErrUnsupported = errors.New("not supported by this registry")
	// ErrGone says that a manifest or blob is in none of the replicas it could have come from.
	ErrGone = errors.New("no replica has it any more")
	// errUnreadable says that the replicas that have it cannot give it: it is damaged there, or refused.
	errUnreadable = errors.New("no replica gives it")
	// ErrRefused says that the registry answered a request with a plain no, and did not carry it out.
	ErrRefused = errors.New("refused by the registry")

	// errAgain says that the world changed meanwhile: look at it again.
	errAgain = errors.New("changed meanwhile")
	// errPush says that somebody pushed to the tag that was about to be written.
	errPush = errors.New("pushed to meanwhile")
	// errRegressed says that the replica shows less, or older, than it had: the guard of the next scan decides.
	errRegressed = errors.New("the replica shows an older version than it had, and no event tells of it: the next scan decides")
	// errNotAllAsked says that none of the replicas that can be asked has it, or gives it; but those are not all.
	errNotAllAsked = errors.New("not all replicas can be asked at the moment")
	// errLease says that the lease does not last long enough for a write.
	errLease = errors.New("the lease is about to end")
)

// NotReplicableError says that something can never be applied to a replica, and why.
type NotReplicableError struct{ Reason string }

func (e *NotReplicableError) Error() string { return "not replicable: " + e.Reason }

// UnavailableError says that a replica as a whole cannot be used at the moment: a state of the replica, not a failure of
// the image.
type UnavailableError struct {
	// RetryAfter is how long the replica asked to be left alone; zero if it did not say.
	RetryAfter time.Duration
	// Faulty says that the replica answers, and failed at this one request: what it holds there may be damaged.
	Faulty bool
	// Undone says that the request was certainly not carried out: it was answered with a no, or not sent.
	Undone bool
	// Unsent says that the replica was not asked, because it had asked to be left alone.
	Unsent bool
	Err    error
}

func (e *UnavailableError) Error() string { return e.Err.Error() }
func (e *UnavailableError) Unwrap() error { return e.Err }

// SourcesRestError says that all replicas which could give some content want to be left alone: their state, neither that of the replica that it is for,
// nor a failure of the image.
type SourcesRestError struct {
	// RetryAfter is how long it takes until the first of them may be asked again; zero: that time has come meanwhile.
	RetryAfter time.Duration
	Err        error
}

func (e *SourcesRestError) Error() string { return e.Err.Error() }
func (e *SourcesRestError) Unwrap() error { return e.Err }

// retryAfter is how long the replica that refused asked to be left alone; zero if it did not.
func retryAfter(err error) time.Duration {
	var unavailable *UnavailableError
	if errors.As(err, &unavailable) {
		return unavailable.RetryAfter
	}
	return 0
}

// unsent reports whether the replica was not asked, because it had asked to be left alone.
func unsent(err error) bool {
	var unavailable *UnavailableError
	return errors.As(err, &unavailable) && unavailable.Unsent
}

// writeTime is the longest that a single write to a tag may take. A write starts only while the lease lasts longer.
const writeTime = 5 * time.Second

// member is one replica as the engine sees it at one moment.
type member struct {
	version.Replica
	Remote
	// sources are the other members, the nearest first.
	sources []*member
	// remaining is how long this process still holds the lease for writes to the replica.
	remaining func() time.Duration
}

// fleet is all members of a registry at one moment. Immutable.
type fleet struct {
	// generation is that of which all are known.
	generation ledger.Generation
	members    []*member
	// replicas are the members, and those of which nothing can be asked at the moment.
	replicas version.Fleet
	// unasked are the regions in which there is nobody to ask.
	unasked []string
}

func newFleet(generation ledger.Generation, members []*member, absent ...version.Replica) *fleet {
	f := &fleet{generation: generation, members: members, replicas: slices.Clone(absent)}
	for _, m := range members {
		f.replicas = append(f.replicas, m.Replica)
	}
	for _, r := range absent {
		// Where something else stands by now, that is asked.
		if !slices.ContainsFunc(members, func(m *member) bool { return m.Region == r.Region }) {
			f.unasked = append(f.unasked, r.Region)
		}
	}
	return f
}

// member returns the member of an incarnation, or nil.
func (f *fleet) member(incarnation string) *member {
	for _, m := range f.members {
		if m.Incarnation == incarnation {
			return m
		}
	}
	return nil
}

// notAllAsked is what not to find something means while there are regions in which nobody can be asked: it is not gone, and nobody may
// give it up.
func (f *fleet) notAllAsked(err error) error {
	return fmt.Errorf("%w: not %s; elsewhere: %v", errNotAllAsked, strings.Join(f.unasked, ", "), err)
}

// present returns the fleet as it is now, the member m as that knows it, and the record of a key, read after it; errAgain if m is none any
// more: then records say nothing of it, and their silence would be taken for consent. What is decided of them is stored with that fleet:
// see engine.set.
func (e *engine) present(ctx context.Context, m *member, key ledger.Key) (*fleet, *member, ledger.Row, error) {
	f := e.fleet()
	known := f.member(m.Incarnation)
	if known == nil {
		return nil, nil, ledger.Row{}, errAgain
	}
	m = &member{Replica: known.Replica, Remote: m.Remote, sources: known.sources, remaining: m.remaining}
	row, err := e.get(ctx, key)
	return f, m, row, err
}

// engine observes and applies, one step at a time: each method runs to its end in the caller's goroutine and keeps nothing in memory
// that a crash would lose. It is the part of the replicator that the simulation drives.
type engine struct {
	registry string
	ledger   ledger.Ledger
	fleet    func() *fleet
	// learn makes the fleet anew from what is known now, after the ledger refused what an older one decided.
	learn   func(context.Context) error
	now     func() time.Time
	writeID func() string
	rules   rules
	log     *zap.Logger
	decided func(region string, key ledger.Key, v version.Verdict)

	mu sync.Mutex
	// suspects are, by incarnation, the tags that the last scan found missing.
	suspects map[string]map[ledger.Key]suspect
}

// rules are the registry's policies, as the engine needs them.
type rules struct {
	version.Policy
	// guard says whether so many regressions in one scan of so many tags are too many to be believed: version.Guard.
	guard func(tags, regressions int) bool
	// keepConflicts keeps losers under a tag of their own.
	keepConflicts bool
	// untagged copies manifests that no tag leads to.
	untagged bool
	// patience is how long a scan leaves a push that it meets to the event that should tell of it; zero: no events come.
	patience time.Duration
	// listing is how often a scan that takes longer lists anew; zero: never.
	listing time.Duration
	// deleteConfirmation is how far two scans must be apart that find a tag missing, for that to be a delete.
	deleteConfirmation time.Duration
}

// suspect is a tag that a scan found missing.
type suspect struct {
	// sequence is the version that was missing: another one is another matter.
	sequence uint64
	since    time.Time
}

// evidence is what led to an observation.
type evidence struct {
	// pushes are the pushes that events told of, the oldest first.
	pushes []push
	// deletedAt is when, by an event received at deleteHeard, there was a delete that was not ours; zero: none told of one.
	deletedAt, deleteHeard time.Time
	// erased is the write id of a delete of our own that an event told of; empty: none did.
	erased string
	// since is when the key was looked at before: the date of a push that no event told of.
	since time.Time
	// guarded says that a scan found it, and that the guard lets it pass: an older version that no event told of is believed.
	guarded bool
	// confirmed says that an absence is to be believed: two scans found it, or an operator vouched for it.
	confirmed bool
	// lost says that the key's record was lost: what the replicas hold is all that is known of it.
	lost bool
}

// clockError is how far the corrected clocks of two registries may be apart before an event is taken for an older one.
const clockError = time.Minute

// deletes reports whether a delete event is about what the record says: one that is older than the head, or than its copy in the
// replica, is about what was there before. Should the tag be absent all the same, that takes two scans to be believed. A manifest
// that is absent is not looked at again, and is always the same: there a copy that came later to whichever replica says nothing.
func (ev evidence) deletes(key ledger.Key, record ledger.Record, at version.Replica) bool {
	begin := record.Head.Time.Add(-clockError)
	if record.Head.Origin == at.Region { // by one clock, and seen there by then
		begin = record.Head.Latest().Add(-clockJitter)
	}
	return !ev.deletedAt.IsZero() && !ev.deletedAt.Before(begin) &&
		(key.Kind == ledger.Manifest || !version.Copied(record, at, ev.deletedAt.Add(clockJitter/2)))
}

// clockJitter is how far two corrected times of one registry may be apart from what its own clock said: until many answers
// have come, an offset is known to half a second.
const clockJitter = time.Second

// tells reports whether an event accounts for what a replica shows. The event of an old version's own push does not
// account for that version being there again (rule 6): the replica may have been restored.
func (ev evidence) tells(key ledger.Key, record ledger.Record, at version.Replica, digest string) bool {
	if digest == ledger.Absent {
		return ev.deletes(key, record, at) || ev.erased != ""
	}
	return slices.ContainsFunc(ev.pushes, func(p push) bool {
		return p.Digest == digest && (p.WriteID != "" || !p.late(record, at))
	})
}

// late reports whether the event is that of an earlier version's own push: rule 6. Of a head that the same registry showed and
// nothing dates, all that was pushed there before it was seen is earlier.
func (p push) late(record ledger.Record, at version.Replica) bool {
	head := record.Head.Time
	if record.Head.Origin == at.Region {
		head = record.Head.Latest()
	}
	return p.Digest != record.Head.Digest && version.Knows(record, p.Digest) && !p.Time.After(head)
}

// early is how long an event may run ahead of what it tells: CNCF distribution sends the event of a push when the manifest is
// stored, and sets the tag afterwards.
const early = 2 * time.Second

// tooEarly reports whether an event that was received then may tell of what the replica does not show yet, so that it should be
// looked at again.
func (e *engine) tooEarly(heard time.Time) bool { return !heard.IsZero() && e.now().Sub(heard) < early }

type push struct {
	version.Event
	// heard is when the event was received.
	heard time.Time
	// byOther says that the event names a writer, and that it was not Portolan.
	byOther bool
}

// get reads a record; one that does not exist is the zero record at revision zero.
func (e *engine) get(ctx context.Context, key ledger.Key) (ledger.Row, error) {
	row, err := e.ledger.Get(ctx, key)
	if errors.Is(err, ledger.ErrNotFound) {
		return ledger.Row{Key: key}, nil
	}
	return row, err
}

// attempts bounds how often a step is decided anew because its record changed meanwhile; whoever asked for it asks again.
const attempts = 16

// set stores what was decided of a record at a revision, for all members of the fleet f; nil drops it. ErrConflict says that the
// record changed meanwhile, or the fleet did: it is to be decided anew.
func (e *engine) set(ctx context.Context, f *fleet, key ledger.Key, record *ledger.Record, revision uint64) error {
	_, err := e.ledger.CompareAndSet(ctx, f.generation, key, record, revision)
	if !errors.Is(err, ledger.ErrGeneration) {
		return err
	}
	if err := e.learn(ctx); err != nil {
		return err
	}
	return ledger.ErrConflict
}

// update stores what change makes of a record, for the fleet that it is given, again and again until nobody was in between. change
// returns false when there is nothing to store.
func (e *engine) update(ctx context.Context, key ledger.Key, change func(version.Fleet, ledger.Record) (ledger.Record, bool)) error {
	for range attempts {
		f := e.fleet()
		row, err := e.get(ctx, key)
		if err != nil {
			return err
		}
		next, changed := change(f.replicas, row.Record)
		if !changed {
			return nil
		}
		if err := e.set(ctx, f, key, &next, row.Revision); !errors.Is(err, ledger.ErrConflict) {
			return err
		}
	}
	return fmt.Errorf("storing %s: %w", key, errAgain)
}

// observe looks at a key of a member, decides what that means and stores it. The record is read before the replica is
// asked: a write of our own that comes between changes the record, and the decision is made anew. What looks like a wiped
// or restored replica is left to the guard: Suspect.
func (e *engine) observe(ctx context.Context, m *member, key ledger.Key, ev evidence) (version.Verdict, error) {
	for range attempts {
		f, m, row, err := e.present(ctx, m, key)
		if err != nil {
			return 0, err
		}
		if ev.echo(row.Record, m.Replica) {
			return version.Applied, nil
		}
		asked := e.now()
		digest, err := m.Head(ctx, key.Repository, key.Reference)
		if err != nil {
			return 0, err
		}
		out := version.Outcome{Verdict: version.Suspect, Record: row.Record}
		if ev.guarded || ev.confirmed || ev.tells(key, row.Record, m.Replica, digest) || !e.regresses(m, key, row.Record, digest) {
			o, err := e.observation(ctx, m, key, row.Record, digest, asked, ev)
			if err != nil {
				return 0, err
			}
			out = version.Observe(row.Record, f.replicas, m.Replica, e.rules.Policy, o)
			out.Record, err = e.store(ctx, f, row, out)
			if errors.Is(err, ledger.ErrConflict) {
				continue
			}
			if err != nil {
				return 0, err
			}
		}
		e.decided(m.Region, key, out.Verdict)
		if ev.deletes(key, out.Record, m.Replica) && digest != ledger.Absent && !ev.tells(key, row.Record, m.Replica, digest) && e.tooEarly(ev.deleteHeard) {
			return out.Verdict, errAgain
		}
		if err := e.observeOverwritten(ctx, m, key, out.Record, out.Verdict, digest, ev); err != nil {
			return 0, err
		}
		return out.Verdict, nil
	}
	return 0, fmt.Errorf("deciding %s in %s: %w", key, m.Region, errAgain)
}

// regresses reports whether what a member shows is for the guard of the next scan: version.Regress. Scans look at no manifests, so
// that nothing would ever decide about one.
func (e *engine) regresses(m *member, key ledger.Key, record ledger.Record, digest string) bool {
	return key.Kind == ledger.Tag && version.Regress(record, m.Replica, digest, e.now())
}

// echo reports whether events tell of nothing but writes of our own whose outcome is in the record already: no need to
// look.
func (ev evidence) echo(record ledger.Record, at version.Replica) bool {
	if len(ev.pushes) == 0 || !ev.deletedAt.IsZero() || ev.erased != "" || ev.guarded || ev.confirmed {
		return false
	}
	s, known := version.Sequence(record, at)
	never := record.Head.Sequence == 0 // the manifest came with a tag, and has no record of its own
	return (never || known && s == record.Head.Sequence) && !slices.ContainsFunc(ev.pushes, func(p push) bool {
		return p.WriteID == "" || !never && p.Digest != record.Head.Digest ||
			slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool { return i.WriteID == p.WriteID })
	})
}

// observation dates what HEAD gave and adds what events told of it.
func (e *engine) observation(ctx context.Context, m *member, key ledger.Key, record ledger.Record, digest string, asked time.Time, ev evidence) (version.Observation, error) {
	o := version.Observation{Digest: digest, Now: asked, Time: ev.since, Undated: true, Confirmed: ev.confirmed}
	if ev.deletes(key, record, m.Replica) {
		o.Confirmed = true
		if key.Kind == ledger.Manifest {
			o.Deleted = key.Reference
		}
		if digest == ledger.Absent {
			o.Time, o.Undated = ev.deletedAt, false
		}
	} else if digest == ledger.Absent {
		var err error
		if o.WriteID, err = e.erasure(ctx, m, key, record, ev); err != nil {
			return o, err
		}
	}
	if o.Time.IsZero() {
		o.Time = asked
	}
	for _, p := range ev.pushes {
		if p.Digest == digest && (p.WriteID != "" || !p.late(record, m.Replica)) {
			o.Time, o.Undated, o.WriteID, o.ByOther = p.Time, false, p.WriteID, p.byOther
		}
	}
	o.Held = key.Kind == ledger.Manifest && o.Undated && !ev.lost
	return o, nil
}

// erasure returns the write id of a delete of our own that may be why a key is absent; empty if there was none. A delete
// by digest takes the tags with it, those too that came to point to the digest after it was found to be named by nothing.
func (e *engine) erasure(ctx context.Context, m *member, key ledger.Key, record ledger.Record, ev evidence) (string, error) {
	if ev.erased != "" || key.Kind != ledger.Tag {
		return ev.erased, nil
	}
	had := version.Has(record, m.Replica)
	if had == ledger.Absent {
		return "", nil
	}
	row, err := e.get(ctx, ledger.Key{Registry: key.Registry, Repository: key.Repository, Kind: ledger.Manifest, Reference: had})
	if err != nil {
		return "", err
	}
	for _, i := range row.Record.Intents {
		if i.Incarnation == m.Incarnation && i.Digest == ledger.Absent && e.now().Sub(i.Since) < version.IntentLifetime {
			return i.WriteID, nil
		}
	}
	return "", nil
}

// store writes an outcome: first what must not be lost with it, then the record.
func (e *engine) store(ctx context.Context, f *fleet, row ledger.Row, out version.Outcome) (ledger.Record, error) {
	var kept bool
	if out.Lost != nil {
		var err error
		if kept, err = e.keep(ctx, row.Key, *out.Lost); err != nil {
			return ledger.Record{}, fmt.Errorf("keeping the version of %s that was lost in %s: %w", row.Key, out.Lost.Region, err)
		}
	}
	if out.Joins != "" && row.Key.Kind == ledger.Tag {
		// What the tag had, those hold who had it. What the record's silence means depends on who was there when it was read: f, not
		// the fleet of later.
		err := e.join(ctx, row.Key, row.Record.Head, func(r version.Replica) bool {
			return slices.Contains(f.replicas, r) && !version.Due(row.Record, r)
		})
		if err != nil {
			return ledger.Record{}, err
		}
	}
	if !out.Changed {
		return row.Record, nil
	}
	if err := e.set(ctx, f, row.Key, &out.Record, row.Revision); err != nil {
		return ledger.Record{}, err
	}
	if out.Lost != nil { // told of here, because whoever loses a race for the record decides anew
		e.log.Warn("two regions pushed to one tag without knowing of each other; one version lost", zap.String("image", row.Key.String()),
			zap.String("region", out.Lost.Region), zap.String("digest", out.Lost.Digest), zap.Bool("kept", kept))
	}
	return out.Record, nil
}

// observeOverwritten accounts for the events whose digest is no longer under the tag.
func (e *engine) observeOverwritten(ctx context.Context, m *member, key ledger.Key, record ledger.Record, verdict version.Verdict, digest string, ev evidence) error {
	pushedHere := verdict == version.Successor || verdict == version.ConcurrentWon || verdict == version.ConcurrentLost
	for _, p := range ev.pushes {
		if p.Digest == digest || key.Kind != ledger.Tag {
			continue
		}
		if p.WriteID == "" && !version.Knows(record, p.Digest) && e.tooEarly(p.heard) {
			return errAgain
		}
		by := version.Users
		if !pushedHere && record.Head.Sequence > 0 && !ev.deletedAt.After(p.Time) && !version.Overtaken(record, m.Region, p.Time.Add(clockJitter/2)) {
			by = overwriter(record, m.Replica, digest, p)
		}
		there, err := m.Head(ctx, key.Repository, p.Digest)
		if err != nil && !p.heard.IsZero() && e.now().Sub(p.heard) > unreadableTime {
			e.log.Warn("a push was overwritten before it was seen, and its manifest cannot be read", zap.String("image", key.String()),
				zap.String("region", m.Region), zap.String("digest", p.Digest), zap.Error(err))
			there, err = ledger.Absent, nil
		}
		if err != nil {
			return err
		}
		for i := range attempts {
			f, m, row, err := e.present(ctx, m, key)
			if err != nil {
				return err
			}
			if row.Record.Head.Sequence != record.Head.Sequence {
				return errAgain // what stands there, and who put it there, is to be found out anew
			}
			out := version.ObserveOverwritten(row.Record, f.replicas, m.Replica, p.Event, by, there == p.Digest)
			if out.Joins != "" {
				// Only this replica is known to hold it.
				pushed := ledger.Version{Digest: out.Joins, Origin: m.Region, Time: p.Time}
				if err := e.join(ctx, key, pushed, func(r version.Replica) bool { return r.Incarnation == m.Incarnation }); err != nil {
					return err
				}
				out.Joins = ""
			} else if by != version.Users && there != p.Digest && out.Verdict == version.Superseded {
				e.log.Warn("a push was overwritten by a copy before it was seen, and its manifest is gone",
					zap.String("image", key.String()), zap.String("region", m.Region), zap.String("digest", p.Digest))
			}
			next, err := e.store(ctx, f, row, out)
			if errors.Is(err, ledger.ErrConflict) && i < attempts-1 {
				continue
			}
			if err != nil {
				return err
			}
			record = next
			e.decided(m.Region, key, out.Verdict)
			break
		}
	}
	return nil
}

// overwriter tells whether what stands where p was pushed is a write of ours, or a later act of the same registry's users.
func overwriter(record ledger.Record, at version.Replica, digest string, p push) version.Overwriter {
	if digest != record.Head.Digest {
		if slices.ContainsFunc(record.Intents, func(i ledger.Intent) bool { return i.Incarnation == at.Incarnation && i.Digest == digest }) {
			return version.Copy
		}
		if digest == ledger.Absent {
			// Nobody knows who took away what was there before.
			if origin, _ := version.Origin(record, version.Has(record, at)); origin != "" && origin != at.Region {
				return version.Copy
			}
			return version.Unsure
		}
	}
	// A version that came from elsewhere came by a copy; one of the same region is its users', unless it is older than this
	// push: then a copy brought it back. What is no version at all was not put by us.
	switch origin, latest := version.Origin(record, digest); {
	case origin == "":
		return version.Users
	case origin != at.Region || p.Time.After(latest.Add(clockJitter)):
		return version.Copy
	case p.Time.After(latest):
		return version.Unsure
	default:
		return version.Users
	}
}

// unreadableTime is how long what is asked for by its name may fail to be read, in a registry that answers: then a manifest that no tag
// leads to any more counts as gone, and a tag as damaged.
const unreadableTime = 10 * time.Minute

// maxConflicts bounds how many lost versions of one tag and region are kept under names of their own, within their retention.
const maxConflicts = 1000

// keep gives a lost version a tag of its own, unless it has one, and reports whether it has: not if the policy is against it, nor where
// so many are kept already that something is at war over the tag. It is safe to be repeated.
func (e *engine) keep(ctx context.Context, key ledger.Key, lost version.Lost) (bool, error) {
	if key.Kind != ledger.Tag || !e.rules.keepConflicts {
		return false, nil
	}
	for n := 1; n <= maxConflicts; n++ {
		aside := key
		aside.Reference = version.ConflictTag(key.Reference, lost.Region, n)
		f := e.fleet()
		row, err := e.get(ctx, aside)
		if err != nil {
			return false, err
		}
		if row.Revision != 0 {
			if row.Record.Head.Digest == lost.Digest {
				return true, nil
			}
			continue
		}
		record := version.Keep(f.replicas, lost, key.Reference, e.now())
		if err := e.set(ctx, f, aside, &record, 0); errors.Is(err, ledger.ErrConflict) {
			n--
			continue
		} else if err != nil {
			return false, err
		}
		return true, nil
	}
	return false, nil
}

// join makes what was pushed a member of the repository's set of manifests, where the policy wants those replicated.
func (e *engine) join(ctx context.Context, key ledger.Key, pushed ledger.Version, has func(version.Replica) bool) error {
	if !e.rules.untagged || pushed.Digest == ledger.Absent {
		return nil
	}
	key.Kind, key.Reference = ledger.Manifest, pushed.Digest
	return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
		return version.Join(r, f, pushed, has)
	})
}

// apply brings a member's content under key to the record's head, if it is not there. errAgain and errPush say that it has to be
// looked at anew. patient leaves a push that is found on the way to the event that should tell of it; since dates it if none
// does.
func (e *engine) apply(ctx context.Context, m *member, key ledger.Key, since time.Time, patient bool) (Transfer, error) {
	var cost Transfer
	f, m, row, err := e.present(ctx, m, key)
	if err != nil {
		return cost, err
	}
	if row.Revision == 0 || !version.Due(row.Record, m.Replica) {
		return cost, nil
	}
	shown, err := m.Head(ctx, key.Repository, key.Reference)
	if err != nil {
		if key.Kind == ledger.Tag || row.Record.Head.Tombstone() || !faulty(err) {
			return cost, err
		}
		// What is damaged there is written again: a manifest is what its digest says.
		return e.carry(ctx, f, m, row, unreadable, version.Outcome{})
	}
	if shown != ledger.Absent && e.regresses(m, key, row.Record, shown) {
		return cost, errRegressed
	}
	out := version.Observe(row.Record, f.replicas, m.Replica, e.rules.Policy,
		version.Observation{Digest: shown, Now: e.now(), Time: row.Record.Head.Time, Held: key.Kind == ledger.Manifest})
	switch {
	case out.Verdict == version.Applied:
		_, err := e.store(ctx, f, row, out)
		return cost, again(err)
	case out.Verdict == version.Successor, out.Verdict == version.ConcurrentWon, out.Verdict == version.ConcurrentLost:
		// A push that nobody told of yet. Its event dates it best.
		if patient {
			return cost, errPush
		}
		_, err := e.observe(ctx, m, key, evidence{since: since})
		return cost, errors.Join(errAgain, err)
	case out.Verdict == version.Known && patient && row.Record.Head.Tombstone() && key.Kind == ledger.Manifest && shown != ledger.Absent:
		// By a copy of ours that nobody accounted for; or by a push whose event is still to come.
		return cost, errPush
	}
	return e.carry(ctx, f, m, row, shown, out)
}

// unreadable stands for what a replica shows where it fails to read what it has stored.
const unreadable = "unreadable"

// faulty reports whether a replica answers, and failed at that one request: a registry that is killed amid a write may fail at what
// it was writing until that is written again (distribution.Faulty).
func faulty(err error) bool {
	var unavailable *UnavailableError
	return errors.As(err, &unavailable) && unavailable.Faulty
}

// undone reports whether a write that failed was certainly not carried out, and will not be later.
func undone(err error) bool {
	var unavailable *UnavailableError
	return errors.Is(err, ErrRefused) || errors.Is(err, ErrUnsupported) || errors.Is(err, errAgain) || errors.As(err, &unavailable) && unavailable.Undone
}

// rewrite carries the head of a tag to a member that has failed to read the tag for long, while it read others: only if a write of ours was
// under way to it, for then that is what was cut short. Without such a write the error of the reading is returned: what it was is not known.
func (e *engine) rewrite(ctx context.Context, m *member, key ledger.Key, reading error) error {
	f, m, row, err := e.present(ctx, m, key)
	if err != nil {
		return err
	}
	// However old it is: its time did not count while the registry was away, or could not read.
	ours := slices.ContainsFunc(row.Record.Intents, func(i ledger.Intent) bool { return i.Incarnation == m.Incarnation })
	if key.Kind != ledger.Tag || !ours || !faulty(reading) {
		return reading
	}
	_, err = e.carry(ctx, f, m, row, unreadable, version.Outcome{})
	return err
}

// carry carries the head of a record to a member, which showed something else; out is what was made of that.
func (e *engine) carry(ctx context.Context, f *fleet, m *member, row ledger.Row, shown string, out version.Outcome) (Transfer, error) {
	var cost Transfer
	key := row.Key
	if row.Record.Head.Tombstone() {
		switch {
		case key.Kind == ledger.Tag:
			return cost, e.untag(ctx, m, key, shown)
		case shown == ledger.Absent:
			return cost, e.confirmAbsent(ctx, f, m, row)
		}
		return cost, e.deleteManifest(ctx, f, m, row)
	}
	if key.Kind == ledger.Tag && version.Flips(row.Record, e.now()) {
		return cost, &NotReplicableError{Reason: fmt.Sprintf("it flips between a push in %s and one in %s: something else copies it there; end that, and push it once more",
			row.Record.Head.Origin, row.Record.History[0].Origin)}
	}
	cost, err := m.Bring(ctx, key.Repository, row.Record.Head.Digest, e.sourcesFor(m, row.Record))
	if (errors.Is(err, ErrGone) || errors.Is(err, errUnreadable)) && len(f.unasked) > 0 {
		err = f.notAllAsked(err)
	}
	if err != nil {
		if out.Changed {
			// What is known of the replica now must be in the record before it can be passed over.
			_, storing := e.store(ctx, f, row, out)
			err = errors.Join(err, again(storing))
		}
		return cost, err
	}
	if err := e.joinReferrers(ctx, m, key, row.Record); err != nil {
		return cost, err
	}
	if key.Kind == ledger.Manifest {
		err := e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
			if r.Head.Digest != row.Record.Head.Digest {
				return r, false
			}
			applied := version.Observe(r, f, m.Replica, e.rules.Policy, version.Observation{Digest: r.Head.Digest, Now: e.now()})
			return applied.Record, applied.Changed
		})
		return cost, err
	}
	return cost, e.write(ctx, m, key, row.Record.Head.Digest, shown, func(ctx context.Context, intent ledger.Intent) error {
		return m.Tag(ctx, key.Repository, key.Reference, intent.Digest, intent.WriteID)
	})
}

// maxReason bounds the reasons that stand in records, in bytes.
const maxReason = 500

// refuse stores why a version of a key can never be applied to a member, so that every process can tell whoever waits for it.
func (e *engine) refuse(ctx context.Context, m *member, key ledger.Key, sequence uint64, reason string) error {
	reason = strings.ToValidUTF8(reason[:min(len(reason), maxReason)], "")
	return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
		if r.Head.Sequence != sequence || r.Refused[m.Incarnation] == reason {
			return r, false
		}
		return version.Refuse(r, f, m.Replica, reason), true
	})
}

// refusals says, by incarnation, why what is under a key can never be applied there. A digest comes with any tag that leads to
// it, too: it is refused where all of them are.
func (e *engine) refusals(ctx context.Context, row ledger.Row) (map[string]string, error) {
	if row.Key.Kind == ledger.Tag {
		return row.Record.Refused, nil
	}
	var refused map[string]string
	found := false
	err := e.rows(ctx, row.Key.Repository, func(other ledger.Row) bool {
		switch {
		case other.Record.Head.Digest != row.Key.Reference:
			return true
		case !found:
			refused, found = maps.Clone(other.Record.Refused), true
		default:
			maps.DeleteFunc(refused, func(incarnation, _ string) bool { return other.Record.Refused[incarnation] == "" })
		}
		return len(refused) > 0
	})
	return refused, err
}

// joinReferrers makes what refers to a record's head a member of the repository's set of manifests, as far as a replica that
// has the head lists it by the referrers API. Elsewhere referrers hang on a tag, and travel as one.
func (e *engine) joinReferrers(ctx context.Context, m *member, key ledger.Key, record ledger.Record) error {
	if !e.rules.untagged {
		return nil
	}
	for _, s := range m.sources {
		if version.Due(record, s.Replica) {
			continue
		}
		referrers, err := s.Referrers(ctx, key.Repository, record.Head.Digest)
		if err != nil {
			continue // that replica's trouble is not this one's; its own scan tells
		}
		for _, digest := range referrers {
			// That it is listed does not tell when it came: after its subject. Where it was deleted since, it stays so.
			listed := ledger.Version{Digest: digest, Origin: s.Region, Time: record.Head.Time}
			err := e.join(ctx, key, listed, func(r version.Replica) bool { return r.Incarnation == s.Incarnation })
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// write puts or deletes a tag under an intent: the intent is stored, the tag read once more (somebody may have pushed), the request sent, its
// outcome stored. Whatever happens in between, the record tells the next observation that the write may be ours.
func (e *engine) write(ctx context.Context, m *member, key ledger.Key, digest, shown string, send func(context.Context, ledger.Intent) error) error {
	f, m, row, err := e.present(ctx, m, key)
	if err != nil {
		return err
	}
	if row.Record.Head.Digest != digest {
		return errAgain
	}
	if shown != unreadable {
		out := version.Observe(row.Record, f.replicas, m.Replica, e.rules.Policy, version.Observation{Digest: shown, Now: e.now(), Time: row.Record.Head.Time})
		switch out.Verdict {
		case version.Unchanged, version.Ours, version.Known, version.Suspect, version.Ignored, version.Restored:
		default:
			return errAgain
		}
	}
	if m.remaining() < writeTime {
		return fmt.Errorf("writing %s to %s: %w", key, m.Region, errLease)
	}
	// Not what was made of what it showed: that was before this record was read, and may be another write's past.
	record, intent := version.Begin(row.Record, f.replicas, m.Replica, digest, e.writeID(), e.now())
	if err := e.set(ctx, f, key, &record, row.Revision); err != nil {
		return again(err)
	}
	abandon := func() error {
		return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
			return version.Abandon(r, f, intent), true
		})
	}
	now, err := m.Head(ctx, key.Repository, key.Reference)
	if err != nil && shown == unreadable && faulty(err) {
		now, err = unreadable, nil
	}
	if err != nil {
		return errors.Join(err, abandon())
	}
	if now != shown {
		return errors.Join(errAgain, abandon())
	}
	if m.remaining() < writeTime {
		return errors.Join(errLease, abandon())
	}
	sending, cancel := context.WithTimeout(ctx, writeTime)
	err = send(sending, intent)
	cancel()
	if undone(err) {
		return errors.Join(err, abandon())
	}
	if err != nil {
		// It may have been carried out, or be so later: the intent stays.
		return err
	}
	return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
		return version.Settle(r, f, m.Replica, intent, e.now()), true
	})
}

func (e *engine) untag(ctx context.Context, m *member, key ledger.Key, shown string) error {
	return e.write(ctx, m, key, ledger.Absent, shown, func(ctx context.Context, intent ledger.Intent) error {
		var declared ledger.Intent
		err := m.Untag(ctx, key.Repository, key.Reference, intent.WriteID, func(digest string) error {
			return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
				r, declared = version.Begin(r, f, m.Replica, digest, e.writeID(), e.now())
				return r, true
			})
		})
		if err == nil && declared.WriteID != "" {
			return e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
				return version.Abandon(r, f, declared), true
			})
		}
		return err
	})
}

// confirmAbsent looks again whether a manifest that is to be deleted is gone already: a registry that does not delete can still have
// applied the delete.
func (e *engine) confirmAbsent(ctx context.Context, f *fleet, m *member, row ledger.Row) error {
	shown, err := m.Head(ctx, row.Key.Repository, row.Key.Reference)
	if err != nil {
		return err
	}
	if shown != ledger.Absent {
		return errAgain
	}
	out := version.Observe(row.Record, f.replicas, m.Replica, e.rules.Policy, version.Observation{Digest: shown, Now: e.now(), Confirmed: true})
	_, err = e.store(ctx, f, row, out)
	return again(err)
}

// deleteManifest removes a manifest whose deletion was seen elsewhere, once nothing that is alive names it. The intent is
// stored first: should the request take a tag with it that came to point there meanwhile, or be carried out late, then its
// absence is known as our own doing, and undone.
func (e *engine) deleteManifest(ctx context.Context, f *fleet, m *member, row ledger.Row) error {
	if m.remaining() < writeTime {
		return fmt.Errorf("deleting %s in %s: %w", row.Key, m.Region, errLease)
	}
	record, intent := version.Begin(row.Record, f.replicas, m.Replica, ledger.Absent, e.writeID(), e.now())
	if err := e.set(ctx, f, row.Key, &record, row.Revision); err != nil {
		return again(err)
	}
	abandon := func() error {
		return e.update(ctx, row.Key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
			return version.Abandon(r, f, intent), true
		})
	}
	by, err := e.named(ctx, m, row.Key)
	if err != nil {
		return errors.Join(err, abandon())
	}
	if m.remaining() < writeTime {
		return errors.Join(errLease, abandon())
	}
	if by == "" {
		deleting, cancel := context.WithTimeout(ctx, writeTime)
		err = m.Delete(deleting, row.Key.Repository, row.Key.Reference, intent.WriteID)
		cancel()
		if undone(err) {
			return errors.Join(err, abandon())
		}
		if err != nil {
			return err // it may have been carried out, or be so later: the intent stays
		}
	} else {
		e.log.Info("a deleted manifest stays, because something alive names it", zap.String("image", row.Key.String()),
			zap.String("region", m.Region), zap.String("named by", by))
	}
	if err := e.restore(ctx, m, row.Key, intent.WriteID); err != nil {
		return err
	}
	return e.update(ctx, row.Key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
		return version.Settle(r, f, m.Replica, intent, e.now()), true
	})
}

// restore has the tags applied again that a delete of their manifest, our own, took with it.
func (e *engine) restore(ctx context.Context, m *member, manifest ledger.Key, writeID string) error {
	var tags []ledger.Key
	err := e.rows(ctx, manifest.Repository, func(row ledger.Row) bool {
		if row.Key.Kind == ledger.Tag && row.Record.Head.Digest == manifest.Reference && !version.Due(row.Record, m.Replica) {
			tags = append(tags, row.Key)
		}
		return true
	})
	if err != nil {
		return err
	}
	for _, tag := range tags {
		if _, err := e.observe(ctx, m, tag, evidence{erased: writeID}); err != nil {
			return err
		}
	}
	return nil
}

// pageSize is how many records are read at once.
const pageSize = 500

// rows calls yield with every row of a registry, or of one repository, until it returns false.
func (e *engine) rows(ctx context.Context, repository string, yield func(ledger.Row) bool) error {
	var after ledger.Key
	for {
		page, err := e.ledger.Page(ctx, e.registry, repository, after, pageSize)
		if err != nil {
			return fmt.Errorf("reading the ledger of %s: %w", e.registry, err)
		}
		for _, row := range page {
			if !yield(row) {
				return nil
			}
		}
		if len(page) < pageSize {
			return nil
		}
		after = page[len(page)-1].Key
	}
}

// named returns what is alive and names a manifest: a tag, or an index or artifact that refers to it; empty if nothing does.
func (e *engine) named(ctx context.Context, m *member, key ledger.Key) (string, error) {
	var by string
	var parents []string
	var damage error
	err := e.rows(ctx, key.Repository, func(row ledger.Row) bool {
		switch {
		case row.Damage != nil:
			damage = fmt.Errorf("whether %s names %s is known when it is decided anew: %w", row.Key, key, row.Damage)
		case row.Record.Head.Tombstone():
		case row.Key.Kind == ledger.Tag && row.Record.Head.Digest == key.Reference:
			by = row.Key.Reference
		case !slices.Contains(parents, row.Record.Head.Digest):
			parents = append(parents, row.Record.Head.Digest)
		}
		return by == ""
	})
	if err == nil && by == "" {
		err = damage
	}
	if err != nil || by != "" {
		return by, err
	}
	for _, parent := range parents {
		names, err := m.Names(ctx, key.Repository, parent)
		if err != nil {
			return "", fmt.Errorf("looking for what names %s: %w", key, err)
		}
		if slices.Contains(names, key.Reference) {
			return parent, nil
		}
	}
	return "", nil
}

// sourcesFor returns where the head may be read: those known to have it first, each group the nearest first.
func (e *engine) sourcesFor(m *member, record ledger.Record) []Remote {
	// A conflict tag is due in its own region too, where only the manifest is known to be: hence the origin's place.
	var holders, origin, others []Remote
	for _, s := range m.sources {
		switch {
		case !version.Due(record, s.Replica):
			holders = append(holders, s.Remote)
		case s.Region == record.Head.Origin:
			origin = append(origin, s.Remote)
		default:
			others = append(others, s.Remote)
		}
	}
	return slices.Concat(holders, origin, others)
}

// again turns a lost race for a record into errAgain.
func again(err error) error {
	if errors.Is(err, ledger.ErrConflict) {
		return errAgain
	}
	return err
}

// observeManifest observes an event about a manifest in its own right.
func (e *engine) observeManifest(ctx context.Context, m *member, key ledger.Key, ev evidence) error {
	if !ev.deletedAt.IsZero() || ev.erased != "" {
		// A delete by digest takes the tags with it, and the events of those may come later or never. It may also be that of a
		// blob: only what is known to be a manifest is carried on.
		known := false
		var tags []ledger.Key
		err := e.rows(ctx, key.Repository, func(row ledger.Row) bool {
			switch {
			case row.Key == key:
				known = true
			case row.Key.Kind == ledger.Tag && row.Record.Head.Digest == key.Reference:
				known = true
				tags = append(tags, row.Key)
			case row.Key.Kind == ledger.Tag:
				known = known || slices.ContainsFunc(row.Record.History, func(p ledger.Past) bool { return p.Digest == key.Reference })
			}
			return true
		})
		if err != nil {
			return err
		}
		if !known {
			return nil
		}
		for _, tag := range tags {
			if _, err := e.observe(ctx, m, tag, evidence{deletedAt: ev.deletedAt, erased: ev.erased}); err != nil {
				return err
			}
		}
	} else if !e.rules.untagged {
		return nil
	}
	_, err := e.observe(ctx, m, key, ev)
	return err
}

// forget drops a record of which the fleet f needs nothing any more, if it is still as it was read.
func (e *engine) forget(ctx context.Context, f *fleet, row ledger.Row) error {
	return again(e.set(ctx, f, row.Key, nil, row.Revision))
}

// forgetGone drops the record of a manifest whose version of that sequence no replica has any more, and reports whether it did: not if one of them
// has the manifest, and lacks something that it needs. All are asked, since a record that is dropped is not missed by any scan.
func (e *engine) forgetGone(ctx context.Context, key ledger.Key, sequence uint64) (bool, error) {
	f := e.fleet()
	row, err := e.get(ctx, key)
	switch {
	case err != nil:
		return false, err
	case row.Record.Head.Sequence != sequence:
		return false, errAgain
	case len(f.unasked) > 0:
		return false, f.notAllAsked(ErrGone)
	}
	for _, m := range f.members {
		if digest, err := m.Head(ctx, key.Repository, key.Reference); err != nil || digest != ledger.Absent {
			return false, err
		}
	}
	return true, e.forget(ctx, f, row)
}

// purge drops every record of the registry.
func (e *engine) purge(ctx context.Context) error {
	var rows []ledger.Row
	f := e.fleet()
	err := e.rows(ctx, "", func(row ledger.Row) bool { rows = append(rows, row); return true })
	if err != nil {
		return err
	}
	for _, row := range rows {
		if err := e.forget(ctx, f, row); err != nil {
			return fmt.Errorf("forgetting %s: %w", row.Key, err)
		}
	}
	return nil
}

// retention is how long kept conflicts and applied tombstones stay.
const retention = 30 * 24 * time.Hour

// tidy ends kept conflicts that are old enough, and forgets old tombstones that every replica has applied.
func (e *engine) tidy(ctx context.Context) error {
	var expired []ledger.Key
	var done []ledger.Row
	f, limit := e.fleet(), e.now().Add(-retention)
	old := func(r ledger.Record) bool { return r.Head.Time.Before(limit) }
	err := e.rows(ctx, "", func(row ledger.Row) bool {
		head := row.Record.Head
		switch {
		case row.Damage != nil: // for mend
		case !old(row.Record):
		case !head.Tombstone() && row.Record.ConflictOf != "":
			expired = append(expired, row.Key)
		case head.Tombstone() && !slices.ContainsFunc(f.replicas, func(r version.Replica) bool { return version.Due(row.Record, r) }):
			done = append(done, row)
		}
		return true
	})
	if err != nil {
		return err
	}
	for _, key := range expired {
		err := e.update(ctx, key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
			return version.Expire(r, f, e.now()), old(r) && !r.Head.Tombstone()
		})
		if err != nil {
			return err
		}
	}
	for _, row := range done {
		if err := e.forget(ctx, f, row); err != nil && !errors.Is(err, errAgain) {
			return err
		}
	}
	return nil
}

// onlyAt returns the live versions that no replica but m has applied.
func (e *engine) onlyAt(ctx context.Context, m *member) ([]string, error) {
	var only []string
	f := e.fleet()
	err := e.rows(ctx, "", func(row ledger.Row) bool {
		elsewhere := slices.ContainsFunc(f.members, func(o *member) bool {
			return o.Incarnation != m.Incarnation && !version.Due(row.Record, o.Replica)
		})
		if !row.Record.Head.Tombstone() && !version.Due(row.Record, m.Replica) && !elsewhere {
			only = append(only, row.Key.String())
		}
		return true
	})
	return only, err
}
