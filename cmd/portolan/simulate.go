package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/router"
	"portolan/sample"
)

func (a *app) simulate() *cobra.Command {
	var file, queries string
	var ask api.Simulate
	cmd := &cobra.Command{
		Use:   "simulate -f FILE [--prune] [--queries FILE]",
		Short: "Tell which clients applying a topology file would send elsewhere",
		Long: `Tell which share of the clients portolan apply -f FILE would send elsewhere, from where to
where, before anything is applied: by the very function, databases and health that the
server answers by at this moment. Nothing is changed.

Without --queries every /24 of IPv4 whose place the database knows counts once. --queries
is a file of recorded clients, such as dns.sample writes: lines with a network (an ECS
subnet) or an address (of a resolver that sends none), and a count or none for 1:

  203.0.113.0/24 17
  198.51.100.7

At most 100000 different ones are taken. A replica that is new, or that gets another
endpoint, is taken as it will be once it is seeded, and said so.`,
		Example: `  portolan simulate -f new-topology.yaml
  portolan simulate -f new-topology.yaml --queries /var/lib/portolan/clients.txt`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file == "-" && queries == "-" {
				return usagef("-f and --queries cannot both be standard input")
			}
			d, err := readDocument(cmd, file)
			if err != nil {
				return err
			}
			ask.Document = d.Document
			if queries != "" {
				if ask.Queries, err = readQueries(cmd, queries); err != nil {
					return err
				}
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r, err := c.Simulate(cmd.Context(), ask)
			if err = a.settle(d, err); err != nil {
				return err
			}
			return a.print(r, func(w io.Writer) { printSimulation(w, r) })
		},
	}
	f := cmd.Flags()
	f.StringVarP(&file, "file", "f", "", "the topology file; - for standard input")
	f.BoolVar(&ask.Prune, "prune", false, "as if replicas that the file does not name were deleted")
	f.StringVar(&queries, "queries", "", "a file of recorded clients; - for standard input")
	return cmd
}

// readQueries reads recorded clients, and gives them back with those of one client added up.
func readQueries(cmd *cobra.Command, file string) (string, error) {
	name, in := file, cmd.InOrStdin()
	if file == "-" {
		name = "standard input"
	} else {
		f, err := os.Open(file)
		if err != nil {
			return "", badValue(fmt.Errorf("reading recorded clients: %w", err))
		}
		defer f.Close()
		in = f
	}
	clients, err := sample.Read(name, in)
	if err != nil {
		return "", err
	}
	if len(clients) == 0 {
		return "", fmt.Errorf("no client is recorded in %s", name)
	}
	var text strings.Builder
	err = sample.Write(&text, clients)
	return text.String(), err
}

func printSimulation(w io.Writer, s api.Simulation) {
	one := map[string]string{api.UnitCells: "cell", api.UnitQueries: "query"}
	for _, r := range s.Registries {
		share := func(n uint64) string { return shares(n, r.Total-n)[0] }
		fmt.Fprintf(w, "%s: %d of %s (%s) would be sent elsewhere\n", r.Registry, r.Moved, counted(int(r.Total), one[s.Unit], s.Unit), share(r.Moved))
		if r.Moved > 0 {
			fmt.Fprintln(w)
			row(w, "FROM", "TO", strings.ToUpper(s.Unit), "SHARE")
			for _, m := range r.Moves {
				if m.From != m.To {
					row(w, nowhere(m.From), nowhere(m.To), m.Count, share(m.Count))
				}
			}
		}
		fmt.Fprintln(w)
		row(w, "REGION", "NOW", "THEN")
		var now, then []uint64
		for _, p := range r.Replicas {
			now, then = append(now, p.Before), append(then, p.After)
		}
		before, after := shares(now...), shares(then...)
		for i, p := range r.Replicas {
			row(w, nowhere(p.Region), before[i], after[i])
		}
		fmt.Fprintln(w)
	}
	for _, names := range []struct {
		list []string
		what string
	}{
		{s.Added, "only in the file or not served yet"},
		{s.Lost, "would not be served any more"},
		{s.Untouched, "not in the file, and stays as it is"},
	} {
		for _, name := range names.list {
			fmt.Fprintf(w, "%s: %s\n", name, names.what)
		}
	}
	for _, text := range s.Assumed {
		fmt.Fprintln(w, "assumed:", text)
	}
}

// shares writes parts of a whole as percentages.
func shares(counts ...uint64) []string {
	parts := make([]float64, len(counts))
	for i, n := range counts {
		parts[i] = float64(n)
	}
	texts := make([]string, len(counts))
	for i, share := range router.Percentages(parts) {
		texts[i] = percent(share)
		if counts[i] > 0 && share == 0 {
			texts[i] = "<0.01%"
		}
	}
	return texts
}

// nowhere stands for the region of answers that have none.
func nowhere(region string) string {
	if region == "" {
		return "(nowhere)"
	}
	return region
}
