package bed

import (
	"context"
	"os"
)

// TB is the part of testing.TB that the forms for tests use, so that programs which use
// the core do not link the testing package.
type TB interface {
	Helper()
	Cleanup(func())
	Context() context.Context
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Logf(format string, args ...any)
	Skip(args ...any)
	Failed() bool
	TempDir() string
}

// closer is what every server and the proxy have in common at the end of a test.
type closer interface{ Close() error }

// NewRegistry is StartRegistry for a test: the directory is the test's unless Dir is set,
// the server ends with the test, and the end of its log is shown when the test failed.
func NewRegistry(tb TB, config RegistryConfig) *Registry {
	tb.Helper()
	if config.Dir == "" {
		config.Dir = tb.TempDir()
	}
	r, err := StartRegistry(tb.Context(), config)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	owned(tb, r, r.LogTail)
	return r
}

// NewConsul is StartConsul for a test, in the same way.
func NewConsul(tb TB, config ConsulConfig) *Consul {
	tb.Helper()
	if config.Dir == "" {
		config.Dir = tb.TempDir()
	}
	c, err := StartConsul(tb.Context(), config)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	owned(tb, c, c.LogTail)
	return c
}

// NewCache is StartCache for a test, in the same way.
func NewCache(tb TB, config CacheConfig) *Cache {
	tb.Helper()
	if config.Dir == "" {
		config.Dir = tb.TempDir()
	}
	c, err := StartCache(tb.Context(), config)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	owned(tb, c, c.LogTail)
	return c
}

// NewPortolan is StartPortolan for a test, in the same way.
func NewPortolan(tb TB, config PortolanConfig) *Portolan {
	tb.Helper()
	if config.Dir == "" {
		config.Dir = tb.TempDir()
	}
	p, err := StartPortolan(tb.Context(), config)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	owned(tb, p, p.LogTail)
	return p
}

// NewProxy is StartProxy for a test: it ends with the test.
func NewProxy(tb TB, target string) *Proxy {
	tb.Helper()
	p, err := StartProxy(ProxyConfig{Target: target})
	if err != nil {
		tb.Fatalf("%v", err)
	}
	owned(tb, p, nil)
	return p
}

// NewAddress is Address for a test: the port is given back at its end.
func NewAddress(tb TB, host string) string {
	tb.Helper()
	hostport, release, err := Address(host)
	if err != nil {
		tb.Fatalf("%v", err)
	}
	tb.Cleanup(func() { _ = release() }) // the lock is gone either way
	return hostport
}

// LongOnly skips a test that is only in make test-long, which sets PORTOLAN_LONG=1.
func LongOnly(tb TB) {
	tb.Helper()
	if os.Getenv("PORTOLAN_LONG") == "" {
		tb.Skip("a long form: make test-long")
	}
}

func owned(tb TB, c closer, log func() string) {
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Errorf("%v", err)
		}
		if log != nil && tb.Failed() {
			tb.Logf("%s", log())
		}
	})
}
