# Everything that is done to this project by hand or by CI. `make` alone lists it.
#
# The set-up is incremental: a stamp in .venv per step, redone when what it was made from changed.

.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
ARGS ?=
# Processes that share the tests, a file each, in the order of tests/conftest.py. Half of the time a
# test waits for other processes: with three a fifth of two cores was idle.
TEST_WORKERS ?= 4
# What `lint`, `fmt` and the types look at.
SOURCES := mm tests bench setup.py proto

export PYTHON MM_BUILD_DEBUG
# Where this is set, every worker of the tests and every process that they start compiles everything
# anew: 5 s of CPU for the one, 0.3 s for the other.
unexport PYTHONDONTWRITEBYTECODE

PACKAGES := $(VENV)/.packages
EXTENSION := $(VENV)/.extension$(if $(filter-out 0,$(MM_BUILD_DEBUG)),-debug)
EXTENSION_SOURCES := setup.py pyproject.toml \
	$(wildcard mm/*.pyx mm/*.pxd mm/*.pxi mm/*.h mm/wire/*.pyx mm/wire/*.pxd mm/wire/*.pxi)

.PHONY: help
help: ## list the targets
	@echo 'make TARGET [ARGS="..."] [PYTHON=/path/to/python3.12]'
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-22s %s\n", $$1, $$2}'

.PHONY: develop
develop: $(EXTENSION) ## set up everything; leaves the program at .venv/bin/mm
	@echo "ready: $(BIN)/mm --help"

.PHONY: demo
demo: $(EXTENSION) ## three instances, sixty real models, a crash (ARGS=--keep leaves it up)
	@$(BIN)/mm demo $(ARGS)

.PHONY: test
test: $(EXTENSION) ## the whole test suite (ARGS="tests/core -k name" for a part)
	@$(PY) -m pytest --numprocesses $(TEST_WORKERS) --dist loadfile \
		--no-loadscope-reorder $(ARGS)

.PHONY: test-matrix
test-matrix: ## the system tests on both data planes, conformance in plain text, TLS and mTLS
	@$(MAKE) test ARGS="tests/system --all-dataplanes $(ARGS)"

.PHONY: test-image
test-image: $(EXTENSION) ## carry out the Dockerfile and start what it makes: some minutes, as root
	@$(PY) -m tests.pod.image $(ARGS)

.PHONY: test-manifests
test-manifests: $(EXTENSION) ## render config/ with kustomize, and hold it to Kubernetes' schemas
	@$(PY) -m tests.pod.manifests $(ARGS)

SEEDS ?= 1000

.PHONY: sim
sim: $(EXTENSION) ## simulated clusters under faults: make sim SEEDS=1000 (ARGS="--first-seed 50")
	@$(BIN)/mm sim --seeds $(SEEDS) $(ARGS)

.PHONY: test-sanitize
test-sanitize: $(EXTENSION) ## the table and its readers under the sanitizers: two minutes, in CI
	@$(PY) tests/table/sanitize/run.py $(ARGS)

.PHONY: test-sanitize-wire
test-sanitize-wire: $(EXTENSION) ## the wire under the sanitizers: a quarter of an hour, by hand (ARGS=--suite: all tests, at most an hour)
	@$(PY) tests/wire/sanitize/run.py $(ARGS)

MINUTES ?= 5

.PHONY: fuzz
fuzz: $(EXTENSION) ## mutated clients and upstreams of the wire under ASan: make fuzz MINUTES=15
	@$(PY) tests/wire/fuzz/run.py --minutes $(MINUTES) $(ARGS)

CHECKS := check-style check-format check-types check-cython check-spelling check-proto

# cython-lint starts pycodestyle, and the protobuf compiler its plugin, from PATH.
lint $(CHECKS) proto: export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: lint $(CHECKS)
lint: $(EXTENSION) ## style, types, spelling, and that generated code is up to date
	@$(MAKE) --keep-going $(CHECKS)

check-style: ; $(BIN)/ruff check --quiet $(SOURCES)
check-format: ; $(BIN)/ruff format --check --quiet $(SOURCES)
check-types: ; $(BIN)/mypy
check-cython: ; $(BIN)/cython-lint mm
check-spelling: ; $(BIN)/codespell
check-proto: ; $(PY) proto/generate.py --check

.PHONY: fmt
fmt: $(EXTENSION) ## format, and mend what can be mended
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

.PHONY: proto
proto: $(EXTENSION) ## regenerate mm/pb from proto/
	$(PY) proto/generate.py $(ARGS)

.PHONY: bench
bench: $(EXTENSION) ## list the benchmarks, or run one: make bench ARGS=lru
	@PY=$(PY) tools/bench.sh $(ARGS)

.PHONY: debug
debug: ## rebuild the extension for debugging (then: make test MM_BUILD_DEBUG=1)
	@$(MAKE) develop MM_BUILD_DEBUG=1

.PHONY: lock
lock: $(PACKAGES) ## pin the newest allowed packages anew
	@PY=$(PY) tools/lock.sh

.PHONY: clean
clean: ## remove what was built (not .venv)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache mm/_lru.c mm/*.html mm/_lru.*.so
	rm -f mm/wire/_wire.c mm/wire/*.html mm/wire/_wire.*.so
	rm -f $(VENV)/.extension*

$(PACKAGES): requirements.lock tools/setup.sh
	@tools/setup.sh packages
	@touch $@

# A stamp without its shared object (`git clean`, another checkout's .venv) counts for nothing.
$(EXTENSION): $(PACKAGES) $(EXTENSION_SOURCES) $(if $(and $(wildcard mm/_lru.*.so),$(wildcard mm/wire/_wire.*.so)),,always)
	@tools/setup.sh extension
	@rm -f $(VENV)/.extension*
	@touch $@

.PHONY: always
always:
