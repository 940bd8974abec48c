package main

import (
	"fmt"
	"os"
	"os/user"
	"strconv"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// become makes this process, which root started, that of a user who may bind ports below 1024 and nothing else that root may. The
// data folder is made for that user if it does not exist. A process of that user already is left as it is.
func become(name, data string) error {
	to, err := user.Lookup(name)
	if err != nil {
		return fmt.Errorf("user: %w", err)
	}
	uid, err := strconv.Atoi(to.Uid)
	if err != nil {
		return fmt.Errorf("user: %s has the id %q", name, to.Uid)
	}
	if os.Geteuid() == uid {
		return nil
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("user: only root can become %s: start portolan as root, or as %s with the capability CAP_NET_BIND_SERVICE", name, name)
	}
	gid, err := strconv.Atoi(to.Gid)
	if err != nil {
		return fmt.Errorf("user: %s has the group %q", name, to.Gid)
	}
	var groups []int
	ids, err := to.GroupIds()
	if err != nil {
		return fmt.Errorf("user: the groups of %s: %w", name, err)
	}
	for _, id := range ids {
		if n, err := strconv.Atoi(id); err == nil {
			groups = append(groups, n)
		}
	}
	if _, err := os.Stat(data); os.IsNotExist(err) {
		err = os.MkdirAll(data, 0o700)
		if err == nil {
			err = os.Chown(data, uid, gid)
		}
		if err != nil {
			return fmt.Errorf("making the data folder for %s: %w", name, err)
		}
	}
	if err := cap.SetGroups(gid, groups...); err != nil {
		return fmt.Errorf("user: taking the groups of %s: %w", name, err)
	}
	if err := cap.SetUID(uid); err != nil {
		return fmt.Errorf("user: becoming %s: %w", name, err)
	}
	rights := cap.NewSet()
	for _, flag := range []cap.Flag{cap.Permitted, cap.Effective} {
		if err := rights.SetFlag(flag, true, cap.NET_BIND_SERVICE); err != nil {
			return fmt.Errorf("user: %w", err)
		}
	}
	if err := rights.SetProc(); err != nil {
		return fmt.Errorf("user: giving up the rights of root: %w", err)
	}
	return os.Setenv("HOME", to.HomeDir) // whose credentials are looked for there
}
