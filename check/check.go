// Package check looks at an installation from outside, as clients do: its name servers over the net, its certificates, its
// client names.
//
// It changes nothing and decides nothing: every finding is a line that says what is so and, where it is not well, what to do.
package check

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/api"
	"portolan/health"
	"portolan/topology"
)

// Level says how a finding is to be taken.
type Level string

// The levels.
const (
	OK   Level = "ok"
	Warn Level = "warn" // works, but somebody should look
	Fail Level = "fail" // clients are, or will be, harmed
)

// Finding is one thing that was looked at.
type Finding struct {
	Level Level `json:"level"`
	// Subject is what was looked at: "zone geo.example.net.", "certificate 192.0.2.1".
	Subject string `json:"subject"`
	// Text says what is so.
	Text string `json:"text"`
	// Advice says what to do; empty where all is well.
	Advice string `json:"advice,omitempty"`
}

// timeout bounds one question, of DNS or of TLS.
const timeout = 3 * time.Second

// soon is how close the end of a certificate may come before it is a warning where the server that is asked does not say, since it
// does not probe: renewals usually happen 30 days ahead.
const soon = 14 * 24 * time.Hour

// oldDays is the age of a location database that is a warning: networks move between countries by the month.
const oldDays = 90

// manyIgnored is how many events of no interest say that a registry is not told to leave them out. One that is sends none.
const manyIgnored = 10

// samples are clients of four continents, by networks that have been where they are for decades.
var samples = []struct{ where, subnet string }{
	{"North America", "128.32.0.0/24"},  // University of California, Berkeley
	{"Europe", "141.20.0.0/24"},         // Humboldt-Universität zu Berlin
	{"Asia", "133.11.0.0/24"},           // University of Tokyo
	{"South America", "143.107.0.0/24"}, // Universidade de São Paulo
}

// API is what is asked of the server: an api.Client.
type API interface {
	Status(ctx context.Context) (api.Status, error)
	Explain(ctx context.Context, registry, ecs, resolver string) (api.Explanation, error)
	Shares(ctx context.Context, registry string) ([]api.RegistryShares, error)
}

// Checker looks at one registry.
type Checker struct {
	API API
	// Resolver is the address, IP:port, of the recursive resolver that is asked for the delegation and for client names;
	// empty: the system's.
	Resolver string
	// Roots are the certificates to trust besides those that a replica names as its ca, as far as they can be read here; nil: the
	// system's.
	Roots *x509.CertPool
	// Found is called with every finding, in order, as it is made.
	Found func(Finding)

	status   api.Status
	registry api.Registry
	port     string // of name servers; empty: 53
	decided  []decision
	sources  sources
}

// sources are the digests of what a server decides by.
type sources struct{ topology, databases string }

// decision is where the server that was asked sends the clients of a sample.
type decision struct {
	where, subnet, region string
	scope                 int
}

// Registry looks at the whole of a registry, and returns whether nothing failed. An error means that it could not look.
func (c *Checker) Registry(ctx context.Context, r api.Registry) (bool, error) {
	passed := true
	found := c.Found
	inner := *c
	inner.Found = func(f Finding) {
		passed = passed && f.Level != Fail
		found(f)
	}
	var err error
	if inner.status, err = c.API.Status(ctx); err != nil {
		return false, err
	}
	inner.registry = r
	if inner.port == "" {
		inner.port = "53"
	}
	inner.server()
	inner.replicas()
	if inner.status.DNS != nil {
		if err := inner.decisions(ctx); err != nil {
			return false, err
		}
		inner.zone(ctx)
	} else {
		inner.say(Warn, "zone", "this server has not the role dns", "ask one that has, with --api, for the checks of the zone and of decisions")
	}
	inner.database()
	inner.certificates(ctx)
	inner.clientNames(ctx)
	inner.events()
	return passed, ctx.Err()
}

func (c *Checker) say(level Level, subject, text, advice string) {
	c.Found(Finding{level, subject, text, advice})
}

// ---- the server's own word ---------------------------------------------------------------------------------------------

