package transfer

import (
	"context"
	"encoding"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"

	"portolan/replicator/distribution"
)

// stream reads one blob from several sources as if they were one: where one fails, another goes on at the same byte. It hashes what it reads, and it can go
// back: for an upload that is resumed before what was read last. The hash then goes back to a checkpoint, from which the bytes in between are read
// once more; so that whatever is delivered has been verified when the end is reached, and no state grows with the blob.
type stream struct {
	ctx     context.Context
	copying *copying
	desc    distribution.Descriptor
	sources sources

	body   io.ReadCloser
	from   *source
	offset int64
	hash   hash.Hash // of the bytes before offset
	// run is how many bytes came from the open body.
	run int64

	checkpoints []checkpoint
	spacing     int64
	// marked, if not nil, is told the last checkpoints whenever there is a new one.
	marked func([]hashed)
	// givers are those that bytes came from since the start of the blob, in order.
	givers []*source
	// failed is not nil when no source is left.
	failed error
}

var _ io.Reader = (*stream)(nil)

// checkpoint is the state of the hash at an offset.
type checkpoint struct {
	offset int64
	hash   hash.Hash
}

const (
	// checkpointSpacing is the first distance between checkpoints, what is read again at most when an upload is resumed. With
	// maxCheckpoints kept it is doubled and every second one dropped: 16 MiB for a blob of 2 GiB, in 30 KB of memory.
	checkpointSpacing = 4 << 20
	maxCheckpoints    = 256
	// toldCheckpoints is how many of the last checkpoints marked is told: they reach back by more than what sockets and proxies hold
	// of what was read and has not arrived.
	toldCheckpoints = 8
	// forgiven is how many bytes a source must deliver for its failures to be forgotten.
	forgiven = 1 << 20
)

func newStream(ctx context.Context, c *copying, d distribution.Descriptor) (*stream, error) {
	h, err := distribution.NewHash(d.Digest)
	if err != nil {
		return nil, err
	}
	s := &stream{ctx: ctx, copying: c, desc: d, sources: c.sourcesOf(d.Digest), hash: h, spacing: checkpointSpacing}
	return s, s.mark()
}

// mark makes a checkpoint of where it is.
func (s *stream) mark() error {
	cloner, ok := s.hash.(hash.Cloner)
	if !ok {
		return fmt.Errorf("the hash of %s cannot be copied", s.desc.Digest)
	}
	h, err := cloner.Clone()
	if err != nil {
		return fmt.Errorf("copying the hash of %s: %w", s.desc.Digest, err)
	}
	s.checkpoints = append(s.checkpoints, checkpoint{s.offset, h})
	if len(s.checkpoints) > maxCheckpoints {
		kept := s.checkpoints[:0]
		for i, c := range s.checkpoints {
			if i%2 == 0 {
				kept = append(kept, c)
			}
		}
		clear(s.checkpoints[len(kept):])
		s.checkpoints = kept
		s.spacing *= 2
	}
	if s.marked != nil {
		told, err := marshal(s.checkpoints[max(0, len(s.checkpoints)-toldCheckpoints):])
		if err != nil {
			return err
		}
		s.marked(told)
	}
	return nil
}

// marshal makes bytes of the hashes of checkpoints.
func marshal(checkpoints []checkpoint) ([]hashed, error) {
	var all []hashed
	for _, c := range checkpoints {
		m, ok := c.hash.(encoding.BinaryMarshaler)
		if !ok {
			return nil, errors.New("the hash cannot be stored")
		}
		state, err := m.MarshalBinary()
		if err != nil {
			return nil, fmt.Errorf("storing the state of a hash: %w", err)
		}
		all = append(all, hashed{c.offset, state})
	}
	return all, nil
}

// restore takes over, of a fresh stream, the checkpoints of another one of the blob as far as an offset. What cannot be understood
// is left out: then more is read again.
func (s *stream) restore(hashes []hashed, offset int64) error {
	for _, told := range hashes {
		h, err := distribution.NewHash(s.desc.Digest)
		if err != nil {
			return err
		}
		u, ok := h.(encoding.BinaryUnmarshaler)
		if ok && told.Offset > s.checkpoints[len(s.checkpoints)-1].offset && told.Offset <= offset && u.UnmarshalBinary(told.State) == nil {
			s.checkpoints = append(s.checkpoints, checkpoint{told.Offset, h})
		}
	}
	s.givers = []*source{{}} // wherever the other stream had its bytes from: should they be wrong, it was first
	return s.rewind()
}

