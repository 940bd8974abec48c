package replicator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/topology"
)

// pace lets a scan make its next request: it waits for as long as the request budget of the host demands, and for rest at least.
type pace func(ctx context.Context, rest time.Duration) error

// survey is what one scan of a member found.
type survey struct {
	// tags counts those that the member shows or had, regressions those of them that are gone or old.
	tags, regressions int
	// guarded says that the regressions are too many to be believed; nothing was made of them.
	guarded bool
	// unread is what could not be read while the rest could: nothing was made of it.
	unread []unread
}

// unread is a tag that could not be read, or a repository that could not be listed (then the key has no reference).
type unread struct {
	key ledger.Key
	err error
}

const (
	// maxTries is how often a request of a scan is sent before it counts as failed.
	maxTries = 3
	// maxRests is how often a request of a scan is put off because the registry wants to be left alone.
	maxRests = 20
	// maxRest is how long a scan waits amid its work when a registry asks to be left alone.
	maxRest = time.Minute
	// maxFailures is how many requests in a row may fail before it is asked whether the registry still gives what it gave before;
	// maxBlind how many if it gave nothing yet, and maxUnread how many in all: tags that cannot be read must not hide all the
	// others, and a registry that is away is not asked a hundred thousand times.
	maxFailures, maxBlind, maxUnread = 3, 10, 1000
)

// scan looks at every tag of a baselined member and observes those that are not as the ledger has them. since is when the
// scan before it began. Pushes are observed on the way; what looks like deletes and rollbacks only at the end, if they are few
// enough for the guard, or if an operator is sure. With an error, the survey is not complete.
func (e *engine) scan(ctx context.Context, m *member, since time.Time, wait pace, sure bool) (survey, error) {
	l := look{engine: e, member: m, since: since, wait: wait, shown: make(map[string]bool)}
	if err := l.ping(ctx); err != nil {
		return l.survey, err
	}
	repositories, err := l.list(ctx)
	if err != nil {
		return l.survey, err
	}
	for _, repository := range repositories {
		if err := l.repository(ctx, repository); err != nil {
			return l.survey, err
		}
	}
	if err := l.judge(ctx, true); err != nil {
		return l.survey, err
	}
	if err := l.blind(); err != nil {
		return l.survey, err
	}
	// What was listed several times counts once.
	slices.SortStableFunc(l.regressed, func(a, b regression) int { return ledger.Compare(a.key, b.key) })
	l.regressed = slices.CompactFunc(l.regressed, func(a, b regression) bool { return a.key == b.key })
	l.survey.regressions = len(l.regressed)
	l.survey.guarded = !sure && len(l.regressed) > 0 && (!l.readable || l.rules.guard(l.survey.tags, len(l.regressed)))
	if l.survey.guarded {
		e.suspect(m, nil)
		return l.survey, nil
	}
	return l.survey, l.decide(ctx, sure)
}

// look is one scan under way.
type look struct {
	*engine
	member *member
	// since dates pushes that no event tells of: when the scan, or the listing, before began.
	since time.Time
	wait  pace

	survey survey
	// listed is when the last listing began, and ended when it did; shown are the repositories that the member shows.
	listed, ended time.Time
	shown         map[string]bool
	// readable says that some tag could be read.
	readable  bool
	found     []found
	regressed []regression
	// inARow is how many requests failed since one succeeded; good is a tag that was read.
	inARow int
	good   ledger.Key
}

// found is a tag that is not as the ledger has it.
type found struct {
	key       ledger.Key
	at, since time.Time
}

// regression is a tag of which the member shows less, or an older version, than it had.
type regression struct {
	key      ledger.Key
	absent   bool
	sequence uint64 // what it had
	// credible says that the member shows the repository, and all that was asked of it: the absence is not that of rights, nor
	// of disks.
	credible bool
}

// ask makes a request after rest, and again if it fails. What could not be sent, since somebody else was told meanwhile to leave the registry alone, is
// no try; but a scan does not wait for ever behind the others.
func (l *look) ask(ctx context.Context, rest time.Duration, request func() error) error {
	for tries, rests := 0, 0; ; {
		if err := l.wait(ctx, rest); err != nil {
			return err
		}
		err := request()
		if unsent(err) {
			rests++
		} else {
			tries++
		}
		asked := retryAfter(err)
		if err == nil || tries == maxTries || rests == maxRests || asked > maxRest || ctx.Err() != nil {
			return err
		}
		rest = max(asked, backoff(tries, 250*time.Millisecond, maxRest))
	}
}

