package topology

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strings"

	"portolan/store"
	"portolan/strict/nearmiss"
	"portolan/topology/regions"
)

// Values are keys below the store's prefix with their values: what operators wrote, or what of it was good.
type Values map[string]string

// What is wrong with a registry that has no home, and a replica that has no endpoint.
const (
	missingHome     = "is missing: the region in which the registry was created is needed"
	missingEndpoint = "is missing: the URL of the registry's API is needed"
)

// has is whether there is a key that begins with prefix.
func (v Values) has(prefix string) bool {
	for name := range v {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// ValuesOf returns what stands below RegistriesPrefix in t. White space around a value is dropped (editors and shells add
// line ends), and so are the empty "folders" that Consul's own UI makes.
func ValuesOf(t store.Tree) Values {
	values := make(Values, len(t.Entries))
	for _, e := range t.Entries {
		value := strings.TrimSpace(e.Value)
		if !strings.HasPrefix(e.Key, RegistriesPrefix) || strings.HasSuffix(e.Key, "/") && value == "" {
			continue
		}
		values[e.Key] = value
	}
	return values
}

// Parse makes a snapshot of values. It is pure: the same arguments give the same result.
//
// A value that cannot be used does not count: the key keeps the state that it has in last, the good values of the parse
// before (a key that was absent there stays absent); a replica that was never served is left out instead, alone.
// The whole is held together the same way: where values that are each well formed contradict each other (a home without a
// replica, one endpoint twice, addresses beside host names, a client name of two registries), those that changed since
// last go back, until nothing contradicts; what stood in last never did. Every refusal is a Problem. reserved are labels
// that neither a registry nor a region may have.
//
// good is what to pass as last the next time: parsing the same values again with it gives the same registries. The snapshot keeps it, so it
// is not to be changed. Snapshot.Changed is zero.
func Parse(values, last Values, reserved []string) (snapshot *Snapshot, good Values) {
	p := parsing{registries: map[string]*registryCells{}, reserved: reserved, refused: map[string]bool{}}
	for _, k := range slices.Sorted(maps.Keys(last)) {
		p.addLast(k, last[k])
	}
	for _, k := range slices.Sorted(maps.Keys(values)) {
		p.addRaw(k, values[k])
	}
	names := slices.Sorted(maps.Keys(p.registries))
	for _, name := range names {
		r := p.registries[name]
		p.checkValues(r)
		for p.settle(r) {
		}
		p.settleRules(r)
	}
	for p.settleNames(names) {
	}
	return p.build(names)
}

// cell is one key on its way through a parse.
type cell struct {
	key               key
	raw, last, use    string
	inRaw, inLast, in bool
}

func (c *cell) changed() bool { return c.in != c.inLast || c.in && c.use != c.last }

// revert gives the key the state it had.
func (c *cell) revert() { c.use, c.in = c.last, c.inLast }

type registryCells struct {
	name     string
	cells    map[string]*cell // by field
	rules    map[string]*cell // by key
	replicas map[string]*replicaCells
	left     bool // left out
}

type replicaCells struct {
	region string
	cells  map[string]*cell
	// known: it has last good values, so that its keys have a state to go back to.
	known bool
	// spoiled: it is left out.
	spoiled bool
}

// field returns the cell of a field; one that was never seen is absent everywhere.
func field(cells map[string]*cell, k key) *cell {
	c := cells[k.field]
	if c == nil {
		c = &cell{key: k}
		cells[k.field] = c
	}
	return c
}

func (r *registryCells) field(f string) *cell {
	return field(r.cells, key{registry: r.name, field: f})
}

func (r *registryCells) at(p *replicaCells, f string) *cell {
	return field(p.cells, key{registry: r.name, region: p.region, field: f})
}

// declared is whether anything is there under that region's name.
func (r *registryCells) declared(region string) bool {
	p := r.replicas[region]
	if p == nil {
		return false
	}
	for _, c := range p.cells {
		if c.in || c.inRaw {
			return true
		}
	}
	return false
}

func (r *registryCells) regions() []string { return slices.Sorted(maps.Keys(r.replicas)) }

// missing says what a replica lacks to be served; empty: nothing.
func (r *registryCells) missing(p *replicaCells) (f, reason string) {
	if !r.at(p, fieldEndpoint).in {
		return fieldEndpoint, missingEndpoint
	}
	if !r.at(p, fieldAddresses).in && !r.at(p, fieldHostname).in {
		return fieldAddresses, "is missing: addresses (or a hostname) for clients are needed"
	}
	if !r.at(p, fieldLocation).in {
		if _, ok := regions.Lookup(p.region); !ok {
			reason := fmt.Sprintf("is missing: %s is no public region of Azure, AWS or Google Cloud, so it needs a location of its own (latitude,longitude)", p.region)
			if near, ok := regions.Suggest(p.region); ok {
				reason += fmt.Sprintf("; did you mean %s?", near)
			}
			return fieldLocation, reason
		}
	}
	return "", ""
}

// served is whether the replica was served before, which gives its values the older right.
func (r *registryCells) served(p *replicaCells) bool {
	return r.at(p, fieldEndpoint).inLast && (r.at(p, fieldAddresses).inLast || r.at(p, fieldHostname).inLast)
}

func (r *registryCells) complete(p *replicaCells) bool {
	f, _ := r.missing(p)
	return f == "" && !p.spoiled
}

type parsing struct {
	registries map[string]*registryCells
	reserved   []string
	problems   []Problem
	refused    map[string]bool // names for which a problem was made already
}

func (p *parsing) registry(name string) *registryCells {
	r := p.registries[name]
	if r == nil {
		r = &registryCells{name: name, cells: map[string]*cell{}, rules: map[string]*cell{}, replicas: map[string]*replicaCells{}}
		p.registries[name] = r
	}
	return r
}

func (p *parsing) cell(k key) *cell {
	r := p.registry(k.registry)
	switch {
	case k.region != "":
		rep := r.replicas[k.region]
		if rep == nil {
			rep = &replicaCells{region: k.region, cells: map[string]*cell{}}
			r.replicas[k.region] = rep
		}
		return r.at(rep, k.field)
	case k.isRule():
		id := k.String()
		if r.rules[id] == nil {
			r.rules[id] = &cell{key: k}
		}
		return r.rules[id]
	}
	return r.field(k.field)
}

func (p *parsing) problem(at, value, reason, effect string) {
	p.problems = append(p.problems, Problem{Key: at, Value: value, Reason: reason, Effect: effect})
}

func (p *parsing) isReserved(k key) (string, bool) {
	for _, name := range []string{k.registry, k.region} {
		if slices.Contains(p.reserved, name) {
			return name, true
		}
	}
	return "", false
}

// addLast takes in a last good value; one that would not be good today (an older version's) is forgotten.
func (p *parsing) addLast(name, value string) {
	k, err := parseKey(name)
	if _, reserved := p.isReserved(k); err != nil || reserved || k.check(value) != nil {
		return
	}
	c := p.cell(k)
	c.last, c.inLast = value, true
	if k.region != "" {
		p.registries[k.registry].replicas[k.region].known = true
	}
}

func (p *parsing) addRaw(name, value string) {
	k, err := parseKey(name)
	if err != nil {
		p.problem(name, clip(value), err.Error(), "it is ignored")
		if strings.Contains(value, "@") || strings.Contains(name, "cred") { // a misspelt key may hold what should not be shown
			p.problems[len(p.problems)-1].Value = "(not shown)"
		}
		return
	}
	if word, reserved := p.isReserved(k); reserved {
		effect := "registry " + k.registry + " is not served"
		at := registryPrefix(k.registry)
		if k.registry != word {
			effect, at = "replica "+k.region+" is not served", ReplicaPrefix(k.registry, k.region)
		}
		if !p.refused[at] { // once, however many keys stand below it
			p.refused[at] = true
			p.problem(at, "", fmt.Sprintf("the name %q is reserved in this zone: choose another", word), effect)
		}
		return
	}
	c := p.cell(k)
	c.raw, c.inRaw = value, true
	c.use, c.in = value, true
}

// kept says what holds of a cell after it went back.
func (c *cell) kept() string {
	if c.in {
		return fmt.Sprintf("the last good value %s is kept", c.key.shown(c.use))
	}
	if d, ok := defaults[c.key.field]; ok {
		return "the default " + d + " holds"
	}
	return "it is ignored"
}

// checkValues sends back, or spoils, what is malformed on its own.
func (p *parsing) checkValues(r *registryCells) {
	known := r.field(fieldHome).inLast
	for _, c := range r.cells {
		if !c.inRaw {
			continue
		}
		if err := c.key.check(c.raw); err != nil {
			c.revert()
			effect := c.kept()
			if c.key.field == fieldHome && !known {
				effect = "registry " + r.name + " is not served"
			}
			p.problem(c.key.String(), c.key.shown(c.raw), err.Error(), effect)
		}
	}
	for _, c := range r.rules {
		if !c.inRaw {
			continue
		}
		if err := c.key.check(c.raw); err != nil {
			c.revert()
			effect := c.kept()
			if !c.in {
				effect = "this rule is left out"
			}
			p.problem(c.key.String(), c.key.shown(c.raw), err.Error(), effect)
		}
	}
	for _, rep := range r.replicas {
		for _, c := range rep.cells {
			if !c.inRaw {
				continue
			}
			if err := c.key.check(c.raw); err != nil {
				p.retract(r, rep, err.Error(), c)
			}
		}
	}
}

// retract sends cells of a replica back to their last good state, or leaves the replica out if they have none.
func (p *parsing) retract(r *registryCells, rep *replicaCells, reason string, cells ...*cell) {
	changed := slices.DeleteFunc(slices.Clone(cells), func(c *cell) bool { return !c.changed() })
	back := rep.known && len(changed) > 0
	if !back {
		rep.spoiled = true
		changed = cells
		for _, c := range cells {
			c.in = c.in && c.key.check(c.use) == nil
		}
	}
	// One problem, at the first key that somebody wrote.
	i := max(0, slices.IndexFunc(changed, func(c *cell) bool { return c.inRaw }))
	at := changed[i]
	effect := "replica " + rep.region + " is not served"
	if back {
		for _, c := range changed {
			c.revert()
		}
		effect = at.kept()
	}
	p.problem(at.key.String(), at.key.shown(at.raw), reason, effect)
}

// settle repairs the first contradiction within a registry, and reports whether there was one. Every repair sends back
// a changed cell, or leaves something out, so it ends.
func (p *parsing) settle(r *registryCells) bool {
	if r.left {
		return false
	}
	any := slices.ContainsFunc(r.regions(), r.declared)
	for _, c := range r.cells {
		any = any || c.in || c.inRaw
	}
	for _, c := range r.rules {
		any = any || c.in || c.inRaw
	}
	if !any { // the registry was removed
		r.left = true
		return false
	}
	var complete []*replicaCells
	home := r.field(fieldHome)
	for _, region := range r.regions() {
		rep := r.replicas[region]
		addresses, hostname, location := r.at(rep, fieldAddresses), r.at(rep, fieldHostname), r.at(rep, fieldLocation)
		if rep.spoiled {
			continue
		}
		if addresses.in && hostname.in {
			p.retract(r, rep, "addresses and hostname are both set: clients get one or the other", addresses, hostname)
			return true
		}
		if f, _ := r.missing(rep); f == fieldLocation && rep.known && location.inLast && !location.in {
			_, reason := r.missing(rep)
			p.retract(r, rep, reason, location)
			return true
		}
		if r.complete(rep) {
			if region == home.use {
				complete = slices.Insert(complete, 0, rep)
			} else {
				complete = append(complete, rep)
			}
		}
	}
	if p.settleHome(r, home) {
		return true
	}
	return !r.left && (p.settleKinds(r, complete) || p.settleEndpoints(r, complete))
}

func (p *parsing) settleHome(r *registryCells, home *cell) bool {
	// leave names the one reason that stands in what was written, whatever was tried before.
	leave := func() bool {
		r.left = true
		at := home.key.String()
		effect := "registry " + r.name + " is not served"
		p.problems = slices.DeleteFunc(p.problems, func(q Problem) bool { return q.Key == at })
		for i := range p.problems {
			if strings.HasPrefix(p.problems[i].Key, registryPrefix(r.name)) {
				p.problems[i].Effect = effect
			}
		}
		reason := missingHome
		if home.inRaw {
			reason = fmt.Sprintf("the home region has no replica: add %s", ReplicaPrefix(r.name, clip(home.raw)))
			if err := home.key.check(home.raw); err != nil {
				reason = err.Error()
			}
		}
		p.problem(at, home.key.shown(home.raw), reason, effect)
		return true
	}
	// back is whether the former home can be the home still.
	former := r.replicas[home.last]
	back := home.changed() && home.inLast && former != nil && (former.known || r.declared(home.last))
	if !home.in {
		if back { // not even a deletion: a registry always has a home
			home.revert()
			p.problem(home.key.String(), "", "was removed: a registry cannot be without its home region", home.kept())
			return true
		}
		return leave()
	}
	rep := r.replicas[home.use]
	if rep != nil && r.complete(rep) {
		return false
	}
	if back {
		value := home.use
		home.revert()
		p.problem(home.key.String(), value, fmt.Sprintf("the home region has no complete replica: add %s first", ReplicaPrefix(r.name, clip(value))), home.kept())
		return true
	}
	if rep != nil && rep.known && !rep.spoiled {
		// It was served, and somebody removed what it needs.
		var removed []*cell
		addresses, hostname := r.at(rep, fieldAddresses), r.at(rep, fieldHostname)
		if c := r.at(rep, fieldEndpoint); !c.in && c.inLast {
			removed = append(removed, c)
		}
		if !addresses.in && !hostname.in {
			removed = append(removed, addresses, hostname)
		}
		if !r.declared(rep.region) {
			removed = slices.Collect(maps.Values(rep.cells))
		}
		field, reason := fieldEndpoint, "the replica in the home region cannot be removed while the registry exists"
		if r.at(rep, fieldEndpoint).in { // so only where clients are sent was taken away
			field, reason = fieldAddresses, "the replica in the home region cannot be without addresses, or a hostname, while the registry exists"
			if hostname.inLast {
				field = fieldHostname
			}
		}
		restored := false
		for _, c := range removed {
			if c.changed() {
				c.revert()
				restored = true
			}
		}
		if restored {
			p.problem(ReplicaPrefix(r.name, rep.region)+field, "", reason,
				"the last good values of replica "+rep.region+" are kept")
			return true
		}
	}
	if !r.declared(home.use) {
		return leave()
	}
	return false // declared, not complete yet: the others can be served
}

// settleKinds sees to it that all replicas have addresses, or all have host names: what did not change says which, else
// the home, else the first.
func (p *parsing) settleKinds(r *registryCells, complete []*replicaCells) bool {
	if len(complete) == 0 {
		return false
	}
	reference := complete[0]
	for _, rep := range complete {
		if r.served(rep) && !r.at(rep, fieldAddresses).changed() && !r.at(rep, fieldHostname).changed() {
			reference = rep
			break
		}
	}
	hostnames := r.at(reference, fieldHostname).in
	for _, rep := range complete {
		if r.at(rep, fieldHostname).in == hostnames {
			continue
		}
		has, have := "addresses", "host names"
		if !hostnames {
			has, have = "a hostname", "addresses"
		}
		p.retract(r, rep, fmt.Sprintf("replica %s has %s while others have %s: all of a registry's replicas have addresses, or all have host names",
			rep.region, has, have), r.at(rep, fieldAddresses), r.at(rep, fieldHostname))
		return true
	}
	return false
}

// settleEndpoints sees to it that no two replicas are one server; an endpoint that did not change has the older right.
func (p *parsing) settleEndpoints(r *registryCells, complete []*replicaCells) bool {
	owner := map[string]*replicaCells{}
	for _, older := range []bool{true, false} {
		for _, rep := range complete {
			c := r.at(rep, fieldEndpoint)
			if older != (r.served(rep) && !c.changed()) {
				continue
			}
			u, err := parseEndpoint(c.use)
			if err != nil {
				continue
			}
			if first, taken := owner[hostPort(u)]; taken {
				p.retract(r, rep, fmt.Sprintf("is the endpoint of replica %s too: two replicas cannot be one server", first.region), c)
				return true
			}
			owner[hostPort(u)] = rep
		}
	}
	return false
}

// settleRules refuses new rules that name regions without a replica. A rule that was good and whose region left keeps
// naming it; so does a new one with no last good value, as long as it names a replica at all. Such regions are passed over.
func (p *parsing) settleRules(r *registryCells) {
	for _, c := range r.rules {
		if r.left || !c.in {
			continue
		}
		names, _ := ParseRegions(c.use)
		absent := slices.DeleteFunc(slices.Clone(names), r.declared)
		if len(absent) == 0 {
			continue
		}
		reason := fmt.Sprintf("names %s, which has no replica here", strings.Join(absent, ", "))
		if near, ok := nearmiss.Of(absent[0], slices.DeleteFunc(r.regions(), func(n string) bool { return !r.declared(n) })); ok {
			reason += fmt.Sprintf("; did you mean %s?", near)
		}
		value, effect := c.key.shown(c.use), "the region is passed over"
		switch {
		case c.changed() && c.inLast:
			c.revert()
			effect = c.kept()
		case c.changed() && len(absent) == len(names):
			c.revert()
			effect = "this rule is left out"
		}
		p.problem(c.key.String(), value, reason, effect)
	}
}

// settleNames sees to it that a client name leads to one registry; a list that did not change has the older right.
func (p *parsing) settleNames(names []string) bool {
	owner := map[string]string{}
	for _, changed := range []bool{false, true} {
		for _, name := range names {
			r := p.registries[name]
			c := r.field(fieldNames)
			if r.left || !c.in || c.changed() != changed {
				continue
			}
			list, _ := parseNames(c.use)
			for _, n := range list {
				first, taken := owner[n]
				if taken && first != name {
					value := c.use
					if c.changed() {
						c.revert()
					} else {
						c.in = false
					}
					p.problem(c.key.String(), c.key.shown(value), fmt.Sprintf("%s is a client name of registry %s already", n, first), c.kept())
					return true
				}
				owner[n] = name
			}
		}
	}
	return false
}

// build makes the snapshot of what is in use.
func (p *parsing) build(names []string) (*Snapshot, Values) {
	s, good := &Snapshot{}, Values{}
	keep := func(cells map[string]*cell) {
		for _, c := range cells {
			if c.in && c.key.field != fieldRamp { // which is something under way, not to be gone back to
				good[c.key.String()] = c.use
			}
		}
	}
	for _, name := range names {
		r := p.registries[name]
		if r.left {
			continue
		}
		registry := &Registry{Name: name, Home: r.field(fieldHome).use, Policy: r.policy()}
		registry.ClientNames, _ = parseNames(r.field(fieldNames).use)
		keep(r.cells)
		for _, region := range r.regions() {
			rep := r.replicas[region]
			if !r.declared(region) {
				continue
			}
			if r.complete(rep) {
				registry.Replicas = append(registry.Replicas, r.replica(rep))
				keep(rep.cells)
				continue
			}
			registry.Incomplete = append(registry.Incomplete, region)
			if rep.known && !rep.spoiled { // it may come back
				keep(rep.cells)
			}
			p.notServed(r, rep)
		}
		for _, c := range r.rules {
			if !c.in {
				continue
			}
			good[c.key.String()] = c.use
			named, _ := ParseRegions(c.use)
			rule := Rule{Match: c.key.match, Regions: slices.DeleteFunc(named, func(n string) bool { return !r.declared(n) })}
			if c.key.field == "fences" {
				registry.Fences = append(registry.Fences, rule)
			} else if len(rule.Regions) > 0 {
				registry.Orders = append(registry.Orders, rule)
			}
		}
		byMatch := func(a, b Rule) int { return a.Match.compare(b.Match) }
		slices.SortFunc(registry.Orders, byMatch)
		slices.SortFunc(registry.Fences, byMatch)
		s.Registries = append(s.Registries, registry)
	}
	slices.SortFunc(p.problems, func(a, b Problem) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.Reason, b.Reason), strings.Compare(a.Effect, b.Effect))
	})
	s.Problems, s.good = p.problems, good
	s.Digest = digest(s.Registries)
	return s, good
}

