package dns

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"net/netip"
	"sync/atomic"
	"time"

	mdns "github.com/miekg/dns"

	"portolan/router/ranges"
)

// RateLimit bounds what a network is sent over UDP, so that this server is of no use to those who ask in the name of others
// to have them flooded (response rate limiting). The zero RateLimit limits nothing.
type RateLimit struct {
	// ResponsesPerSecond is how many responses of one kind (answers, empty answers, names that do not exist, errors) go to one
	// /24 of IPv4 or /56 of IPv6 in a second; as many may come at once. From 1 to 10,000; 0 for no limit.
	ResponsesPerSecond int
	// Slip is how often, on average, a response beyond the limit is sent all the same, without records and truncated, so that
	// a real client comes back over TCP: one in Slip. 1 for all of them, 0 for none. At most 10.
	Slip int
	// Exempt are the networks without a limit. Loopback has none either, nor has TCP, nor who shows a good cookie.
	Exempt []netip.Prefix
}

// The reach of RateLimit's numbers. The time between two responses is kept in whole microseconds, which is right within 1 % at
// the highest rate.
const (
	maxResponsesPerSecond = 10_000
	maxSlip               = 10
)

// check reports the first setting that is out of reach.
func (r *RateLimit) check() error {
	switch {
	case r.ResponsesPerSecond < 0 || r.ResponsesPerSecond > maxResponsesPerSecond:
		return fmt.Errorf("responses_per_second %d: want 1 to %d, or 0 for no limit", r.ResponsesPerSecond, maxResponsesPerSecond)
	case r.Slip < 0 || r.Slip > maxSlip:
		return fmt.Errorf("slip %d: want 1 to %d, or 0 for none", r.Slip, maxSlip)
	}
	for _, p := range r.Exempt {
		if !p.IsValid() {
			return errors.New("exempt: want prefixes such as 192.0.2.0/24")
		}
	}
	return nil
}

// limiter holds an account for each network and kind of response that were busy lately. It may be used concurrently, and
// nobody waits for anybody.
//
// An account is one word: a tag, which tells the networks apart that share a set, and the time until which the responses that
// went out have used up the rate (the generic cell rate algorithm, ITU-T I.371, annex A). One that lies in the past says
// nothing, so that accounts need no cleaning, and what is refused changes nothing, so that under a flood processors only read.
//
// A set is a cache line. A new account takes the place of one that is idle, else of the one that is so soonest: a flood in the
// name of very many networks makes the limiter forget, and each of those networks gets little of it anyway.
type limiter struct {
	seed     maphash.Seed
	start    time.Time
	interval uint64 // between two responses, in microseconds
	slip     int
	exempt   *ranges.Table[bool]
	sets     []limitSet
}

type limitSet [8]atomic.Uint64

const (
	// limitSets is how many sets there are: 2 MB of them, a quarter of a million accounts. An account is busy for one interval
	// after a response, so that 10 responses a second and network leave room for 2.5 million spoofed networks a second, more
	// than any server here can answer.
	limitSets = 1 << 15
	// timeBits hold microseconds for 12 days until they wrap, and leave 24 for the tag: one lookup in two million takes another
	// network's account for its own.
	timeBits = 40
	timeMask = 1<<timeBits - 1
	second   = uint64(time.Second / time.Microsecond)
	// limitAttempts is how often an account is tried that others change at the same time. Each failure is a response of
	// somebody else's that was counted, so that more can only be needed by more processors; then the response goes uncounted.
	limitAttempts = 16
)

// newLimiter makes the limiter of r, which was checked; nil for no limit.
func newLimiter(r RateLimit, now time.Time) *limiter {
	if r.ResponsesPerSecond == 0 {
		return nil
	}
	entries := make([]ranges.Entry[bool], 0, len(r.Exempt))
	for _, p := range r.Exempt {
		if p.Addr().Is4In6() && p.Bits() >= 96 { // clients are looked up by their plain addresses
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		entries = append(entries, ranges.Entry[bool]{Prefix: p, Value: true})
	}
	return &limiter{
		seed: maphash.MakeSeed(), start: now, interval: second / uint64(r.ResponsesPerSecond),
		slip: r.Slip, exempt: ranges.New(entries), sets: make([]limitSet, limitSets),
	}
}

// responseKind is what is limited apart: who makes names up must not take the answers from those beside it.
type responseKind byte

const (
	kindAnswer responseKind = iota
	kindEmpty
	kindNoName
	kindError
)

// kind is the kind of r.
func (r *response) kind() responseKind {
	switch {
	case r.rcode == mdns.RcodeNameError:
		return kindNoName
	case r.rcode != mdns.RcodeSuccess:
		return kindError
	case !r.positive():
		return kindEmpty
	}
	return kindAnswer
}

// verdict is what becomes of a response.
type verdict uint8

const (
	limitSend verdict = iota
	limitSlip         // sent without records
	limitDrop
	limitVerdicts
)

var limitNames = [limitVerdicts]string{limitSlip: "slipped", limitDrop: "dropped"}

// judge says what becomes of a response of that kind to client, which is no IPv4-mapped address, and counts it if it is sent
// whole.
func (l *limiter) judge(client netip.Addr, kind responseKind, now time.Time) verdict {
	if client.IsLoopback() {
		return limitSend
	}
	if exempt, _ := l.exempt.Lookup(client); exempt {
		return limitSend
	}
	if l.take(client, kind, uint64(now.Sub(l.start)/time.Microsecond)) {
		return limitSend
	}
	if l.slip > 0 && rand.IntN(l.slip) == 0 {
		return limitSlip
	}
	return limitDrop
}

// take takes one response from the account, if it is not used up at the time now.
func (l *limiter) take(client netip.Addr, kind responseKind, now uint64) bool {
	// The key is the kind, the family, and the /24 or /56.
	var key [9]byte
	if client.Is4() {
		a := client.As4()
		key[0] = byte(kind)<<1 | 1
		copy(key[1:4], a[:3])
	} else {
		a := client.As16()
		key[0] = byte(kind) << 1
		copy(key[1:8], a[:7])
	}
	hash := maphash.Bytes(l.seed, key[:])
	set, tag := &l.sets[hash%limitSets], hash>>timeBits<<timeBits
	for range limitAttempts {
		account, old, busy := l.find(set, tag, now)
		if busy+l.interval > second { // a second's worth is out
			return false
		}
		if account.CompareAndSwap(old, tag|(now+busy+l.interval)&timeMask) {
			return true
		}
	}
	return true
}

// find returns the account of tag in set, or the one to make it of, as it stands, and for how long after now it is used up.
func (l *limiter) find(set *limitSet, tag, now uint64) (account *atomic.Uint64, old, busy uint64) {
	soonest := uint64(1<<64 - 1)
	for i := range set {
		word := set[i].Load()
		// Times are compared modulo their bits. None that counts is further ahead than a second, and what goroutines that
		// looked at the clock at different times add to that.
		ahead := (word - now) & timeMask
		if ahead > 2*second {
			ahead = 0
		}
		if word&^timeMask == tag {
			return &set[i], word, ahead
		}
		if ahead < soonest {
			account, old, soonest = &set[i], word, ahead
		}
	}
	return account, old, 0
}
