package daemon

import (
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"

	"portolan/dns"
	"portolan/health"
	"portolan/store/consul"
	"portolan/strict"
)

// Config is the configuration of a daemon: one YAML file, strictly decoded. Paths of files are relative to the folder of
// that file. What is not set has the default named here.
type Config struct {
	// Store is where the topology and the state live: bolt:PATH, a file on this machine (the default,
	// bolt:/var/lib/portolan/portolan.db), or consul://HOST:PORT/PREFIX for several machines.
	Store Store `yaml:"store"`
	// Consul says more of a store in Consul.
	Consul Consul `yaml:"consul"`
	// Data is the folder for what this machine keeps for itself: the last good topology, the last verdicts, the event spool
	// and its key. No other process may use it. Default: the folder of the bolt file; /var/lib/portolan with Consul.
	Data string `yaml:"data"`
	// User is whom a process that root starts becomes before it reads or makes anything but the configuration. It keeps the right to
	// bind ports below 1024. Default: none.
	User string `yaml:"user"`
	// Topology is a file, topology.yaml, that is applied when the store is empty. Later a difference between the two is
	// reported and nothing is changed. Default: none.
	Topology string `yaml:"topology"`
	// Roles are what this process does: dns, replicator, or all of it. Default: [all].
	Roles []Role `yaml:"roles"`

	DNS         DNS         `yaml:"dns"`
	Geo         Geo         `yaml:"geo"`
	API         API         `yaml:"api"`
	Events      Events      `yaml:"events"`
	Health      Health      `yaml:"health"`
	Replication Replication `yaml:"replication"`
	Log         Log         `yaml:"log"`
}

// Store names a store. Exactly one of its forms is set.
type Store struct {
	// Bolt is the path of the file.
	Bolt string
	// Consul is the address, host:port, and Prefix the folder of its keys ("portolan" if empty).
	Consul string
	Prefix string
}

// UnmarshalText reads bolt:PATH or consul://HOST:PORT/PREFIX.
func (s *Store) UnmarshalText(text []byte) error {
	const forms = "bolt:/var/lib/portolan/portolan.db or consul://127.0.0.1:8500/portolan"
	t := string(text)
	if path, ok := strings.CutPrefix(t, "bolt:"); ok {
		if strings.TrimLeft(path, "/") == "" || strings.HasPrefix(path, "//") {
			return fmt.Errorf("%q does not name a file: want bolt:PATH, such as bolt:/var/lib/portolan/portolan.db", t)
		}
		*s = Store{Bolt: path}
		return nil
	}
	if !strings.HasPrefix(t, "consul://") {
		return fmt.Errorf("%q is no store: want %s", t, forms)
	}
	u, err := url.Parse(t)
	switch {
	case err != nil:
		return fmt.Errorf("is no store that can be read: want %s", forms)
	case u.User != nil:
		return fmt.Errorf("holds a user or password: the ACL token is read from the file that consul.token_file names")
	case u.RawQuery != "" || u.Fragment != "":
		return fmt.Errorf("has more than an address and a prefix: the datacenter and so on are set in the section consul")
	case u.Hostname() == "":
		return fmt.Errorf("%q has no address: want %s", t, forms)
	}
	host := u.Host
	if u.Port() == "" {
		host += ":8500"
	}
	*s = Store{Consul: host, Prefix: strings.Trim(u.Path, "/")}
	return nil
}

// String is the store as it stands in the file.
func (s Store) String() string {
	if s.Bolt != "" {
		return "bolt:" + s.Bolt
	}
	prefix := s.Prefix
	if prefix == "" {
		prefix = consul.DefaultPrefix
	}
	return "consul://" + s.Consul + "/" + prefix
}

// Consul says how a store in Consul is reached.
type Consul struct {
	// Datacenter whose keys are used. Default: the agent's own.
	Datacenter string `yaml:"datacenter"`
	// TokenFile holds the ACL token. It is read again when it changes. Default: CONSUL_HTTP_TOKEN, else none.
	TokenFile string `yaml:"token_file"`
	// TLS speaks HTTPS. Default: false; true where CA is set.
	TLS bool `yaml:"tls"`
	// CA is a PEM file with the certificates to trust. Default: the system's.
	CA string `yaml:"ca"`
}

