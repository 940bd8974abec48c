package distribution

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Upload is a session in which a blob enters a repository (spec, "Pushing a blob in chunks"). It is bound to the server that began it. Its
// methods are called one at a time.
//
// After Append fails the session may stand anywhere: Sync asks where, or says ErrUploadLost. CNCF distribution 3 keeps every byte that
// arrived; 2.8 loses a session that was cut in the middle of a request.
type Upload struct {
	client   *Client
	full     string
	location *url.URL
	offset   int64
	minimum  int64
}

// StartUpload begins an upload session.
func (c *Client) StartUpload(ctx context.Context, repo string) (*Upload, error) {
	_, up, err := c.startUpload(ctx, repo, nil, nil)
	return up, err
}

// Mount asks the registry to take a blob from another of its repositories. Where it does not, the upload session that it began instead, if it did, is returned to be
// used. That a mount was accepted proves nothing: see ProveBlob.
func (c *Client) Mount(ctx context.Context, repo, digest, from string) (mounted bool, up *Upload, err error) {
	source, err := c.full(from)
	if err != nil {
		return false, nil, err
	}
	if _, err := NewHash(digest); err != nil {
		return false, nil, err
	}
	return c.startUpload(ctx, repo, url.Values{"mount": {digest}, "from": {source}}, []string{pull(source)})
}

func (c *Client) startUpload(ctx context.Context, repo string, query url.Values, scopes []string) (bool, *Upload, error) {
	full, err := c.full(repo)
	if err != nil {
		return false, nil, err
	}
	path := "/v2/" + full + "/blobs/uploads/"
	want := []int{http.StatusAccepted}
	if query != nil {
		want = append(want, http.StatusCreated)
	}
	resp, err := c.do(ctx, call{method: http.MethodPost, path: path, query: query, body: []byte{}, scopes: append([]string{pullPush(full)}, scopes...)}, want...)
	if err != nil {
		return false, nil, err
	}
	discard(resp)
	if resp.StatusCode == http.StatusCreated {
		return true, nil, nil
	}
	up := &Upload{client: c, full: full}
	if err := up.moved(resp, true); err != nil {
		return false, nil, err
	}
	if n, err := strconv.ParseInt(resp.Header.Get("OCI-Chunk-Min-Length"), 10, 64); err == nil && n > 0 {
		up.minimum = n
	}
	return false, up, nil
}

// ResumeUpload takes up a session by the Location of an earlier Upload of this endpoint. Sync says whether it still stands.
func (c *Client) ResumeUpload(repo, location string) (*Upload, error) {
	full, err := c.full(repo)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(location)
	if err != nil || u.Host == "" {
		return nil, &Error{Kind: ErrInvalid, Message: "the upload session's location is not a URL"}
	}
	return &Upload{client: c, full: full, location: u}, nil
}

// Location names the session, for ResumeUpload. It may hold a signature: it is no matter for logs.
func (u *Upload) Location() string { return u.location.String() }

// Offset is how many bytes the session has, as far as is known.
func (u *Upload) Offset() int64 { return u.offset }

// MinimumChunk is the least size of every Append but the last, or zero (spec, OCI-Chunk-Min-Length).
func (u *Upload) MinimumChunk() int64 { return u.minimum }

// moved takes the Location of an answer, relative or absolute. One that differs from the endpoint in the scheme or port alone is that of a registry behind
// a proxy that does not know its own URL: the endpoint is right. One on another host is followed without credentials.
func (u *Upload) moved(resp *http.Response, required bool) error {
	v := resp.Header.Get("Location")
	if v == "" {
		if !required {
			return nil
		}
		return &Error{Method: resp.Request.Method, Path: resp.Request.URL.Path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "an upload session without location"}
	}
	next, err := resp.Request.URL.Parse(v)
	if err != nil || (next.Scheme != "http" && next.Scheme != "https") || next.Host == "" {
		return &Error{Method: resp.Request.Method, Path: resp.Request.URL.Path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "an upload session's location is not a URL"}
	}
	end := u.client.endpoint
	switch {
	case strings.EqualFold(next.Hostname(), end.Hostname()):
		next.Scheme, next.Host = end.Scheme, end.Host
	case end.Scheme == "https" && next.Scheme != "https":
		return &Error{Method: resp.Request.Method, Path: resp.Request.URL.Path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "an upload session moves from https to http"}
	}
	next.User, next.Fragment = nil, ""
	u.location = next
	return nil
}

func (u *Upload) call(method string) call {
	return call{method: method, url: u.location, scopes: []string{pullPush(u.full)}}
}

