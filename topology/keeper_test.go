package topology

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap/zaptest"

	"portolan/store"
	"portolan/store/bolt"
)

// away is a store that can be away.
type away struct {
	store.Store
	mu   sync.Mutex
	gone bool
	flip chan struct{}
}

func (a *away) set(gone bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.gone = gone
	close(a.flip)
	a.flip = make(chan struct{})
}

func (a *away) now() (bool, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.gone, a.flip
}

func (a *away) Get(ctx context.Context, k string) (store.Entry, error) {
	if gone, _ := a.now(); gone {
		return store.Entry{}, store.ErrUnavailable
	}
	return a.Store.Get(ctx, k)
}

func (a *away) List(ctx context.Context, p string) (store.Tree, error) {
	if gone, _ := a.now(); gone {
		return store.Tree{}, store.ErrUnavailable
	}
	return a.Store.List(ctx, p)
}

func (a *away) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if gone, _ := a.now(); gone {
		return 0, store.ErrUnavailable
	}
	return a.Store.Commit(ctx, ops...)
}

func (a *away) Watch(ctx context.Context, prefix string, deliver func(store.Update)) error {
	var last store.Update
	for {
		gone, flip := a.now()
		if gone {
			last.Err = store.ErrUnavailable
			deliver(last)
			select {
			case <-flip:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		inner, cancel := context.WithCancel(ctx)
		stop := make(chan struct{})
		go func() {
			defer close(stop)
			select {
			case <-flip:
				cancel()
			case <-inner.Done():
			}
		}()
		_ = a.Store.Watch(inner, prefix, func(u store.Update) { last = u; deliver(u) })
		cancel()
		<-stop
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

func open(t *testing.T) *away {
	t.Helper()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "store.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = db.Close() })
	return &away{Store: bolt.New(db), flip: make(chan struct{})}
}

// deadline bounds the wait for a condition; it passes only when something is broken.
const deadline = 2 * time.Minute

func run(t *testing.T, k interface{ Run(context.Context) error }) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- k.Run(ctx) }()
	var once sync.Once
	stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; !errors.Is(err, context.Canceled) {
				t.Errorf("Run ended with %v", err)
			}
		})
	}
	t.Cleanup(stop)
	return stop
}

func until(t *testing.T, k *Keeper, what string, ok func(*Snapshot) bool) *Snapshot {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	var found *Snapshot
	_ = k.Watch(ctx, func(s *Snapshot) {
		if ok(s) {
			found = s
			cancel()
		}
	})
	if found == nil {
		t.Fatalf("waited in vain for %s; %+v", what, k.Status())
	}
	return found
}

func put(t *testing.T, s store.Store, v Values) {
	t.Helper()
	var ops []store.Op
	for _, k := range slices.Sorted(maps.Keys(v)) {
		if v[k] == "-" {
			ops = append(ops, store.Delete(k))
		} else {
			ops = append(ops, store.Put(k, v[k]))
		}
	}
	if _, err := s.Commit(t.Context(), ops...); err != nil {
		t.Fatal(err)
	}
}

func wipe(t *testing.T, s store.Store, prefix string) {
	t.Helper()
	tree, err := s.List(t.Context(), prefix)
	if err != nil {
		t.Fatal(err)
	}
	v := Values{}
	for _, e := range tree.Entries {
		v[e.Key] = "-"
	}
	put(t, s, v)
}

func weight(region string, w int) func(*Snapshot) bool {
	return func(s *Snapshot) bool {
		r := s.Registry("contoso")
		return r != nil && r.Replica(region) != nil && r.Replica(region).Weight == w
	}
}

