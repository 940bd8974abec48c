package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// maxConnections bounds a proxy's goroutines: three for each connection.
	maxConnections = 1024
	// A direction of a connection holds at most queueLength chunks of chunkSize bytes:
	// 1 MiB, the product of 100 Mbit/s and 80 ms, so that a full queue neither starves
	// such a link nor delays the other connections on it by seconds.
	chunkSize   = 16 << 10
	queueLength = 64
	dialTimeout = 10 * time.Second
)

// ProxyConfig says where a proxy listens and where it leads to.
type ProxyConfig struct {
	Listen     string // host:port; port 0 reserves one; "" is 127.0.0.1:0
	Target     string // host:port, dialled anew for every connection
	Conditions Conditions
}

// Conditions are what a proxy does to a link. The zero value passes everything on at once.
// Up is from the client to the target, down the other way.
type Conditions struct {
	// Latency is added to each direction. A new connection costs one round trip of it
	// first, as a handshake over such a link does.
	Latency time.Duration
	// Bandwidth in bytes per second of each direction, shared by all connections in the
	// order in which their bytes arrive; 0 is without limit.
	Bandwidth int64
	// CutUp and CutDown reset a connection after it passed that many bytes in that
	// direction; 0 is never. A connection that is beyond the count when it is set is reset
	// at its next byte.
	CutUp, CutDown int64
	// Stall keeps connections open, and accepts new ones, but passes nothing on.
	Stall bool
	// Refuse resets the open connections and stops listening, so that new ones are
	// refused.
	Refuse bool
}

// Traffic is what a proxy has passed on since its start.
type Traffic struct {
	Connections int64 // accepted
	Up, Down    int64 // bytes
}

// Proxy is a TCP proxy that makes a link slow, thin or broken. Its methods may be called
// from several goroutines.
type Proxy struct {
	address string
	target  string
	port    *port // nil when the address was given
	slots   chan struct{}
	up      link
	down    link
	traffic struct{ connections, up, down atomic.Int64 }
	running sync.WaitGroup

	mu       sync.Mutex
	state    *conditionsInForce
	listener net.Listener // nil while refusing
	open     map[*passage]struct{}
	closed   bool
}

// conditionsInForce is immutable but for its channel, which is closed when it is replaced.
type conditionsInForce struct {
	Conditions
	replaced chan struct{}
}

// StartProxy starts a proxy. The caller must Close it.
func StartProxy(config ProxyConfig) (*Proxy, error) {
	listen, reserved, err := address(config.Listen)
	if err != nil {
		return nil, fmt.Errorf("starting a proxy: %w", err)
	}
	p := &Proxy{
		address: listen,
		target:  config.Target,
		port:    reserved,
		slots:   make(chan struct{}, maxConnections),
		state:   &conditionsInForce{replaced: make(chan struct{})},
		open:    map[*passage]struct{}{},
	}
	// Listened on even when it is to refuse at first: a taken address must not go unnoticed.
	err = p.Set(Conditions{})
	if err == nil {
		err = p.Set(config.Conditions)
	}
	if err != nil {
		_ = p.Close() // the reason is in err
		return nil, err
	}
	return p, nil
}

// Addr returns the host:port that clients connect to.
func (p *Proxy) Addr() string { return p.address }

// Set replaces the conditions, for open connections too. Bytes already on their way keep
// the delay that they were given.
func (p *Proxy) Set(c Conditions) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return fmt.Errorf("setting the conditions of proxy %s: %w", p.address, net.ErrClosed)
	}
	switch {
	case c.Refuse:
		p.refuse()
		p.reset()
	case p.listener == nil:
		listener, err := net.Listen("tcp", p.address)
		if err != nil {
			return fmt.Errorf("setting the conditions of proxy %s: %w", p.address, err)
		}
		p.listener = listener
		p.running.Add(1)
		go p.accept(listener)
	}
	close(p.state.replaced)
	p.state = &conditionsInForce{Conditions: c, replaced: make(chan struct{})}
	return nil
}

// Reset resets the open connections. New ones are accepted.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reset()
}

// Traffic returns what has passed so far.
func (p *Proxy) Traffic() Traffic {
	return Traffic{Connections: p.traffic.connections.Load(), Up: p.traffic.up.Load(), Down: p.traffic.down.Load()}
}

// Close resets the open connections and returns when every goroutine has ended.
func (p *Proxy) Close() error {
	p.mu.Lock()
	already := p.closed
	p.closed = true
	p.refuse()
	p.reset()
	p.mu.Unlock()
	p.running.Wait()
	if already || p.port == nil {
		return nil
	}
	return p.port.release()
}

func (p *Proxy) refuse() {
	if p.listener != nil {
		_ = p.listener.Close() // it can only say that it was closed
		p.listener = nil
	}
}

func (p *Proxy) reset() {
	for c := range p.open {
		c.cancel()
	}
}

