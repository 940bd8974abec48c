package events

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const (
	digestA = "sha256:06264063f7b0a4987c389f6d2fdcd749a35ae57232e5dc4975dae316c0dccd65"
	digestB = "sha256:7a19147749ce097f32b13072bccba494b5e717d4f23fbde50f7514059e109ad1"
)

var received = time.Date(2026, 11, 23, 17, 0, 0, 0, time.UTC)

func message(contentType, body string) Message {
	return Message{Header: http.Header{"Content-Type": {contentType}}, Body: []byte(body), Received: received}
}

// TestRecorded reads what real registries sent: the files in testdata were recorded from distribution 3.1.2 and from
// Debian's docker-registry 2.8.2, with addresses replaced.
func TestRecorded(t *testing.T) {
	t.Parallel()
	type want struct {
		action     Action
		tag        string
		digest     bool
		mediaType  string
		writeID    string
		userAgent  string
		ignored    bool
		onlySince3 bool
	}
	const image = "application/vnd.oci.image.manifest.v1+json"
	tests := map[string]want{
		"push-blob":       {ignored: true},
		"pull":            {ignored: true},
		"mount":           {ignored: true},
		"push-tag":        {action: Push, tag: "1.2", digest: true, mediaType: image, userAgent: "docker/27.3.1 go/go1.22.7"},
		"push-tag-ours":   {action: Push, tag: "latest", digest: true, mediaType: image, writeID: "0a1b2c3d4e5f6071"},
		"push-digest":     {action: Push, digest: true, mediaType: image},
		"push-index":      {action: Push, tag: "multi", digest: true, mediaType: "application/vnd.oci.image.index.v1+json"},
		"delete-tag":      {action: Delete, tag: "multi", onlySince3: true},
		"delete-digest-1": {action: Delete, digest: true},
		"delete-digest-2": {action: Delete, tag: "1.2"},
		"delete-digest-3": {action: Delete, tag: "latest"},
		// Nothing tells it from the delete of a manifest.
		"delete-blob": {action: Delete, digest: true},
	}
	for version, contentType := range map[string]string{"2.8": distributionV1, "3": distributionV2} {
		files, err := filepath.Glob("testdata/distribution-" + version + "-*.json")
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]bool{}
		for _, file := range files {
			name := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "distribution-"+version+"-"), ".json")
			seen[name] = true
			t.Run(version+"/"+name, func(t *testing.T) {
				t.Parallel()
				body, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				w, known := tests[name]
				if !known {
					t.Fatal("no expectation for this file")
				}
				m := message(contentType, string(body))
				if !(Distribution{}).Match(m) {
					t.Fatal("not taken for a distribution envelope")
				}
				r, err := Distribution{}.Parse(m)
				if err != nil || len(r.Invalid) > 0 {
					t.Fatalf("%v, invalid: %v", err, r.Invalid)
				}
				if w.ignored {
					if len(r.Events) != 0 || r.Ignored != 1 {
						t.Fatalf("got %+v, want it ignored", r)
					}
					return
				}
				if len(r.Events) != 1 || r.Ignored != 0 {
					t.Fatalf("got %+v, want one event", r)
				}
				e := r.Events[0]
				if e.Action != w.action || e.Repository != "team/app" || e.Tag != w.tag || (e.Digest != "") != w.digest ||
					e.MediaType != w.mediaType || e.WriteID != w.writeID {
					t.Errorf("got %+v, want %+v", e, w)
				}
				if w.userAgent != "" && e.UserAgent != w.userAgent {
					t.Errorf("got user agent %q, want %q", e.UserAgent, w.userAgent)
				}
				if len(e.ID) != 36 || e.Time.Year() != 2026 || !e.Received.Equal(received) {
					t.Errorf("got id %q, time %v, received %v", e.ID, e.Time, e.Received)
				}
			})
		}
		for name, w := range tests {
			if !seen[name] && (version == "3" || !w.onlySince3) {
				t.Errorf("no recording of %s for %s", name, version)
			}
		}
	}
}

