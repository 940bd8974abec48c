package topology

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

// Document is the topology as one tree for people and for the API: topology.yaml and its JSON form. It holds the same
// values as the keys, and no more: an absent field is an absent key.
type Document struct {
	Registries []RegistryDocument `json:"registries" yaml:"registries"`
}

// RegistryDocument is one registry of a Document.
type RegistryDocument struct {
	Name     string            `json:"name" yaml:"name"`
	Home     string            `json:"home" yaml:"home"`
	Names    []string          `json:"names,omitempty" yaml:"names,flow,omitempty"`
	Policy   PolicyDocument    `json:"policy,omitzero" yaml:"policy,flow,omitempty"`
	Orders   RulesDocument     `json:"orders,omitzero" yaml:"orders,omitempty"`
	Fences   RulesDocument     `json:"fences,omitzero" yaml:"fences,omitempty"`
	Replicas []ReplicaDocument `json:"replicas" yaml:"replicas"`
}

// PolicyDocument holds the policies as they are written in keys; an empty one is the default.
type PolicyDocument struct {
	AllDown     string `json:"all_down,omitempty" yaml:"all_down,omitempty"`       // nearest, none, cname:HOSTNAME
	Replication string `json:"replication,omitempty" yaml:"replication,omitempty"` // enabled, disabled
	MaxLag      string `json:"max_lag,omitempty" yaml:"max_lag,omitempty"`         // a duration
	Merge       string `json:"merge,omitempty" yaml:"merge,omitempty"`             // ask, home
	Conflicts   string `json:"conflicts,omitempty" yaml:"conflicts,omitempty"`     // keep, log
	Untagged    string `json:"untagged,omitempty" yaml:"untagged,omitempty"`       // keep, tags-only
	Deletes     string `json:"deletes,omitempty" yaml:"deletes,omitempty"`         // propagate, ignore
}

// RulesDocument holds orders or fences: for each match the regions.
type RulesDocument struct {
	Prefix    map[string][]string `json:"prefix,omitempty" yaml:"prefix,omitempty"`
	ASN       map[string][]string `json:"asn,omitempty" yaml:"asn,omitempty"`
	Country   map[string][]string `json:"country,omitempty" yaml:"country,omitempty"`
	Continent map[string][]string `json:"continent,omitempty" yaml:"continent,omitempty"`
}

// of returns the rules of one kind of match.
func (d *RulesDocument) of(kind string) *map[string][]string {
	switch kind {
	case "prefix":
		return &d.Prefix
	case "asn":
		return &d.ASN
	case "country":
		return &d.Country
	}
	return &d.Continent
}

// ReplicaDocument is one replica of a RegistryDocument.
type ReplicaDocument struct {
	Region    string   `json:"region" yaml:"region"`
	Endpoint  string   `json:"endpoint,omitempty" yaml:"endpoint,omitempty"`
	Addresses []string `json:"addresses,omitempty" yaml:"addresses,flow,omitempty"`
	Hostname  string   `json:"hostname,omitempty" yaml:"hostname,omitempty"`
	// Location is latitude and longitude in decimal degrees; absent: where the catalogue has the region.
	Location []float64 `json:"location,omitempty" yaml:"location,flow,omitempty"`
	// Weight is 0 to 100; absent: 100.
	Weight *int `json:"weight,omitempty" yaml:"weight,omitempty"`
	// Routing is enabled or disabled; absent: enabled.
	Routing     string         `json:"routing,omitempty" yaml:"routing,omitempty"`
	Health      HealthDocument `json:"health,omitzero" yaml:"health,flow,omitempty"`
	Credentials string         `json:"credentials,omitempty" yaml:"credentials,omitempty"`
	CA          string         `json:"ca,omitempty" yaml:"ca,omitempty"`
	ClientCert  string         `json:"client_cert,omitempty" yaml:"client_cert,omitempty"`
	Prefix      string         `json:"prefix,omitempty" yaml:"prefix,omitempty"`
	Realms      string         `json:"realms,omitempty" yaml:"realms,omitempty" example:"auth.contoso.com,token.contoso.com"`
}

// HealthDocument says how the health of a replica is known.
type HealthDocument struct {
	Probe  string `json:"probe,omitempty" yaml:"probe,omitempty"`   // https, http, tcp, consul:SERVICE, none
	Canary string `json:"canary,omitempty" yaml:"canary,omitempty"` // REPOSITORY:TAG
}

