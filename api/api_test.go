package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/router"
	"portolan/router/geo"
	"portolan/store"
	"portolan/store/bolt"
	"portolan/topology"
)

const document = `registries:
  - name: contoso
    home: westus
    names: [registry.contoso.com]
    replicas:
      - {region: westus, endpoint: "http://127.0.1.1:5000", addresses: [127.0.1.1]}
      - {region: westeurope, endpoint: "http://127.0.2.1:5000", addresses: [127.0.2.1]}
`

// rig is a server over a real store, with a view that is made anew for each request.
type rig struct {
	logs *observer.ObservedLogs // of the editor
	*httptest.Server
	client     *Client
	store      store.Store
	editor     *topology.Editor
	held       []topology.Pending
	replicator *fakeReplicator

	charting sync.Mutex
	charts   *router.Charts
}

type fakeReplicator struct {
	inspection   Inspection
	unreplicated []Unreplicated
	err          error
}

func (f *fakeReplicator) Unreplicated(context.Context, string) ([]Unreplicated, error) {
	return f.unreplicated, f.err
}

func (f *fakeReplicator) Conflicts(_ context.Context, registry string, limit int) ([]Conflict, error) {
	return []Conflict{{Repository: registry, KeptAs: fmt.Sprintf("1.conflict-westus-%d", limit)}}, f.err
}

func (f *fakeReplicator) Inspect(context.Context, string, string, string) (Inspection, error) {
	return f.inspection, f.err
}

func (f *fakeReplicator) Pending(registry, region string, limit int) []PendingItem {
	return []PendingItem{{Image: registry + "/app:1", Error: region}}
}

