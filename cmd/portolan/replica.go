package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/topology"
)

// poll is the time between two looks of a command that waits.
const poll = 500 * time.Millisecond

func (a *app) replica() *cobra.Command {
	return group("replica", "Create, list, show, change and delete the replicas of a registry",
		a.replicaCreate(), a.replicaList(), a.replicaShow(), a.replicaUpdate(), a.replicaDelete(), a.replicaWait(),
		a.replicaRequest(topology.RequestResync, "Begin a new baseline: the replica is stale, the others are right",
			`Ask for a new baseline of a replica: everything in it is compared anew with the
others, as at first contact. It is the answer to a replica that was restored or wiped.`,
			func(api.Replica) string { return "a new baseline was asked for" }, (*api.Client).Resync),
		a.replicaRequest(topology.RequestAccept, "Accept a baseline's plan, or what the guard holds: the replica is right",
			`Accept the plan of a replica's baseline with its conflicts, or, where the guard holds
a replica because much of it vanished or went back, say that it is right.`,
			func(before api.Replica) string {
				if s := before.Replication; s == nil || s.Held == "" && s.Phase != topology.PhasePlanned {
					return "nothing waits to be accepted"
				}
				return "accepted"
			}, (*api.Client).Accept))
}

// replicaFlags are the flags that say what a replica is.
type replicaFlags struct {
	endpoint, hostname, location, routing, probe, canary string
	credentials, ca, clientCert, prefix, realms          string
	addresses                                            []string
	weight                                               int
}

func (r *replicaFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&r.endpoint, "endpoint", "", "URL of the registry's API: https://registry.westus.example.net")
	f.StringSliceVar(&r.addresses, "addresses", nil, "IP addresses that clients are sent to")
	f.StringVar(&r.hostname, "hostname", "", "host name that clients are sent to by CNAME, instead of addresses")
	f.StringVar(&r.location, "location", "", "latitude,longitude in decimal degrees (default: where the public region is)")
	f.IntVar(&r.weight, "weight", 100, "share of its nearest clients that the replica keeps, 0 to 100")
	f.StringVar(&r.routing, "routing", "", "enabled (default), or disabled: no clients are sent there")
	f.StringVar(&r.canary, "canary", "", "REPOSITORY:TAG: an image that health checks really read (default: none)")
	f.StringVar(&r.probe, "probe", "", "health check: https, http, tcp, consul:SERVICE or none (default: as the endpoint)")
	f.StringVar(&r.credentials, "credentials", "", "where Portolan finds its credentials: docker-config, env:NAME, file:PATH, helper:NAME")
	f.StringVar(&r.ca, "ca", "", "file:PATH of the certificates to trust at the endpoint")
	f.StringVar(&r.clientCert, "client-cert", "", "file:PATH of a client certificate for the endpoint")
	f.StringVar(&r.prefix, "prefix", "", "what stands before every repository name at this replica")
	f.StringVar(&r.realms, "realms", "", "HOST,...: token servers on other hosts than the endpoint's that may be sent the credentials")
}

// coordinates are those of --location; empty, and not nil, if that is.
func (r *replicaFlags) coordinates() ([]float64, error) {
	list := []float64{}
	if r.location == "" {
		return list, nil
	}
	parts := strings.Split(r.location, ",")
	for _, p := range parts {
		v, err := strconv.ParseFloat(strings.TrimSpace(p), 64)
		if err != nil || len(parts) != 2 {
			return nil, usagef("--location %q: want latitude,longitude in decimal degrees, such as 52.37,4.90", r.location)
		}
		list = append(list, v)
	}
	return list, nil
}

func (r *replicaFlags) checkWeight() error {
	if r.weight < 0 || r.weight > 100 {
		return usagef("--weight %d: want a whole number from 0 to 100", r.weight)
	}
	return nil
}

