package replicator

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/topology"
)

// pace is asked before every request of a scan; it waits as long as the request budget of the host demands.
type pace func(ctx context.Context) error

// survey is what one scan of a member found.
type survey struct {
	tags        int
	regressions int
	// guarded says that the regressions are too many to be believed; nothing was made of them.
	guarded bool
}

// maxFailures is how many requests in a row may fail before a scan gives up: a tag that cannot be read must not hide all the
// others, and a registry that is away is not asked a hundred thousand times.
const maxFailures = 3

// scan looks at every tag of a baselined member and observes those that are not as the ledger has them. since is when the
// scan before it began. Pushes are observed at once; what looks like deletes and rollbacks only at the end, if nothing
// failed and they are few enough for the guard, or if an operator is sure. With an error, the survey is not complete.
func (e *engine) scan(ctx context.Context, m *member, since time.Time, wait pace, sure bool) (survey, error) {
	l := look{engine: e, member: m, since: since, wait: wait}
	if err := m.Ping(ctx); err != nil {
		return l.survey, err
	}
	repositories, err := e.repositories(ctx, m)
	if err != nil {
		return l.survey, err
	}
	for _, repository := range repositories {
		if err := l.repository(ctx, repository); err != nil {
			return l.survey, err
		}
	}
	if l.failed != nil {
		return l.survey, l.failed
	}
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
	since  time.Time
	wait   pace

	survey survey
	// readable says that some tag could be read.
	readable  bool
	regressed []regression
	// failed is the first failure, in a row how many there were since something succeeded.
	failed error
	inARow int
}

// regression is a tag of which the member shows less, or an older version, than it had.
type regression struct {
	key      ledger.Key
	absent   bool
	sequence uint64 // what it had
	// credible says that the member shows the repository: the absence is not that of rights.
	credible bool
}

// fail notes a failure, and reports whether the scan should go on.
func (l *look) fail(ctx context.Context, err error) bool {
	if l.failed == nil {
		l.failed = err
	}
	l.inARow++
	return l.inARow < maxFailures && ctx.Err() == nil
}

