"""What a guest's flood costs a family: someone types while others chat, with the daemons and real weights.

    python tests/bench/household.py [--infills 16]

A typist of the family asks for an infill every PAUSE_SECONDS, each in another file of the standard library. Beside it,
in two turns each:

    quiet   one chat of the family at a time, with short questions and long answers
    flood   GUESTS chats of a guest at a time, of some 2,000 tokens each, nothing alike

Prints one line of JSON: the seconds to the first token of the infills (median and 90 %) in both houses, the ratio of
the medians, and the guest's answers in the time of the flood.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import KEY, MODELS, Daemon, daemon
from servers import MODULES, inherited, words

PAUSE_SECONDS, GUESTS, TURNS = 1.5, 20, 2
HOUSES = {"quiet": ("familys-key", 1, 50, 500), "flood": ("guests-key", GUESTS, 2000, 60)}  # key, chats, their tokens
LIBRARY = Path(http.client.__file__).parents[1]
NUMBER = itertools.count()


def first_token(pi: Daemon, key: str, path: str, body: dict[str, Any]) -> tuple[int, float]:
    """(status, seconds to the first event with text) of a stream that is read to its end."""
    connection = http.client.HTTPConnection("127.0.0.1", pi.port, timeout=600)
    begun, first = time.perf_counter(), 0.0
    connection.request("POST", path, json.dumps(body | {"stream": True}), {"X-API-Key": key})
    answer = connection.getresponse()
    for line in answer:
        if not first and line.startswith(b"data: {"):
            first = time.perf_counter() - begun
    connection.close()
    return answer.status, first


def chat(pi: Daemon, ended: threading.Event, key: str, asked: int, answered: int) -> int:
    """Chat again and again. Returns the number of answers."""
    answers = 0
    while not ended.is_set():
        text = f"{words(next(NUMBER), asked)}\nWrite a long story about these numbers."
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": answered}
        status, _ = first_token(pi, key, "/v1/chat/completions", body)
        answers += status == 200
        if status != 200:
            ended.wait(1.0)
    return answers


def typed(pi: Daemon, count: int) -> list[float]:
    times = []
    for number in itertools.islice(NUMBER, count):
        source, at = (LIBRARY / f"{MODULES[number % len(MODULES)]}.py").read_text(), 1500 + 37 * (number % 100)
        body = {"input_prefix": source[at - 1500 : at], "input_suffix": source[at : at + 500], "n_predict": 32}
        status, seconds = first_token(pi, "familys-key", "/infill", body)
        assert status == 200, status
        times.append(seconds)
        time.sleep(PAUSE_SECONDS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--infills", type=int, default=16)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"quiet": [], "flood": []}
    answers = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "client-keys").write_text("family familys-key\nguest guests-key 1\n")
        vps = {"CEREBRUM_MODELS_DIR": str(MODELS), "CEREBRUM_MAX_CPU_PERCENT": "100"}
        with daemon("vpsd", folder / "vps", inherited=inherited(), **vps) as backend:
            url = f"http://127.0.0.1:{backend.port}"
            keys = {"CEREBRUM_CM4_KEYS_FILE": str(folder / "client-keys"), "CEREBRUM_API_KEY": KEY}
            with daemon("cm4d", folder / "pi", CEREBRUM_VPS_URL=url, **keys) as pi:
                typed(pi, 2)  # loads the model
                for house, (key, count, *tokens) in [*HOUSES.items()] * TURNS:
                    ended = threading.Event()
                    with ThreadPoolExecutor(count) as pool:
                        chats = [pool.submit(chat, pi, ended, key, *tokens) for _ in range(count)]
                        times[house] += typed(pi, options.infills // TURNS)
                        ended.set()
                    answers += sum(one.result() for one in chats) * (house == "flood")
    told: dict[str, Any] = {}
    for house, seconds in times.items():
        told[house] = [round(statistics.median(seconds), 3), round(statistics.quantiles(seconds, n=10)[8], 3)]
    print(json.dumps(told | {"ratio": round(told["flood"][0] / told["quiet"][0], 2), "guest_answers": answers}))


if __name__ == "__main__":
    main()
