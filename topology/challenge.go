package topology

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"portolan/store"
)

// Challenge is a token by which an ACME client shows that a name is its (DNS-01: RFC 8555, section 8.4): a TXT record at
// _acme-challenge.NAME.
type Challenge struct {
	// Name is what the certificate is for, fully qualified, in lower case, without a final dot and without a "*." before it.
	Name string
	// Token is the text of the record: 43 characters of base64url, as ACME makes them.
	Token string
	// Expires is when it goes away if nobody clears it.
	Expires time.Time
}

const (
	// challengesPrefix is below what a Keeper watches for the time of the newest change: so a challenge and the serial that
	// it brings are read at once. A key is a name and a token, its value the end in RFC 3339.
	challengesPrefix = topologyPrefix + "acme/"
	// maxChallenges bounds what the store holds of them; each is some hundred bytes of memory in every server.
	maxChallenges = 1000
	// maxNameChallenges keeps the records of one name within a message. A name and its wildcard need two.
	maxNameChallenges = 20
	// maxToken is longer than any token of ACME.
	maxToken = 128
	// maxLifetime is as long as an authorization stays pending at the known authorities.
	maxLifetime = 7 * 24 * time.Hour
	// maxSwept is how many expired challenges one edit takes along.
	maxSwept = 16
)

// Key is where the store keeps c.
func (c Challenge) Key() string { return challengesPrefix + c.Name + "/" + c.Token }

// check says what is wrong with c at the time now.
func (c Challenge) check(now time.Time) error {
	for label := range strings.SplitSeq(c.Name, ".") {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return failf(ErrInvalid, "%.100q is no domain name", c.Name)
		}
	}
	if len(c.Name) > 253-len("_acme-challenge.") {
		return failf(ErrInvalid, "the name %.60s... is too long to have a challenge", c.Name)
	}
	if c.Token == "" || len(c.Token) > maxToken || strings.Trim(c.Token, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
		return failf(ErrInvalid, "%.60q is no token: want the value of the TXT record that the ACME client names, 43 letters, digits, - and _", c.Token)
	}
	if life := c.Expires.Sub(now); life <= 0 || life > maxLifetime {
		return failf(ErrInvalid, "a challenge lives for more than nothing and at most %v", maxLifetime)
	}
	return nil
}

// challenges reads those in a tree of topologyPrefix, sorted by name and token; what is none is left out.
func challenges(stored store.Tree) []Challenge {
	var list []Challenge
	for _, e := range stored.Entries {
		rest, ok := strings.CutPrefix(e.Key, challengesPrefix)
		if !ok {
			continue
		}
		name, token, _ := strings.Cut(rest, "/")
		expires, err := time.Parse(time.RFC3339, strings.TrimSpace(e.Value))
		c := Challenge{Name: name, Token: token, Expires: expires.UTC()}
		if err == nil && c.check(expires.Add(-time.Second)) == nil {
			list = append(list, c)
		}
	}
	slices.SortFunc(list, func(a, b Challenge) int { return strings.Compare(a.Key(), b.Key()) })
	return list
}

// current divides the challenges: the live ones, and when the last of the others expired, zero for none: that was a change of
// the zone. All servers take that time from the same keys.
func current(all []Challenge, now time.Time) (live []Challenge, expired time.Time) {
	for _, c := range all {
		if c.Expires.After(now) {
			live = append(live, c)
		} else if c.Expires.After(expired) {
			expired = c.Expires
		}
	}
	return live, expired
}

// Challenges returns those that have not expired, by name and token.
func (e *Editor) Challenges(ctx context.Context) ([]Challenge, error) {
	stored, err := e.store.List(ctx, topologyPrefix)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", challengesPrefix, err)
	}
	live, _ := current(challenges(stored), e.options.Now())
	return live, nil
}

// SetChallenge adds c, or gives it another end. A name may have several, as it needs with its wildcard.
func (e *Editor) SetChallenge(ctx context.Context, c Challenge) error {
	c.Expires = c.Expires.UTC().Truncate(time.Second)
	if err := c.check(e.options.Now()); err != nil {
		return err
	}
	return e.challenge(ctx, func(stored store.Tree) (store.Op, error) {
		live, _ := current(challenges(stored), e.options.Now())
		same := 0
		for _, o := range live {
			if o.Name == c.Name && o.Token != c.Token {
				same++
			}
		}
		switch {
		case same >= maxNameChallenges:
			return store.Op{}, failf(ErrRefused, "%s has %d challenges already: clear those that are done with", c.Name, same)
		case len(live) >= maxChallenges:
			return store.Op{}, failf(ErrRefused, "there are %d challenges already: clear those that are done with", len(live))
		}
		old, _ := stored.Get(c.Key())
		return store.PutIf(c.Key(), c.Expires.Format(time.RFC3339), old.Revision), nil
	})
}

// ClearChallenge takes one away. ErrNotFound: there was none.
func (e *Editor) ClearChallenge(ctx context.Context, name, token string) error {
	c := Challenge{Name: name, Token: token, Expires: e.options.Now().Add(time.Second)}
	if err := c.check(e.options.Now()); err != nil {
		return err
	}
	return e.challenge(ctx, func(stored store.Tree) (store.Op, error) {
		old, there := stored.Get(c.Key())
		if !there {
			return store.Op{}, failf(ErrNotFound, "%s has no such challenge", name)
		}
		return store.DeleteIf(c.Key(), old.Revision), nil
	})
}

// challenge commits one operation together with the time of the change, and sweeps what has expired.
func (e *Editor) challenge(ctx context.Context, change func(store.Tree) (store.Op, error)) error {
	if err := e.takeTurn(ctx); err != nil {
		return err
	}
	defer e.endTurn()
	for range editAttempts {
		stored, err := e.store.List(ctx, topologyPrefix)
		if err != nil {
			return fmt.Errorf("reading %s: %w", topologyPrefix, err)
		}
		op, err := change(stored)
		if err != nil {
			return err
		}
		now := e.options.Now()
		ops := []store.Op{op}
		for _, c := range challenges(stored) {
			if old, _ := stored.Get(c.Key()); !c.Expires.After(now) && c.Key() != op.Key && len(ops) <= maxSwept {
				ops = append(ops, store.DeleteIf(c.Key(), old.Revision))
			}
		}
		_, err = e.store.Commit(ctx, append(ops, stampOps(stored, storedDigest(stored), now)...)...)
		if err == nil {
			return nil
		}
		if !errors.Is(err, store.ErrConflict) {
			return fmt.Errorf("writing the challenge: %w", err)
		}
	}
	return errBusy()
}
