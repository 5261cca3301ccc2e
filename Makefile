# Needs Python 3.11 or newer and make; everything else is installed into .venv, once per change of pyproject.toml.
#
#   PYTHON=python3.12   the interpreter that makes the environment
#   VENV=none           use the python3 in use and what is installed there, e.g. on a GPU machine
#   ARGS="-k rope -x"   further arguments of pytest, of the demo or of bench-gpu

NEWEST = for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(NEWEST))
VENV ?= .venv
ARGS ?=
JOBS ?= 2

ifneq ($(VENV),none)
BIN := $(VENV)/bin/
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: demo test lint gpu-test bench-gpu toy-family clean help

demo: $(DEMO) ## teach a tiny Bernini a new edit on the CPU, and score it; opens in runs/demo/report.html
	@$(BIN)bernini demo $(ARGS)

test: $(DEV) ## run the test suite; tests that need a GPU are skipped without one
	@OMP_NUM_THREADS=1 $(BIN)python3 -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(DEV) ## check style, docstrings, formatting and types
	@$(BIN)python3 -m ruff check
	@$(BIN)python3 -m ruff format --check
	@$(BIN)python3 -m mypy

gpu-test: $(DEV) ## run the tests that need a CUDA device
	@$(BIN)python3 -m pytest -m gpu $(ARGS)

bench-gpu: $(DEV) ## run the speed benchmarks on a GPU, and print one table of them
	@$(BIN)python3 -m benchmarks.speed.all $(ARGS)

LR := --model.lr_scheduler.init_args
# What the renderer reads while planner and renderer learn together: the paper's visible tokens, or the whole true plan.
SHOWN := --model.exposure '{visible: 0.5, full: 0.5}' $(LR).max_lr 5e-4

toy-family: $(DEMO) ## train assets/toy and assets/toy-bernini anew on a GPU and score them; opens in runs/toy-family/bench/report.html
	@$(BIN)bernini fit -c configs/toy/vae.yaml
	@$(BIN)python3 -m datamodules.toyworld.family assets/toy
	@$(BIN)bernini fit -c configs/toy/family.yaml
	@$(BIN)bernini bench run toy --out runs/toy-family/bench --bounds --workers 8
	@$(BIN)bernini fit -c configs/toy/sight.yaml -c configs/toy/banked.yaml --data.length 240000 --trainer.max_steps 11000 \
		$(LR).total_steps 11000 $(LR).max_lr 2e-3
	@$(BIN)bernini fit -c configs/toy/planner.yaml -c configs/toy/banked.yaml
	@rm -rf runs/toy-planner/float16
	@$(BIN)bernini export model runs/toy-planner/planner --to planner --dtype float16 --out runs/toy-planner/float16
	@cp -R runs/toy-planner/float16/. assets/toy/planner
	@$(BIN)python3 -m benchmarks.quality.plans --model assets/toy/planner --out runs/plans/toy
	@$(BIN)bernini fit -c configs/toy/warmup.yaml -c configs/toy/cobanked.yaml --data.length 60000 --data.folder runs/toy-bank \
		--trainer.max_steps 500 $(LR).total_steps 500
	@$(BIN)bernini fit -c configs/toy/cotrain.yaml -c configs/toy/cobanked.yaml --data.length 60000 --data.folder runs/toy-bank \
		--trainer.max_steps 7500 $(LR).total_steps 7500 $(SHOWN)
	@$(BIN)bernini fit -c configs/toy/cot.yaml -c configs/toy/cobanked.yaml --data.length 30000 \
		--trainer.max_steps 1400 $(LR).total_steps 1400 $(SHOWN)
	@rm -rf runs/toy-bernini
	@$(BIN)bernini export model runs/toy-cot/model assets/toy --to diffusers --dtype float16 --out runs/toy-bernini
	@cp -R runs/toy-bernini/. assets/toy/text_encoder assets/toy/generate.json assets/toy-bernini
	@$(BIN)bernini bench run toy --model assets/toy-bernini --out runs/toy-family/planned --workers 8

clean: ## remove the environment, caches and build outputs; runs/ and data/ stay
	@rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

# pip is what a venv lacks when its creation failed half-way, so its presence marks a good one.
$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/pip
	@echo "installing the demo's packages into $(VENV) (minutes, once)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/pip
	@echo "installing the development packages into $(VENV) (minutes, once)"
	@$(VENV)/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $(VENV)/.demo $@
