package topology

import (
	"fmt"
	"strings"

	"github.com/goccy/go-yaml"

	"portolan/strict"
)

// ParseYAML reads topology.yaml strictly and validates it. The error is an *InvalidError with every fault, its line, column
// and source; name is only for it. reserved are labels that neither a registry nor a region may have.
//
// Where nothing is wrong but that orders or fences name regions without a replica, the document comes with the error: whether that is
// refused depends on what stands in the store (Editor.Apply).
func ParseYAML(name string, text []byte, reserved ...string) (*Document, error) {
	document := &Document{}
	file := strict.Decode(name, text, document, strict.Options{
		Limit: 4 << 20, // thousands of replicas; more is a wrong file
		Secret: func(path, line string) bool {
			return strings.HasSuffix(path, "."+fieldCredentials) || strings.HasSuffix(path, "."+fieldEndpoint) || secretIn(line)
		},
		Check: func(path, text string) (err error) {
			if strings.HasSuffix(path, "."+fieldWeight) {
				_, err = parseWeight(text)
			}
			return err
		},
	})
	if file.Empty() {
		file.Fault("", "is empty: it begins with registries:")
	}
	faults, dangling := document.faults(reserved)
	for _, f := range faults {
		replica, addresses := strings.CutSuffix(f.Path, "."+fieldAddresses)
		if addresses && f.Value == "" && file.Unread(replica+"."+fieldHostname) {
			continue // which would do instead
		}
		file.Add(f)
	}
	if file.Err() != nil {
		document = nil
	}
	for _, f := range dangling {
		file.Add(f)
	}
	return document, file.Err()
}

// secretIn reports whether a line may hold a secret, whatever its fault is about: a replica often stands on one line with its
// endpoint, and a misspelt key has the same value as the right one.
func secretIn(line string) bool {
	if strings.Contains(line, "@") {
		return true
	}
	for {
		_, rest, found := strings.Cut(line, "cred")
		if !found {
			return false
		}
		if _, value, ok := strings.Cut(rest, ":"); ok {
			value = strings.TrimLeft(value, " \"'")
			if i := strings.IndexAny(value, " \"',}"); i >= 0 {
				value = value[:i]
			}
			if checkCredentials(value) != nil {
				return true
			}
		}
		line = rest
	}
}

// YAML writes the document as topology.yaml; the same document gives the same bytes.
func (d *Document) YAML() ([]byte, error) {
	text, err := yaml.MarshalWithOptions(d, yaml.IndentSequence(true))
	if err != nil {
		return nil, fmt.Errorf("writing the topology as YAML: %w", err)
	}
	return text, nil
}