// Role is a part of the work.
type Role string

// The roles.
const (
	// RoleDNS answers clients, and probes replicas for that.
	RoleDNS Role = "dns"
	// RoleReplicator carries content between the replicas, and listens to their events.
	RoleReplicator Role = "replicator"
	// RoleAll is both: the default.
	RoleAll Role = "all"
)

// UnmarshalText reads a role.
func (r *Role) UnmarshalText(text []byte) error {
	return word(r, text, RoleAll, RoleDNS, RoleReplicator)
}

// DNS is the server of the front door.
type DNS struct {
	// Listen are the addresses for UDP and TCP alike. Default: [127.0.0.1:5300]. Clients ask on port 53.
	Listen []netip.AddrPort `yaml:"listen"`
	// Zone is the name that the server is authoritative for: registries are <registry>.<zone>. No default.
	Zone string `yaml:"zone"`
	// Nameservers are the zone's name servers with their addresses: {ns1: [192.0.2.53]} in the zone, or with a final dot and
	// no addresses outside of it. No default.
	Nameservers map[string][]netip.Addr `yaml:"nameservers"`
	// Contact is the mail address in the zone's SOA record. Default: hostmaster@<zone>.
	Contact string `yaml:"contact"`
	// Static is a zone file with further records: A AAAA CNAME TXT CAA MX SRV. Default: none.
	Static string `yaml:"static"`
	TTL    TTL    `yaml:"ttl"`
	// Whoami is how much whoami.<registry>.<zone> tells: seen, full or off. Default: seen.
	Whoami Whoami `yaml:"whoami"`
	// NSID names this server among those of the zone, for whoever asks by the EDNS option of that name or for id.server TXT CH.
	// Default: none.
	NSID string `yaml:"nsid"`
	// Version is the answer to version.bind TXT CH. Default: none, which refuses it.
	Version   string    `yaml:"version"`
	Cookies   Cookies   `yaml:"cookies"`
	RateLimit RateLimit `yaml:"rate_limit"`
	Sample    Sample    `yaml:"sample"`
}

// Sample is the record of clients that portolan simulate --queries reads.
type Sample struct {
	// File is where it is kept. Default: none; no clients are recorded.
	File string `yaml:"file"`
	// Rate is the share of the queries at registries' names that are recorded. Default: 0.01.
	Rate float64 `yaml:"rate"`
}

// RateLimit bounds the responses to one network over UDP, so that this server is of no use for floods in the name of others.
// TCP, loopback and who shows a good cookie have no limit.
type RateLimit struct {
	// ResponsesPerSecond go to one /24 of IPv4 or /56 of IPv6, of each kind of response. Default: 0, no limit.
	ResponsesPerSecond int `yaml:"responses_per_second"`
	// Slip lets one in so many of those beyond the limit through without records, so that a real client comes back over TCP; 0
	// for none. Default: 2.
	Slip int `yaml:"slip"`
	// Exempt are networks without a limit. Default: none.
	Exempt []netip.Prefix `yaml:"exempt"`
}

// Cookies are DNS cookies (RFC 7873), which need no setting where one server answers at an address.
type Cookies struct {
	// Secret is a file with the keys, read again on SIGHUP: 32 hexadecimal digits a line, first the one that makes cookies, then
	// perhaps one more that is recognised. Default: none; a random key that no other server knows.
	Secret string `yaml:"secret"`
}

// TTL is how long answers may be kept.
type TTL struct {
	// Min holds while something is about to change. Default: 5s.
	Min time.Duration `yaml:"min"`
	// Max holds otherwise; it is also how long a replica that is deleted is drained. Default: 60s.
	Max time.Duration `yaml:"max"`
}

// Whoami is the setting dns.whoami.
type Whoami string

// UnmarshalText reads seen, full or off.
func (w *Whoami) UnmarshalText(text []byte) error { return word(w, text, "seen", "full", "off") }

