package daemon

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"portolan/topology"
)

// minimal is the shortest file that all roles accept.
const minimal = "dns:\n  zone: geo.example.net\n  nameservers: {ns1: [192.0.2.53]}\n"

func TestConfigDefaults(t *testing.T) {
	t.Parallel()
	c, err := Parse("/etc/portolan/portolan.yaml", []byte(minimal))
	if err != nil {
		t.Fatal(err)
	}
	if c.Store.String() != "bolt:/var/lib/portolan/portolan.db" || c.Data != "/var/lib/portolan" {
		t.Errorf("store %v, data %s", c.Store, c.Data)
	}
	if c.EventsKey() != "/var/lib/portolan/events.key" || c.EventsURL() != "" {
		t.Errorf("events key %q, URL %q", c.EventsKey(), c.EventsURL())
	}
	if c.DNS.TTL.Min != 5*time.Second || c.DNS.TTL.Max != time.Minute || c.Replication.DeleteConfirmation != 10*time.Minute {
		t.Errorf("%+v", c)
	}
	if !c.Has(RoleDNS) || !c.Has(RoleReplicator) {
		t.Errorf("roles %v", c.Roles)
	}
}

func TestConfigWhole(t *testing.T) {
	t.Parallel()
	text := `store: consul://127.0.0.1/a/b/
consul: {datacenter: dc1, token_file: token, ca: /ca.pem}
roles: [dns]
topology: topology.yaml
dns:
  listen: ["127.0.0.1:5300", "[::1]:5300"]
  zone: geo.example.net
  nameservers: {ns1: [192.0.2.53], ns.example.org.: []}
  contact: hostmaster@example.net
  static: zone.db
  ttl: {min: 2s, max: 30s}
  whoami: full
  nsid: fra1-a
  version: portolan
  cookies: {secret: cookies}
  rate_limit: {responses_per_second: 50, slip: 3, exempt: [192.0.2.0/24, "2001:db8::/32"]}
  sample: {file: clients.txt, rate: 0.5}
geo: {database: city.mmdb, asn: asn.mmdb}
api: {listen: "0.0.0.0:8420", token_file: token, names: [portolan.example.net], tls: {cert: a, key: b}}
events: {listen: "127.0.0.1:8421", key: k}
health: {interval: 1s, timeout: 500ms, rise: 1, fall: 2}
replication: {scan_interval: 1m, copies: 8, requests_per_second: 2.5, delete_confirmation: 1m}
log: {level: debug, format: json}
data: data
`
	c, err := Parse("/etc/portolan/portolan.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	for name, pair := range map[string][2]string{
		"store":    {c.Store.String(), "consul://127.0.0.1:8500/a/b"},
		"token":    {c.Consul.TokenFile, "/etc/portolan/token"},
		"ca":       {c.Consul.CA, "/ca.pem"},
		"topology": {c.Topology, "/etc/portolan/topology.yaml"},
		"static":   {c.DNS.Static, "/etc/portolan/zone.db"},
		"data":     {c.Data, "/etc/portolan/data"},
		"events":   {c.EventsURL(), "http://127.0.0.1:8421"},
		"listen":   {c.DNS.Listen[1].String(), "[::1]:5300"},
		"nsid":     {c.DNS.NSID, "fra1-a"},
		"cookies":  {c.DNS.Cookies.Secret, "/etc/portolan/cookies"},
		"limit":    {fmt.Sprint(c.DNS.RateLimit), "{50 3 [192.0.2.0/24 2001:db8::/32]}"},
		"sample":   {fmt.Sprint(c.DNS.Sample), "{/etc/portolan/clients.txt 0.5}"},
		"version":  {c.DNS.Version, "portolan"},
		"ns":       {c.DNS.Nameservers["ns1"][0].String(), "192.0.2.53"},
	} {
		if pair[0] != pair[1] {
			t.Errorf("%s: %q, want %q", name, pair[0], pair[1])
		}
	}
	if !c.Consul.TLS || c.Has(RoleReplicator) || c.Replication.RequestsPerSecond != 2.5 || len(c.DNS.Nameservers["ns.example.org."]) != 0 {
		t.Errorf("%+v", c)
	}
}

