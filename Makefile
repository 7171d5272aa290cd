# `make help` says what there is. The first target used makes .venv and installs the package into it.
#
#   PYTHON=python3.12   the interpreter that .venv is made from (3.10 or newer)
#   TORCH=registry      torch and torchvision as pip finds them (the default; runs with and without a GPU)
#   TORCH=cpu           a CPU-only torch, a tenth of the size, without torchvision
#   TORCH=torch==2.11.0 any requirement that pip understands
#   ARGS=...            handed to pytest, to the demo or to the benchmark
#   JOBS=2              processes that the tests are shared between, of one thread each
#   DIFFUSERS_SRC=path  a clone of diffusers, for `make compat`

PYTHON ?= python3
ARGS ?=
JOBS ?= 2
VENV := .venv
HELD := $(shell cat $(VENV)/.torch 2>/dev/null)
TORCH ?= $(or $(HELD),registry)
# Beside a CPU-only torch the registry's torchvision does not import, and takes diffusers down with it.
CPU_TORCH ?= torch==2.13.0+cpu
WANTED := $(if $(filter registry,$(TORCH)),torch torchvision,$(if $(filter cpu,$(TORCH)),$(CPU_TORCH),$(TORCH)))
# torch-fidelity brings torchvision, and that its own torch: only where both came from the registry may it be added.
TESTED := test
ifeq ($(TORCH),registry)
TESTED := test,eval
endif

# The root must not enter sys.path: its folders (models, eval, ...) would be importable under their bare names.
export PYTHONSAFEPATH := 1
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
INTERPRETED := $(wildcard tests/interpreter/test_*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check format bench tables compat docs notebooks report-look clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

demo: $(VENV)/.core ## sample the embedded teacher with several solvers; writes out/demo.png
	@mkdir -p out
	$(PY) -m fewstep demo --out out/demo.png $(ARGS)

# A file's tests stay together (they share what is slow to make), and processes do not fight over cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.test ## the whole suite but the slow ones
	$(PYTEST) -m "not slow" $(ARGS)
ifneq ($(INTERPRETED),)
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpreter $(ARGS)
endif

test-slow: $(VENV)/.test ## the slow ones too
	$(PYTEST) $(ARGS)
ifneq ($(INTERPRETED),)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter $(ARGS)
endif

check: $(VENV)/.dev ## lint, formatting, types; changes nothing
	$(PY) -m ruff check --output-format concise .
	$(PY) -m ruff format --check --output-format concise .
	$(PY) -m pyrefly check --config pyproject.toml --python-interpreter-path $(PY) $(VENV)/src/fewstep

format: $(VENV)/.dev ## format, and mend what the linter can mend
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

bench: $(VENV)/.test ## every solver at 5 to 20 calls, beside diffusers' schedulers
	$(PY) benchmarks/solvers.py $(ARGS)

tables: $(VENV)/.test ## the README's tables of shift, teleportation and search, as measured; ARGS=--run measures anew
	$(PY) benchmarks/tables.py $(ARGS)

compat: $(VENV)/.test ## diffusers' own scheduler tests on ours: make compat DIFFUSERS_SRC=a-clone-of-diffusers
	@test -n "$(DIFFUSERS_SRC)" || { echo 'say where a clone of diffusers is: make compat DIFFUSERS_SRC=path' >&2; exit 1; }
	$(PY) benchmarks/compat.py $(DIFFUSERS_SRC) $(ARGS)

docs: $(VENV)/.docs ## build the documentation into out/site
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --site-dir out/site
	@echo out/site/index.html

notebooks: $(VENV)/.test ## run the notebooks into out/notebooks, with jupyter where it is installed
	@$(PY) -c 'import nbconvert, ipykernel' 2>/dev/null || { \
	  echo 'jupyter is not installed: $(PIP) nbconvert ipykernel (make test runs them without)' >&2; exit 1; }
	$(PY) -m nbconvert --to notebook --execute --output-dir out/notebooks notebooks/*.ipynb $(ARGS)

# Debian calls the package chromium; CHROMIUM=path for another one.
CHROMIUM ?= $(firstword $(shell command -v chromium chromium-browser google-chrome 2>/dev/null))
REPORT ?= out/report

report-look: $(VENV)/.test ## a suite's page as a browser shows it, in out/report.png; look at it (REPORT=folder for yours)
	@test -n "$(CHROMIUM)" || { echo 'no Chromium here: apt-get install chromium, or say CHROMIUM=path' >&2; exit 1; }
	@mkdir -p out
	test -f $(REPORT)/index.html || $(PY) -m fewstep eval suite --model digits --samplers abm,deis,heun --nfe 5,10 \
	  --num 100 --metrics fd,prdc --out $(REPORT)
	"$(CHROMIUM)" --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1200,2000 \
	  --screenshot="$(CURDIR)/out/report.png" "file://$(abspath $(REPORT))/index.html" 2>/dev/null
	@test -s out/report.png && echo out/report.png

clean: ## remove .venv and everything that was made
	rm -rf $(VENV) out build dist fewstep.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a step is done again when setup.cfg changes, and only then.

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo 'fewstep needs Python 3.10 or newer; "$(PYTHON)" is' "$$($(PYTHON) --version 2>&1)." \
	       'Name another one: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/fewstep
	@touch $@

$(VENV)/.torch: | $(VENV)/.made
	@echo 'installing $(WANTED) (minutes on a slow line)'
	@$(PIP) $(WANTED) || { \
	  echo "pip found no '$(WANTED)'. CPU-only builds carry a +cpu version, which the index that pip is" \
	       'configured for must offer; without them, run make without TORCH=cpu.' >&2; exit 1; }
	@echo '$(TORCH)' > $@

$(VENV)/.core: setup.cfg pyproject.toml | $(VENV)/.torch
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.core
	$(PIP) --editable '.[$(TESTED)]'
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.core
	$(PIP) --editable '.[docs]'
	@touch $@

ifneq ($(HELD),)
ifneq ($(HELD),$(TORCH))
ifneq ($(MAKECMDGOALS),clean)
$(error .venv was made with TORCH=$(HELD), not $(TORCH): run `make clean` first)
endif
endif
endif
