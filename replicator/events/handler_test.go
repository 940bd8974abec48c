package events

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"portolan/listener"
)

type listening struct {
	*Handler
	spool   *Spool
	key     Key
	logs    *observer.ObservedLogs
	metrics *prometheus.Registry
}

func newListener(t testing.TB, change func(*Config)) *listening {
	t.Helper()
	key, err := LoadKey(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.DebugLevel)
	l := &listening{spool: newSpool(t, Limits{}), key: key, logs: logs, metrics: prometheus.NewRegistry()}
	config := Config{
		Tokens: key.Tokens(func(registry, region string) bool {
			return registry == "contoso" && (region == "westus" || region == "westeurope")
		}),
		Log: zap.New(core), Metrics: l.metrics,
	}
	if change != nil {
		change(&config)
	}
	if l.Handler, err = NewHandler(l.spool, config); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *listening) post(t testing.TB, path, token, contentType string, body io.Reader) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, path, body)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	r.Header.Set("Content-Type", contentType)
	w := httptest.NewRecorder()
	l.ServeHTTP(w, r)
	return w
}

// recorded returns what distribution 3 sent.
func recorded(t testing.TB, name string) *bytes.Reader {
	t.Helper()
	b, err := os.ReadFile("testdata/distribution-3-" + name + ".json")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.NewReader(b)
}

const westus = "/events/contoso/westus"

func TestHandlerAccepts(t *testing.T) {
	t.Parallel()
	l := newListener(t, func(c *Config) {
		c.Repository = func(_, _, repository string) (string, bool) { return strings.CutPrefix(repository, "team/") }
	})
	token := l.key.Token("contoso", "westus")
	for _, name := range []string{"push-tag", "push-tag", "push-tag-ours", "delete-tag", "pull", "push-blob"} {
		if w := l.post(t, westus, token, distributionV2, recorded(t, name)); w.Code != http.StatusAccepted || w.Body.Len() > 0 {
			t.Fatalf("%s: got %d %s, want 202", name, w.Code, w.Body)
		}
	}
	// Another registry lives in the same server, without the prefix.
	for _, repository := range []string{"other/app", "Team/app"} {
		body := envelope("push", repository, "t", digestA, "x/y", "")
		if w := l.post(t, westus, token, distributionV1, strings.NewReader(body)); w.Code != http.StatusAccepted {
			t.Fatalf("got %d %s, want 202", w.Code, w.Body)
		}
	}
	items := take(t, l.spool, 10)
	var got []string
	for _, i := range items {
		for _, e := range i.Evidence {
			got = append(got, fmt.Sprintf("%s %s:%s %s", e.Action, e.Repository, e.Tag, e.WriteID))
		}
	}
	want := []string{"push app:1.2 ", "push app:latest 0a1b2c3d4e5f6071", "delete app:multi "}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %q, want %q", got, want)
	}
	expected := `
# HELP portolan_events_received_total Events by kind: push, delete, ignored (of no interest), invalid (impossible names), oversize (message too large, replica marked).
# TYPE portolan_events_received_total counter
portolan_events_received_total{kind="delete",region="westus",registry="contoso"} 1
portolan_events_received_total{kind="ignored",region="westus",registry="contoso"} 3
portolan_events_received_total{kind="invalid",region="westus",registry="contoso"} 1
portolan_events_received_total{kind="push",region="westus",registry="contoso"} 3
# HELP portolan_events_requests_total Event messages by result: accepted, unauthorized, malformed, unsupported, too_large, unavailable, not_found.
# TYPE portolan_events_requests_total counter
portolan_events_requests_total{result="accepted"} 8
portolan_events_requests_total{result="malformed"} 0
portolan_events_requests_total{result="not_found"} 0
portolan_events_requests_total{result="too_large"} 0
portolan_events_requests_total{result="unauthorized"} 0
portolan_events_requests_total{result="unavailable"} 0
portolan_events_requests_total{result="unsupported"} 0
# HELP portolan_events_spool_items Items that wait in the event spool or are being worked on.
# TYPE portolan_events_spool_items gauge
portolan_events_spool_items{region="westus",registry="contoso"} 3
`
	if err := testutil.GatherAndCompare(l.metrics, strings.NewReader(expected), "portolan_events_received_total",
		"portolan_events_requests_total", "portolan_events_spool_items"); err != nil {
		t.Error(err)
	}
	if n, err := testutil.GatherAndCount(l.metrics, "portolan_events_spool_oldest_seconds"); n != 1 || err != nil {
		t.Errorf("%d ages, %v, want one", n, err)
	}
}

