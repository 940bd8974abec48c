package geo

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	"github.com/oschwald/maxminddb-golang/v2"
	"github.com/oschwald/maxminddb-golang/v2/mmdbdata"

	"portolan/router"
	"portolan/router/ranges"
	"portolan/topology"
)

// Database is a location database in the MaxMind DB format: one file, or one for each family. It is immutable and safe for
// concurrent use.
//
// The files are kept open, but are mapped only while they are read: what answers clients is compiled (router.Chart), and a
// hundred megabytes of map would be resident for the sake of a few explanations. There is nothing to close: a database
// that was replaced by a newly opened one, and its files, are collected once nobody uses them.
type Database struct {
	files families
	infos []Info
}

// ASNs is a database of autonomous systems in the MaxMind DB format. It is immutable and safe for concurrent use, and held
// like Database.
type ASNs struct {
	files families
	infos []Info
}

var (
	_ router.Locator    = (*Database)(nil)
	_ router.ASNLocator = (*ASNs)(nil)
)

// sampled is how many entries Open reads to see which fields a database has.
const sampled = 10_000

// Open reads the location database at paths: GeoLite2, GeoIP2 and DB-IP City and Country, and the flat form of the
// ip-location-db files (country_code, latitude, longitude; or country_code alone), of which IPv4 and IPv6 come in a file
// each. What a file is, is told by its fields, not by its name. It fails if the entries have neither coordinates nor
// countries, or if two files are of the same family.
//
// An entry without coordinates has those of its country, if that is known.
func Open(paths ...string) (*Database, error) {
	d := &Database{}
	for _, path := range paths {
		f, info, found, err := openFile(path)
		if err != nil {
			return nil, err
		}
		if !found.coordinates && !found.country {
			what := "entries with the fields " + strings.Join(found.names, ", ")
			if found.asn {
				what = "autonomous systems; that is a database for geo.asn"
			}
			return nil, fmt.Errorf("database %q of type %q has %s: want places, as GeoLite2-City, GeoLite2-Country, dbip-city-lite, "+
				"or files with country_code, latitude and longitude have", path, info.Type, what)
		}
		if err := d.files.add(f, found); err != nil {
			return nil, err
		}
		d.infos = append(d.infos, info)
	}
	return d, nil
}

// OpenASN reads the database of autonomous systems at paths: GeoLite2-ASN, GeoIP2-ISP, DB-IP ASN and those of
// ip-location-db (autonomous_system_number).
func OpenASN(paths ...string) (*ASNs, error) {
	s := &ASNs{}
	for _, path := range paths {
		f, info, found, err := openFile(path)
		if err != nil {
			return nil, err
		}
		if !found.asn {
			what := "entries with the fields " + strings.Join(found.names, ", ")
			if found.coordinates || found.country {
				what = "places; that is a database for geo.database"
			}
			return nil, fmt.Errorf("database %q of type %q has %s: want autonomous_system_number, as GeoLite2-ASN has", path, info.Type, what)
		}
		if err := s.files.add(f, found); err != nil {
			return nil, err
		}
		s.infos = append(s.infos, info)
	}
	return s, nil
}

// families are the files that know IPv4 and IPv6, which may be the same; nil for a family that nobody knows.
type families struct{ v4, v6 *file }

func (f *families) of(is6 bool) *file {
	if is6 {
		return f.v6
	}
	return f.v4
}

func (f *families) add(one *file, found fields) error {
	for _, family := range []struct {
		name string
		has  bool
		file **file
	}{{"IPv4", found.v4, &f.v4}, {"IPv6", found.v6, &f.v6}} {
		if !family.has {
			continue
		}
		if *family.file != nil {
			return fmt.Errorf("databases %q and %q both have %s: want one, or a file for each family", (*family.file).path, one.path, family.name)
		}
		*family.file = one
	}
	return nil
}

// fields are those that a sample of entries has, and the families that it has them of.
type fields struct {
	country, coordinates, asn bool
	v4, v6                    bool
	names                     []string
}

// The whole of a family, as far as databases know it: IPv6 addresses outside of the global unicast space (RFC 4291,
// section 2.4) are nobody's. In files of IPv6, IPv4 lies in that part.
var (
	all4 = netip.MustParsePrefix("0.0.0.0/0")
	all6 = netip.MustParsePrefix("2000::/3")
)