// notServed says of a replica that is left out what it lacks, unless what stands there was refused, and that it is left out.
func (p *parsing) notServed(r *registryCells, rep *replicaCells) {
	prefix, effect := ReplicaPrefix(r.name, rep.region), "replica "+rep.region+" is not served"
	f, reason := r.missing(rep)
	named := f == ""
	for i := range p.problems {
		q := &p.problems[i]
		if at, ok := strings.CutPrefix(q.Key, prefix); ok {
			q.Effect = effect
			named = named || at == f || f == fieldAddresses && at == fieldHostname
		}
	}
	if !named {
		p.problem(prefix+f, "", reason, effect)
	}
}

// or returns the value of a field, or its default.
func (c *cell) or() string {
	if c.in {
		return c.use
	}
	return defaults[c.key.field]
}

func (r *registryCells) policy() Policy {
	allDown, _ := parseAllDown(r.field(fieldAllDown).or())
	maxLag, _ := parseMaxLag(r.field(fieldMaxLag).or())
	return Policy{
		AllDown:     allDown,
		MaxLag:      maxLag,
		Replication: r.field(fieldReplication).or() == "enabled",
		Merge:       Merge(r.field(fieldMerge).or()),
		Conflicts:   Conflicts(r.field(fieldConflicts).or()),
		Untagged:    Untagged(r.field(fieldUntagged).or()),
		Deletes:     Deletes(r.field(fieldDeletes).or()),
	}
}

