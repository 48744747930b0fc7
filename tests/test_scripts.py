"""The shell scripts, run as a person runs them: with real bash, curl, python3 and a terminal.

The server is scripted in this process: each test states what it answers and checks what it was
asked. A test waits for output or for an event of the server, until a deadline; it never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import CAPTURED, PATIENCE, ROOT, certificate, disk_of, rows, wait_until
from scripted import (
    CHUNKED,
    END,
    HANG,
    Backend,
    answer,
    chunk,
    error,
    event,
    head,
    in_a_thread,
    script,
    token,
)

from cerebrum.text.languages import LANGUAGES

REPL = f"{ROOT}/cerebrum_repl.sh"
KEYGEN = f"{ROOT}/generate_api_key.sh"
RUN = f"{ROOT}/run.sh"

# ------------------------------------------------------------------------------------------ backend


completion = partial(script, **END | {"finish_reason": "block"})
instructed = partial(completion, mode="instruct")
SUMMARY = "[2 tokens in 0.2 s, qwen_0_5b, block]"


def wait_for(event: threading.Event) -> partial[Any]:
    """A step that ends when the test sets the event."""
    return partial(asyncio.to_thread, event.wait, PATIENCE)


PROMPT = "python> "
ENTER = "\r\n\x1b[?2004l\r"  # how readline ends a line


class Terminal:
    """A program on a terminal of its own: `type` keys, and `expect` text to appear."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 160))
        log_in = partial(os.login_tty, slave)
        self.process = subprocess.Popen(command, env=env, preexec_fn=log_in)
        os.close(slave)
        self.unread = b""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def enter(self, line: str) -> None:
        """Type a line at the REPL's prompt."""
        self.expect(PROMPT)
        self.type(f"{line}\r")
        self.expect(ENTER)

    def talk(self, dialogue: str) -> None:
        """Each row is a text that must appear, and the keys that are typed then."""
        for expected, keys in rows(dialogue):
            self.expect(expected)
            self.type(keys)

    def expect(self, text: str) -> str:
        """Reads up to and including the text; returns what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self.unread:
            left = max(0, deadline - time.monotonic())
            ready, _, _ = select.select([self.master], [], [], left)
            assert ready, f"no {text!r} in {self.unread!r}"
            try:
                self.unread += os.read(self.master, 65536)
            except OSError:  # how Linux says that the other end has closed
                raise AssertionError(f"ended without {text!r}: {self.unread!r}") from None
        before, _, self.unread = self.unread.partition(text.encode())
        return before.decode()

    def status(self) -> int:
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.status()
        os.close(self.master)


@dataclass
class Repl:
    """The REPL in `env`, whose PATH has only what the REPL needs, and the Pi that it asks."""

    backend: Backend
    folder: Path
    stack: contextlib.ExitStack

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{self.backend.port}"
        self.tools = self.folder / "tools"
        self.tools.mkdir()
        home = self.folder / "home"
        home.mkdir()
        needed = "bash curl cat cmp diff grep head mkdir mktemp rm sed stty tail touch tr wc"
        programs = {tool: shutil.which(tool) for tool in needed.split()}
        programs["python3"] = sys.executable
        for tool, path in programs.items():
            (self.tools / tool).symlink_to(os.path.realpath(path or tool))
        self.env = {"LANG": "C.UTF-8", "TERM": "xterm", "CEREBRUM_URL": self.url}
        self.env |= {"PATH": f"{self.tools}", "HOME": f"{home}", "TMPDIR": f"{self.folder}"}

    def file(self, name: str, text: str | bytes) -> Path:
        return write(self.folder / name, text)

    def answers(self, *scripts: list[Any]) -> None:
        """Scripts for the next completions. Each of them must be asked for."""
        self.backend.scripts = [*self.backend.scripts, *scripts]

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self.backend.completions

    def announced(self) -> str:
        """Let Avahi find this Pi on two networks; return its address."""
        address = f"127.0.0.1:{self.backend.port}"
        announce(self.tools, *[f"pi.local:{address}"] * 2)
        del self.env["CEREBRUM_URL"]
        return address

    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.asked]

    def run(self, stdin: bytes, *args: str, before: Iterable[str] = ()) -> tuple[int, str, str]:
        """The exit status, and what is on stdout and stderr. `before` begins the command."""
        given = {"env": self.env, "input": stdin, "timeout": PATIENCE}
        done = subprocess.run([*before, REPL, *args], capture_output=True, **given)
        return done.returncode, os.fsdecode(done.stdout), done.stderr.decode()

    def converse(self, *lines: str) -> tuple[str, list[str]]:
        """What a conversation of these lines prints, and its complaints."""
        typed = "\n".join([*lines, ""])
        status, out, err = self.run(os.fsencode(typed))
        assert status == 0
        assert not [*self.folder.glob("cerebrum.*")]
        return out, complaints(err)

    def terminal(self, *args: str, **variables: str) -> Terminal:
        screen = Terminal([REPL, *args], self.env | variables)
        return self.stack.enter_context(contextlib.closing(screen))


def complaints(err: str) -> list[str]:
    """The messages on stderr, without the program's name before each."""
    first, *messages = f"\n{err}".split("\ncerebrum_repl.sh: ")
    assert first.strip() == ""
    return [message.removesuffix("\n") for message in messages]


