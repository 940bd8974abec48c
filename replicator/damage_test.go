package replicator

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.etcd.io/bbolt"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"portolan/replicator/ledger"
	"portolan/topology"
)

// damage makes the stored record of a key unreadable.
func (l *simLedger) damage(key ledger.Key) {
	l.next++
	l.rows[key] = ledger.Row{Key: key, Revision: l.next, Damage: errors.New("it is damaged")}
}

func (s *simulation) manifestKey(digest string) ledger.Key {
	key := s.key("a")
	key.Kind, key.Reference = ledger.Manifest, digest
	return key
}

// everywhere checks that a tag is the same in every region, and returns its digest.
func (s *simulation) everywhere(t *testing.T, tag string) string {
	t.Helper()
	digest := s.head(tag)
	for _, r := range s.regions {
		if r.tags[tag] != digest {
			t.Errorf("%s is %q in %s, and %q in the ledger", tag, r.tags[tag], r.region, digest)
		}
	}
	return digest
}

// A key whose record is damaged is decided anew from what the replicas hold; the others go on meanwhile.
func TestDamagedTagIsDecidedAnew(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	held := s.head("a")
	s.ledger.damage(s.key("a"))
	s.push(north, "b")
	pushed := north.tags["b"]
	s.converge(t)
	if s.everywhere(t, "a") != held || s.everywhere(t, "b") != pushed || s.ledger.rows[s.key("a")].Damage != nil {
		t.Errorf("a is %q, want %q; b is %q, want %q", s.head("a"), held, s.head("b"), pushed)
	}
	// A push that comes before any scan is the version, whatever was before it.
	s.ledger.damage(s.key("a"))
	s.push(north, "a")
	pushed = north.tags["a"]
	for _, e := range north.events {
		if err := s.hear(t.Context(), s.engines[0], s.region(north), e); err != nil {
			t.Fatal(err)
		}
	}
	if s.head("a") != pushed {
		t.Errorf("a is %q, want the push %q", s.head("a"), pushed)
	}
}

// Manifests in their own right are not scanned: mend finds who holds them.
func TestMend(t *testing.T) {
	t.Parallel()
	s, east, north, west := seeded(t)
	e := s.engines[0]
	held, lost := s.manifestKey("sha256:held"), s.manifestKey("sha256:lost")
	east.manifests[held.Reference] = true
	s.ledger.damage(held)
	s.ledger.damage(lost)
	members := s.fleets[0].members
	if err := e.tidy(t.Context()); err != nil || len(s.ledger.rows) != 5 {
		t.Fatalf("tidied to %d records, %v: nobody was asked", len(s.ledger.rows), err)
	}
	if err := e.mend(t.Context(), members[1:]); err != nil || s.ledger.rows[lost].Damage == nil || s.ledger.rows[held].Damage == nil {
		t.Fatalf("%v; it was decided before all were asked", err)
	}
	if err := e.mend(t.Context(), members); err != nil {
		t.Fatal(err)
	}
	if _, there := s.ledger.rows[lost]; there {
		t.Error("what nobody holds is not forgotten")
	}
	s.converge(t)
	for _, r := range []*simRegistry{north, west} {
		if !r.manifests[held.Reference] {
			t.Errorf("%s did not get the manifest", r.region)
		}
	}
}

// A manifest is not deleted while a tag that may name it cannot be read.
func TestDamagedTagKeepsManifests(t *testing.T) {
	t.Parallel()
	s, _, north, _ := seeded(t)
	digest := s.head("a")
	s.ledger.damage(s.key("b"))
	if by, err := s.engines[0].named(t.Context(), s.region(north), s.manifestKey("sha256:other")); err == nil {
		t.Errorf("named by %q, and nothing said of the damage", by)
	}
	if by, err := s.engines[0].named(t.Context(), s.region(north), s.manifestKey(digest)); err != nil || by != "a" {
		t.Errorf("what a sound record names is named by %q, %v", by, err)
	}
}

