"""How sure a model is of what it writes: the mean probability of the tokens of each line. Pure: no
model, no clock.
"""

from __future__ import annotations

import bisect
import re

Judged = tuple[
    float, int
]  # a line's mean, and where it ends: characters of the text that the client has


class Confidence:
    """Follows one completion: the tokens that the model writes, and the text that the client gets
    of them.

    A token belongs to the line in which it begins, and so does the one that ends the line or the
    completion: how sure the model is that nothing follows is a part of it. Blank lines belong to
    the line below them.
    """

    def __init__(self) -> None:
        self._written = ""  # by the model; all places below are in this text
        self._starts, self._probabilities = (
            list[int](),
            list[float](),
        )  # where each token begins, and its probability
        self._line = 0  # where the model's unfinished line begins
        self._begin = self._end = 0  # of the client's text
        self._known = 0  # where the client's lines that are not judged yet begin
        self._sent = 0  # characters of the client's text
        self._judged = list[Judged]()  # the client's complete lines

    def add(self, text: str, probability: float) -> float:
        """A token, which adds this text. The least mean of the lines that it ends; 1.0 if there are
        none.
        """
        self._starts.append(len(self._written))
        self._probabilities.append(probability)
        end, self._written = len(self._written), self._written + text
        least = 1.0
        while (end := self._written.find("\n", end) + 1) > 0:
            if self._written[self._line : end].strip():
                least = min(least, self._mean(self._line, end - 1))
                self._line = end
        return least

    def send(self, text: str, begin: int) -> list[Judged]:
        """The client gets this text next. Returns the lines that it completes. The client's text is
        the model's from `begin` on, line by line, without some of the indentation.
        """
        self._begin = begin
        self._known, self._end = max(self._known, begin), max(self._end, begin)
        done = len(self._judged)
        for part in re.findall(r"\n|[^\n]+", text):
            self._sent += len(part)
            if part == "\n":
                self._end_line()
            elif self._is_begun():
                self._end += len(part)
            elif word := part.lstrip():  # indentation has no place before its line has a word
                self._end = self._written.index(word, self._end) + len(word)
        return self._judged[done:]

    def _end_line(self) -> None:
        lines = self.last()
        end = self._written.find("\n", self._end) + 1
        if (
            end and not self._written[self._end : end].strip()
        ):  # `Gap` adds a line end that the model has not written
            self._end = end
        if lines:
            self._judged += lines
            self._known = self._end

    def _is_begun(self) -> bool:
        """Whether the client's unfinished line has more than white space."""
        return bool(self._written[self._known : self._end].strip())

    def last(self) -> list[Judged]:
        """The unfinished line at the end of the client's text, unless it is blank."""
        return [(self._mean(self._known, self._end), self._sent)] if self._is_begun() else []

    def result(self) -> dict[str, float]:
        """The means of the first line and of the whole text, as the client has them; nothing
        without a token.
        """
        if not self._starts:
            return {}
        whole = self._mean(self._begin, self._end)
        first = self._judged[0][0] if self._judged else whole
        return {"confidence": first, "text_confidence": whole}

    def _mean(self, begin: int, end: int) -> float:
        """Of the tokens that begin from `begin` to `end`, or else of the one that reaches beyond
        both.
        """
        first, last = (
            bisect.bisect_left(self._starts, begin),
            bisect.bisect_right(self._starts, end),
        )
        some = self._probabilities[first:last] or self._probabilities[last - 1 : last]
        return round(sum(some) / len(some), 4)
