# `make demo` and `make test` work from a fresh clone: they create .venv, install the known-good versions, and run.
VENV   ?= .venv
OUT    ?= demo
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install demo test test-fast test-full test-ui browser lint bench audit sbom clean

help:
	@echo "make demo       learn a concept, bind knowledge to it, write $(OUT)/report.html (about two minutes)"
	@echo "make test       lint, types and tests"
	@echo "make test-fast  the tests that take less than a few seconds each"
	@echo "make test-full  all tests, also those that do for minutes what others do on a small scale"
	@echo "make test-ui    the studio in a real browser"
	@echo "make bench      the figures of the README; goes on where it was stopped"
	@echo "make audit      known vulnerabilities of the pinned versions, from OSV's database (needs the network)"
	@echo "make sbom       sbom.json: all that is installed, as CycloneDX"
	@echo "make clean      remove $(VENV) and caches"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "mokus needs Python 3.11 or newer, and none was found: install one, or name it with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mokus needs Python 3.11 or newer, and $(PYTHON) is older or missing: name another with 'make PYTHON=/path/to/python3'." >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "installing mokus and its libraries into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/mokus demo -o $(OUT)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy

# A process for each core, up to four: each holds a model or two. -rs: what is skipped, and why. The order matters:
# pytest's closing line is the last thing printed.
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: lint browser
	@$(PYTEST)

test-fast: $(STAMP)
	@$(PYTEST) -m "not slow"

test-full: lint browser
	@$(PYTEST) -m ""

# A browser for the tests of the studio: says loudly if there is none, and installs Chromium on CI.
browser: $(STAMP)
	@$(BIN)/python tests/browser.py

test-ui: browser
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/test_studio_home.py tests/test_studio_triggers.py \
		tests/test_studio_pages.py tests/test_studio_browser.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/main_job.py -o benchmarks/results/main_job

$(VENV)/.audit: $(STAMP)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[audit]"
	@touch $@

# pip-audit writes its findings, if any, into the file; without the file it has not come that far.
audit: $(VENV)/.audit
	@rm -f audit.json
	@$(BIN)/python -m pip_audit -s osv --disable-pip --no-deps -r constraints.txt --progress-spinner off --timeout 10 -f json -o audit.json 2>audit.log; \
	code=$$?; \
	test -s audit.json || { tail -n 1 audit.log >&2; echo "audit: the database of vulnerabilities cannot be reached, so nothing was audited" >&2; exit 1; }; \
	cat audit.log; echo "audit: see audit.json"; exit $$code

sbom: $(VENV)/.audit
	@$(BIN)/python -m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible --of JSON -o .sbom.json.tmp $(BIN)/python
	@mv .sbom.json.tmp sbom.json
	@echo "sbom.json"

clean:
	rm -rf $(VENV) sbom.json audit.json audit.log .mypy_cache .ruff_cache .pytest_cache
