package replication

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// BenchmarkPushToPullable measures the time from a push acknowledged in one region to the tag being there in two others: small
// images, 20 pushes a second, real registries with real events. The metrics are milliseconds over both regions.
func BenchmarkPushToPullable(b *testing.B) {
	w := newWorld(b, site{region: "westus", config: v3}, site{region: "northeurope", config: v3}, site{region: "eastasia", config: v3})
	w.declare("eastasia", "northeurope", "westus")
	w.start()
	w.ready("westus", "northeurope", "eastasia")
	base, err := random.Image(4096, 2)
	if err != nil {
		b.Fatal(err)
	}
	w.put("westus", "app:base", base)
	w.arrives("app:base", digestOf(b, base), "northeurope", "eastasia")
	var lags []time.Duration
	type arrival struct {
		lag time.Duration
		err error
	}
	arrivals := make(chan arrival)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	pushes := 0
	for b.Loop() {
		<-tick.C
		img, err := random.Image(4096, 1)
		if err != nil {
			b.Fatal(err)
		}
		tag := fmt.Sprintf("app:%d", pushes)
		w.put("westus", tag, img)
		pushed, digest := time.Now(), digestOf(b, img)
		pushes++
		for _, region := range []string{"northeurope", "eastasia"} {
			ref := w.ref(region, tag)
			go func() {
				for {
					d, err := remote.Head(ref)
					switch {
					case err == nil && d.Digest.String() == digest:
						arrivals <- arrival{lag: time.Since(pushed)}
						return
					case time.Since(pushed) > patience:
						arrivals <- arrival{err: fmt.Errorf("%s never came to %s: %w", tag, region, err)}
						return
					}
					time.Sleep(5 * time.Millisecond)
				}
			}()
		}
	collect:
		for {
			select {
			case a := <-arrivals:
				if a.err != nil {
					b.Fatal(a.err)
				}
				lags = append(lags, a.lag)
			default:
				break collect
			}
		}
	}
	for len(lags) < 2*pushes {
		a := <-arrivals
		if a.err != nil {
			b.Fatal(a.err)
		}
		lags = append(lags, a.lag)
	}
	slices.Sort(lags)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(lags[min(len(lags)*p/100, len(lags)-1)].Microseconds())/1000, fmt.Sprintf("p%d-ms", p))
	}
}
