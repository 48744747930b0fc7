"""The Pi's HTTP client for backends: their settings, one request and its answer, and the SSE events
of a stream.

A backend is not trusted: inexact framing is refused. The circuit breaker counts only
`BackendFailure`.

An `Upstream` owns its spare connection; every other connection belongs to the one request it was
opened for. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cerebrum.fields import Field, Members
from cerebrum.http import (
    READ_BYTES,
    STATUS_LINE,
    BodyDecoder,
    is_ip_literal,
    parse_framing,
    parse_head,
    scan_head,
)
from cerebrum.settings import ConfigError, Environment, read_table
from cerebrum_common import HttpError, request_id_var

# ------------------------------------------------------------------------------------ configuration

URL = re.compile(
    r"(https?)://(([A-Za-z0-9.\-_]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?)"
    r"((?:/[A-Za-z0-9._~/\-]*)?)"
)
MAX_PLACES = 512  # concurrent requests to one backend
APIS = ("cerebrum", "llama.cpp", "openai")  # each is spoken by a `Kind`
MAX_N_CTX = 10**7  # tokens; the longest contexts have a million
LENGTH = Field(int, 1, MAX_N_CTX)  # of a prompt, in tokens
N_CTX = Field(int, 128, MAX_N_CTX)


class Endpoint(NamedTuple):
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
    api: str  # one of APIS
    key: str
    key_env: str
    max_concurrent: int
    ca_file: str  # of a private certificate authority
    n_ctx: int  # tokens; 0: as the backend reports
    # For an "openai" backend: use the model's FIM marks if it has any, or the "suffix" member.
    infill: str
    # Carries a token of the client and its file to a balancer in front of replicas; "": none.
    affinity_header: str

    @property
    def variable(self) -> str:
        """`key_env` for messages. What does not look like a variable may be the key itself."""
        return self.key_env if self.key_env.isupper() else "the variable of key_env"

    @property
    def is_paid(self) -> bool:
        """Whether the backend is probably a paid cloud service."""
        return self.api == "openai" and self.endpoint.tls


def parse_url(text: str, name: str) -> Endpoint:
    """Parse `http://host[:port][/prefix]` into an Endpoint; ConfigError names the setting."""
    match = URL.fullmatch(text)
    if not match or int(match[4] or 1) not in range(1, 65536):
        raise ConfigError(
            f"{name}: expected http://HOST[:PORT] or https://HOST[:PORT], got something else"
        )
    scheme, authority, host, port, prefix = match.groups()
    tls = scheme == "https"
    # The address that an engine gives its users often ends in /v1.
    prefix = prefix.rstrip("/").removesuffix("/v1")
    return Endpoint(host.strip("[]"), int(port or (443 if tls else 80)), authority, prefix, tls)


def read_backends(
    tables: Sequence[Any], environ: Environment, max_concurrent: int
) -> tuple[BackendConfig, ...]:
    """Read `[[backends]]` of models.toml; without any, the VPS of CEREBRUM_VPS_URL. ConfigError
    names the wrong table and its fault.
    """
    if not tables:
        default = {
            "id": "vps",
            "url": environ.text("CEREBRUM_VPS_URL", "http://127.0.0.1:9000"),
            "key_env": "CEREBRUM_API_KEY",
            "max_concurrent": max_concurrent,
        }
        return (_read_backend(default, "CEREBRUM_VPS_URL", environ),)
    backends = [
        _read_backend(table, f"backend {number}", environ) for number, table in enumerate(tables, 1)
    ]
    if len({backend.id for backend in backends}) != len(backends):
        raise ConfigError("backends: expected every id once")
    return tuple(backends)


BACKEND = {
    "id": Field(str, required=True, pattern=r"[A-Za-z0-9._\-]{1,40}"),
    "url": Field(str, required=True),
    "api": Field(str, default="cerebrum", choices=APIS),
    "key_env": Field(str, default="", pattern="(?:[A-Za-z_][A-Za-z0-9_]{0,99})?"),
    "ca_file": Field(str, default=""),
    "infill": Field(str, default="fim", choices=("fim", "suffix")),
    "max_concurrent": Field(int, 1, MAX_PLACES, 2),
    "n_ctx": Field(int, 0, MAX_N_CTX, 0),
    "affinity_header": Field(
        str,
        default="",
        # Not a header that the Pi writes itself.
        pattern="(?!(?i:x-request-id|x-api-key)$)(?:[Xx]-[A-Za-z0-9-]{1,60})?",
    ),
}


def _read_backend(table: Any, where: str, environ: Environment) -> BackendConfig:
    given = read_table(table, where, BACKEND)
    endpoint = parse_url(given.pop("url"), f"{where}: url")
    if given["ca_file"] and not endpoint.tls:
        raise ConfigError(f"{where}: ca_file: expected a url with https for {given['ca_file']!r}")
    keys = environ.keys(given["key_env"])  # of two, the new one is sent
    return BackendConfig(endpoint=endpoint, key=keys[0] if keys else "", **given)


# ------------------------------------------------------------------------------------------- errors


class BackendFailure(HttpError):
    """A backend, or the network to it, is at fault: 503, counted by the breaker. `reason` is in our
    own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__("VPS_UNAVAILABLE", f"VPS backend is unavailable ({reason})")
        self.late = reason == LATE


