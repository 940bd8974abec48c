package replicator

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"portolan/topology"
)

// metrics are the replicator's. All are labelled with the registry, and with the region but where it says otherwise.
type metrics struct {
	decisions *prometheus.CounterVec
	copies    *prometheus.CounterVec
	bytes     *prometheus.CounterVec
	blobs     *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	heard     *prometheus.HistogramVec
	scans     *prometheus.HistogramVec
	pending   *prometheus.GaugeVec
	lag       *prometheus.GaugeVec
	parked    *prometheus.GaugeVec
	unread    *prometheus.GaugeVec
	conflicts *prometheus.GaugeVec
	ready     *prometheus.GaugeVec
	damaged   *prometheus.GaugeVec // of a registry
}

func newMetrics(registerer prometheus.Registerer) (*metrics, error) {
	replica := []string{"registry", "region"}
	seconds := []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800}
	name := func(n string) string { return "portolan_replicator_" + n }
	counter := func(n, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name(n), Help: help}, append(labels[:0:0], append(replica, labels...)...))
	}
	gauge := func(n, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name(n), Help: help}, replica)
	}
	histogram := func(n, help string, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name(n), Help: help, Buckets: seconds}, append(labels[:0:0], append(replica, labels...)...))
	}
	m := &metrics{
		decisions: counter("observations_total", "Observations of tags and manifests, by what they meant.", "verdict"),
		copies:    counter("copies_total", "Attempts to bring a tag or manifest to the replica, by result.", "result"),
		bytes:     counter("bytes_total", "Bytes of blobs read from sources and written to the replica.", "direction"),
		blobs:     counter("blobs_total", "Blobs of finished copies, by the way they came to be there.", "way"),
		duration:  histogram("copy_duration_seconds", "Time that bringing one tag or manifest took, when it succeeded."),
		heard:     histogram("event_delay_seconds", "Time from the receipt of an event to its decision."),
		scans:     histogram("scan_duration_seconds", "Time that a scan took.", "result"),
		pending:   gauge("pending", "Versions still to be applied."),
		lag:       gauge("lag_seconds", "Age of the oldest version still to be applied; 0 if there is none."),
		parked:    gauge("not_replicable", "Versions that can never be applied to the replica."),
		unread:    gauge("unreadable", "Tags and manifests that cannot be read at the replica."),
		conflicts: gauge("conflicts", "Lost versions that are kept under a tag of their own."),
		ready:     gauge("ready", "1 if the replica's status is Ready."),
		damaged: prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name("damaged_records"),
			Help: "Records of the ledger that cannot be read and wait to be decided anew."}, []string{"registry"}),
	}
	for _, c := range []prometheus.Collector{m.decisions, m.copies, m.bytes, m.blobs, m.duration, m.heard, m.scans, m.pending, m.lag, m.parked, m.unread, m.conflicts, m.ready, m.damaged} {
		if err := registerer.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// result is the label of an outcome.
func result(err error) string {
	var never *NotReplicableError
	var unavailable *UnavailableError
	switch {
	case err == nil:
		return "done"
	case errors.As(err, &never):
		return "not-replicable"
	case errors.As(err, &unavailable):
		return "unavailable"
	case errors.Is(err, errAgain), errors.Is(err, errPush):
		return "again"
	}
	return "failed"
}

func (m *metrics) copied(registry, region string, cost Transfer, err error, began time.Time) {
	m.copies.WithLabelValues(registry, region, result(err)).Inc()
	m.bytes.WithLabelValues(registry, region, "read").Add(float64(cost.BytesRead))
	m.bytes.WithLabelValues(registry, region, "written").Add(float64(cost.BytesWritten))
	m.blobs.WithLabelValues(registry, region, "uploaded").Add(float64(cost.Uploaded))
	m.blobs.WithLabelValues(registry, region, "mounted").Add(float64(cost.Mounted))
	m.blobs.WithLabelValues(registry, region, "present").Add(float64(cost.Present))
	if err == nil {
		m.duration.WithLabelValues(registry, region).Observe(time.Since(began).Seconds())
	}
}

func (m *metrics) state(registry, region string, s topology.Replication) {
	m.pending.WithLabelValues(registry, region).Set(float64(s.Pending))
	m.parked.WithLabelValues(registry, region).Set(float64(s.NotReplicable))
	m.unread.WithLabelValues(registry, region).Set(float64(s.Unreadable))
	m.conflicts.WithLabelValues(registry, region).Set(float64(s.Conflicts))
	lag, ready := 0.0, 0.0
	if !s.OldestPending.IsZero() {
		lag = time.Since(s.OldestPending).Seconds()
	}
	if s.Status == topology.Ready {
		ready = 1
	}
	m.lag.WithLabelValues(registry, region).Set(lag)
	m.ready.WithLabelValues(registry, region).Set(ready)
}

// forgetState drops what tells of a replica's state: this process no longer knows it.
func (m *metrics) forgetState(registry, region string) {
	for _, g := range m.gauges() {
		g.DeleteLabelValues(registry, region)
	}
}

// forget drops every series of a replica that is no more.
func (m *metrics) forget(registry, region string) {
	m.forgetState(registry, region)
	labels := prometheus.Labels{"registry": registry, "region": region}
	for _, v := range []interface {
		DeletePartialMatch(prometheus.Labels) int
	}{m.decisions, m.copies, m.bytes, m.blobs, m.duration, m.heard, m.scans} {
		v.DeletePartialMatch(labels)
	}
}

func (m *metrics) gauges() []*prometheus.GaugeVec {
	return []*prometheus.GaugeVec{m.pending, m.lag, m.parked, m.unread, m.conflicts, m.ready}
}