func newRig(t *testing.T, change func(*Options)) *rig {
	t.Helper()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	s := bolt.New(db)
	r := &rig{store: s, replicator: &fakeReplicator{}}
	core, logs := observer.New(zap.InfoLevel)
	r.logs = logs
	r.editor = topology.NewEditor(s, topology.EditorOptions{Logger: zap.New(core), Reserved: []string{"whoami", "ns1"}, Pending: func() []topology.Pending { return r.held }})
	d, err := topology.ParseYAML("t.yaml", []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.editor.Apply(t.Context(), *d, false, false); err != nil {
		t.Fatal(err)
	}
	for _, p := range d.Registries[0].Replicas {
		r.report(t, p.Region, topology.Replication{Status: topology.Ready, Endpoint: p.Endpoint})
	}
	o := Options{
		View: func() *View { return r.view(t) }, Status: func() Status { return Status{Version: "1", Ready: true} },
		Editor: r.editor, Reserved: []string{"whoami", "ns1"}, Store: s, Replicator: r.replicator,
		EventsToken: func(registry, region string) EventsToken {
			return EventsToken{URL: "https://e/" + registry, Token: region}
		},
		Zone: "geo.example.net.", TTLMin: 5, TTLMax: 60, Metrics: http.NotFoundHandler(), Log: zap.NewNop(),
	}
	if change != nil {
		change(&o)
	}
	r.Server = httptest.NewServer(Handler(o))
	t.Cleanup(r.Server.Close)
	if r.client, err = NewClient(r.URL, o.Token); err != nil {
		t.Fatal(err)
	}
	return r
}

// report writes what a replicator says of a replica of contoso.
func (r *rig) report(t *testing.T, region string, says topology.Replication) {
	t.Helper()
	text, err := json.Marshal(says)
	if err == nil {
		_, err = r.store.Commit(t.Context(), store.Put(topology.ReplicationKey("contoso", region), string(text)))
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (r *rig) view(t *testing.T) *View {
	tree, err := r.store.List(context.Background(), "")
	if err != nil {
		t.Error(err)
		return &View{}
	}
	s, _ := topology.Parse(topology.ValuesOf(tree), nil, nil)
	state := topology.ParseState(tree)
	ramps, err := r.editor.Ramps(context.Background())
	if err != nil {
		t.Error(err)
	}
	v := &View{Snapshot: s, Ramps: ramps, Held: r.held, Conditions: router.Conditions{}, Requests: state.Requests, Replication: state.Replications}
	for _, registry := range s.Registries {
		for _, p := range registry.Replicas {
			k := router.ReplicaKey{Registry: registry.Name, Region: p.Region}
			v.Conditions[k] = router.ReplicaCondition{Health: router.Healthy, Settled: true, Seeded: true, Held: state.Replications[k].Held != ""}
		}
	}
	r.charting.Lock()
	defer r.charting.Unlock()
	charts, err := router.Chart(context.Background(), s, router.Sources{Places: geo.Builtin()}, r.charts)
	if err != nil {
		t.Error(err)
		return v
	}
	r.charts = charts // the next view is likely to need no other ones
	v.Router = router.New(s, charts).With(v.Conditions)
	return v
}

// ask sends a raw request, for what Client never sends.
func (r *rig) ask(t *testing.T, method, path, body string, change func(*http.Request)) (int, Error) {
	t.Helper()
	q, err := http.NewRequestWithContext(t.Context(), method, r.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Content-Type", "application/json")
	if change != nil {
		change(q)
	}
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	defer a.Body.Close()
	text, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	var e Failure
	if a.StatusCode != http.StatusOK {
		if err := json.Unmarshal(text, &e); err != nil || e.Error == nil {
			t.Fatalf("%d %q is not an error of the API: %v", a.StatusCode, text, err)
		}
		return a.StatusCode, *e.Error
	}
	return a.StatusCode, Error{}
}

func TestGuards(t *testing.T) {
	t.Parallel()
	open := newRig(t, func(o *Options) { o.Names = []string{"portolan.example.net"} })
	locked := newRig(t, func(o *Options) { o.Token = "0123456789abcdef" })
	host := func(h string) func(*http.Request) { return func(q *http.Request) { q.Host = h } }
	header := func(name, value string) func(*http.Request) {
		return func(q *http.Request) { q.Header.Set(name, value) }
	}
	for name, c := range map[string]struct {
		rig    *rig
		method string
		path   string
		body   string
		change func(*http.Request)
		status int
		code   Code
	}{
		"by address":              {open, "GET", "/v1/status", "", nil, 200, ""},
		"by localhost":            {open, "GET", "/v1/status", "", host("localhost:1"), 200, ""},
		"by IPv6":                 {open, "GET", "/v1/status", "", host("[::1]:8420"), 200, ""},
		"by its name":             {open, "GET", "/v1/status", "", host("Portolan.example.net.:8420"), 200, ""},
		"rebinding":               {open, "GET", "/v1/status", "", host("evil.example:8420"), 403, CodeForbidden},
		"rebinding like a suffix": {open, "GET", "/v1/status", "", host("localhost.evil.example"), 403, CodeForbidden},
		"form":                    {open, "POST", "/v1/registries/contoso/confirm", "", header("Content-Type", "text/plain"), 415, CodeMediaType},
		"no type":                 {open, "DELETE", "/v1/registries/contoso", "", header("Content-Type", ""), 415, CodeMediaType},
		"other origin":            {open, "DELETE", "/v1/registries/contoso", "", header("Origin", "https://evil.example"), 403, CodeForbidden},
		"other site":              {open, "DELETE", "/v1/registries/contoso", "", header("Sec-Fetch-Site", "cross-site"), 403, CodeForbidden},
		"no token":                {locked, "GET", "/v1/status", "", nil, 401, CodeUnauthorized},
		"wrong token":             {locked, "GET", "/v1/status", "", header("Authorization", "Bearer 0123456789abcdee"), 401, CodeUnauthorized},
		"other scheme":            {locked, "GET", "/v1/status", "", header("Authorization", "0123456789abcdef"), 401, CodeUnauthorized},
		"token":                   {locked, "GET", "/v1/status", "", header("Authorization", "Bearer 0123456789abcdef"), 200, ""},
		"metrics without token":   {locked, "GET", "/metrics", "", nil, 401, CodeUnauthorized},
		"no such path":            {open, "GET", "/v1/nothing", "", nil, 404, CodeNotFound},
		"no path":                 {locked, "GET", "/", "", nil, 404, CodeNotFound},
		"not of the API":          {open, "POST", "/metrics/x", "", header("Content-Type", ""), 404, CodeNotFound},
		"the folder":              {open, "GET", "/v1", "", nil, 404, CodeNotFound},
		"another method":          {open, "POST", "/healthz", "", nil, 404, CodeNotFound},
		"misspelt field":          {open, "PATCH", "/v1/registries/contoso/replicas/westus", `{"wieght": 3}`, nil, 400, CodeInvalid},
		"not JSON":                {open, "PATCH", "/v1/registries/contoso/replicas/westus", `{`, nil, 400, CodeInvalid},
		"garbage after the body":  {open, "PATCH", "/v1/registries/contoso/replicas/westus", `{} }`, nil, 400, CodeInvalid},
		"two bodies":              {open, "PATCH", "/v1/registries/contoso/replicas/westus", `{} {}`, nil, 400, CodeInvalid},
		"too large":               {open, "POST", "/v1/diff", `{"registries": [{"name": "` + strings.Repeat("x", maxBody) + `"}]}`, nil, 413, CodeTooLarge},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			status, e := c.rig.ask(t, c.method, c.path, c.body, c.change)
			if status != c.status || e.Code != c.code {
				t.Errorf("%d %s %q, want %d %s", status, e.Code, e.Message, c.status, c.code)
			}
		})
	}
}

func TestErrorsHaveTheirCode(t *testing.T) {
	t.Parallel()
	for err, code := range map[error]Code{
		topology.ErrNotFound: CodeNotFound, topology.ErrExists: CodeExists, topology.ErrRefused: CodeRefused, topology.ErrDeleting: CodeDeleting, store.ErrConflict: CodeConflict,
		store.ErrUnavailable: CodeUnavailable, context.DeadlineExceeded: CodeUnavailable, errors.New("x"): CodeInternal,
		&topology.InvalidError{Faults: []topology.Fault{{Path: "a"}}}: CodeInvalid,
	} {
		if e := ErrorOf(fmt.Errorf("doing: %w", err), CodeInternal); e.Code != code || statusOf[e.Code] == 0 {
			t.Errorf("%v became %v", err, e.Code)
		}
	}
}

func TestRegistries(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	home := topology.ReplicaDocument{Region: "eastus", Endpoint: "http://127.0.3.1:5000", Addresses: []string{"127.0.3.1"}}
	made, err := r.client.CreateRegistry(ctx, topology.RegistryDocument{Name: "fabrikam", Home: "eastus", Replicas: []topology.ReplicaDocument{home}})
	if err != nil || made.FQDN != "fabrikam.geo.example.net" || len(made.Replicas) != 1 || !made.Replicas[0].Home || made.Replicas[0].Weight != 100 {
		t.Fatalf("%+v, %v", made, err)
	}
	_, err = r.client.CreateRegistry(ctx, topology.RegistryDocument{Name: "fabrikam", Home: "eastus", Replicas: []topology.ReplicaDocument{home}})
	if !IsCode(err, CodeExists) {
		t.Errorf("created twice: %v", err)
	}
	_, err = r.client.CreateRegistry(ctx, topology.RegistryDocument{Name: "whoami", Home: "eastus", Replicas: []topology.ReplicaDocument{home}})
	if !IsCode(err, CodeInvalid) || !strings.Contains(err.Error(), "whoami") {
		t.Errorf("a reserved name: %v", err)
	}
	list, err := r.client.Registries(ctx)
	if err != nil || len(list) != 2 {
		t.Errorf("%+v, %v", list, err)
	}
	r.replicator.unreplicated = []Unreplicated{{Region: "eastus", Reason: "1 push is in no other replica yet: fabrikam/app:1"}}
	if found, err := r.client.Unreplicated(ctx, "fabrikam"); err != nil || !slices.Equal(found, r.replicator.unreplicated) {
		t.Errorf("%+v, %v", found, err)
	}
	if err := r.client.DeleteRegistry(ctx, "fabrikam", false); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "eastus: 1 push is in no other") {
		t.Errorf("with pushes in one region alone: %v", err)
	}
	r.replicator.err = errors.New("the ledger is away")
	if err := r.client.DeleteRegistry(ctx, "fabrikam", false); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "cannot be told: the ledger is away; --force") {
		t.Errorf("with the ledger away: %v", err)
	}
	if err := r.client.DeleteRegistry(ctx, "fabrikam", true); err != nil {
		t.Error(err)
	}
	if _, err := r.client.Registry(ctx, "fabrikam"); !IsCode(err, CodeNotFound) || !strings.Contains(err.Error(), "there is contoso") {
		t.Errorf("after the delete: %v", err)
	}
}

