"""What the tests and benchmarks share: waiting for a condition, asking over HTTP, and the daemons
as processes.

A test never sleeps for a fixed time. It waits for a condition (`until`, `wait_until`), for a line
of a daemon's log (`Daemon.wait_for_line`) or for bytes, and PATIENCE bounds each of these waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, f"{ROOT}")  # for the benchmarks and the fuzzer, which run without pytest

from cerebrum.settings import load_catalog  # noqa: E402
from cerebrum.text.languages import LANGUAGES  # noqa: E402

T = TypeVar("T")

KEY = "the-key-of-the-tests"
PATIENCE = 120.0  # seconds; a test that waits longer has found a hang, even on a crowded machine
POLL_SECONDS = 0.002
# Options of subprocess.run.
CAPTURED: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE}
MODELS = Path(os.environ.get("CEREBRUM_MODELS_DIR") or "~/.cache/cerebrum/models").expanduser()
SHIPPED = load_catalog(ROOT / "models.toml", LANGUAGES).models
# The fields of a model that only has its five names.
NO_FILE = json.loads("""{
    "file": "", "sha256": "", "draft": "", "size": 0, "memory_mb": 0,
    "sources": [], "aliases": [], "fim": [], "fim_layout": "psm"}""")
FILES = {model.id: MODELS / model.file for model in SHIPPED}


def rows(table: str) -> list[list[str]]:
    """A row a line, with bars between its cells. Behind a backslash is an escape of Python, and
    behind two spaces and # a comment.
    """
    lines = table.strip().splitlines()
    return [[*map(_cell, line.partition("  # ")[0].split("|"))] for line in lines]


def _cell(text: str) -> str:
    return text.strip().encode().decode("unicode_escape")


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The texts of the warnings and errors in the log."""
    records = caplog.records
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------------------ waiting


async def until(
    condition: Callable[[], Any], what: str = "the condition", *, seconds: float = PATIENCE
) -> Any:
    """The first true value of `condition()`, which may be a coroutine; TimeoutError after
    `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if inspect.iscoroutine(value):
            value = await value
        if value:
            return value
        _check_deadline(deadline, what)
        await asyncio.sleep(POLL_SECONDS)


def wait_until(
    condition: Callable[[], T], what: str = "the condition", *, seconds: float = PATIENCE
) -> T:
    """The same for code that may block."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        _check_deadline(deadline, what)
        time.sleep(POLL_SECONDS)
    return value


def _check_deadline(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"not in time: {what}")


# ------------------------------------------------------------------------------------------ replies

HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
STATUS = re.compile(rb"HTTP/1\.1 ([1-5][0-9][0-9]) [A-Za-z ]+")
CHUNK_SIZE = re.compile(rb"[0-9a-f]+\r\n")


@dataclass(frozen=True)
class Reply:
    """One response. `interim` counts the responses of status 100 before it; `clean` is False if its
    body was cut.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    interim: int = 0
    clean: bool = True

    def all(self, name: str) -> list[str]:
        """The values of all headers of this name."""
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def one(self, name: str) -> str:
        """The value of the only header of this name."""
        (value,) = self.all(name)
        return value

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The JSON of each event, and the text of each comment."""
        parts = self.body.split(b"\n\n")
        assert parts.pop() == b"", "half an event"
        return [_event(part) for part in parts]

    @property
    def said(self) -> str:
        """The token or the code of each event, with spaces between them."""
        return " ".join(event.get("token", event.get("code", "")) for event in self.events)


def _event(part: bytes) -> Any:
    if part.startswith(b"data: "):
        return json.loads(part[6:])
    return part.decode()


