# Every target is safe to repeat: what is there already is not done again. ./run.sh prepares what
# these need: system packages, .venv, the default model.

PYTHON = .venv/bin/python
SCRIPTS = cerebrum_repl.sh generate_api_key.sh run.sh .ci/run
BENCHMARKS = $(wildcard $(patsubst %,tests/bench/%.py,relay generate engine quality parse))

.PHONY: help run test test-slow lint bench fuzz clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

run: ## from nothing to a completion: prepare, start both daemons, open the REPL
	@./run.sh

test: ## the tests, with the default model
	@./run.sh setup test
	$(PYTHON) -m pytest

test-slow: ## the tests that take minutes or need root, such as booting the systemd units
	@./run.sh setup test
	$(PYTHON) -m pytest -m slow

lint: ## ruff, mypy --strict, shellcheck
	@./run.sh setup test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	shellcheck $(SCRIPTS)

# One after another, since two at a time would measure each other.
bench: ## the benchmarks, one line of JSON each
	@./run.sh setup test
	@for benchmark in $(BENCHMARKS); do $(PYTHON) $$benchmark || exit 1; done

fuzz: ## random bytes against both daemons' sockets
	@./run.sh setup test
	$(PYTHON) tests/fuzz_sockets.py

clean: ## remove what make built; models and the .env stay
	rm -rf .venv .run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
