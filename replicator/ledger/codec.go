package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
)

// MaxRecord is the largest stored record in bytes. One with a full history that lags and has intents at a dozen
// replicas stays below a quarter of it; a bound keeps one runaway key from filling an engine's transaction.
const MaxRecord = 64 << 10

// stored is a record as it lies in an engine: Record's own fields beside the version of their meaning.
type stored struct {
	V int `json:"v"`
	Record
}

// Encode returns the stored form of r, the same in every engine: JSON with the schema version in "v".
func Encode(r Record) ([]byte, error) {
	b, err := json.Marshal(stored{V: Schema, Record: r})
	if err != nil {
		return nil, fmt.Errorf("encoding a record: %w", err)
	}
	if len(b) > MaxRecord {
		return nil, fmt.Errorf("encoding a record: %d bytes, more than %d", len(b), MaxRecord)
	}
	return b, nil
}

// Decode reads the stored form of a record, of this Schema or the one before: ErrSchema for another one. Any other error says
// that b is no stored record.
func Decode(b []byte) (Record, error) {
	// The version first: of a newer record nothing else may be taken for granted, not even the types of its fields.
	var version struct {
		V *int `json:"v"`
	}
	if err := json.Unmarshal(b, &version); err != nil {
		return Record{}, fmt.Errorf("decoding a record: %w", err)
	}
	switch {
	case version.V == nil:
		return Record{}, errors.New("decoding a record: it has no schema version")
	case *version.V > Schema:
		return Record{}, fmt.Errorf("decoding a record: %w: %d, this Portolan reads up to %d", ErrSchema, *version.V, Schema)
	case *version.V < Schema-1:
		return Record{}, fmt.Errorf("decoding a record: %w: %d, older than %d, the oldest that this Portolan reads", ErrSchema, *version.V, Schema-1)
	}
	var s stored
	if err := json.Unmarshal(b, &s); err != nil {
		return Record{}, fmt.Errorf("decoding a record: %w", err)
	}
	return s.Record, nil
}

// The grammars of the OCI distribution specification (section "Pulling manifests") and of digests in the image
// specification; a registry's name is a DNS label.
var (
	registryName   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	repositoryName = regexp.MustCompile(`^[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*$`)
	tagName        = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)
	digestName     = regexp.MustCompile(`^[a-z0-9]+([+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]{1,256}$`)
)

// maxRepository is what registries take at most for a repository's name (distribution's own limit).
const maxRepository = 255

// Check says what is wrong with k, if anything. Engines refuse what it refuses, so that stored keys need no escapes:
// within a valid repository no byte sorts below '-', and none is a comma, a NUL or a dot segment.
func (k Key) Check() error {
	switch {
	case !registryName.MatchString(k.Registry):
		return fmt.Errorf("%q is not the name of a registry", k.Registry)
	case len(k.Repository) > maxRepository || !repositoryName.MatchString(k.Repository):
		return fmt.Errorf("%q is not the name of a repository", k.Repository)
	case k.Kind == Tag && !tagName.MatchString(k.Reference):
		return fmt.Errorf("%q is not a tag", k.Reference)
	case k.Kind == Manifest && !digestName.MatchString(k.Reference):
		return fmt.Errorf("%q is not a digest", k.Reference)
	case k.Kind != Tag && k.Kind != Manifest:
		return fmt.Errorf("%q is not a kind of key", k.Kind)
	}
	return nil
}
