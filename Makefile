# vlmflow: `make demo` and `make test` set up what they need; `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Exact versions of what is hard to resolve or was measured with; see the file.
CONSTRAINTS := deploy/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo lint types test test-all lowest gpu clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv and install vlmflow with its development tools

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade "pip>=25"
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) torch torchvision
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $(STAMP)

demo: setup ## enrich the demo catalog with the starter models, offline, and show what came out
	$(BIN)/python -m vlmflow demo demo-catalog

lint: setup ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

# Two files at a time, those of the integration tests first: they wait more than they compute.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder

# Ray's workers and torch's threads would fight for the cores; tests measure no speed.
test test-all: export OMP_NUM_THREADS = 1
# Hundreds of processes import the same modules: without, each would compile them anew where images ask for that.
test test-all: export PYTHONDONTWRITEBYTECODE =

test: lint types ## lint, types and the tests that take minutes, not more
	$(BIN)/python -m pytest -m "not slow" $(SIDE_BY_SIDE) --durations 25

test-all: lint types ## every test, the slow ones too
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

lowest: ## the tests of `make test` with the lowest versions that pyproject.toml allows, in .venv-lowest
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=deploy/constraints-lowest.txt

gpu: setup ## with a CUDA device: the tests that want one, and the figures that wait for one; a quarter of an hour by estimate
	@$(BIN)/python -m pytest -m gpu; failed=$$?; \
	for script in blip_caption vilt_answer clip_embed dual_embed gpu_pool gpu_enrich; do \
		$(BIN)/python -m benchmarks.$$script --device cuda || failed=1; \
	done; exit $$failed  # what fails does not keep the figures away

clean: ## remove the demo catalog and caches; keeps .venv and .venv-lowest
	rm -rf demo-catalog .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
