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
from cerebrum.text.gap import gap_of
from cerebrum.text.languages import LANGUAGES, Language, in_style, language_named
from cerebrum.text.scanner import COMPOUND, LINE_CHARS, OPENING_OF, LineScanner, Scanner, scanner_of
from cerebrum.text.stages import (
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
# A longer comment is not waited for: more often than not it is outside the block.
COMMENT_CHARS = 200
CONTROL = re.compile(
    r"(?:^|\n)[^\S\n]*(?:else\s+)?(?:if|else|for|while|do|switch|try|match|loop|unsafe|select|when"
    r"|foreach|elseif|guard|repeat|using|lock|synchronized|defer)\b[^\n]*$"
)
CODE = re.compile(
    r"\n *(?:(?:def|class|if|for|while|with|elif|except) .*:|return .*|from \S+ import .*"
    r"|[\w.]+ = .*|[\w.]+\(.*\))\n"
)
CALL = re.compile(rf"(?:(?<=self\.)|(?<=this\.)|(?<![\w.]))(\w{{1,{NAME_CHARS}}})\(")
CLAUSES = "else|elif|elseif|except|finally|catch|while"  # continue a statement after its block
# A line that starts so continues the one above, in languages without semicolons.
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
    name = next((name for name, header in HEADERS.items() if header.search(text)), "")
    return LANGUAGES.get(name or "c" * (suffix != ""))


def is_announced(language: Language, prompt: str) -> bool:
    """Whether the line right above the cursor's is a comment or a decorator: what it announces is
    asked for.
    """
    above, _, line = prompt.rpartition("\n")
    above = last_line(above).strip()
    starts = (*language.comment_starts, "@", "#[") + ("[",) * language.directives
    ends = (language.block_comment or ())[1:]
    return not line.strip() and (above.startswith(starts) or above.endswith(ends))


# Where a line is that begins below a block. UNDECIDED: it may be either, by what has come of it.
INSIDE = "inside"
OUTSIDE = "outside"
UNDECIDED = "undecided"


class Helpers:
    """The functions that a block calls and nothing defines: they may follow the block."""

    def __init__(self, keyword: str, prompt: str) -> None:
        self.keyword = keyword
        self.header = re.compile(
            rf"\b(?:(?:async|export|local|pub|static|suspend)\s+){{0,4}}{keyword}\s+"
            rf"(\w{{1,{NAME_CHARS}}})\s*[(<]"
        )
        self.code = list[str]()  # the characters of the line's code
        self.called = set[str]()
        self.defined = set(self.header.findall(prompt))

    def end_line(self) -> None:
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
        name = word.partition(f"{self.keyword} ")[2].lstrip()  # as much of it as has come
        fits = any(called.startswith(name) for called in self.called)
        return UNDECIDED if fits else OUTSIDE


class Block(Stage):
    """Lines up to the end of a block and of its `Helpers`.

    A subclass decides to which side of the block's end a line belongs: it overrides `side_of`
    itself, or `side_of_next` for the line below what is `complete`. It also decides whether the
    block is over when a line has ended (`read_line`).
    """

    # With `side_of_next`: what was asked for is whole, but the next line may still belong to it.
    complete = False
    mark = 0  # the end of the last line that is not blank, where the completion ends

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__()
        self.scanner, self.language = scanner, scanner.language
        # The line so far, including the prompt's part of it, without its indentation.
        self.line = last_line(prompt).lstrip()[:LINE_CHARS]
        self.held = scanner.starting  # the line waits: it may turn out to be outside
        # Without a keyword, nothing is read for them, so none are called.
        self.helpers = Helpers(self.language.function or "(?!)", prompt)

    def side_of(self, word: str) -> str:
        """INSIDE, OUTSIDE or UNDECIDED, for the line that begins with `word`."""
        if not self.complete:
            return INSIDE
        side = self.side_of_next(word)
        self.complete = side != INSIDE
        return side

    def side_of_next(self, word: str) -> str:
        """`side_of` for the line below what is complete."""
        raise NotImplementedError

    def read_line(self, line: str) -> bool:
        """Read a line that is inside; whether the block ends with it."""
        raise NotImplementedError

    def step(self, char: str) -> None:
        scanner = self.scanner
        scanner.step(char)
        if self.language.function and not scanner.closer:
            self.helpers.code.append(char)
        ended = char == "\n" and scanner.starting
        over = self._end_line() if ended else self._extend_line(char)
        if over:
            self.end("stop" if self.line == "```" else "block", self.mark)

    def _end_line(self) -> bool:
        line, held = self.line.rstrip(), self.held
        self.line, self.held = "", True
        if held and line:
            side = self.side_of(f"{line}\n")  # the line is complete: decide now
            if side != INSIDE:
                return side == OUTSIDE  # else a comment that waits for the next line
        if line:
            self.mark = len(self.text)
        self.helpers.end_line()
        return self.read_line(line)

    def _extend_line(self, char: str) -> bool:
        if char == "\n":
            self.line = ""
        elif len(self.line) < LINE_CHARS and (self.line or not char.isspace()):
            self.line += char
        word = self.line.rstrip()
        if self.held and word == "```":
            return not self.language.fences
        if self.held and word and not "```".startswith(word):
            side = self.side_of(word)
            if side == OUTSIDE:
                return True
            self.held = side == UNDECIDED
        if not self.held:
            self.safe = len(self.text)
        return False


def side_of_clause(clauses: str, word: str) -> str:
    """`side_of` for a line that may begin with one of the clauses, a pattern's alternatives."""
    if re.fullmatch(r"[\w<]{1,20}", word):
        return UNDECIDED
    return INSIDE if re.match(rf"(?:{clauses})(?!\w)", word) else OUTSIDE


def side_of_else(word: str) -> str:
    """`side_of` for the line below a block that may have an `else`."""
    if re.match(rf"(?:{CLAUSES})\W", word):
        return INSIDE
    begun = any(clause.startswith(word) for clause in CLAUSES.split("|"))
    return UNDECIDED if begun else OUTSIDE


class LineBlock(Block):
    """Blocks by indentation: ends before the first line outside the requested block.

    What is open at the cursor decides which block that is. The first of these counts:

    - the outermost block that is no container, as a class is;
    - below a comment or a decorator: the next member;
    - containers: the rest of the innermost one;
    - the cursor is indented, so the prompt lacks a header: the lines indented as much;
    - the cursor's line has begun: a statement, which ends at a blank line;
    - nothing of these: all that follows.

    In Python and Scala, the last two go on through the first definition that the model writes.

    If only white space precedes the cursor in its line, the indentation of the first line written
    shows which blocks are open. In Scala, a typed line begins a block if no function is open.

    Except in Python, a closing line at the block's own indentation belongs to it. Below a blank
    line, a comment that is not indented deeper than the block's header waits for the next line of
    code and is inside if that is.
    """

    # What is completed:
    #   ""           not known until the first line shows which blocks are open
    #   "block"      which an `else` or `Helpers` may follow
    #   "member"     the next one of a class
    #   "statement"  outside all blocks
    #   "script"     lines outside all blocks, through the first definition in Python and Scala
    #   "closed"     a block that ends with the line being read
    goal = ""
    # Lines that are indented deeper belong to the goal; -1 outside all blocks, where every line is
    # deeper.
    base = -1
    level = 0  # indentation of the line that begins
    blank = False  # the last line was blank
    begun = False  # some line is code, and no decorator
    waiting = False  # the text since `mark` is a comment that waits for the next line

    def __init__(self, scanner: LineScanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        self.scanner: LineScanner = scanner
        self.prompt = prompt
        language, head = self.language, scanner.head.strip()
        if head and language.brackets:  # among those with blocks by lines: Python or Scala
            blocks = scanner.enclosing(scanner.indent)
            if self._begins_block(head):
                blocks.append((scanner.indent, head))
            self._choose(blocks, typed=True)
        elif scanner.fresh and language.indented:  # right below a header
            self._choose(scanner.blocks, typed=False)
        # Or else the first line that is written decides, in `side_of`.

    def _begins_block(self, head: str) -> bool:
        """Whether the cursor's line begins a block."""
        if self.language.indented:
            return COMPOUND.match(head) is not None
        return self.scanner.last == "{" or not self.language.imports.match(head)

    def _choose(self, blocks: list[tuple[int, str]], typed: bool) -> None:
        """Choose the goal among the open blocks; `typed`: the cursor's line has begun."""
        scanner, language = self.scanner, self.language
        chosen = [block for block in blocks if not language.containers.match(block[1])]
        if not chosen and not typed:
            announced = is_announced(language, self.prompt)
            if announced and language.defines.search(self.prompt):
                self.goal, self.base = "member", scanner.indent
                return
        chosen = chosen or blocks[-1:]
        if chosen:
            self.goal, self.base = "block", chosen[0][0]
        elif scanner.indent:  # a prompt from the middle of a file lacks the block's header
            self.goal, self.base = "block", scanner.indent - 1
        else:
            last = last_line(self.prompt.rstrip())
            is_script = (language.indented and not typed) or last.startswith("#!")
            self.goal = "script" if is_script else "statement"

    def read_line(self, line: str) -> bool:
        self.blank = not line
        if line and not line.startswith(("@", *self.language.comment_starts)):
            self.begun = True
        outside = self.goal in ("statement", "script")  # of all blocks
        blocks = self.scanner.blocks if outside and self.language.brackets else []
        if blocks and self.language.defines.match(blocks[0][1]):  # the model's first definition
            self.goal, self.base = "block", 0
        return self.goal == "closed"

    def side_of(self, word: str) -> str:
        """By the indentation; may also settle the goal."""
        scanner, language = self.scanner, self.language
        self.waiting = False
        if scanner.in_comment and (not self.goal or not self.blank):
            # A comment right below code belongs to it, and so does one in the first line.
            return INSIDE
        if any(opener != word and opener.startswith(word) for opener, _ in language.comments):
            return UNDECIDED  # it may become a comment
        if not self.goal:
            self._choose(scanner.enclosing(scanner.indent), typed=False)
        # At a line's end the scanner has already left the line, and `level` is kept.
        if word[-1] != "\n":
            self.level = scanner.indent
        if self.level > self.base:
            return self._side_of_deeper(word)
        comment = self.blank and word.startswith(language.comment_starts)
        if comment and len(self.text) - self.mark < COMMENT_CHARS:
            self.waiting = True
            return UNDECIDED
        return OUTSIDE if self.level < self.base else self._side_at_base(word)

    def _side_of_deeper(self, word: str) -> str:
        # Outside all blocks, every line is deeper, also one in column 0.
        may_be_over = self.goal == "statement" and self.level == 0 and self.blank and self.mark
        return self._side_of_closing(word) if may_be_over else INSIDE

    def _side_at_base(self, word: str) -> str:
        if self.goal == "member" and (not self.begun or not self.blank):
            return INSIDE
        if not self.language.indented:
            return self._side_of_closing(word)
        if word[0] in OPENING_OF:
            return INSIDE
        side = side_of_else(word)
        return side if side != OUTSIDE else self.helpers.side_of(word)

    def _side_of_closing(self, word: str) -> str:
        """`side_of` for a line that may close the block, continue it, or be the next thing."""
        language = self.language
        if (side := side_of_clause(language.clauses, word)) != OUTSIDE:
            return side
        if word[0] in OPENING_OF or re.match(language.closers, word):
            if self.level == self.base:
                self.goal = "closed"
            return INSIDE
        return self.helpers.side_of(word) if self.language.brackets else OUTSIDE

    def flush(self, whole: bool) -> str:
        return self.cut(self.sent, self.mark if self.waiting else None)


class BracketBlock(Block):
    """Blocks in braces: ends after the line that completes the goal.

    The goal is the outermost open block that is not a container: a function with everything in it.
    Without one, it is the statement or signature in progress, or what a comment or decorator above
    the cursor announces; then the innermost class, impl or namespace; then the first function or
    class that the model writes. Closing brackets on their own lines after the block belong to it.
    """

    # What is completed: a "block", a "call" with a block among its arguments, or a "statement"; ""
    # if it has not begun.
    goal = ""
    depth = 0  # the goal is complete when no more brackets are open
    clauses = False  # an `else` or the like may go on with it

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        language, stack = self.language, scanner.stack
        head = scanner.head.strip()
        braces = [depth for depth, bracket in enumerate(stack) if bracket.kind == "{"]
        things = [depth for depth in braces if not language.containers.search(stack[depth].header)]
        announced = is_announced(language, prompt)
        # The cursor is in a statement that is no import.
        is_over = braces and scanner.is_over
        begun = head and not is_over and not language.imports.match(last_line(head))
        if language.blocks == "brackets" and stack:
            self.goal, self.depth = "block", len(stack) - 1
        elif things:
            self._choose(things[0])
        elif announced or begun:
            self.goal, self.depth = "statement", braces[-1] + 1 if braces else 0
            self.clauses = CONTROL.search(head) is not None
        elif braces:
            self._choose(braces[-1])

    def _choose(self, depth: int) -> None:
        """Choose the block at `stack[depth]`; if it is an argument of a call, choose the call."""
        stack = self.scanner.stack
        self.goal, self.depth = "block", depth
        while self.depth and stack[self.depth - 1].kind in "([":
            self.goal = "call"
            self.depth -= 1
        self.clauses = CONTROL.search(stack[depth].header) is not None

    def step(self, char: str) -> None:
        super().step(char)
        if not self.goal and char in "{[" and len(self.scanner.stack) == 1 and self._begins():
            self._choose(0)

    def _begins(self) -> bool:
        """Whether the one bracket that is open begins the goal."""
        language, bracket = self.language, self.scanner.stack[0]
        if language.blocks == "brackets":
            return True
        defines = bracket.kind == "{" and language.definition.search(bracket.header)
        return bool(defines) and not CONTROL.search(bracket.header)

    @property
    def _may_go_on(self) -> bool:
        """Whether the line after the goal may use its value: in a statement or a call without a
        semicolon.
        """
        return self.goal in ("statement", "call") and self.language.line_ends

    def read_line(self, line: str) -> bool:
        scanner = self.scanner
        inside = len(scanner.stack) > self.depth
        if not self.goal or inside:
            return False
        ended = scanner.last in ("}", ";") or (scanner.last and scanner.is_over)
        if self.goal == "statement" and not ended:
            return not line and self.mark > 0
        self.complete = True
        if scanner.stack or self.clauses or self.helpers.called:
            return False
        return not self._may_go_on or scanner.last == ";"

    def side_of_next(self, word: str) -> str:
        if word[0] in ("{", *OPENING_OF) or (word[0] in GOES_ON and self._may_go_on):
            return INSIDE
        if self._may_go_on and (side := side_of_clause(self.language.clauses, word)) != OUTSIDE:
            return side
        return side_of_else(word) if self.clauses else self.helpers.side_of(word)


class StatementBlock(Block):
    """SQL: ends with the line in which the statement at the cursor ends, or the next one if the
    cursor is in none.

    A blank line may end a statement without a semicolon, unless the line below goes on with a
    clause.
    """

    def read_line(self, line: str) -> bool:
        scanner = self.scanner
        if scanner.head.strip() or scanner.stack or not scanner.last:
            return False
        if not line:
            scanner.last = ""
            self.complete = self.mark > 0
        return line != ""

    def side_of_next(self, word: str) -> str:
        if re.match(r"\w{1,20}\Z|[-/*]", word):
            return UNDECIDED  # a comment waits for the line below it
        return INSIDE if re.match(self.language.clauses, word) else OUTSIDE


def starts_in_docstring(prompt: str, quotes: str) -> bool:
    """Whether the prompt's first triple quotes close a docstring, in which the prompt then
    begins.
    """
    above, _, after = prompt.partition(quotes)
    above = re.sub(r"\b[bfruBFRU]{1,2}$", "", above)
    before = above.rstrip()
    opens = before[-1:] in ("", *":=([{,\\")
    if not opens and before[-1] != ".":
        opens = above[len(before) :].strip("\n") == " "
    rest, _, below = after.partition("\n")
    if opens or rest.strip():
        return False
    return CODE.search("\n" + below.partition(quotes)[0]) is not None


def scan(language: Language, prompt: str) -> Scanner:
    """A scanner at the prompt's end."""
    marks = language.texts if language.indented else ()
    prompt = next((quotes for quotes in marks if starts_in_docstring(prompt, quotes)), "") + prompt
    scanner = scanner_of(language, prompt)
    if scanner.opener in language.texts and scanner.closer:
        starts = (definition.start() for definition in language.defines.finditer(prompt))
        header = max((start for start in starts if HEADER.match(prompt, start)), default=0)
        again = scanner_of(language, prompt[header:])
        return scanner if again.closer else again  # in code: a quote above was misread
    return scanner


def block_of(scanner: Scanner, prompt: str) -> Block:
    if scanner.statements:
        return StatementBlock(scanner, prompt)
    if isinstance(scanner, LineScanner):
        return LineBlock(scanner, prompt)
    return BracketBlock(scanner, prompt)


def code_stages(syntax: Language | None, prompt: str, suffix: str, infill: bool) -> list[Stage]:
    """The stages that end the code at a cursor."""
    known = syntax or guess(prompt, suffix if infill else "")
    if not known:
        return [Blanks()]
    scanner = code = scan(in_style(known, prompt, suffix), prompt)
    if scanner.closer.startswith("$"):  # SQL: `code` is the body of a function
        code = scanner_of(known, prompt.rpartition(scanner.closer)[2])
    if code.statements and not code.head.strip():
        code.last = ""  # nothing of the next statement has come
    stages = list[Stage]()
    typed = last_line(prompt)
    if typed and not typed.strip() and code.starting:
        stages.append(Typed(typed))
    stages.append(gap_of(code, prompt, suffix) if infill else block_of(scanner, prompt))
    return stages


class Ending:
    """Ends a completion at a stop string or when the requested piece is complete, however its text
    is split.

    The reasons: "block", the requested block is complete; "repeat", the model is starting over;
    "stop", the suffix, a fence or one of the strings `stops` follows. `mode` is "complete",
    "infill" or "instruct". `prompt` is the text before the completion; in the answer to an
    instruction, the start that the model was given. `stop_at` "none" turns off all but the stop
    strings and the removal of the fences around such an answer's code. An `indent` above 0 ends the
    completion before a line that is indented less. An unknown language is guessed: an infill ends
    by the suffix in any case, a completion before two blank lines if its prompt defines nothing.
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
        suffix = suffix or ""
        infill = mode == "infill" and suffix.strip() != ""
        self.stages: list[Stage] = [Sure(least)] if least else []
        self.stages.append(StopStrings(stops))
        if mode == "instruct":
            self.stages.append(Fences(syntax, prompt))
        elif stop_at != "none":
            self.stages += code_stages(syntax, prompt, suffix, infill)
        if stop_at != "none":
            if indent > 0:
                whole = not infill or prompt[-1:] in ("", "\n")
                self.stages.append(Indent(indent, whole))
            self.stages.append(Repeat())
        # Where whole lines are missing, the text ends with its line.
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
            if reason and not why:
                # In a gap within a line, all that the model is sure of belongs to it, as all does
                # that it writes before it ends by itself.
                text += stage.flush(whole=reason != "unsure" or stage.in_line)
            reason = why or reason
        return text, reason

    def flush(self, whole: bool = True) -> str:
        """The text left to send when no more tokens come. `whole`: the model has ended, max_tokens
        did not cut it.
        """
        text = ""
        for stage in self.stages:
            text, why = stage.feed(text)
            text += "" if why else stage.flush(whole)
        return text
