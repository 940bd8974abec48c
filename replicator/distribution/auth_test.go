package distribution

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// spy is a server that records the Authorization of its requests.
func spy(t *testing.T, h http.HandlerFunc) (*httptest.Server, func() []string) {
	t.Helper()
	var mu sync.Mutex
	var seen []string
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen = append(seen, r.Header.Get("Authorization"))
		mu.Unlock()
		h(w, r)
	}))
	t.Cleanup(s.Close)
	return s, func() []string { mu.Lock(); defer mu.Unlock(); return slices.Clone(seen) }
}

func secret(t *testing.T) string {
	t.Helper()
	path := t.TempDir() + "/secret"
	if err := os.WriteFile(path, []byte("robot:s3cret"), 0o600); err != nil {
		t.Fatal(err)
	}
	return "file:" + path
}

func TestCredentialsStayAtHome(t *testing.T) {
	t.Parallel()
	d := Descriptor{Digest: Digest([]byte("layer")), Size: 5}
	// Another port of the same address is another origin, too.
	storage, atStorage := spy(t, func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "layer") })
	var location atomic.Value
	location.Store("")
	home, atHome := spy(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Header.Get("Authorization") == "":
			w.Header().Set("WWW-Authenticate", `Basic realm="registry"`)
			w.WriteHeader(http.StatusUnauthorized)
		case r.Method == http.MethodPost:
			w.Header().Set("Location", location.Load().(string))
			w.WriteHeader(http.StatusAccepted)
		default:
			http.Redirect(w, r, storage.URL+"/somewhere?signature=1", http.StatusTemporaryRedirect)
		}
	})
	c := dial(t, home, func(o *Options) { o.Credentials = secret(t) })
	rc, err := c.OpenBlob(t.Context(), "a", d, 0)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(rc); err != nil || string(b) != "layer" {
		t.Fatalf("%q, %v", b, err)
	}
	rc.Close()
	if !slices.Contains(atHome(), "Basic cm9ib3Q6czNjcmV0") {
		t.Fatal("the endpoint was not given the credentials")
	}
	// An upload session on another host is used without them.
	other, atOther := spy(t, func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusCreated) })
	u, err := url.Parse(other.URL)
	if err != nil {
		t.Fatal(err)
	}
	location.Store("http://localhost:" + u.Port() + "/upload")
	up, err := c.StartUpload(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := net.LookupHost("localhost"); err == nil {
		if err := up.Commit(t.Context(), d.Digest, []byte("layer")); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range append(atStorage(), atOther()...) {
		if a != "" {
			t.Fatalf("credentials went abroad: %q", a)
		}
	}
}

func TestTokens(t *testing.T) {
	t.Parallel()
	var scopes []string
	var mu sync.Mutex
	tokens, atTokens := spy(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		scopes = append(scopes, r.URL.Query()["scope"]...)
		mu.Unlock()
		json.NewEncoder(w).Encode(map[string]any{"token": "tok-" + strings.Join(r.URL.Query()["scope"], "+"), "expires_in": 300})
	})
	home, _ := spy(t, func(w http.ResponseWriter, r *http.Request) {
		repo := strings.Split(r.URL.Path, "/")[2]
		if !strings.Contains(r.Header.Get("Authorization"), "repository:"+repo+":pull") {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry",scope="repository:%s:pull"`, tokens.URL, repo))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		body := `{"name":"x","tags":["1"]}`
		io.WriteString(w, body)
	})
	// The token server has another name than the endpoint.
	realm, err := url.Parse(tokens.URL)
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, home, func(o *Options) { o.Credentials = secret(t) })
	for range 3 {
		for _, repo := range []string{"one", "two"} {
			if _, err := collect(c.Tags(t.Context(), repo)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := len(atTokens()); n != 2 {
		t.Fatalf("%d tokens for two repositories", n)
	}
	mu.Lock()
	defer mu.Unlock()
	if !slices.Equal(scopes, []string{"repository:one:pull", "repository:two:pull"}) {
		t.Fatalf("scopes %v", scopes)
	}
	// Which realms are trusted.
	for _, tc := range []struct {
		endpoint, realm string
		realms          []string
		ok              bool
	}{
		{"https://r.example", "https://r.example/token", nil, true},
		{"https://r.example", "https://r.example:8443/token", nil, true},
		{"https://r.example", "http://r.example/token", nil, false},
		{"https://r.example", "https://auth.example/token", nil, false},
		{"https://r.example", "https://auth.example/token", []string{"auth.example"}, true},
		{"https://r.example", "https://auth.example:8443/token", []string{"auth.example:8443"}, true},
		{"https://r.example", "https://auth.example/token", []string{"auth.example:8443"}, false},
		{"https://r.example", "https://r.example@evil.example/token", nil, false},
		{"https://r.example", "https://r.example.evil.example/token", nil, false},
		{"https://r.example", "file:///etc/passwd", nil, false},
		{"http://r.example", realm.String(), nil, false},
	} {
		u, err := url.Parse(tc.endpoint)
		if err != nil {
			t.Fatal(err)
		}
		c, err := New(Options{Endpoint: u, Realms: tc.realms})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.auth.realm(tc.realm); (err == nil) != tc.ok {
			t.Errorf("%s sends to %s (%v): %v", tc.endpoint, tc.realm, tc.realms, err)
		}
	}
}

// A secret that has changed is found when the token server refuses the old one, not a minute later.
func TestTokenServerRefusesOldSecret(t *testing.T) {
	t.Parallel()
	var password atomic.Value
	password.Store("s3cret")
	var home *httptest.Server
	home = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, given, _ := r.BasicAuth()
		switch {
		case r.URL.Path == "/token" && given == password.Load():
			json.NewEncoder(w).Encode(map[string]any{"token": "for " + r.URL.Query().Get("scope")})
		case r.URL.Path == "/token":
			w.WriteHeader(http.StatusUnauthorized)
		case r.Header.Get("Authorization") != "Bearer for repository:"+strings.Split(r.URL.Path, "/")[2]+":pull":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, home.URL))
			w.WriteHeader(http.StatusUnauthorized)
		default:
			io.WriteString(w, `{"name":"x","tags":["1"]}`)
		}
	}))
	defer home.Close()
	file := secret(t)
	c := dial(t, home, func(o *Options) { o.Credentials = file })
	if _, err := collect(c.Tags(t.Context(), "one")); err != nil {
		t.Fatal(err)
	}
	password.Store("n3w")
	if _, err := collect(c.Tags(t.Context(), "two")); !errors.Is(err, ErrUnauthorized) {
		t.Fatalf("with the old secret: %v", err)
	}
	if err := os.WriteFile(strings.TrimPrefix(file, "file:"), []byte("robot:n3w"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := collect(c.Tags(t.Context(), "two")); err != nil {
		t.Fatalf("with the new secret: %v", err)
	}
}

// What a registry wants is asked of it again when its token server is no more: it may name another by now, or want no token.
func TestTokenServerMoves(t *testing.T) {
	t.Parallel()
	give := func(w http.ResponseWriter, r *http.Request) {
		json.NewEncoder(w).Encode(map[string]any{"token": "good"})
	}
	former, _ := spy(t, give)
	next, _ := spy(t, give)
	var challenge atomic.Value
	challenge.Store(fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, former.URL))
	home, _ := spy(t, func(w http.ResponseWriter, r *http.Request) {
		if ch := challenge.Load().(string); ch != "" && r.Header.Get("Authorization") != "Bearer good" {
			w.Header().Set("WWW-Authenticate", ch)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		io.WriteString(w, `{"name":"x","tags":["1"]}`)
	})
	c := dial(t, home)
	if _, err := collect(c.Tags(t.Context(), "one")); err != nil {
		t.Fatal(err)
	}
	former.Close()
	if _, err := collect(c.Tags(t.Context(), "two")); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("with a token server that is away: %v", err)
	}
	for _, to := range []string{fmt.Sprintf(`Bearer realm="%s/token",service="registry"`, next.URL), ""} {
		challenge.Store(to)
		err := errors.New("")
		for n := 0; err != nil && n < 3; n++ {
			_, err = collect(c.Tags(t.Context(), "three"))
		}
		if err != nil {
			t.Errorf("when it says %q: %v", to, err)
		}
		next.Close()
		c.auth.tokens = map[string]token{} // they end in time
	}
}