// ping fails unless a registry answers. One that wants to be left alone is waited for; any other failure is told at once, since somebody may
// be waiting for a new replica, and a dead address takes its time.
func (l *look) ping(ctx context.Context) error {
	var dead error
	err := l.ask(ctx, 0, func() error {
		err := l.member.Ping(ctx)
		if err != nil && retryAfter(err) == 0 {
			dead, err = err, nil
		}
		return err
	})
	if dead != nil {
		return dead
	}
	return err
}

// pass notes that something cannot be read, and returns the error if the scan should not go on.
func (l *look) pass(ctx context.Context, key ledger.Key, err error) error {
	l.survey.unread = append(l.survey.unread, unread{key, err})
	l.inARow++
	switch {
	case len(l.survey.unread) >= maxUnread, retryAfter(err) > maxRest, outage(err), ctx.Err() != nil:
		return err
	case l.inARow < maxFailures, !l.readable && l.inARow < maxBlind:
		return nil
	case !l.readable:
		return err
	}
	// Neighbours may have one damaged manifest in common, as 1, 1.0 and 1.0.3 do.
	if waiting := l.wait(ctx, 0); waiting != nil {
		return waiting
	}
	if _, away := l.member.Head(ctx, l.good.Repository, l.good.Reference); away != nil {
		return err
	}
	l.inARow = 0
	return nil
}

// blind is the error of a look that could read nothing at all, although there is something.
func (l *look) blind() error {
	if l.readable || len(l.survey.unread) == 0 {
		return nil
	}
	return l.survey.unread[0].err
}

// tags lists the tags of a repository; ok is false if it cannot be listed.
func (l *look) tags(ctx context.Context, repository string) (tags []string, ok bool, err error) {
	err = l.ask(ctx, 0, func() error {
		listed, shown, err := l.member.Tags(ctx, repository)
		if err == nil {
			tags, l.shown[repository] = listed, l.shown[repository] || shown
		}
		return err
	})
	if err != nil {
		key := ledger.Key{Registry: l.registry, Repository: repository, Kind: ledger.Tag}
		return nil, false, l.pass(ctx, key, fmt.Errorf("listing the tags of %s in %s: %w", repository, l.member.Region, err))
	}
	l.inARow = 0
	return tags, true, nil
}

// head looks at a tag; ok is false if it cannot be read.
func (l *look) head(ctx context.Context, key ledger.Key) (digest string, ok bool, err error) {
	err = l.ask(ctx, 0, func() (err error) {
		digest, err = l.member.Head(ctx, key.Repository, key.Reference)
		return err
	})
	if err != nil {
		return "", false, l.pass(ctx, key, fmt.Errorf("looking at %s in %s: %w", key, l.member.Region, err))
	}
	l.inARow = 0
	if digest != ledger.Absent {
		l.readable, l.good, l.shown[key.Repository] = true, key, true
	}
	return digest, true, nil
}