@pytest.fixture
def repl(tmp_path: Path) -> Iterator[Repl]:
    languages = [
        {"id": id, "endings": language.endings.split(), "filenames": language.filenames.split()}
        for id, language in LANGUAGES.items()
    ]
    models = answer(200, {"models": [], "languages": languages})
    backend = Backend(scripts=[], models=models)
    with in_a_thread(backend), contextlib.ExitStack() as stack:
        yield Repl(backend, tmp_path, stack)
    assert len(backend.completions) == len(backend.scripts)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def program(path: Path, text: str) -> Path:
    """A script of bash in place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"#!/bin/bash\n{text}\n").chmod(0o755)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def texts(*paths: Path) -> list[str]:
    return [path.read_text() for path in paths]


# ------------------------------------------------------------------------------------------- filter

# Tokens, with bars between them.
AWKWARD = "%s%d|\\n|\\|\n|  two  |\t|é€😀|a\0b|\x1b[31m|-n||'\"`$x|\r|\\0134"
CRLF = b': keep-alive\r\n\r\ndata: {"token": "\xc3\xa9", "total_tokens": 1}\r\n\r\n'
OTHERS = b'data:{"token": "x"}\n\nevent: other\nid: 1\n\n'


def test_the_filter_prints_the_completion_byte_for_byte(repl: Repl):
    """Past every proxy, which would see the key and the code."""
    repl.env |= dict.fromkeys(["http_proxy", "all_proxy", "HTTPS_PROXY"], "http://127.0.0.1:1")
    repl.answers(completion(*AWKWARD.split("|")), completion(chunk(CRLF), chunk(OTHERS)))
    for printed in (AWKWARD.replace("|", ""), "éx"):
        assert repl.run(b"def f(\n", "-") == (0, printed, "")
    assert "x-api-key" not in repl.backend.asked[0][1]


def announce(folder: Path, *addresses: str) -> None:
    """Let avahi-browse of this folder find these, before and after it has their addresses."""
    name = "Cerebrum\\032on\\032pi;_cerebrum._tcp;local"
    lines = ["[[ $* == '-prt _cerebrum._tcp' ]] && cat <<'END'"]
    lines += [f"+;eth0;IPv4;{name}", f"=;eth0;IPv6;{name};pi.local;fe80::1;7000;"]
    lines += [f'=;eth0;IPv4;{name};{address.replace(":", ";")};"a=b"' for address in addresses]
    program(folder / "avahi-browse", "\n".join([*lines, "END"]))


def test_the_pi_is_found_if_it_is_the_only_one(repl: Repl):
    found = repl.announced()
    repl.answers(completion("x"))
    assert repl.run(b"x", "-") == (0, "x", "")
    announce(repl.tools, f"pi.local:{found}", "desk.local:192.0.2.8:7001")
    status, out, err = repl.run(b"x", "-")
    assert status == 1
    assert out == ""
    assert {found, "192.0.2.8:7001;"} < set(err.splitlines()[0].split())


def test_a_pi_that_was_found_gets_no_key_unasked(repl: Repl):
    found = repl.announced()
    repl.env["CEREBRUM_CM4_API_KEY"] = "se cret"
    refusal = f"the key is not sent to {found}, which Avahi found"
    refusal += f"; if that is your Pi: --url http://{found}"
    assert repl.run(b"x", "-") == (1, "", f"cerebrum_repl.sh: {refusal}\n")
    for reply, said in (("\r", refusal), ("y\r", "Type :help for the commands.")):
        screen = repl.terminal()
        screen.expect(f"Send the key to {found}, which Avahi found? [y/N] ")
        screen.type(reply)
        screen.expect(said)
    assert repl.backend.asked == []
    repl.answers(completion("x"), completion("x"))
    screen.enter("def f():")
    screen.expect("block]")
    assert repl.run(b"x", "--url", f"http://{found}", "-")[0] == 0
    keys = [headers["x-api-key"] for _, headers, _ in repl.backend.asked]
    assert keys == ["se cret"] * 2


def test_the_request_with_a_key_that_no_command_line_has(repl: Repl):
    seen = bytearray()

    def read_command_lines() -> None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.extend(process.read_bytes())

    repl.answers(completion(read_command_lines, "x"))
    repl.env["CEREBRUM_CM4_API_KEY"] = "hush hush"
    prompt = 'a "quoted" \\ $(rm) é\n\tb\n'
    options = "-l go -n 7 -t .5 -m tiny -"
    assert repl.run(prompt.encode() + b"\n", *options.split())[0] == 0
    ((line, headers, _),) = repl.backend.asked
    assert line == "POST /v1/complete/stream HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert headers["x-api-key"] == "hush hush"
    assert repl.asked[0] == repl.asked[0] | {"prompt": prompt, "language": "go", "max_tokens": 7}
    assert b"/v1/complete/stream" in seen
    assert b"hush hush" not in seen


def test_each_token_is_printed_before_the_next_one_is_made(repl: Repl):
    printed = [threading.Event() for _ in range(3)]
    pieces = list[Any]()
    for number, shown in enumerate(printed):
        pieces += [f"{number}", wait_for(shown)]
    repl.answers(completion(*pieces))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    with subprocess.Popen([REPL, "-"], env=repl.env, **pipes) as process:
        for number, shown in enumerate(printed):
            assert os.read(process.stdout.fileno(), 100) == str(number).encode()
            shown.set()
        assert process.wait(PATIENCE) == 0


BROKEN_OFF = [head(), token("half", 1)]
HALF_A_CHUNK = b'1c\r\ndata: {"token": "half"}\n\n   \r\nff\r\n'
CUT_IN_A_CHUNK = [CHUNKED, HALF_A_CHUNK]
FAILED_MIDWAY = [*BROKEN_OFF, event(error=True, message="backend died", code="VPS_UNAVAILABLE")]
NO_EVENT = "expected an event of Cerebrum, got something else"
FAILURES = [  # what the server answers, what is printed, what is said
    (FAILED_MIDWAY, "half", "VPS_UNAVAILABLE: backend died"),
    (BROKEN_OFF, "half", "the stream broke off before its end"),
    (CUT_IN_A_CHUNK, "half", "the stream broke off before its end"),
    ([error(400, "X", "No 100%\nsuch \x1b[1mlanguage")], "", "X: No 100%\nsuch [1mlanguage"),
    ([head(502, kind="text/html"), b"<html>\n<h1>Bad</h1>\n"], "", "HTTP 502 from {url}"),
    ([*BROKEN_OFF, b"data: {nonsense\n\n"], "half", NO_EVENT),
    ([*BROKEN_OFF, b'data: {"token": 7}\n\n'], "half", NO_EVENT),
    (instructed("on", finish_reason="length"), "on", "cut off at 512 tokens"),
]


def test_a_failed_request_exits_with_1(repl: Repl):
    for steps, printed, said in FAILURES:
        repl.answers(steps)
        message = f"cerebrum_repl.sh: {said.format(url=repl.url)}\n"
        assert repl.run(b"x", "-") == (1, printed, message)


# Arguments, what is said.
MISUSES = """
-n           | -n needs a value; see --help
-n 0 -       | tokens: expected a whole number from 1 to 2048, got 0
-n 2049 -    | tokens: expected a whole number from 1 to 2048, got 2049
-n a[$(id)] -| tokens: expected a whole number from 1 to 2048, got a[$(id)]
-t 1.1 -     | temperature: expected a number from 0 to 1, got 1.1
-t 1e0 -     | temperature: expected a number from 0 to 1, got 1e0
file.py      | unknown argument file.py; see --help
"""


def test_a_wrong_argument_exits_with_2(repl: Repl):
    for args, said in rows(MISUSES):
        assert repl.run(b"x", *args.split()) == (2, "", f"cerebrum_repl.sh: {said}\n")


# ------------------------------------------------------------------------------------- conversation


def test_settings_reach_the_request(repl: Repl):
    repl.answers(completion("x"), completion("y"))
    typed = ":lang rust\n:model tiny\n:tokens 9\n:temp 0\nfn f\n:model auto\n:temp 1.0\nfn g"
    repl.converse(typed)
    asked = """[
        {"mode": "auto", "language": "rust", "max_tokens": 9, "progress": true, "prompt": "fn f",
         "model": "tiny", "temperature": 0},
        {"mode": "auto", "language": "rust", "max_tokens": 9, "progress": true, "prompt": "fn g",
         "temperature": 1.0}]"""
    assert repl.asked == json.loads(asked)


def test_a_completion_is_summed_up_and_an_error_does_not_end_the_conversation(repl: Repl):
    repl.answers(FAILED_MIDWAY, completion("\n    return ", "1"), completion("x"))
    out, err = repl.converse("a", "    def f():", ":multi", "def f():", "", "    :help", ":done")
    assert out == f"half\n\n    return 1\n{SUMMARY}\nx\n{SUMMARY}\n"
    assert err == ["VPS_UNAVAILABLE: backend died"]
    assert repl.prompts() == ["a", "    def f():", "def f():\n\n    :help"]


NO_FILE = "the last result belongs to no file; save it by :save PATH"
NOT_WHOLE = "the last result is not whole; :save PATH saves it nevertheless"


def test_commands_that_ask_nothing(repl: Repl):
    typed = ":lang go\n:tokens\n:temp\n:last\n:write\n:save\n:do it\n:nonsense\n\n   \n:exit\nnever"
    out, err = repl.converse(typed)
    assert out == "language: go\ntokens: 512\ntemperature: 0.4\n"
    assert err == [
        "there is no result yet",
        NO_FILE,
        "expected :save PATH",
        "expected :do INSTRUCTION after a completion, or :do @PATH INSTRUCTION",
        "no such command: :nonsense; see :help",
    ]
    assert repl.backend.asked == []


LISTED = json.loads("""{
    "models": [
        {"id": "small", "parameters": "0.5B", "languages": ["c"], "available": true,
         "loaded": true, "memory_mb": 1288.6},
        {"id": "middle", "parameters": "1.5B", "languages": ["c"], "available": true,
         "loaded": false},
        {"id": "large", "parameters": "7B", "languages": ["go", "c"], "available": false}],
    "languages": [{"id": "lua", "endings": [".lua"], "filenames": [], "served": false}],
    "prefer": {"infill": ["middle"], "instruct": ["large", "middle"]}}""")
SHOWN = """\
  small   loaded, 1289 MB  0.5B
