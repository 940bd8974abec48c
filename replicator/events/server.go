package events

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"portolan/listener"
)

// Timeouts of the listener. A registry's own default for a whole notification is one second; these are for slow links,
// and end what holds a connection without using it.
const (
	headerTimeout = 5 * time.Second
	readTimeout   = 15 * time.Second
	// writeTimeout counts from the end of the headers, so it holds reading, the disk and the answer.
	writeTimeout = readTimeout + spoolTimeout + 5*time.Second
	idleTimeout  = 60 * time.Second
	// maxHeader is far above what a registry's notifier sends.
	maxHeader = 16 << 10
	// shutdownTimeout bounds the wait for requests under way.
	shutdownTimeout = 5 * time.Second
)

// Serve answers on l until ctx is done, then lets the requests under way finish, and returns nil; what is cut off was not
// acknowledged, and comes again. With a certificate it speaks TLS. It closes l.
func Serve(ctx context.Context, l net.Listener, handler *Handler, certificate *listener.Certificate) error {
	err := listener.Serve(ctx, l, &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
	}, certificate, shutdownTimeout, handler.config.Log)
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	return nil
}
