package router

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"slices"
	"sync"

	"golang.org/x/sync/errgroup"

	"portolan/router/ranges"
	"portolan/topology"
)

// Charts are the geography of a snapshot, compiled: for every address the order in which its clients prefer the regions.
// Weights, health and whatever else changes from one moment to the next is none of it; New adds that. Immutable.
//
// A location database has millions of networks, but there are only some hundred orders of a few regions. So the whole
// database is read once, each network is put into the order it comes to, and neighbours of one order become one: what
// remains is a hundredth in size, answers in one look what a decision needs, and tells as widely as can be in which
// addresses the answer is the same.
type Charts struct {
	sources Sources
	// charts are those of the snapshot's registries, by what they are made of: registries with the same regions and rules
	// share one.
	charts map[string]*chart
	// latest is the chart of each registry, by its name.
	latest map[string]*chart
	// systems are the autonomous system and the country of every address; nil if no database of them is loaded.
	systems *ranges.Compiled[system]
}

// system is what makes the cell of a resolver.
type system struct {
	asn     uint32
	country [2]byte
}

// chart is what a decision needs of one set of regions and rules.
type chart struct {
	// regions are sorted by name: the rank by which ties are broken is the index.
	regions []site
	rules   []rule
	figures figures
	// table leads from an address to an index of routes.
	table  *ranges.Compiled[uint32]
	routes []route
}

// site is where replicas of one region are.
type site struct {
	name string
	at   vector
}

// route is the way of some clients: what the table says of an address.
type route struct {
	// order are the regions that the clients may be sent to, the first choice first, as indexes into chart.regions; nil
	// for clients without a place, whose order depends on where a registry's home is.
	order []uint16
	// placed is whether the place of the clients is known.
	placed bool
	choice choice
	// block is the special-purpose block that the addresses lie in, as an index into blocks; 0 for those of ordinary clients.
	block uint8
}

// subnets is whether a subnet there stands for its clients. One in a special-purpose block says nothing of them, unless
// the operator has a word on it.
func (r *route) subnets() bool { return r.block == 0 || r.choice != choice{} }

// rule is an order, a fence or a latency list: per region its place in the list, or absent.
type rule struct {
	topology topology.Rule
	place    []uint16
}

// absent is the place of a region that a rule does not name: behind all that it names.
const absent = math.MaxUint16

// choice is the order and the fence for some clients: indexes into rules, plus one; 0 for none.
type choice struct{ order, fence uint32 }

// or fills in from o what c has not.
func (c choice) or(o choice) choice {
	if c.order == 0 {
		c.order = o.order
	}
	if c.fence == 0 {
		c.fence = o.fence
	}
	return c
}

// nearest is how many regions of an order are sorted by their distance from the client; those behind them by their
// distance from the first. Registries in more regions would otherwise have as many orders as there are places, and scopes
// as narrow as networks, for the sake of what is asked only when eight regions are down.
const nearest = 8

// Chart compiles the geography of s, which takes some seconds for a City database. What former has already, and was made
// of the same sources, is used again: then it takes no time. former may be nil. It fails if a database cannot be read to its
// end, or ctx is done.
func Chart(ctx context.Context, s *topology.Snapshot, sources Sources, former *Charts) (*Charts, error) {
	c := &Charts{sources: sources, charts: make(map[string]*chart), latest: make(map[string]*chart)}
	if former != nil && former.sources != sources {
		former = nil
	}
	drafts := make(map[string]*draft)
	keys := make([]string, len(s.Registries))
	for i, t := range s.Registries {
		key := chartKey(t)
		keys[i] = key
		if former != nil && former.charts[key] != nil {
			c.charts[key] = former.charts[key]
		} else if drafts[key] == nil {
			drafts[key] = newDraft(t, sources)
		}
	}
	if former != nil {
		c.systems = former.systems
	}
	if len(drafts) > 0 || c.systems == nil && sources.Networks != nil {
		tables, err := c.survey(ctx, drafts)
		if err != nil {
			return nil, err
		}
		for key, d := range drafts {
			c.charts[key] = &chart{regions: d.regions, rules: d.rules, figures: d.figures, table: tables[key], routes: d.routes}
		}
	}
	for i, t := range s.Registries {
		c.latest[t.Name] = c.charts[keys[i]]
	}
	return c, nil
}

