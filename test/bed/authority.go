package bed

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// Authority is a certificate authority of a test. Its methods may be called from several
// goroutines.
type Authority struct {
	dir  string
	cert *x509.Certificate
	key  crypto.Signer
	pool *x509.CertPool

	mu     sync.Mutex
	serial int64
}

// NewAuthority makes an authority that keeps its certificate, and those it issues, in dir.
func NewAuthority(dir string) (*Authority, error) {
	a := &Authority{dir: dir, pool: x509.NewCertPool(), serial: 1}
	template := certificate(1)
	template.Subject.CommonName = "Portolan test authority"
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making an authority: %w", err)
	}
	a.key = key
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err == nil {
		a.cert, err = x509.ParseCertificate(der)
	}
	if err == nil {
		err = os.WriteFile(a.File(), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("making an authority: %w", err)
	}
	a.pool.AddCert(a.cert)
	return a, nil
}

// File returns the PEM file of the authority's own certificate.
func (a *Authority) File() string { return filepath.Join(a.dir, "ca.pem") }

// ClientTLS returns the settings of a client that trusts this authority alone and wants
// the server to be the one of that name.
func (a *Authority) ClientTLS(serverName string) *tls.Config {
	return &tls.Config{RootCAs: a.pool, ServerName: serverName, MinVersion: tls.VersionTLS12}
}

// Issue issues a certificate, for servers and for clients, to host names and addresses and
// returns its PEM files. It is valid for a day.
func (a *Authority) Issue(hosts ...string) (certFile, keyFile string, err error) {
	return a.IssueUntil(time.Now().Add(24*time.Hour), hosts...)
}

// IssueUntil is Issue with an end of validity, which may lie in the past.
func (a *Authority) IssueUntil(notAfter time.Time, hosts ...string) (certFile, keyFile string, err error) {
	a.mu.Lock()
	a.serial++
	serial := a.serial
	a.mu.Unlock()
	template := certificate(serial)
	template.NotAfter = notAfter
	template.NotBefore = notAfter.Add(-48 * time.Hour)
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, host := range hosts {
		if ip := net.ParseIP(host); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, host)
		}
	}
	certFile = filepath.Join(a.dir, fmt.Sprintf("cert-%d.pem", serial))
	keyFile = filepath.Join(a.dir, fmt.Sprintf("key-%d.pem", serial))
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", fmt.Errorf("issuing a certificate: %w", err)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return "", "", fmt.Errorf("issuing a certificate: %w", err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err == nil {
		err = os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600)
	}
	if err == nil {
		err = os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
	}
	if err != nil {
		return "", "", fmt.Errorf("issuing a certificate: %w", err)
	}
	return certFile, keyFile, nil
}

func certificate(serial int64) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject:      pkix.Name{CommonName: "Portolan test server"},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.Add(24 * time.Hour),
	}
}
