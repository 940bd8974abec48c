package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	containers "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"portolan/api"
	"portolan/daemon"
	"portolan/router"
	"portolan/test/bed"
	"portolan/topology"
)

// patience is how long tests wait for what must happen, however busy the machine is.
const patience = 2 * time.Minute

// world is a daemon in this process, before registries in this process.
type world struct {
	api       string
	addresses daemon.Addresses
	dir       string
	hosts     []string // of the registries
}

// newWorld starts a daemon with a registry "contoso" in the first two of three regions.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{dir: t.TempDir()}
	for range 3 {
		s := httptest.NewServer(containers.New(containers.Logger(log.New(io.Discard, "", 0))))
		t.Cleanup(s.Close)
		w.hosts = append(w.hosts, strings.TrimPrefix(s.URL, "http://"))
	}
	w.write(t, "topology.yaml", fmt.Sprintf(`registries:
  - name: contoso
    home: westus
    names: [registry.contoso.com]
    policy: {merge: home}
    replicas:
      - {region: westus, endpoint: "http://%s", addresses: [127.0.0.1]}
      - {region: westeurope, endpoint: "http://%s", addresses: [127.0.0.1]}
`, w.hosts[0], w.hosts[1]))
	file := w.write(t, "portolan.yaml", `store: bolt:portolan.db
dns: {listen: ["127.0.0.1:0"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}, ttl: {min: 1s, max: 1s}}
api: {listen: "127.0.0.1:0"}
events: {listen: "127.0.0.1:0"}
health: {interval: 200ms}
replication: {scan_interval: 1s}
topology: topology.yaml
`)
	config, err := daemon.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	w.run(t, config)
	return w
}

// run runs a daemon until the test ends.
func (w *world) run(t *testing.T, config daemon.Config) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	bound, ended := make(chan daemon.Addresses, 1), make(chan error, 1)
	logger := zaptest.NewLogger(t, zaptest.Level(zap.WarnLevel))
	go func() {
		ended <- daemon.Run(ctx, daemon.Options{Config: config, Version: "1.2.3", Log: logger, Bound: func(a daemon.Addresses) { bound <- a }})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Errorf("the daemon did not end in order: %v", err)
		}
	})
	select {
	case w.addresses = <-bound:
	case err := <-ended:
		ended <- nil
		t.Fatalf("the daemon did not start: %v", err)
	case <-time.After(patience):
		t.Fatal("the daemon does not answer")
	}
	w.api = "http://" + w.addresses.API.String()
}

