package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	miekg "github.com/miekg/dns"

	"portolan/replicator/events"
	"portolan/test/bed"
)

const (
	oneName = "contoso.geo.example.net"
	api     = "127.0.0.1:8420"
	notify  = "127.0.0.1:8421"
	server  = "127.0.0.1:5300"
	// port53 is where a resolver asks, who knows no other port; only root may listen there.
	port53 = "127.0.9.53"
	// patience is how long a step may take before it counts as not happening.
	patience = 30 * time.Second
)

// place is a region of the scene.
type place struct{ region, city, address string }

var places = []place{
	{"westus", "California", "127.0.1.1"},
	{"westeurope", "Netherlands", "127.0.2.1"},
	{"southeastasia", "Singapore", "127.0.3.1"},
}

func (p place) host() string { return p.address + ":5000" }

// scene is what the demo starts, and what it knows of it.
type scene struct {
	dir   string
	out   printer
	all   map[string]*bed.Registry
	serve *bed.Portolan
	// standard tells that DNS also answers on port 53, so that an ordinary client can resolve the name.
	standard bool
	// pushed is the digest of the image of the push.
	pushed string
}

func (s *scene) close() {
	if s.serve != nil {
		_ = s.serve.Close()
	}
	for _, r := range s.all {
		_ = r.Close()
	}
}

// logs says where things went wrong.
func (s *scene) logs() error {
	if s.serve == nil {
		return nil
	}
	return fmt.Errorf("the end of portolan's log:\n%s", s.serve.LogTail())
}

func (s *scene) tries() []string {
	return []string{
		"bin/portolan replica list contoso",
		"bin/portolan explain contoso --ecs 193.0.6.0/24",
		"dig @127.0.0.1 -p 5300 " + oneName + " +subnet=133.11.0.0/24 +short",
		"dig @127.0.0.1 -p 5300 whoami." + oneName + " TXT +short",
		"bin/crane copy --insecure 127.0.1.1:5000/team/web:1.0 127.0.3.1:5000/team/mine:1 && bin/portolan wait contoso/team/mine:1",
	}
}

// registries starts three registries; two hold images already, and disagree on one tag.
func (s *scene) registries(ctx context.Context) error {
	key, err := events.LoadKey(filepath.Join(s.dir, "events.key"))
	if err != nil {
		return err
	}
	s.all = make(map[string]*bed.Registry)
	for _, p := range places {
		r, err := bed.StartRegistry(ctx, bed.RegistryConfig{
			Dir: filepath.Join(s.dir, p.region), Listen: p.host(), Cache: true,
			Notify: []bed.Notification{{URL: "http://" + notify + "/events/contoso/" + p.region, Token: key.Token("contoso", p.region)}},
		})
		if err != nil {
			return err
		}
		s.all[p.region] = r
		s.out.say(fmt.Sprintf("  %-14s http://%s  CNCF distribution 3.1.2, in %s", p.region, p.host(), p.city))
	}
	shared, err := random.Image(64<<10, 3)
	if err != nil {
		return err
	}
	for _, image := range []struct{ region, name string }{
		{"westus", "team/api:1.0"}, {"westus", "team/api:1.1"}, {"westus", "team/app:latest"}, {"westus", "base/linux:12"},
		{"westeurope", "team/app:latest"}, {"westeurope", "tools/lint:3"}, {"westeurope", "base/linux:12"},
	} {
		img := shared
		if image.name != "base/linux:12" {
			layer, err := random.Layer(32<<10, "application/vnd.docker.image.rootfs.diff.tar.gzip")
			if err != nil {
				return err
			}
			if img, err = mutate.AppendLayers(shared, layer); err != nil {
				return err
			}
		}
		ref, err := s.ref(image.region, image.name)
		if err != nil {
			return err
		}
		if err := remote.Write(ref, img, remote.WithContext(ctx)); err != nil {
			return err
		}
	}
	s.out.say("  westus holds 4 images, westeurope 3, southeastasia none. team/app:latest is in two regions, and not the same.")
	return nil
}

