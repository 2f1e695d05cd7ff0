PYTHON ?= python3
BIN := .venv/bin
WEIGHTS := data/smollm2-135m/model.safetensors
DOCS := data/python-docs/calibration.txt
DEMO := runs/demo

# Of `make reproduce`: any model and texts, and what else determines its cost.
MODEL ?= data/smollm2-135m
TEXT ?= data/python-docs
EVALUATION ?= $(TEXT)
LAYERS ?= *.mlp.*
WINDOWS ?= 128
SCORED ?= 41
SHARES ?= 0.01,0.03,0.1,0.3
EVIDENCE ?= runs/evidence/$(notdir $(MODEL))
FIGURES ?= figures

.DEFAULT_GOAL := help
.PHONY: help install data demo reproduce figures test check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 16

install: .venv/installed ## create .venv with entangle and what it needs

.venv/installed: pyproject.toml constraints.txt
	@echo "installing entangle and what it needs into .venv: some minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit("entangle needs CPython 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

data: $(WEIGHTS) $(DOCS) ## prepare the model and the text of the examples

$(WEIGHTS): data/smollm2-135m/prepare.py | .venv/installed
	@$(BIN)/python data/smollm2-135m/prepare.py
	@touch $@

$(DOCS): data/python-docs/prepare.py | .venv/installed
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

ON = --text '$(TEXT)' --windows $(WINDOWS)
HELD = $(ON) --evaluation '$(EVALUATION)' --layers '$(LAYERS)' --batch-size 1
WORDS = MODEL=$(MODEL) TEXT=$(TEXT) EVALUATION=$(EVALUATION) LAYERS=$(LAYERS) WINDOWS=$(WINDOWS) SCORED=$(SCORED) SHARES=$(SHARES)
STEPS = measured without-first ablation ablation-without-first interventions blocks experts disentangled

reproduce: $(if $(filter data/%,$(MODEL) $(TEXT)),data,.venv/installed) ## the thesis's evidence for MODEL= TEXT= EVALUATION=, in hours
	@mkdir -p $(EVIDENCE); test -e $(EVIDENCE)/made-of || echo '$(WORDS)' > $(EVIDENCE)/made-of
	@echo '$(WORDS)' | cmp -s - $(EVIDENCE)/made-of || { echo "$(EVIDENCE) was made of other words: give those in $(EVIDENCE)/made-of, or another EVIDENCE="; exit 2; }
	@$(MAKE) --no-print-directory $(STEPS:%=$(EVIDENCE)/%/run.json)
	@for kind in heatmap layers ranks difficulty; do $(BIN)/entangle plot $(EVIDENCE)/measured $$kind || exit; done
	@echo "the evidence is in $(EVIDENCE): tables/ and figures/ of each run"

$(EVIDENCE)/measured/run.json:
	$(BIN)/entangle measure '$(MODEL)' $(ON) --difficulty 4096 --out $(@D)

$(EVIDENCE)/without-first/run.json:
	$(BIN)/entangle measure '$(MODEL)' $(ON) --skip-first 1 --out $(@D)

$(EVIDENCE)/ablation/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows $(SCORED) \
		--share $(SHARES) --experts 1,16 --out $(@D)

$(EVIDENCE)/ablation-without-first/run.json: | $(EVIDENCE)/without-first/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/without-first $(HELD) --evaluation-windows $(SCORED) --out $(@D)

$(EVIDENCE)/interventions/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows $(SCORED) \
		--share 0.01,0.02 --intervention negative,zero,mean --sets wasserstein,random --out $(@D)

$(EVIDENCE)/blocks/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows 8 \
		--sets wasserstein,random --seeds 1 --per-block --out $(@D)

$(EVIDENCE)/experts/run.json:
	$(BIN)/entangle sweep '$(MODEL)' $(HELD) --evaluation-windows $(SCORED) --propagate dense \
		--sparsity 0.7,0.8 --experts 1,4,16 --assign kmeans,random --out $(@D)

$(EVIDENCE)/disentangled/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle disentangle $(EVIDENCE)/measured $(HELD) --sparsity 0.7,0.9 --out $(@D)

# The README's ablation has one share, and so a folder of its own.
DRAWN = runs/figures
draw = $(BIN)/entangle plot $(DRAWN)/$(1) $(2) --out $(FIGURES)/$(or $(3),$(firstword $(2))).png

figures: data ## the pictures of README and docs/, measured anew, in hours
	@$(MAKE) --no-print-directory EVIDENCE=$(DRAWN) SHARES=0.03 \
		$(patsubst %,$(DRAWN)/%/run.json,measured ablation blocks experts disentangled)
	@$(call draw,measured,heatmap)
	@$(call draw,measured,layers)
	@$(call draw,measured,ranks)
	@$(call draw,measured,difficulty)
	@$(call draw,measured,neuron model.layers.5.mlp.up_proj:501 model.layers.5.mlp.up_proj:816,neurons)
	@$(call draw,ablation,ablation)
	@$(call draw,blocks,ablation,depth)
	@$(call draw,experts,sweep,experts)
	@$(call draw,disentangled,improvement)
	@$(call draw,disentangled,clusters)
	@$(call draw,disentangled,sparse)

test: check data ## lint, types and the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile

check: .venv/installed ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for script in data/*/prepare.py; do $(BIN)/mypy $$script || exit; done

bench: data ## run the benchmarks
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.expand
	$(BIN)/python -m benchmarks.ablate
	$(BIN)/python -m benchmarks.decode

clean: ## remove what was measured, and caches; .venv and data stay
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
