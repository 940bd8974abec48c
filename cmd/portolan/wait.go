package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"portolan/api"
	"portolan/topology"
)

func (a *app) wait() *cobra.Command {
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "wait REGISTRY/REPOSITORY:TAG[@DIGEST]",
		Short: "Wait until an image is pullable in every replica",
		Long: `Wait until an image can be pulled in every replica, for pipelines: push, wait, deploy.
The digest that is waited for is printed: the one given, or the first one that the tag is
seen with. A tag that exists nowhere yet is waited for too.

It fails at once when the image cannot be replicated to a replica at all, when the tag
has another digest, by now (superseded) or for all that is remembered of it, and when it
is deleted meanwhile. It says at once when an operator is waited for: a replica's plan
that has conflicts, or the guard. A replica that gets no clients, because it has not been
seeded yet or is being deleted, is not waited for, which is said where only an operator
can go on.`,
		Example: `  portolan wait contoso/team/app:1.2 --timeout 5m
  portolan wait contoso/team/app:1.2@sha256:6c3c624b58dbbcd3c0dd82b4c53f04194d1247c6eebdaab7c610cf7d66709b3b`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			w, err := parseWait(args[0])
			if err != nil {
				return err
			}
			if timeout <= 0 {
				return usagef("--timeout %v: want more than nothing", timeout)
			}
			if w.client, err = a.client(); err != nil {
				return err
			}
			found, err := a.await(cmd.Context(), w, timeout)
			if err != nil {
				return err
			}
			return a.print(found, func(io.Writer) {}) // the table form printed the digest already
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait")
	return cmd
}

// waiting is what is waited for.
type waiting struct {
	client               *api.Client
	registry, repository string
	// reference is the tag, or the digest where there is no tag.
	reference string
	// digest is what the tag must have; empty until it is known.
	digest string
	// seen is whether the tag was seen with the digest; missed how often in a row it certainly was not.
	seen   bool
	missed int
	// missing are the replicas, by region, that were still waited for at the last look, and why.
	missing []topology.Fault
}

// digests are those that registries must know; see the OCI image specification, descriptor.md, "Registered Algorithms".
var digests = regexp.MustCompile(`^(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})$`)

func parseWait(s string) (*waiting, error) {
	w := &waiting{}
	name, digest, _ := strings.Cut(s, "@")
	w.digest = digest
	registry, rest, ok := strings.Cut(name, "/")
	repository, tag, tagged := strings.Cut(rest, ":")
	if !ok || registry == "" || repository == "" || tagged && tag == "" || strings.Contains(tag, ":") || strings.HasSuffix(s, "@") {
		return nil, usagef("%q does not name an image: write REGISTRY/REPOSITORY:TAG[@DIGEST], such as contoso/team/app:1.2", s)
	}
	if digest != "" && !digests.MatchString(digest) {
		return nil, usagef("%q is not a digest: want sha256: and 64 hexadecimal digits, in lower case", digest)
	}
	w.registry, w.repository, w.reference = registry, repository, tag
	if !tagged {
		if digest == "" {
			return nil, usagef("%q has neither tag nor digest: write REGISTRY/REPOSITORY:TAG[@DIGEST]", s)
		}
		w.reference = digest
	}
	return w, nil
}

// await looks until the image is everywhere, or never will be.
func (a *app) await(ctx context.Context, w *waiting, timeout time.Duration) (api.Inspection, error) {
	bounded, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if w.digest != "" && a.output == "table" {
		fmt.Fprintln(a.stdout, w.digest)
	}
	last, state := "", "not looked at yet"
	var found api.Inspection
	for asking := ctx; ; asking = bounded { // the first look is had, whatever time it takes
		now, err := w.client.Inspect(asking, w.registry, w.repository, w.reference)
		done := false
		switch {
		case err == nil:
			found = now
			had := w.digest
			if done, state, err = w.judge(found); err != nil {
				return found, err
			}
			if had == "" && w.digest != "" && a.output == "table" {
				fmt.Fprintln(a.stdout, w.digest)
			}
		case ctx.Err() != nil:
			return found, ctx.Err()
		case (asking == ctx || bounded.Err() == nil) && vain(err, asking == ctx):
			return found, err
		case bounded.Err() == nil:
			state = err.Error()
		}
		if state != "" && state != last {
			a.progress("%s", state)
			last = state
		}
		if done {
			return found, nil
		}
		if bounded.Err() != nil {
			return found, &api.Error{Code: api.CodeTimeout, Message: fmt.Sprintf("not in every replica after %v: %s", timeout, state), Details: w.missing}
		}
		if err := sleep(ctx, poll); err != nil {
			return found, err
		}
	}
}