func TestErrorsHoldNoSecrets(t *testing.T) {
	t.Parallel()
	home, _ := spy(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="https://elsewhere.example/token?key=abc"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	c := dial(t, home, func(o *Options) { o.Credentials = secret(t) })
	_, err := c.Head(t.Context(), "a", "b")
	if !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), "elsewhere.example") {
		t.Fatalf("got %v", err)
	}
	for _, s := range []string{"s3cret", "key=abc", "cm9ib3Q6"} {
		if strings.Contains(err.Error(), s) {
			t.Fatalf("the error tells %q: %v", s, err)
		}
	}
	u, _ := url.Parse("https://r.example")
	if _, err := New(Options{Endpoint: u, Credentials: "robot:s3cret"}); err == nil || strings.Contains(err.Error(), "s3cret") {
		t.Fatalf("a secret in place of a reference: %v", err)
	}
	for _, bad := range []string{"ftp://x", "https://", "https://u:p@x", "https://x/path", "https://x?q=1", "x"} {
		u, err := url.Parse(bad)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(Options{Endpoint: u}); err == nil || strings.Contains(err.Error(), "u:p@") {
			t.Errorf("endpoint %q: %v", bad, err)
		}
	}
}

func TestStall(t *testing.T) {
	t.Parallel()
	stop := make(chan struct{})
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, "some")
			w.(http.Flusher).Flush()
		}
		<-stop
	}))
	defer s.Close()
	defer close(stop)
	c := dial(t, s, func(o *Options) { o.Limits = Limits{Header: 50 * time.Millisecond} })
	if _, err := c.Head(t.Context(), "a", "b"); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("no answer: %v", err)
	}
	// Long enough for what was sent to be read on a busy machine.
	c = dial(t, s, func(o *Options) { o.Limits = Limits{Stall: time.Second} })
	rc, err := c.OpenBlob(t.Context(), "a", Descriptor{Digest: Digest(nil), Size: 1000}, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	if b, err := io.ReadAll(rc); string(b) != "some" || !errors.Is(err, ErrUnavailable) {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestPages(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		pages map[string]string // last -> entries
		link  string
		want  []string
		bad   bool
	}{
		"relative":         {map[string]string{"": "a,b", "b": "c"}, `</v2/r/tags/list?last=b&n=2>; rel="next"`, []string{"a", "b", "c"}, false},
		"query alone":      {map[string]string{"": "a,b", "b": "c"}, `<?last=b&n=2>; rel=next`, []string{"a", "b", "c"}, false},
		"last component":   {map[string]string{"": "a,b", "b": "c"}, `<list?last=b&n=2>; rel=next`, []string{"a", "b", "c"}, false},
		"without v2":       {map[string]string{"": "a,b", "b": "c"}, `</r/tags/list?last=b&n=2>; rel=next`, []string{"a", "b", "c"}, false},
		"ever new cursors": {map[string]string{"": "a,b", "b": "a,b"}, "", nil, true},
		"circle":           {map[string]string{"": "a,b", "b": "a,b"}, `</v2/r/tags/list?last=b&n=2>; rel="next"`, nil, true},
		"foreign":          {map[string]string{"": "a,b"}, `<http://evil.example/v2/r/tags/list?last=b>; rel="next"`, nil, true},
		"other listing":    {map[string]string{"": "a,b"}, `</v2/x/tags/list?last=b>; rel="next"`, nil, true},
		"cut at n":         {map[string]string{"": "a,b", "b": "c"}, "", []string{"a", "b", "c"}, false},
		"no last":          {map[string]string{"": "a,b", "b": "a,b"}, "", []string{"a", "b"}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var served atomic.Int32
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				last := r.URL.Query().Get("last")
				if n := served.Add(1); name == "ever new cursors" {
					if n > 10 {
						t.Error("the listing goes on for ever")
					} else {
						w.Header().Set("Link", fmt.Sprintf(`</v2/r/tags/list?last=b&n=2&cursor=%d>; rel="next"`, n))
					}
				}
				if tc.link != "" && (last == "" || name == "circle") {
					w.Header().Set("Link", tc.link)
				}
				json.NewEncoder(w).Encode(map[string]any{"tags": strings.Split(tc.pages[last], ",")})
			}))
			defer s.Close()
			got, err := collect(dial(t, s, func(o *Options) { o.Limits.Page = 2 }).Tags(t.Context(), "r"))
			if (err != nil) != tc.bad || !tc.bad && !slices.Equal(got, tc.want) {
				t.Fatalf("%v, %v", got, err)
			}
		})
	}
}

