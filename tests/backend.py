"""A scripted VPS for tests: it tells the truth about its health and models, and answers a completion by its script.

As vpsd does, it ends a completion when a newer one of the same session comes: with 409 SUPERSEDED, or with an error
event once the answer has begun.

A script is a list of steps: bytes to send, `RESET`, `HANG` (until the other side leaves), `Flood`, or a callable
(for example an asyncio.Event's `wait`) that is awaited. After the last step the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cerebrum_code import LANGUAGES
from cerebrum_common import Access, ChunkedDecoder, Server, load_models, own_names
from cm4d import ROUTES, Config, Gateway, parse_vps_url

ROOT = Path(__file__).resolve().parent.parent
KEY = "the-key-of-the-vps"
RESET, HANG = "reset", "hang"


@dataclass(frozen=True)
class Flood:
    """Sends `piece` again and again, until the other side leaves or `count` is reached."""

    piece: bytes
    count: int = 1 << 30


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def token(text: str, n: int) -> bytes:
    return event(token=text, total_tokens=n)


def head(status: int = 200, *more: str, kind: str = "text/event-stream") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Type: {kind}", *more, "", ""]).encode()


CHUNKED = head(200, "Transfer-Encoding: chunked")
DONE = event(done=True, model="qwen_0_5b", total_tokens=2, inference_time=0.25, finish_reason="stop", prompt_tokens=5)
GOOD = (CHUNKED, chunk(token("a", 1)), chunk(token("b", 2)), chunk(DONE), b"0\r\n\r\n")


def answer(status: int, members: Any) -> bytes:
    """A whole JSON answer."""
    body = json.dumps(members).encode()
    return head(status, f"Content-Length: {len(body)}", kind="application/json") + body


def error(status: int, code: str, message: str = "says the VPS", **more: Any) -> bytes:
    return answer(status, {"error": True, "message": message, "code": code, "timestamp": "2025-12-25", **more})


SUPERSEDED: dict[str, Any] = {"error": True, "message": "a newer request of this session came", "code": "SUPERSEDED"}
MODELS: dict[str, Any] = {"models": [{"id": "qwen_0_5b", "loaded": True, "path": "/x", "n_ctx": 4096}]}
HEALTH: dict[str, Any] = {"status": "healthy", "models_loaded": []}


@dataclass
class Backend:
    """`scripts` are used one after another, the last one for ever. `asked` is each request as (line, headers, body)."""

    scripts: Sequence[Sequence[Any]] = (GOOD,)
    health: bytes = answer(200, HEALTH)
    models: bytes = answer(200, MODELS)
    split: bool = False  # send byte by byte
    port: int = 0
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    sent: int = 0  # bytes of completions
    running: int = 0  # completions that are being answered
    most_running: int = 0
    left: asyncio.Event = field(default_factory=asyncio.Event)  # a completion's connection has ended
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # a completion has been asked for

    @property
    def completions(self) -> list[dict[str, Any]]:
        return [json.loads(body) for line, _, body in self.asked if line.startswith("POST /v1/inference/stream ")]

    def paths(self) -> list[str]:
        return [line.split(" ")[1] for line, _, _ in self.asked]

    async def __aenter__(self) -> Backend:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sessions: dict[str, asyncio.Task[None]] = {}  # the newest completion of each
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._answer(reader, writer)
        writer.transport.abort() if task.cancelled() else writer.close()
        self._tasks.discard(task)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.asked.append((first, headers, body))
        if " /health " in first or " /v1/models " in first:
            writer.write(self.health if " /health " in first else self.models)
            return
        script = self.scripts[min(len(self.completions), len(self.scripts)) - 1]
        self.begun.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._play(script, str(json.loads(body).get("session", "")), reader, writer)
        finally:
            self.running -= 1
            self.left.set()

    async def _play(
        self, script: Sequence[Any], session: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        playing, begun = asyncio.current_task(), False
        assert playing is not None
        if session:
            if older := self._sessions.get(session):
                older.cancel("superseded")
            self._sessions[session] = playing
        try:
            for step in script:
                begun = begun or isinstance(step, bytes)
                await self._step(step, reader, writer)
        except asyncio.CancelledError as cancelled:
            if cancelled.args != ("superseded",):
                raise
            told = chunk(event(**SUPERSEDED)) if begun else error(409, "SUPERSEDED", SUPERSEDED["message"])
            writer.write(told)
        finally:
            if self._sessions.get(session) is playing:
                del self._sessions[session]

    async def _step(self, step: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if step is RESET:
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        elif step is HANG:
            await reader.read()
        elif callable(step):
            await step()
        else:
            if isinstance(step, Flood):
                pieces: Iterable[bytes] = itertools.repeat(step.piece, step.count)
            else:
                pieces = [step[i : i + 1] for i in range(len(step))] if self.split else [step]
            await self._write(pieces, writer)

    async def _write(self, pieces: Iterable[bytes], writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            if writer.transport.is_closing():
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
            self.sent += len(piece)
            if self.split:
                await asyncio.sleep(0)  # let the other side read


@dataclass
class Reply:
    """What a client of the Pi got. `clean`: the body ended as its framing says."""

    status: int
    headers: dict[str, str]
    body: bytes
    clean: bool

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """Each event's JSON; a comment as its text."""
        parts = self.body.split(b"\n\n")
        assert parts.pop() == b"", "half an event"
        return [json.loads(part[6:]) if part.startswith(b"data: ") else part.decode() for part in parts]


