package check

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/api"
	"portolan/router"
	"portolan/router/geo"
	"portolan/test/bed"
	"portolan/topology"
)

// fakeAPI answers what the server would.
type fakeAPI struct{ status api.Status }

func (f fakeAPI) Status(context.Context) (api.Status, error) { return f.status, nil }

func (f fakeAPI) Explain(_ context.Context, registry, ecs, _ string) (api.Explanation, error) {
	return api.Explanation{Explanation: router.Explanation{Registry: registry, Region: "westus", Located: true, Scope: 24, Databases: "0011"}, Topology: "aabb"}, nil
}

func (f fakeAPI) Shares(_ context.Context, registry string) ([]api.RegistryShares, error) {
	return []api.RegistryShares{{Registry: registry, Splits: []router.Split{{Nearest: "westus", Shares: []router.Share{{Region: "westus", Percent: 90}, {Region: "eastus", Percent: 10}}}}}}, nil
}

// certificate is one for names, signed by itself.
func certificate(t *testing.T, end time.Time, names ...string) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	return signed(t, end, nil, names...)
}

// signed is a certificate for names, with those that issuer has behind it; signed by itself without one.
func signed(t *testing.T, end time.Time, issuer *tls.Certificate, names ...string) (tls.Certificate, *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: rand.Text()}, DNSNames: names, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: end, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign}
	parent, signer := template, crypto.PrivateKey(key)
	var chain [][]byte
	if issuer != nil {
		chain, signer = issuer.Certificate, issuer.PrivateKey
		if parent, err = x509.ParseCertificate(chain[0]); err != nil {
			t.Fatal(err)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: append([][]byte{der}, chain...), PrivateKey: key}, parsed
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

// answers are those of a server that has these records, for networks of scope bits.
func answers(t *testing.T, authoritative bool, scope uint8, records ...string) func(*mdns.Msg, *mdns.Msg) {
	return func(q, a *mdns.Msg) {
		a.Authoritative = authoritative
		for _, text := range records {
			h := record(t, text).Header()
			if h.Name == q.Question[0].Name && (h.Rrtype == q.Question[0].Qtype || h.Rrtype == mdns.TypeCNAME && q.Question[0].Qtype == mdns.TypeA) {
				a.Answer = append(a.Answer, record(t, text))
			}
		}
		if o := q.IsEdns0(); o != nil && len(o.Option) > 0 {
			subnet := *o.Option[0].(*mdns.EDNS0_SUBNET)
			subnet.SourceScope = scope
			a.SetEdns0(1232, false)
			a.IsEdns0().Option = []mdns.EDNS0{&subnet}
		}
	}
}

func record(t *testing.T, text string) mdns.RR {
	rr, err := mdns.NewRR(text)
	if err != nil {
		t.Error(err)
	}
	return rr
}

// serveDNS serves over UDP and TCP on one port.
func serveDNS(t *testing.T, answer func(q, a *mdns.Msg)) (at string) {
	t.Helper()
	handler := mdns.HandlerFunc(func(w mdns.ResponseWriter, q *mdns.Msg) {
		a := new(mdns.Msg).SetReply(q)
		answer(q, a)
		w.WriteMsg(a)
	})
	l, err := net.Listen("tcp", bed.NewAddress(t, "127.0.0.1"))
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
	top, topRoot := certificate(t, time.Now().Add(90*24*time.Hour))
	soonest := time.Now().Add(48 * time.Hour)
	between, _ := signed(t, soonest, &top)
	chained, _ := signed(t, time.Now().Add(60*24*time.Hour), &between, "registry.contoso.com")
	roots := x509.NewCertPool()
	for _, c := range []*x509.Certificate{root, oldRoot, otherRoot, topRoot} {
		roots.AddCert(c)
	}
	path := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: root.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	ca := "file:" + path
	const soa, one = "geo.example.net. 5 IN SOA ns1.geo.example.net. hostmaster.example.net. 7 1 1 1 5", "contoso.geo.example.net. 5 IN A 127.0.0.1"
	known := []string{"registry.contoso.com. 60 IN CNAME contoso.geo.example.net.", "registry.contoso.com. 60 IN CAA 0 issue \"letsencrypt.org\"",
		// What the zone says of itself is no news about its parent.
		"geo.example.net. 60 IN NS ns1.geo.example.net.", "ns1.geo.example.net. 60 IN A 127.0.0.53"}
	// The parent's servers are where a resolver says, at the port of all name servers here.
	resolver := serveDNS(t, answers(t, false, 0, append(known, "example.net. 60 IN NS ns.example.net.", "ns.example.net. 60 IN A 127.0.0.1")...))
	alone := serveDNS(t, answers(t, false, 0, known...))
	names, glue := []string{"ns1.geo.example.net."}, "ns1.geo.example.net. 60 IN A 127.0.0.53"
	refers := func(glue string, names ...string) string {
		_, port, err := net.SplitHostPort(serveDNS(t, func(q, a *mdns.Msg) {
			for _, name := range names {
				if q.Question[0].Name == "geo.example.net." && !q.RecursionDesired {
					a.Ns = append(a.Ns, record(t, "geo.example.net. 60 IN NS "+name))
				}
			}
			if glue != "" {
				a.Extra = append(a.Extra, record(t, glue))
			}
		}))
		if err != nil {
			t.Fatal(err)
		}
		return port
	}
	parent := refers(glue, names...)
	_, closed, _ := net.SplitHostPort(bed.NewAddress(t, "127.0.0.1"))
	server, stale, lame := serveDNS(t, answers(t, true, 24, soa, one)), serveDNS(t, answers(t, true, 24, strings.Replace(soa, " 7 ", " 6 ", 1), one)), serveDNS(t, answers(t, false, 0, soa))
	tells := func(topology, databases string) string {
		return serveDNS(t, answers(t, true, 24, soa, one, `whoami.contoso.geo.example.net. 0 IN TXT "region=westus" "topology=`+topology+`" "databases=`+databases+`"`,
			`whoami.contoso.geo.example.net. 0 IN TXT "topology=of another record"`))
	}
	alike, behind, otherFiles := tells("aa", "00"), tells("cc", "00"), tells("aa", "22")
	elsewhere, narrower := serveDNS(t, answers(t, true, 24, soa, strings.Replace(one, "127.0.0.1", "127.0.0.9", 1))), serveDNS(t, answers(t, true, 20, soa, one))

	for name, c := range map[string]struct {
		certificate tls.Certificate
		servers     []string
		parent      string // its servers' port; empty: those of a zone that is delegated rightly
		change      func(*api.Status, *api.Registry, *Checker)
		passed      bool
		want        []string // "level subject|part of the text", or "none subject"
	}{
		"all is well": {good, []string{server}, "", nil, true, []string{
			"ok server|ready", "ok this server " + server + "|authoritative over UDP and TCP", "ok this server " + server + "|decides alike", "ok zone geo.example.net.|serial 7 on all that answered: " + server,
			"ok delegation of geo.example.net.|the parent names ns1.geo.example.net.", "ok glue of ns1.geo.example.net.|the parent names 127.0.0.53",
			"ok clients in Asia|goes to westus", "ok clients near westus|90% to westus, 10% to eastus", "ok client name registry.contoso.com|leads to contoso.geo.example.net.",
			"ok CAA of registry.contoso.com|letsencrypt.org", "ok replica westus|Ready", "ok events westus|3 since", "ok certificate westus|valid until"}},
		"serials differ":    {good, []string{server, stale}, "", nil, false, []string{"fail zone geo.example.net.|serial 6: " + stale + "; serial 7: " + server}},
		"not authoritative": {good, []string{lame}, "", nil, false, []string{"fail this server " + lame + "|without authority"}},
		"nobody answers":    {good, []string{"127.0.0.1:1"}, "", nil, false, []string{"fail this server 127.0.0.1:1|no answer over UDP", "fail zone geo.example.net.|no server answered"}},
		"alike":             {good, []string{alike, server}, "", nil, true, []string{"ok this server " + alike + "|has the same topology and databases", "ok this server " + server + "|does not tell by what"}},
		"another topology":  {good, []string{alike, behind}, "", nil, false, []string{"fail this server " + behind + "|has the topology cc, and the server that was asked aabb"}},
		"other databases": {good, []string{alike, otherFiles}, "", nil, true,
			[]string{"warn this server " + otherFiles + "|looks clients up in other databases (22) than the server that was asked (0011)", "ok this server " + otherFiles + "|decides alike"}},
		"another decision":            {good, []string{server, elsewhere}, "", nil, false, []string{"ok this server " + server + "|decides alike", "fail this server " + elsewhere + "|(128.32.0.0/24) to 127.0.0.9, and the server that was asked to westus"}},
		"another database":            {good, []string{narrower}, "", nil, false, []string{"fail this server " + narrower + "|for a /20, and the server that was asked for a /24"}},
		"certificate of others":       {other, []string{server}, "", nil, false, []string{"fail certificate westus|valid for other.example, not registry.contoso.com"}},
		"certificate about to expire": {old, []string{server}, "", nil, true, []string{"warn certificate westus|valid until"}},
		"about to expire by the setting": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Health = &api.HealthStatus{CertificateWarning: 100 * 24 * 3600}
		}, true, []string{"warn certificate westus|valid until"}},
		"only what is over is warned of": {old, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Health = &api.HealthStatus{}
		}, true, []string{"ok certificate westus|valid until"}},
		"an authority between that is about to expire": {chained, []string{server}, "", nil, true,
			[]string{"warn certificate westus|valid until " + soonest.UTC().Format(time.DateOnly) + ", when a certificate ends that leads to its root"}},
		"an authority of the replica's own": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			c.Roots = nil
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", CA: ca}}
		}, true, []string{"ok certificate westus|valid until"}},
		"an authority that is not known": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			c.Roots = nil
		}, false, []string{"fail certificate westus|unknown authority"}},
		"a file of a server's machine": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			c.Roots = nil
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", CA: ca + ".missing"}}
		}, true, []string{"warn certificate westus|it cannot be verified here: reading CA certificates: open "}},
		"its certificates given": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", CA: ca + ".missing"}}
		}, true, []string{"ok certificate westus|valid until"}},
		"others given": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			c.Roots = x509.NewCertPool()
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", CA: ca + ".missing"}}
		}, false, []string{"fail certificate westus|unknown authority"}},
		"given beside the replica's own": {old, []string{server}, "", func(_ *api.Status, r *api.Registry, c *Checker) {
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", CA: ca}}
		}, true, []string{"warn certificate westus|valid until"}},
		"delegated elsewhere": {good, []string{server}, refers("", "ns2.geo.example.net."), nil, false,
			[]string{"fail delegation of geo.example.net.|the parent names ns2.geo.example.net., and configured are ns1.geo.example.net."}},
		"not delegated": {good, []string{server}, refers(""), nil, true, []string{"warn delegation of geo.example.net.|the parent names no name servers for it"}},
		"no glue":       {good, []string{server}, refers("", names...), nil, false, []string{"fail glue of ns1.geo.example.net.|the parent names no address, and configured is 127.0.0.53"}},
		"wrong glue": {good, []string{server}, refers("ns1.geo.example.net. 60 IN A 127.0.0.54", names...), nil, false,
			[]string{"fail glue of ns1.geo.example.net.|the parent names 127.0.0.54, and configured is 127.0.0.53"}},
		"a parent that cannot be asked": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, c *Checker) {
			c.Resolver = alone
			s.DNS.Nameservers["ns1.geo.example.net."] = []string{"127.0.0.54"}
		}, false, []string{"warn delegation of geo.example.net.|the parent could not be asked", "fail glue of ns1.geo.example.net.|resolvers find 127.0.0.53, and configured is 127.0.0.54"}},
		"a name server that is silent": {good, []string{server}, closed, func(s *api.Status, _ *api.Registry, c *Checker) {
			s.DNS.Nameservers["ns1.geo.example.net."] = []string{"127.0.0.53", "0.0.0.0"} // this machine, and by its address no lab
		}, false, []string{"warn name server ns1.geo.example.net. 127.0.0.53|no answer over UDP", "fail name server ns1.geo.example.net. 0.0.0.0|no answer over UDP"}},
		"a lab": {good, []string{server}, closed, func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.DNS.Nameservers["ns1.geo.example.net."] = []string{"127.0.0.1"}
		}, false, []string{"ok name server ns1.geo.example.net. 127.0.0.1|authoritative over UDP and TCP", "ok name server ns1.geo.example.net. 127.0.0.1|was asked at " + server + ", where this server listens",
			"ok zone geo.example.net.|serial 7 on all that answered: " + server}},
		"a lab on all addresses": {good, []string{strings.Replace(server, "127.0.0.1", "0.0.0.0", 1)}, closed, func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.DNS.Nameservers["ns1.geo.example.net."] = []string{"127.0.0.1"}
		}, false, []string{"ok name server ns1.geo.example.net. 127.0.0.1|was asked at " + server}},
		"unhealthy": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, _ *Checker) {
			r.Replicas[0].Health, r.Replicas[0].Reason = "Unhealthy", "connection refused"
		}, false, []string{"fail replica westus|connection refused"}},
		"an address that is down": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, _ *Checker) {
			r.Replicas[0].Probes = []api.Probe{{Target: "127.0.0.1", Health: "Healthy"}, {Target: "::1", Health: "Unhealthy", Error: "connection refused"}}
		}, true, []string{"warn replica westus|left out of answers: ::1 (connection refused)"}},
		"deleting": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, _ *Checker) {
			r.Replicas = append(r.Replicas, api.Replica{Registry: "contoso", Region: "eastus", Endpoint: "https://127.0.0.1:1", Addresses: []string{"127.0.0.9"}, Status: topology.Deleting,
				Health: "Healthy", Reason: "draining"}, api.Replica{Registry: "contoso", Region: "attic", Endpoint: "http://127.0.0.1:1", Status: topology.Deleting, Health: "Unhealthy", Reason: "draining"})
		}, true, []string{"ok replica eastus|draining", "warn replica attic|draining", "none certificate eastus", "none certificate attic", "none events eastus", "none events attic"}},
		"a young database": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Geo = []geo.Info{{Path: "city.mmdb", Built: time.Now().Add(-36 * time.Hour)}}
		}, true, []string{"ok database|1 day old"}},
		"silent": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) { s.Events.Received = nil }, true, []string{"warn events westus|none came"}},
		"events of pulls": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Events.Received["contoso/westus"], s.Events.Ignored = 30, map[string]uint64{"contoso/westus": 27}
		}, true, []string{"warn events westus|of 30 since the start, 27 were of pulls"}},
		"events beside a prefix": {good, []string{server}, "", func(s *api.Status, r *api.Registry, _ *Checker) {
			s.Events.Received["contoso/westus"], s.Events.Ignored = 30, map[string]uint64{"contoso/westus": 27}
			r.Document.Replicas = []topology.ReplicaDocument{{Region: "westus", Prefix: "team"}}
		}, true, []string{"ok events westus|30 since the start"}},
		"client name elsewhere": {good, []string{server}, "", func(_ *api.Status, r *api.Registry, _ *Checker) {
			r.ClientNames = append(r.ClientNames, "other.contoso.com")
		}, false,
			[]string{"warn client name other.contoso.com|do not find that it leads to contoso.geo.example.net.", "fail certificate westus|not other.contoso.com"}},
		"bad value": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Topology.Problems = []topology.Problem{{Key: "registries/contoso/home", Reason: "is empty"}}
		}, false, []string{"fail registries/contoso/home|is empty"}},
		"warnings": {good, []string{server}, "", func(s *api.Status, _ *api.Registry, _ *Checker) {
			s.Warnings = []string{"the store differs from topology.yaml"}
			s.Geo = []geo.Info{{Path: "city.mmdb", Built: time.Now().Add(-100 * 24 * time.Hour)}}
		}, true, []string{"warn server|differs from topology.yaml", "warn database|city.mmdb"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status := api.Status{Ready: true, Roles: []string{"dns"}, DNS: &api.DNSStatus{Zone: "geo.example.net.", Listen: c.servers,
				Nameservers: map[string][]string{"ns1.geo.example.net.": {"127.0.0.53"}}}, Events: &api.EventsStatus{Received: map[string]uint64{"contoso/westus": 3}}}
			registry := api.Registry{Name: "contoso", FQDN: "contoso.geo.example.net", ClientNames: []string{"registry.contoso.com"},
				Replicas: []api.Replica{{Registry: "contoso", Region: "westus", Endpoint: "https://127.0.0.1:" + serveTLS(t, c.certificate),
					Addresses: []string{"127.0.0.1"}, Status: topology.Ready, Health: "Healthy"}}}
			checker := Checker{Resolver: resolver, Roots: roots, port: cmp.Or(c.parent, parent)}
			if c.change != nil {
				c.change(&status, &registry, &checker)
			}
			var findings []string
			checker.API, checker.Found = fakeAPI{status}, func(f Finding) {
				findings = append(findings, string(f.Level)+" "+f.Subject+"|"+f.Text)
			}
			passed, err := checker.Registry(t.Context(), registry)
			if err != nil || passed != c.passed {
				t.Errorf("passed %v, %v, want %v:\n%s", passed, err, c.passed, strings.Join(findings, "\n"))
			}
			for _, want := range c.want {
				head, part, _ := strings.Cut(want, "|")
				_, unwanted, none := strings.Cut(head, "none ")
				found := slices.ContainsFunc(findings, func(f string) bool {
					return strings.HasPrefix(f, head) && strings.Contains(f, part) || none && strings.Contains(f, " "+unwanted)
				})
				if found == none {
					t.Errorf("no %q in:\n%s", want, strings.Join(findings, "\n"))
				}
			}
		})
	}
}

