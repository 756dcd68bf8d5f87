# make demo   the whole pipeline on emoji64, a few minutes on two cores
# make test   the tests
# make lint   ruff, as CI runs it
#
# Each sets up what it needs in .venv first. CPU-only machines save a 3 GB download with
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON      ?= python3
VENV        ?= .venv
PIP_ARGS    ?=
PYTEST_ARGS ?= -q -n auto --maxprocesses 4 --dist loadgroup
DEMO_ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS)

.PHONY: demo test lint format

demo: $(VENV)/.installed
	$(BIN)/varcli demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) -e '.[dev]'
	touch $@ $(VENV)/.installed
