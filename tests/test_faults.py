"""Faults of the world around both daemons, which run as processes and with real weights: cables, power, disks, clocks.

A machine that loses its network is a network namespace behind a veth pair whose far end goes down: from then on every
packet is lost, and nobody hears of it. Power that fails is the same, followed by `kill -9`. Both need root, as does a
full disk, which is a tmpfs of a megabyte. libfaketime makes the clock jump.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FILES,
    KEY,
    MODELS,
    PATIENCE,
    ROOT,
    Client,
    Daemon,
    Reply,
    command_of,
    post,
    program,
    read_reply,
    settings,
    until,
    wait_until,
)
from scripted import CHUNKED, Backend, chunk

from cerebrum.http import WRITE_SECONDS
from cerebrum.pi.fleet import PROBE_SECONDS
from cerebrum.pi.upstream import CONNECT_SECONDS, IDLE_SECONDS
from cerebrum.service import MAX_LOG_BYTES
from cerebrum_common import SSE_COMMENT

SMALL = "qwen_0_5b"
MARGIN_SECONDS = 10.0  # what a busy machine may add to a limit of time
STOPPED = "VPS backend is unavailable (it stopped in the middle of its answer)"
# The model counts on from here for as long as it may.
LONG = "# The numbers from one to ten thousand, a line each:\n1\n2\n3\n4\n5\n6\n7\n8\n"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FILES[SMALL].exists(), reason=f"{FILES[SMALL]} is missing: python3 vpsd.py fetch"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# ----------------------------------------------------------------------------------------- both daemons


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state with the costs and the digest of the model, which cost seconds."""
    folder = tmp_path_factory.mktemp("measured")
    with vpsd(folder) as vps:
        assert asyncio.run(ask_vps(vps.port, max_tokens=1)).status == 200
    return folder / "state"


@pytest.fixture
def folder(measured: Path, tmp_path: Path) -> Path:
    """A folder for a vpsd that has measured already."""
    return with_state(measured, tmp_path)


def with_state(measured: Path, folder: Path) -> Path:
    for name in ("calibration", "verified"):
        shutil.copytree(measured / name, folder / "state" / name)
    return folder


VPS = {
    "CEREBRUM_MODELS_DIR": str(MODELS),
    "CEREBRUM_MAX_CPU_PERCENT": "100",
    "CEREBRUM_MIN_FREE_MB": "256",
    "CEREBRUM_N_CTX": "4096",
    "CEREBRUM_THREADS": "1",  # two threads wait for each other as soon as another program computes
}


def vpsd(folder: Path, *inside: str, **more: str) -> contextlib.AbstractContextManager[Daemon]:
    """vpsd with the real weights; `inside` is a command that runs it somewhere else."""
    return program("vpsd", [*inside, *command_of("vpsd")], folder, settings(folder, **{**VPS, **more}))


def cm4d(folder: Path, vps: str | int, **more: str) -> contextlib.AbstractContextManager[Daemon]:
    """cm4d, without a key for its clients."""
    url = f"http://{vps}" if isinstance(vps, str) else f"http://127.0.0.1:{vps}"
    given = {"CEREBRUM_VPS_URL": url, "CEREBRUM_CM4_API_KEY": "", **more}
    return program("cm4d", command_of("cm4d"), folder, settings(folder, **given))


def fields(**more: Any) -> dict[str, Any]:
    """What a test asks for, if nothing else."""
    asked = {"model": SMALL, "prompt": LONG, "language": "python", "max_tokens": 2048}
    return {**asked, "temperature": 0, "stop_at": "none", **more}


async def ask_vps(port: int, path: str = "/v1/inference", **more: Any) -> Reply:
    return await Client(port=port).ask("POST", path, fields(**more), X_API_Key=KEY)


async def told(port: int, path: str = "/v1/stats") -> Any:
    return (await Client(port=port).get(path, X_API_Key=KEY)).json


async def is_healthy(port: int, status: int = 200) -> bool:
    return (await Client(port=port).get("/health")).status == status


async def until_true(condition: Callable[[], Coroutine[Any, Any, bool]], what: str, seconds: float = PATIENCE) -> float:
    """Ask until the answer is true; the seconds that it took."""
    began = time.monotonic()
    while not await condition():
        assert time.monotonic() - began < seconds, f"not in {seconds:g} s: {what}"
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def until_idle(port: int, seconds: float = PATIENCE) -> float:
    """Until a daemon's places are free; the seconds that it took."""

    async def idle() -> bool:
        return bool((await told(port))["requests_active"] == 0)

    return await until_true(idle, "all places are free", seconds)


