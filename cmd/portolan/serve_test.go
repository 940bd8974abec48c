package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"portolan/api"
	"portolan/test/bed"
)

// asProgram makes the test binary the program itself, where a test needs a process.
const asProgram = "PORTOLAN_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// What serve --check says is its output, and it looks into the topology file.
func TestServeCheck(t *testing.T) {
	t.Parallel()
	w := &world{dir: t.TempDir()}
	const good = "registries:\n  - name: contoso\n    home: westus\n    replicas: [{region: westus, endpoint: \"http://x\", addresses: [192.0.2.1]}]\n"
	file := w.write(t, "p.yaml", "store: bolt:portolan.db\ntopology: topology.yaml\ngeo: {database: city.mmdb}\ndns: {zone: geo.example.net, nameservers: {ns1: [192.0.2.53]}}\n")
	topology := w.write(t, "topology.yaml", good)
	stdout, stderr := w.must(t, exitDone, "serve", "--check", "--config", file)
	database := filepath.Join(w.dir, "city.mmdb")
	if want := file + ": nothing is wrong with it\n" + topology + ": nothing is wrong with it\n" + database + ": is not on this machine, so it was not looked at; serve needs it\n"; stdout != want || stderr != "" {
		t.Errorf("%q and %q, want %q", stdout, stderr, want)
	}
	stdout, _ = w.must(t, exitDone, "serve", "--check", "--config", file, "-o", "json")
	contains(t, "serve --check -o json", stdout, `"files": [`, `"`+topology+`"`, `"absent": [`)
	w.write(t, "city.mmdb", "no database")
	_, stderr = w.must(t, exitFailed, "serve", "--check", "--config", file)
	contains(t, "serve --check", stderr, "geo.database: ", database)
	w.write(t, "topology.yaml", strings.ReplaceAll(good, "westus", "ns1"))
	_, stderr = w.must(t, exitFailed, "serve", "--check", "--config", file)
	contains(t, "serve --check", stderr, topology+":4:16", `the name "ns1" is reserved`)
}

// A reader of the log that goes away, as head does, does not take the daemon with it.
func TestLogIsReadNoMore(t *testing.T) {
	t.Parallel()
	w := &world{dir: t.TempDir()}
	address := bed.NewAddress(t, "127.0.0.1")
	w.write(t, "zone.db", "www A 192.0.2.1\n")
	file := w.write(t, "portolan.yaml", fmt.Sprintf(`store: bolt:portolan.db
dns: {listen: ["127.0.0.1:0"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}, static: zone.db}
api: {listen: %q}
`, address))
	read, written, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "serve", "--config", file)
	cmd.Env, cmd.Stderr = append(os.Environ(), asProgram+"=1"), written
	err = cmd.Start()
	written.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()

	client, err := api.NewClient("http://"+address, "")
	if err != nil {
		t.Fatal(err)
	}
	warned := func(part string) func(context.Context) error {
		return func(ctx context.Context) error {
			s, err := client.Status(ctx)
			if err == nil && !(s.Ready && strings.Contains(strings.Join(s.Warnings, "\n"), part)) {
				err = fmt.Errorf("%+v", s)
			}
			return err
		}
	}
	if err := bed.Until(t.Context(), patience, warned("")); err != nil {
		t.Fatal(err)
	}
	read.Close()
	w.write(t, "zone.db", "www A nowhere\n")
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	// A fault that the status has was logged before.
	if err := bed.Until(t.Context(), patience, warned(filepath.Join(w.dir, "zone.db"))); err != nil {
		t.Fatal(err)
	}
	// A repetition in the same moment is no second wish. Two signals of one kind might arrive as one.
	for _, s := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("it did not end in order: %v", err)
	}
}
