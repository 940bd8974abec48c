package distribution

import (
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"
)

// errResting is why a request was not sent.
var errResting = errors.New("it asked to be left alone")

// rest is the pause that a registry asked for with Retry-After (RFC 9110, section 10.2.3) when it refused a request for its load (429) or its
// state (503). It holds for the whole client: whoever goes on with other requests while one of them waits has not understood the answer.
type rest struct {
	mu    sync.Mutex
	until time.Time
}

// heed takes over what the answer to a request, or to the login for it, asks for. The end that is farthest away counts, since answers overtake each other.
func (r *rest) heed(err error) {
	var e *Error
	if !errors.As(err, &e) {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.RetryAt.After(r.until) {
		r.until = e.RetryAt
	}
}

// refuse is the error of a request that comes before the end of the pause, or nil. Two kinds are let through. What an upload session still needs: a
// large blob is one request that may take hours, and its commit, refused for what others were told meanwhile, would throw all of it away. And
// deletes: of an upload session, or of a throw-away manifest under a user's tag, they end what was begun; the others are few, and leave the registry
// with less to do.
func (r *rest) refuse(q call, path string) error {
	r.mu.Lock()
	until := r.until
	r.mu.Unlock()
	if !time.Now().Before(until) || q.url != nil || q.method == http.MethodDelete {
		return nil
	}
	return &Error{Method: q.method, Path: path, Kind: ErrUnavailable, RetryAt: until, Cause: fmt.Errorf("%w until %s", errResting, until.UTC().Format(time.TimeOnly))}
}
