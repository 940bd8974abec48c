package bed_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"portolan/test/bed"
)

// A byte that is missing anywhere below an index, also in an index within it, is noticed.
func TestReadWhole(t *testing.T) {
	t.Parallel()
	r := bed.NewRegistry(t, bed.RegistryConfig{})
	image, err := random.Image(512, 1)
	if err != nil {
		t.Fatal(err)
	}
	nested, err := random.Index(512, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.AppendManifests(nested, mutate.IndexAddendum{Add: mutate.AppendManifests(nested, mutate.IndexAddendum{Add: image})})
	ref, err := name.ParseReference(r.Addr()+"/app:1", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.WriteIndex(ref, index, remote.WithContext(t.Context())); err != nil {
		t.Fatal(err)
	}
	read := func() error {
		d, err := remote.Get(ref, remote.WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		return bed.ReadWhole(d)
	}
	if err := read(); err != nil {
		t.Fatal(err)
	}
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	blob := filepath.Join(r.Storage(), "docker/registry/v2/blobs/sha256", digest.Hex[:2], digest.Hex, "data")
	if err := os.Truncate(blob, 100); err != nil {
		t.Fatal(err)
	}
	if err := read(); err == nil {
		t.Error("a layer that lost its end was read")
	}
}