// Append sends n bytes of r in one request (PATCH), from the offset on. r is read no more once Append has returned. When it fails the offset is unknown.
func (u *Upload) Append(ctx context.Context, r io.Reader, n int64) error {
	q := u.call(http.MethodPatch)
	q.stream, q.size = r, n
	q.header = http.Header{"Content-Type": {"application/octet-stream"}}
	// A first request without a range is a streamed upload, which every registry takes, as docker's client has always sent it.
	if u.offset > 0 || u.minimum > 0 {
		q.header.Set("Content-Range", fmt.Sprintf("%d-%d", u.offset, u.offset+n-1))
	}
	resp, err := u.client.do(ctx, q, http.StatusAccepted, http.StatusNoContent, http.StatusCreated, http.StatusOK)
	if err != nil {
		return err
	}
	discard(resp)
	if err := u.moved(resp, false); err != nil {
		return err
	}
	u.offset += n
	// 0-0 is said both of one byte and of none.
	if end, ok := parseUploadRange(resp.Header.Get("Range")); ok && end > 0 && end+1 != u.offset {
		u.offset = end + 1
		return &Error{Method: q.method, Path: resp.Request.URL.Path, Status: resp.StatusCode, Kind: ErrOffset, Message: fmt.Sprintf("the registry has %d bytes", u.offset)}
	}
	return nil
}

// Sync asks the registry for the session's offset. ErrUploadLost if there is no such session, or the registry cannot say.
func (u *Upload) Sync(ctx context.Context) error {
	resp, err := u.client.do(ctx, u.call(http.MethodGet), http.StatusNoContent, http.StatusOK, http.StatusAccepted)
	if err != nil {
		var e *Error
		if errors.As(err, &e) && e.Status != 0 && !StateOfReplica(err) {
			e.Kind = ErrUploadLost
		}
		return err
	}
	discard(resp)
	end, ok := parseUploadRange(resp.Header.Get("Range"))
	if !ok {
		return &Error{Method: http.MethodGet, Path: resp.Request.URL.Path, Status: resp.StatusCode, Kind: ErrUploadLost, Message: "the registry does not say what it has"}
	}
	if err := u.moved(resp, false); err != nil {
		return err
	}
	if u.offset = 0; end > 0 {
		u.offset = end + 1
	}
	return nil
}

// Commit completes the upload with its digest and the rest of the blob (nil: nothing is left). The registry verifies the digest. If it fails without an answer, the outcome is
// unknown: prove the blob.
func (u *Upload) Commit(ctx context.Context, digest string, rest []byte) error {
	if _, err := NewHash(digest); err != nil {
		return err
	}
	location := *u.location
	query := location.Query()
	query.Set("digest", digest)
	location.RawQuery = query.Encode()
	q := u.call(http.MethodPut)
	q.url, q.commit, q.body = &location, true, rest
	if q.body == nil {
		q.body = []byte{}
	}
	if len(rest) > 0 {
		q.header = http.Header{"Content-Type": {"application/octet-stream"}}
		if u.offset > 0 {
			q.header.Set("Content-Range", fmt.Sprintf("%d-%d", u.offset, u.offset+int64(len(rest))-1))
		}
	}
	resp, err := u.client.do(ctx, q, http.StatusCreated, http.StatusNoContent, http.StatusOK, http.StatusAccepted)
	if err != nil {
		return err
	}
	discard(resp)
	return nil
}

const (
	// cancelTimeout bounds the farewell to an upload session.
	cancelTimeout = 5 * time.Second
	// cancelPause is the first pause between two attempts at it.
	cancelPause = 25 * time.Millisecond
)

// Cancel gives the session up, so that the registry need not keep what it has got. It does so also when ctx has ended, and takes 5 s at
// most. An error may be ignored: registries purge old sessions. CNCF distribution 2.8 has lost a session that was cut in the middle of
// a request, and purges it too.
func (u *Upload) Cancel(ctx context.Context) error {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), cancelTimeout)
	defer stop()
	err := u.cancel(ctx)
	// Version 3 cancels only at the offset at which the session stands, where a request that was cut off may still move it.
	for pause := cancelPause; errors.Is(err, ErrOffset); pause *= 2 {
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return err
		}
		if err = u.Sync(ctx); err == nil {
			err = u.cancel(ctx)
		}
	}
	return err
}

func (u *Upload) cancel(ctx context.Context) error {
	resp, err := u.client.do(ctx, u.call(http.MethodDelete), http.StatusNoContent, http.StatusOK, http.StatusAccepted)
	if err != nil {
		return err
	}
	discard(resp)
	return nil
}

// parseUploadRange reads the Range of an upload session, "0-last", also with "bytes=" before it.
func parseUploadRange(v string) (last int64, ok bool) {
	from, to, found := strings.Cut(strings.TrimPrefix(strings.TrimSpace(v), "bytes="), "-")
	if !found || from != "0" {
		return 0, false
	}
	last, err := strconv.ParseInt(to, 10, 64)
	if err != nil || last < -1 {
		return 0, false
	}
	return last, true
}
