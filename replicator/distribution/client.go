// Package distribution is the client of one replica: the OCI distribution API, and nothing else, over HTTP.
//
// It speaks to what people really run (CNCF distribution 2.8 and 3, zot, Harbor, Nexus, cloud registries), checks every
// byte that it can check, and reports what went wrong as errors that tell a state of the replica (read-only, full, busy)
// from a fault of the content. It keeps no state beyond connections, tokens, a clock estimate, until when the registry
// wants to be left alone, and what it is known to support, copies nothing between replicas (that is replicator/transfer) and decides nothing.
//
// Credentials: the Authorization header goes to the endpoint's own scheme, host and port, and to token servers that are
// on the endpoint's host or on Options.Realms; never to a host that a redirect or a Location names.
//
// Sources: OCI Distribution Specification 1.1 (below: "spec"), the Docker token authentication specification, RFC 9110
// (HTTP semantics), RFC 8288 (Link), and the source of CNCF distribution where it differs from the specification.
package distribution

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
)

// Limits bound what one client uses. The zero value of a field stands for the default.
type Limits struct {
	// Connections is the most connections to one host (default 128). Requests beyond it wait, and Header bounds that too. It
	// has to exceed the uploads and downloads that run at once, each of which holds one: a replica that seeds n others
	// at six blobs each serves 6n downloads, and the default leaves room beside those for 20 regions.
	Connections int
	// Dial bounds connecting and, separately, the TLS handshake (default 10 s).
	Dial time.Duration
	// Header bounds the wait for an answer once the request has been sent (default 30 s).
	Header time.Duration
	// Commit is Header's counterpart for the request that completes an upload, in which registries may move or hash
	// the whole blob (default 5 min).
	Commit time.Duration
	// Stall is how long a body may stand still, in either direction (default 30 s). There is no limit on the whole.
	Stall time.Duration
	// Manifest is the largest manifest in bytes (default 8 MiB; CNCF distribution takes 4 MiB).
	Manifest int64
	// Page is how many entries of a listing are asked for at a time (default 1000; CNCF distribution 3 refuses more).
	Page int
	// Pages is the most pages of one listing (default 10,000).
	Pages int
}

func (l Limits) withDefaults() Limits {
	def := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	if l.Connections <= 0 {
		l.Connections = 128
	}
	def(&l.Dial, 10*time.Second)
	def(&l.Header, 30*time.Second)
	def(&l.Commit, 5*time.Minute)
	def(&l.Stall, 30*time.Second)
	if l.Manifest <= 0 {
		l.Manifest = 8 << 20
	}
	if l.Page <= 0 {
		l.Page = 1000
	}
	if l.Pages <= 0 {
		l.Pages = 10000
	}
	return l
}

// Options say which replica a Client speaks to, and how.
type Options struct {
	// Endpoint is the replica's URL: http or https, a host, no path, no user. Plain HTTP is spoken only where it says so.
	Endpoint *url.URL
	// Prefix stands before every repository name there ("mirror" makes team/app mirror/team/app); may be empty.
	Prefix string
	// Credentials is a reference, never a secret: "" (anonymous), docker-config, env:NAME, file:PATH or helper:NAME. What
	// env and file hold is "user:password" or, without a colon, a registry token. It is read again after a 401 and
	// at least every minute.
	Credentials string
	// Realms are the hosts (host or host:port) of token servers that may be sent the credentials, besides the endpoint's.
	Realms []string
	// CA is a reference (file:PATH) to PEM certificates that are trusted besides the system's.
	CA string
	// ClientCert is a reference (file:PATH) to a PEM file with a client certificate and its key. It is read at each
	// handshake, and shown to the endpoint only.
	ClientCert string
	// UserAgent is the first part of the User-Agent: "portolan/1.2" (the default is "portolan/dev").
	UserAgent string
	Logger    *zap.Logger
	Limits    Limits
	// Transport replaces the client's own transport: for tests that inject faults.
	Transport http.RoundTripper
}

// Client speaks to one replica. Its methods may be called from several goroutines.
type Client struct {
	endpoint  *url.URL
	prefix    string
	agent     string
	log       *zap.Logger
	limits    Limits
	own       http.RoundTripper // to the endpoint
	foreign   http.RoundTripper // to hosts that redirects name: shows no client certificate
	auth      *authenticator
	clock     clock
	rest      rest
	referrers atomic.Pointer[probed]
	close     func()
}

// repositoryName is the name of spec, "Pulling manifests". It admits no dot segments, so a name cannot leave its path.
var repositoryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)