* middle  on the VPS       1.5B
  large   not there        7B
preferred for infill: middle
preferred for instruct: large, middle
model: middle
"""
STATS = json.loads("""{
    "vps_available": true, "load_avg": [0.5, 1], "backends": [{"id": "attic"}], "host": "pi"}""")
STATS_SHOWN = """\
vps_available            true
load_avg                 [0.5, 1]
host                     pi
backend attic            {"id": "attic"}
"""
AWAY = {"models": [{"id": "a", "available": False}], "vps_available": False}
NO_LIST = "/v1/models: expected an answer of Cerebrum, got something else"
KEY_REFUSED = error(401, "UNAUTHORIZED", "no\x1b[1m key")
LISTS = [  # commands, what the server answers, what is shown, what is said
    (":model middle\n:model", answer(200, LISTED), f"model: middle\n{SHOWN}", []),
    (":model", answer(200, AWAY), "  a  unknown\nthe VPS cannot be reached\nmodel: auto\n", []),
    (":lang\n:lang go", answer(200, LISTED), "c go\nlanguage: python\nlanguage: go\n", []),
    (":stats", answer(200, STATS), STATS_SHOWN, []),
    (":lang", KEY_REFUSED, "language: python\n", ["UNAUTHORIZED: no[1m key"]),
    (":model", head(kind="text/html") + b"<html>", "model: auto\n", [f"{{url}}{NO_LIST}"]),
    (":stats", b"", "", ["curl: (52) Empty reply from server"]),
]


def test_what_the_server_lists(repl: Repl):
    for commands, answered, shown, said in LISTS:
        repl.backend.asked.clear()
        repl.backend.models = repl.backend.stats = answered
        messages = [message.format(url=repl.url) for message in said]
        assert repl.converse(commands) == (shown, messages)
        path = "/v1/stats" if commands == ":stats" else "/v1/models"
        assert [line for line, _, _ in repl.backend.asked] == [f"GET {path} HTTP/1.1"]


def test_last_and_save(repl: Repl):
    here = repl.folder
    taken = repl.file("taken.py", "mine\n")
    saved = here / "out.py"
    repl.answers(completion("\n    return '\\n'  \n\n"))
    good = [":last", f":save {saved}", f":save {taken}", f":save! {taken}"]
    bad = [f":save! {here}", f":save {here}/none/x"]
    out, err = repl.converse("def f():", *good, *bad)
    whole = "def f():\n    return '\\n'  \n\n"
    assert out.split("block]\n")[1] == f"{whole}saved {saved}\nsaved {taken}\n"
    assert err == [
        f"{taken} exists; :save! {taken} replaces it",
        f"{here}: not a regular file; nothing was saved",
        f"{here}/none/x: No such file or directory; nothing was saved",
    ]
    assert texts(saved, taken) == [whole] * 2


# -------------------------------------------------------------------------------------------- files


def test_a_file_is_completed_at_its_end_and_keeps_its_links_mode_and_owner(repl: Repl):
    folder = repl.folder / "folder"
    link = repl.folder / "a link.rs"
    folder.mkdir()
    real = write(folder / "real.rs", "fn f() {\r\n\t// é\n")
    real.chmod(0o750)
    if os.geteuid() == 0:
        os.chown(real, 65534, 65534)
    before = real.stat()
    link.symlink_to("folder/real.rs")
    repl.answers(completion("}\n"))
    shown = f"}}\n\n{SUMMARY}\nwrote {link}\nlanguage: rust\n"
    assert repl.converse(f":file {link}", ":write", ":lang") == (shown, [])
    (body,) = repl.asked
    assert body["prompt"] == "fn f() {\r\n\t// é\n"
    assert body["mode"] == "complete"
    assert body["language"] == "rust"
    assert "suffix" not in body
    assert real.read_bytes() == "fn f() {\r\n\t// é\n}\n".encode()
    after = real.stat()
    for kept in ("st_mode", "st_uid", "st_gid"):
        assert getattr(after, kept) == getattr(before, kept)
    assert link.is_symlink()
    assert os.listdir(folder) == ["real.rs"]


# A file, its size, the language and the most tokens that are asked for.
NAMES = """
x.RS    |     0 | rust   |  512
a.b.go  |    10 | go     |  512
Gemfile |  3000 | ruby   | 1064
.py     | 30000 | python | 2048
go      |     0 | python |  512
x.go~   |     0 | python |  512
x.txt   |     0 | python |  512
"""


def test_a_files_name_sets_the_language_and_its_length_the_tokens(repl: Repl):
    table = rows(NAMES)
    repl.answers(*[instructed("a")] * len(table))
    typed = [f":do @{repl.file(name, 'x' * int(size))} it" for name, size, _, _ in table]
    repl.converse(":lang c", *typed)
    for body, (*_, language, tokens) in zip(repl.asked, table, strict=True):
        assert body["language"] == language
        assert body["max_tokens"] == int(tokens)


# A line, the text before the gap, the text after it.
GAPS = r"""
2 | a\n    return\x20 | \nb\n
2 | a\n              | \n\nb
1 |                  | \nb\n
2 | a\nb             |
2 | a\nb             | \n
2 | a\r\nx =         | \r\nb\r\n
1 | \xe9             | \n\xfc\n
"""
FILL = "FI\nLL"


def test_a_gap_is_filled(repl: Repl):
    for line, before, after in rows(GAPS):
        path = repl.file("x.py", before + after)
        repl.answers(completion(FILL))
        shown = f"{FILL}\n{SUMMARY}\nwrote {path}\n"
        assert repl.converse(f":infill {path}:{line}", ":write") == (shown, [])
        body = repl.asked[-1]
        assert body.get("prompt", "") == before
        assert body.get("suffix", "") == after
        gap = ("infill", "x.py") if after else ("complete", None)
        assert (body["mode"], body.get("filename")) == gap
        filled = FILL.replace("\n", "\r\n") if "\r" in after else FILL
        assert path.read_bytes() == f"{before}{filled}{after}".encode()


# What each request has.
INSTRUCTIONS = json.loads(r"""[
    {"prompt": "def f():\n  x", "instruction": "use y", "language": "python"},
    {"prompt": "one\ntwo\n", "instruction": "shout  it", "language": "go"},
    {"prompt": "one\nTWO\n", "instruction": "louder", "language": "go"}]""")


def test_a_file_and_a_completion_are_changed_by_instructions(repl: Repl):
    path = repl.file("x.go", "one\ntwo\n")
    changed = [instructed(text) for text in ("def f():\n  y\n", "one\nTWO", "ONE\nTWO\n")]
    repl.answers(completion("\n  x"), *changed)
    typed = f"def f():\n:do use y\n:write\n:do @{path} shout  it\n:do louder\n:write"
    out, err = repl.converse(typed)
    assert err == [NO_FILE]
    for body, fields in zip(repl.asked[1:], INSTRUCTIONS, strict=True):
        assert body == body | fields | {"mode": "instruct"}
    assert "--- last result\n+++ last result (new)\n" in out
    assert "\n-  x\n\\ No newline at end of file\n+  y\n" in out
    head = f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n"
    assert f"{head} one\n-two\n+TWO\n" in out
    assert f"{head}-one\n-two\n+ONE\n+TWO\n" in out
    assert path.read_text() == "ONE\nTWO\n"


REFUSES = ", so :write will refuse it"

# An answer that is not written, what the server says of it, and what is said.
UNFIT = json.loads(r"""[
    ["on", {"finish_reason": "length", "kept": {"parts": ["all"]}}, "cut off at 512 tokens"],
    ["on", {"finish_reason": "stop", "kept": {"parts": ["window", "suffix"]}},
     "made from a part of the text, which is too long for the model"],
    ["on", {"finish_reason": "repeat"}, "the model began to repeat itself"],
    ["on", {"finish_reason": "preempted"}, "the answer broke off"],
    [" \n", {}, "the answer is empty"]]""")


def test_half_an_answer_is_not_written(repl: Repl):
    path = repl.file("x.py", "one\ntwo\n")
    unfit = [(instructed(text, **more), said + REFUSES) for text, more, said in UNFIT]
    for steps, said in [*unfit, (FAILED_MIDWAY, "VPS_UNAVAILABLE: backend died")]:
        repl.answers(steps)
        assert repl.converse(f":do @{path} it", ":write")[1] == [said, NOT_WHOLE]
        assert path.read_text() == "one\ntwo\n"


# A command, the file, what is said. The second file has half of an emoji, the third is UTF-16.
NO_TEXT = r"""
:do @{path} it   | one\ncaf\xe9\n  | 0xe9 in line 2
:file {path}     | \xed\xa0\x80\n  | 0xed in line 1
:infill {path}:1 | \xff\xfea\0     | 0xff in line 1
:file {path}     | a\n\n\xc3\xa9\0 | 0x00 in line 3
"""


def test_what_is_no_text_is_left_alone(repl: Repl):
    for command, text, where in rows(NO_TEXT):
        data = text.encode("latin-1")
        path = repl.file("x.py", data)
        said = f"{path}: expected text in UTF-8, got the byte {where}"
        assert repl.converse(command.format(path=path), ":write")[1] == [said, NO_FILE]
        assert path.read_bytes() == data


def test_a_file_that_changed_meanwhile_or_may_only_be_read_is_not_replaced(repl: Repl):
    path = repl.file("x.py", "one\n")
    fixed = repl.file("y.py", "x")
    fixed.chmod(0o444)
    edit = partial(path.write_text, "edited\n")
    repl.answers(completion(edit, "two\n"), completion("y"))
    bound = [shutil.which("setpriv") or "", "--bounding-set=-dac_override"]
    typed = f":file {path}\n:write\n:file {fixed}\n:write\n"
    status, _, err = repl.run(typed.encode(), before=bound if os.geteuid() == 0 else ())
    changed = f"{path} has changed since it was read"
    unwritable = f"{fixed}: not writable; the file is unchanged"
    assert status == 0
    assert complaints(err) == [changed, unwritable]
    assert texts(path, fixed) == ["edited\n", "x"]


# A command that gets no answer, which the server may have refused, and what the REPL says.
NOTHING_CAME = """
:infill {b}   | expected :infill PATH:LINE, with lines counted from 1
:infill {b}:0 | expected :infill PATH:LINE, with lines counted from 1
:infill {b}:2 | {b} has no line 2
:infill {b}x:1| {b}x: no such file, or not readable
:file {b}x    | {b}x: no such file, or not readable
:do @. shout  | .: expected a file, got a folder
:do @{b}x it  | {b}x: no such file, or not readable
:file {b}     | X: no
:infill {b}:1 | X: no
:do @{b} shout| X: no
:do shout     | X: no
fn f()        | X: no
"""


def a_and_b(repl: Repl) -> tuple[Path, Path]:
    """A file of Python, and one of Rust."""
    return repl.file("a.py", "a\n"), repl.file("b.rs", "b\n")


@pytest.mark.parametrize(("command", "said"), rows(NOTHING_CAME))
def test_a_command_without_an_answer_leaves_the_last_result(repl: Repl, command, said):
    a, b = a_and_b(repl)
    refused = [error(503, "X", "no")]
    repl.answers(completion("A\n"), *[refused] * (said == "X: no"))
    out, err = repl.converse(f":file {a}", command.format(b=b), ":last", ":write", ":lang")
    assert err == [said.format(b=b)]
    assert out.endswith(f"block]\na\nA\nwrote {a}\nlanguage: python\n")
    assert texts(a, b) == ["a\nA\n", "b\n"]


def test_half_an_answer_is_the_last_result_and_belongs_to_its_file(repl: Repl):
    a, b = a_and_b(repl)
    repl.answers(completion("A\n"), BROKEN_OFF, instructed("whole\n"))
    typed = f":file {a}\n:file {b}\n:write\n:last\n:do finish it\n:write"
    out, err = repl.converse(typed)
    broken = "the stream broke off before its end"
    unfit = "made from a result that is not whole"
    assert err == [broken, NOT_WHOLE, unfit + REFUSES, NOT_WHOLE]
    assert "block]\nhalf\nb\nhalfwhole\n" in out
    assert repl.prompts() == ["a\n", "b\n", "b\nhalf"]
    assert texts(a, b) == ["a\n", "b\n"]


def fill(file: Path) -> None:
    """Let the file take all of its disk."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while opened.write(bytes(4096)):
            pass


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of("64k", tmp_path / "disk") as folder:
        yield folder


