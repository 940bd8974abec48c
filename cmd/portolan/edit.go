package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/topology"
)

// maxFile bounds what is read of a topology file: as much as topology.ParseYAML takes.
const maxFile = 4 << 20

// document is a topology file that was read.
type document struct {
	topology.Document
	// doubts are the orders and fences in it that name regions without a replica, which the server may refuse or not; nil for none.
	doubts *topology.InvalidError
}

// readDocument reads a topology file, in YAML or JSON, which is YAML too; "-" is standard input.
func readDocument(cmd *cobra.Command, file string) (document, error) {
	var d document
	if file == "" {
		return d, usagef("-f is needed: the topology file, or - for standard input")
	}
	name, in := file, cmd.InOrStdin()
	if file == "-" {
		name = "standard input"
	} else {
		f, err := os.Open(file)
		if err != nil {
			return d, badValue(fmt.Errorf("reading the topology: %w", err))
		}
		defer f.Close()
		in = f
	}
	text, err := io.ReadAll(io.LimitReader(in, maxFile+1)) // one byte more, so that what is too large is noticed
	if err != nil {
		return d, fmt.Errorf("reading the topology from %s: %w", name, err)
	}
	parsed, err := topology.ParseYAML(name, text)
	if parsed == nil {
		return d, err
	}
	errors.As(err, &d.doubts)
	d.Document = *parsed
	return d, nil
}

// settle is what the server's answer to a request with d, an error or nil, makes of its doubts: they are told by their lines where they
// were refused, and are else a warning.
func (a *app) settle(d document, err error) error {
	var answer *api.Error
	switch {
	case d.doubts == nil:
	case err == nil:
		a.progress("warning: taken, as the topology has it so already; regions without a replica are passed over:\n%v", d.doubts)
	case errors.As(err, &answer) && answer.Code == api.CodeInvalid && len(answer.Details) > 0:
		refused := &topology.InvalidError{File: d.doubts.File, Faults: slices.Clone(answer.Details)}
		for i, f := range refused.Faults {
			if at := slices.IndexFunc(d.doubts.Faults, func(doubt topology.Fault) bool { return doubt.Path == f.Path }); at >= 0 {
				refused.Faults[i] = d.doubts.Faults[at]
			}
		}
		return refused
	}
	return err
}

func (a *app) apply() *cobra.Command {
	var file string
	var change api.Apply
	cmd := &cobra.Command{
		Use:   "apply -f FILE [--prune] [--dry-run] [--force]",
		Short: "Make a topology file the topology",
		Long: `Make a file the topology of the registries that it names; others are left alone. What it
does not say of a registry or replica gets its default. A replica that it does not name is
kept, or, with --prune, drained and deleted as by portolan replica delete. The changes are
printed, and where the clients nearest to each region go then. A file with any fault
changes nothing, nor without --force one after which clients, all or those behind a fence,
would get no address any more, or with a new endpoint at which something answers that is
no registry. One that does not answer is taken: the replica waits for it. An order or fence
that names a region without a replica is a fault, but where the topology has it so already.`,
		Example: `  portolan apply -f topology.yaml --dry-run
  portolan apply -f topology.yaml --prune`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			d, err := readDocument(cmd, file)
			if err != nil {
				return err
			}
			change.Document = d.Document
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Apply(cmd.Context(), change)
			if err = a.settle(d, err); err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { printApplied(w, r, change.DryRun) })
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "the topology file; - for standard input")
	f.BoolVar(&change.Prune, "prune", false, "drain and delete replicas that the file does not name")
	f.BoolVar(&change.Force, "force", false, "apply it also if clients that get an address now get none then, or an endpoint is no registry")
	f.BoolVar(&change.DryRun, "dry-run", false, "only tell what would change")
	return cmd
}

