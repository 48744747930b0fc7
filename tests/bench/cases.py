"""Cases for ending.py, cut from real files: a text up to the cursor, what a model must write there,
and what follows.

pygments says what is a string or a comment; the ends of definitions come from the indentation, not
from the code under test.
"""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import servers
from pygments.token import Comment, String

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

from sources import Peer, files_of

from cerebrum.text.languages import LANGUAGES

assert servers  # it has set the path to the product
MIN_CHARS, MAX_CHARS = 500, 30_000  # of a file
CASES_PER_FILE = 4
GAPS = ("line", "lines", "closed")
PROMPT_CHARS, SUFFIX_CHARS = 14_000, 4_000
CLOSING = {"(": ")", "[": "]", "{": "}"}
MORE_CHARS = 1_500
MAX_PIECE = 6_000
CLOSER = re.compile(
    r"(?:[\])}]|(?:end|fi|done|esac|until|endif|endforeach|endwhile|endfor|endswitch)\b|</)"
)
ONLY_CLOSERS = re.compile(r"^[ \t]*(?:[\])};,]|end\b|fi\b|done\b|</[\w-]+>)+[ \t]*$", re.M)
CLAUSE = re.compile(
    r"(?:else|elif|elsif|elseif|except|finally|catch|rescue|ensure|when|while|then|do)\b"
)
IGNORED = re.compile(r"#|\w+:\s*$|(?:case|default|public|private|protected)\b[^(]*:|\?>|@\w+$")
# By lines or in SQL; the others have `Language.imports`.
IMPORT = re.compile(
    r"(?:import|from|using|use|require|include|load|alias|module|source|set|local\b.*\brequire)\b"
)
DEEP_ENDS = ("{", ":")  # the last character of a header
# Their headers end with anything.
WORDS = ("ruby", "lua", "julia", "elixir", "haskell", "shell", "html", "yaml")
UNCLOSED = ("python", "haskell", "yaml")  # whose blocks end without a closing line
DOCSTRING = re.compile(r'^ *[rR]?"{3}(?=[^"\n]*\n)([^"\\]+?)"{3} *$', re.M)
CALL = re.compile(r"\b(\w{2,40})\(")


class Line(NamedTuple):
    start: int
    text: str  # without indentation and line end
    indent: int
    code: bool  # does not start inside a string or comment, is neither blank nor a comment

    def is_plain(self) -> bool:
        """Whether it neither ends a block nor goes on with one."""
        return not any(pattern.match(self.text) for pattern in (CLOSER, CLAUSE, IGNORED))


class Case(NamedTuple):
    kind: str
    prompt: str
    piece: str
    after: str
    place: int = 0  # of the piece in its file


def is_remark(kind: Any) -> bool:
    return kind in Comment and kind not in Comment.Preproc and kind not in Comment.PreprocFile


def is_inside(kind: Any) -> bool:
    """Whether a line that begins in such a token is none of the code."""
    if kind in Comment.Single or kind in Comment.Preproc:
        return False
    return kind in String or kind in Comment


