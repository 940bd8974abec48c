package check

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/api"
)

// Served is what one DNS server answers for a registry's name.
type Served struct {
	// Server is its address with the port; Name what it was asked for.
	Server string `json:"server"`
	Name   string `json:"name"`
	// Subnet is the EDNS Client Subnet that it was asked with.
	Subnet  netip.Prefix `json:"subnet"`
	Answers []Answer     `json:"answers"`
	// Whoami are the strings of each of whoami's TXT records; empty where dns.whoami is off.
	Whoami [][]string `json:"whoami,omitempty"`
}

// Answer is the answer to one type.
type Answer struct {
	Type  string `json:"type"`
	Rcode string `json:"rcode"`
	// Records are the data of the records, TTL the lowest of theirs in seconds.
	Records []string `json:"records"`
	TTL     uint32   `json:"ttl"`
	// Scope is the length of the prefix for which the answer holds; -1 if the server does not heed the subnet.
	Scope int `json:"scope"`
}

// askTimeout bounds one question. A server that answers does so at once.
const askTimeout = 3 * time.Second

// Ask asks the DNS server at the address server, with or without a port, for the registry's name, in the name of the clients of
// subnet. The error tells of a server that does not answer; one that answers something odd is in the result.
func Ask(ctx context.Context, server, name string, subnet netip.Prefix) (Served, error) {
	if _, _, err := net.SplitHostPort(server); err != nil {
		server = net.JoinHostPort(strings.Trim(server, "[]"), "53")
	}
	s := Served{Server: server, Name: strings.TrimSuffix(mdns.CanonicalName(name), "."), Subnet: subnet}
	for _, kind := range []uint16{mdns.TypeA, mdns.TypeAAAA} {
		m, err := ask(ctx, server, s.Name, kind, subnet)
		if err != nil {
			return s, err
		}
		a := Answer{Type: mdns.TypeToString[kind], Rcode: mdns.RcodeToString[m.Rcode], Records: []string{}, Scope: -1}
		for i, rr := range m.Answer {
			if h := rr.Header(); i == 0 || h.Ttl < a.TTL {
				a.TTL = h.Ttl
			}
			a.Records = append(a.Records, strings.TrimPrefix(rr.String(), rr.Header().String()))
		}
		if o := m.IsEdns0(); o != nil {
			for _, option := range o.Option {
				if e, ok := option.(*mdns.EDNS0_SUBNET); ok {
					a.Scope = int(e.SourceScope)
				}
			}
		}
		s.Answers = append(s.Answers, a)
	}
	m, err := ask(ctx, server, "whoami."+s.Name, mdns.TypeTXT, subnet)
	if err != nil {
		return s, err
	}
	for _, rr := range m.Answer {
		if txt, ok := rr.(*mdns.TXT); ok {
			s.Whoami = append(s.Whoami, txt.Txt)
		}
	}
	return s, nil
}

// ask asks over UDP, and over TCP for what does not fit.
func ask(ctx context.Context, server, name string, kind uint16, subnet netip.Prefix) (*mdns.Msg, error) {
	family := uint16(1)
	if subnet.Addr().Is6() {
		family = 2
	}
	q := new(mdns.Msg).SetQuestion(mdns.Fqdn(name), kind)
	q.RecursionDesired = false
	q.SetEdns0(1232, false)
	q.IsEdns0().Option = append(q.IsEdns0().Option, &mdns.EDNS0_SUBNET{Code: mdns.EDNS0SUBNET, Family: family,
		SourceNetmask: uint8(subnet.Bits()), Address: subnet.Masked().Addr().AsSlice()})
	exchange := func(network string) (*mdns.Msg, error) {
		client := &mdns.Client{Net: network, Timeout: askTimeout}
		m, _, err := client.ExchangeContext(ctx, q, server)
		if err != nil {
			return nil, fmt.Errorf("asking %s for %s %s: %w", server, name, mdns.TypeToString[kind], err)
		}
		return m, nil
	}
	m, err := exchange("udp")
	if err == nil && m.Truncated {
		return exchange("tcp")
	}
	return m, err
}

// named are the values of a record of whoami by their names.
func named(texts []string) map[string]string {
	values := map[string]string{}
	for _, text := range texts {
		name, value, _ := strings.Cut(text, "=")
		values[name] = value
	}
	return values
}

// Differences tells in sentences where what is served is not what the decision e says. replicas are those of the registry.
func (s *Served) Differences(e api.Explanation, replicas []api.Replica) []string {
	var all []string
	differ := func(format string, args ...any) { all = append(all, fmt.Sprintf(format, args...)) }
	var told map[string]string
	if len(s.Whoami) > 0 {
		told = named(s.Whoami[0]) // the summary
	}
	region := e.Region
	if region == "" {
		region = "none"
	}
	if got, ok := told["region"]; ok && got != region {
		differ("the server sends the client to %s, the decision to %s", got, region)
	}
	i := slices.IndexFunc(replicas, func(r api.Replica) bool { return r.Region == e.Region })
	for _, a := range s.Answers {
		if a.Rcode != "NOERROR" {
			differ("the server answers %s with %s", a.Type, a.Rcode)
			continue
		}
		if len(a.Records) == 0 {
			continue
		}
		if a.Scope != e.Scope && e.Subnet.IsValid() { // without a subnet the decision has no scope
			scope := "no scope"
			if a.Scope >= 0 {
				scope = fmt.Sprintf("the scope /%d", a.Scope)
			}
			differ("the server's %s has %s, the decision /%d", a.Type, scope, e.Scope)
		}
		if int(a.TTL) != e.TTL {
			differ("the server's %s may be kept for %d s, by the decision for %d s", a.Type, a.TTL, e.TTL)
		}
		if i < 0 {
			continue // no region, or a fallback name
		}
		for _, data := range a.Records {
			if !slices.Contains(replicas[i].Addresses, data) && strings.TrimSuffix(data, ".") != strings.TrimSuffix(replicas[i].Hostname, ".") {
				differ("the server's %s %s does not belong to %s", a.Type, data, e.Region)
			}
		}
	}
	if i >= 0 && !slices.ContainsFunc(s.Answers, func(a Answer) bool { return len(a.Records) > 0 || a.Rcode != "NOERROR" }) {
		differ("the server answers without an address, the decision is %s", e.Region)
	}
	return all
}
