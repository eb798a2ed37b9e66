# Every target creates what it needs in .venv and can be run again at any time.
# An environment that is there already, without a network: make gpu-test BIN=/path/with/python, or PY=python3.
# Nothing is installed then. For the GPU targets it needs torch, triton, numpy, pytest, pytest-timeout, matplotlib, and
# fastkd itself: $(PY) -m pip install --no-index --no-deps --no-build-isolation --editable . (with setuptools >= 77),
# or, with nothing to install it with, a link in the checkout: ln -s ../kernels fastkd/kernels
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
SETUP := $(if $(filter command,$(origin BIN) $(origin PY)),,setup)

# Tests run side by side, each process on one thread: `make test WORKERS=8` where there are eight cores.
WORKERS ?= 2
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal

KERNEL_TESTS := tests/interpreted tests/ranks/test_pack.py
GPU_TESTS := $(KERNEL_TESTS) tests/ranks/test_exchange.py tests/operations/test_contract.py
# Small cases of every operation: compute-sanitizer makes a kernel tens of times slower.
DUAL_CASES := gpu_equals_the_definition and highest and (63-16 or 129-128)
SOFT_CASES := definition_on_a_gpu and 3.0 and (64-10- or 33-1001)
CONTRAST_CASES := contrast_on_a_gpu and 129-128 and (bfloat16 or float32 or tf32)
POOL_CASES := definition_on_a_gpu and (one-tile or rectangular) and (bfloat16 or float32)
SANITIZED := ($(DUAL_CASES)) or ($(CONTRAST_CASES)) or ($(SOFT_CASES)) or ($(POOL_CASES)) or 131069-1 or packs_on_a_gpu
SANITIZER := compute-sanitizer --report-api-errors no --error-exitcode 1

.PHONY: setup ext ext-cuda demo demo-ddp soak test test-fast lint format bench bench-scale aot gpu-test gpu-bench gpu-ready clean

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt fastkd/distributed/pack.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastkd needs Python >= 3.11, found $$($(PYTHON) --version 2>&1); run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,export,dev]'
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The C++/CUDA extension, into fastkd/. `setup` tries it and goes on without it; here a failure is an error.
ext: $(SETUP)
	FASTKD_EXTENSION=1 $(PY) setup.py build_ext --inplace

# Compiles the CUDA kernel of the extension for sm_90, without a GPU, and prints its registers and spills.
ext-cuda:
	nvcc -std=c++17 -O3 -arch=sm_90 -Xptxas -v -c csrc/pack_rows_cuda.cu -o /dev/null

demo: $(SETUP)
	$(BIN)/fastkd demo

# One process and two gloo ranks, side by side; fails when they differ by more than float32 rounding.
demo-ddp: $(SETUP)
	$(PY) -m fastkd.demo.ddp

# Kills a training run 20 times at random moments; fails unless the resumed run ends as the uninterrupted one, bit for bit.
soak: $(SETUP)
	$(PY) -m tests.helpers.imagenet_like soak --kills 20

# All tests. Those in Triton's interpreter need its variable, and the others must not have it.
test: $(SETUP)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted

# Less than 90 seconds on two cores: without the tests that take seconds, and without the interpreter's.
test-fast: $(SETUP)
	$(PYTEST) -m "not slow"

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(SETUP)
	$(PY) -m bench

# Several ranks: measured on local gloo ranks, modelled for 8 to 1024 GPUs. Pass the GPU's time with ARGS="--gpu-ms 3.5".
bench-scale: $(SETUP)
	$(PY) -m bench.scale $(ARGS)

# Compiles every kernel for every target of the launch table, without a GPU, and fails on what would make it slow.
aot: $(SETUP)
	$(PY) -m bench.aot.dual_softmax

# The sanitizer comes last, so that a machine without a usable one still shows what the tests found.
gpu-test: gpu-ready
	$(PY) -m pytest -m gpu $(GPU_TESTS)
	@command -v compute-sanitizer >/dev/null || \
		{ echo "gpu-test: the tests passed; the sanitizer step fails: compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"; exit 1; }
	@$(SANITIZER) $(PY) -c 'import torch; torch.ones(8, device="cuda").sum().item()' || \
		{ echo "gpu-test: the tests passed; the sanitizer step fails: compute-sanitizer refuses this device or its driver"; exit 1; }
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) \
		$(PY) -m pytest -m gpu --timeout 1800 $(KERNEL_TESTS) -k "$(SANITIZED)"

gpu-bench: gpu-ready
	$(PY) -m bench.gpu

gpu-ready: $(SETUP)
	@$(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "this target needs a CUDA device")'
	@$(PY) -c 'import fastkd.kernels' || \
		{ echo "fastkd is not installed in $(PY); the first lines of the Makefile say how, also without a network"; exit 1; }

clean:
	rm -rf .venv build fastkd/_native.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks runs
