# t5pegasus: `make quickstart` shows the whole flow, `make test` checks it. Everything is installed into .venv here.
#
# A target done before is not done again; an interrupted one continues. VENV=path puts the environment elsewhere,
# PYTHON=path chooses the interpreter, ARGS passes flags on: make test ARGS=tests/text.

VENV ?= .venv
.DEFAULT_GOAL := help

SUITABLE := 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'

# The first of these that runs (a pyenv shim may exist and not run), is new enough and can create environments.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c $(SUITABLE) >/dev/null 2>&1 && echo $$python && break; done)

# These stand for what is done; a changed pyproject.toml makes the installations out of date.
CREATED := $(VENV)/.created
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_PEERS := $(VENV)/.installed-peers
INSTALLED_TPU := $(VENV)/.installed-tpu

# Tests spend their time compiling, which takes one core.
PARALLEL ?= 2

# Steps on a CPU take an eighth less: XLA takes its buffers anew at every step (benchmarks/host_memory.py).
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: help install quickstart test test-parity test-all test-tpu-compile lint types contracts

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## the t5pegasus command, in .venv/bin
	@echo "installed: $(VENV)/bin/t5pegasus"

quickstart: $(INSTALLED)  ## the whole flow on the embedded sample: minutes on a CPU, asks nothing
	$(HUGE_PAGES) $(VENV)/bin/t5pegasus quickstart $(ARGS)

test: $(INSTALLED_DEV)  ## the tests, without the slow ones and without other programs
	$(VENV)/bin/python -m pytest -n $(PARALLEL) --dist loadfile --no-loadscope-reorder \
	  -m "not slow and not peers and not tpu_compile" $(ARGS)

# A missing folder fails here, and so does any test that skips.
test-parity: $(INSTALLED_DEV)  ## the tests against golden cases in ../shared/data, or in the folder T5PEGASUS_DATA
	T5PEGASUS_PARITY=required $(VENV)/bin/python -m pytest -m "parity and not peers" $(ARGS)

# The peers are torch, transformers, CTranslate2 and others. On Linux the package index gives torch with CUDA, several
# GB; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-all takes the build for CPUs.
test-all: $(INSTALLED_PEERS)  ## all tests, also those beside other programs, which are installed for it
	T5PEGASUS_PEERS=required $(VENV)/bin/python -m pytest -m "not tpu_compile" $(ARGS)

# The TPU compiler needs no TPU, but 1.4 GB on the disk and minutes for each program.
test-tpu-compile: $(INSTALLED_TPU)  ## the train step compiled for TPUs, and what it may not do
	T5PEGASUS_TPU_COMPILE=required $(VENV)/bin/python -m pytest tests/plan -m tpu_compile $(ARGS)

lint: $(INSTALLED_DEV)  ## style
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(INSTALLED_DEV)  ## type annotations
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

contracts: $(INSTALLED_DEV)  ## which package may import which
	$(VENV)/bin/lint-imports

# An environment that works is taken as it is; creating it again over a half-created one repairs it.
$(CREATED):
	@if [ -f $(VENV)/pyvenv.cfg ] && $(VENV)/bin/python -c $(SUITABLE) 2>/dev/null \
		&& $(VENV)/bin/python -m pip --version >/dev/null 2>&1; then \
		touch $@; exit 0; \
	fi; \
	python="$(PYTHON)"; \
	if ! "$$python" -c $(SUITABLE) >/dev/null 2>&1; then \
		echo "t5pegasus needs Python 3.11 or newer with its venv module$${python:+, which $$python is not}:" \
			"install one, for example with" \
			"'sudo apt install python3.11 python3.11-venv' or 'pyenv install 3.12', and if it is not on the PATH" \
			"name it with 'make PYTHON=/path/to/python3.12'" >&2; \
		exit 2; \
	fi; \
	echo "creating $(VENV) with $$($$python --version)"; \
	$$python -m venv "$(VENV)" && touch $@

$(INSTALLED): pyproject.toml | $(CREATED)
	$(VENV)/bin/python -m pip install --editable .
	@touch $@

$(INSTALLED_DEV): pyproject.toml | $(CREATED)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	@touch $@ $(INSTALLED)

$(INSTALLED_TPU): pyproject.toml | $(CREATED)
	$(VENV)/bin/python -m pip install --editable '.[dev,tpu]'
	@touch $@ $(INSTALLED) $(INSTALLED_DEV)

$(INSTALLED_PEERS): pyproject.toml | $(CREATED)
	$(VENV)/bin/python -m pip install --editable '.[dev,peers]'
	@touch $@ $(INSTALLED) $(INSTALLED_DEV)
