package events

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	"go.etcd.io/bbolt"
)

// job is a change that somebody waits for.
type job struct {
	apply func(*change) error
	done  chan error // of capacity 1: the writer never waits for those who went away
}

// maxGroup is how many changes share a transaction: enough that an fsync is not what limits, few enough that the
// transaction's pages stay small.
const maxGroup = 256

// submit hands a change to the writer and waits until it is on disk.
func (s *Spool) submit(ctx context.Context, apply func(*change) error) error {
	j := &job{apply: apply, done: make(chan error, 1)}
	select {
	case <-s.quit:
		return ErrClosed
	default:
	}
	select {
	case s.jobs <- j:
	case <-s.quit:
		return ErrClosed
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-j.done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run is the writer. It ends when quit is closed, having answered everyone whose job it took.
func (s *Spool) run() {
	defer close(s.stopped)
	for {
		var group []*job
		select {
		case j := <-s.jobs:
			group = append(group, j)
		case <-s.quit:
			return
		}
		for more := true; more && len(group) < maxGroup; {
			select {
			case j := <-s.jobs:
				group = append(group, j)
			default:
				more = false
			}
		}
		err := s.commit(group)
		if err != nil && len(group) > 1 {
			// One of them may be to blame for all.
			for _, j := range group {
				j.done <- s.commit([]*job{j})
			}
			continue
		}
		for _, j := range group {
			j.done <- err
		}
	}
}

// commit applies the jobs in one transaction, which is on disk when it returns nil, and then makes it known.
func (s *Spool) commit(group []*job) error {
	c := &change{limits: s.limits}
	s.mu.Lock()
	c.counts = maps.Clone(s.counts)
	told := s.told
	s.mu.Unlock()
	refused := false
	err := s.db.Update(func(tx *bbolt.Tx) error {
		c.root = tx.Bucket(rootBucket)
		for _, j := range group {
			if err := j.apply(c); err != nil {
				refused = true
				return err
			}
		}
		return nil
	})
	if !refused { // else it was not written, and nothing is known of the disk
		told(err)
	}
	if err != nil {
		return fmt.Errorf("writing: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for replica := range s.wake {
		if c.counts[replica] != s.counts[replica] || c.touched[replica] {
			s.wakeLocked(replica)
		}
	}
	s.counts = c.counts
	return nil
}

// change is a transaction under way. Its counts become the spool's when it is on disk.
type change struct {
	root    *bbolt.Bucket
	limits  Limits
	counts  map[string]counts
	touched map[string]bool
}

// replicaBuckets are a replica's part of the file within a change.
type replicaBuckets struct {
	*change
	name                       string
	all                        *bbolt.Bucket
	items, order, seen, recent *bbolt.Bucket
}

func (c *change) replica(name string) (*replicaBuckets, error) {
	all, err := c.root.CreateBucketIfNotExists([]byte(name))
	if err != nil {
		return nil, err
	}
	b := &replicaBuckets{change: c, name: name, all: all}
	for _, sub := range []struct {
		to   **bbolt.Bucket
		name []byte
	}{{&b.items, itemsBucket}, {&b.order, orderBucket}, {&b.seen, seenBucket}, {&b.recent, ringBucket}} {
		if *sub.to, err = all.CreateBucketIfNotExists(sub.name); err != nil {
			return nil, err
		}
	}
	if c.touched == nil {
		c.touched = map[string]bool{}
	}
	c.touched[name] = true
	return b, nil
}

func (c *change) add(replica string, events []Event) error {
	b, err := c.replica(replica)
	if err != nil {
		return err
	}
	for _, e := range events {
		if e.ID != "" {
			known, err := b.remember(fingerprint(e))
			if err != nil {
				return err
			}
			if known {
				continue
			}
		}
		if err := b.keep(e); err != nil {
			return err
		}
	}
	return nil
}

// keep folds an event into its item, or marks the repository when there is no place for another item.
func (b *replicaBuckets) keep(e Event) error {
	if e.Reference() == "" {
		return b.mark(e.Repository, e.Received)
	}
	key := itemKey(e.Repository, e.Reference())
	rec, err := readRecord(b.items, []byte(key))
	if err != nil {
		return err
	}
	if rec == nil && b.counts[b.name].references >= b.limits.References {
		return b.mark(e.Repository, e.Received)
	}
	sequence, err := b.all.NextSequence()
	if err != nil {
		return err
	}
	if rec == nil {
		rec = &record{}
	}
	dropped := rec.fold(e, sequence, b.limits.Evidence)
	if err := b.write(key, rec, sequence); err != nil {
		return err
	}
	for _, d := range dropped {
		if d.Action != Push || e.Tag == "" {
			continue
		}
		// A mark of the tag does not lead to a manifest that the tag has left.
		d.Event.Repository, d.Event.Tag = e.Repository, ""
		if err := b.keep(d.Event); err != nil {
			return err
		}
	}
	return nil
}

// mark keeps that the repository is to be scanned, or the whole replica when there are too many of these or repository is
// empty.
func (b *replicaBuckets) mark(repository string, at time.Time) error {
	key := itemKey(repository, "")
	rec, err := readRecord(b.items, []byte(key))
	if err != nil {
		return err
	}
	if rec == nil && repository != "" && b.counts[b.name].repositories >= b.limits.Repositories {
		return b.mark("", at)
	}
	sequence, err := b.all.NextSequence()
	if err != nil {
		return err
	}
	at = at.UTC().Round(0)
	if rec == nil {
		rec = &record{Since: at}
	}
	rec.Marked, rec.MarkedAt = sequence, at
	return b.write(key, rec, sequence)
}

// write stores an item that was added to; a new one gets the last place.
func (b *replicaBuckets) write(key string, rec *record, sequence uint64) error {
	if rec.Order == 0 {
		rec.Order = sequence
		if err := b.order.Put(sequenceKey(sequence), []byte(key)); err != nil {
			return err
		}
		b.count(key, 1)
	}
	return b.put(key, rec)
}

func (b *replicaBuckets) put(key string, rec *record) error {
	v, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("storing item %q: %w", key, err)
	}
	return b.items.Put([]byte(key), v)
}

func (b *replicaBuckets) count(key string, n int) {
	c := b.counts[b.name]
	c.add(key, n)
	b.counts[b.name] = c
}

// done takes out what the item held.
func (c *change) done(i Item) error {
	name := i.Registry + "/" + i.Region
	if c.root.Bucket([]byte(name)) == nil {
		return nil // forgotten meanwhile
	}
	b, err := c.replica(name)
	if err != nil {
		return err
	}
	key := itemKey(i.Repository, i.Reference)
	rec, err := readRecord(b.items, []byte(key))
	if err != nil || rec == nil {
		return err
	}
	left := rec.without(i.version)
	if err := b.order.Delete(sequenceKey(rec.Order)); err != nil {
		return err
	}
	if left == nil {
		b.count(key, -1)
		return b.items.Delete([]byte(key))
	}
	if err := b.order.Put(sequenceKey(left.Order), []byte(key)); err != nil {
		return err
	}
	return b.put(key, left)
}

func (c *change) forget(replica string) error {
	delete(c.counts, replica)
	if c.root.Bucket([]byte(replica)) == nil {
		return nil
	}
	return c.root.DeleteBucket([]byte(replica))
}

// remember reports whether the fingerprint is among the newest ones, and makes it one of them.
func (b *replicaBuckets) remember(fp []byte) (known bool, err error) {
	if b.seen.Get(fp) != nil {
		return true, nil
	}
	n, err := b.recent.NextSequence()
	if err != nil {
		return false, err
	}
	if err := b.seen.Put(fp, []byte{1}); err != nil {
		return false, err
	}
	if err := b.recent.Put(sequenceKey(n), fp); err != nil {
		return false, err
	}
	if n <= uint64(b.limits.Remembered) {
		return false, nil
	}
	oldest := sequenceKey(n - uint64(b.limits.Remembered))
	cursor := b.recent.Cursor()
	for k, v := cursor.First(); k != nil && bytes.Compare(k, oldest) <= 0; k, v = cursor.First() {
		// The value lies in a page that the deletes below change.
		v = bytes.Clone(v)
		if err := b.seen.Delete(v); err != nil {
			return false, err
		}
		if err := cursor.Delete(); err != nil {
			return false, err
		}
	}
	return false, nil
}

// replicas lists the replicas of which something waits.
func (s *Spool) replicas() [][2]string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var names [][2]string
	for name, c := range s.counts {
		if c.all() > 0 {
			registry, region, _ := strings.Cut(name, "/")
			names = append(names, [2]string{registry, region})
		}
	}
	return names
}
