package consul

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/store"
)

// TestAnswers gives the client answers that a healthy server never gives.
func TestAnswers(t *testing.T) {
	t.Parallel()
	const (
		good        = "good"
		unavailable = "unavailable"
		refused     = "refused"
		conflict    = "conflict"
	)
	leader := map[string]string{"X-Consul-Index": "7", "X-Consul-KnownLeader": "true", "X-Consul-LastContact": "0"}
	with := func(drop string) map[string]string {
		h := map[string]string{}
		for k, v := range leader {
			if k != drop {
				h[k] = v
			}
		}
		return h
	}
	plus := func(name, value string) map[string]string {
		h := with("")
		h[name] = value
		return h
	}
	for _, test := range []struct {
		name        string
		status      int
		header      map[string]string
		body        string
		read, write string // what it is to a read and to a write; "" is not asked
	}{
		{"keys", 200, leader, `[{"Key":"p/k","Value":"dg==","ModifyIndex":7}]`, good, ""},
		{"no keys", 404, leader, ``, good, ""},
		{"keys left out", 200, plus("X-Consul-Results-Filtered-By-ACLs", "true"), `[{"Key":"p/k","Value":"dg==","ModifyIndex":7}]`, refused, ""},
		{"all keys left out", 404, plus("X-Consul-Results-Filtered-By-ACLs", "true"), ``, refused, ""},
		{"no index", 404, with("X-Consul-Index"), ``, unavailable, ""},
		{"no leader known", 404, with("X-Consul-KnownLeader"), ``, unavailable, ""},
		{"no headers at all", 200, nil, `[]`, unavailable, ""},
		{"no leader", 500, nil, `No cluster leader`, unavailable, unavailable},
		{"rate limit", 429, nil, `slow down`, unavailable, unavailable},
		{"proxy without server", 502, nil, ``, unavailable, unavailable},
		{"no right", 403, nil, `Permission denied`, refused, refused},
		{"too large", 413, nil, `too large`, refused, refused},
		{"garbage", 200, leader, `<html>`, unavailable, unavailable},
		{"stale", 409, nil, `{"Errors":[{"OpIndex":0,"What":"failed to set key, index is stale"}]}`, "", conflict},
		{"stale in other words", 409, nil, `{"Errors":[{"OpIndex":0,"What":"nope"}]}`, "", conflict},
		{"no right to one key", 409, nil, `{"Errors":[{"OpIndex":0,"What":"Permission denied: token lacks key:write"}]}`, "", refused},
		{"no right beside a conflict", 409, nil, `{"Errors":[{"OpIndex":0,"What":"stale"},{"OpIndex":1,"What":"Permission denied"}]}`, "", refused},
		{"an operation without a condition", 409, nil, `{"Errors":[{"OpIndex":1,"What":"broken"}]}`, "", refused},
		{"an operation that there is not", 409, nil, `{"Errors":[{"OpIndex":9,"What":"stale"}]}`, "", refused},
		{"no reason", 409, nil, `{}`, "", refused},
		{"garbage for a reason", 409, nil, `<html>`, "", refused},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var weak atomic.Int32
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method == http.MethodGet && !r.URL.Query().Has("consistent") {
					weak.Add(1)
				}
				for k, v := range test.header {
					w.Header().Set(k, v)
				}
				w.WriteHeader(test.status)
				fmt.Fprint(w, test.body)
			}))
			defer server.Close()
			c, err := Dial(Config{Address: strings.TrimPrefix(server.URL, "http://"), Prefix: "p"})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			kind := func(err error) string {
				switch {
				case err == nil:
					return good
				case errors.Is(err, store.ErrUnavailable):
					return unavailable
				case errors.Is(err, store.ErrConflict):
					return conflict
				}
				return refused
			}
			if test.read != "" {
				_, getErr := c.Get(t.Context(), "p/k", 0)
				_, listErr := c.List(t.Context(), "p/", 3)
				_, keysErr := c.Keys(t.Context(), "p/", ",")
				if strings.HasPrefix(test.body, "[{") {
					keysErr = listErr // names come in another form
				}
				for what, err := range map[string]error{"get": getErr, "list": listErr, "keys": keysErr} {
					if kind(err) != test.read {
						t.Errorf("%s: %v, want it %s", what, err, test.read)
					}
				}
			}
			if test.write != "" {
				_, err := c.Txn(t.Context(), []*api.KVTxnOp{{Verb: api.KVCAS, Key: "p/k"}, {Verb: api.KVSet, Key: "p/l"}})
				if kind(err) != test.write {
					t.Errorf("transaction: %v, want it %s", err, test.write)
				}
			}
			if weak.Load() > 0 {
				t.Errorf("%d reads did not ask for consistency", weak.Load())
			}
		})
	}
}