// replica builds a complete replica; its values were checked.
func (r *registryCells) replica(p *replicaCells) *Replica {
	rep := &Replica{Region: p.region, Access: Access{
		Credentials: r.at(p, fieldCredentials).use, CA: r.at(p, fieldCA).use, ClientCert: r.at(p, fieldClientCert).use, Prefix: r.at(p, fieldPrefix).use,
		Realms: joinList(splitList(r.at(p, fieldRealms).use)),
	}}
	var err error
	if rep.Endpoint, err = parseEndpoint(r.at(p, fieldEndpoint).use); err != nil {
		rep.Endpoint = &url.URL{}
	}
	if c := r.at(p, fieldHostname); c.in {
		rep.Hostname, _ = parseHostname(c.use)
	} else {
		rep.Addresses, _ = parseAddresses(r.at(p, fieldAddresses).use)
	}
	if c := r.at(p, fieldLocation); c.in {
		rep.Location, _ = parseLocation(c.use)
	} else {
		region, _ := regions.Lookup(p.region)
		rep.Location = Coordinates{Latitude: region.Latitude, Longitude: region.Longitude}
	}
	rep.Weight, _ = parseWeight(r.at(p, fieldWeight).or())
	rep.Routing = r.at(p, fieldRouting).or() == "enabled"
	rep.Canary, _ = parseCanary(r.at(p, fieldCanary).use)
	rep.Probe, _ = parseProbe(r.at(p, fieldProbe).use, rep.Endpoint.Scheme)
	return rep
}

