package topology

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"portolan/store"
	"portolan/strict/nearmiss"
)

// editAttempts is how often an edit is computed anew when somebody else was faster: with a handful of operators at once the
// first repetition succeeds; ten in vain mean that something writes all the time.
const editAttempts = 10

// batchSize leaves room in a transaction for the time, the digest and a confirmation of each registry it touches.
const batchSize = store.MaxOps - 32

// batchBytes bounds the keys and values of a transaction well below store.MaxCommit.
const batchBytes = store.MaxCommit / 2

// EditorOptions are the settings of an Editor.
type EditorOptions struct {
	// Reserved are labels that neither a registry nor a region may have.
	Reserved []string
	// Pending tells which raw edits the guard holds: what a Keeper's Status says. Nil: none are known.
	Pending func() []Pending
	// Lost tells whether the store has lost its keys, so that what is served is no longer there: what a Keeper's Status says.
	// Nil: it never has.
	Lost func() bool
	// Now is the clock; nil: time.Now.
	Now func() time.Time
	// Logger is told of every edit that has an actor (WithActor). It may be nil.
	Logger *zap.Logger
}

// Editor changes the topology in a store. Every edit is validated as a whole before anything is written, is committed on
// condition that nobody else edited meanwhile (then it is computed anew), and confirms its own deletions to the guard. An
// edit may not bring a new problem; those that raw edits made before do not stand in its way.
//
// Errors are of the kinds ErrInvalid, ErrNotFound, ErrExists, ErrConflict, ErrDeleting and ErrRefused, or the store's
// (store.ErrUnavailable: the outcome is unknown). An edit too large for one transaction is committed in several, each
// leaving a sound topology; if a later one fails, the error says so, and the same edit again completes it. All methods may
// be called from several goroutines.
type Editor struct {
	store   store.Store
	options EditorOptions
	// turn is held by the edit that is made. Edits of one process queue, so that only those of others are in each other's way.
	turn chan struct{}
}

// NewEditor makes an Editor of s.
func NewEditor(s store.Store, o EditorOptions) *Editor {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Logger == nil {
		o.Logger = zap.NewNop()
	}
	return &Editor{store: s, options: o, turn: make(chan struct{}, 1)}
}

// takeTurn waits until no other edit of this Editor is under way; its error is that of ctx.
func (e *Editor) takeTurn(ctx context.Context) error {
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for other edits: %w", ctx.Err())
	}
}

func (e *Editor) endTurn() { <-e.turn }

// workspace is an edit in the making.
type workspace struct {
	ctx    context.Context
	editor *Editor
	// before is what stood in the store, after what is to stand there; tree is before with its revisions.
	before, after Values
	tree          store.Tree
	// also are writes outside of the registries, by the registry/region they go with.
	also map[string][]store.Op
	// path names a key in errors; nil: the key itself.
	path func(string) string
}

// regions are those of which anything is declared.
func (w *workspace) regions(registry string) []string {
	return declaredRegions(w.after, registry)
}

func (w *workspace) has(prefix string) bool { return w.after.has(prefix) }

// declared is what operators declared below prefix, before the edit.
func (w *workspace) declared(prefix string) Document {
	own := w.before.declared()
	maps.DeleteFunc(own, func(name, _ string) bool { return !strings.HasPrefix(name, prefix) })
	return documentOf(own)
}

func (w *workspace) remove(prefix string) {
	maps.DeleteFunc(w.after, func(name, _ string) bool { return strings.HasPrefix(name, prefix) })
}

// need refuses a registry, or a replica of it, that is not there.
func (w *workspace) need(registry, region string) error {
	if !w.has(registryPrefix(registry)) {
		var names []string
		for name := range w.after {
			if k, err := parseKey(name); err == nil {
				names = append(names, k.registry)
			}
		}
		slices.Sort(names)
		return failf(ErrNotFound, "there is no registry %q%s", clip(registry), didYouMean(registry, slices.Compact(names)))
	}
	if region != "" && !w.has(ReplicaPrefix(registry, region)) {
		return failf(ErrNotFound, "registry %s has no replica in %q%s", registry, clip(region), didYouMean(region, w.regions(registry)))
	}
	return nil
}

