# Every target makes what it needs. TORCH chooses the build: `make test TORCH="torch==2.13.0 torchvision==0.28.0"`.
PYTHON ?= python3.11
VENV ?= .venv
TORCH ?= torch torchvision
BIN := $(VENV)/bin

.PHONY: setup demo test check bench docs clean

setup: $(BIN)/.installed-dev  ## environment with everything for development

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(BIN)/.installed: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install $(TORCH) --editable .
	touch $@

$(BIN)/.installed-dev: $(BIN)/.installed
	$(BIN)/python -m pip install $(TORCH) --editable '.[dev]'
	touch $@

demo: $(BIN)/.installed  ## a real scan in, a sharper scan and a picture out, in demo-output/
	$(BIN)/deformmamba demo -o demo-output

test: $(BIN)/.installed-dev  ## the tests, as CI runs them
	$(BIN)/python -m pytest

check: $(BIN)/.installed-dev  ## style, types, tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

bench: $(BIN)/.installed-dev  ## every benchmark; each verifies its result before it times it
	set -e; for script in benchmarks/*.py; do grep -q "__main__" $$script && $(BIN)/python $$script; done

docs: $(BIN)/.installed-docs  ## the documentation, in build/site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(BIN)/.installed-docs: $(BIN)/.installed
	$(BIN)/python -m pip install $(TORCH) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-output *.egg-info
