"""How much of what a hint shows is right, by where it ends?

    python tests/bench/hints.py FILE.jsonl [--skip REPOSITORY,…]

FILE.jsonl is a recording of waste.py, whose texts are replayed through `Ending` in seconds, for
each least chance: the characters from the cursor on that agree with the file (`right`) and the
others (`wrong`), as shares of those that have no threshold; and `of_100`, how many of 100
characters shown are right, with a 95 % interval by drawing places anew. --skip leaves out the
repositories that a threshold was chosen by.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import servers
from replaying import Row, replay, rows_of

CHANCES = (0.0, 0.1, 0.2, 0.5)
DRAWS = 300


class Shown(NamedTuple):
    """The characters of a text."""

    right: int
    wrong: int


def score(row: Row, least: float) -> Shown:
    text, expected = replay(row, least).text.rstrip(), row["expected"].rstrip()
    pairs = zip(text, expected, strict=False)
    right = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
    if right is None:
        right = min(len(text), len(expected))
    return Shown(right, len(text) - right)


def figures(shown: list[tuple[str, Shown]], most: Shown) -> dict[str, Any]:
    """The sums of texts, each with its place; as shares of those of `most`."""
    total = sum_of(shown)
    by_place = defaultdict[str, list[Shown]](list)
    for place, one in shown:
        by_place[place].append(one)
    chance, shares = random.Random(1), list[float]()
    for _ in range(DRAWS):
        drawn = chain.from_iterable(chance.choices(list(by_place.values()), k=len(by_place)))
        right, wrong = map(sum, zip(*drawn, strict=True))
        shares.append(100 * right / max(1, right + wrong))
    shares.sort()
    of_100 = 100 * total.right / max(1, total.right + total.wrong)
    return {
        "right": round(100 * total.right / max(1, most.right)),
        "wrong": round(100 * total.wrong / max(1, most.wrong)),
        "of_100": [round(share) for share in (of_100, shares[DRAWS // 40], shares[-DRAWS // 40])],
    }


def sum_of(shown: list[tuple[str, Shown]]) -> Shown:
    return Shown(*map(sum, zip(*(one for _, one in shown), strict=True)))


def report(rows: list[Row]) -> Iterator[dict[str, Any]]:
    groups = defaultdict[tuple[str, str], list[Row]](list)
    for row in rows:
        groups[row["model"], row["kind"]].append(row)
    for (model, kind), found in sorted(groups.items()):
        places = [row["key"].rsplit(" ", 2)[0] for row in found]
        table = {"model": model, "kind": kind, "texts": len(found)}
        most = None
        for least in CHANCES:
            scores = [score(row, least) for row in found]
            shown = list(zip(places, scores, strict=True))
            most = most or sum_of(shown)
            table[f"{least}"] = figures(shown, most)
        yield table | {"characters": most}


def main():
    parser = servers.parser_of(__doc__, skip="")
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    skipped = options.skip.split(",")
    rows = [row for row in rows_of(options.file) if row["key"].split()[0] not in skipped]
    for table in report(rows):
        print(json.dumps({"benchmark": "hints", **table}))


if __name__ == "__main__":
    main()
