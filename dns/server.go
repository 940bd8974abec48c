package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/time/rate"

	"portolan/router"
	"portolan/topology"
)

// Server is the authoritative server. Make it with New, bind it with Listen, tell it what to answer with Update, run it with
// Serve. Update, Reload, Problems and Addresses may be called from any goroutine at any time.
type Server struct {
	options   Options
	log       *zap.Logger
	base      *base
	responder responder
	// troubles bounds what clients can make the log hold.
	troubles rate.Sometimes

	mu         sync.Mutex // guards the sockets and what zones are compiled from
	sockets    []socket
	static     *static
	snapshot   *topology.Snapshot
	router     *router.Router
	conditions router.Conditions
	problems   []topology.Problem
}

// socket is one address of Options.Listen, bound.
type socket struct {
	udp []*udpSocket // one for each reader
	tcp *net.TCPListener
}

// New checks the options and reads the static records and the keys of cookies. The errors name the setting, or the file and line.
func New(o Options) (*Server, error) {
	b, err := newBase(&o)
	if err != nil {
		return nil, err
	}
	static, err := readStatic(o.StaticFile, b)
	if err != nil {
		return nil, err
	}
	who, err := newIdentity(&o)
	if err != nil {
		return nil, err
	}
	if err := o.RateLimit.check(); err != nil {
		return nil, fmt.Errorf("dns.rate_limit: %w", err)
	}
	keys, err := readSecrets(o.CookieSecret)
	if err != nil {
		return nil, err
	}
	if len(o.Listen) == 0 {
		return nil, errors.New("dns.listen: want at least one address with its port, as 192.0.2.53:53")
	}
	if o.MaxConnections == 0 {
		o.MaxConnections = 1024
	}
	if o.MaxPerClient == 0 {
		o.MaxPerClient = max(1, o.MaxConnections/4)
	}
	if o.IdleTimeout == 0 {
		o.IdleTimeout = 10 * time.Second
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	recorder, err := newSampler(o.Sample, o.Logger)
	if err != nil {
		return nil, fmt.Errorf("dns.sample: %w", err)
	}
	m, err := newMetrics(o.Registerer, recorder)
	if err != nil {
		return nil, fmt.Errorf("registering the metrics of the DNS server: %w", err)
	}
	s := &Server{options: o, log: o.Logger, base: b, static: static, troubles: rate.Sometimes{First: 3, Interval: time.Second}, responder: responder{
		identity: who, limiter: newLimiter(o.RateLimit, time.Now()), sampler: recorder, metrics: m, now: time.Now,
		explanations: rate.NewLimiter(explanationsPerSecond, explanationsPerSecond),
	}}
	s.responder.secrets.Store(keys)
	return s, nil
}

// Update makes the server answer from s, with r, which was made of s, and the conditions that r has. Queries under way are
// answered from one zone or the other, never from a mixture.
func (s *Server) Update(t *topology.Snapshot, r *router.Router, conditions router.Conditions) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.snapshot, s.router, s.conditions = t, r, conditions
	s.swap()
}

// Reload reads the static records and the keys of cookies again. What of them cannot be used stays as it was, and is in the
// error.
func (s *Server) Reload() error {
	return errors.Join(s.reloadStatic(), s.reloadSecrets())
}

func (s *Server) reloadSecrets() error {
	if s.options.CookieSecret == "" {
		return nil // the random one is good for as long as the process
	}
	keys, err := readSecrets(s.options.CookieSecret)
	if err != nil {
		return err
	}
	s.responder.secrets.Store(keys)
	return nil
}

func (s *Server) reloadStatic() error {
	static, err := readStatic(s.options.StaticFile, s.base)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.static = static
	if s.snapshot != nil {
		s.swap()
	}
	return nil
}

// swap compiles and publishes a zone. The caller holds mu.
func (s *Server) swap() {
	z, problems := s.base.compile(s.snapshot, s.router, s.conditions, s.static, s.responder.metrics)
	s.responder.zone.Store(z)
	s.responder.metrics.serial.Store(z.serial)
	s.responder.metrics.problems.Store(int64(len(problems)))
	for _, p := range problems {
		known := false
		for _, old := range s.problems {
			known = known || old == p
		}
		if !known {
			s.log.Warn("cannot be served", zap.String("key", p.Key), zap.String("value", p.Value), zap.String("reason", p.Reason), zap.String("effect", p.Effect))
		}
	}
	s.problems = problems
}

// Problems are the names and records that cannot be served, and why.
func (s *Server) Problems() []topology.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problems
}

// Listen binds all addresses, UDP and TCP, or none. A busy port is an error, also where one is shared among readers.
func (s *Server) Listen() error {
	var sockets []socket
	for _, at := range s.options.Listen {
		bound, err := bind(at)
		if err != nil {
			closeAll(sockets)
			return err
		}
		sockets = append(sockets, bound)
	}
	s.setSockets(sockets)
	return nil
}

func (s *Server) setSockets(sockets []socket) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.sockets = sockets
}

// Addresses are the addresses that Listen bound, with their real ports; none before, and none after Serve.
func (s *Server) Addresses() []netip.AddrPort {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]netip.AddrPort, 0, len(s.sockets))
	for _, k := range s.sockets {
		list = append(list, k.udp[0].address())
	}
	return list
}

