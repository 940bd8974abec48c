package events

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"portolan/test/bed"
)

// TestRealRegistries has real registries post to the listener: a push, one of our own, and a delete.
func TestRealRegistries(t *testing.T) {
	t.Parallel()
	for _, server := range []bed.Distribution{bed.DistributionV3, bed.DistributionV2} {
		t.Run(string(server), func(t *testing.T) {
			t.Parallel()
			l := newListener(t, nil)
			socket, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- Serve(ctx, socket, l.Handler, nil) }()
			t.Cleanup(func() {
				stop()
				if err := <-ended; err != nil {
					t.Error(err)
				}
			})
			registry := bed.NewRegistry(t, bed.RegistryConfig{
				Server: server, Dir: t.TempDir(),
				Notify: []bed.Notification{{URL: "http://" + socket.Addr().String() + westus, Token: l.key.Token("contoso", "westus"), Timeout: 5 * time.Second}},
			})
			image, err := random.Image(64, 1)
			if err != nil {
				t.Fatal(err)
			}
			digest, err := image.Digest()
			if err != nil {
				t.Fatal(err)
			}
			tag, err := name.NewTag(registry.Addr() + "/team/app:1.2")
			if err != nil {
				t.Fatal(err)
			}
			if err := remote.Write(tag, image, remote.WithContext(t.Context()), remote.WithUserAgent("someone/1")); err != nil {
				t.Fatal(err)
			}
			// Put does not look first, as Write does.
			if err := remote.Put(tag, image, remote.WithContext(t.Context()), remote.WithUserAgent("portolan/1.0.0 (write 0a1b)")); err != nil {
				t.Fatal(err)
			}
			if err := remote.Delete(tag.Digest(digest.String()), remote.WithContext(t.Context())); err != nil {
				t.Fatal(err)
			}
			type said struct {
				action            Action
				reference, writer string
			}
			want := map[said]bool{
				{Push, "1.2", ""}: true, {Push, "1.2", "0a1b"}: true,
				{Delete, digest.String(), ""}: true, {Delete, "1.2", ""}: true,
			}
			for len(want) > 0 {
				items := take(t, l.spool, 10)
				for _, i := range items {
					for _, e := range i.Evidence {
						delete(want, said{e.Action, e.Reference(), e.WriteID})
					}
				}
				done(t, l.spool, items...)
			}
		})
	}
}
