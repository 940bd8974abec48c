package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"portolan/test/bed"
)

// complaint checks that a command ended with that exit code, and that its error says all of these, and shows nobody the inside of
// the program.
func complaint(t *testing.T, o outcome, code int, says ...string) {
	t.Helper()
	if o.code != code {
		t.Errorf("the exit code should be %d:\n%v", code, o)
	}
	for _, part := range says {
		if !strings.Contains(o.stderr, part) {
			t.Errorf("the error should say %q:\n%v", part, o)
		}
	}
	for _, inside := range []string{"goroutine ", "panic", ".go:", "0x", "%!"} {
		if strings.Contains(o.stderr, inside) || strings.Contains(o.stdout, inside) {
			t.Errorf("the error shows the inside of the program (%q):\n%v", inside, o)
		}
	}
	if code != 0 && len(o.stderr) > 4096 {
		t.Errorf("the error is %d bytes long:\n%.1000s", len(o.stderr), o)
	}
}

// attempt starts a server that should not start, and waits for its end.
func attempt(t *testing.T, dir, config string, args ...string) outcome {
	t.Helper()
	p := start(t, dir, config, args...)
	code := p.wait()
	return outcome{line: "portolan serve " + strings.Join(args, " "), stderr: p.stderr(), code: code}
}

// Faults of portolan.yaml: each is named with line, column, what is wrong and what would be right, and nothing is started.
func TestFaultsOfTheConfiguration(t *testing.T) {
	t.Parallel()
	s := &scene{t: t, dir: t.TempDir(), events: bed.NewAddress(t, "127.0.0.1")}
	good := s.config() // 10 lines, the last one ended
	tests := []struct {
		name   string
		config string
		says   []string
	}{
		{"a key that there is not", good + "colour: blue\n", []string{"portolan.yaml:11:1", "colour"}},
		{"a misspelt key", strings.Replace(good, "  zone:", "  zoen:", 1), []string{"portolan.yaml:4:3", "zoen", "zone"}},
		{"a misspelt key inside braces", strings.Replace(good, "interval:", "intervall:", 1), []string{"portolan.yaml:10:10", "intervall", "interval"}},
		{"a bad address", strings.Replace(good, "{ns1: [127.0.0.1]}", "{ns1: [127.0.0.1.5]}", 1), []string{"portolan.yaml:5:", "127.0.0.1.5"}},
		{"a bad duration", strings.Replace(good, "300ms", "soon", 1), []string{"portolan.yaml:10:", "soon"}},
		{"a value out of range", good + "replication: {copies: 1000}\n", []string{"portolan.yaml:11:", "1000", "64"}},
		{"no YAML", "store: [bolt\n", []string{"portolan.yaml"}},
		{"a key twice", good + "log: {level: info}\nlog: {level: debug}\n", []string{"portolan.yaml:12:1", "log"}},
		{"a role that there is not", good + "roles: [dsn]\n", []string{"portolan.yaml:11:", "dsn", "dns"}},
		{"a store that there is not", strings.Replace(good, "bolt:portolan.db", "redis://127.0.0.1", 1), []string{"portolan.yaml:1:8", "redis", "bolt:", "consul://"}},
		{"one role on a bolt file", good + "roles: [dns]\n", []string{"portolan.yaml:", "Consul"}},
		{"the API off loopback without a token", strings.Replace(good, `api: {listen: "127.0.0.1:`, `api: {listen: "0.0.0.0:`, 1), []string{"portolan.yaml:8:", "api.listen", "token_file"}},
		{"events off loopback without TLS", strings.Replace(good, `events: {listen: "127.0.0.1:`, `events: {listen: "0.0.0.0:`, 1), []string{"portolan.yaml:9:", "events.listen", "TLS"}},
		{"no zone", strings.Replace(good, "  zone: geo.example.net\n", "", 1), []string{"portolan.yaml", "dns.zone", "is missing"}},
		{"an empty file", "", []string{"portolan.yaml", "dns.zone"}},
	}
	for i, test := range tests {
		o := attempt(t, s.path(fmt.Sprint(i)), test.config)
		complaint(t, o, 1, test.says...)
	}
	complaint(t, run(t, nil, "portolan", "serve", "--config", s.path("none.yaml")), 2, "none.yaml", "--config")
}