func (l *look) repository(ctx context.Context, repository string) error {
	m := l.member
	if err := l.wait(ctx); err != nil {
		return err
	}
	tags, shown, err := m.Tags(ctx, repository)
	if err != nil {
		err = fmt.Errorf("listing the tags of %s in %s: %w", repository, m.Region, err)
		if !l.fail(ctx, err) {
			return err
		}
		return nil
	}
	l.inARow = 0
	records, err := l.tagRecords(ctx, repository)
	if err != nil {
		return err
	}
	for tag, record := range records {
		if sequence, known := version.Sequence(record, m.Replica); known && sequence != 0 {
			tags = append(tags, tag)
		}
	}
	slices.Sort(tags)
	first := len(l.regressed)
	for _, tag := range slices.Compact(tags) {
		if err := l.wait(ctx); err != nil {
			return err
		}
		key := ledger.Key{Registry: l.registry, Repository: repository, Kind: ledger.Tag, Reference: tag}
		digest, err := m.Head(ctx, repository, tag)
		if err == nil {
			l.survey.tags++
			shown = shown || digest != ledger.Absent
			l.readable = l.readable || digest != ledger.Absent
			switch record := records[tag]; {
			case version.Regress(record, m.Replica, digest, l.now()):
				sequence, _ := version.Sequence(record, m.Replica)
				l.regressed = append(l.regressed, regression{key: key, absent: digest == ledger.Absent, sequence: sequence})
			case l.noticeable(m, record, digest):
				_, err = l.observe(ctx, m, key, evidence{since: l.since})
			}
		}
		if err != nil {
			err = fmt.Errorf("looking at %s in %s: %w", key, m.Region, err)
			if !l.fail(ctx, err) {
				return err
			}
			continue
		}
		l.inARow = 0
	}
	for i := range l.regressed[first:] {
		l.regressed[first+i].credible = shown
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
}

// due is a version of a key.
type due struct {
	key      ledger.Key
	sequence uint64
}

// maxSized bounds how many images a plan reads to tell the bytes to be copied.
const maxSized = 1000

// maxExamples bounds the conflicts that a plan names.
const maxExamples = 10

// compare scans a member of which nothing is known and plans the merge: without clocks, the known version before the
// member's own. It changes nothing.
func (e *engine) compare(ctx context.Context, m *member, wait pace) (baseline, error) {
	var b baseline
	if err := m.Ping(ctx); err != nil {
		return b, err
	}
	repositories, err := e.repositories(ctx, m)
	if err != nil {
		return b, err
	}
	blobs := make(map[string]int64)
	sized := 0
	size := func(repository, digest string, from []*member) {
		if sized++; sized > maxSized {
			return
		}
		for _, s := range from {
			if sizes, err := s.Blobs(ctx, repository, digest); err == nil {
				for blob, n := range sizes {
					blobs[blob] = n
				}
				return
			}
		}
	}
	for _, repository := range repositories {
		if err := wait(ctx); err != nil {
			return b, err
		}
		tags, _, err := m.Tags(ctx, repository)
		if err != nil {
			return b, fmt.Errorf("listing the tags of %s in %s: %w", repository, m.Region, err)
		}
		there := make(map[string]bool, len(tags))
		for _, tag := range tags {
			there[tag] = true
		}
		if len(tags) > 0 {
			b.plan.Repositories++
		}
		records, err := e.tagRecords(ctx, repository)
		if err != nil {
			return b, err
		}
		for _, tag := range tags {
			if err := wait(ctx); err != nil {
				return b, err
			}
			digest, err := m.Head(ctx, repository, tag)
			if err != nil {
				return b, fmt.Errorf("looking at %s:%s in %s: %w", repository, tag, m.Region, err)
			}
			if digest == ledger.Absent {
				there[tag] = false // deleted since it was listed
				continue
			}
			b.plan.Tags++
			key := ledger.Key{Registry: e.registry, Repository: repository, Kind: ledger.Tag, Reference: tag}
			record := records[tag]
			switch version.Observe(record, e.fleet().replicas, m.Replica, e.rules.Policy, version.Observation{Digest: digest, Now: e.now()}).Verdict {
			case version.Applied:
				b.plan.Same++
			case version.Successor, version.ConcurrentWon:
				b.plan.Adopt++
				b.differing = append(b.differing, key)
			case version.ConcurrentLost:
				b.plan.Conflicts++
				b.differing = append(b.differing, key)
				if len(b.plan.Examples) < maxExamples {
					b.plan.Examples = append(b.plan.Examples, fmt.Sprintf("%s:%s is %s here, %s in %s", repository, tag, digest, record.Head.Digest, record.Head.Origin))
				}
			default:
				b.due = append(b.due, due{key, record.Head.Sequence})
				if !record.Head.Tombstone() { // else it was deleted, and will be there
					b.plan.Copy++
					size(repository, record.Head.Digest, m.sources)
				}
			}
		}
		err = e.rows(ctx, repository, func(row ledger.Row) bool {
			live := !row.Record.Head.Tombstone()
			switch {
			case row.Key.Kind == ledger.Tag && there[row.Key.Reference]:
			case row.Key.Kind == ledger.Tag && live:
				b.plan.Copy++
				b.due = append(b.due, due{row.Key, row.Record.Head.Sequence})
				size(repository, row.Record.Head.Digest, m.sources)
			case row.Key.Kind == ledger.Manifest && live:
				b.due = append(b.due, due{row.Key, row.Record.Head.Sequence})
			}
			return true
		})
		if err != nil {
			return b, err
		}
	}
	for _, n := range blobs {
		b.plan.Bytes += n
	}
	return b, nil
}

// adopt observes what a baseline found to differ.
func (e *engine) adopt(ctx context.Context, m *member, b baseline, wait pace) error {
	for _, key := range b.differing {
		if err := wait(ctx); err != nil {
			return err
		}
		verdict, err := e.observe(ctx, m, key, evidence{})
		if err != nil {
			return fmt.Errorf("adopting %s from %s: %w", key, m.Region, err)
		}
		e.log.Debug("baseline", zap.String("image", key.String()), zap.String("region", m.Region), zap.Stringer("verdict", verdict))
	}
	return nil
}
