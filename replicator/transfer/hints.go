package transfer

import (
	"container/list"
	"slices"
	"sync"
)

// hintRepositories is how many places of one blob are remembered: one is enough to mount from, the others are for when it lies.
const hintRepositories = 4

// hints remembers in which repositories of a target a blob probably is, for the blobs used last.
type hints struct {
	mu    sync.Mutex
	limit int
	order *list.List // of *hint, the last used in front
	byKey map[string]*list.Element
}

type hint struct {
	digest string
	// repositories, the newest first. Never changed in place.
	repositories []string
}

func newHints(limit int) *hints {
	return &hints{limit: limit, order: list.New(), byKey: map[string]*list.Element{}}
}

func (h *hints) add(digest, repository string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, found := h.byKey[digest]
	if !found {
		e = h.order.PushFront(&hint{digest: digest})
		h.byKey[digest] = e
		if h.order.Len() > h.limit {
			oldest := h.order.Back()
			delete(h.byKey, oldest.Value.(*hint).digest)
			h.order.Remove(oldest)
		}
	}
	h.order.MoveToFront(e)
	v := e.Value.(*hint)
	if slices.Contains(v.repositories, repository) {
		return
	}
	v.repositories = append([]string{repository}, v.repositories[:min(len(v.repositories), hintRepositories-1)]...)
}

// get returns the repositories, newest first; the slice is not to be changed.
func (h *hints) get(digest string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	e, found := h.byKey[digest]
	if !found {
		return nil
	}
	h.order.MoveToFront(e)
	return e.Value.(*hint).repositories
}

// remove drops one place.
func (h *hints) remove(digest, repository string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e, found := h.byKey[digest]; found {
		v := e.Value.(*hint)
		v.repositories = slices.DeleteFunc(slices.Clone(v.repositories), func(r string) bool { return r == repository })
	}
}

// drop drops all places.
func (h *hints) drop(digest string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if e, found := h.byKey[digest]; found {
		delete(h.byKey, digest)
		h.order.Remove(e)
	}
}

func (h *hints) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.byKey)
	h.order.Init()
}
