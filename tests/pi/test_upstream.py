"""The other side of the Pi: what a broken or lying VPS can do, and what the Pi's client sees of it.

One table of scripts; each row runs whole and byte by byte, through the stream and through the
collected endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import math
import re
import socket
import ssl
from typing import Any
from unittest.mock import Mock

import pytest
from harness import KEY, PATIENCE, Reply, certificate, until
from scripted import (
    CHUNKED,
    DONE,
    GOOD,
    HANG,
    RESET,
    Backend,
    Flood,
    Pi,
    backend_at,
    chunk,
    error,
    event,
    head,
    pi_for,
    pi_with,
)

from cerebrum.pi import backend as pi_backend
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi import native, upstream
from cerebrum.pi.native import MAX_MESSAGE_CHARACTERS, read_models
from cerebrum.pi.upstream import (
    ENDED,
    EXPIRED,
    MAX_EVENT_BYTES,
    Answer,
    BackendFailure,
    Events,
)
from cerebrum.pi.upstream import Reader as BackendReader

TOKEN_A, TOKEN_B = {"token": "a", "total_tokens": 1}, {"token": "b", "total_tokens": 2}
BOTH = event(**TOKEN_A) + event(**TOKEN_B)
A, B = chunk(event(**TOKEN_A)), chunk(event(**TOKEN_B))
END = b"0\r\n\r\n"
CLOSING = head(200, "Connection: close")
BUSY, UNAVAILABLE = "RESOURCE_EXHAUSTED", "VPS_UNAVAILABLE"
FIELDS = {"prompt": "x", "language": "python"}
TIMED_OUT = head(408, "Content-Length: 0")


def length_of(payload: bytes) -> bytes:
    return head(200, f"Content-Length: {len(payload)}") + payload


# A fault before the first event is the client's 503, which the breaker counts: part of the message,
# and what the VPS does.
FAILED = {
    "reset before any byte": ("without an answer", RESET),
    "closed inside the head": ("without an answer", CHUNKED[:30]),
    "not HTTP": ("not HTTP/1.1", b"SSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "bare LF": ("not HTTP/1.1", b"HTTP/1.1 200 OK\n\n"),
    "two lengths": ("not HTTP/1.1", head(200, "Content-Length: 1", "Content-Length: 1")),
    "gzip framing": ("not HTTP/1.1", head(200, "Transfer-Encoding: gzip, chunked")),
    "gzip content": ("Content-Encoding", head(200, "Content-Encoding: gzip")),
    "a head without end": ("not HTTP/1.1", b"HTTP/1.1 200 OK\r\n", Flood(b"A: b\r\n" * 200)),
    "an HTML page": ("type", head(200, "Content-Length: 6", kind="text/html"), b"<html>"),
    "a redirect": ("307", head(307, "Location: http://127.0.0.1:1/", "Content-Length: 0")),
    "a redirect as our error": ("302", error(302, "VPS_BUSY")),
    "no content": ("204", head(204)),
    "switching protocols": ("without an answer", head(101)),
    "informational for ever": ("103", Flood(head(103))),
    "an error past its length": ("503", head(503, "Content-Length: 2") + b"{} "),
    "an error without end": ("503", head(503, "Connection: close"), Flood(b" " * 4096)),
    "a header as an error's code": ("503", error(503, "A\r\nB: c")),
}
# An error of a backend that is up: the client's status and code, part of the message, and what the
# VPS does.
REFUSED = {
    "its own 500": (500, "MODEL_LOAD_FAILED", "says the VPS", error(500, "MODEL_LOAD_FAILED")),
    "its 503 after a 100": (503, BUSY, "says the VPS", head(100), error(503, BUSY)),
    "its 401": (503, UNAVAILABLE, "do not match", error(401, "UNAUTHORIZED")),
    "its 421": (503, UNAVAILABLE, "CEREBRUM_ALLOWED_HOSTS", error(421, "MISDIRECTED_REQUEST")),
}

# A later fault is an error event and a cut.
SILENT = {  # nothing comes before the fault
    "resets after the head": ("the connection broke in the middle of its answer", CHUNKED, RESET),
    "a length of 0": ("without saying that it is done", head(200, "Content-Length: 0")),
}
BROKEN = {  # part of the message, and what follows the first token
    "resets between chunks": ("the connection broke in the middle of its answer", RESET),
    "dies between chunks": ("it ended in the middle of its answer",),
    "dies inside a chunk": ("in the middle of its answer", B[:-7]),
    "dies inside the last chunk": ("in the middle of its answer", chunk(DONE), b"0\r\n"),
    "half an event, then the last chunk": ("of an event", chunk(event(**TOKEN_B)[:-1]), END),
    "a clean end without done": ("without saying that it is done", END),
    "a broken chunk size": ("malformed chunk", b"xyz\r\n"),
    "a chunk longer than it says": ("malformed chunk", b"3\r\nabcdef\r\n"),
    "a broken last chunk": ("malformed chunk", b"0\r\nx y\r\n\r\n"),
    "done past the last chunk": ("without saying", END + chunk(DONE)),
    "a token after done": ("after the last one", chunk(DONE), B, END),
    "not JSON": ("not JSON", chunk(b"data: {oops\n\n")),
    "an odd number": ("not JSON", chunk(b'data: {"token": "b", "total_tokens": 007}\n\n')),
    "not UTF-8": ("not JSON", chunk(b'data: {"token": "\xff", "total_tokens": 2}\n\n')),
    "NaN": ("not JSON", chunk(b'data: {"done": true, "total_tokens": NaN}\n\n'), END),
    "a token without its number": ("without its number", chunk(event(token="b"))),
    "a token with a wrong number": ("its number", chunk(event(token="b", total_tokens=True))),
    "an error without a code": ("without message", chunk(event(error=True, message="m"))),
}

# The same two tokens in every framing and split.
TWO = [A, B, chunk(DONE), END]
WHOLE = {
    "chunks": [*GOOD],
    "one chunk": [CHUNKED, chunk(BOTH + DONE), END],
    "chunks that cut events": [CHUNKED, *(chunk(bytes([c])) for c in BOTH), chunk(DONE), END],
    "extensions and trailers": [
        CHUNKED, b"29;a=b\r\n" + A[4:], *TWO[1:3], b"0\r\nA: b\r\n\r\n",
    ],
    "a length": [length_of(BOTH + DONE)],
    "surplus behind a length": [length_of(BOTH + DONE) + b"HTTP/1.1 200 OK\r\n"],
    "a connection that stays open": [*GOOD, HANG],
    "until the close": [CLOSING, BOTH, DONE],
    "HTTP/1.0": [b"HTTP/1.0 200 OK\r\n\r\n", BOTH, DONE],
    "after 100 and 103": [head(100), head(103), *GOOD],
    "CRLF in events": [CLOSING, (BOTH + DONE).replace(b"\n", b"\r\n")],
    "events that nobody knows": [
        CHUNKED, chunk(event(news=1) + b"event: x\nid: 7\n\n"), *TWO,
    ],
    "other spacing": [
        CHUNKED, chunk(b'data:{"total_tokens":1,"token":"\\u0061"}\n\n'), *TWO[1:],
    ],
    "data over two lines": [
        CHUNKED, chunk(b'data: {"token": "a",\ndata: "total_tokens": 1}\n\n'), *TWO[1:],
    ],
}  # fmt: skip


def check_error(reply: Reply, status: int, code: str, part: str):
    assert (reply.status, reply.json["code"], reply.clean) == (status, code, True)
    assert part in reply.json["message"]
    assert set(reply.json) >= {"error", "message", "code", "timestamp"}
    assert reply.all("Retry-After") == []


def failures_at(pi: Pi) -> int:
    return pi.gateway.fleet.first.breaker.failures


@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", [*FAILED, *REFUSED])
async def test_before_the_first_event(name, split):
    refused = REFUSED.get(name) or (503, UNAVAILABLE, *FAILED[name])
    status, code, part, *script = refused
    async with pi_with(script, probing=False) as (pi, backend):
        backend.split = split
        for ask in (pi.stream, pi.complete):
            check_error(await ask(), status, code, part)
        assert len(backend.completions) == 2, "a POST was sent again"
        assert failures_at(pi) == (2 if name in FAILED else 0)


def joined(script: list[Any]) -> list[Any]:
    """The script with its writes joined, so a fault arrives in the same read as the good events
    before it.
    """
    whole = b"".join(step for step in script if step is not RESET)
    return [whole, RESET] if RESET in script else [whole]


@pytest.mark.parametrize("how", ["writes", "one write", "bytes"])
@pytest.mark.parametrize("name", [*SILENT, *BROKEN])
async def test_broken(name, how):
    """All whole events before the fault, then the error, then the cut, for every split of the
    bytes.
    """
    if name in SILENT:
        (part, *script), before = SILENT[name], []
    else:
        (part, *rest), before = BROKEN[name], [TOKEN_A]
        script = [CHUNKED, A, *rest]
    script = joined(script) if how == "one write" else script
    async with pi_with(script, probing=False) as (pi, backend):
        backend.split = how == "bytes"
        reply = await pi.stream()
        assert (reply.status, reply.clean) == (200, False)
        *events, last = reply.events
        assert events == before
        assert (last["error"], last["code"]) == (True, UNAVAILABLE)
        assert part in last["message"]
        check_error(await pi.complete(), 503, UNAVAILABLE, part)
        assert len(backend.completions) == 2, "a POST was sent again"
        assert failures_at(pi) == (1 if before else 2)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", WHOLE)
async def test_whole(name, split):
    async with pi_with(WHOLE[name], probing=False) as (pi, backend):
        backend.split = split
        reply = await pi.stream()
        *tokens, done = reply.events
        assert (reply.status, reply.clean, tokens) == (200, True, [TOKEN_A, TOKEN_B])
        assert done == done | RESULT
        assert (await pi.complete()).json["completion"] == "ab"


RESULT = json.loads("""{
    "done": true, "total_tokens": 2, "inference_time": 0.25, "finish_reason": "stop",
    "prompt_tokens": 5, "language": "python", "model": "qwen_0_5b", "mode": "complete"}""")

# -------------------------------------------------------------------------------------- connections


async def test_a_completion_leaves_a_connection_for_the_next(monkeypatch):
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 0.01)
    async with pi_with() as (pi, backend):
        assert (await pi.complete()).status == 200
        await until(lambda probes=pi.probes: pi.probes > probes + 3 and len(backend.waiting) == 1)
        (spare,) = backend.waiting  # the probes open connections too, for a moment
        await until(lambda probes=pi.probes: pi.probes > probes + 3)
        await until(lambda: backend.waiting == {spare}, "probes use none, and leave none")
        assert (await pi.complete()).status == 200
        await until(lambda: backend.waiting and spare not in backend.waiting, "another one")


async def test_a_spare_connection_that_nobody_uses_is_closed(monkeypatch):
    monkeypatch.setattr(upstream, "SPARE_SECONDS", 0.05)
    async with pi_with() as (pi, backend):
        assert (await pi.complete()).status == 200
        await until(lambda: backend.waiting)
        await until(lambda: not backend.waiting)
        connections = backend.connections
        pi.gateway.fleet.first.wake.set()
        await until(lambda probes=pi.probes: pi.probes > probes)
        asked = backend.connections - connections
        assert asked <= 2, "a probe asks twice, and nothing else connects"


@pytest.mark.parametrize(("last", "closes"), [(b"", True), (TIMED_OUT, True), (TIMED_OUT, False)])
async def test_a_spare_connection_that_the_backend_has_ended_or_written_to_is_not_used(
    last, closes
):
    async with pi_with() as (pi, backend):
        assert (await pi.complete()).status == 200
        await until(lambda: backend.waiting)
        (writer,) = backend.waiting
        spare = await until(lambda: pi.gateway.fleet.first.kind.client._spare)
        writer.write(last)
        if closes:
            writer.close()
        await until(lambda: spare.end if closes else spare.unread)
        assert (await pi.complete()).status == 200


# What a used spare gets, what the next connection gets, the client's status, the requests, and the
# breaker's failures.
SENT_AGAIN = [
    ([], GOOD, 200, 3, 0),
    ([RESET], GOOD, 200, 3, 0),
    ([], [RESET], 503, 3, 1),
    ([CHUNKED[:30]], GOOD, 503, 2, 1),
    ([head(100)], GOOD, 503, 2, 1),
    ([HANG], GOOD, 503, 2, 1),
]


@pytest.mark.parametrize(("fault", "then", "status", "asked", "failures"), SENT_AGAIN)
async def test_a_spare_connection_that_closes_as_the_request_goes_out(
    fault, then, status, asked, failures, monkeypatch
):
    """The request is sent again, once, and only if nobody can have had an answer."""
    monkeypatch.setattr(native, "BEGIN_SECONDS", 0.5)
    async with pi_with(GOOD, fault, then) as (pi, backend):
        assert (await pi.complete()).status == 200
        await until(lambda: backend.waiting)
        assert ((await pi.complete()).status, len(backend.completions)) == (status, asked)
        assert failures_at(pi) == failures


async def test_an_address_that_drops_packets_does_not_hide_the_next_one(monkeypatch):
    """A listener with a full queue drops new connections."""
    with contextlib.ExitStack() as stack:
        deaf = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        async with Backend() as backend:
            ports = (deaf.getsockname()[1], backend.port)
            stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
            addresses = [(*stream, ("127.0.0.1", port)) for port in ports]
            monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **how: addresses)
            async with pi_for(backend_at(backend.port, origin="http://vps")) as pi:
                assert (await pi.complete()).status == 200


async def test_https_with_a_private_authority(tmp_path):
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(*certificate(tmp_path, "vps").values())
    async with Backend(tls=tls) as backend:
        https = {"origin": "https://127.0.0.1", "ca_file": f"{tmp_path}/vps.crt"}
        async with pi_for(backend_at(backend.port, **https)) as pi:
            assert [(await pi.complete()).json["completion"] for _ in range(2)] == ["ab", "ab"]
        await until(lambda: not gc.collect() and BackendReader not in map(type, gc.get_objects()))
        async with pi_for(backend_at(backend.port, **https | {"ca_file": ""})) as pi:
            check_error(reply := await pi.complete(), 503, UNAVAILABLE, "it cannot be reached")
            told = (reply.body + (await pi.get("/health")).body).lower()
            assert not re.search(rb"certificate|ssl|_verify|traceback|errno", told)


OVERRIDDEN = "language model mode timestamp completion token message code"
FIGURES = "total_tokens prompt_tokens cached_tokens inference_time load_time ttft finish_reason"
TRUE = {"language": "python", "model": "qwen_0_5b", "mode": "complete", "total_tokens": 2}


@pytest.mark.parametrize("wrong", [True, None, "", -1, 10**19, [], {}], ids=str)
async def test_a_done_event_that_lies_cannot_override_what_is_ours(wrong):
    """Figures of the wrong type are left out, as are members that nobody knows."""
    lies = dict.fromkeys(OVERRIDDEN.split(), "lies")
    lies |= dict.fromkeys(FIGURES.split(), wrong)
    done = chunk(event(**lies, kept="lies", x=[1], done=True))
    async with pi_with([CHUNKED, A, B, done, END]) as (pi, _):
        whole, stream = (await pi.complete()).json, await pi.stream()
        assert (whole["completion"], stream.clean) == ("ab", True)
        for result, own in ((whole, "completion"), (stream.events[-1], "done")):
            assert result == result | TRUE
            assert type(result["inference_time"]) is float
            assert 0 <= result["inference_time"] < PATIENCE
            assert (len(result["timestamp"]), result["kept"]["parts"]) == (26, ["all"])
            assert set(result) == {*TRUE, "inference_time", "timestamp", "kept", own}
        assert (await pi.post("/infill", {"prompt": "x = "})).json["content"] == "ab"


MESSAGES = [
    ("one\r\ntwo\x1b[2J\0\x7f\x9b3", "one two [2J 3"),
    (f"the key {KEY}", "the key ***"),
    ("x" * (MAX_MESSAGE_CHARACTERS - 9) + KEY, "x" * (MAX_MESSAGE_CHARACTERS - 9) + "***"),
    ("größer 😀", "größer 😀"),
]


@pytest.mark.parametrize(("message", "told"), MESSAGES)
async def test_a_message_of_the_vps_has_no_controls_and_no_key(message, told):
    refused = error(503, BUSY, message)
    broken = [CHUNKED, A, chunk(event(error=True, message=message, code=BUSY))]
    async with pi_with([refused], broken) as (pi, _):
        for _ in range(2):
            check_error(await pi.complete(), 503, BUSY, told)
        first, last = (await pi.stream()).events
        del last["timestamp"]
        assert (first, last) == (TOKEN_A, {"error": True, "message": told, "code": BUSY})
        assert failures_at(pi) == 0


async def test_progress_and_comments_are_passed_on():
    progress = {"progress": {"stage": "prefill", "done": 1, "total": 2}}
    script = [CHUNKED, chunk(b": keep-alive\n\n"), chunk(event(**progress)), *TWO]
    async with pi_with(script) as (pi, _):
        events = (await pi.stream(progress=True)).events
        assert events[:4] == [": keep-alive", progress, TOKEN_A, TOKEN_B]
        assert (await pi.complete(progress=True)).json["completion"] == "ab"


TRICKLE = list[Any]()
for byte in CHUNKED:
    TRICKLE += [bytes([byte]), lambda: asyncio.sleep(0.02)]
LATE = [
    ([b"HTTP/1.1 200 OK\r\n", HANG], "did not answer in time"),
    ([head(503, "Content-Length: 9"), b"{", HANG], "it answered 503"),
    (TRICKLE, "did not answer in time"),
]


@pytest.mark.parametrize(("script", "part"), LATE)
async def test_a_head_must_come_before_the_deadline(script, part, monkeypatch):
    monkeypatch.setattr(native, "BEGIN_SECONDS", 0.15)
    async with pi_with(script) as (pi, backend):
        check_error(await pi.stream(), 503, UNAVAILABLE, part)
        await backend.left.wait()  # the connection is gone: a late answer has nowhere to go


async def test_a_stall_ends_at_the_idle_deadline(monkeypatch):
    monkeypatch.setattr(native.Vpsd, "idle_seconds", 0.4)
    async with pi_with([CHUNKED, A, B[:9], HANG]) as (pi, backend):
        first, last = (await pi.stream()).events
        assert (first, "it stopped in the middle" in last["message"]) == (TOKEN_A, True)
        await backend.left.wait()


IDLE, MOST = upstream.IDLE_SECONDS, upstream.STREAM_SECONDS
# When the current read began to wait, when that is looked at, and when it is looked at again; None:
# it is cut.
WAITS = [
    (math.inf, 10 * IDLE, IDLE),  # nobody is reading
    (10 * IDLE, 10.9 * IDLE, 0.1 * IDLE),
    (10 * IDLE, 11 * IDLE, None),
    (MOST - 2, MOST - 1, 1.0),  # a comment now and then keeps a slow stream alive
    (math.inf, MOST, None),
]


@pytest.mark.parametrize(("since", "now", "again"), WAITS)
def test_a_vps_is_cut_if_it_is_silent_or_never_ends(since, now, again, monkeypatch):
    loop = Mock(time=lambda: 0.0)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    reader = upstream.Reader()
    reader.transport, reader._since = Mock(), since
    reader.watch(IDLE)
    _, check, *arguments = loop.call_later.call_args.args
    loop.time = lambda: now
    check(*arguments)
    assert loop.call_later.call_args.args[0] == pytest.approx(again or IDLE)
    assert reader.end == ("" if again else EXPIRED)
    assert reader.transport.abort.called == (again is None)


async def test_a_collected_answer_without_end_is_cut():
    async with pi_with([CHUNKED, Flood(A * 1000)]) as (pi, backend):
        check_error(await pi.complete(), 503, UNAVAILABLE, "its completion is too long")
        await backend.left.wait()
        assert failures_at(pi) == 1


async def test_a_client_that_reads_nothing_pauses_reading_from_the_vps(monkeypatch):
    monkeypatch.setattr(pi_backend, "MAX_TEXT_BYTES", math.inf)
    async with pi_with([CHUNKED, Flood(A * 1000)]) as (pi, backend):
        _, writer = await pi.open("POST", "/v1/complete/stream", FIELDS)
        with contextlib.suppress(TimeoutError):  # in a second it could send a hundred times as much
            await until(lambda: backend.sent > 24 << 20, seconds=1.0)
        assert 0 < backend.sent < 24 << 20
        writer.transport.abort()
        await backend.left.wait()
        await until(lambda: pi.active == 0)


# --------------------------------------------------------------------------------------------- pure


def test_an_event_is_too_long_or_not_however_it_is_split():
    longest = b"data: " + b"x" * (MAX_EVENT_BYTES - 6)
    for line_ends, step in itertools.product((b"\n\n", b"\r\n\r\n"), (65_536, 65_537, 60_001)):
        for more in (b"", b"x"):
            whole = longest + more
            begun, events = len(whole) - 10, Events()
            pieces = [whole[at : min(at + step, begun)] for at in range(0, begun, step)]
            pieces += [bytes([byte]) for byte in whole[begun:] + line_ends + b": next\n\n"]
            fault = pytest.raises(BackendFailure, match="262144 bytes")
            with fault if more else contextlib.nullcontext():
                assert b"".join(map(events.feed, pieces)) == whole + b"\n\n: next\n\n"


# What a backend lists, and what is known then.
ENTRIES = json.loads("""[
    1, null, {"id": []}, {"id": "a", "n_ctx": "x"}, {"id": "b", "n_ctx": 8},
    {"id": "c", "available": false},
    {"id": "d", "loaded": "yes", "encoding": "", "memory_mb": -1, "path": "/x", "last_used": 1},
    {"id": "e", "loaded": true, "encoding": "Q8_0", "memory_mb": 980.5}]""")
KNOWN = json.loads("""{
    "a": {}, "b": {"n_ctx": 8}, "d": {},
    "e": {"loaded": true, "encoding": "Q8_0", "memory_mb": 980.5}}""")


def test_json_of_a_list_of_models_that_lies():
    assert read_models({"models": ENTRIES}) == KNOWN
    assert read_models({"models": "no"}) == {}


@pytest.mark.parametrize("late", [False, True])
async def test_an_answer_that_is_cut_is_not_asked_for_again(late):
    """Nor is one whose spare connection had ended, and whose request goes out again at this
    moment.
    """
    first, second = BackendReader(), BackendReader()
    first.transport = second.transport = Mock()
    first.end = ENDED

    async def again():
        assert late
        answer.cut()
        return second

    answer = Answer(first, again)
    if not late:
        answer.cut()
    with pytest.raises(BackendFailure):
        await answer.read_head("text/event-stream")
    assert second.end == (EXPIRED if late else "")
