package topology

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"portolan/store"
)

func replica(region string, n int) ReplicaDocument {
	return ReplicaDocument{Region: region, Endpoint: fmt.Sprintf("https://r%d.example.net", n), Addresses: []string{fmt.Sprintf("192.0.2.%d", n)}}
}

func contoso() RegistryDocument {
	return RegistryDocument{Name: "contoso", Home: "westus", Names: []string{"registry.contoso.com"}, Replicas: []ReplicaDocument{replica("westus", 1), replica("eastus", 2)}}
}

func snapshotOf(t *testing.T, s store.Store) *Snapshot {
	t.Helper()
	tree, err := s.List(t.Context(), RegistriesPrefix)
	if err != nil {
		t.Fatal(err)
	}
	got, _ := Parse(ValuesOf(tree), nil, nil)
	return got
}

func TestEditor(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	k := NewKeeper(s, KeeperOptions{})
	run(t, k)
	e := NewEditor(s, EditorOptions{Reserved: []string{"ns1", "whoami"}, Pending: func() []Pending { return k.Status().Pending }})
	fails := func(err, kind error, part string) {
		t.Helper()
		if !errors.Is(err, kind) || !strings.Contains(err.Error(), part) {
			t.Errorf("got %v, want %v with %q", err, kind, part)
		}
	}
	ok := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	bad := contoso()
	bad.Name = "ns1"
	fails(e.CreateRegistry(ctx, bad), ErrInvalid, "reserved")
	bad = contoso()
	bad.Replicas[1].Endpoint = bad.Replicas[0].Endpoint
	fails(e.CreateRegistry(ctx, bad), ErrInvalid, "replicas[1].endpoint: is the endpoint of replica westus too")
	ok(e.CreateRegistry(ctx, contoso()))
	fails(e.CreateRegistry(ctx, contoso()), ErrExists, "exists already")
	other := contoso()
	other.Name = "aaa"
	fails(e.CreateRegistry(ctx, other), ErrInvalid, "is a client name of registry contoso already")
	until(t, k, "two replicas", func(s *Snapshot) bool { return s.Registry("contoso") != nil && !s.Changed.IsZero() })

	fails(e.CreateReplica(ctx, "contso", replica("uksouth", 3)), ErrNotFound, "did you mean contoso?")
	fails(e.CreateReplica(ctx, "contoso", replica("eastus", 3)), ErrExists, "a replica in eastus already")
	fails(e.CreateReplica(ctx, "contoso", replica("uksouth", 2)), ErrInvalid, "endpoint: is the endpoint of replica eastus too")
	fails(e.CreateReplica(ctx, "contoso", ReplicaDocument{Region: "uksouth", Endpoint: "https://x"}), ErrInvalid, "addresses: is missing")
	fails(e.CreateReplica(ctx, "contoso", replica("UKSouth", 3)), ErrInvalid, "region: \"UKSouth\" has upper-case")
	fails(e.CreateReplica(ctx, "contoso", replica("uksoth", 3)), ErrInvalid, "did you mean uksouth?")
	put(t, s, Values{ReplicationKey("contoso", "uksouth"): `{"seeded":true}`, RequestKey("contoso", "uksouth", RequestDelete): "{}"})
	ok(e.CreateReplica(ctx, "contoso", replica("uksouth", 3)))
	if _, err := s.Get(ctx, ReplicationKey("contoso", "uksouth")); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a new replica inherits the state of its name: %v", err)
	}

	seven, hundred := 7, 101
	ok(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Weight = &seven }))
	fails(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Weight = &hundred }), ErrInvalid, "weight: \"101\" is not a weight")
	fails(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Region = "ukwest" }), ErrRefused, "cannot be changed")
	fails(e.UpdateReplica(ctx, "contoso", "uksuoth", func(*ReplicaDocument) {}), ErrNotFound, "did you mean uksouth?")
	fails(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Addresses, r.Hostname = nil, "a.example.net" }), ErrInvalid, "all of a registry's replicas")
	until(t, k, "weight 7", weight("uksouth", 7))

	// A value that a raw edit spoiled is not in the way, and is not lost by an edit of something else.
	put(t, s, Values{"registries/contoso/replicas/uksouth/routing": "of"})
	ok(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Prefix = "mirror" }))
	if got, err := s.Get(ctx, "registries/contoso/replicas/uksouth/routing"); err != nil || got.Value != "of" {
		t.Errorf("%v, %v", got, err)
	}
	put(t, s, Values{"registries/contoso/replicas/uksouth/routing": "-"})

	fails(e.DeleteReplica(ctx, "contoso", "westus", Request{}), ErrRefused, "home region")
	put(t, s, Values{"registries/contoso/fences/continent/EU": "uksouth", "registries/contoso/orders/country/GB": "uksouth,eastus", "registries/contoso/orders/country/IE": "uksouth"})
	fails(e.DeleteReplica(ctx, "contoso", "uksouth", Request{}), ErrRefused, "fence continent/EU")
	put(t, s, Values{"registries/contoso/fences/continent/EU": "uksouth,eastus"})
	ok(e.DeleteReplica(ctx, "contoso", "uksouth", Request{Actor: "me"}))
	entry, err := s.Get(ctx, RequestKey("contoso", "uksouth", RequestDelete))
	var first, second Request
	if err != nil || json.Unmarshal([]byte(entry.Value), &first) != nil || first.Actor != "me" {
		t.Errorf("request %v, %v", entry, err)
	}
	ok(e.DeleteReplica(ctx, "contoso", "uksouth", Request{Force: true}))
	entry, _ = s.Get(ctx, RequestKey("contoso", "uksouth", RequestDelete))
	if json.Unmarshal([]byte(entry.Value), &second) != nil || !second.Force || !second.Time.Equal(first.Time) {
		t.Errorf("the drain began anew: %v, %v", first, second)
	}
	fails(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Routing = "enabled" }), ErrDeleting, "is being deleted")
	stale, err := e.Export(ctx)
	ok(err)
	for i := range stale.Registries[0].Replicas {
		stale.Registries[0].Replicas[i].Routing = ""
	}
	_, err = e.Apply(ctx, stale, false, false)
	fails(err, ErrDeleting, "is being deleted")
	fails(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Prefix, r.CA = "mirror/b", "file:/ca.pem" }), ErrDeleting, "only credentials, ca, client_cert, realms can be changed")
	ok(e.UpdateReplica(ctx, "contoso", "uksouth", func(r *ReplicaDocument) { r.Credentials = "env:OTHER" }))
	fails(e.CreateReplica(ctx, "contoso", replica("uksouth", 3)), ErrDeleting, "create it again when it is gone")
	if snapshotOf(t, s).Registry("contoso").Replica("uksouth").Routing {
		t.Error("clients are still sent there")
	}
	ok(e.RemoveReplica(ctx, "contoso", "uksouth"))
	ok(e.RemoveReplica(ctx, "contoso", "uksouth"))
	ok(e.RemoveReplica(ctx, "contoso", "eastus-not-there"))
	// Half of what is left: more than the guard lets pass unless the deletion confirms itself.
	if got := snapshotOf(t, s); len(got.Problems) != 0 || len(got.Registry("contoso").Orders) != 1 {
		t.Errorf("%+v", got.Problems)
	}
	until(t, k, "one less", func(s *Snapshot) bool { return len(s.Registry("contoso").Replicas) == 2 })
	if err := e.Confirm(ctx, "contoso"); !errors.Is(err, ErrRefused) {
		t.Errorf("Confirm of nothing: %v", err)
	}
	fails(e.DeleteRegistry(ctx, "contos"), ErrNotFound, "did you mean contoso?")
	ok(e.DeleteRegistry(ctx, "contoso"))
	until(t, k, "the end", func(s *Snapshot) bool { return len(s.Registries) == 0 })
	if p := k.Status().Pending; len(p) > 0 {
		t.Errorf("the deletion did not confirm itself: %+v", p)
	}
}

