package topology

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"portolan/store"
)

// The least and the most that a ramp takes: below that its steps are no steps, beyond it nobody remembers what was aimed at.
const (
	minRamp = 10 * time.Second
	maxRamp = 7 * 24 * time.Hour
)

// Ramp is a change of a replica's weight that is made little by little: along a straight line over time, in whole percents. It stands
// in the store beside the weight, as FROM->TO START/END, and begins anew where every step leads: From is always the weight that was
// written last. So whoever carries it out needs to know nothing else, and a weight that is another was edited by somebody.
type Ramp struct {
	Registry string `json:"registry"`
	Region   string `json:"region"`
	// From is the weight at Start, which is that of the moment; To is the weight at End.
	From int `json:"from"`
	To   int `json:"to"`
	// Start and End are in UTC and whole milliseconds.
	Start time.Time `json:"start"`
	End   time.Time `json:"end"`
}

// rampTime is RFC 3339, with a fraction only where there is one.
const rampTime = "2006-01-02T15:04:05.999Z07:00"

// String is the ramp as it stands in its key; the interval is one of ISO 8601.
func (r Ramp) String() string {
	return fmt.Sprintf("%d->%d %s/%s", r.From, r.To, r.Start.Format(rampTime), r.End.Format(rampTime))
}

// parseRamp reads the value of a ramp's key.
func parseRamp(s string) (r Ramp, err error) {
	weights, interval, ok := strings.Cut(s, " ")
	from, to, ok2 := strings.Cut(weights, "->")
	start, end, ok3 := strings.Cut(interval, "/")
	if !ok || !ok2 || !ok3 {
		return r, fmt.Errorf("%q is not a ramp of the weight: want FROM->TO START/END, such as 0->100 2026-11-25T08:30:00Z/2026-11-25T09:00:00Z", clip(s))
	}
	for _, w := range []struct {
		text string
		into *int
	}{{from, &r.From}, {to, &r.To}} {
		if *w.into, err = parseWeight(w.text); err != nil {
			return Ramp{}, err
		}
	}
	for _, t := range []struct {
		text string
		into *time.Time
	}{{start, &r.Start}, {end, &r.End}} {
		at, err := time.Parse(time.RFC3339, t.text)
		if err != nil {
			return Ramp{}, fmt.Errorf("%q is not a time: want one as of RFC 3339, such as 2026-11-25T08:30:00Z", clip(t.text))
		}
		*t.into = at.UTC().Truncate(time.Millisecond)
	}
	switch span := r.End.Sub(r.Start); {
	case r.From == r.To:
		return Ramp{}, fmt.Errorf("leads from the weight %d to the same: remove the key", r.To)
	case span <= 0:
		return Ramp{}, errors.New("ends before it begins: want START/END")
	case span > maxRamp:
		return Ramp{}, fmt.Errorf("takes %v: at most %v", span, maxRamp)
	}
	return r, nil
}

// RampOf is the ramp of a replica's weight among those of a Snapshot, or nil.
func RampOf(ramps []Ramp, registry, region string) *Ramp {
	i := slices.IndexFunc(ramps, func(r Ramp) bool { return r.Registry == registry && r.Region == region })
	if i < 0 {
		return nil
	}
	return &ramps[i]
}

// At is the weight at the time now: From until Start, To from End on, and on the way never beyond the line between them.
func (r Ramp) At(now time.Time) int {
	switch {
	case !now.After(r.Start):
		return r.From
	case !now.Before(r.End):
		return r.To
	}
	return r.From + int(int64(r.To-r.From)*int64(now.Sub(r.Start))/int64(r.End.Sub(r.Start)))
}

// Step is the rest of the ramp at the time now, with the weight of the moment as From: it begins where the line came to that weight,
// so that what follows is the same line. At the end From is To. By an earlier clock than that of the step before nothing changes.
func (r Ramp) Step(now time.Time) Ramp {
	weight := r.At(now)
	if weight == r.From {
		return r
	}
	passed := time.Duration(int64(r.End.Sub(r.Start)) * int64(weight-r.From) / int64(r.To-r.From))
	r.From, r.Start = weight, r.Start.Add(passed).Truncate(time.Millisecond)
	return r
}

// ramps are those in values, sorted by registry and region. What cannot be read is left out.
func (v Values) ramps() (list []Ramp) {
	for name, value := range v {
		if !strings.HasSuffix(name, "/"+fieldRamp) {
			continue
		}
		k, err := parseKey(name)
		if err != nil || k.field != fieldRamp {
			continue
		}
		if r, err := parseRamp(value); err == nil {
			r.Registry, r.Region = k.registry, k.region
			list = append(list, r)
		}
	}
	slices.SortFunc(list, func(a, b Ramp) int {
		return cmp.Or(strings.Compare(a.Registry, b.Registry), strings.Compare(a.Region, b.Region))
	})
	return list
}

// follows is whether the weight is the one that the ramp came to last; if not, somebody edited it.
func (v Values) follows(r Ramp) bool {
	return v.replica(r.Registry, r.Region, fieldWeight) == strconv.Itoa(r.From)
}

// routes is whether routing to a replica is enabled.
func (v Values) routes(registry, region string) bool {
	return v.replica(registry, region, fieldRouting) == "enabled"
}

// underway divides the ramps: the others are overtaken by an edit of the weight, or of routing.
func (v Values) underway() (underway, overtaken []Ramp) {
	for _, r := range v.ramps() {
		if v.follows(r) && v.routes(r.Registry, r.Region) {
			underway = append(underway, r)
		} else {
			overtaken = append(overtaken, r)
		}
	}
	return underway, overtaken
}

