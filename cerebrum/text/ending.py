"""Where a completion ends: at stop strings, and when the requested piece is complete.

In: the text that a model writes, in any pieces. Out: the part that the client gets, and why it ends (`Ending`).

    >>> from cerebrum.text.ending import Ending
    >>> Ending("complete", "python", "def f(n):\\n", None, "auto").feed("    return n\\n\\nprint(f(1))\\n")
    ('    return n\\n', 'block')

The model's own end is always believed. A text that goes on is followed with a `Scanner`, which knows where a string, a
comment or a bracket is open, and ends with the block that was asked for (`LineBlock`, `BracketBlock`) or where the
suffix follows (`Gap`). A completion in an unknown language that cannot be guessed ends at two blank lines.

No text is refused, however odd, and the cost of a text is at most its length times a constant. The module is pure: no
socket, no clock, no environment. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import takewhile
from typing import NamedTuple

from cerebrum.text.languages import BY_NAME, LANGUAGES, NOTHING, OPENED, Language
from cerebrum.text.scanner import COMPOUND, LINE_CHARS, PAIRS, Scanner, after_blank

# ------------------------------------------------------------------------------------------------------ the natural end
#
# A completion passes through up to five stages. A stage reads one character at a time, so the outcome does not depend
# on how tokens split the text. It decides how much of the text may go out (`safe`) and whether the completion is over
# (`reason`; then `safe` is where it ends). Text that is not decided yet waits, usually only the start of a line.

NAME_CHARS = 100  # a function with a longer name is not recognized as a helper
COMMENT_CHARS = 200  # a longer comment is not waited for: more often than not it is outside the block
FUNCTION = re.compile(r"(?:async\s+)?def\b")
DEFINITION = re.compile(r"(?:async\s+)?(?:def|class)\b")
CONTROL = re.compile(
    r"(?:^|\n)[^\S\n]*(?:else\s+)?(?:if|else|for|while|do|switch|try|match|loop|unsafe|select|when|foreach|elseif|guard|repeat"
    r"|using|lock|synchronized|defer)\b[^\n]*$"
)
CODE = re.compile(
    r"\n *(?:(?:def|class|if|for|while|with|elif|except) .*:|return .*|from \S+ import .*|[\w.]+ = .*|[\w.]+\(.*\))\n"
)
CALL = re.compile(rf"(?:(?<=self\.)|(?<=this\.)|(?<![\w.]))(\w{{1,{NAME_CHARS}}})\(")
CLAUSES = ("else", "elif", "elseif", "except", "finally", "catch", "while")  # continue a statement after its block
GOES_ON = tuple(".?&|+:=,")  # a line that starts so continues the one above, in languages without semicolons
# An answer's blocks in these are not the code, unless there are no others.
BESIDE = frozenset({"bash", "sh", "shell", "console", "json", "text", "plaintext", "output", "powershell", "zsh"})
PROSE = re.compile(r"[A-Z][a-z']*[ ,!].*[^;{}]")
HEADER = re.compile(r"\S[^\n]*[:{][ \t]*\r?\n")  # of a block in column 0
FENCE = re.compile(r"(`{3,}+|~{3,}+)([^`\n]*+)")
CHATTER_CHARS = 4000  # a chat's answer without a fence in this many characters has none
REPEATED_LINES = 12  # a model that writes the same line this often in a row is starting over ...
REPEATED_DATA = 24  # ... unless the line is data (it ends with a comma) or only closes something
REPEATED_COPIES = 4  # the same for a block of two or more lines
PERIOD_LINES = 24  # the longest such block
PERIOD_CHARS = 400  # a line that ends with this much of one short pattern never ends
LIGHT = re.compile(r".*,$|\W*$|</[\w:-]+>$|\s*(?:end|fi|done)\W*$")
MEET_CHARS_BEFORE = 3000  # of the prompt's end, searched for lines like the suffix's first ones
GOAL_LINES = 40  # of the suffix, searched for the same
MEET_LINES = 6  # compared at most of the suffix
MEET_CHARS = 7  # the compared lines have at least this many, unless the suffix has fewer
REST_WEIGHT = 3  # letters and digits in the rest of the cursor's line
END_WEIGHT = 6  # letters and digits in one line at the text's end
CLOSERS_CHARS = 4000  # of the suffix, searched for closing brackets
# How far an infill that could have ended goes on to meet the suffix, in characters without white space ...
AHEAD_CHARS = 300  # ... if whole lines are missing
REST_AHEAD_CHARS = 80  # ... if the suffix begins with the rest of the cursor's line
WRITTEN_AHEAD_CHARS = 12  # ... after the model has written that rest, or a blank line instead
GUESS_CHARS = 4000  # of the prompt's end and of the suffix, read to guess the syntax and the indentation
GUESSES = {  # lines like the header of a definition, found in few other languages and in no prose
    "python": r"(?:async[ \t]+)?(?:def[ \t]+\w+\(|class[ \t]+\w+[(:])[^\n]{0,300}:",
    "rust": r"(?:pub(?:\([^)\n]{0,40}\))?[ \t]+)?(?:(?:async|unsafe)[ \t]+)?(?:fn[ \t]+\w+|impl\b)[^\n;]{0,300}\{",
    "go": r"func[ \t]+[^\n]{0,300}\{",
    "javascript": r"(?:export[ \t]+)?(?:default[ \t]+)?(?:async[ \t]+)?(?:function\b|class[ \t]+\w+)[^\n]{0,300}\{",
    "c": r"(?!(?:if|for|while|switch|else)\b)[A-Za-z_][\w*&:<> \t]{0,100}[ \t*&]\w+\([^;\n{}]{0,300}\)[ \t]*\{",
}
HEADERS = {name: re.compile(rf"^[ \t]{{0,200}}{header}[ \t]*\r?$", re.M) for name, header in GUESSES.items()}
# Python's headers that define nothing.
STATEMENTS = re.compile(r"^[ \t]*(?:if|elif|else|for|while|try|except|with)\b[^\n;{]{0,200}:[ \t]*\r?$", re.M)


def guess(prompt: str, suffix: str) -> Language | None:
    """The syntax of code around a gap; of code before the cursor, only if a definition shows it."""
    text = prompt[-GUESS_CHARS:] + suffix[:GUESS_CHARS]
    name = next((name for name, header in HEADERS.items() if header.search(text)), "")
    if suffix and not name:
        name = "python" if STATEMENTS.search(text) else "c"
    return LANGUAGES.get(name)


class Stage:
    """Text goes in and comes out, until there is a `reason` to end. All positions count characters of `text`."""

    def __init__(self) -> None:
        self.text: list[str] = []  # a list of characters: += on a string attribute would copy the string each time
        self.safe = 0  # text before this position may be sent
        self.sent = 0  # text before this position has been sent
        self.reason: str | None = None

    def cut(self, start: int, stop: int | None = None) -> str:
        return "".join(self.text[start:stop])

    def step(self, char: str) -> None:
        """Read a character; move `safe`, or call `end`."""
        raise NotImplementedError

    def end(self, reason: str, at: int) -> None:
        """End the completion at a position, though never before text that may have been sent."""
        self.reason, self.safe = reason, max(at, self.safe)

    def feed(self, piece: str) -> tuple[str, str | None]:
        """(text that may be sent now, why the completion is over or None)."""
        for char in piece:
            self.step(char)
            if self.reason:
                break
        out, self.sent = self.cut(self.sent, self.safe), self.safe
        return out, self.reason

    def flush(self, whole: bool) -> str:
        """The text left to send when no more tokens come: the model has ended (`whole`) or may write no more."""
        return self.cut(self.sent)


class StopStrings(Stage):
    """Ends the text before the first stop string, and holds back the possible start of one.

    The first complete stop string counts, however tokens split the text; of two at the same place, the longer. Each has
    its own Knuth-Morris-Pratt search. No stop string may be empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        super().__init__()
        self.stops = [(stop, borders_of(stop)) for stop in stops]
        self.sizes = [0] * len(self.stops)  # of each string: how much of it the text ends with

    def step(self, char: str) -> None:
        self.text.append(char)
        self.sizes = [matched(*stop, size, char) for stop, size in zip(self.stops, self.sizes, strict=True)]
        self.safe = len(self.text) - max(self.sizes, default=0)
        complete = [size for (stop, _), size in zip(self.stops, self.sizes, strict=True) if size == len(stop)]
        if complete:
            self.end("stop", len(self.text) - max(complete))


