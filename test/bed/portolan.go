package bed

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// PortolanConfig says how a portolan server is run.
type PortolanConfig struct {
	Dir    string // holds the configuration and the log; created when missing
	Config string // text of the configuration file
	API    string // host:port of api.listen in Config: where /readyz is asked

	Args []string // after "serve --config FILE": --role dns, for example
	Env  []string // NAME=value, on top of PATH, HOME and TMPDIR
}

// Portolan is a running (or stopped) portolan server. Its methods may be called from
// several goroutines.
type Portolan struct {
	server
	config PortolanConfig
	file   string
	client *http.Client
}

// StartPortolan starts bin/portolan and returns once /readyz answers 200. The caller must
// Close it.
func StartPortolan(ctx context.Context, config PortolanConfig) (*Portolan, error) {
	p := &Portolan{
		config: config,
		file:   filepath.Join(config.Dir, "portolan.yaml"),
		client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 5 * time.Second},
	}
	p.server = server{
		name:    "portolan " + config.API,
		tool:    "portolan",
		args:    append([]string{"serve", "--config", p.file}, config.Args...),
		env:     config.Env,
		logPath: filepath.Join(config.Dir, "portolan.log"),
		ready:   p.answers,
		listens: []string{config.API},
	}
	if err := p.Configure(config.Config); err != nil {
		return nil, err
	}
	if err := p.Start(ctx); err != nil {
		return nil, err
	}
	return p, nil
}

// Configure replaces the configuration file. It is read at the next start.
func (p *Portolan) Configure(text string) error {
	err := os.MkdirAll(p.config.Dir, 0o755)
	if err == nil {
		err = os.WriteFile(p.file, []byte(text), 0o600)
	}
	if err != nil {
		return fmt.Errorf("configuring %s: %w", p.name, err)
	}
	return nil
}

// API returns the host:port of the HTTP API.
func (p *Portolan) API() string { return p.config.API }

func (p *Portolan) answers(ctx context.Context) error {
	url := "http://" + p.config.API + "/readyz"
	status, err := get(ctx, p.client, url)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("%s answers %d", url, status)
	}
	return nil
}
