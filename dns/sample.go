package dns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"portolan/router"
	"portolan/sample"
)

// Sample is the setting dns.sample: where clients of queries at registries' names are recorded, as package sample writes them.
type Sample struct {
	// File is replaced whole each time it is written; empty for no record.
	File string
	// Rate is the share of the queries that are recorded, above 0 and at most 1.
	Rate float64
}

const (
	// sampleQueue holds what is recorded while the file is written, some hundred milliseconds at 10,000 a second. What comes
	// beyond it is lost, and counted: no answer waits for a record.
	sampleQueue = 4096
	// sampleInterval is the time between two writings.
	sampleInterval = 10 * time.Second
)

// sampler records the clients of some queries. Whoever answers draws a lot, and hands those that it falls on to the one
// goroutine that counts and writes.
type sampler struct {
	file  string
	below uint64 // a query is recorded if its lot is
	queue chan router.Client
	lost  atomic.Uint64
	log   *zap.Logger
	// clients are what was recorded: run's own.
	clients sample.Clients
}

// newSampler checks o and reads what is in the file already, to count on from it; nil for no record. A file that holds
// something else is an error, and not overwritten.
func newSampler(o Sample, log *zap.Logger) (*sampler, error) {
	if o.File == "" {
		return nil, nil
	}
	if !(o.Rate > 0 && o.Rate <= 1) {
		return nil, fmt.Errorf("rate %v: want more than 0 and at most 1", o.Rate)
	}
	if info, err := os.Stat(filepath.Dir(o.File)); err != nil || !info.IsDir() {
		return nil, fmt.Errorf("file %s: its folder does not exist", o.File)
	}
	clients, err := readSample(o.File)
	if err != nil {
		return nil, fmt.Errorf("file: what is there is no record of clients, and is not overwritten: %w", err)
	}
	below := uint64(math.MaxUint64)
	if o.Rate < 1 {
		below = uint64(o.Rate * (1 << 63) * 2)
	}
	return &sampler{file: o.File, below: below, queue: make(chan router.Client, sampleQueue), log: log, clients: clients}, nil
}

// offer records c, which r decided for, if the lot falls on it. It does not allocate, and it never waits.
func (s *sampler) offer(r *router.Registry, c router.Client) {
	if rand.Uint64() > s.below {
		return
	}
	select {
	case s.queue <- r.Coarse(c):
	default:
		s.lost.Add(1)
	}
}

// run counts, and writes the file every now and then until ctx is done, and then once more.
func (s *sampler) run(ctx context.Context) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	changed, failing := false, false
	save := func() {
		if !changed {
			return
		}
		err := s.write()
		if err != nil && !failing {
			s.log.Warn("recording clients fails, and is tried on", zap.Error(err))
		}
		failing, changed = err != nil, err != nil
	}
	add := func(c router.Client) {
		if c != (router.Client{}) {
			s.clients.Add(c)
			changed = true
		}
	}
	for {
		select {
		case c := <-s.queue:
			add(c)
		case <-tick.C:
			save()
		case <-ctx.Done():
			for {
				select {
				case c := <-s.queue:
					add(c)
					continue
				default:
				}
				save()
				return
			}
		}
	}
}

// readSample returns what is in the file; nothing where there is none.
func readSample(file string) (sample.Clients, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return sample.Clients{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return sample.Read(file, f)
}

// write replaces the file, which only its owner may read. A loss of power may lose it: it is a sample.
func (s *sampler) write() error {
	f, err := os.CreateTemp(filepath.Dir(s.file), filepath.Base(s.file)+".*")
	if err != nil {
		return fmt.Errorf("writing recorded clients: %w", err)
	}
	err = errors.Join(sample.Write(f, s.clients), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), s.file)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("writing recorded clients: %w", err), os.Remove(f.Name()))
	}
	return nil
}
