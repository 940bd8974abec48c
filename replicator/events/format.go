package events

import (
	"errors"
	"net/http"
	"time"
)

// Message is one request that a replica sent, complete. Some formats say what they are in headers, others in the body.
type Message struct {
	Header   http.Header
	Body     []byte
	Received time.Time
}

// Report is what a format made of a message.
type Report struct {
	// Events are valid, in the order of the message, with repository names as the replica has them.
	Events []Event
	// Ignored counts what is of no interest: pulls, mounts, blobs.
	Ignored int
	// Invalid says of each event that had no usable names why not. They are no error of the message: a registry would send
	// it again, for ever, and all later ones wait behind it.
	Invalid []error
}

// Format reads one kind of envelope. It does no I/O, keeps nothing of the message's body, and is safe for concurrent
// use.
type Format interface {
	// Match reports whether the message says that it is of this format.
	Match(Message) bool
	// Parse reads it. An error means that the message as a whole is not what it says it is.
	Parse(Message) (Report, error)
}

// Formats are the formats that are known, in the order in which they are tried.
func Formats() []Format { return []Format{Distribution{}} }

// maxEvents is how many events one message may hold. CNCF distribution sends one each; a message at the default limit
// of 1 MiB holds some 2,000 of their size.
const maxEvents = 4096

var errTooMany = errors.New("more than 4096 events in one message")

// add sorts one event into the report.
func (r *Report) add(e Event) {
	if err := e.Validate(); err != nil {
		r.Invalid = append(r.Invalid, err)
		return
	}
	r.Events = append(r.Events, e)
}
