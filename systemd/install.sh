#!/usr/bin/env bash
# Installs a daemon as a systemd service, upgrades it, or removes it. `make install-cm4` and its like call this.
#
#     install.sh cm4 | vps                        install or upgrade the Pi's daemon, or the VPS's
#     install.sh uninstall-cm4 | uninstall-vps    remove it, but nothing that a person has made or changed
#
# Two variables of the environment:
#
#     PREFIX     the daemon's folder (default: where it is installed already, else /opt/cerebrum-pi or
#                /opt/cerebrum-backend)
#     DESTDIR    stages the files in this folder and touches nothing else. What belongs to one machine is left out:
#                the user, Debian's and Python's packages, the key, the drop-ins, starts and stops.
#
# Every file is replaced in one step, and what was done is not done again. So after an interrupted installation,
# another one completes it.
#
# Units, drop-ins and models.toml may be changed by a person. As dpkg does with its conffiles, PREFIX/.installed
# records the sha256 of what was installed. A file that still has it is replaced. A changed one is kept, and a new
# version is put beside it as FILE.new.
set -euo pipefail
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."

UNITS=/etc/systemd/system
KEY=/etc/credstore/CEREBRUM_API_KEY
PYTHON=/usr/bin/python3 # the units allow no other to be executed
DAEMON_USER=cerebrum
NOTIFY_RELOAD=253 # the systemd that knows Type=notify-reload

# The sha256 of the units and the models.toml that were copied by hand before there was an installer.
BY_HAND='088b39345bcf475660f128bce719e93b1a1ff0409c1b5246ae29a9216aa884f7
9cfff18cbc48751a59e5ff9af27d076e5286961c56c5436b3ae5e248556b14c5
7dd7b970c5a4643f97a23f896e75bce5f4c6d05d5aeb73b43b792fda5e718a12'

note() { printf '%s\n' "$*"; }

die() {
	printf 'install.sh: %s\n' "$*" >&2
	exit 1
}

live() { [[ -z $DESTDIR ]]; }

#
# Files
#

# put MODE SOURCE TARGET: copies a file. A fixed name of the draft lets the next run replace what was left behind.
put() {
	install -m "$1" -- "$2" "$DESTDIR$3.part"
	mv -f -- "$DESTDIR$3.part" "$DESTDIR$3"
}

folder() { install -d -m "$1" -- "$DESTDIR$2"; }

sha256_of() { sha256sum <"$1" | cut -d ' ' -f 1; }

# recorded TARGET: prints the sha256 of each version that was installed, the newest last.
recorded() {
	local sum file
	[[ -e $DESTDIR$PREFIX/.installed ]] || return 0
	while read -r sum file; do
		[[ $file != "$1" ]] || printf '%s\n' "$sum"
	done <"$DESTDIR$PREFIX/.installed"
}

# record SHA256 TARGET: adds a line, or moves it to the end.
record() {
	local file=$DESTDIR$PREFIX/.installed line="$1  $2"
	{
		[[ ! -e $file ]] || grep -vxF -- "$line" "$file" || true
		printf '%s\n' "$line"
	} >"$file.part"
	mv -f -- "$file.part" "$file"
}

# as_installed TARGET: whether a file is as some installation has left it.
as_installed() { { recorded "$1"; printf '%s\n' "$BY_HAND"; } | grep -qxF -- "$(sha256_of "$DESTDIR$1")"; }

REPLACED=()

# put_config SOURCE TARGET: copies a file that a person may change, unless a person has changed it.
put_config() {
	local source=$1 target=$2 new
	new=$(sha256_of "$source")
	if [[ -e $DESTDIR$target ]] && cmp -s -- "$source" "$DESTDIR$target"; then
		record "$new" "$target"
		rm -f -- "$DESTDIR$target.new"
	elif [[ ! -e $DESTDIR$target ]] || as_installed "$target"; then
		record "$new" "$target" # before the file changes: an interruption must not make it look like a person's
		put 644 "$source" "$target"
		rm -f -- "$DESTDIR$target.new"
		REPLACED+=("$target")
	elif [[ $new != "$(recorded "$target" | tail -n 1)" ]]; then
		put 644 "$source" "$target.new"
		record "$new" "$target"
		note "kept $target, which was changed here; the new version is $target.new"
	fi
}