class Source(Peer):
    """A file with what pygments says of it."""

    def __init__(self, language: str, text: str):
        super().__init__(language, text)
        self.language, self.syntax = language, LANGUAGES[language]
        self.comment = self._marked(is_remark)
        inside = self._marked(is_inside)
        self.lines = list[Line]()
        place = 0
        for line in text.splitlines(keepends=True):
            indent = len(line) - len(line.lstrip())
            columns = len(line[:indent].expandtabs(8))
            begins_inside = place and inside[place - 1]
            code = line.strip() and not begins_inside and not self.comment[place + indent]
            self.lines.append(Line(place, line.strip(), columns, bool(code)))
            place += len(line)

    def _marked(self, wanted: Callable[[Any], bool]) -> bytearray:
        """1 for each character in a token of the kinds that are wanted."""
        marked = bytearray(len(self.text))
        for start, stop, kind in self.tokens:
            if wanted(kind):
                marked[start:stop] = b"\1" * (stop - start)
        return marked

    def end_of(self, number: int) -> int | None:
        """The number of the last line of the definition that begins at a line; None if that is not
        clear.
        """
        first, last = self.lines[number], number
        closed = False
        for place, line in enumerate(self.lines[number + 1 :], number + 1):
            if not line.code or (IGNORED.match(line.text) and line.indent <= first.indent):
                continue
            if line.indent > first.indent and not closed:
                last = place
                continue
            closes = CLOSER.match(line.text) is not None
            clause = CLAUSE.match(line.text) and self.language != "go"
            opens = line.text == "{" and last == number
            if line.indent != first.indent or not (opens or clause or (closes and not closed)):
                break
            last = place
            closed = closes and not line.text.endswith(DEEP_ENDS)
        ends = self.language in UNCLOSED or CLOSER.match(self.lines[last].text)
        return last if ends and last > number else None

    def is_header(self, number: int) -> bool:
        """Whether a line begins a definition or block that a completion at its end completes."""
        line = self.lines[number]
        below = self.lines[number + 1].text if number + 1 < len(self.lines) else ""
        opens = line.text.endswith(DEEP_ENDS) or self.language in WORDS
        if not line.code or not (opens or below == "{"):
            return False
        if not line.is_plain():
            return False
        level = line.indent
        for above in reversed(self.lines[:number]):
            outer = above.code and above.indent < level and above.text != "{"
            if not outer or IGNORED.match(above.text):
                continue
            if not self.syntax.containers.search(above.text):
                return False
            level = above.indent
        return level == 0

    def _is_announced(self, number: int) -> bool:
        """Whether a comment or a decorator is right above a definition."""
        line, above = self.lines[number], self.lines[number - 1]
        end = above.start + len(self._line(number - 1)) - 2
        comment = above.indent == line.indent and self.comment[end]
        announced = comment or (above.code and above.text.startswith("@"))
        return bool(announced and self.syntax.defines.match(self._line(number)))

    def definitions(self, chance: random.Random, kind: str = "header") -> Iterator[Case]:
        for number in self.shuffled(chance, first=1):
            if not self.is_header(number) or (last := self.end_of(number)) is None:
                continue
            if kind == "member" and not self._is_announced(number):
                continue
            place = self.lines[number].start
            if kind == "header":
                place += len(self._line(number).rstrip())
                if chance.random() < 0.5:
                    place = self.lines[number + 1].start
            yield self.case_up_to(kind, place, last)

    def gaps(self, chance: random.Random, kind: str) -> Iterator[Case]:
        for _ in range(4 * CASES_PER_FILE):
            number = chance.randrange(len(self.lines))
            last = number if kind == "line" else number + chance.randint(1, 5)
            line = self.lines[number]
            if last + 1 >= len(self.lines) or not line.text or not self.lines[last].text:
                continue
            place = stop = line.start
            if kind == "lines" and chance.random() < 0.5:
                stop = self.lines[last + 1].start
            else:
                whole = self._line(number)
                column = chance.choice((0, chance.randrange(len(line.text))))
                place += len(whole) - len(whole.lstrip()) + column
                stop = self.lines[last + 1].start - 1
            yield self.case_of(kind, place, stop)

    def closed(self, chance: random.Random) -> Iterator[Case]:
        """The pairs of brackets on several lines with a text right behind the first."""
        inside = self._marked(lambda kind: kind in String or is_remark(kind))
        stack, pairs = list[int](), list[tuple[int, int]]()
        for place, char in enumerate(self.text):
            if inside[place]:
                continue
            if char in CLOSING:
                stack.append(place)
            elif char in CLOSING.values():
                if not stack or CLOSING[self.text[stack[-1]]] != char:
                    return  # such as a bracket in a regex
                pairs.append((stack.pop() + 1, place))
        for place, stop in chance.sample(pairs, len(pairs)):
            first, *more = self.text[place:stop].split("\n")
            if first.strip() and more:
                yield self.case_of("closed", place, stop)

    def place_of(self, line: Line) -> int:
        """Where a line's text begins."""
        return self.text.index(line.text, line.start)

    def _line(self, number: int) -> str:
        start = self.lines[number].start
        return self.text[start : self.text.find("\n", start) + 1]

    def shuffled(self, chance: random.Random, first: int = 0, last: int = 1) -> list[int]:
        """The numbers of all lines but so many, in an order of chance."""
        numbers = range(first, len(self.lines) - last)
        return chance.sample(numbers, len(numbers))

    def case_up_to(self, kind: str, place: int, last: int) -> Case:
        """A case that ends with a line."""
        end = self.lines[last + 1 : last + 2]
        return self.case_of(kind, place, end[0].start if end else len(self.text))

    def case_of(self, kind: str, place: int, stop: int) -> Case:
        text = self.text
        first = text.find("\n", place - PROMPT_CHARS) + 1 if place > PROMPT_CHARS else 0
        after = text[stop : stop + SUFFIX_CHARS]
        return Case(kind, text[first:place], text[place:stop], after, place)


def sources(folders: list[str], language: str, chance: random.Random) -> Iterator[Source]:
    found = files_of(folders, language, MIN_CHARS, MAX_CHARS)
    for path in chance.sample(found, len(found)):
        text = path.read_text("utf-8-sig", "replace").replace("\r\n", "\n")
        if "\r" in text or "\ufffd" in text or max(map(len, text.split("\n"))) >= 400:
            continue
        source = Source(language, text)
        if source.sure:
            yield source


def spans(source: Source, chance: random.Random) -> Iterator[Case]:
    """Gaps from within a line to within one of the next three."""
    for number in source.shuffled(chance, last=3):
        first, last = source.lines[number], source.lines[number + chance.randrange(3)]
        ends = [at for at in range(1, len(last.text)) if not last.text[at - 1].isalnum()]
        if not first.code or not last.code or not ends:
            continue
        start = source.place_of(first) + chance.randrange(len(first.text))
        stop = source.place_of(last) + chance.choice(ends)
        if start + 4 < stop:
            yield source.case_of("lines", start, stop)


