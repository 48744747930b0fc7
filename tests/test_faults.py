"""Faults of the world around both daemons, which run as processes and with real weights: cables,
power, disks, clocks.

A machine that loses its network is a network namespace behind a veth pair whose far end goes down:
from then on every packet is lost, and nobody hears of it. That needs root, as does a full disk: a
tmpfs of a megabyte. libfaketime makes the clock jump.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import random
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import (
    FILES,
    KEY,
    PATIENCE,
    Client,
    Daemon,
    Reply,
    command_of,
    post,
    program,
    read_reply,
    settings,
    until,
    variables,
)
from scripted import CHUNKED, Backend, chunk
from test_scripts import disk_of, fill

from cerebrum.http import WRITE_SECONDS
from cerebrum.pi.fleet import PROBE_SECONDS
from cerebrum.pi.upstream import CONNECT_SECONDS, IDLE_SECONDS
from cerebrum_common import SSE_COMMENT

SMALL = "qwen_0_5b"
WEIGHTS = FILES[SMALL]
MARGIN_SECONDS = 10.0  # what a busy machine may add to a limit of time
# The model counts on from here for as long as it may.
LONG = "# The numbers from one to ten thousand, a line each:\n1\n2\n3\n4\n5\n6\n7\n8\n"

needs_weights = pytest.mark.skipif(
    not WEIGHTS.exists(), reason=f"{WEIGHTS} is missing: python3 vpsd.py fetch"
)
pytestmark = [pytest.mark.slow, needs_weights]


# ------------------------------------------------------------------------------------- both daemons


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """A state with the digest of the model, which costs seconds."""
    folder = tmp_path_factory.mktemp("measured")
    with vpsd(folder) as vps:
        assert asyncio.run(ask_vps(vps.port, max_tokens=1)).status == 200
    return folder / "state"


@pytest.fixture
def folder(measured, tmp_path):
    """A folder for a vpsd that knows the digest already."""
    return with_state(measured, tmp_path)


def with_state(measured: Path, folder: Path) -> Path:
    shutil.copytree(measured / "verified", folder / "state/verified")
    return folder


# Two threads wait for each other as soon as another program computes.
VPS = f"""
CEREBRUM_MODELS_DIR={WEIGHTS.parent}
CEREBRUM_MAX_CPU_PERCENT=100
CEREBRUM_MIN_FREE_MB=256
CEREBRUM_N_CTX=4096
CEREBRUM_THREADS=1
"""


def vpsd(folder: Path, *inside: str, **more: str) -> contextlib.AbstractContextManager[Daemon]:
    """vpsd with the real weights; `inside` is a command that runs it somewhere else."""
    command = [*inside, *command_of("vpsd")]
    return program("vpsd", command, folder, settings(folder, **variables(VPS) | more))


def cm4d(folder: Path, vps: str, **more: str) -> contextlib.AbstractContextManager[Daemon]:
    """cm4d, without a key for its clients."""
    given = {"CEREBRUM_VPS_URL": f"http://{vps}", "CEREBRUM_CM4_API_KEY": "", **more}
    return program("cm4d", command_of("cm4d"), folder, settings(folder, **given))


@contextlib.contextmanager
def both(folder: Path, cable: Cable | None = None, pi=None, **more: str) -> Iterator[Any]:
    """vpsd, behind the cable if there is one, a cm4d that has found it, with the settings `pi`, and
    its client.
    """
    inside, host = (cable.inside, cable.far) if cable else ((), "127.0.0.1")
    more["CEREBRUM_VPS_HOST"] = host
    with (
        vpsd(folder, *inside, **more) as vps,
        cm4d(folder / "pi", f"{host}:{vps.port}", **(pi or {})) as gateway,
    ):
        gateway.wait_for_line("VPS backend is available")
        yield vps, gateway, Client(port=gateway.port)


def fields(**more) -> dict[str, Any]:
    """What a test asks for, if nothing else."""
    asked = {"model": SMALL, "prompt": LONG, "language": "python", "max_tokens": 2048}
    return {**asked, "temperature": 0, "stop_at": "none", **more}


async def ask_vps(port: int, path: str = "/v1/inference", **more) -> Reply:
    return await Client(port=port).ask("POST", path, fields(**more), X_API_Key=KEY)


async def unload(port: int) -> None:
    reply = await Client(port=port).ask("POST", f"/v1/unload/{SMALL}", {}, X_API_Key=KEY)
    assert reply.json["unloaded"] is True


async def told(port: int, path: str = "/v1/stats") -> Any:
    return (await Client(port=port).get(path, X_API_Key=KEY)).json


async def is_healthy(port: int, status: int = 200) -> bool:
    return (await Client(port=port).get("/health")).status == status


async def is_idle(port: int) -> bool:
    """Whether all places of a daemon are free."""
    return bool((await told(port))["requests_active"] == 0)


async def begin(client: Client, **more) -> Coroutine[Any, Any, Reply]:
    """Begin a stream, and read up to its first token. Returns what waits for the whole answer."""
    reader, writer = await client.open("POST", "/v1/complete/stream", fields(**more))
    begun = await asyncio.wait_for(reader.readuntil(b'{"token"'), PATIENCE)

    async def rest() -> Reply:
        whole = asyncio.StreamReader(limit=1 << 20)
        whole.feed_data(begun + await reader.read())
        whole.feed_eof()
        writer.transport.abort()
        return await read_reply(whole)

    return rest()


def assert_done(reply: Reply, tokens: int) -> None:
    assert (reply.status, reply.clean) == (200, True), reply.body
    is_stream = reply.one("Content-Type").startswith("text/event-stream")
    last = reply.events[-1] if is_stream else reply.json
    assert last["total_tokens"] == tokens


# ------------------------------------------------------------------------------------------- cables


class Cable:
    """Another machine, at `far`, and the cable to it: a network namespace and a veth pair. We are
    at `near`. The cable is cut once all its `users` are ready, and mended once all have seen what
    follows.
    """

    def __init__(self) -> None:
        process = os.getpid()
        self.name = f"cerebrum-{process}"
        self.ends = f"cb{process}n", f"cb{process}f"
        network = f"198.18.{process % 256}"  # for tests of networks: RFC 2544
        self.near, self.far = f"{network}.1", f"{network}.2"
        self.inside = ("ip", "netns", "exec", self.name)
        self.users = asyncio.Barrier(1)

    def __enter__(self) -> Cable:
        near, far = self.ends
        there = f"-n {self.name}"
        ip(f"netns add {self.name}")
        ip(f"link add {near} type veth peer name {far} netns {self.name}")
        ip(f"address add {self.near}/30 dev {near}")
        ip(f"{there} address add {self.far}/30 dev {far}")
        ip(f"link set {near} up")
        ip(f"{there} link set lo up")
        ip(f"{there} link set {far} up")
        # Never forgotten: packets to a machine that is gone are lost in silence, as behind
        # Tailscale.
        (shown,) = json.loads(ip(f"{there} -json link show {far}"))
        ip(f"neighbour replace {self.far} lladdr {shown['address']} nud permanent dev {near}")
        return self

    def __exit__(self, *_: object) -> None:
        ip(f"link delete {self.ends[0]}")
        ip(f"netns delete {self.name}")

    async def set(self, state: str) -> None:
        """down or up"""
        async with self.users as arrival:
            if arrival == 0:
                ip(f"-n {self.name} link set {self.ends[1]} {state}")

    async def connect(self, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection from the other machine to us."""
        connected = []

        def enter() -> None:
            with open(f"/run/netns/{self.name}", "rb") as namespace:
                assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0
            connected.append(socket.create_connection((self.near, port), PATIENCE))

        thread = threading.Thread(target=enter)  # a namespace is entered by a thread alone
        thread.start()
        thread.join()
        connected[0].setblocking(False)
        return await asyncio.open_connection(sock=connected[0])


