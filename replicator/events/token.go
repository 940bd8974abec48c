package events

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// TokenSource knows the token of each replica. It is safe for concurrent use.
type TokenSource interface {
	// Token returns the secret that the replica must show; false if there is no such replica.
	Token(registry, region string) (secret string, ok bool)
}

// keySize is the size of an installation key: that of the hash, as RFC 2104, section 3, advises.
const keySize = sha256.Size

// Key is the secret of an installation, of which the tokens of its replicas are made, so that none of them is
// stored.
type Key struct{ secret [keySize]byte }

// LoadKey reads the key in the file path, or makes a random one there, readable by its owner alone, if there is none. A
// file that others may read is refused.
func LoadKey(path string) (Key, error) {
	k, err := readKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if err = createKey(path); err == nil {
			k, err = readKey(path)
		}
	}
	if err != nil {
		return Key{}, fmt.Errorf("loading the key of the event tokens: %w", err)
	}
	return k, nil
}

func readKey(path string) (Key, error) {
	f, err := os.Open(path)
	if err != nil {
		return Key{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Key{}, err
	}
	if !info.Mode().IsRegular() {
		return Key{}, fmt.Errorf("%q is not a regular file", path)
	}
	// A group may read it: that is how systemd's credentials and Kubernetes's secrets are handed to a service.
	if info.Mode().Perm()&0o027 != 0 {
		return Key{}, fmt.Errorf("%q can be read by everybody, or written by its group (mode %04o): make it 0600 or 0440", path, info.Mode().Perm())
	}
	// Hexadecimal and a line break, so that it can be carried to another machine by hand.
	var text [2*keySize + 2]byte
	n := 0
	for n < len(text) {
		m, err := f.Read(text[n:])
		n += m
		if err != nil {
			break
		}
	}
	var k Key
	for n > 0 && (text[n-1] == '\n' || text[n-1] == '\r') {
		n--
	}
	if n != 2*keySize {
		return Key{}, fmt.Errorf("%q does not hold a key: %d hexadecimal digits are expected", path, 2*keySize)
	}
	if _, err := hex.Decode(k.secret[:], text[:n]); err != nil {
		return Key{}, fmt.Errorf("%q does not hold a key: %d hexadecimal digits are expected", path, 2*keySize)
	}
	return k, nil
}

// createKey writes a new key beside path and links it there: whoever comes second gets the first one's, and nobody reads
// half of one.
func createKey(path string) error {
	var secret [keySize]byte
	rand.Read(secret[:])                                        // never fails: crypto/rand, since Go 1.24
	f, err := os.CreateTemp(filepath.Dir(path), ".event-key-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(hex.EncodeToString(secret[:]) + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncFolder(filepath.Dir(path))
}

// Token is the token of a replica: HMAC-SHA-256 (RFC 2104) of "registry/region" under the key, in hexadecimal.
func (k Key) Token(registry, region string) string {
	h := hmac.New(sha256.New, k.secret[:])
	h.Write([]byte(registry + "/" + region))
	return hex.EncodeToString(h.Sum(nil))
}

// Tokens is the source for the replicas that known says there are.
func (k Key) Tokens(known func(registry, region string) bool) TokenSource {
	return derived{k, known}
}

type derived struct {
	key   Key
	known func(registry, region string) bool
}

func (d derived) Token(registry, region string) (string, bool) {
	// Made in any case: the time it takes must not tell which replicas there are.
	return d.key.Token(registry, region), d.known(registry, region)
}