async def read_reply(reader: asyncio.StreamReader, method: str = "GET") -> Reply:
    """The next response to `method`, whatever its framing. AssertionError if it breaks a rule of
    HTTP.

    asyncio.IncompleteReadError if there is none, or if its body is shorter than its Content-Length.
    """
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head[:-4].split(b"\r\n")
    match = STATUS.fullmatch(first)
    assert match, first
    status = int(match[1])
    if status == 100:
        assert not lines, lines
        reply = await read_reply(reader, method)
        return replace(reply, interim=reply.interim + 1)
    reply = Reply(status, [_header(line) for line in lines], b"")
    if method == "HEAD" or status == 204:
        return reply
    if reply.all("Transfer-Encoding"):
        assert reply.one("Transfer-Encoding") == "chunked"
        assert not reply.all("Content-Length")
        body, clean = await _read_chunks(reader)
        return replace(reply, body=body, clean=clean)
    if not reply.all("Content-Length"):
        return replace(reply, body=await reader.read())
    length = int(reply.one("Content-Length"))
    return replace(reply, body=await reader.readexactly(length))


def _header(line: bytes) -> tuple[str, str]:
    name, _, value = line.decode("latin-1").partition(": ")
    assert value, line
    assert value == value.strip(), line
    return name, value


async def _read_chunks(reader: asyncio.StreamReader) -> tuple[bytes, bool]:
    """The payload, and whether the last chunk came."""
    body = bytearray()
    with contextlib.suppress(asyncio.IncompleteReadError):
        while True:
            line = await reader.readuntil(b"\r\n")
            assert CHUNK_SIZE.fullmatch(line), line
            size = int(line, 16)
            body += await reader.readexactly(size)
            assert await reader.readexactly(2) == b"\r\n"
            if not size:
                return bytes(body), True
    return bytes(body), False


# ------------------------------------------------------------------------------------------- asking


@contextlib.asynccontextmanager
async def connect(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        async with asyncio.timeout(PATIENCE):
            yield reader, writer
    finally:
        writer.transport.abort()


async def ask(port: int, raw: bytes, method: str = "GET") -> Reply:
    """Send these bytes on a connection of their own."""
    async with connect(port) as (reader, writer):
        writer.write(raw)
        return await read_reply(reader, method)


def post(path: str, body: bytes, *headers: str) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {KEY}"
    own = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
    return "\r\n".join([head, own, *headers, "", ""]).encode() + body


SHORT = {"prompt": "x =", "language": "python"}  # the fields of a completion


@dataclass(kw_only=True)
class Client:
    """A client of cm4d. Each request has a connection of its own, which starts at `address`."""

    port: int
    address: str = "127.0.0.1"

    async def open(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[Any, Any]:
        """Send a request, and return the reader and the writer of its connection."""
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, limit=1 << 16, local_addr=(self.address, 0)
        )
        payload = b""
        lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if body is not None:
            payload = json.dumps(body).encode()
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        head = "\r\n".join([*lines, "", ""])
        writer.write(head.encode() + payload)
        return reader, writer

    async def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        reader, writer = await self.open(method, path, body, **headers)
        try:
            reply = await read_reply(reader, method)
            assert await reader.read() == b"", "bytes after the end of the response"
            return reply
        finally:
            writer.transport.abort()

    async def get(self, path: str, **headers: str) -> Reply:
        return await self.ask("GET", path, **headers)

    async def post(self, path: str, body: Any, **headers: str) -> Reply:
        return await self.ask("POST", path, body, **headers)

    async def stats(self) -> dict[str, Any]:
        members: dict[str, Any] = (await self.get("/v1/stats")).json
        return members

    async def stream(self, **more: Any) -> Reply:
        return await self.post("/v1/complete/stream", SHORT | more)

    async def complete(self, **more: Any) -> Reply:
        return await self.post("/v1/complete", SHORT | more)


# ------------------------------------------------------------------------------------------ daemons


@dataclass(eq=False)
class Daemon:
    """A running program that serves HTTP on `port`. Its stdout goes to a file in memory, so no pipe
    can be full.
    """

    name: str
    process: subprocess.Popen[bytes]
    folder: Path
    output: int  # the file's descriptor
    port: int = 0
    start_seconds: float = 0.0

    def __post_init__(self) -> None:
        weakref.finalize(self, os.close, self.output)

    def wait_for_line(self, pattern: str, seconds: float = PATIENCE) -> re.Match[str]:
        """Block until a line of stdout matches; AssertionError if the program ends before, or never
        prints one.
        """

        def found() -> re.Match[str] | str | None:
            ended = self.process.poll() is not None
            for line in self.stdout().split("\n")[:-1]:
                if match := re.search(pattern, line):
                    return match
            return "ended" if ended else None

        with contextlib.suppress(TimeoutError):
            match = wait_until(found, seconds=seconds)
            if isinstance(match, re.Match):
                return match
        raise AssertionError(
            f"{self.name} printed no line like {pattern!r}, but:\n{self.stdout()}{self.stderr()}"
        )

    def stdout(self) -> str:
        size = os.fstat(self.output).st_size
        return os.pread(self.output, size, 0).decode(errors="replace")

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def complaints(self) -> str:
        """Errors and tracebacks in the log, and all of stderr: only a fault of the daemon prints
        any.
        """
        lines = self.stdout().splitlines()
        bad = [line for line in lines if re.search(" - ERROR - |Traceback", line)]
        return "\n".join(bad) + self.stderr()

    def rss_kb(self, line: str = "VmRSS:") -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(line)[1].split()[0])

    def peak_rss_kb(self) -> int:
        return self.rss_kb("VmHWM:")

    def close(self) -> None:
        """End the program at once, if it still runs."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def program(
    name: str, command: list[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[Daemon]:
    """Start a program and wait for its line `listening on http://HOST:PORT`; end it by SIGTERM."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    output = os.memfd_create(name)
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=stderr
        )
    started = Daemon(name, process, folder, output)
    try:
        line = started.wait_for_line(r"listening on https?://[^ ]*:(\d+)$")
        started.port = int(line[1])
        started.start_seconds = time.perf_counter() - began
        yield started
        process.terminate()
        process.wait(PATIENCE)
    finally:
        started.close()


