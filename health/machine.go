package health

import (
	"time"

	"portolan/router"
)

// rules are what the states of one target change by.
type rules struct {
	// rise and fall are how many results in a row raise and fell it.
	rise, fall int
	// round is how long a probe may take, with the time until the next one.
	round time.Duration
}

// memory is how long a state holds without a probe that tells of it: as long as it takes, without relapses, to lose it and to win
// it back.
func (r rules) memory() time.Duration { return time.Duration(r.rise+r.fall) * r.round }

// machine is the state of one address. It is a value: observe gives the next one.
type machine struct {
	health router.Health
	since  time.Time
	// seen is when a probe last told of it.
	seen time.Time
	// against counts the results in a row that speak against health.
	against int
	// returned is whether the address was down before it was healthy; relapses how often, of late, it failed soon after it had
	// come back.
	returned bool
	relapses int
}

const (
	// relapse is how soon after it came back an address must fail for that to be a relapse, and how long it must stand for one
	// of them to be forgotten.
	relapse = 5 * time.Minute
	// maxRelapses bounds how many count: at most sixteen times as many successes are asked for.
	maxRelapses = 4
)

// rise is how many successes in a row raise the address again: twice as many for each relapse. What comes and goes would
// otherwise take its clients along every time.
func (m machine) rise(rise int) int { return rise << m.relapses }

// settled is whether there is a state and nothing speaks against it.
func (m machine) settled() bool { return m.health != router.Unknown && m.against == 0 }

// stale is whether no probe could tell of the state for longer than the rules vouch for it.
func (m machine) stale(r rules, now time.Time) bool { return now.Sub(m.seen) > r.memory() }

// observe folds one outcome. The first one decides at once: a start must not take Rise intervals, and there is nothing yet
// that could flap. Afterwards fall failures in a row fell, and rise successes in a row raise, or more after relapses. That an address
// stood is forgotten when it is stale, but for what it tells of flapping; that it was down is not: nobody is to be led there
// before it was seen to stand.
func (m machine) observe(o Outcome, r rules, now time.Time) machine {
	if o == Unable {
		if m.health == router.Healthy && m.stale(r, now) {
			return machine{since: now, seen: m.seen, returned: m.returned, relapses: m.relapses}
		}
		return m
	}
	m.seen = now
	said := router.Unhealthy
	needed := r.fall
	if o == Passed {
		said, needed = router.Healthy, m.rise(r.rise)
	}
	if m.health == said {
		m.against = 0
		return m
	}
	m.against++
	if m.health != router.Unknown && m.against < needed {
		return m
	}
	next := machine{health: said, since: now, seen: now, relapses: m.relapses}
	switch stood := now.Sub(m.since); {
	case said == router.Healthy:
		next.returned = m.returned || m.health == router.Unhealthy
	case m.returned && stood < relapse:
		next.relapses = min(m.relapses+1, maxRelapses)
	default:
		next.relapses = m.relapses - int(min(stood/relapse, time.Duration(m.relapses)))
	}
	return next
}

// hurry is the part of the interval after which an address is asked again when it has just failed while it counts as
// healthy. With the defaults (5 s, 3 failures) an address that refuses connections is down 2 s after the first failure
// instead of 10 s; a fifth keeps the extra load of a flapping address bounded by five times the ordinary one.
const hurry = 5

// pause is how long to wait before the next probe, without jitter. Recovery is never hurried: up slow.
func (m machine) pause(interval time.Duration) time.Duration {
	if m.health == router.Healthy && m.against > 0 {
		return interval / hurry
	}
	return interval
}