// Readers is how many threads read UDP, after Listen. While they answer, and for a while when they wait, each has one of the runtime's
// processors (GOMAXPROCS) to itself: so that others need not wait for the runtime's monitor to take it, every 10 ms, there should be as
// many more. It is zero where the readers wait as all goroutines do.
func (s *Server) Readers() int {
	if !ownThreads {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, k := range s.sockets {
		n += len(k.udp)
	}
	return n
}

func closeAll(sockets []socket) {
	for _, k := range sockets {
		closeUDP(k.udp)
		k.tcp.Close()
	}
}

func closeUDP(sockets []*udpSocket) {
	for _, u := range sockets {
		u.close()
	}
}

// receiveBuffer is what is asked for to hold queries while the server is busy. A small packet takes about 1 kB of it: 4 MB is
// 40 ms of 100,000 queries a second, longer than a garbage collection or a compilation keeps a processor; a second's worth
// would only make answers that come too late.
const receiveBuffer = 4 << 20

// bindAttempts is how often a port that the kernel chose for TCP is tried for UDP.
const bindAttempts = 16

func bind(at netip.AddrPort) (socket, error) {
	at = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
	// The families are bound apart, so that 0.0.0.0 and :: can stand side by side.
	family := "4"
	if at.Addr().Is6() {
		family = "6"
	}
	for attempt := 1; ; attempt++ {
		l, err := net.ListenTCP("tcp"+family, net.TCPAddrFromAddrPort(at))
		if err != nil {
			return socket{}, bindError(at, "TCP", err)
		}
		real := netip.AddrPortFrom(at.Addr(), l.Addr().(*net.TCPAddr).AddrPort().Port())
		readers, err := listenUDP("udp"+family, real, runtime.GOMAXPROCS(0))
		if err != nil {
			l.Close()
			if at.Port() == 0 && attempt < bindAttempts && errors.Is(err, syscall.EADDRINUSE) {
				continue
			}
			return socket{}, bindError(real, "UDP", err)
		}
		return socket{udp: readers, tcp: l}, nil
	}
}

// bindError says what to do about a port that cannot be had.
func bindError(at netip.AddrPort, protocol string, err error) error {
	advice := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		flag := strings.ToLower(protocol[:1])
		advice = fmt.Sprintf(": another program has it; \"ss -l%snp sport = :%d\" names it (on port 53 often systemd-resolved: listen on one address instead of all, or set DNSStubListener=no)", flag, at.Port())
	case errors.Is(err, syscall.EACCES):
		advice = ": ports below 1024 need root or the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		advice = ": this machine has no such address"
	}
	return fmt.Errorf("dns.listen: binding %v for %s: %w%s", at, protocol, err, advice)
}

// Serve answers queries until ctx is done, then stops taking new ones, lets the answers under way out and returns nil. It
// may be called once, after Listen.
func (s *Server) Serve(ctx context.Context) error {
	s.mu.Lock()
	sockets := s.sockets
	s.mu.Unlock()
	if len(sockets) == 0 {
		return errors.New("serving DNS: Listen was not called")
	}
	if s.responder.sampler != nil {
		// It ends after those that hand it clients.
		recording, stop := context.WithCancel(context.Background())
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.responder.sampler.run(recording)
		}()
		defer func() { stop(); <-ended }()
	}
	var loops sync.WaitGroup
	t := newTCPServer(s)
	for _, k := range sockets {
		for _, u := range k.udp {
			w := s.responder.worker(udp, t.number())
			loops.Go(func() { s.answerUDP(ctx, u, w) })
		}
		loops.Go(func() { t.accept(ctx, k.tcp) })
	}
	<-ctx.Done()
	for _, k := range sockets {
		k.tcp.Close()
		for _, u := range k.udp {
			if err := u.wake(); err != nil {
				s.log.Error("a UDP socket cannot be stopped", zap.Error(err))
			}
		}
	}
	t.drain()
	loops.Wait()
	t.wait()
	s.setSockets(nil)
	closeAll(sockets)
	return nil
}

// maxQuery is the longest query that is read. Queries with every option in use stay under 600 bytes.
const maxQuery = 4096

// readFailed pauses after a read that failed, so that whatever it is does not spin.
func (s *Server) readFailed(ctx context.Context, err error) {
	s.troubles.Do(func() { s.log.Warn("reading UDP queries", zap.Error(err)) })
	select {
	case <-time.After(10 * time.Millisecond):
	case <-ctx.Done():
	}
}

// respond has w answer, as far as that finds no fault: then the answer is dst as it was.
func (s *Server) respond(w *worker, dst, message []byte, from netip.AddrPort) []byte {
	answer := dst
	if !s.survives(func() { answer = w.respond(dst, message, from) }) {
		w.metrics.dropped[w.via][dropInternal][w.shard].n.Add(1)
	}
	return answer
}

// read parses one query of a batch and prepares its decision. One that finds a fault is not answered.
func (s *Server) read(w *worker, q *query, message []byte, from netip.AddrPort) {
	if !s.survives(func() { q.parse(message); w.prepare(q, from) }) {
		q.answered, q.drop = false, dropInternal
	}
}

// reply is respond for a query that was read.
func (s *Server) reply(w *worker, dst []byte, q *query, from netip.AddrPort) []byte {
	answer := dst
	if !s.survives(func() { answer = w.reply(dst, q, from) }) {
		w.metrics.dropped[w.via][dropInternal][w.shard].n.Add(1)
	}
	return answer
}

// survives runs f and keeps a fault of the program that a query found from taking the service down: it is logged, and costs that query
// its answer. It reports whether there was none.
func (s *Server) survives(f func()) (well bool) {
	defer func() {
		if fault := recover(); fault != nil {
			s.troubles.Do(func() {
				s.log.Error("a query found a fault in the DNS server; it got no answer", zap.Any("fault", fault), zap.Stack("stack"))
			})
		}
	}()
	f()
	return true
}
