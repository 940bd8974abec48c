package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/gofrs/flock"
	containers "github.com/google/go-containerregistry/pkg/registry"
	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
	mdns "github.com/miekg/dns"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"

	"portolan/api"
	"portolan/store/bolt"
	"portolan/test/bed"
	"portolan/topology"
)

// patience is how long tests wait for what must happen, however busy the machine is.
const patience = 2 * time.Minute

// base is a configuration on ports that the kernel chooses.
const base = `store: bolt:portolan.db
dns: {listen: ["127.0.0.1:0"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}, ttl: {min: 1s, max: 2s}}
api: {listen: "127.0.0.1:0"}
health: {interval: 200ms, timeout: 1s}
replication: {scan_interval: 1s}
`

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// newRegistry is a container registry in this process.
func newRegistry(t *testing.T) (host string) {
	t.Helper()
	s := httptest.NewServer(containers.New(containers.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func twoRegions(a, b string) string {
	return fmt.Sprintf(`registries:
  - name: contoso
    home: westus
    replicas:
      - {region: westus, endpoint: "http://%s", addresses: [127.0.0.1]}
      - {region: westeurope, endpoint: "http://%s", addresses: [127.0.0.1]}
`, a, b)
}

// running is a daemon of a test.
type running struct {
	addresses Addresses
	readers   int // that read DNS over UDP
	client    *api.Client
	reload    chan struct{}
	logs      *observer.ObservedLogs // warnings and worse
	stop      func() error
}

// startDaemon runs a daemon until stop, or the end of the test; dns says whether it is expected to answer DNS.
func startDaemon(t *testing.T, text, dir string, dns bool) *running {
	t.Helper()
	config, err := Parse(filepath.Join(dir, "portolan.yaml"), []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	core, logs := observer.New(zap.InfoLevel)
	r := &running{reload: make(chan struct{}, 1), logs: logs}
	bound, ended := make(chan Addresses, 1), make(chan error, 1)
	logger := zaptest.NewLogger(t, zaptest.Level(zap.ErrorLevel), zaptest.WrapOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, core) })))
	go func() {
		ended <- Run(ctx, Options{Config: config, Version: "1.2.3", Log: logger, Reload: r.reload, Readers: func(n int) { r.readers = n }, Bound: func(a Addresses) { bound <- a }})
	}()
	stopped := false
	r.stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		return <-ended
	}
	t.Cleanup(func() {
		if err := r.stop(); err != nil {
			t.Errorf("the daemon did not end in order: %v", err)
		}
	})
	if !dns {
		r.addresses.API = config.API.Listen
	} else {
		select {
		case r.addresses = <-bound:
		case err := <-ended:
			ended <- nil
			t.Fatalf("the daemon did not start: %v", err)
		case <-time.After(patience):
			t.Fatal("the daemon does not answer")
		}
	}
	if r.client, err = api.NewClient("http://"+r.addresses.API.String(), ""); err != nil {
		t.Fatal(err)
	}
	return r
}

// eventually waits until check finds nothing missing.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	q, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		return 0, err.Error()
	}
	defer a.Body.Close()
	text, err := io.ReadAll(a.Body)
	if err != nil {
		t.Fatal(err)
	}
	return a.StatusCode, string(text)
}

