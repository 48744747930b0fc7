#!/usr/bin/env bash
# Makes a key for X-API-Key: 32 random bytes, written URL-safe (43 characters).
set -euo pipefail
export LC_ALL=C # an .env is copied byte for byte, whatever its encoding
umask 077

usage() {
	cat <<-EOF
	Usage: ${0##*/}                    print a new key
	       ${0##*/} --write FILE...    set the same new key as CEREBRUM_API_KEY in each .env FILE

	With --write the key is not printed. Each FILE is created when absent, keeps all its other
	lines, becomes mode 600, and is replaced in one step. The Pi and the VPS need the same key:
	    ${0##*/} --write cerebrum-pi/.env cerebrum-backend/.env
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

# Copies an .env from stdin to stdout with the key set: where it was set first, else at the end.
# In plain bash, since an argument of awk or sed would show the key in `ps`.
set_key() {
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

# All drafts are written before the first file is replaced, so that a bad path leaves every key as it was.
cmd_write() {
	local key file target draft i targets=()
	(($# > 0)) || die "--write needs at least one FILE" 2
	key=$(new_key)
	for file in "$@"; do
		target=$(readlink -f -- "$file") || die "$file: no such directory"
		[[ ! -e $target || -f $target ]] || die "$file: not a regular file"
		[[ ! -e $target || -r $target ]] || die "$file: not readable"
		draft=$(mktemp -- "$target.XXXXXX" 2>/dev/null) || die "$file: cannot write in its directory"
		drafts+=("$draft")
		targets+=("$target")
		if [[ -e $target ]]; then
			set_key "$key" <"$target" >"$draft"
			chown --reference="$target" -- "$draft" 2>/dev/null || die "$file: belongs to another user"
		else
			set_key "$key" </dev/null >"$draft"
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
	--write) shift; cmd_write "$@" ;;
	-h | --help) usage ;;
	*) usage >&2; exit 2 ;;
esac
