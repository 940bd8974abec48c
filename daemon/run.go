package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"
	consulapi "github.com/hashicorp/consul/api"
	mdns "github.com/miekg/dns"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"portolan/api"
	"portolan/dns"
	"portolan/health"
	"portolan/listener"
	"portolan/replicator"
	"portolan/replicator/distribution"
	"portolan/replicator/events"
	"portolan/replicator/ledger"
	boltledger "portolan/replicator/ledger/bolt"
	consulledger "portolan/replicator/ledger/consul"
	"portolan/store"
	"portolan/store/bolt"
	"portolan/store/consul"
	"portolan/topology"
)

const (
	// parkTime is how long a shutdown waits for copies to finish or be parked. What is cut off then is found again at the
	// next start; what is finished need not be done again.
	parkTime = 20 * time.Second
	// stopTime is how long it waits for any other part.
	stopTime = 5 * time.Second
	// lockTime is how long a start waits for a former process to let go of the data folder, and lockRetry the pause between attempts:
	// as for the store's file.
	lockTime  = time.Second
	lockRetry = 50 * time.Millisecond
	// applyRetry is the pause between attempts to apply the topology file while the store is away.
	applyRetry = 2 * time.Second
	// topologyTime is how long a start waits for a topology before it says that there is none. The last good one on disk is served
	// before that, and a store that swallows what it is asked has been found to be away.
	topologyTime = 4 * time.Second
)

// Options are what Run needs.
type Options struct {
	Config  Config
	Version string
	Log     *zap.Logger
	// Reload asks for databases, static records and certificates to be read again. Nil: never.
	Reload <-chan struct{}
	// Readers is told how many threads will read DNS over UDP, before they do. They hold processors of the runtime's: whoever owns the
	// process gives it as many more, or all else comes late on a small machine (see dns.Server.Readers). Optional.
	Readers func(int)
	// Bound is told the addresses, once all listeners are bound. Optional.
	Bound func(Addresses)
}

// Addresses are where a daemon listens, with the ports that the kernel chose where the configuration has 0.
type Addresses struct {
	API    netip.AddrPort
	Events netip.AddrPort // not valid without a listener
	DNS    []netip.AddrPort
}

// daemon is a running composition.
type daemon struct {
	config  Config
	version string
	holder  string // its name in leases
	log     *zap.Logger
	started time.Time
	metrics *prometheus.Registry

	store  store.Store
	ledger ledger.Ledger
	disk   disk
	close  []func() error // in reverse order

	keeper       *topology.Keeper
	editor       *topology.Editor
	ramper       *topology.Ramper
	states       *stateWatcher
	monitor      *health.Monitor
	server       *dns.Server
	front        *frontdoor
	replicator   *replicator.Replicator
	spool        *events.Spool
	handler      *events.Handler
	eventMetrics *prometheus.Registry
	databases    *databases // those that the start found
	eventKey     events.Key
	eventsPair   *listener.Certificate // nil: no TLS
	apiToken     string
	apiPair      *listener.Certificate // nil: no TLS
	apiListener  net.Listener
	evListener   net.Listener

	sought    chan struct{} // closed once there is a topology, or it is said that there is none yet
	answering atomic.Bool   // the DNS server answers
	stopping  atomic.Bool

	mu       sync.Mutex
	drift    []topology.Change
	notices  map[string]string  // what went wrong with files, by what they are for
	declared *topology.Document // the topology file; nil: there is none, or unusable says why it cannot be used
	unusable error
}

// Run is portolan serve: it starts what the configuration asks for, runs until ctx is done or a part fails, and ends in
// order: first nothing new is accepted, then copies are finished or parked, and DNS answers until the end. The error is one
// that an operator can act on; nil after an orderly end.
func Run(ctx context.Context, o Options) (err error) {
	d := &daemon{config: o.Config, version: o.Version, holder: holder(), log: o.Log, started: time.Now(), metrics: prometheus.NewRegistry(), notices: map[string]string{},
		sought: make(chan struct{})}
	defer func() {
		for _, f := range slices.Backward(d.close) {
			if e := f(); e != nil && err == nil {
				err = e
			}
		}
	}()
	if err := d.prepare(ctx); err != nil {
		return err
	}
	return d.run(ctx, o)
}

