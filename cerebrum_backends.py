"""What stands behind the Pi: the backends of models.toml, and how their answers are read.

In: a table of `[[backends]]`, and the bytes that a backend has sent. Out: a `BackendConfig`, and pairs of (kind, value)
that do not depend on the backend's API, as `Gateway.complete` in cm4d.py describes them. A backend of our own streams
these pairs' events itself, which `take_apart` reads. What another engine streams is read by a `Translator`. It also
does what the engine does not: it ends the text where the thing asked for is whole.

    >>> from cerebrum_backends import Translator
    >>> from cerebrum_dialects import OPENAI_TEXT
    >>> asked = {"prompt": "def f(n):\\n", "language": "python", "mode": "complete"}
    >>> translator = Translator(OPENAI_TEXT, asked, [])
    >>> list(translator.feed(b'data: {"choices": [{"text": "    return n\\\\n\\\\nf(1)"}]}\\n\\n', 0.0))
    [('text', b'data: {"token": "    return n\\\\n", "total_tokens": 1}\\n\\n'),
     ('done', {'finish_reason': 'block', 'total_tokens': 1})]

A backend is not trusted. Framing or JSON that is not exact is refused, and so is a stream that ends without saying so;
of an error's text only what our own backends write reaches a client. The circuit breaker counts `BackendFailure` alone.

Pure: no socket, no clock, no state of the daemon. Standard library only; cerebrum_ending.py is loaded only for other
engines.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cerebrum_common import (
    STATUS_LINE,
    ChunkedDecoder,
    ConfigError,
    Environment,
    Field,
    HttpError,
    Model,
    parse_framing,
    parse_headers,
    parse_json,
    read_table,
    sse_event,
)
from cerebrum_dialects import (
    APIS,
    COUNTS,
    LENGTH,
    MAX_N_CTX,
    MAX_TOKENS,
    Dialect,
    members_of,
    read_counts,
    read_overflow,
    read_progress,
)

# --------------------------------------------------------------------------------------- configuration

URL = re.compile(r"(https?)://([A-Za-z0-9.\-_]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?(/[A-Za-z0-9._~/\-]*)?")
MAX_PLACES = 64  # of a backend


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a backend is. `authority` goes into the Host header, `prefix` before every path."""

    host: str
    port: int
    authority: str
    prefix: str
    tls: bool


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """One backend. `key` is sent to it and to nobody else; `key_env` names the variable that it comes from."""

    id: str
    endpoint: Endpoint
    api: str = "cerebrum"  # or one of APIS
    key: str = ""
    key_env: str = ""
    max_concurrent: int = 2
    ca_file: str = ""  # of a private certificate authority
    n_ctx: int = 0  # tokens; 0: what the backend tells
    infill: str = "fim"  # how an "openai" backend is asked: with the model's marks if it has any, or by "suffix"


def parse_url(text: str, name: str) -> Endpoint:
    """`http://host[:port][/prefix]` to an Endpoint; ConfigError names the setting."""
    match = URL.fullmatch(text)
    if not match or int(match[3] or 1) not in range(1, 65536):
        raise ConfigError(f"{name}: expected http://HOST[:PORT] or https://HOST[:PORT], got {text!r}")
    scheme, host, port, prefix = match.groups()
    tls = scheme == "https"
    authority = f"{host}:{port}" if port else host
    return Endpoint(host.strip("[]"), int(port or (443 if tls else 80)), authority, (prefix or "").rstrip("/"), tls)


def read_backends(tables: Sequence[Any], environ: Environment, max_concurrent: int) -> tuple[BackendConfig, ...]:
    """`[[backends]]` of models.toml. ConfigError says which table is wrong and how."""
    backends = tuple(_read_backend(table, f"backend {number}", environ) for number, table in enumerate(tables, 1))
    if len({backend.id for backend in backends}) != len(backends):
        raise ConfigError("backends: expected every id once")
    return backends or (
        BackendConfig(
            id="vps",
            endpoint=parse_url(environ.text("CEREBRUM_VPS_URL", "http://127.0.0.1:9000"), "CEREBRUM_VPS_URL"),
            key=environ.key("CEREBRUM_API_KEY"),
            key_env="CEREBRUM_API_KEY",
            max_concurrent=max_concurrent,
        ),
    )


