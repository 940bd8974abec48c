package replicator

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
)

// The simulation runs the engine's own steps against replicas and a ledger that live in memory, under a scheduler that
// decides at every request who goes on, so that one seed is one history. Requests fail, time out and take effect later;
// events are lost, doubled and reordered; actors die between any two requests. The oracle is the journal of what users
// did: at quiet all replicas are equal, and every push is the head, superseded by a later act on top of it, kept as a
// conflict, or was overwritten without leaving any evidence.

var (
	simSeed  = flag.Uint64("sim.seed", 0, "run this seed of the simulation alone")
	simSeeds = flag.Int("sim.seeds", 0, "how many seeds to run; 0: 2000, or 100000 with PORTOLAN_LONG")
)

func TestSimulation(t *testing.T) {
	if *simSeed != 0 {
		s := newSimulation(t, *simSeed, true)
		s.run()
		return
	}
	t.Parallel()
	seeds := *simSeeds
	switch {
	case seeds > 0:
	case os.Getenv("PORTOLAN_LONG") != "":
		seeds = 100_000
	default:
		seeds = 2000
	}
	var pushes, conflicts, silent, restores int
	for seed := uint64(1); seed <= uint64(seeds); seed++ {
		s := newSimulation(t, seed, false)
		s.run()
		pushes, conflicts, silent, restores = pushes+len(s.pushes), conflicts+s.conflicts, silent+s.silent, restores+s.restores
		if t.Failed() {
			t.Fatalf("reproduce it with: go test ./replicator -run TestSimulation -sim.seed=%d -v", seed)
		}
	}
	t.Logf("%d histories, %d pushes, %d of them kept as conflicts, %d overwritten without evidence; %d registries restored", seeds, pushes, conflicts, silent, restores)
	if conflicts == 0 || restores == 0 || silent*10 > pushes {
		t.Errorf("the histories are not what they are meant to be: %d conflicts, %d without evidence", conflicts, silent)
	}
}

// simBegin is when a simulation begins: what was pushed then, nobody listened to.
var simBegin = time.Unix(1_800_000_000, 0).UTC()

type simulation struct {
	t     *testing.T
	seed  uint64
	trace bool
	rng   *rand.Rand
	clock time.Time
	// Two processes work on one ledger; the fleet of the second may be that of a while ago.
	engines [2]*engine
	fleets  [2]*fleet
	states  []version.Replica
	former  []version.Replica // those that were replaced, and whose successors are not compared yet
	ledger  *simLedger
	regions []*simRegistry
	actors  []*actor
	current *actor
	calm    bool // no more faults
	ids     int

	pushes     []simPush
	superseded map[string]bool
	removed    map[string]bool     // superseded by a delete
	replaced   map[string][]string // superseded by these pushes
	eventLost  map[string]bool
	overrun    map[string]bool   // overwritten by a write of the replicator
	settled    map[string]string // deleted by a user, in that region, while the ledger knew that it had it
	erased     map[string]bool   // deleted by digest, by a user
	excused    map[string]bool   // deleted by digest, but may be there all the same
	gone       map[string]bool   // tags whose content is nowhere
	retagged   map[string]bool   // pushed more than once
	cleared    map[string]bool   // tags that a user deleted once
	undated    map[string]bool   // found by a scan before its event was heard: dated no better than by the scan before
	taken      map[string]bool   // went with a restored registry before anybody else had it
	restores   int
	conflicts  int
	silent     int
}

type simPush struct {
	region, tag, digest string
	at                  time.Time
	skew                time.Duration // of the registry's clock
}

// actor is one goroutine of the replicator, which runs only when the scheduler lets it.
type actor struct {
	resume chan bool // false: die
	paused chan bool // true: done
}

type crash struct{}

// pause hands control to the scheduler: called before and after the effect of every request.
func (s *simulation) pause() {
	a := s.current
	if a == nil {
		return
	}
	a.paused <- false
	if !<-a.resume {
		panic(crash{})
	}
}

func (s *simulation) start(step func(ctx context.Context)) {
	a := &actor{resume: make(chan bool), paused: make(chan bool)}
	s.actors = append(s.actors, a)
	go func() {
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(crash); !ok {
					panic(r)
				}
			}
			a.paused <- true
		}()
		if !<-a.resume {
			return
		}
		step(context.Background())
	}()
}

// turn lets one actor run up to its next request, or die there.
func (s *simulation) turn(a *actor, live bool) {
	s.current = a
	a.resume <- live
	if <-a.paused {
		s.actors = slices.DeleteFunc(s.actors, func(b *actor) bool { return a == b })
	}
	s.current = nil
}

func (s *simulation) chance(p float64) bool { return !s.calm && s.rng.Float64() < p }

func (s *simulation) logf(format string, args ...any) {
	if s.trace {
		s.t.Logf(s.clock.Format("15:04:05.000 ")+format, args...)
	}
}

var errSim = errors.New("simulated fault")

// simLedger keeps the ledger's contract in memory.
type simLedger struct {
	ledger.Ledger
	s          *simulation
	rows       map[ledger.Key]ledger.Row
	next       uint64
	generation ledger.Generation
}

