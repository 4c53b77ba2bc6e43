# make run    virtual environment, install, the whole loop            (ARGS="--recipe tiny --out runs/x key=value")
# make test   virtual environment, install with test extras, lint, types, import rules, tests
# make test-full   the tests that take minutes: kills, full disk, large checkpoints
#
# make gpu-test   tests that run on a GPU, with this machine's python and packages: no network, no virtual environment
# make gpu-bench PART=kernels|sampler|train|peers   rows into benchmarks/results/<device>/, each part under 8 minutes
#
# SELFREWARD_NO_VENV=1   use the current interpreter instead of .venv
# PIP_ARGS="..."         options for every pip call, for instance the index of torch's CPU or CUDA builds
# PYTHON=python3.12      the interpreter of the virtual environment (3.11 or later)

PYTHON ?= python3
PIP_ARGS ?=
PART ?= kernels
ARGS ?=

ifdef SELFREWARD_NO_VENV
PY := $(PYTHON)
VENV_READY :=
STAMPS := .stamps/current
else
PY := .venv/bin/python
VENV_READY := .venv/ready
STAMPS := .venv
endif

PIP := $(PY) -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: run install test test-full gpu-test gpu-bench lint clean

run: $(STAMPS)/run
	$(PY) -m selfreward.run $(ARGS)

install: $(STAMPS)/run

test: $(STAMPS)/test lint
	$(PY) -m pytest -m "not full"

test-full: $(STAMPS)/test $(STAMPS)/triton-3.6.0 $(STAMPS)/readers
	SELFREWARD_OLD_TRITON=$(abspath $(STAMPS)/triton-3.6.0) SELFREWARD_READERS=$(abspath $(STAMPS)/readers) $(PY) -m pytest -m full --durations=10

gpu-test:
	@$(PYTHON) -c 'import torch' 2>/dev/null || (echo "$(PYTHON) has no torch: make $@ PYTHON=another"; exit 1)
	@$(PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "torch finds no GPU here")'
	$(PYTHON) -m pytest -m "gpu or gpu_too" --durations=10 $$(grep -rlE "mark\.gpu" tests)

gpu-bench:
	$(PYTHON) -m benchmarks.gpu $(PART)

lint: $(STAMPS)/test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
	$(PY) -c "import clang_format; clang_format.clang_format()" --dry-run -Werror csrc/* tests/csrc/*.cpp tests/csrc/*.h

clean:
	rm -rf .venv .stamps build dist *.egg-info engine/_C*.so

.venv/ready:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	touch $@

# torch first and alone, so that no other package decides which build of it is taken.
$(STAMPS)/torch: $(VENV_READY) constraints.txt
	mkdir -p $(STAMPS)
	$(PIP) torch
	touch $@

$(STAMPS)/run: $(STAMPS)/torch $(SOURCES)
	$(PIP) -e .
	touch $@

$(STAMPS)/test: $(STAMPS)/torch $(SOURCES)
	$(PIP) -e '.[test]'
	touch $@ $(STAMPS)/run

# The oldest Triton that kernels are compiled with, beside the one that is installed.
$(STAMPS)/triton-3.6.0: $(STAMPS)/test
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps --target $@ triton==3.6.0
	touch $@

# AlpacaEval and FastChat, to read with their own code what ours writes; without what they need to call a judge.
$(STAMPS)/readers: $(STAMPS)/test
	$(PY) -m pip install --disable-pip-version-check -q $(PIP_ARGS) --no-deps --target $@ alpaca_eval==0.6.6 fschat==0.2.36
	touch $@
