package topology

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"portolan/strict"
)

// This file reads single values. An error says what is wrong and what would be right, in a form that reads on after the
// key; it never repeats what may be a secret.

// checkLabel refuses what is not one lower-case LDH label (RFC 1123 section 2.1: letters, digits, hyphen, at most 63).
func checkLabel(s string) error {
	switch {
	case s == "":
		return errors.New("is empty: a name is needed")
	case len(s) > 63:
		return fmt.Errorf("%q is %d letters long: at most 63", clip(s), len(s))
	case s != strings.ToLower(s):
		return fmt.Errorf("%q has upper-case letters%s", clip(s), suggestLabel(s))
	case s[0] == '-' || s[len(s)-1] == '-':
		return fmt.Errorf("%q begins or ends with a hyphen", s)
	}
	for i := range len(s) {
		if c := s[i]; !('a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '-') {
			return fmt.Errorf("%q has a character that a name cannot have: only a-z, 0-9 and hyphens%s", s, suggestLabel(s))
		}
	}
	return nil
}

// suggestLabel says what to write in the place of s, if there is a label near to it.
func suggestLabel(s string) string {
	label := strings.Trim(strings.Map(func(c rune) rune {
		if 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
			return c
		}
		return '-'
	}, strings.ToLower(s)), "-")
	if label == "" {
		return ""
	}
	return fmt.Sprintf(": write %q", label)
}

// parseName reads a fully qualified host name and returns it without its final dot.
func parseName(s string) (string, error) {
	name := strings.TrimSuffix(s, ".")
	if _, err := netip.ParseAddr(name); err == nil {
		return "", fmt.Errorf("%q is an address: a host name is needed", s)
	}
	labels := strings.Split(name, ".")
	if len(labels) < 2 {
		return "", fmt.Errorf("%q is not a full host name such as registry.example.com", clip(s))
	}
	if len(name) > 253 {
		return "", fmt.Errorf("%q is %d letters long: at most 253", clip(s), len(name))
	}
	for _, l := range labels {
		if err := checkLabel(l); err != nil {
			return "", fmt.Errorf("%q: label %w", clip(s), err)
		}
	}
	// RFC 3696 section 2: a top-level domain is not all digits; it would be taken for an address.
	if last := labels[len(labels)-1]; strings.Trim(last, "0123456789") == "" {
		return "", fmt.Errorf("%q ends in a number: a host name is needed", clip(s))
	}
	return name, nil
}

// splitList splits a comma-separated list; the empty string is the empty list.
func splitList(s string) []string {
	if strings.TrimSpace(s) == "" {
		return nil
	}
	parts := strings.Split(s, ",")
	for i := range parts {
		parts[i] = strings.TrimSpace(parts[i])
	}
	return parts
}

func joinList(parts []string) string { return strings.Join(parts, ",") }

func parseNames(s string) ([]string, error) {
	var names []string
	for _, part := range splitList(s) {
		name, err := parseName(part)
		if err != nil {
			return nil, err
		}
		if slices.Contains(names, name) {
			return nil, fmt.Errorf("%q stands there twice", name)
		}
		names = append(names, name)
	}
	return names, nil
}

// ParseRegions reads a comma-separated list of regions, as orders have it.
func ParseRegions(s string) ([]string, error) {
	parts := splitList(s)
	if len(parts) == 0 {
		return nil, errors.New("names no region: a comma-separated list is needed")
	}
	for i, part := range parts {
		if err := checkLabel(part); err != nil {
			return nil, fmt.Errorf("region %w", err)
		}
		if slices.Contains(parts[:i], part) {
			return nil, fmt.Errorf("region %q stands there twice", part)
		}
	}
	return parts, nil
}

