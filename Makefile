# Every target can be repeated and then does only what is missing. ./run.sh prepares the system packages, .venv and the
# default model.

PYTHON = .venv/bin/python
SCRIPTS = cerebrum_repl.sh generate_api_key.sh run.sh systemd/install.sh .ci/run
BENCHMARKS = $(wildcard $(patsubst %,tests/bench/%.py,relay generate engine quality editor drafts prepare parse page fleet))

.PHONY: help run test test-clients test-engines test-slow lint bench fuzz clean
.PHONY: install-cm4 install-vps uninstall-cm4 uninstall-vps

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 15

run: ## prepare this machine, start both daemons, open the REPL
	@./run.sh

test: ## run the tests, with the default model
	@./run.sh setup test
	$(PYTHON) -m pytest

test-clients: ## install other people's clients and run them against both daemons
	@./run.sh setup clients
	$(PYTHON) -m pytest -m clients

test-engines: ## build other people's engines (about four minutes, once) and run them behind the Pi
	@./run.sh setup engines
	$(PYTHON) -m pytest -m engines

test-slow: ## run the tests that take minutes, need root, or need a second model (1.1 GB)
	@./run.sh setup test
	$(PYTHON) vpsd.py fetch --no-tune qwen_1_5b
	$(PYTHON) -m pytest -m slow

lint: ## run ruff, mypy --strict and shellcheck
	@./run.sh setup test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	shellcheck $(SCRIPTS)

# One after another, since two at a time would disturb each other.
bench: ## run the benchmarks without llama-server, one line of JSON each
	@./run.sh setup test
	@for benchmark in $(BENCHMARKS); do $(PYTHON) $$benchmark || exit 1; done

fuzz: ## send random bytes to both daemons
	@./run.sh setup test
	$(PYTHON) tests/fuzz_sockets.py

# DESTDIR stages the files in a folder. PREFIX is the daemon's folder.
install-cm4: ## install the Pi's daemon as a service of this machine, or upgrade it (as root)
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install.sh cm4

install-vps: ## the same for the VPS's daemon
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install.sh vps

uninstall-cm4: ## remove the Pi's daemon and keep its configuration
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install.sh uninstall-cm4

uninstall-vps: ## the same for the VPS's daemon
	@DESTDIR="$(DESTDIR)" PREFIX="$(PREFIX)" systemd/install.sh uninstall-vps

clean: ## remove all that make built, except the models and .env
	rm -rf .venv .run .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