// A reader that takes its time is no standstill of the wire; a wire that gives nothing to a reader is.
func TestStallIsOfTheWire(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancelCause(t.Context())
		w := newWatchdog(time.Minute, cancel)
		w.pause()
		wire, far := io.Pipe()
		defer far.Close()
		b := &receivedBody{ReadCloser: wire, watch: w, stall: time.Minute, ctx: ctx}
		defer b.Close()
		go func() {
			for range 2 {
				far.Write([]byte("x"))
			}
			<-ctx.Done()
			far.CloseWithError(ctx.Err())
		}()
		var one [1]byte
		for range 2 {
			time.Sleep(time.Hour)
			if n, err := b.Read(one[:]); n != 1 || err != nil {
				t.Fatalf("after an hour: %d, %v", n, err)
			}
		}
		start := time.Now()
		if _, err := b.Read(one[:]); !errors.Is(err, errStalled) || time.Since(start) != time.Minute {
			t.Fatalf("%v after %v, want a standstill after a minute", err, time.Since(start))
		}
	})
}

func TestParseChallenges(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]challenge{
		`Bearer realm="https://a/b",service="s",scope="repository:a/b:pull,push"`: {"bearer", map[string]string{"realm": "https://a/b", "service": "s", "scope": "repository:a/b:pull,push"}},
		`Basic realm="a \"b\", c"`:                                 {"basic", map[string]string{"realm": `a "b", c`}},
		`Negotiate, Basic realm=x`:                                 {"basic", map[string]string{"realm": "x"}},
		`Basic realm="x", Bearer realm="https://a", service = "s"`: {"bearer", map[string]string{"realm": "https://a", "service": "s"}},
	} {
		if got, found := pickChallenge([]string{in}); !found || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v", in, got)
		}
	}
	for _, in := range []string{"", "Negotiate", "Bearer", `Bearer service="x"`, `realm="x"`} {
		if got, found := pickChallenge([]string{in}); found {
			t.Errorf("%s: %+v", in, got)
		}
	}
}