func (c *Checker) server() {
	s := c.status
	if s.Ready {
		c.say(OK, "server", "ready, "+strings.Join(s.Roles, " and "), "")
	} else {
		c.say(Fail, "server", strings.Join(s.NotReady, "; "), "see its log")
	}
	if s.Store.Error != "" {
		c.say(Fail, "store", s.Store.Name+" cannot be read: "+s.Store.Error, "the last good topology is served; bring the store back")
	} else {
		c.say(OK, "store", s.Store.Name, "")
	}
	for _, p := range s.Topology.Problems {
		if strings.HasPrefix(p.Key, topology.RegistriesPrefix+c.registry.Name+"/") {
			c.say(Fail, p.Key, p.Reason, "meanwhile "+p.Effect)
		}
	}
	if s.DNS != nil {
		for _, p := range s.DNS.Problems {
			c.say(Warn, p.Key, p.Reason, "meanwhile "+p.Effect)
		}
	}
	for _, w := range s.Warnings {
		c.say(Warn, "server", w, "")
	}
}

func (c *Checker) replicas() {
	for _, r := range c.registry.Replicas {
		subject := "replica " + r.Region
		text := fmt.Sprintf("%s, %s, routing %s, weight %d, %d pending", r.Status, r.Health, r.Routing, r.Weight, r.Pending)
		switch {
		case r.Status == topology.Deleting && r.Health != "Unhealthy":
			c.say(OK, subject, text+": "+r.Reason, "")
		case r.Status == topology.Deleting: // no clients are sent there, but what was pushed there may be to be fetched
			c.say(Warn, subject, text+": "+r.Reason, "if it does not come back, portolan replica delete --force "+r.Registry+"/"+r.Region)
		case r.Health == "Unhealthy":
			c.say(Fail, subject, text+": "+r.Reason, "clients are sent elsewhere until its probes pass")
		case r.Status == topology.Degraded:
			c.say(Fail, subject, text+": "+r.Reason, "portolan replica show "+r.Registry+"/"+r.Region)
		case r.Replication != nil && r.Replication.Phase == topology.PhasePlanned:
			c.say(Warn, subject, text+": "+r.Reason, "portolan replica show "+r.Registry+"/"+r.Region)
		case r.Status != topology.Ready && c.status.Store.Error != "": // to wait for it would be in vain
			c.say(Warn, subject, text+": "+r.Reason, "bring the store back: how far a replica is stands there")
		case r.Status != topology.Ready:
			c.say(Warn, subject, text+": "+r.Reason, "portolan replica wait "+r.Registry+"/"+r.Region)
		case down(r) != "":
			c.say(Warn, subject, text+"; left out of answers: "+down(r), "clients are sent to its other addresses until the probes of these pass")
		default:
			c.say(OK, subject, text, "")
		}
	}
}

// down names the addresses of a replica that are, and why.
func down(r api.Replica) string {
	var list []string
	for _, p := range r.Probes {
		if p.Health == "Unhealthy" {
			list = append(list, fmt.Sprintf("%s (%s)", p.Target, p.Error))
		}
	}
	return strings.Join(list, ", ")
}

// staying are the replicas that are not being deleted: to the others clients are sent no more.
func (c *Checker) staying() []api.Replica {
	return slices.DeleteFunc(slices.Clone(c.registry.Replicas), func(r api.Replica) bool { return r.Status == topology.Deleting })
}

func (c *Checker) database() {
	for _, g := range c.status.Geo {
		name := g.Path
		if name == "" {
			name = "the built-in table of countries"
		}
		days := int(g.Age(time.Now()) / (24 * time.Hour))
		age := "1 day"
		if days != 1 {
			age = fmt.Sprintf("%d days", days)
		}
		text := fmt.Sprintf("%s, built %s, %s old", name, g.Built.Format(time.DateOnly), age)
		if days > oldDays && g.Path != "" {
			c.say(Warn, "database", text, "fetch a newer one, then SIGHUP")
		} else {
			c.say(OK, "database", text, "")
		}
	}
}

func (c *Checker) events() {
	if c.registry.Document.Policy.Replication == "disabled" {
		return
	}
	if c.status.Events == nil {
		c.say(Warn, "events", "this server has no events listener: pushes are found by scans alone, minutes later", "set events.listen on the replicators, or ask one of them with --api")
		return
	}
	for _, r := range c.staying() {
		name := r.Registry + "/" + r.Region
		n, ignored := c.status.Events.Received[name], c.status.Events.Ignored[name]
		prefixed := slices.ContainsFunc(c.registry.Document.Replicas, func(d topology.ReplicaDocument) bool { return d.Region == r.Region && d.Prefix != "" })
		switch {
		case ignored >= manyIgnored && 2*ignored > n && !prefixed: // outside of a prefix there may be any number of pushes
			c.say(Warn, "events "+r.Region, fmt.Sprintf("of %d since the start, %d were of pulls, mounts or blobs, which hold up those of pushes", n, ignored),
				"put ignore into its configuration, as portolan events token "+name+" prints it")
		case n > 0:
			c.say(OK, "events "+r.Region, fmt.Sprintf("%d since the start", n), "")
		default:
			c.say(Warn, "events "+r.Region, "none came since the start of this server", "if there were pushes: put what portolan events token "+name+" prints into its configuration")
		}
	}
}