func (p *Proxy) inForce() *conditionsInForce {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state
}

// accept serves one listener until it is closed.
func (p *Proxy) accept(listener net.Listener) {
	defer p.running.Done()
	for {
		client, err := listener.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// That client went away, or descriptors are short.
			time.Sleep(10 * time.Millisecond)
			continue
		}
		select {
		case p.slots <- struct{}{}:
		default:
			abort(client)
			continue
		}
		c := &passage{proxy: p, client: client.(*net.TCPConn)}
		c.ctx, c.cancel = context.WithCancel(context.Background())
		p.mu.Lock()
		if p.listener != listener { // closed in the meantime: nobody would reset it
			p.mu.Unlock()
			c.cancel()
			abort(client)
			<-p.slots
			return
		}
		p.open[c] = struct{}{}
		p.running.Add(1)
		p.mu.Unlock()
		p.traffic.connections.Add(1)
		go c.run()
	}
}

// passage is one connection through the proxy. Cancelling its context resets both ends.
type passage struct {
	proxy  *Proxy
	client *net.TCPConn
	ctx    context.Context
	cancel context.CancelFunc
}

func (c *passage) run() {
	p := c.proxy
	defer p.running.Done()
	defer func() {
		c.cancel()
		p.mu.Lock()
		delete(p.open, c)
		p.mu.Unlock()
		<-p.slots
	}()

	if c.wait(time.Now().Add(2*p.inForce().Latency)) != nil {
		abort(c.client)
		return
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(c.ctx, "tcp", p.target)
	if err != nil {
		abort(c.client) // a proxy cannot refuse a connection that it has accepted
		return
	}
	target := conn.(*net.TCPConn)

	var watcher, ways sync.WaitGroup
	watcher.Go(func() {
		<-c.ctx.Done()
		abort(c.client)
		abort(target)
	})
	ways.Go(func() {
		c.carry(target, c.client, &p.up, &p.traffic.up, func(s *conditionsInForce) int64 { return s.CutUp })
	})
	ways.Go(func() {
		c.carry(c.client, target, &p.down, &p.traffic.down, func(s *conditionsInForce) int64 { return s.CutDown })
	})
	ways.Wait()
	if c.ctx.Err() == nil {
		_ = c.client.Close() // both ways have ended in order
		_ = target.Close()
	}
	c.cancel()
	watcher.Wait()
}

// chunk is bytes on their way: they arrive when they are due.
type chunk struct {
	data []byte
	due  time.Time
	last bool // the connection is cut behind it
}

// carry carries one direction to its end: a half-close is passed on, an error or a cut
// resets both ends.
func (c *passage) carry(to, from *net.TCPConn, l *link, count *atomic.Int64, limit func(*conditionsInForce) int64) {
	queue := make(chan chunk, queueLength)
	var reader sync.WaitGroup
	reader.Go(func() {
		defer close(queue)
		var seen int64
		for {
			buffer := make([]byte, chunkSize)
			n, err := from.Read(buffer)
			now, s := time.Now(), c.proxy.inForce()
			next := chunk{data: buffer[:n]}
			if cut := limit(s); cut > 0 && seen+int64(n) >= cut {
				next.data, next.last = buffer[:max(0, cut-seen)], true
			}
			seen += int64(n)
			if n > 0 {
				next.due = l.pass(now, len(next.data), s.Bandwidth).Add(s.Latency)
				select {
				case queue <- next:
				case <-c.ctx.Done():
					return
				}
			}
			if next.last {
				return
			}
			if err != nil {
				if err != io.EOF {
					c.cancel()
				}
				return
			}
		}
	})
	defer reader.Wait()
	for next := range queue {
		if c.wait(next.due) != nil {
			return
		}
		n, err := to.Write(next.data)
		count.Add(int64(n))
		if err != nil || next.last {
			c.cancel()
			return
		}
	}
	if c.ctx.Err() == nil && to.CloseWrite() != nil {
		c.cancel()
	}
}

// wait returns when the time has come and the link is not stalled.
func (c *passage) wait(until time.Time) error {
	if d := time.Until(until); d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
	}
	for {
		s := c.proxy.inForce()
		if !s.Stall {
			return c.ctx.Err()
		}
		select {
		case <-s.replaced:
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
	}
}

// link is one direction of the line that all connections share: bytes leave it one after
// the other.
type link struct {
	mu   sync.Mutex
	free time.Time // when the last byte so far has left
}

// pass returns when n bytes that arrive now have left a line of that many bytes per second.
func (l *link) pass(now time.Time, n int, bandwidth int64) time.Time {
	if bandwidth <= 0 {
		return now
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.free.Before(now) {
		l.free = now
	}
	l.free = l.free.Add(time.Duration(float64(n) / float64(bandwidth) * float64(time.Second)))
	return l.free
}

// abort closes a connection with a reset, not with an orderly end.
func abort(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is closed
	}
	_ = conn.Close()
}
