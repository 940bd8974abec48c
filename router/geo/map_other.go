//go:build !unix

package geo

import (
	"io"
	"os"
)

// mapFile reads a file where it cannot be mapped.
func mapFile(f *os.File, size int64) (text []byte, unmap func() error, err error) {
	text = make([]byte, size)
	if _, err := f.ReadAt(text, 0); err != nil && err != io.EOF {
		return nil, nil, err
	}
	return text, func() error { return nil }, nil
}
