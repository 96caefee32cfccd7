# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv first; a second call is instant.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
export PYTHON
unexport PYTHONPATH # the checkout under test is this one
unexport PYTHONDONTWRITEBYTECODE # two hundred test files would be compiled anew by every worker of every run
# one thread a worker: two workers with two threads each would only wait for each other
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=20 --durations-min=5

.PHONY: help setup demo test test-all lint format types tables wheel clean
help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: .venv/ready ## the environment in .venv, exactly as pinned in constraints.txt
.venv/ready: constraints.txt pyproject.toml .ci/setup .ci/torchvision_first.py
	@.ci/setup

demo: .venv/ready ## optimize a real model by a recipe and show what changed
	$(BIN)/python examples/demo.py

test: .venv/ready ## the fast tier
	$(TEST) -m "not slow"

test-all: .venv/ready ## every test
	$(TEST)

lint: .venv/ready ## ruff's rules and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/ready ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tables: .venv/ready ## the tables of mechanisms in README.md and docs/mechanisms.md, from the code
	$(BIN)/python -m reattend mechanisms --md > docs/mechanisms.md
	$(BIN)/python -m reattend.models.quality.overview docs/quality/byte_lm.jsonl README.md

# the root is the package, so mypy needs a folder that holds it under its own name
types: .venv/ready ## mypy, strict
	@mkdir -p .venv/types && ln -sfn "$(CURDIR)" .venv/types/reattend
	cd .venv/types && MYPYPATH="$(CURDIR)/.venv/types" ../bin/mypy --config-file reattend/pyproject.toml --cache-dir reattend/.mypy_cache -p reattend

wheel: .venv/ready ## dist/*.whl, built from a copy so that no build/ is left here
	@rm -rf .venv/wheel && mkdir -p .venv/wheel dist && git ls-files -z | xargs -0 cp --parents -t .venv/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .venv/wheel

clean: ## remove what make made
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
