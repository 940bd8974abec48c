package consul

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/store"
)

// Config says which Consul to use and how. What is left empty is taken from Consul's own environment variables
// (CONSUL_HTTP_ADDR, CONSUL_HTTP_TOKEN, CONSUL_CACERT ...), then from Consul's defaults.
type Config struct {
	// Address of an agent or server, host:port or unix:///path. Default 127.0.0.1:8500: the agent on this machine.
	Address string
	// Datacenter whose keys are used; each has its own. Default: the agent's.
	Datacenter string
	// Token is the ACL token; or TokenFile a file that holds it, read again when it changes.
	Token     string
	TokenFile string
	// TLS speaks HTTPS to the address; CAFile holds the certificates to trust, instead of the system's.
	TLS    bool
	CAFile string
	// Prefix is the folder that holds all keys of an installation, without slashes at its ends. Default "portolan".
	Prefix string
	// Timeout is the deadline of a request, for a blocking one beyond what it waits. Default 5 s: longer than
	// the choice of a new leader mostly takes, shorter than a lease.
	Timeout time.Duration
}

const (
	// DefaultPrefix is Config.Prefix if that is empty.
	DefaultPrefix = "portolan"

	defaultTimeout = 5 * time.Second
	// maxWait is how long a blocking query waits for a change. Consul's default of 5 minutes would leave a watcher
	// for as long without knowing that its connection is dead.
	maxWait = 10 * time.Second
	// maxBody bounds an answer: the largest tree anyone should watch, several times over.
	maxBody = 64 << 20
	// idleConnections is how many connections are kept for concurrent requests. Consul takes 200 from an address
	// (limits.http_max_conns_per_client), watches included.
	idleConnections = 32
)

// MaxTxn is Consul's own limit of operations in a transaction.
const MaxTxn = 128

// Client reads and writes keys of one Consul, every read consistent, every request with a deadline. It knows nothing
// of what the keys mean; the store and the ledger share one. Its errors are store.ErrUnavailable where Consul
// could not be asked or had no leader, and otherwise say what Consul refused.
type Client struct {
	api     *api.Client
	http    *http.Client
	address string
	prefix  string
	timeout time.Duration
}

// Pair is a key with its value. A Revision of zero says that there is no such key.
type Pair struct {
	Key      string
	Value    []byte
	Revision uint64
}

// Reading is what a consistent read saw, and the index that a later one may wait beyond.
type Reading struct {
	Pairs []Pair
	Index uint64
}

// Dial prepares a client. It does not contact Consul, so that a daemon starts also while Consul is away: an error is one
// of the configuration.
func Dial(cfg Config) (*Client, error) {
	prefix := strings.Trim(cfg.Prefix, "/")
	if prefix == "" {
		prefix = DefaultPrefix
	}
	if err := store.CheckKey(prefix); err != nil {
		return nil, fmt.Errorf("consul: prefix: %w", err)
	}
	client, c, err := newAPI(cfg)
	if err != nil {
		return nil, err
	}
	timeout := cfg.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	return &Client{api: client, http: c.HttpClient, address: c.Address, prefix: prefix, timeout: timeout}, nil
}

// NewAPI prepares Consul's own client, for what is not about keys. It does not contact Consul, and leaves deadlines to its user.
func NewAPI(cfg Config) (*api.Client, error) {
	client, _, err := newAPI(cfg)
	return client, err
}

func newAPI(cfg Config) (*api.Client, *api.Config, error) {
	c := api.DefaultConfig()
	set := func(field *string, value string) {
		if value != "" {
			*field = value
		}
	}
	set(&c.Address, cfg.Address)
	set(&c.Datacenter, cfg.Datacenter)
	set(&c.Token, cfg.Token)
	set(&c.TokenFile, cfg.TokenFile)
	set(&c.TLSConfig.CAFile, cfg.CAFile)
	if cfg.TLS {
		c.Scheme = "https"
	}
	var token *tokenFile
	if cfg.Token == "" && c.TokenFile != "" { // a token that was given beats a file that the environment names
		token = &tokenFile{path: c.TokenFile}
		if err := token.read(); err != nil {
			return nil, nil, fmt.Errorf("consul: %w", err)
		}
	}
	c.TokenFile = "" // the library reads it once
	// HTTP/1.1 also over TLS: a request that ends by its deadline takes its connection with it. HTTP/2 would go on using
	// the one connection that all share, and a link that died without a word would last until the kernel gives it up.
	base := &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 3 * time.Second, KeepAlive: 5 * time.Second}).DialContext,
		TLSHandshakeTimeout: 3 * time.Second,
		MaxIdleConnsPerHost: idleConnections,
		IdleConnTimeout:     90 * time.Second,
	}
	var err error
	if c.HttpClient, err = api.NewHttpClient(base, c.TLSConfig); err != nil {
		return nil, nil, fmt.Errorf("consul: TLS: %w", err)
	}
	client, err := api.NewClient(c)
	if err != nil {
		return nil, nil, fmt.Errorf("consul: %w", err)
	}
	c.HttpClient.Transport = transport{c.HttpClient.Transport, token} // NewClient replaced it for a Unix socket
	return client, c, nil
}