LATE = "it did not answer in time"


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
    except (HttpError, OSError, UnicodeError):  # a host name may not be encodable for DNS
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


# ------------------------------------------------------------------------------------ HTTP and SSE

MAX_HEADS = 8  # of an answer: its own, and those with status 1xx before it


def parse_answer(block: bytes, media: str) -> tuple[int, BodyDecoder, str]:
    """Parse a whole response head into status, body and Retry-After, "" without one. HttpError or
    BackendFailure if the head is not exact HTTP/1.x, or if a 200 has a Content-Encoding or another
    media type than `media`.
    """
    first, headers = parse_head(block)
    match = STATUS_LINE.fullmatch(first)
    if not match:
        raise BackendFailure("its answer is not HTTP/1.1")
    status = int(match[1])
    if status == 200:
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise BackendFailure("its answer has a Content-Encoding that nobody asked for")
        given = headers.get("content-type", media).partition(";")[0]
        if given.strip(" \t").lower() != media:
            raise BackendFailure("its answer is not of the type that was asked for")
    body = BodyDecoder(parse_framing(first[:8], headers))
    return status, body, headers.get("retry-after", "")


EVENT_STREAM = "text/event-stream"
JSON = "application/json"
MAX_EVENT_BYTES = 262_144  # one SSE event; a token event has 60


