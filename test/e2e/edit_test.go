package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
)

// A replica that is deleted gets no more clients, then leaves; its content stays. While something that was pushed there is nowhere
// else, it waits and says for what; by force it says what is lost.
func TestReplicaDelete(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope, southeastasia)
	s.serve("topology: " + s.write("topology.yaml", s.topology(s.regions()...)))
	s.ready(s.regions()...)
	s.leads(asia, "southeastasia")
	everywhere := s.push("southeastasia", "team/app:1", 8192, 2)
	o := s.cli("replica", "delete", "contoso/southeastasia")
	if o.code != 0 || !strings.Contains(o.stdout, "its content stays") {
		t.Fatal(o)
	}
	if _, err := s.replica("southeastasia"); err == nil {
		t.Error("it is still listed")
	}
	s.leads(asia, "westus") // which is nearer to Japan than westeurope
	for _, region := range s.regions() {
		if err := s.has(region, "team/app:1", everywhere); err != nil {
			t.Errorf("after the deletion: %v", err)
		}
	}
	// What is pushed there from now on is its own affair.
	s.push("southeastasia", "team/own:1", 4096, 1)
	s.arrives("team/next:1", s.push("westus", "team/next:1", 4096, 1), "westeurope")
	if err := s.has("westus", "team/own:1", ""); err != nil {
		t.Errorf("a deleted replica's push: %v", err)
	}

	// The last other replica is away: what is pushed to this one is nowhere else.
	if err := s.registries["westus"].Stop(); err != nil {
		t.Fatal(err)
	}
	s.push("westeurope", "team/only:1", 4096, 1)
	s.until("the push to be seen", func() error {
		r, err := s.replica("westus")
		if err == nil && *r.Pending == 0 {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	if o := s.cli("replica", "delete", "contoso/westeurope", "--no-wait"); o.code != 0 {
		t.Fatal(o)
	}
	s.until("the deletion to say what it waits for", func() error {
		r, err := s.replica("westeurope")
		if err == nil && (r.Status != "Deleting" || !strings.Contains(r.Reason, "team/only:1")) {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	o = s.cli("replica", "delete", "contoso/westeurope", "--force")
	if o.code != 0 || !strings.Contains(o.stdout+o.stderr, "team/only:1") {
		t.Errorf("by force, what is lost to the others should be named:\n%v", o)
	}
	if _, err := s.replica("westeurope"); err == nil {
		t.Error("it is still listed")
	}
	// The same at the first try.
	s.must("replica", "create", "contoso/westeurope", "--endpoint", s.registries["westeurope"].URL(), "--addresses", "127.0.2.1", "--timeout", "0s")
	s.until("the replica to be baselined", func() error {
		r, err := s.replica("westeurope")
		if err == nil && r.Replication.Phase != "baselined" {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	o = s.cli("replica", "delete", "contoso/westeurope", "--force")
	if o.code != 0 || !strings.Contains(o.stdout+o.stderr, "team/only:1") {
		t.Errorf("by force at once, what is lost to the others should be named:\n%v", o)
	}
	// The registry stands as it did.
	if o := s.cli("replica", "delete", "contoso/westus", "--force"); o.code != 1 || !strings.Contains(o.stderr, "home") {
		t.Errorf("the home replica:\n%v", o)
	}
}

// A registry that is deleted is answered no more, and loses nothing.
func TestRegistryDelete(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready("westus", "westeurope")
	digest := s.push("westus", "team/app:1", 4096, 1)
	s.arrives("team/app:1", digest, "westeurope")
	if o := s.cli("registry", "delete", "contoso"); o.code != 2 || !strings.Contains(o.stderr, "--yes") {
		t.Fatalf("without a word of consent:\n%v", o)
	}
	if a := s.dig(oneName, "A"); a.status != "NOERROR" {
		t.Fatalf("the name is gone: %s", a.text)
	}
	if o := s.cli("registry", "delete", "contoso", "--yes"); o.code != 0 || !strings.Contains(o.stdout, "content") || !strings.Contains(o.stderr, "NXDOMAIN") {
		t.Fatal(o)
	}
	s.until("the name to be gone", func() error {
		if a := s.dig(oneName, "A"); a.status != "NXDOMAIN" {
			return fmt.Errorf("%s", a.text)
		}
		return nil
	})
	if out := strings.TrimSpace(s.must("registry", "list", "-o", "json")); out != "[]" {
		t.Errorf("it is still listed: %s", out)
	}
	for _, region := range s.regions() {
		if err := s.has(region, "team/app:1", digest); err != nil {
			t.Error(err)
		}
	}
	if o := s.cli("registry", "delete", "contoso", "--yes"); o.code != 1 || !strings.Contains(o.stderr, "no registry") {
		t.Errorf("twice:\n%v", o)
	}
	// The same name, created anew over the same registries, finds everything equal.
	s.must("apply", "-f", s.path("topology.yaml"))
	s.ready("westus", "westeurope")
	if err := s.has("westeurope", "team/app:1", digest); err != nil {
		t.Error(err)
	}
	if tags := s.tags("westeurope"); !slices.Equal(tags, []string{"team/app:1"}) {
		t.Errorf("the tags are %v", tags)
	}
}

// What is exported can be applied, here and elsewhere, and makes no difference.
func TestExportAndApply(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope, southeastasia)
	s.serve()
	rich := strings.Replace(s.topology(s.regions()...), "    home: westus\n", `    home: westus
    names: [registry.contoso.com]
    policy: {all_down: "cname:status.contoso.com", merge: home}
    orders:
      country: {DE: [westeurope, westus]}
      prefix: {203.0.113.0/24: [southeastasia]}
    fences:
      continent: {EU: [westeurope, westus]}
`, 1)
	rich = strings.Replace(rich, "{region: westeurope,", "{region: westeurope, weight: 90, routing: disabled, location: [52.5, 5],", 1)
	file := s.write("topology.yaml", rich)
	if out := s.must("apply", "-f", file, "--dry-run"); !strings.Contains(out, "--dry-run") {
		t.Errorf("a dry run:\n%s", out)
	}
	if out := strings.TrimSpace(s.must("registry", "list", "-o", "json")); out != "[]" {
		t.Fatalf("a dry run applied something: %s", out)
	}
	if o := s.cli("diff", "-f", file); o.code != 1 || !strings.Contains(o.stdout, "westeurope/weight") {
		t.Errorf("the difference to nothing:\n%v", o)
	}
	s.must("apply", "-f", file)
	if o := s.cli("diff", "-f", file); o.code != 0 {
		t.Errorf("what was applied differs:\n%v", o)
	}
	if out := s.must("apply", "-f", file); !strings.Contains(out, "nothing to change") {
		t.Errorf("applied twice:\n%s", out)
	}
	exported := s.must("export")
	again := s.write("exported.yaml", exported)
	if o := s.cli("diff", "-f", again); o.code != 0 {
		t.Errorf("what was exported differs:\n%v\n%s", o, exported)
	}
	asJSON := s.write("exported.json", s.must("export", "-o", "json"))
	if o := s.cli("diff", "-f", asJSON); o.code != 0 {
		t.Errorf("what was exported as JSON differs:\n%v", o)
	}
	s.must("registry", "delete", "contoso", "--yes", "--force")
	s.must("apply", "-f", again)
	if out := s.must("export"); out != exported {
		t.Errorf("exported, applied and exported:\n%s\nwas\n%s", out, exported)
	}
	// On another server too, from standard input.
	other := newScene(t)
	other.serve("topology: " + again)
	if out := other.must("export"); out != exported {
		t.Errorf("at another server:\n%s\nwas\n%s", out, exported)
	}

	// A difference is one line of each key, and the exit code.
	changed := s.write("changed.yaml", strings.Replace(exported, "weight: 90", "weight: 80", 1))
	o := s.cli("diff", "-f", changed)
	if o.code != 1 || !strings.Contains(o.stdout, "registries/contoso/replicas/westeurope/weight") || !strings.Contains(o.stdout, "90") || !strings.Contains(o.stdout, "80") {
		t.Errorf("a difference:\n%v", o)
	}
	// A file with less in it takes nothing away, unless it is said so.
	less := s.write("less.yaml", s.topology("westus", "southeastasia"))
	s.must("apply", "-f", less)
	if _, err := s.replica("westeurope"); err != nil {
		t.Errorf("a replica was taken away: %v", err)
	}
	s.must("apply", "-f", less, "--prune")
	s.until("westeurope to be gone", func() error {
		if r, err := s.replica("westeurope"); err == nil {
			return fmt.Errorf("it is %+v", r)
		}
		return nil
	})
	if o := s.cli("diff", "-f", less); o.code != 0 {
		t.Errorf("after pruning:\n%v", o)
	}
}

// A check of a scene where all is well passes; of one where something is broken it fails, and says what and what to do.
func TestCheck(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready("westus", "westeurope")
	for _, region := range s.regions() { // so that each has sent an event
		tag := "team/" + region + ":1"
		s.arrives(tag, s.push(region, tag, 4096, 1), s.regions()...)
	}
	// A resolver that knows nothing of the zone but is one: the server itself.
	check := func(args ...string) outcome {
		return s.cli(append([]string{"check", "contoso", "--resolver", s.dns}, args...)...)
	}
	o := check()
	if o.code != 0 || strings.Contains(o.stdout, "fail") {
		t.Errorf("all is well:\n%v", o)
	}
	for _, part := range []string{"westus", "westeurope", "store", "zone geo.example.net", "database", "clients in", "events westus"} {
		if !strings.Contains(o.stdout, part) {
			t.Errorf("the check says nothing of %q:\n%v", part, o)
		}
	}
	var findings []struct {
		Level   string `json:"level"`
		Subject string `json:"subject"`
		Text    string `json:"text"`
	}
	if err := s.read(&findings, "check", "contoso", "--resolver", s.dns); err != nil || len(findings) < 5 {
		t.Errorf("as JSON: %v, %+v", err, findings)
	}

	s.registries["westeurope"].Kill()
	s.until("the check to fail", func() error {
		o = check()
		if o.code != 1 || !strings.Contains(o.stdout, "Unhealthy") {
			return fmt.Errorf("%v", o)
		}
		return nil
	})
	if !strings.Contains(o.stdout, "westeurope") || !strings.Contains(o.stdout, "sent elsewhere") {
		t.Errorf("what is broken:\n%v", o)
	}
	if o := s.cli("check", "fabrikam"); o.code != 1 || !strings.Contains(o.stderr, "fabrikam") {
		t.Errorf("a registry that there is not:\n%v", o)
	}
}
