"""The shell scripts, run as a person runs them: with real bash, curl, python3 and a terminal.

The server is scripted in this process: each test states what it answers and checks what it was
asked. A test waits for output or for an event of the server, until a deadline; it never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import inspect
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
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import families
import pytest
from harness import PATIENCE, ROOT, certificate, disk_of, wait_until
from scripted import HANG, Backend, answer, error, event, head, in_a_thread, token

import vpsd
from cerebrum.text.languages import LANGUAGES

REPL = str(ROOT / "cerebrum_repl.sh")
KEYGEN = str(ROOT / "generate_api_key.sh")
RUN = str(ROOT / "run.sh")

# ------------------------------------------------------------------------------------------ backend


Script = list[Any]  # of the steps that `Backend` knows


def tokens(*texts: str) -> Script:
    return [token(text, number) for number, text in enumerate(texts, 1)]


def done(**fields: Any) -> bytes:
    usual = {"language": "python", "model": "tiny", "total_tokens": 3, "inference_time": 1.234}
    return event(**({"done": True, "timestamp": "t", "finish_reason": "block"} | usual | fields))


def completion(*texts: str, **fields: Any) -> Script:
    return [head(), *tokens(*texts), done(**fields)]


instructed = partial(completion, mode="instruct")
SUMMARY = "[3 tokens in 1.2 s, tiny, block]"


def wait_for(event: threading.Event) -> Callable[[], Awaitable[None]]:
    """A step that ends when the test sets the event."""

    async def step() -> None:
        assert await asyncio.to_thread(event.wait, PATIENCE)

    return step


PROMPT = "python> "
ENTER = "\r\n\x1b[?2004l\r"  # how readline ends a line


class Terminal:
    """A program on a terminal of its own: `type` keys, and `expect` text to appear."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xa0\x00" + b"\0" * 4)  # 24 x 160
        own = {
            "start_new_session": True,
            "preexec_fn": partial(fcntl.ioctl, 0, termios.TIOCSCTTY, 0),
        }
        self.process = subprocess.Popen(
            command, env=env, stdin=slave, stdout=slave, stderr=slave, **own
        )
        os.close(slave)
        self.unread = b""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def enter(self, line: str) -> None:
        """Type a line at the REPL's prompt."""
        self.expect(PROMPT)
        self.type(f"{line}\r")
        self.expect(ENTER)

    def expect(self, text: str) -> str:
        """Reads up to and including the text; returns what came before it."""
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self.unread:
            ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
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


class Repl:
    """The REPL in `env`, whose PATH has nothing but the programs that it needs, and the Pi that it
    asks.
    """

    def __init__(self, backend: Backend, folder: Path, stack: contextlib.ExitStack) -> None:
        self.backend, self.folder, self.stack = backend, folder, stack
        self.tools = folder / "tools"
        self.tools.mkdir()
        (folder / "home").mkdir()
        needed = "bash curl cat cmp diff grep head mkdir mktemp rm sed stty tail touch tr wc"
        for tool in needed.split():
            (self.tools / tool).symlink_to(os.path.realpath(shutil.which(tool) or tool))
        (self.tools / "python3").symlink_to(os.path.realpath(sys.executable))
        self.url = f"http://127.0.0.1:{backend.port}"
        self.env = {
            "PATH": str(self.tools),
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder),
            "LANG": "C.UTF-8",
        }
        self.env |= {"TERM": "xterm", "CEREBRUM_URL": self.url}

    def answers(self, *scripts: Script) -> None:
        """To the next completions. Each of them must be asked for."""
        self.backend.scripts = [*self.backend.scripts, *scripts]

    @property
    def asked(self) -> list[dict[str, Any]]:
        return self.backend.completions

    def announced(self) -> str:
        """Let Avahi find this Pi on two networks. Its address."""
        address = f"127.0.0.1:{self.backend.port}"
        announce(self.tools, *[f"pi.local:{address}"] * 2)
        del self.env["CEREBRUM_URL"]
        return address

    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.asked]

    def run(self, stdin: bytes, *args: str, before: tuple[str, ...] = ()) -> tuple[int, str, str]:
        """The exit status, and what is on stdout and stderr. `before` begins the command."""
        command = [*before, REPL, *args]
        result = subprocess.run(
            command, env=self.env, input=stdin, capture_output=True, timeout=PATIENCE, check=False
        )
        return result.returncode, os.fsdecode(result.stdout), result.stderr.decode()

    def converse(self, *lines: str) -> tuple[str, list[str]]:
        """What a conversation of these lines prints, and its complaints."""
        status, out, err = self.run(os.fsencode("".join(line + "\n" for line in lines)))
        assert (status, [*self.folder.glob("cerebrum.*")]) == (0, [])
        return out, complaints(err)

    def terminal(self, *args: str, **variables: str) -> Terminal:
        return self.stack.enter_context(
            contextlib.closing(Terminal([REPL, *args], self.env | variables))
        )


def complaints(err: str) -> list[str]:
    """The messages on stderr, without the program's name before each."""
    first, *others = ("\n" + err).split("\ncerebrum_repl.sh: ")
    assert first.strip() == ""
    return [one.removesuffix("\n") for one in others]


@pytest.fixture
def repl(tmp_path: Path) -> Iterator[Repl]:
    endings = [
        {"id": id, "endings": one.endings, "filenames": one.filenames}
        for id, one in LANGUAGES.items()
    ]
    backend = Backend(scripts=[], models=answer(200, {"models": [], "languages": endings}))
    with in_a_thread(backend), contextlib.ExitStack() as stack:
        yield Repl(backend, tmp_path, stack)
    assert len(backend.completions) == len(backend.scripts)


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ------------------------------------------------------------------------------------------- filter

AWKWARD = [
    "%s%d",
    "\\n",
    "\\",
    "\n",
    "  two  ",
    "\t",
    "é€😀",
    "a\0b",
    "\x1b[31m",
    "-n",
    "",
    "'\"`$x",
    "\r",
    "\\0134",
]
CRLF = b': keep-alive\r\n\r\ndata: {"token": "\xc3\xa9", "total_tokens": 1}\r\n\r\n'
OTHERS = b'data:{"token": "x"}\n\nevent: other\nid: 1\n\n'


def test_the_filter_prints_the_completion_byte_for_byte(repl: Repl) -> None:
    repl.answers(completion(*AWKWARD), [head(), CRLF, OTHERS, done()])
    for printed in ("".join(AWKWARD), "éx"):
        assert repl.run(b"def f(\n", "-") == (0, printed, "")
    assert "x-api-key" not in repl.backend.asked[0][1]


def announce(folder: Path, *addresses: str) -> None:
    """Let avahi-browse of this folder find these, before and after it has their addresses."""
    name = "Cerebrum\\032on\\032pi;_cerebrum._tcp;local"
    lines = [f"+;eth0;IPv4;{name}", f"=;eth0;IPv6;{name};pi.local;fe80::1;7000;"]
    lines += [f'=;eth0;IPv4;{name};{address.replace(":", ";")};"a=b"' for address in addresses]
    show = "\n".join(
        ["#!/bin/bash", "[[ $* == '-prt _cerebrum._tcp' ]] && cat <<'END'", *lines, "END\n"]
    )
    write(folder / "avahi-browse", show).chmod(0o755)


def test_the_pi_is_found_if_it_is_the_only_one(repl: Repl) -> None:
    found = repl.announced()
    repl.answers(completion("x"))
    assert repl.run(b"x", "-") == (0, "x", "")
    announce(repl.tools, f"pi.local:{found}", "desk.local:192.0.2.8:7001")
    status, out, err = repl.run(b"x", "-")
    assert (status, out) == (1, "")
    assert {found, "192.0.2.8:7001;"} < set(err.splitlines()[0].split())


def test_a_pi_that_was_found_gets_no_key_unasked(repl: Repl) -> None:
    found = repl.announced()
    repl.env["CEREBRUM_CM4_API_KEY"] = "se cret"
    refusal = f"the key is not sent to {found}, which Avahi found; if that is your Pi: --url http://{found}"
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
    assert [headers["x-api-key"] for _, headers, _ in repl.backend.asked] == ["se cret"] * 2


def test_the_request_with_a_key_that_no_command_line_has(repl: Repl) -> None:
    seen: list[bytes] = []

    def read_command_lines() -> None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.append(process.read_bytes())

    repl.answers([read_command_lines, *completion("x")])
    repl.env["CEREBRUM_CM4_API_KEY"] = "hush hush"
    prompt = 'a "quoted" \\ $(rm) é\n\tb\n'
    assert (
        repl.run(prompt.encode() + b"\n", *["-l", "go", "-n", "7", "-t", ".5", "-m", "tiny", "-"])[
            0
        ]
        == 0
    )
    ((line, headers, _),) = repl.backend.asked
    assert line == "POST /v1/complete/stream HTTP/1.1"
    assert (headers["content-type"], headers["x-api-key"]) == ("application/json", "hush hush")
    sent = {
        "prompt": prompt,
        "language": "go",
        "model": "tiny",
        "max_tokens": 7,
        "temperature": 0.5,
    }
    assert repl.asked == [{"mode": "auto", "progress": True, **sent}]
    assert any(b"/v1/complete/stream" in line for line in seen)
    assert not any(b"hush hush" in line for line in seen)


