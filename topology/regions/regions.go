// Package regions is the catalogue of the public regions of Azure, AWS and Google Cloud: where a named region is.
//
// It holds facts only: names, cities, coordinates. Which regions a registry uses, and regions of the operator's own, are
// topology's.
//
// Sources. Names, display names and cities: Microsoft "Azure regions list" and the output of `az account
// list-locations`; Amazon "AWS Regions" (Regions and Zones user guide) and the AWS General Reference, the European
// Sovereign Cloud and the China and GovCloud partitions included; Google "Cloud locations" and "Regions and zones".
// Providers name a city, a county or a state, seldom an address: the coordinates are those of the named city or county
// seat (for a state, of the town that the provider's own filings or press name) in decimal degrees (WGS 84) as found in
// GeoNames, rounded to two digits, about a kilometre: far finer than distance from a client matters.
//
// The providers' names do not collide: Azure writes words without hyphens (westeurope), AWS hyphens before the number
// (eu-west-1), Google none before it (europe-west4). A test holds this true, so a name alone is enough.
package regions

import (
	"slices"
	"strings"

	"portolan/strict/nearmiss"
)

// Provider is who runs a region.
type Provider string

// The providers of the catalogue.
const (
	Azure  Provider = "Azure"
	AWS    Provider = "AWS"
	Google Provider = "Google Cloud"
)

// Region is a public region.
type Region struct {
	// Name is the provider's own identifier: a lower-case LDH label.
	Name     string
	Provider Provider
	// Display is the provider's name for people.
	Display string
	// City is the place that the coordinates are of.
	City string
	// Latitude and Longitude are in decimal degrees, north and east positive.
	Latitude, Longitude float64
	// Continent is one of AF AS EU NA OC SA.
	Continent string
}

// Lookup returns the region of that name.
func Lookup(name string) (Region, bool) {
	i, found := slices.BinarySearchFunc(catalogue[:], name, func(r Region, n string) int { return strings.Compare(r.Name, n) })
	if !found {
		return Region{}, false
	}
	return catalogue[i], true
}

// Suggest returns the name of the region that a misspelt name was probably meant to be.
func Suggest(name string) (string, bool) {
	names := make([]string, len(catalogue))
	for i, r := range catalogue {
		names[i] = r.Name
	}
	return nearmiss.Of(strings.ToLower(strings.ReplaceAll(name, " ", "")), names)
}