// scalars are the plain fields of a replica by the end of their key, in the order of the document.
func (d *ReplicaDocument) scalars() []scalar {
	return []scalar{{fieldEndpoint, &d.Endpoint}, {fieldHostname, &d.Hostname}, {fieldRouting, &d.Routing}, {fieldProbe, &d.Health.Probe}, {fieldCanary, &d.Health.Canary},
		{fieldCredentials, &d.Credentials}, {fieldCA, &d.CA}, {fieldClientCert, &d.ClientCert}, {fieldPrefix, &d.Prefix}, {fieldRealms, &d.Realms}}
}

// scalars are the plain fields of a registry.
func (d *RegistryDocument) scalars() []scalar {
	return []scalar{{fieldHome, &d.Home}, {fieldAllDown, &d.Policy.AllDown}, {fieldReplication, &d.Policy.Replication},
		{fieldMaxLag, &d.Policy.MaxLag}, {fieldMerge, &d.Policy.Merge}, {fieldConflicts, &d.Policy.Conflicts}, {fieldUntagged, &d.Policy.Untagged}, {fieldDeletes, &d.Policy.Deletes}}
}

// Naming are the orders and fences that name a region, as they stand in keys below the registry's, sorted: orders/country/BR.
func (d *RegistryDocument) Naming(region string) []string {
	var names []string
	for _, kind := range ruleKinds {
		for _, match := range matchKinds {
			for text, regions := range *d.rules(kind).of(match) {
				if slices.Contains(regions, region) {
					names = append(names, kind+"/"+match+"/"+strings.Replace(text, "/", "_", 1))
				}
			}
		}
	}
	slices.Sort(names)
	return names
}

type scalar struct {
	field string
	value *string
}

func (d *RegistryDocument) rules(kind string) *RulesDocument {
	if kind == "fences" {
		return &d.Fences
	}
	return &d.Orders
}

// outline is a document as keys, with the way back.
type outline struct {
	values Values
	paths  map[string]string // by key, and by the beginning of the keys of a registry or replica
	faults []Fault
	bare   []string // the endpoints of replicas that have no key at all, so that no parse could see them
}

func (o *outline) fault(path, value, format string, args ...any) {
	o.faults = append(o.faults, Fault{Path: path, Value: clip(value), Reason: fmt.Sprintf(format, args...)})
}

func (o *outline) put(k key, path, value string) {
	o.values[k.String()] = strings.TrimSpace(value)
	o.paths[k.String()] = path
}

// list joins the elements of a list; one that would fall apart again otherwise is a fault.
func (o *outline) list(path string, parts []string) string {
	for i, part := range parts {
		if strings.TrimSpace(part) == "" {
			o.fault(path, part, "element %d is empty", i+1)
		} else if strings.Contains(part, ",") {
			o.fault(path, part, "%q holds a comma: write one element for each", clip(part))
		}
	}
	return joinList(parts)
}

// outline turns d into keys. Names that no key can have are left out, as is the second of two that are the same.
func (d *Document) outline() outline {
	o := outline{values: Values{}, paths: map[string]string{}}
	seen := map[string]bool{}
	for i := range d.Registries {
		r := &d.Registries[i]
		at := fmt.Sprintf("registries[%d]", i)
		if checkLabel(r.Name) != nil || seen[r.Name] {
			continue
		}
		seen[r.Name] = true
		o.paths[registryPrefix(r.Name)] = at
		for _, s := range r.scalars() {
			if *s.value != "" {
				o.put(key{registry: r.Name, field: s.field}, at+"."+strings.ReplaceAll(s.field, "/", "."), *s.value)
			}
		}
		if len(r.Names) > 0 {
			o.put(key{registry: r.Name, field: fieldNames}, at+".names", o.list(at+".names", r.Names))
		}
		for _, kind := range ruleKinds {
			for _, match := range matchKinds {
				rules := *r.rules(kind).of(match)
				for _, text := range slices.Sorted(maps.Keys(rules)) {
					path := at + "." + kind + "." + match + "." + text
					m, err := parseMatch(match, text)
					if err != nil {
						o.fault(path, text, "%v", err)
						continue
					}
					o.put(key{registry: r.Name, field: kind, match: m}, path, o.list(path, rules[text]))
				}
			}
		}
		o.replicas(r, at)
	}
	return o
}

