package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"portolan/listener"
)

// family is the IP version of at, as the names of Go's networks have it: "4", or what is given for IPv6. Without it Go binds
// 0.0.0.0 as [::], which is open to IPv6, and busy when anybody has the port on some IPv6 address.
func family(at netip.AddrPort, six string) string {
	if at.Addr().Unmap().Is4() {
		return "4"
	}
	return six
}

// listen binds a TCP address; setting is where the configuration names it. [::] takes IPv4 as well unless network is tcp6.
func listen(ctx context.Context, setting, network string, at netip.AddrPort) (net.Listener, error) {
	l, err := new(net.ListenConfig).Listen(ctx, network, at.String())
	if err == nil {
		return l, nil
	}
	advice := ""
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("%s: %v is in use by another program: is a portolan running already? \"ss -ltnp sport = :%d\" names it", setting, at, at.Port())
	case errors.Is(err, syscall.EACCES):
		advice = ": ports below 1024 need root or the capability CAP_NET_BIND_SERVICE"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		advice = ": this machine has no such address"
	}
	return nil, fmt.Errorf("%s: binding %v: %w%s", setting, at, err, advice)
}

// tryDNS finds out at once whether the DNS sockets, which are bound later and each family apart, can be had.
func tryDNS(ctx context.Context, addresses []netip.AddrPort) error {
	for _, at := range addresses {
		l, err := listen(ctx, "dns.listen", "tcp"+family(at, "6"), at)
		if err != nil {
			return err
		}
		p, err := new(net.ListenConfig).ListenPacket(ctx, "udp"+family(at, "6"), l.Addr().String())
		if err == nil {
			err = p.Close()
		} else if errors.Is(err, syscall.EADDRINUSE) && at.Port() != 0 {
			err = fmt.Errorf("dns.listen: %v is in use for UDP by another program: \"ss -lunp sport = :%d\" names it (on port 53 often systemd-resolved)", at, at.Port())
		} else {
			err = nil // a port that the kernel chose is chosen anew later
		}
		if err = errors.Join(err, l.Close()); err != nil {
			return err
		}
	}
	return nil
}

// loadCertificate reads the files of a key pair; without any there is no certificate, and it returns nil.
func loadCertificate(setting string, files KeyPair, log *zap.Logger) (*listener.Certificate, error) {
	if files.Cert == "" {
		return nil, nil
	}
	c, err := listener.LoadCertificate(files.Cert, files.Key, log)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	return c, nil
}

// readToken reads the API's token; none if path is empty.
func readToken(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("api.token_file: %w", err)
	}
	const least = 16
	token := strings.TrimSpace(string(text))
	if len(token) < least || strings.ContainsAny(token, " \t\r\n") {
		return "", fmt.Errorf("api.token_file: %s must hold one word of at least %d characters: make one with \"openssl rand -hex 32\"", path, least)
	}
	return token, nil
}

// serveAPI answers on l until ctx is done, then lets requests under way finish.
func serveAPI(ctx context.Context, l net.Listener, handler http.Handler, certificate *listener.Certificate, log *zap.Logger) error {
	err := listener.Serve(ctx, l, &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      time.Minute, // more than a request may take
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    32 << 10,
	}, certificate, 2*time.Second, log)
	if err != nil {
		return fmt.Errorf("the API: %w", err)
	}
	return nil
}
