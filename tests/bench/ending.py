"""Where completions end, measured by an oracle: a "model" that writes the text that really stands
there.

    python tests/bench/ending.py [--seed 1] [--cases 300] [--languages python,go] [--show 3]
        [FOLDER ...]

Reads real files below the folders (default: the standard library, the installed packages and the
sources that `make test-slow` fetches) and prints one line of JSON per language, from --cases of
each kind. --show prints so many wrong cases of a language, --only those whose kind and model (as in
member_on) match a pattern. Needs pygments, which says what is a string or a comment; the ends of
definitions come from the indentation, not from the code under test. A definition of SQL is a
statement of several lines, up to its semicolon or, in a file without any, up to the file's end, and
`header` ends somewhere in it. The kinds of cases:

    header  the prompt ends at the header of a definition; the rest of the definition is missing
    member  the prompt ends at a comment or decorator above a definition; the definition is missing
    line    the prompt ends somewhere in a line or in its indentation; the rest of the line is
            missing
    lines   the same, and one to five more lines are missing; half of them are whole lines

The model ends by itself after the missing piece (`own`), runs on with the text that follows in the
file (`on`), or, in a gap, runs on with text from elsewhere (`astray`). Each figure is the
percentage of cases: `cut` lost some of the piece, `late` got more than the piece. `chars` is the
mean number of surplus characters of a late case. White space does not count, nor do comments and
closing brackets that come along.
"""

from __future__ import annotations

import json
import random
import re
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import servers
from pygments.token import Comment, String

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

from sources import SOURCES, Peer, files_of
from test_ending import run

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES

PATHS = sysconfig.get_paths()
FOLDERS = [PATHS["stdlib"], PATHS["purelib"], str(SOURCES)]
MIN_CHARS, MAX_CHARS = 500, 30_000  # of a file
CASES_PER_FILE = 4
GAPS = ("line", "lines")
PROMPT_CHARS, SUFFIX_CHARS, MORE_CHARS = 14_000, 4_000, 1_500
MAX_PIECE = 6_000
TOKEN = re.compile(r"\s?\w{1,6}|\s+|\W")
CLOSER = re.compile(
    r"(?:[\])}]|(?:end|fi|done|esac|until|endif|endforeach|endwhile|endfor|endswitch)\b|</)"
)
ONLY_CLOSERS = re.compile(r"^[ \t]*(?:[\])};,]|end\b|fi\b|done\b|</[\w-]+>)+[ \t]*$", re.M)
CLAUSE = re.compile(
    r"(?:else|elif|elsif|elseif|except|finally|catch|rescue|ensure|when|while|then|do)\b"
)
IGNORED = re.compile(r"#|\w+:\s*$|(?:case|default|public|private|protected)\b[^(]*:|\?>|@\w+$")
DEEP_ENDS = ("{", ":")  # the last character of a header
WORDS = (
    "ruby",
    "lua",
    "julia",
    "elixir",
    "haskell",
    "shell",
    "html",
    "yaml",
)  # whose headers end with anything
# SQL: a statement's first line and its last one, and the words around a body.
STATEMENT = re.compile(
    r"(?i)(?:alter|comment|create|declare|delete|do|drop|grant|insert|merge|select|update"
    r"|with)\b|\{\{"
)
OVER = re.compile(r"(?i)(?:;|\\g\w*(?:\s+\w+)?|\bend\s*(?://|\$\$))$")
BODY = re.compile(r"(?i)(?:^(?:as\s+)?begin\b(?!\s*;|\s+tran|.*;)|.\bbegin$|\bcase\b)")
BODY_END = re.compile(r"(?i)\bend\b(?!\s+(?:if|loop|while|repeat|case|for)\b)")
UNCLOSED = ("python", "haskell", "yaml")  # whose blocks end without a closing line
UNBRACED = re.compile(
    r"(?:=|:|=>|\b(?:do|else|match|then|try|with|yield))$"
)  # the end of such a block's header in Scala


class Line(NamedTuple):
    start: int
    text: str  # without indentation and line end
    indent: int
    code: bool  # does not start inside a string or comment, is neither blank nor a comment


class Case(NamedTuple):
    kind: str
    prompt: str
    piece: str
    after: str