class Events:
    """Cuts a stream that arrives in any split into blocks of whole SSE events. Line ends may be LF
    or CRLF.
    """

    def __init__(self) -> None:
        self.rest = b""  # the beginning of an event that has not ended

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, with LF line ends, or b"". BackendFailure for an event
        that is too long. `data` is at most one read, which is shorter than the limit. So only the
        first event of a block can be too long, and raising loses no other event.
        """
        text = (self.rest + data).replace(b"\r\n", b"\n")
        events, end, self.rest = text.rpartition(b"\n\n")
        block = events + end
        # The last two bytes of an unfinished event may belong to its line ends.
        size = block.index(b"\n\n") if block else len(self.rest) - 2
        if size > MAX_EVENT_BYTES:
            raise BackendFailure(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        return block


def data_of(event: bytes) -> bytes:
    """The data of an event, from one or several lines."""
    lines = event.split(b"\n")
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))


# ------------------------------------------------------------------------------ IO: asking backends

# Tailscale over a bad uplink needs two; the client should not wait longer for a dead backend.
CONNECT_SECONDS = 5.0
IDLE_SECONDS = 30.0  # between two reads of a stream: our own backend sends a comment every 5 s
SPARE_SECONDS = 8.0  # until an unused spare connection is closed; vpsd closes it after 10
RACE_SECONDS = 0.25  # until the next address of a name is tried in parallel (RFC 8305)
# For a whole stream: 2,048 tokens at half a token per second, plus the queue before them.
STREAM_SECONDS = 7200.0
# Why no more bytes come, also in messages.
ENDED = "it ended"
BROKEN = "the connection broke"
EXPIRED = "it stopped"  # we have cut the connection


class Reader(asyncio.Protocol):
    """Buffers the bytes of a connection until they are read. Beyond READ_BYTES the transport
    pauses. A StreamReader would copy each token twice, and drop the bytes that came before a reset.
    """

    transport: asyncio.Transport  # once connected

    def __init__(self) -> None:
        self.end = ""  # ENDED, BROKEN or EXPIRED; "" before the connection's end
        self._since = math.inf  # when the current read began to wait; infinite while nobody waits
        self.unread = b""  # bytes that have come and that nobody has read
        self._came = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None

    def watch(self, idle: float, deadline: float = math.inf) -> None:
        """Cut the connection once a read has waited for `idle` seconds, or after STREAM_SECONDS.
        There is one timer, rescheduled only when it fires: asyncio.timeout around each read would
        cost more than the read itself.
        """
        if self.end:
            return  # no read waits
        now = self._loop.time()
        deadline = min(deadline, now + STREAM_SECONDS)
        left = min(self._since + idle, deadline) - now
        if left <= 0:
            self.cut()
        else:
            self._timer = self._loop.call_later(min(left, idle), self.watch, idle, deadline)

    def cut(self) -> None:
        """Close the connection. A read returns what has come, then b""."""
        self.end = EXPIRED
        self.transport.abort()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.unread += data
        self._since = math.inf
        if len(self.unread) > READ_BYTES:
            self.transport.pause_reading()
        self._came.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end = self.end or (BROKEN if exc else ENDED)
        if self._timer:
            self._timer.cancel()  # it would keep a TLS connection's 0.3 MB until it fires
        self._came.set()

    def eof_received(self) -> None:
        self.connection_lost(None)  # asyncio calls it again; the first `end` stays

    async def wait(self) -> None:
        """Wait for more bytes, or the end."""
        if not self.end:
            self._came.clear()
            # The wait of a cancelled read still counts.
            self._since = min(self._since, self._loop.time())
            await self._came.wait()

    def take(self, count: int) -> bytes:
        """The first unread bytes, `count` at most."""
        data = self.unread[:count]
        self.unread = self.unread[count:]
        if not self.unread:
            self.transport.resume_reading()
        return data

    async def read(self) -> bytes:
        """At most READ_BYTES; b"" at the end."""
        if not self.unread:
            await self.wait()
        return self.take(READ_BYTES)


class Answer:
    """A backend's answer to one request. Owns nothing: `Upstream.send` closes the connection. If
    the backend closes it without a byte, `again` sends the request on a new one; None: the request
    is not sent again.
    """

    def __init__(self, reader: Reader, again: Callable[[], Awaitable[Reader]] | None) -> None:
        self.status = 0
        self.retry_after = ""
        self.reader = reader
        self._again = again
        self.body = BodyDecoder(None)  # until the head has come

    def cut(self) -> None:
        """End the answer here: reading returns what has come, and then fails."""
        self.reader.cut()

    async def read_head(self, media: str) -> None:
        """Read the head, skipping heads with status 1xx. HttpError or BackendFailure as in
        `parse_answer`. After a cancelled call, the next call resumes at the same place.
        """
        for _ in range(MAX_HEADS):
            head = await self._next_head()
            self.status, self.body, self.retry_after = parse_answer(head, media)
            if self.status >= 200:
                return
        raise BackendFailure(f"it answered {self.status}")

    async def _next_head(self) -> bytes:
        scanned = 0
        while (end := scan_head(self.reader.unread, scanned)) is None:
            scanned = len(self.reader.unread)
            if self.reader.end:
                await self._send_again()
            else:
                await self.reader.wait()
        return self.reader.take(end)

    async def _send_again(self) -> None:
        """Send the request again after the connection's end, or fail."""
        old = self.reader
        is_late = old.end == EXPIRED
        if is_late or old.unread or self.status or self._again is None:
            raise BackendFailure(LATE if is_late else "it closed the connection without an answer")
        self.reader = await self._again()
        self._again = None
        if old.end == EXPIRED:  # it has been cut meanwhile
            self.reader.cut()

    async def read(self) -> bytes:
        """The next piece of the payload, b"" once the body is complete. BackendFailure at the first
        fault.
        """
        body = self.body
        while not body.done:
            if body.fault:
                raise BackendFailure("it sent a malformed chunk")
            data = await self.reader.read()
            if payload := body.feed(data):
                return payload
            if not data:
                if body.may_end and self.reader.end == ENDED:
                    return b""
                raise BackendFailure(f"{self.reader.end} in the middle of its answer")
        return b""

    async def read_all(self, limit: int) -> bytes:
        """The whole body. BackendFailure over `limit` bytes, or if more bytes came after the
        body.
        """
        body = bytearray()
        while piece := await self.read():
            body += piece
            if len(body) > limit:
                raise BackendFailure("its answer is too long")
        if self.body.rest:
            raise BackendFailure("its answer is longer than announced")
        return bytes(body)


