#!/usr/bin/env bash
# Cerebrum in a terminal: type code and watch it being completed. See --help and :help.
#
# Needs bash 4.2, curl and python3 (3.6 or newer). A completion is a pipeline of curl, json_events
# and a loop. json_events is one process for the whole stream and turns each server-sent event into
# a line, which the loop prints. The loop runs in this shell (lastpipe) because it sets variables.
# Ctrl-C reaches curl directly: the connection closes, and the server stops generating.

set -u
shopt -s lastpipe || exit 1

# ------------------------------------------------------------------------------- settings and state

PROGRAM=${0##*/}
URL=${CEREBRUM_URL-} # empty: see find_pi
KEY=${CEREBRUM_CM4_API_KEY:-}
HISTORY=${XDG_STATE_HOME:-${HOME-}/.local/state}/cerebrum/repl_history
HISTSIZE=1000
HISTTIMEFORMAT='' # the file has times, since they keep pasted lines together

LANGUAGE=python
MODEL='' # empty: the server chooses by the language
TOKENS=512
TEMPERATURE=0.4
MAX_TOKENS=2048 # the limit of the API
LIST_SECONDS=10 # for an answer that needs no model: a server that hangs must not hang the REPL

# The texts of a completion are files in a directory, since a bash variable cannot hold every byte:
#     original        the file as it was read; empty for a plain prompt
#     before, after   the text on both sides of the gap; both empty after an instruction
#     completion      what was generated for the gap, byte for byte
#     result          before + completion + after; for an instruction the completion alone
# A command prepares them in $NEXT. Once the answer is complete, $LAST is the last result. A command
# without an answer changes neither the last result nor its file nor the language.
WORK=$(mktemp -d "${TMPDIR:-/tmp}/cerebrum.XXXXXX") || exit 1
trap 'rm -rf "$WORK"' EXIT
NEXT=$WORK/none
LAST=$WORK/none
FILE=''        # the file of the last result, for :write; empty after a plain prompt
UNFIT=''       # why the last result must not be written to $FILE; empty if it may be
INTERRUPTED='' # set by Ctrl-C
PROGRESS=''    # set while progress is on the screen
FILTER=''      # set when the program is a filter and prints nothing but the completion
# PLAIN_INK ends a colour. All are empty without colours.
MODEL_INK='' ADDED_INK='' REMOVED_INK='' PLAIN_INK=''

# ------------------------------------------------------------------------------------- the terminal

die() {
	printf '%s: %s\n' "$PROGRAM" "$1" >&2
	exit "${2:-1}"
}

complain() {
	printf '%s: %s\n' "$PROGRAM" "$(print_text "$1")" >&2
	return 1
}

# start_colours: uses colours if stdout is a terminal that has them and the user allows them
# (https://no-color.org). Bash sets TERM to "dumb" if it is unset. Magenta is as easy to read on
# black as on white.
start_colours() {
	[[ -t 1 && -z ${NO_COLOR-} && -n ${TERM-} && $TERM != dumb ]] || return 0
	MODEL_INK=$'\e[35m' ADDED_INK=$'\e[32m' REMOVED_INK=$'\e[31m' PLAIN_INK=$'\e[m'
}

# print_text TEXT [INK]: prints a text without its control characters: a model must not control the
# terminal. Each text ends its own colour, so that the terminal has its usual colour between two
# tokens. Ctrl-C discards what a slow terminal has not shown yet: then printf fails, and the colour
# is ended once more.
C0=$'\001\002\003\004\005\006\007\010\013\014\015\016\017\020\021\022\023'
C0+=$'\024\025\026\027\030\031\032\033\034\035\036\037\177'
print_text() {
	local LC_ALL=C # so that a pattern matches bytes
	local text=${1//["$C0"]/}
	text=${text//$'\xc2'[$'\x80'-$'\x9f']/} # the C1 controls in UTF-8
	printf '%s%s%s' "${2-}" "$text" "${2:+$PLAIN_INK}" || printf '%s' "${2:+$PLAIN_INK}"
}

# print_token TEXT, escaped as by json_events.
print_token() {
	local text
	if [[ -t 1 ]]; then
		printf -v text '%b' "${1//\\0000/}"
		print_text "$text" "$MODEL_INK"
	else
		printf '%b' "$1"
	fi
}

print_file() {
	[[ -t 1 ]] || { cat "$1"; return; }
	print_part "$1"
	! lacks_newline "$1" || echo
}

# print_part PATH: prints a file on the terminal. The dot saves the newlines before it from $().
print_part() {
	local text
	text=$(tr -d '\0' <"$1" && echo .)
	print_text "${text%.}"
}

# show_progress STAGE PERCENT: on stderr, if that is a terminal. Nobody knows how long waiting in
# the queue takes.
show_progress() {
	local label
	[[ -t 2 ]] || return 0
	case $1 in
		queued) label='waiting for a free slot' ;;
		loading) label="loading the model, $2 %" ;;
		prefill) label="reading the prompt, $2 %" ;;
		*) return 0 ;; # decode: the tokens themselves are the progress
	esac
	PROGRESS=shown
	printf '\r\e[K%s' "$label" >&2
}

clear_progress() {
	[[ -z $PROGRESS ]] || printf '\r\e[K' >&2
	PROGRESS=''
}

# --------------------------------------------------------------------------------------------- JSON

command -v python3 >/dev/null || die "needs python3"

# json_object [--arg NAME TEXT | --argjson NAME JSON | --rawfile NAME PATH]...: prints an object of
# these members, without those that are empty strings.
json_object() {
	python3 -ISc '
import json, sys
members = {}
for kind, name, value in zip(*[iter(sys.argv[1:])] * 3):
    if kind == "--rawfile":
        value = open(value, encoding="utf-8", errors="replace", newline="").read()
    is_json = kind == "--argjson"
    members[name] = json.loads(value) if is_json else value.encode("utf-8", "replace").decode()
print(json.dumps({name: value for name, value in members.items() if value != ""}))' "$@"
}

# json_events: turns server-sent events, or the JSON error that came in their place, into lines,
# each printed at once:
#     token TEXT · progress STAGE PERCENT · error TEXT
#     done MODE REASON KEPT TOKENS SECONDS MODEL
# KEPT is "all", or "part" if the prompt was too long for the model and was sent in part. In TEXT a
# backslash is \0134, a newline \n and NUL \0000, for printf %b. The "status" line that curl adds at
# the end passes unchanged.
json_events() {
	python3 -ISc '
import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
def escaped(text):
    return text.replace("\\", "\\0134").replace("\n", "\\n").replace("\0", "\\0000")
def event(e):
    if "token" in e:
        return "token " + escaped(e["token"])
    if "progress" in e:
        now = e["progress"]
        return "progress {stage} {0}".format(100 * now["done"] // max(1, now["total"]), **now)
    if e.get("done"):
        kept = "all" if e.get("kept", {}).get("parts", ["all"]) == ["all"] else "part"
        e = {"mode": "complete", "finish_reason": "stop", **e, "kept": kept}
        line = "done {mode} {finish_reason} {kept} {total_tokens} {inference_time:.1f} {model}"
        return line.format(**e)
    return "error " + escaped("{code}: {message}".format(**e)) if e.get("error") else ""
for line in sys.stdin.buffer:
    line = line.decode("utf-8", "replace").rstrip("\r\n")
    if line.startswith(("data:", "{")):
        try:
            line = event(json.loads(line[5:] if line[0] == "d" else line))
        except (ValueError, TypeError, LookupError, AttributeError):
            line = "error expected an event of Cerebrum, got something else"
    elif not line.startswith("status "):
        continue
    sys.stdout.buffer.write((line + "\n").encode("utf-8", "replace"))
    sys.stdout.flush()'
}

# json_table VIEW CHOSEN: prints an answer of the API for a person: its models, of which CHOSEN is
# marked, their languages, or its members (VIEW is models, languages or members). For an error,
# prints the reason and fails.
json_table() {
	python3 -ISc '
import json, sys
view, chosen = sys.argv[1:]
answer = json.load(sys.stdin)
if answer.get("error"):
    print("{code}: {message}".format(**answer))
    sys.exit(1)
models = answer["models"] if view != "members" else []
away = "not there" if answer.get("vps_available", True) else "unknown"

def state(m):
    if not m.get("loaded"):
        return away if m.get("available") is False else "on the VPS"
    return "loaded, {:.0f} MB".format(m["memory_mb"]) if "memory_mb" in m else "loaded"

if view == "models":
    mark = {chosen: "* "}
    rows = [(mark.get(m["id"], "  ") + m["id"], state(m), m.get("parameters", "")) for m in models]
    widths = [max(map(len, column)) for column in zip(*rows)]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths) if width] for row in rows]
    lines = ["  ".join(row) for row in cells]
    lines += ["the VPS cannot be reached"] * (away == "unknown")
    for kind, ids in answer.get("prefer", {}).items():
        lines.append("preferred for {}: {}".format(kind, ", ".join(ids)))
