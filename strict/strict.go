// Package strict decodes YAML into Go values, every fault with its path, line, column and source line.
//
// The text is walked as a syntax tree rather than decoded by the library: so every fault is found in one go, scalars are
// taken as they are written (NO is Norway, 1e2 is no weight), and each value keeps its place for the faults that only the
// whole shows. Unknown keys, keys that stand there twice, empty values, anchors, aliases, tags, directives and further
// documents are refused: what is written is what there is. Text may be hostile.
//
// What values mean together is the caller's to judge, who notes what is wrong with File.Fault.
package strict

import (
	"bytes"
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"portolan/strict/nearmiss"
)

// Options are what one kind of file has of its own. Only Limit is needed.
type Options struct {
	// Limit is how many bytes a file may have.
	Limit int
	// Secret reports whether line, where the value at path stands, may hold a secret: the fault is then without its source.
	// Nil: none does.
	Secret func(path, line string) bool
	// Check refuses the text of the single value at path, before its type does. Nil: the type alone decides.
	Check func(path, text string) error
}

// maxDepth is how deep lists and sections may be nested: several times what any file here needs. The time that the library
// takes grows with the square of the depth.
const maxDepth = 64

// File is a file that was decoded, and what is wrong with it. It is for one goroutine.
type File struct {
	name      string
	options   Options
	lines     [][]byte
	faults    []Fault
	positions map[string]*token.Position // of every value, by path
	unread    []string                   // the paths of what could not be read, by the names that were probably meant
}

// Decode fills the struct that into points to; name names the file in errors. Fields are found by the names in their yaml
// tags, and those that the text does not have stay as they are. A slice whose tag has the option "single" may be written as
// its only value. A string that holds several values in a form of its own shows it in the tag "example", for those who write a list. Fields may be structs, slices, maps from strings, pointers,
// strings, bools, ints, floats, durations, addresses, prefixes and whatever reads text. After a fault into holds what could be read.
func Decode(name string, text []byte, into any, o Options) *File {
	text = bytes.TrimPrefix(text, []byte("\ufeff")) // YAML 1.2 section 5.2 lets a text begin with it; some editors write it
	f := &File{name: name, options: o, lines: bytes.Split(text, []byte("\n")), positions: map[string]*token.Position{}}
	f.decode(text, into)
	for _, fault := range f.faults {
		f.unread = append(f.unread, fault.Path)
	}
	return f
}

func (f *File) decode(text []byte, into any) {
	if len(text) > f.options.Limit {
		f.fault(nil, "", "is %d bytes long: at most %d", len(text), f.options.Limit)
		return
	}
	tree, err := parse(text)
	if err != nil {
		reason, position := err.Error(), (*token.Position)(nil)
		var syntax yaml.Error
		if errors.As(err, &syntax) {
			reason = syntax.GetMessage()
			if t := syntax.GetToken(); t != nil {
				position = t.Position
			}
		}
		f.fault(position, "", "%s", reason)
		return
	}
	seen := false
	for _, document := range tree.Docs {
		if _, comment := document.Body.(*ast.CommentGroupNode); comment || document.Body == nil {
			continue
		}
		if directive, ok := document.Body.(*ast.DirectiveNode); ok {
			f.fault(start(directive), "", "is a directive, which is not used here: leave it out")
			break // the library counts what follows as a document of its own
		}
		if seen {
			f.fault(start(document.Body), "", "a second document begins here: one file holds one")
			break
		}
		seen = true
		f.value(document.Body, "", reflect.ValueOf(into).Elem())
	}
}

// parse refuses what is nested too deep, and turns a panic of the library, which hostile input has provoked in it before, into an
// error.
func parse(text []byte) (tree *ast.File, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("is not YAML that can be read: %v", r)
		}
	}()
	tokens := lexer.Tokenize(string(text))
	if deep := beyond(tokens, maxDepth); deep != nil {
		return nil, &yaml.SyntaxError{Message: fmt.Sprintf("is nested more than %d levels deep", maxDepth), Token: deep}
	}
	return parser.Parse(tokens, 0)
}

