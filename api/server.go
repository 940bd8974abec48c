package api

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/netip"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/health"
	"portolan/replicator"
	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

const (
	// maxBody bounds what a request may hold: as much as a topology file.
	maxBody = 4 << 20
	// requestTimeout bounds what a request may take. Looking at a tag in every replica takes the longest.
	requestTimeout = 45 * time.Second
)

// Editor reads and changes what is declared: a topology.Editor. Its errors are of the kinds of package topology.
type Editor interface {
	Diff(ctx context.Context, d topology.Document) ([]topology.Change, error)
	Export(ctx context.Context) (topology.Document, error)
	CreateRegistry(ctx context.Context, r topology.RegistryDocument) error
	UpdateRegistry(ctx context.Context, name string, change func(*topology.RegistryDocument)) error
	DeleteRegistry(ctx context.Context, name string) error
	CreateReplica(ctx context.Context, registry string, r topology.ReplicaDocument) error
	UpdateReplica(ctx context.Context, registry, region string, change func(*topology.ReplicaDocument)) error
	RampReplica(ctx context.Context, registry, region string, over time.Duration, change func(*topology.ReplicaDocument)) error
	Ramps(ctx context.Context) ([]topology.Ramp, error)
	DeleteReplica(ctx context.Context, registry, region string, r topology.Request) error
	RemoveReplica(ctx context.Context, registry, region string) error
	Apply(ctx context.Context, d topology.Document, prune, dryRun bool) ([]topology.Change, error)
	Confirm(ctx context.Context, registry string) error
	Challenges(ctx context.Context) ([]topology.Challenge, error)
	SetChallenge(ctx context.Context, c topology.Challenge) error
	ClearChallenge(ctx context.Context, name, token string) error
}

var _ Editor = (*topology.Editor)(nil)

// Replicator looks at what is replicated.
type Replicator interface {
	Inspect(ctx context.Context, registry, repository, reference string) (Inspection, error)
	Pending(registry, region string, limit int) []PendingItem
	Unreplicated(ctx context.Context, registry string) ([]Unreplicated, error)
	Conflicts(ctx context.Context, registry string, limit int) ([]Conflict, error)
}

// View is what the server answers clients from, at one moment.
type View struct {
	Snapshot *topology.Snapshot
	// Ramps are the weights that change over time, by registry and region.
	Ramps []topology.Ramp
	// StoreDown is whether the store cannot be read, so that Snapshot is all there is.
	StoreDown bool
	// StoreLost is whether that is because the store has lost its keys: it can be given them again.
	StoreLost bool
	// Held are the raw edits that the guard holds.
	Held []topology.Pending
	// Router decides as the DNS server does: it is the same one. Nil before the first topology.
	Router *router.Router
	// Conditions are those that Router has.
	Conditions router.Conditions
	// Verdicts are what probes found; nil on a server that does not probe.
	Verdicts *health.Verdicts
	// Replication is what replicators report.
	Replication map[router.ReplicaKey]topology.Replication
	// Requests are the verbs that were asked of a replica and are not finished, sorted.
	Requests map[router.ReplicaKey][]string
}

// Options are what a Server shows and what it hands edits to. What may be nil says so.
type Options struct {
	// View returns the newest view; never nil.
	View func() *View
	// Status returns the state of the daemon.
	Status func() Status
	Editor Editor
	// Reserved are labels that neither registries nor regions may have.
	Reserved []string
	// Store is where requests to the replicator are left.
	Store store.Store
	// Replicator is nil without that role.
	Replicator Replicator
	// Knock looks whether a registry is at the endpoint of a replica that is about to be created or moved, and returns an error if
	// something else is. It may be called from several goroutines. Nil without the role replicator.
	Knock func(context.Context, topology.ReplicaDocument) error
	// EventsToken makes the token of a replica; nil without an events listener.
	EventsToken func(registry, region string) EventsToken
	// Zone is the front door's, fully qualified; empty without the role dns. TTLMin and TTLMax are in seconds.
	Zone           string
	TTLMin, TTLMax int
	// Chart charts a topology that is only thought of, on the databases in use; nil without the role dns.
	Chart func(context.Context, *topology.Snapshot) (*router.Charts, error)
	// Metrics serves /metrics.
	Metrics http.Handler
	// Token is what requests must show as a bearer token; empty for none.
	Token string
	// Names are the host names by which the server may be asked, besides localhost and addresses.
	Names []string
	Log   *zap.Logger
}

// server is the handler.
type server struct {
	Options
	origin *http.CrossOriginProtection
	// charting is held by whoever makes a chart.
	charting chan struct{}
}

