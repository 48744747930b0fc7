"""Which lines of a completion a client gets, by how sure the model is of each line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable

from cerebrum.fields import Members
from cerebrum.pi.completion import CUT, Pairs, read_text, text_event


class Held:
    """The text of a completion, of which the client has the beginning. A line waits for its
    confidence, and its line end for the next line. All positions are characters of the text, and
    so are those of the judged lines.
    """

    def __init__(self, threshold: float, typed: str) -> None:
        self._threshold = threshold  # the first line of less confidence is hidden, and all below it
        # The text begins with what the user has typed, which the events lack.
        self._typed = self._text = typed
        self._shown = len(typed)  # what the client has
        self._judged = 0  # where the judged lines end
        self.hidden: int | None = None  # where the first hidden line begins; None: none is hidden
        self._tokens = 1  # the number of the last token that came

    def add(self, events: bytes) -> None:
        """Add the text of these token events."""
        self._text += read_text(events)
        last = events[:-2].rpartition(b"\n\n")[2]
        self._tokens = json.loads(last.removeprefix(b"data: "))["total_tokens"]

    def judge(self, confidence: float, end: int) -> bytes:
        """An event with the text to show now that the line up to `end` is judged; b"" if there is
        none. A line that the user has begun to type is not hidden.
        """
        begin, self._judged = self._judged, end
        line = self._text[self._shown : end]
        if not line or self.hidden is not None:
            return b""
        if confidence < self._threshold and not self._typed[begin:].strip():
            self.hidden = begin
            return b""
        return self._show(line.removesuffix("\n").removesuffix("\r"))

    def end(self, prompt: str, suffix: str) -> bytes:
        """An event with the text to show at the end; b"" if there is none. `prompt`, `suffix`: the
        text before and after the cursor. In a gap of whole lines, the line end before a hidden line
        is shown.
        """
        above = prompt.removesuffix(self._typed)  # a newer request's prompt ends with it
        if self.hidden is not None and not is_gap_of_lines(above, suffix):
            return b""
        return self._show(self._text[self._shown : self.hidden])

    def _show(self, text: str) -> bytes:
        self._shown += len(text)
        return text_event(text, self._tokens) if text else b""


async def shown(pairs: Pairs, fields: Members, typed: Callable[[], str] = lambda: "") -> Pairs:
    """The pairs of `Gateway.complete` without "judged". With a threshold, hold each line until its
    confidence arrives, and its line end until the next line is shown; hide the text from the first
    unsure line on. `fields`: of the request. `typed()`: what the user has already typed of the
    text.
    """
    held: Held | None = None  # None: show everything at once
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            if kind == "started":  # again if another backend takes over, before any text
                threshold = value["threshold"]
                held = Held(threshold, typed()) if threshold else None
            elif kind == "judged":
                kind, value = "text", held.judge(*value) if held else b""
            elif kind == "text" and value and held:
                held.add(value)
                kind, value = "idle", None  # the text is held, but the backend is alive
            # Unless it was cut off: that shows nothing more.
            elif kind == "done" and held and value.get("finish_reason") not in CUT:
                yield "text", held.end(fields["prompt"], fields.get("suffix") or "")
                if held.hidden is not None:
                    value = value | {"finish_reason": "unsure"}
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