// Geo says where clients are looked up.
type Geo struct {
	// Database is a file in the MaxMind DB format: GeoLite2, GeoIP2, DB-IP, or an ip-location-db file; or a list of two, one
	// with IPv4 and one with IPv6, as ip-location-db has them. Default: the built-in table of countries.
	Database []string `yaml:"database,single"`
	// ASN is a database of autonomous systems, a file or two as well. Default: none; clients without a subnet are then told
	// apart by their resolver's network.
	ASN []string `yaml:"asn,single"`
	// Prefixes is a file of orders for prefixes, a line each: "203.0.113.0/24 westus,eastus". Default: none.
	Prefixes string `yaml:"prefixes"`
	// Latencies is a file of round-trip times, a line each: "country/DE westeurope 14". Default: none; distances alone count.
	Latencies string `yaml:"latencies"`
}

// API is the HTTP API of operators, with /healthz, /readyz and /metrics.
type API struct {
	// Listen is its address. Default: 127.0.0.1:8420. Anywhere but on loopback TokenFile is needed.
	Listen netip.AddrPort `yaml:"listen"`
	// TokenFile holds the bearer token that every request of /v1 must show. Default: none.
	TokenFile string `yaml:"token_file"`
	// Names are host names by which the API is reached, besides addresses and localhost. Others are refused, so that no web
	// page can reach it by a name of its own. Default: none.
	Names []string `yaml:"names"`
	// TLS is the certificate for HTTPS. Default: none, plain HTTP.
	TLS KeyPair `yaml:"tls"`
}

// KeyPair is a certificate: both files, in PEM, or none. They are read again when they change, and on SIGHUP.
type KeyPair struct {
	// Cert holds the certificate and what leads to its root.
	Cert string `yaml:"cert"`
	// Key holds its private key.
	Key string `yaml:"key"`
}

// Events is the listener for the notifications of replicas.
type Events struct {
	// Listen is its address. Default: none; what happens at the replicas is then found by scans alone.
	Listen netip.AddrPort `yaml:"listen"`
	// URL is the listener as replicas reach it: https://portolan.example.net:8421. Default: made of listen. It is only for
	// the configuration that portolan events token prints.
	URL string `yaml:"url"`
	// TLS is the certificate. Without it the listener must be on loopback, or insecure.
	TLS KeyPair `yaml:"tls"`
	// Key is the file of the secret that tokens are made of; it is made when it is not there. All replicators of an
	// installation need the same. Default: events.key in the data folder.
	Key string `yaml:"key"`
	// Insecure allows plain HTTP off loopback: tokens are then sent in the clear. Default: false.
	Insecure bool `yaml:"insecure"`
}

// Health is how replicas are probed.
type Health struct {
	// Interval is the time between two probes of an address. Default: 5s.
	Interval time.Duration `yaml:"interval"`
	// CanaryInterval is the time between two readings of a replica's canary. Default: 1m.
	CanaryInterval time.Duration `yaml:"canary_interval"`
	// Timeout is the time that one probe may take. Default: 2s.
	Timeout time.Duration `yaml:"timeout"`
	// Rise is how many probes in a row make a replica healthy. Default: 2.
	Rise int `yaml:"rise"`
	// Fall is how many make it unhealthy. Default: 3.
	Fall int `yaml:"fall"`
	// Voter is what this server calls itself where several vote over Consul: each needs a name of its own. Default: the
	// machine's host name.
	Voter string `yaml:"voter"`
	// CertificateWarning is how long before its end a replica's certificate is warned of; 0: only when it is over. Default: 336h.
	CertificateWarning time.Duration `yaml:"certificate_warning"`
}

// Replication is how content is carried.
type Replication struct {
	// ScanInterval is the time between two listings of a replica's tags. Default: 5m.
	ScanInterval time.Duration `yaml:"scan_interval"`
	// Copies is how many images are copied to one replica at a time. Default: 4.
	Copies int `yaml:"copies"`
	// RequestsPerSecond bounds what is asked of one replica while scanning. Default: 50.
	RequestsPerSecond float64 `yaml:"requests_per_second"`
	// DeleteConfirmation is how long a tag must be absent, in two scans, to count as deleted where no event said so.
	// Default: 10m.
	DeleteConfirmation time.Duration `yaml:"delete_confirmation"`
}

// Log is what is logged, to standard error.
type Log struct {
	// Level is the lowest that is written: debug, info, warn or error. Default: info.
	Level Level `yaml:"level"`
	// Format is console (for people), json, or auto: console on a terminal, else json. Default: auto.
	Format Format `yaml:"format"`
}