// list lists all repositories, and looks at the tags that the ledger does not know to be there: so a push that no event told of is
// found as soon as listing takes, however long the look at all tags does. It returns the repositories.
func (l *look) list(ctx context.Context) ([]string, error) {
	since := l.since
	if !l.listed.IsZero() {
		since = l.listed
	}
	l.listed = l.now()
	var repositories []string
	err := l.ask(ctx, 0, func() (err error) {
		repositories, err = l.repositories(ctx, l.member)
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, repository := range repositories {
		tags, _, err := l.tags(ctx, repository)
		if err != nil {
			return nil, err
		}
		if len(tags) == 0 {
			continue
		}
		records, err := l.tagRecords(ctx, repository)
		if err != nil {
			return nil, err
		}
		for _, tag := range tags {
			if l.had(records[tag]) {
				continue
			}
			key := ledger.Key{Registry: l.registry, Repository: repository, Kind: ledger.Tag, Reference: tag}
			if err := l.tag(ctx, key, records[tag], since); err != nil {
				return nil, err
			}
		}
	}
	l.ended = l.now()
	return repositories, nil
}

// had reports whether the member is known to have had a version of the record.
func (l *look) had(record ledger.Record) bool {
	sequence, known := version.Sequence(record, l.member.Replica)
	return known && sequence != 0
}

// repository looks at the tags of a repository that the ledger knows to be there, whether they are listed or not.
func (l *look) repository(ctx context.Context, repository string) error {
	records, err := l.tagRecords(ctx, repository)
	if err != nil {
		return err
	}
	first := len(l.regressed)
	for _, tag := range slices.Sorted(maps.Keys(records)) {
		if !l.had(records[tag]) {
			continue
		}
		// Since the last one ended: one that takes longer than that must leave room for what it interrupts.
		if l.rules.listing > 0 && l.now().Sub(l.ended) >= l.rules.listing {
			if _, err := l.list(ctx); err != nil {
				return err
			}
		}
		key := ledger.Key{Registry: l.registry, Repository: repository, Kind: ledger.Tag, Reference: tag}
		if err := l.tag(ctx, key, records[tag], l.since); err != nil {
			return err
		}
	}
	failed := slices.ContainsFunc(l.survey.unread, func(u unread) bool { return u.key.Repository == repository })
	for i := range l.regressed[first:] {
		l.regressed[first+i].credible = l.shown[repository] && !failed
	}
	return nil
}

// tag looks at a tag and notes what is not as the ledger has it.
func (l *look) tag(ctx context.Context, key ledger.Key, record ledger.Record, since time.Time) error {
	if err := l.judge(ctx, false); err != nil {
		return err
	}
	if slices.ContainsFunc(l.survey.unread, func(u unread) bool { return u.key == key }) {
		return nil // listed anew
	}
	digest, ok, err := l.head(ctx, key)
	if err != nil || !ok {
		return err
	}
	if digest != ledger.Absent || version.Has(record, l.member.Replica) != ledger.Absent {
		l.survey.tags++ // a delete that is still remembered is no tag
	}
	switch {
	case version.Regress(record, l.member.Replica, digest, l.now()):
		sequence, _ := version.Sequence(record, l.member.Replica)
		l.regressed = append(l.regressed, regression{key: key, absent: digest == ledger.Absent, sequence: sequence})
	case l.noticeable(l.member, record, digest):
		l.found = append(l.found, found{key, l.now(), since})
	}
	return nil
}

// judge observes what was found so long ago that an event, which dates a push better than a scan can, would have told of it; with
// all, it waits for that.
func (l *look) judge(ctx context.Context, all bool) error {
	for len(l.found) > 0 {
		f := l.found[0]
		rest := f.at.Add(l.rules.patience).Sub(l.now())
		if rest > 0 && !all {
			return nil
		}
		l.found = l.found[1:]
		err := l.ask(ctx, rest, func() error {
			_, err := l.observe(ctx, l.member, f.key, evidence{since: f.since})
			return err
		})
		if err != nil {
			err = l.pass(ctx, f.key, fmt.Errorf("observing %s in %s: %w", f.key, l.member.Region, err))
		} else {
			l.inARow = 0
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// decide observes what the guard let pass. An absence takes two scans, of which the first is remembered.
func (l *look) decide(ctx context.Context, sure bool) error {
	e, m := l.engine, l.member
	e.mu.Lock()
	before := e.suspects[m.Incarnation]
	e.mu.Unlock()
	suspects := make(map[ledger.Key]suspect)
	defer func() { e.suspect(m, suspects) }()
	for _, r := range l.regressed {
		ev := evidence{since: l.since, guarded: true, confirmed: sure}
		if r.absent && !sure {
			s, ok := before[r.key]
			if !ok || s.sequence != r.sequence {
				s = suspect{r.sequence, e.now()}
			}
			suspects[r.key] = s
			ev.confirmed = r.credible && e.now().Sub(s.since) >= e.rules.deleteConfirmation
		}
		verdict, err := e.observe(ctx, m, r.key, ev)
		if err != nil {
			return fmt.Errorf("observing %s in %s: %w", r.key, m.Region, err)
		}
		if verdict != version.Suspect {
			delete(suspects, r.key)
		}
	}
	return nil
}

// suspect remembers what a scan found missing, in place of what the one before it found.
func (e *engine) suspect(m *member, missing map[ledger.Key]suspect) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for incarnation := range e.suspects {
		if incarnation == m.Incarnation || e.fleet().member(incarnation) == nil {
			delete(e.suspects, incarnation)
		}
	}
	if len(missing) > 0 {
		e.suspects[m.Incarnation] = missing
	}
}

// noticeable reports whether an observation would change anything.
func (e *engine) noticeable(m *member, record ledger.Record, digest string) bool {
	out := version.Observe(record, e.fleet().replicas, m.Replica, e.rules.Policy, version.Observation{Digest: digest, Now: e.now()})
	return out.Changed || out.Lost != nil
}

// repositories returns what the member lists, and what the ledger knows of.
func (e *engine) repositories(ctx context.Context, m *member) ([]string, error) {
	repositories, err := m.Repositories(ctx)
	if err != nil && !errors.Is(err, ErrUnsupported) {
		return nil, fmt.Errorf("listing the repositories of %s: %w", m.Region, err)
	}
	err = e.rows(ctx, "", func(row ledger.Row) bool {
		if n := len(repositories); n == 0 || repositories[n-1] != row.Key.Repository {
			repositories = append(repositories, row.Key.Repository)
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(repositories)
	return slices.Compact(repositories), nil
}

// tagRecords reads the records of all tags of a repository.
func (e *engine) tagRecords(ctx context.Context, repository string) (map[string]ledger.Record, error) {
	records := make(map[string]ledger.Record)
	err := e.rows(ctx, repository, func(row ledger.Row) bool {
		if row.Key.Kind == ledger.Tag {
			records[row.Key.Reference] = row.Record
		}
		return true
	})
	return records, err
}

// baseline is the content of a member of which nothing is known, and what merging it would mean.
type baseline struct {
	plan topology.Plan
	// differing are the tags to be observed: those only there, and those that differ.
	differing []ledger.Key
	// due are the versions that the member lacks.
	due []due
	// unread is what could not be compared: nothing is known of it.
	unread []unread
}

// due is a version of a key that a member lacks, and what it has instead.
type due struct {
	key               ledger.Key
	sequence, applied uint64
}

// maxSized bounds how many images a plan reads to tell the bytes to be copied.
const maxSized = 1000

// maxConflicting bounds the conflicts that a plan names.
const maxConflicting = 10

// compare scans a member of which nothing is known and plans the merge: without clocks, the known version before the
// member's own. It changes nothing. Whoever writes a record while it reads, or later, has to know of the member: where nothing differs,
// nothing will be written down, and silence means that the member has what the record says.
func (e *engine) compare(ctx context.Context, m *member, wait pace) (baseline, error) {
	var b baseline
	l := look{engine: e, member: m, wait: wait, shown: make(map[string]bool)}
	if err := l.ping(ctx); err != nil {
		return b, err
	}
	if err := e.ledger.Advance(ctx, e.registry); err != nil {
		return b, err
	}
	var repositories []string
	err := l.ask(ctx, 0, func() (err error) {
		repositories, err = e.repositories(ctx, m)
		return err
	})
	if err != nil {
		return b, err
	}
	blobs := make(map[string]int64)
	sized := 0
	size := func(repository, digest string) {
		if sized++; sized > maxSized {
			return
		}
		for _, s := range m.sources {
			if sizes, err := s.Blobs(ctx, repository, digest); err == nil {
				maps.Copy(blobs, sizes)
				return
			}
		}
	}
	lacks := func(row ledger.Row, applied uint64) {
		b.due = append(b.due, due{row.Key, row.Record.Head.Sequence, applied})
		if row.Key.Kind == ledger.Tag && !row.Record.Head.Tombstone() {
			b.plan.Copy++
			size(row.Key.Repository, row.Record.Head.Digest)
		}
	}
	for _, repository := range repositories {
		tags, ok, err := l.tags(ctx, repository)
		if err != nil {
			return b, err
		}
		if !ok {
			return b, l.survey.unread[len(l.survey.unread)-1].err // what differs there would go by unasked
		}
		if len(tags) > 0 {
			b.plan.Repositories++
		}
		records, err := e.tagRecords(ctx, repository)
		if err != nil {
			return b, err
		}
		there, unknown := make(map[string]bool, len(tags)), make(map[string]bool)
		for _, tag := range tags {
			key := ledger.Key{Registry: e.registry, Repository: repository, Kind: ledger.Tag, Reference: tag}
			digest, ok, err := l.head(ctx, key)
			if err != nil {
				return b, err
			}
			if !ok {
				unknown[tag] = true
				continue
			}
			if digest == ledger.Absent {
				continue // deleted since it was listed
			}
			there[tag] = true
			b.plan.Tags++
			record := records[tag]
			out := version.Observe(record, e.fleet().replicas, m.Replica, e.rules.Policy, version.Observation{Digest: digest, Now: e.now(), Undated: true})
			switch out.Verdict {
			case version.Applied:
				b.plan.Same++
			case version.Successor, version.ConcurrentWon:
				b.plan.Adopt++
				b.plan.Spread++
				b.differing = append(b.differing, key)
			case version.ConcurrentLost:
				b.plan.Conflicts++
				b.plan.Copy++
				size(repository, record.Head.Digest)
				b.differing = append(b.differing, key)
				keptAs := e.aside(records, tag, m.Region, digest)
				if keptAs != "" {
					b.plan.Spread++
				}
				if len(b.plan.Conflicting) < maxConflicting {
					b.plan.Conflicting = append(b.plan.Conflicting, topology.PlannedConflict{Repository: repository, Tag: tag,
						Winner: record.Head.Digest, WinnerRegion: record.Head.Origin, Loser: digest, LoserRegion: m.Region, KeptAs: keptAs})
				}
			default:
				applied, known := version.Sequence(out.Record, m.Replica)
				if !known {
					applied = ledger.UnknownSequence
				}
				lacks(ledger.Row{Key: key, Record: record}, applied)
			}
		}
		err = e.rows(ctx, repository, func(row ledger.Row) bool {
			live := !row.Record.Head.Tombstone()
			// Manifests are not listed: also of those that were deleted it is not known whether they are there.
			if row.Key.Kind == ledger.Manifest || live && !there[row.Key.Reference] || unknown[row.Key.Reference] {
				lacks(row, ledger.UnknownSequence)
			}
			return true
		})
		if err != nil {
			return b, err
		}
	}
	if err := l.blind(); err != nil {
		return b, err
	}
	for _, n := range blobs {
		b.plan.Bytes += n
	}
	b.unread = l.survey.unread
	return b, nil
}

// aside is the tag under which keep would keep a digest that a region loses, where records are those of the tags of the repository;
// empty if it would not be kept.
func (e *engine) aside(records map[string]ledger.Record, tag, region, digest string) string {
	for n := 1; n <= maxConflicts && e.rules.keepConflicts; n++ {
		name := version.ConflictTag(tag, region, n)
		if record, taken := records[name]; !taken || record.Head.Digest == digest {
			return name
		}
	}
	return ""
}

// adopt observes what a baseline found to differ.
func (e *engine) adopt(ctx context.Context, m *member, b baseline, wait pace) error {
	l := look{engine: e, member: m, wait: wait}
	for _, key := range b.differing {
		var verdict version.Verdict
		err := l.ask(ctx, 0, func() (err error) {
			verdict, err = e.observe(ctx, m, key, evidence{})
			return err
		})
		if err != nil {
			return fmt.Errorf("adopting %s from %s: %w", key, m.Region, err)
		}
		e.log.Debug("baseline", zap.String("image", key.String()), zap.String("region", m.Region), zap.Stringer("verdict", verdict))
	}
	return nil
}

// owe writes down what a baseline found the member to lack, so that from then on the silence of a record means that the member
// has its head.
func (e *engine) owe(ctx context.Context, m *member, d due) error {
	return e.update(ctx, d.key, func(f version.Fleet, r ledger.Record) (ledger.Record, bool) {
		return version.Owe(r, f, m.Replica, d.applied)
	})
}