func (o *outline) replicas(r *RegistryDocument, at string) {
	seen := map[string]bool{}
	for j := range r.Replicas {
		p := &r.Replicas[j]
		at := fmt.Sprintf("%s.replicas[%d]", at, j)
		if checkLabel(p.Region) != nil || seen[p.Region] {
			continue
		}
		seen[p.Region] = true
		o.paths[ReplicaPrefix(r.Name, p.Region)] = at
		before := len(o.values)
		put := func(field, value string) {
			o.put(key{registry: r.Name, region: p.Region, field: field}, at+"."+strings.ReplaceAll(field, "/", "."), value)
		}
		for _, s := range p.scalars() {
			if *s.value != "" {
				put(s.field, *s.value)
			}
		}
		if len(p.Addresses) > 0 {
			put(fieldAddresses, o.list(at+".addresses", p.Addresses))
		}
		if p.Location != nil {
			parts := make([]string, len(p.Location))
			for i, v := range p.Location {
				parts[i] = strconv.FormatFloat(v, 'f', -1, 64)
			}
			put(fieldLocation, joinList(parts))
		}
		if p.Weight != nil {
			put(fieldWeight, strconv.Itoa(*p.Weight))
		}
		if len(o.values) == before {
			o.fault(at+".endpoint", "", missingEndpoint)
			o.bare = append(o.bare, ReplicaPrefix(r.Name, p.Region)+fieldEndpoint)
		}
	}
}

// path is where in the document a key's value stands, or would stand.
func (o *outline) path(k string) string {
	if p, ok := o.paths[k]; ok {
		return p
	}
	for i := len(k) - 1; i > 0; i-- {
		if p, ok := o.paths[k[:i]]; ok && k[i-1] == '/' {
			if rest := strings.TrimSuffix(k[i:], "/"); rest != "" {
				return p + "." + strings.ReplaceAll(rest, "/", ".")
			}
			return p
		}
	}
	return k
}

// Values returns the document as keys. What cannot be a key is left out: Validate first.
func (d *Document) Values() Values {
	o := d.outline()
	return o.values
}

// Validate returns nil or an *InvalidError with everything that is wrong with d, named by path. Here nothing is kept or left
// out: a replica that cannot be served is a fault. reserved are labels that neither a registry nor a region may have.
func (d *Document) Validate(reserved ...string) error {
	return d.validateOver(nil, reserved)
}

// validateOver is Validate, but that a rule may name regions without a replica where stored has that very rule and none of these replicas
// either: they are passed over there, and to leave it as it is does no harm.
func (d *Document) validateOver(stored Values, reserved []string) error {
	faults, dangling := d.faults(reserved)
	values := d.Values()
	for _, name := range slices.Sorted(maps.Keys(dangling)) {
		k, _ := parseKey(name)
		has := declaredRegions(values, k.registry)
		gone := func(region string) bool { return !slices.Contains(has, region) }
		brings := slices.ContainsFunc(declaredRegions(stored, k.registry), func(region string) bool {
			return gone(region) && slices.Contains(splitList(values[name]), region)
		})
		if brings || k.meaning(stored) != k.meaning(values) {
			faults = append(faults, dangling[name])
		}
	}
	if len(faults) == 0 {
		return nil
	}
	return &InvalidError{Faults: faults}
}

// faults are all that is wrong with d; apart from the others, by their keys, those of rules that name regions without a replica.
func (d *Document) faults(reserved []string) (faults []Fault, dangling map[string]Fault) {
	named, unsure, faults := d.named()
	dangling = map[string]Fault{}
	o := named.outline()
	faults = append(faults, o.faults...)
	for i := range named.Registries {
		prefix, at := registryPrefix(named.Registries[i].Name), fmt.Sprintf("registries[%d]", i)
		if o.paths[prefix] == at && !o.values.has(prefix) { // no key, so Parse cannot see that it is there
			faults = append(faults, Fault{Path: at + ".home", Reason: missingHome})
		}
	}
	values := maps.Clone(o.values)
	for _, name := range o.bare {
		mend(values, name)
	}
	for _, p := range problems(values, reserved) {
		k, err := parseKey(p.Key)
		if err == nil && unsure[k.registry] && k.namesRegions() && k.check(p.Value) == nil {
			continue
		}
		fault := Fault{Path: o.path(p.Key), Value: p.Value, Reason: p.Reason}
		if err == nil && k.isRule() && k.check(o.values[p.Key]) == nil {
			dangling[p.Key] = fault
			continue
		}
		faults = append(faults, fault)
	}
	return faults, dangling
}

