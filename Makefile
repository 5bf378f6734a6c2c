# Every target sets up .venv first; it is rebuilt only when the requirements change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made on all cores at the end, and not left to the first import: where PYTHONDONTWRITEBYTECODE is set, as in
# many images, every process would compile what it imports anew.
PIP := $(BIN)/pip install --quiet --no-compile
PYTEST := $(BIN)/python -m pytest --durations 15 --durations-min 5
# For two cores; what is slow waits much, for servers and processes. Beside Ray's many processes a whole lifecycle would
# hardly get on, so it has a turn of its own.
FAST := -m "not slow and not e2e" --numprocesses 2
SLOW := -m "slow and not e2e" --numprocesses 3 --dist loadfile --no-loadscope-reorder
E2E := -m e2e --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup lifecycle test test-fast lint fmt clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[dev]'
	$(PIP) --constraint constraints.txt --no-deps nemo-automodel
	# The oldest supported Triton, for tests that compile with it. There are wheels for Linux only.
	test "$$(uname)" != Linux || $(PIP) --no-deps --upgrade --target $(VENV)/triton-oldest triton==3.6.0
	$(BIN)/python -W ignore -m compileall -qq -j 0 -x '/tests?/' $(VENV) || true # some templates are no Python
	touch $@

lifecycle: setup  ## every phase of the lifecycle, for real, at preset tiny
	$(BIN)/lingflow run lifecycle --preset tiny

test: lint  ## everything: fast, slow and whole pipelines
	$(PYTEST) $(FAST)
	$(PYTEST) $(SLOW)
	$(PYTEST) $(E2E)

test-fast: setup
	$(PYTEST) $(FAST)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fmt: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .lingflow
