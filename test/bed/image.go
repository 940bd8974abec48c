package bed

import (
	"errors"
	"io"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// ReadWhole reads everything that an image or index leads to, to the last byte; what is read is verified against its
// digests on the way.
func ReadWhole(d *remote.Descriptor) error {
	if d.MediaType.IsIndex() {
		index, err := d.ImageIndex()
		if err != nil {
			return err
		}
		return readIndex(index)
	}
	image, err := d.Image()
	if err != nil {
		return err
	}
	return readImage(image)
}

func readIndex(index v1.ImageIndex) error {
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, child := range manifest.Manifests {
		if child.MediaType.IsIndex() {
			nested, err := index.ImageIndex(child.Digest)
			if err == nil {
				err = readIndex(nested)
			}
			if err != nil {
				return err
			}
			continue
		}
		image, err := index.Image(child.Digest)
		if err == nil {
			err = readImage(image)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func readImage(image v1.Image) error {
	if _, err := image.RawConfigFile(); err != nil {
		return err
	}
	layers, err := image.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		r, err := l.Compressed()
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, r)
		if err = errors.Join(err, r.Close()); err != nil {
			return err
		}
	}
	return nil
}
