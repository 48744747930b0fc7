# Every target can be repeated and then does only what is missing. ./run.sh prepares the system packages, .venv and the
# default model.

PYTHON = .venv/bin/python
BOTH_CORES = -n 2 --dist loadfile # a file's tests stay together, since they share daemons
SCRIPTS = cerebrum_repl.sh generate_api_key.sh run.sh systemd/setup.sh .ci/run
# What mypy does not say of the tests, which give fakes instead of what has types.
FAKES = arg-type assignment call-overload dict-item import-not-found import-untyped index list-item method-assign misc \
	operator return-value str-bytes-safe union-attr var-annotated
# Of the tests that need no model, those that take seconds.
QUICK = test_common pi/test_breaker pi/test_dialects pi/test_dispatcher pi/test_hints pi/test_page pi/test_suggest \
	text/test_languages text/test_prepare text/test_sure vps/test_admission vps/test_confidence
BENCHMARKS = $(wildcard $(patsubst %,tests/bench/%.py,relay engine quality ending editor lsp prepare))

.PHONY: help run check test test-clients test-engines test-scale test-slow test-packages test-nightly lint bench fuzz mutants deb clean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' Makefile | expand -t 15

run: ## prepare this machine, start both daemons, open the REPL
	@./run.sh

check: ## run ruff, and quick tests that need no model
	@./run.sh setup check
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m pytest $(BOTH_CORES) $(QUICK:%=tests/%.py)

test: ## run the tests, with the default model
	@./run.sh setup test
	$(PYTHON) -m pytest $(BOTH_CORES)

test-clients: ## install other people's clients and run them against both daemons
	@./run.sh setup clients
	$(PYTHON) -m pytest $(BOTH_CORES) -m "clients and not nightly"

test-engines: ## build llama-server (about four minutes, once) and run it and other engines behind the Pi
	@./run.sh setup engines
	$(PYTHON) -m pytest -m "engines and not nightly"

test-scale: ## install vLLM (gigabytes, once) and run it behind the Pi
	@./run.sh setup scale
	$(PYTHON) -m pytest -m scale

test-slow: ## run the tests that take minutes, need root, or need a second model (1.1 GB)
	@./run.sh setup test
	$(PYTHON) vpsd.py fetch --no-tune qwen_1_5b
	$(PYTHON) -m pytest $(BOTH_CORES) -m "slow and not packages and not nightly and not alone"
	$(PYTHON) -m pytest -m "alone and not packages and not nightly"

test-packages: ## install, upgrade, break and remove the packages on each Debian (as root; half an hour)
	@./run.sh setup test
	$(PYTHON) vpsd.py fetch --no-tune qwen_1_5b
	$(PYTHON) -m pytest -m packages

test-nightly: ## run all tests that take too long for each change, test-packages too (as root; an hour)
	@./run.sh setup nightly
	$(PYTHON) vpsd.py fetch --no-tune qwen_1_5b
	$(PYTHON) -m pytest -m "nightly or packages"

lint: ## run ruff, mypy --strict, vermin and shellcheck, and print how much a statement says
	@./run.sh setup test
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	MYPYPATH=tests:tests/text:tests/pi:tests/vps $(PYTHON) -m mypy --config-file= --check-untyped-defs $(FAKES:%=--disable-error-code=%) tests
	.venv/bin/vermin --quiet --target=3.9- --violations --eval-annotations cerebrum_lsp.py
	shellcheck $(SCRIPTS)
	$(PYTHON) tests/test_structure.py

# One after another, since two at a time would disturb each other.
bench: ## run the benchmarks without llama-server, one line of JSON each
	@./run.sh setup test
	@for benchmark in $(BENCHMARKS); do $(PYTHON) $$benchmark || exit 1; done

fuzz: ## send random bytes to both daemons
	@./run.sh setup test
	FUZZ_INPUTS=100000 $(PYTHON) -m pytest tests/test_wire.py -k random_bytes

mutants: ## run the tests against changed lines of the product, to see what they catch (hours)
	@./run.sh setup clients
	$(PYTHON) mutants/run.py

# In a copy: debhelper cleans whatever folder it builds in, .venv too.
deb: ## build Debian packages for the Pi, the VPS and a laptop, in the folder dist
	@for pair in dpkg-buildpackage:build-essential dh:debhelper dh_python3:dh-python help2man:help2man; do \
		command -v $${pair%:*} >/dev/null || set -- "$$@" $${pair#*:}; done; [ $$# = 0 ] || \
		{ echo "missing system packages; please run:  sudo apt-get install $$*" >&2; exit 1; }
	@rm -rf .run/deb dist/*.deb && mkdir -p .run/deb/cerebrum dist
	@umask 022 && cp -r debian systemd cerebrum vscode *.py *.sh models.toml pyproject.toml .env.example LICENSE .run/deb/cerebrum && \
		cd .run/deb/cerebrum && dpkg-buildpackage --build=binary --no-sign >../log 2>&1 || { tail -n 20 ../log; exit 1; }
	@cp .run/deb/*.deb dist && ls dist/*.deb

clean: ## remove all that make built, except the models and .env
	rm -rf .venv .run dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
