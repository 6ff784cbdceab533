# Every target makes what it needs. Python: the newest of 3.13, 3.12 and 3.11 that runs here, or the one that you name:
# `make test PYTHON=/path/to/python3.12`. TORCH chooses the build of PyTorch; on Linux the registry's has CUDA inside.
# A smaller one for the CPU alone comes from PyTorch's own index:
# `make test TORCH="torch torchvision --index-url https://download.pytorch.org/whl/cpu"`.
PYTHON ?= $(shell for v in 3.13 3.12 3.11; do python$$v -c "import ensurepip, venv" >/dev/null 2>&1 && { echo python$$v; exit; }; done; echo python3)
VENV ?= .venv
TORCH ?= torch torchvision
BIN := $(VENV)/bin
WORKERS ?= 2
# a file's tests run in one worker, so that it makes what they share once. By default pytest-xdist begins with the files of
# most tests; the few long tests would come last, and the other worker would wait for them
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# some containers set this. Then each process that a test starts compiles all of PyTorch's Python sources for itself
unexport PYTHONDONTWRITEBYTECODE

.PHONY: web setup demo test test-all test-fast test-generic test-fast-generic check lint bench docs dist clean

setup: $(BIN)/.installed-dev  ## environment with everything for development

# before anything is downloaded
$(BIN)/python:
	@$(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { echo "deformmamba needs Python 3.11, 3.12 or 3.13; $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -1). Install one of them, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# PyTorch first and alone, because the index in TORCH may lack the other packages
$(BIN)/.torch: $(BIN)/python
	$(BIN)/python -m pip install $(TORCH)
	touch $@

$(BIN)/.installed: $(BIN)/.torch setup.cfg pyproject.toml
	$(BIN)/python -m pip install --editable .
	touch $@

$(BIN)/.installed-%: $(BIN)/.installed
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@

demo: $(BIN)/.installed  ## upscale a phantom and a real scan, with figures in demo-output/
	$(BIN)/deformmamba demo -o demo-output

test: $(BIN)/.installed-dev  ## every subject, without the tests marked long
	$(PYTEST) -m "not long"

test-all: $(BIN)/.installed-dev  ## all tests, as in CI
	$(PYTEST)

test-fast: $(BIN)/.installed-test  ## the tests that take less than about 0.3 seconds each
	$(PYTEST) -m "not slow"

# the oldest instruction set that each library supports, with which sums are rounded differently
OLDEST := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 NUMBA_CPU_NAME=generic OMP_NUM_THREADS=1

test-generic: $(BIN)/.installed-test  ## the numerical tests with the instruction set of an old processor
	$(OLDEST) $(PYTEST) -m "not slow or portable" tests/scan/test_scan.py tests/scan/test_scan_cpu.py tests/deform tests/physics tests/test_layers.py \
	tests/test_losses.py tests/inference/test_adapters.py

test-fast-generic: $(BIN)/.installed-test  ## the fast tests, and those marked portable, with the same instruction set
	$(OLDEST) $(PYTEST) -m "not slow or portable"

lint: $(BIN)/.installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test-all  ## style, types, all tests

# these measure scans that you name
NEED_SCANS := benchmarks/isotropic.py benchmarks/isotropic_real.py benchmarks/eclare_timed.py benchmarks/uncertainty.py
bench: $(BIN)/.installed-dev  ## every benchmark that needs no scans; each verifies its result before it times it
	set -e; for script in $(filter-out $(NEED_SCANS),$(wildcard benchmarks/*.py)); do if grep -q "__main__" $$script; then $(BIN)/python $$script; fi; done

docs: $(BIN)/.installed-docs  ## build the documentation in build/site/; a broken link is an error
	$(BIN)/python docs/command_line.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

web: $(BIN)/.installed-export  ## build the browser page in build/web/; needs npm
	$(BIN)/python web/build.py -o build/web

dist: $(BIN)/.installed-dev  ## sdist and wheel in dist/, checked as a package index checks them
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
