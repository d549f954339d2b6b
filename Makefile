# make train   set up, then train a small hybrid Linear-MoE language model on the Python standard library
# make test    set up, then run every test
# make lint    ruff, codespell and mypy over the whole mapped package
# Set-up happens once, in .venv; ARGS="..." is passed on to what a target runs.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint .constraints.txt
FARM := .typecheck/lmoe_compiler

# PyPI's Linux wheel of torch is the CUDA build. Without a GPU, offer pip the CPU build as well: its
# local version (2.13.0+cpu) sorts above the plain one, and where its page is out of reach pip goes on.
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
TORCH_BUILD := --retries 0 --find-links https://download.pytorch.org/whl/cpu/torch/
endif

.PHONY: train test smoke lint typecheck clean

train: .venv/ready
	$(BIN)/lmoe train $(ARGS)

# One thread per test process: the workers already fill the cores.
test: .venv/ready .oracles/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=8 $(ARGS)

smoke: .venv/ready
	rm -rf runs/smoke
	$(BIN)/lmoe train --steps 20 --evaluations 2 --final-tokens 16384 --out runs/smoke $(ARGS)

lint: .venv/ready typecheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

# In place, mypy cannot see models/, passes/ and runtime/ inside lmoe_compiler: show it a tree of links.
typecheck: .venv/ready
	rm -rf .typecheck
	mkdir -p $(FARM)
	ln -s $(addprefix $(CURDIR)/,$(wildcard lmoe_compiler/*) models passes runtime) $(FARM)/
	MYPYPATH=.typecheck $(BIN)/mypy -p lmoe_compiler

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv

.venv/ready: pyproject.toml .constraints.txt | .venv/bin/python
	$(PIP) $(TORCH_BUILD) torch
	$(PIP) --editable '.[gpu,train,dev]'
	touch $@

# Independent implementations the tests compare with. fla breaks transformers when both can be imported,
# so each lives in a folder of its own and never in .venv; tests/oracles.py runs them in subprocesses.
.oracles/ready: .constraints.txt | .venv/ready
	rm -rf .oracles
	$(PIP) --no-deps --target .oracles/fla fla-core einops
	$(PIP) --no-deps --target .oracles/transformers transformers safetensors regex
	touch $@

clean:
	rm -rf .venv .oracles .typecheck build *.egg-info
