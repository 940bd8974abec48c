package geo

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/oschwald/maxminddb-golang/v2"
	"github.com/oschwald/maxminddb-golang/v2/mmdbdata"

	"portolan/router"
	"portolan/topology"
)

// Database is a location database in the MaxMind DB format. It is immutable and safe for concurrent use.
//
// The file is read into memory rather than mapped: a mapped file that someone overwrites in place changes under its
// readers, and one that is cut short kills the process (SIGBUS). So there is nothing to close: readers keep what they
// hold, and a database that was replaced by a newly opened one is collected once nobody uses it.
type Database struct {
	reader *maxminddb.Reader
	info   Info
	// kind is "city" or "country".
	kind string
}

// ASNs is a database of autonomous systems in the MaxMind DB format. It is immutable and safe for concurrent use, and held
// in memory like Database.
type ASNs struct {
	reader *maxminddb.Reader
	info   Info
}

var (
	_ router.Locator    = (*Database)(nil)
	_ router.ASNLocator = (*ASNs)(nil)
)

// maxDatabase bounds the size of a database file: the largest sold today have some hundred megabytes.
const maxDatabase = 2 << 30

// sampled is how many entries Open reads to see which fields a database has.
const sampled = 10_000

// Open reads the location database at path: GeoLite2, GeoIP2 and DB-IP City and Country, and the flat form of the
// ip-location-db files (country_code, latitude, longitude; or country_code alone). What it is, is told by its fields,
// not by its name. It fails if the entries have neither coordinates nor countries.
//
// An entry without coordinates has those of its country, if that is known.
func Open(path string) (*Database, error) {
	reader, info, found, err := open(path)
	if err != nil {
		return nil, err
	}
	switch {
	case found.coordinates:
		return &Database{reader, info, "city"}, nil
	case found.country:
		return &Database{reader, info, "country"}, nil
	}
	what := "entries with the fields " + strings.Join(found.names, ", ")
	if found.asn {
		what = "autonomous systems; that is a database for geo.asn"
	}
	return nil, fmt.Errorf("database %q of type %q has %s: want places, as GeoLite2-City, GeoLite2-Country, dbip-city-lite, "+
		"or files with country_code, latitude and longitude have", path, info.Type, what)
}

// OpenASN reads the database of autonomous systems at path: GeoLite2-ASN, GeoIP2-ISP, DB-IP ASN and those of
// ip-location-db (autonomous_system_number).
func OpenASN(path string) (*ASNs, error) {
	reader, info, found, err := open(path)
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
	return &ASNs{reader, info}, nil
}

// fields are those that a sample of entries has.
type fields struct {
	country, coordinates, asn bool
	names                     []string
}

func open(path string) (*maxminddb.Reader, Info, fields, error) {
	fail := func(err error) (*maxminddb.Reader, Info, fields, error) { return nil, Info{}, fields{}, err }
	buffer, err := read(path)
	if err != nil {
		return fail(err)
	}
	reader, err := maxminddb.OpenBytes(buffer)
	if err != nil {
		return fail(fmt.Errorf("database %q is no file in the MaxMind DB format (.mmdb), or a damaged one: %w", path, err))
	}
	sum := sha256.Sum256(buffer)
	info := Info{
		Path: path, Type: reader.Metadata.DatabaseType,
		Built: reader.Metadata.BuildTime().UTC(), Digest: hex.EncodeToString(sum[:]),
	}
	var found fields
	n := 0
	for entry := range reader.Networks() {
		var e record
		if err := entry.Decode(&e); err != nil {
			return fail(fmt.Errorf("database %q of type %q: reading the entry of %v: %w", path, info.Type, entry.Prefix(), err))
		}
		found.country = found.country || country(e.country[:]) != nil
		found.coordinates = found.coordinates || e.coordinates()
		found.asn = found.asn || e.asn != 0
		if n == 0 {
			var all map[string]any
			if err := entry.Decode(&all); err == nil {
				for name := range all {
					found.names = append(found.names, name)
				}
				slices.Sort(found.names)
			}
		}
		if n++; n == sampled || found.coordinates {
			break
		}
	}
	if n == 0 {
		return fail(fmt.Errorf("database %q of type %q is empty", path, info.Type))
	}
	return reader, info, found, nil
}

// read reads a file of a bounded size.
func read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	if !stat.Mode().IsRegular() {
		return nil, fmt.Errorf("database %q is not a file", path)
	}
	if stat.Size() > maxDatabase {
		return nil, fmt.Errorf("database %q has %d bytes, more than %d", path, stat.Size(), maxDatabase)
	}
	buffer := make([]byte, stat.Size())
	if _, err := io.ReadFull(f, buffer); err != nil {
		return nil, fmt.Errorf("reading the database %q: %w", path, err)
	}
	return buffer, nil
}

// Info describes the database.
func (d *Database) Info() Info { return d.info }

// Kind is "city" if the database knows coordinates, "country" if it knows countries only.
func (d *Database) Kind() string { return d.kind }

// Locate implements router.Locator. An entry that cannot be read is as one without a place.
func (d *Database) Locate(a netip.Addr) router.Place {
	result, found, network := lookup(d.reader, a)
	place := router.Place{Network: network}
	if !found {
		return place
	}
	var e record
	if err := result.Decode(&e); err != nil {
		return place
	}
	place.Source = d.info.Type
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
	return place
}

// Info describes the database.
func (s *ASNs) Info() Info { return s.info }

// ASN implements router.ASNLocator. An entry that cannot be read is as one without a number.
func (s *ASNs) ASN(a netip.Addr) (uint32, netip.Prefix) {
	result, found, network := lookup(s.reader, a)
	var e record
	if found && result.Decode(&e) != nil {
		e = record{}
	}
	return e.asn, network
}

// lookup finds the entry that holds a, and the network of that entry or of the hole in the tree. In a tree of IPv6 all of
// IPv4 may lie in one entry that is shorter than where IPv4 starts. A tree of IPv4 has one hole for all of IPv6: it is not
// asked, since its answer to each address would be an error that tells no network.
func lookup(r *maxminddb.Reader, a netip.Addr) (entry maxminddb.Result, found bool, network netip.Prefix) {
	if !a.IsValid() {
		return entry, false, netip.Prefix{}
	}
	if a.Is6() && r.Metadata.IPVersion == 4 {
		return entry, false, netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	entry = r.Lookup(a)
	if entry.Err() != nil {
		return entry, false, netip.PrefixFrom(a.WithZone(""), a.BitLen())
	}
	network = entry.Prefix()
	if a.Is4() && network.Addr().Is6() {
		network = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return entry, entry.Found(), network
}

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
