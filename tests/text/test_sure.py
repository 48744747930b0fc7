"""A text ends before the first word of which the model is too unsure. By hand."""

from __future__ import annotations

import json

import pytest
from test_ending import tokens_of

from cerebrum.text.ending import Ending
from cerebrum.text.stages import Sure, confidence_of

ASSIGNED = "def f(a):\n    x = ", "\n    return x\n"
# What stands around a text: its prompt, its suffix and its stop strings.
AROUND = {
    "assigned": ASSIGNED,  # the rest of a line is missing
    "called": ("f(", ")\n"),  # within a line
    "an argument": ("f(a, ", ", b)\n"),
    "lines": ("def f(a):\n", "    return x\n"),  # whole lines
    "typed": ("def f(a):\n    ", "\n    return x\n"),
    "endless": ("x = ", ""),
    "a stop of two line ends": ("x = ", "", "\n\n"),
    "a stop of two signs": ("x = ", "", ";;"),
}
# By name: what is around, tokens (see `tokens_of`), and what goes out after each, with | between
# them, and at the model's own end if the text has not ended before; then why it ends, if not by the
# model or its doubt.
CASES = json.loads(r"""{
    "no token": ["assigned", "", ""],
    "an unlikely first word": ["assigned", "a²", ""],
    "a product": ["assigned", "a⁸ +⁷ b⁴", "|a +|"],
    "exactly the least": ["assigned", "a⁵ ⁵", "|a| "],
    "half a word": ["assigned", "a⁹ +⁹ con⁹fig¹", "|a +||"],
    "a word that a token ends": ["assigned", "con⁹fig.⁹path⁹", "|config.||path"],
    "a token that begins with the end of a word": ["assigned", "con⁹fig.x¹", "|"],
    "a token behind a word": ["assigned", "a⁹[i¹", "|a"],
    "blanks that are unlikely": ["assigned", "a⁹  ¹b¹⁰", "|a|"],
    "signs alone": ["endless", "(⁹[⁹a¹", "||"],
    "signs that end their line": ["endless", "()⁹\n⁹a¹", "|()|"],
    "signs that end the text": ["called", "[⁹]⁹", "||[]"],
    "the chance of a line": ["lines", "    x = 1³\n⁹    y³\n⁹    z²", "    x =| 1\n|||"],
    "the line end that whole lines need": ["lines", "    x⁹ =⁹ 1¹", "|    x =|\n"],
    "no line end within a line": ["called", "a,⁹\n⁹  b¹", "a,||"],
    "a longer word than any":
        ["endless", "aaaaaaaaaaaaaaaaaaaaaaaa⁹a⁹b¹", "|aaaaaaaaaaaaaaaaaaaaaaaa|"],
    "a script without spaces": ["endless", "名⁹前¹", "名|"],
    "blank lines": ["lines", "    x\n⁹\n⁹    y¹", "    x\n||"],
    "impossible": ["endless", "a⁰", ""],
    "held by a stop string": ["a stop of two line ends", "a⁹\n⁹b¹", "|a|"],
    "a stop string": ["a stop of two signs", "a⁹;⁹bb¹", "|a|;"],
    "its end": ["a stop of two signs", "a b⁹;; c⁹", "a| b", "stop"],
    "both characters of a line end": ["called", "a,⁹\r\n⁹  b¹", "a,||"],
    "blanks that precede more text": ["called", "a,⁹\n  ⁹b⁹ c¹", "a,|||\n  b"],
    "typed indentation": ["typed", "    x⁹ = 1¹", "|x"],
    "a comma of the suffix": ["an argument", "c⁹,⁹ zz¹", "|c|"],
    "a bracket of the suffix": ["called", "a)⁹\n\ndef⁹ g¹", "a||", "block"]
}""")


@pytest.mark.parametrize("name", CASES)
def test_where_a_text_ends(name):
    around, tokens, sent, *why = CASES[name]
    prompt, suffix, *stops = AROUND[around]
    mode = "infill" if suffix else "complete"
    ending = Ending(mode, "python", prompt, suffix, "auto", stops=stops, least=0.25)
    texts, reason = list[str](), None
    for text, probability in tokens_of(tokens):
        assert reason is None
        out, reason = ending.feed(text, probability)
        texts.append(out)
    if reason is None:
        texts.append(ending.flush())
    assert reason in (why or (None, "unsure"))
    assert "|".join(texts) == sent


def test_a_limit_leaves_what_precedes_the_suffix():
    """In a gap within a line, with a threshold or without."""
    for least in (None, 0.25):
        around = "function f() {\n  const x = foo(a, ", ", b);\n  return x;\n}\n"
        ending = Ending("infill", "javascript", *around, "auto", least=least)
        out, reason = ending.feed("c);\n}\n\nfunction g() {\n  ret", 0.97)
        assert (out + ending.flush(whole=False), reason) == ("c", None)


def test_surprise_goes_on_with_its_text():
    """A gap charges a line for its own tokens, though a word waits until it is whole."""
    sure, found = Sure(1e-9), list[tuple[str, float]]()
    for text, sure.bits in (("a", 3.0), ("b c", 1.0), (" =", 2.0)):
        found.append((sure.feed(text)[0], sure.bits))
    assert found == [("", 0.0), ("ab", 3.0), (" c =", 3.0)]


def test_a_limit_leaves_no_half_word():
    ending = Ending("infill", "python", *ASSIGNED, "auto", least=0.25)
    assert ending.feed("a + con", 0.9) == ("a +", None)
    assert ending.flush(whole=False) == ""


@pytest.mark.parametrize("least", [None, 0.0])
def test_nothing_waits_without_a_threshold(least):
    ending = Ending("infill", "python", *ASSIGNED, "auto", least=least)
    assert ending.feed("a + con", 0.0) == ("a + con", None)


def test_a_long_text_without_words_goes_on():
    """As one word, and as words that never become one."""
    for text in ("a" * 10**5, "(" * 10**5, " " * 10**5):
        ending = Ending("complete", None, "", None, "none", least=0.25)
        assert ending.feed(text, 0.9)[1] is None


# By name: tokens, where the text begins, the text, and the three figures.
FIGURES = json.loads(r"""{
    "no token": ["", 0, "", []],
    "no text": ["a⁹", 0, "", []],
    "one line": ["a⁹ =⁷", 0, "a =", [0.8, 0.8, 0.63]],
    "two": ["a⁹ =⁷ 1\n²b¹⁰", 0, "a = 1\nb", [0.6, 0.7, 0.126]],
    "less than was written": ["a⁹ =⁷ 1²", 0, "a =", [0.8, 0.8, 0.63]],
    "a line end that was added": ["a⁹ =⁷", 0, "a =\n", [0.8, 0.8, 0.63]],
    "blank lines": ["\n²\n⁴a⁹", 0, "\n\na", [0.5, 0.5, 0.072]],
    "a text that begins later": ["Sure:\n```\n¹t⁹ = 1\n⁷", 10, "t = 1\n", [0.8, 0.8, 0.63]],
    "a block in a list": ["  a\n⁹  b\n⁵", 0, "a\nb", [0.9, 0.7, 0.45]],
    "a token with the end of what precedes it":
        ["<think>x</think¹>A⁹\n⁹B⁷", 16, "A\nB", [0.9, 0.8333, 0.567]],
    "half a character": ["⁵é⁷", 0, "é", [0.6, 0.6, 0.35]]
}""")


@pytest.mark.parametrize("name", FIGURES)
def test_how_sure_a_model_is(name):
    tokens, start, text, figures = FIGURES[name]
    assert list(confidence_of(tokens_of(tokens), start, text).values()) == figures