BACKEND = {
    "id": Field(str, required=True, pattern=r"[A-Za-z0-9._\-]{1,40}"),
    "url": Field(str, required=True),
    "api": Field(str, default="cerebrum", choices=("cerebrum", *APIS)),
    "key_env": Field(str, default="", pattern="(?:[A-Za-z_][A-Za-z0-9_]{0,99})?"),
    "ca_file": Field(str, default=""),
    "infill": Field(str, default="fim", choices=("fim", "suffix")),
    "max_concurrent": Field(int, 1, MAX_PLACES, 2),
    "n_ctx": Field(int, 0, MAX_N_CTX, 0),
}


def _read_backend(table: Any, where: str, environ: Environment) -> BackendConfig:
    given = read_table(table, where, BACKEND)
    endpoint = parse_url(given.pop("url"), f"{where}: url")
    if given["api"] != "cerebrum":  # the addresses that these engines tell their users end in /v1 as often as not
        endpoint = replace(endpoint, prefix=endpoint.prefix.removesuffix("/v1"))
    if given["ca_file"] and not (endpoint.tls and Path(given["ca_file"]).is_file()):
        raise ConfigError(f"{where}: ca_file: expected a file, and a url with https, got {given['ca_file']!r}")
    return BackendConfig(endpoint=endpoint, key=environ.key(given["key_env"]), **given)


# ------------------------------------------------------------------------------------------- refusals


class BackendFailure(HttpError):
    """A backend or the network on the way to it is at fault: 503, counted by its breaker. `reason` is in our words."""

    def __init__(self, reason: str) -> None:
        super().__init__("VPS_UNAVAILABLE", f"VPS backend is unavailable ({reason})")
        self.reason = reason


class TooLong(HttpError):
    """A prompt exceeds the context: 400, and `extra` has `n_ctx` and `prompt_tokens` as far as they are told."""

    def __init__(self, message: str, told: Mapping[str, int]) -> None:
        super().__init__("INVALID_REQUEST", message, extra=told)


LONG_PROMPT = "expected a shorter prompt, got one that exceeds the context"


class Misfit(HttpError):
    """A backend is there, but the two are not configured for each other: 503, not counted by its breaker."""

    def __init__(self, message: str) -> None:
        super().__init__("VPS_UNAVAILABLE", message)


MAX_MESSAGE_CHARACTERS = 2000  # of an error of a backend that is passed on
PASSED_ON = frozenset(  # codes of the VPS that mean something to the client; all others become VPS_UNAVAILABLE
    {"INVALID_REQUEST", "MODEL_NOT_FOUND", "SUPERSEDED", "MODEL_BUSY", "RATE_LIMIT", "MODEL_LOAD_FAILED"}
    | {"OVERLOADED", "RESOURCE_EXHAUSTED", "SHUTTING_DOWN", "VPS_UNAVAILABLE"}
)
EXPLAINED = {
    401: "VPS backend refuses our key: {} of the Pi and CEREBRUM_API_KEY of the VPS do not match",
    421: "VPS backend does not know the name it was asked by: add the host of its URL to"
    " CEREBRUM_ALLOWED_HOSTS on the VPS",
}
CODE = re.compile(r"[A-Z][A-Z_]{0,63}")
# What could act on a client's terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def our_error(members: Any, key: str) -> tuple[str, str, dict[str, Any]] | None:
    """(message, code, further members) if this JSON value is an error in the form of both daemons, else None."""
    if not isinstance(members, dict) or members.get("error") is not True:
        return None
    message, code = members.get("message"), members.get("code")
    if not isinstance(message, str) or not isinstance(code, str) or not CODE.fullmatch(code):
        return None
    message = CONTROLS.sub(" ", message)
    message = message.replace(key, "***") if key else message  # before the cut, which could leave half of the key
    more = {name: members[name] for name in ("prompt_tokens", "n_ctx") if LENGTH.accepts(members.get(name))}
    return message[:MAX_MESSAGE_CHARACTERS], code, more


def told_error(message: str, code: str, more: Mapping[str, int]) -> HttpError:
    """The error for the client of an error that a backend of our own tells."""
    if code == "INVALID_REQUEST" and len(more) == 2:
        return TooLong(message, more)
    return HttpError(code if code in PASSED_ON else "VPS_UNAVAILABLE", message, extra=more)