def ip(arguments: str) -> str:
    command = ["ip", *arguments.split()]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def cable():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("needs root and ip")
    try:
        with Cable() as cable:
            yield cable
    except subprocess.CalledProcessError as error:  # in a container, root may do less
        pytest.skip(f"needs network namespaces: {error.stderr.strip()}")


async def test_a_cable_is_cut(cable, measured, tmp_path):
    """With three things under way at once, since each side waits half a minute for the other
    one.
    """
    scenarios = (the_vps_falls_silent, a_client_falls_silent, a_client_that_is_sent_nothing)
    cable.users = asyncio.Barrier(len(scenarios))
    async with asyncio.TaskGroup() as group:
        for scenario in scenarios:
            group.create_task(scenario(cable, with_state(measured, tmp_path / scenario.__name__)))


async def the_vps_falls_silent(cable: Cable, folder: Path) -> None:
    """In mid-stream: the Pi answers its client, and the VPS, for which the Pi falls silent,
    computes no further.
    """
    with both(folder, cable) as (vps, pi, client):
        rest = await begin(client)
        await cable.set("down")
        began = time.monotonic()
        await until(lambda: is_healthy(pi.port, 503), "the Pi misses the VPS")
        assert time.monotonic() - began < PROBE_SECONDS * 1.2 + CONNECT_SECONDS + MARGIN_SECONDS
        refused = await client.stream(**fields())
        assert (refused.status, refused.json["code"]) == (503, "VPS_UNAVAILABLE")
        broken = await rest
        assert (broken.status, broken.clean, "token" in broken.events[-2]) == (200, False, True)
        stopped = "VPS backend is unavailable (it stopped in the middle of its answer)"
        last = broken.events[-1]
        assert (last["error"], last["message"], last["code"]) == (True, stopped, "VPS_UNAVAILABLE")
        assert time.monotonic() - began < IDLE_SECONDS + MARGIN_SECONDS
        assert (await told(pi.port))["requests_active"] == 0
        await asyncio.to_thread(vps.wait_for_line, r"POST /v1/inference/stream 499 ")
        assert time.monotonic() - began < WRITE_SECONDS + MARGIN_SECONDS
        await cable.set("up")
        await until(lambda: is_healthy(pi.port), "the Pi finds the VPS again")
        assert_done(await client.stream(**fields(max_tokens=8)), 8)