// named is d with a name in the place of each that is none, or another's, so that what else is wrong can be seen; the faults are of
// those. unsure are the registries, by their names in named, of which not all regions are known: one that is named may be there.
func (d *Document) named() (named Document, unsure map[string]bool, faults []Fault) {
	named, unsure = Document{Registries: slices.Clone(d.Registries)}, map[string]bool{}
	unnamed := func(i int) string { return fmt.Sprintf("unnamed-%d", i) }
	// called reports whether a name is one, and the first of its kind: those before it are in seen.
	called := func(path, name string, seen map[string]int, i int, twice string) bool {
		reason := ""
		if first, again := seen[name]; again {
			reason = fmt.Sprintf(twice, name, first)
		} else if err := checkLabel(name); err != nil {
			reason = err.Error()
		} else {
			seen[name] = i
			return true
		}
		faults = append(faults, Fault{Path: path, Value: clip(name), Reason: reason})
		return false
	}
	registries := map[string]int{}
	for i := range named.Registries {
		r := &named.Registries[i]
		at := fmt.Sprintf("registries[%d]", i)
		if !called(at+".name", r.Name, registries, i, "registry %s stands there twice: registries[%d] has that name too") {
			r.Name = unnamed(i)
		}
		if len(r.Replicas) == 0 {
			faults = append(faults, Fault{Path: at + ".replicas", Reason: "is missing: at least the replica of the home region is needed"})
			unsure[r.Name] = true
		}
		r.Replicas = slices.Clone(r.Replicas)
		regions := map[string]int{}
		for j := range r.Replicas {
			p := &r.Replicas[j]
			path := fmt.Sprintf("%s.replicas[%d].region", at, j)
			if !called(path, p.Region, regions, j, "region %s stands there twice: replicas[%d] is there too") {
				p.Region, unsure[r.Name] = unnamed(j), true
				if p.Location == nil {
					p.Location = []float64{0, 0} // the right name may have one
				}
			}
		}
	}
	return named, unsure, faults
}

// problems are all that is wrong with values, also what stands in the shadow of something else: a replica with a bad address may
// have the endpoint of another besides. What a parse refuses is mended, somehow, until it refuses nothing more.
func problems(values Values, reserved []string) []Problem {
	// Nothing else is wrong only because a name is reserved.
	snapshot, _ := Parse(values, nil, reserved)
	all := slices.DeleteFunc(snapshot.Problems, func(p Problem) bool { return !strings.HasSuffix(p.Key, "/") })
	values = maps.Clone(values)
	for range mendings {
		snapshot, _ := Parse(values, nil, nil)
		fresh := slices.DeleteFunc(snapshot.Problems, func(p Problem) bool {
			return slices.ContainsFunc(all, func(q Problem) bool { return q.Key == p.Key && q.Reason == p.Reason })
		})
		if len(fresh) == 0 {
			break
		}
		all = append(all, fresh...)
		for _, p := range fresh {
			mend(values, p.Key)
		}
	}
	return all
}

// mendings is more than there can be in each other's shadow: of a replica the three things that it needs, what they are, both
// addresses and a host name, the kind of the others, another's endpoint.
const mendings = 8

// mend puts something in the place of what is wrong at a key, or missing, that is right beside the other values.
func mend(values Values, name string) {
	k, err := parseKey(name)
	if err != nil {
		return
	}
	prefix := ReplicaPrefix(k.registry, k.region)
	value, there := values[name]
	switch k.field {
	case fieldHome:
		if regions := declaredRegions(values, k.registry); len(regions) > 0 {
			values[name] = regions[0]
		}
	case fieldEndpoint:
		values[name] = "https://" + k.region + ".invalid"
	case fieldLocation:
		values[name] = "0,0"
	case fieldAddresses, fieldHostname:
		kind := k.field
		if !there || k.check(value) == nil {
			delete(values, prefix+fieldAddresses)
			delete(values, prefix+fieldHostname)
			kind = leadingKind(values, k.registry)
		}
		values[prefix+kind] = map[string]string{fieldAddresses: "192.0.2.1", fieldHostname: "mended.invalid"}[kind]
	default:
		delete(values, name)
	}
}

