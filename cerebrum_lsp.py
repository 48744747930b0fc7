#!/usr/bin/env python3
"""Cerebrum's language server: completions as ghost text, in every editor that speaks LSP, from the
Pi at home.

    curl -O http://pi.local:7000/cerebrum_lsp.py
    CEREBRUM_URL=http://pi.local:7000 python3 cerebrum_lsp.py     # the editor starts this

One file, Python 3.9 or newer, standard library only. The server speaks LSP 3.18 on stdin and
stdout: messages with a `Content-Length`, JSON-RPC 2.0. `textDocument/inlineCompletion` is the
method for ghost text; a client that lacks it can turn on `textDocument/completion` instead. The
completions are the answers of the Pi's `POST /infill`.

A bad message gets the protocol's error, and the server goes on. If the Pi is away, the user is told
once; until it is back, completions are empty.

Threads: the main thread reads the messages; it alone changes the documents and the settings. A
call, which asks the Pi, gets a thread of its own and a copy of the text. `Client` and `Suggestions`
have a lock each, for what the threads share. `set.remove` on `Client.running` is atomic, so only
one thread answers a call.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

VERSION = "1.1.0"  # of Cerebrum

Object = dict[str, Any]  # of JSON

# ----------------------------------------------------------------------------------------- settings


class BadSettings(Exception):
    """A setting that cannot be used. The message says what was expected and what came."""


EXCLUDE = """.env* *.env *.pem *.key *.crt *.cer *.p8 *.p12 *.pfx *.ppk *.jks *.keystore id_rsa*
id_dsa* id_ecdsa* id_ed25519* .netrc .npmrc .pypirc .pgpass .htpasswd .git-credentials .aws/"""


@dataclass(frozen=True)
class Settings:
    """The user's settings. Their names are those of the file and of `initializationOptions`."""

    url: str = ""  # of the Pi; empty: LOCAL
    key: str = field(default="", repr=False)  # if the Pi asks for one
    tokens: int = 128  # a completion has at most so many
    read_ms: int = 500  # limits what is read for an automatic request; 0: no limit
    off: tuple[str, ...] = ()  # ids of languages that get no completions
    exclude: tuple[str, ...] = tuple(EXCLUDE.split())  # globs of the files that are never sent
    suggest: str = "normal"  # how readily a completion is shown unasked: one of SUGGEST
    completion: bool = False  # serve textDocument/completion, for clients without inline completion
    read_ahead: bool = True  # have the Pi read where the cursor is, before the first key

    def __post_init__(self) -> None:
        if not is_url(self.url or LOCAL):
            raise BadSettings("expected a url such as http://pi.local:7000")
        if not 1 <= self.tokens <= MAX_TOKENS:
            raise BadSettings(f"expected tokens from 1 to {MAX_TOKENS}, got {self.tokens}")
        if self.read_ms < 0:
            raise BadSettings(f"expected read_ms of 0 or more, got {self.read_ms}")
        if self.suggest not in SUGGEST:
            raise BadSettings(f"expected one of {', '.join(SUGGEST)} for suggest")
        if not re.fullmatch(r"[!-~]*", self.key):
            raise BadSettings("expected a key of visible ASCII characters")

    def excludes(self, uri: str) -> bool:
        """Whether this document is never sent."""
        # Not its path alone, of which a client may have left a # or ? as it is.
        decoded = unquote(uri)
        return any(matches(glob, decoded) for glob in self.exclude)


KINDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
MAX_TOKENS = 2048
SUGGEST = ("always", "often", "normal", "seldom", "never")


def read_settings(given: Any, settings: Settings) -> Settings:
    """Apply a JSON object of settings; BadSettings if one of them cannot be used. Unknown names are
    ignored, since clients send others' settings too.
    """
    if isinstance(given, dict):
        # Clients that share one object among servers have a section for each.
        given = given.get("cerebrum", given)
    if not given:  # some clients have no settings in the form of [] or false
        return settings
    if not isinstance(given, dict):
        raise BadSettings(f"expected an object of settings, got {kind_of(given)}")
    changed = valid_settings(given)
    url = changed.get("url", settings.url)
    if url.rstrip("/") != settings.url.rstrip("/"):
        changed.setdefault("key", "")  # a project's settings must not send the user's key elsewhere
    return replace(settings, **changed)


def valid_settings(given: Mapping[str, Any]) -> Object:
    """The settings that an object has, each of the right kind."""
    members = Object()
    for name, default in vars(Settings()).items():
        value = given.get(name)
        if value is None:
            continue
        kind = type(default)
        is_texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
        if kind is tuple and is_texts:
            value = tuple(value)
        if type(value) is not kind:
            raise BadSettings(f"expected {KINDS[kind]} for {name}, got {kind_of(value)}")
        members[name] = value
    return members


