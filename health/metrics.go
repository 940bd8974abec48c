package health

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"portolan/router"
)

type metrics struct {
	up       *prometheus.GaugeVec
	expiry   *prometheus.GaugeVec
	results  *prometheus.CounterVec
	latency  *prometheus.HistogramVec
	faults   *prometheus.CounterVec
	voters   prometheus.Gauge
	outvoted *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	address := []string{"registry", "region", "address"}
	m := &metrics{
		up: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "portolan_health_up", Help: "Whether this server's probes find an address healthy (1) or not (0); absent while unknown.",
		}, address),
		expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "portolan_health_certificate_expiry_timestamp_seconds",
			Help: "End of validity of the certificate that an address serves for a client name.",
		}, append(address[:3:3], "name")),
		results: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "portolan_health_probes_total", Help: "Probes by what they said.",
		}, append(address[:2:2], "outcome")),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "portolan_health_probe_duration_seconds", Help: "How long probes took, over all client names.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2, 5, 10},
		}, address[:2]),
		faults: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "portolan_health_probe_faults_total", Help: "Probes that panicked, or did not end in their time and were given up.",
		}, append(address[:2:2], "kind")),
		voters: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "portolan_health_voters", Help: "Servers that are heard voting, this one included; 0 where there are no votes.",
		}),
		outvoted: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "portolan_health_outvoted", Help: "Addresses of a replica for which the votes of other servers count against the probes of this one.",
		}, address[:2]),
	}
	if r != nil {
		r.MustRegister(m.up, m.expiry, m.results, m.latency, m.faults, m.voters, m.outvoted)
	}
	return m
}

func (m *metrics) record(t *target, r Result, state machine) {
	m.results.WithLabelValues(t.Registry, t.Region, r.Outcome.String()).Inc()
	m.latency.WithLabelValues(t.Registry, t.Region).Observe(r.Latency.Seconds())
	for _, c := range r.Certificates {
		m.expiry.WithLabelValues(t.Registry, t.Region, t.label(), c.Name).Set(float64(c.Expiry.Unix()))
	}
	m.state(t, state)
}

func (m *metrics) fault(t *target, kind string) {
	m.faults.WithLabelValues(t.Registry, t.Region, kind).Inc()
}

// votes shows who is heard, and where this server is outvoted.
func (m *metrics) votes(v *Verdicts) {
	if v.Voters == nil {
		return
	}
	fresh := 0
	for _, voter := range v.Voters {
		if voter.Fresh {
			fresh++
		}
	}
	m.voters.Set(float64(fresh))
	for key, verdict := range v.Replicas {
		n := 0
		for _, a := range verdict.Addresses {
			if a.Outvoted() {
				n++
			}
		}
		m.outvoted.WithLabelValues(key.Registry, key.Region).Set(float64(n))
	}
}

func (m *metrics) state(t *target, state machine) {
	switch state.health {
	case router.Healthy:
		m.up.WithLabelValues(t.Registry, t.Region, t.label()).Set(1)
	case router.Unhealthy:
		m.up.WithLabelValues(t.Registry, t.Region, t.label()).Set(0)
	default:
		m.up.DeleteLabelValues(t.Registry, t.Region, t.label())
	}
}

func (m *metrics) forget(t *target) {
	m.up.DeleteLabelValues(t.Registry, t.Region, t.label())
	m.expiry.DeletePartialMatch(prometheus.Labels{"registry": t.Registry, "region": t.Region, "address": t.label()})
}

// forgetNames drops what is kept of the client names of t but for those that stay.
func (m *metrics) forgetNames(t *target, stay []string) {
	for _, name := range t.names {
		if !slices.Contains(stay, name) {
			m.expiry.DeleteLabelValues(t.Registry, t.Region, t.label(), name)
		}
	}
}

// forgetReplica drops what is kept per replica, once nothing of it is probed any more.
func (m *metrics) forgetReplica(k router.ReplicaKey) {
	for o := Unable; o <= Passed; o++ {
		m.results.DeleteLabelValues(k.Registry, k.Region, o.String())
	}
	m.latency.DeleteLabelValues(k.Registry, k.Region)
	m.faults.DeletePartialMatch(prometheus.Labels{"registry": k.Registry, "region": k.Region})
	m.outvoted.DeleteLabelValues(k.Registry, k.Region)
}

// label is the address, or the host name, or says that it is the canary.
func (t *target) label() string {
	if t.canary {
		return "canary"
	}
	if t.address.IsValid() {
		return t.address.String()
	}
	return t.hostname
}
