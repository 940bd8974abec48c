package topology

import (
	"testing"
	"time"
)

func TestParseMaxLag(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]time.Duration{"": 0, "10s": 10 * time.Second, "168h": 7 * 24 * time.Hour, "1h30m": 90 * time.Minute} {
		if got, err := parseMaxLag(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"9s", "0s", "-10m", "169h", "10", "ten minutes", "never"} {
		if got, err := parseMaxLag(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
	snapshot, good := Parse(with(three(), "policy/max_lag", "600s"), nil, nil)
	if got := snapshot.Registry("contoso").Policy.MaxLag; got != 10*time.Minute {
		t.Errorf("the policy is %v", got)
	}
	for _, c := range Diff(documentOf(good), documentOf(with(good, "policy/max_lag", "10m0s"))) { // 600s and 10m0s are one
		t.Errorf("the document differs: %v", c)
	}
}
