package store

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

const (
	// MaxKey is the longest key, in bytes.
	MaxKey = 512
	// MaxCommit is the most that the keys and values of one Commit may add up to, in bytes. Consul takes 512 KiB of
	// JSON with the values in base64 (txn_max_req_len); half of it leaves room for both.
	MaxCommit = 256 << 10
)

// CheckKey says what is wrong with key, if anything. Segments must be printable and not empty, "." or "..", since a
// key is also a path of Consul's HTTP API, where those would name another key.
func CheckKey(key string) error {
	switch {
	case key == "":
		return errors.New("the key is empty")
	case len(key) > MaxKey:
		return fmt.Errorf("the key %.40q... is %d bytes long, more than %d", key, len(key), MaxKey)
	case !utf8.ValidString(key) || strings.ContainsFunc(key, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return fmt.Errorf("the key %q has characters that cannot be printed", key)
	}
	for segment := range strings.SplitSeq(key, "/") {
		if segment == "" || segment == "." || segment == ".." {
			return fmt.Errorf("the key %q has the segment %q", key, segment)
		}
	}
	return nil
}

// CheckPrefix says what is wrong with a prefix for List and Watch, if anything.
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	dir, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf("the prefix %q does not end with a slash", prefix)
	}
	return CheckKey(dir)
}

// CheckOps says what is wrong with the operations of a Commit, if anything, before an engine is asked.
func CheckOps(ops []Op) error {
	if len(ops) == 0 {
		return errors.New("a transaction needs an operation")
	}
	if len(ops) > MaxOps {
		return fmt.Errorf("%d operations in one transaction, more than %d", len(ops), MaxOps)
	}
	size := 0
	for _, op := range ops {
		if op.Verb < VerbPut || op.Verb > VerbCheck {
			return fmt.Errorf("the operation on %q has the unknown verb %d", op.Key, op.Verb)
		}
		if err := CheckKey(op.Key); err != nil {
			return err
		}
		size += len(op.Key) + len(op.Value)
	}
	if size > MaxCommit {
		return fmt.Errorf("%d bytes in one transaction, more than %d", size, MaxCommit)
	}
	return nil
}
