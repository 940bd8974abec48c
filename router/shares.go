package router

import (
	"cmp"
	"math"
	"slices"

	"portolan/topology"
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
	// Percent is 0 to 100, of all cells, a subnet's counted like a city's resolver; as Percentages gives it.
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

// Stranded tells which clients get no address under the current weights and health: the matches of the fences that they are behind, the
// zero Match for those behind none. Where clients are makes no difference, as an order only sorts what a fence leaves.
func (r *Registry) Stranded() []topology.Match {
	var stranded []topology.Match
	for _, fence := range slices.Concat([]topology.Rule{{}}, r.topology.Fences) {
		var within []uint16
		for i, region := range r.chart.regions {
			if fence.Match == (topology.Match{}) || slices.Contains(fence.Regions, region.name) {
				within = append(within, uint16(i))
			}
		}
		if end := r.verdict(within).end; end.Replica < 0 && end.Outcome != AllDownCNAME {
			stranded = append(stranded, fence.Match)
		}
	}
	return stranded
}

// split divides all cells among the candidates of order.
func (r *Registry) split(order []uint16) []Share {
	v := r.verdict(order)
	parts := make([]float64, len(r.replicas))
	rest := 1.0
	for _, s := range v.steps {
		parts[s.replica] += rest * float64(s.weight) / 100
		rest -= rest * float64(s.weight) / 100
	}
	if v.end.Replica >= 0 {
		parts[v.end.Replica] += rest
	}
	shares := []Share{}
	for i, percent := range Percentages(parts) {
		if parts[i] > 0 {
			shares = append(shares, Share{r.replicas[i].region, percent})
		}
	}
	slices.SortFunc(shares, func(a, b Share) int {
		return cmp.Or(cmp.Compare(b.Percent, a.Percent), cmp.Compare(a.Region, b.Region))
	})
	return shares
}

// Percentages are parts of a whole in percent, to hundredths, and 100 together: the hundredths that cutting off leaves over go to
// the parts that lose most by it, the first on a tie. All are 0 if the parts are.
func Percentages(parts []float64) []float64 {
	const hundredths = 100 * 100
	percent, lost := make([]float64, len(parts)), make([]float64, len(parts))
	total := 0.0
	for _, p := range parts {
		total += p
	}
	if total == 0 {
		return percent
	}
	over, byLoss := hundredths, make([]int, len(parts))
	for i, p := range parts {
		exact := p / total * hundredths
		whole := math.Floor(exact + 1e-6) // floating point makes 2999.9999999999995 of 3000
		percent[i], lost[i], byLoss[i] = whole, exact-whole, i
		over -= int(whole)
	}
	slices.SortStableFunc(byLoss, func(a, b int) int { return cmp.Compare(lost[b], lost[a]) })
	for _, i := range byLoss[:over] {
		percent[i]++
	}
	for i := range percent {
		percent[i] /= 100
	}
	return percent
}