// TestNothingMayBeRead asks as Consul answers a request without a token where that has no rights: each folder is empty,
// and nothing says that keys were left out; only a single key is refused.
func TestNothingMayBeRead(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Consul-Index", "7")
		w.Header().Set("X-Consul-KnownLeader", "true")
		w.Header().Set("X-Consul-LastContact", "0")
		if r.URL.Query().Has("recurse") || r.URL.Query().Has("keys") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.WriteHeader(http.StatusForbidden)
		fmt.Fprint(w, "Permission denied")
	}))
	defer server.Close()
	c, err := Dial(Config{Address: server.URL, Prefix: "p"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, listErr := c.List(t.Context(), "p/", 0)
	_, keysErr := c.Keys(t.Context(), "p/", ",")
	for what, err := range map[string]error{"list": listErr, "keys": keysErr} {
		if err == nil || errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "no right") {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}
}

// TestDeadLink lets a link die without a word, under requests that go over TLS. Each request ends by its deadline, and
// the ones after it must get through on a new connection.
func TestDeadLink(t *testing.T) {
	t.Parallel()
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Consul-Index", "7")
		w.Header().Set("X-Consul-KnownLeader", "true")
		w.Header().Set("X-Consul-LastContact", "0")
		w.WriteHeader(http.StatusNotFound)
	}))
	server.EnableHTTP2 = true // as Consul has it
	link := &mortal{Listener: server.Listener}
	server.Listener = link
	server.StartTLS()
	defer server.Close()
	defer link.bury()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	address := link.Addr().String()
	patient, err := Dial(Config{Address: address, TLS: true, CAFile: ca, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer patient.Close()
	if _, err := patient.Get(t.Context(), "p/k", 0); err != nil {
		t.Fatal(err)
	}
	link.die()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := patient.Get(ctx, "p/k", 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a request over the dead link: %v", err)
	}
	if _, err := patient.Get(t.Context(), "p/k", 0); err != nil {
		t.Errorf("the request after it: %v", err)
	}
}

// mortal is a listener whose connections can be made to hear and say nothing any more.
type mortal struct {
	net.Listener
	mu    sync.Mutex
	alive []*deafConn
}

type deafConn struct {
	net.Conn
	dead   atomic.Bool
	buried chan struct{}
}

func (m *mortal) Accept() (net.Conn, error) {
	c, err := m.Listener.Accept()
	if err != nil {
		return nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := &deafConn{Conn: c, buried: make(chan struct{})}
	m.alive = append(m.alive, d)
	return d, nil
}

// die ends the connections that there are; bury lets what waits on them go.
func (m *mortal) die() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.alive {
		c.dead.Store(true)
	}
}

func (m *mortal) bury() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, c := range m.alive {
		if c.dead.Load() {
			close(c.buried)
		}
	}
}

func (c *deafConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.dead.Load() {
		<-c.buried
		return 0, net.ErrClosed
	}
	return n, err
}

func (c *deafConn) Write(b []byte) (int, error) {
	if c.dead.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// TestTokenFile renews a token while a client uses it.
func TestTokenFile(t *testing.T) {
	t.Parallel()
	var shown atomic.Value
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown.Store(r.Header.Get("X-Consul-Token"))
		w.Header().Set("X-Consul-Index", "7")
		w.Header().Set("X-Consul-KnownLeader", "true")
		w.Header().Set("X-Consul-LastContact", "0")
		fmt.Fprint(w, `[{"Key":"p/k","Value":"dg==","ModifyIndex":7}]`)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "token")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file+".new", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(file+".new", file); err != nil {
			t.Fatal(err)
		}
	}
	config := Config{Address: strings.TrimPrefix(server.URL, "http://"), TokenFile: file}
	write(" \n")
	if _, err := Dial(config); err == nil || !strings.Contains(err.Error(), "token is empty") {
		t.Errorf("an empty file: %v", err)
	}
	write("one\n")
	c, err := Dial(config)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	agent, err := NewAPI(config)
	if err != nil {
		t.Fatal(err)
	}
	shows := func(when, want string) {
		t.Helper()
		if _, err := c.Get(t.Context(), "p/k", 0); err != nil || shown.Load() != want {
			t.Errorf("%s: %v, %v; want %q", when, shown.Load(), err, want)
		}
		if _, _, err := agent.KV().Get("p/k", (&api.QueryOptions{}).WithContext(t.Context())); err != nil || shown.Load() != want {
			t.Errorf("%s, Consul's own client: %v, %v; want %q", when, shown.Load(), err, want)
		}
	}
	shows("at the start", "one")
	write("two\n")
	shows("renewed", "two")
	write("")
	shows("emptied", "two")
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	shows("removed", "two")
	write("three")
	shows("there again", "three")
}

// TestUnixSocket asks an agent that listens on a socket of its machine.
func TestUnixSocket(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "consul.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Consul-Index", "7")
		w.Header().Set("X-Consul-KnownLeader", "true")
		w.Header().Set("X-Consul-LastContact", "0")
		fmt.Fprint(w, `[{"Key":"p/k","Value":"dg==","ModifyIndex":7}]`)
	}))
	_ = server.Listener.Close()
	server.Listener = listener
	server.Start()
	defer server.Close()
	c, err := Dial(Config{Address: "unix://" + path, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if r, err := c.Get(t.Context(), "p/k", 0); err != nil || len(r.Pairs) != 1 || string(r.Pairs[0].Value) != "v" {
		t.Errorf("over a Unix socket: %+v, %v", r, err)
	}
	if _, ok := c.http.Transport.(transport); !ok {
		t.Errorf("answers are not bounded: %T", c.http.Transport)
	}
}
