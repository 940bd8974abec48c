// Package e2e drives bin/portolan as operators and clients do: the daemon as a process of its own, its command line, public
// clients of registries and of DNS, a real Consul, and registries of both generations. Nothing of Portolan runs in the test
// itself, but for the key that event tokens are made of.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	miekg "github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"portolan/replicator/events"
	"portolan/test/bed"
)

const (
	// patience is how long a condition may take to come true: a bound for hung tests, no expectation.
	patience = 90 * time.Second
	// oneName is the registry's name in the zone of every scene.
	oneName = "contoso.geo.example.net"
)

// The regions of the scenes. Registries of one scene differ by address, those of several scenes by port.
var (
	westus        = site{region: "westus", host: "127.0.1.1"}
	westeurope    = site{region: "westeurope", host: "127.0.2.1"}
	southeastasia = site{region: "southeastasia", host: "127.0.3.1"}
)

// Client networks that the built-in table of countries puts nearest to the regions above.
const (
	america = "8.8.8.0/24"
	europe  = "193.0.6.0/24"
	asia    = "133.11.0.0/24"
)

// site is a region with the registry that somebody runs there.
type site struct {
	region, host string
	registry     bed.RegistryConfig
}

func (s site) with(change func(*bed.RegistryConfig)) site {
	change(&s.registry)
	return s
}

// scene is some registries, and what portolan servers before them need.
type scene struct {
	t          *testing.T
	dir        string
	sites      []site
	registries map[string]*bed.Registry
	port       string // of all registries
	// links are the endpoints, host:port, of registries that are reached over a proxy.
	links map[string]string

	events  string // host:port of the events listener
	standby string // that of a second replicator
	key     events.Key
	// api is the server that commands are sent to, dns the one that dig asks; set when a server starts.
	api, dns string
}

// newScene starts the registries, the first of which is the home. All have the port in common, as clients of one name need.
func newScene(t *testing.T, sites ...site) *scene {
	t.Helper()
	s := &scene{t: t, dir: t.TempDir(), sites: sites, registries: map[string]*bed.Registry{}, links: map[string]string{},
		events: bed.NewAddress(t, "127.0.0.1"), standby: bed.NewAddress(t, "127.0.0.1")}
	var err error
	if s.key, err = events.LoadKey(s.path("events.key")); err != nil {
		t.Fatal(err)
	}
	_, s.port, _ = strings.Cut(bed.NewAddress(t, "127.0.1.1"), ":")
	for _, p := range sites {
		c := p.registry
		c.Dir, c.Listen, c.Cache = s.path(p.region), p.host+":"+s.port, true
		for _, listener := range []string{s.events, s.standby} {
			c.Notify = append(c.Notify, bed.Notification{Name: listener, URL: "http://" + listener + "/events/contoso/" + p.region, Token: s.key.Token("contoso", p.region)})
		}
		s.registries[p.region] = bed.NewRegistry(t, c)
	}
	return s
}

func (s *scene) path(name string) string { return filepath.Join(s.dir, name) }

func (s *scene) write(name, text string) string {
	s.t.Helper()
	path := s.path(name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// topology is a topology file of the registries in these regions, the first of which is the home.
func (s *scene) topology(regions ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "registries:\n  - name: contoso\n    home: %s\n    replicas:\n", regions[0])
	for _, p := range s.sites {
		if !slices.Contains(regions, p.region) {
			continue
		}
		endpoint := p.host + ":" + s.port
		if link := s.links[p.region]; link != "" {
			endpoint = link
		}
		host, _, _ := strings.Cut(endpoint, ":")
		fmt.Fprintf(&b, "      - {region: %s, endpoint: \"http://%s\", addresses: [%s]}\n", p.region, endpoint, host)
	}
	return b.String()
}

func (s *scene) regions() []string {
	var list []string
	for _, p := range s.sites {
		list = append(list, p.region)
	}
	return list
}

// config is a configuration of a server with all roles on a bolt file, with more lines at its end. Probes and scans are quick,
// so that tests are.
func (s *scene) config(more ...string) string {
	if s.dns == "" {
		s.api, s.dns = bed.NewAddress(s.t, "127.0.0.1"), bed.NewAddress(s.t, "127.0.0.1")
	}
	return fmt.Sprintf(`store: bolt:portolan.db
dns:
  listen: ["%s"]
  zone: geo.example.net
  nameservers: {ns1: [127.0.0.1]}
  contact: hostmaster@example.net
  ttl: {min: 1s, max: 2s}
api: {listen: "%s"}
events: {listen: "%s", key: %s}
health: {interval: 300ms}
`, s.dns, s.api, s.events, s.path("events.key")) + strings.Join(more, "\n")
}

// serve starts the server of config.
func (s *scene) serve(more ...string) *bed.Portolan {
	s.t.Helper()
	config := s.config(more...)
	return bed.NewPortolan(s.t, bed.PortolanConfig{Dir: s.path("portolan"), Config: config, API: s.api})
}

// ---- commands ----------------------------------------------------------------------------------------------------------

// outcome is what a command did.
type outcome struct {
	line           string
	stdout, stderr string
	code           int
}

func (o outcome) String() string {
	return fmt.Sprintf("$ %s\n%s%sexit code %d", o.line, o.stdout, o.stderr, o.code)
}

// run runs a program to its end, whatever its exit code is.
func run(t testing.TB, env []string, tool string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	cmd, err := bed.Command(ctx, env, tool, args...)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, cmd)
}

