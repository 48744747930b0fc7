"""What clients have in common: identical requests, newer ones that replace older ones, text that is typed along.

Standard library only.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import (
    Mapping,
)
from dataclasses import dataclass
from typing import Any

from cerebrum.pi.upstream import Pair, text_event

SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
# ------------------------------------------------------------------------------------- policy: editors

MAX_TYPED_CHARS = 1024  # while a completion is computed, accepted suggestions included
MAX_RETYPED_CHARS = 8  # of a word that is corrected meanwhile
TAIL_CHARS = 1024  # of the text before the cursor: with as many equal, two cursors are at the same place
MAX_PREDICTIONS = 32  # that are remembered, of at most MAX_PREDICTED_CHARS each
MAX_PREDICTED_CHARS = 2048
# What must be equal in two requests for the answer to one to be the beginning of the answer to the other.
ALIKE = ("mode", "suffix", "model", "language", "filename", *SAMPLED_BY)


def is_typed_on(older: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    """Whether two infills are of one place where somebody types: the text before one cursor nearly continues that
    before the other, and the lines below are the same. Two gaps of one file are not, nor two of a program's texts."""
    if older["filename"] != newer["filename"]:
        return False
    one, other = (lines_below(fields.get("suffix") or "") for fields in (older, newer))
    if not (one.startswith(other) or other.startswith(one)) or bool(one) != bool(other):
        return False
    return nearly_continues(older["prompt"], newer["prompt"]) or nearly_continues(newer["prompt"], older["prompt"])


def lines_below(suffix: str) -> str:
    """What follows the cursor's line, whose rest changes when an editor closes a bracket; else that rest."""
    return (suffix.partition("\n")[2] or suffix)[:TAIL_CHARS]


def nearly_continues(text: str, longer: str) -> bool:
    """Whether `longer` is `text` and at most MAX_TYPED_CHARS more. Up to MAX_RETYPED_CHARS at the end of the last line
    may differ if that line begins alike. An editor's window moves, so `longer` may begin later.

    >>> nearly_continues("import os\\nx = fo", "import os\\nx = bar()"), nearly_continues("a\\nx", "a\\ny = ")
    (True, False)
    """
    line = text[text.rfind("\n") + 1 :]
    retyped = min(MAX_RETYPED_CHARS, max(0, len(line.lstrip()) - 1))
    for end in range(len(text), len(text) - retyped - 1, -1):
        tail = text[max(0, end - TAIL_CHARS) : end]
        start = max(0, len(longer) - len(tail) - MAX_TYPED_CHARS)
        if longer.rfind(tail, start) >= 0 if len(tail) == TAIL_CHARS else not start and longer.startswith(tail):
            return True
    return False


def alike(fields: Mapping[str, Any]) -> bytes:
    """A digest of all in a request that must be equal beside the prompt."""
    return hashlib.sha256(repr([fields.get(name) for name in ALIKE]).encode("utf-8", "replace")).digest()


def typed_of(asked: str, text: str, prompt: str) -> int:
    """How many characters of `text`, the completion of the prompt `asked`, stand before the cursor in another prompt;
    0 if that is another place. The ends of the prompts decide, since an editor's window moves.

    >>> typed_of("def f():\\n    ret", "urn 1", "def f():\\n    return")
    3
    """
    tail, before = prompt[-TAIL_CHARS:], asked[-TAIL_CHARS:]
    start = len(before)
    # A tail shorter than TAIL_CHARS is a whole prompt, which must agree from its first character.
    whole = len(tail) < TAIL_CHARS
    place = (before + text).find(tail, 0 if whole else max(0, start + 1 - TAIL_CHARS), len(tail) if whole else None)
    return max(0, place + len(tail) - start) if place >= 0 else 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A completion that someone may type: who asked, the end of the prompt, the rest of the request, the answer."""

    client: str
    tail: str
    alike: bytes
    text: str
    begun: Mapping[str, Any]
    finish_reason: str


class Predictions:
    """The latest completions, for clients who type what they say. Pure; at most 500 KB."""

    def __init__(self) -> None:
        self.recent: deque[Prediction] = deque(maxlen=MAX_PREDICTIONS)

    def add(self, client: str, fields: Mapping[str, Any], text: str, begun: Mapping[str, Any], reason: str) -> None:
        if 1 < len(text) <= MAX_PREDICTED_CHARS:
            tail = fields["prompt"][-TAIL_CHARS:]
            self.recent.append(Prediction(client, tail, alike(fields), text, begun, reason))

    def find(self, client: str, fields: Mapping[str, Any]) -> tuple[Prediction, str] | None:
        """A completion of which the client has typed the beginning, and its rest."""
        rest = alike(fields)
        for prediction in reversed(self.recent):
            if prediction.client == client and prediction.alike == rest:
                typed = typed_of(prediction.tail, prediction.text, fields["prompt"])
                if 0 < typed < len(prediction.text):
                    return prediction, prediction.text[typed:]
        return None


def typed_pairs(prediction: Prediction, rest: str) -> list[Pair]:
    """A completion that consists of the rest of an earlier one."""
    done = {"model": prediction.begun["model"], "finish_reason": prediction.finish_reason, "type_through": True}
    return [("started", prediction.begun), ("text", text_event(rest)), ("done", done)]