func TestHandlerRefuses(t *testing.T) {
	t.Parallel()
	l := newListener(t, func(c *Config) { c.MaxBody = 4096 })
	token := l.key.Token("contoso", "westus")
	good := envelope("push", "team/app", "t", digestA, "x/y", "")
	tests := []struct {
		name, method, path, token, contentType, body string
		status                                       int
	}{
		{"no token", "POST", westus, "", distributionV2, good, 401},
		{"wrong token", "POST", westus, "guess", distributionV2, good, 401},
		{"token cut short", "POST", westus, "Bearer " + token[:63], distributionV2, good, 401},
		{"another replica's token", "POST", westus, "Bearer " + l.key.Token("contoso", "westeurope"), distributionV2, good, 401},
		{"unknown replica", "POST", "/events/contoso/mars", "Bearer " + l.key.Token("contoso", "mars"), distributionV2, good, 401},
		{"unknown registry", "POST", "/events/fabrikam/westus", "Bearer " + l.key.Token("fabrikam", "westus"), distributionV2, good, 401},
		{"another scheme", "POST", westus, "Basic " + token, distributionV2, good, 401},
		{"get", "GET", westus, "Bearer " + token, "", "", 405},
		{"put", "PUT", westus, "Bearer " + token, distributionV2, good, 405},
		{"no replica", "POST", "/events/contoso", "Bearer " + token, distributionV2, good, 404},
		{"more path", "POST", westus + "/", "Bearer " + token, distributionV2, good, 404},
		{"elsewhere", "POST", "/", "Bearer " + token, distributionV2, good, 404},
		{"another type", "POST", westus, "Bearer " + token, "application/json", good, 415},
		{"no type", "POST", westus, "Bearer " + token, "", good, 415},
		{"no JSON", "POST", westus, "Bearer " + token, distributionV2, "action=push", 400},
		{"another JSON", "POST", westus, "Bearer " + token, distributionV2, `{"event":{}}`, 400},
		{"absurd size", "POST", westus, "Bearer " + token, distributionV2, strings.Repeat(" ", 16*4096) + good, 413},
		{"absurd size, forged", "POST", westus, "Bearer guess", distributionV2, strings.Repeat(" ", 16*4096) + good, 401},
	}
	unauthorized := map[string]bool{}
	for _, tt := range tests {
		r := httptest.NewRequestWithContext(t.Context(), tt.method, tt.path, strings.NewReader(tt.body))
		if tt.token != "" {
			r.Header.Set("Authorization", tt.token)
		}
		r.Header.Set("Content-Type", tt.contentType)
		w := httptest.NewRecorder()
		l.ServeHTTP(w, r)
		if w.Code != tt.status || w.Body.Len() == 0 {
			t.Errorf("%s: got %d %q, want %d and a reason", tt.name, w.Code, w.Body, tt.status)
		}
		if strings.Contains(w.Body.String(), "team/app") {
			t.Errorf("%s: the answer repeats the message: %s", tt.name, w.Body)
		}
		if w.Code == http.StatusUnauthorized {
			unauthorized[fmt.Sprint(w.Header(), w.Body)] = true
		}
	}
	if len(unauthorized) != 1 {
		t.Errorf("the answers to forged events differ: %v", unauthorized)
	}
	if n := l.spool.Pending("contoso", "westus") + l.spool.Pending("contoso", "mars"); n != 0 {
		t.Errorf("%d items were kept of what was refused", n)
	}
	entries := l.logs.All()
	if len(entries) == 0 || len(entries) > 6 {
		t.Fatalf("%d lines in the log, want a few", len(entries))
	}
	first := entries[0].ContextMap()
	if first["registry"] != "contoso" || first["region"] != "westus" || first["remote"] != "192.0.2.1:1234" {
		t.Errorf("the log does not name the forged event: %v", first)
	}
	for _, e := range entries {
		if line := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(line, token) || strings.Contains(line, "team/app") || strings.Contains(line, "guess") {
			t.Errorf("the log repeats what it should not: %s", line)
		}
	}
}

