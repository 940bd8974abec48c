package topology

import (
	"errors"
	"fmt"

	"portolan/strict"
)

// The kinds of errors of documents and edits: errors.Is tells them.
var (
	// ErrInvalid: what was asked for is wrong in itself; an *InvalidError says where and why.
	ErrInvalid = strict.ErrInvalid
	// ErrNotFound: the registry or replica does not exist.
	ErrNotFound = errors.New("not found")
	// ErrExists: the registry or replica exists already.
	ErrExists = errors.New("exists already")
	// ErrConflict: somebody else kept changing the topology meanwhile; trying again helps.
	ErrConflict = errors.New("conflict")
	// ErrDeleting: the replica is being deleted, which cannot be called off.
	ErrDeleting = errors.New("being deleted")
	// ErrRefused: well formed, but it would do harm; the message says what and what to do instead.
	ErrRefused = errors.New("refused")
)

// A Fault is one thing wrong with a document or, its path then a key, with an edit of the store. An InvalidError is
// everything that is wrong with one.
type (
	Fault        = strict.Fault
	InvalidError = strict.InvalidError
)

// editError is a message of a kind.
type editError struct {
	kind    error
	message string
}

func (e *editError) Error() string { return e.message }
func (e *editError) Unwrap() error { return e.kind }

func failf(kind error, format string, args ...any) error {
	return &editError{kind, fmt.Sprintf(format, args...)}
}
