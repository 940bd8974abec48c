package strict

import (
	"errors"
	"fmt"
	"strings"
)

// ErrInvalid is the kind of every InvalidError: errors.Is tells it.
var ErrInvalid = errors.New("invalid")

// Fault is one thing wrong with a document.
type Fault struct {
	// Path is where in the document, as registries[0].replicas[1].weight; or whatever else names the place.
	Path string `json:"path"`
	// Value is what stands there, as far as it may be shown; empty if nothing does, or in a fault of how it is written.
	Value string `json:"value,omitempty"`
	// Line and Column are where in the file, from 1; 0 if the document came from no file.
	Line   int `json:"line,omitempty"`
	Column int `json:"column,omitempty"`
	// Source is that line of the file.
	Source string `json:"source,omitempty"`
	// Reason says what is wrong and what would be right.
	Reason string `json:"reason"`
}

// InvalidError is everything that is wrong with a document.
type InvalidError struct {
	// File names the file; empty if there was none.
	File   string  `json:"file,omitempty"`
	Faults []Fault `json:"faults"`
}

// Error gives one line a fault, and beneath it the line of the file, or else at its end the value.
func (e *InvalidError) Error() string {
	var b strings.Builder
	for i, f := range e.Faults {
		if i > 0 {
			b.WriteByte('\n')
		}
		if e.File != "" {
			b.WriteString(e.File + ":")
			if f.Line > 0 {
				fmt.Fprintf(&b, "%d:%d:", f.Line, f.Column)
			}
			b.WriteByte(' ')
		}
		if f.Path != "" {
			b.WriteString(f.Path + ": ")
		}
		b.WriteString(f.Reason)
		switch {
		case f.Source != "":
			fmt.Fprintf(&b, "\n    %4d | %s", f.Line, f.Source)
		case !strings.Contains(f.Reason, f.Value): // which is empty, or known from it
			fmt.Fprintf(&b, " (given: %s)", f.Value)
		}
	}
	return b.String()
}

// Is makes every InvalidError an ErrInvalid.
func (e *InvalidError) Is(target error) bool { return target == ErrInvalid }
