"""Someone types in an editor: what llama.vim asks for, through both daemons, with real weights.

    python tests/bench/editor.py [--seconds 60] [--keys 6] [--model qwen_0_5b] [--suggest often]
        [--file PATH]

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

import servers
from harness import PATIENCE, Daemon

LINES_BEFORE, LINES_AFTER = 64, 32
PAUSES = 8  # characters typed on average between two pauses
PAUSE_SECONDS = 1.5
KEY_LINES = 3
FILE = "textwrap.py"


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
        lines = self.before.splitlines(keepends=True)
        body = {
            "input_prefix": "".join(lines[-self.lines_before : -1]),
            "prompt": lines[-1] if lines else "",
        }
        body |= {
            "input_suffix": "".join(self.after.splitlines(keepends=True)[: self.lines_after]),
            "model": self.model,
        }
        body |= {
            "n_predict": 64,
            "t_max_predict_ms": 1000,
            "cache_prompt": True,
            "temperature": 0,
            **self.more,
        }
        self.connection.request("POST", "/infill", json.dumps(body), {"User-Agent": "llama.vim"})
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, AttributeError, ValueError):
            response = self.connection.getresponse()
            answer = json.loads(response.read())
            self.seconds = time.perf_counter() - self.began
            self.status, self.answer = response.status, answer

    def result(self) -> Infill:
        self.thread.join()
        return self

    def leave(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            self.connection.sock.shutdown(2)

    @property
    def text(self) -> str:
        return str(self.answer.get("content", ""))


def typing(port: int, pi: Daemon, options: argparse.Namespace) -> dict[str, Any]:
    source = Path(options.file).read_text()
    # Of our own file two methods are typed, of another one the middle third of its lines.
    middle = [
        len("".join(source.splitlines(keepends=True)[: source.count("\n") * third // 3]))
        for third in (1, 2)
    ]
    places = [source.find(f"\n    def {name}(") for name in ("_split", "_wrap_chunks")]
    position, end_of_gap = middle if -1 in places else places
    after, model, more = source[end_of_gap:], options.model, {"suggest": options.suggest}
    generator, end, memory = random.Random(1), time.monotonic() + options.seconds, pi.rss_kb()
    requests, pauses = list[Infill](), list[float]()
    while time.monotonic() < end and position < len(source) - 100:
        position += 1
        last = Infill(port, model, source[:position], after, more)
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
        "right": sum(
            source.startswith(one.text.partition("\n")[0] + "\n", len(one.before)) for one in seen
        ),
        "type_through": sum("type_through" in answer.answer for answer in seen),
        "errors": sum(answer.status not in (0, 200) for answer in answers),
        "after_pause_ms": round(statistics.median(pauses), 1),
        "grown_kb": pi.rss_kb() - memory,
    }


def keys(port: int, model: str, limit_ms: int) -> dict[str, Any]:
    lines = (Path(sysconfig.get_path("stdlib")) / FILE).read_text().splitlines(keepends=True)
    before, after = "".join(lines[80:200]), "".join(lines[200:260])
    generator, times, computed = random.Random(limit_ms), [], []
    for _ in range(KEY_LINES):
        words = [
            "".join(generator.choices("abcdefghiklmnoprstuvw", k=generator.randint(3, 9)))
            for _ in range(5)
        ]
        line = "        {} = self.{}({}[{}:], {})\n".format(*words)
        for typed in range(8, len(line)):
            more = {"n_predict": 1, "t_max_prompt_ms": limit_ms}
            asked = Infill(
                port, model, before + line[:typed], after, more, lines_before=121, lines_after=60
            ).result()
            times.append(1000 * asked.seconds)
            computed.append(asked.answer["timings"]["prompt_n"])
        before += line
    times.sort()
    places = {"p50_ms": len(times) // 2, "p90_ms": len(times) * 9 // 10, "worst_ms": len(times) - 1}
    found = {name: round(times[place], 1) for name, place in places.items()}
    return {"keys": len(times), **found, "computed": statistics.median(computed)}


def main() -> None:
    file = str(Path(sysconfig.get_path("stdlib")) / FILE)
    given: dict[str, Any] = {
        "seconds": 60.0,
        "keys": 6.0,
        "model": "qwen_0_5b",
        "suggest": "often",
        "file": file,
    }
    options = servers.parser_of(__doc__, **given).parse_args()
    servers.weights_of(options.model)
    with contextlib.ExitStack() as stack:
        _, pi = servers.both(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        Infill(pi.port, options.model, "x", "").result()  # loads the model
        result = {"keys": {str(limit): keys(pi.port, options.model, limit) for limit in (500, 0)}}
        result["typing"] = typing(pi.port, pi, options)
    print(json.dumps({"benchmark": "editor", "model": options.model, **result}))


if __name__ == "__main__":
    main()
