# GPU=1 sets up vLLM for CUDA; VENV=DIR installs elsewhere; ARGS='...' is handed to pytest or to the benchmark.
VENV ?= .venv
GPU ?= 0
ARGS ?=
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install test bench check lint build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@head -n 1 $(MAKEFILE_LIST)

install: ## create the virtual environment and install vLLM and qm_spec; nothing to do: under a second
	@./install.sh --venv "$(VENV)" $(if $(filter 1,$(GPU)),--gpu)

test: install ## run every test, those that start vLLM too
	$(BIN)/python -m pytest $(ARGS)

bench: install ## measure speculative decoding on the shipped pair
	$(BIN)/python benchmarks/spec.py $(ARGS)

check: lint ## lint, then the tests that do not start vLLM
	$(BIN)/python -m pytest -m "not vllm" $(ARGS)

lint: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

build: install ## sdist, and the wheel made from it, in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what builds and tools left; results and the virtual environment stay
	rm -rf build dist qm_spec.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path "./$(VENV)" -prune -o -name __pycache__ -exec rm -rf {} +
