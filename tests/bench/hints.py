"""How much of what a hint shows is right, by where it ends?

    python tests/bench/hints.py FILE.jsonl --record REPOSITORY,… [--model qwen_1_5b]
        [--kind line|gap|window] [--items 150] [--weights PATH]
    python tests/bench/hints.py FILE.jsonl [--skip REPOSITORY,…]    # the report
    python tests/bench/hints.py FILE.jsonl --skip … --mean 0.62     # the same, with a mean

REPOSITORY is a folder of that name with a git repository `repo`; the files are those that were
added in or after 2025, so they are newer than the models. Recording asks the model itself, greedily
and with natural ends off, and writes each token with its probability; what is in FILE.jsonl is not
asked for again. --weights names another file of the same model, such as a tuned one. The kinds:

    line    a line is cut where a word begins, at up to two places, with ABOVE lines above and BELOW
            lines below
    gap     two to six whole lines are missing, or all but the first one's indentation
    window  as `line`, at one place of a line, with 100 to 1,600 tokens around the cursor, three
            quarters above it; with 200 to 400, half of them above it (`half`); and with as much as
            an editor's request has room for (`all`)

The report replays the texts through `Ending` in seconds, for each least chance: the characters from
the cursor on that agree with the file (`right`) and the others (`wrong`), as shares of those that
have no threshold; how many texts are whole and right; in how many the first word is wrong; tokens
generated; and `of_100`, how many of 100 characters shown are right, with a 95 % interval by drawing
places anew. --mean replays another rule beside it: a line is shown if the mean probability of its
tokens is at least so high, up to the first one that is not. --skip leaves out the repositories that
a threshold was chosen by.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain, islice, zip_longest
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import servers
from harness import SHIPPED
from waste import LANGUAGES, UNUSUAL, append, files_since_2025, git, record

from cerebrum.text.ending import Ending
from cerebrum.vps.llama import Llama, Settings

ABOVE, BELOW = 20, 8  # lines around a gap
MAX_CUTS = 2  # of a line
LINE_TOKENS, GAP_TOKENS = 40, 120
WINDOWS = {"qwen_0_5b": (100, 200, 400, 800, 1600), "qwen_1_5b": (200, 400, 800)}
HALVES = (200, 300, 400)
ALL = 3500  # tokens that an editor's request has room for
CHANCES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6)
DRAWS = 300
Case = dict[str, Any]
Place = tuple[str, str, list[str], int, random.Random]

# ---------------------------------------------------------------------------------------- the cases


def places(repository: str, kind: str) -> Iterator[Place]:
    """(key, language, lines of the file, number of a line, chance), one in each file."""
    name = PurePosixPath(repository).parent.name
    for path in files_since_2025(repository):
        language = LANGUAGES.get(PurePosixPath(path).suffix)
        if not language or UNUSUAL.search(path):
            continue
        text = git(repository, "show", f"HEAD:{path}").replace("\r\n", "\n")
        lines = text.splitlines(keepends=True)
        chance = random.Random(f"{path} {kind}")
        for number in chance.sample(range(len(lines)), len(lines)):
            if 20 <= number < len(lines) - 9 and 6 <= len(lines[number].strip()) <= 100:
                yield f"{name} {path} {number}", language, lines, number, chance
                break


def lines_at(repository: str) -> Iterator[list[Case]]:
    for key, language, lines, number, chance in places(repository, "line"):
        line = lines[number]
        cuts = [at.end() for at in re.finditer(r"(?<!\w)(?=\w)", line)]
        cuts = [at for at in cuts if len(line[at:].strip()) >= 4]
        if not cuts:
            continue
        yield [
            {
                "key": f"{key} {cut} line",
                "kind": "line",
                "language": language,
                "prompt": "".join(lines[:number]) + line[:cut],
                "suffix": "\n" + "".join(lines[number + 1 :]),
                "expected": line[cut:].rstrip(),
                "stop": ["\n"],
                "most": LINE_TOKENS,
            }
            for cut in sorted(chance.sample(cuts, min(MAX_CUTS, len(cuts))))
        ]


def gaps_at(repository: str) -> Iterator[list[Case]]:
    for key, language, lines, number, chance in places(repository, "gap"):
        size = chance.randint(2, 6)
        missing = lines[number : number + size]
        if number + size + 3 > len(lines) or min(len(line.strip()) for line in missing) < 2:
            continue
        cut = chance.choice((0, len(missing[0]) - len(missing[0].lstrip())))
        text = "".join(missing)
        end = len(text) - (cut > 0)
        case = {"key": f"{key} gap", "kind": "gap", "language": language}
        case |= {"prompt": "".join(lines[:number]) + text[:cut], "expected": text[cut:end]}
        suffix = text[end:] + "".join(lines[number + size :])
        yield [case | {"suffix": suffix, "most": GAP_TOKENS}]


def within(case: Case, above: int, below: int, size_of: Callable[[str], int]) -> Case:
    """The case with whole lines around the cursor, as many as these sizes allow."""
    first = case["prompt"].splitlines(keepends=True)
    last = case["suffix"].splitlines(keepends=True)
    prompt = first.pop() if case["prompt"][-1:] != "\n" else ""
    suffix = last.pop(0) if case["suffix"][:1] == "\n" else ""
    while first and size_of(first[-1] + prompt) <= above:
        prompt = first.pop() + prompt
    while last and size_of(suffix + last[0]) <= below:
        suffix += last.pop(0)
    return case | {"prompt": prompt, "suffix": suffix}


def lines_of(text: str) -> int:
    return text.count("\n")


def windows(model: Llama, case: Case, sizes: tuple[int, ...]) -> Iterator[Case]:
    def tokens(text: str) -> int:
        return len(model.vocabulary.tokenize(text, True))

    def window(size: int, above: int, name: str) -> Case:
        found = within(case, above, size - above, tokens)
        return found | {"key": f"{case['key']} {name}", "kind": f"window {name}"}

    for size in sizes:
        yield window(size, size * 3 // 4, str(size))
    for size in HALVES:
        yield window(size, size // 2, f"{size}-half")
    yield window(ALL, ALL * 3 // 4, "all")


def record_all(options: argparse.Namespace, name: str, known: set[str]) -> None:
    at = gaps_at if options.kind == "gap" else lines_at
    turns = zip_longest(*map(at, options.record.split(",")))
    groups = list(islice(filter(None, chain.from_iterable(turns)), options.items))
    (entry,) = [entry for entry in SHIPPED if entry.id == options.model]
    is_window = options.kind == "window"
    sequences = 2 if is_window else 8
    settings = Settings(n_ctx=4096 if is_window else 1536, sequences=sequences)
    path = Path(options.weights) if options.weights else servers.weights_of(options.model)
    model = Llama(path, settings, lambda _: True, entry.fim, entry.fim_layout)
    if is_window:
        sizes = WINDOWS[options.model]
        cases = list(chain(*(windows(model, group[0], sizes) for group in groups)))
    else:
        cases = [within(case, ABOVE, BELOW, lines_of) for case in chain(*groups)]
    new = [case for case in cases if case["key"] not in known]
    append(options.file, name, record(model, new, sequences), len(new))


# --------------------------------------------------------------------------------------- the report


class Shown(NamedTuple):
    """What became of a text. All are numbers."""

    right: int  # characters
    wrong: int
    whole: bool
    misled: bool  # its first word is wrong
    tokens: int  # generated


def ending_of(row: Case, least: float | None) -> Ending:
    where = row["language"], row["prompt"], row["suffix"], "auto", 0, row.get("stop", ())
    return Ending("infill", *where, least)


def by_chance(row: Case, least: float) -> tuple[str, int]:
    """The text that a client gets, and the tokens that were generated."""
    ending, text = ending_of(row, least), ""
    for number, (piece, probability) in enumerate(row["tokens"]):
        if number == row["end"]:
            return text + ending.flush(), number
        out, reason = ending.feed(piece, probability)
        text += out
        if reason:
            return text, number + 1
    return text + ending.flush(row["end"] == len(row["tokens"])), len(row["tokens"])


def by_mean(row: Case, least: float) -> tuple[str, int]:
    """The same with the mean of each line, which counts the token that ends it."""
    text, tokens = by_chance(row, 0.0)
    line, lines = list[float](), list[float]()
    for number, (piece, probability) in enumerate(row["tokens"][:tokens], 1):
        line.append(probability)
        if "\n" in piece:
            lines.append(sum(line) / len(line))
            line = []
            if lines[-1] < least:
                tokens = number
                break
    if tokens == row["end"]:
        line.append(row["end_probability"])
    lines.append(sum(line) / len(line) if line else 1.0)
    shown = ""
    for one, mean in zip(text.splitlines(keepends=True), lines, strict=False):
        if mean < least:
            break
        shown += one
    return shown, tokens


def score(row: Case, text: str, tokens: int) -> Shown:
    text, expected = text.rstrip(), row["expected"].rstrip()
    pairs = zip(text, expected, strict=False)
    right = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if right is None:
        right = min(len(text), len(expected))
    words = [re.match(r"\s*(?:\w+|\W)?", each) for each in (text, expected)]
    misled = text != "" and words[0][0] != words[1][0]  # type: ignore[index]
    return Shown(right, len(text) - right, text == expected, misled, tokens)


def figures(shown: list[tuple[str, Shown]], most: Shown) -> dict[str, Any]:
    """The sums of texts, each with its place; as shares of those of `most`."""
    total = Shown(*map(sum, zip(*(one for _, one in shown), strict=True)))
    by_place = defaultdict[str, list[Shown]](list)
    for place, one in shown:
        by_place[place].append(one)
    chance, shares = random.Random(1), list[float]()
    for _ in range(DRAWS):
        drawn = chain.from_iterable(chance.choices(list(by_place.values()), k=len(by_place)))
        right, wrong = map(sum, zip(*(one[:2] for one in drawn), strict=True))
        shares.append(100 * right / max(1, right + wrong))
    shares.sort()
    of_100 = 100 * total.right / max(1, total.right + total.wrong)
    return {
        "right": round(100 * total.right / max(1, most.right)),
        "wrong": round(100 * total.wrong / max(1, most.wrong)),
        "whole": total.whole,
        "misled": total.misled,
        "tokens": total.tokens,
        "of_100": [round(share) for share in (of_100, shares[DRAWS // 40], shares[-DRAWS // 40])],
    }


def report(rows: list[Case], mean: float) -> Iterator[dict[str, Any]]:
    groups = defaultdict[tuple[str, str, str], list[Case]](list)
    for row in rows:
        for language in ("all", row["language"]):
            groups[row["model"], row["kind"], language].append(row)
    for (model, kind, language), found in sorted(groups.items()):
        places = [row["key"].rsplit(" ", 2)[0] for row in found]

        def replay(rule: Callable[[Case, float], tuple[str, int]], least: float) -> Any:
            shown = [score(row, *rule(row, least)) for row in found]  # noqa: B023
            return list(zip(places, shown, strict=True))  # noqa: B023

        everything = Shown(*map(sum, zip(*(one for _, one in replay(by_chance, 0)), strict=True)))
        table = {"model": model, "kind": kind, "language": language, "texts": len(found)}
        table |= {"characters": [everything.right, everything.wrong]}
        if mean:
            table["mean"] = figures(replay(by_mean, mean), everything)
        table |= {str(least): figures(replay(by_chance, least), everything) for least in CHANCES}
        yield table


def main() -> None:
    parser = servers.parser_of(
        __doc__, model="qwen_0_5b", record="", items=150, kind="line", weights="", skip="", mean=0.0
    )
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    text = options.file.read_text() if options.file.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    if options.record:
        name = f"{options.model} {Path(options.weights).name}" if options.weights else options.model
        record_all(options, name, {row["key"] for row in rows if row["model"] == name})
        return
    skipped = options.skip.split(",")
    for table in report(
        [row for row in rows if row["key"].split()[0] not in skipped], options.mean
    ):
        print(json.dumps({"benchmark": "hints", **table}))


if __name__ == "__main__":
    main()
