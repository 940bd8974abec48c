package replicator

import (
	"context"
	"slices"
	"time"

	"portolan/replicator/ledger"
)

// Conflict is a version that lost against a concurrent one and is kept under a tag of its own, in every replica.
type Conflict struct {
	Repository string `json:"repository"`
	// Tag is what was pushed to, Region where, and Digest what lost.
	Tag    string `json:"tag"`
	Region string `json:"region"`
	Digest string `json:"digest"`
	// KeptAs is the tag that has Digest from Since on, and until Until at least.
	KeptAs string    `json:"kept_as"`
	Since  time.Time `json:"since"`
	Until  time.Time `json:"until"`
	// Current is the digest that Tag has now; empty if it was deleted.
	Current string `json:"current,omitempty"`
}

// Conflicts lists up to limit of the conflicts that are kept of a registry, the newest first.
func (r *Replicator) Conflicts(ctx context.Context, registry string, limit int) ([]Conflict, error) {
	reg, err := r.registry(registry)
	if err != nil {
		return nil, err
	}
	return reg.engine.conflicts(ctx, limit)
}

func (e *engine) conflicts(ctx context.Context, limit int) ([]Conflict, error) {
	var found []Conflict
	err := e.rows(ctx, "", func(row ledger.Row) bool {
		if head := row.Record.Head; row.Record.ConflictOf != "" && !head.Tombstone() {
			found = append(found, Conflict{Repository: row.Key.Repository, Tag: row.Record.ConflictOf, Region: head.Origin, Digest: head.Digest,
				KeptAs: row.Key.Reference, Since: head.Time, Until: head.Time.Add(retention)})
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	slices.SortStableFunc(found, func(a, b Conflict) int { return b.Since.Compare(a.Since) })
	found = found[:min(limit, len(found))]
	for i := range found {
		row, err := e.get(ctx, ledger.Key{Registry: e.registry, Repository: found[i].Repository, Kind: ledger.Tag, Reference: found[i].Tag})
		if err != nil {
			return nil, err
		}
		found[i].Current = row.Record.Head.Digest
	}
	return found, nil
}
