"""The shell scripts, run as a person runs them: with real bash, curl, python3 and a terminal.

The server is scripted in this process: each test states what it answers and checks what it was asked. A test waits
for output or for an event of the server, until a deadline; it never sleeps.
"""

from __future__ import annotations

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
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
REPL = str(ROOT / "cerebrum_repl.sh")
KEYGEN = str(ROOT / "generate_api_key.sh")
DEADLINE_S = 10.0

# ------------------------------------------------------------------------------------------- backend


class Answer:
    """What a script writes to: one HTTP response, raw enough to break off anywhere."""

    def __init__(self, handler: BaseHTTPRequestHandler) -> None:
        self.handler = handler

    def head(self, status: int = 200, content_type: str = "text/event-stream", *extra: str) -> None:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {content_type}", "Connection: close", *extra]
        self.write("\r\n".join([*lines, "", ""]).encode())

    def write(self, data: bytes) -> None:
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def event(self, **fields: Any) -> None:
        self.write(b"data: " + json.dumps(fields).encode() + b"\n\n")

    def tokens(self, *tokens: str) -> None:
        for number, token in enumerate(tokens, 1):
            self.event(token=token, total_tokens=number)

    def done(self, **fields: Any) -> None:
        usual = {"language": "python", "model": "tiny", "total_tokens": 3, "inference_time": 1.234}
        self.event(**({"done": True, "timestamp": "t", "finish_reason": "block"} | usual | fields))

    def wait_until_client_leaves(self) -> bool:
        ready, _, _ = select.select([self.handler.connection], [], [], DEADLINE_S)
        return bool(ready) and self.handler.connection.recv(1) == b""


Script = Callable[[Answer], None]


def completion(*tokens: str, **done: Any) -> Script:
    def script(answer: Answer) -> None:
        answer.head()
        answer.tokens(*tokens)
        answer.done(**done)

    return script


def answer_of(status: int, content_type: str, body: bytes) -> Script:
    def script(answer: Answer) -> None:
        answer.head(status, content_type, f"Content-Length: {len(body)}")
        answer.write(body)

    return script


class Backend:
    """Answers the n-th request by the n-th script. `requests` holds (path, headers, JSON body)."""

    def __init__(self) -> None:
        self.scripts: list[Script] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def handle_request(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                headers = {name.lower(): value for name, value in self.headers.items()}
                backend.requests.append((self.path, headers, body))
                backend.scripts.pop(0)(Answer(self))
                self.close_connection = True

            do_GET = do_POST = handle_request

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.server.shutdown()
    backend.server.server_close()


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
        "CEREBRUM_URL": backend.url,
    }


