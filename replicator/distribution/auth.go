package distribution

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"golang.org/x/sync/singleflight"
)

// authenticator answers the replica's challenges. go-containerregistry's own transport is not used for it: that one collects
// the scopes of every repository in one token, sends a streamed body a second time after it has been consumed, and
// takes any public realm the registry names.
type authenticator struct {
	client  *Client
	creds   credentials
	realms  []string
	flights singleflight.Group

	mu        sync.Mutex
	challenge challenge
	config    authn.AuthConfig
	read      time.Time
	tokens    map[string]token
}

type token struct {
	value   string
	expires time.Time
}

const (
	// credentialsTTL is how long credentials are used without looking again.
	credentialsTTL = time.Minute
	// maxTokens bounds the tokens kept: about one a repository in use.
	maxTokens = 1024
	// minTokenTTL is what the token specification assumes where expires_in is missing or less.
	minTokenTTL  = time.Minute
	maxTokenBody = 64 << 10
)

func newAuthenticator(c *Client, creds credentials, realms []string) *authenticator {
	return &authenticator{client: c, creds: creds, realms: realms, tokens: map[string]token{}}
}

// header is the Authorization for a request with these scopes, as far as it is known what the replica wants; else "".
func (a *authenticator) header(ctx context.Context, scopes []string) (string, error) {
	a.mu.Lock()
	ch := a.challenge
	t, found := a.tokens[strings.Join(scopes, " ")]
	a.mu.Unlock()
	switch ch.scheme {
	case "basic":
		conf, err := a.configuration(ctx, false)
		return basic(conf), err
	case "bearer":
		if found && time.Now().Before(t.expires) {
			return "Bearer " + t.value, nil
		}
		value, err := a.fetch(ctx, ch, scopes, scopes, false)
		if err != nil {
			a.forget(ch)
			return "", err
		}
		return "Bearer " + value, nil
	}
	return "", nil
}

// forget has the replica asked again what it wants: a token server that gives nothing may be one that the replica has left behind, and a
// request that is never sent is never answered with another.
func (a *authenticator) forget(ch challenge) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.challenge.scheme == ch.scheme && maps.Equal(a.challenge.parameters, ch.parameters) {
		a.challenge = challenge{}
	}
}

// challenged learns from a 401 and reports whether asking again may help.
func (a *authenticator) challenged(ctx context.Context, resp *http.Response, used string, scopes []string) (bool, error) {
	ch, found := pickChallenge(resp.Header.Values("WWW-Authenticate"))
	if !found {
		return false, nil
	}
	a.mu.Lock()
	a.challenge = ch
	a.mu.Unlock()
	switch ch.scheme {
	case "basic":
		conf, err := a.configuration(ctx, used != "")
		if err != nil {
			return false, err
		}
		h := basic(conf)
		return h != "" && h != used, nil
	default:
		// What the server says it wants, and what we know that we shall want.
		want := append(strings.Fields(ch.parameters["scope"]), scopes...)
		slices.Sort(want)
		if _, err := a.fetch(ctx, ch, scopes, slices.Compact(want), used != ""); err != nil {
			return false, err
		}
		return true, nil
	}
}

func basic(conf authn.AuthConfig) string {
	switch {
	case conf.RegistryToken != "":
		return "Bearer " + conf.RegistryToken
	case conf.Username != "" || conf.Password != "":
		return "Basic " + base64.StdEncoding.EncodeToString([]byte(conf.Username+":"+conf.Password))
	case conf.Auth != "":
		return "Basic " + conf.Auth
	}
	return ""
}

// configuration reads the credentials, again if they are old or were refused.
func (a *authenticator) configuration(ctx context.Context, again bool) (authn.AuthConfig, error) {
	if a.creds == nil {
		return authn.AuthConfig{}, nil
	}
	a.mu.Lock()
	conf, read := a.config, a.read
	a.mu.Unlock()
	if !again && !read.IsZero() && time.Since(read) < credentialsTTL {
		return conf, nil
	}
	conf, err := a.creds(ctx)
	if err != nil {
		return authn.AuthConfig{}, &Error{Kind: ErrUnauthorized, Message: err.Error()}
	}
	a.mu.Lock()
	a.config, a.read = conf, time.Now()
	a.mu.Unlock()
	return conf, nil
}

