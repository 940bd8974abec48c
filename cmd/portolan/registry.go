package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/topology"
)

func (a *app) registry() *cobra.Command {
	return group("registry", "Create, list, show, change and delete registries", a.registryCreate(), a.registryList(), a.registryShow(), a.registryUpdate(), a.registryDelete())
}

// registryFlags adds the flags that say what a registry is, but for its replicas.
func registryFlags(cmd *cobra.Command, d *topology.RegistryDocument) {
	f := cmd.Flags()
	f.StringVar(&d.Home, "home", "", "the home region, such as westus")
	f.StringSliceVar(&d.Names, "names", nil, "names that clients use, whose certificates every replica serves")
	f.StringVar(&d.Policy.AllDown, "all-down", "", "answer when no replica is healthy: nearest (default), none, cname:HOSTNAME")
	f.StringVar(&d.Policy.Replication, "replication", "", "enabled (default), or disabled: the front door alone")
	f.StringVar(&d.Policy.MaxLag, "max-lag", "", "how far a replica may be behind before its clients are sent elsewhere, such as 10m (default: never)")
	f.StringVar(&d.Policy.Merge, "merge", "", "tags that differ at first contact: ask (default), or home: the home's wins, the other is kept aside")
}

func (a *app) registryCreate() *cobra.Command {
	var d topology.RegistryDocument
	var home replicaFlags
	cmd := &cobra.Command{
		Use:   "create NAME --home REGION --endpoint URL --addresses ADDRESS,...",
		Short: "Create a registry with its home replica",
		Long: `Create a registry with the replica of its home region. The home replica cannot be
deleted while the registry exists.`,
		Example: `  portolan registry create contoso --home westus --names registry.contoso.com \
    --endpoint https://registry.westus.contoso.internal --addresses 192.0.2.1,2001:db8::1`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if d.Home == "" {
				return usagef("--home is needed: the region of the first replica")
			}
			d.Name = args[0]
			replica, err := home.document(d.Home)
			if err != nil {
				return err
			}
			d.Replicas = []topology.ReplicaDocument{replica}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.CreateRegistry(cmd.Context(), d)
			if err != nil {
				return badValue(err)
			}
			a.warnShared(r.Replicas...)
			return a.print(r, func(w io.Writer) { showRegistry(w, r) })
		},
	}
	registryFlags(cmd, &d)
	home.add(cmd)
	return cmd
}

func (a *app) registryList() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List registries",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list, err := c.Registries(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) { registryTable(w, list) })
		},
	}
}

func (a *app) registryShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show a registry with its replicas",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Registry(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { showRegistry(w, r) })
		},
	}
}

func showRegistry(w io.Writer, r api.Registry) {
	row(w, "Name:", r.Name)
	row(w, "The one name:", dash(r.FQDN))
	row(w, "Client names:", dash(strings.Join(r.ClientNames, ", ")))
	row(w, "Home:", dash(r.Home))
	p := r.Document.Policy
	for _, policy := range [][3]string{{"When all are down:", p.AllDown, "nearest"}, {"Replication:", p.Replication, "enabled"},
		{"Drained when behind by:", p.MaxLag, "never"},
		{"Differing tags:", p.Merge, "ask"}, {"Conflicts:", p.Conflicts, "keep"}, {"Untagged:", p.Untagged, "keep"}, {"Deletes:", p.Deletes, "propagate"}} {
		if policy[1] == "" {
			policy[1] = policy[2]
		}
		row(w, policy[0], policy[1])
	}
	if r.Held != nil {
		row(w, "Held:", fmt.Sprintf("an edit took away %s; they are served all the same: %s", strings.Join(r.Held.Missing, ", "), r.Held.Way()))
	}
	fmt.Fprintln(w)
	replicaTable(w, r.Replicas)
}