// Level is the setting log.level.
type Level string

// UnmarshalText reads a level.
func (l *Level) UnmarshalText(text []byte) error {
	return word(l, text, "debug", "info", "warn", "error")
}

func (l Level) zap() zapcore.Level {
	level, err := zapcore.ParseLevel(string(l))
	if err != nil {
		return zapcore.InfoLevel
	}
	return level
}

// Format is the setting log.format.
type Format string

// The log formats.
const (
	FormatAuto    Format = "auto"
	FormatConsole Format = "console"
	FormatJSON    Format = "json"
)

// UnmarshalText reads a format.
func (f *Format) UnmarshalText(text []byte) error {
	return word(f, text, FormatAuto, FormatConsole, FormatJSON)
}

// word reads one of a few words.
func word[T ~string](into *T, text []byte, allowed ...T) error {
	if slices.Contains(allowed, T(text)) {
		*into = T(text)
		return nil
	}
	words := make([]string, len(allowed))
	for i, a := range allowed {
		words[i] = string(a)
	}
	return strict.Unknown(string(text), words)
}

// DefaultData is the folder of the default store, and of the data with Consul.
const DefaultData = "/var/lib/portolan"

// Default is the configuration of an empty file. It lacks a zone and its name servers, which have no default.
func Default() Config {
	return Config{
		Store: Store{Bolt: filepath.Join(DefaultData, "portolan.db")},
		Roles: []Role{RoleAll},
		DNS: DNS{
			Listen:    []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:5300")},
			TTL:       TTL{Min: 5 * time.Second, Max: time.Minute},
			Whoami:    "seen",
			RateLimit: RateLimit{Slip: 2},
			Sample:    Sample{Rate: 0.01},
		},
		API:         API{Listen: netip.MustParseAddrPort("127.0.0.1:8420")},
		Health:      Health{Interval: 5 * time.Second, CanaryInterval: time.Minute, Timeout: 2 * time.Second, Rise: 2, Fall: 3, CertificateWarning: 14 * 24 * time.Hour},
		Replication: Replication{ScanInterval: 5 * time.Minute, Copies: 4, RequestsPerSecond: 50, DeleteConfirmation: 10 * time.Minute},
		Log:         Log{Level: "info", Format: FormatAuto},
	}
}

// Has reports whether the process has that role.
func (c *Config) Has(r Role) bool {
	return slices.Contains(c.Roles, r) || slices.Contains(c.Roles, RoleAll)
}

// EventsKey is the file of the secret that event tokens are made of.
func (c *Config) EventsKey() string {
	if c.Events.Key != "" {
		return c.Events.Key
	}
	return filepath.Join(c.Data, "events.key")
}

// EventsURL is the events listener as replicas reach it; empty if there is none.
func (c *Config) EventsURL() string {
	switch {
	case c.Events.URL != "":
		return strings.TrimSuffix(c.Events.URL, "/")
	case !c.Events.Listen.IsValid():
		return ""
	case c.Events.TLS.Cert != "":
		return "https://" + c.Events.Listen.String()
	}
	return "http://" + c.Events.Listen.String()
}

// Load reads the configuration in the file path. roles, if there are any, replace those of the file. The error is a
// *strict.InvalidError with every fault, its line, column and source, unless the file cannot be read.
func Load(path string, roles ...Role) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, fmt.Errorf("reading the configuration: %w", err)
	}
	return Parse(path, text, roles...)
}

// Parse is Load for text that was read already; path is for errors, and for the paths of files in it.
func Parse(path string, text []byte, roles ...Role) (Config, error) {
	c := Default()
	f := strict.Decode(path, text, &c, strict.Options{
		Limit:  1 << 20,
		Secret: func(path, line string) bool { return path == "store" && strings.Contains(line, "@") }, // it may hold a password
	})
	if len(roles) > 0 {
		c.Roles = roles
	}
	c.settle(filepath.Dir(path))
	c.validate(f)
	if err := f.Err(); err != nil {
		return Config{}, err
	}
	return c, nil
}

