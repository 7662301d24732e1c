# Every target sets up what it needs. `make` alone lists them.
#
#   PY=python3 make test-gpu      uses an interpreter that has the dependencies already, instead of .venv
#   make test ARGS="-k gate -x"   passes arguments on: to pytest, to the demo, to a benchmark

VENV   := .venv
STAMP  := $(VENV)/.installed
TORCH  := torch==2.13.0
PY     ?= $(VENV)/bin/python
ARGS   ?=

# With the project's own environment the stamp is a prerequisite; with another interpreter there is nothing to install.
ENV    := $(if $(filter $(VENV)/bin/python,$(PY)),$(STAMP))

# Tests and demo work without a network; threads are the workers' business (the machine may have two cores).
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest
# Four workers at most: each holds torch and starts ranks of its own.
WORKERS := -n logical --maxprocesses=4 --dist=worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo reproduce test test-slow test-gpu test-multigpu test-multiprocess test-cluster check lint format package-check \
	upstream-symbols bench-gpu bench-multigpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

env: $(ENV) ## create .venv with everything that tests, demo and checks need

$(STAMP): pyproject.toml
	@echo "setting up $(VENV) (once, some two minutes)"
	test -x $(VENV)/bin/python || python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(ENV) ## train a small LocMoE on text every Python has, and show what it learned (about three minutes)
	OMP_NUM_THREADS=2 $(PY) recipes/demo.py $(ARGS)

reproduce: $(ENV) ## the paper's figures from four small runs on two emulated nodes (a quarter of an hour on two idle cores)
	$(PY) recipes/reproduce.py $(ARGS)

test: $(ENV) ## the tests, under ten minutes on two cores
	$(PYTEST) $(WORKERS) -m "not slow and not gpu and not cluster and not many_ranks" $(ARGS)

test-slow: $(ENV) ## the tests that take longer
	$(PYTEST) $(WORKERS) -m "slow and not gpu and not cluster" $(ARGS)

test-multiprocess: $(ENV) ## all tests that start several processes, eight and more ranks included
	$(PYTEST) -m "(multiprocess or many_ranks) and not gpu and not cluster" $(ARGS)

# Their files alone are collected: others import what a GPU machine may lack. Compiling kernels is what takes the time.
test-gpu: $(ENV) ## the tests that need a CUDA device, compiling kernels on up to 16 cores
	$(PYTEST) -n logical --maxprocesses=16 --dist=worksteal -m "gpu and not multigpu" $$(grep -rlE "mark\.gpu" --include="test_*.py" tests) $(ARGS)

# Several at once: most of the time goes into starting ranks. More would take turns on the GPUs, which NCCL's kernels spin on, and
# each takes some 18 GB of every GPU.
test-multigpu: $(ENV) ## the tests that need several CUDA devices
	$(PYTEST) -n logical --maxprocesses=3 --dist=worksteal -m multigpu $$(grep -rlE "mark\.multigpu" --include="test_*.py" tests) $(ARGS)

test-cluster: $(ENV) ## the tests on an emulated cluster (root and iproute2)
	$(PYTEST) -m cluster $(ARGS)

check: lint test ## everything a change has to pass

lint: $(ENV) ## ruff, mypy and the import contracts
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c "from importlinter.cli import lint_imports_command; lint_imports_command()"
	$(PY) -m mypy

format: $(ENV) ## let ruff fix and format the code
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

package-check: $(ENV) ## build sdist and wheel, install the wheel in a clean environment, import it there
	$(PYTEST) tests/unit/test_packaging.py $(ARGS)

upstream-symbols: $(ENV) ## refresh the list of upstream symbols that src uses
	$(PY) tests/unit/test_imports.py --write

bench-gpu: $(ENV) ## the single-GPU benchmarks
	$(PY) -m benchmarks.bench_gpu $(ARGS)

bench-multigpu: $(ENV) ## the benchmarks on several GPUs of one host
	$(PY) -m benchmarks.bench_multigpu $(ARGS)

clean: ## remove the environment, caches and build products
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find src tests recipes benchmarks -name '__pycache__' -type d -prune -exec rm -rf {} + 2>/dev/null || true
	rm -rf src/*.egg-info
