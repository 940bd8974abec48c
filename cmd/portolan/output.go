package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/goccy/go-yaml"
	"github.com/spf13/pflag"

	"portolan/api"
	"portolan/topology"
)

func (a *app) checkOutput() error {
	if !slices.Contains([]string{"table", "json", "yaml"}, a.output) {
		return usagef("--output %q: want table, json or yaml", a.output)
	}
	return nil
}

// outputOf is the form of output that a command line asks for, whatever else is wrong with it.
func outputOf(args []string) string {
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	output := flags.StringP("output", "o", "table", "")
	flags.Parse(args) // what cannot be read names none
	return *output
}

// printError writes an error for programs, as the API does, where JSON or YAML was asked for.
func (a *app) printError(err error) {
	if a.output != "json" && a.output != "yaml" {
		return
	}
	if err := a.print(api.Failure{Error: api.ErrorOf(err, api.CodeFailed)}, nil); err != nil {
		fmt.Fprintf(a.stderr, "portolan: %v\n", err)
	}
}

// print writes value as JSON or YAML, where that was asked for, and otherwise lets table write for people.
func (a *app) print(value any, table func(w io.Writer)) error {
	switch a.output {
	case "json":
		e := json.NewEncoder(a.stdout)
		e.SetIndent("", "  ")
		e.SetEscapeHTML(false)
		if err := e.Encode(value); err != nil {
			return fmt.Errorf("writing the output: %w", err)
		}
		return nil
	case "yaml":
		// By way of JSON, so that both have the same names.
		text, err := json.Marshal(value)
		if err == nil {
			text, err = yaml.JSONToYAML(text)
		}
		if err == nil {
			_, err = a.stdout.Write(text)
		}
		if err != nil {
			return fmt.Errorf("writing the output: %w", err)
		}
		return nil
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	table(w)
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing the output: %w", err)
	}
	return nil
}

// progress writes a line for people while a command waits.
func (a *app) progress(format string, args ...any) {
	fmt.Fprintf(a.stderr, format+"\n", args...)
}

// widest is how many characters a cell of a table has on one line, so that a sentence in it makes no line of hundreds.
const widest = 80

// row writes the cells of a table's row: on several lines, where one holds several or is too long.
func row(w io.Writer, cells ...any) {
	folded := make([][]string, len(cells))
	height := 1
	for i, c := range cells {
		folded[i] = fold(fmt.Sprint(c))
		height = max(height, len(folded[i]))
	}
	for n := range height {
		for i, lines := range folded {
			if i > 0 {
				fmt.Fprint(w, "\t")
			}
			if n < len(lines) {
				fmt.Fprint(w, lines[n])
			}
		}
		fmt.Fprintln(w)
	}
}

// fold breaks text between words into lines of up to widest characters; a longer word has a line of its own.
func fold(text string) (lines []string) {
	for line := range strings.SplitSeq(text, "\n") {
		words := strings.Split(line, " ")
		full := words[0]
		for _, word := range words[1:] {
			if strings.TrimSpace(full) != "" && utf8.RuneCountInString(full+" "+word) > widest {
				lines, full = append(lines, full), word
			} else {
				full += " " + word
			}
		}
		lines = append(lines, full)
	}
	return lines
}

// counted is a number with its noun.
func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// dash stands for what is empty, so that columns stay columns.
func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func replicaTable(w io.Writer, replicas []api.Replica) {
	row(w, "NAME", "LOCATION", "STATUS", "HEALTH", "ROUTING", "WEIGHT", "PENDING", "REASON")
	for _, r := range replicas {
		row(w, r.Registry+"/"+r.Region, dash(r.Location), r.Status, r.Health, r.Routing, weightOf(r), r.Pending, dash(r.Reason))
	}
}

// warnShared warns of replicas that are the server of another registry's, too.
func (a *app) warnShared(replicas ...api.Replica) {
	for _, r := range replicas {
		if len(r.SharedWith) > 0 {
			a.progress("warning: %s/%s is the same server as %s, with repositories in common: what is pushed there is replicated by both\nregistries; give each a --prefix of its own",
				r.Registry, r.Region, strings.Join(r.SharedWith, ", "))
		}
	}
}