// An edit of a registry writes what it changes and nothing else, is validated as a whole, and makes no replica the home that is about to
// leave.
func TestUpdateRegistry(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	e := NewEditor(s, EditorOptions{})
	if err := e.CreateRegistry(ctx, contoso()); err != nil {
		t.Fatal(err)
	}
	const raw = "registries/contoso/policy/untagged"
	if _, err := s.Commit(ctx, store.Put(raw, "perhaps"), store.Put("registries/contoso/orders/country/DE", "eastus")); err != nil {
		t.Fatal(err)
	}
	update := func(change func(*RegistryDocument)) error { return e.UpdateRegistry(ctx, "contoso", change) }
	if err := update(func(r *RegistryDocument) {
		r.Home, r.Names, r.Policy.MaxLag = "eastus", []string{"a.example.net", "b.example.net"}, "10m"
	}); err != nil {
		t.Fatal(err)
	}
	if err := update(func(r *RegistryDocument) { r.Policy.MaxLag = "" }); err != nil {
		t.Fatal(err)
	}
	tree, err := s.List(ctx, RegistriesPrefix)
	if err != nil {
		t.Fatal(err)
	}
	got := ValuesOf(tree)
	for key, want := range map[string]string{"home": "eastus", "names": "a.example.net,b.example.net", "policy/max_lag": "", "policy/untagged": "perhaps", "orders/country/DE": "eastus", "replicas/westus/addresses": "192.0.2.1"} {
		if got["registries/contoso/"+key] != want {
			t.Errorf("%s is %q, want %q", key, got["registries/contoso/"+key], want)
		}
	}
	if err := e.DeleteReplica(ctx, "contoso", "westus", Request{}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		change func(*RegistryDocument)
		kind   error
		part   string
	}{
		{func(r *RegistryDocument) { r.Home = "" }, ErrInvalid, "home"},
		{func(r *RegistryDocument) { r.Home = "uksouth" }, ErrInvalid, "home: the home region has no complete replica"},
		{func(r *RegistryDocument) { r.Home = "westus" }, ErrDeleting, "cannot become the home"},
		{func(r *RegistryDocument) { r.Names = []string{"a,b"} }, ErrInvalid, "names: "},
		{func(r *RegistryDocument) { r.Policy.Merge = "on" }, ErrInvalid, "policy.merge: "},
		{func(r *RegistryDocument) { r.Name = "fabrikam" }, ErrRefused, "cannot be changed"},
	} {
		if err := update(c.change); !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.part) {
			t.Errorf("%v, want %q", err, c.part)
		}
	}
	if err := e.UpdateRegistry(ctx, "contosso", func(*RegistryDocument) {}); !errors.Is(err, ErrNotFound) {
		t.Errorf("of no registry: %v", err)
	}
}