func TestReplicas(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	ninety, hundredOne := 90, 101
	applied, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Weight: &ninety}, false)
	if err != nil || len(applied.Changes) != 1 || applied.Changes[0].New != "90" {
		t.Fatalf("%+v, %v", applied, err)
	}
	var shares []string
	for _, share := range applied.Shares[0].Splits[1].Shares {
		shares = append(shares, fmt.Sprintf("%s %.1f", share.Region, share.Percent))
	}
	if !slices.Equal(shares, []string{"westus 90.0", "westeurope 10.0"}) {
		t.Errorf("shares %v", shares)
	}
	_, err = r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Weight: &hundredOne}, false)
	var e *Error
	if !errors.As(err, &e) || e.Code != CodeInvalid || len(e.Details) != 1 || e.Details[0].Path != "weight" {
		t.Errorf("a weight of 101: %#v", err)
	}
	if _, err := r.client.DeleteReplica(ctx, "contoso", "westus", true); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "home region") {
		t.Errorf("deleting the home: %v", err)
	}
	gone, err := r.client.DeleteReplica(ctx, "contoso", "westeurope", false)
	if err != nil || gone.Routing != RoutingDisabled || gone.Status != topology.Deleting || !slices.Equal(gone.Requests, []string{topology.RequestDelete}) {
		t.Errorf("%+v, %v", gone, err)
	}
	on := RoutingEnabled
	if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Routing: &on}, false); !IsCode(err, CodeDeleting) {
		t.Errorf("enabling what is being deleted: %v", err)
	}
	if _, err := r.store.Commit(ctx, store.Put("registries/contoso/replicas/westeurope/routing", RoutingEnabled)); err != nil {
		t.Fatal(err)
	}
	if p, err := r.client.Replica(ctx, "contoso", "westeurope"); err != nil || p.Routing != RoutingDisabled {
		t.Errorf("enabled by a raw edit: %+v, %v", p, err)
	}
	for range 2 { // asking twice is asking once
		if p, err := r.client.Resync(ctx, "contoso", "westus"); err != nil || !slices.Contains(p.Requests, topology.RequestResync) || p.Status == topology.Ready {
			t.Errorf("%+v, %v", p, err)
		}
	}
	if _, err := r.client.Replica(ctx, "contoso", "westss"); !IsCode(err, CodeNotFound) {
		t.Errorf("%v", err)
	}
	if token, err := r.client.EventsToken(ctx, "contoso", "westus"); err != nil || token.Token != "westus" {
		t.Errorf("%+v, %v", token, err)
	}
	if kept, err := r.client.Conflicts(ctx, "contoso", 7); err != nil || len(kept) != 1 || kept[0].Repository != "contoso" || kept[0].KeptAs != "1.conflict-westus-7" {
		t.Errorf("%+v, %v", kept, err)
	}
	if _, err := r.client.Conflicts(ctx, "contoso", 0); !IsCode(err, CodeInvalid) {
		t.Errorf("a limit of 0: %v", err)
	}
	if items, err := r.client.Pending(ctx, "contoso", "westus", 5); err != nil || len(items) != 1 || items[0].Image != "contoso/app:1" {
		t.Errorf("%+v, %v", items, err)
	}
	status, _ := r.ask(t, "GET", "/v1/registries/contoso/replicas/westus/pending?limit=x", "", nil)
	if status != 400 {
		t.Errorf("limit=x: %d", status)
	}
}

// What somebody asked for is in the answer, and in the next one, also while the view does not have it yet.
func TestAnswersHaveWhatWasAsked(t *testing.T) {
	t.Parallel()
	var old *View
	r := newRig(t, func(o *Options) {
		old = o.View()
		o.View = func() *View { return old }
	})
	ctx := t.Context()
	if p, err := r.client.Replica(ctx, "contoso", "westeurope"); err != nil || p.Status != topology.Ready || p.Reason != "" {
		t.Fatalf("%+v, %v", p, err)
	}
	for _, ask := range []func() (Replica, error){
		func() (Replica, error) { return r.client.Resync(ctx, "contoso", "westeurope") },
		func() (Replica, error) { return r.client.Replica(ctx, "contoso", "westeurope") },
	} {
		if p, err := ask(); err != nil || p.Status != topology.Creating || !slices.Equal(p.Requests, []string{topology.RequestResync}) {
			t.Errorf("a resync was asked for: %+v, %v", p, err)
		}
	}
	r.report(t, "westeurope", topology.Replication{Status: topology.Syncing, Reason: "being seeded", Endpoint: "http://127.0.2.1:5000"})
	if list, err := r.client.Replicas(ctx, "contoso"); err != nil || list[0].Status != topology.Syncing {
		t.Errorf("a replicator took it up: %+v, %v", list, err)
	}
	r.report(t, "westeurope", topology.Replication{Status: topology.Creating, Phase: topology.PhasePlanned, Reason: "look at the plan", Endpoint: "http://127.0.2.1:5000"})
	if p, err := r.client.Replica(ctx, "contoso", "westeurope"); err != nil || p.Reason != "look at the plan" {
		t.Errorf("a plan waits: %+v, %v", p, err)
	}
	if p, err := r.client.Accept(ctx, "contoso", "westeurope"); err != nil || p.Status != topology.Creating || !strings.HasPrefix(p.Reason, "it was accepted") {
		t.Errorf("it was accepted: %+v, %v", p, err)
	}
	gone, err := r.client.DeleteReplica(ctx, "contoso", "westeurope", false)
	if err != nil || gone.Status != topology.Deleting || gone.Routing != RoutingDisabled || !strings.HasPrefix(gone.Reason, "no more clients") {
		t.Errorf("a deletion was asked for: %+v, %v", gone, err)
	}
	made, err := r.client.CreateReplica(ctx, "contoso", topology.ReplicaDocument{Region: "eastus", Endpoint: "http://127.0.3.1:5000", Addresses: []string{"127.0.3.1"}})
	if err != nil || made.Status != topology.Creating || !strings.HasPrefix(made.Reason, "not served yet: this server is about to take up") {
		t.Errorf("a replica was created: %+v, %v", made, err)
	}
}