// Handler returns the HTTP API, with /healthz, /readyz and /metrics. It is safe for concurrent use.
//
// Whoever can reach the listener and, where there is one, knows the token may do everything. A web page in an operator's
// browser may not: a request by a host name that is not the server's own is refused (DNS rebinding), and so are writes
// that another origin caused or that are not JSON.
func Handler(o Options) http.Handler {
	s := &server{Options: o, origin: http.NewCrossOriginProtection(), charting: make(chan struct{}, 1)}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { plain(w, http.StatusOK, "ok\n") })
	mux.HandleFunc("GET /readyz", s.readyz)
	mux.Handle("GET /metrics", s.guarded(maxBody, func(w http.ResponseWriter, r *http.Request) error {
		s.Metrics.ServeHTTP(w, r)
		return nil
	}))
	for pattern, serve := range map[string]func(*http.Request) (any, error){
		"GET /v1/status":                                          s.status,
		"GET /v1/export":                                          s.export,
		"POST /v1/apply":                                          s.apply,
		"POST /v1/diff":                                           s.diff,
		"POST /v1/simulate":                                       s.simulate,
		"GET /v1/acme":                                            s.challenges,
		"POST /v1/acme":                                           s.setChallenge,
		"DELETE /v1/acme/{name}/{token}":                          s.clearChallenge,
		"GET /v1/registries":                                      s.registries,
		"POST /v1/registries":                                     s.createRegistry,
		"GET /v1/registries/{registry}":                           s.registry,
		"PATCH /v1/registries/{registry}":                         s.updateRegistry,
		"DELETE /v1/registries/{registry}":                        s.deleteRegistry,
		"POST /v1/registries/{registry}/confirm":                  s.confirm,
		"GET /v1/registries/{registry}/explain":                   s.explain,
		"GET /v1/registries/{registry}/shares":                    s.shares,
		"GET /v1/registries/{registry}/inspect":                   s.inspect,
		"GET /v1/registries/{registry}/unreplicated":              s.unreplicated,
		"GET /v1/registries/{registry}/conflicts":                 s.conflicts,
		"GET /v1/registries/{registry}/replicas":                  s.replicas,
		"POST /v1/registries/{registry}/replicas":                 s.createReplica,
		"GET /v1/registries/{registry}/replicas/{region}":         s.replica,
		"PATCH /v1/registries/{registry}/replicas/{region}":       s.updateReplica,
		"DELETE /v1/registries/{registry}/replicas/{region}":      s.deleteReplica,
		"GET /v1/registries/{registry}/replicas/{region}/pending": s.pending,
		"GET /v1/registries/{registry}/replicas/{region}/events":  s.events,
		"POST /v1/registries/{registry}/replicas/{region}/resync": s.ask(topology.RequestResync),
		"POST /v1/registries/{registry}/replicas/{region}/accept": s.ask(topology.RequestAccept),
	} {
		limit := int64(maxBody)
		if pattern == "POST /v1/simulate" {
			limit = maxSimulation
		}
		mux.Handle(pattern, s.guarded(limit, func(w http.ResponseWriter, r *http.Request) error {
			answer, err := serve(r)
			if err != nil {
				return err
			}
			return s.write(w, http.StatusOK, answer)
		}))
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) { // to everybody: it tells nothing
		s.fail(w, r, failf(CodeNotFound, "there is no %s %s: the API is below /v1; is the client of another version than the server?", r.Method, clip(r.URL.Path)))
	})
	return mux
}

// guarded lets only those in who may ask, bounds what they ask to limit bytes, and writes errors as JSON.
func (s *server) guarded(limit int64, serve func(http.ResponseWriter, *http.Request) error) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), requestTimeout)
		defer cancel()
		r = r.WithContext(topology.WithActor(ctx, r.RemoteAddr))
		r.Body = http.MaxBytesReader(w, r.Body, limit)
		defer func() {
			if p := recover(); p != nil {
				s.Log.Error("a request of the API failed by a fault of the program", zap.String("path", clip(r.URL.Path)),
					zap.Any("panic", p), zap.ByteString("stack", debug.Stack()))
				s.fail(w, r, errors.New("the server met a fault of its own; its log says more"))
			}
		}()
		err := s.admit(r)
		if err == nil {
			err = serve(w, r)
		}
		if err != nil {
			s.fail(w, r, err)
		}
	})
}

// admit refuses whom Handler says.
func (s *server) admit(r *http.Request) error {
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.ToLower(strings.TrimSuffix(strings.Trim(host, "[]"), "."))
	_, err := netip.ParseAddr(host)
	named := func(name string) bool { return strings.EqualFold(strings.TrimSuffix(name, "."), host) }
	if err != nil && host != "localhost" && !slices.ContainsFunc(s.Names, named) {
		return failf(CodeForbidden, "the host name %q is not one of this server's: ask it by its address, or list the name in api.names", clip(host))
	}
	if s.Token != "" && !s.authorized(r) {
		return failf(CodeUnauthorized, "a bearer token is needed, and it must be the one in the server's api.token_file: give --token-file or PORTOLAN_TOKEN_FILE")
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		return nil
	}
	if err := s.origin.Check(r); err != nil {
		return failf(CodeForbidden, "the request was caused by a web page of another origin")
	}
	if media, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || media != "application/json" {
		return failf(CodeMediaType, "a request that changes something has the Content-Type application/json")
	}
	return nil
}

// authorized compares hashes, so that the time it takes tells neither the token nor its length.
func (s *server) authorized(r *http.Request) bool {
	given, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	a, b := sha256.Sum256([]byte(given)), sha256.Sum256([]byte(s.Token))
	return subtle.ConstantTimeCompare(a[:], b[:]) == 1 && ok
}