func (w *world) write(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// portolan runs a command.
func (w *world) portolan(args ...string) (code int, stdout, stderr string) {
	var out, err bytes.Buffer
	code = run(context.Background(), append([]string{"--api", w.api}, args...), &out, &err)
	return code, out.String(), err.String()
}

// must runs a command that has to end with code, and returns what it wrote to standard output and error.
func (w *world) must(t *testing.T, code int, args ...string) (stdout, stderr string) {
	t.Helper()
	got, stdout, stderr := w.portolan(args...)
	if got != code {
		t.Fatalf("portolan %s ended with %d, want %d\n%s%s", strings.Join(args, " "), got, code, stdout, stderr)
	}
	return stdout, stderr
}

func (w *world) push(t *testing.T, host, reference string) (digest string) {
	t.Helper()
	image, err := random.Image(2000, 2)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(host+"/"+reference, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	d, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

func contains(t *testing.T, what, text string, want ...string) {
	t.Helper()
	for _, s := range want {
		if !strings.Contains(text, s) {
			t.Errorf("%s: no %q in\n%s", what, s, text)
		}
	}
}

// The life of a registry, by the commands alone.
func TestCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.must(t, 0, "replica", "wait", "contoso/westeurope", "--timeout", "30s")
	w.must(t, 0, "replica", "wait", "contoso/westus", "--timeout", "30s")

	out, _ := w.must(t, 0, "replica", "list", "contoso")
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 3 || !regexp.MustCompile(`^NAME +LOCATION +STATUS +HEALTH +ROUTING +WEIGHT +PENDING +REASON$`).MatchString(lines[0]) ||
		!regexp.MustCompile(`^contoso/westeurope +Amsterdam +Ready +Healthy +enabled +100 +0 +-$`).MatchString(lines[1]) {
		t.Errorf("replica list:\n%s", out)
	}
	out, _ = w.must(t, 0, "replica", "list", "-o", "json")
	var replicas []api.Replica
	if err := json.Unmarshal([]byte(out), &replicas); err != nil || len(replicas) != 2 || replicas[0].Status != topology.Ready {
		t.Errorf("replica list -o json: %v\n%s", err, out)
	}
	out, _ = w.must(t, 0, "registry", "show", "contoso", "-o", "yaml")
	contains(t, "registry show -o yaml", out, "fqdn: contoso.geo.example.net", "merge: home")

	// A push in one region is waited for in all.
	digest := w.push(t, w.hosts[0], "team/app:1.2")
	out, errout := w.must(t, 0, "wait", "contoso/team/app:1.2", "--timeout", "30s")
	if out != digest+"\n" {
		t.Errorf("wait printed %q, want %s; and said\n%s", out, digest, errout)
	}
	if out, _ := w.must(t, 0, "wait", "contoso/team/app:1.2@"+digest); out != digest+"\n" {
		t.Errorf("wait for a digest printed %q", out)
	}
	newer := w.push(t, w.hosts[1], "team/app:1.2")
	w.must(t, 0, "wait", "contoso/team/app:1.2@"+newer, "--timeout", "30s")
	_, errout = w.must(t, 1, "wait", "contoso/team/app:1.2@"+digest, "--timeout", "30s")
	contains(t, "wait for an old version", errout, "superseded: team/app:1.2 is "+newer)
	_, errout = w.must(t, 1, "wait", "contoso/team/none:1", "--timeout", "600ms")
	contains(t, "wait for nothing", errout, "team/none:1 exists nowhere yet")

	// Weights.
	out, _ = w.must(t, 0, "replica", "update", "contoso/westus", "--weight", "90")
	contains(t, "replica update", out, "+ registries/contoso/replicas/westus/weight: 90", "westus 90%, westeurope 10%")
	out, _ = w.must(t, 0, "replica", "update", "contoso/westus", "--weight", "0", "--over", "1h")
	contains(t, "replica update --over", out, "~ registries/contoso/replicas/westus/weight: 90 -> 0", "+ registries/contoso/replicas/westus/ramp: 90->0 20",
		"The weight of contoso/westus goes from 90 to 0 by ", "the shares are those at its end", "Then no more clients are sent to contoso/westus. The last answer")
	for _, args := range [][]string{{"replica", "list"}, {"replica", "show", "contoso/westus"}} {
		_, out, _ := w.portolan(args...)
		contains(t, strings.Join(args, " "), out, " 90 (to 0 by ")
	}
	err := bed.Until(t.Context(), patience, func(context.Context) error { // the server hears of the ramp soon
		if out, _ = w.must(t, 0, "status"); !strings.Contains(out, "contoso/westus has the weight 90, to 0 by ") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	_, errout = w.must(t, 2, "replica", "update", "contoso/westus", "--weight", "0", "--over", "1s")
	contains(t, "--over 1s", errout, "want a duration of 10s to 168h")
	out, _ = w.must(t, 0, "replica", "update", "contoso/westus", "--weight", "90")
	contains(t, "the end of a ramp", out, "- registries/contoso/replicas/westus/ramp: 90->0 20", "westus 90%, westeurope 10%")
	_, errout = w.must(t, 2, "replica", "update", "contoso/westus", "--weight", "101")
	contains(t, "weight 101", errout, "--weight 101: want a whole number from 0 to 100")
	_, errout = w.must(t, 2, "replica", "update", "contoso/westus", "--routing", "on")
	contains(t, "routing on", errout, `"on" is not known here: one of enabled, disabled`)

	w.must(t, 0, "replica", "update", "contoso/westeurope", "--routing", "disabled")
	_, errout = w.must(t, 1, "replica", "update", "contoso/westus", "--weight", "0")
	contains(t, "the last weight", errout, "clients of registry contoso would get no address", "--force")
	out, _ = w.must(t, 0, "replica", "update", "contoso/westus", "--weight", "0", "--force")
	contains(t, "the last weight by force", out, "Warning: clients nearest to westus get no address")
	w.must(t, 0, "replica", "update", "contoso/westus", "--weight", "90")
	w.must(t, 0, "replica", "update", "contoso/westeurope", "--routing", "enabled")

	// An empty value removes a setting.
	for flag, key := range map[string]string{"--location=1,2": "location: 1,2", "--probe=tcp": "health/probe: tcp"} {
		out, _ = w.must(t, 0, "replica", "update", "contoso/westeurope", flag)
		contains(t, flag, out, "+ registries/contoso/replicas/westeurope/"+key)
		name, _, _ := strings.Cut(flag, "=")
		out, _ = w.must(t, 0, "replica", "update", "contoso/westeurope", name, "")
		contains(t, name, out, "- registries/contoso/replicas/westeurope/"+key)
	}

	// Files.
	exported, _ := w.must(t, 0, "export")
	file := w.write(t, "export.yaml", exported)
	w.must(t, 0, "diff", "-f", file)
	changed := w.write(t, "changed.yaml", strings.Replace(exported, "weight: 90", "weight: 80", 1))
	out, _ = w.must(t, 1, "diff", "-f", changed)
	contains(t, "diff", out, "~ registries/contoso/replicas/westus/weight: 90 -> 80")
	out, _ = w.must(t, 0, "apply", "-f", changed, "--dry-run")
	contains(t, "apply --dry-run", out, "Clients of contoso would go", "westus 80%, westeurope 20%", "nothing was changed, nothing was deleted")
	less := w.write(t, "less.yaml", regexp.MustCompile(`(?s)      - region: westeurope\n.*?(      - region: |$)`).ReplaceAllString(exported, "$1"))
	out, _ = w.must(t, 0, "apply", "-f", less, "--prune", "--dry-run")
	contains(t, "apply --prune --dry-run", out, "Replica contoso/westeurope would be drained and then deleted", "nothing was changed, nothing was deleted")
	if out, _ = w.must(t, 0, "apply", "-f", less, "--dry-run"); strings.Contains(out, "Replica contoso/westeurope would") {
		t.Errorf("apply --dry-run without --prune deletes:\n%s", out)
	}
	w.must(t, 0, "diff", "-f", file)
	w.must(t, 0, "apply", "-f", changed)
	w.must(t, 0, "diff", "-f", changed)
	asJSON, _ := w.must(t, 0, "export", "-o", "json")
	w.must(t, 0, "diff", "-f", w.write(t, "changed.json", asJSON))
	_, errout = w.must(t, exitTrouble, "diff", "-f", w.write(t, "two.json", asJSON+asJSON))
	contains(t, "diff of two documents", errout, "two.json:")
	_, errout = w.must(t, 1, "apply", "-f", w.write(t, "bad.yaml", "registries:\n  - nmae: x\n"))
	contains(t, "apply of a bad file", errout, "bad.yaml:2:5:", `did you mean "name"?`, "   2 |   - nmae: x")

	// A third region comes and goes.
	w.must(t, 0, "replica", "create", "contoso/southeastasia", "--endpoint", "http://"+w.hosts[2], "--addresses", "127.0.0.1")
	w.must(t, 0, "replica", "wait", "contoso/southeastasia", "--timeout", "30s")
	// The table of distances to a new region is made after it was declared, beside everything else.
	err = bed.Until(t.Context(), patience, func(context.Context) error {
		if out, _ = w.must(t, 0, "explain", "contoso", "--ecs", "133.11.0.0/24"); !strings.Contains(out, "southeastasia: first choice") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "explain", out, "JP (AS)", "TTL:")
	_, errout = w.must(t, exitFailed, "explain", "nope")
	contains(t, "explain of no registry", errout, `there is no registry "nope"; there is contoso`)
	_, errout = w.must(t, 1, "replica", "create", "contoso/southeastasia", "--endpoint", "http://127.0.0.9:1", "--addresses", "127.0.0.9")
	contains(t, "replica create twice", errout, "already: portolan replica update contoso/southeastasia changes it")
	out, errout = w.must(t, 0, "replica", "delete", "contoso/southeastasia")
	contains(t, "replica delete", out+errout, "no more clients", "draining", "is deleted; its content stays")
	if n := strings.Count(errout, "no more clients"); n != 1 {
		t.Errorf("replica delete says %d times that no more clients are sent there:\n%s", n, errout)
	}
	_, errout = w.must(t, 1, "replica", "show", "contoso/southeastasia")
	contains(t, "replica show", errout, `no replica in "southeastasia"`)
	ref, err := name.ParseReference(w.hosts[2]+"/team/app:1.2", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Head(ref, remote.WithContext(t.Context())); err != nil {
		t.Errorf("the content of a deleted replica is gone: %v", err)
	}
	_, errout = w.must(t, 1, "replica", "delete", "contoso/westus")
	contains(t, "replica delete of the home", errout, "westus is the home region of registry contoso")

	out, _ = w.must(t, 0, "events", "token", "contoso/westus")
	contains(t, "events token", out, "/events/contoso/westus", "Authorization: [Bearer ", "actions: [pull]")
	err = bed.Until(t.Context(), patience, func(context.Context) error { // the server hears of the deletion soon
		if out, _ = w.must(t, 0, "status"); !strings.Contains(out, "keys that differ: 1\n") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "status", out, "Version:", "1.2.3", "dns, replicator", "geo.example.net.", "1 registry,", "Replicas of contoso:", "warning:  the store differs from ",
		"portolan apply -f ", "would change this", "- registries/contoso/replicas/westus/weight: 80\n")
	out, _ = w.must(t, 0, "check", "contoso", "--resolver", "127.0.0.1:1", "-o", "json")
	contains(t, "check", out, "authoritative over UDP and TCP", "goes to westeurope")
	_, errout = w.must(t, 1, "topology", "confirm", "contoso")
	contains(t, "topology confirm", errout, "nothing of registry contoso waits")
	out, _ = w.must(t, 0, "replica", "resync", "contoso/westeurope")
	contains(t, "replica resync", out, "contoso/westeurope: a new baseline was asked for")
	w.must(t, 0, "replica", "wait", "contoso/westeurope", "--timeout", "30s")

	w.must(t, 0, "replica", "wait", "contoso/westus", "--timeout", "30s")
	out, _ = w.must(t, 0, "replica", "accept", "contoso/westus")
	contains(t, "replica accept", out, "contoso/westus: nothing waits to be accepted")

	_, errout = w.must(t, 2, "registry", "create", "Fabrikam", "--home", "westus", "--endpoint", "http://"+w.hosts[2], "--addresses", "127.0.0.1")
	contains(t, "registry create", errout, `portolan: name: "Fabrikam" has upper-case letters`)
	out, _ = w.must(t, 0, "registry", "create", "fabrikam", "--home", "westus", "--endpoint", "http://"+w.hosts[2], "--addresses", "127.0.0.1", "--weight", "70")
	contains(t, "registry create", out, "fabrikam.geo.example.net", "70")
	w.must(t, 0, "replica", "wait", "fabrikam/westus", "--timeout", "30s")
	// A server of two registries is taken, with a warning, unless each has a prefix, or one does not replicate.
	const shared = "warning: northwind/westus is the same server as fabrikam/westus"
	for flag, warns := range map[string]bool{"--prefix=": true, "--prefix=team": true, "--replication=disabled": false} {
		_, errout = w.must(t, 0, "registry", "create", "northwind", "--home", "westus", "--endpoint", "http://"+w.hosts[2], "--addresses", "127.0.0.1", flag)
		if strings.Contains(errout, shared) != warns {
			t.Errorf("registry create %s on a server of another's: %q", flag, errout)
		}
		w.must(t, 0, "registry", "delete", "northwind", "--yes", "--force")
	}
	_, errout = w.must(t, 0, "replica", "create", "contoso/eastus", "--endpoint", "http://"+w.hosts[2], "--addresses", "127.0.0.1", "--timeout", "0")
	contains(t, "replica create on a server of another's", errout, "warning: contoso/eastus is the same server as fabrikam/westus")
	out, _ = w.must(t, 0, "replica", "show", "contoso/eastus", "--pending", "0")
	contains(t, "replica show", out, "Shared with:", "fabrikam/westus")
	w.must(t, 0, "replica", "delete", "contoso/eastus", "--force", "--no-wait")
	_, errout = w.must(t, 2, "registry", "delete", "fabrikam")
	contains(t, "registry delete without --yes", errout, "--yes is needed")
	w.must(t, 0, "registry", "show", "fabrikam")
	_, errout = w.must(t, 1, "registry", "delete", "fabricam", "--yes")
	contains(t, "registry delete of none", errout, `there is no registry "fabricam"`)
	out, errout = w.must(t, 0, "registry", "delete", "fabrikam", "--yes")
	contains(t, "registry delete", out+errout, "registry fabrikam is deleted", "fabrikam.geo.example.net is answered with NXDOMAIN", "in westus keep their content")
	out, _ = w.must(t, 0, "registry", "update", "contoso", "--max-lag", "10m", "--names", "registry.contoso.com,b.contoso.com")
	contains(t, "registry update", out, "+ registries/contoso/policy/max_lag: 10m", "~ registries/contoso/names: ", "Clients of contoso go")
	out, _ = w.must(t, 0, "registry", "update", "contoso", "--max-lag", "")
	contains(t, "registry update to the default", out, "- registries/contoso/policy/max_lag: 10m")
	_, errout = w.must(t, 2, "registry", "update", "contoso", "--replication", "on")
	contains(t, "replication on", errout, "policy.replication: ", "enabled, disabled")
	_, errout = w.must(t, 2, "registry", "update", "contoso")
	contains(t, "registry update of nothing", errout, "give at least one flag")
	_, errout = w.must(t, 1, "registry", "update", "contosso", "--home", "westeurope")
	contains(t, "registry update of none", errout, `there is no registry "contosso"`)
	out, _ = w.must(t, 0, "registry", "list")
	if strings.Contains(out, "fabrikam") || !strings.Contains(out, "contoso.geo.example.net") {
		t.Errorf("registry list:\n%s", out)
	}
}

func TestWrongUse(t *testing.T) {
	t.Parallel()
	w := &world{api: "http://127.0.0.1:1", dir: t.TempDir()}
	for _, c := range []struct {
		args string
		want string
	}{
		{"help repilca", `"repilca" is no command of portolan; did you mean "replica"?`},
		{"completion nonsense", `"nonsense" is no command of portolan completion`},
		{"repilca", `"repilca" is no command of portolan; did you mean "replica"?`},
		{"registry lst", `"lst" is no command of portolan registry; did you mean "list"?`},
		{"replica list --bogus", "unknown flag: --bogus\nSee"},
		{"explain contoso --esc 192.0.2.0/24", "unknown flag: --esc; did you mean \"--ecs\"?\nSee portolan explain --help"},
		{"status --outptu json", `did you mean "--output"?`},
		{"replica update contoso/westus --rout enabled", `did you mean "--routing"?`},
		{"replica update contoso/westus -w 90", "unknown shorthand flag: 'w' in -w; did you mean \"--weight\"?"},
		{"reg list", `"reg" is no command of portolan; did you mean "registry"?`},
		{"frobnicate", "\"frobnicate\" is no command of portolan\nSee portolan --help"},
		{"replica list a b", "\"b\" is one argument too many: want portolan replica list [REGISTRY]\nSee portolan replica list --help"},
		{"status all", "\"all\" is one argument too many: want portolan status\n"},
		{"replica show", "an argument is missing: want portolan replica show REGISTRY/REGION\nSee portolan replica show --help"},
		{"acme set contoso", "an argument is missing: want portolan acme set"},
		{"help replica lst", `"lst" is no command of portolan replica; did you mean "list"?`},
		{"replica shwo contoso/westus --pending 3", `"shwo" is no command of portolan replica; did you mean "show"?`},
		{"wait contoso/app:1 --timeout 5", "want a time with its unit"},
		{"serve --config nowhere.yaml", "reading the configuration: open nowhere.yaml: no such file or directory: name the configuration with --config FILE"},
		{"apply -f nowhere.yaml", "reading the topology: open nowhere.yaml"},
		{"status --token-file nowhere", "reading the API's token: open nowhere"},
		{"replica show contoso", "write REGISTRY/REGION"},
		{"replica create contoso/westus --endpoint http://x", "--addresses (or --hostname) is needed"},
		{"replica create contoso/westus --addresses 127.0.0.1", "--endpoint is needed"},
		{"replica create contoso/x --addresses 127.0.0.1 --endpoint http://x --location 1", "want latitude,longitude"},
		{"replica update contoso/westus", "give at least one flag"},
		{"replica update contoso/westus --over 30m", "--over 30m0s: says how long the weight takes to change: give --weight N with it, or --routing enabled"},
		{"replica update contoso/westus --routing disabled --over 30m", "give --weight N with it, or --routing enabled"},
		{"replica update contoso/westus --weight 5 --over soon", `"soon" for "--over" flag`},
		{"replica update contoso/westus --weight many", `"many" for "--weight" flag: want a whole number`},
		{"apply -f x --prune=maybe", "want true or false"},
		{"replica wait contoso/westus --timeout 0s", "want more than nothing"},
		{"registry create contoso", "--home is needed"},
		{"registry list -o xml", "want table, json or yaml"},
		{"apply", "-f is needed"},
		{"explain contoso", "who asks?"},
		{"check contoso --resolver foo", "--resolver \"foo\": want an IP address"},
		{"check contoso --ca missing.pem", "--ca: reading CA certificates: open missing.pem"},
		{"wait contoso", "does not name an image"},
		{"wait contoso/app", "neither tag nor digest"},
		{"wait contoso/app:", "does not name an image"},
		{"wait contoso/app:1@", "does not name an image"},
		{"wait contoso/app:1@abc", "is not a digest"},
		{"wait contoso/app:1@sha256:12", "is not a digest"},
		{"serve --role dsn", `did you mean "dns"?`},
		{"registry list --api 127.0.0.1", "is not the URL of an API"},
	} {
		code, _, stderr := w.portolan(strings.Fields(c.args)...)
		if code != exitUsage || !strings.Contains(stderr, c.want) {
			t.Errorf("portolan %s ended with %d and said %q, want %d and %q", c.args, code, stderr, exitUsage, c.want)
		}
	}
	code, _, stderr := w.portolan("registry", "list")
	if code != exitFailed || !strings.Contains(stderr, "nobody listens at http://127.0.0.1:1") {
		t.Errorf("without a server: %d %q", code, stderr)
	}
	for _, args := range []string{"diff -f " + w.write(t, "empty.yaml", "registries: []\n"), "diff -f nowhere.yaml", "diff"} {
		if code, _, stderr := w.portolan(strings.Fields(args)...); code != exitTrouble || stderr == "" {
			t.Errorf("portolan %s without a server: %d %q", args, code, stderr)
		}
	}
	code, _, stderr = w.portolan("serve", "--config", w.write(t, "p.yaml", "dsn: {}\n"))
	if code != exitFailed || !strings.Contains(stderr, `p.yaml:1:1: dsn: "dsn" is not known here; did you mean "dns"?`) {
		t.Errorf("serve with a bad file: %d %q", code, stderr)
	}
}

// Only the name itself is consent, and an interruption is heard while it is waited for.
func TestConfirm(t *testing.T) {
	t.Parallel()
	for typed, refused := range map[string]bool{"contoso\n": false, " contoso": false, "yes\n": true, "contoso2\n": true, "": true} {
		var asked strings.Builder
		err := (&app{stderr: &asked}).confirm(t.Context(), strings.NewReader(typed), "contoso")
		if (err != nil) != refused || !strings.Contains(asked.String(), "Type contoso") {
			t.Errorf("%q: %v after %q", typed, err, asked.String())
		}
	}
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	silent, end := io.Pipe()
	defer end.Close()
	if err := (&app{stderr: io.Discard}).confirm(ctx, silent, "contoso"); !errors.Is(err, context.Canceled) {
		t.Errorf("interrupted: %v", err)
	}
}

// What only one region has is told before a registry is deleted, and keeps it.
func TestDeleteRegistryWithPushesInOneRegion(t *testing.T) {
	t.Parallel()
	deleted := make(chan string, 2)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodDelete:
			deleted <- r.URL.RawQuery
			io.WriteString(w, `{}`)
		case strings.HasSuffix(r.URL.Path, "/unreplicated"):
			io.WriteString(w, `[{"region":"westus","reason":"1 push is in no other replica yet: contoso/app:1"}]`)
		default:
			io.WriteString(w, `{"name":"contoso","names":["registry.contoso.com"],"replicas":[{"region":"westus"},{"region":"westeurope"}]}`)
		}
	}))
	t.Cleanup(s.Close)
	w := &world{api: s.URL}
	_, errout := w.must(t, exitFailed, "registry", "delete", "contoso", "--yes")
	contains(t, "without --force", errout, "Stays in westus alone: 1 push is in no other replica yet: contoso/app:1", "--force")
	if len(deleted) > 0 || strings.Contains(errout, "NXDOMAIN") {
		t.Errorf("it was deleted, or is said to be:\n%s", errout)
	}
	out, errout := w.must(t, exitDone, "registry", "delete", "contoso", "--yes", "--force", "-o", "json")
	contains(t, "with --force", errout, "NXDOMAIN", "registry.contoso.com", "Stays in westus alone")
	contains(t, "with --force -o json", out, `"deleted": "contoso"`, `"reason": "1 push is`)
	if got := <-deleted; got != "force=true" {
		t.Errorf("the request: %q", got)
	}
}

// With a replica goes its place in orders and fences, which is said, since to create it again does not bring that back.
func TestDeleteReplicaThatRulesName(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, `{"registry": "contoso", "region": "attic", "status": "Deleting", "rules": ["fences/continent/EU", "orders/country/BR"]}`)
	}))
	t.Cleanup(s.Close)
	w := &world{api: s.URL}
	_, errout := w.must(t, exitDone, "replica", "delete", "contoso/attic", "--no-wait")
	contains(t, "replica delete", errout, "contoso/attic: it is named by fences/continent/EU, orders/country/BR, which will go on without it")
	out, _ := w.must(t, exitDone, "replica", "show", "contoso/attic", "--pending", "0")
	contains(t, "replica show", out, "Named by:", "fences/continent/EU, orders/country/BR")
}

