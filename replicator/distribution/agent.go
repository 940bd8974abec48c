package distribution

import (
	"regexp"
	"strings"
)

const agentName = "portolan"

// writeIDs are the ids that may ride in a User-Agent (RFC 9110, section 10.1.5: inside a comment, so no parentheses).
var writeIDs = regexp.MustCompile(`^[A-Za-z0-9._:-]{1,64}$`)

// userAgent is the User-Agent of a request: "portolan/<version>", and for a write "portolan/<version> (write <id>)". Registries
// echo it in their events, which is how a write of our own is told from a push.
func userAgent(agent, writeID string) string {
	if writeID == "" || !writeIDs.MatchString(writeID) {
		return agent
	}
	return agent + " (write " + writeID + ")"
}

// WriteID returns the write id that a User-Agent carries, or "".
func WriteID(userAgent string) string {
	rest, found := strings.CutPrefix(userAgent, agentName+"/")
	if !found {
		return ""
	}
	_, rest, found = strings.Cut(rest, " (write ")
	if !found {
		return ""
	}
	id, _, found := strings.Cut(rest, ")")
	if !found || !writeIDs.MatchString(id) {
		return ""
	}
	return id
}
