package check

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/api"
	"portolan/router"
	"portolan/topology"
)

// fakeAPI answers what the server would.
type fakeAPI struct{ status api.Status }

func (f fakeAPI) Status(context.Context) (api.Status, error) { return f.status, nil }

func (f fakeAPI) Explain(_ context.Context, registry, ecs, _ string) (api.Explanation, error) {
	return api.Explanation{Explanation: router.Explanation{Registry: registry, Region: "westus", Located: true}}, nil
}

// certificate is one for names, signed by itself.
func certificate(t *testing.T, end time.Time, names ...string) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, DNSNames: names, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: end, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, parsed
}

func serveTLS(t *testing.T, c tls.Certificate) (port string) {
	t.Helper()
	s := httptest.NewUnstartedServer(http.NotFoundHandler())
	s.TLS = &tls.Config{Certificates: []tls.Certificate{c}}
	s.Config.ErrorLog = nil
	s.StartTLS()
	t.Cleanup(s.Close)
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// serveDNS answers from records, over UDP and TCP on one port.
func serveDNS(t *testing.T, authoritative bool, records ...string) (at string) {
	t.Helper()
	handler := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		a := new(mdns.Msg)
		a.SetReply(q)
		a.Authoritative = authoritative
		for _, text := range records {
			rr, err := mdns.NewRR(text)
			if err != nil {
				t.Error(err)
				continue
			}
			h := rr.Header()
			if h.Name == q.Question[0].Name && (h.Rrtype == q.Question[0].Qtype || h.Rrtype == mdns.TypeCNAME && q.Question[0].Qtype == mdns.TypeA) {
				a.Answer = append(a.Answer, rr)
			}
		}
		w.WriteMsg(a)
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p, err := net.ListenPacket("udp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*mdns.Server{{Listener: l, Handler: handler}, {PacketConn: p, Handler: handler}} {
		done := make(chan error, 1)
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			if err := s.Shutdown(); err != nil {
				t.Error(err)
			}
			<-done
		})
	}
	return l.Addr().String()
}

