package dns

import (
	"strconv"
	"sync"
	"sync/atomic"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
)

// shards is how many copies of each counter there are: goroutines that answer count in different ones, so that processors
// do not take cache lines from each other.
const shards = 8

// counter is a counter in shards. Each shard has a cache line (64 bytes on today's processors) of its own.
type counter [shards]struct {
	n atomic.Uint64
	_ [56]byte
}

func (c *counter) sum() float64 {
	var n uint64
	for i := range c {
		n += c[i].n.Load()
	}
	return float64(n)
}

// transport is how a query came.
type transport uint8

const (
	udp transport = iota
	tcp
	transports
)

func (t transport) String() string { return [...]string{"udp", "tcp"}[t] }

// countedTypes are told apart in metrics; the last is for all others, so that random types cost no memory.
var countedTypes = [...]string{"A", "AAAA", "CNAME", "HTTPS", "NS", "SOA", "TXT", "MX", "SRV", "CAA", "ANY", "other"}

func typeIndex(qtype uint16) int {
	switch qtype {
	case mdns.TypeA:
		return 0
	case mdns.TypeAAAA:
		return 1
	case mdns.TypeCNAME:
		return 2
	case mdns.TypeHTTPS:
		return 3
	case mdns.TypeNS:
		return 4
	case mdns.TypeSOA:
		return 5
	case mdns.TypeTXT:
		return 6
	case mdns.TypeMX:
		return 7
	case mdns.TypeSRV:
		return 8
	case mdns.TypeCAA:
		return 9
	case mdns.TypeANY:
		return 10
	}
	return 11
}

// countedCodes are the rcodes that this server gives.
var countedCodes = [...]int{
	mdns.RcodeSuccess, mdns.RcodeFormatError, mdns.RcodeServerFailure, mdns.RcodeNameError, mdns.RcodeNotImplemented,
	mdns.RcodeRefused, mdns.RcodeBadVers, mdns.RcodeBadCookie,
}

func codeIndex(rcode int) int {
	switch rcode {
	case mdns.RcodeBadVers:
		return len(countedCodes) - 2
	case mdns.RcodeBadCookie:
		return len(countedCodes) - 1
	}
	return rcode // 0 to 5 are their own indexes
}

// The reasons for dropping.
const (
	dropShort    = iota // no header
	dropResponse        // QR=1
	dropInternal        // a fault of this program
	dropReasons
)

var dropNames = [dropReasons]string{"short", "response", "internal"}

// metrics holds the counters. What a query counts in is preallocated: counting allocates nothing.
type metrics struct {
	queries     [transports][len(countedTypes)][len(countedCodes)]counter
	truncated   counter
	cookies     [cookieStates]counter
	limited     [limitVerdicts]counter
	dropped     [transports][dropReasons]counter
	sendErrors  atomic.Uint64
	connections atomic.Int64
	refused     atomic.Uint64
	evicted     atomic.Uint64
	serial      atomic.Uint32
	problems    atomic.Int64
	sampler     *sampler // nil: no clients are recorded

	// decisions outlive zones: a counter never goes back, also when a replica leaves and returns.
	mu        sync.Mutex
	decisions map[[2]string]*counter
}

func newMetrics(r prometheus.Registerer, s *sampler) (*metrics, error) {
	m := &metrics{sampler: s, decisions: make(map[[2]string]*counter)}
	if r == nil {
		return m, nil
	}
	return m, r.Register(m)
}

// decision is the counter of answers that send clients to region; region is empty for those without a replica.
func (m *metrics) decision(registry, region string) *counter {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := m.decisions[[2]string{registry, region}]
	if c == nil {
		c = new(counter)
		m.decisions[[2]string{registry, region}] = c
	}
	return c
}

