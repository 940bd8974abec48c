package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"portolan/test/bed"
)

var debian = func(c *bed.RegistryConfig) { c.Server = bed.DistributionV2 }

// multiArch is an OCI index of two platforms.
func multiArch(t *testing.T) v1.ImageIndex {
	t.Helper()
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, architecture := range []string{"amd64", "arm64"} {
		img := image(t, 64<<10, 3)
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}}})
	}
	return index
}

// image is an OCI image that every client takes as it is.
func image(t *testing.T, size int64, layers int) v1.Image {
	t.Helper()
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	for range layers {
		l, err := random.Layer(size, types.OCIUncompressedLayer)
		if err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return img
}

// The whole way of one process on one machine: registries that somebody runs and that differ, a topology applied, the baseline
// accepted, pushes with the public clients, a pipeline that waits, and what the list says.
func TestPushesOfPublicClientsReachEveryRegion(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope, southeastasia.with(debian))
	home, other := s.push("westus", "team/app:latest", 4096, 2), s.push("westeurope", "team/app:latest", 4096, 2)
	tool := s.push("westeurope", "tools/lint:3", 4096, 2)
	s.serve()
	all := s.regions()
	s.must("apply", "-f", s.write("topology.yaml", s.topology(all...)))

	// The plan has a conflict: nothing is written there until it is accepted.
	s.until("westeurope to have a plan", func() error {
		r, err := s.replica("westeurope")
		if err == nil && r.Replication.Phase != "planned" {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	if o := s.cli("replica", "wait", "contoso/westeurope"); o.code != 1 || !strings.Contains(o.stderr, "portolan replica accept contoso/westeurope") || !strings.Contains(o.stderr, "team/app:latest") {
		t.Errorf("waiting for a replica that waits for an operator should end with what to do:\n%v", o)
	}
	if err := s.has("westeurope", "team/app:latest", other); err != nil {
		t.Errorf("something was written before the plan was accepted: %v", err)
	}
	s.must("replica", "accept", "contoso/westeurope")
	s.must("replica", "wait", "contoso/westeurope", "--timeout", "90s")
	s.ready(all...)
	s.arrives("team/app:latest", home, all...)
	s.arrives("team/app:latest.conflict-westeurope-1", other, all...)
	s.arrives("tools/lint:3", tool, all...)

	// crane pushes an index of two platforms into one region.
	index := multiArch(t)
	dir := s.path("web")
	if _, err := layout.Write(dir, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})); err != nil {
		t.Fatal(err)
	}
	web := digestOf(t, index)
	s.tool("crane", "push", "--insecure", dir, s.registries["westus"].Addr()+"/team/web:1.0")
	if out := strings.TrimSpace(s.must("wait", "contoso/team/web:1.0", "--timeout", "90s")); out != web {
		t.Errorf("wait should print %s, and printed %q", web, out)
	}
	// wait has returned: it is everywhere now, not soon.
	for _, region := range all {
		if err := s.has(region, "team/web:1.0", web); err != nil {
			t.Errorf("wait returned too early: %v", err)
		}
	}

	// skopeo copies from one region's registry into another's, under another name.
	s.tool("skopeo", "--insecure-policy", "copy", "--all", "--src-tls-verify=false", "--dest-tls-verify=false",
		"docker://"+s.registries["westus"].Addr()+"/team/web:1.0", "docker://"+s.registries["southeastasia"].Addr()+"/mirror/web:copied")
	copied := strings.TrimSpace(s.tool("crane", "digest", "--insecure", s.registries["southeastasia"].Addr()+"/mirror/web:copied"))
	if out := strings.TrimSpace(s.must("wait", "contoso/mirror/web:copied@"+copied, "--timeout", "90s")); out != copied {
		t.Errorf("wait with a digest should print %s, and printed %q", copied, out)
	}
	// And from a directory of its own.
	one := image(t, 32<<10, 2)
	oci := s.path("one")
	if path, err := layout.Write(oci, empty.Index); err != nil {
		t.Fatal(err)
	} else if err := path.AppendImage(one, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "one"})); err != nil {
		t.Fatal(err)
	}
	s.tool("skopeo", "--insecure-policy", "copy", "--preserve-digests", "--dest-tls-verify=false", "oci:"+oci+":one", "docker://"+s.registries["westeurope"].Addr()+"/team/one:1")
	s.must("wait", "contoso/team/one:1", "--timeout", "90s")
	for _, region := range all {
		for image, digest := range map[string]string{"mirror/web:copied": copied, "team/one:1": digestOf(t, one)} {
			if err := s.has(region, image, digest); err != nil {
				t.Error(err)
			}
		}
	}

	// What can never become true is told at once, or when the time is over.
	never := s.cli("wait", "contoso/team/one:1@"+web, "--timeout", "60s")
	if never.code != 1 || !strings.Contains(never.stderr, "nor among the versions that are remembered of it") {
		t.Errorf("waiting for a digest that the tag never had:\n%v", never)
	}
	if o := s.cli("wait", "contoso/no/such:1", "--timeout", "1s"); o.code != 1 || !strings.Contains(o.stderr, "no/such:1 exists nowhere yet") {
		t.Errorf("waiting for what exists nowhere:\n%v", o)
	}

	s.ready(all...)
	for _, tag := range s.tags("southeastasia") {
		if strings.Contains(tag, ".conflict-") && tag != "team/app:latest.conflict-westeurope-1" {
			t.Errorf("a conflict that was none: %s", tag)
		}
	}
	var list []replica
	if err := s.read(&list, "replica", "list", "contoso"); err != nil {
		t.Fatal(err)
	}
	if len(list) != 3 {
		t.Fatalf("the list should have 3 replicas: %+v", list)
	}
	for _, r := range list {
		if r.Registry != "contoso" || r.Status != "Ready" || r.Health != "Healthy" || r.Routing != "enabled" || r.Weight == nil || *r.Weight != 100 ||
			r.Pending == nil || *r.Pending != 0 || r.Home != (r.Region == "westus") || len(r.Addresses) != 1 || r.Endpoint == "" || r.Reason != "" {
			t.Errorf("listed as %+v", r)
		}
	}
	table := s.must("replica", "list", "contoso")
	for _, word := range []string{"STATUS", "HEALTH", "ROUTING", "WEIGHT", "PENDING", "westus", "westeurope", "southeastasia"} {
		if !strings.Contains(table, word) {
			t.Errorf("the table lacks %q:\n%s", word, table)
		}
	}

	// What an operator puts into a registry's configuration is what the listener accepts.
	var token struct{ URL, Token string }
	if err := s.read(&token, "events", "token", "contoso/westus"); err != nil {
		t.Fatal(err)
	}
	if token.Token != s.key.Token("contoso", "westus") || token.URL != "http://"+s.events+"/events/contoso/westus" {
		t.Errorf("the token is for %q, and equal %v", token.URL, token.Token == s.key.Token("contoso", "westus"))
	}
}

