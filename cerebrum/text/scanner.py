"""Follows source code: its strings, comments, brackets and blocks, in any language of languages.py.

A `Scanner` tracks the end of the text fed so far: inside a literal or a comment, at which depth of
brackets, below which less indented lines. There is one for each kind of block: braces (`Scanner`),
lines (`LineScanner`) and the statements of SQL (`StatementScanner`). It knows a language by the
language's row in languages.py, but for raw strings of C++, branches of the preprocessor, regular
expressions, here-documents and SQL. No text is
refused, however odd, and the cost of a text is at most its length times a constant. Pure; standard
library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cerebrum.text.languages import QUOTES, Language

# ----------------------------------------------------------------------------------- following code

# Kept of a statement; a longer one keeps the first half of these and its newest characters.
HEAD_CHARS = 1000
# Unclosed brackets of other kinds that a closing bracket may skip; a correct program has none.
STRAY_BRACKETS = 20
TAIL_CHARS = 80  # kept of the text: enough for the end of a literal or of a line with <<
LINE_CHARS = 500  # the part of a line that comparisons use
# A line that ends so goes on in the next one, in languages without semicolons; so does the empty
# one, since "" is in each string.
UNFINISHED = ",=(&|+?.:<*/-"
# Code before the / of a regex; behind other code it divides.
REGEX_BEFORE = (*"(,=:[!&|?{;", "=>")
OPENING_OF = {")": "(", "]": "[", "}": "{"}  # by the closing bracket
# The rest of a line below which a here-document follows; group 1 is the line that ends it.
# A name with )) behind it is a number to shift by, as in $((1<<n)).
HERE = r"\\?['\"]?([A-Za-z_][\w-]*+)(?!\)\))[^\n<]*+\n\Z"
# A quote that opens nothing: behind the escape character, or within a word, as in `it's` and 1'000.
# Behind the prefix of a string, as in b'', it opens one.
ESCAPED = r"\\[\"']\Z"
NO_QUOTE = rf"{ESCAPED}|\w(?<!\b[bBeEfFLnNrRtuUxX])(?<!\b[bBfFrRu][bBfFrR8])'\Z"
NO_OPERATOR = re.compile(r"[\w$@%&>{-]")  # before one of Perl's QUOTES
# The line of a directive so far, at the second letter of its name. In `#define NAME(iffy) #iffy`
# the second # begins none.
BRANCH = re.compile(r"^[ \t]*#[ \t]*(if|el|en)\Z", re.M)
# SQL. The word that ends before the last character, unless it is part of a name, and that character
# unless it is a space or a tab.
TOKENS = re.compile(r"(?<![\w.@])\w+(?=\W\Z)|[^\w \t\r]\Z")
TOKENS_CHARS = 40  # of the statement's end, searched for TOKENS and DOLLARS
# BEGIN and END open and close no block if one of these follows.
NO_BEGIN = re.compile(
    r"(?:[.,;:=<>)]|and|asc?|between|concurrent|deferred|desc|distributed|exclusive|from|i[ns]"
    r"|immediate|isolation|or|read|tran(?:saction)?|work)\Z"
)
NO_END = re.compile(r"(?:if|loop|while|repeat|for)\Z")
# The $$ or $tag$ that opens a literal: not at the start of a statement.
DOLLARS = re.compile(r"\S\s*(?<![\w$])(\$(?:[A-Za-z_]\w*)?\$)\Z")


class Bracket(NamedTuple):
    """An open bracket."""

    kind: str  # "{" for a block of SQL, too
    indent: int  # of its line; in a LineScanner, of its statement
    header: str = ""  # the statement before it


def after_blank(column: int, blank: str) -> int:
    """The column after a space or a tab."""
    return column + 1 if blank == " " else column + 8 - column % 8


class Scanner:
    """Follows source code one character at a time: its strings, comments, brackets and statements.

    `scanner_of` makes the one for a language.
    """

    by_lines = False  # the blocks are lines

    # The last characters of the text, in which the ends of literals are looked for. It is emptied
    # where no end reaches back: behind `\"` and behind a closing `"""`.
    tail = ""
    # The two ends of the literal or comment that the text is in. In code, `closer` is "", and
    # `opener` is still the last one, because the third quote of `"""` extends it (`_opening`).
    opener = closer = ""
    since = 0  # characters behind `opener`, also in code
    escaped = False  # after the language's `escape`
    head = ""  # the code of the statement so far, without literals and comments
    # The last characters of the code that are no white space, with `"` for each literal.
    signs = ""
    starting = True  # only white space since a line (by lines: a statement) began
    indent = 0  # its columns

    def __init__(self, language: Language) -> None:
        self.language = language
        self.stack = list[Bracket]()  # open brackets
        # The partners, not in the text, of closing brackets; with the indentation of these.
        self.unmatched = list[Bracket]()
        self.branches = list[int]()  # brackets open above each #if without its #endif

    @property
    def last(self) -> str:
        """The last one of `signs`, "" if there is none; of the statement before, where none has
        begun.
        """
        return self.signs[-1:]

    @property
    def in_comment(self) -> bool:
        return (self.opener, self.closer) in self.language.comments

    @property
    def is_over(self) -> bool:
        """Whether a statement has ended with its line, in a language without semicolons."""
        return self.language.line_ends and self.starting and self.last not in UNFINISHED

    @property
    def opened(self) -> int | None:
        """The indentation of the line just before this point, if it opened a block or a bracket
        that has nothing in it yet.
        """
        is_open = self.stack and self.last in OPENING_OF.values()
        return self.stack[-1].indent if is_open else None

    def feed(self, text: str) -> None:
        for char in text:
            self.step(char)

    def step(self, char: str) -> None:
        """Read one character: it opens a literal or a comment, is within one, or is code."""
        language = self.language
        self.tail = (self.tail + char)[-TAIL_CHARS:]
        self.since += 1
        begins = language.here_document and char == "\n" and not self.closer
        if begins and (here := re.search(language.here_document + HERE, self.tail)):
            self._enter("<<", here[1])
        elif char in language.opening_ends and (pair := self._opening()):
            self._enter(*pair)
        elif self.closer:
            if language.directives:
                self._read_branch()
            self._in_literal(char)
        else:
            self._in_code(char)

    def _add(self, code: str) -> None:
        """Add code to the statement."""
        if len(self.head) >= HEAD_CHARS:
            self.head = self.head[: HEAD_CHARS // 2]
        self.head += code

    # Strings and comments.

    def _enter(self, opener: str, closer: str) -> None:
        """Enter a literal or a comment after the last character."""
        # The beginning of an opener, as the first / of //, has been taken for code.
        self.head = self.head.removesuffix(opener[:-1])
        self.signs = self.signs.removesuffix(opener[:-1])
        self.opener = opener
        self.closer = closer
        self.since = 0
        self.escaped = self.starting = False

    def _opening(self) -> tuple[str, str] | None:
        """(opener, closer) of what the last character opens.

        In code, it completes an opener. It may also extend a shorter one. A `"` opens a string and
        the next one closes it, but a third makes all of them the opener of a text. In Lua, `--`
        opens a comment that ends with its line, but two brackets behind it make it `--[[`.
        """
        for opener, closer in self.language.delimiters:
            if not self.tail.endswith(opener):
                continue
            # What came behind the shorter opener is the rest of this one.
            extends = self.since < len(opener) and opener[: -self.since] == self.opener
            if extends or (not self.closer and self._opens(opener)):
                return opener, closer
        return None

    def _opens(self, opener: str) -> bool:
        """Whether an opener in code opens a literal or comment: it may be an operator or be part of
        a name instead.
        """
        if opener == "/":
            return self.signs.endswith(REGEX_BEFORE) or self.head.endswith("return ")
        if opener in QUOTES:
            return not NO_OPERATOR.match(self.tail[-len(opener) - 1 :])
        return not re.search(ESCAPED if self.language.commands else NO_QUOTE, self.tail)

    def _in_literal(self, char: str) -> None:
        """Read a character of a literal or a comment; it may be the end."""
        if self.opener == "<<":
            if char == "\n" and self.tail.split("\n")[-2].strip() == self.closer:
                self._leave(char)
        elif self.since == 2 and self._is_lifetime(char):
            self.closer = ""
            self._in_code(char)
        elif self._escape(char):
            return
        # The closing may not overlap the opening, as in `/*/`.
        elif self.since >= len(self.closer) and self.tail.endswith(self.closer):
            self._leave(char)
        elif self.opener == 'R"' and char == "(" and self.closer == '"':
            self.closer = f'){self.tail[-self.since : -1]}"'  # R"name( ends with )name"
        elif char == "\n" and not self.in_comment and self.opener not in self.language.texts:
            self.closer = ""  # an unclosed string ends with its line
            self._in_code(char)

    def _read_branch(self) -> None:
        """Of the branches of an #if, the brackets that the last one opens count: those of the
        branch above are forgotten at each #elif or #else. Called with each character of a literal
        or a directive; BRANCH matches once in a directive, at the second letter of its name.
        """
        match = self.opener == "#" and BRANCH.search(self.tail)
        word = match[1] if match else ""
        if word == "if":
            self.branches.append(len(self.stack))
        elif word == "en":
            del self.branches[-1:]
        elif word and self.branches:
            del self.stack[self.branches[-1] :]

    def _is_lifetime(self, char: str) -> bool:
        """Whether the second character behind a quote shows that it begins one of Rust's lifetimes,
        as in `'a,`, and not a character, as in `'a'`.
        """
        may_be = self.opener == "'" and self.language.lifetimes
        return may_be and char != "'" and self.tail[-2] != "\\"

    def _escape(self, char: str) -> bool:
        """Whether a character of a literal is escaped, or escapes the next one."""
        if self.escaped:
            self.escaped = False
            self.tail = ""  # it belongs to no end
            return True
        language = self.language
        may_be = language.directives if self.closer == "\n" else not self.in_comment
        self.escaped = may_be and char == language.escape and self.opener not in language.raw
        return self.escaped

    def _leave(self, char: str) -> None:
        """The literal or comment ends with this character."""
        if not self.in_comment:
            self.signs += '"'
        if len(self.closer) > 2:
            self.tail = ""  # the quote behind """ opens no other """
        self.closer = ""
        if char == "\n":
            self._in_code(char)

    # Code.

    def _in_code(self, char: str) -> None:
        if char == "\n":
            self._end_line()
            return
        if self.starting and char.isspace():
            self.indent = after_blank(self.indent, char)
            return
        self.starting = False
        if char in self.language.brackets:
            self._bracket(char)
        elif char == ";":
            self.head = ""
        else:
            self._add(char)
        self.signs = (self.signs + char.strip())[-TAIL_CHARS:]

    def _bracket(self, char: str) -> None:
        if char not in OPENING_OF:
            self.stack.append(Bracket(char, self.indent, self.head))
        elif not self._close(char):
            return
        if char in "{}" and not self.by_lines:
            self.head = ""
        else:
            self._add(char)

    def _close(self, char: str) -> bool:
        """Whether the text has the bracket that `char` closes. Others that were opened in it are
        closed, too; but a stray ) closes no block.
        """
        for depth in reversed(range(len(self.stack))[-STRAY_BRACKETS:]):
            if self.stack[depth].kind == OPENING_OF[char]:
                del self.stack[depth:]
                return True
        self.unmatched.append(Bracket(OPENING_OF[char], self.indent))
        return False

    def _end_line(self) -> None:
        """The statement goes on in the next line, as a header may. A label, such as `case 1:`, is
        no statement.
        """
        self.starting = True
        self.indent = 0
        if self.last == ":":
            self.head = ""
        elif self.head:
            self._add("\n")


class LineScanner(Scanner):
    """Follows a language whose blocks are lines."""

    by_lines = True
    fresh = False  # the innermost block has no body yet, though perhaps a docstring

    def __init__(self, language: Language) -> None:
        super().__init__(language)
        # (indentation, code) of the last whole statement and of the less indented lines around it.
        # In Python only those that open a block: [(0, "class A:"), (4, "def f(self):")] in a
        # method, whatever its last statement is.
        self.blocks = list[tuple[int, str]]()

    @property
    def opened(self) -> int | None:
        return self.blocks[-1][0] if self.fresh else super().opened

    def enclosing(self, indent: int) -> list[tuple[int, str]]:
        """The open blocks around a statement at this indentation."""
        return [block for block in self.blocks if block[0] < indent]

    def _end_line(self) -> None:
        if self.stack:
            return
        head = self.head.strip()
        # Not a comment or a docstring.
        if head:
            self.fresh = re.search(self.language.openers, head) is not None
            self.blocks = self.enclosing(self.indent)
            if self.fresh or not self.language.indented:
                self.blocks.append((self.indent, head))
        self.starting = True
        self.indent = 0
        self.head = self.signs = ""


class StatementScanner(Scanner):
    """Follows SQL, with blocks from BEGIN or CASE to END. Between `$$` and the next one, or `$tag$`
    and the next one, it is a string, also if that is the body of a function.
    """

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
        """BEGIN and CASE open a block, which END closes. The next token shows what BEGIN and END
        mean: `BEGIN;` begins a transaction, and `END IF` belongs to an IF, which opened none.
        """
        before = self.token
        self.token = token
        if before == "begin" and not NO_BEGIN.match(token):
            self.stack.append(Bracket("{", self.indent))
        elif before == "end" and not NO_END.match(token):
            del self.stack[-1:]
        if token == "case" and before != "end":
            self.stack.append(Bracket("{", self.indent))


# By a language's `blocks`; all others are read by lines.
SCANNERS = {"braces": Scanner, "brackets": Scanner, "statements": StatementScanner}


def scanner_of(language: Language, text: str = "") -> Scanner:
    """A scanner at the end of a text."""
    scanner = SCANNERS.get(language.blocks, LineScanner)(language)
    scanner.feed(text)
    return scanner
