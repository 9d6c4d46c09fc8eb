# Two commands are enough: `make book` and `make test`. `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PYTHONPATH := $(CURDIR)
export OMP_NUM_THREADS ?= 1
ifdef DEVICE
export LMLOSSES_DEVICE := $(DEVICE)
endif

PYTEST := $(BIN)/python -m pytest -q -n 2

BOOK_SOURCES := _config.yml _toc.yml CHANGELOG.md $(wildcard benchmarks/results/*) \
	$(shell find book chapters lmlosses -type f \
	-not -name '*.pyc' -not -path '*/.ipynb_checkpoints/*' 2>/dev/null)
SITE := _build/html/index.html

.PHONY: help book test unit shapes nbval notebooks serve bench lint env browser clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# requirements of pyproject's extras at the versions of requirements.lock
$(VENV)/.book: tools/install.py pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python tools/install.py book
	touch $@

$(VENV)/.test: tools/install.py pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/python tools/install.py runtime lab book test bench
	touch $@ $(VENV)/.book

env: $(VENV)/.test  ## set up everything for working on the project

book: $(SITE)  ## build the book, from nothing if need be, and say where it is
	@echo "Open $(CURDIR)/$(SITE)"

# always a clean build: Sphinx repeats no warning for a page that it does not read again
$(SITE): $(VENV)/.book $(BOOK_SOURCES) tools/build_book.py
	$(BIN)/python tools/build_book.py

test: $(VENV)/.test browser  ## set up everything and run the whole suite
	$(MAKE) --no-print-directory unit shapes nbval
	@$(BIN)/python tools/ledger_counts.py

unit: $(VENV)/.test $(SITE)  ## library, docstrings, ledger, pages, wheel and the built book
	$(PYTEST) --dist worksteal

# the annotations' shapes and dtypes are held to what they say; bad input would meet them first,
# and kernels are read by a compiler of their own
shapes: $(VENV)/.test  ## run the library's tests with every annotation enforced
	PYTHONPATH=$(CURDIR):$(CURDIR)/tools \
		$(PYTEST) --dist worksteal -o addopts=--import-mode=importlib -m "not bad_input and not compiles" \
		--jaxtyping-packages=lmlosses,annotations.enforce \
		--ignore=tests/logprobs/test_triton.py \
		tests/losses tests/logprobs tests/analysis tests/lab tests/optim tests/schedules tests/test_precision.py \
		$(wildcard tests/test_[agmnr]*.py)

# on a GPU the pages' own assertions count; the stored outputs were computed on a processor
nbval: $(VENV)/.test  ## run every notebook and compare each cell's output with what is stored
	$(PYTEST) --dist loadfile -o addopts= -o filterwarnings= --nbval-current-env \
		--nbval-cell-timeout=300 $(if $(filter cuda%,$(DEVICE)),--nbval-lax,--nbval) chapters

notebooks: $(VENV)/.test  ## execute the pages whose text or library changed
	$(BIN)/python tools/notebooks.py

serve: book  ## read the book at http://localhost:8000
	$(BIN)/python -m http.server --directory _build/html 8000

bench: $(VENV)/.test  ## measure against peers, side by side (ARGS=--full for all shapes)
	$(BIN)/python -m benchmarks $(ARGS)

lint: $(VENV)/.test  ## ruff, and mypy on the library
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

browser:
	@$(PYTHON) tools/browser.py

clean:  ## delete what was built, and the environment if it is ours
	rm -rf _build .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
	if [ "$(VENV)" = .venv ]; then rm -rf .venv; fi