func TestKeeperFollowsKeepsAndGuards(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	path := filepath.Join(t.TempDir(), "last-good.json")
	registry := prometheus.NewRegistry()
	k := NewKeeper(s, KeeperOptions{LastGoodPath: path, Logger: zaptest.NewLogger(t), Registerer: registry})
	if st := k.Status(); st.StoreUp || st.StoreError == "" {
		t.Error("the store counts as read before it was")
	}
	stop := run(t, k)
	first := until(t, k, "the first time of change", func(s *Snapshot) bool { return !s.Changed.IsZero() })
	if st := k.Status(); !st.StoreUp || st.FromDisk || !st.Loaded || st.StoreError != "" {
		t.Errorf("status %+v", st)
	}
	const east = "registries/contoso/replicas/eastus/"
	put(t, s, Values{east + "weight": "50"})
	until(t, k, "weight 50", weight("eastus", 50))
	second := until(t, k, "a later time", func(s *Snapshot) bool { return s.Changed.After(first.Changed) })
	if second.Digest == first.Digest {
		t.Error("the digest is the same")
	}
	put(t, s, Values{east + "weight": "500"})
	bad := until(t, k, "a problem", func(s *Snapshot) bool { return len(s.Problems) == 1 })
	if bad.Digest != second.Digest || !weight("eastus", 50)(bad) {
		t.Errorf("the last good value is not kept: %+v", bad.Problems)
	}
	put(t, s, Values{east + "weight": "60"})
	until(t, k, "weight 60", weight("eastus", 60))

	// Two of three go, and the third changes.
	v := Values{"registries/contoso/replicas/westus/weight": "70"}
	for name := range three() {
		if strings.Contains(name, "eastus/") || strings.Contains(name, "westeurope/") {
			v[name] = "-"
		}
	}
	put(t, s, v)
	held := until(t, k, "the rest of the edit", weight("westus", 70))
	if len(held.Registry("contoso").Replicas) != 3 || len(k.Status().Pending) != 1 {
		t.Fatalf("not held: %+v, %+v", held.Problems, k.Status().Pending)
	}
	if !slices.ContainsFunc(held.Problems, func(p Problem) bool { return strings.Contains(p.Reason, "portolan topology confirm contoso") }) {
		t.Errorf("the problem does not say what to do: %+v", held.Problems)
	}
	// It survives a restart, from what is on disk.
	stop()
	k = NewKeeper(s, KeeperOptions{LastGoodPath: path, Logger: zaptest.NewLogger(t)})
	run(t, k)
	if got := until(t, k, "a snapshot after the restart", func(*Snapshot) bool { return true }); len(got.Registry("contoso").Replicas) != 3 {
		t.Fatal("the restart took the replicas away")
	}
	e := NewEditor(s, EditorOptions{Pending: func() []Pending { return k.Status().Pending }})
	if err := e.RemoveReplica(t.Context(), "contoso", "uksouth"); err != nil {
		t.Errorf("removing what is not there: %v", err)
	}
	if err := e.CreateReplica(t.Context(), "contoso", ReplicaDocument{Region: "uksouth", Endpoint: "https://uk.example.net", Addresses: []string{"192.0.2.77"}}); !errors.Is(err, ErrRefused) {
		t.Errorf("a replica beside a held edit: %v", err)
	}
	if err := e.Confirm(t.Context(), "contoso"); err != nil {
		t.Fatal(err)
	}
	until(t, k, "the confirmed edit", func(s *Snapshot) bool { return len(s.Registry("contoso").Replicas) == 1 })
	if p := k.Status().Pending; len(p) != 0 {
		t.Errorf("still pending: %+v", p)
	}

	// The same confirmation does not let the same deletion pass again.
	full := three()
	full["registries/contoso/replicas/westus/weight"] = "71"
	put(t, s, full)
	until(t, k, "three again", func(s *Snapshot) bool { return len(s.Registry("contoso").Replicas) == 3 })
	v["registries/contoso/replicas/westus/weight"] = "72"
	put(t, s, v)
	if again := until(t, k, "the same edit", weight("westus", 72)); len(again.Registry("contoso").Replicas) != 3 {
		t.Error("a used confirmation let a deletion pass")
	}
	// A whole registry.
	wipe(t, s, RegistriesPrefix)
	put(t, s, Values{"registries/other/home": "westus", "registries/other/replicas/westus/endpoint": "http://o", "registries/other/replicas/westus/addresses": "192.0.2.9"})
	gone := until(t, k, "the other registry", func(s *Snapshot) bool { return s.Registry("other") != nil })
	if gone.Registry("contoso") == nil {
		t.Error("a whole registry went without a confirmation")
	}
	if err := e.Confirm(t.Context(), "contoso"); err != nil {
		t.Fatal(err)
	}
	until(t, k, "the end of the registry", func(s *Snapshot) bool { return s.Registry("contoso") == nil })
	// Everything.
	wipe(t, s, RegistriesPrefix)
	waitStatus(t, k, func(st KeeperStatus) bool { return len(st.Pending) == 1 })
	if err := e.Confirm(t.Context(), "other"); err != nil {
		t.Fatal(err)
	}
	until(t, k, "nothing, and its time", func(now *Snapshot) bool {
		noted, err := s.Get(t.Context(), digestKey)
		return err == nil && len(now.Registries) == 0 && noted.Value == now.Digest
	})
	families, err := registry.Gather()
	if err != nil || len(families) != 5 {
		t.Errorf("metrics: %v, %v", families, err)
	}
}

