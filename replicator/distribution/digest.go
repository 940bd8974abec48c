package distribution

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
)

// NewHash returns the hash that a digest is made with: sha256 or sha512, the registered algorithms of the OCI Image
// Specification, "Digests". Any other, or a malformed digest, is an error of kind ErrInvalid.
func NewHash(digest string) (hash.Hash, error) {
	algorithm, encoded, found := strings.Cut(digest, ":")
	var h hash.Hash
	switch algorithm {
	case "sha256":
		h = sha256.New()
	case "sha512":
		h = sha512.New()
	}
	if !found || h == nil || len(encoded) != 2*h.Size() || strings.Trim(encoded, "0123456789abcdef") != "" {
		return nil, &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%s is not a sha256 or sha512 digest", clean(fmt.Sprintf("%q", digest), 160))}
	}
	return h, nil
}

// DigestOf formats the sum of h, which NewHash made for a digest of the same algorithm.
func DigestOf(h hash.Hash) string {
	algorithm := "sha256"
	if h.Size() == sha512.Size {
		algorithm = "sha512"
	}
	return algorithm + ":" + hex.EncodeToString(h.Sum(nil))
}

// Digest is the sha256 digest of b.
func Digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// IsDigest reports whether a reference is a digest rather than a tag: tags have no colon.
func IsDigest(reference string) bool { return strings.Contains(reference, ":") }

// verify checks b against a digest.
func verify(b []byte, digest string) error {
	h, err := NewHash(digest)
	if err != nil {
		return err
	}
	h.Write(b)
	if got := DigestOf(h); got != digest {
		return &Error{Kind: ErrCorrupt, Message: fmt.Sprintf("wanted %s, got %s (%d bytes)", digest, got, len(b))}
	}
	return nil
}
