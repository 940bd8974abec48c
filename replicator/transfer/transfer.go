// Package transfer copies content between replicas: a manifest by its digest, with everything it needs, in the order in which registries
// take it: blobs, child manifests, the index.
//
// It puts no tags, decides nothing about versions, and keeps nothing on disk but where its uploads stand (see Journal): what is to be
// copied where is the replicator's business. What it promises is that a copy that succeeded is whole: every byte that it sent was verified before it was committed, and
// what it did not send itself was proved by reading it there before the manifest was put, and the manifest after. Memory does not depend on the size of
// blobs: one small buffer for each upload, and at most one buffer of BufferSize for each blob that fits into it.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sync/singleflight"

	"portolan/replicator/distribution"
)

// BufferSize is the size in bytes up to which a blob is held in memory, verified, and sent in one request. Larger ones are streamed. At a
// megabyte, configs and small layers save a round trip, and the default number of uploads holds 6 MiB.
const BufferSize = 1 << 20

const (
	// maxDepth is how deep indexes may be nested. Two is the most that is seen in practice.
	maxDepth = 8
	// maxManifests is how many manifests one copy may bring. An index of as many has some 4 MiB, which is what CNCF distribution takes; those that are
	// seen, fallback tags of much-signed images, have hundreds. Without a bound, indexes within indexes could keep a worker busy for days.
	maxManifests = 16384
)

// Limits bound the copies to one target. The zero value of a field stands for the default.
type Limits struct {
	// Blobs is how many blobs are uploaded at a time, over all copies to the target (default 6).
	Blobs int
	// Manifests is how many children of an index are copied at a time (default 3).
	Manifests int
	// Hints is how many blobs' places are remembered (default 32768, about 10 MB).
	Hints int
	// Chunk is the size in bytes of the requests of a streamed upload; zero is one request for all of it, what every registry
	// knows. Chunks bound what a registry that loses interrupted requests, but not sessions, has to be sent again.
	Chunk int64
	// Attempts is how often in a row a request to the target may fail without progress (default 4).
	Attempts int
	// Patience is the longest Retry-After that is waited for in place (default 5 s). A longer one of the target ends the copy with that error, a
	// longer one of a source leaves the content to the others; if there is none, the copy ends with a SourceError that tells it.
	Patience time.Duration
}

func (l Limits) withDefaults() Limits {
	def := func(v *int, d int) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.Blobs, 6)
	def(&l.Manifests, 3)
	def(&l.Hints, 32768)
	def(&l.Attempts, 4)
	if l.Patience <= 0 {
		l.Patience = 5 * time.Second
	}
	return l
}

// Request is one copy.
type Request struct {
	Repository string
	// Manifest is what to copy: Digest is needed, the rest is not looked at.
	Manifest distribution.Descriptor
	// Sources are asked in this order, nearest first; where one fails, also in the middle of a blob, the next goes on.
	Sources []Source
	// WriteID rides in the User-Agent of the manifests' PUTs (see distribution.WriteID).
	WriteID string
	// Root, if not nil, is called with the manifest itself before Copy succeeds.
	Root func(mediaType string, body []byte)
}

// Stats is what a copy did.
type Stats struct {
	// Read is the bytes of blobs that came from sources, those that were read again included.
	Read int64
	// Sent is the bytes of blobs that entered the target by this copy, counted when a blob is complete.
	Sent int64
	// Uploaded, Mounted, Present and Foreign count blobs: sent by this copy; mounted from another repository and proved; there already
	// and proved; left alone, because their media type says that they are not to be distributed.
	Uploaded, Mounted, Present, Foreign int
	// Manifests counts those put, and ManifestsPresent those that were there already.
	Manifests, ManifestsPresent int
}

// NotReplicableError says that this content can never go there as things are.
type NotReplicableError struct {
	Digest string
	Reason string
}

func (e *NotReplicableError) Error() string {
	return fmt.Sprintf("%s is not replicable: %s", e.Digest, e.Reason)
}

// Target is a replica that content is copied to. Its methods may be called from several goroutines; copies share what they learn, and a blob that two of
// them need is sent once.
type Target struct {
	client *distribution.Client
	limits Limits
	log    *zap.Logger
	hints  *hints
	slots  *semaphore.Weighted
	// journal remembers uploads under this name; nil: nothing does.
	journal *Journal
	name    string

	mu      sync.Mutex
	flights map[string]*flight
}

