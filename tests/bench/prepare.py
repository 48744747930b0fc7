"""How long preparing a prompt takes, and how long one keeps the Pi's event loop.

    python tests/bench/prepare.py

Prints one line of JSON. `ms_100_kb` is the best of several runs. `stall_ms` is the longest time
between two ticks of the Pi's event loop for each body of tests/pi/test_stalls.py: wall time, the
least of five.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
import timeit
from functools import partial

from servers import ROOT

sys.path.insert(0, f"{ROOT}/tests/pi")
import test_stalls

from cerebrum.text.prompt import prepare

BUDGET = 3500
TARGETS = {"ms_100_kb": 10, "stall_ms": 50}
RUNS = 30


def main():
    fields = {"language": "python", "prompt": test_stalls.PYTHON[:100_000]}
    seconds = timeit.repeat(partial(prepare, fields, "complete", BUDGET), number=1, repeat=RUNS)
    logging.disable()
    stalls = asyncio.run(test_stalls.stalls(time.perf_counter))
    stall_ms = {name: round(1000 * wall, 1) for name, (_, wall, _) in stalls.items()}
    result = {"ms_100_kb": round(1000 * min(seconds), 2), "stall_ms": stall_ms}
    print(json.dumps(result | {"targets": TARGETS}))


if __name__ == "__main__":
    main()