// A held edit that took the home away cannot be confirmed; deleting the registry, which the refusal names as the way out, is one.
func TestDeleteRegistryWhileAnEditIsHeld(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		gone   []string
		reason string
	}{
		"the home's replica": {[]string{"replicas/westus/", "replicas/eastus/"}, "the replica in the home region westus is among what was taken away"},
		"the home as well":   {[]string{"home", "replicas/"}, "the home of registry contoso was taken away"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, ctx := open(t), t.Context()
			put(t, s, three())
			k := NewKeeper(s, KeeperOptions{})
			run(t, k)
			until(t, k, "the registry", func(s *Snapshot) bool { return len(s.Registries) == 1 })
			v := Values{}
			for key := range three() {
				for _, part := range c.gone {
					if strings.HasPrefix(key, "registries/contoso/"+part) {
						v[key] = "-"
					}
				}
			}
			put(t, s, v)
			waitStatus(t, k, func(st KeeperStatus) bool { return len(st.Pending) == 1 })
			e := NewEditor(s, EditorOptions{Pending: func() []Pending { return k.Status().Pending }})
			if err := e.Confirm(ctx, "contoso"); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), c.reason) {
				t.Errorf("Confirm: %v", err)
			}
			if err := e.DeleteRegistry(ctx, "contoso"); err != nil {
				t.Fatal(err)
			}
			until(t, k, "the end", func(s *Snapshot) bool { return len(s.Registries) == 0 })
			if p := k.Status().Pending; len(p) > 0 {
				t.Errorf("still held: %+v", p)
			}
		})
	}
}

