"""The stages that a completion passes through, and those of them that know no syntax; how sure a
model is of a text.

A stage reads one character at a time, so how tokens split the text counts only for probabilities.
It decides how much of the text may go out (`safe`) and whether the completion is over (`reason`;
then `safe` is where it ends). Text that is not decided yet waits, usually only the start of a line.
Pure; standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

FENCE = "```"  # a line that begins so ends a completion of code

# Against models that go round in circles.
REPEATED_LINES = 12  # a model that writes the same line this often in a row is starting over
REPEATED_COPIES = 4  # of a block of lines; at least REPEATED_LINES lines in all
PERIOD_LINES = 24  # the longest such block
# A line that ends with this much of one pattern, at least REPEATED_COPIES times, never ends.
PERIOD_CHARS = 400
PERIOD_STEP = 40  # characters of a line from one search for such a pattern to the next

LEAST_PROBABILITY = 1e-4  # of a token
WORD_CHARS = 24  # of a longer word, the next part is a word of its own
# Scripts without spaces between words begin here: each of their characters is a word.
FIRST_IDEOGRAPH = "\u2e80"


Written = tuple[str, float]  # a token's text and its probability


def surprise(probability: float) -> float:
    """How surprising something of this probability is, in bits; at most 13.3."""
    return -math.log2(max(probability, LEAST_PROBABILITY))


class Stage:
    """Text goes in and comes out, until there is a `reason` to end. All positions but `start` count
    characters of `text`.
    """

    start = 0  # where `text` begins in all that went in
    # For `Sure` and `Gap`: the surprise of the tokens that have the text which goes in.
    # `Ending.feed` sets it; what it is after that belongs to the text that goes out.
    bits = 0.0
    safe = 0  # text before this position may be sent
    sent = 0  # text before this position has been sent
    reason: str | None = None

    def __init__(self) -> None:
        # Its characters: += on a string attribute would copy the string each time.
        self.text = list[str]()

    def cut(self, start: int, stop: int | None = None) -> str:
        return "".join(self.text[start:stop])

    def step(self, char: str) -> None:
        """Read the last character of `text`; move `safe`, or call `end`."""

    def end(self, reason: str, at: int) -> None:
        """End the completion at a position, though never before text that may have been sent."""
        self.reason = reason
        self.safe = max(at, self.safe)

    def feed(self, piece: str) -> tuple[str, str | None]:
        """(text that may be sent now, why the completion is over or None)."""
        for char in piece:
            self.text.append(char)
            self.step(char)
            if self.reason:
                break
        out = self.cut(self.sent, self.safe)
        self.sent = self.safe
        return out, self.reason

    def flush(self, whole: bool) -> str:
        """The text left to send when no more tokens come: the model has ended (`whole`) or may
        write no more.
        """
        return self.cut(self.sent)


class Search:
    """How much of a string a text ends with, by Knuth, Morris and Pratt."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.size = 0  # characters of the string that the text ends with
        self.borders = [0]
        for char in string[1:]:
            self.borders.append(self._longer(self.borders[-1], char))

    def step(self, char: str) -> None:
        self.size = self._longer(self.size, char)

    def _longer(self, size: int, char: str) -> int:
        """`size` after one more character. `borders` has for each prefix of the string the length
        of the longest shorter prefix that it ends with.
        """
        string = self.string
        while size and (size == len(string) or string[size] != char):
            size = self.borders[size - 1]
        return size + (string[size] == char)


