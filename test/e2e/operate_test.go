package e2e

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"

	"portolan/test/bed"
)

// value is a sample, found by its name and parts of its labels; the sum if there are several.
func value(t *testing.T, samples map[string]string, name string, labels ...string) (sum float64, found bool) {
	t.Helper()
	for sample, text := range samples {
		if base, _, _ := strings.Cut(sample, "{"); base != name {
			continue
		}
		if slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(sample, l) }) {
			continue
		}
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum, found = sum+v, true
	}
	return sum, found
}

// What operators watch is in /metrics, under the names that are documented.
func TestMetrics(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready("westus", "westeurope")
	s.leads(europe, "westeurope")
	s.arrives("team/app:1", s.push("westus", "team/app:1", 16<<10, 2), "westeurope")
	s.dig("www.example.org", "A")

	positive := func(name string, labels ...string) {
		t.Helper()
		s.until(fmt.Sprint(name, labels, " to be above 0"), func() error {
			if v, _ := value(t, s.scrape(), name, labels...); v <= 0 {
				return fmt.Errorf("it is %v", v)
			}
			return nil
		})
	}
	positive("portolan_dns_queries_total", `transport="udp"`, `type="A"`, `rcode="NOERROR"`)
	positive("portolan_dns_queries_total", `rcode="REFUSED"`)
	positive("portolan_dns_decisions_total", `registry="contoso"`, `region="westeurope"`)
	positive("portolan_health_up", `region="westus"`)
	positive("portolan_health_probes_total", `region="westus"`)
	positive("portolan_replicator_copies_total", `region="westeurope"`, `result="done"`)
	positive("portolan_replicator_bytes_total", `region="westeurope"`, `direction="written"`)
	positive("portolan_replicator_observations_total", `region="westus"`, `verdict="successor"`)
	positive("portolan_replicator_ready", `region="westeurope"`)
	positive("portolan_events_received_total", `region="westus"`)
	positive("portolan_build_info")
	// The threads that read UDP have processors of the runtime's beside those of all else.
	if n, _ := value(t, s.scrape(), "go_sched_gomaxprocs_threads"); runtime.GOOS == "linux" && n <= float64(runtime.GOMAXPROCS(0)) {
		t.Errorf("the server has %v processors of the runtime's", n)
	}

	// A replica that is away shows in all of them, and so does what waits for it.
	if err := s.registries["westeurope"].Stop(); err != nil {
		t.Fatal(err)
	}
	late := s.push("westus", "team/app:2", 16<<10, 2)
	positive("portolan_replicator_pending", `region="westeurope"`)
	positive("portolan_replicator_lag_seconds", `region="westeurope"`)
	positive("portolan_replicator_copies_total", `region="westeurope"`, `result="unavailable"`)
	s.until("the address to be down", func() error {
		if v, found := value(t, s.scrape(), "portolan_health_up", `region="westeurope"`); !found || v != 0 {
			return fmt.Errorf("it is %v, %v", v, found)
		}
		return nil
	})
	if err := s.registries["westeurope"].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.arrives("team/app:2", late, "westeurope")
	s.until("the lag to be gone", func() error {
		samples := s.scrape()
		for _, name := range []string{"portolan_replicator_pending", "portolan_replicator_lag_seconds"} {
			if v, found := value(t, samples, name, `region="westeurope"`); !found || v != 0 {
				return fmt.Errorf("%s is %v, %v", name, v, found)
			}
		}
		return nil
	})

	// Every name is documented.
	root, err := bed.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "docs", "metrics.md"))
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, name := range regexp.MustCompile(`\bportolan_[a-z_]+`).FindAllString(string(text), -1) {
		documented[name] = true
	}
	for sample := range s.scrape() {
		name, _, _ := strings.Cut(sample, "{")
		for _, suffix := range []string{"_bucket", "_sum", "_count"} {
			if base, ok := strings.CutSuffix(name, suffix); ok && documented[base] {
				name = base
			}
		}
		if strings.HasPrefix(name, "portolan_") && !documented[name] {
			t.Errorf("%s is not in docs/metrics.md", name)
			documented[name] = true // once
		}
	}
}