// quick removes a replica while its deletion is being asked for, as a replicator does whose drain was over already.
type quick struct{ *topology.Editor }

func (q quick) DeleteReplica(ctx context.Context, registry, region string, r topology.Request) error {
	return errors.Join(q.Editor.DeleteReplica(ctx, registry, region, r), q.RemoveReplica(ctx, registry, region))
}

func TestDeletionThatIsDoneAtOnce(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Editor = quick{o.Editor.(*topology.Editor)} })
	if p, err := r.client.DeleteReplica(t.Context(), "contoso", "westeurope", true); err != nil || p.Status != topology.Deleting {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err := r.client.Replica(t.Context(), "contoso", "westeurope"); !IsCode(err, CodeNotFound) {
		t.Errorf("it is still there: %v", err)
	}
}

// No replicator works for a replica that is incomplete, so none would end its deletion.
func TestDeletionOfWhatIsIncomplete(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	if _, err := r.store.Commit(ctx, store.Put("registries/contoso/replicas/eastus/weight", "10")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.DeleteReplica(ctx, "contoso", "eastus", false); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("without force: %v", err)
	}
	if _, err := r.client.DeleteReplica(ctx, "contoso", "eastus", true); err != nil {
		t.Error(err)
	}
	if tree, err := r.store.List(ctx, "registries/contoso/replicas/eastus/"); err != nil || len(tree.Entries) > 0 {
		t.Errorf("it is still there: %+v, %v", tree, err)
	}
}

// What a replica cannot give is said, although it is Ready.
func TestUnreadableIsSaid(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	r.report(t, "westeurope", topology.Replication{Status: topology.Ready, Endpoint: "http://127.0.2.1:5000", NotReplicable: 1, Unreadable: 2})
	if p, err := r.client.Replica(t.Context(), "contoso", "westeurope"); err != nil || p.Reason != "1 not replicable; 2 unreadable there, whose pushes go nowhere" {
		t.Errorf("%q, %v", p.Reason, err)
	}
}

// Of a replica that the guard holds it is said what to do, and what becomes of its clients meanwhile.
func TestHeldIsSaid(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	r.report(t, "westeurope", topology.Replication{Status: topology.Degraded, Held: "all is gone: resync", Reason: "all is gone: resync", Endpoint: "http://127.0.2.1:5000"})
	if p, err := r.client.Replica(t.Context(), "contoso", "westeurope"); err != nil || p.Reason != "all is gone: resync; clients are sent elsewhere until then" {
		t.Errorf("%q, %v", p.Reason, err)
	}
}

// What is no registry is refused when a replica is created there, and when one is moved there.
func TestKnock(t *testing.T) {
	t.Parallel()
	const website = "http://127.0.3.1:80"
	r := newRig(t, func(o *Options) {
		o.Knock = func(_ context.Context, d topology.ReplicaDocument) error {
			if d.Endpoint == website && len(d.Addresses) == 1 {
				return errors.New("it is not a registry")
			}
			return nil
		}
	})
	_, create := r.client.CreateReplica(t.Context(), "contoso", topology.ReplicaDocument{Region: "eastus", Endpoint: website, Addresses: []string{"127.0.3.1"}})
	endpoint := website
	_, update := r.client.UpdateReplica(t.Context(), "contoso", "westus", ReplicaPatch{Endpoint: &endpoint}, false)
	for what, err := range map[string]error{"created": create, "changed": update} {
		if !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "is not "+what+": it is not a registry") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if d, err := r.client.Export(t.Context()); err != nil || len(d.Registries[0].Replicas) != 2 || d.Registries[0].Replicas[1].Endpoint == website {
		t.Errorf("%+v, %v", d, err)
	}
}

// An applied file is held to the same for each endpoint that it brings or changes, and to nothing for those that stay.
func TestApplyKnocks(t *testing.T) {
	t.Parallel()
	const website = "http://127.0.3.1:80"
	var mu sync.Mutex
	var asked []string
	r := newRig(t, func(o *Options) {
		o.Knock = func(_ context.Context, d topology.ReplicaDocument) error {
			mu.Lock()
			asked = append(asked, d.Region)
			mu.Unlock()
			if d.Endpoint == website {
				return errors.New("it is not a registry")
			}
			return nil
		}
	})
	ctx := t.Context()
	d, err := r.client.Export(ctx)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(d.Registries[0].Replicas, func(p topology.ReplicaDocument) bool { return p.Region == "westeurope" })
	d.Registries[0].Replicas[i].Endpoint = website
	d.Registries[0].Replicas = append(d.Registries[0].Replicas, topology.ReplicaDocument{Region: "eastus", Endpoint: "http://127.0.4.1:5000", Addresses: []string{"127.0.4.1"}})
	const fault = "replica contoso/westeurope is not to be applied: it is not a registry; "
	if dry, err := r.client.Apply(ctx, Apply{Document: d, DryRun: true}); err != nil || dry.Refusal != fault+"without --force it would be refused" {
		t.Errorf("a dry run: %q, %v", dry.Refusal, err)
	}
	if _, err := r.client.Apply(ctx, Apply{Document: d}); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), fault+"--force applies") {
		t.Errorf("without force: %v", err)
	}
	slices.Sort(asked)
	if got := strings.Join(asked, " "); got != "eastus eastus westeurope westeurope" {
		t.Errorf("asked at %s", got)
	}
	if dry, err := r.client.Apply(ctx, Apply{Document: d, DryRun: true, Force: true}); err != nil || dry.Refusal != "" {
		t.Errorf("a dry run with force: %q, %v", dry.Refusal, err)
	}
	if _, err := r.client.Apply(ctx, Apply{Document: d, Force: true}); err != nil {
		t.Errorf("with force: %v", err)
	}
}

