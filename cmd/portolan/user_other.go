//go:build !linux

package main

import (
	"fmt"
	"runtime"
)

// become is known on Linux alone: elsewhere a process of an ordinary user cannot keep the right to bind ports below 1024.
func become(name, _ string) error {
	return fmt.Errorf("user: becoming %s is not known on %s", name, runtime.GOOS)
}