// fetch gets a token with the scopes want and keeps it for requests with the scopes key. Equal fetches at one time are one.
func (a *authenticator) fetch(ctx context.Context, ch challenge, key, want []string, again bool) (string, error) {
	k := strings.Join(key, " ")
	result := a.flights.DoChan(k, func() (any, error) {
		// Others may wait for it: it does not end with the context of the first.
		fctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.client.limits.Header)
		defer cancel()
		t, err := a.exchange(fctx, ch, want, again)
		if err != nil {
			return nil, err
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.tokens) >= maxTokens {
			clear(a.tokens)
		}
		a.tokens[k] = t
		return t.value, nil
	})
	select {
	case <-ctx.Done():
		return "", ctx.Err()
	case r := <-result:
		if r.Err != nil {
			return "", r.Err
		}
		return r.Val.(string), nil
	}
}

// exchange gets a token, with credentials that are read again if the token server refuses those at hand.
func (a *authenticator) exchange(ctx context.Context, ch challenge, scopes []string, again bool) (token, error) {
	realm, err := a.realm(ch.parameters["realm"])
	if err != nil {
		return token{}, &Error{Kind: ErrUnauthorized, Message: err.Error()}
	}
	conf, err := a.configuration(ctx, again)
	if err != nil {
		return token{}, err
	}
	t, err := a.login(ctx, *realm, ch, scopes, conf)
	var e *Error
	if again || !errors.As(err, &e) || e.Status != http.StatusUnauthorized {
		return t, err
	}
	fresh, rerr := a.configuration(ctx, true)
	if rerr != nil {
		return token{}, rerr
	}
	if fresh == conf {
		return t, err
	}
	return a.login(ctx, *realm, ch, scopes, fresh)
}

// login asks the token server (Docker token authentication specification; with an identity token, its OAuth2 form).
func (a *authenticator) login(ctx context.Context, realm url.URL, ch challenge, scopes []string, conf authn.AuthConfig) (token, error) {
	if conf.RegistryToken != "" {
		return token{value: conf.RegistryToken, expires: time.Now().Add(credentialsTTL)}, nil
	}
	values := realm.Query()
	values.Set("service", ch.parameters["service"])
	var req *http.Request
	var err error
	if conf.IdentityToken != "" {
		form := url.Values{
			"grant_type": {"refresh_token"}, "refresh_token": {conf.IdentityToken}, "client_id": {agentName},
			"service": {ch.parameters["service"]}, "scope": {strings.Join(scopes, " ")},
		}
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	} else {
		values["scope"] = scopes
		realm.RawQuery = values.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
		if err == nil {
			if h := basic(conf); h != "" {
				req.Header.Set("Authorization", h)
			}
		}
	}
	if err != nil {
		return token{}, &Error{Kind: ErrUnauthorized, Message: "the realm is not a URL"}
	}
	req.Header.Set("User-Agent", a.client.agent)
	transport := a.client.foreign
	if a.client.sameOrigin(&realm) {
		transport = a.client.own
	}
	// RoundTrip follows no redirects, and none is wanted: it would carry the credentials elsewhere.
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return token{}, &Error{Method: req.Method, Path: "token server " + realm.Host, Kind: ErrUnavailable, Cause: err}
	}
	defer discard(resp)
	if resp.StatusCode != http.StatusOK {
		e := responseError(req.Method, "token server "+realm.Host, false, resp).(*Error)
		if e.Kind != ErrUnavailable {
			e.Kind = ErrUnauthorized
		}
		return token{}, e
	}
	raw, err := readAll(resp.Body, maxTokenBody)
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int    `json:"expires_in"`
	}
	if err == nil {
		// The error would quote the answer.
		if json.Unmarshal(raw, &answer) != nil || answer.Token == "" && answer.AccessToken == "" {
			err = fmt.Errorf("no token in the answer")
		}
	}
	if err != nil {
		return token{}, &Error{Method: req.Method, Path: "token server " + realm.Host, Kind: ErrUnavailable, Cause: err}
	}
	value := answer.AccessToken
	if value == "" {
		value = answer.Token
	}
	ttl := max(time.Duration(answer.ExpiresIn)*time.Second, minTokenTTL)
	// A fifth in hand: a request begun with the token has to reach the registry before it ends.
	return token{value: value, expires: time.Now().Add(ttl * 4 / 5)}, nil
}