// weightOf is a replica's weight, and where it goes.
func weightOf(r api.Replica) string {
	weight := strconv.Itoa(r.Weight)
	if r.Ramp != nil {
		weight += fmt.Sprintf(" (to %d by %s)", r.Ramp.To, clock(r.Ramp.End))
	}
	return weight
}

// clock is a time for people, with its date unless that is today's.
func clock(t time.Time) string {
	t = t.Local()
	if t.Format(time.DateOnly) == time.Now().Format(time.DateOnly) {
		return t.Format(time.TimeOnly)
	}
	return t.Format(time.DateTime)
}

func registryTable(w io.Writer, registries []api.Registry) {
	row(w, "NAME", "FQDN", "HOME", "REPLICAS", "READY", "CLIENT NAMES")
	for _, r := range registries {
		ready := 0
		for _, p := range r.Replicas {
			if p.Status == topology.Ready {
				ready++
			}
		}
		row(w, r.Name, dash(r.FQDN), dash(r.Home), len(r.Replicas), ready, dash(strings.Join(r.ClientNames, ",")))
	}
}

func printChanges(w io.Writer, changes []topology.Change) {
	for _, c := range changes {
		fmt.Fprintln(w, c)
	}
}

// printShares tells where the clients nearest to each region go, or would: verb says which.
func printShares(w io.Writer, shares []api.RegistryShares, verb string) {
	for _, s := range shares {
		fmt.Fprintf(w, "\nClients of %s %s\n", s.Registry, verb)
		for _, split := range s.Splits {
			parts := make([]string, len(split.Shares))
			for i, share := range split.Shares {
				parts[i] = share.Region + " " + percent(share.Percent)
			}
			row(w, "  near "+split.Nearest, "to "+dash(strings.Join(parts, ", ")))
		}
		for _, split := range s.Splits {
			if len(split.Shares) == 0 {
				fmt.Fprintf(w, "  Warning: clients nearest to %s get no address: every replica that they may be sent to has the weight 0 or routing disabled.\n", split.Nearest)
			}
		}
	}
}

// percent writes a share as package router has it.
func percent(share float64) string {
	return strconv.FormatFloat(share, 'f', -1, 64) + "%"
}

// bytesOf writes a size for people.
func bytesOf(n int64) string {
	const unit = 1000
	if n < unit {
		return fmt.Sprintf("%d B", n)
	}
	value, prefix := float64(n)/unit, 0
	for value >= unit && prefix < 4 {
		value, prefix = value/unit, prefix+1
	}
	return fmt.Sprintf("%.1f %cB", value, "kMGTP"[prefix])
}

// ago is how long since t, roughly. What is ahead, by another machine's clock or because each of several changes in one second
// has a second of its own, is now.
func ago(t, now time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return max(0, now.Sub(t)).Round(time.Second).String() + " ago"
}

// printPlan tells first what becomes of the tags that were found, each counted once, and then what comes.
func printPlan(w io.Writer, p *topology.Plan) {
	fmt.Fprintf(w, "plan: %s here in %s: %d the same already, %d found only here, %d in conflict, %d out of date; to copy: %s here (%s), %d from here to the others\n",
		counted(p.Tags, "tag", "tags"), counted(p.Repositories, "repository", "repositories"),
		p.Same, p.Adopt, p.Conflicts, p.Tags-p.Same-p.Adopt-p.Conflicts, counted(p.Copy, "tag", "tags"), bytesOf(p.Bytes), p.Spread)
	for _, c := range p.Conflicting {
		kept := "is given up, since the policy is conflicts: log"
		if c.KeptAs != "" {
			kept = "is kept as " + c.Repository + ":" + c.KeptAs
		}
		fmt.Fprintf(w, "  conflict: %s:%s: %s of %s wins; %s of %s %s\n", c.Repository, c.Tag, short(c.Winner), c.WinnerRegion, short(c.Loser), c.LoserRegion, kept)
	}
	if more := p.Conflicts - len(p.Conflicting); more > 0 {
		fmt.Fprintf(w, "  and %s\n", counted(more, "conflict more", "conflicts more"))
	}
}

// short is a digest for people: enough of it to tell it from others.
func short(digest string) string {
	const enough = len("sha256:") + 12
	return digest[:min(enough, len(digest))]
}
