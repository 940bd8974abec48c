package bed

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
)

// ConsulConfig says how a Consul server is set up.
type ConsulConfig struct {
	Dir        string // holds the configuration, the log and the data; created when missing
	Datacenter string // "" is dc1
	Token      string // not "": access control is on, denies by default, and this token (a UUID) may do all
	Debug      bool   // log at level debug; the default is info
}

// Consul is one Consul server with its data on disk, the only voter of its datacenter. Its
// methods may be called from several goroutines.
type Consul struct {
	server
	config  ConsulConfig
	address string
}

// StartConsul starts a Consul server on free ports of 127.0.0.1 and returns once it has a
// leader and took a write. The caller must Close it.
func StartConsul(ctx context.Context, config ConsulConfig) (*Consul, error) {
	if config.Datacenter == "" {
		config.Datacenter = "dc1"
	}
	c := &Consul{config: config}
	c.server = server{
		name:    "consul",
		tool:    "consul",
		args:    []string{"agent", "-config-file", filepath.Join(config.Dir, "consul.json")},
		logPath: filepath.Join(config.Dir, "consul.log"),
		ready:   c.writes,
	}
	err := c.configure()
	if err == nil {
		err = c.Start(ctx)
	}
	if err != nil {
		_ = c.Close() // the reason is in err
		return nil, err
	}
	return c, nil
}

// Wipe removes all data of the server, which is not running: when it is started again it has lost everything.
func (c *Consul) Wipe() error {
	if err := os.RemoveAll(c.dataDir()); err != nil {
		return fmt.Errorf("wiping %s: %w", c.name, err)
	}
	return nil
}

func (c *Consul) dataDir() string { return filepath.Join(c.config.Dir, "data") }

// Addr returns the host:port of the HTTP API.
func (c *Consul) Addr() string { return c.address }

// Datacenter returns the name of the server's datacenter.
func (c *Consul) Datacenter() string { return c.config.Datacenter }

// Client returns a new client of the server, with its token.
func (c *Consul) Client() (*api.Client, error) {
	// Not api.DefaultConfig: that reads CONSUL_* from the environment.
	client, err := api.NewClient(&api.Config{
		Address:   c.address,
		Scheme:    "http",
		Token:     c.config.Token,
		Transport: &http.Transport{MaxIdleConnsPerHost: 4, IdleConnTimeout: 10 * time.Second},
	})
	if err != nil {
		return nil, fmt.Errorf("making a client of %s: %w", c.name, err)
	}
	return client, nil
}

func (c *Consul) configure() error {
	if err := os.MkdirAll(c.config.Dir, 0o755); err != nil {
		return fmt.Errorf("configuring consul: %w", err)
	}
	for range 3 {
		p, err := reservePort()
		if err != nil {
			return fmt.Errorf("configuring consul: %w", err)
		}
		c.ports = append(c.ports, p)
		c.listens = append(c.listens, p.on("127.0.0.1"))
	}
	c.address = c.listens[0]
	c.name = "consul " + c.address
	level := "INFO"
	if c.config.Debug {
		level = "DEBUG"
	}
	const off = -1
	tree := map[string]any{
		"node_name":        "bed",
		"datacenter":       c.config.Datacenter,
		"data_dir":         c.dataDir(),
		"server":           true,
		"bootstrap_expect": 1,
		"bind_addr":        "127.0.0.1",
		"client_addr":      "127.0.0.1",
		"log_level":        level,
		"ports": map[string]any{
			"http": c.ports[0].number, "server": c.ports[1].number, "serf_lan": c.ports[2].number,
			"serf_wan": off, "dns": off, "https": off, "grpc": off, "grpc_tls": off,
		},
		// The least that Consul allows: an election in about a second, not five.
		"performance":          map[string]any{"raft_multiplier": 1},
		"connect":              map[string]any{"enabled": false},
		"disable_update_check": true,
		// Every client is this machine: the default of 200 connections for each is not a
		// limit that tests should meet.
		"limits": map[string]any{"http_max_conns_per_client": 4096},
		// SIGTERM ends the process and leaves the server a member, ready for its restart.
		"leave_on_terminate": false,
	}
	if c.config.Token != "" {
		tree["primary_datacenter"] = c.config.Datacenter
		tree["acl"] = map[string]any{
			"enabled":        true,
			"default_policy": "deny",
			"tokens":         map[string]any{"initial_management": c.config.Token, "agent": c.config.Token},
		}
	}
	text, err := json.MarshalIndent(tree, "", "  ")
	if err == nil {
		err = os.WriteFile(filepath.Join(c.config.Dir, "consul.json"), text, 0o600)
	}
	if err != nil {
		return fmt.Errorf("configuring consul: %w", err)
	}
	return nil
}

// writes reports whether the server leads and takes writes. A leader that has just been
// elected answers before it accepts.
func (c *Consul) writes(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	client, err := c.Client()
	if err != nil {
		return err
	}
	leader, err := client.Status().LeaderWithQueryOptions((&api.QueryOptions{}).WithContext(ctx))
	if err != nil {
		return err
	}
	if leader == "" {
		return fmt.Errorf("there is no leader")
	}
	options := (&api.WriteOptions{}).WithContext(ctx)
	const key = ".bed/ready"
	if _, err := client.KV().Put(&api.KVPair{Key: key}, options); err != nil {
		return err
	}
	_, err = client.KV().Delete(key, options)
	return err
}

// Run runs the consul program against the server, as an operator does (kv put KEY VALUE,
// for example), and returns what it printed.
func (c *Consul) Run(ctx context.Context, args ...string) (string, error) {
	env := []string{"CONSUL_HTTP_ADDR=" + c.address}
	if c.config.Token != "" {
		env = append(env, "CONSUL_HTTP_TOKEN="+c.config.Token)
	}
	cmd, err := Command(ctx, env, "consul", args...)
	if err != nil {
		return "", err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("running consul %s: %w: %s", strings.Join(args, " "), err, tail(string(out), 2048))
	}
	return string(out), nil
}
