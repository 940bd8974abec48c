package e2e

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"portolan/test/bed"
)

// rounds is how often something is killed.
func rounds() int {
	if os.Getenv("PORTOLAN_LONG") != "" {
		return 100
	}
	return 6
}

// seed is the randomness of a test, which its log names.
func seed(t *testing.T) *rand.Rand {
	t.Helper()
	n := rand.Uint64()
	t.Logf("the random moments are of seed %d", n)
	return rand.New(rand.NewPCG(n, 0))
}

// fill puts 20 images in some repositories into the first region, with layers of their own and layers in common.
func (s *scene) fill() map[string]string {
	s.t.Helper()
	want := map[string]string{}
	base := image(s.t, 96<<10, 2)
	for i := range 20 {
		l, err := random.Layer(48<<10, types.OCIUncompressedLayer)
		if err != nil {
			s.t.Fatal(err)
		}
		img, err := mutate.AppendLayers(base, l)
		if err != nil {
			s.t.Fatal(err)
		}
		tag := fmt.Sprintf("team/r%d:%d", i%6, i)
		if err := s.put(s.sites[0].region, tag, img); err != nil {
			s.t.Fatal(err)
		}
		want[tag] = digestOf(s.t, img)
	}
	return want
}

// converged waits until every replica has exactly these tags, each of the right digest and readable to the last byte.
func (s *scene) converged(want map[string]string) {
	s.t.Helper()
	s.ready(s.regions()...)
	for _, region := range s.regions() {
		for tag, digest := range want {
			s.arrives(tag, digest, region)
		}
		got, expected := s.tags(region), slices.Sorted(maps.Keys(want))
		if !slices.Equal(got, expected) {
			s.t.Errorf("%s has the tags\n%v\nnot\n%v", region, got, expected)
		}
		r, err := s.replica(region)
		if err != nil || r.Replication.Conflicts != 0 || r.Replication.NotReplicable != 0 {
			s.t.Errorf("%s: %+v, %v", region, r, err)
		}
	}
}

// thin makes the link to a region thin, so that seeding it takes a while.
func (s *scene) thin(region string, bandwidth int64) *bed.Proxy {
	s.t.Helper()
	p := bed.NewProxy(s.t, s.registries[region].Addr())
	if err := p.Set(bed.Conditions{Latency: 2 * time.Millisecond, Bandwidth: bandwidth}); err != nil {
		s.t.Fatal(err)
	}
	s.links[region] = p.Addr()
	return p
}

