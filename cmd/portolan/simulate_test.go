package main

import (
	"fmt"
	"strings"
	"testing"
)

func TestSimulate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	file := w.write(t, "new.yaml", fmt.Sprintf(`registries:
  - name: contoso
    home: westus
    names: [registry.contoso.com]
    policy: {merge: home}
    replicas:
      - {region: westus, endpoint: "http://%s", addresses: [127.0.0.1]}
      - {region: westeurope, endpoint: "http://%s", addresses: [127.0.0.1]}
      - {region: eastasia, endpoint: "http://%s", addresses: [127.0.0.1]}
`, w.hosts[0], w.hosts[1], w.hosts[2]))
	stdout, _ := w.must(t, exitDone, "simulate", "-f", file)
	contains(t, "simulate", stdout, "contoso: ", " would be sent elsewhere", "eastasia", "0%", "contoso/eastasia is new and gets no clients before it is seeded")

	queries := w.write(t, "queries", "# Tokyo\n202.12.27.0/24 3\n202.12.27.0/24\n8.8.8.0/24 6\n")
	stdout, _ = w.must(t, exitDone, "simulate", "-f", file, "--queries", queries)
	contains(t, "simulate --queries", stdout, "contoso: 4 of 10 queries (40%) would be sent elsewhere")
	stdout, _ = w.must(t, exitDone, "simulate", "-f", file, "--queries", queries, "-o", "json")
	contains(t, "simulate -o json", stdout, `"moved": 4`)

	bad := w.write(t, "bad", "1.2.3.4 2\n1.2.3.400\n")
	_, stderr := w.must(t, exitFailed, "simulate", "-f", file, "--queries", bad)
	contains(t, "bad queries", stderr, bad+`:2: "1.2.3.400" is neither`)
	_, stderr = w.must(t, exitFailed, "simulate", "-f", file, "--queries", w.write(t, "empty", ""))
	contains(t, "no queries", stderr, "no client is recorded in")
	w.must(t, exitUsage, "simulate")
	w.must(t, exitUsage, "simulate", "-f", "-", "--queries", "-")
	if stdout, _ := w.must(t, exitDone, "export"); strings.Contains(stdout, "eastasia") {
		t.Error("a simulation changed the topology")
	}
}

func TestShares(t *testing.T) {
	t.Parallel()
	if got := strings.Join(shares(1, 1, 1, 0), " "); got != "33.34% 33.33% 33.33% 0%" {
		t.Error(got)
	}
	if got := strings.Join(shares(99999, 1), " "); got != "100% <0.01%" {
		t.Error(got)
	}
}
