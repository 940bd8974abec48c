package distribution

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strings"

	"github.com/google/go-containerregistry/pkg/v1/types"
)

// artifactManifest is the manifest type of OCI 1.1's release candidates, which some registries still hold.
const artifactManifest = "application/vnd.oci.artifact.manifest.v1+json"

// acceptManifests names every manifest type. A HEAD or GET whose Accept lacks the manifest's type is answered with 404 by CNCF
// distribution, which would look like a deletion; so even schema 1, which is never copied, is named.
var acceptManifests = []string{strings.Join([]string{
	string(types.OCIManifestSchema1), string(types.OCIImageIndex), string(types.DockerManifestSchema2), string(types.DockerManifestList),
	artifactManifest, string(types.DockerManifestSchema1Signed), string(types.DockerManifestSchema1), "*/*;q=0.1",
}, ", ")}

// Descriptor names content: the descriptor of the OCI Image Specification with all of its fields, so that one that is read and
// written again loses nothing.
type Descriptor struct {
	MediaType    string            `json:"mediaType"`
	Digest       string            `json:"digest"`
	Size         int64             `json:"size"`
	URLs         []string          `json:"urls,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	Data         []byte            `json:"data,omitempty"`
	Platform     json.RawMessage   `json:"platform,omitempty"`
	ArtifactType string            `json:"artifactType,omitempty"`
}

// Kind is what sort of manifest it is.
type Kind uint8

// The kinds of manifests.
const (
	// Image is a manifest of blobs: OCI image or artifact manifest, docker schema 2.
	Image Kind = iota + 1
	// Index is a manifest of manifests: OCI index, docker manifest list.
	Index
	// Schema1 is docker's oldest form. Its digest depends on its signature's canonical form; it is never copied.
	Schema1
)

// Manifest is what a manifest refers to.
type Manifest struct {
	MediaType string
	Kind      Kind
	// Blobs are the config and the layers, or an artifact's blobs, in order, each digest once.
	Blobs []Descriptor
	// Children are the manifests of an index, in order, each digest once.
	Children []Descriptor
	// Subject is what this one refers to, if it is a referrer.
	Subject *Descriptor
	// ArtifactType and Annotations are those that the list of referrers shows.
	ArtifactType string
	Annotations  map[string]string
}

// ParseManifest reads a manifest of any kind. The media type of the answer decides, and where it is missing or general, the one in the
// document, else its shape. An error is of kind ErrInvalid.
func ParseManifest(mediaType string, body []byte) (*Manifest, error) {
	var doc struct {
		SchemaVersion int               `json:"schemaVersion"`
		MediaType     string            `json:"mediaType"`
		Config        *Descriptor       `json:"config"`
		Layers        []Descriptor      `json:"layers"`
		Blobs         []Descriptor      `json:"blobs"`
		Manifests     []Descriptor      `json:"manifests"`
		FSLayers      []json.RawMessage `json:"fsLayers"`
		Subject       *Descriptor       `json:"subject"`
		ArtifactType  string            `json:"artifactType"`
		Annotations   map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(body, &doc); err != nil {
		return nil, &Error{Kind: ErrInvalid, Message: "the manifest is not valid JSON of its form", Cause: err}
	}
	media := specific(mediaType)
	if media == "" {
		media = specific(doc.MediaType)
	}
	m := &Manifest{MediaType: media, Subject: doc.Subject, ArtifactType: doc.ArtifactType, Annotations: doc.Annotations}
	switch types.MediaType(media) {
	case types.OCIManifestSchema1, types.DockerManifestSchema2, artifactManifest:
		m.Kind = Image
	case types.OCIImageIndex, types.DockerManifestList:
		m.Kind = Index
	case types.DockerManifestSchema1, types.DockerManifestSchema1Signed:
		m.Kind = Schema1
	case "":
		switch {
		case doc.SchemaVersion == 1 || doc.FSLayers != nil:
			m.Kind, m.MediaType = Schema1, string(types.DockerManifestSchema1Signed)
		case doc.Manifests != nil:
			m.Kind, m.MediaType = Index, string(types.OCIImageIndex)
		case doc.Config != nil || doc.Layers != nil:
			m.Kind, m.MediaType = Image, string(types.OCIManifestSchema1)
		}
	}
	var err error
	switch m.Kind {
	case Index:
		// A document that is both would be read one way here and another way there (CVE-2021-41190).
		if doc.Config != nil || doc.Layers != nil {
			return nil, &Error{Kind: ErrInvalid, Message: "the manifest is an index and has layers: ambiguous"}
		}
		m.Children, err = distinct(doc.Manifests)
	case Image:
		if doc.Manifests != nil {
			return nil, &Error{Kind: ErrInvalid, Message: "the manifest is an image and has manifests: ambiguous"}
		}
		all := append(doc.Layers, doc.Blobs...)
		if doc.Config != nil {
			all = append([]Descriptor{*doc.Config}, all...)
			if m.ArtifactType == "" {
				m.ArtifactType = doc.Config.MediaType
			}
		}
		m.Blobs, err = distinct(all)
	case Schema1:
	default:
		return nil, &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%q is not a known manifest type", clean(media, 100))}
	}
	if err != nil {
		return nil, err
	}
	if m.Subject != nil {
		if _, err := NewHash(m.Subject.Digest); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// distinct checks descriptors and leaves each digest once.
func distinct(all []Descriptor) ([]Descriptor, error) {
	seen := make(map[string]bool, len(all))
	var out []Descriptor
	for _, d := range all {
		if _, err := NewHash(d.Digest); err != nil {
			return nil, err
		}
		if d.Size < 0 {
			return nil, &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%s has a negative size", d.Digest)}
		}
		if !seen[d.Digest] {
			seen[d.Digest] = true
			out = append(out, d)
		}
	}
	return out, nil
}

// specific strips parameters, and drops types that say nothing.
func specific(contentType string) string {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return ""
	}
	switch media {
	case "application/json", "application/octet-stream", "text/plain":
		return ""
	}
	return media
}

func (c *Client) manifestPath(repo, reference string) (full, path string, err error) {
	if full, err = c.full(repo); err != nil {
		return "", "", err
	}
	if IsDigest(reference) {
		if _, err := NewHash(reference); err != nil {
			return "", "", err
		}
	} else if !tagName.MatchString(reference) {
		return "", "", &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%s is not a tag", clean(fmt.Sprintf("%q", reference), 160))}
	}
	return full, "/v2/" + full + "/manifests/" + reference, nil
}

// Head asks what a tag or digest is. ErrNotFound if there is none. Where the registry's answer lacks the digest, the manifest is read
// and hashed.
func (c *Client) Head(ctx context.Context, repo, reference string) (Descriptor, error) {
	full, path, err := c.manifestPath(repo, reference)
	if err != nil {
		return Descriptor{}, err
	}
	ask := call{method: http.MethodHead, path: path, header: http.Header{"Accept": acceptManifests}, scopes: []string{pull(full)}}
	resp, err := c.do(ctx, ask, http.StatusOK)
	if err != nil {
		if !errors.Is(err, ErrUnsupported) {
			return Descriptor{}, c.explained(ctx, ask, err)
		}
	} else {
		discard(resp)
		d := Descriptor{Digest: resp.Header.Get("Docker-Content-Digest"), MediaType: specific(resp.Header.Get("Content-Type")), Size: resp.ContentLength}
		if _, err := NewHash(d.Digest); err == nil && d.MediaType != "" && d.Size > 0 {
			if IsDigest(reference) && d.Digest != reference && sameAlgorithm(d.Digest, reference) {
				return Descriptor{}, &Error{Method: http.MethodHead, Path: path, Status: resp.StatusCode, Kind: ErrCorrupt, Message: "the registry answers with " + d.Digest}
			}
			if IsDigest(reference) {
				d.Digest = reference
			}
			return d, nil
		}
	}
	body, media, digest, err := c.Manifest(ctx, repo, reference)
	if err != nil {
		return Descriptor{}, err
	}
	return Descriptor{Digest: digest, MediaType: media, Size: int64(len(body))}, nil
}

// explained gives the error of a HEAD what the registry says of it, which only the answer to a GET has room for. It is asked once,
// of a fault of the registry (500) alone: one that is overloaded or away is not asked more.
func (c *Client) explained(ctx context.Context, ask call, err error) error {
	var bare *Error
	if !errors.As(err, &bare) || bare.Status != http.StatusInternalServerError {
		return err
	}
	ask.method = http.MethodGet
	resp, again := c.do(ctx, ask, http.StatusOK)
	if again == nil {
		resp.Body.Close()
		return err
	}
	var says *Error
	if !errors.As(again, &says) || says.Status != bare.Status {
		return err
	}
	told := *bare
	told.Code, told.Message = says.Code, says.Message
	return &told
}

func sameAlgorithm(a, b string) bool {
	x, _, _ := strings.Cut(a, ":")
	y, _, _ := strings.Cut(b, ":")
	return x == y
}

// Manifest reads a manifest and verifies it: against the reference if that is a digest, else against the digest that the registry
// gives. ErrNotFound, ErrCorrupt; larger than Limits.Manifest is ErrInvalid.
func (c *Client) Manifest(ctx context.Context, repo, reference string) (body []byte, mediaType, digest string, err error) {
	full, path, err := c.manifestPath(repo, reference)
	if err != nil {
		return nil, "", "", err
	}
	r := call{method: http.MethodGet, path: path, header: http.Header{"Accept": acceptManifests}, scopes: []string{pull(full)}}
	resp, err := c.do(ctx, r, http.StatusOK)
	if err != nil {
		return nil, "", "", err
	}
	defer discard(resp)
	fail := func(kind, cause error, message string) error {
		return &Error{Method: r.method, Path: path, Status: resp.StatusCode, Kind: kind, Cause: cause, Message: message}
	}
	if resp.ContentLength > c.limits.Manifest {
		return nil, "", "", fail(ErrInvalid, nil, fmt.Sprintf("the manifest has %d bytes, more than %d", resp.ContentLength, c.limits.Manifest))
	}
	if body, err = readAll(resp.Body, c.limits.Manifest); err != nil {
		if int64(len(body)) > c.limits.Manifest {
			return nil, "", "", fail(ErrInvalid, err, "the manifest is too large")
		}
		return nil, "", "", fail(ErrUnavailable, err, "")
	}
	digest = reference
	if !IsDigest(reference) {
		if digest = resp.Header.Get("Docker-Content-Digest"); digest == "" {
			digest = Digest(body)
		} else if _, err := NewHash(digest); err != nil {
			digest = Digest(body)
		}
	}
	if err := verify(body, digest); err != nil {
		return nil, "", "", fail(ErrCorrupt, nil, err.(*Error).Message)
	}
	if mediaType = specific(resp.Header.Get("Content-Type")); mediaType == "" {
		m, err := ParseManifest("", body)
		if err != nil {
			return nil, "", "", fail(ErrInvalid, err, "")
		}
		mediaType = m.MediaType
	}
	return body, mediaType, digest, nil
}

// PutManifest writes a manifest under a tag or its digest. The write id, if any, rides in the User-Agent (see WriteID). ErrBlobUnknown if
// content that it names is missing; ErrInvalid if the registry will never take it. An error that is none of those leaves the outcome
// unknown: the write may have happened, or may still happen.
func (c *Client) PutManifest(ctx context.Context, repo, reference, mediaType string, body []byte, writeID string) error {
	full, path, err := c.manifestPath(repo, reference)
	if err != nil {
		return err
	}
	if IsDigest(reference) {
		if err := verify(body, reference); err != nil {
			return err
		}
	}
	resp, err := c.do(ctx, call{
		method: http.MethodPut, path: path, body: body, scopes: []string{pullPush(full)}, writeID: writeID,
		header: http.Header{"Content-Type": {mediaType}},
	}, http.StatusCreated, http.StatusOK, http.StatusAccepted)
	if err != nil {
		return err
	}
	discard(resp)
	// A registry that rewrites manifests (converting docker's to OCI's) would never converge with the others.
	if got := resp.Header.Get("Docker-Content-Digest"); got != "" {
		if _, err := NewHash(got); err == nil {
			if err := verify(body, got); err != nil {
				return &Error{Method: http.MethodPut, Path: path, Status: resp.StatusCode, Kind: ErrInvalid, Message: "the registry stored it as " + got}
			}
		}
	}
	return nil
}

// DeleteManifest deletes a digest, and with it every tag that points to it. ErrNotFound if there is none, ErrUnsupported where deletion
// is switched off.
func (c *Client) DeleteManifest(ctx context.Context, repo, digest, writeID string) error {
	if !IsDigest(digest) {
		return &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%q is not a digest", clean(digest, 100))}
	}
	return c.delete(ctx, repo, digest, writeID)
}

// DeleteTag deletes a tag and leaves the manifest. ErrNotFound if there is none. ErrUnsupported where the registry cannot (see DeleteTagByReplacement),
// or where deletion is switched off.
func (c *Client) DeleteTag(ctx context.Context, repo, tag, writeID string) error {
	if IsDigest(tag) {
		return &Error{Kind: ErrInvalid, Message: fmt.Sprintf("%q is not a tag", clean(tag, 100))}
	}
	err := c.delete(ctx, repo, tag, writeID)
	// CNCF distribution 2.8 reads the reference of a DELETE as a digest, always: 400 DIGEST_INVALID.
	var e *Error
	if errors.As(err, &e) && e.Status == http.StatusBadRequest && (e.Kind == ErrInvalid || e.Kind == ErrUnsupported) {
		e.Kind = ErrUnsupported
	}
	return err
}

func (c *Client) delete(ctx context.Context, repo, reference, writeID string) error {
	full, path, err := c.manifestPath(repo, reference)
	if err != nil {
		return err
	}
	resp, err := c.do(ctx, call{method: http.MethodDelete, path: path, scopes: []string{remove(full)}, writeID: writeID},
		http.StatusAccepted, http.StatusOK, http.StatusNoContent)
	if err != nil {
		return err
	}
	discard(resp)
	return nil
}

// emptyJSON is the empty descriptor's content (OCI Image Specification, "Guidance for an Empty Descriptor").
var emptyJSON = []byte("{}")

// DeleteTagByReplacement removes a tag where DeleteTag is not supported: a throw-away manifest, like no other, takes the tag and is deleted by
// its digest, so that tags beside it that point to the same manifest stay. Both writes bear the write id. A tag that somebody pushes in
// between stays as well. declare is called with the throw-away manifest's digest just before it takes the tag, to store an intent; its error
// ends the matter with the tag untouched, as does ErrUnsupported, where deletion is switched off.
func (c *Client) DeleteTagByReplacement(ctx context.Context, repo, tag, writeID string, declare func(digest string) error) error {
	body, digest, err := throwAway()
	if err != nil {
		return err
	}
	// A digest that cannot be there: a registry that deletes says "not found", one that does not says so before harm is done.
	if err := c.DeleteManifest(ctx, repo, digest, writeID); err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("asking whether %s deletes at all: %w", repo, err)
	}
	up, err := c.StartUpload(ctx, repo)
	if err != nil {
		return err
	}
	if err := up.Commit(ctx, Digest(emptyJSON), emptyJSON); err != nil {
		_ = up.Cancel(ctx) // what counts is why the upload failed
		return err
	}
	if err := declare(digest); err != nil {
		return err
	}
	if err := c.PutManifest(ctx, repo, tag, string(types.OCIManifestSchema1), body, writeID); err != nil {
		return fmt.Errorf("replacing tag %s: %w", tag, err)
	}
	if err := c.DeleteManifest(ctx, repo, digest, writeID); err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("deleting the replacement of tag %s: %w", tag, err)
	}
	return nil
}

const throwAwayAnnotation = "portolan.throw-away"

func throwAway() (body []byte, digest string, err error) {
	id := make([]byte, 16)
	rand.Read(id)
	empty := Descriptor{MediaType: string(types.OCIEmptyJSON), Digest: Digest(emptyJSON), Size: int64(len(emptyJSON))}
	body, err = json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": types.OCIManifestSchema1, "artifactType": "application/vnd.portolan.throw-away",
		"config": empty, "layers": []Descriptor{empty}, "annotations": map[string]string{throwAwayAnnotation: hex.EncodeToString(id)},
	})
	return body, Digest(body), err
}