// digest is the SHA-256 of a fixed text of what registries mean, in hexadecimal.
func digest(registries []*Registry) string {
	h := sha256.New()
	list := func(what string, words []string) { fmt.Fprintf(h, "%s %q\n", what, words) }
	for _, r := range registries {
		fmt.Fprintf(h, "registry %q home %q policy %+v\n", r.Name, r.Home, r.Policy)
		list("names", r.ClientNames)
		list("incomplete", r.Incomplete)
		for _, rule := range r.Orders {
			list("order "+rule.Match.String(), rule.Regions)
		}
		for _, rule := range r.Fences {
			list("fence "+rule.Match.String(), rule.Regions)
		}
		for _, p := range r.Replicas {
			fmt.Fprintf(h, "replica %q endpoint %q addresses %v hostname %q location %v weight %d routing %t probe %+v access %q\n",
				p.Region, p.Endpoint, p.Addresses, p.Hostname, p.Location, p.Weight, p.Routing, p.Probe,
				[]string{p.Access.Credentials, p.Access.CA, p.Access.ClientCert, p.Access.Prefix, p.Access.Realms})
			if p.Canary != (Canary{}) {
				fmt.Fprintf(h, "canary %q\n", p.Canary)
			}
		}
	}
	_, _ = io.WriteString(h, "end\n")
	return hex.EncodeToString(h.Sum(nil))
}
