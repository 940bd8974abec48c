// Command testlog reads the output of go test -json and prints what a person wants to see:
// a line for each package, all the output of what failed, and at the end what was skipped
// and why. It exits with 1 when something failed or nothing was read.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

// event is a line of go test -json: see "go doc test2json" and "go help buildjson".
type event struct {
	Action     string
	Package    string
	ImportPath string // of build output
	Test       string
	Output     string
}

// test names a test, or a package when name is empty.
type test struct{ pkg, name string }

func main() {
	ok, err := report(os.Stdin, os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "testlog:", err)
	}
	if !ok || err != nil {
		os.Exit(1)
	}
}

func report(in io.Reader, out io.Writer) (ok bool, err error) {
	output := map[test][]string{}
	skips := map[string][]string{} // reason to tests
	var passed, failed, packages int
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Fprintln(out, lines.Text()) // what go itself says, between its events
			continue
		}
		t := test{e.Package, e.Test}
		switch e.Action {
		case "build-output":
			fmt.Fprint(out, e.Output)
		case "output":
			output[t] = append(output[t], e.Output)
		case "pass":
			if e.Test != "" {
				passed++
			} else {
				packages++
				fmt.Fprint(out, summary(output[t]))
			}
			delete(output, t)
		case "skip":
			if e.Test != "" {
				reason := reason(output[t])
				skips[reason] = append(skips[reason], strings.TrimPrefix(e.Package, "portolan/")+" "+e.Test)
			}
			delete(output, t)
		case "fail":
			failed++
			if e.Test == "" {
				packages++
				// Tests that were running when the process died have no end of their own.
				for other, lines := range output {
					if other.pkg == e.Package && other.name != "" {
						fmt.Fprint(out, strings.Join(lines, ""))
						delete(output, other)
					}
				}
			}
			fmt.Fprint(out, strings.Join(output[t], ""))
			delete(output, t)
		}
	}
	if err := lines.Err(); err != nil {
		return false, fmt.Errorf("reading test events: %w", err)
	}
	if len(skips) > 0 {
		fmt.Fprintln(out, "\nskipped:")
		for _, reason := range slices.Sorted(maps.Keys(skips)) {
			fmt.Fprintf(out, "  %s\n", reason)
			for _, name := range skips[reason] {
				fmt.Fprintf(out, "      %s\n", name)
			}
		}
	}
	skipped := 0
	for _, names := range skips {
		skipped += len(names)
	}
	verdict := "ok"
	if failed > 0 || packages == 0 {
		verdict = "FAIL"
	}
	fmt.Fprintf(out, "\n%s: %d tests passed, %d failed, %d skipped in %d packages\n", verdict, passed, failed, skipped, packages)
	return verdict == "ok", nil
}

// summary returns the line that go test ends a package with.
func summary(output []string) string {
	for _, line := range slices.Backward(output) {
		if strings.HasPrefix(line, "ok ") {
			return line
		}
	}
	return ""
}

// reason returns what a test said when it skipped itself.
func reason(output []string) string {
	for _, line := range slices.Backward(output) {
		// "    file_test.go:12: the reason"
		_, rest, found := strings.Cut(line, ".go:")
		if _, text, ok := strings.Cut(rest, ": "); found && ok && strings.HasPrefix(line, "    ") {
			return strings.TrimSpace(text)
		}
	}
	return "no reason given"
}