func (s *scene) ref(region, image string) (name.Reference, error) {
	return name.ParseReference(s.all[region].Addr()+"/"+image, name.Insecure)
}

// portolan starts the server with the embedded store.
func (s *scene) portolan(ctx context.Context) error {
	listen := `"` + server + `"`
	if l, err := net.ListenPacket("udp", port53+":53"); err == nil {
		_ = l.Close()
		s.standard = true
		listen += `, "` + port53 + `:53"`
	}
	var replicas strings.Builder
	for _, p := range places {
		fmt.Fprintf(&replicas, "      - {region: %s, endpoint: \"http://%s\", addresses: [%s]}\n", p.region, p.host(), p.address)
	}
	topology := filepath.Join(s.dir, "topology.yaml")
	text := "registries:\n  - name: contoso\n    home: westus\n    replicas:\n" + replicas.String()
	if err := os.WriteFile(topology, []byte(text), 0o600); err != nil {
		return err
	}
	config := fmt.Sprintf(`store: bolt:%[1]s/portolan.db
dns:
  listen: [%[2]s]
  zone: geo.example.net
  nameservers: {ns1: [127.0.0.1]}
  contact: hostmaster@example.net
  ttl: {min: 1s, max: 2s}
api:
  listen: %[3]s
events:
  listen: %[4]s
  key: %[1]s/events.key
health:
  interval: 500ms
topology: topology.yaml
`, s.dir, listen, api, notify)
	var err error
	s.serve, err = bed.StartPortolan(ctx, bed.PortolanConfig{Dir: s.dir, Config: config, API: api})
	if err != nil {
		return err
	}
	s.out.shell("bin/portolan serve --config portolan.yaml   (embedded store, DNS on " + strings.ReplaceAll(listen, `"`, "") + ")")
	return nil
}

// baseline shows the plan, accepts it, and shows what became of it.
func (s *scene) baseline(ctx context.Context) error {
	err := s.until(ctx, "westeurope to have a plan", func() (bool, error) {
		r, err := s.replica(ctx, "westeurope")
		return err == nil && r.Replication.Phase == "planned", err
	})
	if err != nil {
		return err
	}
	if err := s.show(ctx, "replica", "show", "contoso/westeurope"); err != nil {
		return err
	}
	if err := s.show(ctx, "replica", "accept", "contoso/westeurope"); err != nil {
		return err
	}
	if err := s.ready(ctx); err != nil {
		return err
	}
	if err := s.show(ctx, "replica", "list", "contoso"); err != nil {
		return err
	}
	s.out.say("  Every image is in every region now; the version of team/app:latest that lost is kept under a tag of its own:")
	out, err := s.tool(ctx, "crane", "ls", "--insecure", "127.0.3.1:5000/team/app")
	if err != nil {
		return err
	}
	s.out.shell("crane ls --insecure 127.0.3.1:5000/team/app")
	s.out.quote(out)
	if !strings.Contains(out, "latest.conflict-westeurope-1") {
		return fmt.Errorf("southeastasia should hold team/app:latest.conflict-westeurope-1, and has %q", out)
	}
	return nil
}

// push pushes an index of two platforms with crane, and takes the time until it is pullable elsewhere.
func (s *scene) push(ctx context.Context) error {
	path := filepath.Join(s.dir, "web")
	index, err := webImage()
	if err != nil {
		return err
	}
	if _, err := layout.Write(path, mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index})); err != nil {
		return err
	}
	const image = "/team/web:1.0"
	target := s.all["southeastasia"].Addr() + image
	if _, err := s.tool(ctx, "crane", "push", "--insecure", path, target); err != nil {
		return err
	}
	pushed := time.Now()
	s.out.shell("crane push --insecure ./web " + target)
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	s.pushed = digest.String()
	for _, p := range []place{places[0], places[1]} {
		ref, err := s.ref(p.region, "team/web:1.0")
		if err != nil {
			return err
		}
		err = s.until(ctx, "team/web:1.0 to be in "+p.region, func() (bool, error) {
			d, err := remote.Head(ref, remote.WithContext(ctx))
			return err == nil && d.Digest == digest, nil
		})
		if err != nil {
			return err
		}
		s.out.say(fmt.Sprintf("  in %-14s %4d ms after the push was acknowledged in southeastasia", p.region, time.Since(pushed).Milliseconds()))
	}
	return s.show(ctx, "wait", "contoso"+image)
}

