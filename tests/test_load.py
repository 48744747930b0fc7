"""Time and load: deadlines, limits and the ends of connections, with small deadlines.

Nothing here sleeps to wait for something: it waits for the other side's bytes, for an event or for
the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from harness import HEALTH, PATIENCE, ask, connect, daemon, read_reply, until
from scripted import reset
from test_wire import BODY, chunked, connected, get, serving, sized, without
from test_wire import _quiet as _quiet  # a fixture of every test

from cerebrum import http as cerebrum_http
from cerebrum_common import Request, Response, Route

SOON = 0.05


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our lines in the log, but for the server's first."""
    texts = [record.getMessage() for record in caplog.records if record.name == "cerebrum"]
    return [text for text in texts if not text.startswith("listening on ")]


async def ends(reader: asyncio.StreamReader) -> None:
    """The connection ends, or was reset, without a further byte."""
    with contextlib.suppress(ConnectionError):
        assert await reader.read() == b""


# ---------------------------------------------------------------------------------------- deadlines


EXPECTING = sized(BODY, "Expect: 100-continue")[: -len(BODY)]


@pytest.mark.parametrize("begun", [b"\r\n", get()[:-1], sized(BODY)[:-1], EXPECTING])
async def test_a_slow_request(patch, begun):
    for name in ("BODY_SECONDS" if b"POST" in begun else "REQUEST_HEAD_SECONDS", "LINGER_SECONDS"):
        patch(cerebrum_http, name, SOON)
    async with connected() as (server, reader, writer):
        writer.write(begun.replace(b"@POST", b"/v1/complete"))
        reply = await read_reply(reader)
        assert (reply.status, reply.json["code"]) == (408, "TIMEOUT")
        assert await reader.read() == b""
        assert server.state.calls == []
        await until(lambda: not server.connections)  # it does not linger for ever


async def test_a_head_at_one_byte_a_time_ends_at_a_total_deadline(patch):
    patch(cerebrum_http, "REQUEST_HEAD_SECONDS", 0.2)
    async with connected() as (_, reader, writer):
        started = time.monotonic()
        answer = asyncio.create_task(read_reply(reader))
        writer.write(b"GET /health HTTP/1.1\r\nA: ")
        while not answer.done():  # never silent for longer than a tenth of the deadline
            writer.write(b"a")
            await asyncio.wait({answer}, timeout=0.02)
        assert answer.result().status == 408
        assert time.monotonic() - started >= 0.2


async def test_silence_closes_silently(patch, caplog):
    patch(cerebrum_http, "IDLE_SECONDS", SOON)
    patch(cerebrum_http, "REQUEST_HEAD_SECONDS", 2 * PATIENCE)
    async with serving() as (_, port):
        for answers in (0, 2):
            async with connect(port) as (reader, writer):
                writer.write(HEALTH * answers)
                for _ in range(answers):
                    assert (await read_reply(reader)).status == 200
                assert await reader.read() == b""
    assert messages(caplog) == []  # /health is quiet


async def test_the_end_lingers_for_an_unread_body():
    """A client that sends all of a refused body before it reads still gets the answer, not a
    reset.
    """
    raw = without(sized(b"x" * (6 << 20)), "X-API-Key").replace(b"@POST", b"/v1/complete")

    def client(port):
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as peer:
            peer.sendall(raw)
            return b"".join(iter(lambda: peer.recv(65_536), b""))

    async with serving(keys=()) as (_, port):
        assert b" 413 " in await asyncio.to_thread(client, port)


# ------------------------------------------------------------------------------------- slow readers


Handle = Callable[[Any, Request], Awaitable[Response]]


def add_route(server, path: str, answer: Response | Handle) -> bytes:
    """Let the server answer a POST to this path; returns such a request."""

    async def handle(state, request: Request) -> Response:
        return answer if isinstance(answer, Response) else await answer(state, request)

    server.routes[path] = {"POST": Route("POST", path, handle, json=True)}
    return sized(BODY).replace(b"@POST", path.encode())


@contextlib.contextmanager
def slow_reader(port: int, raw: bytes) -> Iterator[socket.socket]:
    """A client that has sent a request, with a small buffer for the answer."""
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", port))
        peer.sendall(raw)
        yield peer


