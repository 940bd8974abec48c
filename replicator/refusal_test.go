package replicator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"portolan/replicator/ledger"
)

// second starts another replicator over the same store and ledger, as of a process of its own.
func (f *fleetOfServers) second() *Replicator {
	f.t.Helper()
	o := f.replicator.options
	o.Spool, o.Metrics, o.Holder, o.Memory = nil, prometheus.NewRegistry(), newID(), filepath.Join(f.t.TempDir(), "seen.json")
	r, err := New(o)
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	f.t.Cleanup(func() { cancel(); <-ended })
	return r
}

// pushSchema1 pushes what no other registry takes.
func (f *fleetOfServers) pushSchema1(region, tag string) string {
	f.t.Helper()
	body := []byte(`{"schemaVersion":1,"name":"app","tag":"` + tag + `","fsLayers":[],"history":[],"signatures":[]}`)
	r, err := http.NewRequestWithContext(f.t.Context(), http.MethodPut, f.servers[region].URL+"/v2/app/manifests/"+tag, bytes.NewReader(body))
	if err != nil {
		f.t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/vnd.docker.distribution.manifest.v1+prettyjws")
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		f.t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusCreated {
		f.t.Fatal(answer.Status)
	}
	return fmt.Sprintf("sha256:%x", sha256.Sum256(body))
}

// What can never be applied is known to every process, by tag and by digest, and only of the version that it is true of.
func TestRefusalIsKnownEverywhere(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	f.start()
	f.ready("home", "other")
	processes := map[string]*Replicator{"the one that copies": f.replicator, "another": f.second()}
	digest := f.pushSchema1("home", "old")
	why := func(r *Replicator, reference string) string {
		i, err := r.Inspect(t.Context(), "contoso", "app", reference)
		if err != nil || len(i.Replicas) != 2 || i.Digest == "" || i.Replicas[0].NotReplicable != "" {
			return ""
		}
		return i.Replicas[1].NotReplicable
	}
	for process, r := range processes {
		for _, reference := range []string{"old", digest} {
			f.until(process+" to tell of "+reference, func() bool { return strings.Contains(why(r, reference), "schema 1") })
		}
	}
	// Of an image that was never tried there, and of what comes next under the tag, nothing is said.
	next := f.push("home", "app:old")
	f.arrives("app:old", next, "other")
	for process, r := range processes {
		for _, reference := range []string{"old", next} {
			f.until(process+" to tell nothing of "+reference, func() bool {
				i, err := r.Inspect(t.Context(), "contoso", "app", reference)
				return err == nil && i.Digest == next && i.Replicas[1].Applied && i.Replicas[1].NotReplicable == ""
			})
		}
	}
}

// A digest can come with each of the tags that lead to it: it is refused where all of them are.
func TestRefusalOfADigest(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	e := s.engines[0]
	s.push(east, "a")
	east.tags["b"] = east.tags["a"]
	s.look(t, east)
	digest := s.head("a")
	sequence := func(tag string) uint64 { return s.ledger.rows[s.key(tag)].Record.Head.Sequence }
	refuse := func(r *simRegistry, tag string, sequence uint64, reason string) {
		t.Helper()
		if err := e.refuse(t.Context(), s.region(r), s.key(tag), sequence, reason); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(key ledger.Key, want map[*simRegistry]string) {
		t.Helper()
		row, err := e.get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		got, err := e.refusals(t.Context(), row)
		if err != nil || len(got) != len(want) {
			t.Errorf("%s is refused for %v, %v; want %d", key, got, err, len(want))
		}
		for r, reason := range want {
			if got[s.region(r).Incarnation] != reason {
				t.Errorf("%s in %s: %q, want %q", key, r.region, got[s.region(r).Incarnation], reason)
			}
		}
	}
	refuse(north, "a", sequence("a"), "too large")
	refuse(west, "a", sequence("a"), "no room")
	refused(s.key("a"), map[*simRegistry]string{north: "too large", west: "no room"})
	refused(s.key("b"), nil)
	refused(s.manifestKey(digest), nil)
	refuse(north, "b", sequence("b"), "too large")
	refused(s.manifestKey(digest), map[*simRegistry]string{north: "too large"})
	// A version that is no longer the head, or is there, is not refused; and a reason has an end.
	refuse(north, "c", sequence("c")+1, "too large")
	refuse(north, "c", sequence("c"), "too large")
	refused(s.key("c"), nil)
	refuse(west, "b", sequence("b"), strings.Repeat("é", maxReason))
	if why := s.ledger.rows[s.key("b")].Record.Refused[s.region(west).Incarnation]; why == "" || len(why) > maxReason || !utf8.ValidString(why) {
		t.Errorf("%d bytes are kept: %q", len(why), why)
	}
	before := s.ledger.next
	refuse(north, "a", sequence("a"), "too large")
	if s.ledger.next != before {
		t.Error("a reason that is known is stored again")
	}
	s.converge(t)
	for _, tag := range []string{"a", "b"} {
		if refused := s.ledger.rows[s.key(tag)].Record.Refused; len(refused) != 0 {
			t.Errorf("%s was applied after all, and is refused for %v", tag, refused)
		}
	}
}
