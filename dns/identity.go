package dns

import (
	"fmt"

	mdns "github.com/miekg/dns"
)

// MaxIdentity is how long Options.NSID and Options.Version may be, in bytes: an answer over UDP has room for 512 of them, and
// with the longest question and every option in it the truncated form must still fit.
const MaxIdentity = 64

// identity is what the server tells of itself, whatever the zone. It is immutable.
type identity struct {
	nsid []byte // the data of the NSID option; empty for none
	// chaos are the answers to TXT queries of class CH, by the lower-case name as on the wire.
	chaos map[string]*rrset
}

// CheckIdentity reports what is wrong with the text as an identity: it is shown by tools as it stands, and so may have
// printable ASCII alone, without quotes and backslashes, and at most MaxIdentity of that. Empty is none.
func CheckIdentity(text string) error {
	if len(text) > MaxIdentity {
		return fmt.Errorf("%d characters: want at most %d", len(text), MaxIdentity)
	}
	if clip(text) != text {
		return fmt.Errorf("%q: want printable ASCII without quotes and backslashes", text)
	}
	return nil
}

// newIdentity makes the identity of the options. Names without a text are not in it: they are refused.
// hostname.bind is what BIND called id.server before RFC 4892 gave it a neutral name; version.server is what NSD and others
// made of version.bind likewise.
func newIdentity(o *Options) (*identity, error) {
	d := &identity{nsid: []byte(o.NSID), chaos: make(map[string]*rrset)}
	for _, s := range []struct {
		setting, text string
		names         []string
	}{
		{"dns.nsid", o.NSID, []string{"id.server.", "hostname.bind."}},
		{"dns.version", o.Version, []string{"version.bind.", "version.server."}},
	} {
		if err := CheckIdentity(s.text); err != nil {
			return nil, fmt.Errorf("%s: %w", s.setting, err)
		}
		if s.text == "" {
			continue
		}
		for _, name := range s.names {
			wire, err := packName(name)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.setting, err)
			}
			// TTL 0: it tells of this server, and behind one address there may be several.
			set := pack(mdns.TypeTXT, &mdns.TXT{
				Hdr: mdns.RR_Header{Name: name, Rrtype: mdns.TypeTXT, Class: mdns.ClassCHAOS}, Txt: []string{s.text},
			})
			d.chaos[string(wire)] = &set
		}
	}
	return d, nil
}

// answer is the answer to q, which is of class CH; nil if there is none, which is refused: there is no zone of that class that
// could say more.
func (d *identity) answer(q *query) *rrset {
	if q.qtype != mdns.TypeTXT && q.qtype != mdns.TypeANY {
		return nil
	}
	return d.chaos[string(q.name[:q.nameLen])]
}
