package transfer

import (
	"bytes"
	"crypto/sha256"
	"encoding"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"portolan/replicator/distribution"
)

func open(t *testing.T, path string) *Journal {
	t.Helper()
	j, err := OpenJournal(path)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestJournal(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "uploads.json")
	one, other := place{"b", "r", "sha256:1"}, place{"c", "r", "sha256:1"}
	j := open(t, path)
	for _, p := range []place{one, other} {
		if err := j.put(standing{place: p, Location: "http://" + p.Target, Hashes: []hashed{{4, []byte{1, 2}}}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := j.drop(other); err != nil {
		t.Fatal(err)
	}
	j = open(t, path)
	if s, ok := j.find(one); !ok || s.Location != "http://b" || len(s.Hashes) != 1 || s.Hashes[0].Offset != 4 || !bytes.Equal(s.Hashes[0].State, []byte{1, 2}) {
		t.Errorf("%+v, %v", s, ok)
	}
	if s, ok := j.find(other); ok {
		t.Errorf("an upload that came to its end is %+v", s)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("locations may be signed, and the file is %v, %v", info.Mode(), err)
	}
	// It has bounds, in number and in time.
	for n := range maxJournal + 10 {
		if err := j.put(standing{place: place{"b", fmt.Sprint("r", n), "sha256:1"}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := j.find(one); ok || len(j.uploads) != maxJournal || len(open(t, path).uploads) != maxJournal {
		t.Errorf("%d uploads are remembered, the oldest too: %v", len(j.uploads), ok)
	}
	for p, s := range j.uploads {
		s.Since = s.Since.Add(-journalLife)
		j.uploads[p] = s
	}
	if err := j.put(standing{place: one}); err != nil || len(j.uploads) != 1 {
		t.Errorf("%d uploads are remembered, %v", len(j.uploads), err)
	}
	// What cannot be understood is forgotten.
	if err := os.WriteFile(path, []byte(`[{"target":`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, unreadable := range []string{path, t.TempDir()} {
		j, err := OpenJournal(unreadable)
		if err == nil || j == nil || len(j.uploads) != 0 {
			t.Errorf("%s: %+v, %v", unreadable, j, err)
		}
	}
	// A clock that stood ahead keeps nobody out.
	ahead, err := json.Marshal(standing{place: one, Since: time.Now().Add(time.Hour)})
	if err := errors.Join(err, os.WriteFile(path, fmt.Appendf(nil, "[%s]", ahead), 0o600)); err != nil {
		t.Fatal(err)
	}
	if j := open(t, path); len(j.uploads) != 0 {
		t.Errorf("%+v", j.uploads)
	}
}

// A stream goes on from the last state of the hash that is of use, and verifies the whole blob all the same.
func TestRestoredStream(t *testing.T) {
	t.Parallel()
	r := newReplica(t)
	blob := random(1, 100)
	desc := pushBlob(t, r.client, "r", blob)
	state := func(n int) []byte {
		h, err := distribution.NewHash(desc.Digest)
		if err != nil {
			t.Fatal(err)
		}
		h.Write(blob[:n])
		b, err := h.(encoding.BinaryMarshaler).MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for name, c := range map[string]struct {
		hashes []hashed
		begin  int64
	}{
		"none":                      {nil, 0},
		"the last before it":        {[]hashed{{10, state(10)}, {40, state(40)}, {60, state(60)}}, 40},
		"at the offset":             {[]hashed{{10, state(10)}, {50, state(50)}}, 50},
		"all beyond it":             {[]hashed{{51, state(51)}}, 0},
		"one that makes no sense":   {[]hashed{{10, state(10)}, {40, []byte("?")}}, 10},
		"none that makes any sense": {[]hashed{{-5, state(5)}, {0, state(5)}}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			copying := &copying{target: NewTarget(r.client, Limits{}, nil), Request: Request{Repository: "r", Sources: from(r)}}
			s, err := newStream(t.Context(), copying, desc)
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			if err := s.restore(c.hashes, 50); err != nil || s.offset != c.begin {
				t.Fatalf("it goes on at %d, want %d, %v", s.offset, c.begin, err)
			}
			if err := s.seek(50); err != nil {
				t.Fatal(err)
			}
			rest, err := io.ReadAll(struct{ io.Reader }{s})
			if err != nil || !bytes.Equal(rest, blob[50:]) || s.verified() != nil || copying.snapshot().Read != 100-c.begin {
				t.Errorf("%d bytes, %v, %v; %d were read", len(rest), err, s.verified(), copying.snapshot().Read)
			}
			// Also before where it began.
			if err := s.seek(5); err != nil {
				t.Fatal(err)
			}
			if rest, err = io.ReadAll(struct{ io.Reader }{s}); err != nil || !bytes.Equal(rest, blob[5:]) || s.verified() != nil {
				t.Errorf("from 5 on: %d bytes, %v, %v", len(rest), err, s.verified())
			}
		})
	}
}

// Wrong bytes may have come before the kill. Whoever gives the rest is not to blame.
func TestRestoredStreamOfWrongBytes(t *testing.T) {
	t.Parallel()
	r := newReplica(t)
	desc := pushBlob(t, r.client, "r", random(1, 100))
	wrong, err := marshal([]checkpoint{{40, sha256.New()}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := newStream(t.Context(), &copying{target: NewTarget(r.client, Limits{}, nil), Request: Request{Repository: "r", Sources: from(r)}}, desc)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.restore(wrong, 50); err != nil || s.offset != 40 {
		t.Fatalf("it goes on at %d, %v", s.offset, err)
	}
	if err := s.seek(desc.Size); err != nil || s.verified() == nil {
		t.Fatalf("wrong bytes are verified, %v", err)
	}
	if err := s.restart(); err != nil {
		t.Fatal(err)
	}
	if err := s.seek(desc.Size); err != nil || s.verified() != nil {
		t.Errorf("%v, %v", err, s.verified())
	}
}

// The states that are told are those of the last bytes, as far back as the registry may stand.
func TestToldCheckpoints(t *testing.T) {
	t.Parallel()
	r := newReplica(t)
	desc := pushBlob(t, r.client, "r", random(1, (toldCheckpoints+3)*checkpointSpacing))
	copying := &copying{target: NewTarget(r.client, Limits{}, nil), Request: Request{Repository: "r", Sources: from(r)}}
	s, err := newStream(t.Context(), copying, desc)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	var told []hashed
	s.marked = func(h []hashed) { told = h }
	if err := s.seek((toldCheckpoints+2)*checkpointSpacing + 1<<20); err != nil {
		t.Fatal(err)
	}
	if len(told) != toldCheckpoints || told[0].Offset < 3*checkpointSpacing || told[toldCheckpoints-1].Offset > s.offset {
		t.Errorf("%d are told, from %d to %d of %d", len(told), told[0].Offset, told[len(told)-1].Offset, s.offset)
	}
	again, err := newStream(t.Context(), copying, desc)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if err := again.restore(told, s.offset); err != nil || s.offset-again.offset > checkpointSpacing {
		t.Fatalf("it goes on at %d, %v", again.offset, err)
	}
	if err := again.seek(desc.Size); err != nil || again.verified() != nil {
		t.Errorf("%v, %v", err, again.verified())
	}
}

// What is remembered helps nobody where the registry does not know the session any more.
func TestLostUploadBeginsAnew(t *testing.T) {
	t.Parallel()
	a, b := newReplica(t), newReplica(t)
	img := pushImage(t, a.client, "r", random(1, 6<<20))
	j := open(t, filepath.Join(t.TempDir(), "uploads.json"))
	target := NewTarget(b.client, Limits{}, nil)
	target.Remember(j, "b")
	gone := standing{place: place{"b", "r", distribution.Digest(random(1, 6<<20))}, Location: b.URL + "/v2/r/blobs/uploads/gone"}
	if err := j.put(gone); err != nil {
		t.Fatal(err)
	}
	s, err := target.Copy(t.Context(), Request{Repository: "r", Manifest: img, Sources: from(a)})
	if err != nil || s.Uploaded != 2 || len(j.uploads) != 0 {
		t.Fatalf("%+v, %v; %+v", s, err, j.uploads)
	}
	whole(t, b.client, "r", img.Digest)
}
