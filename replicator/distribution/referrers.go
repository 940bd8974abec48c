package distribution

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// probed is a remembered answer to whether there is a referrers API.
type probed struct {
	api   bool
	until time.Time
}

// probeTTL is how long that is remembered: registries are upgraded.
const probeTTL = 10 * time.Minute

// ReferrersByAPI lists what refers to a subject (spec, "Listing Referrers"), as far as the registry has an API for it; found is false where it has none, which
// costs a request now and then. No referrers are an empty list and no error.
func (c *Client) ReferrersByAPI(ctx context.Context, repo, subject string) (list []Descriptor, found bool, err error) {
	full, err := c.full(repo)
	if err != nil {
		return nil, false, err
	}
	if _, err := NewHash(subject); err != nil {
		return nil, false, err
	}
	if p := c.referrers.Load(); p != nil && !p.api && time.Now().Before(p.until) {
		return nil, false, nil
	}
	if list, found, err = c.referrersByAPI(ctx, full, subject); err != nil {
		return nil, false, fmt.Errorf("listing the referrers of %s@%s: %w", repo, subject, err)
	}
	return list, found, nil
}

// referrersByAPI asks the API; found is false where there is none. The shape of the answer tells: a registry without it answers 404, or with the error or the page that it has
// for unknown paths.
func (c *Client) referrersByAPI(ctx context.Context, full, subject string) (list []Descriptor, found bool, err error) {
	path := "/v2/" + full + "/referrers/" + subject
	query := url.Values{}
	seen := map[string]bool{}
	for page := 0; ; page++ {
		if page == c.limits.Pages {
			return nil, false, &Error{Method: http.MethodGet, Path: path, Kind: ErrInvalid, Message: fmt.Sprintf("the listing has more than %d pages", page)}
		}
		r := call{method: http.MethodGet, path: path, query: query, scopes: []string{pull(full)}, header: http.Header{"Accept": {string(types.OCIImageIndex)}}}
		resp, err := c.do(ctx, r, http.StatusOK)
		if err != nil {
			if page > 0 || StateOfReplica(err) || !isAnswer(err) {
				return nil, false, err
			}
			var e *Error
			if errors.As(err, &e) && e.Code == "NAME_UNKNOWN" {
				// Of a repository that is not there; it says nothing of the API.
				return nil, false, nil
			}
			c.referrers.Store(&probed{until: time.Now().Add(probeTTL)})
			return nil, false, nil
		}
		raw, rerr := readAll(resp.Body, c.limits.Manifest)
		links := resp.Header.Values("Link")
		discard(resp)
		if rerr != nil {
			return nil, false, &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrUnavailable, Cause: rerr}
		}
		var doc struct {
			Manifests *[]Descriptor `json:"manifests"`
		}
		if json.Unmarshal(raw, &doc) != nil || doc.Manifests == nil && specific(resp.Header.Get("Content-Type")) != string(types.OCIImageIndex) {
			if page > 0 {
				return nil, false, &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "not a list of referrers"}
			}
			c.referrers.Store(&probed{until: time.Now().Add(probeTTL)})
			return nil, false, nil
		}
		if page == 0 {
			c.referrers.Store(&probed{api: true})
		}
		fresh := false
		if doc.Manifests != nil {
			all, err := distinct(*doc.Manifests)
			if err != nil {
				return nil, false, &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrInvalid, Cause: err}
			}
			for _, d := range all {
				if !seen[d.Digest] {
					seen[d.Digest], fresh = true, true
					list = append(list, d)
				}
			}
		}
		next, err := c.nextPage(path, links)
		if err != nil {
			return nil, false, &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: ErrInvalid, Cause: err}
		}
		if next == nil {
			return list, true, nil
		}
		if !fresh && doc.Manifests != nil && len(*doc.Manifests) > 0 || next.Encode() == query.Encode() {
			return nil, false, &Error{Method: r.method, Path: path, Kind: ErrInvalid, Message: "the listing's pages go round in circles"}
		}
		query = next
	}
}

// isAnswer reports whether a request failed by an answer, rather than for want of one.
func isAnswer(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status != 0
}
