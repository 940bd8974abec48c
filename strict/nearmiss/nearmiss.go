// Package nearmiss finds the word that a misspelt one was probably meant to be, for "did you mean".
//
// It knows words only; which words are allowed is the caller's.
package nearmiss

// Of returns the candidate closest to word by optimal string alignment distance (insert, delete, replace, swap of two
// neighbours), if it is close enough to be a slip: at most one edit for every three letters of word, and at least one. Of
// candidates that are equally close it returns the first.
func Of(word string, candidates []string) (string, bool) {
	limit := max(1, min(len(word), 24)/3)
	best, found := "", false
	for _, c := range candidates {
		if d := distance(word, c, limit); d <= limit {
			best, found, limit = c, true, d-1
			if limit < 0 {
				break
			}
		}
	}
	return best, found
}

// distance is the optimal string alignment distance of a and b in bytes, or limit+1 if it is more than limit.
func distance(a, b string, limit int) int {
	if abs(len(a)-len(b)) > limit {
		return limit + 1
	}
	before, previous, current := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range previous {
		previous[j] = j
	}
	for i := 1; i <= len(a); i++ {
		current[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			current[j] = min(previous[j]+1, current[j-1]+1, previous[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				current[j] = min(current[j], before[j-2]+1)
			}
		}
		before, previous, current = previous, current, before
	}
	return min(previous[len(b)], limit+1)
}

func abs(n int) int {
	if n < 0 {
		return -n
	}
	return n
}
