package health

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"portolan/router"
	"portolan/store"
	"portolan/topology"
)

// This file is what votes come to, apart from the store that carries them and from the clock.

const (
	// quorum is how many servers must be heard, this one included, for votes to decide: of two that differ neither is right.
	quorum = 3
	// heartbeat is how often a ballot is written that says nothing new. It is also how long a vote may be outvoted before that
	// counts as settled.
	heartbeat = 5 * time.Second
	// voteLife is how long a ballot counts after it was last seen to be written: three heartbeats.
	voteLife = 3 * heartbeat
	// voteMemory is how long the ballot of a server that is silent is kept, for people to see.
	voteMemory = time.Hour
)

// ballot is what one server says of all addresses, as it stands in the store.
type ballot struct {
	// Instance tells processes apart that vote under one name, which must not be.
	Instance string `json:"instance"`
	// Time is when it was written, by the voter's clock.
	Time time.Time `json:"time"`
	// Abstains: its author sees everything down, which tells of its own net rather than of the replicas.
	Abstains bool `json:"abstains,omitempty"`
	// Up and Down are the places, as registry/region/address, sorted. What is in neither is not known to the voter.
	Up   []string `json:"up"`
	Down []string `json:"down"`
}

// cast fills in a ballot of what own probes found.
func cast(instance string, now time.Time, own map[string]router.Health) ballot {
	b := ballot{Instance: instance, Time: now.UTC(), Up: []string{}, Down: []string{}}
	for _, place := range slices.Sorted(maps.Keys(own)) {
		switch own[place] {
		case router.Healthy:
			b.Up = append(b.Up, place)
		case router.Unhealthy:
			b.Down = append(b.Down, place)
		}
	}
	b.Abstains = len(b.Up) == 0 && len(b.Down) > 0
	return b
}

// says is what the ballot says of a place.
func (b *ballot) says(place string) router.Health {
	if _, up := slices.BinarySearch(b.Up, place); up {
		return router.Healthy
	}
	if _, down := slices.BinarySearch(b.Down, place); down {
		return router.Unhealthy
	}
	return router.Unknown
}

// same is whether b and o say the same, whenever they were written.
func (b *ballot) same(o *ballot) bool {
	return b.Abstains == o.Abstains && slices.Equal(b.Up, o.Up) && slices.Equal(b.Down, o.Down)
}

// agree is what counts of a place of which own is what this server's probes found, and votes what the servers say that do not
// abstain, this one included. The majority decides if at least quorum servers were heard, those that abstain included, and if it
// is more than one vote: a place that a single server can reach, over IPv6 say, has one. Otherwise own does.
func agree(own router.Health, votes []Vote, servers int) router.Health {
	var up, down int
	for _, v := range votes {
		switch v.Health {
		case router.Healthy:
			up++
		case router.Unhealthy:
			down++
		}
	}
	switch {
	case servers < quorum || max(up, down) < 2 || up == down:
		return own
	case up > down:
		return router.Healthy
	}
	return router.Unhealthy
}

// CheckVoter says what is wrong with the name that a server votes under, if anything.
func CheckVoter(name string) error {
	const allowed = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
	if name == "" || len(name) > 100 || name[0] == '.' || strings.ContainsFunc(name, func(r rune) bool { return !strings.ContainsRune(allowed, r) }) {
		return fmt.Errorf("%.100q cannot be a voter's name: up to 100 letters, digits, hyphens, underscores and dots, the first no dot", name)
	}
	return nil
}

// Voter is a server whose ballot is in the store.
type Voter struct {
	// Name is how it calls itself (the setting health.voter).
	Name string `json:"name"`
	// Self is whether it is the server that tells.
	Self bool `json:"self,omitempty"`
	// Heard is when its ballot was last seen to be written.
	Heard time.Time `json:"heard"`
	// Fresh is whether its votes count: it was heard within the last 15 seconds.
	Fresh bool `json:"fresh"`
	// Abstains is whether it sees everything down, so that its votes do not count.
	Abstains bool `json:"abstains,omitempty"`
	// Up and Down count the addresses that it finds so.
	Up   int `json:"up"`
	Down int `json:"down"`
}