// realm checks where a token is to be had: the endpoint's host or a listed one, by https unless the endpoint is plain itself.
func (a *authenticator) realm(v string) (*url.URL, error) {
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || u.User != nil || (u.Scheme != "https" && u.Scheme != "http") {
		return nil, fmt.Errorf("the registry names no usable token server")
	}
	if u.Scheme == "http" && a.client.endpoint.Scheme != "http" {
		return nil, fmt.Errorf("token server http://%s is refused: the endpoint is https", u.Host)
	}
	if strings.EqualFold(u.Hostname(), a.client.endpoint.Hostname()) {
		return u, nil
	}
	for _, allowed := range a.realms {
		if strings.EqualFold(allowed, u.Host) || strings.EqualFold(allowed, u.Hostname()) {
			return u, nil
		}
	}
	return nil, fmt.Errorf("token server %s://%s is not on the replica's list", u.Scheme, u.Host)
}

// challenge is one of WWW-Authenticate (RFC 9110, section 11.6.1). The scheme and the names are lower-case.
type challenge struct {
	scheme     string
	parameters map[string]string
}

// pickChallenge takes the first challenge that we can answer, bearer before basic.
func pickChallenge(headers []string) (challenge, bool) {
	var picked challenge
	for _, h := range headers {
		for _, ch := range parseChallenges(h) {
			switch {
			case ch.scheme == "bearer" && ch.parameters["realm"] != "" && picked.scheme != "bearer",
				ch.scheme == "basic" && picked.scheme == "":
				picked = ch
			}
		}
	}
	return picked, picked.scheme != ""
}

// parseChallenges reads a header value with any number of challenges: scheme, then name=value pairs, where a value is a token or a
// quoted string. What it cannot read it passes over.
func parseChallenges(s string) []challenge {
	var out []challenge
	for len(s) > 0 {
		s = strings.TrimLeft(s, " \t,")
		word := tokenPrefix(s)
		if word == "" {
			if s == "" {
				break
			}
			s = s[1:]
			continue
		}
		s = s[len(word):]
		rest := strings.TrimLeft(s, " \t")
		value, after, found := parseValue(rest)
		switch {
		case found && len(out) > 0:
			if name := strings.ToLower(word); out[len(out)-1].parameters[name] == "" {
				out[len(out)-1].parameters[name] = value
			}
			s = after
		case found:
			s = after // a parameter before any scheme
		default:
			out = append(out, challenge{scheme: strings.ToLower(word), parameters: map[string]string{}})
		}
	}
	return out
}

// parseValue reads =value.
func parseValue(s string) (value, rest string, found bool) {
	s, found = strings.CutPrefix(s, "=")
	if !found {
		return "", s, false
	}
	s = strings.TrimLeft(s, " \t")
	if !strings.HasPrefix(s, `"`) {
		value = tokenPrefix(s)
		return value, s[len(value):], true
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			if i++; i < len(s) {
				b.WriteByte(s[i])
			}
		case '"':
			return b.String(), s[i+1:], true
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "", true // unterminated: nothing of it can be trusted
}

// tokenPrefix is the longest token (RFC 9110, section 5.6.2) that s begins with; "/", ":" and "+" are let in for the unquoted
// values that some servers send.
func tokenPrefix(s string) string {
	for i := 0; i < len(s); i++ {
		c := s[i]
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~/:", c) >= 0) {
			return s[:i]
		}
	}
	return s
}
