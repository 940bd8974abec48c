package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"portolan/topology"
)

// DefaultURL is where a server with the default configuration listens.
const DefaultURL = "http://127.0.0.1:8420"

// maxAnswer bounds what is read of an answer: a few thousand replicas with all that is known of them.
const maxAnswer = 64 << 20

// Client asks a server. It is safe for concurrent use. Its errors are an *Error where the server answered with one, or did not
// answer (CodeUnavailable).
type Client struct {
	base  *url.URL
	token string
	http  *http.Client
}

// NewClient returns a client of the server at address, such as http://127.0.0.1:8420; token is empty for none. Every request
// ends within a minute.
func NewClient(address, token string) (*Client, error) {
	u, err := url.Parse(address)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || strings.Trim(u.Path, "/") != "" {
		return nil, fmt.Errorf("%q is not the URL of an API, such as %s", address, DefaultURL)
	}
	u.Path = ""
	return &Client{base: u, token: token, http: &http.Client{
		Timeout: time.Minute,
		// The token is for this server and nobody else.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// path joins the parts of a path, each of them escaped.
func path(parts ...string) string {
	for i, p := range parts {
		parts[i] = url.PathEscape(p)
	}
	return "/v1/" + strings.Join(parts, "/")
}

// do asks, and reads the answer into answer unless that is nil.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, body, answer any) error {
	var reader io.Reader
	if method != http.MethodGet {
		text := []byte("{}")
		if body != nil {
			var err error
			if text, err = json.Marshal(body); err != nil {
				return fmt.Errorf("writing the request: %w", err)
			}
		}
		reader = bytes.NewReader(text)
	}
	target := c.base.String() + path
	if len(query) > 0 {
		target += "?" + query.Encode()
	}
	request, err := http.NewRequestWithContext(ctx, method, target, reader)
	if err != nil {
		return fmt.Errorf("asking %s: %w", c.base, err)
	}
	request.Header.Set("Accept", "application/json")
	if reader != nil {
		request.Header.Set("Content-Type", "application/json")
	}
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token)
	}
	response, err := c.http.Do(request)
	if err != nil {
		return c.unreachable(ctx, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("reading the answer of %s: %w", c.base, err)
	}
	if len(text) > maxAnswer {
		return fmt.Errorf("the answer of %s is larger than %d bytes", c.base, maxAnswer)
	}
	if response.StatusCode != http.StatusOK {
		var e Failure
		if json.Unmarshal(text, &e) == nil && e.Error != nil && e.Error.Message != "" {
			return e.Error
		}
		return fmt.Errorf("%s answered %s, which is not how a portolan answers: is it one?", c.base, response.Status)
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(text, answer); err != nil {
		return fmt.Errorf("%s answered what this client does not understand: is it a portolan of another version? %w", c.base, err)
	}
	return nil
}

// unreachable says what to do about a server that did not answer.
func (c *Client) unreachable(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return unanswered("nobody listens at %s: is portolan serve running there? Another address is given with --api or PORTOLAN_API", c.base)
	case errors.As(err, &timeout) && timeout.Timeout():
		return unanswered("%s did not answer in time", c.base)
	}
	if strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") { // net/http has no value for it
		return unanswered("%s speaks plain HTTP: give its address with http://", c.base)
	}
	var inner *url.Error
	if errors.As(err, &inner) {
		err = inner.Err // its text repeats the URL
	}
	return unanswered("asking %s: %v", c.base, err)
}

func unanswered(format string, args ...any) *Error {
	e := failf(CodeUnavailable, format, args...)
	e.unanswered = true
	return e
}

// Answered reports whether err is what a server said, and not that there was none to say anything.
func Answered(err error) bool {
	var e *Error
	return errors.As(err, &e) && !e.unanswered
}

// Status returns the state of the server.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, http.MethodGet, path("status"), nil, nil, &s)
}

// Export returns the topology as it is declared.
func (c *Client) Export(ctx context.Context) (d topology.Document, err error) {
	return d, c.do(ctx, http.MethodGet, path("export"), nil, nil, &d)
}

// Apply makes a document the topology, or tells what would change.
func (c *Client) Apply(ctx context.Context, a Apply) (r Applied, err error) {
	return r, c.do(ctx, http.MethodPost, path("apply"), nil, a, &r)
}

// Diff tells what would make d of the topology.
func (c *Client) Diff(ctx context.Context, d topology.Document) ([]topology.Change, error) {
	var r Applied
	return r.Changes, c.do(ctx, http.MethodPost, path("diff"), nil, d, &r)
}

// Registries returns all registries.
func (c *Client) Registries(ctx context.Context) (r []Registry, err error) {
	return r, c.do(ctx, http.MethodGet, path("registries"), nil, nil, &r)
}

// Registry returns one registry.
func (c *Client) Registry(ctx context.Context, name string) (r Registry, err error) {
	return r, c.do(ctx, http.MethodGet, path("registries", name), nil, nil, &r)
}

// CreateRegistry makes a registry.
func (c *Client) CreateRegistry(ctx context.Context, d topology.RegistryDocument) (r Registry, err error) {
	return r, c.do(ctx, http.MethodPost, path("registries"), nil, d, &r)
}