// Prefix is the folder of the installation, without slashes at its ends.
func (c *Client) Prefix() string { return c.prefix }

// Close closes idle connections. Requests under way go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Get reads one key. With an index above zero it waits until the key's index is beyond it, or for some seconds.
func (c *Client) Get(ctx context.Context, key string, index uint64) (Reading, error) {
	return c.read(ctx, index, func(q *api.QueryOptions) ([]Pair, *api.QueryMeta, error) {
		pair, meta, err := c.api.KV().Get(key, q)
		if err != nil || pair == nil {
			return nil, meta, err
		}
		return []Pair{{pair.Key, pair.Value, pair.ModifyIndex}}, meta, nil
	})
}

// List reads all keys that begin with prefix. With an index above zero it waits until theirs is beyond it, or for some
// seconds.
func (c *Client) List(ctx context.Context, prefix string, index uint64) (Reading, error) {
	reading, err := c.read(ctx, index, func(q *api.QueryOptions) ([]Pair, *api.QueryMeta, error) {
		pairs, meta, err := c.api.KV().List(prefix, q)
		if err != nil {
			return nil, nil, err
		}
		all := make([]Pair, len(pairs))
		for i, p := range pairs {
			all[i] = Pair{p.Key, p.Value, p.ModifyIndex}
		}
		return all, meta, nil
	})
	if err == nil && len(reading.Pairs) == 0 {
		err = c.mayRead(ctx, prefix)
	}
	return reading, err
}

// Keys reads the names, in order, of the keys that begin with prefix, each cut after the first separator that follows
// the prefix and named once; no separator: whole names.
func (c *Client) Keys(ctx context.Context, prefix, separator string) ([]string, error) {
	var names []string
	_, err := c.read(ctx, 0, func(q *api.QueryOptions) ([]Pair, *api.QueryMeta, error) {
		var meta *api.QueryMeta
		var err error
		names, meta, err = c.api.KV().Keys(prefix, separator, q)
		return nil, meta, err
	})
	if err == nil && len(names) == 0 {
		err = c.mayRead(ctx, prefix)
	}
	return names, err
}

// mayRead tells a folder without keys from one that may not be read. Consul lists only what the token may read, and to
// a request without a token it does not even say that it left something out; but it refuses to read a single key.
func (c *Client) mayRead(ctx context.Context, prefix string) error {
	_, err := c.Get(ctx, prefix, 0)
	return err
}

// GetAll reads up to MaxTxn keys at one moment, in their order. Keys that are not there have the revision zero.
func (c *Client) GetAll(ctx context.Context, keys []string) ([]Pair, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ops := make(api.TxnOps, len(keys))
	for i, key := range keys {
		ops[i] = &api.TxnOp{KV: &api.KVTxnOp{Verb: api.KVGetOrEmpty, Key: key}}
	}
	ok, answer, _, err := c.api.Txn().Txn(ops, (&api.QueryOptions{RequireConsistent: true}).WithContext(ctx))
	if err != nil {
		return nil, c.failure(ctx, err)
	}
	if !ok || len(answer.Results) != len(keys) {
		return nil, fmt.Errorf("consul at %s: reading %d keys gave %d results: %s", c.address, len(keys), len(answer.Results), what(answer.Errors))
	}
	pairs := make([]Pair, len(keys))
	for i, result := range answer.Results {
		if result.KV == nil {
			return nil, fmt.Errorf("consul at %s: reading %q gave no key", c.address, keys[i])
		}
		pairs[i] = Pair{result.KV.Key, result.KV.Value, result.KV.ModifyIndex}
	}
	return pairs, nil
}