// Keys that are deleted one replica after another are held as one edit would be, until an operator confirms.
func TestRemovalInStepsIsHeld(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	k := NewKeeper(s, KeeperOptions{})
	run(t, k)
	e := NewEditor(s, EditorOptions{Pending: func() []Pending { return k.Status().Pending }})
	r := contoso()
	r.Replicas = append(r.Replicas, replica("eastasia", 7))
	if err := e.CreateRegistry(ctx, r); err != nil {
		t.Fatal(err)
	}
	served := func(n int) func(*Snapshot) bool {
		return func(s *Snapshot) bool { return len(s.Registries) == 1 && len(s.Registries[0].Replicas) == n }
	}
	until(t, k, "three replicas", served(3))
	var gone string
	for _, p := range r.Replicas {
		if p.Region == r.Home {
			continue
		}
		if gone != "" {
			until(t, k, "the end of "+gone, served(2))
		}
		gone = p.Region
		wipe(t, s, ReplicaPrefix("contoso", gone))
	}
	waitStatus(t, k, func(s KeeperStatus) bool {
		return len(s.Pending) == 1 && slices.Equal(s.Pending[0].Missing, []string{gone})
	})
	if !served(2)(k.Snapshot()) {
		t.Errorf("%s is not served", gone)
	}
	if err := e.Confirm(ctx, "contoso"); err != nil {
		t.Fatal(err)
	}
	until(t, k, "the home alone", served(1))
}

// While an edit is held that took the home away, a document that brings back all that is held is taken, though it brings more; one that
// brings more but not all is not.
func TestApplyTakesBackWhatIsHeld(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	put(t, s, three())
	k := NewKeeper(s, KeeperOptions{})
	run(t, k)
	until(t, k, "the registry", func(s *Snapshot) bool { return len(s.Registries) == 1 })
	e := NewEditor(s, EditorOptions{Pending: func() []Pending { return k.Status().Pending }})
	more, err := e.Export(ctx)
	if err != nil {
		t.Fatal(err)
	}
	more.Registries[0].Replicas = append(more.Registries[0].Replicas, replica("northeurope", 7))
	less := Document{Registries: []RegistryDocument{more.Registries[0]}}
	less.Registries[0].Orders, less.Registries[0].Fences = RulesDocument{}, RulesDocument{}
	less.Registries[0].Replicas = slices.DeleteFunc(slices.Clone(more.Registries[0].Replicas), func(r ReplicaDocument) bool { return r.Region == "eastus" })

	gone := Values{}
	for key := range three() {
		if !strings.HasPrefix(key, ReplicaPrefix("contoso", "westeurope")) {
			gone[key] = "-"
		}
	}
	put(t, s, gone)
	waitStatus(t, k, func(st KeeperStatus) bool { return len(st.Pending) == 1 })
	if _, err := e.Apply(ctx, less, false, false); !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "portolan export | portolan apply -f -") {
		t.Errorf("a part of it, and more: %v", err)
	}
	if _, err := e.Apply(ctx, more, false, false); err != nil {
		t.Fatal(err)
	}
	until(t, k, "all and more", func(s *Snapshot) bool { return len(s.Registries) == 1 && len(s.Registries[0].Replicas) == 4 })
	waitStatus(t, k, func(st KeeperStatus) bool { return len(st.Pending) == 0 })
}