async def test_a_client_that_does_not_read_is_cut(patch, caplog):
    """Its stream pauses with bounded memory, and ends after a while without a reader."""
    patch(cerebrum_http, "WRITE_SECONDS", 0.3)
    taken, ended = 0, asyncio.Event()

    async def endless():
        nonlocal taken
        try:
            while True:
                taken += 1
                yield b": " + b"x" * 8190 + b"\n\n"
        finally:
            ended.set()

    async with serving() as (server, port):
        with slow_reader(port, add_route(server, "/endless", Response(events=endless()))):
            await asyncio.wait_for(ended.wait(), PATIENCE)
            assert taken * 8192 < 8 << 20  # the kernel's buffers and 64 KiB
            await until(lambda: not server.connections)
    (line,) = messages(caplog)
    assert line.startswith("POST /endless 499 ")


async def test_a_whole_answer_that_nobody_reads_is_cut(patch):
    """An answer that fits the buffer is not kept for ever either."""
    for name in ("WRITE_SECONDS", "IDLE_SECONDS"):
        patch(cerebrum_http, name, SOON)
    async with serving() as (server, port):
        with slow_reader(port, add_route(server, "/big", Response({"x": "y" * (5 << 20)}))):
            await until(lambda: server.connections)
            (connection,) = server.connections.values()
            await until(lambda: not server.connections)
            await until(lambda: connection.transport.get_extra_info("socket").fileno() < 0)


async def test_the_end_waits_for_a_slow_reader(patch):
    """An answer that fits the buffer is not lost when the connection is closed behind it."""
    patch(cerebrum_http, "LINGER_SECONDS", 0.01)
    async with serving() as (server, port):

        async def answer(state, request):
            (connection,) = server.connections.values()
            peer = connection.transport.get_extra_info("socket")
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
            return Response({"x": "y" * 60_000})

        raw = add_route(server, "/late", answer)
        closing = raw.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        with slow_reader(port, closing) as peer:
            await until(lambda: server.connections)
            with contextlib.suppress(TimeoutError):  # twenty times as long as it lingers
                await until(lambda: not server.connections, seconds=0.2)
            whole = await asyncio.to_thread(lambda: b"".join(iter(lambda: peer.recv(65_536), b"")))
        assert len(whole.partition(b"\r\n\r\n")[2]) == 60_009


async def test_a_client_that_resets_beside_the_first_event_leaves_nothing_taken():
    """What a handler takes and its events release is released even if not one byte can be sent."""
    released = asyncio.Event()

    async def events():
        try:
            yield b": a\n\n"
        finally:
            released.set()

    async with connected() as (server, reader, writer):

        async def handle(_state, _request):
            for connection in server.connections.values():
                connection.transport.abort()  # like a reset while the handler runs
            return Response(events=events())

        writer.write(add_route(server, "/held", handle))
        await ends(reader)
        await asyncio.wait_for(released.wait(), PATIENCE)


async def test_a_pipelined_flood_is_answered_in_order_and_fairly():
    async with serving() as (_, port), connect(port) as (reader, writer):
        answered, sent = [], [f"n{number}" for number in range(1000)]

        async def flood():
            while len(answered) < len(sent):
                answered.append((await read_reply(reader)).one("X-Request-ID"))

        task = asyncio.create_task(flood())
        writer.write(b"".join(get("/health", f"X-Request-ID: {name}") for name in sent))
        await until(lambda: answered)
        assert (await ask(port, HEALTH)).status == 200
        # The second client did not wait for the first one's last answer.
        assert len(answered) < len(sent)
        await task
        assert answered == sent


# ------------------------------------------------------------------------------ who goes, who stays


class Slow:
    """A handler that runs until it is released or cancelled."""

    def __init__(self) -> None:
        self.begun, self.release = asyncio.Event(), asyncio.Event()
        self.cancelled = asyncio.Event()

    async def handle(self, state, request: Request) -> Response:
        self.begun.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return Response({"done": True})


SLOW = sized(BODY).replace(b"@POST", b"/slow")


@contextlib.asynccontextmanager
async def slow_server() -> AsyncIterator[tuple[Any, int, Slow, Any]]:
    """A server, its port, the handler of SLOW, and a function that opens so many connections."""
    slow = Slow()

    async def peers(count: int) -> list[Any]:
        return [await stack.enter_async_context(connect(port)) for _ in range(count)]

    async with serving() as (server, port), contextlib.AsyncExitStack() as stack:
        add_route(server, "/slow", slow.handle)
        yield server, port, slow, peers


