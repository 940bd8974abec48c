// Package dns is the authoritative server of the front door: wire in, wire out.
//
// One responder answers for every transport. A zone is everything it answers from, with every answer packed when the
// topology, the conditions of replicas or the static records change; a query costs a walk over its bytes, one map lookup,
// the router's decision and a copy, and allocates nothing. The zone is swapped by one pointer, so that no query waits for
// a change or is lost by one.
//
// The package decides nothing (router), probes nothing (health) and reads no store: Update brings it all it knows. It is
// no resolver: what is not in its zone is refused, and a CNAME is not chased.
package dns

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
)

// Whoami says how much whoami.<registry>.<zone> tells.
type Whoami string

// The values of Whoami.
const (
	// WhoamiSeen tells what the server saw of the asker and the region it gave, and digests of what it decides by: the default.
	// It tells nobody more than asking for the address would.
	WhoamiSeen Whoami = "seen"
	// WhoamiFull adds why: the place, its source, and each candidate with what spoke against it. It does so for 20 queries a second,
	// as many of which may come at once; others get what WhoamiSeen tells.
	WhoamiFull Whoami = "full"
	// WhoamiOff answers with no record.
	WhoamiOff Whoami = "off"
)

// Options are the settings of a Server.
type Options struct {
	// Zone is the name that the server is authoritative for.
	Zone string
	// Nameservers are the zone's name servers with their addresses: labels of the zone ("ns1"), or names outside of it with a
	// final dot and without addresses ("ns.example.org.").
	Nameservers map[string][]netip.Addr
	// Contact is the mail address of the zone's SOA record; hostmaster@<zone> if empty.
	Contact string
	// TTLMin and TTLMax are the times that answers may be kept while something is about to change and otherwise, in whole
	// seconds; 5 s and 60 s if zero.
	TTLMin, TTLMax time.Duration
	// StaticFile is a zone file with further records; empty for none.
	StaticFile string
	// Whoami is WhoamiSeen if empty.
	Whoami Whoami
	// NSID names this server among those of the zone: the answer to the EDNS option of that name (RFC 5001), and to
	// id.server TXT of class CH (RFC 4892). Empty for none; CheckIdentity says what it may be.
	NSID string
	// Version is the answer to version.bind TXT of class CH. Empty, the default, refuses it.
	Version string
	// CookieSecret is a file with the keys of DNS cookies (RFC 7873 and 9018): 32 hexadecimal digits a line, first the one that
	// makes them, then perhaps another that is recognised as well: the next one or the one before. All servers behind one
	// address need the same. Empty for a random one, which nobody else knows and which ends with the process.
	CookieSecret string
	// RateLimit bounds the responses to one network over UDP; off if zero.
	RateLimit RateLimit
	// Sample records the clients of some queries; none if zero.
	Sample Sample
	// Listen are the addresses for UDP and TCP alike. Port 0 lets the kernel choose.
	Listen []netip.AddrPort
	// MaxConnections bounds the TCP connections, 1024 if zero; MaxPerClient those of one IPv4 address or IPv6 /64 (RFC 7766,
	// section 6.2.2), a quarter of them if zero. For one beyond them that which has been idle for the longest is closed.
	MaxConnections, MaxPerClient int
	// IdleTimeout is how long a TCP connection may stay silent (RFC 7766, section 6.2.3); 10 s if zero. When more than half
	// of the connections are in use, it is a tenth of that.
	IdleTimeout time.Duration
	Logger      *zap.Logger
	Registerer  prometheus.Registerer
}

// The reach of TTLs: under a second caches may round down to none, over a day no change of region would ever be heard of.
const (
	minTTL = time.Second
	maxTTL = 24 * time.Hour
)

// base is what of the zone comes from the settings alone: checked and in the form that zones are compiled from.
type base struct {
	origin string // lower case, final dot
	// wire is origin as on the wire, labels how many it has.
	wire     []byte
	labels   int
	min, max uint32 // TTLs in seconds
	whoami   Whoami
	mname    string
	rname    string
	// nameservers are fully qualified, sorted; glue holds the addresses of those in the zone.
	nameservers []string
	glue        map[string][]netip.Addr
}

// CheckZone reports what is wrong with the text as the name of a zone, with or without a final dot.
func CheckZone(text string) error {
	_, err := hostName(text)
	return err
}

