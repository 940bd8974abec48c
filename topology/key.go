package topology

import (
	"fmt"
	"slices"
	"strings"

	"portolan/strict"
)

// The fields of a registry and of a replica, as the ends of their keys.
const (
	fieldHome        = "home"
	fieldNames       = "names"
	fieldAllDown     = "policy/all_down"
	fieldReplication = "policy/replication"
	fieldMaxLag      = "policy/max_lag"
	fieldMerge       = "policy/merge"
	fieldConflicts   = "policy/conflicts"
	fieldUntagged    = "policy/untagged"
	fieldDeletes     = "policy/deletes"

	fieldEndpoint    = "endpoint"
	fieldAddresses   = "addresses"
	fieldHostname    = "hostname"
	fieldLocation    = "location"
	fieldWeight      = "weight"
	fieldRamp        = "ramp"
	fieldRouting     = "routing"
	fieldProbe       = "health/probe"
	fieldCanary      = "health/canary"
	fieldCredentials = "credentials"
	fieldCA          = "ca"
	fieldClientCert  = "client_cert"
	fieldPrefix      = "prefix"
	fieldRealms      = "realms"
)

var (
	registryFields = []string{fieldHome, fieldNames, fieldAllDown, fieldReplication, fieldMaxLag, fieldMerge, fieldConflicts, fieldUntagged, fieldDeletes}
	replicaFields  = []string{fieldEndpoint, fieldAddresses, fieldHostname, fieldLocation, fieldWeight, fieldRamp, fieldRouting, fieldProbe,
		fieldCanary, fieldCredentials, fieldCA, fieldClientCert, fieldPrefix, fieldRealms}
	ruleKinds = []string{"orders", "fences"}
	// defaults are the meanings of absent keys. A probe's default follows the endpoint's scheme.
	defaults = map[string]string{fieldAllDown: "nearest", fieldReplication: "enabled", fieldMerge: string(MergeAsk),
		fieldConflicts: string(ConflictsKeep), fieldUntagged: string(UntaggedKeep), fieldDeletes: string(DeletesPropagate),
		fieldWeight: "100", fieldRouting: "enabled"}
)

// key is a key below RegistriesPrefix, taken apart.
type key struct {
	registry string
	region   string // empty: of the registry itself
	field    string // one of the fields, or orders or fences
	match    Match  // of orders and fences
}

func registryPrefix(registry string) string { return RegistriesPrefix + registry + "/" }

// ReplicaPrefix is what the keys of a replica begin with, for Values and Change.
func ReplicaPrefix(registry, region string) string {
	return registryPrefix(registry) + "replicas/" + region + "/"
}

// String is the key in the store.
func (k key) String() string {
	switch {
	case k.region != "":
		return ReplicaPrefix(k.registry, k.region) + k.field
	case k.isRule():
		return registryPrefix(k.registry) + k.field + "/" + k.match.String()
	}
	return registryPrefix(k.registry) + k.field
}

func (k key) isRule() bool { return k.field == "orders" || k.field == "fences" }

// parseKey takes a key apart. It does not look at whether names are reserved.
func parseKey(s string) (key, error) {
	rest, ok := strings.CutPrefix(s, RegistriesPrefix)
	registry, rest, ok2 := strings.Cut(rest, "/")
	if !ok || !ok2 {
		return key{}, fmt.Errorf("is no key of a registry: %sNAME/home and so on", RegistriesPrefix)
	}
	if err := checkLabel(registry); err != nil {
		return key{}, fmt.Errorf("registry name %w", err)
	}
	k := key{registry: registry}
	for _, f := range registryFields {
		if rest == f {
			k.field = f
			return k, nil
		}
	}
	head, tail, _ := strings.Cut(rest, "/")
	switch head {
	case "replicas":
		region, f, ok := strings.Cut(tail, "/")
		if err := checkLabel(region); err != nil {
			return key{}, fmt.Errorf("region name %w", err)
		}
		if !ok {
			return key{}, fmt.Errorf("is no key of a replica: one of %s is to follow", strings.Join(replicaFields, ", "))
		}
		for _, known := range replicaFields {
			if f == known {
				k.region, k.field = region, f
				return k, nil
			}
		}
		return key{}, strict.Unknown(f, replicaFields)
	case "orders", "fences":
		kind, text, ok := strings.Cut(tail, "/")
		if !ok {
			return key{}, fmt.Errorf("is no key of a rule: %s/country/DE, %s/continent/EU, %s/asn/64500 or %s/prefix/203.0.113.0_24", head, head, head, head)
		}
		if kind == "prefix" {
			if strings.Contains(text, "/") {
				return key{}, fmt.Errorf("has a slash in its prefix: write %s/prefix/%s", head, strings.Replace(clip(text), "/", "_", 1))
			}
			text = strings.Replace(text, "_", "/", 1)
		}
		m, err := parseMatch(kind, text)
		if err != nil {
			return key{}, err
		}
		k.field, k.match = head, m
		return k, nil
	}
	return key{}, strict.Unknown(rest, append(slices.Clone(registryFields), "replicas", "orders", "fences"))
}

// namesRegions reports whether the value names regions of the registry.
func (k key) namesRegions() bool {
	return k.region == "" && slices.Contains([]string{fieldHome, "orders", "fences"}, k.field)
}

// check refuses a value that cannot stand at k.
func (k key) check(value string) error {
	if value == "" && k.field != fieldNames {
		return fmt.Errorf("is empty: give a value, or remove the key")
	}
	var err error
	switch k.field {
	case fieldHome:
		err = checkLabel(value)
	case fieldNames:
		_, err = parseNames(value)
	case fieldAllDown:
		_, err = parseAllDown(value)
	case fieldReplication, fieldRouting:
		_, err = parseRouting(value)
	case fieldMaxLag:
		_, err = parseMaxLag(value)
	case fieldMerge:
		err = oneOf(value, string(MergeAsk), string(MergeHome))
	case fieldConflicts:
		err = oneOf(value, string(ConflictsKeep), string(ConflictsLog))
	case fieldUntagged:
		err = oneOf(value, string(UntaggedKeep), string(UntaggedTagsOnly))
	case fieldDeletes:
		err = oneOf(value, string(DeletesPropagate), string(DeletesIgnore))
	case fieldEndpoint:
		_, err = parseEndpoint(value)
	case fieldAddresses:
		_, err = parseAddresses(value)
	case fieldHostname:
		_, err = parseHostname(value)
	case fieldLocation:
		_, err = parseLocation(value)
	case fieldWeight:
		_, err = parseWeight(value)
	case fieldRamp:
		_, err = parseRamp(value)
	case fieldProbe:
		_, err = parseProbe(value, "")
	case fieldCanary:
		_, err = parseCanary(value)
	case fieldCredentials:
		err = checkCredentials(value)
	case fieldCA, fieldClientCert:
		err = checkFile(value)
	case fieldPrefix:
		err = checkRepositoryPrefix(value)
	case fieldRealms:
		err = checkRealms(value)
	case "orders", "fences":
		_, err = ParseRegions(value)
	}
	return err
}

// shown is a value as it may appear in logs and errors: what may hold a secret is not repeated.
func (k key) shown(value string) string {
	switch k.field {
	case fieldCredentials:
		if checkCredentials(value) != nil && value != "" {
			return "(not shown)"
		}
	case fieldEndpoint:
		if strings.Contains(value, "@") {
			return "(not shown: it may hold a password)"
		}
	}
	return clip(value)
}
