#!/usr/bin/env bash
# Makes keys for X-API-Key, 32 random bytes written URL-safe (43 characters), and puts them into files.
#
# No key is passed as an argument or variable, which `ps` would show. Every draft is on the disk before a
# file is replaced, and each file is replaced in one step: a bad path, a full disk or a power cut loses no key.
set -euo pipefail
export LC_ALL=C # copies an .env byte for byte, whatever its encoding
umask 077

usage() {
	cat <<-EOF
	Usage: ${0##*/}                    print a new key
	       ${0##*/} --write FILE...    write a new key; a key that FILE has stays valid behind it: "new,old"
	       ${0##*/} --set FILE...      write the key typed at the prompt, or the first line of stdin

	A FILE that is named like a variable, /etc/credstore/CEREBRUM_API_KEY, holds the key alone. Any other is
	an .env, which keeps its other lines and has the key as CEREBRUM_API_KEY. Each FILE is created if absent
	and becomes mode 600. To replace a key at once:  ${0##*/} | ${0##*/} --set FILE

	The Pi and the VPS need the same key: --write it on the one, --set it on the other. Neither prints the
	key. --set accepts a line "CEREBRUM_API_KEY=...", as an .env has it, and takes the first key of "new,old".
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

# read_key: prints the key from stdin. Runs in a subshell, which turns the echo of a terminal on again when it ends.
read_key() {
	local key
	if [[ -t 0 ]]; then
		trap 'stty echo' EXIT
		stty -echo # before the prompt, so that early keystrokes are hidden too
		printf 'key (not shown): ' >&2
	fi
	IFS= read -r key || [[ -n $key ]] || die "expected a key on stdin, got none"
	[[ ! -t 0 ]] || echo >&2
	key=${key%$'\r'}
	key=${key#CEREBRUM_*API_KEY=}
	key=${key%%,*}
	# Characters that need no quotes in an .env, for systemd and for the daemons.
	[[ $key =~ ^[A-Za-z0-9._~+/=-]+$ ]] || die "expected a key of letters, digits and ._~+/=- on stdin, got something else"
	printf '%s\n' "$key"
}

# with_key --write|--set KEY FILE: copies the FILE from stdin to stdout with the key set, in an .env at its first place
# or at the end. In plain bash, since `ps` would show the key as an argument of awk or sed.
with_key() {
	local keys=$2 label=CEREBRUM_API_KEY= begin='^[[:space:]]*(export[[:space:]]+)?CEREBRUM_API_KEY[[:space:]]*='
	local lines=() n place='' value old=''
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
		[[ $old != *,* ]] || die "$3: expected one key at most, got two: --set the one that stays, then --write again"
		keys+=,$old
	fi
	lines[${place:-${#lines[@]}}]=$label$keys
	printf '%s\n' "${lines[@]}"
}

drafts=()
trap '((${#drafts[@]} == 0)) || rm -f -- "${drafts[@]}"' EXIT

# put_key --write|--set FILE...
put_key() {
	local command=$1 key file source target draft i targets=()
	shift
	(($# > 0)) || die "$command needs at least one FILE" 2
	if [[ $command == --write ]]; then key=$(new_key); else key=$(read_key); fi
	for file in "$@"; do
		target=$(readlink -f -- "$file") || die "$file: no such directory"
		[[ ! -e $target || (-f $target && -r $target) ]] || die "$file: expected a regular file that can be read"
		draft=$(mktemp -- "$target.XXXXXX" 2>/dev/null) || die "$file: cannot write in its directory"
		targets+=("$target")
		drafts+=("$draft")
		if [[ -e $target ]]; then source=$target; else source=/dev/null; fi
		with_key "$command" "$key" "$file" <"$source" >"$draft"
		[[ ! -e $target ]] || chown --reference="$target" -- "$draft" 2>/dev/null || die "$file: belongs to another user"
	done
	sync -- "${drafts[@]}"
	for i in "${!targets[@]}"; do
		mv -f -- "${drafts[i]}" "${targets[i]}"
	done
	for target in "${targets[@]}"; do
		sync -- "${target%/*}/" # the new name
	done
	echo "key set in: $*"
}

case "${1-}" in
	"") new_key ;;
	--write | --set) put_key "$@" ;;
	-h | --help) usage ;;
	*) usage >&2; exit 2 ;;
esac