// A rule that names a region without a replica is for the server to judge, which knows whether it stands there so already. What it refuses is
// told by its line.
func TestRulesWithoutAReplica(t *testing.T) {
	t.Parallel()
	answer := ""
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if answer != "" {
			w.WriteHeader(http.StatusBadRequest)
			io.WriteString(w, answer)
			return
		}
		io.WriteString(w, `{"changes": [], "unit": "cells", "registries": []}`)
	}))
	t.Cleanup(s.Close)
	w := &world{api: s.URL, dir: t.TempDir()}
	file := w.write(t, "t.yaml", `registries:
  - name: contoso
    home: westus
    orders: {country: {DE: [westus, attic], BR: [attic]}}
    replicas:
      - {region: westus, endpoint: "http://127.0.1.1:5000", addresses: [127.0.1.1]}
`)
	for command, refused := range map[string]int{"apply": exitFailed, "diff": exitTrouble, "simulate": exitFailed} {
		answer = ""
		_, errout := w.must(t, exitDone, command, "-f", file)
		contains(t, command, errout, "warning: taken, as the topology has it so already", "t.yaml:4:28: registries[0].orders.country.DE: names attic", ".country.BR: names attic")
		answer = `{"error": {"code": "invalid", "message": "x", "details": [{"path": "registries[0].orders.country.BR", "reason": "names attic"}, {"path": "registries[0].name", "reason": "is reserved"}]}}`
		_, errout = w.must(t, refused, command, "-f", file)
		contains(t, command+", refused", errout, "t.yaml:4:49: registries[0].orders.country.BR: names attic", "registries[0].name: is reserved")
		if strings.Contains(errout, "country.DE") || strings.Contains(errout, "warning") {
			t.Errorf("%s tells more than was refused:\n%s", command, errout)
		}
	}
}

