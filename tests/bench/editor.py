"""Someone types in an editor: what llama.vim asks for, through both daemons, with real weights.

    python tests/bench/editor.py [--seconds 60] [--keys 6] [--model qwen_0_5b] [--suggest often]
        [--file PATH] [--turns 0] [--places 20] [--lines 64] [--pairs 9]

Prints one line of JSON:

    typing        A file, by default of the standard library, is typed, --keys characters a second,
                  with pauses as people make them. Each key asks for an infill and abandons the
                  request before it. (llama.vim waits for its running request.) `seen`: answers with
                  text that came before the next key, `right`: those whose first line is what is
                  typed next; `after_pause_ms`: from the last key before a pause to its answer;
                  `errors`: answers other than 200
    keys          milliseconds to one token after each key of a line that nobody could predict,
                  typed between 120 lines and 60 lines: with llama.vim's limit for the prompt (500
                  ms), and without a limit. `computed`: prompt tokens read for a key, median
    accepting     with --turns: as typing, but a hint that is right as a whole is taken after a
                  second's look, in turns without (`plain`) and with (`ahead`) a speculative request
                  for the text behind each hint that is shown. `cpu`: seconds of both daemons for
                  each accepted character
    next_ms       at --places of the file, each with --lines before the cursor and half as many
                  behind it: from taking a hint after a second's look to the next hint, without
                  and with such a request; medians of the places where the model needs up to a
                  second for it (`fast`), and of the others (`slow`), of so many each
    other         the time to the first token of another client's infill, with a speculative request
                  under way over without one, median of --pairs
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import statistics
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import servers
from harness import PATIENCE, Daemon

from cerebrum_lsp import Gap, Suggestion, Suggestions

LINES_BEFORE, LINES_AFTER = 64, 32
PAUSES = 8  # characters typed on average between two pauses
PAUSE_SECONDS = 1.5
LOOK_SECONDS = 1.0
KEY_LINES = 3
FILE = Path(sysconfig.get_path("stdlib")) / "textwrap.py"
LETTERS = "abcdefghiklmnoprstuvw"
OPTIONS = {
    "seconds": 60.0,
    "keys": 6.0,
    "model": "qwen_0_5b",
    "suggest": "often",
    "file": str(FILE),
    "turns": 0,
    "places": 20,
    "lines": 64,
    "pairs": 9,
}
# What each request of llama.vim has.
LLAMA_VIM: dict[str, Any] = {
    "n_predict": 64,
    "t_max_predict_ms": 1000,
    "cache_prompt": True,
    "temperature": 0,
}


@dataclass
class Infill:
    """One request as llama.vim makes it. `leave` abandons it."""

    port: int
    model: str
    before: str
    after: str
    more: dict[str, Any] = field(default_factory=dict)
    lines_before: int = LINES_BEFORE
    lines_after: int = LINES_AFTER
    status: int = 0
    answer: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        before = self.before.splitlines(keepends=True)[-self.lines_before :]
        after = self.after.splitlines(keepends=True)[: self.lines_after]
        body = {"model": self.model, "input_suffix": "".join(after), **LLAMA_VIM, **self.more}
        body["prompt"] = before.pop() if before else ""
        body["input_prefix"] = "".join(before)
        self.connection.request("POST", "/infill", json.dumps(body), {"User-Agent": "llama.vim"})
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError, ValueError):
            response = self.connection.getresponse()
            answer = json.loads(response.read())
            self.seconds = time.perf_counter() - self.began
            self.status = response.status
            self.answer = answer

    def result(self) -> Infill:
        self.thread.join()
        return self

    def leave(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.connection.sock.shutdown(2)

    @property
    def text(self) -> str:
        return str(self.answer.get("content", ""))

    def is_right(self, source: str) -> bool:
        """Whether the first line of the answer is what is typed next in `source`."""
        first = self.text.partition("\n")[0]
        return source.startswith(f"{first}\n", len(self.before))


def typed_part(source: str) -> tuple[int, int]:
    """Of our own file two methods are typed, of another one the middle third of its lines."""
    methods = [source.find(f"\n    def {name}(") for name in ("_split", "_wrap_chunks")]
    if -1 not in methods:
        return methods[0], methods[1]
    lines = source.splitlines(keepends=True)
    count = source.count("\n")
    return len("".join(lines[: count // 3])), len("".join(lines[: count * 2 // 3]))


def typing(pi: Daemon, options: argparse.Namespace) -> dict[str, Any]:
    source = Path(options.file).read_text()
    position, end_of_gap = typed_part(source)
    after = source[end_of_gap:]
    more = {"suggest": options.suggest}
    generator = random.Random(1)
    end = time.monotonic() + options.seconds
    memory = pi.rss_kb()
    requests = list[Infill]()
    pauses = list[float]()
    while time.monotonic() < end and position < len(source) - 100:
        position += 1
        last = Infill(pi.port, options.model, source[:position], after, more)
        requests.append(last)
        if generator.random() < 1 / PAUSES:
            pauses.append(1000 * last.result().seconds)
            time.sleep(PAUSE_SECONDS)
        else:
            time.sleep(generator.uniform(0.5, 1.5) / options.keys)
        last.leave()
    answers = [request.result() for request in requests]
    seen = [answer for answer in answers if answer.text.strip()]
    return {
        "keys": len(answers),
        "seen": len(seen),
        "right": sum(answer.is_right(source) for answer in seen),
        "type_through": sum("type_through" in answer.answer for answer in seen),
        "errors": sum(answer.status not in (0, 200) for answer in answers),
        "after_pause_ms": round(statistics.median(pauses), 1),
        "grown_kb": pi.rss_kb() - memory,
    }


def unforeseen_line(generator: random.Random) -> str:
    words = list[str]()
    for _ in range(5):
        letters = generator.choices(LETTERS, k=generator.randint(3, 9))
        words.append("".join(letters))
    return "        {} = self.{}({}[{}:], {})\n".format(*words)


def keys(port: int, model: str, limit_ms: int) -> dict[str, Any]:
    lines = FILE.read_text().splitlines(keepends=True)
    before = "".join(lines[80:200])
    after = "".join(lines[200:260])
    more = {"n_predict": 1, "t_max_prompt_ms": limit_ms}
    generator = random.Random(limit_ms)
    times = list[float]()
    computed = list[int]()
    for _ in range(KEY_LINES):
        line = unforeseen_line(generator)
        for typed in range(8, len(line)):
            asked = Infill(port, model, before + line[:typed], after, more, 121, 60).result()
            times.append(round(1000 * asked.seconds, 1))
            computed.append(asked.answer["timings"]["prompt_n"])
        before += line
    times.sort()
    return {
        "keys": len(times),
        "p50_ms": times[len(times) // 2],
        "p90_ms": times[len(times) * 9 // 10],
        "worst_ms": times[-1],
        "computed": statistics.median(computed),
    }


@dataclass
class Typist:
    """Someone who takes right hints. `is_ahead`: her editor asks ahead."""

    pi: Daemon
    vps: Daemon
    options: argparse.Namespace
    is_ahead: bool
    keys: int = 0
    seen: int = 0
    taken: int = 0
    characters: int = 0
    cpu: float = 0.0

    def ask(self, before: str, after: str, **more: Any) -> Infill:
        more = {"suggest": self.options.suggest, **more}
        lines = self.options.lines
        return Infill(self.pi.port, self.options.model, before, after, more, lines, lines // 2)

    def type(self, before: str, rest: str, after: str, generator: random.Random) -> None:
        """Type `rest` between two texts."""
        self.ask(before, after).result()  # the file is open
        cpu = cpu_of(self.pi) + cpu_of(self.vps)
        end = time.monotonic() + self.options.seconds
        while time.monotonic() < end and rest:
            request = self.ask(before, after)
            interval = generator.uniform(0.5, 1.5) / self.options.keys
            if generator.random() < 1 / PAUSES:
                interval += PAUSE_SECONDS
            request.thread.join(interval)
            text = request.text
            is_hint = bool(text.strip())
            self.keys += 1
            self.seen += is_hint
            if self.is_ahead and is_sure(request.answer):
                self.ask(before + text, after, speculative=True)
            if is_hint and rest.startswith(text):
                time.sleep(LOOK_SECONDS)
                before += text
                rest = rest.removeprefix(text)
                self.taken += 1
                self.characters += len(text)
            else:
                time.sleep(max(0.0, interval - request.seconds) if request.seconds else 0.0)
                request.leave()
                before, rest = before + rest[0], rest[1:]
        self.cpu += cpu_of(self.pi) + cpu_of(self.vps) - cpu

    def result(self) -> dict[str, Any]:
        return {
            "keys": self.keys,
            "seen": self.seen,
            "taken": self.taken,
            "cpu": round(self.cpu / max(1, self.characters), 4),
        }


def is_sure(answer: dict[str, Any]) -> bool:
    """Whether the language server asks ahead behind this hint."""
    hint = answer.get("content"), answer.get("chance") or 0.0, bool(answer.get("unsure"))
    found, suggestions = Suggestion(*hint), Suggestions()
    suggestions.add(Gap("", "", ""), found, 0.4)
    return suggestions.behind(found) is not None


def next_hints(typist: Typist) -> dict[str, Any]:
    options = typist.options
    source = Path(options.file).read_text()
    position, end_of_gap = typed_part(source)
    step = (end_of_gap - position) // options.places
    after = source[end_of_gap:]
    fast, slow = list[float](), list[float]()
    for place in range(position, position + step * options.places, step):
        # A line that neither daemon remembers, the last whole one.
        above, below = source[:place].rpartition("\n")[::2]
        before = f"{above}\n# {place} {typist.is_ahead}\n{below}"
        text = typist.ask(before, after).result().text
        if not text.strip():
            continue
        behind = None
        if typist.is_ahead:
            behind = typist.ask(before + text, after, speculative=True)
        time.sleep(LOOK_SECONDS)
        taken = typist.ask(before + text, after).result()
        needed = behind.result().seconds if behind else taken.seconds
        if taken.text.strip():
            times = fast if needed <= LOOK_SECONDS else slow
            times.append(1000 * taken.seconds)
    return {
        "fast": round(statistics.median(fast or [0.0]), 1),
        "slow": round(statistics.median(slow or [0.0]), 1),
        "of": (len(fast), len(slow)),
    }


def cpu_of(daemon: Daemon) -> float:
    """The seconds that a daemon has computed."""
    used = psutil.Process(daemon.process.pid).cpu_times()
    return float(used.user + used.system)


def accepting(typists: dict[str, Typist], options: argparse.Namespace) -> dict[str, Any]:
    source = Path(options.file).read_text()
    position, end_of_gap = typed_part(source)
    for turn in range(options.turns):
        for typist in typists.values():
            # Each time in a text that neither daemon remembers.
            line = f"# {turn} {typist.is_ahead}\n"
            parts = source[:position] + line, source[position:end_of_gap], source[end_of_gap:]
            typist.type(*parts, random.Random(turn))
    return {name: typist.result() for name, typist in typists.items()}


def other(port: int, model: str, pairs: int) -> float:
    """What a speculative request under way costs another client."""
    lines = FILE.read_text().splitlines(keepends=True)
    ratios = list[float]()
    more = {"n_predict": 1, "t_max_prompt_ms": 0, "filename": "other.py"}
    for pair in range(pairs):
        seconds = dict[bool, float]()
        for is_ahead in (pair % 2 == 0, pair % 2 == 1):
            text = f"# {pair} {is_ahead}\n" + "".join(lines[160:200])
            if is_ahead:
                behind = "".join(lines[: 100 + pair])
                request = Infill(port, model, behind, "", {"speculative": True})
                time.sleep(0.3 + 0.1 * pair)  # it reads, or it writes
            asked = Infill(port, model, text, "".join(lines[200:220]), more).result()
            seconds[is_ahead] = asked.seconds
            if is_ahead:
                request.result()
            time.sleep(0.5)
        ratios.append(seconds[True] / seconds[False])
    return round(statistics.median(ratios), 3)


def main() -> None:
    options = servers.parser_of(__doc__, **OPTIONS).parse_args()
    servers.weights_of(options.model)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vps, pi = servers.both(stack, folder)
        Infill(pi.port, options.model, "x", "").result()  # loads the model
        if options.turns:
            typists = {
                "plain": Typist(pi, vps, options, is_ahead=False),
                "ahead": Typist(pi, vps, options, is_ahead=True),
            }
            hints = {name: next_hints(typist) for name, typist in typists.items()}
            result = {"next_ms": hints, "accepting": accepting(typists, options)}
            if options.pairs:
                result["other"] = other(pi.port, options.model, options.pairs)
            print(json.dumps({"benchmark": "editor", "model": options.model, **result}))
            return
        by_limit = {f"{limit}": keys(pi.port, options.model, limit) for limit in (500, 0)}
        result = {"keys": by_limit, "typing": typing(pi, options)}
    print(json.dumps({"benchmark": "editor", "model": options.model, **result}))


if __name__ == "__main__":
    main()
