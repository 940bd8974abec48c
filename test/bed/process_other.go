//go:build unix && !linux

package bed

import "syscall"

// processAttributes puts a server into a process group of its own. There is no
// parent-death signal here: a killed test leaves its servers running.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true}
}
