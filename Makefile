# Commands of development. Each target installs what it needs. PYTHON, VENV and ARGS can be set: make demo ARGS="--model.k 2".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-all install stub lint types check bench docs clean

demo: $(INSTALLED)  ## Train k-ladder LST on sample data with an embedded backbone: about a minute, no network.
	$(BIN)/python cli.py fit --config configs/kladder.yaml $(ARGS)

test: stub  ## The fast tests, on every core.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-all: stub  ## All tests, the slow ones too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu" $(ARGS)

install: $(INSTALLED)  ## A virtual environment with the exact versions that are tested.

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peft,report,test]'
	touch $@

stub: $(INSTALLED)  ## The types of the exported names, for type checkers and editors: lit_spu/__init__.pyi.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.write_stub

lint: stub
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: stub
	$(BIN)/mypy

check: lint types test  ## All checks of continuous integration.

bench: $(INSTALLED)  ## Time and memory of every method, beside a plain forward pass and full fine-tuning.
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(INSTALLED)  ## The site, in site/.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## Remove the environment and the caches, but not runs/.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