def test_a_disk_loses_no_file_and_a_temporary_directory_no_result_that_it_cannot_hold(
    repl: Repl, small_disk: Path
):
    path = write(small_disk / "x.py", "x" * 40_000)
    repl.answers(completion("y" * 40_000), completion(*["y" * 10_000] * 2))
    _, err = repl.converse(f":file {path}", ":write", f":save! {path}")
    full = f"{path}: No space left on device"
    assert err == [f"{full}; the file is unchanged", f"{full}; nothing was saved"]
    assert path.read_text() == "x" * 40_000
    assert os.listdir(small_disk) == ["x.py"]
    path.unlink()
    other = repl.file("y.py", "x" * 10_000)
    repl.env["TMPDIR"] = f"{small_disk}"
    status, _, said = repl.run(f":file {other}\n:write\n".encode())
    room = f"cerebrum_repl.sh: no room for the whole result in {small_disk}\n"
    assert status == 0
    assert said.endswith(f"{room}cerebrum_repl.sh: {NOT_WHOLE}\n")
    assert other.read_text() == "x" * 10_000


@pytest.mark.parametrize("name", ["-n.go", "a  b %s & \\n é.go", "~.go", "@x.go", "\udcff.go"])
def test_any_name_of_a_file(repl: Repl, monkeypatch, name):
    monkeypatch.chdir(repl.folder)
    path = write(Path(name), "a\n")
    repl.answers(completion("b\n"), completion("!"), instructed("c\n"))
    typed = (
        f':file {name}\n:write\n:infill {name}:1\n:write\n:do @"{name}" it\n:write\n:save -copy.go'
    )
    assert repl.converse(typed)[1] == []
    assert repl.prompts() == ["a\n", "a", "a!\nb\n"]
    assert repl.asked[1]["filename"] == name.replace("\udcff", "?")
    assert texts(path, Path("-copy.go")) == ["c\n", "c\n"]