// Programs get errors in the API's form, where they asked for a form, and people in words all the same.
func TestErrorsForPrograms(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/inspect") {
			io.WriteString(w, `{"digest":"sha256:a","replicas":[{"region":"x","digest":"sha256:a","applied":true},{"region":"east","error":"refused"},{"region":"west"}]}`)
			return
		}
		io.WriteString(w, `{"registry":"contoso","region":"x","status":"Syncing"}`)
	}))
	t.Cleanup(s.Close)
	w := &world{api: "http://127.0.0.1:1", dir: t.TempDir()}
	bad := w.write(t, "bad.yaml", "registries:\n  - nmae: x\n")
	for _, c := range []struct {
		args string
		exit int
		code api.Code // none: nothing is for programs
	}{
		{"registry list -o json", exitFailed, api.CodeUnavailable},
		{"registry lst -o json", exitUsage, api.CodeInvalid},
		{"registry list --bogus -o json", exitUsage, api.CodeInvalid},
		{"replica show -o json", exitUsage, api.CodeInvalid},
		{"apply -o json -f " + bad, exitFailed, api.CodeInvalid},
		{"diff -o json -f " + bad, exitTrouble, api.CodeInvalid},
		{"diff -o json -f " + w.dir, exitTrouble, api.CodeFailed},
		{"diff -o json", exitTrouble, api.CodeInvalid},
		{"wait contoso/app:1 --timeout 1ms -o json --api " + s.URL, exitFailed, api.CodeTimeout},
		{"replica wait contoso/x --timeout 1ms -o json --api " + s.URL, exitFailed, api.CodeTimeout},
		{"registry list --token-file " + w.dir + " -o json", exitFailed, api.CodeFailed},
		{"registry list", exitFailed, ""},
		{"registry list --bogus", exitUsage, ""},
	} {
		exit, stdout, stderr := w.portolan(strings.Fields(c.args)...)
		var f api.Failure
		if c.code == "" {
			if stdout != "" {
				t.Errorf("portolan %s wrote %q", c.args, stdout)
			}
			continue
		}
		if err := json.Unmarshal([]byte(stdout), &f); err != nil || f.Error == nil {
			t.Fatalf("portolan %s wrote %q: %v", c.args, stdout, err)
		}
		if exit != c.exit || f.Error.Code != c.code || !strings.HasSuffix(stderr, "portolan: "+f.Error.Message+"\n") {
			t.Errorf("portolan %s ended with %d and wrote %+v and %q", c.args, exit, f.Error, stderr)
		}
	}
	_, stdout, _ := w.portolan("registry", "list", "-o", "yaml")
	contains(t, "an error as YAML", stdout, "error:\n  code: unavailable\n")
	_, stdout, _ = w.portolan("wait", "contoso/app:1", "--timeout", "1ms", "-o", "yaml", "--api", s.URL)
	contains(t, "what was waited for", stdout, "  - path: east\n    reason: refused\n  - path: west\n    reason: it is not there yet\n")
}