func TestApply(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	before, err := r.client.Export(ctx)
	if err != nil {
		t.Fatal(err)
	}
	d, err := topology.ParseYAML("t.yaml", []byte(strings.Replace(document, "[127.0.2.1]}", "[127.0.2.1], weight: 40}", 1)))
	if err != nil {
		t.Fatal(err)
	}
	dry, err := r.client.Apply(ctx, Apply{Document: *d, DryRun: true})
	if err != nil || len(dry.Changes) != 1 || len(dry.Shares) != 1 {
		t.Fatalf("%+v, %v", dry, err)
	}
	if now, err := r.client.Export(ctx); err != nil || len(topology.Diff(before, now)) != 0 {
		t.Errorf("a dry run changed %v, %v", topology.Diff(before, now), err)
	}
	done, err := r.client.Apply(ctx, Apply{Document: *d})
	if err != nil || fmt.Sprint(done) != fmt.Sprint(dry) {
		t.Errorf("dry %v, then %v, %v", dry, done, err)
	}
	if changes, err := r.client.Diff(ctx, *d); err != nil || len(changes) != 0 {
		t.Errorf("%v, %v", changes, err)
	}
	d.Registries[0].Replicas[1].Endpoint = "not a URL"
	var e *Error
	if _, err := r.client.Apply(ctx, Apply{Document: *d}); !errors.As(err, &e) || e.Code != CodeInvalid || e.Details[0].Path != "registries[0].replicas[1].endpoint" {
		t.Errorf("%v", err)
	}
}

// Whoever sends clients away is told until when some may still come.
func TestDrains(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	off, on, none, some, seventy := RoutingDisabled, RoutingEnabled, 0, 50, 70
	for name, c := range map[string]struct {
		had, patch ReplicaPatch
		drains     bool
	}{
		"routing disabled":                 {ReplicaPatch{}, ReplicaPatch{Routing: &off}, true},
		"a weight of 0":                    {ReplicaPatch{}, ReplicaPatch{Weight: &none}, true},
		"another weight":                   {ReplicaPatch{}, ReplicaPatch{Weight: &seventy}, false},
		"disabled after that":              {ReplicaPatch{Weight: &none}, ReplicaPatch{Routing: &off}, false},
		"a weight that ramps":              {ReplicaPatch{Weight: &none, Over: "1h"}, ReplicaPatch{Routing: &off}, true},
		"a weight of one that is disabled": {ReplicaPatch{Routing: &off}, ReplicaPatch{Weight: &none}, false},
	} {
		for _, first := range []ReplicaPatch{{Routing: &on, Weight: &some}, c.had} {
			if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", first, false); err != nil {
				t.Fatal(err)
			}
		}
		before := time.Now()
		applied, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", c.patch, false)
		if err != nil {
			t.Fatal(err)
		}
		if !c.drains {
			if len(applied.Drains) != 0 {
				t.Errorf("%s: %+v", name, applied.Drains)
			}
			continue
		}
		if len(applied.Drains) != 1 || applied.Drains[0].Replica != "contoso/westeurope" || applied.Drains[0].Until.Before(before.Add(time.Minute)) ||
			applied.Drains[0].Until.After(time.Now().Add(time.Minute+topology.Spreading)) {
			t.Errorf("%s: %+v", name, applied.Drains)
		}
	}
	if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Routing: &on, Weight: &some}, false); err != nil {
		t.Fatal(err)
	}
	d, err := topology.ParseYAML("t.yaml", []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	d.Registries[0].Replicas = slices.DeleteFunc(d.Registries[0].Replicas, func(p topology.ReplicaDocument) bool { return p.Region == "westeurope" })
	for _, dry := range []bool{true, false} {
		applied, err := r.client.Apply(ctx, Apply{Document: *d, Prune: true, DryRun: dry})
		if err != nil || (len(applied.Drains) == 1) == dry {
			t.Errorf("dry %t: %+v, %v", dry, applied, err)
		}
	}
}

// The last replica that clients may be sent to is not taken from them by an edit, unless that is what is wanted.
func TestStrand(t *testing.T) {
	t.Parallel()
	off, on, none, most := RoutingDisabled, RoutingEnabled, 0, 100
	refused := func(t *testing.T, what string, err error, says string) {
		t.Helper()
		if !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "clients of registry contoso would get no address: ") || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for name, last := range map[string]ReplicaPatch{"routing": {Routing: &off}, "weight": {Weight: &none}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, nil)
			ctx := t.Context()
			if _, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Routing: &off}, false); err != nil {
				t.Fatal(err)
			}
			_, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", last, false)
			refused(t, "an update", err, "--force")
			_, err = r.client.DeleteReplica(ctx, "contoso", "westeurope", true)
			refused(t, "a delete", err, "another replica first")
			d, err := r.client.Export(ctx)
			if err != nil {
				t.Fatal(err)
			}
			last.patch(&d.Registries[0].Replicas[0])
			_, err = r.client.Apply(ctx, Apply{Document: d})
			refused(t, "an apply", err, "--force")
			pruned := d
			pruned.Registries = slices.Clone(d.Registries)
			pruned.Registries[0].Replicas = d.Registries[0].Replicas[1:]
			_, err = r.client.Apply(ctx, Apply{Document: pruned, Prune: true})
			refused(t, "a pruning apply", err, "--force")
			if tried, err := r.client.Apply(ctx, Apply{Document: d, DryRun: true}); err != nil || !strings.Contains(tried.Refusal, "--force") {
				t.Errorf("a dry run: %+v, %v", tried, err)
			}
			if _, err := r.client.Apply(ctx, Apply{Document: d, Force: true}); err != nil {
				t.Errorf("an apply by force: %v", err)
			}
			// Where there is nothing left to lose, nothing is refused.
			if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Weight: &none, Routing: &off}, false); err != nil {
				t.Error(err)
			}
			if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Weight: &most, Routing: &on}, false); err != nil {
				t.Error(err)
			}
			if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", last, true); err != nil {
				t.Errorf("an update by force: %v", err)
			}
		})
	}
}

