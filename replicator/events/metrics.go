package events

import (
	"errors"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the handler's counters, and the spool's state as it is when asked.
type metrics struct {
	requests *prometheus.CounterVec
	events   *prometheus.CounterVec
}

var (
	depthDesc = prometheus.NewDesc("portolan_events_spool_items",
		"Items that wait in the event spool or are being worked on.", []string{"registry", "region"}, nil)
	ageDesc = prometheus.NewDesc("portolan_events_spool_oldest_seconds",
		"Age of the oldest item in the event spool.", []string{"registry", "region"}, nil)
)

func newMetrics(reg prometheus.Registerer, spool *Spool) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "portolan_events_requests_total",
			Help: "Event messages by result: accepted, unauthorized, malformed, unsupported, too_large, unavailable, not_found.",
		}, []string{"result"}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "portolan_events_received_total",
			Help: "Events by kind: push, delete, ignored (of no interest), invalid (impossible names), oversize (message too large, replica marked).",
		}, []string{"registry", "region", "kind"}),
	}
	for _, status := range []int{http.StatusAccepted, http.StatusUnauthorized, http.StatusBadRequest, http.StatusUnsupportedMediaType,
		http.StatusRequestEntityTooLarge, http.StatusServiceUnavailable, http.StatusNotFound} {
		m.requests.WithLabelValues(result(status)) // from 0 on: the increase by the first one is seen
	}
	return m, errors.Join(reg.Register(m.requests), reg.Register(m.events), reg.Register(spoolCollector{spool}))
}

// result is the label of a status: few, whatever strangers send.
func result(status int) string {
	switch status {
	case http.StatusAccepted:
		return "accepted"
	case http.StatusUnauthorized:
		return "unauthorized"
	case http.StatusBadRequest:
		return "malformed"
	case http.StatusUnsupportedMediaType:
		return "unsupported"
	case http.StatusRequestEntityTooLarge:
		return "too_large"
	case http.StatusServiceUnavailable:
		return "unavailable"
	default:
		return "not_found"
	}
}

type spoolCollector struct{ spool *Spool }

func (c spoolCollector) Describe(out chan<- *prometheus.Desc) {
	out <- depthDesc
	out <- ageDesc
}

func (c spoolCollector) Collect(out chan<- prometheus.Metric) {
	for _, r := range c.spool.replicas() {
		out <- prometheus.MustNewConstMetric(depthDesc, prometheus.GaugeValue, float64(c.spool.Pending(r[0], r[1])), r[0], r[1])
		// An error here is one of the file; Take reports it to who can act on it.
		if oldest, err := c.spool.Oldest(r[0], r[1]); err == nil && !oldest.IsZero() {
			out <- prometheus.MustNewConstMetric(ageDesc, prometheus.GaugeValue, time.Since(oldest).Seconds(), r[0], r[1])
		}
	}
}
