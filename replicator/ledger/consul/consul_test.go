package consul_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"

	"portolan/replicator/ledger"
	"portolan/replicator/ledger/consul"
	"portolan/replicator/ledger/ledgertest"
	consulstore "portolan/store/consul"
	"portolan/test/bed"
)

// server starts a real Consul; a plain unit run (-short) leaves that out.
func server(t testing.TB) *bed.Consul {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a Consul server; runs without -short")
	}
	return bed.NewConsul(t, bed.ConsulConfig{})
}

// open opens a ledger. Unless a test is about its deadline, that is long: how quick Consul is on a busy machine is no claim of these tests.
func open(t testing.TB, config consulstore.Config) *consul.Ledger {
	t.Helper()
	config.Timeout = cmp.Or(config.Timeout, time.Minute)
	client, err := consulstore.Dial(config)
	if err != nil {
		t.Fatal(err)
	}
	l := consul.New(client)
	t.Cleanup(func() { _ = l.Close(); client.Close() })
	return l
}

func TestConformance(t *testing.T) {
	t.Parallel()
	c := server(t)
	client, err := c.Client()
	if err != nil {
		t.Fatal(err)
	}
	var installations atomic.Int64
	ledgertest.Run(t, consul.Feed+44, func(t *testing.T) (ledger.Ledger, ledgertest.Raw) {
		prefix := fmt.Sprintf("installations/%d", installations.Add(1))
		return open(t, consulstore.Config{Address: c.Addr(), Prefix: prefix}), func(key ledger.Key, value []byte) {
			name := fmt.Sprintf("%s-ledger/records/%s/%s,%s,%s", prefix, key.Registry, key.Repository, key.Kind, key.Reference)
			if _, err := client.KV().Put(&api.KVPair{Key: name, Value: value}, nil); err != nil {
				t.Error(err)
			}
		}
	})
}

// follow keeps what it has learned from the feed, paging when it fell behind, until the test's end or ctx.
func follow(ctx context.Context, t *testing.T, l ledger.Ledger, learned func(ledger.Row)) {
	var cursor ledger.Cursor
	read := func(key ledger.Key) error {
		row, err := l.Get(ctx, key)
		if err == nil {
			learned(row)
		}
		return err
	}
	for ctx.Err() == nil {
		keys, next, err := l.Changes(ctx, cursor)
		for i := 0; err == nil && i < len(keys); i++ {
			err = read(keys[i])
		}
		if err == nil {
			cursor = next
			continue
		}
		if !errors.Is(err, ledger.ErrGap) {
			time.Sleep(10 * time.Millisecond) // Consul is away: ask again
			continue
		}
		head, err := l.Head(ctx)
		if err != nil {
			continue
		}
		rows, err := l.Page(ctx, "contoso", "", ledger.Key{}, 1_000_000)
		if err != nil {
			continue
		}
		for _, row := range rows {
			learned(row)
		}
		cursor = head
	}
}

// TestSeveralProcesses lets several ledgers, each as of a process of its own, write at once: all succeed, none undoes
// another, and followers come to know everything.
func TestSeveralProcesses(t *testing.T) {
	t.Parallel()
	testSeveral(t, server(t), func() {})
}

// TestRestart does the same while the server is killed and started again.
func TestRestart(t *testing.T) {
	t.Parallel()
	c := server(t)
	testSeveral(t, c, func() {
		for range 2 {
			c.Kill()
			if err := c.Start(t.Context()); err != nil {
				t.Error(err)
			}
		}
	})
}

