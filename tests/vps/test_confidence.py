"""How sure the model is, by the probabilities of a plain loop over the real model, and where a text
ends by them.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_engine import started
from test_vpsd import Reference, Vps, real, real_reference  # noqa: F401 (fixtures)

from cerebrum.request import GenerationRequest
from cerebrum.vps.llama import Llama

# By temperature and threshold: why a text ends that goes on after its line with an unlikely token.
ENDS = json.loads("""[
    [0.5, null, "block"], [0.6, null, null], [0.5, 0.2, "unsure"], [0.6, 0.2, "unsure"]]""")


def test_an_unlikely_token_at_a_high_temperature() -> None:
    for temperature, least, reason in ENDS:
        asked = GenerationRequest("x = ", suffix="\ny = 2\n", mode="infill", language="python")
        asked = replace(asked, temperature=temperature, min_confidence=least)
        run, ends = started(asked), list[str | None]()
        for piece, run.probability in ((b"1", 0.9), (b"\n", 0.9), (b"z = 5", 0.1)):
            ends.append(run.feed(piece))
        assert ends == [None, None, reason]
        assert "".join(event["token"] for event in run.outbox) in ("1", "1\nz = 5")  # type: ignore


def test_what_the_client_has_already_is_no_choice() -> None:
    run = started(GenerationRequest("pri", heal=True, min_confidence=0.5))
    for piece, run.probability in ((b"", 0.4), (b"nt", 0.9), (b"(a", 0.9)):
        assert run.feed(piece) is None
    assert run.outbox == [{"token": "nt(", "total_tokens": 0}]


def test_the_answer_to_a_chat_is_never_cut() -> None:
    asked = GenerationRequest("x", messages=[("user", "x")], mode="instruct", min_confidence=0.9)
    run = started(asked)
    run.probability = 0.1
    assert [run.feed(piece) for piece in (b"```\n", b"x = 1", b"\n")] == [None, None, None]


def test_logits_that_are_no_numbers() -> None:
    row = np.array([np.nan, 1.0], np.float32)
    model: Any = SimpleNamespace(logits=lambda _: row)
    assert Llama.probability(model, 0, 0) == 0.0


PROMPT = "def fibonacci(n):\n    "


@pytest.mark.slow
def test_the_confidence_is_that_of_a_plain_loop(
    real: Vps,  # noqa: F811
    real_reference: Reference,  # noqa: F811
):
    """With drafts, too: the second answer drafts the first, which the plain loop does not."""
    pieces, _ = real_reference.greedy(real_reference.tokenize(PROMPT), 40)
    sure = real_reference.sure
    line = next(number for number, piece in enumerate(pieces) if b"\n" in piece)
    line += pieces[line] != b"\n"  # whether its last token has more than the line end
    for _ in range(2):
        answer = real.complete(PROMPT, max_tokens=40, mode="complete")
        assert answer["confidence"] == pytest.approx(mean(sure[:line]), abs=0.02)
        assert answer["text_confidence"] == pytest.approx(mean(sure), abs=0.02)
        assert answer["chance"] == pytest.approx(math.prod(sure), rel=0.2)
    assert answer["draft_tokens"] > 0
