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
	"sync"
	"syscall"
	"time"

	consul "github.com/hashicorp/consul/api"
	"golang.org/x/sync/errgroup"

	"portolan/topology"
)

const (
	// maxResolved bounds how many addresses of a host name one probe tries; clients rarely try more either.
	maxResolved = 4
	// maxHeader bounds the headers that are read of an answer; the body is not read at all.
	maxHeader = 64 << 10
	// maxPEM bounds a file of certificates: the bundle of all public roots has about 250 kB.
	maxPEM = 4 << 20
	// maxTogether bounds how many client names one probe asks for at a time, and so the connections of a probe.
	maxTogether = 8
	// nextAddress is how long an address of a host name may be silent before the next one is tried beside it (RFC 8305,
	// section 8: Connection Attempt Delay).
	nextAddress = 250 * time.Millisecond
)

// unable marks an error that lies on this side: it says nothing about the replica.
type unable struct{ error }

func (u unable) Unwrap() error { return u.error }

func isUnable(err error) bool {
	var u unable
	return errors.As(err, &u)
}

// saysMore is whether err says more of a replica than former, what was found before: that it failed somewhere counts for more
// than that it could not be asked elsewhere. Of two that say as much the former stays; nil says nothing.
func saysMore(err, former error) bool {
	return err != nil && (former == nil || isUnable(former) && !isUnable(err))
}

// prober makes probes. It keeps nothing between them: a reused connection would tell of the past.
type prober struct {
	resolve func(ctx context.Context, host string) ([]netip.Addr, error)
	consul  *consul.Client // nil: none configured
}

// probe asks t once. ctx carries the deadline.
func (p *prober) probe(ctx context.Context, t *target) Result {
	r := Result{Time: time.Now()}
	var err error
	r.Certificates, err = p.ask(ctx, t)
	r.Latency = time.Since(r.Time)
	switch {
	case err == nil:
		r.Outcome = Passed
	case isUnable(err):
		r.Outcome, r.Error = Unable, err.Error()
	default:
		r.Outcome, r.Error = Failed, err.Error()
	}
	return r
}

// ask asks t once. It returns the certificates that it saw.
func (p *prober) ask(ctx context.Context, t *target) ([]Certificate, error) {
	if t.canary {
		return nil, askCanary(ctx, t)
	}
	if t.mode == topology.ProbeConsul {
		return nil, p.askConsul(ctx, t)
	}
	if t.address.IsValid() {
		return askAddress(ctx, t, t.address)
	}
	host := strings.TrimSuffix(t.hostname, ".")
	addresses, err := p.resolve(ctx, host)
	if err != nil {
		err = fmt.Errorf("resolving %s: %w", host, err)
		// Only that there is no such name, or none with an address, is said of the replica. A resolver that is silent or fails is
		// this machine's: it would take down all replicas with host names at once.
		var said *net.DNSError
		if !errors.As(err, &said) || !said.IsNotFound {
			err = unable{err}
		}
		return nil, err
	}
	if len(addresses) == 0 {
		return nil, fmt.Errorf("resolving %s: no address", host)
	}
	return askAny(ctx, addresses[:min(len(addresses), maxResolved)], func(ctx context.Context, address netip.Addr) ([]Certificate, error) {
		return askAddress(ctx, t, address)
	})
}

// askAny asks addresses by ask, one after the other, until one passes: a host name stands while one of its addresses does, since
// answers cannot leave out the others. An address that is slow to answer keeps what it needs of the time, and does not keep
// the next one waiting.
func askAny(ctx context.Context, addresses []netip.Addr, ask func(context.Context, netip.Addr) ([]Certificate, error)) ([]Certificate, error) {
	type answer struct {
		certificates []Certificate
		err          error
	}
	answers := make(chan answer, len(addresses))
	ctx, cancel := context.WithCancel(ctx)
	var asking sync.WaitGroup
	defer func() {
		cancel()
		asking.Wait()
	}()
	var failed answer
	for next, waiting := 0, 0; ; {
		var impatient <-chan time.Time
		if next < len(addresses) {
			address := addresses[next]
			asking.Go(func() {
				certificates, err := ask(ctx, address)
				answers <- answer{certificates, err}
			})
			waiting++
			if next++; next < len(addresses) {
				impatient = time.After(nextAddress)
			}
		}
		select {
		case a := <-answers:
			if a.err == nil {
				return a.certificates, nil
			}
			if saysMore(a.err, failed.err) {
				failed = a
			}
			if waiting--; waiting == 0 && next == len(addresses) {
				return failed.certificates, failed.err
			}
		case <-impatient:
		}
	}
}