func TestApply(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	e := NewEditor(s, EditorOptions{})
	d := Document{Registries: []RegistryDocument{contoso()}}
	changes, err := e.Apply(ctx, d, false, true)
	if err != nil || len(changes) != 6 {
		t.Fatalf("%v, %v", changes, err)
	}
	if got := snapshotOf(t, s); len(got.Registries) != 0 {
		t.Fatal("a dry run wrote")
	}
	if changes, err = e.Apply(ctx, d, false, false); err != nil || len(changes) != 6 {
		t.Fatalf("%v, %v", changes, err)
	}
	if changes, err = e.Apply(ctx, d, true, false); err != nil || len(changes) != 0 {
		t.Fatalf("applying it again changes %v, %v", changes, err)
	}
	exported, err := e.Export(ctx)
	if err != nil || len(Diff(d, exported)) != 0 {
		t.Fatalf("%v, %v", exported, err)
	}
	other := RegistryDocument{Name: "other", Home: "mine", Replicas: []ReplicaDocument{replica("mine", 9)}}
	other.Replicas[0].Location = []float64{1, 2}
	if err := e.CreateRegistry(ctx, other); err != nil {
		t.Fatal(err)
	}
	d.Registries[0].Replicas = d.Registries[0].Replicas[:1]
	changes, err = e.Apply(ctx, d, false, false)
	if err != nil || fmt.Sprint(changes) != "[= registries/contoso/replicas/eastus/ (not in the document; --prune removes it)]" {
		t.Fatalf("%v, %v", changes, err)
	}
	changes, err = e.Apply(ctx, d, true, false)
	if err != nil || fmt.Sprint(changes) != "[- registries/contoso/replicas/eastus/ + registries/contoso/replicas/eastus/routing: disabled]" {
		t.Fatalf("%v, %v", changes, err)
	}
	if _, err := s.Get(ctx, RequestKey("contoso", "eastus", RequestDelete)); err != nil {
		t.Errorf("no request: %v", err)
	}
	if got := snapshotOf(t, s); len(got.Registries) != 2 {
		t.Errorf("a registry that the document does not name is gone: %+v", got)
	}
	d.Registries[0].Names = []string{"x"}
	if _, err := e.Apply(ctx, d, false, false); !errors.Is(err, ErrInvalid) {
		t.Errorf("%v", err)
	}
}

