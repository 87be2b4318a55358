# A fresh clone needs Python 3.11 or newer and make, nothing else. `make` lists the targets.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Evaluated only when the environment is made. To choose another one: make install PYTHON=/path/to/python3
PYTHON ?= $(shell python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)
# --disable-pip-version-check: a hint about a newer pip is noise here.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test test-apart docs notebooks release check format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv with foldrank and the development tools, at the tested versions

# The environment is used as it is if it works, and made anew if it is missing, broken or of an older Python.
# torch comes first, by its exact version, so that nothing that asks for a bare torch can choose another build.
$(INSTALLED): pyproject.toml constraints.txt
	@rm -f $@
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	  python='$(PYTHON)'; \
	  command -v "$$python" >/dev/null || { \
	    echo "No '$$python' found: foldrank needs Python 3.11 or newer. Install it, or name one: make install PYTHON=/path/to/python3" >&2; \
	    exit 1; }; \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "'$$python' is $$("$$python" --version 2>&1): foldrank needs Python 3.11 or newer. Install it, or name one: make install PYTHON=/path/to/python3" >&2; \
	    exit 1; }; \
	  echo "Making $(VENV) with $$("$$python" --version)"; \
	  "$$python" -m venv --clear $(VENV); }
	@echo "Installing foldrank and its development tools into $(VENV) (a few minutes where torch has to be downloaded)"
	@$(PIP) "$$(grep '^torch==' constraints.txt)"
	@$(PIP) -e '.[dev]'
	@touch $@

demo: install ## pre-train the demo recipe on this machine, into runs/demo
	$(BIN)/foldrank pretrain demo --out runs/demo

test: install ## run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not apart'

test-apart: install ## run those in a browser, of site, notebooks and examples, of exports, of several processes
	$(BIN)/python -m pytest -n auto --dist loadfile -m apart tests

docs: install ## build the documentation as a site, into docs/_build/html; warnings are errors
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html

notebooks: install ## run the notebooks and keep their outputs
	$(BIN)/python docs/_ext/notebooks.py

release: install ## build sdist and wheel into dist, and try the wheel where no source is
	$(BIN)/python packaging/release.py

check: install ## lint, check the format and the types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: install ## sort the imports, apply the safe lint fixes, format the code
	$(BIN)/ruff check --fix-only --quiet
	$(BIN)/ruff format

clean: ## remove caches and build outputs (not .venv, not runs)
	rm -rf build dist .pytest_cache .ruff_cache docs/_build docs/reference
	find . -path ./$(VENV) -prune -o -path ./runs -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
