# make demo, make test: nothing but Python 3.11+ and make needed; everything goes into .venv
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(shell find lunaprep lunatrain manifests -name '*.py' -o -name '*.c' -o -name '*.toml' -o -name py.typed) setup.py setup.cfg pyproject.toml

.PHONY: help demo test soak lint docs bench clean
help:  ## Say what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/installed-train  ## A synthetic LUNA16 from scans to findings, in demo/: build, verify, train, evaluate, detect
	rm -rf demo
	$(BIN)/lunaprep phantom demo/data --scans 30 --size 64 160 160
	$(BIN)/lunaprep build --data demo/data --out demo/store --val-stride 4
	$(BIN)/lunaprep verify demo/store
	$(BIN)/lunaprep info demo/store
	$(BIN)/lunaprep show demo/store --out demo/overview.png
	$(BIN)/lunatrain cls --store demo/store/crops.h5 --epochs 5 --out demo/runs/cls
	$(BIN)/lunatrain eval demo/runs/cls
	$(BIN)/lunatrain seg --store demo/store/crops.h5 --epochs 5 --samples 600 --out demo/runs/seg
	$(BIN)/lunaprep phantom demo/new --scans 1 --size 64 160 160 --seed 11
	$(BIN)/lunatrain detect demo/new --seg demo/runs/seg --cls demo/runs/cls --annotations demo/new/annotations.csv \
	    --excluded demo/new/annotations_excluded.csv --out demo/findings
	@echo; echo "Look at demo/overview.png, demo/runs/cls/eval-series-val/report.html and demo/findings/report.html."

test: .venv/installed-dev  ## All tests, against the installed package
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/pytest --numprocesses auto --maxprocesses 8

soak: .venv/installed-dev  ## The long figures of docs/reliability.md: faults, bit flips, rounds (an hour and a half)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/pytest --soak --timeout 7200 -o faulthandler_timeout=0 --durations 0

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

.venv/dependencies-train: .venv/dependencies
	$(BIN)/pip install --quiet --constraint constraints.txt '.[train]'
	touch $@

.venv/dependencies-dev: .venv/dependencies-train
	$(BIN)/pip install --quiet --constraint constraints.txt '.[train,dev]'
	touch $@

.venv/installed: .venv/dependencies $(SOURCES)
	$(BIN)/pip install --quiet --no-deps --force-reinstall .
	touch $@

.venv/installed-train: .venv/dependencies-train .venv/installed
	touch $@

.venv/installed-dev: .venv/dependencies-dev .venv/installed
	touch $@
