package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/check"
	"portolan/router"
)

func (a *app) explain() *cobra.Command {
	var ecs, resolver, server string
	cmd := &cobra.Command{
		Use:   "explain REGISTRY [--ecs PREFIX] [--resolver IP] [--server ADDRESS]",
		Short: "Say where a client is sent, and why",
		Long: `Say where a client is sent, and why, by the very function and snapshot that the DNS
server answers from. --ecs is the network (or address) of the client as its resolver
sends it along, --resolver the address of a resolver that does not. With both, as in a
query, the subnet counts, and the resolver only where that is private or special. SHARE is
how much of all cells with the same order of regions a replica gets at this moment.

--server asks that DNS server too, and says where its answer differs. It sees this machine
as the resolver: in place of --resolver it is asked with the network around that as the
subnet, so that where weights divide cells the answer may be another. With the full name
(contoso.geo.example.net) as REGISTRY it is asked also where no API can be reached.`,
		Example: `  portolan explain contoso --ecs 203.0.113.0/24
  portolan explain contoso --resolver 198.51.100.7
  portolan explain contoso --ecs 203.0.113.0/24 --server 192.0.2.53`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			if ecs == "" && resolver == "" {
				// A registry that there is not is the greater mistake.
				if _, err := c.Registry(cmd.Context(), args[0]); api.IsCode(err, api.CodeNotFound) {
					return err
				}
				return usagef("who asks? Give --ecs PREFIX or --resolver IP")
			}
			if server != "" {
				return a.explainServer(cmd.Context(), c, args[0], ecs, resolver, server)
			}
			e, err := c.Explain(cmd.Context(), args[0], ecs, resolver)
			if err != nil {
				return badValue(err)
			}
			return a.print(e, func(w io.Writer) { printExplanation(w, e) })
		},
	}
	cmd.Flags().StringVar(&ecs, "ecs", "", "the client's network or address")
	cmd.Flags().StringVar(&resolver, "resolver", "", "the address of the client's resolver")
	cmd.Flags().StringVar(&server, "server", "", "the address of a DNS server to ask as well, with its port if that is not 53")
	return cmd
}

// comparison is what a DNS server answers beside what the API says.
type comparison struct {
	Served check.Served `json:"served"`
	// Decision is absent where no API could be asked; Unasked says why.
	Decision    *api.Explanation `json:"decision,omitempty"`
	Unasked     string           `json:"unasked,omitempty"`
	Differences []string         `json:"differences"`
}

func (a *app) explainServer(ctx context.Context, c *api.Client, name, ecs, resolver, server string) error {
	subnet, err := asked(ecs, resolver)
	if err != nil {
		return err
	}
	// A registry's name is one label; the full one has the zone behind it.
	fqdn, label := strings.ToLower(strings.TrimSuffix(name, ".")), name
	full := strings.Contains(fqdn, ".")
	if full {
		label, _, _ = strings.Cut(fqdn, ".")
	}
	r := comparison{Differences: []string{}}
	registry, err := c.Registry(ctx, label)
	if err == nil && registry.FQDN != "" && !full {
		fqdn = strings.TrimSuffix(registry.FQDN, ".")
	}
	if err == nil && strings.TrimSuffix(registry.FQDN, ".") != fqdn {
		err = fmt.Errorf("the API's server has %s at the name %q", label, registry.FQDN)
	}
	if err == nil {
		var e api.Explanation
		if e, err = c.Explain(ctx, label, ecs, resolver); err == nil {
			r.Decision = &e
		}
	}
	switch {
	case api.IsCode(err, api.CodeInvalid):
		return badValue(err)
	case err != nil && (!full || ctx.Err() != nil):
		return err
	case err != nil:
		r.Unasked = err.Error()
	}
	if r.Served, err = check.Ask(ctx, server, fqdn, subnet); err != nil {
		return err
	}
	if r.Decision != nil {
		r.Differences = append(r.Differences, r.Served.Differences(*r.Decision, registry.Replicas)...)
	}
	return a.print(r, func(w io.Writer) { printComparison(w, r) })
}

