package dns

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/router"
	"portolan/topology"
)

// zone is everything that answers come from at one moment. It is immutable.
type zone struct {
	wire   []byte // the zone's name, lower case
	labels int
	// names are those that do not come from the static records alone: what all of them have, these included.
	names
	static *static
	// soa is the authority section of negative answers, passing that of those which other clients do not get: many caches keep
	// negative answers for all of their clients, whatever the scope (RFC 7871, section 7.4), so these are not to be kept at all.
	soa, passing packed
	glue         packed // the addresses of name servers in the zone, for the additional section
	hinfo        rrset  // the answer to ANY (RFC 8482, section 4.2)
	serial       uint32
	whoami       Whoami
	topology     string // its digest, for whoami to tell
	max          uint32 // for whoami to tell
	min          uint32
}

// names are names that exist, empty non-terminals included.
type names struct {
	nodes map[string]*node // by base.relative
	depth int              // the most labels of any key
}

// node is a name.
type node struct {
	sets     []rrset // sorted by type; a CNAME stands alone
	wildcard *node   // the "*" below
	dynamic  *dynamic
	whoami   *dynamic
}

// packed is a run of records. The owner of each is a pointer to the question's name, where zoneOwner does not say otherwise.
type packed struct {
	count uint16
	body  []byte
	// zoneOwner is whether the record belongs to the zone's own name, which the responder finds at the end of the question's
	// name: the first two bytes of body are a pointer that it has to fill in. Only single records (the SOA) have it.
	zoneOwner bool
}

// rrset is the packed answer for one type.
type rrset struct {
	rrtype uint16
	packed
	// stride is the size of each record where they may be rotated, all being of one size; else 0.
	stride uint16
}

// both is an rrset with TTL min and with TTL max.
type both [2]rrset

// of is the form for a decision.
func (b *both) of(settled bool) *rrset {
	if settled {
		return &b[1]
	}
	return &b[0]
}

// dynamic is a registry's name: what it answers depends on the client.
type dynamic struct {
	name     string
	registry *router.Registry
	replicas []served
	fallback both // the CNAME of the all-down policy
	// varies is whether some decision of this registry has another answer than no record, for A, for AAAA and for other
	// types. Where none has, the answer is the same for all clients, needs no decision, and its scope is 0.
	varies [3]bool
	none   *counter
}

// The indexes of dynamic.varies.
const (
	variesA = iota
	variesAAAA
	variesOther
)

// hostnames is whether the replicas are host names: then a CNAME is the answer for every type, and nothing can stand beside
// it (RFC 1034, section 3.6.2).
func (d *dynamic) hostnames() bool {
	return slices.ContainsFunc(d.replicas, func(s served) bool { return s.cname[0].count > 0 })
}

// served is one replica's part in the answers.
type served struct {
	a, aaaa, cname both
	count          *counter
}

