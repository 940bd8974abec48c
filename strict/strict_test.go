package strict

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"
)

type file struct {
	Word     string              `yaml:"word"`
	Secret   string              `yaml:"secret"`
	Yes      bool                `yaml:"yes"`
	Count    *int                `yaml:"count,omitempty"`
	Share    float64             `yaml:"share"`
	Wait     time.Duration       `yaml:"wait"`
	Listen   netip.AddrPort      `yaml:"listen"`
	Rules    map[string][]string `yaml:"rules"`
	Sections []section           `yaml:"sections"`
}

type section struct {
	Name string     `yaml:"name"`
	At   netip.Addr `yaml:"at"`
}

func decode(text string, into *file) *File {
	return Decode("f.yaml", []byte(text), into, Options{
		Limit:  1000,
		Secret: func(path, line string) bool { return path == "secret" },
		Check: func(path, text string) error {
			if path == "word" && text == "no" {
				return fmt.Errorf("%q is refused", text)
			}
			return nil
		},
	})
}

func TestDecode(t *testing.T) {
	t.Parallel()
	got := file{Word: "before", Secret: "stays"}
	f := decode(`word: NO
yes: true
count: 3
share: -0.0
wait: 5s
listen: "[::1]:80"
rules: {DE: [a, b], 64500: [], "1.0": [1e2]}
sections:
  - {name: x, at: 192.0.2.1}
  - name: |
      y
`, &got)
	if err := f.Err(); err != nil {
		t.Fatal(err)
	}
	three := 3
	want := file{Word: "NO", Secret: "stays", Yes: true, Count: &three, Wait: 5 * time.Second, Listen: netip.MustParseAddrPort("[::1]:80"),
		Rules:    map[string][]string{"DE": {"a", "b"}, "64500": {}, "1.0": {"1e2"}},
		Sections: []section{{"x", netip.MustParseAddr("192.0.2.1")}, {Name: "y\n"}}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if f.Empty() || math.Signbit(got.Share) {
		t.Errorf("empty %v, share %v", f.Empty(), got.Share)
	}
	// What the whole shows has the place of the value, or of what it would stand in.
	f.Fault("sections[1].at", "is missing")
	f.Fault("wait", "is too long")
	f.Fault("nowhere.at.all", "is missing")
	wantError := "f.yaml: nowhere.at.all: is missing\nf.yaml:5:7: wait: is too long\n       5 | wait: 5s\nf.yaml:10:5: sections[1].at: is missing\n      10 |   - name: |"
	if err := f.Err(); err == nil || err.Error() != wantError {
		t.Errorf("got\n%v\nwant\n%s", err, wantError)
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ text, want string }{
		"all at once":      {"yes: si\nwrod: x\ncount: many", "f.yaml:1:6: yes: \"si\" is neither true nor false\n       1 | yes: si\nf.yaml:2:1: wrod: \"wrod\" is not known here; did you mean \"word\"?\n       2 | wrod: x\nf.yaml:3:8: count: \"many\" is not a whole number\n       3 | count: many"},
		"hexadecimal":      {"share: 0x1", "f.yaml:1:8: share: \"0x1\" is not a number\n       1 | share: 0x1"},
		"check":            {"word: no", "f.yaml:1:7: word: \"no\" is refused\n       1 | word: no"},
		"secret":           {"secret: [hunter2]", "f.yaml:1:9: secret: is a list: a single value is needed"},
		"empty":            {"word: ' '", "f.yaml:1:7: word: is empty: give a value, or leave it out\n       1 | word: ' '"},
		"list":             {"rules: {a: b}", "f.yaml:1:12: rules.a: is a single value: a list is needed, such as [a, b]\n       1 | rules: {a: b}"},
		"list of sections": {"sections: {a: b}", "f.yaml:1:11: sections: is a set of keys: a list is needed\n       1 | sections: {a: b}"},
		"section":          {"sections: [a]", "f.yaml:1:12: sections[0]: is a single value: keys with values are needed\n       1 | sections: [a]"},
		"anchor":           {"word: &a b", "f.yaml:1:7: word: is an anchor or alias, which are not used here: a single value is needed\n       1 | word: &a b"},
		"tag":              {"word: !!str b", "f.yaml:1:7: word: is tagged, which is not used here: a single value is needed\n       1 | word: !!str b"},
		"merge":            {"<<: a", "f.yaml:1:1: has a key that is an anchor or alias, which are not used here: a plain word is needed\n       1 | <<: a"},
		"twice":            {"rules: {1: [a], \"1\": [b]}", "f.yaml:1:17: mapping key \"1\" already defined at [1:9]\n       1 | rules: {1: [a], \"1\": [b]}"},
		"two documents":    {"word: a\n---\nword: b", "f.yaml:3:1: a second document begins here: one file holds one\n       3 | word: b"},
		"directive":        {"%YAML 1.2\n---\nword: a", "f.yaml:1:1: is a directive, which is not used here: leave it out\n       1 | %YAML 1.2"},
		"no YAML":          {"word: [", "f.yaml:1:7: sequence end token ']' not found\n       1 | word: ["},
		"too long":         {strings.Repeat("#", 1001), "f.yaml: is 1001 bytes long: at most 1000"},
		"a long line":      {"wait: " + strings.Repeat("é", 200), "f.yaml:1:7: wait: \"" + strings.Repeat("é", 200) + "\" is not a duration: write a number with a unit, such as 500ms, 5s or 10m\n       1 | wait: " + strings.Repeat("é", 97) + "..."},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var into file
			err := decode(test.text, &into).Err()
			var invalid *InvalidError
			if !errors.As(err, &invalid) || !errors.Is(err, ErrInvalid) || err.Error() != test.want {
				t.Errorf("got\n%v\nwant\n%s", err, test.want)
			}
		})
	}
}

