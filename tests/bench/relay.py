"""What the Pi's daemon adds to a stream: delay, CPU time, a ceiling, memory, and how long it takes to start.

    python tests/bench/relay.py [--seconds 4] [--rounds 3] [--python /usr/bin/python3]

A scripted backend in a process of its own sends 2 streams of token events, paced at 200 tokens/s each, then flat
out. This process reads them directly, through cm4d.py, through a relay on asyncio streams that does nothing else,
and through nginx with buffering off if it is installed, in turn, several rounds in one run, so that a busy
machine slows all of them. A second cm4d.py serves the same streams in the dialects of OpenAI and llama.cpp, a
third one with TLS. Prints one line of JSON:

    added_us_p50, _p99   a token's time from the backend's send to here, less the same percentile without a relay
    cpu_us_per_token     of the relay's process, from the scheduler's own clock, while paced
    flat_out_tok_s       both streams together; many one-event chunks in each write of the backend
    peak_rss_mb          VmHWM at the end of everything
    start_s              from exec to `listening on …` (median of 5)
    tls, openai, llama   the same figures with TLS or in these dialects; `more_cpu_us` is per token, over plain native
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import os
import re
import selectors
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if TYPE_CHECKING:  # imported only where it is used: this file is the bare relay too, whose memory is measured
    from harness import Daemon

STREAMS, PACE = 2, 200  # tokens/s each
FLAT_OUT = 200_000  # tokens in each stream
DIALECT_FLAT_OUT = 2048  # a completion in a dialect is kept as a whole, so its size is limited
TOKENS_PER_WRITE = 400
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n"
PATHS = {
    "cm4d": "/v1/complete/stream",
    "tls": "/v1/complete/stream",
    "openai": "/v1/completions",
    "llama": "/completion",
}
TEXT = rb'"(?:token|text|content)": ?"(\d+)"'  # of an event, in any dialect
STREAM_HEAD = HEAD % b"text/event-stream" + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"

# --------------------------------------------------------------------------------------- the backend


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(text: object, n: int) -> bytes:
    return chunk(b"data: " + json.dumps({"token": str(text), "total_tokens": n}).encode() + b"\n\n")


def end(n: int) -> bytes:
    done = {"done": True, "model": "qwen_0_5b", "total_tokens": n, "inference_time": 1.0}
    return chunk(b"data: " + json.dumps(done).encode() + b"\n\n") + b"0\r\n\r\n"


def read_request(peer: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += peer.recv(65536) or sys.exit("the client left")
    length = re.search(rb"content-length: (\d+)", data.lower())
    while len(data) < data.index(b"\r\n\r\n") + 4 + int(length[1] if length else 0):
        data += peer.recv(65536)
    return data


def answer(peer: socket.socket) -> None:
    with contextlib.suppress(OSError, SystemExit), peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = read_request(peer)
        if asked := re.search(rb"(paced|flat) (\d+) (\d+)", request):
            send = send_paced if asked[1] == b"paced" else send_flat_out
            peer.sendall(STREAM_HEAD)
            send(peer, int(asked[2]), int(asked[3]))
            return
        models = {"status": "healthy", "models": [{"id": "qwen_0_5b", "loaded": True, "n_ctx": 4096}]}
        body = json.dumps(models).encode()
        peer.sendall(HEAD % b"application/json" + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)


def send_paced(peer: socket.socket, count: int, number: int) -> None:
    start = time.perf_counter() + 0.05 + number / (PACE * STREAMS)  # the streams take turns
    for n in range(1, count + 1):
        time.sleep(max(0.0, start + n / PACE - time.perf_counter()))
        peer.sendall(token(time.monotonic_ns(), n))
    peer.sendall(end(count))


def send_flat_out(peer: socket.socket, count: int, number: int) -> None:
    for block in made_ahead(count):
        peer.sendall(block)
    peer.sendall(end(count))


@functools.cache
def made_ahead(count: int) -> list[bytes]:
    tokens = [token(" tok", n) for n in range(1, count + 1)]
    return [b"".join(tokens[first : first + TOKENS_PER_WRITE]) for first in range(0, count, TOKENS_PER_WRITE)]


def backend() -> None:
    for count in (FLAT_OUT, DIALECT_FLAT_OUT):
        made_ahead(count)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"listening on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        while True:
            threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


# ------------------------------------------------------------------------------------ the bare relay


def bare(port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        body = await reader.readexactly(int(length[1] if length else 0))
        upstream, asking = await asyncio.open_connection("127.0.0.1", port)
        asking.write(head + body)
        while data := await upstream.read(65536):
            writer.write(data)
            await writer.drain()
        asking.close()
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    asyncio.run(main())


# ------------------------------------------------------------------------------------- measuring


@dataclass
class Target:
    """A process that relays (or the backend itself), and what was measured through it."""

    name: str
    pid: int
    port: int
    start_s: list[float] = field(default_factory=list)
    delays_ns: list[int] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    flat_out: list[float] = field(default_factory=list)

    def cpu_ns(self) -> int:
        """CPU time of all threads, from the scheduler's clock: /proc/PID/stat has a grain of 10 ms."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks)

    def peak_rss_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

    def path(self) -> str:
        return PATHS.get(self.name, "/v1/inference/stream")