// flight is the upload of a blob by one copy, which others wait for.
type flight struct{ done chan struct{} }

// NewTarget makes a Target.
func NewTarget(client *distribution.Client, limits Limits, log *zap.Logger) *Target {
	limits = limits.withDefaults()
	if log == nil {
		log = zap.NewNop()
	}
	return &Target{
		client: client, limits: limits, log: log, hints: newHints(limits.Hints),
		slots: semaphore.NewWeighted(int64(limits.Blobs)), flights: map[string]*flight{},
	}
}

// Remember has j, which may be nil, remember where the target's uploads stand. The name tells the target from all others that j serves, and
// is the same when the process is started again. It is called before the first Copy.
func (t *Target) Remember(j *Journal, name string) { t.journal, t.name = j, name }

// Forget drops what is known of the target: after it was wiped or restored.
func (t *Target) Forget() { t.hints.clear() }

// Copy copies a manifest and everything that it needs. The errors: *NotReplicableError, *SourceError, the context's, and those of package
// distribution about the target. A copy that failed leaves nothing behind but complete blobs and manifests, which the next one finds, and
// uploads that the target could not be told to cancel, or that broke off because somebody wants to be left alone: the next one goes on with
// those that a Journal remembers.
func (t *Target) Copy(ctx context.Context, req Request) (Stats, error) {
	c := &copying{target: t, Request: req, own: map[string]bool{}, proved: map[string]bool{}, trees: map[string]*tree{}}
	_, err := c.manifest(ctx, req.Manifest.Digest, 0)
	if errors.Is(err, distribution.ErrBlobUnknown) && ctx.Err() == nil {
		// What was proved is gone, or a hint was wrong in a way that reading does not show. Once more, trusting nothing.
		t.log.Warn("the target misses content that it had: copying once more", zap.String("repository", req.Repository), zap.String("digest", req.Manifest.Digest), zap.Error(err))
		c.restart()
		_, err = c.manifest(ctx, req.Manifest.Digest, 0)
	}
	if err != nil {
		if cause := ctx.Err(); cause != nil {
			err = cause
		}
		return c.snapshot(), fmt.Errorf("copying %s@%s to %s: %w", req.Repository, req.Manifest.Digest, t.client.Endpoint(), err)
	}
	return c.snapshot(), nil
}

// copying is one Copy.
type copying struct {
	target *Target
	Request
	flights   singleflight.Group // of blobs
	manifests singleflight.Group

	mu    sync.Mutex
	stats Stats
	// own are the blobs that this copy uploaded, proved those that it proved.
	own, proved map[string]bool
	// trees are the manifests that this copy knows of, nil those that are still to be copied.
	trees map[string]*tree
	// distrust: hints lead nowhere, manifests that are there are put again.
	distrust bool
}

func (c *copying) snapshot() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}

// count changes the statistics.
func (c *copying) count(change func(*Stats)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change(&c.stats)
}

func (c *copying) restart() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for digest := range maps.Keys(c.proved) {
		c.target.hints.drop(digest)
	}
	for digest := range maps.Keys(c.own) {
		c.target.hints.drop(digest)
	}
	c.own, c.proved, c.trees, c.distrust = map[string]bool{}, map[string]bool{}, map[string]*tree{}, true
}

// tree is what became of a manifest and everything below it.
type tree struct {
	// height is how deep indexes are nested in it.
	height int
	err    error
}

// manifest copies a manifest with everything below it, once, however many indexes name it, and returns how deep indexes are nested in it.
func (c *copying) manifest(ctx context.Context, digest string, depth int) (height int, _ error) {
	tooDeep := &NotReplicableError{Digest: digest, Reason: fmt.Sprintf("indexes are nested deeper than %d", maxDepth)}
	if depth > maxDepth {
		return 0, tooDeep
	}
	for {
		mine := false
		v, _, _ := c.manifests.Do(digest, func() (any, error) {
			mine = true
			return c.tree(ctx, digest, depth), nil
		})
		switch t := v.(*tree); {
		case !mine && errors.Is(t.err, context.Canceled) && ctx.Err() == nil:
			// It was another index's context, which has failed alone.
		case t.err == nil && depth+t.height > maxDepth:
			return 0, tooDeep // it was copied by a shorter way
		default:
			return t.height, t.err
		}
	}
}

