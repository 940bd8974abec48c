package dns

import (
	"fmt"
	"net/netip"

	mdns "github.com/miekg/dns"

	"portolan/router"
)

// explanationsPerSecond is how often whoami tells why, over all clients. A place is looked up in the file of the database, which
// takes a thousand times as long as a decision: without a bound a few queries would take a processor from all others.
const explanationsPerSecond = 20

// describe is the answer of whoami: what the server saw of the asker and what it decided for it, as one TXT record with
// "name=value" strings, and with WhoamiFull one more for the place and for each candidate, as far as explanationsPerSecond
// goes. Its TTL is 0: it is about this query.
func (w *worker) describe(z *zone, d *dynamic, from netip.AddrPort) *rrset {
	client := clientOf(w.query, from)
	subnet := "none"
	if client.Subnet.IsValid() {
		subnet = client.Subnet.String()
	}
	decision := d.registry.Decide(client)
	region, ttl := "none", z.min
	if decision.Replica >= 0 {
		region = d.registry.Topology().Replicas[decision.Replica].Region
	}
	switch {
	case decision.Replica < 0 && decision.Outcome != router.AllDownCNAME: // a negative answer
		if d.varies[variesA] || d.varies[variesAAAA] {
			ttl = 0
		}
	case decision.Settled:
		ttl = z.max
	}
	records := []mdns.RR{text(
		"registry="+d.name,
		"resolver="+client.Resolver.String(),
		"transport="+w.via.String(),
		"subnet="+subnet,
		"region="+region,
		"outcome="+decision.Outcome.String(),
		fmt.Sprintf("scope=%d", decision.Scope),
		fmt.Sprintf("ttl=%d", ttl),
		fmt.Sprintf("serial=%d", z.serial),
		"topology="+shortDigest(z.topology),
		"databases="+shortDigest(d.registry.Databases()),
	)}
	if z.whoami == WhoamiFull && w.explanations.AllowN(w.now(), 1) {
		records = append(records, reasons(d.registry.Explain(client))...)
	}
	set := pack(mdns.TypeTXT, records...)
	set.stride = 0 // in this order: the first record is the summary
	return &set
}

// reasons are the records for the place and for each candidate.
func reasons(e router.Explanation) []mdns.RR {
	place := "place=unknown"
	if e.Located {
		place = fmt.Sprintf("place=%s/%s %.2f,%.2f", e.Continent, e.Country, *e.Latitude, *e.Longitude)
	}
	records := []mdns.RR{text("source="+e.Source, place, "network="+prefix(e.Network), "database="+e.Database, "cell="+e.Cell, "order="+e.Order, "fence="+e.Fence, e.Sentence)}
	for _, c := range e.Candidates {
		records = append(records, text(
			"candidate="+c.Region, fmt.Sprintf("distance=%d km", c.Distance), "health="+c.Health,
			fmt.Sprintf("weight=%d", c.Weight), fmt.Sprintf("bucket=%d", c.Bucket), c.Reason,
		))
	}
	return records
}

// text is a TXT record of strings, each as clip leaves it.
func text(strings ...string) mdns.RR {
	for i := range strings {
		strings[i] = clip(strings[i])
	}
	return &mdns.TXT{Hdr: header(".", mdns.TypeTXT, 0), Txt: strings}
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
