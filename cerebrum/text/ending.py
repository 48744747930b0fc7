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
from collections.abc import Sequence
from functools import reduce
from itertools import takewhile

from cerebrum.text.languages import BY_NAME, LANGUAGES, NOTHING, Language
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
MEET_LINES = 6  # compared at most of the suffix
MEET_CHARS = 7  # the compared lines have at least this many, unless the suffix has fewer
REST_WEIGHT = 3  # letters and digits in the rest of the cursor's line
END_WEIGHT = 6  # letters and digits in one line at the text's end
CLOSERS_CHARS = 4000  # of the suffix, searched for closing brackets
# How far an infill that could have ended goes on to meet the suffix, in characters without white space ...
AHEAD_CHARS = 400  # ... usually
LEFT_AHEAD_CHARS = 140  # ... after a line or a bracket that does not belong to the gap
REST_AHEAD_CHARS = 80  # ... after a line that lacks the rest of the cursor's line
OUTSIDE_AHEAD_CHARS = 40  # ... below a blank line or at a comment outside the cursor's block
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
        # (string, for each of its prefixes the length of the longest shorter prefix that it ends with)
        self.stops = [(stop, [0]) for stop in stops]
        for stop, borders in self.stops:
            for char in stop[1:]:
                borders.append(matched(stop, borders, borders[-1], char))
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
    while size and text[size] != char:
        size = borders[size - 1]
    return size + (text[size] == char)


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
    decorator in a class it is the next member. A statement begun outside all blocks ends at a blank line. If only white
    space precedes the cursor in its line, the indentation of the first line written shows which blocks are open. Except
    in Python, a closing line at the block's own indentation belongs to it. A less indented comment below a blank line
    waits for the next line of code and is inside if that is.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        language = scanner.language
        self.base: int | None = None  # lines indented no deeper are outside; -1: none is; None: not known yet
        self.level = 0  # indentation of the line that begins
        self.top = 0  # with `base` -1: the indentation of the statement being completed
        self.clauses = False  # an `else` or the like may go on with the block
        self.statement = False  # the block is a statement outside all blocks
        self.blank = False  # the last line was blank
        self.closed = False  # a closing line has been written
        self.member = False  # only the next member of a class is asked for ...
        self.begun = self.deep = False  # ... and it has begun, and a deeper line follows
        self.waiting = False  # the text since `mark` is a comment, inside if the next line of code is
        last = prompt.rstrip().rpartition("\n")[2]
        self.open_ended = bool(language.imports.match(last)) or last.startswith("#!")
        self.announced = is_announced(language, prompt) and bool(language.defines.search(prompt))
        self.closing = re.compile(language.closing)
        self.inside = re.compile(rf"(?:{language.clauses or '(?!)'})\b")
        head = scanner.head.strip()
        if language.indented and (head or scanner.fresh):
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
        self.clauses = language.indented and not DEFINITION.match(header)
        self.statement = self.base == -1 and (typed or not language.indented) and not self.open_ended

    def ended(self, line: str) -> str | None:
        blocks, self.blank = self.scanner.blocks, not line
        language = self.scanner.language
        if line:
            self.begun = self.begun or not line.startswith(("@", *language.comment_starts))
        if self.base == -1 and language.indented and blocks and DEFINITION.match(blocks[0][1]):
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
        if word[-1] != "\n":
            self.level = scanner.indent
        if self.level > self.base:
            self.deep = self.begun
            over = self.statement and self.level <= self.top and self.mark and self.blank
            return self._closes(word) if over else ""
        comment = self.blank and word.startswith(language.comment_starts)
        if comment and len(self.text) - self.mark < COMMENT_CHARS:
            self.waiting = True
            return None
        if self.level < self.base:
            return "block"
        if self.member and not self.deep and (not self.begun or not self.blank):
            return ""
        if language.indented:
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
        return "" if self.inside.match(word) else "block"


