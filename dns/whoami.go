package dns

import (
	"fmt"
	"net/netip"

	mdns "github.com/miekg/dns"

	"portolan/router"
)

// describe is the answer of whoami: what the server saw of the asker and what it decided for it, as one TXT record with
// "name=value" strings, and with WhoamiFull one more for the place and for each candidate. Its TTL is 0: it is about this query.
func (z *zone) describe(q *query, d *dynamic, from netip.AddrPort, via transport) *rrset {
	client := router.Client{Resolver: from.Addr().Unmap().WithZone(""), Subnet: q.subnet}
	subnet := "none"
	if q.subnet.IsValid() {
		subnet = q.subnet.String()
	}
	e := d.registry.Explain(client)
	region, ttl := e.Region, z.min
	if region == "" {
		region = "none"
	}
	if e.Settled {
		ttl = z.max
	}
	record := func(text ...string) mdns.RR {
		for i := range text {
			text[i] = clip(text[i])
		}
		return &mdns.TXT{Hdr: header(".", mdns.TypeTXT, 0), Txt: text}
	}
	records := []mdns.RR{record(
		"registry="+d.name,
		"resolver="+client.Resolver.String(),
		"transport="+via.String(),
		"subnet="+subnet,
		"region="+region,
		"outcome="+e.Outcome,
		fmt.Sprintf("scope=%d", e.Scope),
		fmt.Sprintf("ttl=%d", ttl),
		fmt.Sprintf("serial=%d", z.serial),
		"topology="+shortDigest(z.topology),
		"databases="+shortDigest(e.Databases),
	)}
	if z.whoami == WhoamiFull {
		place := "place=unknown"
		if e.Located {
			place = fmt.Sprintf("place=%s/%s %.2f,%.2f", e.Continent, e.Country, *e.Latitude, *e.Longitude)
		}
		records = append(records, record("source="+e.Source, place, "network="+prefix(e.Network), "database="+e.Database, "cell="+e.Cell, "order="+e.Order, "fence="+e.Fence, e.Sentence))
		for _, c := range e.Candidates {
			records = append(records, record(
				"candidate="+c.Region, fmt.Sprintf("distance=%d km", c.Distance), "health="+c.Health,
				fmt.Sprintf("weight=%d", c.Weight), fmt.Sprintf("bucket=%d", c.Bucket), c.Reason,
			))
		}
	}
	set := pack(mdns.TypeTXT, records...)
	set.stride = 0 // in this order: the first record is the summary
	return &set
}

// shortDigest is as much of a digest as tells it from others.
func shortDigest(digest string) string { return digest[:min(12, len(digest))] }

func prefix(p netip.Prefix) string {
	if !p.IsValid() {
		return ""
	}
	return p.String()
}

// clip keeps text within one character-string (RFC 1035, section 3.3), and free of what master files would read as escapes.
func clip(text string) string {
	clean := make([]byte, 0, len(text))
	for _, c := range []byte(text) {
		if c == '\\' || c == '"' || c < ' ' || c > '~' {
			c = '?'
		}
		clean = append(clean, c)
	}
	return string(clean[:min(len(clean), 255)])
}
