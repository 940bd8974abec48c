package topology

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// lastGoodVersion is the form of the file. A reader takes its own version only.
const lastGoodVersion = 1

// maxLastGood bounds the file: far more than any store's tree.
const maxLastGood = 64 << 20

// lastGood is what is on local disk, so that the front door starts while the store is away.
type lastGood struct {
	Version int       `json:"version"`
	Values  Values    `json:"values"`
	Changed time.Time `json:"changed"`
	// Used are the revisions of the confirmations that let an edit pass: each does so once.
	Used map[string]uint64 `json:"used,omitempty"`
}

// readLastGood reads the file; one that does not exist is no error and gives nil.
func readLastGood(path string) (*lastGood, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the last good topology: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxLastGood+1))
	if err != nil {
		return nil, fmt.Errorf("reading the last good topology: %w", err)
	}
	if len(text) > maxLastGood {
		return nil, fmt.Errorf("reading the last good topology: %s is larger than %d bytes", path, maxLastGood)
	}
	var g lastGood
	if err := json.Unmarshal(text, &g); err != nil {
		return nil, fmt.Errorf("reading the last good topology: %s: %w", path, err)
	}
	if g.Version != lastGoodVersion {
		return nil, fmt.Errorf("reading the last good topology: %s has version %d, this program knows %d", path, g.Version, lastGoodVersion)
	}
	return &g, nil
}

// write replaces the file: whoever reads it sees the old or the new one, also after a loss of power. Only the owner may
// read it, since endpoints and references tell about the inside of a network.
func (g lastGood) write(path string) (err error) {
	g.Version = lastGoodVersion
	text, err := json.Marshal(g)
	if err != nil {
		return fmt.Errorf("writing the last good topology: %w", err)
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*") // CreateTemp makes it 0600
	if err != nil {
		return fmt.Errorf("writing the last good topology: %w", err)
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
			err = fmt.Errorf("writing the last good topology: %w", err)
		}
	}()
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
