"""Follows source code: its strings, comments, brackets and blocks, in any language of languages.py.

A `Scanner` tracks the end of the text fed so far: inside a literal or a comment, at which depth of
brackets, below which less indented lines. All it knows of a language is the language's row in
languages.py. No text is refused, however odd, and the cost of a text is at most its length times a
constant. Pure; standard library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cerebrum.text.languages import Language

# ----------------------------------------------------------------------------------- following code

# enough for the longest word in QUOTE_AFTER, RAW_BEFORE and REGEX_BEFORE and the character before
# it
WORD_CHARS = 8
# kept of a statement; a longer one keeps the first half of these and its newest characters
HEAD_CHARS = 1000
# unclosed brackets of other kinds that a closing bracket may skip; a correct program has none
STRAY_BRACKETS = 20
# of #if, those that are followed, and open brackets around their branches; C's standard promises 63
# #if
NESTED = 60
OPENER_CHARS = 6  # the longest opening of a literal
TAIL_CHARS = 18  # the longest end of a literal: C++'s )name" with 16 characters in its name
LINE_CHARS = 500  # the part of a line that comparisons use
PAIRS = {")": "(", "]": "[", "}": "{"}
COMPOUND = re.compile(
    r"(?:async\s+)?(?:def|class|if|elif|else|for|while|with|try|except|finally|match|case)\b"
)
# The code before a quote that opens a string right after a letter, before a C++ raw string, and
# before a regex.
QUOTE_AFTER = re.compile(
    r"(?<!\w)(?:and|br?|case|else|fr?|i[fns]|l|not|or|r[bf]?|return|u8?)$", re.IGNORECASE
)
RAW_BEFORE = re.compile(r"(?<!\w)(?:u8|[uUL])?R$")
REGEX_BEFORE = re.compile(
    r"(?:^|[(,=:\[!&|?{;+\-*%~^]|=>|\b(?:return|typeof|case|in|of|do|else|void|delete))$"
)
CONDITION = re.compile(r"(?<![\w.])(?:if|while|for|with)\s*$")
BRANCH = re.compile(r"[ \t]*(if|el|endif)")
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


class Bracket(NamedTuple):
    """An open bracket."""

    kind: str  # with a { that opens no block: "({"
    header: str  # of {: the statement before it
    indent: int  # of its line
    condition: bool = False  # a statement may follow its end


def after_blank(column: int, blank: str) -> int:
    """The column after a space or a tab."""
    return column + 1 if blank == " " else column + 8 - column % 8


def run_of(others: set[str]) -> re.Pattern[str]:
    """A pattern for a run of characters except these."""
    return re.compile(f"[^{re.escape(''.join(sorted(others)))}]{{2,}}")


class Literals:
    """Follows the strings and comments of a text; a subclass reads the code between them
    (`_in_code`).
    """

    def __init__(self, language: Language) -> None:
        self.language = language
        self.statements = language.blocks == "statements"
        self.comments = [(language.line_comment, "\n")] if language.line_comment else []
        self.comments += [*filter(None, [language.block_comment]), *language.other_comments]
        self.comments += [("#", "\n")] * language.directives
        literals = [*language.literals, *((mark, mark) for mark in language.ambiguous)]
        self.openers = sorted(self.comments + literals, key=lambda pair: -len(pair[0]))
        self.opener_ends = {opener[-1] for opener, _ in self.openers}
        # Characters that cannot change the state inside a literal or comment: no ends, escapes, R"(
        # of C++, $$ of SQL.
        self.run = run_of(
            {closer[-1] for _, closer in self.openers} | set("\n($" + language.escape)
        )
        # The literal or comment that the text is in. `since` counts the characters since it opened.
        self.opener = self.closer = ""  # "" in code
        self.since = self.escaped_at = 0  # `since` of the last escaped character
        self.escaped = False  # after a backslash or the language's `escape`
        self.line = ""  # of a here-document or a directive: the line so far
        self.terminators: list[str] = []  # the lines that end the here-documents below this line
        self.tail = ""  # the last characters of the text
        # The statement so far: its code, its last character and the one before.
        self.head, self.last, self.previous = "", "", ""
        self.condition = ""  # `head` up to the parentheses of an if, if those came last
        self.stack: list[Bracket] = []  # open brackets
        self.starting, self.indent = (
            True,
            0,
        )  # only white space since a line (by lines: a statement) began; its columns

    def _in_code(self, char: str) -> None:
        """Read a character of code."""
        raise NotImplementedError

    def _add(self, code: str) -> None:
        self.head = (
            self.head if len(self.head) < HEAD_CHARS else self.head[: HEAD_CHARS // 2]
        ) + code

    @property
    def in_comment(self) -> bool:
        return (self.opener, self.closer) in self.comments

    def _enter(self, opener: str, closer: str) -> None:
        """Enter a literal or a comment after the last character."""
        self.opener, self.closer, self.since, self.escaped_at = opener, closer, 0, 0
        self.escaped = self.starting = False
        self.line = ""

    def _opening(self) -> tuple[str, str] | None:
        """(opener, closer) completed by the last character, in code or by extending a shorter
        opener (" to \"\"\").
        """
        for opener, closer in self.openers:
            if not self.tail.endswith(opener):
                continue
            if self.closer:
                if self.since < len(opener) and opener[: -self.since].endswith(self.opener):
                    return opener, closer
            elif self._opens(opener):
                return opener, closer
        return None

    def _opens(self, opener: str) -> bool:
        """Whether an opener in code opens a literal or comment, and is not an operator or part of a
        word.
        """
        language, before = self.language, self.tail[: -len(opener)][-1:]
        if opener == "#" and language.directives:
            return self.starting
        if opener == "#":  # not $#, ${#x}, ${x##y} or a part of a URL
            return not before or not (before.isalnum() or before in "_${/#")
        if opener in ("'", '"') and before == language.escape:
            return False
        if opener == "'" and (before.isalnum() or before == "_") and not language.commands:
            # An apostrophe in JSX or a digit separator in C++, unless a prefix or a keyword
            # precedes it.
            return QUOTE_AFTER.search(self.head[-WORD_CHARS:]) is not None
        if opener == 'R"':
            return RAW_BEFORE.search(self.head[-WORD_CHARS:]) is not None
        if opener == "/":  # not behind a string, nor behind the braces of JSX
            value = self.last == '"' or (self.last == "}" and not self.starting)
            return not value and REGEX_BEFORE.search(self.head.rstrip()[-WORD_CHARS:]) is not None
        return True

    def _in_literal(self, char: str) -> None:
        language, comment = self.language, self.in_comment
        if self.opener == "<<":
            self._in_here_document(char)
            return
        if self.opener == "#":
            self.line = (self.line + char)[:LINE_CHARS]
        if (
            self.since == 2
            and self.opener == "'" in language.ambiguous
            and char != "'"
            and self.tail[-2] != "\\"
        ):
            self.closer = ""  # a lifetime
            self._in_code(char)
            return
        if self.escaped:
            self.escaped, self.escaped_at = False, self.since
        elif (
            char == language.escape
            and self.opener not in language.raw
            and (not comment or language.directives)
        ):
            self.escaped = True
        elif self.opener == 'R"' and char == "(" and self.closer == '"':
            self.closer = f'){self.tail[-self.since : -1]}"'  # R"name( ends with )name"
        elif self.tail.endswith(self.closer) and self.since - self.escaped_at >= len(self.closer):
            self._leave(char, comment)
        elif char == "\n" and not comment and self.opener not in language.texts:
            self.closer = ""  # an unclosed string ends with its line
            self._in_code(char)

    def _in_here_document(self, char: str) -> None:
        if char != "\n":
            self.line = (self.line + char)[:LINE_CHARS]
            return
        line, self.line = self.line, ""
        if self.closer == "<":
            self.terminators = [
                name[2] for name in re.finditer(f"<<{self.language.here_document}", f"<<{line}")
            ]
        elif line.strip() == self.closer:
            del self.terminators[0]
        self.closer = self.terminators[0] if self.terminators else ""
        if not self.closer:
            self._in_code(char)

    def _leave(self, char: str, comment: bool) -> None:
        """The literal or comment ends with this character."""
        if self.since > len(
            self.closer
        ):  # one more quote makes a triple quote only after an empty string
            self.tail = ""
        if not comment:
            self.last = '"'
        self.closer = ""
        if char == "\n":
            self._in_code(char)


class Scanner(Literals):
    """Follows source code one character at a time: its strings, comments, brackets, statements and
    blocks.
    """

    def __init__(self, language: Language, text: str = "") -> None:
        super().__init__(language)
        self.by_lines = language.by_lines
        spanning = {"lines": "", "tree": "", "offside": "()[]", "statements": "()[]"}
        self.brackets = spanning.get(language.blocks, "()[]{}")  # that span lines
        words = re.compile(r"\w{2,}")
        self.code_run = words if self.statements else run_of(self.opener_ends | set("()[]{}\n;:<"))
        self.token = ""  # SQL: the last word, in lower case, or sign
        self.unmatched = 0  # closing brackets whose partner is not in the text
        # Of each #if without its #endif: `stack` before its branches and, from the second one on,
        # behind the first.
        self.conditionals: list[list[list[Bracket]]] = []
        # By lines: (indentation, code) of the last whole statement and of the less indented lines
        # around it. In Python, only those that open a block; `fresh`: the innermost of them has no
        # body yet, though perhaps a docstring.
        self.blocks: list[tuple[int, str]] = []
        self.fresh = False
        self.feed(text)

    @property
    def in_parens(self) -> bool:
        return bool(self.stack) and self.stack[-1].kind[0] in "(["

    @property
    def is_over(self) -> bool:
        """Whether the statement has ended with its line, in a language without semicolons."""
        head = self.head.strip()
        if head.endswith("else") or (self.condition and head == self.condition.strip()):
            return False  # the statement of an if, a loop or an else is missing
        goes_on = (*",=(&|+?.:<*/-", self.language.escape)
        return self.language.line_ends and self.starting and self.last not in goes_on

    @property
    def opened(self) -> int | None:
        """The indentation of the header just before this point, if it opened a block that has no
        body yet.
        """
        if not self.by_lines:
            openings = ("{", "[") if self.language.blocks == "brackets" else ("{",)
            return self.stack[-1].indent if self.stack and self.last in openings else None
        if self.language.indented and self.head.strip():
            return (
                self.indent
                if self.last == ":" and not self.stack and COMPOUND.match(self.head.strip())
                else None
            )
        return self.blocks[-1][0] if self.fresh else None

    def enclosing(self, indent: int) -> list[tuple[int, str]]:
        """The open blocks around a statement at this indentation."""
        return [block for block in self.blocks if block[0] < indent]

    def feed(self, text: str) -> None:
        """Read a text. Runs of characters that only continue a statement or a literal are read at
        once.
        """
        at = 0
        while at < len(text):
            if (
                not self.closer
                and not self.starting
                and self.last != "<"
                and (run := self.code_run.match(text, at))
            ):
                self._add(run[0])
                code = self.last + "".join(run[0].split())
                self.previous, self.last = (
                    code[-2:-1] if len(code) > 1 else self.previous,
                    code[-1:],
                )
            elif (
                self.since > OPENER_CHARS
                and self.closer
                and not self.escaped
                and (run := self.run.match(text, at))
            ):
                self.line = (self.line + run[0])[:LINE_CHARS]
            else:
                self.step(text[at])
                at += 1
                continue
            self.tail = (self.tail + run[0])[-TAIL_CHARS:]
            self.since += len(run[0])
            at = run.end()

    def step(self, char: str) -> None:
        """Read a character."""
        self.tail = self.tail[1 - TAIL_CHARS :] + char
        self.since += 1
        here = self.language.here_document and not self.closer and HERE.search(self.tail)
        if here and "((" not in self.head:  # no shift in arithmetic
            self._enter("<<", "<")  # first the rest of the line
            self.line = char
        elif char in self.opener_ends and (pair := self._opening()):
            begun = pair[0][:-1]
            if not self.closer and pair in self.comments and begun and self.head.endswith(begun):
                self.head, self.last = self.head[: -len(begun)], self.previous  # not code
            self._enter(*pair)
        elif self.closer:
            self._in_literal(char)
        else:
            self._in_code(char)

    def _in_code(self, char: str) -> None:
        if self.statements:
            code = self.head[-TOKENS_CHARS:] + char
            for token in TOKENS.findall(code):
                self._token(token.lower())
            if char == "$" and (tag := DOLLARS.search(code)):
                self._enter("'", tag[1])  # a string, but for its end
                return
        if char == "\n":
            self._newline()
            return
        if self.starting and char in " \t\r":
            self.indent = after_blank(self.indent, char)
            return
        self.starting = False
        if char in self.brackets:
            self._bracket(char)
            char = ")" if char == "}" == self.head[-1:] else char  # no block ends
        elif char == ";" and not self.by_lines and not self.in_parens:
            self.head = ""
        else:
            self._add(char)
        if char not in " \t\r":
            self.previous, self.last = self.last, char

    def _bracket(self, char: str) -> None:
        if char in PAIRS:
            self._close(char)
        elif char == "{" and not self.by_lines:
            self.stack.append(Bracket(char, self.head, self.indent))
            self.head = ""
        else:
            condition = char == "(" and CONDITION.search(self.head[-WORD_CHARS:]) is not None
            self.stack.append(Bracket("({" if char == "{" else char, "", self.indent, condition))
            self._add(char)

    def _opener_of(self, char: str) -> int | None:
        """The place in the stack of the bracket that `char` closes; a stray ) closes no block."""
        for depth in range(len(self.stack) - 1, max(-1, len(self.stack) - 1 - STRAY_BRACKETS), -1):
            kind = self.stack[depth].kind
            if kind[-1] == PAIRS[char]:
                return depth
            if kind == "{":
                break
        return None

    def _close(self, char: str) -> None:
        depth = self._opener_of(char)
        if depth is None:
            self.unmatched += 1
            return
        bracket = self.stack[depth]
        del self.stack[depth:]
        if char != "}" or bracket.kind == "({":
            self._add(char)
            self.condition = self.head if bracket.condition else ""
        elif self.in_parens:
            self.head = bracket.header
            self._add("{}")
        else:
            self.head = ""

    def _directive(self) -> None:
        """A line of the preprocessor has ended. Of the branches of an #if, the brackets of the
        first one count.
        """
        match, now = BRANCH.match(self.line), self.stack[:NESTED]
        self.line = ""
        if match and match[1] == "if":
            self.conditionals = [*self.conditionals[-NESTED:], [now]]
        elif match and self.conditionals:
            places = [*self.conditionals.pop(), now]
            if match[1] == "el":
                self.conditionals.append(places[:2])
            self.stack[:] = places[match[1] == "endif"]

    def _token(self, token: str) -> None:
        """SQL: follow the blocks, from BEGIN or CASE to END. The token behind one of these shows
        what it means.
        """
        before, self.token = self.token, token
        if before == "begin" and not NO_BEGIN.match(token):
            self.stack.append(Bracket(before, "", self.indent))
        elif before == "end" and not NO_END.match(token) and not self.in_parens:
            del self.stack[-1:]
        if token == "case" and before != "end":
            self.stack.append(Bracket(token, "", self.indent))
        while token == ";" and self.stack and self.stack[-1].kind != "begin":
            self.stack.pop()  # never closed, or a CASE of statements

    def _line_of_statement(self, blank: bool) -> None:
        """SQL: a line has ended, and perhaps the statement."""
        if BATCH.fullmatch(self.head.rpartition("\n")[2]):
            self.stack.clear()
            self.head = ""
        elif blank and not self.stack:
            end = self.head[-TOKENS_CHARS:]
            unfinished = (
                CHANGES.search(self.head) or PREFACE.match(self.head) or UNFINISHED.search(end)
            )
            self.head = self.head if unfinished else ""
        elif not self.head.endswith("\n"):
            self._add("\n")

    def _newline(self) -> None:
        if self.opener == "#" and self.language.directives:
            self._directive()
        if not self.by_lines:
            blank = self.starting
            self.starting, self.indent = True, 0
            if self.statements:
                self._line_of_statement(blank)
            elif (
                not self.in_parens and self.head
            ):  # a header may take several lines, but no blank one
                if self.head.endswith("\n") or self.last == ":":  # the colon of a label
                    self.head = ""
                else:
                    self._add("\n")
            return
        if self.language.enclosed:
            self._enclose()
        if self.stack or self.last == "\\":
            self.last = self.last.strip("\\")
        else:
            self._line_of_block()

    def _enclose(self) -> None:
        """A line has ended; perhaps it opens or closes a text, which is followed like a bracket."""
        match = re.match(self.language.enclosed, self.head)
        if match and match[1]:
            self.stack.append(Bracket(match[1], "", self.indent))
        elif match:
            del self.stack[-1:]
        if self.stack:
            self.head = ""

    def _line_of_block(self) -> None:
        """By lines: a statement has ended."""
        head = self.head.strip()
        if (
            head and head.lower() != "r"
        ):  # not a comment or a docstring, which may have the prefix r
            self.fresh = (
                self.last == head[-1] and re.search(self.language.openers, head) is not None
            )
            self.blocks = self.enclosing(self.indent)
            self.blocks += [(self.indent, head)] * (self.fresh or not self.language.indented)
        self.starting, self.indent, self.head, self.last = True, 0, "", ""
