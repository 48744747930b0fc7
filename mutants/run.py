#!/usr/bin/env python3
"""Runs mutants of the product, each against the tests that know its place: one that they pass is a
missing test.

    .venv/bin/python mutants/run.py [--results FILE] [LIST ...]     (make mutants)

A list is a file of this folder, a mutant a line of it, with tabs between its fields: the number of
the line among its copies (the first is 1), the line, and the line instead of it. `draw.py` made
those named after a file of the product; `by_hand` is for places that it does not reach: there a
line begins with the file and ends with pytest arguments, and ⇥ is a tab of the product's line.

Prints each survivor, and a table of the lists. The outcomes go to a file, and those that are in it
are not run again. A mutant is caught if a test fails, or if the tests take five times as long as
without it; `gone` if the line is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

LISTS = Path(__file__).resolve().parent
ROOT = LISTS.parent
PI = "tests/pi/test_routing.py tests/pi/test_editors.py tests/pi/test_household.py"
VPS = "tests/vps/test_engine.py tests/vps/test_families.py tests/vps/test_vpsd.py"
# The tests that know each file. The first that fails ends the run, so the quickest come first.
ROOMS = {
    "cerebrum/http.py": "tests/test_wire.py tests/test_load.py tests/test_metrics.py",
    "cerebrum/pi/dispatcher.py": f"tests/pi/test_dispatcher.py {PI} tests/pi/test_cm4d.py "
    f"tests/pi/test_backends.py",
    "cerebrum/pi/broadcast.py": PI,
    "cerebrum/pi/upstream.py": "tests/pi/test_upstream.py tests/pi/test_cm4d.py "
    "tests/pi/test_backends.py",
    "cerebrum/pi/dialects.py": "tests/pi/test_dialects.py tests/pi/test_plugins.py "
    "tests/pi/test_routing.py tests/pi/test_backends.py",
    "cerebrum/text/ending.py": "tests/text/test_ending.py tests/text/test_syntaxes.py",
    "cerebrum/text/scanner.py": "tests/text/test_ending.py tests/text/test_syntaxes.py",
    "cerebrum/vps/drafts.py": "tests/vps/test_engine.py",
    "cerebrum/vps/schedule.py": "tests/vps/test_engine.py",
    "cerebrum/vps/prefixes.py": VPS,
    "cerebrum/vps/worker.py": VPS,
    "cerebrum/vps/decoder.py": VPS,
    "cerebrum/vps/job.py": VPS,
    "cerebrum_lsp.py": "tests/test_lsp.py",
}
SLOWER, WORKERS = 5, 2
NOT_COPIED = (".git", ".venv", ".run", "dist", "__pycache__", "*.gguf")


class Mutant(NamedTuple):
    path: str
    copy: int
    line: str
    new: str
    tests: str  # arguments of pytest

    def key(self) -> str:
        return "\t".join((self.path, str(self.copy), self.line, self.new))


def list_of(path: str) -> Path:
    return LISTS / f"{path.replace('/', '.')}.tsv"


def lists() -> dict[str, list[Mutant]]:
    found = dict[str, list[Mutant]]()
    for path, tests in ROOMS.items():
        rows = [line.split("\t") for line in list_of(path).read_text().splitlines()]
        found[path] = [Mutant(path, int(copy), line, new, tests) for copy, line, new in rows]
    for file in sorted((LISTS / "by_hand").glob("*.tsv")):
        rows = [
            [part.replace("⇥", "\t") for part in line.split("\t")]
            for line in file.read_text().splitlines()
        ]
        found[file.stem] = [
            Mutant(path, int(copy), line, new, tests) for path, copy, line, new, tests in rows
        ]
    return found


def mutated(source: str, mutant: Mutant) -> str | None:
    """None if the line has gone."""
    lines = source.split("\n")
    places = [number for number, one in enumerate(lines) if one == mutant.line]
    if len(places) < mutant.copy:
        return None
    lines[places[mutant.copy - 1]] = mutant.new
    return "\n".join(lines)


def passes(tree: Path, tests: str, seconds: float | None = None) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    with subprocess.Popen(
        command,
        cwd=tree,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            return process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            return False


class Runner:
    """Owns the copies of the tree, the time that tests take without a mutant, and the file of
    outcomes.
    """

    def __init__(self, folder: Path, results: Path) -> None:
        self.results, self.trees, self.limits = results, SimpleQueue[Path](), dict[str, float]()
        results.parent.mkdir(parents=True, exist_ok=True)
        results.touch()
        self.known = dict(line.rsplit("\t", 1) for line in results.read_text().splitlines())
        for number in range(WORKERS):
            self.trees.put(
                Path(
                    shutil.copytree(
                        ROOT, folder / str(number), ignore=shutil.ignore_patterns(*NOT_COPIED)
                    )
                )
            )

    def run(self, mutants: list[Mutant]) -> Counter[str]:
        for tests in {
            mutant.tests for mutant in mutants if mutant.key() not in self.known
        } - self.limits.keys():
            tree, begun = self.trees.get(), time.monotonic()
            if not passes(tree, tests):
                sys.exit(f"{tests}: they fail without a mutant")
            self.limits[tests] = SLOWER * (time.monotonic() - begun) + 20
            self.trees.put(tree)
        with ThreadPoolExecutor(WORKERS) as pool:
            return Counter(pool.map(self.outcome, mutants))

    def outcome(self, mutant: Mutant) -> str:
        source = (ROOT / mutant.path).read_text()
        if (new := mutated(source, mutant)) is None:
            return "gone"
        if mutant.key() not in self.known:
            tree = self.trees.get()
            (tree / mutant.path).write_text(new)
            survived = passes(tree, mutant.tests, self.limits[mutant.tests])
            (tree / mutant.path).write_text(source)
            self.trees.put(tree)
            self.known[mutant.key()] = "survived" if survived else "caught"
            with self.results.open("a") as results:
                results.write(f"{mutant.key()}\t{self.known[mutant.key()]}\n")
        if self.known[mutant.key()] == "survived":
            print(
                f"{mutant.path}: survived\n- {mutant.line.strip()}\n+ {mutant.new.strip()}",
                flush=True,
            )
        return self.known[mutant.key()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / ".run/mutants.tsv")
    parser.add_argument(
        "lists", nargs="*", metavar="LIST", help="a file of the product, or a name of by_hand"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), options.results)
        table = {
            name: runner.run(found)
            for name, found in lists().items()
            if name in options.lists or not options.lists
        }
    print("\n| list | caught | survived | gone |\n|---|---|---|---|")
    for name, counts in table.items():
        print(f"| `{name}` | {counts['caught']} | {counts['survived']} | {counts['gone']} |")


if __name__ == "__main__":
    main()