func (l *simLedger) Generation(context.Context, string) (ledger.Generation, error) {
	l.s.pause()
	if l.s.chance(0.01) {
		return 0, ledger.ErrUnavailable
	}
	return l.generation, nil
}

func (l *simLedger) Advance(context.Context, string) error {
	l.s.pause()
	if l.s.chance(0.01) {
		return ledger.ErrUnavailable
	}
	l.generation++
	l.s.pause()
	return nil
}

func (l *simLedger) Get(_ context.Context, key ledger.Key) (ledger.Row, error) {
	l.s.pause()
	row, ok := l.rows[key]
	if !ok {
		return row, ledger.ErrNotFound
	}
	row.Record = row.Record.Clone()
	return row, nil
}

func (l *simLedger) CompareAndSet(_ context.Context, by ledger.Generation, key ledger.Key, record *ledger.Record, revision uint64) (uint64, error) {
	l.s.pause()
	if l.s.chance(0.01) {
		return 0, ledger.ErrUnavailable
	}
	if l.rows[key].Revision != revision {
		return 0, ledger.ErrConflict
	}
	if by != l.generation {
		return 0, ledger.ErrGeneration
	}
	if l.next++; record == nil {
		delete(l.rows, key)
		return l.next, nil
	}
	l.rows[key] = ledger.Row{Key: key, Record: record.Clone(), Revision: l.next}
	if key.Kind == ledger.Tag && record.ConflictOf == "" {
		l.s.date(*record)
	}
	if key.Kind == ledger.Manifest && record.Head.Tombstone() && l.tagged(key.Reference) {
		l.s.excused[key.Reference] = true // it is spared where the tag is
	}
	l.s.logf("ledger %s = %+v", key, *record)
	l.s.pause()
	if l.s.chance(0.01) {
		return 0, ledger.ErrUnavailable // it was written all the same
	}
	return l.next, nil
}

// tagged reports whether the head of a tag is that digest.
func (l *simLedger) tagged(digest string) bool {
	for key, row := range l.rows {
		if key.Kind == ledger.Tag && row.Record.Head.Digest == digest {
			return true
		}
	}
	return false
}

// knows reports whether a digest is, or was, a version of any record.
func (l *simLedger) knows(digest string) bool {
	for _, row := range l.rows {
		if version.Knows(row.Record, digest) {
			return true
		}
	}
	return false
}

func (l *simLedger) Page(_ context.Context, _, repository string, after ledger.Key, limit int) ([]ledger.Row, error) {
	l.s.pause()
	var page []ledger.Row
	for _, key := range slices.SortedFunc(maps.Keys(l.rows), ledger.Compare) {
		if (repository == "" || key.Repository == repository) && ledger.Compare(key, after) > 0 && len(page) < limit {
			row := l.rows[key]
			row.Record = row.Record.Clone()
			page = append(page, row)
		}
	}
	return page, nil
}

// date notes the versions of a record that no event dates.
func (s *simulation) date(record ledger.Record) {
	dated := func(digest, origin string, latest time.Time) {
		for _, p := range s.pushes {
			if p.digest == digest && p.region == origin && !latest.Equal(p.at.Add(p.skew)) {
				s.undated[digest] = true
			}
		}
	}
	dated(record.Head.Digest, record.Head.Origin, record.Head.Latest())
	for _, p := range record.History {
		dated(p.Digest, p.Origin, time.UnixMilli(p.Latest))
	}
}

// simRegistry is a replica's registry.
type simRegistry struct {
	s         *simulation
	region    string
	skew      time.Duration
	tags      map[string]string
	manifests map[string]bool
	late      []func()
	events    []simEvent
	backup    *simRegistry
	restored  bool                // from a backup, and no operator said so yet
	held      bool                // by the guard
	accepting bool                // an operator says that what the guard holds is right
	adopted   bool                // by the baseline of its incarnation
	copied    map[string][]string // by tag, what the replicator put there
	lied      map[string]bool     // tags that a HEAD denied once
	broken    map[string]bool     // tags that cannot be read, since the registry was killed while it wrote them
	unread    map[ledger.Key]bool // tags that the last scan could not read
	unheard   map[string]bool     // manifests that a user deleted, until that was heard
	// refuse, if set, may fail a request: ping, tags or head; hidden is whether the repository is not shown.
	refuse func(request, reference string) error
	hidden bool
	// referrers are, by subject, what its API lists.
	referrers map[string][]string
}

type simEvent struct {
	tag, digest, writeID string
	at                   time.Time
	delete               bool
}

const simRepository = "app"

func (r *simRegistry) refused(request, reference string) error {
	if r.refuse == nil {
		return nil
	}
	return r.refuse(request, reference)
}

func (r *simRegistry) Head(_ context.Context, _, reference string) (string, error) {
	r.s.pause()
	if err := r.refused("head", reference); err != nil {
		return "", err
	}
	if r.s.chance(0.02) {
		return "", errSim
	}
	if strings.HasPrefix(reference, "sha256:") {
		if r.manifests[reference] {
			return reference, nil
		}
		return ledger.Absent, nil
	}
	if r.broken[reference] || r.s.chance(0.005) { // or it is a moment's fault
		return "", &UnavailableError{Faulty: true, Err: errSim}
	}
	digest := r.tags[reference]
	if digest != "" && !r.lied[reference] && r.s.chance(0.003) {
		r.lied[reference] = true
		return ledger.Absent, nil
	}
	r.s.pause() // the answer is on its way
	return digest, nil
}