// The nearest records count, at the name or at a parent of it.
func TestCAA(t *testing.T) {
	t.Parallel()
	records := answers(t, false, 0,
		`registry.own.example. 60 IN CAA 0 issue "letsencrypt.org"`, `own.example. 60 IN CAA 0 issue "other.example"`,
		`parent.example. 60 IN CAA 0 issue "letsencrypt.org; validationmethods=dns-01"`,
		`none.example. 60 IN CAA 0 issue ";"`,
		`both.example. 60 IN CAA 0 issue ";"`, `both.example. 60 IN CAA 0 issue "letsencrypt.org"`,
		`letters.example. 60 IN CAA 0 ISSUE "letsencrypt.org"`,
		`others.example. 60 IN CAA 0 iodef "mailto:security@others.example"`, `example. 60 IN CAA 0 issue "of.everybody.else"`)
	resolver := serveDNS(t, func(q, a *mdns.Msg) {
		switch q.Question[0].Name {
		case "broken.example.":
			a.Rcode = mdns.RcodeServerFailure
		case "registry.parent.example.":
			a.Rcode = mdns.RcodeNameError
		}
		records(q, a)
	})
	for name, want := range map[string]Finding{
		"registry.own.example":     {Level: OK, Text: "issuers letsencrypt.org, as registry.own.example says"},
		"registry.parent.example":  {Level: OK, Text: "issuers letsencrypt.org; validationmethods=dns-01, as parent.example says"},
		"a.registry.none.example":  {Level: Warn, Text: "nobody may issue, as none.example says"},
		"registry.both.example":    {Level: OK, Text: "issuers letsencrypt.org, as both.example says"},
		"registry.letters.example": {Level: OK, Text: "issuers letsencrypt.org, as letters.example says"},
		"registry.others.example":  {Level: OK, Text: "any authority may issue, as others.example says"},
		"registry.broken.example":  {Level: Fail, Text: "resolvers answer SERVFAIL for broken.example"},
		"registry.free.test":       {Level: OK, Text: "any authority may issue"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []Finding
			c := Checker{Found: func(f Finding) { got = append(got, f) }}
			c.caa(t.Context(), resolver, name)
			if len(got) != 1 || got[0].Level != want.Level || got[0].Text != want.Text || got[0].Subject != "CAA of "+name {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// A replica that is not Ready is waited for; while the store is away, which holds how far it is, the store is what to see to.
func TestReplicaIsNotReady(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ store, want string }{
		"on its way":        {"", "portolan replica wait contoso/westus"},
		"the store is away": {"connection refused", "bring the store back"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var found []Finding
			checker := Checker{Found: func(f Finding) { found = append(found, f) }, status: api.Status{Store: api.StoreStatus{Error: c.store}},
				registry: api.Registry{Replicas: []api.Replica{{Registry: "contoso", Region: "westus", Status: topology.Creating, Health: "Healthy"}}}}
			checker.replicas()
			if len(found) != 1 || found[0].Level != Warn || !strings.Contains(found[0].Advice, c.want) {
				t.Errorf("%+v, want advice %q", found, c.want)
			}
		})
	}
}
