// Package geo tells where addresses are: the router's Locators.
//
// Open reads location databases in the MaxMind DB format, OpenASN those of autonomous systems, and Builtin is a table of
// countries that comes with the program, so that it works with no download. A database that knows countries only places
// clients where the people of the country are.
//
// The package decides nothing, watches no files and downloads nothing; geo/gen makes the built-in table.
package geo

import (
	_ "embed"
	"encoding/csv"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"portolan/topology"
)

// Info describes a database, for the status of a server.
type Info struct {
	// Path is the file; empty for the built-in table.
	Path string `json:"path,omitempty"`
	// Type is what the database calls itself.
	Type string `json:"type"`
	// Built is when its maker built it.
	Built time.Time `json:"built"`
	// Digest is the SHA-256 of the file, in hexadecimal: servers that answer alike have the same.
	Digest string `json:"digest"`
	// Lines is how many a table of the operator's has.
	Lines int `json:"lines,omitempty"`
}

// Age is how old the database is at now, never negative.
func (i Info) Age(now time.Time) time.Duration { return max(0, now.Sub(i.Built)) }

// Country is a country or area of ISO 3166-1.
type Country struct {
	// Code is ISO 3166-1 alpha-2, upper case.
	Code string
	// Continent is AF, AN, AS, EU, NA, OC or SA.
	Continent string
	// Point stands for the clients in it: where the people are, not the middle of the map.
	Point topology.Coordinates
	// Near is what lies there.
	Near string
}

//go:embed countries.csv
var countriesCSV string

// countries are those of countries.csv, by letters.
var countries = sync.OnceValues(func() (*[26 * 26]Country, error) {
	r := csv.NewReader(strings.NewReader(countriesCSV))
	r.Comment = '#'
	r.FieldsPerRecord = 5
	records, err := r.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("reading the table of countries: %w", err)
	}
	var all [26 * 26]Country
	for _, f := range records {
		i := letters(f[0])
		latitude, err1 := strconv.ParseFloat(f[2], 64)
		longitude, err2 := strconv.ParseFloat(f[3], 64)
		if i < 0 || err1 != nil || err2 != nil || continent(f[1]) == "" {
			return nil, fmt.Errorf("reading the table of countries: bad line %q", f)
		}
		all[i] = Country{Code: f[0], Continent: continent(f[1]), Point: topology.Coordinates{Latitude: latitude, Longitude: longitude}, Near: f[4]}
	}
	return &all, nil
})

// letters is the index of a code of two capital letters, or -1.
func letters[T string | []byte](code T) int {
	if len(code) != 2 || code[0] < 'A' || code[0] > 'Z' || code[1] < 'A' || code[1] > 'Z' {
		return -1
	}
	return int(code[0]-'A')*26 + int(code[1]-'A')
}

// continent is the constant of a continent's code, or "".
func continent[T string | []byte](code T) string {
	switch string(code) {
	case "AF":
		return "AF"
	case "AN":
		return "AN"
	case "AS":
		return "AS"
	case "EU":
		return "EU"
	case "NA":
		return "NA"
	case "OC":
		return "OC"
	case "SA":
		return "SA"
	}
	return ""
}

// country returns the country of that code, or nil.
func country[T string | []byte](code T) *Country {
	all, err := countries()
	if err != nil {
		// The file is compiled in and tested.
		panic(err)
	}
	i := letters(code)
	if i < 0 || all[i].Code == "" {
		return nil
	}
	return &all[i]
}
