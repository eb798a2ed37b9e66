# Every target creates what it needs in .venv and can be run again at any time.
# An environment that is there already, without a network: make gpu-test BIN=/path/with/python, or PY=python3.
# Nothing is installed then. For the GPU targets it needs torch, triton, numpy, pytest, pytest-xdist, pytest-timeout,
# matplotlib, and fastkd itself: $(PY) -m pip install --no-index --no-deps --no-build-isolation --editable . (with
# setuptools >= 77), or, with nothing to install it with, a link in the checkout: ln -s ../kernels fastkd/kernels
PYTHON ?= python3
BIN := .venv/bin
PY := $(BIN)/python
SETUP := $(if $(filter command,$(origin BIN) $(origin PY)),,setup)

# Tests run side by side, each process on one thread: `make test WORKERS=8` where there are eight cores.
WORKERS ?= 2
PYTEST = $(PY) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help setup ext ext-cuda demo demo-ddp soak fuzz test test-fast lint format docs dist bench bench-scale aot gpu-test gpu-bench has-gpu clean

.DEFAULT_GOAL := setup

## Lists the targets. The text of each is the line with two # above it.
help:
	@awk '/^## / { text = substr($$0, 4); next } \
		/^[a-z-]+:/ && text { sub(/:.*/, ""); printf "%-12s %s\n", $$0, text } { text = "" }' $(firstword $(MAKEFILE_LIST))

## Creates .venv with everything pinned in constraints.txt, and installs fastkd editable with its extension.
setup: .venv/.installed

# Python compiles a module when it is first imported, and most modules of most packages never are. It has to keep what it
# compiled: without that, a process that imports torch and timm takes three times as long, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE
.venv/.installed: pyproject.toml setup.py constraints.txt fastkd/native.py $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastkd needs Python >= 3.11, found $$($(PYTHON) --version 2>&1); run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable '.[train,report,detection,export,examples,docs,dev]'
	$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

## Builds the C++/CUDA extension into fastkd/. `setup` goes on where this fails; here a failure is an error.
ext: $(SETUP)
	FASTKD_EXTENSION=1 $(PY) setup.py build_ext --inplace

## Compiles the extension's CUDA kernel for sm_90, without a GPU, and prints its registers and spills.
ext-cuda:
	nvcc -std=c++17 -O3 -arch=sm_90 -Xptxas -v -c csrc/pack_rows_cuda.cu -o /dev/null

## Distils students on handwritten digits by every method, prints a table and writes a report into runs/demo.
demo: $(SETUP)
	$(BIN)/fastkd demo

## Trains with one process and with two gloo ranks; fails when they differ by more than float32 rounding.
demo-ddp: $(SETUP)
	$(PY) -m fastkd.demo.ddp

## Makes 50 faults in a run (FAULTS=200): kills, two processes at once, full disks. Nothing may be lost, no bit differ.
soak: $(SETUP)
	$(PY) -m tests.robustness.soak --faults $(or $(FAULTS),50)

## Runs random cases of every loss against the definition, and shrinks one that differs: CASES=10000, ARGS="--triton".
fuzz: $(SETUP)
	OMP_WAIT_POLICY=passive $(if $(findstring --triton,$(ARGS)),TRITON_INTERPRET=1) \
		$(PY) -m tests.robustness.fuzz --cases $(or $(CASES),1000) $(ARGS)

# The tests in Triton's interpreter need its variable, and the others must not have it.
## Runs all tests.
test: $(SETUP)
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreted

## Runs the tests that do not take seconds, and leaves out the interpreter's: less than 90 seconds on two cores.
test-fast: $(SETUP)
	$(PYTEST) -m "not slow"

## Runs ruff (lint and format) and mypy.
lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## Formats the code and fixes what ruff can fix.
format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Where the site goes: make docs SITE=/tmp/site. With --quiet, --strict would let warnings pass.
SITE ?= site

## Builds the documentation as a site, whose first page is site/index.html. It needs no network.
docs: $(SETUP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir $(abspath $(SITE))

## Builds the source distribution and the wheel into dist/, and installs both under every Python that is here.
dist: $(SETUP)
	rm -rf dist
	FASTKD_DIST=$(CURDIR)/dist $(PY) -m pytest -q -rs tests/test_packaging.py

## Measures time and memory of the losses on this machine's CPU, into bench/results.
bench: $(SETUP)
	$(PY) -m bench

## Measures local gloo ranks and models 8 to 1024 GPUs; the time of one GPU comes with ARGS="--gpu-ms 3.5".
bench-scale: $(SETUP)
	$(PY) -m bench.scale $(ARGS)

## Compiles every kernel for every target of the launch table, without a GPU; fails on what would make it slow.
aot: $(SETUP)
	$(PY) -m bench.aot

# Where the results go and how long it may take: make gpu-bench OUTPUT=/tmp/results SECONDS=420.
GIVEN = $(if $(OUTPUT),--output $(OUTPUT)) $(if $(SECONDS),--seconds $(SECONDS))

## Runs the tests that need a GPU, part by part, or some parts: PARTS="smoke correctness". WORKERS, OUTPUT, SECONDS.
gpu-test: $(if $(SETUP),has-gpu) $(SETUP)
	$(PY) -m tests.battery $(PARTS) --workers $(WORKERS) $(GIVEN)

## Measures the losses on a GPU against eager code, torch.compile and installed peers. OUTPUT, SECONDS.
gpu-bench: $(if $(SETUP),has-gpu) $(SETUP)
	$(PY) -m bench.gpu $(GIVEN)

## Checks that there is a CUDA device, before an environment is made for nothing.
has-gpu:
	@test -e /dev/nvidiactl || command -v nvidia-smi >/dev/null || \
		{ echo "this target needs a CUDA device, and this machine has none"; exit 2; }

## Removes .venv, everything built or cached, and runs/.
clean:
	rm -rf .venv build dist site fastkd/_native.so *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks runs
