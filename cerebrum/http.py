"""HTTP/1.1 and SSE on asyncio streams: a daemon's server, from a client's bytes to the handler and
back.

Strategy
- Pure functions decide, streams only carry bytes. `scan_request`, `parse_request` and `BodyDecoder`
  take bytes in any split and give a value or an `HttpError`. They never see a socket, a clock or
  the environment. The first wrong byte decides, so every split of the same bytes has the same
  outcome. RFC 9112 and 9110 are the rule; where they allow leniency, this code refuses: bare LF,
  folded lines, two lengths, a length beside chunks, a foreign Host.
- `Server` runs one task for each connection. `Connection` owns the socket and its buffer,
  `Exchange` one request and its answer. A handler is `async def handler(state, request) ->
  Response`. `Exchange.fail` is the one place that turns an error into an answer.
- Once a stream has begun, an error is sent as an error event, and then the connection is cut
  without a last chunk. A client can always tell a finished stream from a broken one.

The server refuses what exceeds the limits below, slow clients, and pages of foreign origins. A
connection beyond the limit takes the place of an older one that waits for its client. No HTTP/2;
standard library only. Try it: `curl -i http://127.0.0.1:7000/health`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import io
import json
import logging
import re
import socket
import ssl
import sys
import time
import uuid
from asyncio import sslproto
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from urllib.parse import unquote

from cerebrum.fields import describe
from cerebrum.settings import Client
from cerebrum_common import (
    CHUNKED,
    LINES,
    REASONS,
    Head,
    HttpError,
    Request,
    Response,
    Route,
    error_body,
    internal_error,
    json_line,
    log,
    request_id_var,
    route_of,
    routes_of,
    sse_event,
)

# ------------------------------------------------------------------------------------------- limits

MAX_LINE_BYTES = 8192  # RFC 9112 section 3 asks for at least 8,000
MAX_HEAD_BYTES = 32_768  # curl with a handful of cookies sends 2 KiB; the head is held in memory
MAX_HEADERS = 100  # no known client sends 30
MAX_BODY_BYTES = 1 << 20  # the longest source file that is sent as a prompt
# Of all connections together; parsing one body can cost 20 times its size for a moment.
MAX_BODIES_BYTES = 16 << 20
MAX_TRAILER_BYTES = 8192  # trailers are dropped, so the limit only bounds memory
# The CRLF before it, 16 digits of a chunk size, room for an ignored extension, and a CRLF.
MAX_CHUNK_LINE_BYTES = 258
MAX_PIPELINED_BYTES = 65_536  # read while a request runs, only to notice when its client leaves
# 30 KiB each when idle, 0.1 MiB with TLS, up to 0.3 MiB under attack; the unit allows 256 MB.
MAX_CONNECTIONS = 512
# Sockets accepted at a time; with the limits above, well below the usual 1,024 open files.
MAX_ACCEPTS = 64
READ_BYTES = 65_536  # one read of a socket; also the StreamReader's limit
WRITE_BUFFER_BYTES = 65_536  # held for a client that does not read, before its stream pauses
REQUEST_HEAD_SECONDS = 10.0  # for a whole head, from its first byte: a byte a second is refused
BODY_SECONDS = 30.0  # for a whole body: 1 MiB at 35 KB/s
IDLE_SECONDS = 60.0  # until a connection's first or next request begins
# A client that reads nothing, or whose network acknowledges nothing, for this long is cut.
WRITE_SECONDS = 30.0
# Without a packet from a client, before the kernel starts to probe the connection.
KEEPALIVE_IDLE_SECONDS = 10
# Between two probes: the client is cut after WRITE_SECONDS, when four are lost.
KEEPALIVE_PROBE_SECONDS = 5
FAREWELL_SECONDS = 2.0  # for the last errors to reach their clients when the daemon stops
# Between a stream's error and the cut, when a browser drops all bytes its page has not read.
PAGE_SECONDS = 0.1
LINGER_SECONDS = 1.0  # for the client to read the last answer, before a reset could destroy it


class ClientGone(ConnectionError):
    """The client closed, reset, or stopped reading. Not our fault, and never logged as an error."""


def malformed(message: str, code: str = "INVALID_REQUEST") -> HttpError:
    """An error after which the connection is closed, such as a framing error."""
    return HttpError(code, message, close=True)


def shutting_down() -> HttpError:
    return malformed("the daemon is being stopped; try again later", "SHUTTING_DOWN")


# -------------------------------------------------------------------------------------- pure: heads

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) (HTTP/[0-9]\.[0-9])")
STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5][0-9][0-9])(?: [\t\x20-\x7e\x80-\xff]*)?")
HEADER_LINE = re.compile(rf"({TOKEN}):[ \t]*+([\t\x20-\x7e\x80-\xff]*)")
FORBIDDEN_IN_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r[^\n]|(?<!\r)\n")
# Its authority, which only an absolute form has, and its path.
TARGET = re.compile(
    r"(?:(?i:http)://([^/?]++)|(?=/))"
    r"((?:[A-Za-z0-9\-._~!$&'()*+,;=:@/]|%(?!0|1|7[Ff])[0-9A-Fa-f]{2})*)"
    r"(?:\?(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/?]|%[0-9A-Fa-f]{2})*)?"
)
AUTHORITY = re.compile(r"([A-Za-z0-9\-._~]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{0,5}))?")
CONTENT_LENGTH = re.compile(r"[0-9]{1,20}")  # 64 bits; anything longer is an attack
REQUEST_ID = re.compile(r"[A-Za-z0-9._\-]{1,128}")
METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE"
SINGLE_HEADERS = (
    "authorization content-encoding content-length content-type expect host origin"
    " transfer-encoding x-api-key"
)


def scan_head(
    buffer: bytes, scanned: int, what: str = "a head", limit: int = MAX_HEAD_BYTES
) -> int | None:
    """The end of the message head in `buffer` (past its empty line), or None if more bytes are
    needed. `what` has `limit` bytes at most: a head, or trailers. An earlier call has scanned the
    first `scanned` bytes. The first bad byte, as in a TLS hello, is refused at once.
    """
    end = buffer.find(b"\r\n\r\n", max(0, scanned - 3), limit)
    _refuse_controls(buffer, scanned, limit if end < 0 else end + 4)
    if end >= 0:
        return end + 4
    if len(buffer) >= limit:
        raise malformed(f"expected {what} of at most {limit} bytes", "HEADERS_TOO_LARGE")
    return None


def scan_request(buffer: bytes, scanned: int) -> int | None:
    """`scan_head` for a request, which one empty line may precede (RFC 9112 section 2.2). A bad
    request line is refused as soon as its CRLF arrives: HTTP/0.9, SMTP or a typo have no head to
    wait for.
    """
    start = 2 if buffer.startswith(b"\r\n") else 0
    end = buffer.find(b"\r\n", start, start + MAX_LINE_BYTES)
    _refuse_controls(buffer, scanned, start + MAX_LINE_BYTES if end < 0 else end)
    if end < 0:
        if len(buffer) >= start + MAX_LINE_BYTES:
            raise malformed(
                f"expected a request line of at most {MAX_LINE_BYTES} bytes", "URI_TOO_LONG"
            )
        return None
    if end + 2 > scanned:
        parse_request_line(buffer[start:end].decode("latin-1"))
    return scan_head(buffer, max(scanned, end))


def _refuse_controls(buffer: bytes, scanned: int, stop: int) -> None:
    if bad := FORBIDDEN_IN_HEAD.search(buffer, max(0, scanned - 1), stop):
        raise malformed(
            f"expected CRLF line ends and no control characters, got byte 0x{bad[0][0]:02x}"
        )


def parse_request_line(line: str) -> tuple[str, str, str, str]:
    """Parse a request line, without its CRLF, into method, decoded path, authority (or "") and
    version.
    """
    match = REQUEST_LINE.fullmatch(line)
    if not match:
        raise malformed("expected a request line of the form 'METHOD /path HTTP/1.1'")
    method, target, version = match.groups()
    if version not in ("HTTP/1.1", "HTTP/1.0"):
        raise malformed(f"expected HTTP/1.1 or HTTP/1.0, got {version}", "VERSION_NOT_SUPPORTED")
    if method not in METHODS.split(", "):
        raise malformed(f"expected one of {METHODS}, got {describe(method)}", "NOT_IMPLEMENTED")
    if target == "*" and method == "OPTIONS":
        target = "/health"  # which every daemon has
    return method, *parse_target(target), version


def parse_target(target: str) -> tuple[str, str]:
    """Parse a request target into decoded path and authority, "" without an absolute form (RFC 9112
    section 3.2).
    """
    match = TARGET.fullmatch(target)
    if not match:
        raise malformed(
            "expected a request target that is a path of RFC 3986 characters and %XX escapes, "
            "none of them of a control character"
        )
    authority, path = match.groups("")
    # People add a slash to URLs; an escaped %2F stays.
    path = "/" + path.lstrip("/").removesuffix("/")
    try:
        path = unquote(path, errors="strict")
    except UnicodeDecodeError:
        raise malformed("expected %XX escapes that are UTF-8") from None
    return path, host_name(authority) if authority else ""


def host_name(value: str) -> str:
    """The host of `host[:port]` in lower case, with its brackets; HttpError if `value` has another
    form.
    """
    match = AUTHORITY.fullmatch(value)
    if not match or int(match[2] or 0) > 65_535:
        raise malformed(f"expected a Host of the form name[:port], got {describe(value)}")
    return match[1].lower()


def parse_head(block: bytes) -> tuple[str, dict[str, str]]:
    """Parse a message head, as `scan_head` finds it, into its first line and a dict of its headers
    by lower-case name. Commas join repeated list headers.
    """
    first, *lines = block[:-4].decode("latin-1").split("\r\n")
    if len(lines) > MAX_HEADERS:
        raise malformed(
            f"expected at most {MAX_HEADERS} headers, got {len(lines)}", "HEADERS_TOO_LARGE"
        )
    headers: dict[str, str] = {}
    for line in lines:
        match = HEADER_LINE.fullmatch(line)
        if not match:
            raise malformed("expected header lines of the form 'Name: value'")
        name = match[1].lower()
        value = match[2].rstrip(" \t")
        if name in headers and name in SINGLE_HEADERS.split():
            raise malformed(f"expected at most one {name} header, got several")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return first, headers


def parse_framing(version: str, headers: Mapping[str, str]) -> int | None:
    """The length of the body: CHUNKED if chunks will say it, None if nothing does. RFC 9112 section
    6; any ambiguity is refused.
    """
    length = headers.get("content-length")
    coding = headers.get("transfer-encoding")
    if length is not None and not CONTENT_LENGTH.fullmatch(length):
        raise malformed(
            f"expected one Content-Length of 1 to 20 decimal digits, got {describe(length)}"
        )
    if coding is None:
        return None if length is None else int(length)
    if length is not None or version == "HTTP/1.0":
        raise malformed("expected no Transfer-Encoding beside a Content-Length or in HTTP/1.0")
    if coding.lower() != "chunked":
        # RFC 9112 section 6.3 asks for a 400 unless `chunked` comes last; it may be one then, too.
        raise malformed(f"expected the Transfer-Encoding 'chunked' alone, got {describe(coding)}")
    return CHUNKED


def parse_request(block: bytes) -> Head:
    """Parse a whole request head, as `scan_request` finds it, into a `Head`."""
    first, headers = parse_head(block.removeprefix(b"\r\n"))
    method, path, authority, version = parse_request_line(first)
    host = ""
    if "host" in headers:
        host = host_name(headers["host"])
    elif version == "HTTP/1.1":
        raise malformed("expected a Host header, got none")
    length = parse_framing(version, headers)
    wanted = headers.get("x-request-id", "")
    request_id = wanted if REQUEST_ID.fullmatch(wanted) else str(uuid.uuid4())
    options = re.split(r"[, \t]+", headers.get("connection", "").lower())
    keep_alive = version == "HTTP/1.1" and "close" not in options
    return Head(method, path, version, headers, host, authority, length, request_id, keep_alive)


# ------------------------------------------------------------------------------------- pure: bodies

TEXT = r"[\t\x20\x21\x23-\x5b\x5d-\x7e\x80-\xff]*"  # of a quoted string, without escapes
EXTENSION = rf';{TOKEN}(?:=(?:{TOKEN}|"{TEXT}"))?'
EXTENSION_BEGUN = rf';(?:{TOKEN}(?:=(?:{TOKEN}|"{TEXT}"?)?)?)?'
CHUNK_SIZE = re.compile(rf"\r\n([0-9A-Fa-f]{{1,16}})((?:{EXTENSION})*)\r\n".encode())
CHUNK_SIZE_BEGUN = re.compile(
    rf"(?:\r(?:\n(?:[0-9A-Fa-f]{{1,16}}(?:{EXTENSION})*(?:\r|{EXTENSION_BEGUN})?)?)?)?".encode()
)


class BodyDecoder:
    """Decodes a body that arrives in any split, framed by chunks, a length or the end of the
    connection (RFC 9112 section 6.3). Trailers are checked and dropped. The first `fault` is 400
    for a bad size, a missing CRLF or an over-long size line, 413 if chunks and extensions have more
    than `budget` bytes in all, 431 for trailers over 8 KiB. It is kept and not raised, because the
    payload before it still counts, however the bytes were split.
    """

    def __init__(self, length: int | None, budget: int = sys.maxsize) -> None:
        """`length` is that of `parse_framing`."""
        chunked = length == CHUNKED
        self.done = length == 0
        self.may_end = length is None  # at any byte, with the connection
        self.fault: HttpError | None = None
        # The bytes after the body; before its end an incomplete size line or trailer section. Both
        # begin with the CRLF of what is before them, so the first size line gets one too.
        self.rest = b"\r\n" if chunked else b""
        # Payload bytes until the next `_step`, which parses the element after them.
        self._left = sys.maxsize if length is None else max(0, length)
        self._step = BodyDecoder._size if chunked else BodyDecoder._end
        self._budget = budget

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`, up to the end of the body or its fault."""
        buffer = self.rest + data
        position = 0
        pieces = []
        try:
            while not self.done:
                piece = buffer[position : position + self._left]
                pieces.append(piece)
                position += len(piece)
                self._left -= len(piece)
                end = position if self._left else self._step(self, buffer, position)
                if end == position:
                    break
                position = end
        except HttpError as error:
            self.fault = error
        self.rest = buffer[position:]
        return b"".join(pieces)

    # Each step parses one grammar element (RFC 9112 section 7.1). Returns its end, or `at` if more
    # bytes are needed.

    def _end(self, buffer: bytes, at: int) -> int:
        self.done = True
        return at

    def _size(self, buffer: bytes, at: int) -> int:
        match = CHUNK_SIZE.match(buffer, at, at + MAX_CHUNK_LINE_BYTES)
        if not match:
            line = buffer[at : at + MAX_CHUNK_LINE_BYTES]
            if len(line) == MAX_CHUNK_LINE_BYTES or not CHUNK_SIZE_BEGUN.fullmatch(line):
                raise malformed(
                    "expected CRLF after a chunk's data, and a chunk size of 1 to 16 hexadecimal "
                    "digits and CRLF"
                )
            return at
        self._left = int(match[1], 16)
        self._budget -= self._left + len(match[2])
        if self._budget < 0:
            raise malformed(
                f"expected a body of at most {MAX_BODY_BYTES} bytes", "PAYLOAD_TOO_LARGE"
            )
        if self._left:
            return match.end()
        self._step = BodyDecoder._trailers
        return match.end(2)  # the CRLF counts for the trailers

    def _trailers(self, buffer: bytes, at: int) -> int:
        # With the CRLF of the last size line they end with an empty line also if there are none.
        section = buffer[at:]
        end = scan_head(section, 0, "trailers", MAX_TRAILER_BYTES)
        if end is None:
            return at
        parse_head(section[:end])
        return self._end(buffer, at + end)


