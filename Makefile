# Every target works from a bare clone; what is needed is Python 3.10 or newer (3.11 is what CI uses), make and a C library.
.PHONY: install demo test lint format conformance docs bench gpu-build gpu-sanitize clean

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# PyPI's torch for Linux brings 3 GB of CUDA; this index has the CPU build. Used where it answers.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# mypy does not follow the editable install's renamed folders; it gets a folder of links in their installed shape, without
# its cache, which takes changed files behind links for absent ones.
TYPES := build/types

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	index=$$($(BIN)/python -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1] + "/torch/", timeout=5)' \
	    $(TORCH_INDEX) 2>/dev/null && echo "--extra-index-url $(TORCH_INDEX)"); \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$index --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/digits.py

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto -m 'not conformance'

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(TYPES)/bnncc
	ln -sfn $(addprefix $(CURDIR)/,$(wildcard bnncc/*.py bnncc/py.typed bnncc/[a-z]*) passes runtime targets) $(TYPES)/bnncc
	MYPYPATH=$(TYPES) $(BIN)/mypy --no-incremental

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# 3,000 points of the full exactness grid, drawn with a printed seed; SEED=n repeats a draw.
conformance: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto -m conformance tests/conformance tests

# docs/support.md: what compiles, and how exactly, measured.
docs: $(STAMP)
	UPDATE_DOCS=1 $(BIN)/python -m pytest -m 'conformance or not conformance' tests/support

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# Everything that a machine with a GPU needs to test and to measure (docs/benchmarks.md), compiled on any machine.
GPU_TARGET ?= cuda-sm_90
GPU_ARTIFACTS ?= build/gpu

gpu-build: $(STAMP)
	$(BIN)/python -m benchmarks.cuda build $(GPU_ARTIFACTS) --target $(GPU_TARGET)

# On the machine with the GPU, with its own Python: NumPy, pytest, and CUDA's compute-sanitizer.
gpu-sanitize:
	for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --target-processes all --error-exitcode 1 \
	        $(PYTHON) -m pytest -q tests/gpu -k demo_network --artifacts $(GPU_ARTIFACTS) || exit 1; \
	done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
