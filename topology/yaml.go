package topology

import (
	"fmt"
	"slices"
	"strings"

	"github.com/goccy/go-yaml"

	"portolan/strict"
)

// ParseYAML reads topology.yaml strictly and validates it. The error is an *InvalidError with every fault, its line, column
// and source; name is only for it. Names that a zone reserves are not known here: Document.Validate is told them.
func ParseYAML(name string, text []byte) (*Document, error) {
	document := &Document{}
	file := strict.Decode(name, text, document, strict.Options{
		Limit: 4 << 20, // thousands of replicas; more is a wrong file
		Secret: func(path, _ string) bool {
			return strings.HasSuffix(path, "."+fieldCredentials) || strings.HasSuffix(path, "."+fieldEndpoint)
		},
		Check: func(path, text string) (err error) {
			if strings.HasSuffix(path, "."+fieldWeight) {
				_, err = parseWeight(text)
			}
			return err
		},
		Unknown: func(path, key string, allowed []string) (string, error) {
			slices.Sort(allowed)
			return path, unknown("key here", key, allowed)
		},
	})
	if file.Empty() {
		file.Fault("", "is empty: it begins with registries:")
	}
	if err := file.Err(); err != nil {
		return nil, err
	}
	for _, f := range document.faults(nil) {
		file.Fault(f.Path, "%s", f.Reason)
	}
	if err := file.Err(); err != nil {
		return nil, err
	}
	return document, nil
}

// YAML writes the document as topology.yaml; the same document gives the same bytes.
func (d *Document) YAML() ([]byte, error) {
	text, err := yaml.MarshalWithOptions(d, yaml.IndentSequence(true))
	if err != nil {
		return nil, fmt.Errorf("writing the topology as YAML: %w", err)
	}
	return text, nil
}