// An edit of many transactions is complete, and was sound at every step.
func TestLargeEdits(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	e := NewEditor(s, EditorOptions{})
	k := NewKeeper(s, KeeperOptions{})
	run(t, k)
	watching, stop := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		_ = k.Watch(watching, func(s *Snapshot) {
			for _, p := range s.Problems {
				// The home comes last. The guard, whose problem is of the registry itself, may be a confirmation behind for a moment.
				if !strings.HasSuffix(p.Key, "/home") && !strings.HasSuffix(p.Key, "/") {
					t.Errorf("on the way: %+v", p)
				}
			}
		})
	})
	const registries = 4 // of 40 replicas: some forty transactions
	d := Document{}
	for i := range registries {
		r := RegistryDocument{Name: fmt.Sprintf("r%d", i), Home: "x0", Orders: RulesDocument{Country: map[string][]string{"DE": {"x39", "x1"}}}}
		for j := range 40 {
			p := replica(fmt.Sprintf("x%d", j), j+1)
			p.Location = []float64{float64(j), float64(i)}
			r.Replicas = append(r.Replicas, p)
		}
		d.Registries = append(d.Registries, r)
	}
	if _, err := e.Apply(ctx, d, false, false); err != nil {
		t.Fatal(err)
	}
	want, _ := Parse(d.Values(), nil, nil)
	got := until(t, k, "all of it", func(s *Snapshot) bool { return s.Digest == want.Digest })
	if len(got.Problems) > 0 {
		t.Errorf("%+v", got.Problems[:1])
	}
	for i := range registries {
		if err := e.DeleteRegistry(ctx, fmt.Sprintf("r%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	until(t, k, "nothing", func(s *Snapshot) bool { return len(s.Registries) == 0 })
	stop()
	watcher.Wait()
	if tree, err := s.List(ctx, RegistriesPrefix); err != nil || len(tree.Entries) > 0 {
		t.Errorf("%v, %v", tree, err)
	}
}

// breaks is a store whose every commit fails after the first few.
type breaks struct {
	store.Store
	left int
}

func (b *breaks) Commit(ctx context.Context, ops ...store.Op) (uint64, error) {
	if b.left--; b.left < 0 {
		return 0, store.ErrUnavailable
	}
	return b.Store.Commit(ctx, ops...)
}

// A creation that ended in its middle is completed by the same one, and by no other.
func TestCreateRegistryAgain(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	r := contoso()
	for i, region := range []string{"eastus2", "westus2", "westus3", "uksouth", "ukwest"} {
		r.Replicas = append(r.Replicas, replica(region, 10+i))
	}
	if err := NewEditor(&breaks{s, 1}, EditorOptions{}).CreateRegistry(ctx, r); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "do it again") {
		t.Fatal(err)
	}
	e, other := NewEditor(s, EditorOptions{}), contoso()
	if err := e.CreateRegistry(ctx, other); !errors.Is(err, ErrExists) {
		t.Errorf("another registry of that name: %v", err)
	}
	if err := e.CreateRegistry(ctx, r); err != nil {
		t.Fatal(err)
	}
	if got := snapshotOf(t, s); len(got.Problems) > 0 || len(got.Registry("contoso").Replicas) != 7 {
		t.Errorf("%+v", got)
	}
	if err := e.CreateRegistry(ctx, r); !errors.Is(err, ErrExists) {
		t.Errorf("a third time: %v", err)
	}
}

// Edits at once: each is right on its own, together they are too; what contradicts is refused to one of them.
func TestConcurrentEdits(t *testing.T) {
	t.Parallel()
	s := open(t)
	if err := NewEditor(s, EditorOptions{}).CreateRegistry(t.Context(), contoso()); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	var mu sync.Mutex
	done, refused := 0, 0
	for i := range 4 {
		e := NewEditor(s, EditorOptions{})
		group.Go(func() {
			r := replica(fmt.Sprintf("new%d", i), 50+i/2) // two of them have one endpoint
			r.Location = []float64{1, 1}
			err := e.CreateReplica(context.WithoutCancel(t.Context()), "contoso", r)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err == nil:
				done++
			case errors.Is(err, ErrInvalid):
				refused++
			default:
				t.Error(err)
			}
		})
	}
	group.Wait()
	if done != 2 || refused != 2 {
		t.Errorf("%d done, %d refused", done, refused)
	}
	if got := snapshotOf(t, s); len(got.Problems) > 0 || len(got.Registry("contoso").Replicas) != 4 {
		t.Errorf("%+v", got.Problems)
	}
}

