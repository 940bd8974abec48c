package health

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	consul "github.com/hashicorp/consul/api"

	"portolan/router"
	"portolan/topology"
)

// authority signs certificates for tests.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	path        string // PEM file
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test authority"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	certificate, _ := x509.ParseCertificate(der)
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return &authority{certificate, key, path}
}

// sign makes a certificate for names that ends after life.
func (a *authority) sign(t *testing.T, life time.Duration, names ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(life),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	for _, n := range names {
		if ip := net.ParseIP(n); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, n)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.certificate, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serve starts a server at address (an address of the loopback network) and returns its port.
func serve(t *testing.T, address string, handler http.Handler, config *tls.Config) string {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(handler)
	s.Listener.Close()
	s.Listener = l
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	if config != nil {
		s.TLS = config
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(s.Close)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

// registry answers /v2/ with code and notes the hosts, which must be those of the handshakes; anything else is 404.
func registry(code int, hosts *sync.Map) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if hosts != nil {
			hosts.Store(r.Host, true)
		}
		if name, _, _ := net.SplitHostPort(r.Host); r.TLS != nil && net.ParseIP(name) == nil && r.TLS.ServerName != name {
			w.WriteHeader(http.StatusMisdirectedRequest)
			return
		}
		if r.URL.Path != "/v2/" {
			http.NotFound(w, r)
			return
		}
		w.WriteHeader(code)
	})
}

func ask(t *testing.T, p *prober, target *target) Result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	return p.probe(ctx, target)
}

func at(address string) key {
	return key{ReplicaKey: router.ReplicaKey{Registry: "contoso", Region: "westus"}, address: netip.MustParseAddr(address)}
}

func TestProbeHTTPS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	one, two := ca.sign(t, time.Hour, "registry.contoso.com"), ca.sign(t, time.Minute, "mirror.contoso.com", "127.0.0.9")
	expired := ca.sign(t, -time.Hour, "old.contoso.com")
	config := &tls.Config{Certificates: []tls.Certificate{two}, GetCertificate: func(h *tls.ClientHelloInfo) (*tls.Certificate, error) {
		switch h.ServerName {
		case "registry.contoso.com":
			return &one, nil
		case "old.contoso.com":
			return &expired, nil
		}
		return &two, nil
	}}
	var hosts sync.Map
	port := serve(t, "127.0.0.9", registry(http.StatusUnauthorized, &hosts), config)
	for _, c := range []struct {
		name    string
		names   []string
		ca      string
		outcome Outcome
		error   string
		expiry  time.Duration
	}{
		{"each name has its certificate", []string{"registry.contoso.com", "mirror.contoso.com"}, "file:" + ca.path, Passed, "", time.Minute},
		{"an address as name", []string{"127.0.0.9"}, "file:" + ca.path, Passed, "", time.Minute},
		{"one name lacks its certificate", []string{"registry.contoso.com", "other.contoso.com"}, "file:" + ca.path, Failed, "asking the registry at 127.0.0.9:PORT for other.contoso.com: ", time.Hour},
		{"an address as name, and no root", []string{"127.0.0.9"}, "", Failed, "asking the registry at 127.0.0.9:PORT: ", 0},
		{"expired", []string{"old.contoso.com"}, "file:" + ca.path, Failed, "expired", -time.Hour},
		{"not a root of the system", []string{"registry.contoso.com"}, "", Failed, "unknown authority", 0},
		{"no CA file", []string{"registry.contoso.com"}, "file:" + ca.path + ".missing", Unable, "no such file", 0},
		{"a bad reference", []string{"registry.contoso.com"}, "env:CA", Unable, "file:PATH", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			hosts.Clear()
			r := ask(t, &prober{}, &target{key: at("127.0.0.9"), mode: topology.ProbeHTTPS, port: port, names: c.names, ca: c.ca})
			want := strings.ReplaceAll(c.error, "PORT", port)
			if r.Outcome != c.outcome || !strings.Contains(r.Error, want) {
				t.Errorf("got %v %q, want %v with %q", r.Outcome, r.Error, c.outcome, want)
			}
			if e := r.CertificateExpiry(); c.expiry == 0 != e.IsZero() || c.expiry != 0 && time.Until(e).Round(time.Minute) != c.expiry {
				t.Errorf("certificate expiry %v, want in %v", e, c.expiry)
			}
			for _, name := range c.names {
				if _, asked := hosts.Load(name + ":" + port); c.outcome == Passed && !asked {
					t.Errorf("%s was not asked for", name)
				}
			}
		})
	}
}

