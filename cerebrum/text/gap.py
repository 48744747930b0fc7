"""Where an infill ends: where its text meets the suffix, or where the suffix could follow.

`Meeting` compares the text with the suffix; `Gap` decides. Both read one character at a time, as
each stage does. Pure; standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cerebrum.text.languages import LANGUAGES
from cerebrum.text.scanner import CHANGES, LINE_CHARS, PAIRS, Scanner, after_blank
from cerebrum.text.stages import Stage, borders_of, columns_of, matched

# What each is worth, by tests/bench/ending.py in Python, JavaScript, TypeScript, Rust, C, C++ and
# Go: the percentage of the gaps of two to six lines, or the ones named, that end elsewhere with
# another value. No gap of that benchmark ends within a line, so the three numbers for such gaps
# rest on the cases in tests/text/test_ending.py.
MEET_LINES = 6  # compared at most of the suffix; with 3, 2.4 % more are cut of a model that runs on
# the compared lines have at least this many, unless the suffix has fewer; without, 0.5 % more are
# cut
MEET_CHARS = 7
# letters and digits in one line at the text's end; without, 0.6 % more of Java, C#, shell are cut
END_WEIGHT = 6
# written while the suffix is awaited, white space not counted; with 250, 1.9 % more are cut
AHEAD_CHARS = 330
REST_AHEAD_CHARS = 80  # the same, if the suffix begins with the rest of the cursor's line ...
WRITTEN_AHEAD_CHARS = 12  # ... after the model has written that rest ...
REST_CHARS = 3  # ... which has at least so many: shorter ones, as );, end many lines
# The surprise in bits that the text written meanwhile may cost, if the tokens' probabilities are
# known: behind a missed end the model is often unsure. A gap above whole lines goes on more often,
# so it gets more. Chosen by tests/bench/waste.py.
DOUBT_IN_LINE, DOUBT_AT_LINE_END, DOUBT_OF_LINES = 4.0, 3.0, 6.0
# Limits to what is searched; longer searches end no gap elsewhere.
CLOSERS_CHARS = (
    4000  # of the suffix, for closing brackets; without the search, 0.8 % more are sent late
)
MEET_CHARS_BEFORE = 3000  # of the prompt's end, for lines like the suffix's first ones
GOAL_LINES = 40  # of the suffix, for the same

Line = tuple[int, str]  # (indentation in columns, text without its white space)


def line_of(line: str) -> Line:
    return columns_of(line), "".join(line.split())[:LINE_CHARS]


def lines_of(text: str) -> list[Line]:
    """The first lines of a text, blank ones left out; at least one if the text is not blank."""
    text = text[text.rfind("\n", 0, len(text) - len(text.lstrip())) + 1 :]
    return [line_of(line) for line in text.split("\n", GOAL_LINES)[:GOAL_LINES] if line.strip()]


class Meeting:
    """Finds where a text begins to agree with the suffix: where it has the suffix's first lines,
    the `goal`.

    As many lines are compared as are found nowhere else around the cursor. White space within lines
    and blank lines do not count, but indentation does. A remark that a model adds to a line does
    not count either. With `in_line`, the suffix begins with the rest of the cursor's line, which
    may be the end of any line of the text.
    """

    def __init__(self, prompt: str, suffix: str, in_line: bool, remark: str) -> None:
        rest, _, after = suffix.partition("\n")
        self.in_line = in_line
        self.whole = not in_line and bool(
            rest.strip()
        )  # whole lines are missing, line ends included
        lines = (
            [(0, line_of(rest)[1]), *lines_of(after)]
            if in_line
            else lines_of(suffix if self.whole else after)
        )
        above = [
            line_of(line) for line in prompt[-MEET_CHARS_BEFORE:].split("\n")[:-1] if line.strip()
        ]
        around = above + lines[1:]
        self.goal, self.sure = lines[:MEET_LINES], False
        # A short suffix is compared whole, but the rest of a line alone, as ), is found in any
        # text.
        for size in range(1, len(self.goal) + 1):
            goal = lines[:size]
            long = sum(len(text) for _, text in goal) >= MEET_CHARS or (
                size == len(lines) and size > in_line
            )
            if long and all(goal != around[at : at + size] for at in range(len(around))):
                self.goal, self.sure = goal, True  # found nowhere else
                break
        self.first = self.goal[0][1]
        self.within = in_line or (
            self.whole and len(self.goal) > 1
        )  # it may begin in the middle of a line
        self.blanks = in_line * (len(rest) - len(rest.lstrip()))  # before the rest of the line
        self.weight = sum(map(str.isalnum, self.first))  # letters and digits
        self.remark = remark or "\n"  # what begins one; no line has a line end
        self.indent, self.line = line_of(prompt.rpartition("\n")[2])  # of the text so far
        if self.line and not in_line:
            self.indent = -1  # a line that begins in the prompt is none of the suffix's
        self.edge = 0  # where the text would be cut if the suffix began with this line
        self.borders = borders_of(self.first)
        self.size = 0  # characters of `first` that the line so far ends with
        self.places = [
            -1
        ]  # of the line end above, and of the line's characters that are not white space
        self.found: list[
            tuple[int, int]
        ] = []  # (lines of the goal above, where their first begins), longest first

    def has_first(self) -> bool:
        """Whether the line so far is, or ends with, the first line of the goal."""
        ends = self.within and self.size == len(self.first)
        return ends if self.in_line else self.is_line(0) or (ends and self.line != self.first)

    def start(self, text: list[str]) -> int:
        """Where the first line of the goal may begin; the text's end if it cannot yet."""
        if not self.in_line and self.may_be(0):
            return self.edge
        if not self.within:
            return len(text)
        place = self.places[-self.size] if self.size else len(text)
        return max(place - self.blanks, self.places[-self.size - 1] + 1)

    def step(self, char: str, text: list[str]) -> int | None:
        """Read the last character of the text; if the whole goal stands there now, return where it
        begins.
        """
        if char == "\n":
            if self.line:
                self.found = self._matches(text, self.is_line)
            if self.line or self.whole:
                self.edge = len(text) if self.whole else len(text) - 1 - (text[-2:-1] == ["\r"])
            self.line, self.indent, self.size, self.places = "", 0, 0, [len(text) - 1]
            return self.found[0][1] if self.found and self.found[0][0] == len(self.goal) else None
        if not char.isspace():
            self.line += char if len(self.line) < LINE_CHARS else ""
            self.size = matched(self.first, self.borders, self.size, char)
            self.places.append(len(text) - 1)
        elif not self.line:
            self.indent = after_blank(self.indent, char)
        return None

    def is_line(self, number: int) -> bool:
        """Whether the line so far is this line of the goal."""
        indent, line = self.goal[number]
        return self.indent == indent and f"{self.line}\n".startswith(
            (line + "\n", line + self.remark)
        )

    def may_be(self, number: int) -> bool:
        """Whether the line so far may become this line of the goal."""
        indent, line = self.goal[number]
        line += self.remark
        return not self.line or (self.indent == indent and line.startswith(self.line[: len(line)]))

    def _matches(self, text: list[str], agrees: Callable[[int], bool]) -> list[tuple[int, int]]:
        """`found` with the line so far."""
        found = [
            (size + 1, at) for size, at in self.found if size < len(self.goal) and agrees(size)
        ]
        return [*found, (1, self.start(text))] if self.has_first() else found

    def held(self, text: list[str]) -> int:
        """Text from here on may turn out to be the suffix."""
        begun = [at for size, at in self.found if size < len(self.goal) and self.may_be(size)]
        return min([self.start(text), *begun])

    def at_end(self, text: list[str]) -> tuple[int, int]:
        """(lines of the goal that the text ends with, where they begin); the last line may be cut
        off.
        """
        found = self._matches(text, self.may_be) if self.line else self.found
        return found[0] if found else (0, 0)