// Clients behind a fence have its replicas alone, so what is enough for all others may leave them without an address.
func TestStrandBehindFence(t *testing.T) {
	t.Parallel()
	off, none, enabled := RoutingDisabled, 0, "enabled"
	fenced := func(t *testing.T, change func(*Options)) (*rig, topology.Document) {
		t.Helper()
		r := newRig(t, change)
		if _, err := r.store.Commit(t.Context(), store.Put("registries/contoso/fences/continent/AF", "westeurope")); err != nil {
			t.Fatal(err)
		}
		d, err := r.client.Export(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return r, d
	}
	refused := func(t *testing.T, what string, err error, fence string) {
		t.Helper()
		if !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "clients of registry contoso behind the fence "+fence+" would get no address: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	t.Run("edits of a replica", func(t *testing.T) {
		t.Parallel()
		r, d := fenced(t, nil)
		ctx := t.Context()
		_, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Routing: &off}, false)
		refused(t, "an update", err, "continent/AF")
		d.Registries[0].Replicas[0].Weight = &none
		_, err = r.client.Apply(ctx, Apply{Document: d})
		refused(t, "an apply", err, "continent/AF")
		if tried, err := r.client.Apply(ctx, Apply{Document: d, DryRun: true}); err != nil || !strings.Contains(tried.Refusal, "fence continent/AF") {
			t.Errorf("a dry run: %+v, %v", tried, err)
		}
		if _, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Routing: &off}, false); err != nil {
			t.Errorf("of a replica that the fence does not name: %v", err)
		}
		if _, err := r.client.UpdateReplica(ctx, "contoso", "westus", ReplicaPatch{Routing: new(string)}, false); err != nil {
			t.Error(err)
		}
		if _, err := r.client.Apply(ctx, Apply{Document: d, Force: true}); err != nil {
			t.Errorf("by force: %v", err)
		}
		if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Routing: &off}, false); err != nil {
			t.Errorf("where there is nothing left to lose: %v", err)
		}
	})
	t.Run("edits of fences", func(t *testing.T) {
		t.Parallel()
		r, d := fenced(t, nil)
		ctx := t.Context()
		if _, err := r.client.UpdateReplica(ctx, "contoso", "westeurope", ReplicaPatch{Routing: &off}, true); err != nil {
			t.Fatal(err)
		}
		d.Registries[0].Replicas[0].Routing = off
		d.Registries[0].Fences.Country = map[string][]string{"DE": {"westeurope"}}
		_, err := r.client.Apply(ctx, Apply{Document: d})
		refused(t, "a new fence", err, "country/DE")
	})
	t.Run("an edit of the registry", func(t *testing.T) {
		t.Parallel()
		r, _ := fenced(t, unseeded)
		if _, err := r.store.Commit(t.Context(), store.Put("registries/contoso/policy/replication", "disabled")); err != nil {
			t.Fatal(err)
		}
		_, err := r.client.UpdateRegistry(t.Context(), "contoso", RegistryPatch{Replication: &enabled}, false)
		refused(t, "replication, of a replica that is not seeded", err, "continent/AF")
	})
}

// Whoever deletes a replica is told of the orders and fences that it is in: they lose it.
func TestRulesOfAReplica(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	ctx := t.Context()
	for match, regions := range map[string]string{"orders/prefix/192.0.2.0_24": "westeurope", "orders/country/BR": "westus", "fences/continent/EU": "westus,westeurope"} {
		if _, err := r.store.Commit(ctx, store.Put("registries/contoso/"+match, regions)); err != nil {
			t.Fatal(err)
		}
	}
	p, err := r.client.DeleteReplica(ctx, "contoso", "westeurope", false)
	if err != nil || !slices.Equal(p.Rules, []string{"fences/continent/EU", "orders/prefix/192.0.2.0_24"}) {
		t.Errorf("%v, %v", p.Rules, err)
	}
}

// One that is not whole cannot be pruned either: nobody would finish that.
func TestPruneIncomplete(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	if _, err := r.store.Commit(t.Context(), store.Put("registries/contoso/replicas/eastus/weight", "10")); err != nil {
		t.Fatal(err)
	}
	d, err := topology.ParseYAML("t.yaml", []byte(document))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Apply(t.Context(), Apply{Document: *d, Prune: true}); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "contoso/eastus is incomplete") {
		t.Error(err)
	}
}

func TestExplainIsTheViewsDecision(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	for _, c := range []struct {
		ecs, resolver string
		region        string
		code          Code
	}{
		{"141.20.0.0/24", "", "westeurope", ""},
		{"141.20.0.9", "", "westeurope", ""},
		{"", "141.20.0.9", "westeurope", ""},
		{"128.32.0.0/24", "141.20.0.9", "westus", ""},
		{"10.0.0.0/24", "141.20.0.9", "westeurope", ""},
		{"10.0.0.0/24", "", "westus", ""}, // nothing is known of the client: home
		{"", "", "", CodeInvalid},
		{"x", "", "", CodeInvalid},
		{"", "1.2.3", "", CodeInvalid},
	} {
		e, err := r.client.Explain(t.Context(), "contoso", c.ecs, c.resolver)
		if c.code != "" {
			if !IsCode(err, c.code) {
				t.Errorf("%+v: %v", c, err)
			}
			continue
		}
		if err != nil || e.Region != c.region || e.TTL != 60 {
			t.Errorf("%+v: %s, TTL %d, %v", c, e.Region, e.TTL, err)
		}
	}
}

