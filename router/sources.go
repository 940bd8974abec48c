package router

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// Sources are what charts are made of besides the topology. Two are the same if they are equal. Their parts are immutable.
type Sources struct {
	Places   Locator
	Networks ASNLocator // nil: none loaded
	// Prefixes are orders for prefixes, beside those in the topology; nil: none.
	Prefixes *Prefixes
	// Latencies are what the operator measured; nil: nothing.
	Latencies *Latencies
	// Digest is a hash of the files of them all, by which servers that have others can be told.
	Digest string
}

// Prefixes are an operator's orders for many prefixes: what is too much for the topology, as a table made out of BGP.
type Prefixes struct {
	lists [][]string
	of    map[netip.Prefix]int // by LookupPrefix: index into lists
}

// NewPrefixes returns the orders of lists of regions by prefix, each as LookupPrefix has it. Of several that come to the same, the
// first counts, as netip.Prefix.Compare sorts them: servers with equal orders decide alike.
func NewPrefixes(orders map[netip.Prefix][]string) *Prefixes {
	p := &Prefixes{of: make(map[netip.Prefix]int, len(orders))}
	known := make(map[string]int)
	for _, given := range slices.SortedFunc(maps.Keys(orders), netip.Prefix.Compare) {
		prefix := LookupPrefix(given)
		if _, twice := p.of[prefix]; twice {
			continue
		}
		regions := orders[given]
		key := strings.Join(regions, ",")
		n, ok := known[key]
		if !ok {
			n = len(p.lists)
			known[key], p.lists = n, append(p.lists, slices.Clone(regions))
		}
		p.of[prefix] = n
	}
	return p
}

// Regions returns the regions that the orders name, and for how many prefixes each.
func (p *Prefixes) Regions() map[string]int {
	named := make(map[string]int)
	if p == nil {
		return named
	}
	for _, list := range p.of {
		for _, region := range p.lists[list] {
			named[region]++
		}
	}
	return named
}

// Latencies are round-trip times between the clients of a country or a continent and a region, in milliseconds.
type Latencies struct {
	countries, continents map[[2]byte]map[string]int
}

// NewLatencies returns the figures of regions by the codes of countries (ISO 3166-1 alpha-2) and of continents (AF, AN, AS, EU, NA,
// OC, SA), each from 1 up. That of the country counts before that of its continent.
func NewLatencies(countries, continents map[string]map[string]int) *Latencies {
	byLetters := func(of map[string]map[string]int) map[[2]byte]map[string]int {
		figures := make(map[[2]byte]map[string]int, len(of))
		for code, regions := range of {
			figures[letters(code)] = maps.Clone(regions)
		}
		return figures
	}
	return &Latencies{byLetters(countries), byLetters(continents)}
}

// Regions returns the regions that there are figures of, and how many of each.
func (l *Latencies) Regions() map[string]int {
	named := make(map[string]int)
	if l == nil {
		return named
	}
	for _, of := range []map[[2]byte]map[string]int{l.countries, l.continents} {
		for _, figures := range of {
			for region := range figures {
				named[region]++
			}
		}
	}
	return named
}

// kilometresPerMillisecond makes figures and distances comparable, since a table seldom has a figure for everything: light in
// fibre takes a millisecond for a hundred kilometres there and back, and paths are about twice as long as great circles
// (Singla et al., "The Internet at the Speed of Light", HotNets 2014, find them longer still, through what else delays).
const kilometresPerMillisecond = 50

// figures are the latencies to the regions of a chart, by the index of the region; 0 for none.
type figures struct{ countries, continents map[[2]byte][]int }

// of returns the figures for clients there; nil if there are none.
func (f *figures) of(country, continent [2]byte) []int {
	near, far := f.countries[country], f.continents[continent]
	if near == nil || far == nil {
		return slices.Concat(near, far)
	}
	both := slices.Clone(near)
	for i, ms := range both {
		if ms == 0 {
			both[i] = far[i]
		}
	}
	return both
}

// newFigures picks out what l, which may be nil, says of regions.
func newFigures(l *Latencies, regions []site) figures {
	if l == nil {
		return figures{}
	}
	pick := func(of map[[2]byte]map[string]int) map[[2]byte][]int {
		picked := make(map[[2]byte][]int)
		for place, figures := range of {
			list := make([]int, len(regions))
			some := false
			for i, r := range regions {
				list[i] = figures[r.name]
				some = some || list[i] > 0
			}
			if some {
				picked[place] = list
			}
		}
		return picked
	}
	return figures{pick(l.countries), pick(l.continents)}
}
