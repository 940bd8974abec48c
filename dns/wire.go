package dns

import (
	"encoding/binary"
	"net/netip"

	mdns "github.com/miekg/dns"
)

// Sizes of messages.
const (
	headerSize = 12
	// plainSize is the most a client without EDNS takes over UDP (RFC 1035, section 4.2.1).
	plainSize = 512
	// ednsSize is the most that is sent over UDP: what passes IPv6's minimum MTU of 1280 without fragments (DNS flag day
	// 2020). It is also what is advertised.
	ednsSize = 1232
	// maxMessage is what a TCP message can hold (RFC 1035, section 4.2.2).
	maxMessage = 65535
	maxName    = 255
	maxLabels  = 127
	// maxOPT is the most that the OPT record of an answer takes: its fixed part, the name of the server, a cookie, an IPv6
	// subnet, an extended error.
	maxOPT = 11 + 4 + MaxIdentity + 4 + cookieSize + 4 + 4 + 16 + 6
	// maxBody is the most that the records of one set may take, so that they fit in a message with the longest question:
	// what does not fit over TCP can never be had.
	maxBody = maxMessage - headerSize - maxName - 4 - maxOPT
)

// Bits of the header's second word (RFC 1035, section 4.1.1; RFC 4035, section 3.2).
const (
	flagQR = 1 << 15
	flagAA = 1 << 10
	flagTC = 1 << 9
	flagRD = 1 << 8
	flagCD = 1 << 4
	opcode = 0xf << 11
)

// EDNS option codes: the name of the server (RFC 5001, section 2.3), the client subnet (RFC 7871, section 6), cookies (RFC 7873,
// section 4), extended errors (RFC 8914, section 2).
const (
	optionNSID   = 3
	optionECS    = 8
	optionCookie = 10
	optionEDE    = 15
)

// Extended errors (RFC 8914, section 5.2).
const (
	edeNone             = -1
	edeNotReady         = 14
	edeProhibited       = 18
	edeNotAuthoritative = 20
)

// query is a parsed query. Its slices point into the message.
type query struct {
	// answered is whether there is to be an answer, with rcode unless more is found; drop is why not.
	answered bool
	drop     int
	rcode    int

	id, flags uint16
	// question is the question section as it came, name first; empty if it could not be read, or if the query asks for nothing
	// but a cookie.
	question []byte
	nameLen  int
	qtype    uint16
	qclass   uint16

	edns    bool
	version uint8
	size    uint16
	do      bool
	nsid    bool // whether the name of the server is asked for
	// cookie is the data of the first cookie option, of a right length; empty if there is none.
	cookie []byte
	// ecs is the data of the client subnet option; empty if there is none or it was malformed.
	ecs    []byte
	subnet netip.Prefix // invalid without ECS

	// name is the question's name in lower case, labels where its labels begin, the root's left out.
	name   [maxName]byte
	labels [maxLabels]uint8
	depth  int
}

// parse reads message into q. What is not to be answered at all is too short for a header, or a response: answering those makes loops.
// The rcode is what the message alone demands: NOERROR, FORMERR, NOTIMP or BADVERS. Also with an error, q holds what could be read: an
// answer without an OPT record to a query with one would say that this server has no EDNS (RFC 6891, section 7).
func (q *query) parse(message []byte) {
	q.answered, q.drop, q.rcode = false, dropShort, 0
	q.question, q.cookie, q.ecs, q.subnet = nil, nil, nil, netip.Prefix{}
	q.nameLen, q.depth, q.qtype, q.qclass = 0, 0, 0, 0
	q.edns, q.version, q.size, q.do, q.nsid = false, 0, 0, false, false
	if len(message) < headerSize {
		return
	}
	q.id = binary.BigEndian.Uint16(message)
	q.flags = binary.BigEndian.Uint16(message[2:])
	if q.flags&flagQR != 0 {
		q.drop = dropResponse
		return
	}
	q.rcode = q.parseSections(message)
	if q.flags&opcode != 0 {
		// All opcodes share the form of messages (RFC 1035, section 4.1; RFC 2136, section 2), if not its meaning.
		q.rcode = mdns.RcodeNotImplemented
	}
	q.answered = true
}