func TestServersWithoutARole(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Zone, o.Replicator, o.EventsToken = "", nil, nil })
	ctx := t.Context()
	_, explain := r.client.Explain(ctx, "contoso", "141.20.0.0/24", "")
	_, inspect := r.client.Inspect(ctx, "contoso", "app", "1")
	_, pending := r.client.Pending(ctx, "contoso", "westus", 1)
	_, token := r.client.EventsToken(ctx, "contoso", "westus")
	for i, err := range []error{explain, inspect, pending, token} {
		if !IsCode(err, CodeRefused) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestConfirm(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	if err := r.client.Confirm(t.Context(), "contoso"); !IsCode(err, CodeRefused) {
		t.Errorf("nothing is held: %v", err)
	}
	if err := r.client.Confirm(t.Context(), "fabrikam"); !IsCode(err, CodeNotFound) {
		t.Errorf("no such registry: %v", err)
	}
	r.held = []topology.Pending{{Registry: "contoso", Missing: []string{"x"}, Remaining: []string{"westeurope", "westus"}}}
	if shown, err := r.client.Registry(t.Context(), "contoso"); err != nil || shown.Held == nil {
		t.Errorf("%+v, %v", shown.Held, err)
	}
	if err := r.client.Confirm(t.Context(), "contoso"); err != nil {
		t.Error(err)
	}
	if e, err := r.store.Get(t.Context(), topology.ConfirmedKey("contoso")); err != nil || e.Value != "westeurope,westus" {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestPanicIsNotShown(t *testing.T) {
	t.Parallel()
	r := newRig(t, func(o *Options) { o.Status = func() Status { panic("secret") } })
	status, e := r.ask(t, "GET", "/v1/status", "", nil)
	if status != 500 || strings.Contains(e.Message, "secret") {
		t.Errorf("%d %s", status, e.Message)
	}
}

func TestClientSaysWhatToDo(t *testing.T) {
	t.Parallel()
	if _, err := NewClient("127.0.0.1:8420", ""); err == nil {
		t.Error("an address without a scheme is taken")
	}
	s := httptest.NewServer(http.NotFoundHandler())
	c, err := NewClient(s.URL, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "is it one?") {
		t.Errorf("another server: %v", err)
	}
	s.Close()
	if _, err := c.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "is portolan serve running") {
		t.Errorf("no server: %v", err)
	}
}

// Whoever asks without the token hears whether the server is ready, or why it is not, and nothing of what operators are warned of.
func TestReadiness(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status Status
		code   int
		text   string
	}{
		{Status{Ready: true, Warnings: []string{"replica contoso/westus is old"}}, http.StatusOK, "ready\n"},
		{Status{Warnings: []string{"replica contoso/westus is old"}, NotReady: []string{"one", "two"}}, http.StatusServiceUnavailable, "not ready\none\ntwo\n"},
	} {
		w := httptest.NewRecorder()
		h := Handler(Options{Status: func() Status { return c.status }, Token: "0123456789abcdef"})
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/readyz", nil))
		if w.Code != c.code || w.Body.String() != c.text {
			t.Errorf("%d %q, want %d %q", w.Code, w.Body, c.code, c.text)
		}
	}
}

// newKept is a rig of which the view can be kept, whatever becomes of the store.
func newKept(t *testing.T) (r *rig, keep func(*View)) {
	t.Helper()
	var kept *View
	r = newRig(t, func(o *Options) {
		now := o.View
		o.View = func() *View {
			if kept == nil {
				return now()
			}
			return kept
		}
	})
	return r, func(v *View) { kept = v }
}

// empty deletes all keys below prefix.
func (r *rig) empty(t *testing.T, prefix string) {
	t.Helper()
	tree, err := r.store.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range tree.Entries {
		if _, err := r.store.Commit(t.Context(), store.Delete(e.Key)); err != nil {
			t.Fatal(err)
		}
	}
}

// A store that lost its keys is read again when there are some; what is served must not go that way by the creation of a registry.
func TestNothingIsCreatedWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	r, keep := newKept(t)
	away := *r.view(t)
	away.StoreDown = true
	keep(&away)
	r.empty(t, topology.RegistriesPrefix)
	d := away.Snapshot.Document().Registries[0]
	if _, err := r.client.CreateRegistry(t.Context(), d); !IsCode(err, CodeUnavailable) {
		t.Errorf("%v", err)
	}
	if tree, err := r.store.List(t.Context(), topology.RegistriesPrefix); err != nil || len(tree.Entries) > 0 {
		t.Errorf("it was written all the same: %v, %v", tree.Entries, err)
	}
}

// What is exported while the store is away, or while an edit is held, is what was declared before: to apply it changes nothing.
func TestExportIsAsDeclaredAlways(t *testing.T) {
	t.Parallel()
	r, keep := newKept(t)
	if _, err := r.store.Commit(t.Context(), store.Put("registries/contoso/replicas/westus/health/probe", "http"), store.Put("registries/contoso/replicas/westus/weight", "100")); err != nil {
		t.Fatal(err)
	}
	declared, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	away, held := *r.view(t), *r.view(t)
	away.StoreDown = true
	held.Held = []topology.Pending{{Registry: "contoso", Missing: []string{"westeurope", "westus"}, Remaining: []string{}, Home: true}}
	r.empty(t, topology.RegistriesPrefix+"contoso/replicas/")
	for name, v := range map[string]*View{"away": &away, "held": &held} {
		keep(v)
		if exported, err := r.client.Export(t.Context()); err != nil || !reflect.DeepEqual(exported, declared) {
			t.Errorf("%s: %+v, %v\nwant %+v", name, exported, err, declared)
		}
	}
}

