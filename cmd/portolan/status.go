package main

import (
	"cmp"
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/topology"
)

func (a *app) status() *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "Show the state of the server: roles, store, topology, replicas, problems, databases",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := a.client()
			if err != nil {
				return err
			}
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(s, func(w io.Writer) { showStatus(w, s, time.Now()) })
		},
	}
}

func showStatus(w io.Writer, s api.Status, now time.Time) {
	row(w, "Version:", s.Version)
	row(w, "Started:", ago(s.Started, now))
	row(w, "Roles:", strings.Join(s.Roles, ", "))
	ready := "yes"
	if !s.Ready {
		ready = "no: " + strings.Join(s.NotReady, "; ")
	}
	row(w, "Ready:", ready)
	row(w, "Store:", s.Store.Name)
	if s.Store.Error != "" {
		row(w, "", "cannot be read: "+s.Store.Error)
	}
	row(w, "Topology:", fmt.Sprintf("%s, digest %s, changed %s", counted(s.Topology.Registries, "registry", "registries"), clipDigest(s.Topology.Digest), ago(s.Topology.Changed, now)))
	for _, r := range s.Replicas {
		row(w, "Replicas of "+r.Registry+":", summaryOf(r))
	}
	for _, h := range s.Topology.Held {
		row(w, "Held:", fmt.Sprintf("an edit of %s took away %s: %s", h.Registry, strings.Join(h.Missing, ", "), h.Way()))
	}
	for _, r := range s.Topology.Ramps {
		row(w, "Ramp:", fmt.Sprintf("%s/%s has the weight %d, to %d by %s", r.Registry, r.Region, r.From, r.To, clock(r.End)))
	}
	if d := s.DNS; d != nil {
		row(w, "Zone:", fmt.Sprintf("%s, TTL %d to %d s", d.Zone, d.TTLMin, d.TTLMax))
		row(w, "DNS:", cmp.Or(strings.Join(d.Listen, ", "), "does not listen yet"))
	}
	for _, g := range s.Geo {
		name := g.Path
		if name == "" {
			name = "built-in"
		}
		kind := g.Type
		if g.Lines > 0 {
			kind += ", " + counted(g.Lines, "line", "lines")
		}
		row(w, "Database:", fmt.Sprintf("%s (%s), built %s, %s old", name, kind, g.Built.Format(time.DateOnly), counted(int(g.Age(now)/(24*time.Hour)), "day", "days")))
	}
	for _, v := range s.Voters {
		says := fmt.Sprintf("%s up, %d down, heard %s", counted(v.Up, "address", "addresses"), v.Down, ago(v.Heard, now))
		switch {
		case v.Self:
			says = fmt.Sprintf("%s up, %d down, this server", counted(v.Up, "address", "addresses"), v.Down)
		case !v.Fresh:
			says += ": does not count any more"
		}
		if v.Abstains {
			says += ": abstains, since it finds everything down"
		}
		row(w, "Voter "+v.Name+":", says)
	}
	if s.Events != nil {
		row(w, "Events:", fmt.Sprintf("%s, heard from %s since the start", s.Events.URL, counted(len(s.Events.Received), "replica", "replicas")))
	}
	problems := s.Topology.Problems
	if s.DNS != nil {
		problems = append(problems, s.DNS.Problems...)
	}
	if len(problems) > 0 {
		fmt.Fprintln(w)
		row(w, "PROBLEM", "VALUE", "WHY", "MEANWHILE")
		for _, p := range problems {
			row(w, p.Key, dash(p.Value), p.Reason, dash(p.Effect))
		}
	}
	if len(s.Warnings) > 0 {
		fmt.Fprintln(w)
		for _, warning := range s.Warnings {
			row(w, "warning:", warning)
		}
	}
	if len(s.Topology.Drift) > 0 {
		fmt.Fprintln(w)
		showDrift(w, s.Topology.File, s.Topology.Drift)
	}
}

// summaryOf is how the replicas of a registry are, in a line.
func summaryOf(r api.ReplicaSummary) string {
	says := []string{fmt.Sprintf("%d of %d healthy", r.Healthy, r.Total)}
	switch unknown := r.Total - r.Healthy - r.Unhealthy; {
	case unknown == r.Total: // a replicator: none of them healthy would be an outage
		says[0] = fmt.Sprintf("%d, not probed here", r.Total)
	case unknown > 0:
		says[0] += fmt.Sprintf(", %d not probed here", unknown)
	}
	for _, t := range r.Troubled {
		trouble := t.Region + " is " + t.State
		if t.Reason != "" {
			trouble += ": " + t.Reason
		}
		says = append(says, trouble)
	}
	return strings.Join(says, "; ")
}

// showDrift tells what portolan apply would make of the store by the topology file, and of a replica that it would create what else
// may have been meant.
func showDrift(w io.Writer, file string, drift []topology.Change) {
	prune, created := "", []string{}
	for _, c := range drift {
		// Of a replica the endpoint is what all have.
		replica, endpoint := strings.CutSuffix(strings.TrimPrefix(c.Key, topology.RegistriesPrefix), "/endpoint")
		switch {
		case endpoint && c.Op == topology.Removed:
			prune = " --prune"
		case endpoint && c.Op == topology.Added:
			created = append(created, strings.Replace(replica, "/replicas/", "/", 1))
		}
	}
	fmt.Fprintf(w, "portolan apply%s -f %s would change this; portolan export writes the store's topology as a file:\n", prune, file)
	printChanges(w, drift)
	for _, name := range created {
		fmt.Fprintf(w, "The file still names %s, and applying it would create that replica: if it was deleted, take it out of the file.\n", name)
	}
}

func clipDigest(d string) string {
	if len(d) > 12 {
		return d[:12]
	}
	return dash(d)
}

func (a *app) version() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			v := map[string]string{"version": version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						v["commit"] = s.Value
					}
				}
			}
			return a.print(v, func(w io.Writer) { fmt.Fprintf(w, "portolan %s (%s, %s)\n", v["version"], v["go"], v["platform"]) })
		},
	}
}

func (a *app) events() *cobra.Command {
	return group("events", "Let replicas tell Portolan what happens there", &cobra.Command{
		Use:   "token REGISTRY/REGION",
		Short: "Print what a replica's configuration needs to send its notifications",
		Long: `Print the section of a CNCF distribution registry's configuration that makes it send its
notifications to Portolan. The token in it can do nothing but report events of this one
replica. Pulls are ignored at the registry, so that they do not hold up pushes.`,
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
			t, err := c.EventsToken(cmd.Context(), registry, region)
			if err != nil {
				return err
			}
			return a.print(t, func(w io.Writer) { printNotifications(w, args[0], t) })
		},
	})
}

func printNotifications(w io.Writer, replica string, t api.EventsToken) {
	fmt.Fprintf(w, `# In the configuration of the registry %s (CNCF distribution 2.8 and 3).
# Fix http.secret too: without it an upload cannot go on after a restart. And set storage.delete.enabled: true,
# which is off by default: without it what is deleted elsewhere stays here.
notifications:
  endpoints:
    - name: portolan
      url: %s
      headers:
        Authorization: [Bearer %s]
      timeout: 5s
      threshold: 5
      backoff: 1s
      ignore:                       # pulls, Portolan's own among them, would delay pushes by seconds
        mediatypes: [application/octet-stream]   # distribution 2.8 heeds actions only beside this
        actions: [pull]
`, replica, t.URL, t.Token)
}