class Stream:
    """A stream that has begun: the bytes up to its first token have been read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes) -> None:
        self.reader, self.writer, self._begun = reader, writer, begun

    @classmethod
    async def begin(cls, client: Client, path: str = "/v1/complete/stream", **more: Any) -> Stream:
        headers = {name: more.pop(name) for name in ("X_Request_ID", "X_API_Key") if name in more}
        reader, writer = await client.open("POST", path, fields(**more), **headers)
        return cls(reader, writer, await asyncio.wait_for(reader.readuntil(b'{"token"'), PATIENCE))

    async def rest(self) -> Reply:
        """The whole answer, once the connection has ended."""
        whole = asyncio.StreamReader(limit=1 << 20)
        whole.feed_data(self._begun + await self.reader.read())
        whole.feed_eof()
        self.writer.transport.abort()
        return await read_reply(whole)


def assert_broken(reply: Reply) -> None:
    """The stream has ended with tokens and the error STOPPED, and not cleanly."""
    assert reply.status == 200
    assert not reply.clean
    assert "token" in reply.events[-2]
    assert reply.events[-1] == {"error": True, "message": STOPPED, "code": "VPS_UNAVAILABLE"}


def assert_done(reply: Reply, tokens: int) -> None:
    assert (reply.status, reply.clean) == (200, True), reply.body
    last = reply.events[-1] if reply.one("Content-Type").startswith("text/event-stream") else reply.json
    assert last["total_tokens"] == tokens


# ---------------------------------------------------------------------------------------------- cables


class Cable:
    """Another machine, at `far`, and the cable to it: a network namespace and a veth pair. We are at `near`."""

    def __init__(self) -> None:
        process = os.getpid()
        self.name, self.ends = f"cerebrum-{process}", [f"cb{process}{end}" for end in "nf"]
        network = f"198.18.{process % 256}"  # for tests of networks: RFC 2544
        self.near, self.far = f"{network}.1", f"{network}.2"
        self.inside = ("ip", "netns", "exec", self.name)

    def __enter__(self) -> Cable:
        near, far = self.ends
        ip("netns", "add", self.name)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", self.name)
        ip("address", "add", f"{self.near}/30", "dev", near)
        ip("-n", self.name, "address", "add", f"{self.far}/30", "dev", far)
        ip("link", "set", near, "up")
        ip("-n", self.name, "link", "set", "lo", "up")
        self.mend()
        # Never forgotten: packets to a machine that is gone are lost in silence, as behind Tailscale.
        shown = json.loads(ip("-n", self.name, "-json", "link", "show", far))
        ip("neighbour", "replace", self.far, "lladdr", shown[0]["address"], "nud", "permanent", "dev", near)
        return self

    def __exit__(self, *_: object) -> None:
        ip("link", "delete", self.ends[0])
        ip("netns", "delete", self.name)

    def cut(self) -> None:
        ip("-n", self.name, "link", "set", self.ends[1], "down")

    def mend(self) -> None:
        ip("-n", self.name, "link", "set", self.ends[1], "up")

    def connect(self, port: int) -> socket.socket:
        """A connection from the other machine to us."""
        connected: list[socket.socket] = []

        def enter() -> None:
            with open(f"/run/netns/{self.name}", "rb") as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
            connected.append(socket.create_connection((self.near, port), PATIENCE))

        thread = threading.Thread(target=enter)  # a namespace is entered by a thread alone
        thread.start()
        thread.join()
        connected[0].setblocking(False)
        return connected[0]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cable() -> Iterator[Cable]:
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip")
    try:
        with Cable() as cable:
            yield cable
    except subprocess.CalledProcessError as error:  # in a container, root may do less
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")


class Cut:
    """A cable that is cut once all its users are ready, and mended once all have seen what follows."""

    def __init__(self, cable: Cable, users: int) -> None:
        self.cable, self._together = cable, asyncio.Barrier(users)

    async def cut(self) -> None:
        async with self._together as place:
            if place == 0:
                self.cable.cut()

    async def mend(self) -> None:
        async with self._together as place:
            if place == 0:
                self.cable.mend()


async def test_a_cable_is_cut(cable: Cable, measured: Path, tmp_path: Path) -> None:
    """With four things under way at once, since each side waits half a minute for the other one."""
    scenarios = (
        the_vps_loses_its_power,
        a_client_falls_silent,
        a_client_that_is_sent_nothing_falls_silent,
        a_pi_falls_silent,
    )
    cut = Cut(cable, len(scenarios))
    async with asyncio.TaskGroup() as group:
        for scenario in scenarios:
            group.create_task(scenario(cut, with_state(measured, tmp_path / scenario.__name__)))


async def the_vps_loses_its_power(cut: Cut, folder: Path) -> None:
    """In mid-stream."""
    cable = cut.cable
    with (
        vpsd(folder, *cable.inside, CEREBRUM_VPS_HOST=cable.far) as vps,
        cm4d(folder / "pi", f"{cable.far}:{vps.port}") as pi,
    ):
        client = Client(port=pi.port)
        await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS")
        stream = await Stream.begin(client)
        await cut.cut()
        vps.process.kill()
        began = time.monotonic()
        noticed = await until_true(lambda: is_healthy(pi.port, 503), "the Pi misses the VPS")
        refused = await client.stream(**fields())
        assert (refused.status, refused.json["code"]) == (503, "VPS_UNAVAILABLE")
        assert_broken(await stream.rest())
        took = time.monotonic() - began
        assert noticed < PROBE_SECONDS * 1.2 + CONNECT_SECONDS + MARGIN_SECONDS
        assert took < IDLE_SECONDS + MARGIN_SECONDS
        assert (await told(pi.port))["requests_active"] == 0

        await cut.mend()
        with vpsd(folder, *cable.inside, CEREBRUM_VPS_HOST=cable.far, CEREBRUM_VPS_PORT=str(vps.port)):
            back = await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS again")
            assert_done(await client.stream(**fields(max_tokens=8)), 8)
        print(f"away after {noticed:.1f} s, stream ended after {took:.1f} s, back after {back:.1f} s")


async def a_client_falls_silent(cut: Cut, folder: Path) -> None:
    """Its computer sleeps or has lost its network, so neither FIN nor RST comes. What it is sent stays unanswered. Its
    place is given back."""
    with (
        vpsd(folder) as vps,
        cm4d(folder / "pi", vps.port, CEREBRUM_CM4_HOST=cut.cable.near) as pi,
    ):
        body = json.dumps(fields()).encode()
        head = f"POST /v1/complete/stream HTTP/1.1\r\nHost: {cut.cable.near}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(sock=cut.cable.connect(pi.port))
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await asyncio.wait_for(reader.readuntil(b'{"token"'), PATIENCE)
        await cut.cut()
        freed = await until_idle(vps.port, WRITE_SECONDS + MARGIN_SECONDS)
        (line,) = re.findall("POST /v1/complete/stream .*", pi.stdout())
        assert " 499 " in line
        print(f"a silent client held its place for {freed:.1f} s")
        await cut.mend()


async def a_client_that_is_sent_nothing_falls_silent(cut: Cut, folder: Path) -> None:
    """It waits for an answer in one piece, so the kernel alone asks whether it is still there."""
    busy = [CHUNKED, *(chunk(SSE_COMMENT), lambda: asyncio.sleep(1)) * 600]  # a VPS that reads a long prompt
    async with Backend([busy]) as backend:
        with cm4d(folder, backend.port, CEREBRUM_CM4_HOST=cut.cable.near) as pi:
            _, writer = await asyncio.open_connection(sock=cut.cable.connect(pi.port))
            writer.write(post("/v1/complete", json.dumps(fields()).encode()))
            await until(backend.begun.is_set)
            await cut.cut()
            began = time.monotonic()
            await until(backend.left.is_set, seconds=WRITE_SECONDS + MARGIN_SECONDS)
            print(f"a silent client that was sent nothing held its place for {time.monotonic() - began:.1f} s")
            await asyncio.to_thread(pi.wait_for_line, r"POST /v1/complete 499 ")
            await cut.mend()


async def a_pi_falls_silent(cut: Cut, folder: Path) -> None:
    """The same between the Pi and the VPS: the Pi answers its client, and the VPS computes no further."""
    cable = cut.cable
    with (
        vpsd(folder, *cable.inside, CEREBRUM_VPS_HOST=cable.far) as vps,
        cm4d(folder / "pi", f"{cable.far}:{vps.port}") as pi,
    ):
        stream = await Stream.begin(Client(port=pi.port))
        await cut.cut()
        began = time.monotonic()
        assert_broken(await stream.rest())
        took = time.monotonic() - began
        await asyncio.to_thread(vps.wait_for_line, r"POST /v1/inference/stream ")
        freed = time.monotonic() - began
        print(f"the Pi gave up after {took:.1f} s, the VPS after {freed:.1f} s")
        assert " 499 " in vps.stdout()
        assert took < IDLE_SECONDS + MARGIN_SECONDS
        assert freed < WRITE_SECONDS + MARGIN_SECONDS
        await cut.mend()


async def test_the_way_to_the_vps_breaks_before_a_request(cable: Cable, folder: Path) -> None:
    with (
        vpsd(folder, *cable.inside, CEREBRUM_VPS_HOST=cable.far) as vps,
        cm4d(folder / "pi", f"{cable.far}:{vps.port}", CEREBRUM_MAX_CONCURRENT="3") as pi,
    ):
        client = Client(port=pi.port)
        await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS")
        cable.cut()
        began = time.monotonic()
        replies = await asyncio.gather(*(client.stream(prompt=f"{n} =") for n in range(3)))
        took = time.monotonic() - began
        assert [reply.status for reply in replies] == [503] * 3
        assert {reply.json["message"] for reply in replies} == {
            "VPS backend is unavailable (it did not answer in time)"
        }
        assert took < CONNECT_SECONDS + MARGIN_SECONDS
        stats = await told(pi.port)
        assert (stats["breaker"]["state"], stats["breaker"]["opens"]) == ("open", 1)
        began = time.monotonic()
        assert (await client.stream(**fields())).status == 503
        assert time.monotonic() - began < 1  # nobody waits for a VPS that is known to be away
        cable.mend()
        back = await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS again")
        assert_done(await client.stream(**fields(max_tokens=8)), 8)
        assert (await told(pi.port))["breaker"]["state"] == "closed"
        print(f"refused after {took:.1f} s, back after {back:.1f} s")


# --------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB. A file `filler` takes all of it."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount: {mounted.stderr.strip()}")
    try:
        with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def free(disk: Path, kilobytes: int) -> None:
    os.truncate(disk / "filler", (1024 - kilobytes) << 10)


def enlarge(disk: Path, megabytes: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", disk], check=True)


@needs_root
async def test_the_disk_is_full(disk: Path, tmp_path: Path) -> None:
    """Logs, measurements and caches are given up, completions are not; with room again, all is written again."""
    state, logs = disk / "state", disk / "logs"
    kv = state / "kv" / SMALL
    given = {"CEREBRUM_STATE_DIR": str(state), "CEREBRUM_LOG_FILE": str(logs / "vpsd.log")}
    with (
        vpsd(tmp_path, **given) as vps,
        cm4d(tmp_path / "pi", vps.port, CEREBRUM_LOG_FILE=str(logs / "cm4d.log")) as pi,
    ):
        client = Client(port=pi.port)

        async def complete(request_id: str) -> None:
            reply = await client.ask("POST", "/v1/complete", fields(max_tokens=4), X_Request_ID=request_id)
            assert_done(reply, 4)

        async def unload() -> None:
            reply = await Client(port=vps.port).ask("POST", f"/v1/unload/{SMALL}", {}, X_API_Key=KEY)
            assert (reply.status, reply.json["unloaded"]) == (200, True)

        await complete("full-1")
        await unload()
        free(disk, 64)  # room for the folders and a part of a sequence, which is 500 KB
        await complete("full-2")
        await unload()
        assert list(kv.iterdir()) == []
        assert [line[22:] for line in vps.stdout().splitlines() if "WARNING" in line] == [
            "WARNING - [-] parked sequences not saved: No space left on device"
        ] * 2
        for process, file in ((vps, "vpsd.log"), (pi, "cm4d.log")):
            said = [line for line in process.stdout().splitlines() if "CEREBRUM_LOG_FILE" in line]
            assert said == [f"CEREBRUM_LOG_FILE: cannot write {logs / file}: No space left on device; "
                            "going on without it"]  # fmt: skip
        enlarge(disk, megabytes=8)
        await complete("room-3")
        await unload()
        assert [path.name for path in kv.iterdir()] == ["0000.kv"]
        for file in ("vpsd.log", "cm4d.log"):
            assert re.search(r"\[room-3\] POST /v1/\S+ 200 ", (logs / file).read_text())
        assert vps.complaints() == pi.complaints() == ""
    assert (vps.process.returncode, pi.process.returncode) == (0, 0)

    # What a disk that was full may have left. It is measured and computed again.
    (costs,) = (state / "calibration").iterdir()
    os.truncate(costs, costs.stat().st_size // 2)
    os.truncate(kv / "0000.kv", 100_000)
    with vpsd(tmp_path, **given) as vps:
        answered = (await ask_vps(vps.port, max_tokens=4)).json
        assert (answered["total_tokens"], answered["cached_tokens"]) == (4, 0)
        assert "parked sequence 0000.kv removed: damaged" in vps.stdout()
        assert len(json.loads(costs.read_text())) == 8
    with vpsd(tmp_path, **given) as vps:
        answered = (await ask_vps(vps.port, max_tokens=4)).json
        assert answered["cached_tokens"] == answered["prompt_tokens"] - 1


# ------------------------------------------------------------------------------------------------ clocks

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime")
async def test_the_clock_jumps(folder: Path) -> None:
    """As when a Pi without a clock of its own hears of the time. Both daemons serve meanwhile."""
    clock = folder / "clock"
    clock.write_text("+0")
    faked = {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "CEREBRUM_LOG_LEVEL": "DEBUG",
        "CEREBRUM_IDLE_MINUTES": "1",
    }
    with vpsd(folder, **faked) as vps, cm4d(folder / "pi", vps.port, **faked) as pi:
        client = Client(port=pi.port)
        await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS")
        real, began = time.time(), time.monotonic()
        for days in (365, -1):
            probes = vps.stdout().count("GET /health 200")
            stream = await Stream.begin(client, max_tokens=256)
            moved = folder / "moved"
            moved.write_text(f"{days:+d}d")
            moved.replace(clock)  # at once: a daemon that finds the file empty ends
            shown = time.gmtime(real + days * 86_400)
            assert (await told(vps.port, "/health"))["timestamp"][:4] == f"{shown.tm_year}"
            assert_done(await stream.rest(), 256)
            assert_done(await client.complete(**fields(max_tokens=4)), 4)
            await until(lambda seen=probes: vps.stdout().count("GET /health 200") >= seen + 3, "two probes")
            assert await is_healthy(pi.port)
            cleaned = await Client(port=vps.port).ask("POST", "/v1/cleanup", {}, X_API_Key=KEY)
            assert cleaned.json["models_unloaded"] == []
            listed = (await told(vps.port, "/v1/models"))["models"]
            (model,) = [entry for entry in listed if entry["loaded"]]
            assert model["last_used"][:10] == time.strftime("%Y-%m-%d", shown)
            for port in (vps.port, pi.port):
                stats = await told(port)
                assert 0 <= stats["uptime"] <= time.monotonic() - began + 60
                assert stats["requests_active"] == 0
            assert stats["breaker"] == {"state": "closed", "failures": 0, "opens": 0, "retry_in_s": 0.0}
        assert vps.stdout().count("loaded (published)") == 1
        assert vps.complaints() == pi.complaints() == ""
        assert "WARNING" not in vps.stdout() + pi.stdout()


# ------------------------------------------------------------------------------------------------- files


async def test_a_model_file_is_damaged_while_it_is_served(folder: Path) -> None:
    models = folder / "models"
    models.mkdir()
    file = models / FILES[SMALL].name
    middle = FILES[SMALL].stat().st_size // 2

    def damage() -> None:
        with file.open("r+b") as opened:
            opened.seek(middle)
            opened.write(random.Random(1).randbytes(1 << 20))

    def truncate() -> None:
        os.truncate(file, middle)

    with vpsd(folder, CEREBRUM_MODELS_DIR=str(models)) as vps, cm4d(folder / "pi", vps.port) as pi:
        client = Client(port=pi.port)

        async def unload() -> None:
            await Client(port=vps.port).ask("POST", f"/v1/unload/{SMALL}", {}, X_API_Key=KEY)

        async def text() -> str:
            reply = await client.complete(**fields(max_tokens=16))
            assert reply.status == 200, reply.body
            return str(reply.json["completion"])

        shutil.copyfile(FILES[SMALL], file)
        good = await text()
        name = re.escape(f"model {SMALL} ({file.name}): ")
        damaged = name + "expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}; fetch it again"
        short = name + r"llama\.cpp cannot load this file; it is damaged, cut short or of an unknown kind"
        missing = f"model {SMALL}: the file {file.name} is missing; .* fetch {SMALL}"
        for spoil, status, code, message in (
            (damage, 500, "MODEL_LOAD_FAILED", damaged),
            (truncate, 500, "MODEL_LOAD_FAILED", short),
            (file.unlink, 404, "MODEL_NOT_FOUND", missing),
        ):
            spoil()
            assert await text() == good  # the model is in memory as a whole
            await unload()
            for reply in (await ask_vps(vps.port, max_tokens=4), await client.complete(**fields(max_tokens=4))):
                assert (reply.status, reply.json["code"]) == (status, code)
                assert re.fullmatch(message, reply.json["message"]), reply.body
                assert str(folder) not in reply.body.decode()
            assert (await told(vps.port))["requests_active"] == 0
            shutil.copyfile(FILES[SMALL], file)
            assert await text() == good

        # The time of writing can be set back; that of the last change cannot.
        stamp = file.stat()
        damage()
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        await unload()
        reply = await ask_vps(vps.port, max_tokens=4)
        assert (reply.status, reply.json["code"]) == (500, "MODEL_LOAD_FAILED")
        assert "Traceback" not in vps.stdout()


# ----------------------------------------------------------------------------------------- a request's id


def lines_of(request_id: str, process: Daemon) -> list[str]:
    """What `grep` finds of this request in a daemon's log, without the times."""
    found = [line for line in process.stdout().splitlines() if f"[{request_id}]" in line]
    return [re.sub(r"\d+\.\d\ds", "Ns", line.partition("] ")[2]) for line in found]


