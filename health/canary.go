package health

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"portolan/replicator/distribution"
)

const (
	// canaryTimeout bounds one reading of a canary, from the login to the last byte.
	canaryTimeout = 15 * time.Second
	// maxCanary is the largest blob of a canary that is read, and a bound for its manifest.
	maxCanary = 1 << 20
	// canaryDepth bounds how many manifests lie before a blob: an index and one of its images.
	canaryDepth = 2
)

// askCanary really reads an image, since a registry whose storage is gone still answers /v2/: the manifest and its smallest blob,
// at the endpoint and with the replica's credentials, both verified by their digests. What lies on this side is unable:
// credentials that are refused, a limit on requests, an image that is not fit to be one.
func askCanary(ctx context.Context, t *target) error {
	fail := func(err error) error { return fmt.Errorf("reading the canary %s: %w", t.image, err) }
	options := distribution.Options{
		Endpoint: t.endpoint, Prefix: t.access.Prefix, Credentials: t.access.Credentials, CA: t.access.CA, ClientCert: t.access.ClientCert,
		UserAgent: "portolan-health", Limits: distribution.Limits{Manifest: maxCanary},
	}
	if t.access.Realms != "" {
		options.Realms = strings.Split(t.access.Realms, ",")
	}
	client, err := distribution.New(options)
	if err != nil {
		return unable{fail(err)}
	}
	defer client.Close()
	err = readImage(ctx, client, t.image.Repository, t.image.Tag, canaryDepth)
	var refused *distribution.Error
	switch {
	case err == nil:
		return nil
	case isUnable(err), errors.Is(err, distribution.ErrUnauthorized), errors.As(err, &refused) && refused.Status == http.StatusTooManyRequests:
		return unable{fail(err)}
	}
	return fail(err)
}

// readImage reads a manifest, and its smallest blob or, of an index, its first image.
func readImage(ctx context.Context, client *distribution.Client, repository, reference string, depth int) error {
	body, media, _, err := client.Manifest(ctx, repository, reference)
	if err != nil {
		return err
	}
	m, err := distribution.ParseManifest(media, body)
	if err != nil {
		return err
	}
	if len(m.Children) > 0 && depth > 1 {
		return readImage(ctx, client, repository, m.Children[0].Digest, depth-1)
	}
	blobs := slices.DeleteFunc(slices.Clone(m.Blobs), func(d distribution.Descriptor) bool { return d.Size <= 0 || d.Size > maxCanary || len(d.URLs) > 0 })
	if len(blobs) == 0 {
		return unable{fmt.Errorf("it has no blob of up to %d bytes: choose a smaller image", maxCanary)}
	}
	blob := slices.MinFunc(blobs, func(a, b distribution.Descriptor) int { return int(a.Size - b.Size) })
	r, err := client.OpenBlob(ctx, repository, blob, 0)
	if err != nil {
		return err
	}
	defer r.Close()
	h, err := distribution.NewHash(blob.Digest)
	if err != nil {
		return err
	}
	if _, err := io.Copy(h, r); err != nil {
		return fmt.Errorf("reading blob %s: %w", blob.Digest, err)
	}
	if algorithm, _, _ := strings.Cut(blob.Digest, ":"); fmt.Sprintf("%s:%x", algorithm, h.Sum(nil)) != blob.Digest {
		return fmt.Errorf("blob %s: %w", blob.Digest, distribution.ErrCorrupt)
	}
	return nil
}
