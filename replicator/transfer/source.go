package transfer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"portolan/replicator/distribution"
)

// Source is a replica that may have the content.
type Source struct {
	// Name is the region, for errors and logs.
	Name   string
	Client *distribution.Client
}

var (
	// ErrSource says that the sources, not the target, failed: see SourceError.
	ErrSource = errors.New("no source delivers")
	// ErrIncomplete says that something is missing at every source, or damaged or refused there: perhaps not yet there, or no longer.
	ErrIncomplete = errors.New("content is missing or damaged at every source")
)

// SourceError says that content could not be had. It matches ErrSource and, if no source will give it, ErrIncomplete; it never matches
// the errors of package distribution, which are about the target when they come from Copy.
type SourceError struct {
	Digest string
	// Missing is true if every source answered that there is no such content, Lasting if the others at least will not come to give
	// it by being asked again: they have it damaged, or refuse it.
	Missing, Lasting bool
	// RetryAt is when the first of those that may have the content can be asked for it again, if all of these want to be left alone; otherwise
	// zero. It says that the copy failed for no fault of the content, and may succeed after that time.
	RetryAt time.Time
	// Causes are the last errors, by source, in text.
	Causes []string
}

func (e *SourceError) Error() string {
	what := ErrSource
	if e.Lasting {
		what = ErrIncomplete
	}
	if len(e.Causes) == 0 {
		return fmt.Sprintf("%s: %v: there is no replica that should have it", e.Digest, what)
	}
	return fmt.Sprintf("%s: %v (%s)", e.Digest, what, strings.Join(e.Causes, "; "))
}

// Is matches ErrSource and ErrIncomplete.
func (e *SourceError) Is(target error) bool {
	return target == ErrSource || target == ErrIncomplete && e.Lasting
}

// sources are asked in turn for one piece of content, until one has given it whole.
type sources struct {
	digest   string
	all      []*source // nearest first
	patience time.Duration
}

// source is one of them, and how it failed.
type source struct {
	Source
	failures int
	err      error // the last
	// out: it has no such content, gave wrong bytes, or wants to be left alone for longer than is waited for.
	out bool
}

// sourceFailures is how often in a row a source may fail.
const sourceFailures = 3

func (c *copying) sourcesOf(digest string) sources {
	s := sources{digest: digest, patience: c.target.limits.Patience}
	for _, one := range c.Sources {
		s.all = append(s.all, &source{Source: one})
	}
	return s
}

// wait is how long the source is left alone after its failures.
func (s *source) wait() time.Duration {
	if s.failures == 0 {
		return 0
	}
	return max(distribution.RetryAfter(s.err), backoff(s.failures))
}

// next waits for, and returns, the source to be asked: the one that failed least; of those, the one that is to be waited for least, and then the
// nearest. The error is a *SourceError if none is left, or the context's.
func (s *sources) next(ctx context.Context) (*source, error) {
	var best *source
	for _, one := range s.all {
		if one.out || one.failures >= sourceFailures {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(one.failures, best.failures), cmp.Compare(one.wait(), best.wait())) < 0 {
			best = one
		}
	}
	if best == nil {
		return nil, s.exhausted()
	}
	if wait := best.wait(); wait > 0 && !pause(ctx, wait) {
		return nil, ctx.Err()
	}
	return best, nil
}

// failed notes that a source did not give the content.
func (s *sources) failed(one *source, err error) {
	one.failures++
	one.err = err
	if errors.Is(err, distribution.ErrNotFound) || errors.Is(err, distribution.ErrCorrupt) || distribution.RetryAfter(err) > s.patience {
		one.out = true
	}
}

// exhausted is the error when no source is left.
func (s *sources) exhausted() *SourceError {
	e := &SourceError{Digest: s.digest, Missing: true, Lasting: true}
	soon := false // one of them may give it before any time that was named
	for _, one := range s.all {
		e.Causes = append(e.Causes, one.Name+": "+one.err.Error())
		if errors.Is(one.err, distribution.ErrNotFound) {
			continue
		}
		e.Missing = false
		if errors.Is(one.err, distribution.ErrCorrupt) || errors.Is(one.err, distribution.ErrInvalid) {
			continue
		}
		e.Lasting = false
		rest := distribution.RetryAfter(one.err)
		soon = soon || rest == 0
		if at := time.Now().Add(rest); e.RetryAt.IsZero() || at.Before(e.RetryAt) {
			e.RetryAt = at
		}
	}
	if soon {
		e.RetryAt = time.Time{}
	}
	return e
}
