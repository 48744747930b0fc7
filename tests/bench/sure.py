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
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any

import servers
from harness import KEY
from quality import SPAN_TOKENS, Tiers, passes, problems, solution_gaps, start_both

SINCE = "2025-01-01"
LANGUAGES = {".py": "python", ".ts": "typescript", ".tsx": "typescript", ".go": "go", ".rs": "rust"}
UNUSUAL = re.compile(r"(?i)(^|[/_.-])(tests?|spec|docs?|gen|generated|migrations|vendor)([/_.-]|$)")
ABOVE, BELOW, MAX_FILE_BYTES, MAX_LINES, MAX_CUTS, TOKENS = 40, 11, 200_000, 3, 3, 40
CUTS = {"dot": re.compile(r"\w\.(?=[A-Za-z_])"), "line": re.compile(r"(?<!\w)(?=\w)")}
KEPT = {"often": 0.99, "normal": 0.97, "seldom": 0.9}  # of the right lines


# ---------------------------------------------------------------------------------------- the cases


def git(repository: str, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, check=True)
    return done.stdout.decode("utf-8", "replace")


def cases(repository: str, kind: str) -> Iterator[list[dict[str, Any]]]:
    """For one line after the other requests, each with what is `expected` and a `key`; always the
    same ones.
    """
    added = git(
        repository,
        "log",
        f"--since={SINCE}",
        "--diff-filter=A",
        "--format=",
        "--name-only",
        "-M100%",
    )
    rows = (
        row.split(maxsplit=4) for row in git(repository, "ls-tree", "-r", "-l", "HEAD").splitlines()
    )
    sizes = {row[4]: int(row[3]) for row in rows if row[3].isdigit()}
    paths = sorted(
        {path for path in added.splitlines() if 1000 < sizes.get(path, 0) < MAX_FILE_BYTES}
    )
    random.Random(1).shuffle(paths)
    for path in paths:
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if language and not UNUSUAL.search(path):
            lines = (
                git(repository, "show", f"HEAD:{path}")
                .replace("\r\n", "\n")
                .splitlines(keepends=True)
            )
            generator = random.Random(f"{path} {kind}")
            numbers = generator.sample(range(len(lines)), len(lines))
            fit = (
                (number, found)
                for number in numbers
                if (found := cuts(lines, number, kind, generator))
            )
            for number, (size, places) in islice(fit, MAX_LINES):
                yield [
                    {
                        "key": f"{PurePosixPath(repository).name.removesuffix('.git')} {path} "
                        f"{number} {place} {kind}",
                        "language": language,
                    }
                    | case_of(lines, number, size, place, kind)
                    for place in places
                ]


def cuts(
    lines: list[str], number: int, kind: str, generator: random.Random
) -> tuple[int, list[int]] | None:
    """How many lines are missing from this one on, and at which characters of it; None if it is not
    fit for a case.
    """
    line, size = lines[number], generator.randint(2, 5) if kind == "gap" else 1
    gap = lines[number : number + size]
    if (
        number < 20
        or number + size + 3 > len(lines)
        or any(not 6 <= len(one.strip()) <= 100 for one in gap)
    ):
        return None
    if kind == "gap":
        return size, [len(line) - len(line.lstrip())]
    places = [match.end() for match in CUTS.get(kind, CUTS["line"]).finditer(line)]
    places = [place for place in places if len(line[place:].strip()) >= 4]
    return (size, sorted(generator.sample(places, min(MAX_CUTS, len(places))))) if places else None


def case_of(lines: list[str], number: int, size: int, cut: int, kind: str) -> dict[str, Any]:
    prompt = "".join(lines[max(0, number - ABOVE) : number]) + lines[number][:cut]
    suffix = "\n" + "".join(lines[number + size : number + size + BELOW])
    more = {} if kind == "complete" else {"suffix": suffix}
    return {
        "expected": "".join(lines[number : number + size])[cut:].rstrip(),
        "prompt": prompt,
        **more,
    }


# -------------------------------------------------------------------------------------- the answers