func TestDistributionMatch(t *testing.T) {
	t.Parallel()
	for contentType, want := range map[string]bool{
		distributionV1:                     true,
		distributionV2 + "; charset=utf-8": true,
		strings.ToUpper(distributionV2):    true,
		"application/json":                 false,
		"application/cloudevents+json":     false,
		"":                                 false,
		distributionV2 + "; =":             false,
		"application/vnd.docker.distribution.events": false,
	} {
		if got := (Distribution{}).Match(message(contentType, "")); got != want {
			t.Errorf("%q: got %v, want %v", contentType, got, want)
		}
	}
}

func envelope(action, repository, tag, digest, mediaType, timestamp string) string {
	b, err := json.Marshal(map[string]any{"events": []any{map[string]any{
		"id": "1", "timestamp": timestamp, "action": action,
		"target":  map[string]any{"repository": repository, "tag": tag, "digest": digest, "mediaType": mediaType},
		"unknown": map[string]any{"deep": []int{1}},
	}}})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func TestDistributionOddEvents(t *testing.T) {
	t.Parallel()
	const when = "2026-11-23T16:34:43Z"
	tests := []struct {
		name                     string
		body                     string
		events, ignored, invalid int
	}{
		{"plain", envelope("push", "a", "t", digestA, "x/y", when), 1, 0, 0},
		{"sha512", envelope("push", "a", "t", "sha512:"+strings.Repeat("ab", 64), "x/y", when), 1, 0, 0},
		{"whole repository", envelope("delete", "a/b", "", "", "", when), 1, 0, 0},
		{"unknown action", envelope("scan", "a", "t", digestA, "x/y", when), 0, 0, 1},
		{"no action", envelope("", "a", "t", digestA, "x/y", when), 0, 0, 1},
		{"path for a repository", envelope("push", "a/../b", "t", digestA, "x/y", when), 0, 0, 1},
		{"host for a repository", envelope("push", "evil.example:80/a", "t", digestA, "x/y", when), 0, 0, 1},
		{"dots for a first component", envelope("push", "evil.example/a", "t", digestA, "x/y", when), 1, 0, 0},
		{"upper case", envelope("push", "Team/app", "t", digestA, "x/y", when), 0, 0, 1},
		{"long repository", envelope("push", strings.Repeat("a", 256), "t", digestA, "x/y", when), 0, 0, 1},
		{"empty repository", envelope("push", "", "t", digestA, "x/y", when), 0, 0, 1},
		{"zero byte", envelope("push", "a\x00b", "t", digestA, "x/y", when), 0, 0, 1},
		{"path for a tag", envelope("push", "a", "..", digestA, "x/y", when), 0, 0, 1},
		{"line break after a tag", envelope("push", "a", "t\n", digestA, "x/y", when), 0, 0, 1},
		{"long tag", envelope("push", "a", strings.Repeat("t", 129), digestA, "x/y", when), 0, 0, 1},
		{"query for a tag", envelope("push", "a", "t?x=1", digestA, "x/y", when), 0, 0, 1},
		{"short digest", envelope("push", "a", "t", "sha256:00", "x/y", when), 0, 0, 1},
		{"unknown algorithm", envelope("push", "a", "t", "md5:d41d8cd98f00b204e9800998ecf8427e", "x/y", when), 0, 0, 1},
		{"push of nothing", envelope("push", "a", "t", "", "x/y", when), 0, 0, 1},
		{"push of a layer", envelope("push", "a", "", digestA, "application/octet-stream", when), 0, 1, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, err := Distribution{}.Parse(message(distributionV2, tt.body))
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Events) != tt.events || r.Ignored != tt.ignored || len(r.Invalid) != tt.invalid {
				t.Errorf("got %+v, want %d events, %d ignored, %d invalid", r, tt.events, tt.ignored, tt.invalid)
			}
		})
	}
}

