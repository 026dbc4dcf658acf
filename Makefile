# Needs python3 (3.11 or newer), pip and make; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
PYTEST_WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-browser test-slow test-faults test-load test-cuda test-floor test-newest test-processors audit docs dist test-dist benchmark clean

demo: $(VENV)/.installed-demo
	$(BIN)/shrp-hf demo --output out/demo

test: $(VENV)/.installed-test  # whole files to a worker: what a file's tests share is made once
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n $(PYTEST_WORKERS) --dist loadfile

test-slow: $(VENV)/.installed-test
	$(BIN)/pytest -m slow

test-browser: $(VENV)/.installed-test $(VENV)/.installed-browser  # in the Chromium of this machine, else in playwright's
	$(BIN)/pytest -q -m browser -rs

test-faults: $(VENV)/.installed-test  # KILLS=100 kills more often
	FAULTS_PROFILE=full $(BIN)/pytest -q -n $(PYTEST_WORKERS) --dist loadfile -m "not slow and not load" tests/faults tests/test_compare.py

test-load: $(VENV)/.installed-test
	$(BIN)/pytest -q -m load

test-cuda: $(VENV)/.installed-test  # on a machine with a GPU, and a torch that reaches it
	$(BIN)/pytest -q -p tests.on_cuda -k "not compiles" tests/test_families.py tests/test_conversion.py tests/test_surgery.py tests/test_modeling.py

test-floor:  # the fast tests with the oldest releases that setup.cfg allows
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt

test-newest:  # the fast tests with the newest releases that the index offers
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

test-processors: $(VENV)/.installed-test  # the fast tests as other processors, and the newest torch, would run them
	$(MAKE) .venv-newest/.installed-test VENV=.venv-newest CONSTRAINTS=/dev/null
	$(BIN)/python -m tests.processors --workers $(PYTEST_WORKERS) --newest .venv-newest/bin/python

audit: $(VENV)/.installed-test
	$(BIN)/python -m pip check
	$(BIN)/python -m pip install -q pip-audit
	$(BIN)/pip-audit --skip-editable

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

dist: $(VENV)/.installed-dist  # what a release uploads
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*

test-dist: dist  # each of the two in an empty environment, away from this directory
	for file in dist/*; do \
		rm -rf .venv-dist && $(PYTHON) -m venv .venv-dist; \
		.venv-dist/bin/python -m pip install -q "$$file" -c $(CONSTRAINTS); \
		.venv-dist/bin/python -P tests/smoke.py; \
		.venv-dist/bin/shrp-hf --help > /dev/null; \
	done

benchmark: $(VENV)/.installed-test
	$(BIN)/python -m experiments.foundation --threads 2
	$(BIN)/python -m experiments.posthoc --threads 2
	$(BIN)/python -m experiments.serving --threads 2

clean:
	rm -rf $(VENV) .venv-floor .venv-newest .venv-dist out build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	@echo "Creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "shrp_hf needs Python 3.11 or newer: make PYTHON=python3.11")'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# A stamp for each extra: an install runs again only when what it depends on has changed.
$(VENV)/.installed-%: setup.cfg pyproject.toml $(CONSTRAINTS) | $(VENV)/.created
	@echo "Installing shrp_hf[$*] into $(VENV), a dot for each package (some minutes the first time)"
	@$(BIN)/python -m pip install -e ".[$*]" -c $(CONSTRAINTS) 2> $(VENV)/pip.log \
		| awk '/^ *(Collecting|Downloading|Installing)/ { printf "."; fflush() } END { print "" }' \
		|| { cat $(VENV)/pip.log >&2; exit 1; }
	@touch $@