func finish(t testing.TB, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	o := outcome{line: filepath.Base(cmd.Path) + " " + strings.Join(cmd.Args[1:], " "), stdout: stdout.String(), stderr: stderr.String(), code: cmd.ProcessState.ExitCode()}
	var ended *exec.ExitError
	if err != nil && !errors.As(err, &ended) || o.code < 0 {
		t.Fatalf("%v\n%v", o, err)
	}
	return o
}

// cli runs portolan against the scene's server.
func (s *scene) cli(args ...string) outcome {
	s.t.Helper()
	return run(s.t, []string{"PORTOLAN_API=http://" + s.api}, "portolan", args...)
}

// must runs portolan, which must succeed, and returns what it printed.
func (s *scene) must(args ...string) string {
	s.t.Helper()
	o := s.cli(args...)
	if o.code != 0 {
		s.t.Fatal(o)
	}
	return o.stdout
}

// read decodes what a command prints with -o json.
func (s *scene) read(into any, args ...string) error {
	s.t.Helper()
	o := s.cli(append(args, "-o", "json")...)
	if o.code != 0 {
		return errors.New(o.String())
	}
	if err := json.Unmarshal([]byte(o.stdout), into); err != nil {
		return fmt.Errorf("%v: %w", o, err)
	}
	return nil
}

// tool runs a program that must succeed.
func (s *scene) tool(tool string, args ...string) string {
	s.t.Helper()
	o := run(s.t, nil, tool, args...)
	if o.code != 0 {
		s.t.Fatal(o)
	}
	return o.stdout
}

// until waits for a condition, and fails the test with its last reason.
func (s *scene) until(what string, condition func() error) {
	s.t.Helper()
	until(s.t, what, condition)
}

func until(t testing.TB, what string, condition func() error) {
	t.Helper()
	if err := bed.Until(t.Context(), patience, func(context.Context) error { return condition() }); err != nil {
		t.Fatalf("waited in vain for %s: %v", what, err)
	}
}

// ---- what operators see ------------------------------------------------------------------------------------------------

// replica is what scripts read of `portolan replica list -o json`: the names of the fields are a promise to them.
type replica struct {
	Registry  string   `json:"registry"`
	Region    string   `json:"region"`
	Home      bool     `json:"home"`
	Endpoint  string   `json:"endpoint"`
	Addresses []string `json:"addresses"`
	Status    string   `json:"status"`
	Health    string   `json:"health"`
	Routing   string   `json:"routing"`
	Weight    *int     `json:"weight"`
	Ramp      *struct {
		To int `json:"to"`
	} `json:"ramp"`
	Pending     *int     `json:"pending"`
	Reason      string   `json:"reason"`
	Requests    []string `json:"requests"`
	Replication struct {
		Phase         string `json:"phase"`
		Conflicts     int    `json:"conflicts"`
		NotReplicable int    `json:"not_replicable"`
		LastError     string `json:"last_error"`
		Plan          *struct {
			Conflicts int   `json:"conflicts"`
			Copy      int   `json:"copy"`
			Adopt     int   `json:"adopt"`
			Bytes     int64 `json:"bytes"`
		} `json:"plan"`
	} `json:"replication"`
}

// status is what they read of `portolan status -o json`.
type status struct {
	Ready    bool     `json:"ready"`
	Warnings []string `json:"warnings"`
	Store    struct {
		Error string `json:"error"`
	} `json:"store"`
	Topology struct {
		Digest   string `json:"digest"`
		Problems []struct {
			Key    string `json:"key"`
			Value  string `json:"value"`
			Reason string `json:"reason"`
			Effect string `json:"effect"`
		} `json:"problems"`
		Held []struct {
			Registry string   `json:"registry"`
			Missing  []string `json:"missing"`
		} `json:"held"`
	} `json:"topology"`
}