func TestRegistry(t *testing.T) {
	t.Parallel()
	good, root := certificate(t, time.Now().Add(90*24*time.Hour), "registry.contoso.com")
	old, oldRoot := certificate(t, time.Now().Add(24*time.Hour), "registry.contoso.com")
	other, otherRoot := certificate(t, time.Now().Add(90*24*time.Hour), "other.example")
	roots := x509.NewCertPool()
	for _, c := range []*x509.Certificate{root, oldRoot, otherRoot} {
		roots.AddCert(c)
	}
	const soa = "geo.example.net. 5 IN SOA ns1.geo.example.net. hostmaster.example.net. 7 1 1 1 5"
	resolver := serveDNS(t, false, "geo.example.net. 60 IN NS ns1.geo.example.net.", "ns1.geo.example.net. 60 IN A 127.0.0.53",
		"registry.contoso.com. 60 IN CNAME contoso.geo.example.net.", "registry.contoso.com. 60 IN CAA 0 issue \"letsencrypt.org\"")
	server, stale, lame := serveDNS(t, true, soa), serveDNS(t, true, strings.Replace(soa, " 7 ", " 6 ", 1)), serveDNS(t, false, soa)

	for name, c := range map[string]struct {
		certificate tls.Certificate
		servers     []string
		change      func(*api.Status, *api.Registry)
		passed      bool
		want        []string // "level subject: part of the text"
	}{
		"all is well": {good, []string{server}, nil, true, []string{
			"ok server:ready", "ok this server " + server + ":authoritative over UDP and TCP", "ok zone geo.example.net.:serial 7 on all 1",
			"ok delegation of geo.example.net.:ns1.geo.example.net.", "ok glue of ns1.geo.example.net.:127.0.0.53",
			"ok clients in Asia:goes to westus", "ok client name registry.contoso.com:leads to contoso.geo.example.net.",
			"ok CAA of registry.contoso.com:letsencrypt.org", "ok replica westus:Ready", "ok events westus:3 since", "registry.contoso.com:valid until"}},
		"serials differ":              {good, []string{server, stale}, nil, false, []string{"fail zone geo.example.net.:serial 6: " + stale + "; serial 7: " + server}},
		"not authoritative":           {good, []string{lame}, nil, false, []string{"fail this server " + lame + ":without authority"}},
		"nobody answers":              {good, []string{"127.0.0.1:1"}, nil, false, []string{"fail this server 127.0.0.1:1:no answer over UDP", "fail zone geo.example.net.:no server answered"}},
		"certificate of others":       {other, []string{server}, nil, false, []string{"valid for other.example, not registry.contoso.com"}},
		"certificate about to expire": {old, []string{server}, nil, true, []string{"warn certificate westus"}},
		"delegated elsewhere": {good, []string{server}, func(s *api.Status, r *api.Registry) {
			s.DNS.Nameservers = map[string][]string{"ns2.geo.example.net.": {"127.0.0.53"}}
		}, false, []string{"fail delegation of geo.example.net.:resolvers find ns1.geo.example.net., and configured are ns2.geo.example.net."}},
		"wrong glue": {good, []string{server}, func(s *api.Status, r *api.Registry) {
			s.DNS.Nameservers["ns1.geo.example.net."] = []string{"127.0.0.54"}
		}, false, []string{"fail glue of ns1.geo.example.net.:resolvers find 127.0.0.53, and configured is 127.0.0.54"}},
		"unhealthy": {good, []string{server}, func(s *api.Status, r *api.Registry) {
			r.Replicas[0].Health, r.Replicas[0].Reason = "Unhealthy", "connection refused"
		}, false, []string{"fail replica westus:connection refused"}},
		"silent": {good, []string{server}, func(s *api.Status, r *api.Registry) { s.Events.Received = nil }, true, []string{"warn events westus:none came"}},
		"client name elsewhere": {good, []string{server}, func(s *api.Status, r *api.Registry) { r.FQDN = "contoso.other.example" }, true,
			[]string{"warn client name registry.contoso.com:do not find that it leads to contoso.other.example."}},
		"bad value": {good, []string{server}, func(s *api.Status, r *api.Registry) {
			s.Topology.Problems = []topology.Problem{{Key: "registries/contoso/home", Reason: "is empty"}}
		}, false, []string{"fail registries/contoso/home:is empty"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status := api.Status{Ready: true, Roles: []string{"dns"}, DNS: &api.DNSStatus{Zone: "geo.example.net.", Listen: c.servers,
				Nameservers: map[string][]string{"ns1.geo.example.net.": {"127.0.0.53"}}}, Events: &api.EventsStatus{Received: map[string]uint64{"contoso/westus": 3}}}
			registry := api.Registry{Name: "contoso", FQDN: "contoso.geo.example.net", ClientNames: []string{"registry.contoso.com"},
				Replicas: []api.Replica{{Registry: "contoso", Region: "westus", Endpoint: "https://127.0.0.1:" + serveTLS(t, c.certificate),
					Addresses: []string{"127.0.0.1"}, Status: topology.Ready, Health: "Healthy"}}}
			if c.change != nil {
				c.change(&status, &registry)
			}
			var findings []string
			checker := Checker{API: fakeAPI{status}, Resolver: resolver, Roots: roots, Found: func(f Finding) {
				findings = append(findings, string(f.Level)+" "+f.Subject+":"+f.Text)
			}}
			passed, err := checker.Registry(t.Context(), registry)
			if err != nil || passed != c.passed {
				t.Errorf("passed %v, %v, want %v:\n%s", passed, err, c.passed, strings.Join(findings, "\n"))
			}
			for _, want := range c.want {
				head, part, _ := strings.Cut(want, ":")
				if i := strings.LastIndex(want, ":"); strings.Contains(want, "this server") {
					head, part = want[:i], want[i+1:]
				}
				found := false
				for _, f := range findings {
					found = found || strings.Contains(f, head) && strings.Contains(f, part)
				}
				if !found {
					t.Errorf("no %q in:\n%s", want, strings.Join(findings, "\n"))
				}
			}
		})
	}
}
