"""What the language server adds to an answer of the Pi, and how soon a cancelled request frees the
Pi.

    python tests/bench/lsp.py [--model qwen_0_5b]

Prints one line of JSON:

    added      milliseconds of an answer, median and 90 %: asked directly, by /infill of a Pi that
               answers at once, and in turns through the language server, in a file of 60 KB; and
               the difference of the medians
    cancelled  milliseconds from $/cancelRequest until the real Pi has no request any more, median
               and worst; the VPS was reading a prompt
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import servers
from harness import Daemon, wait_until, with_weights
from scripted import in_a_thread
from test_lsp import INVOKED, Pi, editing

ROUNDS, CANCELS = 300, 20


def added(folder: Path) -> dict[str, Any]:
    direct, through = list[float](), list[float]()
    text = "x = 1\n" * 10_000
    with in_a_thread(Pi()) as pi, editing(folder, pi.url) as editor:
        editor.start(text=text)
        for number in range(ROUNDS):
            line = 5_000 + number
            editor.type(line, 0, "y")
            begin = time.perf_counter()
            assert editor.ghost(line, 1, INVOKED)
            middle = time.perf_counter()
            before, after = text[: 6 * line] + "y", text[6 * line :]
            body = {"n_predict": 128, "input_prefix": before, "input_suffix": after}
            servers.ask(f"{pi.url}/infill", **body)
            through.append(1000 * (middle - begin))
            direct.append(1000 * (time.perf_counter() - middle))
    difference = round(median(through), 2) - round(median(direct), 2)
    return {
        "direct": figures(direct),
        "through": figures(through),
        "added": round(difference, 2),
    }


def figures(times: list[float]) -> list[float]:
    """The median, and the value that 90 % are below."""
    return [round(median(times), 2), round(quantiles(times, n=10)[8], 2)]


def cancelled(folder: Path, pi: Daemon) -> dict[str, Any]:
    url, times = f"http://127.0.0.1:{pi.port}", []
    with editing(folder, url) as editor:
        editor.start()
        for number in range(CANCELS):
            editor.open("".join(f"value_{number}_{line} = {line}\n" for line in range(200)))
            request = editor.at(100, 0, INVOKED)
            wait_until(lambda: active(url) == 1, "the Pi works on it")
            begin = time.perf_counter()
            editor.tell("$/cancelRequest", {"id": request})
            wait_until(lambda: active(url) == 0, "the Pi has ended it")
            times.append(1000 * (time.perf_counter() - begin))
            editor.answer(request)
    return {"p50_ms": round(median(times), 1), "worst_ms": round(max(times), 1)}


def active(url: str) -> int:
    return int(servers.ask(f"{url}/v1/stats")["requests_active"])


def main() -> None:
    model = servers.parser_of(__doc__, model="qwen_0_5b").parse_args().model
    servers.weights_of(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"added": added(folder)}
        # This model alone: the Pi chooses for the language server.
        with with_weights(folder, model, CEREBRUM_CM4_API_KEY="") as (pi, _):
            loading = {"input_prefix": "x", "n_predict": 1, "model": model}
            servers.ask(f"http://127.0.0.1:{pi.port}/infill", **loading)
            result["cancelled"] = cancelled(folder, pi)
    print(json.dumps({"benchmark": "lsp", "model": model, **result}))


if __name__ == "__main__":
    main()
