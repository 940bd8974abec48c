package dns

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	mdns "github.com/miekg/dns"

	"portolan/topology"
)

// staticTypes are what a static zone file may hold. Delegations (NS, DS; RFC 1034, section 4.2.1) would make this server
// responsible for referrals, and DNAME (RFC 6672) for names that it has to make up: it gives neither.
var staticTypes = []uint16{mdns.TypeA, mdns.TypeAAAA, mdns.TypeCNAME, mdns.TypeTXT, mdns.TypeCAA, mdns.TypeMX, mdns.TypeSRV}

// maxStaticFile bounds the file: the records live in memory, packed, and this is a front door and not a hosting service.
const maxStaticFile = 64 << 20

// static are the static records in the form that they are answered in. It is immutable: all zones share it, since records by the hundred
// thousand are not to be packed again at every verdict on a replica.
type static struct {
	names
	texts    map[string][]mdns.RR // the TXT records by name, for what challenges have to stand beside
	problems []topology.Problem   // what of the records cannot be served, whatever else is
}

// newStatic packs records, as parseStatic gives them.
func newStatic(records []mdns.RR, b *base) *static {
	type key struct {
		name   string
		rrtype uint16
	}
	s := &static{names: names{nodes: make(map[string]*node)}, texts: make(map[string][]mdns.RR)}
	sets := make(map[key][]mdns.RR)
	for _, rr := range records {
		k := key{rr.Header().Name, rr.Header().Rrtype}
		sets[k] = append(sets[k], rr)
	}
	for k, same := range sets {
		set, fits := packSet(k.rrtype, same)
		if !fits {
			s.problems = append(s.problems, staticProblem(k.name, k.rrtype, "the records do not fit in one message"))
			set = rrset{}
		} else if k.rrtype == mdns.TypeTXT {
			s.texts[k.name] = same
		}
		s.node(k.name, b).add(set) // a name whose records are not served exists all the same
	}
	s.link()
	return s
}

// staticProblem tells why the static records of a name and type are left out.
func staticProblem(name string, rrtype uint16, reason string) topology.Problem {
	return topology.Problem{
		Key: "dns.static", Value: fmt.Sprintf("%s %s", name, mdns.Type(rrtype)),
		Reason: reason, Effect: "the static records of this name and type are not served",
	}
}

// readStatic reads the file of static records; there is none if path is empty. Every record must lie in the zone and be of
// staticTypes; an error names its line.
func readStatic(path string, b *base) (*static, error) {
	if path == "" {
		return newStatic(nil, b), nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading static records: %w", err)
	}
	defer f.Close()
	records, err := parseStatic(io.LimitReader(f, maxStaticFile+1), path, b)
	if err != nil {
		return nil, fmt.Errorf("reading static records: %w", err)
	}
	return newStatic(records, b), nil
}

// lines counts the lines that the zone parser has consumed: it reads byte by byte and no further than a record's end, but
// does not tell where a record stood.
type lines struct {
	r       *bufio.Reader
	line    int // of the last byte that was read
	bytes   int
	newline bool
}

func (l *lines) Read(p []byte) (int, error) { return 0, errors.New("not used: the parser reads bytes") }

func (l *lines) ReadByte() (byte, error) {
	c, err := l.r.ReadByte()
	if err != nil {
		return c, err
	}
	if l.newline {
		l.line++
	}
	l.newline = c == '\n'
	if l.bytes++; l.bytes > maxStaticFile {
		return 0, fmt.Errorf("longer than %d MB", maxStaticFile>>20)
	}
	return c, nil
}

func parseStatic(r io.Reader, path string, b *base) ([]mdns.RR, error) {
	counted := &lines{r: bufio.NewReader(r), line: 1}
	parser := mdns.NewZoneParser(counted, b.origin, path)
	parser.SetDefaultTTL(b.max)
	var records []mdns.RR
	cnames := make(map[string]bool) // names with a CNAME (true) or with something else (false)
	for rr, ok := parser.Next(); ok; rr, ok = parser.Next() {
		refuse := func(format string, arguments ...any) error {
			return fmt.Errorf("%s:%d: %s", path, counted.line, fmt.Sprintf(format, arguments...))
		}
		h := rr.Header()
		name, err := canonicalName(h.Name)
		if err != nil {
			return nil, refuse("%v", err)
		}
		h.Name = name
		if h.Class != mdns.ClassINET {
			return nil, refuse("%s: class %s: want IN", h.Name, mdns.ClassToString[h.Class])
		}
		switch h.Rrtype {
		case mdns.TypeNS, mdns.TypeDS:
			where := "a delegation below the zone is not given here: delegate from the zone above"
			if h.Name == b.origin {
				where = "the zone's own name servers come from dns.nameservers"
			}
			return nil, refuse("%s: %s: %s", h.Name, mdns.Type(h.Rrtype), where)
		case mdns.TypeDNAME:
			return nil, refuse("%s: DNAME is not served here: want a CNAME for each name, or for all with a wildcard", h.Name)
		case mdns.TypeSOA:
			return nil, refuse("%s: SOA: the zone's own is made of dns.contact, dns.ttl and the topology", h.Name)
		}
		if !slices.Contains(staticTypes, h.Rrtype) {
			return nil, refuse("%s: %s records are not served here: want A, AAAA, CNAME, TXT, CAA, MX or SRV", h.Name, mdns.Type(h.Rrtype))
		}
		if !mdns.IsSubDomain(b.origin, h.Name) {
			return nil, refuse("%s lies outside the zone %s", h.Name, b.origin)
		}
		isCNAME := h.Rrtype == mdns.TypeCNAME
		if isCNAME && h.Name == b.origin {
			return nil, refuse("the zone's own name cannot be a CNAME (RFC 1912, section 2.4)")
		}
		if _, ns := b.glue[h.Name]; ns {
			return nil, refuse("%s is a name server: its records come from dns.nameservers", h.Name)
		}
		if other, known := cnames[h.Name]; known && (isCNAME || other) {
			if isCNAME && other && slices.ContainsFunc(records, func(o mdns.RR) bool { return mdns.IsDuplicate(o, rr) }) {
				continue
			}
			return nil, refuse("%s: a CNAME stands alone at its name (RFC 1034, section 3.6.2)", h.Name)
		}
		cnames[h.Name] = isCNAME
		records = append(records, rr)
	}
	if err := parser.Err(); err != nil {
		return nil, err
	}
	return records, nil
}

// canonicalName is the one way to write name, as the library writes names that it reads from a message, in lower case: text has more,
// since any character may be escaped (RFC 1035, section 5.1), capital letters too.
func canonicalName(name string) (string, error) {
	wire, err := packName(name)
	if err != nil {
		return "", err
	}
	for i, c := range wire { // the lengths of labels, at most 63, lie below the letters
		if c-'A' < 26 {
			wire[i] += 'a' - 'A'
		}
	}
	canonical, _, err := mdns.UnpackDomainName(wire, 0)
	if err != nil {
		return "", fmt.Errorf("the name %q: %w", name, err)
	}
	return canonical, nil
}