func (a *app) registryUpdate() *cobra.Command {
	var d topology.RegistryDocument
	var force bool
	cmd := &cobra.Command{
		Use:   "update NAME [--names NAME,...] [--all-down POLICY] ...",
		Short: "Change a registry",
		Long: `Change a registry. Only the flags that are given change anything; an empty value removes
a setting, so that its default holds. Another home is the region of one of its replicas;
there is no default. The change and the shares of clients that result are printed.

A change after which clients, all or those behind a fence, would get no address any more
is refused without --force.`,
		Example: `  portolan registry update contoso --names registry.contoso.com,images.contoso.com
  portolan registry update contoso --max-lag 10m
  portolan registry update contoso --home westeurope`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p := api.RegistryPatch{
				Home: picked(cmd, "home", &d.Home), Names: picked(cmd, "names", &d.Names), AllDown: picked(cmd, "all-down", &d.Policy.AllDown),
				Replication: picked(cmd, "replication", &d.Policy.Replication), MaxLag: picked(cmd, "max-lag", &d.Policy.MaxLag),
				Merge: picked(cmd, "merge", &d.Policy.Merge),
			}
			if p == (api.RegistryPatch{}) {
				return usagef("nothing is to be changed: give at least one flag, such as --max-lag 10m")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.UpdateRegistry(cmd.Context(), args[0], p, force)
			if err != nil {
				return badValue(err)
			}
			return a.print(r, func(w io.Writer) { printApplied(w, r, false) })
		},
	}
	registryFlags(cmd, &d)
	cmd.Flags().BoolVar(&force, "force", false, "change it also if clients that get an address now get none then")
	return cmd
}

func (a *app) registryDelete() *cobra.Command {
	var force, yes bool
	cmd := &cobra.Command{
		Use:   "delete NAME",
		Short: "Delete a registry; the content of its replicas stays",
		Long: `Delete a registry, at once: its name is answered with NXDOMAIN from then on, and nothing
is replicated any more. Nobody is drained: clients that follow the name fail when what their
resolvers keep has expired. The registries in its regions go on as they are, with all their
content. A registry that is created again under the name is compared anew.

It is refused while pushes are in one region alone, as far as events and scans have told,
unless --force gives them up to stay there.

On a terminal the name has to be typed once more; elsewhere --yes is needed.`,
		Example: `  portolan registry delete contoso
  portolan registry delete contoso --yes`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := args[0]
			if !yes && !terminal(cmd.InOrStdin()) {
				return usagef("registry %s ends at once for all its clients: without a terminal to ask on, --yes is needed", name)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Registry(cmd.Context(), name)
			if err != nil {
				return err
			}
			stays, err := c.Unreplicated(cmd.Context(), name)
			if err != nil && !force {
				return fmt.Errorf("whether the pushes of %s are in more than one region cannot be told: %w; --force deletes it all the same", name, err)
			}
			if len(stays) > 0 && !force {
				printStays(a.stderr, stays)
				return fmt.Errorf("registry %s is not deleted: wait until its pushes are elsewhere, or give them up with --force", name)
			}
			printDeletion(a.stderr, r, stays)
			if !yes {
				if err := a.confirm(cmd.Context(), cmd.InOrStdin(), name); err != nil {
					return err
				}
			}
			if err := c.DeleteRegistry(cmd.Context(), name, force); err != nil {
				return err
			}
			return a.print(deletedRegistry{name, stays}, func(w io.Writer) {
				fmt.Fprintf(w, "registry %s is deleted; the content of its replicas stays\n", name)
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "delete it although pushes are in one region alone; they stay there")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// printDeletion tells what the deletion of a registry does. stays is what only one region has.
func printDeletion(w io.Writer, r api.Registry, stays []api.Unreplicated) {
	regions := make([]string, len(r.Replicas))
	for i, p := range r.Replicas {
		regions[i] = p.Region
	}
	name := r.FQDN
	if name == "" {
		name = "The one name of " + r.Name
	}
	fmt.Fprintf(w, "%s is answered with NXDOMAIN at once; resolvers keep what they have until its TTL ends.\n", name)
	if len(r.ClientNames) > 0 {
		fmt.Fprintf(w, "What leads there leads nowhere then: %s.\n", strings.Join(r.ClientNames, ", "))
	}
	fmt.Fprintf(w, "Nothing is replicated any more; the registries in %s keep their content.\n", strings.Join(regions, ", "))
	printStays(w, stays)
}

// deletedRegistry is a registry that was deleted, and what of it stays in one region alone.
type deletedRegistry struct {
	Deleted string             `json:"deleted"`
	Stays   []api.Unreplicated `json:"stays,omitempty"`
}

func printStays(w io.Writer, stays []api.Unreplicated) {
	for _, s := range stays {
		fmt.Fprintf(w, "Stays in %s alone: %s\n", s.Region, s.Reason)
	}
}
