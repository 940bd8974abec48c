package listener

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"
)

// write makes a certificate and returns it; the files have the time at.
func write(t *testing.T, certFile, keyFile string, at time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), at)
	replace(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), at)
	return cert
}

func replace(t *testing.T, file string, text []byte, at time.Time) {
	t.Helper()
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, at, at); err != nil {
		t.Fatal(err)
	}
}

// A certificate is read again when its files change, and when it is told to; what cannot be used changes nothing.
func TestCertificateIsReadAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	if _, err := LoadCertificate(certFile, keyFile, zaptest.NewLogger(t)); err == nil || !strings.Contains(err.Error(), certFile) {
		t.Errorf("without files: %v", err)
	}
	at := time.Unix(1e9, 0)
	want := write(t, certFile, keyFile, at)
	c, err := LoadCertificate(certFile, keyFile, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	serves := func(when string) {
		t.Helper()
		if got, err := c.get(nil); err != nil || !bytes.Equal(got.Certificate[0], want) {
			t.Errorf("%s: another certificate is served (%v)", when, err)
		}
	}
	serves("at first")
	want = write(t, certFile, keyFile, at.Add(time.Second))
	serves("after a change")
	second := write(t, certFile, keyFile, at.Add(time.Second)) // at the same time, however coarse the clock is
	serves("after a change that the times do not show")
	if err := c.Reload(); err != nil {
		t.Error(err)
	}
	want = second
	serves("after Reload")
	replace(t, keyFile, []byte("half a key"), at.Add(2*time.Second))
	if err := c.Reload(); err == nil {
		t.Error("Reload of half a key is no error")
	}
	serves("with half a key")
}

// A file that is gone is told of once, however many connections come.
func TestCertificateFailureIsToldOnce(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	at := time.Unix(1e9, 0)
	write(t, certFile, keyFile, at)
	core, logs := observer.New(zap.WarnLevel)
	c, err := LoadCertificate(certFile, keyFile, zap.New(core))
	if err != nil {
		t.Fatal(err)
	}
	lose := func(times int) {
		t.Helper()
		if err := os.Remove(keyFile); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if got, err := c.get(nil); err != nil || got == nil {
				t.Errorf("without its key: %v, %v", got, err)
			}
		}
		if n := logs.Len(); n != times {
			t.Errorf("told of %d times, want %d", n, times)
		}
	}
	lose(1)
	write(t, certFile, keyFile, at.Add(time.Second))
	if _, err := c.get(nil); err != nil {
		t.Error(err)
	}
	lose(2)
}

// pipes is a listener within this process, so that tests may have a clock of their own.
type pipes struct {
	taken  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.taken:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error {
	p.once.Do(func() { close(p.closed) })
	return nil
}

func (p *pipes) Addr() net.Addr { return &net.TCPAddr{} }

// client is one whose connections p takes.
func (p *pipes) client() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
		here, there := net.Pipe()
		select {
		case p.taken <- there:
			return here, nil
		case <-p.closed:
			return nil, net.ErrClosed
		}
	}}}
}

// serve runs Serve on l until the returned function is called, which gives its error.
func serve(t *testing.T, l net.Listener, handler http.HandlerFunc, certificate *Certificate, grace time.Duration, log *zap.Logger) (end func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Serve(ctx, l, &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}, certificate, grace, log)
	}()
	return func() error {
		cancel()
		return <-ended
	}
}

func get(t *testing.T, client *http.Client, url string) (string, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := client.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	return string(text), err
}

// The end waits for the requests under way, as long as the grace is; nothing new is taken meanwhile.
func TestServeEndsInOrder(t *testing.T) {
	t.Parallel()
	for name, takes := range map[string]time.Duration{"in time": 30 * time.Second, "longer than the grace": time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				l := &pipes{taken: make(chan net.Conn), closed: make(chan struct{})}
				end := serve(t, l, func(w http.ResponseWriter, r *http.Request) {
					select {
					case <-time.After(takes):
						io.WriteString(w, "done")
					case <-r.Context().Done():
					}
				}, nil, time.Minute, zap.NewNop())
				answered := make(chan string, 1)
				go func() {
					text, err := get(t, l.client(), "http://portolan.example")
					if err != nil {
						text = "cut off"
					}
					answered <- text
				}()
				synctest.Wait()
				begun := time.Now()
				ended := make(chan error, 1)
				go func() { ended <- end() }()
				synctest.Wait()
				if _, err := get(t, l.client(), "http://portolan.example"); !errors.Is(err, net.ErrClosed) {
					t.Errorf("a new request while it ends: %v", err)
				}
				want, after := "done", takes
				if takes > time.Minute {
					want, after = "cut off", time.Minute
				}
				if got := <-answered; got != want || time.Since(begun) != after {
					t.Errorf("the request under way is %s after %v, want %s after %v", got, time.Since(begun), want, after)
				}
				if err := <-ended; err != nil {
					t.Errorf("Serve: %v", err)
				}
			})
		})
	}
}

// A socket that fails ends it with an error.
func TestServeTellsOfTheSocket(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := Serve(t.Context(), l, new(http.Server), nil, time.Minute, zap.NewNop()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// Strangers cannot fill the log, and a fault of a handler is in it.
func TestServeLogs(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write(t, certFile, keyFile, time.Unix(1e9, 0))
	core, logs := observer.New(zap.DebugLevel)
	log := zap.New(core)
	certificate, err := LoadCertificate(certFile, keyFile, log)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	end := serve(t, l, func(http.ResponseWriter, *http.Request) { panic("oh") }, certificate, time.Minute, log)
	_, _ = get(t, new(http.Client), "http://"+l.Addr().String())                                                 // net/http may tell such clients what it wants, or cut them off
	trusting := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}} // of no interest here
	if _, err := get(t, trusting, "https://"+l.Addr().String()); err == nil {
		t.Error("a handler that panics answered")
	}
	if err := end(); err != nil {
		t.Errorf("Serve: %v", err)
	}
	for _, e := range logs.All() {
		if e.Level > zap.DebugLevel && e.Message != "a fault of the program" {
			t.Errorf("logged at %v: %s", e.Level, e.Message)
		}
	}
	faults := logs.FilterMessage("a fault of the program").All()
	if len(faults) != 1 || faults[0].Level != zap.ErrorLevel || !strings.Contains(faults[0].ContextMap()["fault"].(string), "oh") {
		t.Errorf("the fault of the handler: %v", faults)
	}
	if logs.FilterLevelExact(zap.DebugLevel).Len() == 0 {
		t.Error("the handshake that failed is nowhere")
	}
}
