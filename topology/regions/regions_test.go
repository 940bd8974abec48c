package regions

import (
	"math"
	"regexp"
	"testing"
)

func TestCatalogue(t *testing.T) {
	t.Parallel()
	label := regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	shape := map[Provider]*regexp.Regexp{
		Azure:  regexp.MustCompile(`^[a-z]+[0-9]?$`),
		AWS:    regexp.MustCompile(`^[a-z]+(-[a-z]+)+-[0-9]$`),
		Google: regexp.MustCompile(`^[a-z]+-[a-z]+[0-9]+$`),
	}
	// The boxes are wide; they catch swapped coordinates and wrong signs.
	boxes := map[string][4]float64{
		"AF": {-36, 38, -20, 52}, "AS": {-11, 56, 26, 146}, "EU": {34, 72, -25, 40},
		"NA": {7, 72, -170, -50}, "OC": {-48, 0, 110, 180}, "SA": {-56, 13, -82, -34},
	}
	count := map[Provider]int{}
	previous := ""
	for _, r := range catalogue {
		count[r.Provider]++
		if !label.MatchString(r.Name) || !shape[r.Provider].MatchString(r.Name) {
			t.Errorf("%s: not a name of %s", r.Name, r.Provider)
		}
		if r.Name <= previous {
			t.Errorf("%s stands after %s: not sorted, or twice", r.Name, previous)
		}
		previous = r.Name
		box, known := boxes[r.Continent]
		if !known || r.Latitude < box[0] || r.Latitude > box[1] || r.Longitude < box[2] || r.Longitude > box[3] {
			t.Errorf("%s: %v,%v is not in %q", r.Name, r.Latitude, r.Longitude, r.Continent)
		}
		if r.Display == "" || r.City == "" {
			t.Errorf("%s: no display name or city", r.Name)
		}
		if got, ok := Lookup(r.Name); !ok || got != r {
			t.Errorf("Lookup(%q) = %v, %v", r.Name, got, ok)
		}
	}
	if count[Azure] < 60 || count[AWS] < 35 || count[Google] < 42 {
		t.Errorf("the catalogue has lost regions: %v", count)
	}
}

// Regions of one city have one place, whoever runs them.
func TestCitiesAgree(t *testing.T) {
	t.Parallel()
	seen := map[string]Region{}
	for _, r := range catalogue {
		if other, ok := seen[r.City]; ok && (math.Abs(other.Latitude-r.Latitude) > 0 || math.Abs(other.Longitude-r.Longitude) > 0) {
			t.Errorf("%s and %s are both in %s, at different places", r.Name, other.Name, r.City)
		}
		seen[r.City] = r
	}
}

func TestLookupUnknown(t *testing.T) {
	t.Parallel()
	if r, ok := Lookup("moon-1"); ok {
		t.Errorf("Lookup(moon-1) = %v", r)
	}
}

func TestSuggest(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"westeurpe": "westeurope", "WestEurope": "westeurope", "West Europe": "westeurope", "eu-west1": "eu-west-1", "europe-west-4": "europe-west4", "zzzzzz": "",
	} {
		got, ok := Suggest(name)
		if got != want || ok != (want != "") {
			t.Errorf("Suggest(%q) = %q, %v; want %q", name, got, ok, want)
		}
	}
}
