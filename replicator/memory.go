package replicator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"

	"portolan/store"
	"portolan/topology"
)

// memory is what a replicator remembers of the ledger in a file that does not go back when the ledger does: the highest
// position of the feed that it saw. A ledger that stands before it was lost or restored from a backup; what it says of the
// replicas is not to be believed, and would roll tags back. Then a new epoch begins: every replica gets a new incarnation,
// and a baseline, home first.
//
// The epoch's name stands in the store, so that of several replicators one begins it and the others join.
type memory struct {
	path string // empty: remembered only while the process runs

	mu     sync.Mutex
	mark   mark
	stored time.Time // when mark was last written
}

type mark struct {
	Epoch    string `json:"epoch"`
	Position uint64 `json:"position"`
}

// epochKey holds the name of the ledger's epoch.
const epochKey = topology.StatePrefix + "replicator/epoch"

// errRolledBack says that the ledger stands before a position that was seen.
var errRolledBack = errors.New("the ledger was lost or rolled back")

// recall reads the file, if there is one.
func recall(path string) (*memory, error) {
	m := &memory{path: path}
	if path == "" {
		return m, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return m, nil
	}
	if err == nil {
		err = json.Unmarshal(text, &m.mark)
	}
	if err != nil {
		return nil, fmt.Errorf("reading what is remembered of the ledger in %s: %w", path, err)
	}
	return m, nil
}

// rememberEvery is how often the position is written at most. A ledger that lost less than that long before a crash of the
// replicator is not told from one that lost nothing.
const rememberEvery = time.Second

// saw remembers a position.
func (m *memory) saw(position uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mark.Position = max(m.mark.Position, position)
	if time.Since(m.stored) < rememberEvery {
		return nil
	}
	return m.store()
}

// set replaces what is remembered.
func (m *memory) set(to mark) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mark = to
	return m.store()
}

func (m *memory) epoch() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mark.Epoch
}

func (m *memory) position() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mark.Position
}

// flush writes what is remembered.
func (m *memory) flush() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.store()
}

// store writes the file so that a crash leaves the old one or the new one. The caller holds mu.
func (m *memory) store() (err error) {
	m.stored = time.Now()
	if m.path == "" {
		return nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("remembering the ledger's position: %w", err)
		}
	}()
	text, err := json.Marshal(m.mark)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(m.path), filepath.Base(m.path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails if all went well
	if _, err = f.Write(text); err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), m.path)
}

// agree learns the epoch, and begins another if the ledger is older than what is remembered of it.
func (r *Replicator) agree(ctx context.Context) error {
	head, err := r.options.Ledger.Head(ctx)
	if err != nil {
		return err
	}
	entry, err := r.options.Store.Get(ctx, epochKey)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("reading the ledger's epoch: %w", err)
	}
	older := entry.Value == r.memory.epoch() && head.Position < r.memory.position()
	if entry.Value == "" || older {
		if older && entry.Value != "" {
			r.options.Log.Error("the ledger is older than what was seen of it: it was lost or restored. Every replica gets a new baseline, home first",
				zap.Uint64("position", head.Position), zap.Uint64("seen", r.memory.position()))
		}
		entry.Value = newID()
		if _, err := r.options.Store.Commit(ctx, store.PutIf(epochKey, entry.Value, entry.Revision)); err != nil {
			return fmt.Errorf("beginning an epoch of the ledger: %w", err)
		}
	}
	return r.memory.set(mark{Epoch: entry.Value, Position: head.Position})
}
