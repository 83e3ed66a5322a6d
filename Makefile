# `make demo` and `make test` work from a fresh clone: they create .venv, install the known-good versions, and run.
VENV   ?= .venv
OUT    ?= demo
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

.PHONY: help install demo test test-fast test-ui browser lint bench clean

help:
	@echo "make demo       learn a concept, bind knowledge to it, write $(OUT)/report.html (about two minutes)"
	@echo "make test       lint, types and all tests"
	@echo "make test-fast  the tests that take less than a few seconds each"
	@echo "make test-ui    the studio in a real browser"
	@echo "make bench      the figures of the README; goes on where it was stopped"
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

# The order matters: pytest's closing line is the last thing printed. -rs: what is skipped, and why, right before it.
test: lint browser
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs

test-fast: $(STAMP)
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "not slow"

# A browser for the tests of the studio: says loudly if there is none, and installs Chromium on CI.
browser: $(STAMP)
	@$(BIN)/python tests/browser.py

test-ui: browser
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/test_studio_home.py tests/test_studio_triggers.py \
		tests/test_studio_pages.py tests/test_studio_browser.py

bench: $(STAMP)
	@$(BIN)/python benchmarks/main_job.py -o benchmarks/results/main_job

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
