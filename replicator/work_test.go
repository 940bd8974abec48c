package replicator

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/topology"
)

// Something is given up after failures of one way in a row. What failed while the replicas or the ledger were away, or while another replica could
// not be asked, says nothing of it.
func TestGivingUp(t *testing.T) {
	t.Parallel()
	lost := fmt.Errorf("looked everywhere: %w", ErrGone)
	outage := fmt.Errorf("reading: %w", ledger.ErrUnavailable)
	link := errors.New("the link is cut")
	elsewhere := fmt.Errorf("%w: %v", errNotAllAsked, lost)
	times := func(n int, err error) []error { return slices.Repeat([]error{err}, n) }
	for name, c := range map[string]struct {
		kind   ledger.Kind
		errs   []error
		parked bool
	}{
		"lost":                               {ledger.Tag, times(maxGone+1, lost), true},
		"lost, not often enough":             {ledger.Tag, times(maxGone, lost), false},
		"lost once, after a cut link":        {ledger.Tag, append(times(30, link), lost), false},
		"lost, with a cut link between":      {ledger.Tag, slices.Concat(times(maxGone, lost), times(1, link), times(maxGone, lost)), false},
		"lost, with an outage between":       {ledger.Tag, slices.Concat(times(maxGone, lost), times(9, outage), times(1, lost)), true},
		"an outage of the ledger":            {ledger.Tag, times(100, outage), false},
		"somebody cannot be asked":           {ledger.Tag, times(100, elsewhere), false},
		"a manifest, somebody is not asked":  {ledger.Manifest, times(100, elsewhere), false},
		"a manifest, not often enough":       {ledger.Manifest, times(maxGoneManifest, lost), false},
		"what a manifest needs":              {ledger.Manifest, times(maxGoneManifest+1, lost), true},
		"damaged":                            {ledger.Tag, times(maxGone+1, errUnreadable), true},
		"damaged after it was lost":          {ledger.Tag, append(times(maxGone, lost), errUnreadable), false},
		"refused":                            {ledger.Tag, times(maxRefused+1, ErrRefused), true},
		"refused once, after a cut link":     {ledger.Tag, append(times(30, link), ErrRefused), false},
		"refused, and the outcome is not in": {ledger.Tag, times(100, errors.Join(ErrRefused, outage)), false},
		"the replica is away":                {ledger.Tag, times(100, &UnavailableError{Err: link}), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, _, north, _ := seeded(t)
				key := s.key("a")
				if c.kind == ledger.Manifest {
					key = s.manifestKey(s.head("a"))
				}
				r := &replica{of: &registry{engine: s.engines[0]}, log: zap.NewNop(), queue: newQueue(time.Now)}
				r.queue.add(key, s.ledger.rows[key].Record.Head.Sequence, false, time.Now())
				for n, err := range c.errs {
					i, taking := r.queue.take(t.Context())
					if taking != nil {
						t.Fatal(taking)
					}
					if r.settle(t.Context(), s.region(north), i, err); r.queue.backlog().pending == 0 && n < len(c.errs)-1 {
						t.Fatalf("given up after %d of %d failures", n+1, len(c.errs))
					}
				}
				if b := r.queue.backlog(); (b.parked == 1) != c.parked || b.pending+b.parked != 1 {
					t.Errorf("%+v", b)
				}
			})
		})
	}
}