# put_unit NAME: installs a unit, with PREFIX in its paths.
put_unit() {
	sed "s|$DEFAULT_PREFIX|$PREFIX|g" "systemd/$1" >"$WORK/$1"
	put_config "$WORK/$1" "$UNITS/$1"
}

remove_old_modules() {
	local file
	(cd "$DESTDIR$PREFIX" && find cerebrum -name '*.py') | while IFS= read -r file; do
		[[ -e $file ]] || rm -f -- "$DESTDIR$PREFIX/$file"
	done
	for file in "$DESTDIR$PREFIX"/cerebrum_*.py "$DESTDIR$PREFIX/cerebrum_page.html"; do
		[[ ${file##*/} == cerebrum_common.py ]] || rm -f -- "$file"
	done
}

# put_program: the daemon and the rooms that it needs. Modules of older versions, which had no rooms, go.
put_program() {
	local file
	folder 755 "$PREFIX"
	folder 755 "$UNITS"
	for file in cerebrum cerebrum/text "cerebrum/$ROOMS"; do
		folder 755 "$PREFIX/$file"
	done
	for file in "$SCRIPT" cerebrum_common.py cerebrum/*.py cerebrum/text/*.py "cerebrum/$ROOMS"/*.{py,html}; do
		[[ ! -e $file ]] || put 644 "$file" "$PREFIX/$file"
	done
	remove_old_modules
	put 755 generate_api_key.sh "$PREFIX/generate_api_key.sh"
	put 644 .env.example "$PREFIX/.env.example"
	put_config models.toml "$PREFIX/models.toml"
}

# put_env DAEMON UNIT PART: an .env in which everything is commented out, so that the defaults hold. PART is the heading
# of the daemon's part of .env.example.
put_env() {
	local daemon=$1 unit=$2 part=$3 line wanted=
	[[ ! -e $DESTDIR$PREFIX/.env ]] || return 0
	{
		cat <<-END
		# The configuration of $daemon. Each line shows a default: to change it, take the # away, then run
		# systemctl restart $unit. .env.example tells more of the same. Keys are better kept in files of
		# their own, /etc/credstore/CEREBRUM_API_KEY, which only root can read.
		END
		while IFS= read -r line; do
			[[ $line != '# --- '* ]] || { wanted=; [[ $line != "# --- "@("both daemons"|"$part")" "* ]] || wanted=yes; }
			[[ -z $wanted ]] || printf '%s\n' "${line/#CEREBRUM_/#CEREBRUM_}"
		done <.env.example
		[[ $daemon != vpsd ]] || printf '%s\n' '# Commands by hand find here what the service knows from systemd.' \
			CEREBRUM_STATE_DIR=/var/lib/cerebrum
	} >"$WORK/.env"
	install -m 600 -- "$WORK/.env" "$DESTDIR$PREFIX/.env.part"
	! live || chown "$DAEMON_USER:" -- "$PREFIX/.env.part"
	mv -f -- "$DESTDIR$PREFIX/.env.part" "$DESTDIR$PREFIX/.env"
}

# env_value NAME: prints what .env says.
env_value() {
	[[ ! -e $PREFIX/.env ]] ||
		sed -nE "s/^[[:space:]]*(export[[:space:]]+)?$1=[\"']?([^\"']*)[\"']?[[:space:]]*\$/\2/p" "$PREFIX/.env" | tail -n 1
}

#
# The machine
#

check_machine() {
	((EUID == 0)) || die "expected to run as root, got user $(id -un); please run:  sudo make install-$DAEMON"
	command -v systemctl >/dev/null || die "expected systemd, found no systemctl; to stage the files, set DESTDIR"
	"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
		die "expected Python 3.11 or newer as $PYTHON, got $("$PYTHON" --version 2>&1)"
}

# The daemon's user, and a folder for keys.
make_places() {
	install -d -m 700 -- "${KEY%/*}"
	id -u "$DAEMON_USER" >/dev/null 2>&1 || useradd --system --user-group --shell /usr/sbin/nologin "$DAEMON_USER"
}

# The daemon cannot write them, and its start is quicker with them.
compile() { "$PYTHON" -m compileall -q "$PREFIX"/*.py "$PREFIX/cerebrum"; }

# put_reload SERVICE: what Type=notify-reload does, for a systemd that does not know it.
put_reload() {
	local version target=$UNITS/$1.d/reload.conf
	version=$(systemctl --version | sed -nE '1s/^systemd ([0-9]+).*/\1/p')
	if ((version < NOTIFY_RELOAD)); then
		folder 755 "$UNITS/$1.d"
		# A shell's kill: a small Debian has no other.
		cat >"$WORK/reload.conf" <<-'END'
		# systemd before 253 does not know Type=notify-reload.
		[Service]
		ExecReload=+/bin/sh -c 'kill -HUP $MAINPID'
		END
		put_config "$WORK/reload.conf" "$target"
	elif [[ -e $target ]] && as_installed "$target"; then
		rm -- "$target"
	fi
}

# Restarts a daemon that runs. One that is stopped stays so.
restart() {
	local verb=restart active=
	! systemctl is-active --quiet "$SERVICE" || active=yes
	sync # a power cut must not leave empty files
	systemctl daemon-reload
	! is_enabled || systemctl enable --quiet "$SERVICE" # its socket may be new
	# A socket takes a new address when it starts again, and then its daemon restarts with it. Otherwise only the daemon
	# restarts, and no connection is refused.
	if [[ " ${REPLACED[*]}" == *.socket* ]] && systemctl is-active --quiet "${SERVICE%.service}.socket"; then
		systemctl restart "${SERVICE%.service}.socket"
		verb=start
	fi
	if [[ -n $active ]]; then
		systemctl "$verb" "$SERVICE" ||
			die "$SERVICE was upgraded and does not start; to see why:  journalctl -u ${SERVICE%.service} -n 20"
		note "$SERVICE was upgraded and restarted"
	elif is_enabled; then
		note "$SERVICE was upgraded. It does not run; to start it:  systemctl start ${SERVICE%.service}"
	fi
}

is_enabled() { systemctl is-enabled --quiet "$SERVICE" 2>/dev/null; }

#
# What only the VPS has
#

have_venv() { "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; }

# Installs the Debian packages that are missing, or names them all in one line.
need_packages() {
	local packages=()
	command -v c++ >/dev/null || packages+=(g++)
	command -v cmake >/dev/null || packages+=(cmake)
	have_venv || packages+=(python3-venv)
	((${#packages[@]} > 0)) || return 0
	command -v apt-get >/dev/null || die "expected Debian's packages, or what they are called here: ${packages[*]}"
	note "installing ${packages[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq && apt-get install -qq -y --no-install-recommends "${packages[@]}"
}

# One requirement a line, from pyproject.toml.
requirements() {
	"$PYTHON" -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")'
}

# Makes the virtual environment anew if its Python is gone, as after an upgrade of Debian.
make_venv() {
	local venv=$PREFIX/venv wanted=$WORK/requirements.txt
	folder 755 "$PREFIX"
	{
		"$PYTHON" -c 'import sys; print("# Python %d.%d" % sys.version_info[:2])'
		requirements
	} >"$wanted"
	! cmp -s "$wanted" "$venv/installed.txt" || return 0
	need_packages
	"$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv --clear "$venv"
	note 'installing Python packages; to build llama.cpp takes about four minutes on two cores'
	"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$wanted"
	put 644 "$wanted" "$venv/installed.txt"
}

# A key that exists, in its file or in .env, is never touched.
make_key() {
	[[ ! -s $KEY && -z $(env_value CEREBRUM_API_KEY) ]] || return 0
	./generate_api_key.sh --write "$KEY" >/dev/null
	note "made a key: $KEY"
}

# listen_address: prints the address that the old .env or Tailscale has for the socket. Fails if there is none.
listen_address() {
	local host port
	host=$(env_value CEREBRUM_VPS_HOST)
	port=$(env_value CEREBRUM_VPS_PORT)
	if [[ -z $host$port ]]; then
		host=$(tailscale ip -4 2>/dev/null | head -n 1) || return 1
		[[ -n $host ]] || return 1
	fi
	# ListenStream= takes no names.
	host=$(getent ahosts "${host:-127.0.0.1}" | sed -n '1s/ .*//p') && port=${port:-9000}
	[[ -n $host && $port =~ ^[0-9]+$ ]] || return 1
	[[ $host != *:* ]] || host="[$host]"
	printf '%s:%s\n' "$host" "$port"
}

# Is written once. From then on it is the person's.
put_listen() {
	local target=$UNITS/cerebrum-backend.socket.d/listen.conf address
	[[ ! -e $target ]] || return 0
	if ! address=$(listen_address); then
		note "the backend listens on 127.0.0.1:9000; systemd/cerebrum-backend.socket tells how to set another address"
		return 0
	fi
	folder 755 "${target%/*}"
	cat >"$WORK/listen.conf" <<-END
	# The address of the backend, from its .env or from Tailscale. install.sh does not change this file again.
	[Socket]
	ListenStream=
	ListenStream=$address
	END
	put 644 "$WORK/listen.conf" "$target"
	REPLACED+=("$target")
	note "the backend listens on $address, as $target says"
}

# The limit follows the models that are there, so each installation computes it again.
put_memory() {
	local target=$UNITS/cerebrum-backend.service.d/memory.conf memory
	if ! memory=$("$PREFIX/venv/bin/python" -s "$PREFIX/vpsd.py" memory) || [[ ! ${memory%%$'\n'*} =~ ^[0-9]+$ ]]; then
		note "could not compute a limit of memory from the models, so there is none"
		return 0
	fi
	folder 755 "${target%/*}"
	{
		note '# From "vpsd.py memory". install.sh computes it again at each installation, unless this file was changed.'
		sed -n '2,$p' <<<"$memory"
		note '[Service]'
		note "MemoryMax=${memory%%$'\n'*}M"
	} >"$WORK/memory.conf"
	put_config "$WORK/memory.conf" "$target"
}

#
# Install
#

install_cm4() {
	! live || check_machine
	! live || make_places
	put_program
	put 755 cerebrum_repl.sh "$PREFIX/cerebrum_repl.sh"
	put_unit "$SERVICE"
	put_env cm4d cerebrum-cm4 'cm4d, on the Pi'
	live || return 0
	compile
	put_reload "$SERVICE"
	restart
	is_enabled || cat <<-END
	Installed in $PREFIX. Next:
	  $PREFIX/generate_api_key.sh --set $KEY    the backend's key
	  CEREBRUM_VPS_URL in $PREFIX/.env    where the backend is
	  systemctl enable --now cerebrum-cm4
	END
}

install_vps() {
	! live || check_machine
	! live || make_places
	! live || make_venv # first, since it can fail
	put_program
	folder 755 "$PREFIX/models"
	put_unit cerebrum-backend.socket
	put_unit "$SERVICE"
	put_env vpsd cerebrum-backend 'vpsd, on the VPS'
	live || return 0
	compile
	make_key
	put_reload "$SERVICE"
	put_listen
	put_memory
	restart
	is_enabled || cat <<-END
	Installed in $PREFIX. Next:
	  $PREFIX/venv/bin/python $PREFIX/vpsd.py fetch --no-tune qwen_1_5b    a model
	  systemctl enable --now cerebrum-backend
	END
}

#
# Uninstall
#

LEFT=()

# remove_config TARGET [BACKUP]: a changed file stays, under the name BACKUP if systemd would read it.
remove_config() {
	local target=$1 backup=${2:-$1}
	rm -f -- "$DESTDIR$target.new"
	[[ -e $DESTDIR$target ]] || return 0
	if as_installed "$target"; then
		rm -- "$DESTDIR$target"
	elif [[ $backup != "$target" ]]; then
		mv -f -- "$DESTDIR$target" "$DESTDIR$backup"
	fi
}

# uninstall UNIT...
uninstall() {
	local unit file
	if live; then
		((EUID == 0)) || die "expected to run as root, got user $(id -un); please run:  sudo make uninstall-$DAEMON"
		for unit in "$@"; do
			[[ ! -e $UNITS/$unit ]] || systemctl disable --quiet --now "$unit"
		done
	fi
	for unit in "$@"; do
		remove_config "$UNITS/$unit" "$UNITS/$unit.changed"
		for file in reload memory; do
			remove_config "$UNITS/$unit.d/$file.conf"
		done
	done
	! live || systemctl daemon-reload
	remove_config "$PREFIX/models.toml"
	(
		shopt -s dotglob nullglob
		cd "$DESTDIR$PREFIX" 2>/dev/null || exit 0
		rm -f -- "$SCRIPT" cerebrum_*.py cerebrum_repl.sh generate_api_key.sh .env.example .installed
		rm -f -- "$SCRIPT.part" cerebrum_*.part generate_api_key.sh.part models.toml*.part .env*.part .installed.part
		rm -rf -- cerebrum venv __pycache__
	)
	for file in "$PREFIX/models" "$PREFIX" "${@/#/$UNITS/}"; do
		[[ $file != "$UNITS"/* ]] || file+=.d
		[[ ! -d $DESTDIR$file ]] || rmdir --ignore-fail-on-non-empty -- "$DESTDIR$file"
	done
	for file in "${@/#/$UNITS/}"; do
		LEFT+=("$file.changed" "$file.d")
	done
	LEFT+=("$PREFIX")
	[[ $DAEMON != vps ]] || LEFT+=(/var/lib/cerebrum)
	# The key and the user serve the other daemon, too, as long as that is here.
	[[ -e $DESTDIR$UNITS/$OTHER ]] || LEFT+=("$KEY")
	note "$SERVICE is removed. What is left, if it is to go, too:"
	for file in "${LEFT[@]}"; do
		[[ ! -e $DESTDIR$file ]] || note "  $file"
	done
	! live || [[ -e $UNITS/$OTHER ]] || ! id -u "$DAEMON_USER" >/dev/null 2>&1 || note "  the user $DAEMON_USER"
}

#
# Start
#

case "$*" in
	cm4 | uninstall-cm4) DAEMON=cm4 ROOMS=pi SCRIPT=cm4d.py SERVICE=cerebrum-cm4.service DEFAULT_PREFIX=/opt/cerebrum-pi ;;
	vps | uninstall-vps) DAEMON=vps ROOMS=vps SCRIPT=vpsd.py SERVICE=cerebrum-backend.service DEFAULT_PREFIX=/opt/cerebrum-backend ;;
	*) die "expected one of: cm4, vps, uninstall-cm4, uninstall-vps; got: ${*:-nothing}" ;;
esac

OTHER=cerebrum-backend.service
[[ $DAEMON == cm4 ]] || OTHER=cerebrum-cm4.service

DESTDIR=${DESTDIR:-}
[[ -z $DESTDIR ]] || DESTDIR=$(realpath -m -- "$DESTDIR")
PREFIX=${PREFIX:-}
if [[ -z $PREFIX && -e $DESTDIR$UNITS/$SERVICE ]]; then
	PREFIX=$(sed -nE "s|^ExecStart=.* (/.*)/$SCRIPT\$|\1|p" "$DESTDIR$UNITS/$SERVICE")
fi
PREFIX=${PREFIX:-$DEFAULT_PREFIX}
PREFIX=${PREFIX%/}
[[ $PREFIX =~ ^(/[A-Za-z0-9._-]+)+$ ]] ||
	die "PREFIX: expected an absolute path of letters, digits and ._-/, got '$PREFIX'"
[[ ! $PREFIX =~ ^/(home|root|run|tmp|var/tmp)(/|$) ]] ||
	die "PREFIX: expected a folder that the service can see, not in /home, /root, /run, /tmp or /var/tmp; got '$PREFIX'"

[[ ! $DESTDIR$PREFIX -ef . ]] || die "PREFIX: expected another folder than this one, from which the files are copied"

WORK=$(mktemp -d)
trap 'rm -rf -- "$WORK"' EXIT

case "$1" in
	cm4) install_cm4 ;;
	vps) install_vps ;;
	uninstall-cm4) uninstall "$SERVICE" ;;
	uninstall-vps) uninstall "$SERVICE" cerebrum-backend.socket ;;
esac
