#!/usr/bin/env bash
# Makes keys for X-API-Key, 32 random bytes written URL-safe (43 characters), and puts them into
# files: the key between the Pi and the VPS, and the keys of the Pi's clients, each with a name.
#
# No key is passed as an argument or variable, which `ps` would show. Every draft is on the disk
# before a file is replaced, and each file is replaced in one step: a bad path, a full disk or a
# power cut loses no key.
set -euo pipefail
export LC_ALL=C # copies an .env byte for byte, whatever its encoding
umask 077

HERE=$(dirname -- "$(readlink -f -- "$0")")
MAX_CLIENTS=32 # the daemon reads no more
MAX_PLACES=64
# Behind the byte order mark of an editor on Windows.
FIRST_WORD=$'^(\xef\xbb\xbf)?[[:space:]]*([^[:space:]]*)'

usage() {
	cat <<-EOF
	Usage: ${0##*/}                    print a new key
	       ${0##*/} --write FILE...    write a new key; a key that FILE has stays
	                                              valid behind it: "new,old"
	       ${0##*/} --set FILE...      write the key typed at the prompt, or the first
	                                              line of stdin
	       ${0##*/} --client NAME [PLACES]
	                                              make a key for a client of the Pi, and
	                                              print it; with PLACES a guest, who gets so
	                                              many places at most
	       ${0##*/} --revoke NAME      take a client's key back

	A FILE that is named like a variable, /etc/credstore/CEREBRUM_API_KEY, holds the key alone. Any
	other is an .env, which keeps its other lines and has the key as CEREBRUM_API_KEY. Each FILE is
	created if absent and becomes mode 600. To replace a key at once:
	${0##*/} | ${0##*/} --set FILE

	The Pi and the VPS need the same key: --write it on the one, --set it on the other. Neither
	prints the key. --set accepts a line "CEREBRUM_API_KEY=...", as an .env has it, and takes the
	first key of "new,old".

	The clients' keys are in \$CEREBRUM_CM4_KEYS_FILE, which the settings beside this script may
	also name, or else in client-keys beside this script. Once that file exists, every client of the
	Pi needs a key.
	EOF
}

die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	exit "${2:-1}"
}

new_key() {
	local key
	key=$(head -c 32 /dev/urandom | base64 | tr -d '=\n' | tr '+/' '-_')
	[[ ${#key} -eq 43 ]] || die "could not read 32 random bytes from /dev/urandom"
	printf '%s\n' "$key"
}

# read_key: prints the key from stdin. Runs in a subshell, which turns the echo of a terminal on
# again when it ends.
read_key() {
	local key
	if [[ -t 0 ]]; then
		trap 'stty echo' EXIT
		stty -echo # before the prompt, so that early keystrokes are hidden too
		printf 'key (not shown): ' >&2
	fi
	IFS= read -r key || [[ -n $key ]] || die "expected a key on stdin, got none"
	[[ ! -t 0 ]] || echo >&2
	key=${key#CEREBRUM_*API_KEY=}
	# Characters that need no quotes in an .env, for systemd and for the daemons.
	[[ $key =~ ^([A-Za-z0-9._~+/=-]+)[[:space:]]*(,.*)?$ ]] ||
		die "expected a key of letters, digits and ._~+/=- on stdin, got something else"
	printf '%s\n' "${BASH_REMATCH[1]}"
}

# with_key --write|--set KEY FILE: copies the FILE from stdin to stdout with the key set, in an .env
# at its first place or at the end. In plain bash, since `ps` would show the key as an argument of
# awk or sed.
with_key() {
	local begin='^[[:space:]]*(export[[:space:]]+)?CEREBRUM_API_KEY[[:space:]]*='
	local keys=$2 label=CEREBRUM_API_KEY=
	local lines=() n place='' value old='' how
	[[ ! ${3##*/} =~ ^[A-Z][A-Z0-9_]*$ ]] || label='' begin='^'
	mapfile -t lines
	for n in "${!lines[@]}"; do
		[[ ${lines[n]} =~ $begin ]] || continue
		value=${lines[n]#"${BASH_REMATCH[0]}"}
		value=${value//[[:space:]]/}
		[[ ! $value =~ ^\'(.*)\'$|^\"(.*)\"$ ]] || value=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
		old=${value:-$old} # the daemons take the last one
		if [[ -z $place ]]; then place=$n; else unset "lines[n]"; fi
	done
	if [[ $1 == --write && -n $old ]]; then
		how='--set the one that stays, then --write again'
		[[ $old != *,* ]] || die "$3: expected one key at most, got two: $how"
		keys+=,$old
	fi
	lines[${place:-${#lines[@]}}]=$label$keys
	printf '%s\n' "${lines[@]}"
}

# with_client NAME KEY PLACES FILE: copies the FILE of clients' keys from stdin to stdout with this
# client behind the others.
with_client() {
	local line name count=0
	while IFS= read -r line || [[ -n $line ]]; do
		[[ $line =~ $FIRST_WORD ]] && name=${BASH_REMATCH[2]}
		[[ $name != "$1" ]] || die "$4: $1 has a key already; first --revoke $1"
		[[ -z $name || $name == '#'* ]] || ((++count))
		printf '%s\n' "$line"
	done
	((count < MAX_CLIENTS)) ||
		die "$4: has $MAX_CLIENTS names, which is the most; --revoke one first"
	printf '%s\n' "$1 $2${3:+ $3}"
}

# without_client NAME FILE: copies it in the same way without this client.
without_client() {
	local line name found=''
	while IFS= read -r line || [[ -n $line ]]; do
		[[ $line =~ $FIRST_WORD ]] && name=${BASH_REMATCH[2]}
		if [[ $name == "$1" ]]; then found=yes; else printf '%s\n' "$line"; fi
	done
	[[ -n $found ]] || die "$2: there is no client $1"
}

targets=() drafts=() # the files to replace, and beside each the file that replaces it
trap '((${#drafts[@]} == 0)) || rm -f -- "${drafts[@]}"' EXIT

# edit FILE SIBLING COMMAND...: makes the draft of a FILE, from what COMMAND prints; COMMAND reads
# the present FILE. A new FILE gets the owner of its SIBLING, if there is one.
edit() {
	local file=$1 target draft source=/dev/null
	target=$(readlink -f -- "$file") || die "$file: no such directory"
	[[ ! -e $target || (-f $target && -r $target) ]] ||
		die "$file: expected a regular file that can be read"
	draft=$(mktemp -- "$target.XXXXXX" 2>/dev/null) || die "$file: cannot write in its directory"
	targets+=("$target")
	drafts+=("$draft")
	[[ ! -e $target ]] || source=$target
	"${@:3}" <"$source" >"$draft"
	[[ $source != /dev/null || ! -e $2 ]] || target=$2
	[[ ! -e $target ]] || chown --reference="$target" -- "$draft" 2>/dev/null ||
		die "$target: belongs to another user"
}

# replace: puts the drafts into the places of their files.
replace() {
	local i target
	sync -- "${drafts[@]}"
	for i in "${!targets[@]}"; do
		mv -f -- "${drafts[i]}" "${targets[i]}"
	done
	for target in "${targets[@]}"; do
		sync -- "${target%/*}/" # the new name
	done
}

# put_key --write|--set FILE...
put_key() {
	local command=$1 key file
	shift
	(($# > 0)) || die "$command needs at least one FILE" 2
	if [[ $command == --write ]]; then key=$(new_key); else key=$(read_key); fi
	for file in "$@"; do
		edit "$file" "$file" with_key "$command" "$key" "$file"
	done
	replace
	echo "key set in: $*"
}

# setting NAME: prints the daemon's setting, from the environment or else from .env beside here.
setting() {
	if [[ -n ${!1-} ]]; then
		printf '%s\n' "${!1}"
	elif [[ -e $HERE/.env ]]; then
		local name="^[[:space:]]*(export[[:space:]]+)?$1="
		sed -nE "s/${name}[\"']?([^\"']*)[\"']?[[:space:]]*\$/\2/p" "$HERE/.env" | tail -n 1
	fi
}

# address: prints the URL of the Pi for its clients, with a name that its certificate vouches for.
address() {
	local host certificate names='' scheme=http
	host=$(uname -n).local
	certificate=$(setting CEREBRUM_CM4_TLS_CERT)
	if [[ -n $certificate ]]; then
		scheme=https
		names=$(openssl x509 -in "$certificate" -noout -ext subjectAltName 2>/dev/null |
			grep -oE '(DNS|IP Address):[^*,[:space:]]+' | sort -st: -k1,1 |
			cut -d: -f2-) || names=''
	fi
	grep -qixF -- "$host" <<<"$names" || host=$(head -n 1 <<<"${names:-$host}")
	[[ $host != *:* ]] || host="[$host]"
	printf '%s\n' "$scheme://$host:$(setting CEREBRUM_CM4_PORT | grep . || echo 7000)"
}

# put_client --client|--revoke NAME [PLACES]
put_client() {
	local command=$1 name=${2-} places=${3-} usage='nothing' key file link setting
	[[ $command != --client ]] || usage="a number of places from 1 to $MAX_PLACES"
	[[ $name =~ ^[A-Za-z0-9._-]{1,32}$ ]] ||
		die "expected a name of 1 to 32 letters, digits and ._- after $command, got '$name'" 2
	[[ $# == 2 || ($command == --client && $# == 3 &&
		$places =~ ^[1-9][0-9]?$ && $places -le MAX_PLACES) ]] ||
		die "expected $usage, got '${*:3}' after the name" 2
	file=$(setting CEREBRUM_CM4_KEYS_FILE)
	file=${file:-$HERE/client-keys}
	if [[ $command == --client ]]; then
		[[ -e $file ]] || echo "$file is new: while it exists, all clients need a key" >&2
		key=$(new_key)
		edit "$file" "$HERE/.env" with_client "$name" "$key" "$places" "$file"
		if [[ $EUID == 0 && ! -e $file && ! -e $HERE/.env ]] && id cerebrum &>/dev/null; then
			# Before setup there are no settings yet, whose owner it would get.
			chown cerebrum: -- "${drafts[-1]}"
		fi
	else
		edit "$file" "$HERE/.env" without_client "$name" "$file"
	fi
	replace
	if [[ $command == --client ]]; then
		link="$(address)/#key=$key"
		setting='CEREBRUM_URL and CEREBRUM_CM4_API_KEY for the language server and the REPL;'
		setting+=' the page shows the others'
		printf '%s\n' "address: ${link%/*}" "key:     $key" "setting: $setting" "link:    $link"
		if type -P qrencode >/dev/null; then printf '%s' "$link" | qrencode -t UTF8 || true; fi
		echo "the link shows $name's settings; whoever has it has the key" >&2
	fi
	echo "apply it:  sudo systemctl reload cerebrum-cm4" >&2
}

case "${1-}" in
	"") new_key ;;
	--write | --set) put_key "$@" ;;
	--client | --revoke) put_client "$@" ;;
	-h | --help) usage ;;
	*) usage >&2; exit 2 ;;
esac