// Every fault is told with its place, its source, and what would be right; all of them at once.
func TestConfigFaults(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		text string
		want string // the whole error
	}{
		"misspelt key": {minimal + "helth: {rise: 2}\n",
			"p.yaml:4:1: helth: \"helth\" is not known here; did you mean \"health\"?\n       4 | helth: {rise: 2}"},
		"misspelt key below": {"dns:\n  zone: a.example\n  nameserver: {ns1: [192.0.2.53]}\n",
			"p.yaml:3:3: dns.nameserver: \"nameserver\" is not known here; did you mean \"nameservers\"?\n       3 |   nameserver: {ns1: [192.0.2.53]}"},
		"unknown key": {minimal + "frobnicate: 1\n",
			"p.yaml:4:1: frobnicate: \"frobnicate\" is not known here: one of store, consul, data, user, topology, roles, dns, geo, api, events, health, replication, log\n       4 | frobnicate: 1"},
		"two faults": {minimal + "health: {rise: x}\nlog: {level: loud}\n",
			"p.yaml:4:16: health.rise: \"x\" is not a whole number\n       4 | health: {rise: x}\n" +
				"p.yaml:5:14: log.level: \"loud\" is not known here: one of debug, info, warn, error\n       5 | log: {level: loud}"},
		"duration": {minimal + "health:\n  interval: 5\n",
			"p.yaml:5:13: health.interval: \"5\" is not a duration: write a number with a unit, such as 500ms, 5s or 10m\n       5 |   interval: 5"},
		"address": {"dns:\n  zone: a.example\n  nameservers: {ns1: [192.0.2]}\n",
			"p.yaml:3:23: dns.nameservers.ns1[0]: \"192.0.2\" is not an IP address\n       3 |   nameservers: {ns1: [192.0.2]}"},
		"listen": {minimal + "api: {listen: 8420}\n",
			"p.yaml:4:15: api.listen: \"8420\" is not ADDRESS:PORT, such as 127.0.0.1:8420 or [::1]:8420\n       4 | api: {listen: 8420}"},
		"listen twice": {strings.Replace(minimal, "dns:\n", "dns:\n  listen: [\"127.0.0.1:53\", \"[::1]:53\", \"127.0.0.1:53\"]\n", 1),
			"p.yaml:2:40: dns.listen[2]: 127.0.0.1:53 cannot be had, because dns.listen[0] is 127.0.0.1:53: give one of them another port\n       2 |   listen: [\"127.0.0.1:53\", \"[::1]:53\", \"127.0.0.1:53\"]"},
		"the API where DNS is": {minimal + "api: {listen: \"127.0.0.1:5300\"}\n",
			"p.yaml:4:15: api.listen: 127.0.0.1:5300 cannot be had, because dns.listen[0] is 127.0.0.1:5300: give one of them another port\n       4 | api: {listen: \"127.0.0.1:5300\"}"},
		"events where the API is": {minimal + "events: {listen: \"0.0.0.0:8420\", insecure: true}\n",
			"p.yaml:4:18: events.listen: 0.0.0.0:8420 cannot be had, because api.listen is 127.0.0.1:8420: give one of them another port\n       4 | events: {listen: \"0.0.0.0:8420\", insecure: true}"},
		"a rate": {minimal + "  rate_limit: {responses_per_second: 20000}\n",
			"p.yaml:4:38: dns.rate_limit.responses_per_second: 20000 is outside of 0 to 10000\n       4 |   rate_limit: {responses_per_second: 20000}"},
		"a share": {minimal + "  sample: {rate: 2}\n",
			"p.yaml:4:18: dns.sample.rate: 2 is outside of 1e-06 to 1\n       4 |   sample: {rate: 2}"},
		"a prefix": {minimal + "  rate_limit: {exempt: [192.0.2.1]}\n",
			"p.yaml:4:25: dns.rate_limit.exempt[0]: \"192.0.2.1\" is not a prefix, such as 192.0.2.0/24 or 2001:db8::/32\n       4 |   rate_limit: {exempt: [192.0.2.1]}"},
		"nsid": {minimal + "  nsid: 'a\"b'\n",
			"p.yaml:4:9: dns.nsid: \"a\\\"b\": want printable ASCII without quotes and backslashes\n       4 |   nsid: 'a\"b'"},
		"store": {"store: postgres://x\n" + minimal,
			"p.yaml:1:8: store: \"postgres://x\" is no store: want bolt:/var/lib/portolan/portolan.db or consul://127.0.0.1:8500/portolan\n       1 | store: postgres://x"},
		"bolt without a path": {"store: \"bolt:\"\n" + minimal,
			"p.yaml:1:8: store: \"bolt:\" does not name a file: want bolt:PATH, such as bolt:/var/lib/portolan/portolan.db\n       1 | store: \"bolt:\""},
		"bolt as a URL": {"store: bolt://host/x\n" + minimal,
			"p.yaml:1:8: store: \"bolt://host/x\" does not name a file: want bolt:PATH, such as bolt:/var/lib/portolan/portolan.db\n       1 | store: bolt://host/x"},
		"open to all": {minimal + "api:\n  listen: 0.0.0.0:8420\n",
			"p.yaml:5:11: api.listen: 0.0.0.0:8420 is not on loopback, so that anybody who reaches it could change everything: set api.token_file, or listen on 127.0.0.1\n       5 |   listen: 0.0.0.0:8420"},
		"events in the clear": {minimal + "events: {listen: \"192.0.2.1:8421\"}\n",
			"p.yaml:4:18: events.listen: 192.0.2.1:8421 is not on loopback, and without TLS tokens would be sent in the clear: set events.tls (cert and key), or events.insecure: true\n       4 | events: {listen: \"192.0.2.1:8421\"}"},
		"half a key pair": {minimal + "events: {listen: \"192.0.2.1:8421\", tls: {cert: a}}\n",
			"p.yaml:4:41: events.tls.key: is missing: the file of the certificate's private key\n       4 | events: {listen: \"192.0.2.1:8421\", tls: {cert: a}}"},
		"no zone": {"dns:\n  nameservers: {ns1: [192.0.2.53]}\n",
			"p.yaml:2:3: dns.zone: is missing: the name that this server is authoritative for, such as geo.example.net\n       2 |   nameservers: {ns1: [192.0.2.53]}"},
		"no name of a zone": {"dns:\n  zone: geo..example.net\n  nameservers: {ns1: [192.0.2.53]}\n",
			"p.yaml:2:9: dns.zone: \"geo..example.net\": a label has from 1 to 63 characters\n       2 |   zone: geo..example.net"},
		"nothing at all": {"",
			"p.yaml: dns.zone: is missing: the name that this server is authoritative for, such as geo.example.net\n" +
				"p.yaml: dns.nameservers: is missing: at least one name server, such as {ns1: [192.0.2.53]}"},
		"range": {minimal + "health: {fall: 0}\nreplication: {copies: 1000}\n",
			"p.yaml:4:16: health.fall: 0 is outside of 1 to 100\n       4 | health: {fall: 0}\n" +
				"p.yaml:5:23: replication.copies: 1000 is outside of 1 to 64\n       5 | replication: {copies: 1000}"},
		"ttl": {minimal + "  ttl: {min: 2m, max: 1m}\n",
			"p.yaml:4:8: dns.ttl: min, 2m0s, is above max, 1m0s\n       4 |   ttl: {min: 2m, max: 1m}"},
		"split roles on bolt": {"roles: [dns]\n" + minimal,
			"p.yaml: store: a bolt file serves one process, which must have all roles: leave roles (and --role) out, or keep the store in Consul"},
		"role": {"roles: [dns, replicater]\n" + minimal,
			"p.yaml:1:14: roles[1]: \"replicater\" is not known here; did you mean \"replicator\"?\n       1 | roles: [dns, replicater]"},
		"consul section without consul": {minimal + "consul: {datacenter: dc1}\n",
			"p.yaml:4:9: consul: is set, but the store is bolt:/var/lib/portolan/portolan.db: remove the section, or set store: consul://HOST:PORT/PREFIX\n       4 | consul: {datacenter: dc1}"},
		"a list for a word": {minimal + "data: [a]\n",
			"p.yaml:4:7: data: is a list: a single value is needed\n       4 | data: [a]"},
		"a word for a section": {minimal + "geo: city.mmdb\n",
			"p.yaml:4:6: geo: is a single value: keys with values are needed\n       4 | geo: city.mmdb"},
		"a word for a list": {minimal + "roles: all\n",
			"p.yaml:4:8: roles: is a single value: a list is needed, such as [a, b]\n       4 | roles: all"},
		"empty": {minimal + "data:\n",
			"p.yaml:4:7: data: is empty: a single value is needed\n       4 | data:"},
		"beside misspelt keys": {"dsn: {}\ndns:\n  zoen: a.example\n  ttl: {min: 2m, max: 1m}\nhealth: {fall: 0}\n",
			"p.yaml:1:1: dsn: \"dsn\" is not known here; did you mean \"dns\"?\n       1 | dsn: {}\n" +
				"p.yaml:3:3: dns.zoen: \"zoen\" is not known here; did you mean \"zone\"?\n       3 |   zoen: a.example\n" +
				"p.yaml:3:3: dns.nameservers: is missing: at least one name server, such as {ns1: [192.0.2.53]}\n       3 |   zoen: a.example\n" +
				"p.yaml:4:8: dns.ttl: min, 2m0s, is above max, 1m0s\n       4 |   ttl: {min: 2m, max: 1m}\n" +
				"p.yaml:5:16: health.fall: 0 is outside of 1 to 100\n       5 | health: {fall: 0}"},
		"for want of what could not be read": {"stroe: consul://127.0.0.1:8500/portolan\nroles: [dns, x]\nconsul: {datacenter: dc1}\nhealth: {voter: a}\n" +
			"dns: {zone: a.example, namservers: {ns1: [192.0.2.53]}}\napi: {listen: \"192.0.2.1:8420\", token_fil: token}\nevents: {listen: \"192.0.2.1:8421\", tsl: {}}\n",
			"p.yaml:1:1: stroe: \"stroe\" is not known here; did you mean \"store\"?\n       1 | stroe: consul://127.0.0.1:8500/portolan\n" +
				"p.yaml:2:14: roles[1]: \"x\" is not known here: one of all, dns, replicator\n       2 | roles: [dns, x]\n" +
				"p.yaml:5:24: dns.namservers: \"namservers\" is not known here; did you mean \"nameservers\"?\n       5 | dns: {zone: a.example, namservers: {ns1: [192.0.2.53]}}\n" +
				"p.yaml:6:33: api.token_fil: \"token_fil\" is not known here; did you mean \"token_file\"?\n       6 | api: {listen: \"192.0.2.1:8420\", token_fil: token}\n" +
				"p.yaml:7:36: events.tsl: \"tsl\" is not known here; did you mean \"tls\"?\n       7 | events: {listen: \"192.0.2.1:8421\", tsl: {}}"},
		"not YAML": {"dns: [\n",
			"p.yaml:1:6: sequence end token ']' not found\n       1 | dns: ["},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Parse("p.yaml", []byte(test.text))
			if !errors.Is(err, topology.ErrInvalid) || err.Error() != test.want {
				t.Errorf("got\n%v\nwant\n%s", err, test.want)
			}
		})
	}
}