// What the configuration names and is not there, cannot be read, or belongs to somebody else.
func TestWhatAServerNeedsIsNotThere(t *testing.T) {
	t.Parallel()
	s := &scene{t: t, dir: t.TempDir(), events: bed.NewAddress(t, "127.0.0.1")}
	good := s.config()
	garbage := s.write("garbage.mmdb", strings.Repeat("this is no database ", 1000))
	if err := os.WriteFile(s.path("garbage.db"), bytes.Repeat([]byte("no store"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := func(name string) string { return s.path(name) }

	complaint(t, attempt(t, dir("1"), good+"geo: {database: none.mmdb}\n"), 1, "none.mmdb", "no such file")
	complaint(t, attempt(t, dir("2"), good+"geo: {database: "+garbage+"}\n"), 1, garbage)
	complaint(t, attempt(t, dir("3"), good+"geo: {asn: "+garbage+"}\n"), 1, garbage)
	complaint(t, attempt(t, dir("4"), good+"geo: {database: "+s.dir+"}\n"), 1, s.dir)
	complaint(t, attempt(t, dir("5"), strings.Replace(good, "bolt:portolan.db", "bolt:"+s.path("garbage.db"), 1)), 1, s.path("garbage.db"))
	complaint(t, attempt(t, dir("6"), good+"topology: none.yaml\n"), 1, "none.yaml", "no such file")
	complaint(t, attempt(t, dir("7"), strings.Replace(good, "  contact:", "  static: none.db\n  contact:", 1)), 1, "none.db", "no such file")
	zone := s.write("bad.db", "www IN A 192.0.2.1\nmail IN A 192.0.2.999\n")
	complaint(t, attempt(t, dir("8"), strings.Replace(good, "  contact:", "  static: "+zone+"\n  contact:", 1)), 1, "bad.db", "2")
	key := s.write("open.key", strings.Repeat("a", 64)+"\n")
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	complaint(t, attempt(t, dir("9"), strings.Replace(good, s.path("events.key"), key, 1)), 1, "open.key", "0600")
	complaint(t, attempt(t, dir("10"), strings.Replace(good, `"}`, `", token_file: none.token}`, 1)), 1, "api.token_file", "none.token")

	// Ports that somebody has.
	busy := func(network, address string) (close func() error) {
		t.Helper()
		if network == "udp" {
			l, err := net.ListenPacket(network, address)
			if err != nil {
				t.Fatal(err)
			}
			return l.Close
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		return l.Close
	}
	for i, test := range []struct{ network, address, setting string }{
		{"udp", s.dns, "dns.listen"}, {"tcp", s.dns, "dns.listen"}, {"tcp", s.api, "api.listen"}, {"tcp", s.events, "events.listen"},
	} {
		release := busy(test.network, test.address)
		complaint(t, attempt(t, dir(fmt.Sprint("busy", i)), good), 1, test.setting, test.address, "in use", "ss -l")
		if err := release(); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := strings.Replace(good, s.api, "203.0.113.7:8420", 1)
	complaint(t, attempt(t, dir("elsewhere"), strings.Replace(elsewhere, `"}`, `", token_file: `+s.write("token", strings.Repeat("s3cret", 6))+`}`, 1)), 1, "api.listen", "203.0.113.7:8420")

	// A store that another portolan has: the second one says so and ends, the first one goes on.
	p := bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("first"), Config: good, API: s.api})
	other := &scene{t: t, dir: s.dir, events: bed.NewAddress(t, "127.0.0.1")}
	config := strings.Replace(other.config(), "bolt:portolan.db", "bolt:"+filepath.Join(s.path("first"), "portolan.db"), 1)
	complaint(t, attempt(t, dir("second"), config), 1, "portolan.db", "in use by another process")
	if code, text := s.get("/readyz"); !p.Running() || code != http.StatusOK {
		t.Errorf("the first one does not go on: %d %s", code, text)
	}
}

// Faults of topology.yaml, by apply, diff and at the start.
func TestFaultsOfTheTopology(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	s.serve()
	good := s.topology("westus", "westeurope")
	replica := func(text string) string {
		return strings.Replace(good, "region: westeurope,", "region: westeurope, "+text+",", 1)
	}
	tests := []struct {
		name string
		text string
		says []string
	}{
		{"a key that there is not", good + "colour: blue\n", []string{"colour", ":7:1"}},
		{"a misspelt key", strings.Replace(good, "    home:", "    hoem:", 1), []string{"hoem", "home", ":3:5"}},
		{"a misspelt key of a replica", strings.Replace(good, "addresses", "adresses", 1), []string{"adresses", "addresses", ":5:"}},
		{"a bad address", strings.Replace(good, "addresses: [127.0.2.1]", "addresses: [127.0.2.999]", 1), []string{"127.0.2.999", ":6:"}},
		{"a weight of 101", replica("weight: 101"), []string{"101", "100", ":6:"}},
		{"a weight below 0", replica("weight: -1"), []string{"-1", ":6:"}},
		{"a bad location", replica("location: [91, 0]"), []string{"91", ":6:"}},
		{"a region twice", strings.Replace(good, "region: westeurope", "region: westus", 1), []string{"westus", ":6:"}},
		{"two registries of one name", good + strings.TrimPrefix(good, "registries:\n"), []string{"contoso", ":7:"}},
		{"a home that is no replica", strings.Replace(good, "home: westus", "home: eastus", 1), []string{"eastus", ":3:"}},
		{"a reserved name", strings.Replace(good, "name: contoso", "name: ns1", 1), []string{"ns1", "reserved"}}, // the server knows
		{"no label", strings.Replace(good, "name: contoso", "name: Contoso_1", 1), []string{"Contoso_1", ":2:"}},
		{"an endpoint that is no URL", strings.Replace(good, "http://127.0.2.1", "ftp://127.0.2.1", 1), []string{"endpoint", "http://", ":6:"}},
		{"an endpoint with a password", strings.Replace(good, "http://127.0.2.1", "http://u:h1dden@127.0.2.1", 1), []string{"credentials", ":6:"}},
		{"a misspelt region without a location", strings.Replace(good, "region: westeurope", "region: westeurpe", 1), []string{"westeurpe", "westeurope", "location"}},
		{"no YAML", "registries: [\n", []string{"topology.yaml:1:"}},
	}
	for _, test := range tests {
		file := s.write("topology.yaml", test.text)
		o := s.cli("apply", "-f", file)
		complaint(t, o, 1, test.says...)
		if strings.Contains(o.stderr, "h1dden") {
			t.Errorf("a password is shown:\n%v", o)
		}
		if o := s.cli("diff", "-f", file); o.code != 2 || o.stderr == "" {
			t.Errorf("%s: diff takes it:\n%v", test.name, o)
		}
		if out := s.must("registry", "list", "-o", "json"); strings.TrimSpace(out) != "[]" {
			t.Fatalf("%s: something was applied: %s", test.name, out)
		}
	}
	// The same file at the start: the server does not start with it.
	other := &scene{t: t, dir: s.dir, events: bed.NewAddress(t, "127.0.0.1")}
	file := s.write("topology.yaml", replica("weight: 101"))
	complaint(t, attempt(t, s.path("other"), other.config("topology: "+file)), 1, "topology.yaml", ":6:", "101")

	// The same by flags.
	create := func(more ...string) []string {
		return append([]string{"registry", "create", "contoso", "--home", "westus", "--endpoint", "http://127.0.1.1:" + s.port, "--addresses", "127.0.1.1"}, more...)
	}
	complaint(t, s.cli(create("--weight", "101")...), 2, "--weight 101", "0 to 100")
	complaint(t, s.cli(create("--addresses", "127.0.0.999")...), 2, "127.0.0.999")
	complaint(t, s.cli(create("--location", "somewhere")...), 2, "--location", "latitude,longitude")
	s.must(create()...)
	complaint(t, s.cli(create()...), 1, "contoso", "already")
	complaint(t, s.cli("replica", "create", "contoso/westus", "--endpoint", "http://127.0.1.1:1", "--addresses", "127.0.1.1"), 1, "westus", "already")
	complaint(t, s.cli("replica", "update", "contoso/westus", "--weight", "101"), 2, "--weight 101")
	complaint(t, s.cli("replica", "update", "contoso/eastus", "--weight", "10"), 1, "eastus", "westus")
	complaint(t, s.cli("replica", "delete", "contoso/westus"), 1, "home", "westus")
	complaint(t, s.cli("replica", "delete", "contoso/westus", "--force"), 1, "home")
	complaint(t, s.cli("replica", "show", "fabrikam/westus"), 1, "fabrikam", "contoso")
}

// An endpoint that is no registry, one that is not there, one that wants a password: what the replica says.
func TestEndpointsThatAreNoRegistries(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope.with(func(c *bed.RegistryConfig) { c.Users = map[string]string{"mirror": "let me in"} }))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		fmt.Fprint(w, "<html>It works!</html>")
	}), ReadHeaderTimeout: time.Second}
	served := make(chan struct{})
	go func() { _ = web.Serve(listener); close(served) }()
	t.Cleanup(func() { _ = web.Shutdown(context.WithoutCancel(t.Context())); <-served })
	closed := bed.NewAddress(t, "127.0.0.1")

	s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	complaint(t, s.cli("replica", "create", "contoso/northeurope", "--endpoint", "http://"+listener.Addr().String(), "--addresses", "127.0.0.1"), 1,
		"northeurope", "not a registry", "text/html")
	// So does a file. One that was a registry when it was declared, or that is forced, says the same in its status.
	file := s.write("more.yaml", strings.Replace(s.topology("westus", "westeurope"), "replicas:\n",
		"replicas:\n      - {region: northeurope, endpoint: \"http://"+listener.Addr().String()+"\", addresses: [127.0.0.1]}\n", 1))
	complaint(t, s.cli("apply", "-f", file), 1, "northeurope", "not a registry", "text/html", "--force")
	s.must("apply", "-f", file, "--force")
	s.must("replica", "create", "contoso/eastasia", "--endpoint", "http://"+closed, "--addresses", "127.0.0.1", "--timeout", "0s")
	for region, says := range map[string][]string{
		"northeurope": {"is not a registry", "text/html"},
		"eastasia":    {"connection refused"},
		"westeurope":  {"not authorized"},
	} {
		s.until(region+" to say what is wrong", func() error {
			r, err := s.replica(region)
			if err != nil {
				return err
			}
			for _, part := range says {
				if !strings.Contains(r.Reason, part) {
					return fmt.Errorf("the reason should say %q: %+v", part, r)
				}
			}
			if r.Status == "Ready" {
				return fmt.Errorf("it is %+v", r)
			}
			t.Logf("%s: %s, %s: %s", region, r.Status, r.Health, r.Reason)
			return nil
		})
	}
	o := s.cli("check", "contoso")
	if o.code != 1 || !strings.Contains(o.stdout, "northeurope") {
		t.Errorf("the check should fail:\n%v", o)
	}
	t.Log(o)
	// The one that is well is not held up by the others.
	s.ready("westus")
	s.leads(europe, "westus")
}

