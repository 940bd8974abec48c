package topology

import (
	"strings"
	"testing"
)

func TestParseCanary(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"canary:1", "team/canary:v1.0_x-Y"} {
		c, err := parseCanary(good)
		if err != nil || c.String() != good {
			t.Errorf("%q: %+v, %v", good, c, err)
		}
	}
	for bad, reason := range map[string]string{
		"team/canary": "want REPOSITORY:TAG", "team/canary:": "is no tag", ":1": "repository", "Team/canary:1": "repository",
		"team/canary:-1": "is no tag", "host:5000/canary:1": "repository", "team/canary@sha256:00": "want REPOSITORY:TAG",
		"canary:" + strings.Repeat("1", 129): "is no tag",
	} {
		if _, err := parseCanary(bad); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: %v, want %q", bad, err, reason)
		}
	}
}
