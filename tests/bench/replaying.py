"""Recorded texts, and what becomes of them by today's `Ending`, without a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import servers  # sets the path to the product

from cerebrum.text.ending import Ending

assert servers
Row = dict[str, Any]  # a case of gaps.py with the model, its tokens and its own end


def rows_of(file: Path) -> list[Row]:
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def pieces(ending: Ending, tokens: Iterable[tuple[str, float]], whole: bool) -> Iterator[str]:
    """What goes out after each token, and behind the last one if nothing ended the text before.
    `whole`: the model ends there.
    """
    for text, probability in tokens:
        out, reason = ending.feed(text, probability)
        yield out
        if reason:
            return
    yield ending.flush(whole)


class Replay(NamedTuple):
    """What the daemon would have generated and returned."""

    generated: int  # tokens
    text: str


def replay(row: Row, least: float | None = None, certain: bool = False) -> Replay:
    """`certain`: the probabilities are unknown. `least`: see `Ending`."""
    where = row["language"], row["prompt"], row["suffix"], "auto", 0, row.get("stop", ()), least
    tokens = row["tokens"][: row["end"]]
    if certain:
        tokens = [(text, 1.0) for text, _ in tokens]
    out = list(pieces(Ending("infill", *where), tokens, row["end"] is not None))
    return Replay(min(len(out), len(row["tokens"])), "".join(out))
