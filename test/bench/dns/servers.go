//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"portolan/test/bed"
)

// zone and oneName are what is asked for.
const (
	zone    = "geo.example.net"
	oneName = "contoso." + zone + "."
)

// places are the regions, or datacenters. The n-th has the address 192.0.2.n, counted from 1.
var places = [...]struct {
	name                string
	latitude, longitude float64
}{
	{"westus", 37.78, -122.42},
	{"eastus", 37.37, -79.82},
	{"brazilsouth", -23.55, -46.63},
	{"westeurope", 52.37, 4.90},
	{"southafricanorth", -25.73, 28.22},
	{"centralindia", 18.58, 73.92},
	{"japaneast", 35.68, 139.77},
	{"australiaeast", -33.86, 151.21},
}

// server is a program to be measured.
type server struct {
	name string
	dns  bool
	at   netip.AddrPort
	// command is the program with its arguments.
	command []string
	answers func(netip.AddrPort) error
	// fresh puts its folder back into the state before its first start; nil if there is nothing to.
	fresh func() error
}

// files are the databases: the flat ones of Portolan, and the same in the GeoIP2 schema.
type files struct{ v4, v6, geoip2 string }

// portolan is "portolan serve" on a store in dir.
func portolan(dir string, at, api netip.AddrPort, db files) (*server, error) {
	path, err := bed.Tool("portolan")
	if err != nil {
		return nil, err
	}
	var topology strings.Builder
	topology.WriteString("registries:\n  - name: contoso\n    home: westus\n    policy: {replication: disabled}\n    replicas:\n")
	for i, p := range places {
		address := fmt.Sprintf("192.0.2.%d", i+1)
		fmt.Fprintf(&topology, "      - {region: %s, endpoint: \"http://%s:5000\", addresses: [%s], location: [%.2f, %.2f], health: {probe: none}}\n",
			p.name, address, address, p.latitude, p.longitude)
	}
	config := fmt.Sprintf(`store: bolt:%[1]s/data/portolan.db
dns: {listen: ["%[2]v"], zone: %[3]s, nameservers: {ns1: [127.0.0.1]}}
geo: {database: [%[4]q, %[5]q]}
api: {listen: "%[6]v"}
topology: %[1]s/topology.yaml
log: {level: warn}
`, dir, at, zone, db.v4, db.v6, api)
	err = errors.Join(write(dir, "portolan.yaml", config), write(dir, "topology.yaml", topology.String()))
	return &server{
		name: "Portolan", dns: true, at: at, command: []string{path, "serve", "--config", filepath.Join(dir, "portolan.yaml")}, answers: answersDNS,
		fresh: func() error {
			data := filepath.Join(dir, "data")
			return errors.Join(os.RemoveAll(data), os.Mkdir(data, 0o700))
		},
	}, err
}

// gdnsd is Debian's gdnsd with the geoip plugin, in its defaults but for one thread, as there is one processor, and the largest
// receive buffer that it can ask for; Portolan asks for four times as much.
func gdnsd(dir string, at netip.AddrPort, db files) (*server, error) {
	path, err := bed.Tool("gdnsd")
	if err != nil {
		return nil, err
	}
	var names []string
	var coordinates, addresses strings.Builder
	for i, p := range places {
		names = append(names, p.name)
		fmt.Fprintf(&coordinates, "%s => [%.2f, %.2f]\n", p.name, p.latitude, p.longitude)
		fmt.Fprintf(&addresses, "%s => 192.0.2.%d\n", p.name, i+1)
	}
	config := fmt.Sprintf(`options => {
  listen => { %[1]v => { udp_threads => 1, tcp_threads => 1, udp_rcvbuf => 1048576 } }
  run_dir => %[2]s/run
  state_dir => %[2]s/state
}
plugins => { geoip => {
  maps => { city => {
    geoip2_db => %[3]s
    datacenters => [ %[4]s ]
    auto_dc_coords => {
%[5]s    }
  } }
  resources => { contoso => { map => city, service_types => up, dcmap => {
%[6]s  } } }
} }
`, at, dir, db.geoip2, strings.Join(names, ", "), coordinates.String(), addresses.String())
	records := "@ SOA ns1 hostmaster 1 7200 1800 259200 60\n@ NS ns1\nns1 A 127.0.0.1\ncontoso 60 DYNA geoip!contoso\n"
	err = errors.Join(write(dir, "config", config), write(filepath.Join(dir, "zones"), zone, records))
	return &server{name: "gdnsd", dns: true, at: at, command: []string{path, "-c", dir, "start"}, answers: answersDNS}, err
}

// echo builds the floor: see echo.c.
func echo(ctx context.Context, dir string, at netip.AddrPort) (*server, error) {
	root, err := bed.Root()
	if err != nil {
		return nil, err
	}
	program := filepath.Join(dir, "echo")
	out, err := exec.CommandContext(ctx, "cc", "-O2", "-Wall", "-Werror", "-o", program, filepath.Join(root, "test/bench/dns/echo.c")).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("compiling echo.c (make system installs a compiler): %w\n%s", err, out)
	}
	command := []string{program, at.Addr().String(), fmt.Sprint(at.Port()), fmt.Sprint(grown)}
	return &server{name: "echo in C", at: at, command: command, answers: answersAny}, nil
}

func write(dir, name, text string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("configuring a server: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		return fmt.Errorf("configuring a server: %w", err)
	}
	return nil
}
