"""Requests for the text behind a suggestion that is shown, but not accepted: they take no place,
and what they find is there once the user accepts. The VPS is scripted.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from harness import Reply, until
from scripted import (
    CHUNKED,
    GOOD,
    HANG,
    Backend,
    Pi,
    answer,
    backend_at,
    chunk,
    pi_for,
    pi_with,
    script,
    token,
)
from test_editors import CHAT, CHATS, FILE, infill, read_whole, start

from cerebrum.settings import Client

BEHIND = {"prompt": "    return a", "temperature": 0}
HINT = script("urn", " a", confidence=0.9)
NEXT = script(" + b", confidence=0.7)
WRITING = [CHUNKED, chunk(token(" +", 1)), HANG]


def ahead(pi: Pi, **more: Any) -> asyncio.Task[Reply]:
    return infill(pi, **{**BEHIND, "speculative": True, **more})


def accepted(pi: Pi, **more: Any) -> asyncio.Task[Reply]:
    return infill(pi, **{**BEHIND, **more})


def assert_ended(reply: Reply):
    """It has no `content`, which llama.vim would remember."""
    assert (reply.status, reply.json["error"]["code"]) == (409, "SUPERSEDED")
    assert reply.json.keys() == {"error"}


async def shown(pi: Pi) -> int:
    """Characters of hints."""
    shown: int = (await pi.stats())["unnamed"]["shown"]
    return shown


async def test_what_was_computed_ahead_is_there_when_the_text_is_accepted():
    async with pi_with(HINT, NEXT) as (pi, backend):
        await infill(pi)
        assert await shown(pi) == 5
        pi.gateway.dispatcher.state.editors.clear()
        first = await ahead(pi)
        assert first.json["content"] == " + b"
        assert await shown(pi) == 5  # nobody has seen it
        assert pi.gateway.dispatcher.state.editors == {}
        for times in (1, 2):
            reply = await accepted(pi)
            assert reply.json["content"] == " + b"
            assert reply.json["confidence"] == 0.7
            assert "type_through" not in reply.json
            assert await shown(pi) == 9
            assert (await pi.stats())["shared"] == times
        assert len(backend.completions) == 2


OTHER_FIELDS = [
    {"input_suffix": "\n\nprint(add(1, 3))\n"},  # changed meanwhile
    {"input_prefix": "def add(a, c):\n"},
    {"t_max_predict_ms": 7},
    {"n_predict": 7},
    {"temperature": 0.1},
    {"filename": "b.py"},
    {"suggest": "always"},
]


@pytest.mark.parametrize("fields", OTHER_FIELDS, ids=str)
async def test_another_request_is_computed(fields):
    async with pi_with(HINT, NEXT) as (pi, backend):
        await infill(pi)
        await ahead(pi)
        await accepted(pi, **fields)
        assert len(backend.completions) == 3


CUT = [
    {"finish_reason": "length", "total_tokens": 3},  # of 512: by a limit of time
    {"finish_reason": "preempted"},
]


@pytest.mark.parametrize("result", CUT, ids=str)
async def test_a_text_that_was_cut_is_no_answer_later(result):
    async with pi_with(script(" +", " b", **result)) as (pi, backend):
        await ahead(pi)
        await accepted(pi)
        assert len(backend.completions) == 2


async def test_a_text_that_the_limit_of_tokens_has_cut_is_one():
    async with pi_with(script(" +", " b", finish_reason="length", total_tokens=2)) as (pi, backend):
        await ahead(pi, n_predict=2)
        assert (await accepted(pi, n_predict=2)).json["content"] == " + b"
        assert len(backend.completions) == 1


async def test_a_plain_completion_that_its_limit_has_cut_begins_no_other():
    async with pi_with(script("urn", " a", finish_reason="length"), GOOD) as (pi, backend):
        for prompt in ("ret", "return"):
            await start(pi, "/v1/completions", {"prompt": prompt, "temperature": 0})
        assert len(backend.completions) == 2


async def test_an_accepted_request_joins_the_one_that_is_being_written():
    """With its full rank: it takes a place, and other requests do not end it."""
    go = asyncio.Event()
    writing = script(go.wait, " + b", confidence=0.7)
    async with pi_with(writing, GOOD, max_concurrent=2) as (pi, backend):
        first = ahead(pi)
        await until(lambda: backend.running == 1)
        assert pi.active == 0
        joined = accepted(pi)
        await until(lambda: pi.active == 1)
        assert pi.gateway.dispatcher.state.editors
        assert (await start(pi.from_address("127.0.0.2"), CHATS, CHAT)).status == 200
        go.set()
        assert [(await one).json["content"] for one in (joined, first)] == [" + b", " + b"]
        assert len(backend.completions) == 2
        assert await shown(pi) == 4
        assert pi.gateway.requests == pi.first.requests_total == 2
        assert (await pi.stats())["unnamed"]["completions"] == 2


OTHERS = [
    (CHATS, CHAT),
    ("/infill", {**FILE, "filename": "b.py"}),
    ("/v1/complete", {"prompt": "x", "language": "python"}),
]


@pytest.mark.parametrize(("path", "body"), OTHERS, ids=str)
@pytest.mark.parametrize("hang", [[HANG], WRITING], ids=["reading", "writing"])
async def test_any_other_request_ends_it_for_all_who_read_it(path, body, hang):
    async with pi_with(hang, GOOD, max_concurrent=1) as (pi, backend):
        readers = [ahead(pi)]
        await backend.begun.wait()
        readers.append(ahead(pi.from_address("127.0.0.3")))
        await until(lambda: len(pi.readers) == 2)
        reply = await start(pi.from_address("127.0.0.2"), path, body)
        assert reply.status == 200
        for request in readers:
            assert_ended(await request)
        await backend.left.wait()
        assert backend.most_running == 1


async def test_typing_the_hint_ends_nothing_and_another_key_does():
    async with pi_with(HINT, WRITING, GOOD) as (pi, backend):
        await infill(pi)
        first = ahead(pi)
        await until(lambda: backend.running == 1)
        for word in ("u", "urn", "urn "):  # one after the other
            assert (await infill(pi, prompt=f"    ret{word}")).json["type_through"]
        assert not first.done()
        await infill(pi, prompt="    retx")
        assert_ended(await first)


async def test_only_the_newest_of_a_client_goes_on():
    async with pi_with([HANG], NEXT, HINT) as (pi, backend):
        first = ahead(pi)
        await backend.begun.wait()
        assert (await ahead(pi, filename="b.py")).status == 200
        assert_ended(await first)
        assert backend.most_running == 1
    async with pi_with([HANG], NEXT) as (pi, backend):
        first = ahead(pi)
        await backend.begun.wait()
        assert_ended(
            await start(pi.from_address("127.0.0.2"), "/infill", {**FILE, "speculative": True})
        )
        assert not first.done()  # of another client
        first.cancel()
        await backend.left.wait()


async def test_it_ends_reading_ahead_which_goes_on_afterwards():
    async with pi_with([HANG], NEXT) as (pi, backend):
        await infill(pi, filename="c.py", n_predict=0)
        await backend.begun.wait()
        assert (await ahead(pi)).json["content"] == " + b"
        await until(lambda: len(backend.completions) == 3 and not pi.reads_ahead())
        assert [sent["max_tokens"] for sent in backend.completions] == [0, 512, 0]


async def test_once_somebody_waits_it_is_tried_again_and_its_failure_counts():
    go = asyncio.Event()
    async with (
        Backend([[go.wait, answer(500, {})]]) as failing,
        Backend([NEXT]) as other,
        pi_for(backend_at(failing.port, "a"), backend_at(other.port, "b")) as pi,
    ):
        first = ahead(pi)
        await failing.begun.wait()
        joined = accepted(pi)
        await until(lambda: pi.active == 1)
        go.set()
        assert [(await one).json["content"] for one in (first, joined)] == [" + b", " + b"]
        counts, _ = (await pi.stats())["backends"]
        assert (counts["breaker"]["failures"], counts["requests_failed"]) == (1, 1)


async def test_once_nobody_waits_any_more_it_ends():
    async with pi_with(WRITING) as (pi, backend):
        first = ahead(pi)
        await until(lambda: backend.running == 1)
        joined = accepted(pi)
        await until(lambda: pi.active == 1)
        joined.cancel()
        assert_ended(await first)
        await backend.left.wait()


async def test_it_goes_on_while_one_of_its_clients_reads_it():
    go = asyncio.Event()
    async with pi_with(script(go.wait, " + b")) as (pi, _):
        first = ahead(pi.from_address("127.0.0.2"))
        second = ahead(pi)
        await until(lambda: len(pi.readers) == 2)
        first.cancel()
        await until(lambda: len(pi.readers) < 2)
        go.set()
        assert (await second).json["content"] == " + b"


async def test_one_that_waits_in_the_line_for_nobody_ends():
    async with pi_with([HANG], max_concurrent=1) as (pi, backend):
        running = start(pi.from_address("127.0.0.2"), CHATS, CHAT)
        await backend.begun.wait()
        waiting = accepted(pi)
        await until(lambda: len(pi.line) == 1)
        second = ahead(pi)
        await until(lambda: len(pi.readers) == 3)
        waiting.cancel()
        assert_ended(await second)
        assert (len(pi.line), len(backend.completions)) == (0, 1)
        running.cancel()
        await backend.left.wait()


HOUSE = {"a": Client("anna"), "t": Client("tom", 1)}


async def test_a_guest_who_joins_has_a_place_and_makes_room():
    scripts = [WRITING, GOOD]
    async with pi_with(*scripts, max_concurrent=1, clients=HOUSE) as (pi, _):
        body = {**FILE, **BEHIND, "suggest": "always"}
        first = start(pi, "/infill", {**body, "speculative": True}, X_API_Key="t")
        await until(lambda: bool(pi.at(0) and pi.at(0)[0].tokens))
        joined = start(pi, "/infill", body, X_API_Key="t")
        await until(lambda: pi.active == 1)
        assert (await start(pi, CHATS, CHAT, X_API_Key="a")).status == 200
        for reply in (await first, await joined):
            assert (reply.json["content"], reply.json["preempted"]) == (" +", True)


async def test_a_reload_and_other_models_forget_the_texts():
    async with pi_with(HINT, NEXT, HINT) as (pi, backend):
        await ahead(pi)
        pi.gateway.reconfigure(pi.gateway.config)
        assert (await accepted(pi)).json["content"] == " + b"
        backend.models = answer(200, {"models": [{"id": "qwen_1_5b"}, {"id": "qwen_0_5b"}]})
        pi.first._models_until = 0.0
        pi.first.wake.set()
        await until(lambda: len(pi.first.names) == 2)
        assert (await accepted(pi)).json["content"] == "urn a"


async def test_a_text_from_a_prompt_that_was_cut_is_no_answer_later():
    many = {"input_prefix": "a = other\n" * 3000, "t_max_prompt_ms": 3000}
    async with pi_with(script("a", " b", prompt_cut=True)) as (pi, backend):
        await accepted(pi, **many)
        await read_whole(pi, backend)
        await accepted(pi, **many)
        cut, read = backend.completions[:2]
        assert (cut["prompt_ms"], read["max_tokens"]) == (3000, 0)


FIRST = {**FILE, "t_max_predict_ms": 250, "response_fields": ["content", "tokens_cached"]}
SECOND = {**FIRST, "prompt": "    return a", "t_max_predict_ms": 1000}
NOT_CERTAIN = [
    {"response_fields": None},
    {"t_max_predict_ms": 250},  # as after a text that was accepted
    {"prompt": "    return "},  # behind a part of it
    {"input_suffix": "x"},
    {"filename": "b.py"},
]


async def test_llama_vims_own_are_known():
    async with pi_with(HINT, WRITING, GOOD, max_concurrent=1) as (pi, backend):
        await start(pi, "/infill", FIRST)
        first = start(pi, "/infill", SECOND)
        await until(lambda: backend.running == 1)
        assert pi.active == 0
        assert (await start(pi.from_address("127.0.0.2"), CHATS, CHAT)).status == 200
        assert_ended(await first)


@pytest.mark.parametrize("fields", NOT_CERTAIN, ids=str)
async def test_what_is_not_certainly_llama_vims_own_has_a_place(fields):
    async with pi_with(HINT, WRITING) as (pi, backend):
        await start(pi, "/infill", FIRST)
        first = start(pi, "/infill", {**SECOND, **fields})
        await until(lambda: backend.running == 1 or first.done())
        assert first.done() or pi.active == 1
        first.cancel()
