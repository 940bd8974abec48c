package bed

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// port is a port number that is ours until release, whether or not somebody listens on it.
//
// A port that the kernel picks (listen on 0, close, tell the server) is free only for a
// moment, and not at all while a killed server waits for its restart: any outgoing
// connection may get it. So ports are taken from outside the range that the kernel picks
// from, and a lock on a file named after the port keeps the other programs that use this
// package away, in other test binaries too. The kernel drops the lock with its owner.
type port struct {
	number int
	lock   *os.File
}

// firstPort leaves alone the ports that well-known services of a development machine use.
const firstPort = 15000

// reservePort reserves a port on which nobody listens at any address, for TCP or UDP.
func reservePort() (*port, error) {
	low, high := portRange()
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("portolan-bed-%d", os.Getuid()))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("reserving a port: %w", err)
	}
	for range 200 {
		p, err := lockPort(dir, low+rand.IntN(high-low))
		if err != nil {
			return nil, fmt.Errorf("reserving a port: %w", err)
		}
		if p == nil {
			continue
		}
		if p.free() {
			return p, nil
		}
		if err := p.release(); err != nil {
			return nil, fmt.Errorf("reserving a port: %w", err)
		}
	}
	return nil, fmt.Errorf("reserving a port: none of 200 tried in %d-%d is free", low, high)
}

// lockPort returns nil without an error when another program has the port.
func lockPort(dir string, number int) (*port, error) {
	// Go opens files close-on-exec: no server inherits the lock.
	file, err := os.OpenFile(filepath.Join(dir, strconv.Itoa(number)), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, errors.Join(ignore(err, syscall.EWOULDBLOCK), file.Close())
	}
	return &port{number: number, lock: file}, nil
}

// free reports whether the port can be bound on the wildcard address, which fails as soon
// as one address has it.
//
// No process is forked meanwhile: until it execs, a child holds copies of the two sockets, and
// the server that the port is for would find it busy.
func (p *port) free() bool {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	address := net.JoinHostPort("", strconv.Itoa(p.number))
	tcp, err := net.Listen("tcp", address)
	if err != nil {
		return false
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", address)
	if err != nil {
		return false
	}
	return udp.Close() == nil
}

func (p *port) on(host string) string { return net.JoinHostPort(host, strconv.Itoa(p.number)) }

// release gives the port back. The file stays: removing it would let two programs lock
// two files of one name.
func (p *port) release() error { return p.lock.Close() }

// portRange returns the half-open range to choose from: below the kernel's own.
func portRange() (low, high int) {
	high = 32768 // Linux's default; the ranges of the BSDs begin at 49152
	if text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range"); err == nil {
		fields := strings.Fields(string(text))
		if len(fields) == 2 {
			first, err1 := strconv.Atoi(fields[0])
			last, err2 := strconv.Atoi(fields[1])
			switch {
			case err1 != nil || err2 != nil:
			case first >= firstPort+1000:
				high = first
			case last <= 64000:
				return last + 1, 65536
			default:
				// The kernel picks from everything. The lock and the check remain.
			}
		}
	}
	return firstPort, high
}

// address turns a wanted listen address into the one to use. An empty port or 0 reserves
// one; an empty address is 127.0.0.1. A fixed port is nobody's to reserve.
func address(want string) (string, *port, error) {
	if want == "" {
		want = "127.0.0.1:0"
	}
	host, number, err := net.SplitHostPort(want)
	if err != nil {
		return "", nil, fmt.Errorf("listen address %q: %w", want, err)
	}
	if number != "" && number != "0" {
		return want, nil, nil
	}
	p, err := reservePort()
	if err != nil {
		return "", nil, err
	}
	return p.on(host), p, nil
}

// Address reserves a free port on host (an address of this machine, 127.0.0.1 for
// example) for a server that the caller starts, and returns host:port and what gives the
// port back. Until then no other user of this package and no outgoing connection gets it.
func Address(host string) (hostport string, release func() error, err error) {
	p, err := reservePort()
	if err != nil {
		return "", nil, err
	}
	return p.on(host), p.release, nil
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}
