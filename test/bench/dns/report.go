//go:build linux

package main

import (
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"golang.org/x/sys/unix"
)

func sortLatencies(list []int64) { slices.Sort(list) }

// report writes the medians as Markdown. It fails if a server gave wrong answers: then its figures say nothing.
func report(out io.Writer, o options, servers []*server, all []figures) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n\nMedians of %d rounds; %d queries under way at the peak; %v for each phase.\n\n", machine(), o.rounds, o.window, o.duration)
	peer, floor := median(all[1].cpu), median(all[2].cpu)
	w := tabwriter.NewWriter(&text, 0, 0, 1, ' ', tabwriter.Debug)
	row := func(cells ...string) { fmt.Fprintf(w, "\t %s\t\n", strings.Join(cells, "\t ")) }
	row("server", "CPU ns/answer", "to gdnsd", "to the floor", "answers/s", "CPU ns at half", "lost below", "p50 µs at half", "p99 µs at half")
	row("---", "--:", "--:", "--:", "--:", "--:", "--:", "--:", "--:")
	for i, s := range servers {
		f := &all[i]
		cpu := median(f.cpu)
		row(s.name, fmt.Sprintf("%.0f", cpu), fmt.Sprintf("%.2f", cpu/peer), fmt.Sprintf("%.2f", cpu/floor), fmt.Sprintf("%.0f", median(f.rate)),
			fmt.Sprintf("%.0f", median(f.halfCPU)), fmt.Sprintf("%d of %d", f.lost, f.asked), fmt.Sprintf("%.0f", median(f.p50)), fmt.Sprintf("%.0f", median(f.p99)))
	}
	w.Flush()
	text.WriteString("\n")
	w = tabwriter.NewWriter(&text, 0, 0, 1, ' ', tabwriter.Debug)
	row("server", "p99 µs at a quarter", "beside a flood of as much", "start to first answer", "VmRSS settled", "VmHWM")
	row("---", "--:", "--:", "--:", "--:", "--:")
	for i, s := range servers {
		if f := &all[i]; s.dns {
			row(s.name, fmt.Sprintf("%.0f", median(f.quarter)), fmt.Sprintf("%.0f", median(f.flooded)), fmt.Sprintf("%.2f s", median(f.start)), fmt.Sprintf("%.0f MB", median(f.settled)), fmt.Sprintf("%.0f MB", median(f.highest)))
		}
	}
	w.Flush()
	same := 0
	for i, region := range all[0].answered {
		if region == all[1].answered[i] {
			same++
		}
	}
	fmt.Fprintf(&text, "\n%s and %s gave the same region to %d of %d subnets.\n", servers[0].name, servers[1].name, same, len(all[0].answered))
	for i, s := range servers {
		fmt.Fprintf(&text, "%s: CPU ns/answer in each round %.0f; the generator was held up %d times at half.\n", s.name, all[i].cpu, all[i].late)
	}
	if _, err := io.WriteString(out, text.String()); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	for i, s := range servers {
		if all[i].wrong > 0 {
			return fmt.Errorf("%s gave %d answers that are none", s.name, all[i].wrong)
		}
	}
	return nil
}

// machine is the shape of this machine, in one line.
func machine() string {
	model := "unknown processor"
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
				model = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	var name unix.Utsname
	_, _ = unix.Sysinfo(&info), unix.Uname(&name) // for show only
	return fmt.Sprintf("%d processors (%s), %.0f GB of memory, Linux %s, %s.",
		runtime.NumCPU(), model, float64(info.Totalram)*float64(info.Unit)/1e9, unix.ByteSliceToString(name.Release[:]), runtime.Version())
}