class Upstream:
    """Sends requests to one backend, each on its own connection, so that a late answer can never
    reach another request. A POST leaves a spare connection for the next one, which saves a round
    trip, or three with TLS. An unused spare is closed after SPARE_SECONDS. `key_line` begins the
    header that carries our key. ConfigError if `ca_file` holds no certificates.
    """

    def __init__(self, config: BackendConfig, key_line: str) -> None:
        self._config = config
        self._key_line = key_line + config.key if config.key else ""
        self._tls: ssl.SSLContext | None = None
        if config.endpoint.tls:
            try:
                self._tls = ssl.create_default_context(cafile=config.ca_file or None)
            except OSError as error:
                raise ConfigError(
                    f"ca_file: expected certificates in PEM form in {config.ca_file}, got {error}"
                ) from None
        self._spare: Reader | None = None
        self._keeper: asyncio.Task[None] | None = None  # opens the spare connection and closes it

    def close(self) -> None:
        """Close the spare connection."""
        if self._keeper:
            self._keeper.cancel()
        if self._spare:
            self._spare.transport.abort()
        self._spare = self._keeper = None

    async def _keep_spare(self) -> None:
        with contextlib.suppress(BackendFailure):
            self._spare = await self._connect()
            await asyncio.sleep(SPARE_SECONDS)
        self.close()  # its own: a keeper that was replaced has been cancelled

    def _take_spare(self) -> Reader | None:
        """The spare connection, unless the backend has closed it or sent anything."""
        spare = self._spare
        self._spare = None
        if spare is None:
            return None
        self.close()  # cancels its keeper
        if spare.end or spare.unread:
            spare.transport.abort()
            return None
        return spare

    @contextlib.asynccontextmanager
    async def send(
        self, path: str, body: Members | None, idle: float, header: str = ""
    ) -> AsyncIterator[Answer]:
        """Send one request, a GET if it has no body, and yield its unread answer. `idle` is for
        `Reader.watch`, `header` a line of the head. A request is sent once more only if the backend
        closes a spare connection just as the request goes out: its one effect is its answer, which
        nobody got (RFC 9110, section 9.2.2).
        """

        async def write(reader: Reader | None = None) -> Reader:
            reader = reader or await self._connect()
            reader.watch(idle)
            reader.transport.write(self._encode(path, body, header))
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
                self.close()
            if leaves_spare and not self._keeper:
                self._keeper = asyncio.create_task(self._keep_spare())

    async def _connect(self) -> Reader:
        endpoint = self._config.endpoint
        host = endpoint.host
        # A race takes 0.3 ms of CPU, and leaves garbage when it fails.
        race = None if ":" in host or is_ip_literal(host) else RACE_SECONDS
        with blamed("it cannot be reached"):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, reader = await asyncio.get_running_loop().create_connection(
                        Reader, host, endpoint.port, ssl=self._tls, happy_eyeballs_delay=race
                    )
            except ConnectionRefusedError:
                raise BackendFailure("connection refused") from None
        # By default the kernel buffers megabytes, even if the client has stopped reading.
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES
        )
        return reader

    def _encode(self, path: str, body: Members | None, header: str) -> bytes:
        endpoint = self._config.endpoint
        method = "GET" if body is None else "POST"
        payload = b"" if body is None else json.dumps(body).encode("ascii")
        is_open = path == "/health" and self._config.api == "cerebrum"  # vpsd asks for no key there
        lines = [
            f"{method} {endpoint.prefix}{path} HTTP/1.1",
            f"Host: {endpoint.authority}",
            "Connection: close",
            f"X-Request-ID: {request_id_var.get()}",
            "" if is_open else self._key_line,
            header,
        ]
        if payload:
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        head = "\r\n".join(filter(None, lines))
        return head.encode("ascii") + b"\r\n\r\n" + payload