class Gap(Stage):
    """An infill: ends where the text meets the suffix or, if they do not meet, where the suffix
    could follow.

    Each event has its rule: the text meets the suffix (in `step`), a line begins (`on_start`), a
    line ends (`on_line`), the text leaves the cursor's surroundings (`on_leaving`), the model
    writes no more (`flush`). The rules note in `enough` where the infill could end. What the model
    writes behind that place is sent if the model meets the suffix before the `patience` or the
    `doubt` is used up, or ends by itself: many gaps go on after a line that could have ended them,
    so waiting is worth its tokens. A client in a hurry sets `predict_ms`.
    """

    inner = (
        False  # the text is in a block that ends before the suffix, so all of it belongs to the gap
    )
    in_line = False  # the suffix begins with the rest of the cursor's line
    patience = (
        AHEAD_CHARS  # characters left before the infill ends at `enough`, white space not counted
    )
    doubt = DOUBT_IN_LINE  # bits left before it ends there
    bits = 0.0  # the surprise of the token that is being read, until it counts

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__()
        self.scanner = scanner
        self.meeting = Meeting(prompt, suffix, self.in_line, scanner.language.line_comment)
        # Around the cursor: its literal, the open brackets, and how many of these the suffix
        # closes.
        self.literal, self.depth, self.unmatched = (
            scanner.closer,
            len(scanner.stack),
            scanner.unmatched,
        )
        closers = 0 if self.literal else Scanner(scanner.language, suffix[:CLOSERS_CHARS]).unmatched
        self.closed_below = min(self.depth, closers)
        self.enough: int | None = None  # the infill could end here ...
        self.left: int | None = (
            None  # ... or at most here: a bracket or a line does not belong to the gap
        )

    def on_start(self) -> None:
        """A line begins: its first character that is not white space has come."""

    def on_line(self) -> None:
        """A line has ended."""
        raise NotImplementedError

    def on_leaving(self, place: int) -> None:
        """The text has left the surroundings of the cursor at a place."""
        if self.left is None:
            self.left, self.inner = place, False
            self.could_end(place)

    def step(self, char: str) -> None:
        scanner, meeting, begun = self.scanner, self.meeting, bool(self.meeting.line)
        scanner.step(char)
        place = meeting.step(char, self.text)
        if place is not None and meeting.sure:
            self.end("stop", place)
            return
        if place is not None:
            self.could_end(place)
        if char == "\n" and begun:
            self.on_line()
        elif not char.isspace():
            if not begun:
                self.on_start()
            if char in PAIRS and not scanner.closer and self.has_left():
                self.on_leaving(len(self.text) - 1 if begun else meeting.edge)
            if self.enough is not None and not self.inner:
                self.patience -= 1
                self.doubt -= self.bits
                self.bits = 0.0
            if (
                meeting.line == "```"
                and scanner.closer in ("", "`")
                and scanner.language is not LANGUAGES["markdown"]
            ):
                self.end("stop", meeting.edge if self.left is None else self.left)
        if self.reason:
            return
        if min(self.patience, self.doubt) < 0 and self.enough is not None:
            self.end("block", self.enough)
        elif char not in "\r`":  # perhaps part of a line end that the suffix has, or of a fence
            place = meeting.held(self.text)
            self.safe = max(self.safe, place if self.enough is None else min(place, self.enough))

    def could_end(self, place: int) -> None:
        if self.enough is None or self.inner:
            self.enough = place

    def has_left(self) -> bool:
        """Whether the text has closed a bracket that the suffix closes, or one from outside the
        text.
        """
        return (
            len(self.scanner.stack) < self.closed_below or self.scanner.unmatched > self.unmatched
        )

    def is_suffix(self, lines: int) -> bool:
        """Whether a text that ends with so many lines of the goal has come to the suffix."""
        return lines > 1 or (lines == 1 and self.meeting.weight >= END_WEIGHT)

    def flush(self, whole: bool) -> str:
        lines, place = self.meeting.at_end(self.text)
        end = (
            place
            if self.is_suffix(lines)
            else self.enough
            if not whole
            else self.left
            if self.has_left()
            else None
        )
        if end is not None:
            return self.cut(self.sent, max(end, self.sent))
        text = self.cut(0).rstrip(" \t")
        newline = self.meeting.whole and bool(text.strip()) and not text.endswith("\n")
        return self.cut(self.sent) + "\n" * newline


