# `make train` and `make test` need nothing installed but Python 3.11 or newer, a C compiler and a package index.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Ranks of `make train`: every GPU that torch sees, else 2 CPU processes.
NPROC ?= $$($(VENV)/bin/python -c 'import torch; print(torch.cuda.device_count() or 2)')
# The program of `make train`: launch/compare_engines.py has --engine ddp, fsdp2, deepspeed and others.
PROGRAM ?= launch/train.py
# The folder of its metrics and checkpoints.
OUT ?= runs/sharded
# Passed on to the program, for example: make train ARGS="--steps 50 --precision bf16"
ARGS ?=
# Processes that run tests side by side, each with ranks of its own: more than cores, because ranks wait for each other.
WORKERS ?= 3
# Passed on to pytest, for example: make test PYTEST_ARGS="-k clip"
PYTEST_ARGS ?=

INSTALLED := $(VENV)/.installed
SIDE_BY_SIDE := -n $(WORKERS) --dist worksteal --durations 10
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}
# Every process would compile what it imports anew where the environment forbids to write bytecode.
BYTECODE := PYTHONDONTWRITEBYTECODE=

.PHONY: help env train lint test test-all mutants docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

env: $(INSTALLED) ## make the environment in .venv

# Without bytecode of 18,000 modules, of which a fifth is ever imported and then compiled: that is 60 s of 140.
$(INSTALLED): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("make: " + sys.executable + " is Python %d.%d, 3.11 or newer is needed. Pass PYTHON=/path/to/python3.11." % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt -e ".[train,test]"
	@touch $@

train: $(INSTALLED) ## train a language model with ShardedLion, about 2 minutes on 2 cores (NPROC, OUT, ARGS, PROGRAM)
	$(ONE_THREAD) $(BYTECODE) $(VENV)/bin/python -m torch.distributed.run --standalone --nproc-per-node $(NPROC) \
		$(PROGRAM) --out $(OUT) $(ARGS)
	@[ ! -f $(OUT)/metrics.jsonl ] || $(VENV)/bin/python -m lion_dist.cli plot $(OUT) --out $(OUT)/curves.png

lint: $(INSTALLED) ## ruff, the contract on imports, and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python --min-severity error --output-format min-text

test: lint ## lint and the quick tests (WORKERS, PYTEST_ARGS)
	$(ONE_THREAD) $(BYTECODE) $(VENV)/bin/python -m pytest -m "not slow" $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# pytest exits with 5 when no test is marked slow.
test-all: $(INSTALLED) ## the slow tests (WORKERS, PYTEST_ARGS)
	$(ONE_THREAD) $(BYTECODE) $(VENV)/bin/python -m pytest -m slow $(SIDE_BY_SIDE) $(PYTEST_ARGS) || [ $$? -eq 5 ]

mutants: $(INSTALLED) ## do the tests notice known faults, put into a copy one by one? some minutes (ARGS)
	$(ONE_THREAD) $(VENV)/bin/python -m tests.mutants.run $(ARGS)

docs: $(INSTALLED) ## the API reference of the public names, from their docstrings, in build/api/index.html
	$(VENV)/bin/python -m pdoc --docformat google --no-search -o build/api \
		lion_dist lion_dist.checkpoint lion_dist.integrations.deepspeed
	@echo "written: build/api/index.html"

clean: ## remove the environment, build products and caches; runs/ is kept
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