func (r *simRegistry) Repositories(context.Context) ([]string, error) {
	return []string{simRepository}, nil
}

func (r *simRegistry) Ping(context.Context) error { return r.refused("ping", "") }

func (r *simRegistry) Tags(context.Context, string) ([]string, bool, error) {
	r.s.pause()
	if err := r.refused("tags", ""); err != nil || r.hidden {
		return nil, false, err
	}
	tags := slices.Sorted(maps.Keys(r.tags))
	return slices.DeleteFunc(tags, func(string) bool { return r.s.chance(0.05) }), true, nil // listings lie
}

func (r *simRegistry) Bring(_ context.Context, _, digest string, sources []Remote) (Transfer, error) {
	r.s.pause()
	if r.manifests[digest] {
		return Transfer{}, nil
	}
	unheard := r.unheard[digest]
	if r.s.chance(0.05) {
		return Transfer{}, errSim
	}
	for _, source := range sources {
		if source.(*simRegistry).manifests[digest] {
			r.s.pause()
			r.manifests[digest] = true
			if unheard || r.unheard[digest] {
				r.s.excused[digest] = true // the copy comes after the delete, and began before that was heard
			}
			r.emit(simEvent{tag: digest, digest: digest, writeID: r.s.engines[0].writeID()})
			return Transfer{}, nil
		}
	}
	return Transfer{}, ErrGone
}

// write carries out a request that may fail, be refused, be carried out without an answer, or be carried out later; one that is begun is
// neither refused nor put off.
func (r *simRegistry) write(begun bool, effect func() error) error {
	r.s.pause()
	switch {
	case r.s.chance(0.03):
		return errSim
	case !begun && r.s.chance(0.02):
		return &UnavailableError{Undone: true, Err: errSim}
	case !begun && r.s.chance(0.04):
		r.late = append(r.late, func() { _ = effect() })
		return context.DeadlineExceeded
	case r.s.chance(0.03):
		_ = effect()
		r.s.pause()
		return context.DeadlineExceeded
	}
	err := effect()
	r.s.pause()
	return err
}

func (r *simRegistry) Tag(_ context.Context, _, tag, digest, writeID string) error {
	told := false
	tell := func() {
		if !told {
			told = true
			r.emit(simEvent{tag: tag, digest: digest, writeID: writeID})
		}
	}
	if r.manifests[digest] && r.s.chance(0.2) { // as CNCF distribution does, before the tag is set
		tell()
	}
	if r.manifests[digest] && r.adopted && !r.restored && r.s.chance(0.02) { // a new baseline forgets whose writes were under way
		if old := r.tags[tag]; old != "" && old != digest {
			r.s.overrun[old] = true
		}
		r.s.logf("%s: killed while it put %s=%s by write %s", r.region, tag, digest, writeID)
		r.tags[tag], r.broken[tag] = digest, true
		return &UnavailableError{Err: errSim}
	}
	return r.write(told, func() error {
		if !r.manifests[digest] {
			return ErrRefused
		}
		delete(r.broken, tag)
		if old := r.tags[tag]; old != "" && old != digest {
			r.s.overrun[old] = true
		}
		r.s.logf("%s: put %s=%s by write %s", r.region, tag, digest, writeID)
		r.tags[tag] = digest
		r.copied[tag] = append(r.copied[tag], digest)
		tell()
		return nil
	})
}

func (r *simRegistry) Untag(_ context.Context, _, tag, writeID string, _ func(string) error) error {
	return r.write(false, func() error {
		if old := r.tags[tag]; old != "" {
			r.s.overrun[old] = true
		}
		r.s.logf("%s: delete %s by write %s", r.region, tag, writeID)
		delete(r.tags, tag)
		delete(r.broken, tag)
		r.emit(simEvent{tag: tag, writeID: writeID, delete: true})
		return nil
	})
}

func (r *simRegistry) Delete(_ context.Context, _, digest, writeID string) error {
	return r.write(false, func() error { r.erase(digest, writeID); return nil })
}

// erase deletes a manifest with the tags that point to it.
func (r *simRegistry) erase(digest, writeID string) {
	if !r.manifests[digest] {
		return
	}
	delete(r.manifests, digest)
	r.s.logf("%s: %s is gone", r.region, digest)
	r.emit(simEvent{tag: digest, digest: digest, writeID: writeID, delete: true})
	for _, tag := range slices.Sorted(maps.Keys(r.tags)) {
		if r.tags[tag] == digest {
			delete(r.tags, tag)
			delete(r.broken, tag)
			r.emit(simEvent{tag: tag, writeID: writeID, delete: true})
		}
	}
}

func (r *simRegistry) Names(context.Context, string, string) ([]string, error) { return nil, nil }
func (r *simRegistry) Referrers(_ context.Context, _, digest string) ([]string, error) {
	return r.referrers[digest], nil
}
func (r *simRegistry) Blobs(context.Context, string, string) (map[string]int64, error) {
	return nil, nil
}