func didYouMean(word string, known []string) string {
	if near, ok := nearmiss.Of(word, known); ok {
		return fmt.Sprintf("; did you mean %s?", near)
	}
	if len(known) > 0 && len(known) <= 10 {
		return "; there is " + strings.Join(known, ", ")
	}
	return ""
}

// with adds writes that go into the transaction of a replica.
func (w *workspace) with(registry, region string, ops ...store.Op) {
	id := registry + "/" + region
	w.also[id] = append(w.also[id], ops...)
}

// forget removes what was reported and asked of a replica: it belongs to what stood there, not to the name.
func (w *workspace) forget(registry, region string) {
	w.with(registry, region, store.Delete(ReplicationKey(registry, region)))
	w.forgetRequests(registry, region)
}

func (w *workspace) forgetRequests(registry, region string) {
	for _, verb := range []string{RequestDelete, RequestResync, RequestAccept} {
		w.with(registry, region, store.Delete(RequestKey(registry, region, verb)))
	}
}

// begin forgets what was reported and asked of a replica that comes, as it is of what stood there before. Where the guard holds the edit
// that took it away, it never left: this edit only takes that one back. Nor did it leave where the store lost its keys: what is
// reported there is newer than the loss, but nothing may be asked of it by then.
func (w *workspace) begin(registry, region string) {
	if lost := w.editor.options.Lost; lost != nil && lost() {
		w.forgetRequests(registry, region)
		return
	}
	if pending := w.editor.options.Pending; pending != nil {
		for _, p := range pending() {
			if p.Registry == registry && slices.Contains(p.Missing, region) {
				return
			}
		}
	}
	w.forget(registry, region)
}

// CreateRegistry creates a registry with its replicas; the one in the home region must be among them.
func (e *Editor) CreateRegistry(ctx context.Context, r RegistryDocument) error {
	d := Document{Registries: []RegistryDocument{r}}
	if err := d.Validate(e.options.Reserved...); err != nil {
		return within(err, "registries[0].")
	}
	err := e.edit(ctx, func(w *workspace) error {
		o := d.outline()
		for name, value := range w.before {
			if strings.HasPrefix(name, registryPrefix(r.Name)) && (strings.HasSuffix(name, "/"+fieldHome) || o.values[name] != value) {
				return failf(ErrExists, "registry %s exists already", r.Name)
			} // else it is what an earlier attempt, in parts, could write
		}
		w.path = o.path
		maps.Copy(w.after, o.values)
		for _, p := range r.Replicas {
			w.begin(r.Name, p.Region)
		}
		return nil
	})
	return within(err, "registries[0].")
}

// within shortens the paths of faults to what the caller gave, which stands at prefix in the document that was made of it.
func within(err error, prefix string) error {
	var invalid *InvalidError
	if !errors.As(err, &invalid) {
		return err
	}
	faults := slices.Clone(invalid.Faults)
	for i := range faults {
		faults[i].Path = strings.TrimPrefix(faults[i].Path, prefix)
	}
	return &InvalidError{Faults: faults}
}

// DeleteRegistry removes a registry with all its replicas from the topology: its name leads nowhere any more. No content
// of any replica is deleted.
func (e *Editor) DeleteRegistry(ctx context.Context, name string) error {
	return e.edit(ctx, func(w *workspace) error {
		if err := w.need(name, ""); err != nil {
			return err
		}
		for _, region := range w.regions(name) {
			if checkLabel(region) == nil {
				w.forget(name, region)
			}
		}
		w.remove(registryPrefix(name))
		return nil
	})
}

// UpdateRegistry lets change modify what is declared of a registry itself: its home, client names and policy. What change leaves as it
// is is not written, so a value that is there but cannot be used stays as well; nor are orders, fences and replicas.
func (e *Editor) UpdateRegistry(ctx context.Context, name string, change func(*RegistryDocument)) error {
	err := e.edit(ctx, func(w *workspace) error {
		if err := w.need(name, ""); err != nil {
			return err
		}
		r := RegistryDocument{Name: name}
		if d := w.declared(registryPrefix(name)); len(d.Registries) == 1 {
			r = d.Registries[0]
		}
		r.Orders, r.Fences, r.Replicas = RulesDocument{}, RulesDocument{}, nil
		d := Document{Registries: []RegistryDocument{r}}
		before := d.outline()
		change(&d.Registries[0])
		if d.Registries[0].Name != name {
			return failf(ErrRefused, "the name of a registry cannot be changed: create one named %q and delete this one", clip(d.Registries[0].Name))
		}
		after := d.outline()
		if len(after.faults) > 0 {
			return &InvalidError{Faults: after.faults}
		}
		w.path = after.path
		w.replace(before.values, after.values)
		return nil
	})
	return within(err, "registries[0].")
}