func openFile(path string) (*file, Info, fields, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, Info{}, fields{}, err
	}
	info, found := Info{Path: path}, fields{}
	err = f.read(func(reader *maxminddb.Reader, text []byte) error {
		sum := sha256.Sum256(text)
		info.Type, info.Built, info.Digest = reader.Metadata.DatabaseType, reader.Metadata.BuildTime().UTC(), hex.EncodeToString(sum[:])
		if err := found.sample(reader, all4, &found.v4); err != nil {
			return err
		}
		if reader.Metadata.IPVersion == 6 {
			if err := found.sample(reader, all6, &found.v6); err != nil {
				return err
			}
		}
		if !found.v4 && !found.v6 {
			return errors.New("it is empty")
		}
		return nil
	})
	if err != nil {
		return nil, Info{}, fields{}, err
	}
	return f, info, found, nil
}

// sample looks at the first entries within a prefix.
func (f *fields) sample(reader *maxminddb.Reader, within netip.Prefix, has *bool) error {
	n := 0
	for entry := range reader.NetworksWithin(within) {
		var e record
		if err := entry.Decode(&e); err != nil {
			return fmt.Errorf("reading the entry of %v: %w", entry.Prefix(), err)
		}
		*has = true
		f.country = f.country || country(e.country[:]) != nil
		f.coordinates = f.coordinates || e.coordinates()
		f.asn = f.asn || e.asn != 0
		if f.names == nil {
			var all map[string]any
			if err := entry.Decode(&all); err == nil {
				f.names = slices.Sorted(maps.Keys(all))
			}
		}
		if n++; n == sampled || f.coordinates {
			break
		}
	}
	return nil
}

// Infos describe the files.
func (d *Database) Infos() []Info { return d.infos }

// Borders implements router.Locator.
func (d *Database) Borders(is6 bool, visit func(netip.Addr, int, *router.Place) bool) error {
	// Networks of one place share the place in the file where it is described.
	var numbers numbering
	// These are used again for every place: there are hundreds of thousands.
	var fields record
	var place router.Place
	return d.files.borders(is6, func(from netip.Addr, entry maxminddb.Result, found bool) (bool, error) {
		if !found {
			return visit(from, router.NoPlace, nil), nil
		}
		number, met := numbers.of(uint32(entry.Offset())) // see maxDatabase
		if met {
			return visit(from, number, nil), nil
		}
		var err error
		if place, err = placeOf(entry, &fields); err != nil {
			return false, err
		}
		return visit(from, number, &place), nil
	})
}

// numbering numbers offsets from 0 up in the order in which they are met: a hash table with open addressing (Knuth, The Art of Computer
// Programming, volume 3, section 6.4, algorithm L), which is asked 15 million times for a City database. A map takes twice the time and
// four times the memory while it grows.
type numbering struct {
	slots []slot // a power of two of them, at most half of them taken
	taken int
	shift int // from a hash to a slot
}

type slot struct{ offset, number uint32 } // the number plus one; 0: free

// of returns the number of an offset, and whether it was met before.
func (n *numbering) of(offset uint32) (number int, met bool) {
	if 2*n.taken >= len(n.slots) {
		n.grow()
	}
	s := n.find(offset)
	if s.number != 0 {
		return int(s.number) - 1, true
	}
	n.taken++
	*s = slot{offset, uint32(n.taken)}
	return n.taken - 1, false
}

func (n *numbering) find(offset uint32) *slot {
	// Offsets are multiples of nothing, and dense: Fibonacci hashing (section 6.4 as well) spreads them.
	for i := offset * 2654435769 >> n.shift; ; i++ {
		if s := &n.slots[int(i)&(len(n.slots)-1)]; s.number == 0 || s.offset == offset {
			return s
		}
	}
}

func (n *numbering) grow() {
	old := n.slots
	n.slots = make([]slot, max(1<<10, 2*len(old)))
	n.shift = 32 - bits.TrailingZeros(uint(len(n.slots)))
	for _, s := range old {
		if s.number != 0 {
			*n.find(s.offset) = s
		}
	}
}