func ask(t *testing.T, at, name string, kind uint16) *mdns.Msg {
	t.Helper()
	q := new(mdns.Msg)
	q.SetQuestion(name, kind)
	a, _, err := (&mdns.Client{Timeout: patience}).ExchangeContext(t.Context(), q, at)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func (r *running) ready(registry string) error {
	replicas, err := r.client.Replicas(context.Background(), registry)
	if err != nil {
		return err
	}
	for _, p := range replicas {
		if p.Status != topology.Ready {
			return fmt.Errorf("%s is %s: %s", p.Region, p.Status, p.Reason)
		}
	}
	return nil
}

// What is wrong is told at once, by name, and nothing is left running.
func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tcp.Close() })
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	for name, c := range map[string]struct {
		change func(t *testing.T, dir, config string) string
		want   []string
	}{
		"busy API port": {func(t *testing.T, dir, config string) string {
			return strings.Replace(config, `api: {listen: "127.0.0.1:0"`, `api: {listen: "`+tcp.Addr().String()+`"`, 1)
		}, []string{"api.listen: " + tcp.Addr().String() + " is in use", "ss -ltnp"}},
		"busy DNS port": {func(t *testing.T, dir, config string) string {
			return strings.Replace(config, `listen: ["127.0.0.1:0"]`, `listen: ["`+udp.LocalAddr().String()+`"]`, 1)
		}, []string{"dns.listen: " + udp.LocalAddr().String() + " is in use"}},
		"file in use": {func(t *testing.T, dir, config string) string {
			db, err := bolt.OpenDB(filepath.Join(dir, "portolan.db"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { db.Close() })
			return config
		}, []string{"portolan.db", "in use by another process"}},
		"data folder in use": {func(t *testing.T, dir, config string) string {
			lock := flock.New(filepath.Join(dir, "portolan.lock"))
			if locked, err := lock.TryLock(); err != nil || !locked {
				t.Fatal(locked, err)
			}
			t.Cleanup(func() { _ = lock.Close() })
			return strings.Replace(config, "bolt:portolan.db", "consul://"+tcp.Addr().String()+"/portolan", 1) + "data: .\n"
		}, []string{"the data folder", "in use by another process", "portolan.lock", "a folder of its own"}},
		"not a database": {func(t *testing.T, dir, config string) string {
			write(t, dir, "city.mmdb", "not one")
			return config + "geo: {database: city.mmdb}\n"
		}, []string{"city.mmdb"}},
		"no database": {func(t *testing.T, dir, config string) string { return config + "geo: {asn: asn.mmdb}\n" }, []string{"asn.mmdb"}},
		"no token": {func(t *testing.T, dir, config string) string {
			return strings.Replace(config, "api: {", "api: {token_file: token, ", 1)
		}, []string{"api.token_file", "no such file"}},
		"weak token": {func(t *testing.T, dir, config string) string {
			write(t, dir, "token", "hunter2\n")
			return strings.Replace(config, "api: {", "api: {token_file: token, ", 1)
		}, []string{"api.token_file", "at least 16"}},
		"no certificate": {func(t *testing.T, dir, config string) string {
			return strings.Replace(config, "api: {", "api: {tls: {cert: a.pem, key: b.pem}, ", 1)
		}, []string{"api.tls", "a.pem"}},
		"bad static record": {func(t *testing.T, dir, config string) string {
			write(t, dir, "zone.db", "www A 192.0.2.1\nx NS y\n")
			return strings.Replace(config, "dns: {", "dns: {static: zone.db, ", 1)
		}, []string{"zone.db:2"}},
		"bad topology file": {func(t *testing.T, dir, config string) string {
			write(t, dir, "topology.yaml", "registries:\n  - nmae: x\n")
			return config + "topology: topology.yaml\n"
		}, []string{"topology.yaml:2:5", `did you mean "name"?`}},
		"reserved name": {func(t *testing.T, dir, config string) string {
			write(t, dir, "topology.yaml", strings.Replace(twoRegions("127.0.0.1:1", "127.0.0.2:1"), "contoso", "ns1", 1))
			return config + "topology: topology.yaml\n"
		}, []string{"topology.yaml", "ns1"}},
		"key for all to read": {func(t *testing.T, dir, config string) string {
			if err := os.Chmod(write(t, dir, "events.key", strings.Repeat("a", 64)), 0o644); err != nil {
				t.Fatal(err)
			}
			return config + "events: {listen: \"127.0.0.1:0\"}\n"
		}, []string{"events.key", "0600"}},
		"no folder to write": {func(t *testing.T, dir, config string) string {
			write(t, dir, "file", "")
			return config + "data: file/data\n"
		}, []string{"the data folder"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			config, err := Parse(filepath.Join(dir, "p.yaml"), []byte(c.change(t, dir, base)))
			if err != nil {
				t.Fatal(err)
			}
			before := files(t, dir)
			ctx, stop := context.WithTimeout(t.Context(), patience) // one that starts may wait for a store that is away
			defer stop()
			err = Run(ctx, Options{Config: config, Log: zap.NewNop(), Bound: func(Addresses) { stop() }})
			if err == nil {
				t.Fatal("it started")
			}
			for _, want := range c.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %q in: %v", want, err)
				}
			}
			if after := files(t, dir); !slices.Equal(before, after) {
				t.Errorf("left behind: %q, and there was %q", after, before)
			}
		})
	}
}

