package listener

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
)

// write makes a certificate and returns it; the files have the time at.
func write(t *testing.T, certFile, keyFile string, at time.Time) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	replace(t, certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}), at)
	replace(t, keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), at)
	return cert
}

func replace(t *testing.T, file string, text []byte, at time.Time) {
	t.Helper()
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, at, at); err != nil {
		t.Fatal(err)
	}
}

// A certificate is read again when its files change, and when it is told to; what cannot be used changes nothing.
func TestCertificateIsReadAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	certFile, keyFile := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	if _, err := LoadCertificate(certFile, keyFile, zaptest.NewLogger(t)); err == nil || !strings.Contains(err.Error(), certFile) {
		t.Errorf("without files: %v", err)
	}
	at := time.Unix(1e9, 0)
	want := write(t, certFile, keyFile, at)
	c, err := LoadCertificate(certFile, keyFile, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	serves := func(when string) {
		t.Helper()
		if got, err := c.get(nil); err != nil || !bytes.Equal(got.Certificate[0], want) {
			t.Errorf("%s: another certificate is served (%v)", when, err)
		}
	}
	serves("at first")
	want = write(t, certFile, keyFile, at.Add(time.Second))
	serves("after a change")
	second := write(t, certFile, keyFile, at.Add(time.Second)) // at the same time, however coarse the clock is
	serves("after a change that the times do not show")
	if err := c.Reload(); err != nil {
		t.Error(err)
	}
	want = second
	serves("after Reload")
	replace(t, keyFile, []byte("half a key"), at.Add(2*time.Second))
	if err := c.Reload(); err == nil {
		t.Error("Reload of half a key is no error")
	}
	serves("with half a key")
}