def chunk(data: bytes) -> bytes:
    """One chunk of a chunked body; none for empty `data`, since an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


class Access(NamedTuple):
    """Who may ask: the holders of one of `keys` or of `clients` (neither: anyone), who call us by
    an IP address or one of `hosts`, and in a browser come from one of `origins`.
    """

    keys: tuple[str, ...]
    hosts: frozenset[str]
    origins: frozenset[str]
    # By their keys; without any, nobody has such a key.
    clients: Mapping[str, Client] | None = None
    scheme: str = "http"  # of our own origin; `Server` sets it

    @property
    def needs_key(self) -> bool:
        return bool(self.keys) or self.clients is not None

    @property
    def guests(self) -> set[str]:
        """The names of the clients who get what the others leave."""
        return {client.name for client in (self.clients or {}).values() if client.places}

    def check(self, head: Head, public: bool) -> str:
        """The client's name, "" without one. HttpError 421, 403 or 401 if this request may not be
        answered. Keys are compared in constant time.
        """
        self._check_host(head.host)
        # A browser sends an authority only to a proxy, where a short LAN name is harmless: nobody
        # can register a short name.
        if "." in head.authority:
            self._check_host(head.authority)
        if "origin" in head.headers and not self.allows_origin(head):
            expected = "expected an Origin that is listed in CEREBRUM_ALLOWED_ORIGINS"
            raise HttpError("FORBIDDEN", f"{expected}, got {describe(head.headers['origin'])}")
        if public or head.is_preflight or not self.needs_key:
            return ""
        given = key_of(head).encode("latin-1")
        clients = self.clients or {}
        keys = (*self.keys, *clients)
        found = [key for key in keys if hmac.compare_digest(given, key.encode("utf-8"))]
        if not found:
            expected = "expected the API key in the header X-API-Key"
            # RFC 9110 section 15.5.2 requires this header.
            raise HttpError("UNAUTHORIZED", expected, headers=(("WWW-Authenticate", "Bearer"),))
        client = clients.get(found[0])
        return client.name if client else ""

    def _check_host(self, name: str) -> None:
        """HttpError for the name of another host, which a browser sends after DNS rebinding."""
        if not name or name in self.hosts or is_ip_literal(name):
            return
        expected = "expected a Host that is an IP address, localhost, or in CEREBRUM_ALLOWED_HOSTS"
        raise HttpError("MISDIRECTED_REQUEST", f"{expected}, got {describe(name)}")

    def allows_origin(self, head: Head) -> bool:
        origin = head.headers.get("origin", "").lower()
        host = head.headers.get("host", "").lower()
        return origin in self.origins or origin == f"{self.scheme}://{host}"


def key_of(head: Head) -> str:
    """The key in a request's headers, "" without one."""
    scheme, _, token = head.headers.get("authorization", "").partition(" ")
    bearer = token.strip(" ") if scheme.lower() == "bearer" else ""
    return head.headers.get("x-api-key") or bearer