// Borders implements router.ASNLocator.
func (s *ASNs) Borders(is6 bool, visit func(netip.Addr, uint32) bool) error {
	return s.files.borders(is6, func(from netip.Addr, entry maxminddb.Result, found bool) (bool, error) {
		var e record
		if found {
			if err := entry.Decode(&e); err != nil {
				return false, err
			}
		}
		return visit(from, e.asn), nil
	})
}

// borders visits the first addresses of all networks of a family, and of the gaps between them, which are not found.
func (f *families) borders(is6 bool, visit func(from netip.Addr, entry maxminddb.Result, found bool) (bool, error)) error {
	var none maxminddb.Result
	known := all4
	if is6 {
		known = all6
		if more, err := visit(netip.IPv6Unspecified(), none, false); !more || err != nil {
			return err
		}
	}
	// gap is where what was visited ends: the readers leave out what is an alias of IPv4.
	gap, more := known.Addr(), true
	end := ranges.Last(known).Next()
	if file := f.of(is6); file != nil {
		err := file.read(func(reader *maxminddb.Reader, _ []byte) (err error) {
			for entry := range reader.NetworksWithin(known) {
				if err := entry.Err(); err != nil {
					return err
				}
				network := entry.Prefix()
				if network.Bits() < known.Bits() || network.Addr().Is6() != is6 {
					network = known // one entry around all of it
				}
				if network.Addr() != gap {
					if more, err = visit(gap, none, false); !more || err != nil {
						return err
					}
				}
				gap = ranges.Last(network).Next()
				if more, err = visit(network.Addr(), entry, true); err != nil {
					return fmt.Errorf("reading the entry of %v: %w", network, err)
				}
				if !more {
					return nil
				}
			}
			return nil
		})
		if !more || err != nil {
			return err
		}
	}
	if gap != end || is6 {
		_, err := visit(gap, none, false)
		return err
	}
	return nil
}

// placeOf reads the place of an entry, by way of e, whose content before does not matter.
func placeOf(entry maxminddb.Result, e *record) (router.Place, error) {
	*e = record{}
	if err := entry.Decode(e); err != nil {
		return router.Place{}, err
	}
	var place router.Place
	known := country(e.country[:])
	if known != nil {
		place.Country, place.Continent = known.Code, known.Continent
	}
	// The database's word on the continent counts where it differs.
	if c := continent(e.continent[:]); c != "" {
		place.Continent = c
	}
	switch {
	case e.coordinates():
		place.Located, place.Coordinates = true, topology.Coordinates{Latitude: e.latitude, Longitude: e.longitude}
	case known != nil:
		place.Located, place.Coordinates = true, known.Point
	}
	return place, nil
}

// Locate implements router.Locator. Where the file cannot be read any more, the place is not known, and its source says so.
func (d *Database) Locate(a netip.Addr) router.Place {
	place := router.Place{}
	if !a.IsValid() {
		return place
	}
	a = a.WithZone("")
	file := d.files.of(a.Is6())
	if file == nil {
		place.Network, _ = a.Prefix(0)
		return place
	}
	err := file.read(func(reader *maxminddb.Reader, _ []byte) error {
		entry := reader.Lookup(a)
		if err := entry.Err(); err != nil {
			return err
		}
		network := entry.Prefix()
		if entry.Found() {
			var err error
			if place, err = placeOf(entry, new(record)); err != nil {
				return err
			}
			place.Source = reader.Metadata.DatabaseType
		}
		if a.Is4() && network.Addr().Is6() {
			network = all4
		}
		place.Network = network
		return nil
	})
	if err != nil {
		place = router.Place{Source: err.Error()}
		place.Network, _ = a.Prefix(a.BitLen())
	}
	return place
}

// Infos describe the files.
func (s *ASNs) Infos() []Info { return s.infos }

// record is what is taken from an entry, whatever the schema. It is decoded without reflection and without allocating.
type record struct {
	country, continent  [2]byte
	latitude, longitude float64
	hasLat, hasLon      bool
	asn                 uint32
}

