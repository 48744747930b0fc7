"""What a text costs grows with its length and not with its square, whatever a user sends or a model
writes.

Each entry point reads each hostile text twice, the second one four times as long, and the CPU time
is compared. A quadratic step makes that 16 times as much; the tests allow 8, or 6 where only a part
of a step is quadratic. Of short texts, where less of the time is quadratic, they allow 5, and look
again at longer ones. So does each regular expression of the product, with texts made from its own
parts.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from re import _parser  # type: ignore[attr-defined]  # there is no public one
from typing import Any

import pytest

from cerebrum.text.ending import Ending
from cerebrum.text.languages import guess_language
from cerebrum.text.prompt import detect_mode, prepare
from cerebrum.text.scanner import HEAD_CHARS
from cerebrum.text.stages import StopStrings

QUICK = ("python", "javascript")
SLOW = (
    "cpp",
    "ruby",
    "php",
    "shell",
    "sql",
    "html",
    "yaml",
    "markdown",
    "csharp",
    "lua",
    "swift",
    "json",
    "dockerfile",
)
MODES = ("complete", "infill", "instruct")
MAX_GROWTH = 8.0
FLOOR_SECONDS = 0.003  # a shorter time tells nothing
# of the shorter text; a step that is quadratic in Python or in a regular expression shows here
CHARACTERS = 1000
FEW, MAX_OF_FEW = CHARACTERS // 4, 5.0  # and begins to show here
MANY_CHARACTERS, MAX_COPY_GROWTH = (
    50_000,
    6.0,
)  # copying the text so far at each character shows only here
WIDE = "\U0001f600"  # a character that makes Python use four bytes for each character of a text

# What is repeated, and what stands before it once.
UNITS = [
    "#", "/", "(", ")", "[", "]", "{", "}", '"', "'", "`", "\\", ";", ",", "<", "@", "~", "-",
    "=", " ", "\t", "\n", "\r\n", "\0", "a", "A", "0", "é", "漢", "\U0001f600", "a ", "a'", "a/ ",
    "/ ", "'a ", "//", "/*", "*/\n", "/* */", '"""', "'''", "```", "```\n", "```x\n", "``` ",
    "~~~\n", "{}", "[]", "()", "({", "[)", "a(", "a()\n", "a:\n", "a\n", "a, ", "  a\n", "    \n",
    "\n\n \n", "# a\n", "// a\n", "#  ", "//  ", "# Example usage:\n", "if ", "else if ",
    "else ", "def ", "def f(", "def f(x):\n  g(x)\n", "function ", "function f(){", "fn f(",
    "class ", "impl<", "x=", "x = 1\n", "import a\n", "import (\n", "from a ", "typedef ",
    "template<", "a::", "::", "${", "`${", 'R"', 'R"a(', 'r#"',
    "please ", "x" * 300 + "\n", "return 1\n\n", "async ", "#if a {\n",
]  # fmt: skip
MORE_UNITS = [  # of languages beside the first seven
    "end ", "end\n", "do |x| ", "%w[", "#{", "<<A", "<<A\n", "A\n", "case a in ",
    "create procedure is ", "create ", "is ", "begin ", "$a$", "<a>", "</a>", "<script>",
    "- a: |\n", "a: &b ",
    "--[==[", "\\(", "--- ", "````a\n", "RUN a \\\n",
]  # fmt: skip
STARTS = ("", "a", "function", "f'", "Make this ", "\n/*")