func TestKeeperStartsFromDisk(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	path := filepath.Join(t.TempDir(), "last-good.json")
	k := NewKeeper(s, KeeperOptions{LastGoodPath: path})
	stop := run(t, k)
	before := until(t, k, "a time", func(s *Snapshot) bool { return !s.Changed.IsZero() })
	stop()
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(path), ".*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}

	s.set(true)
	k = NewKeeper(s, KeeperOptions{LastGoodPath: path, Logger: zaptest.NewLogger(t)})
	stop = run(t, k)
	got := until(t, k, "the topology on disk", func(*Snapshot) bool { return true })
	if got.Digest != before.Digest || !got.Changed.Equal(before.Changed) {
		t.Errorf("got %+v, want %+v", got, before)
	}
	if st := k.Status(); st.StoreUp || !st.FromDisk || !strings.Contains(st.StoreError, store.ErrUnavailable.Error()) {
		t.Errorf("status %+v", st)
	}
	put(t, s.Store, Values{"registries/contoso/replicas/eastus/weight": "5"})
	s.set(false)
	until(t, k, "what changed meanwhile", weight("eastus", 5))
	s.set(true)
	waitStatus(t, k, func(st KeeperStatus) bool { return !st.StoreUp && st.Loaded && !st.FromDisk })
	if !weight("eastus", 5)(k.Snapshot()) {
		t.Error("the topology went with the store")
	}
	stop()

	// A file that cannot be used is none.
	for _, text := range []string{"", "{", `{"version":99,"values":{}}`} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readLastGood(path); err == nil {
			t.Errorf("%q was read", text)
		}
	}
	s.set(false)
	k = NewKeeper(s, KeeperOptions{LastGoodPath: path})
	run(t, k)
	until(t, k, "the store's topology", weight("eastus", 5))
}

// The last good topology is written again and again until it is on disk, though nothing changes.
func TestKeeperSavesAgain(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "data")
	path := filepath.Join(folder, "last-good.json")
	synctest.Test(t, func(t *testing.T) {
		s := open(t)
		put(t, s, three())
		var told []error
		k := NewKeeper(s, KeeperOptions{LastGoodPath: path, Saved: func(err error) { told = append(told, err) }})
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- k.Run(ctx) }()
		time.Sleep(saveRetry / 2) // the first change has its time by then
		synctest.Wait()
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(saveRetry)
		cancel()
		<-ended
		if n := len(told); n < 2 || told[0] == nil || told[n-1] != nil {
			t.Errorf("it was told of %v", told)
		}
		if g, err := readLastGood(path); err != nil || g == nil || !maps.Equal(g.Values, k.good) {
			t.Errorf("on disk is %+v, %v", g, err)
		}
	})
}

func waitStatus(t *testing.T, k *Keeper, ok func(KeeperStatus) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), deadline)
	defer cancel()
	var seen *KeeperStatus
	for {
		s, err := k.status.Wait(ctx, seen)
		if err != nil {
			t.Fatalf("waited in vain: %+v", k.Status())
		}
		if ok(*s) {
			return
		}
		seen = s
	}
}

