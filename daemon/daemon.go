// Package daemon is the composition of portolan serve: it reads the configuration, opens the store, and ties topology,
// health, router, DNS server, replicator and API together into one process with one owner.
//
// It is the only room that knows all others. It decides nothing itself: what it does is order: what starts after what, what
// ends after what, and which part hears of which.
package daemon