async def a_client_falls_silent(cable: Cable, folder: Path) -> None:
    """Its computer sleeps or has lost its network, so neither FIN nor RST comes. What it is sent
    stays unanswered. Its place is given back.
    """
    with both(folder, pi={"CEREBRUM_CM4_HOST": cable.near}) as (vps, pi, _):
        reader, writer = await cable.connect(pi.port)
        writer.write(post("/v1/complete/stream", json.dumps(fields()).encode()))
        await asyncio.wait_for(reader.readuntil(b'{"token"'), PATIENCE)
        await cable.set("down")
        wait = WRITE_SECONDS + MARGIN_SECONDS
        await asyncio.to_thread(pi.wait_for_line, "POST /v1/complete/stream 499 ", wait)
        await until(lambda: is_idle(vps.port))
        await cable.set("up")


async def a_client_that_is_sent_nothing(cable: Cable, folder: Path) -> None:
    """It waits for an answer in one piece, so the kernel alone asks whether it is still there."""
    # A VPS that reads a long prompt.
    busy = [CHUNKED, *(chunk(SSE_COMMENT), lambda: asyncio.sleep(1)) * 600]
    async with Backend([busy]) as backend:
        with cm4d(folder, f"127.0.0.1:{backend.port}", CEREBRUM_CM4_HOST=cable.near) as pi:
            _, writer = await cable.connect(pi.port)
            writer.write(post("/v1/complete", json.dumps(fields()).encode()))
            await until(backend.begun.is_set)
            await cable.set("down")
            await until(backend.left.is_set, seconds=WRITE_SECONDS + MARGIN_SECONDS)
            await asyncio.to_thread(pi.wait_for_line, r"POST /v1/complete 499 ")
            await cable.set("up")


