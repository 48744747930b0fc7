"""The language server: bytes on its stdin and stdout, and a scripted Pi. Real editors:
tests/pi/test_lsp_clients.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from typing import Any, cast

import pytest
from engines import free_port
from harness import CAPTURED, PATIENCE, ROOT, certificate, wait_until
from scripted import HANG, Backend, answer, in_a_thread
from test_scripts import wait_for

import cerebrum_lsp
from cerebrum_lsp import (
    BadSettings,
    Document,
    Gap,
    Settings,
    Suggestions,
    first_settings,
    read_settings,
    span,
)

URI = "file:///home/me/sum.py"
INVOKED, AUTOMATIC = 1, 2


class Pi(Backend):
    """A Pi that answers each request with `a + b`, unless a test says something else."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(tls=tls)
        self.says(content="a + b")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def says(self, status: int = 200, **members) -> None:
        self.scripts = [[answer(status, members)]]

    def hears(self) -> tuple[str, dict[str, Any], dict[str, str]]:
        """The path, the body and the headers of the latest request, which may be on its way."""
        wait_until(lambda: self.asked, "a request comes")
        line, headers, body = self.asked[-1]
        return line.split(" ")[1], json.loads(body), headers

    def body(self) -> dict[str, Any]:
        return self.hears()[1]

    def key(self) -> str | None:
        return self.hears()[2].get("authorization")


def cursor(line, character: int, uri=URI) -> dict[str, Any]:
    return {"textDocument": {"uri": uri}, "position": {"line": line, "character": character}}


class Editor:
    """A client: sends messages to a server in a process of its own, and sorts what comes back."""

    client: Any = None  # its name and its version
    able: Any = None  # its capabilities

    def __init__(self, environment: dict[str, str], setup: str = "pass") -> None:
        """`setup` is run by the server before it starts."""
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import cerebrum_lsp; {setup}; "
        code += "sys.argv[:] = ['']; sys.exit(cerebrum_lsp.main())"
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, "-c", code]
        self.process: Any = subprocess.Popen(command, env=environment, **pipes)
        self.numbers = itertools.count(1)
        self.came: Queue[Any] = Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        stream = self.process.stdout
        while line := stream.readline():
            length = int(line.split(b":")[1])
            assert stream.readline() == b"\r\n"
            self.came.put(json.loads(stream.read(length)))
        self.came.put(None)

    def write(self, data: bytes) -> None:
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def send(self, **members) -> None:
        data = json.dumps({"jsonrpc": "2.0", **members}, ensure_ascii=False).encode()
        self.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))

    def tell(self, method: str, params=None) -> None:
        self.send(method=method, params=params)

    def request(self, method: str, params=None) -> int:
        number = next(self.numbers)
        self.send(id=number, method=method, params=params)
        return number

    def next(self, wanted: Callable[[Any], bool] = lambda _: True) -> Any:
        """The next message that is wanted; others are dropped."""
        while True:
            message = self.came.get(timeout=PATIENCE)
            if message is None or wanted(message):
                return message

    def called(self, method: str) -> Any:
        """The next request or notification of this method."""
        return self.next(lambda message: message.get("method") == method)

    def shown(self) -> str:
        """The next message to the user."""
        message = self.called("window/showMessage")["params"]["message"]
        return str(message).removeprefix("Cerebrum: ")

    def answer(self, number) -> Any:
        return self.next(lambda message: message.get("id") == number and "method" not in message)

    def error(self, number) -> Any:
        return self.answer(number)["error"]

    def ask(self, method: str, params=None) -> Any:
        answer = self.answer(self.request(method, params))
        assert "error" not in answer, answer
        return answer["result"]

    def start(self, options=None, text: str | None = "x = ") -> Any:
        options = {"read_ahead": False, **(options or {})}
        params = {"capabilities": self.able or {}, "initializationOptions": options}
        found = self.ask("initialize", {**params, "clientInfo": self.client})
        self.tell("initialized", {})
        if text is not None:
            self.open(text)
        return found

    def open(self, text: str, language: str = "python", uri: str = URI) -> None:
        document = {"uri": uri, "languageId": language, "version": 1, "text": text}
        self.tell("textDocument/didOpen", {"textDocument": document})

    def type(self, line: int, character: int, text: str, end: int | None = None) -> None:
        """Insert a text, or replace that up to an end."""
        last = character if end is None else end
        self.change({"range": span((line, character), (line, last)), "text": text})

    def change(self, change, version: int | None = 2) -> None:
        document = {"uri": URI, "version": version}
        changed = {"textDocument": document, "contentChanges": [change]}
        self.tell("textDocument/didChange", changed)

    def configure(self, settings) -> None:
        self.tell("workspace/didChangeConfiguration", {"settings": settings})

    def at(self, line: int, character: int, kind: int = INVOKED) -> int:
        params = {**cursor(line, character), "context": {"triggerKind": kind}}
        return self.request("textDocument/inlineCompletion", params)

    def items(self, line: int, character: int, kind: int = INVOKED) -> Any:
        return self.answer(self.at(line, character, kind))["result"]["items"]

    def ghost(self, line: int, character: int, kind: int = INVOKED) -> str:
        return "".join(item["insertText"] for item in self.items(line, character, kind))

    def menu(self, line: int, character: int) -> Any:
        (item,) = self.ask("textDocument/completion", cursor(line, character))["items"]
        return item

    def command(self, name: str, argument) -> int:
        return self.request("workspace/executeCommand", {"command": name, "arguments": [argument]})

    def stop(self) -> int:
        """Shut the server down and return its exit status."""
        self.ask("shutdown")
        self.tell("exit")
        return self.process.wait(PATIENCE)


