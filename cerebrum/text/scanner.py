"""Follows source code one character at a time: strings, comments, brackets and blocks, in 23 languages.

A `Scanner` tracks the end of the text fed so far: inside a literal or a comment, at which depth of brackets, in which
block. All it knows of a language is the language's row in languages.py. No text is refused, however odd, and the cost
of a text is at most its length times a constant. Pure; standard library only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from cerebrum.text.languages import Language

# ------------------------------------------------------------------------------------------------------- following code

WORD_CHARS = 8  # enough for the longest word in QUOTE_AFTER, RAW_BEFORE and REGEX_BEFORE and the character before it
HEAD_CHARS = 1000  # kept of a statement; a longer one keeps the first half of these and its newest characters
STRAY_BRACKETS = 20  # unclosed brackets of other kinds that a closing bracket may skip; a correct program has none
TAIL_CHARS = 18  # the longest end of a literal: C++'s )name" with 16 characters in its name
TRIPLE_QUOTES = ('"""', "'''")
PAIRS = {")": "(", "]": "[", "}": "{"}
COMPOUND = re.compile(r"(?:async\s+)?(?:def|class|if|elif|else|for|while|with|try|except|finally|match|case)\b")
# The code before a quote that opens a string right after a letter, before a C++ raw string, and before a regex.
QUOTE_AFTER = re.compile(r"(?<!\w)(?:and|br?|case|else|fr?|i[fns]|l|not|or|r[bf]?|return|u8?)$", re.IGNORECASE)
RAW_BEFORE = re.compile(r"(?<!\w)(?:u8|[uUL])?R$")
REGEX_BEFORE = re.compile(
    r"(?:^|[(,=:\[!&|?{};+\-*%~^]|\b(?:return|typeof|case|in|of|do|else|void|delete|when|and|or|not|if|then))$"
)
QUOTES = ("'", '"')
RAW_CHARS = 1000  # kept of a line
KEYWORD_CHARS = 80  # searched before a word to decide whether it is a keyword
DOLLARS = re.compile(r"\$\w*\$$")
# Swift, Kotlin: the parameters after a closure's brace.
PARAMETERS = re.compile(r"[ \t]*[\w(][\w \t(),:<>?.\[\]]{0,200}(?:\bin|->)[ \t]*\n?$")
# SQL: the header of a procedure's declarations, and the statements that may follow it in place of declarations.
DECLARES = re.compile(r"\b(?:is|as)$")
QUERIES = ("select", "insert", "update", "delete", "with", "set", "merge")
# PHP: `if (...):` up to `endif;`.
ALTERNATIVE = re.compile(r"^(?:<\?)?(?:php\s)?\s*(?:if|for|foreach|while|switch)\b[^{}]*\)\s*$", re.M)
ALTERNATIVE_ENDS = frozenset(("endif", "endfor", "endforeach", "endwhile", "endswitch"))
# Ruby: %w[a b], %(a).
PERCENT = re.compile(r"(?:^|[\s(\[{,=:|&!;])%([qQwWiIrsx]?)[(\[{<|!/]$")
PERCENT_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">", "|": "|", "!": "!", "/": "/"}
# YAML: the code before a value in its line; a key with a tag or an anchor, whose value follows below; an item.
VALUE = re.compile(r"(?:-[ \t]+)*(?:[^:]*:[ \t]+)?(?:[&!]\S*[ \t]+)*")
TAGGED = re.compile(r":(?:[ \t]+[&!]\S+)+$")
ITEM = re.compile(r"-(?:\s|$)")
TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]{0,80})")
VOID_ELEMENTS = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "param", "source", "track", "wbr")
)
RAW_ELEMENTS = frozenset(("script", "style", "textarea"))
# A one-line definition in Ruby: `def f(x) = x + 1`.
ONE_LINE = re.compile(r"[ \t]*[\w.]+[?!]?[ \t]*(?:\([^()\n]*\))?[ \t]*=[ \t]")
SCALAR = re.compile(r"((?:-[ \t]+)*)(?:.*[:\-]|)[ \t]*(?:[!&][^\s]*[ \t]+)?[|>][+-]?[0-9]?[+-]?$")


