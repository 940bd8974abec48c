package geo

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/oschwald/maxminddb-golang/v2"
)

// file is a database file that is open. It is safe for concurrent use.
type file struct {
	*os.File
	path    string
	size    int64
	changed time.Time
}

// maxDatabase bounds the size of a database file: the largest sold today have some hundred megabytes.
const maxDatabase = 2 << 30

func openRegular(path string) (*file, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("opening the database: %w", err)
	}
	stat, err := f.Stat()
	switch {
	case err != nil:
		err = fmt.Errorf("opening the database: %w", err)
	case !stat.Mode().IsRegular():
		err = fmt.Errorf("database %q is not a file", path)
	case stat.Size() == 0:
		err = fmt.Errorf("database %q is empty", path)
	case stat.Size() > maxDatabase:
		err = fmt.Errorf("database %q has %d bytes, more than %d", path, stat.Size(), maxDatabase)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &file{f, path, stat.Size(), stat.ModTime()}, nil
}

var errOverwritten = errors.New("the file was written to while it was in use: replace it by renaming a new one over it, and reload")

// read lets use read the file, which is mapped meanwhile.
//
// A mapped file that someone overwrites in place changes under its readers, and reading behind the end of one that is cut
// short is a fault (SIGBUS) that would end the process. So the fault is turned into an error, and what was read of a file
// that changed does not count.
func (f *file) read(use func(reader *maxminddb.Reader, text []byte) error) (err error) {
	if err := f.unchanged(); err != nil {
		return err
	}
	text, unmap, err := mapFile(f.File, f.size)
	if err != nil {
		return fmt.Errorf("reading the database %q: %w", f.path, err)
	}
	defer func() { err = errors.Join(err, unmap()) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault := recover(); fault != nil {
			if _, memory := fault.(interface {
				runtime.Error
				Addr() uintptr
			}); !memory {
				panic(fault)
			}
			err = fmt.Errorf("reading the database %q: %w", f.path, errOverwritten)
		}
	}()
	reader, err := maxminddb.OpenBytes(text)
	if err != nil {
		return fmt.Errorf("database %q is no file in the MaxMind DB format (.mmdb), or a damaged one: %w", f.path, err)
	}
	if err := use(reader, text); err != nil {
		return fmt.Errorf("database %q of type %q: %w", f.path, reader.Metadata.DatabaseType, err)
	}
	return f.unchanged()
}

// unchanged fails if the file was written to since it was opened.
func (f *file) unchanged() error {
	stat, err := f.Stat()
	if err != nil {
		return fmt.Errorf("reading the database: %w", err)
	}
	if stat.Size() != f.size || !stat.ModTime().Equal(f.changed) {
		return fmt.Errorf("reading the database %q: %w", f.path, errOverwritten)
	}
	return nil
}
