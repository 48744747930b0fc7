"""The table of the wire: raw bytes → exact outcome, on a server in this process and on the daemons.

In this process every row is sent whole and byte by byte, and must come out the same. Both daemons
are that server: the rows go through cm4d once, some of them through vpsd. K: the connection answers
another request after it. C: it is closed. A list of statuses is a list of answers, in order. Many
of the cases are other people's: docs/measured.md says whose, and how strict other servers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import re
import socket
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from string import Template
from typing import Any

import pytest
from harness import HEALTH, KEY, Daemon, Reply, ask, connect, daemon, read_reply, warnings_in
from scripted import Backend, in_a_thread

import cerebrum_common as common
from cerebrum import http
from cerebrum.fields import parse_json
from cerebrum.service import LogFormatter
from cerebrum_common import HttpError, Request, Response, Route

K, C = True, False
BODY = b'{"prompt": "x", "language": "python", "model": "qwen_0_5b", "max_tokens": 4}'
PREFLIGHT = "Access-Control-Request-Method: POST"


# ----------------------------------------------------------------------------------------- the rows

# @POST stands for the target's path that takes JSON.


Text = str | bytes


def encoded(text: Text) -> bytes:
    return text if isinstance(text, bytes) else text.encode()


def lines(*of: Text) -> bytes:
    return b"".join(encoded(line) + b"\r\n" for line in of) + b"\r\n"


def get(
    path: str = "/health", *headers: Text, method: str = "GET", version: str = "HTTP/1.1"
) -> bytes:
    return lines(f"{method} {path} {version}", "Host: localhost", f"X-API-Key: {KEY}", *headers)


def send(*headers: Text, body: bytes = b"", **more: str) -> bytes:
    return get("@POST", "Content-Type: application/json", *headers, method="POST", **more) + body


def sized(body: bytes, *headers: str, **more: str) -> bytes:
    return send(f"Content-Length: {len(body)}", *headers, body=body, **more)


def chunked(body: bytes, *headers: str, **more: str) -> bytes:
    return send("Transfer-Encoding: chunked", *headers, body=body, **more)


def without(raw: bytes, header: str) -> bytes:
    others = [line for line in raw.split(b"\r\n") if not line.startswith(header.encode())]
    return b"\r\n".join(others)


def half(data: bytes) -> bytes:
    """A chunk of 512 KiB, half of the longest body."""
    return b"80000\r\n" + data.ljust(0x80000) + b"\r\n"


N, SIZE = len(BODY), f"{len(BODY):x}"
GOOD_CHUNKS = f"{SIZE}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
MEMBER = BODY[:-1].decode() + ', "a": '  # its value and "}" are to follow
DEEP = "[" * 63 + "]" * 63  # one more level is the object around it
HELLO = bytes.fromhex("16030100ba010000b6030345") + bytes(range(20)) * 4  # of TLS
EMPTY = ""
UPGRADE = "Connection: Upgrade\r\nUpgrade: "
SOCKET = "websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13"
TE = "Transfer-Encoding: chunked"
CL5 = "Content-Length: 5"
EXPECT = "Expect: 100-continue"
# The values of a row stand where these have %b.
FORMS = {
    "raw": b"%b",
    "line": lines("%b", "Host: localhost"),
    "version": get(version="%b"),
    "method": get(method="%b"),
    "path": get("%b"),
    "HEAD": get("%b", method="HEAD"),
    "OPTIONS": get("%b", method="OPTIONS"),
    "Host": lines("GET /health HTTP/1.1", "Host: %b"),
    "header": get("/health", "%b"),
    "keyless": lines("%b HTTP/1.1", "Host: localhost"),
    "key": lines("GET /v1/models HTTP/1.1", "Host: localhost", "%b"),
    "length": send("Content-Length: %b", body=b"x" * 5),
    "good": send("Content-Length:%b", body=BODY),
    "coding": send("Transfer-Encoding: %b", body=GOOD_CHUNKS),
    "both": send("%b", body=b"0\r\n\r\n" + HEALTH),  # the first may end before a smuggled request
    "size": chunked(b"%b\r\n" + BODY + b"\r\n0\r\n\r\n"),
    "extension": chunked(f"{SIZE};%b\r\n".encode() + BODY + b"\r\n0\r\n\r\n"),
    "chunks": chunked(b"%b"),
    "trailer": chunked(GOOD_CHUNKS[:-2] + b"%b"),
    "type": get("@POST", "Content-Type: %b", f"Content-Length: {N}", method="POST") + BODY,
    "with": sized(BODY, "%b"),
}

Row = tuple[str, bytes, "int | list[int]", bool]


def each(form: str, status: int, keep: bool, *values: Text) -> list[Row]:
    """A row for each of the values."""
    rows = list[Row]()
    for value in values:
        data = encoded(value)
        raw = sized(data) if form == "JSON" else FORMS[form] % data
        rows.append((f"{form} {value!r}"[:60], raw, status, keep))
    return rows


def table(text: str) -> list[Row]:
    """Blocks of rows: a form, a status, and K or C; then a value a line, behind four spaces, with
    Python's escapes and $NAMES of constants.
    """
    rows = list[Row]()
    names = globals() | {"BODY": BODY.decode(), "GET": get().decode(), "OPEN": get()[:-2].decode()}
    for block in text.strip().split("\n\n"):
        heading, *values = block.splitlines()
        form, status, keep = heading.split()
        for value in values:
            unescaped = value[4:].encode().decode("unicode_escape")
            data = Template(unescaped).substitute(names).encode("latin-1")
            rows += each(form, int(status), keep == "K", data)
    return rows


ROWS = [
    # request lines
    *table(r"""

