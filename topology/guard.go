package topology

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Pending is a raw edit that the guard holds: it left less than half of a registry's replicas, or took all of it away. What was
// taken away is still served, until somebody confirms the edit or takes it back.
type Pending struct {
	Registry string `json:"registry"`
	// Missing are the regions that the edit took away; sorted.
	Missing []string `json:"missing"`
	// Remaining are the regions that would be left, which is what a confirmation says; sorted.
	Remaining []string `json:"remaining"`
	// Home says that the registry would be left without its home replica, which cannot be confirmed.
	Home bool `json:"home,omitempty"`
}

// Way is what an operator can do about it.
func (p Pending) Way() string {
	if p.Home {
		return "the home replica among them, which stays as long as the registry: take it back with `portolan export | portolan apply -f -`"
	}
	return fmt.Sprintf("take it back with `portolan export | portolan apply -f -`, or run `portolan topology confirm %s`", p.Registry)
}

// present returns, for each registry of values, the regions that have an endpoint and addresses (or a hostname): what
// there is of a registry, as all servers see it alike whatever their last good values are. Whether the values are good
// does not matter: a bad one takes nothing away. A registry without such regions has an empty list, one that is not there none.
func present(values Values) map[string][]string {
	has := map[string]map[string]int{}
	for name := range values {
		k, err := parseKey(name)
		if err != nil {
			continue
		}
		if has[k.registry] == nil {
			has[k.registry] = map[string]int{}
		}
		switch k.field {
		case fieldEndpoint:
			has[k.registry][k.region] |= 1
		case fieldAddresses, fieldHostname:
			has[k.registry][k.region] |= 2
		}
	}
	regions := make(map[string][]string, len(has))
	for registry, parts := range has {
		regions[registry] = []string{}
		for _, region := range slices.Sorted(maps.Keys(parts)) {
			if parts[region] == 3 {
				regions[registry] = append(regions[registry], region)
			}
		}
	}
	return regions
}

// consents are what operators confirmed of registries.
type consents interface {
	// regions are those that were confirmed last as all of a registry's; none, if that was never done.
	regions(registry string) []string
	// cover is whether those regions (nil: none, it is gone) are confirmed as all of a registry's, for an edit that has not come yet.
	cover(registry string, regions []string) bool
}

// guard returns values with what too large a deletion took away put back from last, which must be good values, and what is held so: one
// that leaves less than half of those in last, or less than half as many as were confirmed last, lest a deletion of one key after another
// passes, each by itself.
func guard(values, last Values, confirmed consents) (Values, []Pending) {
	var held []Pending
	now, before := present(values), present(last)
	for _, registry := range slices.Sorted(maps.Keys(before)) {
		missing := slices.DeleteFunc(slices.Clone(before[registry]), func(region string) bool { return slices.Contains(now[registry], region) })
		few := 2*len(missing) > len(before[registry]) || 2*len(now[registry]) < len(confirmed.regions(registry))
		if len(missing) == 0 || !few || confirmed.cover(registry, now[registry]) {
			continue
		}
		if len(held) == 0 {
			values = maps.Clone(values)
		}
		_, left := now[registry]
		home := left && slices.Contains(missing, last[registryPrefix(registry)+fieldHome])
		held = append(held, Pending{Registry: registry, Missing: missing, Remaining: append([]string{}, now[registry]...), Home: home})
		for name, value := range last {
			k, err := parseKey(name)
			if err != nil || k.registry != registry || left && !slices.Contains(missing, k.region) {
				continue // of a registry that is still there in part, what is not the missing replicas' may be removed
			}
			if _, there := values[name]; !there {
				values[name] = value
			}
		}
	}
	return values, held
}

// confirmedGone stands at a ConfirmedKey when a registry is confirmed to be gone. It is no list of regions: a registry of which
// something is left, but no replica, is another state, and a confirmation lets one state pass.
const confirmedGone = "-"

// confirmation is the value of a ConfirmedKey for the regions that present has of a registry: nil if it is gone.
func confirmation(regions []string) string {
	if regions == nil {
		return confirmedGone
	}
	return joinList(regions)
}

// confirms is whether the value of a ConfirmedKey is for those regions.
func confirms(value string, regions []string) bool {
	if value = strings.TrimSpace(value); value == confirmedGone || regions == nil {
		return value == confirmation(regions)
	}
	confirmed := splitList(value)
	slices.Sort(confirmed)
	return slices.Equal(confirmed, regions)
}