// settle makes paths absolute or relative to the working folder, and fills in what depends on other settings.
func (c *Config) settle(folder string) {
	paths := []*string{&c.Store.Bolt, &c.Data, &c.Topology, &c.Consul.TokenFile, &c.Consul.CA, &c.DNS.Static, &c.DNS.Cookies.Secret, &c.DNS.Sample.File,
		&c.API.TokenFile, &c.API.TLS.Cert, &c.API.TLS.Key, &c.Events.TLS.Cert, &c.Events.TLS.Key, &c.Events.Key, &c.Geo.Prefixes, &c.Geo.Latencies}
	for _, list := range [][]string{c.Geo.Database, c.Geo.ASN} {
		for i := range list {
			paths = append(paths, &list[i])
		}
	}
	for _, p := range paths {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(folder, *p)
		}
	}
	if c.Data == "" {
		c.Data = DefaultData
		if c.Store.Bolt != "" {
			c.Data = filepath.Dir(c.Store.Bolt)
		}
	}
	if c.Consul.CA != "" {
		c.Consul.TLS = true
	}
}

// validate finds what is wrong with values that are each well formed. What could not be read is still the default, and nothing is
// said of others for its sake.
func (c *Config) validate(f *strict.File) {
	if c.Store.Bolt != "" && c.Consul != (Consul{}) && !f.Unread("store") {
		f.Fault("consul", "is set, but the store is %s: remove the section, or set store: consul://HOST:PORT/PREFIX", c.Store)
	}
	if len(c.Roles) == 0 {
		f.Fault("roles", "is empty: at least one of all, dns, replicator is needed")
	}
	if c.Store.Bolt != "" && !(c.Has(RoleDNS) && c.Has(RoleReplicator)) && !f.Unread("roles") {
		f.Fault("store", "a bolt file serves one process, which must have all roles: leave roles (and --role) out, or keep the store in Consul")
	}
	if c.Has(RoleDNS) && !f.Unread("roles") {
		c.validateDNS(f)
	}
	c.validateIdentity(f)
	c.validateListeners(f)
	between(f, "dns.rate_limit.responses_per_second", c.DNS.RateLimit.ResponsesPerSecond, 0, 10000)
	between(f, "dns.rate_limit.slip", c.DNS.RateLimit.Slip, 0, 10)
	between(f, "dns.sample.rate", c.DNS.Sample.Rate, 1e-6, 1)
	between(f, "dns.ttl.min", c.DNS.TTL.Min, time.Second, 24*time.Hour)
	between(f, "dns.ttl.max", c.DNS.TTL.Max, time.Second, 24*time.Hour)
	for _, ttl := range []struct {
		path  string
		value time.Duration
	}{{"dns.ttl.min", c.DNS.TTL.Min}, {"dns.ttl.max", c.DNS.TTL.Max}} {
		if ttl.value%time.Second != 0 {
			f.Fault(ttl.path, "%v is not in whole seconds", ttl.value)
		}
	}
	if c.DNS.TTL.Min > c.DNS.TTL.Max {
		f.Fault("dns.ttl", "min, %v, is above max, %v", c.DNS.TTL.Min, c.DNS.TTL.Max)
	}
	c.API.TLS.validate(f, "api.tls")
	if !c.API.Listen.Addr().IsLoopback() && c.API.TokenFile == "" && !f.Unread("api.token_file") {
		f.Fault("api.listen", "%v is not on loopback, so that anybody who reaches it could change everything: set api.token_file, or listen on 127.0.0.1", c.API.Listen)
	}
	c.Events.TLS.validate(f, "events.tls")
	if l := c.Events.Listen; l.IsValid() && c.Events.TLS.Cert == "" && !l.Addr().IsLoopback() && !c.Events.Insecure && !f.Unread("events.tls") && !f.Unread("events.insecure") {
		f.Fault("events.listen", "%v is not on loopback, and without TLS tokens would be sent in the clear: set events.tls (cert and key), or events.insecure: true", l)
	}
	if c.Events.URL != "" {
		if u, err := url.Parse(c.Events.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil {
			f.Fault("events.url", "is not a URL such as https://portolan.example.net:8421")
		}
	}
	between(f, "health.interval", c.Health.Interval, 100*time.Millisecond, time.Hour)
	between(f, "health.canary_interval", c.Health.CanaryInterval, 10*time.Second, 24*time.Hour)
	between(f, "health.timeout", c.Health.Timeout, 10*time.Millisecond, time.Minute)
	between(f, "health.rise", c.Health.Rise, 1, 100)
	between(f, "health.fall", c.Health.Fall, 1, 100)
	if c.Health.Voter != "" && c.Store.Bolt != "" && !f.Unread("store") {
		f.Fault("health.voter", "is set, but the store is %s, where there is nobody else to vote: remove it, or set store: consul://HOST:PORT/PREFIX", c.Store)
	} else if c.Health.Voter != "" {
		if err := health.CheckVoter(c.Health.Voter); err != nil {
			f.Fault("health.voter", "%v", err)
		}
	}
	between(f, "health.certificate_warning", c.Health.CertificateWarning, 0, 365*24*time.Hour)
	between(f, "replication.scan_interval", c.Replication.ScanInterval, time.Second, 24*time.Hour)
	between(f, "replication.copies", c.Replication.Copies, 1, 64)
	between(f, "replication.requests_per_second", c.Replication.RequestsPerSecond, 0.1, 10000)
	between(f, "replication.delete_confirmation", c.Replication.DeleteConfirmation, time.Second, 24*time.Hour)
}

func (c *Config) validateDNS(f *strict.File) {
	if c.DNS.Zone == "" {
		f.Fault("dns.zone", "is missing: the name that this server is authoritative for, such as geo.example.net")
	} else if err := dns.CheckZone(c.DNS.Zone); err != nil {
		f.Fault("dns.zone", "%q: %v", c.DNS.Zone, err)
	}
	if len(c.DNS.Nameservers) == 0 {
		f.Fault("dns.nameservers", "is missing: at least one name server, such as {ns1: [192.0.2.53]}")
	}
	if len(c.DNS.Listen) == 0 {
		f.Fault("dns.listen", "is empty: at least one ADDRESS:PORT is needed")
	}
}

// validateListeners finds addresses that two listeners of this process would both have: the second would be told only that the
// first is there. DNS listens over TCP too.
func (c *Config) validateListeners(f *strict.File) {
	type listener struct {
		path string
		at   netip.AddrPort
	}
	var all []listener
	if c.Has(RoleDNS) {
		for i, at := range c.DNS.Listen {
			all = append(all, listener{fmt.Sprintf("dns.listen[%d]", i), at})
		}
	}
	all = append(all, listener{"api.listen", c.API.Listen})
	if c.Has(RoleReplicator) && c.Events.Listen.IsValid() {
		all = append(all, listener{"events.listen", c.Events.Listen})
	}
	for i, l := range all {
		for _, other := range all[:i] {
			if l.at.Port() != 0 && l.at.Port() == other.at.Port() && overlap(l.at.Addr(), other.at.Addr()) {
				f.Fault(l.path, "%v cannot be had, because %s is %v: give one of them another port", l.at, other.path, other.at)
				break
			}
		}
	}
}

// overlap reports whether listeners on one port at both addresses would be in each other's way.
func overlap(a, b netip.Addr) bool {
	a, b = a.Unmap(), b.Unmap()
	return a == b || a.Is4() == b.Is4() && (a.IsUnspecified() || b.IsUnspecified())
}

func (c *Config) validateIdentity(f *strict.File) {
	for _, s := range []struct{ path, text string }{{"dns.nsid", c.DNS.NSID}, {"dns.version", c.DNS.Version}} {
		if err := dns.CheckIdentity(s.text); err != nil {
			f.Fault(s.path, "%v", err)
		}
	}
}

func (k KeyPair) validate(f *strict.File, path string) {
	switch {
	case k.Cert != "" && k.Key == "":
		f.Fault(path+".key", "is missing: the file of the certificate's private key")
	case k.Cert == "" && k.Key != "":
		f.Fault(path+".cert", "is missing: the file of the certificate")
	}
}

func between[T int | float64 | time.Duration](f *strict.File, path string, value, least, most T) {
	if value < least || value > most {
		f.Fault(path, "%v is outside of %v to %v", value, least, most)
	}
}