raw 200 C
    GET /health HTTP/1.0\r\n\r\n
    GET /health HTTP/1.0\r\nHost: localhost\r\nX-API-Key: $KEY\r\n\r\n
    GET /health HTTP/1.0\r\nHost: localhost\r\nX-API-Key: $KEY\r\nConnection: keep-alive\r\n\r\n

raw 200 K
    \r\n$GET

raw 400 C
    GET /health\r\n
    EHLO localhost\r\n
    \0
    \r\n\r\n$GET
    \n$GET
    \r$GET
    GET /health HTTP/1.1\nHost: localhost\nX-API-Key: $KEY\n\n

raw 505 C
    PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n

line 400 C
    GET  /health HTTP/1.1
    GET\t/health HTTP/1.1
    GET / HTTP/1.1\x20
     GET / HTTP/1.1
    GET /health
    GET /health\x20
    GET HTTP/1.1
    GET /a b HTTP/1.1
    \x20\x20
    a GET / HTTP/1.1
    GET /\xc3\xa4 HTTP/1.1
    GET /\xc0\xaf HTTP/1.1
    GET /\0a HTTP/1.1

line 501 C
    CONNECT example.com:443 HTTP/1.1

version 400 C
    http/1.1
    HTTP/1.11
    HTTP/01.01
    HTTP/1
    HTTP/1.1.1
    HTTP 1.1
    HTTP/ 1.1

version 505 C
    HTTP/3.0
    HTTP/0.9
    HTTP/1.2
    HTTP/9.9

method 501 C
    BREW
    get
    CONNECT
    GE!T