async def test_one_request_is_found_on_both_sides_by_its_id(folder: Path) -> None:
    with bad_vpsd(folder, 8, "fail") as vps, cm4d(folder / "pi", vps.port) as pi:
        client = Client(port=pi.port)
        await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS")

        async def lines(request_id: str, path: str, **more: Any) -> tuple[str, str]:
            reply = await client.ask("POST", path, fields(**more), X_Request_ID=request_id)
            assert reply.one("X-Request-ID") == request_id
            await until(lambda: lines_of(request_id, pi) and lines_of(request_id, vps), "both have logged it")
            (ours,), (theirs,) = lines_of(request_id, pi), lines_of(request_id, vps)
            return ours.removeprefix(f"POST {path} "), theirs.removeprefix("POST /v1/inference/stream ")

        for path in ("/v1/complete", "/v1/complete/stream"):
            done = f"200 Ns model={SMALL} tokens=2 ttft=Ns"
            assert await lines(f"good.{path[-6:]}", path, max_tokens=2, prompt=f"# {path}\n1\n2\n") == (done, done)
        fault = "the model could not be evaluated"
        ours, theirs = await lines("broken-1", "/v1/complete", prompt="3\n4\n", max_tokens=40)
        assert ours == f"503 Ns model={SMALL} tokens=4 ttft=Ns VPS_UNAVAILABLE: {fault}"
        assert theirs == f"500 Ns model={SMALL} tokens=4 ttft=Ns INTERNAL_ERROR: {fault}"
        ours, theirs = await lines("missing_1", "/v1/complete", model="codellama_7b")
        assert ours.startswith("404 Ns model=codellama_7b MODEL_NOT_FOUND: model codellama_7b: the file ")
        assert theirs.replace("404 Ns ", "404 Ns model=codellama_7b ") == ours
        refused = await ask_vps(vps.port, prompt="1 2 " * 5000)
        assert refused.json["code"] == "INVALID_REQUEST"
        (line,) = await until(lambda: lines_of(refused.one("X-Request-ID"), vps), "it is logged")
        assert line == (f"POST /v1/inference 400 Ns model={SMALL} INVALID_REQUEST: "
                        f"prompt: expected 1 to 4095 tokens, got {refused.json['prompt_tokens']}")  # fmt: skip