WILD = {"**/": "(.*/)?", "*": "[^/]*", "?": "[^/]"}  # as regular expressions; else `**`


@functools.lru_cache
def matches(glob: str, path: str) -> bool:
    """Whether a path matches a glob: `*` and `?` within a name, `**` for any folders, a `/` at the
    end for all in a folder, `{a,b}` for one of several texts. A glob without a `/` is for the name
    alone, in any folder; so is one that begins with `~/` or `./`, since more is better left out
    than less.
    """
    glob = re.sub("^[~.]/", "", glob)
    glob = re.sub("/$", "/**", glob)
    pattern = re.sub(r"[.+^$()|[\]\\]", r"\\\g<0>", glob)
    pattern = re.sub(r"\*\*/|\*+|\?", lambda wild: WILD.get(wild[0], ".*"), pattern)
    pattern = re.sub(r"\{([^{}]*)}", one_of, pattern)
    return bool(re.search(f"(?is)(^|/){pattern}\\Z", path))


def one_of(braces: re.Match[str]) -> str:
    """The regular expression of the `{a, b}` of a glob."""
    return f"({'|'.join(map(str.strip, braces[1].split(',')))})"


def is_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        is_address = url.hostname and url.port != 0
    except ValueError:  # also of a port that is no number
        return False
    return bool(is_address and re.fullmatch("(?i)https?://[!-~]+", text))


def kind_of(value: Any) -> str:
    return KINDS.get(type(value), "a date or a time")  # of TOML


def read_file(folder: Path) -> Any:
    """The settings in lsp.toml, or in lsp.json, which every Python can read; None if there is
    neither.
    """
    toml = folder / "lsp.toml"
    with suppress(ImportError, FileNotFoundError):
        import tomllib  # novm: since Python 3.11

        return tomllib.loads(toml.read_text("utf-8"))
    with suppress(FileNotFoundError):
        return json.loads((folder / "lsp.json").read_text("utf-8"))
    if toml.exists():
        raise BadSettings("expected lsp.json, as this Python cannot read lsp.toml; 3.11 can")
    return None


def first_settings(environment: Mapping[str, str]) -> tuple[Settings, list[str]]:
    """The settings of the file, which those of the environment override, and the faults of both."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    folder = Path(home) / "cerebrum"
    variables = {
        "url": environment.get("CEREBRUM_URL") or None,  # empty: not set
        "key": environment.get("CEREBRUM_CM4_API_KEY") or None,
    }
    sources: dict[str, Callable[[], Any]] = {
        f"the settings in {folder}": lambda: read_file(folder),
        "the environment": lambda: variables,
    }
    settings = Settings()
    faults = []
    for source, read in sources.items():
        try:
            settings = read_settings(read(), settings)
        except BadSettings as error:
            faults.append(f"{source}: {error}")
        except (OSError, ValueError):
            faults.append(f"{source}: expected a file of TOML or JSON, got one that cannot be read")
    return settings, faults


# ------------------------------------------------------------------------------ pure: the documents

LINE_END = re.compile(r"\r\n|\r|\n")


def utf16_units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def unix(text: str) -> str:
    """The text with the line ends that the model knows."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


@dataclass(frozen=True)
class Gap:
    """A cursor in a file: the place where text is missing."""

    uri: str
    before: str
    after: str
    language: str = ""  # LSP's id of it

    def typed_since(self, old: Gap) -> str | None:
        """The text typed or accepted since an older gap; None if anything else has changed."""
        typed = self.before.removeprefix(old.before)
        later = replace(old, before=old.before + typed)
        return typed if self == later else None


NOWHERE = Gap("", "", "")
Position = tuple[int, int]  # LSP's: the line, and UTF-16 units of it


