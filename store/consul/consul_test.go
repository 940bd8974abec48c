package consul_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/store"
	"portolan/store/consul"
	"portolan/store/storetest"
	"portolan/test/bed"
)

// server starts a real Consul; a plain unit run (-short) leaves that out.
func server(t testing.TB, config bed.ConsulConfig) *bed.Consul {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Consul server; runs without -short")
	}
	return bed.NewConsul(t, config)
}

// open opens a store. Unless a test is about its deadline, that is long: how quick Consul is on a busy machine is no claim of these tests.
func open(t testing.TB, config consul.Config) *consul.Store {
	t.Helper()
	config.Timeout = cmp.Or(config.Timeout, time.Minute)
	client, err := consul.Dial(config)
	if err != nil {
		t.Fatal(err)
	}
	s := consul.New(client)
	t.Cleanup(func() { _ = s.Close(); client.Close() })
	return s
}

func TestConformance(t *testing.T) {
	t.Parallel()
	c := server(t, bed.ConsulConfig{})
	var installations atomic.Int64
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, consul.Config{Address: c.Addr(), Prefix: fmt.Sprintf("installations/%d", installations.Add(1))})
	})
}

// TestRestart takes the server away, orderly and not, from under watchers of a tree with keys and of one without. They
// keep what they had, say that it is old, and go on by themselves.
func TestRestart(t *testing.T) {
	t.Parallel()
	c := server(t, bed.ConsulConfig{})
	s := open(t, consul.Config{Address: c.Addr()})
	ctx := t.Context()
	commit := func(ops ...store.Op) {
		t.Helper()
		if _, err := s.Commit(ctx, ops...); err != nil {
			t.Fatal(err)
		}
	}
	commit(store.Put("full/k", "0"))
	await := storetest.Follow(t, s, "full/")
	awaitEmpty := storetest.Follow(t, s, "empty/")
	await("the first value", storetest.Value("full/k", "0"))
	awaitEmpty("emptiness", func(u store.Update) bool { return u.Err == nil && len(u.Tree.Entries) == 0 })
	// Beside the condition of the moment: this one never sees the tree empty.
	watching, stop := context.WithCancel(ctx)
	var watcher sync.WaitGroup
	watcher.Go(func() {
		some := false
		_ = s.Watch(watching, "full/", func(u store.Update) {
			some = some || len(u.Tree.Entries) > 0
			if some && len(u.Tree.Entries) == 0 {
				t.Errorf("an empty tree was delivered: %+v", u)
			}
		})
	})
	defer func() { stop(); watcher.Wait() }()
	for round, end := range []func(){func() { _ = c.Stop() }, c.Kill} {
		end()
		await("the loss of Consul, with the last tree", func(u store.Update) bool {
			return errors.Is(u.Err, store.ErrUnavailable) && len(u.Tree.Entries) == 1
		})
		if _, err := s.Get(ctx, "full/k"); !errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), c.Addr()) {
			t.Errorf("reading without Consul: %v, want it named", err)
		}
		if _, err := s.Commit(ctx, store.Put("full/k", "x")); !errors.Is(err, store.ErrUnavailable) {
			t.Errorf("writing without Consul: %v", err)
		}
		if err := c.Start(ctx); err != nil {
			t.Fatal(err)
		}
		await("the same tree, good again", storetest.Value("full/k", fmt.Sprint(round)))
		commit(store.Put("full/k", fmt.Sprint(round+1)))
		await("a value written after the restart", storetest.Value("full/k", fmt.Sprint(round+1)))
		commit(store.Put("empty/k", "v"))
		awaitEmpty("a first value", storetest.Value("empty/k", "v"))
		commit(store.Delete("empty/k"))
		awaitEmpty("the deletion", func(u store.Update) bool { return u.Err == nil && len(u.Tree.Entries) == 0 })
	}
}

