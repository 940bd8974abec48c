package main

import (
	"crypto/x509"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"portolan/check"
	"portolan/health"
)

func (a *app) check() *cobra.Command {
	var resolver, ca string
	cmd := &cobra.Command{
		Use:   "check REGISTRY",
		Short: "Look at the whole of a registry as clients see it; exit code 1 if anything fails",
		Long: `Look at the whole of a registry, from where the command runs: the name servers over the
net, all authoritative with one serial, by one topology and the same databases, and alike
in sample decisions; what the parent zone says of them, and its glue; the shares of
clients; each replica's state; each address serving a certificate for each client name;
where the client names lead, and their CAA; the age of the database; whether replicas have
sent events since the server's start; the server's own warnings.

Certificates are verified as the probes do: by the system's authorities and those that a
replica names as its ca. Where that file is not on this machine, give them with --ca.`,
		Example: `  portolan check contoso
  portolan check contoso --resolver 9.9.9.9:53 -o json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			at, err := resolverAddress(resolver)
			if err != nil {
				return err
			}
			var roots *x509.CertPool
			if ca != "" {
				// The form that a replica's ca has is taken as well.
				if roots, err = health.Roots(nil, "file:"+strings.TrimPrefix(ca, "file:")); err != nil {
					return usageError(fmt.Errorf("--ca: %w", err))
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Registry(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			findings := []check.Finding{}
			checker := check.Checker{API: c, Resolver: at, Roots: roots, Found: func(f check.Finding) { findings = append(findings, f) }}
			passed, err := checker.Registry(cmd.Context(), r)
			if err != nil {
				return err
			}
			err = a.print(findings, func(w io.Writer) {
				for _, f := range findings {
					text := f.Text
					if f.Advice != "" {
						text += ": " + f.Advice
					}
					row(w, fmt.Sprintf("%-4s", f.Level), f.Subject, text)
				}
			})
			if err == nil && !passed {
				err = &exitError{code: exitFailed}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&resolver, "resolver", "", "address of the recursive resolver, with its port if that is not 53, to ask for delegation and client names (default: the system's)")
	cmd.Flags().StringVar(&ca, "ca", "", "PEM file of certificates to trust besides the system's and what a replica names as its ca")
	return cmd
}

// resolverAddress completes the address of a resolver by the port; empty stays empty.
func resolverAddress(text string) (string, error) {
	if text == "" {
		return "", nil
	}
	if at, err := netip.ParseAddrPort(text); err == nil {
		return at.String(), nil
	}
	address, err := netip.ParseAddr(text)
	if err != nil {
		return "", usagef("--resolver %q: want an IP address, with its port if that is not 53, such as 9.9.9.9 or [2620:fe::fe]:53", text)
	}
	return netip.AddrPortFrom(address, 53).String(), nil
}