@dataclass
class Document:
    """An open text."""

    uri: str
    language: str
    version: int
    text: str
    deleted: int = -1  # the line of the latest edit, if that only removed text
    is_changed: bool = False  # since the latest request for ghost text in a JetBrains IDE

    def offset(self, position: Position) -> int:
        """The code points before a position. One behind the end of its line or of the text means
        that end.
        """
        line, units = position
        lines = io.StringIO(self.text, newline="")  # their ends are LSP's: \r\n, \r and \n
        start = sum(map(len, itertools.islice(lines, line)))
        before = lines.readline().rstrip("\r\n")[:units]
        while (over := utf16_units(before) - units) > 0:  # inside a character counts as before it
            before = before[: -over // 2]  # the last ones, each of one unit or two
        return start + len(before)

    def gap(self, cursor: Position) -> Gap:
        offset = self.offset(cursor)
        before = unix(self.text[:offset])
        after = unix(self.text[offset:])
        return Gap(self.uri, before, after, self.language)

    def line_end(self, near: str = "") -> str:
        """The first line end of a text, if it has one, or else of the document."""
        found = LINE_END.search(near + self.text)
        return found[0] if found else "\n"

    def edit(self, start: Position, end: Position, text: str) -> None:
        """Replace the text between two positions, which are in order."""
        self.deleted = -1 if text else start[0]
        before = self.text[: self.offset(start)]
        after = self.text[self.offset(end) :]
        self.text = before + text + after


class Suggestions:
    """The latest suggestion, how long the Pi took for the last ones, and what was typed over them.
    All threads use it.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # of `show`
        self.latest = NOWHERE, ""
        self.seconds = deque([0.4], maxlen=8)  # a guess, until there are answers
        self.asked = NOWHERE  # the latest gap that the Pi was asked for, so it has read this
        self.shown = NOWHERE, "", 0  # the latest ghost text: its gap, itself, its place
        self.typed_over = deque[int](maxlen=64)  # the place of each text that was

    def add(self, gap: Gap, text: str, seconds: float) -> None:
        self.latest = gap, text
        self.seconds.append(seconds)

    def show(self, gap: Gap, text: str) -> int:
        """Note the ghost text for a gap, "" for a new request without one. Returns how many times
        something else was typed over this text, in a line with this number and the same text
        before.
        """
        *above, line = gap.before.split("\n")
        place = hash(f"{gap.uri} {len(above)} {line}{text}")  # a line may be long
        with self.lock:
            old, shown, old_place = self.shown
            typed = gap.typed_since(old) or ""
            if not (typed.startswith(shown) or shown.startswith(typed)):
                self.typed_over.append(old_place)
            self.shown = gap, text, place
            return self.typed_over.count(place)

    def rest(self, gap: Gap) -> str | None:
        """The rest of the latest suggestion, whose beginning has been typed or accepted; None if
        there is none. The Pi knows it, too, but the ghost text would flicker until the Pi answers.
        """
        old, text = self.latest
        typed = gap.typed_since(old)
        is_whole = typed and typed == text
        if typed is None or is_whole or not text.startswith(typed):
            return None
        return text[len(typed) :]

    def pause(self, gap: Gap) -> float:
        """Seconds without a key before an automatic request: longer for a slow Pi, next to none if
        the latest suggestion was taken.
        """
        old, text = self.latest
        if gap.typed_since(old) == text:
            return NO_PAUSE_SECONDS
        pause = PAUSE_SHARE * median(self.seconds)
        return min(max(MIN_PAUSE_SECONDS, pause), MAX_PAUSE_SECONDS)


NO_PAUSE_SECONDS = 0.001  # more than 0, as for any automatic request
MIN_PAUSE_SECONDS = 0.03  # fast typists leave 0.1 s between keys
MAX_PAUSE_SECONDS = 0.4
PAUSE_SHARE = 0.2  # of the median response time
# Characters before the cursor, and after it, that are sent: more than any context holds, and as
# JSON less than the 1 MiB that the Pi takes.
MAX_BODY_TEXT = 80_000


def clip(gap: Gap) -> tuple[str, str]:
    """The text before and after the cursor for a request. Of a long text the far ends are left out,
    in steps of a quarter, so that the text begins at the same place for many keys and the model's
    cache stays valid.
    """
    step = MAX_BODY_TEXT // 4
    over = max(0, len(gap.before) - MAX_BODY_TEXT)
    start = -(-over // step) * step
    return gap.before[start:], gap.after[:MAX_BODY_TEXT]


# --------------------------------------------------------------------------------------- IO: the Pi

TIMEOUT_SECONDS = 600.0  # a model may have to be loaded, and the Pi itself gives up in time
CONNECT_SECONDS = 5.0
BUSY = (409, 429)  # statuses
AWAY_SECONDS = 5.0  # between two automatic requests to a Pi that does not answer


class PiError(Exception):
    """The Pi did not answer as hoped. The message is for the user."""

    code = -32803  # RequestFailed


class Busy(PiError):
    """The Pi refuses, which passes by itself."""


class Ended(Exception):
    """The call was ended by `Call.end`, and has been answered."""


class Call:
    """Work of a thread that may have to wait, and then asks the Pi: a request of the client, or the
    reading at a cursor.
    """

    def __init__(self, request_id: Any, lane: Any = None, pause: float = 0.0) -> None:
        self.request_id = request_id  # None: nobody is told how it went
        self.lane = lane  # the kind of a completion, or READING
        self.pause = pause  # seconds
        self.is_automatic = pause > 0  # else the user asked for a completion now
        self.is_waiting = self.is_automatic  # a newer request of its lane may end it
        self.ended = threading.Event()
        self.socket: socket.socket | None = None

    def wait(self) -> None:
        self.ended.wait(self.pause)
        self.check()
        self.is_waiting = False

    def end(self) -> None:
        """Stop, from another thread: the Pi sees the connection close and stops computing."""
        self.ended.set()
        if self.socket:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)

    def check(self) -> None:
        if self.ended.is_set():
            raise Ended


LOCAL = "http://127.0.0.1:7000"  # this machine, as long as no url is set
NO_URL = "; set CEREBRUM_URL, or the client's setting url, to its address: http://pi.local:7000"


def ask(settings: Settings, call: Call, path: str, body: Object) -> Object:
    """POST the body to the Pi, and return the answer's JSON. PiError, or Ended."""
    url = urlsplit(settings.url or LOCAL)
    host = url.hostname or ""
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(host, url.port or kind.default_port, timeout=CONNECT_SECONDS)
    headers = {"Content-Type": "application/json", "User-Agent": f"cerebrum-lsp/{VERSION}"}
    if settings.key:
        headers["Authorization"] = f"Bearer {settings.key}"
    target = url.path.rstrip("/") + path
    try:
        connection.connect()
        call.socket = connection.sock
        call.check()  # `end` may have come before there was a socket
        connection.sock.settimeout(TIMEOUT_SECONDS)
        connection.request("POST", target, json.dumps(body), headers)
        response = connection.getresponse()
        content = response.read()
    # ValueError: a name that cannot be looked up
    except (OSError, ValueError, HTTPException) as error:
        # A connection that never came about is news even if nobody waits for it any more.
        if call.socket:
            call.check()
        reason = getattr(error, "strerror", None) or type(error).__name__
        hint = "" if settings.url else NO_URL
        raise PiError(f"the Pi at {host} does not answer ({reason}){hint}") from None
    finally:
        connection.close()
    return read_answer(host, response.status, content)


def read_answer(host: str, status: int, content: bytes) -> Object:
    """The JSON object of an answer of the Pi; PiError if it is another answer or an error."""
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    kind = Busy if status in BUSY else PiError
    if not isinstance(answer, dict):
        raise kind(f"expected the Pi at {host}, got an answer that is not JSON")
    if status != 200:
        nested = answer.get("error")  # the dialects' form of an error
        if isinstance(nested, dict):
            answer = nested
        raise kind(f"the Pi answers {status}: {answer.get('message')}")
    return answer


# ----------------------------------------------------------------------- IO: messages of the client

LATER = object()  # the result of a request that a thread answers
LENGTH = re.compile(rb"(?i)content-length[ \t]*:[ \t]*([0-9]{1,9})[ \t]*\r?\n")


def failure(code: int, message: str) -> Object:
    """The members of a response that reports an error."""
    return {"error": {"code": code, "message": message}}


CANCELLED = failure(-32800, "cancelled")  # RequestCancelled


class ProtocolError(Exception):
    """What the client sent is wrong. The message says what was expected and what came."""

    code = -32602  # InvalidParams


class BadMessage(ProtocolError):
    """A message that is no JSON."""

    code = -32700  # ParseError


class BadRequest(ProtocolError):
    """JSON that is no message."""

    code = -32600  # InvalidRequest


class UnknownMethod(ProtocolError):
    """A request for what the server has not."""

    code = -32601  # MethodNotFound


def read_message(stream: BinaryIO) -> Any:
    """The next message's JSON. EOFError at the end of the stream; ProtocolError if the message
    cannot be read, after which the next call finds the next message.
    """
    data = stream.read(read_length(stream))
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        raise BadMessage("expected JSON in UTF-8") from None


def read_length(stream: BinaryIO) -> int:
    """Read a message's header, and return the bytes of its body: 0 if it does not say."""
    length = 0
    while line := stream.readline():
        # `search`: the line begins with the body before, if the length of that was not known.
        if found := LENGTH.search(line):
            length = int(found[1])
        elif line in (b"\r\n", b"\n"):
            return length
    raise EOFError


class Client:
    """The editor, and the calls that have threads: whoever removes one from `running` sends its one
    response, if it is awaited. Any thread may send messages.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.lock = threading.Lock()
        self.running = set[Call]()

    def send(self, **members: Any) -> None:
        data = json.dumps({"jsonrpc": "2.0", **members}).encode()
        # An editor that has gone needs no message.
        with self.lock, suppress(OSError, ValueError):
            self.stream.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
            self.stream.flush()

    def show(self, level: int, message: str, method: str = "window/showMessage") -> None:
        """Show a message to the user: 1 is an error, 2 a warning, 3 information."""
        self.send(method=method, params={"type": level, "message": f"Cerebrum: {message}"})

    def start(self, call: Call, work: Callable[[], Any]) -> Any:
        """Respond with the result of `work` in a thread."""
        self.running.add(call)
        threading.Thread(target=lambda: self.respond(call, outcome(work)), daemon=True).start()
        return LATER

    def respond(self, call: Call, response: Object) -> None:
        """Send the call's one response, unless another thread has."""
        with suppress(KeyError):
            self.running.remove(call)
            if call.request_id is not None:
                self.send(id=call.request_id, **response)
            call.end()

    def end_calls(self, is_meant: Callable[[Call], bool], response: Object) -> None:
        """Respond before their threads have ended, whose connections may be slow to come about."""
        for call in [*self.running]:
            if is_meant(call):
                self.respond(call, response)


def outcome(work: Callable[[], Any]) -> Object:
    """The members of a response: the result of this work, or its error."""
    try:
        return {"result": work()}
    except (ProtocolError, PiError) as error:
        return failure(error.code, str(error))
    except Exception as fault:  # its text may quote the user's code; or Ended, which nobody gets
        return failure(-32603, f"internal error ({type(fault).__name__})")  # InternalError


# ------------------------------------------------------------------------ pure: members of messages

# The commands.
ACCEPTED = "cerebrum.accepted"
INSTRUCT = "cerebrum.instruct"


def get(value: Any, path: str, kind: type, *default: Any) -> Any:
    """The member at a dotted path, of this kind. If it is missing or null: the default, if there is
    one.
    """
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None and default:
        return default[0]
    if type(value) is not kind:
        raise ProtocolError(f"expected {KINDS[kind]} for {path}, got {kind_of(value)}")
    return value


LACKING = {  # by the reason why an answer ended; any other broke it off
    "length": f"the answer is longer than {MAX_TOKENS} tokens",
    "repeat": "the model began to repeat itself",
    "stop": "",
    "block": "",
}


def lacks(answer: Any) -> str:
    """Why the answer to an instruction may lack code that it would replace; "" if it is whole."""
    if get(answer, "kept.parts", list, []) != ["all"]:
        return "the text is too long for the model"
    if lacking := LACKING.get(answer.get("finish_reason", "stop"), "the answer broke off"):
        return lacking
    if not get(answer, "completion", str).strip():
        return "the answer has no code"
    return ""


def accept_command(text: str) -> Object:
    """The command that the client runs when its user has accepted this completion."""
    count = {"characters": len(text)}
    return {"title": "accepted", "command": ACCEPTED, "arguments": [count]}


def position(holder: Any, path: str) -> Position:
    """The line and the character of the position at a dotted path."""
    return get(holder, f"{path}.line", int), get(holder, f"{path}.character", int)


def positions(holder: Any) -> tuple[Position, Position]:
    """The two positions of this holder's range, in order."""
    ends = [position(holder, path) for path in ("range.start", "range.end")]
    return min(ends), max(ends)


def span(start: Position, end: Position) -> Object:
    """A range from one position to another, as LSP writes it."""
    names = ("line", "character")
    return {"start": dict(zip(names, start)), "end": dict(zip(names, end))}


# ------------------------------------------------------------------------------- state: the session

READING = "reading"  # a lane
READ_DELAY_SECONDS = 0.3  # the cursor has not moved for so long when the Pi reads there
PREDICT_MS = 1500  # a completion that has a line ends after this time
NO_COMPLETION = "expected a completion, got another answer: the url is perhaps not the Pi's"
TRIGGERS = [*" .,:;=([{<\"'/"]  # of textDocument/completion, beside letters


@dataclass
class Workspace:
    """The open documents, and what the client asks for in them: text for a cursor, which is the
    rest of a suggestion or else the Pi's answer, and changes as instructed. The main thread alone
    changes the documents and the settings.
    """

    client: Client
    settings: Settings
    documents: dict[str, Document] = field(default_factory=dict)  # by uri
    suggestions: Suggestions = field(default_factory=Suggestions)
    # By time.monotonic(): no automatic request before. 0: not away, as far as the user knows.
    away_until: float = 0.0
    is_jetbrains: bool = False  # the client is LSP4IJ
    has_versions: bool = False  # the client takes edits with the version that they are for

    def configure(self, params: Any, path: str = "settings") -> None:
        """Apply the client's settings; bad ones are shown to the user and change nothing."""
        try:
            self.settings = read_settings((params or {}).get(path), self.settings)
        except BadSettings as error:
            self.client.show(1, str(error))
        self.suggestions = Suggestions()  # other settings, other suggestions
        self.away_until = 0.0  # the next request tries

    def find(self, params: Any) -> Document:
        document = self.documents.get(get(params, "textDocument.uri", str))
        if not document:
            raise ProtocolError("expected a document that is open")
        return document

    def open(self, params: Any) -> None:
        uri = get(params, "textDocument.uri", str)
        text = get(params, "textDocument.text", str)
        language = get(params, "textDocument.languageId", str)
        version = get(params, "textDocument.version", int)
        self.documents[uri] = Document(uri, language, version, text)
        self.read(params)

    def close(self, params: Any) -> None:
        self.documents.pop(get(params, "textDocument.uri", str), None)

    def change(self, params: Any) -> None:
        document = self.find(params)
        # Until all is done: after a bad change the text is unknown.
        del self.documents[document.uri]
        for change in get(params, "contentChanges", list):
            text = get(change, "text", str)
            if get(change, "range", dict, None) is None:
                document.text = text
                document.deleted = -1
            else:
                start, end = positions(change)
                # A JetBrains IDE does not report what its user accepts, but inserts it in one
                # piece. A key inserts one character, and perhaps an indentation.
                if self.is_jetbrains and len(text.strip()) > 1:
                    rest = self.suggestions.rest(document.gap(start)) or ""
                    if rest.startswith(text):
                        self.count(None, len(text))
                document.edit(start, end, text)
        # Some clients have no number for it.
        document.version = get(params, "textDocument.version", int, document.version)
        document.is_changed = True
        self.documents[document.uri] = document

    def read(self, params: Any, _request_id: Any = None) -> None:
        """Have the Pi read where the cursor stays. No message says so, but clients ask for
        highlights there; null leaves those to other servers. A new document has no cursor yet.
        """
        document = self.find(params)
        cursor = 0, 0
        if "position" in params:
            cursor = position(params, "position")
        gap = document.gap(cursor)
        self.client.end_calls(lambda old: old.is_waiting and old.lane == READING, {})
        call = Call(None, READING, READ_DELAY_SECONDS)

        def work() -> None:
            call.wait()
            if self.may_read(gap):
                self.suggestions.asked = gap
                body = self.body(gap, is_automatic=True)
                body["n_predict"] = 0  # it only reads
                ask(self.settings, call, "/infill", body)

        self.client.start(call, work)

    def may_read(self, gap: Gap) -> bool:
        settings = self.settings
        is_wanted = settings.read_ahead and settings.suggest != "never"
        is_away = time.monotonic() < self.away_until
        is_read = gap.typed_since(self.suggestions.asked) is not None
        return is_wanted and not (is_away or is_read or self.is_off(gap))

    def inline(self, params: Any, request_id: Any) -> Any:
        document = self.find(params)
        cursor = position(params, "position")
        gap = document.gap(cursor)
        is_automatic = get(params, "context.triggerKind", int, 2) != 1
        pause = self.suggestions.pause(gap)
        if self.is_jetbrains:
            # It calls every request automatic, and has paused before those that are. Where
            # nothing was typed since the last one, its user asks.
            is_automatic = document.is_changed and document.deleted < 0
            pause = NO_PAUSE_SECONDS
            document.is_changed = False

        # Unasked, nothing is shown that was typed over twice. After a deletion nothing is asked.
        def items(text: str) -> Object:
            is_unwanted = self.suggestions.show(gap, text) > 1 and is_automatic
            if is_unwanted or not text:
                return {"items": []}
            place = span(cursor, cursor)
            item = {"insertText": text, "range": place, "command": accept_command(text)}
            return {"items": [item]}

        call = Call(request_id, "inline", pause if is_automatic else 0.0)
        is_quiet = is_automatic and document.deleted == cursor[0]
        return self.complete(call, gap, items, is_quiet)

    def menu(self, params: Any, request_id: Any) -> Any:
        """The same for a client without inline completion, as one entry of its menu. Helix inserts
        it as it is, so it has the document's line ends. Ghost text has none but \\n: Neovim and
        Emacs would leave a \\r in the text.
        """
        document = self.find(params)
        cursor = position(params, "position")
        gap = document.gap(cursor)
        # The cursor may be behind the end of its line, or of the text.
        *above, line = gap.before.split("\n")
        word = re.split(r"\W", line)[-1]
        end = len(above), utf16_units(line)
        start = len(above), end[1] - utf16_units(word)

        def items(rest: str) -> Object:
            text = word + rest
            block = f"```{document.language}\n{text}\n```"
            new_text = LINE_END.sub(document.line_end(), text)
            edit = {"range": span(start, end), "newText": new_text}
            entry = {
                "label": text.strip().partition("\n")[0],
                "detail": "Cerebrum",
                "documentation": {"kind": "markdown", "value": block},
                "filterText": text,
                "sortText": "\0",
                "preselect": True,
                "textEdit": edit,
                "command": accept_command(rest),
            }
            return {"isIncomplete": True, "items": [entry] if rest.strip() else []}

        call = Call(request_id, "menu", self.suggestions.pause(gap))
        return self.complete(call, gap, items)

    def complete(
        self, call: Call, gap: Gap, items: Callable[[str], Any], is_quiet: bool = False
    ) -> Any:
        """Respond with the items of a suggestion, at once or in a thread."""
        nothing = items("")
        # The Pi itself ends a computation that is of no use any more.
        self.client.end_calls(
            lambda old: old.is_waiting and old.lane in (call.lane, READING), {"result": nothing}
        )
        if is_quiet or self.is_off(gap):
            return nothing
        # Who asks gets what the Pi has: what is known may end where the model is unsure.
        if call.is_automatic:
            rest = self.suggestions.rest(gap)
            if rest is not None:
                return items(rest)
            if time.monotonic() < self.away_until:
                return nothing

        def work() -> Any:
            call.wait()
            return items(self.infill(call, gap))

        return self.client.start(call, work)

    def is_off(self, gap: Gap) -> bool:
        settings = self.settings
        return gap.language in settings.off or settings.excludes(gap.uri)

    def body(self, gap: Gap, is_automatic: bool) -> Object:
        """The fields of a request for a gap."""
        settings = self.settings
        before, after = clip(gap)
        name = os.path.basename(unquote(gap.uri))
        read_ms = 0
        suggest = "always"
        if is_automatic:
            read_ms = settings.read_ms
            suggest = settings.suggest
        return {
            "input_prefix": before,
            "input_suffix": after,
            "filename": name,
            "language": gap.language,
            "n_predict": settings.tokens,
            "t_max_prompt_ms": read_ms,
            "t_max_predict_ms": PREDICT_MS,
            "cache_prompt": True,
            "suggest": suggest,
        }

    def infill(self, call: Call, gap: Gap) -> str:
        """The Pi's text for the gap, "" if it has none now. Ended, if the call was ended."""
        # Those of the settings that are asked for: other settings begin with new ones.
        suggestions = self.suggestions
        suggestions.asked = gap
        body = self.body(gap, call.is_automatic)
        began = time.monotonic()
        try:
            answer = ask(self.settings, call, "/infill", body)
            text = answer.get("content")
            if not isinstance(text, str):
                raise PiError(NO_COMPLETION)
        except Busy:
            return ""
        except PiError as error:
            # It is away: the user is told, unless she knows and did not ask for a completion now.
            is_news = not self.away_until
            self.away_until = time.monotonic() + AWAY_SECONDS
            if is_news or not call.is_automatic:
                self.client.show(2, str(error))
            return ""
        self.away_until = 0.0
        is_cut = answer.get("replaced") or answer.get("preempted")
        if not is_cut:
            suggestions.add(gap, text, time.monotonic() - began)
        return text

    # What the client asks for by `workspace/executeCommand`.

    def execute(self, params: Any, request_id: Any) -> Any:
        command = get(params, "command", str)
        argument = get(params, "arguments", list)[0]
        if command == ACCEPTED:
            return self.count(request_id, get(argument, "characters", int))
        if command == INSTRUCT:
            return self.instruct(argument, request_id)
        raise ProtocolError(f"expected {ACCEPTED} or {INSTRUCT}, got {command}")

    def count(self, request_id: Any, characters: int) -> Any:
        """Have the Pi count what the user accepted."""
        call = Call(request_id)

        def work() -> None:
            with suppress(PiError):  # only a count
                ask(self.settings, call, "/v1/accepted", {"characters": characters})

        return self.client.start(call, work)

    def instruct(self, argument: Any, request_id: Any) -> Any:
        """Change a range of a document as instructed: {"uri", "range", "instruction"}."""
        document = self.find({"textDocument": argument})
        if self.settings.excludes(document.uri):
            raise PiError("this text is never sent; the setting exclude has the names of files")
        start, end = positions(argument)
        text = document.text
        selection = text[document.offset(start) : document.offset(end)]
        line_end = document.line_end(selection)
        body = {
            "prompt": unix(selection),
            "instruction": get(argument, "instruction", str),
            "language": document.language or "text",  # which the Pi wants named
            "max_tokens": MAX_TOKENS,
            "temperature": 0.0,
        }
        call = Call(request_id)

        def work() -> None:
            answer = ask(self.settings, call, "/v1/complete", body)
            if lacking := lacks(answer):
                raise PiError(f"{lacking}; nothing was changed")
            is_open = self.documents.get(document.uri) is document
            if not is_open or document.text != text:
                raise PiError("the text has changed meanwhile; nothing was changed")
            changed = LINE_END.sub(line_end, answer["completion"].rstrip("\r\n"))
            changed += selection[len(selection.rstrip("\r\n")) :]
            edits = [{"range": span(start, end), "newText": changed}]
            edit: Object = {"changes": {document.uri: edits}}
            if self.has_versions:
                versioned = {"uri": document.uri, "version": document.version}
                edit = {"documentChanges": [{"textDocument": versioned, "edits": edits}]}
            params = {"label": "Cerebrum", "edit": edit}
            # The editor itself says if it does not apply the change.
            self.client.send(id=request_id, method="workspace/applyEdit", params=params)

        return self.client.start(call, work)


JETBRAINS = re.compile(r"\(build [A-Z]+-\d")  # in the version of a JetBrains IDE, by LSP4IJ


class Session:
    """One editor's session: its beginning and end, and who handles which message."""

    def __init__(self, client: Client, settings: Settings, faults: list[str]) -> None:
        self.client = client
        self.faults = faults
        self.workspace = workspace = Workspace(client, settings)
        self.is_stopping = False
        self.requests = {  # of params and the id
            "initialize": self.initialize,
            "shutdown": self.shutdown,
            "textDocument/inlineCompletion": workspace.inline,
            "textDocument/completion": workspace.menu,
            "textDocument/documentHighlight": workspace.read,
            "workspace/executeCommand": workspace.execute,
        }
        self.notifications = {
            "$/cancelRequest": self.cancel,
            "workspace/didChangeConfiguration": workspace.configure,
            "textDocument/didOpen": workspace.open,
            "textDocument/didChange": workspace.change,
            "textDocument/didClose": workspace.close,
        }

    def serve(self, stream: BinaryIO) -> int:
        """Read messages until the client says `exit` or its end closes. Returns the exit status."""
        while True:
            try:
                self.handle(read_message(stream))
            except ProtocolError as error:
                self.client.send(id=None, **failure(error.code, str(error)))
            except EOFError:
                return 0 if self.is_stopping else 1

    def handle(self, message: Any) -> None:
        """Do what a message asks for. EOFError if that is to end."""
        if not isinstance(message, dict):
            raise BadRequest(f"expected a JSON object, got {kind_of(message)}")
        method = message.get("method")
        request_id = message.get("id")
        if method == "exit":
            raise EOFError
        if method is None:  # a response
            return
        response = outcome(lambda: self.run(method, message.get("params"), request_id))
        if request_id is not None and response.get("result") is not LATER:
            self.client.send(id=request_id, **response)
        elif "error" in response:  # of a notification
            self.client.show(4, f"{method}: {response['error']['message']}", "window/logMessage")

    def run(self, method: str, params: Any, request_id: Any) -> Any:
        if request_id is None:
            if notified := self.notifications.get(method):
                notified(params)
            return None
        requested = self.requests.get(method)
        if not requested:
            raise UnknownMethod(f"unknown method {method}")
        return requested(params, request_id)

    def initialize(self, params: Any, _request_id: Any) -> Any:
        for fault in self.faults:
            self.client.show(1, fault)
        workspace = self.workspace
        workspace.configure(params, "initializationOptions")
        versions = "capabilities.workspace.workspaceEdit.documentChanges"
        workspace.has_versions = get(params, versions, bool, False)
        workspace.is_jetbrains = bool(JETBRAINS.search(str(params.get("clientInfo"))))
        capabilities = {
            "textDocumentSync": {"openClose": True, "change": 2},
            "inlineCompletionProvider": {},
            "executeCommandProvider": {"commands": [ACCEPTED, INSTRUCT]},
            "documentHighlightProvider": workspace.settings.read_ahead,
        }
        if workspace.settings.completion:
            capabilities["completionProvider"] = {"triggerCharacters": TRIGGERS}
        return {
            "capabilities": capabilities,
            "serverInfo": {"name": "cerebrum", "version": VERSION},
        }

    def cancel(self, params: Any) -> None:
        self.client.end_calls(lambda call: call.request_id == params["id"], CANCELLED)

    def shutdown(self, *_: Any) -> None:
        self.is_stopping = True
        self.client.end_calls(lambda _: True, CANCELLED)


HELP = """Usage: cerebrum_lsp.py [--stdio | --help | --version]

A language server on stdin and stdout: code completions as ghost text from Cerebrum, for an editor
that starts this command. CEREBRUM_URL is the address of the Raspberry Pi, and CEREBRUM_CM4_API_KEY
your key, if you have one. Other settings are in ~/.config/cerebrum/lsp.toml."""


def main() -> int:
    options = sys.argv[1:]
    if options == ["--version"]:
        print("cerebrum_lsp.py", VERSION)
        return 0
    if options not in ([], ["--stdio"]):
        print(HELP)
        return 0 if options == ["--help"] else 2
    client = Client(sys.stdout.buffer)
    sys.stdout = sys.stderr  # nothing else may write to the editor
    session = Session(client, *first_settings(os.environ))
    return session.serve(sys.stdin.buffer)


if __name__ == "__main__":
    sys.exit(main())
