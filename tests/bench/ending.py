"""Where completions end, measured by an oracle: a "model" that writes the text that really stands
there.

    python tests/bench/ending.py [--seed 1] [--cases 300] [--languages python,go] [--kinds line]
        [--window 1200] [--show 3] [--recorded FILE.jsonl] [FOLDER ...]

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
    closed  the cursor is between two brackets, the second of which the editor has added; what
            stands between them on several lines is missing, such as a callback

--window cuts the prompt to so many characters before the cursor and the suffix to a third of it, so
that it begins anywhere in the file.

--recorded gives each token a probability, drawn from those of the right tokens in a file of
hints.py; without it they are unknown.

The model ends by itself after the missing piece (`own`), runs on with the text that follows in the
file (`on`), or, in a gap, runs on with text from elsewhere (`astray`). Each figure is the
percentage of cases: `cut` lost some of the piece, `late` got more than the piece. `chars` is the
mean number of surplus characters of a late case. White space does not count, nor do comments and
closing brackets that come along.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import servers
from pygments.token import Comment, String

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))

from sources import SOURCES, Peer, files_of

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES

PATHS = sysconfig.get_paths()
FOLDERS = [PATHS["stdlib"], PATHS["purelib"], str(SOURCES)]
MIN_CHARS, MAX_CHARS = 500, 30_000  # of a file
CASES_PER_FILE = 4
GAPS = ("line", "lines", "closed")
KINDS = ("header", "member", *GAPS)
PROMPT_CHARS, SUFFIX_CHARS = 14_000, 4_000
CLOSING = {"(": ")", "[": "]", "{": "}"}
MORE_CHARS = 1_500
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
# Their headers end with anything.
WORDS = ("ruby", "lua", "julia", "elixir", "haskell", "shell", "html", "yaml")
# SQL: a statement's first line and its last one, and the words around a body.
STATEMENT = re.compile(
    r"(?i)(?:alter|comment|create|declare|delete|do|drop|grant|insert|merge|select|update"
    r"|with)\b|\{\{"
)
OVER = re.compile(r"(?i)(?:;|\\g\w*(?:\s+\w+)?|\bend\s*(?://|\$\$))$")
BODY = re.compile(r"(?i)(?:^(?:as\s+)?begin\b(?!\s*;|\s+tran|.*;)|.\bbegin$|\bcase\b)")
BODY_END = re.compile(r"(?i)\bend\b(?!\s+(?:if|loop|while|repeat|case|for)\b)")
UNCLOSED = ("python", "haskell", "yaml")  # whose blocks end without a closing line
# The end of such a block's header in Scala.
UNBRACED = re.compile(r"(?:=|:|=>|\b(?:do|else|match|then|try|with|yield))$")


# SQL: what a line has beside its code, the opening of a literal, a body's begin.
BESIDE = re.compile(r"--.*|'[^'\n]*'|\"[^\"\n]*\"")
TAG = re.compile(r"\$\w*\$")
BEGUN = re.compile(r"(?i)\b(?:begin\b(?!\s*;|\s+tran)|case\b)")


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


def is_remark(kind: Any) -> bool:
    return kind in Comment and kind not in Comment.Preproc and kind not in Comment.PreprocFile


def is_inside(kind: Any) -> bool:
    """Whether a line that begins in such a token is none of the code."""
    if kind in Comment.Single or kind in Comment.Preproc:
        return False
    return kind in String or kind in Comment


class Source(Peer):
    """A file with what pygments says of it."""

    def __init__(self, language: str, text: str) -> None:
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

    def depth_of(self, number: int) -> int:
        """How many bodies are open above a line of SQL."""
        above = "\n".join(line.text for line in self.lines[:number] if line.code)
        bodies = len(BEGUN.findall(above)) - len(BODY_END.findall(above))
        return bodies + len(TAG.findall(above)) % 2

    def end_of_statement(self, number: int) -> int | None:
        """`end_of` for SQL."""
        if ";" not in self.text:
            return max(place for place, line in enumerate(self.lines) if line.text)
        depth = 0  # open blocks
        tag = ""  # the opening of the literal
        seen = ""  # the code
        for place, line in enumerate(self.lines[number:], number):
            code = BESIDE.sub("", line.text).strip()
            seen += code + "\n"
            for found in TAG.findall(code):
                if not tag or found == tag:
                    tag = "" if tag else found
            if tag:
                continue
            depth += len(BODY.findall(code)) - len(BODY_END.findall(code))
            if depth <= 0 and OVER.search(code):
                closed = seen.count("(") == seen.count(")") and not re.search("['\"]", seen)
                return place if depth == 0 and closed and place > number else None
        return None

    def end_of(self, number: int) -> int | None:
        """The number of the last line of the definition that begins at a line; None if that is not
        clear.
        """
        if self.language == "sql":
            return self.end_of_statement(number)
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
        unclosed = self.language in UNCLOSED or self._is_unbraced(first)
        ends = unclosed or CLOSER.match(self.lines[last].text)
        return last if ends and last > number else None

    def _is_unbraced(self, line: Line) -> bool:
        return self.language == "scala" and UNBRACED.search(line.text) is not None

    def is_header(self, number: int) -> bool:
        """Whether a line begins a definition or block that a completion at its end completes."""
        line = self.lines[number]
        if self.language == "sql":
            return self._is_statement(number)
        below = self.lines[number + 1].text if number + 1 < len(self.lines) else ""
        opens = line.text.endswith(DEEP_ENDS) or self.language in WORDS
        if not line.code or not (opens or below == "{" or self._is_unbraced(line)):
            return False
        if any(pattern.match(line.text) for pattern in (CLOSER, CLAUSE, IGNORED)):
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

    def _is_statement(self, number: int) -> bool:
        line = self.lines[number]
        above = next((above.text for above in reversed(self.lines[:number]) if above.code), ";")
        begins = line.code and line.indent == 0 and STATEMENT.match(line.text)
        return bool(begins and self.depth_of(number) == 0 and OVER.search(above))

    def _is_announced(self, number: int) -> bool:
        """Whether a comment or a decorator is right above a definition."""
        line, above = self.lines[number], self.lines[number - 1]
        end = above.start + len(self._line(number - 1)) - 2
        comment = above.indent == line.indent and self.comment[end]
        announced = comment or (above.code and above.text.startswith("@"))
        return bool(announced and self.syntax.defines.match(self._line(number)))

    def definitions(self, kind: str, chance: random.Random) -> Iterator[Case]:
        numbers = list(range(self.language != "sql", len(self.lines) - 1))
        for number in chance.sample(numbers, len(numbers)):
            if not self.is_header(number) or (last := self.end_of(number)) is None:
                continue
            if kind == "member" and not self._is_announced(number):
                continue
            place = self.lines[number].start
            if kind == "header":
                place += len(self._line(number).rstrip())
                if chance.random() < 0.5:
                    below = number + 1
                    if self.language == "sql":
                        below = chance.randint(below, last)
                    place = self.lines[below].start
            end = self.lines[last + 1 : last + 2]
            yield self.case_of(kind, place, end[0].start if end else len(self.text))

    def gaps(self, kind: str, chance: random.Random) -> Iterator[Case]:
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

    def _line(self, number: int) -> str:
        start = self.lines[number].start
        return self.text[start : self.text.find("\n", start) + 1]

    def case_of(self, kind: str, place: int, stop: int) -> Case:
        text = self.text
        first = text.find("\n", place - PROMPT_CHARS) + 1 if place > PROMPT_CHARS else 0
        after = text[stop : stop + SUFFIX_CHARS]
        return Case(kind, text[first:place], text[place:stop], after)


def weigh(text: str) -> int:
    return len("".join(text.split()))


def judge(language: str | None, case: Case, sent: str) -> tuple[int, int]:
    """(characters lost, characters too many)."""
    lost = weigh(case.piece) - weigh(sent)
    if case.kind in GAPS:
        return max(lost, 0), max(-lost, 0)
    syntax = LANGUAGES.get(language or "", LANGUAGES["python"])
    remarks = (syntax.line_comment or "\0", "/*", "*", "#", "@")
    more = ONLY_CLOSERS.sub("", sent[len(case.piece) :]).split("\n")
    code = [line for line in more if not line.lstrip().startswith(remarks)]
    return max(lost, 0), weigh("".join(code))


def sources(folders: list[str], language: str, chance: random.Random) -> Iterator[Source]:
    found = files_of(folders, language, MIN_CHARS, MAX_CHARS)
    for path in chance.sample(found, len(found)):
        text = path.read_text("utf-8-sig", "replace").replace("\r\n", "\n")
        if "\r" in text or "\ufffd" in text or max(map(len, text.split("\n"))) >= 400:
            continue
        source = Source(language, text)
        # pygments does not know SQL's $$, nor the braces of dbt.
        if source.sure or language == "sql":
            yield source


def texts_of(case: Case, other: str) -> dict[str, str]:
    """What each model writes."""
    texts = {"own": case.piece, "on": case.piece + case.after[:MORE_CHARS]}
    if case.kind in GAPS:
        line = case.prompt.rpartition("\n")[2]
        indent = " " * (len(line) - len(line.lstrip()))
        lines = [case.piece.rstrip(), *(indent + line for line in other.split("\n"))]
        texts["astray"] = "\n".join(lines)
    return texts


def cases_of(source: Source, kind: str, chance: random.Random) -> Iterator[Case]:
    if kind == "closed":
        found = source.closed(chance)
    else:
        found = (source.gaps if kind in GAPS else source.definitions)(kind, chance)
    for number, case in enumerate(found):
        if number == CASES_PER_FILE:
            return
        if case.piece.strip() and len(case.piece) <= MAX_PIECE:
            yield case


def cut_to(case: Case, window: int) -> Case:
    """A case as a limit of reading leaves it: from the start of a line."""
    above = case.prompt[-window:]
    if len(above) < len(case.prompt):
        above = above[above.find("\n") + 1 :]
    return case._replace(prompt=above, after=case.after[: window // 3])


def recorded(file: str) -> list[float]:
    """The probabilities of the tokens up to the first one that was wrong."""
    found = list[float]()
    for row in map(json.loads, Path(file).read_text().splitlines()):
        text = ""
        for piece, probability in row["tokens"]:
            text += piece
            if row["kind"] != "line" or not row["expected"].startswith(text):
                break
            found.append(probability)
    return found


def write(ending: Ending, text: str, chance: random.Random, probabilities: list[float]) -> str:
    """What the client gets of a text."""
    sent = ""
    for token in TOKEN.findall(text):
        out, reason = ending.feed(token, chance.choice(probabilities))
        sent += out
        if reason:
            return sent
    return sent + ending.flush()


def summary_of(pairs: list[tuple[int, int]]) -> dict[str, float]:
    cut = sum(lost > 0 for lost, _ in pairs)
    late = [surplus for _, surplus in pairs if surplus]
    return {
        "cases": len(pairs),
        "cut": round(100 * cut / len(pairs), 2),
        "late": round(100 * len(late) / len(pairs), 2),
        "chars": round(sum(late) / max(1, len(late))),
    }


def measure(language: str, options: argparse.Namespace) -> dict[str, object]:
    chance, show = random.Random(f"{options.seed} {language}"), options.show
    probabilities = recorded(options.recorded) if options.recorded else [1.0]
    other = "\n".join(f"other{n} = elsewhere({n})" for n in range(60))
    results = defaultdict[str, list[tuple[int, int]]](list)  # by kind and model
    for source in sources(options.folders, language, chance):
        have = Counter({kind: len(results.get(f"{kind}_own", ())) for kind in KINDS})
        missing = [kind for kind in options.kinds.split(",") if have[kind] < options.cases]
        if not missing:
            break
        for kind in missing:
            for case in cases_of(source, kind, chance):
                if options.window:
                    case = cut_to(case, options.window)
                for model, text in texts_of(case, other).items():
                    name = f"{kind}_{model}"
                    mode, suffix = ("infill", case.after) if kind in GAPS else ("complete", None)
                    ending = Ending(mode, language, case.prompt, suffix, "auto")
                    drawn = random.Random(text)
                    sent = write(ending, text, drawn, probabilities)
                    result = judge(language, case, sent)
                    results[name].append(result)
                    if show and any(result) and re.search(options.only, name):
                        show -= 1
                        marked = f"{case.prompt[-300:]}«{case.piece}»{case.after[:200]}"
                        print(f"--- {language} {name} {result}\n{marked}")
                        print(f"  sent: {sent[-200:]!r}\n")
        other = source.text[source.lines[len(source.lines) // 2].start :][:MORE_CHARS]
    names = sorted(results, key=lambda name: KINDS.index(name.partition("_")[0]))
    return {"language": language, **{name: summary_of(results[name]) for name in names}}


def main() -> None:
    parser = servers.parser_of(
        __doc__,
        seed=1,
        cases=300,
        languages=",".join(LANGUAGES),
        show=0,
        window=0,
        only="",
        recorded="",
        kinds=",".join(KINDS),
    )
    parser.add_argument("folders", nargs="*", default=FOLDERS)
    options = parser.parse_args()
    for language in options.languages.split(","):
        print(json.dumps(measure(language, options)), flush=True)


if __name__ == "__main__":
    main()