# A file, what a model answers to an instruction, what is written.
LINE_ENDS = r"""
a\r\nb\r\n         | A\nB\n         | A\r\nB\r\n
a\r\nb\r\n         | A\r\nB         | A\r\nB\r\n
a\r\nb             | A\nB           | A\r\nB
a\nb\r\n           | A\nB\n         | A\nB\n
a\nb\r\nc\r\n      | a\nnew\nb\nC\n | a\nnew\nb\r\nC\n
\xef\xbb\xbfa\nb\n | a\nB\n         | \xef\xbb\xbfa\nB\n
a\nb               | A\nB           | A\nB
                   | A              | A\n
"""


def test_a_changed_file_keeps_its_line_ends(repl: Repl):
    for old, answered, new in rows(LINE_ENDS):
        before, after = old.encode("latin-1"), new.encode("latin-1")
        path = repl.file("x.py", before)
        repl.answers(*[instructed(answered)] * 2)
        assert repl.converse(f":do @{path} shout", ":do again", ":write")[1] == []
        assert path.read_bytes() == after
        for body, text in zip(repl.asked[-2:], (before, after), strict=True):
            assert body.get("prompt", "") == text.decode("utf-8-sig")


# ----------------------------------------------------------------------------------------- terminal


MAGENTA = "\x1b[35m"
GREEN = "\x1b[32m"
RED = "\x1b[31m"
PLAIN = "\x1b[m"


def test_ctrl_c_stops_the_generation_and_neither_the_repl_nor_the_last_result(repl: Repl):
    a, b = a_and_b(repl)
    asked = threading.Event()
    left = threading.Event()
    repl.answers(completion("A\n"), [head(), asked.set, HANG, left.set])
    screen = repl.terminal()
    screen.talk(rf"""
        python> | :file {a}\r
        block]  |
        python> | :file {b}\r
        """)
    assert asked.wait(PATIENCE)
    screen.type("\x03")
    screen.expect("cerebrum_repl.sh: interrupted")
    assert left.wait(PATIENCE)
    screen.talk(rf"""
        python>   | :write\r
        wrote {a} |
        python>   | \x04
        """)
    assert texts(a, b) == ["a\nA\n", "b\n"]
    assert screen.status() == 0


def test_ctrl_c_at_a_prompt_drops_what_was_typed(repl: Repl):
    repl.answers(completion("yes"))
    # Return draws the old prompt once more; the next one says that Ctrl-C is a key again.
    repl.terminal().talk(r"""
        python>  | not this
        not this | \x03
        python>  | :multi\r
        ...      | one\r
        one\r\n  |
        ...      | two\x03
        python>  | three\r
        yes      |
        """)
    assert repl.prompts() == ["three"]


def test_ctrl_c_in_the_filter_ends_it(repl: Repl):
    left = threading.Event()
    repl.answers([head(), token("one", 1), token(" two", 2), HANG, left.set])
    screen = repl.terminal("-")
    screen.type("x\x04\x04")
    screen.expect("one two")
    screen.type("\x03")
    assert left.wait(PATIENCE)
    assert screen.status() == -signal.SIGINT


def test_the_line_can_be_edited_and_history_lasts(repl: Repl):
    """Pasted lines are one prompt, and one entry."""
    repl.answers(*[completion("one."), completion("two.")] * 2)
    screen = repl.terminal()
    screen.talk(r"""
        python> | ef f()\x01d\x05:\r  # Ctrl-A, Ctrl-E
        one.    |
        python> | \x1b[200~def g():\n\tx = 1\n\x1b[201~    return\r
        two.    |
        python> | :exit\r
        """)
    assert screen.status() == 0
    repl.terminal().talk(r"""
        python> | \x1b[A\x1b[A\r  # up, up
        one.    |
        python> | \x1b[A\x1b[A\x1b[A\x1b[A\r
        two.    |
        """)
    pasted = "def g():\n\tx = 1\n    return"
    assert repl.prompts() == ["def f():", pasted, pasted, "def f():"]
    history = repl.folder / "home/.local/state/cerebrum/repl_history"
    entries = re.sub(r"(?m)^#\d+$", "#", history.read_text())
    assert entries.startswith(f"#\ndef f():\n#\n{pasted}\n#\n:exit\n")
    assert mode(history) == 0o600


