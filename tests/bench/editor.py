"""Someone types in an editor: what llama.vim asks for, through both daemons, with real weights.

    python tests/bench/editor.py [--seconds 60] [--keys 6] [--model qwen_0_5b]

Prints one line of JSON:

    typing        A file of the standard library is typed, --keys characters a second, with pauses as people make them.
                  Each key asks for an infill and abandons the request before it. (llama.vim waits for its running
                  request.) `seen`: answers with text that came before the next key; `after_pause_ms`: from the last
                  key before a pause to its answer; `errors`: answers other than 200
    type_through  milliseconds of an answer that is the rest of the last completion
    keys          milliseconds to one token after each key of a line that nobody could predict, typed between 120 lines
                  and 60 lines: with llama.vim's limit for the prompt (500 ms), and without a limit. `computed`: prompt
                  tokens read for a key, median
    replaced      milliseconds from a newer infill of the file until vpsd has stopped to compute the older one, whose
                  prompt it was reading
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil
from harness import MODELS, PATIENCE, Daemon, daemon

LINES_BEFORE, LINES_AFTER = 64, 32
PAUSES = 8  # characters typed on average between two pauses
PAUSE_SECONDS = 1.5
ROUNDS = 20
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
        body = {"input_prefix": "".join(lines[-self.lines_before : -1]), "prompt": lines[-1] if lines else ""}
        body |= {"input_suffix": "".join(self.after.splitlines(keepends=True)[: self.lines_after]), "n_predict": 64}
        body |= {"t_max_predict_ms": 1000, "cache_prompt": True, "temperature": 0, "model": self.model, **self.more}
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


def typing(port: int, model: str, pi: Daemon, seconds: float, keys: float) -> dict[str, Any]:
    source = (Path(sysconfig.get_path("stdlib")) / FILE).read_text()
    start = source.index("\n    def _split(")
    after = source[source.index("\n    def _wrap_chunks(") :]
    generator, end = random.Random(1), time.monotonic() + seconds
    asked, seen, through, pauses, errors = 0, 0, 0, [], 0
    position, last, memory = start, None, pi.rss_kb()
    requests: list[Infill] = []
    while time.monotonic() < end and position < len(source) - 100:
        position += 1
        last = Infill(port, model, source[:position], after)
        requests.append(last)
        asked += 1
        if generator.random() < 1 / PAUSES:
            last.result()
            pauses.append(1000 * last.seconds)
            time.sleep(PAUSE_SECONDS)
        else:
            time.sleep(generator.uniform(0.5, 1.5) / keys)
        if last.text.strip():
            seen += 1
            through += "type_through" in last.answer
        last.leave()
    for request in requests:
        request.result()
        errors += request.status not in (0, 200)
    return {
        "keys": asked,
        "seen": seen,
        "type_through": through,
        "errors": errors,
        "after_pause_ms": round(statistics.median(pauses), 1),
        "grown_kb": pi.rss_kb() - memory,
    }


def type_through(port: int, model: str) -> dict[str, Any]:
    times = []
    for number in range(ROUNDS):
        before, after = f"def add_{number}(first, second):\n    return fir", "\n\n"
        text = Infill(port, model, before, after).result().text
        for typed in range(1, min(8, len(text))):
            served = Infill(port, model, before + text[:typed], after).result()
            assert (served.text, served.answer["type_through"]) == (text[typed:], True)
            times.append(1000 * served.seconds)
    return {"answers": len(times), "p50_ms": round(statistics.median(times), 2), "worst_ms": round(max(times), 2)}


def keys(port: int, model: str, limit_ms: int) -> dict[str, Any]:
    lines = (Path(sysconfig.get_path("stdlib")) / FILE).read_text().splitlines(keepends=True)
    before, after = "".join(lines[80:200]), "".join(lines[200:260])
    generator, times, computed = random.Random(limit_ms), [], []
    for _ in range(KEY_LINES):
        words = ["".join(generator.choices("abcdefghiklmnoprstuvw", k=generator.randint(3, 9))) for _ in range(5)]
        line = "        {} = self.{}({}[{}:], {})\n".format(*words)
        for typed in range(8, len(line)):
            more = {"n_predict": 1, "t_max_prompt_ms": limit_ms}
            asked = Infill(port, model, before + line[:typed], after, more, lines_before=121, lines_after=60).result()
            times.append(1000 * asked.seconds)
            computed.append(asked.answer["timings"]["prompt_n"])
        before += line
    times.sort()
    places = {"p50_ms": len(times) // 2, "p90_ms": len(times) * 9 // 10, "worst_ms": len(times) - 1}
    found = {name: round(times[place], 1) for name, place in places.items()}
    return {"keys": len(times), **found, "computed": statistics.median(computed)}


def replaced(port: int, model: str, vps: Daemon) -> dict[str, Any]:
    file = {"filename": "a.py"}
    server, times = psutil.Process(vps.process.pid), []

    def busy() -> float:
        used = server.cpu_times()
        return float(used.user + used.system)

    for number in range(ROUNDS // 2):
        lines = [f"value_{number}_{line} = compute(value_{number}_{line - 1}, {line})\n" for line in range(60)]
        before = "".join(lines) + "def add(first, second):\n    return fir"
        text = Infill(port, model, before, "\n\n", file).result().text
        fresh = "".join(line.replace("value", f"other_{number}") for line in lines)
        older = Infill(port, model, fresh + before, "\n\n", file)
        time.sleep(0.15)  # into its prompt
        begin = time.perf_counter()
        newer = Infill(port, model, before + text[:1], "\n\n", file)
        idle, quiet, spent = begin, 0, busy()
        while quiet < 3:
            time.sleep(0.01)  # the grain of the process's times
            now = busy()
            quiet, spent = (quiet + 1, now) if now - spent < 0.005 else (0, now)
            if not quiet:
                idle = time.perf_counter()
        assert older.result().text == ""
        newer.leave()
        times.append(1000 * (idle - begin))
    return {"p50_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1)}


def start_both(stack: contextlib.ExitStack, folder: Path, models: Path = MODELS) -> tuple[Daemon, Daemon]:
    """The VPS's daemon, with the models of a folder, and the Pi's, which asks for no key."""
    easy = {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MIN_FREE_MB": "0", "CEREBRUM_MODELS_DIR": str(models)}
    vps = stack.enter_context(daemon("vpsd", folder / "vpsd", inherited=os.environ, **easy))
    where = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{vps.port}", "CEREBRUM_CM4_API_KEY": ""}
    return vps, stack.enter_context(daemon("cm4d", folder / "cm4d", inherited=os.environ, **where))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--keys", type=float, default=6.0, help="a second")
    parser.add_argument("--model", default="qwen_0_5b")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        vps, pi = start_both(stack, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        Infill(pi.port, options.model, "x", "").result()  # loads the model
        result = {
            "type_through": type_through(pi.port, options.model),
            "keys": {str(limit): keys(pi.port, options.model, limit) for limit in (500, 0)},
            "replaced": replaced(pi.port, options.model, vps),
        }
        result["typing"] = typing(pi.port, options.model, pi, options.seconds, options.keys)
    print(json.dumps({"benchmark": "editor", "model": options.model, **result}))


if __name__ == "__main__":
    main()
