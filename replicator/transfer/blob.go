package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"

	"portolan/replicator/distribution"
)

// blob sees to it that the target's repository has a blob, once for all images of the copy that need it.
func (c *copying) blob(ctx context.Context, d distribution.Descriptor) error {
	for {
		_, err, _ := c.flights.Do(d.Digest, func() (any, error) { return nil, c.provide(ctx, d) })
		if errors.Is(err, context.Canceled) && ctx.Err() == nil {
			continue // it was another image's context, which has failed alone
		}
		return err
	}
}

// provide sees to it that the target's repository has a blob: it is there and proved, or mounted and proved, or sent.
func (c *copying) provide(ctx context.Context, d distribution.Descriptor) (err error) {
	t := c.target
	var session *distribution.Upload
	defer func() {
		if session == nil || rests(err) && c.remembers(d, session) {
			return // the next copy goes on with it
		}
		if t.cancel(ctx, session) {
			c.forget(d, session)
		}
	}()
	asked := false // whether the repository itself was asked
	var tried []string
	for {
		if c.has(d.Digest) {
			return nil
		}
		places := t.hints.get(d.Digest)
		if here := slices.Contains(places, c.Repository); here || !asked && (len(places) == 0 || c.distrust) {
			asked = true
			there, err := c.prove(ctx, d)
			if err != nil {
				return err
			}
			if there {
				t.hints.add(d.Digest, c.Repository)
				c.done(d, false, func(s *Stats) { s.Present++ })
				return nil
			}
			t.hints.remove(d.Digest, c.Repository)
		}
		for _, from := range places {
			if from == c.Repository || slices.Contains(tried, from) || c.distrust {
				continue
			}
			tried = append(tried, from)
			mounted, up, err := c.mount(ctx, d, from)
			if err != nil {
				return err
			}
			if mounted {
				t.hints.add(d.Digest, c.Repository)
				c.done(d, false, func(s *Stats) { s.Mounted++ })
				return nil
			}
			if up != nil {
				if session != nil {
					t.cancel(ctx, session)
				}
				session = up
			}
		}
		f, leader := t.begin(d.Digest)
		if !leader {
			select {
			case <-f.done:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if slices.ContainsFunc(t.hints.get(d.Digest), func(from string) bool { return from == c.Repository || !slices.Contains(tried, from) && !c.distrust }) {
			// It came in between our look and our turn.
			t.end(d.Digest, f)
			continue
		}
		err = c.upload(ctx, d, &session)
		if err == nil {
			t.hints.add(d.Digest, c.Repository)
			c.done(d, true, func(s *Stats) { s.Uploaded++ })
		}
		t.end(d.Digest, f)
		return err
	}
}

func (c *copying) has(digest string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.own[digest] || c.proved[digest]
}

func (c *copying) done(d distribution.Descriptor, own bool, change func(*Stats)) {
	c.mu.Lock()
	if own {
		c.own[d.Digest] = true
	} else {
		c.proved[d.Digest] = true
	}
	c.mu.Unlock()
	c.count(change)
}

// begin makes the caller the one that uploads a blob, or gives the upload to wait for.
func (t *Target) begin(digest string) (*flight, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if f, found := t.flights[digest]; found {
		return f, false
	}
	f := &flight{done: make(chan struct{})}
	t.flights[digest] = f
	return f, true
}

func (t *Target) end(digest string, f *flight) {
	t.mu.Lock()
	delete(t.flights, digest)
	t.mu.Unlock()
	close(f.done)
}

// prove reads a byte of the blob at the target.
func (c *copying) prove(ctx context.Context, d distribution.Descriptor) (bool, error) {
	err := c.target.patiently(ctx, func() error { return c.target.client.ProveBlob(ctx, c.Repository, d) })
	switch {
	case err == nil:
		return true, nil
	case lacks(err):
		return false, nil
	}
	return false, fmt.Errorf("looking for blob %s: %w", d.Digest, err)
}

// mount tries to have the blob from another repository, and proves it.
func (c *copying) mount(ctx context.Context, d distribution.Descriptor, from string) (bool, *distribution.Upload, error) {
	t := c.target
	var mounted bool
	var up *distribution.Upload
	err := t.patiently(ctx, func() (err error) {
		mounted, up, err = t.client.Mount(ctx, c.Repository, d.Digest, from)
		return err
	})
	switch {
	case ctx.Err() != nil:
		return false, nil, ctx.Err()
	case errors.Is(err, distribution.ErrUnavailable), errors.Is(err, distribution.ErrReadOnly), errors.Is(err, distribution.ErrFull):
		return false, nil, fmt.Errorf("mounting blob %s: %w", d.Digest, err)
	case err != nil:
		// Not allowed to read there, perhaps: then it is sent.
		return false, nil, nil
	case !mounted:
		t.hints.remove(d.Digest, from)
		return false, up, nil
	}
	there, err := c.prove(ctx, d)
	if err != nil {
		return false, nil, err
	}
	if !there {
		// Neither is it where it was to come from: most likely the registry still remembers what it has collected.
		t.hints.drop(d.Digest)
		t.log.Warn("a mount was accepted but the blob is not there: sending it", zap.String("repository", c.Repository), zap.String("from", from), zap.String("digest", d.Digest))
	}
	return there, nil, nil
}

// cancel reports whether nobody can go on with a session any more.
func (t *Target) cancel(ctx context.Context, session *distribution.Upload) bool {
	err := session.Cancel(ctx)
	if err != nil {
		t.log.Debug("cancelling an upload", zap.Error(err))
	}
	return err == nil || errors.Is(err, distribution.ErrUploadLost)
}

// place is that of a blob in the journal.
func (c *copying) place(d distribution.Descriptor) place {
	return place{Target: c.target.name, Repository: c.Repository, Digest: d.Digest}
}

// remembers reports whether the journal has the upload of a blob; if a session is given, that one.
func (c *copying) remembers(d distribution.Descriptor, session *distribution.Upload) bool {
	if c.target.journal == nil {
		return false
	}
	s, ok := c.target.journal.find(c.place(d))
	return ok && (session == nil || s.of(session))
}

// forget drops the upload of a blob from the journal; if a session is given, only if it is that one's.
func (c *copying) forget(d distribution.Descriptor, session *distribution.Upload) {
	if !c.remembers(d, session) {
		return
	}
	if err := c.target.journal.drop(c.place(d)); err != nil {
		c.target.log.Warn("an upload that came to its end could not be forgotten", zap.Error(err))
	}
}

// upload sends a blob. A session that is left over in *session is the caller's to cancel.
func (c *copying) upload(ctx context.Context, d distribution.Descriptor, session **distribution.Upload) error {
	if err := c.target.slots.Acquire(ctx, 1); err != nil {
		return err
	}
	defer c.target.slots.Release(1)
	s, err := newStream(ctx, c, d)
	if err != nil {
		return &NotReplicableError{Digest: d.Digest, Reason: err.Error()}
	}
	defer s.close()
	var whole []byte
	if d.Size <= BufferSize {
		if whole, err = s.all(); err != nil {
			return err
		}
	}
	u := &uploading{copying: c, desc: d, stream: s, whole: whole, session: *session}
	if c.target.journal != nil {
		s.marked = u.remember
		err = u.resume(ctx)
	}
	if err == nil {
		err = u.run(ctx)
	}
	*session = u.session
	if err != nil {
		return c.refused(d.Digest, fmt.Errorf("sending blob %s: %w", d.Digest, err))
	}
	c.forget(d, nil)
	c.count(func(s *Stats) { s.Sent += d.Size })
	return nil
}

// uploading is the upload of one blob, over as many sessions and requests as it takes.
type uploading struct {
	*copying
	desc    distribution.Descriptor
	stream  *stream
	whole   []byte // the verified blob, if it is small
	session *distribution.Upload
	// failures counts those in a row without progress beyond best.
	failures int
	best     int64
	restarts int
	resumed  bool
}

// resume goes on with the upload that the journal remembers, if the target still has it.
func (u *uploading) resume(ctx context.Context) error {
	t := u.target
	s, ok := t.journal.find(u.place(u.desc))
	if !ok {
		return nil
	}
	session, err := t.client.ResumeUpload(u.Repository, s.Location)
	if err == nil {
		err = t.patiently(ctx, func() error { return session.Sync(ctx) })
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case distribution.StateOfReplica(err):
		return err
	case err != nil:
		u.forget(u.desc, nil)
		return nil
	}
	if err := u.stream.restore(s.Hashes, session.Offset()); err != nil {
		return err
	}
	if u.session != nil {
		t.cancel(ctx, u.session)
	}
	u.session, u.resumed = session, true
	u.progress()
	t.log.Info("an upload that was broken off is gone on with", zap.String("repository", u.Repository), zap.String("digest", u.desc.Digest),
		zap.Int64("offset", session.Offset()), zap.Int64("size", u.desc.Size))
	return nil
}

// remember notes in the journal where the upload stands.
func (u *uploading) remember(hashes []hashed) {
	if u.session == nil {
		return
	}
	err := u.target.journal.put(standing{place: u.place(u.desc), Location: u.session.Location(), Hashes: hashes})
	if err != nil {
		u.target.log.Warn("a kill would begin this upload anew", zap.String("repository", u.Repository), zap.String("digest", u.desc.Digest), zap.Error(err))
		u.stream.marked = nil
	}
}

func (u *uploading) run(ctx context.Context) error {
	for {
		committed, err := u.attempt(ctx)
		if err == nil {
			if committed {
				u.session = nil
				return nil
			}
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if failed := u.stream.failed; failed != nil {
			return failed
		}
		if again, err := u.recover(ctx, err); err != nil {
			return err
		} else if !again {
			u.session = nil
			return nil
		}
	}
}

// attempt makes the next step: a session, a piece, or the commit.
func (u *uploading) attempt(ctx context.Context) (committed bool, err error) {
	t := u.target
	if u.session == nil {
		if u.session, err = t.client.StartUpload(ctx, u.Repository); err != nil {
			return false, err
		}
		u.resumed = false
	}
	if u.desc.Size <= BufferSize {
		// In one request. A session that was resumed is not worth it.
		if err := u.session.Commit(ctx, u.desc.Digest, u.whole); err != nil {
			return false, err
		}
		return true, nil
	}
	offset := u.session.Offset()
	if offset > u.desc.Size {
		t.cancel(ctx, u.session)
		return false, &distribution.Error{Kind: distribution.ErrUploadLost, Message: "the session has more bytes than the blob"}
	}
	if offset < u.desc.Size {
		if err := u.stream.seek(offset); err != nil {
			return false, err
		}
		n := u.desc.Size - offset
		if chunk := max(t.limits.Chunk, u.session.MinimumChunk()); t.limits.Chunk > 0 && chunk < n {
			n = chunk
		}
		if err := u.session.Append(ctx, u.stream, n); err != nil {
			return false, err
		}
		u.progress()
		return false, nil
	}
	// All is there: but is it what it should be? It is committed only then.
	if err := u.stream.seek(offset); err != nil {
		return false, err
	}
	if err := u.stream.verified(); err != nil {
		t.log.Warn("a source gave wrong bytes", zap.String("repository", u.Repository), zap.Error(err))
		t.cancel(ctx, u.session)
		u.session = nil
		return false, u.stream.restart()
	}
	return true, u.session.Commit(ctx, u.desc.Digest, nil)
}

func (u *uploading) progress() {
	if o := u.session.Offset(); o > u.best {
		u.best, u.failures = o, 0
	}
}

// maxRestarts is how often a blob is begun anew because its session was lost: 2.8 loses one at each cut.
const maxRestarts = 5

// recover decides what to do about a failure at the target: go on (true), or it turned out to be done (false), or an error.
func (u *uploading) recover(ctx context.Context, err error) (again bool, _ error) {
	t := u.target
	u.failures++
	switch {
	case errors.Is(err, distribution.ErrUploadLost):
		if u.restarts++; u.restarts > maxRestarts {
			return false, err
		}
		u.session = nil
		return true, nil
	case errors.Is(err, distribution.ErrOffset), errors.Is(err, distribution.ErrUnauthorized) && u.session != nil && u.failures == 1:
		// Out of step; or a token that ended in the middle of a stream, in place of which there is a new one now.
	case errors.Is(err, distribution.ErrUnavailable):
		if !t.wait(ctx, err, u.failures) {
			return false, errors.Join(ctx.Err(), err)
		}
	case errors.Is(err, distribution.ErrInvalid) && u.resumed:
		// A resumed session that the registry finds wrong in the end: from the start.
		t.cancel(ctx, u.session)
		u.session = nil
		return true, nil
	default:
		return false, err
	}
	if u.failures >= t.limits.Attempts {
		return false, err
	}
	if u.session == nil {
		return true, nil
	}
	if u.desc.Size <= BufferSize || u.session.Offset() == u.desc.Size {
		// A commit whose answer was lost.
		if there, perr := u.prove(ctx, u.desc); perr == nil && there {
			return false, nil
		}
	}
	if u.desc.Size <= BufferSize {
		t.cancel(ctx, u.session)
		u.session = nil
		return true, nil
	}
	switch serr := u.session.Sync(ctx); {
	case serr == nil:
		u.resumed = true
		u.progress()
	case errors.Is(serr, distribution.ErrUploadLost):
		return u.recover(ctx, serr)
	case errors.Is(serr, distribution.ErrUnavailable):
		return u.recover(ctx, serr)
	default:
		return false, serr
	}
	return true, nil
}
