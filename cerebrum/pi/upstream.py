"""The Pi's HTTP client for backends: their settings, one request and its answer, and the events of
our own vpsd.

A backend is not trusted. Inexact framing is refused, and so are a vpsd's inexact JSON and a stream
that ends without its done event. Only error texts of our own backends reach a client. The circuit
breaker counts only `BackendFailure`.

An `Upstream` owns its spare connection; every other connection belongs to the one request it was
opened for. `Loop` owns the cache of resolved names. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import ssl
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any

from cerebrum.fields import Field, members_of, parse_json
from cerebrum.http import (
    READ_BYTES,
    STATUS_LINE,
    BodyDecoder,
    is_ip_literal,
    parse_framing,
    parse_headers,
    scan_head,
)
from cerebrum.pi.dialects import APIS, LENGTH, MAX_N_CTX, read_overflow
from cerebrum.settings import ConfigError, Environment, read_table
from cerebrum_common import HttpError, request_id_var, sse_event

# ------------------------------------------------------------------------------------ configuration

URL = re.compile(
    r"(https?)://([A-Za-z0-9.\-_]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])"
    r"(?::([0-9]{1,5}))?(/[A-Za-z0-9._~/\-]*)?"
)
MAX_PLACES = 64  # concurrent requests to one backend


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A backend's address. `authority` goes into the Host header, `prefix` before every path."""

    host: str
    port: int
    authority: str
    prefix: str
    tls: bool


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """One backend. `key` is sent to this backend only; `key_env` names the environment variable
    that holds the key.
    """

    id: str
    endpoint: Endpoint
    api: str = "cerebrum"  # or one of APIS
    key: str = ""
    key_env: str = ""
    max_concurrent: int = 2
    ca_file: str = ""  # of a private certificate authority
    n_ctx: int = 0  # tokens; 0: as the backend reports
    # for an "openai" backend: use the model's FIM marks if it has any, or the "suffix" member
    infill: str = "fim"

    @property
    def variable(self) -> str:
        """`key_env` for messages. What does not look like a variable may be the key itself."""
        return self.key_env if self.key_env.isupper() else "the variable of key_env"

    @property
    def is_paid(self) -> bool:
        """Whether the backend is probably a paid cloud service."""
        return self.api == "openai" and self.endpoint.tls

    def parse(self, body: bytes) -> dict[str, Any]:
        """Parse the backend's JSON object: vpsd's strictly, another engine's leniently. HttpError
        if it is none.
        """
        return parse_json(body) if self.api == "cerebrum" else parse_leniently(body)


def parse_url(text: str, name: str) -> Endpoint:
    """Parse `http://host[:port][/prefix]` into an Endpoint; ConfigError names the setting."""
    match = URL.fullmatch(text)
    if not match or int(match[3] or 1) not in range(1, 65536):
        raise ConfigError(
            f"{name}: expected http://HOST[:PORT] or https://HOST[:PORT], got something else"
        )
    scheme, host, port, prefix = match.groups()
    tls = scheme == "https"
    authority = f"{host}:{port}" if port else host
    return Endpoint(
        host.strip("[]"),
        int(port or (443 if tls else 80)),
        authority,
        (prefix or "").rstrip("/"),
        tls,
    )


