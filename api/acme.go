package api

import (
	"context"
	"net/http"
	"strings"
	"time"

	"portolan/topology"
)

// acmeLabel is where the TXT record of a name's challenge stands (RFC 8555, section 8.4).
const acmeLabel = "_acme-challenge."

// Challenge is an ACME DNS-01 challenge that the front door answers.
type Challenge struct {
	// Name is what the certificate is for; Record the name of the TXT record. Neither has a final dot.
	Name    string    `json:"name"`
	Record  string    `json:"record"`
	Token   string    `json:"token"`
	Expires time.Time `json:"expires"`
}

// SetChallenge asks for a challenge.
type SetChallenge struct {
	// Name is a name in the zone; one without a dot is completed by the zone. "*." and "_acme-challenge." before it are left out.
	Name  string `json:"name"`
	Token string `json:"token"`
	// Lifetime is in seconds; an hour if zero.
	Lifetime int `json:"lifetime,omitempty"`
}

// Challenges returns those that have not expired.
func (c *Client) Challenges(ctx context.Context) (all []Challenge, err error) {
	return all, c.do(ctx, http.MethodGet, path("acme"), nil, nil, &all)
}

// SetChallenge adds a challenge, or gives it another end.
func (c *Client) SetChallenge(ctx context.Context, q SetChallenge) (set Challenge, err error) {
	return set, c.do(ctx, http.MethodPost, path("acme"), nil, q, &set)
}

// ClearChallenge takes a challenge away.
func (c *Client) ClearChallenge(ctx context.Context, name, token string) (cleared Challenge, err error) {
	return cleared, c.do(ctx, http.MethodDelete, path("acme", name, token), nil, nil, &cleared)
}

// defaultLifetime is longer than any ACME client takes over one certificate.
const defaultLifetime = time.Hour

func described(c topology.Challenge) Challenge {
	return Challenge{Name: c.Name, Record: acmeLabel + c.Name, Token: c.Token, Expires: c.Expires}
}

func (s *server) challenges(r *http.Request) (any, error) {
	list, err := s.Editor.Challenges(r.Context())
	if err != nil {
		return nil, err
	}
	all := make([]Challenge, len(list))
	for i, c := range list {
		all[i] = described(c)
	}
	return all, nil
}

func (s *server) setChallenge(r *http.Request) (any, error) {
	var q SetChallenge
	if err := decodeStrict(r, &q); err != nil {
		return nil, err
	}
	name, err := s.zoneName(q.Name)
	if err != nil {
		return nil, err
	}
	life := time.Duration(q.Lifetime) * time.Second
	switch {
	case q.Lifetime == 0:
		life = defaultLifetime
	case int64(life/time.Second) != int64(q.Lifetime):
		return nil, failf(CodeInvalid, "a lifetime of %d seconds is too long", q.Lifetime)
	}
	c := topology.Challenge{Name: name, Token: q.Token, Expires: time.Now().UTC().Truncate(time.Second).Add(life)}
	if err := s.Editor.SetChallenge(r.Context(), c); err != nil {
		return nil, err
	}
	return described(c), nil
}

func (s *server) clearChallenge(r *http.Request) (any, error) {
	name, err := s.zoneName(r.PathValue("name"))
	if err != nil {
		return nil, err
	}
	c := topology.Challenge{Name: name, Token: r.PathValue("token")}
	if err := s.Editor.ClearChallenge(r.Context(), c.Name, c.Token); err != nil {
		return nil, err
	}
	return described(c), nil
}

// zoneName is the name in the zone that an ACME client means, without a final dot.
func (s *server) zoneName(given string) (string, error) {
	if s.Zone == "" {
		return "", failf(CodeRefused, "this server has not the role dns, so it has no zone: ask one that has")
	}
	zone := strings.TrimSuffix(s.Zone, ".")
	name := strings.ToLower(strings.TrimSuffix(given, "."))
	name = strings.TrimPrefix(strings.TrimPrefix(name, acmeLabel), "*.")
	switch {
	case name == "":
		return "", failf(CodeInvalid, "a name is needed: that of a registry, or any name in the zone %s", zone)
	case !strings.Contains(name, "."):
		return name + "." + zone, nil
	case name == zone || strings.HasSuffix(name, "."+zone):
		return name, nil
	}
	return "", failf(CodeInvalid, "%s is not in the zone %s: let %s%s there be a CNAME to %sREGISTRY.%s, and set the challenge of REGISTRY",
		clip(name), zone, acmeLabel, clip(name), acmeLabel, zone)
}