def refusal(status: int, body: bytes, key: str, key_env: str) -> HttpError:
    """The error for the client when a backend of our own answers with a status other than 200. BackendFailure if none
    would answer that way."""
    try:
        ours = our_error(parse_json(body), key)
    except HttpError:
        ours = None
    if ours is None or status < 400:
        return BackendFailure(f"it answered {status}, and not as a Cerebrum backend does")
    message, code, more = ours
    if code in PASSED_ON:
        return told_error(message, code, more)
    if status in EXPLAINED:
        return Misfit(EXPLAINED[status].format(key_env or "key_env"))
    return HttpError("VPS_UNAVAILABLE", f"VPS backend answered {status} {code}")


def engine_refusal(status: int, body: bytes, key_env: str) -> HttpError:
    """The same for another engine, whose own words a client does not get: they may tell a path or a key. The error for
    a prompt that is too long has the members of vpsd's, so that the prompt is fitted again."""
    error = (parse_leniently(body) or {}).get("error")
    if status in (401, 403):
        return Misfit(
            f"VPS backend refuses our key: expected the right one in {key_env or 'a variable that key_env names'}"
        )
    if status == 404:
        return HttpError("MODEL_NOT_FOUND", "VPS backend does not have this model, or does not know this call")
    if status == 429:
        return HttpError("RATE_LIMIT", "VPS backend has too many requests; try again later")
    if status in (400, 413, 422) and (told := read_overflow(error)) is not None:
        return TooLong(LONG_PROMPT, told)
    if status == 503 and members_of(error).get("message") == "Loading model":
        return Misfit("VPS backend is loading its model")
    if status not in range(400, 500) and status != 501:
        return BackendFailure(f"it answered {status}")
    return HttpError("VPS_UNAVAILABLE", f"VPS backend refuses the request ({status})")