// compile packs the zone of s. It names what of s or of static cannot be served, and leaves that out.
func (b *base) compile(s *topology.Snapshot, r *router.Router, conditions router.Conditions, static *static, m *metrics) (*zone, []topology.Problem) {
	z := &zone{
		wire: b.wire, labels: b.labels, names: names{nodes: make(map[string]*node)}, static: static,
		whoami: b.whoami, topology: s.Digest, min: b.min, max: b.max, serial: serial(s.Changed),
	}
	var problems []topology.Problem

	soa := &mdns.SOA{
		Hdr: header(b.origin, mdns.TypeSOA, b.min), Ns: b.mname, Mbox: b.rname, Serial: z.serial,
		// There are no secondaries that transfer: these are the customary values (RIPE-203), which only tools look at.
		Refresh: 86400, Retry: 7200, Expire: 3600000, Minttl: b.min,
	}
	apex := z.node(b.origin, b)
	apex.add(pack(mdns.TypeSOA, soa))
	z.soa = pack(mdns.TypeSOA, soa).packed
	soa.Hdr.Ttl = 0
	z.passing = pack(mdns.TypeSOA, soa).packed
	z.soa.zoneOwner, z.passing.zoneOwner = true, true
	ns := make([]mdns.RR, 0, len(b.nameservers))
	for _, name := range b.nameservers {
		ns = append(ns, &mdns.NS{Hdr: header(b.origin, mdns.TypeNS, b.max), Ns: name})
		n := z.nodeInside(name, b)
		if n == nil {
			continue
		}
		v4, v6 := split(b.glue[name], nil)
		n.add(packAddresses(mdns.TypeA, v4, b.max))
		n.add(packAddresses(mdns.TypeAAAA, v6, b.max))
	}
	apex.add(pack(mdns.TypeNS, ns...))
	z.glue = b.packGlue()
	z.hinfo = pack(mdns.TypeHINFO, &mdns.HINFO{Hdr: header(b.origin, mdns.TypeHINFO, b.max), Cpu: "RFC8482"})

	for _, registry := range s.Registries {
		name := registry.Name + "." + b.origin
		reason := ""
		if _, taken := b.glue[name]; taken {
			reason = "the name is that of a name server of the zone"
		} else if _, err := hostName("whoami." + name); err != nil {
			reason = fmt.Sprintf("whoami.%s is no name: %v", name, err)
		}
		if reason != "" {
			problems = append(problems, topology.Problem{
				Key: topology.RegistriesPrefix + registry.Name, Value: registry.Name, Reason: reason, Effect: "the registry is not served by DNS",
			})
			continue
		}
		compiled, ok := r.Registry(registry.Name)
		if !ok {
			continue // a router of another snapshot: the next update brings the right one
		}
		d := &dynamic{name: registry.Name, registry: compiled, none: m.decision(registry.Name, "")}
		z.node(name, b).dynamic = d
		z.node("whoami."+name, b).whoami = d
		if p := registry.Policy.AllDown; p.Mode == topology.AllDownCNAME {
			d.fallback = b.bothCNAME(p.Target)
			d.varies = [3]bool{true, true, true}
		}
		for _, replica := range registry.Replicas {
			down := conditions[router.ReplicaKey{Registry: registry.Name, Region: replica.Region}].Down
			d.replicas = append(d.replicas, b.serve(replica, down, m.decision(registry.Name, replica.Region)))
			if replica.Hostname != "" {
				d.varies = [3]bool{true, true, true}
			}
			v4, v6 := split(replica.Addresses, nil)
			d.varies[variesA] = d.varies[variesA] || len(v4) > 0
			d.varies[variesAAAA] = d.varies[variesAAAA] || len(v6) > 0
			own, reason := replica.Region+"."+name, ""
			if _, taken := b.glue[own]; taken || replica.Region == "whoami" {
				reason = "the name is reserved"
			} else if _, err := hostName(own); err != nil {
				reason = fmt.Sprintf("it is no name: %v", err)
			}
			if reason != "" {
				problems = append(problems, topology.Problem{
					Key: topology.RegistriesPrefix + registry.Name + "/replicas/" + replica.Region, Value: own,
					Reason: reason, Effect: "the region has no name of its own in DNS",
				})
				continue
			}
			// The region's own name answers with all that the operator gave, dead or not.
			pinned := b.serve(replica, nil, nil)
			n := z.node(own, b)
			for _, set := range []rrset{pinned.a[1], pinned.aaaa[1], pinned.cname[1]} {
				n.add(set)
			}
		}
	}
	problems = append(problems, z.addChallenges(s.Challenges, b)...)
	problems = append(problems, z.addStatic(b)...)
	z.link()
	z.depth = max(z.depth, static.depth)
	return z, problems
}

// serial is the time of the newest change in seconds (RFC 1982 arithmetic holds beyond 2106).
func serial(changed time.Time) uint32 {
	if changed.IsZero() {
		return 1
	}
	return uint32(changed.Unix())
}