def many_names(size: int) -> str:
    """Functions that call the next one, as a model writes helpers."""
    return "".join(f"def a{n}(x):\n    return a{n + 1}(b{n}(x))\n\n" for n in range(size // 40))


def deep(size: int) -> str:
    depth = int(size**0.5)
    return "".join(f"{' ' * n}if a{n}:\n" for n in range(depth)) + "x\n" * (size // 4)


def feed(ending: Ending, text: str):
    for start in range(0, len(text), 3):
        if ending.feed(text[start : start + 3])[1]:
            return
    ending.flush()


def ask(language: str, text: str):
    guess_language(text, text, [text])
    for asked in ({"prompt": text}, {"prompt": "x = ", "suffix": text}, {"instruction": text}):
        assert detect_mode({"language": language, **asked}) in MODES


def fit(language: str, text: str):
    for mode in MODES:
        prepare(
            {"language": language, "prompt": text, "suffix": text, "instruction": text[:200]},
            mode,
            400,
        )


def begin(language: str, text: str):
    """A prompt, a suffix or the beginning of an answer, before the model has written anything."""
    for mode in MODES:
        Ending(mode, language, text, text, "auto")
    feed(
        Ending("complete", language, f"{text}\ndef f(x):\n", None, "auto"), "    return g(x)\n"
    )  # is g in the prompt?


def endings(language: str) -> list[Ending]:
    """Below a header, in a statement, and in the block of an answer; every other one is of another
    mode.
    """
    header, suffix = (
        "def f(x):\n" if language == "python" else "function f(x) {\n",
        "zz = yy\n}\nzzz\n",
    )
    return [
        Ending("complete", language, header, None, "auto"),
        Ending("complete", language, "x = (", None, "auto"),
        Ending("infill", language, "x = (", suffix, "auto"),
        Ending("infill", language, header, suffix, "auto"),
        Ending("instruct", language, "```\n", None, "auto"),
        Ending("instruct", language, "", None, "none"),
    ]


def end(language: str, text: str):
    """A model that writes the text."""
    for ending in endings(language):
        feed(ending, text)


def end_in_each_mode(language: str, text: str):
    for ending in endings(language)[::2]:
        feed(ending, text)


def stop(_language: str, text: str):
    """Stop strings that the text nearly has."""
    strings = StopStrings([text[: len(text) // 2] + "\n!", "!" + text, text[:5] + "!"])
    for char in text:
        strings.feed(char)


Work = Callable[[str, str], None]


def seconds(work: Work, language: str, text: str) -> float:
    started = time.thread_time()
    work(language, text)
    return time.thread_time() - started


def growth(
    work: Work, language: str, text: Callable[[int], str], size: int, most: float = MAX_GROWTH
) -> float:
    """How many times the cost of a text that of a text four times as long is: the best of several
    tries, because a busy machine only adds time. Not exact below `most`.
    """
    short, long = text(size), text(4 * size)
    four, one = seconds(work, language, long), FLOOR_SECONDS
    for _ in range(4):
        if four <= most * one:  # most texts, without a look at the shorter one
            break
        one = max(FLOOR_SECONDS, min(seconds(work, language, short) for _ in range(2)))
        four = min(four, seconds(work, language, long))
    return four / one


def repeated(unit: str, start: str = "") -> Callable[[int], str]:
    return lambda size: start + unit * (size // len(unit) + 1)


WORKS = (ask, fit, begin, end)
NIGHTLY = pytest.mark.slow, pytest.mark.nightly
TRIED = [*itertools.product(WORKS, QUICK), (stop, "python")]
TRIED += [pytest.param(*each, marks=NIGHTLY) for each in itertools.product(WORKS, SLOW)]


@pytest.mark.parametrize(
    ("work", "language"), TRIED, ids=lambda part: getattr(part, "__name__", part)
)
def test_no_text_is_expensive(work, language):
    units = UNITS if language in QUICK else UNITS + MORE_UNITS
    # The others take text character by character.
    starts = ("", *STARTS) if work in (ask, fit) else ("",)
    cases = itertools.product(units, starts)
    texts = {(unit, start): repeated(unit, start) for unit, start in cases}
    texts |= {("many names", ""): many_names, ("deep", ""): deep}

    suspect = [
        name
        for name, text in texts.items()
        if growth(work, language, text, FEW, MAX_OF_FEW) > MAX_OF_FEW
    ]
    grown = {name: growth(work, language, texts[name], CHARACTERS) for name in suspect}
    assert {name: times for name, times in grown.items() if times > MAX_GROWTH} == {}


MODES_SLOWLY = pytest.param(end_in_each_mode, marks=pytest.mark.slow, id="end_in_each_mode")


@pytest.mark.parametrize("work", [begin, MODES_SLOWLY, stop])
def test_no_character_copies_what_is_there(work):
    text = repeated("\n", WIDE)
    assert growth(work, "python", text, MANY_CHARACTERS, MAX_COPY_GROWTH) < MAX_COPY_GROWTH


# ------------------------------------------------------------------------------ regular expressions

ROOT = Path(__file__).parents[2]
MORE_CHARACTERS = 3 * CHARACTERS  # a step that the regular expression itself makes is short
PADS = (" ", "\t", "\n", "a", "(", '"', "a ", "a\n", "a(", "\n ")
TAIL = "\0`"  # behind them, what seldom matches
USE = re.compile(r"(\w+)\.(search|match|fullmatch|finditer|findall|sub|split)\(")
# A quarter of the longest text that the caller gives to a pattern that would be expensive for a
# longer one.
AT_MOST = {"INITIALIZER": HEAD_CHARS // 16, "UNFINISHED": 16, "WORD": 25}
# These read our own page, the operator's own .env, and a block that ends with the end of an event.
LEFT_OUT = {"SCRIPT", "STYLE", "_read_env", "TOKENS_OR_EVENT"}


def inside(node: Any) -> list[Any]:
    """The parts of a node of a parsed regular expression, each a list of nodes."""
    kind, value = str(node[0]), node[1]
    if kind == "BRANCH":
        return value[1]
    if kind.endswith("_REPEAT"):
        return [value[2]]
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return [value] if kind == "ATOMIC_GROUP" else []


def sample(nodes: Iterable[Any]) -> str:
    """A text that parts of a parsed regular expression match, or nearly."""
    text = ""
    for node in nodes:
        kind, value = str(node[0]), node[1]
        if kind == "IN":
            text += sample_of_set(value)
        elif parts := inside(node):
            text += sample(parts[0])
        else:
            text += chr(value) if kind == "LITERAL" else "a" * (kind in ("ANY", "NOT_LITERAL"))
    return text


def sample_of_set(parts: Sequence[Any]) -> str:
    """A character of a set: a blank, the first that is named, or else an a."""
    if "CATEGORY_SPACE" in str(parts):
        return " "
    if str(parts[0][0]) != "NEGATE":
        for kind, value in parts:
            if str(kind) in ("LITERAL", "RANGE"):
                return chr(value if str(kind) == "LITERAL" else value[0])
    return "a"


def repetitions(nodes: Iterable[Any], before: str = "") -> Iterator[tuple[str, str]]:
    """(text that leads to it, text repeated) of each repetition without a limit."""
    for node in nodes:
        if str(node[0]).endswith("_REPEAT") and node[1][1] == _parser.MAXREPEAT:
            yield before, sample(node[1][2])
        for part in inside(node):
            yield from repetitions(part, before)
        before += sample([node])


def words(nodes: Iterable[Any]) -> Iterator[str]:
    """The characters that a regular expression names, those in a row as one text."""
    word = ""
    for node in nodes:
        if str(node[0]) == "LITERAL":
            word += chr(node[1])
            continue
        yield from filter(None, [word])
        word = ""
        for part in inside(node):
            yield from words(part)
    yield from filter(None, [word])


def patterns_in(value: Any, name: str) -> Iterator[tuple[str, re.Pattern[Any]]]:
    """The compiled patterns in a value, each with the name of the constant or field that holds
    it.
    """
    if isinstance(value, re.Pattern):
        yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from patterns_in(getattr(value, field.name), field.name)
    elif isinstance(value, (dict, list, tuple)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from patterns_in(one, name)


def patterns_of_the_product() -> dict[tuple[re.Pattern[Any], str], str]:
    """Where each (pattern, method that is called) is: the constants of all modules, and what is
    written in a call.
    """
    paths = [*ROOT.glob("*.py"), *ROOT.glob("cerebrum/**/*.py")]
    texts = {path: path.read_text() for path in paths}
    found = {}
    called = defaultdict[str, set[str]](set)
    for text in texts.values():
        for name, method in USE.findall(text):
            called[name].add(method)
    for path, text in texts.items():
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for constant, value in vars(module).items():
            for name, pattern in patterns_in(value, constant):
                for method in called[name] or {"search"}:
                    found.setdefault((pattern, method), name)
        for source, method, name in written_patterns(text):
            found.setdefault((re.compile(source), method), name)
    return found


def written_patterns(text: str) -> Iterator[tuple[str, str, str]]:
    """(pattern, method, function around it) of each pattern that is written in a call."""
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                match node:
                    case ast.Call(
                        ast.Attribute(ast.Name("re"), method), [ast.Constant(source), *_]
                    ):
                        yield source, method, function.name


def hostile(pattern: re.Pattern[Any], pads: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(start, what is repeated) of texts that a pattern may read again and again."""
    source = (
        pattern.pattern if isinstance(pattern.pattern, str) else pattern.pattern.decode("latin-1")
    )
    tree = _parser.parse(source, pattern.flags)
    found, named = {*repetitions(tree)}, [*words(tree)]
    units = {*pads, *named, "".join(named), *(unit for _, unit in found)} - {""}
    return itertools.product({"", *(start for start, _ in found)}, units)


def drive(pattern: re.Pattern[Any], method: str) -> Work:
    """Let a pattern read a text as the product does; a search goes on to the text's end."""
    call = getattr(pattern, method if method in ("match", "fullmatch") else "finditer")

    def work(_language: str, text: str):
        read = call(text if isinstance(pattern.pattern, str) else text.encode())
        for _ in read if method not in ("match", "fullmatch") else ():
            pass

    return work


def worst(
    pattern: re.Pattern[Any], method: str, size: int, pads: Iterable[str]
) -> tuple[float, str, str]:
    """(growth, start, what is repeated) of the first text that is too expensive, or of the most
    expensive one.
    """
    work, grown = drive(pattern, method), [(0.0, "", "")]
    for start, unit in hostile(pattern, pads):
        text = repeated(unit, start)
        # What is cubic would take minutes for the longer text.
        for characters in (size // 16, size):
            times = growth(work, "", lambda size, text=text: text(size) + TAIL, characters)
            if times > MAX_GROWTH:
                return times, start, unit
        grown.append((times, start, unit))
    return max(grown)


MANY_PADS = pytest.param((*UNITS, *MORE_UNITS), marks=pytest.mark.slow)


@pytest.mark.parametrize("pads", [PADS, MANY_PADS], ids=["few", "many"])
def test_no_pattern_is_expensive(pads):
    patterns = patterns_of_the_product()
    assert {"OPENED", "NEXT_EDIT", "HEADERS"} <= {*patterns.values()}
    expensive = {}
    for (pattern, method), where in patterns.items():
        if where not in LEFT_OUT:
            found = worst(pattern, method, AT_MOST.get(where, MORE_CHARACTERS), pads)
            if found[0] > MAX_GROWTH:
                expensive[where, pattern, method] = found
    assert expensive == {}


def test_an_expensive_pattern_is_noticed():
    pattern = re.compile(r"\A<a>.*<b>.*<c>\Z", re.S)
    assert worst(pattern, "search", MORE_CHARACTERS, PADS)[0] > MAX_GROWTH
