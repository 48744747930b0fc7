"""Where a completion ends: at stop strings, and when the requested piece is complete.

In: the text that a model writes, in any pieces. Out: the part that the client gets, and why it ends
(`Ending`).

    >>> from cerebrum.text.ending import Ending
    >>> ending = Ending("complete", "python", "def f(n):\\n", None, "auto")
    >>> ending.feed("    return n\\n\\nprint(f(1))\\n")
    ('    return n\\n', 'block')

The model's own end is always believed. A text that goes on is followed with a `Scanner`, which
knows where a string, a comment or a bracket is open, and ends with the block that was asked for
(`LineBlock`, `BracketBlock`) or where the suffix follows (`Gap`). A completion in an unknown
language that cannot be guessed ends at two blank lines.

No text is refused, however odd, and the cost of a text is at most its length times a constant. The
module is pure: no socket, no clock, no environment. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cerebrum.text.fences import Fences
from cerebrum.text.gap import GapInLine, GapOfLines
from cerebrum.text.languages import LANGUAGES, Language, in_style, language_named
from cerebrum.text.scanner import (
    LINE_CHARS,
    OPENING_OF,
    LineScanner,
    Scanner,
    StatementScanner,
    scanner_of,
)
from cerebrum.text.stages import (
    FENCE,
    Blanks,
    Indent,
    Repeat,
    Stage,
    StopStrings,
    Sure,
    Trimmed,
    Typed,
    last_line,
    surprise,
)

NAME_CHARS = 100  # a function with a longer name is not recognized as a helper
COMPOUND = re.compile(  # Python
    r"(?:async\s+)?(?:def|class|if|elif|else|for|while|with|try|except|finally|match|case)\b"
)
# The header of a block behind which a clause may follow.
CONTROL = re.compile(r"\b(?:if|elsif|elseif|unless|else|try|catch|do)\b[^\n]*$")
CODE = re.compile(
    r"\n[ \t]*(?:(?:def|class|if|for|while|with|elif|except) .*:|return .*|from \S+ import .*"
    r"|[\w.]+ = .*|[\w.]+\(.*\))\r?\n"
)
OPENS = re.compile(r"(?:^|[:=(\[{,+])\s*\w?\Z")  # above the quotes that open a text
CALL = re.compile(rf"(?<![\w.])(\w{{1,{NAME_CHARS}}})\(")
# A line that starts so goes on with the one above, in languages without semicolons.
GOES_ON = ".?&|+-:=,"
HEADER = re.compile(r"\S[^\n]*[:{][ \t]*\r?\n")  # of a block in column 0
# Of the prompt's end and of the suffix, read to guess the syntax and the indentation.
GUESS_CHARS = 4000
GUESSES = {  # lines like the header of a definition, found in few other languages and in no prose
    "python": r"(?:async[ \t]+)?(?:def[ \t]+\w+\(|class[ \t]+\w+[(:])[^\n]{0,300}:",
    "rust": r"(?:pub(?:\([^)\n]{0,40}\))?[ \t]+)?(?:(?:async|unsafe)[ \t]+)?"
    r"(?:fn[ \t]+\w+|impl\b)[^\n;]{0,300}\{",
    "go": r"func[ \t]+[^\n]{0,300}\{",
    "javascript": r"(?:export[ \t]+)?(?:default[ \t]+)?(?:async[ \t]+)?"
    r"(?:function\b|class[ \t]+\w+)[^\n]{0,300}\{",
    "c": r"(?!(?:if|for|while|switch|else)\b)[A-Za-z_][\w*&:<> \t]{0,100}[ \t*&]"
    r"\w+\([^;\n{}]{0,300}\)[ \t]*\{",
}
HEADERS = {
    name: re.compile(rf"^[ \t]{{0,200}}{header}[ \t]*\r?$", re.M)
    for name, header in GUESSES.items()
}


def guess(prompt: str, suffix: str) -> Language | None:
    """The syntax of code around a gap; of code before the cursor, only if a definition shows it."""
    text = prompt[-GUESS_CHARS:] + suffix[:GUESS_CHARS]
    for name, header in HEADERS.items():
        if header.search(text):
            return LANGUAGES[name]
    return LANGUAGES["c"] if suffix else None


def is_announced(language: Language, prompt: str) -> bool:
    """Whether the line right above the cursor's is a comment or a decorator: what it announces is
    asked for.
    """
    above, _, line = prompt.rpartition("\n")
    above = last_line(above).strip()
    starts = (*language.comment_starts, "@", "#[")
    ends = tuple(language.block_comment.split()[1:])
    announces = above.startswith(starts) or above.endswith(ends)
    return announces and not line.strip() and not above.startswith("#!")


# Where a line is that begins below a block. UNDECIDED: it may be either, by what has come of it.
INSIDE = "inside"
OUTSIDE = "outside"
UNDECIDED = "undecided"


class Helpers:
    """The functions that the text calls and nothing above defines: they may follow its block."""

    def __init__(self, keyword: str, prompt: str) -> None:
        self.keyword = keyword
        self.header = re.compile(
            rf"\b(?:(?:async|export|local|pub|static|suspend)\s+){{0,4}}{keyword}\s+"
            rf"(\w{{1,{NAME_CHARS}}})\s*[({{<]"
        )
        self.code = list[str]()  # the characters of the line's code
        self.called = set[str]()
        self.defined = set(self.header.findall(prompt))

    def end_line(self) -> None:
        """The line has ended: read its code."""
        code = "".join(self.code)
        self.code.clear()
        self.defined.update(self.header.findall(code))
        self.called.update(CALL.findall(code))
        self.called -= self.defined

    def side_of(self, word: str) -> str:
        """INSIDE for a line that begins with `word` and defines a function that is called."""
        if match := self.header.match(word):
            return INSIDE if match[1] in self.called else OUTSIDE
        if not re.fullmatch(r"[\w ]{1,200}", word):
            return OUTSIDE
        # As much of the name as has come; all names begin with "".
        name = word.partition(f"{self.keyword} ")[2].lstrip()
        fits = any(called.startswith(name) for called in self.called)
        return UNDECIDED if fits else OUTSIDE


class Block(Stage):
    """Lines up to the end of a block and of its `Helpers`.

    A subclass is asked about each line, in this order:

        `begin_line`   it begins; not for a blank line
        `side_of`      does it belong to the block? Asked with each character until the answer is no
                       longer UNDECIDED; till then, the line waits. A blank line belongs to it.
        `read_line`    it has ended: does the block end with it?

    A line that begins within a literal (by lines: or within brackets) is part of the line above;
    `read_line` gets the last of these. If the block has ended, the completion ends at `mark`.
    """

    mark = 0  # the end of the last line that belongs to the block and is not blank

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__()
        self.scanner = scanner
        self.language = scanner.language
        # The line so far, including the prompt's part of it, without its indentation.
        self.line = last_line(prompt).lstrip()[:LINE_CHARS]
        self.waits = scanner.starting  # the line may turn out to be outside
        # Without a keyword, no code is read for them, so none are called; (?!) matches nowhere.
        self.helpers = Helpers(self.language.function or "(?!)", prompt)

    def begin_line(self) -> None:
        """A line begins: its first character that is not white space has come."""

    def side_of(self, word: str) -> str:
        """INSIDE, OUTSIDE or UNDECIDED, for the line that begins with `word`. A line end behind the
        last word says that it is whole: `el` may become `else`, but `el\\n` may not.
        """
        return INSIDE

    def read_line(self, line: str) -> bool:
        """Read a line that is inside; whether the block ends with it."""
        raise NotImplementedError

    def step(self, char: str) -> None:
        scanner = self.scanner
        scanner.step(char)
        if self.language.function and not scanner.closer:
            self.helpers.code.append(char)
        has_ended = self._end_line() if char == "\n" else self._extend_line(char)
        if has_ended:  # with a line, `line` is empty; before it, it may be a fence
            self.end("stop" if self.line == FENCE else "block", self.mark)
        elif not self.waits:
            self.safe = len(self.text)

    def _end_line(self) -> bool:
        """Whether the block has ended with the line, or before it."""
        line = self.line.rstrip()
        self.line = ""
        if not self.scanner.starting:  # within a literal or, by lines, within brackets
            return False
        if self.waits and line and self.side_of(f"{line}\n") == OUTSIDE:
            return True
        self.waits = True
        if line:
            self.mark = len(self.text)
        self.helpers.end_line()
        return self.read_line(line)

    def _extend_line(self, char: str) -> bool:
        """Whether the block has ended before the line."""
        if len(self.line) < LINE_CHARS and (self.line or not char.isspace()):
            self.line += char
            if self.waits and len(self.line) == 1:
                self.begin_line()
        word = self.line.rstrip()
        if not self.waits or FENCE[:-1].startswith(word):  # blank, or perhaps a fence
            return False
        if word == FENCE and not self.language.fences:
            return True
        side = self.side_of(word)
        self.waits = side == UNDECIDED
        return side == OUTSIDE


def side_of_words(words: str, word: str) -> str:
    """`side_of` for a line that may begin with one of the words, which have | between them. A word
    is a name, one sign, or HTML's `</`.
    """
    names = words.split("|")
    if any(name.startswith(word) for name in names):
        return UNDECIDED
    begin = re.match(r"\w+|</|.", word)
    return INSIDE if begin and begin[0] in names else OUTSIDE


class LineBlock(Block):
    """Blocks by indentation: ends before the first line outside what is asked for.

    A block is open below a line that is indented less: in Python a header, elsewhere any line. What
    is asked for (`asked`) is chosen once: when the text's first line begins, or before that if the
    cursor is in a statement of Python or Scala. It is the first of these that exists:

        block        the outermost open block that is no container, as a class is
        member       what a comment or a decorator right above announces, such as a method
        block        the rest of the innermost container
        definition   below #! in Python: lines through the first definition
        script       below #! in other languages: all that follows
        block        if the line is indented, so that its header is above the prompt: all lines that
                     are indented as much
        statement    lines at the margin, up to a blank one

    Whether a line is inside (`side_of`) follows from its indentation, compared with `base`:

                     `base` is that of    deeper    as deep as `base`        less deep
        block        the block's header,  inside    inside if it goes on     outside
                     or one column less
                     than its lines
        member       its first line       inside    inside; below a blank    outside
                                                    line, if it goes on
        statement    the margin, 0        inside    the same
        definition   none, -1             inside
        script       none, -1             inside

    A line that goes on begins with a closing bracket, with a word such as `else` or `end`, or with
    the header of a helper. A comment right below another line is inside, wherever it begins.

    The end of a line (`read_line`) changes two things. If the line is as deep as `base` and begins
    with a word such as `end`, the block or the member ends with it. If it is the header of the
    first definition, "definition" becomes "block", with 0 as its `base`.
    """

    scanner: LineScanner
    asked = ""  # not chosen yet
    base = -1  # in columns
    level = 0  # indentation of the line that begins
    blank = False  # the last line was blank

    def __init__(self, scanner: LineScanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        self.prompt = prompt
        head = scanner.head.strip()
        language = self.language
        if head and language.brackets:  # among those with blocks by lines: Python or Scala
            blocks = scanner.enclosing(scanner.indent)
            if not language.indented or COMPOUND.match(head):
                blocks.append((scanner.indent, head))
            self.asked, self.base = self._choice(blocks)

    def _choice(self, blocks: list[tuple[int, str]]) -> tuple[str, int]:
        """`asked` and `base`, by the open blocks: (indentation, header), the outermost first."""
        language = self.language
        prompt = self.prompt
        indent = self.scanner.indent
        is_script = last_line(prompt.rstrip()).startswith("#!")
        chosen = [column for column, header in blocks if not language.containers.match(header)]
        if chosen:
            return "block", chosen[0]
        if is_announced(language, prompt):
            return "member", indent
        if blocks:
            return "block", blocks[-1][0]
        if is_script:
            return "definition" if language.indented else "script", -1
        return ("block", indent - 1) if indent else ("statement", 0)

    def begin_line(self) -> None:
        self.level = self.scanner.indent
        if not self.asked:
            self.asked, self.base = self._choice(self.scanner.enclosing(self.level))

    def side_of(self, word: str) -> str:
        language = self.language
        parted = self.blank and self.mark  # a blank line is between this one and what is written
        if self.level > self.base:
            return INSIDE
        if self.asked == "statement" and not parted:
            return INSIDE
        if not self.blank:  # right below code, a comment belongs to it
            if self.scanner.in_comment:
                return INSIDE
            if any(opener.startswith(word) for opener, _ in language.comments):
                return UNDECIDED
        if self.level < self.base:
            return OUTSIDE
        in_member = self.asked == "member" and not parted
        if in_member or word[0] in OPENING_OF:
            return INSIDE
        side = side_of_words(f"{language.clauses}|{language.closers}", word)
        return side if side != OUTSIDE else self.helpers.side_of(word)

    def read_line(self, line: str) -> bool:
        language = self.language
        blocks = self.scanner.blocks
        self.blank = not line
        if self.asked == "definition" and blocks and language.defines.match(blocks[0][1]):
            self.asked = "block"
            self.base = 0
        if self.asked == "statement" or self.level != self.base:
            return False
        return side_of_words(language.closers, f"{line}\n") == INSIDE


class BracketBlock(Block):
    """Blocks in braces: ends after the line that completes what is asked for.

    What is asked for (`asked`) is chosen at the cursor. It is the first of these that exists:

        block       in JSON: the innermost object or array
        block       the outermost open block that is no container, as a class is; so a function with
                    everything in it
        directive   the cursor's line, if it is one of the preprocessor
        statement   the one in progress, which may be a signature, or what a comment or a decorator
                    right above announces
        block       the rest of the innermost container
        ""          none of these: the first function or class that the model writes; its brace
                    makes it a block

    If the block is an argument of a call or an element of an array, all of that is asked for. Where
    a line ends (`read_line`), it is complete

        block       if no more than `depth` brackets are open
        statement   the same, and if the last sign is `;` or `}` or, in a language without
                    semicolons, any but those that go on, such as `+`
        directive   always
        ""          never

    The completion then ends, unless something may follow: a closing bracket, a `{` below the
    signature, a clause such as `else`, a helper or, where no semicolon ends a statement, a line
    that begins like `.then()`. In that case, the next line's first word decides (`side_of`). A
    blank line ends a statement that is not complete but has no open brackets.
    """

    asked = ""
    depth = 0  # of the brackets around it
    clause_may_follow = False  # of `Language.clauses`
    complete = False  # since the end of the last line

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        language = self.language
        stack = scanner.stack
        head = scanner.head.strip()
        braces = [depth for depth, bracket in enumerate(stack) if bracket.kind == "{"]
        containers = language.containers
        not_containers = [depth for depth in braces if not containers.search(stack[depth].header)]
        in_parens = stack and stack[-1].kind in "(["
        # An import ends with its line, also without a semicolon; but Go's `import (` goes on.
        is_import = not in_parens and language.imports.match(last_line(head))
        # Outside all blocks, a header may go on in the next line.
        has_ended = braces and scanner.is_over
        if language.blocks == "brackets" and stack:
            self._choose(len(stack) - 1)
        elif not_containers:
            self._choose(not_containers[0])
        elif language.directives and scanner.closer and scanner.opener == "#":
            self.asked = "directive"
        elif (head and not is_import and not has_ended) or is_announced(language, prompt):
            self.asked = "statement"
            self.depth = braces[-1] + 1 if braces else 0
            self.clause_may_follow = CONTROL.search(head) is not None
        elif braces:
            self._choose(braces[-1])

    def _choose(self, depth: int) -> None:
        """Choose the block at `stack[depth]`; if it is an argument of a call, choose the call."""
        stack = self.scanner.stack
        self.clause_may_follow = CONTROL.search(stack[depth].header) is not None
        while depth and stack[depth - 1].kind in "([":
            depth -= 1
        self.asked = "block"
        self.depth = depth

    def step(self, char: str) -> None:
        super().step(char)
        stack = self.scanner.stack
        if not self.asked and len(stack) == 1 and stack[0].kind == "{":
            self._choose(0)

    @property
    def may_go_on(self) -> bool:
        """Whether the next line may go on with a statement, where it has no semicolon."""
        return self.asked == "statement" and self.language.line_ends

    def read_line(self, line: str) -> bool:
        scanner = self.scanner
        self.complete = False
        if self.asked == "directive":
            return True
        if not self.asked or len(scanner.stack) > self.depth:
            return False
        has_ended = scanner.last in ("}", ";") or scanner.is_over
        if self.asked == "statement" and not has_ended:
            return not line and self.mark > 0  # the blank line ends it
        self.complete = True
        if scanner.stack or self.clause_may_follow or self.helpers.called:
            return False
        return not self.may_go_on or scanner.last == ";"

    def side_of(self, word: str) -> str:
        goes_on = word[0] in GOES_ON and self.may_go_on
        if not self.complete or goes_on or word[0] in ("{", *OPENING_OF):
            return INSIDE
        if self.clause_may_follow:
            return side_of_words(self.language.clauses, word)
        return self.helpers.side_of(word)


class StatementBlock(Block):
    """SQL: ends with the line in which the statement at the cursor ends, or the next one if the
    cursor is in none. A statement ends with its semicolon, but not within a block or a literal.

    To MySQL's client, other signs may end statements, so that a procedure may contain semicolons:

        DELIMITER $$
        CREATE PROCEDURE p() BEGIN SELECT 1; SELECT 2; END $$

    The scanner takes all from the first `$$` up to the next one as a literal, as in PostgreSQL. The
    code before it, which no semicolon ends, is `DELIMITER $`.
    """

    def read_line(self, line: str) -> bool:
        scanner = self.scanner
        # `code_stages` has emptied `last` if the cursor is in no statement: something must come.
        is_open = scanner.stack or scanner.head.strip().lower() not in ("", "delimiter $")
        return scanner.last != "" and not is_open


def starts_in_docstring(prompt: str, quotes: str) -> bool:
    """Whether the prompt's first triple quotes close a docstring, in which the prompt then
    begins.
    """
    above, _, below = prompt.partition(quotes)
    rest, _, below = below.partition("\n")
    closes = not rest.strip() and not OPENS.search(above)
    return closes and CODE.search("\n" + below.partition(quotes)[0]) is not None


def scan(language: Language, prompt: str) -> Scanner:
    """A scanner at the prompt's end."""
    marks = language.texts if language.indented else ()
    prompt = next((quotes for quotes in marks if starts_in_docstring(prompt, quotes)), "") + prompt
    scanner = scanner_of(language, prompt)
    if scanner.opener in language.texts and scanner.closer:
        starts = [definition.start() for definition in language.defines.finditer(prompt)]
        headers = [start for start in starts if HEADER.match(prompt, start)]
        again = scanner_of(language, prompt[max(headers, default=0) :])
        return scanner if again.closer else again  # in code: a quote above was misread
    return scanner