elif view == "languages":
    served = {language for m in models for language in m.get("languages", [])}
    lines = [" ".join(sorted(served))] * bool(served)
else:
    backends = {"backend " + b["id"]: b for b in answer.pop("backends", [])}
    members = {**answer, **backends}.items()
    lines = ["{:24} {}".format(k, v if isinstance(v, str) else json.dumps(v)) for k, v in members]
for line in lines:
    print(line.rstrip())' "$@"
}

# ------------------------------------------------------------------------------------------ the API

# call_api PATH [CURL OPTION]...: passes the key through a pipe, since `ps` shows arguments. A proxy
# could not reach the home network, and would see the key and the code.
call_api() {
	local path=$1
	shift
	curl -qsS --noproxy '*' --connect-timeout 5 -H @<(printf '%s' "${KEY:+X-API-Key: $KEY}") \
		"$@" "$URL$path"
}

# find_pi: sets URL to the Pi that Avahi finds on this network. Without one, or with more than one,
# to this machine. The address is used, not the name: Avahi may have changed the name, and not every
# machine can look it up.
find_pi() {
	local event protocol host address port how answer=''
	local -A found
	# A line for each of its networks.
	while IFS=';' read -r event _ protocol _ _ _ host address port _; do
		[[ ! $event$protocol$address$port =~ ^=IPv4[0-9.]+$ ]] || found[$host]=$address:$port
	done < <(avahi-browse -prt _cerebrum._tcp 2>/dev/null)
	((${#found[@]} < 2)) || complain "found ${found[*]}; --url chooses one" || true
	# Anybody on this network can say that this is the Pi.
	if ((${#found[@]} == 1)) && [[ -n $KEY ]]; then
		[[ ! -t 0 ]] || read -r -p "Send the key to ${found[*]}, which Avahi found? [y/N] " answer
		how="if that is your Pi: --url http://${found[*]}"
		[[ $answer == [yY]* ]] ||
			die "the key is not sent to ${found[*]}, which Avahi found; $how"
	fi
	((${#found[@]} == 1)) || found=([this]=127.0.0.1:7000)
	URL=http://${found[*]}
}

# print_table PATH VIEW [CHOSEN]: VIEW and CHOSEN as for json_table.
print_table() {
	local reason
	call_api "$1" -m "$LIST_SECONDS" >"$WORK/answer" 2>"$WORK/curl" ||
		{ reason=$(<"$WORK/curl"); complain "${reason:-interrupted}"; return; }
	json_table "$2" "${3-}" <"$WORK/answer" >"$WORK/table" 2>/dev/null ||
		{
			reason=$(<"$WORK/table")
			complain "${reason:-$URL$1: expected an answer of Cerebrum, got something else}"
			return
		}
	print_part "$WORK/table"
}

# -------------------------------------------------------------------------------------- completions

# prepare: makes a new $NEXT.
prepare() {
	[[ $NEXT == "$LAST" ]] || rm -rf "$NEXT"
	NEXT=$(mktemp -d "$WORK/XXXXXX") && touch "$NEXT"/{original,before,after}
}

# ask MODE FILE LANGUAGE [MEMBER]...: fills the gap in $NEXT, prints the completion as it arrives,
# and makes it the last result. FILE is empty for a plain prompt. MEMBERs are added to the request,
# in json_object's form. Fails unless the completion came to its end.
ask() {
	local mode=$1 file=$2 language=$3 line kind rest stage percent
	local finished='' reason='' kept='' tokens='' seconds='' model='' status='' message='' full=''
	shift 3
	[[ -z $INTERRUPTED ]] || { complain "interrupted"; return; }
	json_object --rawfile prompt "$NEXT/before" --rawfile suffix "$NEXT/after" --arg mode "$mode" \
		--arg language "$language" --arg model "$MODEL" --argjson max_tokens "$TOKENS" \
		--argjson temperature "$TEMPERATURE" --argjson progress true "$@" |
		call_api /v1/complete/stream -N -H 'Content-Type: application/json' -H 'Expect:' \
			--data-binary @- -w '\nstatus %{http_code}\n' 2>"$WORK/curl" |
		json_events |
		while IFS= read -r line; do
			kind=${line%% *}
			rest=${line#* }
			case $kind in
				token)
					clear_progress
					printf '%b' "$rest" >&3 || full=yes
					print_token "$rest"
					;;
				progress)
					read -r stage percent <<<"$rest"
					show_progress "$stage" "$percent"
					;;
				done)
					read -r mode reason kept tokens seconds model <<<"$rest"
					finished=yes
					;;
				error) printf -v message '%b' "$rest" ;;
				status) status=$rest ;;
			esac
		done 3>"$NEXT/completion"
	clear_progress
	[[ ! -s $NEXT/completion ]] || { [[ -n $FILTER && ! -t 1 ]] || echo; }

	if [[ -n $INTERRUPTED ]]; then
		message=interrupted
	elif [[ -z $finished && -z $message ]]; then
		case $status in
			200) message='the stream broke off before its end' ;;
			'' | 000) message=$(<"$WORK/curl") message=${message:-no answer from $URL} ;;
			*) message="HTTP $status from $URL" ;;
		esac
	fi
	if [[ -z $message || -s $NEXT/completion ]]; then
		make_result "$mode" "$file" || full=yes
		[[ -z $full ]] || message="no room for the whole result in ${TMPDIR:-/tmp}"
		rm -rf "$LAST"
		UNFIT=${message:-$(unfit "$mode" "$kept" "$reason")}
		LAST=$NEXT FILE=$file LANGUAGE=$language
	fi
	[[ -z $FILTER ]] || message=${message:-$UNFIT}
	[[ -z $message ]] || { complain "$message"; return; }
	[[ -n $FILTER ]] || print_text "[$tokens tokens in $seconds s, $model, $reason]"$'\n'
}

# unfit MODE KEPT REASON: prints why a finished completion must not replace a file; prints nothing
# if it may. Only the answer to an instruction replaces text; other completions add to it.
unfit() {
	case $1:$2:$3 in
		instruct:part:*) printf 'made from a part of the text, which is too long for the model' ;;
		instruct:*:length) printf 'cut off at %d tokens' "$TOKENS" ;;
		instruct:*:repeat) printf 'the model began to repeat itself' ;;
		instruct:all:stop | instruct:all:block)
			grep -q '[^[:space:]]' "$NEXT/completion" || printf 'the answer is empty'
			;;
		instruct:*) printf 'the answer broke off' ;;
	esac
}

