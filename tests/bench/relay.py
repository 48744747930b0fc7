"""What the Pi's daemon adds to a stream: delay, CPU time, memory, and how long it takes to start.

    python tests/bench/relay.py [--seconds 4] [--rounds 3] [--streams 2] [--pace 200] [--clients 8]

A scripted backend in a process of its own sends streams of token events, paced at so many tokens/s
each. This process reads them directly, through cm4d.py, and through a relay on asyncio streams that
does nothing else, in turn, several rounds in one run, so that a busy machine slows all of them. A
second cm4d.py serves the same streams in the dialects of OpenAI and llama.cpp. Prints one line of
JSON:

    added_us             a token's time from the backend's send to here, less the same without a
                         relay (medians)
    cpu_us_per_token     of the relay's process, from the scheduler's own clock
    peak_rss_mb          VmHWM at the end of everything
    start_s              from exec to `listening on …` (mean of 2)
    openai, llama        the same figures in these dialects
    requests_per_s       of so many clients that ask again and again for one token, through cm4d.py
    request_added_ms     such a request's time, less the same without a relay (medians)
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import selectors
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import servers
from harness import Daemon, daemon, post, program
from scripted import CHUNKED, END, HEALTH, MODELS, answer, chunk, event, token

STATE = answer(200, HEALTH | MODELS)  # the answer to any GET
VPS = "/v1/inference/stream"
PATHS = {
    "direct": VPS,
    "bare": VPS,
    "cm4d": "/v1/complete/stream",
    "openai": "/v1/completions",
    "llama": "/completion",
}
TEXT = rb'"(?:token|text|content)": ?"(\d+)"'  # of an event, in any dialect

# -------------------------------------------------------------------------------------- the backend


def length_of(head: bytes) -> int:
    """Of the body that follows a request's head."""
    length = re.search(rb"content-length: (\d+)", head.lower())
    return int(length[1]) if length else 0


def read_request(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536) or sys.exit("the client left")
    end = data.index(b"\r\n\r\n") + 4 + length_of(data)
    while len(data) < end:
        data += peer.recv(65536)
    return data


def serve(peer: socket.socket):
    with contextlib.suppress(OSError, SystemExit), peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        asked = re.search(rb"paced (\d+) (\d+) (\d+)", read_request(peer))
        if asked:
            send_paced(peer, *map(int, asked.groups()))
        else:
            peer.sendall(STATE)


def send_paced(peer: socket.socket, count: int, pace: int, late_us: int):
    peer.sendall(CHUNKED)
    start = time.perf_counter() + 0.05 + late_us / 1e6
    for n in range(1, count + 1):
        time.sleep(max(0.0, start + n / pace - time.perf_counter()))
        peer.sendall(chunk(token(f"{time.monotonic_ns()}", n)))
    done = event(**END | {"total_tokens": count})
    peer.sendall(chunk(done) + b"0\r\n\r\n")


def backend():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=serve, args=(peer,), daemon=True).start()


async def bare(port: int):
    """The relay that does nothing else."""

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        head = await reader.readuntil(b"\r\n\r\n")
        body = await reader.readexactly(length_of(head))
        upstream, asking = await asyncio.open_connection("127.0.0.1", port)
        asking.write(head + body)
        while data := await upstream.read(65536):
            writer.write(data)
            await writer.drain()
        asking.close()
        writer.close()

    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# ------------------------------------------------------------------------------------- measuring


@dataclass
class Target:
    """A process that relays (or the backend itself), and what was measured through it."""

    name: str
    pid: int
    port: int
    delays_ns: list[int] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)