// replace writes where after differs from before; what else is there stays.
func (w *workspace) replace(before, after Values) {
	for name := range before {
		if _, stays := after[name]; !stays {
			delete(w.after, name)
		}
	}
	for name, value := range after {
		if value != before[name] {
			w.after[name] = value
		}
	}
}

// CreateReplica adds a replica to a registry.
func (e *Editor) CreateReplica(ctx context.Context, registry string, r ReplicaDocument) error {
	values, err := replicaValues(registry, r)
	if err != nil {
		return err
	}
	return e.edit(ctx, func(w *workspace) error {
		if err := w.need(registry, ""); err != nil {
			return err
		}
		prefix := ReplicaPrefix(registry, r.Region)
		if w.has(prefix) {
			deleting, err := w.deleting(registry, r.Region)
			if err != nil {
				return err
			}
			if deleting {
				return failf(ErrDeleting, "replica %s/%s is being deleted, which cannot be called off: create it again when it is gone (portolan replica list %s)", registry, r.Region, registry)
			}
			return failf(ErrExists, "registry %s has a replica in %s already: portolan replica update %[1]s/%[2]s changes it", registry, r.Region)
		}
		w.path = trimPath(prefix)
		maps.Copy(w.after, values)
		w.begin(registry, r.Region)
		return nil
	})
}

// UpdateReplica lets change modify what is declared of a replica. What change leaves as it is is not written, so a value
// that is there but cannot be used stays as well. Of a replica that is being deleted only what it is spoken to with can be
// changed, as what is only there may have to be carried away with other credentials. Another weight, or other routing, ends a ramp.
func (e *Editor) UpdateReplica(ctx context.Context, registry, region string, change func(*ReplicaDocument)) error {
	return e.update(ctx, registry, region, change, nil)
}

// update is UpdateReplica; ramp, if there is one, begins a new ramp in the place of one under way.
func (e *Editor) update(ctx context.Context, registry, region string, change func(*ReplicaDocument), ramp func(*workspace) error) error {
	return e.edit(ctx, func(w *workspace) error {
		if err := w.need(registry, region); err != nil {
			return err
		}
		prefix := ReplicaPrefix(registry, region)
		r := ReplicaDocument{Region: region}
		if d := w.declared(prefix); len(d.Registries) == 1 && len(d.Registries[0].Replicas) == 1 {
			r = d.Registries[0].Replicas[0]
		}
		before, err := replicaValues(registry, r)
		if err != nil {
			before = Values{}
		}
		change(&r)
		if r.Region != region {
			return failf(ErrRefused, "the region of a replica cannot be changed: create one in %q and delete this one", clip(r.Region))
		}
		after, err := replicaValues(registry, r)
		if err != nil {
			return err
		}
		w.path = trimPath(prefix)
		differs := func(field string) bool {
			return before.replica(registry, region, field) != after.replica(registry, region, field)
		}
		if ramp != nil || differs(fieldWeight) || differs(fieldRouting) {
			w.endRamp(registry, region)
		}
		w.replace(before, after)
		if ramp != nil {
			if err := ramp(w); err != nil {
				return err
			}
		}
		for _, c := range diffValues(w.before, w.after) {
			if slices.Contains(accessFields, strings.TrimPrefix(c.Key, prefix)) {
				continue
			}
			deleting, err := w.deleting(registry, region)
			if err == nil && deleting {
				err = failf(ErrDeleting, "replica %s/%s is being deleted, which cannot be called off; until it is gone only %s can be changed: create it again then", registry, region, strings.Join(accessFields, ", "))
			}
			return err
		}
		return nil
	})
}

// accessFields are the keys of a replica that say how it is spoken to, not what it is.
var accessFields = []string{fieldCredentials, fieldCA, fieldClientCert, fieldRealms}

