"""What the Pi costs in front of vLLM: the same requests through the Pi and straight to vLLM, in turns.

    python tests/bench/vllm.py [--rounds 10] [--tokens 24] [--firsts 40]

`make test-scale` installs vLLM. Prints one line of JSON:

    rates      for each number of clients at a time: tokens a second straight and through the Pi, the medians of the
               rounds, and the median of the rounds' ratios
    first_ms   one client at a time: milliseconds to the first token, and the median of what the Pi adds in each turn
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pi"))

import scale
from harness import PATIENCE
from test_engines import KEY, MODEL, backend, start_pi

CLIENTS = (1, 4, 16)
NUMBER = itertools.count()


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[float, int]:
    """(seconds to the first token, tokens) of one stream."""
    connection, begin, first = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE), time.perf_counter(), 0.0
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    connection.request("POST", path, json.dumps(body), headers)
    answer, told = connection.getresponse(), dict[str, Any]()
    for line in iter(answer.readline, b""):
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - begin
            told = json.loads(line[6:])
    connection.close()
    return first, told.get("total_tokens") or told["usage"]["completion_tokens"]


def prompt() -> str:
    """A list that goes on, which nobody has asked for yet."""
    first = 1000 * next(NUMBER)
    return f"# {first}\n" + "".join(f"print({first + step})\n" for step in range(6))


def through(port: int, tokens: int) -> tuple[float, int]:
    body = {"prompt": prompt(), "language": "python", "model": MODEL, "max_tokens": tokens, "stop_at": "none"}
    return ask(port, "/v1/complete/stream", body | {"temperature": 0})


def straight(port: int, tokens: int) -> tuple[float, int]:
    body = {"prompt": prompt(), "model": scale.NAME, "max_tokens": tokens, "temperature": 0, "stream": True}
    return ask(port, "/v1/completions", body | {"stream_options": {"include_usage": True}})


def rate(one: Callable[[], tuple[float, int]], clients: int) -> float:
    """Tokens a second of so many clients together."""
    begin = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        tokens = sum(tokens for _, tokens in pool.map(lambda _: one(), range(clients)))
    return tokens / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--firsts", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, scale.vllm(Path(folder) / "vllm", KEY) as engine:
        table = backend(engine, "openai", max_concurrent=max(CLIENTS))
        with start_pi(Path(folder) / "pi", {"one": table}) as pi:
            ways = {
                "straight": lambda tokens: straight(engine.port, tokens),
                "pi": lambda tokens: through(pi.daemon.port, tokens),
            }
            for way in ways.values():
                way(2)
            rates: dict[int, dict[str, Any]] = {}
            for clients in CLIENTS:
                seen: dict[str, list[float]] = {name: [] for name in ways}
                for turn in range(given.rounds):
                    for name in (*ways,) if turn % 2 else reversed(ways):
                        seen[name].append(rate(lambda name=name: ways[name](given.tokens), clients))  # type: ignore[misc]
                medians = {name: round(statistics.median(values), 2) for name, values in seen.items()}
                ratio = statistics.median(pi / alone for pi, alone in zip(seen["pi"], seen["straight"], strict=True))
                rates[clients] = medians | {"ratio": round(ratio, 3)}
            firsts: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(given.firsts):
                for name in (*ways,) if turn % 2 else reversed(ways):
                    firsts[name].append(1000 * ways[name](2)[0])
            first_ms = {name: round(statistics.median(values), 1) for name, values in firsts.items()}
            added = statistics.median(pi - alone for pi, alone in zip(firsts["pi"], firsts["straight"], strict=True))
            first_ms["added"] = round(added, 1)
    print(json.dumps({"rates": rates, "first_ms": first_ms}))


if __name__ == "__main__":
    main()
