#!/usr/bin/env bash
# Makes keys for X-API-Key, 32 random bytes written URL-safe (43 characters), puts them into files, and exchanges the
# key of two running daemons.
#
# A file that is named like a variable, such as /etc/credstore/CEREBRUM_API_KEY, holds the key alone, as systemd's
# LoadCredential= passes it on. Every other file is an .env. During a rotation there are two keys, "new,old".
#
# No key is an argument or a variable of another program, which `ps` would show. Files are replaced in one step, and
# are on the disk before: neither a full disk nor a power cut loses a key.
set -euo pipefail
export LC_ALL=C # copies an .env byte for byte, whatever its encoding
umask 077

BACKEND=cerebrum-backend PI=cerebrum-cm4 # units
CREDENTIALS=/etc/credstore
RELOAD_SECONDS=10 # until a daemon must have said that it has read its settings
KEPT='not reloaded' # what it says if it goes on with its old ones

usage() {
	cat <<-EOF
	Usage: ${0##*/}                    print a new key
	       ${0##*/} --write FILE...    set a new key in each FILE
	       ${0##*/} --set FILE...      set the key that is typed, or that is the first line of stdin
	       ${0##*/} --rotate [vps|pi] [--yes] [FILE]    exchange the key while both daemons run

	A FILE that is named like a variable, $CREDENTIALS/CEREBRUM_API_KEY, holds that variable's key alone.
	Any other is an .env, which keeps its other lines and has the key as CEREBRUM_API_KEY. Each FILE is
	created if absent, becomes mode 600 and is replaced in one step.

	The Pi and the VPS need the same key: --write it on the one, --set it on the other. Neither prints the
	key. --set also takes a line "CEREBRUM_API_KEY=...", as an .env has it, and of "new,old" the first.

	--rotate makes a new key on the VPS, takes it over on the Pi, and drops the old one on the VPS: run it on
	the VPS, the Pi, and the VPS again. Each time it finds out what is to be done, does it, reloads the
	daemon, and says what comes next. No request is refused. --yes: the Pi has the new key, do not ask.
	On a machine with both, where they share $CREDENTIALS/CEREBRUM_API_KEY, one call does it all.
	EOF
}

say() { printf '%s\n' "$*"; }

die() {
	printf '%s: %s\n' "${0##*/}" "$1" >&2
	exit "${2:-1}"
}

#
# Keys
#

new_key() {
	local key
	key=$(head -c 32 /dev/urandom | base64 | tr -d '=\n' | tr '+/' '-_')
	[[ ${#key} -eq 43 ]] || die "could not read 32 random bytes from /dev/urandom"
	say "$key"
}

# read_key NAME: prints the key that is on stdin. Runs in a subshell, whose end turns the echo of a terminal on again.
read_key() {
	local key
	if [[ -t 0 ]]; then
		trap 'stty echo' EXIT
		stty -echo # before the prompt: what is typed early is not shown either
		printf '%s (not shown): ' "$1" >&2
	fi
	IFS= read -r key || [[ -n $key ]] || die "expected a key on stdin, got none"
	[[ ! -t 0 ]] || echo >&2
	key=${key%$'\r'}
	key=${key#"$1="}
	key=${key%%,*}
	# What systemd and the daemons read from an .env as it stands, without quotes.
	[[ $key =~ ^[A-Za-z0-9._~+/=-]+$ ]] || die "expected a key of letters, digits and ._~+/=- on stdin, got something else"
	say "$key"
}

#
# Files
#

ASSIGNMENT='^[[:space:]]*(export[[:space:]]+)?CEREBRUM_API_KEY[[:space:]]*='

is_bare() { [[ ${1##*/} =~ ^[A-Z][A-Z0-9_]*$ ]]; } # FILE holds a key alone

# name_of FILE: prints the variable whose key is in it.
name_of() { if is_bare "$1"; then say "${1##*/}"; else say CEREBRUM_API_KEY; fi; }

# keys_in FILE: prints the key or "new,old", as the daemons read it; an empty line if there is none.
keys_in() {
	local line keys=
	if is_bare "$1"; then
		keys=$(<"$1")
	else
		while IFS= read -r line || [[ -n $line ]]; do # the last line may lack its newline
			[[ $line =~ $ASSIGNMENT ]] || continue
			keys=${line#*=}
			keys=${keys//[[:space:]]/}
			[[ ! $keys =~ ^\'(.*)\'$|^\"(.*)\"$ ]] || keys=${BASH_REMATCH[1]}${BASH_REMATCH[2]}
		done <"$1"
	fi
	keys=${keys//[[:space:]]/}
	say "${keys%,}"
}

# replace_key KEYS: copies an .env from stdin to stdout with the key set, at its first place or at the end.
# In plain bash, since `ps` would show the key as an argument of awk or sed.
replace_key() {
	local keys=$1 line written=
	while IFS= read -r line || [[ -n $line ]]; do
		if [[ ! $line =~ $ASSIGNMENT ]]; then
			say "$line"
		elif [[ -z $written ]]; then
			say "CEREBRUM_API_KEY=$keys"
			written=yes
		fi
	done
	[[ -n $written ]] || say "CEREBRUM_API_KEY=$keys"
}

drafts=()
trap '((${#drafts[@]} == 0)) || rm -rf -- "${drafts[@]}"' EXIT

# write_keys KEYS FILE...: writes every draft before it replaces a file, so a bad path or a full disk changes none.
write_keys() {
	local keys=$1 file target draft i targets=() written=()
	shift
	for file in "$@"; do
		target=$(readlink -f -- "$file") || die "$file: no such directory"
		[[ ! -e $target || -f $target ]] || die "$file: not a regular file"
		[[ ! -e $target || -r $target ]] || die "$file: not readable"
		draft=$(mktemp -- "$target.XXXXXX" 2>/dev/null) || die "$file: cannot write in its directory"
		drafts+=("$draft")
		written+=("$draft")
		targets+=("$target")
		if is_bare "$file"; then
			say "$keys" >"$draft"
		elif [[ -e $target ]]; then
			replace_key "$keys" <"$target" >"$draft"
		else
			say "CEREBRUM_API_KEY=$keys" >"$draft"
		fi
		[[ ! -e $target ]] || chown --reference="$target" -- "$draft" 2>/dev/null || die "$file: belongs to another user"
	done
	sync -- "${written[@]}"
	for i in "${!targets[@]}"; do
		mv -f -- "${written[i]}" "${targets[i]}"
	done
	for target in "${targets[@]}"; do
		sync -- "${target%/*}/" # the new name
	done
}

#
# The unit that reads the file
#

file='' name='' keys='' # what --set, --write or --rotate is about: a file, its variable, and the keys in it
unit=''
problem='' # why the unit has kept its old settings

has_unit() { systemctl cat "$1" >/dev/null 2>&1; }
is_running() { systemctl is-active --quiet "$unit" 2>/dev/null; }

# property NAME: prints a property of the unit, nothing if there is no systemd.
property() { systemctl show -P "$1" "$unit" 2>/dev/null || true; }

# folder: prints where its daemon is installed, nothing if it is not.
folder() {
	[[ ! $(property ExecStart) =~ (/[^ ;]+)/(cm4d|vpsd)\.py ]] || say "${BASH_REMATCH[1]}"
}

# uses_it: whether the unit runs and reads the file from the folder of credentials.
uses_it() { [[ ${file%/*} == "$CREDENTIALS" && ($unit == "$PI" || $name == CEREBRUM_API_KEY) ]] && is_running; }

# copy_for_unit: gives a running unit the file, or fails with `problem` set. Before version 258, systemd loads
# credentials only when the unit starts. The daemons prefer what is in their RuntimeDirectory=, which systemd removes
# when they stop.
copy_for_unit() {
	local folder draft
	folder=$(property RuntimeDirectory)
	problem="the key could not be copied to the RuntimeDirectory= of $unit"
	[[ -n $folder ]] || return
	folder=/run/$folder
	[[ -d $folder ]] || { problem="$folder is gone; systemctl restart $unit makes it"; return 1; }
	draft=$(mktemp -- "$folder.XXXXXX") || return # not in the folder, where the daemon could replace it by a link
	drafts+=("$draft")
	cat -- "$file" >"$draft" && chown --reference="$folder" -- "$draft" && mv -fT -- "$draft" "$folder/$name"
}

#
# --write and --set
#

# set_key --write|--set FILE...
set_key() {
	local command=$1 key
	shift
	(($# > 0)) || die "$command needs at least one FILE" 2
	name=$(name_of "$1")
	for file in "$@"; do
		[[ $(name_of "$file") == "$name" ]] || die "expected files of one key, got $name and $(name_of "$file")" 2
		[[ ${file%/*} != "$CREDENTIALS" || -d $CREDENTIALS ]] || mkdir -- "$CREDENTIALS"
		[[ $command == --write && -f $file && -r $file && -n $(keys_in "$file") ]] || continue
		for unit in "$BACKEND" "$PI"; do
			! uses_it || die "$file has a key that $unit uses; --rotate exchanges it. To replace it at once, remove $file first"
		done
	done
	if [[ $command == --write ]]; then key=$(new_key); else key=$(read_key "$name"); fi
	write_keys "$key" "$@"
	for file in "$@"; do
		for unit in "$BACKEND" "$PI"; do
			# Then systemctl reload is enough.
			! uses_it || copy_for_unit || say "$unit reads it after: systemctl restart $unit" >&2
		done
	done
	say "$name set in: $*"
}

#
# Rotation
#

again='' # the command that does the next step on this machine
BOTH="both $BACKEND and $PI are installed here: expected --rotate vps or --rotate pi"

this_machine() {
	case $(! has_unit "$BACKEND" || say vps)$(! has_unit "$PI" || say pi) in
		vps) say vps ;;
		pi) say pi ;;
		vpspi) say both ;;
		*) die "neither $BACKEND nor $PI is installed here: expected --rotate vps or --rotate pi, and a FILE" 2 ;;
	esac
}

# find_file: prints the file that the unit reads the key from.
find_file() {
	local folder candidates=("$CREDENTIALS/CEREBRUM_API_KEY") candidate
	folder=$(folder)
	[[ -z $folder ]] || candidates+=("$folder/.env")
	for candidate in "${candidates[@]}"; do
		if [[ -r $candidate && -n $(keys_in "$candidate") ]]; then
			say "$candidate"
			return
		fi
	done
	die "expected a key in ${candidates[*]/%/,} found none that can be read: run this as root, or name the FILE"
}

# reload: has the unit read its settings, if it runs. Fails with `problem` set if it keeps its old ones.
reload() {
	local before status deadline
	is_running || return 0
	before=$(property StatusText)
	! is_bare "$file" || copy_for_unit || return
	if ! systemctl reload "$unit"; then
		problem="systemctl reload $unit failed"
		return 1
	fi
	deadline=$((SECONDS + RELOAD_SECONDS))
	while status=$(property StatusText) && [[ $status == "$before" ]]; do # systemd before 253 does not wait itself
		if ((SECONDS > deadline)); then
			problem="$unit has not said within $RELOAD_SECONDS s that it has read its settings"
			return 1
		fi
		sleep 0.1
	done
	problem="$unit: $status"
	[[ $status != *"$KEPT"* ]]
}

# follow: has the Pi of this machine read the file that it shares with the backend.
follow() {
	[[ $unit == "$BACKEND" && $file == "$CREDENTIALS/CEREBRUM_API_KEY" ]] || return 0
	unit=$PI
	reload || die "$problem. $PI still sends a key that $BACKEND accepts. Once that is mended, to go on:  $again"
	unit=$BACKEND
}

# apply KEYS: puts them into the file and has the unit read them. If it does not, the file gets its old content back.
apply() {
	local target before reason
	# With the old content, to fail before anything is changed.
	! is_running || ! is_bare "$file" || copy_for_unit || die "$problem. Nothing was changed"
	target=$(readlink -f -- "$file")
	before=$(mktemp -- "$target.XXXXXX")
	drafts+=("$before")
	cp -p -- "$target" "$before"
	write_keys "$1" "$file"
	! reload || { follow; return; }
	reason=$problem
	mv -f -- "$before" "$target"
	if ! reload && [[ $problem != *"$KEPT"* ]]; then
		die "$reason. $file is as it was, but perhaps $unit has the new content. To mend that:  systemctl restart $unit"
	fi
	die "$reason. $file is as it was, and $unit goes on with that"
}

report() {
	say "$file: $1"
	is_running || say "$unit does not run here; it reads the file when it starts."
}

# what_next: says how the new key gets to those who send it.
what_next() {
	local pi=/opt/cerebrum-pi/${0##*/} show
	if is_bare "$file"; then show="sudo cat $file"; else show="sudo grep ^CEREBRUM_API_KEY= $file"; fi
	if [[ $unit == "$PI" ]]; then
		cat <<-EOF
		Next, give each client the new key, which this shows before the comma:
		    $show
		EOF
	else
		cat <<-EOF
		Next, run this on the Pi:
		    sudo $pi --rotate
		and paste the line that this shows here:
		    $show
		If sudo asks for no password on either machine, one line on your laptop does both:
		    ssh vps $show | ssh pi sudo $pi --rotate
		EOF
	fi
	cat <<-EOF
	Then run this here, which drops the old key:
	    $again
	EOF
}

# rotate_accepted SURE QUESTION: a step where others send the key: to accept two keys, or the new one alone.
rotate_accepted() {
	local answer=$1 key
	if [[ $keys != *,* ]]; then
		key=$(new_key)
		apply "$key,$keys"
		report "made a new key; the old one is accepted as well."
		what_next
		return
	fi
	if [[ -z $answer && -t 0 ]]; then
		read -r -p "$file has a new key and an old one. $2 [y/N] " answer
	fi
	if [[ $answer == [Yy]* ]]; then
		apply "${keys%%,*}"
		report "the old key is gone; the rotation is complete."
		return
	fi
	apply "$keys" # the first step may have been interrupted before
	report "has a new key and an old one; both are accepted."
	what_next
	[[ -t 0 ]] || die "there is no terminal to ask on. $2 If so, add --yes"
}

# check_key KEY: asks the backends whether they accept it, before it is used.
check_key() {
	local folder staged told
	folder=$(folder)
	if [[ -z $folder ]]; then
		say "$PI is not installed here, so nobody was asked whether the key is right."
		return
	fi
	staged=$(mktemp -d)
	drafts+=("$staged")
	say "$1" >"$staged/$name"
	told=$(RUNTIME_DIRECTORY=$staged python3 -s -S -B "$folder/cm4d.py" --check 2>&1) || true
	if ! grep -Eq '^ok +key .*accepts ours' <<<"$told" || grep -Eq '^FAIL +(files|config|key) ' <<<"$told"; then
		grep '^FAIL' <<<"$told" >&2 || say "$told" >&2
		die "the key was not accepted, so nothing was changed. Was --rotate run on the VPS, and its new key given here?"
	fi
}

# rotate_sent: the step where we send the key: to take over the new one.
rotate_sent() {
	local key was="has the new key."
	[[ ! -t 0 ]] || say "Paste the new key of the VPS; --rotate there has made it."
	key=$(read_key "$name")
	[[ $key != "${keys%%,*}" ]] || was="had this key already."
	check_key "$key"
	apply "$key"
	report "$was"
	cat <<-EOF
	Next, run this on the VPS, which drops the old key:
	    sudo /opt/cerebrum-backend/${0##*/} --rotate
	EOF
}

# rotate_shared: the whole rotation, or the rest of an interrupted one, where both daemons read the same file. The Pi
# follows the backend at each step, and sends the first key.
rotate_shared() {
	[[ $keys == *,* ]] || keys=$(new_key),$keys
	apply "$keys"
	apply "${keys%%,*}"
	say "$file: has a new key, which $BACKEND and $PI use; the rotation is complete."
}

# rotate [vps|pi] [--yes] [FILE]: the next step of a rotation.
rotate() {
	local machine='' sure='' word
	again="sudo $(readlink -f -- "$0") --rotate"
	for word in "$@"; do
		case $word in
			--yes) sure=yes; continue ;;
			vps | pi) machine=$word ;;
			-*) die "expected --rotate [vps|pi] [--yes] [FILE], got $word" 2 ;;
			*)
				[[ -z $file ]] || die "expected one FILE, got $file and $word" 2
				word=$(realpath -ms -- "$word")
				file=$word
				;;
		esac
		again+=" $word"
	done
	[[ -n $machine ]] || machine=$(this_machine)
	if [[ $machine == pi ]]; then unit=$PI; else unit=$BACKEND; fi
	[[ -n $file ]] || file=$(find_file)
	[[ -f $file && -r $file ]] || die "$file: expected a file that can be read; run this as root"
	name=$(name_of "$file")
	keys=$(keys_in "$file")
	[[ -n $keys ]] || die "$file: expected a key, found none; --write makes one, --set takes one over"
	is_bare "$file" || [[ ! -e $CREDENTIALS/$name ]] || die "$file: $CREDENTIALS/$name takes precedence; rotate that"
	case $machine/$name in
		vps/*) rotate_accepted "$sure" "Does the Pi send the new one already?" ;;
		*/CEREBRUM_CM4_API_KEY)
			unit=$PI
			rotate_accepted "$sure" "Does each client send the new one already?"
			;;
		both/*)
			uses_it || die "$BOTH" 2
			rotate_shared
			;;
		*) rotate_sent ;;
	esac
}

#
# Start
#

case "${1-}" in
	"") new_key ;;
	--write | --set) set_key "$@" ;;
	--rotate) shift; rotate "$@" ;;
	-h | --help) usage ;;
	*) usage >&2; exit 2 ;;
esac
