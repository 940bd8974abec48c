package bed_test

import (
	"strings"
	"testing"

	"github.com/hashicorp/consul/api"

	"portolan/test/bed"
)

func TestConsulKeepsItsKeys(t *testing.T) {
	t.Parallel()
	for name, token := range map[string]string{"open": "", "access-control": "1e2c7d4a-5f0b-4b1e-9a38-6f0f6a1b2c3d"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := bed.NewConsul(t, bed.ConsulConfig{Token: token, Datacenter: "north"})
			client, err := c.Client()
			if err != nil {
				t.Fatal(err)
			}
			options := (&api.QueryOptions{RequireConsistent: true}).WithContext(t.Context())
			read := func(after string) {
				t.Helper()
				pair, _, err := client.KV().Get("a/b", options)
				if err != nil || pair == nil || string(pair.Value) != "kept" {
					t.Fatalf("after %s: %v, %v", after, pair, err)
				}
			}
			if _, err := c.Run(t.Context(), "kv", "put", "a/b", "kept"); err != nil {
				t.Fatal(err)
			}
			read("put")
			if err := c.Restart(t.Context()); err != nil {
				t.Fatal(err)
			}
			read("restart")
			c.Kill()
			if _, _, err := client.KV().Get("a/b", options); err == nil {
				t.Fatal("it answers after Kill")
			}
			if err := c.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			read("kill and start")
			if token == "" {
				return
			}
			stranger, err := api.NewClient(&api.Config{Address: c.Addr()})
			if err != nil {
				t.Fatal(err)
			}
			if pair, _, err := stranger.KV().Get("a/b", options); pair != nil || (err != nil && !strings.Contains(err.Error(), "403")) {
				t.Errorf("without the token: %v, %v", pair, err)
			}
		})
	}
}
