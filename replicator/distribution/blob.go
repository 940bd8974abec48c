package distribution

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
)

func (c *Client) blobPath(repo, digest string) (full, path string, err error) {
	if full, err = c.full(repo); err != nil {
		return "", "", err
	}
	if _, err := NewHash(digest); err != nil {
		return "", "", err
	}
	return full, "/v2/" + full + "/blobs/" + digest, nil
}

// HasBlob asks with a HEAD. The answer is a hint: after a garbage collection CNCF distribution says 200 for what it no longer has.
// Use ProveBlob where it matters.
func (c *Client) HasBlob(ctx context.Context, repo, digest string) (size int64, err error) {
	full, path, err := c.blobPath(repo, digest)
	if err != nil {
		return 0, err
	}
	resp, err := c.do(ctx, call{method: http.MethodHead, path: path, scopes: []string{pull(full)}}, http.StatusOK)
	if err != nil {
		return 0, err
	}
	discard(resp)
	return resp.ContentLength, nil
}

// OpenBlob reads a blob of the digest and size of d from offset to its end. A size below zero is unknown. The reader gives exactly the bytes that are due and then
// io.EOF; fewer, a standstill or a broken connection are an error of kind ErrUnavailable, none at all ErrNotFound, more or another size ErrCorrupt. It does
// not hash: the caller does, since only the caller sees the bytes before offset.
func (c *Client) OpenBlob(ctx context.Context, repo string, d Descriptor, offset int64) (io.ReadCloser, error) {
	full, path, err := c.blobPath(repo, d.Digest)
	if err != nil {
		return nil, err
	}
	r := call{method: http.MethodGet, path: path, scopes: []string{pull(full)}, header: http.Header{}}
	if offset > 0 {
		// Both ends are named where they are known: an open end is not understood everywhere.
		last := ""
		if d.Size > 0 {
			last = strconv.FormatInt(d.Size-1, 10)
		}
		r.header.Set("Range", fmt.Sprintf("bytes=%d-%s", offset, last))
	}
	resp, err := c.do(ctx, r, http.StatusOK, http.StatusPartialContent)
	if err != nil {
		return nil, err
	}
	fail := func(kind error, format string, args ...any) error {
		resp.Body.Close()
		return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: kind, Message: fmt.Sprintf(format, args...)}
	}
	left := int64(-1)
	switch {
	case resp.StatusCode == http.StatusPartialContent:
		first, last, total, ok := parseContentRange(resp.Header.Get("Content-Range"))
		if !ok || offset == 0 || first != offset {
			return nil, fail(ErrInvalid, "asked from byte %d, got %q", offset, clean(resp.Header.Get("Content-Range"), 100))
		}
		if d.Size >= 0 && (total >= 0 && total != d.Size || last != d.Size-1) {
			return nil, fail(ErrCorrupt, "the blob has %d bytes there, not %d", total, d.Size)
		}
		left = last - first + 1
	default:
		if d.Size >= 0 && resp.ContentLength >= 0 && resp.ContentLength != d.Size {
			return nil, fail(ErrCorrupt, "the blob has %d bytes there, not %d", resp.ContentLength, d.Size)
		}
		// A server that knows no ranges gives the whole: pass over what is not wanted.
		if n, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
			return nil, fail(ErrUnavailable, "ended after %d of %d bytes that were to be passed over", n, offset)
		}
		if left = d.Size - offset; d.Size < 0 {
			if left = -1; resp.ContentLength >= 0 {
				left = resp.ContentLength - offset
			}
		}
	}
	return &blobReader{body: resp.Body, left: left, path: path}, nil
}

// blobReader turns a short, long or broken body into typed errors.
type blobReader struct {
	body io.ReadCloser
	left int64 // below zero: unknown
	some bool  // a byte has come
	path string
}

