package events

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"golang.org/x/time/rate"
)

const (
	// DefaultMaxBody is the largest message that is read by default, in bytes. An event is some 1,000 bytes.
	DefaultMaxBody = 1 << 20
	// drainFactor times the limit is how much of a larger message is taken in, and dropped, before a replica is marked instead.
	// A header of 1 MiB, Go's limit, is at most 6 MiB as an escaped User-Agent, and the references of a
	// manifest of 4 MiB, distribution's limit, are 4 MiB: no registry sends more than 16.
	drainFactor = 16
	// perReplica is how many requests of one replica are read at once. Registries send one after the other; behind one
	// name there may be a few of them.
	perReplica = 8
	// spoolTimeout bounds the wait for the disk, from when a message has been read. Registries give up after a second by default and send it again.
	spoolTimeout = 10 * time.Second
	// retryAfter is what a 503 asks for, in seconds.
	retryAfter = "5"
)

// Config is what a Handler needs.
type Config struct {
	// Tokens says who may post.
	Tokens TokenSource
	// Repository turns the name that a replica uses into the registry's, taking its prefix off; false: it is not the
	// registry's. Nil: they are the same.
	Repository func(registry, region, repository string) (string, bool)
	// Formats are the envelopes that are read. Default: Formats().
	Formats []Format
	// MaxBody is the largest message that is read, in bytes. Default: DefaultMaxBody.
	MaxBody int64
	Log     *zap.Logger
	// Metrics is where the handler's and the spool's metrics are registered.
	Metrics prometheus.Registerer
}

// Handler takes the notifications of replicas: POST /events/<registry>/<region> with the replica's own token as
// "Authorization: Bearer <token>". It answers
//
//	202  the events are on disk, or were of no interest
//	400  the body is not what its Content-Type says
//	401  no such replica, or not its token: one answer for both
//	404  another path
//	405  another method than POST
//	413  more than 16 times MaxBody
//	415  a format that is not known
//	503  the disk failed, or is too slow; Retry-After
//
// CNCF distribution repeats what was not accepted for ever, and sends nothing else meanwhile. So whatever it may really send
// is accepted: an event with impossible names is counted and dropped, and a message larger than MaxBody (whoever pushes
// chooses the User-Agent in it) marks the whole replica to be scanned.
type Handler struct {
	config  Config
	spool   *Spool
	metrics *metrics
	refused *rate.Limiter

	mu    sync.Mutex
	slots map[string]chan struct{} // by replica; only those that showed their token
}

// NewHandler makes a handler that spools into spool. The error is that of registering the metrics.
func NewHandler(spool *Spool, config Config) (*Handler, error) {
	if config.Formats == nil {
		config.Formats = Formats()
	}
	if config.MaxBody <= 0 {
		config.MaxBody = DefaultMaxBody
	}
	if config.Repository == nil {
		config.Repository = func(_, _, repository string) (string, bool) { return repository, true }
	}
	m, err := newMetrics(config.Metrics, spool)
	if err != nil {
		return nil, fmt.Errorf("registering the metrics of the events listener: %w", err)
	}
	if spool.damage != nil {
		config.Log.Error("the event spool was damaged: it was put aside, and every replica will be scanned for what it held",
			zap.String("file", spool.aside), zap.Error(spool.damage))
	}
	return &Handler{
		config: config, spool: spool, metrics: m,
		// A forger must not fill the log: one line in 10 seconds after the first five.
		refused: rate.NewLimiter(rate.Every(10*time.Second), 5),
		slots:   map[string]chan struct{}{},
	}, nil
}

// ServeHTTP implements http.Handler.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	status, reason := h.serve(w, r)
	h.metrics.requests.WithLabelValues(result(status)).Inc()
	if status == http.StatusAccepted {
		w.WriteHeader(status)
		return
	}
	if status < 500 {
		h.logRefused(r, status, reason)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	fmt.Fprintln(w, reason)
}

