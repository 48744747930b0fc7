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

import math
import re
from collections.abc import Sequence

from cerebrum.text.gap import Gap, gap_of
from cerebrum.text.languages import BY_NAME, LANGUAGES, NOTHING, Language, in_style
from cerebrum.text.scanner import COMPOUND, LINE_CHARS, PAIRS, Scanner
from cerebrum.text.stages import Blanks, Indent, Repeat, Stage, StopStrings, Typed, columns_of

# Limits. tests/bench/ending.py has no helpers, no chats and few comments in column 0: 0 % of its
# cases depend on these.
NAME_CHARS = 100  # a function with a longer name is not recognized as a helper
COMMENT_CHARS = (
    200  # a longer comment is not waited for: more often than not it is outside the block
)
FUNCTION = re.compile(r"(?:@?[a-z]\w*(?:\[\w*\])?\s+){0,6}def\b")
DEFINITION = re.compile(r"(?:async\s+)?(?:def|class)\b")
CONTROL = re.compile(
    r"(?:^|\n)[^\S\n]*(?:else\s+)?(?:if|else|for|while|do|switch|try|match|loop|unsafe|select|when|foreach|elseif|guard|repeat"
    r"|using|lock|synchronized|defer)\b[^\n]*$"
)
CODE = re.compile(
    r"\n *(?:(?:def|class|if|for|while|with|elif|except) .*:|return .*|from \S+ import .*|[\w.]+ = .*|[\w.]+\(.*\))\n"
)
CALL = re.compile(rf"(?:(?<=self\.)|(?<=this\.)|(?<![\w.]))(\w{{1,{NAME_CHARS}}})\(")
CLAUSES = "else|elif|elseif|except|finally|catch|while"  # continue a statement after its block
GOES_ON = tuple(
    ".?&|+:=,"
)  # a line that starts so continues the one above, in languages without semicolons
# An answer's blocks in these are not the code, unless there are no others.
BESIDE = frozenset(
    {"bash", "sh", "shell", "console", "json", "text", "plaintext", "output", "powershell", "zsh"}
)
# A sentence, or Markdown's emphasis, quotation or item of a list; but no assignment and no mapping.
PROSE = re.compile(
    r"(?:[A-Z][a-z'\u0080-\uffff]*[ ,!]+[\w\"'`(*]|[*>`\u0080-\uffff]|- (?!\w+:)|\d+[.)] ).*[^;{}]|[A-Z][a-z]+:"
)
HEADING = re.compile(r"#{1,6}[ \t]")  # a comment or, in an answer, a heading
HEADER = re.compile(r"\S[^\n]*[:{][ \t]*\r?\n")  # of a block in column 0
FENCE = re.compile(r"(`{3,}+|~{3,}+)([^`\n]*+)")
CHATTER_CHARS = 4000  # a chat's answer without a fence in this many characters has none
LEAST_PROBABILITY = 1e-4  # of a token
GUESS_CHARS = (
    4000  # of the prompt's end and of the suffix, read to guess the syntax and the indentation
)
GUESSES = {  # lines like the header of a definition, found in few other languages and in no prose
    "python": r"(?:async[ \t]+)?(?:def[ \t]+\w+\(|class[ \t]+\w+[(:])[^\n]{0,300}:",
    "rust": r"(?:pub(?:\([^)\n]{0,40}\))?[ \t]+)?(?:(?:async|unsafe)[ \t]+)?(?:fn[ \t]+\w+|impl\b)[^\n;]{0,300}\{",
    "go": r"func[ \t]+[^\n]{0,300}\{",
    "javascript": r"(?:export[ \t]+)?(?:default[ \t]+)?(?:async[ \t]+)?(?:function\b|class[ \t]+\w+)[^\n]{0,300}\{",
    "c": r"(?!(?:if|for|while|switch|else)\b)[A-Za-z_][\w*&:<> \t]{0,100}[ \t*&]\w+\([^;\n{}]{0,300}\)[ \t]*\{",
}
HEADERS = {
    name: re.compile(rf"^[ \t]{{0,200}}{header}[ \t]*\r?$", re.M)
    for name, header in GUESSES.items()
}
# Python's headers that define nothing.
STATEMENTS = re.compile(
    r"^[ \t]*(?:if|elif|else|for|while|try|except|with)\b[^\n;{]{0,200}:[ \t]*\r?$", re.M
)


