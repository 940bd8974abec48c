package nearmiss

import "testing"

func TestOf(t *testing.T) {
	t.Parallel()
	words := []string{"weight", "routing", "endpoint", "addresses", "westeurope", "westus"}
	for word, want := range map[string]string{
		"wieght": "weight", "weigth": "weight", "routng": "routing", "address": "addresses",
		"westeurpe": "westeurope", "west-us": "westus", "x": "", "": "", "entirely": "",
	} {
		got, ok := Of(word, words)
		if got != want || ok != (want != "") {
			t.Errorf("Of(%q) = %q, %v; want %q", word, got, ok, want)
		}
	}
}

func TestDistance(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"abc", "abc", 0}, {"abc", "acb", 1}, {"abc", "ab", 1}, {"kitten", "sitting", 3}, {"", "abc", 3}} {
		if got := distance(c.a, c.b, 9); got != c.want {
			t.Errorf("distance(%q, %q) = %d, want %d", c.a, c.b, got, c.want)
		}
	}
}
