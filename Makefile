# Every target sets up .venv first; see tools/setup.sh.
SHELL := bash
python := .venv/bin/python
pytest := $(python) -m pytest -n 2 --dist loadfile
prompt := What is a page table, and what is it good for?

.PHONY: help setup demo test test-all lint format bench report wheel pins clean

help: ## Says what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

setup: ## Makes .venv with the pinned packages, for CUDA where there is a GPU
	@tools/setup.sh

demo: setup ## Downloads a small model, once, and generates text
	.venv/bin/paged-jax generate --model demo --chat --temperature 0 \
	  --max-new-tokens 64 --prompt "$(prompt)"

test: setup ## Runs the quick tests, on the GPU if there is one
	$(pytest)

test-all: setup ## Runs all tests
	$(pytest) --tier all

lint: setup ## Checks style, formatting and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m pyrefly check --python-interpreter-path $(python)
	tools/hygiene.sh

format: setup ## Formats the code
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: setup ## Runs a benchmark: make bench NAME=waste, NAME=generate ARGS=...
	$(python) -m benchmarks.$(or $(NAME),generate) $(ARGS)

wheel: setup ## Builds the wheel and tries it in an environment of its own
	@tools/wheel.sh

report: setup ## Writes docs/performance.md and README's table from the results
	$(python) -m benchmarks.report

pins: ## Resolves requirements/*.txt anew: make pins JAX=0.11.2
	tools/pins.sh $(or $(JAX),$(error give the version: make pins JAX=0.11.2))

clean: ## Removes what set-up made
	rm -rf .venv .venv-newest
