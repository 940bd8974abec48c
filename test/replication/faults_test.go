package replication

import (
	"net"
	"os"
	"testing"
	"time"

	"portolan/test/bed"
)

// listen listens at an address that is the test's own. A server that is being forked may hold it for a moment more.
func listen(t testing.TB, address string) net.Listener {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		l, err := net.Listen("tcp", address)
		if err == nil {
			return l
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// wipe empties a stopped registry's storage.
func wipe(t *testing.T, r *bed.Registry) {
	t.Helper()
	if err := os.RemoveAll(r.Storage()); err != nil {
		t.Fatal(err)
	}
}
