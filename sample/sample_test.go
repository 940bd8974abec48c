package sample

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"portolan/router"
)

func subnet(s string) router.Client { return router.Client{Subnet: netip.MustParsePrefix(s)} }
func resolver(s string) router.Client {
	return router.Client{Resolver: netip.MustParseAddr(s)}
}

func TestRead(t *testing.T) {
	t.Parallel()
	got, err := Read("f", strings.NewReader(`# of yesterday

203.0.113.9/24 17
  203.0.113.0/24
198.51.100.7	2
::ffff:198.51.100.7
2001:db8::/48 3`))
	if err != nil {
		t.Fatal(err)
	}
	want := Clients{subnet("203.0.113.0/24"): 18, resolver("198.51.100.7"): 3, subnet("2001:db8::/48"): 3}
	if !maps.Equal(got, want) {
		t.Errorf("read %v, want %v", got, want)
	}
	var text bytes.Buffer
	if err := Write(&text, got); err != nil {
		t.Fatal(err)
	}
	if want := "203.0.113.0/24 18\n2001:db8::/48 3\n198.51.100.7 3\n"; text.String() != want {
		t.Errorf("wrote %q, want %q", text.String(), want)
	}
	again, err := Read("f", &text)
	if err != nil || !maps.Equal(again, got) {
		t.Errorf("what was written is read as %v, %v", again, err)
	}
}

func TestReadFaults(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"no address":     {"203.0.113.0/24\n\nexample.net 3\n", `f:3: "example.net" is neither`},
		"everything":     {"0.0.0.0/0 3\n", `f:1: "0.0.0.0/0" is neither`},
		"zone":           {"fe80::1%eth0\n", `f:1: "fe80::1%eth0" is neither`},
		"no count":       {"203.0.113.0/24 many\n", `f:1: "many" is no count`},
		"zero":           {"203.0.113.0/24 0\n", `f:1: "0" is no count`},
		"negative":       {"203.0.113.0/24 -1\n", `f:1: "-1" is no count`},
		"three words":    {"203.0.113.0/24 1 x\n", `f:1: "203.0.113.0/24 1 x": want a network`},
		"sum":            {"203.0.113.0/24 9007199254740992\n1.2.3.4 1\n", "f:2: the counts add up to more than"},
		"long":           {"1.2.3.4\n" + strings.Repeat(" ", 2000) + "\n", "f:2: longer than 1024 bytes"},
		"all are told":   {"a\n1.2.3.4\nb\n", "f:1: \"a\" is neither a network, such as 203.0.113.0/24, nor an IP address\nf:3:"},
		"not all faults": {strings.Repeat("x\n", 100), "f:5: \"x\" is neither a network, such as 203.0.113.0/24, nor an IP address\nreading ended there"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Read("f", strings.NewReader(c.text))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// What is full forgets what is rare and keeps what is common.
func TestAdd(t *testing.T) {
	t.Parallel()
	c := Clients{}
	common := resolver("1.2.3.4")
	for i := range MaxClients * 3 / 2 {
		c.Add(common)
		c.Add(router.Client{Resolver: netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})})
		if len(c) > MaxClients {
			t.Fatalf("%d clients", len(c))
		}
	}
	if n := c[common]; n < MaxClients/2 || n > MaxClients {
		t.Errorf("the common one has a count of %d", n)
	}
}

// lines is a record without an end.
type lines struct{ n int }

func (l *lines) Read(b []byte) (int, error) {
	l.n++
	return copy(b, fmt.Sprintf("10.%d.%d.%d\n", l.n>>16&255, l.n>>8&255, l.n&255)), nil
}

// What does not end is not read to its end.
func TestReadIsBounded(t *testing.T) {
	t.Parallel()
	in := &lines{}
	_, err := Read("f", in)
	if want := fmt.Sprintf("f:%d: more than %d different clients", MaxClients+1, MaxClients); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want %q", err, want)
	}
	repeated := strings.Repeat("1.2.3.4\n", 3*MaxClients)
	if got, err := Read("f", strings.NewReader(repeated)); err != nil || got[resolver("1.2.3.4")] != 3*MaxClients {
		t.Errorf("lines of one client are no clients of their own: %v, %v", got, err)
	}
}