// tagName is a tag of spec, "Pulling manifests".
var tagName = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// New makes the client of a replica. It reads the files that the options refer to, but sends nothing.
func New(o Options) (*Client, error) {
	u := o.Endpoint
	if u == nil || u.Host == "" || (u.Scheme != "http" && u.Scheme != "https") || u.User != nil || (u.Path != "" && u.Path != "/") || u.RawQuery != "" {
		shown := ""
		if u != nil {
			shown = u.Redacted()
		}
		return nil, fmt.Errorf("endpoint %q is not of the form http(s)://host[:port]", shown)
	}
	prefix := strings.Trim(o.Prefix, "/")
	if prefix != "" && !repositoryName.MatchString(prefix) {
		return nil, fmt.Errorf("prefix %q cannot begin a repository name", o.Prefix)
	}
	c := &Client{
		endpoint: &url.URL{Scheme: u.Scheme, Host: u.Host},
		prefix:   prefix,
		agent:    o.UserAgent,
		log:      o.Logger,
		limits:   o.Limits.withDefaults(),
	}
	if c.agent == "" {
		c.agent = agentName + "/dev"
	}
	if c.log == nil {
		c.log = zap.NewNop()
	}
	creds, err := newCredentials(o.Credentials, u.Host)
	if err != nil {
		return nil, err
	}
	c.auth = newAuthenticator(c, creds, o.Realms)
	c.close = func() {}
	c.own, c.foreign = o.Transport, o.Transport
	if o.Transport == nil {
		own, err := newTransport(c.limits, o.CA, o.ClientCert)
		if err != nil {
			return nil, err
		}
		foreign, err := newTransport(c.limits, o.CA, "")
		if err != nil {
			return nil, err
		}
		c.own, c.foreign = own, foreign
		c.close = func() { own.CloseIdleConnections(); foreign.CloseIdleConnections() }
	}
	return c, nil
}

// Endpoint is the replica's URL, for logs and errors.
func (c *Client) Endpoint() string { return c.endpoint.String() }

// Close drops the idle connections. Requests under way go on.
func (c *Client) Close() { c.close() }

