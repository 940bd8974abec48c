package daemon

import (
	"context"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"portolan/store"
	"portolan/store/bolt"
	"portolan/topology"
)

// away is a store of which the first lists fail, as when Consul elects a leader.
type away struct {
	store.Store
	fails atomic.Int32
}

func (s *away) List(ctx context.Context, prefix string) (store.Tree, error) {
	if s.fails.Add(-1) >= 0 {
		return store.Tree{}, store.ErrUnavailable
	}
	return s.Store.List(ctx, prefix)
}

// That the store could not be read when the topology changed does not hide in what it differs from the file.
func TestDriftIsLookedForAgain(t *testing.T) {
	t.Parallel()
	db, err := bolt.OpenDB(filepath.Join(t.TempDir(), "portolan.db"))
	if err != nil {
		t.Fatal(err)
	}
	s := bolt.New(db)
	defer s.Close()
	failing := &away{Store: s}
	failing.fails.Store(1)
	d := &daemon{log: zap.NewNop(), keeper: topology.NewKeeper(s, topology.KeeperOptions{}), editor: topology.NewEditor(failing, topology.EditorOptions{}),
		declared: &topology.Document{Registries: []topology.RegistryDocument{{Name: "contoso", Home: "westus"}}}}
	d.config.Store.Bolt = "portolan.db" // there is nothing to apply
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- d.keeper.Run(ctx) }()
	go func() { ended <- d.followTopologyFile(ctx) }()
	defer func() { cancel(); <-ended; <-ended }()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		d.mu.Lock()
		n := len(d.drift)
		d.mu.Unlock()
		if n > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no drift is told of")
		}
	}
}
