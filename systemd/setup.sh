#!/usr/bin/env bash
# /usr/bin/cerebrum-cm4 and /usr/bin/cerebrum-backend of the Debian packages. Each step is skipped
# when it is done, so every command can be repeated, and completes what was interrupted.
set -euo pipefail
umask 022

NAME=${0##*/}
LIB=/usr/lib/$NAME
SETTINGS=/etc/$NAME/env # what .env is from copied files
DROP_INS=/etc/systemd/system
LISTEN=$DROP_INS/$NAME.socket.d/listen.conf
MEMORY=$DROP_INS/$NAME.service.d/memory.conf
KEY=/etc/credstore/CEREBRUM_API_KEY
STATE=/var/lib/cerebrum
PLACE=/var/lib/cerebrum-backend # llama.cpp and the models
TREE=$PLACE/cache/build         # pip's temporary files
VENV=/opt/cerebrum-backend/venv # in the package: $PLACE/llama-VERSION
if [[ $NAME == cerebrum-cm4 ]]; then
	RUN=(as_daemon /usr/bin/python3 -s -S "$LIB/cm4d.py")
else
	RUN=(as_daemon env STATE_DIRECTORY="$STATE" "$VENV/bin/python" -s "$LIB/vpsd.py")
fi

usage() {
	if [[ $NAME == cerebrum-cm4 ]]; then
		cat <<-END
		Usage: cerebrum-cm4 setup [URL]     connect this Pi with its backend, and start
		       cerebrum-cm4 --check         find what keeps the daemon from working

		setup asks for the line that "cerebrum-backend setup" printed, or for the backend's URL and
		its key, and does not show what is typed. With a URL it reads the key alone. An empty answer
		keeps what is set. Nothing is changed unless the backend answers and takes the key.
		END
	else
		cat <<-END
		Usage: cerebrum-backend setup [--listen ADDRESS[:PORT]] [--model ID]
		                             make a key, build llama.cpp, fetch and tune a model, start
		       cerebrum-backend COMMAND
		                             choose, fetch, tune, memory or --check: vpsd's own
		                             commands; each has --help

		setup listens on Tailscale's address if none is given, asks for a model if none is here, and
		prints the line for the Pi. Repeat it to change an answer, and after you have copied or
		removed a model. All commands give way to the daemon that runs: they get the CPU that it
		leaves.
		END
	fi
	echo "Settings are in $SETTINGS, models in /etc/$NAME/models.toml;"
	echo "$LIB/.env.example lists all settings."
}

die() { printf '%s: %s\n' "$NAME" "$*" >&2; exit 1; }

# as_daemon COMMAND...: runs a command as the daemon's user, in a folder that this user may enter.
# Root must run nothing that this user can change, such as the environment of llama.cpp. It gives
# way to the daemon, which may serve: it gets the CPU that is left, and when memory runs out, the
# kernel kills it first.
as_daemon() (
	cd / && echo 1000 >/proc/self/oom_score_adj &&
		exec runuser -u cerebrum -- nice -n 19 "$@"
)

# copy_keys: to the folder DRAFT, which is like the one that systemd makes for the daemon.
copy_keys() {
	DRAFT=$(mktemp -d /run/cerebrum.XXXXXX)
	trap 'rm -rf -- "$DRAFT"' EXIT
	cp -t "$DRAFT" -- /etc/credstore/CEREBRUM_* 2>/dev/null || true
}

# check: the daemon's --check, with the keys in DRAFT.
check() {
	[[ -n ${DRAFT-} ]] || copy_keys
	chown -R cerebrum: "$DRAFT"
	CREDENTIALS_DIRECTORY=$DRAFT "${RUN[@]}" --check
}

# setting NAME: prints its value.
setting() {
	local name="^[[:space:]]*(export[[:space:]]+)?$1="
	[[ ! -e $SETTINGS ]] ||
		sed -nE "s/${name}[\"']?([^\"']*)[\"']?[[:space:]]*\$/\2/p" "$SETTINGS" | tail -n 1
}

# put_settings: from standard input, in one step.
put_settings() {
	install -m 600 -o cerebrum -g cerebrum /dev/stdin "$SETTINGS.part"
	mv -f -- "$SETTINGS.part" "$SETTINGS"
}

# ask PROMPT [-s]: prints the line that was typed, or the first of standard input. -s: what is typed
# is not shown.
ask() {
	local line
	[[ ! -t 0 ]] || printf '%s: ' "$1" >&2
	IFS= read -r "${@:2}" line || true
	[[ ! -t 0 || $# == 1 ]] || echo >&2
	printf '%s\n' "$line"
}

# start restart|try-restart: restarts the daemon. If that fails, shows the last line of its log.
start() {
	systemctl daemon-reload
	if ! systemctl "$1" "$NAME.service" ||
		[[ $(systemctl show --value -p ActiveState "$NAME") == activating ]]; then
		die "the daemon does not come up: $(journalctl -n 1 -o cat _SYSTEMD_UNIT="$NAME.service")"
	fi
}

setup_cm4() {
	local url=${1-} key='' old prompt sum
	[[ $# -lt 2 && ${1-} != -* ]] || { usage >&2; exit 2; }
	copy_keys
	if [[ -z $url ]]; then
		old=$(setting CEREBRUM_VPS_URL)
		old=${old%%[[:space:]]*} # the line may have been pasted there whole, with its key
		prompt="the line from the backend, or its URL; not shown${old:+ (Enter: $old)}"
		read -r url key <<<"$(ask "$prompt" -s)"
		url=${url:-$old}
	fi
	[[ $url =~ ^https?://[^/[:space:]]+/?$ ]] ||
		die "expected a URL like http://100.64.0.1:9000, got something else"
	prompt='key, not shown'
	[[ ! -s $DRAFT/${KEY##*/} ]] || prompt+=' (Enter: the present one)'
	key=${key:-$(ask "$prompt" -s)}
	[[ -z $key ]] || "$LIB/generate_api_key.sh" --set "$DRAFT/${KEY##*/}" <<<"$key" >/dev/null
	CEREBRUM_VPS_URL=$url check || die "nothing was changed"
	install -d -m 700 "${KEY%/*}"
	# On a machine that is also the backend, an old key behind the new one stays.
	[[ -z $key || ,$(cat "$KEY" 2>/dev/null), == ",$key,"* ]] ||
		"$LIB/generate_api_key.sh" --set "$KEY" <<<"$key" >/dev/null
	{
		grep -v '^CEREBRUM_VPS_URL=' "$SETTINGS" 2>/dev/null || true
		echo "CEREBRUM_VPS_URL=$url"
	} | put_settings
	start restart
	echo "Cerebrum is at http://$(uname -n).local:7000/, a page for a browser." \
		"Editors use the same address."
	if [[ -e $LIB/vscode ]]; then
		sum=$(/usr/bin/python3 -I "$LIB/cerebrum/pi/files.py" "$LIB/vscode" | sha256sum)
		echo "VS Code installs cerebrum.vsix from there, with the sha256 ${sum%% *}"
	fi
}

# have_llama: whether llama.cpp is built, in the version that vpsd needs and for this Python, with
# what `tune` needs.
have_llama() { as_daemon "$VENV/bin/python" -c "import llama_cpp${1-, gguf}" 2>/dev/null; }

# can_decode: whether the smallest model survives a decode. Built for a CPU with more features,
# llama.cpp can be imported, but dies of SIGILL (status 128 + 4) when it computes. Any other failure
# is no reason to build it anew.
can_decode() {
	local folder; folder=$(setting CEREBRUM_MODELS_DIR)
	as_daemon "$VENV/bin/python" -c '
import glob, os, sys
from llama_cpp import llama_cpp as llama
for file in sorted(glob.glob(sys.argv[1] + "/*.gguf"), key=os.path.getsize)[:1]:
    params = llama.llama_model_default_params()
    params.use_extra_bufts = False # repacked weights would take as much memory again
    model = llama.llama_model_load_from_file(os.fsencode(file), params)
    params = llama.llama_context_default_params()
    params.n_ctx = 256
    context = llama.llama_init_from_model(model, params)
    llama.llama_decode(context, llama.llama_batch_get_one((llama.llama_token * 2)(1, 2), 2))' \
		"${folder:-$PLACE/models}" &>/dev/null || (($? != 132))
}

# build: what cerebrum-llama.service runs, also at each start of the daemon. The folder with the
# version is complete when its packages can be imported. Then what runs untuned here is tuned; if
# that fails, as on a busy machine, again in an hour. Only a tuning that changes something restarts
# the daemon.
build() {
	local model said tuned='' failed=''
	trap 'as_daemon rm -rf "$TREE"' EXIT
	trap 'exit 143' TERM # once pip has ended
	# The wheel that pip keeps is for the other CPU, too
	can_decode || as_daemon rm -rf "$VENV" "$PLACE/cache/wheels"
	if ! have_llama; then
		install -d -o cerebrum -g cerebrum "$PLACE"
		as_daemon rm -rf "$TREE" # of a build that got SIGKILL
		as_daemon mkdir -p "$TREE"
		have_llama '' || as_daemon /usr/bin/python3 -m venv --clear --system-site-packages "$VENV"
		as_daemon env HOME="$PLACE" TMPDIR="$TREE" "$VENV/bin/python" -m pip install --quiet \
			--disable-pip-version-check --cache-dir="$PLACE/cache" \
			"llama-cpp-python==${VENV##*-}" "gguf>=0.17"
		systemctl try-restart "$NAME.service" # until now, the daemon has used the old version
		find "$PLACE" -maxdepth 1 -name 'llama-*' ! -path "$VENV" -exec rm -rf {} +
	fi
	# The daemon has just started, and its models do not take the memory yet
	for model in $(models ', untuned'); do
		said=$("${RUN[@]}" tune "$model") || failed=yes
		printf '%s\n' "$said"
		[[ $said != *'used from its next load on'* ]] || tuned=yes
	done
	[[ -z $failed ]] ||
		systemd-run -q -u cerebrum-llama-again --on-active=1h \
			systemctl start --no-block cerebrum-llama || true
	[[ ! -e $MEMORY ]] || (put_memory) || true # with wrong settings
	[[ -z $tuned ]] || start try-restart
}

# put_listen ADDRESS[:PORT]: sets the socket's address. An empty one keeps what is set, else takes
# Tailscale's.
put_listen() {
	local address=$1 old
	old=$(cat "$LISTEN" 2>/dev/null) || true
	[[ -n $address || -z $old ]] || return 0
	address=${address:-$(tailscale ip -4 2>/dev/null | head -n 1)} || true
	if [[ -z $address ]]; then
		echo "listening on 127.0.0.1 port 9000: there is no Tailscale, and no --listen"
		return 0
	fi
	[[ $address =~ ^([0-9.]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?$ ]] ||
		die "expected an IP address, got '$address'"
	[[ -n ${BASH_REMATCH[2]} ]] || address+=:9000
	install -D -m 644 /dev/stdin "$LISTEN" <<-END
	# From "cerebrum-backend setup", which changes it only if an address is given.
	[Socket]
	ListenStream=
	ListenStream=$address
	END
	[[ $old == "$(cat "$LISTEN")" ]] || ! systemctl is-active --quiet "$NAME.socket" ||
		{ systemctl daemon-reload; systemctl restart "$NAME.socket"; }
}

# put_memory: a limit that fits the models. A person's own is not touched. A limit below what the
# daemon uses would kill it, and waits for its next start.
put_memory() {
	local memory old used
	[[ ! -e $MEMORY ]] || grep -q '^# From "vpsd.py memory"' "$MEMORY" || return 0
	memory=$("${RUN[@]}" memory)
	[[ $memory =~ ^[0-9]+($|$'\n') ]] ||
		die "expected a number of MB from vpsd.py memory, got ${memory@Q}"
	old=$(cat "$MEMORY" 2>/dev/null) || true
	install -D -m 644 /dev/stdin "$MEMORY" <<-END
	# From "vpsd.py memory", after each change of models.
	# Write another limit with: systemctl edit $NAME
	$(grep '^#' <<<"$memory")
	[Service]
	MemoryMax=${memory%%$'\n'*}M
	END
	[[ $old != "$(<"$MEMORY")" || $(systemctl show --value -p NeedDaemonReload "$NAME") == yes ]] ||
		return 0
	used=$(systemctl show --value -p MemoryCurrent "$NAME" | grep -xE '[0-9]{1,18}') || used=0
	((used >> 20 > ${memory%%$'\n'*})) || systemctl daemon-reload
}

# models [MARK]: the ids of the models that are here, or that "vpsd.py memory" marks so.
models() { "${RUN[@]}" memory | sed -n "s/^# \([^ ]*\): .*${1-}\$/\1/p"; }

setup_backend() {
	local listen='' wanted='' model offers key failed=''
	while (($# > 0)); do
		case $1 in
			--listen) listen=${2-} ;;
			--model) wanted=${2-} ;;
			*) usage >&2; exit 2 ;;
		esac
		[[ -n ${2-} ]] || die "expected a value after $1"
		shift 2
	done
	install -d -o cerebrum -g cerebrum "$PLACE"
	as_daemon mkdir -p "$PLACE/models" # install would change the owner of what a link leads to
	install -d -o cerebrum -g cerebrum -m 700 "$STATE"
	install -d -m 700 "${KEY%/*}"
	[[ -s $KEY || -n $(setting CEREBRUM_API_KEY) ]] ||
		"$LIB/generate_api_key.sh" --write "$KEY" >/dev/null
	put_listen "$listen"
	echo "building llama.cpp, four minutes on two cores, and tuning the models that are here," \
		"unless that is done" >&2
	systemctl start cerebrum-llama || die "llama.cpp was not built; the next try is in 5 minutes:
		$(journalctl -n 1 -o cat -u cerebrum-llama -t "$NAME")"
	if [[ -z $wanted && -z $(models) ]]; then
		offers=$("${RUN[@]}" choose) || true
		model=$(sed -n 's/^\* \([^ ]*\).*/\1/p' <<<"$offers")
		if [[ -z $model ]]; then
			model=$("${RUN[@]}" memory | sed -n 's/^# no model is here; the smallest is //p')
			offers+=${offers:+$'\n'}"no speed is known; the smallest model is $model"
		fi
		printf '%s\n' "$offers"
		wanted=$(ask "which model (Enter: $model)")
		wanted=${wanted:-$model}
	fi
	for model in $wanted $(models); do # those that are here are checked, and tuned if they were not
		"${RUN[@]}" fetch "$model" </dev/null || failed+=" $model"
	done
	[[ -e $SETTINGS ]] || echo "# $LIB/.env.example lists all settings" | put_settings
	put_memory
	start restart
	check || true
	[[ -s $KEY ]] && key=$(<"$KEY") || key=$(setting CEREBRUM_API_KEY)
	printf '\nOn the Pi, run "sudo cerebrum-cm4 setup" and paste this line:\n\nhttp://%s %s\n' \
		"$(sed -n 's/^ListenStream=//p' "$LISTEN" 2>/dev/null | grep . || echo 127.0.0.1:9000)" \
		"${key%%,*}"
	if [[ -n $failed || -z $(models) ]]; then
		printf '\nFAIL  models    not fetched:%s; to try again:  sudo %s setup --model ID\n' \
			"${failed:- none is here}" "$NAME"
		exit 1
	fi
}

# configure: what the package does at each installation and upgrade. Starts no stopped daemon.
configure() {
	[[ -d /run/systemd/system ]] || return 0
	if [[ ! -e $SETTINGS ]]; then
		echo "to set it up:  sudo $NAME setup"
	elif [[ $NAME == cerebrum-cm4 ]] || have_llama; then
		start try-restart
		systemctl is-active --quiet "$NAME" ||
			echo "$NAME is stopped; to start it:  sudo systemctl start $NAME"
	else
		systemctl daemon-reload # the daemon is restarted with the new unit
		systemctl restart --no-block cerebrum-llama # it may be tuning for the old version
		echo "llama.cpp is built in the background; until it is ready, the daemon that runs serves"
	fi
}

case ${1---help} in -h | --help) usage; exit ;; esac
((EUID == 0)) || die "expected to run as root, got user $(id -un); please run:  sudo $NAME $*"
case $NAME-$1 in
	*-setup) "setup_${NAME#cerebrum-}" "${@:2}" ;;
	*-configure | cerebrum-backend-build) "$1" ;;
	*---check) check ;;
	cerebrum-backend-fetch | cerebrum-backend-choose | cerebrum-backend-tune)
		"${RUN[@]}" "$@"
		[[ ! -e $MEMORY ]] || put_memory
		;;
	*) "${RUN[@]}" "$@" ;;
esac
