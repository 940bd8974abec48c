//go:build !linux

package dns

import (
	"context"
	"net"
	"net/netip"
	"time"
)

// ownThreads is whether readers wait on threads of their own.
const ownThreads = false

// udpSocket is a socket of the runtime's. On other systems than Linux answers from a wildcard address leave from the address that the
// kernel prefers: list the addresses in dns.listen there.
type udpSocket struct{ conn *net.UDPConn }

// listenUDP binds at once for n readers: the kernel hands packets to one of them at a time, the others answer meanwhile.
func listenUDP(network string, at netip.AddrPort, n int) ([]*udpSocket, error) {
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	_ = conn.SetReadBuffer(receiveBuffer) // what the kernel gives is enough to run
	sockets := make([]*udpSocket, n)
	for i := range sockets {
		sockets[i] = &udpSocket{conn}
	}
	return sockets, nil
}

// address is where the socket is bound.
func (s *udpSocket) address() netip.AddrPort { return s.conn.LocalAddr().(*net.UDPAddr).AddrPort() }

// close is for when nobody reads.
func (s *udpSocket) close() { s.conn.Close() }

// wake ends the wait of the readers, and all later ones. Answers can still be written, for a while.
func (s *udpSocket) wake() error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(lastWrites)); err != nil {
		return err
	}
	return s.conn.SetReadDeadline(time.Unix(1, 0))
}

// answerUDP answers until ctx is done and the socket was woken, one packet after the other.
func (s *Server) answerUDP(ctx context.Context, socket *udpSocket, w *worker) {
	in, out := make([]byte, maxQuery), make([]byte, 0, ednsSize)
	for {
		n, from, err := socket.conn.ReadFromUDPAddrPort(in)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.readFailed(ctx, err)
			continue
		}
		if answer := s.respond(w, out, in[:n], from); len(answer) > 0 {
			if _, err := socket.conn.WriteToUDPAddrPort(answer, from); err != nil {
				w.metrics.sendErrors.Add(1)
			}
		}
	}
}