// TestLostData gives a watcher a Consul that answers well and has forgotten everything.
func TestLostData(t *testing.T) {
	t.Parallel()
	config := bed.ConsulConfig{Dir: t.TempDir()}
	c := server(t, config)
	s := open(t, consul.Config{Address: c.Addr()})
	for i := range 100 { // so that the new server's index is behind for a while
		if _, err := s.Commit(t.Context(), store.Put("tree/k", fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	await := storetest.Follow(t, s, "tree/")
	await("the tree", storetest.Value("tree/k", "99"))
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(config.Dir, "data")); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	await("the loss, with the last tree", func(u store.Update) bool {
		return u.Err != nil && strings.Contains(u.Err.Error(), "went back") && len(u.Tree.Entries) == 1
	})
	if _, err := s.Commit(t.Context(), store.Put("tree/k", "restored")); err != nil {
		t.Fatal(err)
	}
	await("what was restored", storetest.Value("tree/k", "restored"))
}

func TestAccessControl(t *testing.T) {
	t.Parallel()
	const token = "3c9e1b50-6a7f-4c1e-9a94-0d9f7c1f6b11"
	c := server(t, bed.ConsulConfig{Token: token})
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, config := range []consul.Config{{Token: token}, {TokenFile: file}, {Token: token, Datacenter: c.Datacenter()}} {
		config.Address = c.Addr()
		if _, err := open(t, config).Commit(t.Context(), store.Put("k", "v")); err != nil {
			t.Errorf("with the token: %v", err)
		}
	}
	for what, config := range map[string]consul.Config{"no token": {}, "an unknown token": {Token: "9d1f3c50-0000-4c1e-9a94-0d9f7c1f6b11"}} {
		config.Address = c.Addr()
		s := open(t, config)
		_, err := s.Commit(t.Context(), store.PutIf("k2", "v", 0))
		if err == nil || errors.Is(err, store.ErrConflict) || errors.Is(err, store.ErrUnavailable) {
			t.Errorf("writing with %s: %v, want a refusal", what, err)
		}
		if err != nil && config.Token != "" && strings.Contains(err.Error(), config.Token) {
			t.Errorf("the error shows the token: %v", err)
		}
	}
	// Consul lists what a token may read and leaves out the rest: never is that the tree.
	client, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, consul.Config{Address: c.Addr(), Token: token}).Commit(t.Context(), store.Put("open/k", "v"), store.Put("shut/k", "v")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := client.ACL().PolicyCreate(&api.ACLPolicy{Name: "half", Rules: `key_prefix "portolan/open/" { policy = "read" }`}, nil); err != nil {
		t.Fatal(err)
	}
	half, _, err := client.ACL().TokenCreate(&api.ACLToken{Policies: []*api.ACLTokenPolicyLink{{Name: "half"}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, consul.Config{Address: c.Addr(), Token: half.SecretID})
	if tree, err := s.List(t.Context(), "open/"); err != nil || len(tree.Entries) != 1 {
		t.Errorf("what the token may read: %+v, %v", tree, err)
	}
	if tree, err := s.List(t.Context(), "open/none/"); err != nil || len(tree.Entries) != 0 {
		t.Errorf("an empty folder that the token may read: %+v, %v", tree, err)
	}
	for what, read := range map[string]struct {
		token, prefix string
	}{"half of the tree": {half.SecretID, ""}, "the other half": {half.SecretID, "shut/"}, "all without a token": {"", "shut/"}} {
		s := open(t, consul.Config{Address: c.Addr(), Token: read.token})
		if tree, err := s.List(t.Context(), read.prefix); err == nil || errors.Is(err, store.ErrUnavailable) || !strings.Contains(err.Error(), "no right") {
			t.Errorf("listing %s: %+v, %v; want a refusal", what, tree, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		_ = s.Watch(ctx, read.prefix, func(u store.Update) {
			if u.Err == nil || len(u.Tree.Entries) != 0 {
				t.Errorf("watching %s: %+v; want a refusal", what, u)
			}
			cancel()
		})
		cancel()
	}
	if _, err := open(t, consul.Config{Address: c.Addr(), Token: token, Datacenter: "elsewhere"}).Get(t.Context(), "k"); err == nil || errors.Is(err, store.ErrNotFound) {
		t.Errorf("a datacenter that does not exist: %v", err)
	}
}

func TestFoldersOfTheUI(t *testing.T) {
	t.Parallel()
	c := server(t, bed.ConsulConfig{})
	s := open(t, consul.Config{Address: c.Addr(), Prefix: "/portolan/"})
	for _, args := range [][]string{{"portolan/registries/", ""}, {"portolan/registries/contoso/home", "westus"}, {"portolanx/other", "1"}} {
		if out, err := c.Run(t.Context(), "kv", "put", args[0], args[1]); err != nil {
			t.Fatal(out, err)
		}
	}
	tree, err := s.List(t.Context(), "")
	if err != nil || len(tree.Entries) != 1 || tree.Entries[0].Key != "registries/contoso/home" || tree.Entries[0].Value != "westus" {
		t.Errorf("what was put with Consul's own CLI: %+v, %v", tree, err)
	}
}

func TestAway(t *testing.T) {
	t.Parallel()
	address := bed.NewAddress(t, "127.0.0.1")
	s := open(t, consul.Config{Address: address})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := s.Watch(ctx, "k/", func(u store.Update) {
		if !errors.Is(u.Err, store.ErrUnavailable) || !strings.Contains(u.Err.Error(), address) || len(u.Tree.Entries) != 0 {
			t.Errorf("the first update without Consul: %+v", u)
		}
		cancel()
	})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// TestSilence puts a dead link between the two: requests must end by their deadlines.
func TestSilence(t *testing.T) {
	t.Parallel()
	c := server(t, bed.ConsulConfig{})
	s := open(t, consul.Config{Address: c.Addr(), Timeout: 300 * time.Millisecond})
	if _, err := open(t, consul.Config{Address: c.Addr()}).Commit(t.Context(), store.Put("k", "v")); err != nil {
		t.Fatal(err)
	}
	freeze(t, c)
	if _, err := s.Get(t.Context(), "k"); !errors.Is(err, store.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("reading from a frozen server: %v", err)
	}
	if _, err := s.Commit(t.Context(), store.Put("k", "w")); !errors.Is(err, store.ErrUnavailable) {
		t.Errorf("writing to a frozen server: %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	t.Parallel()
	for want, config := range map[string]consul.Config{
		"no-such-ca": {TLS: true, CAFile: "/no-such-ca.pem"},
		"no-such-to": {TokenFile: "/no-such-token"},
		"prefix":     {Prefix: "a//b"},
	} {
		if _, err := consul.Dial(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want an error with %q", config, err, want)
		}
	}
}

func BenchmarkCommit(b *testing.B) {
	c := server(b, bed.ConsulConfig{})
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			s := open(b, consul.Config{Address: c.Addr()})
			var group sync.WaitGroup
			for w := range writers {
				group.Go(func() {
					for i := w; i < b.N; i += writers {
						if _, err := s.Commit(b.Context(), store.Put(fmt.Sprintf("k/%d", i%1000), "v")); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			group.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
		})
	}
}

// BenchmarkWatch measures the time from before an edit by another client to its delivery.
func BenchmarkWatch(b *testing.B) {
	c := server(b, bed.ConsulConfig{})
	s := open(b, consul.Config{Address: c.Addr()})
	editor, err := c.Client()
	if err != nil {
		b.Fatal(err)
	}
	delivered := make(chan string, 1)
	ctx, cancel := context.WithCancel(b.Context())
	var watcher sync.WaitGroup
	watcher.Go(func() {
		_ = s.Watch(ctx, "w/", func(u store.Update) {
			if e, ok := u.Tree.Get("w/weight"); ok {
				delivered <- e.Value
			}
		})
	})
	defer func() { cancel(); watcher.Wait() }()
	var took []time.Duration
	for i := 0; b.Loop(); i++ {
		time.Sleep(50 * time.Millisecond) // edits come apart, as people's do
		start := time.Now()
		if _, err := editor.KV().Put(&api.KVPair{Key: consul.DefaultPrefix + "/w/weight", Value: fmt.Append(nil, i)}, nil); err != nil {
			b.Fatal(err)
		}
		for <-delivered != fmt.Sprint(i) {
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(float64(took[len(took)-1].Microseconds())/1000, "max-ms")
}

// freeze stops the server in its tracks, with its connections open, until the end of the test.
func freeze(t testing.TB, c *bed.Consul) {
	t.Helper()
	if err := c.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Signal(syscall.SIGCONT) })
}
