# `make quickstart` and `make test` set up all they need: Python 3.11 or newer, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Every install passes the constraints: without them pip picks a torch with gigabytes of CUDA.
INSTALL := $(PIP) install -c constraints.txt

.PHONY: help quickstart house test check format lint types test-slow test-gpu bench-cpu docs clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   install, train a small model on the text that Python ships, sample from it"
	@echo "make house DATA=FOLDER   the house model: tokens, training, artifacts/tnl-30m"
	@echo "make test         install, then format check, lint, import layers, types, tests"
	@echo "make test-slow    the long tests      make test-gpu    the tests that need a GPU"
	@echo "make bench-cpu    the CPU benchmarks; they write benchmarks/results/"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make format       rewrite the sources in the one format"
	@echo "make clean        remove the environment and caches; runs/ stays"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is too old; expected Python 3.11 or newer; try make PYTHON=python3.11"; exit 1; }
	@echo "making the environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# Stamps: an install is repeated only after a change of what it installs.
$(VENV)/.installed-core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing transnormer (about a minute the first time)"
	@$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing transnormer with its development tools (about a minute the first time)"
	@$(INSTALL) -e '.[dev]'
	@touch $(VENV)/.installed-core $@

# A run directory is never overwritten: later runs get a name of their own.
QUICKSTART_RUN ?= runs/quickstart$(if $(wildcard runs/quickstart),-$(shell date +%Y%m%d-%H%M%S))

quickstart: $(VENV)/.installed-core
	$(BIN)/transnormer train recipes/quickstart.toml --set output.dir=$(QUICKSTART_RUN)
	@echo; echo "a sample of $(QUICKSTART_RUN), after the prompt \"def \":"
	@$(BIN)/transnormer generate $(QUICKSTART_RUN) --prompt 'def ' --max-new-tokens 200 --temperature 0.7 --top-p 0.9 --seed 0

# The folder of the house model's text, see experiments/house.
DATA ?= data

house: $(VENV)/.installed-core
	$(BIN)/python experiments/house/build.py all --data $(DATA)

test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory check

# Two processes of one thread each: most tests are too small for two threads to help.
check: lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m 'not slow and not gpu'

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo

types:
	$(BIN)/pyrefly check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m 'slow and not gpu'

test-gpu: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -m gpu

bench-cpu: $(VENV)/.installed-core
	$(BIN)/python benchmarks/op_cpu.py
	$(BIN)/python benchmarks/decode_cpu.py

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build .pytest_cache .ruff_cache .import_linter_cache src/*.egg-info
