"""How sure a model is of what it writes: the mean probability of the tokens of each line. Pure: no
model, no clock.
"""

from __future__ import annotations

import bisect
import re

# A line's mean, and where it ends: characters of the text that the client has.
Judged = tuple[float, int]


class Confidence:
    """Follows one completion: the tokens that the model writes, and the text that the client gets
    of them.

    A token belongs to the line in which it begins. The token that ends a line or the completion
    belongs to the line before it, since how sure the model is that nothing follows is a part of
    that line. Blank lines belong to the line below them.
    """

    def __init__(self) -> None:
        # By the model. All positions are in this text, but `_sent` and those in `_judged`.
        self.written = ""
        self._starts = list[int]()  # where each token begins
        self._probabilities = list[float]()  # of each token
        self._line = 0  # where the model's unfinished line begins
        self._begin = self._end = 0  # where the client's text begins and ends
        self._client_line = 0  # where the client's lines that are not judged yet begin
        self._sent = 0  # the length of the client's text
        self._judged = list[Judged]()  # the client's complete lines, and their ends in its text

    def add(self, text: str, probability: float) -> float:
        """A token, which adds this text. The least mean of the lines that it ends; 1.0 if there are
        none.
        """
        start = len(self.written)
        self._starts.append(start)
        self._probabilities.append(probability)
        self.written += text
        least = 1.0
        for line_end in re.finditer("\n", text):
            end = start + line_end.end()
            if self.written[self._line : end].strip():
                least = min(least, self._mean(self._line, end - 1))
                self._line = end
        return least

    def send(self, text: str, begin: int) -> list[Judged]:
        """Record that the client gets this text; return the lines that it completes.

        The client's text is the model's from `begin` on, where its code block begins. The client's
        lines may lack indentation: the margin of the block, or what stands in the file already.
        """
        # `begin` may still move while only blank lines were sent. Later it stays, and the others
        # are beyond it.
        self._begin = begin
        self._client_line = max(self._client_line, begin)
        self._end = max(self._end, begin)
        judged_before = len(self._judged)
        for part in re.findall(r"\n|[^\n]+", text):
            self._sent += len(part)
            if part == "\n":
                self._end_line()
            else:
                self._end = self._end_of(part)
        return self._judged[judged_before:]

    def _end_of(self, part: str) -> int:
        """Where the next part of the client's line ends in the model's text."""
        if self._has_word():
            return self._end + len(part)
        rest = part.lstrip()  # the indentation before it may be shorter than the model's
        return self.written.index(rest, self._end) + len(rest) if rest else self._end

    def _end_line(self) -> None:
        lines = self.unfinished()  # the one that ends, if it is not blank
        after = self.written.find("\n", self._end) + 1
        # Without a line end there, `Gap` has added one that the model has not written.
        if after and self.written[self._end : after].isspace():
            self._end = after
        if lines:
            self._judged += lines
            self._client_line = self._end

    def _has_word(self) -> bool:
        """Whether the client's unfinished line has more than white space."""
        return bool(self.written[self._client_line : self._end].strip())

    def unfinished(self) -> list[Judged]:
        """The unfinished line at the end of the client's text, unless it is blank."""
        if not self._has_word():
            return []
        return [(self._mean(self._client_line, self._end), self._sent)]

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
        """Of the tokens that begin from `begin` to `end`: there begins the token that ends the
        line. If none begins there, of the token around them.
        """
        first = bisect.bisect_left(self._starts, begin)
        after = bisect.bisect_right(self._starts, end)
        first = min(first, after - 1)
        tokens = self._probabilities[first:after]
        return round(sum(tokens) / len(tokens), 4)
