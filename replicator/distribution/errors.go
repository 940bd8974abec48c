package distribution

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// The kinds of failures, for errors.Is. Those that are states of the replica (ReadOnly, Unavailable, Full, Unauthorized) say
// nothing of the content; see StateOfReplica.
var (
	// ErrNotFound: there is no such repository, manifest, tag or blob.
	ErrNotFound = errors.New("not found")
	// ErrUnauthorized: the replica or its token server refuses these credentials, or these rights (401, 403).
	ErrUnauthorized = errors.New("not authorized")
	// ErrUnsupported: this registry never does that: no catalog, deletion switched off, no deletion of a tag alone.
	ErrUnsupported = errors.New("not supported by the registry")
	// ErrBlobUnknown: a manifest was refused because content that it names is missing (MANIFEST_BLOB_UNKNOWN).
	ErrBlobUnknown = errors.New("content of the manifest is missing")
	// ErrReadOnly: the replica takes no writes at the moment (405 without a reason).
	ErrReadOnly = errors.New("registry is read-only")
	// ErrUnavailable: no connection, a standstill, or 429, 500, 502, 503, 504: later, see RetryAfter.
	ErrUnavailable = errors.New("registry is unavailable")
	// ErrFull: no space or no quota left (507, or an answer that names a quota).
	ErrFull = errors.New("registry is full")
	// ErrInvalid: the registry will never take or give this (another 4xx), or answers against the protocol.
	ErrInvalid = errors.New("refused by the registry")
	// ErrUploadLost: the upload session is gone: start the blob again.
	ErrUploadLost = errors.New("upload session is lost")
	// ErrOffset: the upload session stands at another offset (416): ask for it with Sync.
	ErrOffset = errors.New("upload session stands at another offset")
	// ErrNotRegistry: something answers at the endpoint, and it does not speak the distribution API.
	ErrNotRegistry = errors.New("not a registry")
	// ErrCorrupt: what was received is not what its digest or size says.
	ErrCorrupt = errors.New("content does not match its digest or size")
)

// StateOfReplica reports whether err is about the state of the replica, or of the way to it, not about the content.
func StateOfReplica(err error) bool {
	for _, kind := range []error{ErrReadOnly, ErrUnavailable, ErrFull, ErrUnauthorized} {
		if errors.Is(err, kind) {
			return true
		}
	}
	return false
}

// Faulty reports whether the registry failed at that one request (500). What it has stored there may be damaged: CNCF distribution, killed
// while it writes the link of a manifest, a tag or a layer, leaves it empty, and fails so at whatever leads there, until the same is written again.
func Faulty(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusInternalServerError && e.Kind == ErrUnavailable
}

// Refused reports whether the request was certainly not carried out: the registry answered so (4xx, but for a time-out), or was not asked.
func Refused(err error) bool {
	var e *Error
	return Unsent(err) || errors.As(err, &e) && e.Status >= 400 && e.Status < 500 && e.Status != http.StatusRequestTimeout
}

// Unsent reports whether the registry was not asked at all, because it wants to be left alone.
func Unsent(err error) bool { return errors.Is(err, errResting) }

// RetryAfter returns how long the registry still wants to be left alone, which it said when it refused a request for its load (429) or its state (503): 5
// minutes at most, or zero. Until then its Client sends it nothing but deletes and what an upload session that is open needs.
func RetryAfter(err error) time.Duration {
	var e *Error
	if errors.As(err, &e) {
		return max(0, time.Until(e.RetryAt))
	}
	return 0
}

// Error is a request that failed. It holds no credentials, no query (upload sessions are signed there) and no address that
// a redirect led to.
type Error struct {
	Method, Path string
	// Status is the HTTP status, zero if there was no answer.
	Status int
	// Code and Message are the registry's own (spec, "Error Codes"), shortened.
	Code, Message string
	// RetryAt is until when the registry wants to be left alone, in 5 minutes at most; zero if it did not ask for that with 429 or 503.
	RetryAt time.Time
	// Kind is one of the Err... above, or nil when the context ended.
	Kind error
	// Cause is what happened below HTTP.
	Cause error
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Method != "" {
		b.WriteString(e.Method + " " + e.Path + ": ")
	}
	if e.Kind != nil {
		b.WriteString(e.Kind.Error())
	} else {
		b.WriteString("given up")
	}
	if e.Status != 0 {
		fmt.Fprintf(&b, " (status %d)", e.Status)
	}
	if e.Code != "" {
		b.WriteString(": " + e.Code)
	}
	if e.Message != "" {
		b.WriteString(": " + e.Message)
	}
	if e.Cause != nil {
		b.WriteString(": " + e.Cause.Error())
	}
	return b.String()
}

// Unwrap gives the kind and the cause.
func (e *Error) Unwrap() []error {
	var out []error
	if e.Kind != nil {
		out = append(out, e.Kind)
	}
	if e.Cause != nil {
		out = append(out, e.Cause)
	}
	return out
}