// The command line used wrongly.
func TestWrongUse(t *testing.T) {
	t.Parallel()
	closed := bed.NewAddress(t, "127.0.0.1")
	portolan := func(args ...string) outcome {
		return run(t, []string{"PORTOLAN_API=http://" + closed}, "portolan", args...)
	}
	for _, test := range []struct {
		args []string
		says []string
	}{
		{[]string{"repilca", "list"}, []string{"repilca", "replica"}},
		{[]string{"replica", "lst"}, []string{"lst", "list"}},
		{[]string{"replica", "list", "--wide"}, []string{"--wide", "--help"}},
		{[]string{"replica", "show"}, []string{"portolan replica show REGISTRY/REGION"}},
		{[]string{"replica", "show", "contoso"}, []string{"contoso", "REGISTRY/REGION"}},
		{[]string{"replica", "update", "contoso/westus"}, []string{"--weight"}},
		{[]string{"replica", "update", "contoso/westus", "--weight", "many"}, []string{"many", "--weight"}},
		{[]string{"replica", "list", "-o", "xml"}, []string{"xml", "json"}},
		{[]string{"apply"}, []string{"-f"}},
		{[]string{"wait", "contoso"}, []string{"contoso", "REGISTRY/REPOSITORY:TAG"}},
		{[]string{"wait", "contoso/team/app:1", "--timeout", "never"}, []string{"never"}},
		{[]string{"explain", "contoso"}, []string{"--ecs", "--resolver"}},
		{[]string{"serve", "--role", "dsn"}, []string{"dsn", "dns"}},
		{[]string{"--api", "nonsense", "registry", "list"}, []string{"nonsense"}},
	} {
		complaint(t, portolan(test.args...), 2, test.says...)
	}
	complaint(t, portolan("apply", "-f", filepath.Join(t.TempDir(), "none.yaml")), 2, "none.yaml", "no such file")
	// Used rightly, but nobody is there.
	complaint(t, portolan("replica", "list"), 1, closed, "portolan serve")
	if o := portolan(); o.code != 0 || !strings.Contains(o.stdout, "Usage") {
		t.Errorf("portolan alone shows its help:\n%v", o)
	}
	if o := portolan("version"); o.code != 0 || !strings.HasPrefix(o.stdout, "portolan ") {
		t.Errorf("the version:\n%v", o)
	}
}