PROGRESS = json.loads("""[
    {"stage": "queued", "done": 0, "total": 1},
    {"stage": "loading", "done": 1, "total": 4},
    {"stage": "prefill", "done": 512, "total": 1024},
    {"stage": "decode", "done": 0, "total": 9}]""")


def test_progress_is_shown_and_gone_before_the_first_token(repl: Repl):
    events = [chunk(event(progress=progress)) for progress in PROGRESS]
    repl.answers(completion(*events, "token"))
    screen = repl.terminal()
    screen.enter("x")
    for label in ("waiting for a free slot", "loading the model, 25 %", "reading the prompt, 50 %"):
        assert screen.expect(f"\r\x1b[K{label}") == ""
    assert screen.expect("token") == f"\r\x1b[K{MAGENTA}"


def test_a_model_is_coloured_and_cannot_control_the_terminal(repl: Repl):
    path = repl.file("x.py", "a = \nb\n\n")
    controls = "a\x1b[2Jb\x07\tc\nd\x9be\0f\x7fg\r\\x1b€\\"
    changed = instructed("a = 1\n\n\n+ c\x1b[2J\n")
    repl.answers(completion(controls), completion("1", "\n\n"), changed)
    screen = repl.terminal()
    screen.enter("x")
    clean = "a[2Jb\tc\r\ndefg\\x1b€\\"
    assert screen.expect(f"{MAGENTA}{clean}{PLAIN}\r\n") == ""
    screen.enter(":last")
    assert screen.expect(f"{clean}\r\n") == "x"
    screen.enter(f":infill {path}:1")
    assert screen.expect("[2 tokens") == f"{MAGENTA}1{PLAIN}{MAGENTA}\r\n\r\n{PLAIN}\r\n"
    screen.enter(":last")
    assert screen.expect(f"\x1b[?2004h{PROMPT}") == "a = 1\r\n\r\n\r\nb\r\n\r\n"
    screen.type(":write\r")
    screen.expect(f"wrote {path}")
    assert path.read_text() == "a = 1\n\n\nb\n\n"
    screen.enter(f":do @{path} it")
    screen.expect("block]\r\n")
    names = f"{RED}--- {path}{PLAIN}\r\n{GREEN}+++ {path} (new){PLAIN}\r\n"
    kept = "@@ -1,5 +1,4 @@\r\n a = 1\r\n \r\n \r\n"
    lost = f"{RED}-b{PLAIN}\r\n{RED}-{PLAIN}\r\n"
    shown = f"{names}{kept}{lost}{GREEN}++ c[2J{PLAIN}\r\n\x1b[?2004h"
    assert screen.expect(PROMPT) == shown


def test_a_terminal_without_colours(repl: Repl):
    for without in {"NO_COLOR": "0"}, {"TERM": "dumb"}, {"TERM": ""}:
        repl.answers(completion("b\x1b[31m"))
        screen = repl.terminal(**without)
        screen.expect(PROMPT)
        screen.type("x\r")
        _, _, shown = screen.expect(SUMMARY).rpartition("x\r\n")
        assert shown.removeprefix("\x1b[?2004l\r") == "b[31m\r\n"


# ---------------------------------------------------------------------------------------------- key