class Source(Peer):
    """A file with what pygments says of it."""

    def __init__(self, language: str, text: str) -> None:
        super().__init__(language, text)
        self.language, self.syntax = language, LANGUAGES[language]
        self.comment, inside = bytearray(len(text)), bytearray(len(text))
        for start, stop, kind in self.tokens:
            if kind in Comment and not (kind in Comment.Preproc or kind in Comment.PreprocFile):
                self.comment[start:stop] = b"\1" * (stop - start)
            if kind in String or (
                kind in Comment and kind not in Comment.Single and kind not in Comment.Preproc
            ):
                inside[start:stop] = b"\1" * (stop - start)
        self.lines, place = list[Line](), 0
        for line in text.splitlines(keepends=True):
            body, indent = line.strip(), len(line) - len(line.lstrip())
            columns = len(line[:indent].expandtabs(8))
            code = (
                bool(body)
                and not (place and inside[place - 1])
                and not self.comment[place + indent]
            )
            self.lines.append(Line(place, body, columns, code))
            place += len(line)

    def depth_of(self, number: int) -> int:
        """How many bodies are open above a line of SQL."""
        above = "\n".join(line.text for line in self.lines[:number] if line.code)
        words = len(re.findall(r"(?i)\b(?:begin\b(?!\s*;|\s+tran)|case\b)", above)) - len(
            BODY_END.findall(above)
        )
        return words + len(re.findall(r"\$\w*\$", above)) % 2

    def end_of_statement(self, number: int) -> int | None:
        """`end_of` for SQL."""
        if ";" not in self.text:
            return max(place for place, line in enumerate(self.lines) if line.text)
        depth, tag, seen = 0, "", ""  # open blocks, the opening of the literal, the code
        for place, line in enumerate(self.lines[number:], number):
            code = re.sub(r"--.*|'[^'\n]*'|\"[^\"\n]*\"", "", line.text).strip()
            seen += code + "\n"
            for found in re.findall(r"\$\w*\$", code):
                tag = found if not tag else "" if found == tag else tag
            depth += 0 if tag else len(BODY.findall(code)) - len(BODY_END.findall(code))
            if OVER.search(code) and not tag and depth <= 0:
                whole = (
                    depth == 0
                    and seen.count("(") == seen.count(")")
                    and not re.search("['\"]", seen)
                )
                return place if whole and place > number else None
        return None

    def end_of(self, number: int) -> int | None:
        """The number of the last line of the definition that begins at a line; None if that is not
        clear.
        """
        if self.language == "sql":
            return self.end_of_statement(number)
        first, last, closed = self.lines[number], number, False
        for place, line in enumerate(self.lines[number + 1 :], number + 1):
            if not line.code or (IGNORED.match(line.text) and line.indent <= first.indent):
                continue
            if line.indent > first.indent and not closed:
                last = place
            elif line.indent == first.indent and (
                (CLOSER.match(line.text) and not closed)
                or (line.text == "{" and last == number)
                or (CLAUSE.match(line.text) and self.language != "go")
            ):
                last, closed = (
                    place,
                    CLOSER.match(line.text) is not None and not line.text.endswith(DEEP_ENDS),
                )
            else:
                break
        ends = (
            self.language in UNCLOSED
            or self._is_unbraced(first)
            or CLOSER.match(self.lines[last].text)
        )
        return last if ends and last > number else None

    def _is_unbraced(self, line: Line) -> bool:
        return self.language == "scala" and UNBRACED.search(line.text) is not None

    def is_header(self, number: int) -> bool:
        """Whether a line begins a definition or block that a completion at its end completes."""
        line = self.lines[number]
        if self.language == "sql":
            above = next((above.text for above in reversed(self.lines[:number]) if above.code), ";")
            begins = (
                line.code
                and line.indent == 0
                and STATEMENT.match(line.text)
                and self.depth_of(number) == 0
            )
            return bool(begins and OVER.search(above))
        below = self.lines[number + 1].text if number + 1 < len(self.lines) else ""
        opens = (
            line.text.endswith(DEEP_ENDS)
            or self.language in WORDS
            or below == "{"
            or self._is_unbraced(line)
        )
        if (
            not line.code
            or not opens
            or CLOSER.match(line.text)
            or CLAUSE.match(line.text)
            or IGNORED.match(line.text)
        ):
            return False
        level = line.indent
        for above in reversed(self.lines[:number]):
            if above.code and above.indent < level and not IGNORED.match(above.text):
                if above.text == "{":
                    continue
                if not self.syntax.containers.search(above.text):
                    return False
                level = above.indent
        return level == 0

    def definitions(self, kind: str, chance: random.Random) -> Iterator[Case]:
        numbers = list(range(self.language != "sql", len(self.lines) - 1))
        for number in chance.sample(numbers, len(numbers)):
            if not self.is_header(number) or (last := self.end_of(number)) is None:
                continue
            line, above, end = (
                self.lines[number],
                self.lines[number - 1],
                self.lines[last + 1 : last + 2],
            )
            place = (
                line.start if kind == "member" else line.start + len(self._line(number).rstrip())
            )
            stop = end[0].start if end else len(self.text)
            annotated = (
                above.indent == line.indent
                and (self.comment[above.start + len(self._line(number - 1)) - 2])
            )
            if kind == "member" and not (annotated or (above.code and above.text.startswith("@"))):
                continue
            if kind == "member" and not self.syntax.defines.match(self._line(number)):
                continue
            if kind == "header" and chance.random() < 0.5:
                place = self.lines[number + 1].start
                if self.language == "sql":
                    place = self.lines[chance.randint(number + 1, last)].start
            yield self._case(kind, place, stop)

    def gaps(self, kind: str, chance: random.Random) -> Iterator[Case]:
        for _ in range(4 * CASES_PER_FILE):
            number, count = (
                chance.randrange(len(self.lines)),
                1 if kind == "line" else chance.randint(2, 6),
            )
            last, line = number + count - 1, self.lines[number]
            if last + 1 >= len(self.lines) or not line.text or not self.lines[last].text:
                continue
            place = stop = line.start
            if kind == "lines" and chance.random() < 0.5:
                stop = self.lines[last + 1].start
            else:
                column = chance.choice((0, chance.randrange(len(line.text))))
                place += len(self._line(number)) - len(self._line(number).lstrip()) + column
                stop = self.lines[last + 1].start - 1
            yield self._case(kind, place, stop)

    def _line(self, number: int) -> str:
        start = self.lines[number].start
        return self.text[start : self.text.find("\n", start) + 1]

    def _case(self, kind: str, place: int, stop: int) -> Case:
        first = self.text.find("\n", place - PROMPT_CHARS) + 1 if place > PROMPT_CHARS else 0
        return Case(
            kind,
            self.text[first:place],
            self.text[place:stop],
            self.text[stop : stop + SUFFIX_CHARS],
        )


