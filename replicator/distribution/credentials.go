package distribution

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
)

// credentials reads what a reference names. It never returns a secret in an error.
type credentials func(ctx context.Context) (authn.AuthConfig, error)

var (
	envName    = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	helperName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]*$`)
)

// helperTimeout bounds a credential helper: those of clouds ask a server.
const helperTimeout = 20 * time.Second

func newCredentials(ref, host string) (credentials, error) {
	kind, arg, _ := strings.Cut(ref, ":")
	switch {
	case ref == "":
		return nil, nil
	case ref == "docker-config":
		return func(ctx context.Context) (authn.AuthConfig, error) {
			a, err := authn.Resolve(ctx, authn.DefaultKeychain, server(host))
			if err != nil {
				return authn.AuthConfig{}, fmt.Errorf("reading the docker configuration for %s: %w", host, err)
			}
			conf, err := authn.Authorization(ctx, a)
			if err != nil {
				return authn.AuthConfig{}, fmt.Errorf("reading the docker configuration for %s: %w", host, err)
			}
			return *conf, nil
		}, nil
	case kind == "env" && envName.MatchString(arg):
		return func(context.Context) (authn.AuthConfig, error) {
			v, found := os.LookupEnv(arg)
			if !found {
				return authn.AuthConfig{}, fmt.Errorf("credentials %q: the variable is not set", ref)
			}
			return parseSecret(ref, v)
		}, nil
	case kind == "file" && arg != "":
		return func(context.Context) (authn.AuthConfig, error) {
			v, err := os.ReadFile(arg)
			if err != nil {
				return authn.AuthConfig{}, fmt.Errorf("reading credentials %q: %w", ref, err)
			}
			return parseSecret(ref, string(v))
		}, nil
	case kind == "helper" && helperName.MatchString(arg):
		return func(ctx context.Context) (authn.AuthConfig, error) { return askHelper(ctx, arg, host) }, nil
	}
	// The value is not repeated: somebody may have put the secret itself there.
	return nil, fmt.Errorf("credentials must be a reference: docker-config, env:NAME, file:PATH or helper:NAME")
}

func parseSecret(ref, v string) (authn.AuthConfig, error) {
	v = strings.TrimSpace(v)
	if v == "" {
		return authn.AuthConfig{}, fmt.Errorf("credentials %q are empty", ref)
	}
	user, password, found := strings.Cut(v, ":")
	if !found {
		return authn.AuthConfig{RegistryToken: v}, nil
	}
	return authn.AuthConfig{Username: user, Password: password}, nil
}

// askHelper runs docker-credential-NAME get, the protocol of docker's credential helpers.
func askHelper(ctx context.Context, name, host string) (authn.AuthConfig, error) {
	ctx, cancel := context.WithTimeout(ctx, helperTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "docker-credential-"+name, "get")
	cmd.Stdin = strings.NewReader(host)
	cmd.WaitDelay = time.Second
	var out bytes.Buffer
	cmd.Stdout = &out
	// What a helper prints when it fails may quote the secret: only the fact is passed on.
	if err := cmd.Run(); err != nil {
		return authn.AuthConfig{}, fmt.Errorf("asking credential helper %q for %s: %w", name, host, err)
	}
	var answer struct{ Username, Secret string }
	if err := json.Unmarshal(out.Bytes(), &answer); err != nil || answer.Secret == "" {
		return authn.AuthConfig{}, fmt.Errorf("asking credential helper %q for %s: no credentials in its answer", name, host)
	}
	if answer.Username == "<token>" {
		return authn.AuthConfig{IdentityToken: answer.Secret}, nil
	}
	return authn.AuthConfig{Username: answer.Username, Password: answer.Secret}, nil
}

// server is an endpoint's host as authn.Resource.
type server string

func (s server) String() string      { return string(s) }
func (s server) RegistryStr() string { return string(s) }