func newTransport(l Limits, ca, clientCert string) (*http.Transport, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := readReference(ca)
		if err != nil {
			return nil, fmt.Errorf("reading the CA: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("CA %q holds no PEM certificate", ca)
		}
		conf.RootCAs = pool
	}
	if clientCert != "" {
		load := func() (*tls.Certificate, error) {
			pem, err := readReference(clientCert)
			if err != nil {
				return nil, fmt.Errorf("reading the client certificate: %w", err)
			}
			cert, err := tls.X509KeyPair(pem, pem)
			if err != nil {
				return nil, fmt.Errorf("reading the client certificate %q: %w", clientCert, err)
			}
			return &cert, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	// HTTP/2 would put all blobs on one connection, and so behind one congestion window on long links.
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: l.Dial, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig:     conf,
		TLSHandshakeTimeout: l.Dial,
		MaxConnsPerHost:     l.Connections,
		MaxIdleConns:        2 * l.Connections,
		MaxIdleConnsPerHost: l.Connections,
		// Shorter than the idle timeouts of the usual servers and load balancers (60 s and more), so that we rather
		// than they close an idle connection.
		IdleConnTimeout:        50 * time.Second,
		MaxResponseHeaderBytes: 256 << 10,
		WriteBufferSize:        64 << 10,
		ReadBufferSize:         64 << 10,
		// Digests are of the bytes as they are stored.
		DisableCompression: true,
		Protocols:          &protocols,
	}, nil
}

func readReference(ref string) ([]byte, error) {
	path, found := strings.CutPrefix(ref, "file:")
	if !found {
		return nil, fmt.Errorf("reference %q is not file:PATH", ref)
	}
	return os.ReadFile(path)
}

// full checks a repository's name and puts the prefix before it.
func (c *Client) full(repo string) (string, error) {
	full := repo
	if c.prefix != "" {
		full = c.prefix + "/" + repo
	}
	if len(full) > 255 || !repositoryName.MatchString(repo) {
		return "", &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%q is not a repository name", repo)}
	}
	return full, nil
}

// call is one request to the replica.
type call struct {
	method string
	// url is absolute and set for upload sessions alone; otherwise path and query are below the endpoint.
	url    *url.URL
	path   string
	query  url.Values
	header http.Header
	// body is sent again when the request has to be; stream is not, and has exactly size bytes.
	body   []byte
	stream io.Reader
	size   int64
	// scopes are the rights that a token needs: "repository:team/app:pull".
	scopes  []string
	writeID string
	commit  bool
}

func pull(full string) string     { return "repository:" + full + ":pull" }
func pullPush(full string) string { return "repository:" + full + ":pull,push" }

// remove is the scope of a delete. CNCF distribution wants "delete"; servers that know only "*" say so in their challenge.
func remove(full string) string { return "repository:" + full + ":pull,push,delete" }

// maxRedirects is enough for registry -> storage -> region of the storage, and little enough to end a loop.
const maxRedirects = 5

// do sends a call and returns the answer, whose body the caller closes, if its status is one of want; otherwise an *Error. While the registry
// wants to be left alone, only what rest lets through is sent.
func (c *Client) do(ctx context.Context, r call, want ...int) (*http.Response, error) {
	u := r.url
	if u == nil {
		u = &url.URL{Scheme: c.endpoint.Scheme, Host: c.endpoint.Host, Path: r.path, RawQuery: r.query.Encode()}
	}
	if err := c.rest.refuse(r, u.Path); err != nil {
		return nil, err
	}
	resp, err := c.send(ctx, r, u, want)
	c.rest.heed(err)
	return resp, err
}

// send does the same without looking at the time. A 401 is answered once, with fresh credentials, unless the body was a stream.
func (c *Client) send(ctx context.Context, r call, u *url.URL, want []int) (*http.Response, error) {
	home := c.sameOrigin(u)
	for attempt := 0; ; attempt++ {
		authorization := ""
		if home {
			var err error
			if authorization, err = c.auth.header(ctx, r.scopes); err != nil {
				return nil, c.fail(ctx, r, u, err)
			}
		}
		resp, err := c.follow(ctx, r, u, authorization)
		if err != nil {
			return nil, c.fail(ctx, r, u, err)
		}
		if resp.StatusCode == http.StatusUnauthorized && home && attempt == 0 && c.sameOrigin(resp.Request.URL) {
			again, err := c.auth.challenged(ctx, resp, authorization, r.scopes)
			if err != nil {
				discard(resp)
				return nil, c.fail(ctx, r, u, err)
			}
			if again && r.stream == nil {
				discard(resp)
				continue
			}
		}
		for _, status := range want {
			if resp.StatusCode == status {
				return resp, nil
			}
		}
		defer discard(resp)
		return nil, responseError(r.method, u.Path, r.url != nil, resp)
	}
}

// follow sends a request and, for GET and HEAD, follows redirects.
func (c *Client) follow(ctx context.Context, r call, u *url.URL, authorization string) (*http.Response, error) {
	for hop := 0; ; hop++ {
		resp, err := c.exchange(ctx, r, u, authorization)
		if err != nil {
			return nil, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, nil
		}
		location := resp.Header.Get("Location")
		discard(resp)
		next, err := u.Parse(location)
		if err != nil || location == "" || (next.Scheme != "http" && next.Scheme != "https") || next.Host == "" {
			return nil, &Error{Kind: ErrInvalid, Status: resp.StatusCode, Message: "redirected to nowhere"}
		}
		origin := next.Scheme + "://" + next.Host
		switch {
		case r.method != http.MethodGet && r.method != http.MethodHead:
			return nil, &Error{Kind: ErrInvalid, Status: resp.StatusCode, Message: "writes are redirected to " + origin + ": that should be the endpoint"}
		case u.Scheme == "https" && next.Scheme == "http":
			return nil, &Error{Kind: ErrInvalid, Status: resp.StatusCode, Message: "redirected from https to " + origin}
		case hop == maxRedirects:
			return nil, &Error{Kind: ErrInvalid, Status: resp.StatusCode, Message: "too many redirects, the last one to " + origin}
		}
		u = next
	}
}

// exchange is one request and its answer, watched for standstill. Only the endpoint's own origin sees authorization.
func (c *Client) exchange(ctx context.Context, r call, u *url.URL, authorization string) (*http.Response, error) {
	header := c.limits.Header
	if r.commit {
		header = c.limits.Commit
	}
	wctx, cancel := context.WithCancelCause(ctx)
	w := newWatchdog(header, cancel)

	var body io.Reader
	size := int64(len(r.body))
	var sent *sentBody
	if r.stream != nil {
		size = r.size
		sent = &sentBody{r: r.stream, left: r.size, watch: w, stall: c.limits.Stall, header: header, closed: make(chan struct{})}
		if size > 0 {
			body = sent
		}
	} else if r.body != nil {
		body = bytes.NewReader(r.body)
	}
	req, err := http.NewRequestWithContext(wctx, r.method, u.String(), body)
	if err != nil {
		w.stop()
		return nil, err
	}
	req.ContentLength = size
	for k, v := range r.header {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", userAgent(c.agent, r.writeID))
	transport := c.foreign
	if c.sameOrigin(u) {
		transport = c.own
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
	}
	begun := time.Now()
	resp, err := transport.RoundTrip(req)
	received := time.Now()
	streaming := sent != nil && body != nil
	if err != nil {
		cause := context.Cause(wctx)
		w.stop()
		if streaming {
			// The transport may still be reading: the stream belongs to the caller again only after that.
			<-sent.closed
		}
		if ctx.Err() == nil && errors.Is(cause, errStalled) {
			return nil, cause
		}
		return nil, err
	}
	resp.Request = req
	if c.sameOrigin(u) {
		c.clock.observe(resp.Header, begun, received)
	}
	if streaming {
		if resp.StatusCode >= 300 {
			// Answered before the end of the body, perhaps: nothing more of it is wanted.
			raw, _ := io.ReadAll(io.LimitReader(resp.Body, maxErrorBody))
			resp.Body.Close()
			resp.Body = io.NopCloser(bytes.NewReader(raw))
			cancel(errAnswered)
		}
		<-sent.closed
	}
	w.pause() // until somebody reads
	resp.Body = &receivedBody{ReadCloser: resp.Body, watch: w, stall: c.limits.Stall, ctx: wctx}
	return resp, nil
}

// fail gives an error that do met before there was an answer its place and kind. Whether the caller gave up is asked of ctx:
// a dialer that ran out of its own time says context.DeadlineExceeded too.
func (c *Client) fail(ctx context.Context, r call, u *url.URL, err error) error {
	var e *Error
	if errors.As(err, &e) {
		placed := *e
		if placed.Method == "" {
			placed.Method, placed.Path = r.method, u.Path
		}
		return &placed
	}
	kind := ErrUnavailable
	if ctx.Err() != nil {
		kind = nil
	}
	return &Error{Method: r.method, Path: u.Path, Kind: kind, Cause: err}
}

// sameOrigin reports whether u is at the endpoint: scheme, host and port (RFC 6454, section 5).
func (c *Client) sameOrigin(u *url.URL) bool { return origin(u) == origin(c.endpoint) }

func origin(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = "80"
		if u.Scheme == "https" {
			port = "443"
		}
	}
	return u.Scheme + "://" + net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// discard lets the connection be used again where that is cheap.
func discard(resp *http.Response) {
	io.CopyN(io.Discard, resp.Body, 64<<10)
	resp.Body.Close()
}

// readAll reads a body of at most limit bytes.
func readAll(r io.Reader, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("the answer is larger than %d bytes", limit)
	}
	return b, err
}

// Ping asks whether there is a registry at the endpoint (spec, "Determining Support") that these credentials may use. If there
// is none, the error says that the endpoint is not a registry, and why.
func (c *Client) Ping(ctx context.Context) error {
	resp, err := c.do(ctx, call{method: http.MethodGet, path: "/v2/"}, http.StatusOK)
	if err != nil {
		var e *Error
		if errors.As(err, &e) && e.Status != 0 && !errors.Is(err, ErrUnauthorized) && !errors.Is(err, ErrUnavailable) {
			hint := ""
			if e.Status == http.StatusBadRequest && c.endpoint.Scheme == "http" { // what Go's servers answer where they expect TLS
				hint = "; if it speaks TLS, write https://"
			}
			return fmt.Errorf("endpoint %s is %w: %w%s", c.endpoint, ErrNotRegistry, err, hint)
		}
		return fmt.Errorf("asking endpoint %s: %w", c.endpoint, err)
	}
	defer discard(resp)
	// Many registries answer {} or nothing at all. What shows a web server that answers 200 to everything is HTML.
	body, err := readAll(resp.Body, 64<<10)
	if err != nil {
		return fmt.Errorf("endpoint %s is %w: reading its answer: %w", c.endpoint, ErrNotRegistry, err)
	}
	if resp.Header.Get("Docker-Distribution-Api-Version") == "" && len(bytes.TrimSpace(body)) > 0 && !json.Valid(body) {
		return fmt.Errorf("endpoint %s is %w: it answers /v2/ with %s", c.endpoint, ErrNotRegistry, strconv.Quote(resp.Header.Get("Content-Type")))
	}
	return nil
}