@pytest.fixture
def pi() -> Iterator[Pi]:
    with in_a_thread(Pi()) as pi:
        yield pi


@contextlib.contextmanager
def editing(folder: Path, url: str, setup: str = "pass", **environment: str) -> Iterator[Editor]:
    """An editor whose server does not read ahead, so that a test knows what the Pi is asked."""
    home = f"{folder}"
    usual = {"CEREBRUM_URL": url, "XDG_CONFIG_HOME": home, "HOME": home}
    editor = Editor(usual | environment, setup)
    try:
        yield editor
    finally:
        with editor.process as process:  # closes its pipes, and waits
            process.kill()
            editor.reader.join(PATIENCE)  # it must not read from a closed pipe


@pytest.fixture
def editor(pi: Pi, tmp_path: Path) -> Iterator[Editor]:
    with editing(tmp_path, pi.url) as editor:
        yield editor


# --------------------------------------------------------------------------------------- ghost text


ABLE = json.loads("""{
    "textDocumentSync": {"openClose": true, "change": 2},
    "executeCommandProvider": {"commands": ["cerebrum.accepted", "cerebrum.instruct"]},
    "inlineCompletionProvider": {},
    "documentHighlightProvider": false}""")
INFILL = json.loads(r"""{
    "input_prefix": "def add(é, 😀):\n    return ",
    "input_suffix": "\n",
    "filename": "sum.py",
    "language": "python",
    "n_predict": 128,
    "t_max_prompt_ms": 0,
    "t_max_predict_ms": 1500,
    "cache_prompt": true,
    "suggest": "always"}""")


def test_ghost_text(editor: Editor, pi: Pi):
    assert editor.start()["capabilities"] == ABLE
    editor.open("def add(é, 😀):\r\n    return \r\n")
    shown = {"characters": 5}
    command = {"title": "accepted", "command": "cerebrum.accepted", "arguments": [shown]}
    item = {"insertText": "a + b", "range": span((1, 11), (1, 11)), "command": command}
    assert editor.items(1, 11) == [item]
    assert pi.hears()[:2] == ("/infill", INFILL)
    assert pi.key() is None


def test_what_is_typed_of_a_suggestion_asks_nothing(editor: Editor, pi: Pi):
    """Who asks gets what the Pi has, instead of the one that is known."""
    editor.start()
    assert editor.ghost(0, 4) == "a + b"
    editor.type(0, 4, "a +")
    assert (editor.ghost(0, 7, AUTOMATIC), len(pi.asked)) == (" b", 1)
    editor.type(0, 7, " b")  # all of it
    assert (editor.ghost(0, 9, AUTOMATIC), len(pi.asked)) == ("a + b", 2)
    editor.type(0, 9, "c")
    assert (editor.ghost(0, 10, AUTOMATIC), len(pi.asked)) == ("a + b", 3)
    for kind, asked in ((AUTOMATIC, 4), (AUTOMATIC, 4), (INVOKED, 5)):
        pi.says(content="1" * (asked - 4))
        assert (editor.ghost(0, 0, kind), len(pi.asked)) == ("1" * (asked - 4), asked)


@pytest.mark.parametrize("why", ["replaced", "preempted"])
def test_a_text_that_gave_way_is_not_kept(editor: Editor, pi: Pi, why):
    editor.start()
    pi.says(content="", **{why: True})
    assert editor.ghost(0, 4, AUTOMATIC) == ""
    pi.says(content="a + b")
    assert editor.ghost(0, 4, AUTOMATIC) == "a + b"


def test_other_settings_forget_what_is_known_also_what_is_on_its_way(editor: Editor, pi: Pi):
    editor.start()
    assert editor.ghost(0, 4) == "a + b"
    go = threading.Event()
    pi.scripts = [[wait_for(go), answer(200, {"content": "old"})]]
    editor.configure({"tokens": 9})
    pi.asked.clear()
    number = editor.at(0, 4)
    assert pi.body()["n_predict"] == 9
    editor.configure({"tokens": 8})
    editor.error(editor.request("unknown"))  # so the settings have been read
    go.set()
    assert editor.answer(number)["result"]["items"][0]["insertText"] == "old"
    pi.says(content="new")
    assert editor.ghost(0, 4, AUTOMATIC) == "new"


def test_a_newer_request_ends_one_that_waits_and_none_that_the_user_made(editor: Editor, pi: Pi):
    editor.start()
    older, newer = editor.at(0, 3, AUTOMATIC), editor.at(0, 2, AUTOMATIC)
    assert editor.answer(older)["result"] == {"items": []}
    assert editor.answer(newer)["result"]["items"][0]["insertText"] == "a + b"
    # One that the user made does not wait, even before its thread runs.
    assert not cerebrum_lsp.Call(1).is_waiting


