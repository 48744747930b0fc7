"""For the tests of the wire: a raw client that reads answers strictly, and the daemons as processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
KEY = "the-key-of-the-tests"
PATIENCE = 20.0  # a test that waits longer has found a hang
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [A-Za-z ]+")


@dataclass(frozen=True)
class Reply:
    """One answer; `interim` counts the 100s before it, `whole` is False if its body was cut."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    interim: int = 0
    whole: bool = True

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def one(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    def json(self) -> Any:
        return json.loads(self.body)


async def read_reply(reader: asyncio.StreamReader, method: str = "GET") -> Reply:
    """The next answer, whatever its framing; asyncio.IncompleteReadError if there is none."""
    interim = 0
    while True:
        first, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        match = STATUS.fullmatch(first)
        assert match, first
        if match[1] != b"100":
            break
        assert not lines, lines
        interim += 1
    headers: list[tuple[str, str]] = []
    for line in lines:
        name, colon, value = line.decode("latin-1").partition(": ")
        assert colon, line
        assert value, line
        assert value == value.strip(), line
        headers.append((name, value))
    reply = Reply(int(match[1]), headers, b"", interim)
    if method == "HEAD" or reply.status == 204:
        return reply
    if reply.all("Transfer-Encoding"):
        assert reply.one("Transfer-Encoding") == "chunked"
        assert not reply.all("Content-Length")
        body, whole = await _read_chunks(reader)
    elif reply.all("Content-Length"):
        body, whole = await reader.readexactly(int(reply.one("Content-Length"))), True
    else:
        body, whole = await reader.read(), True
    return Reply(reply.status, headers, body, interim, whole)


async def _read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    body = b""
    try:
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
        assert await reader.readexactly(2) == b"\r\n"
    except asyncio.IncompleteReadError:
        return body, False
    return body, True


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        async with asyncio.timeout(PATIENCE):
            yield reader, writer
    finally:
        writer.transport.abort()


async def ask(port: int, raw: bytes, method: str = "GET") -> Reply:
    """One request on a connection of its own."""
    async with connect(port) as (reader, writer):
        writer.write(raw)
        return await read_reply(reader, method)


async def wait_for_health(port: int) -> None:
    """Until the Pi has found its VPS."""
    async with asyncio.timeout(PATIENCE):
        while (await ask(port, HEALTH)).status != 200:
            pass


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"X-API-Key: {KEY}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", *headers, "", ""]).encode() + body


@dataclass
class Daemon:
    """A daemon as a process, on a port of the kernel's choice, with `key` and no models and no VPS."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    output: Path
    log: list[str] = field(default_factory=list)

    def rss_kb(self) -> int:
        return self._memory("VmRSS:")

    def peak_rss_kb(self) -> int:
        return self._memory("VmHWM:")

    def _memory(self, line: str) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(line)[1].split()[0])

    def stdout(self) -> str:
        return (self.output / "stdout").read_text()

    def stderr(self) -> str:
        return (self.output / "stderr").read_text()

    def complaints(self) -> str:
        """What only a fault of ours would have printed."""
        bad = [line for line in self.stdout().splitlines() if " - ERROR - " in line or "Traceback" in line]
        return "\n".join(bad) + self.stderr()


@contextlib.contextmanager
def daemon(name: str, output: Path, python: str = sys.executable, **more: str) -> Iterator[Daemon]:
    """Start `name` (cm4d or vpsd), wait until it listens, and in the end see it stop cleanly on SIGTERM."""
    (output / "models").mkdir(parents=True, exist_ok=True)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(output),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CEREBRUM_API_KEY": KEY,
        "CEREBRUM_CM4_API_KEY": KEY,
        "CEREBRUM_CM4_HOST": "127.0.0.1",
        "CEREBRUM_VPS_HOST": "127.0.0.1",
        "CEREBRUM_CM4_PORT": "0",
        "CEREBRUM_VPS_PORT": "0",
        "CEREBRUM_VPS_URL": "http://127.0.0.1:1",  # nobody listens on port 1
        "CEREBRUM_MODELS_DIR": str(output / "models"),
        "CEREBRUM_STATE_DIR": str(output / "state"),
        "CEREBRUM_LOG_LEVEL": "INFO",
        **more,
    }
    # Without site-packages, as on the Pi. llama_cpp itself leaves a file open, which Python would tell for vpsd.
    options = ["-s", "-S", "-W", "always::ResourceWarning"] if name == "cm4d" else []
    command = [python, "-u", *options, str(ROOT / f"{name}.py")]
    with (output / "stdout").open("wb") as stdout, (output / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, env=environment, cwd=output)
        try:
            assert process.stdout is not None
            port = _wait_for_port(process.stdout, stdout)
            pump = subprocess.Popen(["cat"], stdin=process.stdout, stdout=stdout)
            process.stdout.close()
            yield Daemon(name, port, process, output)
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            pump.wait(PATIENCE)
        finally:
            process.kill()
            process.wait()


def _wait_for_port(pipe: IO[bytes], copy: IO[bytes]) -> int:
    for line in pipe:
        copy.write(line)
        copy.flush()
        if match := re.search(rb"listening on http://[^ ]*:([0-9]+)", line):
            return int(match[1])
    raise AssertionError("the daemon ended before it listened")