// TestHandlerOversize holds that a registry whose event is too large to be read is not stuck with it.
func TestHandlerOversize(t *testing.T) {
	t.Parallel()
	l := newListener(t, func(c *Config) { c.MaxBody = 4096 })
	body := envelope("push", "team/app", "t", digestA, strings.Repeat("x", 4096), "")
	w := l.post(t, westus, l.key.Token("contoso", "westus"), distributionV2, strings.NewReader(body))
	if w.Code != http.StatusAccepted {
		t.Fatalf("got %d %s, want 202", w.Code, w.Body)
	}
	items := take(t, l.spool, 10)
	if len(items) != 1 || items[0].Marked.IsZero() || items[0].Repository != "" {
		t.Errorf("got %+v, want a mark of the replica", items)
	}
}

// TestHandlerDisk holds that nothing is acknowledged that is not kept.
func TestHandlerDisk(t *testing.T) {
	t.Parallel()
	l := newListener(t, nil)
	l.spool.Close()
	w := l.post(t, westus, l.key.Token("contoso", "westus"), distributionV2, recorded(t, "push-tag"))
	if w.Code != http.StatusServiceUnavailable || w.Header().Get("Retry-After") == "" {
		t.Errorf("got %d %v, want 503 with Retry-After", w.Code, w.Header())
	}
}

// TestHandlerSlowSender holds that the time a message takes to arrive is not taken from the disk's.
func TestHandlerSlowSender(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newListener(t, nil)
		body, sender := io.Pipe()
		go func() {
			time.Sleep(spoolTimeout + time.Second)
			_, err := io.Copy(sender, recorded(t, "push-tag"))
			sender.CloseWithError(err)
		}()
		if w := l.post(t, westus, l.key.Token("contoso", "westus"), distributionV2, body); w.Code != http.StatusAccepted {
			t.Errorf("got %d %s, want 202", w.Code, w.Body)
		}
	})
}

// TestHandlerDamagedSpool holds that operators hear of a spool that was put aside.
func TestHandlerDamagedSpool(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	if err := os.WriteFile(path, []byte("half a fi"), 0o600); err != nil {
		t.Fatal(err)
	}
	core, logs := observer.New(zapcore.DebugLevel)
	if _, err := NewHandler(open(t, path, Limits{}), Config{Log: zap.New(core), Metrics: prometheus.NewRegistry()}); err != nil {
		t.Fatal(err)
	}
	if all := logs.All(); len(all) != 1 || all[0].ContextMap()["file"] != path+".damaged" {
		t.Errorf("logged %+v", all)
	}
}

