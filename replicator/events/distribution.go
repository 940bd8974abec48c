package events

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"time"

	"portolan/replicator/distribution"
)

// The media types of CNCF distribution's envelopes (notifications/event.go): version 2.8 sends the first, version 3
// the second. What differs between them lies in parts that are not read here (the descriptors of references).
const (
	distributionV1 = "application/vnd.docker.distribution.events.v1+json"
	distributionV2 = "application/vnd.docker.distribution.events.v2+json"
)

// Distribution reads the notifications of CNCF distribution 2.x and 3.x, and of those that copied them.
//
// A push under a tag has tag and digest. A delete by digest has the digest alone, and is followed, in no order, by a
// delete for each tag that it held, with the tag alone. Blobs are told by their media type when pushed; a deleted blob
// looks exactly like a deleted manifest.
type Distribution struct{}

var _ Format = Distribution{}

type distributionEnvelope struct {
	Events *[]distributionEvent `json:"events"`
}

type distributionEvent struct {
	ID        string `json:"id"`
	Timestamp string `json:"timestamp"`
	Action    string `json:"action"`
	Target    struct {
		MediaType  string `json:"mediaType"`
		Digest     string `json:"digest"`
		Repository string `json:"repository"`
		Tag        string `json:"tag"`
	} `json:"target"`
	Request struct {
		UserAgent string `json:"useragent"`
	} `json:"request"`
	Actor struct {
		Name string `json:"name"`
	} `json:"actor"`
}

// Match looks at the Content-Type alone.
func (Distribution) Match(m Message) bool {
	mediaType, _, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
	return err == nil && (mediaType == distributionV1 || mediaType == distributionV2)
}

// Parse implements Format.
func (Distribution) Parse(m Message) (Report, error) {
	var envelope distributionEnvelope
	if err := json.Unmarshal(m.Body, &envelope); err != nil {
		return Report{}, fmt.Errorf("reading a distribution envelope: %w", err)
	}
	if envelope.Events == nil {
		return Report{}, errors.New("reading a distribution envelope: it has no events")
	}
	if len(*envelope.Events) > maxEvents {
		return Report{}, errTooMany
	}
	var r Report
	for i := range *envelope.Events {
		e := &(*envelope.Events)[i]
		switch {
		case e.Action == "pull" || e.Action == "mount":
			r.Ignored++
		case e.Target.Tag == "" && isBlob(e.Target.MediaType):
			r.Ignored++
		default:
			r.add(Event{
				ID:         e.ID,
				Action:     Action(e.Action),
				Repository: e.Target.Repository,
				Tag:        e.Target.Tag,
				Digest:     e.Target.Digest,
				MediaType:  clip(e.Target.MediaType, 128),
				Time:       parseTime(e.Timestamp),
				WriteID:    distribution.WriteID(e.Request.UserAgent),
				UserAgent:  clip(e.Request.UserAgent, 128),
				Actor:      clip(e.Actor.Name, 128),
				Received:   m.Received,
			})
		}
	}
	return r, nil
}

// isBlob reports whether the media type is one that distribution gives to blobs, whatever they are: it does not know.
func isBlob(mediaType string) bool {
	return mediaType == "application/octet-stream" || mediaType == "application/vnd.docker.container.image.rootfs.diff+x-gtar"
}

// parseTime returns the zero time for what cannot be a time: as good as none, since the receipt caps it anyway. The years
// keep it within what JSON can hold in any zone.
func parseTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() < 1970 || t.Year() > 9998 {
		return time.Time{}
	}
	return t.UTC()
}
