package api

import (
	"fmt"
	"slices"

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
	decided := func(values topology.Values) (*topology.Snapshot, *router.Router) {
		snapshot, _ := topology.Parse(values, nil, s.Reserved)
		conditions, _ := assumed(view, snapshot, nil)
		return snapshot, sound(snapshot, conditions)
	}
	old, was := decided(before)
	snapshot, is := decided(after)
	if len(snapshot.Problems) > len(old.Problems) {
		return nil
	}
	for i, r := range snapshot.Registries {
		known, ok := was.Registry(r.Name)
		if !ok {
			continue
		}
		if fence, found := lost(known, is.At(i)); found {
			return failf(CodeRefused, "%s would get no address: no replica that they may be sent to would have routing enabled, a weight above 0 and the content; %s", ClientsBehind(r.Name, fence), instead)
		}
	}
	return nil
}

// lost returns the fence, zero for none, that clients are behind who get an address by before and none by after. It looks at the fences,
// not at the clients: there may be nobody behind one.
func lost(before, after *router.Registry) (fence topology.Match, found bool) {
	had := before.Stranded()
	for _, to := range after.Stranded() {
		for _, from := range slices.Concat([]topology.Rule{{}}, before.Topology().Fences) {
			if slices.Contains(had, from.Match) {
				continue
			}
			if from.Match == to || falls(to, from.Match, before.Topology().Fences) || falls(from.Match, to, after.Topology().Fences) {
				return to, true
			}
		}
	}
	return topology.Match{}, false
}

// falls reports whether clients of the match inner are behind outer where only fences are: whether there is none for inner, nor a prefix
// between the two.
func falls(inner, outer topology.Match, fences []topology.Rule) bool {
	return inner.Inside(outer) && !slices.ContainsFunc(fences, func(f topology.Rule) bool {
		return f.Match == inner || f.Match.Prefix.IsValid() && inner.Inside(f.Match) && f.Match.Inside(outer)
	})
}

// ClientsBehind names the clients of a registry that are behind a fence; the zero Match is for all of them.
func ClientsBehind(registry string, fence topology.Match) string {
	if fence == (topology.Match{}) {
		return "clients of registry " + registry
	}
	return fmt.Sprintf("clients of registry %s behind the fence %s", registry, fence)
}

// Stranded are, by registry, the fences behind which clients get no address, however healthy the replicas are; the zero Match alone where
// nobody gets one.
func Stranded(s *topology.Snapshot, conditions router.Conditions) map[string][]topology.Match {
	decides := sound(s, conditions)
	stranded := make(map[string][]topology.Match, len(s.Registries))
	for i, r := range s.Registries {
		stranded[r.Name] = decides.At(i).Stranded()
		if slices.Contains(stranded[r.Name], topology.Match{}) {
			stranded[r.Name] = []topology.Match{{}}
		}
	}
	return stranded
}

// sound is the router of s where every replica is healthy. Whether clients get an address does not depend on where they are, so no chart
// is needed.
func sound(s *topology.Snapshot, conditions router.Conditions) *router.Router {
	healthy := make(router.Conditions, len(conditions))
	for key, c := range conditions {
		c.Health, c.Down = router.Healthy, nil
		healthy[key] = c
	}
	return router.New(s, nil).With(healthy)
}
