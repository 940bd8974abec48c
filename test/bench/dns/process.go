//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"portolan/test/bed"
)

const (
	// startTimeout bounds a start, until the first answer.
	startTimeout = 2 * time.Minute
	// stopTimeout is what a server gets between SIGTERM and SIGKILL.
	stopTimeout = 20 * time.Second
	// poll is how often a server that starts is asked: what start times are exact to.
	poll = 2 * time.Millisecond
	// settleTimeout bounds the wait for memory that is given back after a start.
	settleTimeout = 30 * time.Second
)

// process is a server that runs.
type process struct {
	pid    int
	at     netip.AddrPort
	log    string
	exited chan struct{} // closed when it was waited for
	// started is the time from its start to its first answer.
	started time.Duration
}

// start runs command on the processors cpus and returns when answers is nil. The kernel kills it when this program dies.
func start(ctx context.Context, at netip.AddrPort, command []string, cpus []int, log string, answers func(netip.AddrPort) error) (*process, error) {
	file, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("starting %s: %w", command[0], err)
	}
	defer file.Close() // the child has its own
	p := &process{at: at, log: log, exited: make(chan struct{})}
	cmd := exec.Command(command[0], command[1:]...)
	cmd.Stdout, cmd.Stderr = file, file
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	begun := make(chan error)
	began := time.Now()
	go func() {
		// The child dies with the thread that made it, and has its processors. The thread ends with this goroutine.
		runtime.LockOSThread()
		err := pin(cpus)
		if err == nil {
			err = cmd.Start()
		}
		begun <- err
		if err == nil {
			_ = cmd.Wait() // it is killed anyway
			close(p.exited)
		}
	}()
	if err := <-begun; err != nil {
		return nil, fmt.Errorf("starting %s: %w", command[0], err)
	}
	p.pid = cmd.Process.Pid
	err = errors.New("it ended at once")
	for err != nil && time.Since(began) < startTimeout && ctx.Err() == nil && p.running() {
		if err = answers(at); err == nil {
			p.started = time.Since(began)
			return p, nil
		}
		time.Sleep(poll)
	}
	text, _ := os.ReadFile(log) // for the error's sake
	return nil, errors.Join(fmt.Errorf("starting %s: %w\n%s", command[0], err, text[max(0, len(text)-4096):]), ctx.Err(), p.stop())
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// stop ends the server and waits for it.
func (p *process) stop() error {
	if !p.running() {
		return nil
	}
	_ = unix.Kill(-p.pid, unix.SIGTERM) // it may just have ended
	select {
	case <-p.exited:
		return nil
	case <-time.After(stopTimeout):
		_ = unix.Kill(-p.pid, unix.SIGKILL)
		<-p.exited
		return fmt.Errorf("process %d was still running %v after SIGTERM; killed", p.pid, stopTimeout)
	}
}

// pin keeps the calling thread on the processors cpus.
func pin(cpus []int) error {
	var set unix.CPUSet
	for _, cpu := range cpus {
		set.Set(cpu)
	}
	if err := unix.SchedSetaffinity(0, &set); err != nil {
		return fmt.Errorf("keeping to the processors %v: %w", cpus, err)
	}
	return nil
}

// cpu is the time that the threads of the server have had of a processor, by the scheduler's own account.
func (p *process) cpu() (time.Duration, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("reading the processor time of process %d: it has no threads (%w)", p.pid, err)
	}
	var sum time.Duration
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has just ended
		}
		if err != nil {
			return 0, fmt.Errorf("reading processor time: %w", err)
		}
		first, _, _ := strings.Cut(string(text), " ")
		ns, err := strconv.ParseInt(first, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading processor time in %s: %w", file, err)
		}
		sum += time.Duration(ns)
	}
	return sum, nil
}

// memory is a line of /proc/PID/status, VmRSS or VmHWM, in MB (10^6 bytes).
func (p *process) memory(line string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, fmt.Errorf("reading the memory of process %d: %w", p.pid, err)
	}
	for l := range bytes.Lines(text) {
		if fields := strings.Fields(string(l)); len(fields) == 3 && fields[0] == line+":" {
			kb, err := strconv.Atoi(fields[1])
			if err != nil {
				return 0, fmt.Errorf("reading %s of process %d: %w", line, p.pid, err)
			}
			return float64(kb) * 1024 / 1e6, nil
		}
	}
	return 0, fmt.Errorf("process %d has no %s", p.pid, line)
}

// settled waits until the server's memory does not shrink any more, and returns what it is then, in MB.
func (p *process) settled() (float64, error) {
	began, lowest, since := time.Now(), 1e9, time.Now()
	for {
		rss, err := p.memory("VmRSS")
		if err != nil {
			return 0, err
		}
		if rss < lowest*0.99 {
			lowest, since = rss, time.Now()
		}
		if time.Since(since) > 3*time.Second || time.Since(began) > settleTimeout {
			return rss, nil
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// answersDNS is nil once the server gives a region's address for the benchmark's name.
func answersDNS(at netip.AddrPort) error {
	m := new(mdns.Msg)
	m.SetQuestion(oneName, mdns.TypeA)
	c := mdns.Client{Timeout: 100 * time.Millisecond}
	answer, _, err := c.Exchange(m, at.String())
	if err != nil {
		return err
	}
	if len(answer.Answer) != 1 {
		return fmt.Errorf("%v answers %s with %d records", at, mdns.RcodeToString[answer.Rcode], len(answer.Answer))
	}
	return nil
}

// answersAny is nil once something comes back.
func answersAny(at netip.AddrPort) error {
	conn, err := net.DialTimeout("udp", at.String(), time.Second)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1024))
	return err
}

// address is a port on loopback that nobody else takes.
func address() (netip.AddrPort, func() error, error) {
	text, release, err := bed.Address("127.0.0.1")
	if err != nil {
		return netip.AddrPort{}, nil, err
	}
	at, err := netip.ParseAddrPort(text)
	return at, release, err
}