def is_ip_literal(host: str) -> bool:
    """Whether `host` is an IPv4 address or a bracketed IPv6 address. DNS rebinding needs a name."""
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    try:
        socket.inet_pton(family, host.strip("[]"))
    except OSError:
        return False
    return True


def own_names(extra: Collection[str]) -> frozenset[str]:
    """The host names of this machine, and the `extra` ones from the configuration."""
    name = socket.gethostname().lower()
    return frozenset({"localhost", name, f"{name}.local", *extra})


class Connection:
    """One client's socket: a buffer of unused bytes, bounded writes, a clean end. A network failure
    is ClientGone.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.buffer = b""
        self.transport = writer.transport
        peer = writer.get_extra_info("peername") or ("?",)
        self.address = str(peer[0])
        self.idle = True  # between two requests: a shutdown may close the connection
        self.exchange: Exchange | None = None  # the current or last one

    async def open(self, tls: ssl.SSLContext | None) -> None:
        """Shake hands for TLS, if there is any, and bound what is written. asyncio would shake
        hands before it calls us, and handshakes would not count as connections.
        """
        try:
            if tls:
                await self.writer.start_tls(tls, ssl_handshake_timeout=REQUEST_HEAD_SECONDS)
        except OSError as error:
            # The traceback refers to the future that holds this error. Only the garbage collector
            # would find that circle, with asyncio's buffer of the connection in it, and a flood of
            # such errors is faster.
            error.__traceback__ = None
            raise ClientGone from None
        self.transport = self.writer.transport
        self.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)

    def rank(self, crowd: Mapping[str, int]) -> tuple[bool, int]:
        """Sort key: the smallest is closed first. `crowd` counts the connections by address."""
        exchange = self.exchange
        is_at_work = bool(exchange and exchange.task and not exchange.ended)
        return is_at_work, -crowd[self.address]

    async def fill(self) -> None:
        """Read more into the buffer; ClientGone at the end of the stream."""
        try:
            data = await self.reader.read(READ_BYTES)
        except OSError:
            raise ClientGone from None
        if not data:
            raise ClientGone
        self.buffer += data

    async def next_head(self) -> bytes:
        """The next request's head; ClientGone if the client leaves, or stays silent."""
        self.idle = not self.buffer
        try:
            if self.idle:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self.fill()
            self.idle = False
            async with asyncio.timeout(REQUEST_HEAD_SECONDS):
                scanned = 0
                while (end := scan_request(self.buffer, scanned)) is None:
                    scanned = len(self.buffer)
                    await self.fill()
            head = self.buffer[:end]
            self.buffer = self.buffer[end:]
            return head
        except TimeoutError:
            if self.idle:
                raise ClientGone from None
            message = f"expected a whole request head within {REQUEST_HEAD_SECONDS:g} s"
            raise malformed(message, "TIMEOUT") from None

    async def read_body(self, head: Head, sink: Callable[[bytes], None] | None = None) -> None:
        """Pass the body to `sink` piece by piece as it arrives, or drop it; ClientGone if the
        connection ends early.
        """
        decoder = BodyDecoder(head.length or 0, MAX_BODY_BYTES)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not decoder.done:
                    if not self.buffer:
                        await self.fill()
                    piece = decoder.feed(self.buffer)
                    self.buffer = decoder.rest if decoder.done else b""
                    if decoder.fault:
                        raise decoder.fault
                    if sink:
                        sink(piece)
        except TimeoutError:
            raise malformed(f"expected a whole body within {BODY_SECONDS:g} s", "TIMEOUT") from None

    async def wait_gone(self) -> None:
        """ClientGone when the client has left. A half-close counts as leaving, as with nginx: the
        server sees the same. Pipelined bytes are kept, up to MAX_PIPELINED_BYTES and one read.
        """
        while len(self.buffer) < MAX_PIPELINED_BYTES:
            await self.fill()
        # The buffer is full: only a write can find the client gone.
        await asyncio.get_running_loop().create_future()

    async def write(self, data: bytes) -> None:
        """Send, waiting only if the client is behind."""
        if self.transport.is_closing():
            raise ClientGone
        self.transport.write(data)
        if self.transport.get_write_buffer_size() > WRITE_BUFFER_BYTES:
            await self.drain()

    async def drain(self) -> None:
        """Wait until the client has taken most of the buffered bytes; ClientGone after
        WRITE_SECONDS.
        """
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await self.writer.drain()
        except OSError:  # includes TimeoutError
            self.transport.abort()
            raise ClientGone from None

    async def close(self) -> None:
        """Send all buffered bytes, half-close, and read on up to LINGER_SECONDS (RFC 9112 section
        9.6). Closing a socket with unread bytes resets the connection, and a reset can destroy the
        answer on its way.
        """
        with contextlib.suppress(OSError):
            # 0 would stop a TLS transport that has nothing to send.
            self.transport.set_write_buffer_limits(high=1)
            await self.drain()
            half = self.writer.can_write_eof()
            async with asyncio.timeout(LINGER_SECONDS if half else WRITE_SECONDS):
                if half:
                    self.writer.write_eof()
                    while await self.reader.read(READ_BYTES):
                        pass
                else:
                    # TLS has no half-close, and says good-bye behind bytes that `drain` does not
                    # know of.
                    self.writer.close()
                    await self.writer.wait_closed()


