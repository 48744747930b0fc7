"""Sure, or silent: which lines of a completion a client gets, by how sure the model is of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from cerebrum.pi.completion import CUT, Pair, read_text, text_event


async def shown(
    pairs: AsyncGenerator[Pair, None], fields: Mapping[str, Any], typed: Callable[[], str] = str
) -> AsyncGenerator[Pair, None]:
    """The pairs of `Gateway.complete` without "judged", and without the text from the first line on
    that is less sure than the threshold, but for a line that the user has begun to type. A line
    waits until it is judged, and its end for the next line. `fields`: of the request. `typed`
    returns what of the completion precedes the request's cursor.
    """
    threshold, before, held, number, begin, at, line_end, hides = None, "", "", 1, 0, 0, "", False
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            if kind == "started":
                threshold, before = value["threshold"], typed()
                begin, at, held, line_end, hides = 0, len(before), "", "", False
            elif kind == "judged":
                mean, end = value
                if held and end > at and not hides:
                    hides = mean < threshold and not before[begin:].strip()
                    if not hides:
                        text, held, at = line_end + held[: end - at], held[end - at :], end
                        line = text.removesuffix("\n").removesuffix("\r")
                        line_end = text[len(line) :]
                        if line:
                            yield "text", text_event(line, number)
                begin = end
                continue
            elif kind == "text" and value and threshold:
                held += read_text(value)
                number = json.loads(value[:-2].rpartition(b"\n\n")[2][6:])["total_tokens"]
                kind, value = "idle", None
            elif kind == "done" and value.get("finish_reason") not in CUT:
                rest = line_end + held
                if hides:
                    lacks_lines = is_gap_of_lines(
                        fields["prompt"].removesuffix(before), fields.get("suffix") or ""
                    )
                    rest, value = line_end * lacks_lines, value | {"finish_reason": "unsure"}
                if rest:
                    yield "text", text_event(rest, number)
            yield kind, value


def is_gap_of_lines(prompt: str, suffix: str) -> bool:
    """Whether whole lines are missing between the two, so that the text between them ends with its
    line.

    >>> is_gap_of_lines("a\\n", "b\\n"), is_gap_of_lines("f(", ")\\n"), is_gap_of_lines("a\\n",
    "\\nb\\n") (True, False, False)
    """
    return prompt[-1:] in ("", "\n") and bool(suffix.partition("\n")[0].strip())
