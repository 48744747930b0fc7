"""The pure parsers: tables, and hypothesis with h11 as an independent oracle.

Any bytes in any split give a value or an HttpError, never another exception, and the same for every split.
What h11 refuses we refuse.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerebrum.fields import parse_json
from cerebrum.http import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    MAX_LINE_BYTES,
    STATUS_LINE,
    BodyDecoder,
    chunk,
    encode_head,
    parse_request,
    parse_target,
    scan_head,
    scan_request,
)
from cerebrum_common import Head, HttpError

HEAD = b"POST /v1/complete HTTP/1.1\r\nHost: pi:7000\r\nContent-Length: 5\r\n\r\n"


def refusal(call: Callable[[], Any]) -> HttpError | None:
    """The HttpError that `call` raises, or None."""
    try:
        call()
    except HttpError as error:
        return error
    return None


def status_of(call: Callable[[], Any]) -> int | None:
    """The status of the refusal, or None. Its message is fit for a client."""
    error = refusal(call)
    assert error is None or (error.message.isascii() and len(error.message) < 300)
    return error and error.status


def pieces_of(data: bytes, cuts: Iterable[int]) -> Iterator[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return (data[start:stop] for start, stop in pairwise(bounds))


def read_head(data: bytes, cuts: Iterable[int] = ()) -> Head | int | None:
    """The outcome of `data` that arrives cut at `cuts`: a head, a status, or None if more is needed."""
    buffer, scanned = bytearray(), 0
    try:
        for piece in pieces_of(data, cuts):
            buffer += piece
            if (end := scan_request(buffer, scanned)) is not None:
                return parse_request(bytes(buffer[:end]))
            scanned = len(buffer)
    except HttpError as error:
        return error.status
    return None


def decode(data: bytes, cuts: Iterable[int] = (), limit: int | None = None) -> tuple[bytes, bytes, bool] | int:
    """A chunked body cut at `cuts`: (payload, rest, done), or a status."""
    decoder, payload = BodyDecoder(None, True, limit), b""
    for piece in pieces_of(data, cuts):
        payload += decoder.feed(piece)
        if decoder.fault:
            return decoder.fault.status
    return payload, decoder.rest, decoder.done


# ------------------------------------------------------------------------------------------------- random bytes

# Their seed is fixed. hypothesis takes ten times as long to make a soup of bytes, and could hardly shrink it.

TOKENS = [
    b"GET", b"POST", b"get", b" ", b"  ", b"/", b"/health", b"/%41", b"/%zz", b"*", b"http://h/", b"?a=b", b"HTTP/1.1",
    b"HTTP/1.0", b"HTTP/2.0", b"\r\n", b"\r\n\r\n", b"\n", b"\r", b"Host", b": ", b":", b"localhost", b"[::1]:80",
    b"Content-Length", b"5", b"05", b"+5", b"Transfer-Encoding", b"chunked", b"gzip", b",", b"\t", b"\0", b"\xff",
    b"Expect", b"100-continue", b"Connection", b"close", b"X-Request-ID", b"a" * 200, b"b" * 9000,
]  # fmt: skip
LINES = [
    b"Host: h", b"Host: h:80", b"host: a b", b"Content-Length: 5", b"Content-Length: 5 ", b"Content-Length: 5, 5",
    b"Content-Length: \xb2", b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: gzip",
    b" folded", b"A:b", b"A: \x01", b": a", b"Connection: close", b"A\xe4: b", b"A: \xe4", b"", b"Expect: 100-continue",
    b"A: " + b"b" * 500,
]  # fmt: skip
REQUEST_LINES = [
    b"GET / HTTP/1.1", b"POST /x HTTP/1.1", b"GET / HTTP/1.0", b"GET /a?b HTTP/1.1", b"GET /a#b HTTP/1.1",
    b"GET  / HTTP/1.1", b"G\xe4T / HTTP/1.1", b"GET /\xe4 HTTP/1.1", b"GET / HTTP/1.2", b"GET /", b"OPTIONS * HTTP/1.1",
    b"CONNECT a:1 HTTP/1.1", b"GET / HTTP/1.1 ", b"GET /\x7f HTTP/1.1",
]  # fmt: skip
CHUNKS = [
    b"0", b"1", b"5", b"a", b"F", b"1" * 16, b"1" * 17, b"0x5", b"-1", b" ", b";a=b", b";" + b"a" * 300, b"\r\n", b"\r",
    b"\n", b"12345", b"x", b"A: b", b"\r\n\r\n", b"0\r\n\r\n", b"5\r\n12345\r\n", b"1\r\nx\r\n", b"\0", b"\xff",
    b"A: b\r\n" * 1500,
]  # fmt: skip


GOOD_CHUNKS = [
    b"6\r\n1\r\nx\r\n\r\n", b"0\r\n\r\n", b"5\r\n12345\r\n", b"1\r\nx\r\n", b"A;b\r\n1234567890\r\n",
    b"0\r\nA: b\r\n\r\n",
]  # fmt: skip


def soup(draw: random.Random, tokens: list[bytes], most: int) -> bytes:
    return b"".join(draw.choices(tokens, k=draw.randint(0, most)))


def a_request(draw: random.Random) -> bytes:
    """A request line and headers that may be good ones, of which one is Host more often than not."""
    headers = draw.choices(LINES, k=draw.randint(0, 9) // draw.choice((1, 3)))
    if draw.random() < 0.7:
        headers = [b"Host: h", *(line for line in headers if not line.lower().startswith(b"host"))]
    return b"\r\n".join([draw.choice(REQUEST_LINES), *headers, b"", b""])


def fields_of(outcome: Head | int | None) -> dict[str, Any] | int | None:
    """What two readings of a head must have in common: all but the id, which may be made up."""
    if not isinstance(outcome, Head):
        return outcome
    return {name: getattr(outcome, name) for name in Head.__slots__ if name != "request_id"}


def check_with_h11(data: bytes, ours: Head) -> None:
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    peer.receive_data(data.removeprefix(b"\r\n"))  # RFC 9112, 2.2, lets us skip an empty line
    event = peer.next_event()
    assert isinstance(event, h11.Request)  # h11.RemoteProtocolError: it refuses what we took
    assert event.method.decode() == ours.method
    assert event.http_version.decode() == ours.version.removeprefix("HTTP/")
    theirs: dict[str, str] = {}
    for name, value in event.headers:
        key, text = name.decode(), value.decode("latin-1")
        theirs[key] = f"{theirs[key]}, {text}" if key in theirs else text
    assert {**ours.headers, "transfer-encoding": ""} == {**theirs, "transfer-encoding": ""}


def test_a_head_is_the_same_for_every_split_and_what_h11_refuses_we_refuse() -> None:
    draw = random.Random(1)
    heads = [b"\r\n" + HEAD, b"\r\n\r\n", b"A" * 40_000, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9000]
    for _ in range(1200):
        heads += [a_request(draw), soup(draw, TOKENS, 30), draw.randbytes(draw.randint(0, 60)) + b"\r\n\r\n"]
    taken = 0
    for data in heads:
        whole = read_head(data)
        for cuts in (draw.choices(range(1 << 16), k=draw.randint(1, 12)), range(min(len(data), 300))):
            again = read_head(data, cuts)
            if isinstance(whole, Head):
                assert isinstance(again, Head), (data, cuts)
                assert all(
                    getattr(whole, name) == getattr(again, name) for name in Head.__slots__ if name != "request_id"
                )
            else:
                assert again == whole, (data, cuts)
        if isinstance(whole, Head):
            check_with_h11(data, whole)
            taken += 1
    assert taken > 100


def test_chunks_are_the_same_for_every_split_and_what_h11_refuses_we_refuse() -> None:
    draw = random.Random(1)
    bodies = [b"0\r\n" + b"A: b\r\n" * 1364 + b"A: b\r\n\r\n", b"5" + b";" + b"a" * 252 + b"\r\n12345\r\n"]
    for _ in range(1200):
        bodies += [soup(draw, CHUNKS, 12), soup(draw, GOOD_CHUNKS, 12), draw.randbytes(draw.randint(0, 60))]
    whole_ones = 0
    for data in bodies:
        limit = draw.choice((None, 20, MAX_BODY_BYTES))
        whole = decode(data, limit=limit)
        for cuts in (draw.choices(range(1 << 16), k=draw.randint(1, 12)), range(min(len(data), 600))):
            assert decode(data, cuts, limit) == whole, (data, cuts, limit)
        if isinstance(whole, int):
            continue
        peer = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        peer.receive_data(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
        assert isinstance(peer.next_event(), h11.Request)
        payload = b""
        while isinstance(event := peer.next_event(), h11.Data):
            payload += bytes(event.data)
        assert (payload, isinstance(event, h11.EndOfMessage)) == (whole[0], whole[2]), data
        whole_ones += whole[2] and len(payload) > 0
    assert whole_ones > 400


def test_chunks_round_trip() -> None:
    draw = random.Random(1)
    for _ in range(500):
        pieces = [draw.randbytes(draw.randint(1, 50)) for _ in range(draw.randint(0, 10))]
        body = b"".join(chunk(piece) for piece in pieces) + b"0\r\n\r\n"
        cuts = draw.choices(range(len(body)), k=draw.randint(0, 12))
        assert decode(body + b"GET", cuts) == (b"".join(pieces), b"GET", True)


JSON_TOKENS = [
    b"{", b"}", b"[", b"]", b'"a"', b":", b",", b"1", b"-", b"1e999", b"NaN", b"null", b"\xff", b"\xef\xbb\xbf", b" ",
    b"\\u", b'"',
]  # fmt: skip


def test_json_is_an_object_or_an_error() -> None:
    draw = random.Random(1)
    for _ in range(3000):
        body = soup(draw, JSON_TOKENS, 20)
        for one in (body, b"{" + body + b"}", draw.randbytes(draw.randint(0, 40))):
            error = refusal(lambda one=one: parse_json(one))
            if error is None:
                assert isinstance(parse_json(one), dict)
            else:
                assert (error.status, error.close) == (400, False)
                assert "line" not in error.message


@settings(max_examples=500, deadline=None)
@given(st.text(max_size=60))
def test_a_target_is_a_path_or_an_error(text: str) -> None:
    error = refusal(lambda: parse_target(text))
    if error is None:
        path, _ = parse_target(text)
        assert path.startswith("/")
        assert not re.search(r"[\x00-\x1f\x7f?#]", path) or "%" in text
    else:
        assert (error.status, error.close) == (400, True)


# ------------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("target", "path", "authority"),
    [
        ("/", "/", ""),
        ("/a/b?c", "/a/b", ""),
        ("/a%2Fb", "/a/b", ""),
        ("/%61%2561", "/a%61", ""),
        ("/%C3%A4", "/ä", ""),
        ("/%3f%23", "/?#", ""),
        ("//a/", "/a", ""),
        ("//", "/", ""),
        ("//evil.example/a//b", "/evil.example/a//b", ""),
        ("/%2Fa%2F", "//a/", ""),
        ("http://h//a", "/a", "h"),
        ("http://h", "/", "h"),
        ("http://H:80?x", "/", "h"),
        ("HTTP://[::1]:1/a", "/a", "[::1]"),
    ],
)
def test_targets(target: str, path: str, authority: str) -> None:
    assert parse_target(target) == (path, authority)


def test_limits_are_exact() -> None:
    assert read_head(b"G" * (MAX_LINE_BYTES - 1)) is None
    assert read_head(b"G" * MAX_LINE_BYTES) == 414
    begin = b"GET / HTTP/1.1\r\nHost: h\r\nA: "
    assert read_head(begin + b"a" * (MAX_HEAD_BYTES - 1 - len(begin))) is None
    assert read_head(begin + b"a" * (MAX_HEAD_BYTES - len(begin))) == 431
    assert isinstance(read_head(begin + b"a" * (MAX_HEAD_BYTES - 4 - len(begin)) + b"\r\n\r\n"), Head)


def test_a_foreign_head_is_scanned_alike() -> None:
    """scan_head and STATUS_LINE read the other side of the Pi."""
    head = b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n"
    assert [scan_head(head[:n], n - 1) for n in range(1, len(head))] == [None] * (len(head) - 1)
    assert scan_head(head) == len(head)
    lines = {b"HTTP/1.1 200 OK": 1, b"HTTP/1.0 404": 1, b"HTTP/1.1 200 ": 1, b"HTTP/2 200": 0, b"HTTP/1.1 99 x": 0}
    assert {line: bool(STATUS_LINE.fullmatch(line)) for line in lines} == lines


def test_a_response_header_cannot_become_two() -> None:
    assert encode_head(204, [("Allow", "GET")]) == b"HTTP/1.1 204 No Content\r\nAllow: GET\r\n\r\n"
    for value in ("a\r\nB: c", "a\nb", "a\r"):
        with pytest.raises(ValueError, match="line end"):
            encode_head(200, [("A", value)])


def test_depth_is_exact() -> None:
    for containers, refused in ((64, None), (65, 400), (900, 400), (200_000, 400)):
        assert status_of(lambda n=containers: parse_json(b'{"a":' + b"[" * (n - 1) + b"]" * (n - 1) + b"}")) == refused
        assert status_of(lambda n=containers: parse_json(b'{"a":' * n + b"1" + b"}" * n)) == refused


def test_the_size_of_integers_is_exact() -> None:
    assert parse_json(b'{"a": %b}' % (b"9" * 20)) == {"a": 10**20 - 1}
    for digits in (21, 5000):  # int() refuses the second by itself, with a message that is not fit for clients
        with pytest.raises(HttpError, match=r"^expected a JSON object: expected integers of at most 20 digits$"):
            parse_json(b'{"a": %b}' % (b"9" * digits))


def test_a_body_in_tiny_chunks_takes_linear_time() -> None:
    """1 MiB in chunks of one byte, in reads of one byte too: the decoder holds no payload."""
    decoder, held = BodyDecoder(None, True, MAX_BODY_BYTES), 0
    for _ in range(1200):
        for byte in b"1\r\nx\r\n":
            decoder.feed(bytes([byte]))
            held = max(held, len(decoder.rest))
    assert held <= 3


@pytest.mark.parametrize("wrong", [b"x", b"1\r\nab", b"1\r\na\n", b"\n", b"1;\0", b"0\r\n\0", b"0\r\nA: b\n", b"1 "])
def test_a_wrong_chunk_is_refused_at_its_first_wrong_byte(wrong: bytes) -> None:
    assert decode(wrong) == 400
    assert decode(wrong[:-1]) != 400


def test_extensions_count_as_body() -> None:
    line = b"1;" + b"a" * 200 + b"\r\nx\r\n"
    assert decode(line * 5, [], 1000) == 413
