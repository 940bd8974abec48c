package dns

import (
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket bound to the wildcard address answers from whatever address the kernel prefers for the way back, which on a
// machine with several need not be the one that was asked; resolvers drop such answers. So the kernel is asked to tell with
// each query where it was sent to, and told with each answer to send from there.

// controlSize is the room that the control message of either family needs.
func controlSize() int {
	return unix.CmsgSpace(max(unix.SizeofInet4Pktinfo, unix.SizeofInet6Pktinfo))
}

// askDestination makes the kernel tell where packets were sent to.
func askDestination(conn *net.UDPConn, v6 bool) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return fmt.Errorf("asking for the destination of packets: %w", err)
	}
	var set error
	err = raw.Control(func(fd uintptr) {
		if v6 {
			set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_RECVPKTINFO, 1)
		} else {
			set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_PKTINFO, 1)
		}
	})
	if err == nil {
		err = set
	}
	if err != nil {
		return fmt.Errorf("asking for the destination of packets: %w", err)
	}
	return nil
}

// answerFrom turns the control message of a query into that of its answer, in place: the same addresses, but leaving the
// interface to the routing table, except for link-local addresses, which mean nothing without it (ip(7), ipv6(7)).
func answerFrom(control []byte) []byte {
	if len(control) < unix.SizeofCmsghdr {
		return nil
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(control)))
	data := control[unix.CmsgLen(0):]
	switch {
	case h.Level == unix.IPPROTO_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
		(*unix.Inet4Pktinfo)(unsafe.Pointer(unsafe.SliceData(data))).Ifindex = 0
	case h.Level == unix.IPPROTO_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
		info := (*unix.Inet6Pktinfo)(unsafe.Pointer(unsafe.SliceData(data)))
		if info.Addr[0] != 0xfe || info.Addr[1]&0xc0 != 0x80 {
			info.Ifindex = 0
		}
	default:
		return nil
	}
	return control
}