# -------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def disk(tmp_path):
    """A disk of 1 MB. A file `filler` takes all of it."""
    with disk_of("1m", tmp_path / "disk") as folder:
        fill(folder / "filler")
        yield folder


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
async def test_the_disk_is_full(disk, tmp_path):
    """Logs, measurements and caches are given up, completions are not; with room again, all is
    written again.
    """
    state, logs = disk / "state", disk / "logs"
    kv = state / "kv" / SMALL
    given = variables(f"CEREBRUM_STATE_DIR={state} CEREBRUM_LOG_FILE={logs}/vpsd.log")
    of_pi = variables(f"CEREBRUM_LOG_FILE={logs}/cm4d.log")
    with both(tmp_path, pi=of_pi, **given) as (vps, pi, client):

        async def complete(request_id):
            asked = "POST", "/v1/complete", fields(max_tokens=4)
            assert_done(await client.ask(*asked, X_Request_ID=request_id), 4)
            await unload(vps.port)

        await complete("full-1")
        # Room for the folders and a part of a sequence, of 500 KB.
        os.truncate(disk / "filler", (1024 - 64) << 10)
        await complete("full-2")
        assert list(kv.iterdir()) == []
        assert vps.stdout().count("parked sequences not saved: No space left on device") == 2
        for process in (vps, pi):
            assert process.stdout().count("No space left on device; going on without it") == 1
        mount = ["mount", "-o", "remount,size=8m", disk]
        await asyncio.to_thread(subprocess.run, mount, check=True)
        await complete("room-3")
        assert [path.name for path in kv.iterdir()] == ["0000.kv"]
        for file in ("vpsd.log", "cm4d.log"):
            assert re.search(r"\[room-3\] POST /v1/\S+ 200 ", (logs / file).read_text())
        assert vps.complaints() == pi.complaints() == ""
    assert (vps.process.returncode, pi.process.returncode) == (0, 0)


# ------------------------------------------------------------------------------------------- clocks

FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


FAKED = """
FAKETIME_NO_CACHE=1
FAKETIME_DONT_FAKE_MONOTONIC=1
NO_FAKE_STAT=1
CEREBRUM_LOG_LEVEL=DEBUG
CEREBRUM_IDLE_MINUTES=1
"""
CLOSED = {"state": "closed", "failures": 0, "opens": 0, "retry_in_s": 0.0}


@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime")
async def test_the_clock_jumps(folder):
    """As when a Pi without a clock of its own hears of the time. Both daemons serve meanwhile."""
    clock = folder / "clock"
    clock.write_text("+0")
    faked = variables(f"{FAKED} LD_PRELOAD={FAKETIME} FAKETIME_TIMESTAMP_FILE={clock}")
    real, began = time.time(), time.monotonic()
    with both(folder, pi=faked, **faked) as (vps, pi, client):
        for days in (365, -1):
            probes = vps.stdout().count("GET /health 200")
            rest = await begin(client, max_tokens=256)
            moved = folder / "moved"
            moved.write_text(f"{days:+d}d")
            moved.replace(clock)  # at once: a daemon that finds the file empty ends
            shown = time.strftime("%Y-%m-%d", time.gmtime(real + days * 86_400))
            assert (await told(vps.port, "/health"))["timestamp"][:10] == shown
            assert_done(await rest, 256)
            assert_done(await client.complete(**fields(max_tokens=4)), 4)
            await until(
                lambda seen=probes: vps.stdout().count("GET /health 200") >= seen + 3, "two probes"
            )
            assert await is_healthy(pi.port)
            models = (await told(vps.port, "/v1/models"))["models"]
            used = [model["last_used"][:10] for model in models if model["loaded"]]
            assert used == [shown]
            for port in (vps.port, pi.port):
                stats = await told(port)
                assert 0 <= stats["uptime"] <= time.monotonic() - began + 60
            assert stats["breaker"] == CLOSED
        assert vps.stdout().count("loaded (published)") == 1
        assert vps.complaints() == pi.complaints() == ""


# -------------------------------------------------------------------------------------------- files


