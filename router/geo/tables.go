package geo

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"portolan/router"
	"portolan/topology"
)

// maxTable bounds the tables of operators in bytes: a hundred times what a hundred thousand prefixes take.
const maxTable = 512 << 20

// maxFaults is how many faults of a table are told at once.
const maxFaults = 10

// maxLatency is the longest round trip in milliseconds that a table may hold: more is a slip of units.
const maxLatency = 10_000

// ReadPrefixes reads orders for prefixes: lines of a prefix and the regions that its clients are to be sent to first, separated by
// commas, as "203.0.113.0/24 westus,eastus". Empty lines, and what follows a #, are passed over. The error tells of the first faults,
// by line.
func ReadPrefixes(path string) (*router.Prefixes, Info, error) {
	orders := make(map[netip.Prefix][]string)
	known := make(map[string][]string) // a table of a hundred thousand lines has some tens of lists
	info, err := readTable(path, "prefixes", func(fields []string) error {
		if len(fields) != 2 {
			return errors.New("want a prefix and regions, as 203.0.113.0/24 westus,eastus")
		}
		prefix, err := netip.ParsePrefix(fields[0])
		if err != nil {
			return fmt.Errorf("%q is no prefix, as 203.0.113.0/24", fields[0])
		}
		if prefix != prefix.Masked() {
			return fmt.Errorf("%v has bits beyond its length: %v?", prefix, prefix.Masked())
		}
		given := prefix
		prefix = router.LookupPrefix(given)
		if _, twice := orders[prefix]; twice && prefix != given {
			return fmt.Errorf("%v holds the clients of %v, which has a line already", given, prefix)
		} else if twice {
			return fmt.Errorf("%v has a line already", prefix)
		}
		regions, ok := known[fields[1]]
		if !ok {
			if regions, err = topology.ParseRegions(fields[1]); err != nil {
				return err
			}
			known[fields[1]] = regions
		}
		orders[prefix] = regions
		return nil
	})
	if err != nil {
		return nil, info, err
	}
	return router.NewPrefixes(orders), info, nil
}

// ReadLatencies reads round-trip times: lines of a country or a continent, a region, and milliseconds, as "country/DE westeurope 14"
// or "continent/EU westus 140". Empty lines, and what follows a #, are passed over. The error tells of the first faults, by line.
func ReadLatencies(path string) (*router.Latencies, Info, error) {
	countries, continents := make(map[string]map[string]int), make(map[string]map[string]int)
	info, err := readTable(path, "latencies", func(fields []string) error {
		if len(fields) != 3 {
			return errors.New("want a country or a continent, a region and milliseconds, as country/DE westeurope 14")
		}
		kind, code, _ := strings.Cut(fields[0], "/")
		all := countries
		switch {
		case kind == "country" && country(code) != nil:
		case kind == "continent" && continent(code) != "":
			all = continents
		case kind == "country":
			return fmt.Errorf("%q is no country of ISO 3166-1, as DE", code)
		case kind == "continent":
			return fmt.Errorf("%q is no continent: AF, AN, AS, EU, NA, OC or SA", code)
		default:
			return fmt.Errorf("%q: want country/DE or continent/EU", fields[0])
		}
		if regions, err := topology.ParseRegions(fields[1]); err != nil || len(regions) > 1 {
			return cmp.Or(err, fmt.Errorf("%q: want one region a line", fields[1]))
		}
		ms, err := strconv.Atoi(fields[2])
		if err != nil || ms < 1 || ms > maxLatency {
			return fmt.Errorf("%q: want whole milliseconds from 1 to %d", fields[2], maxLatency)
		}
		if all[code] == nil {
			all[code] = make(map[string]int)
		}
		if _, twice := all[code][fields[1]]; twice {
			return fmt.Errorf("%s to %s has a line already", fields[0], fields[1])
		}
		all[code][fields[1]] = ms
		return nil
	})
	if err != nil {
		return nil, info, err
	}
	return router.NewLatencies(countries, continents), info, nil
}

// readTable reads the lines of a file of the given type.
func readTable(path, kind string, line func(fields []string) error) (Info, error) {
	info := Info{Path: path, Type: kind}
	at, err := os.Stat(path)
	if err != nil {
		return info, err
	}
	if at.Size() > maxTable {
		return info, fmt.Errorf("%s: %d bytes are more than a table of %s can have, %d", path, at.Size(), kind, maxTable)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return info, err
	}
	digest := sha256.Sum256(text)
	info.Built, info.Digest = at.ModTime().UTC(), hex.EncodeToString(digest[:])
	var faults []error
	lines := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; lines.Scan() && len(faults) < maxFaults; n++ {
		before, _, _ := strings.Cut(lines.Text(), "#")
		if fields := strings.Fields(before); len(fields) > 0 {
			info.Lines++
			if err := line(fields); err != nil {
				faults = append(faults, fmt.Errorf("%s:%d: %w", path, n, err))
			}
		}
	}
	if err := lines.Err(); err != nil {
		faults = append(faults, fmt.Errorf("%s: %w", path, err))
	}
	return info, errors.Join(faults...)
}