// parseEndpoint reads the base URL of a registry's API.
func parseEndpoint(s string) (*url.URL, error) {
	const form = "an endpoint is scheme and host, such as https://registry.westus.example.net:5000"
	if s != "" && !strings.ContainsAny(s, "/@") { // with an @ there may be a password in it
		return nil, fmt.Errorf("%[1]q has neither http:// nor https:// before it: write http://%[1]s or https://%[1]s", clip(s))
	}
	u, err := url.Parse(s)
	if err != nil {
		return nil, errors.New("is not a URL: " + form) // the library's error repeats the text, and so a password in it
	}
	switch {
	case u.User != nil:
		return nil, errors.New("holds a user or password: put a reference to them into credentials instead")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("has neither http:// nor https:// before it: %s", form)
	case u.Opaque != "" || u.Host == "":
		return nil, errors.New("has no host: " + form)
	case u.RawQuery != "" || u.ForceQuery:
		return nil, errors.New("has a query: " + form)
	case u.Fragment != "" || strings.Contains(s, "#"):
		return nil, errors.New("has a fragment: " + form)
	case u.Path != "" && u.Path != "/":
		return nil, fmt.Errorf("has a path (%s): %s; a common beginning of repository names belongs into prefix", clip(u.Path), form)
	}
	host := strings.ToLower(u.Hostname())
	if addr, err := netip.ParseAddr(host); err == nil {
		if addr.Zone() != "" {
			return nil, errors.New("has an IPv6 zone, which means something on one machine only")
		}
		if addr = addr.Unmap(); addr.IsUnspecified() || addr.IsMulticast() {
			return nil, fmt.Errorf("has the address %s, which no registry can be reached at", addr)
		}
		host = addr.String()
	} else if err := checkHost(host); err != nil {
		return nil, fmt.Errorf("has a bad host: %w", err)
	}
	port := u.Port()
	if port == "" && strings.HasSuffix(u.Host, ":") {
		return nil, errors.New("has a colon without a port")
	}
	if port != "" {
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return nil, fmt.Errorf("has port %s: a port is 1 to 65535", clip(port))
		}
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if port != "" {
		host += ":" + port
	}
	return &url.URL{Scheme: u.Scheme, Host: host}, nil
}

// checkHost is for names that only Portolan itself resolves: single labels and underscores do occur in private networks.
func checkHost(s string) error {
	if len(s) > 253 {
		return fmt.Errorf("%q is too long", clip(s))
	}
	for label := range strings.SplitSeq(strings.TrimSuffix(s, "."), ".") {
		if err := checkLabel(strings.ReplaceAll(label, "_", "x")); err != nil {
			return fmt.Errorf("label %w", err)
		}
	}
	return nil
}

// hostPort is what makes two endpoints the same server.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	return net.JoinHostPort(strings.TrimSuffix(u.Hostname(), "."), port) // with its final dot a name is the same
}

func parseAddresses(s string) ([]netip.Addr, error) {
	parts := splitList(s)
	if len(parts) == 0 {
		return nil, errors.New("is empty: a comma-separated list of IP addresses is needed")
	}
	var addrs []netip.Addr
	for _, part := range parts {
		addr, err := netip.ParseAddr(part)
		if err != nil {
			return nil, fmt.Errorf("%q is not an IP address", clip(part))
		}
		if addr.Zone() != "" {
			return nil, fmt.Errorf("%s has a zone, which DNS cannot carry", clip(part))
		}
		addr = addr.Unmap() // RFC 4291 section 2.5.5.2: the same IPv4 node
		if addr.IsUnspecified() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
			return nil, fmt.Errorf("%s is no address that a client can connect to", part)
		}
		if slices.Contains(addrs, addr) {
			return nil, fmt.Errorf("%s stands there twice", addr)
		}
		addrs = append(addrs, addr)
	}
	return addrs, nil
}

func parseHostname(s string) (string, error) {
	name, err := parseName(s)
	if err != nil {
		return "", err
	}
	return name + ".", nil
}

