package transfer

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"sync"
	"time"

	"portolan/replicator/distribution"
)

const (
	// journalLife is how long an upload is remembered that nobody goes on with. Registries purge what is older, most after a week.
	journalLife = 24 * time.Hour
	// maxJournal bounds the uploads that are remembered, by more than what many targets have under way.
	maxJournal = 256
	// maxJournalSize is more than that takes.
	maxJournalSize = 4 << 20
)

// Journal remembers in a file where the uploads of large blobs stand, so that a process that was killed goes on with them when it is
// started again, and the next copy with those that broke off because somebody wanted to be left alone. All that it says is a hint: whether a session still stands, and where, the registry is asked. So the file is not
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

// of is whether it is the session's: its path stays as it is, whatever the registry adds with each answer. Should it not, a session that
// is no more is asked for once.
func (s standing) of(session *distribution.Upload) bool {
	then, err1 := url.Parse(s.Location)
	now, err2 := url.Parse(session.Location())
	return err1 == nil && err2 == nil && then.Host == now.Host && then.Path == now.Path
}

// hashed is the state of a hash of the bytes before an offset.
type hashed struct {
	Offset int64  `json:"offset"`
	State  []byte `json:"state"`
}

// OpenJournal reads the journal in the file path, if there is one. Its folder must exist, and be no other process's. A file that cannot be
// read begins anew: the error says why, and the Journal is good all the same.
func OpenJournal(path string) (*Journal, error) {
	j := &Journal{path: path, uploads: make(map[place]standing)}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return j, nil
	}
	if err != nil {
		return j, fmt.Errorf("reading which uploads were under way: %w", err)
	}
	defer f.Close()
	var all []standing
	if err := json.NewDecoder(io.LimitReader(f, maxJournalSize)).Decode(&all); err != nil { // the machine lost its power, perhaps
		return j, fmt.Errorf("reading which uploads were under way: %s: %w", path, err)
	}
	for _, s := range all {
		if s.remembered() {
			j.uploads[s.place] = s
		}
	}
	return j, nil
}

// remembered is whether it is not too long ago; nor to come, as it is when a clock stood ahead.
func (s standing) remembered() bool {
	age := time.Since(s.Since)
	return age >= 0 && age < journalLife
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
		if !s.remembered() {
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
	next := j.path + ".new"
	if err := os.WriteFile(next, text, 0o600); err != nil {
		return err
	}
	return os.Rename(next, j.path)
}