// files are the names of what is in a folder.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// A check tells all that is wrong with what operators write at once, and leaves nothing behind.
func TestCheck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "topology.yaml", strings.Replace(twoRegions("127.0.0.1:1", "127.0.0.2:1"), "westeurope", "ns1", 1)+"  - {name: fabrikam, home: nowhere, replicas: []}\n")
	write(t, dir, "zone.db", "x NS y\n")
	write(t, dir, "prefixes", "192.0.2.0/33 westus\n")
	write(t, dir, "latencies", "country/ZZ westus 1\n")
	text := strings.Replace(base, "dns: {", "dns: {static: zone.db, ", 1) + "topology: topology.yaml\ngeo: {database: city.mmdb, asn: elsewhere.mmdb, prefixes: prefixes, latencies: latencies}\n"
	write(t, dir, "city.mmdb", "not one")
	check := func() (Checked, error) {
		t.Helper()
		config, err := Parse(filepath.Join(dir, "p.yaml"), []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		before := files(t, dir)
		checked, err := Check(config)
		if after := files(t, dir); !slices.Equal(before, after) {
			t.Errorf("left behind: %q, and there was %q", after, before)
		}
		return checked, err
	}
	_, err := check()
	for _, want := range []string{"zone.db:1", "prefixes:1: ", "latencies:1: ", "geo.database: ", `topology.yaml:6:9: registries[0].replicas[1]: the name "ns1" is reserved`, "topology.yaml:7:47: registries[1].replicas: is missing"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in: %v", want, err)
		}
	}
	write(t, dir, "zone.db", "www A 192.0.2.1\n")
	write(t, dir, "prefixes", "192.0.2.0/24 westus\n")
	write(t, dir, "latencies", "country/DE westus 1\n")
	write(t, dir, "topology.yaml", twoRegions("127.0.0.1:1", "127.0.0.2:1"))
	writeCity(t, filepath.Join(dir, "city.mmdb"), "DE", 52.5, 13.4)
	checked, err := check()
	var paths []string
	for _, name := range []string{"topology.yaml", "zone.db", "city.mmdb", "prefixes", "latencies"} {
		paths = append(paths, filepath.Join(dir, name))
	}
	if err != nil || !slices.Equal(checked.Files, paths) || !slices.Equal(checked.Absent, []string{filepath.Join(dir, "elsewhere.mmdb")}) {
		t.Errorf("%+v, %v", checked, err)
	}
}