# The byte order mark, which some files of Windows begin with; no model sees it or writes it.
MARK=$'\xef\xbb\xbf'

# make_result MODE FILE. A changed file ends in a newline unless the original has none.
make_result() {
	if [[ $1 != instruct ]]; then
		cat "$NEXT/before" && match_line_ends <"$NEXT/completion" && cat "$NEXT/after"
	else
		: >"$NEXT/before"
		{
			! head -c 3 "$NEXT/original" | grep -qF "$MARK" || printf '%s' "$MARK"
			cat "$NEXT/completion"
			if lacks_newline "$NEXT/completion" &&
				! { [[ -n $2 ]] && lacks_newline "$NEXT/original"; }; then
				echo
			fi
		} | match_line_ends
	fi >"$NEXT/result"
}

lacks_newline() {
	[[ -s $1 && -n $(tail -c 1 "$1") ]]
}

# match_line_ends: copies stdin. A line that the original has too gets its line end, and a new one
# that of the original if it has only one kind. A model answers in LF.
match_line_ends() {
	[[ -s $NEXT/original ]] || { cat; return; }
	python3 -ISc '
import difflib, re, sys
line = re.compile(br"(.*?)(\r?\n|\Z)")
old = line.findall(open(sys.argv[1], "rb").read())
new = line.findall(sys.stdin.buffer.read())
kinds = {end for _, end in old if end}
ends = [end and (min(kinds) if len(kinds) == 1 else end) for _, end in new]
lines = [[line for line, _ in text] for text in (old, new)]
for at, to, size in difflib.SequenceMatcher(None, *lines).get_matching_blocks():
    for i in range(size):
        ends[to + i] = ends[to + i] and (old[at + i][1] or ends[to + i])
sys.stdout.buffer.write(b"".join(line + end for line, end in zip(lines[1], ends)))' "$NEXT/original"
}