func (b *blobReader) Read(p []byte) (int, error) {
	if b.left == 0 {
		var one [1]byte
		if n, _ := io.ReadFull(b.body, one[:]); n > 0 {
			return 0, &Error{Method: http.MethodGet, Path: b.path, Kind: ErrCorrupt, Message: "more bytes than announced"}
		}
		return 0, io.EOF
	}
	if b.left > 0 && int64(len(p)) > b.left {
		p = p[:b.left]
	}
	n, err := b.body.Read(p)
	if b.left > 0 {
		b.left -= int64(n)
	}
	b.some = b.some || n > 0
	switch {
	case err == nil:
		return n, nil
	case !b.some && b.left > 0 && (err == io.EOF || err == io.ErrUnexpectedEOF):
		// See ProveBlob: CNCF distribution after a garbage collection.
		return 0, &Error{Method: http.MethodGet, Path: b.path, Kind: ErrNotFound, Message: "the registry has the name but not the content: the body is empty"}
	case err == io.EOF && b.left > 0:
		err = io.ErrUnexpectedEOF
	case err == io.EOF:
		if n > 0 {
			return n, nil // the end is told by the next call
		}
		return 0, io.EOF
	}
	return n, &Error{Method: http.MethodGet, Path: b.path, Kind: ErrUnavailable, Cause: err}
}

func (b *blobReader) Close() error { return b.body.Close() }

// ProveBlob reads the last byte of a blob: the one proof that a registry has it, at the cost of one small request. ErrNotFound if the registry says that it has
// none, or says that it has and then does not give it, or has it with another size. A server that knows no ranges gives its first byte, and the size it announces has to be right.
func (c *Client) ProveBlob(ctx context.Context, repo string, d Descriptor) error {
	full, path, err := c.blobPath(repo, d.Digest)
	if err != nil {
		return err
	}
	r := call{method: http.MethodGet, path: path, scopes: []string{pull(full)}, header: http.Header{}}
	if d.Size > 0 {
		r.header.Set("Range", fmt.Sprintf("bytes=%d-%d", d.Size-1, d.Size-1))
	}
	resp, err := c.do(ctx, r, http.StatusOK, http.StatusPartialContent, http.StatusRequestedRangeNotSatisfiable)
	if err != nil {
		return err
	}
	// Not discard: of a whole blob nothing more is wanted.
	defer resp.Body.Close()
	hollow := func(format string, args ...any) error {
		return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrNotFound, Message: "the registry has the name but not the content: " + fmt.Sprintf(format, args...)}
	}
	size := resp.ContentLength
	switch resp.StatusCode {
	case http.StatusRequestedRangeNotSatisfiable:
		return hollow("no byte %d", d.Size-1)
	case http.StatusPartialContent:
		first, last, total, ok := parseContentRange(resp.Header.Get("Content-Range"))
		if !ok || first != d.Size-1 || last != first {
			return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "not the range that was asked for"}
		}
		size = total
	}
	if size >= 0 && size != d.Size {
		return hollow("%d bytes, not %d", size, d.Size)
	}
	var one [1]byte
	n, err := io.ReadFull(resp.Body, one[:])
	switch {
	case d.Size == 0 && n == 0 && err == io.EOF, d.Size > 0 && n == 1:
		if resp.StatusCode == http.StatusPartialContent {
			io.Copy(io.Discard, io.LimitReader(resp.Body, 1)) // see the end, so that the connection can be used again
		}
		return nil
	case d.Size == 0 && n > 0:
		return hollow("bytes where there should be none")
	case err == io.EOF || err == io.ErrUnexpectedEOF:
		return hollow("the body is empty")
	}
	return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrUnavailable, Cause: err}
}

// parseContentRange reads RFC 9110, section 14.4: "bytes first-last/total", where an unknown total is -1.
func parseContentRange(v string) (first, last, total int64, ok bool) {
	v, found := strings.CutPrefix(strings.TrimSpace(v), "bytes ")
	span, size, slash := strings.Cut(v, "/")
	from, to, dash := strings.Cut(span, "-")
	if !found || !slash || !dash {
		return 0, 0, 0, false
	}
	first, err1 := strconv.ParseInt(strings.TrimSpace(from), 10, 64)
	last, err2 := strconv.ParseInt(strings.TrimSpace(to), 10, 64)
	total = -1
	var err3 error
	if size = strings.TrimSpace(size); size != "*" {
		total, err3 = strconv.ParseInt(size, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || first < 0 || last < first || total >= 0 && last >= total {
		return 0, 0, 0, false
	}
	return first, last, total, true
}
