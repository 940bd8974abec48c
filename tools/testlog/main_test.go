package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	t.Parallel()
	const ok = `{"Action":"start","Package":"portolan/a"}
{"Action":"output","Package":"portolan/a","Test":"TestX","Output":"=== RUN   TestX\n"}
{"Action":"output","Package":"portolan/a","Test":"TestX","Output":"    x_test.go:7: loud\n"}
{"Action":"pass","Package":"portolan/a","Test":"TestX"}
{"Action":"output","Package":"portolan/a","Test":"TestY","Output":"    y_test.go:9: podman is missing\n"}
{"Action":"output","Package":"portolan/a","Test":"TestY","Output":"--- SKIP: TestY (0.00s)\n"}
{"Action":"skip","Package":"portolan/a","Test":"TestY"}
{"Action":"output","Package":"portolan/a","Output":"PASS\n"}
{"Action":"output","Package":"portolan/a","Output":"ok  \tportolan/a\t0.1s\n"}
{"Action":"pass","Package":"portolan/a"}
`
	for name, test := range map[string]struct {
		input string
		ok    bool
		shows []string
		hides []string
	}{
		"what passed is one line, what was skipped has its reason": {
			ok, true,
			[]string{"ok  \tportolan/a\t0.1s", "skipped:\n  podman is missing\n      a TestY\n", "ok: 1 tests passed, 0 failed, 1 skipped in 1 packages"},
			[]string{"loud", "=== RUN"},
		},
		"what failed is shown whole": {
			ok + `{"Action":"output","Package":"portolan/b","Test":"TestZ","Output":"    z_test.go:1: wrong\n"}
{"Action":"fail","Package":"portolan/b","Test":"TestZ"}
{"Action":"output","Package":"portolan/b","Output":"FAIL\tportolan/b\t0.1s\n"}
{"Action":"fail","Package":"portolan/b"}
`, false, []string{"z_test.go:1: wrong", "FAIL\tportolan/b", "FAIL: 1 tests passed"}, []string{"loud"},
		},
		"a test that took the process with it": {
			`{"Action":"output","Package":"portolan/b","Test":"TestZ","Output":"panic: boom\n"}
{"Action":"fail","Package":"portolan/b"}
`, false, []string{"panic: boom"}, nil,
		},
		"a package that does not build": {
			`{"ImportPath":"portolan/c","Action":"build-output","Output":"c.go:1:1: expected 'package'\n"}
{"ImportPath":"portolan/c","Action":"build-fail"}
{"Action":"fail","Package":"portolan/c","FailedBuild":"portolan/c"}
`, false, []string{"expected 'package'"}, nil,
		},
		"what go says itself": {"go: no such module\n", false, []string{"go: no such module"}, nil},
		"nothing":             {"", false, []string{"FAIL"}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			got, err := report(strings.NewReader(test.input), &out)
			if err != nil || got != test.ok {
				t.Errorf("got %v, %v, want %v", got, err, test.ok)
			}
			for _, text := range test.shows {
				if !strings.Contains(out.String(), text) {
					t.Errorf("it does not show %q:\n%s", text, out.String())
				}
			}
			for _, text := range test.hides {
				if strings.Contains(out.String(), text) {
					t.Errorf("it shows %q:\n%s", text, out.String())
				}
			}
		})
	}
}