// printApplied tells what was changed, or, of a dry run, what would be.
func printApplied(w io.Writer, r api.Applied, dryRun bool) {
	switch {
	case r.Restored && dryRun:
		fmt.Fprintln(w, "the store has lost its keys, and would have them again")
	case r.Restored:
		fmt.Fprintln(w, "the store had lost its keys, and has them again")
	case len(r.Changes) == 0:
		fmt.Fprintln(w, "nothing to change")
	}
	printChanges(w, r.Changes)
	deleted, verb := "is drained and then deleted; its content stays", "go"
	if dryRun {
		deleted, verb = "would be drained and then deleted; its content would stay", "would go"
	}
	for _, name := range r.Pruned() {
		fmt.Fprintf(w, "\nReplica %s %s.\n", name, deleted)
	}
	printShares(w, r.Shares, verb)
	sent := "No more"
	for _, ramp := range r.Ramps {
		fmt.Fprintf(w, "\nThe weight of %s/%s goes from %d to %d by %s; the shares are those at its end.\n", ramp.Registry, ramp.Region, ramp.From, ramp.To, clock(ramp.End))
		sent = "Then no more"
	}
	for _, d := range r.Drains {
		fmt.Fprintf(w, "\n%s clients are sent to %s. The last answer that names it expires at %s; resolvers that\nkeep answers longer (a minimum TTL, serve-stale) may send clients there even then.\n",
			sent, d.Replica, clock(d.Until))
	}
	if r.Refusal != "" {
		fmt.Fprintln(w, "\n"+r.Refusal)
	}
	if dryRun {
		fmt.Fprintln(w, "\nnothing was changed, nothing was deleted: --dry-run")
	}
}

func (a *app) export() *cobra.Command {
	return &cobra.Command{
		Use:   "export",
		Short: "Print the topology as a topology file",
		Long:  "Print the topology as operators declared it, as a topology file: YAML, or JSON with -o json.",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			d, err := c.Export(cmd.Context())
			if err != nil {
				return err
			}
			if a.output == "json" {
				return a.print(d, nil)
			}
			text, err := d.YAML()
			if err == nil {
				_, err = a.stdout.Write(text)
			}
			return err
		},
	}
}

func (a *app) diff() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "diff -f FILE",
		Short: "Tell what applying a topology file would change; exit codes as of diff",
		Long: `Tell what would make the topology equal to a file: + is only in the file, - only in the
topology, ~ differs. Replicas that are not in the file are among it, which portolan apply
leaves alone without --prune.

Exit codes, as of diff(1): 0 nothing differs, 1 something does, 2 it cannot be told.`,
		Example: `  portolan diff -f topology.yaml
  portolan export | portolan diff -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			changes, err := a.changes(cmd, file)
			if err == nil {
				err = a.print(changes, func(w io.Writer) { printChanges(w, changes) })
			}
			switch {
			case err != nil:
				return &exitError{exitTrouble, err}
			case len(changes) > 0:
				return &exitError{code: exitDiffers}
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "the topology file; - for standard input")
	return cmd
}

// changes are what applying a topology file would change.
func (a *app) changes(cmd *cobra.Command, file string) ([]topology.Change, error) {
	d, err := readDocument(cmd, file)
	if err != nil {
		return nil, err
	}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	changes, err := c.Diff(cmd.Context(), d.Document)
	return changes, a.settle(d, err)
}

func (a *app) topology() *cobra.Command {
	return group("topology", "Confirm edits of the store that the guard holds", &cobra.Command{
		Use:   "confirm REGISTRY",
		Short: "Let an edit pass that left less than half of a registry's replicas",
		Long: `An edit of the store's keys that leaves less than half of a registry's replicas, as they
were before it or as many as were confirmed last, is held: the missing ones are still
served, and the status names them. This lets it pass. Every edit by portolan that changes
which replicas there are confirms them itself.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			status, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := c.Confirm(cmd.Context(), args[0]); err != nil {
				return err
			}
			var held topology.Pending
			for _, h := range status.Topology.Held {
				if h.Registry == args[0] {
					held = h
				}
			}
			return a.print(held, func(w io.Writer) {
				fmt.Fprintf(w, "confirmed: registry %s is without %s from now on\n", args[0], strings.Join(held.Missing, ", "))
			})
		},
	})
}