method 400 C
    GE(T
    G\xc3\x89T

method 405 K
    DELETE
    TRACE
    POST
    PUT

header 200 C
    Connection: close
    Connection: foo , CLOSE
    Connection: foo\r\nConnection: close
"""),
    *each("raw", 400, C, HELLO),
    ("8,000 bytes of path", get("/" + "a" * 7999), 404, K),
    ("8,192 bytes of request line", get("/health?" + "a" * 8169), 200, K),
    ("8,193 bytes of request line", get("/health?" + "a" * 8170), 414, C),
    *each("raw", 414, C, "G" * 8192, "A" * 100_000 + " / HTTP/1.1\r\n"),
    # targets
    *table(r"""

path 200 K
    /health
    http://h/health
    HTTP://LOCALHOST:7000/health?a=b
    http://localhost//health
    /
    http://localhost?a
    /he%61lth
    //health
    ///health/
    /health?a=%20b&c=/?:@

path 400 C
    *
    foo
    ?a
    /a#b
    /a\\b
    /"
    /{x}
    /a|b
    //[::1]/
    *x
    localhost:80
    http://u@localhost/health
    http:///health
    https://localhost/health
    /health?%zz
    /%00
    /%zz
    /%
    /%1
    /%0d%0aA:%20b
    /%7f
    /%ff
    /%c0%af

path 404 K
    /nothing
    /../x
    /%2e%2e
    /%2E%2E/health
    //x
    /%2Fhealth
    //localhost/health
    /health/..
    /./health
    /health/x
    /HEALTH
    /health%2F
    /health;a
    /he%2561lth

path 405 K
    @POST

path 421 K
    http://evil.example/health

HEAD 200 K
    /health

HEAD 404 K
    /nothing

HEAD 405 K
    @POST

OPTIONS 204 K
    *
    /health

raw 400 C
    GET http://localhost/health HTTP/1.1\r\n\r\n
"""),
    # headers
    *table(r"""

raw 400 C
    GET /health HTTP/1.1\r\n\r\n
    GET /health HTTP/1.1\r\n \r\nHost: localhost\r\n\r\n
    GET /health HTTP/1.1\nHost: localhost\r\nX-API-Key: $KEY\r\n\r\n
    GET /health HTTP/1.1\rHost: localhost\r\nX-API-Key: $KEY\r\n\r\n
    $OPEN\n
    $OPEN\rx

Host 200 K
    LOCALHOST:80
    [1:2:3:4:5:6:7:8]
    127.0.0.1:
    [::1]:65535
    \tlocalhost
    [fe80::1]:80
    10.1.2.3

Host 400 C
    a b
    a#b
    a@b
    a/b
    $EMPTY
    u:p@localhost
    localhost:x
    localhost:99999
    a, b
    localhost:-1
    [::1
    \xe4
    localhost:1:2
    local%68ost
    a\\b
    [::1%25lo]
    :80
    ::1
    [::1]x
    localhost:000080
    h:+1
    h\r\nHost: h
    localhost\r\nhost: b

Host 421 K
    evil.example
    localhost.evil.example
    127.0.0.1.nip.io
    127.1
    h

header 200 K
    A: \xe4\xff
    A:\r\nB: \t\x20
    Transfer_Encoding: chunked\r\nContent_Length: 5
    $EXPECT
    ${UPGRADE}h2c
    $UPGRADE$SOCKET
    Upgrade: $SOCKET
    $UPGRADE${SOCKET}99
    Range: bytes=a-b
    Accept: a/b

header 400 C
    A : b
    : b
    abc
    Transfer-Encoding : chunked
     A: b
    \x20
    \tA: b
    A\0B: c
    A(B: c
    A/B: c
    A"B: c
    A[]: b
    A\xe4B: c
    A\x7fB: c
    A\tB: c
    A: b\rc
    A: b\nc
    A: b\0c
    A: b\x07c
    A: b\x0bc
    A: b\x7fc
    A: b\r
    A: b\r\n c
    A: b\r\n\tc
    Transfer-Encoding:\r\n chunked\r\n$CL5
    Content-Type: a\r\ncontent-type: a
    Origin: a\r\norigin: a
    Expect: a\r\nexpect: a
    x-api-key: a

header 417 C
    Expect: 200-ok

with 200 K
    $EXPECT
    EXPECT: 100-CONTINUE
    Range: bytes=0-1
    $UPGRADE$SOCKET

with 417 C
    Expect: 200-ok
"""),
    *each("Host", 200, K, socket.gethostname(), f"{socket.gethostname()}.LOCAL"),
    *each("header", 200, K, f"Range: bytes={'0-,' * 1000}0-"),
    ("32,768 bytes", get("/health", "A: " + "a" * (32_768 - len(get()) - 5)), 200, K),
    ("32,769 bytes", get("/health", "A: " + "a" * (32_769 - len(get()) - 5)), 431, C),
    ("a head that never ends", get()[:-2] + b"A: b\r\n" * 10_000, 431, C),
    ("100 headers", get("/health", *(f"A{i}: b" for i in range(98))), 200, K),
    ("101 headers", get("/health", *(f"A{i}: b" for i in range(99))), 431, C),
    ("Expect with chunks", chunked(GOOD_CHUNKS, EXPECT), 200, K),
    ("Expect and bad JSON", sized(b"{", EXPECT), 400, K),
    ("Expect without the key", without(sized(BODY, EXPECT), "X-API-Key"), 401, C),
    ("Expect of too much", send("Content-Length: 1048577", EXPECT), 413, C),
    ("Expect in HTTP/1.0", sized(BODY, EXPECT, version="HTTP/1.0"), 200, C),
    *each("raw", 200, C, get("/health", UPGRADE + SOCKET, version="HTTP/1.0")),
    # bodies
    *table(r"""

good 200 K
    $N
     000$N
      $N
    \t$N
     $N \t

length 400 C
    +5
    -0
    -5
    0x5
    0o5
    5_0
    5 5
    $EMPTY
    \xb2
    \xd9\xa5
    5.0
    1e1
    abc
    5, 5
    5,5
    5, 6
    5;
    "5"
    999999999999999999999
    -999999999999999999999999999999

length 413 C
    1048577
    18446744073709551616
    99999999999999999999

both 400 C
    $CL5\r\n$CL5
    $CL5\r\ncontent-length: 6
    $CL5\r\nContent-Length : 6
    $CL5\r\n$TE
    $TE\r\n$CL5
    $TE\r\n$TE
    $CL5\r\nTRANSFER-ENCODING: CHUNKED\x20
    Content-Length: +5\r\n$TE
    Content-Length: x\r\n$TE
    $CL5\r\n$TE\r\n$TE
    $CL5\r\nTransfer-Encoding:\r\n chunked
    $CL5\r\nTransfer-Encoding: , chunked

header 400 C
    $TE\r\n$CL5

coding 200 K
    chunked
    CHUNKED
    \tchunked\x20

coding 400 C
    gzip, chunked
    chunked, chunked
    , chunked
    gzip
    chunked, gzip
    identity
    xchunked
    chunked;a=b
    "chunked"
    $EMPTY
    chunked,
    \x0bchunked
    \x0cchunked
    chunked\0

size 200 K
    0000000000$SIZE

size 400 C
    0x$SIZE
    -$SIZE
    +$SIZE
     $SIZE
    $SIZE\x20
    $SIZE\t
    $SIZE,
    $EMPTY
    g
    000000000000000$SIZE
    ffffffffffffffff0

extension 200 K
    a="b; c";d;e=f

extension 400 C
    $EMPTY
    a[=b
    a="b
    a=
    \0a
    a\rx
    \n

chunks 200 K
    $SIZE\r\n$BODY\r\n0\r\n\r\n
    $SIZE\r\n$BODY\r\n000\r\n\r\n

raw 200 K
    $OPEN$CL5\r\n\r\n12345
    $OPEN$TE\r\n\r\n$SIZE\r\n$BODY\r\n0\r\n\r\n
    $OPEN$TE\r\n\r\n0\r\n\r\n

chunks 400 C
    $SIZE\n$BODY\r\n0\r\n\r\n
    $SIZE\r$BODY\r\n0\r\n\r\n
    $SIZE\r\n$BODY}\r\n0\r\n\r\n
    $SIZE\r\n${BODY}0\r\n\r\n
    $SIZE\r\n$BODY\n0\r\n\r\n
    $SIZE\r\n$BODY\r0\r\n\r\n
    x
    1\r\nab
    1\r\na\n
    \n
    1;\0
    1;a=;
    0\r\nA: b\n
    +0\r\n\r\nX

trailer 200 K
    A: b\r\nTransfer-Encoding: gzip\r\nHost: a\r\nContent-Length: 50\r\n\r\n
    Authorization: Bearer x\r\nContent-Type: text/plain\r\n\r\n

trailer 400 C
    A b\r\n\r\n
    A: b\n\r\n
    \n
    A: \0
    A: b\r\n c\r\n\r\n

with 415 K
    Content-Encoding: gzip
"""),
    *each("raw", 200, C, sized(BODY, version="HTTP/1.0")),
    *each("length", 400, C, "9" * 5000),
    *each("raw", 400, C, chunked(GOOD_CHUNKS, version="HTTP/1.0")),
    *each("chunks", 200, K, b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n"),
    *each("chunks", 200, K, half(BODY) + half(b"") + b"0\r\n\r\n"),
    *each("size", 200, K, SIZE.upper()),
    *each("size", 400, C, f"{SIZE[0]}_{SIZE[1:]}"),
    *each("extension", 200, K, "a" * 250),
    *each("extension", 400, C, "a" * 254, "a" * 65_000),
    *each("trailer", 431, C, "A: b\r\n" * 2000),
    *each(
        "chunks",
        413,
        C,
        b"100001\r\n" + b"x" * 1000,
        b"f" * 16 + b"\r\n" + b"x" * 1000,
        half(b"") + b"80001\r\n",
        (b"1;" + b"a" * 200 + b"\r\nx\r\n") * 5300,  # extensions count
    ),
    *each("raw", 200, K, sized(BODY + b" " * ((1 << 20) - N))),
    ("neither length", send(), 411, K),
    *each("raw", 204, K, get("/health", CL5, method="OPTIONS") + b"12345"),
    *each("raw", 405, K, get("/health", CL5, method="TRACE") + b"12345"),
    (
        "a request in a body on a GET",
        get("/health", f"Content-Length: {len(HEALTH)}") + HEALTH + get(),
        [200, 200],
        K,
    ),
    ("a body on a HEAD", get() + get("/health", CL5, method="HEAD") + b"12345", [200, 200], K),
    ("a byte behind length 0", sized(b"") + b"X" + get(), [400, 501], C),
    ("an early error reads the body away", get("/nothing", CL5, method="POST") + b"GET /", 404, K),
    ("an early error before bad chunks", get("/nothing", TE, method="POST") + b"xx\r\n", 404, C),
    (
        "an early error before too much",
        get("/nothing", "Content-Length: 9999999", method="POST") + b"x" * 9999,
        404,
        C,
    ),
    (
        "pipelined",
        get() + get("/nothing") + sized(BODY) + get(method="HEAD"),
        [200, 404, 200, 200],
        K,
    ),
    (
        "pipelined behind a close",
        get() + get("/health", "Connection: close") + get(),
        [200, 200],
        C,
    ),
    ("pipelined behind an error", get() + b"GET /health\r\n" + get(), [200, 400], C),
    ("pipelined with empty lines", get() + b"\r\n" + get() + b"\r\n" + get(), [200, 200, 200], K),
    ("pipelined behind a completion", sized(BODY) * 3 + get("/nothing"), [200, 200, 200, 404], K),
    # JSON
    *table(r"""

type 415 K
    text/plain
    multipart/form-data; boundary=x
    application/jsonp
    application/json; charset=utf-16
    application/json, text/plain

type 200 K
    Application/JSON
    application/json; charset="UTF-8"
    application/json;charset=utf-8
    application/json;

JSON 200 K
    $MEMBER$DEEP}
    ${MEMBER}99999999999999999999}
     \r\n\t$BODY \r\n\t

JSON 400 K
    $EMPTY
    {
    null
    []
    "x"
    ${BODY}x
    \xef\xbb\xbf$BODY
    \0$BODY
    $MEMBER\xff}
    ${MEMBER}NaN}
    ${MEMBER}1e999}
    $MEMBER"\t"}
    ${MEMBER}999999999999999999999}
    $MEMBER[$DEEP]}
