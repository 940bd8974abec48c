package health

import (
	"time"

	"portolan/router"
)

// machine is the state of one address. It is a value: observe gives the next one.
type machine struct {
	health router.Health
	since  time.Time
	// against counts the results in a row that speak against health.
	against int
}

// settled is whether there is a state and nothing speaks against it.
func (m machine) settled() bool { return m.health != router.Unknown && m.against == 0 }

// observe folds one outcome. The first one decides at once: a start must not take Rise intervals, and there is nothing yet
// that could flap. Afterwards rise successes in a row raise, fall failures in a row fell.
func (m machine) observe(o Outcome, rise, fall int, now time.Time) machine {
	if o == Unable {
		return m
	}
	said := router.Unhealthy
	needed := fall
	if o == Passed {
		said, needed = router.Healthy, rise
	}
	if m.health == said {
		m.against = 0
		return m
	}
	m.against++
	if m.health == router.Unknown || m.against >= needed {
		return machine{health: said, since: now}
	}
	return m
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
