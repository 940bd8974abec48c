package api

import (
	"maps"
	"slices"
	"strings"

	"portolan/router"
	"portolan/topology"
)

// strand refuses an edit after which clients get no address that got one before, now or at the end of ramps; instead says what to do.
// Registries that are new are left alone, and so are values that cannot be used, which are told of when they are written.
func (s *server) strand(before, after topology.Values, instead string) error {
	view := s.View()
	if err := s.strandIn(view, before, after, instead); err != nil || len(view.Ramps) == 0 {
		return err
	}
	return s.strandIn(view, ofTheMoment(before, view.Ramps), ofTheMoment(after, view.Ramps), instead)
}

func (s *server) strandIn(view *View, before, after topology.Values, instead string) error {
	stranded := func(values topology.Values) (map[string][]string, int) {
		snapshot, _ := topology.Parse(values, nil, s.Reserved)
		conditions, _ := assumed(view, snapshot, nil)
		return Stranded(snapshot, conditions), len(snapshot.Problems)
	}
	was, problems := stranded(before)
	is, more := stranded(after)
	if more > problems {
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(is)) {
		known, ok := was[name]
		near := slices.DeleteFunc(is[name], func(region string) bool { return slices.Contains(known, region) })
		if ok && len(near) > 0 {
			return failf(CodeRefused, "clients of registry %s would get no address (those near %s): no replica that they may be sent to would have routing enabled, a weight above 0 and the content; %s", name, strings.Join(near, ", "), instead)
		}
	}
	return nil
}

// Stranded are, by registry, the regions near which clients get no address, however healthy the replicas are.
func Stranded(s *topology.Snapshot, conditions router.Conditions) map[string][]string {
	sound := make(router.Conditions, len(conditions))
	for key, c := range conditions {
		c.Health, c.Down = router.Healthy, nil
		sound[key] = c
	}
	decides := router.New(s, nil).With(sound)
	near := make(map[string][]string, len(s.Registries))
	for i, r := range s.Registries {
		near[r.Name] = nil
		for _, split := range decides.At(i).Shares() {
			if len(split.Shares) == 0 {
				near[r.Name] = append(near[r.Name], split.Nearest)
			}
		}
	}
	return near
}
