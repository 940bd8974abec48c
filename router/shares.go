package router

import (
	"cmp"
	"slices"
)

// Split tells what becomes of the clients that a region is the nearest to.
type Split struct {
	// Nearest is the region that is nearest to these clients.
	Nearest string `json:"nearest"`
	// Shares are the regions that they are sent to, the largest share first; empty if they are sent nowhere.
	Shares []Share `json:"shares"`
}

// Share is the part of some clients' cells that a region gets.
type Share struct {
	Region string `json:"region"`
	// Percent is 0 to 100, of all cells, a subnet's counted like a city's resolver.
	Percent float64 `json:"percent"`
}

// Shares tells for each region, by name, what becomes of the clients nearest to it under the current weights and health,
// also for regions that are no candidates themselves: draining one is seen in its line.
//
// It is computed, not sampled: the lots of a cell at different replicas are independent, so a replica gets the product
// of what all before it leave and its own weight, and the fallback gets the rest. Two things make real shares differ.
// The order behind the first choice is that of a client who stands in the region itself; and of the finite number of
// cells that really ask, some ask more. Clients whom an order, a fence or a latency names are not considered.
func (r *Registry) Shares() []Split {
	splits := make([]Split, 0, len(r.replicas))
	for n, i := range r.harbours {
		if i >= 0 {
			order := order(nil, r.chart.regions, r.chart.rules, choice{}, &r.chart.regions[n].at, nil, -1)
			splits = append(splits, Split{Nearest: r.replicas[i].region, Shares: r.split(order)})
		}
	}
	return splits
}

// split divides all cells among the candidates of order.
func (r *Registry) split(order []uint16) []Share {
	v := r.verdict(order)
	percent := make([]float64, len(r.replicas))
	rest := 1.0
	for _, s := range v.steps {
		percent[s.replica] += rest * float64(s.weight)
		rest -= rest * float64(s.weight) / 100
	}
	if v.end.Replica >= 0 {
		percent[v.end.Replica] += rest * 100
	}
	shares := []Share{}
	for i, p := range percent {
		if p > 0 {
			shares = append(shares, Share{r.replicas[i].region, p})
		}
	}
	slices.SortFunc(shares, func(a, b Share) int {
		return cmp.Or(cmp.Compare(b.Percent, a.Percent), cmp.Compare(a.Region, b.Region))
	})
	return shares
}
