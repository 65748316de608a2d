# `make demo` and `make test` do all of their own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup locked lock sbom docs demo test test-slow test-field lint golden fuzz format bench compatibility clean

setup: $(VENV)/.installed

# The package alone: what its users install.
$(VENV)/.installed-package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed: $(VENV)/.installed-package
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

locked:  ## as setup, on Python 3.11 or later, with nothing that is not in requirements.lock, hash by hash
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $(VENV)/.installed-package $(VENV)/.installed

lock: setup  ## requirements.lock anew, from pyproject.toml and constraints.txt
	$(BIN)/python -m pip install --quiet uv
	echo "# What 'make locked' installs, with hashes; Python 3.11 and later. 'make lock' writes this file." > requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra dev -c constraints.txt --universal --python-version 3.11 \
	  --generate-hashes --no-annotate --no-header --quiet >> requirements.lock

sbom: setup  ## sbom.json for a release: what is locked, as CycloneDX
	$(BIN)/python -m pip install --quiet cyclonedx-bom
	$(BIN)/cyclonedx-py requirements requirements.lock --output-reproducible -o sbom.json

demo: $(VENV)/.installed-package  ## the whole way on the shipped model: engines, a picture, a table
	$(BIN)/qdeploy demo --output qdeploy-demo

test: setup  ## the test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: setup  ## what takes minutes: every family of models, engines of every form
	$(BIN)/python -m pytest -n 2 -m "slow and not field"

test-field: setup  ## guides, imported models from file to picture: half an hour, not in CI
	$(BIN)/python -m pytest -n 2 -m field

lint: setup  ## style, types, and the direction of imports
	$(BIN)/ruff check qdeploy tests benchmarks tools
	$(BIN)/ruff format --check qdeploy tests benchmarks tools
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: setup  ## the site, in site/: every warning is an error, links and anchors included
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python tools/pages.py
	$(BIN)/mkdocs build --quiet

golden: setup  ## are all presets' artifacts byte-identical to those of the revision BASE?
	$(BIN)/python tools/golden.py --base $(BASE)

fuzz: setup  ## thousands of damaged artifacts, recipes, models and options: none may end in an internal error
	$(BIN)/python -m tools.fuzz --count 20000 --seconds 7200

format: setup
	$(BIN)/ruff format qdeploy tests benchmarks tools
	$(BIN)/ruff check --fix qdeploy tests benchmarks tools

bench: setup  ## the tables of docs/benchmarks/index.md
	$(BIN)/python -m benchmarks.methods --output runs/methods --threads 1 --groups 1

compatibility: setup  ## docs/compatibility.md: a tiny pipeline of each class of diffusers, from preflight to check
	$(BIN)/python tools/compatibility.py

clean:
	rm -rf $(VENV) qdeploy-demo runs .pytest_cache .mypy_cache .ruff_cache
