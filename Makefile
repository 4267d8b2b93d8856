# In an active virtual environment these targets install into it; otherwise
# into .venv, which they make. Install once, and again when setup.py changes.

PYTHON ?= python3
JOBS ?= 2
WORKDIR ?= runs/quickstart
ARGS ?=
# Tests against PyTorch skip where it is absent: make test TORCH=torch==2.13.0
TORCH ?=

ENVIRONMENT := $(or $(VIRTUAL_ENV),.venv)
BIN := $(ENVIRONMENT)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check
# An environment may serve several clones: each leaves a mark of its own.
MARK := $(ENVIRONMENT)/postrain$(subst /,-,$(CURDIR))

.PHONY: help quickstart test test-all lint types torch bench peers

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

quickstart: $(MARK).run  ## train a small language model, from nothing
	$(BIN)/python experiments/train.py --config=configs/quickstart.py \
	  --workdir=$(WORKDIR) $(ARGS)

test: lint types torch  ## format, lint, types and all quick tests
	$(BIN)/python -m pytest -n $(JOBS) --timeout=900 $(ARGS)

test-all: lint types torch  ## the same, with the tests that take minutes
	$(BIN)/python -m pytest -n $(JOBS) --timeout=900 -m '' $(ARGS)

lint: $(MARK).test  ## format and lint
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .

types: $(MARK).test  ## check types
	$(BIN)/pyright --pythonpath $(BIN)/python postrain

bench: $(MARK).run  ## every side-by-side measurement
	set -e; for program in benchmarks/*.py; do $(BIN)/python $$program; done

peers: .peers/installed  ## other libraries, for benchmarks/peers/run.py

.peers/installed: benchmarks/peers/requirements.txt
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

torch: $(MARK).test
	$(if $(TORCH),$(PIP) $(TORCH))

$(MARK).run: setup.py | $(BIN)/python
	$(PIP) --editable '.[plots]'
	@touch $@

$(MARK).test: setup.py | $(BIN)/python
	$(PIP) --editable '.[test,plots]'
	@touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(ENVIRONMENT)