func TestServe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "topology.yaml", twoRegions(newRegistry(t), newRegistry(t)))
	write(t, dir, "zone.db", "www 60 IN A 192.0.2.1\n")
	processors := runtime.GOMAXPROCS(0)
	r := startDaemon(t, strings.Replace(base, "dns: {", "dns: {static: zone.db, ", 1)+"topology: topology.yaml\n", dir, true)
	// The runtime is the process's. A daemon that gave it processors would have the next one read with as many threads more, and that again.
	if now := runtime.GOMAXPROCS(0); now != processors || runtime.GOOS == "linux" && r.readers != processors {
		t.Errorf("%d threads read with %d processors, of %d before", r.readers, now, processors)
	}
	url := "http://" + r.addresses.API.String()
	if status, text := get(t, url+"/readyz"); status != 200 {
		t.Errorf("readyz %d: %s", status, text)
	}
	if status, text := get(t, url+"/healthz"); status != 200 || text != "ok\n" {
		t.Errorf("healthz %d: %s", status, text)
	}
	if _, text := get(t, url+"/metrics"); !strings.Contains(text, `portolan_build_info{roles="dns,replicator",version="1.2.3"} 1`) || !strings.Contains(text, "portolan_dns_") {
		t.Errorf("metrics:\n%s", text)
	}
	at := r.addresses.DNS[0].String()
	if a := ask(t, at, "contoso.geo.example.net.", mdns.TypeA); len(a.Answer) != 1 || !a.Authoritative {
		t.Errorf("%v", a)
	}
	eventually(t, "the replicas are Ready", func() error { return r.ready("contoso") })

	// A changed static record is answered after SIGHUP, a broken file changes nothing and is told.
	write(t, dir, "zone.db", "www 60 IN A 192.0.2.2\n")
	r.reload <- struct{}{}
	eventually(t, "the new record is answered", func() error {
		if a := ask(t, at, "www.geo.example.net.", mdns.TypeA); len(a.Answer) != 1 || !strings.HasSuffix(a.Answer[0].String(), "192.0.2.2") {
			return fmt.Errorf("%v", a.Answer)
		}
		return nil
	})
	read := r.logs.FilterMessageSnippet("a changed configuration holds from the next start on").All()
	if len(read) != 1 || fmt.Sprint(read[0].ContextMap()["files"]) != fmt.Sprint([]string{filepath.Join(dir, "zone.db")}) {
		t.Errorf("%v", read)
	}
	write(t, dir, "zone.db", "www 60 IN A nowhere\n")
	r.reload <- struct{}{}
	eventually(t, "the fault is in the status", func() error {
		s, err := r.client.Status(t.Context())
		if err != nil || !strings.Contains(strings.Join(s.Warnings, "\n"), "zone.db") {
			return fmt.Errorf("%v, %v", s.Warnings, err)
		}
		return nil
	})
	if a := ask(t, at, "www.geo.example.net.", mdns.TypeA); len(a.Answer) != 1 {
		t.Errorf("a broken file took the record away: %v", a)
	}

	// The file and the store differ: reported, not ignored, and nothing is overwritten at the next start.
	ninety := 90
	if _, err := r.client.UpdateReplica(t.Context(), "contoso", "westus", api.ReplicaPatch{Weight: &ninety}, false); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the drift is in the status", func() error {
		s, err := r.client.Status(t.Context())
		if err != nil || len(s.Topology.Drift) != 1 || s.Topology.Drift[0].String() != "- registries/contoso/replicas/westus/weight: 90" {
			return fmt.Errorf("%v, %v", s.Topology.Drift, err)
		}
		return nil
	})
	off := api.RoutingDisabled
	for _, region := range []string{"westus", "westeurope"} {
		if _, err := r.client.UpdateReplica(t.Context(), "contoso", region, api.ReplicaPatch{Routing: &off}, true); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "that clients get no address is in the status", func() error {
		s, err := r.client.Status(t.Context())
		if err != nil || !strings.Contains(strings.Join(s.Warnings, "\n"), "clients of registry contoso get no address: ") {
			return fmt.Errorf("%v, %v", s.Warnings, err)
		}
		return nil
	})
	eventually(t, "all of the drift is in the status", func() error {
		s, err := r.client.Status(t.Context())
		if err != nil || len(s.Topology.Drift) != 3 {
			return fmt.Errorf("%v, %v", s.Topology.Drift, err)
		}
		return nil
	})
	if n := r.logs.FilterMessageSnippet("the store differs from the topology file").Len(); n != 1 {
		t.Errorf("the drift was logged %d times", n)
	}
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "topology.yaml", "not: [a, topology]\n") // by now it is needed no more
	again := startDaemon(t, base+"topology: topology.yaml\n", dir, true)
	p, err := again.client.Replica(t.Context(), "contoso", "westus")
	if err != nil || p.Weight != 90 {
		t.Errorf("after a restart: %+v, %v", p, err)
	}
	if s, err := again.client.Status(t.Context()); err != nil || !strings.Contains(strings.Join(s.Warnings, "\n"), "topology file cannot be used") {
		t.Errorf("%+v, %v", s.Warnings, err)
	}
}

