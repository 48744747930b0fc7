#!/usr/bin/env bash
# Prepares this machine and starts both daemons on it, for `make`: a way to try Cerebrum.
# docs/deploy.md has the deployment.
#
#     ./run.sh                 prepare; start vpsd and cm4d; open the REPL, or without a terminal
#                              print one completion; stop what was started
#     ./run.sh setup [SET]     only prepare: system packages, .venv, the default model; SET adds
#                              packages: "test" those of tests and linters, "check" the same
#                              without the model, "clients" also other people's clients,
#                              "engines" also llama-server, which is built,
#                              "nightly" all of these and more,
#                              "scale" those of "test", and vLLM
#
# stdout has nothing but the completion, so it can be piped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

MODEL=qwen_0_5b
PYTHON=.venv/bin/python
STATE=.run # the logs of pip and of the daemons
BUILD=''   # the folder of temporary files of a long command that runs
START_SECONDS=60

note() { printf '%s\n' "$*" >&2; }

die() {
	note "run.sh: $*"
	exit 1
}

# Each background process has a session of its own, which Ctrl-C does not reach; stop_all does.
PIDS=()
stop_all() {
	local pid
	for pid in "${PIDS[@]}"; do
		kill -- "-$pid" 2>/dev/null || true
	done
	wait
	[[ -z $BUILD ]] || rm -rf "$BUILD"
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP

# ------------------------------------------------------------------------------------------ prepare

have_llama() { [[ -x $PYTHON ]] && "$PYTHON" -c 'import llama_cpp' 2>/dev/null; }

# can_decode: an import is no proof. Built for a CPU with more features, llama.cpp dies of SIGILL
# (status 128 + 4) when it computes. Any other failure, such as too little memory, is no reason to
# build it anew.
can_decode() {
	{
		"$PYTHON" -c '
import os, vpsd
from cerebrum.settings import read_environment
from cerebrum.vps.llama import Llama, Settings, Slot, start_library
config = vpsd.load_config(read_environment(os.environ, vpsd.HERE))
file = config.models_dir / config.models[-1].file
if file.exists():
    start_library()
    settings = Settings(n_ctx=256, sequences=1)
    Llama(file, settings, lambda _: True).decode([(Slot(0), [1, 2], 1)])' || (($? != 132))
	} &>/dev/null
}

# need_system SET: installs the Debian packages that are missing, or names them all in one line.
need_system() {
	local packages=() needed=(curl:curl) pair
	if command -v python3 >/dev/null; then check_python; else packages+=(python3); fi
	python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3-venv)
	if [[ $1 == @(engines|nightly) ]] || ! have_llama; then needed+=(c++:g++ cmake:cmake); fi
	[[ $1 == run ]] || needed+=(shellcheck:shellcheck)
	[[ $1 != @(clients|nightly) ]] || needed+=(chromium:chromium node:nodejs npm:npm)
	[[ $1 != nightly || $EUID != 0 ]] ||
		needed+=(tmux:tmux systemd-nspawn:systemd-container debootstrap:debootstrap
			qemu-aarch64:qemu-user-binfmt)
	for pair in "${needed[@]}"; do # COMMAND:PACKAGE
		command -v "${pair%:*}" >/dev/null || packages+=("${pair#*:}")
	done
	if ((${#packages[@]} > 0)); then
		if ! command -v apt-get >/dev/null || ((EUID != 0)); then
			die "missing system packages; please run:  sudo apt-get install ${packages[*]}"
		fi
		note "installing ${packages[*]}"
		export DEBIAN_FRONTEND=noninteractive
		apt-get update -qq &&
			apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
	fi
	check_python
}

# Debian 11 has 3.9.
check_python() {
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		die "expected Python 3.11 or newer, got $(python3 --version)"
}

# requirements SET: one requirement a line, from pyproject.toml.
requirements() {
	"$PYTHON" - "$1" <<-'EOF'
	import sys, tomllib
	with open("pyproject.toml", "rb") as file:
	    project = tomllib.load(file)
	groups = project["dependency-groups"] | {"run": []}

	def members(name):
	    for entry in groups[name]:
	        yield from [entry] if isinstance(entry, str) else members(entry["include-group"])

	print(*project["project"]["dependencies"], *members(sys.argv[1]), sep="\n")
	EOF
}

# show_progress PID: until a process ends, shows for how long it has run, and the step of a build
# ("[12/180]" or "[ 7%]") that its log names last; without a terminal, twice a minute.
show_progress() {
	local pid=$1 step shown=0
	while kill -0 "$pid" 2>/dev/null; do
		step=$(grep -soE '^ *\[ *[0-9]+(%|/[0-9]+)\]' "$STATE/setup.log" | tail -n 1) || step=''
		if [[ -t 2 ]]; then
			printf '\r%s s %s ' "$SECONDS" "$step" >&2
		elif ((SECONDS >= shown + 30)); then
			shown=$SECONDS
			note "$SECONDS s $step"
		fi
		sleep 0.2
	done
	[[ ! -t 2 ]] || printf '\r' >&2
}

# quietly LABEL COMMAND...: runs a long command, whose output goes to a log. Its temporary files go
# when it ends or is stopped, and after a SIGKILL at the next run.
quietly() {
	local label=$1 log=$STATE/setup.log
	shift
	note "$label"
	SECONDS=0
	BUILD=$PWD/$STATE/build
	rm -rf "$BUILD"
	mkdir "$BUILD"
	TMPDIR=$BUILD setsid "$@" >"$log" 2>&1 </dev/null &
	PIDS+=($!)
	show_progress $!
	wait $! || { tail -n 30 "$log" >&2; die "failed: $label; the whole output is in $log"; }
	PIDS=()
	rm -rf "$BUILD"
	BUILD=''
	note "$label: done in $SECONDS s"
}

# make_venv SET: the packages of one of pyproject.toml's groups, or of "run".
make_venv() {
	local wanted=.venv/wanted-$1.txt installed=.venv/installed-$1.txt
	local label='installing Python packages'
	# Made for another Python or, like pip's wheel, CPU
	if [[ -e $installed ]] && ! { have_llama && can_decode; }; then
		python3 -m venv --clear .venv
		"$PYTHON" -m pip cache remove llama_cpp_python &>/dev/null || true # pip may keep nothing
	fi
	[[ -x $PYTHON ]] || python3 -m venv .venv
	requirements "$1" >"$wanted"
	! cmp -s "$wanted" "$installed" || return 0
	have_llama || label='building llama.cpp (about five minutes on two slow cores, once)'
	# Verbose: its log has the steps of the build
	quietly "$label" "$PYTHON" -m pip install --verbose --disable-pip-version-check -r "$wanted"
	mv "$wanted" "$installed"
}

setup() {
	mkdir -p "$STATE"
	need_system "$1"
	case $1 in check | engines | scale) make_venv test ;; *) make_venv "$1" ;; esac
	[[ $1 != check ]] || return 0
	local options=()
	[[ $1 == run ]] || options=(--no-tune) # test results must not depend on the CPU
	"$PYTHON" vpsd.py fetch "${options[@]}" "$MODEL" >&2
	# If one cannot be built, go on: its tests are skipped and give the reason.
	if [[ $1 == @(engines|nightly) ]]; then
		quietly "other people's engines (llama-server is built once, about four minutes)" \
			"$PYTHON" tests/engines.py
		note "$(<"$STATE/setup.log")"
	elif [[ $1 == scale ]]; then
		quietly 'vLLM (installed once, about four minutes)' "$PYTHON" tests/scale.py
		note "$(<"$STATE/setup.log")"
	fi
}

# ---------------------------------------------------------------------------------------------- run

# setting NAME: prints its value in the environment or in .env, as the daemons read them.
setting() {
	"$PYTHON" -c '
import os, sys, pathlib
from cerebrum.settings import read_environment
print(read_environment(os.environ, pathlib.Path()).text(sys.argv[1]))' "$1"
}

# start NAME PORT_VARIABLE COMMAND...: starts a daemon on its usual port, or on a free one if that
# is taken, and sets ADDRESS to its URL.
start() {
	local name=$1 variable=$2 log=$STATE/$1.log pid
	shift 2
	: >"$log" # the previous log names another port
	env "$variable=$(free_port "$variable")" setsid "$@" >>"$log" 2>&1 </dev/null &
	pid=$!
	PIDS+=("$pid")
	wait_for "$name" "$pid" grep -qs 'listening on http://' "$log"
	ADDRESS=$(sed -nE 's|.*listening on (http://[^ ]*).*|\1|p' "$log" | head -n 1)
	ADDRESS=${ADDRESS/0.0.0.0/127.0.0.1}
	ADDRESS=${ADDRESS/'[::]'/'[::1]'}
}

# free_port VARIABLE: prints the port that the variable or its default names, or 0 (any free port)
# if it is taken.
free_port() {
	local port
	port=$(setting "$1")
	[[ -n $port ]] || case $1 in CEREBRUM_CM4_PORT) port=7000 ;; *) port=9000 ;; esac
	if (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
		note "port $port is taken; using another one"
		port=0
	fi
	printf '%s' "$port"
}