def guess(prompt: str, suffix: str) -> Language | None:
    """The syntax of code around a gap; of code before the cursor, only if a definition shows it."""
    text = prompt[-GUESS_CHARS:] + suffix[:GUESS_CHARS]
    name = next((name for name, header in HEADERS.items() if header.search(text)), "")
    if suffix and not name:
        name = "python" if STATEMENTS.search(text) else "c"
    return LANGUAGES.get(name)


def due_columns(prompt: str, column: int, opened: int | None) -> int:
    """The final indentation of a line typed up to `column`: that of the line above, or whole levels
    more.

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
    """Whether the line right above the cursor's is a comment or a decorator: what it announces is
    asked for.
    """
    above, _, line = prompt.rpartition("\n")
    above = above.rpartition("\n")[2].strip()
    starts = (*language.comment_starts, "@", "#[") + ("[",) * language.directives
    ends = (language.block_comment or ())[1:]
    return not line.strip() and (above.startswith(starts) or above.endswith(ends))


class Block(Stage):
    """Lines up to the end of a block, and of the helpers: functions below it that it calls and
    nothing else defines.

    A subclass decides where a line begins (`outside`) and where it ends (`ended`).
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__()
        self.scanner = scanner
        # The line so far, including the prompt's part of it, without its indentation.
        self.line = prompt.rpartition("\n")[2].lstrip()[:LINE_CHARS]
        self.held = scanner.starting  # the line is held back: it may turn out to be outside
        self.mark = 0  # the end of the last line that is not blank, where the completion ends
        self.ticks = 0  # backticks in a row: a fence is no code in any language but Markdown
        function = scanner.language.function
        header = rf"\b(?:(?:async|export|local|pub|static|suspend)\s+){{0,4}}{function}\s+(\w{{1,{NAME_CHARS}}})\s*[(<]"
        self.helper = re.compile(header) if function else NOTHING
        self.code: list[str] = []  # the line's code
        self.called, self.defined = set[str](), set(self.helper.findall(prompt))  # functions

    def outside(self, word: str) -> str | None:
        """The reason to end before the line that begins with `word`; "" for none; None while that
        is undecided.
        """
        raise NotImplementedError

    def ended(self, line: str) -> str | None:
        """The reason to end with this line, or None."""
        raise NotImplementedError

    def step(self, char: str) -> None:
        language = self.scanner.language
        ticks = (
            char == "`"
            and (self.ticks or not self.scanner.closer)
            and language is not LANGUAGES["markdown"]
        )
        self.ticks = self.ticks + 1 if ticks else 0
        self.scanner.step(char)
        if language.function and not self.scanner.closer:
            self.code.append(char)
        reason: str | None = ""
        if self.ticks == len("```"):
            self.end("stop", self.mark if self.held else len(self.text) - self.ticks)
        elif (
            char == "\n"
            and not self.scanner.closer
            and (self.scanner.starting or not self.scanner.by_lines)
        ):
            line, held, self.line, self.held = self.line.rstrip(), self.held, "", True
            if held and line:  # the line is complete: decide now
                reason = self.outside(f"{line}\n")
            if reason == "":  # the line is inside; None: a comment that waits
                self.mark = len(self.text) if line else self.mark
                code = "".join(self.code)
                self.code.clear()
                self.defined.update(self.helper.findall(code))
                self.called = (self.called | set(CALL.findall(code))) - self.defined
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

    def helps(self, word: str) -> str | None:
        """`outside` for the line after a whole function: "" if it defines a missing one."""
        if match := self.helper.match(word):
            return "" if match[1] in self.called else "block"
        begun = word.partition(f"{self.scanner.language.function} ")[
            2
        ].lstrip()  # the start of the function's name
        may_help = re.fullmatch(r"[\w ]{1,200}", word) and any(
            name.startswith(begun) for name in self.called
        )
        return None if may_help else "block"


def continues(word: str) -> str | None:
    """`outside` for the line after a block that may have an `else`: "" for such a clause, None
    while it may be one.
    """
    if re.match(rf"(?:{CLAUSES})\W", word):
        return ""
    return None if any(clause.startswith(word) for clause in CLAUSES.split("|")) else "block"


