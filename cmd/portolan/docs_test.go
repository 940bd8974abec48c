package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

var update = flag.Bool("update", false, "write docs/cli.md anew")

// docs/cli.md is what the commands say of themselves.
func TestDocs(t *testing.T) {
	t.Parallel()
	const file = "../../docs/cli.md"
	a := &app{}
	root := a.root()
	root.InitDefaultCompletionCmd()
	var b bytes.Buffer
	b.WriteString(`# The command line

Made from the commands' own help: ` + "`go test ./cmd/portolan -run TestDocs -update`" + ` writes it anew.

Every command but ` + "`serve`" + `, ` + "`version`" + ` and ` + "`completion`" + ` speaks to the HTTP API of a running ` + "`portolan serve`" + `.
The address is ` + "`--api URL`" + `, else ` + "`PORTOLAN_API`" + `, else http://127.0.0.1:8420; the file of the bearer token is
` + "`--token-file FILE`" + `, else ` + "`PORTOLAN_TOKEN_FILE`" + `. ` + "`-o json`" + ` and ` + "`-o yaml`" + ` give everything there is to know, with the
names of the API; tables are for people and may change. What a command says while it waits goes to standard error.

An error goes to standard error, and with ` + "`-o json`" + ` or ` + "`-o yaml`" + ` also to standard output, in the API's own form:
` + "`{\"error\": {\"code\": ..., \"message\": ..., \"details\": [...]}}`" + `. Its code is one of
invalid (wrong use, or a fault in a file), unauthorized, forbidden, not_found, exists, conflict, too_large, media_type,
refused, internal, unavailable, timeout and failed.

Exit codes: 0 done, 1 failed, also for a fault in a file; 2 wrong use: also the value of a flag that is refused, or no file where a
flag names one; of ` + "`portolan diff`" + `, as of diff(1): 0 nothing differs, 1 something does, 2 trouble.
`)
	for _, c := range all(root) {
		if c.Name() == "help" || strings.HasPrefix(c.CommandPath(), "portolan completion ") {
			continue
		}
		describe(&b, c)
	}
	if *update {
		if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(have, b.Bytes()) {
		t.Error("docs/cli.md is not what the commands say: go test ./cmd/portolan -run TestDocs -update")
	}
}

func describe(b *bytes.Buffer, c *cobra.Command) {
	level := strings.Repeat("#", min(3, 2+strings.Count(c.CommandPath(), " ")/2))
	fmt.Fprintf(b, "\n%s %s\n\n", level, c.CommandPath())
	text := c.Long
	if text == "" || c.Name() == "completion" {
		text = c.Short + "."
	}
	fmt.Fprintln(b, text)
	if c.HasSubCommands() {
		fmt.Fprintln(b)
		for _, s := range c.Commands() {
			if s.Name() != "help" {
				fmt.Fprintf(b, "- `%s`: %s\n", s.CommandPath(), s.Short)
			}
		}
	} else {
		fmt.Fprintf(b, "\n```\n%s\n```\n", c.UseLine())
	}
	var flags []string
	c.LocalNonPersistentFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" {
			return
		}
		name := "--" + f.Name
		if f.Shorthand != "" {
			name = "-" + f.Shorthand + ", " + name
		}
		line := "- `" + name + "`: " + f.Usage
		if f.DefValue != "" && f.DefValue != "[]" && f.DefValue != "false" && !strings.Contains(f.Usage, "default") {
			line += " (default: " + f.DefValue + ")"
		}
		flags = append(flags, line)
	})
	if len(flags) > 0 {
		fmt.Fprintf(b, "\n%s\n", strings.Join(flags, "\n"))
	}
	if c.Example != "" {
		fmt.Fprintf(b, "\nExamples:\n\n```\n%s\n```\n", strings.TrimSuffix(unindent(c.Example), "\n"))
	}
}

func unindent(s string) string { return strings.ReplaceAll("\n"+s, "\n  ", "\n")[1:] }