// serve does it all but the answer, which is a status and, unless that is 202, a reason for the sender.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request) (status int, reason string) {
	registry, region, ok := replicaOf(r.URL.Path)
	if !ok {
		return http.StatusNotFound, "events are posted to /events/<registry>/<region>"
	}
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		return http.StatusMethodNotAllowed, "events are posted"
	}
	if !h.authorized(r, registry, region) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="portolan events"`)
		return http.StatusUnauthorized, "the token is not that of this replica"
	}
	release, err := h.enter(r.Context(), registry+"/"+region)
	if err != nil {
		return h.unavailable(w, registry, region, err)
	}
	defer release()

	m := Message{Header: r.Header, Received: time.Now().UTC()}
	m.Body, err = io.ReadAll(io.LimitReader(r.Body, h.config.MaxBody+1))
	if err != nil {
		return http.StatusBadRequest, "the body ended early"
	}
	if int64(len(m.Body)) > h.config.MaxBody {
		return h.oversize(w, r, registry, region)
	}
	i := 0
	for i < len(h.config.Formats) && !h.config.Formats[i].Match(m) {
		i++
	}
	if i == len(h.config.Formats) {
		return http.StatusUnsupportedMediaType, "this kind of event is not known"
	}
	report, err := h.config.Formats[i].Parse(m)
	if err != nil {
		return http.StatusBadRequest, "the body is not the envelope that its type says"
	}
	ctx, cancel := context.WithTimeout(r.Context(), spoolTimeout)
	defer cancel()
	if err := h.spool.Add(ctx, registry, region, h.sort(registry, region, report)); err != nil {
		return h.unavailable(w, registry, region, err)
	}
	return http.StatusAccepted, ""
}

// replicaOf reads the path.
func replicaOf(path string) (registry, region string, ok bool) {
	rest, ok := strings.CutPrefix(path, "/events/")
	if !ok {
		return "", "", false
	}
	registry, region, ok = strings.Cut(rest, "/")
	return registry, region, ok && isLabel(registry) && isLabel(region)
}

// isLabel reports whether s is a lower-case LDH label: what registries and regions are named by.
func isLabel(s string) bool {
	if s == "" || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for _, c := range []byte(s) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return true
}

// authorized compares the token, in the same time for a wrong token and for a replica that there is not.
func (h *Handler) authorized(r *http.Request, registry, region string) bool {
	want, known := h.config.Tokens.Token(registry, region)
	scheme, got, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	// Hashed, because the comparison of different lengths would end at once.
	g, w := sha256.Sum256([]byte(got)), sha256.Sum256([]byte(want))
	equal := subtle.ConstantTimeCompare(g[:], w[:]) == 1
	return equal && known && want != "" && strings.EqualFold(scheme, "Bearer")
}

// enter waits for one of the replica's slots, at most as long as for the disk: those before wait for that, or for slow links.
func (h *Handler) enter(ctx context.Context, replica string) (release func(), err error) {
	h.mu.Lock()
	slots := h.slots[replica]
	if slots == nil {
		slots = make(chan struct{}, perReplica)
		h.slots[replica] = slots
	}
	h.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, spoolTimeout)
	defer cancel()
	select {
	case slots <- struct{}{}:
		return func() { <-slots }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("too many requests of this replica at once: %w", ctx.Err())
	}
}

// oversize takes in what is left of a message that is too large, and marks the replica.
func (h *Handler) oversize(w http.ResponseWriter, r *http.Request, registry, region string) (int, string) {
	left := h.config.MaxBody * (drainFactor - 1)
	n, err := io.Copy(io.Discard, io.LimitReader(r.Body, left))
	if err != nil {
		return http.StatusBadRequest, "the body ended early"
	}
	if n == left {
		// The rest is not read: the connection ends with this answer.
		w.Header().Set("Connection", "close")
		return http.StatusRequestEntityTooLarge, fmt.Sprintf("more than %d bytes", h.config.MaxBody*drainFactor)
	}
	ctx, cancel := context.WithTimeout(r.Context(), spoolTimeout)
	defer cancel()
	if err := h.spool.Mark(ctx, registry, region, ""); err != nil {
		return h.unavailable(w, registry, region, err)
	}
	h.metrics.events.WithLabelValues(registry, region, "oversize").Inc()
	h.config.Log.Warn("an event message is too large to be read; the replica will be scanned instead",
		zap.String("registry", registry), zap.String("region", region), zap.Int64("limit", h.config.MaxBody))
	return http.StatusAccepted, ""
}

// sort counts what is in the report and returns what is to be kept, under the registry's names.
func (h *Handler) sort(registry, region string, report Report) []Event {
	count := func(kind string, n int) {
		if n > 0 {
			h.metrics.events.WithLabelValues(registry, region, kind).Add(float64(n))
		}
	}
	keep := report.Events[:0]
	for _, e := range report.Events {
		repository, ok := h.config.Repository(registry, region, e.Repository)
		if !ok {
			report.Ignored++
			continue
		}
		e.Repository = repository
		if err := e.Validate(); err != nil {
			report.Invalid = append(report.Invalid, err)
			continue
		}
		keep = append(keep, e)
		count(string(e.Action), 1)
	}
	count("ignored", report.Ignored)
	count("invalid", len(report.Invalid))
	if len(report.Invalid) > 0 && h.refused.Allow() {
		h.config.Log.Warn("dropped events whose names cannot be asked for",
			zap.String("registry", registry), zap.String("region", region),
			zap.Int("events", len(report.Invalid)), zap.NamedError("first", report.Invalid[0]))
	}
	return keep
}

// unavailable is the answer when nothing could be kept.
func (h *Handler) unavailable(w http.ResponseWriter, registry, region string, err error) (int, string) {
	if !errors.Is(err, context.Canceled) { // else the sender went away
		h.config.Log.Error("events could not be kept; the registry will send them again",
			zap.String("registry", registry), zap.String("region", region), zap.Error(err))
	}
	w.Header().Set("Retry-After", retryAfter)
	return http.StatusServiceUnavailable, "the events cannot be kept now"
}

// logRefused names a refused message by its replica and sender. Nothing of its content is logged: it may be anybody's.
func (h *Handler) logRefused(r *http.Request, status int, reason string) {
	if !h.refused.Allow() {
		return
	}
	registry, region, _ := replicaOf(r.URL.Path)
	h.config.Log.Warn("refused an event message",
		zap.String("registry", registry), zap.String("region", region),
		zap.String("remote", r.RemoteAddr), zap.Int("status", status), zap.String("reason", reason))
}
