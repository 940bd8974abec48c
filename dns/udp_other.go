//go:build !linux

package dns

import (
	"context"
	"net"
	"net/netip"
)

// listenUDP binds at once for n readers: the kernel hands packets to one of them at a time, the others answer meanwhile.
func listenUDP(network string, at netip.AddrPort, n int) ([]*net.UDPConn, error) {
	conn, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	readers := make([]*net.UDPConn, n)
	for i := range readers {
		readers[i] = conn
	}
	return readers, nil
}

// answerUDP answers until ctx is done, one packet after the other.
func (s *Server) answerUDP(ctx context.Context, conn *net.UDPConn, wildcard bool, w *worker) {
	in, out := make([]byte, maxQuery), make([]byte, 0, ednsSize)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(in)
		if err != nil {
			if s.readFailed(ctx, err) {
				return
			}
			continue
		}
		if answer := s.respond(w, out, in[:n], from); len(answer) > 0 {
			if _, err := conn.WriteToUDPAddrPort(answer, from); err != nil {
				w.metrics.sendErrors.Add(1)
			}
		}
	}
}
