#!/usr/bin/env python3
"""What the Pi's page costs: bytes, the daemon's memory with and without it, and the time to its first paint.

    tests/bench/page.py [--rounds 5] [--slower 6]

The browser is Debian's Chromium, driven by playwright, with its CPU slowed down as often as `--slower` says: a core of
a Pi is 4 to 8 times slower than one of a server. A round opens the page in a new context, so nothing is cached. Prints
one line of JSON; without a browser it has no times.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from harness import ROOT, copy_program, program, settings

PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? null"
PAGE = "cerebrum/pi/page.html"


def peak_kb(folder: Path, with_page: bool) -> int:
    """The peak memory of a daemon with a fresh copy of its files, after it was asked for its page and its state."""
    copy_program("cm4d", folder)
    if not with_page:
        (folder / PAGE).unlink()
    command = [sys.executable, "-u", "-s", "-S", str(folder / "cm4d.py")]
    with program("cm4d", command, folder, settings(folder, CEREBRUM_CM4_API_KEY="")) as daemon:
        for path in ("/", "/v1/activity", "/v1/models") * 20:
            if with_page or path != "/":
                urllib.request.urlopen(f"http://127.0.0.1:{daemon.port}{path}").read()
        return daemon.peak_rss_kb()


def memory(rounds: int) -> dict[str, Any]:
    peaks: dict[bool, list[int]] = {True: [], False: []}
    for with_page in [True, False] * rounds:
        with tempfile.TemporaryDirectory() as folder:
            peaks[with_page].append(peak_kb(Path(folder), with_page))
    return {"peak_kb": statistics.median(peaks[True]), "peak_kb_without": statistics.median(peaks[False])}


def paint(rounds: int, slower: float) -> list[float] | None:
    """Milliseconds from the navigation to the first paint with content; None without a browser."""
    chromium = shutil.which("chromium")
    if not (chromium and importlib.util.find_spec("playwright")):
        return None
    from playwright.sync_api import sync_playwright

    times = []
    with tempfile.TemporaryDirectory() as name, sync_playwright() as driver:
        folder = Path(name)
        command = [sys.executable, "-u", "-s", "-S", str(ROOT / "cm4d.py")]
        with program("cm4d", command, folder, settings(folder, CEREBRUM_CM4_API_KEY="")) as daemon:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            for _ in range(rounds):
                context = browser.new_context()
                page = context.new_page()
                context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": slower})
                page.goto(f"http://127.0.0.1:{daemon.port}/")
                while (painted := page.evaluate(PAINT)) is None:  # the policy forbids to wait by a script in the page
                    page.wait_for_timeout(5)
                times.append(float(painted))
                context.close()
            browser.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slower", type=float, default=6)
    options = parser.parse_args()
    times = paint(options.rounds, options.slower)
    painted = {"first_paint_ms": statistics.median(times), "slowest_paint_ms": max(times)} if times else {}
    told = {"benchmark": "page", "bytes": (ROOT / PAGE).stat().st_size, "slower": options.slower}
    print(json.dumps(told | memory(options.rounds) | painted))


if __name__ == "__main__":
    main()
