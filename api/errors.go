package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"portolan/store"
	"portolan/topology"
)

// Code says what kind of error a request met.
type Code string

// The codes of errors.
const (
	CodeInvalid      Code = "invalid"      // 400: the request is wrong in itself; details name what
	CodeUnauthorized Code = "unauthorized" // 401: no token, or not the right one
	CodeForbidden    Code = "forbidden"    // 403: a host name or page that may not ask
	CodeNotFound     Code = "not_found"    // 404: no such registry or replica
	CodeExists       Code = "exists"       // 409: there is one of that name already
	CodeConflict     Code = "conflict"     // 409: others kept changing the same; try again
	CodeDeleting     Code = "deleting"     // 409: the replica is being deleted, which cannot be called off
	CodeTooLarge     Code = "too_large"    // 413
	CodeMediaType    Code = "media_type"   // 415: not application/json
	CodeRefused      Code = "refused"      // 422: it would do harm, or this server cannot do it
	CodeInternal     Code = "internal"     // 500
	CodeUnavailable  Code = "unavailable"  // 503: the store, or a part of the server, is not there at the moment

	// Those of the command line alone.
	CodeTimeout Code = "timeout" // what was waited for did not come in time
	CodeFailed  Code = "failed"  // anything else that no server told of
)

var statusOf = map[Code]int{
	CodeInvalid: http.StatusBadRequest, CodeUnauthorized: http.StatusUnauthorized, CodeForbidden: http.StatusForbidden,
	CodeNotFound: http.StatusNotFound, CodeExists: http.StatusConflict, CodeConflict: http.StatusConflict, CodeDeleting: http.StatusConflict,
	CodeTooLarge: http.StatusRequestEntityTooLarge, CodeMediaType: http.StatusUnsupportedMediaType,
	CodeRefused: http.StatusUnprocessableEntity, CodeInternal: http.StatusInternalServerError, CodeUnavailable: http.StatusServiceUnavailable,
}

// Error is what a request met, the same on both sides.
type Error struct {
	Code Code `json:"code"`
	// Message says what is wrong and what to do, for people.
	Message string `json:"message"`
	// Details are the faults of a document or an edit, or, by replica, what is not there yet.
	Details []topology.Fault `json:"details,omitempty"`

	unanswered bool // see Answered
}

// Error is the message.
func (e *Error) Error() string { return e.Message }

// IsCode reports whether err is, or wraps, an Error with that code.
func IsCode(err error, code Code) bool {
	var e *Error
	return errors.As(err, &e) && e.Code == code
}

func failf(code Code, format string, args ...any) *Error {
	return &Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

// ErrorOf gives any error the form that the API has for it; otherwise is the code of one of no known kind.
func ErrorOf(err error, otherwise Code) *Error {
	var e *Error
	var invalid *topology.InvalidError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &e):
		return e
	case errors.As(err, &invalid):
		return &Error{Code: CodeInvalid, Message: err.Error(), Details: invalid.Faults}
	case errors.As(err, &tooLarge):
		return failf(CodeTooLarge, "the request is larger than %d bytes", tooLarge.Limit)
	case errors.Is(err, topology.ErrInvalid):
		return &Error{Code: CodeInvalid, Message: err.Error()}
	case errors.Is(err, topology.ErrNotFound):
		return &Error{Code: CodeNotFound, Message: err.Error()}
	case errors.Is(err, topology.ErrExists):
		return &Error{Code: CodeExists, Message: err.Error()}
	case errors.Is(err, topology.ErrDeleting):
		return &Error{Code: CodeDeleting, Message: err.Error()}
	case errors.Is(err, topology.ErrRefused):
		return &Error{Code: CodeRefused, Message: err.Error()}
	case errors.Is(err, topology.ErrConflict), errors.Is(err, store.ErrConflict):
		return &Error{Code: CodeConflict, Message: err.Error()}
	case errors.Is(err, store.ErrUnavailable), errors.Is(err, context.DeadlineExceeded):
		return &Error{Code: CodeUnavailable, Message: err.Error()}
	}
	return &Error{Code: otherwise, Message: err.Error()}
}

// Failure is how an error stands in an answer.
type Failure struct {
	Error *Error `json:"error"`
}

// decodeStrict reads JSON without room for misspelt names.
func decodeStrict(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return err
		}
		return failf(CodeInvalid, "the request's body is not what it should be: %s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return failf(CodeInvalid, "the request's body goes on after its end")
	}
	return nil
}
