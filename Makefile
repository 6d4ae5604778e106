# Each target installs what it needs. PYTHON, VENV and ARGS can be given: make demo ARGS="--model.k 2".
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
DOCS_INSTALLED := $(VENV)/docs-installed

.PHONY: demo test test-all install stub lint types check audit bench bench-gpu docs clean

demo: $(INSTALLED)  ## Train k-ladder LST on synthetic data with an embedded backbone: under a minute, no downloads.
	$(BIN)/python cli.py fit --config configs/kladder.yaml $(ARGS)

test: stub  ## The fast tests, on every core.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(ARGS)

test-all: $(INSTALLED)  ## All tests that need no GPU, the slow ones too.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadgroup -m "not gpu" $(ARGS)

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

check: lint types docs test-all  ## What continuous integration runs.

audit: $(INSTALLED)  ## Known vulnerabilities of the exact versions. Without an index it is skipped, and says so.
	-$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[audit]'
	$(BIN)/python -m tools.audit

bench: $(INSTALLED)  ## Time and memory of every method against the plain forward pass and full fine-tuning.
	$(BIN)/python -m benchmarks $(ARGS)

GPU_ROWS := full lora 'lora (peft)' ia3 'ia3 (peft)' lst kladder '*, cached' side_lora 'mezo*'

bench-gpu:  ## On a machine with a GPU, in ten minutes: the tests that need one, then time and memory, eagerly and as graphs.
	$(BIN)/python -m pytest -q -m gpu tests
	$(BIN)/python -m benchmarks --device cuda --rounds 5 --only $(GPU_ROWS)

# not --quiet, which hides the warnings that --strict counts
docs: $(DOCS_INSTALLED)  ## The site, in site/. A broken link or a page outside the navigation is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS_INSTALLED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

clean:  ## Remove the environment and the caches; runs/ stays.
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
