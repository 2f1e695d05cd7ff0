PYTHON ?= python3
BIN := .venv/bin
WEIGHTS := data/smollm2-135m/model.safetensors
GEMMA := data/gemma3-270m/model.safetensors
DOCS := data/python-docs/calibration.txt
DEMO := runs/demo

# Settings of `make reproduce`: any model and texts, and what determines the cost.
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
.PHONY: help install data gemma demo reproduce figures solving rivals docs test lowest torture check bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

install: .venv/installed ## create .venv with entangle and its dependencies

.venv/installed: pyproject.toml constraints.txt
	@echo "installing entangle and its dependencies into .venv: this takes a few minutes the first time"
	@$(PYTHON) -c 'import sys; sys.exit("entangle needs CPython 3.11 or newer, but $(PYTHON) is %d.%d: give another one, as in make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

data: $(WEIGHTS) $(DOCS) ## prepare the model and the text of the examples

$(WEIGHTS) $(GEMMA): data/%/model.safetensors: data/prepare_model.py | .venv/installed
	@$(BIN)/python data/prepare_model.py $*
	@touch $@

gemma: $(GEMMA) ## prepare a second model, Gemma 3 270M, under its own terms

$(DOCS): data/python-docs/prepare.py | .venv/installed
	@$(BIN)/python data/python-docs/prepare.py
	@touch $@

demo: $(DEMO)/run.json ## measure the 135M model, rank its neurons, draw the figures
	@$(BIN)/entangle rank $(DEMO) --top 10
	@echo
	@echo "figures:"
	@for kind in heatmap layers ranks; do $(BIN)/entangle plot $(DEMO) $$kind || exit; done

$(DEMO)/run.json: | data
	@echo "measuring 128 windows of 512 tokens: two to five minutes on two cores"
	@$(BIN)/entangle measure data/smollm2-135m --text data/python-docs --out $(DEMO)

ON = --text '$(TEXT)' --windows $(WINDOWS)
HELD = $(ON) --evaluation '$(EVALUATION)' --layers '$(LAYERS)' --batch-size 1
SETTINGS = MODEL=$(MODEL) TEXT=$(TEXT) EVALUATION=$(EVALUATION) LAYERS=$(LAYERS) WINDOWS=$(WINDOWS) SCORED=$(SCORED) SHARES=$(SHARES)
STEPS = measured without-first ablation ablation-without-first interventions blocks experts disentangled

reproduce: $(if $(filter data/%,$(MODEL) $(TEXT)),data,.venv/installed) ## repeat the thesis's experiments for MODEL= TEXT= EVALUATION= (takes hours)
	@mkdir -p $(EVIDENCE); test -e $(EVIDENCE)/made-of || echo '$(SETTINGS)' > $(EVIDENCE)/made-of
	@echo '$(SETTINGS)' | cmp -s - $(EVIDENCE)/made-of || { echo "$(EVIDENCE) was made with other settings: give those in $(EVIDENCE)/made-of, or choose another folder with EVIDENCE="; exit 2; }
	@$(MAKE) --no-print-directory $(STEPS:%=$(EVIDENCE)/%/run.json)
	@for kind in heatmap layers ranks difficulty; do $(BIN)/entangle plot $(EVIDENCE)/measured $$kind || exit; done
	@echo "the results are in $(EVIDENCE): each run has tables/ and figures/"

$(EVIDENCE)/measured/run.json:
	$(BIN)/entangle measure '$(MODEL)' $(ON) --difficulty 4096 --out $(@D)

$(EVIDENCE)/without-first/run.json:
	$(BIN)/entangle measure '$(MODEL)' $(ON) --skip-first 1 --out $(@D)

$(EVIDENCE)/ablation/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows $(SCORED) \
		--share $(SHARES) --experts 1,16 --solve greedy --out $(@D)

$(EVIDENCE)/ablation-without-first/run.json: | $(EVIDENCE)/without-first/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/without-first $(HELD) --evaluation-windows $(SCORED) \
		--solve greedy --out $(@D)

$(EVIDENCE)/interventions/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows $(SCORED) \
		--share 0.01,0.02 --intervention negative,zero,mean --sets wasserstein,random --out $(@D)

$(EVIDENCE)/blocks/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle ablate $(EVIDENCE)/measured $(HELD) --evaluation-windows 8 \
		--sets wasserstein,random --seeds 1 --per-block --solve greedy --out $(@D)

$(EVIDENCE)/experts/run.json:
	$(BIN)/entangle sweep '$(MODEL)' $(HELD) --evaluation-windows $(SCORED) --propagate dense \
		--sparsity 0.7,0.8 --experts 1,4,16 --assign kmeans,random --solve greedy --out $(@D)

$(EVIDENCE)/disentangled/run.json: | $(EVIDENCE)/measured/run.json
	$(BIN)/entangle disentangle $(EVIDENCE)/measured $(HELD) --sparsity 0.7,0.9 --solve greedy --out $(@D)

# The README's ablation has one share, so these runs have their own folder.
DRAWN = runs/figures
draw = $(BIN)/entangle plot $(DRAWN)/$(1) $(2) --out $(FIGURES)/$(or $(3),$(firstword $(2))).png

figures: data ## measure again and redraw the figures of README and docs/ (takes hours)
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

# The second text is of Debian's packages fortunes and fortunes-min.
data/fortunes/fortunes.txt: data/fortunes/prepare.py | .venv/installed
	@$(BIN)/python data/fortunes/prepare.py

solving: data/fortunes/fortunes.txt | $(DEMO)/run.json ## run what is left of the evidence on solving again and reconstruction (takes hours), write its tables and draw it
	$(BIN)/python -m benchmarks.solving
	$(BIN)/python -m benchmarks.tables

docs: .venv/installed ## build the documentation site from docs/ and docstrings, in build/site
	@$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site
	@echo "the site is build/site/docs/index.html"

rivals: data/fortunes/fortunes.txt | $(DEMO)/run.json ## run what is left of the evidence on rivals at equal weights read (takes hours), write its tables and draw it
	$(BIN)/python -m benchmarks.rivals
	$(BIN)/python -m benchmarks.tables

test: check data ## check lint and types, and run the whole test suite
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

LOWEST := .venv-lowest

lowest: $(LOWEST)/installed ## run the tests with the lowest versions that pyproject.toml allows, and the pinned torch
	$(LOWEST)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not real' -o filterwarnings=default

$(LOWEST)/installed: pyproject.toml constraints.txt
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	@grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	@$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra dev -c $(LOWEST)/torch.txt pyproject.toml -o $(LOWEST)/versions.txt
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/versions.txt -e '.[dev]'
	@touch $@

torture: .venv/installed ## try 10,000 inputs, most of them bad, and 1,000 kills; goes on where it was stopped (up to two hours)
	$(BIN)/python -m tests.torture all

check: .venv/installed ## check lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@for script in data/prepare_model.py data/*/prepare.py; do $(BIN)/mypy $$script || exit; done

bench: data ## run the benchmarks (on a GPU: python benchmarks/gpu.py)
	$(BIN)/python -m benchmarks.measure
	$(BIN)/python -m benchmarks.prune
	$(BIN)/python -m benchmarks.expand
	$(BIN)/python -m benchmarks.ablate
	$(BIN)/python -m benchmarks.decode

clean: ## remove runs and caches, but keep .venv and data
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