def cm4d(python: str, folder: Path, vps: int, **settings: str) -> contextlib.AbstractContextManager[Daemon]:
    from harness import daemon

    url = f"http://127.0.0.1:{vps}"
    more = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_MAX_CONCURRENT": str(STREAMS + 1)} | settings  # one is for infills
    return daemon("cm4d", folder, python, CEREBRUM_VPS_URL=url, **more)


def part(name: str, folder: Path, python: str, *arguments: str) -> contextlib.AbstractContextManager[Daemon]:
    """A part of this file as a process: the backend, or the bare relay."""
    from harness import program

    return program(name, [python, __file__, *arguments], folder / name, {"PATH": os.environ["PATH"]})


@contextlib.contextmanager
def nginx(folder: Path, vps: int) -> Iterator[Target]:
    from harness import wait_until

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}} http {{ access_log off; client_body_temp_path {folder}/a; proxy_temp_path {folder}/b;\n"
        f"fastcgi_temp_path {folder}/c; uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{vps};\n"
        "proxy_http_version 1.1; proxy_buffering off; } } }\n"
    )
    command = ["nginx", "-e", f"{folder}/error.log", "-p", str(folder), "-c", str(config)]

    def listening() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(listening, "nginx listens")
            yield Target("nginx", process.pid, port)
        finally:
            process.terminate()


def ask(target: Target, kind: str, count: int, number: int) -> socket.socket:
    body = json.dumps({"prompt": f"# {kind} {count} {number}\nx =", "language": "python", "stream": True}).encode()
    peer = socket.create_connection(("127.0.0.1", target.port))
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if target.name == "tls":
        peer = ssl._create_unverified_context().wrap_socket(peer)
    lines = [f"POST {target.path()} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json"]
    peer.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return peer


def receive(peers: list[socket.socket]) -> Iterator[tuple[int, bytes]]:
    """(time in ns, bytes) of every read of all the streams, until each has ended."""
    with selectors.DefaultSelector() as selector:
        for peer in peers:
            selector.register(peer, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                peer: socket.socket = key.fileobj  # type: ignore[assignment]
                data = peer.recv(1 << 18)
                while isinstance(peer, ssl.SSLSocket) and peer.pending():  # read already, so select does not tell
                    data += peer.recv(1 << 18)
                yield time.monotonic_ns(), data
                if not data:
                    selector.unregister(key.fileobj)
                    peer.close()


def run_paced(target: Target, seconds: float) -> None:
    count = int(seconds * PACE)
    peers = [ask(target, "paced", count, number) for number in range(STREAMS)]
    cpu, seen = target.cpu_ns(), 0
    for now, data in receive(peers):
        for stamp in re.findall(TEXT, data):
            seen += 1
            target.delays_ns.append(now - int(stamp))
    assert seen == count * STREAMS, f"{target.name}: {seen} tokens of {count * STREAMS}"
    target.cpu_us.append((target.cpu_ns() - cpu) / seen / 1000)


def run_flat_out(target: Target) -> None:
    began = time.perf_counter()
    count = DIALECT_FLAT_OUT if target.name in ("openai", "llama") else FLAT_OUT
    peers = [ask(target, "flat", count, number) for number in range(STREAMS)]
    data = b"".join(data for _, data in receive(peers))
    seconds = time.perf_counter() - began
    # A read may end inside an event, so count over all of it; two streams interleave, which costs a few.
    assert len(re.findall(rb'"(?:token|text|content)": ?" tok"', data)) > count * STREAMS * 0.99, target.name
    target.flat_out.append(count * STREAMS / seconds)


def percentile(values: list[int], share: float) -> float:
    return sorted(values)[int(len(values) * share)] / 1000


def report(targets: dict[str, Target]) -> dict[str, object]:
    direct = targets.pop("direct")
    result: dict[str, object] = {"streams": STREAMS, "tok_s_each": PACE, "tokens": len(direct.delays_ns)}
    figures: dict[str, dict[str, float]] = {}
    for name, target in targets.items():
        added = {
            share: percentile(target.delays_ns, share) - percentile(direct.delays_ns, share) for share in (0.5, 0.99)
        }
        figures[name] = {
            "added_us_p50": round(added[0.5], 1),
            "added_us_p99": round(added[0.99], 1),
            "cpu_us_per_token": round(statistics.median(target.cpu_us), 1),
            "flat_out_tok_s": round(statistics.median(target.flat_out)),
            "peak_rss_mb": round(target.peak_rss_mb(), 1),
        }
    figures["cm4d"]["start_s"] = round(statistics.median(targets["cm4d"].start_s), 3)
    for name in ("tls", "openai", "llama"):
        figures[name]["more_cpu_us"] = round(figures[name]["cpu_us_per_token"] - figures["cm4d"]["cpu_us_per_token"], 1)
    for name in figures.keys() - PATHS.keys():
        ratios = {key: round(figures["cm4d"][key] / value, 2) for key, value in figures[name].items() if value > 0}
        result[f"cm4d_to_{name}"] = ratios
    return figures["cm4d"] | result | {name: figures[name] for name in figures if name != "cm4d"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what cm4d.py adds to a stream.")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each paced run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", default=sys.executable, help="the Python that runs cm4d.py and the bare relay")
    options = parser.parse_args()
    from harness import certificate

    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        backend = stack.enter_context(part("direct", folder, sys.executable, "backend"))
        pi = stack.enter_context(cm4d(options.python, folder / "cm4d", backend.port))
        relay = stack.enter_context(part("bare", folder, options.python, "bare", str(backend.port)))
        targets = {one.name: Target(one.name, one.process.pid, one.port) for one in (backend, pi, relay)}
        other = stack.enter_context(cm4d(options.python, folder / "dialects", backend.port))
        secured = certificate(folder, "relay")
        tls = stack.enter_context(cm4d(options.python, folder / "tls", backend.port, **secured))
        targets["tls"] = Target("tls", tls.process.pid, tls.port)
        targets |= {name: Target(name, other.process.pid, other.port) for name in ("openai", "llama")}
        if shutil.which("nginx"):
            targets["nginx"] = stack.enter_context(nginx(folder, backend.port))
        for target in targets.values():
            run_paced(target, 0.5)  # warm
            target.delays_ns.clear()
            target.cpu_us.clear()
        for _ in range(options.rounds):
            for target in targets.values():
                run_paced(target, options.seconds)
        for _ in range(options.rounds):
            for target in targets.values():
                run_flat_out(target)
        for _ in range(5):
            with cm4d(options.python, folder / "start", backend.port) as started:
                targets["cm4d"].start_s.append(started.start_seconds)
        print(json.dumps(report(targets)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["backend"]:
        backend()
    elif sys.argv[1:2] == ["bare"]:
        bare(int(sys.argv[2]))
    else:
        main()