// seek makes the next byte read the one at offset.
func (s *stream) seek(offset int64) error {
	if offset < s.offset {
		s.close()
		i := len(s.checkpoints) - 1
		for s.checkpoints[i].offset > offset {
			i--
		}
		s.checkpoints = s.checkpoints[:i+1]
		if err := s.rewind(); err != nil {
			return err
		}
	}
	if offset > s.offset {
		// Read, hash, and pass over.
		if _, err := io.CopyN(io.Discard, struct{ io.Reader }{s}, offset-s.offset); err != nil {
			return err
		}
	}
	return nil
}

// rewind makes the next byte read the one at the last checkpoint.
func (s *stream) rewind() error {
	last := s.checkpoints[len(s.checkpoints)-1]
	h, err := last.hash.(hash.Cloner).Clone()
	if err != nil {
		return fmt.Errorf("copying the hash of %s: %w", s.desc.Digest, err)
	}
	s.offset, s.hash = last.offset, h
	return nil
}

// Read is io.Reader. Its error, but for io.EOF at the end of the blob, is also in s.failed.
func (s *stream) Read(p []byte) (int, error) {
	if s.offset == s.desc.Size {
		return 0, io.EOF
	}
	for {
		if s.failed != nil {
			return 0, s.failed
		}
		if s.body == nil {
			s.open()
			continue
		}
		n, err := s.body.Read(p)
		if n > 0 {
			s.hash.Write(p[:n])
			s.offset += int64(n)
			if s.run += int64(n); s.run >= forgiven {
				s.from.failures = 0
			}
			s.copying.count(func(st *Stats) { st.Read += int64(n) })
			if s.offset-s.checkpoints[len(s.checkpoints)-1].offset >= s.spacing {
				if err := s.mark(); err != nil {
					s.failed = err
				}
			}
		}
		if err != nil || s.offset == s.desc.Size {
			if err == io.EOF || err == nil {
				// Let the reader see the end, so that its connection is used again, and bytes too many are noticed.
				var one [1]byte
				if _, err = s.body.Read(one[:]); err == io.EOF {
					err = nil
				}
			}
			from := s.from
			s.close()
			if err != nil {
				s.fault(from, err)
			}
		}
		if n > 0 {
			return n, nil
		}
	}
}

// open begins to read at offset from the next source.
func (s *stream) open() {
	best, err := s.sources.next(s.ctx)
	if err != nil {
		s.failed = err
		if len(s.sources.all) == 0 { // the target has the manifest, and may be the only one for the time being
			s.failed = &SourceError{Digest: s.desc.Digest, Causes: []string{"no sources"}}
		}
		return
	}
	body, err := best.Client.OpenBlob(s.ctx, s.copying.Repository, s.desc, s.offset)
	if err != nil {
		s.fault(best, err)
		return
	}
	s.body, s.from, s.run = body, best, 0
	if !slices.Contains(s.givers, best) {
		s.givers = append(s.givers, best)
	}
}

func (s *stream) fault(src *source, err error) {
	if s.ctx.Err() != nil {
		s.failed = s.ctx.Err()
		return
	}
	s.sources.failed(src, err)
}

// verified checks the digest at the end of the blob.
func (s *stream) verified() error {
	if got := distribution.DigestOf(s.hash); s.offset != s.desc.Size || got != s.desc.Digest {
		return fmt.Errorf("wanted %s (%d bytes), got %s (%d bytes): %w", s.desc.Digest, s.desc.Size, got, s.offset, distribution.ErrCorrupt)
	}
	return nil
}

// restart begins the blob again without the source that gave wrong bytes. Of several, it may have been any: the first goes first, and the others
// show what they are worth when it is gone.
func (s *stream) restart() error {
	if len(s.givers) > 0 {
		s.givers[0].out = true
		s.givers[0].err = &distribution.Error{Kind: distribution.ErrCorrupt, Message: "bytes that do not match " + s.desc.Digest}
	}
	s.givers = nil
	return s.seek(0)
}

// all reads a small blob whole and verified.
func (s *stream) all() ([]byte, error) {
	for {
		b := make([]byte, s.desc.Size)
		if _, err := io.ReadFull(s, b); err != nil {
			return nil, err
		}
		if s.verified() == nil {
			return b, nil
		}
		if s.desc.Size == 0 {
			return nil, &NotReplicableError{Digest: s.desc.Digest, Reason: "the manifest says that it is empty, which its digest denies"}
		}
		if err := s.restart(); err != nil {
			return nil, err
		}
	}
}

func (s *stream) close() {
	if s.body != nil {
		s.body.Close()
		s.body, s.from = nil, nil
	}
}
