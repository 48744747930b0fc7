"""Which lines of a completion a client gets, by how sure the model is of each line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cerebrum.pi.dialects import CUT
from cerebrum.pi.upstream import Pair, read_text, text_event


@dataclass(slots=True)
class Held:
    """The text of a completion that is not shown yet: the line that waits for its confidence, and
    the line end before it. Positions count the characters of the whole text, its typed beginning
    included.
    """

    threshold: float  # a line of less confidence is hidden, and all lines after it
    typed: str  # the beginning of the text that the user has typed
    text: str = ""  # behind the last line shown and its line end
    line_end: str = ""  # of the last line shown
    shown: int = 0  # position up to which the text is shown or typed
    judged: int = 0  # position up to which the lines are judged
    is_hiding: bool = False  # a line was hidden
    tokens: int = 1  # that came so far

    def __post_init__(self) -> None:
        self.shown = len(self.typed)

    def add(self, events: bytes) -> None:
        """Hold the text of these token events."""
        self.text += read_text(events)
        last = events[:-2].rpartition(b"\n\n")[2]
        self.tokens = json.loads(last.removeprefix(b"data: "))["total_tokens"]

    def judge(self, confidence: float, end: int) -> str:
        """The text to show now that the line which ends at this position is judged. A line that the
        user has begun to type is not hidden.
        """
        typed = self.typed[self.judged :]
        self.judged = end
        if self.is_hiding or not self.text or end <= self.shown:
            return ""
        if confidence < self.threshold and not typed.strip():
            self.is_hiding = True
            return ""
        size = end - self.shown
        text = self.line_end + self.text[:size]
        self.text = self.text[size:]
        self.shown = end
        line = text.removesuffix("\n").removesuffix("\r")
        self.line_end = text[len(line) :]
        return line

    def rest(self, fields: Mapping[str, Any]) -> str:
        """The text to show at the end of the completion that the request of these fields gets."""
        if not self.is_hiding:
            return self.line_end + self.text
        prompt, suffix = fields["prompt"].removesuffix(self.typed), fields.get("suffix") or ""
        return self.line_end if is_gap_of_lines(prompt, suffix) else ""

    def event(self, text: str) -> Pair:
        return "text", text_event(text, self.tokens)


async def shown(
    pairs: AsyncGenerator[Pair, None], fields: Mapping[str, Any], typed: Callable[[], str] = str
) -> AsyncGenerator[Pair, None]:
    """The pairs of `Gateway.complete` without "judged". With a threshold, hold each line until its
    confidence arrives, and its line end until the next line is shown; hide the text from the first
    unsure line on. `fields`: of the request. `typed()`: the beginning of the text that the user has
    already typed.
    """
    held: Held | None = None  # None: everything is shown
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            if kind == "started":
                threshold = value["threshold"]
                held = Held(threshold, typed()) if threshold else None
                yield kind, value
            elif kind == "judged":
                if held and (line := held.judge(*value)):
                    yield held.event(line)
            elif kind == "text" and value and held:
                held.add(value)
                yield "idle", None
            elif kind == "done" and held and value.get("finish_reason") not in CUT:
                if rest := held.rest(fields):
                    yield held.event(rest)
                yield kind, value | {"finish_reason": "unsure"} if held.is_hiding else value
            else:
                yield kind, value


def is_gap_of_lines(prompt: str, suffix: str) -> bool:
    """Whether whole lines are missing between the two, so that the text between them ends with its
    line.

    >>> is_gap_of_lines("a\\n", "b\\n"), is_gap_of_lines("f(", ")\\n")
    (True, False)
    >>> is_gap_of_lines("a\\n", "\\nb\\n")
    False
    """
    return prompt[-1:] in ("", "\n") and bool(suffix.partition("\n")[0].strip())
