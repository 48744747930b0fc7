"""How sure the model is of each line: by hand, and by the probabilities of a plain loop over the
real model.
"""

from __future__ import annotations

import random
import re
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_engine import ScriptedLlama
from test_vpsd import Reference, Vps, real, real_reference  # noqa: F401 (fixtures)

from cerebrum.vps.confidence import Confidence
from cerebrum.vps.decoder import Decoder
from cerebrum.vps.job import Job, Run
from cerebrum.vps.llama import Llama, Slot
from cerebrum.vps.vocabulary import GenerationRequest

A, B = ("a", 0.9), (" =", 0.7)  # tokens and their probabilities
C = (" 1\n", 0.2)  # a token ends a line, or
LATER = ("```\n", 0.1)  # what precedes the client's text
# The last but two begins the next line; the last ends the text.
TWO = [A, B, (" 1", 0.8), ("\n    ", 0.4), ("b", 1.0), ("", 0.6)]

FENCE = [LATER, ("t", 0.9), (" = 1\n", 0.7)]
LIST = [("  a\n", 0.9), ("  b\n", 0.5), ("  c\n", 0.1)]
BLANK = [("\n", 0.2), ("\n", 0.4), A, ("\n", 0.5)]
WITHIN = [("a", 0.9), ("\n b", 0.3)]
# By name: tokens, texts that are sent, the lines that each of them and the end complete, the
# result.
CASES: dict[str, tuple[Any, list[str], Any, tuple[float, float]]] = {
    "nothing": ([("", 0.3)], [], [[]], (0.3, 0.3)),
    "one line": ([A, B, ("", 0.5)], ["a", " ="], [[], [], [(0.7, 3)]], (0.7, 0.7)),
    "a line end of a token": (
        [A, B, C, ("b", 1.0)], ["a = 1\n", "b"], [[(0.6, 6)], [], [(1.0, 7)]], (0.6, 0.7),
    ),
    "two lines": (TWO, ["a = 1", "\n    b"], [[], [(0.7, 6)], [(0.8, 11)]], (0.7, 0.7333)),
    "blank lines": (BLANK, ["\n\na"], [[], [(0.5, 3)]], (0.5, 0.5)),
    "a text cut in its first line": (TWO, ["a ="], [[], [(0.8, 3)]], (0.8, 0.8)),
    "a text that begins later": ([LATER, *TWO], ["a = 1\n"], [[(0.7, 6)], []], (0.7, 0.7)),
    "a fence that has its beginning": (
        FENCE, ["t", " = 1\n"], [[], [(0.8, 6)], []], (0.8, 0.8),
    ),
    "a block in a list": (
        LIST, ["a\n", "b\nc"], [[(0.9, 2)], [(0.5, 4)], [(0.1, 5)]], (0.9, 0.5),
    ),
    "typed indentation": (
        [("  ", 0.2), ("a", 0.6), ("", 1.0)], ["a"], [[], [(0.6, 1)]], (0.6, 0.6),
    ),
    "a line within a token": (
        WITHIN, ["a", "\n b"], [[], [(0.6, 2)], [(0.3, 4)]], (0.6, 0.6),
    ),
    "half a character": ([("", 0.5), ("é", 0.7)], ["é"], [[], [(0.6, 1)]], (0.6, 0.6)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_lines_of_a_text(case: str) -> None:
    tokens, sent, judged, result = CASES[case]
    sure = Confidence()
    for token in tokens:
        sure.add(*token)
    begin = len(LATER[0]) * (tokens[0] == LATER)
    assert [*(sure.send(text, begin) for text in sent), sure.unfinished()] == judged
    assert tuple(sure.result().values()) == result


def test_the_least_sure_of_the_lines_that_a_token_ends() -> None:
    sure = Confidence()
    for token, least in ((A, 1.0), (C, 0.55), (("\n", 0.1), 1.0), (("b\nc\n", 0.5), 0.3)):
        assert sure.add(*token) == least


WORDS = [
    *("x", "x = 1", "x  ", "", "  ", "    ", "\t"),
    *("    y = x", "\tx", "return x", "é", "`x`", "\r", "x\r"),
]
TALK = ["x", "x = 1 is it", "  x", "", "  ", "return x", "Sure!"]  # begins like the code
ASKED = [
    GenerationRequest("def f():\n    ", language="python", stop=("é",)),
    GenerationRequest("def f():\n\t", stop_at="none"),
    GenerationRequest("def f():\n    ", suffix="    return z\n", mode="infill", language="python"),
    *[GenerationRequest("x", messages=[("user", "x")], mode="instruct")] * 3,
]


def mixed_case(rng: random.Random) -> tuple[GenerationRequest, str, int]:
    """A request, what a model writes, and where the client's text begins in it."""
    asked, lines = rng.choice(ASKED), rng.choices(WORDS, k=rng.randint(0, 6))
    if asked.mode != "instruct":
        indentation = "".join(rng.choices("  \t", k=rng.choice([0, 0, 4, 8])))
        return asked, indentation + "\n".join(lines), 0
    margin = " " * rng.choice([0, 0, 2, 4])
    talk = rng.choices(TALK, k=rng.randint(0, 3))
    before = "".join(f"{line}\n" for line in [*talk, f"{margin}```"])
    after = rng.choice(["", "\n", f"\n{margin}```\nx\n"])
    return asked, before + "\n".join(margin + line for line in lines) + after, len(before)


def judge(
    client: str, written: str, begin: int, tokens: list[tuple[int, float]]
) -> tuple[list[tuple[float, int]], list[float]]:
    """The lines and the result. Of the client's lines and the model's, only the indentation
    differs.
    """

    def mean_from(first: int, last: int) -> float:
        until_last = [token for token in tokens if token[0] <= last]
        inside = [sure for start, sure in until_last if first <= start]
        return round(mean(inside or [until_last[-1][1]]), 4)

    lines, sent = list[tuple[float, int]](), 0
    first = start = end = begin
    both = [re.findall(r"[^\n]*\n|[^\n]+", text) for text in (client, written[begin:])]
    for own, line in zip(*both, strict=False):
        sent += len(own)
        word = own.strip()
        if "\n" in own:
            last = start + len(line.removesuffix("\n"))
            end = start + len(line)
        else:
            last = start + line.index(word) + len(own.lstrip())
            end = last if word else end
        start += len(line)
        if word:
            lines.append((mean_from(first, last), sent))
            first = start
    whole = mean_from(begin, end) if client else mean_from(0, 0)
    return lines, [lines[0][0] if lines else whole, whole]


NO_SLOT: Any = SimpleNamespace(release=lambda *_: None)


def test_each_line_has_the_mean_of_its_own_tokens() -> None:
    """Wherever else the same text stands, however the model's text is split: by an oracle."""
    rng = random.Random("lines")
    for number in range(1000):
        asked, text, begin = mixed_case(rng)
        job = Job(replace(asked, min_confidence=0.0), lambda _: None)
        job.prepare(ScriptedLlama())  # type: ignore[arg-type]
        run, tokens = Run(job, Slot(0), []), list[tuple[int, float]]()
        written, reason = "", None
        most = rng.choice([1, 4, 40])
        while not reason:
            piece = text[len(written) :][: rng.randint(1, most)]
            run.probability = rng.random()
            tokens.append((len(written), run.probability))
            if not piece:
                run.confidence.add("", run.probability)
                break
            reason, written = run.feed(piece.encode()), written + piece
        Decoder._finish(NO_SLOT, run, reason or "stop", not reason)
        events: list[Any] = run.outbox
        client = "".join(event.get("token", "") for event in events)
        judged = [
            (event["confidence"], event["characters"]) for event in events if "characters" in event
        ]
        result = [events[-1]["confidence"], events[-1]["text_confidence"]]
        assert (judged, result) == judge(client, written, begin, tokens), (number, client, written)


@pytest.mark.parametrize(("temperature", "reason"), [(0.5, "block"), (0.6, None)])
def test_an_unlikely_token_is_no_doubt_at_a_high_temperature(
    temperature: float, reason: str | None
) -> None:
    asked = GenerationRequest("x = ", suffix="\ny = 2\n", mode="infill", language="python")
    asked = replace(asked, temperature=temperature)
    job = Job(asked, lambda _: None)
    job.prepare(ScriptedLlama())  # type: ignore[arg-type]
    run = Run(job, Slot(0), [])
    run.probability = 0.1
    assert [run.feed(piece) for piece in (b"1", b"\n", b"z = 5")] == [None, None, reason]


@pytest.mark.parametrize(("first", "reason"), [(0.9, "block"), (0.3, "unsure")])
def test_a_completion_that_ends_unsure_has_no_more_text_than_one_that_goes_on(
    first: float, reason: str
) -> None:
    """The unsure line itself comes, unless the suffix could follow before it: it stays a
    prediction.
    """
    begin, end = "def f(a):\n    x = ", "\n    return x\n"
    asked = GenerationRequest(begin, suffix=end, mode="infill", language="python")
    asked = replace(asked, min_confidence=0.5)
    job = Job(asked, lambda _: None)
    job.prepare(ScriptedLlama())  # type: ignore[arg-type]
    run, ends = Run(job, Slot(0), []), list[str | None]()
    pieces = (b"a + 1", b"\n", b"    y = 2", b"\n")
    for piece, run.probability in zip(pieces, (first, first, 0.2, 0.2), strict=True):
        ends.append(run.feed(piece))
        if ends[-1]:
            break
    assert (ends.pop(), {*ends}) == (reason, {None})
    Decoder._finish(NO_SLOT, run, reason)
    events: list[Any] = run.outbox
    assert "".join(event.get("token", "") for event in events) == "a + 1"
    assert [event for event in events if "characters" in event] == [
        {"confidence": first, "characters": 5}
    ]


def test_logits_that_are_no_numbers() -> None:
    row = np.array([np.nan, 1.0], np.float32)
    model: Any = SimpleNamespace(logits=lambda _: row)
    assert Llama.probability(model, 0, 0) == 0.0


PROMPT = "def fibonacci(n):\n    "


def test_the_confidence_is_that_of_a_plain_loop(
    real: Vps,  # noqa: F811
    real_reference: Reference,  # noqa: F811
) -> None:
    """With drafts, too: the second answer drafts the first, which the plain loop does not."""
    pieces, _ = real_reference.greedy(real_reference.tokenize(PROMPT), 40)
    ends = [number for number, piece in enumerate(pieces) if b"\n" in piece]
    first, whole = mean(real_reference.sure[: ends[0] + 1]), mean(real_reference.sure)
    for _ in range(2):
        answer = real.complete(PROMPT, max_tokens=40, mode="complete")
        assert answer["confidence"] == pytest.approx(first, abs=0.01)
        assert answer["text_confidence"] == pytest.approx(whole, abs=0.01)
    assert answer["draft_tokens"] > 0
    with real.stream(PROMPT, max_tokens=40, mode="complete", min_confidence=0.001) as stream:
        events = list(stream.events())
    lines = [
        (event["confidence"], event["characters"]) for event in events if "characters" in event
    ]
    text = "".join(event.get("token", "") for event in events)
    begun = bool(text.rpartition("\n")[2].strip())
    ends = [i for i, char in enumerate(text, 1) if char == "\n"] + [len(text)] * begun
    assert [end for _, end in lines] == ends
    assert (lines[0][0], events[-1]["finish_reason"]) == (answer["confidence"], "length")


def test_a_completion_ends_behind_a_line_that_is_less_sure(real: Vps) -> None:  # noqa: F811
    answer = real.complete(PROMPT, max_tokens=100, mode="complete", min_confidence=1)
    assert (answer["finish_reason"], answer["completion"].count("\n")) == ("unsure", 1)
    assert answer["confidence"] < 1
    assert real.refusal(PROMPT, min_confidence=1.5)[:2] == (400, "INVALID_REQUEST")
