package router

import (
	"math"

	"portolan/topology"
)

// earthRadius is the mean radius R1 of the Earth in kilometres (IUGG; Moritz, Geodetic Reference System 1980). A sphere
// is wrong by up to 0.5 %, which orders of regions do not notice.
const earthRadius = 6371.0088

// vector points from the centre of the Earth to a place on the unit sphere.
type vector struct{ x, y, z float64 }

func unit(c topology.Coordinates) vector {
	sinLat, cosLat := math.Sincos(c.Latitude * (math.Pi / 180))
	sinLon, cosLon := math.Sincos(c.Longitude * (math.Pi / 180))
	return vector{cosLat * cosLon, cosLat * sinLon, sinLat}
}

// kilometres is the great-circle distance by way of the chord, which keeps its digits for near places where the arc
// cosine of a dot product loses them. The conversions forbid fused multiplications, which not every processor has: all
// servers must come to the same figure.
func (v vector) kilometres(o vector) int {
	dx, dy, dz := v.x-o.x, v.y-o.y, v.z-o.z
	chord := math.Sqrt(float64(float64(dx*dx)+float64(dy*dy)) + float64(dz*dz))
	return int(math.Round(2 * earthRadius * math.Asin(min(1, chord/2))))
}

// Distance is the great-circle distance between two places, rounded to whole kilometres: 0 to 20015.
func Distance(a, b topology.Coordinates) int { return unit(a).kilometres(unit(b)) }