// webImage is an index of two platforms.
func webImage() (v1.ImageIndex, error) {
	index := v1.ImageIndex(empty.Index)
	for _, architecture := range []string{"amd64", "arm64"} {
		img, err := random.Image(256<<10, 4)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: architecture}}})
	}
	return index, nil
}

// clients of four continents, by networks that the built-in table of countries knows.
var clients = []struct{ where, subnet string }{
	{"North America (US)", "8.8.8.0/24"},
	{"Europe (NL)", "193.0.6.0/24"},
	{"Asia (JP)", "133.11.0.0/24"},
	{"South America (BR)", "200.160.0.0/24"},
}

func (s *scene) continents(ctx context.Context) error {
	got := make(map[string]bool)
	for _, c := range clients {
		p, scope, err := s.dig(ctx, c.subnet)
		if err != nil {
			return err
		}
		got[p.region] = true
		s.out.say(fmt.Sprintf("  %-20s dig %s +subnet=%-15s %s  %-14s valid for /%d", c.where, oneName, c.subnet, p.address, p.region, scope))
	}
	if len(got) != len(places) {
		return fmt.Errorf("these clients should see all %d regions, and saw %d", len(places), len(got))
	}
	return s.show(ctx, "explain", "contoso", "--ecs", clients[1].subnet)
}

// dig asks the one name as a client of a subnet, with the real dig.
func (s *scene) dig(ctx context.Context, subnet string) (place, int, error) {
	out, err := s.tool(ctx, "dig", "@127.0.0.1", "-p", "5300", oneName, "A", "+subnet="+subnet, "+noall", "+answer", "+comments", "+tries=1", "+time=2")
	if err != nil {
		return place{}, 0, err
	}
	scope := 0
	for line := range strings.Lines(out) {
		if _, rest, ok := strings.Cut(line, "CLIENT-SUBNET: "); ok {
			parts := strings.Split(strings.TrimSpace(rest), "/")
			_, _ = fmt.Sscan(parts[len(parts)-1], &scope)
		}
		f := strings.Fields(line)
		if len(f) == 5 && f[3] == "A" {
			for _, p := range places {
				if p.address == f[4] {
					return p, scope, nil
				}
			}
		}
	}
	return place{}, 0, fmt.Errorf("dig gave no address of a replica:\n%s", out)
}

// pull pulls through the one name, with a resolver file of its own where the machine allows.
func (s *scene) pull(ctx context.Context) error {
	const image = oneName + ":5000/team/web:1.0"
	tar := filepath.Join(s.dir, "web.tar")
	defer os.Remove(tar)
	crane, err := bed.Tool("crane")
	if err != nil {
		return err
	}
	if why := s.private(ctx); why != "" {
		s.out.say("  A resolver file of the client's own is not possible here (" + why + "), so dig resolves the name:")
		p, _, err := s.dig(ctx, clients[0].subnet)
		if err != nil {
			return err
		}
		s.out.shell("crane pull --insecure " + p.host() + "/team/web:1.0 web.tar")
		_, err = s.tool(ctx, "crane", "pull", "--insecure", p.host()+"/team/web:1.0", tar)
		return err
	}
	resolv := filepath.Join(s.dir, "resolv.conf")
	if err := os.WriteFile(resolv, []byte("nameserver "+port53+"\noptions timeout:1 attempts:3\n"), 0o644); err != nil {
		return err
	}
	script := `mount --bind "$1" /etc/resolv.conf && exec "$2" pull --insecure "$3" "$4"`
	s.out.shell("crane pull --insecure " + image + " web.tar   (in a mount namespace whose /etc/resolv.conf names Portolan)")
	if _, err := command(ctx, "unshare", "--mount", "sh", "-c", script, "sh", resolv, crane, image, tar); err != nil {
		return err
	}
	info, err := os.Stat(tar)
	if err != nil {
		return err
	}
	s.out.say(fmt.Sprintf("  pulled: %d bytes", info.Size()))
	return nil
}