// ---- decisions ---------------------------------------------------------------------------------------------------------

// decisions tells where the server that was asked sends the samples, and the shares that the weights result in.
func (c *Checker) decisions(ctx context.Context) error {
	for _, s := range samples {
		e, err := c.API.Explain(ctx, c.registry.Name, s.subnet, "")
		if err != nil {
			return fmt.Errorf("asking for the decision for %s: %w", s.subnet, err)
		}
		c.sources = sources{e.Topology, e.Databases}
		subject := "clients in " + s.where
		switch {
		case e.Region == "":
			c.say(Fail, subject, e.Sentence, "portolan explain "+c.registry.Name+" --ecs "+s.subnet)
			continue
		case !e.Located:
			c.say(Warn, subject, s.subnet+" is in no entry of the database; they go to "+e.Region, "is the database the right one?")
		default:
			c.say(OK, subject, s.subnet+" goes to "+e.Region, "")
		}
		c.decided = append(c.decided, decision{s.where, s.subnet, e.Region, e.Scope})
	}
	shares, err := c.API.Shares(ctx, c.registry.Name)
	if err != nil {
		return fmt.Errorf("asking for the shares of clients: %w", err)
	}
	for _, r := range shares {
		for _, split := range r.Splits {
			parts := make([]string, len(split.Shares))
			for i, share := range split.Shares {
				parts[i] = fmt.Sprintf("%v%% to %s", share.Percent, share.Region)
			}
			if len(parts) == 0 {
				c.say(Fail, "clients near "+split.Nearest, "they are sent nowhere", "portolan replica list "+c.registry.Name)
				continue
			}
			c.say(OK, "clients near "+split.Nearest, strings.Join(parts, ", "), "")
		}
	}
	return nil
}

// patience is how often a name server that decides otherwise is asked again, and pause the time between: an edit or a verdict may
// be on its way between servers.
const (
	patience = 3
	pause    = 300 * time.Millisecond
)

// rest makes the pause before another attempt, and reports whether there is one.
func rest(ctx context.Context) bool {
	select {
	case <-time.After(pause):
		return true
	case <-ctx.Done():
		return false
	}
}

// sourced looks whether a name server decides by the topology and the databases that the server that was asked has, as far as whoami
// tells.
func (c *Checker) sourced(ctx context.Context, subject, at string) {
	var level Level
	var fault, advice string
	for attempt := range patience {
		if attempt > 0 {
			if !rest(ctx) {
				return
			}
			if e, err := c.API.Explain(ctx, c.registry.Name, samples[0].subnet, ""); err == nil {
				c.sources = sources{e.Topology, e.Databases}
			}
		}
		answer, err := c.exchange(ctx, "udp", at, "whoami."+c.registry.FQDN, mdns.TypeTXT, false)
		if err != nil {
			c.say(Fail, subject, err.Error(), "")
			return
		}
		var told map[string]string
		for _, rr := range answer.Answer {
			if txt, ok := rr.(*mdns.TXT); ok && told == nil { // the first is the summary
				told = named(txt.Txt)
			}
		}
		topology, databases := told["topology"], told["databases"]
		switch {
		case topology == "" || databases == "":
			c.say(OK, subject, "does not tell by what topology and databases it decides: dns.whoami is off there, or it is of another version", "")
			return
		case !strings.HasPrefix(c.sources.topology, topology):
			level, fault = Fail, fmt.Sprintf("has the topology %s, and the server that was asked %.12s", topology, c.sources.topology)
			advice = "do both read the same store, and can they? portolan status of each tells"
		case !strings.HasPrefix(c.sources.databases, databases):
			level, fault = Warn, fmt.Sprintf("looks clients up in other databases (%s) than the server that was asked (%.12s)", databases, c.sources.databases)
			advice = "give all servers the same files of geo, and the same version: portolan status of each tells which they have"
		default:
			c.say(OK, subject, "has the same topology and databases", "")
			return
		}
	}
	c.say(level, subject, fault, advice)
}

