package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"portolan/api"
)

func (a *app) conflict() *cobra.Command {
	return group("conflict", "List what two regions pushed to one tag", a.conflictList())
}

func (a *app) conflictList() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "list REGISTRY",
		Short: "List the versions that lost and are kept under tags of their own",
		Long: `List the versions that lost against a concurrent one, at a first contact or later, the newest
first. Each is kept in every region under the tag KEPT AS, for 30 days, and can be pulled,
deleted, or pushed under its former tag again like any other. NOW is what that tag has.`,
		Example: `  portolan conflict list contoso`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if limit < 1 {
				return usagef("--limit %d: want a number from 1", limit)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Registry(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			kept, err := c.Conflicts(cmd.Context(), args[0], limit)
			if err != nil {
				return err
			}
			return a.print(kept, func(w io.Writer) { conflictTable(w, kept, pullName(r)) })
		},
	}
	cmd.Flags().IntVar(&limit, "limit", 100, "how many to list")
	return cmd
}

// pullName is the host name that clients pull from a registry by.
func pullName(r api.Registry) string {
	if len(r.ClientNames) > 0 {
		return r.ClientNames[0]
	}
	return dash(r.FQDN)
}

// conflictTable prints kept conflicts, and how to get at them by the host name.
func conflictTable(w io.Writer, kept []api.Conflict, host string) {
	row(w, "CONFLICT", "KEPT AS", "DIGEST", "PUSHED IN", "NOW", "SINCE", "UNTIL")
	for _, c := range kept {
		row(w, c.Repository+":"+c.Tag, c.KeptAs, short(c.Digest), c.Region, dash(short(c.Current)), ago(c.Since, time.Now()), c.Until.Format(time.DateOnly))
	}
	if len(kept) > 0 {
		fmt.Fprintf(w, "\nPull one: docker pull %s/%s:%s\n", host, kept[0].Repository, kept[0].KeptAs)
	}
}
