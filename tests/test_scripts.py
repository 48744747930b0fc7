"""The shell scripts, run as a person runs them: with real bash, curl, python3 and a terminal.

The server is scripted in this process: each test states what it answers and checks what it was asked. A test waits
for output or for an event of the server, until a deadline; it never sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
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

import pytest
from harness import PATIENCE, ROOT
from scripted import HANG, Backend, answer, error, event, head, in_a_thread, token

from cerebrum.text.languages import LANGUAGES

REPL = str(ROOT / "cerebrum_repl.sh")
KEYGEN = str(ROOT / "generate_api_key.sh")
RUN = str(ROOT / "run.sh")

# ------------------------------------------------------------------------------------------- backend


Script = list[Any]  # of the steps that `Backend` knows


def tokens(*texts: str) -> Script:
    return [token(text, number) for number, text in enumerate(texts, 1)]


def done(**fields: Any) -> bytes:
    usual = {"language": "python", "model": "tiny", "total_tokens": 3, "inference_time": 1.234}
    return event(**({"done": True, "timestamp": "t", "finish_reason": "block"} | usual | fields))


def completion(*texts: str, **fields: Any) -> Script:
    return [head(), *tokens(*texts), done(**fields)]


def page(status: int, kind: str, body: bytes) -> bytes:
    """A response that is no stream."""
    return head(status, f"Content-Length: {len(body)}", kind=kind) + body


def wait_for(event: threading.Event) -> Callable[[], Awaitable[None]]:
    """A step that ends when the test sets the event."""

    async def step() -> None:
        assert await asyncio.to_thread(event.wait, PATIENCE)

    return step


@pytest.fixture
def backend() -> Iterator[Backend]:
    """A Pi whose scripts the test adds. Each of them must be used once."""
    endings = [{"id": id, "endings": one.endings, "filenames": one.filenames} for id, one in LANGUAGES.items()]
    with in_a_thread(Backend(scripts=[], models=answer(200, {"models": [], "languages": endings}))) as backend:
        yield backend
    assert len(backend.completions) == len(backend.scripts)


@pytest.fixture
def env(backend: Backend, tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has nothing but the programs that the REPL needs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash curl cat cmp diff grep head mkdir mktemp rm sed stty tail touch tr wc"
    for tool in needed.split():
        found = shutil.which(tool)
        assert found, tool
        (tools / tool).symlink_to(os.path.realpath(found))
    (tools / "python3").symlink_to(os.path.realpath(sys.executable))
    home = tmp_path / "home"
    home.mkdir()
    return {
        "PATH": str(tools),
        "HOME": str(home),
        "TMPDIR": str(tmp_path),
        "LANG": "C.UTF-8",
        "TERM": "xterm",
        "CEREBRUM_URL": f"http://127.0.0.1:{backend.port}",
    }


def run(env: dict[str, str], stdin: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([REPL, *args], env=env, input=stdin, capture_output=True, timeout=PATIENCE, check=False)


# -------------------------------------------------------------------------------------------- filter

AWKWARD = ["%s%d", "\\n", "\\", "\n", "  two  ", "\t", "é€😀", "a\0b", "\x1b[31m", "-n", "", "'\"`$x", "\r", "\\0134"]


def test_the_filter_prints_the_completion_byte_for_byte(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion(*AWKWARD))
    result = run(env, b"def f(\n", "-")
    assert (result.returncode, result.stdout, result.stderr) == (0, "".join(AWKWARD).encode(), b"")
    assert "x-api-key" not in backend.asked[0][1]


def announce(env: dict[str, str], port: int, *others: str) -> None:
    """Let avahi-browse tell of a Pi on each of its networks, before and after it has an address."""
    name = "Cerebrum\\032on\\032pi;_cerebrum._tcp;local"
    lines = [f"+;eth0;IPv4;{name}", f"=;eth0;IPv6;{name};pi.local;fe80::1;{port};"]
    lines += [f"=;{network};IPv4;{name};pi.local;127.0.0.1;{port};" for network in ("eth0", "wlan0")]
    lines += [f'=;eth0;IPv4;{name};{other};"a=b"' for other in others]
    tool = Path(env["PATH"], "avahi-browse")
    tool.with_name("found").write_text("\n".join(lines) + "\n")
    tool.write_text(f"#!/bin/bash\n[[ $* == '-prt _cerebrum._tcp' ]] && cat {tool.with_name('found')}")
    tool.chmod(0o755)
    del env["CEREBRUM_URL"]


@pytest.mark.parametrize("others", [[], ["desk.local;192.0.2.8;7001"]])
def test_the_pi_is_found_if_it_is_the_only_one(env: dict[str, str], backend: Backend, others: list[str]) -> None:
    backend.scripts.extend([completion("x")] * (not others))
    announce(env, backend.port, *others)
    result = run(env, b"x", "-")
    if others:
        assert result.returncode == 1
        said = result.stderr.decode().splitlines()[0]
        assert {f"127.0.0.1:{backend.port}", "192.0.2.8:7001;"} < set(said.split())
    else:
        assert (result.returncode, result.stdout, result.stderr) == (0, b"x", b"")


def test_a_pi_that_was_found_gets_no_key_unasked(
    env: dict[str, str], backend: Backend, terminal: Callable[..., Terminal]
) -> None:
    announce(env, backend.port)
    env["CEREBRUM_CM4_API_KEY"] = "se cret"
    found = f"127.0.0.1:{backend.port}"
    refusal = (
        f"cerebrum_repl.sh: the key is not sent to {found}, which Avahi found; if that is your Pi: --url http://{found}"
    )
    result = run(env, b"x", "-")
    assert (result.returncode, result.stdout, result.stderr.decode()) == (1, b"", refusal + "\n")
    for reply, said in (("\r", refusal), ("y\r", "Type :help for the commands.")):
        screen = terminal()
        screen.expect(f"Send the key to {found}, which Avahi found? [y/N] ")
        screen.type(reply)
        screen.expect(said)
    assert backend.asked == []
    backend.scripts += [completion("x")] * 2
    screen.enter("def f():")
    screen.expect("block]")
    assert run(env, b"x", "--url", f"http://{found}", "-").returncode == 0
    assert [headers["x-api-key"] for _, headers, _ in backend.asked] == ["se cret"] * 2


def test_raw_utf8_and_crlf_events_and_comments(env: dict[str, str], backend: Backend) -> None:
    crlf = b': keep-alive\r\n\r\ndata: {"token": "\xc3\xa9", "total_tokens": 1}\r\n\r\n'
    backend.scripts.append([head(), crlf, b'data:{"token": "x"}\n\nevent: other\nid: 1\n\n', done()])
    result = run(env, b"x", "-")
    assert (result.returncode, result.stdout, result.stderr) == (0, "éx".encode(), b"")


def test_the_request(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("x"))
    prompt = 'a "quoted" \\ $(rm) é\n\tb\n'
    options = ["-l", "go", "-n", "7", "-t", ".5", "-m", "tiny", "-"]
    result = run(env | {"CEREBRUM_CM4_API_KEY": "se cret"}, prompt.encode() + b"\n", *options)
    assert result.returncode == 0
    ((line, headers, _),) = backend.asked
    (body,) = backend.completions
    assert line == "POST /v1/complete/stream HTTP/1.1"
    assert headers["content-type"] == "application/json"
    assert headers["x-api-key"] == "se cret"
    assert body == {
        "prompt": prompt, "mode": "auto", "language": "go", "model": "tiny",
        "max_tokens": 7, "temperature": 0.5, "progress": True,
    }  # fmt: skip


def test_the_key_is_on_no_command_line(env: dict[str, str], backend: Backend) -> None:
    seen: list[bytes] = []

    def read_command_lines() -> None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                seen.append(process.read_bytes())

    backend.scripts.append([read_command_lines, *completion("x")])
    assert run(env | {"CEREBRUM_CM4_API_KEY": "hush-hush"}, b"x", "-").returncode == 0
    assert any(b"/v1/complete/stream" in line for line in seen)
    assert not any(b"hush-hush" in line for line in seen)


def test_each_token_is_printed_before_the_next_one_is_made(env: dict[str, str], backend: Backend) -> None:
    printed = [threading.Event() for _ in range(3)]

    steps = [step for number, event in enumerate(printed) for step in (token(str(number), number + 1), wait_for(event))]
    backend.scripts.append([head(), *steps, done()])
    with subprocess.Popen([REPL, "-"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for number, event in enumerate(printed):
            assert os.read(process.stdout.fileno(), 100) == str(number).encode()
            event.set()
        assert process.wait(PATIENCE) == 0


def test_one_decoder_for_the_whole_stream(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    tool = tmp_path / "tools/python3"
    real, log = os.readlink(tool), tmp_path / "starts"
    tool.unlink()
    tool.write_text(f'#!{env["PATH"]}/bash\necho >>{log}\nexec {real} "$@"\n')
    tool.chmod(0o755)
    backend.scripts.append(completion(*["x"] * 500))
    assert run(env, b"x", "-").stdout == b"x" * 500
    assert log.read_text() == "\n\n"  # one builds the request, one decodes


SAID_BY_OURS = "INVALID_REQUEST: No 100%\nsuch [1mlanguage"
OURS = json.dumps(
    {"error": True, "message": "No 100%\nsuch \x1b[1mlanguage", "code": "INVALID_REQUEST", "timestamp": "t"}
)


BROKEN_OFF = [head(), *tokens("half")]
CUT_IN_A_CHUNK = [head(200, "Transfer-Encoding: chunked"), b'1c\r\ndata: {"token": "half"}\n\n   \r\nff\r\n']
FAILED_MIDWAY = [*BROKEN_OFF, event(error=True, message="backend died", code="VPS_UNAVAILABLE")]
NO_EVENT = "expected an event of Cerebrum, got something else"
FAILURES: list[tuple[str, Script, str, str]] = [
    ("error event", FAILED_MIDWAY, "half", "VPS_UNAVAILABLE: backend died"),
    ("no done", BROKEN_OFF, "half", "the stream broke off before its end"),
    ("cut in a chunk", CUT_IN_A_CHUNK, "half", "the stream broke off before its end"),
    ("our JSON error", [page(400, "application/json", OURS.encode())], "", SAID_BY_OURS),
    ("HTML", [page(502, "text/html", b"<html>\n<h1>Bad</h1>\n")], "", "HTTP 502 from {url}"),
    ("other JSON", [page(404, "application/json", b'{"detail":"x"}')], "", "HTTP 404 from {url}"),
    ("not JSON", [*BROKEN_OFF, b"data: {nonsense\n\n"], "half", NO_EVENT),
    ("not an object", [*BROKEN_OFF, b"data: [1]\n\n"], "half", NO_EVENT),
    ("token of another type", [*BROKEN_OFF, b'data: {"token": 7}\n\n'], "half", NO_EVENT),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "stdout", "stderr"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
def test_what_goes_wrong_is_said_and_exits_with_1(
    env: dict[str, str], backend: Backend, script: Script, stdout: str, stderr: str
) -> None:
    backend.scripts.append(script)
    result = run(env, b"x", "-")
    said = f"cerebrum_repl.sh: {stderr.format(url=env['CEREBRUM_URL'])}\n"
    assert (result.returncode, result.stdout.decode(), result.stderr.decode()) == (1, stdout, said)


def test_nobody_listens(env: dict[str, str]) -> None:
    result = run(env, b"x", "--url", "http://127.0.0.1:1/", "-")
    assert (result.returncode, result.stdout) == (1, b"")
    assert re.fullmatch(rb"cerebrum_repl.sh: curl: \(7\) Failed to connect to 127.0.0.1 port 1 .*\n", result.stderr)


USAGE = [
    (["-n"], "-n needs a value; see --help"),
    (["-n", "0", "-"], "tokens: expected a whole number from 1 to 2048, got 0"),
    (["-n", "2049", "-"], "tokens: expected a whole number from 1 to 2048, got 2049"),
    (["-n", "a[$(id)]", "-"], "tokens: expected a whole number from 1 to 2048, got a[$(id)]"),
    (["-t", "1.1", "-"], "temperature: expected a number from 0 to 1, got 1.1"),
    (["-t", "1e0", "-"], "temperature: expected a number from 0 to 1, got 1e0"),
    (["file.py"], "unknown argument file.py; see --help"),
]


@pytest.mark.parametrize(("args", "said"), USAGE)
def test_a_wrong_call_exits_with_2(args: list[str], said: str) -> None:
    result = subprocess.run([REPL, *args], input=b"", capture_output=True, timeout=PATIENCE, check=False)
    assert (result.returncode, result.stdout, result.stderr.decode()) == (2, b"", f"cerebrum_repl.sh: {said}\n")


# -------------------------------------------------------------------------------------- conversation


def converse(env: dict[str, str], *lines: str) -> tuple[str, str]:
    """The stdout and stderr of the REPL with these lines as its stdin."""
    result = run(env, "".join(line + "\n" for line in lines).encode())
    assert result.returncode == 0
    return result.stdout.decode(), result.stderr.decode()


def test_settings_reach_the_request(env: dict[str, str], backend: Backend) -> None:
    backend.scripts += [completion("x"), completion("y")]
    converse(env, ":lang rust", ":model tiny", ":tokens 9", ":temp 0", "fn f", ":model auto", ":temp 1.0", "fn g")
    first, second = backend.completions
    assert first == {
        "prompt": "fn f", "mode": "auto", "language": "rust", "model": "tiny",
        "max_tokens": 9, "temperature": 0, "progress": True,
    }  # fmt: skip
    assert second == {
        "prompt": "fn g", "mode": "auto", "language": "rust",
        "max_tokens": 9, "temperature": 1.0, "progress": True,
    }  # fmt: skip


def test_a_completion_is_summed_up_and_an_error_does_not_end_the_conversation(
    env: dict[str, str], backend: Backend
) -> None:
    backend.scripts += [FAILED_MIDWAY, completion("\n    return ", "1")]
    out, err = converse(env, "a", "    def f():")
    assert out == "half\n\n    return 1\n[3 tokens in 1.2 s, tiny, block]\n"
    assert err == "cerebrum_repl.sh: VPS_UNAVAILABLE: backend died\n"
    assert backend.completions[1]["prompt"] == "    def f():"


def test_several_lines(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("x"))
    converse(env, ":multi", "def f():", "", "    :help", ":done")
    assert backend.completions[0]["prompt"] == "def f():\n\n    :help"


def test_commands_that_ask_nothing(env: dict[str, str], backend: Backend) -> None:
    unusable = [":last", ":write", ":save", ":do it", ":nonsense", "", "   "]
    out, err = converse(env, ":lang go", ":tokens", ":temp", *unusable, ":exit", "never")
    assert out == "language: go\ntokens: 512\ntemperature: 0.4\n"
    assert err.splitlines() == [
        "cerebrum_repl.sh: there is no result yet",
        "cerebrum_repl.sh: the last result belongs to no file; save it by :save PATH",
        "cerebrum_repl.sh: expected :save PATH",
        "cerebrum_repl.sh: expected :do INSTRUCTION after a completion, or :do @PATH INSTRUCTION",
        "cerebrum_repl.sh: no such command: :nonsense; see :help",
    ]
    assert backend.asked == []


LISTED = {
    "models": [
        {"id": "small", "name": "S", "languages": ["c"], "parameters": "0.5B", "available": True, "loaded": True,
         "memory_mb": 1288.6, "n_ctx": 4096},
        {"id": "middle", "name": "M", "languages": ["c"], "parameters": "1.5B", "available": True, "loaded": False},
        {"id": "large", "name": "L", "languages": ["go"], "parameters": "7B", "available": False},
    ],
    "languages": [{"id": "lua", "endings": [".lua"], "filenames": [], "served": False}],
    "prefer": {"infill": ["middle"], "instruct": ["large", "middle"]},
    "object": "list",
    "data": [],
}  # fmt: skip


def test_the_models_and_their_state(env: dict[str, str], backend: Backend) -> None:
    backend.models = answer(200, LISTED)
    out, err = converse(env, ":model", ":model middle", ":model")
    lines = [
        "  small   loaded, 1289 MB  0.5B",
        "  middle  on the VPS       1.5B",
        "  large   not there        7B",
        "preferred for infill: middle",
        "preferred for instruct: large, middle",
        "model: auto",
    ]
    chosen = [lines[0], "*" + lines[1][1:], *lines[2:5], "model: middle"]
    assert (out.splitlines(), err) == ([*lines, "model: middle", *chosen], "")
    assert [line for line, _, _ in backend.asked] == ["GET /v1/models HTTP/1.1"] * 2


LESS: list[tuple[dict[str, Any], str]] = [  # an answer that tells less, what is shown
    ({"models": [{"id": "a"}, {"id": "b", "available": False}]}, "  a  on the VPS\n  b  not there\nmodel: auto\n"),
    ({"models": [{"id": "a", "loaded": True}]}, "  a  loaded\nmodel: auto\n"),
    ({"models": []}, "model: auto\n"),
    ({"models": [{"id": "a", "available": False}], "vps_available": False},
     "  a  unknown\nthe VPS cannot be reached\nmodel: auto\n"),
]  # fmt: skip


@pytest.mark.parametrize(("listed", "shown"), LESS)
def test_models_of_which_less_is_told(
    env: dict[str, str], backend: Backend, listed: dict[str, Any], shown: str
) -> None:
    backend.models = answer(200, listed)
    assert converse(env, ":model") == (shown, "")


def test_the_languages_that_are_served(env: dict[str, str], backend: Backend) -> None:
    models = [{"id": "a", "languages": ["rust", "typescript"]}, {"id": "b", "languages": ["c", "cpp", "go", "rust"]}]
    backend.models = answer(200, {**LISTED, "models": models})
    out, err = converse(env, ":lang", ":lang go")
    assert (out.splitlines(), err) == (["c cpp go rust typescript", "language: python", "language: go"], "")


REFUSAL = error(401, "UNAUTHORIZED", "expected\x1b[1m a key")
LISTLESS = [  # what the server answers to each list, what is said of /v1/models
    (REFUSAL, "UNAUTHORIZED: expected[1m a key"),
    (page(200, "text/html", b"<html>"), "{url}/v1/models: expected an answer of Cerebrum, got something else"),
    (b"", "curl: (52) Empty reply from server"),
]


@pytest.mark.parametrize(("answered", "said"), LISTLESS, ids=[row[1] for row in LISTLESS])
def test_a_list_that_is_not_there(env: dict[str, str], backend: Backend, answered: bytes, said: str) -> None:
    backend.models = backend.stats = answered
    one = f"cerebrum_repl.sh: {said.format(url=env['CEREBRUM_URL'])}\n"
    told = "language: python\nmodel: auto\n"  # even without an answer
    assert converse(env, ":lang", ":model", ":stats") == (told, one * 2 + one.replace("models", "stats"))


def test_stats(env: dict[str, str], backend: Backend) -> None:
    stats = {"uptime": 1.5, "vps_available": True, "load_avg": [0.5, 1], "backends": [{"id": "attic"}], "host": "pi"}
    backend.stats = answer(200, stats)
    out, err = converse(env, ":stats")
    assert err == ""
    assert out.splitlines() == [
        "uptime                   1.5",
        "vps_available            true",
        "load_avg                 [0.5, 1]",
        "host                     pi",
        'backend attic            {"id": "attic"}',
    ]
    assert [line for line, _, _ in backend.asked] == ["GET /v1/stats HTTP/1.1"]


def test_last_and_save(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    saved, taken = tmp_path / "out.py", tmp_path / "taken.py"
    taken.write_text("mine\n")
    backend.scripts.append(completion("\n    return '\\n'  \n\n"))
    out, err = converse(env, "def f():", ":last", f":save {saved}", f":save {taken}", f":save! {taken}")
    whole = "def f():\n    return '\\n'  \n\n"
    assert out.split("block]\n")[1] == f"{whole}saved {saved}\nsaved {taken}\n"
    assert err == f"cerebrum_repl.sh: {taken} exists; :save! {taken} replaces it\n"
    assert saved.read_text() == taken.read_text() == whole


# --------------------------------------------------------------------------------------------- files


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two files, of two languages."""
    a, b = tmp_path / "a.py", tmp_path / "b.rs"
    a.write_text("a\n")
    b.write_text("b\n")
    return a, b