func (s *scene) replica(region string) (replica, error) {
	var list []replica
	if err := s.read(&list, "replica", "list", "contoso"); err != nil {
		return replica{}, err
	}
	for _, r := range list {
		if r.Region == region {
			return r, nil
		}
	}
	return replica{}, fmt.Errorf("no replica %s in %+v", region, list)
}

// ready waits until the replicas are Ready, with nothing pending.
func (s *scene) ready(regions ...string) {
	s.t.Helper()
	for _, region := range regions {
		s.until(region+" to be Ready", func() error {
			r, err := s.replica(region)
			if err == nil && (r.Status != "Ready" || r.Health != "Healthy" || *r.Pending != 0) {
				err = fmt.Errorf("it is %+v", r)
			}
			return err
		})
	}
}

// scrape returns the samples of /metrics by name and labels.
func (s *scene) scrape() map[string]string {
	s.t.Helper()
	status, text := s.get("/metrics")
	if status != http.StatusOK {
		s.t.Fatalf("/metrics answers %d: %s", status, text)
	}
	samples := map[string]string{}
	for line := range strings.Lines(text) {
		if at := strings.LastIndexByte(line, ' '); at > 0 && !strings.HasPrefix(line, "#") {
			samples[line[:at]] = strings.TrimSpace(line[at+1:])
		}
	}
	return samples
}

func (s *scene) get(path string) (int, string) {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet, "http://"+s.api+path, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return answered(request)
}

// answered asks, and returns status and body; 0 and the reason if there is no answer.
func answered(request *http.Request) (int, string) {
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, 8<<20))
	if err != nil {
		return 0, err.Error()
	}
	return response.StatusCode, string(text)
}

// ---- content -----------------------------------------------------------------------------------------------------------

func (s *scene) ref(region, image string) name.Reference {
	s.t.Helper()
	ref, err := name.ParseReference(s.registries[region].Addr()+"/"+image, name.Insecure)
	if err != nil {
		s.t.Fatal(err)
	}
	return ref
}

// login are the credentials with which the test itself pushes and pulls.
func (s *scene) login(region string) remote.Option {
	for _, p := range s.sites {
		for user, password := range p.registry.Users {
			if p.region == region {
				return remote.WithAuth(&authn.Basic{Username: user, Password: password})
			}
		}
	}
	return remote.WithAuth(authn.Anonymous)
}

// push puts a fresh image with layers of size bytes there and returns its digest.
func (s *scene) push(region, image string, size int64, layers int64) string {
	s.t.Helper()
	img, err := random.Image(size, layers)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.put(region, image, img); err != nil {
		s.t.Fatal(err)
	}
	return digestOf(s.t, img)
}

func (s *scene) put(region, image string, img v1.Image) error {
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	if err := remote.Write(s.ref(region, image), img, remote.WithContext(ctx), s.login(region)); err != nil {
		return fmt.Errorf("pushing %s to %s: %w", image, region, err)
	}
	return nil
}