@contextlib.contextmanager
def daemon(
    name: str,
    folder: Path,
    python: str = sys.executable,
    inherited: Mapping[str, str] | None = None,
    **more: str,
) -> Iterator[Daemon]:
    """cm4d or vpsd on a port that the kernel chooses; it must stop with status 0 on SIGTERM. See
    `settings`.
    """
    environment = settings(folder, inherited, **more)
    with program(name, command_of(name, python), folder, environment) as started:
        yield started
    assert started.process.returncode == 0, started.stdout() + started.stderr()


@contextlib.contextmanager
def with_weights(folder: Path, **more: Any) -> Iterator[tuple[Daemon, Daemon]]:
    """cm4d, and vpsd with the weights of the 0.5B, without which the test is skipped."""
    weights, models = FILES["qwen_0_5b"], folder / "models"
    if not weights.exists():
        pytest.skip(f"{weights} is missing: python3 vpsd.py fetch")
    models.mkdir()
    (models / weights.name).symlink_to(weights)
    easy: dict[str, Any] = variables("CEREBRUM_MAX_CPU_PERCENT=100 CEREBRUM_MIN_FREE_MB=0")
    with daemon("vpsd", folder / "vpsd", CEREBRUM_MODELS_DIR=f"{models}", **easy) as vps:
        more["CEREBRUM_VPS_URL"] = f"http://127.0.0.1:{vps.port}"
        with daemon("cm4d", folder / "cm4d", **more) as pi:
            pi.wait_for_line("VPS backend is available")
            yield pi, vps


def copy_program(name: str, folder: Path) -> None:
    """Copy a daemon to a folder as docs/deploy.md does, without the rooms of the other machine."""
    for file in (f"{name}.py", "cerebrum_common.py", "models.toml"):
        shutil.copy(ROOT / file, folder)
    unused = shutil.ignore_patterns("__pycache__", "vps" if name == "cm4d" else "pi")
    shutil.copytree(ROOT / "cerebrum", folder / "cerebrum", ignore=unused)


