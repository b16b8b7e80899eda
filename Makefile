# What a developer runs, by name; `make` alone lists it.
#
# PYTHON  the interpreter that the environment is made from
# VENV    where it lies; `make test VENV=` uses PYTHON's own packages as they are and sets nothing up
# EXTRAS  extras to install with the package, such as EXTRAS=test,lint,cuda13
# VLLM    the marks of tests that test-vllm runs: 'vllm and not release' is what a change must pass

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= test,lint
VLLM ?= vllm
VLLM_VENV := .venv-vllm

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
else
RUN := $(VENV)/bin/python
SETUP := $(VENV)/.setup
DEMO_SETUP := $(VENV)/.setup-demo
endif

# The build sees this environment's setuptools: an isolated build would fetch an unpinned one.
INSTALL = $(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

VLLM_PIP = $(VLLM_VENV)/bin/python -m pip --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo lint format type test test-models test-vllm test-gpu chaos bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(SETUP)  ## make .venv with the package, its test and lint tools, at the versions of constraints.txt

demo: $(DEMO_SETUP)  ## train a real model, update running servers after each step, prove every weight
	@$(RUN) examples/demo/run.py

lint: $(SETUP)  ## ruff: rules and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(SETUP)  ## let ruff sort the imports and format the files
	$(RUN) -m ruff check --fix --select I .
	$(RUN) -m ruff format .

type: $(SETUP)  ## mypy, strict
	$(RUN) -m mypy

test: $(SETUP)  ## all tests that this machine can run, two at a time
	$(RUN) -m pytest -n 2

test-models: $(DEMO_SETUP)  ## real model classes: updated, checked, saved and loaded, in process and tensor-parallel
	$(RUN) -m pytest -n 2 -m models tests/zoo

test-vllm: $(VLLM_VENV)/.setup  ## a real vLLM, in an environment of its own: after updates, like one loaded anew
	$(VLLM_VENV)/bin/python -m pytest -m "$(VLLM)" tests/vllm

test-gpu: $(SETUP)  ## the tests that need CUDA devices, one at a time
	$(RUN) -m pytest -n 0 -m "cuda or gpus"

chaos: $(SETUP)  ## random faults of ranks, hub and link, from a seed, for 100 seconds (docs/reliability.md)
	$(RUN) tests/support/chaos.py --seed 1 --seconds 100 --links

# A benchmark that exits with 77 lacks what it compares with.
bench: $(SETUP)  ## run every benchmark on what this machine has
	@set -e; for script in $$(grep -L "required=True" $$(grep -l __main__ benchmarks/*.py)); do echo "== $$script"; $(RUN) $$script || [ $$? = 77 ]; done

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info weightbus/*/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.setup: pyproject.toml constraints.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.setup-demo: $(VENV)/.setup
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

# All versions are pinned, and what vLLM asks for besides is not installed: see the file. Of 0.33 there is no build
# for the CPU: its Python files lie in a folder of their own.
$(VLLM_VENV)/.setup: pyproject.toml constraints-vllm.txt setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --no-deps --requirement constraints-vllm.txt
	$(VLLM_PIP) install --no-deps --no-build-isolation --editable .
	$(VLLM_PIP) download --no-deps --only-binary :all: --dest $(VLLM_VENV)/wheels vllm==0.33.0
	$(VLLM_VENV)/bin/python tests/vllm/python_files.py $(VLLM_VENV)/wheels $(VLLM_VENV)/vllm-0.33
	rm -rf $(VLLM_VENV)/wheels
	@touch $@
