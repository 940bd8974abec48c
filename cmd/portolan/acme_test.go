package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	mdns "github.com/miekg/dns"

	"portolan/test/bed"
)

// A challenge is in the answers of the DNS server from the command on, and until it is cleared.
func TestACME(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const token = "gfj9Xq_Rg85nMgfj9Xq-Rg85nMgfj9XqRg85nMgfj9X"
	served := func(want string) {
		t.Helper()
		q := new(mdns.Msg).SetQuestion("_acme-challenge.contoso.geo.example.net.", mdns.TypeTXT)
		err := bed.Until(t.Context(), patience, func(context.Context) error {
			m, _, err := new(mdns.Client).Exchange(q, w.addresses.DNS[0].String())
			if err != nil {
				return err
			}
			var got []string
			for _, rr := range m.Answer {
				got = append(got, rr.(*mdns.TXT).Txt...)
			}
			if strings.Join(got, " ") != want {
				return errors.New(m.String())
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
	out, _ := w.must(t, exitDone, "acme", "set", "--lifetime", "10m", "contoso", token)
	contains(t, "acme set", out, `_acme-challenge.contoso.geo.example.net TXT "`+token+`" is served`)
	served(token)
	out, _ = w.must(t, exitDone, "acme", "list")
	contains(t, "acme list", out, "RECORD", "_acme-challenge.contoso.geo.example.net  "+token)
	w.must(t, exitDone, "acme", "clear", "*.contoso.geo.example.net", token)
	served("")
	_, errout := w.must(t, exitDone, "acme", "clear", "contoso", token)
	contains(t, "acme clear again", errout, "has no such challenge")
	_, errout = w.must(t, exitUsage, "acme", "set", "registry.contoso.com", token)
	contains(t, "acme set off the zone", errout, "CNAME")
	w.must(t, exitUsage, "acme", "set", "contoso", "two words")
	w.must(t, exitUsage, "acme", "set", "--lifetime", "1ms", "contoso", token)
	w.must(t, exitDone, "acme", "set", "contoso", "-o"+token[2:]) // no flag
	served("-o" + token[2:])
	out, _ = w.must(t, exitDone, "acme", "clear", "contoso", "-o"+token[2:], "-o", "json")
	contains(t, "acme clear with a flag behind", out, `"token": "-o`)
	served("")
	out, _ = w.must(t, exitDone, "acme", "set", "contoso", token, "--help")
	contains(t, "acme set with --help behind", out, "Usage:")
	_, errout = w.must(t, exitUsage, "acme", "set", "contoso", token, "--lifetyme", "10m")
	contains(t, "acme set with a flag that there is not", errout, `did you mean "--lifetime"?`)
	_, errout = w.must(t, exitUsage, "acme", "clear", "contoso", token, "-o", "json", "more")
	contains(t, "acme clear with too much", errout, `"more" is one argument too many`)
	out, _ = w.must(t, exitDone, "acme", "list")
	if strings.Contains(out, "contoso") {
		t.Errorf("what was refused was done:\n%s", out)
	}
}
