// Package events hears what happened at the replicas: it takes the notifications that registries send, and keeps them
// until the replicator has looked.
//
// There are three things here. A Format reads one kind of envelope; a Handler is the HTTP server that replicas
// post to, each with a token of its own; the Spool is the durable, bounded, folding queue between the two and the
// replicator.
//
// An event is a hint and nothing more: it may be forged, late, doubled, reordered or missing. So this package decides
// nothing about versions, never follows a URL in an event, and asks no registry anything. What it promises is that a
// registry that was answered with success will be looked at: the event, or a mark that says "look at all of this
// tag, this repository, this replica", has been on disk before the answer.
package events

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Action says what happened to a manifest or a tag.
type Action string

// The actions that matter here. They stand in stored records: never change them.
const (
	// Push: a manifest was put, under a tag or by its digest.
	Push Action = "push"
	// Delete: a tag (Tag set, Digest empty), a manifest (Digest set, Tag empty) or a whole repository (both empty)
	// was deleted.
	Delete Action = "delete"
)

// Event is one thing that a replica says has happened. Every field but Received was written by others: it has the right
// form, and may still be false.
type Event struct {
	// ID is the registry's own name for the event; empty if it gave none.
	ID     string `json:"id,omitempty"`
	Action Action `json:"a"`
	// Repository is the name in the registry, with the replica's prefix taken off. It is left out of the stored form,
	// where the record has it.
	Repository string `json:"-"`
	// Tag is empty for a manifest pushed or deleted by digest.
	Tag string `json:"t,omitempty"`
	// Digest is the manifest's digest; empty for the delete of a tag. A delete by digest may also be that of a blob: CNCF
	// distribution's envelopes do not tell the two apart.
	Digest string `json:"d,omitempty"`
	// MediaType is the manifest's; empty for deletes.
	MediaType string `json:"m,omitempty"`
	// Time is when it happened by the registry's clock; zero if the event had no usable time.
	Time time.Time `json:"w"`
	// WriteID is the write that Portolan itself made, from the User-Agent; empty for everybody else's.
	WriteID string `json:"i,omitempty"`
	// UserAgent and Actor tell operators who did it: at most 128 printable ASCII bytes each.
	UserAgent string `json:"u,omitempty"`
	Actor     string `json:"n,omitempty"`
	// Received is when Portolan got it, by its own clock.
	Received time.Time `json:"r"`
}

// Reference is what the event is about within its repository: the tag, else the digest, else (the whole repository) "".
func (e Event) Reference() string {
	if e.Tag != "" {
		return e.Tag
	}
	return e.Digest
}

var (
	errAction = errors.New("neither a push nor a delete")
	errID     = errors.New("event id is longer than 256 bytes")

	// The grammars are the OCI distribution specification's (v1.1, "Pulling manifests"). go-containerregistry's own checks
	// look at characters alone and would let "a/../b" and the tag ".." through, which are paths, not names.
	repositoryGrammar = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagGrammar        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
)

// maxID bounds an event's id: registries send UUIDs, of 36 bytes.
const maxID = 256

// Validate reports whether the names in e are names: what could not be asked for in a registry is not worth keeping.
// The error quotes nothing longer than a name may be.
func (e Event) Validate() error {
	if e.Action != Push && e.Action != Delete {
		return errAction
	}
	if len(e.ID) > maxID {
		return errID
	}
	if err := checkRepository(e.Repository); err != nil {
		return err
	}
	if e.Tag != "" && !tagGrammar.MatchString(e.Tag) {
		return fmt.Errorf("%q is not a tag", clip(e.Tag, 128))
	}
	if e.Digest != "" {
		if _, err := v1.NewHash(e.Digest); err != nil {
			return fmt.Errorf("%q is not a digest", clip(e.Digest, 140))
		}
	}
	if e.Action == Push && e.Digest == "" {
		return errors.New("a push without a digest")
	}
	return nil
}

func checkRepository(repository string) error {
	if !repositoryGrammar.MatchString(repository) {
		return fmt.Errorf("%q is not a repository name", clip(repository, 255))
	}
	// A host of its own stands before it, because a first component with a dot would be taken for one.
	if _, err := name.NewRepository("registry.invalid/" + repository); err != nil {
		return fmt.Errorf("%q is not a repository name", clip(repository, 255))
	}
	return nil
}

// clip makes foreign text fit for a log line and a small record: printable ASCII, at most n bytes.
func clip(s string, n int) string {
	if len(s) > n {
		s = s[:n]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}