// Edits of one process queue, however many there are, for as long as those who asked for them wait.
func TestEditsQueue(t *testing.T) {
	t.Parallel()
	s := open(t)
	e := NewEditor(s, EditorOptions{})
	if err := e.CreateRegistry(t.Context(), contoso()); err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	for i := range 40 {
		group.Go(func() {
			r := replica(fmt.Sprintf("new%d", i), 50+i)
			r.Location = []float64{1, 1}
			if err := e.CreateReplica(context.WithoutCancel(t.Context()), "contoso", r); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	if got := snapshotOf(t, s); len(got.Problems) > 0 || len(got.Registry("contoso").Replicas) != 42 {
		t.Errorf("%+v", got.Problems)
	}

	entered, leave := make(chan struct{}), make(chan struct{})
	group.Go(func() {
		err := e.UpdateReplica(context.WithoutCancel(t.Context()), "contoso", "westus", func(*ReplicaDocument) { close(entered); <-leave })
		if err != nil {
			t.Error(err)
		}
	})
	<-entered
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := e.DeleteRegistry(ctx, "contoso"); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "waiting for other edits") {
		t.Errorf("an edit that nobody waits for: %v", err)
	}
	if err := e.Confirm(ctx, "contoso"); !errors.Is(err, context.Canceled) {
		t.Errorf("a confirmation that nobody waits for: %v", err)
	}
	close(leave)
	group.Wait()
}

// meanwhile is a store in which something happens after the registries were read for the first time.
type meanwhile struct {
	store.Store
	once sync.Once
	do   func()
}

func (m *meanwhile) List(ctx context.Context, prefix string) (store.Tree, error) {
	tree, err := m.Store.List(ctx, prefix)
	if prefix == RegistriesPrefix {
		m.once.Do(m.do)
	}
	return tree, err
}

// What is confirmed is what stands there when it is.
func TestConfirmIsCheckAndSet(t *testing.T) {
	t.Parallel()
	s := open(t)
	put(t, s, three())
	m := &meanwhile{Store: s, do: func() { // a replica comes by the API of another server, which confirms it
		put(t, s, Values{"registries/contoso/replicas/uksouth/endpoint": "http://uk", "registries/contoso/replicas/uksouth/addresses": "192.0.2.77",
			ConfirmedKey("contoso"): "eastus,uksouth,westeurope,westus"})
	}}
	if err := NewEditor(m, EditorOptions{}).Confirm(t.Context(), "contoso"); err != nil {
		t.Fatal(err)
	}
	if e, err := s.Get(t.Context(), ConfirmedKey("contoso")); err != nil || e.Value != "eastus,uksouth,westeurope,westus" {
		t.Errorf("confirmed are %q, %v", e.Value, err)
	}
}

func TestEditorWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	s := open(t)
	s.set(true)
	if err := NewEditor(s, EditorOptions{}).CreateRegistry(t.Context(), contoso()); !errors.Is(err, store.ErrUnavailable) {
		t.Error(err)
	}
}

// An edit that takes back what the guard holds leaves what was reported of the replicas: they never left. Of a replica that is new it is
// forgotten.
func TestTakingBackKeepsState(t *testing.T) {
	t.Parallel()
	for name, kept := range map[string]bool{"held": true, "lost": true, "gone": false} {
		for way, edit := range map[string]func(*Editor, RegistryDocument) error{
			"apply": func(e *Editor, r RegistryDocument) error {
				_, err := e.Apply(t.Context(), Document{Registries: []RegistryDocument{r}}, false, false)
				return err
			},
			"create": func(e *Editor, r RegistryDocument) error {
				for _, p := range r.Replicas {
					if p.Region == "westeurope" {
						return e.CreateReplica(t.Context(), r.Name, p)
					}
				}
				return errors.New("no such replica")
			},
		} {
			t.Run(name+", "+way, func(t *testing.T) {
				t.Parallel()
				s := open(t)
				var pending []Pending
				lost := false
				e := NewEditor(s, EditorOptions{Pending: func() []Pending { return pending }, Lost: func() bool { return lost }})
				whole := contoso()
				whole.Replicas = append(whole.Replicas, ReplicaDocument{Region: "westeurope", Endpoint: "https://eu.example", Addresses: []string{"192.0.2.77"}})
				if err := e.CreateRegistry(t.Context(), whole); err != nil {
					t.Fatal(err)
				}
				key := ReplicationKey("contoso", "westeurope")
				if _, err := s.Commit(t.Context(), store.Put(key, "{}")); err != nil {
					t.Fatal(err)
				}
				wipe(t, s, ReplicaPrefix("contoso", "westeurope"))
				switch name {
				case "held":
					pending = []Pending{{Registry: "contoso", Missing: []string{"westeurope"}}}
				case "lost":
					lost = true
				}
				if err := edit(e, whole); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Get(t.Context(), key); (err == nil) != kept {
					t.Errorf("the state: %v", err)
				}
			})
		}
	}
}

// A rule that names a region without a replica is refused, unless it stands in the store so: then nothing is changed by it.
func TestApplyToleratesTheRulesThereAre(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	for name, c := range map[string]struct {
		order   string // what stands in the store, for Germany
		change  func(*RegistryDocument)
		refused string
	}{
		"as it is":             {"westeurope,attic", func(*RegistryDocument) {}, ""},
		"nothing but the dead": {"attic", func(*RegistryDocument) {}, ""},
		"another order":        {"westeurope,attic", func(r *RegistryDocument) { r.Orders.Country["DE"] = []string{"attic", "westeurope"} }, "registries[0].orders.country.DE: names attic, which has no replica here"},
		"another match":        {"westeurope,attic", func(r *RegistryDocument) { r.Fences.Country = map[string][]string{"FR": {"attic"}} }, "registries[0].fences.country.FR: names attic, which has no replica here"},
		"another is left out": {"westeurope,attic", func(r *RegistryDocument) { // which is kept, but might have been pruned
			r.Replicas = slices.DeleteFunc(r.Replicas, func(p ReplicaDocument) bool { return p.Region == "westeurope" })
			r.Fences = RulesDocument{}
		}, "registries[0].orders.country.DE: names westeurope, attic, which has no replica here"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := open(t)
			e := NewEditor(s, EditorOptions{})
			for key, value := range with(three(), "orders/country/DE", c.order) {
				if _, err := s.Commit(ctx, store.Put(key, value)); err != nil {
					t.Fatal(err)
				}
			}
			d, err := e.Export(ctx)
			if err != nil {
				t.Fatal(err)
			}
			c.change(&d.Registries[0])
			_, err = e.Diff(ctx, d)
			changes, applied := e.Apply(ctx, d, false, false)
			for _, err := range []error{err, applied} {
				if (err != nil) != (c.refused != "") || err != nil && (!errors.Is(err, ErrInvalid) || !strings.HasPrefix(err.Error(), c.refused)) {
					t.Errorf("%v: want %q", err, c.refused)
				}
			}
			if c.refused == "" && len(changes) > 0 {
				t.Errorf("%v", changes)
			}
		})
	}
}