// A fault of the program itself is told in a sentence.
func TestPanic(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	code := run(context.Background(), []string{"version"}, panicker{}, &out)
	if code != exitFailed || strings.Contains(out.String(), "goroutine") || !strings.Contains(out.String(), "a fault of the program") {
		t.Errorf("%d %q", code, out.String())
	}
}

type panicker struct{}

func (panicker) Write([]byte) (int, error) { panic("on purpose") }

// What replica wait cannot wait for, because it needs an operator.
func TestStuck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		replication *topology.Replication
		requests    []string
		want        string // part of the error; empty: none
	}{
		"new":           {nil, nil, ""},
		"being seeded":  {&topology.Replication{Phase: topology.PhaseUnknown}, nil, ""},
		"planned":       {&topology.Replication{Phase: topology.PhasePlanned, Plan: &topology.Plan{Conflicts: 1}}, nil, "portolan replica accept contoso/westus"},
		"accepted":      {&topology.Replication{Phase: topology.PhasePlanned, Plan: &topology.Plan{Conflicts: 1}}, []string{topology.RequestAccept}, ""},
		"held":          {&topology.Replication{Phase: topology.PhaseBaselined, Held: "30 of 40 tags are gone"}, nil, "until an operator decides: 30 of 40 tags are gone"},
		"held, decided": {&topology.Replication{Phase: topology.PhaseBaselined, Held: "30 of 40 tags are gone"}, []string{topology.RequestResync}, ""},
		"leaving":       {&topology.Replication{Phase: topology.PhaseBaselined}, []string{topology.RequestDelete}, "is being deleted"},
	} {
		err := (&app{stderr: io.Discard}).stuck(api.Replica{Registry: "contoso", Region: "westus", Replication: c.replication, Requests: c.requests})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// A plan is shown until it was carried out, and what it counts adds up.
func TestShowPlan(t *testing.T) {
	t.Parallel()
	plan := &topology.Plan{Repositories: 1, Tags: 8, Same: 3, Adopt: 1, Conflicts: 2, Copy: 4, Spread: 2, Bytes: 1500, Conflicting: []topology.PlannedConflict{{
		Repository: "app", Tag: "1", Winner: "sha256:0123456789abcdef", WinnerRegion: "westus", Loser: "sha256:fedcba9876543210", LoserRegion: "eastus", KeptAs: "1.conflict-eastus-1"}}}
	for phase, shown := range map[topology.Phase]bool{topology.PhasePlanned: true, topology.PhaseSeeding: true, topology.PhaseBaselined: false} {
		var b strings.Builder
		showReplica(&b, api.Replica{Replication: &topology.Replication{Phase: phase, Plan: plan}})
		const want = "plan: 8 tags here in 1 repository: 3 the same already, 1 found only here, 2 in conflict, 2 out of date; to copy: 4 tags here (1.5 kB), 2 from here to the others\n" +
			"  conflict: app:1: sha256:0123456789ab of westus wins; sha256:fedcba987654 of eastus is kept as app:1.conflict-eastus-1\n" +
			"  and 1 conflict more\n"
		if strings.Contains(b.String(), want) != shown || strings.Contains(b.String(), "plan:") != shown {
			t.Errorf("%s:\n%s", phase, b.String())
		}
	}
}

// What a replica cannot give and what it is still to get stand apart.
func TestPrintPending(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	printPending(&b, []api.PendingItem{{Image: "contoso/app:a", Since: time.Now(), Error: "500", Attempts: 3, NotReplicable: "500", Unreadable: true},
		{Image: "contoso/app:b", NotReplicable: "schema 1"}, {Image: "contoso/app:c", Since: time.Now(), Attempts: 1}})
	const want = "\nUNREADABLE HERE\tSINCE\tWHY\ncontoso/app:a\t0s ago\t500\n\nPENDING\tSINCE\tATTEMPTS\tWHY\n" +
		"contoso/app:b\t-\t0\tnot replicable: schema 1\ncontoso/app:c\t0s ago\t1\t-\n"
	if b.String() != want {
		t.Errorf("%q, want %q", b.String(), want)
	}
}

// Kept conflicts are listed with the way to get at them, by themselves and with a replica.
func TestKeptConflicts(t *testing.T) {
	t.Parallel()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch path := r.URL.Path; {
		case strings.HasSuffix(path, "/conflicts"):
			io.WriteString(w, `[{"repository":"team/app","tag":"1","region":"eastus","digest":"sha256:fedcba9876543210","kept_as":"1.conflict-eastus-1","until":"2030-01-02T00:00:00Z"}]`)
		case strings.HasSuffix(path, "/pending"):
			io.WriteString(w, `[]`)
		case strings.HasSuffix(path, "/replicas/eastus"):
			io.WriteString(w, `{"registry":"contoso","region":"eastus","replication":{"conflicts":1}}`)
		default:
			io.WriteString(w, `{"name":"contoso","names":["registry.contoso.com"]}`)
		}
	}))
	t.Cleanup(s.Close)
	w := &world{api: s.URL}
	for _, args := range []string{"conflict list contoso", "replica show contoso/eastus"} {
		out, _ := w.must(t, exitDone, strings.Fields(args)...)
		contains(t, args, out, "team/app:1", "1.conflict-eastus-1", "sha256:fedcba987654 ", "eastus", "2030-01-02", "docker pull registry.contoso.com/team/app:1.conflict-eastus-1")
		out, _ = w.must(t, exitDone, append(strings.Fields(args), "-o", "json")...)
		contains(t, args+" -o json", out, `"kept_as": "1.conflict-eastus-1"`, `"digest": "sha256:fedcba9876543210"`)
	}
}