def test_a_file_is_completed_at_its_end(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "a file.rs"
    path.write_bytes(b"fn f() {\r\n\t// \xc3\xa9\n")
    path.chmod(0o640)
    backend.scripts.append(completion("}\n"))
    out, err = converse(env, f":file {path}", ":write", ":lang")
    assert (out, err) == (f"}}\n\n[3 tokens in 1.2 s, tiny, block]\nwrote {path}\nlanguage: rust\n", "")
    body = backend.completions[0]
    assert (body["prompt"], body["mode"], body["language"]) == ("fn f() {\r\n\t// é\n", "complete", "rust")
    assert "suffix" not in body
    assert path.read_bytes() == b"fn f() {\r\n\t// \xc3\xa9\n}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_files_name_sets_the_language(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    names = ["x.RS", "a.b.go", "Gemfile", ".py", "go", "x.go~", "x.txt"]
    for name in names:
        (tmp_path / name).touch()
        backend.scripts.append(completion("a"))
    converse(env, ":lang c", *(f":do @{tmp_path / name} it" for name in names))
    assert [body["language"] for body in backend.completions] == ["rust", "go", "ruby", "python", *["python"] * 3]


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
def test_a_gap_is_filled(
    env: dict[str, str], backend: Backend, tmp_path: Path, text: str, line: int, before: str, after: str
) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(text.encode())
    backend.scripts.append(completion(FILL))
    out, err = converse(env, f":infill {path}:{line}", ":write")
    assert (out, err) == (f"{FILL}\n[3 tokens in 1.2 s, tiny, block]\nwrote {path}\n", "")
    body = backend.completions[0]
    assert (body.get("prompt", ""), body.get("suffix", "")) == (before, after)
    assert body.get("filename") == ("x.py" if after else None)
    assert body["mode"] == ("infill" if after else "complete")
    filled = FILL.replace("\n", "\r\n") if "\r" in text else FILL
    assert path.read_bytes() == (before + filled + after).encode()


def test_a_file_is_changed_by_an_instruction(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.go"
    path.write_text("one\ntwo\n")
    backend.scripts += [completion("one\nTWO", mode="instruct"), completion("ONE\nTWO\n", mode="instruct")]
    out, err = converse(env, f":do @{path} shout  it", ":do louder", ":write")
    first, second = backend.completions
    assert err == ""
    asked = first["prompt"], first["instruction"], first["mode"], first["language"]
    assert asked == ("one\ntwo\n", "shout  it", "instruct", "go")
    assert (second["prompt"], second["instruction"]) == ("one\nTWO\n", "louder")
    assert f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n one\n-two\n+TWO\n" in out
    assert f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n-one\n-two\n+ONE\n+TWO\n" in out
    assert path.read_text() == "ONE\nTWO\n"


def test_the_last_completion_is_changed_by_an_instruction(env: dict[str, str], backend: Backend) -> None:
    backend.scripts += [completion("\n  x", mode="complete"), completion("def f():\n  y\n", mode="instruct")]
    out, err = converse(env, "def f():", ":do use y", ":write")
    assert backend.completions[1]["prompt"] == "def f():\n  x"
    assert "--- last result\n+++ last result (new)\n" in out
    assert "\n-  x\n\\ No newline at end of file\n+  y\n" in out
    assert err == "cerebrum_repl.sh: the last result belongs to no file; save it by :save PATH\n"


def test_a_long_file_asks_for_as_many_tokens_as_it_needs(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    for size, tokens in [(10, 512), (3000, 1064), (30000, 2048)]:
        path.write_text("x" * size)
        backend.scripts.append(completion("y", mode="instruct"))
        converse(env, f":do @{path} it")
        assert backend.completions[-1]["max_tokens"] == tokens


CUT = completion("on", mode="instruct", finish_reason="length", kept={"parts": ["all"]})
REPEATED = completion("on", mode="instruct", finish_reason="repeat")
FITTED = completion("on", mode="instruct", finish_reason="stop", kept={"parts": ["imports", "window"]})
NOT_WHOLE = [
    ("cut by the limit", CUT, "cut off at 512 tokens, so :write will refuse it"),
    ("repeated itself", REPEATED, "the model began to repeat itself, so :write will refuse it"),
    ("of a part", FITTED, "made from a part of the text, which is too long for the model, so :write will refuse it"),
    ("empty", completion(" \n", mode="instruct"), "the answer is empty, so :write will refuse it"),
    ("replaced", completion("on", mode="instruct", finish_reason="replaced"),
     "the answer broke off, so :write will refuse it"),
    ("failed", FAILED_MIDWAY, "VPS_UNAVAILABLE: backend died"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "said"), [row[1:] for row in NOT_WHOLE], ids=[row[0] for row in NOT_WHOLE])
def test_half_an_answer_never_replaces_a_file(
    env: dict[str, str], backend: Backend, tmp_path: Path, script: Script, said: str
) -> None:
    path = tmp_path / "x.py"
    path.write_text("one\ntwo\n")
    backend.scripts.append(script)
    _, err = converse(env, f":do @{path} it", ":write")
    assert err.splitlines() == [
        f"cerebrum_repl.sh: {said}",
        "cerebrum_repl.sh: the last result is not whole; :save PATH saves it nevertheless",
    ]
    assert path.read_text() == "one\ntwo\n"


def test_the_filter_fails_with_an_answer_that_is_not_whole(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(CUT)
    result = run(env, b"# Sort a list", "-")
    said = b"cerebrum_repl.sh: cut off at 512 tokens\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, b"on", said)


ODD_FILES = [  # a file's bytes, what the REPL says
    (b"one\ncaf\xe9\n", "the byte 0xe9 in line 2"),
    (b"\xed\xa0\x80\n", "the byte 0xed in line 1"),  # half of an emoji
    (b"\xff\xfea\0", "the byte 0xff in line 1"),  # UTF-16
    (b"a\n\n\xc3\xa9\0", "the byte 0x00 in line 3"),
]


@pytest.mark.parametrize("command", [":do @{path} shout", ":file {path}", ":infill {path}:1"])
@pytest.mark.parametrize(("text", "said"), ODD_FILES)
def test_a_file_that_is_no_text_is_refused(
    env: dict[str, str], backend: Backend, tmp_path: Path, command: str, text: bytes, said: str
) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(text)
    _, err = converse(env, command.format(path=path), ":write")
    assert err.splitlines() == [
        f"cerebrum_repl.sh: {path}: expected text in UTF-8, got {said}",
        "cerebrum_repl.sh: the last result belongs to no file; save it by :save PATH",
    ]
    assert path.read_bytes() == text


def test_a_file_that_changed_meanwhile_is_not_written(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("one\n")

    backend.scripts.append([lambda: path.write_text("edited\n"), *completion("two\n")])
    _, err = converse(env, f":file {path}", ":write")
    assert err == f"cerebrum_repl.sh: {path} has changed since it was read\n"
    assert path.read_text() == "edited\n"


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


@pytest.mark.parametrize(("command", "script", "said"), NOTHING_CAME, ids=[row[0] for row in NOTHING_CAME])
def test_a_command_without_an_answer_leaves_the_last_result_as_it_was(
    env: dict[str, str], backend: Backend, two: tuple[Path, Path], command: str, script: Script | None, said: str
) -> None:
    a, b = two
    backend.scripts += [completion("A\n"), *([script] if script else [])]
    out, err = converse(env, f":file {a}", command.format(b=b), ":last", ":write", ":lang")
    assert err == f"cerebrum_repl.sh: {said.format(b=b)}\n"
    assert out.endswith(f"block]\na\nA\nwrote {a}\nlanguage: python\n")
    assert (a.read_text(), b.read_text()) == ("a\nA\n", "b\n")


def test_half_an_answer_is_the_last_result_and_belongs_to_its_file(
    env: dict[str, str], backend: Backend, two: tuple[Path, Path]
) -> None:
    a, b = two
    backend.scripts += [completion("A\n"), BROKEN_OFF, completion("whole\n", mode="instruct")]
    out, err = converse(env, f":file {a}", f":file {b}", ":write", ":last", ":do finish it", ":write")
    not_whole = "cerebrum_repl.sh: the last result is not whole; :save PATH saves it nevertheless"
    assert err.splitlines() == [
        "cerebrum_repl.sh: the stream broke off before its end",
        not_whole,
        "cerebrum_repl.sh: made from a result that is not whole, so :write will refuse it",
        not_whole,
    ]
    assert "block]\nhalf\nb\nhalfwhole\n" in out
    assert [body["prompt"] for body in backend.completions] == ["a\n", "b\n", "b\nhalf"]
    assert (a.read_text(), b.read_text()) == ("a\n", "b\n")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("command", [":write", ":save! {path}"])
def test_a_full_disk_loses_no_file(env: dict[str, str], backend: Backend, small_disk: Path, command: str) -> None:
    path = small_disk / "x.py"
    path.write_text("x" * 40_000)
    backend.scripts.append(completion("y" * 40_000))
    out, err = converse(env, f":file {path}", command.format(path=path))
    outcome = "the file is unchanged" if command == ":write" else "nothing was saved"
    assert err == f"cerebrum_repl.sh: {path}: No space left on device; {outcome}\n"
    assert path.read_text() == "x" * 40_000
    assert os.listdir(small_disk) == ["x.py"]
    assert "wrote" not in out


def test_a_result_that_the_temporary_directory_cannot_hold_is_not_written(
    env: dict[str, str], backend: Backend, small_disk: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.py"
    path.write_text("x" * 10_000)
    backend.scripts.append(completion(*["y" * 10_000] * 2))
    _, err = converse(env | {"TMPDIR": str(small_disk)}, f":file {path}", ":write")
    assert err.splitlines()[-2:] == [
        f"cerebrum_repl.sh: no room for the whole result in {small_disk}",
        "cerebrum_repl.sh: the last result is not whole; :save PATH saves it nevertheless",
    ]
    assert path.read_text() == "x" * 10_000


def test_writing_keeps_links_modes_and_owners(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    folder, link = tmp_path / "folder", tmp_path / "link.py"
    folder.mkdir()
    real = folder / "real.py"
    real.write_text("x\n")
    real.chmod(0o750)
    owner = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    os.chown(real, *owner)
    link.symlink_to("folder/real.py")
    backend.scripts.append(completion("y\n"))
    assert converse(env, f":file {link}", ":write")[1] == ""
    status = real.stat()
    assert (real.read_text(), stat.S_IMODE(status.st_mode)) == ("x\ny\n", 0o750)
    assert (status.st_uid, status.st_gid) == owner
    assert link.is_symlink()
    assert os.listdir(folder) == ["real.py"]


def test_only_a_file_is_replaced(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    backend.scripts.append(completion("y"))
    _, err = converse(env, "x", f":save {tmp_path}/fifo", f":save! {tmp_path}", f":save {tmp_path}/none/x")
    assert err.splitlines() == [
        f"cerebrum_repl.sh: {tmp_path}/fifo: not a regular file; nothing was saved",
        f"cerebrum_repl.sh: {tmp_path}: not a regular file; nothing was saved",
        f"cerebrum_repl.sh: {tmp_path}/none/x: No such file or directory; nothing was saved",
    ]
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_file_that_may_only_be_read_is_not_replaced(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("x")
    path.chmod(0o444)
    backend.scripts.append(completion("y"))
    without_override = [str(shutil.which("setpriv")), "--bounding-set=-dac_override"] if os.geteuid() == 0 else []
    commands = f":file {path}\n:write\n".encode()
    result = subprocess.run([*without_override, REPL], env=env, input=commands, capture_output=True, check=True)
    assert result.stderr.decode() == f"cerebrum_repl.sh: {path}: not writable; the file is unchanged\n"
    assert path.read_text() == "x"


@pytest.mark.parametrize("name", ["-n.go", "a  b %s & \\n é.go", "~.go", "@x.go"])
def test_any_name_of_a_file(
    env: dict[str, str], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    path.write_text("a\n")
    backend.scripts += [completion("b\n"), completion("!"), completion("c\n", mode="instruct")]
    _, err = converse(
        env, f":file {name}", ":write", f":infill {name}:1", ":write", f':do @"{name}" it', ":write", ":save -copy.go"
    )
    assert err == ""
    bodies = backend.completions
    assert [body["prompt"] for body in bodies] == ["a\n", "a", "a!\nb\n"]
    assert bodies[1]["filename"] == name
    assert (path.read_text(), Path("-copy.go").read_text()) == ("c\n", "c\n")


def test_a_name_that_is_not_utf_8(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.py"
    Path(os.fsdecode(path)).write_text("a\n")
    backend.scripts.append(completion("b"))
    result = run(env, b":infill " + path + b":1\n:write\n")
    assert result.stderr == b""
    assert backend.completions[0]["filename"] == "?.py"
    assert Path(os.fsdecode(path)).read_text() == "ab\n"


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
    env: dict[str, str], backend: Backend, tmp_path: Path, before: bytes, answer: str, after: bytes
) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(before)
    backend.scripts += [completion(answer, mode="instruct")] * 2
    assert converse(env, f":do @{path} shout", ":do again", ":write")[1] == ""
    assert path.read_bytes() == after
    first, second = backend.completions
    assert first.get("prompt", "") == before.decode("utf-8-sig")
    assert second["prompt"] == after.decode("utf-8-sig")


# ------------------------------------------------------------------------------------------ terminal


PROMPT = "python> "
ENTER = "\r\n\x1b[?2004l\r"  # how readline ends a line
MAGENTA, GREEN, RED, PLAIN = "\x1b[35m", "\x1b[32m", "\x1b[31m", "\x1b[m"


class Terminal:
    """A program on a terminal of its own: `type` keys, and `expect` text to appear."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xa0\x00" + b"\0" * 4)  # 24 x 160

        def own_the_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        ends = {"stdin": slave, "stdout": slave, "stderr": slave}
        self.process = subprocess.Popen(command, env=env, start_new_session=True, preexec_fn=own_the_terminal, **ends)
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

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        os.close(self.master)


@pytest.fixture
def terminal(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    with contextlib.ExitStack() as stack:

        def open_terminal(*args: str, **variables: str) -> Terminal:
            return stack.enter_context(contextlib.closing(Terminal([REPL, *args], env | variables)))

        yield open_terminal


def test_ctrl_c_stops_the_generation_and_not_the_repl(terminal: Callable[..., Terminal], backend: Backend) -> None:
    left = threading.Event()
    backend.scripts += [[head(), *tokens("generating"), HANG, left.set], completion("again")]
    screen = terminal()
    screen.enter("def f():")
    screen.expect("generating")
    screen.type("\x03")
    screen.expect("cerebrum_repl.sh: interrupted")
    screen.enter("def g():")
    screen.expect("again")
    screen.expect(PROMPT)
    assert left.wait(PATIENCE)
    screen.type("\x04")
    assert screen.process.wait(PATIENCE) == 0


def test_ctrl_c_leaves_the_last_result_as_it_was(
    terminal: Callable[..., Terminal], backend: Backend, two: tuple[Path, Path]
) -> None:
    asked, (a, b) = threading.Event(), two
    backend.scripts += [completion("A\n"), [head(), asked.set, HANG]]
    screen = terminal()
    screen.enter(f":file {a}")
    screen.expect("block]")
    screen.enter(f":file {b}")
    assert asked.wait(PATIENCE)
    screen.type("\x03")
    screen.expect("cerebrum_repl.sh: interrupted")
    screen.enter(":write")
    screen.expect(f"wrote {a}")
    assert (a.read_text(), b.read_text()) == ("a\nA\n", "b\n")


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts.append(completion("yes"))
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("not this")
    screen.expect("not this")
    screen.type("\x03")
    screen.enter("but this")
    screen.expect("yes")
    assert [body["prompt"] for body in backend.completions] == ["but this"]


def test_ctrl_c_in_the_filter_ends_it(terminal: Callable[..., Terminal], backend: Backend) -> None:
    left = threading.Event()
    backend.scripts.append([head(), *tokens("generating"), HANG, left.set])
    screen = terminal("-")
    screen.type("x\x04\x04")
    screen.expect("generating")
    screen.type("\x03")
    assert left.wait(PATIENCE)
    assert screen.process.wait(PATIENCE) == -signal.SIGINT


def test_the_line_can_be_edited_and_history_lasts(
    terminal: Callable[..., Terminal], backend: Backend, env: dict[str, str]
) -> None:
    backend.scripts += [completion("one."), completion("two.")]
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("ef f()\x01d\x05:\r")  # Ctrl-A, Ctrl-E
    screen.expect("one.")
    screen.enter(":exit")
    assert screen.process.wait(PATIENCE) == 0
    again = terminal()
    again.expect(PROMPT)
    again.type("\x1b[A\x1b[A\r")  # up, up
    again.expect("two.")
    assert [body["prompt"] for body in backend.completions] == ["def f():"] * 2
    history = Path(env["HOME"], ".local/state/cerebrum/repl_history")
    assert re.sub(r"(?m)^#\d+$", "#", history.read_text()).startswith("#\ndef f():\n#\n:exit\n")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_progress_is_shown_and_gone_before_the_first_token(terminal: Callable[..., Terminal], backend: Backend) -> None:
    progress = [
        event(progress={"stage": "queued", "done": 0, "total": 1}),
        event(progress={"stage": "loading", "done": 1, "total": 4}),
        event(progress={"stage": "prefill", "done": 512, "total": 1024}),
        event(progress={"stage": "decode", "done": 0, "total": 9}),
    ]
    backend.scripts.append([head(), *progress, *tokens("token"), done()])
    screen = terminal()
    screen.enter("x")
    assert screen.expect("\r\x1b[Kwaiting for a free slot") == ""
    assert screen.expect("\r\x1b[Kloading the model, 25 %") == ""
    assert screen.expect("\r\x1b[Kreading the prompt, 50 %") == ""
    assert screen.expect("token") == "\r\x1b[K" + MAGENTA


def test_a_model_cannot_send_the_terminal_a_control_sequence(
    terminal: Callable[..., Terminal], backend: Backend
) -> None:
    backend.scripts.append(completion("a\x1b[2Jb\x07\tc\nd\x9be\0f\x7fg\r\\x1b€\\", mode="instruct"))
    screen = terminal()
    screen.enter("x")
    clean = "a[2Jb\tc\r\ndefg\\x1b€\\"
    assert screen.expect(f"{MAGENTA}{clean}{PLAIN}\r\n") == ""
    screen.enter(":last")
    assert screen.expect(f"{clean}\r\n") == ""


def test_what_the_model_wrote_is_coloured(terminal: Callable[..., Terminal], backend: Backend, tmp_path: Path) -> None:
    path, saved = tmp_path / "x.py", tmp_path / "saved.py"
    path.write_text("a = \nb\n\n")
    backend.scripts.append(completion("1", "\n\n"))
    screen = terminal()
    screen.enter(f":infill {path}:1")
    assert screen.expect("[3 tokens") == f"{MAGENTA}1{PLAIN}{MAGENTA}\r\n\r\n{PLAIN}\r\n"
    screen.enter(":last")
    assert screen.expect("\x1b[?2004h" + PROMPT) == "a = 1\r\n\r\n\r\nb\r\n\r\n"
    screen.type(f":save {saved}\r")
    screen.expect(f"saved {saved}")
    screen.type(":write\r")
    screen.expect(f"wrote {path}")
    assert path.read_text() == saved.read_text() == "a = 1\n\n\nb\n\n"


def test_a_difference_is_coloured(terminal: Callable[..., Terminal], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("a\n- b\n")
    backend.scripts.append(completion("a\n+ c\x1b[2J", mode="instruct"))
    screen = terminal()
    screen.enter(f":do @{path} it")
    screen.expect("block]\r\n")
    lines = [
        f"{RED}--- {path}{PLAIN}", f"{GREEN}+++ {path} (new){PLAIN}", "@@ -1,2 +1,2 @@",
        " a", f"{RED}-- b{PLAIN}", f"{GREEN}++ c[2J{PLAIN}", "\x1b[?2004h",
    ]  # fmt: skip
    assert screen.expect(PROMPT) == "\r\n".join(lines)
    screen.type(":last\r")
    screen.expect(ENTER)
    assert screen.expect("\x1b[?2004h") == "a\r\n+ c[2J\r\n"


COLOURLESS = [{"NO_COLOR": "1"}, {"NO_COLOR": "0"}, {"TERM": "dumb"}, {"TERM": ""}]


@pytest.mark.parametrize("variables", COLOURLESS, ids=str)
def test_a_terminal_without_colours(
    terminal: Callable[..., Terminal], backend: Backend, tmp_path: Path, variables: dict[str, str]
) -> None:
    path = tmp_path / "x.py"
    path.write_text("a\n")
    backend.scripts.append(completion("b\x1b[31m\n", mode="instruct"))
    screen = terminal(**variables)
    screen.expect(PROMPT)
    screen.type(f":do @{path} it\r")
    shown = screen.expect("+b[31m\r\n").rpartition(" it\r\n")[2].removeprefix("\x1b[?2004l\r")
    summary = "[3 tokens in 1.2 s, tiny, block]"
    assert shown == f"b[31m\r\n\r\n{summary}\r\n--- {path}\r\n+++ {path} (new)\r\n@@ -1 +1 @@\r\n-a\r\n"


def test_a_file_gets_no_colours(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    """While stdin and stderr are a terminal."""
    out, path = tmp_path / "out", tmp_path / "x.py"
    path.write_text("a\n")
    backend.scripts.append(completion("b\n", mode="instruct"))
    with contextlib.closing(Terminal(["bash", "-c", 'exec "$0" >"$1"', REPL, str(out)], env)) as screen:
        screen.enter(f":do @{path} it")
        screen.enter(":exit")
        assert screen.process.wait(PATIENCE) == 0
    greeting, *lines = out.read_text().splitlines()
    assert greeting == f"Cerebrum at {env['CEREBRUM_URL']}. Type :help for the commands."
    assert lines == [
        "b", "", "[3 tokens in 1.2 s, tiny, block]", f"--- {path}", f"+++ {path} (new)", "@@ -1 +1 @@", "-a", "+b",
    ]  # fmt: skip


def test_the_filter_gets_no_colours(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts.append([head(), *tokens("one", " two"), done()])
    screen = terminal("-")
    screen.type("x\x04\x04")
    assert screen.expect("\r\n") == "xone two"
    assert screen.process.wait(PATIENCE) == 0


ENDED = [  # how a completion ends early, what a person types meanwhile, what is said
    (HANG, "\x03", "interrupted"),
    (FAILED_MIDWAY[-1], "", "VPS_UNAVAILABLE: backend died"),
    (b"data: {nonsense\n\n", "", NO_EVENT),
]  # fmt: skip


@pytest.mark.parametrize(("step", "keys", "said"), ENDED, ids=[row[2] for row in ENDED])
def test_no_colour_outlasts_its_token(
    terminal: Callable[..., Terminal], backend: Backend, step: Any, keys: str, said: str
) -> None:
    backend.scripts.append([head(), *tokens("one", "two"), step])
    screen = terminal()
    screen.enter("x")
    assert screen.expect(f"two{PLAIN}") == f"{MAGENTA}one{PLAIN}{MAGENTA}"
    screen.type(keys)
    rest = screen.expect(f"cerebrum_repl.sh: {said}\r\n")
    assert rest == ("^C\r\n" if keys else "\r\n")


def test_pasted_lines_are_one_prompt(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts += [completion("yes"), completion("too")]
    screen = terminal()
    screen.enter("\x1b[200~def f():\n\tx = 1\n\x1b[201~    return")
    screen.expect("yes")
    screen.enter("\x1b[A")
    screen.expect("too")
    assert [body["prompt"] for body in backend.completions] == ["def f():\n\tx = 1\n    return"] * 2


def test_ctrl_c_drops_what_multi_has(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts.append(completion("yes"))
    screen = terminal()
    screen.enter(":multi")
    screen.expect("... ")
    screen.type("one\r")
    screen.expect("one\r\n")  # Return draws the old prompt once more; the next one says that Ctrl-C is a key again
    screen.expect("... ")
    screen.type("two\x03")
    screen.enter("three")
    screen.expect("yes")
    assert [body["prompt"] for body in backend.completions] == ["three"]


# ----------------------------------------------------------------------------------------------- key


def keygen(*args: str, stdin: str = "", **environ: str) -> tuple[int, str, str]:
    result = subprocess.run(
        [KEYGEN, *args],
        env={"PATH": os.environ["PATH"], **environ},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return result.returncode, result.stdout, result.stderr


def test_a_key_is_32_random_bytes() -> None:
    keys = [keygen() for _ in range(5)]
    assert all(code == 0 and not err and re.fullmatch(r"[A-Za-z0-9_-]{43}\n", out) for code, out, err in keys)
    assert len({out for _, out, _ in keys}) == 5


WRITTEN = [  # file, before, after (K is the new key)
    (".env", None, "CEREBRUM_API_KEY=K\n"),
    (".env", "", "CEREBRUM_API_KEY=K\n"),
    (".env", "A=1\nCEREBRUM_API_KEY=\nB=2\n", "A=1\nCEREBRUM_API_KEY=K\nB=2\n"),
    (".env", "A=1", "A=1\nCEREBRUM_API_KEY=K\n"),
    (".env", "CEREBRUM_API_KEY=o/l+d==", "CEREBRUM_API_KEY=K,o/l+d==\n"),
    (".env", "export CEREBRUM_API_KEY = 'one'\nB=2\nCEREBRUM_API_KEY=\"two\"\r\n", "CEREBRUM_API_KEY=K,two\nB=2\n"),
    (".env", "# CEREBRUM_API_KEY=\n\nCEREBRUM_CM4_API_KEY=x\nX=CEREBRUM_API_KEY=\\n%s\n",
     "# CEREBRUM_API_KEY=\n\nCEREBRUM_CM4_API_KEY=x\nX=CEREBRUM_API_KEY=\\n%s\nCEREBRUM_API_KEY=K\n"),
    (".env", "A=\xff\r\n", "A=\xff\r\nCEREBRUM_API_KEY=K\n"),
    ("CEREBRUM_API_KEY", None, "K\n"),
    ("CEREBRUM_API_KEY", "\n", "K\n"),
    ("CEREBRUM_CM4_API_KEY", "old==\n\n", "K,old==\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "before", "after"), WRITTEN)
def test_a_key_is_written_before_the_one_that_is_there(
    tmp_path: Path, name: str, before: str | None, after: str
) -> None:
    path = tmp_path / name
    if before is not None:
        path.write_bytes(before.encode("latin-1"))
        path.chmod(0o644)
    assert keygen("--write", str(path)) == (0, f"key set in: {path}\n", "")
    text = path.read_bytes().decode("latin-1")
    assert re.sub(r"(?m)^(CEREBRUM_API_KEY=|)[A-Za-z0-9_-]{43}(?=,|$)", r"\1K", text) == after
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [name]


def test_the_same_key_goes_to_all_files_and_links_stay_links(tmp_path: Path) -> None:
    real, link, other = tmp_path / "real", tmp_path / "link", tmp_path / "other"
    real.write_text("A=1\n")
    link.symlink_to("real")
    assert keygen("--write", str(link), str(other))[0] == 0
    assert real.read_text() == "A=1\n" + other.read_text()
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("paths", "said"),
    [
        ([], "--write needs at least one FILE"),
        (["good", "nowhere/x"], "nowhere/x: no such directory"),
        (["good", "."], ".: expected a regular file that can be read"),
        (["good", "TWO"], "TWO: expected one key at most, got two: --set the one that stays, then --write again"),
    ],
)
def test_one_bad_path_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good").write_text("CEREBRUM_API_KEY=old\n")
    Path("TWO").write_text("new, old\n")
    code, out, err = keygen("--write", *paths)
    assert (code, out, err) == (1 if paths else 2, "", f"generate_api_key.sh: {said}\n")
    assert Path("good").read_text() == "CEREBRUM_API_KEY=old\n"
    assert Path("TWO").read_text() == "new, old\n"
    assert sorted(os.listdir()) == ["TWO", "good"]


@pytest.mark.parametrize("stdin", ["k-_1=\n", "k-_1=", "CEREBRUM_CM4_API_KEY=k-_1=,old\r\n", "k-_1=\nnext line"])
def test_a_key_is_carried_over(tmp_path: Path, stdin: str) -> None:
    env, credential = tmp_path / ".env", tmp_path / "CEREBRUM_API_KEY"
    env.write_text("CEREBRUM_API_KEY=older,old\nA=1\n")
    credential.write_text("old\n")
    assert keygen("--set", str(env), str(credential), stdin=stdin) == (0, f"key set in: {env} {credential}\n", "")
    assert (env.read_text(), credential.read_text()) == ("CEREBRUM_API_KEY=k-_1=\nA=1\n", "k-_1=\n")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (env, credential)] == [0o600, 0o600]


@pytest.mark.parametrize(
    ("stdin", "said"),
    [
        ("", "expected a key on stdin, got none"),
        ("\n", "expected a key of letters, digits and ._~+/=- on stdin, got something else"),
        ("two words\n", "expected a key of letters, digits and ._~+/=- on stdin, got something else"),
        ("CEREBRUM_API_KEY='k'\n", "expected a key of letters, digits and ._~+/=- on stdin, got something else"),
    ],
)
def test_what_is_no_key_changes_no_file(tmp_path: Path, stdin: str, said: str) -> None:
    path = tmp_path / ".env"
    path.write_text("CEREBRUM_API_KEY=old\n")
    assert keygen("--set", str(path), stdin=stdin) == (1, "", f"generate_api_key.sh: {said}\n")
    assert path.read_text() == "CEREBRUM_API_KEY=old\n"


def test_a_typed_key_is_not_shown(tmp_path: Path) -> None:
    with contextlib.closing(Terminal([KEYGEN, "--set", str(tmp_path / ".env")], dict(os.environ))) as screen:
        screen.expect("key (not shown): ")
        screen.type("hush-hush\r")
        assert screen.expect(f"key set in: {tmp_path}/.env\r\n") == "\r\n"
    assert (tmp_path / ".env").read_text() == "CEREBRUM_API_KEY=hush-hush\n"


def test_a_full_disk_loses_no_key(small_disk: Path) -> None:
    path = small_disk / ".env"
    path.write_text("CEREBRUM_API_KEY=old\nanna key\n")
    with (small_disk / "rest").open("wb", buffering=0) as rest, contextlib.suppress(OSError):
        while rest.write(bytes(4096)):
            pass
    for args in (["--write", str(path)], ["--client", "ben"], ["--revoke", "anna"]):
        code, out, err = keygen(*args, CEREBRUM_CM4_KEYS_FILE=str(path))
        assert (code, out) == (1, "")
        assert "No space left on device" in err
        assert path.read_text() == "CEREBRUM_API_KEY=old\nanna key\n"
    assert sorted(os.listdir(small_disk)) == [".env", "rest"]


def test_a_key_is_on_no_command_line_and_on_the_disk_before_it_replaces_a_file(tmp_path: Path) -> None:
    files, log = [tmp_path / ".env", tmp_path / "CEREBRUM_API_KEY"], tmp_path / "log"
    (tmp_path / "bin").mkdir()
    for tool in ["base64", "chown", "head", "mktemp", "mv", "readlink", "rm", "sync", "tr"]:
        spy = tmp_path / "bin" / tool
        spy.write_text(f'#!/bin/bash\n{{ echo "CALL {tool} $*"; env; }} >>{log}\nexec {shutil.which(tool)} "$@"\n')
        spy.chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    assert keygen("--set", *map(str, files), stdin="the-old-key", PATH=path)[0] == 0
    assert keygen("--write", *map(str, files), PATH=path)[0] == 0
    new, _, old = files[1].read_text().strip().partition(",")
    assert (len(new), old) == (43, "the-old-key")
    seen = log.read_text()
    assert new not in seen
    assert old not in seen
    steps = re.findall(r"CALL (sync|mv) (?:-f )?-- (.+)", seen)
    assert [tool for tool, _ in steps] == ["sync", "mv", "mv", "sync", "sync"] * 2
    for begin in (0, 5):
        moves = [f"{draft} {file}" for draft, file in zip(steps[begin][1].split(), files, strict=True)]
        assert [arguments for _, arguments in steps[begin + 1 : begin + 3]] == moves
    log.unlink()
    clients = tmp_path / "client-keys"
    assert keygen("--client", "anna", PATH=path, CEREBRUM_CM4_KEYS_FILE=str(clients))[0] == 0
    assert keygen("--client", "ben", PATH=path, CEREBRUM_CM4_KEYS_FILE=str(clients))[0] == 0
    assert keygen("--revoke", "ben", PATH=path, CEREBRUM_CM4_KEYS_FILE=str(clients))[0] == 0
    assert clients.read_text().split()[1] not in log.read_text()
    assert re.findall(r"CALL (sync|mv)", log.read_text()) == ["sync", "mv", "sync"] * 3


APPLY = "apply it:  sudo systemctl reload cerebrum-cm4\n"


def test_clients_get_keys_and_lose_them(tmp_path: Path) -> None:
    """The script with a daemon's settings beside it, and the file that they name behind a link."""
    script, settings, file = (tmp_path / name for name in (Path(KEYGEN).name, ".env", "client-keys"))
    shutil.copy(KEYGEN, script)
    settings.write_text("CEREBRUM_CM4_PORT=7001\nCEREBRUM_CM4_TLS_CERT='/etc/pi.pem'\n")
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
    assert first.stderr == f"{file} is new: while it exists, all clients need a key\n{APPLY}"
    assert second.stderr == APPLY
    assert file.read_text() == f"anna {key.split()[1]}\ngast.2 {second.stdout.split()[3]} 1\n"
    assert (file.stat().st_uid, stat.S_IMODE(file.stat().st_mode)) == (owners[0], 0o600)
    file.write_text("# ours\n\n" + file.read_text().rstrip())
    os.chown(file, owners[1], -1)
    assert run([script, "--revoke", "gast.2"]).stderr == APPLY
    assert file.read_text() == f"# ours\n\nanna {key.split()[1]}\n"
    assert file.stat().st_uid == owners[1]
    assert file.is_symlink()
    assert os.listdir(tmp_path / "etc") == ["keys"]


@pytest.mark.parametrize(
    ("args", "status", "said"),
    [
        (["--client"], 2, "expected a name of 1 to 32 letters, digits and ._- after --client, got ''"),
        (["--client", "an na"], 2, "expected a name of 1 to 32 letters, digits and ._- after --client, got 'an na'"),
        (
            ["--revoke", "n" * 33],
            2,
            f"expected a name of 1 to 32 letters, digits and ._- after --revoke, got '{'n' * 33}'",
        ),
        (["--client", "x", "65"], 2, "expected a number of places from 1 to 64, got '65' after the name"),
        (["--client", "x", "0"], 2, "expected a number of places from 1 to 64, got '0' after the name"),
        (["--revoke", "n0", "n1"], 2, "expected nothing, got 'n1' after the name"),
        (["--client", "n0"], 1, "FILE: n0 has a key already; first --revoke n0"),
        (["--client", "x"], 1, "FILE: has 32 names, which is the most; --revoke one first"),
        (["--revoke", "#"], 2, "expected a name of 1 to 32 letters, digits and ._- after --revoke, got '#'"),
        (["--revoke", "x"], 1, "FILE: there is no client x"),
    ],
)
def test_what_cannot_be_done_to_a_client_changes_nothing(
    tmp_path: Path, args: list[str], status: int, said: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(before := "# 32\n" + "".join(f"n{number} key\n" for number in range(32)))
    refusal = f"generate_api_key.sh: {said.replace('FILE', str(file))}\n"
    assert keygen(*args, CEREBRUM_CM4_KEYS_FILE=str(file)) == (status, "", refusal)
    assert file.read_text() == before
    assert os.listdir(tmp_path) == ["keys"]


@pytest.mark.parametrize(
    ("file", "said"), [(".", "expected a regular file that can be read"), ("a/b", "no such directory")]
)
def test_a_file_of_keys_that_cannot_be_written(tmp_path: Path, file: str, said: str) -> None:
    place = f"{tmp_path}/{file}"
    code, out, err = keygen("--client", "anna", CEREBRUM_CM4_KEYS_FILE=place)
    assert (code, out, err.splitlines()[-1]) == (1, "", f"generate_api_key.sh: {place}: {said}")


# --------------------------------------------------------------------------------------------- run.sh


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    """Before anything is installed, with the Python of Debian 11."""
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac\n")
    old.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    result = subprocess.run([RUN, "setup"], env=environ, capture_output=True, text=True, check=False)
    said = "run.sh: expected Python 3.11 or newer, got Python 3.9.2\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said)


def test_make_deb_names_the_packages_that_it_lacks(tmp_path: Path) -> None:
    for tool in ("make", "sh", "dh"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or "/bin/true")
    command = [str(tmp_path / "make"), "-C", str(ROOT), "deb"]
    result = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    said = "missing system packages; please run:  sudo apt-get install build-essential dh-python help2man"
    assert (result.returncode, result.stderr.splitlines()[0]) == (2, said)


@pytest.mark.parametrize("lacks", ["python", "llama_cpp", "decode"])
def test_a_venv_of_another_python_or_cpu_is_made_anew(lacks: str, tmp_path: Path) -> None:
    """Each Python is a script that records its arguments. The old one lacks something; the new one works."""
    (tmp_path / "run.sh").write_bytes(Path(RUN).read_bytes())
    venv, bin, log = tmp_path / ".venv", tmp_path / "bin", tmp_path / "log"
    old = f"#!/bin/sh\necho old $* >>{log}\ncase $* in *decode*) kill -ILL $$ ;; *{lacks}*) exit 1 ;; esac\n"
    clear = f"rm -r {venv}; mkdir -p {venv}/bin; cp $0 {venv}/bin/python"
    make = f"#!/bin/sh\necho new $* >>{log}\ncase $* in *--clear*) {clear} ;; esac\n"
    for path, text in ((venv / "bin/python", old), (bin / "python3", make), (venv / "installed-run.txt", "")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    if lacks == "python":
        (venv / "bin/python").unlink()
        (venv / "bin/python").symlink_to(tmp_path / "gone")
    environ = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"}
    command = ["bash", str(tmp_path / "run.sh"), "setup"]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    calls = log.read_text().splitlines()
    assert calls.count("new -m venv --clear .venv") == 1
    assert (venv / "installed-run.txt").exists()
    assert calls.count("new -m pip cache remove llama_cpp_python") == 1
    assert [call for call in calls if call.startswith("new -m pip ")] != []
    assert "Illegal" not in result.stderr