// askAddress asks address as a client of each name would: several at a time, so that a registry of many names is not thought
// dead because it is far away. It fails if one of them does.
func askAddress(ctx context.Context, t *target, address netip.Addr) (certificates []Certificate, err error) {
	at := net.JoinHostPort(address.String(), t.port)
	if t.mode == topology.ProbeTCP {
		conn, err := dial(ctx, at)
		if err != nil {
			return nil, err
		}
		return nil, conn.Close()
	}
	config, err := tlsConfig(t)
	if err != nil {
		return nil, unable{err}
	}
	expiries, errs := make([]time.Time, len(t.names)), make([]error, len(t.names))
	var asking errgroup.Group
	asking.SetLimit(maxTogether)
	for i, name := range t.names {
		asking.Go(func() error {
			expiries[i], errs[i] = askRegistry(ctx, t, at, name, config)
			return nil
		})
	}
	_ = asking.Wait() // the errors are in errs, each at its name
	for i, name := range t.names {
		if !expiries[i].IsZero() {
			certificates = append(certificates, Certificate{Name: name, Expiry: expiries[i]})
		}
		if saysMore(errs[i], err) {
			err = errs[i]
		}
	}
	return certificates, err
}

// Roots are trusted, which stays as it is, and the certificates of the reference ca, file:PATH, which are read anew: files are
// renewed in place. A nil trusted stands for the system's roots: the client names' certificates are often public ones where the
// endpoint's own is not. The error says that the file cannot be read, or holds no certificate.
func Roots(trusted *x509.CertPool, ca string) (*x509.CertPool, error) {
	pem, err := readReference(ca)
	if err != nil {
		return nil, fmt.Errorf("reading CA certificates: %w", err)
	}
	roots := x509.NewCertPool()
	if trusted != nil {
		roots = trusted.Clone()
	} else if system, err := x509.SystemCertPool(); err == nil {
		roots = system
	}
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading CA certificates: no certificate in %q", ca)
	}
	return roots, nil
}

// tlsConfig is what t is asked with over TLS, but for the name; nil without TLS.
func tlsConfig(t *target) (*tls.Config, error) {
	if t.mode != topology.ProbeHTTPS {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.ca != "" {
		var err error
		if config.RootCAs, err = Roots(nil, t.ca); err != nil {
			return nil, err
		}
	}
	if t.clientCert != "" {
		pem, err := readReference(t.clientCert)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate: %w", err)
		}
		pair, err := tls.X509KeyPair(pem, pem)
		if err != nil {
			return nil, fmt.Errorf("reading the client certificate %q: %w", t.clientCert, err)
		}
		// Not by Certificates, which sends it only to servers that name its issuer.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	}
	return config, nil
}

// askRegistry sends GET /v2/ to at as a client of name would: 200 is a registry that lets anybody in, 401 one that asks for
// a login first (OCI distribution specification, "Determining Support"). config is nil without TLS. It returns the end of
// validity of the certificate, also of one that is refused because it is over.
func askRegistry(ctx context.Context, t *target, at, name string, config *tls.Config) (expiry time.Time, err error) {
	scheme, usual := "http", "80"
	if config != nil {
		scheme, usual = "https", "443"
		config = config.Clone()
		config.ServerName = name
	}
	host := name
	if t.port != usual {
		host = net.JoinHostPort(name, t.port)
	} else if strings.Contains(name, ":") {
		host = "[" + name + "]"
	}
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx, at) },
		TLSClientConfig:        config,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxHeader,
	}
	defer transport.CloseIdleConnections()
	asking := "asking the registry at " + at
	if where, _, err := net.SplitHostPort(at); err != nil || where != name {
		asking += " for " + name
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, scheme+"://"+host+"/v2/", nil)
	if err != nil {
		return expiry, fmt.Errorf("%s: %w", asking, err)
	}
	request.Header.Set("User-Agent", "portolan-health")
	// RoundTrip and not a Client: redirects are not followed.
	response, err := transport.RoundTrip(request)
	if err != nil {
		// Of one that is refused for another reason, the end is of no interest.
		var invalid x509.CertificateInvalidError
		if errors.As(err, &invalid) && invalid.Reason == x509.Expired {
			expiry = invalid.Cert.NotAfter
		}
		return expiry, fmt.Errorf("%s: %w", asking, trimURL(err))
	}
	defer response.Body.Close()
	if response.TLS != nil {
		expiry = Expiry(response.TLS)
	}
	if response.StatusCode != http.StatusOK && response.StatusCode != http.StatusUnauthorized {
		return expiry, fmt.Errorf("%s: /v2/ answered %d, not 200 or 401", asking, response.StatusCode)
	}
	return expiry, nil
}

// Expiry is when what the other side served stops being accepted: the end of the first certificate of the chain that ends, in the
// chain that lasts longest; zero if nothing was verified. An intermediate certificate may end before the leaf does.
func Expiry(state *tls.ConnectionState) (last time.Time) {
	for _, chain := range state.VerifiedChains {
		first := chain[0].NotAfter
		for _, c := range chain[1:] {
			if c.NotAfter.Before(first) {
				first = c.NotAfter
			}
		}
		if first.After(last) {
			last = first
		}
	}
	return last
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

// readReference reads the file of a reference file:PATH, anew for each probe: files are renewed in place.
func readReference(reference string) ([]byte, error) {
	path, ok := strings.CutPrefix(reference, "file:")
	if !ok {
		return nil, fmt.Errorf("reference %q: want file:PATH", reference)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxPEM))
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