func digestOf(t testing.TB, what interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	d, err := what.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// has says whether a tag has the digest there (none: is not there), and can be read to its last byte. What is read is verified
// against its digests.
func (s *scene) has(region, image, digest string) error {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	d, err := remote.Get(s.ref(region, image), remote.WithContext(ctx), s.login(region))
	var refused *transport.Error
	if errors.As(err, &refused) && refused.StatusCode == http.StatusNotFound && digest == "" {
		return nil
	}
	if err != nil {
		return err
	}
	if d.Digest.String() != digest {
		return fmt.Errorf("%s in %s is %v, not %q", image, region, d.Digest, digest)
	}
	if err := bed.ReadWhole(d); err != nil {
		return fmt.Errorf("reading %s in %s: %w", image, region, err)
	}
	return nil
}

// arrives waits until the tag has the digest in all of these regions.
func (s *scene) arrives(image, digest string, regions ...string) {
	s.t.Helper()
	for _, region := range regions {
		s.until(fmt.Sprintf("%s to be %.15s in %s", image, digest, region), func() error { return s.has(region, image, digest) })
	}
}

// tags are all tags of a region, by repository:tag.
func (s *scene) tags(region string) []string {
	s.t.Helper()
	registry := s.ref(region, "x").Context().Registry
	repositories, err := remote.Catalog(s.t.Context(), registry, s.login(region))
	if err != nil {
		s.t.Fatal(err)
	}
	var list []string
	for _, r := range repositories {
		tags, err := remote.List(registry.Repo(r), s.login(region))
		var refused *transport.Error
		if errors.As(err, &refused) && refused.StatusCode == http.StatusNotFound {
			continue // the repository of a copy under way
		}
		if err != nil {
			s.t.Fatal(err)
		}
		for _, tag := range tags {
			list = append(list, r+":"+tag)
		}
	}
	slices.Sort(list)
	return list
}

// ---- DNS ---------------------------------------------------------------------------------------------------------------

// record is a record as dig prints it.
type record struct {
	name, ttl, kind, data string
}

// answer is what dig prints of an answer.
type answer struct {
	text              string
	status, flags     string
	answer, authority []record
	subnet            string // CLIENT-SUBNET: network/source/scope
}

// data are the values of the answer's records of a kind.
func (a answer) data(kind string) []string {
	var list []string
	for _, r := range a.answer {
		if r.kind == kind {
			list = append(list, r.data)
		}
	}
	return list
}

// dig asks the scene's DNS server.
func (s *scene) dig(args ...string) answer {
	s.t.Helper()
	host, port, _ := strings.Cut(s.dns, ":")
	o := run(s.t, nil, "dig", append([]string{"@" + host, "-p", port, "+noall", "+comments", "+answer", "+authority", "+tries=2", "+time=3", "+norecurse"}, args...)...)
	if o.code != 0 {
		s.t.Fatal(o)
	}
	a := answer{text: o.String()}
	section := &a.answer
	for line := range strings.Lines(o.stdout) {
		line = strings.TrimSpace(line)
		switch f := strings.Fields(line); {
		case strings.HasPrefix(line, ";; ->>HEADER<<-"):
			_, rest, _ := strings.Cut(line, "status: ")
			a.status, _, _ = strings.Cut(rest, ",")
		case strings.HasPrefix(line, ";; flags:"):
			a.flags, _, _ = strings.Cut(strings.TrimPrefix(line, ";; flags: "), ";")
		case strings.HasPrefix(line, "; CLIENT-SUBNET: "):
			a.subnet = strings.TrimPrefix(line, "; CLIENT-SUBNET: ")
		case strings.HasPrefix(line, ";; AUTHORITY SECTION"):
			section = &a.authority
		case len(f) >= 5 && !strings.HasPrefix(line, ";"):
			*section = append(*section, record{name: f[0], ttl: f[1], kind: f[3], data: strings.Join(f[4:], " ")})
		}
	}
	return a
}

// led asks where a client network is led, as its region.
func (s *scene) led(subnet string) (string, error) {
	s.t.Helper()
	a := s.dig(oneName, "A", "+subnet="+subnet)
	got := a.data("A")
	if len(got) == 1 {
		for _, p := range s.sites {
			if p.host == got[0] {
				return p.region, nil
			}
		}
	}
	return "", errors.New(a.text)
}

// ask is led without a process for each question, at any server.
func (s *scene) ask(server, subnet string) (string, error) {
	prefix, err := netip.ParsePrefix(subnet)
	if err != nil {
		return "", err
	}
	q := new(miekg.Msg).SetQuestion(oneName+".", miekg.TypeA)
	q.SetEdns0(1232, false)
	q.IsEdns0().Option = append(q.IsEdns0().Option, &miekg.EDNS0_SUBNET{Code: miekg.EDNS0SUBNET, Family: 1,
		SourceNetmask: uint8(prefix.Bits()), Address: net.IP(prefix.Addr().AsSlice())})
	client := miekg.Client{Timeout: 3 * time.Second}
	a, _, err := client.ExchangeContext(s.t.Context(), q, server)
	if err != nil {
		return "", err
	}
	for _, rr := range a.Answer {
		for _, p := range s.sites {
			if a, ok := rr.(*miekg.A); ok && a.A.String() == p.host {
				return p.region, nil
			}
		}
	}
	return "", fmt.Errorf("no region in\n%v", a)
}

// asking has that many clients ask without a pause, and nothing twice. The function that it returns ends that, and tells how many queries
// there were, and what went wrong.
func (s *scene) asking(clients int) func() (queries int64, err error) {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	var all errgroup.Group
	var queries atomic.Int64
	for range clients {
		all.Go(func() error {
			for ctx.Err() == nil {
				queries.Add(1)
				if _, err := s.ask(s.dns, europe); err != nil {
					return err
				}
			}
			return nil
		})
	}
	ended := sync.OnceValue(func() error { cancel(); return all.Wait() })
	s.t.Cleanup(func() { _ = ended() })
	return func() (int64, error) { err := ended(); return queries.Load(), err }
}

// leads waits until a client network is led to a region.
func (s *scene) leads(subnet, region string) {
	s.t.Helper()
	s.until(fmt.Sprintf("%s to be led to %s", subnet, region), func() error {
		got, err := s.led(subnet)
		if err == nil && got != region {
			err = fmt.Errorf("it is led to %s", got)
		}
		return err
	})
}
