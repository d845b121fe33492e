# GPU=1 sets up vLLM for CUDA; VENV=DIR installs elsewhere; WORKERS=N tests in N processes; ARGS='...' is handed to pytest or to the benchmark.
VENV ?= .venv
GPU ?= 0
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
# A file's tests stay together: they share their engines. tests/conftest.py puts the files in order.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
KERNEL_TESTS := tests/ops/test_references.py $(filter-out %_cuda.py,$(wildcard tests/ops/test_kernels*.py))
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer

.DEFAULT_GOAL := help
.PHONY: help install test test-long test-avx2 test-gpu bench bench-smollm2 bench-kernels bench-gpu soak check lint docs sanitize build wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@head -n 1 $(MAKEFILE_LIST)

install: ## create the virtual environment and install vLLM and qm_spec; nothing to do: under a second
	@./install.sh --venv "$(VENV)" $(if $(filter 1,$(GPU)),--gpu)

test: install ## run the tests, those that start vLLM too, but not the long ones
	$(PYTEST) $(ARGS)

test-long: install ## run the tests that take minutes each, such as every engine feature against plain decoding
	$(PYTEST) -m long $(ARGS)

bench: install ## measure speculative decoding on the shipped pair
	$(BIN)/python benchmarks/spec.py $(ARGS)

bench-smollm2: install ## fetch SmolLM2-135M-Instruct and measure its shipped drafter on Spec-Bench, in bfloat16
	$(BIN)/qm-spec fetch smollm2-135m-instruct --out results/smollm2-135m-instruct
	$(BIN)/python benchmarks/spec.py --target results/smollm2-135m-instruct --dtype bfloat16 --benchmark spec_bench \
		--data benchmarks/data --per-category 2 --skip-long --stop-at-eos --methods none,ngram-16,qm_spec-prior,qm_spec \
		--repeats 1 --out results/smollm2 $(ARGS)

bench-kernels: install ## measure the kernels against PyTorch on the CPU, in one table
	$(BIN)/python benchmarks/bench_kernels.py $(ARGS)

soak: install ## load a server for an hour and check each greedy token against plain decoding, then compare speeds
	$(BIN)/python benchmarks/soak.py $(ARGS)

test-avx2: install ## run the kernels' tests with what a processor without AVX-512 gets
	CXXFLAGS=-DQM_SPEC_NO_AVX512 QM_SPEC_BUILD=required $(BIN)/python setup.py -q build \
		--build-lib build/avx2 --build-temp build/avx2-objects
	PYTHONPATH=build/avx2 QM_SPEC_BACKEND=compiled $(BIN)/pytest $(KERNEL_TESTS) $(ARGS)

test-gpu bench-gpu: GPU := 1

test-gpu: install ## run the CUDA kernels' tests on this machine's GPU
	QM_SPEC_BACKEND=compiled $(BIN)/python -m pytest -m gpu $(ARGS)

bench-gpu: test-gpu ## measure the kernels on this machine's GPU, in one table
	$(BIN)/python benchmarks/bench_kernels.py --device cuda $(ARGS)

sanitize: install ## run the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	CXXFLAGS="$(SANITIZERS) -g -O1" QM_SPEC_BUILD=required $(BIN)/python setup.py -q build \
		--build-lib build/sanitize --build-temp build/sanitize-objects
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/sanitize QM_SPEC_BACKEND=compiled \
		$(BIN)/pytest $(KERNEL_TESTS) $(ARGS)

check: lint ## lint, then the tests that do not start vLLM
	$(PYTEST) -m "not vllm and not long" $(ARGS)

lint: install ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: install ## build the site in build/site; a dead link is an error
	$(BIN)/python docs/hooks/cli.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: install ## sdist, and the wheel made from it, in dist/
	$(BIN)/python -m build --no-isolation

wheel: install ## the wheel with the CPU and the CUDA kernels, in dist/, then its test; needs nvcc, takes minutes
	$(BIN)/python -m pip install -q --group wheel
	rm -rf build/wheel
	QM_SPEC_BUILD=required QM_SPEC_CUDA=1 $(BIN)/python -m build --no-isolation --outdir build/wheel
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --strip --exclude 'libtorch*.so' --wheel-dir build/wheel/manylinux \
		build/wheel/*.whl
	QM_SPEC_WHEEL=$$(echo build/wheel/manylinux/*.whl) $(BIN)/python -m pytest tests/packaging/test_wheel.py $(ARGS)
	mkdir -p dist && mv build/wheel/manylinux/*.whl dist/

clean: ## remove what builds and tools left; results and the virtual environment stay
	rm -rf build dist qm_spec.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path "./$(VENV)" -prune -o -name __pycache__ -exec rm -rf {} +
