package bed

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// server is one server program: how to start it, how to know that it answers, and the
// process while there is one. Its methods may be called from several goroutines.
type server struct {
	name    string // for errors
	tool    string
	args    []string
	env     []string
	logPath string
	ready   func(context.Context) error // nil once the server answers
	listens []string                    // host:port each; must be free before a start
	ports   []*port

	mu      sync.Mutex // serialises starting and ending
	process *process   // nil before the first start
}

// process is one run of a program.
type process struct {
	pid    int
	exited chan struct{} // closed when the process was waited for
	state  string        // how it ended; written before exited is closed
}

// vacateTime is how long an address may stay busy before that counts: a process that was killed a moment ago, or a child
// between fork and exec, still holds its sockets.
const vacateTime = 2 * time.Second

// vacant waits until nobody listens on the address. No process is forked while it is tried: the child would hold it.
func vacant(ctx context.Context, address string) error {
	var busy error
	err := Until(ctx, vacateTime, func(context.Context) error {
		syscall.ForkLock.RLock()
		defer syscall.ForkLock.RUnlock()
		listener, err := net.Listen("tcp", address)
		if err == nil {
			err = listener.Close()
		}
		busy = err
		return err
	})
	if busy != nil {
		return busy
	}
	return err
}

// Start starts the server and returns once it answers. A server that is running is left
// alone. When it fails, nothing is left running.
func (s *server) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process.running() {
		return nil
	}
	path, err := Tool(s.tool)
	if err != nil {
		return fmt.Errorf("starting %s: %w", s.name, err)
	}
	// Whoever has the address would answer in the place of the server that died of it.
	for _, address := range s.listens {
		if err := vacant(ctx, address); err != nil {
			return fmt.Errorf("starting %s: %w", s.name, err)
		}
	}
	log, err := os.OpenFile(s.logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("starting %s: %w", s.name, err)
	}
	defer log.Close() // the child has its own
	cmd := exec.Command(path, s.args...)
	cmd.Env = environment(s.env)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = processAttributes()
	p, err := start(cmd)
	if err != nil {
		return fmt.Errorf("starting %s: %w", s.name, err)
	}
	s.process = p

	err = Until(ctx, startTimeout, func(ctx context.Context) error {
		if !p.running() {
			return nil
		}
		return s.ready(ctx)
	})
	if err == nil && !p.running() {
		err = fmt.Errorf("it ended at once: %s", p.state)
	}
	if err != nil {
		p.signal(syscall.SIGKILL)
		<-p.exited
		return fmt.Errorf("starting %s: %w\n%s", s.name, err, s.LogTail())
	}
	return nil
}

// Stop asks the server to end (SIGTERM) and waits for it; after 20 seconds it is killed
// and that is an error. Stopping a server that is not running does nothing.
func (s *server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop()
}

func (s *server) stop() error {
	p := s.process
	if !p.running() {
		return nil
	}
	p.signal(syscall.SIGTERM)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.exited:
		return nil
	case <-timer.C:
		p.signal(syscall.SIGKILL)
		<-p.exited
		return fmt.Errorf("stopping %s: still running %v after SIGTERM; killed", s.name, stopTimeout)
	}
}

// Kill ends the server at once, without a chance to tidy up (SIGKILL), and waits for it.
func (s *server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.process; p.running() {
		p.signal(syscall.SIGKILL)
		<-p.exited
	}
}

// Restart stops the server and starts it again on the same addresses.
func (s *server) Restart(ctx context.Context) error {
	if err := s.Stop(); err != nil {
		return err
	}
	return s.Start(ctx)
}

// Signal sends a signal to the server's process group. SIGSTOP freezes the server with its
// connections open, SIGCONT thaws it.
func (s *server) Signal(sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.process.running() {
		return fmt.Errorf("sending %v to %s: it is not running", sig, s.name)
	}
	s.process.signal(sig)
	return nil
}

// Exited returns a channel that is closed when the current run of the server has ended,
// by itself or not.
func (s *server) Exited() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.exited
}

// Running reports whether the server's process exists.
func (s *server) Running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.running()
}

// PID returns the process id of the server's current or last run.
func (s *server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.pid
}

// Close stops the server for good and gives its ports back. Its files stay.
func (s *server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.stop()
	for _, p := range s.ports {
		err = errors.Join(err, p.release())
	}
	s.ports = nil
	return err
}

// LogPath returns the file that holds all output of all runs of the server.
func (s *server) LogPath() string { return s.logPath }

// LogTail returns the end of the server's output, at most 4 KiB.
func (s *server) LogTail() string {
	file, err := os.Open(s.logPath)
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	const limit = 4 << 10
	if info, err := file.Stat(); err == nil && info.Size() > limit {
		if _, err := file.Seek(-limit-1, io.SeekEnd); err != nil {
			return err.Error()
		}
	}
	text, err := io.ReadAll(io.LimitReader(file, 2*limit))
	if err != nil {
		return err.Error()
	}
	return "--- end of " + s.logPath + ":\n" + strings.TrimRight(tail(string(text), limit), "\n")
}

// start starts cmd and waits for its end on a thread that does nothing else. The kernel
// sends the parent-death signal when the thread that made the child ends, not when the
// program does, and the Go runtime ends a thread whose goroutine returned while locked to
// it: a test of network namespaces would take its servers with it.
func start(cmd *exec.Cmd) (*process, error) {
	p := &process{exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		p.pid = cmd.Process.Pid
		started <- nil
		_ = cmd.Wait() // how it ended is in ProcessState
		p.state = cmd.ProcessState.String()
		close(p.exited)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *process) running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// signal sends sig to the process and all that it started. A process that has just ended
// is no error: its end is what exited tells.
func (p *process) signal(sig syscall.Signal) { _ = syscall.Kill(-p.pid, sig) }