def ask(target: Target, count: int, pace: int, late_us: int) -> socket.socket:
    prompt = f"# paced {count} {pace} {late_us}\nx ="
    fields = {"prompt": prompt, "language": "python", "stream": True}
    peer = socket.create_connection(("127.0.0.1", target.port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    body = json.dumps(fields).encode()
    peer.sendall(post(PATHS[target.name], body, "Connection: close"))
    return peer


def receive(peers: list[socket.socket]) -> Iterator[tuple[int, bytes]]:
    """(time in ns, bytes) of every read of all the streams, until each has ended."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                peer = key.fileobj  # type: ignore[assignment]
                data = peer.recv(1 << 18)
                yield time.monotonic_ns(), data
                if not data:
                    selector.unregister(key.fileobj)
                    peer.close()


def run_paced(target: Target, seconds: float, streams: int, pace: int):
    count = int(seconds * pace)
    turn_us = 1_000_000 // (pace * streams)
    peers = [ask(target, count, pace, number * turn_us) for number in range(streams)]
    cpu = servers.cpu_ns(target.pid)
    seen = 0
    for now, data in receive(peers):
        for stamp in re.findall(TEXT, data):
            seen += 1
            target.delays_ns.append(now - int(stamp))
    assert seen == count * streams, f"{target.name}: {seen} tokens of {count * streams}"
    target.cpu_us.append((servers.cpu_ns(target.pid) - cpu) / seen / 1000)


def run_requests(target: Target, seconds: float, clients: int) -> list[float]:
    """The seconds of each request."""
    end = time.perf_counter() + seconds
    found = []

    def run(_: int):
        while (begun := time.perf_counter()) < end:
            with ask(target, 1, 1000, 0) as peer:
                while peer.recv(65536):
                    pass
            found.append(time.perf_counter() - begun)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(run, range(clients)))
    return found


def figures(target: Target, direct: Target) -> dict[str, float]:
    added = statistics.median(target.delays_ns) - statistics.median(direct.delays_ns)
    cpu = statistics.median(target.cpu_us)
    return {"cpu_us_per_token": round(cpu, 1), "added_us": round(added / 1000, 1)}


def start_all(folder: Path, stack: contextlib.ExitStack) -> dict[str, Daemon]:
    """The processes by the names of their targets."""
    started = {}

    def start(name: str, *arguments: str) -> int:
        command = [sys.executable, __file__, *arguments]
        running = program(name, command, folder / name, {"PATH": os.environ["PATH"]})
        started[name] = stack.enter_context(running)
        return started[name].port

    port = start("direct", "backend")
    start("bare", "bare", f"{port}")
    settings = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_MAX_CONCURRENT": "512"}
    settings["CEREBRUM_VPS_URL"] = f"http://127.0.0.1:{port}"
    for name in ("cm4d", "openai"):
        started[name] = stack.enter_context(daemon("cm4d", folder / name, **settings))
    started["llama"] = started["openai"]
    return started


def main():
    usual = {"streams": 2, "pace": 200, "clients": 8}
    options = servers.parser_of(__doc__, seconds=4.0, rounds=3, **usual).parse_args()
    load = options.streams, options.pace
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        started = start_all(folder, stack)
        targets = {
            name: Target(name, relay.process.pid, relay.port) for name, relay in started.items()
        }
        for target in targets.values():
            run_paced(target, 0.5, *load)  # warm
            target.delays_ns.clear()
            target.cpu_us.clear()
        for _ in range(options.rounds):
            for target in targets.values():
                run_paced(target, options.seconds, *load)
        times = {
            name: run_requests(targets[name], options.seconds, options.clients)
            for name in ("direct", "cm4d")
        }
        direct = targets.pop("direct")
        result = {name: figures(target, direct) for name, target in targets.items()}
        native = result["cm4d"]["cpu_us_per_token"]
        for name, found in result.items():
            found["peak_rss_mb"] = round(started[name].peak_rss_kb() / 1024, 1)
    ratio = round(native / result["bare"]["cpu_us_per_token"], 2)
    starts = [started[name].start_seconds for name in ("cm4d", "openai")]
    start_s = round(statistics.median(starts), 3)
    result["requests_per_s"] = round(len(times["cm4d"]) / options.seconds, 1)
    added = statistics.median(times["cm4d"]) - statistics.median(times["direct"])
    result["request_added_ms"] = round(1000 * added, 2)
    print(json.dumps({"cpu_to_bare": ratio, "start_s": start_s, **result}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["backend"]:
        backend()
    elif sys.argv[1:2] == ["bare"]:
        asyncio.run(bare(int(sys.argv[2])))
    else:
        main()