func (r *simRegistry) emit(e simEvent) {
	e.at = r.s.clock.Add(r.skew)
	if e.delete && e.writeID == "" && digestLike(e.tag) {
		r.unheard[e.digest] = true
	}
	switch {
	case r.s.chance(0.2):
		if e.writeID == "" {
			r.s.eventLost[e.digest] = true
		}
	case r.s.chance(0.1):
		r.events = append(r.events, e, e)
	default:
		r.events = append(r.events, e)
	}
}

func newSimulation(t *testing.T, seed uint64, trace bool) *simulation {
	s := &simulation{t: t, seed: seed, trace: trace, rng: rand.New(rand.NewPCG(seed, 1)), clock: simBegin,
		superseded: map[string]bool{}, eventLost: map[string]bool{}, overrun: map[string]bool{}, settled: map[string]string{}, erased: map[string]bool{}, excused: map[string]bool{}, gone: map[string]bool{}}
	s.cleared, s.undated, s.retagged, s.taken, s.removed, s.replaced = map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string]bool{}, map[string][]string{}
	s.ledger = &simLedger{s: s, rows: map[ledger.Key]ledger.Row{}}
	for i, name := range []string{"eastus", "northeurope", "westus"} {
		s.regions = append(s.regions, &simRegistry{s: s, region: name, tags: map[string]string{}, manifests: map[string]bool{}, adopted: true, lied: map[string]bool{}, broken: map[string]bool{}, unheard: map[string]bool{}, copied: map[string][]string{},
			skew: time.Duration(s.rng.IntN(400)-200) * time.Millisecond})
		s.states = append(s.states, version.Replica{Region: name, Incarnation: fmt.Sprint("i", i), Baselined: true})
	}
	s.restart()
	if seed%2 == 0 { // they hold something already, and are baselined in this order
		for i, r := range s.regions {
			for range s.rng.IntN(3) {
				s.push(r, s.tag())
			}
			r.events = nil
			clear(s.eventLost)
			s.states[i].Baselined = false
		}
		s.restart()
		s.quietly(func() {
			for i := range s.regions {
				if err := s.baseline(t.Context(), s.engines[0], i); err != nil {
					t.Fatalf("seed %d: baseline of %s: %v", seed, s.regions[i].region, err)
				}
			}
		})
	}
	return s
}

func noPace(context.Context, time.Duration) error { return nil }

// baseline learns what a region holds and merges it.
func (s *simulation) baseline(ctx context.Context, e *engine, i int) error {
	m := e.fleet().members[i]
	b, err := e.compare(ctx, m, noPace)
	if err == nil {
		err = e.adopt(ctx, m, b, noPace)
	}
	for _, d := range b.due {
		if err == nil {
			err = e.owe(ctx, m, d)
		}
	}
	if err == nil && m.Incarnation == s.states[i].Incarnation {
		s.regions[i].adopted = true
		s.former = slices.DeleteFunc(s.former, func(r version.Replica) bool { return r.Region == m.Region })
	}
	return err
}

// muster makes the fleet of a process anew, of the generation that it read before.
func (s *simulation) muster(process int, generation ledger.Generation) {
	var members []*member
	for i, state := range s.states {
		members = append(members, &member{Replica: state, Remote: s.regions[i], remaining: func() time.Duration { return time.Minute }})
	}
	for _, m := range members {
		for _, other := range members {
			if other != m {
				m.sources = append(m.sources, other)
			}
		}
	}
	s.fleets[process] = newFleet(generation, members, s.former...)
}

// restart replaces the engines: all that a process keeps in memory is gone.
func (s *simulation) restart() {
	for process := range s.engines {
		s.muster(process, s.ledger.generation)
		s.engines[process] = &engine{
			registry: "contoso", ledger: s.ledger, log: zap.NewNop(), suspects: map[string]map[ledger.Key]suspect{},
			fleet: func() *fleet { return s.fleets[process] },
			learn: func(ctx context.Context) error {
				generation, err := s.ledger.Generation(ctx, "contoso")
				if err != nil {
					return err
				}
				s.pause()
				s.muster(process, generation)
				return nil
			},
			now:     func() time.Time { return s.clock },
			writeID: func() string { s.ids++; return fmt.Sprint("w", s.ids) },
			decided: func(region string, key ledger.Key, v version.Verdict) {
				s.logf("%s: %s is %s (%d)", region, key, v, process)
			},
			rules: rules{guard: s.guard(), keepConflicts: true, untagged: true, patience: early, listing: 5 * time.Minute, deleteConfirmation: 10 * time.Minute},
		}
	}
}

// restores reports whether registries are restored from backups in this history. Then the guard believes nothing, and an
// operator who knows decides.
func (s *simulation) restoring() bool { return s.seed%3 == 0 }

func (s *simulation) guard() func(int, int) bool {
	if s.restoring() {
		return func(_, regressions int) bool { return regressions > 0 }
	}
	return version.Guard
}

