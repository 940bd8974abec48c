package dns

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"time"
)

// DNS cookies (RFC 7873) show that a client sees what is sent to its address. The server part is made by RFC 9018, section 4,
// so that several servers with one secret, of whatever make, know each other's:
//
//	version (1) | reserved | timestamp | hash
//	1 byte        3 bytes    4 bytes     8 bytes: SipHash-2-4 of client cookie | the three before | client's address
const (
	clientCookie  = 8
	serverCookie  = 16
	cookieSize    = clientCookie + serverCookie
	maxCookie     = clientCookie + 32 // other servers' may be longer (RFC 7873, section 4)
	cookieVersion = 1
)

// How long server cookies are good (RFC 9018, section 4.3): an hour, and five minutes for clocks that differ. One that is older
// than half an hour is replaced, so that a client that asks now and then never has an expired one.
const (
	cookieLife    = 60 * 60
	cookieAhead   = 5 * 60
	cookieRenewal = 30 * 60
)

// cookieState is what the cookie of a query is worth.
type cookieState uint8

const (
	cookieNew     cookieState = iota // of the client alone: it has none of this server's yet
	cookieKnown                      // with a server part that was given to this client at its address, and is still good
	cookieUnknown                    // with any other
	cookieStates
	cookieNone = cookieStates // there is none
)

func (s cookieState) String() string { return [...]string{"new", "known", "unknown"}[s] }

// secrets are the keys of server cookies: the first makes them, both are recognised. They are immutable.
type secrets struct {
	keys  [2][16]byte
	count int
}

// maxSecretFile is far more than two keys and what there is to say about them.
const maxSecretFile = 64 << 10

// readSecrets reads the file of keys, or makes a random one if path is empty.
func readSecrets(path string) (*secrets, error) {
	if path == "" {
		s := &secrets{count: 1}
		rand.Read(s.keys[0][:]) // never fails
		return s, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("dns.cookies.secret: %w", err)
	}
	defer f.Close()
	s, err := parseSecrets(io.LimitReader(f, maxSecretFile))
	if err != nil {
		return nil, fmt.Errorf("dns.cookies.secret: %s: %w", path, err)
	}
	return s, nil
}

// parseSecrets reads one key a line, 32 hexadecimal digits, and passes over empty lines and those that begin with #. Its errors
// name the line and not what stands there.
func parseSecrets(r io.Reader) (*secrets, error) {
	s, lines := new(secrets), bufio.NewScanner(r)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, err := hex.DecodeString(line)
		switch {
		case err != nil || len(key) != len(s.keys[0]):
			return nil, fmt.Errorf("line %d: want a key of 32 hexadecimal digits: make one with \"openssl rand -hex 16\"", n)
		case s.count == len(s.keys):
			return nil, fmt.Errorf("line %d: a third key: want the one that makes cookies, and at most one more that is recognised", n)
		}
		copy(s.keys[s.count][:], key)
		s.count++
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if s.count == 0 {
		return nil, errors.New("holds no key: make one with \"openssl rand -hex 16\"")
	}
	return s, nil
}

// hash is the hash of the first 16 bytes of a cookie and the client's address (RFC 9018, section 4.4).
func (s *secrets) hash(key int, head []byte, client netip.Addr) [8]byte {
	var input [16 + 16]byte
	n := copy(input[:16], head)
	if client.Is4() {
		a := client.As4()
		n += copy(input[n:], a[:])
	} else {
		a := client.As16()
		n += copy(input[n:], a[:])
	}
	var sum [8]byte
	binary.LittleEndian.PutUint64(sum[:], sipHash(&s.keys[key], input[:n]))
	return sum
}

// answer puts the cookie that answers asked, a well-formed one from client at the time now, into to, and returns whether asked
// shows that the client got one at that address. client is no IPv4-mapped address.
func (s *secrets) answer(to *[cookieSize]byte, asked []byte, client netip.Addr, now time.Time) (known bool) {
	seconds := uint32(now.Unix())
	if len(asked) == cookieSize && asked[clientCookie] == cookieVersion {
		// Times are compared as serial numbers (RFC 1982): they wrap in 2106.
		age := int32(seconds - binary.BigEndian.Uint32(asked[12:]))
		if age <= cookieLife && age >= -cookieAhead {
			for key := range s.count {
				// The reserved bytes are hashed as they came: another server may give them a meaning.
				sum := s.hash(key, asked[:16], client)
				if subtle.ConstantTimeCompare(sum[:], asked[16:]) == 0 {
					continue
				}
				if known = true; key == 0 && age <= cookieRenewal && bytes.Equal(asked[9:12], []byte{0, 0, 0}) {
					copy(to[:], asked)
					return known
				}
				break
			}
		}
	}
	copy(to[:], asked[:clientCookie])
	to[8], to[9], to[10], to[11] = cookieVersion, 0, 0, 0
	binary.BigEndian.PutUint32(to[12:], seconds)
	sum := s.hash(0, to[:16], client)
	copy(to[16:], sum[:])
	return known
}