func FuzzChallenges(f *testing.F) {
	f.Add(`Bearer realm="https://a/b",service="s",scope="x"`)
	f.Add(`Basic realm="a \"b", Negotiate`)
	f.Fuzz(func(t *testing.T, s string) {
		for _, ch := range parseChallenges(s) {
			if ch.scheme == "" || ch.scheme != strings.ToLower(ch.scheme) {
				t.Fatalf("%q: %+v", s, ch)
			}
		}
	})
}

func FuzzLink(f *testing.F) {
	f.Add(`</v2/_catalog?last=b&n=2>; rel="next"`)
	f.Add(`<a>; rel=prev; x="a,b", <b>; rel="first next"`)
	u, _ := url.Parse("https://r.example")
	c, err := New(Options{Endpoint: u})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if target := parseNext([]string{s}); target != "" && !strings.Contains(s, "<"+target+">") {
			t.Fatalf("%q gave %q", s, target)
		}
		c.nextPage("/v2/_catalog", []string{s})
	})
}

func FuzzManifest(f *testing.F) {
	f.Add(imageType, []byte(`{"schemaVersion":2,"config":{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2},"layers":[]}`))
	f.Add(indexType, []byte(`{"manifests":[{"digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}`))
	f.Add("", []byte(`{"schemaVersion":1,"fsLayers":[]}`))
	f.Fuzz(func(t *testing.T, media string, body []byte) {
		m, err := ParseManifest(media, body)
		if err != nil {
			if !errors.Is(err, ErrInvalid) {
				t.Fatal(err)
			}
			return
		}
		if m.Kind == 0 || m.MediaType == "" {
			t.Fatalf("%+v", m)
		}
		for _, d := range append(m.Blobs, m.Children...) {
			if _, err := NewHash(d.Digest); err != nil || d.Size < 0 {
				t.Fatalf("%+v", d)
			}
		}
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add("bytes 0-1/2", "0-5", "120", "portolan/1 (write a)")
	f.Fuzz(func(t *testing.T, contentRange, uploadRange, retry, agent string) {
		if first, last, total, ok := parseContentRange(contentRange); ok && (first < 0 || last < first || total >= 0 && last >= total) {
			t.Fatal(contentRange)
		}
		if last, ok := parseUploadRange(uploadRange); ok && last < -1 {
			t.Fatal(uploadRange)
		}
		if d := parseRetryAfter(retry, time.Unix(0, 0)); d < 0 || d > maxRetryAfter {
			t.Fatal(retry)
		}
		if id := WriteID(agent); id != "" && WriteID(userAgent("portolan/x", id)) != id {
			t.Fatal(agent)
		}
	})
}