// What fails while the replica is away says nothing of the item when the replica is back: to give it up takes as many failures from
// then on. While it fails nothing waits for it, also if the registry asks for a pause each time.
func TestStuckItem(t *testing.T) {
	t.Parallel()
	for name, pause := range map[string]time.Duration{"at once": 0, "with Retry-After": time.Minute} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, _, north, _ := seeded(t)
				key := s.key("a")
				r := &replica{of: &registry{engine: s.engines[0]}, log: zap.NewNop(), queue: newQueue(time.Now)}
				r.queue.add(key, s.ledger.rows[key].Record.Head.Sequence, false, time.Now())
				failed := 0
				fail := func(pause time.Duration) {
					i, err := r.queue.take(t.Context())
					for ; err == nil && i.key != key; i, err = r.queue.take(t.Context()) {
						r.settle(t.Context(), nil, i, nil)
					}
					if err != nil {
						t.Fatal(err)
					}
					r.settle(t.Context(), s.region(north), i, &UnavailableError{RetryAfter: pause, Err: errSim})
				}
				for range 3 * maxFailed {
					fail(0)
				}
				r.queue.unblock()
				r.queue.add(queueKey("app", "other"), 1, false, time.Now())
				if i := next(t, r.queue); i == nil || i.key.Reference != "other" {
					t.Fatalf("%+v", i)
				} else {
					time.Sleep(time.Second)
					r.settle(t.Context(), nil, i, nil)
				}
				for ; r.queue.backlog().parked == 0; failed++ {
					if failed > maxFailed {
						t.Fatal("it is not given up")
					}
					fail(pause)
				}
				if failed != maxFailed+1 {
					t.Errorf("it was given up after %d failures since the replica was back", failed)
				}
			})
		})
	}
}

// What can be had only from replicas that want to be left alone waits as long as they ask for, and the replica that it is for takes
// everything else meanwhile.
func TestSourcesThatRest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &replica{log: zap.NewNop(), queue: newQueue(time.Now)}
		r.queue.add(queueKey("app", "1"), 1, false, time.Now())
		i, began := expect(t, r.queue, "app:1"), time.Now()
		for range maxFailed + 1 {
			r.settle(t.Context(), nil, i, fmt.Errorf("copying: %w", &SourcesRestError{RetryAfter: time.Minute, Err: errors.New("429")}))
			r.queue.add(queueKey("app", "2"), 1, false, time.Now())
			r.settle(t.Context(), nil, expect(t, r.queue, "app:2"), nil)
			var err error
			if i, err = r.queue.take(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if waited := time.Since(began); waited != (maxFailed+1)*time.Minute || r.writing.reason != "" {
			t.Errorf("after %v the replica's trouble is %q", waited, r.writing.reason)
		}
	})
}

// After an outage of the ledger, however long, what waits for it goes on within seconds.
func TestLedgerOutageIsWaitedOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		r := &replica{log: zap.NewNop(), queue: newQueue(time.Now)}
		for n := range 3 {
			r.queue.add(queueKey("app", fmt.Sprint(n)), 1, false, time.Now())
		}
		for range 100 {
			i, err := r.queue.take(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			r.settle(t.Context(), nil, i, ledger.ErrUnavailable)
		}
		if !r.storing.lasting() || r.writing.reason != "" || r.reading.reason != "" {
			t.Errorf("the outage is told as %q, %q, %q", r.storing.reason, r.writing.reason, r.reading.reason)
		}
		began := time.Now()
		for n := range 6 { // the first three lose a race
			i, err := r.queue.take(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			r.settle(t.Context(), nil, i, []error{errAgain, nil}[n/3])
		}
		if waited := time.Since(began); waited > 2*time.Second {
			t.Errorf("they waited for %v", waited)
		}
		if r.storing.reason != "" {
			t.Error("it is told of when it is over")
		}
	})
}

// absent is the fleet of a simulation as it is while nothing can be asked of a region.
func (s *simulation) absent(r *simRegistry) {
	var there []*member
	var away []version.Replica
	for _, m := range s.fleets[0].members {
		if m.Region == r.region {
			away = append(away, m.Replica)
			continue
		}
		there = append(there, &member{Replica: m.Replica, Remote: m.Remote, remaining: m.remaining})
	}
	for _, m := range there {
		m.sources = sourcesOf(m, there, strings.Compare)
	}
	s.fleets[0] = newFleet(s.fleets[0].generation, there, away...)
}

// What only a replica has that cannot be asked is not gone.
func TestWhatIsElsewhereIsNotGone(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	s.push(east, "a")
	s.look(t, east)
	s.absent(east)
	for range maxGoneManifest + 1 {
		_, err := s.engines[0].apply(t.Context(), s.region(north), s.key("a"), s.clock, false)
		if !errors.Is(err, errNotAllAsked) || errors.Is(err, ErrGone) {
			t.Fatal(err)
		}
	}
}

