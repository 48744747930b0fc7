"""Follows source code: its strings, comments, brackets and blocks, in any language of languages.py.

A `Scanner` tracks the end of the text fed so far: inside a literal or a comment, at which depth of
brackets, below which less indented lines. There is one for each kind of block: braces (`Scanner`),
lines (`LineScanner`) and the statements of SQL (`StatementScanner`). All it knows of a language is
the language's row in languages.py. No text is refused, however odd, and the cost of a text is at
most its length times a constant. Pure; standard library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cerebrum.text.languages import Language

# ----------------------------------------------------------------------------------- following code

# Enough for the longest word in QUOTE_AFTER, RAW_BEFORE and REGEX_BEFORE and the character before
# it.
WORD_CHARS = 8
# Kept of a statement; a longer one keeps the first half of these and its newest characters.
HEAD_CHARS = 1000
# Unclosed brackets of other kinds that a closing bracket may skip; a correct program has none.
STRAY_BRACKETS = 20
OPENER_CHARS = 6  # the longest opening of a literal
TAIL_CHARS = 18  # the longest end of a literal: C++'s )name" with 16 characters in its name
LINE_CHARS = 500  # the part of a line that comparisons use
OPENING_OF = {")": "(", "]": "[", "}": "{"}
COMPOUND = re.compile(
    r"(?:async\s+)?(?:def|class|if|elif|else|for|while|with|try|except|finally|match|case)\b"
)
# The code before a quote that opens a string right after a letter, and before a regex.
QUOTE_AFTER = re.compile(
    r"(?<!\w)(?:and|br?|case|else|fr?|i[fns]|l|not|or|r[bf]?|return|u8?)$", re.IGNORECASE
)
RAW_BEFORE = re.compile(r"(?<!\w)(?:u8|[uUL])?R$")
REGEX_BEFORE = re.compile(
    r"(?:^|[(,=:\[!&|?{;+\-*%~^]|=>"
    r"|\b(?:return|typeof|case|in|of|do|else|void|delete|split|grep|if|unless|and|or|not))$"
)
CONDITION = re.compile(r"(?<![\w.])(?:if|while|for|with)\s*$")
HERE = re.compile(r"(?<!<)<<[^<\n]\Z")  # no <<<
# SQL. The word that ends before the last character, unless it is part of a name, and that character
# unless it is blank.
TOKENS = re.compile(r"(?<![\w.@])\w+(?=\W\Z)|[^\w \t\r]\Z")
TOKENS_CHARS = 40  # of the statement's end, searched for TOKENS and DOLLARS
# BEGIN and END open and close no block if one of these follows.
NO_BEGIN = re.compile(
    r"[.,;:=<>)\]]|(?:and|asc?|between|deferred|desc|distributed|exclusive|from|immediate|i[ns]|isolation|or|read"
    r"|tran(?:saction)?|work)\Z"
)
NO_END = re.compile(r"(?:if|loop|while|repeat|for|case)\Z")
# The $$ or $tag$ that opens a literal: not at the start of a statement, nor behind END or
# DELIMITER.
DOLLARS = re.compile(r"(?i)\S(?<!\bend)(?<!\bdelimiter)\s*(?<![\w$])(\$(?:[a-z_]\w*)?\$)\Z")
# A line that ends a batch of statements or is a command to the client.
BATCH = re.compile(r"(?i)(?!\s*delimiter\b).*(?://|\$\$)\s*|\s*(?:go|/)\s*|.*\\.*")
# A blank line ends no statement that may still get its WHERE, nor WITH or INSERT alone, nor one
# that has to go on.
CHANGES = re.compile(r"(?i)\b(?:update|delete|merge)\b")
PREFACE = re.compile(
    # dbt has its settings in braces
    r"(?is)(?:\s*\{\{[^}]*+\}\})?\s*(?:with|insert)\b(?!.*\)\s*(?:select|values)\b)"
)
UNFINISHED = re.compile(
    r"(?i)(?:[-+,=<>/|({}&.:$]|\n\)|\b(?:all|and|as|by|do|else|except|from|having|in|intersect|into|is|join|not|on|or"
    r"|returns|select|set|table|then|union|using|values|when|where))\s*\Z"
)


INDENTATION = re.compile(" {2,}")


class Bracket(NamedTuple):
    """An open bracket."""

    kind: str  # with a { that opens no block: "({"
    indent: int  # of its line
    header: str = ""  # of {: the statement before it
    condition: bool = False  # a statement may follow its end


def after_blank(column: int, blank: str) -> int:
    """The column after a space or a tab."""
    return column + 1 if blank == " " else column + 8 - column % 8


class Scanner:
    """Follows source code one character at a time: its strings, comments, brackets and statements.

    `scanner_of` makes the one for a language.
    """

    by_lines = False  # the blocks are lines
    statements = False  # the blocks are statements

    tail = ""  # the last characters of the text
    # The literal or comment that the text is in: its two ends, "" in code.
    opener = closer = ""
    since = 0  # characters since it opened
    escaped = False  # after a backslash or the language's `escape`
    escaped_at = 0  # `since` of the last escaped character
    line = ""  # of a # comment, its beginning; of a here-document, the line so far
    # The statement so far: its code, its last character and the one before.
    head = last = previous = ""
    condition = ""  # `head` up to the parentheses of an if, if those came last
    starting = True  # only white space since a line (by lines: a statement) began
    indent = 0  # its columns

    def __init__(self, language: Language) -> None:
        self.language = language
        self.terminators = list[str]()  # the lines that end the here-documents below this line
        self.stack = list[Bracket]()  # open brackets
        # Of the closing brackets whose partner is not in the text, the indentation of their lines.
        self.unmatched = list[int]()

    @property
    def in_comment(self) -> bool:
        return (self.opener, self.closer) in self.language.comments

    @property
    def in_parens(self) -> bool:
        return bool(self.stack) and self.stack[-1].kind[0] in "(["

    @property
    def is_over(self) -> bool:
        """Whether the statement has ended with its line, in a language without semicolons."""
        language, head = self.language, self.head.strip()
        if head.endswith("else") or (self.condition and head == self.condition.strip()):
            return False  # the statement of an if, a loop or an else is missing
        goes_on = self.last in (*",=(&|+?.:<*/-", language.escape)
        return language.line_ends and self.starting and not goes_on

    @property
    def opened(self) -> int | None:
        """The indentation of the header just before this point, if it opened a block that has no
        body yet.
        """
        openings = ("{", "[") if self.language.blocks == "brackets" else ("{",)
        return self.stack[-1].indent if self.stack and self.last in openings else None

    def feed(self, text: str) -> None:
        """Read a text. Runs of characters that only continue a statement or a literal are read at
        once.
        """
        literal_run, code_run = self.language.literal_run, self.language.code_run
        at = 0
        while at < len(text):
            run = None
            if self.closer:
                if self.since > OPENER_CHARS and not self.escaped:
                    run = literal_run.match(text, at)
            elif self.starting:
                run = INDENTATION.match(text, at)
            elif self.last != "<":
                run = code_run.match(text, at)
            end = run.end() if run else at + 1
            self.step(text[at:end])
            at = end

    def step(self, char: str) -> None:
        """Read a character, or a run of them, see `feed`."""
        language = self.language
        self.tail = (self.tail + char)[-TAIL_CHARS:]
        self.since += len(char)
        here = language.here_document and not self.closer and HERE.search(self.tail)
        if here and "((" not in self.head:  # no shift in arithmetic
            self._enter("<<", "<")  # first the rest of the line
            self.line = char
        elif char in language.opening_ends and (pair := self._opening()):
            begun = pair[0][:-1]
            if begun and not self.closer and pair in language.comments:
                self.head = self.head.removesuffix(begun)  # not code
                self.last = self.previous
            self._enter(*pair)
        elif self.closer:
            self._in_literal(char)
        else:
            self._in_code(char)

    def _add(self, code: str) -> None:
        if len(self.head) >= HEAD_CHARS:
            self.head = self.head[: HEAD_CHARS // 2]
        self.head += code

    # Strings and comments.

    def _enter(self, opener: str, closer: str) -> None:
        """Enter a literal or a comment after the last character."""
        self.opener, self.closer = opener, closer
        self.since = self.escaped_at = 0
        self.escaped = self.starting = False
        self.line = ""

    def _opening(self) -> tuple[str, str] | None:
        """(opener, closer) completed by the last character, in code or by extending a shorter
        opener (" to \"\"\").
        """
        for opener, closer in self.language.delimiters:
            if not self.tail.endswith(opener):
                continue
            if self.closer:
                opens = self.since < len(opener) and opener[: -self.since].endswith(self.opener)
            else:
                opens = self._opens(opener)
            if opens:
                return opener, closer
        return None

    def _opens(self, opener: str) -> bool:
        """Whether an opener in code opens a literal or comment, and is not an operator or part of a
        word.
        """
        before, word = self.tail[: -len(opener)][-1:], self.head[-WORD_CHARS:]
        if opener == "#":  # not $#, ${#x}, ${x##y} or a part of a URL
            return not re.match(r"[\w${/#]", before)
        if opener in ("'", '"') and before == self.language.escape:
            return False
        if opener == "'" and re.match(r"\w", before) and not self.language.commands:
            # An apostrophe in JSX or a digit separator in C++, unless a prefix or a keyword
            # precedes it.
            return QUOTE_AFTER.search(word) is not None
        if opener == 'R"':
            return RAW_BEFORE.search(word) is not None
        if opener == "/":  # not behind a string, nor behind the braces of JSX
            value = self.last == '"' or (self.last == "}" and not self.starting)
            return not value and REGEX_BEFORE.search(self.head.rstrip()[-WORD_CHARS:]) is not None
        return True

    def _in_literal(self, char: str) -> None:
        if self.opener in ("#", "<<"):
            self.line = (self.line + char)[:LINE_CHARS]
        if self.opener == "<<":
            self._in_here_document(char)
        elif self.since == 2 and self._is_lifetime(char):
            self.closer = ""
            self._in_code(char)
        elif self._is_escape(char):
            return
        elif self._ends():
            self._leave(char)
        else:
            self._go_on(char)

    def _go_on(self, char: str) -> None:
        """The literal goes on with this character."""
        if self.opener == 'R"' and char == "(" and self.closer == '"':
            self.closer = f'){self.tail[-self.since : -1]}"'  # R"name( ends with )name"
        elif char == "\n" and not self.in_comment and self.opener not in self.language.texts:
            self.closer = ""  # an unclosed string ends with its line
            self._in_code(char)

    def _ends(self) -> bool:
        """Whether the literal or comment ends here."""
        behind = self.since - self.escaped_at >= len(self.closer)
        return behind and self.tail.endswith(self.closer)

    def _is_lifetime(self, char: str) -> bool:
        """Whether the second character behind a quote shows that it opens none of Rust's."""
        ambiguous = self.opener == "'" and "'" in self.language.ambiguous
        return ambiguous and char != "'" and self.tail[-2] != "\\"

    def _is_escape(self, char: str) -> bool:
        """Whether a character of a literal is escaped, or escapes the next one."""
        if self.escaped:
            self.escaped, self.escaped_at = False, self.since
            return True
        language = self.language
        if char == language.escape and self.opener not in language.raw:
            self.escaped = not self.in_comment
        return self.escaped

    def _in_here_document(self, char: str) -> None:
        """In a here-document, or in the line above it."""
        if char != "\n":
            return
        line, self.line = self.line, ""
        if self.closer == "<":
            names = re.finditer(f"<<{self.language.here_document}", f"<<{line}")
            self.terminators = [name[2] for name in names]
        elif line.strip() == self.closer:
            del self.terminators[0]
        self.closer = self.terminators[0] if self.terminators else ""
        if not self.closer:
            self._in_code("\n")

    def _leave(self, char: str) -> None:
        """The literal or comment ends with this character."""
        if not self.in_comment:
            self.last = '"'
        self.closer = ""
        if char == "\n":
            self._in_code(char)

    # Code.

    def _in_code(self, char: str) -> None:
        if char == "\n":
            self._end_line()
            return
        if self.starting and char.isspace():
            for blank in char:
                self.indent = after_blank(self.indent, blank)
            return
        self.starting = False
        if char in self.language.brackets:
            self._bracket(char)
        elif char == ";" and not self.in_parens:
            self.head = ""
        else:
            self._add(char)
        if code := "".join(char.split()):
            self.previous, self.last = (self.last + code)[-2:-1], code[-1]

    def _bracket(self, char: str) -> None:
        if char in OPENING_OF:
            self._close(char)
        elif char == "{" and not self.by_lines:
            self.stack.append(Bracket(char, self.indent, self.head))
            self.head = ""
        else:
            condition = char == "(" and CONDITION.search(self.head[-WORD_CHARS:]) is not None
            kind = "({" if char == "{" else char
            self.stack.append(Bracket(kind, self.indent, condition=condition))
            self._add(char)

    def _opener_of(self, char: str) -> int | None:
        """The place in the stack of the bracket that `char` closes; a stray ) closes no block."""
        for depth in reversed(range(len(self.stack))[-STRAY_BRACKETS:]):
            kind = self.stack[depth].kind
            if kind[-1] == OPENING_OF[char]:
                return depth
        return None

    def _close(self, char: str) -> None:
        depth = self._opener_of(char)
        if depth is None:
            self.unmatched.append(self.indent)
            return
        bracket = self.stack[depth]
        del self.stack[depth:]
        if char != "}" or bracket.kind == "({":
            self._add(char)
            self.condition = self.head if bracket.condition else ""
        else:
            self.head = ""

    def _end_line(self) -> None:
        """A header may take several lines, but no blank one."""
        self.starting, self.indent = True, 0
        if not self.head or self.in_parens:
            return
        if self.head.endswith("\n"):
            self.head = ""
        else:
            self._add("\n")


class LineScanner(Scanner):
    """Follows a language whose blocks are lines."""

    by_lines = True
    fresh = False  # the innermost block has no body yet, though perhaps a docstring

    def __init__(self, language: Language) -> None:
        super().__init__(language)
        # (indentation, code) of the last whole statement and of the less indented lines around it.
        # In Python, only those that open a block.
        self.blocks = list[tuple[int, str]]()

    @property
    def opened(self) -> int | None:
        return self.blocks[-1][0] if self.fresh else None

    def enclosing(self, indent: int) -> list[tuple[int, str]]:
        """The open blocks around a statement at this indentation."""
        return [block for block in self.blocks if block[0] < indent]

    def _end_line(self) -> None:
        if self.stack or self.last == "\\":
            self.last = self.last.strip("\\")
            return
        head = self.head.strip()
        # Not a comment or a docstring, which may have the prefix r.
        if head:
            opens = re.search(self.language.openers, head) is not None
            self.fresh = opens and self.last == head[-1]
            self.blocks = self.enclosing(self.indent)
            if self.fresh or not self.language.indented:
                self.blocks.append((self.indent, head))
        self.starting, self.indent = True, 0
        self.head = self.last = ""


class StatementScanner(Scanner):
    """Follows SQL, with blocks from BEGIN or CASE to END."""

    statements = True
    token = ""  # the last word, in lower case, or sign

    def _in_code(self, char: str) -> None:
        code = self.head[-TOKENS_CHARS:] + char
        for token in TOKENS.findall(code):
            self._read_token(token.lower())
        if char == "$" and (tag := DOLLARS.search(code)):
            self._enter("'", tag[1])  # a string, but for its end
        else:
            super()._in_code(char)

    def _read_token(self, token: str) -> None:
        """The token behind BEGIN or END shows what that means."""
        before, self.token = self.token, token
        if before == "begin" and not NO_BEGIN.match(token):
            self.stack.append(Bracket(before, self.indent))
        elif before == "end" and not NO_END.match(token) and not self.in_parens:
            del self.stack[-1:]
        if token == "case" and before != "end":
            self.stack.append(Bracket(token, self.indent))
        while token == ";" and self.stack and self.stack[-1].kind != "begin":
            self.stack.pop()  # never closed, or a CASE of statements

    def _end_line(self) -> None:
        """Perhaps the statement has ended with its line."""
        blank = self.starting
        self.starting, self.indent = True, 0
        if BATCH.fullmatch(self.head.rpartition("\n")[2]):
            self.stack.clear()
            self.head = ""
        elif not blank or self.stack:
            if not self.head.endswith("\n"):
                self._add("\n")
        elif not self._is_unfinished():
            self.head = ""

    def _is_unfinished(self) -> bool:
        """Whether a blank line does not end the statement."""
        begins = CHANGES.search(self.head) or PREFACE.match(self.head)
        return bool(begins or UNFINISHED.search(self.head[-TOKENS_CHARS:]))


# By a language's `blocks`; all others are read by lines.
SCANNERS = {"braces": Scanner, "brackets": Scanner, "statements": StatementScanner}


def scanner_of(language: Language, text: str = "") -> Scanner:
    """A scanner at the end of a text."""
    scanner = SCANNERS.get(language.blocks, LineScanner)(language)
    scanner.feed(text)
    return scanner