func testSeveral(t *testing.T, c *bed.Consul, meanwhile func()) {
	const processes, writers, each = 3, 6, 25
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	type counts map[ledger.Key]uint64
	var mu sync.Mutex
	acknowledged := counts{}
	known := make([]counts, processes)
	following, stop := context.WithCancel(ctx)
	defer stop()
	var group, followers sync.WaitGroup
	for p := range processes {
		l := open(t, consulstore.Config{Address: c.Addr(), Timeout: 2 * time.Second})
		known[p] = counts{}
		followers.Go(func() {
			follow(following, t, l, func(row ledger.Row) {
				mu.Lock()
				defer mu.Unlock()
				known[p][row.Key] = max(known[p][row.Key], row.Record.Head.Sequence)
			})
		})
		for w := range writers {
			group.Go(func() {
				key := ledgertest.Tag("shared", fmt.Sprint("t", w)) // each shared by one writer of every process
				for done := 0; done < each && ctx.Err() == nil; {
					row, err := l.Get(ctx, key)
					if err == nil || errors.Is(err, ledger.ErrNotFound) {
						row.Record.Head.Sequence++
						_, err = l.CompareAndSet(ctx, 0, key, &row.Record, row.Revision)
					}
					switch {
					case err == nil:
						done++
						mu.Lock()
						acknowledged[key]++
						mu.Unlock()
						// Beside it one that is written once: the feed has one chance to tell of it.
						once := ledgertest.Tag("once", fmt.Sprintf("p%d-w%d-%d", p, w, done))
						if _, err := l.CompareAndSet(ctx, 0, once, &ledger.Record{Head: ledger.Version{Sequence: 1}}, 0); err == nil {
							mu.Lock()
							acknowledged[once]++
							mu.Unlock()
						}
					case errors.Is(err, ledger.ErrUnavailable):
						time.Sleep(10 * time.Millisecond)
					case !errors.Is(err, ledger.ErrConflict):
						t.Error(err)
						return
					}
				}
			})
		}
	}
	meanwhile()
	group.Wait()
	l := open(t, consulstore.Config{Address: c.Addr()})
	final := counts{}
	rows, err := l.Page(ctx, "contoso", "", ledger.Key{}, 10_000)
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range rows {
		final[row.Key] = row.Record.Head.Sequence
	}
	for key, count := range acknowledged {
		// A write without an answer may have been applied as well.
		if final[key] < count {
			t.Errorf("%s counts %d, %d were acknowledged", key, final[key], count)
		}
		if key.Repository == "shared" && count != processes*each {
			t.Errorf("%d writes of %s were acknowledged, want %d", count, key, processes*each)
		}
	}
	err = bed.Until(ctx, 2*time.Minute, func(context.Context) error {
		mu.Lock()
		defer mu.Unlock()
		for p := range known {
			for key, count := range final {
				// It may know more: a write whose caller gave up can be applied after the records were read.
				if known[p][key] < count {
					return fmt.Errorf("follower %d knows %s at %d, want %d", p, key, known[p][key], count)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	stop()
	followers.Wait()
}

// TestBursts fills transactions to their limits: many writes at once, large ones, deletions.
func TestBursts(t *testing.T) {
	t.Parallel()
	c := server(t)
	l := open(t, consulstore.Config{Address: c.Addr()})
	// As many as fill a few transactions by their number, and by their size.
	total := 0
	for _, burst := range []struct{ writes, size int }{{200, 0}, {60, 20_000}} {
		writes, size := burst.writes, burst.size
		total += 2 * writes
		revisions := make([]uint64, writes)
		for _, remove := range []bool{false, true} {
			var group sync.WaitGroup
			for i := range writes {
				group.Go(func() {
					r := &ledger.Record{Intents: []ledger.Intent{{WriteID: strings.Repeat("w", size)}}}
					if remove {
						r = nil
					}
					var err error
					// The longest key that there is.
					key := ledger.Key{Registry: "contoso", Repository: strings.Repeat("r", 255), Kind: ledger.Tag, Reference: fmt.Sprintf("%0128d", i)}
					if revisions[i], err = l.CompareAndSet(t.Context(), 0, key, r, revisions[i]); err != nil {
						t.Error(err)
					}
				})
			}
			group.Wait()
		}
		if rows, err := l.Page(t.Context(), "contoso", "", ledger.Key{}, 10); err != nil || len(rows) != 0 {
			t.Errorf("after all were deleted: %d rows, %v", len(rows), err)
		}
	}
	if head, err := l.Head(t.Context()); err != nil || head.Position >= uint64(total) {
		t.Errorf("%d positions for %d writes, %v: none shared a transaction", head.Position, total, err)
	}
}

func BenchmarkCompareAndSet(b *testing.B) {
	c := server(b)
	for _, processes := range []int{1, 2} {
		for _, writers := range []int{1, 64} {
			b.Run(fmt.Sprintf("processes=%d/writers=%d", processes, writers), func(b *testing.B) {
				prefix := fmt.Sprintf("bench/%d-%d-%d", processes, writers, b.N)
				var next atomic.Int64
				var group sync.WaitGroup
				for range processes {
					l := open(b, consulstore.Config{Address: c.Addr(), Prefix: prefix})
					for range writers {
						group.Go(func() {
							for {
								i := int(next.Add(1))
								if i > b.N {
									return
								}
								r := ledger.Record{Head: ledger.Version{Digest: ledgertest.Digest(i), Sequence: 1, Origin: "westeurope"}}
								if _, err := l.CompareAndSet(b.Context(), 0, ledgertest.Tag("team/app", fmt.Sprint("t", i)), &r, 0); err != nil {
									b.Error(err)
									return
								}
							}
						})
					}
				}
				group.Wait()
				b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "sets/s")
			})
		}
	}
}

func BenchmarkPage(b *testing.B) {
	c := server(b)
	l := open(b, consulstore.Config{Address: c.Addr()})
	const repositories, tags = 100, 100
	var group sync.WaitGroup
	for r := range repositories {
		group.Go(func() {
			for t := range tags {
				if _, err := l.CompareAndSet(b.Context(), 0, ledgertest.Tag(fmt.Sprint("team/app", r), fmt.Sprint("t", t)), &ledger.Record{}, 0); err != nil {
					b.Error(err)
				}
			}
		})
	}
	group.Wait()
	for b.Loop() {
		var after ledger.Key
		for {
			rows, err := l.Page(b.Context(), "contoso", "", after, 1000)
			if err != nil {
				b.Fatal(err)
			}
			if len(rows) < 1000 {
				break
			}
			after = rows[len(rows)-1].Key
		}
	}
}
