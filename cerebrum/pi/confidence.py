"""Sure, or silent: which lines of a completion a client gets, by how sure the model is of each."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from cerebrum.pi.upstream import Pair, read_text, text_event
from cerebrum.text.languages import BY_NAME, LANGUAGES

MAX_SCANNED_CHARS = 20_000  # before the cursor, to find the comment or the string that it is in


def place_of(language: str, prompt: str) -> str:
    """What the cursor at the end of a text is in: "code", "comments" or "strings".

    >>> place_of("python", "x = 1  # the "), place_of("python", "x = 'the "), place_of("python", "x = 'the' + ")
    ('comments', 'strings', 'code')
    """
    from cerebrum.text.ending import scan  # loaded only if an answer may depend on the place

    syntax = LANGUAGES.get(BY_NAME.get(language.lower(), ""))
    if not syntax:
        return "code"
    scanner = scan(syntax, prompt[-MAX_SCANNED_CHARS:])
    return "code" if not scanner.closer else "comments" if scanner.in_comment else "strings"


async def shown(
    pairs: AsyncGenerator[Pair, None],
    least_of: Callable[[Mapping[str, Any]], float | None],
    typed: Callable[[], int] = lambda: 0,
) -> AsyncGenerator[Pair, None]:
    """The pairs of `Gateway.complete` without "judged", and without the text from the first line on that is less sure
    than `least_of` says of the pair "started"; None shows everything. A line's text waits until the line is judged. A
    line that the user has begun to type is shown; `typed`: characters of the completion before the first text here."""
    least, held, number, begin, at, hides, has_text = None, "", 1, 0, 0, False, False
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            has_text = has_text or kind == "text"
            if kind == "judged":
                mean, end = value
                if held and end > at and least is not None and not hides:
                    hides = mean < least and begin >= at
                    if not hides:
                        yield "text", text_event(held[: end - at], number)
                        held, at = held[end - at :], end
                begin = end
            elif kind == "text" and value and least is not None:
                held += read_text(value)
                number = json.loads(value[:-2].rpartition(b"\n\n")[2][6:])["total_tokens"]
            elif kind == "done":
                if held and not hides:
                    yield "text", text_event(held, number)
                if hides:
                    value = value | {"finish_reason": "unsure"}
                elif has_text and value.get("finish_reason") == "unsure":  # the backend ended it for another reader
                    value = value | {"finish_reason": "stop"}
                yield kind, value
            else:
                if kind == "started":
                    least, held, begin, at = least_of(value), "", 0, typed()
                yield kind, value
