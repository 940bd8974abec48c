// Command demo shows Portolan's job on real parts: three CNCF distribution registries on this machine, `portolan serve`
// before them, and public clients (crane, dig). Every step checks what it shows; the first that does not happen ends the
// demo with exit status 1 and the reason.
//
// On a terminal the scene stays up afterwards, to be tried; without one, or with DEMO=tour, the demo ends and stops
// everything that it started.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
)

func main() {
	// A terminal that is closed is a SIGHUP.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx); errors.Is(err, errInterrupted) {
		fmt.Fprintln(os.Stderr, "\ndemo: interrupted; everything is stopped")
		os.Exit(130)
	} else if err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// errInterrupted says that the demo was told to end before it was through: nobody wants to read logs then.
var errInterrupted = errors.New("interrupted")

func run(ctx context.Context) (err error) {
	began := time.Now()
	dir, err := os.MkdirTemp("", "portolan-demo-")
	if err != nil {
		return err
	}
	s := &scene{dir: dir, out: printer{color: term.IsTerminal(int(os.Stdout.Fd()))}}
	defer func() {
		switch {
		case err != nil && ctx.Err() != nil:
			err = errInterrupted
		case err != nil:
			err = errors.Join(err, s.logs())
		}
		s.close()
		if removing := os.RemoveAll(dir); err == nil {
			err = removing
		}
	}()
	steps := []struct {
		title string
		step  func(context.Context) error
	}{
		{"Three registries that somebody already runs", s.registries},
		{"Portolan before them", s.portolan},
		{"First contact: what the registries hold is compared, and nothing is overwritten unasked", s.baseline},
		{"A multi-arch image is pushed into one region", s.push},
		{"The one name leads each client to the nearest replica", s.continents},
		{"A client pulls through the one name", s.pull},
		{"A region fails", s.fail},
		{"It returns", s.recover},
		{"A tenth of a replica's clients is moved to the next one", s.weight},
	}
	for i, step := range steps {
		s.out.title(fmt.Sprintf("%d. %s", i+1, step.title))
		if err := step.step(ctx); err != nil {
			return fmt.Errorf("step %d, %s: %w", i+1, strings.ToLower(step.title[:1])+step.title[1:], err)
		}
	}
	s.out.title(fmt.Sprintf("Done in %.1f s", time.Since(began).Seconds()))
	if os.Getenv("DEMO") == "tour" || !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return nil
	}
	s.out.say("Everything stays up until Ctrl-C. Try, in another terminal:")
	for _, try := range s.tries() {
		s.out.say("  " + try)
	}
	<-ctx.Done()
	fmt.Println()
	s.out.say("Stopping everything.")
	return nil
}
