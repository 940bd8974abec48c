package api

import (
	"context"
	"maps"
	"slices"
	"strconv"
	"time"

	"portolan/topology"
)

// over is the time that p gives a weight to come about; zero for none.
func (p *ReplicaPatch) over() (time.Duration, error) {
	if p.Over == "" {
		return 0, nil
	}
	disables := p.Routing != nil && *p.Routing == RoutingDisabled
	enables := p.Routing != nil && *p.Routing == RoutingEnabled
	if disables || !enables && p.Weight == nil {
		return 0, failf(CodeInvalid, "over says how long a weight takes to come about: give it with a weight, or with routing enabled; to drain a replica little by little, with the weight 0")
	}
	over, err := time.ParseDuration(p.Over)
	if err != nil || over == 0 {
		return 0, failf(CodeInvalid, "over: %q is not how long a weight may take to change: want a duration of 10s to 168h, such as 30m", clip(p.Over))
	}
	return over, nil
}

// edited is what an edit of the replica before made of it: after is the topology as it is declared since, and is the replica's ramp. The
// weight of a ramp is declared to be the one that it leads to, so that a ramp which ends or begins is a change of the weight there is.
func edited(before Replica, changes []topology.Change, after topology.Values, is *topology.Ramp) (all []topology.Change, ramped bool) {
	was := before.Ramp
	if was == is || was != nil && is != nil && was.To == is.To && was.End.Equal(is.End) {
		return changes, false
	}
	prefix := topology.ReplicaPrefix(before.Registry, before.Region)
	ramp := topology.Change{Op: topology.Changed, Key: prefix + "ramp"}
	if was == nil {
		ramp.Op = topology.Added
	} else {
		ramp.Old = was.String()
	}
	if is == nil {
		ramp.Op = topology.Removed
	} else {
		ramp.New = is.String()
	}
	weight := topology.Change{Op: topology.Changed, Key: prefix + "weight", Old: strconv.Itoa(before.Weight), New: after[prefix+"weight"]}
	if weight.New == "" {
		weight.New = "100"
	}
	all = slices.DeleteFunc(changes, func(c topology.Change) bool { return c.Key == weight.Key })
	all = append(all, ramp)
	if weight.Old != weight.New {
		all = append(all, weight)
	}
	return all, true
}

// ofTheMoment are declared values with the weights that ramps came to in place of those that they lead to.
func ofTheMoment(values topology.Values, ramps []topology.Ramp) topology.Values {
	values = maps.Clone(values)
	for _, r := range ramps {
		key := topology.ReplicaPrefix(r.Registry, r.Region) + "weight"
		if weight, set := values[key]; weight == strconv.Itoa(r.To) || !set && r.To == 100 {
			values[key] = strconv.Itoa(r.From)
		}
	}
	return values
}

// update changes a replica as p says.
func (s *server) update(ctx context.Context, registry, region string, p *ReplicaPatch) error {
	over, err := p.over()
	switch {
	case err != nil:
		return err
	case p.Weight != nil || over != 0:
		return s.Editor.RampReplica(ctx, registry, region, over, p.patch)
	}
	return s.Editor.UpdateReplica(ctx, registry, region, p.patch)
}