class StopStrings(Stage):
    """Ends the text before the first stop string, and holds back the possible start of one.

    The first complete stop string counts, however tokens split the text; of two that end together,
    the longer. No stop string may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self.searches = [Search(stop) for stop in stops]

    def step(self, char: str) -> None:
        begun = complete = 0
        for search in self.searches:
            search.step(char)
            begun = max(begun, search.size)
            if search.size == len(search.string):
                complete = max(complete, search.size)
        self.safe = len(self.text) - begun
        if complete:
            self.end("stop", len(self.text) - complete)


class Trimmed(Stage):
    """Holds white space back until other text follows. What a limit cuts off ends without it."""

    def step(self, char: str) -> None:
        if not char.isspace():
            self.safe = len(self.text)

    def flush(self, whole: bool) -> str:
        return super().flush(whole) if whole else ""


class Sure(Trimmed):
    """Ends a text before the first word with which the chance that its line is right, the product
    of its tokens' probabilities, falls below `least`. A token counts for the line in which it
    begins.

    A word is a run of letters, digits and underscores, or any other character, with the blanks
    before it. It goes out once it is whole, but signs at the beginning of the text wait for a
    letter, a digit or their line's end. Cut off by a limit, it ends without the word that has begun
    (`Trimmed.flush`).

    The next stage gets a token's bits with the last of its text. After "a" with 3 bits and "b c"
    with 1 bit, "ab" goes out with 3 bits; the one bit waits for the end of the word "c".
    """

    lettered = False  # a letter, a digit or the end of a line has come
    size = 0  # characters of the run that has not ended; 0: there is none
    waiting = 0.0  # bits that have come and that the next stage has not got yet
    is_blank = True  # the line so far

    def __init__(self, least: float) -> None:
        super().__init__()
        # Bits that the tokens of a line may have, and what is left of them for this line.
        self.doubt = self.left = surprise(least)

    def feed(self, piece: str) -> tuple[str, str | None]:
        self.left -= self.bits
        self.waiting += self.bits
        out, reason = super().feed(piece)
        # If text still waits, its end is this token's, so this token's bits wait; those of tokens
        # before it go out with their text.
        of_rest = self.bits if self.sent < len(self.text) else 0.0
        self.bits = self.waiting - of_rest if out else 0.0
        self.waiting -= self.bits
        return out, reason

    def step(self, char: str) -> None:
        place = len(self.text)
        in_word = char < FIRST_IDEOGRAPH and (char.isalnum() or char == "_")
        if self.size and not (in_word and self.size < WORD_CHARS):
            self._end_word(place - 1)
        if char == "\n" and not self.is_blank:
            self.left = self.doubt
            self.lettered = self.is_blank = True
            self._end_word(place)
        elif char.isspace():
            pass  # it goes out with the next word
        elif self.left < 0:
            self.end("unsure", self.safe)
        else:
            self.is_blank = False
            self.lettered |= char.isalnum()
            if in_word:
                self.size += 1
            else:
                self._end_word(place)

    def _end_word(self, place: int) -> None:
        """A word has ended before this position."""
        self.size = 0
        if self.lettered:
            self.safe = place


class Typed(Stage):
    """Removes the indentation already typed, where a model repeats it."""

    def __init__(self, typed: str) -> None:
        super().__init__()
        # "": the text has begun. `start` stays where it is, since only white space is removed.
        self.typed = typed

    def step(self, char: str) -> None:
        if self.typed and char not in " \t":
            if self.cut(0, -1) == self.typed:
                del self.text[:-1]
            self.typed = ""
        if not self.typed:
            self.safe = len(self.text)


def last_line(text: str) -> str:
    return text.rpartition("\n")[2]


def columns_of(line: str) -> int:
    """The indentation of a line in columns."""
    return len(line.removesuffix(line.lstrip(" \t")).expandtabs(8))


class Blanks(Stage):
    """Code of an unknown language: ends before two blank lines in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = list[int]()  # of the lines since the last character that is not white space

    def step(self, char: str) -> None:
        if not char.isspace():
            self.ends = []
            self.safe = len(self.text)
        elif char == "\n":
            self.ends.append(len(self.text))
            if len(self.ends) == 3 and self.safe:
                self.end("block", self.ends[0])


class Indent(Stage):
    """Ends before the first line, except the cursor's own, that is indented by fewer than `limit`
    characters.
    """

    indent: int | None = None  # of the line that begins; None: it has begun
    mark = 0  # where the text ends if that line is outside

    def __init__(self, limit: int, of_lines: bool) -> None:
        super().__init__()
        self.limit = limit
        self.of_lines = of_lines  # whole lines are missing: the line end before the outside stays

    def step(self, char: str) -> None:
        if char == "\n":
            if self.indent is None:
                self.mark = len(self.text) if self.of_lines else self.safe
            self.indent = 0
        elif self.indent is None:
            if char != "\r":  # perhaps of the line end
                self.safe = len(self.text)
        elif char in " \t":
            self.indent += 1
        elif not char.isspace() and self.indent < self.limit:
            self.end("block", self.mark)
        elif not char.isspace():
            self.indent = None
            self.safe = len(self.text)


class Repeat(Stage):
    """Ends a text that repeats the same line or block of lines, indentation included, or the same
    pattern within a line.

    Two copies go out. Later ones wait: enough copies end the text after the second copy; a
    differing line frees them. Of a pattern within a line, all copies go out.
    """

    line_start = 0  # where the line so far begins
    third_at: int | None = None  # where the third copy may have begun

    def __init__(self) -> None:
        super().__init__()
        self.lines = list[str]()  # those that are not blank

    def step(self, char: str) -> None:
        position = len(self.text)
        if char != "\n":
            size = position - self.line_start
            if size >= PERIOD_CHARS and size % PERIOD_STEP == 0:
                tail = self.cut(-PERIOD_CHARS)
                # A text with a period agrees with itself when it is shifted by it.
                periods = range(1, PERIOD_CHARS // REPEATED_COPIES + 1)
                if any(tail.startswith(tail[period:]) for period in periods):
                    self.end("repeat", position)
        else:
            if line := self.cut(self.line_start).rstrip():
                self.lines.append(line)
                self._look_for_copies(position)
            self.line_start = position
        if self.third_at is None and not self.reason:
            self.safe = position

    def _look_for_copies(self, position: int) -> None:
        """A line that is not blank has ended at this position."""
        lines = self.lines
        sizes = range(1, PERIOD_LINES + 1)
        # The sizes of the blocks of which two copies stand at the end. While there are any, the
        # third copy has begun behind the first line with which there were.
        twice = [size for size in sizes if lines[-size:] == lines[-2 * size : -size]]
        third = self.third_at or position
        self.third_at = third if twice else None
        for size in twice:
            enough = max(REPEATED_LINES, REPEATED_COPIES * size)
            last = lines[-enough:]
            # Each line equals the one `size` lines above it.
            if len(last) == enough and last[size:] == last[:-size]:
                self.end("repeat", third)


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
