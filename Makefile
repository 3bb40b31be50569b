# What a fresh machine needs is installed when it is first wanted: `make demo` takes the base and what its acts use, `make test`
# what tests need on top, `make check` the checkers, `make docs` Sphinx. Each is an extra of pyproject.toml with a mark of
# its own, .venv/.ready-EXTRA; with all of them there, everything here works offline.
PYTHON ?= python3
BIN := .venv/bin
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: demo test test-fast test-cluster kills crash-points chaos fuzz likeness shapes architectures check docs bench prometheus clean help
.SECONDARY:

DEMO := .venv/.ready-demo
TEST := .venv/.ready-test
CHECK := .venv/.ready-dev
DOCS := .venv/.ready-docs

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.ready-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

data/digits.parquet: | $(DEMO)
	$(BIN)/thawline sample digits data/digits
	$(BIN)/thawline index data/digits --label 'regex:(.+)_\d+\.jpg$$' --valid 0.2 --seed 42 --out $@

demo: $(DEMO) data/digits.parquet  ## a ResNet-18 on real digits: 2 Ray workers, DALI, live metrics, a report; real weights fine-tuned; predict, ONNX, HTTP
	$(BIN)/python deploy/demo.py

# One thread a process: threads of several test processes that wait for one another would spin. More processes than cores,
# since tests often wait themselves; in the order of the files, or the longest would come last. Bytecode is kept, whatever
# the machine's environment says: hundreds of processes are started that would each compile everything again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --dist loadfile --no-loadscope-reorder
FAST := $(PYTEST) -n 3 -m 'not slow'
SLOW := $(PYTEST) -n 4 -m 'slow and not cluster'

test: $(TEST)  ## all tests (those that need Prometheus skip without it: see `make prometheus`)
	$(FAST)
	$(SLOW)

test-fast: $(TEST)  ## the tests that start neither Ray nor other processes
	$(FAST)

N ?= 100
kills: $(TEST)  ## N runs (N=100) killed at random moments and resumed: each must equal the unbroken one
	$(BIN)/python -m tests.campaigns.kills $(N)

EVERY ?= 1
crash-points: $(TEST)  ## a run cut short at every (EVERY=1) write, sync, rename, removal, by an error and by a kill: all equal
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns.crash_points --every $(EVERY)

test-cluster: $(TEST)  ## whole jobs on a Ray cluster of this machine: submit, stop, take up, move, two at once (7 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster

CHAOS ?= 20
chaos: $(TEST)  ## runs (CHAOS=20) on a Ray cluster of this machine whose workers, nodes, controllers and drivers are killed
	$(BIN)/python -m tests.campaigns.chaos $(CHAOS)

FUZZ ?= 300
fuzz: $(TEST)  ## FUZZ mutations (FUZZ=300) each of manifests, shards, jobs, CSVs and checkpoints: told, or read as written
	$(BIN)/python -m tests.campaigns.fuzz $(FUZZ)

shapes: $(TEST)  ## the five tasks on drawn pictures, on the CPU: each must come to its target (10 minutes)
	$(BIN)/python -m tests.campaigns.shapes

SEEDS ?= 1 2 3 4 5 6 7 8 9 10
likeness: $(TEST)  ## 217 kinds of pictures a seed (SEEDS) through both engines: each must show Pillow's pixels
	$(BIN)/python -m tests.campaigns.likeness $(SEEDS)

architectures: $(TEST)  ## 80 architectures of torchvision and timm: created, grouped, frozen, unfrozen, a step each (30 minutes)
	OMP_NUM_THREADS=2 $(BIN)/python -m tests.campaigns.architectures $(NAMES)

check: $(CHECK)  ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS)  ## the documentation into build/docs, offline; a warning or a dead reference is an error
	$(BIN)/python -m sphinx -q -E -W -n --keep-going docs build/docs

bench: $(DEMO)  ## the benchmarks, on this machine's CPU
	for name in decode presize presize_quality prefilter step train profile overhead finetune ray_overhead shards scale; do \
	$(BIN)/python -m benchmarks $$name || exit 1; done

prometheus: $(BIN)/prometheus  ## Debian's Prometheus into .venv, for the tests that scrape with it
$(BIN)/prometheus: | $(BIN)/python
	folder=$$(mktemp -d) && chmod 755 $$folder && here=$$PWD && cd $$folder \
	&& (apt-get download -qq prometheus || (apt-get update -qq && apt-get download -qq prometheus)) \
	&& dpkg -x prometheus_*.deb out && cp out/usr/bin/prometheus out/usr/bin/promtool $$here/$(BIN)/ \
	&& rm -r $$folder

clean:  ## remove what was built and made here, the runs too
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache build dist data runs
	find . -name __pycache__ -type d -prune -exec rm -r {} +

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
