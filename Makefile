# Everything a developer runs. Each target makes the virtual environment first where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep '^torch==' constraints.txt)
ROOMS := $(patsubst moe_lightning/%/__init__.py,moe_lightning.%,$(wildcard moe_lightning/*/__init__.py)) \
	$(patsubst moe_lightning/%.py,moe_lightning.%,$(filter-out %/__init__.py,$(wildcard moe_lightning/*.py)))

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all lint format bench bench-gpu docs clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */|/' | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'

# torch goes first and alone: pip then keeps that build (CPU or CUDA) when it resolves everything else.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, not %s: make PYTHON=python3.12" % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]" -c constraints.txt
	@touch $@

install: $(STAMP)  ## Create .venv with the versions of constraints.txt

# One thread: the same figures on every run, and no crawl where other work shares the cores.
demo: export OMP_NUM_THREADS = 1
demo: $(STAMP)  ## Train a small Mixtral on real text, compress it in mid-run, recover, test, compare
	$(BIN)/moe-lightning fit -c configs/quickstart.yaml --overwrite true
	$(BIN)/moe-lightning test -c configs/quickstart.yaml --ckpt_path last
	$(BIN)/python examples/quickstart.py

test: $(STAMP)  ## Run the test suite
	$(BIN)/python -m pytest

test-all: $(STAMP)  ## Run the test suite and what takes minutes: every kernel compiled for every GPU
	$(BIN)/python -m pytest -m ""

lint: $(STAMP)  ## Check style, docstrings and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## Rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## Time MoE layers, training steps, whole models, the statistics pass and slimming on the CPU
	$(BIN)/python benchmarks/cpu.py --output benchmarks/results
	$(BIN)/python benchmarks/figures.py benchmarks/results/cpu-*.json
	$(BIN)/python benchmarks/moe_layer_cpu.py --output benchmarks/results
	$(BIN)/python benchmarks/statistics_pass.py
	$(BIN)/python benchmarks/slimming_speed.py --output benchmarks/results
	$(BIN)/python benchmarks/full_model.py --scale 64 --layers 8 --context 128 --decode-context 64 --batch-sizes 1 4 \
		--new-tokens 8 --repeats 3 --warmup 1 --output benchmarks/results

# What was refused fails in the end: the figures of everything else are drawn before.
bench-gpu: $(STAMP)  ## Time MoE layers, training steps, slimming and whole models on the GPU, and draw the figures
	$(BIN)/python benchmarks/gpu.py --output benchmarks/results; failed=$$?; \
	$(BIN)/python benchmarks/figures.py benchmarks/results/gpu-*.json && exit $$failed
	$(BIN)/python benchmarks/slimming_speed.py --device cuda --output benchmarks/results
	$(BIN)/python benchmarks/full_model.py --output benchmarks/results

docs: $(STAMP)  ## Write the API reference to build/docs
	$(BIN)/pdoc --docformat google --output-directory build/docs moe_lightning $(ROOMS) moe_kernels

clean:  ## Remove build products (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
