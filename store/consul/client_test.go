package consul

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

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
	for _, test := range []struct {
		name        string
		status      int
		header      map[string]string
		body        string
		read, write string // what it is to a read and to a write; "" is not asked
	}{
		{"keys", 200, leader, `[{"Key":"p/k","Value":"dg==","ModifyIndex":7}]`, good, ""},
		{"no keys", 404, leader, ``, good, ""},
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
				if test.name == "keys" {
					keysErr = nil // names come in another form
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