// judge says whether the image is everywhere, and in words how far it is and what does not go on by itself; an error, if it never will be
// everywhere.
func (w *waiting) judge(i api.Inspection) (done bool, state string, err error) {
	if i.Digest == "" && !w.seen && (w.digest == "" || i.Deleted.IsZero()) {
		return false, w.nowhere(i), nil
	}
	if w.digest == "" {
		w.digest = i.Digest
	}
	var waiting, apart []string
	w.missing = nil
	misses := func(region, why string) {
		w.missing = append(w.missing, topology.Fault{Path: region, Reason: cmp.Or(why, "it is not there yet")})
		if why != "" {
			region += " (" + why + ")"
		}
		waiting = append(waiting, region)
	}
	shown, unsure := false, false
	for _, r := range i.Replicas {
		shown = shown || r.Digest == w.digest && !r.Behind
		unsure = unsure || r.Error != "" && r.Excused == ""
		switch {
		case r.Excused != "" && !(r.Applied && r.Digest == w.digest):
			// Whoever needs it there waits for the replica: portolan replica wait.
			if r.Awaits != "" {
				apart = append(apart, fmt.Sprintf("%s (%s)", r.Region, r.Awaits))
			}
		case r.NotReplicable != "" && i.Digest == w.digest:
			return false, "", fmt.Errorf("%s:%s cannot be replicated to %s: %s", w.repository, w.reference, r.Region, r.NotReplicable)
		case r.Error != "":
			misses(r.Region, r.Error)
		case !r.Applied || r.Digest != w.digest:
			why := cmp.Or(r.Awaits, r.Failed)
			if r.Awaits == "" && r.Gone {
				why = "it is gone there; once that is confirmed, it is deleted everywhere"
			}
			misses(r.Region, why)
		}
	}
	if i.Digest == w.digest {
		w.seen, w.missed = true, 0
		var parts []string
		if len(waiting) > 0 {
			parts = append(parts, "waiting for "+strings.Join(waiting, ", "))
		}
		if len(apart) > 0 {
			parts = append(parts, "not waiting for "+strings.Join(apart, ", "))
		}
		return len(waiting) == 0 && len(i.Replicas) > 0, strings.Join(parts, "; "), nil
	}
	// The tag has another digest. Unless this one was its version a moment ago, its push may not have been noticed yet: then it is
	// under the tag in some region, other than by being late there, unless that region cannot be asked.
	w.missed++
	if shown || unsure {
		w.missed = 0
	}
	if w.seen || w.missed >= 2 {
		switch {
		case i.Digest == "":
			return false, "", fmt.Errorf("%s:%s was deleted", w.repository, w.reference)
		case !w.seen && !slices.Contains(i.Earlier, w.digest):
			return false, "", fmt.Errorf("%s:%s is %s: %s is not there in any replica, nor among the versions that are remembered of it: was it pushed under that tag?",
				w.repository, w.reference, i.Digest, w.digest)
		}
		return false, "", fmt.Errorf("superseded: %s:%s is %s by now", w.repository, w.reference, i.Digest)
	}
	return false, "the push is not noticed yet", nil
}

// nowhere says what there is of a tag that has no version: nothing, or what is not accounted for yet; and where nobody can tell.
func (w *waiting) nowhere(i api.Inspection) string {
	var there, unread []string
	w.missing = nil
	for _, r := range i.Replicas {
		switch {
		case r.Digest != "":
			why := "it is not noticed yet"
			switch {
			case r.NotReplicable != "":
				why = "its deletion cannot be carried out there: " + r.NotReplicable
			case r.Behind:
				why = "its deletion is on its way there"
			}
			there = append(there, fmt.Sprintf("%s (%s)", r.Region, cmp.Or(r.Awaits, r.Excused, r.Error, why)))
		case r.Error != "":
			unread = append(unread, fmt.Sprintf("%s (%s)", r.Region, r.Error))
			w.missing = append(w.missing, topology.Fault{Path: r.Region, Reason: r.Error})
		}
	}
	name, exists, blind := w.repository+":"+w.reference, "exists nowhere", ""
	if len(unread) > 0 {
		exists, blind = "is seen nowhere", "; cannot be read: "+strings.Join(unread, ", ")
	}
	switch {
	case len(there) > 0:
		return name + " is only in " + strings.Join(there, ", ") + blind
	case !i.Deleted.IsZero():
		return fmt.Sprintf("%s was deleted at %s, and %s: only a new push brings it back%s", name, i.Deleted.Format(time.RFC3339), exists, blind)
	}
	return name + " " + exists + " yet" + blind
}
