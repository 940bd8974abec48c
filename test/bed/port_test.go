package bed

import (
	"net"
	"testing"
)

func TestPortIsReservedOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	const number = 1 // never bound here, only locked
	first, err := lockPort(dir, number)
	if err != nil || first == nil {
		t.Fatalf("the first: %v, %v", first, err)
	}
	if second, err := lockPort(dir, number); err != nil || second != nil {
		t.Fatalf("the second got it too: %v, %v", second, err)
	}
	if err := first.release(); err != nil {
		t.Fatal(err)
	}
	third, err := lockPort(dir, number)
	if err != nil || third == nil {
		t.Fatalf("after the release: %v, %v", third, err)
	}
	if err := third.release(); err != nil {
		t.Fatal(err)
	}
}

func TestPortInUseIsNotFree(t *testing.T) {
	t.Parallel()
	p, err := reservePort()
	if err != nil {
		t.Fatal(err)
	}
	defer p.release()
	low, high := portRange()
	if p.number < low || p.number >= high {
		t.Errorf("port %d is outside %d-%d", p.number, low, high)
	}
	for _, network := range []string{"tcp", "udp"} {
		if !p.free() {
			t.Fatalf("port %d is not free before anyone listens", p.number)
		}
		var closer interface{ Close() error }
		if network == "tcp" {
			closer, err = net.Listen(network, p.on("127.0.0.1"))
		} else {
			closer, err = net.ListenPacket(network, p.on("127.0.0.1"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if p.free() {
			t.Errorf("port %d is free while a %s socket has it on one address", p.number, network)
		}
		if err := closer.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
