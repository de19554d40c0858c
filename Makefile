# Everything works on a bare machine with Python 3.10+ and venv: the first call makes .venv, later ones start at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all lint types clean
.DEFAULT_GOAL := help

help:
	@echo "make demo      compress a real model on real data, show before and after, write report.html"
	@echo "make test      run the tests (without the slow ones)"
	@echo "make test-all  run every test"
	@echo "make lint      check the style"
	@echo "make types     check the types"
	@echo "make clean     remove caches and builds (runs/ and $(VENV) stay)"

demo: $(VENV)/.demo
	$(BIN)/gracile demo

# Files are shared out to as many processes as there are cores, up to four: each holds PyTorch and a few runtimes.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Gracile needs Python 3.10 or newer; choose one with: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Making the environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were made from, so a changed dependency installs again and an unchanged one costs nothing.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Gracile with its runtimes (PyTorch is large: the first time takes a few minutes)"
	$(PIP) -e '.[runtimes]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Gracile with what its development needs (PyTorch is large: the first time takes a few minutes)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo
