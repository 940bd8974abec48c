// Package ledger keeps the versions: which digest each tag has, since when, pushed where, and which replica
// has not applied it yet.
//
// Its contract is narrow on purpose, so that a large registry does not hurt the engine below it: get a record,
// compare-and-set a record, page through them, follow the changes from a cursor. Nothing is ever watched or listed
// whole. ledger/bolt is the default; ledger/consul serves several machines. No type of an engine leaks through.
//
// The package decides nothing: what an observation makes of a record is replicator/version's business.
package ledger

import (
	"context"
	"errors"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

var (
	// ErrNotFound says that there is no record of that key.
	ErrNotFound = errors.New("no such record")
	// ErrConflict says that the record changed meanwhile: read it again and decide again.
	ErrConflict = errors.New("record changed meanwhile")
	// ErrGeneration says that the writer may not know of all replicas that there are: see Generation.
	ErrGeneration = errors.New("there are replicas that the writer may not know of")
	// ErrUnavailable says that the ledger cannot be asked now. The outcome of a write that ends with it is unknown.
	ErrUnavailable = errors.New("ledger unavailable")
	// ErrGap says that the feed no longer holds the changes after that cursor: page through the records instead,
	// and go on from Head's cursor taken before.
	ErrGap = errors.New("cursor is older than the feed")
	// ErrSchema says that a record was written by a Portolan that is newer than this one, or too old for it. It is no damage:
	// one that fits can read the record.
	ErrSchema = errors.New("record has another schema")
)

// Kind says what a key names in its repository.
type Kind string

// The kinds of keys. They stand in stored keys: never change them.
const (
	// Tag is a register pointing at a manifest.
	Tag Kind = "t"
	// Manifest is a member of the repository's set of manifests: one that is there in its own right (a push of that
	// digest was seen), whatever tags say.
	Manifest Kind = "m"
)

// Key names a record.
type Key struct {
	Registry   string
	Repository string
	Kind       Kind
	// Reference is the tag, or the digest.
	Reference string
}

// String is the key for people: contoso/team/app:1.2 or contoso/team/app@sha256:...
func (k Key) String() string {
	if k.Kind == Manifest {
		return k.Registry + "/" + k.Repository + "@" + k.Reference
	}
	return k.Registry + "/" + k.Repository + ":" + k.Reference
}

// Compare orders keys by registry, repository, kind and reference: the order of Page.
func Compare(a, b Key) int {
	if c := strings.Compare(a.Registry, b.Registry); c != 0 {
		return c
	}
	if c := strings.Compare(a.Repository, b.Repository); c != 0 {
		return c
	}
	if c := strings.Compare(string(a.Kind), string(b.Kind)); c != 0 {
		return c
	}
	return strings.Compare(a.Reference, b.Reference)
}

// Schema is the version of the record's stored form that this Portolan writes; it reads this and the one before.
const Schema = 1

// MaxHistory is how many earlier versions a record remembers besides its head.
const MaxHistory = 8

// Absent is the digest of a tombstone: the version in which the tag does not exist.
const Absent = ""

// UnknownSequence in Record.Applied says that it is not known what the replica holds.
const UnknownSequence = math.MaxUint64

// Version is one value of a tag: a digest, or Absent, since a push or delete that was seen in Origin.
type Version struct {
	// Digest is the manifest's digest, algorithm and all, or Absent.
	Digest string `json:"d,omitempty"`
	// Sequence counts the versions of this key from 1; a later version has a higher one.
	Sequence uint64 `json:"s"`
	// Origin is the region in which it was pushed or deleted.
	Origin string `json:"o,omitempty"`
	// Time is when that happened by the best knowledge there is; it decides only between concurrent pushes.
	Time time.Time `json:"t,omitzero"`
	// Seen is set where no event told of it: it happened between Time and then.
	Seen time.Time `json:"n,omitzero"`
	// Copied is when it was last found to have come to a replica from another region.
	Copied time.Time `json:"c,omitzero"`
}

// Latest is the latest time at which the version may have come to be.
func (v Version) Latest() time.Time {
	if v.Seen.After(v.Time) {
		return v.Seen
	}
	return v.Time
}

// Tombstone reports whether the version is the absence of the tag.
func (v Version) Tombstone() bool { return v.Digest == Absent }

// Past is an earlier version.
type Past struct {
	Digest   string `json:"d,omitempty"`
	Sequence uint64 `json:"s"`
	// Origin is the region in which it was pushed or deleted.
	Origin string `json:"o,omitempty"`
	// Latest is the latest time at which that may have been, in milliseconds since 1970.
	Latest int64 `json:"t,omitempty"`
}

// Intent is a write that may be in flight to a replica: stored before the request is sent, kept until its outcome is seen.
type Intent struct {
	// Incarnation is the target's.
	Incarnation string `json:"i"`
	// Digest is what the write leaves there; Absent for a delete.
	Digest   string `json:"d,omitempty"`
	Sequence uint64 `json:"s"`
	// WriteID rides in the User-Agent of the request; registries echo it in their events.
	WriteID string `json:"w"`
	// Since is when the intent was stored. One whose outcome was never seen is forgotten in the end.
	Since time.Time `json:"t"`
}

// Record is all that is known of one key. The zero Record is that of a key never seen. Values are treated as immutable:
// a changed record is a new one (see Clone).
type Record struct {
	Head Version `json:"h"`
	// History holds the last MaxHistory versions before Head, the newest first, and older ones for as long as Applied
	// or an intent refers to them.
	History []Past `json:"p,omitempty"`
	// Applied holds, by the incarnation of a replica, the sequence last known to be applied there, where that is not
	// what the replica's phase implies: a baselined replica that is not named here has Head, a replica that is
	// still being seeded and is not named here is unknown. Zero: the key is absent there. UnknownSequence: nobody
	// knows, whatever the phase.
	Applied map[string]uint64 `json:"a,omitempty"`
	Intents []Intent          `json:"i,omitempty"`
	// Refused says, by the incarnation of a replica that lacks Head, why it can never be applied there: a sentence for people.
	Refused map[string]string `json:"r,omitempty"`
	// ConflictOf is the tag whose lost version this tag keeps: only on the records of <tag>.conflict-<region>-<n>.
	ConflictOf string `json:"c,omitempty"`
}

// Clone returns a deep copy of r.
func (r Record) Clone() Record {
	c := r
	c.History = slices.Clone(r.History)
	c.Applied = maps.Clone(r.Applied)
	c.Intents = slices.Clone(r.Intents)
	c.Refused = maps.Clone(r.Refused)
	return c
}

// Row is a record with its key and its revision.
type Row struct {
	Key Key
	// Record is the zero Record if Damage is set: nothing is known of the key.
	Record   Record
	Revision uint64
	// Damage is why the stored record cannot be read; nil if it can. One record that is lost must not stop all the others.
	// CompareAndSet replaces it, as it does any other, at Revision.
	Damage error
}

// NewRow returns the row of a key whose stored form is b. The error is ErrSchema; what does not decode is a damaged row.
func NewRow(key Key, b []byte, revision uint64) (Row, error) {
	record, err := Decode(b)
	if errors.Is(err, ErrSchema) {
		return Row{}, err
	}
	return Row{Key: key, Record: record, Revision: revision, Damage: err}, nil
}

// Cursor is a place in the change feed. It is opaque; the zero Cursor is before everything.
type Cursor struct{ Position uint64 }

// Generation is that of a registry's replicas. A record's silence about a replica says that it has the head, so whoever writes a
// record must know of every replica that was compared; therefore a new generation begins before a replica is compared, and once it
// has been, and a writer whose knowledge is of a former one is refused, however slowly news came to it. Whoever reads the generation
// first, and then the states of the replicas, knows all of that generation. Zero is the one before the first. (It is the fencing token
// of M. Kleppmann, "How to do distributed locking", 2016, for what a writer knows instead of for a lock.)
type Generation uint64

// Ledger is the contract. Every method may be called from several goroutines. Reads are consistent.
type Ledger interface {
	// Get reads one record: ErrNotFound if the key was never written, ErrSchema. One that is damaged is no error: see Row.
	Get(ctx context.Context, key Key) (Row, error)

	// Generation returns the present generation of a registry.
	Generation(ctx context.Context, registry string) (Generation, error)

	// Advance begins a new generation of a registry. When it returns, nobody can write by an earlier one any more. One that fails
	// may have begun all the same.
	Advance(ctx context.Context, registry string) error

	// CompareAndSet writes record if the revision of key still is revision (zero: if there is none), and the generation of its
	// registry is generation. It returns the new revision, or ErrConflict, or ErrGeneration. A nil record deletes. The change is in
	// the feed when CompareAndSet returns.
	CompareAndSet(ctx context.Context, generation Generation, key Key, record *Record, revision uint64) (uint64, error)

	// Page returns up to limit rows of a registry (of one repository, if repository is not empty) after the key
	// after (the zero Key: from the start), in the order of Compare, those of damaged records too. Fewer than limit rows: there
	// are no more. ErrSchema: one of the records has another schema.
	Page(ctx context.Context, registry, repository string, after Key, limit int) ([]Row, error)

	// Head returns the cursor after the newest change. Revisions and cursors never go back: one that is lower than one
	// seen before tells that the ledger was lost or restored. One that is not may have come there again since.
	Head(ctx context.Context) (Cursor, error)

	// Changes waits until there is a change after the cursor, or ctx is done (then it returns no keys, the same
	// cursor and no error if ctx merely timed out). It returns the changed keys of every registry, each once, and the cursor after them.
	// ErrGap: see there.
	Changes(ctx context.Context, after Cursor) ([]Key, Cursor, error)

	// Close releases the ledger.
	Close() error
}