class BracketBlock(Block):
    """Blocks in braces: ends after the line that closes the block that was asked for.

    That block is the outermost open block that is not a container: a function with everything in it. Without one, it is
    the statement or signature in progress, or what a comment or decorator above the cursor announces; then the
    innermost class, impl or namespace; then the first function or class that the model writes. Closing brackets on
    their own lines after the block belong to it.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        self.base: int | None = None  # the block has ended at this depth of brackets; None: it has not begun
        self.statement = False  # the block is a statement or signature in progress
        self.clauses = False  # an `else` or the like may go on with the block
        self.call = False  # the block is an argument of a call, whose result may be used on the next line
        self.closed = False  # the block has ended, but the next line may still belong to it
        language, head = scanner.language, scanner.head.strip()
        braces = [depth for depth, bracket in enumerate(scanner.stack) if bracket.kind == "{"]
        things = [depth for depth in braces if not language.containers.search(scanner.stack[depth].header)]
        imported = bool(head) and language.imports.match(head.rpartition("\n")[2]) is not None
        self.directive = (scanner.opener, scanner.closer) == ("#", "\n") and prompt.endswith(("\\\n", "\\\r\n"))
        begun = bool(head) and not imported and not (braces and scanner.is_over)
        announced = is_announced(language, prompt) and bool(braces or language.defines.search(prompt))
        if language.blocks == "brackets" and scanner.stack:
            self.base = len(scanner.stack) - 1
        elif things:
            self._open(things[0])
        elif begun or announced or self.directive or scanner.in_parens:
            self.statement, self.base = True, braces[-1] + 1 if braces else 0
            self.clauses = bool(CONTROL.search(head))
            if announced and not head.startswith(("@", "#[", "[")):
                scanner.last = ""
        elif braces:
            self._open(braces[-1])

    def _open(self, depth: int) -> None:
        """Choose the block at `stack[depth]`; if it is an argument of a call, choose the call."""
        stack = self.scanner.stack
        header = stack[depth].header
        self.clauses = bool(CONTROL.search(header))
        while depth and stack[depth - 1].kind in "([":
            depth -= 1
            self.call = True
        self.base = depth

    def step(self, char: str) -> None:
        before = len(self.scanner.stack)
        super().step(char)
        stack, language = self.scanner.stack, self.scanner.language
        if self.base is None and before == 0 and len(stack) == 1:
            header = stack[0].header
            defines = stack[0].kind == "{" and language.definition.search(header) and not CONTROL.search(header)
            if defines or language.blocks == "brackets":
                self._open(0)

    def ended(self, line: str) -> str | None:
        scanner = self.scanner
        if self.base is None or len(scanner.stack) > self.base:
            return None
        if self.directive:
            return "block"
        if line.startswith(("@", "#[")):
            return None
        if self.statement and scanner.last not in ("}", ";") and not (scanner.is_over and scanner.last):
            return "block" if not line and self.mark else None
        self.closed = True
        may_go_on = (self.statement or self.call) and scanner.language.line_ends and scanner.last != ";"
        return None if scanner.stack or self.clauses or may_go_on or self.called else "block"

    def outside(self, word: str) -> str | None:
        if not self.closed:
            return ""
        goes_on = word[0] in GOES_ON and (self.statement or self.call) and self.scanner.language.line_ends
        if word[0] in PAIRS or word[0] == "{" or goes_on:
            reason: str | None = ""
        else:
            reason = continues(word) if self.clauses else self.helps(word)
        self.closed = reason != ""
        return reason


def squeezed(line: str) -> str:
    """A line without its white space."""
    return "".join(line.split())


def line_end(text: list[str], whole: bool) -> int:
    """Where the last line of a text ends, which a line end has just completed; `whole`: behind that line end."""
    return len(text) if whole else len(text) - 1 - (text[-2:-1] == ["\r"])


class Meeting:
    """Finds where a text begins to agree with the suffix: where it has the suffix's first lines.

    As many lines are compared as are found nowhere else around the cursor. White space within lines and blank lines do
    not count, but indentation does. Nor do remarks count that a model adds to a line; `remark` begins one.
    """

    def __init__(self, prompt: str, suffix: str, remark: str = "") -> None:
        self.remark = remark
        first, (rest, _, after) = prompt[prompt.rfind("\n") + 1 :], suffix.partition("\n")
        self.blanks = len(rest) - len(rest.lstrip())  # before the suffix's part of the cursor's line
        self.whole = bool(rest.strip()) and not first  # whole lines are missing, line ends included
        self.rest = "" if self.whole else squeezed(rest)[:LINE_CHARS]
        self.below = [line for line in (suffix if self.whole else after).split("\n", 40)[:40] if line.strip()]
        self.goal = [(0, self.rest)] if self.rest else []
        self.goal += [(columns_of(line), squeezed(line)[:LINE_CHARS]) for line in self.below]
        self.weight = sum(map(str.isalnum, self._line(0)[1]))  # letters and digits in the first line of the goal
        self.sure = self._choose(prompt[-MEET_CHARS_BEFORE:].split("\n")[:-1])
        # The line so far, its indentation, and where its characters are, white space not counted.
        self.line, self.indent = squeezed(first)[:LINE_CHARS], columns_of(first)
        self.places = [-1] * len(self.line)
        self.edge = 0  # where the text would be cut if the suffix began with this line
        self.found: list[tuple[int, int]] = []  # (number of lines of the goal above, where their first begins)

    def _choose(self, above: list[str]) -> bool:
        """Limit the goal to the lines that are found nowhere else; return whether there are such lines."""
        goal = self.goal
        around = [(columns_of(line), squeezed(line)[:LINE_CHARS]) for line in above if line.strip()] + goal[1:]
        for size in range(1, min(MEET_LINES, len(goal)) + 1):
            self.goal, places = goal[:size], range(len(around) - size + 1)
            whole = size == len(goal) and not (self.rest and size == 1)
            long = sum(len(text) for _, text in self.goal) >= MEET_CHARS
            if (whole or long) and self.goal not in (around[at : at + size] for at in places):
                return True
        return False

    def step(self, char: str, position: int, text: list[str]) -> int | None:
        """Read a character; if the whole goal stands there now, where it begins."""
        if not char.isspace():
            if len(self.line) < LINE_CHARS:
                self.line += char
                self.places.append(position)
        elif char != "\n":
            self.indent = self.indent if self.line else after_blank(self.indent, char)
        else:
            if self.line:
                matches = [(0, self.edge), *self.found]
                self.found = [
                    (size + 1, at) for size, edge in matches if (at := self._match(size, edge, text)) is not None
                ]
            if self.line or self.whole:
                self.edge = line_end(text, self.whole)
            self.line, self.indent, self.places = "", 0, []
            if self.found and self.found[-1][0] == len(self.goal):
                return self.found[-1][1]
        return None

    def _line(self, number: int) -> tuple[int, str]:
        """(indentation, text) of a line of the goal; behind its last line one that no line equals."""
        return self.goal[number] if number < len(self.goal) else (0, "\n")

    def _match(self, size: int, edge: int, text: list[str]) -> int | None:
        """Where a match begins that goes on with this line; None if this line differs from line `size` of the goal."""
        columns, goal = self._line(size)
        if not size and (self.rest or (self.whole and len(self.goal) > 1 and self.line != goal)):
            return self._place(len(goal), text) if self.line.endswith(goal) else None
        same = self.line == goal or (self.remark and self.line.startswith(goal + self.remark))
        return edge if same and self.indent == columns and (size or self.places[0] >= 0) else None

    def _place(self, size: int, text: list[str]) -> int | None:
        """Where the last characters of the line begin, with the white space that the suffix has before them."""
        place, blanks = self.places[-size], self.blanks
        while blanks and place > 0 and text[place - 1] in " \t":
            place, blanks = place - 1, blanks - 1
        return place if place >= 0 else None

    def held(self, text: list[str]) -> int:
        """Text from here on may turn out to be the suffix."""
        matches = [(0, self.edge), *self.found] if self.goal else []
        places = [len(text)]
        for size, edge in matches:
            columns, goal = self._line(size)
            goal += self.remark
            begun = self.line[: len(goal)] if self.remark else self.line  # a remark may go on to the line's end
            if not self.line or (self.indent == columns and goal.startswith(begun)):
                places.append(edge)
        first = self.goal[0][1] if self.rest or self.whole else ""
        at = max(0, len(self.line) - len(first)) if first else -1
        while at >= 0 and not first.startswith(self.line[at:]):
            at = self.line.find(first[0], at + 1)
        if 0 <= at < len(self.line):
            place = self._place(len(self.line) - at, text)
            places += [] if place is None else [place]
        elif self.blanks and self.rest:
            blank = len(text) - len("".join(text[-self.blanks :]).rstrip(" \t")) if text else 0
            places.append(len(text) - min(self.blanks, blank))
        return min(places)

    def at_end(self, text: list[str], closed: bool) -> int | None:
        """Where the suffix begins, if the text ends in its first lines. `closed`: the cursor's literal has ended."""
        for size, edge in [*reversed(self.found), (0, self.edge)] if self.goal else []:
            lines, place = size, edge
            if self.line:
                at = self._match(size, edge, text)
                begun = bool(size) and self._line(size)[1].startswith(self.line)
                lines, place = size + (at is not None or begun), edge if at is None else at
            elif not size:
                continue
            closes = self.rest[:1] in tuple("\"'`)]}") or (self.rest.isalnum() and len(self.rest) < 3)
            sure = lines > 1 or self.weight >= END_WEIGHT or (self.rest and (closed or not closes))
            if lines > size - bool(not self.line) and sure:
                return place
        return None


