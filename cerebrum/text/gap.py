"""Where an infill ends: where its text meets the suffix, or where the suffix could follow.

`Meeting` compares the text with the suffix; `Gap` decides. Both read one character at a time, as
each stage does. Pure; standard library only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from cerebrum.text.scanner import LINE_CHARS, OPENING_OF, Scanner, after_blank, scanner_of
from cerebrum.text.stages import FENCE, Search, Stage, columns_of, last_line

# What each is worth, by tests/bench/ending.py in Python, JavaScript, TypeScript, Rust, C, C++ and
# Go: the percentage of the gaps of two to six lines, or the ones named, that end elsewhere with
# another value. A gap that is cut ends too early. No gap of that benchmark ends within a line, so
# REST_AHEAD_CHARS and what is said of such gaps rests on the cases in tests/text/test_ending.py.
MEET_LINES = 6  # compared at most of the suffix; with 3, 2.4 % more are cut of a model that runs on
# The compared lines have at least this many, unless the suffix has fewer; without, 0.5 % more are
# cut.
MEET_CHARS = 7
# Letters and digits in one line at the text's end; without, one gap of lines in a hundred of other
# TypeScript, Go and Rust is cut.
END_WEIGHT = 6
# Written while the suffix is awaited, white space not counted; with 250, 1.9 % more are cut.
AHEAD_CHARS = 330
REST_AHEAD_CHARS = 80  # the same, if the suffix begins with the rest of the cursor's line
# If the tokens' probabilities are known, each line written meanwhile may cost so many bits of
# surprise: behind a missed end the model is often unsure. It may cost none where waiting never
# paid: behind a line that was begun before the gap, behind the rest of the cursor's line that the
# model wrote itself, and where a line is indented less than all that surrounds the cursor. Chosen
# by tests/bench/waste.py.
DOUBT = 5.5
# Limits to what is searched; longer searches end no gap elsewhere.
# Of the suffix, for closing brackets; without the search, 0.8 % more are sent late.
CLOSERS_CHARS = 4000
MEET_CHARS_BEFORE = 3000  # of the prompt's end, for lines like the suffix's first ones
GOAL_LINES = 40  # of the suffix, for the same

NOWHERE = sys.maxsize  # a place that no text has

Place = int  # characters of the text before it
Line = tuple[int, str]  # (indentation in columns, text without its white space)
# How many lines of the goal a text ends with, and where they begin: each number that fits.
Found = dict[int, Place]


def line_of(line: str) -> Line:
    return columns_of(line), "".join(line.split())[:LINE_CHARS]


def lines_of(text: str) -> list[Line]:
    """The first lines of a text, blank ones left out; at least one if the text is not blank."""
    blank = len(text) - len(text.lstrip())
    text = text[text.rfind("\n", 0, blank) + 1 :]
    lines = text.split("\n")[:GOAL_LINES]
    return [line_of(line) for line in lines if line.strip()]


class Meeting:
    """Finds where a text begins to agree with the suffix, which is not blank: where it has the
    suffix's first lines, as many as are found nowhere else around the cursor.

    These lines are the `goal`. White space within lines, blank lines, a remark behind code and a
    `;` or `,` at a line's end do not count; indentation does. There are three kinds of suffix, here
    with the cursor as ¦:

        in_line    total = add(¦)        it begins with the rest of the cursor's line, here `)`,
                   print(total)          which may be the end of any line of the text
        of_lines   ¦    return total     it begins with a whole line: whole lines are missing
        neither    total = ¦             nothing is left of the cursor's line; the goal begins with
                   print(total)          the line below

    For each line of the text, `found` has how many lines of the goal the text ends with, and where
    these begin: with the goal A B it is {1: at} after a line A, which begins at `at`, and {2: at}
    after the B below it. Each name that ends in `_at` is a `Place` in the text.
    """

    def __init__(
        self, text: list[str], prompt: str, suffix: str, in_line: bool, remark: str
    ) -> None:
        self.text = text  # the gap's own list, which grows
        self.remark = remark  # what begins one; "" if there are none
        self.in_line = in_line
        rest, _, after = suffix.partition("\n")
        self.of_lines = not in_line and rest.strip() != ""
        lines = lines_of(suffix if self.of_lines else after)
        # The least indentation of the first whole lines: a line that is indented less has left
        # their block. At the end of a file 1, so that a line at the margin has left it.
        self.floor = min((indent for indent, _ in lines[:MEET_LINES]), default=1)
        if in_line:
            lines.insert(0, (0, line_of(rest)[1]))
        above = prompt[-MEET_CHARS_BEFORE:].split("\n")[:-1]
        # Between both sides stands a line that no text has: the goal is not found across the gap.
        around = [*(line_of(line) for line in above if line.strip()), (-1, ""), *lines[1:]]
        sizes = range(1, min(MEET_LINES, len(lines)) + 1)
        # So many first lines are found nowhere else; 0: the suffix is compared at the end alone.
        self.needed = next((size for size in sizes if self._is_unique(lines, size, around)), 0)
        self.goal = lines[: self.needed or MEET_LINES]
        self.first = lines[0][1]
        # The first line of the goal may begin in the middle of a line of the text: what is missing
        # may end there, and another line of the goal, or the cursor's own, tells the place.
        self.within = in_line or (self.of_lines and len(self.goal) > 1)
        # Blanks before the rest of the line.
        self.blanks = len(rest) - len(rest.lstrip()) if in_line else 0

        self.indent, self.line = line_of(last_line(prompt))  # of the text so far
        # Where the text ends without this line: behind the line end above it if whole lines are
        # missing, else before the line end that follows the last line that is not blank.
        self.line_at = 0
        self.search = Search(self.first)  # in what the text has of the line so far
        # Of the line so far, what follows the first line of the goal, which begins at `first_at`;
        # None: that has not come, and `first_at` means nothing.
        self.behind: str | None = None
        self.first_at = 0
        # The places of the line end above, then of each character of the line that is not white
        # space, without those that the prompt has of it.
        self.chars_at = [-1]
        self.found: Found = {}

    def _is_unique(self, lines: list[Line], size: int, around: list[Line]) -> bool:
        """Whether the first lines are enough to know the suffix by."""
        goal = lines[:size]
        # A short suffix is compared whole, but the rest of a line alone, as ), is found in any
        # text.
        is_rest = self.in_line and size == 1
        is_all = size == len(lines) and not is_rest
        if not is_all and sum(len(text) for _, text in goal) < MEET_CHARS:
            return False
        return all(goal != around[at : at + size] for at in range(len(around)))

    def has_first(self) -> bool:
        """Whether the line so far is, or ends with, the first line of the goal."""
        ends = self.behind is not None and self._is_more(self.behind)
        if self.in_line:
            return ends
        # A whole line must also have the indentation; behind other code of its line, it has none.
        return self.is_line(0) or (ends and self.line != self.first)

    def start(self) -> Place:
        """Where the first line of the goal may begin; the text's end if it cannot yet."""
        if not self.in_line and self.may_be(0):
            return self.line_at
        if not self.within:
            return len(self.text)
        return self.first_at if self.has_first() else self._start_of(self.search.size)

    def _start_of(self, size: int) -> Place:
        """Where the line's last `size` characters that are no white space begin."""
        place = self.chars_at[-size] if size else len(self.text)
        # The text may have fewer blanks here than the suffix.
        return max(place - self.blanks, self.chars_at[-size - 1] + 1)

    def step(self, char: str) -> Place | None:
        """Read the last character of the text; if the whole goal stands there now, return where it
        begins.
        """
        if char == "\n":
            return self._end_line()
        if not char.isspace():
            if len(self.line) < LINE_CHARS:
                self.line += char
            self.search.step(char)
            self.chars_at.append(len(self.text) - 1)
            if self.within and self.search.size == len(self.first):
                self.behind = ""
                self.first_at = self._start_of(len(self.first))
            elif self.behind is not None and len(self.behind) < LINE_CHARS:
                self.behind += char
        elif not self.line:
            self.indent = after_blank(self.indent, char)
        return None

    def _end_line(self) -> Place | None:
        text = self.text
        if self.line:
            self.found = self._matches(self.is_line)
        if self.of_lines:
            self.line_at = len(text)
        elif self.line:
            self.line_at = len(text) - 1 - (text[-2:-1] == ["\r"])
        self.line = ""
        self.behind = None
        self.indent = 0
        self.search.size = 0
        self.chars_at = [len(text) - 1]
        return self.found.get(self.needed)

    def is_line(self, number: int) -> bool:
        """Whether the line so far is this line of the goal."""
        indent, line = self.goal[number]
        short, long = sorted((line, self.line), key=len)
        code = short.rstrip(";,")
        agrees = long.startswith(code) and self._is_more(long[len(code) :])
        return agrees and indent == self.indent

    def _is_more(self, rest: str) -> bool:
        """Whether the rest of a line is only `;` or `,`, a remark, or nothing."""
        rest = rest.lstrip(";,")
        return not rest or (rest.startswith(self.remark) and not self.line.startswith(self.remark))

    def may_be(self, number: int) -> bool:
        """Whether the line so far may become this line of the goal."""
        indent, line = self.goal[number]
        begins = line.startswith(self.line) and (indent == self.indent or not self.line)
        return begins or self.is_line(number)

    def _matches(self, agrees: Callable[[int], bool]) -> Found:
        """`found` with the line so far, if it agrees with the next line of the goal."""
        most = len(self.goal)
        pairs = self.found.items()
        found = {size + 1: at for size, at in pairs if size < most and agrees(size)}
        if self.has_first():
            found[1] = self.start()
        return found

    def suffix_at(self) -> Place:
        """Text from here on may turn out to be the suffix."""
        return min([self.start(), *self._matches(self.may_be).values()])

    def at_end(self) -> tuple[int, Place]:
        """(lines of the goal that the text ends with, where they begin); the last line, if it is
        not the first of the goal, may be cut off.
        """
        found = self._matches(self.may_be) if self.line else self.found
        return max(found.items(), default=(0, 0))