// A command that waits goes on while the server is away, once it was there, or its store; and it ends when its time is over, whatever a server
// takes to answer.
func TestWaitsOutliveAServerAndAreBounded(t *testing.T) {
	t.Parallel()
	const ready, syncing = `{"registry":"contoso","region":"westus","status":"Ready"}`, `{"registry":"contoso","region":"westus","status":"Syncing"}`
	const here, nowhere = `{"digest":"sha256:a","replicas":[{"region":"x","digest":"sha256:a","applied":true}]}`, `{"digest":"","replicas":[{"region":"x"}]}`
	const planned = `{"digest":"sha256:a","replicas":[{"region":"x","digest":"sha256:a","applied":true},{"region":"y","awaits":"its plan waits","excused":"not seeded"}]}`
	away := func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `{"error":{"code":"unavailable","message":"the store is away"}}`)
	}
	says := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, text) }
	}
	silent := func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }
	for name, c := range map[string]struct {
		args    string
		answers []http.HandlerFunc // the last one again and again
		code    int
		stderr  string
	}{
		"replica, away for a moment":    {"replica wait contoso/westus --timeout 1m", []http.HandlerFunc{says(syncing), away, says(ready)}, exitDone, "the store is away"},
		"replica, away from the start":  {"replica wait contoso/westus --timeout 1m", []http.HandlerFunc{away, says(ready)}, exitDone, "the store is away"},
		"replica, no portolan":          {"replica wait contoso/westus --timeout 1m", []http.HandlerFunc{http.NotFound}, exitFailed, "is it one?"},
		"replica, silent":               {"replica wait contoso/westus --timeout 1s", []http.HandlerFunc{says(syncing), silent}, exitFailed, "contoso/westus is not Ready after 1s: Syncing, 0 pending"},
		"image, away for a moment":      {"wait contoso/app:1 --timeout 1m", []http.HandlerFunc{says(nowhere), away, says(here)}, exitDone, "the store is away"},
		"image, away from the start":    {"wait contoso/app:1 --timeout 1m", []http.HandlerFunc{away, says(here)}, exitDone, "the store is away"},
		"image, an operator waited for": {"wait contoso/app:1 --timeout 1m", []http.HandlerFunc{says(planned)}, exitDone, "not waiting for y (its plan waits)"},
		"image, no portolan":            {"wait contoso/app:1 --timeout 1m", []http.HandlerFunc{http.NotFound}, exitFailed, "is it one?"},
		"image, silent":                 {"wait contoso/app:1 --timeout 1s", []http.HandlerFunc{says(nowhere), silent}, exitFailed, "not in every replica after 1s: app:1 exists nowhere yet"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var asked atomic.Int64
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				c.answers[min(int(asked.Add(1)), len(c.answers))-1](w, r)
			}))
			t.Cleanup(s.Close)
			code, _, stderr := (&world{api: s.URL}).portolan(strings.Fields(c.args)...)
			if code != c.code || !strings.Contains(stderr, c.stderr) {
				t.Errorf("%d, want %d with %q:\n%s", code, c.code, c.stderr, stderr)
			}
		})
	}
}