class GapOfLines(Gap):
    """A gap above whole lines. The suffix could follow the first line that leaves no bracket or
    header open and is not indented less than the suffix, and the text above a line that is indented
    less than cursor and suffix.
    """

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__(scanner, prompt, suffix)
        first, below = prompt.rpartition("\n")[2], self.meeting.goal[0]
        self.doubt = DOUBT_AT_LINE_END if first.strip() else DOUBT_OF_LINES
        above = line_of(first if first.strip() else prompt.rstrip().rpartition("\n")[2])
        # Lines of a block comment are indented by one space more than the code.
        self.above, self.below = (indent - line.startswith("*") for indent, line in (above, below))
        self.indent = scanner.indent  # of the line
        self.mark: int | None = None  # the end of the last line that is not blank
        # SQL: the suffix may be a new statement.
        self.new = scanner.statements and not re.match(scanner.language.clauses, suffix.lstrip())
        closes = below[1][0] in PAIRS and bool(scanner.stack) and not self.literal
        self.inner = closes or (
            scanner.by_lines and bool(first.strip()) and self.indent > self.below
        )

    def on_start(self) -> None:
        scanner = self.scanner
        if scanner.closer and scanner.since:
            return  # inside a literal
        self.indent = scanner.indent
        if not scanner.in_parens:
            if scanner.by_lines:
                self.inner = self.indent > self.below and (self.inner or self.mark is None)
            if self.mark is not None and self.indent < min(self.above, self.below):
                self.on_leaving(self.mark)

    def on_line(self) -> None:
        self.mark, scanner, opened = self.meeting.edge, self.scanner, self.scanner.opened
        if scanner.closer or self.has_left():
            fits = bool(self.literal and scanner.closer)
        elif len(scanner.stack) > self.depth and not scanner.language.enclosed:
            fits = False
        elif opened is None:
            over = scanner.statements and scanner.last and not scanner.head.strip()
            fits = over or self.below <= self.indent or scanner.in_parens
        else:
            fits = opened < self.below
        if fits and not (self.new and CHANGES.search(scanner.head)):
            self.could_end(self.mark)