func parseLocation(s string) (Coordinates, error) {
	const form = "a location is latitude,longitude in decimal degrees, such as 52.37,4.90"
	parts := splitList(s)
	if len(parts) != 2 {
		return Coordinates{}, fmt.Errorf("%q: %s", clip(s), form)
	}
	var c Coordinates
	for i, part := range parts {
		v, err := strconv.ParseFloat(part, 64)
		if err != nil || strings.Trim(part, "+-.0123456789") != "" { // no NaN, Inf, hexadecimal or exponents
			return Coordinates{}, fmt.Errorf("%q is not a number: %s", clip(part), form)
		}
		limit := 90.0
		if i == 1 {
			limit = 180
		}
		if v < -limit || v > limit {
			return Coordinates{}, fmt.Errorf("%s is outside of -%g to %g: %s", clip(part), limit, limit, form)
		}
		v += 0 // -0 and 0 are one place
		if i == 0 {
			c.Latitude = v
		} else {
			c.Longitude = v
		}
	}
	return c, nil
}

func parseWeight(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || strconv.Itoa(n) != s || n < 0 || n > 100 {
		return 0, fmt.Errorf("%q is not a weight: a whole number from 0 to 100", clip(s))
	}
	return n, nil
}

func parseRouting(s string) (bool, error) {
	if err := oneOf(s, "enabled", "disabled"); err != nil {
		return false, err
	}
	return s == "enabled", nil
}

// oneOf refuses what is not among words.
func oneOf(s string, words ...string) error {
	if slices.Contains(words, s) {
		return nil
	}
	return strict.Unknown(s, words)
}

func parseAllDown(s string) (AllDown, error) {
	if target, ok := strings.CutPrefix(s, "cname:"); ok {
		name, err := parseHostname(target)
		if err != nil {
			return AllDown{}, err
		}
		return AllDown{Mode: AllDownCNAME, Target: name}, nil
	}
	switch s {
	case "nearest":
		return AllDown{Mode: AllDownNearest}, nil
	case "none":
		return AllDown{Mode: AllDownNone}, nil
	}
	return AllDown{}, strict.Unknown(s, []string{"nearest", "none", "cname:HOSTNAME"})
}

// parseMaxLag reads a duration; the empty string is none, zero.
func parseMaxLag(s string) (time.Duration, error) {
	if s == "" {
		return 0, nil
	}
	const least, most = 10 * time.Second, 7 * 24 * time.Hour
	d, err := time.ParseDuration(s)
	if err != nil || d < least || d > most {
		return 0, fmt.Errorf("%q is not how far a replica may be behind: want a duration of 10s to 168h, such as 10m", clip(s))
	}
	return d, nil
}

// parseProbe reads a probe; the empty string is the default for an endpoint of that scheme.
func parseProbe(s, scheme string) (Probe, error) {
	switch s {
	case "":
		if scheme == "http" {
			return Probe{Mode: ProbeHTTP}, nil
		}
		return Probe{Mode: ProbeHTTPS}, nil
	case "https":
		return Probe{Mode: ProbeHTTPS}, nil
	case "http":
		return Probe{Mode: ProbeHTTP}, nil
	case "tcp":
		return Probe{Mode: ProbeTCP}, nil
	case "none":
		return Probe{Mode: ProbeNone}, nil
	}
	if service, ok := strings.CutPrefix(s, "consul:"); ok {
		if service == "" || strings.ContainsAny(service, " \t/\"\\") || len(service) > 128 || !printable(service) {
			return Probe{}, fmt.Errorf("%q names no Consul service: consul:SERVICE", clip(s))
		}
		return Probe{Mode: ProbeConsul, Service: service}, nil
	}
	return Probe{}, strict.Unknown(s, []string{"https", "http", "tcp", "consul:SERVICE", "none"})
}

// tag is the grammar of tags in the OCI distribution specification (section "Pulling manifests").
var tag = regexp.MustCompile(`^[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}$`)

