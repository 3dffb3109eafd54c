# make demo   edit the example pictures with the model that ships in the package
# make test   every test
# make check  format, lint, types, import layering, generated docs, links, the page's JavaScript
# make docs   the documentation as a site, in site/
# None needs anything run before it.

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
JOBS ?= 2

# Each of pytest's workers has one core; more threads than cores slow them all.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

# Broken links fail. The variable silences advertising.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

.PHONY: help install demo test check format docs clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements-dev.lock scripts/install.sh
	scripts/install.sh $(VENV)
	@touch $@

demo: $(INSTALLED)
	$(PY) examples/demo.py

# Node checks the page's JavaScript, and brings axe-core for the tests in the browser.
NODE := $(shell command -v npm)
MODULES := $(if $(NODE),node_modules/.package-lock.json)

node_modules/.package-lock.json: package.json package-lock.json
	npm ci --silent
	@touch $@

test: $(INSTALLED) $(MODULES)
	$(TEST_ENV) $(PY) -m pytest -n $(JOBS) $(ARGS)

check: $(INSTALLED) $(MODULES)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy src examples
	$(VENV)/bin/lint-imports
	$(TEST_ENV) $(PY) -m pytest -q tests/test_package.py
	$(PY) scripts/make_cli_docs.py --check
	$(MKDOCS)
	@if [ -n "$(NODE)" ]; then npm run --silent check; \
	else echo "check: Node is not installed, so the page's JavaScript is not checked" >&2; fi

format: $(INSTALLED)
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

docs: $(INSTALLED)
	$(PY) scripts/make_cli_docs.py
	$(MKDOCS)
	$(PY) scripts/make_arguments.py

clean:
	rm -rf demo dist build site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