def weigh(text: str) -> int:
    return len("".join(text.split()))


def judge(source: Source, case: Case, sent: str) -> tuple[int, int]:
    """(characters lost, characters too many)."""
    lost, more = weigh(case.piece) - weigh(sent), sent[len(case.piece) :]
    if case.kind in GAPS:
        return max(lost, 0), max(-lost, 0)
    starts = (source.syntax.line_comment or "\0", "/*", "*", "#", "@")
    lines = ONLY_CLOSERS.sub("", more).split("\n")
    return max(lost, 0), weigh(
        "".join(line for line in lines if not line.lstrip().startswith(starts))
    )


def sources(folders: list[str], language: str, chance: random.Random) -> Iterator[Source]:
    found = files_of(folders, language, MIN_CHARS, MAX_CHARS)
    for path in chance.sample(found, len(found)):
        text = path.read_text("utf-8", "replace")
        if "\r" not in text and "\ufffd" not in text and max(map(len, text.split("\n"))) < 400:
            source = Source(language, text)
            if (
                source.sure or language == "sql"
            ):  # pygments does not know its $$, nor the braces of dbt
                yield source


def measure(
    language: str, folders: list[str], seed: int, cases: int, show: int, only: str
) -> dict[str, object]:
    chance, other = (
        random.Random(f"{seed} {language}"),
        "\n".join(f"other{n} = elsewhere({n})" for n in range(60)),
    )
    results: dict[str, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
    for source in sources(folders, language, chance):
        missing = [
            kind for kind in ("header", "member", *GAPS) if len(results[kind]["own"]) < cases
        ]
        if not missing:
            break
        for kind in missing:
            find = source.gaps if kind in GAPS else source.definitions
            for number, case in enumerate(find(kind, chance)):
                if number == CASES_PER_FILE:
                    break
                if not case.piece.strip() or len(case.piece) > MAX_PIECE:
                    continue
                texts = {"own": case.piece, "on": case.piece + case.after[:MORE_CHARS]}
                if kind in GAPS:
                    line = case.prompt.rpartition("\n")[2]
                    indent = " " * (len(line) - len(line.lstrip()))
                    texts["astray"] = (
                        case.piece.rstrip()
                        + "\n"
                        + "\n".join(indent + x for x in other.split("\n"))
                    )
                for model, text in texts.items():
                    mode, suffix = ("infill", case.after) if kind in GAPS else ("complete", None)
                    ending = Ending(mode, language, case.prompt, suffix, "auto")
                    sent, _ = run(ending, TOKEN.findall(text))
                    result = judge(source, case, sent)
                    results[kind][model].append(result)
                    if show and any(result) and re.search(only, f"{kind}_{model}"):
                        show -= 1
                        marked = f"{case.prompt[-300:]}«{case.piece}»{case.after[:200]}"
                        print(
                            f"--- {language} {kind} {model} {result}\n{marked}\n"
                            f"  sent: {sent[-200:]!r}\n"
                        )
        other = source.text[source.lines[len(source.lines) // 2].start :][:MORE_CHARS]
    summary: dict[str, object] = {"language": language}
    for kind, models in results.items():
        for model, pairs in ((model, pairs) for model, pairs in models.items() if pairs):
            late, cut = (
                [surplus for _, surplus in pairs if surplus],
                sum(lost > 0 for lost, _ in pairs),
            )
            share = {
                name: round(100 * count / len(pairs), 2)
                for name, count in (("cut", cut), ("late", len(late)))
            }
            chars = round(sum(late) / len(late)) if late else 0
            summary[f"{kind}_{model}"] = {"cases": len(pairs), **share, "chars": chars}
    return summary


def main() -> None:
    parser = servers.parser_of(
        __doc__, seed=1, cases=300, languages=",".join(LANGUAGES), show=0, only=""
    )
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    options = parser.parse_args()
    for language in options.languages.split(","):
        found = measure(
            language, options.folders, options.seed, options.cases, options.show, options.only
        )
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