// coordinates is whether e has coordinates that are on Earth.
func (e *record) coordinates() bool {
	return e.hasLat && e.hasLon && e.latitude >= -90 && e.latitude <= 90 && e.longitude >= -180 && e.longitude <= 180
}

// maxFields bounds the fields of one map of an entry: the real ones have some tens.
const maxFields = 1000

var errFields = errors.New("an entry has too many fields")

// UnmarshalMaxMindDBCursor implements mmdbdata.CursorUnmarshaler.
func (e *record) UnmarshalMaxMindDBCursor(c mmdbdata.Cursor) (mmdbdata.Cursor, error) {
	return eachField(c, func(key []byte, c mmdbdata.Cursor) (mmdbdata.Cursor, error) {
		kind, err := c.Kind()
		if err != nil {
			return c, err
		}
		switch {
		case kind == mmdbdata.KindMap && string(key) == "country":
			return letterField(c, "iso_code", &e.country)
		case kind == mmdbdata.KindMap && string(key) == "continent":
			return letterField(c, "code", &e.continent)
		case kind == mmdbdata.KindMap && string(key) == "location":
			return eachField(c, func(key []byte, c mmdbdata.Cursor) (mmdbdata.Cursor, error) {
				return e.coordinate(key, c)
			})
		case string(key) == "country_code":
			return letterPair(c, &e.country)
		case string(key) == "continent_code":
			return letterPair(c, &e.continent)
		case string(key) == "autonomous_system_number":
			return number(c, &e.asn)
		}
		return e.coordinate(key, c)
	})
}

// coordinate reads a latitude or longitude, and skips what is neither.
func (e *record) coordinate(key []byte, c mmdbdata.Cursor) (mmdbdata.Cursor, error) {
	var value *float64
	var has *bool
	switch string(key) {
	case "latitude":
		value, has = &e.latitude, &e.hasLat
	case "longitude":
		value, has = &e.longitude, &e.hasLon
	default:
		return c.Skip()
	}
	kind, err := c.Kind()
	if err != nil {
		return c, err
	}
	if kind != mmdbdata.KindFloat64 && kind != mmdbdata.KindFloat32 {
		return c.Skip()
	}
	f, next, err := c.ReadFloat()
	*value, *has = f, err == nil
	return next, err
}

// eachField calls f with the key and value of each field of the map at c; f returns what follows the value.
func eachField(c mmdbdata.Cursor, f func(key []byte, value mmdbdata.Cursor) (mmdbdata.Cursor, error)) (mmdbdata.Cursor, error) {
	m, err := c.Map()
	if err != nil {
		return c, err
	}
	if m.Size() > maxFields {
		return c, errFields
	}
	var next mmdbdata.Cursor
	for {
		key, value, more := m.Next(next)
		if !more {
			return m.End()
		}
		if next, err = f(key, value); err != nil {
			return c, err
		}
	}
}

// letterField reads the field name of the map at c as two letters, and skips the others.
func letterField(c mmdbdata.Cursor, name string, to *[2]byte) (mmdbdata.Cursor, error) {
	return eachField(c, func(key []byte, c mmdbdata.Cursor) (mmdbdata.Cursor, error) {
		if string(key) != name {
			return c.Skip()
		}
		return letterPair(c, to)
	})
}

// letterPair reads a string of two letters; any other value is skipped.
func letterPair(c mmdbdata.Cursor, to *[2]byte) (mmdbdata.Cursor, error) {
	kind, err := c.Kind()
	if err != nil {
		return c, err
	}
	if kind != mmdbdata.KindString {
		return c.Skip()
	}
	s, next, err := c.ReadString()
	if len(s) == 2 {
		copy(to[:], s)
	}
	return next, err
}

// number reads an unsigned number of 32 bits; any other value is skipped.
func number(c mmdbdata.Cursor, to *uint32) (mmdbdata.Cursor, error) {
	kind, err := c.Kind()
	if err != nil {
		return c, err
	}
	switch kind {
	case mmdbdata.KindUint16, mmdbdata.KindUint32, mmdbdata.KindUint64:
	default:
		return c.Skip()
	}
	n, next, err := c.ReadUint()
	if n <= 1<<32-1 {
		*to = uint32(n)
	}
	return next, err
}
