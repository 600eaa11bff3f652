# Two commands matter: `make demo` shows what this does, `make test` proves it. Both need only Python and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TEST_WORKERS ?= 2

# One thread a test process: the tests run side by side, and sums keep one order.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

# The suites that run over every method, grid and family, or compress, train or serve whole models: `make test` runs them, and
# `make check`, which CI runs right before, need not do it too.
WIDE := $(addprefix --ignore=tests/,conformance parity pipeline recipes search docs diagnose cli engine vision kernels models evaluate \
	methods/train methods/reshape methods/filters)

.PHONY: help install demo test check bench test-all docs constraints clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(STAMP)  ## make .venv with the exact versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## compress the embedded model, reload it, compare, write report.html
	$(BIN)/fettle demo

test: $(STAMP)  ## the whole default test suite
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

check: $(STAMP)  ## format, lint, types, import contracts, fast tests (warnings are errors)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m 'not assets and not exhaustive and not slow' $(WIDE)

test-all: $(STAMP)  ## also the tests that need ../shared/assets
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m ''

bench: $(STAMP)  ## time and memory of compression, one JSON line each
	@for script in $(sort $(wildcard benchmarks/*/*.py)); do echo "# $$script" >&2; $(BIN)/python $$script || exit 1; done

docs: $(STAMP)  ## rewrite what is generated: docs/methods.md, outlines.json, the README's session
	$(BIN)/python tools/generate_docs.py
	$(BIN)/python tools/refresh_readme.py

constraints: $(STAMP)  ## write the installed versions to constraints.txt
	{ head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/^\(torch==[0-9.]*\)+cpu/\1/'; } > $(VENV)/constraints.new
	mv $(VENV)/constraints.new constraints.txt

clean:  ## remove what the commands above made, except .venv
	rm -rf dist demo-out demo-out.run report.html .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
