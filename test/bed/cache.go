package bed

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/miekg/dns"
)

// CacheKind is which program a Cache is.
type CacheKind string

// The caching resolvers that keep answers by client subnet (RFC 7871).
const (
	Unbound          CacheKind = "unbound" // with its module subnetcache
	PowerDNSRecursor CacheKind = "pdns_recursor"
)

// CacheConfig says how a caching resolver is set up.
type CacheConfig struct {
	Dir    string // holds the configuration and the log; created when missing
	Kind   CacheKind
	Zone   string // the zone whose server is asked, without the dot at its end
	Server string // host:port of that server
}

// Cache is a caching resolver that passes on the subnets that its clients name, and keeps the answers by their scopes.
type Cache struct {
	server
	address string
}

// StartCache starts a resolver on a free port of 127.0.0.1 and returns once it answers. The caller must Close it.
func StartCache(ctx context.Context, config CacheConfig) (*Cache, error) {
	c := &Cache{}
	c.server = server{name: string(config.Kind), tool: string(config.Kind), logPath: filepath.Join(config.Dir, "cache.log"), ready: c.answers}
	err := c.configure(config)
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		_ = c.Close() // the reason is in err
		return nil, err
	}
	return c, nil
}

// Addr returns the host:port that it answers at, over UDP and TCP.
func (c *Cache) Addr() string { return c.address }

func (c *Cache) configure(config CacheConfig) error {
	p, err := reservePort()
	if err == nil {
		err = os.MkdirAll(config.Dir, 0o755)
	}
	if err != nil {
		return fmt.Errorf("configuring %s: %w", config.Kind, err)
	}
	c.ports = append(c.ports, p)
	c.address = p.on("127.0.0.1")
	c.listens = append(c.listens, c.address)
	host, port, err := net.SplitHostPort(config.Server)
	if err != nil {
		return fmt.Errorf("configuring %s: %w", config.Kind, err)
	}
	var name, text string
	switch config.Kind {
	case Unbound:
		name = "unbound.conf"
		text = fmt.Sprintf(`server:
  interface: 127.0.0.1
  port: %d
  do-daemonize: no
  use-syslog: no
  username: ""
  chroot: ""
  directory: "%s"
  pidfile: ""
  access-control: 127.0.0.0/8 allow
  do-not-query-localhost: no
  module-config: "subnetcache iterator"
  client-subnet-zone: "%s"
  client-subnet-always-forward: yes
  max-client-subnet-ipv4: 24
  max-client-subnet-ipv6: 48
  max-ecs-tree-size-ipv4: 10000
  max-ecs-tree-size-ipv6: 10000
  num-threads: 1
stub-zone:
  name: "%s"
  stub-addr: %s@%s
`, p.number, config.Dir, config.Zone, config.Zone, host, port)
		c.args = []string{"-d", "-c", filepath.Join(config.Dir, name)}
	case PowerDNSRecursor:
		name = "recursor.conf"
		text = fmt.Sprintf(`daemon=no
local-address=127.0.0.1
local-port=%d
socket-dir=%s
allow-from=127.0.0.0/8
dont-query=
dnssec=off
threads=1
forward-zones=%s=%s
use-incoming-edns-subnet=yes
edns-subnet-allow-list=%s
ecs-ipv4-bits=24
ecs-ipv6-bits=48
ecs-ipv4-cache-bits=24
ecs-ipv6-cache-bits=48
`, p.number, config.Dir, config.Zone, config.Server, config.Zone)
		c.args = []string{"--config-dir=" + config.Dir}
	default:
		return fmt.Errorf("%q is no caching resolver of the bed", config.Kind)
	}
	if err := os.WriteFile(filepath.Join(config.Dir, name), []byte(text), 0o644); err != nil {
		return fmt.Errorf("configuring %s: %w", config.Kind, err)
	}
	return nil
}

// answers is nil once the resolver answers a query: for a name that it knows itself.
func (c *Cache) answers(ctx context.Context) error {
	m := new(dns.Msg).SetQuestion("localhost.", dns.TypeA)
	_, _, err := (&dns.Client{Timeout: time.Second}).ExchangeContext(ctx, m, c.address)
	return err
}
