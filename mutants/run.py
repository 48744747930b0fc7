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
    "tests/pi/test_backends.py",
    "cerebrum/pi/broadcast.py": f"tests/pi/test_speculative.py {PI}",
    "cerebrum/pi/upstream.py": "tests/pi/test_upstream.py tests/pi/test_cm4d.py "
    "tests/pi/test_backends.py",
    "cerebrum/pi/dialects.py": "tests/pi/test_dialects.py tests/pi/test_plugins.py "
    "tests/pi/test_routing.py tests/pi/test_backends.py tests/pi/test_editors.py",
    **dict.fromkeys(
        (
            "cerebrum/pi/completion.py",
            "cerebrum/pi/engines.py",
            "cerebrum/pi/kind.py",
            "cerebrum/pi/native.py",
        ),
        "tests/pi/test_backends.py tests/pi/test_upstream.py tests/pi/test_routing.py",
    ),
    **dict.fromkeys(
        (
            "cerebrum/text/ending.py",
            "cerebrum/text/fences.py",
            "cerebrum/text/gap.py",
            "cerebrum/text/scanner.py",
            "cerebrum/text/stages.py",
        ),
        "tests/text/test_ending.py tests/text/test_syntaxes.py",
    ),
    "cerebrum/text/languages.py": "tests/text/test_languages.py tests/text/test_prepare.py "
    "tests/text/test_ending.py tests/text/test_syntaxes.py",
    "cerebrum/text/prompt.py": "tests/text/test_prepare.py",
    "cerebrum/vps/drafts.py": "tests/vps/test_engine.py",
    "cerebrum/vps/schedule.py": "tests/vps/test_engine.py",
    "cerebrum/vps/prefixes.py": VPS,
    "cerebrum/vps/worker.py": VPS,
    "cerebrum/vps/decoder.py": f"tests/vps/test_draft_model.py {VPS}",
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


def rows_of(file: Path) -> list[list[str]]:
    return [line.split("\t") for line in file.read_text().splitlines()]


def lists() -> dict[str, list[Mutant]]:
    found = dict[str, list[Mutant]]()
    for path, tests in ROOMS.items():
        rows = rows_of(list_of(path))
        found[path] = [Mutant(path, int(copy), line, new, tests) for copy, line, new in rows]
    for file in sorted((LISTS / "by_hand").glob("*.tsv")):
        found[file.stem] = []
        for row in rows_of(file):
            path, copy, line, new, tests = (field.replace("⇥", "\t") for field in row)
            found[file.stem].append(Mutant(path, int(copy), line, new, tests))
    return found


def mutated(source: str, mutant: Mutant) -> str | None:
    """None if the line has gone."""
    lines = source.split("\n")
    copies = [number for number, line in enumerate(lines) if line == mutant.line]
    if len(copies) < mutant.copy:
        return None
    lines[copies[mutant.copy - 1]] = mutant.new
    return "\n".join(lines)


def passes(tree: Path, tests: str, seconds: float | None = None) -> bool:
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    options = {"cwd": tree, "env": environ, "start_new_session": True}
    with subprocess.Popen(command, **silent, **options) as process:
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
        self.results = results
        self.trees = SimpleQueue[Path]()
        self.limits = dict[str, float]()
        results.parent.mkdir(parents=True, exist_ok=True)
        results.touch()
        lines = results.read_text().splitlines()
        self.known = dict(line.rsplit("\t", 1) for line in lines)
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        for number in range(WORKERS):
            tree = shutil.copytree(ROOT, folder / str(number), ignore=ignored)
            self.trees.put(Path(tree))

    def run(self, mutants: list[Mutant]) -> Counter[str]:
        needed = {mutant.tests for mutant in mutants if mutant.key() not in self.known}
        for tests in needed - self.limits.keys():
            self.limits[tests] = self.limit_of(tests)
        with ThreadPoolExecutor(WORKERS) as pool:
            return Counter(pool.map(self.outcome, mutants))

    def limit_of(self, tests: str) -> float:
        """The seconds that these tests may take with a mutant."""
        tree = self.trees.get()
        begun = time.monotonic()
        if not passes(tree, tests):
            sys.exit(f"{tests}: they fail without a mutant")
        self.trees.put(tree)
        return SLOWER * (time.monotonic() - begun) + 20

    def outcome(self, mutant: Mutant) -> str:
        source = (ROOT / mutant.path).read_text()
        new = mutated(source, mutant)
        if new is None:
            return "gone"
        key = mutant.key()
        if key not in self.known:
            tree = self.trees.get()
            file = tree / mutant.path
            file.write_text(new)
            survived = passes(tree, mutant.tests, self.limits[mutant.tests])
            file.write_text(source)
            self.trees.put(tree)
            self.known[key] = "survived" if survived else "caught"
            with self.results.open("a") as results:
                results.write(f"{key}\t{self.known[key]}\n")
        if self.known[key] == "survived":
            change = f"- {mutant.line.strip()}\n+ {mutant.new.strip()}"
            print(f"{mutant.path}: survived\n{change}", flush=True)
        return self.known[key]


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--results", type=Path, default=ROOT / ".run/mutants.tsv")
    what = "a file of the product, or a name of by_hand"
    parser.add_argument("lists", nargs="*", metavar="LIST", help=what)
    options = parser.parse_args()
    chosen = lists()
    if options.lists:
        chosen = {name: mutants for name, mutants in chosen.items() if name in options.lists}
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), options.results)
        table = {name: runner.run(mutants) for name, mutants in chosen.items()}
    print("\n| list | caught | survived | gone |\n|---|---|---|---|")
    for name, counts in table.items():
        print(f"| `{name}` | {counts['caught']} | {counts['survived']} | {counts['gone']} |")


if __name__ == "__main__":
    main()