// beyond returns the token that begins a level of nesting beyond depth; nil if there is none. Within brackets and braces a level
// ends with its own; otherwise with a token further to the left (YAML 1.2 section 6.1), where a list may be no further right
// than the key that it belongs to (section 8.2.3, seq-spaces).
func beyond(tokens token.Tokens, depth int) *token.Token {
	type level struct {
		column int
		list   bool
	}
	var blocks []level
	flow := 0
	for i, t := range tokens {
		begins := t // what stands furthest to the left of the level
		switch t.Type {
		case token.SequenceStartType, token.MappingStartType:
			flow++
		case token.SequenceEndType, token.MappingEndType:
			flow = max(0, flow-1)
			continue
		case token.MappingValueType:
			if i > 0 {
				begins = tokens[i-1] // the key
			}
			fallthrough
		case token.SequenceEntryType, token.MappingKeyType:
			if flow > 0 {
				continue
			}
			l := level{begins.Position.Column, t.Type == token.SequenceEntryType}
			ended := func(o level) bool { return o.column > l.column || o.column == l.column && o.list && !l.list }
			for len(blocks) > 0 && ended(blocks[len(blocks)-1]) {
				blocks = blocks[:len(blocks)-1]
			}
			if len(blocks) == 0 || blocks[len(blocks)-1] != l {
				blocks = append(blocks, l)
			}
		}
		if flow+len(blocks) > depth {
			return begins
		}
	}
	return nil
}

// Err returns nil, or an *InvalidError with the faults in the order of the file.
func (f *File) Err() error {
	if len(f.faults) == 0 {
		return nil
	}
	slices.SortStableFunc(f.faults, func(a, b Fault) int { return cmp.Or(a.Line-b.Line, a.Column-b.Column) })
	return &InvalidError{File: f.name, Faults: f.faults}
}

// Empty reports whether the file was read and says nothing.
func (f *File) Empty() bool { return len(f.positions) == 0 && len(f.faults) == 0 }

// Unread reports whether the value at path, a part of it, or what it would stand in could not be read, or has a misspelt name: what
// the value then seems to be says nothing.
func (f *File) Unread(path string) bool {
	within := func(a, b string) bool {
		return b == "" || a == b || strings.HasPrefix(a, b+".") || strings.HasPrefix(a, b+"[")
	}
	return slices.ContainsFunc(f.unread, func(u string) bool { return within(path, u) || path != "" && within(u, path) })
}

// Fault notes a fault of the value at path, with the place of that or of what it would stand in; not if it is Unread, which is noted
// already.
func (f *File) Fault(path, format string, args ...any) {
	f.Add(Fault{Path: path, Reason: fmt.Sprintf(format, args...)})
}

// Add notes a fault that was found without the file, and gives it its place there. As Fault it notes none of what is Unread, but of
// the value that there is.
func (f *File) Add(fault Fault) {
	if fault.Value != "" || !f.Unread(fault.Path) {
		f.add(nil, fault)
	}
}

func (f *File) fault(position *token.Position, path, format string, args ...any) {
	f.add(position, Fault{Path: path, Reason: fmt.Sprintf(format, args...)})
}

func (f *File) add(position *token.Position, fault Fault) {
	if position == nil {
		position = f.position(fault.Path)
	}
	if position != nil {
		fault.Line, fault.Column = position.Line, position.Column
	}
	if fault.Line > 0 && fault.Line <= len(f.lines) {
		line := string(f.lines[fault.Line-1])
		if f.options.Secret == nil || !f.options.Secret(fault.Path, line) {
			fault.Source = clip(strings.TrimRight(strings.ToValidUTF8(line, "?"), "\r"), 200)
		}
	}
	f.faults = append(f.faults, fault)
}

// position is that of path, or of what it would stand in.
func (f *File) position(path string) *token.Position {
	for {
		if p := f.positions[path]; p != nil {
			return p
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			return nil
		}
		path = path[:i]
	}
}

// start is where a node begins; the token of a mapping is its first colon.
func start(n ast.Node) *token.Position {
	switch n := n.(type) {
	case nil:
		return nil
	case *ast.MappingNode:
		if n.IsFlowStyle && n.Start != nil {
			return n.Start.Position
		}
		if len(n.Values) > 0 {
			return start(n.Values[0])
		}
	case *ast.MappingValueNode:
		return n.Key.GetToken().Position
	}
	if t := n.GetToken(); t != nil {
		return t.Position
	}
	return nil
}