// newBase checks o and fills in its defaults.
func newBase(o *Options) (*base, error) {
	b := &base{glue: make(map[string][]netip.Addr)}
	var err error
	if b.origin, err = hostName(o.Zone); err != nil {
		return nil, fmt.Errorf("dns.zone %q: %w", o.Zone, err)
	}
	b.labels = mdns.CountLabel(b.origin)
	if b.wire, err = packName(b.origin); err != nil {
		return nil, fmt.Errorf("dns.zone %q: %w", o.Zone, err)
	}
	if o.TTLMin == 0 {
		o.TTLMin = 5 * time.Second
	}
	if o.TTLMax == 0 {
		o.TTLMax = max(time.Minute, o.TTLMin)
	}
	for name, ttl := range map[string]time.Duration{"min": o.TTLMin, "max": o.TTLMax} {
		if ttl < minTTL || ttl > maxTTL || ttl%time.Second != 0 {
			return nil, fmt.Errorf("dns.ttl.%s %v: want whole seconds from %v to %v", name, ttl, minTTL, maxTTL)
		}
	}
	if o.TTLMin > o.TTLMax {
		return nil, fmt.Errorf("dns.ttl.min %v is above dns.ttl.max %v", o.TTLMin, o.TTLMax)
	}
	b.min, b.max = uint32(o.TTLMin/time.Second), uint32(o.TTLMax/time.Second)
	if o.Whoami == "" {
		o.Whoami = WhoamiSeen
	}
	if !slices.Contains([]Whoami{WhoamiSeen, WhoamiFull, WhoamiOff}, o.Whoami) {
		return nil, fmt.Errorf("dns.whoami %q: want seen, full or off", o.Whoami)
	}
	b.whoami = o.Whoami
	if o.Contact == "" {
		o.Contact = "hostmaster@" + strings.TrimSuffix(b.origin, ".")
	}
	if b.rname, err = mailbox(o.Contact); err != nil {
		return nil, fmt.Errorf("dns.contact %q: %w", o.Contact, err)
	}
	if len(o.Nameservers) == 0 {
		return nil, errors.New("dns.nameservers: want at least one, as {ns1: [192.0.2.53]} or {ns.example.org.: []}")
	}
	for _, given := range slices.Sorted(maps.Keys(o.Nameservers)) {
		name, outside := given, strings.HasSuffix(given, ".")
		if !outside {
			name += "." + b.origin
		}
		if name, err = hostName(name); err != nil {
			return nil, fmt.Errorf("dns.nameservers: %q: %w", given, err)
		}
		addresses := o.Nameservers[given]
		switch inside := mdns.IsSubDomain(b.origin, name); {
		case slices.Contains(b.nameservers, name):
			return nil, fmt.Errorf("dns.nameservers: %q is named twice", given)
		case inside && len(addresses) == 0:
			return nil, fmt.Errorf("dns.nameservers: %q lies in the zone and needs its addresses here", given)
		case !inside && len(addresses) > 0:
			return nil, fmt.Errorf("dns.nameservers: %q lies outside the zone %s: its addresses belong to its own zone, leave them out here", given, b.origin)
		}
		for _, a := range addresses {
			if !a.IsValid() || a.Zone() != "" || a.IsUnspecified() {
				return nil, fmt.Errorf("dns.nameservers: %q: %v is not an address that clients can reach", given, a)
			}
			b.glue[name] = append(b.glue[name], a.Unmap())
		}
		b.nameservers = append(b.nameservers, name)
	}
	b.mname = b.nameservers[0]
	return b, nil
}

// hostName checks that name is a host name (RFC 1123, section 2.1) and gives it in lower case with a final dot.
func hostName(name string) (string, error) {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if name == "" {
		return "", errors.New("want a domain name")
	}
	if len(name) > 253 {
		return "", errors.New("longer than 253 bytes")
	}
	for label := range strings.SplitSeq(name, ".") {
		switch {
		case label == "" || len(label) > 63:
			return "", errors.New("a label has from 1 to 63 characters")
		case strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "":
			return "", fmt.Errorf("label %q: want letters, digits and hyphens", label)
		case label[0] == '-' || label[len(label)-1] == '-':
			return "", fmt.Errorf("label %q begins or ends with a hyphen", label)
		}
	}
	return name + ".", nil
}

// mailbox turns a mail address into the domain name of an SOA record, dots before the @ escaped (RFC 1035, section 8).
func mailbox(address string) (string, error) {
	local, domain, ok := strings.Cut(address, "@")
	if !ok || local == "" || strings.ContainsAny(local, "\\\" \t") {
		return "", errors.New("want a mail address such as hostmaster@example.net")
	}
	domain, err := hostName(domain)
	if err != nil {
		return "", err
	}
	name := strings.ReplaceAll(local, ".", `\.`) + "." + domain
	if _, err := packName(name); err != nil {
		return "", err
	}
	return name, nil
}

// packName gives name as on the wire.
func packName(name string) ([]byte, error) {
	var wire [256]byte
	n, err := mdns.PackDomainName(name, wire[:], 0, nil, false)
	if err != nil {
		return nil, fmt.Errorf("packing the name %q: %w", name, err)
	}
	return slices.Clone(wire[:n]), nil
}
