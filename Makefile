# Every target makes what it needs: the environment in .venv, and in it cogtune as .ci/constraints.txt pins it.
#   make PYTHON=python3.12 test     another interpreter (for a fresh .venv)

PYTHON ?= python3
PYTEST_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
LOCK := .ci/constraints.txt
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input
RUNTIME := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

PYTEST := $(BIN)/python -m pytest $(PYTEST_FLAGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test quick check format bench-data site docs pictures lock clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(RUNTIME)  ## draw clips, train a LoRA on a tiny model, sample a video with it
	$(BIN)/cogtune demo

# The slow tests run where quick ones fail, too. pytest's status 5: there are none.
test: export OMP_NUM_THREADS := 1
test: check  ## everything that has to hold: check, then the quick and the slow tests
	@quick=0; $(PYTEST) || quick=$$?; \
	slow=0; $(PYTEST) -m "slow and not gpu and not exhaustive" || slow=$$?; \
	if [ $$slow -eq 5 ]; then slow=0; fi; \
	if [ $$quick -ne 0 ]; then echo "quick tests failed (status $$quick): see the summary above the slow tests"; fi; \
	if [ $$slow -ne 0 ]; then echo "slow tests failed (status $$slow)"; fi; \
	[ $$quick -eq 0 ] && [ $$slow -eq 0 ]

quick: check  ## check, then the tests that train nothing: for while you work
	OMP_NUM_THREADS=1 $(PYTEST) tests/cli tests/config tests/models tests/planning tests/run tests/system

check: site  ## lint, formatting, types, which module may import which, and the documentation's links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV)  ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-data: $(RUNTIME)  ## measure `dataset validate`: clips opened and frames decoded a second, memory
	$(BIN)/python tools/bench_validate.py

site: $(DEV)  ## build the documentation into .site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --config-file .mkdocs.yml

docs: $(RUNTIME)  ## regenerate docs/commands.md and docs/vram.md
	$(BIN)/python -m tools.commands_page > $(VENV)/commands.md
	mv $(VENV)/commands.md docs/commands.md
	$(BIN)/python -m tools.vram_page > $(VENV)/vram.md
	mv $(VENV)/vram.md docs/vram.md

pictures: $(RUNTIME)  ## record the terminals in docs/images again
	$(BIN)/python -m tools.record_terminal

lock: $(BIN)/python  ## resolve .ci/constraints.txt again; LOCK_FLAGS=--upgrade upgrades everything
	$(PIP) install -c $(LOCK) uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate \
	  --custom-compile-command "make lock" --output-file $(LOCK) $(LOCK_FLAGS) pyproject.toml
	grep -vE '^(cuda|nvidia|triton)\b' $(LOCK) > $(VENV)/lock  # torch itself says which of these it wants
	mv $(VENV)/lock $(LOCK)

clean:  ## remove caches and built packages; .venv and your outputs stay
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .site build dist
	find cogtune tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "cogtune runs on Python 3.10 to 3.13: name one with make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }

# torch goes in first and alone, so that whichever build pip is set up to prefer (CPU or CUDA) is settled.
$(RUNTIME): pyproject.toml $(LOCK) | $(BIN)/python
	@echo "Installing cogtune into $(VENV); the first time this takes a few minutes."
	$(PIP) install -c $(LOCK) torch
	$(PIP) install -c $(LOCK) -e .
	@touch $@

$(DEV): pyproject.toml $(LOCK) | $(BIN)/python
	@echo "Installing cogtune and what tests it into $(VENV); the first time this takes a few minutes."
	$(PIP) install -c $(LOCK) torch
	$(PIP) install -c $(LOCK) -e '.[dev]'
	@touch $@ $(RUNTIME)