class LineBlock(Block):
    """Blocks by indentation: ends before the first line outside the requested block.

    That block is the outermost function open at the cursor (a class is completed method by method).
    Without one, it is the outermost other block; without any, in Python, the first definition that
    the model writes. Below a comment or a decorator in a class it is the next member. A statement
    begun outside all blocks ends at a blank line. If only white space precedes the cursor in its
    line, the indentation of the first line written shows which blocks are open. Except in Python, a
    closing line at the block's own indentation belongs to it. In Scala, a typed line begins a block
    if no function is open. A less indented comment below a blank line waits for the next line of
    code and is inside if that is.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        language = scanner.language
        self.base: int | None = (
            None  # lines indented no deeper are outside; -1: none is; None: not known yet
        )
        self.level = 0  # indentation of the line that begins
        self.top = 0  # with `base` -1: the indentation of the statement being completed
        self.clauses = False  # an `else` or the like may go on with the block
        self.blank = False  # the last line was blank
        self.closed = False  # a closing line has been written
        self.begun = False  # some line is code, and no decorator
        self.waiting = (
            False  # the text since `mark` is a comment, inside if the next line of code is
        )
        last = prompt.rstrip().rpartition("\n")[2]
        # The block is a statement outside all blocks, or the next member of a class, of which no
        # deeper line has come.
        self.statement = not language.imports.match(last) and not last.startswith("#!")
        self.member = is_announced(language, prompt) and bool(language.defines.search(prompt))
        head = scanner.head.strip()
        if (head and scanner.brackets) or (scanner.fresh and language.indented):
            blocks = scanner.enclosing(scanner.indent) if head else scanner.blocks
            begun = scanner.last == "{" or not language.imports.match(head)
            if language.indented:
                begun = COMPOUND.match(head) is not None
            self._choose([*blocks, (scanner.indent, head)] if begun else blocks, bool(head))

    def _choose(self, blocks: list[tuple[int, str]], typed: bool) -> None:
        scanner, language = self.scanner, self.scanner.language
        functions = [block for block in blocks if FUNCTION.match(block[1])]
        others = [block for block in blocks if not language.containers.match(block[1])]
        nothing = (
            scanner.indent - 1,
            "def",
        )  # a prompt from the middle of a file may lack the block's header
        self.base, header = (functions or others or blocks[-1:] or [nothing])[0]
        self.top = scanner.indent
        self.member = self.member and not functions and not others and not typed
        if self.member:
            self.base = scanner.indent
        self.clauses = language.indented and not DEFINITION.match(header)
        self.statement = self.statement and self.base == -1 and (typed or not language.indented)

    def ended(self, line: str) -> str | None:
        blocks, language, self.blank = self.scanner.blocks, self.scanner.language, not line
        self.begun |= bool(line) and not line.startswith(("@", *language.comment_starts))
        if (
            self.base == -1
            and self.scanner.brackets
            and blocks
            and language.defines.match(blocks[0][1])
        ):
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
            self.member = self.member and not self.begun
            over = self.statement and self.level <= self.top and self.mark and self.blank
            return self._closes(word) if over else ""
        comment = self.blank and word.startswith(language.comment_starts)
        if comment and len(self.text) - self.mark < COMMENT_CHARS:
            self.waiting = True
            return None
        if self.level < self.base:
            return "block"
        if self.member and (not self.begun or not self.blank):
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
        language = self.scanner.language
        if re.match(rf"(?:{language.clauses or '(?!)'})(?!\w)", word):
            return ""
        if word[0] in PAIRS or (language.closers and re.match(language.closers, word)):
            self.closed = self.level == self.base
            return ""
        return self.helps(word) if self.scanner.brackets else "block"


class BracketBlock(Block):
    """Blocks in braces: ends after the line that completes the goal.

    The goal is the outermost open block that is not a container: a function with everything in it.
    Without one, it is the statement or signature in progress, or what a comment or decorator above
    the cursor announces; then the innermost class, impl or namespace; then the first function or
    class that the model writes. Closing brackets on their own lines after the block belong to it.
    """

    def __init__(self, scanner: Scanner, prompt: str) -> None:
        super().__init__(scanner, prompt)
        # The goal: a "block", a "call" with a block among its arguments, a "statement" or a
        # "directive". It is complete when no more than `depth` brackets are open; with `clauses`,
        # an `else` or the like may go on with it.
        self.goal, self.depth, self.clauses = "", 0, False  # "": it has not begun
        self.complete = False  # the goal is complete, but the next line may still belong to it
        self.conditionals = len(scanner.conditionals)  # around the goal
        language, stack, head = scanner.language, scanner.stack, scanner.head.strip()
        braces = [depth for depth, bracket in enumerate(stack) if bracket.kind == "{"]
        things = [depth for depth in braces if not language.containers.search(stack[depth].header)]
        imported = bool(head) and language.imports.match(head.rpartition("\n")[2]) is not None
        begun = bool(head) and not imported and not (braces and scanner.is_over)
        announced = is_announced(language, prompt) and bool(
            braces or language.defines.search(prompt)
        )
        if language.blocks == "brackets" and stack:
            self.goal, self.depth = "block", len(stack) - 1
        elif things:
            self._choose(things[0])
        elif (scanner.opener, scanner.closer) == ("#", "\n") and prompt.endswith(
            ("\\\n", "\\\r\n")
        ):
            self.goal, self.depth = "directive", len(braces)
        elif begun or announced or scanner.in_parens:
            self.goal, self.depth = "statement", braces[-1] + 1 if braces else 0
            self.clauses = CONTROL.search(head) is not None
            if announced and not head.startswith(("@", "#[", "[")):
                scanner.last = ""
        elif braces:
            self._choose(braces[-1])

    def _choose(self, depth: int) -> None:
        """Choose the block at `stack[depth]`; if it is an argument of a call, choose the call."""
        stack, self.goal, self.depth = self.scanner.stack, "block", depth
        while self.depth and stack[self.depth - 1].kind in "([":
            self.goal, self.depth = "call", self.depth - 1
        self.clauses = CONTROL.search(stack[depth].header) is not None

    def step(self, char: str) -> None:
        super().step(char)
        stack, language = self.scanner.stack, self.scanner.language
        if not self.goal and char in "{[" and len(stack) == 1:
            header = stack[0].header
            defines = (
                stack[0].kind == "{"
                and language.definition.search(header)
                and not CONTROL.search(header)
            )
            if defines or language.blocks == "brackets":
                self._choose(0)

    @property
    def _may_go_on(self) -> bool:
        """Whether the line after the goal may use its value: in a statement or a call without a
        semicolon.
        """
        return self.goal in ("statement", "call") and self.scanner.language.line_ends

    def ended(self, line: str) -> str | None:
        scanner = self.scanner
        if (
            not self.goal
            or len(scanner.stack) > self.depth
            or len(scanner.conditionals) > self.conditionals
        ):
            return None
        if self.goal == "directive":
            return "block"
        if line.startswith(("@", "#[")):
            return None
        if (
            self.goal == "statement"
            and scanner.last not in ("}", ";")
            and not (scanner.is_over and scanner.last)
        ):
            return "block" if not line and self.mark else None
        self.complete = True
        goes_on = self._may_go_on and scanner.last != ";"
        return None if scanner.stack or self.clauses or goes_on or self.called else "block"

    def outside(self, word: str) -> str | None:
        if not self.complete:
            return ""
        goes_on = word[0] in PAIRS or word[0] == "{" or (word[0] in GOES_ON and self._may_go_on)
        reason = "" if goes_on else continues(word) if self.clauses else self.helps(word)
        self.complete = reason != ""
        return reason


class StatementBlock(Block):
    """SQL: ends with the line in which the statement at the cursor ends, or the next one if the
    cursor is in none.

    A blank line may end a statement without a semicolon, unless the line below goes on with a
    clause.
    """

    complete = False  # the statement may have ended, but the next line may still belong to it

    def ended(self, line: str) -> str | None:
        scanner = self.scanner
        if scanner.head.strip() or scanner.stack or not scanner.last:
            return None
        if line:
            return "block"
        scanner.last = ""
        self.complete = self.mark > 0
        return None

    def outside(self, word: str) -> str | None:
        if not self.complete:
            return ""
        if re.match(r"\w{1,20}\Z|[-/*]", word):
            return None  # a comment waits for the line below it
        self.complete = False
        return "" if re.match(self.scanner.language.clauses, word) else "block"


class Fences(Stage):
    """A chat's answer: the code in its first fenced block, or all of it if it has none or begins
    like code.

    `begun` is the start of the answer, which the model was given to continue.
    """

    def __init__(self, language: Language | None, begun: str) -> None:
        super().__init__()
        self.language = language
        self.scanner = Scanner(language) if language else None
        self.state = "before"  # the block, "inside" it, in a block "beside" it, or "thinking"
        self.beside, self.beside_start = "", 0  # the first block beside it
        self.fence, self.margin, self.nested = "```", 0, 0
        self.mark = 0  # where the line starts
        self.line = ""  # the block's line so far, without its indentation
        self.left = (
            0  # spaces at the start of the line that still belong to the fence's own indentation
        )
        self.in_code = True  # the line does not start inside a string or comment
        # Some line was not blank, before the block or now inside it. None: only comments or
        # headings have come.
        self.begun: bool | None = False
        self.read = 0  # characters that went in
        self.feed(begun)
        if self.state == "beside":
            self.state = "inside"
        elif self.state == "before" or self.reason:  # `begun` has no block that is still open
            self.state, self.reason, self.mark, self.text, self.line, self.begun = (
                "before",
                None,
                0,
                [],
                "",
                False,
            )
            self.beside = ""
        self.sent = self.safe = len(self.text)
        self.read = self.start = 0

    def step(self, char: str) -> None:
        self.read += 1
        if self.state == "inside":
            self._inside(char)
        elif char == ">" and self.cut(-len("</think>")) == "</think>":
            self.state, self.text, self.mark, self.begun = "before", [], 0, False
            self.safe, self.sent, self.start = 0, 0, self.read
        elif self.state == "thinking" or (
            char == ">" and len(self.text) < 80 and self.cut(0).strip() == "<think>"
        ):
            self.state = "thinking"
        elif self.state == "beside":
            if char == "\n" and self.cut(self.mark).strip() == self.fence:
                if not self.beside:
                    self.beside, self.beside_start = self.cut(0, self.mark), self.start
                self.state, self.text, self.start = "before", [], self.read
            self.mark = len(self.text) if char == "\n" else self.mark
        elif char == "\n" or len(self.text) >= CHATTER_CHARS:
            self._before(self.cut(self.mark))

    def _before(self, line: str) -> None:
        """Decide whether a line of chatter is the fence that opens the block, or code without a
        fence.
        """
        if match := FENCE.fullmatch(line.strip()):
            self.fence, self.text, self.mark, self.begun = match[1], [], 0, False
            self.start = self.read
            self.left = self.margin = len(line) - len(line.lstrip())
            name = match[2].strip().lower()
            other = self.language and self.language is not LANGUAGES[BY_NAME.get(name, "shell")]
            self.state = "beside" if other and name in BESIDE else "inside"
            return
        self.mark = len(self.text)
        starts = self.language.comment_starts if self.language else ()
        unsure = not self.begun and HEADING.match(line) is not None and line.startswith(starts)
        code = not self.begun and not unsure and self._is_code(line.rstrip())
        if line.strip():
            self.begun = None if unsure else True
        if self.mark >= CHATTER_CHARS or code:
            self.state, self.safe = "inside", self.mark
            self.line = "" if line.endswith("\n") else line.lstrip()[:LINE_CHARS]
            if self.scanner:
                self.scanner.feed(self.cut(0))

    def _is_code(self, line: str) -> bool:
        language = self.language
        if not language or not line or PROSE.fullmatch(line):
            return False
        starts = (
            *language.comment_starts,
            "@",
            "#include",
            "#define",
            *(language.block_comment or ())[:1],
        )
        known = language.imports.match(line) or (
            not language.commands and language.defines.match(line)
        )
        return (
            self.begun is None
            or line.startswith(starts)
            or line.endswith(("{", "}", ";"))
            or bool(known)
        )

    def _inside(self, char: str) -> None:
        if char == " " and self.left:
            self.left -= 1
            self.text.pop()
            return  # in a list, the fence and all its lines are indented
        self.left = self.margin if char == "\n" else 0
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
            if (
                not self._closes(line) and not self.begun
            ):  # the model repeats the opening that it was given
                self.line, self.mark, self.safe, self.begun = (
                    "",
                    len(self.text),
                    len(self.text),
                    True,
                )
                self.sent, self.start = self.safe, self.read
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
        even = (
            len(re.findall(r"^[ \t]*```", self.cut(0, self.mark), re.M)) % 2 == 0
        )  # no block within this one is open
        closes = self._closes(last) or (last == "```" and even)
        closed = self.state == "inside" and self.in_code and not self.nested and closes
        if self.state == "beside" or (self.state == "before" and self.beside):
            self.start = self.beside_start if self.beside else self.start
            return self.beside or self.cut(0).removesuffix(self.fence)
        return "" if closed or self.state == "thinking" else super().flush(whole)


def starts_in_docstring(prompt: str, quotes: str) -> bool:
    """Whether the prompt's first triple quotes close a docstring, in which the prompt then
    begins.
    """
    above, _, after = prompt.partition(quotes)
    above = re.sub(r"\b[bfruBFRU]{1,2}$", "", above)
    before = above.rstrip()
    opens = before[-1:] in ("", *":=([{,\\") or (
        before[-1] != "." and above[len(before) :].strip("\n") == " "
    )
    behind, _, below = after.partition("\n")
    return (
        not opens
        and not behind.strip()
        and CODE.search("\n" + below.partition(quotes)[0]) is not None
    )


def scan(language: Language, prompt: str) -> Scanner:
    """A scanner at the prompt's end."""
    marks = ('"""', "'''") if language.indented else ()
    prompt = next((quotes for quotes in marks if starts_in_docstring(prompt, quotes)), "") + prompt
    scanner = Scanner(language, prompt)
    if scanner.opener in language.texts and scanner.closer:
        headers = (
            one.start()
            for one in language.defines.finditer(prompt)
            if HEADER.match(prompt, one.start())
        )
        again = Scanner(
            language, prompt[max(headers, default=0) :]
        )  # in code: a quote above was misread
        return scanner if again.closer else again
    return scanner