class Gap(Stage):
    """An infill: ends where the text meets the suffix or, if they do not meet, where the suffix could follow.

    The suffix could follow the first line that leaves no bracket or header open and is not indented less than the
    suffix, the text before a bracket that only the suffix closes, and a line above one that is indented less than
    cursor and suffix. What the model writes after such a place waits: it is sent if the model soon meets the suffix,
    or ends by itself. How soon depends on what has been written (`AHEAD_CHARS` and the four below it). Many gaps of
    several lines go on after a line that could have ended them, so waiting is worth its tokens. A client in a hurry
    sets `predict_ms`.
    """

    def __init__(self, scanner: Scanner, prompt: str, suffix: str) -> None:
        super().__init__()
        self.scanner, self.meeting = scanner, Meeting(prompt, suffix, scanner.language.line_comment)
        first, below = prompt[prompt.rfind("\n") + 1 :], self.meeting.below[:1]
        above = first if first.strip() else prompt.rstrip().rpartition("\n")[2]
        # Lines of a block comment are indented by one space more than the code.
        start, *after = (columns_of(line) - line.lstrip().startswith("*") for line in (above, *below))
        self.below = after[0] if after else start * bool(self.meeting.rest)
        self.bound, self.limit = min(start, self.below), max(start, self.below)
        # The suffix begins with a blank line and is indented less: the gap is at the end of its block.
        self.final = bool(below) and self.below < start and not "".join(suffix.split("\n", 2)[:2]).strip()
        self.blank = False  # the last line was blank
        self.literal = scanner.closer
        self.unmatched, self.depth = scanner.unmatched, len(scanner.stack)
        closers = 0 if self.literal else Scanner(scanner.language, suffix[:CLOSERS_CHARS]).unmatched
        self.floor = min(self.depth, closers)  # brackets that the suffix closes
        self.started = bool(first.strip())  # the line has characters other than white space
        self.indent = scanner.indent  # of the line
        self.mark = 0  # the end of the last line that is not blank
        self.lines = 0  # that are not blank
        self.enough: int | None = None  # the infill could end here ...
        self.left: int | None = None  # ... or at most here: a bracket or a line does not belong to the gap
        self.ahead = AHEAD_CHARS  # characters left before the infill ends at `enough`, white space not counted
        # The text is in a block that ends before the suffix, so all of it belongs to the gap.
        closes = bool(below) and below[0].lstrip()[0] in PAIRS and bool(scanner.stack) and not self.literal
        deeper = scanner.by_lines and self.started and self.indent > self.below
        self.inner = not self.meeting.rest and (closes or deeper)

    def step(self, char: str) -> None:
        position, meeting, scanner = len(self.text), self.meeting, self.scanner
        self.text.append(char)
        scanner.step(char)
        if (place := meeting.step(char, position, self.text)) is not None:
            if meeting.sure:
                self.end("stop", place)
                return
            self._could_end(place)
        if char == "\n":
            self.blank = not self.started
            if self.started:
                self.mark, self.lines, self.started = line_end(self.text, meeting.whole), self.lines + 1, False
                if meeting.rest:
                    self._end_line()
                elif self._fits():
                    self._could_end(self.mark)
            elif meeting.rest and self.enough is not None:
                self.ahead = min(self.ahead, WRITTEN_AHEAD_CHARS)  # few gaps within a line continue after a blank one
        elif not char.isspace():
            self._read(char, position)
            self.started, self.ahead = True, self.ahead - (self.enough is not None and not self.inner)
            if meeting.line == "```" and scanner.closer in ("", "`") and scanner.language is not LANGUAGES["markdown"]:
                self.end("stop", self.mark if self.left is None else self.left)
                return
        if self.ahead < 0 and self.enough is not None:
            self.end("block", self.enough)
        elif not self.reason and char not in "\r`":  # perhaps part of a line end that the suffix has, or of a fence
            place = min(meeting.held(self.text), len(self.text) if self.enough is None else self.enough)
            self.safe = max(self.safe, place)

    def _end_line(self) -> None:
        """A line has ended, with or without the rest of the cursor's line."""
        written = next((place for size, place in self.meeting.found if size == 1), None)
        sure = self.left is not None or "=" in self.meeting.rest or self.meeting.weight >= REST_WEIGHT
        closes = self.meeting.rest[0] in PAIRS and self.scanner.stack  # the rest closes what the cursor is in
        if written is not None and self._has_closed():
            self.end("stop", written)
        elif written is not None and sure:
            self.enough, self.ahead = written, min(self.ahead, WRITTEN_AHEAD_CHARS)
        elif not closes and len(self.scanner.stack) <= self.depth and not self.scanner.closer:
            self._could_end(self.mark, REST_AHEAD_CHARS)

    def _could_end(self, place: int, ahead: int = AHEAD_CHARS) -> None:
        self.enough = place if self.enough is None or self.inner else self.enough
        self.ahead = min(self.ahead, ahead)

    def _read(self, char: str, position: int) -> None:
        """Note whether a character leaves the surroundings of the cursor."""
        scanner = self.scanner
        inside = bool(scanner.closer and scanner.since)
        if not self.started and not inside:
            self.indent = scanner.indent
        if char in PAIRS and not scanner.closer and self._has_left():
            self._leave(position if self.started or self.meeting.rest else self.mark)
        elif not (self.started or inside or scanner.in_parens):
            if scanner.by_lines and not self.meeting.rest and (self.inner or not self.lines):
                self.inner = scanner.indent > self.below
            if self.blank and self.final and self.enough is not None and scanner.indent <= self.below:
                self.ahead = min(self.ahead, OUTSIDE_AHEAD_CHARS)
            if self.lines and scanner.indent < self.bound:
                self._leave(self.mark)
                if scanner.by_lines and char in {start[0] for start in scanner.language.comment_starts}:
                    self.ahead = min(self.ahead, OUTSIDE_AHEAD_CHARS)  # usually the first of some examples

    def _leave(self, place: int) -> None:
        if self.left is None:
            self.left = place
            self._could_end(place, REST_AHEAD_CHARS if self.meeting.rest else LEFT_AHEAD_CHARS)
            self.inner = False

    def _has_left(self) -> bool:
        """Whether the text has closed a bracket that the suffix closes, or one from outside the text."""
        return len(self.scanner.stack) < self.floor or self.scanner.unmatched > self.unmatched

    def _has_closed(self) -> bool:
        """Whether the text has closed the literal around the cursor, which the suffix closes."""
        return bool(self.literal) and not self.scanner.closer and self.meeting.rest.startswith(self.literal)

    def _fits(self) -> bool:
        """Whether the suffix could follow the line that has ended."""
        scanner, opened = self.scanner, self.scanner.opened
        if scanner.closer or self._has_left() or (scanner.by_lines and self.indent > self.limit):
            return bool(self.literal and scanner.closer)
        if len(scanner.stack) > self.depth:
            return False
        return self.below <= self.indent or scanner.in_parens if opened is None else opened < self.below

    def flush(self, whole: bool) -> str:
        place = self.meeting.at_end(self.text, self._has_closed())
        if place is None:
            place = self.enough if not whole else self.left if self._has_left() else None
        if place is not None:
            return self.cut(self.sent, max(place, self.sent))
        text = self.cut(0).rstrip(" \t")
        newline = self.meeting.whole and bool(text.strip()) and not text.endswith("\n")
        return self.cut(self.sent) + "\n" * newline


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
        self.scanner = Scanner(language) if language else None
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
        known = language.imports.match(line) or (not language.commands and language.defines.match(line))
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
    """A scanner at the prompt's end."""
    for quotes in ('"""', "'''") if language.indented else ():
        if quotes in prompt and starts_in_docstring(prompt, quotes):
            prompt = quotes + prompt
            break
    scanner = Scanner(language, prompt)
    if scanner.opener in language.texts and scanner.closer:
        headers = (one.start() for one in language.defines.finditer(prompt) if HEADER.match(prompt, one.start()))
        again = Scanner(language, prompt[max(headers, default=0) :])  # in code: a quote above was misread
        return scanner if again.closer else again
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
                self.stages.append(Gap(scanner, prompt, suffix) if gap else block(scanner, prompt))
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
