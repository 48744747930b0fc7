"""A text ends before the first word of which the model is too unsure. By hand."""

from __future__ import annotations

import pytest

from cerebrum.text.confidence import confidence_of
from cerebrum.text.ending import Ending

Tokens = list[tuple[str, float]]

ASSIGNED = "def f(a):\n    x = ", "\n    return x\n"  # the rest of a line is missing
CALLED = "f(", ")\n"  # within a line
LINES = "def f(a):\n", "    return x\n"  # whole lines
NOTHING = "x = ", ""  # a text without an end

# By name: prompt and suffix, tokens, what goes out after each and at the model's own end (None:
# after the last token, the text has ended).
CASES: dict[str, tuple[tuple[str, str], Tokens, list[str], str | None]] = {
    "no token": (ASSIGNED, [], [""], None),
    "an unlikely first word": (ASSIGNED, [("a", 0.2)], [""], "unsure"),
    "a product": (
        ASSIGNED, [("a", 0.8), (" +", 0.7), (" b", 0.4)], ["", "a +", ""], "unsure",
    ),
    "exactly the least": (ASSIGNED, [("a", 0.5), (" ", 0.5)], ["", "a", " "], None),
    "half a word": (
        ASSIGNED, [("a", 0.9), (" +", 0.9), (" con", 0.9), ("fig", 0.1)], ["", "a +", "", ""],
        "unsure",
    ),
    "a word that a token ends": (
        ASSIGNED, [("con", 0.9), ("fig.", 0.9), ("path", 0.9)], ["", "config.", "", "path"], None,
    ),
    "a token that begins with the end of a word": (
        ASSIGNED, [("con", 0.9), ("fig.x", 0.1)], ["", ""], "unsure",
    ),
    "a token behind a word": (ASSIGNED, [("a", 0.9), ("[i", 0.1)], ["", "a"], "unsure"),
    "blanks that are unlikely": (
        ASSIGNED, [("a", 0.9), ("  ", 0.1), ("b", 1.0)], ["", "a", ""], "unsure",
    ),
    "signs alone": (NOTHING, [("(", 0.9), ("[", 0.9), ("a", 0.1)], ["", "", ""], "unsure"),
    "signs that end their line": (
        NOTHING, [("()", 0.9), ("\n", 0.9), ("a", 0.1)], ["", "()", ""], "unsure",
    ),
    "signs that end the text": (CALLED, [("[", 0.9), ("]", 0.9)], ["", "", "[]"], None),
    "the chance of a line": (
        LINES,
        [("    x = 1", 0.3), ("\n", 0.9), ("    y", 0.3), ("\n", 0.9), ("    z", 0.2)],
        ["    x =", " 1\n", "", "", ""], "unsure",
    ),
    "the line end that whole lines need": (
        LINES, [("    x", 0.9), (" =", 0.9), (" 1", 0.1)], ["", "    x =", "\n"], "unsure",
    ),
    "no line end within a line": (
        CALLED, [("a,", 0.9), ("\n", 0.9), ("  b", 0.1)], ["a,", "", ""], "unsure",
    ),
    "a longer word than any": (
        NOTHING, [("a" * 24, 0.9), ("a", 0.9), ("b", 0.1)], ["", "a" * 24, ""], "unsure",
    ),
    "a script without spaces": (NOTHING, [("名", 0.9), ("前", 0.1)], ["名", ""], "unsure"),
    "blank lines": (
        LINES, [("    x\n", 0.9), ("\n", 0.9), ("    y", 0.1)], ["    x\n", "", ""], "unsure",
    ),
    "impossible": (NOTHING, [("a", 0.0)], [""], "unsure"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_where_a_text_ends(name: str) -> None:
    (prompt, suffix), tokens, sent, why = CASES[name]
    ending = Ending(
        "infill" if suffix else "complete", "python", prompt, suffix, "auto", least=0.25
    )
    texts, reasons = list[str](), list[str | None]()
    for text, probability in tokens:
        out, reason = ending.feed(text, probability)
        texts.append(out)
        reasons.append(reason)
    if why is None:
        texts.append(ending.flush())
    else:
        assert reasons.pop() == why
    assert (texts, set(reasons) - {None}) == (sent, set())


TYPED = "def f(a):\n    ", "\n    return x\n"
# By name: prompt and suffix, stop strings, tokens, the text and why it ends. The model writes on.
MORE: dict[str, tuple[tuple[str, str], tuple[str, ...], Tokens, str, str | None]] = {
    "held by a stop string": (
        NOTHING, ("\n\n",), [("a", 0.9), ("\n", 0.9), ("b", 0.1)], "a", "unsure",
    ),
    "a stop string": (NOTHING, (";;",), [("a", 0.9), (";", 0.9), ("bb", 0.1)], "a;", "unsure"),
    "its end": (NOTHING, (";;",), [("a b", 0.9), (";; c", 0.9), (" d", 0.1)], "a b", "stop"),
    "both characters of a line end": (
        CALLED, (), [("a,", 0.9), ("\r\n", 0.9), ("  b", 0.1)], "a,", "unsure",
    ),
    "blanks that precede more text": (
        CALLED, (), [("a,", 0.9), ("\n  ", 0.9), ("b", 0.9), (" c", 0.1)], "a,\n  b", "unsure",
    ),
    "typed indentation": (TYPED, (), [("    x", 0.9), (" = 1", 0.1)], "x", "unsure"),
    "a bracket of the suffix": (
        CALLED, (), [("a)", 0.9), ("\n\ndef", 0.9), (" g", 0.1)], "a", "block",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_what_else_a_text_has(name: str) -> None:
    (prompt, suffix), stops, tokens, text, why = MORE[name]
    mode = "infill" if suffix else "complete"
    ending = Ending(mode, "python", prompt, suffix, "auto", stops=stops, least=0.25)
    sent = ""
    for token, probability in tokens:
        out, reason = ending.feed(token, probability)
        sent += out
        if reason:
            break
    assert (sent, reason) == (text, why)


def test_a_limit_leaves_what_precedes_the_suffix() -> None:
    """In a gap within a line, with a threshold or without."""
    for least in (None, 0.25):
        around = "function f() {\n  const x = foo(a, ", ", b);\n  return x;\n}\n"
        ending = Ending("infill", "javascript", *around, "auto", least=least)
        out, reason = ending.feed("c);\n}\n\nfunction g() {\n  ret", 0.97)
        assert (out + ending.flush(whole=False), reason) == ("c", None)


def test_a_limit_leaves_no_half_word() -> None:
    ending = Ending("infill", "python", *ASSIGNED, "auto", least=0.25)
    assert ending.feed("a + con", 0.9) == ("a +", None)
    assert ending.flush(whole=False) == ""


@pytest.mark.parametrize("least", [None, 0.0])
def test_nothing_waits_without_a_threshold(least: float | None) -> None:
    ending = Ending("infill", "python", *ASSIGNED, "auto", least=least)
    assert ending.feed("a + con", 0.0) == ("a + con", None)


def test_a_long_text_without_words_goes_on() -> None:
    """As one word, and as words that never become one."""
    for text in ("a" * 10**5, "(" * 10**5, " " * 10**5):
        ending = Ending("complete", None, "", None, "none", least=0.25)
        assert ending.feed(text, 0.9)[1] is None


A, B = ("a", 0.9), (" =", 0.7)
FENCE = [("Sure:\n```\n", 0.1), ("t", 0.9), (" = 1\n", 0.7)]
# By name: tokens, where the text begins, the text, and the three figures.
FIGURES: dict[str, tuple[Tokens, int, str, tuple[float, ...]]] = {
    "no token": ([], 0, "", ()),
    "no text": ([A], 0, "", ()),
    "one line": ([A, B], 0, "a =", (0.8, 0.8, 0.63)),
    "two": ([A, B, (" 1\n", 0.2), ("b", 1.0)], 0, "a = 1\nb", (0.6, 0.7, 0.126)),
    "less than was written": ([A, B, (" 1", 0.2)], 0, "a =", (0.8, 0.8, 0.63)),
    "a line end that was added": ([A, B], 0, "a =\n", (0.8, 0.8, 0.63)),
    "blank lines": ([("\n", 0.2), ("\n", 0.4), A], 0, "\n\na", (0.5, 0.5, 0.072)),
    "a text that begins later": (FENCE, 10, "t = 1\n", (0.8, 0.8, 0.63)),
    "a block in a list": (
        [("  a\n", 0.9), ("  b\n", 0.5)], 0, "a\nb", (0.9, 0.7, 0.45),
    ),
    "a token with the end of what precedes it": (
        [("<think>x</think", 0.1), (">A", 0.9), ("\n", 0.9), ("B", 0.7)], 16, "A\nB",
        (0.9, 0.8333, 0.567),
    ),
    "half a character": ([("", 0.5), ("é", 0.7)], 0, "é", (0.6, 0.6, 0.35)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIGURES)
def test_how_sure_a_model_is(name: str) -> None:
    tokens, start, text, figures = FIGURES[name]
    assert tuple(confidence_of(tokens, start, text).values()) == figures
