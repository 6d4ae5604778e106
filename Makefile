# The one interface: each target sets up what it needs. PYTHON, VENV and ARGS can be given: make demo ARGS="--model.k 2".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.PHONY: demo test test-all install lint types check bench docs clean

demo: $(INSTALLED)  ## Train k-ladder LST on sample data with an embedded backbone: about a minute, no network.
	$(BIN)/python cli.py fit --config configs/kladder.yaml $(ARGS)

test: $(INSTALLED)  ## The fast tests, on every core.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(INSTALLED)  ## All tests, the slow ones too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu" $(ARGS)

install: $(INSTALLED)  ## A virtual environment with the exact versions that were tested.

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peft,report,test]'
	touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

check: lint types test  ## What continuous integration runs.

bench: $(INSTALLED)  ## Time and memory of every method against plain forward and full fine-tuning, in one run.
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(INSTALLED)  ## The site, in site/.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean:  ## Removes the environment and the caches; runs/ stays.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