// document is the replica that the flags describe.
func (r *replicaFlags) document(region string) (topology.ReplicaDocument, error) {
	d := topology.ReplicaDocument{
		Region: region, Endpoint: r.endpoint, Addresses: r.addresses, Hostname: r.hostname, Routing: r.routing,
		Health: topology.HealthDocument{Probe: r.probe, Canary: r.canary}, Credentials: r.credentials, CA: r.ca, ClientCert: r.clientCert, Prefix: r.prefix, Realms: r.realms,
	}
	if d.Endpoint == "" {
		return d, usagef("--endpoint is needed: the URL of the registry's API in %s", region)
	}
	if len(d.Addresses) == 0 && d.Hostname == "" {
		return d, usagef("--addresses (or --hostname) is needed: where clients are sent")
	}
	var err error
	if d.Location, err = r.coordinates(); err != nil {
		return d, err
	}
	if err := r.checkWeight(); err != nil {
		return d, err
	}
	if r.weight != 100 {
		d.Weight = &r.weight
	}
	return d, nil
}

func (a *app) replicaCreate() *cobra.Command {
	var flags replicaFlags
	var accept bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "create REGISTRY/REGION --endpoint URL --addresses ADDRESS,...",
		Short: "Add a replica to a registry",
		Long: `Add a replica to a registry. What it holds already is compared with the others first,
and the plan of that baseline is printed. Tags that differ wait for --accept (or
portolan replica accept), unless the registry's policy is merge: home. Where nothing
answers at the endpoint the replica waits for it: portolan replica update changes it.

Clients are sent there once it has been Ready: portolan replica wait waits for that.`,
		Example: `  portolan replica create contoso/westeurope --addresses 192.0.2.2 \
    --endpoint https://registry.westeurope.contoso.internal
  portolan replica create contoso/attic --location 52.37,4.90 --addresses 192.0.2.3 \
    --endpoint http://192.0.2.3:5000 --accept`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			d, err := flags.document(region)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.CreateReplica(cmd.Context(), registry, d)
			if err != nil {
				return badValue(err)
			}
			a.warnShared(r)
			if accept {
				if r, err = c.Accept(cmd.Context(), registry, region); err != nil {
					return err
				}
			}
			if timeout > 0 && r.Status != topology.Ready {
				if r, err = a.awaitPlan(cmd.Context(), c, r, timeout); err != nil {
					return err
				}
			}
			return a.print(r, func(w io.Writer) {
				replicaTable(w, []api.Replica{r})
				if r.Replication != nil && r.Replication.Plan != nil {
					fmt.Fprintln(w)
					printPlan(w, r.Replication.Plan)
				}
			})
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&accept, "accept", false, "accept the baseline's plan, conflicts included")
	cmd.Flags().DurationVar(&timeout, "timeout", 30*time.Second, "how long to wait for the plan; 0: not at all")
	return cmd
}

// awaitPlan waits until the baseline of a new replica is planned, and says meanwhile what it waits for.
func (a *app) awaitPlan(ctx context.Context, c *api.Client, r api.Replica, timeout time.Duration) (api.Replica, error) {
	name, reason := r.Registry+"/"+r.Region, ""
	a.progress("%s is created; looking at what it holds", name)
	deadline := time.Now().Add(timeout)
	for time.Now().Before(deadline) {
		if r.Status == topology.Ready || r.Status == topology.Degraded || r.Replication != nil && r.Replication.Plan != nil {
			return r, nil
		}
		if r.Replication != nil && r.Reason != reason { // before, nobody looked
			reason = r.Reason
			a.progress("%s: %s", name, reason)
		}
		if err := sleep(ctx, poll); err != nil {
			return r, err
		}
		var err error
		if r, err = c.Replica(ctx, r.Registry, r.Region); err != nil {
			return r, err
		}
	}
	a.progress("there is no plan after %v; portolan replica list shows how it goes on, and portolan replica update %s changes what was given wrong", timeout, name)
	return r, nil
}

