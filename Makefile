# `make demo` and `make test` start from nothing; every set-up step leaves a stamp, so a second call is instant.
PYTHON ?= python3
# Elsewhere on Linux, PyPI's wheel brings CUDA along. The CPU one:
#   make TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu" demo
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := build/native
SANITIZE := build/sanitize

# The CUDA kernels are compiled where there is nvcc, on PATH or by the extra dev-cuda; emulated, everywhere.
CUDA = $(if $(shell command -v nvcc || ls $(VENV)/lib/python3*/site-packages/nvidia/cu13/bin/nvcc 2>/dev/null),ON,OFF)

.PHONY: demo test bench foreign docs modes native emulated strict lint sanitize pytest clean gpu gpu-build gpu-test gpu-bench
.DEFAULT_GOAL := test

demo: $(STAMPS)/demo native
	$(BIN)/python -m examples.g2p train $(ARGS)

# Every operator beside its peers, in three minutes; ARGS="--set full" measures all there is, in less than an hour.
BENCH := build/bench
bench: $(STAMPS)/dev native
	mkdir -p $(BENCH)
	$(BIN)/python -m benchmarks run --out $(BENCH)/run.jsonl $(or $(ARGS),--set quick)
	$(BIN)/python -m benchmarks report $(BENCH)/run.jsonl --summary --html $(BENCH)/page.html >/dev/null
	@echo "all rows and plots: $(BENCH)/page.html"

# Programs of other packages with fastseq in them, in a virtual environment of their own; a quarter of an hour on a quiet machine.
FOREIGN := build/foreign-venv
foreign: $(STAMPS)/dev native $(FOREIGN)/.stamp
	$(FOREIGN)/bin/python -m pytest tests/test_trainers.py
	$(BIN)/python -m benchmarks.foreign $(ARGS)

# The pages of docs/ and those made of docstrings, in build/site; a warning is an error.
SITE := build/docs-venv
docs: $(SITE)/.stamp
	$(SITE)/bin/python docs/pages.py build/pages
	$(SITE)/bin/python -m sphinx -W --keep-going -q build/pages build/site

test: lint sanitize pytest

# A process on every core; of the suite each has whole files, for what is built for a file's tests is built once.
pytest: $(STAMPS)/dev strict | lint sanitize
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto tests/interpreted $(ARGS); interpreted=$$?; \
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS) && exit $$interpreted

lint: $(STAMPS)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The table of docs/modes.md, from the results of its tests; what fails stands there too, and make fails.
modes: $(STAMPS)/dev native
	-$(BIN)/python -m pytest tests/modes --modes-table=build/modes.json $(ARGS)
	$(BIN)/python -m tests.modes.table build/modes.json

native: $(NATIVE)/build.ninja
	$(BIN)/cmake --build $(NATIVE) --target _C

# The CUDA kernels for a CPU, which only tests use.
emulated: $(NATIVE)/build.ninja
	$(BIN)/cmake -DFASTSEQ_EMULATE=ON $(NATIVE) >/dev/null
	$(BIN)/cmake --build $(NATIVE) --target _emulated

# All modules. Warnings are errors here, not in `native`: a user's newer compiler may warn of more.
strict: $(NATIVE)/build.ninja
	$(BIN)/cmake -DFASTSEQ_WERROR=ON -DFASTSEQ_EMULATE=ON -DFASTSEQ_CUDA=$(CUDA) $(NATIVE) >/dev/null
	$(BIN)/cmake --build $(NATIVE)

sanitize: $(SANITIZE)/build.ninja
	$(BIN)/cmake --build $(SANITIZE)
	$(SANITIZE)/fastseq_native_test names | xargs -n 1 -P $$(nproc) $(SANITIZE)/fastseq_native_test

# On a machine with a GPU, by the Python that has PyTorch for it, without network: docs/gpu.md.
OUT ?= build/gpu
gpu:
	$(PYTHON) -m benchmarks.gpu all $(OUT)

gpu-build gpu-test gpu-bench:
	$(PYTHON) -m benchmarks.gpu $(@:gpu-%=%) $(OUT)

clean:
	rm -rf build dist *.egg-info fastseq/_C.* fastseq/_cuda.* .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

$(NATIVE)/build.ninja: $(STAMPS)/build
	$(BIN)/cmake -S . -B $(NATIVE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTSEQ_OUTPUT_DIR=$(CURDIR)/fastseq \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

$(SANITIZE)/build.ninja: $(STAMPS)/build
	$(BIN)/cmake -S . -B $(SANITIZE) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DFASTSEQ_SANITIZE=ON

# What pyproject.toml's build-system asks for: without build isolation the installs below find it here.
$(STAMPS)/build:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastseq needs Python >= 3.10: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'setuptools>=77' pybind11 ninja cmake
	mkdir -p $(STAMPS) && touch $@

# torch by itself and first: no later command then has a reason to choose another one.
$(STAMPS)/torch: $(STAMPS)/build
	$(PIP) $(TORCH)
	$(PIP) 'numpy<2.4'
	touch $@

# The Python part only: the native module is built in place, incrementally, by `make native`.
$(STAMPS)/demo: $(STAMPS)/torch pyproject.toml
	FASTSEQ_NATIVE=0 $(PIP) --no-build-isolation -e '.[demo]'
	touch $@

$(FOREIGN)/.stamp: benchmarks/foreign/requirements.txt benchmarks/foreign/constraints.txt
	$(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(FOREIGN)/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c benchmarks/foreign/constraints.txt -r benchmarks/foreign/requirements.txt
	touch $@

# The pages about the package import it.
$(SITE)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	FASTSEQ_NATIVE=0 $(SITE)/bin/python -m pip install --quiet --disable-pip-version-check 'numpy<2.4' -e '.[docs]'
	touch $@

# JoeyNMT for its decoder alone, which the tests compare with: what that imports is in the dev extra. All of its
# requirements would bring TensorBoard, pandas, datasets and an old protobuf along.
$(STAMPS)/dev: $(STAMPS)/torch pyproject.toml
	FASTSEQ_NATIVE=0 $(PIP) --no-build-isolation -e '.[dev]'
	$(PIP) --no-deps joeynmt==2.3.0
	touch $@
