// Command portolan makes container registries in several regions behave as one: portolan serve is the daemon, the other
// commands speak to its HTTP API.
//
// The package holds flags and printing only.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portolan/api"
	"portolan/strict/nearmiss"
)

// version is set by the linker: -X main.version=.
var version = "unknown"

// The exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2

	// Those of portolan diff, as of diff(1).
	exitDiffers = 1
	exitTrouble = 2
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
}

// run is the whole program but for the process around it.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) (code int) {
	defer func() {
		if p := recover(); p != nil {
			fmt.Fprintf(stderr, "portolan: a fault of the program itself: %v. Please report it, with PORTOLAN_TRACE=1 set\n", p)
			if os.Getenv("PORTOLAN_TRACE") != "" {
				stderr.Write(debug.Stack())
			}
			code = exitFailed
		}
	}()
	a := &app{stdout: stdout, stderr: stderr, args: args}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitDone
	}
	code = exitFailed
	var exit *exitError
	if errors.As(err, &exit) {
		code, err = exit.code, exit.err
	}
	if err == nil { // the command has said everything itself
		return code
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	fmt.Fprintf(stderr, "portolan: %v\n", err)
	a.printError(err)
	return code
}

// exitError ends a command with an exit code of its own. Without err the command has said everything itself.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usageError is wrong use of the command line.
func usageError(err error) error { return &exitError{exitUsage, api.ErrorOf(err, api.CodeInvalid)} }

func usagef(format string, args ...any) error { return usageError(fmt.Errorf(format, args...)) }

// badValue turns the refusal of a value, or that there is no file of a name, into wrong use of the command line, which gave it.
func badValue(err error) error {
	if api.IsCode(err, api.CodeInvalid) || errors.Is(err, fs.ErrNotExist) {
		return usageError(err)
	}
	return err
}

// app is what the commands share.
type app struct {
	stdout, stderr io.Writer
	// args are those of the program.
	args []string

	api, tokenFile, output string
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "portolan",
		Short: "One name for container registries in several regions",
		Long: `Portolan makes container registries that you already run in several regions behave
as one geo-replicated registry: one name leads every client to the nearest healthy
replica, and whatever is pushed in any region reaches every other.

"portolan serve" is the daemon; the other commands speak to its HTTP API.

Exit codes: 0 done, 1 failed, also for a fault in a file; 2 wrong use: also the value of a
flag that is refused, or no file where a flag names one; of portolan diff, as of diff(1):
0 nothing differs, 1 something does, 2 trouble.`,
		Example: `  portolan serve --config /etc/portolan/portolan.yaml
  portolan apply -f topology.yaml
  portolan replica list contoso
  portolan explain contoso --ecs 203.0.113.0/24`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          noSuchCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		a.output = outputOf(a.args) // it may stand behind the mistake
		if cmd.HasSubCommands() {   // a misspelt one is the greater mistake: its flags are not those of cmd
			if err := noSuchCommand(cmd, cmd.Flags().Args()); err != nil {
				return usageError(err)
			}
		}
		text := err.Error()
		var unknown *pflag.NotExistError
		if errors.As(err, &unknown) {
			text += didYouMean("--", unknown.GetSpecifiedName(), flagsOf(cmd))
		}
		for _, parser := range [][2]string{ // the functions of Go mean nothing to who types
			{": strconv.ParseBool", "want true or false"}, {": strconv.", "want a whole number"}, {": time: ", "want a time with its unit, such as 30s or 10m"},
		} {
			if before, _, ok := strings.Cut(text, parser[0]); ok {
				text = before + ": " + parser[1]
			}
		}
		return usagef("%s\nSee %s --help", text, cmd.CommandPath())
	})
	flags := root.PersistentFlags()
	flags.StringVar(&a.api, "api", "", "URL of the server's API (default: PORTOLAN_API, else "+api.DefaultURL+")")
	flags.StringVar(&a.tokenFile, "token-file", "", "file that holds the API's bearer token (default: PORTOLAN_TOKEN_FILE)")
	flags.StringVarP(&a.output, "output", "o", "table", "output: table, json or yaml")
	root.AddCommand(a.serve(), a.registry(), a.replica(), a.conflict(), a.apply(), a.export(), a.diff(), a.simulate(), a.explain(), a.check(), a.status(),
		a.topology(), a.wait(), a.events(), a.acme(), a.version())
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, cmd := range root.Commands() { // those of cobra end well whatever they are given
		switch cmd.Name() {
		case "completion":
			cmd.Args = noSuchCommand
			cmd.RunE = func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		case "help":
			cmd.Args = func(_ *cobra.Command, args []string) error {
				named, rest, err := root.Find(args)
				if err == nil && len(rest) > 0 {
					err = noSuchCommand(named, rest)
				}
				return err
			}
		}
	}
	for _, cmd := range all(root) {
		cmd.DisableFlagsInUseLine = true
		if args := cmd.Args; args != nil {
			cmd.Args = func(cmd *cobra.Command, given []string) error {
				err := args(cmd, given)
				var said *exitError
				if err == nil || errors.Is(err, pflag.ErrHelp) || errors.As(err, &said) {
					return err
				}
				if !cmd.HasSubCommands() && cmd.Name() != "help" {
					err = wrongCount(cmd, args, given)
				}
				return usageError(err)
			}
		}
		if run := cmd.RunE; run != nil {
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				if err := a.checkOutput(); err != nil {
					return err
				}
				if cmd.Name() != serveName { // which has its own ways with signals
					ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
					defer stop()
					cmd.SetContext(ctx)
				}
				return run(cmd, args)
			}
		}
	}
	return root
}