// restore puts a registry back to what it was a while ago.
func (s *simulation) restore(r *simRegistry) {
	if r.backup == nil || r.restored || !r.adopted || r.accepting {
		return
	}
	s.restores++
	s.logf("%s: restored from a backup: %v", r.region, r.backup.tags)
	for _, tag := range slices.Sorted(maps.Keys(r.tags)) {
		if s.chance(0.5) { // an event that was on its way
			r.events = append(r.events, simEvent{tag: tag, digest: r.tags[tag], at: s.clock.Add(r.skew)})
		}
	}
	for digest := range r.manifests {
		elsewhere := slices.ContainsFunc(s.regions, func(o *simRegistry) bool { return o != r && o.manifests[digest] })
		s.taken[digest] = s.taken[digest] || !r.backup.manifests[digest] && !elsewhere
	}
	for digest := range r.backup.manifests {
		s.excused[digest] = s.excused[digest] || r.unheard[digest] // it is back before anybody looked
	}
	maps.DeleteFunc(s.settled, func(_, region string) bool { return region == r.region }) // nobody may have looked
	for tag, digest := range r.backup.tags {
		// What followed before anybody looked went with the registry: nobody can tell.
		record := s.ledger.rows[s.key(tag)].Record
		s.retagged[digest] = s.retagged[digest] || record.Head.Digest == digest || !version.Knows(record, digest)
		// And a version that nobody ever looked at is a push on top of the head when it is seen.
		s.retagged[record.Head.Digest] = s.retagged[record.Head.Digest] || !version.Knows(record, digest)
	}
	clear(r.broken)
	r.tags, r.manifests, r.restored = maps.Clone(r.backup.tags), maps.Clone(r.backup.manifests), true
}

// operate is what an operator does about a registry that is held.
func (s *simulation) operate(ctx context.Context, e *engine, i int) error {
	r := s.regions[i]
	r.held = false
	if !r.restored {
		s.logf("%s: the operator accepts", r.region)
		r.accepting = true // nobody restores it at that very moment
		defer func() { r.accepting = false }()
		_, err := e.scan(ctx, e.fleet().members[i], s.clock.Add(-5*time.Minute), noPace, true)
		return err
	}
	s.logf("%s: the operator asks for a new baseline", r.region)
	for _, p := range s.pushes {
		// What the operator calls stale is compared without clocks: pushes there that nobody had looked at lose.
		unseen := p.region == r.region && !version.Knows(s.ledger.rows[s.key(p.tag)].Record, p.digest)
		s.taken[p.digest] = s.taken[p.digest] || unseen
	}
	s.ids++
	s.former = append(s.former, s.states[i])
	s.states[i] = version.Replica{Region: r.region, Incarnation: fmt.Sprint("i", i, "-", s.ids)}
	r.restored, r.adopted = false, false
	s.muster(0, s.fleets[0].generation) // the other process hears of it later
	return nil
}

func (s *simulation) tag() string { return []string{"a", "b", "c"}[s.rng.IntN(3)] }

// push is a user's push of new content.
func (s *simulation) push(r *simRegistry, tag string) {
	digest := fmt.Sprintf("sha256:%04d", len(s.pushes)+1)
	if old := slices.Sorted(maps.Keys(r.manifests)); len(old) > 0 && s.chance(0.15) {
		// Back to something that is there. If its event is lost, it looks like a late copy of ours.
		digest = old[s.rng.IntN(len(old))]
		s.retagged[digest], s.retagged[r.tags[tag]] = true, true
		for _, p := range s.pushes {
			s.retagged[p.digest] = s.retagged[p.digest] || p.region == r.region && p.tag == tag
		}
	}
	s.supersede(r, tag, digest)
	r.manifests[digest], r.tags[tag] = true, digest
	delete(r.broken, tag)
	s.pushes = append(s.pushes, simPush{r.region, tag, digest, s.clock, r.skew})
	r.emit(simEvent{tag: tag, digest: digest})
	s.logf("%s: user pushes %s=%s", r.region, tag, digest)
}

// remove is a user's delete of a tag.
func (s *simulation) remove(r *simRegistry, tag string) {
	old := r.tags[tag]
	if old == "" {
		return
	}
	s.supersede(r, tag, "")
	row := s.ledger.rows[s.key(tag)]
	for _, m := range s.fleets[0].members {
		if m.Region == r.region && !version.Due(row.Record, m.Replica) && row.Record.Head.Digest == old && len(row.Record.Intents) == 0 {
			s.settled[old] = r.region
		}
	}
	delete(r.tags, tag)
	delete(r.broken, tag)
	r.emit(simEvent{tag: tag, delete: true})
	s.logf("%s: user deletes %s", r.region, tag)
}

// eraseByUser is a user's delete of what a tag points to, by digest.
func (s *simulation) eraseByUser(r *simRegistry, tag string) {
	digest := r.tags[tag]
	if digest == "" {
		return
	}
	s.logf("%s: user deletes %s", r.region, digest)
	for _, t := range slices.Sorted(maps.Keys(r.tags)) {
		if r.tags[t] == digest {
			s.supersede(r, t, "")
		}
	}
	s.erased[digest] = true
	r.erase(digest, "")
}