// alike looks whether a name server sends the samples where the server that was asked does.
func (c *Checker) alike(ctx context.Context, subject, at string) {
	for _, d := range c.decided {
		var region, fault string
		for attempt := range patience {
			if attempt > 0 {
				if !rest(ctx) {
					return
				}
				if e, err := c.API.Explain(ctx, c.registry.Name, d.subnet, ""); err == nil {
					d.region, d.scope = e.Region, e.Scope
				}
			}
			scope := 0
			var err error
			region, scope, err = c.led(ctx, at, d)
			switch {
			case err != nil:
				fault = err.Error()
			case region != d.region:
				fault = fmt.Sprintf("sends clients in %s (%s) to %s, and the server that was asked to %s", d.where, d.subnet, region, d.region)
			case scope != d.scope:
				fault = fmt.Sprintf("answers clients in %s (%s) for a /%d, and the server that was asked for a /%d", d.where, d.subnet, scope, d.scope)
			default:
				fault = ""
			}
			if fault == "" {
				break
			}
		}
		if fault != "" {
			c.say(Fail, subject, fault, "do both see the same topology, and have they the same location database? portolan status of each tells")
			return
		}
	}
	if len(c.decided) > 0 {
		c.say(OK, subject, "decides alike", "")
	}
}

// led asks a name server where the clients of a sample are sent, and for how large a network that holds. Where regions have an
// address in common, it is taken for the one that was decided.
func (c *Checker) led(ctx context.Context, at string, d decision) (region string, scope int, err error) {
	prefix, err := netip.ParsePrefix(d.subnet)
	if err != nil {
		return "", 0, err
	}
	for _, kind := range []uint16{mdns.TypeA, mdns.TypeAAAA} {
		q := new(mdns.Msg).SetQuestion(mdns.Fqdn(c.registry.FQDN), kind)
		q.RecursionDesired = false
		q.SetEdns0(1232, false)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &mdns.EDNS0_SUBNET{Code: mdns.EDNS0SUBNET, Family: 1,
			SourceNetmask: uint8(prefix.Bits()), Address: prefix.Addr().AsSlice()})
		answer, err := c.ask(ctx, "udp", at, q)
		if err != nil {
			return "", 0, err
		}
		if o := answer.IsEdns0(); o != nil {
			for _, option := range o.Option {
				if e, ok := option.(*mdns.EDNS0_SUBNET); ok {
					scope = int(e.SourceScope)
				}
			}
		}
		got := addressesOf(answer)
		for _, rr := range answer.Answer {
			if cname, ok := rr.(*mdns.CNAME); ok {
				got = append(got, mdns.CanonicalName(cname.Target))
			}
		}
		var regions []string
		for _, r := range c.registry.Replicas {
			if slices.ContainsFunc(got, func(a string) bool {
				return slices.Contains(r.Addresses, a) || r.Hostname != "" && a == mdns.CanonicalName(r.Hostname)
			}) {
				regions = append(regions, r.Region)
			}
		}
		switch {
		case slices.Contains(regions, d.region):
			return d.region, scope, nil
		case len(regions) > 0:
			return regions[0], scope, nil
		case len(got) > 0:
			return strings.Join(got, ", "), scope, nil
		}
	}
	return "nowhere", scope, nil
}

// ---- the zone ----------------------------------------------------------------------------------------------------------

// zone asks every address of every name server, as clients' resolvers do, and the parent for the delegation.
func (c *Checker) zone(ctx context.Context) {
	zone := c.status.DNS.Zone
	serials := map[uint32][]string{}
	asked := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(c.status.DNS.Nameservers)) {
		addresses := c.status.DNS.Nameservers[name]
		if len(addresses) == 0 { // outside of the zone
			found, err := c.lookup(ctx, name)
			if err != nil {
				c.say(Warn, "name server "+name, "its address cannot be looked up: "+err.Error(), "is it in the DNS?")
				continue
			}
			addresses = found
		}
		for _, a := range addresses {
			subject, at := "name server "+name+" "+a, net.JoinHostPort(a, c.port)
			lab, silence := c.elsewhere(a), Fail
			switch {
			case lab != "":
				at = lab
			case loopback(at):
				silence = Warn // another server of a lab
			}
			asked[at] = true
			if c.nameserver(ctx, subject, at, silence, serials) && lab != "" {
				c.say(OK, subject, "was asked at "+lab+", where this server listens; that it is found on port 53, where clients ask, was not tested", "")
			}
		}
	}
	// What this server listens on itself, for the port of clients may lead there.
	for _, l := range c.status.DNS.Listen {
		at, err := netip.ParseAddrPort(l)
		if err == nil && !at.Addr().IsUnspecified() && !asked[l] {
			c.nameserver(ctx, "this server "+l, l, Fail, serials)
		}
	}
	switch len(serials) {
	case 0:
		c.say(Fail, "zone "+zone, "no server answered for it", "is UDP to the name servers let through from here?")
	case 1:
		for serial, servers := range serials {
			c.say(OK, "zone "+zone, fmt.Sprintf("serial %d on all that answered: %s", serial, strings.Join(servers, ", ")), "")
		}
	default:
		var parts []string
		for _, serial := range slices.Sorted(maps.Keys(serials)) {
			parts = append(parts, fmt.Sprintf("%d: %s", serial, strings.Join(serials[serial], ", ")))
		}
		c.say(Fail, "zone "+zone, "servers differ: serial "+strings.Join(parts, "; serial "), "they do not see the same topology: compare portolan status of each")
	}
	c.delegation(ctx, zone)
}

