package replicator

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"portolan/replicator/distribution"
	"portolan/replicator/ledger"
	"portolan/replicator/version"
	"portolan/test/bed"
	"portolan/topology"
)

// underway pushes a tag in one region, and begins a write of it to another whose outcome nobody knows.
func underway(t *testing.T) (s *simulation, north *simRegistry) {
	t.Helper()
	s, east, north, _ := seeded(t)
	e, key := s.engines[0], s.key("a")
	s.clock = s.clock.Add(time.Hour)
	s.push(east, "a")
	for _, event := range east.events {
		if err := s.hear(t.Context(), e, s.region(east), event); err != nil {
			t.Fatal(err)
		}
	}
	east.events = nil
	row, err := e.get(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	record, _ := version.Begin(row.Record, s.fleets[0].replicas, s.region(north).Replica, row.Record.Head.Digest, "lost", s.clock)
	if err := e.set(t.Context(), s.fleets[0], key, &record, row.Revision); err != nil {
		t.Fatal(err)
	}
	s.clock = s.clock.Add(time.Minute)
	return s, north
}

// A registry that fails for a moment is not taken for a damaged one: what a user pushed to it, and no event told of, stays.
func TestMomentaryFaultOverwritesNothing(t *testing.T) {
	t.Parallel()
	s, north := underway(t)
	s.push(north, "a")
	pushed := north.tags["a"]
	north.events = nil
	north.broken["a"] = true
	if _, err := s.engines[0].apply(t.Context(), s.region(north), s.key("a"), s.clock, false); !faulty(err) {
		t.Errorf("while it fails: %v", err)
	}
	delete(north.broken, "a")
	s.converge(t)
	for _, digest := range north.tags {
		if digest == pushed {
			return
		}
	}
	t.Errorf("the push of %s is lost: %v", pushed, north.tags)
}

// A tag whose write was cut short can never be read before it is written again, however long the registry was away; one that somebody
// else was writing is left alone.
func TestWriteCutShortIsWrittenAgain(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		tag     string
		away    time.Duration
		deleted bool
		again   bool
	}{
		"soon":          {"a", 11 * time.Minute, false, true},
		"after days":    {"a", 72 * time.Hour, false, true},
		"deleted since": {"a", 11 * time.Minute, true, true},
		"a user's":      {"b", 11 * time.Minute, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, north := underway(t)
			if c.deleted {
				east := s.regions[0]
				s.remove(east, "a")
				for _, event := range east.events {
					if err := s.hear(t.Context(), s.engines[0], s.region(east), event); err != nil {
						t.Fatal(err)
					}
				}
				east.events = nil
			}
			north.broken[c.tag] = true
			s.clock = s.clock.Add(c.away)
			_, reading := s.region(north).Head(t.Context(), simRepository, c.tag)
			err := s.engines[0].rewrite(t.Context(), s.region(north), s.key(c.tag), reading)
			if again := err == nil && !north.broken[c.tag]; again != c.again {
				t.Fatalf("written again: %v, %v", again, err)
			}
			if want := s.head(c.tag); c.again && north.tags[c.tag] != want {
				t.Errorf("it has %q, want %q", north.tags[c.tag], want)
			}
		})
	}
}

// readOnly answers writes with a plain no.
type readOnly struct{ *simRegistry }

func (readOnly) Tag(context.Context, string, string, string, string) error {
	return translate(&distribution.Error{Status: http.StatusMethodNotAllowed, Kind: distribution.ErrReadOnly})
}

// A write that was refused was not carried out. Nothing is left of it that would make what a user does later ours.
func TestRefusedWriteLeavesNoIntent(t *testing.T) {
	t.Parallel()
	s, east, north, _ := seeded(t)
	e := s.engines[0]
	s.clock = s.clock.Add(time.Hour)
	s.push(east, "a")
	s.look(t, east)
	first := s.head("a")
	m := *s.region(north)
	m.Remote = readOnly{north}
	if _, err := e.apply(t.Context(), &m, s.key("a"), s.clock, false); err == nil {
		t.Fatal("it was not refused")
	}
	s.converge(t)
	if row, err := e.get(t.Context(), s.key("a")); err != nil || len(row.Record.Intents) > 0 {
		t.Errorf("%+v, %v", row.Record.Intents, err)
	}
	s.push(east, "a")
	s.converge(t)
	s.clock = s.clock.Add(time.Hour)
	north.tags["a"] = first // a user goes back, and no event tells of it
	s.converge(t)
	if got := s.head("a"); got != first {
		t.Errorf("the way back was undone: %s, want %s", got, first)
	}
}

// Real registries fail at a tag whose link is empty, until it is written again, or deleted.
func TestRealDamagedTag(t *testing.T) {
	t.Parallel()
	for name, server := range map[string]bed.Distribution{"distribution 3": bed.DistributionV3, "distribution 2.8": bed.DistributionV2} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			registry := bed.NewRegistry(t, bed.RegistryConfig{Server: server})
			endpoint, err := url.Parse(registry.URL())
			if err != nil {
				t.Fatal(err)
			}
			r, err := newRemote(&topology.Replica{Region: "westus", Endpoint: endpoint}, "portolan/test", newID, zap.NewNop())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(r.close)
			ctx := t.Context()
			config := []byte("{}")
			up, err := r.client.StartUpload(ctx, "app")
			if err != nil {
				t.Fatal(err)
			}
			if err := up.Commit(ctx, distribution.Digest(config), config); err != nil {
				t.Fatal(err)
			}
			const mediaType = "application/vnd.oci.image.manifest.v1+json"
			body := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.empty.v1+json","digest":%q,"size":2},"layers":[]}`,
				mediaType, distribution.Digest(config))
			digest := distribution.Digest(body)
			if err := r.client.PutManifest(ctx, "app", "1", mediaType, body, ""); err != nil {
				t.Fatal(err)
			}
			damage := func() {
				t.Helper()
				if err := os.Truncate(filepath.Join(registry.Storage(), "docker/registry/v2/repositories/app/_manifests/tags/1/current/link"), 0); err != nil {
					t.Fatal(err)
				}
				if _, err := r.Head(ctx, "app", "1"); !faulty(err) {
					t.Fatalf("an empty link is answered with %v", err)
				}
			}
			damage()
			if err := r.Tag(ctx, "app", "1", digest, "again"); err != nil {
				t.Fatal(err)
			}
			if got, err := r.Head(ctx, "app", "1"); err != nil || got != digest {
				t.Errorf("written again: %q, %v", got, err)
			}
			damage()
			if err := r.Untag(ctx, "app", "1", "away", func(string) error { return nil }); err != nil {
				t.Fatal(err)
			}
			if got, err := r.Head(ctx, "app", "1"); err != nil || got != ledger.Absent {
				t.Errorf("deleted: %q, %v", got, err)
			}
		})
	}
}