// join is the path of name in the section at path.
func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// value reads a node into a field, by the field's type.
func (f *File) value(n ast.Node, path string, into reflect.Value) {
	f.positions[path] = start(n)
	switch p := into.Addr().Interface().(type) {
	case *time.Duration:
		f.scalar(n, path, func(text string) error {
			v, err := time.ParseDuration(text)
			if err != nil {
				return fmt.Errorf("%q is not a duration: write a number with a unit, such as 500ms, 5s or 10m", text)
			}
			*p = v
			return nil
		})
		return
	case *netip.AddrPort:
		f.scalar(n, path, func(text string) error {
			v, err := netip.ParseAddrPort(text)
			if err != nil {
				return fmt.Errorf("%q is not ADDRESS:PORT, such as 127.0.0.1:8420 or [::1]:8420", text)
			}
			*p = v
			return nil
		})
		return
	case *netip.Prefix:
		f.scalar(n, path, func(text string) error {
			v, err := netip.ParsePrefix(text)
			if err != nil {
				return fmt.Errorf("%q is not a prefix, such as 192.0.2.0/24 or 2001:db8::/32", text)
			}
			*p = v
			return nil
		})
		return
	case *netip.Addr:
		f.scalar(n, path, func(text string) error {
			v, err := netip.ParseAddr(text)
			if err != nil {
				return fmt.Errorf("%q is not an IP address", text)
			}
			*p = v
			return nil
		})
		return
	case encoding.TextUnmarshaler:
		f.scalar(n, path, func(text string) error { return p.UnmarshalText([]byte(text)) })
		return
	}
	switch into.Kind() {
	case reflect.String:
		f.scalar(n, path, func(text string) error {
			into.SetString(text)
			return nil
		})
	case reflect.Bool:
		f.scalar(n, path, func(text string) error {
			if text != "true" && text != "false" {
				return fmt.Errorf("%q is neither true nor false", text)
			}
			into.SetBool(text == "true")
			return nil
		})
	case reflect.Int:
		f.scalar(n, path, func(text string) error {
			v, err := strconv.Atoi(text)
			if err != nil {
				return fmt.Errorf("%q is not a whole number", text)
			}
			into.SetInt(int64(v))
			return nil
		})
	case reflect.Float64:
		f.scalar(n, path, func(text string) error {
			v, err := strconv.ParseFloat(text, 64)
			if err != nil || strings.Trim(text, "+-.0123456789") != "" { // no NaN, Inf, hexadecimal or exponents
				return fmt.Errorf("%q is not a number", text)
			}
			into.SetFloat(v + 0) // -0 and 0 are one number
			return nil
		})
	case reflect.Pointer:
		v := reflect.New(into.Type().Elem())
		f.value(n, path, v.Elem())
		into.Set(v)
	case reflect.Slice:
		f.list(n, path, into, false)
	case reflect.Map:
		f.mapping(n, path, into)
	case reflect.Struct:
		f.section(n, path, into)
	default:
		panic(fmt.Sprintf("strict: a field of type %v at %q", into.Type(), path))
	}
}

// word is a plain or quoted value as it is written.
func word(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, true
	}
	return "", false
}

// scalar reads a single value. An empty one is a fault: it would be as good as absent.
func (f *File) scalar(n ast.Node, path string, read func(text string) error) {
	text, ok := word(n)
	switch {
	case !ok:
		f.fault(start(n), path, "is %s: a single value is needed", describe(n))
		return
	case strings.TrimSpace(text) == "":
		f.fault(start(n), path, "is empty: give a value, or leave it out")
		return
	}
	var err error
	if f.options.Check != nil {
		err = f.options.Check(path, text)
	}
	if err == nil {
		err = read(text)
	}
	if err != nil {
		f.fault(start(n), path, "%v", err)
	}
}