class Ending:
    """Ends a completion at a stop string or when the requested piece is complete, however its text
    is split.

    The reasons: "block", the requested block is complete; "repeat", the model is starting over;
    "stop", the suffix, a fence or one of the strings `stops` follows. `mode` is "complete",
    "infill" or "instruct". `prompt` is the text before the completion; in a chat, the start of the
    answer that the model was given. `stop_at` "none" turns off all but the stop strings and the
    removal of a chat's fences. An `indent` above 0 ends the completion before a line that is
    indented less. An unknown language is guessed: an infill ends by the suffix in any case, a
    completion before two blank lines if its prompt defines nothing.
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
        self.gap: Gap | None = None
        self.stages: list[Stage] = [Fences(syntax, prompt)] if mode == "instruct" else []
        if stop_at == "none":
            return
        if mode != "instruct":
            if known := syntax or guess(prompt, suffix if gap else ""):
                scanner = code = scan(in_style(known, prompt, suffix), prompt)
                if scanner.closer.startswith("$"):
                    code = Scanner(
                        known, prompt.rpartition(scanner.closer)[2]
                    )  # the body of a function
                if code.statements and not code.head.strip():
                    code.last = ""  # nothing of the next statement has come
                if code.starting and code.indent:
                    self.stages.append(
                        Typed(code.indent, due_columns(prompt, code.indent, code.opened))
                    )
                block: type[Block] = LineBlock if scanner.by_lines else BracketBlock
                if scanner.statements:
                    block = StatementBlock
                self.gap = gap_of(code, prompt, suffix) if gap else None
                self.stages.append(self.gap or block(scanner, prompt))
            else:
                self.stages.append(Blanks())
        if indent > 0:
            self.stages.append(Indent(indent, whole=not gap or prompt[-1:] in ("", "\n")))
        self.stages.append(Repeat())

    @property
    def start(self) -> int:
        """Where the client's text begins in the model's, in characters: behind what precedes a
        chat's code.
        """
        return sum(stage.start for stage in self.stages)

    def feed(self, text: str, probability: float = 1.0) -> tuple[str, str | None]:
        """(text that may be sent now, why the completion is over or None). `probability`: of the
        token that adds this text, 1.0 if it is unknown.
        """
        if self.gap:
            self.gap.bits = -math.log2(max(probability, LEAST_PROBABILITY))
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
        """The text left to send when no more tokens come. `whole`: the model has ended, max_tokens
        did not cut it.
        """
        text = ""
        for stage in (self.stops, *self.stages):
            text, why = stage.feed(text)
            text += "" if why else stage.flush(whole)
        return text