# Of a request whose path is unknown, or not read yet. Nobody calls its handler.
OTHER = Route("", "other", cast(Any, None))


@dataclass(eq=False)
class Exchange:
    """One request and its answer: the head, the route, whether the connection is kept, and the line
    in the log.
    """

    connection: Connection
    server: Server
    head: Head | None = None  # None: not read yet, or malformed
    keep: bool = False
    public: bool = True  # needs no key, or the need is not known yet
    route: Route = OTHER  # some route of the requested path
    # Encodes an event for sending; None until a stream begins.
    frame: Callable[[bytes], bytes] | None = None
    task: asyncio.Task[None] | None = None  # calls the handler and sends its answer
    verdict: HttpError | None = None  # the error for which `end` cancelled the task
    # For the log: from the handler, and "client", the name of the client's key.
    notes: dict[str, Any] = field(default_factory=dict)
    reason: str = ""  # code and message of an error, for the log
    ended: bool = False  # the answer is complete, logged and counted
    started: float = field(default_factory=time.perf_counter)

    def end(self, error: HttpError) -> None:
        """Cancel the work on this request and answer with `error` instead, unless the answer is
        complete.
        """
        if self.task and not self.ended:
            self.verdict = error
            self.task.cancel()

    async def send(self, response: Response) -> None:
        """Send a whole response; a HEAD request gets its head alone."""
        headers = list(response.headers)
        body = b""
        if response.status != 204:
            body = response.body
            if not isinstance(body, bytes):
                body = json.dumps(body).encode("ascii")
            headers += [("Content-Type", response.kind), ("Content-Length", str(len(body)))]
        if self.head and self.head.method == "HEAD":
            body = b""
        await self.connection.write(self._encode_head(response.status, headers) + body)
        self.log(response.status)

    async def fail(self, error: HttpError) -> None:
        """Answer with an error: a status if nothing has been sent yet, otherwise an event without a
        clean end.
        """
        self.keep &= not error.close
        self.reason = f" {error.code}: {error.message}"
        body = self.route.write_error(error)
        if self.frame is None:
            await self.send(Response(body, error.status, headers=error.headers))
            return
        self.keep = False
        event = json_line(body) if self.route.streams == LINES else sse_event(body)
        await self.connection.write(self.frame(event))
        self.log(error.status)
        if self.head and "origin" in self.head.headers:
            await asyncio.sleep(PAGE_SECONDS)

    async def stream(self, response: Response) -> None:
        """Send events as they come: as chunks, or in HTTP/1.0 until the connection ends. The head
        follows the first block, so an earlier error still becomes a status. Nothing can fail before
        the generator has started, so its `finally` always releases the generator's resources.
        """
        assert response.events is not None
        chunked = self.head is not None and self.head.version == "HTTP/1.1"
        connection = self.connection
        render = response.render
        async with contextlib.aclosing(response.events) as events:  # type: ignore[type-var]
            block = render(await anext(events, b""))
            headers = [
                *response.headers,
                ("Content-Type", self.route.streams),
                ("X-Accel-Buffering", "no"),  # an nginx in front would buffer the tokens
            ]
            headers += [("Transfer-Encoding", "chunked")] if chunked else []
            frame = self.frame = chunk if chunked else bytes
            await connection.write(self._encode_head(response.status, headers) + frame(block))
            async for event in events:
                await connection.write(frame(render(event)))
        await connection.write(b"0\r\n\r\n" if chunked else b"")
        self.log(response.status)

    def _encode_head(self, status: int, more: Sequence[tuple[str, str]]) -> bytes:
        """Encode a response head. No header may contain a line end."""
        date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
        headers = [("Date", date), ("X-Request-ID", request_id_var.get())]
        headers += [("Cache-Control", "no-store"), *more]
        head = self.head
        if head and "origin" in head.headers and self.server.access.allows_origin(head):
            origin = head.headers["origin"]
            headers += [
                ("Access-Control-Allow-Origin", origin),
                ("Vary", "Origin"),
                ("Access-Control-Expose-Headers", "X-Request-ID, X-Cerebrum-Kept"),
            ]
        if not self.keep:
            headers.append(("Connection", "close"))
        lines = [f"{name}: {value}" for name, value in headers]
        start = [f"HTTP/1.1 {status} {REASONS[status]}", *lines, "\r\n"]
        return "\r\n".join(start).encode("latin-1")

    def log(self, status: int) -> None:
        """Log and count a request once: `POST /v1/complete 200 1.23s model=qwen_7b tokens=42
        ttft=0.31s`, followed by the reason of an error. 499 is nginx's status for a client that
        left before its answer.
        """
        if self.ended:
            return
        self.ended = True
        self.server.answered[self.route.path, status] += 1
        what = f"{self.head.method} {self.head.path}" if self.head else "- -"
        is_quiet = self.route.quiet and status < 400
        level = logging.DEBUG if is_quiet else logging.INFO
        notes = "".join(f" {name}={value}" for name, value in self.notes.items())
        seconds = time.perf_counter() - self.started
        text = f"{what} {status} {seconds:.2f}s{notes}{self.reason}"
        log.log(level, text, extra={"is_request": True})


