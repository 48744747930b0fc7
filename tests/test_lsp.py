"""The language server: bytes on its stdin and stdout, and a scripted Pi. Real editors: tests/pi/test_lsp_clients.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
from harness import PATIENCE, ROOT, wait_until

import cerebrum_lsp
from cerebrum_lsp import BadSettings, Document, Settings, Suggestions, first_settings, read_settings

FILE = ROOT / "cerebrum_lsp.py"
URI = "file:///home/me/sum.py"
INVOKED, AUTOMATIC = 1, 2


class Pi(ThreadingHTTPServer):
    """A Pi that answers a POST by `answer`, once `hold` is set. `asked` has the requests, `left` one entry for each
    client that has left before its answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PiHandler)
        self.asked: Queue[tuple[str, Any, dict[str, str]]] = Queue()
        self.answer: Callable[[str, Any], tuple[int, Any]] = lambda _path, _body: (200, {"content": "a + b"})
        self.hold = threading.Event()
        self.hold.set()
        self.left: Queue[bool] = Queue()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_: Any) -> None:
        """A client has left, as some tests want it to."""


class PiHandler(BaseHTTPRequestHandler):
    server: Pi

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.put((self.path, body, dict(self.headers)))
        while not self.server.hold.wait(0.002):
            self.connection.setblocking(False)
            try:
                if self.connection.recv(1) == b"":
                    self.server.left.put(True)
                    return
            except BlockingIOError:
                pass
            finally:
                self.connection.setblocking(True)
        status, answer = self.server.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Editor:
    """A client: sends messages to a server in a process of its own, and sorts what comes back."""

    def __init__(self, environment: dict[str, str], setup: str = "pass") -> None:
        """`setup` is run by the server before it starts."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cerebrum_lsp; {setup}"
        command = [sys.executable, "-c", f"{code}; sys.argv[:] = ['']; sys.exit(cerebrum_lsp.main())"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self.numbers = itertools.count(1)
        self.came: Queue[Any] = Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stream = self.process.stdout
        assert stream
        while line := stream.readline():
            length = int(line.split(b":")[1])
            assert stream.readline() == b"\r\n"
            self.came.put(json.loads(stream.read(length)))
        self.came.put(None)

    def write(self, data: bytes) -> None:
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, message: Any) -> None:
        data = json.dumps(message).encode()
        self.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))

    def tell(self, method: str, params: Any = None) -> None:
        self.send({"jsonrpc": "2.0", "method": method, "params": params})

    def request(self, method: str, params: Any = None) -> int:
        number = next(self.numbers)
        self.send({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        return number

    def next(self, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message that is wanted; others are dropped."""
        while True:
            message = self.came.get(timeout=PATIENCE)
            if message is None or wanted(message):
                return message

    def answer(self, number: Any) -> Any:
        return self.next(lambda message: message.get("id") == number and "method" not in message)

    def ask(self, method: str, params: Any = None) -> Any:
        answer = self.answer(self.request(method, params))
        assert "error" not in answer, answer
        return answer["result"]

    def start(self, options: Any = None, **capabilities: Any) -> Any:
        found = self.ask("initialize", {"capabilities": capabilities, "initializationOptions": options})
        self.tell("initialized", {})
        return found

    def open(self, text: str, language: str = "python", uri: str = URI) -> None:
        document = {"uri": uri, "languageId": language, "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})

    def type(self, line: int, character: int, text: str, version: int = 2) -> None:
        place = {"line": line, "character": character}
        change = {"range": {"start": place, "end": place}, "text": text}
        self.tell(
            "textDocument/didChange", {"textDocument": {"uri": URI, "version": version}, "contentChanges": [change]}
        )

    def at(self, line: int, character: int, kind: int = INVOKED, **context: Any) -> int:
        place = {"line": line, "character": character}
        return self.request(
            "textDocument/inlineCompletion",
            {"textDocument": {"uri": URI}, "position": place, "context": {"triggerKind": kind, **context}},
        )

    def ghost(self, line: int, character: int, kind: int = INVOKED) -> str:
        answer = self.answer(self.at(line, character, kind))
        return "".join(item["insertText"] for item in answer["result"]["items"])

    def stop(self) -> int:
        """Shut the server down and return its exit status."""
        self.ask("shutdown")
        self.tell("exit")
        return self.process.wait(PATIENCE)


@pytest.fixture
def pi() -> Iterator[Pi]:
    pi = Pi()
    yield pi
    pi.shutdown()


@contextlib.contextmanager
def editing(folder: Path, url: str, setup: str = "pass", **environment: str) -> Iterator[Editor]:
    editor = Editor({"CEREBRUM_URL": url, "XDG_CONFIG_HOME": str(folder), "HOME": str(folder), **environment}, setup)
    try:
        yield editor
    finally:
        with editor.process as process:  # closes its pipes, and waits
            process.kill()


@pytest.fixture
def editor(pi: Pi, tmp_path: Path) -> Iterator[Editor]:
    with editing(tmp_path, pi.url) as editor:
        yield editor


# --------------------------------------------------------------------------------------------- ghost text


def test_ghost_text(editor: Editor, pi: Pi) -> None:
    assert editor.start()["capabilities"] == {
        "positionEncoding": "utf-16",
        "textDocumentSync": {"openClose": True, "change": 2},
        "inlineCompletionProvider": {},
        "executeCommandProvider": {"commands": ["cerebrum.accepted", "cerebrum.instruct"]},
    }
    editor.open("def add(a, b):\r\n    return \r\n")
    place = {"line": 1, "character": 11}
    command = {"title": "accepted", "command": "cerebrum.accepted", "arguments": [{"characters": 5}]}
    item = {"insertText": "a + b", "range": {"start": place, "end": place}, "command": command}
    assert editor.answer(editor.at(1, 11))["result"] == {"items": [item]}
    path, body, headers = pi.asked.get(timeout=PATIENCE)
    assert (path, headers.get("Authorization")) == ("/infill", None)
    assert body == {
        "input_prefix": "def add(a, b):\n    return ", "input_suffix": "\n", "filename": "sum.py", "n_predict": 128,
        "t_max_prompt_ms": 0, "t_max_predict_ms": 1500, "cache_prompt": True,
    }  # fmt: skip


def test_what_is_typed_of_a_suggestion_asks_nothing(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    assert editor.ghost(0, 4) == "a + b"
    editor.type(0, 4, "a +")
    assert editor.ghost(0, 7, AUTOMATIC) == " b"
    assert pi.asked.qsize() == 1
    editor.type(0, 7, "c", 3)
    assert editor.ghost(0, 8, AUTOMATIC) == "a + b"
    assert pi.asked.qsize() == 2


def test_who_asks_where_nothing_was_suggested_asks_the_pi(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    pi.answer = lambda *_: (200, {"content": ""})
    assert [editor.ghost(0, 4, AUTOMATIC), editor.ghost(0, 4, AUTOMATIC), pi.asked.qsize()] == ["", "", 1]
    pi.answer = lambda *_: (200, {"content": "1"})
    assert editor.ghost(0, 4, INVOKED) == "1"


def test_the_editors_menu_counts_as_typed(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x.pr")
    chosen = {"text": "print", "range": {"start": {"line": 0, "character": 2}, "end": {"line": 0, "character": 4}}}
    (item,) = editor.answer(editor.at(0, 4, INVOKED, selectedCompletionInfo=chosen))["result"]["items"]
    assert (item["insertText"], item["range"]) == ("printa + b", chosen["range"])
    assert pi.asked.get(timeout=PATIENCE)[1]["input_prefix"] == "x.print"


def test_a_newer_automatic_request_ends_one_that_waits(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    older, newer = editor.at(0, 3, AUTOMATIC), editor.at(0, 2, AUTOMATIC)
    assert editor.answer(older)["result"] == {"items": []}
    assert editor.answer(newer)["result"]["items"][0]["insertText"] == "a + b"


def test_an_automatic_request_reads_for_a_limited_time(editor: Editor, pi: Pi) -> None:
    editor.start({"read_ms": 250})
    editor.open("x = ")
    assert editor.ghost(0, 4, AUTOMATIC) == "a + b"
    assert pi.asked.get(timeout=PATIENCE)[1]["t_max_prompt_ms"] == 250


def test_a_language_that_is_off(editor: Editor, pi: Pi) -> None:
    editor.start({"off": ["markdown"]})
    editor.open("# Notes", "markdown")
    assert editor.ghost(0, 7) == ""
    assert pi.asked.empty()


def test_a_completion_for_a_client_without_ghost_text(editor: Editor, pi: Pi) -> None:
    found = editor.start({"completion": True})
    assert "." in found["capabilities"]["completionProvider"]["triggerCharacters"]
    editor.open("é.va")
    pi.answer = lambda *_: (200, {"content": "lue\n"})
    asked: dict[str, Any] = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 4}}
    (item,) = editor.ask("textDocument/completion", asked)["items"]
    start, end = {"line": 0, "character": 2}, {"line": 0, "character": 4}
    assert item["textEdit"] == {"range": {"start": start, "end": end}, "newText": "value\n"}
    assert (item["label"], item["filterText"]) == ("value", "value\n")
    asked["position"]["character"] = 99
    (item,) = editor.ask("textDocument/completion", asked)["items"]
    assert item["textEdit"]["range"] == {"start": start, "end": end}
    editor.open("a" * 200_000)
    asked = {"textDocument": {"uri": URI}, "position": {"line": 0, "character": 200_000}}
    (item,) = editor.ask("textDocument/completion", asked)["items"]
    assert item["textEdit"]["range"]["start"] == {"line": 0, "character": 200_000 - cerebrum_lsp.MAX_WORD}


def test_a_request_that_the_user_made_is_not_ended_by_a_newer_one(editor: Editor, pi: Pi) -> None:
    assert (cerebrum_lsp.Call(1).is_waiting, cerebrum_lsp.Call(2, pause=0.1).is_waiting) == (False, True)
    editor.start()
    editor.open("x = ")
    pi.hold.clear()
    numbers = {editor.at(0, 4), editor.at(0, 3)}
    for _ in numbers:
        pi.asked.get(timeout=PATIENCE)
    pi.hold.set()
    came = [editor.next() for _ in numbers]
    assert {one["id"] for one in came} == numbers
    assert [one["result"]["items"][0]["insertText"] for one in came] == ["a + b"] * 2


def test_a_suggestion_is_kept_for_its_place_alone() -> None:
    kept = Suggestions()
    gap = cerebrum_lsp.Gap(URI, "x = ", "\n")
    kept.add(gap, "a + b", 2.0)
    rests = [("x = ", "\n"), ("x = a ", "\n"), ("x = a + b", "\n"), ("x = b", "\n"), ("x = ", ""), ("x =", "\n")]
    expected = ["a + b", "+ b", None, None, None, None]
    assert [kept.rest(cerebrum_lsp.Gap(URI, *around)) for around in rests] == expected
    assert kept.rest(cerebrum_lsp.Gap("file:///other", "x = ", "\n")) is None


def test_suggestions_for_a_large_file_take_little_memory() -> None:
    kept, large = Suggestions(), "é" * 1_000_000
    tracemalloc.start()
    try:
        for number in range(Suggestions.MAX_FOUND):
            kept.add(cerebrum_lsp.Gap(URI, f"{large}{number}", f"{number}{large}"), "a + b", 1.0)
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
    assert kept.rest(cerebrum_lsp.Gap(URI, f"{large}0a +", f"0{large}")) == " b"
    assert kept.rest(cerebrum_lsp.Gap(URI, f"{large}0a +", f"1{large}")) is None


@pytest.mark.parametrize(("seconds", "pause"), [(0.02, 0.03), (0.5, 0.1), (30.0, 0.4)])
def test_the_pause_follows_the_response_time(seconds: float, pause: float) -> None:
    kept = Suggestions()
    for _ in range(8):
        kept.add(cerebrum_lsp.Gap(URI, "", ""), "", seconds)
    assert kept.pause() == pytest.approx(pause)


def test_a_long_text_begins_at_the_same_place_for_many_keys() -> None:
    text = "".join(f"{number:09}\n" for number in range(30_000))
    most, step = cerebrum_lsp.MAX_BODY_TEXT, cerebrum_lsp.MAX_BODY_TEXT // 4
    ends = most, most + 1, most + step - 1, most + step, most + step + 1
    sent = [cerebrum_lsp.sent(cerebrum_lsp.Gap(URI, text[:end], text)) for end in ends]
    begins = [text.index(before[:10]) for before, _ in sent]
    assert begins == [0, step, step, step, 2 * step]
    assert [before for before, _ in sent] == [text[start:end] for start, end in zip(begins, ends, strict=True)]
    assert {after for _, after in sent} == {text[:most]}


# --------------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_request_frees_the_pi(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    pi.hold.clear()
    number = editor.at(0, 4)
    pi.asked.get(timeout=PATIENCE)
    editor.tell("$/cancelRequest", {"id": number})
    assert editor.answer(number)["error"] == {"code": -32800, "message": "cancelled"}
    pi.left.get(timeout=PATIENCE)
    editor.tell("$/cancelRequest", {"id": number})  # it has been answered
    editor.tell("$/cancelRequest", {"id": [1]})
    pi.hold.set()
    assert editor.ghost(0, 4) == "a + b"


def test_a_request_that_waits_is_cancelled(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    number = editor.at(0, 4, AUTOMATIC)
    editor.tell("$/cancelRequest", {"id": number})
    assert editor.answer(number)["error"]["code"] == -32800
    assert editor.ghost(0, 4) == "a + b"
    assert pi.asked.qsize() == 1


def test_cancelling_does_not_wait_for_a_connection(pi: Pi, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as stack:
        for _ in range(2):  # fill its queue: who connects now waits
            full = stack.enter_context(socket.socket())
            full.setblocking(False)
            full.connect_ex(deaf.getsockname())
        editor = stack.enter_context(editing(tmp_path, f"http://127.0.0.1:{deaf.getsockname()[1]}"))
        editor.start()
        editor.open("x = ")
        number = editor.at(0, 4)
        begin = time.monotonic()
        editor.tell("$/cancelRequest", {"id": number})
        assert editor.answer(number)["error"]["code"] == -32800
        assert time.monotonic() - begin < cerebrum_lsp.CONNECT_SECONDS


# ----------------------------------------------------------------------------------------------- commands


def test_an_accepted_text_is_counted(editor: Editor, pi: Pi) -> None:
    editor.start()
    pi.answer = lambda *_: (200, {"accepted": 1})
    done = {"command": "cerebrum.accepted", "arguments": [{"characters": 12}]}
    assert editor.ask("workspace/executeCommand", done) is None
    path, body, _ = pi.asked.get(timeout=PATIENCE)
    assert (path, body) == ("/v1/accepted", {"characters": 12})


def test_an_accepted_text_that_cannot_be_counted_is_no_news(editor: Editor, pi: Pi) -> None:
    editor.start()
    pi.answer = lambda *_: (404, {"message": "no such path"})
    done = {"command": "cerebrum.accepted", "arguments": [{"characters": 12}]}
    assert editor.ask("workspace/executeCommand", done) is None


INSTRUCTED = {"uri": URI, "instruction": "rename a to total",
              "range": {"start": {"line": 1, "character": 0}, "end": {"line": 2, "character": 0}}}  # fmt: skip


def instructed(text: Any, reason: str = "stop", kept: Any = ("all",)) -> Callable[[str, Any], tuple[int, Any]]:
    return lambda *_: (200, {"completion": text, "finish_reason": reason, "kept": {"parts": kept}})


def instruct(editor: Editor, text: str, start: tuple[int, int], end: tuple[int, int]) -> tuple[str | None, str | None]:
    """The text that the editor gets in place of the selection, or why there is none."""
    editor.start()
    editor.open(text)
    given = INSTRUCTED | {"range": cerebrum_lsp.span(start, end)}
    number = editor.request("workspace/executeCommand", {"command": "cerebrum.instruct", "arguments": [given]})
    came = editor.next(lambda message: message.get("method") == "workspace/applyEdit" or message.get("id") == number)
    if "error" in came:
        return None, came["error"]["message"]
    (edit,) = came["params"]["edit"]["changes"][URI]
    return edit["newText"], None


@pytest.mark.parametrize("versions", [True, False])
def test_an_instruction_changes_the_selection(editor: Editor, pi: Pi, versions: bool) -> None:
    editor.start(None, workspace={"workspaceEdit": {"documentChanges": versions}})
    editor.open("let b\na=1\nb=2\n", "javascriptreact")
    pi.answer = instructed("total=1")
    number = editor.request("workspace/executeCommand", {"command": "cerebrum.instruct", "arguments": [INSTRUCTED]})
    asked = editor.next(lambda message: message.get("method") == "workspace/applyEdit")
    edits = [{"range": INSTRUCTED["range"], "newText": "total=1\n"}]
    changes = [{"textDocument": {"uri": URI, "version": 1}, "edits": edits}]
    assert asked["params"]["edit"] == ({"documentChanges": changes} if versions else {"changes": {URI: edits}})
    editor.send({"jsonrpc": "2.0", "id": asked["id"], "result": {"applied": True}})
    assert editor.answer(number)["result"] is None
    path, body, _ = pi.asked.get(timeout=PATIENCE)
    assert path == "/v1/complete"
    assert body == {
        "prompt": "a=1\n", "instruction": "rename a to total", "language": "javascript", "max_tokens": 2048,
        "temperature": 0.0,
    }  # fmt: skip


def test_an_instruction_never_overwrites_a_newer_text(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x\na\nb\n")
    pi.answer = instructed("total\n")
    pi.hold.clear()
    number = editor.request("workspace/executeCommand", {"command": "cerebrum.instruct", "arguments": [INSTRUCTED]})
    pi.asked.get(timeout=PATIENCE)
    editor.type(0, 0, "y")
    assert "error" in editor.answer(editor.request("made/up"))  # so the change has been read
    pi.hold.set()
    error = editor.answer(number)["error"]
    assert error == {"code": -32803, "message": "the text has changed meanwhile; nothing was changed"}


def test_an_instruction_takes_a_range_backwards_and_says_if_the_editor_refuses(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x\r\na\r\nb\r\n")
    pi.answer = instructed("total")
    backwards = INSTRUCTED | {"range": {"start": INSTRUCTED["range"]["end"], "end": INSTRUCTED["range"]["start"]}}
    editor.request("workspace/executeCommand", {"command": "cerebrum.instruct", "arguments": [backwards]})
    asked = editor.next(lambda message: message.get("method") == "workspace/applyEdit")
    assert pi.asked.get(timeout=PATIENCE)[1]["prompt"] == "a\n"
    edit = {"range": INSTRUCTED["range"], "newText": "total\r\n"}
    assert asked["params"]["edit"] == {"changes": {URI: [edit]}}
    editor.send({"jsonrpc": "2.0", "id": asked["id"], "result": {"applied": False}})
    assert editor.next(shown)["params"]["message"] == "Cerebrum: the editor did not apply the change"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (instructed("tot", "length"), "the answer is longer than 2048 tokens"),
        (instructed("tot", "repeat"), "the model began to repeat itself"),
        (instructed("tot", "replaced"), "the answer broke off"),
        (instructed("total\n", kept=["imports", "window"]), "the text is too long for the model"),
        (instructed("total\n", kept=None), "the text is too long for the model"),
        (instructed(""), "the answer is empty"),
        (instructed(" \n\n", "block"), "the answer is empty"),
    ],
)
def test_an_answer_that_may_lack_code_replaces_nothing(editor: Editor, pi: Pi, answer: Any, reason: str) -> None:
    pi.answer = answer
    assert instruct(editor, "x\na\nb\n", (1, 0), (2, 0)) == (None, f"{reason}; nothing was changed")


@pytest.mark.parametrize(
    ("text", "start", "end", "answer", "changed"),
    [
        ("x = add(a, b) + 1\n", (0, 4), (0, 13), "foo(a, b)\n", "foo(a, b)"),  # a part of a line stays one
        ("x\na\n\n\ny\n", (1, 0), (4, 0), "total", "total\n\n\n"),
        ("x\na\ny\n", (1, 0), (2, 0), "total\n\n", "total\n"),
        ("x\na", (1, 0), (1, 1), "total\n", "total"),
        ("x\r\na\r\nb\r\ny\r\n", (1, 0), (3, 0), "total\nb\n", "total\r\nb\r\n"),
        ("x\r\na\r\ny\r\n", (1, 0), (1, 1), "total\r\nb\n", "total\r\nb"),  # no line end selected: those of the file
        ("x\r\na\nb\ny\n", (1, 0), (3, 0), "total\nb", "total\nb\n"),
        ("x\ry\r", (0, 0), (1, 0), "a\nb\n", "a\rb\r"),
    ],
)
def test_a_changed_selection_keeps_its_line_ends(
    editor: Editor, pi: Pi, text: str, start: tuple[int, int], end: tuple[int, int], answer: str, changed: str
) -> None:
    pi.answer = instructed(answer)
    assert instruct(editor, text, start, end) == (changed, None)


# --------------------------------------------------------------------------------- a Pi that does not help


def shown(message: Any) -> bool:
    return bool(message.get("method") == "window/showMessage")


def test_away_is_told_once(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    pi.answer = lambda *_: (503, {"error": {"message": "no backend"}})
    number = editor.at(0, 4, AUTOMATIC)
    assert editor.next(shown)["params"] == {"type": 2, "message": "Cerebrum: the Pi answers 503: no backend"}
    assert editor.answer(number)["result"] == {"items": []}
    assert editor.ghost(0, 4, AUTOMATIC) == ""
    assert pi.asked.qsize() == 1
    pi.answer = lambda *_: (200, {"content": "1"})
    assert editor.ghost(0, 4) == "1"
    assert editor.ghost(0, 3, AUTOMATIC) == "1"


def test_it_comes_back_by_itself(pi: Pi, tmp_path: Path) -> None:
    with editing(tmp_path, pi.url, "cerebrum_lsp.AWAY_SECONDS = 0.05") as editor:
        editor.start()
        editor.open("x = ")
        pi.answer = lambda *_: (503, {"error": {"message": "no backend"}})
        assert editor.ghost(0, 4, AUTOMATIC) == ""
        pi.answer = lambda *_: (200, {"content": "1"})
        wait_until(lambda: editor.ghost(0, 4, AUTOMATIC) == "1", "the server asks again")
        assert editor.came.empty()


def test_a_pi_that_is_off_is_told_once_and_again_if_the_user_asks(pi: Pi, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    with editing(tmp_path, f"http://127.0.0.1:{port}") as editor:
        editor.start()
        editor.open("x = ")
        expected = "Cerebrum: the Pi at 127.0.0.1 does not answer (Connection refused)"
        for kind in (AUTOMATIC, AUTOMATIC, INVOKED):
            number = editor.at(0, 4, kind)
            messages = [editor.next() for _ in range(1 if kind == AUTOMATIC and number > 2 else 2)]
            assert [one["params"]["message"] for one in messages if shown(one)] == [expected] * (len(messages) - 1)
            assert messages[-1]["result"] == {"items": []}


def test_a_connection_that_fails_is_news_even_after_a_cancellation() -> None:
    """Who types on cancels at each key, and would never hear of it."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        settings = Settings(url=f"http://127.0.0.1:{gone.getsockname()[1]}")
    job = cerebrum_lsp.Call(1)
    job.end()
    with pytest.raises(cerebrum_lsp.PiError, match="does not answer"):
        cerebrum_lsp.Pi(settings, cerebrum_lsp.Client(BytesIO())).ask(job, "/infill", {})


def test_a_busy_pi_is_no_news(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    pi.answer = lambda *_: (429, {"error": {"message": "busy"}})
    number = editor.at(0, 4)
    assert editor.next() == {"jsonrpc": "2.0", "id": number, "result": {"items": []}}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {"text": "a"}), "expected a completion, got another answer: the url is perhaps not the Pi's"),
        ((200, [1]), "expected the Pi at 127.0.0.1, got an answer that is not JSON"),
        ((401, {"error": {"message": "expected a key"}}), "the Pi answers 401: expected a key"),
    ],
)
def test_what_is_no_pi_is_told(editor: Editor, pi: Pi, answer: tuple[int, Any], message: str) -> None:
    editor.start()
    editor.open("x = ")
    pi.answer = lambda *_: answer
    number = editor.at(0, 4)
    assert editor.next()["params"]["message"] == "Cerebrum: " + message.format(port=pi.server_address[1])
    assert editor.answer(number)["result"] == {"items": []}


# ------------------------------------------------------------------------------------------- the protocol


def test_bad_input_gets_the_protocols_error_and_the_server_lives(editor: Editor, pi: Pi) -> None:
    number = editor.at(0, 0)
    message = "expected initialize, got textDocument/inlineCompletion"
    assert editor.next() == {"jsonrpc": "2.0", "id": number, "error": {"code": -32002, "message": message}}
    editor.tell("textDocument/didOpen", 5)  # before initialize: dropped
    editor.start()
    editor.write(b"Content-Length: 3\r\n\r\n{x}")
    assert editor.next()["error"] == {"code": -32700, "message": "expected JSON in UTF-8"}
    editor.write(b"Content-Length: 2\r\n\r\n\xff\xff")
    assert editor.next()["error"]["code"] == -32700
    editor.write(b"content-length:2\r\nContent-Type: application/vscode-jsonrpc; charset=utf-8\r\n\r\n[]")
    assert editor.next()["error"] == {"code": -32600, "message": "expected a JSON object, got a list"}
    editor.send({"jsonrpc": "2.0", "id": True, "method": "shutdown"})
    assert editor.next()["error"]["code"] == -32600
    editor.send({"jsonrpc": "2.0", "id": 9, "method": 3})
    answer = editor.next()
    assert (answer["id"], answer["error"]["code"]) == (9, -32600)
    for header in (b"X: 1", b"Content-Length: abc", b"Content-Length: 12345678901"):
        editor.write(header + b"\r\n\r\n" + b'{"id": 1, "method": "x"}')
        assert editor.next()["error"] == {"code": -32700, "message": "expected the header Content-Length"}
    assert editor.answer(editor.request("workspace/symbol", {}))["error"]["code"] == -32601
    assert editor.answer(editor.request("initialize", {}))["error"]["code"] == -32600
    editor.open("x = ")
    for params, message in [
        (None, "expected text for textDocument.uri, got null"),
        ({"textDocument": {"uri": "file:///b"}, "position": {}}, "expected a document that is open"),
        ({"textDocument": {"uri": URI}, "position": {"line": -1, "character": 0}},
         "expected numbers of 0 or more for position, got -1"),
        ({"textDocument": {"uri": URI}, "position": {"line": 1.5, "character": 0}},
         "expected a whole number for line, got a number"),
    ]:  # fmt: skip
        number = editor.request("textDocument/inlineCompletion", params)
        assert editor.answer(number)["error"] == {"code": -32602, "message": message}
    for method in ("workspace/didChangeWatchedFiles", "$/setTrace", "textDocument/didSave", "made/up"):
        editor.tell(method, {"anything": 1})
    assert editor.ghost(0, 4) == "a + b"
    editor.tell("textDocument/didChange", {"textDocument": {"uri": URI}, "contentChanges": [{"text": 5}]})
    assert "expected text for text, got a whole number" in editor.next()["params"]["message"]
    assert editor.answer(editor.at(0, 4))["error"]["message"] == "expected a document that is open"
    assert editor.stop() == 0


def test_messages_come_in_any_pieces(editor: Editor, pi: Pi) -> None:
    editor.start()
    document = {"uri": URI, "languageId": "python", "version": 1, "text": "語 = "}
    opening = {"jsonrpc": "2.0", "method": "textDocument/didOpen", "params": {"textDocument": document}}
    data = json.dumps(opening, ensure_ascii=False).encode()
    for byte in b"Content-Length: %d\r\n\r\n%s" % (len(data), data):
        editor.write(bytes([byte]))
    assert editor.ghost(0, 4) == "a + b"
    assert pi.asked.get(timeout=PATIENCE)[1]["input_prefix"] == "語 = "


@pytest.mark.parametrize("end", ["exit", "close"])
def test_without_shutdown_the_status_is_1(editor: Editor, end: str) -> None:
    editor.start()
    if end == "exit":
        editor.tell("exit")
    else:
        assert editor.process.stdin
        editor.process.stdin.close()
    assert editor.process.wait(PATIENCE) == 1


def test_after_shutdown_nothing_is_served(editor: Editor, pi: Pi) -> None:
    editor.start()
    editor.open("x = ")
    pi.hold.clear()
    number = editor.at(0, 4)
    pi.asked.get(timeout=PATIENCE)
    stopped = editor.request("shutdown")
    assert editor.answer(number)["error"]["code"] == -32800
    assert editor.answer(stopped)["result"] is None
    assert editor.answer(editor.at(0, 4))["error"]["code"] == -32600
    editor.tell("exit")
    assert editor.process.wait(PATIENCE) == 0


# ----------------------------------------------------------------------------------------------- settings


def test_settings_come_from_the_file_the_environment_and_the_client(pi: Pi, tmp_path: Path) -> None:
    folder = tmp_path / "cerebrum"
    folder.mkdir()
    (folder / "lsp.toml").write_text(f'url = "{pi.url}/"\ntokens = 7\nkey = "of-the-file"\n')
    with editing(tmp_path, pi.url) as editor:
        editor.start({"tokens": 9})
        editor.open("x = ")
        editor.ghost(0, 4)
        _, body, headers = pi.asked.get(timeout=PATIENCE)
        assert (body["n_predict"], headers["Authorization"]) == (9, "Bearer of-the-file")
        editor.tell("workspace/didChangeConfiguration", {"settings": {"cerebrum": {"tokens": 11}, "python": {}}})
        editor.type(0, 4, "!")
        editor.ghost(0, 5)
        assert pi.asked.get(timeout=PATIENCE)[1]["n_predict"] == 11
        editor.tell("workspace/didChangeConfiguration", {"settings": {"tokens": "many"}})
        message = "Cerebrum: expected a whole number for tokens, got text"
        assert editor.next(shown)["params"] == {"type": 1, "message": message}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"url": "http://elsewhere:7000"}, ("http://elsewhere:7000", "")),
        ({"url": "http://pi:7001"}, ("http://pi:7001", "")),
        ({"url": "http://elsewhere:7000", "key": "its-own"}, ("http://elsewhere:7000", "its-own")),
        ({"url": "http://pi:7000/"}, ("http://pi:7000/", "secret")),
        ({"tokens": 5}, ("http://pi:7000", "secret")),
    ],
)
def test_a_key_goes_only_to_the_url_that_it_came_with(given: Any, expected: tuple[str, str]) -> None:
    found = read_settings(given, Settings("http://pi:7000", "secret"))
    assert (found.url, found.key) == expected


def test_a_projects_url_gets_no_key(pi: Pi, tmp_path: Path) -> None:
    with editing(tmp_path, "http://elsewhere:1", CEREBRUM_CM4_API_KEY="secret") as editor:
        editor.start({"url": pi.url})
        editor.open("x = ")
        editor.ghost(0, 4)
        assert "Authorization" not in pi.asked.get(timeout=PATIENCE)[2]


def announce(folder: Path, *addresses: str) -> str:
    """A PATH with an avahi-browse that finds these."""
    (folder / "bin").mkdir()
    lines = ["+;eth0;IPv4;pi;_cerebrum._tcp;local", "=;eth0;IPv6;pi;_cerebrum._tcp;local;pi.local;fe80::1;7000;"]
    lines += [f"=;eth0;IPv4;pi;_cerebrum._tcp;local;{one.replace(':', ';')};" for one in addresses]
    tool = folder / "bin/avahi-browse"
    tool.write_text("#!/bin/sh\ntest \"$*\" = '-prt _cerebrum._tcp' && cat <<'END'\n" + "\n".join([*lines, "END\n"]))
    tool.chmod(0o755)
    return f"{tool.parent}:/usr/bin:/bin"


def test_a_pi_that_avahi_finds_is_asked(pi: Pi, tmp_path: Path) -> None:
    address = pi.url.removeprefix("http://")
    with editing(tmp_path, "", PATH=announce(tmp_path, f"pi:{address}", f"pi:{address}")) as editor:
        editor.start()
        editor.open("x = ")
        number = editor.at(0, 4)
        assert editor.next(shown)["params"] == {
            "type": 3,
            "message": f"Cerebrum: completions come from {pi.url}, which Avahi found",
        }
        assert editor.answer(number)["result"]["items"][0]["insertText"] == "a + b"
        assert "Authorization" not in pi.asked.get(timeout=PATIENCE)[2]


def test_a_pi_that_avahi_finds_gets_the_key_only_if_the_user_agrees(pi: Pi, tmp_path: Path) -> None:
    """Unasked, refused and left without a choice, the Pi gets neither the key nor the text."""
    path = announce(tmp_path, "pi:" + pi.url.removeprefix("http://"))
    refusal = (
        f"Cerebrum: the key is not sent to {pi.url}, which Avahi found; if that is your Pi, set url to this address"
    )
    for chosen in (None, {"title": "No"}, {"title": "Yes"}):
        with editing(tmp_path, "", PATH=path, CEREBRUM_CM4_API_KEY="secret") as editor:
            editor.start()
            editor.open("x = ")
            number = editor.at(0, 4)
            question = editor.next(lambda message: message.get("method") == "window/showMessageRequest")
            assert question["params"] == {
                "type": 3,
                "message": f"Cerebrum: send the key to {pi.url}, which Avahi found?",
                "actions": [{"title": "Yes"}, {"title": "No"}],
            }
            assert editor.answer(number)["result"] == {"items": []}
            editor.send({"jsonrpc": "2.0", "id": question["id"], "result": chosen})
            if chosen != {"title": "Yes"}:
                assert editor.next(shown)["params"] == {"type": 2, "message": refusal}
                assert editor.ghost(0, 4) == ""  # and nothing is asked again
                assert (editor.came.empty(), pi.asked.empty()) == (True, True)
            else:
                assert editor.ghost(0, 4) == "a + b"
                assert pi.asked.get(timeout=PATIENCE)[2]["Authorization"] == "Bearer secret"


def test_where_avahi_finds_no_pi_or_several(pi: Pi, tmp_path: Path) -> None:
    """This machine is asked, or the user chooses. With a url of the settings nobody looks."""
    found = ["pi:192.0.2.7:7000", "desk:192.0.2.8:7001"]
    several = "Cerebrum: found http://192.0.2.7:7000 and http://192.0.2.8:7001; the setting url chooses one"
    for name, addresses, url, said in [
        ("none", [], "", None),
        ("several", found, "", several),
        ("set", found, pi.url, None),
    ]:
        (folder := tmp_path / name).mkdir()
        here = f"cerebrum_lsp.LOCAL = {pi.url!r}"
        with editing(folder, url, here, PATH=announce(folder, *addresses), CEREBRUM_CM4_API_KEY="k") as editor:
            editor.start()
            editor.open("x = ")
            number = editor.at(0, 4)
            if said:
                assert editor.next(shown)["params"]["message"] == said
            assert bool(editor.answer(number)["result"]["items"]) == (said is None)
            assert editor.came.empty()


def test_https(pi: Pi, tmp_path: Path) -> None:
    """The Pi's certificate must be signed by somebody whom this machine trusts."""
    if not (openssl := shutil.which("openssl")):
        pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=pi -keyout {key} -out {certificate}"
    alternative = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([openssl, *make.split(), *alternative], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    pi.socket = context.wrap_socket(pi.socket, server_side=True)
    url = pi.url.replace("http:", "https:")
    with editing(tmp_path, url) as editor:
        editor.start()
        editor.open("x = ")
        editor.at(0, 4)
        assert "CERTIFICATE_VERIFY_FAILED" in editor.next(shown)["params"]["message"]
    with editing(tmp_path, url, SSL_CERT_FILE=str(certificate), CEREBRUM_CM4_API_KEY="secret") as editor:
        editor.start()
        editor.open("x = ")
        assert editor.ghost(0, 4) == "a + b"
        assert pi.asked.get(timeout=PATIENCE)[2]["Authorization"] == "Bearer secret"


def test_a_client_that_is_asked_for_its_settings(editor: Editor, pi: Pi) -> None:
    editor.start(None, workspace={"configuration": True})
    editor.open("x = ")
    editor.tell("workspace/didChangeConfiguration", {"settings": None})
    asked = editor.next()
    assert (asked["method"], asked["params"]) == ("workspace/configuration", {"items": [{"section": "cerebrum"}]})
    editor.send({"jsonrpc": "2.0", "id": asked["id"], "result": [{"tokens": 13}]})
    editor.ghost(0, 4)
    assert pi.asked.get(timeout=PATIENCE)[1]["n_predict"] == 13


def test_settings_of_the_environment() -> None:
    given = {"CEREBRUM_LSP_TOKENS": "64", "CEREBRUM_LSP_OFF": "markdown,text", "CEREBRUM_LSP_COMPLETION": "true"}
    environment = {
        "XDG_CONFIG_HOME": "/nowhere",
        "CEREBRUM_URL": "http://[::1]:1",
        "CEREBRUM_CM4_API_KEY": "12",
    } | given
    expected = Settings("http://[::1]:1", "12", 64, off=("markdown", "text"), completion=True)
    assert first_settings(environment) == (expected, [])
    wrong = ["the environment: expected a whole number for tokens, got text"]
    assert first_settings(environment | {"CEREBRUM_LSP_TOKENS": "many"}) == (Settings(), wrong)


@pytest.mark.parametrize("given", [None, {}, {"cerebrum": None}, {"cerebrum": {}}, {"python": 1}])
def test_no_settings(given: Any) -> None:
    assert read_settings(given, Settings(tokens=5)) == Settings(tokens=5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "expected an object of settings, got a list"),
        ({"cerebrum": 5}, "expected an object of settings, got a whole number"),
        ({"url": "http://pi local:7000"}, "expected a url such as http://pi.local:7000"),
        ({"url": "ftp://pi"}, "expected a url such as http://pi.local:7000"),
        ({"url": "http://pi:99999"}, "expected a url such as http://pi.local:7000"),
        ({"tokens": 0}, "expected tokens from 1 to 2048, got 0"),
        ({"tokens": True}, "expected a whole number for tokens, got true or false"),
        ({"read_ms": -1}, "expected read_ms of 0 or more, got -1"),
        ({"off": ["a", 1]}, "expected a list of texts for off, got a list"),
        ({"key": "a\r\nb"}, "expected a key of visible ASCII characters"),
    ],
)
def test_a_bad_setting_says_what_was_expected(given: Any, message: str) -> None:
    with pytest.raises(BadSettings) as raised:
        read_settings(given, Settings())
    assert str(raised.value) == message


def test_json_serves_where_toml_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cerebrum"
    folder.mkdir()
    (folder / "lsp.toml").write_text("tokens = 7")
    (folder / "lsp.json").write_text('{"tokens": 8}')
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert first_settings(environment) == (Settings(tokens=7), [])
    monkeypatch.setitem(sys.modules, "tomllib", None)  # as in Python 3.9
    assert first_settings(environment) == (Settings(tokens=8), [])
    (folder / "lsp.json").unlink()
    message = f"the settings in {folder}: expected lsp.json, as this Python cannot read lsp.toml; 3.11 can"
    assert first_settings(environment) == (Settings(), [message])


@pytest.mark.parametrize(
    ("text", "reason"), [("tokens = ", "expected a file of TOML or JSON"), ("tokens = 0", "expected tokens")]
)
def test_a_bad_file_is_told_and_the_rest_works(pi: Pi, tmp_path: Path, text: str, reason: str) -> None:
    folder = tmp_path / "cerebrum"
    folder.mkdir()
    (folder / "lsp.toml").write_text(text)
    with editing(tmp_path, pi.url) as editor:
        number = editor.request("initialize", {"capabilities": {}})
        assert f"the settings in {folder}: {reason}" in editor.next(shown)["params"]["message"]
        assert "result" in editor.answer(number)
        editor.open("x = ")
        assert editor.ghost(0, 4) == "a + b"


def test_the_key_is_in_no_message(pi: Pi, tmp_path: Path) -> None:
    with editing(tmp_path, pi.url, CEREBRUM_CM4_API_KEY="secret-of-the-pi") as editor:
        number = editor.request("initialize", {"capabilities": {}, "initializationOptions": {"key": ["secret"]}})
        messages = [editor.next(), editor.answer(number)]
        assert messages[0]["params"]["message"] == "Cerebrum: expected text for key, got a list"
        editor.open("x = ")
        pi.answer = lambda *_: (401, {"error": {"message": "expected a key"}})
        editor.at(0, 4)
        messages += [editor.next(), editor.next()]
        assert pi.asked.get(timeout=PATIENCE)[2]["Authorization"] == "Bearer secret-of-the-pi"
        assert editor.stop() == 0
        assert editor.process.stderr
        assert "secret" not in f"{messages} {editor.process.stderr.read()!r} {Settings(key='secret')}"


@pytest.mark.parametrize(("option", "status"), [("--help", 0), ("--version", 0), ("--port", 2)])
def test_options(option: str, status: int) -> None:
    done = subprocess.run([sys.executable, str(FILE), option], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == status
    assert done.stdout.startswith("cerebrum_lsp.py 1." if option == "--version" else "Usage: cerebrum_lsp.py")


# ------------------------------------------------------------------------------------------ the documents


def test_positions_are_in_utf_16_whatever_else_a_client_offers(editor: Editor, pi: Pi) -> None:
    found = editor.start(None, general={"positionEncodings": ["utf-8", "utf-16", 5]})
    assert found["capabilities"]["positionEncoding"] == "utf-16"
    editor.open("é語😀 = \n")
    editor.ghost(0, 6)
    assert pi.asked.get(timeout=PATIENCE)[1]["input_prefix"] == "é語😀 ="


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        ((0, 99), (0, 99), "ab!\r\n😀c"), ((9, 9), (9, 9), "ab\r\n😀c!"), ((1, 1), (1, 9), "ab\r\n!"),
        ((1, 2), (0, 1), "ab\r\n😀!c"), ((0, 2), (1, 0), "ab!😀c"),
    ],
)  # fmt: skip
def test_positions_that_are_behind_an_end_in_a_character_or_in_disorder(start: Any, end: Any, left: str) -> None:
    document = Document(URI, "python", 0, "ab\r\n😀c")
    document.edit(start, end, "!")
    assert "".join(document.lines) == left


def test_10000_edits() -> None:
    """An independent editor: a list of lines, each a list of units."""
    rng = random.Random("utf-16")
    pieces = ["a", "b ", "\n", "\r\n", "\r", "é", "語", "😀", "x\ny\nz", "\ud800", ""]
    document = Document(URI, "python", 0, "one\ntwo 😀\r\n")
    text = "".join(document.lines)
    for _ in range(10_000):
        places = []
        for _ in range(2):
            offset = rng.randint(0, len(text))
            if 0 < offset < len(text) and text[offset - 1 : offset + 1] == "\r\n":
                offset += 1
            before = text[:offset].replace("\r\n", "\n").replace("\r", "\n")
            line = before.rpartition("\n")[2]
            places.append((offset, (before.count("\n"), len(line.encode("utf-16-le", "surrogatepass")) // 2)))
        (start, first), (end, last) = sorted(places)
        if end - start > 40:
            end, last = start, first
        piece = rng.choice(pieces)
        assert document.between(first, last) == text[start:end]
        text = text[:start] + piece + text[end:]
        document.edit(first, last, piece)
        assert "".join(document.lines) == text
        if len(text) > 400:
            text = text[-200:]
            document = Document(URI, "python", 0, text)
