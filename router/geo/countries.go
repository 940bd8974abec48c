package geo

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"sync"
	"time"

	"portolan/router"
	"portolan/router/ranges"
)

// Countries is a compact table of the countries of all addresses. It is immutable and safe for concurrent use; Locate
// does not allocate.
//
// It tells apart what clients' cells tell apart: a /24 and a /48 have one country each, that of their first address.
type Countries struct {
	table  *ranges.Table[uint8]
	codes  []string       // by value of the table; "" for none
	places []router.Place // by value of the table
	info   Info
}

var (
	_ router.Locator = (*Countries)(nil)
)

// The lengths of the cells that Countries tells apart, IPv4 and IPv6.
const (
	cell4 = 24
	cell6 = 48
)

// maxCountries is how many countries a value of one byte can name, besides none.
const maxCountries = 255

// NewCountries compiles the countries of prefixes, by their ISO 3166-1 codes; an empty code is as no entry. kind is what
// the table calls itself. It fails on a code that the table of countries does not have.
func NewCountries(kind string, built time.Time, entries []ranges.Entry[string]) (*Countries, error) {
	codes := []string{""}
	number := map[string]uint8{"": 0}
	numbered := make([]ranges.Entry[uint8], len(entries))
	for i, e := range entries {
		n, known := number[e.Value]
		if !known {
			if len(codes) > maxCountries {
				return nil, fmt.Errorf("more than %d countries", maxCountries)
			}
			n = uint8(len(codes))
			number[e.Value], codes = n, append(codes, e.Value)
		}
		numbered[i] = ranges.Entry[uint8]{Prefix: e.Prefix, Value: n}
	}
	// In the order of the alphabet, so that the same entries make the same file.
	sorted := slices.Sorted(slices.Values(codes))
	renumber := make([]uint8, len(codes))
	for i, code := range codes {
		n, _ := slices.BinarySearch(sorted, code)
		renumber[i] = uint8(n)
	}
	table, err := ranges.FromRanges(func(yield func(netip.Addr, uint8) bool) {
		for a, n := range coarse(ranges.New(numbered)) {
			if !yield(a, renumber[n]) {
				return
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("cutting ranges to cells: %w", err)
	}
	return newCountries(table, sorted, Info{Type: kind, Built: built})
}

func newCountries(table *ranges.Table[uint8], codes []string, info Info) (*Countries, error) {
	c := &Countries{table: table, codes: codes, places: make([]router.Place, len(codes)), info: info}
	for i, code := range codes {
		if code == "" {
			continue
		}
		known := country(code)
		if known == nil {
			return nil, fmt.Errorf("country %q is not in the table of countries", code)
		}
		c.places[i] = router.Place{
			Located: true, Coordinates: known.Point, Country: known.Code, Continent: known.Continent, Source: info.Type,
		}
	}
	return c, nil
}

// coarse yields the ranges of t with their borders moved up to those of cells; what lies within one is dropped.
func coarse(t *ranges.Table[uint8]) func(func(netip.Addr, uint8) bool) {
	return func(yield func(netip.Addr, uint8) bool) {
		// A range is yielded when the next one is known to start behind the border that it was moved to.
		var border netip.Addr
		var value uint8
		for a, v := range t.Ranges() {
			if border.IsValid() && (border.BitLen() != a.BitLen() || border.Less(a)) && !yield(border, value) {
				return
			}
			border, value = router.NextCell(a), v
		}
		if border.IsValid() {
			yield(border, value)
		}
	}
}

// addr4 and addr6 are the first addresses of the cells numbered k; invalid behind the last one.
func addr4(k uint64) netip.Addr {
	if k >= 1<<cell4 {
		return netip.Addr{}
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(k)<<(32-cell4))
	return netip.AddrFrom4(b)
}

func addr6(k uint64) netip.Addr {
	if k >= 1<<cell6 {
		return netip.Addr{}
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k<<(64-cell6))
	return netip.AddrFrom16(b)
}

// Locate implements router.Locator.
func (c *Countries) Locate(a netip.Addr) router.Place {
	n, length := c.table.Lookup(a)
	place := c.places[n]
	place.Network, _ = a.Prefix(length)
	return place
}

// Borders implements router.Locator.
func (c *Countries) Borders(is6 bool, visit func(netip.Addr, int, *router.Place) bool) error {
	numbers := make([]int, len(c.codes)) // plus one; 0 for those not met yet
	met := 0
	for from, n := range c.table.Ranges() {
		if from.Is6() != is6 {
			continue
		}
		number, place := router.NoPlace, (*router.Place)(nil)
		if c.places[n].Located {
			if numbers[n] == 0 {
				met++
				numbers[n], place = met, &c.places[n]
			}
			number = numbers[n] - 1
		}
		if !visit(from, number, place) {
			return nil
		}
	}
	return nil
}

// Country returns the code of a's country, or "".
func (c *Countries) Country(a netip.Addr) string {
	n, _ := c.table.Lookup(a)
	return c.codes[n]
}

// Info describes the table.
func (c *Countries) Info() Info { return c.info }

// The file: gzip over
//
//	countriesMagic, built (Unix seconds), type (length, bytes), number of codes, the codes (two letters each, without ""),
//	then for IPv4 and IPv6 each: number of ranges; the distance of each range's first cell from that of the range before
//	(from 0 for the first); and a byte each, the code's number from 1, or 0 for none
//
// with numbers as unsigned varints. Distances and values stand apart because each compresses better among its own kind.
const countriesMagic = "portolan countries 1\n"

// Bounds for what ReadCountries takes in: ten times what the whole Internet needs today.
const (
	maxCountriesBytes  = 32 << 20
	maxCountriesRanges = 8 << 20
)

// WriteTo writes the table for ReadCountries. The same table makes the same bytes.
func (c *Countries) WriteTo(w io.Writer) (int64, error) {
	text := []byte(countriesMagic)
	text = binary.AppendUvarint(text, uint64(c.info.Built.Unix()))
	text = binary.AppendUvarint(text, uint64(len(c.info.Type)))
	text = append(text, c.info.Type...)
	text = binary.AppendUvarint(text, uint64(len(c.codes)-1))
	for _, code := range c.codes[1:] {
		text = append(text, code...)
	}
	for _, bits := range []int{32, 128} {
		var n, last uint64
		var distances, values []byte
		for a, v := range c.table.Ranges() {
			if a.BitLen() != bits {
				continue
			}
			var k uint64
			if a.Is4() {
				b := a.As4()
				k = uint64(binary.BigEndian.Uint32(b[:])) >> (32 - cell4)
			} else {
				b := a.As16()
				k = binary.BigEndian.Uint64(b[:8]) >> (64 - cell6)
			}
			distances = binary.AppendUvarint(distances, k-last)
			values = append(values, v)
			n, last = n+1, k
		}
		text = append(append(binary.AppendUvarint(text, n), distances...), values...)
	}
	var packed bytes.Buffer
	z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	if err != nil {
		return 0, err
	}
	if _, err := z.Write(text); err != nil {
		return 0, fmt.Errorf("compressing the table: %w", err)
	}
	if err := z.Close(); err != nil {
		return 0, fmt.Errorf("compressing the table: %w", err)
	}
	return packed.WriteTo(w)
}

var errCountriesFormat = errors.New("not a table of countries, or a damaged one")

// ReadCountries reads what WriteTo wrote.
func ReadCountries(r io.Reader) (*Countries, error) {
	sum := sha256.New()
	z, err := gzip.NewReader(io.TeeReader(r, sum))
	if err != nil {
		return nil, fmt.Errorf("decompressing the table of countries: %w", err)
	}
	text, err := io.ReadAll(io.LimitReader(z, maxCountriesBytes+1))
	if err != nil {
		return nil, fmt.Errorf("decompressing the table of countries: %w", err)
	}
	if len(text) > maxCountriesBytes {
		return nil, fmt.Errorf("table of countries exceeds %d bytes", maxCountriesBytes)
	}
	d := decoder{rest: text}
	if string(d.bytes(uint64(len(countriesMagic)))) != countriesMagic {
		return nil, errCountriesFormat
	}
	info := Info{Built: time.Unix(int64(d.number()), 0).UTC()}
	info.Type = string(d.bytes(d.number()))
	codes := []string{""}
	for n := min(d.number(), maxCountries+1); n > 0; n-- {
		codes = append(codes, string(d.bytes(2)))
	}
	if len(codes) > maxCountries+1 {
		return nil, errCountriesFormat
	}
	table, err := ranges.FromRanges(func(yield func(netip.Addr, uint8) bool) {
		for _, addr := range []func(uint64) netip.Addr{addr4, addr6} {
			n := d.number()
			if n > maxCountriesRanges {
				d.bad = true
				return
			}
			distances := d
			for range n {
				d.number()
			}
			values := d.bytes(n)
			if d.bad {
				return
			}
			var k uint64
			for _, v := range values {
				k += distances.number()
				if int(v) >= len(codes) {
					d.bad = true
					return
				}
				if !yield(addr(k), v) {
					return
				}
			}
		}
	})
	if d.bad || err == nil && len(d.rest) > 0 {
		return nil, errCountriesFormat
	}
	if err != nil {
		return nil, fmt.Errorf("reading the table of countries: %w", err)
	}
	info.Digest = hex.EncodeToString(sum.Sum(nil))
	return newCountries(table, codes, info)
}

// decoder takes numbers and bytes from the front of rest; bad is set, and stays, when there are none.
type decoder struct {
	rest []byte
	bad  bool
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.rest)
	if size <= 0 {
		d.bad, d.rest = true, nil
		return 0
	}
	d.rest = d.rest[size:]
	return n
}

func (d *decoder) bytes(n uint64) []byte {
	if n > uint64(len(d.rest)) {
		d.bad, d.rest = true, nil
		return nil
	}
	b := d.rest[:n]
	d.rest = d.rest[n:]
	return b
}

//go:embed builtin.bin
var builtin []byte

// decoded holds the built-in table from its first use on: unpacking takes some tens of milliseconds, which commands that
// locate nobody need not spend.
var decoded = sync.OnceValues(func() (*Countries, error) { return ReadCountries(bytes.NewReader(builtin)) })

// Builtin returns the table of countries that comes with the program. Its data and their licence are described in
// builtin.LICENSE.
func Builtin() *Countries {
	c, err := decoded()
	if err != nil {
		// The file is compiled in and tested.
		panic(fmt.Sprintf("the built-in table of countries: %v", err))
	}
	return c
}