// Checked tells what Check looked at, by the paths of the files.
type Checked struct {
	// Files are those that were read. Where there is no error, nothing is wrong in them.
	Files []string `json:"files"`
	// Absent are the databases that are not on this machine.
	Absent []string `json:"absent,omitempty"`
}

// Check reads what the configuration names, as Run does: the topology file, the static records, and the databases and tables of where
// clients are. The error tells of all that is wrong with them. A configuration is often checked on another machine than its own, so
// databases may be absent, and keys, certificates, tokens and ports are not looked at.
func Check(c Config) (Checked, error) {
	d := &daemon{config: c, log: zap.NewNop(), metrics: prometheus.NewRegistry()}
	checked := Checked{Files: []string{}}
	var records, file error
	if c.Topology != "" {
		checked.Files = append(checked.Files, c.Topology)
		_, file = d.parseTopologyFile()
	}
	if c.Has(RoleDNS) {
		o := d.dnsOptions()
		o.CookieSecret = ""
		_, records = dns.New(o)
		if o.StaticFile != "" {
			checked.Files = append(checked.Files, o.StaticFile)
		}
	}
	absent := func(path string) bool {
		if exists(path) {
			return false
		}
		checked.Absent = append(checked.Absent, path)
		return true
	}
	c.Geo.Database, c.Geo.ASN = slices.DeleteFunc(slices.Clone(c.Geo.Database), absent), slices.DeleteFunc(slices.Clone(c.Geo.ASN), absent)
	databases, clients := openDatabases(c.Geo, nil)
	for _, info := range databases.all() {
		if info.Path != "" { // else it is the table that comes with the program
			checked.Files = append(checked.Files, info.Path)
		}
	}
	return checked, errors.Join(records, file, clients)
}

// prepare makes all parts and binds all listeners but DNS's. What is wrong with the configuration, files or ports is found
// here, before anything runs; and what can be found without the data, before there is any.
func (d *daemon) prepare(ctx context.Context) error {
	c := &d.config
	build := prometheus.NewGauge(prometheus.GaugeOpts{Name: "portolan_build_info", Help: "Always 1; its labels say what runs.",
		ConstLabels: prometheus.Labels{"version": d.version, "roles": strings.Join(d.roles(), ",")}})
	build.Set(1)
	d.metrics.MustRegister(build, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))

	if err := d.read(); err != nil {
		return err
	}
	if d.unusable != nil && c.Store.Bolt != "" && !exists(c.Store.Bolt) {
		return d.unusable
	}
	if err := d.bind(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(c.Data, 0o700); err != nil {
		return fmt.Errorf("making the data folder: %w", err)
	}
	if err := d.openStore(); err != nil {
		return err
	}
	if err := d.lockData(ctx); err != nil {
		return err
	}
	d.keeper = topology.NewKeeper(d.store, topology.KeeperOptions{
		LastGoodPath: d.lastGood(), Saved: d.disk.of(d.lastGood(), "a start without the store would find an old topology, or none"), Reserved: d.reserved(), Logger: d.log.Named("topology"), Registerer: d.metrics,
	})
	d.editor = topology.NewEditor(d.store, topology.EditorOptions{
		Reserved: d.reserved(), Pending: func() []topology.Pending { return d.keeper.Status().Pending },
		Lost: func() bool { return d.keeper.Status().StoreLost }, Logger: d.log.Named("topology"),
	})
	d.ramper = topology.NewRamper(d.store, d.keeper, d.editor, topology.RamperOptions{Holder: d.holder, Logger: d.log.Named("topology")})
	if err := d.useTopologyFile(ctx); err != nil {
		return err
	}
	seeded := filepath.Join(c.Data, "seeded.json")
	d.states = newStateWatcher(d.store, seeded, d.disk.of(seeded, "a start without the store would not know which replicas are seeded"), d.log.Named("state"))
	if c.Has(RoleDNS) {
		agent, err := d.consulAgent()
		if err != nil {
			return err
		}
		o := health.Options{
			Interval: c.Health.Interval, Timeout: c.Health.Timeout, Rise: c.Health.Rise, Fall: c.Health.Fall,
			CanaryInterval: c.Health.CanaryInterval, CertificateWarning: c.Health.CertificateWarning,
			StatePath: filepath.Join(c.Data, "health.json"), Consul: agent, Logger: d.log.Named("health"), Registerer: d.metrics,
		}
		if c.Store.Consul != "" { // a bolt file has one server: there is nobody else to vote
			o.Votes = d.store
			if o.Voter, err = voter(c.Health); err != nil {
				return err
			}
		}
		d.monitor = health.NewMonitor(o)
	}
	d.front = newFrontdoor(d.keeper, d.states, d.monitor, d.server, d.databases, func(text string) { d.notice("charts", text) }, d.log.Named("geo"))
	if c.Has(RoleReplicator) {
		return d.prepareReplicator()
	}
	return nil
}