// writeCity writes a location database in which all of 141.20.0.0/24 is in one country.
func writeCity(t *testing.T, path, country string, latitude, longitude float64) {
	t.Helper()
	tree, err := mmdbwriter.New(mmdbwriter.Options{DatabaseType: "Test-City", IncludeReservedNetworks: true})
	if err != nil {
		t.Fatal(err)
	}
	_, network, err := net.ParseCIDR("141.20.0.0/24")
	if err != nil {
		t.Fatal(err)
	}
	err = tree.Insert(network, mmdbtype.Map{
		"country":  mmdbtype.Map{"iso_code": mmdbtype.String(country)},
		"location": mmdbtype.Map{"latitude": mmdbtype.Float64(latitude), "longitude": mmdbtype.Float64(longitude)},
	})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tree.WriteTo(f); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// The status tells how many events came, and how many of them were of no interest.
func TestEventsStatus(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write(t, dir, "topology.yaml", twoRegions(newRegistry(t), newRegistry(t)))
	r := startDaemon(t, base+"topology: topology.yaml\nevents: {listen: \"127.0.0.1:0\"}\n", dir, true)
	token, err := r.client.EventsToken(t.Context(), "contoso", "westus")
	if err != nil {
		t.Fatal(err)
	}
	const events = `{"events": [{"id": "1", "action": "pull", "target": {"repository": "a", "tag": "1"}}, {"id": "2", "action": "push", "target": {"repository": "a", "tag": "1"}}]}`
	q, err := http.NewRequestWithContext(t.Context(), http.MethodPost, token.URL, strings.NewReader(events))
	if err != nil {
		t.Fatal(err)
	}
	q.Header.Set("Content-Type", "application/vnd.docker.distribution.events.v2+json")
	q.Header.Set("Authorization", "Bearer "+token.Token)
	a, err := http.DefaultClient.Do(q)
	if err != nil {
		t.Fatal(err)
	}
	a.Body.Close()
	s, err := r.client.Status(t.Context())
	if err != nil || s.Events == nil || s.Events.Received["contoso/westus"] != 2 || s.Events.Ignored["contoso/westus"] != 1 {
		t.Errorf("%s: %+v, %v", a.Status, s.Events, err)
	}
}

// A location database that was replaced decides after a reload; one that is broken changes nothing.
func TestReloadDatabase(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	city := filepath.Join(dir, "city.mmdb")
	writeCity(t, city, "DE", 52.5, 13.4)
	write(t, dir, "topology.yaml", strings.Replace(twoRegions("127.0.0.1:1", "127.0.0.2:1"), "replicas:", "policy: {replication: disabled}\n    replicas:", 1))
	r := startDaemon(t, base+"topology: topology.yaml\ngeo: {database: city.mmdb}\n", dir, true)
	goes := func(country, region string) func() error {
		return func() error {
			e, err := r.client.Explain(t.Context(), "contoso", "141.20.0.0/24", "")
			if err != nil || e.Country != country || e.Region != region {
				return fmt.Errorf("%s goes to %s: %v", e.Country, e.Region, err)
			}
			return nil
		}
	}
	eventually(t, "the client is in Germany", goes("DE", "westeurope"))
	writeCity(t, city, "US", 37.8, -122.4)
	r.reload <- struct{}{}
	eventually(t, "the client is in the United States", goes("US", "westus"))
	write(t, dir, "city.mmdb", "broken")
	r.reload <- struct{}{}
	eventually(t, "the fault is in the status", func() error {
		s, err := r.client.Status(t.Context())
		if err != nil || !strings.Contains(strings.Join(s.Warnings, "\n"), "city.mmdb") {
			return fmt.Errorf("%v, %v", s.Warnings, err)
		}
		return nil
	})
	// What was charted holds, though the file can no longer tell of which place it was.
	if err := goes("", "westus")(); err != nil {
		t.Error(err)
	}
}

// A front door that starts while Consul is away answers from the last good topology, and not only with the home.
func TestStartWithoutConsul(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	home := httptest.NewServer(containers.New(containers.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(home.Close)
	write(t, dir, "topology.yaml", twoRegions(strings.TrimPrefix(home.URL, "http://"), newRegistry(t)))
	first := startDaemon(t, base+"topology: topology.yaml\n", dir, true)
	eventually(t, "the replicas are Ready", func() error { return first.ready("contoso") })
	if err := first.stop(); err != nil {
		t.Fatal(err)
	}
	home.Close()
	write(t, dir, "topology.yaml", "not: [a, topology]\n") // what is on disk holds, as what is in the store would

	away := strings.Replace(base, "bolt:portolan.db", "consul://"+bed.NewAddress(t, "127.0.0.1")+"/portolan", 1) + "roles: [dns]\ndata: .\ntopology: topology.yaml\n"
	r := startDaemon(t, away, dir, true)
	s, err := r.client.Status(t.Context())
	if err != nil || !s.Ready || s.Store.Error == "" || s.Topology.Registries != 1 || !strings.Contains(strings.Join(s.Warnings, "\n"), "last good topology") {
		t.Errorf("%+v, %v", s, err)
	}
	if !strings.Contains(strings.Join(s.Warnings, "\n"), "topology file cannot be used") {
		t.Errorf("no word of the topology file: %v", s.Warnings)
	}
	if s.Health == nil || s.Health.CertificateWarning != 14*24*3600 {
		t.Errorf("how it probes: %+v", s.Health)
	}
	eventually(t, "clients are sent to what is seeded and healthy", func() error {
		e, err := r.client.Explain(t.Context(), "contoso", "128.32.0.0/24", "")
		if err != nil || e.Region != "westeurope" {
			return fmt.Errorf("%+v, %v", e, err)
		}
		return nil
	})
	if _, err := r.client.UpdateReplica(t.Context(), "contoso", "westus", api.ReplicaPatch{}, false); !api.IsCode(err, api.CodeUnavailable) {
		t.Errorf("an edit without the store: %v", err)
	}
}

// IPv4 and IPv6 are bound apart: who has the port on an IPv6 address is not in the way of 0.0.0.0.
func TestListensOnOneFamily(t *testing.T) {
	t.Parallel()
	at := netip.MustParseAddrPort(bed.NewAddress(t, "0.0.0.0"))
	six := netip.AddrPortFrom(netip.IPv6Loopback(), at.Port())
	other, err := net.Listen("tcp6", six.String())
	if err != nil {
		t.Skipf("this machine has no IPv6: %v", err)
	}
	defer other.Close()
	if err := tryDNS(t.Context(), []netip.AddrPort{at}); err != nil {
		t.Errorf("dns.listen: %v", err)
	}
	l, err := listen(t.Context(), "api.listen", "tcp"+family(at, ""), at)
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	if err := tryDNS(t.Context(), []netip.AddrPort{six}); err == nil {
		t.Error("a busy port is not found busy")
	}
}

// The end waits for each part, but not for ever, and says for which it did not.
func TestEnd(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		core, logs := observer.New(zap.InfoLevel)
		d := &daemon{log: zap.New(core)}
		failed := make(chan error, 1)
		held := make(chan struct{})
		parts := []*part{d.start("held", failed, func(context.Context) error { <-held; return nil })}
		for range 20 {
			parts = append(parts, d.start("orderly", failed, func(ctx context.Context) error {
				<-ctx.Done()
				time.Sleep(time.Second)
				return ctx.Err()
			}))
		}
		begun := time.Now()
		if d.end(time.Minute, parts...) || time.Since(begun) != time.Minute {
			t.Errorf("with a part that is held it took %v", time.Since(begun))
		}
		if n := logs.FilterField(zap.String("for", "held")).Len(); n != 1 || logs.Len() != 1 {
			t.Errorf("said of %d parts, %d times of the one", logs.Len(), n)
		}
		close(held)
		if !d.end(time.Minute, parts...) {
			t.Error("with no part left it is not orderly")
		}
		select {
		case err := <-failed:
			t.Errorf("parts that were stopped failed the daemon: %v", err)
		default:
		}
	})
}

// A part that ends by itself, with an error or by a fault of the program, fails the daemon.
func TestPartFails(t *testing.T) {
	t.Parallel()
	for want, run := range map[string]func(context.Context) error{
		"x ended by itself":                  func(context.Context) error { return nil },
		"x: closed":                          func(context.Context) error { return errors.New("closed") },
		"x ended by a fault of the program;": func(context.Context) error { panic("oh") },
	} {
		failed := make(chan error, 1)
		d := &daemon{log: zap.NewNop()}
		p := d.start("x", failed, run)
		if err := <-failed; !strings.HasPrefix(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
		p.stop()
		<-p.done
	}
}

// Without a last good topology it waits, says for what, once, and begins by itself when the store is there. Resolvers are told
// meanwhile that it is not ready, rather than nothing.
func TestConsulIsNotThereYet(t *testing.T) {
	t.Parallel()
	consul := bed.NewConsul(t, bed.ConsulConfig{Dir: t.TempDir()})
	if err := consul.Stop(); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write(t, dir, "topology.yaml", twoRegions(newRegistry(t), newRegistry(t)))
	r := startDaemon(t, strings.Replace(base, "bolt:portolan.db", "consul://"+consul.Addr()+"/portolan", 1)+"data: .\ntopology: topology.yaml\n", dir, true)
	status, answer := get(t, "http://"+r.addresses.API.String()+"/readyz")
	if status != 503 || !strings.Contains(answer, "there is no topology yet") || !strings.Contains(answer, "consul://") {
		t.Errorf("%d %s", status, answer)
	}
	if s, err := r.client.Status(t.Context()); err != nil || len(s.DNS.Listen) != 1 {
		t.Errorf("where it listens: %+v, %v", s.DNS, err)
	}
	const name = "contoso.geo.example.net."
	q := new(mdns.Msg).SetQuestion(name, mdns.TypeA).SetEdns0(1232, false)
	a, _, err := (&mdns.Client{Timeout: patience}).ExchangeContext(t.Context(), q, r.addresses.DNS[0].String())
	if err != nil || a.Rcode != mdns.RcodeServerFailure || !strings.Contains(a.String(), "EDE: 14 ") {
		t.Errorf("before there is a topology: %v, %v", a, err)
	}
	said := func(what string) int { return r.logs.FilterMessageSnippet(what).Len() }
	if n := said("there is no topology: the store cannot be read"); n != 1 || said("there is a topology now") != 0 {
		t.Errorf("said %d times", n)
	}

	if err := consul.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it answers", func() error {
		if a := ask(t, r.addresses.DNS[0].String(), name, mdns.TypeA); len(a.Answer) != 1 {
			return fmt.Errorf("%v", a)
		}
		return nil
	})
	if said("there is no topology: the store cannot be read") != 1 || said("there is a topology now") != 1 || said("answering") != 1 {
		t.Errorf("the log: %+v", r.logs.All())
	}
}

// A start that never finds a topology ends in order all the same.
func TestConsulNeverThere(t *testing.T) {
	t.Parallel()
	text := strings.Replace(base, "bolt:portolan.db", "consul://"+bed.NewAddress(t, "127.0.0.1")+"/portolan", 1)
	text = strings.Replace(text, `api: {listen: "127.0.0.1:0"}`, `api: {listen: "`+bed.NewAddress(t, "127.0.0.1")+`"}`, 1)
	r := startDaemon(t, text, t.TempDir(), false)
	eventually(t, "it is there", func() error {
		if status, answer := get(t, "http://"+r.addresses.API.String()+"/readyz"); status != 503 {
			return fmt.Errorf("%d %s", status, answer)
		}
		return nil
	})
}