func (a *app) replicaList() *cobra.Command {
	return &cobra.Command{
		Use:   "list [REGISTRY]",
		Short: "List the replicas of a registry, or of all",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			list := []api.Replica{}
			if len(args) == 1 {
				list, err = c.Replicas(cmd.Context(), args[0])
			} else {
				var registries []api.Registry
				registries, err = c.Registries(cmd.Context())
				for _, r := range registries {
					list = append(list, r.Replicas...)
				}
			}
			if err != nil {
				return err
			}
			return a.print(list, func(w io.Writer) { replicaTable(w, list) })
		},
	}
}

func (a *app) replicaShow() *cobra.Command {
	var limit int
	cmd := &cobra.Command{
		Use:   "show REGISTRY/REGION",
		Short: "Show a replica with what is still to be brought to it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			if limit < 0 {
				return usagef("--pending %d: want a number from 0", limit)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Replica(cmd.Context(), registry, region)
			if err != nil {
				return err
			}
			shown := struct {
				api.Replica
				PendingItems  []api.PendingItem `json:"pending_items,omitempty"`
				KeptConflicts []api.Conflict    `json:"kept_conflicts,omitempty"`
			}{Replica: r}
			if limit > 0 {
				// A server without the role replicator knows no items; the rest is worth showing all the same.
				if shown.PendingItems, err = c.Pending(cmd.Context(), registry, region, limit); err != nil && !api.IsCode(err, api.CodeRefused) {
					return err
				}
			}
			host := ""
			if limit > 0 && r.Replication != nil && r.Replication.Conflicts > 0 {
				if shown.KeptConflicts, err = c.Conflicts(cmd.Context(), registry, limit); err != nil && !api.IsCode(err, api.CodeRefused) {
					return err
				}
				of, err := c.Registry(cmd.Context(), registry)
				if err != nil {
					return err
				}
				host = pullName(of)
			}
			return a.print(shown, func(w io.Writer) {
				showReplica(w, r)
				printPending(w, shown.PendingItems)
				if len(shown.KeptConflicts) > 0 {
					fmt.Fprintln(w)
					conflictTable(w, shown.KeptConflicts, host)
				}
			})
		},
	}
	cmd.Flags().IntVar(&limit, "pending", 20, "how many pending images, and how many kept conflicts, to list")
	return cmd
}

// printPending prints what cannot be read at a replica, and what is to be brought there: one is for the replica to mend, of the
// other most goes by itself.
func printPending(w io.Writer, items []api.PendingItem) {
	headed := map[bool]bool{}
	for _, p := range items {
		if !headed[p.Unreadable] {
			fmt.Fprintln(w)
			if p.Unreadable {
				row(w, "UNREADABLE HERE", "SINCE", "WHY")
			} else {
				row(w, "PENDING", "SINCE", "ATTEMPTS", "WHY")
			}
			headed[p.Unreadable] = true
		}
		since, why := "-", p.Error
		if !p.Since.IsZero() {
			since = ago(p.Since, time.Now())
		}
		if p.NotReplicable != "" && !p.Unreadable {
			why = "not replicable: " + p.NotReplicable
		}
		if p.Unreadable {
			row(w, p.Image, since, why)
		} else {
			row(w, p.Image, since, p.Attempts, dash(why))
		}
	}
}