// serve packs what replica answers with, without the addresses that are down.
func (b *base) serve(replica *topology.Replica, down []netip.Addr, count *counter) served {
	s := served{count: count}
	if replica.Hostname != "" {
		s.cname = b.bothCNAME(replica.Hostname)
		return s
	}
	v4, v6 := split(replica.Addresses, down)
	for i, ttl := range []uint32{b.min, b.max} {
		s.a[i] = packAddresses(mdns.TypeA, v4, ttl)
		s.aaaa[i] = packAddresses(mdns.TypeAAAA, v6, ttl)
	}
	return s
}

func (b *base) bothCNAME(target string) both {
	var c both
	for i, ttl := range []uint32{b.min, b.max} {
		c[i] = pack(mdns.TypeCNAME, &mdns.CNAME{Hdr: header(b.origin, mdns.TypeCNAME, ttl), Target: target})
	}
	return c
}

// split sorts addresses by family and leaves out those in down.
func split(addresses, down []netip.Addr) (v4, v6 []netip.Addr) {
	for _, a := range addresses {
		switch {
		case slices.Contains(down, a):
		case a.Unmap().Is4():
			v4 = append(v4, a.Unmap())
		default:
			v6 = append(v6, a)
		}
	}
	return v4, v6
}

// addChallenges adds the TXT records of those that lie in the zone, together with the static ones of the same name. They are kept no
// longer than what is about to change.
func (z *zone) addChallenges(all []topology.Challenge, b *base) []topology.Problem {
	var problems []topology.Problem
	byName := make(map[string][]topology.Challenge)
	for _, c := range all {
		if name := mdns.Fqdn(c.Name); mdns.IsSubDomain(b.origin, name) {
			byName["_acme-challenge."+name] = append(byName["_acme-challenge."+name], c)
		}
	}
	for name, challenges := range byName {
		relative, err := b.relative(name)
		if err != nil {
			continue // it was checked
		}
		records := slices.Clone(z.static.texts[name])
		for _, c := range challenges {
			records = append(records, &mdns.TXT{Hdr: header(name, mdns.TypeTXT, b.min), Txt: []string{c.Token}})
		}
		set, fits := packSet(mdns.TypeTXT, records)
		reason := ""
		switch s := z.static.nodes[relative]; {
		case s != nil && s.has(mdns.TypeCNAME):
			reason = "a static CNAME stands alone at that name"
		case !fits:
			reason = "with the static TXT records of the name it does not fit in one message"
		default:
			z.node(name, b).add(set)
			continue
		}
		for _, c := range challenges {
			problems = append(problems, topology.Problem{Key: c.Key(), Value: name, Reason: reason, Effect: "the challenge is not answered"})
		}
	}
	slices.SortFunc(problems, func(a, b topology.Problem) int { return cmp.Compare(a.Key, b.Key) })
	return problems
}

// addStatic adds the static records of the names that the zone has anyway, but none that would contradict what is answered there, and
// tells of those and of what the static records had against them by themselves.
func (z *zone) addStatic(b *base) []topology.Problem {
	problems := slices.Clone(z.static.problems)
	for relative, n := range z.nodes {
		s := z.static.nodes[relative]
		if s == nil {
			continue
		}
		n.wildcard = s.wildcard
		for _, set := range s.sets {
			switch {
			case set.rrtype == mdns.TypeTXT && n.has(mdns.TypeTXT): // challenges, which were packed with these
			case n.takes(set.rrtype):
				problems = append(problems, staticProblem(b.name(relative), set.rrtype, "a registry answers at that name"))
			default:
				n.add(set)
			}
		}
	}
	slices.SortFunc(problems, func(a, b topology.Problem) int { return cmp.Compare(a.Value, b.Value) })
	return problems
}