// The one process is killed at random moments while it seeds an empty replica and users push. All that was pushed is everywhere in
// the end, as it was pushed.
func TestKillsOfTheProcessWhileSeeding(t *testing.T) {
	t.Parallel()
	random := seed(t)
	s := newScene(t, westus, westeurope.with(debian))
	want := s.fill()
	link := s.thin("westeurope", 200<<10)
	config := s.config("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	dir := s.path("portolan")

	amid := 0
	for round := range rounds() {
		p := start(t, dir, config)
		moment := time.NewTimer(time.Duration(random.IntN(1200)) * time.Millisecond)
		// A push in each region, and a tag that moves: at random moments too, some of them while nobody listens.
		for _, region := range s.regions() {
			tag := fmt.Sprintf("team/%s:%d", region, round)
			want[tag] = s.push(region, tag, 2048, 2)
			moving := "team/" + region + ":moving"
			want[moving] = s.push(region, moving, 2048, 2)
		}
		<-moment.C
		if err := p.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		p.wait()
		if log := p.stderr(); strings.Contains(log, "refused an event message") {
			t.Errorf("round %d: a registry's own events were refused:\n%s", round, log)
		}
		if n := len(s.tags("westeurope")); n < len(want) {
			amid++
		}
	}
	t.Logf("%d of %d kills came before all was there", amid, rounds())
	if amid == 0 {
		t.Error("no kill came amid the seeding, so nothing was tested")
	}
	if err := link.Set(bed.Conditions{}); err != nil {
		t.Fatal(err)
	}
	last := start(t, dir, config)
	s.converged(want)
	if code := last.stop(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
	if log := last.stderr(); strings.Contains(log, "panic") || strings.Contains(log, "a fault of the program") {
		t.Errorf("a fault:\n%s", log)
	}
}

// A process that is killed in the middle of a large blob goes on with it when it is started again: the source is read again from the
// last checkpoint only. One that ends in order leaves no upload behind.
func TestKillInTheMiddleOfABlob(t *testing.T) {
	t.Parallel()
	const size, chunk, bandwidth = 48 << 20, 4 << 20, 16 << 20
	s := newScene(t, westus, westeurope)
	img := image(t, size, 1)
	if err := s.put("westus", "team/large:1", img); err != nil {
		t.Fatal(err)
	}
	source := s.thin("westus", bandwidth)
	config := s.config("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	dir := s.path("portolan")
	pattern := filepath.Join(s.registries["westeurope"].Storage(), "docker/registry/v2/repositories/team/large/_uploads/*/data")
	// uploaded is how many bytes the upload under way has, all uploads together.
	uploaded := func() (n int64) {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if info, err := os.Stat(f); err == nil {
				n += info.Size()
			}
		}
		return n
	}
	half := func() {
		t.Helper()
		s.until("half of the blob to be there", func() error {
			if n := uploaded(); n < size/2 {
				return fmt.Errorf("%d bytes are", n)
			}
			return nil
		})
	}

	p := start(t, dir, config)
	half()
	if err := p.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	p.wait()
	p = start(t, dir, config)
	s.arrives("team/large:1", digestOf(t, img), "westeurope")
	read := source.Traffic().Down
	t.Logf("%d bytes were read of a blob of %d", read, size)
	if read > size+2*chunk { // the bytes since a checkpoint, and what the killed process had been sent and had not passed on
		t.Errorf("%d bytes were read of a blob of %d", read, size)
	}

	next := image(t, size, 1)
	if err := s.put("westus", "team/large:2", next); err != nil {
		t.Fatal(err)
	}
	half()
	if code := p.stop(); code != 0 {
		t.Errorf("it ended with %d", code)
	}
	if n := uploaded(); n != 0 {
		t.Errorf("an upload of %d bytes was left behind", n)
	}
	start(t, dir, config)
	s.arrives("team/large:2", digestOf(t, next), "westeurope")
}

// The same with the registries killed, source and target, while they are read and written.
func TestKillsOfRegistriesWhileSeeding(t *testing.T) {
	t.Parallel()
	random := seed(t)
	s := newScene(t, westus, westeurope, southeastasia.with(debian))
	want := s.fill()
	thin := []*bed.Proxy{s.thin("westeurope", 600<<10), s.thin("southeastasia", 600<<10)}
	s.serve("topology: " + s.write("topology.yaml", s.topology(s.regions()...)))

	for range rounds() {
		time.Sleep(time.Duration(random.IntN(600)) * time.Millisecond) // the random moment
		r := s.registries[s.regions()[random.IntN(3)]]
		r.Kill()
		time.Sleep(time.Duration(random.IntN(300)) * time.Millisecond)
		if err := r.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	n := len(s.tags("southeastasia"))
	t.Logf("after the last kill southeastasia had %d of %d tags", n, len(want))
	for i, p := range thin {
		if err := p.Set(bed.Conditions{}); err != nil {
			t.Fatal(err)
		}
		region := s.regions()[i]
		tag := "team/after:" + region
		want[tag] = s.push(region, tag, 4096, 2)
	}
	s.converged(want)
}

// While nobody listens a tag moves several times in one region. The scan of the next start finds where it stands; the events of the
// moves come after that, late and in any order. They are history: nothing goes back, and nothing is taken for a conflict.
func TestEventsOfMovesThatAScanHasFound(t *testing.T) {
	t.Parallel()
	s := newScene(t, westus, westeurope)
	link := bed.NewProxy(t, s.events)
	err := s.registries["westus"].Reconfigure(t.Context(), func(c *bed.RegistryConfig) {
		c.Notify = []bed.Notification{{URL: "http://" + link.Addr() + "/events/contoso/westus", Token: s.key.Token("contoso", "westus"), Backoff: 100 * time.Millisecond}}
	})
	if err != nil {
		t.Fatal(err)
	}
	server := s.serve("topology: " + s.write("topology.yaml", s.topology("westus", "westeurope")))
	s.ready(s.regions()...)
	first := s.push("westus", "team/app:moving", 2048, 1)
	s.arrives("team/app:moving", first, "westeurope")
	received := func() (n int) {
		t.Helper()
		for name, value := range s.scrape() {
			if strings.HasPrefix(name, "portolan_events_received_total{") && strings.Contains(name, `region="westus"`) && strings.Contains(name, `"push"`) {
				count, err := strconv.Atoi(value)
				if err != nil {
					t.Fatal(err)
				}
				n += count
			}
		}
		return n
	}
	for range 3 {
		if err := server.Stop(); err != nil {
			t.Fatal(err)
		}
		if err := link.Set(bed.Conditions{Refuse: true}); err != nil {
			t.Fatal(err)
		}
		last := ""
		for range 4 {
			last = s.push("westus", "team/app:moving", 2048, 1)
		}
		if err := server.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.arrives("team/app:moving", last, "westeurope")
		before := received()
		if err := link.Set(bed.Conditions{}); err != nil {
			t.Fatal(err)
		}
		s.until("the events of the moves", func() error {
			if n := received() - before; n < 4 {
				return fmt.Errorf("%d came", n)
			}
			return nil
		})
		s.decided()
		s.converged(map[string]string{"team/app:moving": last})
	}
}

// decided waits until every event that came was decided.
func (s *scene) decided() {
	s.t.Helper()
	s.until("all events to be decided", func() error {
		if n, _ := value(s.t, s.scrape(), "portolan_events_spool_items"); n != 0 {
			return fmt.Errorf("the spool holds %v", n)
		}
		return nil
	})
}
