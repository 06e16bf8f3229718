# Every target works on a machine that has Python 3.11 or newer with pip and venv, and nothing else.
# The first one that is run creates .venv; later ones use it until pyproject.toml or
# constraints.txt changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_ECOSYSTEM := $(VENV)/.installed-ecosystem
INSTALLED_DOCS := $(VENV)/.installed-docs
INSTALLED_RELEASE := $(VENV)/.installed-release
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
# Extra arguments of `demo`, `test`, `extras` and `bench`, as in: make test ARGS="-k budget"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-fuzz test-wheel test-extras records lint house types docs \
  architecture extras wheel wheel-check bench clean

help:  ## list the targets
	@echo "Usage: make TARGET [PYTHON=python3.12] [ARGS=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

demo: $(INSTALLED)  ## run the reference model at several budgets; writes out/demo
	$(BIN)/ditdial demo --output out/demo $(ARGS)

# The models are tiny: two processes of one thread each take half the time of one with two.
test: $(INSTALLED_ECOSYSTEM)  ## run the tests that need neither a GPU, the network nor minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

# Each runs a test that takes minutes and writes benchmarks/records/NAME.json, see scripts/records.py.
test-slow: $(INSTALLED_ECOSYSTEM)  ## run the tests that take minutes; writes a record
	OMP_NUM_THREADS=1 $(BIN)/python scripts/records.py run $@

test-fuzz: $(INSTALLED_ECOSYSTEM)  ## try thousands of odd files, commands, orders, cells and fields; writes a record
	OMP_NUM_THREADS=1 $(BIN)/python scripts/records.py run $@

test-wheel: $(INSTALLED_RELEASE)  ## run wheel-check; writes a record
	$(BIN)/python scripts/records.py run $@

test-extras: $(INSTALLED)  ## resolve the extras one by one; writes a record
	$(BIN)/python scripts/records.py run $@

records: $(INSTALLED)  ## check that each of these records is there and not older than what it covers
	$(BIN)/python scripts/records.py check

lint: $(INSTALLED)  ## check style and format, the order of imports, and the sizes of `house`
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python scripts/house.py

house: $(INSTALLED)  ## print the sizes of files, functions and classes; fails beyond their limits
	$(BIN)/python scripts/house.py

types: $(INSTALLED)  ## check types under src/ with pyrefly
	$(BIN)/pyrefly check

docs: $(INSTALLED_DOCS)  ## build the documentation into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -W -b html docs docs/_build/html

architecture: $(INSTALLED)  ## draw the pictures of docs/architecture.md from the code
	$(BIN)/python scripts/architecture.py

extras: $(INSTALLED)  ## resolve all extras with the pins in constraints.txt; installs nothing
	$(BIN)/python scripts/check_extras.py $(ARGS)

wheel: $(INSTALLED_RELEASE)  ## build the wheel and the source distribution into dist/
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/twine check --strict dist/*
	$(BIN)/python scripts/check_wheel.py dist

wheel-check: wheel  ## install the wheel into an empty environment and run the demo there
	$(BIN)/python scripts/check_wheel.py --demo dist

bench: $(INSTALLED)  ## measure seconds and memory on this machine; writes JSON
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:  ## remove caches and built files; keeps .venv, out/ and runs/
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache
	find . \( -path ./$(VENV) -o -path ./out -o -path ./runs \) -prune -o \
	  -type d -name __pycache__ -prune -exec rm -rf {} +

# The extra `eval` is left out: its torchvision must be built for the same device as torch.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/pip \
	  || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "ditdial needs Python 3.11 or newer, and '$(PYTHON)' is" \
	    "$$($(PYTHON) --version 2>/dev/null || echo 'not there')." \
	    "Name another one: make PYTHON=python3.12 TARGET" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) -e '.[train,plot,dev]'
	@touch $@

# Only for the tests: diffusers imports torchao wherever it is installed, which takes half a second
# and prints five lines before each command.
$(INSTALLED_ECOSYSTEM): $(INSTALLED)
	$(PIP_INSTALL) -e '.[ecosystem]'
	@touch $@

$(INSTALLED_DOCS): $(INSTALLED)
	$(PIP_INSTALL) -e '.[docs]'
	@touch $@

$(INSTALLED_RELEASE): $(INSTALLED)
	$(PIP_INSTALL) -e '.[release]'
	@touch $@