# ---------------------------------------------------------------------------------- connection loop


class Server:
    """Runs a task for each connection. Owns the connections and their limit, the counts of
    requests, and the bytes of their bodies.
    """

    def __init__(self, state: Any, routes: Sequence[Route], access: Access) -> None:
        self.state = state
        self.access = access
        self.routes: dict[str, dict[str, Route]] = {}
        for route in routes:
            self.routes.setdefault(route.path, {})[route.method] = route
        for path, methods in self.routes.items():
            if "GET" in methods:
                methods["HEAD"] = methods["GET"]
            handler = functools.partial(answer_options, methods)
            methods["OPTIONS"] = Route("OPTIONS", path, handler)
        # Requests by path of the route and status. Each path has a 200 count from the start: the
        # first is an increase.
        self.answered = Counter({(path, 200): 0 for path in self.routes})
        self.connections: dict[asyncio.Task[None], Connection] = {}  # oldest first
        self.bodies = Counter[str]()  # bytes of the requests being read or answered, by client
        self.stopping = False
        self._listeners: list[asyncio.Server] = []
        self.tls: ssl.SSLContext | None = None  # of new connections; a reload may replace it

    async def start(
        self,
        host: str,
        port: int,
        sockets: Sequence[socket.socket] = (),
        tls: ssl.SSLContext | None = None,
    ) -> int:
        """Listen on `sockets`, or on the address if there are none, and log it. Returns the port, 0
        if that fails.
        """
        self.tls = tls
        self.use(self.access)
        sslproto.SSLProtocol.max_size = READ_BYTES  # asyncio would take 256 KiB for each connection
        addresses: list[dict[str, Any]] = [{"sock": given} for given in sockets]
        for address in addresses or [{"host": host, "port": port}]:
            try:
                listener = await asyncio.start_server(
                    self._accept, limit=READ_BYTES, backlog=MAX_ACCEPTS, **address
                )
            except OSError as error:
                log.error("cannot listen on %s port %d: %s", host, port, error.strerror)
                return 0
            self._listeners.append(listener)
            for listening in listener.sockets:
                set_options(listening)
        host, port = self._listeners[0].sockets[0].getsockname()[:2]
        if ":" in host:
            host = f"[{host}]"
        log.info("listening on %s://%s:%d", self.access.scheme, host, port)
        return port

    def use(self, access: Access) -> None:
        """Apply new access. The running requests that it does not allow end, such as those with a
        revoked key.
        """
        self.access = access = access._replace(scheme="https" if self.tls else "http")
        for connection in self.connections.values():
            exchange = connection.exchange
            if not exchange or not exchange.head:
                continue
            try:
                access.check(exchange.head, exchange.public)
            except HttpError as error:
                exchange.end(error)

    async def stop(self, grace: float) -> None:
        """Stop listening, and let running answers end within `grace` seconds. Requests on kept
        connections get SHUTTING_DOWN meanwhile. Answers that take longer end with the same error.
        """
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        await self._wait_idle(grace)
        for connection in self.connections.values():
            if connection.exchange:
                connection.exchange.end(shutting_down())
        await self._wait_idle(FAREWELL_SECONDS)
        for task in self.connections:
            task.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def _wait_idle(self, seconds: float) -> None:
        busy = [task for task, connection in self.connections.items() if not connection.idle]
        if busy:
            await asyncio.wait(busy, timeout=seconds)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(reader, writer)
        task = asyncio.current_task()
        assert task is not None
        if len(self.connections) >= MAX_CONNECTIONS:
            self._close_one()
        self.connections[task] = connection
        try:
            await connection.open(self.tls)
            while await self._serve_one(connection):
                pass
            await connection.close()
        except (ClientGone, asyncio.CancelledError) as end:
            exchange = connection.exchange
            if exchange and exchange.head:
                # 503: the daemon stops, and the client does not read the error.
                exchange.log(499 if isinstance(end, ClientGone) else 503)
        except Exception as exception:
            internal_error(exception)
        finally:
            self.connections.pop(task, None)
            connection.transport.abort()

    def _close_one(self) -> None:
        """Close a connection, so that no client can keep others out: one that waits for its client
        if possible, the oldest of the address that has most of them.
        """
        crowd = Counter(connection.address for connection in self.connections.values())
        task = min(self.connections, key=lambda task: self.connections[task].rank(crowd))
        connection = self.connections.pop(task)
        if connection.exchange:
            connection.transport.abort()
        else:
            task.cancel()  # asyncio cannot abort a handshake

    async def _serve_one(self, connection: Connection) -> bool:
        """Serve one request. True if the connection is kept for another request."""
        request_id_var.set(str(uuid.uuid4()))
        exchange = connection.exchange = Exchange(connection, self)
        try:
            head = parse_request(await connection.next_head())
            exchange.head = head
            exchange.keep = head.keep_alive
            exchange.started = time.perf_counter()
            request_id_var.set(head.request_id)
            await self._answer(exchange, head)
        except HttpError as error:
            await exchange.fail(error)
        except ClientGone:
            if connection.idle:  # the last answer may still be on its way
                return False
            raise
        except Exception as exception:
            await exchange.fail(internal_error(exception))
        # A flood of pipelined requests must not keep the event loop to itself.
        await asyncio.sleep(0)
        return exchange.keep and not self.stopping

    async def _answer(self, exchange: Exchange, head: Head) -> None:
        connection = exchange.connection
        try:
            route, parameter = self._route(head, exchange)
            if self.stopping:
                raise shutting_down()
            check_body(head, route)
        except HttpError as error:
            await self._refuse(exchange, head, error)
            return
        if head.expects:
            await connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = io.BytesIO()  # shares its memory with the bytes that it returns
        client = exchange.notes.get("client", connection.address)

        def collect(piece: bytes) -> None:
            if not may_grow(self.bodies, client, self.access.guests, len(piece)):
                raise malformed("too many requests are being sent; try again later", "OVERLOADED")
            self.bodies[client] += body.write(piece)

        try:
            await connection.read_body(head, collect if route.json else None)
            request = Request(
                head,
                body.getvalue(),
                parameter,
                connection.address,
                client,
                exchange.end,
                exchange.notes,
                self.answered,
            )
            call = self._watch if route.json else self._call
            await call(exchange, route, request)
        finally:
            self.bodies -= Counter({client: body.tell()})  # which forgets those who hold nothing

    async def _refuse(self, exchange: Exchange, head: Head, error: HttpError) -> None:
        """Answer with an error that is known before the body has come, then discard the body."""
        is_short = (head.length or 0) <= MAX_BODY_BYTES
        exchange.keep &= is_short and not head.expects
        await exchange.fail(error)
        try:
            if exchange.keep:
                await exchange.connection.read_body(head)
        except (HttpError, ClientGone):
            # The request has been answered already, whatever is wrong with its body.
            exchange.keep = False

    def _route(self, head: Head, exchange: Exchange) -> tuple[Route, str]:
        """The route and its path parameter. The key is checked first, on the same path: a stranger
        learns nothing.
        """
        methods, parameter = routes_of(self.routes, head.path)
        exchange.route = next(iter(methods.values()), OTHER)
        exchange.public = any(route.open for route in methods.values())
        if client := self.access.check(head, exchange.public):
            exchange.notes["client"] = client
        if not methods:
            got = json.dumps(head.path[:100])
            raise HttpError("NOT_FOUND", f"expected a path of this API, got {got}")
        return route_of(methods, head.method), parameter

    async def _watch(self, exchange: Exchange, route: Route, request: Request) -> None:
        """Call the handler, and cancel it when its client leaves."""
        task = asyncio.ensure_future(self._call(exchange, route, request))
        gone = asyncio.ensure_future(exchange.connection.wait_gone())
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            await (task if task.done() else gone)  # which raises ClientGone
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _call(self, exchange: Exchange, route: Route, request: Request) -> None:
        """Call the handler and send what it returns. HttpError also if `Exchange.end` ended it."""
        exchange.task = asyncio.current_task()
        try:
            # The key may have been revoked while the body came.
            self.access.check(request.head, exchange.public)
            response = await route.handler(self.state, request)
            exchange.keep &= not self.stopping
            # Nothing is awaited between the handler's return and the start of its events, so no
            # cancel can intervene.
            if response.events is None:
                await exchange.send(response)
            else:
                await exchange.stream(response)
        except asyncio.CancelledError:
            if exchange.verdict is None:
                raise
            raise exchange.verdict from None