def reload(process: subprocess.Popen[bytes], folder: Path) -> tuple[int, str]:
    """What `systemctl reload` runs: its exit status, and what it says. `folder` is the daemon's
    RUNTIME_DIRECTORY.
    """
    environment = {"MAINPID": f"{process.pid}", "RUNTIME_DIRECTORY": f"{folder}"}
    command = [sys.executable, "-I", "-S", f"{ROOT}/cerebrum/reload.py"]
    done = subprocess.run(command, env=environment, **CAPTURED)
    return done.returncode, done.stdout + done.stderr


def link_tuned(folder: Path, tuned: Path, published: bool = False) -> None:
    """Let the vpsd of this folder use a tuned file of another state, or only its settings with the
    `published` file.
    """
    state = folder / "state/tuned"
    state.mkdir(parents=True, exist_ok=True)
    passport = tuned.with_name(f"{tuned.name}.json")
    if published:
        only_settings = json.loads(passport.read_text()) | {"types": {}}
        (state / passport.name).write_text(json.dumps(only_settings))
        return
    for file in (tuned, passport):
        link = state / file.name
        if file.exists() and not link.exists():
            link.symlink_to(file)


def run_to_the_end(name: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A daemon that refuses to start. See `settings`."""
    environment = settings(folder, None, **more)
    return subprocess.run(command_of(name), env=environment, cwd=folder, **CAPTURED)


def command_of(name: str, python: str = sys.executable) -> list[str]:
    # cm4d runs without site-packages, as on the Pi. vpsd gets no ResourceWarning: llama_cpp leaves
    # a file open.
    options = ["-s", "-S", "-W", "always::ResourceWarning"] if name == "cm4d" else []
    return [python, "-u", *options, f"{ROOT}/{name}.py"]


# Nobody listens on port 1.
SETTINGS = f"""
CEREBRUM_API_KEY={KEY}
CEREBRUM_CM4_API_KEY={KEY}
CEREBRUM_CM4_HOST=127.0.0.1
CEREBRUM_VPS_HOST=127.0.0.1
CEREBRUM_CM4_PORT=0
CEREBRUM_VPS_PORT=0
CEREBRUM_VPS_URL=http://127.0.0.1:1
CEREBRUM_LOG_LEVEL=INFO
CEREBRUM_LOG_FILE=
"""


def settings(
    folder: Path, inherited: Mapping[str, str] | None = None, **more: str
) -> dict[str, str]:
    """The environment of a daemon: its files are below `folder`, it has KEY, no weights and no VPS.

    `inherited` is the environment that these settings are added to. A test leaves it out, so that
    nothing of the caller's environment reaches the daemon but its PATH; a benchmark passes its own.
    `more` overrides both.
    """
    if not inherited:
        path = os.environ["PATH"]
        inherited = {"PATH": path, "HOME": f"{folder}", "PYTHONDONTWRITEBYTECODE": "1"}
    folders = {"CEREBRUM_MODELS_DIR": f"{folder}/models", "CEREBRUM_STATE_DIR": f"{folder}/state"}
    return {**inherited, **variables(SETTINGS), **folders, **more}


def variables(text: str) -> dict[str, str]:
    """NAME=value for each word of a text."""
    return dict(word.split("=") for word in text.split())


def certificate(
    folder: Path, name: str, names: str = "DNS:localhost,IP:127.0.0.1"
) -> Mapping[str, str]:
    """The Pi's settings for a fresh certificate of this machine."""
    cert = f"{folder}/{name}.crt"
    key = f"{folder}/{name}.key"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={names}"]
    command = [*request.split(), *subject, "-out", cert, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    return {"CEREBRUM_CM4_TLS_CERT": cert, "CEREBRUM_CM4_TLS_KEY": key}


@contextlib.contextmanager
def disk_of(size: str, folder: Path) -> Iterator[Path]:
    """A disk of this size."""
    folder.mkdir()
    mount = f"mount -t tmpfs -o size={size} tmpfs".split()
    mounted = subprocess.run([*mount, folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