def stream(tiers: Tiers, **body: Any) -> tuple[str, list[tuple[float, int]]]:
    """The text, and the confidence of each line with its end."""
    body = {"model": tiers.model, "temperature": 0, "heal": True, "min_confidence": 1e-9, **body}
    headers = {"Content-Type": "application/json", "X-API-Key": KEY}
    request = urllib.request.Request(
        f"{tiers.vps}/v1/inference/stream", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        events = [
            json.loads(line[6:])
            for line in response.read().decode().splitlines()
            if line.startswith("data:")
        ]
    text = "".join(event.get("token", "") for event in events)
    return text, [
        (event["confidence"], event["characters"]) for event in events if "characters" in event
    ]


def answer(tiers: Tiers, case: dict[str, Any], kind: str) -> list[tuple[bool, float]]:
    """Whether each line of the answer is right, and its confidence."""
    body = {name: case[name] for name in ("prompt", "suffix", "language") if name in case}
    more = {"max_tokens": SPAN_TOKENS} if kind == "gap" else {"max_tokens": TOKENS, "stop": ["\n"]}
    text, judged = stream(tiers, **body, **more)
    expected = case["expected"]
    if kind != "gap":
        return (
            [(text.partition("\n")[0].rstrip() == expected, judged[0][0] if judged else 0.0)]
            if text.strip()
            else []
        )
    return [
        (
            text[:end].rstrip() == expected
            or (expected + "\n").startswith(text[:end].rstrip() + "\n"),
            mean,
        )
        for mean, end in judged
    ]


def solution_rows(tiers: Tiers, count: int, known: set[str]) -> Iterator[dict[str, Any]]:
    for task, before, after in islice(solution_gaps(problems(), "lines"), count):
        if (key := f"HumanEval {task['task_id']} solution") not in known:
            text, judged = stream(
                tiers, prompt=before, suffix=after, language="python", max_tokens=SPAN_TOKENS
            )
            lines = [(passes(task, before + text + after), mean) for mean, _ in judged[:1]]
            yield {"key": key, "language": "python", "kind": "solution", "lines": lines}


def ask(options: argparse.Namespace, known: set[str]) -> Iterator[dict[str, Any]]:
    with ExitStack() as stack:
        tiers = start_both(stack, options.model, published=False)
        for kind in options.kinds.split(","):
            if kind == "solution":
                yield from solution_rows(tiers, options.cases, known)
                continue
            turns = zip_longest(*(cases(repository, kind) for repository in options.repositories))
            of_lines = chain.from_iterable(line for turn in turns for line in turn if line)
            for case in islice(of_lines, options.cases):
                if case["key"] not in known:
                    row = {name: case[name] for name in ("key", "language")}
                    yield row | {"kind": kind, "lines": answer(tiers, case, kind)}


# --------------------------------------------------------------------------------------- the report

Lines = list[tuple[bool, float]]


def area(lines: Lines) -> float:
    """Under the curve: how often a right line is surer than a wrong one."""
    right, wrong = (
        [sure for is_right, sure in lines if is_right == wanted] for wanted in (True, False)
    )
    wins = sum((one > other) + (one == other) / 2 for one in right for other in wrong)
    return round(wins / max(1, len(right) * len(wrong)), 3)


def hidden(lines: Lines, wanted: bool, least: float) -> list[float]:
    """The share of the right or the wrong lines that a threshold hides, and its interval."""
    some = [sure for is_right, sure in lines if is_right == wanted]
    n, z = max(1, len(some)), 1.96
    share = sum(sure < least for sure in some) / n
    middle, spread = (
        share + z * z / (2 * n),
        z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5,
    )
    scale = 1 + z * z / n
    return [round(one, 3) for one in (share, (middle - spread) / scale, (middle + spread) / scale)]


def thresholds(lines: Lines) -> dict[str, float]:
    right = sorted(sure for is_right, sure in lines if is_right) or [0.0]
    return {
        word: math.floor(100 * right[int((1 - kept) * len(right))]) / 100
        for word, kept in KEPT.items()
    }


def report(rows: list[dict[str, Any]], learn: list[str]) -> dict[str, Any]:
    groups: dict[str, Lines] = defaultdict(list)
    for row in rows:
        if row["key"].split()[0] in learn:
            groups["learn"] += row["lines"] if row["kind"] == "line" else []
        else:
            for more in ("", f" of {row['language']}"):
                groups[row["kind"] + more] += row["lines"]
    words = thresholds(groups["learn"])
    table: dict[str, Any] = {"thresholds": words}
    for name, lines in sorted(groups.items()):
        table[name] = {
            "lines": len(lines),
            "right": sum(one for one, _ in lines),
            "area": area(lines),
        }
        table[name] |= {
            word: {"right": hidden(lines, True, least), "wrong": hidden(lines, False, least)}
            for word, least in words.items()
        }
    return table


def main() -> None:
    parser = servers.parser_of(__doc__, model="qwen_0_5b", kinds="line", cases=300, learn="")
    parser.add_argument("file", type=Path)
    parser.add_argument("repositories", nargs="*")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # let ExitStack end the daemons
    rows = (
        [json.loads(line) for line in options.file.read_text().splitlines()]
        if options.file.exists()
        else []
    )
    if options.learn:
        rows = [row for row in rows if row["model"] == options.model]
        print(
            json.dumps(
                {
                    "benchmark": "sure",
                    "model": options.model,
                    **report(rows, options.learn.split(",")),
                }
            )
        )
        return
    for row in ask(options, {row["key"] for row in rows if row["model"] == options.model}):
        with options.file.open("a") as out:
            out.write(json.dumps(row | {"model": options.model}) + "\n")


if __name__ == "__main__":
    main()
