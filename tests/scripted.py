"""A scripted server, and a Pi in this process that takes it for its VPS.

`Backend` is the VPS for the tests of cm4d, and the Pi for those of the REPL: the paths that both
ask are the same. It answers a GET by its state, and a completion by a script: a list of steps, each
of them bytes to send, `RESET`, `HANG` (until the other side leaves), `Flood`, or a callable (for
example an asyncio.Event's `wait`), whose result is awaited if it is awaitable. After the last step
the connection is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import itertools
import json
import socket
import ssl
import struct
import threading
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from harness import KEY, PATIENCE, SHIPPED, Client, Reply, until

from cerebrum.http import Server
from cerebrum.pi.completion import Attempt, Completion
from cerebrum.pi.upstream import BackendConfig, Endpoint, parse_url
from cm4d import ROUTES, Config, Gateway

RESET, HANG = "reset", "hang"


Flood = itertools.repeat  # of a piece: it is sent until the other side leaves


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection by a TCP reset."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def token(text: str, n: int) -> bytes:
    return event(token=text, total_tokens=n)


def head(status: int = 200, *more: str, kind: str = "text/event-stream") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Type: {kind}", *more, "", ""]).encode()


CHUNKED = head(200, "Transfer-Encoding: chunked")
END = json.loads("""{
    "done": true, "model": "qwen_0_5b", "total_tokens": 2, "inference_time": 0.25,
    "finish_reason": "stop", "prompt_tokens": 5}""")
DONE = event(**END)
GOOD = (CHUNKED, chunk(token("a", 1)), chunk(token("b", 2)), chunk(DONE), b"0\r\n\r\n")


def script(*pieces: Any, **done: Any) -> list[Any]:
    """A script of these tokens. A piece that is no string is a step of its own, such as a gate."""
    steps = [CHUNKED]
    count = 0
    for piece in pieces:
        if isinstance(piece, str):
            count += 1
            piece = chunk(token(piece, count))
        steps.append(piece)
    end = {"done": True, "total_tokens": count, "inference_time": 0.25, "finish_reason": "stop"}
    return [*steps, chunk(event(**{**end, **done})), b"0\r\n\r\n"]


def gated(gate: asyncio.Event) -> list[Any]:
    """GOOD, but for its head not before the gate opens."""
    return [CHUNKED, gate.wait, *GOOD[1:]]


def answer(status: int, members: Any) -> bytes:
    """A whole JSON response."""
    body = json.dumps(members).encode()
    return head(status, f"Content-Length: {len(body)}", kind="application/json") + body


def error(status: int, code: str, message: str = "says the VPS", **more: Any) -> bytes:
    members = {"error": True, "message": message, "code": code, "timestamp": "2025-12-25"}
    return answer(status, members | more)


MODELS = json.loads("""{
    "models": [{"id": "qwen_0_5b", "loaded": true, "path": "/x", "n_ctx": 4096}]}""")
HEALTH = json.loads('{"status": "healthy", "models_loaded": [], "version": "1.0.9"}')


@dataclass
class Backend:
    """The n-th completion gets the n-th script, and all further ones the last. A GET gets the field
    that is named like the last part of its path.

    `asked` has the request line, the headers and the body of each request.
    """

    scripts: Sequence[Sequence[Any]] = (GOOD,)
    health: bytes = answer(200, HEALTH)
    models: bytes = answer(200, MODELS)
    stats: bytes = answer(200, {})
    props: bytes = answer(404, {})  # of llama-server
    tokens: bytes = b""  # the answer to /v1/tokenize; without one, a script answers it
    split: bool = False  # send byte by byte
    tls: ssl.SSLContext | None = None
    port: int = 0
    asked: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    sent: int = 0  # bytes of completions
    running: int = 0  # completions that are being answered
    most_running: int = 0
    begun: asyncio.Event = field(default_factory=asyncio.Event)  # a completion was asked for
    # The connection of a completion has ended.
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The fields of each completion."""
        return [json.loads(body) for line, _, body in self.asked if line.startswith("POST ")]

    async def __aenter__(self) -> Self:
        self._tasks = set[asyncio.Task[Any]]()
        self.waiting = set[asyncio.StreamWriter]()  # connections on which nothing was asked yet
        self.connections = 0
        place = ("127.0.0.1", self.port)
        self._server = await asyncio.start_server(self._accept, *place, ssl=self.tls)
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
        first, body = await self._read(reader, writer)
        method, path, _ = first.split(" ")
        if method == "GET":
            writer.write(getattr(self, path.rpartition("/")[2]))
            return
        if path == "/v1/tokenize" and self.tokens:
            writer.write(self.tokens)
            return
        script = self.script(path, body)
        self.begun.set()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for step in script:
                await self._step(step, reader, writer)
        finally:
            self.running -= 1
            self.left.set()

    async def _read(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[str, bytes]:
        """Read a request into `asked`; return its first line and its body."""
        self.connections += 1
        self.waiting.add(writer)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        finally:
            self.waiting.discard(writer)
        first, *lines = head.decode().split("\r\n")[:-2]
        headers = dict[str, str]()
        for line in lines:
            name, value = line.split(": ", 1)
            headers[name.lower()] = value
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.asked.append((first, headers, body))
        return first, body

    def script(self, path: str, body: bytes) -> Iterable[Any]:
        """The steps that answer the completion that came last."""
        number = sum(line.startswith("POST ") for line, _, _ in self.asked)
        return self.scripts[min(number, len(self.scripts)) - 1]

    async def _step(
        self, step: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if step is RESET:
            reset(writer)
        elif step is HANG:
            with contextlib.suppress(ConnectionResetError):
                await reader.read()
        elif callable(step):
            result = step()
            if inspect.isawaitable(result):
                await result
        else:
            await self._send(step, writer)

    async def _send(
        self, step: bytes | itertools.repeat[bytes], writer: asyncio.StreamWriter
    ) -> None:
        pieces: Iterable[bytes] = step if isinstance(step, Flood) else [step]
        if self.split and isinstance(step, bytes):
            pieces = [step[i : i + 1] for i in range(len(step))]
        for piece in pieces:
            if writer.transport.is_closing():
                raise ConnectionResetError
            writer.write(piece)
            await writer.drain()
            self.sent += len(piece)
            if self.split:
                await asyncio.sleep(0)  # let the other side read


T = TypeVar("T")


@contextlib.contextmanager
def in_a_thread(server: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
    """A server for tests that block: its event loop runs in a thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)

    def call(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(PATIENCE)

    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        thread.start()
        stack.callback(thread.join, PATIENCE)
        stack.callback(loop.call_soon_threadsafe, loop.stop)
        entered = call(server.__aenter__())
        stack.callback(lambda: call(server.__aexit__(None, None, None)))
        yield entered


@dataclass(kw_only=True)
class Pi(Client):
    """A gateway and its server in this process, and a client that asks it."""

    gateway: Gateway
    server: Server

    @property
    def probes(self) -> int:
        """Completed probes of the backend that has the fewest."""
        return int(min(backend.probes for backend in self.backends))

    @property
    def backends(self) -> Any:
        return self.gateway.fleet.backends

    @property
    def first(self) -> Any:
        """The only backend, or the first of several."""
        return self.backends[0]

    @property
    def readers(self) -> list[Any]:
        """Those who read a completion that others may read, too."""
        return self.gateway.broadcasts.subscribers

    def at(self, backend: int) -> list[Attempt]:
        """The attempts that hold a place at the backend with this number."""
        asked = self.backends[backend]
        places = self.gateway.dispatcher.state.places
        return [attempt for attempt, holder in places.items() if holder is asked]

    @property
    def active(self) -> int:
        """Completions that hold a place."""
        return self.gateway.dispatcher.active

    @property
    def line(self) -> dict[Completion, Any]:
        """Completions that wait for a place."""
        return self.gateway.dispatcher.state.line

    def reads_ahead(self, backend: int = 0) -> bool:
        return any(attempt.request.ahead for attempt in self.at(backend))

    def from_address(self, address: str) -> Pi:
        """The same Pi, asked by another client."""
        return dataclasses.replace(self, address=address)


def backend_at(
    port: int, id: str = "vps", origin: str = "http://127.0.0.1", **more: Any
) -> BackendConfig:
    """The configuration of a backend, by default of one on this machine."""
    return config_of(id, parse_url(f"{origin}:{port}", "url"), **{"key": KEY, **more})


def config_of(id: str, endpoint: Endpoint, **more: Any) -> BackendConfig:
    """The configuration of a backend whose table has only these members."""
    usual: dict[str, Any] = {"api": "cerebrum", "max_concurrent": 2, "n_ctx": 0, "infill": "fim"}
    usual |= dict.fromkeys(("key", "key_env", "ca_file", "affinity_header"), "")
    return BackendConfig(id, endpoint, **usual | more)


# Settings as cm4d reads them from an empty environment.
USUAL: dict[str, Any] = {
    "models": SHIPPED,
    "prefer": {},
    "host": "0.0.0.0",
    "port": 7000,
    "client_keys": (),
    "clients": None,
    "hosts": frozenset(),
    "origins": frozenset(),
    "log_level": "INFO",
    "log_file": "",
    "log_prompts": False,
    "tls": None,
    "state_dir": Path("/dev/null"),
}


@contextlib.asynccontextmanager
async def pi_for(
    *backends: int | BackendConfig, probing: bool = True, max_concurrent: int = 2, **config: Any
) -> AsyncIterator[Pi]:
    """A Pi with these backends; a port alone is that of a VPS. With `probing` each has been probed
    once.
    """
    own: dict[str, Any] = {"max_concurrent": max_concurrent, "key_env": "CEREBRUM_API_KEY"}
    configs = [
        backend_at(backend, **own) if isinstance(backend, int) else backend for backend in backends
    ]
    gateway = Gateway(Config(**{"backends": tuple(configs), **USUAL, **config}))
    server = Server(gateway, ROUTES, gateway.config.access)
    probes = gateway.fleet.probe_forever(gateway.probed) if probing else asyncio.sleep(0)
    task = asyncio.create_task(probes)
    pi = Pi(gateway=gateway, server=server, port=await server.start("127.0.0.1", 0))
    try:
        if probing:
            await until(lambda: pi.probes > 0)
        yield pi
    finally:
        task.cancel()
        await asyncio.wait([task])
        await server.stop(0)
        for backend in pi.backends:
            backend.kind.client.close()
    assert gateway.dispatcher.active == 0, "a slot was not given back"


@contextlib.asynccontextmanager
async def pi_with(*scripts: Sequence[Any], **config: Any) -> AsyncIterator[tuple[Pi, Backend]]:
    """A Pi, and its only VPS, which plays these scripts."""
    async with Backend(scripts or (GOOD,)) as backend, pi_for(backend.port, **config) as pi:
        yield pi, backend


async def statuses(*asked: Awaitable[Reply]) -> list[int]:
    """The statuses of these answers, once all have come."""
    return [reply.status for reply in await asyncio.gather(*asked)]
