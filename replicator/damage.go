package replicator

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"portolan/replicator/ledger"
)

// examined is a ledger that tells of the damaged records that are read from it: of each once, in the log, and of how many there
// are, in a gauge. To the engine the record of such a key is the zero Record: nothing is known, and it is decided anew when a
// replica is looked at.
type examined struct {
	ledger.Ledger
	log   *zap.Logger
	gauge prometheus.Gauge

	mu sync.Mutex
	// damaged says why the records that are damaged cannot be read.
	damaged map[ledger.Key]misread
}

func examine(l ledger.Ledger, log *zap.Logger, gauge prometheus.Gauge) *examined {
	gauge.Set(0)
	return &examined{Ledger: l, log: log, gauge: gauge, damaged: make(map[ledger.Key]misread)}
}

// Get implements ledger.Ledger.
func (x *examined) Get(ctx context.Context, key ledger.Key) (ledger.Row, error) {
	row, err := x.Ledger.Get(ctx, key)
	if err == nil || errors.Is(err, ledger.ErrNotFound) {
		x.note(key, row.Damage)
	}
	return row, err
}

// Page implements ledger.Ledger.
func (x *examined) Page(ctx context.Context, registry, repository string, after ledger.Key, limit int) ([]ledger.Row, error) {
	rows, err := x.Ledger.Page(ctx, registry, repository, after, limit)
	if err != nil {
		return rows, err
	}
	for _, row := range rows {
		x.note(row.Key, row.Damage)
	}
	for key := range x.all() {
		// What the page passes over is not there any more.
		passed := key.Registry == registry && (repository == "" || key.Repository == repository) && ledger.Compare(key, after) > 0 &&
			(len(rows) < limit || ledger.Compare(key, rows[len(rows)-1].Key) < 0)
		if passed && !slices.ContainsFunc(rows, func(row ledger.Row) bool { return row.Key == key }) {
			x.note(key, nil)
		}
	}
	return rows, nil
}

// all returns why the records that are damaged cannot be read, and since when that is known.
func (x *examined) all() map[ledger.Key]misread {
	x.mu.Lock()
	defer x.mu.Unlock()
	return maps.Clone(x.damaged)
}

// note remembers what a reading of a key says of its record.
func (x *examined) note(key ledger.Key, damage error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	before, known := x.damaged[key]
	switch {
	case damage == nil && !known:
		return
	case damage == nil:
		delete(x.damaged, key)
	case !known || before.err.Error() != damage.Error():
		x.damaged[key] = misread{time.Now(), damage}
		x.log.Error("a record of the ledger is damaged; its key is decided anew from what the replicas hold", zap.String("image", key.String()), zap.Error(damage))
	}
	x.gauge.Set(float64(len(x.damaged)))
}

// mend has damaged records decided anew by what the given members show. For most tags scans have done that already; manifests
// in their own right are not scanned. What all the fleet was asked about, and nobody holds, is forgotten.
func (e *engine) mend(ctx context.Context, members []*member) error {
	var damaged []ledger.Row
	f := e.fleet()
	err := e.rows(ctx, "", func(row ledger.Row) bool {
		if row.Damage != nil {
			damaged = append(damaged, row)
		}
		return true
	})
	if err != nil {
		return err
	}
	for _, row := range damaged {
		asked := 0
		for _, m := range members {
			// One that cannot be asked must not keep the others from it.
			if _, failed := e.observe(ctx, m, row.Key, evidence{lost: true}); failed != nil {
				err = errors.Join(err, failed)
				continue
			}
			asked++
		}
		if asked < len(f.replicas) {
			continue
		}
		// It is compared: what was decided meanwhile stays.
		if failed := e.forget(ctx, f, row); failed != nil && !errors.Is(failed, errAgain) {
			err = errors.Join(err, failed)
		}
	}
	return err
}
