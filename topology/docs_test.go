package topology

import (
	"os"
	"reflect"
	"strings"
	"testing"
)

// docs/topology.md names every field of a document, and its example is one.
func TestDocs(t *testing.T) {
	t.Parallel()
	const file = "../docs/topology.md"
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, example, _ := strings.Cut(string(text), "```yaml\n")
	example, _, ok := strings.Cut(example, "```")
	if !ok {
		t.Fatalf("%s has no example", file)
	}
	if d, err := ParseYAML(file, []byte(example)); err != nil || d.Validate() != nil {
		t.Errorf("the example: %v, %v", err, d.Validate())
	}
	var describe func(prefix string, of reflect.Type)
	describe = func(prefix string, of reflect.Type) {
		for f := range of.Fields() {
			name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
			switch f.Type {
			case reflect.TypeFor[PolicyDocument](), reflect.TypeFor[HealthDocument]():
				describe(name+".", f.Type)
				continue
			case reflect.TypeFor[[]ReplicaDocument]():
				describe("", f.Type.Elem())
				continue
			}
			if !strings.Contains(string(text), "\n| `"+prefix+name+"` |") {
				t.Errorf("%s does not describe %s%s", file, prefix, name)
			}
		}
	}
	describe("", reflect.TypeFor[RegistryDocument]())
}