// declaredRegions are those of a registry of which there is any key, sorted.
func declaredRegions(values Values, registry string) []string {
	set := map[string]struct{}{}
	for name := range values {
		if rest, ok := strings.CutPrefix(name, registryPrefix(registry)+"replicas/"); ok {
			region, _, _ := strings.Cut(rest, "/")
			set[region] = struct{}{}
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// leadingKind is what the others have to have too: what the home has, else the first that has anything.
func leadingKind(values Values, registry string) string {
	for _, region := range append([]string{values[registryPrefix(registry)+fieldHome]}, declaredRegions(values, registry)...) {
		for _, kind := range []string{fieldAddresses, fieldHostname} {
			if _, ok := values[ReplicaPrefix(registry, region)+kind]; ok {
				return kind
			}
		}
	}
	return fieldAddresses
}

// documentOf is the way back from keys. Keys and values that cannot be used are left out; the registry or replica that has
// them is there all the same.
func documentOf(values Values) Document {
	registries := map[string]*RegistryDocument{}
	replicas := map[string]*ReplicaDocument{}
	order := map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(values)) {
		k, err := parseKey(name)
		value := values[name]
		if err != nil {
			continue
		}
		bad := k.check(value) != nil
		r := registries[k.registry]
		if r == nil {
			r = &RegistryDocument{Name: k.registry}
			registries[k.registry] = r
		}
		switch {
		case k.region != "":
			id := ReplicaPrefix(k.registry, k.region)
			p := replicas[id]
			if p == nil {
				p = &ReplicaDocument{Region: k.region}
				replicas[id] = p
				order[k.registry] = append(order[k.registry], id)
			}
			if !bad {
				p.set(k.field, value)
			}
		case bad:
		case k.isRule():
			rules := r.rules(k.field).of(k.match.kind())
			if *rules == nil {
				*rules = map[string][]string{}
			}
			(*rules)[k.match.text()] = splitList(value)
		case k.field == fieldNames:
			r.Names = splitList(value)
		default:
			for _, s := range r.scalars() {
				if s.field == k.field {
					*s.value = value
				}
			}
		}
	}
	d := Document{Registries: []RegistryDocument{}}
	for _, name := range slices.Sorted(maps.Keys(registries)) {
		r := registries[name]
		r.Replicas = []ReplicaDocument{}
		for _, id := range order[name] {
			r.Replicas = append(r.Replicas, *replicas[id])
		}
		d.Registries = append(d.Registries, *r)
	}
	return d
}

func (d *ReplicaDocument) set(field, value string) {
	switch field {
	case fieldAddresses:
		d.Addresses = splitList(value)
	case fieldLocation:
		if c, err := parseLocation(value); err == nil {
			d.Location = []float64{c.Latitude, c.Longitude}
		}
	case fieldWeight:
		if n, err := parseWeight(value); err == nil {
			d.Weight = &n
		}
	default:
		for _, s := range d.scalars() {
			if s.field == field {
				*s.value = value
			}
		}
	}
}

// Document returns what operators declared of what is served: a replica that is not complete is left out, and so are the regions without one
// in orders and fences, for a store that has nothing. But a fence that leaves nobody binds, too: it stays, and is to be mended by whoever
// applies the document. Of a weight with a ramp it has the one that it leads to.
func (s *Snapshot) Document() Document {
	values := s.good.arrived(slices.Concat(s.Ramps, s.overtaken))
	for name, value := range values {
		k, err := parseKey(name)
		if err != nil {
			continue
		}
		r := s.Registry(k.registry)
		switch {
		case k.region != "" && r.Replica(k.region) == nil:
			delete(values, name)
		case k.isRule():
			served := slices.DeleteFunc(splitList(value), func(region string) bool { return r.Replica(region) == nil })
			switch {
			case len(served) > 0:
				values[name] = joinList(served)
			case k.field != "fences":
				delete(values, name)
			}
		}
	}
	return documentOf(values)
}

// String is the policy as it stands in a key.
func (a AllDown) String() string {
	switch a.Mode {
	case AllDownNone:
		return "none"
	case AllDownCNAME:
		return "cname:" + a.Target
	}
	return "nearest"
}

// String is the probe as it stands in a key.
func (p Probe) String() string {
	switch p.Mode {
	case ProbeHTTP:
		return "http"
	case ProbeTCP:
		return "tcp"
	case ProbeConsul:
		return "consul:" + p.Service
	case ProbeNone:
		return "none"
	}
	return "https"
}

// String is the place as it stands in a key: latitude,longitude.
func (c Coordinates) String() string {
	return strconv.FormatFloat(c.Latitude, 'f', -1, 64) + "," + strconv.FormatFloat(c.Longitude, 'f', -1, 64)
}

// ChangeOp says what becomes of a key.
type ChangeOp string

// The values of ChangeOp.
const (
	Added   ChangeOp = "added"
	Removed ChangeOp = "removed"
	Changed ChangeOp = "changed"
	// Kept is a replica that the document does not name and that stays all the same; the key is the replica's, with a slash
	// at its end.
	Kept ChangeOp = "kept"
	// Leaving is a replica that the document does not name and whose deletion has begun before; the key as of Kept.
	Leaving ChangeOp = "leaving"
)

// Change is one difference between two documents.
type Change struct {
	Op  ChangeOp `json:"op"`
	Key string   `json:"key"`
	Old string   `json:"old,omitempty"`
	New string   `json:"new,omitempty"`
}

// String is the change in one line, as diff prints it.
func (c Change) String() string {
	switch c.Op {
	case Added:
		return "+ " + c.Key + ": " + c.New
	case Removed:
		return strings.TrimSuffix("- "+c.Key+": "+c.Old, ": ")
	case Kept:
		return "= " + c.Key + " (not in the document; --prune removes it)"
	case Leaving:
		return "= " + c.Key + " (not in the document; it is being deleted)"
	}
	return "~ " + c.Key + ": " + c.Old + " -> " + c.New
}

// Diff returns what makes b of a, sorted by key. Two ways to write one meaning are no difference: an absent key and its
// default, 4.9 and 4.90. Values that may hold secrets are not shown.
func Diff(a, b Document) []Change { return diffValues(a.Values(), b.Values()) }

func diffValues(a, b Values) []Change {
	var changes []Change
	all := map[string]struct{}{}
	for k := range a {
		all[k] = struct{}{}
	}
	for k := range b {
		all[k] = struct{}{}
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		k, err := parseKey(name)
		va, ina := a[name]
		vb, inb := b[name]
		if err == nil {
			ma, mb := k.meaning(a), k.meaning(b)
			if ina == inb && ma == mb || ma == mb && ma != "" {
				continue
			}
		} else if ina == inb && va == vb {
			continue
		}
		c := Change{Op: Changed, Key: name, Old: k.shown(va), New: k.shown(vb)}
		if !ina {
			c.Op = Added
		} else if !inb {
			c.Op = Removed
		}
		changes = append(changes, c)
	}
	return changes
}

// meaning is the value of k in values in its one usual form, or its default; empty if it has none.
func (k key) meaning(values Values) string {
	value, ok := values[k.String()]
	if !ok {
		if k.field != fieldProbe {
			return defaults[k.field]
		}
		endpoint, err := parseEndpoint(values[ReplicaPrefix(k.registry, k.region)+fieldEndpoint])
		if err != nil {
			return ""
		}
		p, _ := parseProbe("", endpoint.Scheme)
		return p.String()
	}
	if k.check(value) != nil {
		return value
	}
	switch k.field {
	case fieldNames:
		names, _ := parseNames(value)
		return joinList(names)
	case fieldAllDown:
		a, _ := parseAllDown(value)
		return a.String()
	case fieldMaxLag:
		d, _ := parseMaxLag(value)
		return d.String()
	case fieldEndpoint:
		u, _ := parseEndpoint(value)
		return u.String()
	case fieldAddresses:
		addrs, _ := parseAddresses(value)
		words := make([]string, len(addrs))
		for i, a := range addrs {
			words[i] = a.String()
		}
		return joinList(words)
	case fieldHostname:
		name, _ := parseHostname(value)
		return name
	case fieldLocation:
		c, _ := parseLocation(value)
		return c.String()
	case fieldRealms, "orders", "fences":
		return joinList(splitList(value))
	}
	return value
}