// private says why a client cannot have a resolver file of its own; empty if it can.
func (s *scene) private(ctx context.Context) string {
	if !s.standard {
		return "port 53 of " + port53 + " cannot be used"
	}
	if _, err := command(ctx, "unshare", "--mount", "true"); err != nil {
		return "no mount namespace: " + strings.TrimSpace(err.Error())
	}
	return ""
}

// fail stops the home region's registry and waits for its clients to be led elsewhere.
func (s *scene) fail(ctx context.Context) error {
	if err := s.all["westus"].Stop(); err != nil {
		return err
	}
	stopped := time.Now()
	s.out.say("  westus is stopped.")
	var to place
	err := s.until(ctx, "clients of westus to be led elsewhere", func() (bool, error) {
		p, _, err := s.dig(ctx, clients[0].subnet)
		to = p
		return p.region != "westus", err
	})
	if err != nil {
		return err
	}
	s.out.say(fmt.Sprintf("  %.1f s later %s gets %s, %s", time.Since(stopped).Seconds(), clients[0].where, to.address, to.region))
	if err := s.pull(ctx); err != nil {
		return err
	}
	from, renamed := places[1].host()+"/team/web:1.0", places[1].host()+"/team/web:1.1"
	if _, err := s.tool(ctx, "crane", "copy", "--insecure", from, renamed); err != nil {
		return err
	}
	s.out.say("  Meanwhile somebody pushes:")
	s.out.shell("crane copy --insecure " + from + " " + renamed)
	err = s.until(ctx, "the push to wait for westus", func() (bool, error) {
		r, err := s.replica(ctx, "westus")
		return err == nil && r.Replication.Pending > 0 && r.Health == "Unhealthy", err
	})
	if err != nil {
		return err
	}
	return s.show(ctx, "replica", "list", "contoso")
}

func (s *scene) recover(ctx context.Context) error {
	if err := s.all["westus"].Restart(ctx); err != nil {
		return err
	}
	started := time.Now()
	err := s.until(ctx, "clients to be led back to westus", func() (bool, error) {
		p, _, err := s.dig(ctx, clients[0].subnet)
		return p.region == "westus", err
	})
	if err != nil {
		return err
	}
	s.out.say(fmt.Sprintf("  westus is back; %.1f s later %s gets it again", time.Since(started).Seconds(), clients[0].where))
	ref, err := s.ref("westus", "team/web:1.1")
	if err != nil {
		return err
	}
	err = s.until(ctx, "the push that it missed to be in westus", func() (bool, error) {
		d, err := remote.Head(ref, remote.WithContext(ctx))
		return err == nil && d.Digest.String() == s.pushed, nil
	})
	if err != nil {
		return err
	}
	s.out.say(fmt.Sprintf("  and %.1f s after its start it has team/web:1.1, which was pushed while it was away", time.Since(started).Seconds()))
	return s.ready(ctx)
}

// cells is how many clients are asked for: the /24s of an American /12.
const cells = 4096

// weight sets a weight with the CLI and counts the clients that move.
func (s *scene) weight(ctx context.Context) error {
	before, err := s.survey()
	if err != nil {
		return err
	}
	if err := s.show(ctx, "replica", "update", "contoso/westus", "--weight", "90"); err != nil {
		return err
	}
	var after []string
	err = s.until(ctx, "clients to move", func() (bool, error) {
		after, err = s.survey()
		return !slices.Equal(before, after), err
	})
	if err != nil {
		return err
	}
	if after, err = s.survey(); err != nil { // again: the edit may have come amid the last survey
		return err
	}
	moved, from := make(map[string]int), 0
	for i := range before {
		if before[i] == "westus" {
			from++
		}
		if before[i] != after[i] {
			moved[before[i]+" to "+after[i]]++
		}
	}
	for way, n := range moved {
		s.out.say(fmt.Sprintf("  of %d client networks of westus, %d (%.1f %%) moved from %s, and always will", from, n, 100*float64(n)/float64(from), way))
		if !strings.HasPrefix(way, "westus to ") || n < from*8/100 || n > from*12/100 {
			return fmt.Errorf("a tenth of westus's clients should move, and nobody else's: %v", moved)
		}
	}
	return nil
}