# wait_for NAME PID COMMAND...: waits until COMMAND succeeds; gives up when PID ends or time is up.
wait_for() {
	local name=$1 pid=$2 deadline=$((SECONDS + START_SECONDS))
	shift 2
	until "$@"; do
		kill -0 "$pid" 2>/dev/null || { tail -n 20 "$STATE/$name.log" >&2; die "$name stopped"; }
		((SECONDS < deadline)) ||
			die "$name was not ready within $START_SECONDS s; see $STATE/$name.log"
		sleep 0.1
	done
}

run() {
	local host
	setup run
	[[ -n $(setting CEREBRUM_API_KEY) ]] || ./generate_api_key.sh --write .env >&2

	start vpsd CEREBRUM_VPS_PORT "$PYTHON" vpsd.py
	host=$(setting CEREBRUM_CM4_HOST)
	# By default for this machine only; a deployed Pi listens on the LAN.
	export CEREBRUM_VPS_URL=$ADDRESS CEREBRUM_CM4_HOST=${host:-127.0.0.1}
	start cm4d CEREBRUM_CM4_PORT "$PYTHON" -s -S cm4d.py
	export CEREBRUM_URL=$ADDRESS no_proxy='*'
	wait_for cm4d "${PIDS[1]}" curl -qsf -o "$STATE/health.json" "$CEREBRUM_URL/health"
	note "Cerebrum is up at $CEREBRUM_URL, which is also a page for a browser"

	if [[ -t 0 && -t 1 ]]; then
		set -m # gives the REPL the terminal, so that Ctrl-C does not reach make
		./cerebrum_repl.sh
	else
		note 'def fibonacci(n):'
		./cerebrum_repl.sh -n 128 - <<<'def fibonacci(n):'
		echo
	fi
}

case "$*" in
	setup) setup run ;;
	'setup check' | 'setup test' | 'setup clients') setup "$2" ;;
	'setup engines' | 'setup nightly' | 'setup scale') setup "$2" ;;
	'') run ;;
	*) die "expected: run.sh [setup [check|test|clients|engines|nightly|scale]]" ;;
esac