def set_options(listening: socket.socket) -> None:
    # asyncio accepts `backlog` connections at a time. The kernel's own queue should be longer.
    with listening.dup() as twin:
        twin.listen(1024)
        # asyncio reads whatever the kernel holds, up to 256 KiB per connection, despite the
        # reader's limit.
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
        # A client that lost its network must not keep its place for long. Keepalive finds the loss
        # when nothing is being sent; TCP_USER_TIMEOUT bounds both cases and overrides TCP_KEEPCNT
        # (man 7 tcp).
        twin.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        timeout = round(1000 * WRITE_SECONDS)
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout)
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_SECONDS)
        twin.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_PROBE_SECONDS)


async def answer_options(methods: Collection[str], _state: Any, request: Request) -> Response:
    """The handler of OPTIONS on a path that has these methods."""
    allow = ", ".join(sorted(methods))
    headers = [("Allow", allow)]
    if request.head.is_preflight:
        headers += [
            ("Access-Control-Allow-Methods", allow),
            # openai-node has many of its own. The star does not cover Authorization.
            ("Access-Control-Allow-Headers", "*, Authorization"),
        ]
    return Response(status=204, headers=tuple(headers))


def may_grow(bodies: Counter[str], client: str, guests: Collection[str], size: int) -> bool:
    """Whether a client's request may grow by `size` bytes. A client may hold as many bytes as then
    stay free, so that there is always room for somebody who comes later. Guests have half of that
    together, by the same rule.
    """
    free = MAX_BODIES_BYTES - bodies.total() - size
    if client in guests:
        free = free // 2 - sum(bodies[guest] for guest in guests) - size
    return bodies[client] + size <= free