def called(*command: str | Path, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    """The exit status, and what is on stdout and stderr."""
    env = {"PATH": os.environ["PATH"], **environ}
    done = subprocess.run(command, env=env, input=stdin, **CAPTURED)
    return done.returncode, done.stdout, done.stderr


def path_with(folder: Path) -> str:
    """A PATH on which the programs in a folder's bin come first."""
    return f"{folder}/bin:{os.environ['PATH']}"


def keygen(*args: str | Path, **given: str) -> tuple[int, str, str]:
    """The script's exit status, and what is on stdout and stderr, there without its name."""
    status, out, err = called(KEYGEN, *args, **given)
    return status, out, err.removeprefix("generate_api_key.sh: ").removesuffix("\n")


def test_a_key_is_32_random_bytes() -> None:
    keys = {keygen() for _ in range(2)}
    for status, out, err in keys:
        assert status == 0
        assert err == ""
        assert re.fullmatch(r"[A-Za-z0-9_-]{43}\n", out)
    assert len(keys) == 2


NAME = "CEREBRUM_API_KEY"
# A file, what is in it before and after (@ is NAME, K the new key).
WRITTEN = r"""
.env                 | none                                  | @=K\n
.env                 |                                       | @=K\n
.env                 | A=1\n@=\nB=2\n                       | A=1\n@=K\nB=2\n
.env                 | A=1                                   | A=1\n@=K\n
.env                 | @=o/l+d==                             | @=K,o/l+d==\n
.env                 | export @ = 'one'\nB=2\n@="two"\r\n    | @=K,two\nB=2\n
.env                 | # @=\n\nX=@=\\n%s\n                   | # @=\n\nX=@=\\n%s\n@=K\n
.env                 | A=\xff\r\n                            | A=\xff\r\n@=K\n
CEREBRUM_API_KEY     | none                                  | K\n
CEREBRUM_API_KEY     | \n                                    | K\n
CEREBRUM_CM4_API_KEY | old==\n\n                             | K,old==\n
"""


@pytest.mark.parametrize(("name", "before", "after"), rows(WRITTEN.replace("@", NAME)))
def test_a_key_is_written_before_the_one_that_is_there(tmp_path, name, before, after) -> None:
    path = tmp_path / name
    if before != "none":
        write(path, before.encode("latin-1")).chmod(0o644)
    assert keygen("--write", path) == (0, f"key set in: {path}\n", "")
    text = path.read_bytes().decode("latin-1")
    assert re.sub(r"(?m)^(CEREBRUM_API_KEY=|)[A-Za-z0-9_-]{43}(?=,|$)", r"\1K", text) == after
    assert mode(path) == 0o600
    assert os.listdir(tmp_path) == [name]


# A command, its stdin, its status, what it says.
REFUSALS = """
--write                  |    |2| --write needs at least one FILE
--write good nowhere/x   |    |1| nowhere/x: no such directory
--write good .           |    |1| .: expected a regular file that can be read
--write good TWO         |    |1| TWO: {two}
--set good               |    |1| expected a key on stdin, got none
--set good               |,   |1| {no_key}
--set good               |k'k'|1| {no_key}
--client                 |    |2| {name} --client, got ''
--client an/na           |    |2| {name} --client, got 'an/na'
--revoke {long}          |    |2| {name} --revoke, got '{long}'
--client x 65            |    |2| {places}, got '65' after the name
--client x 0             |    |2| {places}, got '0' after the name
--revoke n0 n1           |    |2| expected nothing, got 'n1' after the name
--client n0              |    |1| keys: n0 has a key already; first --revoke n0
--client x               |    |1| keys: has 32 names, which is the most; --revoke one first
--revoke x               |    |1| keys: there is no client x
"""
SAID = {
    "two": "expected one key at most, got two: --set the one that stays, then --write again",
    "no_key": "expected a key of letters, digits and ._~+/=- on stdin, got something else",
    "name": "expected a name of 1 to 32 letters, digits and ._- after",
    "places": "expected a number of places from 1 to 64",
    "long": "n" * 33,
}


def test_what_cannot_be_done_changes_no_file(tmp_path, monkeypatch) -> None:
    clients = "# 32\n" + "".join(f"n{number} key\n" for number in range(32))
    before = {"good": "CEREBRUM_API_KEY=old\n", "TWO": "new, old\n", "keys": clients}
    monkeypatch.chdir(tmp_path)
    for name, text in before.items():
        write(Path(name), text)
    for args, stdin, status, said in rows(REFUSALS.format_map(SAID)):
        refused = keygen(*args.split(), stdin=stdin, CEREBRUM_CM4_KEYS_FILE="keys")
        assert refused == (int(status), "", said)
        assert {name: Path(name).read_text() for name in os.listdir()} == before


CARRIED = ["k-_1=\n", "k-_1=", "CEREBRUM_CM4_API_KEY=k-_1= , old\r\n", "k-_1=\nnext line"]


def test_a_key_is_carried_over(tmp_path: Path):
    env = tmp_path / ".env"
    env.symlink_to("real")
    for stdin in CARRIED:
        real = write(tmp_path / "real", "CEREBRUM_API_KEY=older,old\nA=1\n")
        credential = write(tmp_path / NAME, "old\n")
        said = f"key set in: {env} {credential}\n"
        assert keygen("--set", env, credential, stdin=stdin) == (0, said, "")
        assert env.is_symlink()
        assert texts(env, credential) == ["CEREBRUM_API_KEY=k-_1=\nA=1\n", "k-_1=\n"]
        assert mode(real) == mode(credential) == 0o600


def test_a_typed_key_is_not_shown(tmp_path: Path):
    env = tmp_path / ".env"
    with contextlib.closing(Terminal([KEYGEN, "--set", f"{env}"], dict(os.environ))) as screen:
        screen.expect("key (not shown): ")
        screen.type("hush-hush\r")
        assert screen.expect(f"key set in: {env}\r\n") == "\r\n"
    assert env.read_text() == "CEREBRUM_API_KEY=hush-hush\n"


def test_a_full_disk_loses_no_key(small_disk: Path):
    keys = "CEREBRUM_API_KEY=old\nanna key\n"
    path = write(small_disk / ".env", keys)
    fill(small_disk / "rest")
    for args in (f"--write {path}", "--client ben", "--revoke anna"):
        status, out, err = keygen(*args.split(), CEREBRUM_CM4_KEYS_FILE=f"{path}")
        assert status == 1
        assert out == ""
        assert "No space left on device" in err
        assert path.read_text() == keys
    assert sorted(os.listdir(small_disk)) == [".env", "rest"]


SPY = '{{ echo "CALL {tool} $*"; env; }} >>{log}\nexec {path} "$@"'


def test_a_key_is_on_no_command_line_and_on_the_disk_before_it_replaces_a_file(
    tmp_path: Path,
):
    env = tmp_path / ".env"
    credential = tmp_path / NAME
    clients = tmp_path / "client-keys"
    log = tmp_path / "log"
    tools = "base64 chown head mktemp mv readlink rm sync tr"
    for tool in tools.split():
        spy = SPY.format(tool=tool, log=log, path=shutil.which(tool))
        program(tmp_path / "bin" / tool, spy)
    spied = {"PATH": path_with(tmp_path), "CEREBRUM_CM4_KEYS_FILE": f"{clients}"}
    assert keygen("--set", env, credential, stdin="the-old-key", **spied)[0] == 0
    for args in (f"--write {env} {credential}", "--client anna", "--client ben", "--revoke ben"):
        assert keygen(*args.split(), **spied)[0] == 0
    seen = log.read_text()
    new, _, old = credential.read_text().strip().partition(",")
    assert env.read_text() == f"CEREBRUM_API_KEY={new},the-old-key\n"
    for key in (new, old, clients.read_text().split()[1]):
        assert key not in seen
    steps = re.findall(r"CALL (sync|mv) (?:-f )?-- (.+)", seen)
    order = "sync mv mv sync sync " * 2 + "sync mv sync " * 3
    assert [tool for tool, _ in steps] == order.split()


def test_clients_get_keys_and_lose_them(tmp_path: Path):
    """The script with a daemon's settings beside it, and the file that they name behind a link."""
    script = shutil.copy(KEYGEN, tmp_path)
    file = tmp_path / "client-keys"
    env = write(tmp_path / ".env", "CEREBRUM_CM4_PORT=7001\n")
    daemon, other = (1234, 1235) if os.geteuid() == 0 else [os.geteuid()] * 2
    os.chown(env, daemon, -1)
    (tmp_path / "etc").mkdir()
    file.symlink_to("etc/keys")
    program(tmp_path / "bin/qrencode", f'cat >{tmp_path}/seen; echo "drawn $*"; exit 1')
    status, out, err = called(script, "--client", "anna", PATH=path_with(tmp_path))
    key = out.splitlines()[1].split()[1]
    address = f"http://{os.uname().nodename}.local:7001"
    link = f"{address}/#key={key}"
    settings = "CEREBRUM_URL and CEREBRUM_CM4_API_KEY for the language server and the REPL;"
    # No key is among the arguments of what draws.
    shown = f"""address: {address}
key:     {key}
setting: {settings} the page shows the others
link:    {link}
drawn -t UTF8
"""
    said = f"""{file} is new: while it exists, all clients need a key
the link shows anna's settings; whoever has it has the key
apply it:  sudo systemctl reload cerebrum-cm4
"""
    assert (status, out, err) == (0, shown, said)
    assert (tmp_path / "seen").read_text() == link
    guests = called(script, "--client", "gast.2", "1")[1].split()[3]
    assert file.read_text() == f"anna {key}\ngast.2 {guests} 1\n"
    assert file.stat().st_uid == daemon
    assert mode(file) == 0o600
    write(file, "# ours\n\n" + file.read_text().rstrip())
    os.chown(file, other, -1)
    assert called(script, "--revoke", "gast.2")[0] == 0
    assert file.read_text() == f"# ours\n\nanna {key}\n"
    assert file.stat().st_uid == other
    assert file.is_symlink()
    assert os.listdir(tmp_path / "etc") == ["keys"]
    write(file, "\ufeffanna k1\r\nben k2\n")  # from an editor on Windows
    assert called(script, "--revoke", "anna")[0] == 0
    assert file.read_text() == "ben k2\n"


# The names of a certificate, the host of the address.
ADDRESSES = """
DNS:*.lan,IP:10.0.0.7,DNS:pi.example.ts.net,DNS:other | pi.example.ts.net
DNS:other,DNS:{own} | {own}
IP:fd7a::1          | [FD7A:0:0:0:0:0:0:1]
DNS:*.lan           | {own}
"""


@pytest.mark.parametrize(("names", "host"), rows(ADDRESSES))
def test_the_address_for_a_client_is_one_of_the_certificate(names, host, tmp_path) -> None:
    own = f"{os.uname().nodename}.local"
    script = shutil.copy(KEYGEN, tmp_path)
    pem = certificate(tmp_path, "pi", names.format(own=own))["CEREBRUM_CM4_TLS_CERT"]
    write(tmp_path / ".env", f"CEREBRUM_CM4_TLS_CERT={pem}\n")
    _, out, _ = called(script, "--client", "anna")
    assert out.splitlines()[0] == f"address: https://{host.format(own=own)}:7000"


# ------------------------------------------------------------------------------------------- run.sh


# What the old Python lacks, the signal that ends it, how often it is replaced: not after a KILL, by
# which the kernel says that memory is lacking.
OUTDATED = """
python    |      | 1
llama_cpp |      | 1
decode    | ILL  | 1
decode    | KILL | 0
"""


@pytest.mark.parametrize(("lacks", "signal", "times"), rows(OUTDATED))
def test_a_venv_of_another_python_or_cpu_is_made_anew(lacks, signal, times, tmp_path) -> None:
    """Each Python is a script that records its arguments. The new one works."""
    script = shutil.copy(RUN, tmp_path)
    log = tmp_path / "log"
    installed = tmp_path / ".venv/installed-run.txt"
    old = tmp_path / ".venv/bin/python"
    dies = f"kill -{signal} $$" if signal else "exit 1"
    program(old, f"echo old $* >>{log}\ncase $* in *{lacks}*) {dies} ;; esac")
    clear = f"rm -r {old.parents[1]}; mkdir -p {old.parent}; cp $0 {old}"
    new = f"echo new $* >>{log}\ncase $* in *--clear*) {clear} ;; esac"
    program(tmp_path / "bin/python3", new)
    write(installed, "")
    if lacks == "python":
        old.unlink()
        old.symlink_to(tmp_path / "gone")
    status, _, err = called(script, "setup", PATH=path_with(tmp_path))
    assert status == 0, err
    assert "Illegal" not in err, err
    assert installed.exists()
    calls = log.read_text()
    for call in ("new -m venv --clear .venv\n", "new -m pip cache remove llama_cpp_python\n"):
        assert calls.count(call) == int(times)
    assert ("\nnew -m pip install " in calls) == (times == "1")


SERVE = """\
echo "${@: -1} $CEREBRUM_VPS_PORT $CEREBRUM_CM4_PORT $CEREBRUM_CM4_HOST" >>log
echo listening on http://0.0.0.0:7
exec sleep 600"""


def test_settings_are_those_that_the_daemons_read(tmp_path: Path):
    """The daemons are scripts that log what they get."""
    for name in ("run.sh", "cerebrum", "cerebrum_common.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    real = f'exec {sys.executable} "$@"'
    python = f"case $* in *settings*) {real} ;; *vpsd.py | *cm4d.py) {SERVE} ;; esac"
    program(tmp_path / ".venv/bin/python", python)
    write(tmp_path / ".venv/installed-run.txt", "")
    program(tmp_path / "bin/curl", "echo ${@: -1} >>log")
    program(tmp_path / "generate_api_key.sh", "echo a new key >>log")
    program(tmp_path / "cerebrum_repl.sh", "echo pass")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # nobody listens there
        port = unused.getsockname()[1]
        settings = f"CEREBRUM_VPS_PORT=\"{port}\"\n export  CEREBRUM_CM4_PORT='{port}' \n"
        settings += "CEREBRUM_CM4_HOST='0.0.0.0'\nexport CEREBRUM_API_KEY=\"k\"\n"
        write(tmp_path / ".env", settings)
        status, out, err = called(tmp_path / "run.sh", PATH=path_with(tmp_path))
    assert status == 0, err
    assert out == "pass\n\n", err
    got = f"vpsd.py {port}  \ncm4d.py  {port} 0.0.0.0\nhttp://127.0.0.1:7/health\n"
    assert (tmp_path / "log").read_text() == got


# ----------------------------------------------------------------------------------------- setup.sh


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a daemon")


def installed(name: str, folder: Path) -> Path:
    """The package's command, with all paths below a folder."""
    for part in ("run/systemd/system", "etc/credstore", f"etc/{name}", f"usr/lib/{name}"):
        (folder / part).mkdir(parents=True)
    stand_ins = {"runuser": 'shift 3; exec "$@"', "systemctl": "", "chown": ""}
    for tool, does in stand_ins.items():
        program(folder / "bin" / tool, f'echo "{tool} $*" >>{folder}/log\n{does}')
    text = (ROOT / "systemd/setup.sh").read_text().replace(" -o cerebrum -g cerebrum", "")
    text = re.sub("(?<=[ =])/(etc|run|usr/lib|opt|var)/", rf"{folder}/\1/", text)
    script = write(folder / "bin" / name, text)
    script.chmod(0o755)
    return script


@needs_root
@pytest.mark.parametrize(("used_mb", "is_read"), [(3001, False), (3000, True)])
def test_a_limit_below_what_the_daemon_uses_would_kill_it_and_waits(
    used_mb, is_read, tmp_path
) -> None:
    script = installed("cerebrum-backend", tmp_path)
    limit = tmp_path / "etc/systemd/system/cerebrum-backend.service.d/memory.conf"
    limit.parent.mkdir(parents=True)
    write(limit, '# From "vpsd.py memory"\n')
    program(tmp_path / "opt/cerebrum-backend/venv/bin/python", "echo 3000")
    says = f"[[ $* != *MemoryCurrent* ]] || echo {used_mb << 20}"
    program(tmp_path / "bin/systemctl", f"echo $* >>{tmp_path}/log; {says}")
    assert called(script, "fetch", "tiny", PATH=path_with(tmp_path))[0] == 0
    assert limit.read_text().splitlines()[-1] == "MemoryMax=3000M"
    assert ("daemon-reload" in (tmp_path / "log").read_text()) == is_read


@needs_root
def test_a_build_of_the_package_that_is_killed_leaves_nothing(tmp_path: Path):
    script = installed("cerebrum-backend", tmp_path)
    log = tmp_path / "tree"
    builds = f"mktemp -d >{log}.part; mv {log}.part {log}; exec sleep 600"
    python = tmp_path / "opt/cerebrum-backend/venv/bin/python"
    program(python, f"case $* in *pip\\ install*) {builds} ;; *gguf) exit 1 ;; esac")
    environ = os.environ | {"PATH": path_with(tmp_path)}
    own = {"env": environ, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen([script, "build"], **own) as process:
        tree = wait_until(lambda: log.exists() and log.read_text().strip(), "pip builds")
        assert os.path.isdir(tree)
        os.killpg(process.pid, signal.SIGTERM)
    assert Path(tree).is_relative_to(tmp_path / "var")
    assert os.listdir(tmp_path / "var/lib/cerebrum-backend/cache") == []