// asked is the subnet that a server is asked with: the client's, or that around its resolver.
func asked(ecs, resolver string) (netip.Prefix, error) {
	if p, err := netip.ParsePrefix(ecs); err == nil {
		return p.Masked(), nil
	}
	text := ecs
	if text == "" {
		text = resolver
	}
	address, err := netip.ParseAddr(text)
	if err != nil || address.Zone() != "" {
		return netip.Prefix{}, usagef("%q is neither a network, such as 203.0.113.0/24, nor an IP address", text)
	}
	address = address.Unmap()
	bits := 24
	if address.Is6() {
		bits = 56 // what resolvers send of an address: RFC 7871, section 11.1
	}
	return address.Prefix(bits)
}

func printComparison(w io.Writer, r comparison) {
	fmt.Fprintf(w, "%s answers for %s with the subnet %v\n", r.Served.Server, r.Served.Name, r.Served.Subnet)
	for _, s := range r.Served.Answers {
		text := s.Rcode + ", no record"
		if len(s.Records) > 0 {
			text = fmt.Sprintf("%s, TTL %d s", strings.Join(s.Records, ", "), s.TTL)
		}
		if s.Scope >= 0 {
			text += fmt.Sprintf(", scope /%d", s.Scope)
		}
		row(w, "  "+s.Type+":", text)
	}
	for _, record := range r.Served.Whoami {
		row(w, "  whoami:", strings.Join(record, " "))
	}
	if len(r.Served.Whoami) == 0 {
		row(w, "  whoami:", "tells nothing: dns.whoami is off there")
	}
	fmt.Fprintln(w)
	if r.Decision == nil {
		fmt.Fprintln(w, "the API was not asked:", r.Unasked)
		return
	}
	for _, text := range r.Differences {
		fmt.Fprintln(w, "difference:", text)
	}
	if len(r.Differences) == 0 {
		fmt.Fprintln(w, "that is what the API says:")
	} else {
		fmt.Fprintln(w, "the API says:")
	}
	fmt.Fprintln(w)
	printExplanation(w, *r.Decision)
}

func printExplanation(w io.Writer, e api.Explanation) {
	fmt.Fprintln(w, e.Sentence)
	fmt.Fprintln(w)
	client := map[string]string{"ecs": "its subnet (ECS)", "resolver": "its resolver", "none": "nothing: no usable subnet, and no resolver"}[e.Source]
	row(w, "Client known by:", client)
	if e.Why != "" {
		row(w, "", e.Why)
	}
	if e.Source == "ecs" && e.Resolver.IsValid() {
		row(w, "", fmt.Sprintf("the resolver %v would count only without a usable subnet", e.Resolver))
	}
	if e.Address.IsValid() {
		row(w, "Looked up:", e.Address)
	}
	if e.Located {
		place := dash(e.Country)
		if e.Continent != "" {
			place += " (" + e.Continent + ")"
		}
		if e.Latitude != nil && e.Longitude != nil {
			place += fmt.Sprintf(", %.2f,%.2f", *e.Latitude, *e.Longitude)
		}
		row(w, "Place:", place)
		row(w, "As known by:", fmt.Sprintf("%s, entry %v", e.Database, e.Network))
	} else {
		row(w, "Place:", "unknown")
	}
	if e.ASN != 0 {
		row(w, "Autonomous system:", e.ASN)
	}
	if e.Cell != "" {
		row(w, "Cell:", e.Cell)
	}
	if e.Order != "" {
		row(w, "Order:", e.Order)
	}
	if e.Fence != "" {
		row(w, "Fence:", e.Fence)
	}
	row(w, "Scope:", fmt.Sprintf("/%d", e.Scope))
	why := "all settled"
	if !e.Settled {
		why = "a replica is about to change, or all are down"
	}
	row(w, "TTL:", fmt.Sprintf("%d s: %s", e.TTL, why))
	fmt.Fprintln(w)
	row(w, "", "REGION", "DISTANCE", "HEALTH", "WEIGHT", "SHARE", "BUCKET", "WHY")
	for _, c := range e.Candidates {
		mark := "-"
		if c.Position > 0 {
			mark = fmt.Sprint(c.Position)
		}
		row(w, mark, c.Region, away(c), c.Health, c.Weight, percent(c.Share), c.Bucket, dash(c.Reason))
	}
}

// away is how far a replica is: by the operator's table of latencies where that has a figure, which counts then.
func away(c router.Candidate) string {
	switch {
	case c.Latency > 0:
		return fmt.Sprintf("%d ms", c.Latency)
	case c.Distance >= 0:
		return fmt.Sprintf("%d km", c.Distance)
	}
	return "-"
}
