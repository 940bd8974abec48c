package e2e

import (
	"fmt"
	"os"
	"os/user"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"portolan/test/bed"
)

// TestPort53WithoutRoot: what root starts answers at port 53 as an ordinary user, with the right to bind it and no other.
func TestPort53WithoutRoot(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 || runtime.GOOS != "linux" {
		t.Skip("only root on Linux can become somebody else")
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip(err)
	}
	s := newScene(t)
	if s.dir, err = os.MkdirTemp("", "portolan-user"); err != nil { // a test's own folder is for root alone
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(s.dir) })
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	s.api, s.dns = bed.NewAddress(t, "127.0.0.1"), "127.53.0.53:53"
	uid, _ := strconv.Atoi(nobody.Uid)
	gid, _ := strconv.Atoi(nobody.Gid)
	if err := os.Mkdir(s.path("portolan"), 0o755); err != nil {
		t.Fatal(err)
	}
	topology := s.write("topology.yaml", worldwide)
	if err := os.Chmod(topology, 0o644); err != nil {
		t.Fatal(err)
	}
	p := bed.NewPortolan(t, bed.PortolanConfig{Dir: s.path("portolan"), API: s.api, Config: fmt.Sprintf(`store: bolt:data/portolan.db
user: nobody
dns: {listen: ["%s"], zone: geo.example.net, nameservers: {ns1: [127.0.0.1]}, contact: hostmaster@example.net}
api: {listen: "%s"}
topology: %s
`, s.dns, s.api, topology)})
	if a := s.dig(oneName, "A", "+subnet="+america); a.status != "NOERROR" || len(a.data("A")) != 1 {
		t.Error(a.text)
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	if err != nil {
		t.Fatal(err)
	}
	who := make(map[string]string)
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		who[name] = strings.Join(strings.Fields(value), " ")
	}
	ids := func(id int) string { return strings.Trim(strings.Repeat(strconv.Itoa(id)+" ", 4), " ") }
	const bindService = "0000000000000400" // CAP_NET_BIND_SERVICE is bit 10
	for name, want := range map[string]string{"Uid": ids(uid), "Gid": ids(gid), "CapEff": bindService, "CapPrm": bindService, "CapInh": strings.Repeat("0", 16)} {
		if who[name] != want {
			t.Errorf("%s is %s, want %s", name, who[name], want)
		}
	}
	if info, err := os.Stat(s.path("portolan/data/portolan.db")); err != nil || info.Sys().(*syscall.Stat_t).Uid != uint32(uid) {
		t.Errorf("the data belongs to %+v, %v", info, err)
	}
}