func TestHandlerConcurrent(t *testing.T) {
	t.Parallel()
	l := newListener(t, nil)
	var all sync.WaitGroup
	for n := range 40 {
		all.Go(func() {
			region := []string{"westus", "westeurope"}[n%2]
			body := envelope("push", "team/app", fmt.Sprint("t", n), digestOf(n), "x/y", "")
			if w := l.post(t, "/events/contoso/"+region, l.key.Token("contoso", region), distributionV2, strings.NewReader(body)); w.Code != http.StatusAccepted {
				t.Errorf("got %d %s", w.Code, w.Body)
			}
		})
	}
	all.Wait()
	if a, b := l.spool.Pending("contoso", "westus"), l.spool.Pending("contoso", "westeurope"); a != 20 || b != 20 {
		t.Errorf("%d and %d items pending, want 20 each", a, b)
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "key")
	var all sync.WaitGroup
	keys := make([]Key, 8)
	for i := range keys {
		all.Go(func() {
			var err error
			if keys[i], err = LoadKey(path); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, k := range keys {
		if k != keys[0] || k == (Key{}) {
			t.Fatal("starting at once made different keys")
		}
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("got mode %v, %v, want 0600", info.Mode(), err)
	}
	if left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".event-key-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	a, b := keys[0].Token("contoso", "westus"), keys[0].Token("contoso", "westeurope")
	if a == b || len(a) != 64 {
		t.Errorf("got the tokens %q and %q", a, b)
	}
	// HMAC-SHA-256 of "contoso/westus" under 32 zero bytes, by openssl: tokens must not change between versions.
	if got, want := (Key{}).Token("contoso", "westus"), "180e3963129f6ef69d6594cdfe7b66cbc07451417a01763c7d33f9b7b8e9cacd"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for mode, taken := range map[os.FileMode]bool{0o400: true, 0o440: true, 0o640: true, 0o604: false, 0o644: false, 0o620: false, 0o660: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); (err == nil) != taken {
			t.Errorf("a key of mode %04o: %v, want it taken: %v", mode, err, taken)
		}
	}
	for _, text := range []string{"", "secret", strings.Repeat("0", 63), strings.Repeat("0", 65), strings.Repeat("x", 64), strings.Repeat("0", 200)} {
		bad := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(bad, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(bad); err == nil || text != "" && strings.Contains(err.Error(), text) {
			t.Errorf("%q: got %v, want an error that does not repeat it", text, err)
		}
	}
	if _, err := LoadKey(filepath.Join(t.TempDir(), "none", "key")); err == nil {
		t.Error("a key was made in a folder that does not exist")
	}
}

// writeCertificate makes a self-signed certificate for 127.0.0.1.
func writeCertificate(t *testing.T, certFile, keyFile string, serial int64) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "events"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
		// Two certificates of one test must not have the same time, however coarse the clock is.
		at := time.Now().Add(time.Duration(serial) * time.Second)
		if err := os.Chtimes(file, at, at); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestServe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	first := writeCertificate(t, certFile, keyFile, 1)
	l := newListener(t, nil)
	certificate, err := listener.LoadCertificate(certFile, keyFile, l.config.Log)
	if err != nil {
		t.Fatal(err)
	}
	socket, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, socket, l.Handler, certificate) }()

	post := func(trusted *x509.Certificate) error {
		roots := x509.NewCertPool()
		roots.AddCert(trusted)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
		defer transport.CloseIdleConnections()
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+socket.Addr().String()+westus, recorded(t, "push-tag"))
		if err != nil {
			return err
		}
		r.Header.Set("Authorization", "Bearer "+l.key.Token("contoso", "westus"))
		r.Header.Set("Content-Type", distributionV2)
		resp, err := client.Do(r)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusAccepted {
			return fmt.Errorf("status %d", resp.StatusCode)
		}
		return nil
	}
	if err := post(first); err != nil {
		t.Fatal(err)
	}
	second := writeCertificate(t, certFile, keyFile, 2)
	if err := post(second); err != nil {
		t.Errorf("after the renewal: %v", err)
	}
	if err := os.WriteFile(certFile, []byte("half a certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := post(second); err != nil {
		t.Errorf("with a broken renewal: %v", err)
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("ending: %v", err)
	}
	if n := l.spool.Pending("contoso", "westus"); n != 1 {
		t.Errorf("%d items pending, want 1", n)
	}
}