// podman pushes into one region and pulls from another.
func TestPodman(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("podman")
	if err != nil {
		t.Skip("podman is not installed")
	}
	s := newScene(t, westus, westeurope)
	s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready("westus", "westeurope")
	podman := func(args ...string) outcome {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), path, append([]string{"--root", s.path("storage"), "--runroot", s.path("run"), "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs",
			"--tmpdir", s.path("tmp")}, args...)...)
		return finish(t, cmd)
	}
	if o := podman("info"); o.code != 0 {
		t.Skipf("podman does not run here: %s", strings.TrimSpace(o.stderr))
	}
	img := image(t, 16<<10, 2)
	if err := s.put("westus", "team/base:1", img); err != nil {
		t.Fatal(err)
	}
	s.must("wait", "contoso/team/base:1", "--timeout", "90s")
	from, to := s.registries["westeurope"].Addr()+"/team/base:1", s.registries["westeurope"].Addr()+"/team/podman:1"
	if o := podman("pull", "--tls-verify=false", from); o.code != 0 {
		if strings.Contains(o.stderr, "operation not permitted") || strings.Contains(o.stderr, "lchown") {
			t.Skipf("podman cannot unpack an image here: %s", strings.TrimSpace(o.stderr))
		}
		t.Fatal(o)
	}
	if o := podman("push", "--tls-verify=false", from, to); o.code != 0 {
		t.Fatal(o)
	}
	digest := strings.TrimSpace(s.must("wait", "contoso/team/podman:1", "--timeout", "90s"))
	for _, region := range s.regions() {
		if err := s.has(region, "team/podman:1", digest); err != nil {
			t.Error(err)
		}
	}
}

