package distribution

import (
	"net/http"
	"sync"
	"time"
)

// clock estimates the registry's clock by the Date of its answers (RFC 9110, section 6.6.1). A Date of whole seconds D, made
// between our sending s and our receipt r, says that the offset lies between D-r and D+1s-s. Many answers intersect
// to far less than the second that one of them leaves open: Marzullo's idea, with one source and many readings.
type clock struct {
	mu       sync.Mutex
	low, top time.Duration
	at       time.Time
}

// drift is how fast two clocks part: 100 ppm covers what undisciplined quartz does (RFC 5905 assumes 15 ppm for disciplined ones).
const drift = 100e-6

func (c *clock) observe(h http.Header, sent, received time.Time) {
	if h.Get("Age") != "" {
		return // from a cache: an old date
	}
	date, err := http.ParseTime(h.Get("Date"))
	if err != nil {
		return
	}
	low, top := date.Sub(received), date.Add(time.Second).Sub(sent)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.at.IsZero() {
		widen := time.Duration(float64(received.Sub(c.at).Abs()) * drift)
		if l, t := max(low, c.low-widen), min(top, c.top+widen); l <= t {
			low, top = l, t
		} // else one of the clocks was set: the past says nothing any more
	}
	c.low, c.top, c.at = low, top, received
}

// ClockOffset is how far the registry's clock is ahead of ours, to within uncertainty either way. Known is false until an answer
// with a date has come.
func (c *Client) ClockOffset() (offset, uncertainty time.Duration, known bool) {
	c.clock.mu.Lock()
	defer c.clock.mu.Unlock()
	if c.clock.at.IsZero() {
		return 0, 0, false
	}
	return (c.clock.low + c.clock.top) / 2, (c.clock.top - c.clock.low) / 2, true
}