// deleting reports whether the deletion of a replica has begun.
func (w *workspace) deleting(registry, region string) (bool, error) {
	_, err := w.editor.store.Get(w.ctx, RequestKey(registry, region, RequestDelete))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, store.ErrNotFound):
		return false, nil
	}
	return false, fmt.Errorf("reading whether replica %s/%s is being deleted: %w", registry, region, err)
}

// trimPath names the keys of a replica by their ends.
func trimPath(prefix string) func(string) string {
	return func(name string) string {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return strings.ReplaceAll(rest, "/", ".")
		}
		return name
	}
}

// replicaValues are the keys of one replica, each well formed.
func replicaValues(registry string, r ReplicaDocument) (Values, error) {
	if err := checkLabel(registry); err != nil {
		return nil, failf(ErrNotFound, "there is no such registry: %v", err)
	}
	d := Document{Registries: []RegistryDocument{{Name: registry, Replicas: []ReplicaDocument{r}}}}
	named, _, faults := d.named()
	o := named.outline()
	faults = append(faults, o.faults...)
	for _, name := range slices.Sorted(maps.Keys(o.values)) {
		k, err := parseKey(name)
		if err == nil {
			err = k.check(o.values[name])
		}
		if err != nil {
			faults = append(faults, Fault{Path: o.path(name), Reason: err.Error()})
		}
	}
	for i := range faults {
		faults[i].Path = strings.TrimPrefix(faults[i].Path, "registries[0].replicas[0].")
	}
	if len(faults) > 0 {
		return nil, &InvalidError{Faults: faults}
	}
	return o.values, nil
}

// DeleteReplica begins the deletion of a replica: no clients are sent there from now on, and the request is left that the
// replicator finishes, once the last answers have expired and what was pushed there alone is elsewhere, with
// RemoveReplica. Asking again changes nothing, except that force is added. Until then its routing cannot be enabled.
func (e *Editor) DeleteReplica(ctx context.Context, registry, region string, r Request) error {
	if r.Time.IsZero() {
		r.Time = e.options.Now().UTC()
	}
	return e.edit(ctx, func(w *workspace) error {
		if err := w.leave(registry, region); err != nil {
			return err
		}
		return w.requestDelete(registry, region, r)
	})
}

// leave refuses the removal of a replica that must stay.
func (w *workspace) leave(registry, region string) error {
	if err := w.need(registry, region); err != nil {
		return err
	}
	if w.after[registryPrefix(registry)+fieldHome] == region {
		return failf(ErrRefused, "%s is the home region of registry %s: its replica stays: make another the home first with portolan registry update %s --home REGION, or end the whole registry with portolan registry delete %s", region, registry, registry, registry)
	}
	for name, value := range w.after {
		if k, err := parseKey(name); err == nil && k.registry == registry && k.field == "fences" && slices.Equal(splitList(value), []string{region}) {
			return failf(ErrRefused, "the fence %s of registry %s names %s alone: its clients would have no replica, or the fence would have to go; change it first", k.match, registry, region)
		}
	}
	return nil
}

func (w *workspace) requestDelete(registry, region string, r Request) error {
	w.endRamp(registry, region)
	w.after[ReplicaPrefix(registry, region)+fieldRouting] = "disabled"
	name := RequestKey(registry, region, RequestDelete)
	e, err := w.editor.store.Get(w.ctx, name)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("reading %s: %w", name, err)
	}
	var before Request
	if err == nil && json.Unmarshal([]byte(e.Value), &before) == nil {
		if before.Force || !r.Force {
			return nil // the drain goes on from when it began
		}
		r.Time = before.Time
	}
	value, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("writing the request: %w", err)
	}
	w.with(registry, region, store.PutIf(name, string(value), e.Revision))
	return nil
}

// stayDrained refuses to send clients again to a replica whose deletion has begun: it would end under them; and to make it the home,
// which stays: it would never end.
func (w *workspace) stayDrained() error {
	for _, name := range slices.Sorted(maps.Keys(w.before)) {
		k, err := parseKey(name)
		if home := w.after[name]; err == nil && k.field == fieldHome && home != w.before[name] && w.has(ReplicaPrefix(k.registry, home)) {
			deleting, err := w.deleting(k.registry, home)
			if err != nil {
				return err
			}
			if deleting {
				return failf(ErrDeleting, "replica %s/%s is being deleted, which cannot be called off: it cannot become the home", k.registry, home)
			}
		}
		if err != nil || k.field != fieldRouting || w.before[name] != "disabled" || w.after[name] == "disabled" || !w.has(ReplicaPrefix(k.registry, k.region)) {
			continue
		}
		deleting, err := w.deleting(k.registry, k.region)
		if err != nil {
			return err
		}
		if deleting {
			return failf(ErrDeleting, "replica %s/%s is being deleted, which cannot be called off: take it out of the topology file, or create it again when it is gone", k.registry, k.region)
		}
	}
	return nil
}