// The events listener believes nobody: the wrong token, the token of another replica, garbage, too much.
func TestForgedEvents(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	server := s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready("westus", "westeurope")
	digest := s.push("westus", "team/app:1", 4096, 2)
	s.arrives("team/app:1", digest, "westeurope")

	forged := `{"events":[{"id":"1","timestamp":"2026-01-02T03:04:05Z","action":"delete","target":{"repository":"team/app","tag":"1","digest":"` + digest + `"}}]}`
	const kind = "application/vnd.docker.distribution.events.v2+json"
	post := func(path, token, kind string, body []byte) (int, string) {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+s.events+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		if token != "" {
			request.Header.Set("Authorization", "Bearer "+token)
		}
		request.Header.Set("Content-Type", kind)
		return answered(request)
	}
	own, others := s.key.Token("contoso", "westus"), s.key.Token("contoso", "westeurope")
	for _, test := range []struct {
		name, path, token, kind string
		body                    []byte
		want                    int
	}{
		{"no token", "/events/contoso/westus", "", kind, []byte(forged), http.StatusUnauthorized},
		{"a wrong token", "/events/contoso/westus", strings.Repeat("a", len(own)), kind, []byte(forged), http.StatusUnauthorized},
		{"the token of another replica", "/events/contoso/westus", others, kind, []byte(forged), http.StatusUnauthorized},
		{"a replica that there is not", "/events/contoso/eastus", s.key.Token("contoso", "eastus"), kind, []byte(forged), http.StatusUnauthorized},
		{"garbage", "/events/contoso/westus", own, kind, []byte("\x00\xff{{{"), http.StatusBadRequest},
		{"an unknown kind", "/events/contoso/westus", own, "text/html", []byte("<html>"), http.StatusUnsupportedMediaType},
		{"far too much", "/events/contoso/westus", own, kind, bytes.Repeat([]byte(" "), 20<<20), http.StatusRequestEntityTooLarge},
		{"another path", "/", own, kind, []byte(forged), http.StatusNotFound},
		{"a delete that did not happen", "/events/contoso/westus", own, kind, []byte(forged), http.StatusAccepted},
	} {
		if code, text := post(test.path, test.token, test.kind, test.body); code != test.want && !(test.want == http.StatusRequestEntityTooLarge && code == 0) {
			t.Errorf("%s: %d %s, want %d", test.name, code, text, test.want)
		}
	}
	// Events are hints: what they say is looked at, and it is not so.
	after := s.push("westus", "team/app:2", 4096, 2)
	s.arrives("team/app:2", after, "westus", "westeurope")
	for _, region := range s.regions() {
		if err := s.has(region, "team/app:1", digest); err != nil {
			t.Errorf("a forged delete was believed: %v", err)
		}
	}
	log, err := os.ReadFile(server.LogPath())
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{own, others} {
		if bytes.Contains(log, []byte(secret)) {
			t.Error("a token is in the log")
		}
	}
}
