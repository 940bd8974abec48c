package transfer

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

const (
	// journalLife is how long an upload is remembered that nobody goes on with. Registries purge what is older, most after a week.
	journalLife = 24 * time.Hour
	// maxJournal bounds the uploads that are remembered, by more than what many targets have under way.
	maxJournal = 256
)

// Journal remembers in a file where the uploads of large blobs stand, so that a process that was killed goes on with them when it is
// started again. All that it says is a hint: whether a session still stands, and where, the registry is asked. So the file is not
// synced to disk, and one that cannot be understood is no error. Its methods may be called from several goroutines.
type Journal struct {
	path string

	mu      sync.Mutex
	uploads map[place]standing
}

// place is what an upload is of, and where.
type place struct {
	// Target is the name of the target: see Target.Remember.
	Target     string `json:"target"`
	Repository string `json:"repository"`
	Digest     string `json:"digest"`
}

// standing is where an upload stands.
type standing struct {
	place
	// Location names the session. It may hold a signature.
	Location string `json:"location"`
	// Hashes are the states of the hash at some of the last offsets, in ascending order: the registry may have less than what was read.
	Hashes []hashed  `json:"hashes"`
	Since  time.Time `json:"since"`
}

// hashed is the state of a hash of the bytes before an offset.
type hashed struct {
	Offset int64  `json:"offset"`
	State  []byte `json:"state"`
}

// OpenJournal reads the journal in the file path, if there is one. Its folder must exist. The error is that of reading it.
func OpenJournal(path string) (*Journal, error) {
	j := &Journal{path: path, uploads: make(map[place]standing)}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading which uploads were under way: %w", err)
	}
	var all []standing
	if json.Unmarshal(text, &all) != nil {
		return j, nil // the machine lost its power
	}
	for _, s := range all {
		if time.Since(s.Since) < journalLife {
			j.uploads[s.place] = s
		}
	}
	return j, nil
}

// find returns where an upload stands, as far as is known.
func (j *Journal) find(p place) (standing, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	s, ok := j.uploads[p]
	return s, ok
}

// put remembers where an upload stands now.
func (j *Journal) put(s standing) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	s.Since = time.Now().UTC()
	j.uploads[s.place] = s
	return j.store()
}

// drop forgets an upload that came to its end.
func (j *Journal) drop(p place) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, ok := j.uploads[p]; !ok {
		return nil
	}
	delete(j.uploads, p)
	return j.store()
}

// store writes the newest that are not too old, so that a kill leaves the old file or the new one. The caller holds mu.
func (j *Journal) store() (err error) {
	all := make([]standing, 0, len(j.uploads))
	for p, s := range j.uploads {
		if time.Since(s.Since) >= journalLife {
			delete(j.uploads, p)
			continue
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b standing) int { return cmp.Or(b.Since.Compare(a.Since), cmp.Compare(a.Location, b.Location)) })
	for len(all) > maxJournal {
		delete(j.uploads, all[len(all)-1].place)
		all = all[:len(all)-1]
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("remembering which uploads are under way: %w", err)
		}
	}()
	text, err := json.Marshal(all)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(j.path), filepath.Base(j.path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // fails if all went well
	_, err = f.Write(text)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), j.path)
}
