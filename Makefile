# make demo, make test: nothing but Python 3.11+ and make needed; everything goes into .venv
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find lunaprep lunatrain manifests -name '*.py' -o -name '*.toml' -o -name py.typed) setup.cfg pyproject.toml

.PHONY: help demo test lint docs bench clean
help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/installed  ## A synthetic LUNA16 through build, verify, info and pictures, in demo/
	rm -rf demo
	$(BIN)/lunaprep phantom demo/data
	$(BIN)/lunaprep build --data demo/data --out demo/store
	$(BIN)/lunaprep verify demo/store
	$(BIN)/lunaprep info demo/store
	$(BIN)/lunaprep show demo/store --out demo/overview.png
	@echo; echo "Open demo/overview.png: nodules beside candidates that are none. The store is demo/store."

test: .venv/installed-dev  ## All tests, against the installed package
	cd tests && ../$(BIN)/pytest

lint: .venv/installed-dev  ## ruff and mypy (strict)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed-dev  ## Write docs/cli.md and the column tables of docs/format.md from the code
	$(BIN)/python tests/cli_reference.py > docs/cli.md
	$(BIN)/python tests/column_tables.py

bench: .venv/installed-dev  ## Measure building against copying the same bytes (minutes, 4 GB in build/bench)
	$(BIN)/python benchmarks/build_speed.py

clean:  ## Remove what was made here, .venv too
	rm -rf .venv build demo *.egg-info

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give PYTHON=...")'
	$(PYTHON) -m venv .venv

# dependencies once, the package itself whenever a source changed
.venv/dependencies: setup.cfg constraints.txt | .venv/bin/pip
	$(BIN)/pip install --quiet --constraint constraints.txt .
	touch $@

.venv/dependencies-dev: .venv/dependencies
	$(BIN)/pip install --quiet --constraint constraints.txt '.[train,dev]'
	touch $@

.venv/installed: .venv/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@

.venv/installed-dev: .venv/dependencies-dev .venv/installed
	touch $@