// Vote is what one server says of an address.
type Vote struct {
	Voter  string        `json:"voter"`
	Health router.Health `json:"-"`
	// Says is Health in words.
	Says string `json:"says"`
}

// electorate is what is known of all ballots. It is not safe for concurrent use.
type electorate struct {
	name, instance string
	others         map[string]heard // by voter
	// away is whether the store cannot be read: then no vote counts, since those that changed would not be seen.
	away bool
	// written is the revision of this server's own ballot; zero before the first.
	written uint64
	// rival is when another process was last seen to vote under this server's name.
	rival time.Time
}

// heard is a ballot with when it was last seen to be written, on this machine's clock.
type heard struct {
	ballot
	revision uint64
	at       time.Time
}

// hear takes in what the store holds.
func (e *electorate) hear(u store.Update, now time.Time) {
	e.away = u.Err != nil
	if e.away {
		return
	}
	others := make(map[string]heard, len(u.Tree.Entries))
	for _, entry := range u.Tree.Entries {
		name := strings.TrimPrefix(entry.Key, topology.VotesPrefix)
		var b ballot
		if json.Unmarshal([]byte(entry.Value), &b) != nil {
			continue // a newer version's, or nobody's: it has no vote here
		}
		if name == e.name {
			if b.Instance != e.instance && e.written != 0 && entry.Revision > e.written {
				e.rival = now
			}
			continue
		}
		h, known := e.others[name]
		switch {
		case !known:
			// How old it is only the voter's clock can tell, this once: a server that died long ago must not vote now.
			h.at = b.Time
			if h.at.After(now) {
				h.at = now
			}
		case h.revision != entry.Revision:
			h.at = now
		}
		h.ballot, h.revision = b, entry.Revision
		others[name] = h
	}
	e.others = others
}

// fresh is whether the votes of h count.
func (h *heard) fresh(now time.Time) bool { return now.Sub(h.at) < voteLife }

// present are the names of the servers whose ballots count or abstain, but for this one, sorted.
func (e *electorate) present(now time.Time) []string {
	if e == nil || e.away {
		return nil
	}
	var names []string
	for name, h := range e.others {
		if h.fresh(now) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// votes are the votes on a place of those present, and of this server, whose ballot is own.
func (e *electorate) votes(place string, present []string, own *ballot) []Vote {
	if len(present) == 0 {
		return nil
	}
	votes := make([]Vote, 0, len(present)+1)
	add := func(name string, b *ballot) {
		if h := b.says(place); h != router.Unknown && !b.Abstains {
			votes = append(votes, Vote{Voter: name, Health: h, Says: h.String()})
		}
	}
	add(e.name, own)
	for _, name := range present {
		h := e.others[name]
		add(name, &h.ballot)
	}
	return votes
}

// voters lists all whose ballots are known, this server first.
func (e *electorate) voters(now time.Time, own *ballot) []Voter {
	if e == nil {
		return nil
	}
	list := []Voter{{Name: e.name, Self: true, Heard: now, Fresh: true, Abstains: own.Abstains, Up: len(own.Up), Down: len(own.Down)}}
	for name, h := range e.others {
		list = append(list, Voter{Name: name, Heard: h.at, Fresh: !e.away && h.fresh(now), Abstains: h.Abstains, Up: len(h.Up), Down: len(h.Down)})
	}
	slices.SortFunc(list[1:], func(a, b Voter) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// silent are the keys of ballots that nobody writes any more, with conditions to remove them.
func (e *electorate) silent(now time.Time) (ops []store.Op) {
	for name, h := range e.others {
		if now.Sub(h.at) > voteMemory && len(ops) < store.MaxOps {
			ops = append(ops, store.DeleteIf(topology.VoteKey(name), h.revision))
		}
	}
	return ops
}