def parse_leniently(data: bytes) -> dict[str, Any] | None:
    """The JSON object of an engine, None if it is not one. Bytes that are not UTF-8 become lone surrogates, since an
    engine may cut its text inside a character."""
    try:
        value = json.loads(data.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ----------------------------------------------------------------------------------------- HTTP answers


class Body:
    """The body of an answer by its framing (RFC 9112 section 6.3): chunks, a length, or until the close.

    `failure` is its first fault. It is kept rather than raised, because the payload before it still counts: what a
    client sees must not depend on how the bytes were split.
    """

    def __init__(self, length: int | None, chunked: bool) -> None:
        self.done = length == 0
        self.failure: BackendFailure | None = None
        self.surplus = False  # bytes came behind its end, which are no part of it
        self._chunks = ChunkedDecoder() if chunked else None
        self._left = length

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`, up to the end of the body or its first fault."""
        if self.done:
            payload, past = b"", data
        elif self._chunks:
            try:
                payload = self._chunks.feed(data)
            except HttpError:
                self.failure = BackendFailure("it sent a malformed chunk")
                return self._chunks.before
            self.done, past = self._chunks.done, self._chunks.rest
        elif self._left is not None:
            payload, past = data[: self._left], data[self._left :]
            self._left -= len(payload)
            self.done = self._left == 0
        else:
            payload, past = data, b""
        self.surplus = self.surplus or bool(past)
        return payload

    def end(self, cut: str) -> None:
        """The connection has ended, by a plain close or as `cut` says. That is a fault unless the body is whole."""
        if not self.done and (cut or self._chunks or self._left):
            self.failure = BackendFailure(f"{cut or 'it ended'} in the middle of its answer")


def parse_answer(block: bytes, kinds: Sequence[str]) -> tuple[int, str, Body]:
    """A whole response head to its status, media type and body. HttpError or BackendFailure if it is not exact
    HTTP/1.x, or if it is a 200 of a media type that is not among `kinds`."""
    first, *lines = block[:-4].split(b"\r\n")
    match = STATUS_LINE.fullmatch(first)
    if not match:
        raise BackendFailure("its answer is not HTTP/1.1")
    status, headers = int(match[1]), parse_headers(lines)
    if status == 200 and headers.get("content-encoding", "identity").lower() != "identity":
        raise BackendFailure("its answer has a Content-Encoding that nobody asked for")
    kind = headers.get("content-type", kinds[0]).partition(";")[0].strip(" \t").lower()
    if status == 200 and kind not in kinds:
        raise BackendFailure("its answer is not of the type that was asked for")
    length, chunked = parse_framing(first[:8].decode(), headers)
    return status, kind, Body(0 if status in (204, 304) else length, chunked)


# --------------------------------------------------------------------------------------------- results

COUNT = Field(int, 0, 10**9)
SECONDS = Field(float, 0, 10**9)
RESULT = dict.fromkeys(("total_tokens", "prompt_tokens", "cached_tokens"), COUNT)
RESULT |= dict.fromkeys(("inference_time", "load_time", "ttft"), SECONDS)
RESULT |= {"finish_reason": Field(str, 1, 40)}
ENGINE_RESULT = RESULT | {"tokens_per_second": SECONDS, "draft_tokens": COUNT, "accepted_tokens": COUNT}
# Members that a result or an error of ours consists of: no backend may set them.
OURS = frozenset({"completion", "language", "model", "timestamp", "mode", "kept", "backend"})
OURS |= {"done", "token", "error", "message", "code"}


def read_result(done: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a done event that may be passed on: none of ours, and none of a wrong type or range.

    >>> read_result({"done": True, "model": "lies", "total_tokens": "3", "prompt_tokens": 5, "ttft": 0.25})
    {'prompt_tokens': 5, 'ttft': 0.25}
    """
    return {
        name: value
        for name, value in done.items()
        if name not in OURS
        and (name not in RESULT or RESULT[name].accepts(value) or (name, value) == ("ttft", None))  # without a token
    }


# --------------------------------------------------------------------------------------------- models

TOLD = {
    "n_ctx": LENGTH,
    "loaded": Field(bool),
    "encoding": Field(str, 1, 100),
    "memory_mb": Field(float, 0, 10**9),
}


def read_models(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the /v1/models of a backend of our own tells of each model that it has: of TOLD what it tells.

    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, {"id": "n", "available": False}]})
    {'m': {'loaded': False}}
    """
    listed = answer.get("models")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    models: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry.get("id"), str) and entry.get("available") is not False:
            models[entry["id"]] = {name: entry[name] for name, kind in TOLD.items() if kind.accepts(entry.get(name))}
    return models


def find_models(models: Sequence[Model], listed: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Which of our models a backend has: by our id its own name for it, and what it tells. It has a model if it lists
    the id, an alias, or the file's name with or without its folder and ending."""
    names = {re.split(r"[/\\\\]", name)[-1].removesuffix(".gguf"): name for name in reversed([*listed])}
    found = {}
    for model in models:
        file = names.get(model.file.removesuffix(".gguf")) if model.file else None
        name = next((name for name in (model.id, *model.aliases) if name in listed), file)
        if name is not None:
            found[model.id] = name, listed[name]
    return found


def read_loaded(answer: Mapping[str, Any]) -> list[str]:
    """The ids of the models in the memory of a backend of our own, from its /health."""
    loaded = answer.get("models_loaded")
    return [id for id in loaded if isinstance(id, str)] if isinstance(loaded, list) else []


# ------------------------------------------------------------------------------- the events of our own backends

# Nearly all traffic is runs of token events exactly as vpsd writes them, which are relayed untouched. Any other valid
# event is parsed, which costs microseconds. The possessive `++` keeps the regex from backtracking into a long run.
TOKEN = (
    rb'data: \{"token": "(?:[^"\\\x00-\x1f\x7f-\xff]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
    rb', "total_tokens": (?:0|[1-9][0-9]{0,8})\}\n\n'
)
TOKENS = re.compile(rb"(?:%b)++" % TOKEN)

BOM = b"\xef\xbb\xbf"
MAX_EVENT_BYTES = 262_144  # one SSE event; a token's has 60


class Events:
    """Cuts a stream that arrives in any split into blocks of whole SSE events. Line ends may be LF or CRLF."""

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of an event
        self._first = True  # a byte order mark may come before it (the SSE standard, section 9.2.6)
        self._cr = b""  # perhaps half of a CRLF

    @property
    def inside(self) -> bool:
        """An event has begun and has not ended."""
        return bool(self._rest or self._cr)

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, with LF line ends, or b"". BackendFailure for an event that is too long.

        `data` is at most one read and shorter than the limit. So only an event that began in an earlier read can be too
        long, and it is the first of its block: raising loses no event.
        """
        if self._cr or b"\r" in data:
            data = self._cr + data
            self._cr = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n")
        if not self._rest and not self._first and data.endswith(b"\n\n"):
            return data
        begun = len(self._rest)
        self._rest += data
        end = self._rest.rfind(b"\n\n", max(0, begun - 1)) + 2
        block = bytes(self._rest[:end]) if end > 1 else b""
        del self._rest[: len(block)]
        # The last byte of an unfinished event may be the first of its two line ends.
        if begun and (block.index(b"\n\n") if block else len(self._rest) - 1) > MAX_EVENT_BYTES:
            raise BackendFailure(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        if block and self._first:
            self._first, block = False, block.removeprefix(BOM)
        return block


Pair = tuple[str, Any]  # (kind, value), as `Gateway.complete` describes them


def take_apart(block: bytes, key: str) -> Iterator[Pair]:
    """A block of whole events to pairs; ("done", dict) holds the members as the backend sent them.

    An error event is raised as its error. BackendFailure for an event that is not JSON.
    """
    position = 0
    while position < len(block):
        if match := TOKENS.match(block, position):
            yield "text", match[0]
            position = match.end()
            continue
        end = block.index(b"\n\n", position)
        if pair := read_event(block[position:end], key):
            yield pair
        position = end + 2


def data_of(event: bytes) -> bytes:
    """The data of an event, whose lines may be many."""
    return b"\n".join(line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:"))


def read_event(event: bytes, key: str) -> Pair | None:
    """One event, without its final line ends, to a pair as in `take_apart`; None for an unknown one."""
    data = data_of(event)
    if not data:
        return ("idle", None) if event.startswith(b":") else None
    try:
        members = parse_json(data)
    except HttpError:
        raise BackendFailure("it sent an event that is not JSON") from None
    if "error" in members:
        ours = our_error(members, key)
        if ours is None:
            raise BackendFailure("it sent an error without message and code")
        raise told_error(*ours)
    if members.get("done") is True:
        return "done", members
    if isinstance(members.get("token"), str):
        if not COUNT.accepts(members.get("total_tokens")):
            raise BackendFailure("it sent a token without its number")
        return "text", text_event(members["token"], members["total_tokens"])
    progress = members.get("progress")
    return ("progress", progress) if isinstance(progress, dict) else None


def read_text(events: bytes) -> str:
    """The text in a block of whole native token events."""
    return "".join(json.loads(event[6:])["token"] for event in events.split(b"\n\n")[:-1])


def text_event(text: str, number: int = 1) -> bytes:
    """A native token event with this text, as the token of this number."""
    return sse_event({"token": text, "total_tokens": number})


# ------------------------------------------------------------------------------ the events of other engines

# Marks that an engine may leak. They end a text, unless the prompt itself has them.
MARKS = (
    "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>",
    "<|file_sep|>", "<|repo_name|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip
DONE = b"[DONE]"
SURROGATES = re.compile("[\ud800-\udfff]")


class Characters:
    """Puts characters together that an engine has cut: halves of a surrogate pair, or bytes of UTF-8 (as the lone
    surrogates of Python's "surrogateescape")."""

    def __init__(self) -> None:
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.half = ""  # the first of a pair

    def feed(self, text: str) -> str:
        if not self.half and not self.bytes.getstate()[0] and not SURROGATES.search(text):
            return text
        text, self.half = self.half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self.half = text[:-1], text[-1]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        escaped = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        return self.bytes.decode(escaped.encode("utf-8", "surrogateescape"))


class Translator:
    """What another engine streams, as the pairs of a native stream. ("done", …) comes last: at the engine's own end, or
    before it, where the thing asked for is whole. `asked` has the fields of vpsd's request."""

    def __init__(self, dialect: Dialect, asked: Mapping[str, Any], marks: Sequence[str]) -> None:
        from cerebrum_ending import Cutter, Ending, wants_extras  # 3 MB that a Pi without other engines need not have

        turns = asked.get("messages") or ()
        given = [asked.get("prompt", ""), asked.get("suffix", ""), *(turn["content"] for turn in turns)]
        marks = [mark for mark in {*MARKS, *marks} if not any(mark in text for text in given)]
        mode = asked["mode"]
        ending = Ending(
            mode,
            asked.get("language"),
            "" if turns else given[0],
            asked.get("suffix"),
            asked.get("stop_at", "auto"),
            extras=wants_extras([turn["content"] for turn in turns if turn["role"] == "user"]),
            indent=asked.get("indent", 0),
        )
        self.read_event = dialect.read_event
        self.cutter = Cutter([*asked.get("stop", ()), *marks], ending)
        self.characters = Characters()
        self.most = asked.get("max_tokens") or MAX_TOKENS
        self.limit = asked.get("predict_ms", 0) / 1000  # seconds; 0: none
        self.progress = asked.get("progress", False)
        self.counting: Mapping[str, Any] = {}  # the last event that counts tokens
        self.tokens = 0  # events with text; an engine may put several tokens into one
        self.began = 0.0  # when the first of them came
        self.has_line = False  # a line end has been generated
        self.heard = False  # an event came
        self.life = 0  # events that show that the engine gets on
        self.reason: str | None = None  # the engine has ended its text
        self.done = False

    def feed(self, block: bytes, now: float) -> Iterator[Pair]:
        """The pairs of a block of whole events, which came at `now` (seconds, monotonic), up to the pair "done".
        BackendFailure for an event that is an error or not JSON."""
        for event in block.split(b"\n\n"):
            if self.done or not event:
                continue
            try:
                yield from self._event(event, now)
            except BackendFailure:
                if self.reason is None:
                    raise
                yield self.end()  # the text is whole; what follows it was only to count its tokens

    def end(self) -> Pair:
        """The last pair, at the end of the whole stream. BackendFailure if the engine has not said why its text ended:
        it may have been cut."""
        if self.reason is None:
            if not self.heard:  # a prompt that is too long for llama_cpp.server ends so
                raise HttpError("VPS_UNAVAILABLE", "VPS backend answered nothing; a lower n_ctx of it may help")
            raise BackendFailure("it ended without saying that it is done")
        return self._done(self.reason)

    def _event(self, event: bytes, now: float) -> Iterator[Pair]:
        data = data_of(event)
        if data.strip() == DONE:
            yield self.end()
            return
        if not data:
            return
        members = parse_leniently(data)
        if members is None:
            raise BackendFailure("it sent an event that is not JSON")
        if error := members.get("error"):
            if not self.tokens and (told := read_overflow(error)) is not None:
                raise TooLong(LONG_PROMPT, told)
            raise BackendFailure("it reported an error")
        if any(members.get(name) is not None for name in COUNTS):
            self.counting = members
        self.heard = True
        piece = self.read_event(members)
        self.life += bool(piece.text or piece.thought or "prompt_progress" in members)
        if piece.reason == "error":
            raise BackendFailure("it gave up")
        if self.reason is None:
            yield from self._text(piece.text, piece.reason, now)
        if self.done:
            return
        if members.get("stop") is True:  # the last event of llama-server's own calls
            yield self._done(self.reason or "stop")
        elif self.progress and not self.tokens:
            read, total = read_progress(members)
            if COUNT.accepts(read) and COUNT.accepts(total):
                yield "progress", {"stage": "prefill", "done": read, "total": total}

    def _text(self, text: str, reason: str | None, now: float) -> Iterator[Pair]:
        if text and self.tokens == self.most:  # an event has a token at least: the engine does not keep to its limit
            if rest := self.cutter.flush(whole=False):
                yield "text", text_event(rest, self.tokens)
            yield self._done("length")
            return
        if text:
            self.began = self.began if self.tokens else now
            self.tokens += 1
            self.has_line = self.has_line or "\n" in text
            text = self.characters.feed(text)
        text, ended = self.cutter.feed(text)
        if not ended and not reason and self.limit and self.has_line and now - self.began > self.limit:
            ended, text = "length", text + self.cutter.flush(whole=False)
        elif reason and not ended:
            text += self.cutter.flush(whole=reason == "stop")
        if text:
            yield "text", text_event(text, self.tokens)
        self.reason = reason
        if ended:
            yield self._done(ended)

    def _done(self, reason: str) -> Pair:
        self.done = True
        told = read_counts(self.counting)
        counts = {name: value for name, value in told.items() if ENGINE_RESULT[name].accepts(value)}
        counts["total_tokens"] = counts.get("total_tokens") or self.tokens
        return "done", {"finish_reason": reason, **counts}