// A document that is given to a store which has lost its keys is judged by what becomes of what is served, and that is told.
func TestApplyToALostStore(t *testing.T) {
	t.Parallel()
	r, keep := newKept(t)
	if _, err := r.store.Commit(t.Context(), store.Put(topology.ReplicaPrefix("contoso", "westeurope")+"weight", "0"), store.Put("registries/contoso/orders/country/DE", "westeurope")); err != nil {
		t.Fatal(err)
	}
	served, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lost := *r.view(t)
	lost.StoreDown, lost.StoreLost = true, true
	keep(&lost)
	r.empty(t, topology.RegistriesPrefix)
	less := topology.Document{Registries: slices.Clone(served.Registries)}
	d := &less.Registries[0]
	d.Orders, d.Replicas = topology.RulesDocument{}, slices.Clone(d.Replicas)
	for i := range d.Replicas {
		d.Replicas[i].Weight = nil
	}
	applied, err := r.client.Apply(t.Context(), Apply{Document: less, DryRun: true})
	var told []string
	for _, c := range applied.Changes {
		told = append(told, c.String())
	}
	if err != nil || len(told) != 2 || !strings.Contains(strings.Join(told, "\n"), "- registries/contoso/orders/country/DE") || !strings.Contains(strings.Join(told, "\n"), "westeurope/weight") {
		t.Errorf("%q, %v", told, err)
	}
	for _, split := range applied.Shares[0].Splits {
		if split.Nearest == "westeurope" && split.Shares[0].Region != "westeurope" {
			t.Errorf("%+v", split)
		}
	}
	for i := range d.Replicas {
		d.Replicas[i].Routing = RoutingDisabled
	}
	if _, err := r.client.Apply(t.Context(), Apply{Document: less}); !IsCode(err, CodeRefused) {
		t.Errorf("it leaves nobody an address: %v", err)
	}
	if applied, err := r.client.Apply(t.Context(), Apply{Document: served}); err != nil || len(applied.Changes) != 0 || !applied.Restored {
		t.Errorf("what is served: %+v, %v", applied.Changes, err)
	}
	if back, err := r.store.List(t.Context(), topology.RegistriesPrefix); err != nil || len(back.Entries) == 0 {
		t.Errorf("it was not given back: %v", err)
	}
}

// A document is no picture of a store with a value that cannot be used, though that counts for nothing: to apply it ends what is in force.
func TestDiffTellsOfValuesThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	key := topology.ReplicaPrefix("contoso", "westeurope") + "weight"
	if _, err := r.store.Commit(t.Context(), store.Put(key, "250")); err != nil {
		t.Fatal(err)
	}
	exported, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	changes, err := r.client.Diff(t.Context(), exported)
	if err != nil || len(changes) != 1 || changes[0].Key != key || changes[0].Op != topology.Removed {
		t.Errorf("%+v, %v", changes, err)
	}
}

// A diff only looks: where an apply would be refused, as of a replica that is being deleted, it tells what differs all the same.
func TestDiffIsRefusedNothing(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	before, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.DeleteReplica(t.Context(), "contoso", "westeurope", false); err != nil {
		t.Fatal(err)
	}
	changes, err := r.client.Diff(t.Context(), before)
	if err != nil || len(changes) != 1 || changes[0].Key != topology.ReplicaPrefix("contoso", "westeurope")+"routing" {
		t.Errorf("%+v, %v", changes, err)
	}
}

// What the guard holds is shown as it is served, and can be taken back by what is exported.
func TestHeldIsShownAsServed(t *testing.T) {
	t.Parallel()
	r, keep := newKept(t)
	served := *r.view(t)
	r.empty(t, topology.RegistriesPrefix+"contoso/replicas/")
	r.held = []topology.Pending{{Registry: "contoso", Missing: []string{"westeurope", "westus"}, Remaining: []string{}, Home: true}}
	served.Held = r.held
	keep(&served)
	list, err := r.client.Registries(t.Context())
	if err != nil || len(list) != 1 || len(list[0].Replicas) != 2 || list[0].Replicas[0].Status != topology.Ready {
		t.Errorf("%+v, %v", list, err)
	}
	exported, err := r.client.Export(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.client.Apply(t.Context(), Apply{Document: exported}); err != nil {
		t.Fatal(err)
	}
	if tree, err := r.store.List(t.Context(), topology.RegistriesPrefix+"contoso/replicas/"); err != nil || len(tree.Entries) < 4 {
		t.Errorf("it is not back: %v, %v", tree.Entries, err)
	}
}

// unseeded has nobody seeded but the home.
func unseeded(o *Options) {
	view := o.View
	o.View = func() *View {
		v := view()
		for k, c := range v.Conditions {
			c.Seeded = false
			v.Conditions[k] = c
		}
		return v
	}
}

// An edit of a registry tells what it changed, and is refused where nobody would be left to send clients to.
func TestUpdateRegistry(t *testing.T) {
	t.Parallel()
	r := newRig(t, unseeded)
	update := func(p RegistryPatch, force bool) (Applied, error) {
		return r.client.UpdateRegistry(t.Context(), "contoso", p, force)
	}
	disabled, enabled, none := "disabled", "enabled", 0
	applied, err := update(RegistryPatch{Replication: &disabled}, false)
	if err != nil || len(applied.Changes) != 1 || applied.Changes[0].New != disabled || len(applied.Shares) != 1 {
		t.Fatalf("%+v, %v", applied, err)
	}
	if _, err := r.client.UpdateReplica(t.Context(), "contoso", "westus", ReplicaPatch{Weight: &none}, false); err != nil {
		t.Fatal(err)
	}
	if _, err := update(RegistryPatch{Replication: &enabled}, false); !IsCode(err, CodeRefused) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("with the home alone seeded, and without weight: %v", err)
	}
	if _, err := update(RegistryPatch{Replication: &enabled}, true); err != nil {
		t.Error(err)
	}
	if _, err := update(RegistryPatch{Home: new(string)}, false); !IsCode(err, CodeInvalid) {
		t.Errorf("no home: %v", err)
	}
}
