//go:build unix

package geo

import (
	"os"

	"golang.org/x/sys/unix"
)

// mapFile maps a file until unmap is called.
func mapFile(f *os.File, size int64) (text []byte, unmap func() error, err error) {
	text, err = unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, os.NewSyscallError("mmap", err)
	}
	return text, func() error { return os.NewSyscallError("munmap", unix.Munmap(text)) }, nil
}
