package consul

import (
	"fmt"
	"os"
	"strings"
	"sync"
)

// tokenFile is an ACL token in a file that somebody renews while the daemon runs. Its methods may be called from several
// goroutines.
type tokenFile struct {
	path string

	mu    sync.Mutex
	seen  os.FileInfo // of the file that was read last, usable or not
	token string
}

// get returns the token. A file that cannot be read leaves the one before, which Consul then refuses by name if it is no longer good.
func (f *tokenFile) get() string {
	_ = f.read()
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.token
}

// read reads the file, if it is not the one that was read before.
func (f *tokenFile) read() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.path)
	if err != nil {
		return fmt.Errorf("reading the ACL token: %w", err)
	}
	if f.seen != nil && os.SameFile(info, f.seen) && info.ModTime().Equal(f.seen.ModTime()) && info.Size() == f.seen.Size() {
		return nil
	}
	f.seen = info
	text, err := os.ReadFile(f.path)
	if err != nil {
		return fmt.Errorf("reading the ACL token: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if token == "" {
		return fmt.Errorf("reading the ACL token: %s is empty", f.path)
	}
	f.token = token
	return nil
}