def test_each_token_is_printed_before_the_next_one_is_made(repl: Repl) -> None:
    printed = [threading.Event() for _ in range(3)]
    steps = [
        step
        for number, event in enumerate(printed)
        for step in (token(str(number), number + 1), wait_for(event))
    ]
    repl.answers([head(), *steps, done()])
    with subprocess.Popen(
        [REPL, "-"], env=repl.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        for number, event in enumerate(printed):
            assert os.read(process.stdout.fileno(), 100) == str(number).encode()
            event.set()
        assert process.wait(PATIENCE) == 0


BROKEN_OFF = [head(), *tokens("half")]
CUT_IN_A_CHUNK = [
    head(200, "Transfer-Encoding: chunked"),
    b'1c\r\ndata: {"token": "half"}\n\n   \r\nff\r\n',
]
FAILED_MIDWAY = [*BROKEN_OFF, event(error=True, message="backend died", code="VPS_UNAVAILABLE")]
NO_EVENT = "expected an event of Cerebrum, got something else"
TOKENS = "tokens: expected a whole number from 1 to 2048, got "
TEMPERATURE = "temperature: expected a number from 0 to 1, got "
FAILURES: list[
    tuple[str, Script, int, str, str]
] = [  # arguments, what the server answers, the status, what is printed
    ("-", FAILED_MIDWAY, 1, "half", "VPS_UNAVAILABLE: backend died"),
    ("-", BROKEN_OFF, 1, "half", "the stream broke off before its end"),
    ("-", CUT_IN_A_CHUNK, 1, "half", "the stream broke off before its end"),
    (
        "-",
        [error(400, "X", "No 100%\nsuch \x1b[1mlanguage")],
        1,
        "",
        "X: No 100%\nsuch [1mlanguage",
    ),
    ("-", [head(502, kind="text/html"), b"<html>\n<h1>Bad</h1>\n"], 1, "", "HTTP 502 from {url}"),
    ("-", [answer(404, {"detail": "x"})], 1, "", "HTTP 404 from {url}"),
    ("-", [*BROKEN_OFF, b"data: {nonsense\n\n"], 1, "half", NO_EVENT),
    ("-", [*BROKEN_OFF, b"data: [1]\n\n"], 1, "half", NO_EVENT),
    ("-", [*BROKEN_OFF, b'data: {"token": 7}\n\n'], 1, "half", NO_EVENT),
    ("-", instructed("on", finish_reason="length"), 1, "on", "cut off at 512 tokens"),
    ("-", [b""], 1, "", "curl: (52) Empty reply from server"),
    ("-n", [], 2, "", "-n needs a value; see --help"),
    ("-n 0 -", [], 2, "", f"{TOKENS}0"),
    ("-n 2049 -", [], 2, "", f"{TOKENS}2049"),
    ("-n a[$(id)] -", [], 2, "", f"{TOKENS}a[$(id)]"),
    ("-t 1.1 -", [], 2, "", f"{TEMPERATURE}1.1"),
    ("-t 1e0 -", [], 2, "", f"{TEMPERATURE}1e0"),
    ("file.py", [], 2, "", "unknown argument file.py; see --help"),
]


@pytest.mark.parametrize(("args", "script", "status", "printed", "said"), FAILURES)
def test_a_failure_exits_with_1_or_2(
    repl: Repl, args: str, script: Any, status: int, printed: str, said: str
) -> None:
    repl.answers(*[script] if script else [])
    assert repl.run(b"x", *args.split()) == (
        status,
        printed,
        f"cerebrum_repl.sh: {said.format(url=repl.url)}\n",
    )


# ------------------------------------------------------------------------------------- conversation


def test_settings_reach_the_request(repl: Repl) -> None:
    repl.answers(completion("x"), completion("y"))
    repl.converse(
        ":lang rust",
        ":model tiny",
        ":tokens 9",
        ":temp 0",
        "fn f",
        ":model auto",
        ":temp 1.0",
        "fn g",
    )
    sent = {"mode": "auto", "language": "rust", "max_tokens": 9, "progress": True}
    first, second = (
        {"prompt": "fn f", "model": "tiny", "temperature": 0},
        {"prompt": "fn g", "temperature": 1.0},
    )
    assert repl.asked == [sent | first, sent | second]


def test_a_completion_is_summed_up_and_an_error_does_not_end_the_conversation(repl: Repl) -> None:
    repl.answers(FAILED_MIDWAY, completion("\n    return ", "1"), completion("x"))
    out, err = repl.converse("a", "    def f():", ":multi", "def f():", "", "    :help", ":done")
    assert (out, err) == (
        f"half\n\n    return 1\n{SUMMARY}\nx\n{SUMMARY}\n",
        ["VPS_UNAVAILABLE: backend died"],
    )
    assert repl.prompts() == ["a", "    def f():", "def f():\n\n    :help"]


NO_FILE = "the last result belongs to no file; save it by :save PATH"
NOT_WHOLE = "the last result is not whole; :save PATH saves it nevertheless"


def test_commands_that_ask_nothing(repl: Repl) -> None:
    unusable = [":last", ":write", ":save", ":do it", ":nonsense", "", "   "]
    said = ["there is no result yet", NO_FILE, "expected :save PATH"]
    said += ["expected :do INSTRUCTION after a completion, or :do @PATH INSTRUCTION"]
    said += ["no such command: :nonsense; see :help"]
    shown = "language: go\ntokens: 512\ntemperature: 0.4\n"
    assert repl.converse(":lang go", ":tokens", ":temp", *unusable, ":exit", "never") == (
        shown,
        said,
    )
    assert repl.backend.asked == []


THERE: dict[str, Any] = {"languages": ["c"], "available": True}
LISTED: dict[str, Any] = {
    "models": [
        {**THERE, "id": "small", "parameters": "0.5B", "loaded": True, "memory_mb": 1288.6},
        {**THERE, "id": "middle", "parameters": "1.5B", "loaded": False},
        {"id": "large", "parameters": "7B", "languages": ["go", "c"], "available": False},
    ],
    "languages": [{"id": "lua", "endings": [".lua"], "filenames": [], "served": False}],
    "prefer": {"infill": ["middle"], "instruct": ["large", "middle"]},
}
SHOWN = """\
  small   loaded, 1289 MB  0.5B
* middle  on the VPS       1.5B
  large   not there        7B
preferred for infill: middle
preferred for instruct: large, middle
model: middle
"""
STATS = {"vps_available": True, "load_avg": [0.5, 1], "backends": [{"id": "attic"}], "host": "pi"}
STATS_SHOWN = """\
vps_available            true
load_avg                 [0.5, 1]
host                     pi
backend attic            {"id": "attic"}
"""
AWAY = {"models": [{"id": "a", "available": False}], "vps_available": False}
NO_LIST = "/v1/models: expected an answer of Cerebrum, got something else"
LISTS: list[
    tuple[str, bytes, str, str]
] = [  # commands, what the server answers, what is shown, what is said
    (":model middle\n:model", answer(200, LISTED), "model: middle\n" + SHOWN, ""),
    (
        ":model",
        answer(200, {"models": [{"id": "a", "loaded": True}]}),
        "  a  loaded\nmodel: auto\n",
        "",
    ),
    (":model", answer(200, {"models": [{"id": "a"}]}), "  a  on the VPS\nmodel: auto\n", ""),
    (":model", answer(200, {"models": []}), "model: auto\n", ""),
    (":model", answer(200, AWAY), "  a  unknown\nthe VPS cannot be reached\nmodel: auto\n", ""),
    (":lang\n:lang go", answer(200, LISTED), "c go\nlanguage: python\nlanguage: go\n", ""),
    (":stats", answer(200, STATS), STATS_SHOWN, ""),
    (
        ":lang",
        error(401, "UNAUTHORIZED", "no\x1b[1m key"),
        "language: python\n",
        "UNAUTHORIZED: no[1m key",
    ),
    (":model", head(kind="text/html") + b"<html>", "model: auto\n", "{url}" + NO_LIST),
    (":stats", b"", "", "curl: (52) Empty reply from server"),
]


@pytest.mark.parametrize(("commands", "answered", "shown", "said"), LISTS)
def test_what_the_server_lists(
    repl: Repl, commands: str, answered: bytes, shown: str, said: str
) -> None:
    repl.backend.models = repl.backend.stats = answered
    assert repl.converse(*commands.splitlines()) == (
        shown,
        [said.format(url=repl.url)] if said else [],
    )
    path = "/v1/stats" if commands == ":stats" else "/v1/models"
    assert [line for line, _, _ in repl.backend.asked] == [f"GET {path} HTTP/1.1"]


def test_last_and_save(repl: Repl) -> None:
    here, saved, taken = (
        repl.folder,
        repl.folder / "out.py",
        write(repl.folder / "taken.py", "mine\n"),
    )
    os.mkfifo(here / "fifo")
    repl.answers(completion("\n    return '\\n'  \n\n"))
    bad = [f":save {here}/fifo", f":save! {here}", f":save {here}/none/x"]
    out, err = repl.converse(
        "def f():", ":last", f":save {saved}", f":save {taken}", f":save! {taken}", *bad
    )
    whole = "def f():\n    return '\\n'  \n\n"
    assert out.split("block]\n")[1] == f"{whole}saved {saved}\nsaved {taken}\n"
    reasons = {
        "/fifo": "not a regular file",
        "": "not a regular file",
        "/none/x": "No such file or directory",
    }
    refused = [f"{here}{place}: {reason}; nothing was saved" for place, reason in reasons.items()]
    assert err == [f"{taken} exists; :save! {taken} replaces it", *refused]
    assert saved.read_text() == taken.read_text() == whole
    assert stat.S_ISFIFO((here / "fifo").stat().st_mode)


# -------------------------------------------------------------------------------------------- files


def test_a_file_is_completed_at_its_end_and_keeps_its_links_mode_and_owner(repl: Repl) -> None:
    folder, link = repl.folder / "folder", repl.folder / "a link.rs"
    folder.mkdir()
    real = write(folder / "real.rs", b"fn f() {\r\n\t// \xc3\xa9\n")
    real.chmod(0o750)
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(real, *owner)
    link.symlink_to("folder/real.rs")
    repl.answers(completion("}\n"))
    shown = f"}}\n\n{SUMMARY}\nwrote {link}\nlanguage: rust\n"
    assert repl.converse(f":file {link}", ":write", ":lang") == (shown, [])
    (body,) = repl.asked
    assert (body["prompt"], body["mode"], body["language"]) == (
        "fn f() {\r\n\t// é\n",
        "complete",
        "rust",
    )
    assert "suffix" not in body
    assert (real.read_bytes(), mode(real)) == (b"fn f() {\r\n\t// \xc3\xa9\n}\n", 0o750)
    assert ((real.stat().st_uid, real.stat().st_gid), link.is_symlink()) == (owner, True)
    assert os.listdir(folder) == ["real.rs"]


def test_a_files_name_sets_the_language_and_its_length_the_tokens(repl: Repl) -> None:
    sizes = {
        "x.RS": 0,
        "a.b.go": 10,
        "Gemfile": 3000,
        ".py": 30_000,
        "go": 0,
        "x.go~": 0,
        "x.txt": 0,
    }
    paths = [write(repl.folder / name, "x" * size) for name, size in sizes.items()]
    repl.answers(*[instructed("a")] * len(paths))
    repl.converse(":lang c", *(f":do @{path} it" for path in paths))
    assert [body["language"] for body in repl.asked] == [
        "rust",
        "go",
        "ruby",
        "python",
        *["python"] * 3,
    ]
    assert [body["max_tokens"] for body in repl.asked] == [512, 512, 1064, 2048, *[512] * 3]


GAPS = [  # file, line, text before the gap, text after it
    ("a\n    return \nb\n", 2, "a\n    return ", "\nb\n"),
    ("a\n\n\nb", 2, "a\n", "\n\nb"),
    ("\nb\n", 1, "", "\nb\n"),
    ("a\nb", 2, "a\nb", ""),
    ("a\nb\n", 2, "a\nb", "\n"),
    ("a\r\nx =\r\nb\r\n", 2, "a\r\nx =", "\r\nb\r\n"),
    ("é\nü\n", 1, "é", "\nü\n"),
]
FILL = "FI\nLL"


@pytest.mark.parametrize(("text", "line", "before", "after"), GAPS)
def test_a_gap_is_filled(repl: Repl, text: str, line: int, before: str, after: str) -> None:
    path = write(repl.folder / "x.py", text)
    repl.answers(completion(FILL))
    assert repl.converse(f":infill {path}:{line}", ":write") == (
        f"{FILL}\n{SUMMARY}\nwrote {path}\n",
        [],
    )
    (body,) = repl.asked
    assert (body.get("prompt", ""), body.get("suffix", "")) == (before, after)
    assert (body["mode"], body.get("filename")) == (
        ("infill", "x.py") if after else ("complete", None)
    )
    filled = FILL.replace("\n", "\r\n") if "\r" in text else FILL
    assert path.read_bytes() == (before + filled + after).encode()


def test_a_file_and_a_completion_are_changed_by_instructions(repl: Repl) -> None:
    path = write(repl.folder / "x.go", "one\ntwo\n")
    repl.answers(
        completion("\n  x"),
        instructed("def f():\n  y\n"),
        instructed("one\nTWO"),
        instructed("ONE\nTWO\n"),
    )
    out, err = repl.converse(
        "def f():", ":do use y", ":write", f":do @{path} shout  it", ":do louder", ":write"
    )
    assert err == [NO_FILE]
    asked = [
        (body["prompt"], body["instruction"], body["mode"], body["language"])
        for body in repl.asked[1:]
    ]
    first = ("def f():\n  x", "use y", "instruct", "python")
    assert asked == [
        first,
        ("one\ntwo\n", "shout  it", "instruct", "go"),
        ("one\nTWO\n", "louder", "instruct", "go"),
    ]
    assert "--- last result\n+++ last result (new)\n" in out
    assert "\n-  x\n\\ No newline at end of file\n+  y\n" in out
    head = f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n"
    assert f"{head} one\n-two\n+TWO\n" in out
    assert f"{head}-one\n-two\n+ONE\n+TWO\n" in out
    assert path.read_text() == "ONE\nTWO\n"


DO, TWO_LINES = ":do @{path} it", b"one\ntwo\n"
NO_TEXT = "{path}: expected text in UTF-8, got the byte "
CUT = instructed("on", finish_reason="length", kept={"parts": ["all"]})
OF_A_PART = instructed("on", finish_reason="stop", kept={"parts": ["imports", "window"]})
REFUSES = ", so :write will refuse it"
# A command, the file, the answers, what is said to the command, and to :write.
UNTOUCHED: list[tuple[str, bytes, list[Script], str, str]] = [
    (DO, TWO_LINES, [CUT], "cut off at 512 tokens" + REFUSES, NOT_WHOLE),
    (
        DO,
        TWO_LINES,
        [instructed("on", finish_reason="repeat")],
        "the model began to repeat itself" + REFUSES,
        NOT_WHOLE,
    ),
    (
        DO,
        TWO_LINES,
        [OF_A_PART],
        "made from a part of the text, which is too long for the model" + REFUSES,
        NOT_WHOLE,
    ),
    (DO, TWO_LINES, [instructed(" \n")], "the answer is empty" + REFUSES, NOT_WHOLE),
    (
        DO,
        TWO_LINES,
        [instructed("on", finish_reason="preempted")],
        "the answer broke off" + REFUSES,
        NOT_WHOLE,
    ),
    (DO, TWO_LINES, [FAILED_MIDWAY], "VPS_UNAVAILABLE: backend died", NOT_WHOLE),
    (DO, b"one\ncaf\xe9\n", [], NO_TEXT + "0xe9 in line 2", NO_FILE),
    (
        ":file {path}",
        b"\xed\xa0\x80\n",
        [],
        NO_TEXT + "0xed in line 1",
        NO_FILE,
    ),  # half of an emoji
    (":infill {path}:1", b"\xff\xfea\0", [], NO_TEXT + "0xff in line 1", NO_FILE),  # UTF-16
    (":file {path}", b"a\n\n\xc3\xa9\0", [], NO_TEXT + "0x00 in line 3", NO_FILE),
]


@pytest.mark.parametrize(("command", "text", "scripts", "said", "of_write"), UNTOUCHED)
def test_neither_half_an_answer_nor_what_is_no_text_is_written(
    repl: Repl, command: str, text: bytes, scripts: list[Script], said: str, of_write: str
) -> None:
    path = write(repl.folder / "x.py", text)
    repl.answers(*scripts)
    assert repl.converse(command.format(path=path), ":write")[1] == [
        said.format(path=path),
        of_write,
    ]
    assert path.read_bytes() == text


def test_a_file_that_changed_meanwhile_or_may_only_be_read_is_not_replaced(repl: Repl) -> None:
    path, fixed = write(repl.folder / "x.py", "one\n"), write(repl.folder / "y.py", "x")
    fixed.chmod(0o444)
    repl.answers([lambda: path.write_text("edited\n"), *completion("two\n")], completion("y"))
    without_override = (
        (str(shutil.which("setpriv")), "--bounding-set=-dac_override") if os.geteuid() == 0 else ()
    )
    typed = f":file {path}\n:write\n:file {fixed}\n:write\n"
    status, _, err = repl.run(typed.encode(), before=without_override)
    said = [
        f"{path} has changed since it was read",
        f"{fixed}: not writable; the file is unchanged",
    ]
    assert (status, complaints(err)) == (0, said)
    assert (path.read_text(), fixed.read_text()) == ("edited\n", "x")


REFUSED = [error(503, "X", "no")]
NOTHING_CAME = [  # a command that gets no answer, what the server says to it, what the REPL says
    (":infill {b}", None, "expected :infill PATH:LINE, with lines counted from 1"),
    (":infill {b}:0", None, "expected :infill PATH:LINE, with lines counted from 1"),
    (":infill {b}:2", None, "{b} has no line 2"),
    (":infill {b}x:1", None, "{b}x: no such file, or not readable"),
    (":file {b}x", None, "{b}x: no such file, or not readable"),
    (":do @. shout", None, ".: expected a file, got a folder"),
    (":do @{b}x shout", None, "{b}x: no such file, or not readable"),
    (":file {b}", REFUSED, "X: no"),
    (":infill {b}:1", REFUSED, "X: no"),
    (":do @{b} shout", REFUSED, "X: no"),
    (":do shout", REFUSED, "X: no"),
    ("fn f() {{", REFUSED, "X: no"),
]


@pytest.mark.parametrize(
    ("command", "script", "said"), NOTHING_CAME, ids=[row[0] for row in NOTHING_CAME]
)
def test_a_command_without_an_answer_leaves_the_last_result(
    repl: Repl, command: str, script: Any, said: str
) -> None:
    a, b = write(repl.folder / "a.py", "a\n"), write(repl.folder / "b.rs", "b\n")
    repl.answers(completion("A\n"), *([script] if script else []))
    out, err = repl.converse(f":file {a}", command.format(b=b), ":last", ":write", ":lang")
    assert err == [said.format(b=b)]
    assert out.endswith(f"block]\na\nA\nwrote {a}\nlanguage: python\n")
    assert (a.read_text(), b.read_text()) == ("a\nA\n", "b\n")


def test_half_an_answer_is_the_last_result_and_belongs_to_its_file(repl: Repl) -> None:
    a, b = write(repl.folder / "a.py", "a\n"), write(repl.folder / "b.rs", "b\n")
    repl.answers(completion("A\n"), BROKEN_OFF, instructed("whole\n"))
    out, err = repl.converse(
        f":file {a}", f":file {b}", ":write", ":last", ":do finish it", ":write"
    )
    broken, unfit = "the stream broke off before its end", "made from a result that is not whole"
    assert err == [broken, NOT_WHOLE, unfit + REFUSES, NOT_WHOLE]
    assert "block]\nhalf\nb\nhalfwhole\n" in out
    assert repl.prompts() == ["a\n", "b\n", "b\nhalf"]
    assert (a.read_text(), b.read_text()) == ("a\n", "b\n")


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
) -> None:
    path, other = (
        write(small_disk / "x.py", "x" * 40_000),
        write(repl.folder / "y.py", "x" * 10_000),
    )
    repl.answers(completion("y" * 40_000), completion(*["y" * 10_000] * 2))
    _, err = repl.converse(f":file {path}", ":write", f":save! {path}")
    full = f"{path}: No space left on device"
    assert err == [f"{full}; the file is unchanged", f"{full}; nothing was saved"]
    assert (path.read_text(), os.listdir(small_disk)) == ("x" * 40_000, ["x.py"])
    path.unlink()
    repl.env["TMPDIR"] = str(small_disk)
    status, _, err = repl.run(f":file {other}\n:write\n".encode())
    said = [f"no room for the whole result in {small_disk}", NOT_WHOLE]
    assert (status, err.splitlines()[-2:]) == (0, [f"cerebrum_repl.sh: {one}" for one in said])
    assert other.read_text() == "x" * 10_000