def test_a_completion_for_a_client_without_ghost_text(editor: Editor, pi: Pi):
    found = editor.start({"completion": True}, text="é.va")
    assert "." in found["capabilities"]["completionProvider"]["triggerCharacters"]
    pi.says(content="lue\n")
    item, word = editor.menu(0, 4), span((0, 2), (0, 4))
    assert item["textEdit"] == {"range": word, "newText": "value\n"}
    assert (item["label"], item["filterText"]) == ("value", "value\n")
    assert editor.menu(0, 99)["textEdit"]["range"] == word
    editor.open("é.va\r\nx")
    assert editor.menu(0, 4)["textEdit"]["newText"] == "value\r\n"
    assert editor.ghost(0, 4) == "lue\n"


def test_the_pause_follows_the_response_time() -> None:
    kept = Suggestions()
    for seconds, pause in ((0.02, 0.03), (0.5, 0.1), (30.0, 0.4)):
        for _ in range(8):
            kept.add(Gap(URI, "", ""), "a", seconds)
        assert kept.pause(Gap(URI, "", "")) == pytest.approx(pause)
        assert kept.pause(Gap(URI, "a", "")) == 0.001  # it was taken


# An edit (what it is, its first column, its last, its text), the cursor, and what is shown there
# unasked.
QUIET = json.loads("""[
    ["first", 0, 0, "x = ", 4, "a + b"],
    ["over what was shown: once", 4, 4, "c", 5, "a + b"],
    ["deleted", 4, 5, "", 4, ""],
    ["typed again", 4, 4, "c", 5, "a + b"],
    ["over a selection", 4, 5, "d", 5, "a + b"],
    ["all is deleted", 0, 5, "", 0, ""],
    ["the same text", 0, 0, "x = ", 4, "a + b"],
    ["over what was shown: twice", 4, 4, "c", 5, "a + b"],
    ["two are deleted", 3, 5, "", 3, ""],
    ["one is typed again", 3, 3, " ", 4, ""],
    ["the beginning of what was hidden", 4, 4, "a", 5, ""]]""")


def test_what_is_not_shown_unasked(editor: Editor, pi: Pi):
    editor.start(text="\nx = ")
    for edit, first, last, text, character, shown in QUIET:
        editor.type(0, first, text, last)
        assert (edit, editor.ghost(0, character, AUTOMATIC)) == (edit, shown)
    assert editor.ghost(0, 5) == "a + b"
    assert editor.ghost(1, 4, AUTOMATIC) == "a + b"  # another line
    editor.type(0, 0, "y")
    assert editor.ghost(0, 6, AUTOMATIC) == "a + b"  # another text before it
    asked = len(pi.asked)
    editor.type(0, 0, "", 1)
    assert (editor.ghost(0, 0, AUTOMATIC), len(pi.asked)) == ("", asked)
    assert editor.ghost(0, 0) == "a + b"
    assert editor.ghost(1, 3, AUTOMATIC) == "a + b"  # elsewhere
    editor.change({"text": ""})  # without a range
    assert editor.ghost(0, 9, AUTOMATIC) == "a + b"


def test_a_long_text_begins_at_the_same_place_for_many_keys() -> None:
    text = "".join(map(str, range(60_000)))
    most, step = 80_000, 20_000
    begins = {50_000: 0, most: 0, most + 1: step, most + step: step, most + step + 1: 2 * step}
    for end, begin in begins.items():
        assert cerebrum_lsp.clip(Gap(URI, text[:end], text)) == (text[begin:end], text[:most])


# ------------------------------------------------------------------------------- what is never sent

GLOBS = json.loads((ROOT / "tests/vscode/globs.json").read_text())  # of the extension's tests, too


def test_globs_mean_what_they_mean_in_the_extension() -> None:
    package = json.loads((ROOT / "vscode/package.json").read_text())
    setting = package["contributes"]["configuration"]["properties"]["cerebrum.exclude"]
    assert list(Settings().exclude) == setting["default"]
    for glob, excluded, sent in GLOBS:
        found = [path for path in [*excluded, *sent] if cerebrum_lsp.matches(glob, path)]
        assert (glob, found) == (glob, excluded)


SECRETS = [
    "file:///w/.env",
    "file:///c%3A/Users/a/.ssh/ID_rsa",
    "file:///w/%2Eaws/a/b",
    "untitled:.env",
]


def test_an_excluded_text_is_never_sent(editor: Editor, pi: Pi):
    editor.start({"completion": True})
    message = "this text is never sent; the setting exclude has the names of files"
    for uri in SECRETS:
        editor.open("x = ", uri=uri)
        for method in ("inlineCompletion", "completion"):
            assert editor.ask(f"textDocument/{method}", cursor(0, 4, uri))["items"] == []
        number = editor.command("cerebrum.instruct", SELECTED | {"uri": uri})
        assert editor.error(number) == {"code": -32803, "message": message}
    assert not pi.asked
    editor.configure({"exclude": ["*.py"]})
    assert editor.items(0, 4) == []
    editor.configure({"exclude": []})
    assert editor.ghost(0, 4) == "a + b"


# --------------------------------------------------------------------- reading before the first key