// eraseUntagged is a user's delete of a manifest that no tag points to there: by a copy that was not tagged yet, perhaps.
func (s *simulation) eraseUntagged(r *simRegistry) {
	tagged := slices.Collect(maps.Values(r.tags))
	untagged := slices.DeleteFunc(slices.Sorted(maps.Keys(r.manifests)), func(digest string) bool { return slices.Contains(tagged, digest) })
	if len(untagged) == 0 {
		return
	}
	digest := untagged[s.rng.IntN(len(untagged))]
	s.logf("%s: user deletes %s, which is untagged", r.region, digest)
	s.erased[digest] = true
	r.erase(digest, "")
}

// supersede notes what a user's act overwrites: by is what is pushed, or nothing for a delete, which a push that is found
// later wins over.
func (s *simulation) supersede(r *simRegistry, tag, by string) {
	s.cleared[tag] = s.cleared[tag] || by == ""
	note := func(old string) {
		// Unless an event dates it, a push to a registry of which nothing is known loses to the known version.
		s.removed[old] = s.removed[old] || by == ""
		if s.superseded[old] = true; by != "" && s.states[slices.Index(s.regions, r)].Baselined {
			s.replaced[old] = append(s.replaced[old], by)
		}
	}
	if old := r.tags[tag]; old != "" {
		note(old)
	}
	for _, old := range r.copied[tag] {
		s.superseded[old] = true // it was there, whatever late copy took its place since
	}
	// One registry puts the acts of its own users in order, whatever a copy put there in between.
	for _, p := range s.pushes {
		if p.region == r.region && p.tag == tag {
			note(p.digest)
		}
	}
}

func (s *simulation) key(tag string) ledger.Key {
	return ledger.Key{Registry: "contoso", Repository: simRepository, Kind: ledger.Tag, Reference: tag}
}

func (s *simulation) run() {
	for range 400 + s.rng.IntN(400) {
		s.clock = s.clock.Add(time.Duration(s.rng.IntN(60)) * time.Millisecond)
		if s.chance(0.02) {
			s.muster(1, s.ledger.generation)
		}
		if s.chance(0.002) {
			s.clock = s.clock.Add(6 * time.Minute)
		}
		n := s.rng.IntN(len(s.regions))
		r := s.regions[n]
		if s.restoring() {
			s.disaster(n)
		}
		if r.adopted && !s.states[n].Baselined && s.chance(0.3) {
			s.states[n].Baselined = true
			s.ledger.generation++ // the processes hear of it later
		}
		switch p := s.rng.Float64(); {
		case r.restored && p < 0.037: // nobody works there
		case p < 0.03 && len(s.pushes) < 40:
			s.push(r, s.tag())
		case p < 0.035:
			s.remove(r, s.tag())
		case p < 0.0365:
			s.eraseByUser(r, s.tag())
		case p < 0.037:
			s.eraseUntagged(r)
		case p < 0.04 && len(r.late) > 0:
			i := s.rng.IntN(len(r.late))
			r.late[i]()
			r.late = slices.Delete(r.late, i, i+1)
		case p < 0.043: // the process dies and comes back
			for len(s.actors) > 0 {
				s.turn(s.actors[0], false)
			}
			s.restart()
		case p < 0.05 && len(s.actors) > 0:
			s.turn(s.actors[s.rng.IntN(len(s.actors))], false)
		case p < 0.5 && len(s.actors) < 8:
			s.spawn(n)
		case len(s.actors) > 0:
			s.turn(s.actors[s.rng.IntN(len(s.actors))], true)
		}
	}
	for len(s.actors) > 0 {
		s.turn(s.actors[s.rng.IntN(len(s.actors))], true)
	}
	s.settle()
	s.check()
}

// disaster is what happens to a registry besides pushes: it is backed up, restored, and looked after.
func (s *simulation) disaster(n int) {
	r := s.regions[n]
	switch p := s.rng.Float64(); {
	case p < 0.01 && !r.restored:
		r.backup = &simRegistry{tags: maps.Clone(r.tags), manifests: maps.Clone(r.manifests)}
	case p < 0.012:
		s.restore(r)
	case p < 0.03 && r.held:
		if r.restored {
			_ = s.operate(context.Background(), s.engines[0], n)
			return
		}
		e := s.engines[0]
		s.start(func(ctx context.Context) { _ = s.operate(ctx, e, n) })
	}
}

// spawn starts something that the replicator does.
func (s *simulation) spawn(n int) {
	e, r := s.engines[s.rng.IntN(len(s.engines))], s.regions[n]
	m := e.fleet().members[n]
	if r.held || m.Incarnation != s.states[n].Incarnation {
		return
	}
	if !r.adopted {
		s.start(func(ctx context.Context) { _ = s.baseline(ctx, e, n) })
		return
	}
	switch p := s.rng.Float64(); {
	case p < 0.45 && len(r.events) > 0:
		s.start(func(ctx context.Context) {
			if len(r.events) == 0 {
				return
			}
			i := s.rng.IntN(len(r.events)) // any of them: they are not ordered
			event := r.events[i]
			r.events = slices.Delete(r.events, i, i+1)
			defer func() {
				if crashed := recover(); crashed != nil {
					r.events = append(r.events, event) // the spool has it still
					panic(crashed)
				}
			}()
			if s.hear(ctx, e, m, event) != nil {
				r.events = append(r.events, event)
			}
		})
	case p < 0.55:
		s.start(func(ctx context.Context) {
			if found, err := e.scan(ctx, m, s.clock.Add(-5*time.Minute), noPace, false); err == nil && m.Incarnation == s.states[n].Incarnation {
				r.held = found.guarded
			}
		})
	default:
		if keys := s.due(m); len(keys) > 0 {
			key, patient := keys[s.rng.IntN(len(keys))], s.rng.IntN(2) == 0
			s.start(func(ctx context.Context) { _, _ = e.apply(ctx, m, key, s.clock.Add(-5*time.Minute), patient) })
		}
	}
}

