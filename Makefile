# Two commands do everything on a fresh machine: make demo, make test. Both make .venv first if need be.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help demo test slow check clean

help:
	@echo "make demo   make phantoms, train, evaluate on held-out patients; open demo/report.html afterwards"
	@echo "make test   run the tests (minutes)"
	@echo "make slow   run the tests that train (many minutes)"
	@echo "make check  what CI runs: ruff, mypy, lint-imports, pytest"
	@echo "make clean  remove .venv"

demo: $(VENV)/installed
	$(BIN)/medvl demo --out demo --seed 0

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

check: $(VENV)/installed-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV)

# A stamp is younger than pyproject.toml as long as what is installed is what it asks for.
$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/installed: pyproject.toml | $(VENV)/python
	$(PIP) install -e .
	touch $@

$(VENV)/installed-test: pyproject.toml | $(VENV)/python
	$(PIP) install -e '.[test]'
	touch $@ $(VENV)/installed