class Desk(Editor):
    """An editor whose server is in this process. What waits until the cursor stays waits until the
    test says so.
    """

    def __init__(self, pi: Pi, patch, client=None, **settings) -> None:
        self.pi, self.client = pi, client
        self.pauses = list[float]()  # before requests, since the Pi's were last looked at
        self.rested = threading.Event()
        self.others = {*threading.enumerate()}
        wait = cerebrum_lsp.Call.wait

        def wait_too(call: cerebrum_lsp.Call) -> None:
            if call.lane != cerebrum_lsp.READING:
                self.pauses.append(call.pause)
            else:
                assert self.rested.wait(PATIENCE)
            wait(call)

        patch(cerebrum_lsp.Call, "wait", wait_too)
        patch(cerebrum_lsp, "READ_DELAY_SECONDS", 0.001)
        self.numbers, self.came = itertools.count(1), Queue()
        client = cerebrum_lsp.Client(cast(Any, self))
        self.server = cerebrum_lsp.Session(client, Settings(url=pi.url), [])
        self.able = self.start({"read_ahead": True, **settings}, None)["capabilities"]

    def write(self, data: bytes) -> None:
        """A message of the server."""
        self.came.put(json.loads(data.partition(b"\r\n\r\n")[2]))

    def flush(self) -> None: ...

    def send(self, **members) -> None:
        self.server.handle(members)

    def move(self, line: int, character: int, uri: str = URI) -> None:
        """Come to this place."""
        place = cursor(line, character, uri)
        assert self.ask("textDocument/documentHighlight", place) is None

    def asked(self) -> list[dict[str, Any]]:
        """Rest; what the Pi was asked since the last time. No thread is left that could ask."""
        self.rested.set()
        wait_until(lambda: {*threading.enumerate()} <= self.others, "all threads have ended")
        self.rested.clear()
        asked = self.pi.completions
        self.pi.asked.clear()
        self.pauses.clear()
        return asked

    def rest(self) -> list[tuple[int, str]]:
        """The same: how many tokens, and behind which texts."""
        return [(body["n_predict"], body["input_prefix"]) for body in self.asked()]


@pytest.fixture
def desk(pi: Pi, patch) -> Desk:
    return Desk(pi, patch)


@pytest.fixture
def ide(pi: Pi, patch) -> Desk:
    return Desk(pi, patch, IDE, read_ahead=False)


def test_the_newest_place_is_read_and_once(desk: Desk):
    for uri in ("file:///a", "file:///b", URI):
        desk.open("x = 1\ny = 2\n", uri=uri)
    assert desk.able == {**ABLE, "documentHighlightProvider": True}
    body = {"n_predict": 0, "t_max_prompt_ms": 500, "suggest": "normal"}
    place = {"input_prefix": "", "input_suffix": "x = 1\ny = 2\n"}
    assert desk.asked() == [{**INFILL, **body, **place}]
    for character in (1, 2, 3):
        desk.move(1, character)
    assert desk.rest() == [(0, "x = 1\ny =")]
    desk.move(0, 5)
    desk.move(1, 3)  # and back before it was read
    assert desk.rest() == []
    desk.configure({"tokens": 9})
    desk.move(1, 3)
    assert desk.rest() == [(0, "x = 1\ny =")]
    desk.move(0, 5)
    desk.at(1, 0)
    assert desk.rest() == [(9, "x = 1\n")]
    desk.type(1, 0, "z")
    desk.move(1, 1)
    assert desk.rest() == []
    desk.move(0, 5)  # the latest place alone is remembered
    assert desk.rest() == [(0, "x = 1")]


NOT_READ = json.loads("""[
    [{}, "file:///w/.env"],
    [{"off": ["python"]}, "file:///home/me/sum.py"],
    [{"read_ahead": false}, "file:///home/me/sum.py"],
    [{"suggest": "never"}, "file:///home/me/sum.py"]]""")


@pytest.mark.parametrize(("settings", "uri"), NOT_READ, ids=str)
def test_what_is_never_read(pi: Pi, patch, settings, uri):
    desk = Desk(pi, patch, **settings)
    desk.open("x", uri=uri)
    assert desk.rest() == []
    desk.move(0, 1, uri)
    assert desk.rest() == []


def test_nobody_hears_that_a_text_could_not_be_read(desk: Desk, pi: Pi):
    pi.says(503, **AWAY)
    desk.open("x")
    assert desk.rest() == [(0, "")]
    assert (desk.came.empty(), desk.server.workspace.away_until) == (True, 0)
    desk.at(0, 1)
    assert desk.rest() == [(128, "x")]
    desk.move(0, 0)
    assert desk.rest() == []  # the Pi is away
    desk.server.workspace.away_until = 0.0
    desk.move(0, 0)
    assert desk.rest() == [(0, "")]


# -------------------------------------------------------------------------------- JetBrains' IDEs

# The messages are written after the source of LSP4IJ 0.20. No IDE was run.
IDE = {"name": "IntelliJ IDEA 2026.1", "version": "2026.1 (build IU-261.22158.277)"}
CLIENTS: list[tuple[Any, bool]] = [
    (IDE, True),
    ({"version": "Panda | 2026.1.1 Patch 2 (build AI-261.22158.277)"}, True),
    ({"name": "Neovim", "version": "0.12.0"}, False),
    ({"version": 2026}, False),
    ({"version": "(build A" * 100_000}, False),
    (5, False),
]


