# Every target creates what it needs in .venv and can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup ext ext-cuda demo demo-ddp test lint format bench bench-scale aot gpu-test gpu-bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastkd needs Python >= 3.11, found $$($(PYTHON) --version 2>&1); run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[train,dev]'
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The C++/CUDA extension, into fastkd/. `setup` tries it and goes on without it; here a failure is an error.
ext: setup
	FASTKD_EXTENSION=1 $(BIN)/python setup.py build_ext --inplace

# Compiles the CUDA kernel of the extension for sm_90, without a GPU, and prints its registers and spills.
ext-cuda:
	nvcc -std=c++17 -O3 -arch=sm_90 -Xptxas -v -c csrc/pack_rows_cuda.cu -o /dev/null

demo: setup
	$(BIN)/fastkd demo

# One process and two gloo ranks, side by side; fails when they differ by more than float32 rounding.
demo-ddp: setup
	$(BIN)/python -m fastkd.trainer.demo_ddp

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m bench

# Several ranks: measured on local gloo ranks, modelled for 8 to 1024 GPUs. Pass the GPU's time with ARGS="--gpu-ms 3.5".
bench-scale: setup
	$(BIN)/python -m bench.scale $(ARGS)

# Compiles every kernel for every target of the launch table, without a GPU, and fails on what would make it slow.
aot: setup
	$(BIN)/python -m bench.aot

gpu-test: setup
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "gpu-test needs a CUDA device")'
	$(BIN)/python -m pytest -m gpu
	@command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: it comes with the CUDA toolkit"; exit 1; }
	compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -m gpu -k "equals_the_definition and (63-16 or 129-128)"

gpu-bench: setup
	$(BIN)/python -m bench.gpu

clean:
	rm -rf .venv build fastkd/_native.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks runs