// parseCanary reads repository:tag; the empty string is none.
func parseCanary(s string) (Canary, error) {
	if s == "" {
		return Canary{}, nil
	}
	i := strings.LastIndexByte(s, ':')
	if i < 0 || strings.Contains(s, "@") {
		return Canary{}, fmt.Errorf("%q is not an image of the replica: want REPOSITORY:TAG, such as team/canary:1", clip(s))
	}
	c := Canary{Repository: s[:i], Tag: s[i+1:]}
	if err := checkRepositoryPrefix(c.Repository); err != nil {
		return Canary{}, fmt.Errorf("%q is not an image of the replica: its repository %w", clip(s), err)
	}
	if !tag.MatchString(c.Tag) {
		return Canary{}, fmt.Errorf("%q is not an image of the replica: %q is no tag: up to 128 letters, digits, dots, hyphens and underscores, the first no dot or hyphen", clip(s), clip(c.Tag))
	}
	return c, nil
}

// checkCredentials refuses what is not a reference, without repeating it: it may be the secret itself.
func checkCredentials(s string) error {
	if s == "docker-config" {
		return nil
	}
	for _, kind := range []string{"env:", "file:", "helper:"} {
		if rest, ok := strings.CutPrefix(s, kind); ok {
			if rest == "" || !printable(rest) || kind != "file:" && strings.ContainsAny(rest, "/ =:") {
				return fmt.Errorf("names nothing usable after %s", kind)
			}
			return nil
		}
	}
	return errors.New("is no reference: docker-config, env:NAME, file:PATH or helper:NAME; a secret itself does not belong here")
}

func checkFile(s string) error {
	if rest, ok := strings.CutPrefix(s, "file:"); !ok || rest == "" || !printable(rest) {
		return errors.New("is no reference to a file: file:PATH")
	}
	return nil
}

// checkRealms reads the hosts of token servers: host or host:port, comma-separated.
func checkRealms(s string) error {
	for _, realm := range splitList(s) {
		u, err := url.Parse("https://" + realm)
		if err != nil || u.Host != realm || u.Hostname() == "" || strings.ContainsAny(realm, " @") {
			return fmt.Errorf("%q is not the host of a token server: want host or host:port, comma-separated, such as auth.contoso.com", clip(realm))
		}
	}
	return nil
}

// checkRepositoryPrefix holds s to the grammar of repository names in the OCI distribution specification (section "Pulling
// manifests").
func checkRepositoryPrefix(s string) error {
	const form = "path components of a-z and 0-9, joined by . _ __ or hyphens, with / between them"
	if len(s) > 200 {
		return fmt.Errorf("%q is too long", clip(s))
	}
	for part := range strings.SplitSeq(s, "/") {
		if !repositoryComponent(part) {
			return fmt.Errorf("%q is not the beginning of a repository name: %s", clip(s), form)
		}
	}
	return nil
}

func repositoryComponent(s string) bool {
	alnum := func(c byte) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }
	if s == "" || !alnum(s[0]) || !alnum(s[len(s)-1]) {
		return false
	}
	for i := 0; i < len(s); {
		if alnum(s[i]) {
			i++
			continue
		}
		j := i
		for j < len(s) && !alnum(s[j]) {
			j++
		}
		if sep := s[i:j]; sep != "." && sep != "_" && sep != "__" && strings.Trim(sep, "-") != "" {
			return false
		}
		i = j
	}
	return true
}

func printable(s string) bool {
	for _, r := range s {
		if r < ' ' || r == 0x7f || r == '\uFFFD' {
			return false
		}
	}
	return true
}

// clip keeps what is echoed in errors short.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}

// countries are the officially assigned ISO 3166-1 alpha-2 codes, and XK, which the location databases use for Kosovo.
const countries = "AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BV BW BY BZ " +
	"CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR " +
	"GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP " +
	"KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR MS MT MU MV MW MX MY MZ " +
	"NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PN PR PS PT PW PY QA RE RO RS RU RW " +
	"SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ " +
	"UA UG UM US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW"