def read_backends(
    tables: Sequence[Any], environ: Environment, max_concurrent: int
) -> tuple[BackendConfig, ...]:
    """Read `[[backends]]` of models.toml. ConfigError names the wrong table and its fault."""
    backends = tuple(
        _read_backend(table, f"backend {number}", environ) for number, table in enumerate(tables, 1)
    )
    if len({backend.id for backend in backends}) != len(backends):
        raise ConfigError("backends: expected every id once")
    if backends:
        return backends
    endpoint = parse_url(
        environ.text("CEREBRUM_VPS_URL", "http://127.0.0.1:9000"), "CEREBRUM_VPS_URL"
    )
    key = environ.key("CEREBRUM_API_KEY")
    return (
        BackendConfig(
            "vps", endpoint, key=key, key_env="CEREBRUM_API_KEY", max_concurrent=max_concurrent
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
    if (
        given["api"] != "cerebrum"
    ):  # the address that such an engine gives its users often ends in /v1
        endpoint = replace(endpoint, prefix=endpoint.prefix.removesuffix("/v1"))
    if given["ca_file"] and not endpoint.tls:
        raise ConfigError(f"{where}: ca_file: expected a url with https for {given['ca_file']!r}")
    return BackendConfig(endpoint=endpoint, key=environ.key(given["key_env"]), **given)


# ----------------------------------------------------------------------------------------- refusals


class BackendFailure(HttpError):
    """A backend, or the network to it, is at fault: 503, counted by the breaker. `reason` is in our
    own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("VPS_UNAVAILABLE", f"VPS backend is unavailable ({reason})")
        self.late = reason == LATE


LATE, NO_ANSWER = "it did not answer in time", "it closed the connection without an answer"


@contextlib.contextmanager
def blamed(reason: str) -> Iterator[None]:
    """Turn every error of the backend or the network into BackendFailure: no exception's own text
    reaches a client.
    """
    try:
        yield
    except BackendFailure:
        raise
    except TimeoutError:
        raise BackendFailure(LATE) from None
    except (
        HttpError,
        OSError,
        UnicodeError,
    ):  # UnicodeError: a host name that cannot be encoded for DNS
        raise BackendFailure(reason) from None


class TooLong(HttpError):
    """A prompt exceeds the context: 400, and `extra` has `n_ctx` and `prompt_tokens` if the backend
    reports them.
    """

    def __init__(
        self,
        lengths: Mapping[str, int],
        message: str = "expected a shorter prompt, got one that exceeds the context",
    ) -> None:
        super().__init__("INVALID_REQUEST", message, extra=lengths)


class Unusable(HttpError):
    """A backend is up, but refuses our key or its host, or is still loading: not counted by its
    breaker.
    """


MAX_MESSAGE_CHARACTERS = 2000  # of a backend's error message that is passed on
# codes of the VPS that mean something to the client; all others become VPS_UNAVAILABLE
PASSED_ON = frozenset(
    {
        "INVALID_REQUEST",
        "MODEL_NOT_FOUND",
        "SUPERSEDED",
        "MODEL_BUSY",
        "RATE_LIMIT",
        "MODEL_LOAD_FAILED",
    }
    | {"OVERLOADED", "RESOURCE_EXHAUSTED", "SHUTTING_DOWN", "VPS_UNAVAILABLE"}
)
EXPLAINED = {
    401: "VPS backend refuses our key: {} of the Pi and CEREBRUM_API_KEY of the VPS do not match",
    421: "VPS backend refuses the host of its URL: add it to CEREBRUM_ALLOWED_HOSTS on the VPS",
}
ERROR_CODE = Field(str, pattern=r"[A-Z][A-Z_]{0,63}")
# Characters that could act on a client's terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def our_error(members: Mapping[str, Any], key: str) -> HttpError | None:
    """The client's error if this JSON object has the error format of our daemons, else None."""
    message, code = members.get("message"), members.get("code", "")
    if (
        members.get("error") is not True
        or not isinstance(message, str)
        or not ERROR_CODE.accepts(code)
    ):
        return None
    message = CONTROLS.sub(
        " ", message
    )  # the key goes before the cut, which could leave half of it
    message = (message.replace(key, "***") if key else message)[:MAX_MESSAGE_CHARACTERS]
    more = {
        name: members[name]
        for name in ("prompt_tokens", "n_ctx")
        if LENGTH.accepts(members.get(name))
    }
    if code == "INVALID_REQUEST" and len(more) == 2:
        return TooLong(more, message)
    return HttpError(code if code in PASSED_ON else "VPS_UNAVAILABLE", message, extra=more)


def refusal(status: int, body: bytes, config: BackendConfig) -> HttpError:
    """The client's error if a backend answers with this status. BackendFailure if no working
    backend would.
    """
    members, key_env = dict[str, Any](), config.variable
    with contextlib.suppress(HttpError):
        members = config.parse(body)
    if config.api != "cerebrum":
        return engine_refusal(status, members.get("error"), key_env)
    error = our_error(members, config.key)
    if error is None or status < 400:
        return BackendFailure(f"it answered {status}, without Cerebrum's form of an error")
    return (
        Unusable("VPS_UNAVAILABLE", EXPLAINED[status].format(key_env))
        if status in EXPLAINED
        else error
    )


def engine_refusal(status: int, error: Any, key_env: str) -> HttpError:
    """`refusal` for another engine. A client never gets the engine's own text, which may contain a
    path or a key. For an overlong prompt the error has the same members as vpsd's, so that the
    prompt is fitted again.
    """
    if status in (401, 403):
        return Unusable(
            "VPS_UNAVAILABLE", f"VPS backend refuses our key: expected the right one in {key_env}"
        )
    if status == 404:
        return HttpError(
            "MODEL_NOT_FOUND", "VPS backend does not have this model, or does not know this call"
        )
    if status == 429:
        return HttpError("RATE_LIMIT", "VPS backend has too many requests; try again later")
    if status in (400, 413, 422) and (lengths := read_overflow(error)) is not None:
        return TooLong(lengths)
    if status == 503 and members_of(error).get("message") == "Loading model":
        return Unusable("VPS_UNAVAILABLE", "VPS backend is loading its model")
    if status not in range(400, 500) and status != 501:
        return BackendFailure(f"it answered {status}")
    return HttpError("VPS_UNAVAILABLE", f"VPS backend refuses the request ({status})")


def parse_leniently(data: bytes) -> dict[str, Any]:
    """Parse an engine's JSON object; HttpError if `data` is anything else. Bytes that are not UTF-8
    become lone surrogates, since an engine may cut its text inside a character.
    """
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data.decode("utf-8", "surrogateescape"))
        if isinstance(value, dict):
            return value
    raise HttpError("INVALID_REQUEST", "expected a JSON object")


def read_tokens(answer: bytes) -> bytes:
    """The integers of `{"tokens": [1, 2]}` with commas between them, unparsed: there can be a
    million, which a parser reads in a second. HttpError for any other answer.
    """
    packed = answer.translate(None, b" \n")
    tokens = packed[11:-2]
    is_list = packed == b'{"tokens":[%b]}' % tokens and not tokens.translate(None, b"0123456789,")
    if not is_list or (tokens and b",," in b",%b," % tokens):
        raise HttpError("INVALID_REQUEST", "expected tokens")
    return tokens


# ------------------------------------------------------------------------------------- HTTP answers


def parse_answer(block: bytes, kind: str) -> tuple[int, BodyDecoder]:
    """Parse a whole response head into status and body. HttpError or BackendFailure if the head is
    not exact HTTP/1.x, or if a 200 has a Content-Encoding or another media type than `kind`.
    """
    first, *lines = block[:-4].split(b"\r\n")
    match = STATUS_LINE.fullmatch(first)
    if not match:
        raise BackendFailure("its answer is not HTTP/1.1")
    status, headers = int(match[1]), parse_headers(lines)
    if status == 200 and headers.get("content-encoding", "identity").lower() != "identity":
        raise BackendFailure("its answer has a Content-Encoding that nobody asked for")
    if (
        status == 200
        and headers.get("content-type", kind).partition(";")[0].strip(" \t").lower() != kind
    ):
        raise BackendFailure("its answer is not of the type that was asked for")
    length, chunked = parse_framing(first[:8].decode(), headers)
    return status, BodyDecoder(0 if status in (204, 304) else length, chunked)


# ------------------------------------------------------------------------------------------ results

COUNT = Field(int, 0, 10**9)
SECONDS = Field(float, 0, 10**9)
RESULT = dict.fromkeys(
    ("total_tokens", "prompt_tokens", "cached_tokens", "draft_tokens", "accepted_tokens"), COUNT
)
RESULT |= dict.fromkeys(("inference_time", "load_time", "ttft", "tokens_per_second"), SECONDS)
RESULT |= dict.fromkeys(("confidence", "text_confidence"), Field(float, 0, 1))
RESULT |= {"finish_reason": Field(str, 1, 40)}
# Members that we write into results and errors ourselves: no backend may set them.
OURS = frozenset(
    {"completion", "language", "model", "timestamp", "mode", "kept", "backend", "type_through"}
)
OURS |= {"done", "token", "error", "message", "code"}


def read_result(done: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a done event that may be passed on: none in OURS, and none of a wrong type or
    range.

    >>> read_result({"done": True, "model": "lies", "total_tokens": "3", "prompt_tokens": 5, "ttft":
    0.25}) {'prompt_tokens': 5, 'ttft': 0.25}
    """
    return {
        name: value
        for name, value in done.items()
        if name not in OURS and (name not in RESULT or RESULT[name].accepts(value))
    }


# ------------------------------------------------------------------- the events of our own backends

# Nearly all traffic is runs of token events exactly as vpsd writes them, which are relayed
# untouched. Any other valid event is parsed, which costs microseconds. Comments right behind it are
# dropped: it shows well enough that the backend is alive. The possessive `++` keeps the regex from
# backtracking into a long run.
TOKEN_EVENT = (
    rb'data: \{"token": "(?:[^"\\\x00-\x1f\x7f-\xff]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
    rb', "total_tokens": (?:0|[1-9][0-9]{0,8})\}\n\n'
)
TOKENS = re.compile(rb"(?:%b)++" % TOKEN_EVENT)
TOKENS_OR_EVENT = re.compile(rb"((?:%b)++)|(?s:(.*?)\n\n)(?::[^\n]*+\n\n)*+" % TOKEN_EVENT)
MAX_EVENT_BYTES = 262_144  # one SSE event; a token event has 60


class Events:
    """Cuts a stream that arrives in any split into blocks of whole SSE events. Line ends may be LF
    or CRLF.
    """

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of an event
        self._cr = b""  # a final CR, perhaps half of a CRLF
        self.inside = False  # an event has begun and has not ended

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, with LF line ends, or b"". BackendFailure for an event
        that is too long. `data` is at most one read, which is shorter than the limit. So only the
        first event of a block can be too long, and raising loses no other event.
        """
        if self._cr or b"\r" in data:
            data = self._cr + data
            self._cr = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n")
        begun = len(self._rest)
        self._rest += data
        end = self._rest.rfind(b"\n\n", max(0, begun - 1)) + 2
        block = bytes(self._rest[:end]) if end > 1 else b""
        del self._rest[: len(block)]
        self.inside = bool(self._rest or self._cr)
        # The last byte of an unfinished event may be the first of its two line ends.
        if begun and (block.index(b"\n\n") if block else len(self._rest) - 1) > MAX_EVENT_BYTES:
            raise BackendFailure(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        return block


Pair = tuple[str, Any]  # (kind, value); `Gateway.complete` lists the kinds


def take_apart(block: bytes, key: str) -> Iterator[Pair]:
    """Split a block of whole events into pairs; ("done", dict) holds the members as the backend
    sent them. Raises the error that an error event reports, and BackendFailure for an event that is
    not JSON.
    """
    for tokens, event in TOKENS_OR_EVENT.findall(block):
        if pair := ("text", tokens) if tokens else read_event(event, key):
            yield pair


def data_of(event: bytes) -> bytes:
    """The data of an event, from one or several lines."""
    return b"\n".join(
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    )


def read_event(event: bytes, key: str) -> Pair | None:
    """Parse one event, without its final line ends, into a pair as in `take_apart`; None for an
    unknown event.
    """
    data = data_of(event)
    if not data:
        return ("idle", None) if event.startswith(b":") else None
    with blamed("it sent an event that is not JSON"):
        members = parse_json(data)
    if "error" in members:
        raise our_error(members, key) or BackendFailure("it sent an error without message and code")
    if members.get("done") is True:
        return "done", members
    if isinstance(members.get("token"), str):
        if not COUNT.accepts(members.get("total_tokens")):
            raise BackendFailure("it sent a token without its number")
        return "text", text_event(members["token"], members["total_tokens"])
    mean, end, progress = (
        members.get("confidence"),
        members.get("characters"),
        members.get("progress"),
    )
    if RESULT["confidence"].accepts(mean) and COUNT.accepts(end):
        return "judged", (mean, end)
    return ("progress", progress) if isinstance(progress, dict) else None


def read_text(events: bytes) -> str:
    """The text in a block of whole native token events."""
    return "".join(json.loads(event[6:])["token"] for event in events.split(b"\n\n")[:-1])


def text_event(text: str, number: int = 1) -> bytes:
    """A native token event with this text, and `number` as its `total_tokens`."""
    return sse_event({"token": text, "total_tokens": number})


# ------------------------------------------------------------------------------ IO: asking backends

# Tailscale over a bad uplink needs two; the client should not wait longer for a dead backend
CONNECT_SECONDS = 5.0
HEAD_SECONDS = 10.0  # our own backend sends its head before it loads a model or reads a prompt
IDLE_SECONDS = 30.0  # between two reads of a stream: our own backend sends a comment every 5 s
SPARE_SECONDS = 8.0  # until an unused spare connection is closed; vpsd closes it after 10
NAME_SECONDS = 60.0  # for which the addresses of a name are cached
RACE_SECONDS = 0.25  # until the next address of a name is tried in parallel (RFC 8305)
# for a whole stream: 2,048 tokens at half a token per second, plus the queue before them
STREAM_SECONDS = 7200.0
ASIDE_SECONDS = 2.0  # /health and /v1/models, which are answered in milliseconds
LOAD_SECONDS = 120.0  # for an answer that waits until a model is loaded
ENDED, BROKEN, EXPIRED = (
    "it ended",
    "the connection broke",
    "it stopped",
)  # why no more bytes come, also in messages
MAX_ERROR_BYTES = 65_536  # an error's JSON
MAX_TOKENS_BYTES = 8 << 20  # the tokens of 1 MiB of text
MAX_JSON_BYTES = (
    1 << 20
)  # /v1/models, where a cloud lists hundreds of models; or an answer that is not streamed


class Loop(asyncio.SelectorEventLoop):
    """An event loop that looks up each name in a daemon thread of its own and caches the addresses.
    asyncio joins its own threads at the end, so a hanging resolver would keep the daemon from
    stopping.
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[
            tuple[Any, ...], asyncio.Future[list[Any]]
        ] = {}  # addresses, or a lookup in progress

    async def getaddrinfo(self, host: Any, port: Any, **how: int) -> list[Any]:
        """As socket.getaddrinfo."""
        key = (host, port, *sorted(how.items()))
        if key not in self._names:
            self._names[key] = self.create_future()
            threading.Thread(target=self._look_up, args=(key, how), daemon=True).start()
        return await asyncio.shield(self._names[key])

    def forget_names(self) -> None:
        self._names = {key: found for key, found in self._names.items() if not found.done()}

    def _look_up(self, key: tuple[Any, ...], how: Mapping[str, Any]) -> None:
        try:
            found: list[Any] | OSError = socket.getaddrinfo(*key[:2], **how)
        except OSError as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self.call_soon_threadsafe(self._learn, key, found)

    def _learn(self, key: tuple[Any, ...], found: list[Any] | OSError) -> None:
        if isinstance(found, OSError):
            failed = self._names.pop(key)
            failed.set_exception(found)
            failed.exception()  # counts as retrieved: perhaps nobody waits any more
        else:
            self._names[key].set_result(found)
            self.call_later(NAME_SECONDS, self.forget_names)


class Reader(asyncio.Protocol):
    """Buffers the bytes of a connection until they are read. Beyond READ_BYTES the transport
    pauses. A StreamReader would copy each token twice, and drop the bytes that came before a reset.
    """

    transport: asyncio.Transport  # once connected

    def __init__(self) -> None:
        self.end = (
            ""  # ENDED, BROKEN, or EXPIRED if `watch` has cut the connection; "" before its end
        )
        self._since = math.inf  # when the current read began to wait; infinite while nobody waits
        self.unread = b""  # bytes that have come and that nobody has read
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, idle: float) -> None:
        """Cut the connection once a read has waited for `idle` seconds, or after STREAM_SECONDS.
        There is one timer, rescheduled only when it fires: asyncio.timeout around each read would
        cost more than the read itself.
        """
        if not self.end:  # otherwise no read waits
            self._timer = self._loop.call_later(
                idle, self._check, idle, self._loop.time() + STREAM_SECONDS
            )

    def _check(self, idle: float, end: float) -> None:
        left = min(self._since + idle, end) - self._loop.time()
        if left <= 0:
            self.cut()
        else:
            self._timer = self._loop.call_later(min(left, idle), self._check, idle, end)

    def cut(self) -> None:
        """Close the connection. A read returns what has come, then b""."""
        self.end = self.end or EXPIRED
        self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.unread += data
        if len(self.unread) > READ_BYTES:
            self.transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end = self.end or (BROKEN if exc else ENDED)
        if self._timer:
            self._timer.cancel()
        self._wake()

    def eof_received(self) -> None:
        self.end = self.end or ENDED
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """At most READ_BYTES; b"" at the end."""
        if not self.unread and not self.end:
            self._waiter = self._loop.create_future()
            self._since = min(
                self._since, self._loop.time()
            )  # the wait of a cancelled read still counts
            await self._waiter
            self._since = math.inf
        data, self.unread = self.unread[:READ_BYTES], self.unread[READ_BYTES:]
        if len(data) == READ_BYTES and not self.end:
            self.transport.resume_reading()
        return data


class Answer:
    """A backend's answer to one request. Owns nothing: `Upstream.send` closes the connection. If
    the backend closes it without a byte, `again` sends the request on a new one; None: the request
    is not sent again.
    """

    def __init__(self, reader: Reader, again: Callable[[], Awaitable[Reader]] | None) -> None:
        self.status = 0
        self.reader, self._again = reader, again
        self._is_cut = False
        self._ahead = (
            b""  # read, but not yet used: part of the head, later the body bytes that came with it
        )
        self._scanned = self._skipped = 0  # scanned bytes of the head; skipped heads
        self.body = BodyDecoder(
            0, False
        )  # once it is done, the connection is not reused, whatever bytes follow

    def cut(self) -> None:
        """End the answer here: reading returns what has come, and then fails."""
        self._again, self._is_cut = None, True
        self.reader.cut()

    async def read_head(self, kind: str) -> None:
        """Read the head, skipping heads with status 1xx. HttpError or BackendFailure as in
        `parse_answer`. After a cancelled call, the next call resumes at the same place.
        """
        while self.status < 200:
            while (end := scan_head(self._ahead, self._scanned)) is None:
                self._scanned = len(self._ahead)
                data = await self.reader.read()
                late = self.reader.end == EXPIRED
                if not (data or self._ahead or self._skipped or late) and self._again:
                    self.reader, self._again = await self._again(), None
                    if self._is_cut:
                        self.reader.cut()
                elif not data:
                    raise BackendFailure(LATE if late else NO_ANSWER)
                self._ahead += data
            self.status, self.body = parse_answer(self._ahead[:end], kind)
            self._ahead, self._scanned, self._skipped = self._ahead[end:], 0, self._skipped + 1
            if self.status == 101 or self._skipped > 8:
                raise BackendFailure(f"it answered {self.status}")

    async def read(self) -> bytes:
        """The next piece of the payload, b"" once the body is complete. BackendFailure at the first
        fault.
        """
        body = self.body
        while not (body.fault or body.done):
            data, self._ahead = self._ahead, b""
            data = data or await self.reader.read()
            if payload := body.feed(data):
                return payload
            if not data:
                if body.may_end and self.reader.end == ENDED:
                    return b""
                raise BackendFailure(f"{self.reader.end} in the middle of its answer")
        if body.fault:
            raise BackendFailure("it sent a malformed chunk")
        return b""

    async def read_all(self, limit: int) -> bytes:
        """The whole body. BackendFailure over `limit` bytes, or if more bytes came after the
        body.
        """
        whole = bytearray()
        while piece := await self.read():
            whole += piece
            if len(whole) > limit:
                raise BackendFailure("its answer is too long")
        if self.body.rest:
            raise BackendFailure("its answer is longer than announced")
        return bytes(whole)


EVENT_STREAM, JSON = "text/event-stream", "application/json"


class Upstream:
    """Sends requests to one backend, each on its own connection, so that a late answer can never
    reach another request. A POST leaves a spare connection for the next one, which saves a round
    trip, or three with TLS. An unused spare is closed after SPARE_SECONDS. ConfigError if `ca_file`
    holds no certificates.
    """

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        try:
            self._tls = (
                ssl.create_default_context(cafile=config.ca_file or None)
                if config.endpoint.tls
                else None
            )
        except OSError as error:
            raise ConfigError(
                f"ca_file: expected certificates in PEM form in {config.ca_file}, got {error}"
            ) from None
        self._spare: Reader | None = None
        self._keeper: asyncio.Task[None] | None = None  # opens the spare connection and closes it
        self._closed = False

    def close(self) -> None:
        """Close the spare connection and leave no new one."""
        self._closed = True
        self._drop_spare()

    def _drop_spare(self) -> None:
        if self._keeper:
            self._keeper.cancel()
        if self._spare:
            self._spare.transport.abort()
        self._spare = self._keeper = None

    async def _keep_spare(self) -> None:
        with contextlib.suppress(BackendFailure):
            spare = self._spare = await self._connect()
            try:
                await asyncio.sleep(SPARE_SECONDS)
            finally:
                if self._spare is spare:  # otherwise a request has taken it
                    self._spare = None
                    spare.transport.abort()
        self._keeper = None

    def _take_spare(self) -> Reader | None:
        """The spare connection, unless the backend has closed it or sent anything."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        self._drop_spare()  # cancels its keeper
        if spare.end or spare.unread:
            spare.transport.abort()
            return None
        return spare

    @contextlib.asynccontextmanager
    async def send(
        self, path: str, body: Mapping[str, Any] | None, idle: float
    ) -> AsyncIterator[Answer]:
        """Send one request, a GET if it has no body, and yield its unread answer. `idle` is for
        `Reader.watch`. A request is sent once more only if the backend closes a spare connection
        just as the request goes out: its one effect is its answer, which nobody got (RFC 9110,
        section 9.2.2).
        """

        async def write(reader: Reader | None = None) -> Reader:
            reader = reader or await self._connect()
            reader.watch(idle)
            reader.transport.write(self._encode(path, body))
            return reader

        leaves_spare = body is not None
        spare = self._take_spare() if leaves_spare else None
        answer = Answer(await write(spare), write if spare else None)
        try:
            yield answer
        except BackendFailure:
            leaves_spare = False
            raise
        finally:
            answer.reader.transport.abort()
            # The backend should see this client leave before the next request arrives.
            if not answer.body.done:
                self._drop_spare()
            if leaves_spare and not self._closed and not self._keeper:
                self._keeper = asyncio.create_task(self._keep_spare())

    async def begin(self, answer: Answer, seconds: float, kind: str) -> bool:
        """Read the head of a 200 with this media type. False if no head has come after `seconds`:
        call again. HttpError if the backend refuses, BackendFailure if its answer is malformed.
        """
        body = b""
        try:
            async with asyncio.timeout(seconds):
                with blamed("its answer is not HTTP/1.1"):
                    await answer.read_head(kind)
                if answer.status == 200:
                    return True
                with contextlib.suppress(BackendFailure):  # the status may be enough
                    body = await answer.read_all(MAX_ERROR_BYTES)
        except TimeoutError:
            if answer.status < 200:
                return False
        raise refusal(answer.status, body, self._config)

    async def get(
        self,
        path: str,
        limit: int,
        body: Mapping[str, Any] | None = None,
        parse: Callable[[bytes], Any] | None = None,
    ) -> Any:
        """The JSON object at `path`, or the one for which a body is posted: then the head may take
        LOAD_SECONDS, because the backend may have to load a model first. `parse` reads another
        value than `BackendConfig.parse`.
        """
        seconds = ASIDE_SECONDS if body is None else LOAD_SECONDS
        async with self.send(path, body, max(IDLE_SECONDS, seconds)) as answer:
            if not await self.begin(answer, seconds, JSON):
                raise BackendFailure(LATE)
            with blamed("its answer is not JSON"):
                async with asyncio.timeout(ASIDE_SECONDS):
                    return (parse or self._config.parse)(await answer.read_all(limit))

    async def _connect(self) -> Reader:
        host, port, loop = (
            self._config.endpoint.host,
            self._config.endpoint.port,
            asyncio.get_running_loop(),
        )
        race = None if ":" in host or is_ip_literal(host) else RACE_SECONDS
        with blamed("it cannot be reached"):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, reader = await loop.create_connection(
                        Reader, host, port, ssl=self._tls, happy_eyeballs_delay=race
                    )
            except OSError as error:
                if isinstance(loop, Loop):
                    loop.forget_names()  # the backend may have moved
                if isinstance(error, ConnectionRefusedError):
                    raise BackendFailure("connection refused") from None
                raise
        # By default the kernel buffers megabytes, even if the client has stopped reading.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES
        )
        return reader

    def _encode(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        endpoint, key = self._config.endpoint, self._config.key
        method, payload = (
            ("GET", b"") if body is None else ("POST", json.dumps(body).encode("ascii"))
        )
        lines = [
            f"{method} {endpoint.prefix}{path} HTTP/1.1",
            f"Host: {endpoint.authority}",
            "Connection: close",
        ]
        if key and self._config.api != "cerebrum":
            lines.append(f"Authorization: Bearer {key}")
        elif key and path != "/health":
            lines.append(f"X-API-Key: {key}")
        lines += [f"X-Request-ID: {request_id_var.get()}"] if request_id_var.get() != "-" else []
        lines += (
            ["Content-Type: application/json", f"Content-Length: {len(payload)}"] if payload else []
        )
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + payload


async def relay(client: Upstream, answer: Answer, key: str) -> AsyncGenerator[Pair, None]:
    """The events of one of our own backends as pairs: ("begun", None) first, ("done", members of
    the event) last. The done event is held until the framing of the body has ended as well: whether
    a stream counts as finished must not depend on how its bytes were split. Every other end is a
    BackendFailure.
    """
    events = Events()
    done: dict[str, Any] | None = None
    if not await client.begin(answer, HEAD_SECONDS, EVENT_STREAM):
        raise BackendFailure(LATE)
    yield "begun", None
    while payload := await answer.read():
        if done is None and not events.inside and TOKENS.fullmatch(payload):  # nearly always
            yield "text", payload
            continue
        for kind, value in take_apart(events.feed(payload), key):
            if done is not None and kind in ("text", "done"):
                raise BackendFailure("it sent events after the last one")
            if kind == "done":
                done = value
            else:
                yield kind, value
    if events.inside:
        raise BackendFailure("it ended in the middle of an event")
    if done is None:
        raise BackendFailure("it ended without saying that it is done")
    yield "done", done