// Whoever creates a replica at an endpoint that does not answer is told why there is no plan while it is waited for.
func TestCreateSaysWhatItWaitsFor(t *testing.T) {
	t.Parallel()
	const state = `{"registry":"contoso","region":"eastus","status":"Creating",`
	answers := []string{
		state + `"reason":"not served"}`,
		state + `"reason":"connection refused","replication":{"phase":"unknown"}}`,
		state + `"reason":"connection refused","replication":{"phase":"unknown"}}`,
		state + `"replication":{"phase":"planned","plan":{}}}`,
	}
	var asked atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, answers[min(int(asked.Add(1)), len(answers))-1])
	}))
	t.Cleanup(s.Close)
	_, errout := (&world{api: s.URL}).must(t, exitDone, "replica", "create", "contoso/eastus", "--endpoint", "http://127.0.0.9:1", "--addresses", "127.0.0.9")
	if want := "contoso/eastus is created; looking at what it holds\ncontoso/eastus: connection refused\n"; errout != want {
		t.Errorf("got %q, want %q", errout, want)
	}
}

// Weights that leave clients nowhere to go are said, not only shown.
func TestSharesThatAreNone(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	printShares(&b, []api.RegistryShares{{Registry: "contoso", Splits: []router.Split{{Nearest: "westus"}, {Nearest: "eastus", Shares: []router.Share{{Region: "eastus", Percent: 100}}}}}}, "go")
	if text := b.String(); !strings.Contains(text, "Warning: clients nearest to westus get no address") || strings.Contains(text, "nearest to eastus get") {
		t.Error(text)
	}
}

