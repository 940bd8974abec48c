package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/latest"
	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// states is what the store tells of replicas at one moment. Immutable.
type states struct {
	*topology.State
	// seeded holds the replicas that have been Ready once.
	seeded map[router.ReplicaKey]content
}

// content is what decides whether clients find in a seeded replica what they look for.
type content struct {
	// Endpoint is where it was Ready: of what stands there, not of the name, it is said.
	Endpoint string `json:"endpoint"`
	// Held is whether the guard holds it: much of it may be gone, or old.
	Held bool `json:"held,omitempty"`
}

// stateWatcher follows the state of replicas. Which of them are seeded, and which of those the guard holds, is kept on local disk
// too: without it a front door that starts while the store is away would send everybody home, or to a replica that was wiped.
type stateWatcher struct {
	store  store.Store
	path   string
	wrote  func(error) // told the outcome of each attempt to write the file: nil if it is on disk
	log    *zap.Logger
	latest latest.Value[states]
	saved  map[router.ReplicaKey]content
	known  chan struct{} // closed once it is known which replicas are seeded, from disk or from the store
}

// newStateWatcher makes a watcher with what is on disk at path.
func newStateWatcher(s store.Store, path string, wrote func(error), log *zap.Logger) *stateWatcher {
	w := &stateWatcher{store: s, path: path, wrote: wrote, log: log, known: make(chan struct{})}
	saved, err := readSeeded(path)
	if err != nil {
		log.Warn("which replicas are seeded is not known until the store can be read", zap.Error(err))
	}
	w.saved = saved
	if len(saved) > 0 {
		close(w.known)
	}
	w.latest.Store(&states{State: &topology.State{}, seeded: saved})
	return w
}

// run follows the store until ctx is done, and returns its error.
func (w *stateWatcher) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.follow(ctx) })
	group.Go(func() error {
		return w.latest.Watch(ctx, func(*states) { w.save(ctx) })
	})
	return group.Wait()
}

// follow keeps the newest states.
func (w *stateWatcher) follow(ctx context.Context) error {
	read := false
	return w.store.Watch(ctx, topology.ReplicaStatesPrefix, func(u store.Update) {
		if read = read || u.Err == nil; !read {
			return
		}
		s := w.parse(u.Tree)
		w.latest.Store(s)
		select {
		case <-w.known:
		default:
			close(w.known)
		}
	})
}

// saveRetry is the pause after a failed attempt to write which replicas are seeded.
const saveRetry = 10 * time.Second

// save writes which replicas are seeded, if that is not what is on disk, until it succeeds: nothing else may change for days.
func (w *stateWatcher) save(ctx context.Context) {
	for tried := false; ; tried = true {
		seeded := w.latest.Load().seeded
		if maps.Equal(seeded, w.saved) {
			if tried {
				w.wrote(nil) // what could not be written is not wanted any more
			}
			return
		}
		err := writeSeeded(w.path, seeded)
		w.wrote(err)
		if err == nil {
			w.saved = seeded
			return
		}
		if !tried {
			w.log.Error("a start without the store will not know which replicas are seeded; trying again", zap.Error(err))
		}
		select {
		case <-time.After(saveRetry):
		case <-ctx.Done():
			return
		}
	}
}

// wait returns when it is known which replicas are seeded, at the latest after limit; its error is that of ctx.
func (w *stateWatcher) wait(ctx context.Context, limit time.Duration) error {
	late := time.NewTimer(limit)
	defer late.Stop()
	select {
	case <-w.known:
	case <-late.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}

func (w *stateWatcher) parse(t store.Tree) *states {
	s := &states{State: topology.ParseState(t), seeded: map[router.ReplicaKey]content{}}
	for _, p := range s.Problems {
		if !slices.Contains(w.latest.Load().Problems, p) {
			w.log.Warn("what was reported or asked of a replica cannot be read", zap.String("key", p.Key), zap.String("reason", p.Reason))
		}
	}
	for key, r := range s.Replications {
		if r.Seeded {
			s.seeded[key] = content{r.Endpoint, r.Held != ""}
		}
	}
	return s
}

// seededReplica is one replica in the file.
type seededReplica struct {
	Registry string `json:"registry"`
	Region   string `json:"region"`
	content
}

// readSeeded reads the file; one that does not exist is empty.
func readSeeded(path string) (map[router.ReplicaKey]content, error) {
	seeded := map[router.ReplicaKey]content{}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return seeded, nil
	}
	var list []seededReplica
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil {
		return seeded, fmt.Errorf("reading %s: %w", path, err)
	}
	for _, r := range list {
		seeded[router.ReplicaKey{Registry: r.Registry, Region: r.Region}] = r.content
	}
	return seeded, nil
}

// writeSeeded replaces the file whole. A loss of power may lose it: then it is written again at the next change.
func writeSeeded(path string, seeded map[router.ReplicaKey]content) error {
	list := make([]seededReplica, 0, len(seeded))
	for k, c := range seeded {
		list = append(list, seededReplica{k.Registry, k.Region, c})
	}
	slices.SortFunc(list, func(a, b seededReplica) int {
		return strings.Compare(a.Registry+"/"+a.Region, b.Registry+"/"+b.Region)
	})
	text, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".seeded.*")
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