// Current reports whether c is what Chart would make of s and sources.
func (c *Charts) Current(s *topology.Snapshot, sources Sources) bool {
	if c == nil || c.sources != sources {
		return false
	}
	return !slices.ContainsFunc(s.Registries, func(t *topology.Registry) bool { return c.charts[chartKey(t)] == nil })
}

// chartKey names what a chart is made of.
func chartKey(t *topology.Registry) string {
	var key []byte
	for _, p := range sortedReplicas(t) {
		key = fmt.Appendf(key, "%s\x00%x %x\n", p.Region, math.Float64bits(p.Location.Latitude), math.Float64bits(p.Location.Longitude))
	}
	for kind, rules := range [][]topology.Rule{t.Orders, t.Fences} {
		lines := make([]string, len(rules))
		for i, rl := range rules {
			lines[i] = fmt.Sprintf("%d %s\n", kind, describe(rl))
		}
		slices.Sort(lines)
		for _, line := range lines {
			key = append(key, line...)
		}
	}
	return string(key)
}

func sortedReplicas(t *topology.Registry) []*topology.Replica {
	byRegion := func(a, b *topology.Replica) int { return cmp.Compare(a.Region, b.Region) }
	if slices.IsSortedFunc(t.Replicas, byRegion) {
		return t.Replicas
	}
	sorted := slices.Clone(t.Replicas)
	slices.SortFunc(sorted, byRegion)
	return sorted
}

// draft is a chart that is being made. Its routes are found by both families at once.
type draft struct {
	regions []site
	rules   []rule
	figures figures
	// operator maps addresses to the rules of the longest of the operator's prefixes that hold them.
	operator *ranges.Table[choice]
	// The other matches, for which a missing key means no rule.
	asns       map[uint32]choice
	countries  map[[2]byte]choice
	continents map[[2]byte]choice

	mu     sync.Mutex
	routes []route
	known  map[string]uint32 // routes by their bytes
}

func newDraft(t *topology.Registry, sources Sources) *draft {
	d := &draft{
		asns: make(map[uint32]choice), countries: make(map[[2]byte]choice), continents: make(map[[2]byte]choice),
		known: make(map[string]uint32),
	}
	for _, p := range sortedReplicas(t) {
		d.regions = append(d.regions, site{p.Region, unit(p.Location)})
	}
	prefixes := make(map[netip.Prefix]choice)
	compile := func(rules []topology.Rule, set func(choice, uint32) choice) {
		for _, rl := range rules {
			d.rules = append(d.rules, rule{rl, d.listed(rl)})
			n := uint32(len(d.rules))
			switch m := rl.Match; {
			case m.Prefix.IsValid():
				p := LookupPrefix(m.Prefix)
				prefixes[p] = set(prefixes[p], n)
			case m.ASN != 0:
				d.asns[m.ASN] = set(d.asns[m.ASN], n)
			case m.Country != "":
				d.countries[letters(m.Country)] = set(d.countries[letters(m.Country)], n)
			case m.Continent != "":
				d.continents[letters(m.Continent)] = set(d.continents[letters(m.Continent)], n)
			}
		}
	}
	compile(t.Orders, func(c choice, n uint32) choice { c.order = n; return c })
	compile(t.Fences, func(c choice, n uint32) choice { c.fence = n; return c })
	if sources.Prefixes != nil {
		d.file(sources.Prefixes, prefixes)
	}
	d.operator = operatorTable(prefixes)
	d.figures = newFigures(sources.Latencies, d.regions)
	return d
}

