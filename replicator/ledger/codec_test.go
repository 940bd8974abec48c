package ledger_test

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"portolan/replicator/ledger"
)

func digest(n int) string { return fmt.Sprintf("sha256:%064x", n) }

// A settled record must be small: one lies in the engine's memory for every tag.
func TestSettledRecordIsSmall(t *testing.T) {
	t.Parallel()
	settled := ledger.Record{Head: ledger.Version{
		Digest: digest(1), Sequence: 1 << 40, Origin: strings.Repeat("r", 63),
		Time: time.Unix(1_700_000_000, 123_456_789).UTC(), Seen: time.Unix(1_700_000_300, 123_456_789).UTC(),
	}}
	b, err := ledger.Encode(settled)
	if err != nil {
		t.Fatal(err)
	}
	if len(b) >= 300 {
		t.Errorf("a settled record takes %d bytes, want fewer than 300: %s", len(b), b)
	}
	// One that moved often carries its history as well.
	for n := range ledger.MaxHistory {
		settled.History = append(settled.History, ledger.Past{Digest: digest(n), Sequence: 1 << 40, Origin: "germanywestcentral", Latest: 1_700_000_000_123})
	}
	if b, err = ledger.Encode(settled); err != nil || len(b) >= 1600 {
		t.Errorf("with a full history: %d bytes, %v; want fewer than 1600", len(b), err)
	}
}

func TestDecodeSchemas(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		stored string
		ok     bool
		schema bool
	}{
		{fmt.Sprintf(`{"v":%d,"h":{"s":7,"o":"x","t":"2026-01-02T03:04:05Z"}}`, ledger.Schema), true, false},
		{fmt.Sprintf(`{"v":%d,"h":{"s":7,"o":"x","t":"2026-01-02T03:04:05Z"}}`, ledger.Schema-1), true, false},
		{fmt.Sprintf(`{"v":%d}`, ledger.Schema+1), false, true},
		{fmt.Sprintf(`{"v":%d,"h":[1,2]}`, ledger.Schema+9), false, true},
		{fmt.Sprintf(`{"v":%d}`, ledger.Schema-2), false, true},
		{`{"h":{}}`, false, false},
		{`{"v":"1"}`, false, false},
		{`{"v":1,"h":3}`, false, false},
		{`{"v":1`, false, false},
		{``, false, false},
	} {
		r, err := ledger.Decode([]byte(test.stored))
		if (err == nil) != test.ok || errors.Is(err, ledger.ErrSchema) != test.schema {
			t.Errorf("%s: %v", test.stored, err)
		}
		if test.ok && r.Head.Sequence != 7 {
			t.Errorf("%s: read as %+v", test.stored, r)
		}
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(`{"v":1,"h":{"d":"sha256:ab","s":7,"o":"x","t":"2026-01-02T03:04:05Z"},"a":{"i":3},"p":[{"s":1}]}`))
	f.Add([]byte(`{"v":2}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := ledger.Decode(b)
		if err != nil {
			return
		}
		again, err := ledger.Encode(r)
		if err != nil {
			return // too large, or a time that JSON cannot hold
		}
		back, err := ledger.Decode(again)
		if err != nil {
			t.Fatalf("%s does not decode: %v", again, err)
		}
		third, err := ledger.Encode(back)
		if err != nil || !reflect.DeepEqual(again, third) {
			t.Fatalf("%s became %s, %v", again, third, err)
		}
	})
}