def statements(source: Source, chance: random.Random) -> Iterator[Case]:
    """From within the first lines of statements at the margin that take several."""
    for number in source.shuffled(chance):
        line, below = source.lines[number : number + 2]
        if not line.code or line.indent or source.is_header(number) or below.indent == 0:
            continue
        if not line.is_plain():
            continue
        last = source.end_of(number)
        if last is not None:
            start = line.start + chance.randrange(1, len(line.text) + 1)
            yield source.case_up_to("header", start, last)


def helpers(source: Source, chance: random.Random) -> Iterator[Case]:
    """Functions that call the one right below them, which is not defined above."""
    for number in source.shuffled(chance):
        if not source.is_header(number) or (last := source.end_of(number)) is None:
            continue
        numbers = range(last + 1, len(source.lines) - 1)
        below = next((at for at in numbers if source.lines[at].code), None)
        if below is None or not source.is_header(below):
            continue
        end = source.end_of(below)
        name = CALL.search(source.lines[below].text)
        if end is None or not name or source.lines[below].indent:
            continue
        place = source.lines[number + 1].start
        first = source.text[place : source.lines[last + 1].start]
        if name[1] in CALL.findall(first) and f"{name[1]}(" not in source.text[:place]:
            yield source.case_up_to("header", place, end)


def margins(source: Source, chance: random.Random, below: bool = False) -> Iterator[Case]:
    """From within the first line of paragraphs without blocks, or of statements of one line; or
    from right below a comment.
    """
    lines = source.lines
    by_lines = source.syntax.blocks not in ("braces", "brackets")
    imports = IMPORT if by_lines else source.syntax.imports
    for number in source.shuffled(chance, first=1):
        line, above = lines[number], lines[number - 1]
        if not line.code or line.indent or source.is_header(number) or not line.is_plain():
            continue
        if below != (source.comment[above.start : above.start + 1] == b"\1"):
            continue
        ends = range(number + 1, len(lines))
        end = next((at for at in ends if not by_lines or not lines[at].text), len(lines) - 1)
        inside = range(number + 1, end + 1)
        if any(lines[at].text and (lines[at].indent or not lines[at].code) for at in inside):
            continue
        if not imports.match(line.text) and not CLOSER.match(lines[end].text):
            start = line.start + (0 if below else chance.randrange(1, len(line.text) + 1))
            yield source.case_of("header", start, lines[end].start)


def nexts(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions at the margin below a blank line, from the beginning of theirs."""
    for number in source.shuffled(chance, first=1):
        line, above = source.lines[number], source.lines[number - 1]
        if above.text or line.indent or not source.is_header(number):
            continue
        if (last := source.end_of(number)) is not None:
            yield source.case_up_to("header", line.start, last)


def docstrings(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions with a prompt that begins within a docstring."""
    for case in source.definitions(chance) if source.language == "python" else ():
        found = list(DOCSTRING.finditer(case.prompt))
        if found:
            docstring = chance.choice(found)
            yield case._replace(prompt=case.prompt[chance.randrange(*docstring.span(1)) + 1 :])


def remarks(source: Source, chance: random.Random) -> Iterator[Case]:
    """Definitions within which a comment that is not indented follows a blank line."""
    for number, line in enumerate(source.lines[:-1]):
        last = source.end_of(number) if source.is_header(number) else None
        within = itertools.pairwise(source.lines[number + 1 : (last or number) + 1])
        starts = source.syntax.comment_starts
        if starts and any(
            not above.text and below.text.startswith(starts) and below.indent <= line.indent
            for above, below in within
        ):
            yield source.case_up_to("header", source.lines[number + 1].start, last)


def scripts(source: Source, _: random.Random) -> Iterator[Case]:
    if source.text.startswith("#!"):
        end = source.text.rfind("\n", 0, MAX_PIECE) + 1
        yield source.case_of("header", source.text.index("\n") + 1, end)


# What each is, stands in ending.py.
KINDS = {
    "header": Source.definitions,
    "member": partial(Source.definitions, kind="member"),
    "line": partial(Source.gaps, kind="line"),
    "lines": partial(Source.gaps, kind="lines"),
    "closed": Source.closed,
    "span": spans,
    "statement": statements,
    "helper": helpers,
    "margin": margins,
    "below": partial(margins, below=True),
    "next": nexts,
    "docstring": docstrings,
    "remark": remarks,
    "script": scripts,
}


def cases_of(source: Source, kind: str, chance: random.Random) -> Iterator[Case]:
    """Up to CASES_PER_FILE cases of a file."""
    for case in itertools.islice(KINDS[kind](source, chance), CASES_PER_FILE):
        if case.piece.strip() and len(case.piece) <= MAX_PIECE:
            yield case
