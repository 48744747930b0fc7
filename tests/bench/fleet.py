"""Replicas of llama-server behind HAProxy, which finds a file's replica by the Pi's header.

    python tests/bench/fleet.py --llama-server BINARY [--keys 12]

Editors type in files of their own, through the Pi. The model is tiny and random, so what is read
again costs little, and is counted all the same. All replicas together have as many slots as the one
that they are compared with: half as many again as there are editors. Prints a line of JSON for

    one       one llama-server, without a balancer
    header    the replicas, by the header
    none      the replicas, in turn
    killed    as `header`; one replica is killed while they type, and later started again

with the share of the prompts' tokens that came from a cache, the median and the slowest hundredth
of an answer's seconds, the errors that editors saw before a text, and the texts that broke off; of
`killed`, also the shares before, while it was away and after its return, the seconds until the
share was back at nine tenths of the first, and the state of the Pi's breaker.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import servers
from engines import Engine, free_port, started
from families import Family, make
from harness import Daemon, daemon, program

EDITORS, REPLICAS = 40, 4
HEADER = "X-Session-Id"
CONTEXT = 8192  # tokens of a slot; a token of the tiny model is a byte
AWAY_SECONDS, AFTER_SECONDS = 8.0, 20.0
FIGURES = ["content", "timings/cache_n", "timings/prompt_n"]
CATALOG = """
[[models]]
id = "tiny"
name = "Tiny"
parameters = "1M"
quantization = "F16"
languages = ["python"]
file = "tiny.gguf"
[[backends]]
id = "fleet"
url = "http://127.0.0.1:{port}"
api = "llama.cpp"
max_concurrent = {places}
n_ctx = {context}
affinity_header = "{header}"
"""
BALANCER = """
global
    tune.bufsize 65536
defaults
    mode http
    timeout connect 2s
    timeout client 300s
    timeout server 300s
    retries 3
    option redispatch 1
    retry-on conn-failure empty-response 502
    option httpchk GET /health
