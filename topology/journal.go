package topology

import (
	"context"
	"fmt"
)

// actorKey is the key of an Actor's context.
type actorKey struct{}

// WithActor returns a context for edits on behalf of somebody, such as the address that a request came from: an Editor logs who
// changed what. Edits without an actor are not logged by it.
func WithActor(ctx context.Context, actor string) context.Context {
	return context.WithValue(ctx, actorKey{}, actor)
}

// actorOf returns the actor, or nothing.
func actorOf(ctx context.Context) string {
	actor, _ := ctx.Value(actorKey{}).(string)
	return actor
}

// maxLogged bounds the changes that one line of the log tells of.
const maxLogged = 20

// logged are changes as the log has them: clipped, the first ones, and the number of those that are left out. Of a key that is none of
// the topology's only the name is told: nobody knows what its value is.
func logged(changes []Change) []string {
	var lines []string
	for i, c := range changes {
		if i == maxLogged {
			return append(lines, fmt.Sprintf("and %d more", len(changes)-i))
		}
		if _, err := parseKey(c.Key); err != nil && c.Op != Kept && c.Op != Leaving {
			c = Change{Op: c.Op, Key: clip(c.Key)}
		}
		lines = append(lines, c.String())
	}
	return lines
}