func TestConfigShowsNoSecret(t *testing.T) {
	t.Parallel()
	_, err := Parse("p.yaml", []byte("store: consul://user:hunter2@127.0.0.1/\n"+minimal))
	if err == nil || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("%v", err)
	}
}

func TestExamplesLoad(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../configs/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(filepath.Base(file), "topology") {
			if _, err := topology.ParseYAML(file, text); err != nil {
				t.Error(err)
			}
			continue
		}
		if _, err := Parse(file, text); err != nil {
			t.Error(err)
		}
	}
}

// Every setting is described in docs/configuration.md.
func TestDocs(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/configuration.md")
	if err != nil {
		t.Fatal(err)
	}
	var look func(of reflect.Type, prefix string)
	look = func(of reflect.Type, prefix string) {
		for i := range of.NumField() {
			f := of.Field(i)
			tag, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			name := prefix + tag
			if f.Type.Kind() == reflect.Struct && f.Type.PkgPath() == of.PkgPath() && f.Type != reflect.TypeFor[Store]() {
				look(f.Type, name+".")
			} else if !strings.Contains(string(text), "`"+name+"`") {
				t.Errorf("docs/configuration.md does not describe %s", name)
			}
		}
	}
	look(reflect.TypeFor[Config](), "")
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(minimal))
	f.Add([]byte("dns: [&a *a, {? x}]\n---\n- 1"))
	f.Fuzz(func(t *testing.T, text []byte) {
		if _, err := Parse("p.yaml", text); err != nil && !errors.Is(err, topology.ErrInvalid) {
			t.Errorf("%T: %v", err, err)
		}
	})
}
