package dns

import (
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// listenUDP binds n sockets to one address, among which the kernel divides clients by a hash of their address
// (SO_REUSEPORT, socket(7)): readers that share one socket would contend for its lock. The option also lets another server
// take a part of the queries without a word, so the address is bound without it first, which fails if somebody has it.
func listenUDP(network string, at netip.AddrPort, n int) ([]*net.UDPConn, error) {
	alone, err := net.ListenUDP(network, net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
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
	var readers []*net.UDPConn
	for range n {
		conn, err := share.ListenPacket(context.Background(), network, at.String())
		if err != nil {
			closeUDP(readers)
			return nil, err
		}
		readers = append(readers, conn.(*net.UDPConn))
	}
	return readers, nil
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
	answers       [batchSize][]byte
}

func newBatch(wildcard bool) *batch {
	b := new(batch)
	for i := range batchSize {
		b.queries[i], b.answers[i] = make([]byte, maxQuery), make([]byte, 0, ednsSize)
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

// answerUDP answers until ctx is done, a batch at a time.
//
// The thread is the reader's own, and the calls are raw: they do not block, so that the scheduler need not be told of them.
// It would take the processor away during the longer ones, and hand it back later, at an eighth of the cost of an answer.
// Only when there is nothing to read the goroutine waits, as all do. What this costs others is that a garbage collection may
// have to wait for the end of a call, which is some tens of microseconds.
func (s *Server) answerUDP(ctx context.Context, conn *net.UDPConn, wildcard bool, w *worker) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	raw, err := conn.SyscallConn()
	if err != nil {
		s.log.Error("a UDP socket cannot be read: " + err.Error())
		return
	}
	b := newBatch(wildcard)
	var count, first int // of the call under way
	var errno unix.Errno
	receive := func(fd uintptr) bool {
		count, errno = b.receive(fd)
		return errno != unix.EAGAIN
	}
	send := func(fd uintptr) bool {
		first, errno = b.send(fd, first, count)
		return errno != unix.EAGAIN
	}
	for {
		err := raw.Read(receive)
		if err == nil && errno != 0 {
			err = os.NewSyscallError("recvmmsg", errno)
		}
		if err != nil {
			if s.readFailed(ctx, err) {
				return
			}
			continue
		}
		received := count
		count, first = 0, 0
		for i := range received {
			m := &b.in[i]
			answer := s.respond(w, b.answers[i][:0], b.queries[i][:m.length], b.from(i))
			if len(answer) > 0 {
				b.answer(count, i, answer)
				count++
			}
		}
		for first < count {
			if err := raw.Write(send); err != nil { // the end has come, and the socket takes no more
				w.metrics.sendErrors.Add(uint64(count - first))
				break
			}
			if errno != 0 && first < count {
				w.metrics.sendErrors.Add(1) // the one that the call began with
				first++
			}
		}
	}
}

// receive reads what is there, at most a batch. An error is for the whole call.
func (b *batch) receive(fd uintptr) (count int, errno unix.Errno) {
	for i := range b.in {
		m := &b.in[i]
		m.Namelen = unix.SizeofSockaddrInet6
		m.SetControllen(len(b.controls[i]))
	}
	for {
		n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, fd, uintptr(unsafe.Pointer(&b.in)), batchSize, unix.MSG_DONTWAIT, 0, 0)
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
func (b *batch) send(fd uintptr, first, count int) (next int, errno unix.Errno) {
	for first < count {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&b.out[first])), uintptr(count-first), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
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