// list reads a list; of one that may be single, the only value may stand alone.
func (f *File) list(n ast.Node, path string, into reflect.Value, single bool) {
	s, ok := n.(*ast.SequenceNode)
	if _, alone := word(n); !ok && single && alone {
		values := reflect.MakeSlice(into.Type(), 1, 1)
		f.value(n, path, values.Index(0))
		into.Set(values)
		return
	}
	if !ok {
		form := ", such as [a, b]"
		if e := into.Type().Elem(); e.Kind() == reflect.Struct && !reflect.PointerTo(e).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()) {
			form = "" // a list of sections is not written like that
		}
		f.fault(start(n), path, "is %s: a list is needed%s", describe(n), form)
		return
	}
	values := reflect.MakeSlice(into.Type(), len(s.Values), len(s.Values))
	for i, v := range s.Values {
		f.value(v, fmt.Sprintf("%s[%d]", path, i), values.Index(i))
	}
	into.Set(values)
}

func (f *File) mapping(n ast.Node, path string, into reflect.Value) {
	values := reflect.MakeMap(into.Type())
	f.pairs(n, path, func(name string, _, value ast.Node) {
		v := reflect.New(into.Type().Elem()).Elem()
		f.value(value, join(path, name), v)
		values.SetMapIndex(reflect.ValueOf(name), v)
	})
	into.Set(values)
}

// section reads a struct by the names in its fields' tags.
func (f *File) section(n ast.Node, path string, into reflect.Value) {
	type field struct {
		reflect.Value
		single  bool
		example string
	}
	fields := map[string]field{}
	var names, meant []string
	for i := range into.NumField() {
		tag := into.Type().Field(i).Tag
		name, option, _ := strings.Cut(tag.Get("yaml"), ",")
		fields[name] = field{into.Field(i), option == "single", tag.Get("example")}
		names = append(names, name)
	}
	f.pairs(n, path, func(name string, key, value ast.Node) {
		_, list := value.(*ast.SequenceNode)
		switch field, ok := fields[name]; {
		case ok && field.single:
			f.list(value, join(path, name), field.Value, true)
			return
		case ok && list && field.example != "":
			f.fault(start(value), join(path, name), "is a list: a single value is needed, such as %s", field.example)
			return
		case ok:
			f.value(value, join(path, name), field.Value)
			return
		}
		f.fault(start(key), join(path, name), "%v", Unknown(name, names))
		if near, ok := nearmiss.Of(strings.ToLower(name), names); ok {
			meant = append(meant, join(path, near))
		}
	})
	for _, path := range meant {
		if f.positions[path] == nil {
			f.unread = append(f.unread, path)
		}
	}
}

// pairs calls each with the keys and values of a mapping; a key that stands there twice is a fault.
func (f *File) pairs(n ast.Node, path string, each func(name string, key, value ast.Node)) {
	var values []*ast.MappingValueNode
	switch n := n.(type) {
	case *ast.MappingNode:
		values = n.Values
	case *ast.MappingValueNode:
		values = []*ast.MappingValueNode{n}
	default:
		f.fault(start(n), path, "is %s: keys with values are needed", describe(n))
		return
	}
	seen := map[string]bool{}
	for _, v := range values {
		name, ok := word(v.Key)
		switch {
		case !ok:
			f.fault(start(v), path, "has a key that is %s: a plain word is needed", describe(v.Key))
		case seen[name]:
			f.fault(start(v), path, "%q stands there twice", clip(name, 64))
		default:
			seen[name] = true
			each(name, v.Key, v.Value)
		}
	}
}

// describe says what a node is.
func describe(n ast.Node) string {
	switch n.(type) {
	case nil, *ast.NullNode:
		return "empty"
	case *ast.MappingNode, *ast.MappingValueNode:
		return "a set of keys"
	case *ast.SequenceNode:
		return "a list"
	case *ast.AnchorNode, *ast.AliasNode, *ast.MergeKeyNode:
		return "an anchor or alias, which are not used here"
	case *ast.TagNode:
		return "tagged, which is not used here"
	case *ast.StringNode, *ast.LiteralNode, *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode:
		return "a single value"
	}
	return "something else"
}

// Unknown is the error for a word that is not among those allowed.
func Unknown(given string, allowed []string) error {
	given = clip(given, 80)
	if near, ok := nearmiss.Of(strings.ToLower(given), allowed); ok {
		return fmt.Errorf("%q is not known here; did you mean %q?", given, near)
	}
	return fmt.Errorf("%q is not known here: one of %s", given, strings.Join(allowed, ", "))
}

// clip keeps what is echoed in errors short: at most that many bytes.
func clip(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