// survey asks for the region of many client networks.
func (s *scene) survey() ([]string, error) {
	c := miekg.Client{Timeout: 2 * time.Second}
	conn, err := c.Dial(server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	regions := make([]string, cells)
	for i := range regions {
		q := new(miekg.Msg).SetQuestion(oneName+".", miekg.TypeA)
		q.SetEdns0(1232, false)
		q.IsEdns0().Option = append(q.IsEdns0().Option, &miekg.EDNS0_SUBNET{Code: miekg.EDNS0SUBNET, Family: 1, SourceNetmask: 24,
			Address: net.IPv4(12, byte(i>>8), byte(i), 0)}) // 12.0.0.0/8 is one American network
		a, _, err := c.ExchangeWithConn(q, conn)
		if err != nil {
			return nil, err
		}
		if len(a.Answer) == 0 {
			return nil, errors.New("an answer is empty")
		}
		address, _ := netip.AddrFromSlice(a.Answer[0].(*miekg.A).A.To4())
		at := slices.IndexFunc(places, func(p place) bool { return p.address == address.String() })
		if at < 0 {
			return nil, fmt.Errorf("%s is no replica", address)
		}
		regions[i] = places[at].region
	}
	return regions, nil
}

// replicaState is what the demo reads of `portolan replica show -o json`.
type replicaState struct {
	Region      string `json:"region"`
	Status      string `json:"status"`
	Health      string `json:"health"`
	Replication struct {
		Phase   string `json:"phase"`
		Pending int    `json:"pending"`
	} `json:"replication"`
}

func (s *scene) replica(ctx context.Context, region string) (replicaState, error) {
	var r replicaState
	out, err := s.tool(ctx, "portolan", "replica", "show", "contoso/"+region, "-o", "json")
	if err == nil {
		err = json.Unmarshal([]byte(out), &r)
	}
	return r, err
}

// ready waits until every replica is Ready.
func (s *scene) ready(ctx context.Context) error {
	for _, p := range places {
		err := s.until(ctx, p.region+" to be Ready", func() (bool, error) {
			r, err := s.replica(ctx, p.region)
			return r.Status == "Ready", err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// until waits for a condition; an error of it counts only if it is the last.
func (s *scene) until(ctx context.Context, what string, condition func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		ok, err := condition()
		if ok {
			return nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-s.serve.Exited():
			return errors.New("portolan ended")
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited %s in vain for %s", patience, what), err)
		}
	}
}

// show runs a portolan command and shows it with what it prints.
func (s *scene) show(ctx context.Context, args ...string) error {
	s.out.shell("bin/portolan " + strings.Join(args, " "))
	out, err := s.tool(ctx, "portolan", args...)
	s.out.quote(out)
	return err
}

// tool runs one of the tools and returns its output.
func (s *scene) tool(ctx context.Context, tool string, args ...string) (string, error) {
	path, err := bed.Tool(tool)
	if err != nil {
		return "", err
	}
	return command(ctx, path, args...)
}

func command(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	c := exec.CommandContext(ctx, path, args...)
	c.Stdout, c.Stderr = &stdout, &stderr
	if err := c.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s %s: %w\n%s", filepath.Base(path), strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// printer writes for people.
type printer struct{ color bool }

func (p printer) title(text string) {
	if p.color {
		text = "\x1b[1m" + text + "\x1b[0m"
	}
	fmt.Printf("\n%s\n", text)
}

func (p printer) say(text string) { fmt.Println(text) }

func (p printer) shell(text string) {
	if p.color {
		fmt.Printf("  \x1b[36m$ %s\x1b[0m\n", text)
		return
	}
	fmt.Printf("  $ %s\n", text)
}

func (p printer) quote(text string) {
	for line := range strings.Lines(text) {
		fmt.Printf("    %s\n", strings.TrimRight(line, "\n"))
	}
}
