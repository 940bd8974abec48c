package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ownThreads is whether readers wait on threads of their own.
const ownThreads = true

// udpSocket is a socket that the runtime's poller does not know. Of a socket that it waits for, the kernel tells it whenever an answer
// has left, as there is room for another: that alone is a tenth of the cost of an answer.
type udpSocket struct {
	fd int
	at netip.AddrPort
}

// listenUDP binds n sockets to one address, among which the kernel divides clients by a hash of their address
// (SO_REUSEPORT, socket(7)): readers that share one socket would contend for its lock. The option also lets another server
// take a part of the queries without a word, so the address is bound without it first, which fails if somebody has it.
func listenUDP(network string, at netip.AddrPort, n int) (sockets []*udpSocket, err error) {
	defer func() {
		if err != nil {
			closeUDP(sockets)
		}
	}()
	alone, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	if n == 1 {
		s, err := newUDPSocket(alone)
		if err != nil {
			return nil, err
		}
		return []*udpSocket{s}, nil
	}
	if err := alone.Close(); err != nil {
		return nil, err
	}
	share := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var set error
		err := raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
		if err == nil {
			err = os.NewSyscallError("setsockopt", set)
		}
		return err
	}}
	for range n {
		conn, err := share.ListenPacket(context.Background(), network, at.String())
		if err != nil {
			return sockets, err
		}
		s, err := newUDPSocket(conn.(*net.UDPConn))
		if err != nil {
			return sockets, err
		}
		sockets = append(sockets, s)
	}
	return sockets, nil
}