// RemoveReplica takes a replica out of the topology, and out of orders and fences, with all that was reported and asked of
// it: the end of a deletion. One that is not there is no error.
func (e *Editor) RemoveReplica(ctx context.Context, registry, region string) error {
	return e.edit(ctx, func(w *workspace) error {
		if checkLabel(registry) != nil || checkLabel(region) != nil {
			return failf(ErrNotFound, "there is no replica %q of registry %q", clip(region), clip(registry))
		}
		w.forget(registry, region)
		if !w.has(ReplicaPrefix(registry, region)) {
			return nil
		}
		if err := w.leave(registry, region); err != nil {
			return err
		}
		w.remove(ReplicaPrefix(registry, region))
		for name, value := range maps.Clone(w.after) {
			k, err := parseKey(name)
			if err != nil || k.registry != registry || !k.isRule() {
				continue
			}
			names := splitList(value)
			rest := slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == region })
			switch {
			case len(rest) == len(names):
			case len(rest) == 0:
				delete(w.after, name)
			default:
				w.after[name] = joinList(rest)
			}
		}
		return nil
	})
}

// Apply makes d the topology of the registries that it names; others are left alone, with prune too. What d does not say of
// a replica gets its default. A replica that d does not name is kept, and said so in the changes (Kept, or Leaving), unless prune is
// set: then its deletion begins, as with DeleteReplica. With dryRun nothing is written. The result is what
// changed, or would. The weight of a ramp is the one that it leads to; a change of it, or of routing, ends the ramp. An order or a fence
// that names regions without a replica is refused, unless it stands there so already.
func (e *Editor) Apply(ctx context.Context, d Document, prune, dryRun bool) ([]Change, error) {
	o := d.outline()
	var changes []Change
	err := e.run(ctx, dryRun, func(w *workspace) error {
		if err := d.validateOver(w.before, e.options.Reserved); err != nil {
			return err
		}
		w.path = o.path
		changes = nil
		var extra []Change
		before, after := Values{}, maps.Clone(o.values)
		declared := w.before.declared()
		for i := range d.Registries {
			r := &d.Registries[i]
			fresh := !w.has(registryPrefix(r.Name))
			for name, value := range declared {
				k, err := parseKey(name)
				if err != nil || k.registry != r.Name {
					continue
				}
				before[name] = value
				if k.region != "" && o.paths[ReplicaPrefix(r.Name, k.region)] == "" {
					after[name] = value
				}
			}
			for _, region := range w.regions(r.Name) {
				prefix := ReplicaPrefix(r.Name, region)
				if o.paths[prefix] != "" || checkLabel(region) != nil {
					continue
				}
				if !prune {
					deleting, err := w.deleting(r.Name, region)
					if err != nil {
						return err
					}
					op := Kept
					if deleting {
						op = Leaving
					}
					extra = append(extra, Change{Op: op, Key: prefix})
					continue
				}
				extra = append(extra, Change{Op: Removed, Key: prefix})
				if err := w.requestDelete(r.Name, region, Request{Time: e.options.Now().UTC(), Actor: "apply --prune"}); err != nil {
					return err
				}
				after[prefix+fieldRouting] = "disabled"
			}
			for _, p := range r.Replicas {
				if fresh || !w.has(ReplicaPrefix(r.Name, p.Region)) {
					w.begin(r.Name, p.Region)
				}
			}
		}
		for _, c := range diffValues(before, after) {
			if k, err := parseKey(c.Key); err == nil && (k.field == fieldWeight || k.field == fieldRouting) {
				extra = append(extra, w.endRamp(k.registry, k.region)...)
			}
			if c.Op == Removed {
				delete(w.after, c.Key)
			} else {
				w.after[c.Key] = after[c.Key]
			}
			changes = append(changes, c)
		}
		changes = append(changes, extra...)
		slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.Key, b.Key) })
		return nil
	})
	if err != nil {
		return nil, err
	}
	return changes, nil
}

