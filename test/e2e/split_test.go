package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	consulapi "github.com/hashicorp/consul/api"

	"portolan/test/bed"
)

// replicas is where the replicas of contoso stand in Consul.
const replicas = "portolan/registries/contoso/replicas/"

// split is a scene whose roles are processes of their own, over a real Consul.
type split struct {
	*scene
	consul *bed.Consul
	front  *bed.Portolan
}

// newSplit starts registries, Consul and a front door. Commands go to the front door.
func newSplit(t *testing.T, sites ...site) *split {
	t.Helper()
	s := &split{consul: bed.NewConsul(t, bed.ConsulConfig{}), scene: newScene(t, sites...)}
	s.front, s.dns = s.door("front")
	s.api = s.front.API()
	return s
}

// door starts a front door, which votes by its name, and returns the address of its DNS as well.
func (s *split) door(name string) (*bed.Portolan, string) {
	s.t.Helper()
	api, dns := bed.NewAddress(s.t, "127.0.0.1"), bed.NewAddress(s.t, "127.0.0.1")
	return bed.NewPortolan(s.t, bed.PortolanConfig{Dir: s.path(name), API: api, Args: []string{"--role", "dns"}, Config: fmt.Sprintf(`store: consul://%s/portolan
data: data
dns:
  listen: ["%s"]
  zone: geo.example.net
  nameservers: {ns1: [127.0.0.1]}
  ttl: {min: 1s, max: 2s}
api: {listen: "%s"}
health: {interval: 300ms, voter: %s}
`, s.consul.Addr(), dns, api, name)}), dns
}

// replicator starts a replicator whose events listener is there.
func (s *split) replicator(name, events string) *bed.Portolan {
	s.t.Helper()
	api := bed.NewAddress(s.t, "127.0.0.1")
	return bed.NewPortolan(s.t, bed.PortolanConfig{Dir: s.path(name), API: api, Args: []string{"--role=replicator"}, Config: fmt.Sprintf(`store: consul://%s/portolan
data: data
api: {listen: "%s"}
events: {listen: "%s", key: %s}
`, s.consul.Addr(), api, events, s.path("events.key"))})
}

// kv edits Consul as an operator does, with its own command.
func (s *split) kv(args ...string) {
	s.t.Helper()
	if _, err := s.consul.Run(s.t.Context(), append([]string{"kv"}, args...)...); err != nil {
		s.t.Fatal(err)
	}
}

// declare writes all keys of the topology, one by one.
func (s *split) declare() {
	s.t.Helper()
	for _, p := range s.sites {
		s.kv("put", replicas+p.region+"/addresses", p.host)
		s.kv("put", replicas+p.region+"/endpoint", "http://"+p.host+":"+s.port)
	}
	s.kv("put", "portolan/registries/contoso/home", s.sites[0].region)
}