// file adds the orders of p for prefixes that have none, as far as they name a region of the chart.
func (d *draft) file(p *Prefixes, prefixes map[netip.Prefix]choice) {
	numbers := make([]uint32, len(p.lists)) // of the rules, plus one
	for i, regions := range p.lists {
		if slices.ContainsFunc(d.regions, func(r site) bool { return slices.Contains(regions, r.name) }) {
			rl := topology.Rule{Regions: regions} // of many prefixes: it matches none by itself
			d.rules = append(d.rules, rule{rl, d.listed(rl)})
			numbers[i] = uint32(len(d.rules))
		}
	}
	for prefix, list := range p.of {
		if numbers[list] != 0 && prefixes[prefix].order == 0 {
			prefixes[prefix] = choice{order: numbers[list], fence: prefixes[prefix].fence}
		}
	}
}

// listed is the place of every region in rl's list.
func (d *draft) listed(rl topology.Rule) []uint16 {
	place := make([]uint16, len(d.regions))
	for i, r := range d.regions {
		place[i] = absent
		if n := slices.Index(rl.Regions, r.name); n >= 0 {
			place[i] = uint16(n)
		}
	}
	return place
}

// LookupPrefix is the valid prefix p as clients are looked up, without bits beyond its length: a part of the IPv4-mapped, NAT64 or 6to4 addresses is a prefix of IPv4. All
// of them together are not all of IPv4: a rule for 2002::/16 is meant for the few who use 6to4, and must not take in the
// rest of the world. As nobody is looked up there, it holds for nobody.
func LookupPrefix(p netip.Prefix) netip.Prefix {
	p = p.Masked()
	if inner, offset := unembed(p.Addr()); offset > 0 && p.Bits() > offset {
		return netip.PrefixFrom(inner, min(p.Bits()-offset, 32)).Masked()
	}
	return p
}

// operatorTable compiles prefixes such that the longest with an order and the longest with a fence count, each for
// itself: a prefix inherits from those around it what it does not say.
func operatorTable(prefixes map[netip.Prefix]choice) *ranges.Table[choice] {
	entries := make([]ranges.Entry[choice], 0, len(prefixes))
	for p, ch := range prefixes {
		for n := p.Bits() - 1; n >= 0 && (ch.order == 0 || ch.fence == 0); n-- {
			around, _ := p.Addr().Prefix(n)
			ch = ch.or(prefixes[around])
		}
		entries = append(entries, ranges.Entry[choice]{Prefix: p, Value: ch})
	}
	return ranges.New(entries)
}

// spot is what of a Place a route depends on.
type spot struct {
	at                 vector
	placed             bool
	country, continent [2]byte
}

// letters are the two of a code; zero for none.
func letters(code string) (pair [2]byte) {
	copy(pair[:], code)
	return pair
}

// layer is what is known of an address besides its place.
type layer struct {
	block    uint8
	operator choice
	asn      choice
}

