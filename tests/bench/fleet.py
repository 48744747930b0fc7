#!/usr/bin/env python3
"""How far one Pi goes with many backends: how many streams it relays, and what they cost.

    python tests/bench/fleet.py [--rounds 3] [--python /usr/bin/python3]

The backends of a real cm4d.py are one scripted process; it streams Python code, the body of one function, so the
natural end has to look at all of it. Prints one line of JSON:

    relayed              by the backends' API: the CPU's share and the added delay's p95 with 240 streams at a time of
                         20 tokens/s, a GPU's pace for one stream; the Pi takes 256 connections, 128 of one address
    *_cpu_us_per_token   of cm4d.py's process, for 2 streams of 200 tokens/s; `foreign` is of an `openai` backend
    peak_rss_mb          VmHWM with 5 backends (2 cerebrum, 2 openai, 1 llama.cpp) after streams from each
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import socket
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import ROOT, Daemon, daemon, program, wait_until
from relay import HEAD, STREAM_HEAD, Target, chunk, percentile, receive

PACE, TOKENS = 20, 64  # tokens/s of one stream, and how many it has
STREAMS = 240
LOADED = 2, 200, 512  # streams, tokens/s of each, tokens: for the CPU time of a token
PATHS = {"cerebrum": "/v1/inference/stream", "openai": "/v1/completions", "llama.cpp": "/completion"}
STAMP = re.compile(rb" (\d{10,})")

# ----------------------------------------------------------------------------------------- the backend

LISTED = {
    "status": "healthy",
    "models": [{"id": "qwen_0_5b", "loaded": True, "n_ctx": 4096}],
    "data": [{"id": "qwen_0_5b"}],
}


def encode(path: str, text: str, n: int, reason: str | None = None) -> bytes:
    """An event with a token, or with the `reason` for the end."""
    if path == PATHS["openai"]:
        members: dict[str, Any] = {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
    elif path == PATHS["llama.cpp"]:
        members = {"content": text, "stop": bool(reason)}
    else:
        members = {"done": True, "total_tokens": n} if reason else {"token": text, "total_tokens": n}
    return chunk(b"data: " + json.dumps(members).encode() + b"\n\n")


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    top = await reader.readuntil(b"\r\n\r\n")
    path = top.split(b" ")[1].decode()
    if length := re.search(rb"content-length: (\d+)", top.lower()):
        body = await reader.readexactly(int(length[1]))
        number, streams, pace, count = map(int, re.findall(rb"paced (\d+) (\d+) (\d+) (\d+)", body)[0])
        writer.write(STREAM_HEAD)
        now = asyncio.get_running_loop().time
        start = now() + 0.2 + number / (pace * streams)  # the streams take turns
        for n in range(count):
            await asyncio.sleep(start + n / pace - now())
            # The body of a function. Each third token of a line tells when it was sent.
            code = ("    total", " +=", f" {time.monotonic_ns()}", "\n")[n % 4]
            writer.write(encode(path, code, n + 1))
        writer.write(encode(path, "", count, "stop") + b"0\r\n\r\n")
    else:
        told = json.dumps(LISTED).encode()
        writer.write(HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n" % len(told) + told)
    writer.close()


async def backend() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=512)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


# ------------------------------------------------------------------------------------- the real daemon


@contextlib.contextmanager
def pi(folder: Path, python: str, port: int, apis: list[str], places: int) -> Iterator[Daemon]:
    """A cm4d with a backend of each of these APIs, once it has reached all of them."""
    folder.mkdir(parents=True)
    table = '[[backends]]\nid = "b{}"\nurl = "http://127.0.0.1:{}"\napi = "{}"\nmax_concurrent = {}\n'
    tables = [table.format(number, port, api, places) for number, api in enumerate(apis)]
    file = folder / "models.toml"
    file.write_text("\n".join([(ROOT / "models.toml").read_text(), *tables]))
    more = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_MODELS_FILE": str(file)}
    with daemon("cm4d", folder, python, **more) as started:
        wait_until(lambda: all(one["available"] for one in stats(started)["backends"]), "all backends are there")
        yield started


def stats(started: Daemon) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{started.port}/v1/stats") as reply:
        return json.load(reply)


def open_stream(port: int, path: str, number: int, streams: int, pace: int, count: int) -> socket.socket:
    prompt = f"# paced {number} {streams} {pace} {count}\ndef f():\n    total = 0\n"
    body = json.dumps({"prompt": prompt, "language": "python", "max_tokens": 2048}).encode()
    peer = socket.create_connection(("127.0.0.1", port), source_address=(f"127.0.0.{2 + number % 4}", 0))
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", "Content-Type: application/json"]
    peer.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body)
    return peer


def run_paced(target: Target, path: str, streams: int, pace: int, count: int) -> tuple[list[int], float, float]:
    """(delays in ns, CPU time of a token in µs, the CPU's share) of these streams through the target."""
    cpu, began = target.cpu_ns(), time.monotonic_ns()
    peers = [open_stream(target.port, path, number, streams, pace, count) for number in range(streams)]
    delays: list[int] = []
    for now, data in receive(peers):
        delays += [now - int(stamp) for stamp in STAMP.findall(data)]
    used, passed = target.cpu_ns() - cpu, time.monotonic_ns() - began
    expected = streams * (count // 4)
    assert len(delays) > expected * 0.99, f"{target.name}: {len(delays)} stamps of {expected}"  # a read may cut one
    return delays, used / (streams * count) / 1000, used / passed


def relayed(direct: Target, target: Target) -> dict[str, float]:
    plain, _, _ = run_paced(direct, PATHS["cerebrum"], STREAMS, PACE, TOKENS)
    delays, us, share = run_paced(target, "/v1/complete/stream", STREAMS, PACE, TOKENS)
    added = (percentile(delays, 0.95) - percentile(plain, 0.95)) / 1000
    return {"cpu_share": round(share, 2), "added_ms_p95": round(added, 2), "cpu_us_per_token": round(us, 1)}


def measure(folder: Path, python: str, rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        command = [sys.executable, __file__, "backend"]
        source = stack.enter_context(program("direct", command, folder / "direct", {"PATH": "/usr/bin:/bin"}))
        direct = Target("direct", source.process.pid, source.port)
        targets = {}
        for api in ("cerebrum", "openai"):
            started = stack.enter_context(pi(folder / api, python, source.port, [api] * 4, 64))
            targets[api] = Target(api, started.process.pid, started.port)
            run_paced(targets[api], "/v1/complete/stream", 4, 100, 64)  # warm
        cpu = defaultdict(list)
        for _ in range(rounds):
            for api, target in targets.items():
                cpu[api].append(run_paced(target, "/v1/complete/stream", *LOADED)[1])
        result["foreign_cpu_us_per_token"] = round(statistics.median(cpu["openai"]), 1)
        result["native_cpu_us_per_token"] = round(statistics.median(cpu["cerebrum"]), 1)
        result["relayed"] = {api: relayed(direct, target) for api, target in targets.items()}
        apis = ["cerebrum", "cerebrum", "openai", "openai", "llama.cpp"]
        mixed = stack.enter_context(pi(folder / "mixed", python, source.port, apis, 2))
        run_paced(Target("mixed", mixed.process.pid, mixed.port), "/v1/complete/stream", 2 * len(apis), 100, 256)
        assert all(one["requests_total"] for one in stats(mixed)["backends"]), "a backend was not asked"
        result["peak_rss_mb"] = round(mixed.peak_rss_kb() / 1024, 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the CPU time of a token")
    parser.add_argument("--python", default=sys.executable, help="the Python that runs cm4d.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "fleet", **measure(Path(folder), options.python, options.rounds)}))


if __name__ == "__main__":
    asyncio.run(backend()) if sys.argv[1:2] == ["backend"] else main()