@pytest.mark.parametrize("name", ["-n.go", "a  b %s & \\n é.go", "~.go", "@x.go", "\udcff.go"])
def test_any_name_of_a_file(repl: Repl, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(repl.folder)
    path = write(Path(name), "a\n")
    repl.answers(completion("b\n"), completion("!"), instructed("c\n"))
    commands = [f":file {name}", f":infill {name}:1", f':do @"{name}" it']
    assert (
        repl.converse(*(line for one in commands for line in (one, ":write")), ":save -copy.go")[1]
        == []
    )
    assert repl.prompts() == ["a\n", "a", "a!\nb\n"]
    assert repl.asked[1]["filename"] == name.replace("\udcff", "?")
    assert (path.read_text(), Path("-copy.go").read_text()) == ("c\n", "c\n")


LINE_ENDS = [  # the file, what a model answers to an instruction, what is written
    (b"a\r\nb\r\n", "A\nB\n", b"A\r\nB\r\n"),
    (b"a\r\nb\r\n", "A\r\nB", b"A\r\nB\r\n"),
    (b"a\r\nb", "A\nB", b"A\r\nB"),
    (b"a\nb\r\n", "A\nB\n", b"A\nB\n"),
    (b"a\nb\r\nc\r\n", "a\nnew\nb\nC\n", b"a\nnew\nb\r\nC\n"),
    (b"a\nb\n", "A\r\nB\r\n", b"A\nB\n"),
    (b"\xef\xbb\xbfa\nb\n", "a\nB\n", b"\xef\xbb\xbfa\nB\n"),
    (b"a\nb\n", "A\nB", b"A\nB\n"),
    (b"a\nb", "A\nB", b"A\nB"),
    (b"", "A", b"A\n"),
]


@pytest.mark.parametrize(("before", "answer", "after"), LINE_ENDS)
def test_a_changed_file_keeps_its_line_ends(
    repl: Repl, before: bytes, answer: str, after: bytes
) -> None:
    path = write(repl.folder / "x.py", before)
    repl.answers(*[instructed(answer)] * 2)
    assert repl.converse(f":do @{path} shout", ":do again", ":write")[1] == []
    assert path.read_bytes() == after
    assert [body.get("prompt", "") for body in repl.asked] == [
        text.decode("utf-8-sig") for text in (before, after)
    ]


# ----------------------------------------------------------------------------------------- terminal


MAGENTA, GREEN, RED, PLAIN = "\x1b[35m", "\x1b[32m", "\x1b[31m", "\x1b[m"


def test_ctrl_c_stops_the_generation_and_neither_the_repl_nor_the_last_result(repl: Repl) -> None:
    a, b = write(repl.folder / "a.py", "a\n"), write(repl.folder / "b.rs", "b\n")
    asked, left = threading.Event(), threading.Event()
    repl.answers(completion("A\n"), [head(), asked.set, HANG, left.set])
    screen = repl.terminal()
    screen.enter(f":file {a}")
    screen.expect("block]")
    screen.enter(f":file {b}")
    assert asked.wait(PATIENCE)
    screen.type("\x03")
    screen.expect("cerebrum_repl.sh: interrupted")
    assert left.wait(PATIENCE)
    screen.enter(":write")
    screen.expect(f"wrote {a}")
    assert (a.read_text(), b.read_text()) == ("a\nA\n", "b\n")
    screen.expect(PROMPT)
    screen.type("\x04")
    assert screen.status() == 0


def test_ctrl_c_at_a_prompt_drops_what_was_typed(repl: Repl) -> None:
    repl.answers(completion("yes"))
    screen = repl.terminal()
    screen.expect(PROMPT)
    screen.type("not this")
    screen.expect("not this")
    screen.type("\x03")
    screen.enter(":multi")
    screen.expect("... ")
    screen.type("one\r")
    screen.expect(
        "one\r\n"
    )  # Return draws the old prompt once more; the next one says that Ctrl-C is a key again
    screen.expect("... ")
    screen.type("two\x03")
    screen.enter("three")
    screen.expect("yes")
    assert repl.prompts() == ["three"]


def test_ctrl_c_in_the_filter_ends_it(repl: Repl) -> None:
    left = threading.Event()
    repl.answers([head(), *tokens("one", " two"), HANG, left.set])
    screen = repl.terminal("-")
    screen.type("x\x04\x04")
    assert screen.expect("one two") == "x"  # in no colour
    screen.type("\x03")
    assert left.wait(PATIENCE)
    assert screen.status() == -signal.SIGINT


def test_the_line_can_be_edited_and_history_lasts(repl: Repl) -> None:
    """Pasted lines are one prompt, and one entry."""
    repl.answers(*[completion("one."), completion("two.")] * 2)
    screen = repl.terminal()
    screen.expect(PROMPT)
    screen.type("ef f()\x01d\x05:\r")  # Ctrl-A, Ctrl-E
    screen.expect("one.")
    screen.enter("\x1b[200~def g():\n\tx = 1\n\x1b[201~    return")
    screen.expect("two.")
    screen.enter(":exit")
    assert screen.status() == 0
    again = repl.terminal()
    again.enter("\x1b[A\x1b[A")  # up, up
    again.expect("one.")
    again.enter("\x1b[A\x1b[A\x1b[A\x1b[A")
    again.expect("two.")
    pasted = "def g():\n\tx = 1\n    return"
    assert repl.prompts() == ["def f():", pasted, pasted, "def f():"]
    history = repl.folder / "home/.local/state/cerebrum/repl_history"
    assert re.sub(r"(?m)^#\d+$", "#", history.read_text()).startswith(
        f"#\ndef f():\n#\n{pasted}\n#\n:exit\n"
    )
    assert mode(history) == 0o600


def test_progress_is_shown_and_gone_before_the_first_token(repl: Repl) -> None:
    stages = [("queued", 0, 1), ("loading", 1, 4), ("prefill", 512, 1024), ("decode", 0, 9)]
    progress = [
        event(progress={"stage": stage, "done": done, "total": total})
        for stage, done, total in stages
    ]
    repl.answers([head(), *progress, *tokens("token"), done()])
    screen = repl.terminal()
    screen.enter("x")
    for label in ("waiting for a free slot", "loading the model, 25 %", "reading the prompt, 50 %"):
        assert screen.expect(f"\r\x1b[K{label}") == ""
    assert screen.expect("token") == "\r\x1b[K" + MAGENTA


def test_a_model_is_coloured_and_cannot_control_the_terminal(repl: Repl) -> None:
    path = write(repl.folder / "x.py", "a = \nb\n\n")
    repl.answers(completion("a\x1b[2Jb\x07\tc\nd\x9be\0f\x7fg\r\\x1b€\\"), completion("1", "\n\n"))
    repl.answers(instructed("a = 1\n\n\n+ c\x1b[2J\n"))
    screen = repl.terminal()
    screen.enter("x")
    clean = "a[2Jb\tc\r\ndefg\\x1b€\\"
    assert screen.expect(f"{MAGENTA}{clean}{PLAIN}\r\n") == ""
    screen.enter(":last")
    assert screen.expect(f"{clean}\r\n") == "x"
    screen.enter(f":infill {path}:1")
    assert screen.expect("[3 tokens") == f"{MAGENTA}1{PLAIN}{MAGENTA}\r\n\r\n{PLAIN}\r\n"
    screen.enter(":last")
    assert screen.expect("\x1b[?2004h" + PROMPT) == "a = 1\r\n\r\n\r\nb\r\n\r\n"
    screen.type(":write\r")
    screen.expect(f"wrote {path}")
    assert path.read_text() == "a = 1\n\n\nb\n\n"
    screen.enter(f":do @{path} it")
    screen.expect("block]\r\n")
    begin = [
        f"{RED}--- {path}{PLAIN}",
        f"{GREEN}+++ {path} (new){PLAIN}",
        "@@ -1,5 +1,4 @@",
        " a = 1",
        " ",
        " ",
    ]
    lines = [*begin, f"{RED}-b{PLAIN}", f"{RED}-{PLAIN}", f"{GREEN}++ c[2J{PLAIN}", "\x1b[?2004h"]
    assert screen.expect(PROMPT) == "\r\n".join(lines)


def test_a_terminal_without_colours(repl: Repl) -> None:
    path = write(repl.folder / "x.py", "a\n")
    repl.answers(*[instructed("b\x1b[31m\n")] * 3)
    for without in ({"NO_COLOR": "0"}, {"TERM": "dumb"}, {"TERM": ""}):
        screen = repl.terminal(**without)
        screen.expect(PROMPT)
        screen.type(f":do @{path} it\r")
        shown = screen.expect("+b[31m\r\n").rpartition(" it\r\n")[2].removeprefix("\x1b[?2004l\r")
        assert (
            shown
            == f"b[31m\r\n\r\n{SUMMARY}\r\n--- {path}\r\n+++ {path} (new)\r\n@@ -1 +1 @@\r\n-a\r\n"
        ), without


# ---------------------------------------------------------------------------------------------- key


def keygen(*args: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    given = {"env": {"PATH": os.environ["PATH"], **environ}, "input": stdin, "timeout": PATIENCE}
    result = subprocess.run([KEYGEN, *args], capture_output=True, text=True, **given)
    return (
        result.returncode,
        result.stdout,
        result.stderr.removeprefix("generate_api_key.sh: ").removesuffix("\n"),
    )


def test_a_key_is_32_random_bytes() -> None:
    keys = {keygen() for _ in range(2)}
    assert all(
        code == 0 and not err and re.fullmatch(r"[A-Za-z0-9_-]{43}\n", out)
        for code, out, err in keys
    )
    assert len(keys) == 2


OTHERWISE = "# CEREBRUM_API_KEY=\n\nX=CEREBRUM_API_KEY=\\n%s\n"
WRITTEN = [  # file, before, after (K is the new key)
    (".env", None, "CEREBRUM_API_KEY=K\n"),
    (".env", "", "CEREBRUM_API_KEY=K\n"),
    (".env", "A=1\nCEREBRUM_API_KEY=\nB=2\n", "A=1\nCEREBRUM_API_KEY=K\nB=2\n"),
    (".env", "A=1", "A=1\nCEREBRUM_API_KEY=K\n"),
    (".env", "CEREBRUM_API_KEY=o/l+d==", "CEREBRUM_API_KEY=K,o/l+d==\n"),
    (
        ".env",
        "export CEREBRUM_API_KEY = 'one'\nB=2\nCEREBRUM_API_KEY=\"two\"\r\n",
        "CEREBRUM_API_KEY=K,two\nB=2\n",
    ),
    (".env", OTHERWISE, f"{OTHERWISE}CEREBRUM_API_KEY=K\n"),
    (".env", "A=\xff\r\n", "A=\xff\r\nCEREBRUM_API_KEY=K\n"),
    ("CEREBRUM_API_KEY", None, "K\n"),
    ("CEREBRUM_API_KEY", "\n", "K\n"),
    ("CEREBRUM_CM4_API_KEY", "old==\n\n", "K,old==\n"),
]


@pytest.mark.parametrize(("name", "before", "after"), WRITTEN)
def test_a_key_is_written_before_the_one_that_is_there(
    tmp_path: Path, name: str, before: str, after: str
) -> None:
    path = tmp_path / name
    if before is not None:
        write(path, before.encode("latin-1")).chmod(0o644)
    assert keygen("--write", str(path)) == (0, f"key set in: {path}\n", "")
    text = path.read_bytes().decode("latin-1")
    assert re.sub(r"(?m)^(CEREBRUM_API_KEY=|)[A-Za-z0-9_-]{43}(?=,|$)", r"\1K", text) == after
    assert (mode(path), os.listdir(tmp_path)) == (0o600, [name])


TWO_KEYS = "TWO: expected one key at most, got two: --set the one that stays, then --write again"
NO_KEY = "expected a key of letters, digits and ._~+/=- on stdin, got something else"
NAMED = "expected a name of 1 to 32 letters, digits and ._- after "
REFUSALS = [  # a command, its stdin, its status, what it says
    ("--write", "", 2, "--write needs at least one FILE"),
    ("--write good nowhere/x", "", 1, "nowhere/x: no such directory"),
    ("--write good .", "", 1, ".: expected a regular file that can be read"),
    ("--write good TWO", "", 1, TWO_KEYS),
    ("--set good", "", 1, "expected a key on stdin, got none"),
    ("--set good", "\n", 1, NO_KEY),
    ("--set good", "two words\n", 1, NO_KEY),
    ("--set good", "CEREBRUM_API_KEY='k'\n", 1, NO_KEY),
    ("--client", "", 2, f"{NAMED}--client, got ''"),
    ("--client an/na", "", 2, f"{NAMED}--client, got 'an/na'"),
    (f"--revoke {'n' * 33}", "", 2, f"{NAMED}--revoke, got '{'n' * 33}'"),
    ("--revoke #", "", 2, f"{NAMED}--revoke, got '#'"),
    ("--client x 65", "", 2, "expected a number of places from 1 to 64, got '65' after the name"),
    ("--client x 0", "", 2, "expected a number of places from 1 to 64, got '0' after the name"),
    ("--revoke n0 n1", "", 2, "expected nothing, got 'n1' after the name"),
    ("--client n0", "", 1, "keys: n0 has a key already; first --revoke n0"),
    ("--client x", "", 1, "keys: has 32 names, which is the most; --revoke one first"),
    ("--revoke x", "", 1, "keys: there is no client x"),
]


@pytest.mark.parametrize(("args", "stdin", "status", "said"), REFUSALS)
def test_what_cannot_be_done_changes_no_file(
    tmp_path: Path, args: str, stdin: str, status: int, said: str
) -> None:
    clients = "# 32\n" + "".join(f"n{number} key\n" for number in range(32))
    before = {"good": "CEREBRUM_API_KEY=old\n", "TWO": "new, old\n", "keys": clients}
    with contextlib.chdir(tmp_path):
        for name, text in before.items():
            write(Path(name), text)
        assert keygen(*args.split(), stdin=stdin, CEREBRUM_CM4_KEYS_FILE="keys") == (
            status,
            "",
            said,
        )
        assert {name: Path(name).read_text() for name in os.listdir()} == before


@pytest.mark.parametrize(
    "stdin", ["k-_1=\n", "k-_1=", "CEREBRUM_CM4_API_KEY=k-_1=,old\r\n", "k-_1=\nnext line"]
)
def test_a_key_is_carried_over(tmp_path: Path, stdin: str) -> None:
    real, env = write(tmp_path / "real", "CEREBRUM_API_KEY=older,old\nA=1\n"), tmp_path / ".env"
    env.symlink_to("real")
    credential = write(tmp_path / "CEREBRUM_API_KEY", "old\n")
    assert keygen("--set", str(env), str(credential), stdin=stdin) == (
        0,
        f"key set in: {env} {credential}\n",
        "",
    )
    assert (env.is_symlink(), mode(real), mode(credential)) == (True, 0o600, 0o600)
    assert (env.read_text(), credential.read_text()) == ("CEREBRUM_API_KEY=k-_1=\nA=1\n", "k-_1=\n")


def test_a_typed_key_is_not_shown(tmp_path: Path) -> None:
    with contextlib.closing(
        Terminal([KEYGEN, "--set", str(tmp_path / ".env")], dict(os.environ))
    ) as screen:
        screen.expect("key (not shown): ")
        screen.type("hush-hush\r")
        assert screen.expect(f"key set in: {tmp_path}/.env\r\n") == "\r\n"
    assert (tmp_path / ".env").read_text() == "CEREBRUM_API_KEY=hush-hush\n"


def test_a_full_disk_loses_no_key(small_disk: Path) -> None:
    path = write(small_disk / ".env", "CEREBRUM_API_KEY=old\nanna key\n")
    fill(small_disk / "rest")
    for args in (["--write", str(path)], ["--client", "ben"], ["--revoke", "anna"]):
        code, out, err = keygen(*args, CEREBRUM_CM4_KEYS_FILE=str(path))
        assert (code, out, "No space left on device" in err) == (1, "", True)
        assert path.read_text() == "CEREBRUM_API_KEY=old\nanna key\n"
    assert sorted(os.listdir(small_disk)) == [".env", "rest"]


def test_a_key_is_on_no_command_line_and_on_the_disk_before_it_replaces_a_file(
    tmp_path: Path,
) -> None:
    env, credential, clients, log = (
        tmp_path / name for name in (".env", "CEREBRUM_API_KEY", "client-keys", "log")
    )
    (tmp_path / "bin").mkdir()
    for tool in ["base64", "chown", "head", "mktemp", "mv", "readlink", "rm", "sync", "tr"]:
        text = f'#!/bin/bash\n{{ echo "CALL {tool} $*"; env; }} >>{log}\nexec {shutil.which(tool)} "$@"\n'
        write(tmp_path / "bin" / tool, text).chmod(0o755)
    spied = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CEREBRUM_CM4_KEYS_FILE": str(clients)}
    assert keygen("--set", str(env), str(credential), stdin="the-old-key", **spied)[0] == 0
    assert keygen("--write", str(env), str(credential), **spied)[0] == 0
    for args in (["--client", "anna"], ["--client", "ben"], ["--revoke", "ben"]):
        assert keygen(*args, **spied)[0] == 0
    seen, (new, _, old) = log.read_text(), credential.read_text().strip().partition(",")
    assert (len(new), old) == (43, "the-old-key")
    assert env.read_text() == f"CEREBRUM_API_KEY={new},{old}\n"
    for key in (new, old, clients.read_text().split()[1]):
        assert key not in seen
    steps = re.findall(r"CALL (sync|mv) (?:-f )?-- (.+)", seen)
    assert [tool for tool, _ in steps] == ["sync", "mv", "mv", "sync", "sync"] * 2 + [
        "sync",
        "mv",
        "sync",
    ] * 3
    drafts = steps[0][1].split()
    assert [moved for _, moved in steps[1:3]] == [f"{drafts[0]} {env}", f"{drafts[1]} {credential}"]


def test_clients_get_keys_and_lose_them(tmp_path: Path) -> None:
    """The script with a daemon's settings beside it, and the file that they name behind a link."""
    script, file = tmp_path / Path(KEYGEN).name, tmp_path / "client-keys"
    shutil.copy(KEYGEN, script)
    settings = write(
        tmp_path / ".env", "CEREBRUM_CM4_PORT=7001\nCEREBRUM_CM4_TLS_CERT='/etc/pi.pem'\n"
    )
    owners = [1234, 1235] if os.geteuid() == 0 else [os.geteuid()] * 2
    os.chown(settings, owners[0], -1)
    (tmp_path / "etc").mkdir()
    file.symlink_to("etc/keys")
    run = partial(subprocess.run, capture_output=True, text=True, check=True)
    first, second = (run([script, "--client", *args]) for args in (["anna"], ["gast.2", "1"]))
    address, key, setting = first.stdout.splitlines()
    assert address == f"address: https://{os.uname().nodename}.local:7001"
    assert re.fullmatch("key:     [A-Za-z0-9_-]{43}", key)
    assert setting.startswith("setting: CEREBRUM_URL and CEREBRUM_CM4_API_KEY ")
    apply = "apply it:  sudo systemctl reload cerebrum-cm4\n"
    assert first.stderr == f"{file} is new: while it exists, all clients need a key\n{apply}"
    assert second.stderr == apply
    assert file.read_text() == f"anna {key.split()[1]}\ngast.2 {second.stdout.split()[3]} 1\n"
    assert (file.stat().st_uid, mode(file)) == (owners[0], 0o600)
    write(file, "# ours\n\n" + file.read_text().rstrip())
    os.chown(file, owners[1], -1)
    assert run([script, "--revoke", "gast.2"]).stderr == apply
    assert (file.read_text(), file.stat().st_uid) == (
        f"# ours\n\nanna {key.split()[1]}\n",
        owners[1],
    )
    assert (file.is_symlink(), os.listdir(tmp_path / "etc")) == (True, ["keys"])
    write(file, "\ufeffanna k1\r\nben k2\n")  # from an editor on Windows
    twice = subprocess.run([script, "--client", "anna"], capture_output=True, text=True)
    assert (twice.returncode, "anna has a key already" in twice.stderr) == (1, True)
    run([script, "--revoke", "anna"])
    assert file.read_text() == "ben k2\n"


@pytest.mark.parametrize(
    ("names", "host"),
    [
        ("DNS:*.lan,IP:10.0.0.7,DNS:pi.example.ts.net,DNS:other", "pi.example.ts.net"),
        ("DNS:other,DNS:{own}", "{own}"),
        ("IP:fd7a::1", "[FD7A:0:0:0:0:0:0:1]"),
        ("DNS:*.lan", "{own}"),
    ],
)
def test_the_address_for_a_client_is_one_of_the_certificate(
    names: str, host: str, tmp_path: Path
) -> None:
    own = f"{os.uname().nodename}.local"
    shutil.copy(KEYGEN, tmp_path)
    pem = certificate(tmp_path, "pi", names.format(own=own))["CEREBRUM_CM4_TLS_CERT"]
    write(tmp_path / ".env", f"CEREBRUM_CM4_TLS_CERT={pem}\n")
    command = [tmp_path / Path(KEYGEN).name, "--client", "anna"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == f"address: https://{host.format(own=own)}:7000"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file away")
def test_a_client_before_setup_gets_a_file_of_the_daemons_user(tmp_path: Path) -> None:
    """With stand-ins, as this machine need not have the user."""
    shutil.copy(KEYGEN, tmp_path)
    (tmp_path / ".env").symlink_to("gone/env")  # as in the package
    (tmp_path / "bin").mkdir()
    for tool in ("id", "chown"):
        write(tmp_path / "bin" / tool, f'#!/bin/bash\necho "{tool} $*" >>{tmp_path}/log\n').chmod(
            0o755
        )
    command = [str(tmp_path / Path(KEYGEN).name), "--client", "anna"]
    assert called(command, f"{tmp_path}/bin:{os.environ['PATH']}")[0] == 0
    calls = re.sub(r"client-keys\.\w+", "DRAFT", (tmp_path / "log").read_text())
    assert calls == f"id cerebrum\nchown cerebrum: -- {tmp_path}/DRAFT\n"


# ------------------------------------------------------------------------------------------- run.sh


def called(command: list[str], path: str) -> tuple[int, str, str]:
    result = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout, result.stderr


def program(path: Path, text: str) -> Path:
    """A script of bash in place of a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, f"#!/bin/bash\n{text}\n").chmod(0o755)
    return path


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    """Before anything is installed, with the Python of Debian 11."""
    old = "#!/bin/sh\ncase $1 in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n"
    write(tmp_path / "python3", old).chmod(0o755)
    said = "run.sh: expected Python 3.11 or newer, got Python 3.9.2\n"
    assert called([RUN, "setup"], f"{tmp_path}:{os.environ['PATH']}") == (1, "", said)


def test_make_deb_names_the_packages_that_it_lacks(tmp_path: Path) -> None:
    for tool in ("make", "sh", "dh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/true")
    status, _, err = called([str(tmp_path / "make"), "-C", str(ROOT), "deb"], str(tmp_path))
    said = "missing system packages; please run:  sudo apt-get install build-essential dh-python help2man"
    assert (status, err.splitlines()[0]) == (2, said)


@pytest.mark.parametrize(
    ("lacks", "signal", "times"),
    [("python", "", 1), ("llama_cpp", "", 1), ("decode", "ILL", 1), ("decode", "KILL", 0)],
)
def test_a_venv_of_another_python_or_cpu_is_made_anew(
    lacks: str, signal: str, times: int, tmp_path: Path
) -> None:
    """Each Python is a script that records its arguments. The old one lacks something, perhaps only
    memory, so that the kernel kills it. The new one works.
    """
    write(tmp_path / "run.sh", Path(RUN).read_bytes())
    venv, bin, log = tmp_path / ".venv", tmp_path / "bin", tmp_path / "log"
    dies = f"kill -{signal} $$" if signal else "exit 1"
    old = f"#!/bin/sh\necho old $* >>{log}\ncase $* in *{lacks}*) {dies} ;; esac\n"
    clear = f"rm -r {venv}; mkdir -p {venv}/bin; cp $0 {venv}/bin/python"
    make = f"#!/bin/sh\necho new $* >>{log}\ncase $* in *--clear*) {clear} ;; esac\n"
    for path, text in (
        (venv / "bin/python", old),
        (bin / "python3", make),
        (venv / "installed-run.txt", ""),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, text).chmod(0o755)
    if lacks == "python":
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to(tmp_path / "gone")
    status, _, err = called(
        ["bash", str(tmp_path / "run.sh"), "setup"], f"{bin}:{os.environ['PATH']}"
    )
    assert (status, "Illegal" in err) == (0, False), err
    assert (venv / "installed-run.txt").exists()
    calls = log.read_text()
    once = ("new -m venv --clear .venv\n", "new -m pip cache remove llama_cpp_python\n")
    assert [calls.count(one) for one in once] == [times, times]
    assert ("\nnew -m pip install " in calls) == (times > 0)


def test_settings_are_those_that_the_daemons_read(tmp_path: Path) -> None:
    """The daemons are scripts that log what they get."""
    log, socket_ = tmp_path / "log", socket.socket()
    socket_.bind(("127.0.0.1", 0))  # nobody listens there
    port = socket_.getsockname()[1]
    for name in ("run.sh", "cerebrum", "cerebrum_common.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    settings = f"CEREBRUM_VPS_PORT=\"{port}\"\n export  CEREBRUM_CM4_PORT='{port}' \nCEREBRUM_CM4_HOST='0.0.0.0'\n"
    write(tmp_path / ".env", f'{settings}export CEREBRUM_API_KEY="k"\n')
    logs = (
        f'{{ echo "${{@: -1}} $CEREBRUM_VPS_PORT $CEREBRUM_CM4_PORT $CEREBRUM_CM4_HOST"; }} >>{log}'
    )
    serves = "echo listening on http://0.0.0.0:7; exec sleep 600"
    real = f'exec {sys.executable} "$@"'
    daemon = f"{logs}; {serves}"
    program(
        tmp_path / ".venv/bin/python",
        f"case $* in *settings*) {real} ;; *vpsd.py | *cm4d.py) {daemon} ;; esac",
    )
    write(tmp_path / ".venv/installed-run.txt", "")
    for tool, does in (
        ("bin/curl", f"echo ${{@: -1}} >>{log}"),
        ("generate_api_key.sh", f"echo a new key >>{log}"),
    ):
        program(tmp_path / tool, does)
    program(tmp_path / "cerebrum_repl.sh", "echo pass")
    status, out, err = called(
        ["bash", str(tmp_path / "run.sh")], f"{tmp_path}/bin:{os.environ['PATH']}"
    )
    socket_.close()
    assert (status, out) == (0, "pass\n\n"), err
    assert (
        log.read_text() == f"vpsd.py {port}  \ncm4d.py  {port} 0.0.0.0\nhttp://127.0.0.1:7/health\n"
    )


def killed_build(command: list[str], log: Path, env: dict[str, str]) -> Path:
    """The folder that pip, a script of `builds`, had made when all of it got SIGTERM."""
    with subprocess.Popen(
        command, env=env, start_new_session=True, stderr=subprocess.DEVNULL
    ) as process:
        tree = Path(wait_until(lambda: log.exists() and log.read_text().strip(), "pip builds"))
        assert tree.is_dir()
        os.killpg(process.pid, signal.SIGTERM)
    return tree


def builds(log: Path) -> str:
    return f"mktemp -d >{log}.part; mv {log}.part {log}; exec sleep 600"


def test_a_build_that_is_killed_leaves_nothing_in_the_temporary_folder(tmp_path: Path) -> None:
    log, temporary = tmp_path / "log", tmp_path / "tmp"
    temporary.mkdir()
    write(tmp_path / "run.sh", Path(RUN).read_bytes())
    program(
        tmp_path / ".venv/bin/python",
        f"case $* in *pip\\ install*) {builds(log)} ;; '- run') echo llama ;; esac",
    )
    command = ["bash", str(tmp_path / "run.sh"), "setup"]
    tree = killed_build(command, log, os.environ | {"TMPDIR": str(temporary)})
    assert (tree.parent.exists(), os.listdir(temporary)) == (False, [])


# ----------------------------------------------------------------------------------------- setup.sh


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set up a daemon")


def installed(name: str, folder: Path) -> Path:
    """The package's command, with all paths below a folder."""
    for part in ("run/systemd/system", "etc/credstore", f"etc/{name}", f"usr/lib/{name}"):
        (folder / part).mkdir(parents=True)
    for tool, does in (
        ("runuser", 'shift 3; exec "$@"'),
        ("systemctl", ""),
        ("chown", ""),
    ):  # stand-ins
        program(folder / "bin" / tool, f'echo "{tool} $*" >>{folder}/log\n{does}')
    text = re.sub(
        "(?<=[ =])/(etc|run|usr/lib|opt|var)/",
        rf"{folder}/\1/",
        (ROOT / "systemd/setup.sh").read_text(),
    )
    script = write(folder / "bin" / name, text.replace(" -o cerebrum -g cerebrum", ""))
    script.chmod(0o755)
    return script


# Stands for the environment's Python. FOLDER has the models, and what each command of vpsd.py
# prints.
PYTHON = """
[[ $1 != -c ]] || exit 0
echo "vpsd ${*:3}; nice $(nice), $(</proc/self/oom_score_adj)" >>FOLDER/log
[[ ! -e FOLDER/$3-fails ]] || exit 3
case $3 in
	memory) cat FOLDER/"memory-$(ls FOLDER/models)" ;;
	fetch) touch FOLDER/models/tiny.gguf ;;
	*) cat FOLDER/"$3" 2>/dev/null || true ;;
esac
"""
ENTRY = '[[models]]\nid = "{0}"\nname = "M"\nparameters = "1B"\nquantization = "Q4"\nfile = "{0}.gguf"\n'


class Vps:
    """A backend's machine below a folder, whose commands are stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.script, self.folder, self.log = (
            installed("cerebrum-backend", folder),
            folder,
            folder / "log",
        )
        self.limit = folder / "etc/systemd/system/cerebrum-backend.service.d/memory.conf"
        shutil.copy(KEYGEN, folder / "usr/lib/cerebrum-backend")
        does = {
            "systemctl": "[[ $* != *MemoryCurrent* ]] || cat FOLDER/used",
            "systemd-run": "",
            "tailscale": "",
        }
        scripts = {
            f"bin/{tool}": f'echo "{tool} $*" >>FOLDER/log\n{text}' for tool, text in does.items()
        }
        for name, text in (scripts | {"opt/cerebrum-backend/venv/bin/python": PYTHON}).items():
            program(folder / name, text.replace("FOLDER", str(folder)))
        (folder / "models").mkdir()
        self.say(used="[not set]\n")

    def say(self, **texts: str) -> None:
        """What the commands of vpsd.py print; the memory that the daemon uses."""
        for name, text in texts.items():
            write(self.folder / name, text)

    def run(self, command: str, typed: str = "") -> tuple[int, list[str]]:
        """The exit status of `cerebrum-backend`, and the lines that it prints."""
        write(self.log, "")
        env = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"}
        given = {"env": env, "input": typed, "text": True, "timeout": PATIENCE}
        done = subprocess.run([self.script, *command.split()], stdout=subprocess.PIPE, **given)
        return done.returncode, done.stdout.splitlines()

    def called(self, pattern: str) -> list[str]:
        return re.findall(f"^{pattern}", self.log.read_text(), re.M)


@pytest.fixture
def vps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Vps:
    """Its `vpsd.py memory` prints what the real one does, without a model and with one."""
    if os.geteuid() != 0:
        pytest.skip("only root may set up a daemon")
    catalog, vps = (
        write(tmp_path / "models.toml", ENTRY.format("large") + ENTRY.format("tiny")),
        Vps(tmp_path / "vps"),
    )
    for name, value in {
        "MODELS_DIR": tmp_path,
        "MODELS_FILE": catalog,
        "STATE_DIR": tmp_path / "state",
    }.items():
        monkeypatch.setenv(f"CEREBRUM_{name}", str(value))
    for name in ("", "tiny.gguf"):
        if name:
            families.make(tmp_path / name, families.FAMILIES["dense"])
        assert vpsd.main(["memory"]) == 0
        vps.say(**{f"memory-{name}": capsys.readouterr().out})
    return vps


def test_where_nothing_can_be_measured_the_smallest_model_is_offered(vps: Vps) -> None:
    """If there is no model in the end, the last line says so."""
    vps.say(**{"choose-fails": "", "fetch-fails": ""})
    status, said = vps.run("setup", typed="large\n")
    assert (status, vps.called("vpsd fetch [^;]*"), vps.called("systemctl restart")) == (
        1, ["vpsd fetch large"], ["systemctl restart"]
    )  # fmt: skip
    assert (
        said[-1]
        == "FAIL  models    not fetched: large; to try again:  sudo cerebrum-backend setup "
        "--model ID"
    )
    (vps.folder / "fetch-fails").unlink()
    status, said = vps.run("setup", typed="\n")
    assert (status, vps.called("vpsd fetch [^;]*")) == (0, ["vpsd fetch tiny"])
    assert "no speed is known; the smallest model is tiny" in said
    assert said[-1].startswith("http://127.0.0.1:9000 ")


def test_commands_give_way_to_the_daemon(vps: Vps) -> None:
    assert vps.run("setup --model tiny")[0] == 0
    assert {"fetch tiny; nice 19, 1000", "memory; nice 19, 1000"} <= set(vps.called("vpsd (.*)"))
    assert len(vps.called("vpsd ")) == len(vps.called("vpsd .* nice 19, 1000$"))


@pytest.mark.parametrize("command", ["fetch tiny", "choose --fetch", "tune tiny"])
def test_the_limit_of_memory_follows_the_models(vps: Vps, command: str) -> None:
    assert vps.run("setup --model tiny")[0] == 0

    def change(memory_mb: int, used_mb: int = 0) -> tuple[str, bool]:
        """Make the command change the models: the limit, and whether systemd reads it at once."""
        vps.say(
            **{"memory-tiny.gguf": f"{memory_mb}\n# tiny: 264 MB\n", "used": f"{used_mb << 20}\n"}
        )
        assert vps.run(command)[0] == 0
        return vps.limit.read_text().splitlines()[-1], vps.called("systemctl daemon-reload") != []

    assert change(5000) == ("MemoryMax=5000M", True)
    assert change(5000) == ("MemoryMax=5000M", False)
    assert change(3000, used_mb=3001) == (
        "MemoryMax=3000M",
        False,
    )  # at once it would kill the daemon
    assert change(3001, used_mb=3001) == ("MemoryMax=3001M", True)
    write(vps.limit, "[Service]\nMemoryMax=1G\n")
    assert change(4000) == ("MemoryMax=1G", False)  # a person's
    vps.say(**{f"{command.split()[0]}-fails": ""})
    assert vps.run(command)[0] == 3


@pytest.mark.parametrize("changes", [False, True])
def test_a_tuning_that_changes_nothing_restarts_nothing(vps: Vps, changes: bool) -> None:
    write(vps.folder / "models/tiny.gguf", "")
    assert "# tiny: " in (vps.folder / "memory-tiny.gguf").read_text()
    used = "tiny: used from its next load on; python3 vpsd.py tune tiny --remove goes back\n"
    assert used[6:31] in inspect.getsource(vpsd.tune_command)
    vps.say(tune="the table\n" + used * changes)
    assert vps.run("build") == (0, ["the table", *[used.strip()] * changes])
    assert vps.called("vpsd tune [^;]*") == ["vpsd tune tiny"]
    assert vps.called("systemctl try-restart") == ["systemctl try-restart"] * changes


@needs_root
def test_the_pi_is_set_up_by_one_line_that_the_backend_takes(tmp_path: Path) -> None:
    """With all paths below a folder. Whatever the backend does not take changes nothing."""
    script, log, library = (
        installed("cerebrum-cm4", tmp_path),
        tmp_path / "log",
        tmp_path / "usr/lib/cerebrum-cm4",
    )
    given = 'os.environ["CEREBRUM_VPS_URL"], open(os.environ["CREDENTIALS_DIRECTORY"] + "/CEREBRUM_API_KEY").read()'
    write(
        library / "cm4d.py", f'import os\nassert ({given}) == ("http://vps:9000", "the-key\\n")\n'
    )
    shutil.copy(KEYGEN, library)
    settings, key = tmp_path / "etc/cerebrum-cm4/env", tmp_path / "etc/credstore/CEREBRUM_API_KEY"
    write(settings, "A=1\nCEREBRUM_VPS_URL=http://old:9000\n")
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def setup(typed: str) -> tuple[int, bool]:
        """The exit status, and whether the daemon was restarted."""
        write(log, "")
        status = subprocess.run(
            [script, "setup"], env=env, input=typed, text=True, capture_output=True
        ).returncode
        assert ("-key" in log.read_text(), os.listdir(tmp_path / "run")) == (False, ["systemd"])
        return status, "systemctl restart cerebrum-cm4.service" in log.read_text()

    for refused in (
        "http://vps:9000 another-key\n",
        "http://other:9000 the-key\n",
        "ftp://vps the-key\n",
    ):
        assert setup(refused) == (1, False)
        assert (settings.read_text(), key.exists()) == (
            "A=1\nCEREBRUM_VPS_URL=http://old:9000\n",
            False,
        )
    for typed in ("http://vps:9000 the-key\n", "\n\n"):  # an empty answer keeps what is set
        assert setup(typed) == (0, True)
        assert "runuser -u cerebrum -- " in log.read_text()  # root runs none of its files
        assert (settings.read_text(), key.read_text()) == (
            "A=1\nCEREBRUM_VPS_URL=http://vps:9000\n",
            "the-key\n",
        )
        assert (mode(settings), mode(key), mode(key.parent)) == (0o600, 0o600, 0o700)
        write(settings, "A=1\nCEREBRUM_VPS_URL=http://vps:9000 the-key\n")  # the line, pasted whole


@needs_root
def test_an_installation_by_hand_is_taken_over_however_its_paths_are_written(
    tmp_path: Path,
) -> None:
    script, old = installed("cerebrum-backend", tmp_path), tmp_path / "opt/cerebrum-backend"
    (old / "models").mkdir(parents=True)
    for file in (
        old / "vpsd.py",
        old / "models/a.gguf",
        tmp_path / "usr/lib/cerebrum-backend/models.toml",
    ):
        write(file, "")
    lines = 'A={0}\nB="{0}"\nC=\'{0}/\' \r\nD={0}-mine\nE="{0}/mine"\n'
    write(old / ".env", lines.format(old / "models"))
    status, _, err = called([str(script), "configure"], f"{tmp_path}/bin:{os.environ['PATH']}")
    new = tmp_path / "var/lib/cerebrum-backend/models"
    assert (status, os.listdir(new)) == (0, ["a.gguf"]), err
    kept = lines.replace("{0}-", f"{old}/models-").replace("{0}/m", f"{old}/models/m").format(new)
    assert (tmp_path / "etc/cerebrum-backend/env").read_bytes() == kept.encode()


@needs_root
@pytest.mark.parametrize("setting", ["", "CEREBRUM_STATE_DIR=/data"])
def test_the_commands_use_the_daemons_state(setting: str, tmp_path: Path) -> None:
    script, library = installed("cerebrum-backend", tmp_path), tmp_path / "usr/lib/cerebrum-backend"
    program(tmp_path / "opt/cerebrum-backend/venv/bin/python", f'exec {sys.executable} "$@"')
    write(library / ".env", setting)
    reads = "vpsd.load_config(vpsd.read_environment(os.environ, Path(__file__).parent)).engine.state_dir"
    imports = (
        f"import os, sys\nfrom pathlib import Path\nsys.path[0] = {str(ROOT)!r}\nimport vpsd\n"
    )
    write(library / "vpsd.py", f"{imports}print({reads})\n")
    env = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    printed = subprocess.run(
        [script, "memory"], env=env, text=True, stdout=subprocess.PIPE, check=True
    ).stdout
    assert printed.strip() == (
        setting.partition("=")[2] or f"{tmp_path}/var/lib/cerebrum"
    )  # systemd's default


@needs_root
def test_a_build_of_the_package_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    script, log = installed("cerebrum-backend", tmp_path), tmp_path / "tree"
    python = tmp_path / "opt/cerebrum-backend/venv/bin/python"
    program(python, f"case $* in *pip\\ install*) {builds(log)} ;; *gguf) exit 1 ;; esac")
    tree = killed_build(
        [str(script), "build"], log, {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    )
    assert str(tree).startswith(f"{tmp_path}/var/")
    assert os.listdir(tmp_path / "var/lib/cerebrum-backend/cache") == []