// elsewhere is where this server is to be asked instead of the port of clients, if a name server's address is a loopback one: in
// a lab there are no clients from elsewhere, and the port is often another. Empty: nowhere else.
func (c *Checker) elsewhere(address string) string {
	a, err := netip.ParseAddr(address)
	if err != nil || !a.IsLoopback() {
		return ""
	}
	other := ""
	for _, l := range c.status.DNS.Listen {
		at, err := netip.ParseAddrPort(l)
		switch {
		case err != nil || at.Addr() != a && !(at.Addr().IsUnspecified() && at.Addr().Is4() == a.Is4()):
		case fmt.Sprint(at.Port()) == c.port:
			return ""
		case other == "":
			other = netip.AddrPortFrom(a, at.Port()).String()
		}
	}
	return other
}

// nameserver asks one server for the zone, and returns whether it is as it should be. silence is how bad it is if it is silent.
func (c *Checker) nameserver(ctx context.Context, subject, at string, silence Level, serials map[uint32][]string) bool {
	for _, network := range []string{"udp", "tcp"} {
		answer, err := c.exchange(ctx, network, at, c.status.DNS.Zone, mdns.TypeSOA, false)
		if err != nil {
			c.say(silence, subject, fmt.Sprintf("no answer over %s: %v", strings.ToUpper(network), err),
				"is a portolan with the role dns running there, and the port open for UDP and TCP? This server listens on "+strings.Join(c.status.DNS.Listen, ", "))
			return false
		}
		var soa *mdns.SOA
		for _, rr := range answer.Answer {
			if s, ok := rr.(*mdns.SOA); ok {
				soa = s
			}
		}
		if !answer.Authoritative || soa == nil {
			c.say(Fail, subject, fmt.Sprintf("answers over %s without authority for %s (%s)", strings.ToUpper(network), c.status.DNS.Zone, mdns.RcodeToString[answer.Rcode]), "is another DNS server running at that address?")
			return false
		}
		if network == "udp" {
			serials[soa.Serial] = append(serials[soa.Serial], at)
		}
	}
	c.say(OK, subject, "authoritative over UDP and TCP", "")
	c.sourced(ctx, subject, at)
	c.alike(ctx, subject, at)
	return true
}

func loopback(at string) bool {
	a, err := netip.ParseAddrPort(at)
	return err == nil && a.Addr().IsLoopback()
}

// delegation compares what the parent says with what is configured. The servers of the parent themselves are asked: resolvers
// tell what the zone says of itself.
func (c *Checker) delegation(ctx context.Context, zone string) {
	subject := "delegation of " + zone
	resolver, err := c.resolver()
	if err != nil {
		c.say(Warn, subject, err.Error(), "")
		return
	}
	who := "the parent names "
	answer, server, err := c.referral(ctx, resolver, zone)
	if err != nil {
		c.say(Warn, subject, "the parent could not be asked, so resolvers were: "+err.Error(), "")
		who, server = "resolvers find ", resolver
		if answer, err = c.exchange(ctx, "udp", resolver, zone, mdns.TypeNS, true); err != nil {
			c.say(Warn, subject, "it could not be asked for: "+err.Error(), "")
			return
		}
	}
	var got []string
	for _, rr := range slices.Concat(answer.Answer, answer.Ns) {
		if ns, ok := rr.(*mdns.NS); ok && mdns.CanonicalName(ns.Hdr.Name) == mdns.CanonicalName(zone) {
			got = append(got, mdns.CanonicalName(ns.Ns))
		}
	}
	slices.Sort(got)
	got = slices.Compact(got)
	want := slices.Sorted(maps.Keys(c.status.DNS.Nameservers))
	switch {
	case len(got) == 0:
		c.say(Warn, subject, who+"no name servers for it ("+mdns.RcodeToString[answer.Rcode]+")",
			"in the parent zone, add "+zone+" NS "+strings.Join(want, ", ")+", and the addresses of those inside "+zone+" as glue")
	case !slices.Equal(got, want):
		c.say(Fail, subject, who+strings.Join(got, ", ")+", and configured are "+strings.Join(want, ", "), "make the parent's NS records and dns.nameservers equal")
	default:
		c.say(OK, subject, who+strings.Join(got, ", "), "")
		c.glue(ctx, who, server, answer)
	}
}

