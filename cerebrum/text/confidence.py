"""How sure a model is of a text that the client has. Pure: no model, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence

Written = tuple[str, float]  # a token's text and its probability


def confidence_of(tokens: Sequence[Written], start: int, text: str) -> dict[str, float]:
    """`confidence` and `text_confidence`: the mean probabilities of the tokens of the text's first
    line that is not blank, and of all; `chance`: their product, that all of the text is right.
    Nothing without a token.

    `tokens` are all that the model wrote, `text` is what the client got of them, from the character
    `start` on, which may be within a token; only white space may differ.

    >>> confidence_of([("a", 0.5), (" b\\n", 0.25), ("c", 0.75)], 0, "a b")
    {'confidence': 0.375, 'text_confidence': 0.375, 'chance': 0.125}
    """
    line = text.lstrip().partition("\n")[0]
    in_line = len("".join(line.split()))
    in_text = len("".join(text.split()))
    place = seen = 0  # characters before a token, and those of the text that are no white space
    of_line = list[float]()
    of_text = list[float]()
    for written, probability in tokens:
        # A part of a character has no text yet, but belongs to what follows.
        if place + max(1, len(written)) > start and seen < in_text:
            of_text.append(probability)
            if seen < in_line:
                of_line.append(probability)
        seen += len("".join(written[max(0, start - place) :].split()))
        place += len(written)
    if not of_text:
        return {}
    means = {"confidence": mean(of_line), "text_confidence": mean(of_text)}
    return means | {"chance": round(math.prod(of_text), 4)}


def mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