// takes is whether n answers by itself what static records of rrtype would.
func (n *node) takes(rrtype uint16) bool {
	switch {
	case n.whoami != nil:
		return true
	case n.dynamic != nil && (rrtype == mdns.TypeA || rrtype == mdns.TypeAAAA || rrtype == mdns.TypeCNAME || n.dynamic.hostnames()):
		return true
	}
	return n.has(rrtype) || n.has(mdns.TypeCNAME) || rrtype == mdns.TypeCNAME && len(n.sets) > 0
}

// has is whether n has a set of rrtype.
func (n *node) has(rrtype uint16) bool {
	return slices.ContainsFunc(n.sets, func(s rrset) bool { return s.rrtype == rrtype })
}

// relative is the key of a name that lies in the zone: its lower-case wire form without the zone's name.
func (b *base) relative(name string) (string, error) {
	wire, err := packName(name)
	if err != nil {
		return "", err
	}
	return string(wire[:len(wire)-len(b.wire)]), nil
}

// name is the name of a key that relative gave.
func (b *base) name(relative string) string {
	name, _, err := mdns.UnpackDomainName(append([]byte(relative), b.wire...), 0)
	if err != nil {
		return relative // it was packed from a name
	}
	return name
}

// node returns the node of name, which lies in the zone, making it and the empty ones above it as needed.
func (z *names) node(name string, b *base) *node {
	relative, err := b.relative(name)
	if err != nil {
		// Names come from validated snapshots and parsed zone files; one that cannot be packed can be in no query either.
		return new(node)
	}
	n := z.nodes[relative]
	if n == nil {
		n = new(node)
		z.nodes[relative] = n
	}
	depth := 0
	for rest := relative; rest != ""; depth++ {
		rest = rest[1+int(rest[0]):]
		if z.nodes[rest] == nil {
			z.nodes[rest] = new(node)
		}
	}
	z.depth = max(z.depth, depth)
	return n
}

// nodeInside is node, or nil for a name outside of the zone.
func (z *zone) nodeInside(name string, b *base) *node {
	if !mdns.IsSubDomain(b.origin, name) {
		return nil
	}
	return z.node(name, b)
}

// link ties each wildcard to the name it stands below, and sorts the sets.
func (z *names) link() {
	for name, n := range z.nodes {
		if parent, ok := strings.CutPrefix(name, "\x01*"); ok {
			z.nodes[parent].wildcard = n
		}
		slices.SortFunc(n.sets, func(a, b rrset) int { return cmp.Compare(a.rrtype, b.rrtype) })
	}
}

// add adds a set that is not empty.
func (n *node) add(s rrset) {
	if s.count > 0 {
		n.sets = append(n.sets, s)
	}
}

// find looks q's name up. It returns no node for a name that does not exist; inside is false for one outside of the zone, and
// apex the offset of the zone's name in q's.
func (z *zone) find(q *query) (n *node, apex int, inside bool) {
	above := q.depth - z.labels
	if above < 0 {
		return nil, 0, false
	}
	apex = int(q.labels[above])
	if string(q.name[apex:q.nameLen]) != string(z.wire) {
		return nil, 0, false
	}
	// The longest part of the name that exists: itself, or the closest encloser with its wildcard, if any (RFC 4592, section
	// 3.3.1). Names deeper than any in the zone are entered at the zone's depth: random names stay cheap.
	for i := max(0, above-z.depth); i <= above; i++ {
		found := z.nodes[string(q.name[q.labels[i]:apex])]
		if found == nil {
			found = z.static.nodes[string(q.name[q.labels[i]:apex])]
		}
		if found != nil {
			if i > 0 {
				found = found.wildcard
			}
			return found, apex, true
		}
	}
	return nil, apex, true
}

// set returns the set for qtype, or the CNAME.
func (n *node) set(qtype uint16) *rrset {
	for i := range n.sets {
		if n.sets[i].rrtype == qtype || n.sets[i].rrtype == mdns.TypeCNAME {
			return &n.sets[i]
		}
	}
	return nil
}

