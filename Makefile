# Every target sets up .venv first; it is rebuilt only when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup lifecycle test test-fast lint fmt clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps nemo-automodel
	# The oldest supported Triton, for tests that compile with it.
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/triton-oldest triton==3.6.0
	touch $@

lifecycle: setup  ## every phase of the lifecycle, for real, at preset tiny
	$(BIN)/lingflow run lifecycle --preset tiny

test: lint  ## everything: fast, slow and whole pipelines
	$(BIN)/python -m pytest -m "not slow and not e2e" --numprocesses 2
	$(BIN)/python -m pytest -m "slow and not e2e" --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m e2e --numprocesses 2 --dist loadfile

test-fast: setup
	$(BIN)/python -m pytest -m "not slow and not e2e" --numprocesses 2

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .lingflow