// A manifest is forgotten once nobody has it, and only if all were asked.
func TestForgetGone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change    func(s *simulation, east, north *simRegistry, digest string)
		forgotten bool
		failed    error
	}{
		"nobody has it":     {func(*simulation, *simRegistry, *simRegistry, string) {}, true, nil},
		"somebody is away":  {func(s *simulation, east, _ *simRegistry, _ string) { s.absent(east) }, false, errNotAllAsked},
		"somebody has it":   {func(_ *simulation, east, _ *simRegistry, digest string) { east.manifests[digest] = true }, false, nil},
		"it is due to have": {func(_ *simulation, _, north *simRegistry, digest string) { north.manifests[digest] = true }, false, nil},
		"somebody fails": {func(_ *simulation, east, _ *simRegistry, _ string) {
			east.refuse = func(string, string) error { return errSim }
		}, false, errSim},
		"it was deleted meanwhile": {func(s *simulation, _, _ *simRegistry, digest string) {
			row := s.ledger.rows[s.manifestKey(digest)]
			row.Record.Head.Sequence, row.Record.Head.Digest = row.Record.Head.Sequence+1, ledger.Absent
			s.ledger.rows[row.Key] = row
		}, false, errAgain},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, east, north, _ := seeded(t)
			const digest = "sha256:untagged"
			key := s.manifestKey(digest)
			east.manifests[digest] = true
			at := s.region(east)
			if err := s.engines[0].observeManifest(t.Context(), at, key, evidence{pushes: []push{{Event: version.Event{Digest: digest, Time: s.clock}, heard: s.clock}}}); err != nil {
				t.Fatal(err)
			}
			row, known := s.ledger.rows[key]
			if !known {
				t.Fatal("it has no record")
			}
			delete(east.manifests, digest)
			c.change(s, east, north, digest)
			forgotten, err := s.engines[0].forgetGone(t.Context(), key, row.Record.Head.Sequence)
			if forgotten != c.forgotten || !errors.Is(err, c.failed) || (err == nil) != (c.failed == nil) {
				t.Errorf("%v, %v", forgotten, err)
			}
			if _, known := s.ledger.rows[key]; known == c.forgotten {
				t.Errorf("it has a record: %v", known)
			}
		})
	}
}

// A replica does not get clients without what another one has that cannot be asked: here, its CA file is missing after the start.
func TestSeedingWaitsForWhoeverCannotBeAsked(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	whole := f.replace("home", failing(*f.handlers["home"].Load(), "1"))
	digest := f.push("other", "app:1")
	f.until("it to be due at home", func() bool { return f.state("home").Pending > 0 })
	f.stop()
	f.replace("home", whole)
	f.before = func() {
		f.change("other", func(r *topology.Replica) { r.Access.CA = "file:" + f.dir + "/missing.pem" })
	}
	f.start()
	f.until("home to say who cannot be asked", func() bool {
		return strings.Contains(f.state("home").LastError, errNotAllAsked.Error()+": not other")
	})
	f.change("other", func(r *topology.Replica) { r.Access.CA = "" })
	f.arrives("app:1", digest, "home")
	f.ready("home", "other")
}

// Why a replica that was never compared cannot be is said at once; one that is in use is given the time of a retry.
func TestTroubleOfANewReplicaIsSaidAtOnce(t *testing.T) {
	t.Parallel()
	for phase, want := range map[topology.Phase]struct {
		status topology.Status
		reason string
	}{
		topology.PhaseUnknown:   {topology.Creating, "connection refused"},
		topology.PhaseBaselined: {topology.Ready, ""},
	} {
		r := &replica{of: &registry{name: "contoso", config: &topology.Registry{Home: "westus"}, damage: &examined{}}, config: &topology.Replica{Region: "westus"}, queue: newQueue(time.Now)}
		r.fault(&r.reading, errors.New("connection refused"))
		if s := r.assess(topology.Replication{Phase: phase, Seeded: phase == topology.PhaseBaselined}); s.Status != want.status || s.Reason != want.reason {
			t.Errorf("%s: %s, %q", phase, s.Status, s.Reason)
		}
	}
}
