"""The pure parsers on random bytes, made from the rows of test_wire.py, with h11 as an oracle.

Any bytes in any split give a value or an HttpError, never another exception, and the same for every split. What h11
refuses we refuse. The seeds are fixed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

import h11
import pytest
from test_wire import BODIES, SEEDS, mutate, splits

from cerebrum.http import (
    MAX_BODY_BYTES,
    MAX_HEAD_BYTES,
    BodyDecoder,
    encode_head,
    parse_request,
    parse_target,
    scan_request,
)
from cerebrum_common import Head, HttpError

CHUNKS = [raw.partition(b"\r\n\r\n")[2] for _, raw, *_ in BODIES if b"chunked\r\n\r\n" in raw and b"gzip" not in raw]
CHUNKS += [b"5\r\n12345\r\n", b"1;a=b\r\nx\r\n", b"0\r\nA: b\r\n\r\n", b"A\r\n1234567890\r\n0\r\n\r\n"] * 40


def read_head(pieces: Iterable[bytes]) -> dict[str, Any] | int | None:
    """The outcome of these pieces: the fields of a head, a status, or None if more is needed."""
    buffer, scanned = bytearray(), 0
    try:
        for piece in pieces:
            buffer += piece
            if (end := scan_request(buffer, scanned)) is not None:
                head = parse_request(bytes(buffer[:end]))
                return {name: getattr(head, name) for name in Head.__slots__ if name != "request_id"}  # made up
            scanned = len(buffer)
    except HttpError as error:
        return error.status
    return None


def decode(pieces: Iterable[bytes], limit: int | None = None) -> tuple[bytes, bytes, bool] | int:
    """A chunked body: (payload, rest, done), or a status."""
    decoder, payload = BodyDecoder(None, True, limit), b""
    for piece in pieces:
        payload += decoder.feed(piece)
        if decoder.fault:
            return decoder.fault.status
    return payload, decoder.rest, decoder.done


def peer_of(data: bytes) -> h11.Connection:
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
    peer.receive_data(data)
    return peer


def test_a_head_is_the_same_for_every_split_and_what_h11_refuses_we_refuse() -> None:
    draw, taken = random.Random(1), 0
    for data in (mutate(draw, SEEDS) for _ in range(2500)):
        whole = read_head([data])
        for pieces in splits(draw, data):
            assert read_head(pieces) == whole, pieces
        if isinstance(whole, dict):
            event = peer_of(data.removeprefix(b"\r\n")).next_event()  # RFC 9112, 2.2, lets us skip an empty line
            assert isinstance(event, h11.Request)  # h11.RemoteProtocolError: it refuses what we took
            assert (event.method.decode(), f"HTTP/{event.http_version.decode()}") == (whole["method"], whole["version"])
            theirs: dict[str, str] = {}
            for name, value in event.headers:
                key, text = name.decode(), value.decode("latin-1")
                theirs[key] = f"{theirs[key]}, {text}" if key in theirs else text
            assert {**whole["headers"], "transfer-encoding": ""} == {**theirs, "transfer-encoding": ""}
            assert re.fullmatch(r"\*|/[^\x00-\x1f\x7f]*", whole["path"])
            taken += 1
    assert taken > 500


def test_chunks_are_the_same_for_every_split_and_what_h11_refuses_we_refuse() -> None:
    draw, taken = random.Random(1), 0
    for soup in (b"".join(draw.choices(CHUNKS, k=draw.randint(1, 6))) for _ in range(1500)):
        data = draw.choice((soup, mutate(draw, [soup])))
        limit = draw.choice((None, 50, MAX_BODY_BYTES))
        whole = decode([data], limit)
        for pieces in splits(draw, data):
            assert decode(pieces, limit) == whole, (pieces, limit)
        if not isinstance(whole, int):
            peer = peer_of(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + data)
            assert isinstance(peer.next_event(), h11.Request)
            payload = b""
            while isinstance(event := peer.next_event(), h11.Data):
                payload += bytes(event.data)
            assert (payload, isinstance(event, h11.EndOfMessage)) == (whole[0], whole[2]), data
            taken += whole[2] and len(payload) > 0
    assert taken > 200


def test_targets() -> None:
    for target, parsed in {
        "/": ("/", ""),
        "/a/b?c": ("/a/b", ""),
        "/a%2Fb": ("/a/b", ""),
        "/%61%2561": ("/a%61", ""),
        "/%C3%A4": ("/ä", ""),
        "/%3f%23": ("/?#", ""),
        "//evil.example/a//b/": ("/evil.example/a//b", ""),
        "/%2Fa%2F": ("//a/", ""),
        "http://h//a": ("/a", "h"),
        "http://H:80?x": ("/", "h"),
        "HTTP://[::1]:1/a": ("/a", "[::1]"),
    }.items():
        assert parse_target(target) == parsed


def test_a_response_header_cannot_become_two() -> None:
    for value in ("a\r\nB: c", "a\nb", "a\r"):
        with pytest.raises(ValueError, match="line end"):
            encode_head(200, [("A", value)])