def run(env: dict[str, str], stdin: bytes, *args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([REPL, *args], env=env, input=stdin, capture_output=True, timeout=DEADLINE_S, check=False)


# -------------------------------------------------------------------------------------------- filter

AWKWARD = ["%s%d", "\\n", "\\", "\n", "  two  ", "\t", "é€😀", "a\0b", "\x1b[31m", "-n", "", "'\"`$x", "\r", "\\0134"]


def test_the_filter_prints_the_completion_byte_for_byte(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion(*AWKWARD))
    result = run(env, b"def f(\n", "-")
    assert (result.returncode, result.stdout, result.stderr) == (0, "".join(AWKWARD).encode(), b"")


def test_raw_utf8_and_crlf_events_and_comments(env: dict[str, str], backend: Backend) -> None:
    def script(answer: Answer) -> None:
        answer.head()
        answer.write(b': keep-alive\r\n\r\ndata: {"token": "\xc3\xa9", "total_tokens": 1}\r\n\r\n')
        answer.write(b'data:{"token": "x"}\n\nevent: other\nid: 1\n\n')
        answer.done()

    backend.scripts.append(script)
    result = run(env, b"x", "-")
    assert (result.returncode, result.stdout, result.stderr) == (0, "éx".encode(), b"")


def test_the_request(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("x"))
    prompt = 'a "quoted" \\ $(rm) é\n\tb\n'
    result = run(
        env | {"CEREBRUM_CM4_API_KEY": "se cret"},
        prompt.encode() + b"\n",
        "-l",
        "go",
        "-n",
        "7",
        "-t",
        ".5",
        "-m",
        "tiny",
        "-",
    )
    assert result.returncode == 0
    ((path, headers, body),) = backend.requests
    assert path == "/v1/complete/stream"
    assert headers["content-type"] == "application/json"
    assert headers["x-api-key"] == "se cret"
    assert body == {
        "prompt": prompt, "mode": "auto", "language": "go", "model": "tiny",
        "max_tokens": 7, "temperature": 0.5, "progress": True,
    }  # fmt: skip


def test_without_a_key_none_is_sent(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("x"))
    assert run(env, b"x", "-").returncode == 0
    assert "x-api-key" not in backend.requests[0][1]


def test_the_key_is_on_no_command_line(env: dict[str, str], backend: Backend) -> None:
    seen: list[bytes] = []

    def script(answer: Answer) -> None:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                seen.append(process.read_bytes())
            except OSError:
                continue
        completion("x")(answer)

    backend.scripts.append(script)
    assert run(env | {"CEREBRUM_CM4_API_KEY": "hush-hush"}, b"x", "-").returncode == 0
    assert any(b"/v1/complete/stream" in line for line in seen)
    assert not any(b"hush-hush" in line for line in seen)


def test_each_token_is_printed_before_the_next_one_is_made(env: dict[str, str], backend: Backend) -> None:
    printed = [threading.Event() for _ in range(3)]

    def script(answer: Answer) -> None:
        answer.head()
        for number, event in enumerate(printed):
            answer.tokens(str(number))
            assert event.wait(DEADLINE_S)
        answer.done()

    backend.scripts.append(script)
    with subprocess.Popen([REPL, "-"], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout
        for number, event in enumerate(printed):
            assert os.read(process.stdout.fileno(), 100) == str(number).encode()
            event.set()
        assert process.wait(DEADLINE_S) == 0


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


def broken_off(answer: Answer) -> None:
    answer.head()
    answer.tokens("half")


def cut_in_a_chunk(answer: Answer) -> None:
    answer.head(200, "text/event-stream", "Transfer-Encoding: chunked")
    answer.write(b'1c\r\ndata: {"token": "half"}\n\n   \r\nff\r\n')


def failed_midway(answer: Answer) -> None:
    broken_off(answer)
    answer.event(error=True, message="backend died", code="VPS_UNAVAILABLE")


def no_event(line: bytes) -> Script:
    def script(answer: Answer) -> None:
        answer.head()
        answer.tokens("half")
        answer.write(line)

    return script


FAILURES: list[tuple[str, Script, str, str]] = [
    ("error event", failed_midway, "half", "VPS_UNAVAILABLE: backend died"),
    ("no done", broken_off, "half", "the stream broke off before its end"),
    ("cut in a chunk", cut_in_a_chunk, "half", "the stream broke off before its end"),
    ("our JSON error", answer_of(400, "application/json", OURS.encode()), "", SAID_BY_OURS),
    ("HTML", answer_of(502, "text/html", b"<html>\n<h1>Bad</h1>\n"), "", "HTTP 502 from {url}"),
    ("other JSON", answer_of(404, "application/json", b'{"detail":"x"}'), "", "HTTP 404 from {url}"),
    ("not JSON", no_event(b"data: {nonsense\n\n"), "half", "expected an event of Cerebrum, got something else"),
    ("not an object", no_event(b"data: [1]\n\n"), "half", "expected an event of Cerebrum, got something else"),
    ("token of another type", no_event(b'data: {"token": 7}\n\n'), "half", "expected an event of Cerebrum, got something else"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "stdout", "stderr"), [row[1:] for row in FAILURES], ids=[row[0] for row in FAILURES]
)
def test_what_goes_wrong_is_said_and_exits_with_1(
    env: dict[str, str], backend: Backend, script: Script, stdout: str, stderr: str
) -> None:
    backend.scripts.append(script)
    result = run(env, b"x", "-")
    said = f"cerebrum_repl.sh: {stderr.format(url=backend.url)}\n"
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
    result = subprocess.run([REPL, *args], input=b"", capture_output=True, timeout=DEADLINE_S, check=False)
    assert (result.returncode, result.stdout, result.stderr.decode()) == (2, b"", f"cerebrum_repl.sh: {said}\n")


def test_help_names_every_option() -> None:
    result = subprocess.run([REPL, "--help"], capture_output=True, timeout=DEADLINE_S, check=True)
    for option in ["--lang", "--model", "--tokens", "--temp", "--url"]:
        assert option in result.stdout.decode()


# -------------------------------------------------------------------------------------- conversation


def converse(env: dict[str, str], *lines: str) -> tuple[str, str]:
    """What the REPL says on stdout and on stderr when these lines are typed (or piped) into it."""
    result = run(env, "".join(line + "\n" for line in lines).encode())
    assert result.returncode == 0
    return result.stdout.decode(), result.stderr.decode()


def test_a_prompt_is_completed_and_summed_up(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("\n    return ", "1"))
    out, err = converse(env, "    def f():")
    assert (out, err) == ("\n    return 1\n[3 tokens in 1.2 s, tiny, block]\n", "")
    assert backend.requests[0][2]["prompt"] == "    def f():"


def test_settings_reach_the_request(env: dict[str, str], backend: Backend) -> None:
    backend.scripts += [completion("x"), completion("y")]
    converse(env, ":lang rust", ":model tiny", ":tokens 9", ":temp 0", "fn f", ":model auto", ":temp 1.0", "fn g")
    first, second = (body for _, _, body in backend.requests)
    assert first == {
        "prompt": "fn f", "mode": "auto", "language": "rust", "model": "tiny",
        "max_tokens": 9, "temperature": 0, "progress": True,
    }  # fmt: skip
    assert second == {
        "prompt": "fn g", "mode": "auto", "language": "rust",
        "max_tokens": 9, "temperature": 1.0, "progress": True,
    }  # fmt: skip


def test_an_error_does_not_end_the_conversation(env: dict[str, str], backend: Backend) -> None:
    backend.scripts += [failed_midway, completion("ok")]
    out, err = converse(env, "a", "b")
    assert out == "half\nok\n[3 tokens in 1.2 s, tiny, block]\n"
    assert err == "cerebrum_repl.sh: VPS_UNAVAILABLE: backend died\n"


def test_several_lines(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("x"))
    converse(env, ":multi", "def f():", "", "    :help", ":done")
    assert backend.requests[0][2]["prompt"] == "def f():\n\n    :help"


def test_commands_that_ask_nothing(env: dict[str, str], backend: Backend) -> None:
    out, err = converse(
        env, ":lang", ":tokens", ":temp", ":last", ":write", ":save", ":do it", ":nonsense", "", "   ", ":exit", "never"
    )
    assert out == "language: python\ntokens: 512\ntemperature: 0.4\n"
    assert err.splitlines() == [
        "cerebrum_repl.sh: there is no result yet",
        "cerebrum_repl.sh: the last result belongs to no file; :save PATH makes one",
        "cerebrum_repl.sh: expected :save PATH",
        "cerebrum_repl.sh: expected :do INSTRUCTION after a completion, or :do @PATH INSTRUCTION",
        "cerebrum_repl.sh: no such command: :nonsense; see :help",
    ]
    assert backend.requests == []


def test_models_and_stats(env: dict[str, str], backend: Backend) -> None:
    models = {"models": [{"id": "a", "languages": ["c", "go"]}, {"id": "b", "languages": ["c"], "available": False}]}
    stats = {"uptime": 1.5, "vps_available": True, "load_avg": [0.5, 1], "breaker": {"state": "closed"}}
    backend.scripts += [answer_of(200, "application/json", json.dumps(x).encode()) for x in (models, stats)]
    out, err = converse(env, ":model", ":stats")
    words = [line.split(maxsplit=1) for line in out.splitlines()]
    assert err == ""
    assert words[:3] == [["a", "c go"], ["b", "c (not available)"], ["model:", "auto"]]
    assert [name for name, _ in words[3:]] == list(stats)
    assert [json.loads(value) for _, value in words[3:]] == list(stats.values())
    assert [path for path, _, _ in backend.requests] == ["/v1/models", "/v1/stats"]


def test_last_and_save(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    saved, taken = tmp_path / "out.py", tmp_path / "taken.py"
    taken.write_text("mine\n")
    backend.scripts.append(completion("\n    return '\\n'  \n\n"))
    out, err = converse(env, "def f():", ":last", f":save {saved}", f":save {taken}", f":save! {taken}")
    whole = "def f():\n    return '\\n'  \n\n"
    assert out.split("block]\n")[1] == f"{whole}saved {saved}\nsaved {taken}\n"
    assert err == f"cerebrum_repl.sh: {taken} exists; :save! {taken} replaces it\n"
    assert saved.read_text() == taken.read_text() == whole


def test_an_answer_to_an_instruction_stands_alone(env: dict[str, str], backend: Backend) -> None:
    backend.scripts.append(completion("def f(): pass", mode="instruct"))
    out, _ = converse(env, "write a function that does nothing", ":last")
    assert out.endswith("block]\ndef f(): pass\n")


# --------------------------------------------------------------------------------------------- files


def test_a_file_is_completed_at_its_end(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "a file.rs"
    path.write_bytes(b"fn f() {\r\n\t// \xc3\xa9\n")
    path.chmod(0o640)
    backend.scripts.append(completion("}\n"))
    out, err = converse(env, f":file {path}", ":write", ":lang")
    assert (out, err) == (f"}}\n\n[3 tokens in 1.2 s, tiny, block]\nwrote {path}\nlanguage: rust\n", "")
    body = backend.requests[0][2]
    assert (body["prompt"], body["mode"], body["language"]) == ("fn f() {\r\n\t// é\n", "complete", "rust")
    assert "suffix" not in body
    assert path.read_bytes() == b"fn f() {\r\n\t// \xc3\xa9\n}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


ENDINGS = "py:python js:javascript ts:typescript rs:rust c:c h:c cpp:cpp hpp:cpp go:go txt:python"


@pytest.mark.parametrize("ending", ENDINGS.split())
def test_the_language_of_a_file(env: dict[str, str], backend: Backend, tmp_path: Path, ending: str) -> None:
    suffix, language = ending.split(":")
    path = tmp_path / f"x.{suffix}"
    path.write_text("x")
    backend.scripts.append(completion("y"))
    converse(env, f":file {path}")
    assert backend.requests[0][2]["language"] == language


GAPS = [  # file, line, text before the gap, text after it
    ("a\n    return \nb\n", 2, "a\n    return ", "\nb\n"),
    ("a\n\n\nb", 2, "a\n", "\n\nb"),
    ("\nb\n", 1, "", "\nb\n"),
    ("a\nb", 2, "a\nb", ""),
    ("a\nb\n", 2, "a\nb", "\n"),
    ("a\r\nx =\r\nb\r\n", 2, "a\r\nx =", "\r\nb\r\n"),
    ("é\nü\n", 1, "é", "\nü\n"),
]


@pytest.mark.parametrize(("text", "line", "before", "after"), GAPS)
def test_a_gap_is_filled(
    env: dict[str, str], backend: Backend, tmp_path: Path, text: str, line: int, before: str, after: str
) -> None:
    path = tmp_path / "x.py"
    path.write_bytes(text.encode())
    backend.scripts.append(completion("FILL"))
    out, err = converse(env, f":infill {path}:{line}", ":write")
    assert (out, err) == (f"FILL\n[3 tokens in 1.2 s, tiny, block]\nwrote {path}\n", "")
    body = backend.requests[0][2]
    assert (body.get("prompt", ""), body.get("suffix", "")) == (before, after)
    assert body.get("filename") == ("x.py" if after else None)
    assert body["mode"] == ("infill" if after else "complete")
    assert path.read_bytes() == (before + "FILL" + after).encode()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (":infill {path}", "expected :infill PATH:LINE, with lines counted from 1"),
        (":infill {path}:0", "expected :infill PATH:LINE, with lines counted from 1"),
        (":infill {path}:3", "{path} has no line 3"),
        (":infill {path}x:1", "{path}x: no such file, or not readable"),
        (":file {path}x", "{path}x: no such file, or not readable"),
        (":do @{path}x go on", "{path}x: no such file, or not readable"),
    ],
)
def test_files_that_cannot_be_used(
    env: dict[str, str], backend: Backend, tmp_path: Path, command: str, said: str
) -> None:
    path = tmp_path / "x.py"
    path.write_text("a\nb\n")
    out, err = converse(env, command.format(path=path))
    assert (out, err) == ("", f"cerebrum_repl.sh: {said.format(path=path)}\n")
    assert backend.requests == []


def test_a_file_is_changed_by_an_instruction(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.go"
    path.write_text("one\ntwo\n")
    backend.scripts += [completion("one\nTWO", mode="instruct"), completion("ONE\nTWO\n", mode="instruct")]
    out, err = converse(env, f":do @{path} shout  it", ":do louder", ":write")
    first, second = (body for _, _, body in backend.requests)
    assert err == ""
    assert (first["prompt"], first["instruction"], first["mode"], first["language"]) == (
        "one\ntwo\n",
        "shout  it",
        "instruct",
        "go",
    )
    assert (second["prompt"], second["instruction"]) == ("one\nTWO\n", "louder")
    assert f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n one\n-two\n+TWO\n" in out
    assert f"--- {path}\n+++ {path} (new)\n@@ -1,2 +1,2 @@\n-one\n-two\n+ONE\n+TWO\n" in out
    assert path.read_text() == "ONE\nTWO\n"


def test_the_last_completion_is_changed_by_an_instruction(env: dict[str, str], backend: Backend) -> None:
    backend.scripts += [completion("\n  x", mode="complete"), completion("def f():\n  y\n", mode="instruct")]
    out, err = converse(env, "def f():", ":do use y", ":write")
    assert backend.requests[1][2]["prompt"] == "def f():\n  x"
    assert "--- last result\n+++ last result (new)\n" in out
    assert "\n-  x\n\\ No newline at end of file\n+  y\n" in out
    assert err == "cerebrum_repl.sh: the last result belongs to no file; :save PATH makes one\n"


def test_a_long_file_asks_for_as_many_tokens_as_it_needs(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    for size, tokens in [(10, 512), (3000, 1064), (30000, 2048)]:
        path.write_text("x" * size)
        backend.scripts.append(completion("y", mode="instruct"))
        converse(env, f":do @{path} it")
        assert backend.requests.pop()[2]["max_tokens"] == tokens


CUT = completion("on", mode="instruct", finish_reason="length", kept={"parts": ["all"]})
REPEATED = completion("on", mode="instruct", finish_reason="repeat")
FITTED = completion("on", mode="instruct", finish_reason="stop", kept={"parts": ["imports", "window"]})
NOT_WHOLE = [
    ("cut by the limit", CUT, "cut off at 512 tokens, so :write will not take it"),
    ("repeated itself", REPEATED, "the model began to repeat itself, so :write will not take it"),
    ("of a part", FITTED, "the model could not be sent all of it, so :write will not take it"),
    ("failed", failed_midway, "VPS_UNAVAILABLE: backend died"),
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
        "cerebrum_repl.sh: the last result is not whole; :save PATH keeps it all the same",
    ]
    assert path.read_text() == "one\ntwo\n"


def test_a_file_that_changed_meanwhile_is_not_written(env: dict[str, str], backend: Backend, tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("one\n")

    def script(answer: Answer) -> None:
        path.write_text("edited\n")
        completion("two\n")(answer)

    backend.scripts.append(script)
    _, err = converse(env, f":file {path}", ":write")
    assert err == f"cerebrum_repl.sh: {path} has changed since it was read\n"
    assert path.read_text() == "edited\n"


# ------------------------------------------------------------------------------------------ terminal


class Terminal:
    """A program on a terminal of its own: `type` keys, and `expect` text to appear."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\xa0\x00" + b"\0" * 4)  # 24 x 160

        def own_the_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_the_terminal,
        )
        os.close(slave)
        self.unread = b""

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def expect(self, text: str) -> str:
        """Reads up to and including the text; returns what came before it."""
        deadline = time.monotonic() + DEADLINE_S
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
        self.process.wait(DEADLINE_S)
        os.close(self.master)


@pytest.fixture
def terminal(env: dict[str, str]) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*args: str) -> Terminal:
        opened.append(Terminal([REPL, *args], env))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


PROMPT = "python> "
ENTER = "\r\n\x1b[?2004l\r"  # how readline ends a line


def test_ctrl_c_stops_the_generation_and_not_the_repl(terminal: Callable[..., Terminal], backend: Backend) -> None:
    left: list[bool] = []

    def endless(answer: Answer) -> None:
        answer.head()
        answer.tokens("generating")
        left.append(answer.wait_until_client_leaves())

    backend.scripts += [endless, completion("again")]
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("def f():\r")
    screen.expect("generating")
    screen.type("\x03")
    screen.expect("cerebrum_repl.sh: interrupted")
    screen.expect(PROMPT)
    screen.type("def g():\r")
    screen.expect("again")
    screen.expect(PROMPT)
    assert left == [True]
    screen.type("\x04")
    assert screen.process.wait(DEADLINE_S) == 0


def test_ctrl_c_at_the_prompt_drops_the_line(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts.append(completion("yes"))
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("not this")
    screen.expect("not this")
    screen.type("\x03")
    screen.expect(PROMPT)
    screen.type("but this\r")
    screen.expect("yes")
    assert [body["prompt"] for _, _, body in backend.requests] == ["but this"]


def test_ctrl_c_in_the_filter_ends_it(terminal: Callable[..., Terminal], backend: Backend) -> None:
    left = threading.Event()

    def endless(answer: Answer) -> None:
        answer.head()
        answer.tokens("generating")
        if answer.wait_until_client_leaves():
            left.set()

    backend.scripts.append(endless)
    screen = terminal("-")
    screen.type("x\x04\x04")
    screen.expect("generating")
    screen.type("\x03")
    assert left.wait(DEADLINE_S)
    assert screen.process.wait(DEADLINE_S) == -signal.SIGINT


def test_the_line_can_be_edited_and_history_lasts(
    terminal: Callable[..., Terminal], backend: Backend, env: dict[str, str]
) -> None:
    backend.scripts += [completion("one."), completion("two.")]
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("ef f()\x01d\x05:\r")  # Ctrl-A, Ctrl-E
    screen.expect("one.")
    screen.expect(PROMPT)
    screen.type(":exit\r")
    assert screen.process.wait(DEADLINE_S) == 0
    again = terminal()
    again.expect(PROMPT)
    again.type("\x1b[A\x1b[A\r")  # up, up
    again.expect("two.")
    assert [body["prompt"] for _, _, body in backend.requests] == ["def f():"] * 2
    again.expect(PROMPT)
    again.type(":history\r")
    again.expect("def f():")
    again.expect(PROMPT)
    history = Path(env["HOME"], ".local/state/cerebrum/repl_history")
    assert re.sub(r"(?m)^#\d+$", "#", history.read_text()).startswith("#\ndef f():\n#\n:exit\n")
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_the_bar_shows_progress_and_is_gone_before_the_first_token(
    terminal: Callable[..., Terminal], backend: Backend
) -> None:
    def script(answer: Answer) -> None:
        answer.head()
        answer.event(progress={"stage": "queued", "done": 0, "total": 1})
        answer.event(progress={"stage": "loading", "done": 1, "total": 4})
        answer.event(progress={"stage": "prefill", "done": 512, "total": 1024})
        answer.event(progress={"stage": "prefill", "done": "a[$(id)]", "total": 1})
        answer.event(progress={"stage": "decode", "done": 0, "total": 9})
        answer.tokens("token")
        answer.done()

    backend.scripts.append(script)
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("x\r")
    screen.expect(ENTER)
    assert screen.expect("\r\x1b[Kwaiting for a free place") == ""
    assert screen.expect("\r\x1b[Kloading the model [######                  ] 25 %") == ""
    assert screen.expect("\r\x1b[Kreading the prompt [############            ] 50 %") == ""
    assert screen.expect("\r\x1b[Kreading the prompt") == ""
    assert screen.expect("token\r\n") == "\r\x1b[K"


def test_a_model_cannot_send_the_terminal_a_control_sequence(
    terminal: Callable[..., Terminal], backend: Backend
) -> None:
    backend.scripts.append(completion("a\x1b[2Jb\x07\tc\nd\x9be\0f\x7fg\r\\x1b€\\", mode="instruct"))
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("x\r")
    screen.expect(ENTER)
    clean = "a[2Jb\tc\r\ndefg\\x1b€\\\r\n["
    assert screen.expect(clean) == ""
    screen.expect(PROMPT)
    screen.type(":last\r")
    screen.expect(ENTER)
    assert screen.expect(clean[:-1]) == ""


def test_pasted_lines_are_one_prompt(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts += [completion("yes"), completion("too")]
    screen = terminal()
    screen.expect(PROMPT)
    screen.type("\x1b[200~def f():\n\tx = 1\n\x1b[201~    return\r")
    screen.expect("yes")
    screen.expect(PROMPT)
    screen.type("\x1b[A\r")
    screen.expect("too")
    assert [body["prompt"] for _, _, body in backend.requests] == ["def f():\n\tx = 1\n    return"] * 2


def test_ctrl_c_drops_what_multi_has(terminal: Callable[..., Terminal], backend: Backend) -> None:
    backend.scripts.append(completion("yes"))
    screen = terminal()
    screen.expect(PROMPT)
    screen.type(":multi\r")
    screen.expect("... ")
    screen.type("one\r")
    screen.expect("one\r\n")  # Return draws the old prompt once more; the next one says that Ctrl-C is a key again
    screen.expect("... ")
    screen.type("two\x03")
    screen.expect(PROMPT)
    screen.type("three\r")
    screen.expect("yes")
    assert [body["prompt"] for _, _, body in backend.requests] == ["three"]


# ----------------------------------------------------------------------------------------------- key


def keygen(*args: str) -> tuple[int, str, str]:
    result = subprocess.run([KEYGEN, *args], capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    return result.returncode, result.stdout, result.stderr


def test_a_key_is_32_random_bytes() -> None:
    keys = [keygen() for _ in range(5)]
    assert all(code == 0 and not err and re.fullmatch(r"[A-Za-z0-9_-]{43}\n", out) for code, out, err in keys)
    assert len({out for _, out, _ in keys}) == 5


ENV_FILES = [  # before, after (K is the key)
    (None, "CEREBRUM_API_KEY=K\n"),
    ("", "CEREBRUM_API_KEY=K\n"),
    ("A=1\nCEREBRUM_API_KEY=old\nB=2\n", "A=1\nCEREBRUM_API_KEY=K\nB=2\n"),
    ("A=1", "A=1\nCEREBRUM_API_KEY=K\n"),
    ("CEREBRUM_API_KEY=old", "CEREBRUM_API_KEY=K\n"),
    ("export CEREBRUM_API_KEY = 'old'\nCEREBRUM_API_KEY=two\n", "CEREBRUM_API_KEY=K\n"),
    ("# CEREBRUM_API_KEY=\n\nCEREBRUM_CM4_API_KEY=x\nX=CEREBRUM_API_KEY=\\n%s\n",
     "# CEREBRUM_API_KEY=\n\nCEREBRUM_CM4_API_KEY=x\nX=CEREBRUM_API_KEY=\\n%s\nCEREBRUM_API_KEY=K\n"),
    ("A=\xff\r\n", "A=\xff\r\nCEREBRUM_API_KEY=K\n"),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), ENV_FILES)
def test_a_key_is_written(tmp_path: Path, before: str | None, after: str) -> None:
    path = tmp_path / ".env"
    if before is not None:
        path.write_bytes(before.encode("latin-1"))
        path.chmod(0o644)
    assert keygen("--write", str(path)) == (0, f"CEREBRUM_API_KEY set in: {path}\n", "")
    text = path.read_bytes().decode("latin-1")
    assert re.sub(r"(?m)^(CEREBRUM_API_KEY=)[A-Za-z0-9_-]{43}$", r"\1K", text) == after
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == [".env"]


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
        (["good", "."], ".: not a regular file"),
    ],
)
def test_one_bad_path_changes_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good").write_text("CEREBRUM_API_KEY=old\n")
    code, out, err = keygen("--write", *paths)
    assert (code, out, err) == (1 if paths else 2, "", f"generate_api_key.sh: {said}\n")
    assert Path("good").read_text() == "CEREBRUM_API_KEY=old\n"
    assert os.listdir() == ["good"]
