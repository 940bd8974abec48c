package daemon

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"

	"portolan/store"
	"portolan/topology"
)

// A file that cannot be written is warned of since the first failure, through small writes that find room, until it can be for a while.
func TestDiskWarnings(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var d disk
		wrote := d.of("/data/portolan.db", "nothing is replicated")
		full := errors.New("no space left on device")
		began, last := time.Now().UTC().Format(time.RFC3339), ""
		for _, step := range []struct {
			after time.Duration
			err   error
			since string // empty: no warning
		}{
			{0, nil, ""},
			{0, full, began},
			{time.Second, nil, began},
			{calm / 2, full, began},
			{calm - time.Second, nil, began},
			{time.Second, nil, ""},
			{0, full, time.Now().Add(3*calm/2 + time.Second).UTC().Format(time.RFC3339)},
			{24 * time.Hour, nil, ""},
		} {
			time.Sleep(step.after)
			wrote(step.err)
			var want []string
			if step.err != nil {
				want = []string{"/data/portolan.db has not been writable since " + step.since + "; nothing is replicated: no space left on device"}
			} else if step.since != "" {
				want = []string{"/data/portolan.db could not be written from " + step.since + " to " + last + ", but has been written since; nothing is replicated: no space left on device"}
			}
			if step.err != nil {
				last = time.Now().UTC().Format(time.RFC3339)
			}
			if got := d.warnings(); !slices.Equal(got, want) {
				t.Errorf("after %v and %v: %q, want %q", step.after, step.err, got, want)
			}
		}
		// Nobody writes for long: it is not known to be over.
		wrote(full)
		time.Sleep(time.Hour)
		if len(d.warnings()) != 1 {
			t.Error("a failure is over by itself")
		}
	})
}

// watchSeeded runs a watcher that writes to path, tells d of that, and was told of one seeded replica; more can be told. It is to be stopped.
func watchSeeded(t *testing.T, path string, d *disk) (updates chan<- store.Update, stop func()) {
	s := told{updates: make(chan store.Update)}
	w := newStateWatcher(s, path, d.of(path, "it would not be known"), zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- w.run(ctx) }()
	s.updates <- store.Update{Tree: store.Tree{Entries: []store.Entry{{
		Key: topology.ReplicationKey("contoso", "westus"), Value: `{"seeded":true,"endpoint":"https://westus"}`,
	}}}}
	synctest.Wait()
	return s.updates, func() { cancel(); <-ended }
}

// Which replicas are seeded is written again and again until it is on disk, though nothing changes.
func TestSeededIsWrittenAgain(t *testing.T) {
	t.Parallel()
	folder := filepath.Join(t.TempDir(), "data")
	path := filepath.Join(folder, "seeded.json")
	synctest.Test(t, func(t *testing.T) {
		var d disk
		_, stop := watchSeeded(t, path, &d)
		defer stop()
		if got := d.warnings(); len(got) != 1 || !strings.Contains(got[0], path) {
			t.Errorf("warnings %q", got)
		}
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		time.Sleep(saveRetry)
		synctest.Wait()
		if saved, err := readSeeded(path); err != nil || len(saved) != 1 {
			t.Errorf("on disk are %v, %v", saved, err)
		}
		time.Sleep(calm)
		if got := d.warnings(); len(got) != 0 {
			t.Errorf("warnings %q", got)
		}
	})
}

// What could not be written, and is not wanted any more, is no trouble for ever.
func TestTroubleEndsWhenNothingIsToBeWritten(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "missing", "seeded.json")
	synctest.Test(t, func(t *testing.T) {
		var d disk
		updates, stop := watchSeeded(t, path, &d)
		defer stop()
		if got := d.warnings(); len(got) != 1 {
			t.Errorf("warnings %q", got)
		}
		updates <- store.Update{} // as it is on disk
		time.Sleep(saveRetry + calm)
		synctest.Wait()
		if got := d.warnings(); len(got) != 0 {
			t.Errorf("warnings %q", got)
		}
	})
}
