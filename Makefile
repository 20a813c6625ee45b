# whet: `make demo` trains a model (about a minute, after two for its .venv); `make check test` is what a change must pass.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
RAY := .venv-ray
BENCH := .venv-bench
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm test-ray check bench-setup bench docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/'

demo: $(STAMP) ## train the shipped tiny model and watch it learn
	$(BIN)/whet demo

test: $(STAMP) ## run the tests (CPU, no network), three files at a time (tests wait for processes), the longest first
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM)/.installed ## run the tests of the vLLM sampler, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -q tests/vllm

test-ray: $(RAY)/.installed ## run the tests of ranks as Ray actors, in an environment of its own
	RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest -q tests/ray

check: $(STAMP) ## style, types, floors, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

bench-setup: $(BENCH)/.installed ## the environment of the benchmarks, with TRL beside whet

bench: $(BENCH)/.installed ## time whet beside TRL and transformers, in turns: a JSON line for each pair
	$(BENCH)/bin/python -m benchmarks.run

docs: $(STAMP) ## write what is generated: the recipe's JSON Schema, for editors
	$(BIN)/whet schema > docs/recipe.schema.json

clean: ## delete the virtual environment, caches and build products (never runs/)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +

# Torch first and alone: everything that depends on it then takes the build that this machine's pip settings chose.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "whet needs Python 3.11 or newer: make PYTHON=python3.12"; exit 2; }
	@echo "[1/3] $(VENV): a virtual environment"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] torch (the largest download)"
	@$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	@echo "[3/3] whet and the rest (about a minute)"
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

# vLLM's CPU build pins torch and transformers, hence an environment apart from the one of `make test`.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps -r constraints-vllm.txt -e .
	@touch $@

$(RAY)/.installed: pyproject.toml constraints-ray.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-ray.txt "$$(grep '^torch==' constraints-ray.txt)"
	$(RAY)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints-ray.txt -e '.[dev,ray]'
	@touch $@

$(BENCH)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BENCH)/bin/python -m pip --disable-pip-version-check --quiet install -c constraints.txt -e . trl==1.16.0
	@touch $@
