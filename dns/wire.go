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

// optionECS is the EDNS option code of the client subnet (RFC 7871, section 6), optionEDE that of extended errors (RFC 8914).
const (
	optionECS = 8
	optionEDE = 15
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
	id, flags uint16
	// question is the question section as it came, name first; empty if it could not be read.
	question []byte
	nameLen  int
	qtype    uint16
	qclass   uint16

	edns    bool
	version uint8
	size    uint16
	do      bool
	// ecs is the data of the client subnet option; empty if there is none or it was malformed.
	ecs    []byte
	subnet netip.Prefix // invalid without ECS

	// name is the question's name in lower case, labels where its labels begin, the root's left out.
	name   [maxName]byte
	labels [maxLabels]uint8
	depth  int
}

// parse reads message into q. It returns false for what is not to be answered at all (too short for a header, or a response:
// answering those makes loops), otherwise the rcode that the message alone demands: NOERROR, FORMERR, NOTIMP or BADVERS.
func (q *query) parse(message []byte) (rcode int, answer bool) {
	q.question, q.ecs, q.subnet = nil, nil, netip.Prefix{}
	q.nameLen, q.depth, q.qtype, q.qclass = 0, 0, 0, 0
	q.edns, q.version, q.size, q.do = false, 0, 0, false
	if len(message) < headerSize {
		return 0, false
	}
	q.id = binary.BigEndian.Uint16(message)
	q.flags = binary.BigEndian.Uint16(message[2:])
	if q.flags&flagQR != 0 {
		return 0, false
	}
	if q.flags&opcode != 0 {
		return mdns.RcodeNotImplemented, true // what follows the header has another meaning there
	}
	// One question exactly (RFC 9619).
	if binary.BigEndian.Uint16(message[4:]) != 1 || !q.parseQuestion(message) {
		return mdns.RcodeFormatError, true
	}
	// An answer or an authority section has no meaning in a query, except an IXFR's, which is refused anyway; they are stepped
	// over, so that the client's OPT is found. Each record takes 11 bytes at least, which bounds the loop.
	skip := int(binary.BigEndian.Uint16(message[6:])) + int(binary.BigEndian.Uint16(message[8:]))
	records := skip + int(binary.BigEndian.Uint16(message[10:]))
	at := headerSize + len(q.question)
	for i := range records {
		begin := at
		for { // the owner's name
			if at >= len(message) {
				return mdns.RcodeFormatError, true
			}
			length := int(message[at])
			if length >= 0xc0 {
				at += 2
				break
			}
			if length > 63 {
				return mdns.RcodeFormatError, true
			}
			if at += 1 + length; length == 0 {
				break
			}
			if at-begin > maxName {
				return mdns.RcodeFormatError, true
			}
		}
		if at+10 > len(message) {
			return mdns.RcodeFormatError, true
		}
		fixed := message[at : at+10]
		at += 10
		end := at + int(binary.BigEndian.Uint16(fixed[8:]))
		if end > len(message) {
			return mdns.RcodeFormatError, true
		}
		if i >= skip && binary.BigEndian.Uint16(fixed) == mdns.TypeOPT {
			if q.edns || message[begin] != 0 { // one, owned by the root (RFC 6891, section 6.1.1)
				return mdns.RcodeFormatError, true
			}
			q.edns = true
			q.size = binary.BigEndian.Uint16(fixed[2:])
			q.version = fixed[5]
			q.do = fixed[6]&0x80 != 0
			if q.version == 0 && !q.parseOptions(message[at:end]) {
				q.ecs, q.subnet = nil, netip.Prefix{}
				return mdns.RcodeFormatError, true
			}
		}
		at = end
	}
	if at != len(message) {
		return mdns.RcodeFormatError, true
	}
	if q.version != 0 {
		return mdns.RcodeBadVers, true
	}
	return mdns.RcodeSuccess, true
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
		if code == optionECS && (q.ecs != nil || !q.parseECS(options[:length])) {
			return false
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
