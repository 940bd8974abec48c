// Package sample reads and writes recorded clients: which asked, and how often. The front door records them (dns.sample), and
// portolan simulate tells where they would be sent.
//
// A record is text, one client a line, with its count, or 1 if there is none:
//
//	203.0.113.0/24 17
//	198.51.100.0 4
//
// A network is the subnet that a resolver sent along (ECS), an address that of a resolver that sent none. Lines of the same
// client add up; empty lines and those that begin with # say nothing. The package decides nothing and opens no file.
package sample

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"portolan/router"
)

const (
	// MaxClients is how many different clients a record may hold: some 10 MB of memory, and 3 MB as text.
	MaxClients = 100_000
	// maxCount bounds the sum of all counts: beyond it, programs that read numbers as floating point ones miscount.
	maxCount = 1 << 53
	// maxLine is the longest line in bytes. A subnet of IPv6 with its count is 60.
	maxLine = 1024
	// maxFaults is how many faulty lines are told before reading ends.
	maxFaults = 5
)

// Clients are how often each client asked.
type Clients map[router.Client]uint64

// Add counts one more query of a client. Where there are MaxClients already and this is another, all counts are halved first, and
// those of 1 forgotten, as often as it takes: so what is rare or long ago makes room, and shares stay what they are.
func (c Clients) Add(client router.Client) {
	if _, known := c[client]; !known {
		for len(c) >= MaxClients {
			for other, count := range c {
				if count < 2 {
					delete(c, other)
				} else {
					c[other] = count / 2
				}
			}
		}
	}
	c[client]++
}

// All yields the clients, sorted, with their counts.
func (c Clients) All() iter.Seq2[router.Client, uint64] {
	return func(yield func(router.Client, uint64) bool) {
		for _, client := range slices.SortedFunc(maps.Keys(c), compare) {
			if !yield(client, c[client]) {
				return
			}
		}
	}
}

// compare puts subnets before resolvers, each ascending.
func compare(a, b router.Client) int {
	if a.Subnet.IsValid() != b.Subnet.IsValid() {
		return map[bool]int{true: -1, false: 1}[a.Subnet.IsValid()]
	}
	return cmp.Or(a.Subnet.Addr().Compare(b.Subnet.Addr()), cmp.Compare(a.Subnet.Bits(), b.Subnet.Bits()), a.Resolver.Compare(b.Resolver))
}

// Read reads a record; name is for errors. Memory is bounded whatever r holds. The error names the first faulty lines by
// their numbers, and the line at which there were more than MaxClients.
func Read(name string, r io.Reader) (Clients, error) {
	clients := Clients{}
	var faults []string
	var total uint64
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 0, maxLine), maxLine)
	number := 0
	for lines.Scan() {
		number++
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		client, count, err := parse(text)
		if err == nil && count > maxCount-total {
			err = fmt.Errorf("the counts add up to more than %d", uint64(maxCount))
		}
		if err != nil {
			faults = append(faults, fmt.Sprintf("%s:%d: %v", name, number, err))
			if len(faults) == maxFaults {
				faults = append(faults, "reading ended there")
				break
			}
			continue
		}
		if _, known := clients[client]; !known && len(clients) == MaxClients {
			return nil, fmt.Errorf("%s:%d: more than %d different clients: shorten them to /24 and /48, whose clients are decided for alike, or leave out the rarest", name, number, MaxClients)
		}
		clients[client] += count
		total += count
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		faults = append(faults, fmt.Sprintf("%s:%d: longer than %d bytes", name, number+1, maxLine))
	case err != nil:
		return nil, fmt.Errorf("reading clients from %s: %w", name, err)
	}
	if len(faults) > 0 {
		return nil, errors.New(strings.Join(faults, "\n"))
	}
	return clients, nil
}

// parse reads one line.
func parse(text string) (router.Client, uint64, error) {
	fields := strings.Fields(text)
	if len(fields) > 2 {
		return router.Client{}, 0, fmt.Errorf("%.60q: want a network or an address, and perhaps a count", text)
	}
	count := uint64(1)
	if len(fields) == 2 {
		var err error
		if count, err = strconv.ParseUint(fields[1], 10, 64); err != nil || count == 0 {
			return router.Client{}, 0, fmt.Errorf("%.40q is no count: want a whole number above 0", fields[1])
		}
	}
	if a, err := netip.ParseAddr(fields[0]); err == nil && a.Zone() == "" {
		return router.Client{Resolver: a.Unmap()}, count, nil
	}
	p, err := netip.ParsePrefix(fields[0])
	if err != nil || p.Bits() == 0 {
		return router.Client{}, 0, fmt.Errorf("%.60q is neither a network, such as 203.0.113.0/24, nor an IP address", fields[0])
	}
	return router.Client{Subnet: p.Masked()}, count, nil
}

// Write writes what Read reads.
func Write(w io.Writer, c Clients) error {
	out := bufio.NewWriter(w)
	for client, count := range c.All() {
		name := client.Resolver.String()
		if client.Subnet.IsValid() {
			name = client.Subnet.String()
		}
		fmt.Fprintln(out, name, count)
	}
	return out.Flush()
}