// tree gives what became of a manifest, and copies it if it is its first turn.
func (c *copying) tree(ctx context.Context, digest string, depth int) *tree {
	c.mu.Lock()
	t := c.trees[digest]
	c.mu.Unlock()
	if t != nil {
		return t
	}
	t = new(tree)
	if t.height, t.err = c.provideManifest(ctx, digest, depth); !errors.Is(t.err, context.Canceled) {
		c.mu.Lock()
		c.trees[digest] = t
		c.mu.Unlock()
	}
	return t
}

// expect counts the manifests that an index names.
func (c *copying) expect(all []distribution.Descriptor) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range all {
		if _, known := c.trees[d.Digest]; !known {
			c.trees[d.Digest] = nil
		}
	}
	if len(c.trees) > maxManifests {
		return &NotReplicableError{Digest: c.Manifest.Digest, Reason: fmt.Sprintf("it leads to more than %d manifests: push it in parts", maxManifests)}
	}
	return nil
}

// provideManifest sees to it that the target's repository has a manifest and everything below it.
func (c *copying) provideManifest(ctx context.Context, digest string, depth int) (height int, _ error) {
	// The target is asked first. That it has the manifest ends nothing: what the manifest needs is proved all the same.
	var body []byte
	var media string
	err := c.target.patiently(ctx, func() (err error) {
		body, media, _, err = c.target.client.Manifest(ctx, c.Repository, digest)
		return err
	})
	present := err == nil
	if !present && !lacks(err) {
		return 0, fmt.Errorf("looking for manifest %s: %w", digest, err)
	}
	if !present {
		looked := err
		if body, media, err = c.fetch(ctx, digest); err != nil {
			if distribution.Faulty(looked) {
				err = fmt.Errorf("looking for manifest %s: %w; to write it again: %s", digest, looked, err) // the target may yet have it
			}
			return 0, err
		}
	}
	m, err := distribution.ParseManifest(media, body)
	if err != nil {
		return 0, &NotReplicableError{Digest: digest, Reason: err.Error()}
	}
	switch m.Kind {
	case distribution.Schema1:
		return 0, &NotReplicableError{Digest: digest, Reason: "docker image manifest schema 1 is obsolete and bound to its registry"}
	case distribution.Index:
		if err = c.expect(m.Children); err == nil {
			height, err = c.children(ctx, m.Children, depth)
		}
	default:
		err = c.blobs(ctx, m.Blobs)
	}
	if err != nil {
		return 0, err
	}
	root := func() {
		if depth == 0 && c.Root != nil {
			c.Root(m.MediaType, body)
		}
	}
	if present && !c.distrust {
		c.count(func(s *Stats) { s.ManifestsPresent++ })
		root()
		return height, nil
	}
	if err := c.put(ctx, digest, m.MediaType, body); err != nil {
		return 0, c.refused(digest, fmt.Errorf("putting manifest %s: %w", digest, err))
	}
	c.count(func(s *Stats) { s.Manifests++ })
	root()
	return height, nil
}

// lacks reports whether the error of a look at the target says that what has a digest is to be written there: it is absent, or not what it
// should be, or the registry fails at it. To write what is there already does no harm.
func lacks(err error) bool {
	return errors.Is(err, distribution.ErrNotFound) || errors.Is(err, distribution.ErrCorrupt) || errors.Is(err, distribution.ErrInvalid) || distribution.Faulty(err)
}

// put puts a manifest and proves it. CNCF distribution 2.8 with its descriptor cache answers 201 for a manifest that it held before a garbage collection,
// and stores nothing, since it believes to have it. An upload of the same bytes as a blob does store them, whatever the cache says.
func (c *copying) put(ctx context.Context, digest, media string, body []byte) error {
	t := c.target
	for hollow := false; ; hollow = true {
		err := t.patiently(ctx, func() error {
			return t.client.PutManifest(ctx, c.Repository, digest, media, body, c.WriteID)
		})
		if err != nil {
			return err
		}
		err = t.patiently(ctx, func() error {
			_, _, _, err := t.client.Manifest(ctx, c.Repository, digest)
			return err
		})
		if err == nil || !errors.Is(err, distribution.ErrNotFound) && !errors.Is(err, distribution.ErrCorrupt) {
			return err
		}
		if hollow {
			return &distribution.Error{Kind: distribution.ErrBlobUnknown, Message: "the manifest was accepted, but it is not there", Cause: err}
		}
		t.log.Warn("a manifest was accepted but is not there: storing its bytes first", zap.String("repository", c.Repository), zap.String("digest", digest))
		up, err := t.client.StartUpload(ctx, c.Repository)
		if err != nil {
			return err
		}
		if err := up.Commit(ctx, digest, body); err != nil {
			t.cancel(ctx, up)
			return err
		}
	}
}