"""),
    ("no Content-Type", without(sized(BODY), "Content-Type"), 415, K),
    *each("JSON", 400, K, b"[" * 100_000, BODY.decode().encode("utf-16")),
    *each("JSON", 400, K, b'{"a":' * 100_000, b'{"prompt": "", ' + BODY[1:]),
    # keys and origins
    *table(r"""

keyless 200 K
    GET /health

keyless 204 K
    OPTIONS /health

keyless 401 K
    GET /v1/models
    GET //v1/models
    GET /v%31/models
    GET /nothing
    DELETE /v1/models
    OPTIONS /v1/models

keyless 405 K
    PUT /health

key 200 K
    Authorization: bearer $KEY

key 401 K
    X-API-Key:
    X-API-Key: wrong
    X-API-Key: ${KEY}x
    X-API-Key: \xe4\xff
    X-API-Key: the-key-of-the-test
    Authorization: Bearer ${KEY}x
    Authorization: Basic $KEY

header 200 K
    Origin: http://localhost

header 403 K
    Origin: http://evil.example
    Origin: null
    Origin:
    Origin: https://localhost

with 403 K
    Origin: http://evil.example
"""),
    ("foreign preflight", get("@POST", "Origin: http://evil", PREFLIGHT, method="OPTIONS"), 403, K),
]


# -------------------------------------------------------------------------------------- the servers


class State:
    """Records the requests that reach the handlers of the server in this process, and that a stream
    has ended.
    """

    def __init__(self) -> None:
        self.calls = list[Request]()
        self.left = threading.Event()


async def simple(state: State, request: Request) -> Response:
    return Response({"path": request.head.path, "parameter": request.parameter})


async def complete(state: State, request: Request) -> Response:
    state.calls.append(request)
    return Response(parse_json(request.body))


async def stream(state: State, request: Request) -> Response:
    """`count` token events (0: without an end), and the end or the failure that is asked for."""
    asked = {"count": 1, "fail": "", **parse_json(request.body)}
    faults = {"http": HttpError("VPS_UNAVAILABLE", "expected more"), "bug": KeyError("secret")}

    async def events() -> AsyncIterator[bytes]:
        try:
            for number in itertools.count(1):
                yield common.sse_event({"token": "ä", "total_tokens": number})
                await asyncio.sleep(0)
                if number == asked["count"]:
                    break
            if asked["fail"]:
                raise faults[asked["fail"]]
            yield common.sse_event({"done": True})
        finally:
            state.left.set()

    return Response(events=events())


async def broken(state: State, request: Request) -> Response:
    raise KeyError("secret")


ROUTES = (
    Route("GET", "/", simple, open=True),
    Route("GET", "/health", simple, open=True, quiet=True),
    Route("GET", "/v1/models", simple),
    Route("GET", "/v1/broken", broken),
    Route("POST", "/v1/complete", complete, json=True),
    Route("POST", "/v1/complete/stream", stream, json=True),
    Route("POST", "/v1/unload/{id}", simple),
)


@contextlib.asynccontextmanager
async def serving(**options) -> AsyncIterator[tuple[http.Server, int]]:
    """A server in this process, which must end without complaints of asyncio."""
    loop, complaints = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    usual = {"keys": (KEY,), "hosts": http.own_names([]), "origins": frozenset()}
    server = http.Server(State(), ROUTES, http.Access(**usual | options))
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop(1.0)
    assert not server.connections
    assert not complaints


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Any, ...]]:
    """A server in this process, and the ends of a connection to it."""
    async with serving() as (server, port), connect(port) as (reader, writer):
        yield server, reader, writer


SYSTEM_PYTHON = "/usr/bin/python3"  # the Pi's daemon runs on it, and it may be newer than ours


@pytest.fixture(scope="module")
def daemons(tmp_path_factory):
    """cm4d, which is healthy and gets good answers from a scripted VPS, and vpsd without a
    model.
    """
    python = SYSTEM_PYTHON if Path(SYSTEM_PYTHON).exists() else sys.executable
    with in_a_thread(Backend()) as backend, daemon("vpsd", tmp_path_factory.mktemp("vpsd")) as vps:
        more = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}"}
        with daemon("cm4d", tmp_path_factory.mktemp("cm4d"), python, **more) as pi:
            pi.wait_for_line("VPS backend is available")
            yield pi, vps
    assert pi.complaints() + vps.complaints() == ""


@pytest.fixture(autouse=True)
def _quiet(caplog):
    """asyncio never complains, and a row never makes the server log an error."""
    caplog.set_level(logging.INFO)
    yield
    assert warnings_in(caplog) == []


async def play(
    port: int, raw: bytes, count: int = 1, step: int = 1 << 30
) -> tuple[list[Reply], bool]:
    """Send `raw` in pieces of `step` bytes; returns `count` answers, and whether the connection is
    kept after them.
    """
    raw = raw.replace(b"@POST", b"/v1/complete")
    async with connect(port) as (reader, writer):

        async def send() -> None:
            with contextlib.suppress(ConnectionError):
                for start in range(0, len(raw), step):
                    writer.write(raw[start : start + step])
                    await writer.drain()
                    # The other side's turn: on loopback it sees each of the writes.
                    for _ in range(3):
                        await asyncio.sleep(0)

        sending, replies = asyncio.create_task(send()), []
        for number in range(1, count + 1):
            is_head = b"HEAD " in raw and number == count  # a HEAD is the last of its row
            replies.append(await read_reply(reader, "HEAD" if is_head else "GET"))
        await sending
        writer.write(HEALTH)
        try:
            after = await read_reply(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            return replies, C
        assert after.status == 200, after
        return replies, K


async def check_row(port: int, row: Row, **more: int) -> None:
    name, raw, status, keep = row
    expected = status if isinstance(status, list) else [status]
    replies, kept = await play(port, raw, len(expected), **more)
    assert ([reply.status for reply in replies], kept) == (expected, keep), name
    for number, reply in enumerate(replies, 1):
        last = number == len(replies)
        announced = keep or not last or "before bad chunks" in name
        assert reply.all("Connection") == ([] if announced else ["close"]), name
        check_shape(reply, is_head=b"HEAD " in raw and last)
        waits = b"100-continue" in raw.lower() and raw.startswith(b"POST") and b"HTTP/1.1" in raw
        assert reply.interim == (waits and reply.status in (200, 400)), name


def check_shape(reply: Reply, is_head: bool) -> None:
    """What holds for every answer."""
    assert len(reply.one("X-Request-ID")) == 36
    assert re.fullmatch(
        r"[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT", reply.one("Date")
    )
    assert reply.all("Access-Control-Allow-Origin") in ([], ["http://localhost"])
    if reply.status == 204:
        assert reply.all("Content-Length") == []
        assert reply.one("Allow")
        return
    assert int(reply.one("Content-Length")) == len(reply.body) or is_head
    html = reply.body.startswith(b"<!doctype html>")
    assert reply.one("Content-Type") == ("text/html; charset=utf-8" if html else "application/json")
    if reply.status >= 400 and not is_head:
        assert list(reply.json)[:4] == ["error", "message", "code", "timestamp"]
        assert common.STATUSES[reply.json["code"]] == reply.status
        assert reply.json["code"] != "MODEL_NOT_FOUND"  # a row of 404 would pass without its route
        assert not any(word in reply.body for word in (b"Error", b"codec", b"Traceback"))
    if reply.status == 405:
        assert reply.one("Allow")
    if reply.status == 401:
        assert reply.one("WWW-Authenticate") == "Bearer"
        # Whatever key came.
        assert reply.json["message"] == "expected the API key in the header X-API-Key"


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
async def test_row(row):
    async with serving() as (_, port):
        await check_row(port, row)
        await check_row(port, row, step=1 + len(row[1]) // 300)


async def test_rows_through_the_daemons(daemons):
    pi, vps = daemons
    for row in ROWS:
        await check_row(pi.port, row)
    both = [row for row in ROWS if not re.search(b"@POST| / ", row[1])]
    for row in both[::10]:
        await check_row(vps.port, row)


# ------------------------------------------------------------------------ what the table cannot say


async def ask_server(raw: bytes, **access) -> Reply:
    """The answer of a server in this process."""
    async with serving(**access) as (_, port):
        ((reply,), _) = await play(port, raw)
        return reply


async def test_headers_of_answers():
    assert (await ask_server(get(method="OPTIONS"))).one("Allow") == "GET, HEAD, OPTIONS"
    assert (await ask_server(get("@POST"))).one("Allow") == "OPTIONS, POST"
    whole, head = await ask_server(get()), await ask_server(get(method="HEAD"))
    assert [name for name, _ in head.headers] == [name for name, _ in whole.headers]


async def request_id(sent: str, path: str = "/health") -> str:
    return (await ask_server(get(path, f"X-Request-ID: {sent}"))).one("X-Request-ID")


async def test_request_id():
    for sent in ("my-id_1.2", "a" * 128):
        assert await request_id(sent) == sent
        assert await request_id(sent, "/nothing") == sent
    for sent in ("a" * 129, "a b", "", "ä", "a\tb", 'a"b', "a\r\nX-Request-ID: a"):
        assert len(await request_id(sent)) == 36


CUTS = [
    b"",
    b"\r\n",
    b"GET",
    get()[:-1],
    get()[:-2],
    sized(BODY)[:-1],
    chunked(GOOD_CHUNKS)[:-1],
]


async def test_end_of_file_inside_a_message():
    """There is no answer, and no handler runs."""
    for cut in CUTS:
        async with connected() as (server, reader, writer):
            writer.write(cut.replace(b"@POST", b"/v1/complete"))
            writer.write_eof()
            assert await reader.read() == b""
            assert server.state.calls == []


async def test_handlers_see_the_decoded_body_once():
    async with serving() as (server, port):
        await play(port, chunked(GOOD_CHUNKS))
        await play(port, FORMS["length"] % b"+5")
        assert [call.body for call in server.state.calls] == [BODY]


FAILED = b'{"error": true, "message": "expected more", "code": "VPS_UNAVAILABLE", "timestamp": "'
# What a stream is asked for, how its last event begins, and how many bugs are logged.
SHAPES = [
    ({}, b'{"done": true}', 0),
    ({"fail": "http"}, FAILED, 0),
    ({"fail": "bug"}, b'{"error": true, "message": "internal error', 1),
]


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.0"])
@pytest.mark.parametrize(("asked", "last", "bugs"), SHAPES)
async def test_stream_shapes(asked, last, bugs, version, caplog):
    """Chunked in HTTP/1.1, bare in HTTP/1.0. An error in the stream is an event, and the stream has
    no clean end. A bug says nothing of itself.
    """
    raw = sized(json.dumps(asked).encode(), version=version)
    reply = await ask_server(raw.replace(b"@POST", b"/v1/complete/stream"))
    first, end = reply.body.split(b"\n\n", 1)
    assert (reply.status, first) == (200, b'data: {"token": "\\u00e4", "total_tokens": 1}')
    assert end.startswith(b"data: " + last)
    assert reply.one("Content-Type") == "text/event-stream; charset=utf-8"
    is_chunked = version == "HTTP/1.1"
    assert reply.all("Transfer-Encoding") == ["chunked"] * is_chunked
    assert reply.clean == (not asked or not is_chunked)
    assert b"secret" not in reply.body
    assert warnings_in(caplog) == ["internal error"] * bugs
    caplog.clear()


async def test_a_bug_says_nothing_of_itself(caplog):
    reply = await ask_server(get("/v1/broken"))
    assert (reply.status, reply.json["code"]) == (500, "INTERNAL_ERROR")
    assert b"secret" not in reply.body
    caplog.clear()


async def test_log_lines(caplog):
    """Lines have the form of the API text, a path cannot forge one, and a client that only connects
    leaves none.
    """
    forged, shown = "/%E2%80%A8x%C2%85%20200%201.00s", r"/\u2028x\x85 200 0.00s"
    unknown = r'NOT_FOUND: expected a path of this API, got "/\u2028x\u0085 200 1.00s"'
    refused = "expected CRLF line ends and no control characters, got byte 0x0d"
    for raw, lines in (
        (sized(BODY), ["INFO - [-] POST /v1/complete 200 0.00s"]),
        (get(forged), [f"INFO - [-] GET {shown} 404 0.00s {unknown}"]),
        (b"GET\rx", [f"INFO - [-] - - 400 0.00s INVALID_REQUEST: {refused}"]),
        (b"", []),
    ):
        async with serving() as (_, port):
            caplog.clear()
            await play(port, raw, bool(raw))
        ours = [record for record in caplog.records if record.name == "cerebrum"]
        texts = [LogFormatter().format(record).split(" - ", 1)[1] for record in ours]
        assert [re.sub(r" [0-9]\.[0-9]{2}s( |$)", r" 0.00s\1", text) for text in texts] == lines


async def test_origins_by_configuration() -> None:
    async def ask(raw: bytes) -> Reply:
        raw = raw.replace(b"Host: localhost", b"Host: PI.example")
        hosts = {"pi.example", "localhost"}
        return await ask_server(raw, origins={"https://ide.example"}, hosts=hosts)

    for path, status in (("/health", 200), ("/nothing", 404)):
        reply = await ask(get(path, "Origin: https://IDE.example"))
        allowed, vary = reply.one("Access-Control-Allow-Origin"), reply.one("Vary")
        assert (reply.status, allowed, vary) == (status, "https://IDE.example", "Origin")
    asked = ("Origin: https://ide.example", PREFLIGHT)
    reply = await ask(without(get("@POST", *asked, method="OPTIONS"), "X-API-Key"))
    assert (reply.status, reply.one("Access-Control-Allow-Methods")) == (204, "OPTIONS, POST")
    assert reply.one("Access-Control-Allow-Headers") == "*, Authorization"
    for foreign in ("http://ide.example", "https://ide.example.evil", "https://ide.example:444"):
        reply = await ask(get("/health", f"Origin: {foreign}"))
        assert (reply.status, reply.all("Access-Control-Allow-Origin")) == (403, [])


async def test_non_ascii_key():
    for encoding, status in (("utf-8", 200), ("latin-1", 401)):
        raw = FORMS["key"] % (b"X-API-Key: " + "schlüssel".encode(encoding))
        assert (await ask_server(raw, keys=("schlüssel",))).status == status


# ------------------------------------------------------------------------------------- random bytes

SHORT = [raw for _, raw, _, _ in ROWS if len(raw) < 1000]
INPUTS = int(os.environ.get("FUZZ_INPUTS", "400"))  # for each daemon
GROWTH_KB = 12_000  # after a quarter of them
STATUSES = {200, 204, *common.STATUSES.values()} - {500}


def mutate(draw: random.Random, pool: list[bytes]) -> bytes:
    """The beginning and the end of two requests, and something between them."""
    one, two = draw.choices(pool, k=2)
    at, to = draw.randrange(len(one) + 1), draw.randrange(len(two) + 1)
    middle = draw.choice((b"", draw.randbytes(20), one[at : at + 20] * 50, two[:20]))
    return one[:at] + middle + draw.choice((one[at:], two[to:]))


async def fuzz(daemon: Daemon, count: int, seed: int) -> None:
    """Send mutated rows in pieces, by several connections at a time, and read every answer."""
    draw, inputs = random.Random(f"{daemon.name} {seed}"), iter(range(count))
    path = b"/v1/complete" if daemon.name == "cm4d" else b"/v1/inference"
    pool = [raw.replace(b"@POST", path) for raw in SHORT]

    async def send() -> None:
        for _ in inputs:
            data, step = mutate(draw, pool), draw.randint(1, 1000)
            # A reset is an end too, as long as the daemon lives.
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                async with connect(daemon.port) as (reader, writer):
                    for start in range(0, len(data), step):
                        writer.write(data[start : start + step])
                        await asyncio.sleep(0)
                    writer.write_eof()  # cancels what still runs
                    # With HEAD, only the daemon knows which answers have a body.
                    while b"HEAD" not in data:
                        assert (await read_reply(reader)).status in STATUSES, data
                    await reader.read()

    await asyncio.gather(*(send() for _ in range(16)))
    assert "timestamp" in (await ask(daemon.port, HEALTH)).json


def test_random_bytes_do_no_harm(daemons):
    """`make fuzz` sends more of them."""
    for target in daemons:
        asyncio.run(fuzz(target, INPUTS // 4, 1))
        before = target.rss_kb()
        asyncio.run(fuzz(target, INPUTS - INPUTS // 4, 2))
        assert target.rss_kb() - before < GROWTH_KB
        assert target.complaints() == ""
