//go:build linux

package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"unsafe"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// junk is how many different packets a flood has.
const junk = 1 << 14

// flood is what comes beside good queries. It has a socket of its own, whose answers are read and dropped. It is for the goroutine of the
// generator.
type flood struct {
	fd      int
	packets [][]byte
	next    int

	in, out       [batchSize]message
	inVec, outVec [batchSize]unix.Iovec
	buffer        [1024]byte
}

// makeJunk makes packets that are no queries, and as many questions for random names, in turns: they are as the attacks are that servers
// see, and the same in every run.
func makeJunk() ([][]byte, error) {
	random := rand.New(rand.NewPCG(1, 2))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	label := func() string { return fmt.Sprintf("%012x", random.Uint64()&(1<<48-1)) }
	packed := func(name string) ([]byte, error) {
		m := new(mdns.Msg)
		m.SetQuestion(name, mdns.TypeA)
		m.Id = uint16(random.Uint32())
		raw, err := m.Pack()
		if err != nil {
			return nil, fmt.Errorf("packing a query: %w", err)
		}
		return raw, nil
	}
	good, err := packed(oneName)
	if err != nil {
		return nil, err
	}
	spoilt := func(spoil func(raw []byte) []byte) func() ([]byte, error) {
		return func() ([]byte, error) { return spoil(append([]byte(nil), good...)), nil }
	}
	kinds := []func() ([]byte, error){
		func() ([]byte, error) { return noise(1 + random.IntN(100)), nil },
		func() ([]byte, error) { return packed(label() + "." + zone + ".") },
		spoilt(func(raw []byte) []byte { return raw[:12+random.IntN(len(raw)-12)] }), // cut
		func() ([]byte, error) { return packed(label() + "." + oneName) },
		spoilt(func(raw []byte) []byte { raw[2] |= 0x80; return raw }), // a response
		func() ([]byte, error) { return packed(label() + ".example.org.") },
		spoilt(func(raw []byte) []byte { raw[12], raw[13] = 0xc0, 12; return raw }), // a name that points at itself
		func() ([]byte, error) { return packed(label() + "." + label() + "." + zone + ".") },
		spoilt(func(raw []byte) []byte { raw[5], raw[11] = 0xff, 0xff; return append(raw, noise(20)...) }), // counts of what is not there
		func() ([]byte, error) { return packed(label() + ".") },
	}
	list := make([][]byte, 0, junk)
	for len(list) < junk {
		raw, err := kinds[len(list)%len(kinds)]()
		if err != nil {
			return nil, err
		}
		list = append(list, raw)
	}
	return list, nil
}

func newFlood(at netip.AddrPort) (*flood, error) {
	packets, err := makeJunk()
	if err != nil {
		return nil, err
	}
	fd, err := dial(at)
	if err != nil {
		return nil, err
	}
	f := &flood{fd: fd, packets: packets}
	for i := range batchSize {
		f.inVec[i].Base = &f.buffer[0]
		f.inVec[i].SetLen(len(f.buffer))
		f.in[i].Iov, f.out[i].Iov = &f.inVec[i], &f.outVec[i]
		f.in[i].SetIovlen(1)
		f.out[i].SetIovlen(1)
	}
	return f, nil
}

func (f *flood) close() error { return unix.Close(f.fd) }

// send sends the next n packets, and drops the answers that came.
func (f *flood) send(n int) error {
	for i := range n {
		p := f.packets[f.next%junk]
		f.next++
		f.outVec[i].Base = unsafe.SliceData(p)
		f.outVec[i].SetLen(len(p))
	}
	if err := sendAll(f.fd, f.out[:n]); err != nil {
		return err
	}
	_, err := receiveSome(f.fd, &f.in)
	return err
}

// dial makes a socket for at that never waits.
func dial(at netip.AddrPort) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, os.NewSyscallError("socket", err)
	}
	// The system may give less, which holds all that is under way.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 4<<20)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}); err != nil {
		return 0, errors.Join(os.NewSyscallError("connect", err), unix.Close(fd))
	}
	return fd, nil
}

// sendAll sends the packets, however often that has to be tried.
func sendAll(fd int, packets []message) error {
	for len(packets) > 0 {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&packets[0])), uintptr(len(packets)), unix.MSG_DONTWAIT, 0, 0)
		if errno != 0 && errno != unix.EAGAIN && errno != unix.EINTR {
			return os.NewSyscallError("sendmmsg", errno)
		}
		if errno == 0 {
			packets = packets[n:]
		}
	}
	return nil
}

// receiveSome reads the packets that are there, at most a batch.
func receiveSome(fd int, packets *[batchSize]message) (int, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(packets)), batchSize, unix.MSG_DONTWAIT, 0, 0)
	switch errno {
	case 0:
		return int(n), nil
	case unix.EAGAIN, unix.EINTR:
		return 0, nil
	}
	return 0, os.NewSyscallError("recvmmsg", errno)
}