var (
	queriesDesc   = prometheus.NewDesc("portolan_dns_queries_total", "Queries answered.", []string{"transport", "type", "rcode"}, nil)
	decisionsDesc = prometheus.NewDesc("portolan_dns_decisions_total",
		"Answers at registries' names by the region they lead to; an empty region is an answer without one.", []string{"registry", "region"}, nil)
	truncatedDesc   = prometheus.NewDesc("portolan_dns_truncated_total", "Answers cut short for UDP.", nil, nil)
	droppedDesc     = prometheus.NewDesc("portolan_dns_dropped_total", "Packets that got no answer.", []string{"transport", "reason"}, nil)
	cookiesDesc     = prometheus.NewDesc("portolan_dns_cookies_total", "Queries with a DNS cookie by what it was worth.", []string{"state"}, nil)
	limitedDesc     = prometheus.NewDesc("portolan_dns_rate_limited_total", "UDP responses beyond the rate limit by what became of them.", []string{"action"}, nil)
	sampleLostDesc  = prometheus.NewDesc("portolan_dns_sample_lost_total", "Clients that were to be recorded, and came faster than they are counted.", nil, nil)
	sendErrorsDesc  = prometheus.NewDesc("portolan_dns_send_errors_total", "UDP answers that the kernel did not take.", nil, nil)
	connectionsDesc = prometheus.NewDesc("portolan_dns_tcp_connections", "TCP connections that are open.", nil, nil)
	refusedDesc     = prometheus.NewDesc("portolan_dns_tcp_refused_total", "TCP connections closed at once because of their number.", nil, nil)
	evictedDesc     = prometheus.NewDesc("portolan_dns_tcp_evicted_total", "Idle TCP connections closed to make room for another.", nil, nil)
	serialDesc      = prometheus.NewDesc("portolan_dns_zone_serial", "Serial of the zone that is served; 0 before the first.", nil, nil)
	problemsDesc    = prometheus.NewDesc("portolan_dns_zone_problems", "Names and records that the zone cannot serve.", nil, nil)
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{queriesDesc, decisionsDesc, truncatedDesc, cookiesDesc, limitedDesc, sampleLostDesc, droppedDesc, sendErrorsDesc, connectionsDesc, refusedDesc, evictedDesc, serialDesc, problemsDesc} {
		to <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(to chan<- prometheus.Metric) {
	send := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	for via := range transports {
		for t, name := range countedTypes {
			for c, code := range countedCodes {
				if n := m.queries[via][t][c].sum(); n > 0 {
					send(queriesDesc, prometheus.CounterValue, n, via.String(), name, rcodeName(code))
				}
			}
		}
		for reason, name := range dropNames {
			send(droppedDesc, prometheus.CounterValue, m.dropped[via][reason].sum(), via.String(), name)
		}
	}
	m.mu.Lock()
	for key, c := range m.decisions {
		send(decisionsDesc, prometheus.CounterValue, c.sum(), key[0], key[1])
	}
	m.mu.Unlock()
	send(truncatedDesc, prometheus.CounterValue, m.truncated.sum())
	for state := range cookieStates {
		send(cookiesDesc, prometheus.CounterValue, m.cookies[state].sum(), state.String())
	}
	for v := limitSlip; v < limitVerdicts; v++ {
		send(limitedDesc, prometheus.CounterValue, m.limited[v].sum(), limitNames[v])
	}
	if m.sampler != nil {
		send(sampleLostDesc, prometheus.CounterValue, float64(m.sampler.lost.Load()))
	}
	send(sendErrorsDesc, prometheus.CounterValue, float64(m.sendErrors.Load()))
	send(connectionsDesc, prometheus.GaugeValue, float64(m.connections.Load()))
	send(refusedDesc, prometheus.CounterValue, float64(m.refused.Load()))
	send(evictedDesc, prometheus.CounterValue, float64(m.evicted.Load()))
	send(serialDesc, prometheus.GaugeValue, float64(m.serial.Load()))
	send(problemsDesc, prometheus.GaugeValue, float64(m.problems.Load()))
}

func rcodeName(code int) string {
	if code == mdns.RcodeBadVers {
		return "BADVERS" // the library knows 16 as BADSIG
	}
	if name, ok := mdns.RcodeToString[code]; ok {
		return name
	}
	return strconv.Itoa(code)
}
