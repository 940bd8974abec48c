package dns

import (
	"encoding/binary"
	"net/netip"
	"sync/atomic"
	"time"

	mdns "github.com/miekg/dns"
	"golang.org/x/time/rate"

	"portolan/router"
)

// responder answers queries from the newest zone. Its workers share it.
type responder struct {
	zone     atomic.Pointer[zone]
	secrets  atomic.Pointer[secrets]
	limiter  *limiter // nil without a rate limit
	sampler  *sampler // nil without a record of clients
	identity *identity
	metrics  *metrics
	// explanations bounds how often whoami tells why.
	explanations *rate.Limiter
	now          func() time.Time // the clock
}

// worker answers the queries of one goroutine over one transport. It is not for concurrent use: it holds the scratch space.
type worker struct {
	*responder
	via   transport
	shard int
	// query is the one that is being answered: single, if it came alone.
	query  *query
	single query
	// ready makes the decisions of a batch faster.
	ready router.Prefetch
	// cookie is what answers the query's, if it has one.
	cookie [cookieSize]byte
}

func (r *responder) worker(via transport, number int) *worker {
	return &worker{responder: r, via: via, shard: number % shards}
}

// response is what is to be sent, apart from the question and the client's own EDNS data.
type response struct {
	rcode         int
	authoritative bool
	answer        *rrset
	authority     *packed
	apex          int     // offset of the zone's name in the question's, for records that it owns
	additional    *packed // sent with an answer where there is room
	scope         int
	ede           int
	count         *counter // of the decision; nil if there was none to count
	cut           bool     // to be sent without records, truncated
	// whoami is what is to be described in the answer; nil for other answers. That is costly beside all others, so that it is
	// done when nothing is left that might keep the answer from being sent.
	whoami *dynamic
}

// positive is whether there is an answer, or will be.
func (r *response) positive() bool { return r.answer != nil || r.whoami != nil }

// respond appends the answer to message, which came from from, to dst. It appends nothing when the message is not to be
// answered. It does not allocate while dst has room, except for whoami.
func (w *worker) respond(dst, message []byte, from netip.AddrPort) []byte {
	w.single.parse(message)
	return w.reply(dst, &w.single, from)
}

// prepare makes a query's decision ready, if there is one to come, with those of others: w.ready is to be run before they are answered.
func (w *worker) prepare(q *query, from netip.AddrPort) {
	if z := w.zone.Load(); z != nil && q.answered && len(q.question) > 0 {
		if n, _, inside := z.find(q); inside && n != nil && n.dynamic != nil {
			w.ready.Add(n.dynamic.registry, clientOf(q, from))
		}
	}
}

// clientOf is the client of a query that came from from.
func clientOf(q *query, from netip.AddrPort) router.Client {
	return router.Client{Resolver: from.Addr().Unmap().WithZone(""), Subnet: q.subnet}
}

// reply appends the answer to a query that was parsed, as respond does.
func (w *worker) reply(dst []byte, q *query, from netip.AddrPort) []byte {
	w.query = q
	if !q.answered {
		w.metrics.dropped[w.via][q.drop][w.shard].n.Add(1)
		return dst
	}
	r, z := response{rcode: q.rcode, ede: edeNone}, w.zone.Load()
	state := cookieNone
	if len(q.cookie) > 0 {
		state = w.bake(from)
	}
	switch {
	case q.rcode != mdns.RcodeSuccess:
	case len(q.question) > 0:
		w.resolve(&r, z, from)
	case state == cookieUnknown:
		// Who asks nothing but for a cookie is told what the one it has is worth (RFC 7873, section 5.4).
		r.rcode = mdns.RcodeBadCookie
	}
	if w.limiter != nil && w.via == udp && state != cookieKnown {
		if v := w.limiter.judge(from.Addr().Unmap(), r.kind(), w.now()); v != limitSend {
			w.metrics.limited[v][w.shard].n.Add(1)
			if v == limitDrop {
				return dst
			}
			r.cut = true
		}
	}
	if r.count != nil {
		r.count[w.shard].n.Add(1)
	}
	w.metrics.queries[w.via][typeIndex(q.qtype)][codeIndex(r.rcode)][w.shard].n.Add(1)
	if r.whoami != nil && !r.cut {
		r.answer = w.describe(z, r.whoami, from)
	}
	return w.write(dst, &r, from)
}

