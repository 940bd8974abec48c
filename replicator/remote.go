package replicator

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/zap"

	"portolan/replicator/distribution"
	"portolan/replicator/ledger"
	"portolan/replicator/transfer"
	"portolan/topology"
)

// remote is a Remote over the OCI distribution API.
type remote struct {
	region  string
	client  *distribution.Client
	target  *transfer.Target
	writeID func() string

	// read are manifests that were brought and are about to be tagged: between the last look at a tag and its PUT there is
	// no time for another request.
	mu   sync.Mutex
	read map[string]manifest
	size int // of their bodies, in bytes
}

type manifest struct {
	mediaType string
	body      []byte
}

// maxRead and maxReadBytes bound the manifests that are kept; most are taken out again within a second. A manifest has some
// kilobytes most often, and four megabytes at most.
const maxRead, maxReadBytes = 128, 8 << 20

var _ Remote = (*remote)(nil)

func newRemote(r *topology.Replica, userAgent string, writeID func() string, log *zap.Logger) (*remote, error) {
	client, err := distribution.New(distribution.Options{
		Endpoint: r.Endpoint, Prefix: r.Access.Prefix, Realms: realms(r.Access.Realms), Credentials: r.Access.Credentials, CA: r.Access.CA, ClientCert: r.Access.ClientCert,
		UserAgent: userAgent, Logger: log,
	})
	if err != nil {
		return nil, fmt.Errorf("replica %s: %w", r.Region, err)
	}
	return &remote{region: r.Region, client: client, target: transfer.NewTarget(client, transfer.Limits{}, log),
		writeID: writeID, read: make(map[string]manifest)}, nil
}

func (r *remote) close() { r.client.Close() }

func (r *remote) Ping(ctx context.Context) error { return translate(r.client.Ping(ctx)) }

func (r *remote) Head(ctx context.Context, repository, reference string) (string, error) {
	d, err := r.client.Head(ctx, repository, reference)
	if errors.Is(err, distribution.ErrNotFound) {
		return ledger.Absent, nil
	}
	return d.Digest, translate(err)
}

func (r *remote) Repositories(ctx context.Context) ([]string, error) {
	var all []string
	for name, err := range r.client.Repositories(ctx) {
		if err != nil {
			return nil, translate(err)
		}
		all = append(all, name)
	}
	return all, nil
}

func (r *remote) Tags(ctx context.Context, repository string) ([]string, bool, error) {
	var all []string
	for tag, err := range r.client.Tags(ctx, repository) {
		if errors.Is(err, distribution.ErrNotFound) && len(all) == 0 {
			return nil, false, nil
		}
		if err != nil {
			return nil, false, translate(err) // in mid-list, "not found" too: what is listed is not all
		}
		all = append(all, tag)
	}
	return all, true, nil
}

func (r *remote) Bring(ctx context.Context, repository, digest string, sources []Remote) (Transfer, error) {
	request := transfer.Request{Repository: repository, Manifest: distribution.Descriptor{Digest: digest}, WriteID: r.writeID(),
		Root: func(mediaType string, body []byte) { r.keep(repository, digest, manifest{mediaType, body}) }}
	for _, s := range sources {
		if s, ok := s.(*remote); ok {
			request.Sources = append(request.Sources, transfer.Source{Name: s.region, Client: s.client})
		}
	}
	stats, err := r.target.Copy(ctx, request)
	cost := Transfer{BytesRead: stats.Read, BytesWritten: stats.Sent, Uploaded: stats.Uploaded, Mounted: stats.Mounted, Present: stats.Present}
	return cost, translate(err)
}

// keep remembers a manifest of the replica until it is taken.
func (r *remote) keep(repository, digest string, m manifest) {
	r.mu.Lock()
	defer r.mu.Unlock()
	key := repository + "@" + digest
	r.drop(key)
	if len(r.read) >= maxRead || r.size+len(m.body) > maxReadBytes {
		clear(r.read) // of writes that were given up; at worst somebody reads again
		r.size = 0
	}
	r.read[key] = m
	r.size += len(m.body)
}

// drop forgets a manifest. The caller holds mu.
func (r *remote) drop(key string) {
	r.size -= len(r.read[key].body)
	delete(r.read, key)
}

// take returns a manifest of the replica: the one that was kept, if it was.
func (r *remote) take(ctx context.Context, repository, digest string) (manifest, error) {
	key := repository + "@" + digest
	r.mu.Lock()
	m, ok := r.read[key]
	r.drop(key)
	r.mu.Unlock()
	if ok {
		return m, nil
	}
	body, mediaType, _, err := r.client.Manifest(ctx, repository, digest)
	return manifest{mediaType, body}, err
}

func (r *remote) Tag(ctx context.Context, repository, tag, digest, writeID string) error {
	m, err := r.take(ctx, repository, digest)
	if err != nil {
		return fmt.Errorf("%w: %w", errAgain, translate(err)) // nothing was written
	}
	return translate(r.client.PutManifest(ctx, repository, tag, m.mediaType, m.body, writeID))
}

