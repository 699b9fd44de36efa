# `make` prints what there is. Everything below works from a fresh clone: setup comes by itself.
# Knobs: PYTHON=python3.12, and LOCK=constraints.txt on a machine whose wheels requirements.lock does not name.

.DEFAULT_GOAL := help
.PHONY: help setup demo check fix test faults bench gpu lock clean

PYTHON ?= python3
LOCK ?= requirements.lock
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
RECORD := $(BIN)/python -m benchmarks.record
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
HASHES := $(if $(filter %.lock,$(LOCK)),--require-hashes)
TEST_SECONDS ?= 2100
FUZZ_EXAMPLES ?= 1000
GPU_MINUTES ?= 9
FAULTS = FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) FAULT_RESULTS=build/faults.jsonl $(BIN)/pytest -m "faults and not gpu and not network"

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## .venv with the pinned versions; repeated only when a pin changed

# torch first and by itself: its wheel differs by machine (CPU, CUDA), so it has no hash, and nothing may
# bring another one. The rest is a closed list: --no-deps, so pip adds nothing of its own.
$(STAMP): pyproject.toml constraints.txt requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	  sys.exit(0 if (3, 11) <= v < (3, 13) else "hqlabel needs Python 3.11 or 3.12, found %d.%d; try: make setup PYTHON=python3.11" % v[:2])'
	@echo "setup: $(VENV) with the versions of $(LOCK); a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install --no-deps $(HASHES) -r $(LOCK)
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)  ## labels three photographs: a table here, a page with the masks in demo-out/
	$(BIN)/python examples/demo.py

check: $(STAMP)  ## ruff, mypy --strict, import contracts; about half a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(STAMP)  ## what ruff can fix by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: check  ## check, then every test that needs no GPU, no network and no kills
	$(BIN)/pytest -m "not faults and not gpu and not network" --session-timeout=$(TEST_SECONDS)

faults: $(STAMP)  ## kills and injected faults, an hour or more; writes the table of docs/dev/fault-tests.md
	@mkdir -p build && rm -f build/faults.jsonl
	FAULT_RESULTS=build/faults.jsonl $(BIN)/pytest tests/faults -m "not faults and not gpu and not network"
	# A process for each: Ray asks once in a process how its clusters authenticate, and not all of them do alike.
	$(FAULTS) tests/e2e
	$(FAULTS) tests/faults
	$(FAULTS) --ignore=tests/e2e --ignore=tests/faults
	$(BIN)/python -m tests.mutants
	$(BIN)/python tools/fault_table.py build/faults.jsonl docs/dev/fault-tests.md

bench: $(STAMP)  ## figures of this machine, written to docs/dev/measurements.md: whole jobs on two stores, model, chain, resume, masks to runs, memory, publishing, report and exports, requests, scale
	$(RECORD) python -m benchmarks.whole_way
	$(RECORD) python -m benchmarks.masks_rle
	$(RECORD) python -m benchmarks.decoder_speed
	$(RECORD) python -m benchmarks.model_speed
	$(RECORD) python -m benchmarks.model_speed --only "hqlabel bf16" --operations 24
	$(RECORD) python -m benchmarks.precision
	$(RECORD) python -m benchmarks.chain
	$(RECORD) python -m benchmarks.call_shapes
	$(RECORD) python -m benchmarks.resume
	$(RECORD) python -m benchmarks.image_reader
	$(RECORD) python -m benchmarks.driver_memory 1000 10000
	$(RECORD) python -m benchmarks.publishing
	$(RECORD) python -m benchmarks.labels_out --images 2858
	$(RECORD) python -m benchmarks.store_requests 5000
	rm -rf build/simulation && $(RECORD) python -m benchmarks.simulation build/simulation --images 20000 --seconds 3600

gpu: $(STAMP)  ## all that a GPU must show, most valuable first, nine minutes a call; run it again to go on
	$(BIN)/python -m benchmarks.gpu_day --minutes $(GPU_MINUTES)

lock: $(STAMP)  ## resolves pyproject.toml again and writes the pins, versions kept (about eight minutes)
	$(BIN)/python tools/lock_requirements.py

clean:  ## removes what make made, but not your outputs
	rm -rf $(VENV) demo-out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
