"""What a text costs grows with its length and not with its square, whatever a user sends or a model writes.

Each entry point reads each hostile text twice, the second one four times as long, and the CPU time is compared. A
quadratic step makes that 16 times as much; the tests allow 8, or 6 where only a part of a step is quadratic.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from cerebrum.text.ending import Ending, StopStrings
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.prompt import detect_mode, prepare, split_instruction

QUICK = ("python", "javascript", "cpp")
SLOW = ("ruby", "php", "shell", "sql", "html", "yaml", "markdown", "csharp", "lua", "swift", "json", "dockerfile")
MODES = ("complete", "infill", "instruct")
MAX_GROWTH = 8.0
FLOOR_SECONDS = 0.003  # a shorter time tells nothing
CHARACTERS = 1000  # of the shorter text; a step that is quadratic in Python or in a regular expression shows here
MANY_CHARACTERS, MAX_COPY_GROWTH = 50_000, 6.0  # copying the text so far at each character shows only here
WIDE = "\U0001f600"  # a character that makes Python use four bytes for each character of a text

# What is repeated, and what stands before it once.
UNITS = [
    "#", "/", "(", ")", "[", "]", "{", "}", '"', "'", "`", "\\", ";", ",", "<", "@", "~", "-", "=", " ", "\t", "\n",
    "\r\n", "\0", "a", "A", "0", "é", "漢", "\U0001f600", "a ", "a'", "a/ ", "/ ", "'a ", "//", "/*", "*/\n", "/* */",
    '"""', "'''", "```", "```\n", "```x\n", "``` ", "~~~\n", "{}", "[]", "()", "({", "[)", "a(", "a()\n", "a:\n", "a\n",
    "a, ", "  a\n", "    \n", "\n\n \n", "# a\n", "// a\n", "#  ", "//  ", "# Example usage:\n", "if ", "else if ",
    "else ", "def ", "def f(", "def f(x):\n  g(x)\n", "function ", "function f(){", "fn f(", "class ", "impl<",
    "x=", "x = 1\n", "import a\n", "import (\n", "from a ", "typedef ", "template<", "a::", "::", "${", "`${", 'R"',
    'R"a(', 'r#"', "please ", "x" * 300 + "\n", "return 1\n\n", "async ", "#if a {\n",
]  # fmt: skip
MORE_UNITS = [  # of languages beside the first seven
    "end ", "end\n", "do |x| ", "%w[", "#{", "<<A", "<<A\n", "A\n", "<?php ", "?>", "if (a): ", "endif; ", "case a in ",
    "create procedure is ", "create ", "is ", "begin ", "$a$", "<a>", "</a>", "<script>", "- a: |\n", "a: &b ",
    "--[==[", "\\(", "--- ", "````a\n", "RUN a \\\n",
]  # fmt: skip
STARTS = ("", "a", "function", "f'", "# Make this ", "// Make this ", "\n/*")


def many_names(size: int) -> str:
    """Functions that call the next one, as a model writes helpers."""
    return "".join(f"def a{n}(x):\n    return a{n + 1}(b{n}(x))\n\n" for n in range(size // 40))


def deep(size: int) -> str:
    depth = int(size**0.5)
    return "".join(f"{' ' * n}if a{n}:\n" for n in range(depth)) + "x\n" * (size // 4)


def feed(ending: Ending, text: str, piece: int = 3) -> None:
    for start in range(0, len(text), piece):
        if ending.feed(text[start : start + piece])[1]:
            return
    ending.flush()


def ask(language: str, text: str) -> None:
    split_instruction(text, LANGUAGES[language])
    for fields in ({"prompt": text}, {"prompt": "x = ", "suffix": text}, {"instruction": text}):
        assert detect_mode({"language": language, **fields}) in MODES


def fit(language: str, text: str) -> None:
    for mode in MODES:
        prepare({"language": language, "prompt": text, "suffix": text, "instruction": text[:200]}, mode, 400, 3.0)


def begin(language: str, text: str) -> None:
    """A prompt, a suffix or the beginning of an answer, before the model has written anything."""
    for mode in MODES:
        Ending(mode, language, text, text, "auto")
    feed(Ending("complete", language, f"{text}\ndef f(x):\n", None, "auto"), "    return g(x)\n")  # is g in the prompt?


def end(language: str, text: str) -> None:
    """A model that writes the text, below a header, in a statement, and in the block of an answer."""
    header = "def f(x):\n" if language == "python" else "function f(x) {\n"
    for prompt in (header, "x = ("):
        feed(Ending("complete", language, prompt, None, "auto"), text)
        feed(Ending("infill", language, prompt, "zz = yy\n}\nzzz\n", "auto"), text)
    feed(Ending("instruct", language, "```\n", None, "auto"), text)
    feed(Ending("instruct", language, "", None, "none"), text)


def stop(_language: str, text: str) -> None:
    """Stop strings that the text nearly has."""
    strings = StopStrings([text[: len(text) // 2] + "\n!", "!" + text, text[:5] + "!"])
    for char in text:
        strings.feed(char)


Work = Callable[[str, str], None]


def seconds(work: Work, language: str, text: str) -> float:
    started = time.thread_time()
    work(language, text)
    return time.thread_time() - started


def growth(work: Work, language: str, text: Callable[[int], str], size: int, most: float = MAX_GROWTH) -> float:
    """How many times the cost of a text, at least FLOOR_SECONDS, is that of a text four times as long.

    The best of several tries, because a busy machine only adds time.
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


TRIED = [(work, language) for work in (ask, fit, begin, end) for language in QUICK] + [(stop, "python")]
LATER = [(work, language) for work in (ask, fit, begin, end) for language in SLOW]


@pytest.mark.parametrize(
    ("work", "language"),
    TRIED + [pytest.param(*one, marks=(pytest.mark.slow, pytest.mark.nightly)) for one in LATER],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_no_text_is_expensive(work: Work, language: str) -> None:
    units = UNITS if language in QUICK else UNITS + MORE_UNITS
    texts = {(unit, ""): repeated(unit) for unit in units} | {("many names", ""): many_names, ("deep", ""): deep}
    if work in (ask, fit):  # the others take text character by character
        texts |= {(unit, start): repeated(unit, start) for unit in units for start in STARTS}
    grown = {name: growth(work, language, text, CHARACTERS) for name, text in texts.items()}
    assert {name: times for name, times in grown.items() if times > MAX_GROWTH} == {}


@pytest.mark.parametrize("work", [begin, end, stop], ids=lambda work: work.__name__)
def test_no_character_copies_what_is_there(work: Work) -> None:
    text = repeated("\n", WIDE)
    assert growth(work, "python", text, MANY_CHARACTERS, MAX_COPY_GROWTH) < MAX_COPY_GROWTH


@pytest.mark.parametrize("unit", ["#", '"""', "    \n", "a.b(c)\n", "function ", "/* a\n*/\n"])
def test_a_megabyte_is_read_in_seconds(unit: str) -> None:
    text = repeated(unit)(1 << 20)
    started = time.thread_time()
    for language in ("python", "javascript"):
        ask(language, text)
        fit(language, text)
    assert time.thread_time() - started < 20  # 10 times what it takes