# By the type of the scanner.
BLOCKS: dict[type[Scanner], type[Block]] = {
    Scanner: BracketBlock,
    StatementScanner: StatementBlock,
    LineScanner: LineBlock,
}


def code_stages(syntax: Language | None, prompt: str, suffix: str) -> list[Stage]:
    """The stages that end the code at a cursor."""
    known = syntax or guess(prompt, suffix)
    if not known:
        return [Blanks()]
    scanner = code = scan(in_style(known, prompt, suffix), prompt)
    if scanner.closer.startswith("$"):  # SQL: `code` is the body of a function
        code = scanner_of(known, prompt.rpartition(scanner.closer)[2])
    if isinstance(code, StatementScanner) and not code.head.strip():
        code.signs = ""  # nothing of the next statement has come
    typed = last_line(prompt)
    begun: list[Stage] = [Typed(typed)] if typed and code.starting else []
    if suffix:
        in_line = typed and suffix.partition("\n")[0].strip()
        kind = GapInLine if in_line else GapOfLines
        return [*begun, kind(code, prompt, suffix)]
    return [*begun, BLOCKS[type(scanner)](scanner, prompt)]


class Ending:
    """Ends a completion at a stop string or when the requested piece is complete, however its text
    is split.

    The reasons: "block", the requested block is complete; "repeat", the model is starting over;
    "stop", the suffix, a fence or one of the strings `stops` follows; "unsure", the chance of a
    line has fallen below `least` (see `Sure`). `mode` is "complete",
    "infill" or "instruct". `prompt` is the text before the completion; in the answer to an
    instruction, the start that the model was given. `stop_at` "none" turns off all but `least`, the
    stop strings and the removal of the fences around such an answer's code. An `indent` above 0
    ends the completion before a line that is indented less. An unknown language is guessed: an
    infill ends by the suffix in any case, a completion before two blank lines if its prompt defines
    nothing.
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
        least: float | None = None,
    ) -> None:
        syntax = language_named(language or "")
        # Only a gap has one, and a blank one is none.
        suffix = suffix if mode == "infill" and suffix and suffix.strip() else ""
        self.stages: list[Stage] = [Sure(least)] if least else []
        if stops:
            self.stages.append(StopStrings(stops))
        if mode == "instruct":
            self.stages.append(Fences(syntax, prompt))
        elif stop_at != "none":
            self.stages += code_stages(syntax, prompt, suffix)
        if stop_at != "none":
            if indent > 0:
                of_lines = not suffix or prompt[-1:] in ("", "\n")
                self.stages.append(Indent(indent, of_lines))
            self.stages.append(Repeat())
        # Not where whole lines are missing: such a text ends with a line end.
        if least and (last_line(prompt) or not suffix.partition("\n")[0].strip()):
            self.stages.append(Trimmed())

    @property
    def start(self) -> int:
        """Where the client's text begins in the model's, in characters: in the answer to an
        instruction, behind what precedes the code.
        """
        return sum(stage.start for stage in self.stages)

    def feed(self, text: str, probability: float = 1.0) -> tuple[str, str | None]:
        """(text that may be sent now, why the completion is over or None). `probability`: of the
        token that adds this text, 1.0 if it is unknown.
        """
        bits = surprise(probability)
        reason = None
        for stage in self.stages:
            stage.bits = bits
            text, why = stage.feed(text)
            bits = stage.bits
            # No more text comes from the stage above, so this one sends what it still holds back,
            # unless it has ended itself: then that text is behind the completion's end.
            if reason and not why:
                text += stage.flush(whole=reason != "unsure")
            reason = why or reason
        return text, reason

    def flush(self, whole: bool = True) -> str:
        """The text left to send when no more tokens come. `whole`: the model has ended, max_tokens
        did not cut it. Not to be called after `feed` has given a reason.
        """
        text = ""
        for stage in self.stages:
            text, why = stage.feed(text)
            text += "" if why else stage.flush(whole)
        return text