// TestDistributionTimes holds that no time can keep an event from being stored.
func TestDistributionTimes(t *testing.T) {
	t.Parallel()
	for timestamp, zero := range map[string]bool{
		"2026-11-23T16:34:43.783484118Z": false,
		"2026-11-23T18:34:43+02:00":      false,
		"":                               true,
		"yesterday":                      true,
		"0001-01-01T00:00:00Z":           true,
		"9999-12-31T23:59:59-23:59":      true, // year 10000 in UTC, which JSON refuses
		"0000-01-01T00:00:00+23:59":      true,
	} {
		r, err := Distribution{}.Parse(message(distributionV1, envelope("push", "a", "t", digestA, "x/y", timestamp)))
		if err != nil || len(r.Events) != 1 {
			t.Fatalf("%q: %+v, %v", timestamp, r, err)
		}
		if got := r.Events[0].Time; got.IsZero() != zero {
			t.Errorf("%q: got %v, want zero %v", timestamp, got, zero)
		}
		if _, err := json.Marshal(r.Events[0]); err != nil {
			t.Errorf("%q: %v", timestamp, err)
		}
	}
}

func TestDistributionRefuses(t *testing.T) {
	t.Parallel()
	many := `{"events":[` + strings.Repeat(`{},`, maxEvents) + `{}]}`
	for _, body := range []string{
		"", "null", "[]", "{}", `{"events":null}`, `{"events":{}}`, `{"events":[{"id":1}]}`, `{"events":[]} x`,
		`{"events":[{"action":"push"`, strings.Repeat("[", 100000), many,
	} {
		r, err := Distribution{}.Parse(message(distributionV2, body))
		if err == nil {
			t.Errorf("%.40q: got %+v, want an error", body, r)
		}
	}
	if _, err := (Distribution{}).Parse(message(distributionV2, many)); !errors.Is(err, errTooMany) {
		t.Errorf("got %v, want %v", err, errTooMany)
	}
	if r, err := (Distribution{}).Parse(message(distributionV2, `{"events":[]}`)); err != nil || len(r.Events) != 0 {
		t.Errorf("no events: got %+v, %v", r, err)
	}
}

// FuzzFormats holds for every format: what it makes of any body is valid, bounded, storable, and the same twice.
func FuzzFormats(f *testing.F) {
	files, err := filepath.Glob("testdata/*.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(distributionV2, body)
	}
	f.Add(distributionV1, []byte(envelope("push", "a/../b", "..", "sha256:", "", "9999-12-31T23:59:59-23:59")))
	f.Fuzz(func(t *testing.T, contentType string, body []byte) {
		m := message(contentType, string(body))
		for _, format := range Formats() {
			format.Match(m)
			r, err := format.Parse(m)
			if err != nil {
				continue
			}
			if len(r.Events)+r.Ignored+len(r.Invalid) > maxEvents {
				t.Fatalf("more than %d events", maxEvents)
			}
			for _, e := range r.Events {
				if err := e.Validate(); err != nil {
					t.Fatalf("invalid event %+v: %v", e, err)
				}
				if strings.Contains(e.Repository+e.Tag, "..") && strings.Contains("/"+e.Repository+"/"+e.Tag+"/", "/../") {
					t.Fatalf("a path: %+v", e)
				}
				b, err := json.Marshal(e)
				if err != nil || len(b) > 8<<10 {
					t.Fatalf("stored form of %d bytes: %v", len(b), err)
				}
			}
			for _, err := range r.Invalid {
				if len(err.Error()) > 512 {
					t.Fatalf("a reason of %d bytes", len(err.Error()))
				}
			}
		}
	})
}

// FuzzPath holds that a path names a replica in one way only.
func FuzzPath(f *testing.F) {
	for _, p := range []string{"/events/contoso/westus", "/events//", "/events/a/b/c", "/events/a/../b", "/", "/events/A/b"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, path string) {
		registry, region, ok := replicaOf(path)
		if ok && path != "/events/"+registry+"/"+region {
			t.Fatalf("%q was read as %q and %q", path, registry, region)
		}
		if ok {
			if _, err := replicaKey(registry, region); err != nil {
				t.Fatal(err)
			}
		}
	})
}