// What dig gets: every kind of answer that belongs somewhere.
func TestAnswersToDig(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope, southeastasia.with(debian))
	s.serve("topology: " + s.write("topology.yaml", s.topology(s.regions()...)))
	s.ready(s.regions()...)

	for subnet, region := range map[string]string{america: "westus", europe: "westeurope", asia: "southeastasia"} {
		s.leads(subnet, region)
		a := s.dig(oneName, "A", "+subnet="+subnet)
		if a.status != "NOERROR" || !strings.Contains(a.flags, "aa") || len(a.answer) != 1 || a.answer[0].name != oneName+"." {
			t.Errorf("an answer to %s:\n%s", subnet, a.text)
		}
		if ttl, err := strconv.Atoi(a.answer[0].ttl); err != nil || ttl < 1 || ttl > 2 {
			t.Errorf("the TTL is %q, not of dns.ttl", a.answer[0].ttl)
		}
		scope, ok := strings.CutPrefix(a.subnet, subnet+"/")
		if bits, err := strconv.Atoi(scope); !ok || err != nil || bits < 1 || bits > 24 {
			t.Errorf("the subnet comes back as %q, asked was %s", a.subnet, subnet)
		}
	}
	tests := []struct {
		name   string
		ask    []string
		status string
		kind   string
		data   []string
		soa    bool
	}{
		{"the one name over TCP", []string{oneName, "A", "+tcp", "+subnet=" + europe}, "NOERROR", "A", []string{"127.0.2.1"}, false},
		{"a region without IPv6", []string{oneName, "AAAA", "+subnet=" + europe}, "NOERROR", "AAAA", nil, true},
		{"an HTTPS query", []string{oneName, "HTTPS"}, "NOERROR", "HTTPS", nil, true},
		{"the zone's SOA", []string{"geo.example.net", "SOA"}, "NOERROR", "SOA", nil, false},
		{"the zone's NS", []string{"geo.example.net", "NS"}, "NOERROR", "NS", []string{"ns1.geo.example.net."}, false},
		{"a name server's address", []string{"ns1.geo.example.net", "A"}, "NOERROR", "A", []string{"127.0.0.1"}, false},
		{"a regional name, from elsewhere", []string{"southeastasia." + oneName, "A", "+subnet=" + europe}, "NOERROR", "A", []string{"127.0.3.1"}, false},
		{"a regional name without IPv6", []string{"westus." + oneName, "AAAA"}, "NOERROR", "AAAA", nil, true},
		{"no such registry", []string{"fabrikam.geo.example.net", "A"}, "NXDOMAIN", "A", nil, true},
		{"no such region", []string{"eastus." + oneName, "A"}, "NXDOMAIN", "A", nil, true},
		{"off the zone", []string{"www.example.org", "A"}, "REFUSED", "A", nil, false},
		{"above the zone", []string{"example.net", "A"}, "REFUSED", "A", nil, false},
		{"upper case", []string{"CONTOSO.GEO.example.NET", "A", "+subnet=" + asia}, "NOERROR", "A", []string{"127.0.3.1"}, false},
	}
	for _, test := range tests {
		a := s.dig(test.ask...)
		if a.status != test.status || test.data != nil && !slices.Equal(a.data(test.kind), test.data) || test.soa && (len(a.answer) > 0 || len(a.authority) != 1 || a.authority[0].kind != "SOA") {
			t.Errorf("%s:\n%s", test.name, a.text)
		}
	}
	if soa := s.dig("geo.example.net", "SOA"); len(soa.answer) != 1 || !strings.HasPrefix(soa.answer[0].data, "ns1.geo.example.net. hostmaster.example.net. ") {
		t.Errorf("the SOA is not what was configured:\n%s", soa.text)
	}
	if a := s.dig("www.example.org", "A"); !strings.Contains(a.text, "EDE: 20") {
		t.Errorf("REFUSED should carry extended error 20:\n%s", a.text)
	}
	if a := s.dig("geo.example.net", "SOA", "+subnet="+europe); a.subnet != europe+"/0" {
		t.Errorf("the scope of what is the same for all is %q, not 0", a.subnet)
	}
	if a := s.dig(oneName, "A", "+subnet=0.0.0.0/0"); !strings.HasSuffix(a.subnet, "/0/0") {
		t.Errorf("who asks to be unknown gets the subnet %q:\n%s", a.subnet, a.text)
	}
	if a := s.dig(oneName, "A"); a.subnet != "" {
		t.Errorf("a subnet is volunteered: %q", a.subnet)
	}
	whoami := s.dig("whoami."+oneName, "TXT", "+subnet="+europe)
	text := strings.Join(whoami.data("TXT"), " ")
	for _, part := range []string{`"registry=contoso"`, `"subnet=` + europe + `"`, `"region=westeurope"`, `"transport=udp"`, `"resolver=127.0.0.1"`} {
		if !strings.Contains(text, part) {
			t.Errorf("whoami lacks %s:\n%s", part, whoami.text)
		}
	}
	if len(whoami.answer) == 0 || whoami.answer[0].ttl != "0" {
		t.Errorf("whoami is about one query:\n%s", whoami.text)
	}

	// The explanation is of the same decision.
	var e struct {
		Region string `json:"region"`
		Scope  int    `json:"scope"`
	}
	if err := s.read(&e, "explain", "contoso", "--ecs", europe); err != nil {
		t.Fatal(err)
	}
	if a := s.dig(oneName, "A", "+subnet="+europe); e.Region != "westeurope" || a.subnet != fmt.Sprintf("%s/%d", europe, e.Scope) {
		t.Errorf("explained is %+v, answered:\n%s", e, a.text)
	}
}