// blobUnknown is the code of a manifest that names content which is missing.
const blobUnknown = "MANIFEST_BLOB_UNKNOWN"

const (
	maxErrorBody    = 64 << 10
	maxErrorMessage = 512
	// maxRetryAfter bounds what a registry can ask for. Whoever means an hour is asked once in five minutes, which costs it nothing; but a wrong
	// clock, or a zero too many in a maintenance page, does not cut a region off for longer.
	maxRetryAfter = 5 * time.Minute
)

// responseError makes an *Error of an answer with an unwanted status. session says that it was asked of an upload session, which may
// have a path of the registry's own making.
func responseError(method, path string, session bool, resp *http.Response) error {
	e := &Error{Method: method, Path: path, Status: resp.StatusCode}
	// With another status it speaks of that one request, if of anything.
	if e.Status == http.StatusTooManyRequests || e.Status == http.StatusServiceUnavailable {
		now := time.Now()
		if after := parseRetryAfter(resp.Header.Get("Retry-After"), now); after > 0 {
			e.RetryAt = now.Add(after)
		}
	}
	raw, _ := readAll(resp.Body, maxErrorBody)
	var quota bool
	e.Code, e.Message, quota = parseErrorBody(raw)
	e.Kind = kindOf(method, e.Status, e.Code, quota, session || strings.Contains(path, "/blobs/uploads/"))
	return e
}

// parseErrorBody reads the error document of spec, "Error Codes": the code, and all messages in short. Of several codes it is the first
// one, but for content that is missing, since that can be sent: where CNCF distribution meets a manifest that another request is just
// writing, it calls its digest invalid first. quota says that a message names one; details do not count, where the names of
// repositories stand, which may be anything.
func parseErrorBody(raw []byte) (code, message string, quota bool) {
	var doc struct {
		Errors []struct {
			Code    string          `json:"code"`
			Message string          `json:"message"`
			Detail  json.RawMessage `json:"detail"`
		} `json:"errors"`
	}
	if json.Unmarshal(raw, &doc) != nil || len(doc.Errors) == 0 {
		return "", "", false
	}
	code = doc.Errors[0].Code
	var b strings.Builder
	for i, e := range doc.Errors {
		if e.Code == blobUnknown && string(e.Detail) != `""` { // without a name nothing can be sent
			code = blobUnknown
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(e.Message)
		quota = quota || strings.Contains(strings.ToLower(e.Message), "quota")
		if d := strings.TrimSpace(string(e.Detail)); d != "" && d != "null" && d != "{}" {
			b.WriteString(" " + d)
		}
		if b.Len() > maxErrorMessage {
			break
		}
	}
	return clean(code, 64), clean(b.String(), maxErrorMessage), quota
}

// clean makes foreign text fit for a line of a log.
func clean(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return s
}

func kindOf(method string, status int, code string, quota, upload bool) error {
	write := method == http.MethodPut || method == http.MethodPost || method == http.MethodPatch
	switch {
	case status == http.StatusInsufficientStorage,
		// Only of a write: what is not found may have the word in its name.
		quota && write && status >= 400 && status < 500 && status != http.StatusNotFound && status != http.StatusTooManyRequests:
		return ErrFull
	case code == blobUnknown,
		// An index whose child is missing: pkg/registry of go-containerregistry and others.
		method == http.MethodPut && status == http.StatusNotFound && (code == "MANIFEST_UNKNOWN" || code == "BLOB_UNKNOWN"):
		return ErrBlobUnknown
	case code == "BLOB_UPLOAD_UNKNOWN", code == "BLOB_UPLOAD_INVALID" && status == http.StatusNotFound,
		upload && status == http.StatusNotFound && code != "NAME_UNKNOWN" && method != http.MethodPost:
		return ErrUploadLost
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return ErrUnauthorized
	case status == http.StatusNotFound:
		return ErrNotFound
	case status == http.StatusMethodNotAllowed && (write || method == http.MethodDelete && code != "UNSUPPORTED"):
		return ErrReadOnly
	case status == http.StatusMethodNotAllowed, status == http.StatusNotImplemented, code == "UNSUPPORTED":
		return ErrUnsupported
	case status == http.StatusRequestedRangeNotSatisfiable && upload:
		return ErrOffset
	case status == http.StatusTooManyRequests, status == http.StatusRequestTimeout, status >= 500:
		return ErrUnavailable
	}
	return ErrInvalid
}

// parseRetryAfter reads RFC 9110, section 10.2.3: seconds or a date.
func parseRetryAfter(v string, now time.Time) time.Duration {
	if v == "" {
		return 0
	}
	var d time.Duration
	if s, err := strconv.ParseUint(strings.TrimSpace(v), 10, 32); err == nil {
		d = time.Duration(s) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}