async def test_a_model_file_is_damaged_while_it_is_served(folder):
    (folder / "models").mkdir()
    file = Path(shutil.copy(WEIGHTS, folder / "models"))
    middle = WEIGHTS.stat().st_size // 2

    def damage_in_secret():
        """The time of writing can be set back; that of the last change cannot."""
        stamp = file.stat()
        with file.open("r+b") as opened:
            opened.seek(middle)
            opened.write(random.Random(1).randbytes(1 << 20))
        os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    with both(folder, CEREBRUM_MODELS_DIR=f"{file.parent}") as (vps, _, client):

        async def outcome():
            reply = (await client.complete(**fields(max_tokens=16))).json
            assert f"{folder}" not in str(reply)
            return str(reply.get("completion") or reply["code"])

        good = await outcome()
        for spoil, code in (
            (lambda: os.truncate(file, middle), "MODEL_LOAD_FAILED"),
            (file.unlink, "MODEL_NOT_FOUND"),
            (damage_in_secret, "MODEL_LOAD_FAILED"),
        ):
            spoil()
            assert await outcome() == good  # the model is in memory as a whole
            await unload(vps.port)
            assert await outcome() == code
            shutil.copyfile(WEIGHTS, file)
            assert await outcome() == good
        assert (await told(vps.port))["requests_active"] == 0
        assert "Traceback" not in vps.stdout()


# ---------------------------------------------------------------------------- thousands of requests

WARM_UP = 1_100
ABORTED = 11  # every 11th is
# At a time: nobody is refused, even before an aborted request has given its place back.
CLIENTS, PLACES = 6, 12
# What RSS may grow by after the warm-up. Measured with 11,000 requests: 0.5 MB, and 5 MB, of which
# 1 MB came after the first part. A leak of 1 KB in each of them would be 11 MB.
GROWN_MB = {"cm4d": 3.0, "vpsd": 10.0}


# How often a request is asked, its method, its path, its body, and the status of its answer.
KINDS = json.loads(r"""[
    [1, "POST", "/v1/complete",
     {"language": "python", "model": "qwen_0_5b", "prompt": "1, 2, 3, ", "max_tokens": 2}, 200],
    [1, "POST", "/v1/complete/stream",
     {"language": "python", "model": "qwen_0_5b", "prompt": "1, 2, 3, ", "max_tokens": 2}, 200],
    [1, "POST", "/v1/chat/completions",
     {"messages": [{"role": "user", "content": "1, 2, 3, "}], "max_tokens": 2, "stream": true},
     200],
    [1, "POST", "/infill", {"input_prefix": "x = ", "input_suffix": "\n", "n_predict": 2}, 200],
    [4, "POST", "/v1/complete", {}, 400],
    [4, "POST", "/v1/complete/stream",
     {"language": "python", "model": "codellama_7b", "prompt": "1, 2, 3, ", "max_tokens": 2}, 404],
    [4, "PUT", "/v1/complete", null, 405],
    [4, "GET", "/health", null, 200],
    [4, "GET", "/v1/stats", null, 200],
    [4, "GET", "/v1/models", null, 200],
    [4, "GET", "/metrics", null, 200],
    [4, "GET", "/", null, 200]]""")
OFTEN = [often for often, *_ in KINDS]


def holdings(process: Daemon) -> tuple[int, int]:
    """How many files and threads a process has. A probe of the Pi has a file for a moment."""
    proc = Path(f"/proc/{process.process.pid}")
    return len(list((proc / "fd").iterdir())), len(list((proc / "task").iterdir()))


async def leave(client, request_id, seconds):
    """Ask for a completion, and leave after this time."""
    body = fields(prompt=f"{request_id}\n1\n2\n", max_tokens=64)
    asked = "POST", "/v1/complete/stream", body
    _, writer = await client.open(*asked, X_Request_ID=request_id)
    await asyncio.sleep(seconds)
    writer.close()  # not a reset, which would overtake the request