// parseSections reads what follows the header.
func (q *query) parseSections(message []byte) (rcode int) {
	at, ok := headerSize, true
	questions := int(binary.BigEndian.Uint16(message[4:]))
	if questions == 1 {
		if !q.parseQuestion(message) {
			return mdns.RcodeFormatError
		}
		at += len(q.question)
	} else {
		for range questions { // an error in the end, after a look for the client's OPT
			if at, ok = skipName(message, at); !ok || at+4 > len(message) {
				return mdns.RcodeFormatError
			}
			at += 4
		}
	}
	// An answer or an authority section has no meaning in a query, except an IXFR's, which is refused anyway; they are stepped
	// over, so that the client's OPT is found. Each record takes 11 bytes at least, which bounds the loop.
	skip := int(binary.BigEndian.Uint16(message[6:])) + int(binary.BigEndian.Uint16(message[8:]))
	records := skip + int(binary.BigEndian.Uint16(message[10:]))
	for i := range records {
		begin := at
		if at, ok = skipName(message, at); !ok || at+10 > len(message) {
			return mdns.RcodeFormatError
		}
		fixed := message[at : at+10]
		at += 10
		end := at + int(binary.BigEndian.Uint16(fixed[8:]))
		if end > len(message) {
			return mdns.RcodeFormatError
		}
		if i >= skip && binary.BigEndian.Uint16(fixed) == mdns.TypeOPT {
			second := q.edns
			if !second {
				q.edns = true
				q.size = binary.BigEndian.Uint16(fixed[2:])
				q.version = fixed[5]
				q.do = fixed[6]&0x80 != 0
			}
			if second || message[begin] != 0 { // one, owned by the root (RFC 6891, section 6.1.1)
				return mdns.RcodeFormatError
			}
			if q.version == 0 && !q.parseOptions(message[at:end]) {
				q.nsid, q.cookie, q.ecs, q.subnet = false, nil, nil, netip.Prefix{}
				return mdns.RcodeFormatError
			}
		}
		at = end
	}
	switch {
	// One question exactly (RFC 9619), or none if the query is for a cookie (RFC 7873, section 5.4).
	case at != len(message), questions != 1 && (questions != 0 || len(q.cookie) == 0):
		return mdns.RcodeFormatError
	case q.version != 0:
		return mdns.RcodeBadVers
	}
	return mdns.RcodeSuccess
}

// skipName returns where the name that begins at at ends in message, and whether it does.
func skipName(message []byte, at int) (end int, ok bool) {
	for begin := at; at < len(message) && at-begin < maxName; {
		length := int(message[at])
		switch {
		case length >= 0xc0:
			return at + 2, true
		case length == 0:
			return at + 1, true
		case length > 63:
			return at, false
		}
		at += 1 + length
	}
	return at, false
}

// parseQuestion reads the question. A pointer cannot be in it: there is nothing before it to point to.
func (q *query) parseQuestion(message []byte) bool {
	at := headerSize
	for {
		if at >= len(message) {
			return false
		}
		length := int(message[at])
		end := at + 1 + length
		if length > 63 || end > len(message) || end-headerSize > maxName {
			return false
		}
		to := at - headerSize
		q.name[to] = byte(length)
		for i := 1; i <= length; i++ {
			c := message[at+i]
			if c-'A' < 26 {
				c += 'a' - 'A'
			}
			q.name[to+i] = c
		}
		at = end
		if length == 0 {
			break
		}
		q.labels[q.depth] = uint8(to)
		q.depth++
	}
	if at+4 > len(message) {
		return false
	}
	q.nameLen = at - headerSize
	q.qtype = binary.BigEndian.Uint16(message[at:])
	q.qclass = binary.BigEndian.Uint16(message[at+2:])
	q.question = message[headerSize : at+4]
	return true
}

// parseOptions reads the options of an OPT record; what is not known is ignored (RFC 6891, section 6.1.2).
func (q *query) parseOptions(options []byte) bool {
	for len(options) > 0 {
		if len(options) < 4 {
			return false
		}
		code, length := binary.BigEndian.Uint16(options), int(binary.BigEndian.Uint16(options[2:]))
		options = options[4:]
		if length > len(options) {
			return false
		}
		switch code {
		case optionNSID:
			q.nsid = true // whatever data comes with it is ignored (RFC 5001, section 2.1)
		case optionCookie:
			// Of several the first counts (RFC 7873, section 5.2); a wrong length is an error (section 5.2.2).
			if q.cookie != nil {
				break
			}
			if length != clientCookie && (length < clientCookie+8 || length > maxCookie) {
				return false
			}
			q.cookie = options[:length]
		case optionECS:
			if q.ecs != nil || !q.parseECS(options[:length]) {
				return false
			}
		}
		options = options[length:]
	}
	return true
}

// parseECS checks the option by RFC 7871, sections 6 and 7.1.2: a scope of 0, as many bytes of address as the source length
// needs and no more, no bit beyond it, a family that is known (section 7.1.2 asks for FORMERR otherwise).
func (q *query) parseECS(data []byte) bool {
	if len(data) < 4 {
		return false
	}
	family, source, scope, address := binary.BigEndian.Uint16(data), int(data[2]), data[3], data[4:]
	if scope != 0 || len(address) != (source+7)/8 {
		return false
	}
	if source%8 != 0 && address[len(address)-1]&(0xff>>(source%8)) != 0 {
		return false
	}
	switch {
	case family == 1 && source <= 32:
		var a [4]byte
		copy(a[:], address)
		q.subnet = netip.PrefixFrom(netip.AddrFrom4(a), source)
	case family == 2 && source <= 128:
		var a [16]byte
		copy(a[:], address)
		q.subnet = netip.PrefixFrom(netip.AddrFrom16(a), source)
	default:
		return false
	}
	q.ecs = data
	return true
}
