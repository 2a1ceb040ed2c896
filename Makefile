PYTHON ?= python3
VENV ?= .venv
# Other arguments for installing torch, e.g. --index-url https://download.pytorch.org/whl/cpu
TORCH_ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

# For `make bench`: which of its rows, all by default
BENCH ?=
# For `make results`: local copies of the data, where the runs go, and how many run at once
DATA ?=
# The directory of a small language model for E2E, GSM8K and OpenBookQA; without it they are left out
SMALL_LM ?=
RESULTS ?= runs/results
JOBS ?= 1

.PHONY: help setup demo test deployment slow results bench chaos lint type docs dist installed clean

help:
	@echo "make demo    set up, then federate a small model over three clients, offline (minutes)"
	@echo "make test    set up, then run the tests"
	@echo "make deployment   set up, then test real Flower processes on this machine (minutes)"
	@echo "make slow    set up, then the deployments that 'make deployment' leaves out (minutes)"
	@echo "make chaos   set up, then make clients, network and coordinator fail (a quarter of an hour)"
	@echo "make results DATA=DIR   the small experiments (hours), then docs/results.md"
	@echo "make bench DATA=DIR   speed and memory against what one would use instead; DIR: cola, mrpc"
	@echo "make setup   install everything, at the tested versions, into $(VENV)"
	@echo "make lint    formatting, lint rules and the direction of imports"
	@echo "make type    static types"
	@echo "make docs    the documentation as a site, in build/site"
	@echo "make dist    a wheel and an sdist in dist/, and whether they are complete"
	@echo "make installed   what was built, installed elsewhere and used (minutes)"
	@echo "make clean   remove $(VENV) and caches; runs/ stays"
	@echo "PYTHON=python3.12 before any of them chooses another Python (3.11 or newer)"

setup: $(STAMP)

# Torch first and alone: resolved together with the rest, pip may fetch several builds of it. What
# is installed is compiled when it is first imported: most of it never is.
PIP := $(BIN)/python -m pip install --quiet --no-compile

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is not." \
	       "Name another: make setup PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_ARGS) -c constraints.txt torch
	$(PIP) -c constraints.txt -e ".[all,dev,docs]"
	@touch $@

demo: setup
	$(BIN)/fedex-lora demo

# Two at once; a file's tests stay together, since they share what is made for the file.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

results: setup
	@test -n "$(DATA)" || { \
	  echo "Name the directory with local copies, sst2 and stsb: make results DATA=DIR" >&2; exit 1; }
	for part in results results-one-round results-ranks results-clients results-learning-rate; do \
	  $(BIN)/fedex-lora grid recipes/small/$$part.yaml \
	    --data "$(DATA)" --out "$(RESULTS)" --jobs $(JOBS) || exit 1; done
	for part in $(if $(SMALL_LM),results-e2e results-formats); do \
	  $(BIN)/fedex-lora grid recipes/small/$$part.yaml --set model.name="$(SMALL_LM)" \
	    --data "$(DATA)" --out "$(RESULTS)" --jobs $(JOBS) || exit 1; done
	$(BIN)/python docs/results.py "$(RESULTS)"/*/ > docs/results.md.new
	mv docs/results.md.new docs/results.md

# Without DATA the rows that need rows of GLUE are skipped; BENCH="residual merge" measures some.
bench: setup
	$(BIN)/python -m benchmarks $(BENCH) $(if $(DATA),--data "$(DATA)")
	$(BIN)/python -m benchmarks.page > docs/benchmarks.md.new
	mv docs/benchmarks.md.new docs/benchmarks.md

# What failures cost in a real deployment: what was lost, seconds, error against the oracle. One
# scenario: python -m benchmarks.chaos "client hangs"
chaos: setup
	$(BIN)/python -m benchmarks.chaos

# Real Flower processes on this machine, with TLS and keys: minutes.
deployment: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "deployment and not slow" \
	  tests/engines tests/flower tests/test_docs.py

slow: setup
	$(BIN)/python -m pytest -m slow tests/engines

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

type: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

# Strict: a link that leads nowhere, or a name that is not there, is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What a wheel has to hold is not seen in an editable install.
dist: setup
	rm -rf dist
	$(BIN)/python -m build --outdir dist . > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/wheel.py dist/*.whl

# What is in dist/, installed into an environment of its own and used outside the checkout.
installed: dist
	$(BIN)/python -m pytest -m installed tests/test_installed.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
