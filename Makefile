PYTHON ?= python3
BIN := .venv/bin
MODEL := data/smollm2-135m/model.safetensors
TEXT := data/python-docs/calibration.txt
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help install data demo test check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: .venv/installed ## create .venv with entangle and what it needs

.venv/installed: pyproject.toml constraints.txt
	@echo "installing entangle and what it needs into .venv: some minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit("entangle needs CPython 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

data: $(MODEL) $(TEXT) ## prepare the model and the text of the examples

$(MODEL): data/smollm2-135m/prepare.py | .venv/installed
	@$(BIN)/python data/smollm2-135m/prepare.py
	@touch $@

$(TEXT): data/python-docs/prepare.py | .venv/installed
	@$(BIN)/python data/python-docs/prepare.py
	@touch $@

demo: $(DEMO)/run.json ## measure the 135M model, rank its neurons, draw the figures
	@$(BIN)/entangle rank $(DEMO) --top 10
	@echo
	@echo "drawing:"
	@for kind in heatmap layers ranks; do $(BIN)/entangle plot $(DEMO) $$kind || exit; done

$(DEMO)/run.json: | data
	@echo "measuring 128 windows of 512 tokens: two to five minutes on two cores"
	@$(BIN)/entangle measure data/smollm2-135m --text data/python-docs --out $(DEMO)

test: check data ## lint, types and the whole test suite
	$(BIN)/python -m pytest

check: .venv/installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for script in data/*/prepare.py; do $(BIN)/mypy $$script || exit; done

bench: data ## run the benchmarks
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.expand

clean: ## remove what was measured, and caches; .venv and data stay
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