// refused turns what the target will never take into a NotReplicableError.
func (c *copying) refused(digest string, err error) error {
	var e *distribution.Error
	switch {
	case errors.Is(err, distribution.ErrInvalid):
		return &NotReplicableError{Digest: digest, Reason: err.Error()}
	case errors.Is(err, distribution.ErrNotFound) && errors.As(err, &e) && e.Code == "NAME_UNKNOWN":
		return &NotReplicableError{Digest: digest, Reason: "the repository does not exist there and is not created by a push: " + err.Error()}
	}
	return err
}

// fetch reads a manifest from a source that has it whole.
func (c *copying) fetch(ctx context.Context, digest string) ([]byte, string, error) {
	from := c.sourcesOf(digest)
	for {
		s, err := from.next(ctx)
		if err != nil {
			return nil, "", err
		}
		body, media, _, err := s.Client.Manifest(ctx, c.Repository, digest)
		if err == nil {
			return body, media, nil
		}
		if ctx.Err() != nil {
			return nil, "", ctx.Err()
		}
		from.failed(s, err)
	}
}

// children copies the manifests of an index. One that is missing everywhere does not keep the others back: an index may have been pushed before all of its
// images, or with some of its platforms only. But the index itself waits for all of them. The height is that of the index.
func (c *copying) children(ctx context.Context, all []distribution.Descriptor, depth int) (height int, _ error) {
	var mu sync.Mutex
	var incomplete error
	err := each(ctx, c.target.limits.Manifests, all, func(ctx context.Context, d distribution.Descriptor) error {
		h, err := c.manifest(ctx, d.Digest, depth+1)
		mu.Lock()
		defer mu.Unlock()
		height = max(height, h+1)
		if errors.Is(err, ErrIncomplete) {
			if incomplete == nil {
				incomplete = err
			}
			return nil
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return height, incomplete
}

func (c *copying) blobs(ctx context.Context, all []distribution.Descriptor) error {
	var ours []distribution.Descriptor
	for _, d := range all {
		if foreign(d) {
			c.count(func(s *Stats) { s.Foreign++ })
			continue
		}
		ours = append(ours, d)
	}
	return each(ctx, c.target.limits.Blobs, ours, c.blob)
}

// each does something for all of them, so many at a time, until it fails for one. Where it fails because somebody wants to be left alone nothing more
// is begun, but what is under way comes to its end: that may be most of a large blob.
func each(ctx context.Context, limit int, all []distribution.Descriptor, do func(context.Context, distribution.Descriptor) error) error {
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(limit)
	var mu sync.Mutex
	var resting error
	for _, d := range all {
		group.Go(func() error {
			mu.Lock()
			over := resting != nil
			mu.Unlock()
			if over {
				return nil
			}
			err := do(gctx, d)
			if !rests(err) {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			resting = err
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	return resting
}

// rests reports whether a copy fails because the target, or all its sources, want to be left alone.
func rests(err error) bool {
	var source *SourceError
	if errors.As(err, &source) {
		return !source.RetryAt.IsZero()
	}
	return distribution.RetryAfter(err) > 0
}

// foreign reports whether a layer is one that registries do not hold (Windows base layers): the media type says so.
func foreign(d distribution.Descriptor) bool {
	return strings.Contains(d.MediaType, ".nondistributable.") || strings.Contains(d.MediaType, ".foreign.")
}

// patiently repeats a small request to the target that may be repeated, while that is likely to help.
func (t *Target) patiently(ctx context.Context, request func() error) error {
	for failures := 0; ; {
		err := request()
		if err == nil || !errors.Is(err, distribution.ErrUnavailable) {
			return err
		}
		failures++
		if !t.wait(ctx, err, failures) {
			return err
		}
	}
}

// wait waits before another attempt, and reports whether there should be one.
func (t *Target) wait(ctx context.Context, err error, failures int) bool {
	asked := distribution.RetryAfter(err)
	if failures >= t.limits.Attempts || asked > t.limits.Patience {
		return false
	}
	return pause(ctx, max(asked, backoff(failures)))
}

// backoff is 100 ms doubled by each failure, and 3.2 s at most: a replica's longer troubles are not waited for here.
func backoff(failures int) time.Duration {
	return 100 * time.Millisecond << min(max(failures-1, 0), 5)
}

func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}