// A server that is told to end amid a large copy ends soon, in order and with exit code 0, answers names until then, and the copy is
// completed after the next start.
func TestEndAmidACopy(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	link := s.thin("westeurope", 0)
	config := s.config("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	p := start(t, s.path("portolan"), config)
	s.until("the server to be up", func() error {
		if code, text := s.get("/readyz"); code != http.StatusOK {
			return errors.New(text)
		}
		return nil
	})
	s.ready("westus", "westeurope")
	if err := link.Set(bed.Conditions{Bandwidth: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	const size = 48 << 20
	before := link.Traffic().Up
	digest := s.push("westus", "team/large:1", size, 1)
	s.until("the copy to be under way", func() error {
		if n := link.Traffic().Up - before; n < 2<<20 {
			return fmt.Errorf("%d bytes of it", n)
		}
		return nil
	})
	began := time.Now()
	code := p.stop()
	took := time.Since(began)
	t.Logf("amid a copy of %d MiB over 1 MiB/s the server ended %v after SIGTERM", size>>20, took.Round(time.Millisecond))
	// The daemon's own bound is 20 s for copies and 5 s for each other part.
	if code != 0 || took > 40*time.Second {
		t.Errorf("it ended with %d after %v: %s", code, took, p.stderr())
	}
	if log := p.stderr(); !strings.Contains(log, `"msg":"ended in order"`) {
		t.Errorf("the log does not say that it ended in order: %s", log)
	}
	if err := s.has("westeurope", "team/large:1", ""); err != nil {
		t.Fatalf("it was there already: %v", err)
	}
	cut := link.Traffic().Up - before
	if err := link.Set(bed.Conditions{}); err != nil {
		t.Fatal(err)
	}
	p = start(t, s.path("portolan"), config)
	s.arrives("team/large:1", digest, "westeurope")
	t.Logf("%d MiB had passed before the end, %d MiB passed in all", cut>>20, (link.Traffic().Up-before)>>20)
	if code := p.stop(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
}

// SIGHUP reads static records and location databases again; what cannot be used leaves what was good, and is told. Meanwhile every query
// is answered, the first time that it is asked.
func TestReload(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	database := s.path("city.mmdb")
	locate := func(country string, latitude, longitude float64) {
		t.Helper()
		tree, err := mmdbwriter.New(mmdbwriter.Options{DatabaseType: "GeoLite2-City", IncludeReservedNetworks: true})
		if err != nil {
			t.Fatal(err)
		}
		_, network, err := net.ParseCIDR("193.0.0.0/16")
		if err != nil {
			t.Fatal(err)
		}
		err = tree.Insert(network, mmdbtype.Map{
			"continent": mmdbtype.Map{"code": mmdbtype.String("EU")},
			"country":   mmdbtype.Map{"iso_code": mmdbtype.String(country)},
			"location":  mmdbtype.Map{"latitude": mmdbtype.Float64(latitude), "longitude": mmdbtype.Float64(longitude)},
		})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(database + ".new")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tree.WriteTo(f); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Close(), os.Rename(database+".new", database)); err != nil {
			t.Fatal(err)
		}
	}
	locate("NL", 52.4, 4.9)
	zone := s.write("zone.db", "www IN A 192.0.2.1\n")
	server := func() *bed.Portolan {
		config := strings.Replace(s.config("geo: {database: "+database+"}", "topology: "+s.write("topology.yaml", s.topology("westus", "westeurope"))), "  contact:", "  static: "+zone+"\n  contact:", 1)
		return bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("portolan"), Config: config, API: s.api})
	}()
	s.ready("westus", "westeurope")
	s.leads(europe, "westeurope")
	www := func(want string) {
		t.Helper()
		s.until("www to be "+want, func() error {
			if a := s.dig("www.geo.example.net", "A"); !slices.Equal(a.data("A"), []string{want}) {
				return errors.New(a.text)
			}
			return nil
		})
	}
	reload := func() {
		t.Helper()
		if err := server.Signal(syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	www("192.0.2.1")
	asked := s.asking(2)
	s.write("zone.db", "www IN A 192.0.2.2\nmail IN MX 10 www\n")
	locate("US", 37.8, -122.4)
	reload()
	www("192.0.2.2")
	s.leads(europe, "westus")

	s.write("zone.db", "www IN A nonsense\n")
	if err := os.WriteFile(database+".bad", []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(database+".bad", database); err != nil {
		t.Fatal(err)
	}
	reload()
	s.until("the status to tell of both", func() error {
		var st status
		if err := s.read(&st, "status"); err != nil {
			return err
		}
		text := strings.Join(st.Warnings, "\n")
		if !st.Ready || !strings.Contains(text, "zone.db") || !strings.Contains(text, "city.mmdb") {
			return fmt.Errorf("%+v", st)
		}
		return nil
	})
	www("192.0.2.2")
	s.leads(europe, "westus")
	s.write("zone.db", "www IN A 192.0.2.3\n")
	locate("NL", 52.4, 4.9)
	reload()
	www("192.0.2.3")
	s.leads(europe, "westeurope")
	s.until("the warnings to be gone", func() error {
		var st status
		if err := s.read(&st, "status"); err != nil || len(st.Warnings) == 0 {
			return err
		}
		return fmt.Errorf("%+v", st)
	})
	if n, err := asked(); err != nil {
		t.Errorf("of %d queries amid all this: %v", n, err)
	} else {
		t.Logf("%d queries were answered meanwhile", n)
	}
}

// The log is JSON where nobody looks on, one object a line with level, time and message; and it holds no secret, at the level that
// says most, whatever goes wrong.
func TestLogs(t *testing.T) {
	t.Parallel()
	const password, wrong, apiToken = "correct-horse-battery", "incorrect-donkey-staple", "0123456789abcdef-api-token"
	secured := func(c *bed.RegistryConfig) { c.Users = map[string]string{"mirror": password} }
	s := newScene(t, westus.with(secured), westeurope.with(secured))
	topology := strings.ReplaceAll(s.topology("westus", "westeurope"), "{region: westus,", "{region: westus, credentials: \"env:WEST\",")
	topology = strings.ReplaceAll(topology, "{region: westeurope,", "{region: westeurope, credentials: \"file:"+s.write("login", "mirror:"+wrong)+"\",")
	config := s.config("log: {level: debug}", "topology: "+s.write("topology.yaml", topology))
	config = strings.Replace(config, `api: {listen: "`+s.api+`"}`, `api: {listen: "`+s.api+`", token_file: `+s.write("api.token", apiToken)+`}`, 1)
	server := bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("portolan"), Config: config, API: s.api, Env: []string{"WEST=mirror:" + password}})

	// The API wants its token now.
	if o := s.cli("replica", "list"); o.code != 1 || !strings.Contains(o.stderr, "--token-file") {
		t.Errorf("without the token:\n%v", o)
	}
	with := func(args ...string) outcome {
		return s.cli(append(args, "--token-file", s.path("api.token"))...)
	}
	replicaIs := func(region, status string) {
		t.Helper()
		s.until(region+" to be "+status, func() error {
			o := with("replica", "show", "contoso/"+region, "-o", "json")
			var r replica
			if err := json.Unmarshal([]byte(o.stdout), &r); err != nil {
				return fmt.Errorf("%v: %w", o, err)
			}
			if status != "" && r.Status != status || status == "" && !strings.Contains(r.Reason, "not authorized") {
				return fmt.Errorf("it is %+v", r)
			}
			return nil
		})
	}
	replicaIs("westus", "Ready")
	replicaIs("westeurope", "") // its credentials are wrong
	s.write("login", "mirror:"+password)
	replicaIs("westeurope", "Ready")
	digest := s.push("westus", "team/app:1", 16<<10, 2)
	s.arrives("team/app:1", digest, "westeurope")
	shown := ""
	for _, args := range [][]string{{"export"}, {"status", "-o", "json"}, {"registry", "list", "-o", "json"}, {"check", "contoso"}} {
		o := with(args...)
		shown += o.stdout + o.stderr
	}
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+s.api+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	if code, text := answered(request); code != http.StatusUnauthorized {
		t.Errorf("/metrics without the token: %d %s", code, text)
	}
	request.Header.Set("Authorization", "Bearer "+apiToken)
	if code, text := answered(request); code != http.StatusOK {
		t.Errorf("/metrics: %d %s", code, text)
	} else {
		shown += text
	}
	if err := server.Stop(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(server.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	basic := func(password string) string { return base64.StdEncoding.EncodeToString([]byte("mirror:" + password)) }
	for what, secret := range map[string]string{
		"a password": password, "a wrong password": wrong, "a password, encoded": basic(password), "a wrong password, encoded": basic(wrong),
		"the API's token": apiToken, "an event token": s.key.Token("contoso", "westus"), "another event token": s.key.Token("contoso", "westeurope"),
	} {
		if strings.Contains(string(text), secret) {
			t.Errorf("%s is in the log", what)
		}
		if strings.Contains(shown, secret) {
			t.Errorf("%s is in what commands or /metrics show", what)
		}
	}
	if !strings.Contains(string(text), `"level":"debug"`) {
		t.Error("nothing was logged at level debug, so little was looked at")
	}
	lines := bufio.NewScanner(strings.NewReader(string(text)))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct {
			Level string    `json:"level"`
			Time  time.Time `json:"time"`
			Msg   string    `json:"msg"`
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil || line.Level == "" || line.Time.IsZero() || line.Msg == "" {
			t.Errorf("no JSON line of a log: %v: %s", err, lines.Text())
		}
	}
	if err := lines.Err(); err != nil {
		t.Fatal(err)
	}
}

// Alive and ready are two things; both say why not, and neither needs a token.
func TestHealthAndReadiness(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus)
	s.serve("topology: " + s.write("topology.yaml", s.topology("westus")))
	for path, want := range map[string]string{"/healthz": "", "/readyz": "ready"} {
		if code, text := s.get(path); code != http.StatusOK || !strings.Contains(text, want) {
			t.Errorf("%s: %d %s", path, code, text)
		}
	}
	// A registry that is down makes nobody unready: what clients get is the policy's.
	s.registries["westus"].Kill()
	s.until("the registry to be seen down", func() error {
		r, err := s.replica("westus")
		if err == nil && r.Health != "Unhealthy" {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	if code, text := s.get("/readyz"); code != http.StatusOK {
		t.Errorf("/readyz with its registry down: %d %s", code, text)
	}
	s.leads(america, "westus") // policy all_down: nearest
}