# -------------------------------------------------------------------------------------------- files

# language_of PATH: prints the language of a file by its name, as the server lists names, or else
# the current language.
language_of() {
	call_api /v1/models -m "$LIST_SECONDS" 2>/dev/null | python3 -ISc '
import json, sys
name, language = sys.argv[1].rpartition("/")[2].lower(), sys.argv[2]
for one in json.load(sys.stdin)["languages"]:
    if name in one["filenames"] or name[name.rfind("."):] in one["endings"]:
        language = one["id"]
print(language)' "$1" "$LANGUAGE" 2>/dev/null || printf '%s' "$LANGUAGE"
}

expand_home() {
	printf '%s' "${1/#~\//"${HOME-}"/}"
}

# read_original PATH: copies a file to $NEXT/original. Other bytes than text would come back
# changed.
read_original() {
	local odd
	[[ ! -d $1 ]] || { complain "$1: expected a file, got a folder"; return; }
	[[ -f $1 && -r $1 ]] || { complain "$1: no such file, or not readable"; return; }
	cat <"$1" >"$NEXT/original" || { complain "$1: not read to its end"; return; }
	odd=$(python3 -ISc '
import sys
text = sys.stdin.buffer.read()
try:
    at = text.decode().encode().find(b"\0")
except UnicodeDecodeError as error:
    at = error.start
if at >= 0:
    line = text.count(b"\n", 0, at) + 1
    print("the byte {:#04x} in line {}".format(text[at], line))' <"$NEXT/original")
	[[ -z $odd ]] || complain "$1: expected text in UTF-8, got $odd"
}

# replace_file SOURCE PATH: puts a copy of SOURCE at PATH in one step: until the copy is on the
# disk, the old file stays. It keeps its mode, owner, ACL and the links that lead to it. On failure
# prints the reason.
replace_file() {
	python3 -ISc '
import errno, os, shutil, signal, stat, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C comes too late
source, path = sys.argv[1], os.path.realpath(sys.argv[2])
draft = "{}.{}.new".format(path, os.getpid())

try:
    old = os.stat(path) if os.path.exists(path) else None
    if old and not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if old and not os.access(path, os.W_OK):
        raise OSError(errno.EACCES, "not writable")
    with open(source, "rb") as text, open(draft, "xb") as file:
        try:
            if old:
                os.chown(draft, old.st_uid, old.st_gid)
                shutil.copystat(path, draft)
            file.write(text.read())
            file.flush()
            os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError:
            os.unlink(draft)
            raise
except OSError as error:
    print(error.strerror)
    sys.exit(1)' "$@"
}

# diff_files OLD NEW NAME
diff_files() {
	diff -u --label "$3" --label "$3 (new)" "$1" "$2" >"$WORK/diff" && echo "no change"
	[[ -n $PLAIN_INK ]] || { print_file "$WORK/diff"; return; }
	print_part "$WORK/diff" |
		LC_ALL=C sed "s/^+.*/$ADDED_INK&$PLAIN_INK/; s/^-.*/$REMOVED_INK&$PLAIN_INK/" ||
		printf '%s' "$PLAIN_INK" # Ctrl-C may have left a colour on
}

# ----------------------------------------------------------------------------------------- commands

cmd_usage() {
	cat <<-EOF
	Usage: $PROGRAM [OPTION]...      start a conversation; type :help there
	       $PROGRAM [OPTION]... -    complete stdin and print nothing but the completion

	  -l, --lang LANGUAGE   the language (default: python); :lang lists what the server has
	  -m, --model ID        the model (default: the server's choice for the language)
	  -n, --tokens N        at most N tokens, 1 to $MAX_TOKENS (default: $TOKENS)
	  -t, --temp T          the temperature, 0 to 1 (default: $TEMPERATURE)
	      --url URL         the address of Cerebrum (default: \$CEREBRUM_URL, else the only one that
	                        Avahi finds on this network, which gets no key unasked, else
	                        http://127.0.0.1:7000)
	  -h, --help

	With - one newline at the end of stdin is dropped, since echo adds one. The exit status is 0 if
	the completion reached its end, 1 if it did not, and 2 if an argument was wrong.
	If \$CEREBRUM_CM4_API_KEY is set, its key is sent as X-API-Key. If \$NO_COLOR is not empty,
	nothing is coloured; the output of -, and what goes to a file or a pipe, never is.
	EOF
}

cmd_help() {
	cat <<-'EOF'
	Type code to complete it, or describe what you want.

	  :multi                type several lines; :done sends them
	  :file PATH            complete a file at its end
	  :infill PATH:LINE     fill the gap at the end of line LINE, between the texts around it
	  :do INSTRUCTION       change the last result as instructed and show the difference
	  :do @PATH INSTRUCTION change a file; write @"PATH" if the path has spaces
	  :write                write the last result to its file
	  :last                 show the last result: your code together with its completion
	  :save PATH            save the last result as a new file (:save! also replaces a file)

	  :lang [LANGUAGE]      list the languages, or set one; a file's name sets it too
	  :model [ID]           list the models, or choose one; "auto" leaves the choice to the server
	  :tokens [N]           show or set the maximum length of a completion
	  :temp [T]             show or set the temperature, 0 to 1
	  :stats                show the state of the server
	  :exit                 leave; so does Ctrl-D

	Ctrl-C stops a completion. On a terminal with colours, what the model writes and what a
	difference adds and removes are coloured, unless $NO_COLOR is set.
	EOF
}

cmd_prompt() {
	prepare || return
	printf '%s' "$1" >"$NEXT/before" || return
	ask auto '' "$LANGUAGE"
}

cmd_multi() {
	local text=''
	while read_line '... ' && [[ $LINE != :done ]]; do
		text+=$LINE$'\n'
	done
	[[ -n $INTERRUPTED || -z $text ]] || cmd_prompt "${text%$'\n'}"
}

cmd_file() {
	local path
	path=$(expand_home "$1")
	[[ -n $path ]] || { complain "expected :file PATH"; return; }
	prepare && read_original "$path" && cat "$NEXT/original" >"$NEXT/before" || return
	ask complete "$path" "$(language_of "$path")"
}

# The gap is at the end of the line, before its newline, where an editor's cursor would be.
cmd_infill() {
	local path number=${1##*:} size
	path=$(expand_home "${1%:*}")
	[[ $1 == ?*:* && $number =~ ^[1-9][0-9]{0,8}$ ]] ||
		{ complain "expected :infill PATH:LINE, with lines counted from 1"; return; }
	prepare && read_original "$path" || return
	((number <= $(grep -c '' "$NEXT/original"))) ||
		{ complain "$path has no line $number"; return; }
	size=$(head -n "$number" "$NEXT/original" | sed $'$s/\r$//' | wc -c)
	[[ -n $(head -n "$number" "$NEXT/original" | tail -c 1) ]] || size=$((size - 1))
	head -c "$size" "$NEXT/original" >"$NEXT/before" || return
	tail -c "+$((size + 1))" "$NEXT/original" >"$NEXT/after" || return
	if [[ -s $NEXT/after ]]; then
		ask infill "$path" "$(language_of "$path")" --arg filename "${path##*/}"
	else
		ask complete "$path" "$(language_of "$path")"
	fi
}

# A changed file is about as long as the original, so the token limit is raised to the length of the
# file.
cmd_do() {
	local instruction=$1 path=$FILE language=$LANGUAGE base='' TOKENS=$TOKENS size text
	local of_file='^@("([^"]+)"|([^[:space:]]+))[[:space:]]+(.+)$'
	prepare || return
	if [[ $1 =~ $of_file ]]; then
		instruction=${BASH_REMATCH[4]}
		path=$(expand_home "${BASH_REMATCH[2]}${BASH_REMATCH[3]}")
		language=$(language_of "$path")
		read_original "$path" && sed "1s/^$MARK//" "$NEXT/original" >"$NEXT/before" || return
	elif [[ -n $instruction && -s $LAST/result ]]; then
		base=$UNFIT
		sed "1s/^$MARK//" "$LAST/result" >"$NEXT/before" || return
		if [[ -n $FILE ]]; then text=original; else text=result; fi
		cat "$LAST/$text" >"$NEXT/original" || return
	else
		complain 'expected :do INSTRUCTION after a completion, or :do @PATH INSTRUCTION'
		return
	fi
	size=$(wc -c <"$NEXT/before")
	((size = size / 3 + 64, size = size > MAX_TOKENS ? MAX_TOKENS : size))
	((TOKENS = size > TOKENS ? size : TOKENS))
	ask instruct "$path" "$language" --arg instruction "$instruction" || return
	[[ -z $base ]] || UNFIT='made from a result that is not whole'
	[[ -z $UNFIT ]] || { complain "$UNFIT, so :write will refuse it"; return; }
	diff_files "$LAST/original" "$LAST/result" "${FILE:-last result}"
}

cmd_write() {
	local reason
	[[ -n $FILE ]] ||
		{ complain "the last result belongs to no file; save it by :save PATH"; return; }
	[[ -z $UNFIT ]] ||
		{ complain "the last result is not whole; :save PATH saves it nevertheless"; return; }
	cmp -s -- "$LAST/original" "$FILE" ||
		{ complain "$FILE has changed since it was read"; return; }
	reason=$(replace_file "$LAST/result" "$FILE") ||
		{ complain "$FILE: $reason; the file is unchanged"; return; }
	cat "$LAST/result" >"$LAST/original" || return
	echo "wrote $FILE"
}

cmd_last() {
	[[ -s $LAST/result ]] || { complain "there is no result yet"; return; }
	print_file "$LAST/result"
}

# cmd_save PATH [!]
cmd_save() {
	local path reason
	path=$(expand_home "$1")
	[[ -n $path ]] || { complain "expected :save PATH"; return; }
	[[ -s $LAST/result ]] || { complain "there is no result yet"; return; }
	[[ ! -s $path || -n ${2-} ]] || { complain "$path exists; :save! $path replaces it"; return; }
	reason=$(replace_file "$LAST/result" "$path") ||
		{ complain "$path: $reason; nothing was saved"; return; }
	echo "saved $path"
}

cmd_lang() {
	if [[ -n $1 ]]; then LANGUAGE=$1; else print_table /v1/models languages; fi
	echo "language: $LANGUAGE"
}

cmd_model() {
	case $1 in
		'') print_table /v1/models models "$MODEL" ;;
		auto) MODEL='' ;;
		*) MODEL=$1 ;;
	esac
	echo "model: ${MODEL:-auto}"
}

cmd_tokens() {
	[[ -z $1 ]] || { [[ $1 =~ ^[1-9][0-9]{0,3}$ ]] && (($1 <= MAX_TOKENS)); } ||
		{ complain "tokens: expected a whole number from 1 to $MAX_TOKENS, got $1"; return; }
	TOKENS=${1:-$TOKENS}
	echo "tokens: $TOKENS"
}

cmd_temp() {
	[[ -z $1 || $1 =~ ^(0|0?\.[0-9]+|1|1\.0+)$ ]] ||
		{ complain "temperature: expected a number from 0 to 1, got $1"; return; }
	[[ -z $1 ]] || TEMPERATURE=${1/#./0.}
	echo "temperature: $TEMPERATURE"
}

# --------------------------------------------------------------------------------- the conversation

# Bash does not leave `read -e` on a signal that it traps. While a line is read, Ctrl-C is therefore
# bound to a key that inserts itself and ends the line. And `read` takes only the first of several
# lines pasted at once, so Return first replaces the newlines among them by NEWLINE.
NEWLINE=$'\036'
hide_newlines() {
	READLINE_LINE=${READLINE_LINE//$'\n'/$NEWLINE}
}

start_readline() {
	local map
	for map in emacs vi-insert; do
		bind -m "$map" '"\C-c": "\C-v\C-c\C-j"'
		bind -m "$map" -x '"\C-x\C-m": hide_newlines'
		bind -m "$map" '"\C-m": "\C-x\C-m\C-j"'
	done 2>/dev/null # bash warns that line editing is off, but `read -e` turns it on
	(umask 077 && mkdir -p "${HISTORY%/*}" && touch "$HISTORY") ||
		die "cannot keep the history in $HISTORY"
	history -r "$HISTORY"
}

# read_line PROMPT: sets LINE. Fails at the end of input and at Ctrl-C; the latter sets INTERRUPTED.
read_line() {
	local terminal='' status
	INTERRUPTED=''
	if [[ -t 0 ]]; then
		terminal=$(stty -g)
		stty intr undef
	fi
	IFS= read -e -r -p "$1" LINE || [[ -n $LINE ]]
	status=$?
	[[ -z $terminal ]] || stty "$terminal"
	LINE=${LINE//"$NEWLINE"/$'\n'}
	if [[ $LINE == *$'\003'* ]]; then
		INTERRUPTED=yes
		return 1
	fi
	if [[ -n $terminal && -n $LINE ]]; then
		history -s -- "$LINE"
		history -a "$HISTORY"
	fi
	return "$status"
}

cmd_repl() {
	trap 'INTERRUPTED=yes' INT
	start_colours
	if [[ -t 0 ]]; then
		start_readline
		echo "Cerebrum at $URL. Type :help for the commands."
	fi
	while read_line "$LANGUAGE> " || [[ -n $INTERRUPTED ]]; do
		[[ -n $INTERRUPTED ]] || run_line "$LINE"
	done
	[[ ! -t 0 ]] || echo
}

cmd_filter() {
	local text
	FILTER=yes
	IFS= read -r -d '' text
	cmd_prompt "${text%$'\n'}"
}

run_line() {
	local name=${1%%[[:space:]]*} argument
	argument=${1#"$name"}
	argument=${argument#"${argument%%[![:space:]]*}"}
	argument=${argument%"${argument##*[![:space:]]}"}
	case $name in
		:help) cmd_help ;;
		:multi) cmd_multi ;;
		:file) cmd_file "$argument" ;;
		:infill) cmd_infill "$argument" ;;
		:do) cmd_do "$argument" ;;
		:write) cmd_write ;;
		:last) cmd_last ;;
		:save | :save!) cmd_save "$argument" "${name#:save}" ;;
		:lang) cmd_lang "$argument" ;;
		:model) cmd_model "$argument" ;;
		:tokens) cmd_tokens "$argument" ;;
		:temp) cmd_temp "$argument" ;;
		:stats) print_table /v1/stats members ;;
		:exit | :quit) exit 0 ;;
		:[a-z]*) complain "no such command: $name; see :help" ;;
		*) [[ $1 != *[![:space:]]* ]] || cmd_prompt "$1" ;;
	esac
}

need_value() {
	[[ -n ${2-} ]] || die "$1 needs a value; see --help" 2
}

while (($# > 0)) && [[ $1 != - ]]; do
	case $1 in
		-h | --help) cmd_usage; exit 0 ;;
		-l | --lang) need_value "$@"; LANGUAGE=$2 ;;
		-m | --model) need_value "$@"; MODEL=$2 ;;
		-n | --tokens) need_value "$@"; cmd_tokens "$2" >/dev/null || exit 2 ;;
		-t | --temp) need_value "$@"; cmd_temp "$2" >/dev/null || exit 2 ;;
		--url) need_value "$@"; URL=$2 ;;
		*) die "unknown argument $1; see --help" 2 ;;
	esac
	shift 2
done
[[ -n $URL ]] || find_pi
URL=${URL%/}

if [[ ${1-} == - ]]; then cmd_filter; else cmd_repl; fi