func showReplica(w io.Writer, r api.Replica) {
	row(w, "Name:", r.Registry+"/"+r.Region)
	row(w, "Home:", map[bool]string{true: "yes", false: "no"}[r.Home])
	row(w, "Endpoint:", dash(r.Endpoint))
	if len(r.SharedWith) > 0 {
		row(w, "Shared with:", strings.Join(r.SharedWith, ", "))
	}
	row(w, "Clients are sent to:", dash(strings.Join(append(slices.Clone(r.Addresses), nonEmpty(r.Hostname)...), ", ")))
	row(w, "Location:", dash(r.Location))
	row(w, "Status:", r.Status)
	row(w, "Health:", r.Health)
	row(w, "Routing:", r.Routing)
	row(w, "Weight:", weightOf(r))
	row(w, "Probe:", dash(r.Probe))
	row(w, "Pending:", r.Pending)
	row(w, "Reason:", dash(r.Reason))
	if len(r.Rules) > 0 {
		row(w, "Named by:", strings.Join(r.Rules, ", "))
	}
	if len(r.Requests) > 0 {
		row(w, "Asked for:", strings.Join(r.Requests, ", "))
	}
	if s := r.Replication; s != nil {
		row(w, "Content:", s.Phase)
		row(w, "Last scan:", ago(s.LastScan, time.Now()))
		row(w, "Not replicable:", s.NotReplicable)
		row(w, "Unreadable here:", s.Unreadable)
		row(w, "Conflicts kept:", s.Conflicts)
		if s.LastError != "" {
			row(w, "Last error:", s.LastError)
		}
		if s.Plan != nil && (s.Phase == topology.PhasePlanned || s.Phase == topology.PhaseSeeding) { // else it was carried out
			fmt.Fprintln(w)
			printPlan(w, s.Plan)
		}
	}
	if len(r.Probes) > 0 {
		fmt.Fprintln(w)
		row(w, "ADDRESS", "HEALTH", "SINCE", "LATENCY", "CERTIFICATE", "ERROR")
		for _, p := range r.Probes {
			certificate := "-"
			if !p.CertificateExpiry.IsZero() {
				certificate = fmt.Sprintf("until %s, %s", p.CertificateExpiry.Format(time.DateOnly), counted(int(time.Until(p.CertificateExpiry)/(24*time.Hour)), "day", "days"))
			}
			row(w, p.Target, p.Health, ago(p.Since, time.Now()), fmt.Sprintf("%.1f ms", p.LatencyMS), certificate, dash(p.Error))
		}
		printVotes(w, r.Probes)
	}
}

// printVotes prints which server says what of each address, where there are votes.
func printVotes(w io.Writer, probes []api.Probe) {
	headed := false
	for _, p := range probes {
		for _, v := range p.Votes {
			if !headed {
				fmt.Fprintln(w)
				row(w, "ADDRESS", "VOTER", "SAYS", "COUNTS")
				headed = true
			}
			row(w, p.Target, v.Voter, v.Says, p.Health)
		}
	}
}

func nonEmpty(s string) []string {
	if s == "" {
		return nil
	}
	return []string{s}
}

// picked is the value of a flag; nil where the flag is not given.
func picked[T any](cmd *cobra.Command, flag string, value *T) *T {
	if !cmd.Flags().Changed(flag) {
		return nil
	}
	return value
}

func (a *app) replicaUpdate() *cobra.Command {
	var flags replicaFlags
	var force bool
	var over time.Duration
	cmd := &cobra.Command{
		Use:   "update REGISTRY/REGION [--weight N] [--routing enabled|disabled] [--over DURATION] ...",
		Short: "Change a replica",
		Long: `Change a replica. Only the flags that are given change anything; an empty value removes
a setting, so that its default holds (a weight is a number always: 100). The change and
the shares of clients that result are printed. A weight, routing or address is in the
answers within a second; resolvers keep what they have until its TTL ends.

With --over the weight goes to the one given, or, with --routing enabled, from 0 to the one
that there is, little by little over that time. One server at a time makes the steps, and
another goes on if it fails. Any other edit of weight or routing ends that: --weight alone
sets a weight at once.

A change after which clients would get no address any more (the last replica with routing
enabled and a weight above 0, of all or of those that a fence names) is refused without
--force.`,
		Example: `  portolan replica update contoso/westus --weight 90
  portolan replica update contoso/westus --routing disabled
  portolan replica update contoso/westus --routing enabled --over 30m`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			p := api.ReplicaPatch{
				Endpoint: picked(cmd, "endpoint", &flags.endpoint), Addresses: picked(cmd, "addresses", &flags.addresses),
				Hostname: picked(cmd, "hostname", &flags.hostname), Weight: picked(cmd, "weight", &flags.weight),
				Routing: picked(cmd, "routing", &flags.routing), Probe: picked(cmd, "probe", &flags.probe), Canary: picked(cmd, "canary", &flags.canary),
				Credentials: picked(cmd, "credentials", &flags.credentials), CA: picked(cmd, "ca", &flags.ca),
				ClientCert: picked(cmd, "client-cert", &flags.clientCert), Prefix: picked(cmd, "prefix", &flags.prefix),
				Realms: picked(cmd, "realms", &flags.realms),
			}
			if p.Weight != nil {
				if err := flags.checkWeight(); err != nil {
					return err
				}
			}
			if cmd.Flags().Changed("location") {
				place, err := flags.coordinates()
				if err != nil {
					return err
				}
				p.Location = &place
			}
			if cmd.Flags().Changed("over") {
				if p.Weight == nil && (p.Routing == nil || *p.Routing != api.RoutingEnabled) {
					return usagef("--over %v: says how long the weight takes to change: give --weight N with it, or --routing enabled", over)
				}
				p.Over = over.String()
			}
			if p == (api.ReplicaPatch{}) {
				return usagef("nothing is to be changed: give at least one flag, such as --weight 90")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.UpdateReplica(cmd.Context(), registry, region, p, force)
			if err != nil {
				return badValue(err)
			}
			return a.print(r, func(w io.Writer) { printApplied(w, r, false) })
		},
	}
	flags.add(cmd)
	cmd.Flags().DurationVar(&over, "over", 0, "let the weight change little by little over that time, 10s to 168h (default: at once)")
	cmd.Flags().BoolVar(&force, "force", false, "change it also if clients that get an address now get none then")
	return cmd
}

