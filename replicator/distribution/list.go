package distribution

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"strconv"
	"strings"
)

const (
	// maxPage bounds one page: 2.8 lists all tags of a repository at once, 100,000 of the longest being 13 MB.
	maxPage = 64 << 20
)

// Repositories lists the repositories by the registry's catalog, without the prefix, leaving out what is not below it. A registry without
// catalog, or one that does not show it, ends the sequence with ErrUnsupported or ErrUnauthorized. After an error there is nothing more: a
// listing that did not end without one is not complete, and says nothing of what is absent.
func (c *Client) Repositories(ctx context.Context) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		for name, err := range c.list(ctx, "/v2/_catalog", "repositories", []string{"registry:catalog:*"}) {
			if err != nil {
				var e *Error
				if errors.As(err, &e) && e.Kind == ErrNotFound {
					e.Kind = ErrUnsupported
				}
				yield("", fmt.Errorf("listing repositories: %w", err))
				return
			}
			if c.prefix != "" {
				var below bool
				if name, below = strings.CutPrefix(name, c.prefix+"/"); !below {
					continue
				}
			}
			if !yield(name, nil) {
				return
			}
		}
	}
}

// Tags lists the tags of a repository; ErrNotFound if there is no such repository. What Repositories says of errors holds here.
func (c *Client) Tags(ctx context.Context, repo string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		full, err := c.full(repo)
		if err != nil {
			yield("", err)
			return
		}
		for tag, err := range c.list(ctx, "/v2/"+full+"/tags/list", "tags", []string{pull(full)}) {
			if err != nil {
				yield("", fmt.Errorf("listing tags of %s: %w", repo, err))
				return
			}
			if !yield(tag, nil) {
				return
			}
		}
	}
}

// list follows the pages of a listing (spec, "Listing Tags"): by the Link header, and after a full page without one, by the last entry, since
// some registries cut a page at n and say nothing. Each entry is given once. A page that brings nothing new ends the listing.
func (c *Client) list(ctx context.Context, path, member string, scopes []string) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		seen := map[string]bool{}
		query := url.Values{"n": {strconv.Itoa(c.limits.Page)}}
		for page := 0; ; page++ {
			if page == c.limits.Pages {
				yield("", &Error{Method: http.MethodGet, Path: path, Kind: ErrInvalid, Message: fmt.Sprintf("the listing has more than %d pages", page)})
				return
			}
			entries, next, err := c.page(ctx, path, query, member, scopes)
			var e *Error
			if page == 0 && query.Has("n") && errors.As(err, &e) && e.Status == http.StatusBadRequest {
				// A registry whose limit is lower than our n (PAGINATION_NUMBER_INVALID): its own page size, then.
				query = url.Values{}
				entries, next, err = c.page(ctx, path, query, member, scopes)
			}
			if err != nil {
				yield("", err)
				return
			}
			fresh := false
			for _, name := range entries {
				if seen[name] {
					continue
				}
				seen[name], fresh = true, true
				if !yield(name, nil) {
					return
				}
			}
			switch {
			case next != nil && (fresh || len(entries) == 0) && next.Encode() != query.Encode():
				query = next
			case next != nil:
				yield("", &Error{Method: http.MethodGet, Path: path, Kind: ErrInvalid, Message: "the listing's pages go round in circles"})
				return
			case fresh && query.Has("n") && len(entries) >= c.limits.Page:
				query = url.Values{"n": {strconv.Itoa(c.limits.Page)}, "last": {entries[len(entries)-1]}}
			default:
				return
			}
		}
	}
}

// page reads one page, and the query of the next. Of a Link only the query is used: path and host stay.
func (c *Client) page(ctx context.Context, path string, query url.Values, member string, scopes []string) ([]string, url.Values, error) {
	r := call{method: http.MethodGet, path: path, query: query, scopes: scopes, header: http.Header{"Accept": {"application/json"}}}
	resp, err := c.do(ctx, r, http.StatusOK)
	if err != nil {
		return nil, nil, err
	}
	defer discard(resp)
	fail := func(kind, cause error) error {
		return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: kind, Cause: cause}
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxPage+1))
	if err != nil {
		return nil, nil, fail(ErrUnavailable, err)
	}
	if len(raw) > maxPage {
		return nil, nil, fail(ErrInvalid, fmt.Errorf("a page of more than %d bytes", maxPage))
	}
	var doc map[string]json.RawMessage
	var entries []string
	if err := json.Unmarshal(raw, &doc); err != nil {
		// Most often a web server that answers everything with a page.
		return nil, nil, fail(ErrInvalid, fmt.Errorf("the answer is not a registry's: want a JSON object, not %s", clean(resp.Header.Get("Content-Type"), 100)))
	}
	list, found := doc[member]
	if !found {
		return nil, nil, fail(ErrInvalid, fmt.Errorf("the listing has no %q", member))
	}
	if err := json.Unmarshal(list, &entries); err != nil {
		return nil, nil, fail(ErrInvalid, err)
	}
	next, err := c.nextPage(path, resp.Header.Values("Link"))
	if err != nil {
		return nil, nil, fail(ErrInvalid, err)
	}
	return entries, next, nil
}

// nextPage finds rel=next in Link headers. Some registries give a path with or without /v2, some an absolute URL by the name that they know
// themselves by; what is followed is its query at the path that was asked. A foreign listing, of another path's end, is an error.
func (c *Client) nextPage(path string, links []string) (url.Values, error) {
	target := parseNext(links)
	if target == "" {
		return nil, nil
	}
	u, err := (&url.URL{Path: path}).Parse(target)
	if err != nil {
		return nil, fmt.Errorf("the next page is not a URL")
	}
	if u.Host != "" && !strings.EqualFold(u.Hostname(), c.endpoint.Hostname()) {
		return nil, fmt.Errorf("the next page is on another host, %s", clean(u.Host, 100))
	}
	if !strings.HasSuffix(u.Path, strings.TrimPrefix(path, "/v2")) {
		return nil, fmt.Errorf("the next page belongs to another listing")
	}
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("the next page's query is malformed")
	}
	return query, nil
}

// parseNext returns the target of the first link with rel=next (RFC 8288, section 3), or "".
func parseNext(headers []string) string {
	for _, s := range headers {
		for {
			open := strings.IndexByte(s, '<')
			if open < 0 {
				break
			}
			end := strings.IndexByte(s[open:], '>')
			if end < 0 {
				break
			}
			target := s[open+1 : open+end]
			s = s[open+end+1:]
			// The parameters go up to the comma before the next link; quoted strings may hold commas.
			quoted, stop := false, len(s)
		scan:
			for i := 0; i < len(s); i++ {
				switch {
				case s[i] == '\\' && quoted:
					i++
				case s[i] == '"':
					quoted = !quoted
				case s[i] == ',' && !quoted:
					stop = i
					break scan
				}
			}
			for _, p := range strings.Split(s[:stop], ";") {
				name, value, _ := strings.Cut(p, "=")
				if !strings.EqualFold(strings.TrimSpace(name), "rel") {
					continue
				}
				for _, rel := range strings.Fields(strings.Trim(strings.TrimSpace(value), `"`)) {
					if strings.EqualFold(rel, "next") {
						return target
					}
				}
			}
			s = s[stop:]
		}
	}
	return ""
}