class Gap(Stage):
    """An infill: ends where the text meets the suffix or, if they do not meet, where the suffix
    could follow.

    It is in one of three states, by `inner` and `end_at`:

        awaiting   the suffix could follow nowhere yet: `end_at` is NOWHERE
        may end    it could follow at `end_at`: the first such place, or the last one of an inner
                   block that has ended
        inner      the text is in a comment or a block that ends before the suffix: it goes on, and
                   each place where the suffix could follow becomes `end_at` in turn

    `left_at` is where the text left the surroundings of the cursor for the first time. What
    happens, and what it does:

        a line begins (`on_start`)          where blocks are lines, it enters an inner one or
                                            returns; if it is indented too little, the text leaves
                                            above it
        a line ends (`on_line`)             it enters or returns, by its brackets or the comment at
                                            the cursor; `note_end`, if the suffix could follow
        a bracket of the suffix is closed   the text leaves (`leave`): it is inner no more, and may
                                            end, there or at an earlier place
        the text meets the suffix           the infill ends there
        a fence                             it ends before the fence, or at `left_at`
        `patience` or `doubt` is used up    it ends at `end_at`
        the model writes no more (`flush`)  it ends where the text meets the suffix; else, if the
                                            model was cut off and it may end, at `end_at`; if the
                                            model ended and a bracket of the suffix is closed, at
                                            `left_at`; else with the whole text

    Where it may end, text behind `end_at` waits, and costs patience and doubt: many gaps go on
    after a line that could have ended them, so waiting is worth its tokens. In this gap, at ¦,

        def clamp(n):                   if n < 0:            the suffix could follow: end_at is
            ¦                               return 0         behind this line, which waits
            return n                    return n             the suffix: the infill ends above it

    the text on the right could have been over after its second line. That it writes the suffix
    next shows that it was.
    """

    in_line = False  # the suffix begins with the rest of the cursor's line
    inner = False
    end_at = NOWHERE
    left_at = NOWHERE
    closer_before = ""  # the scanner's, before the last character
    # Characters left before the infill ends at `end_at`, white space not counted.
    patience = AHEAD_CHARS
    doubt = DOUBT  # bits that a line may cost before it ends there
    cost = 0.0  # of the line so far

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__()
        self.scanner = scanner
        self.meeting = Meeting(
            self.text, prompt, suffix, self.in_line, scanner.language.line_comment
        )
        self.depth_at_cursor = len(scanner.stack)
        # Of the literal at the cursor, if the suffix closes it. Quotes before a word open one.
        # Without a literal there is none: no suffix has a NUL.
        _, closer, behind = suffix.partition(scanner.closer or "\0")
        self.closer_at_cursor = "" if behind[:1].isalnum() else closer
        # Which brackets the suffix is in. In `f([¦ 1]);` the prompt opens ( and [, and the suffix
        # closes both: `around` is "[", `suffix_closes` 2, `to_open` 0. If the suffix is ` 1}]);`,
        # `to_open` is 1, since the text has to open a {.
        #
        # The kind of the bracket that the suffix is in, by the first one that it closes or the end
        # of a statement; "" if it has neither.
        self.around = ""
        ahead = scanner_of(scanner.language)
        # What the suffix closes in its first line is as deep as the cursor's line, of which this
        # may be the rest.
        ahead.indent = scanner.indent
        ahead.starting = scanner.starting
        if not self.in_line:  # whole lines may begin within a literal, which they end
            ahead.opener = scanner.opener
            ahead.closer = self.closer_at_cursor
        for char in suffix[:CLOSERS_CHARS]:
            ahead.step(char)
            # By the first closing bracket without a partner, or `;`, outside of brackets that the
            # suffix opens.
            is_known = ahead.unmatched or ahead.last == ";"
            if is_known and not (self.around or ahead.stack):
                self.around = OPENING_OF.get(char, "{")
        # A prompt may begin within a block: a bracket that is closed at less indentation was opened
        # above the prompt.
        outermost = scanner.stack[0].indent if scanner.stack else 0
        missing = [bracket for bracket in ahead.unmatched if bracket.indent >= outermost]
        # How many of the brackets at the cursor the suffix closes, from the outermost on. The
        # others are the text's to close.
        self.suffix_closes = 0
        for bracket, partner in zip(scanner.stack, reversed(missing), strict=False):
            if bracket.kind != partner.kind:
                break
            self.suffix_closes += 1
        # How many the text has to open, since the suffix closes more than are open at the cursor.
        self.to_open = max(0, len(missing) - self.depth_at_cursor)

    def on_start(self) -> None:
        """A line begins: its first character that is not white space has come."""

    def on_line(self) -> None:
        """A line has ended."""

    @property
    def may_end(self) -> bool:
        """Whether the infill may end at `end_at`, so that waiting behind it costs."""
        return self.end_at != NOWHERE and not self.inner

    def leave(self, place: Place) -> None:
        """The text has left the surroundings of the cursor; only the first time counts."""
        if self.left_at == NOWHERE:
            self.left_at = place
            self.inner = False
            self.note_end(place)

    def step(self, char: str) -> None:
        meeting = self.meeting
        begun = meeting.line != ""
        self.closer_before = self.scanner.closer
        self.scanner.step(char)
        place = meeting.step(char)
        if place is not None:
            self.end("stop", place)
        elif char == "\n":
            self.cost = 0.0
            if begun:
                self.on_line()
        elif not char.isspace():
            self._read(char, begun)
        if self.reason:
            return
        if self.patience < 0 or self.cost > self.doubt:
            self.end("block", self.end_at)
        elif char not in "\r`/-":  # perhaps of a line end that the suffix has, a fence or a remark
            self.safe = max(self.safe, min(meeting.suffix_at(), self.end_at))

    def _read(self, char: str, begun: bool) -> None:
        """Read a character that is not white space. `begun`: it is not the first of its line."""
        meeting = self.meeting
        scanner = self.scanner
        if not begun:
            self.on_start()
        if char in OPENING_OF and not scanner.closer and len(scanner.stack) < self.suffix_closes:
            self.leave(len(self.text) - 1 if begun else meeting.line_at)
        if self.may_end:
            self.patience -= 1
            self.cost += self.bits
            self.bits = 0.0
        # In JavaScript the third backtick has just opened a literal.
        is_fence = meeting.line == FENCE and scanner.closer in ("", "`")
        if is_fence and not scanner.language.fences:
            self.end("stop", min(meeting.line_at, self.left_at))

    def note_end(self, place: Place) -> None:
        """The suffix could follow here. The first such place counts, in an inner text the last. (A
        rest of the cursor's line that the model has written is surer, see `GapInLine.on_line`.)
        """
        if not self.may_end:
            self.end_at = place

    def is_suffix(self, lines: int) -> bool:
        """Whether a text that ends with so many lines of the goal has come to the suffix."""
        weight = sum(map(str.isalnum, self.meeting.first))  # letters and digits
        return lines > 1 or (lines == 1 and weight >= END_WEIGHT)

    def flush(self, whole: bool) -> str:
        lines, place = self.meeting.at_end()
        end = self.end_at if self.may_end else NOWHERE
        if self.is_suffix(lines):
            end = place
        elif whole:  # a model that ended by itself has written all up to the suffix
            end = self.left_at if len(self.scanner.stack) < self.suffix_closes else NOWHERE
        if end != NOWHERE:
            return self.cut(self.sent, end)
        # The line end before the suffix, if the model omitted it.
        last = self.cut(0).rstrip(" \t")[-1:]
        lacks_end = self.meeting.of_lines and last not in ("", "\n")
        return self.cut(self.sent) + "\n" * lacks_end


