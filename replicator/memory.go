package replicator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"portolan/store"
	"portolan/topology"
)

// memory is what a replicator remembers of the ledger in a file that does not go back when the ledger does. A ledger that was
// lost or restored from a backup is not to be believed in what it says of the replicas, and would roll tags back. Then a new
// epoch begins: every replica gets a new incarnation, and a baseline, home first.
//
// Two things tell. The ledger stands before the highest position of the feed that was seen. But other processes, which had not
// seen as much, may have written since, so that it stands behind that position again. Hence the witness: a time that the
// process keeps in the store, which goes back together with the ledger. Nobody else writes it, so nothing makes up for it.
//
// The epoch's name stands in the store, so that of several replicators one begins it and the others join. A name that was left behind
// never comes again but with a store that was restored to that time: that tells, too.
type memory struct {
	path string // empty: remembered only while the process runs

	mu     sync.Mutex
	mark   mark
	stored time.Time // when mark was last written
}

type mark struct {
	Epoch    string `json:"epoch"`
	Position uint64 `json:"position"`
	// Name is that of the witness. Witness is what was written there last; the store holds that, or something later.
	Name    string    `json:"name,omitempty"`
	Witness time.Time `json:"witness,omitzero"`
	// Former are the epochs before, the newest last: the last maxFormer of them.
	Former []string `json:"former,omitempty"`

	attested uint64 // the position when this process wrote the witness last
}

const (
	// agreements is the room in which the replicators of an installation agree.
	agreements = topology.StatePrefix + "replicator/"
	// epochKey holds the name of the ledger's epoch.
	epochKey = agreements + "epoch"
	// witnesses holds the witness of each process that has a memory, by its name: a time (RFC 3339).
	witnesses = agreements + "witnesses/"
)

// witnessLife is how long a witness is kept that nobody renews. A process that comes back later goes by the position alone.
const witnessLife = 90 * 24 * time.Hour

// maxFormer bounds the former epochs that are remembered: each is a loss of the ledger, or its restoration from a backup.
const maxFormer = 100

// leave returns next, the mark that takes the place of m, with the epochs that are left behind.
func (m mark) leave(next mark) mark {
	next.Former = m.Former
	if m.Epoch != "" && next.Epoch != m.Epoch {
		next.Former = append(slices.Clone(m.Former), m.Epoch)
		next.Former = next.Former[max(0, len(next.Former)-maxFormer):]
	}
	return next
}

// outlived reports whether a store is older than the witness: it has forgotten what the process wrote there.
func (m mark) outlived(tree store.Tree) bool {
	return witnessAt(tree, m.Name).Before(m.Witness) && time.Since(m.Witness) < witnessLife
}

// witnessAt is the witness in a store; the zero time if there is none.
func witnessAt(tree store.Tree, name string) time.Time {
	entry, _ := tree.Get(witnesses + name)
	at, err := time.Parse(time.RFC3339Nano, entry.Value)
	if err != nil {
		return time.Time{}
	}
	return at
}

// errRolledBack says that the ledger is older than what was seen of it, or that another process found that.
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

// witnessed remembers a witness that is in the store, written when the ledger stood at a position.
func (m *memory) witnessed(at time.Time, position uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.mark.Witness, m.mark.attested = at, position
	return m.store()
}

func (m *memory) last() mark {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mark
}

func (m *memory) epoch() string { return m.last().Epoch }

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
	known := r.memory.last()
	head, err := r.options.Ledger.Head(ctx)
	if err != nil {
		return err
	}
	tree, err := r.options.Store.List(ctx, agreements)
	if err != nil {
		return fmt.Errorf("reading the ledger's epoch: %w", err)
	}
	epoch, _ := tree.Get(epochKey)
	older := epoch.Value == known.Epoch && (head.Position < known.Position || known.outlived(tree)) || slices.Contains(known.Former, epoch.Value)
	next := mark{Epoch: epoch.Value, Position: head.Position, Name: known.Name}
	if next.Name == "" {
		next.Name = newID()
	}
	if epoch.Value == "" || older {
		if older && epoch.Value != "" {
			r.options.Log.Error("the ledger is older than what was seen of it: it was lost or restored. Every replica gets a new baseline, home first",
				zap.Uint64("position", head.Position), zap.Uint64("seen", known.Position),
				zap.Time("witness", witnessAt(tree, known.Name)), zap.Time("witnessed", known.Witness))
		}
		next.Epoch = newID()
		if _, err := r.options.Store.Commit(ctx, store.PutIf(epochKey, next.Epoch, epoch.Revision)); err != nil {
			return fmt.Errorf("beginning an epoch of the ledger: %w", err)
		}
	}
	if next.Epoch == known.Epoch {
		next.Witness = known.Witness
	}
	return r.memory.set(known.leave(next))
}

const (
	// attestEvery is how often the witness is looked at, and renewed if the ledger has moved. A backup that was made after it
	// was renewed last is not told from what came after.
	attestEvery = 5 * time.Second
	// attestTime bounds the last look, when the process ends.
	attestTime = 2 * time.Second
)

// attest checks that the store still knows the witness, and renews it if the ledger has moved since. errRolledBack: it does not, or
// another process began a new epoch.
func (r *Replicator) attest(ctx context.Context) error {
	known := r.memory.last() // before the store is read, which may know more by then, but not less
	tree, err := r.options.Store.List(ctx, agreements)
	if err != nil {
		return fmt.Errorf("reading whether the ledger was rolled back: %w", err)
	}
	if epoch, _ := tree.Get(epochKey); epoch.Value != known.Epoch || known.outlived(tree) {
		return errRolledBack
	}
	if known.Position == known.attested && !known.Witness.IsZero() {
		return nil
	}
	now := time.Now().UTC().Truncate(time.Millisecond)
	if before := witnessAt(tree, known.Name); !now.After(before) {
		now = before.Add(time.Millisecond) // the clock was set back
	}
	entry, _ := tree.Get(witnesses + known.Name)
	ops := []store.Op{store.PutIf(witnesses+known.Name, now.Format(time.RFC3339Nano), entry.Revision)}
	for _, e := range tree.Entries {
		name, ok := strings.CutPrefix(e.Key, witnesses)
		if ok && name != known.Name && time.Since(witnessAt(tree, name)) > witnessLife && len(ops) < store.MaxOps {
			ops = append(ops, store.DeleteIf(e.Key, e.Revision))
		}
	}
	if _, err := r.options.Store.Commit(ctx, ops...); err != nil {
		return fmt.Errorf("renewing the witness of the ledger: %w", err)
	}
	return r.memory.witnessed(now, known.Position)
}

// attestAll attests until ctx is done; fail is told errRolledBack.
func (r *Replicator) attestAll(ctx context.Context, fail context.CancelCauseFunc) {
	for {
		err := r.attest(ctx)
		switch {
		case errors.Is(err, errRolledBack):
			fail(err)
			return
		case err != nil && ctx.Err() == nil:
			r.options.Log.Warn("should the ledger be lost, that may go unnoticed", zap.Error(err))
		}
		if !sleep(ctx, jitter(attestEvery)) {
			return
		}
	}
}
