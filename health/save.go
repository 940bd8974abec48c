package health

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"portolan/router"
)

// saved is one verdict in the file of a warm start.
type saved struct {
	Registry string `json:"registry"`
	Region   string `json:"region"`
	// Place is what was probed: the verdict holds for nothing else.
	Place   string    `json:"place"`
	Healthy bool      `json:"healthy"`
	Since   time.Time `json:"since"`
	// Returned and Relapses are what is known of its flapping.
	Returned bool `json:"returned,omitempty"`
	Relapses int  `json:"relapses,omitempty"`
	// Seen is when a probe last said so.
	Seen time.Time `json:"seen"`
}

type savedKey struct{ registry, region, place string }

// readSaved reads the verdicts that are not older than fresh. No file is no verdict.
func readSaved(path string, fresh time.Duration, now time.Time) (map[savedKey]machine, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading saved verdicts: %w", err)
	}
	var list []saved
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, fmt.Errorf("reading saved verdicts %s: %w", path, err)
	}
	machines := make(map[savedKey]machine, len(list))
	for _, s := range list {
		if age := now.Sub(s.Seen); age < 0 || age > fresh {
			continue
		}
		m := machine{health: router.Unhealthy, since: s.Since, seen: s.Seen, returned: s.Returned, relapses: min(max(s.Relapses, 0), maxRelapses)}
		if s.Healthy {
			m.health = router.Healthy
		}
		machines[savedKey{s.Registry, s.Region, s.Place}] = m
	}
	return machines, nil
}

// writeSaved replaces the file in one step. It is not synced: after a crash of the machine the verdicts are too old anyway.
func writeSaved(path string, list []saved) error {
	data, err := json.Marshal(list)
	if err != nil {
		return fmt.Errorf("saving verdicts: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("saving verdicts: %w", err)
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("saving verdicts: %w", err), os.Remove(f.Name()))
	}
	return nil
}
