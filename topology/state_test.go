package topology

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"
)

func TestParseState(t *testing.T) {
	t.Parallel()
	s := open(t)
	value, _ := json.Marshal(Replication{Status: Ready, Seeded: true, Incarnation: "x"})
	request, _ := json.Marshal(Request{Time: time.Unix(5, 0).UTC(), Force: true})
	put(t, s, Values{
		ReplicationKey("contoso", "westus"):                   string(value),
		ReplicationKey("contoso", "eastus"):                   "{",
		RequestKey("contoso", "westus", RequestResync):        string(request),
		RequestKey("contoso", "westus", RequestDelete):        string(request),
		RequestKey("contoso", "eastus", RequestDelete):        "force",
		LeaseKey("contoso", "westus"):                         "holder",
		ReplicaStatesPrefix + "contoso/replicas/westus/other": "",
	})
	tree, err := s.List(t.Context(), ReplicaStatesPrefix)
	if err != nil {
		t.Fatal(err)
	}
	if _, watched := tree.Get(LeaseKey("contoso", "westus")); watched {
		t.Error("every renewal of a lease wakes who follows the replicas' state")
	}
	got := ParseState(tree)
	westus := ReplicaName{"contoso", "westus"}
	if len(got.Replications) != 1 || !got.Replications[westus].Seeded || len(got.Problems) != 2 ||
		!reflect.DeepEqual(got.Requests, map[ReplicaName][]string{westus: {RequestDelete, RequestResync}}) {
		t.Errorf("%+v", got)
	}
}