# ------------------------------------------------------------------------------------------- the watchdog


def bad_vpsd(folder: Path, good_decodes: int, then: str, **more: str) -> contextlib.AbstractContextManager[Daemon]:
    """vpsd whose llama.cpp goes wrong; see wedged.py."""
    command = [sys.executable, "-u", str(ROOT / "tests/wedged.py")]
    faults = {"GOOD_DECODES": str(good_decodes), "THEN": then, "CEREBRUM_DRAFT": "0"}  # so a token is a decode
    return program("vpsd", command, folder, settings(folder, **{**VPS, **faults, **more}))


class Supervisor:
    """systemd's side of the watchdog: how long ago it was fed, and the longest time between two meals."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "notify")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.fed, self.longest = time.monotonic(), 0.0
        self.thread = threading.Thread(target=self._listen)
        self.thread.start()

    def _listen(self) -> None:
        while said := self.socket.recv(1000):
            if said == b"WATCHDOG=1":
                self.longest = max(self.longest, self.silence())
                self.fed = time.monotonic()

    def silence(self) -> float:
        return time.monotonic() - self.fed

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.path)
        self.thread.join()
        self.socket.close()


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path)
    yield supervisor
    supervisor.close()


LIMIT_SECONDS = 8.0  # of the watchdog: longer than a busy machine keeps the event loop waiting
WATCHED = {"WATCHDOG_USEC": str(round(LIMIT_SECONDS * 1e6))}


@pytest.mark.alone  # a busy machine makes no progress either
async def test_a_wedged_worker_is_not_kept_alive(folder: Path, supervisor: Supervisor) -> None:
    """It is while it loads, measures, reads and writes for long."""
    shutil.rmtree(folder / "state")  # so it measures
    given = {"NOTIFY_SOCKET": supervisor.path, **WATCHED}
    with bad_vpsd(folder, 400, "hang", **given) as vps, cm4d(folder / "pi", vps.port) as pi:
        asked = asyncio.create_task(ask_vps(vps.port, path="/v1/inference/stream", prompt=LONG * 10))
        await asyncio.to_thread(vps.wait_for_line, rf"ERROR - \[-\] model {SMALL}: the worker makes no progress")
        assert "loaded (published)" in vps.stdout()
        assert supervisor.longest < LIMIT_SECONDS  # so far it was fed in time
        assert "token" in (await asked).events[-1]  # it has ended without a done event
        refused = await Client(port=pi.port).complete()
        assert (refused.status, refused.json["code"]) == (503, "VPS_UNAVAILABLE")
        assert (await told(pi.port))["breaker"]["failures"] == 1
        assert (await told(vps.port, "/health"))["status"] == "healthy"  # only the worker hangs
        await until(lambda: supervisor.silence() > LIMIT_SECONDS, "it is not fed any more")
        vps.process.send_signal(signal.SIGABRT)  # what systemd does now
        assert await asyncio.to_thread(vps.process.wait, PATIENCE) == -signal.SIGABRT
    with vpsd(folder) as vps:
        assert_done(await ask_vps(vps.port, max_tokens=4), 4)


@pytest.mark.parametrize("name", ["cm4d", "vpsd"])
def test_an_idle_daemon_is_kept_alive_and_a_stopped_one_is_not(
    tmp_path: Path, supervisor: Supervisor, name: str
) -> None:
    given = {"NOTIFY_SOCKET": supervisor.path, "WATCHDOG_USEC": "2000000"}
    with program(name, command_of(name), tmp_path, settings(tmp_path, **given)) as process:
        wait_until(lambda: supervisor.longest, "it is fed twice")
        process.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: supervisor.silence() > 2, "it is not fed any more")
        process.process.send_signal(signal.SIGCONT)
        wait_until(lambda: supervisor.silence() < 1, "it is fed again")
        assert "ERROR" not in process.stdout()


# ------------------------------------------------------------------------------------ thousands of requests

WARM_UP = 1_100
ABORTED = 11  # every 11th is
PARTS = 4  # after each of which the memory is printed
CLIENTS, PLACES = 6, 12  # at a time: nobody is refused, even before an aborted request has given its place back
CACHE_MB = 16  # of parked sequences, so that the warm-up fills it
# What RSS may grow by after the warm-up. Measured with 11,000 requests: 0.5 MB, and 5 MB, of which 1 MB came after the
# first part. A leak of 1 KB in each of them would be 11 MB.
GROWN_MB = {"cm4d": 3.0, "vpsd": 10.0}

REQUEST_LINE = re.compile(r"\[(soak\.[0-9a-z.]+)\] ([A-Z]+ /\S*) (\d{3}) ")

CHAT = {"messages": [{"role": "user", "content": "1, 2, 3, "}], "max_tokens": 2}
NATIVE = {"language": "python", "model": SMALL}


def a_request(draw: random.Random) -> tuple[str, str, Any, int]:
    """One of many kinds: method, path, body, and the status of its answer. A tenth of them are completions."""
    prompt = "".join(draw.choices("abcxyz", k=6)) + " = "
    short = {"prompt": prompt, "max_tokens": draw.randint(1, 4), "temperature": draw.choice((0, 0.5))}
    infill = {"input_prefix": f"def {prompt}", "input_suffix": "\n", "n_predict": 2}
    kinds: list[tuple[float, str, str, Any, int]] = [
        (2, "POST", "/v1/complete", NATIVE | short | {"language": "java"}, 200),
        (2, "POST", "/v1/complete/stream", NATIVE | short, 200),
        (1, "POST", "/v1/completions", short, 200),
        (1, "POST", "/v1/completions", short | {"stream": True}, 200),
        (1, "POST", "/v1/chat/completions", CHAT, 200),
        (1, "POST", "/v1/chat/completions", CHAT | {"stream": True}, 200),
        (1, "POST", "/infill", infill | {"stream": draw.random() < 0.5}, 200),
        (1, "POST", "/completion", {"prompt": prompt, "n_predict": 2}, 200),
        (2, "POST", "/tokenize", {"content": prompt}, 200),
        (10, "GET", "/health", None, 200),
        (10, "GET", "/v1/stats", None, 200),
        (8, "GET", "/v1/models", None, 200),
        (4, "GET", "/metrics", None, 200),
        (4, "GET", "/v1/activity", None, 200),
        (2, "GET", "/", None, 200),
        (2, "GET", "/openapi.json", None, 200),
        (2, "GET", "/props", None, 200),
        (10, "POST", "/v1/complete", NATIVE, 400),
        (8, "POST", "/v1/chat/completions", {"messages": []}, 400),
        (4, "POST", "/v1/complete", NATIVE | short | {"language": "cobol"}, 400),
        (4, "POST", "/v1/complete/stream", NATIVE | short | {"model": "codellama_7b"}, 404),
        (4, "GET", f"/{prompt.strip(' =')}", None, 404),
        (4, "PUT", "/v1/complete", None, 405),
    ]
    _, *chosen = draw.choices(kinds, [kind[0] for kind in kinds])[0]
    return tuple(chosen)  # type: ignore[return-value]


async def abort_a_request(client: Client, draw: random.Random, request_id: str) -> None:
    """Leave a completion at a random moment: in the middle of its body, before its answer, or in the middle of that."""
    moment = draw.choice(("body", "answer", "stream"))
    body = json.dumps(fields(prompt=f"{request_id}\n1\n2\n", max_tokens=64)).encode()
    lines = ["POST /v1/complete/stream HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}", f"X-Request-ID: {request_id}"]
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port, local_addr=(client.address, 0))
    writer.write("\r\n".join([*lines, "", ""]).encode() + (body[: len(body) // 2] if moment == "body" else body))
    if moment == "stream":
        await reader.readuntil(b'{"token"')
    else:
        await asyncio.sleep(draw.random() / 10)
    writer.close()  # not a reset, which would overtake the request
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


class Footprint:
    """What a process holds: file descriptors, threads, memory."""

    def __init__(self, process: Daemon) -> None:
        self.name, self.proc = process.name, Path(f"/proc/{process.process.pid}")
        self.rss_mb = process.rss_kb() / 1024
        self.fds, self.threads = self._counts()

    def _counts(self) -> tuple[int, int]:
        return len(list((self.proc / "fd").iterdir())), len(list((self.proc / "task").iterdir()))

    def is_back(self) -> bool:
        """Whether the process has as many files and threads again. A probe of the Pi has a file for a moment."""
        return self._counts() == (self.fds, self.threads)


@pytest.mark.parametrize("requests", [2_000, pytest.param(11_000, marks=pytest.mark.nightly)])
async def test_thousands_of_requests_leave_nothing(folder: Path, requests: int) -> None:
    models = folder / "models"
    models.mkdir()
    (models / FILES[SMALL].name).symlink_to(FILES[SMALL])  # the only one, so also that of the dialects
    given = {"CEREBRUM_LOG_LEVEL": "DEBUG", "CEREBRUM_MODELS_DIR": str(models), "CEREBRUM_MAX_CONCURRENT": str(PLACES)}
    with (
        vpsd(folder, CEREBRUM_N_CTX="512", CEREBRUM_CACHE_MB=str(CACHE_MB), **given) as vps,
        cm4d(folder / "pi", vps.port, **given) as pi,
    ):
        await until_true(lambda: is_healthy(pi.port), "the Pi finds the VPS")
        sent: dict[str, str] = {}  # what each request was to become, by its id

        async def serve(client: Client, draw: random.Random, numbers: Iterator[int], phase: str) -> None:
            for number in numbers:
                if number % ABORTED == 0:
                    request_id = f"soak.{phase}.a{number}"
                    sent[request_id] = "aborted"
                    await abort_a_request(client, draw, request_id)
                    continue
                request_id = f"soak.{phase}.r{number}"
                method, path, body, status = a_request(draw)
                reply = await client.ask(method, path, body, X_Request_ID=request_id)
                assert reply.status == status, (path, body, reply.body)
                assert reply.clean
                sent[request_id] = f"{method} {path} {status}"

        async def many(count: int, phase: str) -> None:
            numbers = iter(range(count))
            clients = [Client(port=pi.port, address=f"127.0.0.{n + 2}") for n in range(CLIENTS)]
            async with asyncio.TaskGroup() as group:
                for n, client in enumerate(clients):
                    group.create_task(serve(client, random.Random(f"{phase} {n}"), numbers, phase))
            assert await until_idle(pi.port) < PATIENCE
            assert await until_idle(vps.port) < PATIENCE

        # All threads that the event loop may want of its pool, which grows with the work.
        text = {"model": SMALL, "text": "x " * 50_000}
        wide = [Client(port=vps.port).ask("POST", "/v1/tokenize", text, X_API_Key=KEY) for _ in range(32)]
        assert {reply.status for reply in await asyncio.gather(*wide)} == {200}
        await many(WARM_UP, "warm")
        before = [Footprint(process) for process in (pi, vps)]
        began = time.monotonic()
        for part in range(PARTS):
            await many(requests // PARTS, f"part{part}")
            print(*(f"{process.name}: {process.rss_kb() / 1024:.1f} MB" for process in (pi, vps)))
        took = time.monotonic() - began
        for footprint in before:
            await until(footprint.is_back, f"{footprint.name} has as many files and threads as before")
        after = [Footprint(process) for process in (pi, vps)]
        for old, new in zip(before, after, strict=True):
            print(f"{old.name}: {old.fds} files, {old.threads} threads, {old.rss_mb:.1f} -> {new.rss_mb:.1f} MB")
        kinds = Counter(sent.values())
        print(f"{sum(kinds.values())} requests, {kinds['aborted']} of them aborted, in {took:.0f} s")

        for process in (pi, vps):
            wait_until(lambda process=process: process.stdout().endswith("\n"))
        ours = [match.groups() for match in REQUEST_LINE.finditer(pi.stdout())]
        theirs = Counter(match[1] for match in REQUEST_LINE.finditer(vps.stdout()))
        counts = Counter(request_id for request_id, _, _ in ours)
        assert counts == dict.fromkeys(sent, 1), {id: n for id, n in counts.items() if n > 1}
        logged = {request_id: f"{what} {status}" for request_id, what, status in ours}
        wrong = {id: logged[id] for id, what in sent.items() if what not in ("aborted", logged[id])}
        assert wrong == {}
        assert set(theirs.values()) == {1}
        native = {id for id, what in sent.items() if re.fullmatch("POST /v1/complete(/stream)? 200", what)}
        assert native <= set(theirs)
        for old, new in zip(before, after, strict=True):
            assert new.rss_mb - old.rss_mb < GROWN_MB[old.name]
        assert vps.complaints() == pi.complaints() == ""


# ------------------------------------------------------------------------------------------------ kill -9

kills = pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.nightly)])


@kills
async def test_the_vps_is_killed_at_any_moment(folder: Path, kills: int) -> None:
    """The next one starts, uses nothing that was half written, and leaves nothing of it."""
    draw = random.Random(9)
    state = folder / "state"
    moments = itertools.cycle(("measure", "load", "decode", "save"))
    for number, moment in zip(range(kills), moments, strict=False):
        if moment == "measure":
            shutil.rmtree(state / "calibration")
        with vpsd(folder) as vps:
            if moment in ("decode", "save"):
                for n in range(3):
                    prompt = f"# {number} {n}" + LONG * 10
                    assert_done(await ask_vps(vps.port, prompt=prompt, max_tokens=4), 4)
            if moment == "save":
                vps.process.terminate()
                await asyncio.sleep(draw.random() / 4)
            else:
                asked = asyncio.create_task(ask_vps(vps.port, prompt=f"# {number}\n{LONG}"))
                await asyncio.sleep(draw.random() * (4 if moment == "measure" else 1))
                vps.process.kill()
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    await asked
            vps.process.kill()
            vps.process.wait()
        assert vps.complaints() == "", moment
    with vpsd(folder) as vps:
        assert_done(await ask_vps(vps.port, max_tokens=4), 4)
        assert vps.complaints() == ""
    left = [path for path in state.rglob("*") if path.is_file() and path.suffix not in (".json", ".kv")]
    assert [path.parent.name for path in left] == ["verified"]


def whole_log(file: Path) -> str:
    """The text of a log and of its older parts, none of which is too long."""
    files = sorted(file.parent.glob(f"{file.name}*"), reverse=True)
    assert max(path.stat().st_size for path in files) <= MAX_LOG_BYTES
    return "".join(path.read_text() for path in files)


@kills
async def test_the_pi_is_killed_while_it_logs(tmp_path: Path, kills: int) -> None:
    """Every answer but the last ones is in the log, on a whole line, also while the log is rotated."""
    draw = random.Random(9)
    file = tmp_path / "cerebrum.log"
    form = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - [A-Z]+ - \[\S+\] .+")
    filler = f"2025-12-25 12:00:00 - INFO - [-] {'x' * 2000}\n"
    for number in range(kills):
        room = draw.randint(1000, 40_000)  # until the log is rotated
        with file.open("a") as log:
            log.write(filler * ((MAX_LOG_BYTES - room - file.stat().st_size) // len(filler)))
        with cm4d(tmp_path, 1, CEREBRUM_LOG_FILE=str(file)) as pi:
            answered: list[str] = []

            async def ask(n: int, port: int = pi.port, answered: list[str] = answered) -> None:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    for k in range(10_000):
                        request_id = f"kill.{n}.{k}"
                        await Client(port=port).get("/v1/stats", X_Request_ID=request_id)
                        answered.append(request_id)

            asking = asyncio.gather(*(ask(n) for n in range(4)))
            await asyncio.sleep(draw.random())
            pi.process.kill()
            await asking
            pi.process.wait()
        assert pi.complaints() == ""
        text = whole_log(file)
        assert text.endswith("\n")
        assert [line for line in text.splitlines() if not form.fullmatch(line)] == []
        since = text[text.rindex(" listening on ") :]
        missing = [id for id in answered if f"[{id}] GET /v1/stats 200 " not in since]
        assert len(missing) <= 4, number  # an answer is logged once it is sent
        assert answered


class Publisher(BaseHTTPRequestHandler):
    """Serves a file of 4 MB as slowly as `pause` says, and the rest of it to who has its beginning."""

    data = b"GGUF" + random.Random(9).randbytes(4 << 20)
    pause = 0.0

    def do_GET(self) -> None:
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")
        self.send_header("ETag", '"4 MB"')
        self.send_header("Content-Length", str(len(self.data) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for place in range(start, len(self.data), 1 << 16):
                self.wfile.write(self.data[place : place + (1 << 16)])
                time.sleep(self.pause)

    def log_message(self, *_: Any) -> None:
        pass


def test_fetch_is_killed_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Publisher, "pause", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        entry = f"""[[models]]
id = "tiny"\nname = "x"\nparameters = "x"\nquantization = "x"\nfile = "tiny.gguf"
size = {len(Publisher.data)}\nsha256 = "{hashlib.sha256(Publisher.data).hexdigest()}"
[[models.sources]]
kind = "url"\nurl = "http://127.0.0.1:{server.server_port}/tiny.gguf"
"""
        (tmp_path / "models.toml").write_text(entry)
        environ = settings(tmp_path, CEREBRUM_MODELS_FILE=str(tmp_path / "models.toml"))
        command = [*command_of("vpsd"), "fetch", "--no-tune"]
        part, size = tmp_path / "models/tiny.gguf.part", 0
        for _ in range(3):
            fetching = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
            wait_until(lambda size=size: part.exists() and part.stat().st_size > size, "more of it comes")
            fetching.kill()
            fetching.wait()
            size = part.stat().st_size
            assert not (tmp_path / "models/tiny.gguf").exists()
        fetched = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=PATIENCE)
        server.shutdown()
        thread.join()
    assert (fetched.returncode, fetched.stdout) == (0, f"{tmp_path}/models/tiny.gguf\n")
    assert (tmp_path / "models/tiny.gguf").read_bytes() == Publisher.data
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == [".tiny.gguf.lock", "tiny.gguf"]
