package bed_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"portolan/test/bed"
)

// echo is a server that sends everything back and ends each connection in order.
func echo(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn) // the client sees what is missing
			})
		}
	})
	t.Cleanup(func() {
		listener.Close()
		running.Wait()
	})
	return listener.Addr().String()
}

func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

// exchange sends data, ends its side and returns what came back.
func exchange(conn *net.TCPConn, data []byte) ([]byte, error) {
	var sending sync.WaitGroup
	sending.Go(func() {
		if _, err := conn.Write(data); err == nil {
			_ = conn.CloseWrite() // a reset shows when reading
		}
	})
	defer sending.Wait()
	return io.ReadAll(conn)
}

func set(t *testing.T, p *bed.Proxy, c bed.Conditions) {
	t.Helper()
	if err := p.Set(c); err != nil {
		t.Fatal(err)
	}
}

func TestProxyPassesEverything(t *testing.T) {
	t.Parallel()
	p := bed.NewProxy(t, echo(t))
	data := randomBytes(3<<20 + 7)
	const clients = 8
	var all sync.WaitGroup
	for range clients {
		conn := dial(t, p.Addr())
		all.Go(func() {
			got, err := exchange(conn, data)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d of %d bytes came back, %v", len(got), len(data), err)
			}
		})
	}
	all.Wait()
	want := bed.Traffic{Connections: clients, Up: clients * int64(len(data)), Down: clients * int64(len(data))}
	if got := p.Traffic(); got != want {
		t.Errorf("traffic %+v, want %+v", got, want)
	}
}

// What takes time is asserted from below only: a busy machine makes everything later.
func TestProxyDelays(t *testing.T) {
	t.Parallel()
	p := bed.NewProxy(t, echo(t))
	set(t, p, bed.Conditions{Latency: 40 * time.Millisecond})
	start := time.Now()
	if _, err := exchange(dial(t, p.Addr()), []byte("x")); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 160*time.Millisecond {
		t.Errorf("two round trips of 80 ms took %v", took)
	}
}

func TestProxySharesItsBandwidth(t *testing.T) {
	t.Parallel()
	p := bed.NewProxy(t, echo(t))
	set(t, p, bed.Conditions{Bandwidth: 1 << 20})
	data := randomBytes(128 << 10)
	start := time.Now()
	var all sync.WaitGroup
	for range 4 {
		conn := dial(t, p.Addr())
		all.Go(func() {
			if got, err := exchange(conn, data); err != nil || !bytes.Equal(got, data) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
	all.Wait()
	if took := time.Since(start); took < 500*time.Millisecond {
		t.Errorf("512 KiB at 1 MiB/s took %v", took)
	}
}

func TestProxyCuts(t *testing.T) {
	t.Parallel()
	data := randomBytes(1 << 20)
	const cut = 100_003

	p := bed.NewProxy(t, echo(t))
	set(t, p, bed.Conditions{CutDown: cut})
	got, err := exchange(dial(t, p.Addr()), data)
	if !errors.Is(err, syscall.ECONNRESET) || len(got) > cut {
		t.Errorf("cut on the way down: %d bytes, %v", len(got), err)
	}

	// Another proxy: the way up of the first connection may still count bytes when its client sees the reset.
	p = bed.NewProxy(t, echo(t))
	set(t, p, bed.Conditions{CutUp: cut})
	got, err = exchange(dial(t, p.Addr()), data)
	if !errors.Is(err, syscall.ECONNRESET) || len(got) > cut {
		t.Errorf("cut on the way up: %d bytes, %v", len(got), err)
	}
	if up := p.Traffic().Up; up != cut {
		t.Errorf("%d bytes went up, want %d", up, cut)
	}

	set(t, p, bed.Conditions{})
	if got, err := exchange(dial(t, p.Addr()), data); err != nil || !bytes.Equal(got, data) {
		t.Errorf("whole again: %d bytes, %v", len(got), err)
	}
}

func TestProxyStalls(t *testing.T) {
	t.Parallel()
	p := bed.NewProxy(t, echo(t))
	conn := dial(t, p.Addr())
	talk := func() error {
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(conn, make([]byte, 1))
		return err
	}
	if err := talk(); err != nil {
		t.Fatal(err)
	}
	// A byte is counted when it has been written, and may have come back by then.
	passed := bed.Traffic{Connections: 1, Up: 1, Down: 1}
	if err := bed.Until(t.Context(), 30*time.Second, func(context.Context) error {
		if got := p.Traffic(); got != passed {
			return fmt.Errorf("traffic %+v, want %+v", got, passed)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	set(t, p, bed.Conditions{Stall: true})
	if _, err := conn.Write([]byte("y")); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Fatalf("%d bytes came through a stalled link", n)
	}
	if got := p.Traffic(); got != passed {
		t.Errorf("traffic went from %+v to %+v", passed, got)
	}
	set(t, p, bed.Conditions{})
	if err := conn.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Errorf("after the stall: %v", err)
	}
}

func TestProxyRefuses(t *testing.T) {
	t.Parallel()
	p := bed.NewProxy(t, echo(t))
	open := dial(t, p.Addr())
	if _, err := open.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	set(t, p, bed.Conditions{Refuse: true})
	if _, err := open.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the open connection: %v, want a reset", err)
	}
	if _, err := net.DialTimeout("tcp", p.Addr(), 5*time.Second); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new connection: %v, want refused", err)
	}
	set(t, p, bed.Conditions{})
	if got, err := exchange(dial(t, p.Addr()), []byte("again")); err != nil || string(got) != "again" {
		t.Errorf("after refusing: %q, %v", got, err)
	}
}

func TestProxyLeavesNothingBehind(t *testing.T) {
	// Not parallel: it looks at all goroutines, and the parallel tests have not begun or
	// are paused.
	before := goleak.IgnoreCurrent()
	target, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer target.Close()
	p, err := bed.StartProxy(bed.ProxyConfig{Target: target.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		conn := dial(t, p.Addr())
		if _, err := conn.Write(randomBytes(1 << 10)); err != nil {
			t.Fatal(err)
		}
	}
	set(t, p, bed.Conditions{Stall: true})
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	// At once, not after a while: Close is to have waited.
	if n := p.Serving(); n != 0 {
		t.Errorf("%d connections are still served after Close", n)
	}
	if err := p.Set(bed.Conditions{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("setting the conditions of a closed proxy: %v", err)
	}
	goleak.VerifyNone(t, before)
}