// Export returns what operators declared: of a weight with a ramp, the one that it leads to. Values that cannot be read are left
// out; their replicas stand there without.
func (e *Editor) Export(ctx context.Context) (Document, error) {
	tree, err := e.store.List(ctx, RegistriesPrefix)
	if err != nil {
		return Document{}, fmt.Errorf("reading the topology: %w", err)
	}
	return documentOf(ValuesOf(tree).declared()), nil
}

// Diff tells in what the store differs from d, in all registries: of a weight with a ramp it takes the one that it leads to. A value that
// cannot be used is one that differs, since to apply d removes it, and with it the last good one that is in force. What is wrong with d is
// refused as by Apply.
func (e *Editor) Diff(ctx context.Context, d Document) ([]Change, error) {
	tree, err := e.store.List(ctx, RegistriesPrefix)
	if err != nil {
		return nil, fmt.Errorf("reading the topology: %w", err)
	}
	values := ValuesOf(tree).declared()
	if err := d.validateOver(values, e.options.Reserved); err != nil {
		return nil, err
	}
	maps.DeleteFunc(values, func(name, _ string) bool { _, err := parseKey(name); return err != nil }) // nobody's
	return diffValues(values, d.Values()), nil
}

// Confirm lets a raw edit pass that the guard holds: what stands in the store now is all of the registry.
func (e *Editor) Confirm(ctx context.Context, registry string) error {
	if err := checkLabel(registry); err != nil {
		return failf(ErrNotFound, "there is no such registry: %v", err)
	}
	if err := e.takeTurn(ctx); err != nil {
		return err
	}
	defer e.endTurn()
	for range editAttempts {
		if err := e.confirm(ctx, registry); !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return errBusy()
}

// confirm confirms what it reads, if that still stands when it is confirmed: else store.ErrConflict.
func (e *Editor) confirm(ctx context.Context, registry string) error {
	before, err := e.store.Get(ctx, ConfirmedKey(registry))
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return fmt.Errorf("reading %s: %w", ConfirmedKey(registry), err)
	}
	tree, err := e.store.List(ctx, RegistriesPrefix)
	if err != nil {
		return fmt.Errorf("reading the topology: %w", err)
	}
	values := ValuesOf(tree)
	regions, there := present(values)[registry]
	if e.options.Pending != nil && !slices.ContainsFunc(e.options.Pending(), func(p Pending) bool { return p.Registry == registry }) {
		if !there {
			return failf(ErrNotFound, "there is no registry %q", registry)
		}
		return failf(ErrRefused, "nothing of registry %s waits to be confirmed", registry)
	}
	if home := values[registryPrefix(registry)+fieldHome]; there && !slices.Contains(regions, home) {
		if home == "" {
			return failf(ErrRefused, "the home of registry %s was taken away, but not all of its keys: put it back, or delete the registry", registry)
		}
		return failf(ErrRefused, "the replica in the home region %s is among what was taken away, and it stays as long as registry %s does: put it back, or delete the registry", home, registry)
	}
	if _, err := e.store.Commit(ctx, store.PutIf(ConfirmedKey(registry), confirmation(regions), before.Revision)); err != nil {
		return fmt.Errorf("confirming registry %s: %w", registry, err)
	}
	if actor := actorOf(ctx); actor != "" {
		e.options.Logger.Info("what of a registry was held is confirmed", zap.String("by", actor), zap.String("registry", registry), zap.Strings("remaining", regions))
	}
	return nil
}

func (e *Editor) edit(ctx context.Context, change func(*workspace) error) error {
	return e.run(ctx, false, change)
}

