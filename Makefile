# Two commands on a fresh machine do everything: `make smoke` and `make test`. `make` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOKE := examples/smoke/smoke.toml
# Set FOLDER to run the smoke experiment somewhere else.
FOLDER ?= experiments/smoke
EXTRAS := mpi,align,decode,corpus,report,dev
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install smoke test test-system soak check bench results results-quick clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## a virtual environment in .venv with everything, from wheels

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

smoke: $(INSTALLED) ## the whole way on made-up speech: corpus to word error rates and a report (minutes)
	$(BIN)/teacherstudent run $(SMOKE) folder=$(FOLDER)

test: $(INSTALLED) ## every law at its smallest size, files side by side on at most four cores
	$(PYTEST) -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-system: $(INSTALLED) ## what needs Debian packages or root
	$(PYTEST) -m system

soak: $(INSTALLED) ## the full counts of kills, damages and launches
	$(PYTEST) -m soak

check: $(INSTALLED) ## lint, format, types, links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) tests/test_house.py

bench: $(INSTALLED) ## every performance figure that RESULTS.md claims, as ratios in one run
	$(BIN)/python benchmarks/bench.py

results: $(INSTALLED) ## the tables of RESULTS.md: the smoke experiment, scheduled learning, methods by workers (hours)
	$(BIN)/python examples/smoke/results.py
	$(BIN)/python examples/smoke/evidence.py
	$(BIN)/python examples/smoke/multiplier.py
	$(BIN)/python examples/smoke/methods.py

results-quick: $(INSTALLED) ## the way to the second of them, on little speech: its figures say nothing (minutes)
	$(BIN)/python examples/smoke/evidence.py --quick

clean: ## remove experiments and caches; the virtual environment stays
	rm -rf experiments build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