func header(name string, rrtype uint16, ttl uint32) mdns.RR_Header {
	return mdns.RR_Header{Name: name, Rrtype: rrtype, Class: mdns.ClassINET, Ttl: ttl}
}

// questionPointer is a compressed name: the question's, which always stands behind the header (RFC 1035, section 4.1.4).
const questionPointer = 0xc000 | headerSize

// pack packs records of one type. Names in their data stay uncompressed: they would have to point into the question at a
// place that wildcards move, for a gain of some bytes in rare answers. What does not fit in a message is left out.
func pack(rrtype uint16, records ...mdns.RR) rrset {
	s := rrset{rrtype: rrtype}
	var first int
	for _, rr := range records {
		owner, err := packName(rr.Header().Name)
		if err != nil {
			continue
		}
		scratch := make([]byte, mdns.Len(rr)+1)
		end, err := mdns.PackRR(rr, scratch, 0, nil, false)
		if err != nil {
			continue // it was parsed from text or built here: only a record beyond 64 kB could get here
		}
		data := scratch[len(owner):end]
		if len(s.body)+2+len(data) > maxBody {
			break
		}
		s.body = binary.BigEndian.AppendUint16(s.body, questionPointer)
		s.body = append(s.body, data...)
		s.count++
		switch {
		case s.count == 1:
			first = 2 + len(data)
			s.stride = uint16(min(first, math.MaxUint16))
		case 2+len(data) != first:
			s.stride = 0
		}
	}
	return s
}

// packSet packs records of one name and type as one set, each once. It reports whether all of them fit in a message. Their TTL is the
// lowest (RFC 2181, section 5.2), as resolvers would make of it.
func packSet(rrtype uint16, records []mdns.RR) (set rrset, fits bool) {
	ttl := uint32(math.MaxUint32)
	for _, rr := range records {
		ttl = min(ttl, rr.Header().Ttl)
	}
	var once []mdns.RR
	for _, rr := range records {
		if slices.ContainsFunc(once, func(o mdns.RR) bool { return mdns.IsDuplicate(o, rr) }) {
			continue
		}
		rr = mdns.Copy(rr)
		rr.Header().Ttl = ttl
		once = append(once, rr)
	}
	set = pack(rrtype, once...)
	return set, int(set.count) == len(once)
}

// packAddresses packs the A or AAAA records of addresses, which are all of that family: as many as fit in a message.
func packAddresses(rrtype uint16, addresses []netip.Addr, ttl uint32) rrset {
	s := rrset{rrtype: rrtype}
	for _, a := range addresses {
		data := a.AsSlice()
		if len(s.body)+12+len(data) > maxBody {
			break
		}
		s.body = binary.BigEndian.AppendUint16(s.body, questionPointer)
		s.body = binary.BigEndian.AppendUint16(s.body, rrtype)
		s.body = binary.BigEndian.AppendUint16(s.body, mdns.ClassINET)
		s.body = binary.BigEndian.AppendUint32(s.body, ttl)
		s.body = binary.BigEndian.AppendUint16(s.body, uint16(len(data)))
		s.body = append(s.body, data...)
		s.count++
		s.stride = uint16(12 + len(data))
	}
	return s
}

// packGlue packs the addresses of the name servers in the zone, each under its own name.
func (b *base) packGlue() packed {
	var p packed
	for _, name := range b.nameservers {
		owner, err := packName(name)
		if err != nil {
			continue // it was checked
		}
		v4, v6 := split(b.glue[name], nil)
		for _, set := range []rrset{packAddresses(mdns.TypeA, v4, b.max), packAddresses(mdns.TypeAAAA, v6, b.max)} {
			for record := range slices.Chunk(set.body, max(1, int(set.stride))) {
				p.body = append(p.body, owner...)
				p.body = append(p.body, record[2:]...) // without the pointer
				p.count++
			}
		}
	}
	return p
}
