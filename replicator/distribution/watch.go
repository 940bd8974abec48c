package distribution

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"
)

var (
	errStalled  = errors.New("nothing moved for too long")
	errAnswered = errors.New("answered before the whole body was sent")
)

// watchdog cancels a request when it stands still: one timer, set anew by whatever moves. A limit on the whole would be wrong
// for bodies of any size, and net/http has no other.
type watchdog struct {
	mu     sync.Mutex
	timer  *time.Timer
	cancel context.CancelCauseFunc
	done   bool
}

func newWatchdog(d time.Duration, cancel context.CancelCauseFunc) *watchdog {
	return &watchdog{timer: time.AfterFunc(d, func() { cancel(errStalled) }), cancel: cancel}
}

func (w *watchdog) touch(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.done {
		w.timer.Reset(d)
	}
}

func (w *watchdog) pause() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer.Stop()
}

func (w *watchdog) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.done = true
	w.timer.Stop()
	w.cancel(nil)
}

// sentBody is the body of a request: it feeds the watchdog, and tells when the transport has let go of the stream.
type sentBody struct {
	r io.Reader
	// left is how many bytes are still to be sent: the stream may go on behind them.
	left          int64
	watch         *watchdog
	stall, header time.Duration
	once          sync.Once
	closed        chan struct{}
}

func (b *sentBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, io.EOF
	}
	// The limit is for the wire: how long the stream takes to deliver is limited where it comes from.
	b.watch.pause()
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	switch {
	case b.left <= 0:
		b.watch.touch(b.header)
	default:
		b.watch.touch(b.stall)
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

func (b *sentBody) Close() error {
	b.once.Do(func() { close(b.closed) })
	return nil
}

// receivedBody is the body of an answer. As with sentBody the limit is for the wire: a reader that takes its time, because what it
// reads goes out again over a slower link, is no standstill here.
type receivedBody struct {
	io.ReadCloser
	watch *watchdog
	stall time.Duration
	ctx   context.Context
}

func (b *receivedBody) Read(p []byte) (int, error) {
	b.watch.touch(b.stall)
	n, err := b.ReadCloser.Read(p)
	b.watch.pause()
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.ctx), errStalled) {
		err = errStalled
	}
	return n, err
}

func (b *receivedBody) Close() error {
	err := b.ReadCloser.Close()
	b.watch.stop()
	return err
}