// parentServers bounds how many servers of the parent are tried.
const parentServers = 4

// referral asks the servers of the parent zone, one after the other, for the name servers of a zone, and returns the first answer
// with the server that gave it.
func (c *Checker) referral(ctx context.Context, resolver, zone string) (*mdns.Msg, string, error) {
	labels := mdns.SplitDomainName(zone)
	var names []string
	for i := 1; i <= len(labels) && len(names) == 0; i++ {
		parent := mdns.Fqdn(strings.Join(labels[i:], "."))
		answer, err := c.exchange(ctx, "udp", resolver, parent, mdns.TypeNS, true)
		if err != nil {
			return nil, "", err
		}
		for _, rr := range answer.Answer {
			if ns, ok := rr.(*mdns.NS); ok && mdns.CanonicalName(ns.Hdr.Name) == mdns.CanonicalName(parent) {
				names = append(names, ns.Ns)
			}
		}
	}
	failed := errors.New("its servers are not found")
	tried := 0
	for _, name := range names {
		addresses, err := c.lookup(ctx, name)
		if err != nil {
			failed = err
		}
		for _, a := range addresses {
			if tried++; tried > parentServers {
				return nil, "", failed
			}
			server := net.JoinHostPort(a, c.port)
			answer, err := c.exchange(ctx, "udp", server, zone, mdns.TypeNS, false)
			if err == nil && answer.Rcode != mdns.RcodeSuccess && answer.Rcode != mdns.RcodeNameError {
				err = fmt.Errorf("%s answers %s for %s", server, mdns.RcodeToString[answer.Rcode], zone)
			}
			if err == nil {
				return answer, server, nil
			}
			failed = err
		}
	}
	return nil, "", failed
}