// A CA is trusted besides the system's: client names may have public certificates where the endpoint has one of its own.
func TestProbeTrusts(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	want, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	want.AddCert(ca.certificate)
	config, err := tlsConfig(&target{mode: topology.ProbeHTTPS, ca: "file:" + ca.path})
	if err != nil {
		t.Fatal(err)
	}
	if !config.RootCAs.Equal(want) {
		t.Error("not the system's roots and the CA")
	}
}

// A registry that asks for a certificate gets the one that the replica names.
func TestProbeClientCertificate(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	clients := x509.NewCertPool()
	clients.AddCert(ca.certificate)
	port := serve(t, "127.0.0.17", registry(200, nil), &tls.Config{
		Certificates: []tls.Certificate{ca.sign(t, time.Hour, "registry.contoso.com")},
		ClientAuth:   tls.RequireAnyClientCert,
	})
	own := ca.sign(t, time.Hour, "portolan")
	key, err := x509.MarshalPKCS8PrivateKey(own.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "own.pem")
	both := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: own.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})...)
	if err := os.WriteFile(path, both, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, reference string
		outcome         Outcome
	}{
		{"named", "file:" + path, Passed},
		{"not named", "", Failed},
		{"not there", "file:" + path + ".missing", Unable},
		{"no key", "file:" + ca.path, Unable},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := ask(t, &prober{}, &target{
				key: at("127.0.0.17"), mode: topology.ProbeHTTPS, port: port, names: []string{"registry.contoso.com"}, ca: "file:" + ca.path, clientCert: c.reference,
			})
			if r.Outcome != c.outcome {
				t.Errorf("got %v %q, want %v", r.Outcome, r.Error, c.outcome)
			}
		})
	}
}

// The names share the time of a probe: asked one after the other, each would cost a registry far away three round trips.
func TestProbeAsksNamesTogether(t *testing.T) {
	t.Parallel()
	names := []string{"a.example", "b.example", "c.example"}
	var asked atomic.Int32
	all := make(chan struct{})
	port := serve(t, "127.0.0.18", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == int32(len(names)) {
			close(all)
		}
		select {
		case <-all:
		case <-r.Context().Done():
		}
	}), nil)
	if r := ask(t, &prober{}, &target{key: at("127.0.0.18"), mode: topology.ProbeHTTP, port: port, names: names}); r.Outcome != Passed {
		t.Errorf("%v: %s", r.Outcome, r.Error)
	}
}

// A server that takes a connection and says nothing costs the time of the probe, and no connection stays behind.
func TestProbeHungHandshake(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.19:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	closed := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			defer conn.Close()
			_ = conn.SetReadDeadline(time.Now().Add(30 * time.Second)) // a connection just accepted takes it
			_, err = io.Copy(io.Discard, conn)
		}
		closed <- err
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	r := (&prober{}).probe(ctx, &target{key: at("127.0.0.19"), mode: topology.ProbeHTTPS, port: port, names: []string{"registry.contoso.com"}})
	if r.Outcome != Failed || !strings.Contains(r.Error, "deadline") {
		t.Errorf("got %v %q", r.Outcome, r.Error)
	}
	if err := <-closed; err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection stayed: %v", err)
	}
}

func TestProbeHTTP(t *testing.T) {
	t.Parallel()
	elsewhere := serve(t, "127.0.0.10", registry(200, nil), nil)
	redirect := http.RedirectHandler("http://127.0.0.10:"+elsewhere+"/v2/", http.StatusFound)
	endless := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, strings.Repeat("x", 4096)); err != nil {
				return
			}
		}
	})
	hung := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	for _, c := range []struct {
		name    string
		handler http.Handler
		outcome Outcome
		error   string
	}{
		{"200", registry(200, nil), Passed, ""},
		{"401", registry(401, nil), Passed, ""},
		{"404", registry(404, nil), Failed, "404"},
		{"503", registry(503, nil), Failed, "503"},
		{"redirects are not followed", redirect, Failed, "302"},
		{"an endless body is not read", endless, Passed, ""},
		{"no answer", hung, Failed, "deadline"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			port := serve(t, "127.0.0.11", c.handler, nil)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			if c.error == "deadline" {
				cancel()
				ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
			}
			defer cancel()
			r := (&prober{}).probe(ctx, &target{key: at("127.0.0.11"), mode: topology.ProbeHTTP, port: port, names: []string{"registry.contoso.com"}})
			if r.Outcome != c.outcome || !strings.Contains(r.Error, c.error) {
				t.Errorf("got %v %q, want %v with %q", r.Outcome, r.Error, c.outcome, c.error)
			}
		})
	}
}