// survey reads the databases and makes the tables of the drafts, and c.systems. Both families are read at once.
func (c *Charts) survey(ctx context.Context, drafts map[string]*draft) (map[string]*ranges.Compiled[uint32], error) {
	type family struct {
		tables  map[string]*ranges.Table[uint32]
		systems *ranges.Table[system]
	}
	var families [2]family
	var g errgroup.Group
	for i, is6 := range []bool{false, true} {
		g.Go(func() (err error) {
			families[i].tables, families[i].systems, err = c.surveyFamily(ctx, is6, drafts)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	tables := make(map[string]*ranges.Compiled[uint32], len(drafts))
	for key := range drafts {
		tables[key] = ranges.Join(families[0].tables[key], families[1].tables[key]).Compile()
	}
	if c.sources.Networks != nil {
		c.systems = ranges.Join(families[0].systems, families[1].systems).Compile()
	}
	return tables, nil
}

func (c *Charts) surveyFamily(ctx context.Context, is6 bool, drafts map[string]*draft) (map[string]*ranges.Table[uint32], *ranges.Table[system], error) {
	asns := new(ranges.Table[uint32])
	if c.sources.Networks != nil {
		var b ranges.Builder[uint32]
		err := c.sources.Networks.Borders(is6, func(from netip.Addr, asn uint32) bool {
			if at := NextCell(from); at.IsValid() {
				b.Add(at, asn)
			}
			return true
		})
		if err != nil {
			return nil, nil, fmt.Errorf("reading the autonomous systems: %w", err)
		}
		asns = b.Table()
	}

	// In pieces: a slice of a million spots that grows leaves several times its size behind.
	const piece = 1 << 12
	var spots [][]spot
	none := spot{}
	spotOf := func(number int) *spot {
		if number < 0 {
			return &none
		}
		return &spots[number/piece][number%piece]
	}
	sweeps := make([]*sweep[layer, uint32], 0, len(drafts))
	keys := slices.Collect(maps.Keys(drafts))
	for _, key := range keys {
		d := drafts[key]
		layers := ranges.Combine(special, d.operator, func(block uint8, operator choice) layer {
			if blocks[block].ordinary {
				block = 0
			}
			return layer{block: block, operator: operator}
		})
		if len(d.asns) > 0 {
			layers = ranges.Combine(layers, asns, func(l layer, asn uint32) layer {
				if l.block == 0 && asn != 0 {
					l.asn = d.asns[asn]
				}
				return l
			})
		}
		sweeps = append(sweeps, newSweep(layers, is6, func(number int, l layer) uint32 { return d.route(spotOf(number), l) }))
	}
	systems := newSweep(asns, is6, func(number int, asn uint32) system {
		return system{asn, spotOf(number).country}
	})

	visited := 0
	err := c.sources.Places.Borders(is6, func(from netip.Addr, number int, place *Place) bool {
		if place != nil {
			s := spot{placed: place.Located, country: letters(place.Country), continent: letters(place.Continent)}
			if s.placed {
				s.at = unit(place.Coordinates)
			}
			if last := len(spots) - 1; last < 0 || len(spots[last]) == piece {
				spots = append(spots, make([]spot, 0, piece))
			}
			spots[len(spots)-1] = append(spots[len(spots)-1], s)
		}
		if visited++; visited&0xffff == 0 && ctx.Err() != nil {
			return false
		}
		at := NextCell(from)
		if !at.IsValid() {
			return true
		}
		for _, s := range sweeps {
			s.place(at, number)
		}
		if c.sources.Networks != nil {
			systems.place(at, number)
		}
		return true
	})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading the location database: %w", err)
	}
	tables := make(map[string]*ranges.Table[uint32], len(drafts))
	for i, s := range sweeps {
		tables[keys[i]] = s.table()
	}
	return tables, systems.table(), nil
}

// sweep goes over one family once and puts places, as they are met, together with the layers that lie over them.
type sweep[L, V comparable] struct {
	value func(number int, l L) V
	// borders are where layers begin, all of them ahead of the sweep from next on.
	borders []border[L]
	next    int

	number int
	layer  L
	b      ranges.Builder[V]

	// known are the values that were asked for already under the plain layer, by number plus one; nearly all are of that.
	known []known[V]
	plain L
}

type known[V any] struct {
	value V
	asked bool
}

type border[L any] struct {
	at    netip.Addr
	layer L
}

func newSweep[L, V comparable](layers *ranges.Table[L], is6 bool, value func(int, L) V) *sweep[L, V] {
	s := &sweep[L, V]{value: value, number: NoPlace}
	for at, l := range layers.Ranges() {
		if at.Is6() == is6 {
			s.borders = append(s.borders, border[L]{at, l})
		}
	}
	if len(s.borders) == 0 {
		first := netip.IPv4Unspecified()
		if is6 {
			first = netip.IPv6Unspecified()
		}
		s.borders = append(s.borders, border[L]{at: first})
	}
	return s
}

// place says that from at on everything is at the place of that number.
func (s *sweep[L, V]) place(at netip.Addr, number int) {
	if s.next < len(s.borders) && s.borders[s.next].at.Compare(at) <= 0 {
		s.pass(at)
	}
	if number == s.number {
		return
	}
	s.number = number
	s.b.Add(at, s.now())
}

// pass goes over the borders up to at.
func (s *sweep[L, V]) pass(at netip.Addr) {
	for ; s.next < len(s.borders) && (!at.IsValid() || s.borders[s.next].at.Compare(at) <= 0); s.next++ {
		s.layer = s.borders[s.next].layer
		s.b.Add(s.borders[s.next].at, s.now())
	}
}

// now is the value of the place and the layer in force.
func (s *sweep[L, V]) now() V {
	if s.layer != s.plain {
		return s.value(s.number, s.layer)
	}
	i := s.number + 1
	for len(s.known) <= i {
		s.known = append(s.known, known[V]{})
	}
	k := &s.known[i]
	if !k.asked {
		*k = known[V]{s.value(s.number, s.layer), true}
	}
	return k.value
}

// table ends the sweep.
func (s *sweep[L, V]) table() *ranges.Table[V] {
	s.pass(netip.Addr{})
	return s.b.Table()
}

// route is the index of the route from a place under a layer.
func (d *draft) route(s *spot, l layer) uint32 {
	r := route{choice: l.operator, block: l.block}
	if l.block == 0 {
		// The most precise match holds, of orders and of fences each for itself.
		r.placed = s.placed
		r.choice = r.choice.or(l.asn).or(d.countries[s.country]).or(d.continents[s.continent])
	}
	var few [maxOnStack]uint16
	var sorted []uint16
	if r.placed {
		sorted = order(few[:0], d.regions, d.rules, r.choice, &s.at, d.figures.of(s.country, s.continent), -1)
	}
	key := make([]byte, 0, 64)
	key = binary.BigEndian.AppendUint32(key, r.choice.order)
	key = binary.BigEndian.AppendUint32(key, r.choice.fence)
	key = append(key, r.block)
	for _, i := range sorted {
		key = binary.BigEndian.AppendUint16(key, i)
	}
	if r.placed {
		key = append(key, 1)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n, known := d.known[string(key)]
	if !known {
		n = uint32(len(d.routes))
		r.order = slices.Clone(sorted)
		d.routes = append(d.routes, r)
		d.known[string(key)] = n
	}
	return n
}

// maxOnStack is how many regions are sorted without allocating.
const maxOnStack = 64

// order appends to sorted the regions that choice allows for a client that stands at from, in their order: first those that its order names, then by
// distance in whole kilometres, ties by name. Where figures, which may be empty, have a latency, that counts as the distance. A client without a place stands at the home, which comes first then, also
// before a region on the same spot; home is its index, or -1. A nil from is a client without a place where there is no
// home either: by name.
func order(sorted []uint16, regions []site, rules []rule, ch choice, from *vector, figures []int, home int) []uint16 {
	type candidate struct {
		place, index uint16
		distance     int
	}
	var stack [maxOnStack]candidate
	all := stack[:0]
	for i := range regions {
		if ch.fence != 0 && rules[ch.fence-1].place[i] == absent {
			continue
		}
		c := candidate{place: absent, index: uint16(i)}
		if ch.order != 0 {
			c.place = rules[ch.order-1].place[i]
		}
		if from != nil {
			c.distance = from.kilometres(regions[i].at)
		}
		if len(figures) > 0 && figures[i] > 0 {
			c.distance = figures[i] * kilometresPerMillisecond
		}
		if home >= 0 && i != home {
			c.distance++
		}
		all = append(all, c)
	}
	byDistance := func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.place, b.place), cmp.Compare(a.distance, b.distance), cmp.Compare(a.index, b.index))
	}
	slices.SortFunc(all, byDistance)
	named := slices.IndexFunc(all, func(c candidate) bool { return c.place == absent })
	if rest := named + nearest; named >= 0 && len(all) > rest {
		for i := range all[rest:] {
			c := &all[rest+i]
			c.distance = regions[all[0].index].at.kilometres(regions[c.index].at)
		}
		slices.SortFunc(all[rest:], byDistance)
	}
	for _, c := range all {
		sorted = append(sorted, c.index)
	}
	return sorted
}