// replica is the value of a replica's field, or its default.
func (v Values) replica(registry, region, field string) string {
	return key{registry: registry, region: region, field: field}.meaning(v)
}

// declared are the values as operators want them to be: a ramp is a way to a weight, and no setting of its own.
func (v Values) declared() Values { return v.arrived(v.ramps()) }

// arrived are the values at the end of these ramps, without them.
func (v Values) arrived(ramps []Ramp) Values {
	declared := maps.Clone(v)
	for _, r := range ramps {
		prefix := ReplicaPrefix(r.Registry, r.Region)
		if v.follows(r) {
			declared[prefix+fieldWeight] = strconv.Itoa(r.To)
		}
		delete(declared, prefix+fieldRamp)
	}
	return declared
}

// endRamp takes a replica's ramp away, if it has one, and returns that change. The weight is then the one that it led to.
func (w *workspace) endRamp(registry, region string) []Change {
	weight, ramp := ReplicaPrefix(registry, region)+fieldWeight, ReplicaPrefix(registry, region)+fieldRamp
	value, there := w.after[ramp]
	if !there {
		return nil
	}
	if declared, set := w.before.declared()[weight]; set {
		w.after[weight] = declared
	}
	delete(w.after, ramp)
	return []Change{{Op: Removed, Key: ramp, Old: clip(value)}}
}

// beginRamp lets the weight that an edit gave a replica come about over that time, from that of the moment: 0 where no clients were sent
// to the replica.
func (w *workspace) beginRamp(registry, region string, over time.Duration) error {
	if !w.after.routes(registry, region) {
		return failf(ErrRefused, "routing to replica %s/%s is disabled, so that no weight sends clients there: enable it in the same edit", registry, region)
	}
	from, err := 0, error(nil)
	if w.before.routes(registry, region) {
		from, err = parseWeight(w.before.replica(registry, region, fieldWeight))
	}
	to, err2 := parseWeight(w.after.replica(registry, region, fieldWeight))
	if err := errors.Join(err, err2); err != nil {
		return failf(ErrRefused, "the weight of replica %s/%s cannot be used: %v: set it first", registry, region, err)
	}
	if from == to {
		return nil
	}
	start := w.editor.options.Now().UTC().Truncate(time.Second)
	r := Ramp{From: from, To: to, Start: start, End: start.Add(over).Truncate(time.Millisecond)}
	prefix := ReplicaPrefix(registry, region)
	w.after[prefix+fieldWeight], w.after[prefix+fieldRamp] = strconv.Itoa(from), r.String()
	return nil
}

// RampReplica is UpdateReplica for an edit that is about the weight. A ramp of the replica ends. If over is not zero, 10s to 168h, the
// weight that change gives, or leaves, comes about little by little over that time: from the weight of the moment, or, if change
// enables routing, from 0. Where it is that weight already there is no ramp.
func (e *Editor) RampReplica(ctx context.Context, registry, region string, over time.Duration, change func(*ReplicaDocument)) error {
	if over != 0 && (over < minRamp || over > maxRamp) {
		return failf(ErrInvalid, "over: %v is not how long a weight may take to change: want a duration of 10s to 168h, such as 30m", over)
	}
	return e.update(ctx, registry, region, change, func(w *workspace) error {
		if over == 0 {
			return nil
		}
		return w.beginRamp(registry, region, over)
	})
}

// Ramps returns those under way, by registry and region.
func (e *Editor) Ramps(ctx context.Context) ([]Ramp, error) {
	tree, err := e.store.List(ctx, RegistriesPrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the ramps of weights: %w", err)
	}
	underway, _ := ValuesOf(tree).underway()
	return underway, nil
}

// stepRamps brings every weight with a ramp to where it should be now. It returns the ramps that came to their end, and those that were
// overtaken and are taken away. Of these the weight stays as it is; but where that is because no clients are sent there any more, it
// becomes the one that was aimed at, for when they are again.
func (e *Editor) stepRamps(ctx context.Context) (done, overtaken []Ramp, err error) {
	err = e.edit(ctx, func(w *workspace) error {
		now := e.options.Now()
		done, overtaken = nil, nil
		for _, r := range w.before.ramps() {
			weight, ramp := ReplicaPrefix(r.Registry, r.Region)+fieldWeight, ReplicaPrefix(r.Registry, r.Region)+fieldRamp
			next := r.Step(now)
			switch {
			case !w.before.follows(r):
				delete(w.after, ramp)
				overtaken = append(overtaken, r)
				continue
			case !w.before.routes(r.Registry, r.Region):
				w.after[weight] = strconv.Itoa(r.To)
				delete(w.after, ramp)
				overtaken = append(overtaken, r)
			case next.From == r.To:
				w.after[weight] = strconv.Itoa(r.To)
				delete(w.after, ramp)
				done = append(done, r)
			case next.From != r.From:
				w.after[weight], w.after[ramp] = strconv.Itoa(next.From), next.String()
			default:
				continue
			}
			w.rely(r.Registry, r.Region, fieldRouting)
		}
		return nil
	})
	return done, overtaken, err
}

// rely lets the edit be made anew if the field of a replica, which it leaves as it is, changes meanwhile.
func (w *workspace) rely(registry, region, field string) {
	name := ReplicaPrefix(registry, region) + field
	e, _ := w.tree.Get(name)
	w.with(registry, region, store.Check(name, e.Revision))
}
