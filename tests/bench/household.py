"""What a guest's flood costs a family: someone types while others chat, with the daemons and real weights.

    python tests/bench/household.py [--model qwen_0_5b] [--infills 16] [--rounds 2]

A typist of the family asks for an infill every PAUSE_SECONDS, each in another file of the standard library. Beside it,
in turns:

    quiet   one chat of the family at a time, with short questions and long answers
    flood   GUESTS chats of a guest at a time, of some 2,000 tokens each, nothing alike

Prints one line of JSON: the seconds to the first token of the infills (median and 90 %) in both houses, the ratio of
the medians, and the guest's answers in the time of the flood.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import KEY, MODELS, Daemon, daemon
from servers import MODULES, inherited, words

PAUSE_SECONDS, GUESTS = 1.5, 20
LIBRARY = Path(http.client.__file__).parents[1]


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


class Crowd:
    """Chats of `asked` tokens with one key, `count` at a time, until the end of the context."""

    def __init__(self, pi: Daemon, key: str, count: int, asked: int, answered: int) -> None:
        self.pi, self.key, self.answers, self.number, self.ended = pi, key, 0, 0, threading.Event()
        self.asked, self.answered = asked, answered
        self.threads = [threading.Thread(target=self._chat) for _ in range(count)]

    def _chat(self) -> None:
        while not self.ended.is_set():
            self.number += 1
            text = f"{words(self.number, self.asked)}\nWrite a long story about these numbers."
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": self.answered}
            status, _ = first_token(self.pi, self.key, "/v1/chat/completions", body)
            self.answers += status == 200
            if status != 200:
                self.ended.wait(1.0)

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()


def typed(pi: Daemon, start: int, count: int) -> list[float]:
    times = []
    for number in range(start, start + count):
        source = (LIBRARY / f"{MODULES[number % len(MODULES)]}.py").read_text()
        at = 1500 + 37 * number
        body = {"input_prefix": source[at - 1500 : at], "input_suffix": source[at : at + 500], "n_predict": 32}
        status, seconds = first_token(pi, "familys-key", "/infill", body)
        assert status == 200, status
        times.append(seconds)
        time.sleep(PAUSE_SECONDS)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen_0_5b")
    parser.add_argument("--infills", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"quiet": [], "flood": []}
    guest_answers, number = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "client-keys").write_text("family familys-key\nguest guests-key 1\n")
        vps = {"CEREBRUM_MODELS_DIR": str(MODELS), "CEREBRUM_MAX_CPU_PERCENT": "100"}
        with daemon("vpsd", folder / "vps", inherited=inherited(), **vps) as backend:
            url = f"http://127.0.0.1:{backend.port}"
            keys = {"CEREBRUM_CM4_KEYS_FILE": str(folder / "client-keys"), "CEREBRUM_API_KEY": KEY}
            with daemon("cm4d", folder / "pi", CEREBRUM_VPS_URL=url, **keys) as pi:
                typed(pi, 1000, 2)  # loads the model
                for _ in range(options.rounds):
                    quiet, flood = ("familys-key", 1, 50, 500), ("guests-key", GUESTS, 2000, 60)
                    for house, crowd_of in (("quiet", quiet), ("flood", flood)):
                        with Crowd(pi, *crowd_of) as crowd:
                            times[house] += typed(pi, number, options.infills // options.rounds)
                            number += options.infills // options.rounds
                        guest_answers += crowd.answers * (house == "flood")
    told: dict[str, Any] = {}
    for house, seconds in times.items():
        told[house] = [round(statistics.median(seconds), 3), round(statistics.quantiles(seconds, n=10)[8], 3)]
    told |= {"ratio": round(told["flood"][0] / told["quiet"][0], 2), "guest_answers": guest_answers}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
