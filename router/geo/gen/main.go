// Command gen refreshes the built-in table of countries, router/geo/builtin.bin, which it makes out of two npm packages.
//
//	go run ./router/geo/gen            move to the newest versions of the packages, and make the table
//	go run ./router/geo/gen -pinned    make it again out of the versions in sources.json, whose hashes are checked
//
// It is run by `make geo` from the top of the tree. The same packages make the same bytes with the same Go release. Newer
// versions are pinned in sources.json and named in builtin.LICENSE; a package whose licence is another one than before is
// refused, since builtin.LICENSE has to say other things then. Their READMEs and licence files should be looked at, too.
package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
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
	"strings"
	"time"

	"github.com/oschwald/maxminddb-golang/v2"

	"portolan/router/geo"
	"portolan/router/ranges"
)

// source is a package, pinned by the hash that npm's own lock files hold, and the file in it that has both families.
type source struct {
	Name      string `json:"name"`
	Version   string `json:"version"`
	Integrity string `json:"integrity"`
	License   string `json:"license"` // SPDX, as its package.json says
	Member    string `json:"member"`
}

// sources are the packages, as in sources.json.
type sources struct {
	// Registered tells where the users of an address are registered: geofeeds, then the registries' records.
	Registered source `json:"registered"`
	// Routed tells the country of the network that announces an address.
	Routed source `json:"routed"`
}

// In 2001::/16 registered has nearly all of the Asian and Pacific registry's space in Australia, where that registry
// sits: also the large networks of Japan, China, Korea and Malaysia. There, and only there, its AU is not believed, and
// routed is asked instead; what routed does not know has no country.
var doubtful = netip.MustParsePrefix("2001::/16")

const doubtfulCountry = "AU"

// kind is what the table calls itself.
func kind(of sources) string { return "built-in country table " + of.Registered.Version }

// maxPackage bounds the package and what is unpacked of it: ten times today's size.
const maxPackage = 160 << 20

func main() {
	dir := flag.String("geo", filepath.Join("router", "geo"), "the `directory` of the package geo")
	pinned := flag.Bool("pinned", false, "stay with the versions in sources.json")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *dir, *pinned); err != nil {
		fmt.Fprintln(os.Stderr, "gen:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, pinned bool) error {
	pins, licence := filepath.Join(dir, "gen", "sources.json"), filepath.Join(dir, "builtin.LICENSE")
	before, err := readSources(pins)
	if err != nil {
		return err
	}
	after := before
	if !pinned {
		for _, s := range []*source{&after.Registered, &after.Routed} {
			if *s, err = newest(ctx, *s); err != nil {
				return err
			}
		}
	}
	text, err := os.ReadFile(licence)
	if err != nil {
		return fmt.Errorf("reading the licence: %w", err)
	}
	if text, err = renamed(text, before, after); err != nil {
		return fmt.Errorf("%s: %w", licence, err)
	}
	if err := build(ctx, after, filepath.Join(dir, "builtin.bin")); err != nil {
		return err
	}
	packed, err := json.MarshalIndent(after, "", "\t")
	if err != nil {
		return fmt.Errorf("packing the sources: %w", err)
	}
	if err := os.WriteFile(pins, append(packed, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the sources: %w", err)
	}
	if err := os.WriteFile(licence, text, 0o644); err != nil {
		return fmt.Errorf("writing the licence: %w", err)
	}
	return nil
}

// readSources reads sources.json.
func readSources(path string) (sources, error) {
	var of sources
	text, err := os.ReadFile(path)
	if err != nil {
		return of, fmt.Errorf("reading the sources: %w", err)
	}
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&of); err != nil {
		return of, fmt.Errorf("reading the sources in %s: %w", path, err)
	}
	return of, nil
}

// newest asks npm for the newest version of s.
func newest(ctx context.Context, s source) (source, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "view", "--json", s.Name+"@latest", "name", "version", "license", "dist.integrity")
	npm.Stderr = os.Stderr
	answer, err := npm.Output()
	if err != nil {
		return s, fmt.Errorf("running npm view %s: %w", s.Name, err)
	}
	return moved(s, answer)
}

// moved is s at the version that npm's answer tells of.
func moved(s source, answer []byte) (source, error) {
	var latest struct {
		Name      string `json:"name"`
		Version   string `json:"version"`
		License   string `json:"license"`
		Integrity string `json:"dist.integrity"`
	}
	if err := json.Unmarshal(answer, &latest); err != nil {
		return s, fmt.Errorf("reading what npm says of %s: %w", s.Name, err)
	}
	switch {
	case latest.Name != s.Name || latest.Version == "" || !strings.HasPrefix(latest.Integrity, "sha512-"):
		return s, fmt.Errorf("npm says of %s what is no version of it: %+v", s.Name, latest)
	case latest.License != s.License:
		return s, fmt.Errorf("%s %s is under the licence %q, and %s was under %q: bring builtin.LICENSE and sources.json up to date first",
			s.Name, latest.Version, latest.License, s.Version, s.License)
	}
	s.Version, s.Integrity = latest.Version, latest.Integrity
	return s, nil
}

// renamed is the text of the licence with the versions of after in the place of those of before.
func renamed(text []byte, before, after sources) ([]byte, error) {
	for _, s := range [][2]source{{before.Registered, after.Registered}, {before.Routed, after.Routed}} {
		old := []byte(named(s[0]))
		if bytes.Count(text, old) != 1 {
			return nil, fmt.Errorf("does not say %q, once", old)
		}
		text = bytes.Replace(text, old, []byte(named(s[1])), 1)
	}
	return text, nil
}

// named is s as the licence names it.
func named(s source) string { return s.Name + ", version " + s.Version }

// country is the field of both databases.
type country struct {
	Code string `maxminddb:"country_code"`
}

// build writes the table of the packages to out.
func build(ctx context.Context, of sources, out string) error {
	db, err := fetch(ctx, of.Registered)
	if err != nil {
		return err
	}
	second, err := fetch(ctx, of.Routed)
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
	table, err := geo.NewCountries(kind(of), db.Metadata.BuildTime().UTC(), entries)
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
	fmt.Printf("fetching %s@%s\n", from.Name, from.Version)
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	npm := exec.CommandContext(ctx, "npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", dir, from.Name+"@"+from.Version)
	npm.Dir, npm.Stderr = dir, os.Stderr
	if err := npm.Run(); err != nil {
		return nil, fmt.Errorf("running npm pack %s@%s: %w", from.Name, from.Version, err)
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
	if got := "sha512-" + base64.StdEncoding.EncodeToString(sum[:]); got != from.Integrity {
		return nil, fmt.Errorf("package %s@%s has the hash %s, want %s", from.Name, from.Version, got, from.Integrity)
	}
	database, err := unpack(packed, from.Member)
	if err != nil {
		return nil, fmt.Errorf("package %s@%s: %w", from.Name, from.Version, err)
	}
	db, err := maxminddb.OpenBytes(database)
	if err != nil {
		return nil, fmt.Errorf("opening %s of %s@%s: %w", from.Member, from.Name, from.Version, err)
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