// Keys that are edited raw, in Consul, reach the answers; bad ones change nothing and are named; an edit that takes most of a
// registry away is held.
func TestEditsInConsulReachTheAnswers(t *testing.T) {
	t.Parallel()
	s := newSplit(t, southeastasia, westus, westeurope) // home is where "west" does not match
	s.replicator("replicator", s.events)
	s.declare()
	s.ready(s.regions()...)
	s.leads(europe, "westeurope")
	s.leads(asia, "southeastasia")

	client, err := s.consul.Client()
	if err != nil {
		t.Fatal(err)
	}
	put := func(key, value string) {
		t.Helper()
		if _, err := client.KV().Put(&consulapi.KVPair{Key: key, Value: []byte(value)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	// How long an edit takes from Consul's answer to the first answer that heeds it, by asking without a pause.
	var latencies []time.Duration
	for i := range 60 {
		want, weight := "westus", "0"
		if i%2 == 1 {
			want, weight = "westeurope", "100"
		}
		put(replicas+"westeurope/weight", weight)
		edited := time.Now()
		s.until("the weight to be in the answers", func() error {
			for time.Since(edited) < patience {
				if got, err := s.ask(s.dns, europe); err != nil || got == want {
					return err
				}
			}
			return fmt.Errorf("the weight of westeurope is %s, and clients there are not led to %s", weight, want)
		})
		latencies = append(latencies, time.Since(edited))
	}
	slices.Sort(latencies)
	t.Logf("from Consul's answer to a weight edit until DNS answers by it, %d edits: least %v, median %v, nine tenths %v, most %v",
		len(latencies), latencies[0], latencies[len(latencies)/2], latencies[len(latencies)*9/10], latencies[len(latencies)-1])

	// Values that are none: the last good one holds, and the status names the key, the value and the reason.
	for key, value := range map[string]string{"weight": "101", "endpoint": "not a URL", "addresses": "127.0.2.1.7", "routing": "maybe", "location": "99,0"} {
		good, _, err := client.KV().Get(replicas+"westeurope/"+key, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.kv("put", replicas+"westeurope/"+key, value)
		s.until("the status to name the bad value of "+key, func() error {
			var st status
			if err := s.read(&st, "status"); err != nil {
				return err
			}
			for _, p := range st.Topology.Problems {
				if p.Key == "registries/contoso/replicas/westeurope/"+key && p.Value == value && p.Reason != "" && p.Effect != "" {
					return nil
				}
			}
			return fmt.Errorf("the problems are %+v", st.Topology.Problems)
		})
		if got, err := s.led(europe); err != nil || got != "westeurope" {
			t.Errorf("a bad %s moved clients to %s: %v", key, got, err)
		}
		if good == nil {
			s.kv("delete", replicas+"westeurope/"+key)
		} else {
			put(good.Key, string(good.Value))
		}
		s.until("the problem to be gone", func() error {
			var st status
			if err := s.read(&st, "status"); err != nil || len(st.Topology.Problems) == 0 {
				return err
			}
			return fmt.Errorf("the problems are %+v", st.Topology.Problems)
		})
	}

	// One edit, as it is easily made, takes two of three replicas away: they stay until somebody confirms.
	held := func(missing ...string) {
		t.Helper()
		s.until("the guard to hold "+strings.Join(missing, " and "), func() error {
			var st status
			if err := s.read(&st, "status"); err != nil {
				return err
			}
			var got []string
			for _, h := range st.Topology.Held {
				got = append(got, h.Missing...)
			}
			if !slices.Equal(got, missing) {
				return fmt.Errorf("held is %+v", st.Topology.Held)
			}
			return nil
		})
	}
	stay := func(when string) {
		t.Helper()
		for subnet, region := range map[string]string{america: "westus", europe: "westeurope", asia: "southeastasia"} {
			if got, err := s.led(subnet); err != nil || got != region {
				t.Errorf("%s is led to %s %s: %v", subnet, got, when, err)
			}
		}
		for _, region := range s.regions() {
			if out := s.must("replica", "show", "contoso/"+region); !strings.Contains(out, "Ready") {
				t.Errorf("%s:\n%s", when, out)
			}
		}
	}
	s.kv("delete", "-recurse", replicas+"west")
	held("westeurope", "westus")
	stay("while the edit is held")
	// What is exported takes it back, as if nothing had been.
	s.must("apply", "-f", s.write("back.yaml", s.must("export")))
	held()
	stay("after it was taken back")

	s.kv("delete", "-recurse", replicas+"west")
	held("westeurope", "westus")
	if out := s.must("topology", "confirm", "contoso"); !strings.Contains(out, "westeurope, westus") {
		t.Errorf("what was confirmed is not said: %s", out)
	}
	s.leads(america, "southeastasia")
	s.leads(europe, "southeastasia")
	if o := s.cli("topology", "confirm", "contoso"); o.code != 1 || !strings.Contains(o.stderr, "nothing of registry contoso waits to be confirmed") {
		t.Errorf("confirming twice:\n%v", o)
	}
}

// Consul stops: names are answered, health goes on, a front door starts from its last good topology; Consul comes back: edits
// arrive again, and so does what was pushed meanwhile.
func TestConsulGoesAndComesBack(t *testing.T) {
	t.Parallel()
	s := newSplit(t, westus, westeurope)
	replicator := s.replicator("replicator", s.events)
	s.declare()
	s.ready(s.regions()...)
	s.leads(america, "westus")
	s.leads(europe, "westeurope")

	s.consul.Kill()
	for subnet, region := range map[string]string{america: "westus", europe: "westeurope"} {
		if got, err := s.led(subnet); err != nil || got != region {
			t.Errorf("without Consul %s is led to %s: %v", subnet, got, err)
		}
	}
	s.until("the status to say that the store is away", func() error {
		var st status
		if err := s.read(&st, "status"); err != nil {
			return err
		}
		if st.Store.Error == "" || !st.Ready {
			return fmt.Errorf("it is %+v", st)
		}
		return nil
	})
	// An edit now is refused with the reason, soon, and not lost silently.
	if o := s.cli("replica", "update", "contoso/westus", "--weight", "10"); o.code != 1 || !strings.Contains(o.stderr, "store") {
		t.Errorf("an edit without a store:\n%v", o)
	}
	// Health needs no Consul.
	if err := s.registries["westus"].Stop(); err != nil {
		t.Fatal(err)
	}
	s.leads(america, "westeurope")
	if err := s.registries["westus"].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.leads(america, "westus")

	// A front door that starts now, after an orderly end and after none, answers from what it knew.
	for name, end := range map[string]func(){"SIGTERM": func() {
		if err := s.front.Stop(); err != nil {
			t.Fatal(err)
		}
	}, "SIGKILL": s.front.Kill} {
		end()
		began := time.Now()
		if err := s.front.Start(t.Context()); err != nil {
			t.Fatalf("starting the front door without Consul after %s: %v", name, err)
		}
		t.Logf("a front door without Consul is ready %v after its start (after %s)", time.Since(began).Round(time.Millisecond), name)
		for subnet, region := range map[string]string{america: "westus", europe: "westeurope"} {
			if got, err := s.ask(s.dns, subnet); err != nil || got != region {
				t.Errorf("started without Consul after %s, %s is led to %s: %v", name, subnet, got, err)
			}
		}
	}
	// The replicator waits; it does not end.
	meanwhile := s.push("westus", "team/meanwhile:1", 8192, 2)
	if !replicator.Running() {
		t.Fatalf("the replicator ended without Consul: %s", replicator.LogTail())
	}

	if err := s.consul.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.kv("put", replicas+"westus/weight", "0")
	s.leads(america, "westeurope")
	s.kv("put", replicas+"westus/weight", "100")
	s.leads(america, "westus")
	s.arrives("team/meanwhile:1", meanwhile, s.regions()...)
	s.ready(s.regions()...)
	for _, region := range s.regions() {
		if tags := s.tags(region); !slices.Equal(tags, []string{"team/meanwhile:1"}) {
			t.Errorf("%s has %v", region, tags)
		}
	}
}

// Consul loses its data while the front door and the replicator run: what was known stays, no edit ends it, and it is given back.
func TestConsulLosesItsData(t *testing.T) {
	t.Parallel()
	s := newSplit(t, westus, westeurope)
	s.replicator("replicator", s.events)
	s.declare()
	s.ready(s.regions()...)
	s.kv("put", replicas+"westeurope/weight", "0")
	s.leads(europe, "westus")
	s.consul.Kill()
	if err := s.consul.Wipe(); err != nil {
		t.Fatal(err)
	}
	if err := s.consul.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.until("the status to say what to do", func() error {
		if o := s.cli("status"); !strings.Contains(o.stdout, "portolan export | portolan apply -f -") {
			return fmt.Errorf("%v", o)
		}
		return nil
	})
	for _, edit := range [][]string{{"replica", "update", "contoso/westus", "--weight", "10"}, {"registry", "update", "contoso", "--max-lag", "1h"}} {
		if o := s.cli(edit...); o.code != 1 || !strings.Contains(o.stderr, "portolan export | portolan apply -f -") {
			t.Errorf("%v:\n%v", edit, o)
		}
	}
	exported := s.cli("export")
	if exported.code != 0 {
		t.Fatal(exported)
	}
	file, part := s.path("served.yaml"), s.path("part.yaml")
	for name, text := range map[string]string{file: exported.stdout, part: regexp.MustCompile(`(?s)      - region: westeurope\n.*?(      - region: |$)`).ReplaceAllString(exported.stdout, "$1")} {
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if o := s.cli("apply", "-f", part); o.code != 1 || !strings.Contains(o.stderr, "contoso/westeurope, which would be gone") {
		t.Errorf("applying a part:\n%v", o)
	}
	if o := s.cli("apply", "-f", file); o.code != 0 || !strings.Contains(o.stdout, "has them again") || strings.Contains(o.stdout, "registries/contoso") {
		t.Fatal(o)
	}
	s.until("the store to be read again", func() error {
		var st status
		if err := s.read(&st, "status"); err != nil || st.Store.Error != "" {
			return fmt.Errorf("%+v, %v", st.Store, err)
		}
		return nil
	})
	s.leads(europe, "westus")
	s.kv("put", replicas+"westeurope/weight", "100")
	s.leads(europe, "westeurope")
	digest := s.push("westus", "team/after:1", 4096, 1)
	s.arrives("team/after:1", digest, s.regions()...)
}

// A front door and a replicator that never saw Consul: neither invents an empty world, both take it up when it comes.
func TestStartsBeforeConsul(t *testing.T) {
	t.Parallel()
	consul := bed.NewConsul(t, bed.ConsulConfig{})
	s := newScene(t, westus)
	consul.Kill()
	for _, role := range []string{"dns", "replicator"} {
		s.api, s.dns = bed.NewAddress(t, "127.0.0.1"), bed.NewAddress(t, "127.0.0.1")
		d := start(t, s.path(role), fmt.Sprintf(`store: consul://%s/portolan
data: data
roles: [%s]
dns: {listen: ["%s"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}}
api: {listen: "%s"}
`, consul.Addr(), role, s.dns, s.api))
		s.until(role+" to say that it is not ready, and why", func() error {
			code, text := s.get("/readyz")
			if code != http.StatusServiceUnavailable || !strings.Contains(text, "consul://"+consul.Addr()) {
				return fmt.Errorf("%d %s", code, text)
			}
			return nil
		})
		if code, text := s.get("/healthz"); code != http.StatusOK {
			t.Errorf("%s without Consul is alive, and /healthz says %d %s", role, code, text)
		}
		select {
		case <-d.ended:
			t.Fatalf("%s ended: %s", role, d.stderr())
		default:
		}
		if role == "dns" {
			if _, err := s.ask(s.dns, america); err == nil {
				t.Error("a front door that knows nothing answers")
			}
		}
		if err := consul.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.until(role+" to be ready", func() error {
			if code, text := s.get("/readyz"); code != http.StatusOK {
				return errors.New(text)
			}
			return nil
		})
		if code := d.stop(); code != 0 {
			t.Errorf("%s ended with %d: %s", role, code, d.stderr())
		}
		consul.Kill()
	}
}

// The leading replicator is killed; the standby takes over, and what was pushed meanwhile is everywhere. Then the other way.
func TestAStandbyReplicatorTakesOver(t *testing.T) {
	t.Parallel()
	s := newSplit(t, westus, westeurope, southeastasia.with(debian))
	first := s.replicator("first", s.events)
	s.declare()
	s.ready(s.regions()...)
	second := s.replicator("second", s.standby)
	digest := s.push("westus", "team/before:1", 16<<10, 2)
	s.arrives("team/before:1", digest, s.regions()...)

	for i, leader := range []*bed.Portolan{first, second} {
		leader.Kill()
		killed := time.Now()
		want := map[string]string{}
		for _, region := range s.regions() {
			image := fmt.Sprintf("team/%s:%d", region, i)
			want[image] = s.push(region, image, 64<<10, 3)
		}
		for image, digest := range want {
			s.arrives(image, digest, s.regions()...)
		}
		t.Logf("pushes made when the leader was killed are everywhere %v after that", time.Since(killed).Round(time.Millisecond))
		if err := leader.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	s.ready(s.regions()...)
	for _, region := range s.regions() {
		if tags := s.tags(region); len(tags) != 7 {
			t.Errorf("%s should have 7 tags and no conflicts, and has %v", region, tags)
		}
	}
}

// Three front doors over one Consul vote: each hears the others, and says so.
func TestFrontDoorsVote(t *testing.T) {
	t.Parallel()
	s := newSplit(t, westus, westeurope)
	s.declare()
	s.door("second")
	s.door("third")
	s.until("three servers to vote that both replicas are up", func() error {
		var st struct {
			Voters []struct {
				Name  string `json:"name"`
				Self  bool   `json:"self"`
				Fresh bool   `json:"fresh"`
				Up    int    `json:"up"`
			} `json:"voters"`
		}
		if err := s.read(&st, "status"); err != nil {
			return err
		}
		if v := st.Voters; len(v) != 3 || !v[0].Self || v[1].Name != "second" || v[2].Name != "third" || !v[1].Fresh || !v[2].Fresh || v[0].Up+v[1].Up+v[2].Up != 6 {
			return fmt.Errorf("it is %+v", v)
		}
		return nil
	})
	if err := s.registries["westeurope"].Stop(); err != nil {
		t.Fatal(err)
	}
	s.until("all three to find one down", func() error {
		o := s.cli("replica", "show", "contoso/westeurope")
		if n := strings.Count(o.stdout, "Unhealthy  Unhealthy"); n != 3 {
			return fmt.Errorf("%d do:\n%v", n, o)
		}
		return nil
	})
}