func (s *server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := ErrorOf(err, CodeInternal)
	if e.Code == CodeInternal {
		s.Log.Warn("a request of the API failed", zap.String("method", r.Method), zap.String("path", clip(r.URL.Path)), zap.Error(err))
	}
	if e.Code == CodeUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="portolan"`)
	}
	if err := s.write(w, statusOf[e.Code], Failure{e}); err != nil {
		s.Log.Warn("writing an error of the API", zap.Error(err))
	}
}

// write sends an answer whole or not at all.
func (s *server) write(w http.ResponseWriter, status int, answer any) error {
	var body bytes.Buffer
	e := json.NewEncoder(&body)
	e.SetEscapeHTML(false)
	if err := e.Encode(answer); err != nil {
		return fmt.Errorf("writing the answer as JSON: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write(body.Bytes()) // what fails here is the client's own doing
	return nil
}

func plain(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	w.Write([]byte(text))
}

// clip bounds what of a request is repeated.
func clip(s string) string {
	const most = 100
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// readyz tells everybody whether the server is ready, or why it is not. Warnings are for operators: the status has them.
func (s *server) readyz(w http.ResponseWriter, r *http.Request) {
	status := s.Status()
	if status.Ready {
		plain(w, http.StatusOK, "ready\n")
		return
	}
	plain(w, http.StatusServiceUnavailable, "not ready\n"+strings.Join(status.NotReady, "\n")+"\n")
}

func (s *server) status(*http.Request) (any, error) { return s.Status(), nil }

// ---- reading -----------------------------------------------------------------------------------------------------------

func (s *server) export(r *http.Request) (any, error) { return s.declared(r) }

// declared is the topology as operators declared it; while the store is away, as it is served. To whoever only reads, a registry of which
// the guard holds an edit is as it is served, too: what was taken away is there until that is confirmed, and an export can take it back.
func (s *server) declared(r *http.Request) (topology.Document, error) {
	v, reads := s.View(), r.Method == http.MethodGet
	if err := v.away(); err != nil {
		if reads {
			return v.Snapshot.Document(), nil
		}
		return topology.Document{}, err
	}
	d, err := s.Editor.Export(r.Context())
	if err != nil || !reads || v.Snapshot == nil || len(v.Held) == 0 {
		return d, err
	}
	return withHeld(d, v), nil
}

// away refuses an edit while the store cannot be read; nil if it can.
func (v *View) away() error {
	if !v.StoreDown || v.Snapshot == nil {
		return nil
	}
	if v.StoreLost {
		return failf(CodeUnavailable, "the store has lost its keys, and nothing can be changed before it has them again: %s", GiveBack)
	}
	return failf(CodeUnavailable, "the store cannot be read at the moment, so nothing can be changed: portolan status says why")
}

// GiveBack says how a store that has lost its keys is given them again.
const GiveBack = "'portolan export | portolan apply -f -' gives back what is served"

// basis is what a document is applied to: what operators declared, or what is served where the store has lost that. Then the document is
// to bring all replicas: those that it left out would be gone as soon as the store has keys.
func (s *server) basis(r *http.Request, a Apply) (before topology.Document, lost bool, err error) {
	v := s.View()
	if v.Snapshot == nil || !v.StoreDown || !v.StoreLost {
		before, err = s.declared(r)
		return before, false, err
	}
	served := v.Snapshot.Document()
	var lacks []string
	for _, registry := range served.Registries {
		brought := func(name string) bool {
			return slices.ContainsFunc(a.Document.Registries, func(d topology.RegistryDocument) bool {
				return d.Name == registry.Name && (name == "" || slices.ContainsFunc(d.Replicas, func(p topology.ReplicaDocument) bool { return p.Region == name }))
			})
		}
		if !brought("") {
			lacks = append(lacks, registry.Name)
			continue
		}
		for _, replica := range registry.Replicas {
			if !brought(replica.Region) {
				lacks = append(lacks, registry.Name+"/"+replica.Region)
			}
		}
	}
	if len(lacks) > 0 && !a.Force {
		return served, true, failf(CodeRefused, "the store has lost its keys, and the document lacks what is served: %s, which would be gone at once: %s; --force applies the document all the same",
			strings.Join(lacks, ", "), GiveBack)
	}
	return served, true, nil
}

// withHeld is d with the registries of which the guard holds an edit as v serves them.
func withHeld(d topology.Document, v *View) topology.Document {
	held := func(r topology.RegistryDocument) bool {
		return slices.ContainsFunc(v.Held, func(h topology.Pending) bool { return h.Registry == r.Name })
	}
	d.Registries = slices.DeleteFunc(d.Registries, held)
	for _, r := range v.Snapshot.Document().Registries {
		if held(r) {
			d.Registries = append(d.Registries, r)
		}
	}
	slices.SortFunc(d.Registries, func(a, b topology.RegistryDocument) int { return strings.Compare(a.Name, b.Name) })
	return d
}

// now is the newest view, with ramps and what was reported and asked of replicas read from the store itself: who asked for something finds
// it when he looks next, at whichever server.
func (s *server) now(ctx context.Context) (*View, error) {
	v := *s.View()
	if v.StoreDown && v.Snapshot != nil {
		return &v, nil
	}
	tree, err := s.Store.List(ctx, topology.ReplicaStatesPrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the state of replicas: %w", err)
	}
	state := topology.ParseState(tree)
	v.Replication, v.Requests = state.Replications, state.Requests
	if v.Ramps, err = s.Editor.Ramps(ctx); err != nil {
		return nil, err
	}
	return &v, nil
}

func (s *server) registries(r *http.Request) (any, error) {
	d, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	v, err := s.now(r.Context())
	if err != nil {
		return nil, err
	}
	list := make([]Registry, 0, len(d.Registries))
	for _, declared := range d.Registries {
		list = append(list, s.describe(v, declared))
	}
	return list, nil
}

func (s *server) registry(r *http.Request) (any, error) { return s.described(r) }

// described is the registry that the path names, with what is known of it.
func (s *server) described(r *http.Request) (Registry, error) {
	declared, err := s.find(r)
	if err != nil {
		return Registry{}, err
	}
	v, err := s.now(r.Context())
	if err != nil {
		return Registry{}, err
	}
	return s.describe(v, declared), nil
}

// find returns the registry that the path names, as it is declared.
func (s *server) find(r *http.Request) (topology.RegistryDocument, error) {
	d, err := s.declared(r)
	if err != nil {
		return topology.RegistryDocument{}, err
	}
	name := r.PathValue("registry")
	var names []string
	for _, declared := range d.Registries {
		if declared.Name == name {
			return declared, nil
		}
		names = append(names, declared.Name)
	}
	if len(names) == 0 {
		return topology.RegistryDocument{}, failf(CodeNotFound, "there is no registry %q, nor any other: portolan registry create or portolan apply makes one", clip(name))
	}
	return topology.RegistryDocument{}, failf(CodeNotFound, "there is no registry %q; there is %s", clip(name), clip(strings.Join(names, ", ")))
}

func (s *server) replicas(r *http.Request) (any, error) {
	registry, err := s.described(r)
	return registry.Replicas, err
}

func (s *server) replica(r *http.Request) (any, error) {
	_, replica, err := s.findReplica(r)
	return replica, err
}

func (s *server) findReplica(r *http.Request) (Registry, Replica, error) {
	registry, err := s.described(r)
	if err != nil {
		return Registry{}, Replica{}, err
	}
	region := r.PathValue("region")
	var regions []string
	for _, p := range registry.Replicas {
		if p.Region == region {
			return registry, p, nil
		}
		regions = append(regions, p.Region)
	}
	return Registry{}, Replica{}, failf(CodeNotFound, "registry %s has no replica in %q; it has %s", registry.Name, clip(region), clip(strings.Join(regions, ", ")))
}

func (s *server) pending(r *http.Request) (any, error) {
	registry, replica, err := s.findReplica(r)
	if err != nil {
		return nil, err
	}
	if s.Replicator == nil {
		return nil, s.notReplicator()
	}
	limit, err := limitOf(r)
	if err != nil {
		return nil, err
	}
	return append([]PendingItem{}, s.Replicator.Pending(registry.Name, replica.Region, limit)...), nil
}

// limitOf is how much of a list is asked for.
func limitOf(r *http.Request) (int, error) {
	text := r.URL.Query().Get("limit")
	if text == "" {
		return 100, nil
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit < 1 || limit > 10000 {
		return 0, failf(CodeInvalid, "limit %q is not a number from 1 to 10000", clip(text))
	}
	return limit, nil
}

func (s *server) conflicts(r *http.Request) (any, error) {
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	if s.Replicator == nil {
		return nil, s.notReplicator()
	}
	limit, err := limitOf(r)
	if err != nil {
		return nil, err
	}
	kept, err := s.Replicator.Conflicts(r.Context(), registry.Name, limit)
	return append([]Conflict{}, kept...), err
}

func (s *server) notReplicator() error {
	return failf(CodeRefused, "this server has not the role replicator: ask one that has")
}

func (s *server) inspect(r *http.Request) (any, error) {
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	if s.Replicator == nil {
		return nil, s.notReplicator()
	}
	q := r.URL.Query()
	if q.Get("repository") == "" || q.Get("reference") == "" {
		return nil, failf(CodeInvalid, "repository and reference are needed")
	}
	if registry.Policy.Replication == "disabled" {
		return nil, failf(CodeRefused, "replication of registry %s is disabled: nothing is brought to its replicas", registry.Name)
	}
	if why := replicator.CheckImage(registry.Name, q.Get("repository"), q.Get("reference")); why != nil {
		return nil, failf(CodeInvalid, "%v", why)
	}
	found, err := s.Replicator.Inspect(r.Context(), registry.Name, q.Get("repository"), q.Get("reference"))
	if err != nil {
		return nil, fmt.Errorf("looking at %s:%s in every replica: %w", clip(q.Get("repository")), clip(q.Get("reference")), err)
	}
	return found, nil
}

func (s *server) unreplicated(r *http.Request) (any, error) {
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	found, err := s.alone(r.Context(), registry)
	return append([]Unreplicated{}, found...), err
}

// alone is what only one region of a registry has; without the role replicator that cannot be told.
func (s *server) alone(ctx context.Context, registry topology.RegistryDocument) ([]Unreplicated, error) {
	if registry.Policy.Replication == "disabled" {
		return nil, nil
	}
	if s.Replicator == nil {
		return nil, s.notReplicator()
	}
	return s.Replicator.Unreplicated(ctx, registry.Name)
}

func (s *server) explain(r *http.Request) (any, error) {
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	if s.Zone == "" {
		return nil, failf(CodeRefused, "this server has not the role dns, so it decides nothing: ask one that has")
	}
	client, err := clientOf(r.URL.Query().Get("ecs"), r.URL.Query().Get("resolver"))
	if err != nil {
		return nil, err
	}
	v := s.View()
	if v.Router == nil {
		return nil, failf(CodeUnavailable, "the topology was not read yet: try again in a moment")
	}
	decides, ok := v.Router.Registry(registry.Name)
	if !ok {
		why := problemOf(v, topology.RegistriesPrefix+registry.Name+"/")
		if why == "" {
			why = "it has no complete replica"
		}
		return nil, failf(CodeRefused, "registry %s is not served: %s", registry.Name, why)
	}
	e := Explanation{Explanation: decides.Explain(client), TTL: s.TTLMin, Topology: v.Snapshot.Digest}
	if e.Settled {
		e.TTL = s.TTLMax
	}
	return e, nil
}

// clientOf is the client that a question is about: as a query with that subnet from that resolver.
func clientOf(ecs, resolver string) (router.Client, error) {
	var c router.Client
	if ecs == "" && resolver == "" {
		return c, failf(CodeInvalid, "who asks? give ecs, the client's network or address, or resolver, the address of its resolver")
	}
	if resolver != "" {
		a, err := netip.ParseAddr(resolver)
		if err != nil || a.Zone() != "" {
			return c, failf(CodeInvalid, "resolver %q is not an IP address", clip(resolver))
		}
		c.Resolver = a.Unmap()
	}
	if ecs != "" {
		p, err := netip.ParsePrefix(ecs)
		if a, e := netip.ParseAddr(ecs); e == nil && a.Zone() == "" {
			// What resolvers send of an address: RFC 7871, section 11.1.
			bits := 24
			if a.Is6() && !a.Is4In6() {
				bits = 56
			}
			p, err = a.Unmap().Prefix(bits)
		}
		if err != nil {
			return c, failf(CodeInvalid, "ecs %q is neither a network, such as 203.0.113.0/24, nor an IP address", clip(ecs))
		}
		c.Subnet = p.Masked()
	}
	return c, nil
}

// problemOf is the first problem of the topology below prefix, in words; empty without one.
func problemOf(v *View, prefix string) string {
	if v.Snapshot != nil {
		for _, p := range v.Snapshot.Problems {
			if strings.HasPrefix(p.Key, prefix) {
				return p.Key + " " + p.Reason
			}
		}
	}
	return ""
}

func (s *server) shares(r *http.Request) (any, error) {
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	v := s.View()
	if v.Snapshot == nil {
		return nil, failf(CodeUnavailable, "the topology was not read yet: try again in a moment")
	}
	return sharesOf(v.Snapshot, v.Conditions, map[string]bool{registry.Name: true}), nil
}

// sharesOf tells where clients go, for the registries named, if s were the topology. Locations of clients play no part in
// shares, so no chart is needed.
func sharesOf(s *topology.Snapshot, conditions router.Conditions, registries map[string]bool) []RegistryShares {
	all := []RegistryShares{}
	decides := router.New(s, nil).With(conditions)
	for i, r := range s.Registries {
		if registries[r.Name] {
			all = append(all, RegistryShares{Registry: r.Name, Splits: decides.At(i).Shares()})
		}
	}
	return all
}

func (s *server) events(r *http.Request) (any, error) {
	registry, replica, err := s.findReplica(r)
	if err != nil {
		return nil, err
	}
	if s.EventsToken == nil {
		return nil, failf(CodeRefused, "this server has no events listener: ask one with the role replicator, or set events.listen there")
	}
	return s.EventsToken(registry.Name, replica.Region), nil
}

// ---- writing -----------------------------------------------------------------------------------------------------------

func (s *server) apply(r *http.Request) (any, error) {
	var a Apply
	if err := decodeStrict(r, &a); err != nil {
		return nil, err
	}
	before, lost, err := s.basis(r, a)
	if err != nil {
		return nil, err
	}
	received := receiving(before, s.View().Ramps)
	edit := func(dryRun bool) ([]topology.Change, topology.Values, error) {
		changes, err := s.Editor.Apply(r.Context(), a.Document, a.Prune, dryRun)
		switch {
		case err != nil:
			return nil, nil, err
		case lost: // to a store without keys all is new: told, and judged, is what becomes of what is served
			return topology.Diff(before, a.Document), a.Document.Values(), nil
		}
		return changes, intended(before, a.Document, changes), nil
	}
	if !a.DryRun {
		changes, values, err := edit(true)
		if err == nil {
			err = s.admitApply(r.Context(), before, values, changes, a)
		}
		if err != nil {
			return nil, err
		}
	}
	changes, values, err := edit(a.DryRun)
	if err != nil {
		return nil, err
	}
	result := s.applied(values, changes)
	result.Restored = lost
	if !a.DryRun {
		result.Drains = s.drains(received, changes, nil)
	} else if !a.Force {
		if refusal := s.object(r.Context(), before, values, a.Document, "without --force it would be refused"); refusal != nil {
			result.Refusal = refusal.Error()
		}
	}
	return result, nil
}

// admitApply refuses what an edit of a single replica would be refused for: changes that make values of what was before.
func (s *server) admitApply(ctx context.Context, before topology.Document, values topology.Values, changes []topology.Change, a Apply) error {
	for _, c := range changes {
		registry, region, field, ok := partsOf(c.Key)
		if ok && field == "" && c.Op == topology.Removed && s.incomplete(registry, region) {
			return refuseIncomplete(registry, region)
		}
	}
	if a.Force {
		return nil
	}
	return s.object(ctx, before, values, a.Document, "--force applies it all the same")
}

// object refuses what is applied with Force alone: values of d after which clients would get no address, or that lead to an endpoint, other
// than before, where something else than a registry is. instead says what to do.
func (s *server) object(ctx context.Context, before topology.Document, values topology.Values, d topology.Document, instead string) error {
	was := before.Values()
	if err := s.strand(was, values, instead); err != nil {
		return err
	}
	moved := map[string]topology.ReplicaDocument{}
	for _, r := range d.Registries {
		for _, p := range r.Replicas {
			if key := topology.ReplicaPrefix(r.Name, p.Region) + "endpoint"; was[key] != values[key] {
				moved[r.Name+"/"+p.Region] = p
			}
		}
	}
	if err := s.knock(ctx, moved, "to be applied"); err != nil {
		return failf(CodeRefused, "%v; %s", err, instead)
	}
	return nil
}

// partsOf takes the key of a replica apart; field is empty for that of the replica itself.
func partsOf(key string) (registry, region, field string, ok bool) {
	registry, rest, _ := strings.Cut(strings.TrimPrefix(key, topology.RegistriesPrefix), "/replicas/")
	region, field, ok = strings.Cut(rest, "/")
	return registry, region, field, ok
}

// intended are the values that changes, which Apply tells of document, make of those before.
func intended(before, document topology.Document, changes []topology.Change) topology.Values {
	values, wanted := before.Values(), document.Values()
	for _, c := range changes {
		if value, ok := wanted[c.Key]; ok {
			values[c.Key] = value
			continue
		}
		if c.Op == topology.Removed && strings.HasSuffix(c.Key, "/") { // a replica: it is drained first
			values[c.Key+"routing"] = RoutingDisabled
			continue
		}
		if c.Op == topology.Removed {
			delete(values, c.Key)
		}
	}
	return values
}

// drains tells which replicas, of those that were receiving clients, they leave by changes that were made just now, at once or by the end of
// one of the ramps.
func (s *server) drains(received map[string]bool, changes []topology.Change, ramps []topology.Ramp) []Drain {
	var drains []Drain
	for _, c := range changes {
		registry, region, key, of := partsOf(c.Key)
		last := time.Now()
		if ramp := topology.RampOf(ramps, registry, region); ramp != nil {
			last = ramp.End
		}
		leaves := key == "routing" && c.New == RoutingDisabled || key == "weight" && c.New == "0" || key == "" && c.Op == topology.Removed
		name := registry + "/" + region
		if of && leaves && received[name] && !slices.ContainsFunc(drains, func(d Drain) bool { return d.Replica == name }) {
			until := last.Add(time.Duration(s.TTLMax)*time.Second + topology.Spreading).UTC().Truncate(time.Second)
			drains = append(drains, Drain{name, until})
		}
	}
	return drains
}

// receiving are the replicas, as registry/region, that clients may be sent to by what is declared, or by a ramp that is under way.
func receiving(d topology.Document, ramps []topology.Ramp) map[string]bool {
	names := map[string]bool{}
	for _, r := range d.Registries {
		for _, p := range r.Replicas {
			weighs := p.Weight == nil || *p.Weight > 0 || topology.RampOf(ramps, r.Name, p.Region) != nil
			names[r.Name+"/"+p.Region] = p.Routing != RoutingDisabled && weighs
		}
	}
	return names
}

// applied tells what changes make of the shares, of all registries that they touch.
func (s *server) applied(values topology.Values, changes []topology.Change) Applied {
	touched := map[string]bool{}
	for _, c := range changes {
		name, _, _ := strings.Cut(strings.TrimPrefix(c.Key, topology.RegistriesPrefix), "/")
		touched[name] = true
	}
	result := Applied{Changes: append([]topology.Change{}, changes...)}
	if len(touched) > 0 {
		snapshot, _ := topology.Parse(values, nil, s.Reserved)
		conditions, _ := assumed(s.View(), snapshot, nil)
		result.Shares = sharesOf(snapshot, conditions, touched)
	}
	return result
}

func (s *server) diff(r *http.Request) (any, error) {
	var d topology.Document
	if err := decodeStrict(r, &d); err != nil {
		return nil, err
	}
	if err := s.View().away(); err != nil {
		return nil, err
	}
	changes, err := s.Editor.Diff(r.Context(), d)
	if err != nil {
		return nil, err
	}
	return Applied{Changes: append([]topology.Change{}, changes...)}, nil
}

func (s *server) createRegistry(r *http.Request) (any, error) {
	var d topology.RegistryDocument
	if err := decodeStrict(r, &d); err != nil {
		return nil, err
	}
	if err := s.View().away(); err != nil { // an empty store may be one that lost its keys
		return nil, err
	}
	replicas := make(map[string]topology.ReplicaDocument, len(d.Replicas))
	for _, p := range d.Replicas {
		replicas[d.Name+"/"+p.Region] = p
	}
	if err := s.knock(r.Context(), replicas, "created"); err != nil {
		return nil, err
	}
	if err := s.Editor.CreateRegistry(r.Context(), d); err != nil {
		return nil, err
	}
	r.SetPathValue("registry", d.Name)
	return s.registry(r)
}

func (s *server) updateRegistry(r *http.Request) (any, error) {
	var p RegistryPatch
	if err := decodeStrict(r, &p); err != nil {
		return nil, err
	}
	registry, err := s.find(r)
	if err != nil {
		return nil, err
	}
	before, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	if !forced(r) {
		if err := s.strand(before.Values(), p.patched(before, registry.Name), "--force does it all the same"); err != nil {
			return nil, err
		}
	}
	if err := s.Editor.UpdateRegistry(r.Context(), registry.Name, p.patch); err != nil {
		return nil, err
	}
	after, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	// What others change at the same moment is not what was asked for here.
	prefix := topology.RegistriesPrefix + registry.Name + "/"
	changes := slices.DeleteFunc(topology.Diff(before, after), func(c topology.Change) bool {
		_, _, _, replica := partsOf(c.Key)
		return replica || !strings.HasPrefix(c.Key, prefix)
	})
	return s.applied(after.Values(), changes), nil
}

// patch changes d as p says.
func (p *RegistryPatch) patch(d *topology.RegistryDocument) {
	set(&d.Home, p.Home)
	set(&d.Names, p.Names)
	set(&d.Policy.AllDown, p.AllDown)
	set(&d.Policy.Replication, p.Replication)
	set(&d.Policy.MaxLag, p.MaxLag)
	set(&d.Policy.Merge, p.Merge)
}

// patched are the values of d with the patch on one registry.
func (p *RegistryPatch) patched(d topology.Document, registry string) topology.Values {
	d.Registries = slices.Clone(d.Registries)
	for i := range d.Registries {
		if r := &d.Registries[i]; r.Name == registry {
			p.patch(r)
		}
	}
	return d.Values()
}

func (s *server) deleteRegistry(r *http.Request) (any, error) {
	declared, err := s.find(r)
	if err != nil {
		return nil, err
	}
	if !forced(r) {
		found, err := s.alone(r.Context(), declared)
		if err != nil {
			return nil, failf(CodeRefused, "registry %s is not deleted: whether its pushes are in more than one region cannot be told: %v; --force deletes it all the same", declared.Name, err)
		}
		if len(found) > 0 {
			reasons := make([]string, len(found))
			for i, u := range found {
				reasons[i] = u.Region + ": " + u.Reason
			}
			return nil, failf(CodeRefused, "registry %s is not deleted, for what would stay in one region alone: %s; wait for it, or give it up with --force", declared.Name, strings.Join(reasons, "; "))
		}
	}
	if err := s.Editor.DeleteRegistry(r.Context(), declared.Name); err != nil {
		return nil, err
	}
	return struct{}{}, nil
}

// forced reports whether a request is to be carried out although harm may come of it.
func forced(r *http.Request) bool { return r.URL.Query().Get("force") == "true" }

func (s *server) confirm(r *http.Request) (any, error) {
	name := r.PathValue("registry")
	v := s.View()
	if !slices.ContainsFunc(v.Held, func(h topology.Pending) bool { return h.Registry == name }) {
		if _, err := s.find(r); err != nil {
			return nil, err
		}
		return nil, failf(CodeRefused, "nothing of registry %s waits to be confirmed", name)
	}
	if err := s.Editor.Confirm(r.Context(), name); err != nil {
		return nil, err
	}
	return struct{}{}, nil
}

const (
	// knockTime is how long an edit waits for the answers of endpoints. One that does not answer is taken: it may come later.
	knockTime = 3 * time.Second
	// maxKnocks is how many endpoints are asked at one time.
	maxKnocks = 64
)

// knock refuses replicas, which are given by their names, at whose endpoints something answers that is no registry; done says what is
// not done then.
func (s *server) knock(ctx context.Context, replicas map[string]topology.ReplicaDocument, done string) error {
	if s.Knock == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, knockTime)
	defer cancel()
	names := slices.Sorted(maps.Keys(replicas))
	faults := make([]string, len(names))
	var g errgroup.Group
	g.SetLimit(maxKnocks)
	for i, name := range names {
		g.Go(func() error {
			if err := s.Knock(ctx, replicas[name]); err != nil {
				faults[i] = fmt.Sprintf("replica %s is not %s: %v", name, done, err)
			}
			return nil
		})
	}
	g.Wait() // the errors are in faults
	faults = slices.DeleteFunc(faults, func(fault string) bool { return fault == "" })
	if len(faults) > 0 {
		return failf(CodeRefused, "%s", strings.Join(faults, "; "))
	}
	return nil
}

func (s *server) createReplica(r *http.Request) (any, error) {
	var d topology.ReplicaDocument
	if err := decodeStrict(r, &d); err != nil {
		return nil, err
	}
	declared, err := s.find(r)
	if err != nil {
		return nil, err
	}
	if err := s.knock(r.Context(), map[string]topology.ReplicaDocument{declared.Name + "/" + d.Region: d}, "created"); err != nil {
		return nil, err
	}
	if err := s.Editor.CreateReplica(r.Context(), declared.Name, d); err != nil {
		return nil, err
	}
	r.SetPathValue("region", d.Region)
	return s.replica(r)
}

func (s *server) updateReplica(r *http.Request) (any, error) {
	var p ReplicaPatch
	if err := decodeStrict(r, &p); err != nil {
		return nil, err
	}
	registry, replica, err := s.findReplica(r)
	if err != nil {
		return nil, err
	}
	if p.Endpoint != nil {
		for _, d := range registry.Document.Replicas {
			if d.Region != replica.Region {
				continue
			}
			p.patch(&d)
			if err := s.knock(r.Context(), map[string]topology.ReplicaDocument{registry.Name + "/" + d.Region: d}, "changed"); err != nil {
				return nil, err
			}
		}
	}
	before, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	if !forced(r) {
		if err := s.strand(before.Values(), p.patched(before, registry.Name, replica.Region), "--force does it all the same"); err != nil {
			return nil, err
		}
	}
	received := receiving(before, s.View().Ramps)
	if err := s.update(r.Context(), registry.Name, replica.Region, &p); err != nil {
		return nil, err
	}
	after, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	ramps, err := s.Editor.Ramps(r.Context())
	if err != nil {
		return nil, err
	}
	// What others change at the same moment is not what was asked for here.
	prefix := topology.ReplicaPrefix(registry.Name, replica.Region)
	changes := slices.DeleteFunc(topology.Diff(before, after), func(c topology.Change) bool { return !strings.HasPrefix(c.Key, prefix) })
	ramp := topology.RampOf(ramps, registry.Name, replica.Region)
	changes, ramped := edited(replica, changes, after.Values(), ramp)
	result := s.applied(after.Values(), changes)
	if ramped && ramp != nil {
		result.Ramps = []topology.Ramp{*ramp}
	}
	result.Drains = s.drains(received, changes, result.Ramps)
	return result, nil
}

// patch changes d as p says.
func (p *ReplicaPatch) patch(d *topology.ReplicaDocument) {
	set(&d.Endpoint, p.Endpoint)
	set(&d.Addresses, p.Addresses)
	set(&d.Hostname, p.Hostname)
	if set(&d.Location, p.Location); len(d.Location) == 0 {
		d.Location = nil // which is no value, where an empty list is a bad one
	}
	set(&d.Routing, p.Routing)
	set(&d.Health.Probe, p.Probe)
	set(&d.Health.Canary, p.Canary)
	set(&d.Credentials, p.Credentials)
	set(&d.CA, p.CA)
	set(&d.ClientCert, p.ClientCert)
	set(&d.Prefix, p.Prefix)
	set(&d.Realms, p.Realms)
	if p.Weight != nil {
		d.Weight = p.Weight
	}
}

// patched are the values of d with the patch on one replica.
func (p *ReplicaPatch) patched(d topology.Document, registry, region string) topology.Values {
	d.Registries = slices.Clone(d.Registries)
	for i := range d.Registries {
		if r := &d.Registries[i]; r.Name == registry {
			r.Replicas = slices.Clone(r.Replicas)
			for n := range r.Replicas {
				if r.Replicas[n].Region == region {
					p.patch(&r.Replicas[n])
				}
			}
		}
	}
	return d.Values()
}

func set[T any](into *T, value *T) {
	if value != nil {
		*into = *value
	}
}

func (s *server) deleteReplica(r *http.Request) (any, error) {
	registry, replica, err := s.findReplica(r)
	if err != nil {
		return nil, err
	}
	asked := topology.Request{Time: time.Now().UTC(), Force: forced(r), Actor: r.RemoteAddr}
	incomplete := s.incomplete(registry.Name, replica.Region)
	if incomplete && !asked.Force && !replica.Home {
		return nil, refuseIncomplete(registry.Name, replica.Region)
	}
	before, err := s.declared(r)
	if err != nil {
		return nil, err
	}
	drained := before.Values()
	drained[topology.ReplicaPrefix(registry.Name, replica.Region)+"routing"] = RoutingDisabled
	if !replica.Home {
		if err := s.strand(before.Values(), drained, "enable routing of another replica first, or give it a weight"); err != nil {
			return nil, err
		}
	}
	if err := s.Editor.DeleteReplica(r.Context(), registry.Name, replica.Region, asked); err != nil {
		return nil, err
	}
	if incomplete {
		if err := s.Editor.RemoveReplica(r.Context(), registry.Name, replica.Region); err != nil {
			return nil, err
		}
	}
	_, after, err := s.findReplica(r)
	if IsCode(err, CodeNotFound) { // incomplete, or asked again when it was about to leave: it has left
		replica.Status, replica.Routing = topology.Deleting, RoutingDisabled
		return replica, nil
	}
	return after, err
}

// incomplete reports whether a replica is declared, but not whole, and so unknown to replicators, who would finish its deletion.
func (s *server) incomplete(registry, region string) bool {
	v := s.View()
	if v.Snapshot == nil {
		return false
	}
	served := v.Snapshot.Registry(registry)
	return served != nil && slices.Contains(served.Incomplete, region)
}

func refuseIncomplete(registry, region string) error {
	return failf(CodeRefused, "replica %s/%s is incomplete, so that nobody can look whether pushes there are elsewhere: complete it, or take it out with portolan replica delete --force", registry, region)
}

// ask leaves a request that needs nothing more.
func (s *server) ask(verb string) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		registry, replica, err := s.findReplica(r)
		if err != nil {
			return nil, err
		}
		if registry.Document.Policy.Replication == "disabled" {
			return nil, failf(CodeRefused, "replication of registry %s is disabled: there is nothing to %s", registry.Name, verb)
		}
		if err := s.request(r, registry.Name, replica.Region, verb); err != nil {
			return nil, err
		}
		return s.replica(r)
	}
}

// request leaves a request for the replicator that works for the replica, wherever that runs. One that stands there already
// is left as it is.
func (s *server) request(r *http.Request, registry, region, verb string) error {
	value, err := json.Marshal(topology.Request{Time: time.Now().UTC(), Actor: r.RemoteAddr})
	if err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	_, err = s.Store.Commit(r.Context(), store.PutIf(topology.RequestKey(registry, region, verb), string(value), 0))
	if err != nil && !errors.Is(err, store.ErrConflict) {
		return fmt.Errorf("asking for %s of replica %s/%s: %w", verb, registry, region, err)
	}
	return nil
}
