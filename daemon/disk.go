package daemon

import (
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"
)

// disk knows which of the files that this process writes all the time cannot be written: the disk is full, say, or read-only. It may be
// used by several goroutines.
type disk struct {
	mu     sync.Mutex
	faults map[string]fault // by path
}

// fault is a row of failed writes of one file.
type fault struct {
	meanwhile   string // what does not happen as long as it lasts
	err         error
	since, last time.Time // of the first and of the last failure
	over        bool      // a write has succeeded after the last of them
}

// calm is how long after a failure a file is taken to be in trouble although it was written since: on a full disk a small write often finds
// room where the one that matters does not, and what writes most, a baseline, comes to writing again after minutes.
const calm = 5 * time.Minute

// present reports whether it lasts.
func (f fault) present() bool { return !f.over || time.Since(f.last) < calm }

// of returns what is to be told of each write of the file at path: nil if that is on disk.
func (d *disk) of(path, meanwhile string) func(error) {
	return func(err error) {
		d.mu.Lock()
		defer d.mu.Unlock()
		f, known := d.faults[path]
		switch {
		case err == nil && !known:
			return
		case err == nil:
			f.over = true
		case known && f.present():
			f.err, f.last, f.over = err, time.Now(), false
		default:
			f = fault{meanwhile: meanwhile, err: err, since: time.Now(), last: time.Now()}
		}
		if d.faults == nil {
			d.faults = make(map[string]fault)
		}
		d.faults[path] = f
	}
}

// warnings names the files that cannot be written.
func (d *disk) warnings() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var warnings []string
	for _, path := range slices.Sorted(maps.Keys(d.faults)) {
		if f := d.faults[path]; f.present() {
			how := "has not been writable since " + f.since.UTC().Format(time.RFC3339)
			if f.over {
				how = fmt.Sprintf("could not be written from %s to %s, but has been written since", f.since.UTC().Format(time.RFC3339), f.last.UTC().Format(time.RFC3339))
			}
			warnings = append(warnings, fmt.Sprintf("%s %s; %s: %v", path, how, f.meanwhile, f.err))
		}
	}
	return warnings
}