func TestProbeTCP(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.12:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	probed := &target{key: at("127.0.0.12"), mode: topology.ProbeTCP, port: port}
	if r := ask(t, &prober{}, probed); r.Outcome != Passed {
		t.Errorf("open port: %v %s", r.Outcome, r.Error)
	}
	l.Close()
	if r := ask(t, &prober{}, probed); r.Outcome != Failed || !strings.Contains(r.Error, "refused") {
		t.Errorf("closed port: %v %s", r.Outcome, r.Error)
	}
}

func TestProbeHostname(t *testing.T) {
	t.Parallel()
	port := serve(t, "127.0.0.13", registry(200, nil), nil)
	dead, alive := netip.MustParseAddr("127.0.0.14"), netip.MustParseAddr("127.0.0.13")
	for _, c := range []struct {
		name     string
		resolved []netip.Addr
		err      error
		outcome  Outcome
	}{
		{"one of two stands", []netip.Addr{dead, alive}, nil, Passed},
		{"none stands", []netip.Addr{dead}, nil, Failed},
		{"no address", nil, nil, Failed},
		{"no such name", nil, &net.DNSError{Err: "no such host", IsNotFound: true}, Failed},
		{"a resolver that fails", nil, &net.DNSError{Err: "server misbehaving", IsTemporary: true}, Unable},
		{"a resolver that is silent", nil, &net.DNSError{Err: "i/o timeout", IsTimeout: true}, Unable},
		{"no more than four are tried", []netip.Addr{dead, dead, dead, dead, alive}, nil, Failed},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			p := &prober{resolve: func(_ context.Context, host string) ([]netip.Addr, error) {
				if host != "registry.westus.example" {
					t.Errorf("asked for %q", host)
				}
				return c.resolved, c.err
			}}
			r := ask(t, p, &target{
				key: key{ReplicaKey: router.ReplicaKey{Registry: "contoso", Region: "westus"}}, hostname: "registry.westus.example.",
				mode: topology.ProbeHTTP, port: port, names: []string{"registry.contoso.com"},
			})
			if r.Outcome != c.outcome {
				t.Errorf("got %v %q, want %v", r.Outcome, r.Error, c.outcome)
			}
		})
	}
}

// That an address cannot be asked from here, as an IPv6 one on a machine without IPv6, hides no failure of another, whichever is
// known first.
func TestAskAnyUnable(t *testing.T) {
	t.Parallel()
	hung, refusing, unroutable := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2"), netip.MustParseAddr("2001:db8::1")
	ask := func(ctx context.Context, address netip.Addr) ([]Certificate, error) {
		switch address {
		case hung:
			<-ctx.Done()
			return nil, ctx.Err()
		case unroutable:
			return nil, unable{errors.New("no route")}
		}
		return nil, errors.New("refused")
	}
	for _, c := range []struct {
		name      string
		addresses []netip.Addr
		want      string
	}{
		{"one hangs", []netip.Addr{hung, unroutable}, "context deadline exceeded"},
		{"one refuses, asked first", []netip.Addr{refusing, unroutable}, "refused"},
		{"one refuses, asked last", []netip.Addr{unroutable, refusing}, "refused"},
		{"two failed", []netip.Addr{hung, refusing}, "refused"},
		{"none can be asked", []netip.Addr{unroutable, unroutable}, "no route"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				if _, err := askAny(ctx, c.addresses, ask); err == nil || err.Error() != c.want || isUnable(err) != (c.want == "no route") {
					t.Errorf("got %v, want %q", err, c.want)
				}
			})
		})
	}
}

// Four addresses do not each get a quarter of the time: far away, none would answer within that.
func TestProbeSlowHostname(t *testing.T) {
	t.Parallel()
	port := serve(t, "127.0.0.20", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-time.After(1500 * time.Millisecond): // more than a quarter of what ask gives
		case <-r.Context().Done():
		}
	}), nil)
	slow := netip.MustParseAddr("127.0.0.20")
	p := &prober{resolve: func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{slow, slow, slow, slow}, nil }}
	r := ask(t, p, &target{
		key: key{ReplicaKey: router.ReplicaKey{Registry: "contoso", Region: "westus"}}, hostname: "registry.westus.example.",
		mode: topology.ProbeHTTP, port: port, names: []string{"registry.contoso.com"},
	})
	if r.Outcome != Passed {
		t.Errorf("%v: %s", r.Outcome, r.Error)
	}
}

