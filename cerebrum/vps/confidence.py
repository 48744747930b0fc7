"""How sure a model is of what it writes: the mean probability of the tokens of each line. Pure: no model, no clock."""

from __future__ import annotations

import bisect

Judged = tuple[float, int]  # a line's mean, and where it ends: characters of the text that the client has


class Confidence:
    """Follows one completion: the tokens that the model writes, and the text that the client gets of them.

    A token belongs to the line in which it begins, and so does the one that ends the line or the completion: how sure
    the model is that nothing follows is a part of it. Blank lines belong to the line below them.
    """

    def __init__(self) -> None:
        self._written = ""  # by the model
        self._starts, self._probabilities = list[int](), list[float]()  # where each token begins, and its probability
        self._lines: list[tuple[int, float]] = []  # that the model has finished: where each ends, and its mean
        self._line = 0  # where the unfinished one begins
        self._begin = -1  # where the client's text begins in the model's; -1: it has none
        self._end = 0  # of the client's text
        self._judged = 0  # lines that the client knows

    def add(self, text: str, probability: float) -> float:
        """A token, which adds this text. The least mean of the lines that it ends; 1.0 if there are none."""
        self._starts.append(len(self._written))
        self._probabilities.append(probability)
        known, self._written = len(self._written), self._written + text
        done = len(self._lines)
        while (known := self._written.find("\n", known) + 1) > 0:
            if self._written[self._line : known].strip():
                self._lines.append((known, self._mean(self._line, known - 1)))
                self._line = known
        return min((mean for _, mean in self._lines[done:]), default=1.0)

    def send(self, text: str) -> list[Judged]:
        """The client gets this text next; the lines that are complete with it."""
        if self._begin < 0:
            self._begin = self._end = max(0, self._written.find(text))
            self._lines = [one for one in self._lines if one[0] > self._begin]  # a fence is not the client's
        self._end += len(text)
        whole = [(mean, end - self._begin) for end, mean in self._lines[self._judged :] if end <= self._end]
        self._judged += len(whole)
        return whole

    def last(self) -> list[Judged]:
        """The line that ends with the client's text, unless it is known."""
        begin = self._lines[self._judged - 1][0] if self._judged else max(0, self._begin)
        return [(self._mean(begin, self._end), self._end - self._begin)] if begin < self._end else []

    def result(self) -> dict[str, float]:
        """The means of the first line and of the whole text, as the client has them."""
        begin, first = max(0, self._begin), min([self._end, *(end - 1 for end, _ in self._lines[:1])])
        return {"confidence": self._mean(begin, first), "text_confidence": self._mean(begin, self._end)}

    def _mean(self, begin: int, end: int) -> float:
        """Of the tokens that begin from `begin` to `end`; 1.0 if there are none."""
        some = self._probabilities[bisect.bisect_left(self._starts, begin) : bisect.bisect_right(self._starts, end)]
        return round(sum(some) / len(some), 4) if some else 1.0
