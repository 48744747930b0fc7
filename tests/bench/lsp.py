"""What the language server adds to an answer of the Pi.

    python tests/bench/lsp.py

Prints one line of JSON: milliseconds of an answer, median and 90 %: asked directly, by /infill of a
Pi that answers at once, and in turns through the language server, in a file of 60 KB; and the
difference of the medians.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import servers
from scripted import in_a_thread
from test_lsp import INVOKED, Pi, editing

ROUNDS = 300


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


def main():
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"benchmark": "lsp", **added(Path(folder))}))


if __name__ == "__main__":
    main()