frontend pi
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance {how}
    hash-type consistent sdbm avalanche
{servers}
"""


@dataclass
class Answer:
    """What an editor saw: when, for how long, and the tokens that were cached and read."""

    at: float
    seconds: float = 0
    cached: int = 0
    read: int = 0
    error: str = ""
    has_text: bool = False

    def take(self, said: dict[str, Any]):
        """Note an event."""
        self.has_text |= bool(said.get("content"))
        self.cached += said.get(FIGURES[1], 0)
        self.read += said.get(FIGURES[2], 0)
        if "error" in said:
            self.error = said["error"]["message"]


def share(answers: list[Answer]) -> float:
    """Of the tokens of prompts, those that were in a cache."""
    cached = sum(answer.cached for answer in answers)
    return round(cached / max(1, cached + sum(answer.read for answer in answers)), 3)


@dataclass
class Typist:
    """An editor with a file of its own. Each key asks for a text at the cursor."""

    url: str
    number: int
    answers: list[Answer] = field(default_factory=list)

    def __post_init__(self):
        self.letters = random.Random(self.number)
        lines = (f"value_{self.number}_{line} = {line * self.number}" for line in range(150))
        self.above = "\n".join(lines) + "\n"
        self.below = f"\nprint(value_{self.number}_1)\n"

    def press(self, client: httpx.Client):
        self.above += self.letters.choice("abcdefghijklmnopqrstuvwxyz")
        if self.letters.random() < 0.1:
            self.above += "\n"
        asked = {
            "input_prefix": self.above,
            "input_suffix": self.below,
            "prompt": "",
            "filename": f"file_{self.number}.py",
            "n_predict": 4,
            "suggest": "always",
            "temperature": 0.5,  # so that no earlier text answers
            "response_fields": FIGURES,
            "stream": True,
        }
        begun = time.monotonic()
        answer = Answer(begun)
        # An error's answer is one line, and the rest of a broken stream never comes.
        with (
            contextlib.suppress(httpx.RemoteProtocolError),
            client.stream("POST", f"{self.url}/infill", json=asked) as reply,
        ):
            for line in reply.iter_lines():
                answer.take(json.loads(line.removeprefix("data: ") or "{}"))
        answer.seconds = time.monotonic() - begun
        self.answers.append(answer)


def type_all(typists: list[Typist], done: Any) -> list[Answer]:
    """Everybody types until `done` of a typist; the answers in the order of their requests."""

    def run(typist: Typist):
        headers = {"User-Agent": f"editor {typist.number}"}
        with httpx.Client(headers=headers, timeout=300, trust_env=False) as client:
            while not done(typist):
                typist.press(client)
                time.sleep(typist.letters.uniform(0, 0.2))

    with ThreadPoolExecutor(len(typists)) as pool:
        list(pool.map(run, typists))
    # The first answer of each read its file.
    answers = chain.from_iterable(typist.answers[1:] for typist in typists)
    return sorted(answers, key=lambda answer: answer.at)


def replica(
    options: Any, folder: Path, model: Path, count: int
) -> contextlib.AbstractContextManager[Engine]:
    """One of `count` llama-servers. A hash does not give each of them the same number of files."""
    slots = math.ceil(1.5 * EDITORS / count)
    given = "--host 127.0.0.1 --offline --alias tiny --no-kv-unified -t 1 --cache-ram 0"
    # It cuts a gap's texts to the size of a batch.
    given += f" -c {CONTEXT * slots} -np {slots} -b {CONTEXT}"

    def command(port: int) -> list[str]:
        return [options.llama_server, "-m", str(model), "--port", str(port), *given.split()]

    return started(Engine("llama-server", folder, command, free_port(), ""))


@contextlib.contextmanager
def balanced(folder: Path, replicas: list[Engine], how: str) -> Iterator[int]:
    """HAProxy in front of the replicas; its port."""
    port = free_port()
    lines = [
        f"    server r{number} 127.0.0.1:{one.port} check weight 200 inter 500ms fall 2 rise 1"
        for number, one in enumerate(replicas)
    ]
    file = folder / "haproxy.cfg"
    file.write_text(BALANCER.format(port=port, how=how, servers="\n".join(lines)))
    say = f"echo listening on http://127.0.0.1:{port}; exec haproxy -db -q -f {file}"
    with program("haproxy", ["sh", "-c", say], folder, {"PATH": "/usr/sbin:/usr/bin:/bin"}):
        yield port


@contextlib.contextmanager
def house(options: Any, model: Path, how: str) -> Iterator[tuple[Daemon, list[Engine]]]:
    """The Pi, and its replicas: one without a balancer if `how` is empty."""
    count = REPLICAS if how else 1
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = [
            stack.enter_context(replica(options, folder / f"r{one}", model, count))
            for one in range(count)
        ]
        port = replicas[0].port
        if how:
            port = stack.enter_context(balanced(folder, replicas, how))
        catalog = folder / "models.toml"
        given = {"port": port, "places": 2 * EDITORS, "context": CONTEXT, "header": HEADER}
        catalog.write_text(CATALOG.format(**given))
        pi = stack.enter_context(
            daemon(
                "cm4d", folder / "pi", CEREBRUM_MODELS_FILE=str(catalog), CEREBRUM_CM4_API_KEY=""
            )
        )
        pi.wait_for_line("VPS backend is available")
        yield pi, replicas


def figures(name: str, answers: list[Answer]) -> dict[str, Any]:
    seconds = sorted(answer.seconds for answer in answers)
    return {
        "case": name,
        "cached": share(answers),
        "median_s": round(statistics.median(seconds), 3),
        "slowest_s": round(seconds[int(len(seconds) * 0.99)], 3),
        "errors": [answer.error for answer in answers if answer.error and not answer.has_text],
        "broken_off": sum(answer.has_text for answer in answers if answer.error),
    }


def compare(options: Any, model: Path):
    cases = {"one": "", "header": f"hdr({HEADER})", "none": "roundrobin"}
    for name, how in cases.items():
        with house(options, model, how) as (pi, _):
            url = f"http://127.0.0.1:{pi.port}"
            typists = [Typist(url, number) for number in range(EDITORS)]
            answers = type_all(typists, lambda typist: len(typist.answers) > options.keys)
        print(json.dumps(figures(name, answers)), flush=True)


def kill_one(options: Any, model: Path):
    with house(options, model, f"hdr({HEADER})") as (pi, replicas):
        url = f"http://127.0.0.1:{pi.port}"
        typists = [Typist(url, number) for number in range(EDITORS)]
        marks, ended = dict[str, float](), threading.Event()

        def trouble():
            while min(len(typist.answers) for typist in typists) < options.keys:
                time.sleep(0.1)
            marks["killed"] = time.monotonic()
            replicas[0].kill()
            time.sleep(AWAY_SECONDS)
            replicas[0].start()
            marks["back"] = time.monotonic()
            time.sleep(AFTER_SECONDS)
            ended.set()

        thread = threading.Thread(target=trouble)
        thread.start()
        answers = type_all(typists, lambda _: ended.is_set())
        thread.join()
        with httpx.Client(trust_env=False) as client:
            stats = client.get(f"{url}/v1/stats").json()
    before = [one for one in answers if one.at < marks["killed"]]
    away = [one for one in answers if marks["killed"] <= one.at < marks["back"]]
    after = [one for one in answers if one.at >= marks["back"]]
    figure = figures("killed", answers)
    figure |= {"before": share(before), "away": share(away), "after": share(after)}
    figure["back_s"] = seconds_back(after, marks["back"], 0.9 * share(before))
    print(json.dumps(figure | {"breaker": stats["breaker"]}))


def seconds_back(after: list[Answer], back: float, enough: float) -> int | None:
    """The first second from which on the share is good."""
    for second in range(int(AFTER_SECONDS)):
        rest = [answer for answer in after if answer.at >= back + second]
        here = [answer for answer in rest if answer.at < back + second + 2]
        if here and share(here) >= enough:
            return second
    return None


def main():
    options = servers.parser_of(__doc__, llama_server="", keys=12).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make(Path(folder) / "tiny.gguf", Family("qwen2", printable=True))
        compare(options, model)
        kill_one(options, model)


if __name__ == "__main__":
    main()