// Each damage is told of once, and counted for as long as it is there.
func TestExamined(t *testing.T) {
	t.Parallel()
	s, _, _, _ := seeded(t)
	core, logs := observer.New(zap.ErrorLevel)
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "damaged"})
	x := examine(s.ledger, zap.New(core), gauge)
	read := func(count float64, told int) {
		t.Helper()
		for range 2 {
			if _, err := x.Get(t.Context(), s.key("a")); err != nil && !errors.Is(err, ledger.ErrNotFound) {
				t.Fatal(err)
			}
			if _, err := x.Page(t.Context(), "contoso", "", ledger.Key{}, 10); err != nil {
				t.Fatal(err)
			}
		}
		if n := testutil.ToFloat64(gauge); n != count || logs.Len() != told {
			t.Errorf("%v counted, want %v; told of %d times, want %d", n, count, logs.Len(), told)
		}
	}
	read(0, 0)
	s.ledger.damage(s.key("a"))
	s.ledger.damage(s.key("b"))
	read(2, 2)
	if e := logs.All()[0]; e.ContextMap()["image"] != "contoso/app:a" || e.ContextMap()["error"] != "it is damaged" {
		t.Errorf("told of %v", e.ContextMap())
	}
	delete(s.ledger.rows, s.key("a"))
	read(1, 2)
	delete(s.ledger.rows, s.key("b")) // by another process: nobody asks for it by its key
	if _, err := x.Page(t.Context(), "contoso", "", ledger.Key{}, 10); err != nil || testutil.ToFloat64(gauge) != 0 {
		t.Errorf("%v; what is not there any more is counted", err)
	}
	s.ledger.damage(s.key("b"))
	read(1, 3)
	s.ledger.damage(s.key("a"))
	read(2, 4)
}

// A damaged record stops neither the feed nor the scans of its registry.
func TestDamagedRecord(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other")
	digest := f.settle()
	f.before = func() {
		err := f.db.Update(context.Background(), func(tx *bbolt.Tx) error {
			b := tx.Bucket([]byte("ledger"))
			k, v := b.Cursor().Seek([]byte("contoso\x00app\x00t\x001"))
			if !bytes.HasSuffix(k, []byte("\x001")) {
				return errors.New("the tag has no record")
			}
			return b.Put(k, append(v[:8:8], `{"v":1,"h":`...))
		})
		if err != nil {
			t.Error(err)
		}
	}
	f.stop()
	f.start()
	f.arrives("app:2", f.push("other", "app:2"), "home")
	f.until("the record to be decided anew", func() bool {
		row, err := f.ledger.Get(t.Context(), ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Tag, Reference: "1"})
		return err == nil && row.Record.Head.Digest == digest
	})
	f.until("the metric to say so", func() bool {
		return testutil.CollectAndCompare(f.replicator.metrics.damaged, strings.NewReader(`
			# HELP portolan_replicator_damaged_records Records of the ledger that cannot be read and wait to be decided anew.
			# TYPE portolan_replicator_damaged_records gauge
			portolan_replicator_damaged_records{registry="contoso"} 0
		`)) == nil
	})
}

// A damaged record waits for every replica to be asked. Of one that stays away, people are told that it waits for that.
func TestDamagedRecordWaitsForAReplica(t *testing.T) {
	t.Parallel()
	f := newServers(t, "home", "other", "away")
	f.start()
	f.ready("home", "other", "away")
	key := ledger.Key{Registry: "contoso", Repository: "app", Kind: ledger.Manifest, Reference: "sha256:" + strings.Repeat("0", 64)}
	f.before = func() {
		err := f.db.Update(context.Background(), func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte("ledger")).Put([]byte("contoso\x00app\x00m\x00"+key.Reference), append([]byte{7: 1}, `{"v":1,"h":`...))
		})
		if err != nil {
			t.Error(err)
		}
	}
	f.stop()
	back := f.replace("away", http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	f.start()
	mend := func() error {
		one, err := f.replicator.registry("contoso")
		if err != nil {
			return err
		}
		return one.engine.mend(t.Context(), one.telling())
	}
	f.until("away to be named as what it waits for", func() bool {
		_ = mend()
		s, pending := f.state("away"), f.replicator.Pending("contoso", "away", 10)
		return s.Status == topology.Degraded && s.Unreadable == 1 && strings.Contains(s.LastError, key.String()) &&
			len(pending) == 1 && pending[0].Image == key.String() && pending[0].Unreadable && !pending[0].Since.IsZero()
	})
	for _, region := range []string{"home", "other"} {
		if s := f.state(region); s.Unreadable != 0 || s.Status != topology.Ready {
			t.Errorf("%s is told of: %+v", region, s)
		}
	}
	f.replace("away", back)
	f.until("the record to be forgotten, and nothing to be told of any more", func() bool {
		_ = mend() // an error says that not all could be asked
		s := f.state("away")
		_, err := f.ledger.Get(t.Context(), key)
		return errors.Is(err, ledger.ErrNotFound) && s.Status == topology.Ready && s.Unreadable == 0 && len(f.replicator.Pending("contoso", "away", 10)) == 0
	})
}
