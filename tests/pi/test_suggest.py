"""What a client gets of how sure a model is: the text up to there, and figures. The backends are
scripted.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from scripted import CHUNKED, HANG, chunk, pi_with, script
from test_backends import LAST, data, llama_chunk, pi_before
from test_editors import infill

CODE = {"prompt": "def f():\n    ", "language": "python", "suffix": "\n\nf()\n"}
SURE = script("urn a", finish_reason="unsure", confidence=0.9, text_confidence=0.7, chance=0.4)
WORDS = [
    ({}, 0.1),
    ({"suggest": "always"}, None),
    ({"suggest": "often"}, 0.1),
    ({"suggest": "normal"}, 0.2),
    ({"suggest": "seldom"}, 0.5),
    ({"suggest": "normal", "min_confidence": 0.7}, 0.7),
]


@pytest.mark.parametrize(("more", "least"), WORDS)
async def test_a_word_is_a_chance(more, least):
    async with pi_with(SURE) as (pi, backend):
        reply = (await infill(pi, filename="a.py", **more)).json
        assert (reply["content"], reply["unsure"]) == ("urn a", True)
        assert [reply[name] for name in ("confidence", "text_confidence", "chance")] == [
            0.9,
            0.7,
            0.4,
        ]
        assert backend.completions[0].get("min_confidence") == least


WRONG = [{"suggest": "perhaps"}, {"suggest": 1}, {"min_confidence": 1.01}]


async def test_never_asks_nobody_and_a_wrong_word_is_refused():
    async with pi_with(SURE) as (pi, backend):
        reply = await infill(pi, suggest="never")
        assert (reply.status, reply.json["content"], reply.json["unsure"]) == (200, "", True)
        assert backend.completions == []
        for members in WRONG:
            assert (await infill(pi, **members)).status == 400
    async with pi_with([HANG]) as (pi, backend):
        older = infill(pi)
        await backend.begun.wait()
        await infill(pi, prompt="    retu", suggest="never")
        assert (await older).json["content"] == ""
        assert (await pi.stats())["replaced"] == 1


def told(text: str, *probabilities: Any) -> bytes:
    """An event of llama-server, with the probability of each of its tokens."""
    tokens = [{"token": text, "logprob": one, "top_logprobs": [{}]} for one in probabilities]
    return llama_chunk(text, 1, **({"completion_probabilities": tokens} if tokens else {}))


# What it says of a token that it has accepted from a draft.
PLACEHOLDER = [{"id": 7, "token": " + 2", "bytes": [32], "logprob": 0.0, "top_logprobs": []}]
DRAFTED = llama_chunk(" + 2", 1, completion_probabilities=PLACEHOLDER)
HALF = math.log(0.5)
WHOLE = ("1 + 2 + 3", "stop", None)
# By name: the events of llama-server, the text, why it ends, its chance.
LLAMA = {
    "sure": ([told("1", -0.01), told(" + 2", 0.0)], ("1 + 2", "stop", 0.99)),
    "unsure": (
        [told("1", HALF), told(" +", HALF), told(" 2", HALF), told(" + 3", HALF)],
        ("1 +", "unsure", 0.25),
    ),
    "two tokens in an event": (
        [told("1", -0.01), told(" +", HALF, 2 * HALF)],
        ("1", "unsure", 0.99),
    ),
    "no probability": ([told("1"), told(" + 2 + 3")], WHOLE),
    "from a draft": ([told("1", -0.01), DRAFTED, told(" + 3", -0.01)], WHOLE),
    "unsure behind a draft": ([DRAFTED, told(" + 3", 3 * HALF)], (" + 2", "unsure", None)),
    "an empty list": ([llama_chunk("1 + 2 + 3", 1, completion_probabilities=[])], WHOLE),
    "no number": ([told("1", "low"), told(" + 2 + 3", None)], WHOLE),
    "more than 1": ([told("1", 0.1), told(" + 2 + 3", True)], WHOLE),
}


@pytest.mark.parametrize("name", LLAMA)
async def test_llama_server_tells_its_probabilities(name):
    events, expected = LLAMA[name]
    answered = [CHUNKED, *map(chunk, events), chunk(data(LAST)), b"0\r\n\r\n"]
    async with pi_before(answered, api="llama.cpp") as (pi, backend):
        asked = {**CODE, "min_confidence": 0.2}
        reply = (await pi.post("/v1/complete", asked)).json
        chance = reply.get("chance")
        assert (reply["completion"], reply["finish_reason"], chance) == expected
        assert backend.completions[-1]["n_probs"] == 1
        await pi.post("/v1/complete", CODE)
        assert "n_probs" not in backend.completions[-1]


@pytest.mark.parametrize("least", [0.2, 1])
async def test_a_chat_is_never_cut(least):
    answered = [
        CHUNKED,
        *map(chunk, [told("Hello wor"), told("ld")]),
        chunk(data(LAST)),
        b"0\r\n\r\n",
    ]
    async with pi_before(answered, api="llama.cpp") as (pi, _):
        said = {"messages": [{"role": "user", "content": "hi"}], "min_confidence": least}
        reply = (await pi.post("/v1/chat/completions", {**said, "stream": True})).body.decode()
        assert reply.index("Hello wor") < reply.index('"ld"')