@pytest.mark.parametrize(("client", "is_known"), CLIENTS, ids=range(len(CLIENTS)))
def test_a_jetbrains_ide_is_known_by_its_build(pi: Pi, patch, client, is_known):
    desk = Desk(pi, patch, client, read_ahead=False)
    desk.open("")
    assert desk.ghost(0, 0, AUTOMATIC) == "a + b"
    assert desk.pauses == [0.0 if is_known else pytest.approx(0.08)]
    desk.asked()
    desk.type(0, 0, "a + b")
    assert desk.asked() == [{"characters": 5}] * is_known


def test_where_nothing_has_changed_the_user_of_a_jetbrains_ide_asks(ide: Desk, pi: Pi):
    ide.open("x = 1\ny = ")
    pi.scripts = [[HANG]]
    for changed, suggest, pause in ((False, "always", 0.0), (True, "normal", 0.001)) * 2:
        if changed:
            ide.type(1, 0, " ")
        number = ide.at(0, 5, AUTOMATIC)
        assert (pi.body()["suggest"], ide.pauses) == (suggest, [pause])
        ide.tell("$/cancelRequest", {"id": number})
        assert ide.error(number)["code"] == -32800
        ide.asked()
    # After a deletion the IDE itself asks for nothing.
    ide.type(0, 4, "", 5)
    ide.at(0, 4, AUTOMATIC)
    assert pi.body()["suggest"] == "always"


# Where `  a + bc` is shown, what is inserted, and how many characters count as accepted.
INSERTED = json.loads("""[
    ["at once", ["  a + bc"], [8]],
    ["by words", ["  a +", " bc"], [3, 5]],
    ["the rest of what was typed", ["  a", " + bc"], [5]],
    ["by hand", [" ", " ", "a", " ", "+", " ", "b", "c"], []],
    ["the IDE indents", ["  "], []],
    ["more than is shown", ["  a + bcd"], []],
    ["twice", ["  a + bc", "  a + bc"], [8]],
    ["what an older text had", ["y", "  a + bc"], []]]""")


def test_what_a_jetbrains_ide_inserts_in_one_piece_is_accepted(ide: Desk, pi: Pi):
    pi.says(content="  a + bc")
    for how, texts, counted in INSERTED:
        ide.open("")
        assert ide.ghost(0, 0, AUTOMATIC) == "  a + bc"
        ide.asked()
        typed = ""
        for text in texts:
            ide.type(0, len(typed), text)
            typed += text
        told = sorted(body["characters"] for body in ide.asked())  # from threads, in any order
        assert (how, told) == (how, counted)


# --------------------------------------------------------------------------------------- cancelling


def test_a_cancelled_request_frees_the_pi(editor: Editor, pi: Pi):
    editor.start()
    number = editor.at(0, 4, AUTOMATIC)
    editor.tell("$/cancelRequest", {"id": number})  # while it waits
    assert editor.error(number) == {"code": -32800, "message": "cancelled"}
    left = threading.Event()
    pi.scripts = [[HANG, left.set]]
    number = editor.at(0, 4)
    pi.hears()
    editor.tell("$/cancelRequest", {"id": number})
    assert editor.error(number)["code"] == -32800
    assert left.wait(PATIENCE)
    editor.tell("$/cancelRequest", {"id": number})  # it has been answered
    pi.says(content="1")
    assert editor.ghost(0, 4) == "1"
    pi.scripts = [[HANG]]
    number, count = editor.at(0, 3), len(pi.asked)
    wait_until(lambda: len(pi.asked) > count, "the Pi is asked")
    stopped = editor.request("shutdown")
    assert editor.error(number)["code"] == -32800
    assert editor.answer(stopped)["result"] is None
    editor.tell("exit")
    assert editor.process.wait(PATIENCE) == 0


# ----------------------------------------------------------------------------------------- commands


def test_an_accepted_text_is_counted_or_that_is_no_news(editor: Editor, pi: Pi):
    editor.start()
    for status in (200, 404):
        pi.says(status, accepted=1)
        number = editor.command("cerebrum.accepted", {"characters": 12})
        assert editor.next() == {"jsonrpc": "2.0", "id": number, "result": None}
        assert pi.hears()[:2] == ("/v1/accepted", {"characters": 12})


SELECTED = {"uri": URI, "instruction": "rename a to total", "range": span((1, 0), (2, 0))}
NOTHING = "; nothing was changed"


INSTRUCTED = json.loads(r"""{
    "prompt": "a=1\n",
    "instruction": "rename a to total",
    "language": "javascriptreact",
    "max_tokens": 2048,
    "temperature": 0}""")


def instructed(text: str) -> dict[str, Any]:
    return {"completion": text, "finish_reason": "stop", "kept": {"parts": ["all"]}}


def test_an_instruction_changes_the_selection(editor: Editor, pi: Pi):
    """A client that knows `documentChanges` gets the version that the change is for. Its range may
    be backwards.
    """
    editor.able = {"workspace": {"workspaceEdit": {"documentChanges": True}}}
    editor.start()
    editor.open("let b\na=1\nb=2\n", "javascriptreact")
    pi.says(**instructed("total=1"))
    selected = SELECTED["range"]
    backwards = {"start": selected["end"], "end": selected["start"]}
    number = editor.command("cerebrum.instruct", {**SELECTED, "range": backwards})
    asked = editor.called("workspace/applyEdit")
    edits = [{"range": selected, "newText": "total=1\n"}]
    versioned = [{"textDocument": {"uri": URI, "version": 1}, "edits": edits}]
    assert asked["params"]["edit"] == {"documentChanges": versioned}
    editor.send(id=asked["id"], result={"applied": True})
    assert editor.answer(number)["result"] is None
    assert pi.hears()[:2] == ("/v1/complete", INSTRUCTED)
    assert editor.came.empty()