// run carries out an edit, and again from the start when somebody else was faster.
func (e *Editor) run(ctx context.Context, dryRun bool, change func(*workspace) error) error {
	if !dryRun {
		if err := e.takeTurn(ctx); err != nil {
			return err
		}
		defer e.endTurn()
	}
	for range editAttempts {
		// The time of the last change is read first: every edit writes it, so one that came after this read is noticed,
		// also where it touched other keys.
		state, err := e.store.List(ctx, topologyPrefix)
		if err != nil {
			return fmt.Errorf("reading %s: %w", topologyPrefix, err)
		}
		tree, err := e.store.List(ctx, RegistriesPrefix)
		if err != nil {
			return fmt.Errorf("reading the topology: %w", err)
		}
		values := ValuesOf(tree)
		w := &workspace{ctx: ctx, editor: e, before: values, after: maps.Clone(values), tree: tree, also: map[string][]store.Op{}}
		if err := change(w); err != nil {
			return err
		}
		if err := e.validate(w); err != nil {
			return err
		}
		if err := w.stayDrained(); err != nil {
			return err
		}
		if dryRun {
			return nil
		}
		err = e.commit(ctx, w, state)
		if changes := diffValues(w.before, w.after); err == nil && len(changes) > 0 && actorOf(ctx) != "" {
			e.options.Logger.Info("the topology was edited", zap.String("by", actorOf(ctx)), zap.Strings("changes", logged(changes)))
		}
		if !errors.Is(err, store.ErrConflict) {
			return err
		}
	}
	return errBusy()
}

func errBusy() error {
	return failf(ErrConflict, "the topology was changed by others %d times in a row; nothing was changed here: try again", editAttempts)
}

// validate refuses an edit that brings a problem that was not there.
func (e *Editor) validate(w *workspace) error {
	old, good := Parse(w.before, nil, e.options.Reserved)
	result, _ := Parse(w.after, nil, e.options.Reserved)
	problems := result.Problems
	// Of two values that cannot stand together the new one is to blame.
	if blamed, _ := Parse(w.after, good, e.options.Reserved); len(blamed.Problems) == len(problems) {
		problems = blamed.Problems
	}
	var faults []Fault
	for _, p := range problems {
		if slices.ContainsFunc(old.Problems, func(q Problem) bool { return q.Key == p.Key && q.Reason == p.Reason }) {
			continue
		}
		path := p.Key
		if w.path != nil {
			path = w.path(p.Key)
		}
		faults = append(faults, Fault{Path: path, Reason: p.Reason})
	}
	if len(faults) > 0 {
		return &InvalidError{Faults: faults}
	}
	if e.options.Pending == nil {
		return nil
	}
	before, after := present(w.before), present(w.after)
	for _, p := range e.options.Pending() {
		regions, stays := after[p.Registry]
		if !stays {
			continue // the end of the whole registry is what it confirms
		}
		// What brings everything back takes the held edit back, and may bring more.
		back := !slices.ContainsFunc(p.Missing, func(region string) bool { return !slices.Contains(regions, region) })
		for _, region := range regions {
			if !back && !slices.Contains(before[p.Registry], region) && !slices.Contains(p.Missing, region) {
				return p.refuse()
			}
		}
		for _, region := range before[p.Registry] {
			if !slices.Contains(regions, region) {
				return p.refuse()
			}
		}
	}
	return nil
}

// refuse is why the regions of a registry cannot be changed while an edit is held: it would be confirmed with them.
func (p Pending) refuse() error {
	return failf(ErrRefused, "an edit of registry %s is held that takes away %s: %s",
		p.Registry, strings.Join(p.Missing, ", "), p.Way())
}

// group is what must not be torn apart: all of a replica, or of a registry itself.
type group struct {
	phase            int
	registry, region string
	ops              []store.Op
}

// groups orders the writes so that every beginning of them is a sound topology: replicas come before what names them, and
// go after it. A new registry has its home last, and is not served before.
func (w *workspace) groups() []*group {
	var list []*group
	of := func(registry, region string, order bool) *group {
		gone := !w.has(registryPrefix(registry))
		phase := 2
		switch {
		case gone && order: // a fence goes with the registry, for it binds until the end
		case gone && (region == "" || region == w.before[registryPrefix(registry)+fieldHome]):
			region, phase = "", 4 // the home replica goes with the registry
		case gone, region != "" && !w.has(ReplicaPrefix(registry, region)):
			phase = 3
		case region != "":
			phase = 1
		}
		for _, g := range list {
			if g.phase == phase && g.registry == registry && g.region == region {
				return g
			}
		}
		g := &group{phase: phase, registry: registry, region: region}
		list = append(list, g)
		return g
	}
	all := maps.Clone(w.before)
	maps.Copy(all, w.after)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		old, was := w.before[name]
		value, is := w.after[name]
		if was == is && old == value {
			continue
		}
		rest := strings.TrimPrefix(name, RegistriesPrefix)
		registry, rest, _ := strings.Cut(rest, "/")
		region := ""
		if tail, ok := strings.CutPrefix(rest, "replicas/"); ok {
			region, _, _ = strings.Cut(tail, "/")
		}
		g := of(registry, region, strings.HasPrefix(rest, "orders/"))
		e, _ := w.tree.Get(name)
		if is {
			g.ops = append(g.ops, store.PutIf(name, value, e.Revision))
		} else {
			g.ops = append(g.ops, store.DeleteIf(name, e.Revision))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(w.also)) {
		registry, region, _ := strings.Cut(id, "/")
		g := of(registry, region, false)
		g.ops = append(g.ops, w.also[id]...)
	}
	slices.SortStableFunc(list, func(a, b *group) int {
		return cmp.Or(a.phase-b.phase, strings.Compare(a.registry, b.registry), strings.Compare(a.region, b.region))
	})
	return list
}

