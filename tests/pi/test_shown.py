"""Lines of which the model is not sure are not shown. The VPS is scripted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from harness import SHIPPED
from scripted import CHUNKED, HANG, Backend, Pi, chunk, event, pi_for, pi_with, token
from test_backends import LISTED, VLLM, engine
from test_editors import data, infill

from cerebrum.pi.completion import read_text, text_event
from cerebrum.pi.shown import shown
from cerebrum.settings import load_catalog
from cerebrum_common import threshold_of

LEAST = {"often": 0.3, "normal": 0.5, "seldom": 0.8}
MODELS = tuple(dataclasses.replace(one, min_confidence=LEAST) for one in SHIPPED)
CODE = {"prompt": "def f():\n    ", "language": "python", "suffix": "\n\nf()\n"}


def script(*lines: tuple[str, float], reason: str = "block", **done: Any) -> list[bytes]:
    """A completion of these lines, a token each, and how sure the VPS says it is of each."""
    pieces, end = [CHUNKED], 0
    for number, (text, confidence) in enumerate(lines, 1):
        end += len(text)
        judged = [event(confidence=confidence, characters=end)] if confidence >= 0 else []
        pieces += map(chunk, [token(text, number), *judged])
    figures = {"confidence": lines[0][1], "text_confidence": 0.7, **done}
    figures |= {"total_tokens": len(lines), "inference_time": 0.25, "finish_reason": reason}
    return [*pieces, chunk(event(done=True, **figures)), b"0\r\n\r\n"]


THREE = ("a = 1\n", 0.9), ("    b = 2\n", 0.6), ("    c", 0.4)
SHOWN = [
    (None, "a = 1\n    b = 2\n    c", "block"),
    (0, "a = 1\n    b = 2\n    c", "block"),
    (0.4, "a = 1\n    b = 2\n    c", "block"),
    (0.41, "a = 1\n    b = 2", "unsure"),
    (0.61, "a = 1", "unsure"),
    (0.91, "", "unsure"),
    (1, "", "unsure"),
]


@pytest.mark.parametrize(("least", "text", "reason"), SHOWN)
@pytest.mark.parametrize("split", [False, True])
async def test_lines_below_the_threshold_are_not_shown(
    least: float | None, text: str, reason: str, split: bool
) -> None:
    asked = {**CODE, **({} if least is None else {"min_confidence": least})}
    async with Backend([script(*THREE)], split=split) as backend, pi_for(backend.port) as pi:
        whole = (await pi.post("/v1/complete", asked)).json
        assert whole["completion"] == text
        assert whole["finish_reason"] == reason
        assert whole["confidence"] == 0.9
        *tokens, done = data(await pi.post("/v1/complete/stream", asked))
        assert "".join(one["token"] for one in tokens) == text
        assert done["finish_reason"] == reason
        assert [one["total_tokens"] for one in tokens] == [1, 2, 3][: len(tokens)]
        assert [body.get("min_confidence") for body in backend.completions] == [least or None] * 2


LIES = {
    "no judgement": ([("a\nb", -1.0)], "a\nb"),
    "one that is too long": ([("a\n", 0.9), ("b", -1.0)], "a\nb"),
    "half a line is judged": ([("a", 0.9), ("b\nc", 0.1)], "a"),
}
ODD = (
    event(confidence=2, characters=1),
    event(confidence="1", characters=1),
    event(confidence=0.5, characters=-1),
)


@pytest.mark.parametrize("name", LIES)
async def test_text_that_was_not_judged_is_shown(name: str) -> None:
    lines, text = LIES[name]
    lies = script(*lines, confidence="sure", text_confidence=3)
    async with pi_with([CHUNKED, *map(chunk, ODD), *lies[1:]]) as (pi, _):
        reply = (await pi.post("/v1/complete", {**CODE, "min_confidence": 0.5})).json
        assert reply["completion"] == text
        assert not {"confidence", "text_confidence"} & reply.keys()


SURE = script(("x", 0.9))
WORDS = [
    ({}, 0.3),
    ({"suggest": "always"}, None),
    ({"suggest": "normal"}, 0.5),
    ({"suggest": "normal", "min_confidence": 0.7}, 0.7),
]


@pytest.mark.parametrize(("more", "least"), WORDS)
async def test_a_word_means_a_threshold_of_the_model(
    more: dict[str, str], least: float | None
) -> None:
    async with pi_with(SURE, models=MODELS) as (pi, backend):
        assert (await infill(pi, filename="a.py", **more)).json["content"] == "x"
        assert backend.completions[0].get("min_confidence") == least


WRONG: list[dict[str, Any]] = [{"suggest": "perhaps"}, {"suggest": 1}, {"min_confidence": 1.01}]


async def test_never_asks_nobody_and_a_wrong_word_is_refused() -> None:
    async with pi_with(SURE, models=MODELS) as (pi, backend):
        reply = await infill(pi, suggest="never")
        assert reply.status == 200
        assert reply.json["content"] == ""
        assert reply.json["unsure"]
        assert backend.completions == []
        for members in WRONG:
            assert (await infill(pi, **members)).status == 400
    async with pi_with([HANG], models=MODELS) as (pi, backend):
        older = infill(pi)
        await backend.begun.wait()
        await infill(pi, prompt="    retu", suggest="never")
        assert (await older).json["content"] == ""
        assert (await pi.stats())["replaced"] == 1


def said(text: str) -> tuple[str, Any]:
    return "text", text_event(text)


TWO = [said("a\n"), ("judged", (0.9, 2)), said("b"), ("judged", (0.1, 3))]
DOS = [said("a\r\n"), ("judged", (0.9, 3)), said("b"), ("judged", (0.1, 4))]
TYPED = [said("c"), ("judged", (0.9, 2)), ("judged", (0.1, 4))]
PAIRS: dict[str, tuple[list[Any], tuple[str, str, str], str, str]] = {
    "a line end of its own": (TWO, ("x = ", "", ""), "a", "unsure"),
    "a gap of whole lines": (TWO, ("x\n", "", "c\n"), "a\n", "unsure"),
    "of which one is typed": ([said("b"), *TWO[1::2]], ("x\n", "a\n", "c\n"), "", "unsure"),
    "a gap that ends in its line": (TWO, ("x\n", "", "\nc\n"), "a", "unsure"),
    "a gap within a line": (TWO, ("x = f(", "", ")\n"), "a", "unsure"),
    "both characters of a line end": (DOS, ("", "", ""), "a", "unsure"),
    "typed into the second line": (TYPED, ("x", "a\nb", ""), "c", "stop"),
    "a replaced one": ([said("a")], ("", "", ""), "", "replaced"),
    "a replaced one that was judged": (TWO, ("", "", ""), "a", "replaced"),
    "no threshold": ([said("a\n"), said("b")], ("", "", ""), "a\nb", "stop"),
}


@pytest.mark.parametrize("name", PAIRS)
async def test_what_a_client_gets_of_the_pairs(name: str) -> None:
    pairs, (above, typed, below), text, reason = PAIRS[name]

    async def given() -> Any:
        yield "started", {"threshold": None if name == "no threshold" else 0.5}
        for pair in pairs:
            yield pair
        yield "done", {"finish_reason": reason if reason == "replaced" else "stop"}

    texts, kinds = b"", set[str]()
    gap = {"prompt": above + typed, "suffix": below}
    async for kind, value in shown(given(), gap, lambda: typed):
        kinds.add(kind)
        texts += value if kind == "text" else b""
    assert kinds <= {"started", "idle", "text", "done"}
    assert read_text(texts) == text
    assert (kind, value) == ("done", {"finish_reason": reason})


async def test_another_engine_says_nothing_and_hides_nothing() -> None:
    async with Backend([VLLM], models=LISTED) as backend, pi_for(engine(backend.port)) as pi:
        reply = (await pi.post("/v1/complete", {**CODE, "min_confidence": 1})).json
        assert reply["completion"] == "1 + 2"
        assert "confidence" not in reply
        assert "min_confidence" not in json.loads(backend.asked[-1][2])


async def typed(pi: Pi, text: str, **more: Any) -> tuple[str, bool, bool]:
    """The answer once the user has typed this: its text, and whether it is unsure or a
    prediction.
    """
    answer = (await infill(pi, prompt="    ret" + text, cache_prompt=True, **more)).json
    return answer["content"], "unsure" in answer, "type_through" in answer


async def test_a_hidden_line_is_shown_once_its_first_characters_are_typed() -> None:
    """One that follows a shown line, too; without another inference."""
    lines = script(("urn a\n", 0.9), ("    b = 2", 0.2), reason="unsure")
    async with pi_with(lines, models=MODELS) as (pi, backend):
        assert await typed(pi, "") == ("urn a", True, False)
        assert await typed(pi, "urn") == (" a", True, True)
        for indented in ("urn a", "urn a\n", "urn a\n    "):  # which an editor does by itself
            assert await typed(pi, indented) == ("", True, True)
        assert await typed(pi, "urn a\n    b") == (" = 2", True, True)
        assert len(backend.completions) == 1
    async with pi_with(script(("urn a", 0.2), reason="unsure"), models=MODELS) as (pi, backend):
        assert await typed(pi, "") == ("", True, False)
        assert await typed(pi, "u") == ("rn a", True, True)
        assert len(backend.completions) == 1
        await typed(
            pi, "", suggest="always"
        )  # it must not get what the model ended for another one's threshold
        assert len(backend.completions) == 2


async def test_only_what_is_shown_counts_as_shown() -> None:
    scripts = [script(("x\n", 0.9), ("y", 0.1)), script(("x", 0.1))]
    async with pi_with(*scripts, models=MODELS) as (pi, _):
        await infill(pi, prompt="    y = ")
        await infill(pi, prompt="    z = ")
        assert (await pi.stats())["unnamed"]["shown"] == 1


THRESHOLDS: dict[Any, float | None] = {
    "always": None,
    "often": None,
    "normal": 0.5,
    "seldom": None,
    0.2: 0.2,
    0.0: None,
    None: None,
}


def test_a_models_thresholds_are_read_and_checked(tmp_path: Any) -> None:
    entry = (
        '[[models]]\nid = "a"\nname = "a"\nparameters = "1"\nquantization = "q"\nfile = "a.gguf"\n'
    )
    path = tmp_path / "models.toml"
    path.write_text(entry + "min_confidence = {normal = 0.5}\n")
    (model,) = load_catalog(path, []).models
    for wanted, threshold in THRESHOLDS.items():
        assert threshold_of([model], "a", wanted) == threshold
    assert threshold_of([model], "forgotten by now", "normal") is None
    for wrong in ("0.5", "{normal = 2}", "{sometimes = 0.1}", '{often = "a"}'):
        path.write_text(f"{entry}min_confidence = {wrong}\n")
        with pytest.raises(ValueError, match=r"model 1: min_confidence: .*expected"):
            load_catalog(path, [])