class Bracket(NamedTuple):
    """An open bracket, or a block that a keyword or a tag has opened."""

    kind: str  # the bracket; "{" for all blocks
    header: str  # of a block: the statement before it; of an element: its name
    indent: int  # of its line
    literal: tuple[str, str] | None = None  # (opener, closer) of the string that continues after the bracket


def after_blank(column: int, blank: str) -> int:
    """The column after a space or a tab."""
    return column + 1 if blank == " " else column + 8 - column % 8


class Scanner:
    """Follows source code one character at a time: its strings, comments, brackets and statements."""

    def __init__(self, language: Language, text: str = "") -> None:
        self.language = language
        self.comments = [(language.line_comment, "\n")] if language.line_comment else []
        self.comments += [*filter(None, [language.block_comment]), *language.other_comments]
        self.comments += [("#", "\n")] * language.directives
        literals = [*language.strings, *((mark, mark) for mark in language.ambiguous)]
        self.openers = sorted(self.comments + literals, key=lambda pair: -len(pair[0]))
        self.opener_ends = {opener[-1] for opener, _ in self.openers}
        self.brackets = {*language.brackets, *(closing for closing, one in PAIRS.items() if one in language.brackets)}
        self.indented = language.indented
        # Whether code and literals may contain constructs that few languages have: other languages skip these checks.
        self.rare_code = bool(language.words or language.heredoc or language.doubled) or language.blocks == "tags"
        rare = language.plain_scalars or language.nested_comments or not language.strings
        self.rare_literals = self.rare_code or rare
        self.pair = ("", "")  # the brackets of a Ruby percent literal
        self.opener = self.closer = ""  # of the literal or comment that the text is in; "" in code
        self.since = 0  # characters since it opened
        self.escaped = self.in_class = False  # after a backslash in the literal; in a [] of a regex
        self.tail = ""  # the last characters of the text
        self.head, self.last = "", ""  # the code of the statement so far, and its last character
        self.previous = ""  # the character of code before `last`
        self.escaped_at = 0  # `since` of the last escaped character
        self.nested = 0  # open comments or brackets of the literal's own kind inside it
        self.closed = ""  # opener of the string that the last character closed, if the next one may reopen it
        self.stack: list[Bracket] = []  # open brackets; a block that a keyword or a tag opened counts as {
        self.unmatched = 0  # closing brackets whose partner is not in the text
        self.unmatched_blocks = 0  # number of the unmatched brackets that close a block
        self.word = ""  # the keyword or name at the end of the code
        self.in_loop = False  # in the header of a loop, which a `do` may end
        self.resumable: Bracket | None = None  # the block that the last word has closed
        self.opening = self.opened_here = False  # this or the last line of code opened a block, still open
        self.raw_line = ""  # the line so far, if it may announce a text below it
        self.marks: list[int] = []  # positions after each << in `raw_line`
        self.terminators: list[str] = []  # the lines that end the texts below this line
        self.text_line = ""  # the current line of such a text
        self.info = ""  # the text after a fence
        self.scalar: int | None = None  # YAML: the column of a text's key; `indent` is the column of the line
        self.blocks: list[tuple[int, str]] = []  # Python: open after the last whole statement: (indentation, header)
        self.fresh = False  # the innermost of them has no body yet, though perhaps a docstring
        self.starting = True  # only white space since a line (in Python, a statement) began
        self.indent = 0  # columns of that white space
        self.margin: int | None = None  # the least indentation of any statement
        for char in text:
            self.step(char)

    @property
    def in_comment(self) -> bool:
        return (self.opener, self.closer) in self.comments

    @property
    def in_parens(self) -> bool:
        return bool(self.stack) and self.stack[-1][0] in "(["

    @property
    def is_over(self) -> bool:
        """Whether the statement has ended with its line, in a language without semicolons."""
        return self.language.line_ends and self.starting and self.last not in tuple(",=(&|+?.:<*/-")

    @property
    def opened(self) -> int | None:
        """The indentation of the header just before this point, if it opened a block that has no body yet."""
        if self.language.words and self.stack and self.last != "{":
            return self.stack[-1].indent if (self.opening if self.head.strip() else self.opened_here) else None
        if not self.language.indented:
            openings = ("{", "[") if self.language.blocks == "brackets" else ("{",)
            opened = self.stack and (
                self.last in openings or (self.stack[-1].kind == "{" and PARAMETERS.match(self.head))
            )
            return self.stack[-1].indent if opened else None
        if self.head.strip():
            return self.indent if self.last == ":" and not self.stack and COMPOUND.match(self.head.strip()) else None
        return self.blocks[-1][0] if self.fresh else None

    def level(self, line: str) -> int:
        """The indentation of a line that starts with `line`. A YAML item is in its key even at equal indentation."""
        return self.indent + (self.language.plain_scalars and ITEM.match(line) is not None)

    def enclosing(self, indent: int) -> list[tuple[int, str]]:
        """The open blocks around a statement at this indentation."""
        return [block for block in self.blocks if block[0] < indent]

    def step(self, char: str) -> None:
        self.tail = self.tail[1 - TAIL_CHARS :] + char
        self.since += 1
        if self.rare_code and self._goes_on(char):
            return
        if char in self.opener_ends and (pair := self._opening()):
            if not self.closer and pair in self.comments:
                self._take_back(pair[0][:-1])
            self._enter(*pair)
        elif self.closer:
            self._in_literal(char)
        else:
            self._in_code(char)

    def _enter(self, opener: str, closer: str) -> None:
        """Enter a literal or a comment after the last character."""
        self.opener, self.closer, self.since, self.escaped_at, self.nested = opener, closer, 0, 0, 0
        self.escaped = self.in_class = self.starting = False

    def _goes_on(self, char: str) -> bool:
        """Whether a character continues a string that seemed to be closed. A word that it ends is handled first."""
        if self.language.heredoc:
            self.raw_line = "" if char == "\n" and not self.marks else (self.raw_line + char)[-RAW_CHARS:]
        if self.word and not (char.isalnum() or char == "_"):
            self._word_ended(char)
        closed, self.closed = self.closed, ""
        goes_on = char.isalnum() if self.language.dollars else char == self.tail[-2:-1]
        if not closed or not goes_on:
            return False
        self.opener, self.closer, self.since = closed, self.tail[-2], len(closed)
        return True

    def _take_back(self, begun: str) -> None:
        """Remove from the code its last characters, which were the beginning of a comment."""
        if begun and self.head.endswith(begun):
            self.head, self.last, self.word = self.head[: -len(begun)], self.previous, ""

    def _opening(self) -> tuple[str, str] | None:
        """(opener, closer) completed by the last character, in code or by extending a shorter opener (" to \"\"\")."""
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
        """Whether an opener in code opens a literal or comment, and is not an operator or part of a word."""
        language, before = self.language, self.tail[: -len(opener)][-1:]
        if language.blocks == "tags" and opener in QUOTES:
            return self.head.startswith("<")
        if opener == "#" and language.directives:
            return self.starting
        if opener == "#" and language.comment_after:
            return self.starting or (before in language.comment_after and before != "")
        if language.plain_scalars and opener in QUOTES:
            return self.begins_value
        if opener in QUOTES and language.tight_quotes:
            in_expansion = bool(self.stack) and self.stack[-1].kind == "${" and self.stack[-1].literal is not None
            return before != "\\" and not (opener == "'" and in_expansion)  # "${x:-it's}"
        if opener in QUOTES and language.loose and before in ("?", "$"):
            return self.tail[-3:-2].isalnum()  # Ruby's ?' is a character, $' a variable
        if opener == "'" and (before.isalnum() or before == "_"):
            # An apostrophe in JSX or a digit separator in C++, unless a prefix or a keyword precedes it.
            return QUOTE_AFTER.search(self.head[-WORD_CHARS:]) is not None
        if opener == 'R"':
            return RAW_BEFORE.search(self.head[-WORD_CHARS:]) is not None
        if opener == "/":
            regex = REGEX_BEFORE.search(self.head.rstrip()[-WORD_CHARS:]) is not None
            return self.last != '"' and (regex or (language.loose and before in (" ", "\t")))
        return opener != "=begin" or before in ("", "\n")

    @property
    def begins_value(self) -> bool:
        """YAML: whether a quote or a bracket here begins a value."""
        if self.stack:
            return self.head.rstrip()[-1:] in ("[", "{", ",", ":")
        return VALUE.fullmatch(self.head) is not None

    def _hole(self) -> str:
        """The mark that starts code inside this string, if the last character completes the mark; else ""."""
        for start in self.language.holes[self.opener]:
            behind_escape = self.escaped and start[0] != "\\"
            if self.tail.endswith(start) and not behind_escape and self.since - self.escaped_at >= len(start):
                return start
        return ""

    def _in_literal(self, char: str) -> None:
        if self.rare_literals and self._in_rare_literal(char):
            return
        if self.since == 2 and self.opener == "'" in self.language.ambiguous and char != "'" and self.tail[-2] != "\\":
            self.closer = ""  # a lifetime
            self._in_code(char)
            return
        comment = self.in_comment
        if self.opener in self.language.holes and (start := self._hole()):
            kind = "$(" if "(" in start else "${"  # not {, which is a block
            self.stack.append(Bracket(kind, "", self.indent, (self.opener, self.closer)))
            self.closer, self.escaped = "", False
        elif self.escaped:
            self.escaped, self.escaped_at = False, self.since
        elif char == "\\" and self.opener not in self.language.raw and (not comment or self.language.directives):
            self.escaped = True
        elif self.opener == "/" and char in "[]":
            self.in_class = char == "["
        elif self.opener == 'R"' and char == "(" and self.closer == '"':
            self.closer = f'){self.tail[-self.since : -1]}"'  # R"name( ends with )name"
        elif (self.rare_literals or char == self.closer[-1]) and self._is_closed():
            doubled = self.opener in self.language.doubled or (self.language.dollars and self.tail[-2:-1] == "\\")
            self.closed = self.opener if doubled else ""
            if self.since > len(self.closer):  # one more quote makes a triple quote only after an empty string
                self.tail = self.tail[-2:] if self.closed else ""
            if not comment:
                self.last = '"'
                self.head += '"' * (self.language.words is not None)
            tag, self.closer = self.closer, ""
            if tag.startswith("</"):
                self.head = tag
            if char == "\n":
                self._in_code(char)
        elif char == "\n" and not comment and self.opener not in {*self.language.multiline, *RAW_ELEMENTS, "$", "%"}:
            if not self.tail.endswith("\\z\n"):  # a Lua string continues after \z
                self.closer = ""  # an unclosed string ends with its line
                self._in_code(char)
        elif comment and self.closer == "\n" and self.language.alternative and self.tail.endswith("?>"):
            self._enter("?>", "<?")

    def _in_rare_literal(self, char: str) -> bool:
        """Read a character of a literal that few languages have. True if the character needs no other handling."""
        if self.opener == "<<":
            self._in_text_below(char)
        elif self.opener == "|":
            self._in_scalar(char)
        elif self.since == 1 and (self.tail[-2:] == self.language.no_comment or self._is_division(char)):
            self.closer = ""
            self._in_code(char)
        elif char == '"' and self.since == len(self.closer) - 2 and self.opener == '"""' and self.language.doubled:
            self.closer += char  # C#: the string ends with as many quotes as opened it
        else:
            return not self.escaped and self._nests(char)
        return True

    def _is_closed(self) -> bool:
        tail = self.tail.lower() if self.opener in RAW_ELEMENTS else self.tail
        return (
            tail.endswith(self.closer)
            and self.since >= len(self.closer)
            and self.since - self.escaped_at >= len(self.closer)
            and not self.in_class
        )

    def _nests(self, char: str) -> bool:
        """Whether the last character opens or closes a comment or bracket nested in a literal of the same kind."""
        if self.opener == "%":
            if char == self.pair[0] != self.pair[1]:
                self.nested += 1
                return True
        elif not (self.language.nested_comments and self.opener == "/*"):
            return False
        elif self.tail.endswith("/*") and self.since >= 2:
            self.nested, self.tail = self.nested + 1, ""
            return True
        if self.nested and self._is_closed():
            self.nested, self.tail = self.nested - 1, ""
            return True
        return False

    def _is_division(self, char: str) -> bool:
        """Ruby: whether a slash after a name and a space is a division after all, not a regex."""
        return self.opener == "/" and self.language.loose and char in " \t=" and self.last.isalnum()

    def _in_text_below(self, char: str) -> None:
        """Read a character of a text that a line with the closer ends: below <<NAME, or between Markdown's fences."""
        if char != "\n":
            self.text_line = (self.text_line + char)[:RAW_CHARS]
            return
        line, self.text_line = self.text_line.strip(), ""
        rest = line[len(self.closer) :]
        more = not re.match(r"\w", rest) if self.language.alternative else not rest.strip(self.closer[0])
        if line.startswith(self.closer) and more and (not rest or not self.language.words):
            self.closer = ""
            if self.terminators:
                self.closer = self.terminators.pop(0)
                return
            self.starting, self.indent, self.last = True, 0, '"'
            for behind in f"{rest}\n" if self.language.alternative else "\n":
                self._in_code(behind)

    def _in_scalar(self, char: str) -> None:
        """Read a character of YAML's text below | or >, which ends before a line that is not deeper than its key."""
        assert self.scalar is not None
        if char == "\n":
            self.starting, self.indent = True, 0
        elif self.starting and char in " \t":
            self.indent = after_blank(self.indent, char)
        elif self.starting:
            self.starting = self.indent <= self.scalar
            if self.starting:
                self.scalar, self.closer = None, ""
                if char in self.opener_ends and (pair := self._opening()):
                    self._enter(*pair)
                else:
                    self._in_code(char)

    def _in_code(self, char: str) -> None:
        if char == "\n":
            self._newline()
            return
        if self.starting and char in " \t":
            self.indent = after_blank(self.indent, char)
            return
        self.starting = False
        if self.rare_code and self._in_rare_code(char):
            return
        if char in self.brackets:
            self._bracket(char)
        elif char == ";" and not self.indented and not self.in_parens:
            self._semicolon()
        else:
            self._add(char)
        if char not in " \t\r":
            self.previous, self.last = self.last, char

    def _bracket(self, char: str) -> None:
        in_words = self.language.words is not None
        if char in PAIRS:
            if not (self.language.tight_quotes and self.tail[-2:-1] == "\\"):
                self._close(char)
        elif char == "{" and not (self.indented or (in_words and self.tail[-2:-1] in ("$", "\\"))):
            self.stack.append(Bracket(char, self.head, self.indent))
            self.head, self.opening = "", True
        else:
            escaped = self.language.tight_quotes and self.tail[-2:-1] == "\\"
            if not escaped and (not self.language.plain_scalars or self.stack or self.begins_value):
                self.stack.append(Bracket("${" if char == "{" and in_words else char, "", self.indent))
            self._add(char)

    def _in_rare_code(self, char: str) -> bool:
        """Read a character of code that few languages have: tags, keywords of blocks, <<NAME, $NAME$. True if the
        character needs no other handling."""
        language = self.language
        if language.blocks == "tags":
            self._in_markup(char)
            return True
        if language.words and (char.isalnum() or char == "_"):
            self.word += char
        elif char == "<" == self.tail[-2:-1] and language.heredoc and self._may_announce_text():
            self.marks.append(len(self.raw_line))
        elif language.loose and char in PERCENT_PAIRS and (match := PERCENT.search(self.tail)):
            if match[1] or self.last in tuple("=(,[{|&!;:?<>%"):
                self._enter("%", PERCENT_PAIRS[char])
                self.pair = (char, self.closer)
                return True
        elif language.alternative and char == ":" and ALTERNATIVE.search(self.head):
            self.stack.append(Bracket("{", self.head, self.indent))
            self.head, self.last = "", "{"
            return True
        elif char == "$" and language.dollars and (match := DOLLARS.search(self.tail)):
            if self.stack and DECLARES.search(self.stack[-1].header.lower()) and re.fullmatch(r"\s*\$\w*", self.head):
                self._drop_block()  # the body is a string
            self._enter("$", match[0])
            return True
        return False

    def _may_announce_text(self) -> bool:
        """Whether << in code may announce a text on the next lines, and is not a bit shift."""
        kinds = "".join(bracket.kind for bracket in self.stack[-8:]).rpartition("{")[2]
        before = self.tail[-3:-2]
        shift = self.language.loose and (before.isalnum() or before in (")", "]", "_"))
        return "((" not in kinds and not kinds.endswith("[") and not shift

    def _semicolon(self) -> None:
        statement, block = self.head.strip().lower(), self.stack[-1].header.lower() if self.stack else ""
        if self.language.alternative and statement in ALTERNATIVE_ENDS:
            self._close("}")
        elif self.language.blocks == "statements":
            transaction = block.endswith("begin") and not statement
            if transaction or (DECLARES.search(block) and statement.startswith(QUERIES)):  # no block follows
                self._drop_block()
        self.head = ""

    def _drop_block(self) -> None:
        """Drop the innermost block: it only seemed to open."""
        self.stack.pop()
        self.opening = False

    def _in_markup(self, char: str) -> None:
        """HTML: only tags count."""
        if char == "<":
            self.head = char
        elif self.head:
            self._add(char)
            if len(self.head) == 2 and not (char.isalpha() or char in "/!?"):
                self.head = ""  # a less-than sign
            elif char == ">":
                self._tag(self.head)
                return
        self.last = self.last if char.isspace() else char

    def _tag(self, tag: str) -> None:
        self.head, self.last = "", ">"
        match = TAG.match(tag)
        if not match or tag.endswith("/>"):
            return
        name = match[2].lower()
        if match[1]:
            depths = range(len(self.stack) - 1, max(-1, len(self.stack) - 1 - STRAY_BRACKETS), -1)
            depth = next((depth for depth in depths if self.stack[depth].header == name), None)
            if depth is None:
                self.unmatched, self.unmatched_blocks = self.unmatched + 1, self.unmatched_blocks + 1
            else:
                del self.stack[depth:]
        elif name not in VOID_ELEMENTS:
            self.stack.append(Bracket("{", name, self.indent))
            self.last = "{"
            if name in RAW_ELEMENTS:
                self._enter(name, f"</{name}")

    def _word_ended(self, following: str) -> None:
        """Read a word of code that has ended before `following`: the word may open or close a block."""
        words, word, self.word = self.language.words, self.word, ""
        assert words is not None
        word, resumable = word.lower() if words.any_case else word, self.resumable
        before, self.resumable = self.head[: -len(word)], None
        if following in words.not_before or not self.head:
            return
        near = max(0, len(before) - KEYWORD_CHARS)
        if word in words.closes and words.closes[word].search(before, near):
            depth = self._opener_of("}")
            if depth is None:
                self.unmatched, self.unmatched_blocks = self.unmatched + 1, self.unmatched_blocks + 1
            else:
                self.resumable = self.stack[depth]
                del self.stack[depth:]
            self.last, self.opening = "}", False
        elif resumable and word in words.resumed:
            self.stack.append(resumable)
        elif word in words.no_block and not before.strip() and self.stack:
            self._drop_block()
        elif word == "do" and self.in_loop:
            self.in_loop = False
        elif word in words.opens and words.opens[word].search(before, 0 if word in words.wide else near):
            if word == "begin" and self.stack and DECLARES.search(self.stack[-1].header.lower()):
                self.stack.pop()  # the declarations end, and the same END closes both
            self.stack.append(Bracket("{", self.head, self.indent))
            self.head, self.last, self.in_loop, self.opening = "", "{", word in words.loops, True

    def _add(self, code: str) -> None:
        self.head = (self.head if len(self.head) < HEAD_CHARS else self.head[: HEAD_CHARS // 2]) + code

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
            self.unmatched_blocks += char == "}" and not self.language.indented
            return
        kind, header, _, literal = self.stack[depth]
        del self.stack[depth:]
        self.opening = self.opening and char != "}"
        if literal:
            self.opener, self.closer = literal
            self.since, self.escaped_at = 9, 0
        elif char != "}" or self.language.indented or kind == "${":
            self._add(char)
        elif self.in_parens:
            self.head = header
            self._add("{}")
        else:
            self.head = ""

    def _newline(self) -> None:
        language = self.language
        if language.words:
            self._line_of_words()
        elif language.blocks == "lines":
            if fence := FENCE.match(self.head.strip()) if not language.strings else None:
                self._enter("<<", fence[1])
                self.info = fence[2].strip()
            self.starting, self.indent = True, 0
            if self.last != "\\" or not language.heredoc:
                self.head, self.last = "", ""
        elif not language.indented:
            self.starting, self.indent = True, 0
            if not self.in_parens and self.head:  # a header may take several lines, but no blank one
                if self.head.endswith("\n") or self.last == ":":  # the colon of a label
                    self.head = ""
                else:
                    self._add("\n")
        elif self.stack or self.last == "\\":
            self.last = self.last.strip("\\")
        else:
            self._line_of_block()
        if self.marks:
            found = (self.language.heredoc.match(self.raw_line, place) for place in self.marks if self.language.heredoc)
            self.terminators = [match[2] for match in found if match]
            self.marks, self.raw_line = [], ""
            if self.terminators:
                self._enter("<<", self.terminators.pop(0))

    def _line_of_words(self) -> None:
        """A line has ended, and its statement too, unless the line shows that the statement continues."""
        if self.opening and self.stack[-1].header.endswith("def") and ONE_LINE.match(self.head):
            self._drop_block()
        if self.head.strip() or self.opening or self.last == "}":
            self.opened_here = self.opening
        self.starting, self.indent, self.in_loop, self.opening = True, 0, False, False
        ends_block_parameters = self.last == "|" != self.previous and self.language.loose
        continues = self.in_parens or (self.last in tuple(",\\|&(+-=") and not ends_block_parameters)
        self.head = f"{self.head}\n" if continues and len(self.head) < HEAD_CHARS else ""

    def _line_of_block(self) -> None:
        """Python and YAML: a statement has ended."""
        head = self.head.strip()
        if head and head.lower() != "r":  # not a comment or a docstring, which may have the prefix r
            level = self.level(head)
            header = self.last == ":" or (self.language.plain_scalars and TAGGED.search(head) is not None)
            self.blocks, self.fresh = self.enclosing(level), header
            self.blocks += [(level, head)] * self.fresh
            self.margin = min(self.indent, self.indent if self.margin is None else self.margin)
            if self.language.plain_scalars and (match := SCALAR.match(head)):
                self._enter("|", "|")
                self.scalar = self.indent + len(match[1])
        self.starting, self.indent, self.head, self.last = True, 0, "", ""


FENCE = re.compile(r"(`{3,}|~{3,})([^`\n]*)")
