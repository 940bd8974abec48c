package e2e

import (
	"fmt"
	"strconv"
	"strings"
	"testing"

	"portolan/test/bed"
)

// A replica that gets clients again little by little goes on with that after the server was killed, and gets all of them.
func TestRampOfOneServer(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	portolan := s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready(s.regions()...)
	s.must("replica", "update", "contoso/westeurope", "--routing", "disabled")
	s.leads(europe, "westus")
	s.must("replica", "update", "contoso/westeurope", "--routing", "enabled", "--over", "10s")
	weight := func(least int) func() error {
		return func() error {
			r, err := s.replica("westeurope")
			if err == nil && *r.Weight < least {
				err = fmt.Errorf("it is %d", *r.Weight)
			}
			if err == nil && *r.Weight < 100 && (r.Ramp == nil || r.Ramp.To != 100) {
				t.Errorf("it stands at %d, with the ramp %v", *r.Weight, r.Ramp)
			}
			return err
		}
	}
	s.until("the weight to rise", weight(1))
	if o := s.cli("diff", "-f", s.path("topology.yaml")); o.code != 0 {
		t.Errorf("a ramp is a difference to the file:\n%v", o)
	}
	portolan.Kill()
	if err := portolan.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.until("the weight to be whole", weight(100))
	s.leads(europe, "westeurope")
	if out := s.must("replica", "show", "contoso/westeurope"); strings.Contains(out, "(to ") {
		t.Errorf("a ramp at its end is still shown:\n%s", out)
	}
}

// Of two front doors one raises a weight; when it is killed the other goes on. The weight never goes back, and both answer by it.
func TestRampOutlivesItsOwner(t *testing.T) {
	t.Parallel()
	s := newSplit(t, westus, westeurope)
	other, dns := s.door("other")
	s.kv("put", "portolan/registries/contoso/policy/replication", "disabled")
	s.kv("put", replicas+"westeurope/weight", "0")
	s.declare()
	client, err := s.consul.Client()
	if err != nil {
		t.Fatal(err)
	}
	highest := 0
	// reaches looks at the stored weight until it is at least that.
	reaches := func(least int) {
		t.Helper()
		s.until(fmt.Sprintf("the weight %d", least), func() error {
			p, _, err := client.KV().Get(replicas+"westeurope/weight", nil)
			if err != nil {
				return err
			}
			weight, err := strconv.Atoi(string(p.Value))
			if err != nil || weight < highest {
				t.Fatalf("the weight went from %d to %s: %v", highest, p.Value, err)
			}
			if highest = weight; weight < least {
				return fmt.Errorf("it is %d", weight)
			}
			return nil
		})
	}
	s.leads(america, "westus")
	s.leads(europe, "westus")
	s.must("replica", "update", "contoso/westeurope", "--weight", "100", "--over", "25s")
	reaches(5)

	owns := func(p *bed.Portolan) bool {
		return strings.Contains(p.LogTail(), "the ramps of weights are carried out here")
	}
	owner, heir := s.front, other
	if owns(other) {
		owner, heir = other, s.front
	} else {
		s.dns = dns
	}
	if !owns(owner) || owns(heir) {
		t.Fatalf("there is not one owner:\n%s\n%s", owner.LogTail(), heir.LogTail())
	}
	s.api = heir.API()
	if out := s.must("status"); !strings.Contains(out, "contoso/westeurope has the weight ") {
		t.Errorf("the other server does not know of the ramp:\n%s", out)
	}
	owner.Kill()
	reaches(highest + 1)
	if !owns(heir) {
		t.Errorf("the weight is raised by nobody:\n%s", heir.LogTail())
	}
	reaches(100)
	s.leads(europe, "westeurope")
	s.leads(america, "westus")
	s.until("the ramp to be gone", func() error {
		p, _, err := client.KV().Get(replicas+"westeurope/ramp", nil)
		if err == nil && p != nil {
			err = fmt.Errorf("it is %s", p.Value)
		}
		return err
	})
	// One that a person writes for the weight there is goes down; another weight ends it.
	s.kv("put", replicas+"westeurope/ramp", "100->0 2020-01-01T00:00:00Z/2020-01-01T01:00:00Z")
	s.leads(europe, "westus")
	s.kv("put", replicas+"westeurope/ramp", "7->100 2020-01-01T00:00:00Z/2020-01-01T01:00:00Z")
	s.until("the ramp of another weight to be taken away", func() error {
		p, _, err := client.KV().Get(replicas+"westeurope/ramp", nil)
		if err == nil && p != nil {
			err = fmt.Errorf("it is %s", p.Value)
		}
		return err
	})
	if got, err := s.led(europe); err != nil || got != "westus" {
		t.Errorf("clients are led to %s: %v", got, err)
	}
}
