package main

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"portolan/api"
)

func (a *app) acme() *cobra.Command {
	return group("acme", "Answer the DNS-01 challenges of ACME", a.acmeSet(), a.acmeClear(), a.acmeList())
}

// nameAndToken wants both together, since a token may begin with a hyphen, and reads the flags behind them.
func nameAndToken(cmd *cobra.Command, args []string) error {
	if len(args) > 2 {
		if err := cmd.Flags().Parse(args[2:]); err != nil {
			return cmd.FlagErrorFunc()(cmd, err)
		}
		if help, err := cmd.Flags().GetBool("help"); err == nil && help {
			return pflag.ErrHelp
		}
		args = slices.Concat(args[:2], cmd.Flags().Args())
	}
	return cobra.ExactArgs(2)(cmd, args)
}

func (a *app) acmeSet() *cobra.Command {
	var lifetime time.Duration
	cmd := &cobra.Command{
		Use:   "set [--lifetime DURATION] NAME TOKEN",
		Short: "Serve a challenge as a TXT record",
		Long: `Serve TOKEN as a TXT record at _acme-challenge.NAME, from every DNS server within a quarter
of a second, until it is cleared or expires. NAME is a registry's, or any name in the
zone; a "*." before it makes no difference, and a name may have several tokens, as it
needs together with its wildcard. TOKEN is what the ACME client names as the record's
value. Flags stand before NAME or behind TOKEN, not between them, since a token may begin
with a hyphen.

For a name outside of the zone (registry.contoso.com) let _acme-challenge.NAME be a CNAME
to _acme-challenge.contoso.geo.example.net, and set the challenge of contoso.`,
		Example: `  portolan acme set contoso "$CERTBOT_VALIDATION"
  portolan acme set --lifetime 10m app.geo.example.net gfj9Xq...Rg85nM`,
		Args: nameAndToken,
		RunE: func(cmd *cobra.Command, args []string) error {
			if lifetime < time.Second || lifetime%time.Second != 0 {
				return usagef("--lifetime %v: want whole seconds, at least one", lifetime)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			set, err := c.SetChallenge(cmd.Context(), api.SetChallenge{Name: args[0], Token: args[1], Lifetime: int(lifetime / time.Second)})
			if err != nil {
				return badValue(err)
			}
			return a.print(set, func(w io.Writer) {
				fmt.Fprintf(w, "%s TXT %q is served until it is cleared, at most until %s\n", set.Record, set.Token, set.Expires.Format(time.RFC3339))
			})
		},
	}
	cmd.Flags().SetInterspersed(false) // see nameAndToken
	cmd.Flags().DurationVar(&lifetime, "lifetime", time.Hour, "when it goes away by itself; at most 168h")
	return cmd
}

func (a *app) acmeClear() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "clear NAME TOKEN",
		Short: "Serve a challenge no longer",
		Long: `Serve a challenge no longer. One that there is not, or that has expired, is no failure.
Flags stand before NAME or behind TOKEN.`,
		Example: `  portolan acme clear contoso "$CERTBOT_VALIDATION"`,
		Args:    nameAndToken,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			cleared, err := c.ClearChallenge(cmd.Context(), args[0], args[1])
			if api.IsCode(err, api.CodeNotFound) {
				a.progress("%v", err)
				return nil
			}
			if err != nil {
				return badValue(err)
			}
			return a.print(cleared, func(w io.Writer) { fmt.Fprintf(w, "%s TXT %q is no longer served\n", cleared.Record, cleared.Token) })
		},
	}
	cmd.Flags().SetInterspersed(false) // see nameAndToken
	return cmd
}

func (a *app) acmeList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the challenges that are served",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			all, err := c.Challenges(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(all, func(w io.Writer) {
				row(w, "RECORD", "TOKEN", "EXPIRES")
				for _, c := range all {
					row(w, c.Record, c.Token, c.Expires.Format(time.RFC3339))
				}
			})
		},
	}
}
