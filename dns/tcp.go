package dns

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// tcpServer serves the TCP connections of all addresses within one limit.
type tcpServer struct {
	*Server
	workers atomic.Int64

	mu sync.Mutex
	// open are the connections, with the time since when each has been waiting for a query; the zero time while one is under way.
	open     map[*net.TCPConn]time.Time
	clients  map[netip.Prefix]int // how many of them each client has
	draining bool
	serving  sync.WaitGroup
}

func newTCPServer(s *Server) *tcpServer {
	return &tcpServer{Server: s, open: make(map[*net.TCPConn]time.Time), clients: make(map[netip.Prefix]int)}
}

// number spreads workers over the shards of the counters.
func (t *tcpServer) number() int { return int(t.workers.Add(1)) }

// accept takes connections until ctx is done.
func (t *tcpServer) accept(ctx context.Context, l *net.TCPListener) {
	for {
		conn, err := l.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			t.troubles.Do(func() { t.log.Warn("accepting a TCP connection", zap.Error(err)) })
			select {
			case <-time.After(100 * time.Millisecond): // usually too many open files: the next ones need time to close
			case <-ctx.Done():
				return
			}
			continue
		}
		if !t.admit(conn) {
			t.responder.metrics.refused.Add(1)
			conn.Close()
			continue
		}
		go func() {
			defer t.leave(conn)
			t.serve(conn)
		}()
	}
}

// client is the network that connections are counted by: what one host has by itself.
func client(conn *net.TCPConn) netip.Prefix {
	a := conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap()
	bits := 32
	if a.Is6() {
		bits = 64
	}
	network, _ := a.WithZone("").Prefix(bits) // no address is shorter
	return network
}

// admit counts conn in, if there is room. For want of it the one that has been idle for the longest has to go, of the same client if that
// has too many, so that nobody can keep others out by a query now and then (RFC 7766, section 6.2.3).
func (t *tcpServer) admit(conn *net.TCPConn) bool {
	from := client(conn)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.draining {
		return false
	}
	if t.clients[from] >= t.options.MaxPerClient && !t.evict(func(c *net.TCPConn) bool { return client(c) == from }) {
		return false
	}
	if len(t.open) >= t.options.MaxConnections && !t.evict(func(*net.TCPConn) bool { return true }) {
		return false
	}
	t.open[conn] = time.Now()
	t.clients[from]++
	t.serving.Add(1)
	t.responder.metrics.connections.Store(int64(len(t.open)))
	return true
}

// evict closes the connection that has been idle for the longest, of those that may be. It reports whether there was one. The caller
// holds mu.
func (t *tcpServer) evict(may func(*net.TCPConn) bool) bool {
	var idle *net.TCPConn
	for conn, since := range t.open {
		if !since.IsZero() && (idle == nil || since.Before(t.open[idle])) && may(conn) {
			idle = conn
		}
	}
	if idle == nil {
		return false
	}
	idle.Close()
	t.forget(idle)
	t.responder.metrics.evicted.Add(1)
	return true
}

// forget counts conn out, unless that was done. The caller holds mu.
func (t *tcpServer) forget(conn *net.TCPConn) {
	if _, open := t.open[conn]; !open {
		return
	}
	delete(t.open, conn)
	from := client(conn)
	if t.clients[from]--; t.clients[from] == 0 {
		delete(t.clients, from)
	}
	t.responder.metrics.connections.Store(int64(len(t.open)))
}

func (t *tcpServer) leave(conn *net.TCPConn) {
	conn.Close()
	t.mu.Lock()
	t.forget(conn)
	t.mu.Unlock()
	t.serving.Done()
}

// patience is how long the next query may take to come, and an answer to be taken: less when connections get scarce (RFC 7766, section 6.2.3). The caller holds mu.
func (t *tcpServer) patience() time.Duration {
	if len(t.open) > t.options.MaxConnections/2 {
		return t.options.IdleTimeout / 10
	}
	return t.options.IdleTimeout
}

// extend gives conn time for the next query, unless the server is stopping or conn was evicted: then it is to read no more. idle is
// whether nothing of that query has come yet.
func (t *tcpServer) extend(conn *net.TCPConn, idle bool) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, open := t.open[conn]; !open || t.draining {
		return false
	}
	now := time.Now()
	if idle {
		t.open[conn] = now
	}
	return conn.SetReadDeadline(now.Add(t.patience())) == nil
}

// begin notes that a query of conn is under way. It reports false if conn was evicted.
func (t *tcpServer) begin(conn *net.TCPConn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, open := t.open[conn]; !open {
		return false
	}
	t.open[conn] = time.Time{}
	return true
}

// lastWrites is how long answers under way may take when the server stops.
const lastWrites = time.Second

// drain makes every connection end after the answer it is writing, also where the client does not take it.
func (t *tcpServer) drain() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.draining = true
	for conn := range t.open {
		// A deadline cannot fail but on a closed connection, which is on its way out anyway.
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		_ = conn.SetWriteDeadline(time.Now().Add(lastWrites))
	}
}

func (t *tcpServer) wait() { t.serving.Wait() }

// serve answers the queries of one connection, in the order they came (RFC 7766, section 7 leaves that open). Answers to
// queries that came together leave together.
func (t *tcpServer) serve(conn *net.TCPConn) {
	w := t.responder.worker(tcp, t.number())
	peer := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	in := bufio.NewReaderSize(conn, maxQuery)
	out := make([]byte, 0, 2*ednsSize)
	message := make([]byte, 0, plainSize)
	for {
		var prefix [2]byte
		// A part of a prefix says nothing about when the rest comes: answers must not wait for it.
		idle := in.Buffered() < len(prefix)
		if idle && !t.flush(conn, &out) {
			return
		}
		if !t.extend(conn, idle) {
			t.flush(conn, &out)
			return
		}
		if _, err := io.ReadFull(in, prefix[:]); err != nil {
			t.flush(conn, &out)
			return // idle for too long, evicted, or closed by the client
		}
		if idle && !t.begin(conn) {
			return
		}
		length := int(binary.BigEndian.Uint16(prefix[:]))
		// Nor does a part of a message.
		if in.Buffered() < length && !t.flush(conn, &out) {
			return
		}
		if cap(message) < length {
			message = make([]byte, 0, length)
		}
		if _, err := io.ReadFull(in, message[:length]); err != nil {
			return
		}
		begin := len(out)
		out = append(out, 0, 0)
		out = t.respond(w, out, message[:length], peer)
		if len(out) == begin+2 {
			// What is dropped over UDP is no DNS client here.
			out = out[:begin]
			t.flush(conn, &out)
			return
		}
		binary.BigEndian.PutUint16(out[begin:], uint16(len(out)-begin-2))
		if len(out) > maxMessage && !t.flush(conn, &out) {
			return
		}
	}
}

// flush sends what is waiting. A client that does not take it in time is gone.
func (t *tcpServer) flush(conn *net.TCPConn, out *[]byte) bool {
	if len(*out) == 0 {
		return true
	}
	if !t.hurry(conn) {
		return false
	}
	_, err := conn.Write(*out)
	*out = (*out)[:0]
	return err == nil
}

// hurry gives conn time for one write.
func (t *tcpServer) hurry(conn *net.TCPConn) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	limit := t.patience()
	if t.draining {
		limit = min(limit, lastWrites)
	}
	return conn.SetWriteDeadline(time.Now().Add(limit)) == nil
}