// bake makes the cookie that answers the query's, and says what that one is worth.
func (w *worker) bake(from netip.AddrPort) cookieState {
	state := cookieNew
	switch known := w.secrets.Load().answer(&w.cookie, w.query.cookie, from.Addr().Unmap(), w.now()); {
	case known:
		state = cookieKnown
	case len(w.query.cookie) > clientCookie:
		state = cookieUnknown
	}
	w.metrics.cookies[state][w.shard].n.Add(1)
	return state
}

// resolve finds the answer to a well-formed query in z, nil before there is a zone.
func (w *worker) resolve(r *response, z *zone, from netip.AddrPort) {
	q := w.query
	switch q.qtype {
	case mdns.TypeOPT, mdns.TypeTSIG, mdns.TypeTKEY:
		r.rcode = mdns.RcodeNotImplemented
		return
	}
	if q.qclass == mdns.ClassCHAOS {
		if r.answer = w.identity.answer(q); r.answer == nil {
			r.rcode, r.ede = mdns.RcodeRefused, edeNotAuthoritative
		}
		r.authoritative = r.answer != nil
		return
	}
	if z == nil {
		r.rcode, r.ede = mdns.RcodeServerFailure, edeNotReady
		return
	}
	n, apex, inside := z.find(q)
	if !inside || q.qclass != mdns.ClassINET {
		r.rcode, r.ede = mdns.RcodeRefused, edeNotAuthoritative
		return
	}
	if q.qtype == mdns.TypeAXFR || q.qtype == mdns.TypeIXFR {
		r.rcode, r.ede = mdns.RcodeRefused, edeProhibited
		return
	}
	r.authoritative, r.apex = true, apex
	switch {
	case n == nil:
		r.rcode = mdns.RcodeNameError
	case n.dynamic != nil:
		w.decide(r, z, n, from)
	case n.whoami != nil:
		switch {
		case q.qtype == mdns.TypeTXT && z.whoami != WhoamiOff:
			// Another subnet has another answer: it is good for no more than was sent.
			r.whoami, r.scope = n.whoami, max(0, q.subnet.Bits())
		case q.qtype == mdns.TypeANY && z.whoami != WhoamiOff:
			r.answer = &z.hinfo
		}
	case q.qtype == mdns.TypeANY:
		if r.answer = n.set(mdns.TypeCNAME); r.answer == nil && len(n.sets) > 0 {
			r.answer = &z.hinfo
		}
	default:
		if r.answer = n.set(q.qtype); r.answer != nil && r.answer.rrtype == mdns.TypeNS {
			r.additional = &z.glue
		}
	}
	if !r.positive() && r.authority == nil {
		r.authority = &z.soa
	}
}

// decide answers at a registry's name.
func (w *worker) decide(r *response, z *zone, n *node, from netip.AddrPort) {
	q, d := w.query, n.dynamic
	kind := variesOther
	switch q.qtype {
	case mdns.TypeA:
		kind = variesA
	case mdns.TypeAAAA:
		kind = variesAAAA
	}
	if d.varies[kind] {
		client := clientOf(q, from)
		decision := d.registry.Decide(client)
		r.scope = decision.Scope
		count := d.none
		var set *rrset
		switch {
		case decision.Replica >= 0:
			s := &d.replicas[decision.Replica]
			count = s.count
			if set = s.cname.of(decision.Settled); set.count == 0 {
				switch kind {
				case variesA:
					set = s.a.of(decision.Settled)
				case variesAAAA:
					set = s.aaaa.of(decision.Settled)
				}
			}
		case decision.Outcome == router.AllDownCNAME:
			set = d.fallback.of(decision.Settled)
		}
		if kind != variesOther {
			r.count = count
			if w.sampler != nil {
				w.sampler.offer(d.registry, client)
			}
		}
		if set != nil && set.count > 0 {
			r.answer = set
			return
		}
	}
	switch {
	case kind != variesOther:
	case q.qtype == mdns.TypeANY:
		r.answer = &z.hinfo
	default:
		r.answer = n.set(q.qtype)
	}
	if r.answer == nil && d.varies[kind] {
		r.authority = &z.passing
	}
}

