package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"portolan/daemon"
)

// defaultConfig is where serve looks without --config.
const defaultConfig = "/etc/portolan/portolan.yaml"

// serveName is the command that is a daemon.
const serveName = "serve"

func (a *app) serve() *cobra.Command {
	var file string
	var roles []string
	var checkOnly bool
	cmd := &cobra.Command{
		Use:   serveName + " [--config FILE] [--role dns|replicator|all]",
		Short: "Run the daemon",
		Long: `Run the daemon: the DNS server and its health checks, the replicator with its events
listener, and the HTTP API, or the part of them that --role names.

Signals: SIGTERM and SIGINT end it in order, one more than a second later at once.
SIGHUP reads the files of where clients are, the static records, the keys of cookies and
the certificates again, and the log names them; the configuration itself is read at the
start alone.

With --check nothing is started: the configuration and what it names are read, and each
file is told of. Databases that are not on this machine may be on the one that serves;
keys, certificates, tokens and ports are not looked at.`,
		Example: `  portolan serve --config portolan.yaml
  portolan serve --role dns`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var parts []daemon.Role
			for _, r := range roles {
				var role daemon.Role
				if err := role.UnmarshalText([]byte(r)); err != nil {
					return usagef("--role: %w", err)
				}
				parts = append(parts, role)
			}
			config, err := daemon.Load(file, parts...)
			if errors.Is(err, fs.ErrNotExist) {
				return usagef("%w: name the configuration with --config FILE", err)
			}
			if err != nil {
				return err
			}
			if checkOnly {
				checked, err := daemon.Check(config)
				if err != nil {
					return err
				}
				checked.Files = slices.Insert(checked.Files, 0, file)
				return a.print(checked, func(w io.Writer) {
					for _, file := range checked.Files {
						fmt.Fprintln(w, file+": nothing is wrong with it")
					}
					for _, file := range checked.Absent {
						fmt.Fprintln(w, file+": is not on this machine, so it was not looked at; serve needs it")
					}
				})
			}
			if config.User != "" {
				if err := become(config.User, config.Data); err != nil {
					return err
				}
			}
			return a.runDaemon(cmd.Context(), config)
		},
	}
	cmd.Flags().StringVar(&file, "config", defaultConfig, "the configuration")
	cmd.Flags().StringSliceVar(&roles, "role", nil, "dns, replicator or all (default: roles in the configuration, else all)")
	cmd.Flags().BoolVar(&checkOnly, "check", false, "only read the configuration, the topology file, the static records, and the databases and tables of where clients are")
	return cmd
}

// sameWish is how long after a signal to end another one says the same: timeout(1) signals the process and then its whole group.
const sameWish = time.Second

// runDaemon runs the daemon under the signals of a daemon.
func (a *app) runDaemon(parent context.Context, config daemon.Config) error {
	// A reader of the log that goes away (portolan serve 2>&1 | head) must not take DNS with it. Go lets the signal end the process.
	signal.Ignore(syscall.SIGPIPE)
	defer signal.Reset(syscall.SIGPIPE)
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, os.Interrupt, syscall.SIGHUP)
	defer signal.Stop(signals)
	ctx, stop := context.WithCancel(parent)
	defer stop()
	reload := make(chan struct{}, 1)
	ended := make(chan struct{})
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for asked := (time.Time{}); ; { // when the end was asked for
			select {
			case s := <-signals:
				switch {
				case s == syscall.SIGHUP:
					select {
					case reload <- struct{}{}:
					default:
					}
				case asked.IsZero():
					asked = time.Now()
					stop()
				case time.Since(asked) >= sameWish:
					a.progress("portolan: a second %v: ending at once", s)
					os.Exit(exitFailed)
				}
			case <-ended:
				return
			}
		}
	}()
	log := daemon.NewLog(config.Log, os.Stderr)
	defer log.Sync()
	err := daemon.Run(ctx, daemon.Options{
		Config: config, Version: strings.TrimPrefix(version, "v"), Log: log, Reload: reload,
		Readers: func(n int) { runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + n) },
	})
	close(ended)
	<-watched
	return err
}
