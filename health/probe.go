package health

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"syscall"
	"time"

	consul "github.com/hashicorp/consul/api"

	"portolan/topology"
)

const (
	// maxResolved bounds how many addresses of a host name one probe tries; clients rarely try more either.
	maxResolved = 4
	// maxHeader bounds the headers that are read of an answer; the body is not read at all.
	maxHeader = 64 << 10
	// maxCA bounds a CA file: the bundle of all public roots has about 250 kB.
	maxCA = 4 << 20
)

// unable marks an error that lies on this side: it says nothing about the replica.
type unable struct{ error }

func (u unable) Unwrap() error { return u.error }

// prober makes probes. It keeps nothing between them: a reused connection would tell of the past.
type prober struct {
	resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	consul  *consul.Client // nil: none configured
}

// probe asks t once. ctx carries the deadline.
func (p *prober) probe(ctx context.Context, t *target) Result {
	r := Result{Time: time.Now()}
	err := p.ask(ctx, t, &r)
	r.Latency = time.Since(r.Time)
	var local unable
	switch {
	case err == nil:
		r.Outcome = Passed
	case errors.As(err, &local):
		r.Outcome, r.Error = Unable, err.Error()
	default:
		r.Outcome, r.Error = Failed, err.Error()
	}
	return r
}

func (p *prober) ask(ctx context.Context, t *target, r *Result) error {
	if t.mode == topology.ProbeConsul {
		return p.askConsul(ctx, t)
	}
	if t.address.IsValid() {
		return p.askAddress(ctx, t, t.address, r)
	}
	host := strings.TrimSuffix(t.hostname, ".")
	addresses, err := p.resolve(ctx, host)
	if err != nil {
		return fmt.Errorf("resolving %s: %w", host, err)
	}
	if len(addresses) == 0 {
		return fmt.Errorf("resolving %s: no address", host)
	}
	if len(addresses) > maxResolved {
		addresses = addresses[:maxResolved]
	}
	// The name stands while one of its addresses does: answers cannot leave out the others. The time is shared, lest a first
	// address that swallows packets leave nothing for the next.
	deadline, _ := ctx.Deadline()
	for i, a := range addresses {
		share := time.Until(deadline) / time.Duration(len(addresses)-i)
		one, cancel := context.WithTimeout(ctx, share)
		err = p.askAddress(one, t, a, r)
		cancel()
		if err == nil {
			return nil
		}
	}
	return err
}

func (p *prober) askAddress(ctx context.Context, t *target, address netip.Addr, r *Result) error {
	at := net.JoinHostPort(address.String(), t.port)
	if t.mode == topology.ProbeTCP {
		conn, err := dial(ctx, at)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	var roots *x509.CertPool
	if t.mode == topology.ProbeHTTPS && t.ca != "" {
		var err error
		if roots, err = readRoots(t.ca); err != nil {
			return unable{err}
		}
	}
	for _, name := range t.names {
		if err := askRegistry(ctx, t, at, name, roots, r); err != nil {
			return err
		}
	}
	return nil
}

// askRegistry sends GET /v2/ to at as a client of name would: 200 is a registry that lets anybody in, 401 one that asks for
// a login first (OCI distribution specification, "Determining Support").
func askRegistry(ctx context.Context, t *target, at, name string, roots *x509.CertPool, r *Result) error {
	scheme, usual := "http", "80"
	if t.mode == topology.ProbeHTTPS {
		scheme, usual = "https", "443"
	}
	host := name
	if t.port != usual {
		host = net.JoinHostPort(name, t.port)
	} else if strings.Contains(name, ":") {
		host = "[" + name + "]"
	}
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, at) },
		TLSClientConfig:        &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12},
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+host+"/v2/", nil)
	if err != nil {
		return fmt.Errorf("asking %s as %s: %w", at, name, err)
	}
	request.Header.Set("User-Agent", "portolan-health")
	// RoundTrip and not a Client: redirects are not followed.
	response, err := transport.RoundTrip(request)
	if err != nil {
		return fmt.Errorf("asking %s as %s: %w", at, name, trimURL(err))
	}
	defer response.Body.Close()
	if response.TLS != nil && len(response.TLS.PeerCertificates) > 0 {
		if end := response.TLS.PeerCertificates[0].NotAfter; r.CertificateExpiry.IsZero() || end.Before(r.CertificateExpiry) {
			r.CertificateExpiry = end
		}
	}
	if response.StatusCode != http.StatusOK && response.StatusCode != http.StatusUnauthorized {
		return fmt.Errorf("asking %s as %s: /v2/ answered %d, not 200 or 401", at, name, response.StatusCode)
	}
	return nil
}

// trimURL drops the URL that net/http puts around an error: the message names the address and the client name already.
func trimURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// dial connects, and tells faults of this machine from those of the other.
func dial(ctx context.Context, at string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", at)
	if err == nil {
		return conn, nil
	}
	for _, local := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EAFNOSUPPORT, syscall.EADDRNOTAVAIL, syscall.EPERM} {
		if errors.Is(err, local) {
			return nil, unable{err}
		}
	}
	if errors.Is(err, syscall.ENETUNREACH) && noRoute(ctx, at) {
		return nil, unable{fmt.Errorf("%w (no route from this machine)", err)}
	}
	return nil, err
}

// noRoute is whether this machine has no route to at, as one without IPv6: connecting a datagram socket looks the route up
// and sends nothing, so that an ICMP error of some router on the way does not count.
func noRoute(ctx context.Context, at string) bool {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "udp", at)
	if err != nil {
		return errors.Is(err, syscall.ENETUNREACH)
	}
	conn.Close()
	return false
}

// readRoots reads the certificates of a reference file:PATH, anew for each probe: files are renewed in place.
func readRoots(reference string) (*x509.CertPool, error) {
	path, ok := strings.CutPrefix(reference, "file:")
	if !ok {
		return nil, fmt.Errorf("CA reference %q: want file:PATH", reference)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	defer f.Close()
	pem, err := io.ReadAll(io.LimitReader(f, maxCA))
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading CA certificates: no certificate in %s", path)
	}
	return pool, nil
}

// askConsul takes the checks of a service. The instance at the target's address counts; where no instance bears that
// address (the service stands behind a balancer), the service as a whole does: one instance that is not critical.
func (p *prober) askConsul(ctx context.Context, t *target) error {
	if p.consul == nil {
		return unable{errors.New("probe consul:" + t.service + ": no Consul is configured")}
	}
	options := (&consul.QueryOptions{RequireConsistent: true}).WithContext(ctx)
	entries, _, err := p.consul.Health().Service(t.service, "", false, options)
	if err != nil {
		return unable{fmt.Errorf("asking Consul for service %q: %w", t.service, err)}
	}
	if len(entries) == 0 {
		return fmt.Errorf("service %q has no instance in Consul", t.service)
	}
	host := strings.TrimSuffix(t.hostname, ".")
	if t.address.IsValid() {
		host = t.address.String()
	}
	var own, all []*consul.ServiceEntry
	for _, e := range entries {
		at := e.Service.Address
		if at == "" {
			at = e.Node.Address
		}
		if at == host {
			own = append(own, e)
		}
		all = append(all, e)
	}
	if len(own) > 0 {
		all = own
	}
	for _, e := range all {
		if status := e.Checks.AggregatedStatus(); status == consul.HealthPassing || status == consul.HealthWarning {
			return nil
		}
	}
	return fmt.Errorf("service %q at %s is %s in Consul", t.service, host, all[0].Checks.AggregatedStatus())
}