// newUDPSocket makes conn, which it closes, a socket of its own.
func newUDPSocket(conn *net.UDPConn) (*udpSocket, error) {
	// More only means that the kernel gives less (net.core.rmem_max): what it gives is enough to run.
	_ = conn.SetReadBuffer(receiveBuffer)
	s := &udpSocket{fd: -1, at: conn.LocalAddr().(*net.UDPAddr).AddrPort()}
	if s.at.Addr().IsUnspecified() {
		if err := askDestination(conn, s.at.Addr().Is6()); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
	}
	raw, err := conn.SyscallConn()
	if err == nil {
		var failed error
		err = raw.Control(func(fd uintptr) { s.fd, failed = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
		err = errors.Join(err, os.NewSyscallError("fcntl", failed))
	}
	err = errors.Join(err, conn.Close())
	if err == nil { // it waits where that is asked for, and looks around now and then should it not be woken
		often := unix.NsecToTimeval(int64(time.Second))
		err = errors.Join(os.NewSyscallError("fcntl", unix.SetNonblock(s.fd, false)),
			os.NewSyscallError("setsockopt", unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &often)))
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// address is where the socket is bound.
func (s *udpSocket) address() netip.AddrPort { return s.at }

// close is for when nobody reads.
func (s *udpSocket) close() {
	if s.fd >= 0 {
		_ = unix.Close(s.fd)
	}
}

// wake ends the wait of the reader, and all later ones. Answers can still be written. Linux also shuts down sockets that are not
// connected, and then says that they are not.
func (s *udpSocket) wake() error {
	if err := unix.Shutdown(s.fd, unix.SHUT_RD); err != nil && err != unix.ENOTCONN {
		return os.NewSyscallError("shutdown", err)
	}
	return nil
}

// batchSize is how many packets one system call reads or writes. The fixed price of a call, some 200 ns, is below 1 % of
// that of 32 packets on loopback; with more, the first answer of a batch waits longer for the last.
const batchSize = 32

// message is struct mmsghdr (recvmmsg(2)).
type message struct {
	unix.Msghdr
	length uint32
}

// batch is what a reader needs for as many packets as one call brings. The kernel reads and writes it by the pointers in
// it, so it is allocated once and not copied.
type batch struct {
	in, out       [batchSize]message
	inVec, outVec [batchSize]unix.Iovec
	names         [batchSize]unix.RawSockaddrInet6 // large enough for IPv4's
	controls      [batchSize][]byte
	queries       [batchSize][]byte
	parsed        [batchSize]query
	answers       [batchSize][]byte
}

func newBatch(wildcard bool) *batch {
	b := new(batch)
	// At distances of a page the beginnings of all queries, which is all that most have, would contend for the same lines of the
	// processor's cache.
	const distance = maxQuery + 2*64
	queries := make([]byte, batchSize*distance)
	for i := range batchSize {
		b.queries[i], b.answers[i] = queries[i*distance:][:maxQuery], make([]byte, 0, ednsSize)
		b.inVec[i].Base = unsafe.SliceData(b.queries[i])
		b.inVec[i].SetLen(maxQuery)
		m := &b.in[i]
		m.Name, m.Iov = (*byte)(unsafe.Pointer(&b.names[i])), &b.inVec[i]
		m.SetIovlen(1)
		if wildcard {
			b.controls[i] = make([]byte, controlSize())
			m.Control = unsafe.SliceData(b.controls[i])
		}
		b.out[i].Iov = &b.outVec[i]
		b.out[i].SetIovlen(1)
	}
	return b
}

// answerUDP answers until ctx is done and the socket was woken, a batch at a time.
//
// The thread is the reader's own, and its calls are raw where they do not block: the scheduler need not be told of them. It would take
// the processor away during the longer ones, and hand it back later, at an eighth of the cost of an answer. What this costs others is
// that a garbage collection may have to wait for the end of a call, which is some tens of microseconds. Only when there is nothing to
// read the scheduler is told, and the thread itself waits in the kernel: see Readers.
func (s *Server) answerUDP(ctx context.Context, socket *udpSocket, w *worker) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b := newBatch(socket.at.Addr().IsUnspecified())
	for ctx.Err() == nil {
		received, errno := b.receive(socket.fd, unix.MSG_DONTWAIT)
		if errno == unix.EAGAIN {
			received, errno = b.receive(socket.fd, unix.MSG_WAITFORONE)
		}
		if errno == unix.EAGAIN {
			continue
		}
		if errno != 0 {
			s.readFailed(ctx, os.NewSyscallError("recvmmsg", errno))
			continue
		}
		// All queries are read before the first is answered, so that what their decisions look at comes from memory at the same time.
		for i := range received {
			s.read(w, &b.parsed[i], b.queries[i][:b.in[i].length], b.from(i))
		}
		s.survives(w.ready.Run)
		count := 0
		for i := range received {
			answer := s.reply(w, b.answers[i][:0], &b.parsed[i], b.from(i))
			if len(answer) > 0 {
				b.answer(count, i, answer)
				count++
			}
		}
		for first := 0; first < count; {
			first, errno = b.send(socket.fd, first, count)
			switch {
			case errno == unix.EAGAIN && !writable(socket.fd):
				w.metrics.sendErrors.Add(uint64(count - first))
				first = count
			case errno != 0 && errno != unix.EAGAIN: // of the one that the call began with
				w.metrics.sendErrors.Add(1)
				first++
			}
		}
	}
}

// writable waits until the socket takes another packet, or has not taken one for too long.
func writable(fd int) bool {
	socket := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	for {
		n, err := unix.Poll(socket[:], int(lastWrites.Milliseconds()))
		if err != unix.EINTR {
			return err == nil && n > 0
		}
	}
}

// receive reads what is there, at most a batch. With MSG_DONTWAIT it does not wait for anything, with MSG_WAITFORONE for the first packet, a second
// at most.
// An error is for the whole call.
func (b *batch) receive(fd int, flags uintptr) (count int, errno unix.Errno) {
	for i := range b.in {
		m := &b.in[i]
		m.Namelen = unix.SizeofSockaddrInet6
		m.SetControllen(len(b.controls[i]))
	}
	call := unix.RawSyscall6
	if flags&unix.MSG_DONTWAIT == 0 {
		call = unix.Syscall6
	}
	for {
		n, _, errno := call(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.in)), batchSize, flags, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		return int(n), 0
	}
}

// send writes the answers from first up to count, and returns the first that was not written. An error is that one's.
func (b *batch) send(fd, first, count int) (next int, errno unix.Errno) {
	for first < count {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.out[first])), uintptr(count-first), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return first, errno
		}
		first += int(n)
	}
	return first, 0
}

// answer makes the k-th packet to be sent the answer to the i-th that was read.
func (b *batch) answer(k, i int, answer []byte) {
	m, query := &b.out[k], &b.in[i]
	m.Name, m.Namelen = query.Name, query.Namelen
	b.outVec[k].Base = unsafe.SliceData(answer)
	b.outVec[k].SetLen(len(answer))
	control := answerFrom(b.controls[i][:query.Controllen])
	m.Control = unsafe.SliceData(control)
	m.SetControllen(len(control))
}

// from is who sent the i-th packet.
func (b *batch) from(i int) netip.AddrPort {
	n := &b.names[i]
	port := binary.BigEndian.Uint16((*[2]byte)(unsafe.Pointer(&n.Port))[:])
	if n.Family == unix.AF_INET {
		return netip.AddrPortFrom(netip.AddrFrom4((*unix.RawSockaddrInet4)(unsafe.Pointer(n)).Addr), port)
	}
	return netip.AddrPortFrom(netip.AddrFrom16(n.Addr), port)
}
