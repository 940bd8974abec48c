package api

import (
	"strings"
	"testing"
	"time"
)

func TestACME(t *testing.T) {
	t.Parallel()
	r := newRig(t, nil)
	const token = "gfj9Xq_Rg85nMgfj9Xq-Rg85nMgfj9XqRg85nMgfj9X"
	for given, name := range map[string]string{
		"contoso": "contoso.geo.example.net", "Contoso.Geo.Example.net.": "contoso.geo.example.net", "*.contoso.geo.example.net": "contoso.geo.example.net",
		"_acme-challenge.contoso.geo.example.net": "contoso.geo.example.net", "www.x.geo.example.net": "www.x.geo.example.net", "geo.example.net": "geo.example.net",
	} {
		c, err := r.client.SetChallenge(t.Context(), SetChallenge{Name: given, Token: token})
		if err != nil || c.Name != name || c.Record != "_acme-challenge."+name || c.Token != token || time.Until(c.Expires) < 59*time.Minute || time.Until(c.Expires) > time.Hour {
			t.Errorf("%s: %+v, %v", given, c, err)
		}
	}
	if all, err := r.client.Challenges(t.Context()); err != nil || len(all) != 3 {
		t.Errorf("there are %+v, %v", all, err)
	}
	if c, err := r.client.ClearChallenge(t.Context(), "*.contoso.geo.example.net", token); err != nil || c.Name != "contoso.geo.example.net" {
		t.Errorf("cleared %+v, %v", c, err)
	}
	if _, err := r.client.ClearChallenge(t.Context(), "contoso", token); !IsCode(err, CodeNotFound) {
		t.Errorf("cleared again: %v", err)
	}
	_, err := r.client.SetChallenge(t.Context(), SetChallenge{Name: "registry.contoso.com", Token: token})
	if !IsCode(err, CodeInvalid) || !strings.Contains(err.Error(), "let _acme-challenge.registry.contoso.com there be a CNAME to _acme-challenge.REGISTRY.geo.example.net") {
		t.Errorf("off the zone: %v", err)
	}
	for _, q := range []SetChallenge{{Name: "contoso"}, {Token: token}, {Name: "contoso", Token: "a b"}, {Name: "a_/b", Token: token}, {Name: "contoso", Token: token, Lifetime: -1}, {Name: "contoso", Token: token, Lifetime: 1 << 40}} {
		if _, err := r.client.SetChallenge(t.Context(), q); !IsCode(err, CodeInvalid) {
			t.Errorf("%+v: %v", q, err)
		}
	}
	blind := newRig(t, func(o *Options) { o.Zone = "" })
	if _, err := blind.client.SetChallenge(t.Context(), SetChallenge{Name: "contoso", Token: token}); !IsCode(err, CodeRefused) {
		t.Errorf("a server without a zone: %v", err)
	}
}
