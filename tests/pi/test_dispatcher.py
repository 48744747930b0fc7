"""`decide`: what happens to a completion that has no place, as one table of cases."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
from scripted import backend_at

from cerebrum.pi.breaker import Breaker
from cerebrum.pi.completion import (
    SUPERSEDED,
    WAIT_SECONDS,
    Attempt,
    Completion,
    CompletionRequest,
)
from cerebrum.pi.dispatcher import (
    BUSY_SECONDS,
    EDITOR_SECONDS,
    Assign,
    Preempt,
    State,
    Wait,
    decide,
    whose_turn,
)
from cerebrum.pi.fleet import Fleet
from cerebrum.pi.upstream import BackendFailure
from cerebrum_common import HttpError, Model

NOW = 1000.0
CATALOG = (
    Model("big", "Big", ("python",), "7B", "Q4"),
    Model("small", "Small", ("python", "rust"), "1B", "Q4"),
)
CLOSED, TROUBLE, OPEN, HALF_OPEN, TRIAL = "closed", "trouble", "open", "half-open", "trial"
FAILED = BackendFailure("connection refused")


def breaker(health: str) -> Breaker:
    made = Breaker()
    made.trouble = "it is odd" if health == TROUBLE else ""
    if health in (OPEN, HALF_OPEN, TRIAL):
        made.open(0.0)
    if health in (HALF_OPEN, TRIAL):
        made.healthy(NOW)
    if health == TRIAL:
        made.admit(NOW)
    return made


def decided(
    kind: str = "",
    backends: Mapping[str, str] = {"a": "big small", "b": "big small"},
    health: Mapping[str, str] = {},
    api: Mapping[str, str] = {},
    running: Sequence[str] = (),  # "backend kind client", for those without a place at a limit of 2
    superseded: Sequence[str] = (),
    attempts: Sequence[
        tuple[str, str, HttpError]
    ] = (),  # backend, model, error; the last one has just ended
    editors: Mapping[str, float] = {},
    served: str = "",
    prefer: Mapping[str, Sequence[str]] = {},
    session: str = "",
    language: str = "python",
    mode: str = "complete",
    model: str | None = None,
    asked: float = NOW,
    in_line: bool = False,
    now: float = NOW,
    ahead: bool = False,
    guest: int = 0,
    regular: float = 0,  # seconds since somebody else got a place; 0: nobody did
    visits: Mapping[str, float] = {},  # seconds that a guest has held places in the last minute
) -> str:
    """`model@backend`, `wait SECONDS`, or the code of a refusal."""
    fleet = Fleet()
    fleet.replace(
        [backend_at(1, id, api=api.get(id, "cerebrum")) for id in backends], CATALOG, prefer
    )
    known = {one.id: one for one in fleet.backends}
    for id, models in backends.items():
        known[id].models = {model: {} for model in models.split()}
        known[id].breaker = breaker(health.get(id, CLOSED))
    state = State(fleet, editors={client: NOW - ago for client, ago in editors.items()})
    if regular:
        state.regular = NOW - regular
    for place in (*running, *superseded):
        id, other_kind, client = (*place.split(), "")[:3]
        is_guest = client in ("tom", "tim") or (client == "me" and guest > 0)
        other = CompletionRequest(
            other_kind.strip("-"), {}, client=client, session=client, guest=is_guest
        )
        began = NOW - len(running) + len(state.places)
        attempt = Attempt(Completion(other), id, "big", known[id].breaker.admit(NOW), begun=began)
        attempt.reason = SUPERSEDED if place in superseded else ""
        state.places[attempt] = known[id]
    fields = {"language": language, "mode": mode, "model": model, "filename": "f.py"}
    completion = Completion(
        CompletionRequest(kind, fields, client="me", session=session, ahead=ahead, guest=guest)
    )
    completion.requested = asked
    for id, name, error in attempts:
        completion.attempts.append(
            Attempt(completion, id, name, Breaker().admit(NOW), error=error, left=NOW)
        )
    state.visits = [
        (client, NOW - 59.0, NOW - 59.0 + seconds) for client, seconds in visits.items()
    ]
    if served:
        state.served[completion.request.file] = known[served]
    if in_line:
        state.line[Completion(replace(completion.request, guest=0))] = asyncio.Future(
            loop=asyncio.new_event_loop()
        )
    decision = decide(state, completion, now)
    if isinstance(decision, Assign):
        return f"{decision.model}@{decision.backend.id}"
    if isinstance(decision, Preempt):
        place = [*state.places].index(decision.guest)
        return f"end {(*running, *superseded)[place]}"
    return f"wait {decision.until - now:.1f}" if isinstance(decision, Wait) else decision.code


TOO_MANY, MISSING = HttpError("RATE_LIMIT", "busy"), HttpError("MODEL_LOAD_FAILED", "no file")
TWO = ["a -", "a -"]
FULL = [*TWO, "b -", "b -"]
APART = {"a": "big", "b": "small"}
ALONE = {"kind": "infill", "backends": {"a": "big"}}
PATIENCE = WAIT_SECONDS["infill"]
GUEST = {"kind": "infill", "guest": 3}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # Which model, and where.
        ({}, "big@a"),
        ({"language": "rust"}, "small@a"),
        ({"language": "cobol"}, "small@a"),  # vpsd says what is missing
        ({"kind": "infill", "language": "cobol"}, "big@a"),
        ({"model": "small"}, "small@a"),
        ({"prefer": {"complete": ["small"]}}, "small@a"),
        ({"mode": "infill", "prefer": {"infill": ["small"]}}, "small@a"),
        ({"mode": "chat", "language": "", "prefer": {"instruct": ["small"]}}, "small@a"),
        ({"prefer": {"infill": ["small"], "instruct": ["small"]}}, "big@a"),
        ({"language": "rust", "prefer": {"complete": ["big"]}}, "small@a"),
        ({"backends": {"a": "small", "b": "big"}}, "big@b"),
        ({"backends": {"a": "small", "b": "big"}, "running": ["b -", "b -"]}, "small@a"),
        ({"kind": "infill", "language": "rust", "backends": {"a": "big"}}, "big@a"),
        ({"backends": {"a": "small", "b": "small"}, "api": {"a": "openai"}, "model": "big"}, "big@b"),
        ({"backends": {"a": "small"}, "api": {"a": "openai"}, "model": "big"}, "MODEL_NOT_FOUND"),
        # The least busy backend, or the one that has read the file.
        ({"running": ["a -"]}, "big@b"),
        ({"running": ["b -"], "served": "b"}, "big@b"),
        ({"running": ["b -", "b -"], "served": "b"}, "big@a"),
        # No place: our own API gets 429, a dialect waits as long as its clients do.
        ({"running": FULL}, "RATE_LIMIT"),
        ({"kind": "infill", "running": FULL}, f"wait {PATIENCE}"),
        ({"kind": "chat", "running": FULL}, f"wait {WAIT_SECONDS['chat']}"),
        ({"kind": "infill", "running": FULL, "asked": NOW - 1}, f"wait {PATIENCE - 1}"),
        ({"kind": "infill", "running": FULL, "asked": NOW - PATIENCE}, "RATE_LIMIT"),
        # A newer request of a session gets the place of the older one; so does anybody if that is
        # being ended.
        ({"session": "s", "running": ["a - s", "a -", "b -", "b -"]}, "big@a"),
        ({"session": "t", "running": ["a - s", "a -", "b -", "b -"]}, "RATE_LIMIT"),
        ({"running": ["a -", "b -", "b -"], "superseded": ["a - s"]}, "big@a"),
        ({"superseded": ["a - s"]}, "big@b"),
        # A place is kept for an editor that was there a moment ago.
        ({"kind": "chat", "running": ["a chat", "a chat", "b chat"]}, "big@b"),
        ({"kind": "chat", "running": ["a chat", "a chat", "b chat"], "editors": {"you": 5}}, "wait 30.0"),
        ({"kind": "chat", "running": ["a chat", "a completion", "b chat"], "editors": {"me": 5}}, "wait 30.0"),
        ({"kind": "chat", "running": ["a chat", "a infill", "b -"], "editors": {"you": 5}}, "big@b"),
        ({"kind": "chat", "running": ["a chat", "a chat", "b chat"], "editors": {"you": EDITOR_SECONDS}}, "big@b"),
        ({"kind": "chat", "running": TWO, "editors": {"you": 5}, "backends": APART, "model": "small"}, "small@b"),
        ({"running": ["a chat", "a chat", "b chat"], "editors": {"you": 5}}, "big@b"),
        ({"kind": "infill", "running": ["a chat", "a chat", "b chat"], "editors": {"you": 5}}, "big@b"),
        ({"kind": "infill", "running": ["a infill me"] * 2 + ["b infill me"], "editors": {"you": 5}}, "wait 3.0"),
        ({"kind": "infill", "running": ["a infill me"] * 2 + ["b infill me"], "editors": {"me": 5}}, "big@b"),
        ({"kind": "infill", "running": ["a infill me"] * 2 + ["b infill you"], "editors": {"you": 5}}, "big@b"),
        # Breakers. A backend in trouble is asked if there is no other; a trial's end is worth
        # waiting for.
        ({"health": {"a": OPEN}}, "big@b"),
        ({"health": {"a": TROUBLE}}, "big@b"),
        ({"health": {"a": TROUBLE, "b": OPEN}}, "big@a"),
        ({"health": {"a": TROUBLE}, "running": ["b -", "b -"]}, "RATE_LIMIT"),
        ({"health": {"a": OPEN, "b": OPEN}}, "VPS_UNAVAILABLE"),
        ({"kind": "infill", "health": {"a": OPEN, "b": OPEN}}, "VPS_UNAVAILABLE"),
        ({"health": {"a": HALF_OPEN, "b": OPEN}}, "big@a"),
        ({"health": {"a": TRIAL, "b": OPEN}}, "VPS_UNAVAILABLE"),
        ({"kind": "infill", "health": {"a": TRIAL, "b": OPEN}}, f"wait {PATIENCE}"),
        ({"kind": "infill", "health": {"a": TRIAL, "b": OPEN}, "asked": NOW - PATIENCE}, "VPS_UNAVAILABLE"),
        ({"health": {"a": TRIAL}}, "big@b"),
        # What has failed is not asked again, but another model may be there.
        ({"attempts": [("a", "big", FAILED)]}, "big@b"),
        ({"attempts": [("a", "big", FAILED), ("b", "big", FAILED)]}, "VPS_UNAVAILABLE"),
        ({"attempts": [("a", "big", MISSING), ("b", "big", FAILED)]}, "small@a"),
        ({"attempts": [("a", "big", MISSING)]}, "big@b"),
        ({"attempts": [("a", "big", MISSING)], "backends": {"a": "big small"}}, "small@a"),
        ({"attempts": [("a", "big", MISSING)], "backends": {"a": "big small"}, "model": "big"}, "MODEL_LOAD_FAILED"),
        ({"attempts": [("a", "big", MISSING), ("b", "big", FAILED)], "model": "big"}, "MODEL_LOAD_FAILED"),
        ({"attempts": [("a", "big", FAILED)], "running": ["b -", "b -"]}, "VPS_UNAVAILABLE"),
        ({"attempts": [("a", "big", FAILED)], "running": ["b -", "b -"], "kind": "infill"}, f"wait {PATIENCE}"),
        # A 429 is final for our own API, and a pause for a dialect.
        ({"attempts": [("a", "big", TOO_MANY)], "backends": {"a": "big"}}, "RATE_LIMIT"),
        ({"attempts": [("a", "big", TOO_MANY)], "kind": "infill"}, "big@b"),
        ({"attempts": [("a", "big", TOO_MANY), ("b", "big", TOO_MANY)], "kind": "infill"}, f"wait {2 * BUSY_SECONDS}"),
        (ALONE | {"attempts": [("a", "big", TOO_MANY)] * 9}, "wait 1.0"),
        (ALONE | {"attempts": [("a", "big", TOO_MANY)], "now": NOW + 0.11}, "big@a"),
        ({"attempts": [("a", "big", TOO_MANY)], "kind": "infill", "running": ["b -", "b -"]}, f"wait {BUSY_SECONDS}"),
        (ALONE | {"attempts": [("a", "big", TOO_MANY)] * 9, "asked": NOW - 2.5}, "RATE_LIMIT"),
        # Reading ahead waits for an idle backend of a kind that costs nothing, and for those that
        # wait.
        ({"kind": "infill", "ahead": True}, "big@a"),
        ({"kind": "infill", "ahead": True, "running": ["a -"]}, "big@b"),
        ({"kind": "infill", "ahead": True, "running": ["a -", "b -"]}, "wait inf"),
        ({"kind": "infill", "ahead": True, "in_line": True}, "wait inf"),
        # It goes where the next request of its file will go, or waits for that backend.
        ({"kind": "infill", "ahead": True, "served": "b"}, "big@b"),
        ({"kind": "infill", "ahead": True, "served": "b", "running": ["b -"]}, "wait inf"),
        ({"kind": "infill", "ahead": True, "served": "b", "running": ["b -", "b -"]}, "wait inf"),
        ({"kind": "infill", "ahead": True, "backends": {"a": "big", "b": "small"}, "running": ["a -"]}, "wait inf"),
        ({"kind": "infill", "ahead": True, "served": "a", "running": ["a -"], "health": {"b": TROUBLE}}, "wait inf"),
        ({"kind": "infill", "ahead": True, "health": {"a": HALF_OPEN, "b": OPEN}}, "wait inf"),
        ({"kind": "infill", "ahead": True, "api": {"a": "openai"}}, "big@b"),
        ({"kind": "infill", "ahead": True, "api": {"a": "llama.cpp"}}, "big@a"),
        ({"kind": "infill", "ahead": True, "api": {"a": "openai", "b": "openai"}}, "VPS_UNAVAILABLE"),
        # A guest has so many places, and only what the others leave: nobody else waits, and one
        # place stays free.
        (GUEST, "big@a"),
        (GUEST | {"guest": 1, "running": ["a - me"]}, "wait 3.0"),
        (GUEST | {"guest": 1, "running": ["a - tom"]}, "big@b"),
        ({"guest": 1, "running": ["a - me"]}, "RATE_LIMIT"),
        (GUEST | {"running": ["a - me", "a - tom", "b - me"]}, "big@b"),
        (GUEST | {"running": ["a - me", "a - tom", "b - me"], "regular": EDITOR_SECONDS}, "big@b"),
        (GUEST | {"running": ["a - me", "a - tom", "b - me"], "regular": 5}, "wait 3.0"),
        (GUEST | {"running": ["a - me", "a - tom", "b - you"], "regular": 5}, "big@b"),
        (GUEST | {"in_line": True}, "wait 3.0"),
        ({"guest": 1, "session": "me", "running": ["a - me"]}, "big@b"),  # which ends the older one
        ({"kind": "infill", "running": ["a - me", "a - tom", "b - me"], "in_line": True}, "big@b"),
        # Guests make room for everybody else: first those who have had most of the last minute, and
        # the newest.
        ({"running": ["a - tom", "a chat tom", "b -", "b -"]}, "end a chat tom"),
        ({"running": ["a chat tom", "a infill tom", "b -", "b -"]}, "end a chat tom"),
        ({"running": ["a - tom", "a - tim", "b -", "b -"]}, "end a - tom"),
        ({"running": ["a - tom", "a - tim", "b -", "b -"], "visits": {"tim": 9}}, "end a - tim"),
        ({"running": ["a - tom", "a - tim", "b -", "b -"], "visits": {"tom": 20, "tim": 11}}, "end a - tom"),
        ({"kind": "infill", "running": ["a - tom", "a -", "b -", "b -"]}, "end a - tom"),
        ({"running": ["a - tom", "a -", "b - tim", "b -"], "visits": {"tom": 2, "tim": 50}}, "end b - tim"),
        ({"health": {"a": HALF_OPEN, "b": OPEN}, "running": ["a - tom"]}, "end a - tom"),
        ({"health": {"a": HALF_OPEN, "b": OPEN}, "running": ["a -"]}, "VPS_UNAVAILABLE"),
        (GUEST | {"health": {"a": HALF_OPEN, "b": OPEN}, "running": ["a - tom"]}, "wait 3.0"),
        ({"running": ["a -", "a -", "b - tom", "b -"], "backends": APART}, "end b - tom"),
        ({"running": ["a -", "a -", "b - tom", "b -"], "backends": APART, "model": "big"}, "RATE_LIMIT"),
        ({"running": ["a - tom", "a -", "b -", "b -"], "health": {"a": OPEN}}, "RATE_LIMIT"),
        ({"running": ["a - tom", "a -", "b -"]}, "big@b"),
        ({"running": ["a - tom", "a - tim", "b -"], "superseded": ["b - tom"]}, "big@b"),
        (GUEST | {"running": ["a - tom", "a - tim", "b - tom", "b - tim"]}, "wait 3.0"),
        ({"kind": "infill", "ahead": True, "running": ["a - tom", "b - tom"]}, "wait inf"),
        # Not if it would get no place without them either.
        ({"kind": "chat", "running": ["a chat tom", "a chat", "b -"], "editors": {"you": 5}}, "big@b"),
        ({"kind": "chat", "running": ["a chat tom", "a chat", "b chat"], "editors": {"you": 5}}, "end a chat tom"),
        ({"kind": "chat", "running": ["a - tom", "a chat", "b chat", "b chat"], "editors": {"you": 5}}, "wait 30.0"),
        ({"kind": "infill", "running": ["a infill me"] * 3 + ["b - tom"], "editors": {"you": 5}}, "wait 3.0"),
    ],
)  # fmt: skip
def test_decide(case: dict[str, Any], expected: str) -> None:
    assert decided(**case) == expected


def test_a_guests_seconds() -> None:
    state = State(
        Fleet(), visits=[("tom", 930.0, 935.0), ("tom", 935.0, 945.0), ("tim", 941.0, 946.0)]
    )
    for client, begun in (("tom", 990.0), ("tom", 999.0), ("tim", 900.0), ("anna", 0.0)):
        request = CompletionRequest("chat", {}, client=client, guest=2, ahead=client == "anna")
        attempt = Attempt(Completion(request), "a", "big", Breaker().admit(NOW), begun=begun)
        state.places[attempt] = cast(Any, None)
    assert [state.guest_seconds(client, NOW) for client in ("tom", "tim", "anna")] == [
        5 + 10 + 1,
        5 + 60,
        0,
    ]


def test_people_take_turns() -> None:
    """Those who wait, in the order in which they would get places: name, kind, places held, seconds
    since a turn.
    """
    state, held = (
        State(Fleet(), turns={"anna": NOW - 5, "ben": NOW - 9, "tim": -math.inf}),
        {"dora": 1},
    )
    line = [
        ("tom", "infill"),
        ("tim", "chat"),
        ("dora", "infill"),
        ("anna", "chat"),
        ("anna", "infill"),
        ("ben", "chat"),
        ("cora", ""),
    ]
    waiting = [
        Completion(CompletionRequest(kind, {}, client=name, guest=name in ("tom", "tim")))
        for name, kind in line
    ]
    waiting.sort(key=lambda one: whose_turn(state, Counter(held), one))
    turns = [f"{one.client} {one.request.kind}".strip() for one in waiting]
    assert turns == [
        "cora",
        "ben chat",
        "anna infill",
        "anna chat",
        "dora infill",
        "tim chat",
        "tom infill",
    ]
