#!/usr/bin/env bash
# Makes a key for X-API-Key, 32 random bytes written URL-safe (43 characters), and puts it into .env files.
set -euo pipefail
export LC_ALL=C # copies an .env byte for byte, whatever its encoding
umask 077

usage() {
	cat <<-EOF
	Usage: ${0##*/}                    print a new key
	       ${0##*/} --write FILE...    set a new key as CEREBRUM_API_KEY in each .env FILE
	       ${0##*/} --set FILE...      set the key that is typed, or that is the first line of stdin

	The Pi and the VPS need the same key: --write it on the one, --set it on the other. Neither prints
	the key. Each FILE is created if absent, keeps its other lines, becomes mode 600 and is replaced in
	one step. --set also takes a line "CEREBRUM_API_KEY=...", as an .env has it.
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

# Prints the key that is on stdin. Runs in a subshell, whose end turns the echo of a terminal on again.
read_key() {
	local key
	if [[ -t 0 ]]; then
		trap 'stty echo' EXIT
		stty -echo # before the prompt: what is typed early is not shown either
		printf 'CEREBRUM_API_KEY (not shown): ' >&2
	fi
	IFS= read -r key || [[ -n $key ]] || die "expected a key on stdin, got none"
	[[ ! -t 0 ]] || echo >&2
	key=${key%$'\r'}
	key=${key#CEREBRUM_API_KEY=}
	# What systemd and the daemons read from an .env as it stands, without quotes.
	[[ $key =~ ^[A-Za-z0-9._~+/=-]+$ ]] || die "expected a key of letters, digits and ._~+/=- on stdin, got something else"
	printf '%s\n' "$key"
}

# replace_key KEY: copies an .env from stdin to stdout with the key set, at its first place or at the end.
# In plain bash, since `ps` would show the key as an argument of awk or sed.
replace_key() {
	local key=$1 line written=
	local assignment='^[[:space:]]*(export[[:space:]]+)?CEREBRUM_API_KEY[[:space:]]*='
	while IFS= read -r line || [[ -n $line ]]; do # the last line may lack its newline
		if [[ ! $line =~ $assignment ]]; then
			printf '%s\n' "$line"
		elif [[ -z $written ]]; then
			printf 'CEREBRUM_API_KEY=%s\n' "$key"
			written=yes
		fi
	done
	[[ -n $written ]] || printf 'CEREBRUM_API_KEY=%s\n' "$key"
}

drafts=()
trap '((${#drafts[@]} == 0)) || rm -f -- "${drafts[@]}"' EXIT

# write_key KEY FILE...: writes every draft before it replaces a file, so a bad path or a full disk changes none.
write_key() {
	local key=$1 file target draft i targets=()
	shift
	for file in "$@"; do
		target=$(readlink -f -- "$file") || die "$file: no such directory"
		[[ ! -e $target || -f $target ]] || die "$file: not a regular file"
		[[ ! -e $target || -r $target ]] || die "$file: not readable"
		draft=$(mktemp -- "$target.XXXXXX" 2>/dev/null) || die "$file: cannot write in its directory"
		drafts+=("$draft")
		targets+=("$target")
		if [[ -e $target ]]; then
			replace_key "$key" <"$target" >"$draft"
			chown --reference="$target" -- "$draft" 2>/dev/null || die "$file: belongs to another user"
		else
			replace_key "$key" </dev/null >"$draft"
		fi
	done
	for i in "${!targets[@]}"; do
		mv -f -- "${drafts[i]}" "${targets[i]}"
	done
	drafts=()
	printf 'CEREBRUM_API_KEY set in: %s\n' "$*"
}

case "${1-}" in
	"") new_key ;;
	--write | --set)
		(($# > 1)) || die "$1 needs at least one FILE" 2
		if [[ $1 == --write ]]; then key=$(new_key); else key=$(read_key); fi
		shift
		write_key "$key" "$@"
		;;
	-h | --help) usage ;;
	*) usage >&2; exit 2 ;;
esac
