package bed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/crypto/bcrypt"
)

// Distribution is a generation of the CNCF distribution registry server. They differ in
// what replication must know: generation 2 cannot delete a tag alone, and loses an upload
// that was cut inside a PATCH.
type Distribution string

const (
	DistributionV3 Distribution = "registry"        // 3.1, built by make tools
	DistributionV2 Distribution = "docker-registry" // 2.8, Debian's package
)

// RegistryConfig says how a registry server is set up. The zero value with a Dir is a
// distribution 3 server on 127.0.0.1 that allows everything, deletes included.
type RegistryConfig struct {
	Server Distribution // "" is DistributionV3
	Dir    string       // holds the configuration, the log and the content; created when missing
	Listen string       // host:port; port 0 reserves one; "" is 127.0.0.1:0

	NoDelete bool // refuse deletes: 405
	ReadOnly bool // refuse pushes and deletes: 405
	Cache    bool // keep blob descriptors in memory, as the servers' example configurations do
	Debug    bool // log at level debug; the default is info, with the access log

	Notify []Notification    // who is told of pushes and deletes
	Users  map[string]string // basic authentication: name to password; nil: none
	Cert   string            // PEM file of the certificate chain; with Key: TLS
	Key    string            // PEM file of its key
	CA     string            // PEM file that signed Cert, for the readiness probe

	// Adjust may change the configuration before it is written: the tree of the server's
	// YAML file. It is for what the fields above do not cover. Optional.
	Adjust func(tree map[string]any)
}

// Notification is an endpoint of a registry's events. The fields mean the same in
// distribution 2.8.2 and 3.1.2 (notifications.endpoints of the configuration).
type Notification struct {
	Name      string        // "" is "portolan"
	URL       string        // where events are posted to
	Token     string        // sent as a bearer token; "" sends none
	Headers   http.Header   // further headers
	Timeout   time.Duration // of one POST; 0 is 1 s, the server's own default
	Threshold int           // failures in a row before a pause; 0 is 10, the server's own default
	Backoff   time.Duration // that pause; 0 is 1 s, the server's own default
	All       bool          // also what replication has no use for: pulls, and blobs alone
}

// Registry is a running (or stopped) registry server. Its methods may be called from
// several goroutines, but for Reconfigure.
type Registry struct {
	server
	config  RegistryConfig
	address string
	file    string // of the configuration
	client  *http.Client
}

// StartRegistry starts a registry server and returns once /v2/ answers. The caller must
// Close it.
func StartRegistry(ctx context.Context, config RegistryConfig) (*Registry, error) {
	if config.Server == "" {
		config.Server = DistributionV3
	}
	listen, reserved, err := address(config.Listen)
	if err != nil {
		return nil, fmt.Errorf("starting a registry: %w", err)
	}
	r := &Registry{config: config, address: listen, file: filepath.Join(config.Dir, "registry.json")}
	r.server = server{
		name:    fmt.Sprintf("registry %s", listen),
		tool:    string(config.Server),
		args:    []string{"serve", r.file},
		logPath: filepath.Join(config.Dir, "registry.log"),
		ready:   r.answers,
		listens: []string{listen},
	}
	if reserved != nil {
		r.ports = []*port{reserved}
	}
	err = r.configure()
	if err == nil {
		err = r.Start(ctx)
	}
	if err != nil {
		_ = r.Close() // the reason is in err
		return nil, err
	}
	return r, nil
}

// Addr returns the host:port that the registry listens on.
func (r *Registry) Addr() string { return r.address }

// URL returns the registry's endpoint: http://host:port, or https with a certificate.
func (r *Registry) URL() string {
	if r.config.Cert != "" {
		return "https://" + r.address
	}
	return "http://" + r.address
}

// Storage returns the directory that holds the content, to save, wipe or restore it while
// the registry is stopped.
func (r *Registry) Storage() string { return filepath.Join(r.config.Dir, "storage") }

// Reconfigure stops the registry, changes its configuration and starts it again on the
// same address with the same content: Server, Dir and Listen stay what they were. It must
// not run beside other calls.
func (r *Registry) Reconfigure(ctx context.Context, change func(*RegistryConfig)) error {
	if err := r.Stop(); err != nil {
		return err
	}
	server, dir := r.config.Server, r.config.Dir
	change(&r.config)
	r.config.Server, r.config.Dir = server, dir
	if err := r.configure(); err != nil {
		return err
	}
	return r.Start(ctx)
}

// GarbageCollect runs the server's own offline collector, which removes the blobs that no
// manifest names (with untagged also manifests without a tag), and returns what it printed.
// The server may be running: it is not told, and answers from its descriptor cache for
// blobs that are gone, as in practice.
func (r *Registry) GarbageCollect(ctx context.Context, untagged bool) (string, error) {
	args := []string{"garbage-collect"}
	if untagged {
		args = append(args, "--delete-untagged")
	}
	return Run(ctx, r.tool, append(args, r.file)...)
}

