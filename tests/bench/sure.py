"""How well does the model's confidence tell right lines from wrong ones, and which threshold is
right?

    python tests/bench/sure.py FILE.jsonl [REPOSITORY…] [--model qwen_1_5b]
        [--kinds line,dot] [--cases 300]
    python tests/bench/sure.py FILE.jsonl --learn REPOSITORY,… [--model qwen_1_5b]   # the report

REPOSITORY is a folder with a git repository, bare or not; its files are those that were added in or
after 2025, so they are newer than the models. An answer goes into FILE.jsonl, and a later run asks
only for what is missing. Kinds:

    line      a line is cut where a word begins, up to three times, with 40 lines above and 11
              below; right if the first line of the answer is the rest of the line
    dot       the same, behind a dot
    complete  the same as `line`, without the text below
    gap       two to five whole lines are missing; each line of the answer, right if it and those
              above are the file's
    solution  two to five lines, missing from HumanEval's solutions (no repository); right if the
              tests pass

The report is one line of JSON. The repositories of --learn (by the names of their folders) give the
thresholds: the highest that keep 99, 97 and 90 % of the right lines of kind `line`. All others are
judged by them: for each kind and language the lines, the right ones, the area under the curve, and
for each threshold the share of the right and of the wrong lines that it hides, with 95 % intervals
(Wilson).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import signal
import subprocess
import sys
import urllib.request
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import servers
from quality import SPAN_TOKENS, Tiers, passes, problems, solution_gaps, start_both

SINCE = "2025-01-01"
LANGUAGES = {".py": "python", ".ts": "typescript", ".tsx": "typescript", ".go": "go", ".rs": "rust"}
UNUSUAL = re.compile(r"(?i)(^|[/_.-])(tests?|spec|docs?|gen|generated|migrations|vendor)([/_.-]|$)")
ABOVE, BELOW = 40, 11  # lines
MAX_FILE_BYTES = 200_000
MAX_LINES, MAX_CUTS = 3, 3  # of a file, of a line
TOKENS = 40
CUTS = {"dot": re.compile(r"\w\.(?=[A-Za-z_])"), "line": re.compile(r"(?<!\w)(?=\w)")}
KEPT = {"often": 0.99, "normal": 0.97, "seldom": 0.9}  # of the right lines
Case = dict[str, Any]  # the fields of a request, with `expected` and `key`
Row = dict[str, Any]  # of FILE.jsonl
Lines = list[tuple[bool, float]]  # whether each is right, and its confidence


# ---------------------------------------------------------------------------------------- the cases


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")


def new_files(repository: str) -> list[str]:
    """The paths of files that are not too small or large, shuffled."""
    renames = ("--name-only", "-M100%")
    added = git(repository, "log", f"--since={SINCE}", "--diff-filter=A", "--format=", *renames)
    sizes = dict[str, int]()
    for row in git(repository, "ls-tree", "-r", "-l", "HEAD").splitlines():
        *_, size, path = row.split(maxsplit=4)
        if size.isdigit():
            sizes[path] = int(size)
    paths = sorted(set(added.splitlines()))
    paths = [path for path in paths if 1000 < sizes.get(path, 0) < MAX_FILE_BYTES]
    random.Random(1).shuffle(paths)
    return paths


def cases(repository: str, kind: str) -> Iterator[list[Case]]:
    """The cases of one line after the other, each with what is `expected` and a `key`; always the
    same ones.
    """
    name = PurePosixPath(repository).name.removesuffix(".git")
    for path in new_files(repository):
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if not language or UNUSUAL.search(path):
            continue
        text = git(repository, "show", f"HEAD:{path}").replace("\r\n", "\n")
        lines = text.splitlines(keepends=True)
        gaps = gaps_of(lines, kind, random.Random(f"{path} {kind}"))
        for number, size, places in islice(gaps, MAX_LINES):
            of_line = [case_of(lines, number, size, place, kind) for place in places]
            for case, place in zip(of_line, places, strict=True):
                case |= {"key": f"{name} {path} {number} {place} {kind}", "language": language}
            yield of_line


def gaps_of(
    lines: list[str], kind: str, generator: random.Random
) -> Iterator[tuple[int, int, list[int]]]:
    """(number of a line, how many lines are missing from this one on, characters of it at which the
    gap may begin), in random order.
    """
    for number in generator.sample(range(len(lines)), len(lines)):
        size = generator.randint(2, 5) if kind == "gap" else 1
        lengths = [len(line.strip()) for line in lines[number : number + size]]
        if number < 20 or number + size + 3 > len(lines):
            continue
        if min(lengths) < 6 or max(lengths) > 100:
            continue
        line = lines[number]
        if kind == "gap":
            yield number, size, [len(line) - len(line.lstrip())]
            continue
        places = [match.end() for match in CUTS.get(kind, CUTS["line"]).finditer(line)]
        places = [place for place in places if len(line[place:].strip()) >= 4]
        if places:
            yield number, size, sorted(generator.sample(places, min(MAX_CUTS, len(places))))


def case_of(lines: list[str], number: int, size: int, cut: int, kind: str) -> Case:
    end = number + size
    prompt = "".join(lines[max(0, number - ABOVE) : number]) + lines[number][:cut]
    case = {"prompt": prompt, "expected": "".join(lines[number:end])[cut:].rstrip()}
    if kind != "complete":
        case["suffix"] = "\n" + "".join(lines[end : end + BELOW])
    return case


# -------------------------------------------------------------------------------------- the answers


def stream(tiers: Tiers, **body: Any) -> tuple[str, list[tuple[float, int]]]:
    """The text, and the confidence of each line with its end."""
    own = {"model": tiers.model, "temperature": 0, "heal": True, "min_confidence": 1e-9}
    request = servers.request(f"{tiers.vps}/v1/inference/stream", **own, **body)
    with urllib.request.urlopen(request, timeout=600) as response:
        lines = response.read().decode().splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data:")]
    text = "".join(event.get("token", "") for event in events)
    judged = [event for event in events if "characters" in event]
    return text, [(event["confidence"], event["characters"]) for event in judged]


def answer(tiers: Tiers, case: Case, kind: str) -> Lines:
    body = {name: case[name] for name in ("prompt", "suffix", "language") if name in case}
    expected = case["expected"]
    if kind == "gap":
        text, judged = stream(tiers, max_tokens=SPAN_TOKENS, **body)
        return [
            (f"{expected}\n".startswith(text[:end].rstrip() + "\n"), sure) for sure, end in judged
        ]
    text, judged = stream(tiers, max_tokens=TOKENS, stop=["\n"], **body)
    if not text.strip():
        return []
    first = text.partition("\n")[0].rstrip()
    return [(first == expected, judged[0][0] if judged else 0.0)]


def solution_rows(tiers: Tiers, count: int, known: set[str]) -> Iterator[Row]:
    for task, before, after in islice(solution_gaps(problems(), "lines"), count):
        row = {"key": f"HumanEval {task['task_id']} solution", "language": "python"}
        if row["key"] not in known:
            body = {"prompt": before, "suffix": after, "language": "python"}
            text, judged = stream(tiers, max_tokens=SPAN_TOKENS, **body)
            lines = [(passes(task, before + text + after), sure) for sure, _ in judged[:1]]
            yield row | {"kind": "solution", "lines": lines}


def ask(options: argparse.Namespace, known: set[str]) -> Iterator[Row]:
    with ExitStack() as stack:
        tiers = start_both(stack, options.model, published=False)
        for kind in options.kinds.split(","):
            if kind == "solution":
                yield from solution_rows(tiers, options.cases, known)
                continue
            turns = zip_longest(*(cases(repository, kind) for repository in options.repositories))
            of_lines = filter(None, chain.from_iterable(turns))
            for case in islice(chain.from_iterable(of_lines), options.cases):
                if case["key"] not in known:
                    row = {"key": case["key"], "language": case["language"], "kind": kind}
                    yield row | {"lines": answer(tiers, case, kind)}


# --------------------------------------------------------------------------------------- the report


def confidences(lines: Lines, wanted: bool) -> list[float]:
    """Of the right lines or the wrong ones, sorted."""
    return sorted(sure for is_right, sure in lines if is_right == wanted)


def area(lines: Lines) -> float:
    """Under the curve: how often a right line is surer than a wrong one."""
    wins = 0.0
    right = confidences(lines, True)
    wrong = confidences(lines, False)
    for sure in right:
        wins += (bisect_left(wrong, sure) + bisect_right(wrong, sure)) / 2
    return round(wins / max(1, len(right) * len(wrong)), 3)


def hidden(lines: Lines, wanted: bool, least: float) -> list[float]:
    """The share of the right or the wrong lines that a threshold hides, and its interval."""
    judged = confidences(lines, wanted)
    n = max(1, len(judged))
    z = 1.96
    share = bisect_left(judged, least) / n
    middle = share + z * z / (2 * n)
    spread = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    scale = 1 + z * z / n
    bounds = ((middle - spread) / scale, (middle + spread) / scale)
    return [round(part, 3) for part in (share, *bounds)]


def thresholds(lines: Lines) -> dict[str, float]:
    right = confidences(lines, True) or [0.0]
    least = {word: right[int((1 - kept) * len(right))] for word, kept in KEPT.items()}
    return {word: math.floor(100 * sure) / 100 for word, sure in least.items()}


def report(rows: list[Row], learn: list[str]) -> dict[str, Any]:
    groups: dict[str, Lines] = defaultdict(list)
    for row in rows:
        kind = row["kind"]
        lines = row["lines"]
        if row["key"].split()[0] not in learn:
            groups[kind] += lines
            groups[f"{kind} of {row['language']}"] += lines
        elif kind == "line":
            groups["learn"] += lines
    words = thresholds(groups["learn"])
    table: dict[str, Any] = {"thresholds": words}
    for name, lines in sorted(groups.items()):
        figures: dict[str, Any] = {"lines": len(lines), "area": area(lines)}
        figures["right"] = len(confidences(lines, True))
        for word, least in words.items():
            right = hidden(lines, True, least)
            wrong = hidden(lines, False, least)
            figures[word] = {"right": right, "wrong": wrong}
        table[name] = figures
    return table


def main() -> None:
    parser = servers.parser_of(__doc__, model="qwen_0_5b", kinds="line", cases=300, learn="")
    parser.add_argument("file", type=Path)
    parser.add_argument("repositories", nargs="*")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let ExitStack end the daemons
    text = options.file.read_text() if options.file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if row["model"] == options.model]
    if options.learn:
        found = report(rows, options.learn.split(","))
        print(json.dumps({"benchmark": "sure", "model": options.model, **found}))
        return
    for row in ask(options, {row["key"] for row in rows}):
        with options.file.open("a") as file:
            file.write(json.dumps(row | {"model": options.model}) + "\n")


if __name__ == "__main__":
    main()