// parseMatch reads who a rule is for; in text a prefix has its slash, as in YAML.
func parseMatch(kind, text string) (Match, error) {
	switch kind {
	case "prefix":
		p, err := netip.ParsePrefix(text)
		if err != nil {
			return Match{}, fmt.Errorf("%q is not a prefix such as 203.0.113.0/24", clip(text))
		}
		if p.Addr().Is4In6() {
			return Match{}, fmt.Errorf("%q is a v4-mapped prefix: write it as IPv4", text)
		}
		if p != p.Masked() {
			return Match{}, fmt.Errorf("%q has bits beyond its length: write %s", text, p.Masked())
		}
		for _, embedding := range []netip.Prefix{netip.MustParsePrefix("2002::/16"), netip.MustParsePrefix("64:ff9b::/96")} {
			if embedding.Overlaps(p) && p.Bits() >= embedding.Bits() {
				return Match{}, fmt.Errorf("%q holds addresses that embed IPv4 ones (6to4, NAT64), by which their clients are known: write the IPv4 prefix", text)
			}
		}
		if p.String() != text {
			return Match{}, fmt.Errorf("%q has another usual form: write %s", text, p)
		}
		return Match{Prefix: p}, nil
	case "asn":
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil || n == 0 || strconv.FormatUint(n, 10) != text {
			return Match{}, fmt.Errorf("%q is not the number of an autonomous system, such as 64500", clip(text))
		}
		return Match{ASN: uint32(n)}, nil
	case "country":
		if len(text) == 2 && !strings.Contains(text, " ") && strings.Contains(" "+countries+" ", " "+text+" ") {
			return Match{Country: text}, nil
		}
		hint := ""
		if up := strings.ToUpper(text); up != text && len(up) == 2 && strings.Contains(" "+countries+" ", " "+up+" ") {
			hint = "; write " + up
		} else if up == "UK" {
			hint = "; the United Kingdom is GB"
		} else if up == "EU" {
			hint = "; EU is a continent here"
		}
		return Match{}, fmt.Errorf("%q is not a country's ISO 3166-1 code, two upper-case letters such as DE%s", clip(text), hint)
	case "continent":
		if err := oneOf(text, "AF", "AN", "AS", "EU", "NA", "OC", "SA"); err != nil {
			return Match{}, fmt.Errorf("continent %w", err)
		}
		return Match{Continent: text}, nil
	}
	return Match{}, oneOf(kind, matchKinds...)
}

var matchKinds = []string{"prefix", "asn", "country", "continent"}

// kind and text are the two halves that parseMatch reads.
func (m Match) kind() string {
	switch {
	case m.Prefix.IsValid():
		return "prefix"
	case m.ASN != 0:
		return "asn"
	case m.Country != "":
		return "country"
	}
	return "continent"
}

func (m Match) text() string {
	switch m.kind() {
	case "prefix":
		return m.Prefix.String()
	case "asn":
		return strconv.FormatUint(uint64(m.ASN), 10)
	case "country":
		return m.Country
	}
	return m.Continent
}

// String is the match as it stands in a key: country/DE, prefix/203.0.113.0_24.
func (m Match) String() string { return m.kind() + "/" + strings.Replace(m.text(), "/", "_", 1) }

// Inside reports whether a rule for m counts before one for o, and clients may be in both: prefixes lie in wider ones, and whatever is more
// precise may lie in what is less. Everything lies in the zero Match.
func (m Match) Inside(o Match) bool {
	switch {
	case m == o || m == Match{}:
		return false
	case o == Match{}:
		return true
	case m.kind() == o.kind():
		return m.Prefix.IsValid() && o.Prefix.Bits() < m.Prefix.Bits() && o.Prefix.Contains(m.Prefix.Addr())
	}
	return m.compare(o) < 0
}

// compare sorts by precedence: prefixes (longest first), numbers of autonomous systems, countries, continents.
func (m Match) compare(o Match) int {
	if a, b := slices.Index(matchKinds, m.kind()), slices.Index(matchKinds, o.kind()); a != b {
		return a - b
	}
	if m.Prefix.IsValid() {
		if d := o.Prefix.Bits() - m.Prefix.Bits(); d != 0 {
			return d
		}
		return m.Prefix.Addr().Compare(o.Prefix.Addr())
	}
	if m.ASN != o.ASN {
		if m.ASN < o.ASN {
			return -1
		}
		return 1
	}
	return strings.Compare(m.Country+m.Continent, o.Country+o.Continent)
}