// What wait makes of each state, and when it gives up.
func TestJudge(t *testing.T) {
	t.Parallel()
	const a, b = "sha256:a", "sha256:b"
	in := func(region, digest string, applied bool) api.ReplicaInspection {
		return api.ReplicaInspection{Region: region, Digest: digest, Applied: applied}
	}
	late := func(region, digest string) api.ReplicaInspection {
		return api.ReplicaInspection{Region: region, Digest: digest, Behind: true}
	}
	type look struct {
		inspection api.Inspection
		want       string // "done" and part of the state, "error: part", or part of the state
	}
	all := func(digest string, replicas ...api.ReplicaInspection) api.Inspection {
		return api.Inspection{Digest: digest, Replicas: replicas}
	}
	had := func(earlier, digest string, replicas ...api.ReplicaInspection) api.Inspection {
		return api.Inspection{Digest: digest, Earlier: []string{earlier}, Replicas: replicas}
	}
	for name, c := range map[string]struct {
		digest string
		looks  []look
	}{
		"arrives":  {"", []look{{all(""), "exists nowhere yet"}, {all(a, in("x", a, true), in("y", "", false)), "waiting for y"}, {all(a, in("x", a, true), in("y", a, true)), "done"}}},
		"moves on": {"", []look{{all(a, in("x", a, true), in("y", "", false)), "waiting for y"}, {all(b, in("x", b, true), in("y", "", false)), "error: superseded: app:1 is sha256:b"}}},
		"behind":   {a, []look{{all(a, in("x", a, true), in("y", "", false)), "waiting for y"}, {all(b, in("x", a, false), in("y", b, true)), "error: superseded: app:1 is sha256:b"}}},
		"deleted":  {a, []look{{all(a, in("x", a, true), in("y", "", false)), "waiting for y"}, {all("", in("x", "", false), in("y", "", false)), "error: app:1 was deleted"}}},
		"deleted before": {"", []look{{api.Inspection{Deleted: time.Unix(0, 0).UTC(), Replicas: []api.ReplicaInspection{in("x", "", false)}}, "app:1 was deleted at 1970-01-01T00:00:00Z, and exists nowhere"},
			{all(a, in("x", a, true)), "done"}}},
		"that version deleted before": {a, []look{{api.Inspection{Deleted: time.Unix(0, 0), Replicas: []api.ReplicaInspection{in("x", "", false)}}, "not noticed"},
			{api.Inspection{Deleted: time.Unix(0, 0), Replicas: []api.ReplicaInspection{in("x", "", false)}}, "error: app:1 was deleted"}}},
		"nowhere that can be read": {"", []look{{all("", in("x", "", false), api.ReplicaInspection{Region: "y", Error: "401: wrong password"}), "app:1 is seen nowhere yet; cannot be read: y (401: wrong password)"}}},
		"deleted where it can be read": {"", []look{{api.Inspection{Deleted: time.Unix(0, 0).UTC(), Replicas: []api.ReplicaInspection{in("x", "", false), {Region: "y", Error: "401"}}},
			"app:1 was deleted at 1970-01-01T00:00:00Z, and is seen nowhere: only a new push brings it back; cannot be read: y (401)"}}},
		"not noticed, and one cannot be read": {"", []look{{all("", in("x", a, false), api.ReplicaInspection{Region: "y", Error: "401"}), "app:1 is only in x (it is not noticed yet); cannot be read: y (401)"}}},
		"that version nowhere":                {a, []look{{all("", in("x", "", false)), "exists nowhere yet"}, {all("", in("x", "", false)), "exists nowhere yet"}, {all("", in("x", "", false)), "exists nowhere yet"}}},
		"going":                               {"", []look{{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Gone: true}), "waiting for y (it is gone there; "}}},
		"only where nothing is decided": {"", []look{{all("", in("x", "", false), api.ReplicaInspection{Region: "y", Digest: a, Awaits: "its plan waits", Excused: "it has not been seeded yet"}),
			"app:1 is only in y (its plan waits)"}}},
		"deleted, but where it cannot be": {"", []look{{all("", in("x", "", false), api.ReplicaInspection{Region: "y", Digest: a, Behind: true, NotReplicable: "405"}),
			"app:1 is only in y (its deletion cannot be carried out there: 405)"}}},
		"deleted, but not there yet": {"", []look{{all("", in("x", "", false), late("y", a)), "app:1 is only in y (its deletion is on its way there)"}}},
		"the last copy failed":       {"", []look{{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Failed: "the blob is gone"}), "waiting for y (the blob is gone)"}}},
		"awaits":                     {"", []look{{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Awaits: "the guard holds it"}), "waiting for y (the guard holds it)"}}},
		"too late":                   {a, []look{{had(a, b, in("x", b, true), in("y", b, true)), "not noticed"}, {had(a, b, in("x", b, true), in("y", b, true)), "error: superseded"}}},
		"never there":                {a, []look{{had("sha256:c", b, in("x", b, true)), "not noticed"}, {had("sha256:c", b, in("x", b, true)), "error: app:1 is sha256:b: sha256:a is not there in any replica, nor among the versions"}}},
		"too early":                  {a, []look{{all(b, in("x", a, false), in("y", b, true)), "not noticed"}, {all(b, in("x", a, false), in("y", b, true)), "not noticed"}, {all(a, in("x", a, true), in("y", a, true)), "done"}}},
		"lagging":                    {a, []look{{had(a, b, late("x", a), in("y", b, true)), "not noticed"}, {had(a, b, late("x", a), in("y", b, true)), "error: superseded"}}},
		"unsure":                     {a, []look{{all(b, api.ReplicaInspection{Region: "x", Error: "down"}, in("y", b, true)), "not noticed"}, {all(b, api.ReplicaInspection{Region: "x", Error: "down"}, in("y", b, true)), "not noticed"}}},
		"cannot be":                  {"", []look{{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", NotReplicable: "schema 1"}), "error: cannot be replicated to y: schema 1"}}},
		"no clients": {"", []look{{all(a, in("x", "", false), api.ReplicaInspection{Region: "y", Error: "refused", Excused: "it is being deleted"}), "waiting for x"},
			{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Error: "refused", Excused: "it is being deleted"}), "done"}}},
		"no clients, and somebody is to decide": {"", []look{{all(a, in("x", "", false), api.ReplicaInspection{Region: "y", Awaits: "its plan waits", Excused: "not seeded"}), "waiting for x; not waiting for y (its plan waits)"},
			{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Awaits: "its plan waits", Excused: "not seeded"}), "done not waiting for y (its plan waits)"}}},
		"down": {"", []look{{all(a, in("x", a, true), api.ReplicaInspection{Region: "y", Error: "refused"}), "waiting for y (refused)"}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := &waiting{registry: "contoso", repository: "app", reference: "1", digest: c.digest}
			for i, l := range c.looks {
				done, state, err := w.judge(l.inspection)
				got := state
				if err != nil {
					got = "error: " + err.Error()
				} else if done {
					got = "done " + state
				}
				want, isError := strings.CutPrefix(l.want, "error: ")
				if !strings.Contains(got, want) || isError != (err != nil) || done != strings.HasPrefix(l.want, "done") {
					t.Fatalf("look %d: %q, want %q", i, got, l.want)
				}
			}
		})
	}
}
