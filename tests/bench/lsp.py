"""What the language server adds, and what it saves: someone types in an editor that shows ghost text.

    python tests/bench/lsp.py [--seconds 60] [--keys 6] [--model qwen_0_5b]

Prints one line of JSON:

    added      milliseconds of an answer, median and 90 %: asked directly, by /infill of a Pi that answers at once, and
               in turns through the language server, in a file of 60 KB; and the difference of the medians
    cancelled  milliseconds from $/cancelRequest until the real Pi has no request any more, median and worst; the VPS
               was reading a prompt
    typing     A file of the standard library is typed, --keys characters a second, with pauses as people make them;
               after each key the editor asks for ghost text, and cancels its request before. `seen`: answers with text
               that came before the next key; `asked`: requests that reached the Pi; `after_pause_ms`: from the last key
               before a pause to its answer
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path
from queue import Empty
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from editor import FILE, PAUSE_SECONDS, PAUSES, start_both
from harness import FILES, PATIENCE, Daemon, wait_until
from test_lsp import AUTOMATIC, INVOKED, Editor, Pi, editing

ROUNDS, CANCELS = 300, 20


def asked(url: str, **body: Any) -> Any:
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=PATIENCE) as answer:
        return json.load(answer)


def added(folder: Path) -> dict[str, Any]:
    pi, times = Pi(), {"direct": list[float](), "through": list[float]()}
    text = "x = 1\n" * 10_000
    with editing(folder, pi.url) as editor:
        editor.start()
        editor.open(text)
        for number in range(ROUNDS):
            line = 5_000 + number
            editor.type(line, 0, "y")
            begin = time.perf_counter()
            assert editor.ghost(line, 1, INVOKED)
            middle = time.perf_counter()
            asked(f"{pi.url}/infill", input_prefix=text[: 6 * line] + "y", input_suffix=text[6 * line :], n_predict=128)
            times["through"].append(1000 * (middle - begin))
            times["direct"].append(1000 * (time.perf_counter() - middle))
    pi.shutdown()
    told: dict[str, Any] = {
        name: [round(statistics.median(one), 2), round(statistics.quantiles(one, n=10)[8], 2)]
        for name, one in times.items()
    }
    return told | {"added": round(told["through"][0] - told["direct"][0], 2)}


def cancelled(folder: Path, pi: Daemon) -> dict[str, Any]:
    url, times = f"http://127.0.0.1:{pi.port}", []
    with editing(folder, url) as editor:
        editor.start()
        for number in range(CANCELS):
            editor.open("".join(f"value_{number}_{line} = {line}\n" for line in range(200)))
            request = editor.at(100, 0, INVOKED)
            wait_until(lambda: asked(f"{url}/v1/stats")["requests_active"] == 1, "the Pi works on it")
            begin = time.perf_counter()
            editor.tell("$/cancelRequest", {"id": request})
            wait_until(lambda: asked(f"{url}/v1/stats")["requests_active"] == 0, "the Pi has ended it")
            times.append(1000 * (time.perf_counter() - begin))
            editor.answer(request)
    return {"p50_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1)}


def typing(folder: Path, pi: Daemon, seconds: float, keys: float) -> dict[str, Any]:
    source = (Path(sysconfig.get_path("stdlib")) / FILE).read_text()
    start, end = source.index("\n    def _split("), source.index("\n    def _wrap_chunks(")
    url, generator, deadline = f"http://127.0.0.1:{pi.port}", random.Random(1), time.monotonic() + seconds
    before = asked(f"{url}/v1/stats")["requests_total"]
    pauses, seen, typed = list[float](), 0, source[start:end]
    with editing(folder, url) as editor:
        editor.start()
        editor.open(source[:start] + source[end:])
        line, character = source[:start].count("\n"), len(source[:start].rpartition("\n")[2])
        count = 0
        for char in typed:
            if time.monotonic() > deadline:
                break
            editor.type(line, character, char, count)
            line, character, count = (line + 1, 0, count + 1) if char == "\n" else (line, character + 1, count + 1)
            begin, request = time.perf_counter(), editor.at(line, character, AUTOMATIC)
            paused = generator.random() < 1 / PAUSES
            text = shown(editor, request, PATIENCE if paused else generator.uniform(0.5, 1.5) / keys)
            if paused:
                pauses.append(1000 * (time.perf_counter() - begin))
                time.sleep(PAUSE_SECONDS)
            seen += bool(text.strip())
            editor.tell("$/cancelRequest", {"id": request})
    return {
        "keys": count,
        "seen": seen,
        "asked": asked(f"{url}/v1/stats")["requests_total"] - before,
        "after_pause_ms": round(statistics.median(pauses), 1),
    }


def shown(editor: Editor, request: int, seconds: float) -> str:
    """The ghost text if it comes in so many seconds, which pass in any case unless the typist waits for it."""
    end, text = time.monotonic() + seconds, ""
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(Empty):
            message = editor.came.get(timeout=left)
            if message.get("id") == request and (items := message.get("result", {}).get("items")) is not None:
                text = "".join(item["insertText"] for item in items)
                if seconds == PATIENCE:
                    break
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--keys", type=float, default=6.0, help="a second")
    parser.add_argument("--model", default="qwen_0_5b")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result: dict[str, Any] = {"added": added(folder)}
        models = folder / "models"  # the one alone: the language server leaves the choice to the Pi
        models.mkdir()
        (models / FILES[options.model].name).symlink_to(FILES[options.model])
        _, pi = start_both(stack, folder, models)
        asked(f"http://127.0.0.1:{pi.port}/infill", input_prefix="x", n_predict=1, model=options.model)  # loads it
        result["cancelled"] = cancelled(folder, pi)
        result["typing"] = typing(folder, pi, options.seconds, options.keys)
    print(json.dumps({"benchmark": "lsp", "model": options.model, **result}))


if __name__ == "__main__":
    main()
