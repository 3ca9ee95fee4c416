# make bench   install everything into .venv, build, run the benchmark (under 6 minutes after the install)
# make bench-peers  race whole DNC sequences against torch.compile, JAX and PyPI's dnc (under 25 minutes); adds JAX to .venv
# make test    the same environment, all tests
# make lint    ruff, mypy and clang-format
# make asan    the op tests on an extension built with address and undefined-behaviour checks
# make aot     compile every Triton kernel for sm_80, sm_90 and sm_100 and rewrite its table of resources
# make gpu     on a machine with a GPU: build with the installed PYTHON, run the GPU tests and benchmark
# make reproduce  train what docs/results.md reports and is not there yet, on all cores, and write it anew (over an hour
#              from nothing on 2 cores); it can be stopped and goes on
# make readme  regenerate the figures in README.md from bench/results
# make wheel   build a wheel and try it from an empty folder

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
CPP := $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp')
SOURCES := $(filter csrc/%,$(CPP)) CMakeLists.txt setup.py pyproject.toml fastmem/_version.py fastmem/_env.py

export PYTHONUNBUFFERED := 1
.PHONY: bench bench-peers test lint asan aot gpu reproduce readme wheel clean
.DELETE_ON_ERROR:

bench: $(BUILT)
	$(BIN)/python -m fastmem bench

# JAX is for this target alone. One thread from the start: what starts threads of its own finds one.
bench-peers: $(BUILT)
	$(PIP) install --quiet -c constraints.txt jax
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.sequences

# The tests of C++ call cmake, hence the PATH.
test: $(BUILT)
	@echo "== tests, C++ kernels and references"
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m "not interp"
	@echo "== tests, Triton kernels under the interpreter"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m interp tests/kernels

lint: $(BUILT)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

asan: $(INSTALLED)
	@echo "== building the extension with address and undefined-behaviour checks"
	FASTMEM_DEBUG_BUILD=asan $(PIP) install --no-build-isolation --no-deps --target build/asan-site --upgrade .
	@echo "== op tests"
	cd build/asan-site && ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  PYTHONPATH="$$PWD" $(CURDIR)/$(BIN)/python -P $(CURDIR)/tests/asan.py

aot: $(BUILT)
	$(BIN)/python -m tests.aot

gpu:
	@$(PYTHON) bench/gpu.py --probe; found=$$?; \
	if [ $$found -eq 3 ]; then exit 0; elif [ $$found -ne 0 ]; then exit $$found; fi; \
	echo "== building against $$($(PYTHON) -c 'import torch; print("torch", torch.__version__)')"; \
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable . && \
	$(PYTHON) -m pytest -m gpu && $(PYTHON) bench/gpu.py

# One thread a run: they are small, and run side by side.
reproduce: $(BUILT)
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.learn

readme: $(BUILT)
	$(BIN)/python -m bench.readme

# Modules since removed and wheels of other versions would stay.
wheel: $(INSTALLED)
	rm -rf build/lib* dist/fastmem_kernels-*.whl
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python tests/try_wheel.py dist

$(BUILT): $(INSTALLED) $(SOURCES)
	@echo "== building the C++ extension"
	$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $@

$(INSTALLED): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fastmem needs Python 3.11 or later: name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@command -v c++ > /dev/null || { echo "fastmem needs a C++20 compiler: install g++ 11 or later"; exit 1; }
	@$(PYTHON) -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "fastmem needs the headers of Python: install python3-dev (or python3-devel)"; exit 1; }
	@echo "== creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "the venv module of Python is missing: install python3-venv"; exit 1; }
	@echo "== installing torch"
	$(PIP) install --progress-bar on -c constraints.txt torch numpy
	@echo "== installing build, test and benchmark tools"
	$(PIP) install -c constraints.txt setuptools wheel cmake ninja pybind11 pytest pytest-benchmark hypothesis ruff mypy clang-format \
	  typer rich matplotlib jinja2 pydantic scikit-learn
	$(PIP) install -c constraints.txt --no-deps triton dnc
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastmem/_C*.so