def test_an_instruction_overwrites_no_newer_text(editor: Editor, pi: Pi):
    """Nor any text with less: see tests/pi/test_plugins.py."""
    editor.start(text="x\na\nb\n")
    end = threading.Event()
    pi.scripts = [[wait_for(end), answer(200, instructed("total\n"))]]
    number = editor.command("cerebrum.instruct", SELECTED)
    pi.hears()
    change = {"range": span((0, 0), (0, 0)), "text": "y"}
    editor.change(change, None)  # without a number for the version
    assert "error" in editor.answer(editor.request("made/up"))  # so the change has been read
    end.set()
    message = f"the text has changed meanwhile{NOTHING}"
    assert editor.error(number) == {"code": -32803, "message": message}
    pi.says(content="1")
    assert editor.ghost(1, 0) == "1"


# A text, the selection, the answer, what replaces the selection. A part of a line stays one. Where
# no line end is selected, the file's are written.
LINE_ENDS = json.loads(r"""[
    ["x = add(a, b) + 1\n", [0, 4], [0, 13], "foo(a, b)\n", "foo(a, b)"],
    ["x\na\n\n\ny\n", [1, 0], [4, 0], "total", "total\n\n\n"],
    ["x\na", [1, 0], [1, 1], "total\n", "total"],
    ["x\r\na\r\nb\r\ny\r\n", [1, 0], [3, 0], "total\nb\n", "total\r\nb\r\n"],
    ["x\r\na\r\ny\r\n", [1, 0], [1, 1], "total\r\nb\n", "total\r\nb"],
    ["x\r\na\nb\ny\n", [1, 0], [3, 0], "total\nb", "total\nb\n"],
    ["x\ry\r", [0, 0], [1, 0], "a\nb\n", "a\rb\r"]]""")


def test_a_changed_selection_keeps_its_line_ends(editor: Editor, pi: Pi):
    editor.start()
    for text, start, end, said, changed in LINE_ENDS:
        editor.open(text)
        pi.says(**instructed(said))
        editor.command("cerebrum.instruct", SELECTED | {"range": span(start, end)})
        edit = editor.called("workspace/applyEdit")["params"]["edit"]
        expected = {"range": span(start, end), "newText": changed}
        assert (text, edit) == (text, {"changes": {URI: [expected]}})


# -------------------------------------------------------------------------- a Pi that does not help

AWAY = {"error": {"message": "no backend"}}


def test_away_is_told_once_and_again_if_the_user_asks(editor: Editor, pi: Pi):
    editor.start()
    pi.says(503, **AWAY)
    message = {"type": 2, "message": "Cerebrum: the Pi answers 503: no backend"}
    for kind, news, asked in ((AUTOMATIC, 1, 1), (AUTOMATIC, 0, 1), (INVOKED, 1, 2)):
        number = editor.at(0, 4, kind)
        *shown, answered = [editor.next() for _ in range(news + 1)]
        assert [one["params"] for one in shown] == [message] * news
        assert (answered["id"], answered["result"]) == (number, {"items": []})
        assert len(pi.asked) == asked
    pi.says(content="1")
    assert [editor.ghost(0, 4), editor.ghost(0, 3, AUTOMATIC)] == ["1", "1"]


def test_a_connection_that_fails_is_news_even_after_a_cancellation() -> None:
    """Who types on cancels at each key, and would never hear of it."""
    job = cerebrum_lsp.Call(1)
    job.end()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        settings = Settings(url=f"http://127.0.0.1:{gone.getsockname()[1]}")
    message = r"^the Pi at 127.0.0.1 does not answer \(Connection refused\)$"
    with pytest.raises(cerebrum_lsp.PiError, match=message):
        cerebrum_lsp.ask(settings, job, "/infill", {})


# A reply, what the user is told.
REPLIES = json.loads("""[
    [429, {"error": {"message": "busy"}}, []],
    [200, {"text": "a"},
     ["expected a completion, got another answer: the url is perhaps not the Pi's"]],
    [200, [1], ["expected the Pi at 127.0.0.1, got an answer that is not JSON"]],
    [401, {"error": {"message": "expected a key"}}, ["the Pi answers 401: expected a key"]]]""")


def test_what_is_no_pi_is_told_without_the_key_and_a_busy_one_is_not(pi: Pi, tmp_path):
    with editing(tmp_path, pi.url, CEREBRUM_CM4_API_KEY="secret") as editor:
        editor.start({"key": ["secret"]})
        for status, reply, told in REPLIES:
            pi.scripts = [[answer(status, reply)]]
            number = editor.at(0, 4)
            assert [editor.shown() for _ in told] == told
            assert editor.next()["id"] == number
        assert pi.key() == "Bearer secret"
        assert editor.stop() == 0
        assert "secret" not in f"{editor.process.stderr.read()!r} {Settings(key='secret')}"


# ------------------------------------------------------------------------------------- the protocol