// The end of a registry that has no replicas left may be confirmed before it is heard of: the confirmation waits for it.
func TestConfirmationHeardEarly(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	k := NewKeeper(s, KeeperOptions{})
	tree := func() store.Tree {
		tree, err := s.List(t.Context(), RegistriesPrefix)
		if err != nil {
			t.Fatal(err)
		}
		return tree
	}
	hear := func(registries store.Tree) {
		state, err := s.List(t.Context(), topologyPrefix)
		if err != nil {
			t.Fatal(err)
		}
		k.registries = heard{update: store.Update{Tree: registries}, any: true, tree: true}
		k.state = heard{update: store.Update{Tree: state}, any: true, tree: true}
		k.evaluate(t.Context(), true)
	}
	hear(tree())
	wipe(t, s, "registries/contoso/replicas/")
	put(t, s, Values{"registries/contoso/home": "-"})
	held := tree()
	hear(held)
	e := NewEditor(s, EditorOptions{Pending: func() []Pending { return k.Status().Pending }})
	if err := e.DeleteRegistry(t.Context(), "contoso"); err != nil {
		t.Fatal(err)
	}
	hear(held)
	if r := k.Snapshot().Registry("contoso"); r == nil || len(r.Replicas) != 3 {
		t.Errorf("what was not confirmed passed: %+v", r)
	}
	hear(tree())
	if n := len(k.Snapshot().Registries); n != 0 || len(k.Status().Pending) != 0 {
		t.Errorf("%d registries, pending %+v", n, k.Status().Pending)
	}
}

// Two servers agree on the time of a change, also when nobody noted it, and it never goes backwards.
func TestServersAgreeOnTheTime(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	a, b := NewKeeper(s, KeeperOptions{}), NewKeeper(s, KeeperOptions{})
	run(t, a)
	run(t, b)
	agree := func(w int, after time.Time) time.Time {
		t.Helper()
		for {
			x := until(t, a, "a", func(s *Snapshot) bool { return weight("eastus", w)(s) && s.Changed.After(after) })
			// A server that was slow may have noted an earlier change meanwhile; then the time goes on once more.
			y := until(t, b, "b", func(s *Snapshot) bool { return weight("eastus", w)(s) && !s.Changed.Before(x.Changed) })
			if x.Digest != y.Digest {
				t.Fatalf("%s and %s", x.Digest, y.Digest)
			}
			if x.Changed.Equal(y.Changed) {
				return x.Changed
			}
			after = x.Changed
		}
	}
	last := agree(100, time.Time{})
	for w := range 5 {
		put(t, s, Values{"registries/contoso/replicas/eastus/weight": fmt.Sprint(w)})
		last = agree(w, last)
	}
	// The clock of whoever writes may be wrong.
	put(t, s, Values{changedKey: "2001-01-01T00:00:00Z", "registries/contoso/replicas/eastus/weight": "9"})
	until(t, a, "weight 9", weight("eastus", 9))
	if c := a.Snapshot().Changed; c.Before(last) {
		t.Errorf("the time went back from %v to %v", last, c)
	}
}

// The two halves of an edit that confirms itself are watched apart: the deletion may be heard of first.
func TestConfirmationHeardLate(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	k := NewKeeper(s, KeeperOptions{})
	hear := func() {
		tree, err := s.List(t.Context(), RegistriesPrefix)
		if err != nil {
			t.Fatal(err)
		}
		k.registries = heard{update: store.Update{Tree: tree}, any: true, tree: true}
		k.evaluate(t.Context(), true)
	}
	hear()
	v := Values{ConfirmedKey("contoso"): "westus"}
	for name := range three() {
		if strings.Contains(name, "eastus/") || strings.Contains(name, "westeurope/") {
			v[name] = "-"
		}
	}
	put(t, s, v)
	hear() // nothing was heard of the confirmation
	if n := len(k.Snapshot().Registry("contoso").Replicas); n != 1 || len(k.Status().Pending) != 0 {
		t.Errorf("%d replicas, pending %+v", n, k.Status().Pending)
	}
}

// A server that is slow to note a change does not note it after the next one: the newest digest would be an old one.
func TestNoStampOfWhatWasLeftBehind(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	k := NewKeeper(s, KeeperOptions{})
	hear := func() string {
		tree, err := s.List(t.Context(), RegistriesPrefix)
		if err != nil {
			t.Fatal(err)
		}
		k.registries = heard{update: store.Update{Tree: tree}, any: true, tree: true}
		k.evaluate(t.Context(), true)
		return k.Snapshot().Digest
	}
	first := hear()
	put(t, s, Values{"registries/contoso/replicas/eastus/weight": "1"})
	second := hear()
	for _, digest := range []string{second, first} {
		if err := k.stamp(t.Context(), digest); err != nil {
			t.Fatal(err)
		}
	}
	if e, err := s.Get(t.Context(), digestKey); err != nil || e.Value != second {
		t.Errorf("stamped %v, %v; want %s", e, err, second)
	}
}