def matched(text: str, borders: list[int], size: int, char: str) -> int:
    """The length of a match with the start of a text, which was `size`, after one more character."""
    while size and (size == len(text) or text[size] != char):
        size = borders[size - 1]
    return size + (text[size] == char)


def borders_of(text: str) -> list[int]:
    """For each prefix of a text: the length of the longest shorter prefix that it ends with."""
    borders = [0]
    for char in text[1:]:
        borders.append(matched(text, borders, borders[-1], char))
    return borders


class Typed(Stage):
    """Removes the indentation already typed, which models often repeat.

    The cursor is in `column`, below white space alone; the line needs indentation up to the column `due`.
    """

    def __init__(self, column: int, due: int) -> None:
        super().__init__()
        self.column, self.due, self.starting = column, due, True

    def step(self, char: str) -> None:
        if self.starting and char in " \t":
            column = after_blank(self.column, char)
            if column > self.due:
                return
            self.column = column
        else:
            self.starting = False
        self.text.append(char)
        self.safe = len(self.text)


def columns_of(line: str) -> int:
    """The indentation of a line in columns."""
    return reduce(after_blank, takewhile(" \t".__contains__, line), 0)


def due_columns(prompt: str, column: int, opened: int | None) -> int:
    """The final indentation of a line typed up to `column`: that of the line above, or whole levels more.

    `opened` is the indentation of a header right above, or None.
    """
    above = columns_of(prompt.rstrip().rpartition("\n")[2]) if opened is None else opened
    if opened is None and column <= above:
        return above
    widths = (columns_of(line) for line in prompt[-GUESS_CHARS:].split("\n")[1:] if line.strip())
    tabs = prompt[prompt.rfind("\n") + 1 :].startswith("\t")
    step = 8 if tabs else min((width for width in widths if width > 1), default=4)
    return above + max(1, -((above - column) // step)) * step


def is_announced(language: Language, prompt: str) -> bool:
    """Whether the line right above the cursor's is a comment or a decorator: what it announces is asked for."""
    above, _, line = prompt.rpartition("\n")
    above = above.rpartition("\n")[2].strip()
    starts = (*language.comment_starts, "@", "#[") + ("[",) * language.directives
    ends = (language.block_comment or ())[1:]
    return not line.strip() and (above.startswith(starts) or above.endswith(ends))


class Block(Stage):
    """Lines up to the end of a block, and of the helpers: functions below it that it calls and nothing else defines.

    A subclass decides where a line begins (`outside`) and where it ends (`ended`).
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__()
        self.scanner = scanner
        # The line so far, including the prompt's part of it, without its indentation.
        self.line = prompt.rpartition("\n")[2].lstrip()[:LINE_CHARS]
        self.held = scanner.starting  # the line is held back: it may turn out to be outside
        self.mark = 0  # the end of the last line that is not blank, where the completion ends
        self.fences = scanner.language is not LANGUAGES["markdown"]  # a fence ends the code
        self.ticks = 0  # backticks in a row: a fence is no code in any language
        function = scanner.language.function
        header = rf"\b(?:(?:async|export|local|pub|static|suspend)\s+){{0,4}}{function}\s+(\w{{1,{NAME_CHARS}}})\s*[(<]"
        self.helper = re.compile(header) if function else NOTHING
        self.code: list[str] = []  # the line's code
        self.called, self.defined = set[str](), set(self.helper.findall(prompt))  # functions

    def outside(self, word: str) -> str | None:
        """The reason to end before the line that begins with `word`; "" for none; None while that is undecided."""
        raise NotImplementedError

    def ended(self, line: str) -> str | None:
        """The reason to end with this line, or None."""
        raise NotImplementedError

    def step(self, char: str) -> None:
        self.ticks = self.ticks + 1 if char == "`" and self.fences and (self.ticks or not self.scanner.closer) else 0
        self.text.append(char)
        self.scanner.step(char)
        if self.scanner.language.function and not self.scanner.closer:
            self.code.append(char)
        reason: str | None = ""
        if self.ticks == len("```"):
            self.end("stop", self.mark if self.held else len(self.text) - self.ticks)
        elif char == "\n" and not self.scanner.closer and (self.scanner.starting or not self.scanner.by_lines):
            line, held, self.line, self.held = self.line.rstrip(), self.held, "", True
            if held and line:  # the line is complete: decide now
                reason = self.outside(f"{line}\n")
            if reason == "":  # the line is inside; None: a comment that waits
                self.mark = len(self.text) if line else self.mark
                self._note_calls()
                reason = self.ended(line)
        else:
            if char == "\n":
                self.line = ""
            elif len(self.line) < LINE_CHARS and (self.line or not char.isspace()):
                self.line += char
            if self.held and not self.ticks and (word := self.line.rstrip()):
                reason = self.outside(word)
                self.held = reason != ""
            if not self.held:
                self.safe = len(self.text) - self.ticks
        if reason:
            self.end(reason, self.mark)

    def _note_calls(self) -> None:
        """Read the calls and definitions in the code of a line."""
        line = "".join(self.code)
        self.code.clear()
        self.defined.update(self.helper.findall(line))
        self.called = (self.called | set(CALL.findall(line))) - self.defined

    def helps(self, word: str) -> str | None:
        """`outside` for the line after a whole function: "" if it defines a missing one."""
        if match := self.helper.match(word):
            return "" if match[1] in self.called else "block"
        begun = word.partition(f"{self.scanner.language.function} ")[2].lstrip()  # the start of the function's name
        may_help = re.fullmatch(r"[\w ]{1,200}", word) and any(name.startswith(begun) for name in self.called)
        return None if may_help else "block"


def continues(word: str) -> str | None:
    """`outside` for the line after a block that may have an `else`: "" for such a clause, None while it may be one."""
    name = re.match(r"\w*", word)
    if name and name[0] != word:
        return "" if name[0] in CLAUSES else "block"
    return None if any(clause.startswith(word) for clause in CLAUSES) else "block"


class LineBlock(Block):
    """Blocks by indentation: ends before the first line outside the requested block.

    That block is the outermost function open at the cursor (a class is completed method by method). Without one, it is
    the outermost other block; without any, in Python, the first definition that the model writes. Below a comment or a
    decorator in a class it is the next member. A statement begun outside all blocks ends at a blank line, in SQL after
    a semicolon. If only white space precedes the cursor in its line, the indentation of the first line written shows
    which blocks are open. Except in Python and YAML, a closing line at the block's own indentation belongs to it. A
    less indented comment below a blank line waits for the next line of code and is inside if that is.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        language = scanner.language
        self.base: int | None = None  # lines indented no deeper are outside; -1: none is; None: not known yet
        self.level = 0  # indentation of the line that begins
        self.top = 0  # with `base` -1: the indentation of the statement being completed
        self.clauses = False  # an `else` or the like may go on with the block
        self.statement = False  # the block is a statement outside all blocks
        self.blank = self.over = False  # the last line was blank; the last one that was not ends a statement
        self.closed = False  # a closing line has been written
        self.member = False  # only the next member of a class is asked for ...
        self.begun = self.deep = False  # ... and it has begun, and a deeper line follows
        self.waiting = False  # the text since `mark` is a comment, inside if the next line of code is
        last = prompt.rstrip().rpartition("\n")[2]
        self.open_ended = bool(language.blocks != "lines" and language.imports.match(last)) or last.startswith("#!")
        self.announced = is_announced(language, prompt) and bool(language.defines.search(prompt))
        self.closing = re.compile(rf"(?:{language.closing})" if not language.colons and language.closing else r"(?!)")
        self.inside = re.compile(language.inside.removeprefix("|") or r"(?!)")
        head = scanner.head.strip()
        if language.colons and (head or scanner.fresh):
            blocks = scanner.enclosing(scanner.indent) if head else scanner.blocks
            self._choose([*blocks, (scanner.indent, head)] if COMPOUND.match(head) else blocks, bool(head))

    def _choose(self, blocks: list[tuple[int, str]], typed: bool) -> None:
        scanner, language = self.scanner, self.scanner.language
        functions = [block for block in blocks if FUNCTION.match(block[1])]
        others = [block for block in blocks if not language.containers.match(block[1])]
        # A prompt from the middle of a file may lack the header of its outermost block.
        margin = scanner.indent if scanner.margin is None else scanner.margin
        nothing = (min(margin, scanner.indent) - 1, "def")
        self.base, header = (functions or others or blocks[-1:] or [nothing])[0]
        self.top = scanner.indent
        if self.announced and not functions and not others and not typed:
            self.base, self.member = scanner.indent, True
        self.clauses = language.colons and not DEFINITION.match(header)
        self.statement = self.base == -1 and (typed or not language.colons) and not self.open_ended

    def ended(self, line: str) -> str | None:
        blocks, self.blank = self.scanner.blocks, not line
        language = self.scanner.language
        if line:
            self.over = not line.endswith(":") if language is LANGUAGES["markdown"] else line.endswith(";")
            self.begun = self.begun or not line.startswith(("@", *language.comment_starts))
        if self.base == -1 and language.colons and blocks and DEFINITION.match(blocks[0][1]):
            self.base, self.clauses = 0, False
        return "block" if self.closed else None

    def outside(self, word: str) -> str | None:
        scanner, language = self.scanner, self.scanner.language
        self.waiting = False
        if scanner.in_comment and (self.base is None or not self.blank):
            return ""  # a comment right below code belongs to it
        if any(opener != word and opener.startswith(word) for opener, _ in scanner.comments):
            return None
        if self.base is None:
            self._choose(scanner.enclosing(scanner.indent), False)
        assert self.base is not None
        if language.items and word in ("-", "--"):
            return None
        if word[-1] != "\n":
            self.level = scanner.level(word)
        if self.level > self.base:
            self.deep = self.begun
            return self._goes_on(word) if self.statement and self.level <= self.top else ""
        comment = self.blank and word.startswith(language.comment_starts)
        if comment and len(self.text) - self.mark < COMMENT_CHARS:
            self.waiting = True
            return None
        if self.level < self.base:
            return "block"
        if self.member and not self.deep and (not self.begun or not self.blank):
            return ""
        if language.colons:
            return "" if word[0] in PAIRS else continues(word) if self.clauses else self.helps(word)
        return self._closes(word)

    def flush(self, whole: bool) -> str:
        return self.cut(self.sent, self.mark if self.waiting else None)

    def _closes(self, word: str) -> str | None:
        """`outside` for a line that may close the block, continue it, or be the next thing."""
        if re.fullmatch(r"[\w<]{1,20}", word):
            return None
        if word[0] in PAIRS or self.closing.match(word):
            self.closed = self.level == self.base
            return ""
        unfinished = self.scanner.language.blocks == "statements" and not self.over
        return "" if unfinished or self.inside.match(word) else "block"

    def _goes_on(self, word: str) -> str | None:
        """`outside` for a line of a statement outside all blocks."""
        language = self.scanner.language
        colon = language is LANGUAGES["markdown"] and not self.over  # announces what follows
        over = self.over if language.blocks == "statements" else self.blank and not colon
        return self._closes(word) if self.mark and over else ""


class Goal(NamedTuple):
    """What a completion in braces ends with."""

    kind: str  # a "block", a "call" with a block among its arguments, a "statement", a "directive" or "data"
    depth: int  # it is complete when no more brackets than these are open
    clauses: bool = False  # an `else` or the like may go on with it


class BracketBlock(Block):
    """Blocks in braces: ends after the line that completes the goal.

    The goal is the outermost open block that is not a container: a function with everything in it. Without one, it is
    the statement or signature in progress, or what a comment or decorator above the cursor announces; then the
    innermost class, impl or namespace; then the first function or class that the model writes. Closing brackets on
    their own lines after the block belong to it.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        self.goal: Goal | None = None  # None: it has not begun
        self.complete = False  # the goal is complete, but the next line may still belong to it
        language, stack, head = scanner.language, scanner.stack, scanner.head.strip()
        braces = [depth for depth, bracket in enumerate(stack) if bracket.kind == "{"]
        things = [depth for depth in braces if not language.containers.search(stack[depth].header)]
        imported = bool(head) and language.imports.match(head.rpartition("\n")[2]) is not None
        begun = bool(head) and not imported and not (braces and scanner.is_over)
        announced = is_announced(language, prompt) and bool(braces or language.defines.search(prompt))
        if language.blocks == "brackets" and stack:
            self.goal = Goal("data", len(stack) - 1)
        elif things:
            self._choose(things[0])
        elif (scanner.opener, scanner.closer) == ("#", "\n") and prompt.endswith(("\\\n", "\\\r\n")):
            self.goal = Goal("directive", len(braces))
        elif begun or announced or scanner.in_parens:
            self.goal = Goal("statement", braces[-1] + 1 if braces else 0, CONTROL.search(head) is not None)
            if announced and not head.startswith(("@", "#[", "[")):
                scanner.last = ""
        elif braces:
            self._choose(braces[-1])

    def _choose(self, depth: int) -> None:
        """Choose the block at `stack[depth]`; if it is an argument of a call, choose the call."""
        stack, outer = self.scanner.stack, depth
        while outer and stack[outer - 1].kind in "([":
            outer -= 1
        clauses = CONTROL.search(stack[depth].header) is not None
        self.goal = Goal("block" if outer == depth else "call", outer, clauses)

    def step(self, char: str) -> None:
        before = len(self.scanner.stack)
        super().step(char)
        stack, language = self.scanner.stack, self.scanner.language
        if self.goal is None and before == 0 and len(stack) == 1:
            header = stack[0].header
            defines = stack[0].kind == "{" and language.definition.search(header) and not CONTROL.search(header)
            if defines or language.blocks == "brackets":
                self._choose(0)

    @property
    def _may_go_on(self) -> bool:
        """Whether the line after the goal may use its value: in a statement or a call without a semicolon."""
        assert self.goal
        return self.goal.kind in ("statement", "call") and self.scanner.language.line_ends

    def ended(self, line: str) -> str | None:
        scanner, goal = self.scanner, self.goal
        if goal is None or len(scanner.stack) > goal.depth:
            return None
        if goal.kind == "directive":
            return "block"
        if line.startswith(("@", "#[")):
            return None
        if goal.kind == "statement" and scanner.last not in ("}", ";") and not (scanner.is_over and scanner.last):
            return "block" if not line and self.mark else None
        self.complete = True
        goes_on = self._may_go_on and scanner.last != ";"
        return None if scanner.stack or goal.clauses or goes_on or self.called else "block"

    def outside(self, word: str) -> str | None:
        if not self.complete or self.goal is None:
            return ""
        if word[0] in PAIRS or word[0] == "{" or (word[0] in GOES_ON and self._may_go_on):
            reason: str | None = ""
        else:
            reason = continues(word) if self.goal.clauses else self.helps(word)
        self.complete = reason != ""
        return reason


Line = tuple[int, str]  # (indentation in columns, text without its white space)


def line_of(line: str) -> Line:
    return columns_of(line), "".join(line.split())[:LINE_CHARS]


def lines_of(text: str) -> list[Line]:
    """The first lines of a text, blank ones left out."""
    return [line_of(line) for line in text.split("\n", GOAL_LINES)[:GOAL_LINES] if line.strip()]


class Meeting:
    """Finds where a text begins to agree with the suffix: where it has the suffix's first lines, the `goal`.

    A subclass finds the first of them. As many lines are compared as are found nowhere else around the cursor. White
    space within lines and blank lines do not count, but indentation does. A remark that a model adds to a line does not
    count either.
    """

    whole = False  # whole lines are missing, line ends included

    def __init__(self, prompt: str, lines: list[Line], fewest: int, remark: str) -> None:
        above = [line_of(line) for line in prompt[-MEET_CHARS_BEFORE:].split("\n")[:-1] if line.strip()]
        around = above + lines[1:]
        self.goal, self.sure = lines[:MEET_LINES], False
        for size in range(1, len(self.goal) + 1):
            goal = lines[:size]
            long = sum(len(text) for _, text in goal) >= MEET_CHARS or (size == len(lines) and size >= fewest)
            if long and all(goal != around[at : at + size] for at in range(len(around))):
                self.goal, self.sure = goal, True  # found nowhere else
                break
        self.weight = sum(map(str.isalnum, lines[0][1]))  # letters and digits in the first line of the goal
        self.remark = remark or "\n"  # what begins one; no line has a line end
        self.indent, self.line = line_of(prompt.rpartition("\n")[2])  # of the text so far
        self.edge = 0  # where the text would be cut if the suffix began with this line
        self.borders = borders_of(lines[0][1])
        self.size = 0  # characters of the goal's first line that the line so far ends with
        self.places = [-1]  # of the line end above, and of the line's characters that are not white space
        self.found: list[tuple[int, int]] = []  # (lines of the goal above, where their first begins), longest first

    def has_first(self) -> bool:
        """Whether the line so far is, or ends with, the first line of the goal."""
        raise NotImplementedError

    def start(self, text: list[str]) -> int:
        """Where the first line of the goal may begin; the text's end if it cannot yet."""
        raise NotImplementedError

    def step(self, char: str, text: list[str]) -> int | None:
        """Read the last character of the text; if the whole goal stands there now, return where it begins."""
        if char == "\n":
            if self.line:
                self.found = self._matches(text, self.is_line)
            if self.line or self.whole:
                self.edge = len(text) if self.whole else len(text) - 1 - (text[-2:-1] == ["\r"])
            self.line, self.indent, self.size, self.places = "", 0, 0, [len(text) - 1]
            return self.found[0][1] if self.found and self.found[0][0] == len(self.goal) else None
        if not char.isspace():
            self.line += char if len(self.line) < LINE_CHARS else ""
            self.size = matched(self.goal[0][1], self.borders, self.size, char)
            self.places.append(len(text) - 1)
        elif not self.line:
            self.indent = after_blank(self.indent, char)
        return None

    def is_line(self, number: int) -> bool:
        """Whether the line so far is this line of the goal."""
        indent, line = self.goal[number]
        return self.indent == indent and f"{self.line}\n".startswith((line + "\n", line + self.remark))

    def may_be(self, number: int) -> bool:
        """Whether the line so far may become this line of the goal."""
        indent, line = self.goal[number]
        line += self.remark
        return not self.line or (self.indent == indent and line.startswith(self.line[: len(line)]))

    def _matches(self, text: list[str], agrees: Callable[[int], bool]) -> list[tuple[int, int]]:
        """`found` with the line so far."""
        found = [(size + 1, at) for size, at in self.found if size < len(self.goal) and agrees(size)]
        return [*found, (1, self.start(text))] if self.has_first() else found

    def held(self, text: list[str]) -> int:
        """Text from here on may turn out to be the suffix."""
        begun = [at for size, at in self.found if size < len(self.goal) and self.may_be(size)]
        return min([self.start(text), *begun])

    def at_end(self, text: list[str]) -> tuple[int, int]:
        """(lines of the goal that the text ends with, where they begin); the last line may be cut off."""
        found = self._matches(text, self.may_be) if self.line else self.found
        return found[0] if found else (0, 0)


class LinesBelow(Meeting):
    """Whole lines of the suffix: those below the cursor's or, with `whole`, the cursor's own too, which is empty."""

    def __init__(self, prompt: str, lines: list[Line], whole: bool, remark: str) -> None:
        super().__init__(prompt, lines, 1, remark)
        self.whole = whole
        self.indent = -1 if self.line else self.indent  # a line that begins in the prompt is none of the suffix's
        self.within = whole and len(self.goal) > 1  # the suffix may begin in the middle of a word

    def has_first(self) -> bool:
        return self.is_line(0) or (self.within and self.line != self.goal[0][1] and self.size == len(self.goal[0][1]))

    def start(self, text: list[str]) -> int:
        return self.edge if self.may_be(0) else self.places[-self.size] if self.within and self.size else len(text)


class RestOfLine(Meeting):
    """The rest of the cursor's line, which may be the end of any line of the text, and the lines below it."""

    def __init__(self, prompt: str, rest: str, below: list[Line], remark: str) -> None:
        super().__init__(prompt, [(0, line_of(rest)[1]), *below], 2, remark)
        self.blanks = len(rest) - len(rest.lstrip())  # before the rest

    def has_first(self) -> bool:
        return self.size == len(self.goal[0][1])

    def start(self, text: list[str]) -> int:
        place = self.places[-self.size] if self.size else len(text)
        return max(place - self.blanks, self.places[-self.size - 1] + 1)


class Gap(Stage):
    """An infill: ends where the text meets the suffix or, if they do not meet, where the suffix could follow.

    Each event has its rule: the text meets the suffix (in `step`), a line begins (`on_start`), a line ends (`on_line`),
    a blank line ends (`on_blank_line`), the text leaves the cursor's surroundings (`on_leaving`), the model writes no
    more (`flush`). The rules note in `enough` where the infill could end. What the model writes behind that place is
    sent if the model meets the suffix before the `patience` is used up, or ends by itself: many gaps go on after a line
    that could have ended them, so waiting is worth its tokens. A client in a hurry sets `predict_ms`.
    """

    inner = False  # the text is in a block that ends before the suffix, so all of it belongs to the gap

    def __init__(self, scanner: Scanner, meeting: Meeting, suffix: str, patience: int) -> None:
        super().__init__()
        self.scanner, self.meeting = scanner, meeting
        # Around the cursor: its literal, the open brackets, and how many of these the suffix leaves open.
        self.literal, self.depth, self.unmatched = scanner.closer, len(scanner.stack), scanner.unmatched
        closers = 0 if self.literal else Scanner(scanner.language, suffix[:CLOSERS_CHARS]).unmatched
        self.closed_below = min(self.depth, closers)
        self.enough: int | None = None  # the infill could end here ...
        self.left: int | None = None  # ... or at most here: a bracket or a line does not belong to the gap
        self.patience = patience  # characters left before the infill ends at `enough`, white space not counted

    def on_start(self) -> None:
        """A line begins: its first character that is not white space has come."""

    def on_line(self) -> None:
        """A line has ended."""
        raise NotImplementedError

    def on_blank_line(self) -> None:
        """A blank line has ended."""

    def on_leaving(self, place: int) -> None:
        """The text has left the surroundings of the cursor at a place."""
        if self.left is None:
            self.left, self.inner = place, False
            self.could_end(place)

    def step(self, char: str) -> None:
        scanner, meeting, begun = self.scanner, self.meeting, bool(self.meeting.line)
        self.text.append(char)
        scanner.step(char)
        place = meeting.step(char, self.text)
        if place is not None and meeting.sure:
            self.end("stop", place)
            return
        if place is not None:
            self.could_end(place)
        if char == "\n" and begun:
            self.on_line()
        elif char == "\n":
            self.on_blank_line()
        elif not char.isspace():
            if not begun:
                self.on_start()
            if char in PAIRS and not scanner.closer and self.has_left():
                self.on_leaving(len(self.text) - 1 if begun else meeting.edge)
            self.patience -= self.enough is not None and not self.inner
            if meeting.line == "```" and scanner.closer in ("", "`") and scanner.language is not LANGUAGES["markdown"]:
                self.end("stop", meeting.edge if self.left is None else self.left)
        if self.reason:
            return
        if self.patience < 0 and self.enough is not None:
            self.end("block", self.enough)
        elif char not in "\r`":  # perhaps part of a line end that the suffix has, or of a fence
            place = meeting.held(self.text)
            self.safe = max(self.safe, place if self.enough is None else min(place, self.enough))

    def could_end(self, place: int) -> None:
        if self.enough is None or self.inner:
            self.enough = place

    def has_left(self) -> bool:
        """Whether the text has closed a bracket that the suffix closes, or one from outside the text."""
        return len(self.scanner.stack) < self.closed_below or self.scanner.unmatched > self.unmatched

    def is_suffix(self, lines: int) -> bool:
        """Whether a text that ends with so many lines of the goal has come to the suffix."""
        return lines > 1 or (lines == 1 and self.meeting.weight >= END_WEIGHT)

    def flush(self, whole: bool) -> str:
        lines, place = self.meeting.at_end(self.text)
        end = place if self.is_suffix(lines) else self.enough if not whole else self.left if self.has_left() else None
        if end is not None:
            return self.cut(self.sent, max(end, self.sent))
        text = self.cut(0).rstrip(" \t")
        newline = self.meeting.whole and bool(text.strip()) and not text.endswith("\n")
        return self.cut(self.sent) + "\n" * newline


class GapOfLines(Gap):
    """A gap above whole lines. The suffix could follow the first line that leaves no bracket or header open and is not
    indented less than the suffix, and the text above a line that is indented less than cursor and suffix."""

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        first, (rest, _, after) = prompt.rpartition("\n")[2], suffix.partition("\n")
        whole = bool(rest.strip())
        lines = lines_of(suffix if whole else after)
        super().__init__(scanner, LinesBelow(prompt, lines, whole, scanner.language.line_comment), suffix, AHEAD_CHARS)
        above = line_of(first if first.strip() else prompt.rstrip().rpartition("\n")[2])
        # Lines of a block comment are indented by one space more than the code.
        self.above, self.below = (indent - line.startswith("*") for indent, line in (above, lines[0]))
        self.indent = scanner.indent  # of the line
        self.mark: int | None = None  # the end of the last line that is not blank
        closes = lines[0][1][0] in PAIRS and bool(scanner.stack) and not self.literal
        self.inner = closes or (scanner.by_lines and bool(first.strip()) and self.indent > self.below)

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
        elif len(scanner.stack) > self.depth:
            fits = False
        elif opened is None:
            fits = self.below <= self.indent or scanner.in_parens
        else:
            fits = opened < self.below
        if fits:
            self.could_end(self.mark)


class GapInLine(Gap):
    """A gap that ends within a line: the suffix begins with the rest of the cursor's line. It could follow a line that
    lacks this rest and leaves no bracket open, or replace a rest that the model has written itself."""

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        rest, _, after = suffix.partition("\n")
        meeting = RestOfLine(prompt, rest, lines_of(after), scanner.language.line_comment)
        super().__init__(scanner, meeting, suffix, REST_AHEAD_CHARS)
        self.rest = meeting.goal[0][1]

    def on_line(self) -> None:
        lines, written = self.meeting.found[-1] if self.meeting.found else (0, 0)
        closes = self.rest[0] in PAIRS and self.scanner.stack  # the rest closes what the cursor is in
        if lines == 1 and self._has_closed():
            self.end("stop", written)
        elif lines == 1 and ("=" in self.rest or self.meeting.weight >= REST_WEIGHT):
            self.enough, self.patience = written, min(self.patience, WRITTEN_AHEAD_CHARS)
        elif not closes and len(self.scanner.stack) <= self.depth and not self.scanner.closer:
            self.could_end(self.meeting.edge)

    def on_blank_line(self) -> None:
        if self.enough is not None:  # few gaps within a line continue after a blank one
            self.patience = min(self.patience, WRITTEN_AHEAD_CHARS)

    def _has_closed(self) -> bool:
        """Whether the text has closed the literal around the cursor, which the suffix closes."""
        return bool(self.literal) and not self.scanner.closer and self.rest.startswith(self.literal)

    def is_suffix(self, lines: int) -> bool:
        closes = self.rest[0] in "\"'`)]}" or (self.rest.isalnum() and len(self.rest) < 3)
        return super().is_suffix(lines) or (lines == 1 and (self._has_closed() or not closes))


def gap_of(scanner: Scanner, prompt: str, suffix: str) -> Gap:
    in_line = prompt.rpartition("\n")[2] and suffix.partition("\n")[0].strip()
    return GapInLine(scanner, prompt, suffix) if in_line else GapOfLines(scanner, prompt, suffix)


class Blanks(Stage):
    """Code of an unknown language: ends before two blank lines in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.mark = 0  # the end of the last line that is not blank
        self.lines = 0  # line ends since the last other character

    def step(self, char: str) -> None:
        self.text.append(char)
        if not char.isspace():
            self.lines, self.safe = 0, len(self.text)
        elif char == "\n":
            self.lines += 1
            if self.lines == 1:
                self.mark = len(self.text)
            elif self.lines == 3 and self.safe:
                self.end("block", self.mark)


class Indent(Stage):
    """Ends before the first line, except the cursor's own, that is indented by fewer than `least` characters."""

    def __init__(self, least: int, whole: bool) -> None:
        super().__init__()
        self.least, self.whole = least, whole
        self.indent: int | None = None  # of the line that begins; None: it has begun
        self.mark = 0  # where the text ends if that line is outside

    def step(self, char: str) -> None:
        self.text.append(char)
        if char == "\n":
            if self.indent is None:
                self.mark = len(self.text) - (not self.whole)
            self.indent = 0
        elif self.indent is not None and char in " \t":
            self.indent += 1
        elif self.indent is not None and not char.isspace():
            if self.indent < self.least:
                self.end("block", self.mark)
                return
            self.indent = None
        if self.indent is None:
            self.safe = len(self.text)


class Repeat(Stage):
    """The last stage: ends a text that repeats the same line or block of lines, indentation included.

    Two copies go out. Later ones wait: enough copies end the text after the second copy; a differing line frees them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.line: list[str] = []  # the characters of the line so far
        self.lines: list[tuple[str, bool]] = []  # (line, whether it is data or only closes something)
        self.runs = [0] * (PERIOD_LINES + 1)  # runs[n]: consecutive lines that each equal the line n before
        self.hold: int | None = None  # where the third copy may have begun

    def step(self, char: str) -> None:
        self.text.append(char)
        position = len(self.text)
        if char != "\n":
            self.line.append(char)
            if len(self.line) >= PERIOD_CHARS and len(self.line) % 40 == 0:
                tail = "".join(self.line[-PERIOD_CHARS:])
                if any(tail.startswith(tail[size:]) for size in range(1, PERIOD_CHARS // 4)):
                    self.end("repeat", position)
        else:
            if line := "".join(self.line).rstrip():
                self._ended(line, position)
            self.line.clear()
        if self.hold is None and not self.reason:
            self.safe = position

    def _ended(self, line: str, position: int) -> None:
        lines, runs = self.lines, self.runs
        lines.append((line, LIGHT.fullmatch(line) is not None))
        for period in range(1, min(PERIOD_LINES + 1, len(lines))):
            runs[period] = runs[period] + 1 if line == lines[-1 - period][0] else 0
        periods = [period for period in range(1, PERIOD_LINES + 1) if runs[period] >= period]
        self.hold = (self.hold or position) if periods else None
        for period in periods:
            light = all(data for _, data in lines[-period:])
            most = REPEATED_DATA if light else max(REPEATED_LINES, REPEATED_COPIES * period)
            if runs[period] + period >= most:
                self.end("repeat", self.hold or position)


class Fences(Stage):
    """A chat's answer: the code in its first fenced block, or all of it if it has none or begins like code.

    `begun` is the start of the answer, which the model was given to continue.
    """

    def __init__(self, language: Language | None, begun: str) -> None:
        super().__init__()
        self.language = language
        # In Markdown, a fence inside the block is counted as in a block of no language.
        self.scanner = Scanner(language) if language and language is not LANGUAGES["markdown"] else None
        self.state = "before"  # the block, "inside" it, in a block "beside" it, or "thinking"
        self.beside = ""  # the first block beside it
        self.fence, self.margin, self.nested = "```", 0, 0
        self.mark = 0  # where the line starts
        self.line = ""  # the block's line so far, without its indentation
        self.left = 0  # spaces at the start of the line that still belong to the fence's own indentation
        self.in_code = True  # the line does not start inside a string or comment
        self.begun = False  # some line was not blank, before the block or now inside it
        for char in begun:
            self.step(char)
        if self.state == "beside":
            self.state = "inside"
        elif self.state == "before" or self.reason:  # `begun` has no block that is still open
            self.state, self.reason, self.mark, self.text, self.line, self.begun = "before", None, 0, [], "", False
            self.beside = ""
        self.sent = self.safe = len(self.text)

    def step(self, char: str) -> None:
        if self.state == "inside":
            self._inside(char)
            return
        self.text.append(char)
        if char == ">" and self.cut(-len("</think>")) == "</think>":
            self.state, self.text, self.mark, self.begun = "before", [], 0, False
            self.safe = self.sent = 0
        elif self.state == "thinking" or (char == ">" and len(self.text) < 80 and self.cut(0).strip() == "<think>"):
            self.state = "thinking"
        elif self.state == "beside":
            if char == "\n" and self.cut(self.mark).strip() == self.fence:
                self.beside = self.beside or self.cut(0, self.mark)
                self.state, self.text = "before", []
            self.mark = len(self.text) if char == "\n" else self.mark
        elif char == "\n" or len(self.text) >= CHATTER_CHARS:
            self._before(self.cut(self.mark))

    def _before(self, line: str) -> None:
        """Decide whether a line of chatter is the fence that opens the block, or code without a fence."""
        if match := FENCE.fullmatch(line.strip()):
            self.fence, self.text, self.mark, self.begun = match[1], [], 0, False
            self.left = self.margin = len(line) - len(line.lstrip())
            name = match[2].strip().lower()
            other = self.language and self.language is not LANGUAGES[BY_NAME.get(name, "shell")]
            self.state = "beside" if other and name in BESIDE else "inside"
            return
        self.mark = len(self.text)
        first, self.begun = not self.begun, self.begun or bool(line.strip())
        if self.mark >= CHATTER_CHARS or (first and self._is_code(line.rstrip())):
            self.state, self.safe = "inside", self.mark
            self.line = "" if line.endswith("\n") else line.lstrip()[:LINE_CHARS]
            if self.scanner:
                self.scanner.feed(self.cut(0))

    def _is_code(self, line: str) -> bool:
        language = self.language
        if not language or not line or PROSE.fullmatch(line):
            return False
        starts = (*language.comment_starts, "@", "#include", "#define", *(language.block_comment or ())[:1])
        known = language.imports.match(line) or (not language.items and language.defines.match(line))
        return line.startswith(starts) or line.endswith(("{", "}", ";")) or bool(known)

    def _inside(self, char: str) -> None:
        if char == " " and self.left:
            self.left -= 1
            return  # in a list, the fence and all its lines are indented
        self.left = self.margin if char == "\n" else 0
        self.text.append(char)
        if self.scanner:
            self.scanner.step(char)
        if len(self.line) < LINE_CHARS and (self.line or not char.isspace()):
            self.line += char
        line = self.line.rstrip()
        if char != "\n":
            if not (self.in_code and (self.fence.startswith(line) or line.startswith(self.fence))):
                self.safe = len(self.text)
            return
        if self.in_code and line.startswith(self.fence):
            if not self._closes(line) and not self.begun:  # the model repeats the opening that it was given
                self.line, self.mark, self.safe, self.begun = "", len(self.text), len(self.text), True
                self.sent = self.safe
                return
            if not self.nested and self._closes(line):
                self.end("stop", self.mark)
                return
            self.nested += -1 if self._closes(line) else 1
        self.line, self.begun = "", self.begun or bool(line)
        self.mark = self.safe = len(self.text)
        self.in_code = self.scanner is None or not self.scanner.closer

    def _closes(self, line: str) -> bool:
        return line.startswith(self.fence) and not line.strip(self.fence[0])

    def flush(self, whole: bool) -> str:
        last = self.line.rstrip()
        even = len(re.findall(r"^[ \t]*```", self.cut(0, self.mark), re.M)) % 2 == 0  # no block within this one is open
        closes = self._closes(last) or (last == "```" and even)
        closed = self.state == "inside" and self.in_code and not self.nested and closes
        if self.state == "beside" or (self.state == "before" and self.beside):
            return self.beside or self.cut(0).removesuffix(self.fence)
        return "" if closed or self.state == "thinking" else super().flush(whole)


def starts_in_docstring(prompt: str, quotes: str) -> bool:
    """Whether the prompt's first triple quotes close a docstring, in which the prompt then begins."""
    above, _, after = prompt.partition(quotes)
    above = re.sub(r"\b[bfruBFRU]{1,2}$", "", above)
    before = above.rstrip()
    opens = before[-1:] in ("", *":=([{,\\") or (before[-1] != "." and above[len(before) :].strip("\n") == " ")
    behind, _, below = after.partition("\n")
    return not opens and not behind.strip() and CODE.search("\n" + below.partition(quotes)[0]) is not None


def scan(language: Language, prompt: str) -> Scanner:
    """A scanner at the prompt's end. In a Markdown fence of a known language it is one of that language."""
    for quotes in ('"""', "'''") if language.colons else ():
        if quotes in prompt and starts_in_docstring(prompt, quotes):
            prompt = quotes + prompt
            break
    if language is LANGUAGES["php"] and prompt.lstrip().startswith("<") and not prompt.lstrip().startswith("<?"):
        prompt = f"?>{prompt}"
    scanner = Scanner(language, prompt)
    if scanner.closer == "<?":
        return Scanner(LANGUAGES["html"], prompt[len(prompt) - scanner.since :])
    if scanner.opener in language.multiline and scanner.closer and language is not LANGUAGES["markdown"]:
        headers = (one.start() for one in language.defines.finditer(prompt) if HEADER.match(prompt, one.start()))
        again = Scanner(language, prompt[max(headers, default=0) :])  # in code: a quote above was misread
        return scanner if again.closer else again
    if scanner.closer and language is LANGUAGES["markdown"]:
        *_, last = [None, *OPENED.finditer(prompt)]
        if last and (inner := BY_NAME.get(last[1].lower())):
            return Scanner(LANGUAGES[inner], prompt[last.end() :])
    return scanner


class Ending:
    """Ends a completion at a stop string or when the requested piece is complete, however its text is split.

    The reasons: "block", the requested block is complete; "repeat", the model is starting over; "stop", the suffix, a
    fence or one of the strings `stops` follows. `mode` is "complete", "infill" or "instruct". `prompt` is the text
    before the completion; in a chat, the start of the answer that the model was given. `stop_at` "none" turns off all
    but the stop strings and the removal of a chat's fences. An `indent` above 0 ends the completion before a line that
    is indented less. An unknown language is guessed: an infill ends by the suffix in any case, a completion before two
    blank lines if its prompt defines nothing.
    """

    def __init__(
        self,
        mode: str,
        language: str | None,
        prompt: str,
        suffix: str | None,
        stop_at: str,
        indent: int = 0,
        stops: Sequence[str] = (),
    ) -> None:
        syntax = LANGUAGES.get(BY_NAME.get((language or "").lower(), ""))
        suffix = suffix or ""
        gap = mode == "infill" and suffix.strip()
        self.stops = StopStrings(stops)
        self.stages: list[Stage] = [Fences(syntax, prompt)] if mode == "instruct" else []
        if stop_at == "none":
            return
        if mode != "instruct":
            if known := syntax or guess(prompt, suffix if gap else ""):
                scanner = scan(known, prompt)
                if scanner.starting and scanner.indent:
                    self.stages.append(Typed(scanner.indent, due_columns(prompt, scanner.indent, scanner.opened)))
                block = LineBlock if scanner.by_lines else BracketBlock
                self.stages.append(gap_of(scanner, prompt, suffix) if gap else block(scanner, prompt))
            else:
                self.stages.append(Blanks())
        if indent > 0:
            self.stages.append(Indent(indent, whole=not gap or prompt[-1:] in ("", "\n")))
        self.stages.append(Repeat())

    def feed(self, text: str) -> tuple[str, str | None]:
        """(text that may be sent now, why the completion is over or None)."""
        text, stopped = self.stops.feed(text)
        reason = None
        for stage in self.stages:
            text, why = stage.feed(text)
            if reason and not why:
                text += stage.flush(whole=True)
            reason = why or reason
        if stopped and not reason:
            return text + self.flush(), stopped
        return text, reason

    def flush(self, whole: bool = True) -> str:
        """The text left to send when no more tokens come. `whole`: the model has ended, max_tokens did not cut it."""
        text = ""
        for stage in (self.stops, *self.stages):
            text, why = stage.feed(text)
            text += "" if why else stage.flush(whole)
        return text