// An address that swallows what it is sent leaves the next one its time.
func TestProbeHostnameFirstIsSilent(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	port := serve(t, "127.0.0.21", http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			<-r.Context().Done()
		}
	}), nil)
	same := netip.MustParseAddr("127.0.0.21")
	p := &prober{resolve: func(context.Context, string) ([]netip.Addr, error) { return []netip.Addr{same, same}, nil }}
	r := ask(t, p, &target{
		key: key{ReplicaKey: router.ReplicaKey{Registry: "contoso", Region: "westus"}}, hostname: "registry.westus.example.",
		mode: topology.ProbeHTTP, port: port, names: []string{"registry.contoso.com"},
	})
	if r.Outcome != Passed || asked.Load() != 2 {
		t.Errorf("after %d requests: %v: %s", asked.Load(), r.Outcome, r.Error)
	}
}

func TestProbeConsul(t *testing.T) {
	t.Parallel()
	entry := func(address, status string) string {
		return fmt.Sprintf(`{"Node":{"Address":"192.0.2.99"},"Service":{"Address":%q},"Checks":[{"Status":%q}]}`, address, status)
	}
	for _, c := range []struct {
		name, body string
		code       int
		outcome    Outcome
	}{
		{"own instance passes", "[" + entry("127.0.0.15", "passing") + "]", 200, Passed},
		{"a warning passes", "[" + entry("127.0.0.15", "warning") + "]", 200, Passed},
		{"own instance is critical, another passes", "[" + entry("127.0.0.15", "critical") + "," + entry("192.0.2.1", "passing") + "]", 200, Failed},
		{"behind a balancer", "[" + entry("192.0.2.2", "critical") + "," + entry("192.0.2.1", "passing") + "]", 200, Passed},
		{"no instance", "[]", 200, Failed},
		{"no leader", "No cluster leader", 500, Unable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			port := serve(t, "127.0.0.16", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path != "/v1/health/service/registry" || !r.URL.Query().Has("consistent") {
					t.Errorf("asked %s", r.URL)
				}
				w.WriteHeader(c.code)
				io.WriteString(w, c.body)
			}), nil)
			client, err := consul.NewClient(&consul.Config{Address: "127.0.0.16:" + port})
			if err != nil {
				t.Fatal(err)
			}
			r := ask(t, &prober{consul: client}, &target{key: at("127.0.0.15"), mode: topology.ProbeConsul, service: "registry"})
			if r.Outcome != c.outcome {
				t.Errorf("got %v %q, want %v", r.Outcome, r.Error, c.outcome)
			}
		})
	}
	if r := ask(t, &prober{}, &target{key: at("127.0.0.15"), mode: topology.ProbeConsul, service: "registry"}); r.Outcome != Unable || !strings.Contains(r.Error, "no Consul is configured") {
		t.Errorf("without Consul: %v %q", r.Outcome, r.Error)
	}
}

func TestTargets(t *testing.T) {
	t.Parallel()
	parse := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	s := &topology.Snapshot{Registries: []*topology.Registry{
		{Name: "contoso", ClientNames: []string{"registry.contoso.com"}, Replicas: []*topology.Replica{
			{Region: "a", Endpoint: parse("https://a.internal"), Addresses: []netip.Addr{a, b}},
			{Region: "b", Endpoint: parse("http://b.internal:5000"), Addresses: []netip.Addr{a}, Probe: topology.Probe{Mode: topology.ProbeHTTP}},
			{Region: "c", Endpoint: parse("https://c.internal"), Addresses: []netip.Addr{a}, Probe: topology.Probe{Mode: topology.ProbeNone}},
		}},
		{Name: "fabrikam", Replicas: []*topology.Replica{
			{Region: "a", Endpoint: parse("https://d.internal"), Hostname: "d.example.", Probe: topology.Probe{Mode: topology.ProbeTCP}},
			{Region: "b", Endpoint: parse("http://e.internal"), Addresses: []netip.Addr{a}, Probe: topology.Probe{Mode: topology.ProbeTCP}},
		}},
	}}
	var got []string
	for _, t := range targets(s) {
		got = append(got, fmt.Sprint(t.Registry, "/", t.Region, " ", t.mode, " ", t.place(), " ", t.names))
	}
	want := []string{
		"contoso/a 0 192.0.2.1:443 [registry.contoso.com]",
		"contoso/a 0 [2001:db8::1]:443 [registry.contoso.com]",
		"contoso/b 1 192.0.2.1:5000 [registry.contoso.com]",
		"fabrikam/a 2 d.example:443 [d.internal]",
		"fabrikam/b 2 192.0.2.1:80 [e.internal]",
	}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