RAW = [  # what is sent, the code of the error
    (b"Content-Length: 3\r\n\r\n{x}", -32700),
    (b"Content-Length: 2\r\n\r\n\xff\xff", -32700),
    (b"Content-Length: 200000\r\n\r\n" + b"[" * 200_000, -32700),
    (b"content-length:2\r\nContent-Type: application/vscode-jsonrpc\r\n\r\n[]", -32600),
    (b'X: 1\r\n\r\n{"id": 1, "method": "x"}', -32700),
]
BAD_PARAMS = json.loads("""[
    [null, null, "expected text for textDocument.uri, got null"],
    ["file:///b", 0, "expected a document that is open"],
    ["file:///home/me/sum.py", 1.5, "expected a whole number for position.line, got a number"]]""")


UNKNOWN = ["workspace/didChangeWatchedFiles", "$/setTrace", "textDocument/didSave", "made/up"]


def test_bad_input_gets_the_protocols_error_and_the_server_lives(editor: Editor, pi: Pi):
    editor.start()
    for data, code in RAW:
        editor.write(data)
        answered = editor.next()
        assert (answered["id"], answered["error"]["code"]) == (None, code), data[:60]
    fault = cerebrum_lsp.outcome(lambda: int("the user's code"))
    assert fault == {"error": {"code": -32603, "message": "internal error (ValueError)"}}
    assert editor.error(editor.request("workspace/symbol", {}))["code"] == -32601
    for uri, line, message in BAD_PARAMS:
        number = editor.request("textDocument/inlineCompletion", cursor(line, 0, uri))
        assert editor.error(number) == {"code": -32602, "message": message}
    for method in UNKNOWN:
        editor.tell(method, {"anything": 1})
    assert editor.ghost(0, 4) == "a + b"
    change = {"textDocument": {"uri": URI}, "contentChanges": [{"text": 5}]}
    editor.tell("textDocument/didChange", change)
    logged = editor.next()
    assert (logged["method"], logged["params"]["type"]) == ("window/logMessage", 4)
    assert "expected text for text, got a whole number" in logged["params"]["message"]
    assert editor.error(editor.at(0, 4))["message"] == "expected a document that is open"
    assert editor.stop() == 0


def test_a_server_whose_editor_has_gone_ends(editor: Editor):
    editor.start()
    editor.process.stdin.close()
    assert editor.process.wait(PATIENCE) == 1


# ----------------------------------------------------------------------------------------- settings


def configured(folder: Path, name: str, text: str) -> Path:
    """The folder of settings, with a file."""
    (folder / "cerebrum").mkdir(exist_ok=True)
    (folder / "cerebrum" / name).write_text(text)
    return folder / "cerebrum"


NOT_A_NUMBER = "expected a whole number for tokens, got text"


def test_settings_come_from_the_client(editor: Editor, pi: Pi):
    editor.start({"tokens": 9, "suggest": "seldom", "key": "1"})
    assert editor.ghost(0, 4, AUTOMATIC) == "a + b"
    assert (pi.body()["n_predict"], pi.body()["suggest"]) == (9, "seldom")
    assert pi.key() == "Bearer 1"
    editor.configure({"cerebrum": {"tokens": 11}, "python": {}})
    editor.configure({"tokens": "many"})
    assert editor.next()["params"] == {"type": 1, "message": f"Cerebrum: {NOT_A_NUMBER}"}
    for nothing in (None, [], False, 5):  # PHP and Lua write an empty object as []
        editor.ask("initialize", {"initializationOptions": nothing})
    editor.configure(None)
    editor.ghost(0, 2)
    assert (pi.body()["n_predict"], editor.came.empty()) == (11, True)


def test_a_key_goes_only_to_the_url_that_it_came_with() -> None:
    before = Settings("http://pi:7000", "secret")
    for url in ("http://elsewhere:7000", "http://pi:7001"):
        assert read_settings({"url": url, "key": None}, before).key == ""
        assert read_settings({"url": url, "key": "its-own"}, before).key == "its-own"
    for url in ("http://pi:7000/", None):
        assert read_settings({"url": url, "key": None}, before).key == "secret"


def test_without_a_url_this_machine_is_asked_and_a_failure_says_how_to_set_one(pi: Pi, tmp_path):
    """And a bad file of settings is told of."""
    assert cerebrum_lsp.LOCAL == "http://127.0.0.1:7000"
    with editing(tmp_path, "", f"cerebrum_lsp.LOCAL = {pi.url!r}") as editor:
        editor.start()
        assert editor.ghost(0, 4) == "a + b"
    nobody = f"http://127.0.0.1:{free_port()}"
    folder = configured(tmp_path, "lsp.toml", "tokens = 0")
    with editing(tmp_path, "", f"cerebrum_lsp.LOCAL = {nobody!r}") as editor:
        editor.request("initialize", {"capabilities": {}})
        assert editor.shown() == f"the settings in {folder}: expected tokens from 1 to 2048, got 0"
        editor.open("x = ")
        editor.at(0, 4)
        fault, hint = editor.shown().split("; ")
        assert fault == "the Pi at 127.0.0.1 does not answer (Connection refused)"
        assert hint.startswith("set CEREBRUM_URL")