class GapOfLines(Gap):
    """A gap above whole lines, or at the end of a line that has begun. The suffix could follow the
    first line that leaves open just the brackets and headers that the suffix is in and is not
    indented less than the suffix (`fits`), and the text above a line that is indented less than
    the suffix and the last line above the cursor.

    What makes a text `inner`, the first of these that applies:

        it goes on with a comment at the cursor   for as long as it does (`goes_on`)
        the suffix begins with a closing bracket  while its partner is open (`fills`): the last line
                                                  that fits is taken, since nothing but that bracket
                                                  follows it
        blocks by lines (Python)                  the lines, from the first on, that are indented
                                                  more than the suffix
        blocks in braces                          below a header of the text, as `if (x) {`, whose
                                                  block the suffix may be

    `leave` clears it; a later line may set it again.
    """

    # The end of the last line that is not blank; 0: there is none, or the text began with the end
    # of the cursor's line.
    mark = 0
    elsewhere = False  # that line is in another kind of bracket than the suffix (`around`)

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__(scanner, prompt, suffix)
        if last_line(prompt).strip():
            self.doubt = 0.0
        self.above = indent_of(line_of(last_line(prompt.rstrip())))
        self.below = indent_of(self.meeting.goal[0])
        self.indent = scanner.indent  # of the line; in Python's brackets, of the statement
        # The suffix begins with a closing bracket.
        self.begins_with_closer = self.meeting.first[0] in OPENING_OF
        # A closing bracket is indented as its partner's line, and closes what is inside, too. A
        # suffix that is cut off may lack the brackets that close the outer ones, but those come.
        same = [at for at, one in enumerate(scanner.stack, 1) if one.indent == self.below]
        if self.begins_with_closer and same:
            self.suffix_closes = same[-1]
        # The text fills a bracket that nothing else is in.
        self.fills = self.begins_with_closer and len(scanner.stack) > 0
        # The text goes on with the comment at the cursor.
        self.goes_on = scanner.in_comment
        self.inner = self.goes_on or self.fills

    def on_start(self) -> None:
        scanner = self.scanner
        self.indent = scanner.indent
        if scanner.by_lines and not (self.goes_on or self.fills):
            self.inner = self.indent > self.below and (self.inner or not self.mark)
        if self.mark and not self.elsewhere and self.indent < min(self.above, self.below):
            self.leave(self.mark)
            if self.indent < self.meeting.floor:
                self.doubt = 0.0

    def on_line(self) -> None:
        self.mark = self.meeting.line_at
        stack = self.scanner.stack
        self.elsewhere = bool(stack) and self.around not in ("", stack[-1].kind)
        fits = not self.elsewhere and self.fits()
        if self.goes_on:
            self.goes_on = self.closer_before != ""
            self.inner = self.goes_on or self.fills
        elif not self.scanner.by_lines and not self.begins_with_closer:
            self.inner = fits and len(stack) > self.depth_at_cursor
        if fits:
            lines, place = self.meeting.at_end()
            self.note_end(place if self.is_suffix(lines) else self.mark)

    def fits(self) -> bool:
        """Whether the suffix fits below the line that has ended. Its indentation shows which of the
        open brackets it is in.
        """
        scanner = self.scanner
        stack = scanner.stack
        if scanner.closer:  # within a literal: if it is the cursor's, and the suffix ends it
            return scanner.closer == self.closer_at_cursor
        if self.cut(-3).endswith(("\\\n", "\\\r\n")):  # the line goes on
            return False
        # The line is in a bracket that the suffix is not in, so it has to be closed before that.
        # But a suffix that begins with a closing bracket closes one of the same indentation.
        if stack and self.below + self.begins_with_closer <= stack[-1].indent < self.indent:
            return False
        if scanner.opened is not None:  # a header waits for its block
            return scanner.opened < self.below
        return len(stack) <= self.depth_at_cursor and self.below <= self.indent