func (r *remote) Untag(ctx context.Context, repository, tag, writeID string, declare func(digest string) error) error {
	err := r.client.DeleteTag(ctx, repository, tag, writeID)
	if !errors.Is(err, distribution.ErrUnsupported) && !errors.Is(err, distribution.ErrNotFound) {
		return translate(err)
	}
	// Nothing need be put where nothing is; and "not found" may be what is said to whoever may not delete.
	shown, heading := r.Head(ctx, repository, tag)
	switch {
	case faulty(heading) && errors.Is(err, distribution.ErrUnsupported): // a damaged tag can still be replaced
	case heading != nil:
		return fmt.Errorf("%w: %w", errAgain, heading)
	case shown == ledger.Absent:
		return nil
	case errors.Is(err, distribution.ErrNotFound):
		return fmt.Errorf("%w: the tag is there, and its deletion is answered with: %w", ErrRefused, err)
	}
	return translate(r.client.DeleteTagByReplacement(ctx, repository, tag, writeID, declare))
}

func (r *remote) Delete(ctx context.Context, repository, digest, writeID string) error {
	err := r.client.DeleteManifest(ctx, repository, digest, writeID)
	if errors.Is(err, distribution.ErrNotFound) {
		return nil
	}
	return translate(err)
}

func (r *remote) parsed(ctx context.Context, repository, digest string) (*distribution.Manifest, error) {
	body, mediaType, _, err := r.client.Manifest(ctx, repository, digest)
	if err != nil {
		return nil, err
	}
	return distribution.ParseManifest(mediaType, body)
}

func (r *remote) Names(ctx context.Context, repository, digest string) ([]string, error) {
	names := make(map[string]bool)
	if err := r.names(ctx, repository, digest, 0, make(map[string]bool), names); err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(names)), nil
}

// maxNesting is how deep indexes are followed; transfer copies none that are nested deeper.
const maxNesting = 8

// names adds what a manifest names. Each is read once, however often it is named.
func (r *remote) names(ctx context.Context, repository, digest string, depth int, read, names map[string]bool) error {
	if read[digest] {
		return nil
	}
	read[digest] = true
	m, err := r.parsed(ctx, repository, digest)
	if errors.Is(err, distribution.ErrNotFound) {
		return nil
	}
	if err != nil {
		return translate(err)
	}
	if m.Subject != nil {
		names[m.Subject.Digest] = true
	}
	for _, child := range m.Children {
		names[child.Digest] = true
		if depth < maxNesting && types.MediaType(child.MediaType).IsIndex() {
			if err := r.names(ctx, repository, child.Digest, depth+1, read, names); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *remote) Blobs(ctx context.Context, repository, digest string) (map[string]int64, error) {
	sizes := make(map[string]int64)
	if err := r.blobs(ctx, repository, digest, 0, make(map[string]bool), sizes); err != nil {
		return nil, err
	}
	return sizes, nil
}

// blobs adds the blobs that a manifest leads to. Each manifest is read once.
func (r *remote) blobs(ctx context.Context, repository, digest string, depth int, read map[string]bool, sizes map[string]int64) error {
	if read[digest] || depth > maxNesting {
		return nil
	}
	read[digest] = true
	m, err := r.parsed(ctx, repository, digest)
	if err != nil {
		return translate(err)
	}
	for _, b := range m.Blobs {
		sizes[b.Digest] = b.Size
	}
	for _, child := range m.Children {
		if err := r.blobs(ctx, repository, child.Digest, depth+1, read, sizes); err != nil {
			return err
		}
	}
	return nil
}

func (r *remote) Referrers(ctx context.Context, repository, digest string) ([]string, error) {
	// Elsewhere they hang on the fallback tag, which is a tag like any other.
	descriptors, _, err := r.client.ReferrersByAPI(ctx, repository, digest)
	if err != nil {
		return nil, translate(err)
	}
	var digests []string
	for _, d := range descriptors {
		digests = append(digests, d.Digest)
	}
	return digests, nil
}

// translate turns the errors of the packages below into the engine's.
func translate(err error) error {
	var never *transfer.NotReplicableError
	var source *transfer.SourceError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &never):
		return &NotReplicableError{Reason: never.Reason}
	case errors.As(err, &source):
		switch {
		case source.Missing:
			return fmt.Errorf("%w: %w", ErrGone, err)
		case source.Lasting:
			return fmt.Errorf("%w: %w", errUnreadable, err)
		case !source.RetryAt.IsZero():
			return &SourcesRestError{RetryAfter: max(0, time.Until(source.RetryAt)), Err: err}
		}
		return err
	case errors.Is(err, distribution.ErrUnsupported):
		return fmt.Errorf("%w: %w", ErrUnsupported, err)
	case distribution.StateOfReplica(err):
		return &UnavailableError{RetryAfter: distribution.RetryAfter(err), Faulty: distribution.Faulty(err), Undone: distribution.Refused(err),
			Unsent: distribution.Unsent(err), Err: err}
	case errors.Is(err, distribution.ErrInvalid), errors.Is(err, distribution.ErrBlobUnknown):
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return err
}

// serverTime turns a time by the replica's clock into our own.
func (r *remote) serverTime(t time.Time) time.Time {
	if offset, _, known := r.client.ClockOffset(); known {
		return t.Add(-offset)
	}
	return t
}

// realms splits the hosts of token servers.
func realms(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}