// UpdateRegistry changes a registry itself; with force also if clients that get an address now would get none.
func (c *Client) UpdateRegistry(ctx context.Context, name string, p RegistryPatch, force bool) (a Applied, err error) {
	return a, c.do(ctx, http.MethodPatch, path("registries", name), url.Values{"force": {strconv.FormatBool(force)}}, p, &a)
}

// DeleteRegistry removes a registry; the content of its replicas stays. With force also where pushes are in one region alone.
func (c *Client) DeleteRegistry(ctx context.Context, name string, force bool) error {
	return c.do(ctx, http.MethodDelete, path("registries", name), url.Values{"force": {strconv.FormatBool(force)}}, nil, nil)
}

// Unreplicated tells what would stay in one region alone if the registry were deleted.
func (c *Client) Unreplicated(ctx context.Context, registry string) (u []Unreplicated, err error) {
	return u, c.do(ctx, http.MethodGet, path("registries", registry, "unreplicated"), nil, nil, &u)
}

// Conflicts returns up to limit of the conflicts that are kept of a registry, the newest first.
func (c *Client) Conflicts(ctx context.Context, registry string, limit int) (l []Conflict, err error) {
	return l, c.do(ctx, http.MethodGet, path("registries", registry, "conflicts"), url.Values{"limit": {strconv.Itoa(limit)}}, nil, &l)
}

// Confirm lets a raw edit pass that the guard holds.
func (c *Client) Confirm(ctx context.Context, registry string) error {
	return c.do(ctx, http.MethodPost, path("registries", registry, "confirm"), nil, nil, nil)
}

// Explain returns the decision for a client: ecs is its network or address, resolver its resolver's address; one of them
// may be empty.
func (c *Client) Explain(ctx context.Context, registry, ecs, resolver string) (e Explanation, err error) {
	query := url.Values{}
	if ecs != "" {
		query.Set("ecs", ecs)
	}
	if resolver != "" {
		query.Set("resolver", resolver)
	}
	return e, c.do(ctx, http.MethodGet, path("registries", registry, "explain"), query, nil, &e)
}

// Shares tells where the clients nearest to each region go.
func (c *Client) Shares(ctx context.Context, registry string) (s []RegistryShares, err error) {
	return s, c.do(ctx, http.MethodGet, path("registries", registry, "shares"), nil, nil, &s)
}

// Inspect looks at a tag or digest in every replica.
func (c *Client) Inspect(ctx context.Context, registry, repository, reference string) (i Inspection, err error) {
	query := url.Values{"repository": {repository}, "reference": {reference}}
	return i, c.do(ctx, http.MethodGet, path("registries", registry, "inspect"), query, nil, &i)
}

// Replicas returns the replicas of a registry.
func (c *Client) Replicas(ctx context.Context, registry string) (r []Replica, err error) {
	return r, c.do(ctx, http.MethodGet, path("registries", registry, "replicas"), nil, nil, &r)
}

// Replica returns one replica.
func (c *Client) Replica(ctx context.Context, registry, region string) (r Replica, err error) {
	return r, c.do(ctx, http.MethodGet, path("registries", registry, "replicas", region), nil, nil, &r)
}

// CreateReplica adds a replica to a registry.
func (c *Client) CreateReplica(ctx context.Context, registry string, d topology.ReplicaDocument) (r Replica, err error) {
	return r, c.do(ctx, http.MethodPost, path("registries", registry, "replicas"), nil, d, &r)
}

// UpdateReplica changes a replica; with force also if clients that get an address now would get none.
func (c *Client) UpdateReplica(ctx context.Context, registry, region string, p ReplicaPatch, force bool) (a Applied, err error) {
	return a, c.do(ctx, http.MethodPatch, path("registries", registry, "replicas", region), url.Values{"force": {strconv.FormatBool(force)}}, p, &a)
}

// DeleteReplica asks for a replica to be drained and removed from the registry; its content stays. With force also pushes
// that are nowhere else are given up.
func (c *Client) DeleteReplica(ctx context.Context, registry, region string, force bool) (r Replica, err error) {
	return r, c.do(ctx, http.MethodDelete, path("registries", registry, "replicas", region), url.Values{"force": {strconv.FormatBool(force)}}, nil, &r)
}

// Resync asks for a new baseline of a replica.
func (c *Client) Resync(ctx context.Context, registry, region string) (r Replica, err error) {
	return r, c.do(ctx, http.MethodPost, path("registries", registry, "replicas", region, topology.RequestResync), nil, nil, &r)
}

// Accept accepts the plan of a baseline, or what the guard held of a replica.
func (c *Client) Accept(ctx context.Context, registry, region string) (r Replica, err error) {
	return r, c.do(ctx, http.MethodPost, path("registries", registry, "replicas", region, topology.RequestAccept), nil, nil, &r)
}

// Pending returns up to limit of what is still to be applied to a replica.
func (c *Client) Pending(ctx context.Context, registry, region string, limit int) (p []PendingItem, err error) {
	return p, c.do(ctx, http.MethodGet, path("registries", registry, "replicas", region, "pending"), url.Values{"limit": {strconv.Itoa(limit)}}, nil, &p)
}

// EventsToken returns what a replica needs to send its notifications.
func (c *Client) EventsToken(ctx context.Context, registry, region string) (t EventsToken, err error) {
	return t, c.do(ctx, http.MethodGet, path("registries", registry, "replicas", region, "events"), nil, nil, &t)
}