def indent_of(line: Line) -> int:
    """Its indentation; lines of a block comment are indented by one space more than the code."""
    return line[0] - line[1].startswith("*")


def level_of(code: str) -> int:
    """The brackets that are opened in it, less those that are closed."""
    return sum((char in "([{") - (char in OPENING_OF) for char in code)


class GapInLine(Gap):
    """A gap that ends within a line: the suffix begins with the rest of the cursor's line. It could
    follow a line that lacks this rest and leaves open just the brackets that the suffix closes, or
    replace a rest that the model has written itself.

    With the prompt `total = ` and the suffix ` + tax`, the text `price` lacks the rest and may end
    with its line. With the prompt `add(` and the suffix `)`, only the last bracket of the text
    `1, g(2))` is the rest: by `level`, the first one closes a bracket of the text. It is never
    `inner`.
    """

    in_line = True
    patience = REST_AHEAD_CHARS

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__(scanner, prompt, suffix)
        # A line that is indented less has left both sides: the lines below the cursor's and the
        # cursor's own.
        self.margin = min(self.meeting.floor, columns_of(last_line(prompt)))
        # Brackets opened and not closed: in the text so far, and in the rest; below zero where more
        # are closed than opened.
        self.level = self.rest_level = 0
        ahead = scanner_of(scanner.language)
        for char in suffix.partition("\n")[0]:
            ahead.step(char)
            if not ahead.closer:
                self.rest_level += level_of(char)

    def step(self, char: str) -> None:
        super().step(char)
        if not self.scanner.closer:
            self.level += level_of(char)

    def on_start(self) -> None:
        scanner = self.scanner
        in_parens = scanner.stack and scanner.stack[-1].kind in "(["
        if scanner.indent < self.margin and not in_parens and not scanner.closer:
            self.leave(self.meeting.line_at)
            self.doubt = 0.0

    def flush(self, whole: bool) -> str:
        """Leave out signs at the end of a cut text that begin the rest of the line, as a comma."""
        place = self.meeting.suffix_at()
        signs = self.cut(place)
        if self.level <= level_of(signs) and not any(map(str.isalnum, signs)):
            self.note_end(place)
        return super().flush(whole)

    def is_suffix(self, lines: int) -> bool:
        # The text has the rest now. If more brackets are open than it has to open and the rest
        # leaves open, this is no rest but a part of the text, within brackets of its own.
        return lines > 0 and self.level <= self.to_open + self.rest_level

    def on_line(self) -> None:
        rest = self.meeting.first
        written = self.meeting.found.get(1)
        if written is not None and self.is_suffix(1):
            self.end_at = self.left_at = written  # surer than any place before
            self.doubt = 0.0
        elif self.level == self.to_open and not self.scanner.closer and rest[0] not in OPENING_OF:
            # A rest that closes a bracket of the prompt may as well follow any later line in it.
            self.note_end(self.meeting.line_at)
