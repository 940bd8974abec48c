// Command city makes one location database in the GeoIP2 City schema out of the two flat ones of ip-location-db, so that
// servers that know no other schema are measured on the networks that Portolan is measured on:
//
//	go run ./test/bench/city OUT.mmdb IPV4.mmdb IPV6.mmdb
//
// Every network of the originals is taken over with its coordinates, country, continent and city's name. What gets lost:
// neighbours that are alike in all of these become one, and networks in IPv6 blocks that are aliases of IPv4 (6to4, Teredo)
// are left out, as the format has the aliases there. It takes some minutes and 5 GB of memory.
package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/maxmind/mmdbwriter"
	"github.com/maxmind/mmdbwriter/mmdbtype"
	"github.com/oschwald/maxminddb-golang/v2"

	"portolan/router/geo"
)

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: city OUT.mmdb FLAT.mmdb...")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintf(os.Stderr, "city: %v\n", err)
		os.Exit(1)
	}
}

// flat is an entry of an ip-location-db file.
type flat struct {
	Country   string  `maxminddb:"country_code"`
	City      string  `maxminddb:"city"`
	Latitude  float64 `maxminddb:"latitude"`
	Longitude float64 `maxminddb:"longitude"`
}

func run(out string, from []string) error {
	tree, err := mmdbwriter.New(mmdbwriter.Options{
		// gdnsd and Knot look at the type: it has to say City, and whose schema it is.
		DatabaseType: "GeoIP2-City", Description: map[string]string{"en": "ip-location-db dbip-city in the GeoIP2 schema, for benchmarks"},
		Languages: []string{"en"}, IncludeReservedNetworks: true, RecordSize: 32,
	})
	if err != nil {
		return fmt.Errorf("beginning a database: %w", err)
	}
	debug.SetGCPercent(400) // nothing becomes garbage before the end
	networks, aliases := 0, 0
	for _, path := range from {
		n, a, err := add(tree, path)
		if err != nil {
			return err
		}
		networks, aliases = networks+n, aliases+a
	}
	if err := write(tree, out); err != nil {
		return err
	}
	fmt.Printf("%s: %d networks; %d more lie in aliases of IPv4 and were left out\n", out, networks, aliases)
	return nil
}

// add puts the networks of the file at path into the tree, and returns how many there were, and how many were aliases.
func add(tree *mmdbwriter.Tree, path string) (networks, aliases int, err error) {
	places, err := geo.Open(path) // knows the continents
	if err != nil {
		return 0, 0, err
	}
	reader, err := maxminddb.Open(path)
	if err != nil {
		return 0, 0, fmt.Errorf("opening %q: %w", path, err)
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	entries := make(map[uintptr]mmdbtype.Map)
	continents := make(map[string]string)
	for network := range reader.Networks() {
		prefix := network.Prefix()
		entry, met := entries[network.Offset()]
		if !met {
			var f flat
			if err := network.Decode(&f); err != nil {
				return 0, 0, fmt.Errorf("reading %q at %v: %w", path, prefix, err)
			}
			if _, met := continents[f.Country]; !met {
				continents[f.Country] = places.Locate(prefix.Addr()).Continent
			}
			entry = schema(f, continents[f.Country])
			entries[network.Offset()] = entry
		}
		err := tree.Insert(ipNet(prefix), entry)
		var aliased *mmdbwriter.AliasedNetworkError
		switch {
		case errors.As(err, &aliased):
			aliases++
		case err != nil:
			return 0, 0, fmt.Errorf("taking over %v of %q: %w", prefix, path, err)
		default:
			networks++
		}
	}
	return networks, aliases, nil
}

// schema is f as GeoIP2 City has it, as far as servers read it.
func schema(f flat, continent string) mmdbtype.Map {
	return mmdbtype.Map{
		"city":      mmdbtype.Map{"names": mmdbtype.Map{"en": mmdbtype.String(f.City)}},
		"continent": mmdbtype.Map{"code": mmdbtype.String(continent)},
		"country":   mmdbtype.Map{"iso_code": mmdbtype.String(f.Country)},
		"location":  mmdbtype.Map{"latitude": mmdbtype.Float64(f.Latitude), "longitude": mmdbtype.Float64(f.Longitude)},
	}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// write writes the database beside out and puts it there when it is whole.
func write(tree *mmdbwriter.Tree, out string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(out), "city-")
	if err != nil {
		return fmt.Errorf("writing %q: %w", out, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("writing %q: %w", out, err), os.Remove(f.Name()))
		}
	}()
	if _, err := tree.WriteTo(f); err != nil {
		return errors.Join(err, f.Close())
	}
	return errors.Join(f.Chmod(0o644), f.Close(), os.Rename(f.Name(), out))
}
