package distribution

import (
	"errors"
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// script is a transport that answers without a network, and counts.
type script struct {
	answer func(*http.Request) (status int, header http.Header)
	asked  int
}

func (s *script) RoundTrip(r *http.Request) (*http.Response, error) {
	s.asked++
	status, header := s.answer(r)
	return &http.Response{StatusCode: status, Header: header, Body: io.NopCloser(strings.NewReader("")), Request: r}, nil
}

// Nothing is asked of a registry before the time that it named, by whatever request it was told, and everything after it.
func TestRetryAfterHoldsForAllRequests(t *testing.T) {
	t.Parallel()
	digest := Digest([]byte("x"))
	for name, tc := range map[string]struct {
		status int
		asks   string
		rests  time.Duration
	}{
		"limited":                       {http.StatusTooManyRequests, "30", 30 * time.Second},
		"in maintenance, until a date":  {http.StatusServiceUnavailable, time.Date(2000, 1, 1, 0, 1, 0, 0, time.UTC).Format(http.TimeFormat), time.Minute}, // synctest's clock begins at midnight
		"for longer than is believed":   {http.StatusServiceUnavailable, "86400", 5 * time.Minute},
		"without a time":                {http.StatusServiceUnavailable, "", 0},
		"not now, but at once":          {http.StatusTooManyRequests, "0", 0},
		"a failure of one request":      {http.StatusInternalServerError, "30", 0},
		"something else than its state": {http.StatusNotFound, "30", 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				busy := true
				s := &script{answer: func(r *http.Request) (int, http.Header) {
					if strings.HasSuffix(r.URL.Path, "/uploads/open") {
						return map[string]int{http.MethodGet: http.StatusNoContent, http.MethodPut: http.StatusCreated}[r.Method], http.Header{"Range": {"0-9"}}
					}
					if busy {
						return tc.status, http.Header{"Retry-After": {tc.asks}}
					}
					return http.StatusNotFound, http.Header{}
				}}
				c, err := New(Options{Endpoint: &url.URL{Scheme: "https", Host: "registry.test"}, Transport: s})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := c.Head(t.Context(), "a", "1"); err == nil {
					t.Fatal("no error")
				}
				busy = false
				others := map[string]func() error{
					"head":   func() error { _, err := c.Head(t.Context(), "b", "2"); return err },
					"get":    func() error { _, _, _, err := c.Manifest(t.Context(), "a", digest); return err },
					"blob":   func() error { return c.ProveBlob(t.Context(), "a", Descriptor{Digest: digest, Size: 1}) },
					"upload": func() error { _, err := c.StartUpload(t.Context(), "a"); return err },
				}
				wait := func(d time.Duration) {
					if d > 0 {
						time.Sleep(d)
					}
				}
				wait(tc.rests - time.Second)
				before := s.asked
				for what, other := range others {
					err := other()
					if rested := RetryAfter(err) == time.Second && errors.Is(err, ErrUnavailable) && Refused(err) && Unsent(err); rested != (tc.rests > 0) {
						t.Errorf("%s a second before: %v", what, err)
					}
				}
				if asked := s.asked - before; (asked == 0) != (tc.rests > 0) {
					t.Errorf("%d requests a second before", asked)
				}
				if err := c.DeleteTag(t.Context(), "a", "1", ""); !errors.Is(err, ErrNotFound) {
					t.Errorf("what was begun cannot be ended: %v", err)
				}
				open, err := c.ResumeUpload("a", "https://registry.test/v2/a/blobs/uploads/open")
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(open.Sync(t.Context()), open.Commit(t.Context(), digest, nil)); err != nil {
					t.Errorf("what is complete cannot be committed: %v", err)
				}
				wait(time.Second)
				before = s.asked
				for what, other := range others {
					if err := other(); errors.Is(err, ErrUnavailable) {
						t.Errorf("%s after it: %v", what, err)
					}
				}
				if asked := s.asked - before; asked != len(others) {
					t.Errorf("%d requests after it", asked)
				}
			})
		})
	}
}

// A token server's limit keeps from asking it again, which every request would do that needs a token.
func TestRetryAfterOfATokenServer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := &script{answer: func(r *http.Request) (int, http.Header) {
			if r.URL.Path == "/token" {
				return http.StatusTooManyRequests, http.Header{"Retry-After": {"10"}}
			}
			return http.StatusUnauthorized, http.Header{"Www-Authenticate": {`Bearer realm="https://registry.test/token",service="s"`}}
		}}
		c, err := New(Options{Endpoint: &url.URL{Scheme: "https", Host: "registry.test"}, Transport: s})
		if err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if _, err := c.Head(t.Context(), "a", "1"); RetryAfter(err) != 10*time.Second {
				t.Fatal(err)
			}
		}
		if s.asked != 2 {
			t.Errorf("%d requests", s.asked)
		}
	})
}