def test_https(tmp_path: Path):
    """The Pi's certificate must be signed by somebody whom this machine trusts."""
    files = [*certificate(tmp_path, "pi").values()]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    with in_a_thread(Pi(context)) as pi:
        url = pi.url.replace("http:", "https:")
        for trusted, says in ((files[0], "a + b"), ("", "")):
            with editing(tmp_path, url, SSL_CERT_FILE=trusted) as editor:
                editor.start()
                assert editor.ghost(0, 4) == says


GIVEN = json.loads(r"""[
    [[5], "expected an object of settings, got a list"],
    [{"cerebrum": 5}, "expected an object of settings, got a whole number"],
    [{"url": "http://pi local:7000"}, "expected a url such as http://pi.local:7000"],
    [{"url": "ftp://pi"}, "expected a url such as http://pi.local:7000"],
    [{"url": "http://pi:99999"}, "expected a url such as http://pi.local:7000"],
    [{"tokens": 0}, "expected tokens from 1 to 2048, got 0"],
    [{"tokens": true}, "expected a whole number for tokens, got true or false"],
    [{"read_ms": -1}, "expected read_ms of 0 or more, got -1"],
    [{"off": ["a", 1]}, "expected a list of texts for off, got a list"],
    [{"exclude": ".env"}, "expected a list of texts for exclude, got text"],
    [{"key": "a\r\nb"}, "expected a key of visible ASCII characters"],
    [{"suggest": "x"}, "expected one of always, often, normal, seldom, never for suggest"]]""")


def test_no_settings_and_bad_ones() -> None:
    before = Settings(tokens=1)
    for given in (None, {}, {"cerebrum": None}, {"cerebrum": {}}, {"python": 1}, {"tokens": 1}):
        assert read_settings(given, before) == before
    for given, message in GIVEN:
        with pytest.raises(BadSettings) as raised:
            read_settings(given, before)
        assert (given, str(raised.value)) == (given, message)


def test_settings_of_a_file_and_of_the_environment(tmp_path, monkeypatch) -> None:
    folder = configured(tmp_path, "lsp.toml", "tokens = ")
    environment = {"XDG_CONFIG_HOME": f"{tmp_path}"}
    here = f"the settings in {folder}: expected "
    message = "a file of TOML or JSON, got one that cannot be read"
    assert first_settings(environment) == (Settings(), [here + message])
    configured(tmp_path, "lsp.toml", 'url = "http://pi"\nkey = "1"')
    settings = Settings("http://pi", "1")
    assert first_settings(environment | {"CEREBRUM_URL": ""}) == (settings, [])
    own = environment | {"CEREBRUM_URL": "http://[::1]:1", "CEREBRUM_CM4_API_KEY": "2"}
    assert first_settings(own) == (Settings("http://[::1]:1", "2"), [])
    fault = "the environment: expected a url such as http://pi.local:7000"
    assert first_settings(environment | {"CEREBRUM_URL": "pi"}) == (settings, [fault])
    monkeypatch.setitem(sys.modules, "tomllib", None)  # as in Python 3.9
    message = "lsp.json, as this Python cannot read lsp.toml; 3.11 can"
    assert first_settings(environment) == (Settings(), [here + message])
    configured(tmp_path, "lsp.json", '{"tokens": 8}')
    assert first_settings(environment) == (Settings(tokens=8), [])


USAGE = "Usage: cerebrum_lsp.py"
OPTIONS = [("--help", 0, USAGE), ("--version", 0, "cerebrum_lsp.py 1."), ("--port", 2, USAGE)]


def test_options() -> None:
    for option, status, says in OPTIONS:
        command = [sys.executable, f"{ROOT}/cerebrum_lsp.py", option]
        done = subprocess.run(command, **CAPTURED)
        assert (done.returncode, done.stdout[: len(says)]) == (status, says)


# ------------------------------------------------------------------------------------ the documents


# Two positions behind an end, or in a character; and the text once ! has replaced what is between.
EDITS = json.loads(r"""[
    [[0, 99], [0, 99], "ab!\r\n😀c"],
    [[9, 9], [9, 9], "ab\r\n😀c!"],
    [[1, 1], [1, 9], "ab\r\n!"]]""")


def test_odd_positions() -> None:
    for start, end, left in EDITS:
        document = Document(URI, "python", 0, "ab\r\n😀c")
        document.edit(start, end, "!")
        assert document.text == left


def place_of(text: str, offset: int) -> tuple[int, int]:
    """The position of an offset, counted anew."""
    *above, line = re.split("\r\n|\r|\n", text[:offset])
    return len(above), len(line.encode("utf-16-le", "surrogatepass")) // 2


def test_2000_edits() -> None:
    rng = random.Random("utf-16")
    pieces = ["a", "b ", "\n", "\r\n", "\r", "é", "語", "😀", "x\ny\nz", "\ud800", "\udc00", ""]
    text = ""
    for _ in range(2_000):
        document = Document(URI, "python", 0, text)
        start, end = sorted(rng.choices(range(len(text) + 1), k=2))
        end = min(end, start + 40)
        if "\r\n" in (text[start - 1 : start + 1], text[end - 1 : end + 1]):
            continue  # within a line end
        first, last = place_of(text, start), place_of(text, end)
        assert (document.offset(first), document.offset(last)) == (start, end)
        piece = rng.choice(pieces)
        document.edit(first, last, piece)
        text = text[:start] + piece + text[end:]
        assert document.text == text
        text = text[-400:]
