"""The table of the wire: raw bytes → exact outcome, on a server in this process and on both daemons.

Every row is sent whole, to the server in this process byte by byte as well, and must come out the same: both daemons
are that server. K: the connection answers another request after it. C: it is closed. A list of statuses is a list of
answers, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fuzz_sockets
import pytest
from harness import HEALTH, KEY, Daemon, Reply, connect, daemon, read_reply

import cerebrum_common as common
from cerebrum.fields import parse_json
from cerebrum.http import Access, Server, own_names
from cerebrum.service import LogFormatter
from cerebrum_common import HttpError, Request, Response, Route

K, C = True, False
PAGE = -2  # 200 from cm4d, which has a page at its root, and 404 from the others
REACHED = -1  # the target's answer to a good completion: MODEL_NOT_FOUND from the daemons, which have no model here
BODY = b'{"prompt": "x", "language": "python", "model": "qwen_0_5b", "max_tokens": 4}'


# ------------------------------------------------------------------------------------------------ the rows

# @POST stands for the target's path that takes JSON, @SSE for its streaming twin, @GET for one that needs the key.


def lines(*of: str | bytes) -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\r\n" for line in of) + b"\r\n"


def get(path: str = "/health", *headers: str | bytes, method: str = "GET", version: str = "HTTP/1.1") -> bytes:
    return lines(f"{method} {path} {version}", "Host: localhost", f"X-API-Key: {KEY}", *headers)


def host(value: str | bytes, path: str = "/health") -> bytes:
    return lines(f"GET {path} HTTP/1.1", b"Host: " + (value if isinstance(value, bytes) else value.encode()))


def send(*headers: str | bytes, body: bytes = b"", kind: str = "application/json", version: str = "HTTP/1.1") -> bytes:
    return get("@POST", f"Content-Type: {kind}", *headers, method="POST", version=version) + body


def sized(body: bytes, *headers: str, kind: str = "application/json", version: str = "HTTP/1.1") -> bytes:
    return send(f"Content-Length: {len(body)}", *headers, body=body, kind=kind, version=version)


def length(value: str | bytes) -> bytes:
    return send(b"Content-Length: " + (value if isinstance(value, bytes) else value.encode()), body=b"x" * 5)


def chunked(body: bytes, *headers: str, version: str = "HTTP/1.1") -> bytes:
    return send("Transfer-Encoding: chunked", *headers, body=body, version=version)


def coded(value: str) -> bytes:
    return send(f"Transfer-Encoding: {value}", body=GOOD_CHUNKS)


def chunk_size(size: str, data: bytes = BODY) -> bytes:
    return chunked(size.encode() + b"\r\n" + data + b"\r\n0\r\n\r\n")


def of_version(version: str) -> bytes:
    return get(version=version)


def with_header(line: str | bytes) -> bytes:
    return get("/health", line)


def twice(header: str) -> bytes:
    return get("/health", f"{header}: a", f"{header.lower()}: a")


def to_nothing(header: str) -> bytes:
    return get("/nothing", header, method="POST")


def half(data: bytes) -> bytes:
    """A chunk of 512 KiB, half of the longest body."""
    return b"80000\r\n" + data.ljust(0x80000) + b"\r\n"


def without(raw: bytes, header: str) -> bytes:
    return b"\r\n".join(line for line in raw.split(b"\r\n") if not line.startswith(header.encode()))


SIZE = f"{len(BODY):x}"
GOOD_CHUNKS = f"{SIZE}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
DEEP = b"[" * 63 + b"]" * 63  # one more level is the object around it
HELLO = bytes.fromhex("16030100ba010000b6030345") + bytes(range(20)) * 4

Row = tuple[str, bytes, "int | list[int]", bool]


def each(name: str, make: Callable[[Any], bytes], status: int, keep: bool, *values: str | bytes) -> list[Row]:
    """A row for each of the values."""
    return [(f"{name} {value!r}", make(value), status, keep) for value in values]


REQUEST_LINES: list[Row] = [
    ("valid", get(), 200, K),
    ("no Host", lines("GET /health HTTP/1.1"), 400, C),
    ("two Hosts, even equal", get("/health", "Host: localhost"), 400, C),
    *each("Host", host, 400, C, "a b", "a#b", "a@b", "a/b", "", "u:p@localhost"),
    *each("Host", host, 400, C, "localhost:x", "localhost:99999", "localhost:-1", "[::1", "a,b"),
    *each("Host", host, 400, C, b"\xe4", "localhost:1:2", "local%68ost", "a\\b", "[::1%25lo]"),
    *each("Host", host, 400, C, ":80", "::1", "[::1]x", "localhost:000080", "localhost:+1"),
    *each("Host", host, 200, K, "LOCALHOST:80", "[::1]:9", "[::1]", "127.0.0.1:", "localhost:65535"),
    ("HTTP/1.0", get(version="HTTP/1.0"), 200, C),
    ("HTTP/1.0 without Host", lines("GET /health HTTP/1.0"), 200, C),
    ("HTTP/1.0 with keep-alive", get("/health", "Connection: keep-alive", version="HTTP/1.0"), 200, C),
    ("absolute form", get("http://h/health"), 200, K),
    ("absolute form with a port and a query", get("HTTP://LOCALHOST:7000/health?a=b"), 200, K),
    ("absolute form without a path", get("http://localhost?a"), PAGE, K),
    ("absolute form, foreign", get("http://evil.example/health"), 421, K),
    ("absolute form, user", get("http://u@localhost/health"), 400, C),
    ("absolute form, no name", get("http:///health"), 400, C),
    ("absolute form, https", get("https://localhost/health"), 400, C),
    ("absolute form without Host", lines("GET http://localhost/health HTTP/1.1"), 400, C),
    ("OPTIONS *", get("*", method="OPTIONS"), 204, K),
    ("OPTIONS of a path", get("/health", method="OPTIONS"), 204, K),
    *each("target", get, 400, C, "*", "foo", "?a", "/a#b", "/a\\b", '/"', "/{x}", "/a|b", "//[::1]/", "*x"),
    ("CONNECT", get("localhost:80", method="CONNECT"), 501, C),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, C),
    *each("version", of_version, 505, C, "HTTP/3.0", "HTTP/0.9", "HTTP/1.2"),
    *each("version", of_version, 400, C, "http/1.1", "HTTP/1.11", "HTTP/1", "HTTP/1.1.1", "HTTP 1.1", ""),
    ("no version", lines("GET /health", "Host: localhost"), 400, C),
    ("HTTP/0.9, at once", b"GET /health\r\n", 400, C),
    ("SMTP, at once", b"EHLO localhost\r\n", 400, C),
    ("SSH, at once", b"SSH-2.0-OpenSSH_9.2\r\n", 400, C),
    ("TLS, at once", HELLO, 400, C),
    ("one NUL, at once", b"\0", 400, C),
    ("one empty line", b"\r\n" + get(), 200, K),
    ("two empty lines", b"\r\n\r\n" + get(), 400, C),
    ("an empty line of LF", b"\n" + get(), 400, C),
    ("a lone CR first", b"\r" + get(), 400, C),
    ("double space", lines("GET  /health HTTP/1.1", "Host: localhost"), 400, C),
    ("tab", lines("GET\t/health HTTP/1.1", "Host: localhost"), 400, C),
    ("trailing space", lines("GET /health HTTP/1.1 ", "Host: localhost"), 400, C),
    ("leading space", lines(" GET /health HTTP/1.1", "Host: localhost"), 400, C),
    ("unknown method", get(method="BREW"), 501, C),
    ("lower-case method", get(method="get"), 501, C),
    ("method with a separator", get(method="GE(T"), 400, C),
    ("8-bit target", lines(b"GET /\xc3\xa4 HTTP/1.1", "Host: localhost"), 400, C),
    ("8,000 bytes of path", get("/" + "a" * 7999), 404, K),
    ("8,192 bytes of target", get("/health?" + "a" * 8184), 200, K),
    ("8,193 bytes of target", get("/health?" + "a" * 8185), 414, C),
    ("9,000 bytes of target", get("/" + "a" * 8999), 414, C),
    ("40,000 bytes without a line end", b"GET /" + b"a" * 40_000, 414, C),
    ("Connection: close", get("/health", "Connection: close"), 200, C),
    ("Connection: close among others", get("/health", "Connection: foo , CLOSE"), 200, C),
    ("Connection twice", get("/health", "Connection: foo", "Connection: close"), 200, C),
]
ROUTING: list[Row] = [
    ("wrong method", get(method="DELETE"), 405, K),
    ("TRACE", get(method="TRACE"), 405, K),
    ("GET where a POST belongs", get("@POST"), 405, K),
    ("POST on health", get(method="POST"), 405, K),
    ("path /", get("/"), PAGE, K),
    *each("path", get, 404, K, "/nothing", "/../x", "/%2e%2e", "/%2E%2E/health", "//x", "/%2Fhealth"),
    *each("path", get, 404, K, "/health/..", "/./health", "/health/x", "/HEALTH", "/health%2F", "/health;a"),
    *each("path", get, 400, C, "/%00", "/%zz", "/%", "/%1", "/%0d%0a", "/%7f", "/%ff", "/health?%zz", "/%c0%af"),
    ("an escape is decoded", get("/he%61lth"), 200, K),
    ("an escape is decoded once", get("/he%2561lth"), 404, K),
    ("the key sees the decoded path", lines("GET /v%31/models HTTP/1.1", "Host: localhost"), 401, K),
    *each("path", get, 200, K, "//health", "///health/", "http://localhost//health"),
    ("the key sees the path with one slash", lines("GET //v1/models HTTP/1.1", "Host: localhost"), 401, K),
    ("a path names no host", get("//localhost/health"), 404, K),
    ("query", get("/health?a=%20b&c=/?:@"), 200, K),
    ("HEAD", get(method="HEAD"), 200, K),
    ("HEAD of nothing", get("/nothing", method="HEAD"), 404, K),
    ("HEAD where a POST belongs", get("@POST", method="HEAD"), 405, K),
]
HEADERS: list[Row] = [
    ("space before the colon", get("/health", "A : b"), 400, C),
    ("folded line", get("/health", "A: b", " c"), 400, C),
    ("folded by a tab", get("/health", "A: b", "\tc"), 400, C),
    ("leading space", lines("GET /health HTTP/1.1", " Host: localhost"), 400, C),
    ("empty name", get("/health", ": b"), 400, C),
    ("no colon", get("/health", "abc"), 400, C),
    *each("header", with_header, 400, C, b"A\0B: c", "A(B: c", "A/B: c", 'A"B: c', b"A\xe4B: c", b"A\x7fB: c"),
    *each("header", with_header, 400, C, b"A: b\rc", b"A: b\nc", b"A: b\0c", b"A: b\x0bc", b"A: b\x7fc"),
    ("value of 8-bit bytes", get("/health", b"A: \xe4\xff"), 200, K),
    ("empty value", get("/health", "A:", "B: \t "), 200, K),
    ("bare LF line ends", get().replace(b"\r\n", b"\n"), 400, C),
    ("one bare LF", b"GET /health HTTP/1.1\nHost: localhost\r\n\r\n", 400, C),
    ("LF for the empty line", get()[:-2] + b"\n", 400, C),
    ("CR for the empty line", get()[:-2] + b"\rx", 400, C),
    ("CR CR LF", get()[:-2] + b"\r\r\n", 400, C),
    ("32,768 bytes", get("/health", "A: " + "a" * (32_768 - len(get()) - 5)), 200, K),
    ("32,769 bytes", get("/health", "A: " + "a" * (32_769 - len(get()) - 5)), 431, C),
    ("a head that never ends", get()[:-2] + b"A: b\r\n" * 10_000, 431, C),
    ("100 headers", get("/health", *(f"A{i}: b" for i in range(98))), 200, K),
    ("101 headers", get("/health", *(f"A{i}: b" for i in range(99))), 431, C),
    *each("twice", twice, 400, C, "X-API-Key", "Content-Type", "Origin", "Expect"),
    ("Transfer_Encoding is no alias", get("/health", "Transfer_Encoding: chunked", "Content_Length: 5"), 200, K),
    ("Expect", sized(BODY, "Expect: 100-continue"), REACHED, K),
    ("Expect in capitals", sized(BODY, "Expect: 100-Continue"), REACHED, K),
    ("Expect with chunks", chunked(GOOD_CHUNKS, "Expect: 100-continue"), REACHED, K),
    ("Expect without a body", get("/health", "Expect: 100-continue"), 200, K),
    ("Expect and bad JSON", sized(b"{", "Expect: 100-continue"), 400, K),
    ("Expect without the key", without(sized(BODY, "Expect: 100-continue"), "X-API-Key"), 401, C),
    ("Expect of too much", send("Content-Length: 1048577", "Expect: 100-continue"), 413, C),
    ("Expect in HTTP/1.0", sized(BODY, "Expect: 100-continue", version="HTTP/1.0"), REACHED, C),
    ("another Expect", sized(BODY, "Expect: 200-ok"), 417, C),
    ("Upgrade", get("/health", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMA"), 200, K),
]
BODIES: list[Row] = [
    ("a length", sized(BODY), REACHED, K),
    ("a length with zeros", send(f"Content-Length: 000{len(BODY)}", body=BODY), REACHED, K),
    ("a length in HTTP/1.0", sized(BODY, version="HTTP/1.0"), REACHED, C),
    *each("Content-Length", length, 400, C, "+5", "-0", "-5", "0x5", "5_0", "5 5", "", b"\xb2", "\u0665", "5.0", "1e1"),
    *each("Content-Length", length, 400, C, "5, 5", "5,5", "5;", '"5"', "9" * 5000, "9" * 21),
    ("Content-Length twice", send("Content-Length: 5", "Content-Length: 5", body=b"x" * 5), 400, C),
    ("Content-Length twice, two cases", send("Content-Length: 5", "content-length: 6", body=b"x" * 5), 400, C),
    ("both", send("Content-Length: 5", "Transfer-Encoding: chunked", body=GOOD_CHUNKS), 400, C),
    ("both, other order", send("Transfer-Encoding: chunked", "Content-Length: 5", body=GOOD_CHUNKS), 400, C),
    ("both, on a GET", get("/health", "Transfer-Encoding: chunked", "Content-Length: 5"), 400, C),
    *each("Transfer-Encoding", coded, 501, C, "gzip", "gzip, chunked", "chunked, gzip", "chunked, chunked"),
    *each("Transfer-Encoding", coded, 501, C, "identity", "xchunked", "chunked;a=b", '"chunked"', ""),
    ("Transfer-Encoding twice", chunked(GOOD_CHUNKS, "Transfer-Encoding: chunked"), 400, C),
    ("Transfer-Encoding with a VT", send(b"Transfer-Encoding: \x0bchunked", body=GOOD_CHUNKS), 400, C),
    ("Transfer-Encoding in HTTP/1.0", chunked(GOOD_CHUNKS, version="HTTP/1.0"), 400, C),
    ("chunks", chunked(GOOD_CHUNKS), REACHED, K),
    ("Chunked in capitals", send("Transfer-Encoding: CHUNKED", body=GOOD_CHUNKS), REACHED, K),
    ("chunks of one byte", chunked(b"".join(b"1\r\n%c\r\n" % c for c in BODY) + b"0\r\n\r\n"), REACHED, K),
    ("a size with zeros and capitals", chunk_size("0" * 10 + SIZE.upper()), REACHED, K),
    ("a last chunk of zeros", chunked(GOOD_CHUNKS.replace(b"\r\n0\r\n", b"\r\n000\r\n")), REACHED, K),
    ("an extension", chunk_size(SIZE + ';a="b";c'), REACHED, K),
    ("a long extension", chunk_size(SIZE + ";" + "a" * 300), 400, C),
    *each("chunk size", chunk_size, 400, C, "0x" + SIZE, "-5", "+5", "5_0", " 5", "5 ", "", "g", "0" * 17, "5\t", "5,"),
    ("chunk size with a bare LF", chunked(GOOD_CHUNKS.replace(b"\r\n", b"\n", 1)), 400, C),
    ("chunk data too long", chunk_size(SIZE, BODY + b"x"), 400, C),
    ("chunk data ended by LF", chunked(GOOD_CHUNKS.replace(b"\r\n0", b"\n0")), 400, C),
    ("trailers", chunked(GOOD_CHUNKS[:-2] + b"A: b\r\nTransfer-Encoding: gzip\r\n\r\n"), REACHED, K),
    ("a bad trailer", chunked(GOOD_CHUNKS[:-2] + b"A b\r\n\r\n"), 400, C),
    ("a trailer with a bare LF", chunked(GOOD_CHUNKS[:-2] + b"A: b\n\r\n"), 400, C),
    ("a trailer with a NUL, at once", chunked(GOOD_CHUNKS[:-2] + b"A: \0"), 400, C),
    ("trailers over 8 KB", chunked(GOOD_CHUNKS[:-2] + b"A: b\r\n" * 2000), 431, C),
    ("too much, announced", send("Content-Length: 1048577", body=b"x" * 1000), 413, C),
    ("too much, by 64 bits", send("Content-Length: 18446744073709551616", body=b"x" * 1000), 413, C),
    ("too much, in one chunk", chunked(b"100001\r\n" + b"x" * 1000), 413, C),
    ("too much, by 64 bits of chunk", chunked(b"ffffffffffffffff\r\n" + b"x" * 1000), 413, C),
    ("too much, summed", chunked(half(b"") + b"80001\r\n"), 413, C),
    ("1 MiB", sized(BODY + b" " * (1048576 - len(BODY))), REACHED, K),
    ("1 MiB in chunks", chunked(half(BODY) + half(b"") + b"0\r\n\r\n"), REACHED, K),
    ("neither length", send(), 411, K),
    ("length 0", send("Content-Length: 0"), 400, K),
    ("Content-Encoding", sized(BODY, "Content-Encoding: gzip"), 415, K),
    ("a body on a GET", get("/health", "Content-Length: 5") + b"12345", 200, K),
    ("chunks on a GET", get("/health", "Transfer-Encoding: chunked") + GOOD_CHUNKS, 200, K),
    ("an early error reads the body away", to_nothing("Content-Length: 5") + b"GET /", 404, K),
    ("an early error before bad chunks", to_nothing("Transfer-Encoding: chunked") + b"xx\r\n", 404, C),
    ("an early error before too much", to_nothing("Content-Length: 9999999") + b"x" * 99_999, 404, C),
    ("pipelined", get() + get("/nothing") + sized(BODY) + get(method="HEAD"), [200, 404, REACHED, 200], K),
    ("pipelined behind a close", get() + get("/health", "Connection: close") + get(), [200, 200], C),
    ("pipelined behind an error", get() + b"GET /health\r\n" + get(), [200, 400], C),
    ("pipelined with empty lines", get() + b"\r\n" + get() + b"\r\n" + get(), [200, 200, 200], K),
    ("pipelined behind a completion", sized(BODY) * 3 + get("/nothing"), [REACHED] * 3 + [404], K),
]
JSON_BODIES: list[Row] = [
    *((f"Content-Type {v}", sized(BODY, kind=v), 415, K) for v in
      ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp",
       "application/json; charset=utf-16")),
    *((f"Content-Type {v}", sized(BODY, kind=v), REACHED, K) for v in
      ("Application/JSON", 'application/json; charset="UTF-8"', "application/json;charset=utf-8", "application/json;")),
    ("no Content-Type", without(sized(BODY), "Content-Type"), 415, K),
    *((f"JSON {v[:30]!r}", sized(v), 400, K) for v in (
        b"", b"{", b"null", b"[]", b"[" + BODY + b"]", b'"x"', b"5", BODY + b"x", BODY + BODY, b"{'a': 1}",
        b'{"a": 1,}', b"{} //",
        BODY[:-1] + b', "a": \xff}', BODY.decode().encode("utf-16"), b"\xef\xbb\xbf" + BODY, b"\0" + BODY, BODY + b"\0",
        BODY[:-1] + b', "a": NaN}', BODY[:-1] + b', "a": -Infinity}', BODY[:-1] + b', "a": 1e999}',
        BODY[:-1] + b', "a": 01}',
        BODY[:-1] + b', "a": [' + DEEP + b"]}", BODY[:-1] + b', "a": ' + b"9" * 5000 + b"}", b"[" * 100_000,
        b'{"a":' * 100_000,
        BODY[:-1] + b', "prompt": "y"}', BODY[:-1] + b', "a": "\t"}', BODY[:-1] + b', "a": "\\x"}')),
    ("64 levels", sized(BODY[:-1] + b', "a": ' + DEEP + b"}"), REACHED, K),
    ("JSON with white space around it", sized(b" \r\n\t" + BODY + b" \r\n\t"), REACHED, K),
]  # fmt: skip
KEYS: list[Row] = [
    ("no key", lines("GET @GET HTTP/1.1", "Host: localhost"), 401, K),
    ("no key, unknown path", lines("GET /nothing HTTP/1.1", "Host: localhost"), 401, K),
    ("no key, wrong method", lines("DELETE @GET HTTP/1.1", "Host: localhost"), 401, K),
    ("no key, health", lines("GET /health HTTP/1.1", "Host: localhost"), 200, K),
    ("no key, health by another method", lines("PUT /health HTTP/1.1", "Host: localhost"), 405, K),
    ("no key, OPTIONS", lines("OPTIONS @GET HTTP/1.1", "Host: localhost"), 401, K),
    ("no key, OPTIONS of health", lines("OPTIONS /health HTTP/1.1", "Host: localhost"), 204, K),
    *((f"key {v!r}", lines("GET @GET HTTP/1.1", "Host: localhost", b"X-API-Key: " + v), 401, K)
      for v in (b"", b"wrong", KEY.encode() + b"x", KEY.encode()[:-1], KEY.upper().encode(), b"\xe4\xff", b"x" * 9999)),
    ("a Bearer", lines("GET @GET HTTP/1.1", "Host: localhost", f"Authorization: bearer {KEY}"), 200, K),
    ("a wrong Bearer", lines("GET @GET HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}x"), 401, K),
    ("Basic", lines("GET @GET HTTP/1.1", "Host: localhost", f"Authorization: Basic {KEY}"), 401, K),
    *each("foreign Host", host, 421, K, "evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "127.1", "h"),
    *each("own Host", host, 200, K, socket.gethostname(), f"{socket.gethostname()}.LOCAL", "10.1.2.3", "[fe80::1]:80"),
    *((f"foreign Origin {v}", get("/health", f"Origin: {v}"), 403, K) for v in ("http://evil.example", "null", "", "https://localhost")),
    ("foreign Origin, completion", sized(BODY, "Origin: http://evil.example"), 403, K),
    ("foreign Origin, preflight",
     get("@POST", "Origin: http://evil.example", "Access-Control-Request-Method: POST", method="OPTIONS"), 403, K),
    ("own Origin", get("/health", "Origin: http://localhost"), 200, K),
    ("own Origin, preflight",
     lines("OPTIONS @POST HTTP/1.1", "Host: localhost", "Origin: http://localhost",
           "Access-Control-Request-Method: POST"), 204, K),
]  # fmt: skip
FIELDS: list[tuple[str, Any, str]] = [
    ("prompt", "", 'prompt: expected a non-empty string, got the string ""'),
    ("prompt", 5, "string, got the number 5"),
    ("prompt", None, "string, got null"),
    ("prompt", "\ud800", "prompt: expected Unicode text, got a lone surrogate"),
    ("max_tokens", True, "2048, got the boolean true"),
    ("max_tokens", 4.0, "2048, got the number 4.0"),
    ("max_tokens", 2049, "2048, got the number 2049"),
    ("temperature", "1", 'temperature: expected a number from 0 to 1, got the string "1"'),
    ("temperature", 1.1, "temperature: expected a number from 0 to 1, got the number 1.1"),
    ("top_p", 0, "top_p: expected a number above 0 to 1, got the number 0"),
    ("stop", ["x"] * 17, "stop: expected a string, or an array of"),
    ("stop", [""], "stop: expected a string, or an array of"),
    ("seed", "x", 'got the string "x"'),
]
ROWS = [*REQUEST_LINES, *ROUTING, *HEADERS, *BODIES, *JSON_BODIES, *KEYS]


# --------------------------------------------------------------------------------------------- the targets


class State:
    """Records the requests that reach the handlers of the server in this process."""

    def __init__(self) -> None:
        self.calls: list[Request] = []


async def simple(state: State, request: Request) -> Response:
    return Response({"path": request.head.path, "parameter": request.parameter})


async def complete(state: State, request: Request) -> Response:
    state.calls.append(request)
    return Response(parse_json(request.body))


async def stream(state: State, request: Request) -> Response:
    async def events() -> AsyncIterator[bytes]:
        yield common.sse_event({"token": "ä", "total_tokens": 1})
        match parse_json(request.body).get("fail"):
            case "http":
                raise HttpError("VPS_UNAVAILABLE", "expected more")
            case "bug":
                raise KeyError("secret")
        yield common.sse_event({"done": True})

    return Response(events=events())


async def broken(state: State, request: Request) -> Response:
    raise KeyError("secret")


ROUTES = (
    Route("GET", "/health", simple, open=True, quiet=True),
    Route("GET", "/v1/models", simple),
    Route("GET", "/v1/broken", broken),
    Route("POST", "/v1/complete", complete, json=True),
    Route("POST", "/v1/complete/stream", stream, json=True),
    Route("POST", "/v1/unload/{id}", simple),
)


@contextlib.asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[tuple[Server, int]]:
    """A server in this process, which must end without complaints of asyncio."""
    loop, complaints = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    access = Access(**{"keys": (KEY,), "hosts": own_names(), **options})
    server = Server(State(), ROUTES, access)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop(1.0)
    assert not server.connections
    assert not complaints


@dataclass(frozen=True)
class Target:
    """What the rows run against. `port` is None for the server in this process."""

    name: str
    post: str
    reached: int
    port: int | None = None
    process: Daemon | None = None

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[int]:
        if self.port is not None:
            yield self.port
        else:
            async with serving() as (_, port):
                yield port


SYSTEM_PYTHON = "/usr/bin/python3"  # the Pi's daemon runs on it, and it may be newer than ours
TARGETS = {
    "server": ("/v1/complete", 200, ""),
    "cm4d": ("/v1/complete", 404, SYSTEM_PYTHON if Path(SYSTEM_PYTHON).exists() else sys.executable),
    "vpsd": ("/v1/inference", 404, sys.executable),
}


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    name, (path, reached, python) = request.param, TARGETS[request.param]
    if not python:
        yield Target(name, path, reached)
        return
    with contextlib.ExitStack() as stack:
        more = {}
        if name == "cm4d":  # it is healthy only with a VPS
            vps = stack.enter_context(daemon("vpsd", tmp_path_factory.mktemp("vps")))
            more["CEREBRUM_VPS_URL"] = f"http://127.0.0.1:{vps.port}"
        process = stack.enter_context(daemon(name, tmp_path_factory.mktemp(name), python, **more))
        if name == "cm4d":
            process.wait_for_line("VPS backend is available")
        yield Target(name, path, reached, process.port, process)
    assert process.complaints() == ""


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio never complains, and a row never makes the server log an error."""
    caplog.set_level(logging.INFO)
    yield
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def send_split(writer: asyncio.StreamWriter, raw: bytes, pieces: int) -> None:
    """Send in at most `pieces` writes, giving the other side its turn after each: on loopback it sees each of them."""
    step = max(1, -(-len(raw) // pieces))
    with contextlib.suppress(ConnectionError):
        for start in range(0, len(raw), step):
            writer.write(raw[start : start + step])
            await writer.drain()
            for _ in range(3 if pieces > 1 else 0):
                await asyncio.sleep(0)


async def play(target: Target, raw: bytes, count: int, pieces: int) -> tuple[list[Reply], bool]:
    """Send `raw`; returns `count` answers, and whether the connection is kept after them."""
    raw = raw.replace(b"@POST", target.post.encode()).replace(b"@SSE", target.post.encode() + b"/stream")
    raw = raw.replace(b"@GET", b"/v1/models")
    async with target.open() as port, connect(port) as (reader, writer):
        sending = asyncio.create_task(send_split(writer, raw, pieces))
        replies = []
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


def check_shape(reply: Reply, keep: bool, is_head: bool) -> None:
    """What holds for every answer."""
    assert len(reply.one("X-Request-ID")) == 36
    assert reply.one("Date").endswith(" GMT")
    assert reply.all("Connection") == ([] if keep else ["close"])
    assert reply.all("Access-Control-Allow-Origin") in ([], ["http://localhost"])
    if reply.status == 204 or is_head:
        return
    html = reply.body.startswith(b"<!doctype html>")
    assert reply.one("Content-Type") == ("text/html; charset=utf-8" if html else "application/json")
    if reply.status >= 400:
        assert list(reply.json)[:4] == ["error", "message", "code", "timestamp"]
        assert reply.json["error"] is True
        assert common.STATUSES[reply.json["code"]] == reply.status
        assert not any(word in reply.body for word in (b"Error", b"codec", b"Traceback"))
    if reply.status == 405:
        assert reply.one("Allow")
    if reply.status == 401:
        assert reply.one("WWW-Authenticate") == "Bearer"
        assert reply.json["message"] == "expected the API key in the header X-API-Key"  # whatever key came


@pytest.mark.parametrize(("name", "raw", "status", "keep"), ROWS, ids=[row[0] for row in ROWS])
async def test_row(target: Target, name: str, raw: bytes, status: int | list[int], keep: bool) -> None:
    wanted = status if isinstance(status, list) else [status]
    page = 200 if target.name == "cm4d" else 404
    expected = [{REACHED: target.reached, PAGE: page}.get(one, one) for one in wanted]
    for pieces in (1,) if target.process else (1, 2000):
        replies, kept = await play(target, raw, len(expected), pieces)
        assert ([reply.status for reply in replies], kept) == (expected, keep)
        check_replies(name, raw, keep, wanted, replies)


def check_replies(name: str, raw: bytes, keep: bool, wanted: list[int], replies: list[Reply]) -> None:
    for number, (reply, one) in enumerate(zip(replies, wanted, strict=True), 1):
        last = number == len(replies)
        is_head = b"HEAD " in raw and last
        announced = keep or not last or "before bad chunks" in name
        check_shape(reply, announced, is_head)
        if reply.status == 404 and reply.body:  # otherwise the row would pass without its route
            assert reply.json["code"] == ("MODEL_NOT_FOUND" if one == REACHED else "NOT_FOUND")
        continues = name in ("Expect", "Expect in capitals", "Expect with chunks", "Expect and bad JSON")
        assert reply.interim == int(continues)


@pytest.mark.parametrize(
    ("name", "value", "says"), FIELDS, ids=[f"{name} {str(value)[:20]!r}" for name, value, _ in FIELDS]
)
@pytest.mark.parametrize("target", ["cm4d", "vpsd"], indirect=True)
async def test_field(target: Target, name: str, value: Any, says: str) -> None:
    members = {**json.loads(BODY), name: value}
    reply = await ask(target, sized(json.dumps(members).encode()))
    assert (reply.status, reply.json["code"]) == (400, "INVALID_REQUEST")
    assert reply.json["message"].startswith(f"{name}: expected ")
    assert says in reply.json["message"]


# --------------------------------------------------------------------------------- what the table cannot say


async def ask(target: Target, raw: bytes, keep: bool = K) -> Reply:
    ((reply,), kept) = await play(target, raw, 1, 1)
    assert kept == keep
    return reply


async def ask_server(raw: bytes, **access: Any) -> tuple[Reply, list[Request]]:
    """The answer of a server in this process, and the requests that its handlers have seen."""
    async with serving(**access) as (server, port), connect(port) as (reader, writer):
        writer.write(raw.replace(b"@POST", b"/v1/complete"))
        return await read_reply(reader), list(server.state.calls)


async def test_allow_and_head(target: Target) -> None:
    options = await ask(target, get(method="OPTIONS"))
    assert options.one("Allow") == "GET, HEAD, OPTIONS"
    assert options.all("Content-Length") == []
    assert (await ask(target, get("@POST"))).one("Allow") == "OPTIONS, POST"
    whole, head = await ask(target, get()), await ask(target, get(method="HEAD"))
    assert [name for name, _ in head.headers] == [name for name, _ in whole.headers]


@pytest.mark.parametrize(("sent", "kept"), [
    ("my-id_1.2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("", False), ("ä", False),
    ("a\tb", False), ('a"b', False), ("a\r\nX-Request-ID: a", False),
])  # fmt: skip
async def test_request_id(target: Target, sent: str, kept: bool) -> None:
    for path in ("/health", "/nothing"):
        returned = (await ask(target, get(path, f"X-Request-ID: {sent}"))).one("X-Request-ID")
        assert returned == sent if kept else len(returned) == 36


@pytest.mark.parametrize(
    "cut", [b"", b"\r\n", b"GET", get()[:-1], get()[:-2], sized(BODY)[:-1], chunked(GOOD_CHUNKS)[:-1]]
)
async def test_end_of_file_inside_a_message(target: Target, cut: bytes) -> None:
    """There is no answer, no handler runs, and the log has at most a 499."""
    async with target.open() as port, connect(port) as (reader, writer):
        writer.write(cut.replace(b"@POST", target.post.encode()))
        writer.write_eof()
        assert await reader.read() == b""


SERVER = Target("server", *TARGETS["server"][:2])


async def test_stream_shapes() -> None:
    """Chunked in HTTP/1.1, bare in HTTP/1.0. An error in the stream is an event, and the stream has no clean end."""

    def raw(fail: str = "", version: str = "HTTP/1.1") -> bytes:
        return sized(json.dumps({"fail": fail}).encode(), version=version).replace(b"@POST", b"@SSE")

    good = b'data: {"token": "\\u00e4", "total_tokens": 1}\n\n'
    reply = await ask(SERVER, raw())
    assert (reply.status, reply.clean) == (200, True)
    assert reply.one("Content-Type") == "text/event-stream; charset=utf-8"
    assert reply.body == good + b'data: {"done": true}\n\n'
    reply = await ask(SERVER, raw(version="HTTP/1.0"), C)
    assert (reply.all("Transfer-Encoding"), reply.body) == ([], good + b'data: {"done": true}\n\n')
    reply = await ask(SERVER, raw("http"), C)
    assert not reply.clean
    assert reply.body == good + b'data: {"error": true, "message": "expected more", "code": "VPS_UNAVAILABLE"}\n\n'


async def test_a_bug_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    reply = await ask(SERVER, get("/v1/broken"))
    assert (reply.status, reply.json["code"]) == (500, "INTERNAL_ERROR")
    assert b"secret" not in reply.body
    reply = await ask(SERVER, sized(b'{"fail": "bug"}').replace(b"@POST", b"@SSE"), C)
    assert (reply.clean, b"secret" in reply.body, b"INTERNAL_ERROR" in reply.body) == (False, False, True)
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == ["internal error"] * 2
    caplog.clear()


async def test_handlers_see_the_decoded_body_once() -> None:
    _, (call,) = await ask_server(chunked(GOOD_CHUNKS))
    assert call.body == BODY
    assert (await ask_server(length("+5")))[1] == []


async def test_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """Lines have the form of the API text, a path cannot forge one, and a client that only connects leaves none."""

    async def logged(raw: bytes, count: int = 1) -> list[str]:
        caplog.clear()
        await play(SERVER, raw, count, 1)
        return [
            re.sub(r" [0-9]\.[0-9]{2}s( |$)", r" 0.00s\1", LogFormatter().format(record).split(" - ", 1)[1])
            for record in caplog.records
            if record.name == "cerebrum"
        ]

    forged = "/%E2%80%A8x%C2%85%20200%201.00s"
    shown, quoted = r"/\u2028x\x85 200 0.00s", r'"/\u2028x\u0085 200 1.00s"'
    refused = "expected CRLF line ends and no control characters, got byte 0x16"
    assert await logged(sized(BODY)) == ["INFO - [-] POST /v1/complete 200 0.00s"]
    assert await logged(get(forged)) == [
        f"INFO - [-] GET {shown} 404 0.00s NOT_FOUND: expected a path of this API, got {quoted}"
    ]
    assert await logged(HELLO) == [f"INFO - [-] - - 400 0.00s INVALID_REQUEST: {refused}"]
    assert await logged(b"", 0) == []


async def test_origins_by_configuration() -> None:
    async def ask(raw: bytes) -> Reply:
        access = {"origins": frozenset({"https://ide.example"}), "hosts": frozenset({"pi.example"})}
        return (await ask_server(raw.replace(b"Host: localhost", b"Host: PI.example"), **access))[0]

    reply = await ask(get("/health", "Origin: https://IDE.example"))
    assert (reply.status, reply.one("Access-Control-Allow-Origin")) == (200, "https://IDE.example")
    assert reply.one("Vary") == "Origin"
    reply = await ask(get("/nothing", "Origin: https://ide.example"))
    assert (reply.status, reply.one("Access-Control-Allow-Origin")) == (404, "https://ide.example")
    asked = ("Origin: https://ide.example", "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: ")
    usual = "Content-Type, X-API-Key, X-Request-ID, Authorization"
    for names, allowed in (
        ("authorization,x-stainless-os,x-stainless-retry-count", True),  # openai-node
        ("a, \tb", True),
        ("ab" + ",c" * 511, True),
        ("abc" + ",c" * 511, False),
        *((bad, False) for bad in ("", "*,", "a;b", "a b", ",a", "a\xe4")),
    ):
        raw = without(get("@POST", *asked[:2], asked[2] + names, method="OPTIONS"), "X-API-Key")
        reply = await ask(raw)
        assert (reply.status, reply.one("Access-Control-Allow-Methods")) == (204, "OPTIONS, POST")
        assert reply.one("Access-Control-Allow-Headers") == (f"{usual}, {names}" if allowed else usual)
    for foreign in ("http://ide.example", "https://ide.example.evil", "https://ide.example:444"):
        reply = await ask(get("/health", f"Origin: {foreign}"))
        assert (reply.status, reply.all("Access-Control-Allow-Origin")) == (403, [])


@pytest.mark.parametrize(("encoding", "status"), [("utf-8", 200), ("latin-1", 401)])
async def test_non_ascii_key(encoding: str, status: int) -> None:
    raw = lines("GET /v1/models HTTP/1.1", "Host: localhost", b"X-API-Key: " + "schlüssel".encode(encoding))
    assert (await ask_server(raw, keys=("schlüssel",)))[0].status == status


def test_a_short_fuzz() -> None:
    """`make fuzz` tries 100,000 inputs; these few are always the same."""
    results, findings = fuzz_sockets.main(2000, 1)
    assert findings == []
    assert [one["inputs"] for one in results] == [1000, 1000]
