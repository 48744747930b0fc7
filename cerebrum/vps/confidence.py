"""How sure a model is of what it writes: the mean probability of the tokens of each line. Pure: no model, no clock."""

from __future__ import annotations

import bisect
import re

Judged = tuple[float, int]  # a line's mean, and where it ends: characters of the text that the client has


class Confidence:
    """Follows one completion: the tokens that the model writes, and the text that the client gets of them.

    A token belongs to the line in which it begins, and so does the one that ends the line or the completion: how sure
    the model is that nothing follows is a part of it. Blank lines belong to the line below them.
    """

    def __init__(self) -> None:
        self._written = ""  # by the model
        self._starts, self._probabilities = list[int](), list[float]()  # where each token begins, and its probability
        self._line = 0  # where the unfinished line begins
        self._lines: list[tuple[int, float]] = []  # that the model has finished: where each ends, and its mean
        self._known = -1  # the end of the lines that the client knows, or the beginning of its text; -1: it has none
        self._begin = self._end = self._first = 0  # of the client's text in the model's, and of its first line's end
        self._sent = 0  # characters of the client's text

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
        """The client gets this text next; the lines that are complete with it. What precedes a code block, its margin
        and what the client has already are the model's alone."""
        if self._known < 0:
            found = re.search(rf"(?m)^[ \t]*{re.escape(text)}", self._written)
            self._known = self._begin = found.start() if found else 0
            self._end = found.end() - len(text) if found else 0
        judged = []
        for part in re.findall(r"[^\n]*\n|[^\n]+", text):
            place = self._written.find(part, self._end)
            self._end = len(part) + (place if place >= 0 else self._end)
            self._sent += len(part)
            for end, mean in self._lines:
                if self._known < end <= self._end:
                    self._first, self._known = self._first or end - 1, end
                    judged.append((mean, self._sent))
        return judged

    def last(self) -> list[Judged]:
        """The line that ends with the client's text, unless it is known."""
        is_known = not self._sent or self._known == self._end
        return [] if is_known else [(self._mean(self._known, self._end), self._sent)]

    def result(self) -> dict[str, float]:
        """The means of the first line and of the whole text, as the client has them; nothing without a token."""
        if not self._starts:
            return {}
        whole = self._mean(self._begin, self._end)
        return {"confidence": self._mean(self._begin, self._first or self._end), "text_confidence": whole}

    def _mean(self, begin: int, end: int) -> float:
        """Of the tokens that begin from `begin` to `end`, or else of the one that reaches beyond both."""
        first, last = bisect.bisect_left(self._starts, begin), bisect.bisect_right(self._starts, end)
        some = self._probabilities[first:last] or self._probabilities[last - 1 : last]
        return round(sum(some) / len(some), 4)
