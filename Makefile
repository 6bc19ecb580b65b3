# Two commands: `make demo` and `make test`. Both set up .venv first; repeated or interrupted runs go on where they
# were.
.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu lint format bench lock clean

PYTHON ?= python3.11
BIN := .venv/bin
PY := $(BIN)/python
STAMP := .venv/.installed
JOBS ?= 2

# torch comes first: the CUDA build where a GPU is seen, else the CPU build. To choose another (after `make clean`):
#   make install DEVICE=cuda|cpu        make install TORCH=path/to/torch-2.13.0-cp311-cp311-linux_x86_64.whl
# An index that carries CPU builds can be named in PIP_EXTRA_INDEX_URL; without one the default build is installed,
# which runs too.
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
ifeq ($(DEVICE),cuda)
TORCH ?= torch==2.13.0
else
TORCH ?= torch==2.13.0+cpu
endif

# The packages `train` and `eval` have common names: the repository goes first on the path, before site-packages.
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
PIP := $(PY) -m pip install -qq --disable-pip-version-check --no-input

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(STAMP) ## .venv with the pinned dependencies (DEVICE=cpu|cuda, TORCH=..., PYTHON=...)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' is not a Python 3.11; install Python 3.11 with its venv module," \
	    "or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "== creating .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "== installing $(TORCH) (200 MB for a CPU, 3 GB for a GPU)"
	@$(PIP) -c requirements.txt "$(TORCH)" || { \
	  echo "== the package index has no CPU build: installing the larger default build"; \
	  $(PIP) -c requirements.txt torch==2.13.0; }
	@echo "== installing the pinned dependencies (150 MB)"
	@$(PIP) -r requirements.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## prepare a corpus, train, evaluate, serve and ask, all in 5 minutes on 2 cores
	@$(PY) -m demo.run

lint: install ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The suite runs on the CPU, on a machine with a GPU too: there `make test-gpu` adds the tests that need one.
CPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

test: lint ## lint, then the test suite without the slow tests
	$(CPU) $(PY) -m pytest -m "not slow" -n $(JOBS) -q

test-all: lint ## lint, then every test that a CPU can run
	$(CPU) $(PY) -m pytest -n $(JOBS) -q

test-gpu: install ## the tests that need a GPU
	$(PY) -m pytest -m gpu -q

format: install ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## step time, tokens/s and memory of every objective
	OMP_NUM_THREADS=1 $(PY) benchmarks/train_step.py

lock: install ## write requirements.txt from .venv
	@{ sed -n '/^#/p' requirements.txt; \
	  $(PY) -m pip freeze --all --exclude torch --exclude pip --exclude-editable; } > requirements.tmp
	@mv requirements.tmp requirements.txt && touch $(STAMP)

clean: ## remove .venv and the caches; runs/ and data/ stay
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