func (s *simulation) registry(region string) *simRegistry {
	return s.regions[slices.IndexFunc(s.regions, func(r *simRegistry) bool { return r.region == region })]
}

func (s *simulation) hear(ctx context.Context, e *engine, m *member, event simEvent) error {
	key := s.key(event.tag)
	if digestLike(event.tag) {
		key.Kind = ledger.Manifest
		known := s.ledger.knows(event.digest)
		err := e.observeManifest(ctx, m, key, simEvidence(event))
		if err == nil && event.delete && event.writeID == "" {
			s.registry(m.Region).unheard[event.digest] = false
			s.excused[event.digest] = s.excused[event.digest] || !known // for all that is known, it is a blob
		}
		return err
	}
	_, err := e.observe(ctx, m, key, simEvidence(event))
	return err
}

func simEvidence(e simEvent) evidence {
	if e.delete && e.writeID != "" {
		return evidence{erased: e.writeID}
	}
	if e.delete {
		return evidence{deletedAt: e.at}
	}
	return evidence{pushes: []push{{Event: version.Event{Digest: e.digest, Time: e.at, WriteID: e.writeID}, byOther: e.writeID == ""}}}
}

func (s *simulation) due(m *member) []ledger.Key {
	var keys []ledger.Key
	for _, key := range slices.SortedFunc(maps.Keys(s.ledger.rows), ledger.Compare) {
		if version.Due(s.ledger.rows[key].Record, m.Replica) {
			keys = append(keys, key)
		}
	}
	return keys
}

// quietly runs steps to their end with no fault and nobody in between.
func (s *simulation) quietly(f func()) {
	calm := s.calm
	s.calm = true
	f()
	s.calm = calm
}

// settle lets everything come to rest: what is late arrives, what was told is heard, scans and copies go on until
// nothing changes any more.
func (s *simulation) settle() {
	s.calm = true
	ctx := context.Background()
	for _, r := range s.regions {
		for _, effect := range r.late {
			effect()
		}
		r.late = nil
	}
	e := s.engines[0]
	for round := range 30 {
		before := s.ledger.next
		clear(s.gone)
		s.clock = s.clock.Add(11 * time.Minute)
		for i, r := range s.regions {
			s.muster(0, s.ledger.generation)
			if r.restored {
				r.held = true
			}
			if r.held {
				if err := s.operate(ctx, e, i); err != nil {
					s.t.Fatalf("seed %d: %v", s.seed, err)
				}
			}
			if !r.adopted {
				if err := s.baseline(ctx, e, i); err != nil {
					s.t.Fatalf("seed %d: %v", s.seed, err)
				}
			}
			s.states[i].Baselined = true
			s.muster(0, s.ledger.generation)
			m := s.fleets[0].members[i]
			told := r.events
			r.events = nil
			for _, event := range told {
				switch err := s.hear(ctx, e, m, event); {
				case faulty(err):
					r.events = append(r.events, event) // until a copy has repaired it
				case err != nil:
					s.t.Fatalf("seed %d: %v", s.seed, err)
				}
			}
			found, err := e.scan(ctx, m, s.clock.Add(-5*time.Minute), noPace, false)
			if faulty(err) {
				clear(r.broken) // nothing can be read there: that is an operator's matter
			} else if err != nil && m.Baselined {
				s.t.Fatalf("seed %d: %v", s.seed, err)
			}
			r.held = found.guarded
			for _, u := range found.unread {
				if r.unread[u.key] { // in two scans that are far apart
					err := e.rewrite(ctx, m, u.key, u.err)
					if head := s.ledger.rows[u.key].Record.Head.Digest; errors.Is(err, ErrGone) && (s.erased[head] || s.taken[head]) {
						s.gone[u.key.Reference] = true
					} else if err != nil {
						s.t.Fatalf("seed %d: writing %s to %s again: %v", s.seed, u.key, m.Region, err)
					}
				}
			}
			r.unread = map[ledger.Key]bool{}
			for _, u := range found.unread {
				r.unread[u.key] = true
			}
			for _, key := range s.due(m) {
				_, err := e.apply(ctx, m, key, time.Time{}, false)
				head := s.ledger.rows[key].Record.Head.Digest
				switch {
				case errors.Is(err, ErrGone) && (s.erased[head] || s.taken[head]):
					s.gone[key.Reference] = true // nobody has the content of that version any more
				case err != nil && !errors.Is(err, errAgain) && !errors.Is(err, errRegressed) && !faulty(err):
					s.t.Fatalf("seed %d: applying %s to %s: %v", s.seed, key, m.Region, err)
				}
			}
		}
		if s.ledger.next == before && round > 2 {
			return
		}
	}
	s.t.Errorf("seed %d: no rest: the ledger still changes", s.seed)
}

