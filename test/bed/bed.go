// Package bed starts the real servers that integration tests, benchmarks and the demo
// run against: CNCF distribution 3 and 2.8 registries, Consul, and portolan itself,
// and a TCP proxy that makes a link slow, thin or broken.
//
// Every server is a process of its own, with its files in one directory and its output
// in one log file there. It belongs to the value that started it: Close ends it, and the
// kernel ends it when the program that started it dies, so nothing survives a killed test
// (on Linux; elsewhere only Close does). A stopped or killed server can be started again
// on the same addresses with the same content.
//
// The core needs no testing package, because the demo uses it as well: StartRegistry,
// StartConsul, StartPortolan and NewProxy return errors. NewRegistry, NewConsul and so on
// are their forms for tests.
//
// The package fakes nothing and knows nothing of Portolan's own packages.
package bed

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

const (
	// startTimeout bounds how long a server may take until it answers. Two cores under the
	// race detector take seconds for what takes a quarter of one otherwise.
	startTimeout = 60 * time.Second
	// stopTimeout is what a server gets between SIGTERM and SIGKILL.
	stopTimeout = 20 * time.Second
	// pollInterval is how often a starting server is asked whether it answers.
	pollInterval = 20 * time.Millisecond
)

// Root returns the root directory of the source tree that the working directory is in,
// found by its go.mod.
func Root() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding the source tree: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		text, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(text), "module portolan\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding the source tree: %s is not in one of module portolan", start)
		}
	}
}

// Tool returns the path of a program: from bin/ of the source tree when it was built
// there (portolan, registry, crane, consul), else from PATH (dig, skopeo,
// docker-registry, podman). The error says which make target provides it.
func Tool(name string) (string, error) {
	if root, err := Root(); err == nil {
		path := filepath.Join(root, "bin", name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	target := "system"
	switch name {
	case "portolan":
		target = "build"
	case "registry", "crane", "consul", "staticcheck":
		target = "tools" // a program of this name in PATH would be of any version
	default:
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("%s is missing: run make %s", name, target)
}

// Command is exec.CommandContext for a Tool, with an environment that holds nothing but
// what programs need to run (PATH, HOME, TMPDIR) and env on top of it, so that proxies,
// credentials and settings of the surrounding shell do not reach into tests.
func Command(ctx context.Context, env []string, tool string, args ...string) (*exec.Cmd, error) {
	path, err := Tool(tool)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = environment(env)
	return cmd, nil
}

// Run runs a Tool to its end and returns its standard output. The error holds the end of
// its standard error.
func Run(ctx context.Context, tool string, args ...string) (string, error) {
	cmd, err := Command(ctx, nil, tool, args...)
	if err != nil {
		return "", err
	}
	var out, diagnostics strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &diagnostics
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("running %s %s: %w: %s", tool, strings.Join(args, " "), err, tail(diagnostics.String(), 2048))
	}
	return out.String(), nil
}

// Until calls condition until it returns nil, the context ends or the timeout is over;
// then the error of the last call is part of what it returns. It is how to wait for
// something to become true without sleeping for luck.
func Until(ctx context.Context, timeout time.Duration, condition func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	ticker := time.NewTicker(pollInterval)
	defer ticker.Stop()
	for {
		err := condition(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w, the last reason: %w", context.Cause(ctx), err)
		case <-ticker.C:
		}
	}
}

func environment(extra []string) []string {
	env := []string{"OTEL_TRACES_EXPORTER=none"} // distribution 3 would look for a collector
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "XDG_RUNTIME_DIR"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return append(env, extra...)
}

// tail returns the last n bytes of s, from the start of a line when there is one.
func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	s = s[len(s)-n:]
	if _, rest, ok := strings.Cut(s, "\n"); ok {
		return rest
	}
	return s
}