// commit writes the edit in as few transactions as its size allows. store.ErrConflict means that nothing was written.
func (e *Editor) commit(ctx context.Context, w *workspace, state store.Tree) error {
	var batches [][]store.Op
	var size, registries int
	seen := map[string]bool{}
	add := func(ops []store.Op, registry string) {
		bytes := 0
		for _, op := range ops {
			bytes += len(op.Key) + len(op.Value)
		}
		last := len(batches) - 1
		if !seen[registry] {
			registries++
		}
		if last < 0 || len(batches[last])+len(ops) > batchSize || size+bytes > batchBytes || registries > store.MaxOps-batchSize-2 {
			batches = append(batches, nil)
			last, size, registries = last+1, 0, 1
			clear(seen)
		}
		seen[registry] = true
		batches[last] = append(batches[last], ops...)
		size += bytes
	}
	for _, g := range w.groups() {
		for part := range slices.Chunk(g.ops, batchSize) {
			add(part, g.registry)
		}
	}
	values := maps.Clone(w.before)
	for i, batch := range batches {
		before := present(values)
		for _, op := range batch {
			if !strings.HasPrefix(op.Key, RegistriesPrefix) {
				continue
			}
			switch op.Verb {
			case store.VerbPutIf:
				values[op.Key] = op.Value
			case store.VerbDeleteIf:
				delete(values, op.Key)
			}
		}
		s, _ := Parse(values, nil, e.options.Reserved)
		confirmations := e.confirmations(before, present(values))
		var err error
		for attempt := range editAttempts {
			if i > 0 || attempt > 0 { // a server noted the time of what came before
				if state, err = e.store.List(ctx, topologyPrefix); err != nil {
					break
				}
			}
			if _, err = e.store.Commit(ctx, slices.Concat(batch, confirmations, stampOps(state, s.Digest, e.options.Now()))...); err == nil || i == 0 || !errors.Is(err, store.ErrConflict) {
				break
			}
		}
		switch {
		case err == nil:
		case i == 0 && errors.Is(err, store.ErrConflict):
			return err
		case i == 0:
			return fmt.Errorf("writing the topology: %w", err)
		case errors.Is(err, store.ErrConflict):
			return failf(ErrConflict, "the topology was changed by others while this edit was written in parts: %d of %d are done; do it again to complete it", i, len(batches))
		default:
			return fmt.Errorf("writing the topology in parts, %d of %d are done; do it again to complete it: %w", i, len(batches), err)
		}
	}
	return nil
}

// confirmations tell the guard which regions a registry has now, where an edit changed them, on all servers, also those that
// hear of several edits at once. Where a raw edit is held, nothing is confirmed along the way but the end of the registry.
func (e *Editor) confirmations(before, after map[string][]string) []store.Op {
	held := map[string]bool{}
	if e.options.Pending != nil {
		for _, p := range e.options.Pending() {
			held[p.Registry] = true
		}
	}
	var ops []store.Op
	all := maps.Clone(before)
	maps.Copy(all, after)
	for _, registry := range slices.Sorted(maps.Keys(all)) {
		_, was := before[registry]
		_, is := after[registry]
		if (was != is || !slices.Equal(before[registry], after[registry])) && !(held[registry] && is) {
			ops = append(ops, store.Put(ConfirmedKey(registry), confirmation(after[registry])))
		}
	}
	return ops
}