def check_body(head: Head, route: Route) -> None:
    """HttpError if the head announces a body that the route does not take."""
    expect = head.headers.get("expect", "100-continue")
    if expect.lower() != "100-continue":
        message = f"expected the Expect 100-continue or none, got {describe(expect)}"
        raise malformed(message, "EXPECTATION_FAILED")
    if head.length is not None and head.length > MAX_BODY_BYTES:
        message = f"expected a body of at most {MAX_BODY_BYTES} bytes, got {head.length}"
        raise malformed(message, "PAYLOAD_TOO_LARGE")
    if head.has_body and "content-encoding" in head.headers:
        got = describe(head.headers["content-encoding"])
        message = f"expected a body without Content-Encoding, got {got}"
        raise HttpError("UNSUPPORTED_MEDIA_TYPE", message)
    if not route.json:
        return
    if head.length is None:
        raise HttpError("LENGTH_REQUIRED", "expected a Content-Length or chunks, got neither")
    kind = head.headers.get("content-type", "")
    if route.write_error is error_body and not JSON_TYPE.fullmatch(kind):
        got = describe(kind) if kind else "none"
        message = f"expected the Content-Type application/json, got {got}"
        raise HttpError("UNSUPPORTED_MEDIA_TYPE", message)


JSON_TYPE = re.compile(
    r'application/json[ \t]*(?:;[ \t]*(?:charset="?utf-8"?[ \t]*)?)?', re.IGNORECASE
)