// configure writes the configuration. JSON is YAML, so both servers read it.
func (r *Registry) configure() error {
	c := &r.config
	if err := os.MkdirAll(r.Storage(), 0o755); err != nil {
		return fmt.Errorf("configuring %s: %w", r.name, err)
	}
	level := "info"
	if c.Debug {
		level = "debug"
	}
	storage := map[string]any{
		"filesystem": map[string]any{"rootdirectory": r.Storage()},
		"delete":     map[string]any{"enabled": !c.NoDelete},
		"maintenance": map[string]any{
			"uploadpurging": map[string]any{"enabled": false},
			"readonly":      map[string]any{"enabled": c.ReadOnly},
		},
	}
	if c.Cache {
		storage["cache"] = map[string]any{"blobdescriptor": "inmemory"}
	}
	listener := map[string]any{
		"addr": r.address,
		// Fixed, so that an upload can be resumed after a restart: its state is signed.
		"secret":  "portolan-bed",
		"headers": map[string]any{"X-Content-Type-Options": []string{"nosniff"}},
	}
	if c.Cert != "" {
		listener["tls"] = map[string]any{"certificate": c.Cert, "key": c.Key}
	}
	tree := map[string]any{
		"version": "0.1",
		"log":     map[string]any{"level": level, "formatter": "text"},
		"storage": storage,
		"http":    listener,
	}
	if len(c.Users) > 0 {
		path, err := r.writePasswords()
		if err != nil {
			return fmt.Errorf("configuring %s: %w", r.name, err)
		}
		tree["auth"] = map[string]any{"htpasswd": map[string]any{"realm": "bed", "path": path}}
	}
	if len(c.Notify) > 0 {
		endpoints := make([]any, len(c.Notify))
		for i, n := range c.Notify {
			endpoints[i] = n.tree()
		}
		tree["notifications"] = map[string]any{"endpoints": endpoints}
	}
	if c.Adjust != nil {
		c.Adjust(tree)
	}
	text, err := json.MarshalIndent(tree, "", "  ")
	if err == nil {
		err = os.WriteFile(r.file, text, 0o600)
	}
	if err == nil {
		r.client, err = c.client()
	}
	if err != nil {
		return fmt.Errorf("configuring %s: %w", r.name, err)
	}
	return nil
}

func (r *Registry) writePasswords() (path string, err error) {
	var lines strings.Builder
	for user, password := range r.config.Users {
		// The least cost: these passwords guard nothing, and each request pays for it.
		hash, err := bcrypt.GenerateFromPassword([]byte(password), bcrypt.MinCost)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&lines, "%s:%s\n", user, hash)
	}
	path = filepath.Join(r.config.Dir, "htpasswd")
	return path, os.WriteFile(path, []byte(lines.String()), 0o600)
}

func (n Notification) tree() map[string]any {
	name := n.Name
	if name == "" {
		name = "portolan"
	}
	headers := n.Headers.Clone()
	if n.Token != "" {
		if headers == nil {
			headers = http.Header{}
		}
		headers.Set("Authorization", "Bearer "+n.Token)
	}
	tree := map[string]any{"name": name, "url": n.URL}
	if len(headers) > 0 {
		tree["headers"] = headers
	}
	if n.Timeout > 0 {
		tree["timeout"] = n.Timeout.String()
	}
	if n.Threshold > 0 {
		tree["threshold"] = n.Threshold
	}
	if n.Backoff > 0 {
		tree["backoff"] = n.Backoff.String()
	}
	if !n.All {
		// Distribution 2.8 heeds the actions only where a media type is ignored as well:
		// newIgnoredSink of its notifications returns early without one. The type of every
		// blob in events is this one.
		tree["ignore"] = map[string]any{
			"actions":    []string{"pull"},
			"mediatypes": []string{"application/octet-stream"},
		}
	}
	return tree
}

// client returns the client of the readiness probe.
func (c *RegistryConfig) client() (*http.Client, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	if c.CA != "" {
		pem, err := os.ReadFile(c.CA)
		if err != nil {
			return nil, err
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no certificate", c.CA)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	} else if c.Cert != "" {
		// Without the CA only the server's presence is asked for.
		transport.TLSClientConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec
	}
	return &http.Client{Transport: transport, Timeout: 5 * time.Second}, nil
}

func (r *Registry) answers(ctx context.Context) error {
	status, err := get(ctx, r.client, r.URL()+"/v2/")
	if err != nil {
		return err
	}
	if status != http.StatusOK && status != http.StatusUnauthorized {
		return fmt.Errorf("%s/v2/ answers %d", r.URL(), status)
	}
	return nil
}

// get asks a server on the way up and returns the status of its answer.
func get(ctx context.Context, client *http.Client, url string) (int, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return 0, err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, io.LimitReader(response.Body, 1<<20))
	return response.StatusCode, err
}
