# `make demo` and `make test` are all that a fresh checkout needs; both make the environment first.
#
#   make demo    pre-train, probe and draw on the bundled Sentinel-2 scene (minutes, CPU)
#   make test    run the tests
#   make lint    formatting and lint           make types   static types
#   make format  rewrite the formatting        make wheel   build the wheel into dist/
#   make clean   remove caches and builds, keep the environment
#
# Settings: PYTHON=/path/to/python3.12 (interpreter to build the environment with), VENV=.venv,
# JOBS=2 (test processes), ARGS="..." (further arguments of `geoexplora demo` or pytest).

VENV ?= .venv
JOBS ?= auto
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.geoexplora-installed

# Several test processes share the cores: one thread each is faster than all fighting for them.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint types format wheel clean venv

help:
	@sed -n 's/^#   \{0,1\}/  /p; s/^# \(Settings\|JOBS\)/  \1/p' Makefile

venv: $(STAMP)

demo: $(STAMP)
	$(BIN)/geoexplora demo $(ARGS)

test: $(STAMP)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP)
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find geoexplora tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# An existing environment is kept and brought up to date; pip changes only what pyproject.toml asks for.
$(STAMP): pyproject.toml
	@set -eu; \
	modern() { "$$@" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }; \
	suits() { "$$@" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }; \
	if [ -e "$(BIN)/python" ]; then \
	  quiet=--quiet; \
	  modern "$(BIN)/python" || { \
	    echo "$(VENV) holds a Python older than 3.12, or a broken one."; \
	    echo "Remove it (rm -r $(VENV)) and run make again, or choose another place: make VENV=.venv312 ..."; exit 1; } >&2; \
	else \
	  quiet= found=; \
	  for python in "$${PYTHON:-}" python3.12 python3.13 python3 python3.14 python \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python \
	    "$$(uv python find '>=3.12' 2>/dev/null || true)"; do \
	    if [ -n "$$python" ] && suits "$$python"; then found=$$python; break; fi; \
	    if [ -n "$$python" ] && [ "$$python" = "$${PYTHON:-}" ]; then \
	      echo "PYTHON=$$python is no Python 3.12 or newer with its venv module." >&2; exit 1; fi; \
	  done; \
	  [ -n "$$found" ] || { \
	    echo "GeoExPLoRA needs Python 3.12 or newer, with its venv module; none was found."; \
	    echo "Looked at: PYTHON, python3.12, python3.13, python3 ($$(python3 --version 2>&1 || echo none)), python3.14, pyenv's versions, uv."; \
	    echo "Install one (apt install python3.12-venv, brew install python@3.12, pyenv install 3.12, uv python install 3.12)"; \
	    echo "or name it: make PYTHON=/path/to/python3.12 demo"; exit 1; } >&2; \
	  echo "Making $(VENV) with $$("$$found" --version) ($$found)"; \
	  "$$found" -m venv "$(VENV)"; \
	fi; \
	"$(BIN)/python" -m pip --version >/dev/null 2>&1 || "$(BIN)/python" -m ensurepip --upgrade >/dev/null; \
	echo "Installing GeoExPLoRA and what it needs into $(VENV) (the first time: several minutes, mostly torch)"; \
	"$(BIN)/python" -m pip install --disable-pip-version-check $$quiet --editable ".[dev]"; \
	touch "$@"