// glue compares the addresses that the answer about the delegation, or who gave it, has for the name servers inside the zone.
func (c *Checker) glue(ctx context.Context, who, server string, delegation *mdns.Msg) {
	for _, name := range slices.Sorted(maps.Keys(c.status.DNS.Nameservers)) {
		want := slices.Clone(c.status.DNS.Nameservers[name])
		if len(want) == 0 {
			continue
		}
		var got []string
		for _, rr := range delegation.Extra {
			if mdns.CanonicalName(rr.Header().Name) == name {
				got = append(got, addressesOf(&mdns.Msg{Answer: []mdns.RR{rr}})...)
			}
		}
		if len(delegation.Answer) > 0 { // who answers for the zone itself need not add them
			got = nil
			for _, kind := range []uint16{mdns.TypeA, mdns.TypeAAAA} {
				answer, err := c.exchange(ctx, "udp", server, name, kind, true)
				if err != nil {
					c.say(Warn, "glue of "+name, err.Error(), "")
					return
				}
				got = append(got, addressesOf(answer)...)
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if slices.Equal(got, want) {
			c.say(OK, "glue of "+name, who+strings.Join(got, ", "), "")
			continue
		}
		found := strings.Join(got, ", ")
		if found == "" {
			found = "no address"
		}
		c.say(Fail, "glue of "+name, who+found+", and configured is "+strings.Join(want, ", "), "make the parent's glue and dns.nameservers equal")
	}
}

func addressesOf(m *mdns.Msg) []string {
	var list []string
	for _, rr := range m.Answer {
		switch r := rr.(type) {
		case *mdns.A:
			list = append(list, r.A.String())
		case *mdns.AAAA:
			list = append(list, r.AAAA.String())
		}
	}
	return list
}

func (c *Checker) exchange(ctx context.Context, network, at, name string, kind uint16, recurse bool) (*mdns.Msg, error) {
	q := new(mdns.Msg).SetQuestion(mdns.Fqdn(name), kind)
	q.RecursionDesired = recurse
	q.SetEdns0(1232, false)
	return c.ask(ctx, network, at, q)
}

// ask asks a server, over TCP where an answer is too large for UDP.
func (c *Checker) ask(ctx context.Context, network, at string, q *mdns.Msg) (*mdns.Msg, error) {
	one, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	client := &mdns.Client{Net: network, Timeout: timeout}
	answer, _, err := client.ExchangeContext(one, q, at)
	if err != nil {
		return nil, fmt.Errorf("asking %s for %s %s: %w", at, q.Question[0].Name, mdns.TypeToString[q.Question[0].Qtype], err)
	}
	if answer.Truncated && network == "udp" {
		return c.ask(ctx, "tcp", at, q)
	}
	return answer, nil
}

func (c *Checker) resolver() (string, error) {
	if c.Resolver != "" {
		return c.Resolver, nil
	}
	config, err := mdns.ClientConfigFromFile("/etc/resolv.conf")
	if errors.Is(err, os.ErrNotExist) || err == nil && len(config.Servers) == 0 {
		return "", errors.New("this machine has no resolver to ask: /etc/resolv.conf names none")
	}
	if err != nil {
		return "", fmt.Errorf("reading /etc/resolv.conf: %w", err)
	}
	return net.JoinHostPort(config.Servers[0], config.Port), nil
}

// lookup finds the addresses of a host by the resolver.
func (c *Checker) lookup(ctx context.Context, host string) ([]string, error) {
	resolver, err := c.resolver()
	if err != nil {
		return nil, err
	}
	var list []string
	for _, kind := range []uint16{mdns.TypeA, mdns.TypeAAAA} {
		answer, err := c.exchange(ctx, "udp", resolver, host, kind, true)
		if err != nil {
			return nil, err
		}
		list = append(list, addressesOf(answer)...)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("%s has no address", host)
	}
	return list, nil
}

// ---- certificates and client names -------------------------------------------------------------------------------------

// certificates looks whether every address serves a certificate for each client name.
func (c *Checker) certificates(ctx context.Context) {
	names := slices.Clone(c.registry.ClientNames)
	if len(names) == 0 && c.registry.FQDN != "" {
		names = []string{c.registry.FQDN}
	}
	for _, r := range c.staying() {
		u, err := url.Parse(r.Endpoint)
		if err != nil || u.Host == "" {
			continue // named already as incomplete
		}
		if u.Scheme != "https" {
			c.say(Warn, "certificate "+r.Region, "the endpoint speaks plain HTTP", "clients refuse that off loopback unless told otherwise: serve HTTPS with a certificate for "+strings.Join(names, ", "))
			continue
		}
		port := u.Port()
		if port == "" {
			port = "443"
		}
		roots, unread := c.roots(r.Region)
		targets := r.Addresses
		if r.Hostname != "" {
			targets = []string{strings.TrimSuffix(r.Hostname, ".")}
		}
		for _, target := range targets {
			for _, name := range names {
				c.certificate(ctx, r.Region, net.JoinHostPort(target, port), name, roots, unread)
			}
		}
	}
}

// roots are what certificates of a region's replica are to be verified by, as the probes do. The error says that what the replica
// names is not among them: its file is on the machines of the servers.
func (c *Checker) roots(region string) (*x509.CertPool, error) {
	i := slices.IndexFunc(c.registry.Document.Replicas, func(d topology.ReplicaDocument) bool { return d.Region == region })
	if i < 0 || c.registry.Document.Replicas[i].CA == "" {
		return c.Roots, nil
	}
	roots, err := health.Roots(c.Roots, c.registry.Document.Replicas[i].CA)
	if err != nil {
		return c.Roots, err
	}
	return roots, nil
}

// certificate looks whether a certificate for name is served at an address. unread is why roots may lack some that are to be
// trusted; nil if they do not.
func (c *Checker) certificate(ctx context.Context, region, at, name string, roots *x509.CertPool, unread error) {
	subject := fmt.Sprintf("certificate %s %s for %s", region, at, name)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	dialer := &tls.Dialer{Config: &tls.Config{ServerName: name, RootCAs: roots, MinVersion: tls.VersionTLS12}}
	conn, err := dialer.DialContext(ctx, "tcp", at)
	if err != nil {
		advice := "can the address be reached from here?"
		var invalid *tls.CertificateVerificationError
		var unknown x509.UnknownAuthorityError
		switch {
		case errors.As(err, &unknown) && unread != nil && c.Roots == nil:
			c.say(Warn, subject, "it cannot be verified here: "+unread.Error(), "give the certificates of the replica's ca with --ca, or check on a server's machine")
			return
		case errors.As(err, &unknown):
			advice = "clients refuse that unless they trust its authority: if they do, give the authority's certificate with --ca"
		case errors.As(err, &invalid):
			advice = "every replica serves a certificate that is valid for every client name"
		}
		c.say(Fail, subject, err.Error(), advice)
		return
	}
	defer conn.Close()
	state := conn.(*tls.Conn).ConnectionState()
	end := health.Expiry(&state)
	text, advice := "valid until "+end.UTC().Format(time.DateOnly), "renew it: HTTP-01 challenges do not work behind the one name; DNS-01 does"
	if end.Before(state.PeerCertificates[0].NotAfter) {
		text, advice = text+", when a certificate ends that leads to its root", "serve it with others that lead there"
	}
	warning := soon
	if h := c.status.Health; h != nil {
		warning = time.Duration(h.CertificateWarning) * time.Second
	}
	if time.Until(end) < warning {
		c.say(Warn, subject, text, advice)
		return
	}
	c.say(OK, subject, text, "")
}

// clientNames looks whether the client names lead to the one name, and whether CAA records let their certificates be renewed.
func (c *Checker) clientNames(ctx context.Context) {
	if c.registry.FQDN == "" {
		return
	}
	one := mdns.CanonicalName(c.registry.FQDN)
	resolver, err := c.resolver()
	for _, name := range c.registry.ClientNames {
		subject := "client name " + name
		if err != nil {
			c.say(Warn, subject, err.Error(), "")
			continue
		}
		answer, err := c.exchange(ctx, "udp", resolver, name, mdns.TypeA, true)
		if err != nil {
			c.say(Warn, subject, "it could not be looked up: "+err.Error(), "")
			continue
		}
		leads := mdns.CanonicalName(name) == one
		for _, rr := range answer.Answer {
			if cname, ok := rr.(*mdns.CNAME); ok && mdns.CanonicalName(cname.Target) == one {
				leads = true
			}
		}
		if !leads {
			c.say(Warn, subject, "resolvers do not find that it leads to "+one, "make it a CNAME of "+one)
			continue
		}
		c.say(OK, subject, "leads to "+one, "")
		c.caa(ctx, resolver, name)
	}
}

// caa looks which authorities may issue certificates for a name. The records that are nearest count, at the name or a parent of it
// (RFC 8659, section 3).
func (c *Checker) caa(ctx context.Context, resolver, name string) {
	subject := "CAA of " + name
	labels := mdns.SplitDomainName(name)
	for i := range labels {
		at := strings.Join(labels[i:], ".")
		answer, err := c.exchange(ctx, "udp", resolver, at, mdns.TypeCAA, true)
		if err != nil {
			c.say(Warn, subject, err.Error(), "")
			return
		}
		if answer.Rcode != mdns.RcodeSuccess && answer.Rcode != mdns.RcodeNameError {
			c.say(Fail, subject, "resolvers answer "+mdns.RcodeToString[answer.Rcode]+" for "+at, "certificate authorities do not issue while CAA cannot be looked up (RFC 8659, section 3)")
			return
		}
		there, restricted, issuers := false, false, []string(nil)
		for _, rr := range answer.Answer {
			caa, ok := rr.(*mdns.CAA)
			there = there || ok
			if !ok || !strings.EqualFold(caa.Tag, "issue") {
				continue
			}
			restricted = true
			if issuer, _, _ := strings.Cut(caa.Value, ";"); strings.TrimSpace(issuer) != "" { // without one it allows nobody
				issuers = append(issuers, caa.Value)
			}
		}
		switch {
		case !there:
			continue
		case len(issuers) > 0:
			c.say(OK, subject, "issuers "+strings.Join(issuers, ", ")+", as "+at+" says", "")
		case restricted:
			c.say(Warn, subject, "nobody may issue, as "+at+" says", "unless its certificates are of an authority of your own, name theirs in a CAA record of "+name)
		default:
			c.say(OK, subject, "any authority may issue, as "+at+" says", "")
		}
		return
	}
	c.say(OK, subject, "any authority may issue", "")
}
