package bed

import "syscall"

// processAttributes puts a server into a process group of its own, so that it and all it
// starts end together and an interrupt at the terminal reaches it through its owner only,
// and has the kernel kill it when its owner dies.
func processAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