// A client that knows one name pulls through it; a region that fails leaves the answers, and comes back to them; a weight moves
// its share of client networks and no others.
func TestAnswersFollowWhatHappens(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope, southeastasia.with(debian))
	// Where resolvers ask, who know no other port; an address that nobody else uses.
	resolver := fmt.Sprintf("127.%d.%d.53", 100+os.Getpid()%100, os.Getpid()/100%250)
	why := ""
	if l, err := net.ListenPacket("udp", resolver+":53"); err != nil {
		why = err.Error()
		resolver = ""
	} else if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	config := s.config("topology: " + s.write("topology.yaml", s.topology(s.regions()...)))
	if resolver != "" {
		config = strings.Replace(config, `listen: ["`+s.dns+`"]`, `listen: ["`+s.dns+`", "`+resolver+`:53"]`, 1)
	}
	bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("portolan"), Config: config, API: s.api})
	s.ready(s.regions()...)
	img := image(t, 128<<10, 3)
	if err := s.put("southeastasia", "team/web:1.0", img); err != nil {
		t.Fatal(err)
	}
	s.must("wait", "contoso/team/web:1.0", "--timeout", "90s")

	pull := func(step string) {
		t.Helper()
		if resolver == "" {
			t.Logf("%s: no pull through the one name here: %s", step, why)
			return
		}
		if o := finish(t, exec.CommandContext(t.Context(), "unshare", "--mount", "true")); o.code != 0 {
			t.Logf("%s: no pull through the one name here: %s", step, strings.TrimSpace(o.stderr))
			return
		}
		crane, err := bed.Tool("crane")
		if err != nil {
			t.Fatal(err)
		}
		tar := s.path("pulled.tar")
		resolv := s.write("resolv.conf", "nameserver "+resolver+"\noptions timeout:1 attempts:3\n")
		if err := os.Chmod(resolv, 0o644); err != nil {
			t.Fatal(err)
		}
		script := `mount --bind "$1" /etc/resolv.conf && exec "$2" pull --insecure "$3" "$4"`
		cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "sh", "-c", script, "sh", resolv, crane, oneName+":"+s.port+"/team/web:1.0", tar)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir}
		if o := finish(t, cmd); o.code != 0 {
			t.Fatalf("%s: pulling through the one name:\n%v", step, o)
		}
		info, err := os.Stat(tar)
		if err != nil || info.Size() < 3*128<<10 {
			t.Fatalf("%s: what was pulled is not whole: %v, %v", step, info, err)
		}
		if err := os.Remove(tar); err != nil {
			t.Fatal(err)
		}
	}
	s.leads(america, "westus")
	s.leads(europe, "westeurope")
	pull("all up")

	s.registries["westus"].Kill()
	s.until("america to be led elsewhere", func() error {
		got, err := s.led(america)
		if err == nil && got == "westus" {
			err = fmt.Errorf("it is still led to %s", got)
		}
		return err
	})
	s.until("the list to say so", func() error {
		r, err := s.replica("westus")
		if err == nil && (r.Health != "Unhealthy" || r.Reason == "") {
			err = fmt.Errorf("it is %+v", r)
		}
		return err
	})
	if a := s.dig("westus."+oneName, "A"); !slices.Equal(a.data("A"), []string{"127.0.1.1"}) {
		t.Errorf("a pinned region heeds no health:\n%s", a.text)
	}
	s.leads(europe, "westeurope")
	pull("westus is down")
	// What is pushed meanwhile arrives there later.
	late := s.push("westeurope", "team/late:1", 4096, 2)
	s.arrives("team/late:1", late, "southeastasia")
	if err := s.registries["westus"].Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.leads(america, "westus")
	s.arrives("team/late:1", late, "westus")
	s.ready(s.regions()...)
	pull("westus is back")

	// Half of its networks move to the next replica, and only its own.
	survey := func() map[string]string {
		t.Helper()
		led := map[string]string{}
		for i := range 400 {
			subnet := fmt.Sprintf("12.%d.%d.0/24", i%200, i/2)
			region, err := s.ask(s.dns, subnet)
			if err != nil {
				t.Fatal(err)
			}
			led[subnet] = region
		}
		return led
	}
	before := survey()
	if out := s.must("replica", "update", "contoso/westus", "--weight", "50"); !strings.Contains(out, "50") {
		t.Errorf("the shares that result are not printed:\n%s", out)
	}
	differ := func() (from []string) {
		for subnet, region := range survey() {
			if region != before[subnet] {
				from = append(from, before[subnet])
			}
		}
		return from
	}
	s.until("networks to move", func() error {
		if len(differ()) == 0 {
			return fmt.Errorf("none did")
		}
		return nil
	})
	moved := differ() // again: the edit may have come amid the last survey
	for _, from := range moved {
		if from != "westus" {
			t.Errorf("a network moved away from %s", from)
		}
	}
	if len(moved) < 140 || len(moved) > 260 {
		t.Errorf("of 400 networks of westus %d moved; about 200 should", len(moved))
	}
	s.must("replica", "update", "contoso/westus", "--weight", "0")
	s.leads("12.0.0.0/24", "westeurope")
	s.must("replica", "update", "contoso/westus", "--weight", "100")
	s.leads("12.0.0.0/24", "westus")
	s.must("replica", "update", "contoso/westus", "--routing", "disabled")
	s.leads("12.0.0.0/24", "westeurope")
	s.must("replica", "update", "contoso/westus", "--routing", "enabled")
	s.leads("12.0.0.0/24", "westus")
}

// The example configurations are read, and the topology they come with.
func TestExampleConfigurations(t *testing.T) {
	t.Parallel()
	root, err := bed.Root()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(root, "configs", "*.yaml"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no examples: %v", err)
	}
	for _, file := range files {
		if filepath.Base(file) == "topology.yaml" {
			continue // applied below
		}
		if o := run(t, nil, "portolan", "serve", "--check", "--config", file); o.code != 0 {
			t.Error(o)
		}
	}
	s := newScene(t)
	s.serve("topology: " + filepath.Join(root, "configs", "topology.yaml"))
	if out := s.must("export", "-o", "json"); !json.Valid([]byte(out)) || !strings.Contains(out, "registry.westeurope.contoso.internal") {
		t.Errorf("the example topology is not what is exported:\n%s", out)
	}
	if o := s.cli("diff", "-f", filepath.Join(root, "configs", "topology.yaml")); o.code != 0 {
		t.Errorf("it differs from itself:\n%v", o)
	}
}