// certainlyReplaced reports whether a push was superseded by one that left evidence, and so much later that no clock errs.
func (s *simulation) certainlyReplaced(digest string) bool {
	find := func(digest string) simPush {
		return s.pushes[slices.IndexFunc(s.pushes, func(p simPush) bool { return p.digest == digest })]
	}
	// What the same users pushed on top speaks for it: if nothing dates that, it may lose.
	speaks := func(by string) bool {
		one := find(by)
		return !slices.ContainsFunc(s.pushes, func(p simPush) bool {
			return p.region == one.region && p.tag == one.tag && !p.at.Before(one.at) && (s.undated[p.digest] || s.eventLost[p.digest])
		})
	}
	return slices.ContainsFunc(s.replaced[digest], func(by string) bool {
		return find(by).at.Sub(find(digest).at) > clockJitter && speaks(by) && !s.erased[by] && !s.taken[by] && !s.retagged[by] && !s.removed[by]
	})
}

func (s *simulation) check() {
	for _, r := range s.regions {
		for tag := range s.gone {
			delete(r.tags, tag)
			delete(r.broken, tag)
		}
	}
	first := s.regions[0]
	for _, r := range s.regions {
		if len(r.broken) > 0 {
			s.t.Errorf("seed %d: %s cannot read %v", s.seed, r.region, slices.Sorted(maps.Keys(r.broken)))
		}
		if !maps.Equal(first.tags, r.tags) {
			s.t.Errorf("seed %d: %s and %s differ: %v and %v", s.seed, first.region, r.region, first.tags, r.tags)
		}
	}
	for key, row := range s.ledger.rows {
		if key.Kind == ledger.Tag && !s.gone[key.Reference] && row.Record.Head.Digest != first.tags[key.Reference] {
			s.t.Errorf("seed %d: the head of %s is %q, the replicas have %q", s.seed, key, row.Record.Head.Digest, first.tags[key.Reference])
		}
		if key.Kind == ledger.Manifest {
			for _, r := range s.regions {
				if !row.Record.Head.Tombstone() && !r.manifests[key.Reference] && !s.erased[key.Reference] && !s.taken[key.Reference] {
					s.t.Errorf("seed %d: %s lacks the manifest %s", s.seed, r.region, key.Reference)
				}
			}
		}
	}
	kept := make(map[string]bool)
	for tag, digest := range first.tags {
		if strings.Contains(tag, ".conflict-") {
			kept[digest] = true
		}
	}
	s.conflicts = len(kept)
	for _, p := range s.pushes {
		if first.tags[p.tag] == p.digest && s.certainlyReplaced(p.digest) && !s.retagged[p.digest] {
			s.t.Errorf("seed %d: %s of %s came back", s.seed, p.digest, p.tag)
		}
		switch {
		case s.retagged[p.digest], s.taken[p.digest]:
		case first.tags[p.tag] == p.digest, kept[p.digest], s.superseded[p.digest], s.erased[p.digest]:
		case s.eventLost[p.digest] && s.overrun[p.digest]:
			s.silent++
		default:
			s.t.Errorf("seed %d: the push of %s to %s:%s was lost without a trace", s.seed, p.digest, p.region, p.tag)
		}
	}
	// Every pushed manifest is copied, tagged or not, also one that was superseded before its turn.
	for _, p := range s.pushes {
		if p.at.Equal(simBegin) || s.eventLost[p.digest] || s.erased[p.digest] || s.taken[p.digest] || s.retagged[p.digest] || s.cleared[p.tag] {
			continue // no event told of it, or it was to go
		}
		for _, r := range s.regions {
			if !r.manifests[p.digest] {
				s.t.Errorf("seed %d: %s lacks the manifest of the push of %s to %s:%s", s.seed, r.region, p.digest, p.region, p.tag)
			}
		}
	}
	// What was deleted by digest does not come back, unless somebody pushes it again.
	for digest := range s.erased {
		if s.retagged[digest] || s.excused[digest] || s.eventLost[digest] || s.taken[digest] || s.ledger.tagged(digest) {
			continue
		}
		for _, r := range s.regions {
			if r.manifests[digest] {
				s.t.Errorf("seed %d: %s was deleted, and %s has it", s.seed, digest, r.region)
			}
		}
		if head := s.ledger.rows[s.manifestKey(digest)].Record.Head.Digest; head != ledger.Absent {
			s.t.Errorf("seed %d: %s was deleted, and is owed to all", s.seed, digest)
		}
	}
	for digest := range s.settled {
		if s.retagged[digest] {
			continue
		}
		for _, tag := range []string{"a", "b", "c"} {
			if first.tags[tag] == digest {
				s.t.Errorf("seed %d: %s was deleted as the head, and came back", s.seed, digest)
			}
		}
	}
}