// What is noted of the whole is nothing that only comes of what could not be read.
func TestUnread(t *testing.T) {
	t.Parallel()
	const text = "wrod: a\nwiat: 5s\nwait: 5s\nlisten: here\nsections: [{nmae: x}, {name: y, at: [z]}, 3]\nrules: {DE: b}\nother: 1\n"
	for path, unread := range map[string]bool{"word": true, "secret": false, "wait": false, "listen": true, "sections": true, "sections[0]": true, "sections[0].name": true, "sections[0].at": false,
		"sections[1].name": false, "sections[1].at": true, "sections[2].at": true, "sections[20].at": false, "rules": true, "rules.DE": true, "rules.FR": false, "": false} {
		var into file
		f := decode(text, &into)
		if got := f.Unread(path); got != unread {
			t.Errorf("%q: %t, want %t", path, got, unread)
		}
		before := len(f.faults)
		f.Fault(path, "is missing")
		f.Add(Fault{Path: path, Reason: "is missing too"})
		f.Add(Fault{Path: path, Value: "x", Reason: "is bad"})
		if got, want := len(f.faults)-before, map[bool]int{true: 1, false: 3}[unread]; got != want {
			t.Errorf("%q: %d faults were noted, want %d", path, got, want)
		}
	}
	var into file
	if f := decode("word: [", &into); !f.Unread("word") || !f.Unread("") {
		t.Error("of what is no YAML something was read")
	}
}

// What some editors write before the text is no part of its first key.
func TestByteOrderMark(t *testing.T) {
	t.Parallel()
	var into file
	if err := decode("\ufeffword: a\n", &into).Err(); err != nil || into.Word != "a" {
		t.Errorf("%+v, %v", into, err)
	}
}

func TestEmpty(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{"": true, "# a comment\n": true, "---\n": true, "{}": false, "[]": false, "a: [": false} {
		var into file
		if got := decode(text, &into).Empty(); got != want {
			t.Errorf("%q: Empty = %v, want %v", text, got, want)
		}
	}
}

// What is nested deeper than any file needs is refused before it costs anything; what is long, or as deep as allowed, is not.
func TestDepth(t *testing.T) {
	t.Parallel()
	block := func(n int, line string) string {
		var b strings.Builder
		for i := range n {
			b.WriteString(strings.Repeat(" ", 2*i) + line)
		}
		return b.String()
	}
	for name, c := range map[string]struct {
		text string
		want string // the place of the fault; empty: none
	}{
		"lists in brackets":   {strings.Repeat("[", 65) + strings.Repeat("]", 65), "f.yaml:1:65:"},
		"allowed brackets":    {strings.Repeat("[", 64) + strings.Repeat("]", 64), ""},
		"sections in braces":  {strings.Repeat("{a: ", 65) + "b" + strings.Repeat("}", 65), "f.yaml:1:257:"},
		"brackets unclosed":   {strings.Repeat("[", 900), "f.yaml:1:65:"},
		"closed in a string":  {strings.Repeat(`["]",`, 100), "f.yaml:1:321:"},
		"sections":            {block(65, "a:\n"), "f.yaml:65:129:"},
		"lists on one line":   {strings.Repeat("- ", 65) + "a", "f.yaml:1:129:"},
		"keys on one line":    {strings.Repeat("? ", 65) + "a", "f.yaml:1:129:"},
		"lists below keys":    {block(32, "a:\n") + strings.Repeat(" ", 64) + strings.Repeat("- ", 33) + "a", "f.yaml:33:129:"},
		"lists beside keys":   {block(33, "- a:\n") + strings.Repeat(" ", 66) + "b:", "f.yaml:33:65:"},
		"brackets in a block": {block(60, "a:\n") + strings.Repeat(" ", 122) + "[[[[[", "f.yaml:61:127:"},
		"allowed sections":    {block(64, "a:\n"), ""},
		"many beside another": {strings.Repeat("- a: [b]\n- [c]\n", 200), ""},
		"brackets in strings": {"word: \"" + strings.Repeat("[", 200) + "\"", ""},
		"brackets in a word":  {"word: a" + strings.Repeat("[", 200), ""},
		"brackets in remarks": {"word: a # " + strings.Repeat("[", 200), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var into file
			f := Decode("f.yaml", []byte(c.text), &into, Options{Limit: 10000})
			err, deep := f.Err(), "is nested more than 64 levels deep"
			if c.want == "" {
				if err != nil && strings.Contains(err.Error(), deep) {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if err == nil || !strings.HasPrefix(err.Error(), c.want+" "+deep+"\n") {
				t.Errorf("got %.300v\nwant %s %s", err, c.want, deep)
			}
		})
	}
}

func FuzzDecode(f *testing.F) {
	f.Add("word: a\nsections: [{name: b}]\n")
	f.Add("word: [&a *a, {? x}]\n---\n- 1")
	f.Fuzz(func(t *testing.T, text string) {
		var into file
		if err := decode(text, &into).Err(); err != nil && !errors.Is(err, ErrInvalid) {
			t.Errorf("%T: %v", err, err)
		}
	})
}
