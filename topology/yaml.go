package topology

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/goccy/go-yaml"

	"portolan/strict"
)

// ParseYAML reads topology.yaml strictly and validates it. The error is an *InvalidError with every fault, its line, column
// and source; name is only for it. reserved are labels that neither a registry nor a region may have.
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
	parts, regions := document.unread(file.Faults())
	for _, f := range document.faults(reserved) {
		if at := part(f.Path); !regions[at] && (f.Value != "" || !parts[at]) {
			file.Add(f)
		}
	}
	if err := file.Err(); err != nil {
		return nil, err
	}
	return document, nil
}

// unread tells what must not be said of a document of which something could not be read: that anything is missing in the parts of
// which that is; and of a registry whose regions are not all known, where its home is and what its rules name.
func (d *Document) unread(faults []Fault) (parts, regions map[string]bool) {
	parts, regions = map[string]bool{}, map[string]bool{}
	for _, f := range faults {
		parts[part(f.Path)] = true
	}
	for i, r := range d.Registries {
		registry := fmt.Sprintf("registries[%d]", i)
		regions[registry] = len(r.Replicas) == 0 && parts[registry]
		for j, p := range r.Replicas {
			regions[registry] = regions[registry] || p.Region == "" && parts[fmt.Sprintf("%s.replicas[%d]", registry, j)]
		}
	}
	return parts, regions
}

// part is the replica that a path leads into, else the registry: the beginning of the path.
func part(path string) string { return partOf.FindString(path) }

var partOf = regexp.MustCompile(`^registries\[\d+\](\.replicas\[\d+\])?`)

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
