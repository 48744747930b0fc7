"""What infills waste: texts of real models, recorded once, and replayed through any rule for their
end in seconds.

    python tests/bench/waste.py FILE.jsonl --record REPOSITORY,… [--model qwen_1_5b]
        [--items 160]
    python tests/bench/waste.py FILE.jsonl [--model qwen_1_5b]

REPOSITORY is a folder of that name with a git repository `repo`. Recording asks the model for the
gaps of HumanEval's solutions and of --items places in real new code (files of 2025 and later), each
as one line, several lines and a span. Natural ends are off: the text goes on where the model would
have ended, until today's `Ending` has ended it. Each token has its probability. What is in
FILE.jsonl is not asked for again.

The report replays the texts through `Ending` as the daemon does, where a natural end ends the text:
with a wait in characters alone, as behind engines without probabilities, and with probabilities.
For each kind: the tokens generated, the share of them that is returned, and how many texts are
right, by HumanEval's tests or exactly the missing text in real code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate, chain, islice, zip_longest
from pathlib import Path
from typing import Any

import servers
from gaps import KINDS, Case, Problem, of_human_eval, of_repository, passes, problems
from recording import record
from replaying import Row, replay, rows_of


def cases_of(repositories: str, items: int) -> list[Case]:
    turns = zip_longest(*map(of_repository, repositories.split(",")))
    real = filter(None, chain.from_iterable(turns))
    pairs = zip_longest(islice(real, items * len(KINDS)), of_human_eval())
    return [*filter(None, chain.from_iterable(pairs))]


def returned(row: Row, text: str) -> int:
    """How many of the tokens have a part in this text."""
    ends = accumulate(len(text) for text, _ in row["tokens"])
    before = sum(end < len(text) for end in ends)
    return min(before + 1, len(row["tokens"])) if text else 0


def is_right(row: Row, text: str, tasks: Mapping[str, Problem]) -> bool:
    if task := tasks.get(row["key"].split()[0]):
        return passes(task, row["prompt"] + text + row["suffix"])
    return bool(text.rstrip() == row["expected"].rstrip())


def figures(rows: list[Row], certain: bool) -> dict[str, Any]:
    """How the texts end, and how many of them are right."""
    tasks = {task["task_id"]: task for task in problems()}
    replays = [replay(row, certain=certain) for row in rows]
    pairs = list(zip(rows, replays, strict=True))
    kept = sum(min(found.generated, returned(row, found.text)) for row, found in pairs)
    generated = sum(found.generated for found in replays)
    return {
        "generated": round(generated / max(1, len(rows)), 1),
        "share": round(kept / max(1, generated), 3),
        "right": sum(is_right(row, found.text, tasks) for row, found in pairs),
    }


def report(rows: list[Row]) -> dict[str, Any]:
    """For each kind: the texts as they end without and with probabilities."""
    table = {}
    for kind in KINDS:
        found = [row for row in rows if row["kind"] == kind]
        was = figures(found, certain=True)
        now = figures(found, certain=False)
        table[kind] = {
            "items": len(found),
            "by_characters": was,
            "by_doubt": now,
            "ratio": round(now["generated"] / max(0.1, was["generated"]), 2),
        }
    return table


def main():
    parser = servers.parser_of(__doc__, model="qwen_0_5b", record="", items=160)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    rows = [row for row in rows_of(options.file) if row["model"] == options.model]
    if options.record:
        known = {row["key"] for row in rows}
        cases = cases_of(options.record, options.items)
        new = [case for case in cases if case["key"] not in known]
        record(options.file, options.model, new)
        return
    print(json.dumps({"benchmark": "waste", "model": options.model, **report(rows)}))


if __name__ == "__main__":
    main()