// write puts the response into wire form behind dst.
func (w *worker) write(dst []byte, r *response, from netip.AddrPort) []byte {
	q := w.query
	limit := maxMessage
	if w.via == udp {
		limit = plainSize
		if q.edns {
			limit = min(max(int(q.size), plainSize), ednsSize)
		}
	}
	flags := flagQR | q.flags&(opcode|flagRD|flagCD) | uint16(r.rcode&0xf)
	if r.authoritative {
		flags |= flagAA
	}
	opt := 0
	if q.edns {
		opt = 11
		if q.nsid && len(w.identity.nsid) > 0 {
			opt += 4 + len(w.identity.nsid)
		}
		if len(q.cookie) > 0 {
			opt += 4 + cookieSize
		}
		if len(q.ecs) > 0 {
			opt += 4 + len(q.ecs)
		}
		if r.ede != edeNone {
			opt += 6
		}
	}
	size := headerSize + len(q.question) + opt
	var questions, answers, authorities, additionals uint16
	switch {
	case r.cut && (r.positive() || r.authority != nil): // an error has no records, and TCP would not change it
		flags |= flagTC
	case r.answer != nil && size+len(r.answer.body) <= limit:
		answers = r.answer.count
		if r.additional != nil && size+len(r.answer.body)+len(r.additional.body) <= limit {
			additionals = r.additional.count
		}
	case r.authority != nil && size+len(r.authority.body) <= limit:
		authorities = r.authority.count
	case r.answer != nil || r.authority != nil:
		// Half a set is no set (RFC 2181, section 9), and a negative answer is none without the SOA (RFC 2308, section 3): the
		// client comes back over TCP for all of it.
		flags |= flagTC
		w.metrics.truncated[w.shard].n.Add(1)
	}
	if len(q.question) > 0 {
		questions = 1
	}
	glue := additionals > 0
	if q.edns {
		additionals++
	}
	dst = binary.BigEndian.AppendUint16(dst, q.id)
	dst = binary.BigEndian.AppendUint16(dst, flags)
	dst = binary.BigEndian.AppendUint16(dst, questions)
	dst = binary.BigEndian.AppendUint16(dst, answers)
	dst = binary.BigEndian.AppendUint16(dst, authorities)
	dst = binary.BigEndian.AppendUint16(dst, additionals)
	dst = append(dst, q.question...)
	if answers > 0 {
		cut := 0
		if answers > 1 && r.answer.stride > 0 {
			// The id and the port are as good as a draw of lots, and cost none.
			cut = int(q.id^from.Port()) % int(answers) * int(r.answer.stride)
		}
		dst = append(dst, r.answer.body[cut:]...)
		dst = append(dst, r.answer.body[:cut]...)
	}
	if authorities > 0 {
		at := len(dst)
		dst = append(dst, r.authority.body...)
		if r.authority.zoneOwner {
			binary.BigEndian.PutUint16(dst[at:], 0xc000|uint16(headerSize+r.apex))
		}
	}
	if glue {
		dst = append(dst, r.additional.body...)
	}
	if q.edns {
		dst = append(dst, 0, 0, byte(mdns.TypeOPT), ednsSize>>8, ednsSize&0xff, byte(r.rcode>>4), 0)
		var do byte
		if q.do {
			do = 0x80 // to be copied (RFC 3225, section 3)
		}
		dst = append(dst, do, 0)
		dst = binary.BigEndian.AppendUint16(dst, uint16(opt-11))
		if q.nsid && len(w.identity.nsid) > 0 {
			dst = append(dst, 0, optionNSID, 0, byte(len(w.identity.nsid)))
			dst = append(dst, w.identity.nsid...)
		}
		if len(q.cookie) > 0 {
			dst = append(dst, 0, optionCookie, 0, cookieSize)
			dst = append(dst, w.cookie[:]...)
		}
		if len(q.ecs) > 0 {
			dst = append(dst, 0, optionECS, 0, byte(len(q.ecs)))
			dst = append(dst, q.ecs...)
			dst[len(dst)-len(q.ecs)+3] = byte(r.scope)
		}
		if r.ede != edeNone {
			dst = append(dst, 0, optionEDE, 0, 2, 0, byte(r.ede))
		}
	}
	return dst
}
