// Package listener serves HTTP on a socket until it is told to end, with a certificate that may be renewed meanwhile.
//
// What is served, and how long a request may take, is the caller's.
package listener

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	stdlog "log"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

// Serve lets server answer on l until ctx is done, waits at most grace for the requests under way, and returns nil. With a
// certificate it speaks TLS. It closes l. Faults of a handler and of this machine are logged as errors; what strangers do
// to a connection, such as the handshakes of port scanners, only at the level debug.
func Serve(ctx context.Context, l net.Listener, server *http.Server, certificate *Certificate, grace time.Duration, log *zap.Logger) error {
	server.ErrorLog = stdlog.New(serverLog{log}, "", 0)
	if certificate != nil {
		server.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: certificate.get}
	}
	ended := make(chan error, 1)
	go func() {
		if certificate != nil {
			ended <- server.ServeTLS(l, "", "")
		} else {
			ended <- server.Serve(l)
		}
	}()
	select {
	case err := <-ended:
		return fmt.Errorf("serving on %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	// Not under ctx, which is done.
	finish, cancel := context.WithTimeout(context.Background(), grace)
	defer cancel()
	err := server.Shutdown(finish)
	if errors.Is(err, context.DeadlineExceeded) {
		err = server.Close()
	}
	<-ended
	if err != nil {
		return fmt.Errorf("ending the listener on %s: %w", l.Addr(), err)
	}
	return nil
}

// serverLog takes what net/http has to say. It has one level for everything, so that what it says must be looked at.
type serverLog struct{ log *zap.Logger }

// Write logs one message.
func (l serverLog) Write(p []byte) (int, error) {
	text := strings.TrimSpace(string(p))
	message, rest, _ := strings.Cut(text, "\n") // the stack of a handler that panicked follows
	switch {
	case strings.HasPrefix(text, "http: panic serving"):
		l.log.Error("a fault of the program", zap.String("fault", message), zap.String("stack", rest))
	case strings.HasPrefix(text, "http: Accept error"):
		l.log.Error("connections cannot be taken", zap.String("reason", message))
	default:
		l.log.Debug(text)
	}
	return len(p), nil
}

// Certificate is a certificate and its key in two PEM files, read again when they changed: certificates are renewed while
// the daemon runs. Its methods may be called from several goroutines.
type Certificate struct {
	certFile, keyFile string
	log               *zap.Logger

	mu      sync.Mutex
	loaded  *tls.Certificate
	changed [2]time.Time // of the files that were read last, usable or not
	failure string       // the last one that was logged
}

// LoadCertificate reads them for the first time.
func LoadCertificate(certFile, keyFile string, log *zap.Logger) (*Certificate, error) {
	c := &Certificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := c.Reload(); err != nil {
		return nil, err
	}
	return c, nil
}

// Reload reads the files, whether they changed or not. What cannot be used leaves the last good pair.
func (c *Certificate) Reload() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed = [2]time.Time{}
	return c.read()
}

// read reads the files if they changed.
func (c *Certificate) read() error {
	var changed [2]time.Time
	for i, f := range []string{c.certFile, c.keyFile} {
		info, err := os.Stat(f)
		if err != nil {
			return fmt.Errorf("reading the certificate %s and its key %s: %w", c.certFile, c.keyFile, err)
		}
		changed[i] = info.ModTime()
	}
	if changed == c.changed {
		return nil
	}
	c.changed = changed
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("reading the certificate %s and its key %s: %w", c.certFile, c.keyFile, err)
	}
	c.loaded, c.failure = &pair, ""
	return nil
}

func (c *Certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// Said once: whoever opens connections must not fill the log.
	if err := c.read(); err != nil && err.Error() != c.failure {
		c.failure = err.Error()
		c.log.Warn("a renewed certificate cannot be used; the last good one stays", zap.Error(err))
	}
	return c.loaded, nil
}