@pytest.mark.parametrize("requests", [2_000, pytest.param(11_000, marks=pytest.mark.nightly)])
async def test_thousands_of_requests_leave_nothing(folder, requests):  # noqa: C901, a scenario
    models = folder / "models"
    models.mkdir()
    (models / WEIGHTS.name).symlink_to(WEIGHTS)  # the only one, so also that of the dialects
    places = f"CEREBRUM_LOG_LEVEL=DEBUG CEREBRUM_MAX_CONCURRENT={PLACES}"
    given = variables(f"{places} CEREBRUM_MODELS_DIR={models}")
    # The warm-up fills the cache of parked sequences.
    small = variables("CEREBRUM_N_CTX=512 CEREBRUM_CACHE_MB=16")
    with both(folder, pi=given, **small, **given) as (vps, pi, _):
        sent = {}  # what each request was to become, by its id

        async def serve(client, draw, numbers, phase):
            for number in numbers:
                request_id = f"soak.{phase}.{number}"
                if number % ABORTED == 0:
                    # At a random moment, before its answer or in the middle of it.
                    sent[request_id] = "aborted"
                    await leave(client, request_id, draw.random() / 4)
                    continue
                ((_, method, path, body, status),) = draw.choices(KINDS, OFTEN)
                reply = await client.ask(method, path, body, X_Request_ID=request_id)
                assert (reply.status, reply.clean) == (status, True), (path, body, reply.body)
                sent[request_id] = f"{method} {path} {status}"

        async def many(count, phase):
            numbers = iter(range(count))
            async with asyncio.TaskGroup() as group:
                for n in range(CLIENTS):
                    client = Client(port=pi.port, address=f"127.0.0.{n + 2}")
                    group.create_task(serve(client, random.Random(f"{phase} {n}"), numbers, phase))
            for process in (pi, vps):
                await until(lambda process=process: is_idle(process.port))

        # All threads that the event loop may want of its pool, which grows with the work: prompts
        # that are too long are tokenized there, and refused.
        wide = [ask_vps(vps.port, prompt="x " * 50_000) for _ in range(PLACES)]
        assert {reply.status for reply in await asyncio.gather(*wide)} == {400}
        await many(WARM_UP, "warm")
        before = {process: (holdings(process), process.rss_kb()) for process in (pi, vps)}
        await many(requests, "hot")
        for process, (held, rss_kb) in before.items():
            # Before, a probe of the other daemon may have had a connection for a moment.
            def has_no_more(process=process, held=held):
                files, threads = holdings(process)
                return files <= held[0] and threads <= held[1]

            await until(has_no_more, f"{process.name} has its files")
            assert (process.rss_kb() - rss_kb) / 1024 < GROWN_MB[process.name]
            await until(lambda process=process: process.stdout().endswith("\n"))
        check_log(sent, pi, vps)


def check_log(sent, pi, vps):
    """Each request stands once in the Pi's log, and once in the VPS's if it came so far."""
    line = r"\[(soak\.\S+)\] ([A-Z]+ /\S* \d{3}) "
    ours = re.findall(line, pi.stdout())
    theirs = Counter(id for id, _ in re.findall(line, vps.stdout()))
    logged = dict(ours)
    assert len(ours) == len(logged)  # each once
    assert logged.keys() == sent.keys()
    assert set(theirs.values()) == {1}
    for id, what in sent.items():
        assert what in ("aborted", logged[id])
        assert id in theirs or not re.fullmatch("POST /v1/complete(/stream)? 200", what)
    assert vps.complaints() == pi.complaints() == ""


# ------------------------------------------------------------------------------------------ kill -9


@pytest.mark.parametrize("kills", [4, pytest.param(12, marks=pytest.mark.nightly)])
async def test_the_vps_is_killed_at_any_moment(folder, kills):
    """The next one starts, uses nothing that was half written, and leaves nothing of it."""
    draw, state = random.Random(9), folder / "state"
    for number in range(kills):
        moment = ("load", "decode", "save")[number % 3]
        with vpsd(folder) as vps:
            if moment != "load":
                for n in range(3):
                    prompt = f"# {number} {n}" + LONG * 10
                    assert_done(await ask_vps(vps.port, prompt=prompt, max_tokens=4), 4)
            if moment == "save":
                vps.process.terminate()
                await asyncio.sleep(draw.random() / 4)
            else:
                asked = asyncio.create_task(ask_vps(vps.port, prompt=f"# {number}\n{LONG}"))
                await asyncio.sleep(draw.random())
                vps.process.kill()
                with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                    await asked
            vps.process.kill()
            vps.process.wait()
        assert vps.complaints() == "", moment
    with vpsd(folder) as vps:
        assert_done(await ask_vps(vps.port, max_tokens=24), 24)
        assert vps.complaints() == ""
    files = [path for path in state.rglob("*") if path.is_file()]
    left = {path.parent.name for path in files if path.suffix not in (".json", ".kv")}
    assert left == {"verified"}