@pytest.mark.parametrize("how", ["reset", "half-close"])
async def test_a_client_that_leaves_cancels_its_handler(how, caplog) -> None:
    async with slow_server() as (server, port, slow, _), connect(port) as (_, writer):
        writer.write(SLOW)
        await slow.begun.wait()
        if how == "half-close":
            writer.write_eof()
        else:
            reset(writer)
        await asyncio.wait_for(slow.cancelled.wait(), PATIENCE)
        await until(lambda: not server.connections)
    (line,) = messages(caplog)
    assert line.startswith("POST /slow 499 ")


async def test_pipelining_behind_a_running_handler_is_answered_and_bounded():
    most, read = cerebrum_http.MAX_PIPELINED_BYTES, cerebrum_http.READ_BYTES
    async with slow_server() as (server, port, slow, _), connect(port) as (reader, writer):
        writer.write(SLOW + get("/nothing") + b"\r\n")
        await slow.begun.wait()
        writer.write(HEALTH)
        assert server.bodies.total() == len(BODY)  # which counts until it is answered
        slow.release.set()
        assert [(await read_reply(reader)).status for _ in range(3)] == [200, 404, 200]
        assert not server.bodies
        slow.release.clear()
        slow.begun.clear()
        writer.write(SLOW)  # nothing was swallowed while the client was watched
        await slow.begun.wait()
        (connection,) = server.connections.values()
        writer.write(HEALTH * 100_000)
        await until(lambda: len(connection.buffer) >= most)
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(connection.buffer) <= most + read
        assert len(connection.reader._buffer) <= 2 * read + (256 << 10)  # one read of asyncio's
        slow.release.set()
        assert [(await read_reply(reader)).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize("finishes", [True, False])
async def test_a_stop_lets_a_request_finish_or_ends_it_with_an_error(finishes):
    refused = 503, "SHUTTING_DOWN", "close"

    async def outcome(reader):
        reply = await read_reply(reader)
        return reply.status, reply.json.get("code", ""), reply.one("Connection")

    async with slow_server() as (server, port, slow, peers):
        (reader, writer), (idle, idler) = await peers(2)
        idler.write(HEALTH)
        await read_reply(idle)
        writer.write(SLOW)
        await slow.begun.wait()
        stopping = asyncio.create_task(server.stop(PATIENCE if finishes else SOON))
        if finishes:
            await until(lambda: server.stopping)
            with pytest.raises(ConnectionRefusedError):
                await asyncio.open_connection("127.0.0.1", port)
            idler.write(HEALTH)
            assert await outcome(idle) == refused
            slow.release.set()
        assert await outcome(reader) == ((200, "", "close") if finishes else refused)
        assert slow.cancelled.is_set() != finishes
        for end in (reader, idle):
            await ends(end)
        writer.close()
        await stopping


# ------------------------------------------------------------------------------------------- limits


def upload(size: int, framing: str, key: bool = True) -> bytes:
    """A good completion request of `size` bytes."""
    body = BODY[:-1] + b', "a": "' + b"x" * (size - len(BODY) - 9) + b'"}'
    chunks = [cerebrum_http.chunk(body[at : at + 4000]) for at in range(0, len(body), 4000)]
    raw = sized(body) if framing == "length" else chunked(b"".join([*chunks, b"0\r\n\r\n"]))
    return (raw if key else without(raw, "X-API-Key")).replace(b"@POST", b"/v1/complete")


@pytest.mark.parametrize("begun", [b"", HEALTH, upload(1000, "length")[:-1]])
async def test_one_connection_too_many_closes_the_oldest_idle_one(begun, patch) -> None:
    patch(cerebrum_http, "MAX_CONNECTIONS", 3)
    async with slow_server() as (server, port, slow, peers):
        busy, silent, third = await peers(3)
        busy[1].write(SLOW)
        await slow.begun.wait()
        silent[1].write(begun)
        await until(lambda: len(server.connections) == 3)
        if begun == HEALTH:
            assert (await read_reply(silent[0])).status == 200
        assert (await ask(port, get("/v1/models"))).status == 200
        await ends(silent[0])
        slow.release.set()
        third[1].write(HEALTH)
        assert [(await read_reply(reader)).status for reader, _ in (busy, third)] == [200, 200]


@pytest.mark.parametrize("begun", [b"", SLOW])
async def test_the_address_with_most_connections_makes_room(begun, patch) -> None:
    patch(cerebrum_http, "MAX_CONNECTIONS", 4)
    async with slow_server() as (server, port, slow, peers):
        other, writer = await asyncio.open_connection(
            "127.0.0.1", port, local_addr=("127.0.0.2", 0)
        )
        opened = [(other, writer), *await peers(3)]
        for _, one in opened:
            one.write(begun)
        await until(lambda: len(server.connections) == 4)
        await until(
            lambda: not begun or all(one.exchange.task for one in server.connections.values())
        )
        assert (await ask(port, HEALTH)).status == 200
        await ends(opened[1][0])
        slow.release.set()
        for reader, one in [opened[0], *opened[2:]]:
            one.write(b"" if begun else HEALTH)
            assert (await read_reply(reader)).status == 200
        writer.transport.abort()


UNREAD = [("/v1/complete", False, 401), ("/x", True, 404), ("/v1/unload/x", True, 200)]


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize(("path", "key", "status"), UNREAD)
async def test_a_body_that_nobody_looks_at_is_not_kept(framing, path, key, status):
    raw = upload(1_000_000, framing, key).replace(b"/v1/complete", path.encode())
    async with connected() as (server, reader, writer):
        writer.write(raw[:-100])
        await writer.drain()
        await until(lambda: server.connections)
        (connection,) = server.connections.values()
        # Once the server waits for more, it has read all that was sent.
        await until(
            lambda: (
                connection.reader._waiter is not None  # type: ignore[attr-defined]
                and not writer.transport.get_write_buffer_size()
            )
        )
        assert len(connection.buffer) <= cerebrum_http.READ_BYTES
        assert server.bodies.total() == 0
        writer.write(raw[-100:] + HEALTH)
        assert [(await read_reply(reader)).status for _ in range(2)] == [status, 200]


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_the_bodies_of_all_connections_are_bounded(patch, framing):
    patch(cerebrum_http, "MAX_BODIES_BYTES", 250_000)
    raw = upload(100_000, framing)
    async with serving() as (server, port), connect(port) as (reader, writer):
        writer.write(raw[:-10])
        await until(lambda: server.bodies.total() > 95_000)
        reply = await ask(port, raw)
        assert (reply.status, reply.json["code"]) == (503, "OVERLOADED")
        assert reply.one("Connection") == "close"
        assert (await ask(port, HEALTH)).status == 200
        writer.write(raw[-10:])
        assert (await read_reply(reader)).status == 200
        await until(lambda: not server.bodies)
        assert (await ask(port, raw)).status == 200


async def test_a_refused_request_whose_client_leaves_is_logged_once(caplog):
    async with connected() as (server, reader, writer):
        writer.write(upload(5000, "length", key=False)[:-100])
        assert (await read_reply(reader)).status == 401
        writer.write_eof()
        assert await reader.read() == b""
        await until(lambda: not server.connections)
    (line,) = messages(caplog)
    assert line.startswith("POST /v1/complete 401 ")


# ------------------------------------------------------------------------- the daemons under attack


FLOODS = [("length", {503, 429, 404, 0}), ("chunks", {401})]


@pytest.mark.parametrize(("framing", "statuses"), FLOODS)
def test_a_flood_of_bodies_costs_a_fraction_of_their_size(tmp_path, framing, statuses):
    """200 connections send 1 MiB each, and /health answers in the middle. This Pi has two places
    and no VPS.
    """
    raw = upload(1_048_000, framing, key=401 not in statuses)

    async def attack(port):
        sent = asyncio.Barrier(201)

        async def one():
            async with connect(port) as (reader, writer):
                writer.write(raw[:-10])
                with contextlib.suppress(ConnectionError):  # it is cut after its refusal
                    await writer.drain()
                async with sent, sent:
                    writer.write(raw[-10:])
                try:
                    return (await read_reply(reader)).status
                except ConnectionError:
                    return 0

        attackers = [asyncio.create_task(one()) for _ in range(200)]
        async with sent:
            assert "status" in (await ask(port, HEALTH)).json
        async with sent:
            return set(await asyncio.gather(*attackers))

    with daemon("cm4d", tmp_path) as process:
        assert asyncio.run(attack(process.port)) <= statuses
        assert process.peak_rss_kb() < 110_000
        assert process.complaints() == ""