// all returns root and every command below it.
func all(root *cobra.Command) []*cobra.Command {
	list := []*cobra.Command{root}
	for _, c := range root.Commands() {
		list = append(list, all(c)...)
	}
	return list
}

// group is a command that only holds others.
func group(use, short string, commands ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{
		Use: use, Short: short,
		Args: noSuchCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	g.AddCommand(commands...)
	return g
}

// noSuchCommand refuses what is no command of a group.
func noSuchCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var names []string
	for _, c := range cmd.Commands() {
		names = append(names, c.Name())
	}
	return fmt.Errorf("%q is no command of %s%s\nSee %s --help", args[0], cmd.CommandPath(), didYouMean("", args[0], names), cmd.CommandPath())
}

// wrongCount says which of the arguments that a command was given is one too many by its own rule, or that one is missing.
func wrongCount(cmd *cobra.Command, rule cobra.PositionalArgs, given []string) error {
	what := "an argument is missing"
	for i := range given {
		if rule(cmd, given[:i]) == nil {
			what = fmt.Sprintf("%q is one argument too many", given[i])
		}
	}
	return fmt.Errorf("%s: want %s\nSee %s --help", what, cmd.UseLine(), cmd.CommandPath())
}

// flagsOf are the names of the flags that a command takes.
func flagsOf(cmd *cobra.Command) (names []string) {
	cmd.Flags().VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	return names
}

// didYouMean names what a misspelt word was probably meant to be, or the only word that it begins, with before in front.
func didYouMean(before, word string, known []string) string {
	near, ok := nearmiss.Of(strings.ToLower(word), known)
	if !ok && word != "" {
		longer := slices.DeleteFunc(slices.Clone(known), func(k string) bool { return !strings.HasPrefix(k, word) })
		if ok = len(longer) == 1; ok {
			near = longer[0]
		}
	}
	if !ok {
		return ""
	}
	return fmt.Sprintf("; did you mean %q?", before+near)
}

// client returns a client of the API that the flags and the environment name.
func (a *app) client() (*api.Client, error) {
	address := a.api
	if address == "" {
		address = os.Getenv("PORTOLAN_API")
	}
	if address == "" {
		address = api.DefaultURL
	}
	file := a.tokenFile
	if file == "" {
		file = os.Getenv("PORTOLAN_TOKEN_FILE")
	}
	token := ""
	if file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, badValue(fmt.Errorf("reading the API's token: %w", err))
		}
		if token = strings.TrimSpace(string(text)); token == "" {
			return nil, fmt.Errorf("reading the API's token: %s is empty", file)
		}
	}
	c, err := api.NewClient(address, token)
	if err != nil {
		return nil, usageError(err)
	}
	return c, nil
}

// replicaName takes REGISTRY/REGION apart.
func replicaName(s string) (registry, region string, err error) {
	registry, region, ok := strings.Cut(s, "/")
	if !ok || registry == "" || region == "" || strings.Contains(region, "/") {
		return "", "", usagef("%q does not name a replica: write REGISTRY/REGION, such as contoso/westus", s)
	}
	return registry, region, nil
}