class GapInLine(Gap):
    """A gap that ends within a line: the suffix begins with the rest of the cursor's line. It could
    follow a line that lacks this rest and leaves no bracket open, or replace a rest that the model
    has written itself.
    """

    in_line = True
    patience = REST_AHEAD_CHARS

    def on_line(self) -> None:
        lines, written = self.meeting.found[-1] if self.meeting.found else (0, 0)
        closes = (
            self.meeting.first[0] in PAIRS and self.scanner.stack
        )  # the rest closes what the cursor is in
        if lines == 1 and self._has_closed():
            self.end("stop", written)
        elif lines == 1 and len(self.meeting.first) >= REST_CHARS:
            self.enough, self.patience = written, min(self.patience, WRITTEN_AHEAD_CHARS)
        elif not closes and len(self.scanner.stack) <= self.depth and not self.scanner.closer:
            self.could_end(self.meeting.edge)

    def _has_closed(self) -> bool:
        """Whether the text has closed the literal around the cursor, which the suffix closes."""
        return (
            bool(self.literal)
            and not self.scanner.closer
            and self.meeting.first.startswith(self.literal)
        )

    def is_suffix(self, lines: int) -> bool:
        rest = self.meeting.first
        closes = rest[0] in "\"'`)]}" or (rest.isalnum() and len(rest) < REST_CHARS)
        return super().is_suffix(lines) or (lines == 1 and (self._has_closed() or not closes))


def gap_of(scanner: Scanner, prompt: str, suffix: str) -> Gap:
    in_line = prompt.rpartition("\n")[2] and suffix.partition("\n")[0].strip()
    return GapInLine(scanner, prompt, suffix) if in_line else GapOfLines(scanner, prompt, suffix)