// Of a replica that a document does not name it is said whether it stays or is leaving already.
func TestApplyTellsOfReplicasItDoesNotName(t *testing.T) {
	t.Parallel()
	s, ctx := open(t), t.Context()
	e := NewEditor(s, EditorOptions{})
	if err := e.CreateRegistry(ctx, contoso()); err != nil {
		t.Fatal(err)
	}
	r := contoso()
	r.Replicas = r.Replicas[:1]
	for _, want := range []string{"= registries/contoso/replicas/eastus/ (not in the document; --prune removes it)", "= registries/contoso/replicas/eastus/ (not in the document; it is being deleted)"} {
		changes, err := e.Apply(ctx, Document{Registries: []RegistryDocument{r}}, false, false)
		if err != nil || len(changes) != 1 || changes[0].String() != want {
			t.Errorf("%v, %v: want %q", changes, err, want)
		}
		if err := e.DeleteReplica(ctx, "contoso", "eastus", Request{}); err != nil {
			t.Fatal(err)
		}
	}
}

// A fence that leaves nobody, since its regions are not complete, binds: no document of what is served is without it.
func TestDocumentKeepsFences(t *testing.T) {
	t.Parallel()
	d := Document{Registries: []RegistryDocument{contoso()}}
	values := d.Values()
	values["registries/contoso/fences/continent/EU"] = "uksouth"
	values["registries/contoso/orders/continent/AS"] = "uksouth"
	values["registries/contoso/replicas/uksouth/weight"] = "100" // and no endpoint
	s, _ := Parse(values, nil, nil)
	got := s.Document()
	kept := got.Values()
	if kept["registries/contoso/fences/continent/EU"] != "uksouth" || kept["registries/contoso/orders/continent/AS"] != "" {
		t.Errorf("%v", kept)
	}
}