// read asks with the strongest consistency: the leader confirms with a quorum that it leads before it answers. Even so
// an answer counts only if it carries an index and names a leader: agents have answered with nothing at all, as if
// there were no keys, while there was none (hashicorp/consul#3975).
func (c *Client) read(ctx context.Context, index uint64, ask func(*api.QueryOptions) ([]Pair, *api.QueryMeta, error)) (Reading, error) {
	limit := c.timeout
	if index > 0 {
		limit += maxWait + maxWait/16 // Consul adds up to a sixteenth, so that watchers do not wake together
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	pairs, meta, err := ask((&api.QueryOptions{RequireConsistent: true, WaitIndex: index, WaitTime: maxWait}).WithContext(ctx))
	switch {
	case err != nil:
		return Reading{}, c.failure(ctx, err)
	case !meta.KnownLeader:
		return Reading{}, fmt.Errorf("%w: consul at %s knows no leader", store.ErrUnavailable, c.address)
	case meta.LastIndex == 0:
		return Reading{}, fmt.Errorf("%w: the answer of consul at %s has no index", store.ErrUnavailable, c.address)
	case meta.ResultsFilteredByACLs:
		return Reading{}, fmt.Errorf("consul at %s: the token has no right to read all of the keys; those that it may not read were left out", c.address)
	}
	return Reading{Pairs: pairs, Index: meta.LastIndex}, nil
}

// Refused lists the operations of a transaction, by their place in it, whose conditions did not hold. Nothing of the
// transaction was applied. It is store.ErrConflict.
type Refused struct{ Ops []int }

// Error names the operations.
func (r *Refused) Error() string {
	return fmt.Sprintf("operations %v: %v", r.Ops, store.ErrConflict)
}

// Unwrap makes it store.ErrConflict.
func (r *Refused) Unwrap() error { return store.ErrConflict }

// Txn applies up to MaxTxn operations as one transaction and returns the revision of the keys it wrote. The error is a
// *Refused if conditions did not hold.
func (c *Client) Txn(ctx context.Context, kv []*api.KVTxnOp) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	ops := make(api.TxnOps, len(kv))
	for i, op := range kv {
		if op.Verb == api.KVSet || op.Verb == api.KVCAS {
			// Consul leaves a key that would not change as it is, its index too. The flags, which nothing else uses,
			// make every write a change. They stay below what JSON numbers hold exactly.
			op.Flags = 1 + rand.Uint64N(1<<53-1)
		}
		ops[i] = &api.TxnOp{KV: op}
	}
	var answer api.TxnResponse
	// Not by api.Txn, which keeps the status of an answer from its caller.
	_, err := c.api.Raw().Write("/v1/txn", ops, &answer, (&api.WriteOptions{}).WithContext(ctx))
	if status, ok := errors.AsType[api.StatusError](err); ok && status.Code == http.StatusConflict {
		if err := json.Unmarshal([]byte(status.Body), &answer); err != nil {
			return 0, fmt.Errorf("consul at %s: reading why a transaction was refused: %w", c.address, err)
		}
		return 0, c.refusal(kv, answer.Errors)
	}
	if err != nil {
		return 0, c.failure(ctx, err)
	}
	var revision uint64
	for _, result := range answer.Results {
		if result.KV != nil {
			revision = max(revision, result.KV.ModifyIndex)
		}
	}
	return revision, nil
}

// refusal tells conditions that did not hold from everything else, by what was asked rather than by Consul's wording:
// a conditional operation fails for its condition, or for want of permission.
func (c *Client) refusal(kv []*api.KVTxnOp, errs api.TxnErrors) error {
	refused := &Refused{}
	for _, e := range errs {
		if e.OpIndex < 0 || e.OpIndex >= len(kv) || strings.HasPrefix(e.What, "Permission denied") {
			return fmt.Errorf("consul at %s refused: %s", c.address, e.What)
		}
		switch kv[e.OpIndex].Verb {
		case api.KVCAS, api.KVDeleteCAS, api.KVCheckIndex, api.KVCheckNotExists:
			refused.Ops = append(refused.Ops, e.OpIndex)
		default:
			return fmt.Errorf("consul at %s refused: %s", c.address, e.What)
		}
	}
	if len(refused.Ops) == 0 {
		return fmt.Errorf("consul at %s refused a transaction without a reason", c.address)
	}
	return refused
}

// failure sorts errors: without an answer, or with one of a server that could not (5xx, and 429 of its rate limits),
// Consul is unavailable.
func (c *Client) failure(ctx context.Context, err error) error {
	status, answered := errors.AsType[api.StatusError](err)
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err // the address is named already, and the rest of the URL is ours
	}
	switch {
	case answered && status.Code == http.StatusForbidden:
		return fmt.Errorf("consul at %s: the token has no right to this: %.200s", c.address, status.Body)
	case answered && status.Code < 500 && status.Code != http.StatusTooManyRequests:
		return fmt.Errorf("consul at %s: status %d: %.200s", c.address, status.Code, status.Body)
	case answered:
		return fmt.Errorf("%w: consul at %s: status %d: %.200s", store.ErrUnavailable, c.address, status.Code, status.Body)
	case ctx.Err() != nil:
		return fmt.Errorf("%w: consul at %s: %w", store.ErrUnavailable, c.address, ctx.Err())
	}
	return fmt.Errorf("%w: consul at %s: %w", store.ErrUnavailable, c.address, err)
}

func what(errs api.TxnErrors) string {
	if len(errs) == 0 {
		return "no reason given"
	}
	return errs[0].What
}

// transport shows the token of a file, and bounds the bodies of answers.
type transport struct {
	http.RoundTripper
	token *tokenFile // nil: none
}

func (t transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token != nil {
		r = r.Clone(r.Context()) // which a RoundTripper may not change
		r.Header.Set("X-Consul-Token", t.token.get())
	}
	resp, err := t.RoundTripper.RoundTrip(r)
	if err == nil {
		resp.Body = http.MaxBytesReader(nil, resp.Body, maxBody)
	}
	return resp, err
}

func (t transport) CloseIdleConnections() {
	if c, ok := t.RoundTripper.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