func (a *app) replicaDelete() *cobra.Command {
	var force, noWait bool
	cmd := &cobra.Command{
		Use:   "delete REGISTRY/REGION",
		Short: "Drain a replica and take it out of its registry; its content stays",
		Long: `Take a replica out of its registry, in this order: no more clients are sent there; the
last answer that names it expires; what was pushed there and is nowhere else yet is
carried to the others. Then it is gone from the registry. Its content is never deleted.
After a resync it is compared first: before that, nobody knows what only it has.

A replica that was never compared had no clients, and goes at once.

Orders and fences that name it go on without it, and an order that names nothing else goes
with it: they are printed, as portolan replica create does not bring them back.

With --force the last step does not wait: what would be lost to the others is printed.
A deletion cannot be called off, nor does interrupting the command stop it. Until it is
done only the replica's credentials, CA, client certificate and realms can be changed;
portolan replica create brings it back when it is gone, compared anew.

The home replica cannot be deleted while the registry exists.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.DeleteReplica(cmd.Context(), registry, region, force)
			if err != nil {
				return err
			}
			if len(r.Rules) > 0 {
				a.progress("%s: it is named by %s, which will go on without it, or go with it where they name nothing else", args[0], strings.Join(r.Rules, ", "))
			}
			if noWait {
				return a.print(r, func(w io.Writer) { replicaTable(w, []api.Replica{r}) })
			}
			if err := a.awaitGone(cmd.Context(), c, r); err != nil {
				return err
			}
			return a.print(map[string]string{"deleted": args[0]}, func(w io.Writer) {
				fmt.Fprintf(w, "replica %s is deleted; its content stays where it is\n", args[0])
			})
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "do not wait for pushes that are nowhere else; what is lost is printed")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return at once; portolan replica list shows how it goes on")
	return cmd
}

// awaitGone tells how the deletion of a replica goes on until it is done.
func (a *app) awaitGone(ctx context.Context, c *api.Client, r api.Replica) error {
	name := r.Registry + "/" + r.Region
	last := ""
	for {
		if reason := r.Reason; reason != last && reason != "" {
			a.progress("%s: %s", name, reason)
			last = reason
		}
		err := sleep(ctx, poll)
		if err == nil {
			var now api.Replica
			if now, err = c.Replica(ctx, r.Registry, r.Region); err == nil {
				r = now
			}
		}
		switch {
		case api.IsCode(err, api.CodeNotFound):
			return nil
		case ctx.Err() != nil:
			a.progress("%s: the deletion goes on by itself, and cannot be called off; portolan replica list shows it", name)
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("%w; the deletion of %s goes on by itself: portolan replica list shows it", err, name)
		}
	}
}

func (a *app) replicaWait() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait REGISTRY/REGION",
		Short: "Wait until a replica is Ready",
		Long: `Wait until a replica is Ready: everything that was decided before is applied there, or
listed as not replicable. It fails at once where only an operator can go on: a plan
with conflicts that waits for portolan replica accept, or a replica that the guard holds
because much of it vanished or went back.`,
		Example: `  portolan replica wait contoso/westeurope --timeout 30m`,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			if timeout <= 0 {
				return usagef("--timeout %v: want more than nothing", timeout)
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := a.awaitReady(cmd.Context(), c, registry, region, timeout)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { replicaTable(w, []api.Replica{r}) })
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 10*time.Minute, "how long to wait")
	return cmd
}

func (a *app) awaitReady(ctx context.Context, c *api.Client, registry, region string, timeout time.Duration) (api.Replica, error) {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	last, state := "", ""
	for asking := ctx; ; asking = bounded { // the first look is had, whatever time it takes
		r, err := c.Replica(asking, registry, region)
		switch {
		case err == nil && r.Status == topology.Ready:
			return r, nil
		case err == nil:
			state = fmt.Sprintf("%s, %d pending", r.Status, r.Pending)
			if r.Reason != "" {
				state += ": " + r.Reason
			}
		case ctx.Err() != nil:
			return r, ctx.Err()
		case (asking == ctx || bounded.Err() == nil) && vain(err, asking == ctx):
			return r, err
		case bounded.Err() == nil:
			state = err.Error()
		}
		if state != last {
			a.progress("%s/%s: %s", registry, region, state)
			last = state
		}
		if err == nil {
			if err := a.stuck(r); err != nil {
				return r, err
			}
		}
		if bounded.Err() != nil {
			return r, &api.Error{Code: api.CodeTimeout, Message: fmt.Sprintf("%s/%s is not Ready after %v: %s", registry, region, timeout, state)}
		}
		if err := sleep(ctx, poll); err != nil {
			return r, err
		}
	}
}

// stuck says what only an operator can do before a replica is Ready; nil if it goes on by itself.
func (a *app) stuck(r api.Replica) error {
	name, asked := r.Registry+"/"+r.Region, func(verb string) bool { return slices.Contains(r.Requests, verb) }
	switch s := r.Replication; {
	case asked(topology.RequestDelete):
		return fmt.Errorf("%s is being deleted, which cannot be called off", name)
	case s == nil || asked(topology.RequestAccept) || asked(topology.RequestResync):
		return nil
	case s.Held != "":
		return fmt.Errorf("%s is held until an operator decides: %s", name, s.Held)
	case s.Phase == topology.PhasePlanned:
		if s.Plan != nil {
			printPlan(a.stderr, s.Plan)
		}
		return fmt.Errorf("the plan of %s has conflicts and waits for: portolan replica accept %s", name, name)
	}
	return nil
}

// vain reports whether an error will be there at the next look too. That of a server that starts again, or of its store, may pass; but who
// finds no portolan at the first look has the wrong address.
func vain(err error, first bool) bool {
	var answered *api.Error
	passes := !errors.As(err, &answered) || answered.Code == api.CodeUnavailable || answered.Code == api.CodeInternal
	return !passes || first && !api.Answered(err)
}

// replicaRequest is a command that leaves a request for the replicator; done tells what that means, for the replica as it was.
func (a *app) replicaRequest(verb, short, long string, done func(api.Replica) string, ask func(*api.Client, context.Context, string, string) (api.Replica, error)) *cobra.Command {
	return &cobra.Command{
		Use: verb + " REGISTRY/REGION", Short: short, Long: long,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			registry, region, err := replicaName(args[0])
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			before, err := c.Replica(cmd.Context(), registry, region)
			if err != nil {
				return err
			}
			r, err := ask(c, cmd.Context(), registry, region)
			if err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { fmt.Fprintf(w, "%s/%s: %s\n", registry, region, done(before)) })
		},
	}
}

// sleep waits for d, or until ctx is done.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
