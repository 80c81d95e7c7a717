# Two targets are all a newcomer needs, each from a fresh clone: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Everything runs without a model hub; what is not installed is not fetched.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help demo test test-slow lint types format gpu bench clean

help:
	@echo "make demo       compress the example corpus and ask it a question, offline"
	@echo "make test       lint, types on the built wheel, and the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make gpu        GPU tests and all benchmarks in one ten-minute run (needs a CUDA device)"
	@echo "make bench      the benchmarks, on this machine"

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

demo: $(READY)
	$(BIN)/ctxdocs compress examples/corpus --library build/demo-library
	$(BIN)/ctxdocs ask "When was the lowest water level measured at Tarrow Head?" --library build/demo-library -k 2
	$(BIN)/ctxdocs ask "When was the lowest water level measured at Tarrow Head?" --library build/demo-library -k 2 --mode text
	$(BIN)/ctxdocs info --library build/demo-library

test: $(READY) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The checkout's ctxdocs/ folder would shadow the subpackages mapped beside it: types are checked on the built wheel.
types: $(READY)
	rm -rf build/types build/lib && mkdir -p build/types
	$(BIN)/python -m build --wheel --no-isolation --outdir build/types . > build/types/build.log 2>&1 || (cat build/types/build.log; false)
	$(BIN)/python -m zipfile -e build/types/*.whl build/types/site
	cd build/types/site && ../../../$(BIN)/mypy --config-file ../../../pyproject.toml -p ctxdocs

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Uses the machine's own Python: a bare GPU machine has torch and transformers and can install nothing else. build/lib
# is removed because what it holds ends up in the wheel, stale or not.
gpu:
	rm -rf build/site build/lib
	$(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/site .
	PYTHONPATH=build/site $(PYTHON) benchmarks/gpu.py --minutes 9

bench: $(READY)
	$(BIN)/python benchmarks/compress.py
	$(BIN)/python benchmarks/ask.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/methods.py --plot build/methods.svg
	$(BIN)/python benchmarks/kv.py --plot build/kv.svg

clean:
	rm -rf build dist *.egg-info