// read reads the files that the configuration names; the error tells of all that cannot be used but the topology file, which
// is needed only while there is no topology yet.
func (d *daemon) read() error {
	c := &d.config
	var faults [6]error
	d.databases, faults[0] = openDatabases(c.Geo, nil)
	if c.Has(RoleDNS) {
		d.server, faults[1] = dns.New(d.dnsOptions())
	}
	d.apiToken, faults[2] = readToken(c.API.TokenFile)
	d.apiPair, faults[3] = loadCertificate("api.tls", c.API.TLS, d.log.Named("api"))
	if d.listensToEvents() {
		d.eventsPair, faults[4] = loadCertificate("events.tls", c.Events.TLS, d.log.Named("events"))
		if exists(c.EventsKey()) { // else it is made, with the data
			faults[5] = d.loadEventsKey()
		}
	}
	if c.Topology != "" {
		d.declared, d.unusable = d.parseTopologyFile()
	}
	return errors.Join(faults[:]...)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// listensToEvents is whether replicas may tell this process what happens there.
func (d *daemon) listensToEvents() bool {
	return d.config.Has(RoleReplicator) && d.config.Events.Listen.IsValid()
}

func (d *daemon) loadEventsKey() (err error) {
	if d.eventKey, err = events.LoadKey(d.config.EventsKey()); err != nil {
		return fmt.Errorf("events.key: %w", err)
	}
	return nil
}

// lastGood is the file of the last good topology.
func (d *daemon) lastGood() string { return filepath.Join(d.config.Data, "topology.json") }

func (d *daemon) roles() []string {
	var roles []string
	for _, r := range []Role{RoleDNS, RoleReplicator} {
		if d.config.Has(r) {
			roles = append(roles, string(r))
		}
	}
	return roles
}

func (d *daemon) dnsOptions() dns.Options {
	c := d.config.DNS
	return dns.Options{
		Zone: c.Zone, Nameservers: c.Nameservers, Contact: c.Contact, TTLMin: c.TTL.Min, TTLMax: c.TTL.Max, StaticFile: c.Static,
		Whoami: dns.Whoami(c.Whoami), NSID: c.NSID, Version: c.Version, CookieSecret: c.Cookies.Secret,
		RateLimit: dns.RateLimit{
			ResponsesPerSecond: c.RateLimit.ResponsesPerSecond, Slip: c.RateLimit.Slip, Exempt: c.RateLimit.Exempt,
		},
		Sample: dns.Sample{File: c.Sample.File, Rate: c.Sample.Rate},
		Listen: c.Listen, Logger: d.log.Named("dns"), Registerer: d.metrics,
	}
}

// reserved are the labels that belong to the zone itself.
func (d *daemon) reserved() []string {
	reserved := []string{"whoami"}
	for name := range d.config.DNS.Nameservers {
		inside := strings.TrimSuffix(name, "."+mdns.CanonicalName(d.config.DNS.Zone))
		if strings.HasSuffix(inside, ".") {
			continue // outside of the zone
		}
		labels := strings.Split(strings.ToLower(inside), ".")
		reserved = append(reserved, labels[len(labels)-1])
	}
	slices.Sort(reserved)
	return slices.Compact(reserved)
}

func (d *daemon) bind(ctx context.Context) (err error) {
	if d.config.Has(RoleDNS) {
		if err := tryDNS(ctx, d.config.DNS.Listen); err != nil {
			return err
		}
	}
	at := d.config.API.Listen
	if d.apiListener, err = listen(ctx, "api.listen", "tcp"+family(at, ""), at); err != nil {
		return err
	}
	d.close = append(d.close, ignoreClosed(d.apiListener.Close))
	if at := d.config.Events.Listen; d.listensToEvents() {
		if d.evListener, err = listen(ctx, "events.listen", "tcp"+family(at, ""), at); err != nil {
			return err
		}
		d.close = append(d.close, ignoreClosed(d.evListener.Close))
	}
	return nil
}

func ignoreClosed(closes func() error) func() error {
	return func() error {
		if err := closes(); !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

func (d *daemon) openStore() error {
	c := &d.config
	if c.Store.Bolt != "" {
		if err := os.MkdirAll(filepath.Dir(c.Store.Bolt), 0o700); err != nil {
			return fmt.Errorf("making the folder of the store: %w", err)
		}
		db, err := bolt.OpenDB(c.Store.Bolt)
		if err != nil {
			return fmt.Errorf("the store: %w", err)
		}
		db.Tell(d.disk.of(c.Store.Bolt, "nothing is replicated meanwhile, no edit is taken, and replicas are told of as they were"))
		d.store = bolt.New(db)
		d.close = append(d.close, d.store.Close)
		if d.ledger, err = boltledger.New(db); err != nil {
			return err
		}
		d.close = append(d.close, d.ledger.Close)
		return nil
	}
	client, err := consul.Dial(d.consulConfig())
	if err != nil {
		return fmt.Errorf("the store: %w", err)
	}
	d.close = append(d.close, func() error { client.Close(); return nil })
	d.store = consul.New(client)
	d.ledger = consulledger.New(client)
	d.close = append(d.close, d.store.Close, d.ledger.Close)
	return nil
}

// lockData keeps other processes from the data folder, whatever their store and their roles: each would take for its own what another
// wrote there, as how far it saw the ledger. A store in that folder, which is locked too, has been opened before: that is the better
// complaint.
func (d *daemon) lockData(ctx context.Context) error {
	lock := flock.New(filepath.Join(d.config.Data, "portolan.lock"))
	patience, cancel := context.WithTimeout(ctx, lockTime)
	defer cancel()
	_, err := lock.TryLockContext(patience, lockRetry)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the data folder %s is in use by another process (`fuser -v %s` shows which): give each process a folder of its own, with data in its configuration", d.config.Data, lock.Path())
	case err != nil:
		return fmt.Errorf("locking the data folder: %w", err)
	}
	d.close = append(d.close, lock.Close)
	return nil
}

func (d *daemon) consulConfig() consul.Config {
	c := &d.config
	return consul.Config{
		Address: c.Store.Consul, Prefix: c.Store.Prefix, Datacenter: c.Consul.Datacenter, TokenFile: c.Consul.TokenFile, TLS: c.Consul.TLS, CAFile: c.Consul.CA,
	}
}

// consulAgent is the Consul that probes of the kind consul:<service> ask: the store's, else the one on this machine. It is
// asked when such a probe is configured, not before.
func (d *daemon) consulAgent() (*consulapi.Client, error) {
	agent, err := consul.NewAPI(d.consulConfig()) // which is empty but for a store in Consul
	if err != nil {
		return nil, fmt.Errorf("preparing to ask Consul about services: %w", err)
	}
	return agent, nil
}

func (d *daemon) prepareReplicator() (err error) {
	c := &d.config
	if d.evListener != nil {
		if err := d.loadEventsKey(); err != nil {
			return err
		}
		path := filepath.Join(c.Data, "events.db")
		if d.spool, err = events.Open(path, events.Limits{}); err != nil {
			return fmt.Errorf("opening the event spool %s: %w", path, err)
		}
		d.spool.Tell(d.disk.of(path, "events are refused meanwhile, for the registries to send them again"))
		d.close = append(d.close, d.spool.Close)
		// A registry of their own lets the status read them without gathering everything.
		d.eventMetrics = prometheus.NewRegistry()
		d.metrics.MustRegister(d.eventMetrics)
		d.handler, err = events.NewHandler(d.spool, events.Config{
			Tokens: d.eventKey.Tokens(d.known), Repository: d.repository, Log: d.log.Named("events"), Metrics: d.eventMetrics,
		})
		if err != nil {
			return err
		}
	}
	d.replicator, err = replicator.New(replicator.Options{
		Store: d.store, Ledger: d.ledger, Topology: d.keeper, Spool: d.spool, Remove: d.editor.RemoveReplica,
		Memory: filepath.Join(c.Data, "ledger-seen.json"), Uploads: filepath.Join(c.Data, "uploads.json"), Holder: d.holder,
		ScanInterval: c.Replication.ScanInterval, DeleteConfirmation: c.Replication.DeleteConfirmation, Drain: c.DNS.TTL.Max + topology.Spreading,
		Copies: c.Replication.Copies, RequestsPerSecond: c.Replication.RequestsPerSecond, UserAgent: "portolan/" + d.version,
		Log: d.log.Named("replicator"), Metrics: d.metrics,
	})
	return err
}

// voter is what this server calls itself where several vote on the health of replicas.
func voter(h Health) (string, error) {
	if h.Voter != "" {
		return h.Voter, nil
	}
	name, err := os.Hostname()
	if err == nil {
		err = health.CheckVoter(name)
	}
	if err != nil {
		return "", fmt.Errorf("health.voter is needed, since this machine's host name cannot be used: %w", err)
	}
	return name, nil
}

// holder is the name of this process in leases: that of the machine, for people, and a random part.
func holder() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	var id [8]byte
	rand.Read(id[:]) // never fails: crypto/rand, since Go 1.24
	return host + "-" + hex.EncodeToString(id[:])
}

// known reports whether there is such a replica.
func (d *daemon) known(registry, region string) bool {
	return d.replica(registry, region) != nil
}

func (d *daemon) replica(registry, region string) *topology.Replica {
	s := d.keeper.Snapshot()
	if s == nil {
		return nil
	}
	r := s.Registry(registry)
	if r == nil {
		return nil
	}
	return r.Replica(region)
}

// repository takes a replica's prefix off a repository's name.
func (d *daemon) repository(registry, region, repository string) (string, bool) {
	r := d.replica(registry, region)
	if r == nil {
		return "", false
	}
	if r.Access.Prefix == "" {
		return repository, true
	}
	return strings.CutPrefix(repository, strings.TrimSuffix(r.Access.Prefix, "/")+"/")
}

// ---- the topology file -------------------------------------------------------------------------------------------------

// useTopologyFile applies the topology file if the store is empty. While Consul is away that is left to followTopologyFile.
// A file that cannot be used is an error where it is needed, and otherwise a warning: what is in the store is what counts, or
// while that is away what is on disk.
func (d *daemon) useTopologyFile(ctx context.Context) error {
	switch {
	case d.unusable != nil:
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		stored, away := d.editor.Export(ctx)
		if away != nil && !exists(d.lastGood()) || away == nil && len(stored.Registries) == 0 {
			return d.unusable
		}
		d.notice("topology", fmt.Sprintf("the topology file cannot be used; what is in the store holds: %v", d.unusable))
		return nil
	case d.declared == nil || d.config.Store.Bolt == "":
		return nil
	}
	return d.applyIfEmpty(ctx)
}

func (d *daemon) parseTopologyFile() (*topology.Document, error) {
	text, err := os.ReadFile(d.config.Topology)
	if err != nil {
		return nil, fmt.Errorf("topology: %w", err)
	}
	return topology.ParseYAML(d.config.Topology, text, d.reserved()...)
}

func (d *daemon) applyIfEmpty(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	stored, err := d.editor.Export(ctx)
	if err != nil {
		return fmt.Errorf("looking whether the store is empty: %w", err)
	}
	if len(stored.Registries) > 0 {
		return nil
	}
	changes, err := d.editor.Apply(ctx, *d.declared, false, false)
	if err != nil {
		return fmt.Errorf("applying %s to the empty store: %w", d.config.Topology, err)
	}
	d.log.Info("the store was empty: the topology file was applied", zap.String("file", d.config.Topology), zap.Int("keys", len(changes)))
	return nil
}

// followTopologyFile applies the file when a store that was away turns out to be empty, and tells of every difference
// between the two.
func (d *daemon) followTopologyFile(ctx context.Context) error {
	for d.config.Store.Bolt == "" {
		if err := d.applyIfEmpty(ctx); err == nil {
			break
		} else if ctx.Err() != nil {
			return ctx.Err()
		} else if !errors.Is(err, store.ErrUnavailable) && !errors.Is(err, context.DeadlineExceeded) {
			d.notice("topology", err.Error())
			break
		}
		select {
		case <-time.After(applyRetry):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return d.keeper.Watch(ctx, func(*topology.Snapshot) {
		stored, err := d.editor.Export(ctx)
		for err != nil { // nothing else may change for days
			select {
			case <-time.After(applyRetry):
			case <-ctx.Done():
				return
			}
			stored, err = d.editor.Export(ctx)
		}
		drift := topology.Diff(stored, *d.declared) // as "portolan diff -f" tells it
		d.mu.Lock()
		differed := len(d.drift) > 0
		d.drift = drift
		d.mu.Unlock()
		if len(drift) > 0 && !differed { // how it goes on is in the status
			lines := make([]string, len(drift))
			for i, c := range drift {
				lines[i] = c.String()
			}
			d.log.Warn("the store differs from the topology file, and holds; applying the file would change this", zap.String("file", d.config.Topology), zap.Strings("differences", lines))
		}
	})
}

// notice keeps, and logs, what is wrong with a file; an empty text takes it back.
func (d *daemon) notice(what, text string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if text == "" {
		delete(d.notices, what)
		return
	}
	if d.notices[what] == text {
		return // it was logged
	}
	d.notices[what] = text
	d.log.Error(text)
}

// ---- running -----------------------------------------------------------------------------------------------------------

// part is one of what runs: a goroutine with what ends it.
type part struct {
	name string
	stop context.CancelFunc
	done chan struct{}
	err  error
}

// start runs a part until it is stopped. One that ends before that fails the daemon: failed is told.
func (d *daemon) start(name string, failed chan<- error, run func(context.Context) error) *part {
	// Not under the context of Run: parts end in their order, not all at once.
	ctx, cancel := context.WithCancel(context.Background())
	p := &part{name: name, stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		defer func() {
			if fault := recover(); fault != nil {
				d.log.Error("a fault of the program", zap.String("part", name), zap.Any("fault", fault), zap.ByteString("stack", debug.Stack()))
				p.err = fmt.Errorf("%s ended by a fault of the program; the log says more", name)
			}
			if p.err != nil || ctx.Err() == nil {
				if p.err == nil {
					p.err = fmt.Errorf("%s ended by itself", name)
				}
				select {
				case failed <- p.err:
				default: // another was first
				}
			}
		}()
		if err := run(ctx); err != nil && ctx.Err() == nil {
			p.err = fmt.Errorf("%s: %w", name, err)
		}
	}()
	return p
}

// end stops parts, all at once, and waits for them; false, and said, if they take longer than that.
func (d *daemon) end(patience time.Duration, parts ...*part) bool {
	for _, p := range parts {
		p.stop()
	}
	limit, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	orderly := true
	for _, p := range parts {
		select {
		case <-p.done:
			continue // also beyond the limit
		default:
		}
		select {
		case <-p.done:
		case <-limit.Done():
			d.log.Warn("not waiting any longer", zap.String("for", p.name), zap.Duration("waited", patience))
			orderly = false
		}
	}
	return orderly
}

func (d *daemon) run(ctx context.Context, o Options) error {
	failed := make(chan error, 1)
	var accept, work, base, answer []*part

	base = append(base,
		d.start("topology", failed, d.keeper.Run),
		d.start("first topology", failed, d.seekTopology),
		d.start("ramps", failed, d.ramper.Run),
		d.start("state", failed, d.states.run),
		d.start("front door", failed, d.front.run))
	if d.declared != nil {
		base = append(base, d.start("topology file", failed, d.followTopologyFile))
	}
	if d.monitor != nil {
		base = append(base, d.start("health", failed, func(ctx context.Context) error { return d.monitor.Run(ctx, d.keeper) }))
		answer = append(answer, d.start("DNS", failed, func(ctx context.Context) error { return d.answer(ctx, o) }))
	}
	if d.replicator != nil {
		work = append(work, d.start("replicator", failed, d.replicator.Run))
	}
	if d.handler != nil {
		accept = append(accept, d.start("events", failed, func(ctx context.Context) error {
			// Without a topology no replica is known and each would be refused, by name, in the log. Connections wait meanwhile.
			if _, err := d.keeper.Wait(ctx); err != nil {
				return err
			}
			return events.Serve(ctx, d.evListener, d.handler, d.eventsPair)
		}))
	}
	handler := api.Handler(d.apiOptions())
	apiPart := d.start("API", failed, func(ctx context.Context) error {
		return serveAPI(ctx, d.apiListener, handler, d.apiPair, d.log.Named("api"))
	})
	accept = append(accept, apiPart)
	base = append(base, d.start("reload", failed, func(ctx context.Context) error { return d.follow(ctx, o.Reload) }))
	d.log.Info("portolan", zap.String("version", d.version), zap.Strings("roles", d.roles()), zap.Stringer("store", d.config.Store),
		zap.Stringer("api", d.apiListener.Addr()), zap.String("events", d.config.EventsURL()))
	if d.monitor == nil && o.Bound != nil {
		o.Bound(d.addresses())
	}

	var err error
	select {
	case <-ctx.Done():
		d.log.Info("ending: nothing new is accepted, copies are finished or parked, DNS answers until the end")
	case err = <-failed:
		d.log.Error("ending, because a part failed", zap.Error(err))
	}
	d.stopping.Store(true)
	orderly := d.end(stopTime, accept...)
	orderly = d.end(parkTime, work...) && orderly
	orderly = d.end(stopTime, answer...) && orderly
	orderly = d.end(stopTime, base...) && orderly
	if err == nil && !orderly {
		err = errors.New("some parts did not end in time; what they were doing is found again at the next start")
	}
	if err == nil {
		d.log.Info("ended in order")
	}
	return err
}

// seekTopology says that a start finds no topology, which is when nothing is served, and that this is over. It runs until ctx is done.
func (d *daemon) seekTopology(ctx context.Context) error {
	limited, cancel := context.WithTimeout(ctx, topologyTime)
	defer cancel()
	_, err := d.keeper.Wait(limited)
	lacking := err != nil && ctx.Err() == nil
	if lacking {
		var meanwhile []string
		if d.server != nil {
			meanwhile = append(meanwhile, "DNS answers SERVFAIL")
		}
		if d.replicator != nil {
			meanwhile = append(meanwhile, "nothing is replicated, no events are taken")
		}
		d.log.Error("there is no topology: the store cannot be read, and none is on disk; the store is asked again and again",
			zap.Stringer("store", d.config.Store), zap.String("error", d.keeper.Status().StoreError), zap.Strings("meanwhile", meanwhile))
	}
	close(d.sought)
	if lacking {
		if _, err := d.keeper.Wait(ctx); err == nil {
			d.log.Info("there is a topology now: what waited for it begins")
		}
	}
	<-ctx.Done()
	return ctx.Err()
}

// answer serves DNS. Answers wait until it is known which replicas are healthy and seeded, and the sockets wait with them. But where there
// is no topology nobody knows how long that takes: resolvers are told at once that this server is not ready, and ask another.
func (d *daemon) answer(ctx context.Context, o Options) error {
	group, ctx := errgroup.WithContext(ctx)
	serve := func(answers bool) error {
		if err := d.server.Listen(); err != nil {
			return err
		}
		d.answering.Store(answers)
		if o.Readers != nil {
			o.Readers(d.server.Readers())
		}
		group.Go(func() error { return d.server.Serve(ctx) })
		if o.Bound != nil {
			o.Bound(d.addresses())
		}
		return nil
	}
	group.Go(func() error {
		select {
		case <-d.sought:
		case <-ctx.Done():
			return ctx.Err()
		}
		listens := d.keeper.Snapshot() == nil
		if listens {
			if err := serve(false); err != nil {
				return err
			}
		}
		if err := d.monitor.Warm(ctx); err != nil {
			return err
		}
		// Nor without knowing who is seeded: the first answers of a new server would send everybody home.
		if err := d.states.wait(ctx, d.config.Health.Timeout); err != nil {
			return err
		}
		if err := d.front.ready(ctx); err != nil {
			return err
		}
		d.front.open()
		if listens {
			d.answering.Store(true)
		} else if err := serve(true); err != nil {
			return err
		}
		d.log.Info("answering", zap.String("zone", d.config.DNS.Zone), zap.Stringers("listen", d.server.Addresses()))
		return nil
	})
	return group.Wait()
}

func (d *daemon) addresses() Addresses {
	a := Addresses{API: d.apiListener.Addr().(*net.TCPAddr).AddrPort()}
	if d.evListener != nil {
		a.Events = d.evListener.Addr().(*net.TCPAddr).AddrPort()
	}
	if d.server != nil {
		a.DNS = d.server.Addresses()
	}
	return a
}

// follow reloads what reload asks for.
func (d *daemon) follow(ctx context.Context, reload <-chan struct{}) error {
	for {
		select {
		case <-reload:
			d.reload()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// reload reads the files that may change meanwhile again: see reloaded. What cannot be used leaves what was good, and is told.
func (d *daemon) reload() {
	d.log.Info("reading files again; a changed configuration holds from the next start on", zap.Strings("files", d.reloaded()))
	report := func(what string, err error) {
		text := ""
		if err != nil {
			text = fmt.Sprintf("reading again failed; what was read before is kept: %v", err)
		}
		d.notice(what, text)
	}
	databases, err := openDatabases(d.config.Geo, d.front.databases())
	report("geo", err)
	d.front.offered.Store(databases)
	if d.server != nil {
		report("dns", d.server.Reload())
	}
	if d.apiPair != nil {
		report("api.tls", d.apiPair.Reload())
	}
	if d.eventsPair != nil {
		report("events.tls", d.eventsPair.Reload())
	}
}

// reloaded are the files that reload reads.
func (d *daemon) reloaded() []string {
	c := &d.config
	files := slices.Concat(c.Geo.Database, c.Geo.ASN, []string{c.Geo.Prefixes, c.Geo.Latencies})
	if d.server != nil {
		files = append(files, c.DNS.Static, c.DNS.Cookies.Secret)
	}
	if d.apiPair != nil {
		files = append(files, c.API.TLS.Cert, c.API.TLS.Key)
	}
	if d.eventsPair != nil {
		files = append(files, c.Events.TLS.Cert, c.Events.TLS.Key)
	}
	return slices.DeleteFunc(files, func(file string) bool { return file == "" })
}

func (d *daemon) apiOptions() api.Options {
	o := api.Options{
		View: d.front.current, Status: d.status, Editor: d.editor, Reserved: d.reserved(), Store: d.store,
		TTLMin: int(d.config.DNS.TTL.Min / time.Second), TTLMax: int(d.config.DNS.TTL.Max / time.Second),
		Metrics: promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{ErrorLog: zap.NewStdLog(d.log)}),
		Token:   d.apiToken, Names: d.config.API.Names, Log: d.log.Named("api"),
	}
	if d.server != nil {
		o.Zone, o.Chart = mdns.CanonicalName(d.config.DNS.Zone), d.front.simulate
	}
	if d.replicator != nil {
		o.Replicator, o.Knock = d.replicator, d.knock
	}
	if d.handler != nil {
		o.EventsToken = func(registry, region string) api.EventsToken {
			return api.EventsToken{URL: d.eventsURL() + "/events/" + registry + "/" + region, Token: d.eventKey.Token(registry, region)}
		}
	}
	return o
}

// knock reports what answers at the endpoint of a replica, if that is no registry. What does not answer, or cannot be asked, is
// left to the replicator.
func (d *daemon) knock(ctx context.Context, r topology.ReplicaDocument) error {
	endpoint, err := url.Parse(r.Endpoint)
	if err != nil || endpoint.Host == "" || endpoint.User != nil {
		return nil // the editor tells
	}
	client, err := distribution.New(distribution.Options{
		Endpoint: endpoint, Credentials: r.Credentials, CA: r.CA, ClientCert: r.ClientCert, UserAgent: "portolan/" + d.version, Logger: d.log,
	})
	if err != nil {
		return nil
	}
	defer client.Close()
	if err := client.Ping(ctx); errors.Is(err, distribution.ErrNotRegistry) {
		return err
	}
	return nil
}

// eventsURL is the configured one, with the port that was really bound.
func (d *daemon) eventsURL() string {
	c := d.config
	if c.Events.URL == "" && d.evListener != nil {
		c.Events.Listen = d.evListener.Addr().(*net.TCPAddr).AddrPort()
	}
	return c.EventsURL()
}