@dataclass
class Pi:
    """A gateway and its server, in this process."""

    gateway: Gateway
    server: Server
    port: int
    address: str = "127.0.0.1"  # that its client asks from

    def from_address(self, address: str) -> Pi:
        """The same Pi, asked by another client."""
        return Pi(self.gateway, self.server, self.port, address)

    async def open(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[Any, Any]:
        local = (self.address, 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 16, local_addr=local)
        payload = b"" if body is None else json.dumps(body).encode()
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + payload)
        return reader, writer

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        reader, writer = await self.open(method, path, body, **headers)
        try:
            return parse_reply(await reader.read())
        finally:
            writer.transport.abort()

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.ask("GET", path, **headers)

    async def stream(self, **more: Any) -> Reply:
        return await self.ask("POST", "/v1/complete/stream", {"prompt": "x =", "language": "python", **more})

    async def complete(self, **more: Any) -> Reply:
        return await self.ask("POST", "/v1/complete", {"prompt": "x =", "language": "python", **more})


def parse_reply(raw: bytes) -> Reply:
    top, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = top.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        decoder = ChunkedDecoder()
        body = decoder.feed(body)
        clean = decoder.done
    else:
        clean = len(body) == int(headers.get("content-length", "0"))
    return Reply(int(first.split(" ")[1]), headers, body, clean)


@contextlib.asynccontextmanager
async def pi_for(port: int, *, probing: bool = True, **config: Any) -> AsyncIterator[Pi]:
    """A Pi whose VPS is on `port`. With `probing` the first probe has ended."""
    models = load_models(ROOT / "models.toml", LANGUAGES)
    settings = {"key": KEY, "models": models, "vps": parse_vps_url(f"http://127.0.0.1:{port}"), **config}
    gateway = Gateway(Config(**settings))
    server = Server(gateway, ROUTES, Access(gateway.config.client_key, own_names(), frozenset()))
    task = asyncio.create_task(gateway.probe_forever()) if probing else None
    pi = Pi(gateway, server, await server.start("127.0.0.1", 0))
    try:
        if probing:
            await until(lambda: gateway.probes > 0)
        yield pi
    finally:
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await server.stop(0)
    assert gateway.requests_active == 0, "a slot was not given back"


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait until `condition()` holds, or fail."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)  # what is waited for has no event of its own
